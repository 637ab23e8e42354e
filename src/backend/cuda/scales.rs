//! Choosing the scales of groups of weights.

use std::ops::Range;

use sparsepack_formats::encoding::ggml::BlockGrid;

use super::{
    Cuda, CudaMatrix,
    driver::{Arg, Geometry, KernelFile, Memory, View},
    matrix::{ROW_BLOCKS, each, shape_error},
    rounding::{AS_F16, CudaRounding, DeviceScales},
};
use crate::backend::{
    Grid, Result, ScaleSearch,
    grid::{F8_MAX, int_range, int_reach},
};

const FILE: KernelFile = KernelFile::Scales;
/// Rows of a block of threads.
const ROWS: usize = 32;

/// Weights that scales are chosen for, from the first column of the first group on.
pub(super) struct Weights<'a> {
    pub(super) values: View<'a, f32>,
    pub(super) rows: usize,
    /// Columns from one row to the next.
    pub(super) stride: usize,
    /// What an error in each column costs; all alike without.
    pub(super) costs: Option<View<'a, f32>>,
}

/// Chooses the scales of every group of `w`.
pub(super) fn choose_scales(
    cuda: &Cuda,
    w: &CudaMatrix,
    importance: Option<&[f32]>,
    rounding: &mut CudaRounding,
) -> Result<()> {
    const OPERATION: &str = "choose_scales";
    let (rows, cols) = (w.rows, w.cols);
    rounding.outline.expect_shape(OPERATION, rows, cols)?;
    if let Some(importance) = importance
        && importance.len() != cols
    {
        let detail = format!("{} weights of {cols} columns", importance.len());
        return Err(shape_error(OPERATION, detail));
    }
    let costs = importance.map(|costs| cuda.gpu.upload(costs, OPERATION)).transpose()?;
    let weights = Weights {
        values: w.f32s(OPERATION)?.as_view(),
        rows,
        stride: cols,
        costs: costs.as_ref().map(|costs| costs.as_view()),
    };
    let (span, group) = (rounding.outline.grid.span(cols), rounding.outline.grid.group(cols));
    let which = Which { first: 0, spans: cols / span, groups: 0..span / group };
    choose(cuda, &weights, which, rounding)
}

/// What an error in each of some columns costs: `1 / u_jj²`.
pub(super) fn column_costs(
    cuda: &Cuda,
    u: &Memory<f32>,
    cols: usize,
    columns: &Range<usize>,
) -> Result<Memory<f32>> {
    const OPERATION: &str = "column_costs";
    let count = columns.len();
    let mut costs = cuda.gpu.allocate::<f32>(count, OPERATION)?;
    let u = u.slice(columns.start * (cols + 1)..);
    let args = [(&u).into(), (cols as u64).into(), (count as u64).into(), (&mut costs).into()];
    cuda.gpu.launch(FILE, OPERATION, each(count), &args)?;
    Ok(costs)
}

/// Which scales are chosen.
pub(super) struct Which {
    /// The first span of the grid.
    pub(super) first: usize,
    pub(super) spans: usize,
    /// Groups of each span whose scales are chosen under those of the span, where scales have scales; the
    /// weights start with the first of these groups. The scales of the span are chosen with group 0.
    pub(super) groups: Range<usize>,
}

/// Chooses scales for weights.
pub(super) fn choose(
    cuda: &Cuda,
    weights: &Weights<'_>,
    Which { first, spans, groups }: Which,
    rounding: &mut CudaRounding,
) -> Result<()> {
    let CudaRounding { outline, scales, candidates, .. } = rounding;
    let span = outline.grid.span(outline.cols);
    let search = Search { cuda, weights, candidates, span, spans, first };
    match outline.grid {
        Grid::Int { grid, search: ScaleSearch::Minmax } if grid.symmetric => {
            search.reaching(int_reach(grid), Of::Magnitude, scales.stored(), scales)
        }
        Grid::Int { grid, .. } if grid.symmetric => {
            search.symmetric(int_range(grid), Of::Magnitude, scales.stored(), scales)
        }
        Grid::Int { grid, .. } => search.asymmetric(int_range(grid), scales),
        Grid::F8E4m3 { .. } => search.reaching(F8_MAX, Of::Magnitude, scales.stored(), scales),
        Grid::Block { grid, .. } if grid.scales.is_some() => search.of_scales(grid, groups, scales),
        Grid::Block { grid, search: ScaleSearch::Minmax, .. } => match grid.high {
            i8::MAX => search.reaching(f32::from(i8::MAX), Of::Magnitude, AS_F16, scales),
            _ => search.reaching(f32::from(grid.low), Of::Value, AS_F16, scales),
        },
        Grid::Block { grid, .. } => {
            let range = (f32::from(grid.low), f32::from(grid.high));
            search.symmetric(range, Of::Value, AS_F16, scales)
        }
    }
}

/// What a symmetric scale is chosen of: the value of the largest magnitude, whose sign it has, or that
/// magnitude.
#[derive(Clone, Copy)]
enum Of {
    Magnitude = 0,
    Value = 1,
}

/// A search for the scales of `spans` spans from the `first` on.
struct Search<'a> {
    cuda: &'a Cuda,
    weights: &'a Weights<'a>,
    candidates: &'a Memory<f32>,
    span: usize,
    spans: usize,
    first: usize,
}

impl Search<'_> {
    fn launch(&self, name: &'static str, own: &[Arg<'_>]) -> Result<()> {
        let Weights { values, rows, stride, .. } = self.weights;
        let geometry = Geometry {
            blocks: [rows.div_ceil(ROWS), self.spans.min(ROW_BLOCKS), 1],
            threads: [ROWS as u32, 1],
            shared: 0,
        };
        let common = [
            values.into(),
            (*rows as u64).into(),
            (*stride as u64).into(),
            (self.span as u64).into(),
            (self.spans as u64).into(),
        ];
        self.cuda.gpu.launch(FILE, name, geometry, &[&common, own].concat())
    }

    /// What errors cost, and the candidates.
    fn tries(&self) -> [Arg<'_>; 3] {
        let costs = self.weights.costs.as_ref();
        [
            costs.map_or_else(|| Arg::optional::<f32>(None), Arg::from),
            self.candidates.into(),
            (self.candidates.len() as u32).into(),
        ]
    }

    fn reaching(&self, reach: f32, of: Of, stored: u32, scales: &mut DeviceScales) -> Result<()> {
        let groups = (scales.groups as u64).into();
        let mut scale = scales.scale.slice_mut(self.first..);
        let own = [reach.into(), (of as u32).into(), stored.into(), (&mut scale).into(), groups];
        self.launch("scales_to_reach", &own)
    }

    fn symmetric(
        &self,
        (low, high): (f32, f32),
        of: Of,
        stored: u32,
        scales: &mut DeviceScales,
    ) -> Result<()> {
        let groups = (scales.groups as u64).into();
        let mut scale = scales.scale.slice_mut(self.first..);
        let own = [
            low.into(),
            high.into(),
            (of as u32).into(),
            stored.into(),
            (&mut scale).into(),
            groups,
        ];
        self.launch("scales_symmetric", &[&self.tries()[..], &own].concat())
    }

    fn asymmetric(&self, (low, high): (f32, f32), scales: &mut DeviceScales) -> Result<()> {
        let (groups, stored) = ((scales.groups as u64).into(), scales.stored().into());
        let Some(point) = &mut scales.point else { return Ok(()) };
        let (mut scale, mut point) =
            (scales.scale.slice_mut(self.first..), point.slice_mut(self.first..));
        let own =
            [low.into(), high.into(), stored, (&mut scale).into(), (&mut point).into(), groups];
        self.launch("scales_asymmetric", &[&self.tries()[..], &own].concat())
    }

    /// The scales of blocks where `groups` starts at the first group, and the scales of these groups under
    /// them.
    fn of_scales(
        &self,
        grid: BlockGrid,
        groups: Range<usize>,
        scales: &mut DeviceScales,
    ) -> Result<()> {
        let DeviceScales { groups: of_row, scale, min, blocks, .. } = scales;
        let (Some(blocks), Some((least, greatest))) = (blocks, grid.scales) else { return Ok(()) };
        let first = self.first * grid.groups();
        let (mut d, mut levels) =
            (blocks.d.slice_mut(self.first..), blocks.scales.slice_mut(first..));
        let mut scale = scale.slice_mut(first..);
        let mut mins = min.as_mut().map(|min| {
            let (dmin, levels) =
                (blocks.dmin.slice_mut(self.first..), blocks.mins.slice_mut(first..));
            (dmin, levels, min.slice_mut(first..))
        });
        let (dmin, min_levels, min) = if let Some((dmin, levels, min)) = &mut mins {
            (dmin.into(), levels.into(), min.into())
        } else {
            let none = Arg::optional_mut::<f32>(None);
            (none, Arg::optional_mut::<i8>(None), none)
        };
        let [costs, candidates, count] = self.tries();
        let own = [
            (grid.group_len as u64).into(),
            (groups.start as u32).into(),
            (groups.end as u32).into(),
            costs,
            candidates,
            count,
            f32::from(grid.low).into(),
            f32::from(grid.high).into(),
            f32::from(least).into(),
            f32::from(greatest).into(),
            grid.mins.map_or(-1.0, f32::from).into(),
            (&mut d).into(),
            dmin,
            (&mut levels).into(),
            min_levels,
            (&mut scale).into(),
            min,
            (*of_row as u64).into(),
        ];
        self.launch("scales_of_scales", &own)
    }
}
