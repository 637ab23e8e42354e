//! Writes a model that is sliced in one basis with its weights fitted by least squares, point by
//! point: the dense model, the teacher, runs beside the sliced one, the student, whose weights are
//! final up to the point where it stands.

use std::{sync::Arc, time::Instant};

use super::super::{
    budget::{forward_flops, gram_flops},
    error::{PipelineError, Result},
    loader::{LoadedBlock, LoadedLinear, LoadedWeight},
    progress::{Phase, PhaseTimes},
};
use super::{
    SliceJob,
    stream::Stream,
    weights::{Bases, SlicedWriter},
};
use crate::{
    backend::{Backend, BackendError, Dense, HostData, HostMatrix, SequenceLens},
    calibration::{HiddenStates, Kept, Parked},
    compress::{
        SolveError,
        slicegpt::{self, Fit},
    },
    model::{Activations, Block, CapturePoint, Norm},
};

/// The student beside the teacher.
struct Pair<'a, B: Backend> {
    b: &'a B,
    job: &'a SliceJob<'a>,
    /// Kept directions, `[d, d']`.
    q: &'a Dense,
    /// Turns the teacher's stream into the student's basis.
    project: Arc<B::Weight>,
    teacher: Stream<'a, B>,
    /// The student's stream `[tokens, d']`, and its input where that waits to be written.
    student: HiddenStates<B>,
    /// Gains of the norms: all ones.
    ones: [B::Matrix; 2],
    /// Where both stand, for errors.
    block: usize,
}

/// One batch of both, where their streams are read or written.
struct Met<B: Backend> {
    /// Of the teacher, `[tokens, outputs]`.
    y: B::Matrix,
    /// Of the student, `[tokens, inputs]`.
    x: B::Matrix,
    teacher: Parked<B>,
    student: Kept<B>,
}

impl SliceJob<'_> {
    /// Writes the model in the basis `q` with fitted weights.
    pub(super) fn write_corrected<B: Backend>(
        &self,
        b: &B,
        q: &Dense,
        damp: f64,
        writer: &mut SlicedWriter<'_, B>,
        times: &mut PhaseTimes,
    ) -> Result<()> {
        let mut pair = Pair::enter(b, self, q, times)?;
        writer.write_before_blocks(q, times)?;
        for index in 0..self.source.config().num_hidden_layers {
            let mut dense = self.load(b, index, times)?;
            let mut sliced = pair.block(&dense, index, writer)?;
            for [reads, writes] in CapturePoint::HALVES {
                let fit = pair.read(times)?;
                let start = Instant::now();
                let first = dense.at(reads).next().map(|linear| linear.tensor.clone());
                let t = solve(b, &fit, q, damp, &first.unwrap_or_default())?;
                let gain = writer.gain_before(reads, index)?;
                for (linear, from) in sliced.at(reads).zip(dense.at(reads)) {
                    let weight = Dense::new(from.rows, from.cols, &b.download(&from.matrix(b)?)?)?;
                    let weight = slicegpt::reader(b, weight, &gain, &t)?;
                    let stored = writer.put(&linear.tensor, &weight)?;
                    let stored = b.upload(&stored, linear.rows, linear.cols)?;
                    linear.weight = LoadedWeight::Solved(stored);
                }
                sliced.install(b, reads)?;
                times.charge(Phase::Slice, start.elapsed().as_secs_f64(), 0.0);

                let fit = pair.write(&dense, &sliced.block, [reads, writes], times)?;
                let start = Instant::now();
                for (linear, from) in sliced.at(writes).zip(dense.at(writes)) {
                    let weight = Dense::new(from.rows, from.cols, &b.download(&from.matrix(b)?)?)?;
                    let plain = slicegpt::writer(b, &weight, q)?;
                    let weight = solve(b, &fit, &plain, damp, &linear.tensor)?;
                    let stored = writer.put(&linear.tensor, &weight)?;
                    let stored = b.upload(&stored, linear.rows, linear.cols)?;
                    linear.weight = LoadedWeight::Solved(stored);
                }
                sliced.install(b, writes)?;
                times.charge(Phase::Slice, start.elapsed().as_secs_f64(), 0.0);
                pair.apply(&sliced.block, writes, times)?;
            }
            writer.write_beside_linears(index, Bases::shared(q), times)?;
            self.source.release(index);
            pair.block = index + 1;
        }
        let fit = pair.read(times)?;
        let t = solve(b, &fit, q, damp, &self.source.lm_head())?;
        writer.write_after_blocks(Some(&t), times)
    }
}

impl<'a, B: Backend> Pair<'a, B> {
    /// Both at the embeddings.
    fn enter(
        b: &'a B,
        job: &'a SliceJob<'a>,
        q: &'a Dense,
        times: &mut PhaseTimes,
    ) -> Result<Self> {
        let mut teacher = Stream::enter(b, job, times)?;
        let turned = q.transposed();
        let project = b.prepare(&[&b.upload(&turned.to_f32(), turned.rows, turned.cols)?])?;
        let mut student = teacher.room_beside(job.slicing.width)?;
        let start = Instant::now();
        for batch in 0..teacher.hidden.batches() {
            let kept = teacher.hidden.take(batch)?;
            let residual = b.linear(&kept.residual.copy(b)?, &project, None)?;
            teacher.hidden.put(b, batch, kept)?;
            let residual = Parked::Device(residual);
            student.put(b, batch, Kept { residual, input: None })?;
        }
        times.charge(Phase::Forward, start.elapsed().as_secs_f64(), 0.0);
        let ones = |width: usize| b.upload(&vec![1.0; width], 1, width);
        let ones = [ones(job.slicing.hidden_size)?, ones(job.slicing.width)?];
        Ok(Self { b, job, q, project: Arc::new(project), teacher, student, ones, block: 0 })
    }

    /// The student's block, its linears still to come.
    fn block(
        &self,
        dense: &LoadedBlock<B>,
        index: usize,
        writer: &SlicedWriter<'_, B>,
    ) -> Result<LoadedBlock<B>> {
        let config = &self.job.slicing.model.config;
        let norm = || -> Result<Norm<B>> {
            let gain = self.b.duplicate(&self.ones[1])?;
            Ok(Norm::Rms { gain, eps: config.norm_eps })
        };
        let linear = |from: &LoadedLinear<B>| -> Result<LoadedLinear<B>> {
            let [rows, cols] = config.linear_shape(from.role);
            let bias = match &from.bias {
                Some(_) => Some(writer.bias(index, from.role, Bases::shared(self.q))?.to_f32()),
                None => None,
            };
            let (tensor, capture) = (from.tensor.clone(), from.capture);
            Ok(LoadedLinear {
                role: from.role,
                capture,
                tensor,
                // Written when it is solved for.
                weight: LoadedWeight::Elsewhere,
                rounding: None,
                bias,
                rows,
                cols,
            })
        };
        let block = Block {
            attn_norm: norm()?,
            mlp_norm: norm()?,
            linears: [None, None, None, None],
            shortcuts: [None, None, None, None],
        };
        Ok(LoadedBlock { block, linears: dense.linears.iter().map(linear).collect::<Result<_>>()? })
    }

    /// What both read where they stand, each token divided by its root mean square: of the student
    /// the root of the mean over as many columns as the teacher has.
    fn read(&mut self, times: &mut PhaseTimes) -> Result<Fit> {
        let (b, eps) = (self.b, self.job.source.config().norm_eps);
        let sliced_eps = self.job.slicing.model.config.norm_eps;
        let narrowing = self.job.slicing.width as f32 / self.job.slicing.hidden_size as f32;
        let ones = [self.b.duplicate(&self.ones[0])?, self.b.duplicate(&self.ones[1])?];
        let [wide, narrow] = [&ones[0], &ones[1]];
        let (width, hidden) = (self.job.slicing.width, self.job.slicing.hidden_size);
        let meet = |teacher: Parked<B>, student: Kept<B>, _: &SequenceLens| {
            let y = b.rms_norm(&teacher.copy(b)?, wide, eps)?;
            let mut x = b.rms_norm(&student.residual.copy(b)?, narrow, sliced_eps)?;
            // Readers are multiplied with the inverse.
            let rows = b.shape(&x).0;
            b.scale_rows(&mut x, &vec![narrowing.sqrt().recip(); rows])?;
            Ok(Met { y, x, teacher, student })
        };
        self.pass(hidden, width, times, 0.0, meet)
    }

    /// What the student reads before `writes`, and what its stream lacks there. Each token counts as
    /// much as any other, however large its stream is.
    fn write(
        &mut self,
        dense: &LoadedBlock<B>,
        sliced: &Block<B>,
        [reads, writes]: [CapturePoint; 2],
        times: &mut PhaseTimes,
    ) -> Result<Fit> {
        let (b, job) = (self.b, self.job);
        let (arch, config) = (job.source.arch(), job.source.config());
        let inputs = config.capture_width(writes);
        let geometry = self.teacher.geometry.clone();
        let lacking = self.bias_of(dense, writes)?;
        let project = Arc::clone(&self.project);
        let meet = |teacher: Parked<B>, student: Kept<B>, lens: &SequenceLens| {
            let residual = teacher.onload(b)?;
            let residual = dense.block.half(b, &geometry, [reads, writes], residual, lens)?;
            let teacher = b.offload(residual)?;

            let residual = student.residual.onload(b)?;
            let input = sliced.input_from_residual(b, reads, &residual)?;
            let at = sliced.step(b, &geometry, reads, Activations { residual, input }, lens)?;
            let residual = b.offload(at.residual)?;

            let factors = inverse_rms(&teacher);
            let mut y = b.onload(negated(&residual))?;
            b.linear_add(&mut y, &b.onload(teacher.clone())?, &project, lacking.as_ref())?;
            b.scale_rows(&mut y, &factors)?;
            let Some(input) = at.input else {
                let detail = format!("no input at {writes:?}");
                return Err(BackendError::Shape { operation: "block step", detail }.into());
            };
            let input = b.offload(input)?;
            let mut x = b.onload(input.clone())?;
            b.scale_rows(&mut x, &factors)?;
            let (residual, input) = (Parked::Host(residual), Some(Parked::Host(input)));
            Ok(Met { y, x, teacher: Parked::Host(teacher), student: Kept { residual, input } })
        };
        let flops = |lens: &SequenceLens| {
            let end = writes as usize + 1;
            forward_flops(arch, config, reads, end, lens)
                + forward_flops(arch, &job.slicing.model.config, reads, writes as usize, lens)
        };
        let flops: f64 =
            (0..self.student.batches()).map(|batch| flops(self.student.lens(batch))).sum();
        self.pass(job.slicing.width, inputs, times, flops, meet)
    }

    /// The bias that the student's stream gets anyway, negative and turned.
    fn bias_of(&self, dense: &LoadedBlock<B>, point: CapturePoint) -> Result<Option<B::Matrix>> {
        let mut biases = dense.linears.iter().filter(|linear| linear.capture == point);
        let Some(bias) = biases.find_map(|linear| linear.bias.as_ref()) else { return Ok(None) };
        let bias = Dense::new(1, bias.len(), bias)?;
        let turned = self.b.dense_product(&bias, self.q)?.scaled(-1.0);
        Ok(Some(self.b.upload(&turned.to_f32(), 1, turned.cols)?))
    }

    /// Shows every batch of both to `meet` and sums what comes of it.
    fn pass(
        &mut self,
        outputs: usize,
        inputs: usize,
        times: &mut PhaseTimes,
        flops: f64,
        meet: impl Fn(Parked<B>, Kept<B>, &SequenceLens) -> Result<Met<B>> + Send + Sync,
    ) -> Result<Fit> {
        let b = self.b;
        let mut cross = b.zeros(outputs, inputs)?;
        let mut gram = b.zeros(inputs, inputs)?;
        let batches: Vec<usize> = (0..self.student.batches()).collect();
        for group in batches.chunks(b.lanes()) {
            let taken = group
                .iter()
                .map(|&batch| {
                    let lens = self.student.lens(batch).clone();
                    let teacher = self.teacher.hidden.take(batch)?.residual;
                    Ok((lens, teacher, self.student.take(batch)?))
                })
                .collect::<Result<Vec<_>>>()?;
            let start = Instant::now();
            let met = b.at_once(taken, |(lens, teacher, student)| meet(teacher, student, &lens));
            let share = flops * group.len() as f64 / batches.len() as f64;
            times.charge(Phase::Forward, start.elapsed().as_secs_f64(), share);
            for (&batch, met) in group.iter().zip(met) {
                let Met { y, x, teacher, student } = met?;
                let start = Instant::now();
                let (y, x) = self.teacher.counted.both(b, batch, y, x)?;
                let bad = b.count_non_finite_rows(&y)?.max(b.count_non_finite_rows(&x)?);
                let all = b.shape(&x).0;
                if bad > 0 {
                    let block = self.block;
                    return Err(PipelineError::NonFiniteActivations { block, bad, all });
                }
                let tokens = all as f64;
                b.cross_accumulate(&mut cross, &y, &x)?;
                b.gram_accumulate(&mut gram, &x)?;
                let flops = gram_flops(tokens, inputs as f64)
                    + 2.0 * tokens * outputs as f64 * inputs as f64;
                times.charge(Phase::Statistics, start.elapsed().as_secs_f64(), flops);
                let kept = Kept { residual: teacher, input: None };
                self.teacher.hidden.put(b, batch, kept)?;
                self.student.put(b, batch, student)?;
                self.job.progress.advance(1);
            }
        }
        let host = |matrix: &B::Matrix| -> Result<Dense> {
            let (rows, cols) = b.shape(matrix);
            Ok(Dense::new(rows, cols, &b.download(matrix)?)?)
        };
        Ok(Fit { cross: host(&cross)?, gram: host(&gram)? })
    }

    /// Lets the student write what waits at `point`.
    fn apply(
        &mut self,
        block: &Block<B>,
        point: CapturePoint,
        times: &mut PhaseTimes,
    ) -> Result<()> {
        let (b, config) = (self.b, &self.job.slicing.model.config);
        for batch in 0..self.student.batches() {
            let start = Instant::now();
            let Kept { residual, input } = self.student.take(batch)?;
            let input = input.map(|input| input.onload(b)).transpose()?;
            let at = Activations { residual: residual.onload(b)?, input };
            let lens = self.student.lens(batch);
            let residual = Parked::Device(block.write(b, point, at)?);
            let arch = self.job.source.arch();
            let flops = forward_flops(arch, config, point, point as usize + 1, lens);
            self.student.put(b, batch, Kept { residual, input: None })?;
            times.charge(Phase::Forward, start.elapsed().as_secs_f64(), flops);
        }
        Ok(())
    }
}

/// The fitted map in the place of `plain`.
fn solve<B: Backend>(b: &B, fit: &Fit, plain: &Dense, damp: f64, tensor: &str) -> Result<Dense> {
    fit.solve(b, plain, damp).map_err(|error| match error {
        BackendError::NotPositiveDefinite { pivot } => {
            SolveError::NotPositiveDefinite { layer: tensor.to_owned(), pivot, damp }.into()
        }
        other => other.into(),
    })
}

/// `1 / √mean(x²)` of each row; nothing for a row of zeros.
fn inverse_rms(x: &HostMatrix) -> Vec<f32> {
    let inverse = |square: f64| {
        if square > 0.0 { (square / x.cols as f64).sqrt().recip() as f32 } else { 0.0 }
    };
    let square = |x: f32| f64::from(x) * f64::from(x);
    let cols = x.cols.max(1);
    match &x.data {
        HostData::F32(values) => {
            let rows = values.chunks_exact(cols);
            rows.map(|row| inverse(row.iter().map(|&x| square(x)).sum())).collect()
        }
        HostData::Bf16(values) => {
            let rows = values.chunks_exact(cols);
            rows.map(|row| inverse(row.iter().map(|x| square(x.to_f32())).sum())).collect()
        }
    }
}

fn negated(x: &HostMatrix) -> HostMatrix {
    let mut out = x.clone();
    match &mut out.data {
        HostData::F32(values) => values.iter_mut().for_each(|x| *x = -*x),
        HostData::Bf16(values) => values.iter_mut().for_each(|x| *x = -*x),
    }
    out
}
