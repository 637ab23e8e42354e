//! n:m sparse matrices: of every `m` columns, `n` are kept, for `1 ≤ n < m ≤ 16`.
//!
//! 2:4 has an encoding of its own, [`sparse24`](super::sparse24), with the positions that hardware
//! reads. For a matrix of `R` rows and `C` columns (`C` a multiple of `m`) two components are stored:
//!
//! ```text
//! NAME.values  dtype  [R, C/m·n]      kept values in ascending column, n per group
//! NAME.mask    U8     [R, ceil(C/8)]  bit c % 8 of byte c / 8: column c is kept
//! ```
//!
//! so group `g` has the `m` mask bits from bit `g·m` of its row on, least significant first, whether
//! or not groups end at byte limits. Exactly `n` bits of each group are 1; unused bits of the last
//! byte of a row are 0.
//!
//! The invariant: decoding gives back the bits that were encoded. Zero therefore means the bit
//! pattern of all zeros (`+0.0`); `-0.0` and every NaN are values and are kept. A group of more than
//! `n` values is refused, never pruned. A group of fewer also keeps its lowest columns that hold
//! zeros, as many as are missing, so that equal matrices have equal bytes.
//!
//! 4-bit codes have the same layout with two values in a byte ([`encode_nibbles`]).

use std::ops::Range;

use super::{Component, MatrixShape, check_length, check_rows, dense, mask, nibbles};
use crate::{DType, FormatError, Result};

/// Widest group.
pub const MAX_GROUP: u8 = 16;

/// `n` kept columns of every `m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pattern {
    /// Kept columns of a group.
    pub n: u8,
    /// Columns of a group.
    pub m: u8,
}

impl Pattern {
    fn check(self, name: &str) -> Result<()> {
        let Self { n, m } = self;
        if n >= 1 && n < m && m <= MAX_GROUP {
            return Ok(());
        }
        Err(FormatError::Encoding {
            name: name.to_owned(),
            what: format!("the pattern is {n}:{m}; expected 1 <= n < m <= {MAX_GROUP}"),
        })
    }

    /// Kept values of a row.
    fn kept(self, cols: usize) -> usize {
        cols / usize::from(self.m) * usize::from(self.n)
    }
}

/// The stored components of an n:m matrix.
pub(super) fn components(
    name: &str,
    pattern: Pattern,
    dtype: DType,
    shape: &[usize],
) -> Result<Vec<Component>> {
    let refuse = |what| Err(FormatError::Encoding { name: name.to_owned(), what });
    pattern.check(name)?;
    let Pattern { n, m } = pattern;
    if (n, m) == (2, 4) {
        return refuse("the encoding nm does not hold 2:4; expected sparse24".to_owned());
    }
    if !mask::holds(dtype) {
        return refuse(format!("{n}:{m} values of type {dtype}; expected {}", mask::HELD));
    }
    let &[rows, cols] = shape else {
        return refuse(format!("{n}:{m} needs a matrix, found shape {shape:?}"));
    };
    if !cols.is_multiple_of(usize::from(m)) {
        return refuse(format!("{n}:{m} needs a multiple of {m} columns, found {cols}"));
    }
    let component = |suffix, dtype, cols| {
        let shape = vec![rows, cols];
        let bytes = dense::size_bytes(dtype, &shape)?;
        Some(Component { suffix, dtype, shape, bytes })
    };
    // The dense size bounds both components, and everything computed from them.
    let parts = dense::size_bytes(dtype, shape)
        .and_then(|_| component(".values", dtype, pattern.kept(cols)))
        .zip(component(".mask", DType::U8, mask::stride(cols)));
    match parts {
        Some((values, mask)) => Ok(vec![values, mask]),
        None => refuse(format!("the size of shape {shape:?} overflows")),
    }
}

/// Appends the components of a matrix of 4-bit codes: `codes` and `values` have two in a byte, the
/// even column in the low nibble, and rows start at whole bytes (the unused nibble of an odd row is
/// 0). Code 0 counts as zero.
///
/// `codes` is the whole matrix or any number of whole rows of it. Component shapes in bytes:
/// `values [rows, ceil(cols/m·n / 2)]`, `mask [rows, ceil(cols/8)]`. Unlike [`Encoding::Nm`], this
/// takes 2:4 as well.
///
/// [`Encoding::Nm`]: super::Encoding::Nm
///
/// # Errors
/// [`FormatError::Encoding`] when a group has more than `n` codes other than 0 (row and columns named;
/// `values` and `mask` are then as they were), the columns are not a multiple of `m`, an unused nibble
/// is not 0, or `codes` has another length.
pub fn encode_nibbles(
    name: &str,
    pattern: Pattern,
    matrix: MatrixShape,
    codes: &[u8],
    values: &mut Vec<u8>,
    mask: &mut Vec<u8>,
) -> Result<()> {
    let codec = Codec::of_nibbles(name, pattern, matrix)?;
    check_length(name, "codes", codes.len(), matrix.rows * nibbles::stride(matrix.cols))?;
    let codes = nibbles::unpack(name, codes, matrix.cols, 0)?;
    let mut kept = vec![];
    codec.encode(0, &codes, &mut kept, mask)?;
    nibbles::pack(&kept, pattern.kept(matrix.cols), values);
    Ok(())
}

/// Appends rows `rows` of a matrix of 4-bit codes, the inverse of [`encode_nibbles`]; `values` and
/// `mask` are whole.
///
/// # Errors
/// [`FormatError::Encoding`] when a group does not keep `n` columns, or an unused mask bit or nibble is
/// set (row named; `out` is then as it was), or a length does not fit `matrix`.
pub fn decode_nibbles(
    name: &str,
    pattern: Pattern,
    matrix: MatrixShape,
    values: &[u8],
    mask: &[u8],
    rows: Range<usize>,
    out: &mut Vec<u8>,
) -> Result<()> {
    let codec = Codec::of_nibbles(name, pattern, matrix)?;
    check_rows(name, &rows, matrix.rows)?;
    let kept = pattern.kept(matrix.cols);
    let stride = nibbles::stride(kept);
    check_length(name, ".values", values.len(), matrix.rows * stride)?;
    check_length(name, ".mask", mask.len(), matrix.rows * mask::stride(matrix.cols))?;
    let values = &values[rows.start * stride..rows.end * stride];
    let values = nibbles::unpack(&format!("{name}.values"), values, kept, rows.start)?;
    let mask = &mask[rows.start * mask::stride(matrix.cols)..];
    let mut codes = vec![];
    codec.decode_rows(rows, &values, mask, |values, mask| {
        codec.spread(values, mask, &mut codes);
    })?;
    nibbles::pack(&codes, matrix.cols, out);
    Ok(())
}

/// Encodes and decodes rows of one tensor.
pub(super) struct Codec<'a> {
    name: &'a str,
    groups: Groups,
    /// Bytes of an element.
    width: usize,
    cols: usize,
}

impl<'a> Codec<'a> {
    /// For a tensor that [`components`] accepts.
    pub(super) fn new(name: &'a str, pattern: Pattern, dtype: DType, cols: usize) -> Self {
        Self { name, groups: Groups::new(pattern), width: dtype.size_bytes(), cols }
    }

    /// For codes unpacked to a byte each.
    fn of_nibbles(name: &'a str, pattern: Pattern, matrix: MatrixShape) -> Result<Self> {
        pattern.check(name)?;
        let (Pattern { n, m }, MatrixShape { rows, cols }) = (pattern, matrix);
        let refuse = |what| Err(FormatError::Encoding { name: name.to_owned(), what });
        if !cols.is_multiple_of(usize::from(m)) {
            return refuse(format!("{n}:{m} needs a multiple of {m} columns, found {cols}"));
        }
        if rows.checked_mul(cols).is_none() {
            return refuse(format!("the size of shape {:?} overflows", [rows, cols]));
        }
        Ok(Self { name, groups: Groups::new(pattern), width: 1, cols })
    }

    /// Appends values and mask of whole rows, the first of which is row `first_row` of the tensor.
    ///
    /// # Errors
    /// [`FormatError::Encoding`] naming row and columns of a group of more than `n` values; `values`
    /// and `masks` are then as they were.
    pub(super) fn encode(
        &self,
        first_row: usize,
        dense: &[u8],
        values: &mut Vec<u8>,
        masks: &mut Vec<u8>,
    ) -> Result<()> {
        let before = (values.len(), masks.len());
        let (value_stride, mask_stride) = self.strides();
        for (row, dense) in dense.chunks_exact((self.cols * self.width).max(1)).enumerate() {
            let (values_at, mask_at) = (values.len(), masks.len());
            // Row by row, so that the zeros `resize` writes are overwritten while they are in cache.
            values.resize(values_at + value_stride, 0);
            masks.resize(mask_at + mask_stride, 0);
            let mask = &mut masks[mask_at..];
            mask::mark(self.width, dense, mask);
            if !self.groups.are_exact(mask, self.cols)
                && let Err((first, count)) = self.groups.fill(mask, self.cols)
            {
                values.truncate(before.0);
                masks.truncate(before.1);
                return Err(self.too_many(first_row + row, first, count));
            }
            mask::gather(self.width, dense, mask, &mut values[values_at..]);
        }
        Ok(())
    }

    /// Appends rows `rows` as bytes; `values` and `masks` are whole and of the right length.
    ///
    /// # Errors
    /// [`FormatError::Encoding`] naming row and columns of a mask that is not legal; `out` is then as
    /// it was.
    pub(super) fn decode(
        &self,
        rows: Range<usize>,
        values: &[u8],
        masks: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<()> {
        let before = out.len();
        let (value_stride, mask_stride) = self.strides();
        let (values, masks) =
            (&values[rows.start * value_stride..], &masks[rows.start * mask_stride..]);
        let spread = |values: &[u8], mask: &[u8]| self.spread(values, mask, out);
        let result = self.decode_rows(rows, values, masks, spread);
        if result.is_err() {
            out.truncate(before);
        }
        result
    }

    /// Decodes rows `rows` of a float type to f32, row-major, into `out`; lengths as for
    /// [`decode`](Self::decode).
    ///
    /// # Errors
    /// As [`decode`](Self::decode); what `out` then holds is not specified.
    pub(super) fn decode_f32(
        &self,
        dtype: DType,
        rows: Range<usize>,
        values: &[u8],
        masks: &[u8],
        out: &mut [f32],
    ) -> Result<()> {
        let (value_stride, mask_stride) = self.strides();
        let (values, masks) =
            (&values[rows.start * value_stride..], &masks[rows.start * mask_stride..]);
        let mut scratch = vec![0; self.cols * self.width];
        let mut out_rows = out.chunks_exact_mut(self.cols.max(1));
        self.decode_rows(rows, values, masks, |values, mask| {
            mask::spread(self.width, values, mask, &mut scratch);
            if let Some(out) = out_rows.next() {
                dense::to_f32(dtype, &scratch, out);
            }
        })
    }

    /// Shows values and mask of rows `rows`, once the mask is known to be legal; `values` and `masks`
    /// start with the first of them.
    fn decode_rows(
        &self,
        rows: Range<usize>,
        values: &[u8],
        masks: &[u8],
        mut show: impl FnMut(&[u8], &[u8]),
    ) -> Result<()> {
        let (value_stride, mask_stride) = self.strides();
        let all_values = values.chunks_exact(value_stride.max(1));
        let all_masks = masks.chunks_exact(mask_stride.max(1));
        for (row, (values, mask)) in rows.zip(all_values.zip(all_masks)) {
            self.check_mask(row, mask)?;
            show(values, mask);
        }
        Ok(())
    }

    /// Refuses the mask of a row when a group does not keep `n` columns or an unused bit is set.
    pub(super) fn check_mask(&self, row: usize, mask: &[u8]) -> Result<()> {
        if self.groups.are_exact(mask, self.cols) && mask::is_padded(mask, self.cols) {
            return Ok(());
        }
        Err(self.illegal(row, mask))
    }

    /// Appends one decoded row.
    fn spread(&self, values: &[u8], mask: &[u8], out: &mut Vec<u8>) {
        let start = out.len();
        out.resize(start + self.cols * self.width, 0);
        mask::spread(self.width, values, mask, &mut out[start..]);
    }

    /// Bytes of a row of values and of its mask.
    fn strides(&self) -> (usize, usize) {
        (self.groups.pattern.kept(self.cols) * self.width, mask::stride(self.cols))
    }

    fn too_many(&self, row: usize, first: usize, count: u32) -> FormatError {
        let Pattern { n, m } = self.groups.pattern;
        FormatError::Encoding {
            name: self.name.to_owned(),
            what: format!(
                "row {row}, columns {first} to {}: {count} values are not +0.0; {n}:{m} holds {n}",
                first + usize::from(m) - 1
            ),
        }
    }

    /// Finds what is not legal in the mask of a row.
    fn illegal(&self, row: usize, mask: &[u8]) -> FormatError {
        let Pattern { n, m } = self.groups.pattern;
        let mut groups = self.groups.of(mask, 0..self.cols);
        let what = match groups.find(|(_, bits)| bits.count_ones() != u32::from(n)) {
            Some((first, bits)) => format!(
                "row {row}, columns {first} to {}: the mask keeps {}, expected {n}",
                first + usize::from(m) - 1,
                bits.count_ones()
            ),
            None => format!("row {row}: an unused mask bit is not 0"),
        };
        FormatError::Encoding { name: format!("{}.mask", self.name), what }
    }
}

/// Counts and completes the kept columns of groups.
struct Groups {
    pattern: Pattern,
    /// For groups that divide a byte: whether each group of a byte keeps `n`.
    exact: Option<[bool; 256]>,
}

impl Groups {
    fn new(pattern: Pattern) -> Self {
        let (n, m) = (u32::from(pattern.n), usize::from(pattern.m));
        let group = (1u32 << m) - 1;
        let exact = |byte: usize| {
            (0..8).step_by(m).all(|first| (byte as u32 >> first & group).count_ones() == n)
        };
        Self { pattern, exact: 8usize.is_multiple_of(m).then(|| std::array::from_fn(exact)) }
    }

    /// The groups of a row: first column and mask bits.
    fn of(&self, mask: &[u8], columns: Range<usize>) -> impl Iterator<Item = (usize, u32)> {
        let m = usize::from(self.pattern.m);
        columns.step_by(m).map(move |first| (first, mask::bits(mask, first, m)))
    }

    /// Whether every group of a row keeps `n` columns. Without branches inside a row.
    fn are_exact(&self, mask: &[u8], cols: usize) -> bool {
        let n = u32::from(self.pattern.n);
        let (mut exact, mut rest) = (true, 0);
        if let Some(table) = &self.exact {
            let whole = &mask[..cols / 8];
            exact = whole.iter().fold(exact, |exact, &byte| exact & table[usize::from(byte)]);
            rest = cols / 8 * 8;
        } else if self.pattern.m == 16 {
            let (groups, _) = mask.as_chunks::<2>();
            let counts = groups.iter().map(|group| u16::from_le_bytes(*group).count_ones());
            exact &= counts.fold(0, |flaws, count| flaws | (count ^ n)) == 0;
            rest = cols;
        }
        self.of(mask, rest..cols).fold(exact, |exact, (_, bits)| exact & (bits.count_ones() == n))
    }

    /// Adds to each group of fewer than `n` columns its lowest others.
    ///
    /// # Errors
    /// First column and count of a group of more.
    fn fill(&self, mask: &mut [u8], cols: usize) -> std::result::Result<(), (usize, u32)> {
        let (n, m) = (u32::from(self.pattern.n), usize::from(self.pattern.m));
        for first in (0..cols).step_by(m) {
            let mut bits = mask::bits(mask, first, m);
            let count = bits.count_ones();
            if count > n {
                return Err((first, count));
            }
            for _ in count..n {
                // Sets the lowest bit that is 0.
                bits |= bits + 1;
            }
            mask::set_bits(mask, first, bits);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
