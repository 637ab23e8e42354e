//! Reading little-endian numbers and strings out of bytes that may end anywhere.

use std::path::Path;

use super::metadata::GgufStrings;
use crate::{FormatError, Result};

/// A kind of string, and what errors call it.
#[derive(Debug)]
pub(super) struct StringKind {
    what: &'static str,
    length: &'static str,
    /// Most bytes.
    limit: u64,
}

impl StringKind {
    /// At most as long as the GGUF specification allows ("at most 2^16-1 bytes").
    pub(super) const KEY: Self = Self {
        what: "a metadata key",
        length: "the length of a metadata key",
        limit: (1 << 16) - 1,
    };
    /// At most as long as llama.cpp's `GGUF_MAX_STRING_LENGTH`.
    pub(super) const VALUE: Self = Self {
        what: "a metadata string",
        length: "the length of a metadata string",
        limit: 1 << 30,
    };
    /// A tensor's name.
    pub(super) const TENSOR_NAME: Self = Self {
        what: "a tensor name",
        length: "the length of a tensor name",
        limit: super::header::MAX_NAME_BYTES,
    };
}

/// A position in the header. Every read either advances within the file or fails without effect.
#[derive(Debug)]
pub(super) struct Cursor<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(path: &'a Path, bytes: &'a [u8]) -> Self {
        Self { path, bytes, position: 0 }
    }

    pub(super) fn path(&self) -> &'a Path {
        self.path
    }

    /// Offset of the next byte.
    pub(super) fn offset(&self) -> u64 {
        self.position as u64
    }

    /// The next `len` bytes; `what` names them if they are not there.
    pub(super) fn take(&mut self, len: u64, what: &str) -> Result<&'a [u8]> {
        self.check_remaining(len, || what.to_owned())?;
        let end = self.position + len as usize;
        let taken = &self.bytes[self.position..end];
        self.position = end;
        Ok(taken)
    }

    /// The next `N` bytes.
    pub(super) fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64, what)?);
        Ok(array)
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A count of things that take at least `min_bytes` each, so that a vector of them can be
    /// allocated: at most `limit`, and no more than the rest of the file can hold.
    pub(super) fn count(
        &mut self,
        what: &'static str,
        limit: u64,
        min_bytes: u64,
    ) -> Result<usize> {
        let count = self.length(what, limit)?;
        self.check_remaining(count.saturating_mul(min_bytes), || {
            format!("a header where {what} is {count}")
        })?;
        Ok(count as usize)
    }

    /// A u64 that may be at most `limit`.
    fn length(&mut self, what: &'static str, limit: u64) -> Result<u64> {
        let offset = self.offset();
        let found = self.u64(what)?;
        if found > limit {
            let path = self.path.to_owned();
            return Err(FormatError::LimitExceeded { path, offset, what, found, limit });
        }
        Ok(found)
    }

    /// A string.
    pub(super) fn string(&mut self, kind: &StringKind) -> Result<&'a str> {
        let len = self.length(kind.length, kind.limit)?;
        let start = self.offset();
        let bytes = self.take(len, kind.what)?;
        std::str::from_utf8(bytes).map_err(|error| {
            let defect = start + error.valid_up_to() as u64;
            self.invalid(defect, format!("{} is not UTF-8", kind.what))
        })
    }

    /// `count` strings, in one allocation each for text and ends.
    pub(super) fn strings(&mut self, count: usize) -> Result<GgufStrings> {
        let mut strings = GgufStrings::with_capacity(count);
        for _ in 0..count {
            strings.push(self.string(&StringKind::VALUE)?);
        }
        Ok(strings)
    }

    /// A header defect at `offset`.
    pub(super) fn invalid(&self, offset: u64, what: String) -> FormatError {
        FormatError::InvalidHeader { path: self.path.to_owned(), offset, what }
    }

    fn check_remaining(&self, len: u64, what: impl Fn() -> String) -> Result<()> {
        if len <= (self.bytes.len() - self.position) as u64 {
            return Ok(());
        }
        Err(FormatError::Truncated {
            path: self.path.to_owned(),
            what: what(),
            expected: self.offset().saturating_add(len),
            found: self.bytes.len() as u64,
        })
    }
}
