//! What an interrupted run left in the part: tensors up to the last whole record, which this run may
//! adopt. What follows them is what a crash leaves, and is cut off.

use std::{
    io::{self, Write as _},
    path::Path,
};

use super::{
    CHUNK_BYTES, chunk,
    header::{self, HEADER_BYTES},
    index::{TensorEntry, chunk_range},
    pending::Tensor,
    skippable::{self, Kind},
};
use crate::{Digest, FormatError, HashingWriter, MappedFile, OutputFile, Result};

/// The tensors that are complete in a part, in file order.
#[derive(Debug)]
pub(super) struct Leftover {
    tensors: Vec<Left>,
}

#[derive(Debug)]
struct Left {
    entry: TensorEntry,
    /// Byte after its record.
    end: u64,
    adopted: bool,
}

impl Leftover {
    /// Looks through the part at `path`.
    ///
    /// # Errors
    /// A file that cannot be read, or one that does not start like a container.
    pub(super) fn scan(path: &Path) -> Result<Self> {
        let file = MappedFile::open(path)?;
        header::check(path, file.bytes())?;
        let bytes = file.bytes();
        let mut tensors: Vec<Left> = vec![];
        let mut position = HEADER_BYTES;
        while let Some(length) = bytes.get(position..).and_then(next_frame) {
            if let Some(content) = skippable::content(bytes, position, Kind::Record) {
                let start = tensors.last().map_or(HEADER_BYTES as u64, |left| left.end);
                let entry = serde_json::from_slice(&bytes[content]).ok();
                let whole = entry.and_then(|entry: TensorEntry| {
                    let (end, _) = entry.check(path, bytes, start, CHUNK_BYTES as u64).ok()?;
                    Some(Left { entry, end, adopted: false })
                });
                let Some(left) = whole else { break };
                tensors.push(left);
            }
            position += length;
        }
        Ok(Self { tensors })
    }

    /// Keeps a tensor, after decompressing it out of `file` and comparing its digests.
    ///
    /// # Errors
    /// [`FormatError::InvalidTensor`] for one that is not here, or is another; I/O.
    pub(super) fn adopt(
        &mut self,
        file: &OutputFile,
        tensor: &Tensor,
        digests: &[Digest],
    ) -> Result<()> {
        let refuse = |what| refusal(file, &tensor.name, what);
        if digests.len() != tensor.parts.len() {
            return Err(refuse(format!(
                "has {} components, but {} digests were recorded",
                tensor.parts.len(),
                digests.len()
            )));
        }
        if tensor.is_empty() {
            // The same in every run, and written at the very end.
            return compare(file, &tensor.entry(), tensor, digests);
        }
        let left = self.tensors.iter_mut().find(|left| left.entry.name == tensor.name);
        let Some(left) = left else {
            return Err(refuse(
                "is not in what the interrupted run left, or is not whole there".to_owned(),
            ));
        };
        let entry = &left.entry;
        if entry.encoding != tensor.encoding || entry.shape != tensor.shape {
            return Err(refuse(format!(
                "is {} {:?} there; expected {} {:?}",
                entry.encoding, entry.shape, tensor.encoding, tensor.shape
            )));
        }
        compare(file, entry, tensor, digests)?;
        left.adopted = true;
        Ok(())
    }

    /// The tensors that were adopted, and the byte behind them.
    ///
    /// # Errors
    /// [`FormatError::InvalidTensor`] when one that was not stands before one that was.
    pub(super) fn settle(&self, file: &OutputFile) -> Result<(Vec<TensorEntry>, u64)> {
        let count = self.tensors.iter().take_while(|left| left.adopted).count();
        let (adopted, rest) = self.tensors.split_at(count);
        if let Some(later) = rest.iter().find(|left| left.adopted) {
            let between = &rest[0].entry.name;
            return Err(refusal(
                file,
                &later.entry.name,
                format!("cannot be adopted: `{between}`, which stands before it, was not"),
            ));
        }
        let end = adopted.last().map_or(HEADER_BYTES as u64, |left| left.end);
        Ok((adopted.iter().map(|left| left.entry.clone()).collect(), end))
    }
}

/// Length of the frame at the start of `bytes`: of values or a record.
fn next_frame(bytes: &[u8]) -> Option<usize> {
    let record = skippable::content(bytes, 0, Kind::Record).map(|content| content.end);
    record.or_else(|| chunk::frame_length(bytes))
}

fn compare(
    file: &OutputFile,
    entry: &TensorEntry,
    tensor: &Tensor,
    digests: &[Digest],
) -> Result<()> {
    let name = &tensor.name;
    for ((stored, part), expected) in entry.components.iter().zip(&tensor.parts).zip(digests) {
        let component = &part.component;
        let mut hasher = HashingWriter::new(io::sink());
        for (position, chunk) in stored.chunks.iter().enumerate() {
            let mut frames = vec![0; chunk.stored_bytes() as usize];
            file.read_at(chunk.offset, &mut frames)?;
            let held = chunk_range(component, CHUNK_BYTES as u64, position);
            let raw_bytes = (held.end - held.start) as usize;
            let raw = chunk
                .decompress(&frames, chunk.offset, component, raw_bytes)
                .map_err(|what| refusal(file, name, what))?;
            // A sink takes everything.
            let _ = hasher.write_all(&raw);
        }
        let found = hasher.finish().1;
        if found != *expected {
            let stored = entry.encoding.component_name(name, component);
            let what = format!("`{stored}` has sha256 {found}, but {expected} was recorded");
            return Err(refusal(file, name, what));
        }
    }
    Ok(())
}

fn refusal(file: &OutputFile, name: &str, what: String) -> FormatError {
    FormatError::InvalidTensor { path: file.current_path().to_owned(), name: name.to_owned(), what }
}
