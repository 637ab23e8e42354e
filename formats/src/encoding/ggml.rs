//! ggml quant blocks.
use super::MatrixShape;
use crate::{FormatError, GgmlType, Result};

pub(super) fn size_bytes(name: &str, ty: GgmlType, shape: &[usize]) -> Result<u64> {
    Err(FormatError::Encoding { name: name.into(), what: format!("{ty} {shape:?}") })
}

pub(super) fn decode_f32(
    ty: GgmlType,
    _matrix: MatrixShape,
    _bytes: &[u8],
    _rows: std::ops::Range<usize>,
    _out: &mut [f32],
) -> Result<()> {
    Err(FormatError::Encoding { name: String::new(), what: format!("{ty}: not there yet") })
}
