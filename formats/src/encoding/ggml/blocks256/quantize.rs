//! Quantizers of the super-blocks: a scale (and minimum) for each group, these rounded to a few
//! bits under a binary16 scale, then the codes for the rounded scales.
//!
//! Where a group's rounded scale is zero its codes mean nothing and stay as the search left them,
//! as in ggml.

use bytemuck::Zeroable;

use super::{Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, search};
use crate::encoding::ggml::grid::{Assemble, BlockScales};
use crate::encoding::ggml::quantize::{Quantize, largest, magnitude, to_scale};
use crate::encoding::ggml::scale;
use search::{Grid, Groups, LANES, Lanes, SMALLEST, round_within};

/// Anything larger overflows every binary16 scale of a super-block, and the sums of the searches
/// stay finite below it.
const LARGEST: f32 = (1u64 << 39) as f32;

impl Quantize<256> for Q6_K {
    fn quantize(values: &[f32; 256]) -> Option<Self> {
        let mut codes = [0; 256];
        let scales =
            symmetric_scales(values, &mut codes, |x, codes| search::symmetric(x, 32.0, codes))?;
        let (_, max_scale) = largest(&scales);
        if max_scale.abs() < SMALLEST {
            return Some(Self::zeroed());
        }
        let inverse = -128.0 / max_scale;
        let d = to_scale(1.0 / inverse)?;
        let scales = scales.map(|s| round_within(inverse * s, -128.0, 127.0));
        symmetric_codes(values, scale(d), &scales, 32.0, &mut codes);
        Some(Self::pack(d, scales.map(|s| s as i8), &codes))
    }
}

impl Q6_K {
    fn pack(d: [u8; 2], scales: [i8; 16], codes: &[u8; 256]) -> Self {
        let mut block = Self { ql: [0; 128], qh: [0; 64], scales, d };
        pack_two_bits(&codes.map(|q| q >> 4), &mut block.qh);
        for (ql, codes) in
            block.ql.as_chunks_mut::<64>().0.iter_mut().zip(codes.as_chunks::<128>().0)
        {
            for (j, ql) in ql.iter_mut().enumerate() {
                *ql = codes[j] & 0x0f | codes[j + 64] << 4;
            }
        }
        block
    }
}

impl Assemble<256> for Q6_K {
    fn assemble(scales: &BlockScales, codes: &[u8; 256]) -> Self {
        Self::pack(scales.d.to_le_bytes(), scales.scales, codes)
    }
}

impl Quantize<256> for Q3_K {
    fn quantize(values: &[f32; 256]) -> Option<Self> {
        let mut codes = [0; 256];
        let scales = symmetric_scales(values, &mut codes, |x, codes| {
            search::symmetric_by_code(x, 4.0, codes)
        })?;
        let (_, max_scale) = largest(&scales);
        let (d, scales) = if max_scale == 0.0 {
            (to_scale(0.0)?, [-32.0; 16])
        } else {
            let inverse = -32.0 / max_scale;
            let scales = scales.map(|s| round_within(inverse * s, -32.0, 31.0));
            (to_scale(1.0 / inverse)?, scales)
        };
        symmetric_codes(values, scale(d), &scales, 4.0, &mut codes);
        Some(Self::pack(d, scales.map(|s| s as i8), &codes))
    }
}

impl Q3_K {
    fn pack(d: [u8; 2], scales: [i8; 16], codes: &[u8; 256]) -> Self {
        let mut block = Self { d, ..Self::zeroed() };
        for (g, s) in scales.iter().enumerate() {
            let bits = s.wrapping_add(32) as u8;
            block.scales[g % 8] |= (bits & 0x0f) << (g / 8 * 4);
            block.scales[8 + g % 4] |= bits >> 4 << (g / 4 * 2);
        }
        pack_one_bits(&codes.map(|q| q >> 2), &mut block.hmask);
        pack_two_bits(&codes.map(|q| q & 3), &mut block.qs);
        block
    }
}

impl Assemble<256> for Q3_K {
    fn assemble(scales: &BlockScales, codes: &[u8; 256]) -> Self {
        Self::pack(scales.d.to_le_bytes(), scales.scales, codes)
    }
}

/// Searches a scale for each group of 16, some groups at a time. `None` when a value is too large.
fn symmetric_scales(
    values: &[f32; 256],
    codes: &mut [u8; 256],
    search: impl Fn(&Groups<f32, 16>, &mut Groups<u8, 16>) -> Lanes,
) -> Option<[f32; 16]> {
    let mut scales = [0.0; 16];
    for (scales, (groups, codes)) in scales.as_chunks_mut().0.iter_mut().zip(lanes(values, codes)) {
        *scales = search(groups, codes);
    }
    (magnitude(values) <= LARGEST).then_some(scales)
}

/// Values and codes of the groups of `N` elements, as many as are searched together.
fn lanes<'a, const N: usize>(
    values: &'a [f32; 256],
    codes: &'a mut [u8; 256],
) -> impl Iterator<Item = (&'a Groups<f32, N>, &'a mut Groups<u8, N>)> {
    let groups = values.as_chunks::<N>().0.as_chunks().0.iter();
    groups.zip(codes.as_chunks_mut::<N>().0.as_chunks_mut().0)
}

/// Codes of `(d·scale)·(code − offset)`.
fn symmetric_codes(
    values: &[f32; 256],
    d: f32,
    scales: &[f32; 16],
    offset: f32,
    codes: &mut [u8; 256],
) {
    let groups = values.as_chunks::<16>().0.iter().zip(codes.as_chunks_mut::<16>().0);
    for (s, (values, codes)) in scales.iter().zip(groups) {
        let d = d * s;
        if d != 0.0 {
            *codes = values.map(|x| (round_within(x / d, -offset, offset - 1.0) + offset) as u8);
        }
    }
}

impl Quantize<256> for Q2_K {
    fn quantize(values: &[f32; 256]) -> Option<Self> {
        let grid = Grid { top: 3.0, first: -0.5, count: 16 };
        let mut codes = [0; 256];
        let fit = AffineGroups::<16, 16>::search(values, &mut codes, |x, codes| {
            search::affine(x, &x.map(|x| x.map(f32::abs)), &grid, f32::abs, codes)
        })?;
        let (d, dmin, groups) = fit.round(15.0)?;
        groups.codes(values, grid.top, &mut codes);
        Some(Self::pack(d, dmin, groups.scale_codes, groups.min_codes, &codes))
    }
}

impl Q2_K {
    fn pack(
        d: [u8; 2],
        dmin: [u8; 2],
        scales: [u8; 16],
        mins: [u8; 16],
        codes: &[u8; 256],
    ) -> Self {
        let scales = std::array::from_fn(|g| scales[g] | mins[g] << 4);
        let mut block = Self { scales, qs: [0; 64], d, dmin };
        pack_two_bits(codes, &mut block.qs);
        block
    }
}

impl Assemble<256> for Q2_K {
    fn assemble(scales: &BlockScales, codes: &[u8; 256]) -> Self {
        let (integers, mins) = (scales.scales.map(|s| s as u8), scales.mins.map(|m| m as u8));
        Self::pack(scales.d.to_le_bytes(), scales.dmin.to_le_bytes(), integers, mins, codes)
    }
}

impl Quantize<256> for Q4_K {
    fn quantize(values: &[f32; 256]) -> Option<Self> {
        let grid = Grid { top: 15.0, first: -1.0, count: 21 };
        let (d, dmin, scales, codes) = quantize_affine(values, &grid)?;
        Some(Self::pack(d, dmin, scales, &codes))
    }
}

impl Q4_K {
    fn pack(d: [u8; 2], dmin: [u8; 2], scales: [u8; 12], codes: &[u8; 256]) -> Self {
        let mut block = Self { d, dmin, scales, qs: [0; 128] };
        pack_four_bits(codes, &mut block.qs);
        block
    }
}

impl Assemble<256> for Q4_K {
    fn assemble(scales: &BlockScales, codes: &[u8; 256]) -> Self {
        let (d, dmin) = (scales.d.to_le_bytes(), scales.dmin.to_le_bytes());
        Self::pack(d, dmin, packed_scales_and_mins(scales), codes)
    }
}

impl Quantize<256> for Q5_K {
    fn quantize(values: &[f32; 256]) -> Option<Self> {
        let grid = Grid { top: 31.0, first: -0.5, count: 16 };
        let (d, dmin, scales, codes) = quantize_affine(values, &grid)?;
        Some(Self::pack(d, dmin, scales, &codes))
    }
}

impl Q5_K {
    fn pack(d: [u8; 2], dmin: [u8; 2], scales: [u8; 12], codes: &[u8; 256]) -> Self {
        let mut block = Self { d, dmin, scales, qh: [0; 32], qs: [0; 128] };
        pack_one_bits(&codes.map(|q| q >> 4), &mut block.qh);
        pack_four_bits(&codes.map(|q| q & 0x0f), &mut block.qs);
        block
    }
}

impl Assemble<256> for Q5_K {
    fn assemble(scales: &BlockScales, codes: &[u8; 256]) -> Self {
        let (d, dmin) = (scales.d.to_le_bytes(), scales.dmin.to_le_bytes());
        Self::pack(d, dmin, packed_scales_and_mins(scales), codes)
    }
}

fn packed_scales_and_mins(scales: &BlockScales) -> [u8; 12] {
    let first = |values: &[i8; 16]| std::array::from_fn(|g| values[g] as u8);
    pack_scales_and_mins(first(&scales.scales), first(&scales.mins))
}

/// Scale of the scales, scale of the minima, packed scales, and codes of [`Q4_K`] and [`Q5_K`].
type AffineParts = ([u8; 2], [u8; 2], [u8; 12], [u8; 256]);

fn quantize_affine(values: &[f32; 256], grid: &Grid) -> Option<AffineParts> {
    let mut codes = [0; 256];
    let fit = AffineGroups::<8, 32>::search(values, &mut codes, |x, codes| {
        search::affine(x, &x.map(importance), grid, |e| e * e, codes)
    })?;
    let (d, dmin, groups) = fit.round(63.0)?;
    groups.codes(values, grid.top, &mut codes);
    Some((d, dmin, pack_scales_and_mins(groups.scale_codes, groups.min_codes), codes))
}

/// Magnitudes above the root of the mean square.
fn importance(values: [f32; 32]) -> [f32; 32] {
    let squares = values.iter().fold(0.0, |sum, x| sum + x * x);
    let typical = (squares / 32.0).sqrt();
    values.map(|x| typical + x.abs())
}

/// What the search found for `G` groups of `N`.
struct AffineGroups<const G: usize, const N: usize> {
    scales: [f32; G],
    /// Negated minima.
    mins: [f32; G],
}

impl<const G: usize, const N: usize> AffineGroups<G, N> {
    /// `None` when a value is too large.
    fn search(
        values: &[f32; 256],
        codes: &mut [u8; 256],
        search: impl Fn(&Groups<f32, N>, &mut Groups<u8, N>) -> [search::Affine; LANES],
    ) -> Option<Self> {
        let mut found = Self { scales: [0.0; G], mins: [0.0; G] };
        let affine = lanes(values, codes).flat_map(|(groups, codes)| search(groups, codes));
        for (g, affine) in affine.enumerate() {
            (found.scales[g], found.mins[g]) = (affine.scale, -affine.min);
        }
        (magnitude(values) <= LARGEST).then_some(found)
    }

    /// Scales and minima as integers up to `top`, under a binary16 scale each.
    fn round(&self, top: f32) -> Option<([u8; 2], [u8; 2], RoundedGroups<G, N>)> {
        let most =
            |values: &[f32; G]| values.iter().fold(0.0, |most, &v| if v > most { v } else { most });
        let codes = |values: &[f32; G], max: f32| {
            let inverse = if max > 0.0 { top / max } else { 0.0 };
            values.map(|v| round_within(inverse * v, 0.0, top) as u8)
        };
        let (max_scale, max_min) = (most(&self.scales), most(&self.mins));
        let (d, dmin) = (to_scale(max_scale / top)?, to_scale(max_min / top)?);
        let scale_codes = codes(&self.scales, max_scale);
        let min_codes = codes(&self.mins, max_min);
        Some((d, dmin, RoundedGroups { d: scale(d), dmin: scale(dmin), scale_codes, min_codes }))
    }
}

/// Scales and minima as they will be decoded.
struct RoundedGroups<const G: usize, const N: usize> {
    d: f32,
    dmin: f32,
    scale_codes: [u8; G],
    min_codes: [u8; G],
}

impl<const G: usize, const N: usize> RoundedGroups<G, N> {
    /// Codes of `(d·scale)·code − dmin·min`.
    fn codes(&self, values: &[f32; 256], top: f32, codes: &mut [u8; 256]) {
        let groups = values.as_chunks::<N>().0.iter().zip(codes.as_chunks_mut::<N>().0);
        for (g, (values, codes)) in groups.enumerate() {
            let d = self.d * f32::from(self.scale_codes[g]);
            let min = self.dmin * f32::from(self.min_codes[g]);
            if d != 0.0 {
                *codes = values.map(|x| round_within((x + min) / d, 0.0, top) as u8);
            }
        }
    }
}

/// The inverse of [`super::scales_and_mins`].
fn pack_scales_and_mins(scales: [u8; 8], mins: [u8; 8]) -> [u8; 12] {
    let mut packed = [0; 12];
    for g in 0..4 {
        packed[g] = scales[g] | scales[4 + g] >> 4 << 6;
        packed[4 + g] = mins[g] | mins[4 + g] >> 4 << 6;
        packed[8 + g] = scales[4 + g] & 0x0f | mins[4 + g] << 4;
    }
    packed
}

/// The inverse of [`super::one_bits`].
fn pack_one_bits(codes: &[u8; 256], bytes: &mut [u8; 32]) {
    for (plane, codes) in codes.as_chunks::<32>().0.iter().enumerate() {
        for (byte, code) in bytes.iter_mut().zip(codes) {
            *byte |= code << plane;
        }
    }
}

/// The inverse of [`super::two_bits`].
fn pack_two_bits(codes: &[u8; 256], bytes: &mut [u8; 64]) {
    for (i, codes) in codes.as_chunks::<32>().0.iter().enumerate() {
        let (run, plane) = (i / 4, i % 4);
        for (byte, code) in bytes[run * 32..][..32].iter_mut().zip(codes) {
            *byte |= code << (2 * plane);
        }
    }
}

/// The inverse of [`super::four_bits`].
fn pack_four_bits(codes: &[u8; 256], bytes: &mut [u8; 128]) {
    for (i, codes) in codes.as_chunks::<32>().0.iter().enumerate() {
        let (run, plane) = (i / 2, i % 2);
        for (byte, code) in bytes[run * 32..][..32].iter_mut().zip(codes) {
            *byte |= code << (4 * plane);
        }
    }
}
