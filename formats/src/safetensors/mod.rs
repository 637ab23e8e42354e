//! safetensors, the container of Hugging Face checkpoints.
//!
//! ```text
//! byte 0        u64 little-endian: N, the length of the header
//! byte 8        N bytes of JSON, padded with spaces so that N is a multiple of eight
//!               {"__metadata__": {string: string},
//!                NAME: {"dtype": "BF16", "shape": [R, C], "data_offsets": [BEGIN, END]}, ...}
//! byte 8 + N    data; offsets count from here, little-endian, row-major, no gap and no overlap
//! ```
//!
//! A checkpoint is `model.safetensors`, or shards `model-00001-of-0000N.safetensors` with
//! `model.safetensors.index.json`. docs/FORMATS.md has the whole layout with an example.

mod declared;
mod header;
mod index;
mod json;
mod layout;
mod original;
mod reader;
pub mod writer;

pub(crate) use header::MAX_HEADER_BYTES;
pub(crate) use index::{is_plain_name, parse_json_file};
pub(crate) use original::{original_files, stored_tensors};

pub use reader::SafetensorsReader;

/// The only file of an unsharded checkpoint.
pub const SINGLE_NAME: &str = "model.safetensors";

/// The index of a sharded checkpoint.
pub const INDEX_NAME: &str = "model.safetensors.index.json";

/// The model's configuration, beside its tensors.
pub(crate) const CONFIG_NAME: &str = "config.json";
