//! Operations of the layer solvers.

use std::{fmt::Debug, ops::Range};

use super::{
    Fetch, Grid, Result, Storage,
    error::shape_error,
    grid::{Outline, Rounding},
};

/// Which scores are the lowest: the unit within which weights compete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Selection {
    /// `zeros` weights of the whole matrix.
    Tensor {
        /// How many to zero.
        zeros: usize,
    },
    /// `zeros` weights of every row.
    Row {
        /// How many to zero in each row.
        zeros: usize,
    },
    /// `zeros` weights of every group of `m` consecutive columns.
    Group {
        /// How many to zero in each group.
        zeros: usize,
        /// Columns of a group; divides the number of columns.
        m: usize,
    },
}

/// How one column block of the OBS sweep decides which weights become zero.
#[derive(Debug)]
pub enum SweepRule<'a, M> {
    /// None: weights are only rounded.
    Nothing,
    /// Those that are zero in this matrix.
    ZerosOf(&'a M),
    /// Exactly `zeros` weights of the column block (all rows together), chosen before the sweep by
    /// the lowest `w² / u_jj²`.
    Lowest {
        /// How many to zero.
        zeros: usize,
    },
    /// `zeros` of every group of `m` columns in every row, chosen when the sweep reaches the group.
    Group {
        /// How many to zero in each group.
        zeros: usize,
        /// Columns of a group; divides the width of the column block.
        m: usize,
    },
}

impl<M> Clone for SweepRule<'_, M> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<M> Copy for SweepRule<'_, M> {}

impl<M> SweepRule<'_, M> {
    /// The rule with the zeros of another matrix, where it copies zeros. Without one, none are copied.
    pub(super) fn with_zeros_of(self, matrix: Option<&M>) -> SweepRule<'_, M> {
        match (self, matrix) {
            (Self::ZerosOf(_), Some(matrix)) => SweepRule::ZerosOf(matrix),
            (Self::ZerosOf(_), None) | (Self::Nothing, _) => SweepRule::Nothing,
            (Self::Lowest { zeros }, _) => SweepRule::Lowest { zeros },
            (Self::Group { zeros, m }, _) => SweepRule::Group { zeros, m },
        }
    }

    /// Zeros of a group and its columns, where the rule is about groups.
    pub fn group(self) -> Option<(usize, usize)> {
        match self {
            Self::Group { zeros, m } => Some((zeros, m)),
            _ => None,
        }
    }
}

/// Refuses a column block of a `rows × cols` matrix that a rule's groups do not divide, and a rounding of
/// another matrix, of groups that the column block cuts, or with scales to be chosen and an order.
pub(super) fn check_sweep<M>(
    (rows, cols): (usize, usize),
    columns: &Range<usize>,
    rule: SweepRule<'_, M>,
    rounding: Option<Outline>,
) -> Result<()> {
    let refuse = |detail: String| Err(shape_error("obs_sweep", detail));
    let width = columns.len();
    if columns.end > cols {
        return refuse(format!("columns {columns:?} of {cols}"));
    }
    if let Some((_, m)) = rule.group()
        && (m == 0 || !width.is_multiple_of(m))
    {
        return refuse(format!("groups of {m} in {width} columns"));
    }
    let Some(rounding) = rounding else { return Ok(()) };
    rounding.expect_shape("obs_sweep", rows, cols)?;
    if rounding.fixed {
        return Ok(());
    }
    if rounding.ordered {
        return refuse("scales to be chosen of columns in another order".to_owned());
    }
    let (span, group) = (rounding.grid.span(cols), rounding.grid.group(cols));
    if !columns.start.is_multiple_of(span) || !width.is_multiple_of(span) {
        return refuse(format!("groups of {span} in columns {columns:?}"));
    }
    match rule.group() {
        Some((_, m)) if !group.is_multiple_of(m) => {
            refuse(format!("groups of {m} in groups of {group}"))
        }
        _ => Ok(()),
    }
}

/// Linear algebra, selection and rounding.
pub trait SolveOps: Storage {
    /// A matrix that is being rounded, as [`Rounding`], where the device works on it.
    type Rounding: Send + Debug;

    /// Nothing known yet of `rows × cols` weights.
    ///
    /// # Errors
    /// Columns that are not whole spans of the grid; device failure.
    fn rounding(&self, grid: Grid, rows: usize, cols: usize) -> Result<Self::Rounding>;

    /// Keeps the scales there are: a sweep that reaches a group does not choose them anew.
    fn fix_scales(&self, rounding: &mut Self::Rounding);

    /// The weights that are swept have the matrix's columns in this order. Scales must be fixed then.
    ///
    /// # Errors
    /// Another number of columns, an index out of range; device failure.
    fn set_order(&self, rounding: &mut Self::Rounding, order: &[usize]) -> Result<()>;

    /// Codes and scales, for the host.
    ///
    /// # Errors
    /// Device failure.
    fn fetch_rounding(&self, rounding: Self::Rounding) -> Result<Fetch<Rounding>>;

    /// The diagonal of a square matrix.
    ///
    /// # Errors
    /// Device failure.
    fn diagonal(&self, h: &Self::Matrix) -> Result<Vec<f32>>;

    /// Sets entries of the diagonal: `(index, value)`.
    ///
    /// # Errors
    /// Index out of range; device failure.
    fn set_diagonal(&self, h: &mut Self::Matrix, entries: &[(usize, f32)]) -> Result<()>;

    /// The upper triangular `U` with `UᵀU = (H + damp·I)⁻¹`, as SparseGPT and GPTQ use it; `H` is
    /// given by its lower triangle. Factorised in f64, returned in f32 with zeros below the
    /// diagonal.
    ///
    /// # Errors
    /// [`NotPositiveDefinite`](super::BackendError::NotPositiveDefinite); device failure.
    fn inverse_factor_upper(&self, h: &Self::Matrix, damp: f64) -> Result<Self::Matrix>;

    /// Zeroes columns of `w`.
    ///
    /// # Errors
    /// Index out of range; device failure.
    fn zero_columns(&self, w: &mut Self::Matrix, columns: &[usize]) -> Result<()>;

    /// Zeroes the weights of `w` that are zero in `from`.
    ///
    /// # Errors
    /// Shapes that differ; device failure.
    fn copy_zeros(&self, w: &mut Self::Matrix, from: &Self::Matrix) -> Result<()>;

    /// Zeroes the weights with the lowest `|w| · scale[column]` (`scale` is `[1, cols]`, or all
    /// ones). Ties go to the lower index, so the count is exact and the result reproducible.
    ///
    /// # Errors
    /// Shapes that do not fit; device failure.
    fn zero_lowest(
        &self,
        w: &mut Self::Matrix,
        scale: Option<&Self::Matrix>,
        selection: Selection,
    ) -> Result<()>;

    /// One column block of SparseGPT's Algorithm 1 (lines 7 to 13) and of GPTQ's: in columns `columns`
    /// of `w`, zeroes weights by `rule`, rounds the others (and, where the grid has no zero, the
    /// zeroed ones to what is nearest), and moves each column's error onto the columns to its right
    /// inside the block. Returns the errors `[rows, columns.len()]`, `err = (w − q) / u_jj`.
    ///
    /// Scales that are not fixed are chosen when the sweep reaches their group, for the least error
    /// of its weights as they then are, weighted with `1 / u_jj²`.
    ///
    /// # Shapes
    /// `w: [rows, cols]` f32 row-major, `u: [cols, cols]` upper triangular.
    ///
    /// # Errors
    /// Shapes that do not fit, a column block that cuts groups whose scales are to be chosen, or these in
    /// another order of columns; device failure.
    fn obs_sweep(
        &self,
        w: &mut Self::Matrix,
        u: &Self::Matrix,
        columns: Range<usize>,
        rule: SweepRule<'_, Self::Matrix>,
        rounding: Option<&mut Self::Rounding>,
    ) -> Result<Self::Matrix>;

    /// Chooses the scales of every group of `w`, with the squared error of each column weighted by
    /// `importance` (all alike without).
    ///
    /// # Errors
    /// Shapes that do not fit; device failure.
    fn choose_scales(
        &self,
        w: &Self::Matrix,
        importance: Option<&[f32]>,
        rounding: &mut Self::Rounding,
    ) -> Result<()>;

    /// Rounds every weight of `w` to the nearest value under the scales there are.
    ///
    /// # Errors
    /// Shapes that do not fit; device failure.
    fn round(&self, w: &mut Self::Matrix, rounding: &mut Self::Rounding) -> Result<()>;

    /// The columns of a matrix in another order: column `i` is what `order[i]` was.
    ///
    /// # Errors
    /// Another number of columns, an index out of range; device failure.
    fn permute_columns(&self, w: &Self::Matrix, order: &[usize]) -> Result<Self::Matrix>;

    /// Rows and columns of a symmetric matrix, given by its lower triangle, in another order.
    ///
    /// # Errors
    /// As [`permute_columns`](Self::permute_columns).
    fn permute_symmetric(&self, h: &Self::Matrix, order: &[usize]) -> Result<Self::Matrix>;

    /// The lazy update after a column block: `w[:, end..] −= err · u[columns, end..]`.
    ///
    /// # Errors
    /// Shapes that do not fit; device failure.
    fn trailing_update(
        &self,
        w: &mut Self::Matrix,
        err: &Self::Matrix,
        u: &Self::Matrix,
        columns: Range<usize>,
    ) -> Result<()>;

    /// `Σ_r w_r H w_rᵀ` of the matrix `a − b` (or of `a` alone), with `H` given by its lower
    /// triangle, in f64: the squared output norm over the calibration tokens.
    ///
    /// # Errors
    /// Shapes that do not fit; device failure.
    fn quadratic_form(
        &self,
        a: &Self::Matrix,
        b: Option<&Self::Matrix>,
        h: &Self::Matrix,
    ) -> Result<f64>;
}
