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
            what: "planned and not made yet".to_owned(),
        })
    }

    fn prefetch(&self, _: &[&str]) {}

    fn release(&self, _: &[&str]) {}
}

#[cfg(test)]
mod tests {
    use sparsepack_formats::DType;

    use super::*;

    const F32: Encoding = Encoding::Dense { dtype: DType::F32 };

    fn outline(names: &[(&str, &[usize])]) -> Result<Outline, FormatError> {
        let metadata = ModelMetadata::HuggingFace {
            config: serde_json::json!({ "hidden_size": 3 }),
            directory: PathBuf::from("beside"),
        };
        let tensors = names.iter().map(|(name, shape)| ((*name).to_owned(), F32, shape.to_vec()));
        Outline::new(Path::new("source"), metadata, tensors)
    }

    #[test]
    fn names_shapes_and_sizes_are_there_and_no_data() {
        let outline = outline(&[("a.weight", &[3, 5]), ("b.bias", &[7])]).unwrap();
        assert_eq!(outline.path(), Path::new("source"));
        assert!(outline.files().is_empty());
        let tensors: Vec<_> =
            outline.tensors().iter().map(|t| (t.name.as_str(), t.stored_bytes)).collect();
        assert_eq!(tensors, [("a.weight", 60), ("b.bias", 28)]);
        assert_eq!(outline.tensors().get("a.weight").unwrap().shape, [3, 5]);
        outline.prefetch(&["a.weight"]);
        outline.release(&["a.weight"]);
    }

    #[test]
    fn reading_names_the_tensor() {
        let outline = outline(&[("a.weight", &[3, 5])]).unwrap();
        let expected = "source: tensor `a.weight`: planned and not made yet";
        assert_eq!(outline.components("a.weight").unwrap_err().to_string(), expected);
        assert_eq!(outline.read_f32("a.weight").unwrap_err().to_string(), expected);
        let mut rows = [0.0; 5];
        let error = outline.read_rows_f32("a.weight", 1..2, &mut rows).unwrap_err();
        assert_eq!(error.to_string(), expected);
        assert_eq!(outline.read_component("a.weight", 0, 0..4).unwrap_err().to_string(), expected);
    }

    #[test]
    fn a_name_twice_and_a_size_too_large_are_refused() {
        let error = outline(&[("a.weight", &[3, 5]), ("a.weight", &[3, 5])]).unwrap_err();
        assert!(error.to_string().contains("`a.weight`"), "{error}");
        let error = outline(&[("b.weight", &[usize::MAX, 2])]).unwrap_err();
        assert!(error.to_string().contains("b.weight"), "{error}");
    }
}
