//! Header-first streaming writer.
//!
//! Phase one lays everything out and writes complete headers; phase two takes the data of each
//! component forward, in any interleaving of components. Nothing is buffered, and until
//! [`CheckpointWriter::finish`] there are only `*.part` files.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use super::{INDEX_NAME, index, layout};
use crate::{
    CheckpointWriter, Digest, Encoding, OutputFile, Result, WrittenFile,
    parts::{FileLayout, PartFiles},
};

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
    parts: PartFiles,
    /// Text of the index, for more than one shard.
    index: Option<String>,
}

impl SafetensorsWriter {
    /// Lays out and creates `*.part` files with complete headers. An existing part is an error; a
    /// finished file of the same name is replaced by [`CheckpointWriter::finish`].
    ///
    /// # Errors
    /// [`FormatError`](crate::FormatError): I/O; an encoding that cannot hold its shape or does not
    /// fit the container; names that are used twice. No part stays behind.
    pub fn create(dir: &Path, shards: &[ShardLayout]) -> Result<Box<dyn CheckpointWriter>> {
        let layouts = layout::lay_out(dir, shards)?;
        let index = index_text(&layouts);
        let parts = PartFiles::create(dir, layouts)?;
        Ok(Box::new(Self { directory: dir.to_owned(), parts, index }))
    }

    /// Reopens the `*.part` files of an interrupted run with the same layout. Nothing counts as
    /// written until it is [adopted](CheckpointWriter::adopt).
    ///
    /// # Errors
    /// [`FormatError`](crate::FormatError): I/O; a part whose header or length differs from the
    /// layout.
    pub fn resume(dir: &Path, shards: &[ShardLayout]) -> Result<Box<dyn CheckpointWriter>> {
        let layouts = layout::lay_out(dir, shards)?;
        let index = index_text(&layouts);
        let parts = PartFiles::resume(dir, layouts)?;
        Ok(Box::new(Self { directory: dir.to_owned(), parts, index }))
    }
}

/// The index of several shards.
pub(super) fn index_text(layouts: &[FileLayout]) -> Option<String> {
    let stored = layouts.iter().flat_map(|file| {
        let places = file.tensors.iter().flat_map(|(_, places)| places);
        places.map(|place| (place, file.name.as_str()))
    });
    (layouts.len() > 1).then(|| {
        let total = stored.clone().map(|(place, _)| place.bytes).sum();
        index::to_text(total, stored.map(|(place, file)| (place.name.as_str(), file)))
    })
}

impl CheckpointWriter for SafetensorsWriter {
    fn write(&mut self, name: &str, component: usize, chunk: &[u8]) -> Result<()> {
        self.parts.write(name, component, chunk)
    }

    fn digests(&mut self, name: &str) -> Result<Vec<Digest>> {
        self.parts.digests(name)
    }

    fn adopt(&mut self, name: &str, digests: &[Digest]) -> Result<()> {
        self.parts.adopt(name, digests)
    }

    fn sync(&mut self) -> Result<()> {
        self.parts.sync()
    }

    fn finish(self: Box<Self>) -> Result<Vec<WrittenFile>> {
        let mut written = self.parts.finish()?;
        if let Some(text) = self.index {
            let path = self.directory.join(INDEX_NAME);
            OutputFile::write_whole(&path, text.as_bytes())?;
            written.push(WrittenFile { path, bytes: text.len() as u64 });
        }
        OutputFile::sync_directory(&self.directory)?;
        Ok(written)
    }

    fn abandon(self: Box<Self>) -> Result<()> {
        self.parts.abandon()
    }
}
