//! `x Wᵀ + bias`: most of a forward pass.
//!
//! A weight is laid out once and used for every calibration batch. Each strip of tokens is computed
//! by one thread, so an element's sum runs in the order of the input features.

use std::time::{Duration, Instant};

use rayon::prelude::*;

use super::bf16::pack::{self, Source};
use super::bf16::{BLOCK, Isa, Line, Session, Sums, TILE_K, TILE_LINES, add_block};
use super::linalg::{self, Into, View, ViewMut};
use super::matrix::{shape_error, strip_len};
use super::{CpuMatrix, Products};
use crate::backend::Result;

/// Tokens of a strip of an f32 product: enough to pay for packing the weight.
const F32_STRIP: usize = 256;

/// Tokens of a strip of a bf16 product: each panel of the weight is used by its four strips of 32
/// rows while it is in the first-level cache.
const BF16_STRIP: usize = 4 * BLOCK;
/// Tiles of the inner dimension at a time: 20 · 2 KiB of a panel stay in the first-level cache.
const MAX_TILES: usize = 20;

/// Weights stacked along the output features, laid out for products.
#[derive(Debug)]
pub struct CpuWeight {
    out_features: usize,
    in_features: usize,
    data: WeightData,
}

#[derive(Debug)]
enum WeightData {
    /// Row-major `[out, in]`.
    F32(Vec<f32>),
    /// Packed panels of 32 output features.
    Bf16 {
        /// Instructions that the products use.
        isa: Isa,
        /// Panel after panel.
        panels: Vec<Line>,
    },
}

/// Stacks `[out_i, in]` weights.
pub(super) fn prepare(products: Products, weights: &[&CpuMatrix]) -> Result<CpuWeight> {
    let in_features = weights.first().map_or(0, |weight| weight.cols);
    if let Some(other) = weights.iter().find(|weight| weight.cols != in_features) {
        let detail = format!("weights of {in_features} and {} columns", other.cols);
        return Err(shape_error("prepare", detail));
    }
    let out_features = weights.iter().map(|weight| weight.rows).sum();
    let data = match products {
        Products::F32 => {
            let mut stacked = Vec::with_capacity(out_features * in_features);
            for weight in weights {
                stacked.extend_from_slice(&weight.widened());
            }
            WeightData::F32(stacked)
        }
        Products::Bf16(isa) => {
            WeightData::Bf16 { isa, panels: pack_weights(weights, out_features, in_features) }
        }
    };
    Ok(CpuWeight { out_features, in_features, data })
}

fn pack_weights(weights: &[&CpuMatrix], out_features: usize, in_features: usize) -> Vec<Line> {
    let mut stacked = Vec::with_capacity(out_features * in_features);
    for weight in weights {
        stacked.extend_from_slice(&weight.narrowed());
    }
    let source = Source::dense(&stacked, out_features, in_features);
    let lines = pack::lines(in_features);
    let mut panels = vec![Line::ZERO; out_features.div_ceil(BLOCK) * lines];
    panels.par_chunks_mut(lines.max(1)).enumerate().for_each(|(panel, lines)| {
        let first = panel * BLOCK;
        pack::columns_from_rows(source.part(first..first + BLOCK, 0..in_features), lines);
    });
    panels
}

/// `[tokens, in] × [out, in] → [tokens, out]`.
pub(super) fn linear(
    x: &CpuMatrix,
    weight: &CpuWeight,
    bias: Option<&CpuMatrix>,
) -> Result<CpuMatrix> {
    let CpuWeight { out_features, in_features, data } = weight;
    let (n, k) = (*out_features, *in_features);
    x.expect_shape("linear", x.rows, k)?;
    let bias = match bias {
        Some(bias) => {
            bias.expect_shape("linear bias", 1, n)?;
            Some(bias.widened())
        }
        None => None,
    };
    let tokens = x.rows;
    let mut out = vec![0.0; tokens * n];
    match data {
        WeightData::F32(weight) => {
            let weight = View::dense(weight, n, k);
            out.par_chunks_mut(strip_len(F32_STRIP, n)).enumerate().for_each(|(strip, out)| {
                let mut scratch = Vec::new();
                let rows = out.len() / n;
                let first = strip * F32_STRIP;
                let x = View::dense(x.rows_f32(first..first + rows, &mut scratch), rows, k);
                let c = ViewMut { data: out, rows, cols: n, stride: n };
                linalg::matmul_nt(c, Into::Replace, x, weight, 1.0);
                if let Some(bias) = &bias {
                    for out in out.chunks_exact_mut(n) {
                        out.iter_mut().zip(bias.iter()).for_each(|(out, bias)| *out += bias);
                    }
                }
            });
        }
        WeightData::Bf16 { isa, panels } => {
            let x_values = x.narrowed();
            let x = Source::dense(&x_values, x.rows, k);
            out.par_chunks_mut(strip_len(BF16_STRIP, n)).enumerate().for_each_init(
                Vec::new,
                |packed, (strip, out)| {
                    if let Some(bias) = &bias {
                        out.chunks_exact_mut(n).for_each(|out| out.copy_from_slice(bias));
                    }
                    let first = strip * BF16_STRIP;
                    let x = x.part(first..first + out.len() / n, 0..k);
                    add_product(*isa, x, panels, out, n, packed);
                },
            );
        }
    }
    Ok(CpuMatrix::from_f32(tokens, n, out))
}

/// `out += x Wᵀ` for a few strips of `x` and all panels of a weight.
fn add_product(
    isa: Isa,
    x: Source<'_>,
    panels: &[Line],
    out: &mut [f32],
    n: usize,
    packed: &mut Vec<Line>,
) {
    let session = Session::start(isa);
    let mut sums = Sums::ZERO;
    let tiles = x.cols.div_ceil(TILE_K);
    if tiles == 0 {
        return;
    }
    // Equal parts of the inner dimension, in order: the sums of an element depend on it alone.
    let part = tiles.div_ceil(tiles.div_ceil(MAX_TILES));
    for first_tile in (0..tiles).step_by(part) {
        let part = first_tile..tiles.min(first_tile + part);
        let lines = part.len() * TILE_LINES;
        let inner = part.start * TILE_K..part.end * TILE_K;
        packed.resize(x.rows.div_ceil(BLOCK) * lines, Line::ZERO);
        for (strip, packed) in packed.chunks_exact_mut(lines).enumerate() {
            let rows = strip * BLOCK..(strip + 1) * BLOCK;
            pack::rows(x.part(rows, inner.clone()), packed);
        }
        let inner_lines = part.start * TILE_LINES..part.end * TILE_LINES;
        for (panel, b) in panels.chunks_exact(tiles * TILE_LINES).enumerate() {
            let (b, col) = (&b[inner_lines.clone()], panel * BLOCK);
            let cols = BLOCK.min(n - col);
            for (a, out) in packed.chunks_exact(lines).zip(out.chunks_mut(BLOCK * n)) {
                session.block(a, b, &mut sums);
                add_block(&sums, 1.0, &mut out[col..], n, cols);
            }
        }
    }
}

/// FLOP/s of a product large enough to hide everything but the kernel.
pub(super) fn measure_ceiling(products: Products) -> Result<f64> {
    const SIDE: usize = 1024;
    const BUDGET: Duration = Duration::from_millis(300);
    let rows = F32_STRIP * rayon::current_num_threads().max(4);
    let value = |i: usize| (i % 17) as f32 / 17.0 - 0.5;
    let weight = CpuMatrix::from_f32(SIDE, SIDE, (0..SIDE * SIDE).map(value).collect());
    let weight = prepare(products, &[&weight])?;
    let x = super::matrix::product_operand(products, rows, SIDE, |row, out| {
        out.iter_mut().enumerate().for_each(|(col, out)| *out = value(row + col));
    });
    let flops = 2.0 * (rows * SIDE * SIDE) as f64;
    let start = Instant::now();
    let mut best = 0.0f64;
    while start.elapsed() < BUDGET {
        let round = Instant::now();
        std::hint::black_box(linear(&x, &weight, None)?);
        best = best.max(flops / round.elapsed().as_secs_f64());
    }
    Ok(best)
}
