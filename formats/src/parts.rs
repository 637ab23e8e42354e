//! Files whose byte ranges are all known before any data: the base of every writer of that kind.
//!
//! A [`FileLayout`] has the bytes of a header and, for each tensor, the places of its components.
//! Data of a component streams forward, components and tensors in any interleaving, and is
//! digested on the way.

use std::{
    collections::HashMap,
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use crate::{Digest, FormatError, HashingWriter, OutputFile, Result, WrittenFile};

/// Bytes read at a time when an interrupted run's data is hashed again.
const ADOPT_CHUNK: usize = 1 << 20;

/// One file, laid out to the byte.
#[derive(Debug)]
pub(crate) struct FileLayout {
    /// Name inside the directory.
    pub(crate) name: String,
    /// The bytes before the data.
    pub(crate) header: Vec<u8>,
    /// Size of the file.
    pub(crate) bytes: u64,
    /// Tensors by name, each with the places of its components in order.
    pub(crate) tensors: Vec<(String, Vec<Place>)>,
}

/// Where one stored component lies in its file.
#[derive(Debug)]
pub(crate) struct Place {
    /// Stored name, for errors.
    pub(crate) name: String,
    pub(crate) start: u64,
    pub(crate) bytes: u64,
}

/// `*.part` files that are being filled.
#[derive(Debug)]
pub(crate) struct PartFiles {
    directory: PathBuf,
    files: Vec<OutputFile>,
    tensors: Vec<Tensor>,
    by_name: HashMap<String, usize>,
}

#[derive(Debug)]
struct Tensor {
    file: usize,
    parts: Vec<Part>,
}

/// One stored component and how far it is written.
#[derive(Debug)]
struct Part {
    place: Place,
    written: u64,
    state: State,
}

#[derive(Debug)]
enum State {
    Open(HashingWriter<io::Sink>),
    Complete(Digest),
}

impl PartFiles {
    /// Creates the parts at their full size and writes their headers. None stays behind on failure.
    pub(crate) fn create(directory: &Path, layouts: Vec<FileLayout>) -> Result<Self> {
        let mut files = vec![];
        for layout in &layouts {
            let created =
                OutputFile::create(&directory.join(&layout.name), layout.bytes).and_then(|file| {
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
        Ok(Self::new(directory, files, layouts))
    }

    /// Reopens the parts of an interrupted run, whose headers and sizes must be these. Nothing
    /// counts as written until it is [adopted](Self::adopt).
    pub(crate) fn resume(directory: &Path, layouts: Vec<FileLayout>) -> Result<Self> {
        let mut files = vec![];
        for layout in &layouts {
            let file = OutputFile::reopen(&directory.join(&layout.name), layout.bytes)?;
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
        Ok(Self::new(directory, files, layouts))
    }

    fn new(directory: &Path, files: Vec<OutputFile>, layouts: Vec<FileLayout>) -> Self {
        let mut tensors = vec![];
        let mut by_name = HashMap::new();
        for (file, layout) in layouts.into_iter().enumerate() {
            for (name, places) in layout.tensors {
                by_name.insert(name, tensors.len());
                let parts = places.into_iter().map(Part::new).collect();
                tensors.push(Tensor { file, parts });
            }
        }
        Self { directory: directory.to_owned(), files, tensors, by_name }
    }

    fn position(&self, name: &str) -> Result<usize> {
        self.by_name.get(name).copied().ok_or_else(|| FormatError::TensorNotFound {
            path: self.directory.clone(),
            name: name.to_owned(),
        })
    }

    /// [`CheckpointWriter::write`](crate::CheckpointWriter::write).
    pub(crate) fn write(&mut self, name: &str, component: usize, chunk: &[u8]) -> Result<()> {
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
        if written > part.place.bytes {
            return Err(part.wrong_length(file, written));
        }
        file.write_at(part.place.start + part.written, chunk)?;
        part.advance(chunk);
        Ok(())
    }

    /// [`CheckpointWriter::digests`](crate::CheckpointWriter::digests).
    pub(crate) fn digests(&self, name: &str) -> Result<Vec<Digest>> {
        let tensor = &self.tensors[self.position(name)?];
        let file = &self.files[tensor.file];
        tensor.parts.iter().map(|part| part.digest(file)).collect()
    }

    /// [`CheckpointWriter::adopt`](crate::CheckpointWriter::adopt).
    pub(crate) fn adopt(&mut self, name: &str, digests: &[Digest]) -> Result<()> {
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
                    part.place.name
                )));
            }
            found.push(digest);
        }
        for (part, digest) in tensor.parts.iter_mut().zip(found) {
            part.written = part.place.bytes;
            part.state = State::Complete(digest);
        }
        Ok(())
    }

    /// [`CheckpointWriter::sync`](crate::CheckpointWriter::sync).
    pub(crate) fn sync(&self) -> Result<()> {
        self.files.iter().try_for_each(OutputFile::sync)
    }

    /// Checks that every tensor is complete, syncs and renames, in order. The directory is the
    /// caller's to sync.
    pub(crate) fn finish(self) -> Result<Vec<WrittenFile>> {
        for tensor in &self.tensors {
            let file = &self.files[tensor.file];
            tensor.parts.iter().try_for_each(|part| part.digest(file).map(|_| ()))?;
        }
        self.sync()?;
        let mut written = vec![];
        for file in self.files {
            written.push(WrittenFile { path: file.path().to_owned(), bytes: file.bytes() });
            file.rename()?;
        }
        Ok(written)
    }

    /// [`CheckpointWriter::abandon`](crate::CheckpointWriter::abandon).
    pub(crate) fn abandon(self) -> Result<()> {
        let removed: Vec<_> = self.files.into_iter().map(OutputFile::abandon).collect();
        removed.into_iter().collect()
    }
}

impl Part {
    fn new(place: Place) -> Self {
        let state = match place.bytes {
            0 => State::Complete(Digest::of(&[])),
            _ => State::Open(HashingWriter::new(io::sink())),
        };
        Self { place, written: 0, state }
    }

    /// Counts and digests a chunk that is in the file.
    fn advance(&mut self, chunk: &[u8]) {
        self.written += chunk.len() as u64;
        if let State::Open(hasher) = &mut self.state {
            // A sink takes everything.
            let _ = hasher.write_all(chunk);
            if self.written == self.place.bytes {
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
        while position < self.place.bytes {
            let len = (self.place.bytes - position).min(ADOPT_CHUNK as u64);
            let chunk = &mut buffer[..len as usize];
            file.read_at(self.place.start + position, chunk)?;
            let _ = hasher.write_all(chunk);
            position += len;
        }
        Ok(hasher.finish().1)
    }

    fn wrong_length(&self, file: &OutputFile, written: u64) -> FormatError {
        FormatError::WrongLength {
            path: file.current_path().to_owned(),
            name: self.place.name.clone(),
            written,
            expected: self.place.bytes,
        }
    }
}
