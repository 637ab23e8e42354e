//! Quantizers of the blocks of 32: one pass for the extremes, one for the codes.

use super::{Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};
use crate::encoding::ggml::grid::{Assemble, BlockScales};
use crate::encoding::ggml::quantize::{Quantize, inverse, largest, magnitude, to_scale};

impl Quantize<32> for Q8_0 {
    /// The largest magnitude becomes 127; halves round away from zero.
    fn quantize(values: &[f32; 32]) -> Option<Self> {
        let d = magnitude(values) / 127.0;
        let inverse = inverse(d);
        let qs = values.map(|value| round_half_away(value * inverse));
        Some(Self { d: to_scale(d)?, qs })
    }
}

impl Quantize<32> for Q4_0 {
    fn quantize(values: &[f32; 32]) -> Option<Self> {
        let (d, codes) = signed_codes(values, 8.0);
        Some(Self { d: to_scale(d)?, qs: pack_nibbles(&codes) })
    }
}

impl Quantize<32> for Q4_1 {
    fn quantize(values: &[f32; 32]) -> Option<Self> {
        let (d, m, codes) = unsigned_codes(values, 15.0);
        Some(Self { d: to_scale(d)?, m: to_scale(m)?, qs: pack_nibbles(&codes) })
    }
}

impl Quantize<32> for Q5_0 {
    fn quantize(values: &[f32; 32]) -> Option<Self> {
        let (d, codes) = signed_codes(values, 16.0);
        Some(Self { d: to_scale(d)?, qh: fifth_bits(&codes), qs: pack_nibbles(&codes) })
    }
}

impl Quantize<32> for Q5_1 {
    fn quantize(values: &[f32; 32]) -> Option<Self> {
        let (d, m, codes) = unsigned_codes(values, 31.0);
        let (qh, qs) = (fifth_bits(&codes), pack_nibbles(&codes));
        Some(Self { d: to_scale(d)?, m: to_scale(m)?, qh, qs })
    }
}

impl Assemble<32> for Q8_0 {
    fn assemble(scales: &BlockScales, codes: &[u8; 32]) -> Self {
        Self { d: scales.d.to_le_bytes(), qs: codes.map(|code| code.wrapping_sub(128) as i8) }
    }
}

impl Assemble<32> for Q4_0 {
    fn assemble(scales: &BlockScales, codes: &[u8; 32]) -> Self {
        Self { d: scales.d.to_le_bytes(), qs: pack_nibbles(codes) }
    }
}

impl Assemble<32> for Q5_0 {
    fn assemble(scales: &BlockScales, codes: &[u8; 32]) -> Self {
        Self { d: scales.d.to_le_bytes(), qh: fifth_bits(codes), qs: pack_nibbles(codes) }
    }
}

/// Scale `d` and codes `q` of `d·(q − offset)`: the first element of the largest magnitude becomes
/// code 0, so `d` has the opposite sign and a block of zeros has the scale −0.
fn signed_codes(values: &[f32; 32], offset: f32) -> (f32, [u8; 32]) {
    let d = largest(values).1 / -offset;
    let inverse = inverse(d);
    // One above the greatest code is reached when an element is the negative of the largest.
    let top = 2.0 * offset - 1.0;
    (d, values.map(|value| truncate_within(value * inverse + (offset + 0.5), top)))
}

/// Scale `d`, minimum `m` and codes `q` of `d·q + m`: `m` is the least element.
fn unsigned_codes(values: &[f32; 32], top: f32) -> (f32, f32, [u8; 32]) {
    let (mut min, mut max) = (f32::MAX, -f32::MAX);
    for &value in values {
        if value < min {
            min = value;
        }
        if value > max {
            max = value;
        }
    }
    let d = (max - min) / top;
    let inverse = inverse(d);
    (d, min, values.map(|value| truncate_within((value - min) * inverse + 0.5, top)))
}

/// `value.round()`, but a loop of it vectorises on every processor.
fn round_half_away(value: f32) -> i8 {
    // A whole half would carry the number before one half to one.
    (value + 0.5f32.next_down().copysign(value)) as i32 as i8
}

/// `value` without its fraction, at most `top`.
fn truncate_within(value: f32, top: f32) -> u8 {
    (if value < top { value } else { top }) as i32 as u8
}

/// Nibbles of elements `j` and `j + 16`.
fn pack_nibbles(codes: &[u8; 32]) -> [u8; 16] {
    std::array::from_fn(|j| codes[j] & 0x0f | codes[j + 16] << 4)
}

/// Bit `j` is bit 4 of code `j`.
fn fifth_bits(codes: &[u8; 32]) -> [u8; 4] {
    codes.iter().enumerate().fold(0, |bits, (j, &q)| bits | u32::from(q >> 4) << j).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_round_away_from_zero() {
        for whole in 0u8..127 {
            let half = f32::from(whole) + 0.5;
            for value in [half.next_down(), half, half.next_up(), f32::from(whole)] {
                assert_eq!(round_half_away(value), value.round() as i8);
                assert_eq!(round_half_away(-value), (-value).round() as i8);
            }
        }
    }

    #[test]
    fn of_equal_magnitudes_the_first_becomes_code_zero() {
        let mut values = [0.0; 32];
        (values[4], values[20]) = (-2.0, 2.0);
        let block = Q4_0::quantize(&values).unwrap();
        assert_eq!(block.d, [0x00, 0x34], "2 / 8, positive");
        assert_eq!(block.qs[4], 0xf0, "2 would be code 16 and is limited to 15");
    }

    #[test]
    fn a_scale_without_a_finite_inverse_counts_as_zero() {
        let mut values = [0.0; 32];
        values[3] = -f32::MIN_POSITIVE / 2.0;
        assert_eq!(Q8_0::quantize(&values).unwrap().qs, [0; 32]);
        assert_eq!(Q4_0::quantize(&values).unwrap().qs, [0x88; 16]);
        assert_eq!(Q5_1::quantize(&values).unwrap().qs, [0; 16]);
    }

    #[test]
    fn a_scale_beyond_binary16_is_refused() {
        let mut values = [0.0; 32];
        values[0] = 65519.0 * 127.0;
        assert!(Q8_0::quantize(&values).is_some());
        values[0] = 65520.0 * 127.0;
        assert!(Q8_0::quantize(&values).is_none());
        assert!(Q4_1::quantize(&values).is_none());
        values = [-65520.0; 32];
        assert!(Q4_1::quantize(&values).is_none(), "the minimum is a binary16 too");
        (values[0], values[1]) = (-f32::MAX, f32::MAX);
        assert!(Q5_1::quantize(&values).is_none(), "the range overflows f32");
    }
}
