//! How much memory and arithmetic a conversion takes, from the plan alone.

use serde::Serialize;
use sparsepack_formats::{DType, Encoding};

use super::{
    plan::{BlockPlan, LayerPlan, OutputTensor},
    stored::held_bytes,
};
use crate::{
    backend::SequenceLens,
    calibration::StatKind,
    model::{Architecture, CapturePoint, ModelConfig, ModelSource, ModelTensor, TensorKind},
    recipe::{CalibrationRecipe, Sequential},
};

/// Tokens of one batch: short sequences are stacked up to about this many, so that products are
/// large enough to be fast; a longer sequence is a batch of its own.
pub(super) const BATCH_TOKENS: usize = 2048;

/// Batches that a device works on at the same time at most.
const BATCHES_AT_ONCE: u64 = 2;

/// Tokenizer and text, code, allocator, thread stacks and queues, which no formula counts; measured on
/// a model too small to matter.
const FIXED_BYTES: u64 = 128 << 20;

/// Code and workspaces of NVIDIA's libraries, which only they know.
const LIBRARY_BYTES: u64 = 512 << 20;

/// Memory at the peak of a conversion, by purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct MemoryBudget {
    /// Activations of the whole calibration set: residual stream and the widest kept input.
    pub hidden_bytes: u64,
    /// Weights of one block, stored and laid out; none where blocks are only copied, which takes a
    /// few rows at a time.
    pub block_bytes: u64,
    /// The Hessians that stand at a time, and the factorisation of the largest in f64.
    pub statistics_bytes: u64,
    /// Activations of the batches being worked on.
    pub batch_bytes: u64,
    /// Results that wait for the writer: at most those of one block, and on the CPU those of one layer.
    pub behind_bytes: u64,
    /// All of it, and what no formula counts.
    pub peak_bytes: u64,
    /// What a GPU needs of its own memory: a block, the next one as the source has it, the results of the
    /// one before, a Hessian with its factorisation, and one batch. Activations stay there too where they
    /// fit beside it.
    pub device_bytes: u64,
}

impl MemoryBudget {
    /// The budget of a conversion.
    pub fn new(
        source: &ModelSource,
        blocks: &[BlockPlan],
        outputs: &[OutputTensor],
        sequential: Sequential,
        calibration: &CalibrationRecipe,
    ) -> Self {
        let config = source.config();
        let needs = blocks.iter().map(BlockPlan::needs).max().unwrap_or(StatKind::None);
        let calibrated = needs > StatKind::None;
        let tokens = (calibration.samples * calibration.seq_len) as u64;
        let hidden = config.hidden_size as u64;
        let widest = widest_kept_input(config);
        // f32 residual stream and f32 inputs; backends that keep inputs in bf16 need less.
        let hidden_bytes = if calibrated { tokens * (hidden + widest) * 4 } else { 0 };

        let block_weights = block_weights(source.arch(), config);
        let loaded = blocks.iter().any(|block| !block.layers.is_empty());
        // Decoded weights, the layout for products, and one layer's copy for its error.
        let block_bytes = if loaded { block_weights * 4 * 5 / 2 } else { 0 };

        let hessians: Vec<u64> = CapturePoint::ALL
            .into_iter()
            .filter(|&point| blocks.iter().any(|block| block.needs_at(point) == StatKind::Hessian))
            .map(|point| (config.capture_width(point) as u64).pow(2))
            .collect();
        let largest = hessians.iter().copied().max().unwrap_or(0);
        // Values of the Hessians that stand at a time.
        let standing = match sequential {
            Sequential::True => largest,
            Sequential::Block => hessians.iter().sum(),
        };
        // f32 Hessians and a factor, two f64 matrices while factorising.
        let statistics_bytes = standing * 4 + largest * (4 + 8 + 8);

        let batch = BATCH_TOKENS.max(calibration.seq_len) as u64;
        let widest_output = (config.q_features() + 2 * config.kv_features())
            .max(2 * config.intermediate_size) as u64;
        let batch_bytes =
            if calibrated { BATCHES_AT_ONCE * batch * (widest_output + 2 * hidden) * 4 } else { 0 };
        let layers = blocks.iter().flat_map(|block| &block.layers);
        let layer = layers.map(|layer| (layer.rows * layer.cols) as u64).max().unwrap_or(0);
        let stage = CapturePoint::ALL.map(|point| stage_weights(source.arch(), config, point));
        let stage = if loaded { stage.into_iter().max().unwrap_or(0) } else { 0 };
        // The block as the source has it and in the layout for products, the next one as the source has it,
        // results on their way out, and the layers of a point as they are solved, with their codes.
        let (device_weights, behind_bytes) = if loaded {
            let behind = behind_bytes(outputs, blocks.len());
            let staged = staged_bytes(source, blocks.len());
            (2 * staged + 4 * block_weights + (4 + 2) * stage + behind, behind)
        } else {
            (0, 0)
        };
        // f32 Hessians and a factor, and first one f64 matrix while factorising, then one layer's copies: dense,
        // pruned, rounded, and two for its error.
        let solving = standing * 4 + largest * 4 + (largest * 8).max(4 * 5 * layer);
        // A batch is worked on while another leaves and the next one comes, which is less than this.
        let device_bytes = device_weights + solving + batch_bytes + LIBRARY_BYTES;
        let parts = [hidden_bytes, block_bytes, statistics_bytes, batch_bytes, behind_bytes];
        Self { device_bytes, ..Self::of_parts(parts) }
    }

    /// The budget of slicing to `width` columns; `fits` when a sliced model runs beside the dense one.
    pub(super) fn of_slicing(
        source: &ModelSource,
        width: usize,
        fits: bool,
        calibration: &CalibrationRecipe,
    ) -> Self {
        let config = source.config();
        let (hidden, kept) = (config.hidden_size as u64, width as u64);
        let tokens = (calibration.samples * calibration.seq_len) as u64;
        let batch = BATCH_TOKENS.max(calibration.seq_len) as u64;
        let widest = (config.q_features() + 2 * config.kv_features())
            .max(2 * config.intermediate_size) as u64;
        let input = widest_kept_input(config);
        // Decoded weights, the layout for products, and a piece on its way to the file in f64.
        let weights = block_weights(source.arch(), config) * 4 * 2;
        let piece = SLICED_ROWS as u64 * (hidden + widest) * 8;
        // f32 sums of a batch; f64 sums, their copy by columns, eigenvectors and workspace.
        let covariance = hidden * hidden * (4 + 5 * 8);
        let batches = BATCHES_AT_ONCE * batch * (widest + 2 * hidden) * 4;
        // The second model's; its sums, their solution, and copies of both by columns.
        let sums = input * (input + kept) * (4 + 4 * 8);
        let beside = |of_one: u64, of_other: u64| of_one + if fits { of_other } else { 0 };
        let hidden_bytes = beside(tokens * hidden * 4, tokens * (kept + input) * 4);
        let block_bytes = beside(weights, weights) + piece;
        let statistics_bytes = covariance.max(beside(0, sums));
        let batch_bytes = beside(batches, BATCHES_AT_ONCE * batch * (input + 2 * kept) * 4);
        Self::of_parts([hidden_bytes, block_bytes, statistics_bytes, batch_bytes, 0])
    }

    /// With as much of a GPU's memory as of the host's for all but the activations.
    fn of_parts(
        [hidden_bytes, block_bytes, statistics_bytes, batch_bytes, behind_bytes]: [u64; 5],
    ) -> Self {
        let device_bytes = block_bytes + statistics_bytes + batch_bytes;
        let peak_bytes = hidden_bytes + device_bytes + behind_bytes + FIXED_BYTES;
        Self {
            hidden_bytes,
            block_bytes,
            statistics_bytes,
            batch_bytes,
            behind_bytes,
            peak_bytes,
            device_bytes,
        }
    }

    /// The larger of two, which do not stand at the same time.
    pub(super) fn or_larger(self, other: Self) -> Self {
        if other.peak_bytes > self.peak_bytes { other } else { self }
    }
}

/// Bytes of the linears of the largest block as they are sent to a device: as they are stored, or as f32.
fn staged_bytes(source: &ModelSource, blocks: usize) -> u64 {
    let linears = |index| {
        source.block_tensors(index).filter(|it| matches!(it.kind, TensorKind::Linear { .. }))
    };
    let bytes = |tensor: &ModelTensor| match tensor.encoding {
        Encoding::Dense { dtype: DType::F16 | DType::Bf16 } if tensor.permuted_heads.is_none() => {
            tensor.stored_bytes
        }
        _ => 4 * tensor.shape.iter().map(|&n| n as u64).product::<u64>(),
    };
    (0..blocks).map(|index| linears(index).map(bytes).sum()).max().unwrap_or(0)
}

/// Bytes of the results of the largest block that wait for the writer.
fn behind_bytes(outputs: &[OutputTensor], blocks: usize) -> u64 {
    let linears =
        |index| outputs.iter().filter(move |it| it.block == Some(index) && it.linear.is_some());
    (0..blocks).map(|index| linears(index).map(held_bytes).sum()).max().unwrap_or(0)
}

/// Rows of a table that are turned at a time while slicing.
pub(super) const SLICED_ROWS: usize = 8192;

/// Weights of the linears that share the input at `point`, and of the matrix on the shortcut past
/// them. The last block of a sliced model may be a little larger.
pub(super) fn stage_weights(arch: &Architecture, config: &ModelConfig, point: CapturePoint) -> u64 {
    let weights = |[rows, cols]: [usize; 2]| rows as u64 * cols as u64;
    let adds = matches!(point, CapturePoint::AttnOut | CapturePoint::MlpHidden);
    let shortcut = arch.shortcuts.as_ref().filter(|_| adds);
    let shortcut = shortcut.map_or(0, |_| weights([config.hidden_size; 2]));
    arch.stage(point).map(|linear| weights(config.linear_shape(linear.role))).sum::<u64>()
        + shortcut
}

/// Weights of the linears of one block, and of the matrices on its shortcuts.
pub(super) fn block_weights(arch: &Architecture, config: &ModelConfig) -> u64 {
    CapturePoint::ALL.into_iter().map(|point| stage_weights(arch, config, point)).sum()
}

/// Columns of the widest input that is kept between passes.
pub(super) fn widest_kept_input(config: &ModelConfig) -> u64 {
    let kept = [CapturePoint::AttnOut, CapturePoint::MlpHidden];
    kept.into_iter().map(|point| config.capture_width(point) as u64).max().unwrap_or(0)
}

/// Operations of a forward pass of `tokens` tokens in windows of `window` through one block.
pub(super) fn block_forward_flops(
    config: &ModelConfig,
    weights: u64,
    tokens: f64,
    window: f64,
) -> f64 {
    // Causal attention: on average half of the keys, two products.
    let attention = 2.0 * window * (config.num_attention_heads * config.head_dim) as f64;
    tokens * (2.0 * weights as f64 + attention)
}

/// Operations of the steps of a block from point `first` up to, not including, step `end`.
pub(super) fn forward_flops(
    arch: &Architecture,
    config: &ModelConfig,
    first: CapturePoint,
    end: usize,
    lens: &SequenceLens,
) -> f64 {
    let tokens = lens.tokens() as f64;
    let attention = |tokens: f64| block_forward_flops(config, 0, tokens, tokens);
    CapturePoint::ALL[first as usize..end]
        .iter()
        .map(|&point| {
            let weights = stage_weights(arch, config, point);
            let attention: f64 = match point {
                CapturePoint::AttnIn => {
                    lens.ranges().map(|range| attention(range.len() as f64)).sum()
                }
                _ => 0.0,
            };
            2.0 * tokens * weights as f64 + attention
        })
        .sum()
}

/// Operations of the lower triangle of `XᵀX` for `tokens` tokens of width `features`.
pub(super) fn gram_flops(tokens: f64, features: f64) -> f64 {
    tokens * features * (features + 1.0)
}

/// Operations of the sweep of a `rows × cols` layer: every column's error moves onto the columns
/// to its right.
pub(super) fn sweep_flops(rows: f64, cols: f64) -> f64 {
    rows * cols * cols
}

/// Operations of one quadratic form of a `rows × cols` layer with the triangle of its Hessian.
pub(super) fn form_flops(rows: f64, cols: f64) -> f64 {
    rows * cols * cols
}

/// Operations of the factor of a Hessian: Cholesky and triangular inverse.
pub(super) fn factor_flops(features: f64) -> f64 {
    2.0 / 3.0 * features.powi(3)
}

/// Operations of a whole conversion.
pub(super) fn conversion_flops(
    source: &ModelSource,
    blocks: &[BlockPlan],
    calibration: &CalibrationRecipe,
) -> f64 {
    let config = source.config();
    let Some(last) = blocks.iter().rposition(|block| block.needs() > StatKind::None) else {
        return 0.0;
    };
    let tokens = (calibration.samples * calibration.seq_len) as f64;
    let window = calibration.seq_len as f64;
    let weights = block_weights(source.arch(), config);
    let forward = block_forward_flops(config, weights, tokens, window) * (last + 1) as f64;
    let solving: f64 = blocks
        .iter()
        .map(|block| {
            let points = CapturePoint::ALL.into_iter();
            let hessians: f64 = points
                .filter(|&point| block.needs_at(point) == StatKind::Hessian)
                .map(|point| {
                    let features = config.capture_width(point) as f64;
                    let factors = block.layers_at(point).map(LayerPlan::sweeps).max().unwrap_or(0);
                    gram_flops(tokens, features) + f64::from(factors) * factor_flops(features)
                })
                .sum();
            let sweeps: f64 = block
                .layers
                .iter()
                .filter(|layer| layer.needs() == StatKind::Hessian)
                .map(|layer| {
                    f64::from(layer.sweeps()) * sweep_flops(layer.rows as f64, layer.cols as f64)
                })
                .sum();
            hessians + sweeps
        })
        .sum();
    forward + solving
}
