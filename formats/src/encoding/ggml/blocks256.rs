//! K-quants: super-blocks of 256 elements in groups of 16 or 32, each group with a small integer
//! scale (and minimum) of its own under the block's binary16 scale.
//!
//! Codes of two bits lie in "planes": in each run of 32 bytes, bits `2p, 2p+1` of byte `b` belong to
//! element `32·p + b`. One-bit planes and nibbles follow the same rule.
#![allow(non_camel_case_types, reason = "ggml's own spelling")]

mod quantize;
mod search;

use bytemuck::{Pod, Zeroable};

use super::{QuantBlock, scale};

/// `(d·scale)·q − dmin·min`, `q` of two bits, 16 elements a scale.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Q2_K {
    /// Group `g`: scale in the low nibble, minimum in the high nibble.
    scales: [u8; 16],
    /// Two runs of 32 bytes, 128 elements each, in four planes.
    qs: [u8; 64],
    /// Scale of the scales, binary16.
    d: [u8; 2],
    /// Scale of the minima, binary16.
    dmin: [u8; 2],
}

impl QuantBlock<256> for Q2_K {
    fn decode(&self, out: &mut [f32; 256]) {
        let (d, dmin) = (scale(self.d), scale(self.dmin));
        let groups = out.as_chunks_mut::<16>().0.iter_mut();
        for (g, (out, qs)) in groups.zip(two_bits(&self.qs).as_chunks::<16>().0).enumerate() {
            let dl = d * f32::from(self.scales[g] & 0x0f);
            let ml = dmin * f32::from(self.scales[g] >> 4);
            for (out, &q) in out.iter_mut().zip(qs) {
                *out = dl * f32::from(q) - ml;
            }
        }
    }
}

/// `(d·(scale − 32))·(q − 4)`, `q` of three bits, 16 elements a scale.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Q3_K {
    /// Third bits, in eight planes of one bit.
    hmask: [u8; 32],
    /// Low two bits, as in [`Q2_K`].
    qs: [u8; 64],
    /// Sixteen 6-bit scales: low nibbles in bytes 0..8 (group `g` low, `g + 8` high), then bits 4
    /// and 5 in bytes 8..12 (groups `g`, `g + 4`, `g + 8`, `g + 12` from the least bits).
    scales: [u8; 12],
    /// Scale of the scales, binary16.
    d: [u8; 2],
}

impl Q3_K {
    fn group_scales(&self) -> [f32; 16] {
        std::array::from_fn(|g| {
            let low = self.scales[g % 8] >> (g / 8 * 4) & 0x0f;
            let high = self.scales[8 + g % 4] >> (g / 4 * 2) & 0x03;
            f32::from(low | high << 4) - 32.0
        })
    }
}

impl QuantBlock<256> for Q3_K {
    fn decode(&self, out: &mut [f32; 256]) {
        let d = scale(self.d);
        let (low, high) = (two_bits(&self.qs), one_bits(&self.hmask));
        let scales = self.group_scales();
        for (g, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let dl = d * scales[g];
            for (j, out) in out.iter_mut().enumerate() {
                let q = low[g * 16 + j] | high[g * 16 + j] << 2;
                *out = dl * (f32::from(q) - 4.0);
            }
        }
    }
}

/// `(d·scale)·q − dmin·min`, `q` of four bits, 32 elements a scale.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Q4_K {
    /// Scale of the scales, binary16.
    d: [u8; 2],
    /// Scale of the minima, binary16.
    dmin: [u8; 2],
    /// Eight scales and eight minima of 6 bits: see [`scales_and_mins`].
    scales: [u8; 12],
    /// Four runs of 32 bytes, 64 elements each: low nibbles first, then high nibbles.
    qs: [u8; 128],
}

impl QuantBlock<256> for Q4_K {
    fn decode(&self, out: &mut [f32; 256]) {
        let codes = four_bits(&self.qs);
        decode_affine(self.d, self.dmin, &self.scales, &codes, out);
    }
}

/// `(d·scale)·q − dmin·min`, `q` of five bits, 32 elements a scale.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Q5_K {
    /// Scale of the scales, binary16.
    d: [u8; 2],
    /// Scale of the minima, binary16.
    dmin: [u8; 2],
    /// Eight scales and eight minima of 6 bits: see [`scales_and_mins`].
    scales: [u8; 12],
    /// Fifth bits, in eight planes of one bit.
    qh: [u8; 32],
    /// Low nibbles, as in [`Q4_K`].
    qs: [u8; 128],
}

impl QuantBlock<256> for Q5_K {
    fn decode(&self, out: &mut [f32; 256]) {
        let mut codes = four_bits(&self.qs);
        for (code, high) in codes.iter_mut().zip(one_bits(&self.qh)) {
            *code |= high << 4;
        }
        decode_affine(self.d, self.dmin, &self.scales, &codes, out);
    }
}

/// `(d·scale)·(q − 32)`, `q` of six bits, 16 elements a scale.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Q6_K {
    /// Low nibbles: two runs of 64 bytes, 128 elements each, low nibbles first.
    ql: [u8; 128],
    /// High two bits, in planes as in [`Q2_K`].
    qh: [u8; 64],
    /// One signed scale per group.
    scales: [i8; 16],
    /// Scale of the scales, binary16.
    d: [u8; 2],
}

impl QuantBlock<256> for Q6_K {
    fn decode(&self, out: &mut [f32; 256]) {
        let d = scale(self.d);
        let high = two_bits(&self.qh);
        for (half, ql) in self.ql.as_chunks::<64>().0.iter().enumerate() {
            for j in 0..128 {
                let i = half * 128 + j;
                let low = ql[j % 64] >> (j / 64 * 4) & 0x0f;
                out[i] = f32::from(low | high[i] << 4) - 32.0;
            }
        }
        for (out, &group_scale) in out.as_chunks_mut::<16>().0.iter_mut().zip(&self.scales) {
            let dl = d * f32::from(group_scale);
            for out in out {
                *out *= dl;
            }
        }
    }
}

/// The value formula of [`Q4_K`] and [`Q5_K`].
fn decode_affine(
    d: [u8; 2],
    dmin: [u8; 2],
    packed_scales: &[u8; 12],
    codes: &[u8; 256],
    out: &mut [f32; 256],
) {
    let (d, dmin) = (scale(d), scale(dmin));
    let (scales, mins) = scales_and_mins(packed_scales);
    let groups = out.as_chunks_mut::<32>().0.iter_mut().zip(codes.as_chunks::<32>().0);
    for (g, (out, codes)) in groups.enumerate() {
        let dl = d * f32::from(scales[g]);
        let ml = dmin * f32::from(mins[g]);
        for (out, &q) in out.iter_mut().zip(codes) {
            *out = dl * f32::from(q) - ml;
        }
    }
}

/// Eight scales and eight minima of six bits in twelve bytes.
///
/// Groups 0..4 lie whole in the low six bits of bytes 0..4 (scales) and 4..8 (minima). Groups 4..8
/// have their low nibbles in bytes 8..12 (scale low, minimum high) and their top two bits in the top
/// two bits of bytes 0..4 and 4..8.
fn scales_and_mins(packed: &[u8; 12]) -> ([u8; 8], [u8; 8]) {
    let (mut scales, mut mins) = ([0; 8], [0; 8]);
    for g in 0..4 {
        let (scale, min, low) = (packed[g], packed[4 + g], packed[8 + g]);
        scales[g] = scale & 0x3f;
        mins[g] = min & 0x3f;
        scales[4 + g] = low & 0x0f | scale >> 2 & 0x30;
        mins[4 + g] = low >> 4 | min >> 2 & 0x30;
    }
    (scales, mins)
}

/// Eight planes of one bit.
fn one_bits(bytes: &[u8; 32]) -> [u8; 256] {
    let mut codes = [0; 256];
    for (plane, codes) in codes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        for (code, byte) in codes.iter_mut().zip(bytes) {
            *code = byte >> plane & 1;
        }
    }
    codes
}

/// Two runs of four planes of two bits.
fn two_bits(bytes: &[u8; 64]) -> [u8; 256] {
    let mut codes = [0; 256];
    for (i, codes) in codes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (run, plane) = (i / 4, i % 4);
        for (code, byte) in codes.iter_mut().zip(&bytes[run * 32..][..32]) {
            *code = byte >> (2 * plane) & 3;
        }
    }
    codes
}

/// Four runs of two planes of four bits.
fn four_bits(bytes: &[u8; 128]) -> [u8; 256] {
    let mut codes = [0; 256];
    for (i, codes) in codes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (run, plane) = (i / 2, i % 2);
        for (code, byte) in codes.iter_mut().zip(&bytes[run * 32..][..32]) {
            *code = byte >> (4 * plane) & 0x0f;
        }
    }
    codes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn six_bit_scales_of_the_upper_groups_are_split() {
        let mut packed = [0; 12];
        packed[1] = 0b10_000011; // top bits of scale 5, scale 1
        packed[6] = 0b01_000101; // top bits of minimum 6, minimum 2
        packed[9] = 0b0000_1001; // low bits of minimum 5 and scale 5
        packed[10] = 0b0110_0000; // low bits of minimum 6 and scale 6
        let (scales, mins) = scales_and_mins(&packed);
        assert_eq!(scales, [0, 3, 0, 0, 0, 0b10_1001, 0, 0]);
        assert_eq!(mins, [0, 0, 5, 0, 0, 0, 0b01_0110, 0]);
    }

    #[test]
    fn a_q3_third_bit_is_set_when_four_is_not_subtracted() {
        let mut block: Q3_K = Zeroable::zeroed();
        block.d = [0x00, 0x3c];
        block.scales[8] = 0b10; // group 0: 32 + 0
        block.scales[0] = 1; // group 0: + 1
        block.hmask[0] = 1;
        block.qs[0] = 2;
        let mut out = [0.0; 256];
        block.decode(&mut out);
        assert_eq!(out[..2], [2.0, -4.0]);
    }
}
