//! Reading tensors out of a mapped GGUF file.

use std::borrow::Cow;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::header::{Header, TensorEntry};
use super::split::Split;
use crate::{
    CheckpointReader, Encoding, FormatError, MappedFile, ModelMetadata, Result, TensorIndex,
    TensorInfo,
};

/// Reads GGUF versions 2 and 3, little endian: one file, or the files of a split.
#[derive(Debug)]
pub struct GgufReader {
    /// At least one; the first has the metadata.
    files: Vec<MappedFile>,
    path: PathBuf,
    version: u32,
    alignment: u64,
    tensors: TensorIndex,
    metadata: ModelMetadata,
    /// Where each tensor of the index lies: a file and its bytes.
    places: Vec<(usize, Range<usize>)>,
}

impl GgufReader {
    /// Reads the header and checks that every tensor it describes lies in the file. Of a split,
    /// `file` is the first; the others are found beside it.
    ///
    /// # Errors
    /// [`FormatError`], naming the file and the offset, key or tensor that is wrong, or the file of
    /// a split that is missing or belongs to another.
    pub fn new(file: MappedFile) -> Result<Self> {
        let header = Header::parse(file.path(), file.bytes())?;
        let split = Split::of(file.path(), &header.metadata)?;
        let mut reader = Self {
            path: file.path().to_owned(),
            files: Vec::new(),
            version: header.version,
            alignment: header.alignment,
            tensors: TensorIndex::default(),
            metadata: ModelMetadata::Gguf(header.metadata),
            places: Vec::new(),
        };
        let later = match split {
            Some(split) => split.files(file.path())?.split_off(1),
            None => Vec::new(),
        };
        reader.add(file, header.tensors, header.alignment, header.data_start)?;
        for (path, no) in later.iter().zip(1..) {
            reader.add_shard(path, split.map(|split| Split { no, ..split }))?;
        }
        if let Some(split) = split.filter(|split| split.tensors != reader.tensors.len() as u64) {
            return Err(FormatError::BadSplit {
                path: reader.path,
                what: format!(
                    "the files of the split hold {} tensors, but `split.tensors.count` is {}",
                    reader.tensors.len(),
                    split.tensors
                ),
            });
        }
        Ok(reader)
    }

    /// Opens a GGUF file by path: [`new`](Self::new).
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn open(path: &Path) -> Result<Self> {
        Self::new(MappedFile::open(path)?)
    }

    /// Adds a file of a split that should be the one `expected` says.
    fn add_shard(&mut self, path: &Path, expected: Option<Split>) -> Result<()> {
        if !path.is_file() {
            return Err(FormatError::BadSplit {
                path: path.to_owned(),
                what: format!("not found; {} is a file of the same split", self.path.display()),
            });
        }
        let file = MappedFile::open(path)?;
        let header = Header::parse(path, file.bytes())?;
        let found = Split::of(path, &header.metadata)?;
        if found != expected {
            let text = |split: Option<Split>| match split {
                Some(Split { no, count, tensors }) => {
                    format!("file {} of {count} of a split with {tensors} tensors", no + 1)
                }
                None => "a file by itself".to_owned(),
            };
            return Err(FormatError::BadSplit {
                path: path.to_owned(),
                what: format!("expected {}, found {}", text(expected), text(found)),
            });
        }
        self.add(file, header.tensors, header.alignment, header.data_start)
    }

    /// Adds the tensors of a file.
    fn add(
        &mut self,
        file: MappedFile,
        entries: Vec<TensorEntry>,
        alignment: u64,
        data_start: u64,
    ) -> Result<()> {
        let mut ranges = Vec::with_capacity(entries.len());
        for entry in entries {
            let place = Placement {
                path: file.path(),
                file_len: file.bytes().len() as u64,
                alignment,
                data_start,
            };
            let encoding = Encoding::from(entry.ty);
            let (range, stored_bytes) = place.range(&entry, encoding)?;
            ranges.push(range);
            let TensorEntry { name, shape, .. } = entry;
            self.tensors.push(file.path(), TensorInfo { name, encoding, shape, stored_bytes })?;
        }
        let added = self.tensors.iter().skip(self.places.len());
        check_overlap(file.path(), added, &ranges)?;
        let number = self.files.len();
        self.places.extend(ranges.into_iter().map(|range| (number, range)));
        self.files.push(file);
        Ok(())
    }

    /// The version of the format.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The alignment of tensors in the (first) file.
    pub fn alignment(&self) -> u64 {
        self.alignment
    }

    /// The bytes that hold `name`, of the file that does.
    pub fn byte_range(&self, name: &str) -> Option<Range<usize>> {
        self.place(name).map(|(_, range)| range)
    }

    fn place(&self, name: &str) -> Option<(&MappedFile, Range<usize>)> {
        let (file, range) = &self.places[self.tensors.position(name)?];
        Some((&self.files[*file], range.clone()))
    }

    fn places_of(&self, names: &[&str]) -> impl Iterator<Item = (&MappedFile, Range<usize>)> {
        names.iter().filter_map(|name| self.place(name))
    }
}

impl CheckpointReader for GgufReader {
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
        let (file, range) = self.place(name).ok_or_else(|| FormatError::TensorNotFound {
            path: self.path().to_owned(),
            name: name.to_owned(),
        })?;
        Ok(vec![Cow::Borrowed(&file.bytes()[range])])
    }

    fn prefetch(&self, names: &[&str]) {
        self.places_of(names).for_each(|(file, range)| file.prefetch(range));
    }

    fn release(&self, names: &[&str]) {
        self.places_of(names).for_each(|(file, range)| file.release(range));
    }
}

/// What decides where tensors may lie.
struct Placement<'a> {
    path: &'a Path,
    file_len: u64,
    alignment: u64,
    data_start: u64,
}

impl Placement<'_> {
    /// The file bytes of a tensor, and how many they are.
    fn range(&self, entry: &TensorEntry, encoding: Encoding) -> Result<(Range<usize>, u64)> {
        let invalid = |what| FormatError::InvalidTensor {
            path: self.path.to_owned(),
            name: entry.name.clone(),
            what,
        };
        let bytes = match encoding.components(&entry.name, &entry.shape) {
            Ok(components) => components.iter().map(|component| component.bytes).sum::<u64>(),
            Err(FormatError::Encoding { what, .. }) => return Err(invalid(what)),
            Err(other) => return Err(other),
        };
        let offset = entry.offset;
        if !offset.is_multiple_of(self.alignment) {
            return Err(invalid(format!(
                "offset {offset} is not a multiple of the alignment {}",
                self.alignment
            )));
        }
        let start = self.data_start.checked_add(offset);
        let (Some(start), Some(end)) = (start, start.and_then(|start| start.checked_add(bytes)))
        else {
            return Err(invalid(format!("offset {offset} and length {bytes} overflow")));
        };
        if end > self.file_len {
            return Err(FormatError::Truncated {
                path: self.path.to_owned(),
                what: format!("tensor `{}`", entry.name),
                expected: end,
                found: self.file_len,
            });
        }
        // Both are within the map, whose length is a usize.
        Ok((start as usize..end as usize, bytes))
    }
}

/// No two tensors may share a byte.
fn check_overlap<'a>(
    path: &Path,
    tensors: impl Iterator<Item = &'a TensorInfo>,
    ranges: &[Range<usize>],
) -> Result<()> {
    let mut placed: Vec<_> = tensors.map(|info| &info.name).zip(ranges).collect();
    placed.sort_unstable_by_key(|(_, range)| range.start);
    for pair in placed.windows(2) {
        let [(before, first), (name, second)] = [pair[0], pair[1]];
        if second.start < first.end {
            return Err(FormatError::InvalidTensor {
                path: path.to_owned(),
                name: name.clone(),
                what: format!(
                    "starts at byte {} inside tensor `{before}` (bytes {}..{})",
                    second.start, first.start, first.end
                ),
            });
        }
    }
    Ok(())
}
