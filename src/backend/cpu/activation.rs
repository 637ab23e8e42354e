//! Activations of the MLP and the residual sum.

use rayon::prelude::*;

use super::matrix::{STRIP, product_operand, shape_error, strip_len};
use super::simd::{self, vectorised};
use super::{CpuMatrix, Products};
use crate::backend::{Activation, Result};

/// `activation(gate) · up` of `[tokens, 2·features]`.
pub(super) fn gated_activation(
    products: Products,
    gate_up: &CpuMatrix,
    activation: Activation,
) -> Result<CpuMatrix> {
    if !gate_up.cols.is_multiple_of(2) {
        let detail = format!("{} columns are not gate and up", gate_up.cols);
        return Err(shape_error("gated_activation", detail));
    }
    let values = gate_up.widened();
    let features = gate_up.cols / 2;
    Ok(product_operand(products, gate_up.rows, features, |row, out| {
        let (gate, up) = values[row * gate_up.cols..][..gate_up.cols].split_at(features);
        out.copy_from_slice(gate);
        apply(activation, out);
        multiply(out, up);
    }))
}

/// `activation(x)`.
pub(super) fn activation(products: Products, x: &CpuMatrix, activation: Activation) -> CpuMatrix {
    let values = x.widened();
    product_operand(products, x.rows, x.cols, |row, out| {
        out.copy_from_slice(&values[row * x.cols..][..x.cols]);
        apply(activation, out);
    })
}

/// `x += y`.
pub(super) fn add_assign(x: &mut CpuMatrix, y: &CpuMatrix) -> Result<()> {
    const OPERATION: &str = "add_assign";
    y.expect_shape(OPERATION, x.rows, x.cols)?;
    let len = strip_len(STRIP, x.cols);
    let y = y.widened();
    let x = x.f32s_mut(OPERATION)?;
    x.par_chunks_mut(len).zip(y.par_chunks(len)).for_each(|(x, y)| add(x, y));
    Ok(())
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
    fn add<'a>(x: &'a mut [f32], y: &'a [f32]) {
        x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
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
