//! Times of the phases of one layer, on made-up inputs, by the code that a conversion runs.
//!
//! A round is upload, Gram matrix, factor, sweep, output error, packing. The solver clocks its
//! own three phases as in a conversion; each of the others begins and ends with
//! [`finish`](crate::backend::Storage::finish). The first round is not counted.

mod inputs;
mod times;

use serde::Serialize;
use sparsepack_formats::{DType, Encoding};

use self::{
    inputs::Batches,
    times::{Round, median},
};
use super::{
    budget::{BATCH_TOKENS, factor_flops, form_flops, gram_flops, sweep_flops},
    encodings::of_pruned,
    error::{PipelineError, Result},
    plan::{OutputTensor, Pruning},
    stored::{round_to_stored, store_matrix},
};
use crate::{
    backend::{Backend, BackendError, BackendJob, HostData, StoredValues},
    calibration::{StatKind, Statistic},
    compress::{Layer, Method, SolveTimes, SolverOptions, Sparsity, check_target, solver},
};

pub use times::{LayerPhase, PhaseTime};

/// The layer's name in errors.
const NAME: &str = "layer";

/// One layer to time: SparseGPT at the default settings, stored packed in bf16.
#[derive(Debug, Clone, Copy)]
pub struct LayerBench {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Calibration tokens.
    pub tokens: usize,
    /// What becomes zero.
    pub sparsity: Sparsity,
    /// Counted rounds, of which the median is taken.
    pub repeat: usize,
}

/// What a layer took.
#[derive(Debug, Clone, Serialize)]
pub struct LayerTimes {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Calibration tokens.
    pub tokens: usize,
    /// Tokens of a batch; the last may be shorter.
    pub batch_tokens: usize,
    /// Batches that differ; they are shown in turn.
    pub distinct_batches: usize,
    /// What became zero.
    pub sparsity: String,
    /// How it is stored.
    #[serde(flatten)]
    pub encoding: Encoding,
    /// Bytes of the stored layer.
    pub packed_bytes: u64,
    /// Output error of the solved layer.
    pub relative_error: Option<f64>,
    /// Damping of the factor.
    pub damp: Option<f64>,
    /// Counted rounds.
    pub repeat: usize,
    /// Device and arithmetic of products.
    pub compute: String,
    /// Measured throughput of a large product, FLOP/s.
    pub gemm_ceiling_flops_per_sec: f64,
    /// In the order of a round.
    pub phases: Vec<PhaseTime>,
}

impl LayerBench {
    /// Checks that the layer can be pruned and packed as asked, and returns how it is stored.
    ///
    /// # Errors
    /// A pattern that the columns cannot carry; a sparsity at which packing makes nothing smaller.
    pub fn encoding(&self) -> Result<Encoding> {
        check_target(NAME, self.cols, Some(self.sparsity), None)?;
        let pruning = Pruning { method: Method::SparseGpt, sparsity: self.sparsity };
        let shape = [self.rows, self.cols];
        let packed = of_pruned(&shape, DType::Bf16, pruning, SolverOptions::default());
        if stored_bytes(packed, &shape)?
            < stored_bytes(Encoding::Dense { dtype: DType::Bf16 }, &shape)?
        {
            return Ok(packed);
        }
        Err(PipelineError::Unsupported {
            format: "packed",
            why: format!(
                "at {} the layer does not become smaller, since positions take more than the zeros",
                self.sparsity
            ),
        })
    }

    /// Memory on the host, when the arithmetic runs there (`on_host`) or on a device of its own.
    pub fn host_bytes(&self, on_host: bool) -> u64 {
        let [rows, cols] = [self.rows as u64, self.cols as u64];
        let weights = rows * cols;
        // Rounded to bf16, and when it comes back, packed; at first as made, in f32.
        let copies = weights * (2 + 2 + 2);
        let batch = (BATCH_TOKENS.min(self.tokens)) as u64 * cols * 4;
        if !on_host {
            return copies + batch;
        }
        // Uploaded, dense for the error, and solved; H and U in f32 and two factors in f64; batches as made
        // and in the type of products.
        let solving = weights * (4 + 4 + 4) + cols * cols * (4 + 4 + 8 + 8);
        copies + solving + batch * (inputs::DISTINCT as u64 + 2)
    }

    fn flops(&self) -> [(LayerPhase, f64); 4] {
        let [rows, cols, tokens] = [self.rows, self.cols, self.tokens].map(|n| n as f64);
        [
            (LayerPhase::Gram, gram_flops(tokens, cols)),
            (LayerPhase::Factor, factor_flops(cols)),
            (LayerPhase::Sweep, sweep_flops(rows, cols)),
            // Of the weight, and of what it lost.
            (LayerPhase::Error, 2.0 * form_flops(rows, cols)),
        ]
    }

    /// Bytes of the dense matrix (bf16), which is uploaded and packed.
    fn bytes(&self) -> [(LayerPhase, f64); 2] {
        let dense = 2.0 * self.rows as f64 * self.cols as f64;
        [(LayerPhase::Upload, dense), (LayerPhase::Pack, dense)]
    }

    /// One round: seconds by phase.
    fn round<B: Backend>(
        &self,
        b: &B,
        weight: &[u8],
        batches: &Batches<B::Matrix>,
        output: &OutputTensor,
    ) -> Result<Round> {
        let mut round = Round::default();
        let weight = round.clock(b, LayerPhase::Upload, || {
            let stored = StoredValues { dtype: DType::Bf16, bytes: weight };
            b.receive(&b.stage(stored, self.rows, self.cols)?)
        })?;

        let mut statistic = Statistic::new(b, StatKind::Hessian, self.cols)?;
        round
            .clock(b, LayerPhase::Gram, || batches.iter().try_for_each(|x| statistic.add(b, x)))?;

        let layer = Layer {
            name: NAME.to_owned(),
            weight,
            sparsity: Some(self.sparsity),
            grid: None,
            keep_zeros: false,
        };
        let solver = solver::<B>(Some(Method::SparseGpt), None, SolverOptions::default());
        let mut spent = SolveTimes::default();
        let solved = solver.solve(b, vec![layer], &mut statistic, &mut spent)?;
        drop(statistic);
        round.add(LayerPhase::Factor, spent.factor_secs);
        round.add(LayerPhase::Sweep, spent.sweep_secs);
        round.add(LayerPhase::Error, spent.error_secs);

        for mut solved in solved {
            let parts = round.clock(b, LayerPhase::Pack, || -> Result<_> {
                store_matrix(b, output, &mut solved.weight)?()
            })?;
            round.packed_bytes = parts.iter().map(|part| part.len() as u64).sum();
            round.report = Some(solved.report);
        }
        Ok(round)
    }
}

impl BackendJob for LayerBench {
    type Output = Result<LayerTimes>;

    fn run<B: Backend>(self, b: &B) -> Result<LayerTimes> {
        let output = self.output()?;
        let ceiling = b.measure_gemm_ceiling()?;
        let products = products(b)?;
        let weight = {
            let mut made = inputs::weight(self.rows, self.cols);
            round_to_stored(NAME, DType::Bf16, &mut made)?
        };
        let batches = Batches::new(b, self.tokens, self.cols)?;
        self.round(b, &weight, &batches, &output)?;
        let rounds = (0..self.repeat)
            .map(|_| self.round(b, &weight, &batches, &output))
            .collect::<Result<Vec<_>>>()?;
        // On a machine with other work, one measurement of it may be of that.
        let ceiling = ceiling.max(b.measure_gemm_ceiling()?);
        let (flops, bytes) = (self.flops(), self.bytes());
        let phases = LayerPhase::ALL.map(|phase| {
            let count = |of: &[(LayerPhase, f64)]| {
                of.iter().find(|(counted, _)| *counted == phase).map(|(_, count)| *count)
            };
            let seconds = median(rounds.iter().map(|round| round.seconds(phase)).collect());
            PhaseTime::new(phase, seconds, count(&flops), count(&bytes), products, ceiling)
        });
        let last = rounds.last();
        let report = last.and_then(|round| round.report.as_ref());
        Ok(LayerTimes {
            rows: self.rows,
            cols: self.cols,
            tokens: self.tokens,
            batch_tokens: BATCH_TOKENS.min(self.tokens),
            distinct_batches: batches.distinct(),
            sparsity: self.sparsity.to_string(),
            encoding: output.encoding,
            packed_bytes: last.map_or(0, |round| round.packed_bytes),
            relative_error: report.and_then(|report| report.relative_error),
            damp: report.and_then(|report| report.damp),
            repeat: self.repeat,
            compute: b.describe(),
            gemm_ceiling_flops_per_sec: ceiling,
            phases: phases.to_vec(),
        })
    }
}

impl LayerBench {
    /// The layer as a plan would store it.
    fn output(&self) -> Result<OutputTensor> {
        let (encoding, shape) = (self.encoding()?, vec![self.rows, self.cols]);
        let bytes = stored_bytes(encoding, &shape)?;
        Ok(OutputTensor {
            name: format!("{NAME}.weight"),
            stored_name: None,
            encoding,
            shape,
            bytes,
            block: None,
            linear: None,
            permuted_heads: None,
        })
    }
}

fn stored_bytes(encoding: Encoding, shape: &[usize]) -> Result<u64> {
    let components = encoding.components(NAME, shape)?;
    Ok(components.iter().map(|component| component.bytes).sum())
}

/// The type in which the backend keeps what only feeds products.
fn products<B: Backend>(b: &B) -> std::result::Result<&'static str, BackendError> {
    const WIDTH: usize = 16;
    let row = b.upload(&[1.0; WIDTH], 1, WIDTH)?;
    Ok(match b.offload(b.rms_norm(&row, &row, inputs::EPSILON)?)?.data {
        HostData::F32(_) => "f32 products",
        HostData::Bf16(_) => "bf16 products, f32 sums",
    })
}

#[cfg(test)]
mod tests;
