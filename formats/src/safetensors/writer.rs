//! Header-first streaming writer.
//!
//! Phase one lays everything out and writes complete headers; phase two takes the data of each
//! component forward, in any interleaving of components. Nothing is buffered, and until
//! [`CheckpointWriter::finish`] there are only `*.part` files.

use std::{
    collections::{BTreeMap, HashMap},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use super::{
    INDEX_NAME, index,
    layout::{self, FileLayout},
};
use crate::{
    CheckpointWriter, Digest, Encoding, FormatError, HashingWriter, OutputFile, Result, WrittenFile,
};

/// Bytes read at a time when an interrupted run's data is hashed again.
const ADOPT_CHUNK: usize = 1 << 20;

/// One output shard: its tensors in order and its string metadata.
#[derive(Debug, Clone, Default)]
pub struct ShardLayout {
    /// Tensors in file order: name, encoding, shape. Wider elements come first in the file, so that
    /// every stored tensor is aligned; among equal widths this order holds.
    pub tensors: Vec<(String, Encoding, Vec<usize>)>,
    /// Further string pairs for the header's `__metadata__`.
    pub metadata: BTreeMap<String, String>,
}

/// Writes safetensors shards.
#[derive(Debug)]
pub struct SafetensorsWriter {
    directory: PathBuf,
    files: Vec<OutputFile>,
    tensors: Vec<Tensor>,
    by_name: HashMap<String, usize>,
    /// Text of the index, for more than one shard.
    index: Option<String>,
}

#[derive(Debug)]
struct Tensor {
    name: String,
    file: usize,
    parts: Vec<Part>,
}

/// One stored component and how far it is written.
#[derive(Debug)]
struct Part {
    name: String,
    start: u64,
    bytes: u64,
    written: u64,
    state: State,
}

#[derive(Debug)]
enum State {
    Open(HashingWriter<io::Sink>),
    Complete(Digest),
}

impl SafetensorsWriter {
    /// Lays out and creates `*.part` files with complete headers. An existing part is an error; a
    /// finished file of the same name is replaced by [`CheckpointWriter::finish`].
    ///
    /// # Errors
    /// [`FormatError`]: I/O; an encoding that cannot hold its shape or does not fit the container;
    /// names that are used twice. No part stays behind.
    pub fn create(dir: &Path, shards: &[ShardLayout]) -> Result<Box<dyn CheckpointWriter>> {
        let layouts = layout::lay_out(dir, shards)?;
        let mut files = vec![];
        for layout in &layouts {
            let created =
                OutputFile::create(&dir.join(&layout.name), layout.bytes).and_then(|file| {
                    // Kept first, so that it is removed with the others if the write fails.
                    files.push(file);
                    files[files.len() - 1].write_at(0, &layout.header)
                });
            if let Err(error) = created {
                for file in files {
                    file.abandon()?;
                }
                return Err(error);
            }
        }
        Ok(Box::new(Self::new(dir, files, layouts)))
    }

    /// Reopens the `*.part` files of an interrupted run with the same layout. Nothing counts as
    /// written until it is [adopted](CheckpointWriter::adopt).
    ///
    /// # Errors
    /// [`FormatError`]: I/O; a part whose header or length differs from the layout.
    pub fn resume(dir: &Path, shards: &[ShardLayout]) -> Result<Box<dyn CheckpointWriter>> {
        let layouts = layout::lay_out(dir, shards)?;
        let mut files = vec![];
        for layout in &layouts {
            let file = OutputFile::reopen(&dir.join(&layout.name), layout.bytes)?;
            let mut header = vec![0; layout.header.len()];
            file.read_at(0, &mut header)?;
            if let Some(offset) = header.iter().zip(&layout.header).position(|(a, b)| a != b) {
                return Err(FormatError::InvalidHeader {
                    path: file.current_path().to_owned(),
                    offset: offset as u64,
                    what: "the header differs from the layout of this run".to_owned(),
                });
            }
            files.push(file);
        }
        Ok(Box::new(Self::new(dir, files, layouts)))
    }

    fn new(directory: &Path, files: Vec<OutputFile>, layouts: Vec<FileLayout>) -> Self {
        let index = (layouts.len() > 1).then(|| {
            let total = layouts.iter().flat_map(|file| &file.stored).map(|s| s.bytes).sum();
            let weights = layouts
                .iter()
                .flat_map(|file| file.stored.iter().map(|s| (s.name.as_str(), file.name.as_str())));
            index::to_text(total, weights)
        });
        let mut tensors = vec![];
        for (file, layout) in layouts.into_iter().enumerate() {
            let first = tensors.len();
            tensors.extend(layout.tensors.into_iter().map(|name| Tensor {
                name,
                file,
                parts: vec![],
            }));
            let mut stored = layout.stored;
            stored.sort_by_key(|stored| (stored.tensor, stored.component));
            for stored in stored {
                tensors[first + stored.tensor].parts.push(Part::new(
                    stored.name,
                    stored.start,
                    stored.bytes,
                ));
            }
        }
        let by_name = tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
        Self { directory: directory.to_owned(), files, tensors, by_name, index }
    }

    fn position(&self, name: &str) -> Result<usize> {
        self.by_name.get(name).copied().ok_or_else(|| FormatError::TensorNotFound {
            path: self.directory.clone(),
            name: name.to_owned(),
        })
    }
}

impl CheckpointWriter for SafetensorsWriter {
    fn write(&mut self, name: &str, component: usize, chunk: &[u8]) -> Result<()> {
        let position = self.position(name)?;
        let tensor = &mut self.tensors[position];
        let file = &self.files[tensor.file];
        let count = tensor.parts.len();
        let Some(part) = tensor.parts.get_mut(component) else {
            return Err(FormatError::InvalidTensor {
                path: file.path().to_owned(),
                name: name.to_owned(),
                what: format!("has {count} components, but component {component} was written"),
            });
        };
        let written = part.written.saturating_add(chunk.len() as u64);
        if written > part.bytes {
            return Err(part.wrong_length(file, written));
        }
        file.write_at(part.start + part.written, chunk)?;
        part.advance(chunk);
        Ok(())
    }

    fn digests(&mut self, name: &str) -> Result<Vec<Digest>> {
        let tensor = &self.tensors[self.position(name)?];
        let file = &self.files[tensor.file];
        tensor.parts.iter().map(|part| part.digest(file)).collect()
    }

    fn adopt(&mut self, name: &str, digests: &[Digest]) -> Result<()> {
        let position = self.position(name)?;
        let tensor = &mut self.tensors[position];
        let file = &self.files[tensor.file];
        let invalid = |what| FormatError::InvalidTensor {
            path: file.current_path().to_owned(),
            name: name.to_owned(),
            what,
        };
        if digests.len() != tensor.parts.len() {
            return Err(invalid(format!(
                "has {} components, but {} digests were recorded",
                tensor.parts.len(),
                digests.len()
            )));
        }
        if tensor.parts.iter().any(|part| part.written > 0) {
            return Err(invalid("cannot be adopted: this run has begun to write it".to_owned()));
        }
        let mut found = vec![];
        for (part, expected) in tensor.parts.iter().zip(digests) {
            let digest = part.hash_file(file)?;
            if digest != *expected {
                return Err(invalid(format!(
                    "`{}` has sha256 {digest}, but {expected} was recorded",
                    part.name
                )));
            }
            found.push(digest);
        }
        for (part, digest) in tensor.parts.iter_mut().zip(found) {
            part.written = part.bytes;
            part.state = State::Complete(digest);
        }
        Ok(())
    }

    fn sync(&mut self) -> Result<()> {
        self.files.iter().try_for_each(OutputFile::sync)
    }

    fn finish(self: Box<Self>) -> Result<Vec<WrittenFile>> {
        for tensor in &self.tensors {
            let file = &self.files[tensor.file];
            tensor.parts.iter().try_for_each(|part| part.digest(file).map(|_| ()))?;
        }
        self.files.iter().try_for_each(OutputFile::sync)?;
        let mut written = vec![];
        for file in self.files {
            written.push(WrittenFile { path: file.path().to_owned(), bytes: file.bytes() });
            file.rename()?;
        }
        if let Some(text) = self.index {
            let path = self.directory.join(INDEX_NAME);
            OutputFile::write_whole(&path, text.as_bytes())?;
            written.push(WrittenFile { path, bytes: text.len() as u64 });
        }
        OutputFile::sync_directory(&self.directory)?;
        Ok(written)
    }

    fn abandon(self: Box<Self>) -> Result<()> {
        let removed: Vec<_> = self.files.into_iter().map(OutputFile::abandon).collect();
        removed.into_iter().collect()
    }
}

impl Part {
    fn new(name: String, start: u64, bytes: u64) -> Self {
        let state = match bytes {
            0 => State::Complete(Digest::of(&[])),
            _ => State::Open(HashingWriter::new(io::sink())),
        };
        Self { name, start, bytes, written: 0, state }
    }

    /// Counts and digests a chunk that is in the file.
    fn advance(&mut self, chunk: &[u8]) {
        self.written += chunk.len() as u64;
        if let State::Open(hasher) = &mut self.state {
            // A sink takes everything.
            let _ = hasher.write_all(chunk);
            if self.written == self.bytes {
                let hasher = std::mem::replace(hasher, HashingWriter::new(io::sink()));
                self.state = State::Complete(hasher.finish().1);
            }
        }
    }

    fn digest(&self, file: &OutputFile) -> Result<Digest> {
        match &self.state {
            State::Complete(digest) => Ok(*digest),
            State::Open(_) => Err(self.wrong_length(file, self.written)),
        }
    }

    fn hash_file(&self, file: &OutputFile) -> Result<Digest> {
        let mut hasher = HashingWriter::new(io::sink());
        let mut buffer = vec![0; ADOPT_CHUNK];
        let mut position = 0;
        while position < self.bytes {
            let len = (self.bytes - position).min(ADOPT_CHUNK as u64);
            let chunk = &mut buffer[..len as usize];
            file.read_at(self.start + position, chunk)?;
            let _ = hasher.write_all(chunk);
            position += len;
        }
        Ok(hasher.finish().1)
    }

    fn wrong_length(&self, file: &OutputFile, written: u64) -> FormatError {
        FormatError::WrongLength {
            path: file.current_path().to_owned(),
            name: self.name.clone(),
            written,
            expected: self.bytes,
        }
    }
}
