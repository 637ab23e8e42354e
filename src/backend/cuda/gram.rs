//! Sums over tokens.

use half::bf16;

use super::{
    Cuda, CudaMatrix, Products,
    driver::{Element, Gpu, Memory, Operand, Product},
    matrix::{each, shape_error},
};
use crate::backend::{Result, Storage};

/// Rows of the Gram matrix that one product adds to. More waste less of the upper triangle's half with
/// wide matrices, fewer less with narrow ones.
const PANEL: usize = 2048;

/// Lower triangle of `h += xᵀx`.
pub(super) fn gram_accumulate(cuda: &Cuda, h: &mut CudaMatrix, x: &CudaMatrix) -> Result<()> {
    const OPERATION: &str = "gram_accumulate";
    let (tokens, n) = (x.rows, x.cols);
    h.expect_shape(OPERATION, n, n)?;
    match cuda.products {
        Products::F32 => {
            let x = cuda.widened(x)?;
            let mut h = h.f32s_mut(OPERATION)?.as_view_mut();
            cuda.gpu.add_gram_f32(OPERATION, (tokens, n), &x.memory().as_view(), &mut h)
        }
        Products::Bf16 => {
            let x = cuda.narrowed(x)?;
            let x = x.memory();
            let h = h.f32s_mut(OPERATION)?;
            for first in (0..n).step_by(PANEL) {
                let last = n.min(first + PANEL);
                let shape = Product { m: last - first, n: last, k: tokens, alpha: 1.0, beta: 1.0 };
                let rows = Operand { values: x.slice(first..), stride: n, transposed: true };
                let columns = Operand { values: x.as_view(), stride: n, transposed: false };
                let mut h = h.slice_mut(first * n..);
                cuda.gpu.multiply(OPERATION, shape, rows, columns, &mut h, n)?;
            }
            Ok(())
        }
    }
}

/// `c += aᵀb`.
pub(super) fn cross_accumulate(
    cuda: &Cuda,
    c: &mut CudaMatrix,
    a: &CudaMatrix,
    b: &CudaMatrix,
) -> Result<()> {
    const OPERATION: &str = "cross_accumulate";
    b.expect_shape(OPERATION, a.rows, b.cols)?;
    c.expect_shape(OPERATION, a.cols, b.cols)?;
    match cuda.products {
        Products::F32 => {
            let (a_values, b_values) = (cuda.widened(a)?, cuda.widened(b)?);
            cross(&cuda.gpu, c, (a, a_values.memory()), (b, b_values.memory()))
        }
        Products::Bf16 => {
            let (a_values, b_values) = (cuda.narrowed(a)?, cuda.narrowed(b)?);
            cross::<bf16>(&cuda.gpu, c, (a, a_values.memory()), (b, b_values.memory()))
        }
    }
}

fn cross<T: Element<Sum = f32>>(
    gpu: &Gpu,
    c: &mut CudaMatrix,
    (a, a_values): (&CudaMatrix, &Memory<T>),
    (b, b_values): (&CudaMatrix, &Memory<T>),
) -> Result<()> {
    const OPERATION: &str = "cross_accumulate";
    let shape = Product { m: a.cols, n: b.cols, k: a.rows, alpha: 1.0, beta: 1.0 };
    let left = Operand { values: a_values.as_view(), stride: a.cols, transposed: true };
    let right = Operand { values: b_values.as_view(), stride: b.cols, transposed: false };
    let stride = b.cols;
    let mut c = c.f32s_mut(OPERATION)?.as_view_mut();
    gpu.multiply(OPERATION, shape, left, right, &mut c, stride)
}
