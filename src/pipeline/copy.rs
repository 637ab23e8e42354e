//! Streams a tensor out of a source, some rows at a time, and copies it to an output.

use sparsepack_formats::{DType, Encoder, Encoding, encoding};

use super::{error::Result, plan::OutputTensor};
use crate::model::{ModelError, ModelSource};

/// Bytes of dense rows held at a time. As many pieces as the writer's queue holds may wait beside it.
const CHUNK_BYTES: usize = 1 << 20;

/// Hands the bytes of `output`'s components to `write` piece by piece. Float weights are checked to
/// be finite. Where the source already stores the output's element type, the values are the source's
/// own, bit for bit.
///
/// # Errors
/// A tensor that cannot be read, holds NaN or infinity, or does not fit the output's type or
/// encoding; what `write` returns.
pub(super) fn copy_tensor(
    source: &ModelSource,
    output: &OutputTensor,
    mut write: impl FnMut(usize, Vec<u8>) -> Result<()>,
) -> Result<()> {
    let mut encoder = Encoder::new(output.encoding, &output.name, &output.shape)?;
    stream_rows(source, &output.name, output.encoding.value_dtype(), |rows| {
        let parts = encoder.rows(rows)?;
        parts.into_iter().enumerate().try_for_each(|(part, bytes)| write(part, bytes))
    })?;
    encoder.finish()?.into_iter().enumerate().try_for_each(|(part, bytes)| write(part, bytes))
}

/// Shows the rows of the tensor `name` in order as little-endian bytes of `dtype`, about a megabyte
/// at a time, and gives the pages of the source back behind them. Float weights are checked to be
/// finite.
///
/// # Errors
/// A tensor that cannot be read, holds NaN or infinity, or a value too large for `dtype`; what `show`
/// returns.
pub(super) fn stream_rows(
    source: &ModelSource,
    name: &str,
    dtype: DType,
    mut show: impl FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let tensor = source.tensor(name)?;
    let parts = source.reader().components(&tensor.stored_name)?;
    let own = (tensor.encoding == (Encoding::Dense { dtype }) && tensor.permuted_heads.is_none())
        .then(|| parts[0]);
    let matrix = encoding::MatrixShape::of(&tensor.shape);
    let row_bytes = matrix.cols * dtype.size_bytes();
    let rows_at_once = (CHUNK_BYTES / row_bytes.max(1)).max(1);
    let release = || source.reader().release(&[&tensor.stored_name]);
    match own {
        Some(bytes) if !dtype.is_float_weight() => {
            for rows in bytes.chunks((rows_at_once * row_bytes).max(1)) {
                show(rows)?;
                release();
            }
        }
        // A vector is one row, but `read_rows_f32` counts its elements as rows.
        _ if tensor.shape.len() < 2 => {
            let values = source.read_f32(name)?;
            source.check_finite(name, &values)?;
            match own {
                Some(bytes) => show(bytes)?,
                None => show(&encoded(name, dtype, &values)?)?,
            }
        }
        _ => {
            let mut row = 0;
            while row < matrix.rows {
                let rows = row..(row + rows_at_once).min(matrix.rows);
                row = rows.end;
                let values = source.read_rows_f32(name, rows.clone())?;
                check_finite(source, name, rows.start, &values)?;
                match own {
                    Some(bytes) => show(&bytes[rows.start * row_bytes..rows.end * row_bytes])?,
                    None => show(&encoded(name, dtype, &values)?)?,
                }
                release();
            }
        }
    }
    release();
    Ok(())
}

/// As [`ModelSource::check_finite`] for rows that start at `first_row`.
fn check_finite(source: &ModelSource, name: &str, first_row: usize, values: &[f32]) -> Result<()> {
    source.check_finite(name, values).map_err(|mut error| {
        if let ModelError::NonFinite { row, .. } = &mut error {
            *row += first_row;
        }
        error.into()
    })
}

fn encoded(name: &str, dtype: DType, values: &[f32]) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(values.len() * dtype.size_bytes());
    encoding::dense::encode_f32(name, dtype, values, &mut bytes)?;
    Ok(bytes)
}
