//! Quant blocks from scales and codes that somebody else has chosen, so that nothing is rounded a
//! second time.
//!
//! An element's value is `scale·code − min`, with a scale and minimum for each group of a block:
//!
//! | type | group | code | scale | min |
//! |------|-------|------|-------|-----|
//! | `Q8_0` | 32 | −128..=127 | `d` | |
//! | `Q5_0` | 32 | −16..=15 | `d` | |
//! | `Q4_0` | 32 | −8..=7 | `d` | |
//! | `Q6_K` | 16 | −32..=31 | `d·s`, `s` in −128..=127 | |
//! | `Q3_K` | 16 | −4..=3 | `d·s`, `s` in −32..=31 | |
//! | `Q5_K` | 32 | 0..=31 | `d·s`, `s` in 0..=63 | `dmin·m`, `m` in 0..=63 |
//! | `Q4_K` | 32 | 0..=15 | `d·s`, `s` in 0..=63 | `dmin·m`, `m` in 0..=63 |
//! | `Q2_K` | 16 | 0..=3 | `d·s`, `s` in 0..=15 | `dmin·m`, `m` in 0..=15 |

use half::f16;

use super::{QuantBlock, blocks32, blocks256};
use crate::{FormatError, GgmlType, Result};

/// Most groups of a block.
pub const MAX_GROUPS: usize = 16;

/// What values a block type can hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockGrid {
    /// Elements of a block.
    pub block_len: usize,
    /// Elements that share a scale.
    pub group_len: usize,
    /// Least code.
    pub low: i8,
    /// Greatest code.
    pub high: i8,
    /// Range of the integer scales under `d`; `None` where `d` itself is the scale.
    pub scales: Option<(i8, i8)>,
    /// Greatest integer minimum under `dmin`; `None` where there are no minima.
    pub mins: Option<i8>,
}

impl BlockGrid {
    /// The types that have one, largest first.
    pub const TYPES: [GgmlType; 8] = [
        GgmlType::Q8_0,
        GgmlType::Q6_K,
        GgmlType::Q5_0,
        GgmlType::Q5_K,
        GgmlType::Q4_0,
        GgmlType::Q4_K,
        GgmlType::Q3_K,
        GgmlType::Q2_K,
    ];

    /// The grid of a block type; `None` for plain elements and for types whose values are not of this
    /// form or are not written (`Q4_1`, `Q5_1`, `MXFP4`).
    pub fn of(ty: GgmlType) -> Option<Self> {
        let (group_len, low, high, scales, mins) = match ty {
            GgmlType::Q8_0 => (32, -128, 127, None, None),
            GgmlType::Q5_0 => (32, -16, 15, None, None),
            GgmlType::Q4_0 => (32, -8, 7, None, None),
            GgmlType::Q6_K => (16, -32, 31, Some((-128, 127)), None),
            GgmlType::Q3_K => (16, -4, 3, Some((-32, 31)), None),
            GgmlType::Q5_K => (32, 0, 31, Some((0, 63)), Some(63)),
            GgmlType::Q4_K => (32, 0, 15, Some((0, 63)), Some(63)),
            GgmlType::Q2_K => (16, 0, 3, Some((0, 15)), Some(15)),
            _ => return None,
        };
        Some(Self { block_len: ty.block_len(), group_len, low, high, scales, mins })
    }

    /// Groups of a block.
    pub fn groups(self) -> usize {
        self.block_len / self.group_len
    }
}

/// Scales of one block, as they are stored.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct BlockScales {
    /// The scale, or the scale of the scales.
    pub d: f16,
    /// The scale of the minima.
    pub dmin: f16,
    /// Integer scale of each group, 1 where `d` is the scale.
    pub scales: [i8; MAX_GROUPS],
    /// Integer minimum of each group.
    pub mins: [i8; MAX_GROUPS],
}

impl BlockScales {
    /// Scale and minimum of group `g` as decoding multiplies them.
    pub fn group(&self, g: usize) -> (f32, f32) {
        let scale = self.d.to_f32() * f32::from(self.scales[g]);
        (scale, self.dmin.to_f32() * f32::from(self.mins[g]))
    }
}

/// A block that scales and codes can be put into. Codes are stored ones, which start at 0.
pub(super) trait Assemble<const LEN: usize>: QuantBlock<LEN> {
    fn assemble(scales: &BlockScales, codes: &[u8; LEN]) -> Self;
}

/// Appends blocks of `ty`: `codes` of whole blocks in the range of [`BlockGrid`], and the scales of
/// each block.
///
/// # Errors
/// [`FormatError::Encoding`] for a type without a grid, another number of codes than of blocks, and
/// naming block and element of a code, or the block of a scale, that the type cannot hold. `out` is
/// then as it was.
pub fn assemble(
    name: &str,
    ty: GgmlType,
    scales: &[BlockScales],
    codes: &[i8],
    out: &mut Vec<u8>,
) -> Result<()> {
    let refuse = |what| FormatError::Encoding { name: name.to_owned(), what };
    let grid = BlockGrid::of(ty)
        .ok_or_else(|| refuse(format!("{ty} blocks are not made from scales and codes")))?;
    if scales.len().checked_mul(grid.block_len) != Some(codes.len()) {
        return Err(refuse(format!(
            "{} codes for {} {ty} blocks of {}",
            codes.len(),
            scales.len(),
            grid.block_len
        )));
    }
    for (block, (scales, codes)) in scales.iter().zip(codes.chunks(grid.block_len)).enumerate() {
        if let Some(at) = codes.iter().position(|code| !(grid.low..=grid.high).contains(code)) {
            return Err(refuse(format!(
                "block {block}, element {at}: the code {} is not in {}..={} of {ty}",
                codes[at], grid.low, grid.high
            )));
        }
        if !fits(&grid, scales) {
            return Err(refuse(format!("block {block}: {ty} cannot hold the scales {scales:?}")));
        }
    }
    match ty {
        GgmlType::Q8_0 => blocks::<blocks32::Q8_0, 32>(grid, scales, codes, out),
        GgmlType::Q5_0 => blocks::<blocks32::Q5_0, 32>(grid, scales, codes, out),
        GgmlType::Q4_0 => blocks::<blocks32::Q4_0, 32>(grid, scales, codes, out),
        GgmlType::Q6_K => blocks::<blocks256::Q6_K, 256>(grid, scales, codes, out),
        GgmlType::Q5_K => blocks::<blocks256::Q5_K, 256>(grid, scales, codes, out),
        GgmlType::Q4_K => blocks::<blocks256::Q4_K, 256>(grid, scales, codes, out),
        GgmlType::Q3_K => blocks::<blocks256::Q3_K, 256>(grid, scales, codes, out),
        GgmlType::Q2_K => blocks::<blocks256::Q2_K, 256>(grid, scales, codes, out),
        // No other type has a grid.
        _ => {}
    }
    Ok(())
}

fn fits(grid: &BlockGrid, scales: &BlockScales) -> bool {
    let (low, high) = grid.scales.unwrap_or((1, 1));
    let used = ..grid.groups();
    scales.d.is_finite()
        && scales.dmin.is_finite()
        && scales.scales[used].iter().all(|scale| (low..=high).contains(scale))
        && scales.mins[used].iter().all(|min| (0..=grid.mins.unwrap_or(0)).contains(min))
}

fn blocks<B: Assemble<LEN>, const LEN: usize>(
    grid: BlockGrid,
    scales: &[BlockScales],
    codes: &[i8],
    out: &mut Vec<u8>,
) {
    out.reserve(size_of::<B>() * scales.len());
    for (scales, codes) in scales.iter().zip(codes.as_chunks::<LEN>().0) {
        // Stored codes start at zero; those of Q8_0 keep the bits of the signed byte.
        let codes = codes.map(|code| code.wrapping_sub(grid.low) as u8);
        out.extend_from_slice(bytemuck::bytes_of(&B::assemble(scales, &codes)));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::float_cmp, reason = "decoded values are exact")]
    use proptest::prelude::*;

    use super::*;
    use crate::Encoding;

    /// A number of the range.
    fn within(low: i8, high: i8, seed: u8) -> i8 {
        let span = i16::from(high) - i16::from(low) + 1;
        (i16::from(low) + i16::from(seed) % span) as i8
    }

    proptest! {
        #[test]
        fn blocks_decode_to_scale_times_code_minus_min(
            ty in prop::sample::select(&BlockGrid::TYPES[..]),
            codes in prop::collection::vec(any::<u8>(), 256),
            integers in any::<[[u8; MAX_GROUPS]; 2]>(),
            (d, dmin) in (-8.0f32..8.0, 0.0f32..8.0),
        ) {
            let grid = BlockGrid::of(ty).unwrap();
            let codes = codes[..grid.block_len].iter();
            let codes: Vec<i8> = codes.map(|&code| within(grid.low, grid.high, code)).collect();
            let (low, high) = grid.scales.unwrap_or((1, 1));
            let scales = BlockScales {
                d: f16::from_f32(d),
                dmin: f16::from_f32(if grid.mins.is_some() { dmin } else { 0.0 }),
                scales: integers[0].map(|scale| within(low, high, scale)),
                mins: integers[1].map(|min| within(0, grid.mins.unwrap_or(0), min)),
            };
            let mut bytes = Vec::new();
            assemble("w", ty, &[scales], &codes, &mut bytes).unwrap();
            let mut decoded = vec![0.0; grid.block_len];
            Encoding::Ggml { ty }.decode_all_f32("w", &[1, grid.block_len], &[&bytes], &mut decoded).unwrap();
            for (i, (value, code)) in decoded.iter().zip(&codes).enumerate() {
                let (scale, min) = scales.group(i / grid.group_len);
                prop_assert_eq!(*value, scale * f32::from(*code) - min, "{} element {}", ty, i);
            }
        }
    }

    #[test]
    fn what_a_type_cannot_hold_is_refused() {
        let error = |ty, scales: &[BlockScales], codes: &[i8]| {
            let mut out = vec![7];
            let error = assemble("w", ty, scales, codes, &mut out).unwrap_err().to_string();
            assert_eq!(out, [7]);
            error
        };
        let one = BlockScales { scales: [1; MAX_GROUPS], ..Default::default() };
        let mut codes = [0; 32];
        codes[5] = 8;
        assert_eq!(
            error(GgmlType::Q4_0, &[one], &codes),
            "tensor `w`: block 0, element 5: the code 8 is not in -8..=7 of Q4_0"
        );
        assert_eq!(
            error(GgmlType::Q4_0, &[one], &codes[1..]),
            "tensor `w`: 31 codes for 1 Q4_0 blocks of 32"
        );
        assert_eq!(
            error(GgmlType::MXFP4, &[one], &codes),
            "tensor `w`: MXFP4 blocks are not made from scales and codes"
        );
        let infinite = BlockScales { d: f16::INFINITY, ..one };
        assert!(error(GgmlType::Q8_0, &[infinite], &codes).contains("cannot hold the scales"));
        let mut large = one;
        large.scales[15] = 16;
        assert!(error(GgmlType::Q2_K, &[large], &[0; 256]).contains("cannot hold the scales"));
    }
}
