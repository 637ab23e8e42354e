//! Skippable frames: what zstd passes over, and we keep our own data in.
//!
//! ```text
//! u32 little-endian   0x184D2A50 to 0x184D2A5F
//! u32 little-endian   n
//! n bytes
//! ```
//!
//! RFC 8878, section 3.1.2.

use std::ops::Range;

/// Magic number and length.
pub(super) const PREFIX_BYTES: usize = 8;

/// What a skippable frame of ours holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Kind {
    Header = 0x184D_2A5A,
    Record = 0x184D_2A5B,
    Footer = 0x184D_2A5C,
}

/// The frame around `content`, or `None` when that is too long for one.
pub(super) fn frame(kind: Kind, content: &[u8]) -> Option<Vec<u8>> {
    let length = u32::try_from(content.len()).ok()?;
    Some([&(kind as u32).to_le_bytes(), &length.to_le_bytes(), content].concat())
}

/// Where the content of the frame at `offset` lies, if a whole one of this kind starts there.
pub(super) fn content(bytes: &[u8], offset: usize, kind: Kind) -> Option<Range<usize>> {
    let rest = bytes.get(offset..)?;
    let (magic, rest) = rest.split_first_chunk()?;
    let (length, rest) = rest.split_first_chunk()?;
    let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
    if u32::from_le_bytes(*magic) != kind as u32 || length > rest.len() {
        return None;
    }
    let start = offset + PREFIX_BYTES;
    Some(start..start + length)
}
