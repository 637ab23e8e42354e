//! Activations of an MLP.

use super::{
    Cuda, CudaMatrix,
    driver::KernelFile,
    matrix::{by_row, each},
};
use crate::backend::{Activation, Result};

const FILE: KernelFile = KernelFile::Activation;

/// What an activation is called in the kernels.
fn code(activation: Activation) -> u32 {
    match activation {
        Activation::Silu => 0,
        Activation::Relu => 1,
        Activation::Gelu => 2,
        Activation::GeluTanh => 3,
    }
}

pub(super) fn activation(
    cuda: &Cuda,
    x: &CudaMatrix,
    activation: Activation,
) -> Result<CudaMatrix> {
    const OPERATION: &str = "activation";
    let mut out = cuda.product_operand(OPERATION, x.rows, x.cols)?;
    let kernel = out.values.kernel("activation_f32", "activation_bf16");
    let args = [
        x.f32s(OPERATION)?.into(),
        (&mut out.values).into(),
        (x.len() as u64).into(),
        code(activation).into(),
    ];
    cuda.gpu.launch(FILE, kernel, each(x.len()), &args)?;
    Ok(out)
}

/// `activation(gate) · up` of gates and as many ups, side by side.
pub(super) fn gated(cuda: &Cuda, x: &CudaMatrix, activation: Activation) -> Result<CudaMatrix> {
    const OPERATION: &str = "gated";
    let features = x.cols / 2;
    let mut out = cuda.product_operand(OPERATION, x.rows, features)?;
    let kernel = out.values.kernel("gated_f32", "gated_bf16");
    let args = [
        x.f32s(OPERATION)?.into(),
        (&mut out.values).into(),
        (features as u32).into(),
        code(activation).into(),
    ];
    cuda.gpu.launch(FILE, kernel, by_row(x.rows, features), &args)?;
    Ok(out)
}
