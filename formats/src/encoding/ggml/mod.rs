//! ggml quant blocks: a row is cut into runs of 32 or 256 elements, and each run is stored as
//! small integers with its own scale (and minimum).
//!
//! Byte layouts follow the `block_*` structs of ggml (`ggml-common.h`); the float operations and
//! their order follow its Python package `gguf`, so decoded values are equal bit for bit. Blocks
//! are little endian and packed; a block never crosses a row.
//!
//! | type | elements | bytes | bits/element | value of a code `q` |
//! |------|----------|-------|------|---------------------|
//! | `Q8_0` | 32  | 34  | 8.5    | `d·q` |
//! | `Q4_0` | 32  | 18  | 4.5    | `d·(q − 8)` |
//! | `Q4_1` | 32  | 20  | 5      | `d·q + m` |
//! | `Q5_0` | 32  | 22  | 5.5    | `d·(q − 16)` |
//! | `Q5_1` | 32  | 24  | 6      | `d·q + m` |
//! | `MXFP4` | 32 | 17    | 4.25   | `2^(e − 127)·E2M1[q]` |
//! | `Q2_K` | 256 | 84  | 2.625  | `(d·scale)·q − dmin·min`, 16 elements a scale |
//! | `Q3_K` | 256 | 110 | 3.4375 | `(d·(scale − 32))·(q − 4)`, 16 elements a scale |
//! | `Q4_K` | 256 | 144 | 4.5    | `(d·scale)·q − dmin·min`, 32 elements a scale |
//! | `Q5_K` | 256 | 176 | 5.5    | as `Q4_K` |
//! | `Q6_K` | 256 | 210 | 6.5625 | `(d·scale)·(q − 32)`, 16 elements a scale |
//!
//! F32, F16 and BF16 are "blocks" of one element.

mod blocks256;
mod blocks32;
mod grid;
mod mxfp4;
mod quantize;

use std::ops::Range;

use bytemuck::Pod;
use half::f16;

use super::{MatrixShape, dense};
use crate::{DType, FormatError, GgmlType, Result};

pub use grid::{BlockGrid, BlockScales, MAX_GROUPS, assemble};
pub use quantize::encode;

/// A block of `LEN` elements as it lies in a file: byte fields only, so it needs no alignment.
trait QuantBlock<const LEN: usize>: Pod {
    /// Decodes every element.
    fn decode(&self, out: &mut [f32; LEN]);
}

/// Bytes of a tensor: rows of whole blocks, one after another.
///
/// # Errors
/// [`FormatError::Encoding`] when a row is not a whole number of blocks, or the size overflows.
pub(super) fn size_bytes(name: &str, ty: GgmlType, shape: &[usize]) -> Result<u64> {
    let cols = shape.last().copied().unwrap_or(1);
    if !cols.is_multiple_of(ty.block_len()) {
        return Err(FormatError::Encoding {
            name: name.to_owned(),
            what: format!(
                "a row of {cols} elements is not a whole number of {ty} blocks of {}",
                ty.block_len()
            ),
        });
    }
    // No block is larger than its values decoded to f32, so their size bounds this one.
    let decoded = dense::size_bytes(DType::F32, shape).ok_or_else(|| FormatError::Encoding {
        name: name.to_owned(),
        what: format!("the size of shape {shape:?} overflows"),
    })?;
    let blocks = decoded / (size_of::<f32>() * ty.block_len()) as u64;
    Ok(blocks * ty.block_bytes() as u64)
}

/// Decodes rows `rows` of `matrix` from the tensor's `bytes`.
///
/// The caller has checked that `bytes` has the length [`size_bytes`] says, that the rows exist, and
/// that `out` is as long as the rows.
pub(super) fn decode_f32(
    ty: GgmlType,
    matrix: MatrixShape,
    bytes: &[u8],
    rows: Range<usize>,
    out: &mut [f32],
) {
    let row_bytes = matrix.cols / ty.block_len() * ty.block_bytes();
    let bytes = &bytes[rows.start * row_bytes..rows.end * row_bytes];
    match ty {
        GgmlType::F32 => dense::to_f32(DType::F32, bytes, out),
        GgmlType::F16 => dense::to_f32(DType::F16, bytes, out),
        GgmlType::BF16 => dense::to_f32(DType::Bf16, bytes, out),
        GgmlType::Q8_0 => decode_blocks::<blocks32::Q8_0, 32>(bytes, out),
        GgmlType::Q4_0 => decode_blocks::<blocks32::Q4_0, 32>(bytes, out),
        GgmlType::Q4_1 => decode_blocks::<blocks32::Q4_1, 32>(bytes, out),
        GgmlType::Q5_0 => decode_blocks::<blocks32::Q5_0, 32>(bytes, out),
        GgmlType::Q5_1 => decode_blocks::<blocks32::Q5_1, 32>(bytes, out),
        GgmlType::MXFP4 => decode_blocks::<mxfp4::Mxfp4, 32>(bytes, out),
        GgmlType::Q2_K => decode_blocks::<blocks256::Q2_K, 256>(bytes, out),
        GgmlType::Q3_K => decode_blocks::<blocks256::Q3_K, 256>(bytes, out),
        GgmlType::Q4_K => decode_blocks::<blocks256::Q4_K, 256>(bytes, out),
        GgmlType::Q5_K => decode_blocks::<blocks256::Q5_K, 256>(bytes, out),
        GgmlType::Q6_K => decode_blocks::<blocks256::Q6_K, 256>(bytes, out),
    }
}

fn decode_blocks<B: QuantBlock<LEN>, const LEN: usize>(bytes: &[u8], out: &mut [f32]) {
    let blocks: &[B] = bytemuck::cast_slice(bytes);
    let (outs, _) = out.as_chunks_mut::<LEN>();
    for (block, out) in blocks.iter().zip(outs) {
        block.decode(out);
    }
}

/// A stored binary16 scale.
fn scale(bytes: [u8; 2]) -> f32 {
    f16::from_le_bytes(bytes).to_f32()
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "decoded values are exact")]
mod tests {
    use super::*;
    use crate::Encoding;

    #[test]
    fn block_structs_have_the_sizes_of_the_geometry_table() {
        fn check<B: QuantBlock<LEN>, const LEN: usize>(ty: GgmlType) {
            assert_eq!((size_of::<B>(), align_of::<B>()), (ty.block_bytes(), 1), "{ty}");
            assert_eq!(LEN, ty.block_len(), "{ty}");
        }
        check::<blocks32::Q8_0, 32>(GgmlType::Q8_0);
        check::<blocks32::Q4_0, 32>(GgmlType::Q4_0);
        check::<blocks32::Q4_1, 32>(GgmlType::Q4_1);
        check::<blocks32::Q5_0, 32>(GgmlType::Q5_0);
        check::<blocks32::Q5_1, 32>(GgmlType::Q5_1);
        check::<mxfp4::Mxfp4, 32>(GgmlType::MXFP4);
        check::<blocks256::Q2_K, 256>(GgmlType::Q2_K);
        check::<blocks256::Q3_K, 256>(GgmlType::Q3_K);
        check::<blocks256::Q4_K, 256>(GgmlType::Q4_K);
        check::<blocks256::Q5_K, 256>(GgmlType::Q5_K);
        check::<blocks256::Q6_K, 256>(GgmlType::Q6_K);
    }

    #[test]
    fn size_counts_whole_blocks_of_each_row() {
        assert_eq!(size_bytes("w", GgmlType::Q4_K, &[3, 512]).unwrap(), 3 * 2 * 144);
        assert_eq!(size_bytes("w", GgmlType::Q8_0, &[2, 3, 32]).unwrap(), 6 * 34);
        assert_eq!(size_bytes("w", GgmlType::F16, &[]).unwrap(), 2);
        assert_eq!(
            size_bytes("w", GgmlType::Q8_0, &[32, 33]).unwrap_err().to_string(),
            "tensor `w`: a row of 33 elements is not a whole number of Q8_0 blocks of 32"
        );
        assert_eq!(
            size_bytes("w", GgmlType::F32, &[usize::MAX, 2]).unwrap_err().to_string(),
            "tensor `w`: the size of shape [18446744073709551615, 2] overflows"
        );
    }

    #[test]
    fn a_range_of_rows_decodes_to_the_same_values_as_the_whole() {
        let bytes: Vec<u8> = (0..3 * 2 * 34u32).map(|i| (i * 7 % 61) as u8).collect();
        let matrix = MatrixShape { rows: 3, cols: 64 };
        let mut whole = [0.0; 192];
        decode_f32(GgmlType::Q8_0, matrix, &bytes, 0..3, &mut whole);
        let mut middle = [0.0; 64];
        decode_f32(GgmlType::Q8_0, matrix, &bytes, 1..2, &mut middle);
        assert_eq!(middle, whole[64..128]);
    }

    #[test]
    fn plain_elements_keep_all_bits_of_a_nan() {
        // Signalling, which a conversion would make quiet.
        for (ty, nan) in [
            (GgmlType::BF16, &[0x85, 0xff][..]),
            (GgmlType::F16, &[0x01, 0x7c]),
            (GgmlType::F32, &[1, 0, 0x80, 0xff]),
        ] {
            let mut out = vec![];
            Encoding::Ggml { ty }.decode_dense("w", &[1], &[nan], 0..1, &mut out).unwrap();
            assert_eq!(out, nan, "{ty}");
        }
    }

    #[test]
    fn plain_elements_decode() {
        let matrix = MatrixShape { rows: 1, cols: 1 };
        let mut out = [0.0];
        decode_f32(GgmlType::F32, matrix, &1.5f32.to_le_bytes(), 0..1, &mut out);
        assert_eq!(out, [1.5]);
        decode_f32(GgmlType::F16, matrix, &[0x00, 0xc0], 0..1, &mut out);
        assert_eq!(out, [-2.0]);
        decode_f32(GgmlType::BF16, matrix, &[0x80, 0x3f], 0..1, &mut out);
        assert_eq!(out, [1.0]);
    }
}
