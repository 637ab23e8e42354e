//! Unstructured sparse matrices: a bit for each element, and the values of those that are kept.
//!
//! For a matrix of `R` rows and `C` columns with room for `kept` values three components are stored:
//!
//! ```text
//! NAME.values   dtype  [kept]             kept values in row-major order, then zeros
//! NAME.mask     U8     [R, ceil(C/8)]     bit c % 8 of byte c / 8: column c is kept
//! NAME.offsets  U64    [ceil(R/64) + 1]   values before row 0, 64, 128, ..., and in all
//! ```
//!
//! `kept` is known before the values are: pruning fixes how many weights become zero. A kept weight
//! may be zero all the same, or round to it, so there may be fewer values than `kept`; the rest of
//! `.values` is zeros. Rows are independent: one is found by counting the mask bits of at most 63
//! rows before it.
//!
//! The invariant: decoding gives back the bits that were encoded. Zero therefore means the bit
//! pattern of all zeros (`+0.0`); `-0.0` and every NaN are values and are kept. More than `kept`
//! values are refused. Equal matrices have equal bytes for equal `kept`: the encoder marks exactly the
//! elements that are not zero.

use std::ops::Range;

use super::{
    Component, MatrixShape, dense,
    mask::{self, MaskedRows},
};
use crate::{DType, FormatError, Result};

/// Rows from one offset to the next.
const STEP: usize = 64;

/// The stored components of a matrix.
pub(super) fn components(
    name: &str,
    dtype: DType,
    kept: u64,
    shape: &[usize],
) -> Result<Vec<Component>> {
    let refuse = |what| Err(FormatError::Encoding { name: name.to_owned(), what });
    if !mask::holds(dtype) {
        return refuse(format!("bitmask values of type {dtype}; expected {}", mask::HELD));
    }
    let &[rows, cols] = shape else {
        return refuse(format!("a bitmask needs a matrix, found shape {shape:?}"));
    };
    // The dense size bounds values and mask, and everything computed from them.
    if dense::size_bytes(dtype, shape).is_none() {
        return refuse(format!("the size of shape {shape:?} overflows"));
    }
    let elements = rows as u64 * cols as u64;
    let values = usize::try_from(kept).ok().filter(|_| kept <= elements);
    let Some(values) = values else {
        return refuse(format!("{kept} kept values of {elements} elements"));
    };
    let component = |suffix, dtype, shape: Vec<usize>| {
        let bytes = dense::size_bytes(dtype, &shape)?;
        Some(Component { suffix, dtype, shape, bytes })
    };
    let parts = [
        component(".values", dtype, vec![values]),
        component(".mask", DType::U8, vec![rows, mask::stride(cols)]),
        component(".offsets", DType::U64, vec![offsets_len(rows)]),
    ];
    match parts.into_iter().collect() {
        Some(parts) => Ok(parts),
        None => refuse(format!("the size of shape {shape:?} overflows")),
    }
}

fn offsets_len(rows: usize) -> usize {
    rows.div_ceil(STEP) + 1
}

/// Encodes rows in order.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct State {
    /// Values so far.
    count: u64,
    /// Offsets so far.
    offsets: usize,
}

/// Encodes and decodes one tensor that [`components`] accepts.
pub(super) struct Codec<'a> {
    pub(super) name: &'a str,
    pub(super) dtype: DType,
    pub(super) kept: u64,
    pub(super) matrix: MatrixShape,
}

impl Codec<'_> {
    /// Values, mask and offsets of whole rows, the first of which is row `first_row`.
    ///
    /// # Errors
    /// [`FormatError::Encoding`] naming the row with the first value beyond `kept`.
    pub(super) fn encode(
        &self,
        state: &mut State,
        first_row: usize,
        dense: &[u8],
    ) -> Result<Vec<Vec<u8>>> {
        let width = self.dtype.size_bytes();
        let (mut values, mut masks, mut offsets) = (vec![], vec![], vec![]);
        let mut next = *state;
        for (row, dense) in dense.chunks_exact((self.matrix.cols * width).max(1)).enumerate() {
            let row = first_row + row;
            if row.is_multiple_of(STEP) {
                next.push_offset(&mut offsets);
            }
            let (values_at, mask_at) = (values.len(), masks.len());
            masks.resize(mask_at + mask::stride(self.matrix.cols), 0);
            let mask = &mut masks[mask_at..];
            let count = mask::mark(width, dense, mask);
            next.count += count as u64;
            if next.count > self.kept {
                let kept = self.kept;
                return Err(self.refuse(
                    "",
                    format!("row {row}: more values than the {kept} that were planned"),
                ));
            }
            values.resize(values_at + count * width, 0);
            mask::gather(width, dense, mask, &mut values[values_at..]);
        }
        *state = next;
        Ok(vec![values, masks, offsets])
    }

    /// What follows the last row: the rest of the values, as zeros, and the offsets still to come.
    pub(super) fn finish(&self, mut state: State) -> Vec<Vec<u8>> {
        let padding = (self.kept - state.count) as usize * self.dtype.size_bytes();
        let mut offsets = vec![];
        while state.offsets < offsets_len(self.matrix.rows) {
            state.push_offset(&mut offsets);
        }
        vec![vec![0; padding], vec![], offsets]
    }

    /// Shows for each row the number of its first value and its mask, once those of its 64 rows are
    /// known to agree. All values are among the `kept` then.
    pub(super) fn each_row(
        &self,
        rows: Range<usize>,
        masks: &[u8],
        offsets: &[u8],
        mut show: impl FnMut(usize, &[u8]),
    ) -> Result<()> {
        let stride = mask::stride(self.matrix.cols);
        let blocks = match stride {
            // Rows without columns have nothing to show.
            0 => 0..0,
            _ => rows.start / STEP..rows.end.div_ceil(STEP),
        };
        for block in blocks {
            let first = block * STEP;
            let block_rows = first..(first + STEP).min(self.matrix.rows);
            let masks = &masks[first * stride..block_rows.end * stride];
            let mut first = self.first_of_block(block, &block_rows, masks, offsets)?;
            for (row, mask) in block_rows.zip(masks.chunks_exact(stride)) {
                if !mask::is_padded(mask, self.matrix.cols) {
                    return Err(
                        self.refuse(".mask", format!("row {row}: an unused mask bit is not 0"))
                    );
                }
                if rows.contains(&row) {
                    show(first, mask);
                }
                first += mask::count(mask);
            }
        }
        Ok(())
    }

    /// The number of the first value of 64 rows, as many as their masks say.
    fn first_of_block(
        &self,
        block: usize,
        rows: &Range<usize>,
        masks: &[u8],
        offsets: &[u8],
    ) -> Result<usize> {
        let (start, end) = (offset(offsets, block), offset(offsets, block + 1));
        let count = mask::count(masks) as u64;
        if end.checked_sub(start) != Some(count) || end > self.kept || (block == 0 && start != 0) {
            return Err(self.refuse(
                ".offsets",
                format!(
                    "rows {} to {}: bitmask count not matching values (the mask keeps {count}, \
                     the offsets are {start} and {end} of {})",
                    rows.start,
                    rows.end - 1,
                    self.kept
                ),
            ));
        }
        // At most `kept`, which is a length.
        Ok(start as usize)
    }

    /// The number of values, as the last offset says.
    ///
    /// # Errors
    /// [`FormatError::Encoding`] when it is more than `kept`.
    pub(super) fn total(&self, offsets: &[u8]) -> Result<usize> {
        let total = offset(offsets, offsets_len(self.matrix.rows) - 1);
        match usize::try_from(total) {
            Ok(count) if total <= self.kept => Ok(count),
            _ => Err(self.refuse(
                ".offsets",
                format!("bitmask count not matching values ({total} of {})", self.kept),
            )),
        }
    }

    /// Behind the last value there are zeros only.
    fn check_end(&self, values: &[u8], offsets: &[u8]) -> Result<()> {
        let total = self.total(offsets)?;
        if values[total * self.dtype.size_bytes()..].iter().all(|&byte| byte == 0) {
            return Ok(());
        }
        Err(self.refuse(".values", format!("after the last of {total} values not all is zero")))
    }

    fn refuse(&self, suffix: &str, what: String) -> FormatError {
        FormatError::Encoding { name: format!("{}{suffix}", self.name), what }
    }
}

impl MaskedRows for Codec<'_> {
    fn row(&self) -> (DType, usize) {
        (self.dtype, self.matrix.cols)
    }

    /// Values after the last that are not zero are refused too.
    fn decode_rows(
        &self,
        rows: Range<usize>,
        parts: &[&[u8]],
        mut show: impl FnMut(&[u8], &[u8]),
    ) -> Result<()> {
        let [values, masks, offsets] = parts else { return Ok(()) };
        let width = self.dtype.size_bytes();
        let end = rows.end;
        self.each_row(rows, masks, offsets, |first, mask| {
            show(&values[first * width..(first + mask::count(mask)) * width], mask);
        })?;
        if end == self.matrix.rows { self.check_end(values, offsets) } else { Ok(()) }
    }
}

impl State {
    /// Values so far.
    pub(super) fn count(&self) -> u64 {
        self.count
    }

    fn push_offset(&mut self, offsets: &mut Vec<u8>) {
        offsets.extend(self.count.to_le_bytes());
        self.offsets += 1;
    }
}

/// One offset; `offsets` has the length that the shape demands.
fn offset(offsets: &[u8], index: usize) -> u64 {
    let (offsets, _) = offsets.as_chunks::<8>();
    offsets.get(index).map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests;
