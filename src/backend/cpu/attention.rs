//! Causal softmax attention in blocks of queries.
//!
//! A task takes one block of queries of one sequence and goes through the heads, so it owns whole
//! rows of the result; it holds one block × keys matrix of scores at a time.

use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use super::bf16::pack::{self, Source};
use super::bf16::{BLOCK, Isa, Line, Session, Sums, TILE_LINES, Target};
use super::buffers::{self, Scratch};
use super::linalg::{self, Into, View, ViewMut};
use super::matrix::strip_len;
use super::simd;
use super::{CpuMatrix, Products};
use crate::backend::{AttentionShape, HostData, Result, SequenceLens};

/// Queries of a block.
const QUERY_BLOCK: usize = 64;

/// Consecutive queries of one sequence.
#[derive(Debug, Clone)]
struct QueryBlock {
    /// Row of the sequence's first token.
    sequence: usize,
    /// Which sequence.
    index: usize,
    /// Positions in the sequence.
    positions: Range<usize>,
}

impl QueryBlock {
    fn all(lens: &SequenceLens) -> Vec<Self> {
        lens.ranges()
            .enumerate()
            .flat_map(|(index, rows)| {
                let (sequence, len) = (rows.start, rows.len());
                (0..len).step_by(QUERY_BLOCK).map(move |first| Self {
                    sequence,
                    index,
                    positions: first..len.min(first + QUERY_BLOCK),
                })
            })
            .collect()
    }
}

/// `[tokens, qkv_cols] → [tokens, num_heads · head_dim]`.
pub(super) fn causal_attention(
    products: Products,
    qkv: &CpuMatrix,
    shape: &AttentionShape,
    lens: &SequenceLens,
) -> Result<CpuMatrix> {
    qkv.expect_shape("causal_attention", lens.tokens(), shape.qkv_cols())?;
    let blocks = QueryBlock::all(lens);
    let cols = shape.num_heads * shape.head_dim;
    let data = match products {
        Products::F32 => {
            let values = qkv.widened();
            let mut out = buffers::take(qkv.rows * cols);
            tasks(&blocks, &mut out, cols).into_par_iter().rev().with_max_len(1).for_each(
                |(block, out)| {
                    attend_f32(&values, shape, block, out);
                },
            );
            HostData::F32(out)
        }
        Products::Bf16(isa) => {
            let values = qkv.narrowed();
            let values = Source::dense(&values, qkv.rows, qkv.cols);
            let packed = PackedHeads::pack(values, shape, lens);
            let mut out = buffers::take(qkv.rows * cols);
            tasks(&blocks, &mut out, cols).into_par_iter().rev().with_max_len(1).for_each(
                |(block, out)| {
                    attend_bf16(isa, values, &packed, shape, block, out);
                },
            );
            HostData::Bf16(out)
        }
    };
    Ok(CpuMatrix { rows: qkv.rows, cols, data })
}

/// Each block with its rows of the result.
fn tasks<'a, T>(
    blocks: &'a [QueryBlock],
    mut out: &'a mut [T],
    cols: usize,
) -> Vec<(&'a QueryBlock, &'a mut [T])> {
    blocks
        .iter()
        .map(|block| {
            let (rows, rest) = std::mem::take(&mut out).split_at_mut(block.positions.len() * cols);
            out = rest;
            (block, rows)
        })
        .collect()
}

fn attend_f32(qkv: &[f32], shape: &AttentionShape, block: &QueryBlock, out: &mut [f32]) {
    let (head_dim, stride) = (shape.head_dim, shape.qkv_cols());
    let (queries, keys) = (block.positions.len(), block.positions.end);
    let group = shape.num_heads / shape.num_kv_heads.max(1);
    let head = |row: usize, rows, head: usize| View {
        data: &qkv[row * stride + head * head_dim..],
        rows,
        cols: head_dim,
        stride,
    };
    let mut scores = vec![0.0; strip_len(queries, keys)];
    for query_head in 0..shape.num_heads {
        let key_head = shape.num_heads + query_head / group;
        let q = head(block.sequence + block.positions.start, queries, query_head);
        let k = head(block.sequence, keys, key_head);
        let v = head(block.sequence, keys, key_head + shape.num_kv_heads);
        let s = ViewMut { data: &mut scores, rows: queries, cols: keys, stride: keys };
        linalg::matmul_nt(s, Into::Replace, q, k, shape.scale);
        for (row, position) in scores.chunks_exact_mut(keys).zip(block.positions.clone()) {
            let (seen, future) = row.split_at_mut(position + 1);
            let sum = simd::exp_and_sum(seen, simd::max(seen));
            simd::scale(seen, 1.0 / sum);
            future.fill(0.0);
        }
        let p = View::dense(&scores, queries, keys);
        let c = ViewMut {
            data: &mut out[query_head * head_dim..],
            rows: queries,
            cols: head_dim,
            stride: shape.num_heads * head_dim,
        };
        linalg::matmul_nn(c, Into::Replace, p, v, 1.0);
    }
}

/// Keys and values of every sequence and key head, packed once for all queries.
struct PackedHeads {
    heads: Vec<PackedHead>,
    num_kv_heads: usize,
}

struct PackedHead {
    /// Panels of 32 keys.
    keys: Scratch<Line>,
    /// Panels of 32 value columns over all keys.
    values: Scratch<Line>,
}

impl PackedHeads {
    fn pack(qkv: Source, shape: &AttentionShape, lens: &SequenceLens) -> Self {
        let num_kv_heads = shape.num_kv_heads;
        let rows: Vec<_> = lens.ranges().collect();
        let heads = (0..rows.len() * num_kv_heads)
            .into_par_iter()
            .map(|i| {
                let (rows, head) = (rows[i / num_kv_heads].clone(), i % num_kv_heads);
                let part = |head: usize| {
                    qkv.part(rows.clone(), head * shape.head_dim..(head + 1) * shape.head_dim)
                };
                let key_head = shape.num_heads + head;
                PackedHead::pack(part(key_head), part(key_head + num_kv_heads))
            })
            .collect();
        Self { heads, num_kv_heads }
    }

    fn get(&self, sequence: usize, head: usize) -> &PackedHead {
        &self.heads[sequence * self.num_kv_heads + head]
    }
}

impl PackedHead {
    /// Packs `[keys, head_dim]` keys and values.
    fn pack(k: Source, v: Source) -> Self {
        let lines = pack::lines(k.cols);
        let mut keys = Scratch::take(k.rows.div_ceil(BLOCK) * lines);
        for (panel, lines) in keys.chunks_exact_mut(lines.max(1)).enumerate() {
            pack::columns_from_rows(k.part(panel * BLOCK..(panel + 1) * BLOCK, 0..k.cols), lines);
        }
        let lines = pack::lines(v.rows);
        let mut values = Scratch::take(v.cols.div_ceil(BLOCK) * lines);
        for (panel, lines) in values.chunks_exact_mut(lines.max(1)).enumerate() {
            pack::columns(v.part(0..v.rows, panel * BLOCK..(panel + 1) * BLOCK), lines);
        }
        Self { keys, values }
    }
}

fn attend_bf16(
    isa: Isa,
    qkv: Source,
    packed: &PackedHeads,
    shape: &AttentionShape,
    block: &QueryBlock,
    out: &mut [bf16],
) {
    let head_dim = shape.head_dim;
    let (cols, group) = (shape.num_heads * head_dim, shape.num_heads / shape.num_kv_heads.max(1));
    let mut strip = QueryStrip::new(isa, shape, block.positions.end);
    let positions = block.positions.clone().step_by(BLOCK);
    for (first, out) in positions.zip(out.chunks_mut(BLOCK * cols)) {
        let positions = first..block.positions.end.min(first + BLOCK);
        let rows = block.sequence + positions.start..block.sequence + positions.end;
        for head in 0..shape.num_heads {
            let columns = head * head_dim..(head + 1) * head_dim;
            let q = qkv.part(rows.clone(), columns.clone());
            let kv = packed.get(block.index, head / group);
            strip.attend(q, kv, positions.clone(), &mut out[columns.start..], cols);
        }
    }
}

/// Buffers for 32 queries of one head.
struct QueryStrip {
    session: Session,
    scale: f32,
    head_dim: usize,
    queries: Vec<Line>,
    /// Scores `[32, keys]` before scaling, keys padded to a panel.
    scores: Vec<f32>,
    /// Unnormalised probabilities, packed.
    probabilities: Vec<Line>,
    sums: Sums,
}

impl QueryStrip {
    fn new(isa: Isa, shape: &AttentionShape, keys: usize) -> Self {
        let keys = keys.next_multiple_of(BLOCK);
        Self {
            session: Session::start(isa),
            scale: shape.scale,
            head_dim: shape.head_dim,
            queries: vec![Line::ZERO; pack::lines(shape.head_dim)],
            scores: vec![0.0; BLOCK * keys],
            probabilities: vec![Line::ZERO; pack::lines(keys)],
            sums: Sums::ZERO,
        }
    }

    /// Attends with the queries at `positions` and writes rows of `out`, `stride` values apart.
    fn attend(
        &mut self,
        q: Source,
        kv: &PackedHead,
        positions: Range<usize>,
        out: &mut [bf16],
        stride: usize,
    ) {
        let Self { session, queries, scores, probabilities, sums, .. } = self;
        pack::rows(q, queries);
        let panels = positions.end.div_ceil(BLOCK);
        let keys = panels * BLOCK;
        for (panel, k) in kv.keys.chunks_exact(queries.len()).take(panels).enumerate() {
            let col = panel * BLOCK;
            let out = Target {
                out: &mut scores[col..],
                stride: keys,
                rows: BLOCK,
                cols: keys - col,
                add: false,
            };
            session.block_into(queries, k, out, sums);
        }
        let probabilities = &mut probabilities[..panels * TILE_LINES];
        let mut factors = [0.0; BLOCK];
        for (row, position) in positions.clone().enumerate() {
            let scores = &mut scores[row * keys..][..keys];
            scores[position + 1..].fill(f32::NEG_INFINITY);
            let max = simd::max(scores);
            factors[row] = 1.0 / session.exp_row(scores, max, self.scale, row, probabilities);
        }
        let values = kv.values.len() / self.head_dim.div_ceil(BLOCK);
        for (panel, v) in kv.values.chunks_exact(values).enumerate() {
            session.block(probabilities, &v[..panels * TILE_LINES], sums);
            let first = panel * BLOCK;
            let cols = BLOCK.min(self.head_dim - first);
            let rows = sums.0.chunks_exact_mut(BLOCK).zip(factors).zip(out.chunks_mut(stride));
            for ((sums, factor), out) in rows.take(positions.len()) {
                simd::scale(sums, factor);
                simd::narrow(&sums[..cols], &mut out[first..first + cols]);
            }
        }
    }
}
