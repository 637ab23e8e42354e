//! safetensors.

pub mod writer;

use std::path::Path;

use crate::{CheckpointReader, MappedFile, ModelMetadata, Result, TensorIndex};

/// Reads one safetensors file or a directory of shards.
#[derive(Debug)]
pub struct SafetensorsReader {
    tensors: TensorIndex,
    metadata: ModelMetadata,
}

impl SafetensorsReader {
    /// Opens a Hugging Face directory.
    ///
    /// # Errors
    /// Named defects.
    pub fn open_dir(_path: &Path) -> Result<Self> {
        Ok(Self { tensors: TensorIndex::default(), metadata: ModelMetadata::Bare })
    }

    /// Opens one file without configuration.
    ///
    /// # Errors
    /// Named defects.
    pub fn open_file(_file: MappedFile) -> Result<Self> {
        Ok(Self { tensors: TensorIndex::default(), metadata: ModelMetadata::Bare })
    }
}

impl CheckpointReader for SafetensorsReader {
    fn path(&self) -> &Path {
        Path::new("")
    }
    fn files(&self) -> Vec<&Path> {
        vec![]
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
