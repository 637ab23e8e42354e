//! The conversion: one loop over blocks (load, solve, pack, record), resumable after a crash.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use sparsepack_formats::{Digest, FormatError};

use super::{
    copy::{copy_stored, is_stored_so},
    entry,
    error::Result,
    journal::{Finished, Journal, RunIdentity},
    loader::{BlockReader, LoadedBlock, LoadedWeight},
    manifest::CalibrationRecord,
    packer::Packer,
    plan::{BlockPlan, ConversionPlan, OutputTensor, TablePlan},
    progress::{BlockReport, Phase, PhaseTimes, Progress, resident_bytes},
    stages::StageContext,
    stored::{Stored, held_bytes, pack_rounded, store_matrix, zeros_left},
    workers::Workers,
};
use crate::{
    backend::{Backend, BackendJob},
    calibration::{CalibrationSet, HiddenStates, StatKind, Statistic},
    compress::{Layer, LayerReport, SolveTimes, solver},
    model::{BlockGeometry, CapturePoint, ModelSource},
    recipe::OutputFormat,
};

/// Work from which on a run spends a third of a second to measure what its rates are compared with.
const CEILING_WORTH_FLOPS: f64 = 1e12;

/// How a conversion runs; nothing here changes a byte of the output.
#[derive(Debug, Clone, Copy)]
pub struct RunOptions {
    /// Continue an interrupted run.
    pub resume: bool,
    /// Least time between checkpoints.
    pub checkpoint_interval: Duration,
    /// Keep activations in a temporary file when they would need more memory than this.
    pub memory_bytes: Option<u64>,
}

/// A conversion ready to run.
pub(super) struct Conversion<'a> {
    /// The model.
    pub source: &'a ModelSource,
    /// What to do.
    pub plan: &'a ConversionPlan,
    /// What solvers learn from; `None` for methods that look at weights only.
    pub calibration: Option<&'a CalibrationSet>,
    /// Output directory; exists.
    pub out: &'a Path,
    /// How to run.
    pub options: RunOptions,
    /// What compresses.
    pub workers: Workers,
    /// Told as the work goes on.
    pub progress: &'a dyn Progress,
}

/// What a finished run hands on for its manifest.
#[derive(Debug)]
pub(super) struct Outcome {
    /// Tensors with the digests of their components.
    pub digests: Vec<(String, Vec<Digest>)>,
    /// Reports of the solved layers.
    pub reports: Vec<LayerReport>,
    /// Where the time went.
    pub times: PhaseTimes,
    /// Device and arithmetic.
    pub device: String,
    /// Measured throughput of large products, FLOP/s.
    pub gemm_ceiling: Option<f64>,
    /// What was calibrated with.
    pub calibration: Option<CalibrationRecord>,
    /// The work directory's journal, to be removed once the manifest is in place.
    pub journal: Journal,
}

impl BackendJob for Conversion<'_> {
    type Output = Result<Outcome>;

    fn run<B: Backend>(self, b: &B) -> Result<Outcome> {
        let (mut run, first_block) = Run::start(b, &self)?;
        let mut reader = BlockReader::new(b, self.source)?;
        for block in &self.plan.blocks[first_block..] {
            let began = Instant::now();
            reader.prefetch(block.index);
            let reports = if self.plan.copies_block(block.index) {
                run.copy_block(block.index, |_| true)?;
                Vec::new()
            } else {
                let mut loaded = run.times.time(Phase::Load, || reader.load(block.index))?;
                let next = self.plan.loads_block(block.index + 1).then_some(block.index + 1);
                let reports = reader.beside(next, || run.solve(block, &mut loaded))?;
                run.copy_block(block.index, |output| output.linear.is_none())?;
                reports
            };
            self.source.release(block.index);
            run.record(block, &reports, began)?;
        }
        run.finish()
    }
}

/// State of a running conversion.
struct Run<'a, B: Backend> {
    b: &'a B,
    job: &'a Conversion<'a>,
    geometry: BlockGeometry,
    hidden: Option<HiddenStates<B>>,
    packer: Packer,
    journal: Journal,
    digests: Vec<(String, Vec<Digest>)>,
    /// Tensors written since the last checkpoint.
    unrecorded: Vec<String>,
    reports: Vec<LayerReport>,
    times: PhaseTimes,
    gemm_ceiling: Option<f64>,
}

impl<'a, B: Backend> Run<'a, B> {
    /// Opens journal and writer, brings back what an interrupted run had, or starts afresh.
    fn start(b: &'a B, job: &'a Conversion<'a>) -> Result<(Self, usize)> {
        let plan = job.plan;
        let positions = job.calibration.map_or(0, entry::window_of);
        let geometry = BlockGeometry::new(b, job.source.arch(), job.source.config(), positions)?;
        let source = super::output::probe_source(job.source)?;
        let tokens = job.calibration.map(|set| set.digest);
        let identity = RunIdentity::new(plan, source, tokens, &b.describe())
            .map_err(|source| FormatError::Json { path: job.out.into(), source })?;
        let interval = job.options.checkpoint_interval;
        let open_writer = |resume| super::output::open_writer(plan, job.out, job.workers, resume);
        let (journal, finished, writer) = if job.options.resume {
            let (journal, finished) = Journal::resume(job.out, &identity, interval)?;
            let writer = if finished.tensors.is_empty() {
                super::output::remove_parts(job.out);
                open_writer(false)?
            } else {
                let mut writer = open_writer(true)?;
                for (name, digests) in &finished.tensors {
                    writer.adopt(name, digests)?;
                }
                writer
            };
            (journal, finished, writer)
        } else {
            let journal = Journal::create(job.out, &identity, interval)?;
            (journal, Finished::default(), open_writer(false)?)
        };
        // Where results have to come from a device, a block's may wait; else there is nothing to wait for.
        let behind = b.free_memory()?.map_or(0, |_| plan.budget.behind_bytes);
        let mut run = Self {
            b,
            job,
            geometry,
            hidden: None,
            packer: Packer::start(writer, behind),
            journal,
            digests: finished.tensors.clone(),
            unrecorded: Vec::new(),
            reports: finished.reports.clone(),
            times: PhaseTimes::default(),
            gemm_ceiling: None,
        };
        let units = run.units();
        job.progress.start(units);
        if plan.flops > CEILING_WORTH_FLOPS {
            run.gemm_ceiling = Some(b.measure_gemm_ceiling()?);
        }
        if finished.blocks_done == 0 && finished.tensors.is_empty() {
            run.write_before_blocks()?;
        }
        run.enter_first_block(&finished)?;
        Ok((run, finished.blocks_done))
    }

    /// Units of progress: one a block, and one a batch for each pass.
    fn units(&self) -> u64 {
        let plan = self.job.plan;
        let batches = self.job.calibration.map_or(0, |set| entry::batch_lens(set).len() as u64);
        let calibrated = plan.last_calibrated_block().map_or(0, |last| last as u64 + 1);
        // The four capture points and the end of the block; the block order makes two passes.
        let passes = match plan.sequential {
            crate::recipe::Sequential::True => CapturePoint::ALL.len() as u64 + 1,
            crate::recipe::Sequential::Block => 2,
        };
        plan.blocks.len() as u64 + calibrated * passes * batches
    }

    /// The activations that enter the first block still to do.
    fn enter_first_block(&mut self, finished: &Finished) -> Result<()> {
        let (job, b) = (self.job, self.b);
        let Some(set) = job.calibration else { return Ok(()) };
        if job.plan.last_calibrated_block().is_none_or(|last| finished.blocks_done > last) {
            return Ok(());
        }
        let config = job.source.config();
        let limit = job.options.memory_bytes;
        let mut hidden = entry::store(b, set, config, &job.plan.budget, limit, self.journal.dir())?;
        if finished.blocks_done > 0 {
            self.journal.load_hidden(b, finished, &mut hidden, config.hidden_size)?;
        } else {
            let start = Instant::now();
            entry::embed_windows(b, job.source, set, &mut hidden)?;
            self.times.charge(Phase::Load, start.elapsed().as_secs_f64(), 0.0);
        }
        self.hidden = Some(hidden);
        Ok(())
    }

    /// Solves the block's layers and writes its linears as they are finished.
    fn solve(&mut self, plan: &BlockPlan, loaded: &mut LoadedBlock<B>) -> Result<Vec<LayerReport>> {
        let job = self.job;
        let stages = StageContext {
            backend: self.b,
            arch: job.source.arch(),
            config: job.source.config(),
            geometry: &self.geometry,
            options: job.plan.solver_options(),
            sequential: job.plan.sequential,
            progress: job.progress,
        };
        let b = self.b;
        let (packer, unrecorded) = (&mut self.packer, &mut self.unrecorded);
        let mut stored = Vec::new();
        let mut finish = |loaded: &mut LoadedBlock<B>, point, times: &mut PhaseTimes| {
            for linear in loaded.linears.iter_mut().filter(|linear| linear.capture == point) {
                let output = job.plan.output(&linear.tensor)?;
                let name = output.stored_name();
                unrecorded.push(name.to_owned());
                let tensor = job.source.tensor(&linear.tensor)?;
                let solved = job.plan.layer(&output.name);
                if is_stored_so(tensor, output) && solved.is_none() {
                    times.time(Phase::Write, || {
                        copy_stored(job.source, tensor, |part, bytes| {
                            packer.write(name, part, bytes)
                        })
                    })?;
                    continue;
                }
                let mut weight = linear.take(b)?;
                let packing = times.time(Phase::Encode, || match linear.rounding.take() {
                    Some(rounding) => Ok(pack_rounded(output, rounding)),
                    None => store_matrix(b, output, &mut weight),
                })?;
                if let Some(layer) = solved {
                    stored.push(Stored::of(b, layer, output, &weight)?);
                }
                linear.weight = LoadedWeight::Solved(weight);
                times.time(Phase::Write, || packer.pack(name, held_bytes(output), packing))?;
            }
            Ok(())
        };
        let calibrated = job.plan.last_calibrated_block().is_some_and(|last| plan.index <= last);
        let mut reports = if let Some(hidden) = self.hidden.as_mut().filter(|_| calibrated) {
            stages.solve_block(plan, loaded, hidden, &mut self.times, finish)?
        } else {
            let reports = stages.solve_data_free(plan, loaded, &mut self.times)?;
            for point in CapturePoint::ALL {
                finish(loaded, point, &mut self.times)?;
            }
            reports
        };
        for stored in stored {
            if let Some(report) = reports.iter_mut().find(|report| report.layer == stored.layer) {
                report.stored_zeros = stored.zeros;
                report.bits_per_weight = stored.bits_per_weight;
            }
        }
        Ok(reports)
    }

    /// Writes what stands before the first block.
    fn write_before_blocks(&mut self) -> Result<()> {
        let first = self.job.plan.outputs.iter().take_while(|output| output.block.is_none());
        first.into_iter().try_for_each(|output| self.copy(output))
    }

    /// Copies the tensors of a block that `which` names.
    fn copy_block(&mut self, block: usize, which: fn(&OutputTensor) -> bool) -> Result<()> {
        let outputs = self.job.plan.outputs.iter();
        outputs
            .filter(|output| output.block == Some(block) && which(output))
            .try_for_each(|output| self.copy(output))
    }

    /// Writes what stands after the last block.
    fn write_after_blocks(&mut self) -> Result<()> {
        let outputs = self.job.plan.outputs.iter();
        outputs
            .skip_while(|output| output.block.is_none())
            .filter(|output| output.block.is_none())
            .try_for_each(|output| self.copy(output))
    }

    /// Prunes a matrix outside the blocks and writes it.
    fn prune_table(&mut self, output: &OutputTensor, plan: &TablePlan) -> Result<()> {
        let (b, source) = (self.b, self.job.source);
        let values = source.read_f32(&output.name)?;
        source.check_finite(&output.name, &values)?;
        let layer = Layer {
            name: plan.module.clone(),
            weight: b.upload(&values, plan.rows, plan.cols)?,
            sparsity: Some(plan.prune.sparsity),
            grid: None,
            keep_zeros: false,
        };
        drop(values);
        let mut nothing = Statistic::new(b, StatKind::None, plan.cols)?;
        let mut spent = SolveTimes::default();
        let solver = solver::<B>(Some(plan.prune.method), None, self.job.plan.solver_options());
        for mut solved in solver.solve(b, vec![layer], &mut nothing, &mut spent)? {
            let packing = store_matrix(b, output, &mut solved.weight)?;
            solved.report.stored_zeros = zeros_left(b, output, &solved.weight)?;
            self.packer.pack(output.stored_name(), held_bytes(output), packing)?;
            self.journal.note(std::slice::from_ref(&solved.report));
            self.reports.push(solved.report);
        }
        self.times.charge(Phase::Sweep, spent.sweep_secs, 0.0);
        self.unrecorded.push(output.stored_name().to_owned());
        Ok(())
    }

    /// Writes a tensor that the block loop does not: pruned where planned, else copied through in
    /// its output type, some rows at a time.
    fn copy(&mut self, output: &OutputTensor) -> Result<()> {
        if let Some(plan) = self.job.plan.table(&output.name) {
            return self.prune_table(output, plan);
        }
        let start = Instant::now();
        let (source, packer) = (self.job.source, &mut self.packer);
        let write = |component, bytes| packer.write(output.stored_name(), component, bytes);
        if self.job.plan.archive {
            super::copy::copy_components(source.reader(), output, write)?;
        } else {
            super::copy::copy_tensor(source, output, write)?;
        }
        self.times.charge(Phase::Encode, start.elapsed().as_secs_f64(), 0.0);
        self.unrecorded.push(output.stored_name().to_owned());
        Ok(())
    }

    /// Reports a finished block and makes a checkpoint when one is due.
    fn record(&mut self, plan: &BlockPlan, reports: &[LayerReport], began: Instant) -> Result<()> {
        let report = self.block_report(plan, reports, began);
        self.job.progress.block(&report);
        self.job.progress.advance(1);
        self.reports.extend_from_slice(reports);
        self.journal.note(reports);
        if self.journal.due() {
            self.checkpoint(plan.index + 1)?;
        }
        Ok(())
    }

    fn checkpoint(&mut self, blocks_done: usize) -> Result<()> {
        let names = std::mem::take(&mut self.unrecorded);
        let packer = &mut self.packer;
        let digests = self.times.time(Phase::Write, || packer.sync(names.clone()))?;
        let finished: Vec<_> = names.into_iter().zip(digests).collect();
        self.digests.extend(finished.iter().cloned());
        self.journal.commit(self.b, blocks_done, finished, self.hidden.as_mut())
    }

    fn block_report(
        &self,
        plan: &BlockPlan,
        reports: &[LayerReport],
        began: Instant,
    ) -> BlockReport {
        let outputs = self.job.plan.outputs.iter();
        let linears =
            || outputs.clone().filter(|it| it.block == Some(plan.index) && it.linear.is_some());
        let bytes: u64 = linears().map(|output| output.bytes).sum();
        let weights: usize = linears().map(|output| output.shape.iter().product::<usize>()).sum();
        let weights = weights as f64;
        let zeroed: u64 = reports.iter().map(|report| report.zeroed).sum();
        let errors: Vec<f64> = reports.iter().filter_map(|report| report.relative_error).collect();
        BlockReport {
            block: plan.index,
            sparsity: zeroed as f64 / weights,
            relative_error: (!errors.is_empty())
                .then(|| errors.iter().sum::<f64>() / errors.len() as f64),
            damp: reports.iter().filter_map(|report| report.damp).reduce(f64::max),
            bits_per_weight: (self.job.plan.format != OutputFormat::Zst)
                .then(|| bytes as f64 * 8.0 / weights),
            secs: began.elapsed().as_secs_f64(),
            rss_bytes: resident_bytes().map(|(now, _)| now),
        }
    }

    fn finish(mut self) -> Result<Outcome> {
        self.write_after_blocks()?;
        let names = std::mem::take(&mut self.unrecorded);
        let packer = &mut self.packer;
        let digests = self.times.time(Phase::Write, || packer.sync(names.clone()))?;
        self.digests.extend(names.into_iter().zip(digests));
        let packer = self.packer;
        self.times.time(Phase::Write, || packer.finish())?;
        self.job.progress.finish();
        let calibration = self.job.calibration.map(|set| CalibrationRecord {
            tokens_sha256: set.digest,
            windows: set.ids.len(),
            tokens: set.ids.iter().map(Vec::len).sum(),
        });
        Ok(Outcome {
            digests: self.digests,
            reports: self.reports,
            times: self.times,
            device: self.b.describe(),
            gemm_ceiling: self.gemm_ceiling,
            calibration,
            journal: self.journal,
        })
    }
}
