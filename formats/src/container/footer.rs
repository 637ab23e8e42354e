//! The end of the file, read first.
//!
//! ```text
//! 5C 2A 4D 18           skippable frame
//! u32 little-endian     of n + 48 bytes
//! n bytes               the index, JSON
//! 32 bytes              its sha256
//! u64 little-endian     n
//! "SPARSEPK"
//! ```

use std::path::Path;

use super::{
    header::{HEADER_BYTES, MAGIC},
    index::Index,
    skippable::{self, Kind, PREFIX_BYTES},
};
use crate::{Digest, FormatError, Result};

/// Digest, length and magic.
const TRAILER_BYTES: usize = 32 + 8 + 8;

/// Longest index: ten times what a trillion bf16 parameters take in chunks of 2 MiB.
const MAX_INDEX_BYTES: u64 = 1 << 30;

/// The bytes of the footer.
///
/// # Errors
/// [`FormatError::LimitExceeded`], [`FormatError::Json`].
pub(super) fn to_bytes(path: &Path, index: &Index) -> Result<Vec<u8>> {
    let mut content = serde_json::to_vec(index)
        .map_err(|source| FormatError::Json { path: path.to_owned(), source })?;
    let found = content.len() as u64;
    let digest = Digest::of(&content);
    content.extend_from_slice(digest.as_bytes());
    content.extend_from_slice(&found.to_le_bytes());
    content.extend_from_slice(MAGIC);
    skippable::frame(Kind::Footer, &content)
        .filter(|_| found <= MAX_INDEX_BYTES)
        .ok_or_else(|| too_long(path, 0, found))
}

/// Finds and parses the index of a file, and the offset of the footer.
///
/// # Errors
/// [`FormatError`] naming the offset.
pub(super) fn read(path: &Path, file: &[u8]) -> Result<(Index, u64)> {
    let size = file.len();
    let invalid = |offset: usize, what: &str| FormatError::InvalidHeader {
        path: path.to_owned(),
        offset: offset as u64,
        what: what.to_owned(),
    };
    let least = HEADER_BYTES + PREFIX_BYTES + TRAILER_BYTES;
    if size < least || !file.ends_with(MAGIC) {
        return Err(invalid(
            size.saturating_sub(MAGIC.len()),
            "expected the end of a footer; the file is cut short or was never finished",
        ));
    }
    let (_, trailer) = file.split_at(size - TRAILER_BYTES);
    let (digest, length) = (&trailer[..32], &trailer[32..40]);
    let length = u64::from_le_bytes(length.try_into().unwrap_or_default());
    if length > MAX_INDEX_BYTES {
        return Err(too_long(path, size as u64 - 16, length));
    }
    let content = length as usize + TRAILER_BYTES;
    let Some(start) = size.checked_sub(content + PREFIX_BYTES).filter(|&at| at >= HEADER_BYTES)
    else {
        return Err(invalid(
            size - 16,
            &format!("the index has {length} bytes, more than the file has room for"),
        ));
    };
    match skippable::content(file, start, Kind::Footer) {
        Some(range) if range.len() == content => {}
        _ => return Err(invalid(start, "expected the footer")),
    }
    let json = &file[start + PREFIX_BYTES..size - TRAILER_BYTES];
    let found = Digest::of(json);
    if found.as_bytes() != digest {
        return Err(invalid(
            start,
            &format!("the index has sha256 {found}, which is not the one behind it"),
        ));
    }
    let index = serde_json::from_slice(json).map_err(|error| {
        invalid(start + PREFIX_BYTES, &format!("the index is not valid: {error}"))
    })?;
    Ok((index, start as u64))
}

fn too_long(path: &Path, offset: u64, found: u64) -> FormatError {
    FormatError::LimitExceeded {
        path: path.to_owned(),
        offset,
        what: "the length of the index",
        found,
        limit: MAX_INDEX_BYTES,
    }
}
