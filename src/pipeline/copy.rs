//! Streams a tensor out of a source, some rows at a time, and copies it to an output.

use std::ops::Range;

use sparsepack_formats::{CheckpointReader, DType, Encoder, Encoding, encoding};

use super::{error::Result, plan::OutputTensor};
use crate::model::{GGUF_ROPE_FACTORS, ModelError, ModelSource, ModelTensor, hf_row, to_gguf_rows};

/// Bytes of dense rows held at a time. As many pieces as the writer's queue holds may wait beside it.
const CHUNK_BYTES: usize = 1 << 20;

/// Whether the stored bytes of `tensor` are those of `output` as planned, unless it is pruned.
pub(super) fn is_stored_so(tensor: &ModelTensor, output: &OutputTensor) -> bool {
    (!tensor.encoding.is_packed() || tensor.encoding.is_quantized())
        && tensor.encoding == output.encoding
        && tensor.permuted_heads == output.permuted_heads
}

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
    if let Some(factors) = source.rope_factors().filter(|_| output.name == GGUF_ROPE_FACTORS) {
        return write(0, encoded(&output.name, DType::F32, &factors)?);
    }
    let tensor = source.tensor(&output.name)?;
    if is_stored_so(tensor, output) {
        return copy_finite(source, tensor, write);
    }
    let mut encoder = Encoder::new(output.encoding, output.stored_name(), &output.shape)?;
    let dtype = output.encoding.value_dtype();
    let encode = |rows: &[u8]| -> Result<()> {
        let parts = encoder.rows(rows)?;
        parts.into_iter().enumerate().try_for_each(|(part, bytes)| write(part, bytes))
    };
    match output.permuted_heads {
        None => stream_rows(source, &output.name, dtype, encode)?,
        Some(heads) => stream_gguf_rows(source, tensor, heads, dtype, encode)?,
    }
    encoder.finish()?.into_iter().enumerate().try_for_each(|(part, bytes)| write(part, bytes))
}

/// Hands on the stored bytes of a tensor, component by component.
///
/// # Errors
/// A tensor that cannot be read; what `write` returns.
pub(super) fn copy_stored(
    source: &ModelSource,
    tensor: &ModelTensor,
    mut write: impl FnMut(usize, Vec<u8>) -> Result<()>,
) -> Result<()> {
    let components = tensor.encoding.components(&tensor.stored_name, &tensor.shape)?;
    for (part, component) in components.iter().enumerate() {
        for range in pieces(component.bytes) {
            let bytes = source.reader().read_component(&tensor.stored_name, part, range)?;
            write(part, bytes.into_owned())?;
        }
    }
    Ok(())
}

/// Hands on the stored bytes of every component of a tensor that is kept as it is, whatever its values
/// are.
///
/// # Errors
/// A tensor that cannot be read; what `write` returns.
pub(super) fn copy_components(
    reader: &dyn CheckpointReader,
    output: &OutputTensor,
    mut write: impl FnMut(usize, Vec<u8>) -> Result<()>,
) -> Result<()> {
    let components = output.encoding.components(&output.name, &output.shape)?;
    for (position, component) in components.iter().enumerate() {
        for range in pieces(component.bytes) {
            write(position, reader.read_component(&output.name, position, range)?.into_owned())?;
            reader.release(&[&output.name]);
        }
    }
    Ok(())
}

/// Ranges of [`CHUNK_BYTES`] up to `bytes`.
fn pieces(bytes: u64) -> impl Iterator<Item = Range<u64>> {
    let ends = move |start: u64| start..(start + CHUNK_BYTES as u64).min(bytes);
    (0..bytes).step_by(CHUNK_BYTES).map(ends)
}

/// As [`copy_stored`], some rows at a time, each looked at for NaN and infinity first.
fn copy_finite(
    source: &ModelSource,
    tensor: &ModelTensor,
    mut write: impl FnMut(usize, Vec<u8>) -> Result<()>,
) -> Result<()> {
    let matrix = encoding::MatrixShape::of(&tensor.shape);
    let reader = source.reader();
    // The reader refuses codes whose value is not finite.
    let float = tensor.encoding.value_dtype().is_float_weight() && !tensor.encoding.is_quantized();
    if !float || tensor.shape.len() < 2 || matrix.rows == 0 || matrix.cols == 0 {
        if float {
            source.check_finite(&tensor.name, &source.read_f32(&tensor.name)?)?;
        }
        copy_stored(source, tensor, write)?;
    } else {
        let stored = tensor.encoding.components(&tensor.stored_name, &tensor.shape)?;
        let row_bytes = stored.iter().map(|c| c.bytes).sum::<u64>() / matrix.rows as u64;
        let rows_at_once = (CHUNK_BYTES / (matrix.cols * size_of::<f32>()).max(1)).max(1);
        for start in (0..matrix.rows).step_by(rows_at_once) {
            let rows = start..(start + rows_at_once).min(matrix.rows);
            let values = source.read_rows_f32(&tensor.name, rows.clone())?;
            check_finite(source, &tensor.name, start, &values)?;
            let bytes = rows.start as u64 * row_bytes..rows.end as u64 * row_bytes;
            write(0, reader.read_component(&tensor.stored_name, 0, bytes)?.into_owned())?;
            source.reader().release(&[&tensor.stored_name]);
        }
    }
    source.reader().release(&[&tensor.stored_name]);
    Ok(())
}

/// As [`stream_rows`] for a q or k tensor whose rows are shown in the order of a GGUF file.
fn stream_gguf_rows(
    source: &ModelSource,
    tensor: &ModelTensor,
    heads: usize,
    dtype: DType,
    mut show: impl FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let name = &tensor.name;
    if tensor.shape.len() < 2 {
        let values = source.read_f32(name)?;
        source.check_finite(name, &values)?;
        return show(&encoded(name, dtype, &to_gguf_rows(&values, &tensor.shape, heads))?);
    }
    let matrix = encoding::MatrixShape::of(&tensor.shape);
    let rows_at_once = (CHUNK_BYTES / (matrix.cols * size_of::<f32>()).max(1)).max(1);
    for start in (0..matrix.rows).step_by(rows_at_once) {
        let mut values = Vec::with_capacity(rows_at_once * matrix.cols);
        for row in start..(start + rows_at_once).min(matrix.rows) {
            let row = hf_row(row, matrix.rows, heads);
            let found = source.read_rows_f32(name, row..row + 1)?;
            check_finite(source, name, row, &found)?;
            values.extend(found);
        }
        show(&encoded(name, dtype, &values)?)?;
        source.reader().release(&[&tensor.stored_name]);
    }
    Ok(())
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
    let is_own = tensor.encoding == (Encoding::Dense { dtype }) && tensor.permuted_heads.is_none();
    let own = |range| source.reader().read_component(&tensor.stored_name, 0, range);
    let matrix = encoding::MatrixShape::of(&tensor.shape);
    let row_bytes = matrix.cols * dtype.size_bytes();
    let rows_at_once = (CHUNK_BYTES / row_bytes.max(1)).max(1);
    let release = || source.reader().release(&[&tensor.stored_name]);
    let all_bytes = (matrix.rows * row_bytes) as u64;
    match tensor.shape.len() {
        _ if is_own && !dtype.is_float_weight() => {
            for start in (0..all_bytes).step_by((rows_at_once * row_bytes).max(1)) {
                let end = all_bytes.min(start + (rows_at_once * row_bytes) as u64);
                show(&own(start..end)?)?;
                release();
            }
        }
        // A vector is one row, but `read_rows_f32` counts its elements as rows.
        0 | 1 => {
            let values = source.read_f32(name)?;
            source.check_finite(name, &values)?;
            if is_own {
                show(&own(0..all_bytes)?)?;
            } else {
                show(&encoded(name, dtype, &values)?)?;
            }
        }
        _ => {
            let mut row = 0;
            while row < matrix.rows && matrix.cols > 0 {
                let rows = row..(row + rows_at_once).min(matrix.rows);
                row = rows.end;
                let values = source.read_rows_f32(name, rows.clone())?;
                check_finite(source, name, rows.start, &values)?;
                if is_own {
                    let bytes = rows.start * row_bytes..rows.end * row_bytes;
                    show(&own(bytes.start as u64..bytes.end as u64)?)?;
                } else {
                    show(&encoded(name, dtype, &values)?)?;
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
