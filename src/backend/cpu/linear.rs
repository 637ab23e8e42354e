//! `x Wᵀ + bias`: most of a forward pass.
//!
//! A weight is laid out once and used for every calibration batch. Each strip of tokens is computed
//! by one thread, so an element's sum runs in the order of the input features.

use std::time::{Duration, Instant};

use rayon::prelude::*;

use super::linalg::{self, Into, View, ViewMut};
use super::matrix::{shape_error, strip_len};
use super::{CpuMatrix, Products};
use crate::backend::Result;

/// Tokens of a strip of an f32 product: enough to pay for packing the weight.
const F32_STRIP: usize = 256;

/// Weights stacked along the output features, laid out for products.
#[derive(Debug)]
pub struct CpuWeight {
    out_features: usize,
    in_features: usize,
    data: WeightData,
}

#[derive(Debug)]
enum WeightData {
    /// Row-major `[out, in]`.
    F32(Vec<f32>),
}

/// Stacks `[out_i, in]` weights.
pub(super) fn prepare(products: Products, weights: &[&CpuMatrix]) -> Result<CpuWeight> {
    let in_features = weights.first().map_or(0, |weight| weight.cols);
    if let Some(other) = weights.iter().find(|weight| weight.cols != in_features) {
        let detail = format!("weights of {in_features} and {} columns", other.cols);
        return Err(shape_error("prepare", detail));
    }
    let out_features = weights.iter().map(|weight| weight.rows).sum();
    let data = match products {
        Products::F32 => {
            let mut stacked = Vec::with_capacity(out_features * in_features);
            for weight in weights {
                stacked.extend_from_slice(&weight.widened());
            }
            WeightData::F32(stacked)
        }
    };
    Ok(CpuWeight { out_features, in_features, data })
}

/// `[tokens, in] × [out, in] → [tokens, out]`.
pub(super) fn linear(
    x: &CpuMatrix,
    weight: &CpuWeight,
    bias: Option<&CpuMatrix>,
) -> Result<CpuMatrix> {
    let CpuWeight { out_features, in_features, data } = weight;
    let (n, k) = (*out_features, *in_features);
    x.expect_shape("linear", x.rows, k)?;
    let bias = match bias {
        Some(bias) => {
            bias.expect_shape("linear bias", 1, n)?;
            Some(bias.widened())
        }
        None => None,
    };
    let mut out = vec![0.0; x.rows * n];
    match data {
        WeightData::F32(weight) => {
            let weight = View::dense(weight, n, k);
            out.par_chunks_mut(strip_len(F32_STRIP, n)).enumerate().for_each(|(strip, out)| {
                let mut scratch = Vec::new();
                let rows = out.len() / n;
                let first = strip * F32_STRIP;
                let x = View::dense(x.rows_f32(first..first + rows, &mut scratch), rows, k);
                let c = ViewMut { data: out, rows, cols: n, stride: n };
                linalg::matmul_nt(c, Into::Replace, x, weight, 1.0);
                if let Some(bias) = &bias {
                    for out in out.chunks_exact_mut(n) {
                        out.iter_mut().zip(bias.iter()).for_each(|(out, bias)| *out += bias);
                    }
                }
            });
        }
    }
    Ok(CpuMatrix::from_f32(x.rows, n, out))
}

/// FLOP/s of a product large enough to hide everything but the kernel.
pub(super) fn measure_ceiling(products: Products) -> Result<f64> {
    const SIDE: usize = 1024;
    const BUDGET: Duration = Duration::from_millis(300);
    let rows = F32_STRIP * rayon::current_num_threads().max(4);
    let value = |i: usize| (i % 17) as f32 / 17.0 - 0.5;
    let weight = CpuMatrix::from_f32(SIDE, SIDE, (0..SIDE * SIDE).map(value).collect());
    let weight = prepare(products, &[&weight])?;
    let x = super::matrix::product_operand(products, rows, SIDE, |row, out| {
        out.iter_mut().enumerate().for_each(|(col, out)| *out = value(row + col));
    });
    let flops = 2.0 * (rows * SIDE * SIDE) as f64;
    let start = Instant::now();
    let mut best = 0.0f64;
    while start.elapsed() < BUDGET {
        let round = Instant::now();
        std::hint::black_box(linear(&x, &weight, None)?);
        best = best.max(flops / round.elapsed().as_secs_f64());
    }
    Ok(best)
}
