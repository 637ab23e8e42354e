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

/// Rows of a strip: their part of a column block of 128 columns is 32 KiB.
const SWEEP_STRIP: usize = 64;
/// Rows of a strip of the lazy update.
const UPDATE_STRIP: usize = 256;

/// `u` inside a column block, `[width, width]`.
struct Block {
    u: Vec<f32>,
    diagonal: Vec<f32>,
    width: usize,
}

impl Block {
    fn new(u: &[f32], cols: usize, columns: Range<usize>) -> Self {
        let width = columns.len();
        let rows = columns.clone().map(|j| &u[j * cols..][columns.clone()]);
        Self {
            u: rows.flatten().copied().collect(),
            diagonal: columns.clone().map(|j| u[j * cols + j]).collect(),
            width,
        }
    }

    /// Row `j` right of the diagonal.
    fn right_of(&self, j: usize) -> &[f32] {
        &self.u[j * self.width..][j + 1..self.width]
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
        .zip(zero.par_chunks(strip))
        .zip(w.par_chunks_mut(strip_len(SWEEP_STRIP, cols)))
        .for_each(|((work, zero), w)| {
            let mut swept = transposed(work, width);
            let mut zero = transposed(zero, width);
            sweep_strip(&block, rule, &mut swept, &mut zero);
            let rows = work.len() / width;
            let lanes = work.chunks_exact_mut(width).zip(w.chunks_exact_mut(cols)).enumerate();
            for (lane, (work, w)) in lanes {
                for (j, (err, w)) in work.iter_mut().zip(&mut w[columns.clone()]).enumerate() {
                    // What was swept is an error where a weight was zeroed, else the weight.
                    let value = swept[j * rows + lane];
                    (*err, *w) = if zero[j * rows + lane] { (value, 0.0) } else { (0.0, value) };
                }
            }
        });
    Ok(CpuMatrix::from_f32(rows, width, work))
}

/// The transpose of some rows of `width` columns.
fn transposed<T: Copy>(rows: &[T], width: usize) -> Vec<T> {
    (0..width).flat_map(|j| rows.iter().skip(j).step_by(width)).copied().collect()
}

vectorised! {
    /// Sweeps a strip of rows of a column block, given column by column: marks in `zero` what a rule
    /// chooses group by group, and leaves in `work` the scaled error of each weight that is zeroed,
    /// the new value of the others.
    fn sweep_strip<'a>(
        block: &'a Block,
        rule: SweepRule,
        work: &'a mut [f32],
        zero: &'a mut [bool],
    ) {
        // Loops over the rows of a column; their number is not a constant, or the compiler would
        // unroll them and vectorise the loop over columns with gathers.
        let rows = work.len() / block.width;
        let mut err = vec![0.0; rows];
        let mut ranking = Ranking::new(rows);
        for j in 0..block.width {
            let (work, zero) = (&mut work[j * rows..], &mut zero[j * rows..]);
            if let SweepRule::Group { zeros, m } = rule
                && j % m == 0
            {
                let group = ..m * rows;
                ranking.choose(block, &work[group], j, zeros as u32, &mut zero[group]);
            }
            let (column, right) = work.split_at_mut(rows);
            let diagonal = block.diagonal[j];
            for ((err, w), zero) in err.iter_mut().zip(column).zip(&*zero) {
                let scaled = *w / diagonal;
                *err = if *zero { scaled } else { 0.0 };
                *w = if *zero { scaled } else { *w };
            }
            for (column, u) in right.chunks_exact_mut(rows).zip(block.right_of(j)) {
                for (w, err) in column.iter_mut().zip(&err) {
                    *w -= err * u;
                }
            }
        }
    }
}

/// Ranks the weights of groups, for a strip of rows.
struct Ranking {
    scores: Vec<u32>,
    /// For each row, how many of a group's weights have a lower score than one of them.
    lower: Vec<u32>,
}

impl Ranking {
    fn new(rows: usize) -> Self {
        Self { scores: Vec::new(), lower: vec![0; rows] }
    }

    /// Marks the `zeros` lowest scores of each row in the columns of a group, of which `first` is
    /// the first; an equal score counts as lower if it stands before.
    #[allow(clippy::inline_always, reason = "part of a vectorised body")]
    #[inline(always)]
    fn choose(&mut self, block: &Block, w: &[f32], first: usize, zeros: u32, zero: &mut [bool]) {
        let rows = self.lower.len();
        self.scores.clear();
        for (i, w) in w.chunks_exact(rows).enumerate() {
            self.scores.extend(w.iter().map(|w| block.score(*w, first + i)));
        }
        for (i, zero) in zero.chunks_exact_mut(rows).enumerate() {
            self.lower.fill(0);
            let own = &self.scores[i * rows..][..rows];
            for (other, scores) in self.scores.chunks_exact(rows).enumerate() {
                let each = self.lower.iter_mut().zip(own).zip(scores);
                if other < i {
                    each.for_each(|((lower, own), other)| *lower += u32::from(other <= own));
                } else {
                    each.for_each(|((lower, own), other)| *lower += u32::from(other < own));
                }
            }
            zero.iter_mut().zip(&self.lower).for_each(|(zero, lower)| *zero = *lower < zeros);
        }
    }
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
