//! Header-first streaming writer of GGUF version 3, little endian.
//!
//! Phase one lays everything out and writes complete headers; phase two takes the data of each
//! tensor forward. Until [`CheckpointWriter::finish`] there are only `*.part` files.

use std::path::{Path, PathBuf};

use super::layout::{self, GgufLayout};
use crate::{CheckpointWriter, Digest, OutputFile, Result, WrittenFile, parts::PartFiles};

/// Writes `model.gguf`, or the files of a split.
#[derive(Debug)]
pub struct GgufWriter {
    directory: PathBuf,
    parts: PartFiles,
}

impl GgufWriter {
    /// Lays out and creates `*.part` files with complete headers. An existing part is an error; a
    /// finished file of the same name is replaced by [`CheckpointWriter::finish`].
    ///
    /// # Errors
    /// [`FormatError`](crate::FormatError): I/O; a type that GGUF does not have; names, shapes and
    /// values that the reader would refuse. No part stays behind.
    pub fn create(dir: &Path, layout: &GgufLayout) -> Result<Box<dyn CheckpointWriter>> {
        let parts = PartFiles::create(dir, layout::lay_out(dir, layout)?)?;
        Ok(Box::new(Self { directory: dir.to_owned(), parts }))
    }

    /// Reopens the `*.part` files of an interrupted run with the same layout. Nothing counts as
    /// written until it is [adopted](CheckpointWriter::adopt).
    ///
    /// # Errors
    /// [`FormatError`](crate::FormatError): I/O; a part whose header or length differs from the
    /// layout.
    pub fn resume(dir: &Path, layout: &GgufLayout) -> Result<Box<dyn CheckpointWriter>> {
        let parts = PartFiles::resume(dir, layout::lay_out(dir, layout)?)?;
        Ok(Box::new(Self { directory: dir.to_owned(), parts }))
    }
}

impl CheckpointWriter for GgufWriter {
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
        let written = self.parts.finish()?;
        OutputFile::sync_directory(&self.directory)?;
        Ok(written)
    }

    fn abandon(self: Box<Self>) -> Result<()> {
        self.parts.abandon()
    }
}
