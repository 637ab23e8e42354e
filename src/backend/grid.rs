//! What weights are rounded to, and the codes and scales of a matrix that is being rounded.

use std::fmt;

use sparsepack_formats::{
    DType, GgmlType,
    encoding::{
        IntGrid,
        ggml::{BlockGrid, BlockScales},
    },
};

use super::{Result, error::shape_error};

/// The values that weights may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grid {
    /// Integers with a scale (and zero point) for each group of columns, or for each row.
    Int {
        /// Bits, groups, symmetry and the type of the scales.
        grid: IntGrid,
        /// How scales are chosen.
        search: ScaleSearch,
    },
    /// 8-bit floats (e4m3) with a scale of this type for each row: the largest magnitude becomes 448.
    F8E4m3 {
        /// Type of the scales.
        scale: DType,
    },
    /// The quant blocks of a ggml type.
    Block {
        /// Block type.
        ty: GgmlType,
        /// Its geometry and ranges.
        grid: BlockGrid,
        /// How scales are chosen; types with scales of scales have one way only.
        search: ScaleSearch,
    },
}

impl fmt::Display for Grid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Int { grid, .. } => grid.fmt(f),
            Self::F8E4m3 { .. } => f.write_str("f8_e4m3"),
            Self::Block { ty, .. } => ty.fmt(f),
        }
    }
}

/// How the scale of a group is chosen.
#[derive(
    Debug,
    Clone,
    Copy,
    Default,
    PartialEq,
    Eq,
    serde::Serialize,
    serde::Deserialize,
    schemars::JsonSchema,
    clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum ScaleSearch {
    /// The one with the least squared error, weighted with what an error in a column costs.
    #[default]
    Mse,
    /// The one that just reaches the largest magnitude (symmetric) or both ends of the range; for blocks,
    /// ggml's own.
    Minmax,
}

/// Largest finite value of e4m3.
pub(crate) const F8_MAX: f32 = 448.0;

impl Grid {
    /// Columns whose scales are chosen at a time: a group, or a block of ggml's.
    pub fn span(self, cols: usize) -> usize {
        match self {
            Self::Int { grid, .. } => grid.group_size.map_or(cols, |size| size as usize).max(1),
            Self::F8E4m3 { .. } => cols.max(1),
            Self::Block { grid, .. } => grid.block_len,
        }
    }

    /// Columns with the same scale.
    pub fn group(self, cols: usize) -> usize {
        match self {
            Self::Block { grid, .. } => grid.group_len,
            _ => self.span(cols),
        }
    }

    /// Whether scales are chosen for the weights as pruning will leave them, not as they are when they
    /// are chosen. The reference implementations, which only look at the range, do not.
    pub fn foresees_pruning(self) -> bool {
        match self {
            Self::Int { search, .. } => search == ScaleSearch::Mse,
            Self::Block { grid, search, .. } => search == ScaleSearch::Mse || grid.scales.is_some(),
            Self::F8E4m3 { .. } => true,
        }
    }

    /// What a search for the scale of a group tries, in this order: how many parts the group's largest value
    /// (with minima its range) is divided into; for asymmetric integers the factors that its range shrinks
    /// by. Nothing where there is only one way.
    pub(super) fn candidates(self) -> Vec<f32> {
        match self {
            Self::Int { grid, search } => match (grid.symmetric, search) {
                (true, ScaleSearch::Mse) => parts(1 << grid.bits, int_reach(grid)),
                (true, ScaleSearch::Minmax) => Vec::new(),
                (false, ScaleSearch::Mse) => SHRINKS.to_vec(),
                (false, ScaleSearch::Minmax) => SHRINKS[..1].to_vec(),
            },
            Self::F8E4m3 { .. } => Vec::new(),
            Self::Block { grid, .. } => {
                let levels = usize::from(grid.high.abs_diff(grid.low)) + 1;
                let high = parts(levels, f32::from(grid.high));
                match grid.mins {
                    Some(_) => high,
                    // The largest value at either end of the codes.
                    None => [parts(levels, f32::from(grid.low)), high].concat(),
                }
            }
        }
    }

    /// Whether every group holds an exact zero.
    pub fn keeps_zeros(self) -> bool {
        match self {
            Self::Int { .. } | Self::F8E4m3 { .. } => true,
            Self::Block { grid, .. } => grid.mins.is_none(),
        }
    }
}

/// Candidates of a search.
const STEPS: usize = 18;

/// What the range of a group of asymmetric integers is multiplied by.
const SHRINKS: [f32; 11] = [1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.82, 0.79, 0.76, 0.73, 0.7];

/// How many parts to try for codes with `levels` values up to `reach` from zero: fewer levels make it
/// worthwhile to cut more off the largest values.
fn parts(levels: usize, reach: f32) -> Vec<f32> {
    let (least, most) = match levels {
        0..9 => (0.8, 1.7),
        9..17 => (0.88, 1.5),
        17..65 => (0.95, 1.25),
        _ => (0.99, 1.08),
    };
    (0..STEPS).map(|i| reach * (least + (most - least) * i as f32 / (STEPS - 1) as f32)).collect()
}

/// Least and greatest code of integers.
pub(super) fn int_range(grid: IntGrid) -> (f32, f32) {
    let half = 1i32 << (grid.bits - 1);
    (-half as f32, (half - 1) as f32)
}

/// Steps from zero to the largest magnitude of symmetric integers: as in compressed-tensors, half a step
/// beyond the greatest code.
pub(super) fn int_reach(grid: IntGrid) -> f32 {
    let (low, high) = int_range(grid);
    (high - low) / 2.0
}

/// The scales of a matrix.
#[derive(Debug, Clone, PartialEq)]
pub enum Scales {
    /// `[rows, groups]` each; all zero points are 0 where the grid is symmetric.
    Groups {
        /// Scales, which their stored type holds exactly.
        scales: Vec<f32>,
        /// Codes that stand for zero.
        zero_points: Vec<i8>,
    },
    /// `[rows, blocks]`.
    Blocks(Vec<BlockScales>),
}

/// A matrix that is being rounded: the grid, and codes and scales as far as they are known.
#[derive(Debug, Clone, PartialEq)]
pub struct Rounding {
    grid: Grid,
    cols: usize,
    /// `[rows, cols]`; for [`Grid::F8E4m3`] the bits of the value.
    pub codes: Vec<i8>,
    /// Of every group.
    pub scales: Scales,
    /// The matrix's column that stands at each position of the weights being swept; as they are when
    /// absent.
    order: Option<Vec<usize>>,
    fixed: bool,
}

impl Rounding {
    /// Nothing known yet of `rows × cols` weights. Columns must be whole spans of the grid.
    pub fn new(grid: Grid, rows: usize, cols: usize) -> Self {
        let spans = cols / grid.span(cols).max(1);
        let scales = match grid {
            Grid::Block { .. } => Scales::Blocks(vec![BlockScales::default(); rows * spans]),
            Grid::Int { .. } | Grid::F8E4m3 { .. } => Scales::Groups {
                scales: vec![0.0; rows * spans],
                zero_points: vec![0; rows * spans],
            },
        };
        Self { grid, cols, codes: vec![0; rows * cols], scales, order: None, fixed: false }
    }

    /// The grid.
    pub fn grid(&self) -> Grid {
        self.grid
    }

    /// One whose codes and scales are known.
    #[cfg(feature = "cuda")]
    pub(super) fn known(grid: Grid, cols: usize, codes: Vec<i8>, scales: Scales) -> Self {
        Self { grid, cols, codes, scales, order: None, fixed: true }
    }

    /// Keeps the scales there are: a sweep that reaches a group does not choose them anew.
    pub fn fix_scales(&mut self) {
        self.fixed = true;
    }

    /// The weights that are swept have the matrix's columns in this order.
    ///
    /// # Errors
    /// Another number of columns, an index out of range.
    pub fn set_order(&mut self, order: Vec<usize>) -> Result<()> {
        if order.len() != self.cols || order.iter().any(|&column| column >= self.cols) {
            let detail = format!("no order of {} columns", self.cols);
            return Err(shape_error("set_order", detail));
        }
        self.order = Some(order);
        Ok(())
    }

    /// What a sweep must know of it.
    pub(super) fn outline(&self) -> Outline {
        let Self { grid, cols, fixed, .. } = *self;
        let rows = self.codes.len() / cols.max(1);
        Outline { grid, rows, cols, fixed, ordered: self.order.is_some() }
    }

    /// The rows of the matrix in strips of `rows`, each with its codes and scales.
    pub(super) fn strips(&mut self, rows: usize) -> Vec<RoundingStrip<'_>> {
        let spans = self.cols / self.grid.span(self.cols).max(1);
        let order = self.order.as_deref();
        let (grid, cols, fixed) = (self.grid, self.cols, self.fixed);
        let strip = |codes, scales| RoundingStrip { grid, cols, order, fixed, codes, scales };
        let codes = self.codes.chunks_mut((rows * cols).max(1));
        let per_strip = (rows * spans).max(1);
        match &mut self.scales {
            Scales::Groups { scales, zero_points } => codes
                .zip(scales.chunks_mut(per_strip).zip(zero_points.chunks_mut(per_strip)))
                .map(|(codes, (scales, zero_points))| {
                    strip(codes, StripScales::Groups { scales, zero_points })
                })
                .collect(),
            Scales::Blocks(blocks) => codes
                .zip(blocks.chunks_mut(per_strip))
                .map(|(codes, blocks)| strip(codes, StripScales::Blocks(blocks)))
                .collect(),
        }
    }

    /// The same matrix with its rows in another order: row `i` is what `from(i)` was.
    #[must_use]
    pub fn reorder_rows(&self, from: impl Fn(usize) -> usize) -> Self {
        let rows = self.codes.len() / self.cols.max(1);
        let scales = match &self.scales {
            Scales::Groups { scales, zero_points } => Scales::Groups {
                scales: take(scales, rows, &from),
                zero_points: take(zero_points, rows, &from),
            },
            Scales::Blocks(blocks) => Scales::Blocks(take(blocks, rows, &from)),
        };
        Self { codes: take(&self.codes, rows, &from), scales, ..self.clone() }
    }
}

/// A matrix that is being rounded, wherever its codes lie.
#[derive(Debug, Clone, Copy)]
pub(super) struct Outline {
    pub(super) grid: Grid,
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// Whether the scales there are stay.
    pub(super) fixed: bool,
    /// Whether the weights that are swept have the columns in another order.
    pub(super) ordered: bool,
}

impl Outline {
    /// Of a matrix of which nothing is known yet; one whose columns are not whole spans of the grid is
    /// refused.
    pub(super) fn new(grid: Grid, rows: usize, cols: usize) -> Result<Self> {
        let span = grid.span(cols);
        if !cols.is_multiple_of(span) {
            let detail = format!("{cols} columns in groups of {span}");
            return Err(shape_error("rounding", detail));
        }
        Ok(Self { grid, rows, cols, fixed: false, ordered: false })
    }

    /// Refuses a matrix of another shape than that being rounded.
    pub(super) fn expect_shape(
        &self,
        operation: &'static str,
        rows: usize,
        cols: usize,
    ) -> Result<()> {
        if self.cols == cols && self.rows * cols == rows * cols {
            return Ok(());
        }
        let detail = format!("codes of another matrix than {rows} × {cols}");
        Err(shape_error(operation, detail))
    }
}

/// `rows` rows of equal length in another order.
fn take<T: Copy>(values: &[T], rows: usize, from: impl Fn(usize) -> usize) -> Vec<T> {
    let width = values.len() / rows.max(1);
    let row = |row: usize| &values[from(row) * width..][..width];
    (0..rows).flat_map(row).copied().collect()
}

/// Some rows of a [`Rounding`].
pub(super) struct RoundingStrip<'a> {
    pub(super) grid: Grid,
    pub(super) cols: usize,
    pub(super) order: Option<&'a [usize]>,
    pub(super) fixed: bool,
    /// `[rows, cols]`.
    pub(super) codes: &'a mut [i8],
    pub(super) scales: StripScales<'a>,
}

/// The scales of some rows, see [`Scales`].
pub(super) enum StripScales<'a> {
    /// `[rows, groups]` each.
    Groups { scales: &'a mut [f32], zero_points: &'a mut [i8] },
    /// `[rows, blocks]`.
    Blocks(&'a mut [BlockScales]),
}
