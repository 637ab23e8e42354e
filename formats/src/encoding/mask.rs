//! Rows of bits that say which columns are stored: what the n:m and bitmask encodings share.
//!
//! Bit `c % 8` of byte `c / 8` stands for column `c`; unused bits of the last byte are 0. Elements
//! are bytes without a meaning here: `N` bytes each, and zero is all of them zero.

use std::ops::Range;

use super::{dense, row_scratch};
use crate::{DType, Result};

/// Rows that are stored as the values of the marked columns and a mask.
pub(super) trait MaskedRows {
    /// Element type and columns.
    fn row(&self) -> (DType, usize);

    /// Shows values and mask of each of `rows`, once they are known to agree; `parts` are whole and of
    /// the right lengths.
    ///
    /// # Errors
    /// [`FormatError::Encoding`](crate::FormatError::Encoding) naming the rows whose components do not
    /// agree.
    fn decode_rows(
        &self,
        rows: Range<usize>,
        parts: &[&[u8]],
        show: impl FnMut(&[u8], &[u8]),
    ) -> Result<()>;

    /// Appends rows `rows` as bytes.
    ///
    /// # Errors
    /// As [`decode_rows`](Self::decode_rows); `out` is then as it was.
    fn decode(&self, rows: Range<usize>, parts: &[&[u8]], out: &mut Vec<u8>) -> Result<()> {
        let (dtype, cols) = self.row();
        let (before, width) = (out.len(), dtype.size_bytes());
        let result = self.decode_rows(rows, parts, |values, mask| {
            let start = out.len();
            // Row by row, so that the zeros `resize` writes are overwritten while they are in cache.
            out.resize(start + cols * width, 0);
            spread(width, values, mask, &mut out[start..]);
        });
        if result.is_err() {
            out.truncate(before);
        }
        result
    }

    /// Decodes rows `rows` of a float type to f32, row-major, into `out`.
    ///
    /// # Errors
    /// As [`decode_rows`](Self::decode_rows); what `out` then holds is not specified.
    fn decode_f32(&self, rows: Range<usize>, parts: &[&[u8]], out: &mut [f32]) -> Result<()> {
        let (dtype, cols) = self.row();
        let width = dtype.size_bytes();
        let mut scratch = row_scratch(&rows, cols * width);
        let mut out_rows = out.chunks_exact_mut(cols.max(1));
        self.decode_rows(rows, parts, |values, mask| {
            spread(width, values, mask, &mut scratch);
            if let Some(out) = out_rows.next() {
                dense::to_f32(dtype, &scratch, out);
            }
        })
    }
}

/// Elements that one mask byte stands for.
const GROUP: usize = 8;

/// For each mask byte and column, how many columns to the left of it are stored.
const RANKS: [[u8; GROUP]; 256] = {
    let mut ranks = [[0; GROUP]; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut column = 0;
        while column < GROUP {
            ranks[byte][column] = (byte & ((1 << column) - 1)).count_ones() as u8;
            column += 1;
        }
        byte += 1;
    }
    ranks
};

/// Width of an element of type `dtype`, when the sparse encodings can hold it.
pub(super) fn holds(dtype: DType) -> bool {
    dtype.is_float_weight() || matches!(dtype, DType::I8 | DType::U8)
}

/// What [`holds`] accepts, for messages.
pub(super) const HELD: &str = "F32, F16, BF16, F8_E4M3, I8 or U8";

/// Mask bytes of a row.
pub(super) fn stride(cols: usize) -> usize {
    cols.div_ceil(GROUP)
}

/// Calls one of three instances by the bytes of an element: 1, 2, or 4.
macro_rules! by_width {
    ($width:expr, $function:ident($($argument:expr),*)) => {
        match $width {
            1 => $function::<1>($($argument),*),
            2 => $function::<2>($($argument),*),
            _ => $function::<4>($($argument),*),
        }
    };
}

/// Marks the elements of one row that are not zero in `mask`, whole bytes of it. Returns their number.
pub(super) fn mark(width: usize, dense: &[u8], mask: &mut [u8]) -> usize {
    by_width!(width, mark_row(dense, mask))
}

/// Gathers the marked elements of one row. `values` has room for exactly those.
pub(super) fn gather(width: usize, dense: &[u8], mask: &[u8], values: &mut [u8]) {
    by_width!(width, gather_row(dense, mask, values));
}

/// The inverse of [`gather`]: spreads `values` over one row and zeroes the rest of it.
pub(super) fn spread(width: usize, values: &[u8], mask: &[u8], dense: &mut [u8]) {
    by_width!(width, spread_row(values, mask, dense));
}

/// Set bits.
pub(super) fn count(mask: &[u8]) -> usize {
    let (words, rest) = mask.as_chunks::<8>();
    let words: u32 = words.iter().map(|word| u64::from_le_bytes(*word).count_ones()).sum();
    let rest: u32 = rest.iter().map(|byte| byte.count_ones()).sum();
    words as usize + rest as usize
}

/// Whether the unused bits of the last byte of a row are 0.
pub(super) fn is_padded(mask: &[u8], cols: usize) -> bool {
    match (mask.last(), cols % GROUP) {
        (None, _) | (_, 0) => true,
        (Some(last), used) => last >> used == 0,
    }
}

/// `len` bits from column `first` on; at most 16, and they exist.
pub(super) fn bits(mask: &[u8], first: usize, len: usize) -> u32 {
    let bytes = &mask[first / 8..];
    let window = match bytes {
        [a, b, c, ..] => u32::from_le_bytes([*a, *b, *c, 0]),
        [a, b] => u32::from_le_bytes([*a, *b, 0, 0]),
        _ => u32::from(bytes[0]),
    };
    window >> (first % 8) & ((1 << len) - 1)
}

/// Sets the bits of `pattern` from column `first` on; those set before stay.
pub(super) fn set_bits(mask: &mut [u8], first: usize, pattern: u32) {
    let window = (pattern << (first % 8)).to_le_bytes();
    for (byte, bits) in mask[first / 8..].iter_mut().zip(window) {
        *byte |= bits;
    }
}

fn mark_row<const N: usize>(dense: &[u8], mask: &mut [u8]) -> usize {
    // Moves bit 0 of byte i to bit 56 + i: the products do not carry into each other.
    const GATHER: u64 = 0x0102_0408_1020_4080;
    let (elements, _) = dense.as_chunks::<N>();
    let (groups, rest) = elements.as_chunks::<GROUP>();
    for (group, byte) in groups.iter().zip(&mut *mask) {
        let flags = group.map(|element| u8::from(element != [0; N]));
        *byte = (u64::from_le_bytes(flags).wrapping_mul(GATHER) >> 56) as u8;
    }
    if !rest.is_empty()
        && let Some(byte) = mask.get_mut(groups.len())
    {
        let flags = rest.iter().enumerate();
        *byte = flags.fold(0, |byte, (i, element)| byte | u8::from(*element != [0; N]) << i);
    }
    count(mask)
}

fn gather_row<const N: usize>(dense: &[u8], mask: &[u8], values: &mut [u8]) {
    let (elements, _) = dense.as_chunks::<N>();
    let (values, _) = values.as_chunks_mut::<N>();
    let (groups, rest) = elements.as_chunks::<GROUP>();
    let mut at = 0;
    for (group, &byte) in groups.iter().zip(mask) {
        let left = &mut values[at..];
        // Every element is written at its rank; an unmarked one is overwritten by the next marked.
        if let Some((slots, _)) = left.split_first_chunk_mut::<GROUP>() {
            place(group, byte, slots);
        } else {
            let mut slots = [[0; N]; GROUP];
            place(group, byte, &mut slots);
            left.copy_from_slice(&slots[..left.len()]);
        }
        at += byte.count_ones() as usize;
    }
    if let Some(&byte) = mask.get(groups.len()) {
        let marked = rest.iter().enumerate().filter(|(i, _)| byte >> i & 1 != 0);
        values[at..].iter_mut().zip(marked).for_each(|(value, (_, element))| *value = *element);
    }
}

#[inline]
fn place<const N: usize>(group: &[[u8; N]; GROUP], byte: u8, slots: &mut [[u8; N]; GROUP]) {
    let ranks = &RANKS[usize::from(byte)];
    for (element, rank) in group.iter().zip(ranks) {
        slots[usize::from(rank & 7)] = *element;
    }
}

fn spread_row<const N: usize>(values: &[u8], mask: &[u8], dense: &mut [u8]) {
    let (values, _) = values.as_chunks::<N>();
    let (elements, _) = dense.as_chunks_mut::<N>();
    let (groups, rest) = elements.as_chunks_mut::<GROUP>();
    let mut at = 0;
    let next = |at: usize| {
        if let Some((slots, _)) = values[at..].split_first_chunk::<GROUP>() {
            return *slots;
        }
        let mut slots = [[0; N]; GROUP];
        slots[..values.len() - at].copy_from_slice(&values[at..]);
        slots
    };
    for (group, &byte) in groups.iter_mut().zip(mask) {
        let (slots, ranks) = (next(at), &RANKS[usize::from(byte)]);
        for (i, element) in group.iter_mut().enumerate() {
            let value = slots[usize::from(ranks[i] & 7)];
            *element = if byte >> i & 1 != 0 { value } else { [0; N] };
        }
        at += byte.count_ones() as usize;
    }
    if let Some(&byte) = mask.get(groups.len()) {
        let (slots, ranks) = (next(at), &RANKS[usize::from(byte)]);
        for (i, element) in rest.iter_mut().enumerate() {
            let value = slots[usize::from(ranks[i])];
            *element = if byte >> i & 1 != 0 { value } else { [0; N] };
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn gather_and_spread_follow_the_mask(
            row in proptest::collection::vec(any::<u32>(), 0..70),
            marks in proptest::collection::vec(any::<bool>(), 70),
        ) {
            for width in [1, 2, 4] {
                let element = |i: usize| row[i].to_le_bytes()[..width].to_vec();
                let dense: Vec<u8> = (0..row.len()).flat_map(element).collect();
                let mut mask = vec![0; stride(row.len())];
                (0..row.len()).filter(|&i| marks[i]).for_each(|i| mask[i / 8] |= 1 << (i % 8));
                let marked: Vec<usize> = (0..row.len()).filter(|&i| marks[i]).collect();
                let expected: Vec<u8> = marked.iter().flat_map(|&i| element(i)).collect();
                prop_assert_eq!(count(&mask), marked.len());
                let mut values = vec![0xAA; expected.len()];
                gather(width, &dense, &mask, &mut values);
                prop_assert_eq!(&values, &expected);
                let mut back = vec![0xAA; dense.len()];
                spread(width, &values, &mask, &mut back);
                let kept = |i: usize| if marks[i] { element(i) } else { vec![0; width] };
                prop_assert_eq!(back, (0..row.len()).flat_map(kept).collect::<Vec<_>>());
            }
        }

        #[test]
        fn marks_are_the_elements_with_a_bit(row in proptest::collection::vec(0u32..3, 0..70)) {
            for width in [1, 2, 4] {
                let dense: Vec<u8> =
                    row.iter().flat_map(|v| v.to_be_bytes()[4 - width..].to_vec()).collect();
                let mut mask = vec![0; stride(row.len())];
                let marked = mark(width, &dense, &mut mask);
                prop_assert_eq!(marked, row.iter().filter(|v| **v != 0).count());
                for (i, value) in row.iter().enumerate() {
                    prop_assert_eq!(bits(&mask, i, 1) != 0, *value != 0);
                }
                prop_assert!(is_padded(&mask, row.len()));
            }
        }

        #[test]
        fn bits_are_read_where_they_were_set(first in 0..50usize, len in 1..17usize, pattern: u32) {
            let pattern = pattern & ((1 << len) - 1);
            let mut mask = vec![0; stride(first + len)];
            set_bits(&mut mask, first, pattern);
            prop_assert_eq!(bits(&mask, first, len), pattern);
            prop_assert_eq!(count(&mask), pattern.count_ones() as usize);
        }
    }
}
