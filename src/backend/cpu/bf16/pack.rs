//! The packed layout of both operands of a block product.
//!
//! A strip (32 rows of `A`) and a panel (32 columns of `B`) have the same shape: for each tile of
//! 32 inner indices, two tiles of 16 lines of 16 pairs of bf16, zero padded.
//!
//! ```text
//!             line i < 16 of tile r        pair p < 16 of the line
//! strip A:    row 16r + i                  inner indices 2p, 2p + 1
//! panel B:    inner indices 2i, 2i + 1     column 16r + p
//! ```
//!
//! A tile of one is the transpose, pair by pair, of a tile of the other.

use half::bf16;

use super::{BLOCK, Line, TILE_K, TILE_LINES, transpose_tiles};
use crate::backend::cpu::simd::vectorised;

/// Part of a row-major matrix.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Source<'a> {
    pub(in super::super) data: &'a [bf16],
    pub(in super::super) rows: usize,
    pub(in super::super) cols: usize,
    pub(in super::super) stride: usize,
}

impl<'a> Source<'a> {
    /// All of a contiguous matrix.
    pub(in super::super) fn dense(data: &'a [bf16], rows: usize, cols: usize) -> Self {
        Self { data, rows, cols, stride: cols }
    }

    /// A rectangle of this matrix, cut at its edges.
    pub(in super::super) fn part(
        self,
        rows: std::ops::Range<usize>,
        cols: std::ops::Range<usize>,
    ) -> Self {
        let start = (rows.start * self.stride + cols.start).min(self.data.len());
        Self {
            data: &self.data[start..],
            rows: rows.end.min(self.rows).saturating_sub(rows.start),
            cols: cols.end.min(self.cols).saturating_sub(cols.start),
            stride: self.stride,
        }
    }

    fn row(&self, row: usize) -> &'a [bf16] {
        &self.data[row * self.stride..][..self.cols]
    }
}

/// Lines of a strip or panel with `k` inner indices.
pub(in super::super) fn lines(k: usize) -> usize {
    k.div_ceil(TILE_K) * TILE_LINES
}

/// Packs up to 32 rows of `A`, inner indices along columns.
pub(in super::super) fn rows(source: Source, strip: &mut [Line]) {
    let (tiles, _) = strip.as_chunks_mut::<TILE_LINES>();
    for row in 0..BLOCK {
        let values = if row < source.rows { source.row(row) } else { &[] };
        let (whole, rest) = values.as_chunks::<TILE_K>();
        let mut tiles = tiles.iter_mut().map(|tile| &mut tile[row]);
        for (values, line) in whole.iter().zip(&mut tiles) {
            *line = bytemuck::cast(*values);
        }
        for (i, line) in tiles.enumerate() {
            let mut padded = [bf16::ZERO; TILE_K];
            if i == 0 {
                padded[..rest.len()].copy_from_slice(rest);
            }
            *line = bytemuck::cast(padded);
        }
    }
}

/// Packs up to 32 columns of `B` given as rows: a weight `[out, in]` of `x Wᵀ`.
pub(in super::super) fn columns_from_rows(source: Source, panel: &mut [Line]) {
    rows(source, panel);
    transpose_tiles(panel);
}

/// Packs up to 32 columns of `B`, inner indices along rows.
pub(in super::super) fn columns(source: Source, panel: &mut [Line]) {
    let (tiles, _) = panel.as_chunks_mut::<TILE_LINES>();
    let mut padded = [[bf16::ZERO; BLOCK]; 2];
    for (t, tile) in tiles.iter_mut().enumerate() {
        for i in 0..TILE_K / 2 {
            let k = t * TILE_K + 2 * i;
            let whole = k + 1 < source.rows && source.cols >= BLOCK;
            let pair =
                whole.then(|| (source.row(k).first_chunk(), source.row(k + 1).first_chunk()));
            [tile[i], tile[16 + i]] = if let Some((Some(even), Some(odd))) = pair {
                interleave(even, odd)
            } else {
                for (half, padded) in padded.iter_mut().enumerate() {
                    let values = if k + half < source.rows { source.row(k + half) } else { &[] };
                    let values = &values[..values.len().min(BLOCK)];
                    padded[values.len()..].fill(bf16::ZERO);
                    padded[..values.len()].copy_from_slice(values);
                }
                interleave(&padded[0], &padded[1])
            };
        }
    }
}

/// Turns packed columns into packed rows of the transpose.
pub(in super::super) fn transpose(panel: &mut [Line]) {
    transpose_tiles(panel);
}

vectorised! {
    /// Pairs of the same column.
    fn interleave<'a>(even: &'a [bf16; BLOCK], odd: &'a [bf16; BLOCK]) -> [Line; 2] {
        let pair = |i: usize| {
            u32::from(even[i].to_bits()) | u32::from(odd[i].to_bits()) << 16
        };
        [Line(std::array::from_fn(pair)), Line(std::array::from_fn(|i| pair(16 + i)))]
    }
}
