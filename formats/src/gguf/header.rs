//! Parsing everything before the tensor data.

use std::path::Path;

use super::cursor::{Cursor, StringKind};
use super::metadata::{GgufArray, GgufMetadata, GgufValue};
use super::{ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAGIC, tensor_type};
use crate::{FormatError, GgmlType, Result};

/// Most tensors: ours. The largest checkpoints have about 100 thousand (one per expert matrix).
const MAX_TENSORS: u64 = 1 << 20;
/// Most metadata pairs: ours. Real files have tens.
const MAX_PAIRS: u64 = 1 << 16;
/// Most elements of an array: llama.cpp's `GGUF_MAX_ARRAY_ELEMENTS`.
const MAX_ARRAY_ELEMENTS: u64 = 1 << 30;
/// Most dimensions: ggml's `GGML_MAX_DIMS`.
const MAX_DIMS: u32 = 4;
/// Most bytes of a tensor's name: ggml's `GGML_MAX_NAME` less the NUL.
pub(super) const MAX_NAME_BYTES: u64 = 63;
/// Bytes of the shortest pair: an empty key, a type, a one-byte value.
const MIN_PAIR_BYTES: u64 = 8 + 4 + 1;
/// Bytes of the shortest tensor description: an empty name, no dimensions.
const MIN_TENSOR_BYTES: u64 = 8 + 4 + 4 + 8;

/// Everything before the tensor data.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) metadata: GgufMetadata,
    pub(super) tensors: Vec<TensorEntry>,
    pub(super) alignment: u64,
    /// Where the data section starts.
    pub(super) data_start: u64,
}

/// One tensor as the header describes it.
#[derive(Debug)]
pub(super) struct TensorEntry {
    pub(super) name: String,
    pub(super) ty: GgmlType,
    /// Row-major, outermost first: the reverse of the file. No dimension is zero, and the number of
    /// elements fits `usize`.
    pub(super) shape: Vec<usize>,
    /// From the start of the data section.
    pub(super) offset: u64,
}

impl Header {
    /// Parses the start of a file.
    pub(super) fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        let mut cursor = Cursor::new(path, bytes);
        let version = read_version(&mut cursor)?;
        let tensor_count = cursor.count("the number of tensors", MAX_TENSORS, MIN_TENSOR_BYTES)?;
        let pair_count = cursor.count("the number of metadata pairs", MAX_PAIRS, MIN_PAIR_BYTES)?;
        let metadata = read_metadata(&mut cursor, pair_count)?;
        let alignment = alignment(path, cursor.offset(), &metadata)?;
        let mut tensors = Vec::with_capacity(tensor_count);
        for _ in 0..tensor_count {
            tensors.push(read_tensor(&mut cursor)?);
        }
        // The position is at most isize::MAX and the alignment fits 32 bits.
        let data_start = cursor.offset().next_multiple_of(alignment);
        Ok(Self { version, metadata, tensors, alignment, data_start })
    }
}

fn read_version(cursor: &mut Cursor<'_>) -> Result<u32> {
    let magic: [u8; 4] = cursor.array("the magic number")?;
    if magic != *MAGIC {
        let found = magic.escape_ascii();
        return Err(cursor.invalid(0, format!("expected the magic number GGUF, found `{found}`")));
    }
    let version = cursor.u32("the version")?;
    let found = match version {
        2 | 3 => return Ok(version),
        1 => "1 (32-bit counts, obsolete since 2023)".to_owned(),
        // The low half of a small big endian number is zero when read as little endian.
        _ if version.trailing_zeros() >= 16 && version != 0 => {
            format!("{} in big endian byte order", version.swap_bytes())
        }
        _ => version.to_string(),
    };
    Err(FormatError::UnsupportedVersion {
        path: cursor.path().to_owned(),
        format: "GGUF",
        found,
        supported: "2 and 3, little endian",
    })
}

fn read_metadata(cursor: &mut Cursor<'_>, count: usize) -> Result<GgufMetadata> {
    let mut metadata = GgufMetadata::new(cursor.path());
    for _ in 0..count {
        let offset = cursor.offset();
        let key = cursor.string(&StringKind::KEY)?;
        let value = read_value(cursor, key)?;
        if metadata.set(key, value).is_some() {
            return Err(FormatError::DuplicateKey {
                path: cursor.path().to_owned(),
                offset,
                key: key.to_owned(),
            });
        }
    }
    Ok(metadata)
}

fn read_value(cursor: &mut Cursor<'_>, key: &str) -> Result<GgufValue> {
    let what = format!("the value of metadata key `{key}`");
    let offset = cursor.offset();
    Ok(match cursor.u32(&what)? {
        0 => GgufValue::U8(u8::from_le_bytes(cursor.array(&what)?)),
        1 => GgufValue::I8(i8::from_le_bytes(cursor.array(&what)?)),
        2 => GgufValue::U16(u16::from_le_bytes(cursor.array(&what)?)),
        3 => GgufValue::I16(i16::from_le_bytes(cursor.array(&what)?)),
        4 => GgufValue::U32(u32::from_le_bytes(cursor.array(&what)?)),
        5 => GgufValue::I32(i32::from_le_bytes(cursor.array(&what)?)),
        6 => GgufValue::F32(f32::from_le_bytes(cursor.array(&what)?)),
        7 => GgufValue::Bool(bools(cursor, 1, &what)?[0]),
        8 => GgufValue::String(cursor.string(&StringKind::VALUE)?.to_owned()),
        9 => GgufValue::Array(read_array(cursor, key)?),
        10 => GgufValue::U64(u64::from_le_bytes(cursor.array(&what)?)),
        11 => GgufValue::I64(i64::from_le_bytes(cursor.array(&what)?)),
        12 => GgufValue::F64(f64::from_le_bytes(cursor.array(&what)?)),
        found => return Err(unknown_value_type(cursor, offset, key, found)),
    })
}

fn read_array(cursor: &mut Cursor<'_>, key: &str) -> Result<GgufArray> {
    let what = format!("the array at metadata key `{key}`");
    let offset = cursor.offset();
    let element_type = cursor.u32(&what)?;
    // A string takes at least its length; every other element at least a byte, and `numbers` checks
    // the exact size.
    let min_bytes = if element_type == 8 { 8 } else { 1 };
    let count = cursor.count("the length of an array", MAX_ARRAY_ELEMENTS, min_bytes)?;
    Ok(match element_type {
        0 => GgufArray::U8(numbers(cursor, count, &what, u8::from_le_bytes)?),
        1 => GgufArray::I8(numbers(cursor, count, &what, i8::from_le_bytes)?),
        2 => GgufArray::U16(numbers(cursor, count, &what, u16::from_le_bytes)?),
        3 => GgufArray::I16(numbers(cursor, count, &what, i16::from_le_bytes)?),
        4 => GgufArray::U32(numbers(cursor, count, &what, u32::from_le_bytes)?),
        5 => GgufArray::I32(numbers(cursor, count, &what, i32::from_le_bytes)?),
        6 => GgufArray::F32(numbers(cursor, count, &what, f32::from_le_bytes)?),
        7 => GgufArray::Bool(bools(cursor, count, &what)?),
        8 => GgufArray::String(cursor.strings(count)?),
        9 => {
            return Err(cursor.invalid(
                offset,
                format!("metadata key `{key}` is an array of arrays, which llama.cpp does not read either"),
            ));
        }
        10 => GgufArray::U64(numbers(cursor, count, &what, u64::from_le_bytes)?),
        11 => GgufArray::I64(numbers(cursor, count, &what, i64::from_le_bytes)?),
        12 => GgufArray::F64(numbers(cursor, count, &what, f64::from_le_bytes)?),
        found => return Err(unknown_value_type(cursor, offset, key, found)),
    })
}

fn numbers<T, const N: usize>(
    cursor: &mut Cursor<'_>,
    count: usize,
    what: &str,
    decode: impl Fn([u8; N]) -> T,
) -> Result<Vec<T>> {
    let bytes = cursor.take((count as u64).saturating_mul(N as u64), what)?;
    Ok(bytes.as_chunks::<N>().0.iter().map(|chunk| decode(*chunk)).collect())
}

fn bools(cursor: &mut Cursor<'_>, count: usize, what: &str) -> Result<Vec<bool>> {
    let start = cursor.offset();
    let bytes = cursor.take(count as u64, what)?;
    let decode = |(i, &byte)| match byte {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(cursor
            .invalid(start + i as u64, format!("{what}: expected a bool of 0 or 1, found {byte}"))),
    };
    bytes.iter().enumerate().map(decode).collect()
}

fn unknown_value_type(cursor: &Cursor<'_>, offset: u64, key: &str, found: u32) -> FormatError {
    cursor.invalid(
        offset,
        format!("metadata key `{key}`: expected a value type from 0 to 12, found {found}"),
    )
}

/// The alignment that the metadata, which ends at `offset`, names, or the default.
pub(super) fn alignment(path: &Path, offset: u64, metadata: &GgufMetadata) -> Result<u64> {
    if metadata.get(ALIGNMENT_KEY).is_none() {
        return Ok(DEFAULT_ALIGNMENT);
    }
    let found = metadata.u64(ALIGNMENT_KEY)?;
    // The specification says a multiple of 8, llama.cpp a power of two, and both say u32.
    if !found.is_power_of_two() || !(8..=1 << 31).contains(&found) {
        return Err(FormatError::InvalidHeader {
            path: path.to_owned(),
            offset,
            what: format!(
                "`{ALIGNMENT_KEY}`: expected a power of two from 8 to 2^31, found {found}"
            ),
        });
    }
    Ok(found)
}

fn read_tensor(cursor: &mut Cursor<'_>) -> Result<TensorEntry> {
    let name = cursor.string(&StringKind::TENSOR_NAME)?;
    let what = format!("the description of tensor `{name}`");
    let invalid = |path: &Path, what| FormatError::InvalidTensor {
        path: path.to_owned(),
        name: name.to_owned(),
        what,
    };
    let rank = cursor.u32(&what)?;
    if rank > MAX_DIMS {
        let what = format!("expected at most {MAX_DIMS} dimensions, found {rank}");
        return Err(invalid(cursor.path(), what));
    }
    let mut dims = [1; MAX_DIMS as usize];
    let dims = &mut dims[..rank as usize];
    for dim in dims.iter_mut().rev() {
        *dim = cursor.u64(&what)?;
    }
    let shape = checked_shape(dims).map_err(|what| invalid(cursor.path(), what))?;
    let id = cursor.u32(&what)?;
    let ty = GgmlType::from_id(id).ok_or_else(|| FormatError::UnsupportedType {
        path: cursor.path().to_owned(),
        name: name.to_owned(),
        found: tensor_type::describe_unread(id),
        supported: tensor_type::supported(),
    })?;
    let offset = cursor.u64(&what)?;
    Ok(TensorEntry { name: name.to_owned(), ty, shape, offset })
}

/// `dims` as a shape whose element count fits, or what is wrong with it.
fn checked_shape(dims: &[u64]) -> std::result::Result<Vec<usize>, String> {
    if dims.contains(&0) {
        return Err(format!("shape {dims:?} has a dimension of zero"));
    }
    let overflow = || format!("the number of elements of shape {dims:?} overflows");
    let mut elements = 1usize;
    let mut shape = Vec::with_capacity(dims.len());
    for &dim in dims {
        let dim = usize::try_from(dim).map_err(|_| overflow())?;
        elements = elements.checked_mul(dim).ok_or_else(overflow)?;
        shape.push(dim);
    }
    Ok(shape)
}
