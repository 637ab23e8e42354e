//! The typed key-value pairs of a GGUF file.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::{FormatError, Result};

/// A metadata value, of the type it has in the file.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "the variants are the types of the format")]
pub enum GgufValue {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    U64(u64),
    I64(i64),
    F32(f32),
    F64(f64),
    Bool(bool),
    String(String),
    Array(GgufArray),
}

/// An array value. The format allows arrays of arrays; llama.cpp and this crate do not read them.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "the variants are the types of the format")]
pub enum GgufArray {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F32(Vec<f32>),
    F64(Vec<f64>),
    Bool(Vec<bool>),
    String(GgufStrings),
}

/// Many strings in one allocation: a vocabulary has tens of thousands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GgufStrings {
    text: String,
    /// Where each string ends in `text`; it starts where the one before ends.
    ends: Vec<usize>,
}

impl GgufStrings {
    /// No strings yet, with room for `count`.
    pub fn with_capacity(count: usize) -> Self {
        Self { text: String::new(), ends: Vec::with_capacity(count) }
    }

    /// Appends a string.
    pub fn push(&mut self, string: &str) {
        self.text.push_str(string);
        self.ends.push(self.text.len());
    }

    /// Number of strings.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The string at `index`.
    pub fn get(&self, index: usize) -> Option<&str> {
        let end = *self.ends.get(index)?;
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        Some(&self.text[start..end])
    }

    /// All strings in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &str> {
        let mut start = 0;
        self.ends.iter().map(move |&end| &self.text[std::mem::replace(&mut start, end)..end])
    }
}

impl<S: AsRef<str>> FromIterator<S> for GgufStrings {
    fn from_iter<I: IntoIterator<Item = S>>(iter: I) -> Self {
        let mut strings = Self::default();
        for string in iter {
            strings.push(string.as_ref());
        }
        strings
    }
}

impl GgufValue {
    /// The type's name, as errors show it.
    pub fn type_name(&self) -> &'static str {
        match self {
            Self::U8(_) => "u8",
            Self::I8(_) => "i8",
            Self::U16(_) => "u16",
            Self::I16(_) => "i16",
            Self::U32(_) => "u32",
            Self::I32(_) => "i32",
            Self::U64(_) => "u64",
            Self::I64(_) => "i64",
            Self::F32(_) => "f32",
            Self::F64(_) => "f64",
            Self::Bool(_) => "bool",
            Self::String(_) => "string",
            Self::Array(array) => array.type_name(),
        }
    }

    /// The string, if it is one.
    pub fn as_str(&self) -> Option<&str> {
        if let Self::String(value) = self { Some(value) } else { None }
    }

    /// The value of any integer type, if it is one and not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::U8(value) => Some(value.into()),
            Self::U16(value) => Some(value.into()),
            Self::U32(value) => Some(value.into()),
            Self::U64(value) => Some(value),
            Self::I8(value) => value.try_into().ok(),
            Self::I16(value) => value.try_into().ok(),
            Self::I32(value) => value.try_into().ok(),
            Self::I64(value) => value.try_into().ok(),
            _ => None,
        }
    }

    /// The number, if it is an f32.
    pub fn as_f32(&self) -> Option<f32> {
        if let Self::F32(value) = *self { Some(value) } else { None }
    }

    /// The flag, if it is one.
    pub fn as_bool(&self) -> Option<bool> {
        if let Self::Bool(value) = *self { Some(value) } else { None }
    }

    /// The array, if it is one.
    pub fn as_array(&self) -> Option<&GgufArray> {
        if let Self::Array(value) = self { Some(value) } else { None }
    }
}

impl GgufArray {
    /// The type's name, as errors show it.
    pub fn type_name(&self) -> &'static str {
        match self {
            Self::U8(_) => "array of u8",
            Self::I8(_) => "array of i8",
            Self::U16(_) => "array of u16",
            Self::I16(_) => "array of i16",
            Self::U32(_) => "array of u32",
            Self::I32(_) => "array of i32",
            Self::U64(_) => "array of u64",
            Self::I64(_) => "array of i64",
            Self::F32(_) => "array of f32",
            Self::F64(_) => "array of f64",
            Self::Bool(_) => "array of bool",
            Self::String(_) => "array of string",
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::U8(values) => values.len(),
            Self::I8(values) => values.len(),
            Self::U16(values) => values.len(),
            Self::I16(values) => values.len(),
            Self::U32(values) => values.len(),
            Self::I32(values) => values.len(),
            Self::U64(values) => values.len(),
            Self::I64(values) => values.len(),
            Self::F32(values) => values.len(),
            Self::F64(values) => values.len(),
            Self::Bool(values) => values.len(),
            Self::String(values) => values.len(),
        }
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Typed key-value pairs in file order. Keys are unique.
///
/// The typed getters are for keys that must be there: their errors name the file, the key, and the
/// types expected and found. For optional keys, [`get`](Self::get) and the `as_` methods of
/// [`GgufValue`].
#[derive(Debug, Clone, Default)]
pub struct GgufMetadata {
    path: PathBuf,
    pairs: Vec<(String, GgufValue)>,
    by_key: HashMap<String, usize>,
}

impl GgufMetadata {
    /// No pairs yet; `path` is the file that errors name.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), ..Self::default() }
    }

    /// Appends a pair, or replaces the value in place and returns the one that was there.
    pub fn set(&mut self, key: &str, value: GgufValue) -> Option<GgufValue> {
        if let Some(&position) = self.by_key.get(key) {
            return Some(std::mem::replace(&mut self.pairs[position].1, value));
        }
        self.by_key.insert(key.to_owned(), self.pairs.len());
        self.pairs.push((key.to_owned(), value));
        None
    }

    /// Removes a pair and returns its value; the others stay in order.
    pub fn remove(&mut self, key: &str) -> Option<GgufValue> {
        let position = self.by_key.remove(key)?;
        for later in self.by_key.values_mut().filter(|later| **later > position) {
            *later -= 1;
        }
        Some(self.pairs.remove(position).1)
    }

    /// Number of pairs.
    pub fn len(&self) -> usize {
        self.pairs.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.pairs.is_empty()
    }

    /// All pairs in file order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &GgufValue)> {
        self.pairs.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// The value of `key`, of whatever type.
    pub fn get(&self, key: &str) -> Option<&GgufValue> {
        self.by_key.get(key).map(|&position| &self.pairs[position].1)
    }

    /// The string at `key`.
    ///
    /// # Errors
    /// [`FormatError::MissingKey`] or [`FormatError::WrongValueType`], as for every getter below.
    pub fn str(&self, key: &str) -> Result<&str> {
        self.typed(key, "string", GgufValue::as_str)
    }

    /// The integer at `key`, of any integer type that holds no negative value.
    ///
    /// # Errors
    /// As [`str`](Self::str).
    pub fn u64(&self, key: &str) -> Result<u64> {
        self.typed(key, "non-negative integer", GgufValue::as_u64)
    }

    /// The number at `key`.
    ///
    /// # Errors
    /// As [`str`](Self::str).
    pub fn f32(&self, key: &str) -> Result<f32> {
        self.typed(key, "f32", GgufValue::as_f32)
    }

    /// The flag at `key`.
    ///
    /// # Errors
    /// As [`str`](Self::str).
    pub fn bool(&self, key: &str) -> Result<bool> {
        self.typed(key, "bool", GgufValue::as_bool)
    }

    /// The array of strings at `key`.
    ///
    /// # Errors
    /// As [`str`](Self::str).
    pub fn strings(&self, key: &str) -> Result<&GgufStrings> {
        self.typed(key, "array of string", |value| match value {
            GgufValue::Array(GgufArray::String(strings)) => Some(strings),
            _ => None,
        })
    }

    /// The array of i32 at `key`.
    ///
    /// # Errors
    /// As [`str`](Self::str).
    pub fn i32s(&self, key: &str) -> Result<&[i32]> {
        self.typed(key, "array of i32", |value| match value {
            GgufValue::Array(GgufArray::I32(values)) => Some(values.as_slice()),
            _ => None,
        })
    }

    /// The array of f32 at `key`.
    ///
    /// # Errors
    /// As [`str`](Self::str).
    pub fn f32s(&self, key: &str) -> Result<&[f32]> {
        self.typed(key, "array of f32", |value| match value {
            GgufValue::Array(GgufArray::F32(values)) => Some(values.as_slice()),
            _ => None,
        })
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        convert: impl Fn(&'a GgufValue) -> Option<T>,
    ) -> Result<T> {
        let value = self.get(key).ok_or_else(|| FormatError::MissingKey {
            path: self.path.clone(),
            key: key.to_owned(),
            expected,
        })?;
        convert(value).ok_or_else(|| FormatError::WrongValueType {
            path: self.path.clone(),
            key: key.to_owned(),
            expected,
            found: match value {
                // The number shows whether the sign or the type is wrong.
                GgufValue::I8(number) => format!("i8 {number}"),
                GgufValue::I16(number) => format!("i16 {number}"),
                GgufValue::I32(number) => format!("i32 {number}"),
                GgufValue::I64(number) => format!("i64 {number}"),
                _ => value.type_name().to_owned(),
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metadata() -> GgufMetadata {
        let mut metadata = GgufMetadata::new(Path::new("m.gguf"));
        metadata.set("name", GgufValue::String("tiny".to_owned()));
        metadata.set("heads", GgufValue::U32(9));
        metadata.set("file_type", GgufValue::I32(-1));
        metadata.set("eps", GgufValue::F32(1e-5));
        metadata.set("add_bos", GgufValue::Bool(true));
        let tokens = ["<s>", "", "é"].into_iter().collect();
        metadata.set("tokens", GgufValue::Array(GgufArray::String(tokens)));
        metadata.set("types", GgufValue::Array(GgufArray::I32(vec![1, -2])));
        metadata.set("scores", GgufValue::Array(GgufArray::F32(vec![0.5])));
        metadata
    }

    #[test]
    fn getters_return_values_of_their_type() {
        let metadata = metadata();
        assert_eq!(metadata.str("name").unwrap(), "tiny");
        assert_eq!(metadata.u64("heads").unwrap(), 9);
        assert_eq!(metadata.f32("eps").unwrap().to_bits(), 1e-5f32.to_bits());
        assert!(metadata.bool("add_bos").unwrap());
        assert_eq!(
            metadata.strings("tokens").unwrap().iter().collect::<Vec<_>>(),
            ["<s>", "", "é"]
        );
        assert_eq!(metadata.i32s("types").unwrap(), [1, -2]);
        assert_eq!(metadata.f32s("scores").unwrap(), [0.5]);
        assert_eq!(metadata.iter().next().unwrap().0, "name");
    }

    #[test]
    fn getters_name_file_key_and_both_types() {
        let metadata = metadata();
        let message = |result: Result<u64>| result.unwrap_err().to_string();
        assert_eq!(
            message(metadata.u64("name")),
            "m.gguf: metadata key `name`: expected non-negative integer, found string"
        );
        assert_eq!(
            message(metadata.u64("file_type")),
            "m.gguf: metadata key `file_type`: expected non-negative integer, found i32 -1"
        );
        assert_eq!(
            message(metadata.u64("layers")),
            "m.gguf: metadata key `layers` not found (expected non-negative integer)"
        );
        assert!(matches!(
            metadata.f32s("types"),
            Err(FormatError::WrongValueType { expected: "array of f32", found, .. })
                if found == "array of i32"
        ));
    }

    #[test]
    fn every_integer_type_that_fits_is_a_u64() {
        for value in [
            GgufValue::U8(7),
            GgufValue::I8(7),
            GgufValue::U16(7),
            GgufValue::I16(7),
            GgufValue::U32(7),
            GgufValue::I32(7),
            GgufValue::U64(7),
            GgufValue::I64(7),
        ] {
            assert_eq!(value.as_u64(), Some(7), "{}", value.type_name());
        }
        assert_eq!(GgufValue::I64(-1).as_u64(), None);
        assert_eq!(GgufValue::F32(7.0).as_u64(), None);
    }

    #[test]
    fn setting_a_key_again_replaces_in_place() {
        let mut metadata = metadata();
        assert_eq!(metadata.set("heads", GgufValue::U64(3)), Some(GgufValue::U32(9)));
        assert_eq!(metadata.iter().nth(1), Some(("heads", &GgufValue::U64(3))));
        assert_eq!(metadata.len(), 8);
    }

    #[test]
    fn removing_a_key_keeps_the_others_in_order() {
        let mut metadata = metadata();
        assert_eq!(metadata.remove("heads"), Some(GgufValue::U32(9)));
        assert_eq!(metadata.remove("heads"), None);
        assert_eq!(metadata.iter().nth(1).unwrap().0, "file_type");
        assert_eq!(metadata.f32s("scores").unwrap(), [0.5]);
        assert_eq!(metadata.len(), 7);
    }

    #[test]
    fn strings_are_found_by_position() {
        let strings: GgufStrings = ["a", "", "bc"].into_iter().collect();
        assert_eq!((strings.get(0), strings.get(1)), (Some("a"), Some("")));
        assert_eq!((strings.get(2), strings.get(3)), (Some("bc"), None));
    }
}
