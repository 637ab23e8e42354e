//! f64 algebra on the host.

use super::linalg;
use super::matrix::shape_error;
use crate::backend::{BackendError, Dense, Eigen, Result};

pub(super) fn product(a: &Dense, b: &Dense) -> Result<Dense> {
    if a.cols != b.rows {
        let detail = format!("[{}, {}] by [{}, {}]", a.rows, a.cols, b.rows, b.cols);
        return Err(shape_error("dense_product", detail));
    }
    let mut out = Dense::zeros(a.rows, b.cols);
    linalg::matmul_f64(&mut out.data, &a.data, &b.data, [a.rows, a.cols, b.cols]);
    Ok(out)
}

pub(super) fn symmetric_eigen(a: &Dense) -> Result<Eigen> {
    let n = a.rows;
    expect_square("symmetric_eigen", a)?;
    let lower = lower_by_columns(a);
    let failed = BackendError::NoEigenvectors { size: n };
    if lower.iter().any(|value| !value.is_finite()) {
        return Err(failed);
    }
    let Some((values, vectors)) = linalg::symmetric_eigen(&lower, n) else { return Err(failed) };
    let mut out = Eigen { values: Vec::with_capacity(n), vectors: Dense::zeros(n, n) };
    for (j, vector) in vectors.chunks_exact(n.max(1)).rev().enumerate() {
        out.values.push(values[n - 1 - j]);
        let largest =
            vector.iter().fold(0.0, |kept: f64, &v| if v.abs() > kept.abs() { v } else { kept });
        let sign = if largest < 0.0 { -1.0 } else { 1.0 };
        for (i, &value) in vector.iter().enumerate() {
            out.vectors.data[i * n + j] = sign * value;
        }
    }
    Ok(out)
}

pub(super) fn solve_right(b: &Dense, a: &Dense) -> Result<Dense> {
    expect_square("solve_right", a)?;
    if b.cols != a.rows {
        let detail = format!("[{}, {}] by [{}, {}]", b.rows, b.cols, a.rows, a.cols);
        return Err(shape_error("solve_right", detail));
    }
    let mut out = b.clone();
    linalg::solve_right(&mut lower_by_columns(a), a.rows, &mut out.data, b.rows)
        .map_err(|pivot| BackendError::NotPositiveDefinite { pivot })?;
    Ok(out)
}

fn expect_square(operation: &'static str, a: &Dense) -> Result<()> {
    if a.rows == a.cols {
        return Ok(());
    }
    Err(shape_error(operation, format!("[{}, {}] is not square", a.rows, a.cols)))
}

/// A symmetric matrix by columns, of which its lower triangle is right.
fn lower_by_columns(a: &Dense) -> Vec<f64> {
    a.transposed().data
}
