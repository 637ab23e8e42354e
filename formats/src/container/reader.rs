//! Reading: the index first, then only the chunks that hold what is asked for.

use std::{
    borrow::Cow,
    collections::HashMap,
    ops::Range,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use super::{
    FILE_NAME, OriginalFile, chunk, footer, header,
    index::{Index, TensorEntry, chunk_range},
};
use crate::{
    CheckpointReader, Component, Digest, FormatError, MappedFile, ModelMetadata, Result,
    StoredRows, TensorIndex, TensorInfo, safetensors,
};

/// Reads `model.spz`, alone or in its directory.
#[derive(Debug)]
pub struct ContainerReader {
    path: PathBuf,
    file: MappedFile,
    index: Index,
    /// Of every tensor, in the order of the index.
    components: Vec<Vec<Component>>,
    tensors: TensorIndex,
    metadata: ModelMetadata,
    /// The last chunk of which only a part was asked for: the rest often comes next.
    last: Mutex<Option<Cached>>,
}

#[derive(Debug)]
struct Cached {
    /// Tensor, component and chunk.
    key: [usize; 3],
    bytes: Arc<Vec<u8>>,
}

/// A piece of a restored file: a component of a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FilePart {
    /// Logical name.
    pub tensor: String,
    /// Position among its components.
    pub component: usize,
    /// Size.
    pub bytes: u64,
}

impl ContainerReader {
    /// Opens a directory with `config.json` and `model.spz`.
    ///
    /// # Errors
    /// [`FormatError`] naming the file, and the tensor if it is one tensor's defect.
    pub fn open_dir(path: &Path) -> Result<Self> {
        let metadata = ModelMetadata::read_config(path)?;
        Self::open(path, MappedFile::open(&path.join(FILE_NAME))?, metadata)
    }

    /// Opens a file without configuration.
    ///
    /// # Errors
    /// [`FormatError`] naming the file, and the tensor if it is one tensor's defect.
    pub fn open_file(file: MappedFile) -> Result<Self> {
        let path = file.path().to_owned();
        Self::open(&path, file, ModelMetadata::Bare)
    }

    fn open(path: &Path, file: MappedFile, metadata: ModelMetadata) -> Result<Self> {
        header::check(file.path(), file.bytes())?;
        let (index, end) = footer::read(file.path(), file.bytes())?;
        let components = index.check(file.path(), file.bytes(), end)?;
        let mut tensors = TensorIndex::default();
        for entry in &index.tensors {
            let info = TensorInfo {
                name: entry.name.clone(),
                encoding: entry.encoding,
                shape: entry.shape.clone(),
                stored_bytes: entry.stored_bytes(),
            };
            tensors.push(file.path(), info)?;
        }
        let path = path.to_owned();
        let last = Mutex::new(None);
        Ok(Self { path, file, index, components, tensors, metadata, last })
    }

    /// Bytes of a component that are compressed together.
    pub fn chunk_bytes(&self) -> u64 {
        self.index.chunk_bytes
    }

    /// Recorded digests of a tensor's components, of their bytes before compression.
    ///
    /// # Errors
    /// [`FormatError::TensorNotFound`].
    pub fn digests(&self, name: &str) -> Result<Vec<Digest>> {
        let entry = &self.index.tensors[self.position(name)?];
        Ok(entry.components.iter().map(|component| component.sha256).collect())
    }

    /// What follows the start of `file`, in order.
    ///
    /// # Errors
    /// [`FormatError`] for a header that does not fit, or that names a tensor which is not here or is
    /// of another size.
    pub fn parts(&self, file: &OriginalFile) -> Result<Vec<FilePart>> {
        if file.bytes == file.head.len() as u64 {
            return Ok(vec![]);
        }
        // A restored header is at fault under its own name.
        let path = self.file.path().join(&file.name);
        let mut stored = HashMap::new();
        for (entry, components) in self.index.tensors.iter().zip(&self.components) {
            for (position, component) in components.iter().enumerate() {
                let name = entry.encoding.component_name(&entry.name, component);
                stored.insert(name, (entry, position, component));
            }
        }
        let parts = safetensors::stored_tensors(&path, &file.head, file.bytes)?;
        parts
            .into_iter()
            .map(|(name, bytes)| match stored.get(&name) {
                None => Err(FormatError::TensorNotFound { path: path.clone(), name }),
                Some((_, _, component)) if component.bytes != bytes => {
                    let what =
                        format!("has {bytes} bytes in the header, but {} here", component.bytes);
                    Err(FormatError::InvalidTensor { path: path.clone(), name, what })
                }
                Some((entry, component, _)) => {
                    Ok(FilePart { tensor: entry.name.clone(), component: *component, bytes })
                }
            })
            .collect()
    }

    fn position(&self, name: &str) -> Result<usize> {
        self.tensors.position(name).ok_or_else(|| FormatError::TensorNotFound {
            path: self.path.clone(),
            name: name.to_owned(),
        })
    }

    fn invalid(&self, tensor: usize, what: String) -> FormatError {
        FormatError::InvalidTensor {
            path: self.file.path().to_owned(),
            name: self.index.tensors[tensor].name.clone(),
            what,
        }
    }

    fn read(&self, tensor: usize, component: usize, range: Range<u64>) -> Result<Vec<u8>> {
        let described = self.components[tensor].get(component);
        let Some(described) =
            described.filter(|c| range.start <= range.end && range.end <= c.bytes)
        else {
            return Err(self.invalid(
                tensor,
                format!("bytes {range:?} of component {component} are beyond its end"),
            ));
        };
        let mut out = vec![];
        out.try_reserve_exact((range.end - range.start) as usize).map_err(|_| {
            let bytes = range.end - range.start;
            self.invalid(tensor, format!("{bytes} bytes do not fit in memory"))
        })?;
        let chunk_bytes = self.index.chunk_bytes;
        let chunks = range.start / chunk_bytes..range.end.div_ceil(chunk_bytes);
        for chunk in chunks.start as usize..chunks.end as usize {
            let held = chunk_range(described, chunk_bytes, chunk);
            let wanted = range.start.max(held.start)..range.end.min(held.end);
            if wanted == held {
                out.extend(self.decompress([tensor, component, chunk])?);
                continue;
            }
            let bytes = self.cached([tensor, component, chunk])?;
            let within = (wanted.start - held.start) as usize..(wanted.end - held.start) as usize;
            out.extend_from_slice(&bytes[within]);
        }
        Ok(out)
    }

    fn cached(&self, key: [usize; 3]) -> Result<Arc<Vec<u8>>> {
        let lock = || self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(cached) = lock().as_ref().filter(|cached| cached.key == key) {
            return Ok(cached.bytes.clone());
        }
        let bytes = Arc::new(self.decompress(key)?);
        *lock() = Some(Cached { key, bytes: bytes.clone() });
        Ok(bytes)
    }

    fn decompress(&self, [tensor, component, chunk]: [usize; 3]) -> Result<Vec<u8>> {
        let described = &self.components[tensor][component];
        let held = chunk_range(described, self.index.chunk_bytes, chunk);
        let entry = &self.index.tensors[tensor].components[component].chunks[chunk];
        let raw_bytes = (held.end - held.start) as usize;
        entry
            .decompress(self.file.bytes(), 0, described, raw_bytes)
            .map_err(|what| self.invalid(tensor, what))
    }

    fn for_each_range(&self, names: &[&str], act: impl Fn(Range<usize>)) {
        for tensor in names.iter().filter_map(|name| self.tensors.position(name)) {
            let entry = &self.index.tensors[tensor];
            let chunks = entry.components.iter().flat_map(|component| &component.chunks);
            if let Some(start) = chunks.map(|chunk| chunk.offset as usize).min() {
                // Frames of one tensor lie together.
                act(start..start + entry.stored_bytes() as usize);
            }
        }
    }
}

impl CheckpointReader for ContainerReader {
    fn path(&self) -> &Path {
        &self.path
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

    fn components(&self, name: &str) -> Result<Vec<Cow<'_, [u8]>>> {
        let tensor = self.position(name)?;
        let components = self.components[tensor].iter().enumerate();
        components
            .map(|(position, component)| {
                self.read(tensor, position, 0..component.bytes).map(Cow::Owned)
            })
            .collect()
    }

    fn read_component(
        &self,
        name: &str,
        component: usize,
        range: Range<u64>,
    ) -> Result<Cow<'_, [u8]>> {
        self.read(self.position(name)?, component, range).map(Cow::Owned)
    }

    fn rows(&self, name: &str, rows: Range<usize>) -> Result<StoredRows<'_>> {
        let tensor = self.position(name)?;
        let TensorEntry { encoding, shape, .. } = &self.index.tensors[tensor];
        let Some(ranges) = encoding.row_ranges(name, shape, rows.clone())? else {
            return Ok(StoredRows { shape: shape.clone(), rows, parts: self.components(name)? });
        };
        let parts = ranges
            .into_iter()
            .enumerate()
            .map(|(component, range)| self.read(tensor, component, range).map(Cow::Owned));
        Ok(StoredRows {
            shape: vec![rows.len(), crate::encoding::MatrixShape::of(shape).cols],
            rows: 0..rows.len(),
            parts: parts.collect::<Result<_>>()?,
        })
    }

    fn original_files(&self) -> Result<Vec<OriginalFile>> {
        let files = self.index.files.iter();
        files
            .map(|file| {
                let invalid = |what| FormatError::InvalidHeader {
                    path: self.file.path().to_owned(),
                    offset: file.offset,
                    what: format!("the start of `{}`: {what}", file.name),
                };
                let frame = file.offset as usize..(file.offset + file.frame) as usize;
                let head = chunk::decompress_whole(&self.file.bytes()[frame], file.head as usize)
                    .map_err(invalid)?;
                if Digest::of(&head) != file.sha256 {
                    return Err(invalid("does not have the recorded sha256".to_owned()));
                }
                Ok(OriginalFile { name: file.name.clone(), head, bytes: file.bytes })
            })
            .collect()
    }

    fn prefetch(&self, names: &[&str]) {
        self.for_each_range(names, |range| self.file.prefetch(range));
    }

    fn release(&self, names: &[&str]) {
        self.for_each_range(names, |range| self.file.release(range));
    }
}
