//! `F8_E4M3` ("e4m3fn" of the OCP 8-bit floating point specification, revision 1.0, and of torch).
//!
//! ```text
//! bit 7     sign
//! bit 6..3  exponent e, bias 7
//! bit 2..0  mantissa m
//!
//!   e = 0        m · 2⁻⁹
//!   e = 1..15    (8 + m) · 2^(e - 10)     largest: 0x7E, 448
//!   0x7F, 0xFF   NaN; there is no infinity
//! ```
//!
//! The invariant: rounding what a code decodes to gives the code back (a NaN keeps its sign).

/// Code of NaN, without its sign.
const NAN: u8 = 0x7F;

/// What each code stands for.
const VALUES: [f32; 256] = {
    let mut values = [0.0; 256];
    let mut code = 0u8;
    loop {
        values[code as usize] = value(code);
        if code == u8::MAX {
            break values;
        }
        code += 1;
    }
};

const fn value(code: u8) -> f32 {
    let (exponent, mantissa) = ((code >> 3 & 0xF) as u32, (code & 7) as u32);
    let magnitude = match (code & NAN, exponent) {
        (NAN, _) => 0x7FC0_0000,
        // m · 2⁻⁹, exact in f32.
        (_, 0) => (mantissa as f32 / 512.0).to_bits(),
        _ => (exponent + 120) << 23 | mantissa << 20,
    };
    f32::from_bits((code as u32 >> 7) << 31 | magnitude)
}

/// The value of a code, exactly.
#[inline]
pub fn to_f32(code: u8) -> f32 {
    VALUES[usize::from(code)]
}

/// The nearest code, ties to even; NaN for infinities and values above 464, which round beyond 448.
/// Without a branch, so that a loop of it vectorises.
#[inline]
pub fn round(value: f32) -> u8 {
    // The smallest normal value, 2⁻⁶, and the float whose last place is that of a subnormal, 2⁻⁹.
    const NORMAL: u32 = 121 << 23;
    const LAST_PLACE: f32 = 16384.0;
    let sign = (value.to_bits() >> 24) as u8 & 0x80;
    let magnitude = value.to_bits() & 0x7FFF_FFFF;
    // Subnormal: the addition rounds to multiples of 2⁻⁹, and its mantissa counts them.
    let subnormal = (f32::from_bits(magnitude) + LAST_PLACE).to_bits() & 0xF;
    // Normal: rounded to 3 mantissa bits, exponent rebiased from 127 to 7.
    let rounded = magnitude.wrapping_add(0x7_FFFF + (magnitude >> 20 & 1)) >> 20;
    let normal = rounded.wrapping_sub(120 << 3).min(u32::from(NAN));
    sign | if magnitude < NORMAL { subnormal } else { normal } as u8
}

/// The first value that is a number but has no code.
pub(super) fn overflowed(values: &[f32]) -> Option<usize> {
    let beyond = |value: f32| !value.is_nan() && round(value) & NAN == NAN;
    // Fold without a branch first: overflow is rare and this vectorises.
    if !values.iter().fold(false, |any, &value| any | beyond(value)) {
        return None;
    }
    values.iter().position(|&value| beyond(value))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{CheckpointReader, DType, Encoding, encoding::dense};

    /// What torch makes of every code and of some thousand values.
    fn golden() -> Box<dyn CheckpointReader> {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/golden");
        crate::open(&root.join("f8_e4m3.safetensors")).unwrap()
    }

    fn bytes(name: &str) -> Vec<u8> {
        golden().components(name).unwrap()[0].to_vec()
    }

    #[test]
    fn codes_decode_as_torch_decodes_them() {
        let (codes, values) = (bytes("codes"), golden().read_f32("values").unwrap());
        let mut decoded = vec![0.0; 256];
        let encoding = Encoding::Dense { dtype: DType::F8E4m3 };
        encoding.decode_all_f32("w", &[256], &[&codes], &mut decoded).unwrap();
        for (code, (ours, theirs)) in decoded.iter().zip(&values).enumerate() {
            assert!(
                ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan(),
                "{code}"
            );
        }
        assert_eq!(values.iter().filter(|value| value.is_nan()).count(), 2);
    }

    #[test]
    fn values_round_as_torch_rounds_them() {
        let inputs = golden().read_f32("inputs").unwrap();
        let mut ours = vec![];
        dense::encode_f32("w", DType::F8E4m3, &inputs, &mut ours).unwrap();
        let wrong = ours.iter().zip(bytes("rounded")).position(|(ours, theirs)| *ours != theirs);
        assert_eq!(wrong.map(|at| inputs[at]), None);
    }

    #[test]
    fn every_code_survives() {
        for code in 0..=u8::MAX {
            assert_eq!(round(to_f32(code)), code);
        }
    }

    #[test]
    fn what_has_no_code_is_refused() {
        let mut out = vec![7];
        for (value, shown) in [(464.1f32, "4.641e2"), (-1e6, "-1e6"), (f32::INFINITY, "inf")] {
            let values = [1.0, f32::NAN, value];
            let error = dense::encode_f32("w", DType::F8E4m3, &values, &mut out).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!("tensor `w`: value {shown} at index 2 is too large for F8_E4M3")
            );
            assert_eq!(out, [7]);
        }
        dense::encode_f32("w", DType::F8E4m3, &[464.0, -f32::NAN], &mut out).unwrap();
        assert_eq!(out, [7, 0x7E, 0xFF]);
    }

    proptest! {
        /// By the definition: no code is nearer, and of two equally near ones the even is taken.
        #[test]
        fn no_code_is_nearer(bits: u32) {
            let value = f32::from_bits(bits);
            prop_assume!(value.abs() <= 464.0);
            let code = round(value);
            prop_assert_eq!(code >> 7, (bits >> 31) as u8);
            let distance = |code: u8| (f64::from(to_f32(code)) - f64::from(value)).abs();
            for other in (0..0x7F).map(|other| other | code & 0x80) {
                prop_assert!(distance(code) <= distance(other));
                let tie = other != code && (distance(code) - distance(other)).abs() == 0.0;
                prop_assert!(!tie || code & 1 == 0);
            }
        }
    }
}
