//! Opening a checkpoint: content decides the format, and every file is memory-mapped.

use std::{
    borrow::Cow,
    ops::Range,
    path::{Path, PathBuf},
};

use memmap2::Mmap;

use crate::{
    FormatError, Result, TensorIndex, TensorInfo,
    container::{self, ContainerReader, OriginalFile},
    encoding::MatrixShape,
    gguf::GgufMetadata,
    safetensors::{self, SafetensorsReader},
};

/// Values decoded at a time when a whole tensor is, so that a compressed one is never in memory
/// both decompressed and decoded.
const DECODE_VALUES: usize = 4 << 20;

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

impl ModelMetadata {
    /// The configuration of a Hugging Face directory.
    ///
    /// # Errors
    /// [`FormatError::UnknownFormat`] without `config.json`; one that is not a JSON object.
    pub(crate) fn read_config(directory: &Path) -> Result<Self> {
        let path = directory.join(safetensors::CONFIG_NAME);
        if !path.is_file() {
            return Err(FormatError::UnknownFormat {
                path: directory.to_owned(),
                found: "a directory without config.json".to_owned(),
            });
        }
        let config: serde_json::Value = safetensors::parse_json_file(&path)?;
        if !config.is_object() {
            return Err(FormatError::InvalidHeader {
                path,
                offset: 0,
                what: "the configuration is not a JSON object".to_owned(),
            });
        }
        Ok(Self::HuggingFace { config, directory: directory.to_owned() })
    }
}

/// Some rows of a tensor as they are stored: rows `rows` of a tensor of shape `shape` whose
/// components are `parts`. That tensor is the whole one where it is borrowed from a memory map, and
/// nothing but the rows where they had to be decompressed.
#[derive(Debug)]
pub struct StoredRows<'a> {
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// The rows that were asked for.
    pub rows: Range<usize>,
    /// In [`Encoding::components`](crate::Encoding::components) order.
    pub parts: Vec<Cow<'a, [u8]>>,
}

/// A readable checkpoint. Nothing is loaded ahead: data is borrowed from the memory map where it
/// lies there as it is, and decompressed when it is asked for where not.
pub trait CheckpointReader: Send + Sync + std::fmt::Debug {
    /// Where it was opened from.
    fn path(&self) -> &Path;

    /// The data files, for digests.
    fn files(&self) -> Vec<&Path>;

    /// Every logical tensor, in stored order.
    fn tensors(&self) -> &TensorIndex;

    /// What the checkpoint says of the model.
    fn metadata(&self) -> &ModelMetadata;

    /// The stored components of `name`, whole, in
    /// [`Encoding::components`](crate::Encoding::components) order.
    ///
    /// # Errors
    /// [`FormatError::TensorNotFound`]; [`FormatError::InvalidTensor`] for one that does not
    /// decompress.
    fn components(&self, name: &str) -> Result<Vec<Cow<'_, [u8]>>>;

    /// Bytes `range` of one component. A compressing container decompresses little else.
    ///
    /// # Errors
    /// As [`components`](Self::components); [`FormatError::InvalidTensor`] for bytes that the component
    /// does not have.
    fn read_component(
        &self,
        name: &str,
        component: usize,
        range: Range<u64>,
    ) -> Result<Cow<'_, [u8]>> {
        let parts = self.components(name)?;
        let within = range.start as usize..range.end as usize;
        let part = match parts.into_iter().nth(component) {
            Some(Cow::Borrowed(part)) => part.get(within).map(Cow::Borrowed),
            Some(Cow::Owned(part)) => part.get(within).map(|part| Cow::Owned(part.to_vec())),
            None => None,
        };
        part.ok_or_else(|| FormatError::InvalidTensor {
            path: self.path().to_owned(),
            name: name.to_owned(),
            what: format!("bytes {range:?} of component {component} are beyond its end"),
        })
    }

    /// What rows `rows` of `name` are decoded from. A compressing container decompresses little else.
    ///
    /// # Errors
    /// As [`components`](Self::components); rows that the tensor does not have.
    fn rows(&self, name: &str, rows: Range<usize>) -> Result<StoredRows<'_>> {
        let shape = find(self, name)?.shape.clone();
        Ok(StoredRows { shape, rows, parts: self.components(name)? })
    }

    /// Decodes rows `rows` to f32, row-major, into `out`, which has their size. A tensor of rank 1 is
    /// one row.
    ///
    /// # Errors
    /// As [`rows`](Self::rows), or data that does not decode.
    fn read_rows_f32(&self, name: &str, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        let encoding = find(self, name)?.encoding;
        let StoredRows { shape, rows, parts } = self.rows(name, rows)?;
        encoding.decode_f32(name, &shape, &parts, rows, out)
    }

    /// Appends rows `rows` to `out` as little-endian bytes of
    /// [`Encoding::value_dtype`](crate::Encoding::value_dtype).
    ///
    /// # Errors
    /// As [`rows`](Self::rows), or data that does not decode.
    fn read_rows_dense(&self, name: &str, rows: Range<usize>, out: &mut Vec<u8>) -> Result<()> {
        let encoding = find(self, name)?.encoding;
        let StoredRows { shape, rows, parts } = self.rows(name, rows)?;
        encoding.decode_dense(name, &shape, &parts, rows, out)
    }

    /// Decodes a whole tensor to f32, row-major.
    ///
    /// # Errors
    /// As [`components`](Self::components), or data that does not decode.
    fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        let info = find(self, name)?;
        let MatrixShape { rows, cols } = MatrixShape::of(&info.shape);
        let mut out = vec![];
        // A file of nothing but zeros is small when compressed, whatever it decodes to.
        out.try_reserve_exact(info.elements()).map_err(|_| FormatError::Encoding {
            name: name.to_owned(),
            what: format!("{} values do not fit in memory", info.elements()),
        })?;
        out.resize(info.elements(), 0.0);
        if out.is_empty() {
            // Nothing to decode, but its type and metadata must be right all the same. Rows without
            // columns are legal, in any number.
            self.read_rows_f32(name, 0..rows, &mut out)?;
            return Ok(out);
        }
        let at_once = (DECODE_VALUES / cols).max(1);
        for start in (0..rows).step_by(at_once) {
            let end = rows.min(start + at_once);
            self.read_rows_f32(name, start..end, &mut out[start * cols..end * cols])?;
        }
        Ok(out)
    }

    /// The files that this checkpoint consists of, such that an archive of its tensors can write them
    /// again byte for byte. None where that is not possible.
    ///
    /// # Errors
    /// A file that cannot be read.
    fn original_files(&self) -> Result<Vec<OriginalFile>> {
        Ok(vec![])
    }

    /// Asks the system to read these tensors' pages ahead.
    fn prefetch(&self, names: &[&str]);

    /// Tells the system that these tensors' pages are not needed any more.
    fn release(&self, names: &[&str]);
}

fn find<'a, R: CheckpointReader + ?Sized>(reader: &'a R, name: &str) -> Result<&'a TensorInfo> {
    reader.tensors().get(name).ok_or_else(|| FormatError::TensorNotFound {
        path: reader.path().to_owned(),
        name: name.to_owned(),
    })
}

/// Opens a checkpoint: a directory with `model.safetensors`, an index or `model.spz`, a directory with
/// one GGUF file or the files of one split, or a file of one of these kinds (of a GGUF split, the
/// first). The content of a file decides, not its extension.
///
/// # Errors
/// [`FormatError`] naming the file and the defect.
pub fn open(path: &Path) -> Result<Box<dyn CheckpointReader>> {
    if path.is_dir() {
        let [container, single, index] =
            [container::FILE_NAME, safetensors::SINGLE_NAME, safetensors::INDEX_NAME]
                .map(|name| path.join(name).is_file());
        if container && (single || index) {
            return Err(FormatError::UnknownFormat {
                path: path.to_owned(),
                found: "a directory with both model.spz and safetensors".to_owned(),
            });
        }
        if container {
            return Ok(Box::new(ContainerReader::open_dir(path)?));
        }
        if !(single || index)
            && let Some(first) = crate::gguf::split::find_in(path)?
        {
            return Ok(Box::new(crate::gguf::GgufReader::open(&first)?));
        }
        return Ok(Box::new(SafetensorsReader::open_dir(path)?));
    }
    let file = MappedFile::open(path)?;
    if file.bytes().starts_with(crate::gguf::MAGIC) {
        return Ok(Box::new(crate::gguf::GgufReader::new(file)?));
    }
    if container::is_container(file.bytes()) {
        return Ok(Box::new(ContainerReader::open_file(file)?));
    }
    // A safetensors file starts with an 8-byte length and a JSON object.
    if file.bytes().get(8) == Some(&b'{') {
        return Ok(Box::new(SafetensorsReader::open_file(file)?));
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
    pub fn prefetch(&self, range: Range<usize>) {
        if let Some(map) = &self.map {
            let _ = map.advise_range(memmap2::Advice::WillNeed, range.start, range.len());
        }
    }

    /// Tells the system that a byte range is no longer needed. A hint: failures are not errors.
    pub fn release(&self, range: Range<usize>) {
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
