//! `x Wᵀ + bias`: most of a forward pass.
//!
//! A weight is laid out once and used for every calibration batch. Each strip of tokens is computed
//! by one thread, so an element's sum runs in the order of the input features.

use std::borrow::Cow;
use std::ops::Range;
use std::time::{Duration, Instant};

use half::bf16;
use rayon::prelude::*;

use super::bf16::pack::{self, Source};
use super::bf16::{BLOCK, Isa, Line, Session, Sums, TILE_K, TILE_LINES, Target};
use super::linalg::{self, Into, View, ViewMut};
use super::matrix::{shape_error, strip_len};
use super::{CpuMatrix, Products, activation, buffers, simd};
use crate::backend::{Activation, HostData, Result};

/// Tokens of a strip of an f32 product: enough to pay for packing the weight.
const F32_STRIP: usize = 256;

/// Tokens of a strip of a bf16 product: how often a part of the weight is used while it is in the
/// second-level cache.
const BF16_STRIP: usize = 8 * BLOCK;
/// Tiles of the inner dimension at a time: 10 · 2 KiB of the strip and as much of a panel stay in
/// the first-level cache.
const MAX_TILES: usize = 18;
/// Features of a gated product at a time.
const GATED_FEATURES: usize = 16 * BLOCK;

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
    let n = weight.out_features;
    let product = Product::new("linear", x, weight, bias)?;
    let mut out = buffers::take(x.rows * n);
    let strip = product.strip();
    out.par_chunks_mut(strip_len(strip, n)).enumerate().for_each_init(
        Scratch::default,
        |scratch, (index, out)| {
            let add = product.start(out);
            product.compute(index * strip, 0..n, Out { data: out, stride: n, add }, scratch);
        },
    );
    Ok(CpuMatrix::from_f32(x.rows, n, out))
}

/// `residual += x Wᵀ + bias`.
pub(super) fn linear_add(
    residual: &mut CpuMatrix,
    x: &CpuMatrix,
    weight: &CpuWeight,
    bias: Option<&CpuMatrix>,
) -> Result<()> {
    const OPERATION: &str = "linear_add";
    let n = weight.out_features;
    let product = Product::new(OPERATION, x, weight, bias)?;
    residual.expect_shape(OPERATION, x.rows, n)?;
    let strip = product.strip();
    residual.f32s_mut(OPERATION)?.par_chunks_mut(strip_len(strip, n)).enumerate().for_each_init(
        Scratch::default,
        |scratch, (index, out)| {
            product.add_bias(0..n, out);
            product.compute(index * strip, 0..n, Out { data: out, stride: n, add: true }, scratch);
        },
    );
    Ok(())
}

/// `activation(gate) · up` of `x Wᵀ + bias`, gates first. Gates and ups of some features at a time
/// go through a buffer that stays in the second-level cache.
pub(super) fn linear_gated(
    products: Products,
    x: &CpuMatrix,
    weight: &CpuWeight,
    bias: Option<&CpuMatrix>,
    activation: Activation,
) -> Result<CpuMatrix> {
    const OPERATION: &str = "linear_gated";
    if !weight.out_features.is_multiple_of(2) {
        let detail = format!("{} outputs are not gates and ups", weight.out_features);
        return Err(shape_error(OPERATION, detail));
    }
    let features = weight.out_features / 2;
    let product = Product::new(OPERATION, x, weight, bias)?;
    let strip = product.strip();
    // Whole panels, unless the ups do not start on one.
    let aligned = features.is_multiple_of(BLOCK);
    let chunk = if aligned { GATED_FEATURES.min(features).max(1) } else { features.max(1) };
    let fill = |index: usize, rows: usize, store: &mut dyn FnMut(usize, usize, &[f32])| {
        let mut scratch = Scratch::default();
        let mut buffer = buffers::Scratch::take(rows * 2 * chunk);
        for first in (0..features).step_by(chunk) {
            let width = chunk.min(features - first);
            let stride = 2 * width;
            let buffer = &mut buffer[..rows * stride];
            let mut compute = |columns: Range<usize>, data: &mut [f32]| {
                product.set_bias(columns.clone(), data, stride);
                let out = Out { data, stride, add: product.bias.is_some() };
                product.compute(index * strip, columns, out, &mut scratch);
            };
            if aligned {
                compute(first..first + width, buffer);
                compute(features + first..features + first + width, &mut buffer[width..]);
            } else {
                compute(0..2 * features, buffer);
            }
            for (row, values) in buffer.chunks_exact_mut(stride).enumerate() {
                let (gate, up) = values.split_at_mut(width);
                activation::gate(activation, gate, up);
                store(row, first, gate);
            }
        }
    };
    let len = strip_len(strip, features);
    let data = match products {
        Products::F32 => {
            let mut out = buffers::take(x.rows * features);
            out.par_chunks_mut(len).enumerate().for_each(|(index, out)| {
                fill(index, out.len() / features, &mut |row, first, values| {
                    out[row * features + first..][..values.len()].copy_from_slice(values);
                });
            });
            HostData::F32(out)
        }
        Products::Bf16(_) => {
            let mut out = buffers::take(x.rows * features);
            out.par_chunks_mut(len).enumerate().for_each(|(index, out)| {
                fill(index, out.len() / features, &mut |row, first, values| {
                    simd::narrow(values, &mut out[row * features + first..][..values.len()]);
                });
            });
            HostData::Bf16(out)
        }
    };
    Ok(CpuMatrix { rows: x.rows, cols: features, data })
}

/// Buffers of one thread.
#[derive(Default)]
struct Scratch {
    /// Rows of `x` as f32.
    wide: Vec<f32>,
    /// Packed strips of `x`.
    packed: Vec<Line>,
}

/// Where some rows of a product go.
struct Out<'a> {
    data: &'a mut [f32],
    /// Values from one row to the next.
    stride: usize,
    /// Whether the product is added to what is there.
    add: bool,
}

/// A product whose rows are computed strip by strip.
struct Product<'a> {
    x: &'a CpuMatrix,
    /// The rows of `x` in bf16, for bf16 products.
    narrow: Cow<'a, [bf16]>,
    weight: &'a CpuWeight,
    bias: Option<Cow<'a, [f32]>>,
}

impl<'a> Product<'a> {
    fn new(
        operation: &'static str,
        x: &'a CpuMatrix,
        weight: &'a CpuWeight,
        bias: Option<&'a CpuMatrix>,
    ) -> Result<Self> {
        x.expect_shape(operation, x.rows, weight.in_features)?;
        if let Some(bias) = bias {
            bias.expect_shape(operation, 1, weight.out_features)?;
        }
        let narrow = match weight.data {
            WeightData::F32(_) => Cow::Borrowed(&[] as &[bf16]),
            WeightData::Bf16 { .. } => x.narrowed(),
        };
        Ok(Self { x, narrow, weight, bias: bias.map(CpuMatrix::widened) })
    }

    /// Rows that one thread computes at a time: results do not depend on it.
    fn strip(&self) -> usize {
        match self.weight.data {
            WeightData::F32(_) => F32_STRIP,
            WeightData::Bf16 { .. } => BF16_STRIP,
        }
    }

    /// Puts the bias where the product will be added; says whether it did.
    fn start(&self, out: &mut [f32]) -> bool {
        self.set_bias(0..self.weight.out_features, out, self.weight.out_features);
        self.bias.is_some()
    }

    fn set_bias(&self, columns: Range<usize>, out: &mut [f32], stride: usize) {
        if let Some(bias) = &self.bias {
            let bias = &bias[columns];
            out.chunks_mut(stride).for_each(|out| out[..bias.len()].copy_from_slice(bias));
        }
    }

    fn add_bias(&self, columns: Range<usize>, out: &mut [f32]) {
        if let Some(bias) = &self.bias {
            let bias = &bias[columns];
            for out in out.chunks_exact_mut(bias.len().max(1)) {
                out.iter_mut().zip(bias).for_each(|(out, bias)| *out += bias);
            }
        }
    }

    /// Output features `columns` of the rows from `first` on, as many as `out` has (at most a
    /// strip). For bf16 products `columns` starts on a panel, or is everything from 0.
    fn compute(&self, first: usize, columns: Range<usize>, out: Out<'_>, scratch: &mut Scratch) {
        let rows = self.strip().min(self.x.rows - first);
        let k = self.weight.in_features;
        match &self.weight.data {
            WeightData::F32(weight) => {
                let weight =
                    View::dense(&weight[columns.start * k..columns.end * k], columns.len(), k);
                let x =
                    View::dense(self.x.rows_f32(first..first + rows, &mut scratch.wide), rows, k);
                let c = ViewMut { data: out.data, rows, cols: columns.len(), stride: out.stride };
                let into = if out.add { Into::Add } else { Into::Replace };
                linalg::matmul_nt(c, into, x, weight, 1.0);
            }
            WeightData::Bf16 { isa, panels } => {
                let x = Source::dense(&self.narrow, self.x.rows, k).part(first..first + rows, 0..k);
                let panel_lines = pack::lines(k);
                let from = columns.start / BLOCK * panel_lines;
                let to = columns.end.div_ceil(BLOCK) * panel_lines;
                compute_bf16(*isa, x, &panels[from..to], columns.len(), out, &mut scratch.packed);
            }
        }
    }
}

/// Some rows of `x Wᵀ` with `n` output features. The inner dimension goes in equal parts, in
/// order, so that the sums of an element depend on it alone; a part of 32 rows of `x` stays in the
/// first-level cache while the panels of the weight pass by.
fn compute_bf16(
    isa: Isa,
    x: Source<'_>,
    panels: &[Line],
    n: usize,
    out: Out<'_>,
    packed: &mut Vec<Line>,
) {
    let tiles = x.cols.div_ceil(TILE_K);
    if tiles == 0 {
        if !out.add {
            out.data.chunks_mut(out.stride).for_each(|out| out[..n].fill(0.0));
        }
        return;
    }
    let session = Session::start(isa);
    let mut sums = Sums::ZERO;
    let Out { data, stride, add } = out;
    let part = tiles.div_ceil(tiles.div_ceil(MAX_TILES));
    for first_tile in (0..tiles).step_by(part) {
        let part = first_tile..tiles.min(first_tile + part);
        let inner = part.start * TILE_K..part.end * TILE_K;
        let inner_lines = part.start * TILE_LINES..part.end * TILE_LINES;
        packed.resize(part.len() * TILE_LINES, Line::ZERO);
        for row in (0..x.rows).step_by(BLOCK) {
            pack::rows(x.part(row..row + BLOCK, inner.clone()), packed);
            for (panel, b) in panels.chunks_exact(tiles * TILE_LINES).enumerate() {
                let col = panel * BLOCK;
                let target = Target {
                    out: &mut data[row * stride + col..],
                    stride,
                    rows: x.rows - row,
                    cols: n - col,
                    add: add || first_tile > 0,
                };
                session.block_into(packed, &b[inner_lines.clone()], target, &mut sums);
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
