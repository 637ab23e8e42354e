//! One column block of SparseGPT's Algorithm 1 and the lazy update after it.
//!
//! Rows are independent once the weights to zero are known, so a thread takes a strip of rows and
//! keeps their part of the column block in its cache.

use std::ops::Range;

use rayon::prelude::*;

use super::CpuMatrix;
use super::linalg::{self, Into, View, ViewMut};
use super::matrix::{shape_error, strip_len};
use super::select::{self, Lowest};
use super::simd::vectorised;
use crate::backend::{Result, SweepRule};

/// Rows of a strip: they share each row of `u` while it is in the cache.
const SWEEP_STRIP: usize = 16;
/// Values that are updated together: one AVX-512 register.
const LANES: usize = 16;
/// Rows of a strip of the lazy update.
const UPDATE_STRIP: usize = 256;

/// `u` inside a column block.
struct Block {
    /// Above the diagonal, `[width, width]`; zero elsewhere.
    u: Vec<f32>,
    diagonal: Vec<f32>,
    width: usize,
}

impl Block {
    fn new(u: &[f32], cols: usize, columns: Range<usize>) -> Self {
        let width = columns.len();
        let mut block = vec![0.0; width * width];
        let mut diagonal = Vec::with_capacity(width);
        for (j, column) in columns.clone().enumerate() {
            let row = &u[column * cols..][columns.clone()];
            diagonal.push(row[j]);
            block[j * width..][j + 1..width].copy_from_slice(&row[j + 1..]);
        }
        Self { u: block, diagonal, width }
    }

    /// `w² / u_jj²`, the error that zeroing the weight costs.
    #[allow(clippy::inline_always, reason = "part of a vectorised body")]
    #[inline(always)]
    fn score(&self, w: f32, j: usize) -> u32 {
        let err = w / self.diagonal[j];
        select::order(err * err)
    }
}

/// Zeroes weights of a column block and moves their errors to the right inside the block.
pub(super) fn obs_sweep(
    w: &mut CpuMatrix,
    u: &CpuMatrix,
    columns: Range<usize>,
    rule: SweepRule,
) -> Result<CpuMatrix> {
    const OPERATION: &str = "obs_sweep";
    let (rows, cols, width) = (w.rows, w.cols, columns.len());
    u.expect_shape(OPERATION, cols, cols)?;
    if columns.end > cols {
        return Err(shape_error(OPERATION, format!("columns {columns:?} of {cols}")));
    }
    if let SweepRule::Group { m, .. } = rule
        && (m == 0 || !width.is_multiple_of(m))
    {
        return Err(shape_error(OPERATION, format!("groups of {m} in {width} columns")));
    }
    let u = u.f32s(OPERATION)?;
    let block = Block::new(u, cols, columns.clone());
    let w = w.f32s_mut(OPERATION)?;
    // A compact copy of the block becomes the errors in place: column j is final once swept.
    let mut work = vec![0.0; rows * width];
    if width == 0 {
        return Ok(CpuMatrix::from_f32(rows, width, work));
    }
    work.par_chunks_exact_mut(width).zip(w.par_chunks_exact(cols)).for_each(|(work, w)| {
        work.copy_from_slice(&w[columns.clone()]);
    });
    let mut zero = vec![false; rows * width];
    if let SweepRule::Lowest { zeros } = rule {
        let lowest = Lowest::find(&work, width, zeros, |w, j| block.score(w, j));
        lowest.mark(&work, &mut zero, width, |w, j| block.score(w, j));
    }
    let strip = strip_len(SWEEP_STRIP, width);
    work.par_chunks_mut(strip)
        .zip(zero.par_chunks_mut(strip))
        .zip(w.par_chunks_mut(strip_len(SWEEP_STRIP, cols)))
        .for_each(|((work, zero), w)| {
            sweep_strip(&block, rule, work, zero);
            let rows = work.chunks_exact_mut(width).zip(zero.chunks_exact(width));
            for ((work, zero), w) in rows.zip(w.chunks_exact_mut(cols)) {
                let swept = work.iter_mut().zip(zero).zip(&mut w[columns.clone()]);
                for ((work, &zero), w) in swept {
                    // What was swept is an error where a weight was zeroed, else the weight.
                    *w = if zero { 0.0 } else { std::mem::replace(work, 0.0) };
                }
            }
        });
    Ok(CpuMatrix::from_f32(rows, width, work))
}

vectorised! {
    /// Sweeps some rows of a column block: marks in `zero` what a rule chooses group by group, and
    /// leaves in `work` the scaled error of each weight that is zeroed, the new value of the others.
    fn sweep_strip<'a>(
        block: &'a Block,
        rule: SweepRule,
        work: &'a mut [f32],
        zero: &'a mut [bool],
    ) {
        let width = block.width;
        for j in 0..width {
            // From a whole vector on: `u` is zero up to the diagonal.
            let from = j / LANES * LANES;
            let u = &block.u[j * width..][from..width];
            let rows = work.chunks_exact_mut(width).zip(zero.chunks_exact_mut(width));
            for (work, zero) in rows {
                if let SweepRule::Group { zeros, m } = rule
                    && j % m == 0
                {
                    choose_in_group(block, &work[j..j + m], j, zeros, &mut zero[j..j + m]);
                }
                if !zero[j] {
                    continue;
                }
                let err = work[j] / block.diagonal[j];
                if err != 0.0 {
                    for (work, u) in work[from..].iter_mut().zip(u) {
                        *work -= err * u;
                    }
                }
                work[j] = err;
            }
        }
    }
}

#[allow(clippy::inline_always, reason = "part of a vectorised body")]
#[inline(always)]
fn choose_in_group(block: &Block, w: &[f32], first: usize, zeros: usize, zero: &mut [bool]) {
    let mut few = [0u32; 16];
    let mut many = Vec::new();
    let scores = if let Some(few) = few.get_mut(..w.len()) {
        few
    } else {
        many.resize(w.len(), 0);
        &mut many[..]
    };
    for (i, (score, w)) in scores.iter_mut().zip(w).enumerate() {
        *score = block.score(*w, first + i);
    }
    select::lowest_of(scores, zeros, |i| zero[i] = true);
}

/// `w[:, end..] −= err · u[columns, end..]`.
pub(super) fn trailing_update(
    w: &mut CpuMatrix,
    err: &CpuMatrix,
    u: &CpuMatrix,
    columns: Range<usize>,
) -> Result<()> {
    const OPERATION: &str = "trailing_update";
    let (cols, width, end) = (w.cols, columns.len(), columns.end);
    u.expect_shape(OPERATION, cols, cols)?;
    err.expect_shape(OPERATION, w.rows, width)?;
    if end > cols {
        return Err(shape_error(OPERATION, format!("columns {columns:?} of {cols}")));
    }
    if end == cols || width == 0 {
        return Ok(());
    }
    let (err, u) = (err.f32s(OPERATION)?, u.f32s(OPERATION)?);
    let right = cols - end;
    let u = View { data: &u[columns.start * cols + end..], rows: width, cols: right, stride: cols };
    let w = w.f32s_mut(OPERATION)?;
    w.par_chunks_mut(strip_len(UPDATE_STRIP, cols))
        .zip(err.par_chunks(strip_len(UPDATE_STRIP, width)))
        .for_each(|(w, err)| {
            let rows = err.len() / width;
            let w = ViewMut { data: &mut w[end..], rows, cols: right, stride: cols };
            linalg::matmul_nn(w, Into::Add, View::dense(err, rows, width), u, -1.0);
        });
    Ok(())
}
