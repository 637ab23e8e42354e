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
//! * [`GgufWriter`] does the same for GGUF.
//! * [`Encoding`] says how one tensor's values become bytes, and [`Encoder`] makes them.
//!
//! # Reading
//!
//! ```
//! # let directory = tempfile::tempdir()?;
//! # let path = directory.path().join("model.safetensors");
//! # let header = br#"{"norm.weight":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
//! # let data = [1.0f32.to_le_bytes(), (-2.0f32).to_le_bytes()];
//! # let length = (header.len() as u64).to_le_bytes();
//! # std::fs::write(&path, [&length[..], header, data.as_flattened()].concat())?;
//! let checkpoint = sparsepack_formats::open(&path)?;
//! for tensor in checkpoint.tensors() {
//!     println!("{} {:?}, stored as {}", tensor.name, tensor.shape, tensor.encoding);
//! }
//! let values = checkpoint.read_f32("norm.weight")?;
//! assert_eq!(values, [1.0, -2.0]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! [`CheckpointReader::read_rows_f32`] decodes some rows, and
//! [`read_rows_dense`](CheckpointReader::read_rows_dense) gives bytes of the stored element type.
//!
//! # Writing
//!
//! ```
//! use sparsepack_formats::{DType, Encoder, Encoding, SafetensorsWriter, ShardLayout};
//!
//! # let directory = tempfile::tempdir()?;
//! # let directory = directory.path();
//! let (name, encoding) = ("up_proj.weight", Encoding::Sparse24 { dtype: DType::F32 });
//! let layout = ShardLayout {
//!     tensors: vec![(name.to_owned(), encoding, vec![2, 4])],
//!     ..ShardLayout::default()
//! };
//! let mut writer = SafetensorsWriter::create(directory, &[layout])?;
//! let mut encoder = Encoder::new(encoding, name, &[2, 4])?;
//! for row in [[0.0f32, 1.5, 0.0, -2.0], [3.0, 0.0, 0.0, 0.0]] {
//!     let row = row.map(f32::to_le_bytes);
//!     for (component, bytes) in encoder.rows(row.as_flattened())?.iter().enumerate() {
//!         writer.write(name, component, bytes)?;
//!     }
//! }
//! for (component, bytes) in encoder.finish()?.iter().enumerate() {
//!     writer.write(name, component, bytes)?;
//! }
//! writer.finish()?;
//!
//! let checkpoint = sparsepack_formats::open(&directory.join("model.safetensors"))?;
//! assert_eq!(checkpoint.read_f32(name)?, [0.0, 1.5, 0.0, -2.0, 3.0, 0.0, 0.0, 0.0]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Quantized matrices are written as they were solved, with [`Encoder::quantized_rows`]: codes, scales and
//! zero points go in, and nothing is rounded again.
//!
//! # Trust
//!
//! Whatever is in a file, reading it is an error or a result, never a panic: every count, length and
//! offset is checked before it is used. `unsafe` code stands in two files, the memory map (`reader.rs`)
//! and the vector kernels of 2:4 rows (`encoding/sparse24/simd.rs`). A mapped file that another process
//! truncates is the one thing that ends the process instead (see [`MappedFile`]).
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
pub use encoding::{Component, Encoder, Encoding, IntGrid, Kept, QuantizedRows, Survey};
pub use error::{FormatError, Result};
pub use file::OutputFile;
pub use gguf::{GgufLayout, GgufWriter};
pub use reader::{CheckpointReader, MappedFile, ModelMetadata, StoredRows, open};
pub use safetensors::writer::{SafetensorsWriter, ShardLayout};
pub use tensor::{TensorIndex, TensorInfo};
pub use writer::{CheckpointWriter, WrittenFile};
