//! Copies a tensor from a source to an output, some rows at a time.

use sparsepack_formats::{DType, Encoder, Encoding, encoding};

use super::{error::Result, plan::OutputTensor};
use crate::model::{ModelError, ModelSource};

/// Bytes decoded at a time.
const CHUNK_BYTES: usize = 8 << 20;

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
    let tensor = source.tensor(&output.name)?;
    let dtype: DType = output.encoding.value_dtype();
    let parts = source.reader().components(&tensor.stored_name)?;
    let own = (tensor.encoding == (Encoding::Dense { dtype }) && tensor.permuted_heads.is_none())
        .then(|| parts[0]);
    let mut encoder = Encoder::new(output.encoding, &output.name, &output.shape)?;
    let mut encode = |dense: &[u8]| {
        encoder
            .rows(dense)?
            .into_iter()
            .enumerate()
            .try_for_each(|(part, bytes)| write(part, bytes))
    };
    let matrix = encoding::MatrixShape::of(&tensor.shape);
    let row_bytes = matrix.cols * dtype.size_bytes();
    let rows_at_once = (CHUNK_BYTES / row_bytes.max(1)).max(1);
    match own {
        Some(bytes) if !dtype.is_float_weight() => {
            bytes.chunks((rows_at_once * row_bytes).max(1)).try_for_each(&mut encode)?;
        }
        // A vector is one row, but `read_rows_f32` counts its elements as rows.
        _ if tensor.shape.len() < 2 => {
            let values = source.read_f32(&output.name)?;
            source.check_finite(&output.name, &values)?;
            match own {
                Some(bytes) => encode(bytes)?,
                None => encode(&encoded(&output.name, dtype, &values)?)?,
            }
        }
        _ => {
            let mut row = 0;
            while row < matrix.rows {
                let rows = row..(row + rows_at_once).min(matrix.rows);
                row = rows.end;
                let values = source.read_rows_f32(&output.name, rows.clone())?;
                check_finite(source, &output.name, rows.start, &values)?;
                match own {
                    Some(bytes) => encode(&bytes[rows.start * row_bytes..rows.end * row_bytes])?,
                    None => encode(&encoded(&output.name, dtype, &values)?)?,
                }
            }
        }
    }
    for (component, rest) in encoder.finish()?.into_iter().enumerate() {
        write(component, rest)?;
    }
    source.reader().release(&[&tensor.stored_name]);
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
