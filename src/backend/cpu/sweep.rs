//! One column block of SparseGPT's Algorithm 1 and the lazy update after it.
//!
//! Rows are independent once the weights to zero are known, so a thread takes a strip of rows and
//! keeps their part of the column block in its cache.

use std::ops::Range;

use rayon::prelude::*;

use super::CpuMatrix;
use super::linalg::{self, Into, View, ViewMut};
use super::matrix::{shape_error, strip_len};
use super::rounding::Rounder;
use super::select::{self, Lowest};
use super::simd::vectorised;
use crate::backend::{Result, Rounding, SweepRule, solve_ops};

/// Rows of a strip: their part of a column block of 128 columns is 32 KiB.
pub(super) const SWEEP_STRIP: usize = 64;
/// Rows of a strip of the lazy update.
const UPDATE_STRIP: usize = 256;

/// `u` inside a column block, `[width, width]`.
struct Block {
    u: Vec<f32>,
    diagonal: Vec<f32>,
    /// What an error in each column costs: `1 / u_jj²`.
    cost: Vec<f32>,
    first: usize,
    width: usize,
}

impl Block {
    /// From the factor's part `[width, width]` in the columns from `first` on.
    fn new(u: Vec<f32>, first: usize, width: usize) -> Self {
        let diagonal: Vec<f32> = u.iter().step_by(width + 1).copied().collect();
        let cost = diagonal.iter().map(|u| 1.0 / (u * u)).collect();
        Self { u, diagonal, cost, first, width }
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

/// Zeroes and rounds weights of a column block and moves their errors to the right inside the block.
pub(super) fn obs_sweep(
    w: &mut CpuMatrix,
    u: &CpuMatrix,
    columns: Range<usize>,
    rule: SweepRule<'_, CpuMatrix>,
    rounding: Option<&mut Rounding>,
) -> Result<CpuMatrix> {
    const OPERATION: &str = "obs_sweep";
    let (rows, cols, width) = (w.rows, w.cols, columns.len());
    u.expect_shape(OPERATION, cols, cols)?;
    solve_ops::check_sweep(
        (rows, cols),
        &columns,
        rule,
        rounding.as_deref().map(Rounding::outline),
    )?;
    let marked = match rule {
        SweepRule::ZerosOf(pruned) => {
            pruned.expect_shape(OPERATION, rows, cols)?;
            Some(CpuMatrix::from_f32(rows, width, part(pruned.f32s(OPERATION)?, cols, &columns)))
        }
        _ => None,
    };
    let rule = rule.with_zeros_of(marked.as_ref());
    let within = &u.f32s(OPERATION)?[columns.start * cols..columns.end * cols];
    let within = part(within, cols, &columns);
    let w = w.f32s_mut(OPERATION)?;
    let mut swept = part(w, cols, &columns);
    let errors = sweep_block(&mut swept, within, columns.clone(), rule, rounding)?;
    if width > 0 {
        w.par_chunks_exact_mut(cols).zip(swept.par_chunks_exact(width)).for_each(|(w, swept)| {
            w[columns.clone()].copy_from_slice(swept);
        });
    }
    Ok(CpuMatrix::from_f32(rows, width, errors))
}

/// Some columns of a matrix.
fn part(values: &[f32], cols: usize, columns: &Range<usize>) -> Vec<f32> {
    let mut part = vec![0.0; values.len() / cols.max(1) * columns.len()];
    if !part.is_empty() {
        let rows = part.par_chunks_exact_mut(columns.len()).zip(values.par_chunks_exact(cols));
        rows.for_each(|(to, from)| to.copy_from_slice(&from[columns.clone()]));
    }
    part
}

/// Sweeps columns `columns` of a matrix, all checked, given alone: `work: [rows, width]`, which become the new
/// weights, and the factor's part `u: [width, width]`. Zeros to copy are given for these columns alone as
/// well. Returns the errors, `[rows, width]`.
fn sweep_block(
    work: &mut [f32],
    u: Vec<f32>,
    columns: Range<usize>,
    rule: SweepRule<'_, CpuMatrix>,
    rounding: Option<&mut Rounding>,
) -> Result<Vec<f32>> {
    let width = columns.len();
    let mut all_errors = vec![0.0; work.len()];
    if width == 0 {
        return Ok(all_errors);
    }
    let block = Block::new(u, columns.start, width);
    let mut zero = vec![false; work.len()];
    match rule {
        SweepRule::Lowest { zeros } => {
            let lowest = Lowest::find(work, width, zeros, |w, j| block.score(w, j));
            lowest.mark(work, &mut zero, width, |w, j| block.score(w, j));
        }
        SweepRule::ZerosOf(pruned) => {
            let pruned = pruned.f32s("obs_sweep")?;
            zero.iter_mut().zip(pruned).for_each(|(zero, w)| *zero = *w == 0.0);
        }
        SweepRule::Group { .. } | SweepRule::Nothing => {}
    }
    let strip = strip_len(SWEEP_STRIP, width);
    let rounders: Vec<Option<Rounder<'_>>> = match rounding {
        Some(rounding) => rounding
            .strips(SWEEP_STRIP)
            .into_iter()
            .map(|strip| Some(Rounder::new(strip)))
            .collect(),
        None => (0..work.len().div_ceil(strip)).map(|_| None).collect(),
    };
    work.par_chunks_mut(strip)
        .zip(zero.par_chunks(strip))
        .zip(all_errors.par_chunks_mut(strip))
        .zip(rounders)
        .for_each(|(((work, zero), all_errors), rounder)| {
            let mut swept = transposed(work, width);
            let mut zero = transposed(zero, width);
            let mut errors = vec![0.0; swept.len()];
            sweep_strip(&block, rule.group(), rounder, &mut swept, &mut errors, &mut zero);
            let rows = work.len() / width;
            let lanes = work.chunks_exact_mut(width).zip(all_errors.chunks_exact_mut(width));
            for (lane, (work, err)) in lanes.enumerate() {
                for (j, (w, err)) in work.iter_mut().zip(err).enumerate() {
                    (*err, *w) = (errors[j * rows + lane], swept[j * rows + lane]);
                }
            }
        });
    Ok(all_errors)
}

/// The transpose of some rows of `width` columns.
pub(super) fn transposed<T: Copy>(rows: &[T], width: usize) -> Vec<T> {
    (0..width).flat_map(|j| rows.iter().skip(j).step_by(width)).copied().collect()
}

vectorised! {
    /// Sweeps a strip of rows of a column block, given column by column: marks in `zero` what a rule
    /// chooses group by group (so many zeros of so many columns), and leaves in `work` the new weights
    /// and in `errors` their scaled errors.
    fn sweep_strip<'a>(
        block: &'a Block,
        groups: Option<(usize, usize)>,
        rounder: Option<Rounder<'a>>,
        work: &'a mut [f32],
        errors: &'a mut [f32],
        zero: &'a mut [bool],
    ) {
        // Loops over the rows of a column; their number is not a constant, or the compiler would
        // unroll them and vectorise the loop over columns with gathers.
        let rows = work.len() / block.width;
        let mut rounder = rounder;
        let mut rounded = vec![0.0; rows];
        let mut ranking = Ranking::new(rows);
        for j in 0..block.width {
            let (work, zero) = (&mut work[j * rows..], &mut zero[j * rows..]);
            if let Some((zeros, m)) = groups
                && j % m == 0
            {
                ranking.choose(block, &work[..m * rows], j, zeros as u32, &mut zero[..m * rows]);
            }
            if let Some(rounder) = &mut rounder
                && let Some(count) = rounder.chooses(block.first + j)
            {
                let costs = &block.cost[j..][..count];
                if rounder.foresees_pruning() {
                    let expected = expected(block, groups, &mut ranking, (work, zero), j, count);
                    rounder.choose(block.first + j, &expected, costs);
                } else {
                    rounder.choose(block.first + j, &work[..count * rows], costs);
                }
            }
            let (column, right) = work.split_at_mut(rows);
            let err = &mut errors[j * rows..][..rows];
            let diagonal = block.diagonal[j];
            match &mut rounder {
                Some(rounder) => rounder.round(block.first + j, column, &zero[..rows], &mut rounded),
                None => {
                    for ((rounded, w), zero) in rounded.iter_mut().zip(&*column).zip(&*zero) {
                        *rounded = if *zero { 0.0 } else { *w };
                    }
                }
            }
            for ((err, w), rounded) in err.iter_mut().zip(column).zip(&rounded) {
                *err = (*w - rounded) / diagonal;
                *w = *rounded;
            }
            for (column, u) in right.chunks_exact_mut(rows).zip(block.right_of(j)) {
                for (w, err) in column.iter_mut().zip(&*err) {
                    *w -= err * u;
                }
            }
        }
    }
}

/// The next `count` columns as scales will have to hold them: pruned as the rule says, and with the
/// errors of that moved on, which are large beside those of rounding.
#[allow(clippy::inline_always, reason = "part of a vectorised body")]
#[inline(always)]
fn expected(
    block: &Block,
    groups: Option<(usize, usize)>,
    ranking: &mut Ranking,
    (work, zero): (&[f32], &[bool]),
    first: usize,
    count: usize,
) -> Vec<f32> {
    let rows = ranking.lower.len();
    let mut w = work[..count * rows].to_vec();
    let mut marks = zero[..count * rows].to_vec();
    let mut err = vec![0.0; rows];
    for j in 0..count {
        if let Some((zeros, m)) = groups
            && j > 0
            && j % m == 0
        {
            let group = j * rows..(j + m) * rows;
            ranking.choose(block, &w[group.clone()], first + j, zeros as u32, &mut marks[group]);
        }
        let (column, right) = w[j * rows..].split_at_mut(rows);
        let diagonal = block.diagonal[first + j];
        for ((err, w), zero) in err.iter_mut().zip(column).zip(&marks[j * rows..]) {
            *err = if *zero { *w / diagonal } else { 0.0 };
            *w = if *zero { 0.0 } else { *w };
        }
        for (column, u) in right.chunks_exact_mut(rows).zip(block.right_of(first + j)) {
            for (w, err) in column.iter_mut().zip(&err) {
                *w -= err * u;
            }
        }
    }
    w
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
