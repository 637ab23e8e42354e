//! The JSON of a header: parsed in order, with equal keys and counts checked on the way.

use std::{collections::BTreeMap, fmt, path::Path};

use serde::{
    Deserialize, Deserializer,
    de::{DeserializeSeed, Error as _, MapAccess, Visitor},
};

use super::header::LENGTH_BYTES;
use crate::{FormatError, Result, tensor::MAX_TENSORS};

/// The key that is not a tensor.
pub(super) const METADATA: &str = "__metadata__";

/// One tensor as the header describes it.
#[derive(Deserialize)]
pub(super) struct Entry {
    pub(super) dtype: String,
    pub(super) shape: Vec<usize>,
    /// Relative to the data section.
    pub(super) data_offsets: [u64; 2],
}

/// The tensors of a header in the order of the JSON, and the pairs of `__metadata__`.
pub(super) type Parsed = (Vec<(String, Entry)>, BTreeMap<String, String>);

/// Parses the JSON bytes of a header.
///
/// # Errors
/// [`FormatError::InvalidHeader`], [`FormatError::InvalidTensor`], [`FormatError::LimitExceeded`].
pub(super) fn parse(path: &Path, bytes: &[u8]) -> Result<Parsed> {
    let json = as_text(path, bytes)?;
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
