//! OCP Microscaling FP4: 32 elements of E2M1 (sign, two exponent bits, one mantissa bit) with a
//! power of two as their common scale, E8M0. OCP Microscaling Formats (MX) specification 1.0;
//! the order of the nibbles is ggml's, and so is the scale byte 255: 2¹²⁸, not NaN.

use bytemuck::{Pod, Zeroable};

use super::{
    QuantBlock,
    quantize::{Quantize, magnitude},
};

/// Twice the values of E2M1, by code. There is no negative zero.
const DOUBLED: [f32; 16] =
    [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0];

/// Halfway between neighbours of the first half of [`DOUBLED`].
const MIDDLES: [f32; 7] = [0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0];

/// `2^(e − 127)` times the value of a code.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Mxfp4 {
    /// Scale: exponent with bias 127.
    e: u8,
    /// Codes of elements `j` and `j + 16`: low nibble and high nibble.
    qs: [u8; 16],
}

impl QuantBlock<32> for Mxfp4 {
    fn decode(&self, out: &mut [f32; 32]) {
        let half = half_scale(self.e);
        for (j, q) in self.qs.iter().enumerate() {
            out[j] = half * DOUBLED[usize::from(q & 0x0f)];
            out[j + 16] = half * DOUBLED[usize::from(q >> 4)];
        }
    }
}

impl Quantize<32> for Mxfp4 {
    /// The scale puts the largest magnitude in `4..8` scales; of two nearest values the smaller is
    /// taken. Always fits.
    fn quantize(values: &[f32; 32]) -> Option<Self> {
        let most = magnitude(values);
        // The logarithm is rounded to f32 as ggml's is: just below a power of two it is that
        // power's. Below 2^-125 the smallest scale is taken.
        let e = f64::from(most).log2() as f32;
        let e = (e.floor() + 125.0).max(0.0) as u8;
        let half = half_scale(e);
        let middles = MIDDLES.map(|middle| half * middle);
        let codes = values.map(|value| {
            let above = middles.iter().fold(0, |n, &middle| n + u8::from(value.abs() > middle));
            // A negative value nearest to zero is code 0, not 8.
            if value < 0.0 && above > 0 { above | 8 } else { above }
        });
        Some(Self { e, qs: std::array::from_fn(|j| codes[j] | codes[j + 16] << 4) })
    }
}

/// `2^(e − 128)`; the two smallest are subnormal.
fn half_scale(e: u8) -> f32 {
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { u32::from(e - 1) << 23 })
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "decoded values are exact")]
mod tests {
    use super::*;

    #[test]
    fn elements_sixteen_apart_share_a_byte() {
        let mut block = Mxfp4 { e: 127, qs: [0; 16] };
        block.qs[2] = 0xf1;
        let mut out = [0.0; 32];
        block.decode(&mut out);
        let mut expected = [0.0; 32];
        (expected[2], expected[18]) = (0.5, -6.0);
        assert_eq!(out, expected);
    }

    #[test]
    fn every_value_of_the_grid_survives() {
        for e in 0..=252 {
            let qs = [0x1f, 0x29, 0x3a, 0x4b, 0x5c, 0x6d, 0x7e, 0x70, 0, 0, 0, 0, 0, 0, 0, 0];
            let block = Mxfp4 { e, qs };
            let mut values = [0.0; 32];
            block.decode(&mut values);
            let again = Mxfp4::quantize(&values).unwrap();
            assert_eq!((again.e, again.qs), (e, qs));
        }
    }

    #[test]
    fn halfway_goes_to_the_smaller_magnitude() {
        let mut values = [0.0; 32];
        values[..8].copy_from_slice(&[4.0, 0.25, 0.75, -1.25, -0.25, 2.5, -3.5, 5.0]);
        let mut out = [0.0; 32];
        Mxfp4::quantize(&values).unwrap().decode(&mut out);
        assert_eq!(out[..8], [4.0, 0.0, 0.5, -1.0, 0.0, 2.0, -3.0, 4.0]);
        assert!(out[4].is_sign_positive());
    }

    #[test]
    fn the_smallest_values_take_the_smallest_scale() {
        let tiny = f32::from_bits(1);
        let block = Mxfp4::quantize(&[-tiny; 32]).unwrap();
        assert_eq!((block.e, block.qs), (0, [0; 16]));
    }
}
