//! Stored types and the 2:4 packing, strip by strip, by the codecs of the formats.

use rayon::prelude::*;
use sparsepack_formats::{
    DType,
    encoding::{MatrixShape, dense, sparse24},
};

use super::{
    CpuMatrix,
    matrix::{shape_error, strip_len},
};
use crate::backend::{BackendError, Fetch, Result, StoredValues};

/// Rows of a strip.
const STRIP: usize = 64;

/// Values as f32. Lengths are checked.
pub(super) fn decode(values: StoredValues<'_>, cols: usize, out: &mut [f32]) {
    let StoredValues { dtype, bytes } = values;
    let len = strip_len(STRIP, cols);
    let strips = out.par_chunks_mut(len).zip(bytes.par_chunks(len * dtype.size_bytes()));
    strips.for_each(|(out, bytes)| dense::to_f32(dtype, bytes, out));
}

/// Rounds the values of `w` to what `dtype` holds.
pub(super) fn store(w: &mut CpuMatrix, dtype: DType) -> Result<Fetch<Vec<u8>>> {
    rounded(w, dtype).map(Fetch::ready)
}

/// As [`store`], in the 2:4 packing.
pub(super) fn pack_24(w: &mut CpuMatrix, dtype: DType) -> Result<Option<[Fetch<Vec<u8>>; 2]>> {
    let (rows, cols) = (w.rows, w.cols);
    if !cols.is_multiple_of(4) {
        return Err(shape_error("pack_24", format!("{cols} columns, not whole groups of 4")));
    }
    let dense = rounded(w, dtype)?;
    let strip = STRIP.min(rows);
    let row_bytes = cols * dtype.size_bytes();
    let mut values = vec![0; rows * row_bytes / 2];
    let mut metadata = vec![0; rows * cols.div_ceil(8)];
    if rows * cols == 0 {
        return Ok(Some([values, metadata].map(Fetch::ready)));
    }
    let packed = dense
        .par_chunks(strip * row_bytes)
        .zip(values.par_chunks_mut(strip * row_bytes / 2))
        .zip(metadata.par_chunks_mut(strip * cols.div_ceil(8)))
        .all(|((dense, values), metadata)| {
            let matrix = MatrixShape { rows: dense.len() / row_bytes, cols };
            // With types and lengths that fit, all that can be refused is a group of three values.
            sparse24::encode_into("", dtype, matrix, dense, values, metadata).is_ok()
        });
    Ok(packed.then(|| [values, metadata].map(Fetch::ready)))
}

/// Rounds the values of `w` in place, and returns their bytes.
fn rounded(w: &mut CpuMatrix, dtype: DType) -> Result<Vec<u8>> {
    const OPERATION: &str = "store";
    if !dtype.is_float_weight() {
        return Err(shape_error(OPERATION, format!("values of type {dtype}")));
    }
    let cols = w.cols;
    let w = w.f32s_mut(OPERATION)?;
    let (size, len) = (dtype.size_bytes(), strip_len(STRIP, cols));
    let mut bytes = vec![0; w.len() * size];
    let fits =
        w.par_chunks_mut(len).zip(bytes.par_chunks_mut(len * size)).all(|(values, bytes)| {
            let mut stored = Vec::with_capacity(bytes.len());
            let fits = dense::encode_f32("", dtype, values, &mut stored).is_ok();
            if fits {
                bytes.copy_from_slice(&stored);
                dense::to_f32(dtype, bytes, values);
            }
            fits
        });
    if fits { Ok(bytes) } else { Err(too_large(w, dtype)) }
}

/// The error of values of which one is too large for `dtype`.
pub(in crate::backend) fn too_large(values: &[f32], dtype: DType) -> BackendError {
    let refused = |value: &f32| dense::encode_f32("", dtype, &[*value], &mut Vec::new()).is_err();
    let index = values.iter().position(refused).unwrap_or(0);
    BackendError::TooLarge { value: values.get(index).copied().unwrap_or(0.0), index, dtype }
}
