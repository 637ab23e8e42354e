//! Why a model cannot be used: one variant per defect, each naming the file, key or tensor.

use std::path::PathBuf;

use sparsepack_formats::FormatError;

/// Shorthand for results of this module.
pub type Result<T> = std::result::Result<T, ModelError>;

/// Why a model cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The checkpoint itself cannot be read.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// A file beside the checkpoint cannot be read.
    #[error("{path}: cannot {action}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was attempted.
        action: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Safetensors without a `config.json` beside them.
    #[error("{path}: no config.json beside the tensors; expected a directory with both")]
    NoConfig {
        /// The checkpoint.
        path: PathBuf,
    },
    /// The configuration of a checkpoint has a defect, which is the source of this error.
    #[error("{path}: the model's configuration cannot be used")]
    Config {
        /// The checkpoint.
        path: PathBuf,
        /// The defect.
        source: Box<ModelError>,
    },
    /// No table describes this architecture.
    #[error("unsupported architecture `{found}`; supported: {supported}")]
    UnsupportedArchitecture {
        /// As the checkpoint names it.
        found: String,
        /// What would be accepted.
        supported: String,
    },
    /// GGUF does not have this family of models.
    #[error("GGUF has no architecture for {architecture}")]
    NoGguf {
        /// Class of the model.
        architecture: String,
    },
    /// A configuration key is missing.
    #[error("configuration key `{key}` is missing (expected {expected})")]
    MissingKey {
        /// The key.
        key: String,
        /// What it should hold.
        expected: &'static str,
    },
    /// A configuration value makes no sense.
    #[error("configuration key `{key}` is {found} (expected {expected})")]
    InvalidValue {
        /// The key.
        key: String,
        /// Its value.
        found: String,
        /// What it should hold.
        expected: String,
    },
    /// A configuration value asks for something that the forward pass does not do.
    #[error("configuration key `{key}` is {found}, which is not supported; supported: {supported}")]
    UnsupportedValue {
        /// The key.
        key: String,
        /// Its value.
        found: String,
        /// What would be accepted.
        supported: String,
    },
    /// A tensor that the configuration demands is missing.
    #[error("{path}: tensor `{tensor}` is missing (expected shape {expected:?})")]
    MissingTensor {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor as the file would name it.
        tensor: String,
        /// Shape by the configuration.
        expected: Vec<usize>,
    },
    /// A tensor's shape contradicts the configuration.
    #[error(
        "{path}: tensor `{tensor}` has shape {found:?} (expected {expected:?} by the configuration)"
    )]
    ShapeMismatch {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor as the file names it.
        tensor: String,
        /// Shape by the configuration.
        expected: Vec<usize>,
        /// Shape in the file.
        found: Vec<usize>,
    },
    /// A weight is not stored in a type that decodes to floats.
    #[error(
        "{path}: tensor `{tensor}` is stored as {found} (expected F32, F16, BF16, F8_E4M3, or an encoding of them)"
    )]
    NotFloat {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor as the file names it.
        tensor: String,
        /// How it is stored.
        found: String,
    },
    /// An 8-bit weight whose values mean something only together with scales, which are not read.
    #[error("{path}: tensor `{tensor}` is F8_E4M3 with the scales `{scales}` (expected no scales)")]
    Scaled {
        /// The checkpoint.
        path: PathBuf,
        /// The weight.
        tensor: String,
        /// Its scales.
        scales: String,
    },
    /// A GGUF file has a tensor that its architecture's table does not know, so the forward pass
    /// would ignore it.
    #[error("{path}: unexpected tensor `{tensor}` for architecture `{architecture}`")]
    UnexpectedTensor {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The architecture.
        architecture: String,
    },
    /// A tensor is not part of the model.
    #[error("{path}: the model has no tensor `{tensor}`")]
    UnknownTensor {
        /// The checkpoint.
        path: PathBuf,
        /// The name asked for.
        tensor: String,
    },
    /// Rows beyond the end of a tensor were asked for.
    #[error("{path}: tensor `{tensor}` has {rows} rows, but row {row} was asked for")]
    RowOutOfRange {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Rows it has.
        rows: usize,
        /// First row that does not exist.
        row: usize,
    },
    /// A weight is NaN or infinite.
    #[error(
        "{path}: tensor `{tensor}` has the non-finite value {value} at row {row}, column {column}"
    )]
    NonFinite {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Row of the first such value.
        row: usize,
        /// Column of the first such value.
        column: usize,
        /// The value.
        value: f32,
    },
    /// A model whose hidden size cannot become another.
    #[error("cannot slice: {class} {why}")]
    CannotSlice {
        /// Class of the model.
        class: String,
        /// What is in the way, and what can be done.
        why: String,
    },
    /// Rotary factors of a GGUF file that no setting of a Hugging Face configuration expresses.
    #[error(
        "the rotary frequency factors (rope_freqs.weight) do not follow from any llama3 setting, so config.json cannot express them"
    )]
    RopeFactors,
    /// A token that the embedding table does not have.
    #[error("token {token} at position {position} is outside the vocabulary of {vocab_size}")]
    TokenOutOfRange {
        /// The token.
        token: u32,
        /// Where it stands in its sequence.
        position: usize,
        /// Rows of the embedding table.
        vocab_size: usize,
    },
    /// A sequence longer than the model's positions.
    #[error("a sequence of {tokens} tokens is longer than the model's {limit} ({key})")]
    SequenceTooLong {
        /// Tokens of the sequence.
        tokens: usize,
        /// The most the model takes.
        limit: usize,
        /// The configuration key that says so.
        key: &'static str,
    },
    /// There is no tokenizer beside the checkpoint.
    #[error(
        "{path}: not found; expected the tokenizer of the model as tokenizer.json or tokenizer.model"
    )]
    NoTokenizer {
        /// Where it should be.
        path: PathBuf,
    },
    /// The tokenizer cannot be built or cannot encode.
    #[error("{path}: tokenizer: {reason}")]
    Tokenizer {
        /// The tokenizer file or the checkpoint.
        path: PathBuf,
        /// The tokenizer library's reason.
        reason: String,
    },
}
