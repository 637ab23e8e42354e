//! One column block of SparseGPT's Algorithm 1, and the lazy update after it.
//!
//! A column block is swept in parts of at most 128 columns, each followed by a product that moves its
//! errors onto the rest of the block, which is Algorithm 1 with smaller blocks inside. Where scales are
//! chosen on the way, no part is wider than a group of them: they are chosen for its columns as they then
//! are, or for a copy of these that a sweep without a grid has pruned.
//!
//! Nothing here waits for the device.

use std::ops::Range;

use super::{
    Cuda, CudaMatrix,
    driver::{Arg, Geometry, KernelFile, Memory, Operand, Product, View},
    matrix::{by_column, shape_error},
    rounding::{CudaRounding, DeviceScales},
    scales::{self, Weights, Which},
    select,
};
use crate::backend::{Result, Storage, SweepRule, grid::Outline, solve_ops};

const FILE: KernelFile = KernelFile::Sweep;
/// Columns that a launch sweeps at most.
const PART: usize = 128;
/// Warps of a block, each with a row.
const WARPS: usize = 16;

/// Zeroes and rounds weights of a column block and moves their errors to the right inside the block.
pub(super) fn obs_sweep(
    cuda: &Cuda,
    w: &mut CudaMatrix,
    u: &CudaMatrix,
    columns: Range<usize>,
    rule: SweepRule<'_, CudaMatrix>,
    mut rounding: Option<&mut CudaRounding>,
) -> Result<CudaMatrix> {
    const OPERATION: &str = "obs_sweep";
    let (rows, cols, width) = (w.rows, w.cols, columns.len());
    u.expect_shape(OPERATION, cols, cols)?;
    let outline = rounding.as_deref().map(|rounding| rounding.outline);
    solve_ops::check_sweep((rows, cols), &columns, rule, outline)?;
    if let SweepRule::ZerosOf(pruned) = rule {
        pruned.expect_shape(OPERATION, rows, cols)?;
    }
    if rows * width == 0 {
        return cuda.zeros(rows, width);
    }
    let (w, u) = (w.f32s_mut(OPERATION)?, u.f32s(OPERATION)?);
    let mut err = cuda.gpu.allocate::<f32>(rows * width, OPERATION)?;
    let marks = marks(cuda, (w, u), (rows, cols), &columns, rule)?;
    let block = Block { cuda, u, rows, cols, columns: columns.clone(), rule, marks };
    let mut chooser = match (&mut rounding, outline) {
        (Some(_), Some(outline)) if !outline.fixed => Some(Chooser::new(&block, outline)?),
        _ => None,
    };
    let stretch = chooser.as_ref().map_or(width, |chooser| chooser.group);
    for first in columns.clone().step_by(stretch) {
        if let (Some(chooser), Some(rounding)) = (&mut chooser, &mut rounding) {
            chooser.choose(&block, w, first, rounding)?;
        }
        let columns = columns.clone();
        let mut to = Swept { w, stride: cols, first: 0, err: &mut err, columns };
        block.sweep(&mut to, first..first + stretch, rounding.as_deref_mut())?;
    }
    Ok(CudaMatrix::f32(rows, width, err))
}

/// A column block that is being swept.
struct Block<'a> {
    cuda: &'a Cuda,
    u: &'a Memory<f32>,
    rows: usize,
    /// Of the factor.
    cols: usize,
    columns: Range<usize>,
    rule: SweepRule<'a, CudaMatrix>,
    /// Which weights of the column block become zero, if that is known before, `[rows, columns]`.
    marks: Option<Memory<u8>>,
}

/// Where a sweep works: the matrix, or a copy of some columns.
struct Swept<'a> {
    /// `[rows, stride]`.
    w: &'a mut Memory<f32>,
    stride: usize,
    /// Which of the matrix's columns the first one is.
    first: usize,
    /// `[rows, columns.len()]`.
    err: &'a mut Memory<f32>,
    /// Those that errors are kept of and move onto.
    columns: Range<usize>,
}

impl Block<'_> {
    /// Sweeps some columns, whole groups of the rule, and moves their errors onto the rest.
    fn sweep(
        &self,
        to: &mut Swept<'_>,
        columns: Range<usize>,
        mut rounding: Option<&mut CudaRounding>,
    ) -> Result<()> {
        let (zeros, m) = self.rule.group().unwrap_or((0, 0));
        if m <= PART {
            let marks = self.marks.as_ref().map(|marks| (marks, &self.columns));
            return parts(&columns, m).try_for_each(|part| {
                self.part(to, part, (zeros, m), marks, rounding.as_deref_mut())
            });
        }
        // Groups too wide for a launch are ranked before their first column.
        for first in columns.step_by(m) {
            let group = first..first + m;
            let factor = (self.u, self.cols);
            let scores =
                scores(self.cuda, (&*to.w, to.stride, to.first), factor, self.rows, &group)?;
            let marks = select::mark_groups(self.cuda, &scores, self.rows * m, m, zeros)?;
            for part in parts(&group, 0) {
                let marks = Some((&marks, &group));
                self.part(to, part, (0, 0), marks, rounding.as_deref_mut())?;
            }
        }
        Ok(())
    }

    /// Sweeps columns in one launch and moves their errors onto the rest. `marks` are of the columns that
    /// stand beside them.
    fn part(
        &self,
        to: &mut Swept<'_>,
        part: Range<usize>,
        (zeros, m): (usize, usize),
        marks: Option<(&Memory<u8>, &Range<usize>)>,
        rounding: Option<&mut CudaRounding>,
    ) -> Result<()> {
        const OPERATION: &str = "obs_sweep";
        let Self { cuda, u, rows, cols, .. } = *self;
        let (at, width) = (part.start - to.columns.start, to.columns.len());
        let mut w = to.w.slice_mut(part.start - to.first..);
        let factor = u.slice(part.start * (cols + 1)..);
        let marks_stride = marks.as_ref().map_or(0, |(_, of)| of.len());
        let marks = marks.map(|(marks, of)| marks.slice(part.start - of.start..));
        let mut errors = to.err.slice_mut(at..);
        let own = [
            (&mut w).into(),
            (rows as u64).into(),
            (to.stride as u64).into(),
            (part.len() as u32).into(),
            (&factor).into(),
            (cols as u64).into(),
            marks.as_ref().map_or_else(|| Arg::optional::<u8>(None), Arg::from),
            (marks_stride as u64).into(),
            (zeros as u32).into(),
            (m as u32).into(),
            (&mut errors).into(),
            (width as u64).into(),
            (part.start as u64).into(),
            (cols as u64).into(),
        ];
        let (grid, rest) = if let Some(rounding) = rounding {
            let CudaRounding { scales, order, codes, .. } = rounding;
            (scales.args(), [Arg::optional(order.as_ref()), codes.into()])
        } else {
            let none = [Arg::optional::<u32>(None), Arg::optional_mut::<i8>(None)];
            (DeviceScales::no_args(), none)
        };
        let geometry = Geometry {
            blocks: [rows.div_ceil(WARPS).min(16 * cuda.processors), 1, 1],
            threads: [(WARPS * 32) as u32, 1],
            shared: 4 * (part.len() * part.len() + PART * WARPS),
        };
        cuda.gpu.launch(FILE, OPERATION, geometry, &[&own[..], &grid, &rest].concat())?;
        let rest = (part, to.columns.end);
        move_errors(cuda, (to.w, to.stride, to.first), (to.err, at, width), (u, cols), rows, rest)
    }
}

/// Chooses the scales of a grid on the way.
struct Chooser {
    /// Columns with the same scale, and those whose scales are chosen together.
    group: usize,
    span: usize,
    /// `1 / u_jj²` of the column block.
    costs: Memory<f32>,
    /// Room for the copy of `span` columns that is pruned, and for its errors.
    copies: Option<[Memory<f32>; 2]>,
}

impl Chooser {
    fn new(block: &Block<'_>, Outline { grid, cols, .. }: Outline) -> Result<Self> {
        let Block { cuda, u, rows, .. } = *block;
        let (group, span) = (grid.group(cols), grid.span(cols));
        let prunes = match block.rule {
            SweepRule::Nothing => false,
            SweepRule::ZerosOf(_) => true,
            SweepRule::Lowest { zeros } | SweepRule::Group { zeros, .. } => zeros > 0,
        };
        let room = || cuda.gpu.allocate::<f32>(rows * span, "obs_sweep");
        let pruned = grid.foresees_pruning() && prunes;
        let copies = if pruned { Some([room()?, room()?]) } else { None };
        let costs = scales::column_costs(cuda, u, block.cols, &block.columns)?;
        Ok(Self { group, span, costs, copies })
    }

    /// Chooses the scales of what starts at column `at`: of a span, or of a later group of a block.
    fn choose(
        &mut self,
        block: &Block<'_>,
        w: &Memory<f32>,
        at: usize,
        rounding: &mut CudaRounding,
    ) -> Result<()> {
        let Block { cuda, rows, cols, .. } = *block;
        let Self { group, span, costs, copies } = self;
        let within = at % *span / *group;
        let ahead = at..at + if within == 0 { *span } else { *group };
        let (values, stride) = match copies {
            Some([copy, err]) => {
                let from = w.slice(at..);
                copy_columns(cuda, (&from, cols), copy, (rows, ahead.len()))?;
                let (stride, columns) = (ahead.len(), ahead.clone());
                let mut to = Swept { w: copy, stride, first: at, err, columns };
                block.sweep(&mut to, ahead, None)?;
                (copy.as_view(), stride)
            }
            None => (w.slice(at..), cols),
        };
        let costs = Some(costs.slice(at - block.columns.start..));
        let which = Which { first: at / *span, spans: 1, groups: within..within + 1 };
        scales::choose(cuda, &Weights { values, rows, stride, costs }, which, rounding)
    }
}

/// Copies the first `width` columns of rows that are `stride` apart.
fn copy_columns(
    cuda: &Cuda,
    (from, stride): (&View<'_, f32>, usize),
    to: &mut Memory<f32>,
    (rows, width): (usize, usize),
) -> Result<()> {
    const OPERATION: &str = "copy_columns";
    let args = [
        from.into(),
        (stride as u64).into(),
        (rows as u64).into(),
        (width as u64).into(),
        to.into(),
    ];
    cuda.gpu.launch(KernelFile::Solve, OPERATION, by_column(rows, width), &args)
}

/// Which weights of some columns become zero before they are swept, if that is known before.
fn marks(
    cuda: &Cuda,
    (w, u): (&Memory<f32>, &Memory<f32>),
    (rows, cols): (usize, usize),
    columns: &Range<usize>,
    rule: SweepRule<'_, CudaMatrix>,
) -> Result<Option<Memory<u8>>> {
    const OPERATION: &str = "mark_zeros";
    let width = columns.len();
    match rule {
        SweepRule::Nothing | SweepRule::Group { .. } => Ok(None),
        SweepRule::Lowest { zeros } => {
            let scores = scores(cuda, (w, cols, 0), (u, cols), rows, columns)?;
            select::mark_lowest(cuda, &scores, (rows, width), zeros).map(Some)
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
/// columns and `w` of `stride`, from the matrix's column `first` on.
fn move_errors(
    cuda: &Cuda,
    (w, stride, first): (&mut Memory<f32>, usize, usize),
    (err, at, width): (&Memory<f32>, usize, usize),
    (u, cols): (&Memory<f32>, usize),
    rows: usize,
    (part, end): (Range<usize>, usize),
) -> Result<()> {
    if part.end == end || part.is_empty() {
        return Ok(());
    }
    let shape = Product { m: rows, n: end - part.end, k: part.len(), alpha: -1.0, beta: 1.0 };
    let errors = Operand { values: err.slice(at..), stride: width, transposed: false };
    let right = u.slice(part.start * cols + part.end..);
    let right = Operand { values: right, stride: cols, transposed: false };
    let mut w = w.slice_mut(part.end - first..);
    cuda.gpu.multiply("trailing_update", shape, &errors, &right, &mut w, stride)
}

/// What zeroing each weight of some columns costs; `w` is as in [`move_errors`].
fn scores(
    cuda: &Cuda,
    (w, stride, first): (&Memory<f32>, usize, usize),
    (u, cols): (&Memory<f32>, usize),
    rows: usize,
    columns: &Range<usize>,
) -> Result<Memory<u32>> {
    const OPERATION: &str = "scores_sweep";
    let width = columns.len();
    let mut scores = cuda.gpu.allocate::<u32>(rows * width, OPERATION)?;
    let (w, u) = (w.slice(columns.start - first..), u.slice(columns.start * (cols + 1)..));
    let args = [
        (&w).into(),
        (stride as u64).into(),
        (&u).into(),
        (cols as u64).into(),
        (rows as u64).into(),
        (width as u64).into(),
        (&mut scores).into(),
    ];
    cuda.gpu.launch(KernelFile::Select, OPERATION, by_column(rows, width), &args)?;
    Ok(scores)
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
    let w = (w.f32s_mut(OPERATION)?, cols, 0);
    move_errors(cuda, w, (err, 0, width), (u, cols), rows, (columns, cols))
}
