//! Element-wise loops compiled for the processor they run on.
//!
//! One portable binary has to use AVX2 and AVX-512 where they exist, so hot loops are written as
//! plain Rust inside [`vectorised!`], which compiles the body once per instruction set and picks
//! at run time. Bodies multiply and add separately (no `mul_add`) and sum in fixed lanes, so that
//! every instruction set gives the same bits.

use half::bf16;

/// Defines a function whose body is compiled for each instruction set and chosen at run time.
macro_rules! vectorised {
    (
        $(#[$meta:meta])*
        $vis:vis fn $name:ident<$lt:lifetime>($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block
    ) => {
        $(#[$meta])*
        $vis fn $name<$lt>($($arg: $ty),*) $(-> $ret)? {
            struct Kernel<$lt> { $($arg: $ty),* }
            impl<$lt> pulp::WithSimd for Kernel<$lt> {
                type Output = $crate::backend::cpu::simd::vectorised!(@output $($ret)?);
                #[allow(clippy::inline_always, reason = "the caller carries the instruction set")]
                #[inline(always)]
                fn with_simd<S: pulp::Simd>(self, _: S) -> Self::Output {
                    let Self { $($arg),* } = self;
                    $body
                }
            }
            pulp::Arch::new().dispatch(Kernel { $($arg),* })
        }
    };
    (@output) => { () };
    (@output $ret:ty) => { $ret };
}
pub(super) use vectorised;

/// Lanes of a vectorised sum: one AVX-512 register of f32.
const LANES: usize = 16;

/// Adds lanes in a fixed order.
fn sum_lanes(lanes: &[f32; LANES]) -> f32 {
    lanes.iter().sum()
}

/// Rounds to bf16, to nearest even; NaN stays NaN.
#[allow(clippy::inline_always, reason = "part of vectorised bodies")]
#[inline(always)]
pub(super) fn round(value: f32) -> bf16 {
    let bits = value.to_bits();
    let rounded = (bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) >> 16) as u16;
    let quiet_nan = (bits >> 16) as u16 | 0x40;
    let nan = bits & 0x7FFF_FFFF > 0x7F80_0000;
    bf16::from_bits(if nan { quiet_nan } else { rounded })
}

vectorised! {
    /// Rounds to bf16, to nearest even, as `bf16::from_f32` does.
    pub(super) fn narrow<'a>(from: &'a [f32], to: &'a mut [bf16]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = round(*from);
        }
    }
}

vectorised! {
    /// Widens bf16 to f32, exactly.
    pub(super) fn widen<'a>(from: &'a [bf16], to: &'a mut [f32]) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = f32::from_bits(u32::from(from.to_bits()) << 16);
        }
    }
}

vectorised! {
    /// `Σ x²`.
    pub(super) fn sum_of_squares<'a>(x: &'a [f32]) -> f32 {
        let mut lanes = [0.0f32; LANES];
        let (chunks, rest) = x.as_chunks::<LANES>();
        for chunk in chunks {
            for (lane, value) in lanes.iter_mut().zip(chunk) {
                *lane += value * value;
            }
        }
        sum_lanes(&lanes) + rest.iter().map(|value| value * value).sum::<f32>()
    }
}

vectorised! {
    /// `Σ x`.
    pub(super) fn sum<'a>(x: &'a [f32]) -> f32 {
        let mut lanes = [0.0f32; LANES];
        let (chunks, rest) = x.as_chunks::<LANES>();
        for chunk in chunks {
            for (lane, value) in lanes.iter_mut().zip(chunk) {
                *lane += value;
            }
        }
        sum_lanes(&lanes) + rest.iter().sum::<f32>()
    }
}

vectorised! {
    /// The largest value, `-inf` of nothing.
    pub(super) fn max<'a>(x: &'a [f32]) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let (chunks, rest) = x.as_chunks::<LANES>();
        for chunk in chunks {
            for (lane, value) in lanes.iter_mut().zip(chunk) {
                *lane = if *value > *lane { *value } else { *lane };
            }
        }
        lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |max, value| max.max(*value))
    }
}

/// `eˣ` for `x ≤ 0` or moderate positive `x`, relative error below 2e-7; 0 below −87.3 and
/// saturated above 88.
///
/// `eˣ = 2ⁿ · eʳ` with `n = round(x / ln 2)` and a Taylor polynomial of degree 6 on
/// `|r| ≤ ln 2 / 2`, whose remainder `r⁷/7!` is 1.2e-7 at most.
#[allow(clippy::inline_always, reason = "part of vectorised bodies")]
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Adding and taking away 1.5 · 2²³ rounds to an integer.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts, the first exact in products with |n| < 2¹¹.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = if x < -87.3 { -87.3 } else { x };
    let clamped = if clamped > 88.0 { 88.0 } else { clamped };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (clamped - n * LN2_HIGH) - n * LN2_LOW;
    let mut p = 1.0 / 720.0;
    for coefficient in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p * r + coefficient;
    }
    // The low bits of `shifted` hold n; moved to the exponent field they make 2ⁿ.
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3F80_0000));
    let value = p * power;
    if x < -87.3 { 0.0 } else { value }
}

vectorised! {
    /// Replaces `x` by `e^(x − shift)` and returns the sum.
    pub(super) fn exp_and_sum<'a>(x: &'a mut [f32], shift: f32) -> f32 {
        let mut lanes = [0.0f32; LANES];
        let (chunks, rest) = x.as_chunks_mut::<LANES>();
        for chunk in chunks {
            for (lane, value) in lanes.iter_mut().zip(chunk) {
                *value = exp(*value - shift);
                *lane += *value;
            }
        }
        let mut total = sum_lanes(&lanes);
        for value in rest {
            *value = exp(*value - shift);
            total += *value;
        }
        total
    }
}

vectorised! {
    /// Multiplies by a factor.
    pub(super) fn scale<'a>(x: &'a mut [f32], factor: f32) {
        for value in x {
            *value *= factor;
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::{exp_and_sum, narrow};

    #[test]
    fn narrowing_equals_half_on_every_kind_of_value() {
        let mut values: Vec<f32> =
            (0..=u32::from(u16::MAX)).map(|high| f32::from_bits(high << 16 | 0x8000)).collect();
        values.extend((0..=u32::from(u16::MAX)).map(|high| f32::from_bits(high << 16 | 0x7FFF)));
        values.extend((0..=u32::from(u16::MAX)).map(|high| f32::from_bits(high << 16 | 0x8001)));
        let mut rounded = vec![bf16::ZERO; values.len()];
        narrow(&values, &mut rounded);
        for (value, rounded) in values.iter().zip(&rounded) {
            assert_eq!(rounded.to_bits(), bf16::from_f32(*value).to_bits(), "{value:e}");
        }
    }

    #[test]
    fn exp_is_accurate_to_two_units_in_the_last_place() {
        let mut values: Vec<f32> = (0..200_000).map(|i| -(i as f32) * 4.3e-4).collect();
        let expected: Vec<f64> = values.iter().map(|x| f64::from(*x).exp()).collect();
        let total = exp_and_sum(&mut values, 0.0);
        for (value, expected) in values.iter().zip(&expected) {
            assert!(
                (f64::from(*value) - expected).abs() <= 2.4e-7 * expected,
                "{value} {expected}"
            );
        }
        let sum: f64 = expected.iter().sum();
        assert!((f64::from(total) - sum).abs() <= 1e-5 * sum);
    }

    #[test]
    fn exp_of_minus_infinity_is_zero() {
        let mut values = [f32::NEG_INFINITY; 17];
        assert_eq!(exp_and_sum(&mut values, 0.0).to_bits(), 0);
        assert!(values.iter().all(|value| value.to_bits() == 0));
    }
}
