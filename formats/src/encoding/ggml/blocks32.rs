//! Blocks of 32 elements with one scale. The codes of elements `j` and `j + 16` share byte `qs[j]`:
//! low nibble and high nibble.
#![allow(non_camel_case_types, reason = "ggml's own spelling")]

mod quantize;

use bytemuck::{Pod, Zeroable};

use super::{QuantBlock, scale};

/// `d·q`, `q` a signed byte.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Q8_0 {
    /// Scale, binary16.
    d: [u8; 2],
    /// One signed code per element.
    qs: [i8; 32],
}

impl QuantBlock<32> for Q8_0 {
    fn decode(&self, out: &mut [f32; 32]) {
        let d = scale(self.d);
        for (out, &q) in out.iter_mut().zip(&self.qs) {
            *out = f32::from(q) * d;
        }
    }
}

/// `d·(q − 8)`, `q` of four bits.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Q4_0 {
    /// Scale, binary16.
    d: [u8; 2],
    /// Nibbles of elements `j` and `j + 16`.
    qs: [u8; 16],
}

impl QuantBlock<32> for Q4_0 {
    fn decode(&self, out: &mut [f32; 32]) {
        let d = scale(self.d);
        for (out, q) in out.iter_mut().zip(nibbles(&self.qs)) {
            *out = d * (f32::from(q) - 8.0);
        }
    }
}

/// `d·q + m`, `q` of four bits.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Q4_1 {
    /// Scale, binary16.
    d: [u8; 2],
    /// Minimum, binary16.
    m: [u8; 2],
    /// Nibbles of elements `j` and `j + 16`.
    qs: [u8; 16],
}

impl QuantBlock<32> for Q4_1 {
    fn decode(&self, out: &mut [f32; 32]) {
        let (d, m) = (scale(self.d), scale(self.m));
        for (out, q) in out.iter_mut().zip(nibbles(&self.qs)) {
            *out = d * f32::from(q) + m;
        }
    }
}

/// `d·(q − 16)`, `q` of five bits.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Q5_0 {
    /// Scale, binary16.
    d: [u8; 2],
    /// Bit `j`, counted from the least of the first byte, is the fifth bit of element `j`.
    qh: [u8; 4],
    /// Low nibbles of elements `j` and `j + 16`.
    qs: [u8; 16],
}

impl QuantBlock<32> for Q5_0 {
    fn decode(&self, out: &mut [f32; 32]) {
        let d = scale(self.d);
        for (out, q) in out.iter_mut().zip(five_bits(&self.qs, self.qh)) {
            *out = d * (f32::from(q) - 16.0);
        }
    }
}

/// `d·q + m`, `q` of five bits.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Q5_1 {
    /// Scale, binary16.
    d: [u8; 2],
    /// Minimum, binary16.
    m: [u8; 2],
    /// Bit `j`, counted from the least of the first byte, is the fifth bit of element `j`.
    qh: [u8; 4],
    /// Low nibbles of elements `j` and `j + 16`.
    qs: [u8; 16],
}

impl QuantBlock<32> for Q5_1 {
    fn decode(&self, out: &mut [f32; 32]) {
        let (d, m) = (scale(self.d), scale(self.m));
        for (out, q) in out.iter_mut().zip(five_bits(&self.qs, self.qh)) {
            *out = d * f32::from(q) + m;
        }
    }
}

/// Codes of four bits in element order.
fn nibbles(qs: &[u8; 16]) -> [u8; 32] {
    std::array::from_fn(|j| if j < 16 { qs[j] & 0x0f } else { qs[j - 16] >> 4 })
}

/// Codes of five bits in element order.
fn five_bits(qs: &[u8; 16], qh: [u8; 4]) -> [u8; 32] {
    let high = u32::from_le_bytes(qh);
    let low = nibbles(qs);
    std::array::from_fn(|j| low[j] | ((high >> j & 1) as u8) << 4)
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "decoded values are exact")]
mod tests {
    use super::*;

    #[test]
    fn elements_sixteen_apart_share_a_byte() {
        let mut block = Q4_0 { d: [0x00, 0x3c], qs: [0x88; 16] };
        block.qs[3] = 0xf1;
        let mut out = [0.0; 32];
        block.decode(&mut out);
        let mut expected = [0.0; 32];
        expected[3] = -7.0;
        expected[19] = 7.0;
        assert_eq!(out, expected);
    }

    #[test]
    fn the_fifth_bit_of_element_j_is_bit_j() {
        let block = Q5_1 { d: [0x00, 0x3c], m: [0; 2], qh: [0x02, 0, 0, 0x80], qs: [0; 16] };
        let mut out = [0.0; 32];
        block.decode(&mut out);
        let mut expected = [0.0; 32];
        expected[1] = 16.0;
        expected[31] = 16.0;
        assert_eq!(out, expected);
    }
}
