//! Dense elements: every value in row-major order, little-endian.
//!
//! Conversions go through a small scratch array of lanes, so unaligned input (a tensor may start at
//! any byte of a file) costs one copy inside the first-level cache and no `unsafe`.

use std::ops::Range;

use half::{bf16, f16, slice::HalfFloatSliceExt};

use super::{MatrixShape, f8};
use crate::{DType, FormatError, Result};

/// Elements converted at a time: 2 KiB of halves, 4 KiB of floats.
const CHUNK: usize = 1024;

/// Bytes of a dense tensor, `None` for more than one allocation can have (`isize::MAX`).
///
/// `Some` says more than that: the product of any of the dimensions, a row or all but the last, fits
/// too, whatever dimension is zero. Everything computed from a shape relies on this check.
pub(crate) fn size_bytes(dtype: DType, shape: &[usize]) -> Option<u64> {
    let bound = shape.iter().try_fold(dtype.size_bytes(), |n, &d| n.checked_mul(d.max(1)))?;
    let bytes = if shape.contains(&0) { 0 } else { bound };
    isize::try_from(bound).ok().map(|_| bytes as u64)
}

/// The bytes of `rows`.
pub(super) fn row_bytes(
    dtype: DType,
    matrix: MatrixShape,
    bytes: &[u8],
    rows: Range<usize>,
) -> &[u8] {
    let stride = matrix.cols * dtype.size_bytes();
    &bytes[rows.start * stride..rows.end * stride]
}

/// Decodes `rows`; the caller has checked the lengths of `bytes` and `out`.
pub(super) fn decode_f32(
    name: &str,
    dtype: DType,
    matrix: MatrixShape,
    bytes: &[u8],
    rows: Range<usize>,
    out: &mut [f32],
) -> Result<()> {
    check_float(name, dtype)?;
    to_f32(dtype, row_bytes(dtype, matrix, bytes, rows), out);
    Ok(())
}

/// Refuses element types that are not float weights.
pub(super) fn check_float(name: &str, dtype: DType) -> Result<()> {
    if dtype.is_float_weight() {
        return Ok(());
    }
    Err(FormatError::Encoding {
        name: name.to_owned(),
        what: format!("{dtype} values are not weights; expected F32, F16, BF16 or F8_E4M3"),
    })
}

/// Converts little-endian `bytes` of a float type into `out`, exactly; as many values as both have.
pub fn to_f32(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        DType::F16 => {
            let mut lanes = [f16::ZERO; CHUNK];
            for (bytes, out) in bytes.chunks(2 * CHUNK).zip(out.chunks_mut(CHUNK)) {
                let lanes = &mut lanes[..out.len()];
                for (lane, pair) in lanes.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *lane = f16::from_le_bytes(*pair);
                }
                lanes.convert_to_f32_slice(out);
            }
        }
        // Not `bf16::to_f32`, which sets the quiet bit of a NaN.
        DType::Bf16 => {
            for (out, pair) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *out = f32::from_bits(u32::from(u16::from_le_bytes(*pair)) << 16);
            }
        }
        DType::F8E4m3 => {
            for (out, &code) in out.iter_mut().zip(bytes) {
                *out = f8::to_f32(code);
            }
        }
        _ => {
            for (out, quad) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *out = f32::from_le_bytes(*quad);
            }
        }
    }
}

/// Appends `values` as little-endian bytes of `dtype`, rounded to the nearest value, ties to even.
/// Infinities and NaNs pass (`F8_E4M3` has no infinity to pass); a NaN may change its payload.
///
/// # Errors
/// [`FormatError::Encoding`] naming the first value that is finite but too large for `dtype`, or
/// infinite for `F8_E4M3` (`out` is then as it was), or a `dtype` that is not a float weight type.
pub fn encode_f32(name: &str, dtype: DType, values: &[f32], out: &mut Vec<u8>) -> Result<()> {
    check_float(name, dtype)?;
    let before = out.len();
    out.reserve(values.len() * dtype.size_bytes());
    for (chunk_index, chunk) in values.chunks(CHUNK).enumerate() {
        let overflow = match dtype {
            DType::F16 => {
                let mut lanes = [f16::ZERO; CHUNK];
                let lanes = &mut lanes[..chunk.len()];
                lanes.convert_from_f32_slice(chunk);
                append(out, lanes, f16::to_le_bytes);
                overflowed(chunk, lanes, f16::is_finite)
            }
            DType::Bf16 => {
                append(out, chunk, |value| round_to_bf16(value).to_le_bytes());
                overflowed(chunk, chunk, |value| bf16::from_bits(round_to_bf16(value)).is_finite())
            }
            DType::F8E4m3 => {
                append(out, chunk, |value| [f8::round(value)]);
                f8::overflowed(chunk)
            }
            _ => {
                append(out, chunk, f32::to_le_bytes);
                None
            }
        };
        if let Some(at) = overflow {
            out.truncate(before);
            return Err(FormatError::Encoding {
                name: name.to_owned(),
                what: format!(
                    "value {:e} at index {} is too large for {dtype}",
                    chunk[at],
                    chunk_index * CHUNK + at
                ),
            });
        }
    }
    Ok(())
}

/// The first of the little-endian values of a float type that is NaN or infinite.
pub fn first_non_finite(dtype: DType, bytes: &[u8]) -> Option<usize> {
    // A pass without a branch first: most tensors have none, and this vectorises.
    let any = match dtype {
        DType::F16 => has_exponent(bytes.as_chunks::<2>().0, u16::from_le_bytes, 0x7C00),
        DType::Bf16 => has_exponent(bytes.as_chunks::<2>().0, u16::from_le_bytes, 0x7F80),
        DType::F8E4m3 => has_exponent(bytes.as_chunks::<1>().0, u8::from_le_bytes, 0x7F),
        _ => has_exponent(bytes.as_chunks::<4>().0, u32::from_le_bytes, 0x7F80_0000),
    };
    if !any {
        return None;
    }
    let size = dtype.size_bytes();
    bytes.chunks_exact(size).position(|bytes| {
        let mut value = [0.0];
        to_f32(dtype, bytes, &mut value);
        !value[0].is_finite()
    })
}

/// Whether all bits of `exponent` are set in one of the lanes.
fn has_exponent<const N: usize, T>(lanes: &[[u8; N]], value: fn([u8; N]) -> T, exponent: T) -> bool
where
    T: Copy + PartialEq + std::ops::BitAnd<Output = T>,
{
    lanes.iter().fold(false, |any, lane| any | (value(*lane) & exponent == exponent))
}

/// Bits of the nearest bf16, ties to even; without a branch, so that a loop of it vectorises.
fn round_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1));
    // Rounding could carry a NaN into an infinity: cut it off and keep it quiet.
    let nan = bits | 0x40_0000;
    ((if value.is_nan() { nan } else { rounded }) >> 16) as u16
}

/// Appends the bytes of each lane; unlike `extend`, a plain loop that vectorises.
fn append<T: Copy, const N: usize>(
    out: &mut Vec<u8>,
    lanes: &[T],
    to_bytes: impl Fn(T) -> [u8; N],
) {
    let start = out.len();
    out.resize(start + lanes.len() * N, 0);
    for (bytes, &lane) in out[start..].as_chunks_mut::<N>().0.iter_mut().zip(lanes) {
        *bytes = to_bytes(lane);
    }
}

/// The first finite value whose rounded lane is not.
fn overflowed<T: Copy>(values: &[f32], lanes: &[T], finite: impl Fn(T) -> bool) -> Option<usize> {
    // Fold without a branch first: overflow is rare and this vectorises.
    let all_finite = lanes.iter().fold(true, |all, &lane| all & finite(lane));
    if all_finite {
        return None;
    }
    values.iter().zip(lanes).position(|(value, &lane)| value.is_finite() && !finite(lane))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn decode(dtype: DType, bytes: &[u8]) -> Vec<f32> {
        let cols = bytes.len() / dtype.size_bytes();
        let mut out = vec![0.0; cols];
        decode_f32("w", dtype, MatrixShape { rows: 1, cols }, bytes, 0..1, &mut out).unwrap();
        out
    }

    #[test]
    fn rounds_ties_to_even() {
        // bf16 has 8 significant bits: 257 lies between 256 and 258, 259 between 258 and 260.
        let mut bytes = vec![];
        encode_f32("w", DType::Bf16, &[257.0, 259.0, -0.0], &mut bytes).unwrap();
        assert_eq!(decode(DType::Bf16, &bytes), [256.0, 260.0, -0.0]);
        bytes.clear();
        // f16 has 11: 2049 lies between 2048 and 2050.
        encode_f32("w", DType::F16, &[2049.0, 2051.0], &mut bytes).unwrap();
        assert_eq!(decode(DType::F16, &bytes), [2048.0, 2052.0]);
    }

    #[test]
    fn overflow_is_refused_and_leaves_the_output_alone() {
        let mut values = vec![1.0; 3000];
        values[2500] = 65520.0;
        let mut bytes = vec![7];
        let error = encode_f32("w", DType::F16, &values, &mut bytes).unwrap_err();
        assert_eq!(
            error.to_string(),
            "tensor `w`: value 6.552e4 at index 2500 is too large for F16"
        );
        assert_eq!(bytes, [7]);
        assert!(encode_f32("w", DType::Bf16, &[f32::MAX], &mut bytes).is_err());
        encode_f32("w", DType::F16, &[65519.0, f32::INFINITY], &mut bytes).unwrap();
        assert_eq!(decode(DType::F16, &bytes[1..]), [65504.0, f32::INFINITY]);
    }

    #[test]
    fn integers_are_not_weights() {
        let matrix = MatrixShape { rows: 1, cols: 1 };
        let error = decode_f32("w", DType::I8, matrix, &[0], 0..1, &mut [0.0]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "tensor `w`: I8 values are not weights; expected F32, F16, BF16 or F8_E4M3"
        );
        assert!(encode_f32("w", DType::I8, &[1.0], &mut vec![]).is_err());
        assert!(encode_f32("w", DType::I8, &[], &mut vec![]).is_err());
    }

    #[test]
    fn what_is_not_finite_is_found() {
        for dtype in [DType::F32, DType::F16, DType::Bf16, DType::F8E4m3] {
            let mut bytes = vec![];
            encode_f32("w", dtype, &[1.0, -448.0, 0.0, -0.0, 3e-5], &mut bytes).unwrap();
            assert_eq!(first_non_finite(dtype, &bytes), None, "{dtype}");
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                if dtype != DType::F8E4m3 || bad.is_nan() {
                    let mut bytes = bytes.clone();
                    encode_f32("w", dtype, &[bad, 1.0, bad], &mut bytes).unwrap();
                    assert_eq!(first_non_finite(dtype, &bytes), Some(5), "{dtype} {bad}");
                }
            }
        }
    }

    proptest! {
        #[test]
        fn bf16_rounds_as_half_does(bits: u32) {
            let value = f32::from_bits(bits);
            prop_assert_eq!(round_to_bf16(value), bf16::from_f32(value).to_bits());
        }

        #[test]
        fn every_representable_value_survives(bits in proptest::collection::vec(any::<u16>(), 0..40)) {
            for dtype in [DType::F16, DType::Bf16] {
                let bytes: Vec<u8> = bits.iter().flat_map(|b| b.to_le_bytes()).collect();
                let values = decode(dtype, &bytes);
                let mut back = vec![];
                encode_f32("w", dtype, &values, &mut back).unwrap();
                for (index, value) in values.iter().enumerate() {
                    if !value.is_nan() {
                        prop_assert_eq!(&back[2 * index..2 * index + 2], &bytes[2 * index..2 * index + 2]);
                    }
                }
            }
        }
    }
}
