//! Reading tensors out of a mapped GGUF file.

use std::ops::Range;
use std::path::Path;

use super::header::{Header, TensorEntry};
use crate::{
    CheckpointReader, DType, Encoding, FormatError, GgmlType, MappedFile, ModelMetadata, Result,
    TensorIndex, TensorInfo,
};

/// Reads GGUF versions 2 and 3, little endian.
#[derive(Debug)]
pub struct GgufReader {
    file: MappedFile,
    version: u32,
    alignment: u64,
    tensors: TensorIndex,
    metadata: ModelMetadata,
    /// Where each tensor of the index lies in the file.
    ranges: Vec<Range<usize>>,
}

impl GgufReader {
    /// Reads the header and checks that every tensor it describes lies in the file.
    ///
    /// # Errors
    /// [`FormatError`], naming the file and the offset, key or tensor that is wrong.
    pub fn new(file: MappedFile) -> Result<Self> {
        let header = Header::parse(file.path(), file.bytes())?;
        let mut tensors = TensorIndex::default();
        let mut ranges = Vec::with_capacity(header.tensors.len());
        for entry in header.tensors {
            let place = Placement {
                path: file.path(),
                file_len: file.bytes().len() as u64,
                alignment: header.alignment,
                data_start: header.data_start,
            };
            let encoding = encoding_of(entry.ty);
            let (range, stored_bytes) = place.range(&entry, encoding)?;
            ranges.push(range);
            let TensorEntry { name, shape, .. } = entry;
            tensors.push(file.path(), TensorInfo { name, encoding, shape, stored_bytes })?;
        }
        check_overlap(file.path(), &tensors, &ranges)?;
        Ok(Self {
            version: header.version,
            alignment: header.alignment,
            metadata: ModelMetadata::Gguf(header.metadata),
            file,
            tensors,
            ranges,
        })
    }

    /// The version of the format.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The alignment of tensors in the file.
    pub fn alignment(&self) -> u64 {
        self.alignment
    }

    /// The bytes of the file that hold `name`.
    pub fn byte_range(&self, name: &str) -> Option<Range<usize>> {
        self.tensors.position(name).map(|position| self.ranges[position].clone())
    }

    fn ranges_of(&self, names: &[&str]) -> impl Iterator<Item = Range<usize>> {
        names.iter().filter_map(|name| self.byte_range(name))
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
        let range = self.byte_range(name).ok_or_else(|| FormatError::TensorNotFound {
            path: self.path().to_owned(),
            name: name.to_owned(),
        })?;
        Ok(vec![&self.file.bytes()[range]])
    }

    fn prefetch(&self, names: &[&str]) {
        self.ranges_of(names).for_each(|range| self.file.prefetch(range));
    }

    fn release(&self, names: &[&str]) {
        self.ranges_of(names).for_each(|range| self.file.release(range));
    }
}

/// Plain float types are dense like in any other container; the rest are quant blocks.
fn encoding_of(ty: GgmlType) -> Encoding {
    match ty {
        GgmlType::F32 => Encoding::Dense { dtype: DType::F32 },
        GgmlType::F16 => Encoding::Dense { dtype: DType::F16 },
        GgmlType::BF16 => Encoding::Dense { dtype: DType::Bf16 },
        _ => Encoding::Ggml { ty },
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
fn check_overlap(path: &Path, tensors: &TensorIndex, ranges: &[Range<usize>]) -> Result<()> {
    let mut placed: Vec<_> = tensors.iter().map(|info| &info.name).zip(ranges).collect();
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
