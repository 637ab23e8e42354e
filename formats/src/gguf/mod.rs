//! GGUF, the container of llama.cpp: typed metadata, tensor descriptions, then the tensor data.
//!
//! All numbers are little endian. Version 3 differs from version 2 only in that a big endian
//! variant exists, which this crate refuses, as it does version 1 (32-bit counts).
//!
//! | part | bytes |
//! |------|-------|
//! | magic | `GGUF` |
//! | version | u32: 2 or 3 |
//! | counts | u64 tensors, u64 metadata pairs |
//! | each pair | string key, u32 value type, value |
//! | each tensor | string name, u32 rank, u64 dimensions (**innermost first**), u32 ggml type, u64 offset from the start of the data |
//! | padding | to a multiple of `general.alignment` (default 32) |
//! | data | each tensor at its offset, itself a multiple of the alignment |
//!
//! A string is a u64 length and that many bytes of UTF-8. Value types are 0 u8, 1 i8, 2 u16, 3 i16,
//! 4 u32, 5 i32, 6 f32, 7 bool (one byte), 8 string, 9 array (u32 element type, u64 count, elements),
//! 10 u64, 11 i64, 12 f64. Specification: `docs/gguf.md` in ggml.
//!
//! The file may lie: every count and length is checked against a limit and against the bytes that
//! remain before anything is allocated for it.

mod cursor;
mod header;
mod layout;
mod metadata;
mod reader;
pub(crate) mod split;
mod tensor_type;
mod writer;

pub use layout::GgufLayout;
pub use metadata::{GgufArray, GgufMetadata, GgufStrings, GgufValue};
pub use reader::GgufReader;
pub use split::SPLIT_KEYS;
pub use writer::GgufWriter;

/// First four bytes of every GGUF file.
pub const MAGIC: &[u8; 4] = b"GGUF";

/// The version that is written.
pub const VERSION: u32 = 3;

/// The key of the alignment of the data section and of every tensor in it.
pub const ALIGNMENT_KEY: &str = "general.alignment";

/// Alignment where the file names none: ggml's `GGUF_DEFAULT_ALIGNMENT`.
pub const DEFAULT_ALIGNMENT: u64 = 32;
