//! Factorisation of the Hessian, orders of columns, and quadratic forms.

use super::{
    Cuda, CudaMatrix,
    driver::{Arg, Geometry, KernelFile},
    matrix::{ROW_BLOCKS, THREADS, by_column, each, shape_error},
};
use crate::backend::{BackendError, Result};

const FILE: KernelFile = KernelFile::Solve;
/// Side of the tiles that are transposed.
const TILE: usize = 32;
/// Values of the matrices in between of a quadratic form.
const FORM_VALUES: usize = 1 << 28;

pub(super) fn diagonal(cuda: &Cuda, h: &CudaMatrix) -> Result<Vec<f32>> {
    const OPERATION: &str = "diagonal";
    let n = h.rows;
    h.expect_shape(OPERATION, n, n)?;
    let mut out = cuda.gpu.allocate::<f32>(n, OPERATION)?;
    let args = [h.f32s(OPERATION)?.into(), (n as u64).into(), (&mut out).into()];
    cuda.gpu.launch(FILE, OPERATION, each(n), &args)?;
    cuda.gpu.download(&out, n, OPERATION)
}

pub(super) fn set_diagonal(
    cuda: &Cuda,
    h: &mut CudaMatrix,
    entries: &[(usize, f32)],
) -> Result<()> {
    const OPERATION: &str = "set_diagonal";
    let n = h.rows;
    h.expect_shape(OPERATION, n, n)?;
    let index = indices(OPERATION, entries.iter().map(|entry| entry.0), n)?;
    let values: Vec<f32> = entries.iter().map(|entry| entry.1).collect();
    let (index, values) =
        (cuda.gpu.upload(&index, OPERATION)?, cuda.gpu.upload(&values, OPERATION)?);
    let args = [
        h.f32s_mut(OPERATION)?.into(),
        (n as u64).into(),
        (&index).into(),
        (&values).into(),
        (entries.len() as u64).into(),
    ];
    cuda.gpu.launch(FILE, OPERATION, each(entries.len()), &args)
}

pub(super) fn zero_columns(cuda: &Cuda, w: &mut CudaMatrix, columns: &[usize]) -> Result<()> {
    const OPERATION: &str = "zero_columns";
    let (rows, cols) = (w.rows, w.cols);
    let index = indices(OPERATION, columns.iter().copied(), cols)?;
    let index = cuda.gpu.upload(&index, OPERATION)?;
    let args = [
        w.f32s_mut(OPERATION)?.into(),
        (rows as u64).into(),
        (cols as u64).into(),
        (&index).into(),
        (columns.len() as u64).into(),
    ];
    cuda.gpu.launch(FILE, OPERATION, by_column(rows, columns.len()), &args)
}

pub(super) fn copy_zeros(cuda: &Cuda, w: &mut CudaMatrix, from: &CudaMatrix) -> Result<()> {
    const OPERATION: &str = "copy_zeros";
    from.expect_shape(OPERATION, w.rows, w.cols)?;
    let len = w.len();
    let args = [w.f32s_mut(OPERATION)?.into(), from.f32s(OPERATION)?.into(), (len as u64).into()];
    cuda.gpu.launch(FILE, OPERATION, each(len), &args)
}

pub(super) fn permute_columns(cuda: &Cuda, w: &CudaMatrix, order: &[usize]) -> Result<CudaMatrix> {
    const OPERATION: &str = "permute_columns";
    let (rows, cols) = (w.rows, w.cols);
    let order = order_of(OPERATION, order, cols)?;
    let order = cuda.gpu.upload(&order, OPERATION)?;
    let mut out = cuda.gpu.allocate::<f32>(rows * cols, OPERATION)?;
    let args = [
        w.f32s(OPERATION)?.into(),
        (rows as u64).into(),
        (cols as u64).into(),
        (&order).into(),
        (&mut out).into(),
    ];
    cuda.gpu.launch(FILE, OPERATION, by_column(rows, cols), &args)?;
    Ok(CudaMatrix::f32(rows, cols, out))
}

pub(super) fn permute_symmetric(
    cuda: &Cuda,
    h: &CudaMatrix,
    order: &[usize],
) -> Result<CudaMatrix> {
    const OPERATION: &str = "permute_symmetric";
    let n = h.rows;
    h.expect_shape(OPERATION, n, n)?;
    let order = order_of(OPERATION, order, n)?;
    let order = cuda.gpu.upload(&order, OPERATION)?;
    let mut out = cuda.gpu.allocate::<f32>(n * n, OPERATION)?;
    let args = [h.f32s(OPERATION)?.into(), (n as u64).into(), (&order).into(), (&mut out).into()];
    cuda.gpu.launch(FILE, OPERATION, by_column(n, n), &args)?;
    Ok(CudaMatrix::f32(n, n, out))
}

/// Indices below `limit` as kernels take them.
fn indices(
    operation: &'static str,
    indices: impl Iterator<Item = usize>,
    limit: usize,
) -> Result<Vec<u32>> {
    let narrow = |index: usize| match u32::try_from(index) {
        Ok(narrow) if index < limit => Ok(narrow),
        _ => Err(shape_error(operation, format!("index {index} of {limit}"))),
    };
    indices.map(narrow).collect()
}

/// An order of `n` columns as kernels take it.
pub(super) fn order_of(operation: &'static str, order: &[usize], n: usize) -> Result<Vec<u32>> {
    if order.len() != n {
        return Err(shape_error(operation, format!("an order of {} for {n}", order.len())));
    }
    indices(operation, order.iter().copied(), n)
}

/// `U` upper triangular with `UᵀU = (H + damp·I)⁻¹`, as on the CPU: with `J` the reversal of indices and
/// `J (H + damp·I) J = L Lᵀ`, `U = J L⁻¹ J`.
///
/// Needs 8 n² bytes besides `h` and the result.
pub(super) fn inverse_factor_upper(cuda: &Cuda, h: &CudaMatrix, damp: f64) -> Result<CudaMatrix> {
    const OPERATION: &str = "inverse_factor_upper";
    let n = h.rows;
    h.expect_shape(OPERATION, n, n)?;
    let gpu = &cuda.gpu;
    let mut reversed = gpu.allocate::<f64>(n * n, OPERATION)?;
    let args = [h.f32s(OPERATION)?.into(), (n as u64).into(), damp.into(), (&mut reversed).into()];
    gpu.launch(FILE, "reverse_lower", by_column(n, n), &args)?;
    let pivot = |error| match error {
        BackendError::NotPositiveDefinite { pivot } => {
            BackendError::NotPositiveDefinite { pivot: n - 1 - pivot.min(n - 1) }
        }
        other => other,
    };
    gpu.cholesky_lower(OPERATION, n, &mut reversed).map_err(pivot)?;
    gpu.invert_lower(OPERATION, n, &mut reversed).map_err(pivot)?;
    let mut u = gpu.allocate::<f32>(n * n, OPERATION)?;
    let tiles = n.div_ceil(TILE);
    let geometry = Geometry {
        blocks: [tiles, tiles.min(ROW_BLOCKS), 1],
        threads: [THREADS as u32, 1],
        shared: 0,
    };
    let args = [(&reversed).into(), (n as u64).into(), (&mut u).into()];
    gpu.launch(FILE, "reverse_upper", geometry, &args)?;
    Ok(CudaMatrix::f32(n, n, u))
}

/// `Σ_r d_r H d_rᵀ` with `d = a − b`: `d H dᵀ = 2 d L dᵀ − Σ_j d_j² H_jj` with `L` the lower triangle of
/// `H`, some rows at a time.
pub(super) fn quadratic_form(
    cuda: &Cuda,
    a: &CudaMatrix,
    b: Option<&CudaMatrix>,
    h: &CudaMatrix,
) -> Result<f64> {
    const OPERATION: &str = "quadratic_form";
    let (rows, n) = (a.rows, a.cols);
    h.expect_shape(OPERATION, n, n)?;
    if let Some(b) = b {
        b.expect_shape(OPERATION, rows, n)?;
    }
    let gpu = &cuda.gpu;
    let h = h.f32s(OPERATION)?;
    let mut diagonal = gpu.allocate::<f32>(n, OPERATION)?;
    let args = [h.into(), (n as u64).into(), (&mut diagonal).into()];
    gpu.launch(FILE, "diagonal", each(n), &args)?;
    let strip = (FORM_VALUES / n.max(1)).clamp(1, rows.max(1));
    let mut d = gpu.allocate::<f32>(strip * n, OPERATION)?;
    let mut t = gpu.allocate::<f32>(strip * n, OPERATION)?;
    let mut sums = gpu.allocate::<f64>(rows, OPERATION)?;
    for first in (0..rows).step_by(strip) {
        let here = strip.min(rows - first);
        let range = first * n..(first + here) * n;
        let a = a.f32s(OPERATION)?.slice(range.clone());
        let b = b.map(|b| b.f32s(OPERATION)).transpose()?.map(|b| b.slice(range));
        let args = [
            (&a).into(),
            b.as_ref().map_or_else(|| Arg::optional::<f32>(None), Arg::from),
            ((here * n) as u64).into(),
            (&mut d).into(),
        ];
        gpu.launch(FILE, "difference", each(here * n), &args)?;
        let mut product = t.as_view_mut();
        gpu.times_lower(OPERATION, (here, n), &d.as_view(), &h.as_view(), &mut product)?;
        let geometry = Geometry { blocks: [here, 1, 1], threads: [THREADS as u32, 1], shared: 0 };
        let mut sums = sums.slice_mut(first..);
        let args =
            [(&d).into(), (&t).into(), (&diagonal).into(), (n as u64).into(), (&mut sums).into()];
        gpu.launch(FILE, "row_forms", geometry, &args)?;
    }
    Ok(gpu.download(&sums, rows, OPERATION)?.iter().sum())
}
