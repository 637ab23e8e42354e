//! Norms: each token by itself, sums in f32 lanes, the mean and the root in f32.

use super::matrix::product_operand;
use super::simd::{self, vectorised};
use super::{CpuMatrix, Products};
use crate::backend::Result;

/// `x / √(mean(x²) + eps) · gain`.
pub(super) fn rms_norm(
    products: Products,
    x: &CpuMatrix,
    gain: &CpuMatrix,
    eps: f32,
) -> Result<CpuMatrix> {
    gain.expect_shape("rms_norm gain", 1, x.cols)?;
    let (values, gain) = (x.widened(), gain.widened());
    Ok(product_operand(products, x.rows, x.cols, |row, out| {
        let x = &values[row * x.cols..][..x.cols];
        let factor = 1.0 / (simd::sum_of_squares(x) / x.len() as f32 + eps).sqrt();
        scaled_product(x, factor, &gain, out);
    }))
}

/// `(x − mean) / √(var + eps) · gain + bias`.
pub(super) fn layer_norm(
    products: Products,
    x: &CpuMatrix,
    gain: &CpuMatrix,
    bias: &CpuMatrix,
    eps: f32,
) -> Result<CpuMatrix> {
    gain.expect_shape("layer_norm gain", 1, x.cols)?;
    bias.expect_shape("layer_norm bias", 1, x.cols)?;
    let (values, gain, bias) = (x.widened(), gain.widened(), bias.widened());
    Ok(product_operand(products, x.rows, x.cols, |row, out| {
        let x = &values[row * x.cols..][..x.cols];
        let mean = simd::sum(x) / x.len() as f32;
        out.iter_mut().zip(x).for_each(|(out, x)| *out = x - mean);
        let factor = 1.0 / (simd::sum_of_squares(out) / x.len() as f32 + eps).sqrt();
        affine(out, factor, &gain, &bias);
    }))
}

vectorised! {
    /// `out = x · factor · gain`.
    fn scaled_product<'a>(x: &'a [f32], factor: f32, gain: &'a [f32], out: &'a mut [f32]) {
        for ((out, x), gain) in out.iter_mut().zip(x).zip(gain) {
            *out = x * factor * gain;
        }
    }
}

vectorised! {
    /// `out = out · factor · gain + bias`.
    fn affine<'a>(out: &'a mut [f32], factor: f32, gain: &'a [f32], bias: &'a [f32]) {
        for ((out, gain), bias) in out.iter_mut().zip(gain).zip(bias) {
            *out = *out * factor * gain + bias;
        }
    }
}
