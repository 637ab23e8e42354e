//! Header-first streaming writer.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use crate::{Digest, Encoding, Result};

/// One output shard: its tensors in order and its string metadata.
#[derive(Debug, Clone, Default)]
pub struct ShardLayout {
    /// Tensors in file order: name, encoding, shape.
    pub tensors: Vec<(String, Encoding, Vec<usize>)>,
    /// Further string pairs for the header's `__metadata__`.
    pub metadata: BTreeMap<String, String>,
}

/// A finished file.
#[derive(Debug, Clone)]
pub struct WrittenFile {
    /// Final path.
    pub path: PathBuf,
    /// Size.
    pub bytes: u64,
}

/// Writes safetensors shards.
#[derive(Debug)]
pub struct SafetensorsWriter;

impl SafetensorsWriter {
    /// Lays out and creates `*.part` files with complete headers.
    ///
    /// # Errors
    /// I/O; encodings that cannot hold a shape; duplicate names.
    pub fn create(_dir: &Path, _shards: &[ShardLayout]) -> Result<Self> {
        Ok(Self)
    }

    /// Reopens the `*.part` files of an interrupted run with the same layout.
    ///
    /// # Errors
    /// I/O; a part whose header or length differs from the layout.
    pub fn resume(_dir: &Path, _shards: &[ShardLayout]) -> Result<Self> {
        Ok(Self)
    }

    /// Appends bytes to component `component` of tensor `name`.
    ///
    /// # Errors
    /// I/O; more bytes than declared.
    pub fn write(&mut self, _name: &str, _component: usize, _chunk: &[u8]) -> Result<()> {
        Ok(())
    }

    /// Digests of the components of a tensor whose bytes are all written.
    ///
    /// # Errors
    /// The tensor is not complete.
    pub fn digests(&mut self, _name: &str) -> Result<Vec<Digest>> {
        Ok(vec![])
    }

    /// Marks a tensor as written by the interrupted run, after comparing the bytes with `digests`.
    ///
    /// # Errors
    /// I/O; a digest that differs.
    pub fn adopt(&mut self, _name: &str, _digests: &[Digest]) -> Result<()> {
        Ok(())
    }

    /// Flushes to disk what was written so far.
    ///
    /// # Errors
    /// I/O.
    pub fn sync(&mut self) -> Result<()> {
        Ok(())
    }

    /// Checks that every tensor is complete, syncs and renames.
    ///
    /// # Errors
    /// I/O; an incomplete tensor.
    pub fn finish(self) -> Result<Vec<WrittenFile>> {
        Ok(vec![])
    }
}
