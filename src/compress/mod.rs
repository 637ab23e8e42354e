//! Solvers: which weights of a layer become zero, and what the others become.
//!
//! A solver sees one capture point at a time: the statistic of an input and the layers that share
//! it. It never sees a file, a path or a command line.

mod candidate;
mod magnitude;
mod nearest;
mod obs;
mod scheme;
pub mod slicegpt;
mod sparsity;
mod wanda;

pub use crate::backend::ScaleSearch;
pub use candidate::Candidate;
pub use magnitude::Magnitude;
pub use nearest::Nearest;
pub use obs::{Obs, column_blocks, sweep_layer};
pub use scheme::{Choice, GridOptions, GroupSize, ParseGroupSizeError, ParseSchemeError, Scheme};
pub use slicegpt::{Basis, Correction};
pub use sparsity::{ParseSparsityError, Sparsity};
pub use wanda::Wanda;

use crate::{
    backend::{Backend, BackendError, Fetch, Grid, Rounding},
    calibration::{StatKind, Statistic},
};

/// One layer to solve.
#[derive(Debug)]
pub struct Layer<B: Backend> {
    /// Module name, for reports and errors.
    pub name: String,
    /// `[out_features, in_features]`, f32.
    pub weight: B::Matrix,
    /// How much becomes zero; nothing when absent.
    pub sparsity: Option<Sparsity>,
    /// What the weights are rounded to; they stay f32 when absent.
    pub grid: Option<Grid>,
    /// Weights that are zero stay zero, where solving would change them.
    pub keep_zeros: bool,
}

impl<B: Backend> Layer<B> {
    /// The same layer, to be pruned only.
    fn to_prune(&self, b: &B) -> Result<Self, BackendError> {
        Ok(Self {
            name: self.name.clone(),
            weight: b.duplicate(&self.weight)?,
            sparsity: self.sparsity,
            grid: None,
            keep_zeros: self.keep_zeros,
        })
    }
}

/// One layer solved.
#[derive(Debug)]
pub struct Solved<B: Backend> {
    /// The pruned and rounded weight, f32.
    pub weight: B::Matrix,
    /// Its codes and scales, where it was rounded.
    pub rounding: Option<Fetch<Rounding>>,
    /// What it cost.
    pub report: LayerReport,
}

/// What solving a layer cost.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct LayerReport {
    /// Module name.
    pub layer: String,
    /// Weights of the layer.
    pub weights: u64,
    /// Weights set to zero by the solver's selection.
    pub zeroed: u64,
    /// `‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖²` over the calibration tokens; absent for data-free methods. For
    /// Wanda, which keeps only feature norms, the diagonal part of it.
    pub relative_error: Option<f64>,
    /// The same error if the weights that are kept had been rounded to nearest, without moving errors
    /// on to later columns.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nearest_error: Option<f64>,
    /// Damping added to the Hessian, as a fraction of its mean diagonal, or of each entry of it.
    pub damp: Option<f64>,
    /// Input features that were zero on every calibration token.
    pub dead_features: usize,
    /// Zeros of the layer as stored, where it is stored in a type that moves zeros; fewer than
    /// `zeroed` are a loss.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored_zeros: Option<u64>,
    /// Bits that the file spends on a weight, scales and positions included, before compression.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits_per_weight: Option<f64>,
}

impl LayerReport {
    /// A layer of which nothing is known yet.
    fn new(layer: String, weights: usize) -> Self {
        Self {
            layer,
            weights: weights as u64,
            zeroed: 0,
            relative_error: None,
            nearest_error: None,
            damp: None,
            dead_features: 0,
            stored_zeros: None,
            bits_per_weight: None,
        }
    }
}

/// Why a layer could not be solved.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SolveError {
    /// The pattern does not fit the layer.
    #[error("{layer}: {cols} columns do not divide into groups of {m}")]
    GroupSize {
        /// Module name.
        layer: String,
        /// Columns of the weight.
        cols: usize,
        /// Group width.
        m: usize,
    },
    /// The quantization groups do not fit the layer.
    #[error("{layer}: {cols} columns do not divide into quantization groups of {group}")]
    QuantGroupSize {
        /// Module name.
        layer: String,
        /// Columns of the weight.
        cols: usize,
        /// Columns of a group.
        group: usize,
    },
    /// Groups of the pattern lie across the limits of quantization groups.
    #[error("{layer}: groups of {m} do not divide quantization groups of {group} columns")]
    Straddle {
        /// Module name.
        layer: String,
        /// Columns of a group of the pattern.
        m: usize,
        /// Columns of a quantization group.
        group: usize,
    },
    /// The Hessian stayed indefinite at every damping tried.
    #[error(
        "{layer}: the Hessian is not positive definite at pivot {pivot} even with damping {damp} of its diagonal; more calibration text or a higher damping may help"
    )]
    NotPositiveDefinite {
        /// The first layer that shares the Hessian.
        layer: String,
        /// First pivot that is not positive.
        pivot: usize,
        /// The last damping tried.
        damp: f64,
    },
    /// Calibration gave no usable token.
    #[error("{layer}: all {tokens} calibration tokens have NaN or infinite features")]
    NoFiniteTokens {
        /// Module name.
        layer: String,
        /// Tokens seen.
        tokens: usize,
    },
    /// The solver was given another statistic than it needs: a defect of the caller.
    #[error("{layer}: the solver needs {needed:?}, the statistic is {found:?}")]
    WrongStatistic {
        /// Module name.
        layer: String,
        /// What the solver asked for.
        needed: StatKind,
        /// What it was given.
        found: StatKind,
    },
    /// Device failure.
    #[error(transparent)]
    Backend(#[from] BackendError),
}

/// Seconds a solver spent, by kind of work.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct SolveTimes {
    /// Factorising the Hessian.
    pub factor_secs: f64,
    /// Choosing weights and updating the others.
    pub sweep_secs: f64,
    /// Measuring the output error.
    pub error_secs: f64,
}

/// Chooses mask and values of the layers that share an input.
pub trait LayerSolver<B: Backend>: Send + Sync {
    /// The least that [`solve`](Self::solve) must know of the input.
    fn needs(&self) -> StatKind;

    /// Solves every layer; results in the same order. `times` is added to. `statistic` may say
    /// more than [`needs`](Self::needs), since layers that share an input may be pruned by
    /// different methods; it is left as it was found.
    ///
    /// # Errors
    /// [`SolveError`] naming the layer.
    fn solve(
        &self,
        b: &B,
        layers: Vec<Layer<B>>,
        statistic: &mut Statistic<B>,
        times: &mut SolveTimes,
    ) -> Result<Vec<Solved<B>>, SolveError>;
}

/// The pruning methods by name.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Lowest `|w|` of the layer; no calibration.
    Magnitude,
    /// Lowest `|w| · ‖x_j‖` of each row; weights are not updated.
    Wanda,
    /// Optimal-brain-surgeon sweep with weight update.
    #[serde(rename = "sparsegpt")]
    SparseGpt,
}

impl Method {
    /// What calibration must collect for this method.
    pub fn needs(self) -> StatKind {
        match self {
            Self::Magnitude => StatKind::None,
            Self::Wanda => StatKind::ColumnNorm,
            Self::SparseGpt => StatKind::Hessian,
        }
    }

    /// Weights that the method sets to zero in a `rows × cols` layer, exactly: what
    /// [`LayerReport::zeroed`] will say.
    pub fn zeros(
        self,
        sparsity: Sparsity,
        rows: usize,
        cols: usize,
        options: SolverOptions,
    ) -> usize {
        match self {
            Self::Magnitude => sparsity.zeros_of(rows * cols),
            Self::Wanda => sparsity.zeros_of(cols) * rows,
            Self::SparseGpt => column_blocks(cols, options.column_block, Some(sparsity), 1)
                .map(|block| sparsity.zeros_of(rows * block.len()))
                .sum(),
        }
    }

    /// The name used on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Magnitude => "magnitude",
            Self::Wanda => "wanda",
            Self::SparseGpt => "sparsegpt",
        }
    }
}

/// The ways of rounding by name.
#[derive(
    Debug,
    Clone,
    Copy,
    Default,
    PartialEq,
    Eq,
    Hash,
    serde::Serialize,
    serde::Deserialize,
    schemars::JsonSchema,
    clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Quantizer {
    /// Column by column, with the error of each moved on to the columns that are still to come.
    #[default]
    Gptq,
    /// Every weight to the nearest value; no calibration.
    Rtn,
}

impl Quantizer {
    /// What calibration must collect.
    pub fn needs(self) -> StatKind {
        match self {
            Self::Gptq => StatKind::Hessian,
            Self::Rtn => StatKind::None,
        }
    }

    /// The name used on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gptq => "gptq",
            Self::Rtn => "rtn",
        }
    }
}

/// What is added to the Hessian's diagonal before it is factorised, in proportion to what.
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
pub enum Damping {
    /// Each feature's own entry: correlations shrink by a factor, whatever the scale of a feature.
    #[default]
    Feature,
    /// The mean of the diagonal, the same for every feature (SparseGPT §4, GPTQ: 0.01). Where a few
    /// features are much larger than the others, it is too much for most and too little for these.
    Mean,
}

/// Settings of the solvers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SolverOptions {
    /// Damping as a fraction of what `damping` says.
    pub damp: f64,
    /// What damping is in proportion to.
    pub damping: Damping,
    /// Columns between lazy updates (SparseGPT §4: 128).
    pub column_block: usize,
    /// Columns are rounded in the order of descending `diag H`, as GPTQ's reference can, after pruning.
    /// Groups stay where they are, and their scales are chosen before.
    pub act_order: bool,
}

impl Default for SolverOptions {
    fn default() -> Self {
        Self { damp: 0.1, damping: Damping::Feature, column_block: 128, act_order: false }
    }
}

/// The solver of layers that are pruned by one method and rounded in one way, each if any.
pub fn solver<B: Backend>(
    prune: Option<Method>,
    quantize: Option<Quantizer>,
    options: SolverOptions,
) -> Box<dyn LayerSolver<B>> {
    match (prune, quantize) {
        (Some(Method::Magnitude), None) => Box::new(Magnitude),
        (Some(Method::Wanda), None) => Box::new(Wanda),
        (Some(Method::SparseGpt), None | Some(Quantizer::Gptq)) | (None, Some(Quantizer::Gptq)) => {
            Box::new(Obs::new(options, None))
        }
        (pruner, Some(Quantizer::Gptq)) => Box::new(Obs::new(options, pruner)),
        (pruner, Some(Quantizer::Rtn) | None) => Box::new(Nearest::new(options, pruner)),
    }
}

/// Whether a matrix of `cols` columns can carry the pattern and the grid, and both together.
///
/// # Errors
/// [`SolveError`] naming the layer.
pub fn check_target(
    layer: &str,
    cols: usize,
    sparsity: Option<Sparsity>,
    grid: Option<Grid>,
) -> Result<(), SolveError> {
    let layer = || layer.to_owned();
    let group = match sparsity {
        Some(Sparsity::NofM { m, .. }) if !cols.is_multiple_of(m) => {
            return Err(SolveError::GroupSize { layer: layer(), cols, m });
        }
        Some(Sparsity::NofM { m, .. }) => m,
        _ => 1,
    };
    let Some(grid) = grid else { return Ok(()) };
    let (span, scales) = (grid.span(cols), grid.group(cols));
    if !cols.is_multiple_of(span) {
        return Err(SolveError::QuantGroupSize { layer: layer(), cols, group: span });
    }
    if !scales.is_multiple_of(group) {
        return Err(SolveError::Straddle { layer: layer(), m: group, group: scales });
    }
    Ok(())
}

fn check_layer<B: Backend>(layer: &Layer<B>, cols: usize) -> Result<(), SolveError> {
    check_target(&layer.name, cols, layer.sparsity, layer.grid)
}

/// The matrix of a statistic of the kind `needed`, checked to hold a token.
fn statistic_matrix<'a, B: Backend>(
    layers: &[Layer<B>],
    statistic: &'a Statistic<B>,
    needed: StatKind,
) -> Result<&'a B::Matrix, SolveError> {
    let layer = || layers.first().map(|layer| layer.name.clone()).unwrap_or_default();
    let found = statistic.kind();
    let matrix = statistic.matrix().filter(|_| found == needed);
    let matrix =
        matrix.ok_or_else(|| SolveError::WrongStatistic { layer: layer(), needed, found })?;
    if statistic.tokens == 0 {
        return Err(SolveError::NoFiniteTokens {
            layer: layer(),
            tokens: statistic.non_finite_tokens,
        });
    }
    Ok(matrix)
}

#[cfg(test)]
mod tests;
