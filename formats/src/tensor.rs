//! What a checkpoint says about its tensors before any data is read.

use std::collections::HashMap;

use crate::{Encoding, FormatError, Result};

/// Name, encoding and shape of one logical tensor.
///
/// A packed tensor is one logical tensor here, however many stored components it has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Tensor name as stored (Hugging Face or GGUF naming).
    pub name: String,
    /// How the values are stored.
    pub encoding: Encoding,
    /// Row-major shape: `[out_features, in_features]` for a linear weight, also for GGUF,
    /// whose file lists dimensions the other way round.
    pub shape: Vec<usize>,
    /// Bytes of all stored components together.
    pub stored_bytes: u64,
}

impl TensorInfo {
    /// Number of elements. Readers refuse a shape where this does not fit; of a shape made elsewhere,
    /// it is then `usize::MAX`.
    pub fn elements(&self) -> usize {
        if self.shape.contains(&0) {
            return 0;
        }
        self.shape.iter().fold(1, |elements, &dim| elements.saturating_mul(dim))
    }
}

/// The tensors of a checkpoint in stored order, found by name. Names are unique.
#[derive(Debug, Clone, Default)]
pub struct TensorIndex {
    tensors: Vec<TensorInfo>,
    by_name: HashMap<String, usize>,
}

impl TensorIndex {
    /// Adds a tensor.
    ///
    /// # Errors
    /// [`FormatError::DuplicateTensor`] when the name is taken.
    pub fn push(&mut self, path: &std::path::Path, info: TensorInfo) -> Result<()> {
        if self.by_name.insert(info.name.clone(), self.tensors.len()).is_some() {
            return Err(FormatError::DuplicateTensor { path: path.to_owned(), name: info.name });
        }
        self.tensors.push(info);
        Ok(())
    }

    /// The tensor called `name`.
    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.position(name).map(|position| &self.tensors[position])
    }

    /// Where `name` stands in stored order.
    pub fn position(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    /// All tensors in stored order.
    pub fn iter(&self) -> std::slice::Iter<'_, TensorInfo> {
        self.tensors.iter()
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }
}

impl<'a> IntoIterator for &'a TensorIndex {
    type Item = &'a TensorInfo;
    type IntoIter = std::slice::Iter<'a, TensorInfo>;
    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// Most tensors in one file. Sharded mixture-of-experts checkpoints stay below 100 000.
pub(crate) const MAX_TENSORS: usize = 500_000;

/// Longest tensor name.
const MAX_NAME_BYTES: usize = 4096;

/// What is wrong with a tensor's name. Names become part of messages and of other files, never of
/// paths, so dots and slashes are harmless.
pub(crate) fn name_defect(name: &str) -> Option<String> {
    if name.is_empty() {
        return Some("the name is empty".to_owned());
    }
    if name.len() > MAX_NAME_BYTES {
        return Some(format!("the name has {} bytes, more than {MAX_NAME_BYTES}", name.len()));
    }
    name.chars()
        .find(|c| c.is_control())
        .map(|c| format!("the name holds the control character {c:?}"))
}
