//! Why a conversion stopped.

use std::path::PathBuf;

use sparsepack_formats::FormatError;

use crate::{
    backend::BackendError, calibration::HiddenError, compress::SolveError, model::ModelError,
    recipe::RecipeError,
};

/// Shorthand for results of the pipeline.
pub type Result<T> = std::result::Result<T, PipelineError>;

/// Why a conversion, a verification or an evaluation stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PipelineError {
    /// A file could not be read or written.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The model is not what its configuration says, or is not supported.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The recipe cannot be used.
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    /// A layer could not be solved.
    #[error(transparent)]
    Solve(#[from] SolveError),
    /// Device failure.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The device failed while a result was brought from it.
    #[error("{name} cannot be brought from the device: {source}")]
    Fetch {
        /// The tensor.
        name: String,
        /// Device failure.
        source: BackendError,
    },
    /// Activations could not be kept.
    #[error(transparent)]
    Hidden(#[from] HiddenError),
    /// The system refused something about the output.
    #[error("{path}: cannot {action}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was attempted.
        action: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The output directory holds something else.
    #[error("{path}: the output {found}; choose another directory{hint}")]
    OutputExists {
        /// The directory.
        path: PathBuf,
        /// What is in it.
        found: &'static str,
        /// What else could be done.
        hint: &'static str,
    },
    /// The output would be written over the input.
    #[error("{path}: the output is the input; inputs are never modified, choose another directory")]
    OutputIsInput {
        /// The directory.
        path: PathBuf,
    },
    /// Not enough free space.
    #[error("{path}: {needed} bytes are needed but only {free} are free")]
    DiskFull {
        /// The output directory.
        path: PathBuf,
        /// Bytes that the plan will write.
        needed: u64,
        /// Bytes available.
        free: u64,
    },
    /// The format cannot hold what the recipe produces.
    #[error("--format {format} cannot hold this: {why}")]
    Unsupported {
        /// The output format.
        format: &'static str,
        /// What does not fit and what to do.
        why: String,
    },
    /// Unpacking is for packed safetensors, which it gives back bit for bit.
    #[error(
        "{path}: is GGUF, not a packed output; convert it with --format safetensors --dtype f32 for the decoded values"
    )]
    NotPacked {
        /// The file or directory.
        path: PathBuf,
    },
    /// Solving a layer gave weights that are no numbers.
    #[error(
        "{layer}: {rows} rows have NaN or infinite weights after solving; the layer's weights are too large for f32 sums, or the device computes wrongly"
    )]
    NonFiniteWeights {
        /// Module name.
        layer: String,
        /// Rows with such weights.
        rows: usize,
    },
    /// Too many calibration tokens have non-finite activations.
    #[error(
        "block {block}: {bad} of {all} calibration tokens have NaN or infinite activations; the model or the calibration text is broken"
    )]
    NonFiniteActivations {
        /// Decoder block.
        block: usize,
        /// Tokens left out.
        bad: usize,
        /// Tokens in all.
        all: usize,
    },
    /// An interrupted run cannot be continued.
    #[error("{path}: cannot resume: {why}")]
    Resume {
        /// The output directory.
        path: PathBuf,
        /// What differs, both values named.
        why: String,
    },
    /// The directory was not written by sparsepack.
    #[error("{path}: no readable manifest.json")]
    NoManifest {
        /// The directory.
        path: PathBuf,
        /// Why it cannot be read.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A background thread died: a defect.
    #[error("the {name} thread panicked")]
    Thread {
        /// Which thread.
        name: &'static str,
    },
}
