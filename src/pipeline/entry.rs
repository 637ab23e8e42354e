//! The activations that enter the first block: where they are kept, and the embeddings they start as.

use std::path::Path;

use super::{budget::MemoryBudget, error::Result};
use crate::{
    backend::{Backend, HostData, HostMatrix, SequenceLens},
    calibration::{CalibrationSet, HiddenStates, Kept, Parked},
    model::{ModelConfig, ModelSource, embed},
};

/// Tokens of a window.
pub(super) fn window_of(set: &CalibrationSet) -> usize {
    set.ids.first().map_or(0, Vec::len)
}

/// Sequences stacked into batches of about [`BATCH_TOKENS`](super::budget::BATCH_TOKENS) tokens.
pub(super) fn batch_lens(set: &CalibrationSet) -> Vec<SequenceLens> {
    let per_batch = (super::budget::BATCH_TOKENS / window_of(set).max(1)).max(1);
    set.ids
        .chunks(per_batch)
        .map(|windows| SequenceLens::new(windows.iter().map(Vec::len).collect()))
        .collect()
}

/// Room for the activations of every window: in memory, that of the device as far as it goes beside what
/// else the device needs, or in a temporary file in `directory` where the planned peak is above `limit`
/// bytes.
///
/// # Errors
/// A file that cannot be made; device failure.
pub(super) fn store<B: Backend>(
    b: &B,
    set: &CalibrationSet,
    config: &ModelConfig,
    budget: &MemoryBudget,
    limit: Option<u64>,
    directory: &Path,
) -> Result<HiddenStates<B>> {
    let lens = batch_lens(set);
    if limit.is_none_or(|limit| budget.peak_bytes <= limit) {
        let free = b.free_memory()?;
        let room = free.map(|free| free.saturating_sub(budget.device_bytes));
        return Ok(HiddenStates::in_memory(lens, room));
    }
    tracing::info!(
        bytes = budget.hidden_bytes,
        "activations do not fit the memory budget and go to a temporary file"
    );
    let widest = super::budget::widest_kept_input(config) as usize;
    let hidden = config.hidden_size.max(config.exit_width());
    Ok(HiddenStates::spilled(lens, directory, hidden, widest)?)
}

/// Embeds every window.
///
/// # Errors
/// Ids or embeddings that cannot be read; device failure; the store of activations.
pub(super) fn embed_windows<B: Backend>(
    b: &B,
    source: &ModelSource,
    set: &CalibrationSet,
    hidden: &mut HiddenStates<B>,
) -> Result<()> {
    let mut windows = set.ids.iter();
    for batch in 0..hidden.batches() {
        let count = hidden.lens(batch).ranges().count();
        let mut values = Vec::new();
        for window in windows.by_ref().take(count) {
            values.extend(embed(source, window)?);
        }
        let (rows, cols) = (hidden.lens(batch).tokens(), source.config().hidden_size);
        let residual = HostMatrix { rows, cols, data: HostData::F32(values) };
        let residual = Parked::Device(b.onload(residual)?);
        hidden.put(b, batch, Kept { residual, input: None })?;
    }
    Ok(())
}
