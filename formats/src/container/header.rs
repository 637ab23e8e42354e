//! The first 24 bytes.
//!
//! ```text
//! byte 0    5A 2A 4D 18   skippable frame
//! byte 4    10 00 00 00   of 16 bytes
//! byte 8    "SPARSEPK"
//! byte 16   u32 little-endian: version, 1
//! byte 20   u32: 0
//! ```

use std::path::Path;

use super::skippable::{self, Kind};
use crate::{FormatError, Result};

/// Tells the container from other files that begin with a skippable frame; ends the footer too.
pub(super) const MAGIC: &[u8; 8] = b"SPARSEPK";

/// The version written, and the only one read.
pub(super) const VERSION: u32 = 1;

/// Length of the header.
pub(super) const HEADER_BYTES: usize = 24;

/// The bytes of the header.
pub(super) fn to_bytes() -> Vec<u8> {
    let content = [MAGIC.as_slice(), &VERSION.to_le_bytes(), &0u32.to_le_bytes()].concat();
    // Sixteen bytes fit.
    skippable::frame(Kind::Header, &content).unwrap_or_default()
}

/// Whether `bytes` begin like a container, of whatever version.
pub(crate) fn is_container(bytes: &[u8]) -> bool {
    bytes.starts_with(&(Kind::Header as u32).to_le_bytes()) && bytes.get(8..16) == Some(MAGIC)
}

/// Checks the header.
///
/// # Errors
/// [`FormatError::Truncated`], [`FormatError::InvalidHeader`], [`FormatError::UnsupportedVersion`].
pub(super) fn check(path: &Path, bytes: &[u8]) -> Result<()> {
    if bytes.len() < HEADER_BYTES {
        return Err(FormatError::Truncated {
            path: path.to_owned(),
            what: "the header".to_owned(),
            expected: HEADER_BYTES as u64,
            found: bytes.len() as u64,
        });
    }
    let invalid = |offset, what: &str| {
        Err(FormatError::InvalidHeader { path: path.to_owned(), offset, what: what.to_owned() })
    };
    if !is_container(bytes) {
        return invalid(0, "expected the magic bytes of a sparsepack container");
    }
    let version = u32::from_le_bytes([bytes[16], bytes[17], bytes[18], bytes[19]]);
    if version != VERSION {
        return Err(FormatError::UnsupportedVersion {
            path: path.to_owned(),
            format: "sparsepack container",
            found: version.to_string(),
            supported: "1",
        });
    }
    if bytes[..HEADER_BYTES] != to_bytes() {
        return invalid(4, "the header is not the one of version 1");
    }
    Ok(())
}
