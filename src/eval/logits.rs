//! From the residual stream to logits.

use crate::{
    backend::{Backend, SequenceLens},
    model::{BlockGeometry, ModelSource, Norm, embed},
    pipeline::{LoadedBlock, PipelineError, Result, load_norm},
};

/// Rows of the output matrix laid out at a time.
const HEAD_ROWS: usize = 1 << 16;

/// The end of the forward pass: final norm and output matrix.
#[derive(Debug)]
pub struct LmHead<B: Backend> {
    norm: Norm<B>,
    weight: B::Weight,
    bias: Option<B::Matrix>,
}

impl<B: Backend> LmHead<B> {
    /// Reads both, the output matrix piece by piece.
    ///
    /// # Errors
    /// A tensor that cannot be read; device failure.
    pub fn load(b: &B, source: &ModelSource) -> Result<Self> {
        let eps = source.config().exit_norm_eps();
        let norm = load_norm(b, source, &source.final_norm(), eps)?;
        let name = source.lm_head();
        let [rows, cols] = [source.config().vocab_size, source.config().exit_width()];
        let mut pieces = Vec::new();
        for start in (0..rows).step_by(HEAD_ROWS) {
            let range = start..(start + HEAD_ROWS).min(rows);
            let values = source.read_rows_f32(&name, range.clone())?;
            pieces.push(b.upload(&values, range.len(), cols)?);
        }
        let bias = match source.lm_head_bias() {
            Some(name) => Some(b.upload(&source.read_f32(&name)?, 1, rows)?),
            None => None,
        };
        Ok(Self { norm, weight: b.prepare(&pieces.iter().collect::<Vec<_>>())?, bias })
    }

    /// Logits of each token: `[tokens, hidden] → [tokens, vocabulary]`, f32.
    ///
    /// # Errors
    /// Device failure.
    pub fn logits(&self, b: &B, residual: &B::Matrix) -> Result<B::Matrix> {
        Ok(b.linear(&self.norm.apply(b, residual)?, &self.weight, self.bias.as_ref())?)
    }
}

/// Logits of one sequence, `[ids.len(), vocabulary]` row-major, with one block in memory at a
/// time.
///
/// # Errors
/// Tokens outside the vocabulary or more of them than the model has positions; heads that the device does not
/// take; a tensor that cannot be read; device failure.
pub fn logits<B: Backend>(b: &B, source: &ModelSource, ids: &[u32]) -> Result<Vec<f32>> {
    let config = source.config();
    config.check_sequence(ids.len())?;
    let geometry = BlockGeometry::new(b, source.arch(), config, ids.len())?;
    let lens = SequenceLens::new(vec![ids.len()]);
    let mut residual = b.upload(&embed(source, ids)?, ids.len(), config.hidden_size)?;
    for index in 0..config.num_hidden_layers {
        let block = LoadedBlock::load(b, source, index)?.into_runnable(b)?;
        let ignore = |_, _: &B::Matrix| Ok(());
        residual = block.forward::<PipelineError>(b, &geometry, residual, &lens, ignore)?;
    }
    Ok(b.download(&LmHead::load(b, source)?.logits(b, &residual)?)?)
}
