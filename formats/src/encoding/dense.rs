//! Dense elements.
use super::MatrixShape;
use crate::{DType, FormatError, Result};

pub(super) fn size_bytes(dtype: DType, shape: &[usize]) -> Option<u64> {
    let elements = shape.iter().try_fold(1u64, |n, &d| n.checked_mul(d as u64))?;
    elements.checked_mul(dtype.size_bytes() as u64)
}

pub(super) fn decode_f32(
    name: &str,
    dtype: DType,
    _matrix: MatrixShape,
    _bytes: &[u8],
    _rows: std::ops::Range<usize>,
    _out: &mut [f32],
) -> Result<()> {
    Err(FormatError::Encoding { name: name.into(), what: format!("{dtype}: not there yet") })
}
