//! Turns the tensors of a model into another basis and writes them, in model order.
//!
//! Which side of a weight is turned follows from the spaces that its linear connects, so nothing here
//! knows a family of models.

use std::{borrow::Cow, path::Path, time::Instant};

use sparsepack_formats::{SafetensorsWriter, encoding::MatrixShape};

use super::super::{
    budget::SLICED_ROWS,
    error::Result,
    packer::Packer,
    plan::ConversionPlan,
    progress::{Phase, PhaseTimes},
    stored::round_to_stored,
};
use super::SliceJob;
use crate::{
    backend::{Backend, Dense},
    compress::slicegpt,
    model::{CapturePoint, LayerNames, NormKind, Role, Space, TensorKind},
    recipe::{OutputFormat, OutputRecipe, Recipe},
};

/// The directions of the stream in a block, `[d, d']` each.
#[derive(Clone, Copy)]
pub(super) struct Bases<'a> {
    /// Where its attention reads.
    pub(super) attn: &'a Dense,
    /// Where its attention writes and its MLP reads.
    pub(super) mlp: &'a Dense,
    /// Where its MLP writes.
    pub(super) after: &'a Dense,
}

impl<'a> Bases<'a> {
    /// The same everywhere.
    pub(super) fn shared(q: &'a Dense) -> Self {
        Self { attn: q, mlp: q, after: q }
    }

    /// Where the linears of `point` read.
    fn read_at(self, point: CapturePoint) -> &'a Dense {
        match point {
            CapturePoint::AttnIn => self.attn,
            _ => self.mlp,
        }
    }

    /// Where the linears of `point` write.
    fn written_at(self, point: CapturePoint) -> &'a Dense {
        match point {
            CapturePoint::AttnOut => self.mlp,
            _ => self.after,
        }
    }
}

/// Writes a sliced model.
pub(super) struct SlicedWriter<'a, B: Backend> {
    b: &'a B,
    job: &'a SliceJob<'a>,
    packer: Packer,
}

impl<'a, B: Backend> SlicedWriter<'a, B> {
    /// Lays the files out.
    ///
    /// # Errors
    /// I/O; sizes that overflow.
    pub(super) fn create(b: &'a B, job: &'a SliceJob<'a>, directory: &Path) -> Result<Self> {
        let output =
            OutputRecipe { format: Some(OutputFormat::Safetensors), ..OutputRecipe::default() };
        let plan =
            ConversionPlan::new(&job.slicing.outline, &Recipe { output, ..Recipe::default() })?;
        let packer = Packer::start(SafetensorsWriter::create(directory, &plan.shards())?, 0);
        Ok(Self { b, job, packer })
    }

    /// Writes the embeddings in the basis `q`.
    ///
    /// # Errors
    /// A tensor that cannot be read, a value too large for its type, device failure, I/O.
    pub(super) fn write_before_blocks(&mut self, q: &Dense, times: &mut PhaseTimes) -> Result<()> {
        let start = Instant::now();
        let q = self.writable(q);
        for (name, shape, kind) in &self.job.slicing.model.tensors {
            if matches!(kind, TensorKind::Embedding | TensorKind::Positions) {
                let turn = |b: &B, rows: Dense| Ok(b.dense_product(&rows, &q)?);
                self.write_rows(name, name, shape[0], turn)?;
            }
        }
        times.charge(Phase::Slice, start.elapsed().as_secs_f64(), 0.0);
        Ok(())
    }

    /// Writes the tensors of a block.
    ///
    /// # Errors
    /// As [`write_before_blocks`](Self::write_before_blocks).
    pub(super) fn write_block(
        &mut self,
        block: usize,
        bases: Bases<'_>,
        times: &mut PhaseTimes,
    ) -> Result<()> {
        self.write_beside_linears(block, bases, times)?;
        let start = Instant::now();
        for (name, _, kind) in &self.job.slicing.model.tensors {
            match *kind {
                TensorKind::Linear { block: of, role } if of == block => {
                    let weight = self.weight(block, role, bases)?;
                    self.put(name, &weight)?;
                }
                _ => {}
            }
        }
        self.job.source.release(block);
        times.charge(Phase::Slice, start.elapsed().as_secs_f64(), 0.0);
        Ok(())
    }

    /// Writes the tensors of a block but the weights of its linears.
    ///
    /// # Errors
    /// As [`write_before_blocks`](Self::write_before_blocks).
    pub(super) fn write_beside_linears(
        &mut self,
        block: usize,
        bases: Bases<'_>,
        times: &mut PhaseTimes,
    ) -> Result<()> {
        let start = Instant::now();
        let tensors = self.job.slicing.model.tensors.iter();
        for (name, shape, kind) in tensors.filter(|(_, _, kind)| kind.block() == Some(block)) {
            let values = match *kind {
                TensorKind::Linear { .. } => continue,
                TensorKind::LinearBias { role, .. } => self.bias(block, role, bases)?,
                TensorKind::Shortcut { past, .. } => {
                    let from = if past == CapturePoint::AttnOut { bases.attn } else { bases.mlp };
                    slicegpt::writer(self.b, from, bases.written_at(past))?
                }
                // The gains of norms are in what reads them.
                _ => Dense { rows: 1, cols: shape[0], data: vec![1.0; shape[0]] },
            };
            self.put(name, &values)?;
        }
        times.charge(Phase::Slice, start.elapsed().as_secs_f64(), 0.0);
        Ok(())
    }

    /// Writes the last norm and the output matrix, which reads the stream in the basis `q`, or as it
    /// was before slicing.
    ///
    /// # Errors
    /// As [`write_before_blocks`](Self::write_before_blocks).
    pub(super) fn write_after_blocks(
        &mut self,
        q: Option<&Dense>,
        times: &mut PhaseTimes,
    ) -> Result<()> {
        let start = Instant::now();
        let source = self.job.source;
        let norm = source.final_norm();
        let gain = self.vector(&norm.weight)?;
        for (name, shape, kind) in &self.job.slicing.model.tensors {
            match kind {
                TensorKind::FinalNorm => {
                    let ones = Dense { rows: 1, cols: shape[0], data: vec![1.0; shape[0]] };
                    self.put(name, &ones)?;
                }
                TensorKind::LmHead => {
                    self.write_rows(name, &source.lm_head(), shape[0], |b, rows| match q {
                        Some(q) => Ok(slicegpt::reader(b, rows, &gain, q)?),
                        None => Ok(rows.scale_columns(&gain)),
                    })?;
                }
                TensorKind::LmHeadBias => {
                    let bias = self.vector(norm.bias.as_deref().unwrap_or_default())?;
                    let bias = Dense { rows: bias.len(), cols: 1, data: bias };
                    self.write_rows(name, &source.lm_head(), shape[0], |b, rows| {
                        Ok(b.dense_product(&rows, &bias)?)
                    })?;
                }
                _ => {}
            }
        }
        times.charge(Phase::Slice, start.elapsed().as_secs_f64(), 0.0);
        Ok(())
    }

    /// Completes the files.
    ///
    /// # Errors
    /// I/O.
    pub(super) fn finish(self, times: &mut PhaseTimes) -> Result<()> {
        times.time(Phase::Write, || self.packer.finish()).map(drop)
    }

    /// A linear's weight, turned on the sides that are in the stream.
    fn weight(&self, block: usize, role: Role, bases: Bases<'_>) -> Result<Dense> {
        let (Some(spec), Some(names)) =
            (self.job.source.arch().linear(role), self.job.source.linear(block, role))
        else {
            return Ok(Dense::zeros(0, 0));
        };
        let weight = self.matrix(&names.weight)?;
        let weight = match spec.in_space {
            Space::Residual => {
                let gain = self.vector(&self.norm_before(spec.capture, block).weight)?;
                slicegpt::reader(self.b, weight, &gain, bases.read_at(spec.capture))?
            }
            _ => weight,
        };
        match spec.out_space {
            Space::Residual => {
                let q = self.writable(bases.written_at(spec.capture));
                Ok(slicegpt::writer(self.b, &weight, &q)?)
            }
            _ => Ok(weight),
        }
    }

    /// The gain of the norm that the linears of `point` read through.
    ///
    /// # Errors
    /// A tensor that cannot be read or is not finite.
    pub(super) fn gain_before(&self, point: CapturePoint, block: usize) -> Result<Vec<f64>> {
        self.vector(&self.norm_before(point, block).weight)
    }

    /// A linear's bias: its own, with that of the norm before it, turned where it is in the stream.
    ///
    /// # Errors
    /// A tensor that cannot be read or is not finite; device failure.
    pub(super) fn bias(&self, block: usize, role: Role, bases: Bases<'_>) -> Result<Dense> {
        let source = self.job.source;
        let (Some(spec), Some(names)) = (source.arch().linear(role), source.linear(block, role))
        else {
            return Ok(Dense::zeros(0, 0));
        };
        let rows = source.config().linear_shape(role)[0];
        let mut bias = Dense::zeros(rows, 1);
        if let Some(name) = names.bias {
            bias.data = self.vector(&name)?;
        }
        let norm = self.norm_before(spec.capture, block);
        if let (Space::Residual, Some(shift)) = (spec.in_space, norm.bias) {
            let shift = self.vector(&shift)?;
            let shift = Dense { rows: shift.len(), cols: 1, data: shift };
            bias.add(&self.b.dense_product(&self.matrix(&names.weight)?, &shift)?);
        }
        match spec.out_space {
            Space::Residual => {
                let q = self.writable(bases.written_at(spec.capture));
                Ok(slicegpt::writer(self.b, &bias, &q)?)
            }
            _ => Ok(bias),
        }
    }

    /// The norm that the linears of `point` read through, where they read the stream.
    fn norm_before(&self, point: CapturePoint, block: usize) -> LayerNames {
        match point {
            CapturePoint::AttnIn | CapturePoint::AttnOut => self.job.source.attn_norm(block),
            CapturePoint::MlpIn | CapturePoint::MlpHidden => self.job.source.mlp_norm(block),
        }
    }

    /// The basis in which something is written. A norm that subtracts the mean becomes one that does
    /// not, and what is written then has none.
    fn writable<'q>(&self, q: &'q Dense) -> Cow<'q, Dense> {
        match self.job.source.arch().norm {
            NormKind::Rms => Cow::Borrowed(q),
            NormKind::Layer => Cow::Owned(slicegpt::centred_rows(q.clone())),
        }
    }

    fn matrix(&self, name: &str) -> Result<Dense> {
        let source = self.job.source;
        let values = source.read_f32(name)?;
        source.check_finite(name, &values)?;
        let MatrixShape { rows, cols } = MatrixShape::of(&source.tensor(name)?.shape);
        Ok(Dense::new(rows, cols, &values)?)
    }

    fn vector(&self, name: &str) -> Result<Vec<f64>> {
        let values = self.job.source.read_f32(name)?;
        self.job.source.check_finite(name, &values)?;
        Ok(values.into_iter().map(f64::from).collect())
    }

    /// Turns a table some rows at a time.
    fn write_rows(
        &mut self,
        name: &str,
        from: &str,
        count: usize,
        turn: impl Fn(&B, Dense) -> Result<Dense>,
    ) -> Result<()> {
        let source = self.job.source;
        let cols = source.config().hidden_size;
        for start in (0..count).step_by(SLICED_ROWS) {
            let rows = start..(start + SLICED_ROWS).min(count);
            let values = source.read_rows_f32(from, rows.clone())?;
            source.check_finite(from, &values)?;
            let turned = turn(self.b, Dense::new(rows.len(), cols, &values)?)?;
            self.put(name, &turned)?;
            source.reader().release(&[&source.tensor(from)?.stored_name]);
        }
        Ok(())
    }

    /// Writes a tensor. Returns its values as they are stored.
    ///
    /// # Errors
    /// A value too large for its type; I/O.
    pub(super) fn put(&mut self, name: &str, values: &Dense) -> Result<Vec<f32>> {
        let mut values = values.to_f32();
        let bytes = round_to_stored(name, self.job.slicing.dtype, &mut values)?;
        self.packer.write(name, 0, bytes)?;
        Ok(values)
    }
}
