//! 2:4 sparse.
use super::{Component, MatrixShape};
use crate::{DType, FormatError, Result};

pub(super) fn components(name: &str, dtype: DType, shape: &[usize]) -> Result<Vec<Component>> {
    Err(FormatError::Encoding { name: name.into(), what: format!("{dtype} {shape:?}") })
}

pub(super) fn decode_f32(
    name: &str,
    dtype: DType,
    _matrix: MatrixShape,
    _values: &[u8],
    _metadata: &[u8],
    _rows: std::ops::Range<usize>,
    _out: &mut [f32],
) -> Result<()> {
    Err(FormatError::Encoding { name: name.into(), what: format!("{dtype}: not there yet") })
}
