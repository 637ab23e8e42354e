//! f64 algebra on the host.

use super::linalg;
use crate::backend::{BackendError, Dense, Eigen, Result};

pub(super) fn product(a: &Dense, b: &Dense) -> Result<Dense> {
    a.expect_product("dense_product", b)?;
    let mut out = Dense::zeros(a.rows, b.cols);
    linalg::matmul_f64(&mut out.data, &a.data, &b.data, [a.rows, a.cols, b.cols]);
    Ok(out)
}

pub(super) fn symmetric_eigen(a: &Dense) -> Result<Eigen> {
    let n = a.rows;
    a.expect_square("symmetric_eigen")?;
    // By columns, the lower triangle is where it belongs.
    let lower = a.transposed().data;
    let failed = BackendError::NoEigenvectors { size: n };
    if lower.iter().any(|value| !value.is_finite()) {
        return Err(failed);
    }
    let Some((values, vectors)) = linalg::symmetric_eigen(&lower, n) else { return Err(failed) };
    Ok(Eigen::from_ascending(&values, &vectors))
}

pub(super) fn solve_right(b: &Dense, a: &Dense) -> Result<Dense> {
    a.expect_square("solve_right")?;
    b.expect_product("solve_right", a)?;
    let mut out = b.clone();
    linalg::solve_right(&mut a.transposed().data, a.rows, &mut out.data, b.rows)
        .map_err(|pivot| BackendError::NotPositiveDefinite { pivot })?;
    Ok(out)
}
