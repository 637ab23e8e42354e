//! Files as another container keeps them: headers with the names of what follows, so that the same
//! bytes can be written again from tensors alone.

use std::path::Path;

use super::{
    INDEX_NAME,
    header::{Header, LENGTH_BYTES, StoredTensor},
    layout,
    writer::{ShardLayout, index_text},
};
use crate::{FormatError, Result, container::OriginalFile};

/// The files that the writer makes of `shards`: each shard, and the index of more than one.
///
/// # Errors
/// As [`layout::lay_out`].
pub(crate) fn original_files(
    directory: &Path,
    shards: &[ShardLayout],
) -> Result<Vec<OriginalFile>> {
    let layouts = layout::lay_out(directory, shards)?;
    let index = index_text(&layouts);
    let shards = layouts.into_iter().map(|layout| OriginalFile {
        name: layout.name,
        head: layout.header,
        bytes: layout.bytes,
    });
    let index = index.map(|text| OriginalFile::whole(INDEX_NAME, text.into_bytes()));
    Ok(shards.chain(index).collect())
}

/// Length and header at the start of a file that was parsed before.
pub(super) fn head_of(file: &[u8]) -> &[u8] {
    let length = file.first_chunk().map_or(0, |length| u64::from_le_bytes(*length));
    &file[..file.len().min((LENGTH_BYTES + length) as usize)]
}

/// The stored tensors behind `head` in a file of `bytes` bytes, in file order, with their sizes.
///
/// # Errors
/// [`FormatError`] when `head` is not the whole header of such a file.
pub(crate) fn stored_tensors(path: &Path, head: &[u8], bytes: u64) -> Result<Vec<(String, u64)>> {
    let header = Header::parse(path, head, bytes)?;
    let parsed = head_of(head).len();
    if parsed != head.len() {
        return Err(FormatError::InvalidHeader {
            path: path.to_owned(),
            offset: parsed as u64,
            what: format!(
                "expected the end of the header, found {} more bytes",
                head.len() - parsed
            ),
        });
    }
    let tensors = header.tensors.into_iter();
    Ok(tensors.map(|StoredTensor { name, start, end, .. }| (name, end - start)).collect())
}
