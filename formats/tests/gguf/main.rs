//! GGUF: files of the `gguf` Python package, files built here byte by byte, and broken ones.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

mod builder;
mod fuzz;
mod golden;
mod malformed;
mod quantize;
mod split;
mod valid;
mod writer;

use std::path::{Path, PathBuf};

use sparsepack_formats::gguf::GgufReader;
use sparsepack_formats::{FormatError, MappedFile};

/// Reads `bytes` as a file.
fn read(bytes: &[u8]) -> Result<GgufReader, FormatError> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    GgufReader::new(MappedFile::open(file.path()).unwrap())
}

/// A file under `fixtures/`.
fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures").join(path)
}
