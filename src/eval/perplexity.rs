//! Perplexity: the whole text tokenized once with no special tokens, cut into non-overlapping
//! windows, the tail dropped; `exp` of the mean negative log-likelihood, each window predicting its
//! tokens 2..n (SparseGPT appendix B's protocol).

use serde::Serialize;

use super::LmHead;
use crate::{
    backend::{Backend, BackendJob, HostData, HostMatrix, SequenceLens},
    calibration::{HiddenStates, Kept, Parked},
    model::{BlockGeometry, ModelSource, embed},
    pipeline::{BlockReader, PipelineError, Progress, Result},
};

/// Rows of logits computed at a time: `tokens × vocabulary` f32 is the largest matrix of an
/// evaluation.
const LOGIT_ROWS: usize = 128;

/// A measured perplexity with its protocol.
#[derive(Debug, Clone, Serialize)]
pub struct Perplexity {
    /// `exp(mean negative log-likelihood)`.
    pub perplexity: f64,
    /// Windows evaluated.
    pub windows: usize,
    /// Tokens of a window.
    pub window: usize,
    /// Tokens of the whole text.
    pub text_tokens: usize,
    /// Tokens predicted.
    pub predicted_tokens: usize,
    /// Whether a beginning-of-sequence token was put before each window.
    pub bos: bool,
}

/// Evaluates windows of tokens, block by block over all of them, so that only one block's weights
/// are in memory.
pub struct PerplexityJob<'a> {
    /// The model.
    pub source: &'a ModelSource,
    /// Windows of equal length, at least 2.
    pub windows: &'a [Vec<u32>],
    /// Tokens of the whole text, for the report.
    pub text_tokens: usize,
    /// Told as the work goes on.
    pub progress: &'a dyn Progress,
}

impl BackendJob for PerplexityJob<'_> {
    /// The measurement, and device and arithmetic in words.
    type Output = Result<(Perplexity, String)>;

    fn run<B: Backend>(self, b: &B) -> Self::Output {
        let (source, config) = (self.source, self.source.config());
        let window = self.windows.first().map_or(0, Vec::len);
        let geometry = BlockGeometry::new(b, source.arch(), config, window)?;
        let lens = self.windows.iter().map(|ids| SequenceLens::new(vec![ids.len()])).collect();
        // On a device with memory of its own, blocks, the head and logits take the other half.
        let room = b.free_memory()?.map(|free| free / 2);
        let mut hidden = HiddenStates::in_memory(lens, room);
        for (index, ids) in self.windows.iter().enumerate() {
            let residual = HostMatrix {
                rows: ids.len(),
                cols: config.hidden_size,
                data: HostData::F32(embed(source, ids)?),
            };
            let residual = Parked::Device(b.onload(residual)?);
            hidden.put(b, index, Kept { residual, input: None })?;
        }
        self.progress.start((config.num_hidden_layers as u64 + 1) * self.windows.len() as u64);
        let blocks = config.num_hidden_layers;
        let mut reader = BlockReader::new(b, source)?;
        for block in 0..blocks {
            reader.prefetch(block);
            let running = reader.load(block)?.into_runnable(b)?;
            let next = (block + 1 < blocks).then_some(block + 1);
            reader.beside(next, || {
                for index in 0..hidden.batches() {
                    let lens = hidden.lens(index).clone();
                    let residual = hidden.take(index)?.residual.onload(b)?;
                    let observe = |_, _: &B::Matrix| Ok(());
                    let residual =
                        running.forward::<PipelineError>(b, &geometry, residual, &lens, observe)?;
                    hidden.carry(b, &[index + 1])?;
                    let residual = Parked::Device(residual);
                    hidden.put(b, index, Kept { residual, input: None })?;
                    self.progress.advance(1);
                }
                Ok(())
            })?;
            source.release(block);
        }
        let nll = self.negative_log_likelihood(b, hidden)?;
        self.progress.finish();
        let predicted_tokens = self.windows.len() * window.saturating_sub(1);
        let perplexity = Perplexity {
            perplexity: (nll / predicted_tokens as f64).exp(),
            windows: self.windows.len(),
            window,
            text_tokens: self.text_tokens,
            predicted_tokens,
            bos: false,
        };
        Ok((perplexity, b.describe()))
    }
}

impl PerplexityJob<'_> {
    /// Sum over all windows of the negative log-likelihood of tokens 2..n.
    fn negative_log_likelihood<B: Backend>(
        &self,
        b: &B,
        mut hidden: HiddenStates<B>,
    ) -> Result<f64> {
        let (source, width) = (self.source, self.source.config().exit_width());
        let head = LmHead::load(b, source)?;
        let mut sum = 0.0;
        for (index, ids) in self.windows.iter().enumerate() {
            let HostMatrix { data, .. } = hidden.take(index)?.residual.offload(b)?;
            let HostData::F32(values) = data else { continue };
            // The last token predicts nothing.
            let predicting = values.chunks(width).len().min(ids.len()) - 1;
            for start in (0..predicting).step_by(LOGIT_ROWS) {
                let rows = start..(start + LOGIT_ROWS).min(predicting);
                let slice = &values[rows.start * width..rows.end * width];
                let x = b.upload(slice, rows.len(), width)?;
                let logits = head.logits(b, &x)?;
                let nll = b.token_nll(&logits, &ids[rows.start + 1..=rows.end])?;
                sum += nll.iter().sum::<f64>();
            }
            self.progress.advance(1);
        }
        Ok(sum)
    }
}
