//! The residual stream of the calibration text, block by block, and what passes by.

use std::time::Instant;

use super::super::{
    budget::{forward_flops, gram_flops},
    entry,
    error::{PipelineError, Result},
    journal::WORK_DIR,
    loader::LoadedBlock,
    progress::{Phase, PhaseTimes},
};
use super::SliceJob;
use crate::{
    backend::{Backend, HostData, HostMatrix, SequenceLens},
    calibration::{CalibrationSet, HiddenStates, Kept, Parked},
    compress::slicegpt::Covariance,
    model::{BlockGeometry, CapturePoint, ModelConfig},
};

/// Which rows of each batch count: padding and special tokens do not.
pub(super) struct Counted(Vec<Option<Vec<usize>>>);

impl Counted {
    /// Leaves out the tokens that start or end a text.
    pub(super) fn new(set: &CalibrationSet, config: &ModelConfig) -> Self {
        let special =
            |id: &u32| config.bos_token_id == Some(*id) || config.eos_token_ids.contains(id);
        let mut ids = set.ids.iter().flatten();
        let of_batch = |lens: &SequenceLens| {
            let ids: Vec<&u32> = ids.by_ref().take(lens.tokens()).collect();
            let counted = || (0..ids.len()).filter(|&row| !special(ids[row]));
            (counted().count() < ids.len()).then(|| counted().collect())
        };
        Self(entry::batch_lens(set).iter().map(of_batch).collect())
    }

    /// The rows of `x` that count in batch `batch`.
    pub(super) fn rows<B: Backend>(&self, b: &B, batch: usize, x: B::Matrix) -> Result<B::Matrix> {
        let Some(rows) = &self.0[batch] else { return Ok(x) };
        let HostMatrix { cols, data, .. } = b.offload(x)?;
        let data = match data {
            HostData::F32(values) => HostData::F32(picked(&values, rows, cols)),
            HostData::Bf16(values) => HostData::Bf16(picked(&values, rows, cols)),
        };
        Ok(b.onload(HostMatrix { rows: rows.len(), cols, data })?)
    }

    /// The rows of both that count.
    pub(super) fn both<B: Backend>(
        &self,
        b: &B,
        batch: usize,
        y: B::Matrix,
        x: B::Matrix,
    ) -> Result<(B::Matrix, B::Matrix)> {
        Ok((self.rows(b, batch, y)?, self.rows(b, batch, x)?))
    }
}

fn picked<T: Copy>(values: &[T], rows: &[usize], cols: usize) -> Vec<T> {
    rows.iter().flat_map(|row| &values[row * cols..][..cols]).copied().collect()
}

/// The stream of every calibration window on its way through the model.
pub(super) struct Stream<'a, B: Backend> {
    b: &'a B,
    job: &'a SliceJob<'a>,
    pub(super) geometry: BlockGeometry,
    pub(super) hidden: HiddenStates<B>,
    pub(super) counted: Counted,
    /// Where the stream stands, for errors.
    block: usize,
}

impl<'a, B: Backend> Stream<'a, B> {
    /// The embeddings of every window.
    ///
    /// # Errors
    /// Heads that the device does not take; embeddings that cannot be read; the store of activations; device
    /// failure.
    pub(super) fn enter(b: &'a B, job: &'a SliceJob<'a>, times: &mut PhaseTimes) -> Result<Self> {
        let (source, set) = (job.source, job.set);
        let (config, limit) = (source.config(), job.options.memory_bytes);
        let geometry = BlockGeometry::new(b, source.arch(), config, entry::window_of(set))?;
        let directory = job.out.join(WORK_DIR);
        let mut hidden = entry::store(b, set, config, &job.slicing.budget, limit, &directory)?;
        times.time(Phase::Load, || entry::embed_windows(b, source, set, &mut hidden))?;
        Ok(Self { b, job, geometry, hidden, counted: Counted::new(set, config), block: 0 })
    }

    /// Room for another stream of `width` columns beside this one.
    ///
    /// # Errors
    /// A file that cannot be made.
    pub(super) fn room_beside(&self, width: usize) -> Result<HiddenStates<B>> {
        let job = self.job;
        let config = ModelConfig { hidden_size: width, ..job.source.config().clone() };
        let limit = job.options.memory_bytes;
        entry::store(self.b, job.set, &config, &job.slicing.budget, limit, &job.out.join(WORK_DIR))
    }

    /// Adds the rows that count, each divided by its root mean square, to `sum`.
    ///
    /// # Errors
    /// The store of activations; device failure.
    pub(super) fn observe_normalised(
        &mut self,
        sum: &mut Covariance,
        times: &mut PhaseTimes,
    ) -> Result<()> {
        let (b, config) = (self.b, self.job.source.config());
        let ones = b.upload(&vec![1.0; config.hidden_size], 1, config.hidden_size)?;
        self.observe(sum, times, |x| Ok(b.rms_norm(&x, &ones, config.norm_eps)?))
    }

    /// Adds the rows that count, as they are, to `sum`.
    ///
    /// # Errors
    /// The store of activations; device failure.
    pub(super) fn observe_raw(
        &mut self,
        sum: &mut Covariance,
        times: &mut PhaseTimes,
    ) -> Result<()> {
        self.observe(sum, times, Ok)
    }

    /// Multiplies the stream of every batch with a weight `[d, d]`.
    ///
    /// # Errors
    /// The store of activations; device failure.
    pub(super) fn turn(&mut self, weight: &B::Weight, times: &mut PhaseTimes) -> Result<()> {
        let (b, hidden) = (self.b, self.job.source.config().hidden_size as f64);
        for batch in 0..self.hidden.batches() {
            let start = Instant::now();
            let residual = self.hidden.take(batch)?.residual.onload(b)?;
            let residual = b.linear(&residual, weight, None)?;
            let flops = 2.0 * b.shape(&residual).0 as f64 * hidden * hidden;
            let residual = Parked::Device(residual);
            self.hidden.put(b, batch, Kept { residual, input: None })?;
            times.charge(Phase::Forward, start.elapsed().as_secs_f64(), flops);
        }
        Ok(())
    }

    /// Adds what `of` makes of the rows that count to `sum`.
    fn observe(
        &mut self,
        sum: &mut Covariance,
        times: &mut PhaseTimes,
        of: impl Fn(B::Matrix) -> Result<B::Matrix>,
    ) -> Result<()> {
        let b = self.b;
        for batch in 0..self.hidden.batches() {
            let start = Instant::now();
            let kept = self.hidden.take(batch)?;
            let x = kept.residual.copy(b)?;
            self.hidden.put(b, batch, kept)?;
            let x = of(self.counted.rows(b, batch, x)?)?;
            let (tokens, features) = b.shape(&x);
            if b.count_non_finite_rows(&x)? > 0 {
                return Err(PipelineError::NonFiniteActivations {
                    block: self.block,
                    bad: tokens,
                    all: tokens,
                });
            }
            sum.add(b, &x)?;
            let flops = gram_flops(tokens as f64, features as f64);
            times.charge(Phase::Statistics, start.elapsed().as_secs_f64(), flops);
        }
        Ok(())
    }

    /// Brings every batch across one of [`CapturePoint::HALVES`].
    ///
    /// # Errors
    /// The store of activations; device failure.
    pub(super) fn advance(
        &mut self,
        loaded: &LoadedBlock<B>,
        half: [CapturePoint; 2],
        times: &mut PhaseTimes,
    ) -> Result<()> {
        let (b, geometry) = (self.b, &self.geometry);
        let [reads, writes] = half;
        let batches: Vec<usize> = (0..self.hidden.batches()).collect();
        let mut groups = batches.chunks(b.lanes()).peekable();
        while let Some(group) = groups.next() {
            let taken = group
                .iter()
                .map(|&batch| Ok((self.hidden.lens(batch).clone(), self.hidden.take(batch)?)))
                .collect::<Result<Vec<_>>>()?;
            let start = Instant::now();
            let arrived = b.at_once(taken, |(lens, at)| -> Result<B::Matrix> {
                let residual = at.residual.onload(b)?;
                Ok(loaded.block.half(b, geometry, half, residual, &lens)?)
            });
            self.hidden.carry(b, groups.peek().unwrap_or(&&[][..]))?;
            let (arch, config) = (self.job.source.arch(), self.job.source.config());
            let lens = group.iter().map(|&batch| self.hidden.lens(batch));
            let end = writes as usize + 1;
            let flops = lens.map(|lens| forward_flops(arch, config, reads, end, lens)).sum();
            times.charge(Phase::Forward, start.elapsed().as_secs_f64(), flops);
            for (&batch, residual) in group.iter().zip(arrived) {
                let residual = Parked::Device(residual?);
                self.hidden.put(b, batch, Kept { residual, input: None })?;
                self.job.progress.advance(1);
            }
        }
        self.block += usize::from(writes == CapturePoint::MlpHidden);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        backend::{Precision, Storage, cpu::Cpu},
        calibration::Sampling,
        model::ModelSource,
    };

    #[test]
    fn special_tokens_do_not_count() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        let source = ModelSource::open(&root.join("fixtures/tiny/llama-gqa")).unwrap();
        let (bos, eos) = (source.config().bos_token_id.unwrap(), source.config().eos_token_ids[0]);
        let ids = [bos, 7, 8, 9, 10, 11, 12, eos];
        let sampling = Sampling { samples: 1, seq_len: 8, seed: None };
        let set = CalibrationSet::from_ids(root, &ids, sampling).unwrap();
        let counted = Counted::new(&set, source.config());
        let b = Cpu::new(Precision::F32, Some(1)).unwrap();
        let rows = |values: &[f32]| {
            let x = b.upload(values, 8, 1).unwrap();
            b.download(&counted.rows(&b, 0, x).unwrap()).unwrap()
        };
        assert_eq!(rows(&[0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    }
}
