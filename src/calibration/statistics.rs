//! Statistics of a layer's inputs, accumulated batch by batch.

use crate::backend::{Backend, BackendError};

/// What a solver wants to know about the inputs of a layer; ordered by how much it costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum StatKind {
    /// Nothing: the solver looks at weights only.
    None,
    /// Squared norm of every input feature.
    ColumnNorm,
    /// The Hessian of the layer-wise loss up to a constant factor, `H = XᵀX`. The factor (the
    /// reference has `2/n` for `n` sequences) cancels wherever `H` is used: damping is relative to
    /// its diagonal, and errors are ratios.
    Hessian,
}

/// Accumulated statistic of the inputs at one capture point.
#[derive(Debug)]
pub struct Statistic<B: Backend> {
    kind: StatKind,
    /// `[features, features]`, lower triangle, for a Hessian; `[1, features]` for norms.
    matrix: Option<B::Matrix>,
    /// Tokens seen.
    pub tokens: usize,
    /// Tokens left out because a feature was NaN or infinite.
    pub non_finite_tokens: usize,
}

impl<B: Backend> Statistic<B> {
    /// An empty statistic for inputs `features` wide.
    ///
    /// # Errors
    /// Out of device memory.
    pub fn new(b: &B, kind: StatKind, features: usize) -> Result<Self, BackendError> {
        let matrix = match kind {
            StatKind::None => None,
            StatKind::ColumnNorm => Some(b.zeros(1, features)?),
            StatKind::Hessian => Some(b.zeros(features, features)?),
        };
        Ok(Self { kind, matrix, tokens: 0, non_finite_tokens: 0 })
    }

    /// Adds the rows of `x: [tokens, features]`. A batch that holds a non-finite row is left out
    /// whole and counted, so that one bad sequence cannot poison the sums.
    ///
    /// # Errors
    /// Device failure.
    pub fn add(&mut self, b: &B, x: &B::Matrix) -> Result<(), BackendError> {
        let Some(matrix) = &mut self.matrix else { return Ok(()) };
        let (tokens, _) = b.shape(x);
        if b.count_non_finite_rows(x)? > 0 {
            self.non_finite_tokens += tokens;
            return Ok(());
        }
        match self.kind {
            StatKind::None => {}
            StatKind::ColumnNorm => b.column_sq_norm(matrix, x)?,
            StatKind::Hessian => b.gram_accumulate(matrix, x)?,
        }
        self.tokens += tokens;
        Ok(())
    }

    /// Which statistic this is.
    pub fn kind(&self) -> StatKind {
        self.kind
    }

    /// The accumulated matrix; `None` for [`StatKind::None`].
    pub fn matrix(&self) -> Option<&B::Matrix> {
        self.matrix.as_ref()
    }

    /// The accumulated matrix, to be changed in place (dead features).
    pub fn matrix_mut(&mut self) -> Option<&mut B::Matrix> {
        self.matrix.as_mut()
    }

    /// A statistic around a known matrix, for solving without a model.
    pub fn from_matrix(kind: StatKind, matrix: B::Matrix, tokens: usize) -> Self {
        Self { kind, matrix: Some(matrix), tokens, non_finite_tokens: 0 }
    }
}
