//! Norms of rows.

use super::{
    Cuda, CudaMatrix,
    driver::{Geometry, KernelFile},
};
use crate::backend::Result;

const FILE: KernelFile = KernelFile::Norm;

pub(super) fn rms_norm(
    cuda: &Cuda,
    x: &CudaMatrix,
    gain: &CudaMatrix,
    eps: f32,
) -> Result<CudaMatrix> {
    const OPERATION: &str = "rms_norm";
    gain.expect_shape(OPERATION, 1, x.cols)?;
    let mut out = cuda.product_operand(OPERATION, x.rows, x.cols)?;
    let kernel = out.values.kernel("rms_norm_f32", "rms_norm_bf16");
    let args = [
        x.f32s(OPERATION)?.into(),
        gain.f32s(OPERATION)?.into(),
        (&mut out.values).into(),
        (x.rows as u64).into(),
        (x.cols as u32).into(),
        eps.into(),
    ];
    cuda.gpu.launch(FILE, kernel, geometry(x), &args)?;
    Ok(out)
}

pub(super) fn layer_norm(
    cuda: &Cuda,
    x: &CudaMatrix,
    gain: &CudaMatrix,
    bias: &CudaMatrix,
    eps: f32,
) -> Result<CudaMatrix> {
    const OPERATION: &str = "layer_norm";
    gain.expect_shape(OPERATION, 1, x.cols)?;
    bias.expect_shape(OPERATION, 1, x.cols)?;
    let mut out = cuda.product_operand(OPERATION, x.rows, x.cols)?;
    let kernel = out.values.kernel("layer_norm_f32", "layer_norm_bf16");
    let args = [
        x.f32s(OPERATION)?.into(),
        gain.f32s(OPERATION)?.into(),
        bias.f32s(OPERATION)?.into(),
        (&mut out.values).into(),
        (x.rows as u64).into(),
        (x.cols as u32).into(),
        eps.into(),
    ];
    cuda.gpu.launch(FILE, kernel, geometry(x), &args)?;
    Ok(out)
}

/// A block a row, or a warp where a row is short.
fn geometry(x: &CudaMatrix) -> Geometry {
    let threads = x.cols.div_ceil(16).next_multiple_of(32).clamp(32, 1024) as u32;
    let rows = if threads == 32 { 8 } else { 1 };
    Geometry { blocks: [x.rows.div_ceil(rows), 1, 1], threads: [threads, rows as u32], shared: 0 }
}
