//! Tensors on their way into a container.

use std::{
    collections::HashMap,
    io::{self, Write as _},
    path::Path,
};

use super::{
    ContainerLayout, LEVELS,
    index::{ChunkEntry, ComponentEntry, MAX_HEAD_BYTES, TensorEntry},
    layout::is_restorable,
};
use crate::{Component, Digest, Encoding, FormatError, HashingWriter, Result, tensor::name_defect};

/// A tensor of the layout.
#[derive(Debug)]
pub(super) struct Tensor {
    pub(super) name: String,
    pub(super) encoding: Encoding,
    pub(super) shape: Vec<usize>,
    pub(super) parts: Vec<Part>,
}

/// A component and how far it has come.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) component: Component,
    /// Bytes that do not fill a chunk yet.
    pub(super) buffer: Vec<u8>,
    pub(super) written: u64,
    hasher: HashingWriter<io::Sink>,
    pub(super) digest: Option<Digest>,
    pub(super) chunks: Vec<ChunkEntry>,
}

impl Tensor {
    pub(super) fn is_empty(&self) -> bool {
        self.parts.iter().all(|part| part.component.bytes == 0)
    }

    pub(super) fn entry(&self) -> TensorEntry {
        let components = self.parts.iter().map(|part| ComponentEntry {
            // Complete, or its end would not be in the queue.
            sha256: part.digest.unwrap_or_else(|| Digest::of(&[])),
            chunks: part.chunks.clone(),
        });
        TensorEntry {
            name: self.name.clone(),
            encoding: self.encoding,
            shape: self.shape.clone(),
            components: components.collect(),
        }
    }
}

impl Part {
    fn new(component: Component) -> Self {
        Self {
            digest: (component.bytes == 0).then(|| Digest::of(&[])),
            component,
            buffer: vec![],
            written: 0,
            hasher: HashingWriter::new(io::sink()),
            chunks: vec![],
        }
    }

    pub(super) fn is_complete(&self) -> bool {
        self.written == self.component.bytes
    }

    pub(super) fn take(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
        self.written += bytes.len() as u64;
        // A sink takes everything.
        let _ = self.hasher.write_all(bytes);
        if self.is_complete() {
            let hasher = std::mem::replace(&mut self.hasher, HashingWriter::new(io::sink()));
            self.digest = Some(hasher.finish().1);
        }
    }
}

/// The tensors of a layout that can be written at that level.
pub(super) fn check(
    path: &Path,
    layout: &ContainerLayout,
    level: i32,
) -> Result<(Vec<Tensor>, HashMap<String, usize>)> {
    let invalid = |what| FormatError::InvalidHeader { path: path.to_owned(), offset: 0, what };
    if !LEVELS.contains(&level) {
        let (first, last) = (LEVELS.start(), LEVELS.end());
        return Err(invalid(format!("level {level} of compression, expected {first} to {last}")));
    }
    let mut tensors = vec![];
    let mut by_name = HashMap::new();
    for (name, encoding, shape) in &layout.tensors {
        let refuse =
            |what| FormatError::InvalidTensor { path: path.to_owned(), name: name.clone(), what };
        name_defect(name).map_or(Ok(()), |what| Err(refuse(what)))?;
        let components = encoding.components(name, shape)?;
        if by_name.insert(name.clone(), tensors.len()).is_some() {
            let (path, name) = (path.to_owned(), name.clone());
            return Err(FormatError::DuplicateTensor { path, name });
        }
        tensors.push(Tensor {
            name: name.clone(),
            encoding: *encoding,
            shape: shape.clone(),
            parts: components.into_iter().map(Part::new).collect(),
        });
    }
    for (position, file) in layout.files.iter().enumerate() {
        let twice = layout.files[..position].iter().any(|other| other.name == file.name);
        let head = file.head.len() as u64;
        if !is_restorable(&file.name) || twice || head > MAX_HEAD_BYTES.min(file.bytes) {
            return Err(invalid(format!(
                "the file {:?} with {head} of {} bytes of its own cannot be restored",
                file.name, file.bytes
            )));
        }
    }
    Ok((tensors, by_name))
}
