//! Reading: one file or a directory of shards.

use std::{
    borrow::Cow,
    ops::Range,
    path::{Path, PathBuf},
};

use super::{
    CONFIG_NAME, INDEX_NAME, SINGLE_NAME,
    declared::{self, Located},
    header::Header,
    index::ShardIndex,
    original::head_of,
};
use crate::{
    CheckpointReader, FormatError, MappedFile, ModelMetadata, Result, TensorIndex,
    compressed_tensors::{Found, Storage},
    container::OriginalFile,
    file::io_error,
};

/// Reads one safetensors file or a directory of shards.
#[derive(Debug)]
pub struct SafetensorsReader {
    path: PathBuf,
    files: Vec<MappedFile>,
    tensors: TensorIndex,
    /// Where each tensor of the index lies.
    places: Vec<Place>,
    metadata: ModelMetadata,
}

/// For each component, the number of its file and its bytes there.
type Place = Vec<(usize, Range<usize>)>;

impl SafetensorsReader {
    /// Opens a Hugging Face directory: `config.json` and either `model.safetensors` or
    /// `model.safetensors.index.json` with its shards.
    ///
    /// # Errors
    /// [`FormatError`] naming the file, and the tensor if it is one tensor's defect.
    pub fn open_dir(path: &Path) -> Result<Self> {
        let metadata = ModelMetadata::read_config(path)?;
        let storage = match &metadata {
            ModelMetadata::HuggingFace { config, .. } => {
                Storage::from_config(&path.join(CONFIG_NAME), config)?
            }
            _ => Storage::Plain,
        };
        let mut reader = Self::empty(path, metadata);
        let mut found = vec![];
        let (single, index_path) = (path.join(SINGLE_NAME), path.join(INDEX_NAME));
        if single.is_file() {
            found = reader.add(MappedFile::open(&single)?, |_| Ok(()))?;
        } else if index_path.is_file() {
            let mut index = ShardIndex::read(&index_path)?;
            for shard in index.shards.clone() {
                let file = MappedFile::open(&path.join(&shard))?;
                found.extend(reader.add(file, |header| index.claim(&index_path, &shard, header))?);
            }
            index.finish(&index_path)?;
        } else {
            return Err(FormatError::UnknownFormat {
                path: path.to_owned(),
                found: format!("a directory without {SINGLE_NAME} and {INDEX_NAME}"),
            });
        }
        let joined = storage.join(&reader.files, found)?;
        reader.list(joined)?;
        Ok(reader)
    }

    /// Opens one file without configuration.
    ///
    /// # Errors
    /// [`FormatError`] naming the file, and the tensor if it is one tensor's defect.
    pub fn open_file(file: MappedFile) -> Result<Self> {
        let mut reader = Self::empty(file.path(), ModelMetadata::Bare);
        let found = reader.add(file, |_| Ok(()))?;
        reader.list(found)?;
        Ok(reader)
    }

    fn empty(path: &Path, metadata: ModelMetadata) -> Self {
        Self {
            path: path.to_owned(),
            files: vec![],
            tensors: TensorIndex::default(),
            places: vec![],
            metadata,
        }
    }

    /// Adds a file after `check` has seen its header, and returns the tensors in it.
    fn add(
        &mut self,
        file: MappedFile,
        check: impl FnOnce(&Header) -> Result<()>,
    ) -> Result<Vec<Found>> {
        let header = Header::parse(file.path(), file.bytes(), file.bytes().len() as u64)?;
        check(&header)?;
        let number = self.files.len();
        let located = declared::logical_tensors(file.path(), &header)?;
        self.files.push(file);
        let found = |Located { info, parts }| Found {
            info,
            parts: parts.into_iter().map(|part| (number, part)).collect(),
        };
        Ok(located.into_iter().map(found).collect())
    }

    fn list(&mut self, tensors: Vec<Found>) -> Result<()> {
        for Found { info, parts } in tensors {
            let file = parts.first().map_or(0, |(file, _)| *file);
            self.tensors.push(self.files[file].path(), info)?;
            self.places.push(parts);
        }
        Ok(())
    }

    fn place(&self, name: &str) -> Option<&Place> {
        Some(&self.places[self.tensors.position(name)?])
    }

    fn for_each_range(&self, names: &[&str], act: impl Fn(&MappedFile, Range<usize>)) {
        for (file, part) in names.iter().filter_map(|name| self.place(name)).flatten() {
            if !part.is_empty() {
                act(&self.files[*file], part.clone());
            }
        }
    }
}

impl CheckpointReader for SafetensorsReader {
    fn path(&self) -> &Path {
        &self.path
    }

    fn files(&self) -> Vec<&Path> {
        self.files.iter().map(MappedFile::path).collect()
    }

    fn tensors(&self) -> &TensorIndex {
        &self.tensors
    }

    fn metadata(&self) -> &ModelMetadata {
        &self.metadata
    }

    fn components(&self, name: &str) -> Result<Vec<Cow<'_, [u8]>>> {
        let place = self.place(name).ok_or_else(|| FormatError::TensorNotFound {
            path: self.path.clone(),
            name: name.to_owned(),
        })?;
        let bytes = |file: usize| self.files[file].bytes();
        Ok(place.iter().map(|(file, part)| Cow::Borrowed(&bytes(*file)[part.clone()])).collect())
    }

    fn original_files(&self) -> Result<Vec<OriginalFile>> {
        let ModelMetadata::HuggingFace { directory, .. } = &self.metadata else {
            return Ok(vec![]);
        };
        let mut originals = vec![];
        for file in &self.files {
            let Some(name) = file.path().file_name().and_then(|name| name.to_str()) else {
                return Ok(vec![]);
            };
            let (head, bytes) = (head_of(file.bytes()).to_vec(), file.bytes().len() as u64);
            originals.push(OriginalFile { name: name.to_owned(), head, bytes });
        }
        for name in [INDEX_NAME, CONFIG_NAME] {
            let path = directory.join(name);
            if path.is_file() {
                let content = std::fs::read(&path).map_err(io_error(&path, "read"))?;
                originals.push(OriginalFile::whole(name, content));
            }
        }
        Ok(originals)
    }

    fn prefetch(&self, names: &[&str]) {
        self.for_each_range(names, MappedFile::prefetch);
    }

    fn release(&self, names: &[&str]) {
        self.for_each_range(names, MappedFile::release);
    }
}
