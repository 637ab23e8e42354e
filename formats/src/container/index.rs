//! What the footer says of tensors and files, and the checks that make it safe to follow.
//!
//! ```text
//! {"chunk_bytes": 2097152,
//!  "tensors": [{"name": N, "encoding": "dense", "dtype": "BF16", "shape": [R, C],
//!               "components": [{"sha256": HEX,
//!                               "chunks": [{"offset": 24, "mask": false, "frames": [21, 25]}]}]}],
//!  "files": [{"name": "model.safetensors", "bytes": SIZE, "head": LENGTH, "sha256": HEX,
//!             "offset": AT, "frame": LENGTH}]}
//! ```
//!
//! Chunk `k` of a component holds its bytes from `k × chunk_bytes`; `frames` are compressed lengths.
//! The record behind a tensor's frames is the tensor's entry alone, byte for byte as in the index.

use std::{collections::HashSet, ops::Range, path::Path};

use serde::{Deserialize, Serialize};

use super::{
    chunk::{self, Defect},
    header::HEADER_BYTES,
    layout::is_restorable,
    planes::Split,
    skippable::{self, Kind},
};
use crate::{
    Component, Digest, Encoding, FormatError, Result,
    tensor::{MAX_TENSORS, name_defect},
};

/// Most bytes of a chunk that are accepted: a chunk is decompressed whole.
const MAX_CHUNK_BYTES: u64 = 64 << 20;

/// Chunks hold whole elements of every type.
const CHUNK_MULTIPLE: u64 = 8;

/// The whole index.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Index {
    pub(super) chunk_bytes: u64,
    /// In file order.
    pub(super) tensors: Vec<TensorEntry>,
    /// In file order.
    pub(super) files: Vec<FileEntry>,
}

/// A tensor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct TensorEntry {
    pub(super) name: String,
    #[serde(flatten)]
    pub(super) encoding: Encoding,
    pub(super) shape: Vec<usize>,
    pub(super) components: Vec<ComponentEntry>,
}

/// A stored piece of a tensor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct ComponentEntry {
    /// Digest of its bytes before compression.
    pub(super) sha256: Digest,
    pub(super) chunks: Vec<ChunkEntry>,
}

/// Where a chunk lies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ChunkEntry {
    /// First byte of its first frame in the file.
    pub(super) offset: u64,
    /// Whether the first frame is a mask.
    pub(super) mask: bool,
    /// Compressed lengths.
    pub(super) frames: Vec<u32>,
}

/// The start of a file that is written again from tensors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct FileEntry {
    pub(super) name: String,
    /// Size of the restored file.
    pub(super) bytes: u64,
    /// Bytes before its tensors.
    pub(super) head: u64,
    /// Digest of those.
    pub(super) sha256: Digest,
    /// Where their frame lies in the file.
    pub(super) offset: u64,
    /// Compressed length.
    pub(super) frame: u64,
}

impl ChunkEntry {
    /// Compressed bytes of all frames.
    pub(super) fn stored_bytes(&self) -> u64 {
        self.frames.iter().map(|&length| u64::from(length)).sum()
    }

    /// Decompresses the chunk out of `bytes`, the file from byte `base` on.
    pub(super) fn decompress(
        &self,
        bytes: &[u8],
        base: u64,
        component: &Component,
        raw_bytes: usize,
    ) -> std::result::Result<Vec<u8>, String> {
        let mut position = (self.offset - base) as usize;
        let mut frames = Vec::with_capacity(self.frames.len());
        for &length in &self.frames {
            frames.push(&bytes[position..position + length as usize]);
            position += length as usize;
        }
        chunk::decompress(&frames, self.mask, component.dtype, raw_bytes).map_err(
            |Defect { frame, what }| {
                let before = self.frames.iter().take(frame).map(|&length| u64::from(length));
                format!("the frame at offset {}: {what}", self.offset + before.sum::<u64>())
            },
        )
    }
}

impl TensorEntry {
    /// Compressed bytes.
    pub(super) fn stored_bytes(&self) -> u64 {
        let components = self.components.iter();
        components.flat_map(|part| &part.chunks).map(ChunkEntry::stored_bytes).sum()
    }

    /// What the record holds: the entry as JSON.
    pub(super) fn to_record(&self, path: &Path) -> Result<Vec<u8>> {
        serde_json::to_vec(self)
            .map_err(|source| FormatError::Json { path: path.to_owned(), source })
    }

    /// Checks the entry by itself, and that its frames and its record lie one after the other from
    /// byte `start` of `file` on. Returns the byte after the record, and the components.
    ///
    /// # Errors
    /// [`FormatError::InvalidTensor`], [`FormatError::Encoding`], [`FormatError::Truncated`].
    pub(super) fn check(
        &self,
        path: &Path,
        file: &[u8],
        start: u64,
        chunk_bytes: u64,
    ) -> Result<(u64, Vec<Component>)> {
        let invalid = |what| FormatError::InvalidTensor {
            path: path.to_owned(),
            name: self.name.clone(),
            what,
        };
        if let Some(what) = name_defect(&self.name) {
            return Err(invalid(what));
        }
        let components = self.encoding.components(&self.name, &self.shape)?;
        if self.components.len() != components.len() {
            return Err(invalid(format!(
                "has {} components, expected {}",
                self.components.len(),
                components.len()
            )));
        }
        let mut chunks: Vec<&ChunkEntry> = vec![];
        for (entry, component) in self.components.iter().zip(&components) {
            entry.check_chunks(component, chunk_bytes).map_err(invalid)?;
            chunks.extend(&entry.chunks);
        }
        chunks.sort_by_key(|chunk| chunk.offset);
        let mut position = start;
        for chunk in chunks {
            if chunk.offset != position {
                let relation =
                    if chunk.offset < position { "overlaps" } else { "leaves a gap after" };
                return Err(invalid(format!(
                    "a frame {relation} what is before it: expected offset {position}, found {}",
                    chunk.offset
                )));
            }
            // Each is at most u32::MAX, and there are fewer of them than bytes in the index.
            position = position.saturating_add(chunk.stored_bytes());
        }
        if position > file.len() as u64 {
            return Err(FormatError::Truncated {
                path: path.to_owned(),
                what: format!("tensor `{}`", self.name),
                expected: position,
                found: file.len() as u64,
            });
        }
        let record = skippable::content(file, position as usize, Kind::Record)
            .filter(|range| self.to_record(path).is_ok_and(|record| record == file[range.clone()]));
        match record {
            Some(range) => Ok((range.end as u64, components)),
            None => Err(invalid(format!("its record at offset {position} differs from the index"))),
        }
    }
}

impl ComponentEntry {
    fn check_chunks(
        &self,
        component: &Component,
        chunk_bytes: u64,
    ) -> std::result::Result<(), String> {
        let expected = component.bytes.div_ceil(chunk_bytes);
        if self.chunks.len() as u64 != expected {
            return Err(format!(
                "{} bytes in {} chunks of {chunk_bytes}, expected {expected} chunks",
                component.bytes,
                self.chunks.len()
            ));
        }
        let planes = Split::of(component.dtype).width;
        for chunk in &self.chunks {
            let expected = planes + usize::from(chunk.mask);
            if chunk.frames.len() != expected {
                return Err(format!(
                    "the chunk at offset {} has {} frames, expected {expected}",
                    chunk.offset,
                    chunk.frames.len()
                ));
            }
        }
        Ok(())
    }
}

/// Bytes of a component that its chunk `chunk` holds.
pub(super) fn chunk_range(component: &Component, chunk_bytes: u64, chunk: usize) -> Range<u64> {
    let start = chunk_bytes.saturating_mul(chunk as u64);
    start..start.saturating_add(chunk_bytes).min(component.bytes)
}

/// Checks the size of chunks.
///
/// # Errors
/// [`FormatError::InvalidHeader`] at `offset`.
pub(super) fn check_chunk_bytes(path: &Path, offset: u64, chunk_bytes: u64) -> Result<()> {
    if chunk_bytes > 0
        && chunk_bytes.is_multiple_of(CHUNK_MULTIPLE)
        && chunk_bytes <= MAX_CHUNK_BYTES
    {
        return Ok(());
    }
    Err(FormatError::InvalidHeader {
        path: path.to_owned(),
        offset,
        what: format!(
            "chunks of {chunk_bytes} bytes, expected a multiple of {CHUNK_MULTIPLE} up to {MAX_CHUNK_BYTES}"
        ),
    })
}

impl Index {
    /// Checks everything that can be checked without decompressing, for an index that starts at byte
    /// `end` of `file`. Returns the components of every tensor.
    ///
    /// # Errors
    /// [`FormatError`] naming the tensor or the offset.
    pub(super) fn check(&self, path: &Path, file: &[u8], end: u64) -> Result<Vec<Vec<Component>>> {
        check_chunk_bytes(path, end, self.chunk_bytes)?;
        if self.tensors.len() > MAX_TENSORS {
            return Err(FormatError::LimitExceeded {
                path: path.to_owned(),
                offset: end,
                what: "the number of tensors",
                found: self.tensors.len() as u64,
                limit: MAX_TENSORS as u64,
            });
        }
        let before = &file[..end as usize];
        let mut position = HEADER_BYTES as u64;
        let mut all = Vec::with_capacity(self.tensors.len());
        let mut names = HashSet::new();
        for tensor in &self.tensors {
            if !names.insert(tensor.name.as_str()) {
                let (path, name) = (path.to_owned(), tensor.name.clone());
                return Err(FormatError::DuplicateTensor { path, name });
            }
            let (next, components) = tensor.check(path, before, position, self.chunk_bytes)?;
            position = next;
            all.push(components);
        }
        self.check_files(path, position, end)?;
        Ok(all)
    }

    fn check_files(&self, path: &Path, start: u64, end: u64) -> Result<()> {
        let invalid =
            |offset, what| FormatError::InvalidHeader { path: path.to_owned(), offset, what };
        let mut position = start;
        let mut names = HashSet::new();
        for file in &self.files {
            if !is_restorable(&file.name) {
                return Err(invalid(end, format!("the file name {:?} is not allowed", file.name)));
            }
            if !names.insert(file.name.as_str()) {
                return Err(invalid(end, format!("the file `{}` appears twice", file.name)));
            }
            if file.head > MAX_HEAD_BYTES || file.head > file.bytes {
                let limit = MAX_HEAD_BYTES.min(file.bytes);
                let (path, what) = (path.to_owned(), "the start of a file");
                let (offset, found) = (end, file.head);
                return Err(FormatError::LimitExceeded { path, offset, what, found, limit });
            }
            if file.offset != position {
                return Err(invalid(
                    file.offset,
                    format!("the file `{}` begins here, expected offset {position}", file.name),
                ));
            }
            position = position.saturating_add(file.frame);
        }
        if position != end {
            return Err(invalid(
                position,
                format!("expected the footer here, found it at offset {end}"),
            ));
        }
        Ok(())
    }
}

/// Longest start of a file: a safetensors header, with its length before it.
pub(super) const MAX_HEAD_BYTES: u64 = crate::safetensors::MAX_HEADER_BYTES + 8;
