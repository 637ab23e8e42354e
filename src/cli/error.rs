//! What a command can fail with, and the exit code that says so.

use std::io;

use crate::{
    backend::BackendError, calibration::DatasetError, model::ModelError, pipeline::PipelineError,
    recipe::RecipeError,
};

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CliError {
    /// Conversion, evaluation, verification.
    #[error(transparent)]
    Pipeline(#[from] PipelineError),
    /// The model cannot be used.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The calibration or evaluation text cannot be used.
    #[error(transparent)]
    Dataset(#[from] DatasetError),
    /// The recipe cannot be used.
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    /// A checkpoint cannot be read.
    #[error(transparent)]
    Format(#[from] sparsepack_formats::FormatError),
    /// The device cannot be set up.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// Options that do not go together.
    #[error("{0}")]
    Usage(String),
    /// Standard output failed.
    #[error("cannot write to standard output")]
    Output(#[from] io::Error),
    /// A result does not serialise: a defect.
    #[error("cannot write JSON")]
    Json(#[from] serde_json::Error),
}

impl CliError {
    /// 2 for what the user can change on the command line or in the recipe, 1 for everything else.
    pub(super) fn exit_code(&self) -> u8 {
        match self {
            Self::Recipe(_)
            | Self::Usage(_)
            | Self::Pipeline(
                PipelineError::Recipe(_)
                | PipelineError::OutputExists { .. }
                | PipelineError::OutputIsInput { .. }
                | PipelineError::Unsupported { .. }
                | PipelineError::Model(ModelError::CannotSlice { .. }),
            ) => 2,
            _ => 1,
        }
    }

    /// Whether the reader of standard output has gone away.
    pub(super) fn is_broken_pipe(&self) -> bool {
        let kind = match self {
            Self::Output(error) => Some(error.kind()),
            Self::Json(error) => error.io_error_kind(),
            _ => None,
        };
        kind == Some(io::ErrorKind::BrokenPipe)
    }
}
