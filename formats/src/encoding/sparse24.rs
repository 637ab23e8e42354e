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

mod kernel;
mod portable;
#[cfg(target_arch = "x86_64")]
mod simd;

use std::ops::Range;

pub use kernel::Kernel;

use super::{Component, MatrixShape, check_length, check_rows, dense, mask, nibbles};
use crate::{DType, FormatError, Result};

/// Fills the unused nibble of a row with an odd number of groups.
pub const PAD: u8 = 0xE;

/// Dense bytes that are packed or unpacked in one go where rows allow it: they and what becomes of
/// them fit the first caches.
const RUN_BYTES: usize = 16 << 10;

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
    let runs = Runs { first_row, ..Runs::new(name, dtype, matrix)? };
    check_length(name, "dense", dense_bytes.len(), runs.of_rows(matrix.rows).dense)?;
    let before = (values.len(), metadata.len());
    values.reserve(runs.of_rows(matrix.rows).values);
    metadata.reserve(runs.of_rows(matrix.rows).metadata);
    for rows in runs.rows(0..matrix.rows) {
        // Run by run, so that the zeros `resize` writes are overwritten while they are in cache.
        let (values_at, metadata_at) = (values.len(), metadata.len());
        values.resize(values_at + runs.of_rows(rows.len()).values, 0);
        metadata.resize(metadata_at + runs.of_rows(rows.len()).metadata, 0);
        let dense = &dense_bytes[runs.of_rows(rows.start).dense..runs.of_rows(rows.end).dense];
        let (run_values, run_metadata) = (&mut values[values_at..], &mut metadata[metadata_at..]);
        if let Err(error) = runs.pack(rows.start, dense, run_values, run_metadata) {
            values.truncate(before.0);
            metadata.truncate(before.1);
            return Err(error);
        }
    }
    Ok(())
}

/// [`encode`] into slices of the components' lengths, without an allocation.
///
/// # Errors
/// As [`encode`], but `values` and `metadata` are then partly written; also when one of them has
/// another length.
pub fn encode_into(
    name: &str,
    dtype: DType,
    matrix: MatrixShape,
    dense_bytes: &[u8],
    values: &mut [u8],
    metadata: &mut [u8],
) -> Result<()> {
    let runs = Runs::new(name, dtype, matrix)?;
    let all = runs.of_rows(matrix.rows);
    check_length(name, "dense", dense_bytes.len(), all.dense)?;
    check_length(name, ".values", values.len(), all.values)?;
    check_length(name, ".metadata", metadata.len(), all.metadata)?;
    for rows in runs.rows(0..matrix.rows) {
        let (start, end) = (runs.of_rows(rows.start), runs.of_rows(rows.end));
        let dense = &dense_bytes[start.dense..end.dense];
        let run_values = &mut values[start.values..end.values];
        let run_metadata = &mut metadata[start.metadata..end.metadata];
        runs.pack(rows.start, dense, run_values, run_metadata)?;
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
    let runs = Runs::new(name, dtype, matrix)?;
    runs.check_packed(values, metadata, &rows)?;
    let before = out.len();
    out.reserve(runs.of_rows(rows.len()).dense);
    for rows in runs.rows(rows) {
        let start = out.len();
        out.resize(start + runs.of_rows(rows.len()).dense, 0);
        if let Err(error) = runs.unpack_from(&rows, values, metadata, &mut out[start..]) {
            out.truncate(before);
            return Err(error);
        }
    }
    Ok(())
}

/// [`decode`] into a slice of the rows' length, without an allocation.
///
/// # Errors
/// As [`decode`], but `out` is then partly written; also when it has another length.
pub fn decode_into(
    name: &str,
    dtype: DType,
    matrix: MatrixShape,
    values: &[u8],
    metadata: &[u8],
    rows: Range<usize>,
    out: &mut [u8],
) -> Result<()> {
    let runs = Runs::new(name, dtype, matrix)?;
    runs.check_packed(values, metadata, &rows)?;
    check_length(name, "output", out.len(), runs.of_rows(rows.len()).dense)?;
    let first = rows.start;
    for rows in runs.rows(rows) {
        let at = runs.of_rows(rows.start - first).dense..runs.of_rows(rows.end - first).dense;
        runs.unpack_from(&rows, values, metadata, &mut out[at])?;
    }
    Ok(())
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
    let runs = Runs::new(name, dtype, matrix)?;
    runs.check_packed(values, metadata, &rows)?;
    check_length(name, "output", out.len(), rows.len() * matrix.cols)?;
    dense::check_float(name, dtype)?;
    let mut scratch = vec![0; runs.of_rows(runs.rows_per_run.min(rows.len())).dense];
    let mut rest = out;
    for rows in runs.rows(rows) {
        let dense = &mut scratch[..runs.of_rows(rows.len()).dense];
        runs.unpack_from(&rows, values, metadata, dense)?;
        let (run, after) = rest.split_at_mut(rows.len() * matrix.cols);
        dense::to_f32(dtype, dense, run);
        rest = after;
    }
    Ok(())
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
    // Rows without columns, and columns without rows, have nothing to unpack.
    if matrix.cols == 0 || rows.is_empty() {
        return Ok(());
    }
    let mut codes = vec![0; matrix.cols];
    for row in rows {
        // Groups keep two codes, so a row of values has no unused nibble.
        let values =
            nibbles::unpack(name, &values[row * value_stride..][..value_stride], kept, row)?;
        let metadata = &metadata[row * meta_stride..][..meta_stride];
        if !Kernel::best().unpack(DType::U8, &values, metadata, &mut codes) {
            out.truncate(before);
            let name = format!("{name}.metadata");
            return Err(illegal_nibble(name, matrix.cols / 4, row, metadata));
        }
        nibbles::pack(&codes, matrix.cols, out);
    }
    Ok(())
}

/// A matrix cut into runs of rows. Rows of an even number of groups have no unused nibble, so several
/// of them are one longer row.
pub(super) struct Runs<'a> {
    name: &'a str,
    dtype: DType,
    matrix: MatrixShape,
    /// Row of the tensor that row 0 of the matrix is, for messages.
    pub(super) first_row: usize,
    /// Suffix of the metadata component, for messages.
    pub(super) metadata_suffix: &'static str,
    rows_per_run: usize,
    kernel: Kernel,
}

/// Bytes of some rows.
pub(super) struct Lengths {
    pub(super) dense: usize,
    pub(super) values: usize,
    pub(super) metadata: usize,
}

impl<'a> Runs<'a> {
    fn new(name: &'a str, dtype: DType, matrix: MatrixShape) -> Result<Self> {
        components(name, dtype, &[matrix.rows, matrix.cols])?;
        Ok(Self::of(name, dtype, matrix))
    }

    /// For a shape and type that were accepted before.
    pub(super) fn of(name: &'a str, dtype: DType, matrix: MatrixShape) -> Self {
        let row_bytes = (matrix.cols * dtype.size_bytes()).max(1);
        let joined = matrix.cols.is_multiple_of(8);
        let rows_per_run = if joined { (RUN_BYTES / row_bytes).max(1) } else { 1 };
        let kernel = Kernel::best();
        let metadata_suffix = ".metadata";
        Self { name, dtype, matrix, first_row: 0, metadata_suffix, rows_per_run, kernel }
    }

    /// The products do not overflow for any part of the matrix: `components` has checked the whole.
    pub(super) fn of_rows(&self, rows: usize) -> Lengths {
        let dense = rows * self.matrix.cols * self.dtype.size_bytes();
        Lengths { dense, values: dense / 2, metadata: rows * self.matrix.cols.div_ceil(8) }
    }

    pub(super) fn rows(&self, all: Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
        // Rows without columns have nothing to pack.
        let all = if self.matrix.cols == 0 { 0..0 } else { all };
        let (end, step) = (all.end, self.rows_per_run);
        all.step_by(step).map(move |start| start..end.min(start + step))
    }

    fn check_packed(&self, values: &[u8], metadata: &[u8], rows: &Range<usize>) -> Result<()> {
        let all = self.of_rows(self.matrix.rows);
        check_length(self.name, ".values", values.len(), all.values)?;
        check_length(self.name, ".metadata", metadata.len(), all.metadata)?;
        check_rows(self.name, rows, self.matrix.rows)
    }

    /// Packs a run that starts at `row`, from and into slices of its own lengths.
    ///
    /// # Errors
    /// [`FormatError::Encoding`] for a group of more than two values.
    pub(super) fn pack(
        &self,
        row: usize,
        dense: &[u8],
        values: &mut [u8],
        metadata: &mut [u8],
    ) -> Result<()> {
        if self.kernel.pack(self.dtype, dense, values, metadata) {
            return Ok(());
        }
        Err(too_many(self.name, self.dtype, self.matrix.cols, self.first_row + row, dense))
    }

    /// Unpacks a run that starts at `row`, from and into slices of its own lengths.
    ///
    /// # Errors
    /// [`FormatError::Encoding`] for a nibble that is not legal.
    pub(super) fn unpack(
        &self,
        row: usize,
        values: &[u8],
        metadata: &[u8],
        out: &mut [u8],
    ) -> Result<()> {
        if self.kernel.unpack(self.dtype, values, metadata, out) {
            return Ok(());
        }
        let name = format!("{}{}", self.name, self.metadata_suffix);
        Err(illegal_nibble(name, self.matrix.cols / 4, self.first_row + row, metadata))
    }

    /// [`unpack`](Self::unpack) from whole components.
    fn unpack_from(
        &self,
        rows: &Range<usize>,
        values: &[u8],
        metadata: &[u8],
        out: &mut [u8],
    ) -> Result<()> {
        let (start, end) = (self.of_rows(rows.start), self.of_rows(rows.end));
        let (values, metadata) =
            (&values[start.values..end.values], &metadata[start.metadata..end.metadata]);
        self.unpack(rows.start, values, metadata, out)
    }
}

/// The kept columns that metadata of whole rows say, as rows of mask bits (see [`mask`]); the first is
/// row `first_row`.
///
/// # Errors
/// [`FormatError::Encoding`] naming a nibble that is not legal.
pub(super) fn masks(name: &str, cols: usize, first_row: usize, metadata: &[u8]) -> Result<Vec<u8>> {
    let (groups, stride) = (cols / 4, cols.div_ceil(8));
    let bits = |nibble: u8| 1 << (nibble & 3) | 1 << (nibble >> 2);
    let mut masks = Vec::with_capacity(metadata.len());
    for (row, bytes) in metadata.chunks_exact(stride.max(1)).enumerate() {
        let legal =
            bytes.iter().all(|byte| [byte & 0xF, byte >> 4].map(portable::is_legal) == [true; 2]);
        let padded = groups % 2 == 0 || bytes.last().is_none_or(|last| last >> 4 == PAD);
        if !legal || !padded {
            let name = format!("{name}.metadata");
            return Err(illegal_nibble(name, groups, first_row + row, bytes));
        }
        masks.extend(bytes.iter().map(|byte| bits(byte & 0xF) | bits(byte >> 4) << 4));
        if let (1, Some(last)) = (groups % 2, masks.last_mut()) {
            *last &= 0xF;
        }
    }
    Ok(masks)
}

/// Finds the group that made [`Kernel::pack`] fail in rows from `first_row` on.
pub(super) fn too_many(
    name: &str,
    dtype: DType,
    cols: usize,
    first_row: usize,
    dense: &[u8],
) -> FormatError {
    let size = dtype.size_bytes();
    let count =
        |group: &[u8]| group.chunks_exact(size).filter(|e| e.iter().any(|&b| b != 0)).count();
    let (group, values) = dense
        .chunks_exact(4 * size)
        .map(count)
        .enumerate()
        .find(|&(_, count)| count > 2)
        .unwrap_or_default();
    let (row, column) = (first_row + 4 * group / cols, 4 * group % cols);
    FormatError::Encoding {
        name: name.to_owned(),
        what: format!(
            "row {row}, columns {column} to {}: {values} values are not +0.0; 2:4 holds two",
            column + 3
        ),
    }
}

/// Finds the nibble that made [`Kernel::unpack`] fail in rows of `groups` groups from `first_row` on.
fn illegal_nibble(name: String, groups: usize, first_row: usize, metadata: &[u8]) -> FormatError {
    let rows = metadata.chunks(groups.div_ceil(2)).zip(first_row..);
    let nibbles = rows.flat_map(|(bytes, row)| {
        let nibbles = bytes.iter().flat_map(|byte| [byte & 0xF, byte >> 4]);
        nibbles.take(groups).enumerate().map(move |(group, nibble)| (row, group, nibble))
    });
    let what = match nibbles.into_iter().find(|&(_, _, nibble)| !portable::is_legal(nibble)) {
        Some((row, group, nibble)) => format!(
            "row {row}, columns {} to {}: metadata nibble {nibble:#x} is not legal; expected 0x4, 0x8, 0x9, 0xc, 0xd or 0xe",
            4 * group,
            4 * group + 3
        ),
        // A row with an unused nibble is a run of its own.
        None => format!(
            "row {first_row}: the unused metadata nibble is {:#x}, expected {PAD:#x}",
            metadata.last().map_or(0, |byte| byte >> 4)
        ),
    };
    FormatError::Encoding { name, what }
}

#[cfg(test)]
mod tests;
