//! GGUF, the container of llama.cpp.

use std::path::Path;

use crate::{CheckpointReader, MappedFile, ModelMetadata, Result, TensorIndex};

/// First four bytes of every GGUF file.
pub const MAGIC: &[u8; 4] = b"GGUF";

/// Typed key-value pairs in file order.
#[derive(Debug, Clone, Default)]
pub struct GgufMetadata;

/// Reads GGUF version 2 and 3.
#[derive(Debug)]
pub struct GgufReader {
    file: MappedFile,
    tensors: TensorIndex,
    metadata: ModelMetadata,
}

impl GgufReader {
    /// Reads the header.
    ///
    /// # Errors
    /// Named defects of the header.
    pub fn new(file: MappedFile) -> Result<Self> {
        let metadata = ModelMetadata::Gguf(GgufMetadata);
        Ok(Self { file, tensors: TensorIndex::default(), metadata })
    }
}

impl CheckpointReader for GgufReader {
    fn path(&self) -> &Path {
        self.file.path()
    }
    fn files(&self) -> Vec<&Path> {
        vec![self.file.path()]
    }
    fn tensors(&self) -> &TensorIndex {
        &self.tensors
    }
    fn metadata(&self) -> &ModelMetadata {
        &self.metadata
    }
    fn components(&self, name: &str) -> Result<Vec<&[u8]>> {
        Err(crate::FormatError::TensorNotFound { path: self.path().into(), name: name.into() })
    }
    fn prefetch(&self, _names: &[&str]) {}
    fn release(&self, _names: &[&str]) {}
}
