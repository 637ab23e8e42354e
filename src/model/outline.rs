//! A checkpoint that is still to be made: everything that a plan looks at, and no data.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use sparsepack_formats::{
    CheckpointReader, Encoding, FormatError, ModelMetadata, TensorIndex, TensorInfo,
};

/// Names, shapes and configuration of tensors that do not exist yet. Reading one is an error.
#[derive(Debug)]
pub(super) struct Outline {
    /// What it is made from.
    path: PathBuf,
    tensors: TensorIndex,
    metadata: ModelMetadata,
}

impl Outline {
    /// An outline of these tensors.
    ///
    /// # Errors
    /// A name that occurs twice; sizes that overflow.
    pub(super) fn new(
        path: &Path,
        metadata: ModelMetadata,
        tensors: impl IntoIterator<Item = (String, Encoding, Vec<usize>)>,
    ) -> Result<Self, FormatError> {
        let mut index = TensorIndex::default();
        for (name, encoding, shape) in tensors {
            let components = encoding.components(&name, &shape)?;
            let stored_bytes = components.iter().map(|component| component.bytes).sum();
            index.push(path, TensorInfo { name, encoding, shape, stored_bytes })?;
        }
        Ok(Self { path: path.to_owned(), tensors: index, metadata })
    }
}

impl CheckpointReader for Outline {
    fn path(&self) -> &Path {
        &self.path
    }

    fn files(&self) -> Vec<&Path> {
        Vec::new()
    }

    fn tensors(&self) -> &TensorIndex {
        &self.tensors
    }

    fn metadata(&self) -> &ModelMetadata {
        &self.metadata
    }

    fn components(&self, name: &str) -> Result<Vec<Cow<'_, [u8]>>, FormatError> {
        Err(FormatError::InvalidTensor {
            path: self.path.clone(),
            name: name.to_owned(),
            what: "is planned and not made yet".to_owned(),
        })
    }

    fn prefetch(&self, _: &[&str]) {}

    fn release(&self, _: &[&str]) {}
}
