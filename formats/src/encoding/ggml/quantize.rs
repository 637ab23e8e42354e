//! From values to quant blocks: round to nearest, every element of equal importance.
//!
//! The arithmetic is that of ggml's reference quantizers (`quantize_row_*_ref` in `ggml-quants.c`):
//! single f32 operations in their order, without fused multiply-adds. So the bytes are those of
//! ggml as compilers build it for x86-64. Where ggml's C code has no defined result, ours is:
//!
//! * NaN, infinities, and scales too large for binary16 are errors;
//! * a scale so small that its inverse overflows (below 2⁻¹²⁸) counts as zero;
//! * a code is limited to its range before it is rounded, not after.

use half::f16;

use super::{QuantBlock, blocks32, blocks256, mxfp4};
use crate::{DType, FormatError, GgmlType, Result, encoding::dense};

/// A block that can be made from values.
pub(super) trait Quantize<const LEN: usize>: QuantBlock<LEN> {
    /// The block nearest to finite `values`, or `None` when a scale is too large for binary16.
    fn quantize(values: &[f32; LEN]) -> Option<Self>;
}

/// Appends rows of `cols` elements to `out` as blocks of `ty`. `rows` are little-endian bytes of
/// the element type that [`Encoding::value_dtype`](crate::Encoding::value_dtype) says: F32 for
/// quant blocks; plain elements pass unchanged. Rows do not depend on each other; `first_row` is for
/// messages.
///
/// # Errors
/// [`FormatError::Encoding`] when `rows` are not whole rows of whole blocks, or naming row and
/// column of a value that is NaN, infinite, or so large that its block's scale overflows. `out` is
/// then as it was.
pub fn encode(
    name: &str,
    ty: GgmlType,
    cols: usize,
    first_row: usize,
    rows: &[u8],
    out: &mut Vec<u8>,
) -> Result<()> {
    let refuse = |what| FormatError::Encoding { name: name.to_owned(), what };
    super::size_bytes(name, ty, &[cols])?;
    let element = if ty.block_len() == 1 { ty.block_bytes() } else { size_of::<f32>() };
    let row_bytes = cols.saturating_mul(element);
    if !rows.len().is_multiple_of(row_bytes) {
        return Err(refuse(format!(
            "{} bytes are not whole rows of {row_bytes} bytes",
            rows.len()
        )));
    }
    let before = out.len();
    let encoded = match ty {
        GgmlType::F32 | GgmlType::F16 | GgmlType::BF16 => {
            out.extend_from_slice(rows);
            Ok(())
        }
        GgmlType::Q8_0 => encode_blocks::<blocks32::Q8_0, 32>(rows, out),
        GgmlType::Q4_0 => encode_blocks::<blocks32::Q4_0, 32>(rows, out),
        GgmlType::Q4_1 => encode_blocks::<blocks32::Q4_1, 32>(rows, out),
        GgmlType::Q5_0 => encode_blocks::<blocks32::Q5_0, 32>(rows, out),
        GgmlType::Q5_1 => encode_blocks::<blocks32::Q5_1, 32>(rows, out),
        GgmlType::Q2_K => encode_blocks::<blocks256::Q2_K, 256>(rows, out),
        GgmlType::Q3_K => encode_blocks::<blocks256::Q3_K, 256>(rows, out),
        GgmlType::Q4_K => encode_blocks::<blocks256::Q4_K, 256>(rows, out),
        GgmlType::Q5_K => encode_blocks::<blocks256::Q5_K, 256>(rows, out),
        GgmlType::Q6_K => encode_blocks::<blocks256::Q6_K, 256>(rows, out),
        GgmlType::MXFP4 => encode_blocks::<mxfp4::Mxfp4, 32>(rows, out),
    };
    encoded.map_err(|Unfit { index, value }| {
        out.truncate(before);
        let expected = if value.is_finite() {
            "expected a value whose block has a scale below 65520, the limit of binary16"
        } else {
            "expected a finite value"
        };
        refuse(format!(
            "row {}, column {}: {value:e} cannot be stored as {ty}; {expected}",
            first_row.saturating_add(index / cols),
            index % cols
        ))
    })
}

/// A value that no block can hold.
struct Unfit {
    index: usize,
    value: f32,
}

fn encode_blocks<B: Quantize<LEN>, const LEN: usize>(
    rows: &[u8],
    out: &mut Vec<u8>,
) -> std::result::Result<(), Unfit> {
    let blocks = rows.chunks_exact(LEN * size_of::<f32>());
    out.reserve(blocks.len() * size_of::<B>());
    let mut values = [0.0; LEN];
    for (block, bytes) in blocks.enumerate() {
        dense::to_f32(DType::F32, bytes, &mut values);
        let unfit = |at: usize| Unfit { index: block * LEN + at, value: values[at] };
        if !magnitude(&values).is_finite() {
            return Err(unfit(values.iter().position(|value| !value.is_finite()).unwrap_or(0)));
        }
        let block = B::quantize(&values).ok_or_else(|| unfit(largest(&values).0))?;
        out.extend_from_slice(bytemuck::bytes_of(&block));
    }
    Ok(())
}

/// The largest magnitude; NaN counts as larger than all others.
pub(super) fn magnitude(values: &[f32]) -> f32 {
    // Magnitudes are ordered as their bits are, and a maximum of integers vectorises.
    let bits = values.iter().fold(0, |most, value| value.abs().to_bits().max(most));
    f32::from_bits(bits)
}

/// Index and value of the first element of the largest magnitude; `(0, 0.0)` when all are zero.
pub(super) fn largest(values: &[f32]) -> (usize, f32) {
    let most = magnitude(values);
    match values.iter().position(|value| value.abs().to_bits() == most.to_bits()) {
        Some(index) if most > 0.0 => (index, values[index]),
        _ => (0, 0.0),
    }
}

/// `1 / scale`, or zero when that is not finite.
pub(super) fn inverse(scale: f32) -> f32 {
    let inverse = 1.0 / scale;
    if inverse.is_finite() { inverse } else { 0.0 }
}

/// A scale as it is stored, if binary16 can hold it.
pub(super) fn to_scale(value: f32) -> Option<[u8; 2]> {
    let half = f16::from_f32(value);
    half.is_finite().then(|| half.to_le_bytes())
}
