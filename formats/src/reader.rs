//! Opening a checkpoint: content decides the format, and every file is memory-mapped.

use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::{FormatError, Result, TensorIndex, gguf::GgufMetadata};

/// What a checkpoint says about the model besides its tensors.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum ModelMetadata {
    /// A Hugging Face directory.
    HuggingFace {
        /// `config.json`, whole.
        config: serde_json::Value,
        /// The directory, from which sidecar files (tokenizer, generation config) can be copied.
        directory: PathBuf,
    },
    /// Bare safetensors, with no configuration beside it.
    Bare,
    /// The typed key-value pairs of a GGUF file.
    Gguf(GgufMetadata),
}

/// A readable checkpoint. Data is borrowed from the memory map; nothing is loaded ahead.
pub trait CheckpointReader: Send + Sync + std::fmt::Debug {
    /// Where it was opened from.
    fn path(&self) -> &Path;

    /// The data files, for digests.
    fn files(&self) -> Vec<&Path>;

    /// Every logical tensor, in stored order.
    fn tensors(&self) -> &TensorIndex;

    /// What the checkpoint says of the model.
    fn metadata(&self) -> &ModelMetadata;

    /// The stored components of `name`, in [`Encoding::components`](crate::Encoding::components)
    /// order, borrowed from the map.
    ///
    /// # Errors
    /// [`FormatError::TensorNotFound`].
    fn components(&self, name: &str) -> Result<Vec<&[u8]>>;

    /// Decodes a whole tensor to f32, row-major.
    ///
    /// # Errors
    /// As [`components`](Self::components), or data that does not decode.
    fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        let info = self.tensors().get(name).ok_or_else(|| FormatError::TensorNotFound {
            path: self.path().to_owned(),
            name: name.to_owned(),
        })?;
        let matrix = crate::encoding::MatrixShape::of(&info.shape);
        // The size is bounded: the reader checked that the stored bytes exist in the file.
        let mut out = vec![0.0; info.elements()];
        let parts = self.components(name)?;
        info.encoding.decode_f32(name, &info.shape, &parts, 0..matrix.rows, &mut out)?;
        Ok(out)
    }

    /// Asks the system to read these tensors' pages ahead.
    fn prefetch(&self, names: &[&str]);

    /// Tells the system that these tensors' pages are not needed any more.
    fn release(&self, names: &[&str]);
}

/// Opens a checkpoint: a directory with `model.safetensors` or an index, a directory with one GGUF
/// file or the files of one split, a safetensors file, or a GGUF file (of a split, the first). The
/// content of a file decides, not its extension.
///
/// # Errors
/// [`FormatError`] naming the file and the defect.
pub fn open(path: &Path) -> Result<Box<dyn CheckpointReader>> {
    if path.is_dir() {
        let safetensors = [crate::safetensors::SINGLE_NAME, crate::safetensors::INDEX_NAME];
        if !safetensors.iter().any(|name| path.join(name).is_file())
            && let Some(first) = crate::gguf::split::find_in(path)?
        {
            return Ok(Box::new(crate::gguf::GgufReader::open(&first)?));
        }
        return Ok(Box::new(crate::safetensors::SafetensorsReader::open_dir(path)?));
    }
    let file = MappedFile::open(path)?;
    if file.bytes().starts_with(crate::gguf::MAGIC) {
        return Ok(Box::new(crate::gguf::GgufReader::new(file)?));
    }
    // A safetensors file starts with an 8-byte length and a JSON object.
    if file.bytes().get(8) == Some(&b'{') {
        return Ok(Box::new(crate::safetensors::SafetensorsReader::open_file(file)?));
    }
    let start: Vec<String> = file.bytes().iter().take(8).map(|b| format!("{b:02x}")).collect();
    Err(FormatError::UnknownFormat {
        path: path.to_owned(),
        found: if start.is_empty() {
            "the file is empty".to_owned()
        } else {
            format!("the file starts with bytes {}", start.join(" "))
        },
    })
}

/// A read-only memory map of one file: the only map of the project.
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    map: Option<Mmap>,
}

impl MappedFile {
    /// Maps `path`. An empty file maps to no bytes.
    ///
    /// # Errors
    /// [`FormatError::Io`].
    pub fn open(path: &Path) -> Result<Self> {
        let io = |action: &str| {
            let (path, action) = (path.to_owned(), action.to_owned());
            move |source| FormatError::Io { path, action, source }
        };
        let file = std::fs::File::open(path).map_err(io("open"))?;
        let metadata = file.metadata().map_err(io("read the size"))?;
        if !metadata.is_file() {
            return Err(FormatError::UnknownFormat {
                path: path.to_owned(),
                found: "not a regular file".to_owned(),
            });
        }
        if metadata.len() == 0 {
            return Ok(Self { path: path.to_owned(), map: None });
        }
        // SAFETY: the map is read-only and private. Another process that truncates the file while
        // it is mapped can make a read fault (SIGBUS); that is inherent to memory maps, documented
        // in docs/ARCHITECTURE.md, and we never write to an input ourselves.
        #[expect(unsafe_code, reason = "the one memory map of the project")]
        let map = unsafe { Mmap::map(&file) }.map_err(io("map"))?;
        Ok(Self { path: path.to_owned(), map: Some(map) })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file's bytes.
    pub fn bytes(&self) -> &[u8] {
        self.map.as_deref().unwrap_or_default()
    }

    /// Asks the system to read a byte range ahead. A hint: failures are not errors.
    pub fn prefetch(&self, range: std::ops::Range<usize>) {
        if let Some(map) = &self.map {
            let _ = map.advise_range(memmap2::Advice::WillNeed, range.start, range.len());
        }
    }

    /// Tells the system that a byte range is no longer needed. A hint: failures are not errors.
    pub fn release(&self, range: std::ops::Range<usize>) {
        #[cfg(unix)]
        if let Some(map) = &self.map {
            // SAFETY: the map is a read-only file mapping, so dropped pages are read again from
            // the file with the same content.
            #[expect(unsafe_code, reason = "madvise(DONTNEED) on a read-only file map")]
            let _ = unsafe {
                map.unchecked_advise_range(
                    memmap2::UncheckedAdvice::DontNeed,
                    range.start,
                    range.len(),
                )
            };
        }
    }
}
