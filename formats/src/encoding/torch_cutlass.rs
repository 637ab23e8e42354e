//! 2:4 sparse matrices as `PyTorch`'s CUTLASS semi-structured tensors hold them
//! (`torch.sparse.SparseSemiStructuredTensorCUTLASS`, attributes `packed` and `meta`; checked against
//! torch 2.10).
//!
//! For a matrix of `R` rows and `C` columns two components are stored:
//!
//! ```text
//!               dtype F16, BF16              dtype I8
//! NAME.packed   dtype  [R, C/2]              dtype  [R, C/2]     two kept values per group, ascending
//! NAME.meta     I16    [R, C/16]             I32    [R, C/32]    words of 4 or 8 nibbles, reordered
//!
//! multiples     R of 32, C of 64             R of 16, C of 128
//! ```
//!
//! Nibbles and fillers are those of [`sparse24`]. Word `(r, c)` has the nibbles of row `r`, groups
//! `q c` to `q c + q - 1` (`q` = 4 or 8), the first in the low bits. It is stored at index `L` of
//! `meta` read as one row:
//!
//! ```text
//! 16-bit words   r' = r/32*32 + r%8*4 + r%32/8
//! 32-bit words   r' = r/16*16 + r%8*2 + r%16/8
//! then           (r', c) = (r'+1, c-1) if r' is even and c odd, (r'-1, c+1) if r' is odd and c even
//!                L = c/2*2R + 2r' + c%2
//! ```
//!
//! The invariant: decoding gives back the bits that were encoded. As in `sparse24`, zero is the bit
//! pattern `+0.0`; torch takes `-0.0` for zero too, so the bytes are torch's where there is none. A
//! group of more than two values is refused; torch drops the third.

use std::ops::Range;

use super::{Component, MatrixShape, dense, sparse24::Runs};
use crate::{DType, FormatError, Result};

/// What torch demands of a shape for each type.
struct Limits {
    rows: usize,
    cols: usize,
    /// Bytes of a metadata word.
    word: usize,
    word_dtype: DType,
}

impl Limits {
    fn of(dtype: DType) -> Option<Self> {
        match dtype {
            DType::F16 | DType::Bf16 => {
                Some(Self { rows: 32, cols: 64, word: 2, word_dtype: DType::I16 })
            }
            DType::I8 => Some(Self { rows: 16, cols: 128, word: 4, word_dtype: DType::I32 }),
            _ => None,
        }
    }
}

/// The stored components of a matrix.
pub(super) fn components(name: &str, dtype: DType, shape: &[usize]) -> Result<Vec<Component>> {
    let refuse = |what| Err(FormatError::Encoding { name: name.to_owned(), what });
    let Some(limits) = Limits::of(dtype) else {
        return refuse(format!("torch-cutlass values of type {dtype}; expected F16, BF16 or I8"));
    };
    let &[rows, cols] = shape else {
        return refuse(format!("torch-cutlass needs a matrix, found shape {shape:?}"));
    };
    let fits = |n: usize, step: usize| n > 0 && n.is_multiple_of(step);
    if !fits(rows, limits.rows) || !fits(cols, limits.cols) {
        return refuse(format!(
            "torch-cutlass needs a multiple of {} rows and of {} columns for {dtype}, found {rows} × {cols}",
            limits.rows, limits.cols
        ));
    }
    let component = |suffix, dtype, cols| {
        let shape = vec![rows, cols];
        let bytes = dense::size_bytes(dtype, &shape)?;
        Some(Component { suffix, dtype, shape, bytes })
    };
    // The dense size bounds both components, and everything computed from them.
    let parts = dense::size_bytes(dtype, shape)
        .and_then(|_| component(".packed", dtype, cols / 2))
        .zip(component(".meta", limits.word_dtype, cols / (8 * limits.word)));
    match parts {
        Some((packed, meta)) => Ok(vec![packed, meta]),
        None => refuse(format!("the size of shape {shape:?} overflows")),
    }
}

/// What the rows encoded so far leave for the end: the whole metadata, since CUTLASS interleaves
/// words of all rows.
#[derive(Debug, Default)]
pub(super) struct State {
    meta: Vec<u8>,
}

/// Encodes and decodes one tensor that [`components`] accepts.
pub(super) struct Codec<'a> {
    pub(super) name: &'a str,
    pub(super) dtype: DType,
    pub(super) matrix: MatrixShape,
}

impl Codec<'_> {
    /// Packed values of whole rows, the first of which is row `first_row`; their metadata stays in
    /// `state`.
    ///
    /// # Errors
    /// [`FormatError::Encoding`] naming a group with more than two values.
    pub(super) fn encode(
        &self,
        state: &mut State,
        first_row: usize,
        dense: &[u8],
    ) -> Result<Vec<Vec<u8>>> {
        state.meta.resize(self.meta_stride() * self.matrix.rows, 0);
        let row_bytes = self.matrix.cols * self.dtype.size_bytes();
        let runs = self.runs(dense.len() / row_bytes, first_row);
        let mut packed = Vec::with_capacity(dense.len() / 2);
        let mut nibbles = vec![];
        for rows in runs.rows(0..dense.len() / row_bytes) {
            let packed_at = packed.len();
            let bytes = runs.of_rows(rows.len());
            packed.resize(packed_at + bytes.values, 0);
            nibbles.resize(bytes.metadata, 0);
            let dense = &dense[rows.start * row_bytes..rows.end * row_bytes];
            runs.pack(rows.start, dense, &mut packed[packed_at..], &mut nibbles)?;
            for (row, nibbles) in rows.zip(nibbles.chunks_exact(self.meta_stride())) {
                for (at, word) in
                    self.places(first_row + row).zip(nibbles.chunks_exact(self.word()))
                {
                    state.meta[at..at + self.word()].copy_from_slice(word);
                }
            }
        }
        Ok(vec![packed, vec![]])
    }

    /// What follows the last row: the metadata.
    pub(super) fn finish(state: State) -> Vec<Vec<u8>> {
        vec![vec![], state.meta]
    }

    /// Appends rows `rows` as bytes; `parts` are whole and of the right lengths.
    ///
    /// # Errors
    /// [`FormatError::Encoding`] naming row and columns of a nibble that is not legal; `out` is then
    /// as it was.
    pub(super) fn decode(
        &self,
        rows: Range<usize>,
        parts: &[&[u8]],
        out: &mut Vec<u8>,
    ) -> Result<()> {
        let before = out.len();
        let result = self.decode_runs(rows, parts, |run| out.extend_from_slice(run));
        if result.is_err() {
            out.truncate(before);
        }
        result
    }

    /// Decodes rows `rows` of a float type to f32, row-major, into `out`.
    ///
    /// # Errors
    /// As [`decode`](Self::decode); what `out` then holds is not specified.
    pub(super) fn decode_f32(
        &self,
        rows: Range<usize>,
        parts: &[&[u8]],
        out: &mut [f32],
    ) -> Result<()> {
        let mut at = 0;
        self.decode_runs(rows, parts, |run| {
            let values = run.len() / self.dtype.size_bytes();
            dense::to_f32(self.dtype, run, &mut out[at..at + values]);
            at += values;
        })
    }

    /// Shows the dense bytes of the rows, some rows at a time.
    fn decode_runs(
        &self,
        rows: Range<usize>,
        parts: &[&[u8]],
        mut show: impl FnMut(&[u8]),
    ) -> Result<()> {
        let [packed, meta] = parts else { return Ok(()) };
        let runs = self.runs(self.matrix.rows, 0);
        let (mut nibbles, mut dense) = (vec![], vec![]);
        for rows in runs.rows(rows) {
            nibbles.clear();
            for at in rows.clone().flat_map(|row| self.places(row)) {
                nibbles.extend_from_slice(&meta[at..at + self.word()]);
            }
            dense.resize(runs.of_rows(rows.len()).dense, 0);
            let packed = &packed[runs.of_rows(rows.start).values..runs.of_rows(rows.end).values];
            runs.unpack(rows.start, packed, &nibbles, &mut dense)?;
            show(&dense);
        }
        Ok(())
    }

    fn runs(&self, rows: usize, first_row: usize) -> Runs<'_> {
        let matrix = MatrixShape { rows, ..self.matrix };
        let mut runs = Runs::of(self.name, self.dtype, matrix);
        runs.first_row = first_row;
        runs.metadata_suffix = ".meta";
        runs
    }

    /// Bytes of a metadata word.
    fn word(&self) -> usize {
        if self.dtype.size_bytes() == 1 { 4 } else { 2 }
    }

    /// Metadata bytes of a row, in either order.
    fn meta_stride(&self) -> usize {
        self.matrix.cols / 8
    }

    /// Where in `meta` the words of a row are, in bytes.
    fn places(&self, row: usize) -> impl Iterator<Item = usize> + use<> {
        let (word, rows) = (self.word(), self.matrix.rows);
        let (group, interweave) = if word == 2 { (32, 4) } else { (16, 2) };
        let reordered = row / group * group + row % 8 * interweave + row % group / 8;
        (0..self.meta_stride() / word).map(move |col| {
            let (row, col) = match (reordered % 2, col % 2) {
                (0, 1) => (reordered + 1, col - 1),
                (1, 0) => (reordered - 1, col + 1),
                _ => (reordered, col),
            };
            word * (col / 2 * 2 * rows + 2 * row + col % 2)
        })
    }
}

#[cfg(test)]
mod tests;
