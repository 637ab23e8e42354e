//! Activations of the MLP.

use super::matrix::product_operand;
use super::simd::{self, vectorised};
use super::{CpuMatrix, Products};
use crate::backend::Activation;

/// `gate = activation(gate) · up`.
pub(super) fn gate(activation: Activation, gate: &mut [f32], up: &[f32]) {
    apply(activation, gate);
    multiply(gate, up);
}

/// `activation(x)`.
pub(super) fn activation(products: Products, x: &CpuMatrix, activation: Activation) -> CpuMatrix {
    let values = x.widened();
    product_operand(products, x.rows, x.cols, |row, out| {
        out.copy_from_slice(&values[row * x.cols..][..x.cols]);
        apply(activation, out);
    })
}

fn apply(activation: Activation, x: &mut [f32]) {
    match activation {
        Activation::Silu => silu(x),
        Activation::Relu => relu(x),
        Activation::Gelu => gelu(x),
        Activation::GeluTanh => gelu_tanh(x),
    }
}

vectorised! {
    fn multiply<'a>(x: &'a mut [f32], y: &'a [f32]) {
        x.iter_mut().zip(y).for_each(|(x, y)| *x *= y);
    }
}

vectorised! {
    fn relu<'a>(x: &'a mut [f32]) {
        // Written so that NaN stays NaN.
        for x in x {
            *x = if *x < 0.0 { 0.0 } else { *x };
        }
    }
}

vectorised! {
    fn silu<'a>(x: &'a mut [f32]) {
        for x in x {
            *x /= 1.0 + simd::exp(-*x);
        }
    }
}

vectorised! {
    /// `x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³)))`, with `(1 + tanh z)/2 = 1/(1 + e^(−2z))`.
    fn gelu_tanh<'a>(x: &'a mut [f32]) {
        const TWICE_ROOT: f32 = 2.0 * std::f32::consts::FRAC_2_SQRT_PI * std::f32::consts::FRAC_1_SQRT_2;
        for x in x {
            let z = TWICE_ROOT * (*x + 0.044_715 * *x * *x * *x);
            *x /= 1.0 + simd::exp(-z);
        }
    }
}

/// `x · Φ(x)` through the error function in f64.
fn gelu(x: &mut [f32]) {
    for x in x {
        let wide = f64::from(*x);
        *x = (wide * normal_cdf(wide)) as f32;
    }
}

/// `Φ(x) = erfc(−x/√2) / 2`. Below 3 by the series `erf z = 2/√π · e^(−z²) · Σ 2ⁿ z^(2n+1) /
/// (2n+1)!!`, whose terms are all positive; above by the continued fraction of `erfc`.
fn normal_cdf(x: f64) -> f64 {
    let z = x.abs() * std::f64::consts::FRAC_1_SQRT_2;
    let bell = (-z * z).exp() * std::f64::consts::FRAC_2_SQRT_PI;
    let upper_tail = if z < 3.0 {
        let (mut term, mut sum) = (z, z);
        for n in 1..80 {
            term *= 2.0 * z * z / f64::from(2 * n + 1);
            sum += term;
        }
        0.5 * (1.0 - bell * sum)
    } else {
        let fraction = (1..40).rev().fold(z, |below, n| z + f64::from(n) / 2.0 / below);
        0.25 * bell / fraction
    };
    if x.is_nan() {
        x
    } else if x > 0.0 {
        1.0 - upper_tail
    } else {
        upper_tail
    }
}
