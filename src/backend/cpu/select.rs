//! Which weights become zero: exact counts, no sorting.
//!
//! A score is never negative, so its f32 bits order like the number; ties go to the lower index.
//! Within a row the (score, column) pairs are partially ordered; over a whole matrix the threshold
//! is found digit by digit from histograms, which needs no memory per weight and does not depend on
//! how the rows are cut into strips.

use rayon::prelude::*;

use super::CpuMatrix;
use super::matrix::{STRIP, shape_error, strip_len};
use crate::backend::{Result, Selection};

/// The order of a score: its bits without the sign, so that NaN counts as the highest.
pub(super) fn order(score: f32) -> u32 {
    score.to_bits() & 0x7FFF_FFFF
}

/// Zeroes the weights with the lowest `|w| · scale[column]`.
pub(super) fn zero_lowest(
    w: &mut CpuMatrix,
    scale: Option<&CpuMatrix>,
    selection: Selection,
) -> Result<()> {
    const OPERATION: &str = "zero_lowest";
    let cols = w.cols;
    let scale = match scale {
        Some(scale) => {
            scale.expect_shape(OPERATION, 1, cols)?;
            scale.f32s(OPERATION)?.to_vec()
        }
        None => vec![1.0; cols],
    };
    let w = w.f32s_mut(OPERATION)?;
    let score = |w: f32, col: usize| order(w.abs() * scale[col]);
    match selection {
        Selection::Tensor { zeros } => {
            Lowest::find(w, cols, zeros, score).zero(w, cols, score);
        }
        Selection::Row { zeros } => zero_groups(w, cols, zeros, cols, score),
        Selection::Group { zeros, m } => {
            if m == 0 || !cols.is_multiple_of(m) {
                return Err(shape_error(OPERATION, format!("groups of {m} in {cols} columns")));
            }
            zero_groups(w, cols, zeros, m, score);
        }
    }
    Ok(())
}

fn zero_groups(
    w: &mut [f32],
    cols: usize,
    zeros: usize,
    m: usize,
    score: impl Fn(f32, usize) -> u32 + Sync,
) {
    w.par_chunks_mut(strip_len(STRIP, cols)).for_each_init(Vec::new, |keys, strip| {
        for row in strip.chunks_exact_mut(cols) {
            for (group, weights) in row.chunks_exact_mut(m).enumerate() {
                keys.clear();
                keys.extend(weights.iter().enumerate().map(|(i, w)| score(*w, group * m + i)));
                lowest_of(keys, zeros, |i| weights[i] = 0.0);
            }
        }
    });
}

/// Calls `chosen` with the indices of the `count` lowest scores.
pub(super) fn lowest_of(scores: &[u32], count: usize, mut chosen: impl FnMut(usize)) {
    if count == 0 {
        return;
    }
    if count >= scores.len() {
        (0..scores.len()).for_each(chosen);
        return;
    }
    // Groups of n:m patterns are ranked without branches; an equal score counts as lower if it
    // stands before.
    if scores.len() <= 16 {
        for (i, score) in scores.iter().enumerate() {
            let before = scores[..i].iter().filter(|other| *other <= score).count();
            let after = scores[i + 1..].iter().filter(|other| *other < score).count();
            if before + after < count {
                chosen(i);
            }
        }
        return;
    }
    let key = |(i, score): (usize, &u32)| u64::from(*score) << 32 | i as u64;
    let mut keys: Vec<u64> = scores.iter().enumerate().map(key).collect();
    keys.select_nth_unstable(count - 1);
    keys[..count].iter().for_each(|key| chosen(*key as u32 as usize));
}

/// The lowest weights of a matrix: everything below a threshold, and the first of those at it.
pub(super) struct Lowest {
    threshold: u32,
    /// Per row, how many of the weights at the threshold belong to the lowest.
    ties: Vec<usize>,
}

impl Lowest {
    /// Finds the `count` lowest of a row-major matrix by `score(weight, column)`.
    pub(super) fn find(
        w: &[f32],
        cols: usize,
        count: usize,
        score: impl Fn(f32, usize) -> u32 + Sync,
    ) -> Self {
        let rows = w.len() / cols.max(1);
        if count == 0 || count >= w.len() {
            // Scores have no sign bit, so all lie below the highest threshold.
            let threshold = if count == 0 { 0 } else { u32::MAX };
            return Self { threshold, ties: vec![0; rows] };
        }
        let (mut prefix, mut remaining) = (0u32, count as u64);
        for (shift, bits) in [(21, 11), (10, 11), (0, 10)] {
            let above = shift + bits;
            let histogram = histogram(w, cols, bits, |w, col| {
                let score = score(w, col);
                let inside = u64::from(score) >> above == u64::from(prefix) >> above;
                inside.then_some((score >> shift) as usize & ((1 << bits) - 1))
            });
            for (digit, &size) in histogram.iter().enumerate() {
                if remaining <= size {
                    prefix |= (digit as u32) << shift;
                    break;
                }
                remaining -= size;
            }
        }
        let mut ties: Vec<usize> = w
            .par_chunks_exact(cols)
            .map(|row| row.iter().enumerate().filter(|(c, w)| score(**w, *c) == prefix).count())
            .collect();
        let mut remaining = remaining as usize;
        for ties in &mut ties {
            *ties = remaining.min(*ties);
            remaining -= *ties;
        }
        Self { threshold: prefix, ties }
    }

    /// Zeroes the lowest weights.
    fn zero(&self, w: &mut [f32], cols: usize, score: impl Fn(f32, usize) -> u32 + Sync) {
        w.par_chunks_exact_mut(cols.max(1)).zip(&self.ties).for_each(|(row, ties)| {
            let mut picker = self.picker(*ties);
            for (col, w) in row.iter_mut().enumerate() {
                if picker(score(*w, col)) {
                    *w = 0.0;
                }
            }
        });
    }

    /// Marks the lowest weights.
    pub(super) fn mark(
        &self,
        w: &[f32],
        marks: &mut [bool],
        cols: usize,
        score: impl Fn(f32, usize) -> u32 + Sync,
    ) {
        let rows = w.par_chunks_exact(cols.max(1)).zip(marks.par_chunks_exact_mut(cols.max(1)));
        rows.zip(&self.ties).for_each(|((row, marks), ties)| {
            let mut picker = self.picker(*ties);
            for (col, (w, mark)) in row.iter().zip(marks).enumerate() {
                *mark = picker(score(*w, col));
            }
        });
    }

    /// Tells for the scores of one row, in order, which are among the lowest.
    fn picker(&self, mut ties: usize) -> impl FnMut(u32) -> bool {
        let threshold = self.threshold;
        move |score| {
            let tie = score == threshold && ties > 0;
            ties -= usize::from(tie);
            tie || score < threshold
        }
    }
}

/// How many weights fall in each bin.
fn histogram(
    w: &[f32],
    cols: usize,
    bits: u32,
    bin: impl Fn(f32, usize) -> Option<usize> + Sync,
) -> Vec<u64> {
    let empty = || vec![0u64; 1 << bits];
    w.par_chunks(strip_len(STRIP * 4, cols))
        .fold(empty, |mut counts, strip| {
            for row in strip.chunks_exact(cols) {
                for (col, w) in row.iter().enumerate() {
                    if let Some(bin) = bin(*w, col) {
                        counts[bin] += 1;
                    }
                }
            }
            counts
        })
        .reduce(empty, |mut a, b| {
            a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
            a
        })
}
