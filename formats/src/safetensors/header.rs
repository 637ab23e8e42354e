//! The header of one file: parsed, checked, and written.
//!
//! Parsed here and not by the `safetensors` crate, which keeps one of two equal names without a word,
//! loses the stored order, accepts control characters in names and any number of empty tensors, and
//! whose errors name neither the tensor nor the offset. The crate is the oracle of the tests instead.

use std::{collections::BTreeMap, path::Path};

use super::json::{self, Entry, METADATA};
use crate::{DType, FormatError, Result, encoding::dense, tensor::name_defect};

/// Longest JSON header: the limit of the `safetensors` crate.
pub(crate) const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Bytes before the JSON: its length.
pub(super) const LENGTH_BYTES: u64 = 8;

/// One tensor as stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct StoredTensor {
    pub(super) name: String,
    pub(super) dtype: DType,
    pub(super) shape: Vec<usize>,
    /// First byte in the file.
    pub(super) start: u64,
    /// Byte after the last one in the file.
    pub(super) end: u64,
}

/// A checked header.
#[derive(Debug)]
pub(super) struct Header {
    /// In file order. They tile the data section: no gap, no overlap.
    pub(super) tensors: Vec<StoredTensor>,
    /// The string pairs of `__metadata__`.
    pub(super) metadata: BTreeMap<String, String>,
}

impl Header {
    /// Parses the header at the start of `prefix`, the first bytes of a file of `file_bytes` bytes.
    ///
    /// # Errors
    /// [`FormatError`] naming the tensor or the offset.
    pub(super) fn parse(path: &Path, prefix: &[u8], file_bytes: u64) -> Result<Self> {
        let truncated = |what: &str, expected| FormatError::Truncated {
            path: path.to_owned(),
            what: what.to_owned(),
            expected,
            found: file_bytes.min(prefix.len() as u64),
        };
        let Some((length, rest)) = prefix.split_first_chunk() else {
            return Err(truncated("the header length", LENGTH_BYTES));
        };
        let length = u64::from_le_bytes(*length);
        if length > MAX_HEADER_BYTES {
            return Err(FormatError::LimitExceeded {
                path: path.to_owned(),
                offset: 0,
                what: "the header length",
                found: length,
                limit: MAX_HEADER_BYTES,
            });
        }
        let data_start = LENGTH_BYTES + length;
        let json =
            rest.get(..length as usize).ok_or_else(|| truncated("the header", data_start))?;
        let (entries, metadata) = json::parse(path, json)?;
        let mut tensors = entries
            .into_iter()
            .map(|(name, entry)| entry.check(path, name, data_start, file_bytes))
            .collect::<Result<Vec<_>>>()?;
        // Stable: empty tensors at one offset keep the order of the header.
        tensors.sort_by_key(|tensor| (tensor.start, tensor.end));
        check_names(path, &tensors)?;
        check_tiling(path, &tensors, data_start, file_bytes)?;
        Ok(Self { tensors, metadata })
    }

    /// The bytes of a header, padded with spaces to a multiple of eight; `start` and `end` of the
    /// tensors are relative to the data section.
    ///
    /// # Errors
    /// [`FormatError::LimitExceeded`]; [`FormatError::DuplicateTensor`].
    pub(super) fn to_bytes(&self, path: &Path) -> Result<Vec<u8>> {
        // Before the names become keys, where one of two equal ones would vanish.
        check_names(path, &self.tensors)?;
        let mut object = serde_json::Map::new();
        object.insert(METADATA.to_owned(), serde_json::json!(self.metadata));
        for tensor in &self.tensors {
            object.insert(
                tensor.name.clone(),
                serde_json::json!({
                    "dtype": tensor.dtype,
                    "shape": tensor.shape,
                    "data_offsets": [tensor.start, tensor.end],
                }),
            );
        }
        let mut json = serde_json::Value::Object(object).to_string().into_bytes();
        json.resize(json.len().next_multiple_of(8), b' ');
        let length = json.len() as u64;
        if length > MAX_HEADER_BYTES {
            return Err(FormatError::LimitExceeded {
                path: path.to_owned(),
                offset: 0,
                what: "the header length",
                found: length,
                limit: MAX_HEADER_BYTES,
            });
        }
        Ok([&length.to_le_bytes(), json.as_slice()].concat())
    }
}

impl Entry {
    fn check(
        self,
        path: &Path,
        name: String,
        data_start: u64,
        file_bytes: u64,
    ) -> Result<StoredTensor> {
        let Self { dtype, shape, data_offsets: [begin, end] } = self;
        let Some(dtype) = DType::from_name(&dtype) else {
            return Err(FormatError::UnsupportedType {
                path: path.to_owned(),
                name,
                found: dtype,
                supported: DType::ALL.map(DType::name).join(", "),
            });
        };
        let invalid =
            |name, what| Err(FormatError::InvalidTensor { path: path.to_owned(), name, what });
        if let Some(what) = name_defect(&name) {
            return invalid(name, what);
        }
        if end < begin {
            return invalid(
                name,
                format!("the data ends at offset {end}, before it begins at {begin}"),
            );
        }
        let expected = dense::size_bytes(dtype, &shape);
        if expected != Some(end - begin) {
            let expected =
                expected.map_or("more than can be addressed".to_owned(), |bytes| bytes.to_string());
            return invalid(
                name,
                format!(
                    "shape {shape:?} of {dtype} needs {expected} bytes, but the data offsets [{begin}, {end}] hold {}",
                    end - begin
                ),
            );
        }
        let absolute = |offset: u64| data_start.saturating_add(offset);
        if absolute(end) > file_bytes {
            return Err(FormatError::Truncated {
                path: path.to_owned(),
                what: format!("tensor `{name}`"),
                expected: absolute(end),
                found: file_bytes,
            });
        }
        Ok(StoredTensor { name, dtype, shape, start: absolute(begin), end: absolute(end) })
    }
}

fn check_tiling(
    path: &Path,
    tensors: &[StoredTensor],
    data_start: u64,
    file_bytes: u64,
) -> Result<()> {
    let mut position = data_start;
    let mut previous = "the header";
    for tensor in tensors {
        if tensor.start != position {
            let relation = if tensor.start < position { "overlaps" } else { "leaves a gap after" };
            return Err(FormatError::InvalidTensor {
                path: path.to_owned(),
                name: tensor.name.clone(),
                what: format!(
                    "its data {relation} `{previous}`: expected byte {position}, found {}",
                    tensor.start
                ),
            });
        }
        position = tensor.end;
        previous = &tensor.name;
    }
    if position != file_bytes {
        return Err(FormatError::InvalidHeader {
            path: path.to_owned(),
            offset: position,
            what: format!(
                "expected the end of the file, found {} more bytes",
                file_bytes - position
            ),
        });
    }
    Ok(())
}

fn check_names(path: &Path, tensors: &[StoredTensor]) -> Result<()> {
    let mut names: Vec<&str> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    names.push(METADATA);
    names.sort_unstable();
    match names.array_windows().find(|[a, b]| a == b) {
        Some([name, _]) => {
            Err(FormatError::DuplicateTensor { path: path.to_owned(), name: (*name).to_owned() })
        }
        None => Ok(()),
    }
}
