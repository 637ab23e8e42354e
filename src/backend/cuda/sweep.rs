//! One column block of SparseGPT's Algorithm 1, the lazy update after it, and rounding.
//!
//! A column block is swept in parts of at most 128 columns, each followed by a product that moves its
//! errors onto the rest of the block, which is Algorithm 1 with smaller blocks inside.
//!
//! Scales are chosen on the host, by the code of the CPU backend. Where they are chosen before the sweep
//! (with activation order, or one scale a row), that is all the host does. Where they are chosen when the
//! sweep reaches their group, the column block is swept on the host.

use std::ops::Range;

use sparsepack_formats::DType;

use super::{
    Cuda, CudaMatrix,
    driver::{Arg, Geometry, KernelFile, Memory, Operand, Product},
    matrix::{by_column, shape_error},
    select,
};
use crate::backend::{
    Grid, Result, Rounding, SolveOps, Storage, SweepRule, cpu::CpuMatrix, grid::F8_MAX, solve_ops,
};

const FILE: KernelFile = KernelFile::Sweep;
/// Columns that a launch sweeps at most.
const PART: usize = 128;
/// Warps of a block, each with a row.
const WARPS: usize = 16;

/// Names of grids and types in the kernels.
const LEVELS: u32 = 1;
const FLOAT8: u32 = 2;
const AS_F32: u32 = 0;
const AS_BF16: u32 = 1;
const AS_F16: u32 = 2;

/// Zeroes and rounds weights of a column block and moves their errors to the right inside the block.
pub(super) fn obs_sweep(
    cuda: &Cuda,
    w: &mut CudaMatrix,
    u: &CudaMatrix,
    columns: Range<usize>,
    rule: SweepRule<'_, CudaMatrix>,
    rounding: Option<&mut Rounding>,
) -> Result<CudaMatrix> {
    const OPERATION: &str = "obs_sweep";
    let (rows, cols, width) = (w.rows, w.cols, columns.len());
    u.expect_shape(OPERATION, cols, cols)?;
    solve_ops::check_sweep((rows, cols), &columns, rule, rounding.as_deref())?;
    if let SweepRule::ZerosOf(pruned) = rule {
        pruned.expect_shape(OPERATION, rows, cols)?;
    }
    if rows * width == 0 {
        return cuda.zeros(rows, width);
    }
    match rounding {
        Some(rounding) if rounding.chooses() => on_host(cuda, w, u, columns, rule, rounding),
        rounding => on_device(cuda, w, u, columns, rule, rounding),
    }
}

fn on_device(
    cuda: &Cuda,
    w: &mut CudaMatrix,
    u: &CudaMatrix,
    columns: Range<usize>,
    rule: SweepRule<'_, CudaMatrix>,
    rounding: Option<&mut Rounding>,
) -> Result<CudaMatrix> {
    const OPERATION: &str = "obs_sweep";
    let (rows, cols, width) = (w.rows, w.cols, columns.len());
    let gpu = &cuda.gpu;
    let (w, u) = (w.f32s_mut(OPERATION)?, u.f32s(OPERATION)?);
    let scales = match rounding.as_deref() {
        Some(rounding) => DeviceScales::upload(cuda, rounding)?,
        None => DeviceScales::default(),
    };
    let mut codes = match &rounding {
        Some(_) => Some(gpu.allocate::<i8>(rows * width, OPERATION)?),
        None => None,
    };
    let mut err = gpu.allocate::<f32>(rows * width, OPERATION)?;
    // Groups too wide for a launch are stretches of their own, ranked before their first column.
    let (stretch, zeros, m) = match rule.group() {
        Some((_, m)) if m > PART => (m, 0, 0),
        Some((zeros, m)) => (width, zeros, m),
        None => (width, 0, 0),
    };
    for first in columns.clone().step_by(stretch) {
        let stretch = first..first + stretch;
        let marks = marks(cuda, w, u, (rows, cols), &stretch, rule)?;
        for part in parts(&stretch, m) {
            let at = part.start - columns.start;
            let marks = marks.as_ref().map(|marks| marks.slice(part.start - first..));
            let mut codes = codes.as_mut().map(|codes| codes.slice_mut(at..));
            let mut errors = err.slice_mut(at..);
            let own = [
                (&mut *w).into(),
                (rows as u64).into(),
                (cols as u64).into(),
                (part.start as u64).into(),
                (part.len() as u32).into(),
                u.into(),
                marks.as_ref().map_or_else(|| Arg::optional::<u8>(None), Arg::from),
                (stretch.len() as u64).into(),
                (zeros as u32).into(),
                (m as u32).into(),
                (&mut errors).into(),
                (width as u64).into(),
            ];
            let rest = [
                Arg::optional(scales.order.as_ref()),
                codes.as_mut().map_or_else(|| Arg::optional_mut::<i8>(None), Arg::from),
            ];
            let args = [&own[..], &scales.args(), &rest].concat();
            let geometry = Geometry {
                blocks: [rows.div_ceil(WARPS).min(16 * cuda.processors), 1, 1],
                threads: [(WARPS * 32) as u32, 1],
                shared: 4 * (part.len() * part.len() + PART * WARPS),
            };
            gpu.launch(FILE, OPERATION, geometry, &args)?;
            move_errors(cuda, w, (&err, at, width), u, cols, (part, columns.end))?;
        }
    }
    if let (Some(codes), Some(rounding)) = (codes, rounding) {
        let codes = gpu.download(&codes, rows * width, OPERATION)?;
        rounding.set_codes(&columns, &codes);
    }
    Ok(CudaMatrix::f32(rows, width, err))
}

/// Which weights of some columns become zero before they are swept, if that is known before.
fn marks(
    cuda: &Cuda,
    w: &Memory<f32>,
    u: &Memory<f32>,
    (rows, cols): (usize, usize),
    columns: &Range<usize>,
    rule: SweepRule<'_, CudaMatrix>,
) -> Result<Option<Memory<u8>>> {
    const OPERATION: &str = "mark_zeros";
    let width = columns.len();
    let scores = || scores(cuda, w, u, (rows, cols), columns);
    match rule {
        SweepRule::Group { zeros, m } if m > PART => {
            select::mark_groups(cuda, &scores()?, rows * width, m, zeros).map(Some)
        }
        SweepRule::Nothing | SweepRule::Group { .. } => Ok(None),
        SweepRule::Lowest { zeros } => {
            select::mark_lowest(cuda, &scores()?, (rows, width), zeros).map(Some)
        }
        SweepRule::ZerosOf(pruned) => {
            let mut marks = cuda.gpu.allocate::<u8>(rows * width, OPERATION)?;
            let args = [
                pruned.f32s(OPERATION)?.into(),
                (cols as u64).into(),
                (columns.start as u64).into(),
                (rows as u64).into(),
                (width as u64).into(),
                (&mut marks).into(),
            ];
            let geometry = by_column(rows, width);
            cuda.gpu.launch(KernelFile::Select, OPERATION, geometry, &args)?;
            Ok(Some(marks))
        }
    }
}

/// The parts of some columns that are swept in one launch each, of whole groups of `m`.
fn parts(columns: &Range<usize>, m: usize) -> impl Iterator<Item = Range<usize>> + use<> {
    let len = PART.checked_div(m).map_or(PART, |groups| groups * m);
    let end = columns.end;
    columns.clone().step_by(len).map(move |first| first..end.min(first + len))
}

/// `w[:, part.end..end] −= err[:, at..at + part.len()] · u[part, part.end..end]`, with `err` of `width`
/// columns.
fn move_errors(
    cuda: &Cuda,
    w: &mut Memory<f32>,
    (err, at, width): (&Memory<f32>, usize, usize),
    u: &Memory<f32>,
    cols: usize,
    (part, end): (Range<usize>, usize),
) -> Result<()> {
    if part.end == end || part.is_empty() {
        return Ok(());
    }
    let rows = err.len() / width.max(1);
    let shape = Product { m: rows, n: end - part.end, k: part.len(), alpha: -1.0, beta: 1.0 };
    let errors = Operand { values: err.slice(at..), stride: width, transposed: false };
    let right = u.slice(part.start * cols + part.end..);
    let right = Operand { values: right, stride: cols, transposed: false };
    let mut w = w.slice_mut(part.end..);
    cuda.gpu.multiply("trailing_update", shape, &errors, &right, &mut w, cols)
}

/// What zeroing each weight of some columns costs.
fn scores(
    cuda: &Cuda,
    w: &Memory<f32>,
    u: &Memory<f32>,
    (rows, cols): (usize, usize),
    columns: &Range<usize>,
) -> Result<Memory<u32>> {
    const OPERATION: &str = "scores_sweep";
    let width = columns.len();
    let mut scores = cuda.gpu.allocate::<u32>(rows * width, OPERATION)?;
    let args = [
        w.into(),
        (cols as u64).into(),
        (columns.start as u64).into(),
        u.into(),
        (rows as u64).into(),
        (width as u64).into(),
        (&mut scores).into(),
    ];
    cuda.gpu.launch(KernelFile::Select, OPERATION, by_column(rows, width), &args)?;
    Ok(scores)
}

/// The sweep of a column block whose scales are chosen on the way.
fn on_host(
    cuda: &Cuda,
    w: &mut CudaMatrix,
    u: &CudaMatrix,
    columns: Range<usize>,
    rule: SweepRule<'_, CudaMatrix>,
    rounding: &mut Rounding,
) -> Result<CudaMatrix> {
    const OPERATION: &str = "obs_sweep";
    let (rows, cols, width) = (w.rows, w.cols, columns.len());
    let pruned = match rule {
        SweepRule::ZerosOf(pruned) => {
            let values = download_columns(cuda, pruned.f32s(OPERATION)?, rows, cols, &columns)?;
            Some(cuda.host.upload(&values, rows, width)?)
        }
        _ => None,
    };
    let rule = rule.with_zeros_of::<CpuMatrix>(pruned.as_ref());
    let within = u.f32s(OPERATION)?.slice(columns.start * cols..);
    let within = download_columns(cuda, &within, width, cols, &columns)?;
    let mut work = download_columns(cuda, w.f32s(OPERATION)?, rows, cols, &columns)?;
    let errors = cuda.host.sweep_block(&mut work, within, columns.clone(), rule, Some(rounding))?;
    let swept = cuda.gpu.upload(&work, OPERATION)?;
    let to = w.f32s_mut(OPERATION)?;
    let args = [
        (&swept).into(),
        (rows as u64).into(),
        (width as u64).into(),
        0u64.into(),
        (width as u64).into(),
        to.into(),
        (columns.start as u64).into(),
        (cols as u64).into(),
    ];
    cuda.gpu.launch(KernelFile::Solve, "copy_columns", by_column(rows, width), &args)?;
    Ok(CudaMatrix::f32(rows, width, cuda.gpu.upload(&errors, OPERATION)?))
}

/// Some columns of a matrix, on the host.
fn download_columns<'a>(
    cuda: &Cuda,
    from: impl Into<Arg<'a>>,
    rows: usize,
    cols: usize,
    columns: &Range<usize>,
) -> Result<Vec<f32>> {
    const OPERATION: &str = "copy_columns";
    let width = columns.len();
    let mut part = cuda.gpu.allocate::<f32>(rows * width, OPERATION)?;
    let args = [
        from.into(),
        (rows as u64).into(),
        (cols as u64).into(),
        (columns.start as u64).into(),
        (width as u64).into(),
        (&mut part).into(),
        0u64.into(),
        (width as u64).into(),
    ];
    cuda.gpu.launch(KernelFile::Solve, OPERATION, by_column(rows, width), &args)?;
    cuda.gpu.download(&part, rows * width, OPERATION)
}

/// The lazy update after a column block.
pub(super) fn trailing_update(
    cuda: &Cuda,
    w: &mut CudaMatrix,
    err: &CudaMatrix,
    u: &CudaMatrix,
    columns: Range<usize>,
) -> Result<()> {
    const OPERATION: &str = "trailing_update";
    let (rows, cols, width) = (w.rows, w.cols, columns.len());
    u.expect_shape(OPERATION, cols, cols)?;
    err.expect_shape(OPERATION, rows, width)?;
    if columns.end > cols {
        return Err(shape_error(OPERATION, format!("columns {columns:?} of {cols}")));
    }
    let (err, u) = (err.f32s(OPERATION)?, u.f32s(OPERATION)?);
    move_errors(cuda, w.f32s_mut(OPERATION)?, (err, 0, width), u, cols, (columns, cols))
}

/// Chooses the scales of every group of `w`.
pub(super) fn choose_scales(
    cuda: &Cuda,
    w: &CudaMatrix,
    importance: Option<&[f32]>,
    rounding: &mut Rounding,
) -> Result<()> {
    let values = cuda.host.upload(&cuda.download(w)?, w.rows, w.cols)?;
    cuda.host.scope(|| cuda.host.choose_scales(&values, importance, rounding))
}

/// Rounds every weight to the nearest value.
pub(super) fn round(cuda: &Cuda, w: &mut CudaMatrix, rounding: &mut Rounding) -> Result<()> {
    const OPERATION: &str = "round_weights";
    let (rows, cols) = (w.rows, w.cols);
    rounding.expect_shape(OPERATION, rows, cols)?;
    let scales = DeviceScales::upload(cuda, rounding)?;
    let mut codes = cuda.gpu.allocate::<i8>(rows * cols, OPERATION)?;
    let own = [w.f32s_mut(OPERATION)?.into(), (rows as u64).into(), (cols as u64).into()];
    let args = [&own[..], &scales.args(), &[(&mut codes).into()]].concat();
    cuda.gpu.launch(FILE, OPERATION, by_column(rows, cols), &args)?;
    rounding.codes = cuda.gpu.download(&codes, rows * cols, OPERATION)?;
    Ok(())
}

/// A grid and its scales as kernels take them; of no grid by default.
#[derive(Default)]
struct DeviceScales {
    kind: u32,
    stored: u32,
    low: f32,
    high: f32,
    /// `[rows, groups]` each.
    scale: Option<Memory<f32>>,
    point: Option<Memory<f32>>,
    min: Option<Memory<f32>>,
    groups: u64,
    group_len: u32,
    /// The matrix's column at each position of the sweep.
    order: Option<Memory<u32>>,
}

impl DeviceScales {
    /// The arguments that every kernel takes that rounds.
    fn args(&self) -> [Arg<'_>; 9] {
        [
            self.kind.into(),
            self.stored.into(),
            self.low.into(),
            self.high.into(),
            Arg::optional(self.scale.as_ref()),
            Arg::optional(self.point.as_ref()),
            Arg::optional(self.min.as_ref()),
            self.groups.into(),
            self.group_len.into(),
        ]
    }

    fn upload(cuda: &Cuda, rounding: &Rounding) -> Result<Self> {
        const OPERATION: &str = "scales";
        let (grid, cols) = (rounding.grid(), rounding.cols());
        let (kind, dtype, low, high) = match grid {
            Grid::Int { grid, .. } => {
                let half = 1i32 << (grid.bits - 1);
                (LEVELS, grid.scale, -half as f32, (half - 1) as f32)
            }
            Grid::F8E4m3 { scale } => (FLOAT8, scale, -F8_MAX, F8_MAX),
            Grid::Block { grid, .. } => {
                (LEVELS, DType::F32, f32::from(grid.low), f32::from(grid.high))
            }
        };
        let stored = match dtype {
            DType::Bf16 => AS_BF16,
            DType::F16 => AS_F16,
            _ => AS_F32,
        };
        let group_len = grid.group(cols);
        let (scale, point, min) = rounding.scales.by_group(grid);
        let order = rounding.order().map(|order| order.iter().map(|&at| at as u32).collect());
        let order: Option<Vec<u32>> = order;
        let upload = |values: &[f32]| cuda.gpu.upload(values, OPERATION).map(Some);
        Ok(Self {
            kind,
            stored,
            low,
            high,
            scale: upload(&scale)?,
            point: upload(&point)?,
            min: upload(&min)?,
            groups: (cols / group_len.max(1)) as u64,
            group_len: group_len as u32,
            order: order.map(|order| cuda.gpu.upload(&order, OPERATION)).transpose()?,
        })
    }
}
