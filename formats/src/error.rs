//! Why a checkpoint could not be read or written: one variant per way a file can be wrong, each
//! naming the file, the tensor and the numbers.

use std::path::PathBuf;

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, FormatError>;

/// Why a checkpoint could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The operating system refused.
    #[error("{path}: cannot {action}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was attempted, e.g. `open`, `write 4096 bytes at offset 0`.
        action: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// Nothing in the path looks like a checkpoint.
    #[error(
        "{path}: not a checkpoint ({found}); expected a GGUF file, a safetensors file, a directory with config.json and model.safetensors or model.safetensors.index.json, or a directory with one GGUF file"
    )]
    UnknownFormat {
        /// The file or directory.
        path: PathBuf,
        /// What was found instead.
        found: String,
    },
    /// A file ends before what its header promises.
    #[error("{path}: {what} ends at byte {expected} but the file has {found} bytes")]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Header, or the tensor by name.
        what: String,
        /// The byte that should exist.
        expected: u64,
        /// The bytes that do.
        found: u64,
    },
    /// The header breaks a rule of the format.
    #[error("{path}: offset {offset}: {what}")]
    InvalidHeader {
        /// The file.
        path: PathBuf,
        /// Byte offset of the defect, as near as it is known.
        offset: u64,
        /// What is wrong, expected and found.
        what: String,
    },
    /// One tensor's description breaks a rule of the format.
    #[error("{path}: tensor `{name}`: {what}")]
    InvalidTensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// What is wrong, expected and found, with offsets.
        what: String,
    },
    /// Two tensors share a name.
    #[error("{path}: tensor `{name}` appears twice")]
    DuplicateTensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
    /// A tensor is not in the checkpoint.
    #[error("{path}: tensor `{name}` not found")]
    TensorNotFound {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor.
        name: String,
    },
    /// An element type this crate does not read.
    #[error("{path}: tensor `{name}` has the unsupported type {found}; supported: {supported}")]
    UnsupportedType {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Name or number of the type.
        found: String,
        /// What is supported.
        supported: String,
    },
    /// The file is of a version of its format that this crate does not read.
    #[error("{path}: {format} version {found} is not supported; supported: {supported}")]
    UnsupportedVersion {
        /// The file.
        path: PathBuf,
        /// The format.
        format: &'static str,
        /// The version found, with what is special about it.
        found: String,
        /// The versions that are read.
        supported: &'static str,
    },
    /// Two metadata pairs share a key.
    #[error("{path}: offset {offset}: metadata key `{key}` appears twice")]
    DuplicateKey {
        /// The file.
        path: PathBuf,
        /// Byte offset of the second pair.
        offset: u64,
        /// The key.
        key: String,
    },
    /// The metadata lacks a key.
    #[error("{path}: metadata key `{key}` not found (expected {expected})")]
    MissingKey {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// The type its value should have.
        expected: &'static str,
    },
    /// A metadata value is of another type than its key asks for.
    #[error("{path}: metadata key `{key}`: expected {expected}, found {found}")]
    WrongValueType {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// The type the value should have.
        expected: &'static str,
        /// The type it has, and the value where that helps.
        found: String,
    },
    /// A count or length beyond what any real checkpoint needs.
    #[error("{path}: offset {offset}: {what} is {found}, more than the limit of {limit}")]
    LimitExceeded {
        /// The file.
        path: PathBuf,
        /// Byte offset of the number.
        offset: u64,
        /// What is counted.
        what: &'static str,
        /// The number found.
        found: u64,
        /// The most that is accepted.
        limit: u64,
    },
    /// The shard index names a file that is not there or not a plain file name.
    #[error("{path}: the index names shard `{shard}`, which {problem}")]
    BadShard {
        /// The index file.
        path: PathBuf,
        /// The shard as named.
        shard: String,
        /// `does not exist`, `is not a plain file name`, ...
        problem: &'static str,
    },
    /// A file is not the part of a split checkpoint that it should be.
    #[error("{path}: {what}")]
    BadSplit {
        /// The file.
        path: PathBuf,
        /// What is wrong, expected and found.
        what: String,
    },
    /// A JSON file does not parse.
    #[error("{path}: invalid JSON")]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// An encoding cannot hold the values or the shape it was given.
    #[error("tensor `{name}`: {what}")]
    Encoding {
        /// The tensor.
        name: String,
        /// What is wrong, expected and found.
        what: String,
    },
    /// A writer was given bytes that do not fit what it was promised.
    #[error("{path}: tensor `{name}`: {written} of {expected} bytes were written")]
    WrongLength {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Bytes written.
        written: u64,
        /// Bytes declared.
        expected: u64,
    },
}
