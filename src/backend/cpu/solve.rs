//! Factorisation of the Hessian and quadratic forms with it.

use rayon::prelude::*;

use super::CpuMatrix;
use super::linalg::{self, View, ViewMut};
use super::matrix::{STRIP, shape_error, strip_len};
use super::simd::vectorised;
use crate::backend::{BackendError, Result};

/// Rows of a strip of a quadratic form.
const FORM_STRIP: usize = 256;

/// The diagonal of a square matrix.
pub(super) fn diagonal(h: &CpuMatrix) -> Result<Vec<f32>> {
    let n = h.rows;
    h.expect_shape("diagonal", n, n)?;
    Ok(h.f32s("diagonal")?.iter().step_by(n + 1).copied().collect())
}

/// Sets entries of the diagonal.
pub(super) fn set_diagonal(h: &mut CpuMatrix, entries: &[(usize, f32)]) -> Result<()> {
    const OPERATION: &str = "set_diagonal";
    let n = h.rows;
    h.expect_shape(OPERATION, n, n)?;
    let h = h.f32s_mut(OPERATION)?;
    for &(index, value) in entries {
        if index >= n {
            return Err(shape_error(OPERATION, format!("index {index} of {n}")));
        }
        h[index * (n + 1)] = value;
    }
    Ok(())
}

/// Zeroes columns.
pub(super) fn zero_columns(w: &mut CpuMatrix, columns: &[usize]) -> Result<()> {
    const OPERATION: &str = "zero_columns";
    let cols = w.cols;
    if let Some(column) = columns.iter().find(|&&column| column >= cols) {
        return Err(shape_error(OPERATION, format!("column {column} of {cols}")));
    }
    w.f32s_mut(OPERATION)?.par_chunks_mut(strip_len(STRIP, cols)).for_each(|strip| {
        for row in strip.chunks_exact_mut(cols) {
            for &column in columns {
                row[column] = 0.0;
            }
        }
    });
    Ok(())
}

/// Zeroes what is zero in `from`.
pub(super) fn copy_zeros(w: &mut CpuMatrix, from: &CpuMatrix) -> Result<()> {
    const OPERATION: &str = "copy_zeros";
    from.expect_shape(OPERATION, w.rows, w.cols)?;
    let from = from.f32s(OPERATION)?;
    w.f32s_mut(OPERATION)?.par_iter_mut().zip(from).for_each(|(w, from)| {
        if *from == 0.0 {
            *w = 0.0;
        }
    });
    Ok(())
}

/// The columns of a matrix in another order: column `i` is what `order[i]` was.
pub(super) fn permute_columns(w: &CpuMatrix, order: &[usize]) -> Result<CpuMatrix> {
    const OPERATION: &str = "permute_columns";
    let cols = check_order(OPERATION, w.cols, order)?;
    let from = w.f32s(OPERATION)?;
    let mut permuted = vec![0.0f32; from.len()];
    let strip = strip_len(STRIP, cols);
    permuted.par_chunks_mut(strip).zip(from.par_chunks(strip)).for_each(|(to, from)| {
        for (to, from) in to.chunks_exact_mut(cols).zip(from.chunks_exact(cols)) {
            to.iter_mut().zip(order).for_each(|(to, &column)| *to = from[column]);
        }
    });
    Ok(CpuMatrix::from_f32(w.rows, cols, permuted))
}

/// Rows and columns of a symmetric matrix, given by its lower triangle, in another order.
pub(super) fn permute_symmetric(h: &CpuMatrix, order: &[usize]) -> Result<CpuMatrix> {
    const OPERATION: &str = "permute_symmetric";
    let n = check_order(OPERATION, h.rows, order)?;
    h.expect_shape(OPERATION, n, n)?;
    let from = h.f32s(OPERATION)?;
    let mut permuted = vec![0.0f32; n * n];
    permuted.par_chunks_mut(n.max(1)).zip(order).enumerate().for_each(|(i, (row, &a))| {
        for (to, &b) in row.iter_mut().zip(&order[..=i]) {
            *to = from[a.max(b) * n + a.min(b)];
        }
    });
    Ok(CpuMatrix::from_f32(n, n, permuted))
}

fn check_order(operation: &'static str, n: usize, order: &[usize]) -> Result<usize> {
    if order.len() != n || order.iter().any(|&index| index >= n) {
        return Err(shape_error(operation, format!("an order of {} for {n}", order.len())));
    }
    Ok(n)
}

/// `U` upper triangular with `UᵀU = (H + damp·I)⁻¹`.
///
/// With `J` the reversal of indices and `J (H + damp·I) J = L Lᵀ`, the inverse is
/// `J L⁻ᵀ L⁻¹ J = (J L⁻¹ J)ᵀ (J L⁻¹ J)`, and `J L⁻¹ J` is upper triangular: one factorisation and
/// one triangular inverse, no explicit inverse of `H`.
pub(super) fn inverse_factor_upper(h: &CpuMatrix, damp: f64) -> Result<CpuMatrix> {
    const OPERATION: &str = "inverse_factor_upper";
    let n = h.rows;
    h.expect_shape(OPERATION, n, n)?;
    let h = h.f32s(OPERATION)?;
    let mut reversed = vec![0.0f64; n * n];
    // Column j of the lower triangle of J H J holds, downwards, row n−1−j of H's lower triangle
    // from its diagonal to the left.
    reversed.par_chunks_mut(n.max(1)).enumerate().for_each(|(j, column)| {
        let row = &h[(n - 1 - j) * n..][..n - j];
        column[j..].iter_mut().zip(row.iter().rev()).for_each(|(to, from)| *to = f64::from(*from));
        column[j] += damp;
    });
    let inverse = linalg::inverse_cholesky_lower(&mut reversed, n)
        .map_err(|pivot| BackendError::NotPositiveDefinite { pivot: n - 1 - pivot })?;
    let mut u = vec![0.0f32; n * n];
    u.par_chunks_mut(n.max(1)).enumerate().for_each(|(i, row)| {
        let source = n - 1 - i;
        for (j, value) in row.iter_mut().enumerate().skip(i) {
            *value = inverse[(n - 1 - j) * n + source] as f32;
        }
    });
    Ok(CpuMatrix::from_f32(n, n, u))
}

/// `Σ_r d_r H d_rᵀ` with `d = a − b`.
///
/// `d H dᵀ = 2 d L dᵀ − Σ_j d_j² H_jj` with `L` the lower triangle of `H`.
pub(super) fn quadratic_form(a: &CpuMatrix, b: Option<&CpuMatrix>, h: &CpuMatrix) -> Result<f64> {
    const OPERATION: &str = "quadratic_form";
    let cols = a.cols;
    h.expect_shape(OPERATION, cols, cols)?;
    let diagonal = diagonal(h)?;
    let (a_values, h) = (a.f32s(OPERATION)?, h.f32s(OPERATION)?);
    let b_values = match b {
        Some(b) => {
            b.expect_shape(OPERATION, a.rows, cols)?;
            Some(b.f32s(OPERATION)?)
        }
        None => None,
    };
    let len = strip_len(FORM_STRIP, cols);
    let partial: Vec<f64> = a_values
        .par_chunks(len)
        .enumerate()
        .map(|(strip, a)| {
            let mut d = a.to_vec();
            if let Some(b) = b_values {
                d.iter_mut().zip(&b[strip * len..]).for_each(|(d, b)| *d -= b);
            }
            let rows = d.len() / cols;
            let mut t = vec![0.0; d.len()];
            let c = ViewMut { data: &mut t, rows, cols, stride: cols };
            linalg::matmul_lower(c, View::dense(&d, rows, cols), View::dense(h, cols, cols));
            d.chunks_exact(cols).zip(t.chunks_exact(cols)).map(|(d, t)| form(d, t, &diagonal)).sum()
        })
        .collect();
    Ok(partial.iter().sum())
}

vectorised! {
    /// `Σ_j d_j (2 t_j − d_j h_jj)`.
    fn form<'a>(d: &'a [f32], t: &'a [f32], diagonal: &'a [f32]) -> f64 {
        let mut lanes = [0.0f64; 8];
        for ((d, t), h) in d.chunks(8).zip(t.chunks(8)).zip(diagonal.chunks(8)) {
            for (((lane, d), t), h) in lanes.iter_mut().zip(d).zip(t).zip(h) {
                let d = f64::from(*d);
                *lane += d * (2.0 * f64::from(*t) - d * f64::from(*h));
            }
        }
        lanes.iter().sum()
    }
}
