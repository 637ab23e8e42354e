//! Causal softmax attention in blocks of queries.
//!
//! A task takes one block of queries of one sequence and goes through the heads, so it owns whole
//! rows of the result; it holds one block × keys matrix of scores at a time.

use std::ops::Range;

use rayon::prelude::*;

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
    /// Positions in the sequence.
    positions: Range<usize>,
}

impl QueryBlock {
    fn all(lens: &SequenceLens) -> Vec<Self> {
        lens.ranges()
            .flat_map(|rows| {
                let (sequence, len) = (rows.start, rows.len());
                (0..len).step_by(QUERY_BLOCK).map(move |first| Self {
                    sequence,
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
            let mut out = vec![0.0; qkv.rows * cols];
            tasks(&blocks, &mut out, cols).into_par_iter().for_each(|(block, out)| {
                attend_f32(&values, shape, block, out);
            });
            HostData::F32(out)
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
