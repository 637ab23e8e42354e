//! What a container will hold, before it is written.

use std::path::Path;

use zstd::zstd_safe::compress_bound;

use super::{CHUNK_BYTES, planes::Split, skippable::PREFIX_BYTES};
use crate::{
    Encoding, FormatError, Result, ShardLayout,
    safetensors::{self, CONFIG_NAME, INDEX_NAME},
};

/// What a container will hold.
#[derive(Debug, Clone, Default)]
pub struct ContainerLayout {
    /// Name, encoding and shape of every tensor. They lie in the file in the order of writing.
    pub tensors: Vec<(String, Encoding, Vec<usize>)>,
    /// Files that can be written again from the tensors.
    pub files: Vec<OriginalFile>,
}

/// A file that consists of some bytes of its own and of tensors behind them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OriginalFile {
    /// Plain file name.
    pub name: String,
    /// Everything before the first tensor: of a safetensors file the length and the header, of
    /// another the whole content.
    pub head: Vec<u8>,
    /// Size of the whole file.
    pub bytes: u64,
}

impl OriginalFile {
    /// A file without tensors.
    pub fn whole(name: &str, content: Vec<u8>) -> Self {
        Self { name: name.to_owned(), bytes: content.len() as u64, head: content }
    }

    /// The files that [`SafetensorsWriter`](crate::SafetensorsWriter) writes for `shards`.
    ///
    /// # Errors
    /// As [`SafetensorsWriter::create`](crate::SafetensorsWriter::create).
    pub fn of_shards(directory: &Path, shards: &[ShardLayout]) -> Result<Vec<Self>> {
        safetensors::original_files(directory, shards)
    }
}

/// Whether a container may ask for a file of this name to be written: safetensors files, their index
/// and the configuration, in one directory.
pub(super) fn is_restorable(name: &str) -> bool {
    safetensors::is_plain_name(name)
        && !name.starts_with('.')
        && !name.chars().any(char::is_control)
        && (name.ends_with(".safetensors") || name == INDEX_NAME || name == CONFIG_NAME)
}

/// The most bytes that the frames and the record of one tensor can take, whatever its values.
///
/// # Errors
/// [`FormatError::Encoding`] when the encoding cannot hold that shape, or its size overflows.
pub fn largest_size(name: &str, encoding: Encoding, shape: &[usize]) -> Result<u64> {
    let mut total = 0u64;
    let mut record = name.len() + 40 * shape.len() + 200;
    for component in encoding.components(name, shape)? {
        let width = Split::of(component.dtype).width;
        // A mask takes fewer bytes than it saves; every frame has some of its own.
        let frames = (width as u64 + 1) * compress_bound(0) as u64;
        let chunks = component.bytes.div_ceil(CHUNK_BYTES as u64);
        total = chunks
            .checked_mul(compress_bound(CHUNK_BYTES) as u64 - CHUNK_BYTES as u64 + frames)
            .and_then(|bytes| bytes.checked_add(component.bytes)?.checked_add(total))
            .ok_or_else(|| FormatError::Encoding {
                name: name.to_owned(),
                what: format!("the size of shape {shape:?} overflows"),
            })?;
        record += 100 + chunks as usize * (60 + 12 * width);
    }
    // The entry stands in the record and in the index.
    Ok(total + 2 * (PREFIX_BYTES + record) as u64)
}
