//! Unstructured sparse matrices as compressed-tensors 0.9 to 0.14.0.1 wrote them: `sparse-bitmask`.
//!
//! For the weight of a module, `R` rows and `C` columns of which `kept` elements are stored, four
//! components stand in the place of `MODULE.weight`:
//!
//! ```text
//! MODULE.compressed   dtype  [kept]          stored elements in row-major order
//! MODULE.bitmask      U8     [R, ceil(C/8)]  bit c % 8 of byte c / 8: column c is stored
//! MODULE.shape        I64    [2]             R, C
//! MODULE.row_offsets  I64    [R]             stored elements before each row
//! ```
//!
//! `kept` is fixed before the values are known, and the format has no room for padding: there are
//! exactly as many values as bits. Where fewer elements than `kept` are not zero, some zeros are stored
//! as values: as late as possible, that is only where the rest of the matrix would otherwise be too
//! small, and in a row from its lowest column on. In practice these are columns of the last row. A
//! reader that follows the bits, as the package's own does, decodes the same matrix. With as many
//! values as `kept`, the bytes are the package's.
//!
//! The invariant: decoding gives back the bits that were encoded. Zero therefore means the bit pattern
//! of `+0.0`; `-0.0` is stored as a value, where the package would have dropped it. More than `kept`
//! values are refused.

use std::ops::Range;

use super::{
    Component, MatrixShape,
    ct_sparse24::{check, check_shape, component, component_name, shape_bytes},
    dense,
    mask::{self, MaskedRows, gather, mark},
};
use crate::{DType, FormatError, Result};

/// The stored components of a weight.
pub(super) fn components(
    name: &str,
    dtype: DType,
    kept: u64,
    shape: &[usize],
) -> Result<Vec<Component>> {
    let (rows, cols) = check(name, "sparse-bitmask", dtype, shape)?;
    // With few columns the offsets are larger than the matrix.
    if dense::size_bytes(DType::I64, &[rows]).is_none() {
        return Err(FormatError::Encoding {
            name: name.to_owned(),
            what: format!("the size of shape {shape:?} overflows"),
        });
    }
    let elements = rows as u64 * cols as u64;
    let Some(values) = usize::try_from(kept).ok().filter(|_| kept <= elements) else {
        return Err(FormatError::Encoding {
            name: name.to_owned(),
            what: format!("{kept} kept values of {elements} elements"),
        });
    };
    Ok(vec![
        component(".compressed", dtype, vec![values]),
        component(".bitmask", DType::U8, vec![rows, mask::stride(cols)]),
        component(".shape", DType::I64, vec![2]),
        component(".row_offsets", DType::I64, vec![rows]),
    ])
}

/// Encodes and decodes one tensor that [`components`] accepts.
pub(super) struct Codec<'a> {
    pub(super) name: &'a str,
    pub(super) dtype: DType,
    pub(super) kept: u64,
    pub(super) matrix: MatrixShape,
}

impl Codec<'_> {
    /// Values, bitmask and offsets of whole rows, the first of which is row `first_row`; `stored` is
    /// the number of values so far.
    ///
    /// # Errors
    /// [`FormatError::Encoding`] naming the row with the first value beyond `kept`.
    pub(super) fn encode(
        &self,
        stored: &mut u64,
        first_row: usize,
        dense: &[u8],
    ) -> Result<Vec<Vec<u8>>> {
        let (width, cols) = (self.dtype.size_bytes(), self.matrix.cols);
        let (mut values, mut bitmask, mut offsets) = (vec![], vec![], vec![]);
        let mut next = *stored;
        for (row, dense) in (first_row..).zip(dense.chunks_exact((cols * width).max(1))) {
            offsets.extend(next.to_le_bytes());
            let (values_at, mask_at) = (values.len(), bitmask.len());
            bitmask.resize(mask_at + mask::stride(cols), 0);
            let bits = &mut bitmask[mask_at..];
            let count = mark(width, dense, bits) as u64;
            let left = self.kept - next;
            if count > left {
                let kept = self.kept;
                return Err(FormatError::Encoding {
                    name: self.name.to_owned(),
                    what: format!("row {row}: more values than the {kept} that were planned"),
                });
            }
            let rows_after = (self.matrix.rows - 1 - row) as u64;
            let least = left.saturating_sub(rows_after * cols as u64);
            mark_zeros(bits, least.saturating_sub(count));
            let count = count.max(least);
            next += count;
            values.resize(values_at + count as usize * width, 0);
            gather(width, dense, bits, &mut values[values_at..]);
        }
        *stored = next;
        Ok(vec![values, bitmask, vec![], offsets])
    }

    /// What follows the last row: the shape, and the offsets of rows without columns.
    pub(super) fn finish(&self) -> Vec<Vec<u8>> {
        let offsets = if self.matrix.cols == 0 { 8 * self.matrix.rows } else { 0 };
        vec![vec![], vec![], shape_bytes(self.matrix), vec![0; offsets]]
    }

    fn refuse(&self, suffix: &str, row: usize, what: &str) -> FormatError {
        FormatError::Encoding {
            name: component_name(self.name, suffix),
            what: format!("row {row}: {what}"),
        }
    }
}

impl MaskedRows for Codec<'_> {
    fn row(&self) -> (DType, usize) {
        (self.dtype, self.matrix.cols)
    }

    /// Offsets that agree with the bits of every row place each value exactly once.
    fn decode_rows(
        &self,
        rows: Range<usize>,
        parts: &[&[u8]],
        mut show: impl FnMut(&[u8], &[u8]),
    ) -> Result<()> {
        let [values, bitmask, shape, offsets] = parts else { return Ok(()) };
        check_shape(self.name, ".shape", self.matrix, shape)?;
        let stride = mask::stride(self.matrix.cols);
        let width = self.dtype.size_bytes();
        let (offsets, _) = offsets.as_chunks::<8>();
        let offset =
            |row: usize| offsets.get(row).map_or(self.kept as i64, |b| i64::from_le_bytes(*b));
        for row in rows {
            let bits = &bitmask[row * stride..][..stride];
            if !mask::is_padded(bits, self.matrix.cols) {
                return Err(self.refuse(".bitmask", row, "an unused mask bit is not 0"));
            }
            let count = mask::count(bits);
            let (start, end) = (offset(row), offset(row + 1));
            let range = usize::try_from(start).ok().zip(usize::try_from(end).ok());
            let range = range.filter(|(start, end)| {
                end.checked_sub(*start) == Some(count)
                    && *end as u64 <= self.kept
                    && (row > 0 || *start == 0)
            });
            let Some((start, end)) = range else {
                return Err(self.refuse(
                    ".row_offsets",
                    row,
                    &format!(
                        "bitmask count not matching values ({count} bits are set, the values are {start} to {end} of {})",
                        self.kept
                    ),
                ));
            };
            show(&values[start * width..end * width], bits);
        }
        Ok(())
    }
}

/// Marks the lowest `count` columns that are not marked. They exist.
fn mark_zeros(bits: &mut [u8], mut count: u64) {
    for byte in bits {
        while count > 0 && *byte != 0xFF {
            *byte |= *byte + 1;
            count -= 1;
        }
    }
}

#[cfg(test)]
mod tests;
