//! Where every byte of a GGUF output goes, known before the first is written.
//!
//! Invariant: a layout has passed the reader's own header parser.

use std::{collections::HashSet, path::Path};

use super::{
    ALIGNMENT_KEY, MAGIC, VERSION, header,
    header::Header,
    metadata::{GgufArray, GgufMetadata, GgufStrings, GgufValue},
    split::{self, SPLIT_KEYS, Split},
};
use crate::{
    DType, Encoding, FormatError, GgmlType, Result,
    parts::{FileLayout, Place},
};

/// What a GGUF output holds.
#[derive(Debug, Clone, Default)]
pub struct GgufLayout {
    /// Key-value pairs in file order. Keys about splitting are the writer's own.
    pub metadata: GgufMetadata,
    /// Tensors of each file in file order: name, encoding, row-major shape.
    pub files: Vec<Vec<(String, Encoding, Vec<usize>)>>,
}

/// Lays out every file.
///
/// # Errors
/// [`FormatError`] when a name is used twice or is too long, or a type, shape or value is one that
/// the reader would refuse.
pub(super) fn lay_out(directory: &Path, layout: &GgufLayout) -> Result<Vec<FileLayout>> {
    let count = layout.files.len();
    if count == 0 {
        return Err(FormatError::InvalidHeader {
            path: directory.to_owned(),
            offset: 0,
            what: "a checkpoint needs at least one file".to_owned(),
        });
    }
    let mut names = HashSet::new();
    let mut files = vec![];
    for (no, tensors) in layout.files.iter().enumerate() {
        let name = split::file_name(no, count);
        let path = directory.join(&name);
        for (tensor, ..) in tensors {
            if !names.insert(tensor.as_str()) {
                return Err(FormatError::DuplicateTensor { path, name: tensor.clone() });
            }
        }
        let metadata = file_metadata(&path, layout, no)?;
        files.push(lay_out_file(&path, name, &metadata, tensors)?);
    }
    Ok(files)
}

/// The pairs of one file: all of them in the first, where tensors lie and nothing else in the others.
fn file_metadata(path: &Path, layout: &GgufLayout, no: usize) -> Result<GgufMetadata> {
    let count = layout.files.len();
    let mut metadata = GgufMetadata::new(path);
    for (key, value) in layout.metadata.iter() {
        if !SPLIT_KEYS.contains(&key) && (no == 0 || key == ALIGNMENT_KEY) {
            metadata.set(key, value.clone());
        }
    }
    if count > 1 {
        let tensors = layout.files.iter().map(Vec::len).sum::<usize>() as u64;
        Split { no: no as u64, count: count as u64, tensors }.set(path, &mut metadata)?;
    }
    Ok(metadata)
}

fn lay_out_file(
    path: &Path,
    name: String,
    metadata: &GgufMetadata,
    tensors: &[(String, Encoding, Vec<usize>)],
) -> Result<FileLayout> {
    let alignment = header::alignment(path, 0, metadata)?;
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend((tensors.len() as u64).to_le_bytes());
    bytes.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata.iter() {
        put_string(&mut bytes, key);
        put_value(&mut bytes, value);
    }
    let mut places = vec![];
    let mut end = 0u64;
    for (name, encoding, shape) in tensors {
        let size = describe(path, &mut bytes, name, *encoding, shape, end)?;
        places.push((name, end, size));
        end = end
            .checked_add(size)
            .and_then(|end| end.checked_next_multiple_of(alignment))
            .ok_or_else(|| refuse(name, "the size of the file overflows".to_owned()))?;
    }
    // What the reader would refuse is refused now, in its words.
    let data_start = Header::parse(path, &bytes)?.data_start;
    let file_bytes = data_start.checked_add(end).ok_or_else(|| FormatError::InvalidHeader {
        path: path.to_owned(),
        offset: data_start,
        what: format!("{end} bytes of data and the header overflow"),
    })?;
    bytes.resize(data_start as usize, 0);
    let tensors = places
        .into_iter()
        .map(|(name, offset, bytes)| {
            let place = Place { name: name.clone(), start: data_start + offset, bytes };
            (name.clone(), vec![place])
        })
        .collect();
    Ok(FileLayout { name, header: bytes, bytes: file_bytes, tensors })
}

/// Appends a tensor's description and returns the bytes of its data.
fn describe(
    path: &Path,
    out: &mut Vec<u8>,
    name: &str,
    encoding: Encoding,
    shape: &[usize],
    offset: u64,
) -> Result<u64> {
    let ty = ggml_type(encoding)
        .ok_or_else(|| refuse(name, format!("a GGUF file cannot hold {encoding}")))?;
    if name.len() as u64 > header::MAX_NAME_BYTES {
        return Err(FormatError::InvalidTensor {
            path: path.to_owned(),
            name: name.to_owned(),
            what: format!(
                "the name has {} bytes, more than the limit of {}",
                name.len(),
                header::MAX_NAME_BYTES
            ),
        });
    }
    put_string(out, name);
    out.extend((shape.len() as u32).to_le_bytes());
    out.extend(shape.iter().rev().flat_map(|&dim| (dim as u64).to_le_bytes()));
    out.extend(ty.id().to_le_bytes());
    out.extend(offset.to_le_bytes());
    Ok(encoding.components(name, shape)?.iter().map(|component| component.bytes).sum())
}

/// The type that a GGUF file has for an encoding.
fn ggml_type(encoding: Encoding) -> Option<GgmlType> {
    match encoding {
        Encoding::Dense { dtype: DType::F32 } => Some(GgmlType::F32),
        Encoding::Dense { dtype: DType::F16 } => Some(GgmlType::F16),
        Encoding::Dense { dtype: DType::Bf16 } => Some(GgmlType::BF16),
        Encoding::Ggml { ty } => Some(ty),
        _ => None,
    }
}

fn refuse(name: &str, what: String) -> FormatError {
    FormatError::Encoding { name: name.to_owned(), what }
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &GgufValue) {
    let mut put = |id: u32, bytes: &[u8]| {
        out.extend(id.to_le_bytes());
        out.extend(bytes);
    };
    match value {
        GgufValue::U8(value) => put(0, &value.to_le_bytes()),
        GgufValue::I8(value) => put(1, &value.to_le_bytes()),
        GgufValue::U16(value) => put(2, &value.to_le_bytes()),
        GgufValue::I16(value) => put(3, &value.to_le_bytes()),
        GgufValue::U32(value) => put(4, &value.to_le_bytes()),
        GgufValue::I32(value) => put(5, &value.to_le_bytes()),
        GgufValue::F32(value) => put(6, &value.to_le_bytes()),
        GgufValue::Bool(value) => put(7, &[u8::from(*value)]),
        GgufValue::String(value) => {
            put(8, &[]);
            put_string(out, value);
        }
        GgufValue::Array(array) => {
            put(9, &[]);
            put_array(out, array);
        }
        GgufValue::U64(value) => put(10, &value.to_le_bytes()),
        GgufValue::I64(value) => put(11, &value.to_le_bytes()),
        GgufValue::F64(value) => put(12, &value.to_le_bytes()),
    }
}

fn put_array(out: &mut Vec<u8>, array: &GgufArray) {
    fn numbers<T: Copy, const N: usize>(
        out: &mut Vec<u8>,
        id: u32,
        values: &[T],
        encode: impl Fn(T) -> [u8; N],
    ) {
        out.extend(id.to_le_bytes());
        out.extend((values.len() as u64).to_le_bytes());
        out.extend(values.iter().flat_map(|value| encode(*value)));
    }
    fn strings(out: &mut Vec<u8>, values: &GgufStrings) {
        out.extend(8u32.to_le_bytes());
        out.extend((values.len() as u64).to_le_bytes());
        values.iter().for_each(|value| put_string(out, value));
    }
    match array {
        GgufArray::U8(values) => numbers(out, 0, values, u8::to_le_bytes),
        GgufArray::I8(values) => numbers(out, 1, values, i8::to_le_bytes),
        GgufArray::U16(values) => numbers(out, 2, values, u16::to_le_bytes),
        GgufArray::I16(values) => numbers(out, 3, values, i16::to_le_bytes),
        GgufArray::U32(values) => numbers(out, 4, values, u32::to_le_bytes),
        GgufArray::I32(values) => numbers(out, 5, values, i32::to_le_bytes),
        GgufArray::F32(values) => numbers(out, 6, values, f32::to_le_bytes),
        GgufArray::Bool(values) => numbers(out, 7, values, |value| [u8::from(value)]),
        GgufArray::String(values) => strings(out, values),
        GgufArray::U64(values) => numbers(out, 10, values, u64::to_le_bytes),
        GgufArray::I64(values) => numbers(out, 11, values, i64::to_le_bytes),
        GgufArray::F64(values) => numbers(out, 12, values, f64::to_le_bytes),
    }
}
