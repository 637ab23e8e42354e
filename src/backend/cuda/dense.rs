//! f64 algebra of matrices in host memory.

use super::{
    Cuda,
    driver::{Operand, Product},
};
use crate::backend::{BackendError, Dense, Eigen, Result};

pub(super) fn product(cuda: &Cuda, a: &Dense, b: &Dense) -> Result<Dense> {
    const OPERATION: &str = "dense_product";
    a.expect_product(OPERATION, b)?;
    let (m, n) = (a.rows, b.cols);
    let (left, right) =
        (cuda.gpu.upload(&a.data, OPERATION)?, cuda.gpu.upload(&b.data, OPERATION)?);
    let mut out = cuda.gpu.zeros::<f64>(m * n, OPERATION)?;
    let shape = Product { m, n, k: a.cols, alpha: 1.0, beta: 0.0 };
    let left = Operand { values: left.as_view(), stride: a.cols.max(1), transposed: false };
    let right = Operand { values: right.as_view(), stride: n.max(1), transposed: false };
    if a.cols > 0 {
        cuda.gpu.multiply(OPERATION, shape, &left, &right, &mut out.as_view_mut(), n)?;
    }
    Ok(Dense { rows: m, cols: n, data: cuda.gpu.download(&out, m * n, OPERATION)? })
}

pub(super) fn symmetric_eigen(cuda: &Cuda, a: &Dense) -> Result<Eigen> {
    const OPERATION: &str = "symmetric_eigen";
    let n = a.rows;
    a.expect_square(OPERATION)?;
    // By columns, the lower triangle is where it belongs.
    let lower = a.transposed().data;
    if lower.iter().any(|value| !value.is_finite()) {
        return Err(BackendError::NoEigenvectors { size: n });
    }
    let mut vectors = cuda.gpu.upload(&lower, OPERATION)?;
    let values = cuda.gpu.eigen_lower(OPERATION, n, &mut vectors)?;
    let values = cuda.gpu.download(&values, n, OPERATION)?;
    let vectors = cuda.gpu.download(&vectors, n * n, OPERATION)?;
    Ok(Eigen::from_ascending(&values, &vectors))
}

pub(super) fn solve_right(cuda: &Cuda, b: &Dense, a: &Dense) -> Result<Dense> {
    const OPERATION: &str = "solve_right";
    a.expect_square(OPERATION)?;
    b.expect_product(OPERATION, a)?;
    let mut factor = cuda.gpu.upload(&a.transposed().data, OPERATION)?;
    let mut out = cuda.gpu.upload(&b.data, OPERATION)?;
    cuda.gpu.cholesky_lower(OPERATION, a.rows, &mut factor)?;
    cuda.gpu.divide_by_factored(OPERATION, (b.rows, b.cols), &mut factor, &mut out)?;
    let data = cuda.gpu.download(&out, b.data.len(), OPERATION)?;
    Ok(Dense { rows: b.rows, cols: b.cols, data })
}
