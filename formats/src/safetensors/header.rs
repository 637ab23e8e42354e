//! The header of one file: parsed, checked, and written.
//!
//! Parsed here and not by the `safetensors` crate, which keeps one of two equal names without a word,
//! loses the stored order, accepts control characters in names and any number of empty tensors, and
//! whose errors name neither the tensor nor the offset. The crate is the oracle of the tests instead.

use std::{collections::BTreeMap, fmt, path::Path};

use serde::{
    Deserialize, Deserializer,
    de::{DeserializeSeed, Error as _, MapAccess, Visitor},
};

use crate::{DType, FormatError, Result};

/// Longest JSON header: the limit of the `safetensors` crate.
pub(super) const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Most tensors in one file. Sharded mixture-of-experts checkpoints stay below 100 000; the header
/// limit alone would admit more than a million.
pub(super) const MAX_TENSORS: usize = 500_000;

/// Longest tensor name.
const MAX_NAME_BYTES: usize = 4096;

/// The key that is not a tensor.
const METADATA: &str = "__metadata__";

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
        let json = rest
            .get(..length as usize)
            .ok_or_else(|| truncated("the header", data_start))
            .and_then(|json| as_text(path, json))?;
        let (entries, metadata) = parse_json(path, json)?;
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

fn as_text<'a>(path: &Path, json: &'a [u8]) -> Result<&'a str> {
    let invalid = |at: usize, what: &str| FormatError::InvalidHeader {
        path: path.to_owned(),
        offset: LENGTH_BYTES + at as u64,
        what: what.to_owned(),
    };
    if json.first() != Some(&b'{') {
        return Err(invalid(0, "the header does not start with `{`"));
    }
    std::str::from_utf8(json)
        .map_err(|error| invalid(error.valid_up_to(), "the header is not UTF-8"))
}

/// One tensor as the header describes it.
#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    /// Relative to the data section.
    data_offsets: [u64; 2],
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
        let elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        let expected = elements.and_then(|n| n.checked_mul(dtype.size_bytes()));
        if expected.map(|bytes| bytes as u64) != Some(end - begin) {
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

/// Names become part of messages and of other files, never of paths, so dots and slashes are harmless.
fn name_defect(name: &str) -> Option<String> {
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

type Parsed = (Vec<(String, Entry)>, BTreeMap<String, String>);

fn parse_json(path: &Path, json: &str) -> Result<Parsed> {
    let mut visitor = HeaderVisitor::default();
    let mut deserializer = serde_json::Deserializer::from_str(json);
    let parsed = (&mut visitor).deserialize(&mut deserializer).and_then(|()| deserializer.end());
    let Err(error) = parsed else {
        return Ok((visitor.entries, visitor.metadata));
    };
    if visitor.entries.len() >= MAX_TENSORS {
        return Err(FormatError::LimitExceeded {
            path: path.to_owned(),
            offset: LENGTH_BYTES,
            what: "the number of tensors",
            found: visitor.entries.len() as u64 + 1,
            limit: MAX_TENSORS as u64,
        });
    }
    let offset = LENGTH_BYTES + byte_offset(json, &error);
    Err(match visitor.current {
        Some(name) => FormatError::InvalidTensor {
            path: path.to_owned(),
            name,
            what: format!("offset {offset}: {}", reason(&error)),
        },
        None => FormatError::InvalidHeader {
            path: path.to_owned(),
            offset,
            what: format!("the header is not valid: {}", reason(&error)),
        },
    })
}

/// Where in `json` the parser stopped.
fn byte_offset(json: &str, error: &serde_json::Error) -> u64 {
    let line_start: usize =
        json.split_inclusive('\n').take(error.line().saturating_sub(1)).map(str::len).sum();
    (line_start + error.column().saturating_sub(1)) as u64
}

/// The parser's message without its line and column, which mean nothing in a binary file.
fn reason(error: &serde_json::Error) -> String {
    let message = error.to_string();
    let position = format!(" at line {} column {}", error.line(), error.column());
    message.strip_suffix(&position).unwrap_or(&message).to_owned()
}

#[derive(Default)]
struct HeaderVisitor {
    entries: Vec<(String, Entry)>,
    metadata: BTreeMap<String, String>,
    /// The tensor whose description is being read.
    current: Option<String>,
}

impl<'de> DeserializeSeed<'de> for &mut HeaderVisitor {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(
        self,
        deserializer: D,
    ) -> std::result::Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for &mut HeaderVisitor {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<(), A::Error> {
        let mut metadata_seen = false;
        while let Some(name) = map.next_key::<String>()? {
            if name == METADATA {
                if std::mem::replace(&mut metadata_seen, true) {
                    return Err(A::Error::custom("`__metadata__` appears twice"));
                }
                self.metadata = map.next_value::<UniqueMap<String>>()?.0.into_iter().collect();
                continue;
            }
            if self.entries.len() == MAX_TENSORS {
                return Err(A::Error::custom("too many tensors"));
            }
            self.current = Some(name);
            let entry = map.next_value()?;
            // Equal names are found afterwards, in `check_names`.
            self.entries.extend(self.current.take().map(|name| (name, entry)));
        }
        Ok(())
    }
}

/// The pairs of a JSON object in order, refusing equal keys.
pub(super) struct UniqueMap<T>(pub(super) Vec<(String, T)>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for UniqueMap<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Pairs<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Pairs<T> {
            type Value = UniqueMap<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(
                self,
                mut map: A,
            ) -> std::result::Result<UniqueMap<T>, A::Error> {
                let mut seen = std::collections::HashSet::new();
                let mut pairs = vec![];
                while let Some(key) = map.next_key::<String>()? {
                    if !seen.insert(key.clone()) {
                        return Err(A::Error::custom(format_args!("key `{key}` appears twice")));
                    }
                    pairs.push((key, map.next_value()?));
                }
                Ok(UniqueMap(pairs))
            }
        }
        deserializer.deserialize_map(Pairs(std::marker::PhantomData))
    }
}
