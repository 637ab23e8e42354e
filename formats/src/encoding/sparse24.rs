//! 2:4 sparse matrices: of every four columns, two are kept.
//!
//! For a matrix of `R` rows and `C` columns (`C` a multiple of four) two components are stored:
//!
//! ```text
//! NAME.values    dtype  [R, C/2]        kept values in ascending column, two per group
//! NAME.metadata  U8     [R, ceil(C/8)]  one nibble per group, the even group in the low nibble
//!
//!   nibble   bit 3..2  i1   column of the second kept value in its group
//!            bit 1..0  i0   column of the first, always i0 < i1
//!   legal    0x4 (0,1)  0x8 (0,2)  0xC (0,3)  0x9 (1,2)  0xD (1,3)  0xE (2,3)
//! ```
//!
//! These are the nibbles that `mma.sp` consumes, in plain row-major order. An odd number of groups
//! leaves one high nibble unused; it is [`PAD`], the nibble of a group of zeros.
//!
//! The invariant: decoding gives back the bits that were encoded. Zero therefore means the bit
//! pattern of `+0.0`; `-0.0` and every NaN are values and are kept. A group of more than two values is
//! refused, never pruned. A group of fewer keeps one or two zeros beside its values, at the columns
//! that the CUTLASS packing of `torch` would choose, so that equal matrices have equal bytes.

use std::ops::Range;

use super::{Component, MatrixShape, check_length, check_rows, dense, mask, nibbles};
use crate::{DType, FormatError, Result};

/// Fills the unused nibble of a row with an odd number of groups.
pub const PAD: u8 = 0xE;

/// Marks a group of three or four values in [`NIBBLES`].
const TOO_MANY: u8 = 0x80;

/// Nibble by which of the four columns (bit 0 is column 0) hold values.
const NIBBLES: [u8; 16] = [
    0xE, 0x8, 0x9, 0x4, // ----, 0, 1, 01
    0xE, 0x8, 0x9, TOO_MANY, // 2, 02, 12, 012
    0xE, 0xC, 0xD, TOO_MANY, // 3, 03, 13, 013
    0xE, TOO_MANY, TOO_MANY, TOO_MANY, // 23, 023, 123, 0123
];

/// 1 for each metadata byte with a nibble that is not legal, else 0.
const ILLEGAL: [u8; 256] = {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = !(is_legal(byte as u8 & 0xF) && is_legal(byte as u8 >> 4)) as u8;
        byte += 1;
    }
    table
};

const fn is_legal(nibble: u8) -> bool {
    nibble & 3 < nibble >> 2
}

/// The stored components of a 2:4 matrix.
pub(super) fn components(name: &str, dtype: DType, shape: &[usize]) -> Result<Vec<Component>> {
    let refuse = |what| Err(FormatError::Encoding { name: name.to_owned(), what });
    if !mask::holds(dtype) {
        return refuse(format!("2:4 values of type {dtype}; expected {}", mask::HELD));
    }
    let &[rows, cols] = shape else {
        return refuse(format!("2:4 needs a matrix, found shape {shape:?}"));
    };
    if cols % 4 != 0 {
        return refuse(format!("2:4 needs a multiple of 4 columns, found {cols}"));
    }
    let component = |suffix, dtype, cols| {
        let shape = vec![rows, cols];
        let bytes = dense::size_bytes(dtype, &shape)?;
        Some(Component { suffix, dtype, shape, bytes })
    };
    // The dense size bounds both components, and everything computed from them.
    let parts = dense::size_bytes(dtype, shape)
        .and_then(|_| component(".values", dtype, cols / 2))
        .zip(component(".metadata", DType::U8, cols.div_ceil(8)));
    match parts {
        Some((values, metadata)) => Ok(vec![values, metadata]),
        None => refuse(format!("the size of shape {shape:?} overflows")),
    }
}

/// Appends the components of a matrix given as little-endian bytes of `dtype`.
///
/// `dense_bytes` is the whole matrix or any number of whole rows of it: rows are independent.
///
/// # Errors
/// [`FormatError::Encoding`] when a group of four columns has more than two elements other than
/// `+0.0` (row and column named; `values` and `metadata` are then as they were), `dtype` is not a
/// float weight type, I8 or U8, the columns are not a multiple of four, or `dense_bytes` has another
/// length.
pub fn encode(
    name: &str,
    dtype: DType,
    matrix: MatrixShape,
    dense_bytes: &[u8],
    values: &mut Vec<u8>,
    metadata: &mut Vec<u8>,
) -> Result<()> {
    encode_from(0, name, dtype, matrix, dense_bytes, values, metadata)
}

/// As [`encode`] for rows of which the first is row `first_row` of the tensor.
pub(super) fn encode_from(
    first_row: usize,
    name: &str,
    dtype: DType,
    matrix: MatrixShape,
    dense_bytes: &[u8],
    values: &mut Vec<u8>,
    metadata: &mut Vec<u8>,
) -> Result<()> {
    components(name, dtype, &[matrix.rows, matrix.cols])?;
    let row_bytes = matrix.cols * dtype.size_bytes();
    check_length(name, "dense", dense_bytes.len(), matrix.rows * row_bytes)?;
    if row_bytes == 0 {
        return Ok(());
    }
    let before = (values.len(), metadata.len());
    let meta_stride = matrix.cols.div_ceil(8);
    values.reserve(dense_bytes.len() / 2);
    metadata.reserve(matrix.rows * meta_stride);
    for (row, row_in) in dense_bytes.chunks_exact(row_bytes).enumerate() {
        // Row by row, so that the zeros `resize` writes are overwritten while they are in cache.
        let (values_at, metadata_at) = (values.len(), metadata.len());
        values.resize(values_at + row_bytes / 2, 0);
        metadata.resize(metadata_at + meta_stride, 0);
        let (row_values, row_metadata) = (&mut values[values_at..], &mut metadata[metadata_at..]);
        let legal = match dtype.size_bytes() {
            1 => encode_row::<4, 2>(row_in, row_values, row_metadata, group_of_bytes),
            2 => encode_row::<8, 4>(row_in, row_values, row_metadata, group_of_halves),
            _ => encode_row::<16, 8>(row_in, row_values, row_metadata, group_of_floats),
        };
        if !legal {
            values.truncate(before.0);
            metadata.truncate(before.1);
            return Err(too_many(name, dtype, first_row + row, row_in));
        }
    }
    Ok(())
}

/// Appends rows `rows` as little-endian bytes of `dtype`; `values` and `metadata` are whole.
///
/// # Errors
/// [`FormatError::Encoding`] when a nibble is not legal (row and column named; `out` is then as it
/// was), or a length does not fit `matrix`.
pub fn decode(
    name: &str,
    dtype: DType,
    matrix: MatrixShape,
    values: &[u8],
    metadata: &[u8],
    rows: Range<usize>,
    out: &mut Vec<u8>,
) -> Result<()> {
    let before = out.len();
    let row_bytes = matrix.cols * dtype.size_bytes();
    out.reserve(rows.len().min(matrix.rows) * row_bytes);
    let result = decode_rows(name, dtype, matrix, values, metadata, rows, |row| {
        let start = out.len();
        out.resize(start + row_bytes, 0);
        row.expand(&mut out[start..])
    });
    if result.is_err() {
        out.truncate(before);
    }
    result
}

/// Decodes rows `rows` to f32, row-major, into `out`.
///
/// # Errors
/// As [`decode`]; also when `out` is not `rows × columns` long or `dtype` is not a float type.
pub fn decode_f32(
    name: &str,
    dtype: DType,
    matrix: MatrixShape,
    values: &[u8],
    metadata: &[u8],
    rows: Range<usize>,
    out: &mut [f32],
) -> Result<()> {
    dense::check_float(name, dtype)?;
    check_length(name, "output", out.len(), rows.len() * matrix.cols)?;
    let mut scratch = vec![0; matrix.cols * dtype.size_bytes()];
    let mut out_rows = out.chunks_exact_mut(matrix.cols.max(1));
    decode_rows(name, dtype, matrix, values, metadata, rows, |row| {
        let legal = row.expand(&mut scratch);
        if let Some(out) = out_rows.next() {
            dense::to_f32(dtype, &scratch, out);
        }
        legal
    })
}

/// Appends the components of a matrix of 4-bit codes: `codes` and `values` have two in a byte, the
/// even column in the low nibble, and code 0 counts as zero.
///
/// `codes` is the whole matrix or any number of whole rows of it. Component shapes in bytes:
/// `values [rows, cols/4]`, `metadata [rows, ceil(cols/8)]`.
///
/// # Errors
/// [`FormatError::Encoding`] when a group of four columns has more than two codes other than 0 (row
/// and column named; `values` and `metadata` are then as they were), the columns are not a multiple of
/// four, or `codes` has another length.
pub fn encode_nibbles(
    name: &str,
    matrix: MatrixShape,
    codes: &[u8],
    values: &mut Vec<u8>,
    metadata: &mut Vec<u8>,
) -> Result<()> {
    components(name, DType::U8, &[matrix.rows, matrix.cols])?;
    check_length(name, "codes", codes.len(), matrix.rows * nibbles::stride(matrix.cols))?;
    let codes = nibbles::unpack(name, codes, matrix.cols, 0)?;
    let mut kept = vec![];
    encode(name, DType::U8, matrix, &codes, &mut kept, metadata)?;
    nibbles::pack(&kept, matrix.cols / 2, values);
    Ok(())
}

/// Appends rows `rows` of a matrix of 4-bit codes, the inverse of [`encode_nibbles`]; `values` and
/// `metadata` are whole.
///
/// # Errors
/// As [`decode`].
pub fn decode_nibbles(
    name: &str,
    matrix: MatrixShape,
    values: &[u8],
    metadata: &[u8],
    rows: Range<usize>,
    out: &mut Vec<u8>,
) -> Result<()> {
    components(name, DType::U8, &[matrix.rows, matrix.cols])?;
    check_rows(name, &rows, matrix.rows)?;
    let (before, kept) = (out.len(), matrix.cols / 2);
    let (value_stride, meta_stride) = (nibbles::stride(kept), matrix.cols.div_ceil(8));
    check_length(name, ".values", values.len(), matrix.rows * value_stride)?;
    check_length(name, ".metadata", metadata.len(), matrix.rows * meta_stride)?;
    let mut codes = vec![0; matrix.cols];
    for row in rows {
        // Groups keep two codes, so a row of values has no unused nibble.
        let values =
            nibbles::unpack(name, &values[row * value_stride..][..value_stride], kept, row)?;
        let metadata = &metadata[row * meta_stride..][..meta_stride];
        if !(PackedRow { element_bytes: 1, values: &values, metadata }).expand(&mut codes) {
            out.truncate(before);
            return Err(illegal_nibble(name, matrix.cols / 4, row, metadata));
        }
        nibbles::pack(&codes, matrix.cols, out);
    }
    Ok(())
}

/// The stored bytes of one row.
struct PackedRow<'a> {
    element_bytes: usize,
    values: &'a [u8],
    metadata: &'a [u8],
}

impl PackedRow<'_> {
    /// Expands the row; false when a nibble is not legal.
    fn expand(&self, out: &mut [u8]) -> bool {
        match self.element_bytes {
            1 => decode_row::<4, 2>(self.values, self.metadata, out, expand_bytes),
            2 => decode_row::<8, 4>(self.values, self.metadata, out, expand_halves),
            _ => decode_row::<16, 8>(self.values, self.metadata, out, expand_floats),
        }
    }
}

fn decode_rows(
    name: &str,
    dtype: DType,
    matrix: MatrixShape,
    values: &[u8],
    metadata: &[u8],
    rows: Range<usize>,
    mut expand: impl FnMut(PackedRow<'_>) -> bool,
) -> Result<()> {
    components(name, dtype, &[matrix.rows, matrix.cols])?;
    let element_bytes = dtype.size_bytes();
    let value_stride = matrix.cols / 2 * element_bytes;
    let meta_stride = matrix.cols.div_ceil(8);
    check_length(name, ".values", values.len(), matrix.rows * value_stride)?;
    check_length(name, ".metadata", metadata.len(), matrix.rows * meta_stride)?;
    check_rows(name, &rows, matrix.rows)?;
    for row in rows {
        let packed = PackedRow {
            element_bytes,
            values: &values[row * value_stride..][..value_stride],
            metadata: &metadata[row * meta_stride..][..meta_stride],
        };
        let metadata = packed.metadata;
        if !expand(packed) {
            return Err(illegal_nibble(name, matrix.cols / 4, row, metadata));
        }
    }
    Ok(())
}

/// Packs one row; `GROUP` is the bytes of four elements and `KEPT` the bytes of two. False when a
/// group has more than two values.
fn encode_row<const GROUP: usize, const KEPT: usize>(
    dense: &[u8],
    values: &mut [u8],
    metadata: &mut [u8],
    pack: impl Fn([u8; GROUP]) -> ([u8; KEPT], u8),
) -> bool {
    let (pairs, odd) = {
        let (groups, _) = dense.as_chunks::<GROUP>();
        groups.as_chunks::<2>()
    };
    let (kept, _) = values.as_chunks_mut::<KEPT>();
    let (kept_pairs, kept_odd) = kept.as_chunks_mut::<2>();
    let mut flaws = 0;
    for (([low, high], kept), byte) in pairs.iter().zip(kept_pairs).zip(&mut *metadata) {
        let (low, low_nibble) = pack(*low);
        let (high, high_nibble) = pack(*high);
        *kept = [low, high];
        *byte = low_nibble | high_nibble << 4;
        flaws |= low_nibble | high_nibble;
    }
    if let ([group], [kept], Some(byte)) = (odd, kept_odd, metadata.last_mut()) {
        let (values, nibble) = pack(*group);
        *kept = values;
        *byte = nibble | PAD << 4;
        flaws |= nibble;
    }
    flaws & TOO_MANY == 0
}

/// Keeps two of four bytes.
#[inline]
fn group_of_bytes(group: [u8; 4]) -> ([u8; 2], u8) {
    let flags = (0..4).fold(0, |flags, i| flags | usize::from(group[i] != 0) << i);
    let nibble = NIBBLES[flags];
    ([group[usize::from(nibble & 3)], group[usize::from(nibble >> 2 & 3)]], nibble)
}

/// Keeps two of four 16-bit lanes.
#[inline]
fn group_of_halves(group: [u8; 8]) -> ([u8; 4], u8) {
    const LOW_BITS: u64 = 0x7FFF_7FFF_7FFF_7FFF;
    // Moves bit 16 i to bit 48 + i: the four products do not carry into each other.
    const GATHER: u64 = 1 << 48 | 1 << 33 | 1 << 18 | 1 << 3;
    let lanes = u64::from_le_bytes(group);
    // The top bit of a lane becomes set exactly when the lane is not zero.
    let nonzero = (((lanes & LOW_BITS) + LOW_BITS) | lanes) & !LOW_BITS;
    let flags = ((nonzero >> 15).wrapping_mul(GATHER) >> 48) & 0xF;
    let nibble = NIBBLES[flags as usize];
    let (first, second) = (nibble << 4 & 0x30, nibble << 2 & 0x30);
    let kept = (lanes >> first & 0xFFFF) as u32 | ((lanes >> second) as u32) << 16;
    (kept.to_le_bytes(), nibble)
}

/// Keeps two of four 32-bit lanes.
#[inline]
fn group_of_floats(group: [u8; 16]) -> ([u8; 8], u8) {
    let (lanes, _) = group.as_chunks::<4>();
    let lanes: [u32; 4] = std::array::from_fn(|i| u32::from_le_bytes(lanes[i]));
    let flags = (0..4).fold(0, |flags, i| flags | usize::from(lanes[i] != 0) << i);
    let nibble = NIBBLES[flags];
    let (first, second) = (lanes[usize::from(nibble & 3)], lanes[usize::from(nibble >> 2 & 3)]);
    ((u64::from(first) | u64::from(second) << 32).to_le_bytes(), nibble)
}

/// Expands one row; false when a nibble is not legal or the padding is not [`PAD`].
fn decode_row<const GROUP: usize, const KEPT: usize>(
    values: &[u8],
    metadata: &[u8],
    out: &mut [u8],
    expand: impl Fn([u8; KEPT], u8) -> [u8; GROUP],
) -> bool {
    let (kept, _) = values.as_chunks::<KEPT>();
    let (kept_pairs, kept_odd) = kept.as_chunks::<2>();
    let (groups, _) = out.as_chunks_mut::<GROUP>();
    let (pairs, odd) = groups.as_chunks_mut::<2>();
    let mut flaws = 0;
    for (([low, high], out), &byte) in kept_pairs.iter().zip(pairs).zip(metadata) {
        *out = [expand(*low, byte & 0xF), expand(*high, byte >> 4)];
        flaws |= ILLEGAL[usize::from(byte)];
    }
    if let ([kept], [out], Some(&byte)) = (kept_odd, odd, metadata.last()) {
        *out = expand(*kept, byte & 0xF);
        flaws |= ILLEGAL[usize::from(byte)] | u8::from(byte >> 4 != PAD);
    }
    flaws == 0
}

/// Puts two bytes at their columns.
#[inline]
fn expand_bytes([first, second]: [u8; 2], nibble: u8) -> [u8; 4] {
    (u32::from(first) << (8 * (nibble & 3)) | u32::from(second) << (8 * (nibble >> 2)))
        .to_le_bytes()
}

/// Puts two 16-bit values at their columns.
#[inline]
fn expand_halves(kept: [u8; 4], nibble: u8) -> [u8; 8] {
    let kept = u64::from(u32::from_le_bytes(kept));
    let (first, second) = (kept & 0xFFFF, kept >> 16);
    (first << (16 * (nibble & 3)) | second << (16 * (nibble >> 2))).to_le_bytes()
}

/// Puts two 32-bit values at their columns.
#[inline]
fn expand_floats(kept: [u8; 8], nibble: u8) -> [u8; 16] {
    let kept = u128::from(u64::from_le_bytes(kept));
    let (first, second) = (kept & 0xFFFF_FFFF, kept >> 32);
    (first << (32 * (nibble & 3)) | second << (32 * (nibble >> 2))).to_le_bytes()
}

/// Finds the group that made [`encode_row`] fail.
fn too_many(name: &str, dtype: DType, row: usize, dense: &[u8]) -> FormatError {
    let size = dtype.size_bytes();
    let count =
        |group: &[u8]| group.chunks_exact(size).filter(|e| e.iter().any(|&b| b != 0)).count();
    let (group, values) = dense
        .chunks_exact(4 * size)
        .map(count)
        .enumerate()
        .find(|&(_, count)| count > 2)
        .unwrap_or_default();
    FormatError::Encoding {
        name: name.to_owned(),
        what: format!(
            "row {row}, columns {} to {}: {values} values are not +0.0; 2:4 holds two",
            4 * group,
            4 * group + 3
        ),
    }
}

/// Finds the nibble that made [`decode_row`] fail.
fn illegal_nibble(name: &str, groups: usize, row: usize, metadata: &[u8]) -> FormatError {
    let nibbles = metadata.iter().flat_map(|byte| [byte & 0xF, byte >> 4]);
    let illegal = nibbles.clone().enumerate().take(groups).find(|&(_, nibble)| !is_legal(nibble));
    let what = match illegal {
        Some((group, nibble)) => format!(
            "row {row}, columns {} to {}: metadata nibble {nibble:#x} is not legal; expected 0x4, 0x8, 0x9, 0xc, 0xd or 0xe",
            4 * group,
            4 * group + 3
        ),
        None => format!(
            "row {row}: the unused metadata nibble is {:#x}, expected {PAD:#x}",
            metadata.last().map_or(0, |byte| byte >> 4)
        ),
    };
    FormatError::Encoding { name: format!("{name}.metadata"), what }
}

#[cfg(test)]
mod tests;
