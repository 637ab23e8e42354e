//! Rounds the columns of a strip of rows to a [`Grid`], each row in a lane of its own.
//!
//! Weights are given as columns, one after the other, each with the strip's rows. The arithmetic of a
//! value is that of decoding it from its stored code, operation by operation, so that what a sweep goes
//! on with is what a reader of the file will see.
#![allow(clippy::inline_always, reason = "parts of a vectorised body")]

use half::f16;
use rayon::prelude::*;
use sparsepack_formats::{
    DType,
    encoding::{
        IntGrid, f8,
        ggml::{BlockGrid, BlockScales, MAX_GROUPS},
    },
};

use super::{
    CpuMatrix,
    matrix::{shape_error, strip_len},
    scales::{self, Group, limited, nearest},
    simd::{self, vectorised},
    sweep::{SWEEP_STRIP, transposed},
};
use crate::backend::{
    Result,
    grid::{F8_MAX, Grid, Rounding, RoundingStrip, ScaleSearch, StripScales, int_range, int_reach},
};

/// Rounds columns and keeps their codes and scales.
pub(super) struct Rounder<'a> {
    strip: RoundingStrip<'a>,
    rows: usize,
    /// Scale, zero point and minimum of each row in the group that `loaded` names.
    scale: Vec<f32>,
    zero_point: Vec<f32>,
    min: Vec<f32>,
    loaded: Option<usize>,
    /// What searches for scales try.
    candidates: Vec<f32>,
}

impl<'a> Rounder<'a> {
    pub(super) fn new(strip: RoundingStrip<'a>) -> Self {
        let rows = strip.codes.len() / strip.cols.max(1);
        let zeros = || vec![0.0; rows];
        // Nothing is searched where scales are fixed.
        let candidates = if strip.fixed { Vec::new() } else { strip.grid.candidates() };
        let (scale, zero_point, min) = (zeros(), zeros(), zeros());
        Self { strip, rows, scale, zero_point, min, loaded: None, candidates }
    }

    /// Columns from `at` on whose weights must be known to choose scales there; `None` where none are
    /// chosen.
    #[inline(always)]
    pub(super) fn chooses(&self, at: usize) -> Option<usize> {
        let (span, group) =
            (self.strip.grid.span(self.strip.cols), self.strip.grid.group(self.strip.cols));
        match () {
            () if self.strip.fixed || !at.is_multiple_of(group) => None,
            () if at.is_multiple_of(span) => Some(span),
            () => Some(group),
        }
    }

    /// Whether scales are chosen for the weights as pruning will leave them.
    #[inline(always)]
    pub(super) fn foresees_pruning(&self) -> bool {
        self.strip.grid.foresees_pruning()
    }

    /// Chooses the scales of what starts at column `at`: of a whole span, or of a later group of a
    /// block, under the block's scales. `values` are the weights of as many columns as
    /// [`chooses`](Self::chooses) says, zero where they will be pruned; `h` is what errors cost.
    #[inline(always)]
    pub(super) fn choose(&mut self, at: usize, values: &[f32], h: &[f32]) {
        let span = self.strip.grid.span(self.strip.cols);
        let group = Group { values, h, rows: self.rows };
        let (nth, spans) = (at / span, self.strip.cols / span);
        self.loaded = None;
        let candidates = &self.candidates;
        match (self.strip.grid, &mut self.strip.scales) {
            (Grid::Int { grid, search }, StripScales::Groups { scales, zero_points }) => {
                let (found, points) = int_scales(group, grid, search, candidates);
                for (lane, (scale, point)) in found.iter().zip(&points).enumerate() {
                    scales[lane * spans + nth] = *scale;
                    zero_points[lane * spans + nth] = *point as i8;
                }
            }
            (Grid::F8E4m3 { scale: dtype }, StripScales::Groups { scales, .. }) => {
                for (lane, extreme) in group.extremes().iter().enumerate() {
                    scales[lane * spans + nth] = stored(dtype, extreme.abs() / F8_MAX);
                }
            }
            (Grid::Block { grid, search, .. }, StripScales::Blocks(blocks)) => {
                let first = at % span / grid.group_len;
                if first == 0 {
                    let lanes = blocks.iter_mut().skip(nth).step_by(spans);
                    lanes
                        .zip(block_scales(group, grid, search, candidates))
                        .for_each(|(block, found)| *block = found);
                }
                if grid.scales.is_some() {
                    let mut lanes: Vec<BlockScales> =
                        blocks.iter().skip(nth).step_by(spans).copied().collect();
                    let group = group.part(0, grid.group_len);
                    refine(group, grid, first, candidates, &mut lanes);
                    let blocks = blocks.iter_mut().skip(nth).step_by(spans);
                    blocks.zip(lanes).for_each(|(block, lane)| *block = lane);
                }
            }
            // `Rounding::new` pairs grids and scales.
            _ => {}
        }
    }

    /// The scales of column `column` of the matrix, if they are not there yet.
    #[inline(always)]
    fn load(&mut self, column: usize) {
        let (cols, grid) = (self.strip.cols, self.strip.grid);
        let (span, group) = (grid.span(cols), grid.group(cols));
        if self.loaded == Some(column / group) {
            return;
        }
        self.loaded = Some(column / group);
        let (nth, spans) = (column / span, cols / span);
        match &self.strip.scales {
            StripScales::Groups { scales, zero_points } => {
                for lane in 0..self.rows {
                    self.scale[lane] = scales[lane * spans + nth];
                    self.zero_point[lane] = f32::from(zero_points[lane * spans + nth]);
                }
            }
            StripScales::Blocks(blocks) => {
                let within = column % span / group;
                for (lane, block) in blocks.iter().skip(nth).step_by(spans).enumerate() {
                    (self.scale[lane], self.min[lane]) = block.group(within);
                }
            }
        }
    }

    /// Rounds the weights `w` of the column at position `at`, or zero where `zero` says so, into
    /// `rounded`.
    #[inline(always)]
    pub(super) fn round(&mut self, at: usize, w: &[f32], zero: &[bool], rounded: &mut [f32]) {
        let column = self.strip.order.map_or(at, |order| order[at]);
        self.load(column);
        let (low, high, dtype) = match self.strip.grid {
            Grid::Int { grid, .. } => {
                let (low, high) = int_range(grid);
                (low, high, grid.scale)
            }
            Grid::Block { grid, .. } => (f32::from(grid.low), f32::from(grid.high), DType::F32),
            Grid::F8E4m3 { scale } => return self.round_f8(column, scale, w, zero, rounded),
        };
        let parameters = self.scale.iter().zip(&self.zero_point).zip(&self.min);
        let codes = self.strip.codes[column..].iter_mut().step_by(self.strip.cols);
        let mut found = [0.0f32; SWEEP_STRIP];
        let lanes = w.iter().zip(zero).zip(&mut *rounded).zip(&mut found).zip(parameters);
        for ((((w, zero), rounded), code), ((scale, point), min)) in lanes {
            let target = if *zero { 0.0 } else { *w };
            let divisor = if *scale == 0.0 { f32::INFINITY } else { *scale };
            let level = nearest(limited((target + min) / divisor, low - point, high - point));
            *code = level + point;
            *rounded = scale * level - min;
        }
        round_to_type(dtype, rounded);
        codes.zip(&found).for_each(|(to, code)| *to = *code as i8);
    }

    #[inline(always)]
    fn round_f8(
        &mut self,
        column: usize,
        dtype: DType,
        w: &[f32],
        zero: &[bool],
        rounded: &mut [f32],
    ) {
        let codes = self.strip.codes[column..].iter_mut().step_by(self.strip.cols);
        let lanes = w.iter().zip(zero).zip(&mut *rounded).zip(codes).zip(&self.scale);
        for ((((w, zero), rounded), code), scale) in lanes {
            let target = if *zero || *scale == 0.0 { 0.0 } else { *w / scale };
            let bits = f8::round(limited(target, -F8_MAX, F8_MAX));
            *code = bits as i8;
            *rounded = scale * f8::to_f32(bits);
        }
        round_to_type(dtype, rounded);
    }
}

/// Rounds values to what a type holds.
#[inline(always)]
fn round_to_type(dtype: DType, values: &mut [f32]) {
    match dtype {
        DType::Bf16 => values.iter_mut().for_each(|value| *value = simd::round(*value).to_f32()),
        DType::F16 => values.iter_mut().for_each(|value| *value = f16::from_f32(*value).to_f32()),
        _ => {}
    }
}

/// A scale as its type holds it.
fn stored(dtype: DType, scale: f32) -> f32 {
    let mut scale = [scale];
    round_to_type(dtype, &mut scale);
    scale[0]
}

/// Scales and zero points of a group of integers.
#[inline(always)]
fn int_scales(
    group: Group<'_>,
    grid: IntGrid,
    search: ScaleSearch,
    candidates: &[f32],
) -> (Vec<f32>, Vec<f32>) {
    let ((low, high), reach) = (int_range(grid), int_reach(grid));
    let store = |scale: &f32| stored(grid.scale, *scale);
    if grid.symmetric {
        let scales = match search {
            ScaleSearch::Minmax => {
                group.extremes().iter().map(|extreme| extreme.abs() / reach).collect()
            }
            ScaleSearch::Mse => {
                let extremes = group.extremes();
                let extremes: Vec<f32> = extremes.iter().map(|extreme| extreme.abs()).collect();
                scales::symmetric(group, &extremes, candidates, (low, high))
            }
        };
        return (scales.iter().map(store).collect(), vec![0.0; group.rows]);
    }
    let (least, greatest) = group.range();
    let mut best = vec![f32::INFINITY; group.rows];
    let (mut scales, mut points) = (vec![0.0; group.rows], vec![0.0; group.rows]);
    for shrink in candidates {
        let ends = least.iter().zip(&greatest);
        // The range must hold zero.
        let (tried, point): (Vec<f32>, Vec<f32>) = ends
            .map(|(least, greatest)| {
                let (least, greatest) = (least.min(0.0) * shrink, greatest.max(0.0) * shrink);
                let scale = stored(grid.scale, (greatest - least) / (high - low));
                let divisor = if scale == 0.0 { f32::INFINITY } else { scale };
                (scale, nearest(limited(low - least / divisor, low, high)))
            })
            .unzip();
        // With the zero point inside the minimum, codes start at `low`.
        let min: Vec<f32> = tried.iter().zip(&point).map(|(scale, point)| scale * point).collect();
        let errors = group.error(&tried, &min, low, high);
        for lane in 0..group.rows {
            if errors[lane] < best[lane] {
                (best[lane], scales[lane], points[lane]) = (errors[lane], tried[lane], point[lane]);
            }
        }
    }
    (scales, points)
}

/// Scales and minima of the groups of a block, before they are rounded.
#[inline(always)]
fn search(group: Group<'_>, grid: BlockGrid, candidates: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let (low, high) = (f32::from(grid.low), f32::from(grid.high));
    if grid.mins.is_some() {
        return scales::affine(group, candidates, high);
    }
    let scales = scales::symmetric(group, &group.extremes(), candidates, (low, high));
    (scales, vec![0.0; group.rows])
}

/// The scale of each row that ggml takes: of the value of the largest magnitude it makes the least code,
/// of one byte the greatest.
#[inline(always)]
fn reaching(block: Group<'_>, grid: BlockGrid) -> Vec<f32> {
    let scale = |extreme: &f32| match grid.high {
        i8::MAX => extreme.abs() / f32::from(i8::MAX),
        _ => extreme / f32::from(grid.low),
    };
    block.extremes().iter().map(scale).collect()
}

/// A scale for the scales of each row of a block, and these rounded under it. One beyond binary16 is
/// infinite, which encoding refuses.
#[inline(always)]
fn block_scales(
    block: Group<'_>,
    grid: BlockGrid,
    how: ScaleSearch,
    candidates: &[f32],
) -> Vec<BlockScales> {
    let groups: Vec<(Vec<f32>, Vec<f32>)> = match (how, grid.scales) {
        (ScaleSearch::Minmax, None) => vec![(reaching(block, grid), Vec::new())],
        _ => (0..grid.groups())
            .map(|g| search(block.part(g * grid.group_len, grid.group_len), grid, candidates))
            .collect(),
    };
    let row = |lane: usize| {
        let Some((low, high)) = grid.scales else {
            let d = f16::from_f32(groups[0].0[lane]);
            return BlockScales { d, scales: [1; MAX_GROUPS], ..BlockScales::default() };
        };
        let mut largest = (0.0f32, 0.0f32);
        for (scales, mins) in &groups {
            largest.0 = if scales[lane].abs() > largest.0.abs() { scales[lane] } else { largest.0 };
            largest.1 = if mins[lane] > largest.1 { mins[lane] } else { largest.1 };
        }
        // Signed scales reach one further below zero than above.
        let reach = if low < 0 { f32::from(low) } else { f32::from(high) };
        let (d, dmin) = (
            f16::from_f32(largest.0 / reach),
            match grid.mins {
                Some(top) => f16::from_f32(largest.1 / f32::from(top)),
                None => f16::ZERO,
            },
        );
        let mut found = BlockScales { d, dmin, ..BlockScales::default() };
        for (g, (scales, mins)) in groups.iter().enumerate() {
            found.scales[g] = integer(scales[lane], d, low, high);
            found.mins[g] = integer(mins[lane], dmin, 0, grid.mins.unwrap_or(0));
        }
        found
    };
    (0..block.rows).map(row).collect()
}

/// Chooses the integer scale and minimum of group `g` of each row again, for its weights as they are
/// now, under the block's scales.
#[inline(always)]
fn refine(
    group: Group<'_>,
    grid: BlockGrid,
    g: usize,
    candidates: &[f32],
    lanes: &mut [BlockScales],
) {
    let Some((least, greatest)) = grid.scales else { return };
    let top = grid.mins.unwrap_or(0);
    let (scales, mins) = search(group, grid, candidates);
    for (lane, block) in lanes.iter_mut().enumerate() {
        block.scales[g] = integer(scales[lane], block.d, least, greatest);
        block.mins[g] = integer(mins[lane], block.dmin, 0, top);
    }
    let start: Vec<(i8, i8)> = lanes.iter().map(|block| (block.scales[g], block.mins[g])).collect();
    let mut best = vec![f32::INFINITY; lanes.len()];
    let mut tried = lanes.to_vec();
    let min_steps: &[i8] = if grid.mins.is_some() { &[0, -1, 1] } else { &[0] };
    for scale_step in [0i8, -1, 1] {
        for min_step in min_steps {
            for (block, (scale, min)) in tried.iter_mut().zip(&start) {
                block.scales[g] = scale.saturating_add(scale_step).clamp(least, greatest);
                block.mins[g] = min.saturating_add(*min_step).clamp(0, top);
            }
            let (scale, min): (Vec<f32>, Vec<f32>) =
                tried.iter().map(|block| block.group(g)).unzip();
            let errors = group.error(&scale, &min, f32::from(grid.low), f32::from(grid.high));
            for (lane, error) in errors.iter().enumerate() {
                if *error < best[lane] {
                    best[lane] = *error;
                    lanes[lane] = tried[lane];
                }
            }
        }
    }
}

/// A scale or minimum as an integer under `d`.
fn integer(value: f32, d: f16, low: i8, high: i8) -> i8 {
    let d = d.to_f32();
    let whole = if d == 0.0 { 0.0 } else { nearest(limited(value / d, -256.0, 256.0)) };
    whole.clamp(f32::from(low), f32::from(high)) as i8
}

/// Chooses the scales of every group of `w`.
pub(super) fn choose_scales(
    w: &CpuMatrix,
    importance: Option<&[f32]>,
    rounding: &mut Rounding,
) -> Result<()> {
    const OPERATION: &str = "choose_scales";
    let cols = w.cols;
    rounding.outline().expect_shape(OPERATION, w.rows, cols)?;
    let h = match importance {
        Some(h) if h.len() != cols => {
            return Err(shape_error(OPERATION, format!("{} weights of {cols} columns", h.len())));
        }
        Some(h) => h.to_vec(),
        None => vec![1.0; cols],
    };
    let w = w.f32s(OPERATION)?;
    rounding
        .strips(SWEEP_STRIP)
        .into_par_iter()
        .zip(w.par_chunks(strip_len(SWEEP_STRIP, cols)))
        .for_each(|(strip, w)| choose_strip(Rounder::new(strip), &transposed(w, cols), &h));
    Ok(())
}

vectorised! {
    /// Chooses the scales of every group of a strip, given column by column.
    fn choose_strip<'a>(rounder: Rounder<'a>, w: &'a [f32], h: &'a [f32]) {
        let mut rounder = rounder;
        let rows = rounder.rows;
        for at in 0..h.len() {
            if let Some(count) = rounder.chooses(at) {
                rounder.choose(at, &w[at * rows..][..count * rows], &h[at..][..count]);
            }
        }
    }
}

/// Rounds every weight of `w` to the nearest value under the scales there are.
pub(super) fn round(w: &mut CpuMatrix, rounding: &mut Rounding) -> Result<()> {
    const OPERATION: &str = "round";
    let cols = w.cols;
    rounding.outline().expect_shape(OPERATION, w.rows, cols)?;
    let w = w.f32s_mut(OPERATION)?;
    rounding
        .strips(SWEEP_STRIP)
        .into_par_iter()
        .zip(w.par_chunks_mut(strip_len(SWEEP_STRIP, cols)))
        .for_each(|(strip, w)| {
            let columns = transposed(w, cols);
            let mut rounded = vec![0.0; columns.len()];
            round_strip(Rounder::new(strip), &columns, &mut rounded);
            let rows = w.len() / cols;
            for (lane, w) in w.chunks_exact_mut(cols).enumerate() {
                for (j, w) in w.iter_mut().enumerate() {
                    *w = rounded[j * rows + lane];
                }
            }
        });
    Ok(())
}

vectorised! {
    /// Rounds a strip, given column by column.
    fn round_strip<'a>(rounder: Rounder<'a>, w: &'a [f32], rounded: &'a mut [f32]) {
        let mut rounder = rounder;
        let rows = rounder.rows;
        let zero = [false; SWEEP_STRIP];
        let columns = w.chunks_exact(rows).zip(rounded.chunks_exact_mut(rows));
        for (at, (w, rounded)) in columns.enumerate() {
            rounder.round(at, w, &zero, rounded);
        }
    }
}
