//! Checkpoint containers and tensor encodings.
//!
//! This crate knows how bits lie: which bytes of which file hold a tensor, and what they
//! decode to. It knows nothing about transformers, solvers or command lines.
//!
//! * [`open`] maps a checkpoint (a safetensors file, a directory of them, a GGUF file, or a
//!   container of zstd frames), recognised by content, and returns a [`CheckpointReader`].
//! * [`SafetensorsWriter`] writes one: every header is laid out before the first data byte,
//!   data streams forward into `*.part` files, and [`CheckpointWriter::finish`] renames them.
//! * [`ContainerWriter`](container::ContainerWriter) compresses them into one seekable file.
//! * [`Encoding`] says how one tensor's values become bytes.
#![deny(unsafe_code)]

mod digest;
mod dtype;
mod error;
mod file;
mod parts;
mod reader;
mod tensor;
mod writer;

pub mod compressed_tensors;
pub mod container;
pub mod encoding;
pub mod gguf;
pub mod safetensors;

pub use digest::{Digest, HashingWriter};
pub use dtype::{DType, GgmlType};
pub use encoding::{Component, Encoder, Encoding, Survey};
pub use error::{FormatError, Result};
pub use file::OutputFile;
pub use gguf::{GgufLayout, GgufWriter};
pub use reader::{CheckpointReader, MappedFile, ModelMetadata, StoredRows, open};
pub use safetensors::writer::{SafetensorsWriter, ShardLayout};
pub use tensor::{TensorIndex, TensorInfo};
pub use writer::{CheckpointWriter, WrittenFile};
