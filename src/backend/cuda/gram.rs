//! Sums over tokens.

use half::bf16;

use super::{
    Cuda, CudaMatrix, Products,
    driver::{Element, Geometry, Gpu, KernelFile, Memory, Operand, Product},
    matrix::{by_row, shape_error},
};
use crate::backend::Result;

/// Rows of the Gram matrix that one product adds to. More waste less of the upper triangle's half with
/// wide matrices, fewer less with narrow ones.
const PANEL: usize = 2048;

const FILE: KernelFile = KernelFile::Stats;
/// Rows whose squares are summed before their sums are.
const STRIP: usize = 256;

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
                cuda.gpu.multiply(OPERATION, shape, &rows, &columns, &mut h, n)?;
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
    gpu.multiply(OPERATION, shape, &left, &right, &mut c, stride)
}

/// Multiplies each row of `x` with its factor.
pub(super) fn scale_rows(cuda: &Cuda, x: &mut CudaMatrix, factors: &[f32]) -> Result<()> {
    const OPERATION: &str = "scale_rows";
    let (rows, cols) = (x.rows, x.cols);
    if factors.len() != rows {
        return Err(shape_error(OPERATION, format!("{} factors for {rows} rows", factors.len())));
    }
    let factors = cuda.gpu.upload(factors, OPERATION)?;
    let kernel = x.values.kernel("scale_rows_f32", "scale_rows_bf16");
    let args = [(&mut x.values).into(), (&factors).into(), (cols as u32).into()];
    cuda.gpu.launch(KernelFile::Elementwise, kernel, by_row(rows, cols), &args)
}

/// `sums[j] += Σ_t x[t, j]²`.
pub(super) fn column_sq_norm(cuda: &Cuda, sums: &mut CudaMatrix, x: &CudaMatrix) -> Result<()> {
    const OPERATION: &str = "column_sq_norm";
    let (rows, cols) = (x.rows, x.cols);
    sums.expect_shape(OPERATION, 1, cols)?;
    let strips = rows.div_ceil(STRIP);
    let mut partial = cuda.gpu.allocate::<f32>(strips * cols, OPERATION)?;
    let kernel = x.values.kernel("column_sq_norm_f32", "column_sq_norm_bf16");
    let geometry =
        Geometry { blocks: [strips, cols.div_ceil(128), 1], threads: [128, 1], shared: 0 };
    let args =
        [(&x.values).into(), (&mut partial).into(), (rows as u64).into(), (cols as u32).into()];
    cuda.gpu.launch(FILE, kernel, geometry, &args)?;
    let args = [
        sums.f32s_mut(OPERATION)?.into(),
        (&partial).into(),
        (strips as u32).into(),
        (cols as u32).into(),
    ];
    let geometry = Geometry { blocks: [cols.div_ceil(32), 1, 1], threads: [32, 1], shared: 0 };
    cuda.gpu.launch(FILE, "add_partial_sums", geometry, &args)
}

/// Rows of `x` that hold a NaN or an infinity.
pub(super) fn count_non_finite_rows(cuda: &Cuda, x: &CudaMatrix) -> Result<usize> {
    const OPERATION: &str = "count_non_finite_rows";
    let mut count = cuda.gpu.zeros::<u32>(1, OPERATION)?;
    let kernel = x.values.kernel("count_non_finite_rows_f32", "count_non_finite_rows_bf16");
    let geometry = Geometry { blocks: [x.rows.div_ceil(8), 1, 1], threads: [32, 8], shared: 0 };
    let args =
        [(&x.values).into(), (&mut count).into(), (x.rows as u64).into(), (x.cols as u32).into()];
    cuda.gpu.launch(FILE, kernel, geometry, &args)?;
    let count = cuda.gpu.download(&count, 1, OPERATION)?;
    Ok(count.first().map_or(0, |count| *count as usize))
}
