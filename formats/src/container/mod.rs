//! `model.spz`: every tensor in zstd frames, found through an index at the end.
//!
//! ```text
//! byte 0      header      skippable frame 0x184D2A5A of 16 bytes: "SPARSEPK", version, zero
//! byte 24     tensor      zstd frames of its chunks, then its record: skippable frame 0x184D2A5B
//!             ...
//!             files       one zstd frame each: the start of a file that `unpack` writes again
//!             footer      skippable frame 0x184D2A5C: index, its sha256, its length, "SPARSEPK"
//! ```
//!
//! A component's bytes are cut into chunks of `chunk_bytes`; a chunk is split into byte planes
//! (`planes.rs`) and each plane is a zstd frame of its own, with content size and checksum. Index and
//! records are JSON (`index.rs`).
//!
//! The invariant: the frames tile the file. The whole of it is a legal zstd stream, so `zstd -t`
//! checks every frame, and whatever is not in the index is refused.
//!
//! One file and not one a shard: shards belong to the safetensors files that are restored, and
//! those are described inside. docs/FORMATS.md has the whole layout with an example.

mod chunk;
mod footer;
mod header;
mod index;
mod layout;
mod leftover;
mod pending;
mod planes;
mod reader;
mod skippable;
mod writer;

pub(crate) use header::is_container;

pub use chunk::{ChunkJob, Executor, InPlace};
pub use layout::{ContainerLayout, OriginalFile, largest_size};
pub use reader::{ContainerReader, FilePart};
pub use writer::ContainerWriter;

/// Name of the file in an output directory.
pub const FILE_NAME: &str = "model.spz";

/// Bytes of a component in one chunk, as written: what a reader decompresses for a single row, and
/// what a thread works on at a time. Larger chunks compress no better, since zstd adapts its tables
/// every 128 KiB.
pub const CHUNK_BYTES: usize = 2 << 20;

/// Compression levels: those of the `zstd` tool without `--ultra`.
pub const LEVELS: std::ops::RangeInclusive<i32> = 1..=19;

/// The level that is used unless another is asked for. Planes have no long matches to find, so more
/// search costs time and, until level 19, size (benches/README.md).
pub const DEFAULT_LEVEL: i32 = 1;
