//! Products with weights.

use std::time::{Duration, Instant};

use half::bf16;

use super::{
    Cuda, CudaMatrix, CudaWeight, activation,
    driver::{Element, KernelFile, Memory, Operand, Product},
    matrix::{Values, by_row, shape_error},
};
use crate::backend::{Activation, BlockOps, Result, Storage};

/// Stacks weights in the type of products.
pub(super) fn prepare(cuda: &Cuda, weights: &[&CudaMatrix]) -> Result<CudaWeight> {
    const OPERATION: &str = "prepare";
    let in_features = weights.first().map_or(0, |weight| weight.cols);
    for weight in weights {
        weight.expect_shape(OPERATION, weight.rows, in_features)?;
    }
    let out_features = weights.iter().map(|weight| weight.rows).sum();
    let mut stacked = cuda.product_operand(OPERATION, out_features, in_features)?;
    let mut at = 0;
    for weight in weights {
        match &mut stacked.values {
            Values::F32(to) => {
                let from = cuda.widened(weight)?;
                cuda.gpu.copy_into(to, at, from.memory(), weight.len(), OPERATION)?;
            }
            Values::Bf16(to) => {
                let from = cuda.narrowed(weight)?;
                cuda.gpu.copy_into(to, at, from.memory(), weight.len(), OPERATION)?;
            }
        }
        at += weight.len();
    }
    Ok(CudaWeight(stacked))
}

/// `[tokens, in] × [out, in] → [tokens, out]`.
pub(super) fn linear(
    cuda: &Cuda,
    operation: &'static str,
    x: &CudaMatrix,
    weight: &CudaWeight,
    bias: Option<&CudaMatrix>,
) -> Result<CudaMatrix> {
    let (rows, n) = (x.rows, weight.0.rows);
    let mut out = CudaMatrix::f32(rows, n, cuda.gpu.allocate(rows * n, operation)?);
    let bias = row_of(operation, bias, n)?;
    if let Some(bias) = bias {
        let args = [out.f32s_mut(operation)?.into(), bias.into(), (n as u32).into()];
        cuda.gpu.launch(KernelFile::Elementwise, "broadcast_bias", by_row(rows, n), &args)?;
    }
    let beta = if bias.is_some() { 1.0 } else { 0.0 };
    product(cuda, operation, &mut out, x, weight, beta)?;
    Ok(out)
}

/// `residual += x Wᵀ + bias`.
pub(super) fn linear_add(
    cuda: &Cuda,
    residual: &mut CudaMatrix,
    x: &CudaMatrix,
    weight: &CudaWeight,
    bias: Option<&CudaMatrix>,
) -> Result<()> {
    const OPERATION: &str = "linear_add";
    let n = weight.0.rows;
    residual.expect_shape(OPERATION, x.rows, n)?;
    if let Some(bias) = row_of(OPERATION, bias, n)? {
        let args = [residual.f32s_mut(OPERATION)?.into(), bias.into(), (n as u32).into()];
        cuda.gpu.launch(KernelFile::Elementwise, "add_bias", by_row(x.rows, n), &args)?;
    }
    product(cuda, OPERATION, residual, x, weight, 1.0)
}

/// `activation(gate) · up` of `x Wᵀ + bias`, gates first.
pub(super) fn linear_gated(
    cuda: &Cuda,
    x: &CudaMatrix,
    weight: &CudaWeight,
    bias: Option<&CudaMatrix>,
    activation: Activation,
) -> Result<CudaMatrix> {
    const OPERATION: &str = "linear_gated";
    let outputs = weight.0.rows;
    if !outputs.is_multiple_of(2) {
        return Err(shape_error(OPERATION, format!("{outputs} outputs are not gates and ups")));
    }
    activation::gated(cuda, &linear(cuda, OPERATION, x, weight, bias)?, activation)
}

fn row_of<'a>(
    operation: &'static str,
    bias: Option<&'a CudaMatrix>,
    cols: usize,
) -> Result<Option<&'a Memory<f32>>> {
    let Some(bias) = bias else { return Ok(None) };
    bias.expect_shape(operation, 1, cols)?;
    bias.f32s(operation).map(Some)
}

/// `out = beta · out + x Wᵀ`.
fn product(
    cuda: &Cuda,
    operation: &'static str,
    out: &mut CudaMatrix,
    x: &CudaMatrix,
    CudaWeight(weight): &CudaWeight,
    beta: f64,
) -> Result<()> {
    x.expect_shape(operation, x.rows, weight.cols)?;
    match &weight.values {
        Values::F32(w) => {
            let values = cuda.widened(x)?;
            multiply(cuda, operation, out, (x, values.memory()), (weight, w), beta)
        }
        Values::Bf16(w) => {
            let values = cuda.narrowed(x)?;
            multiply::<bf16>(cuda, operation, out, (x, values.memory()), (weight, w), beta)
        }
    }
}

fn multiply<T: Element<Sum = f32>>(
    cuda: &Cuda,
    operation: &'static str,
    out: &mut CudaMatrix,
    (x, x_values): (&CudaMatrix, &Memory<T>),
    (weight, w_values): (&CudaMatrix, &Memory<T>),
    beta: f64,
) -> Result<()> {
    let (m, n, k) = (x.rows, weight.rows, x.cols);
    let shape = Product { m, n, k, alpha: 1.0, beta };
    let left = Operand { values: x_values.as_view(), stride: k, transposed: false };
    let right = Operand { values: w_values.as_view(), stride: k, transposed: true };
    let mut out = out.f32s_mut(operation)?.as_view_mut();
    cuda.gpu.multiply(operation, shape, &left, &right, &mut out, n)
}

/// FLOP/s of a product that fills the device: squares of growing size, up to one that takes long enough
/// for its launch not to show.
pub(super) fn measure_ceiling(cuda: &Cuda) -> Result<f64> {
    const SIDES: [usize; 5] = [512, 1024, 2048, 4096, 8192];
    const LONG_ENOUGH: Duration = Duration::from_millis(2);
    let mut best = 0.0f64;
    for side in SIDES {
        let took = time_square(cuda, side)?;
        best = best.max(2.0 * (side as f64).powi(3) / took.as_secs_f64());
        if took >= LONG_ENOUGH {
            break;
        }
    }
    Ok(best)
}

/// The least time of a product of squares with `side` rows.
fn time_square(cuda: &Cuda, side: usize) -> Result<Duration> {
    const OPERATION: &str = "ceiling";
    let value = |i: usize| (i % 17) as f32 / 17.0 - 0.5;
    let values: Vec<f32> = (0..side * side).map(value).collect();
    let square = cuda.upload(&values, side, side)?;
    let weight = cuda.prepare(&[&square])?;
    // In the type of products, as activations are.
    let CudaWeight(x) = cuda.prepare(&[&square])?;
    let round = || {
        let start = Instant::now();
        cuda.linear(&x, &weight, None)?;
        cuda.gpu.finish(OPERATION)?;
        Ok(start.elapsed())
    };
    // The first starts the library up.
    round()?;
    (0..3).map(|_| round()).try_fold(Duration::MAX, |least, took| Ok(least.min(took?)))
}
