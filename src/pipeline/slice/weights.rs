//! Turns the tensors of a model into another basis and writes them, in model order.
//!
//! Which side of a weight is turned follows from the spaces that its linear connects, so nothing here
//! knows a family of models.

use std::{path::Path, time::Instant};

use sparsepack_formats::SafetensorsWriter;

use super::super::{
    budget::SLICED_ROWS,
    error::Result,
    loader::round_to_stored,
    packer::Packer,
    plan::ConversionPlan,
    progress::{Phase, PhaseTimes},
};
use super::SliceJob;
use crate::{
    backend::{Backend, Dense},
    compress::slicegpt,
    model::{CapturePoint, Role, Space, TensorKind},
    recipe::{OutputFormat, OutputRecipe, Recipe},
};

/// The directions of the stream at the places where it is read and written.
pub(super) enum Bases<'a> {
    /// The same everywhere: `[d, d']`.
    Shared(&'a Dense),
}

impl Bases<'_> {
    /// Where the tables write.
    fn entry(&self) -> &Dense {
        match self {
            Self::Shared(q) => q,
        }
    }

    /// Where the linears that read at `point` read.
    fn read_at(&self, _: CapturePoint) -> &Dense {
        match self {
            Self::Shared(q) => q,
        }
    }

    /// Where the linears that are applied at `point` write.
    fn written_at(&self, _: CapturePoint) -> &Dense {
        match self {
            Self::Shared(q) => q,
        }
    }

    /// Where the output matrix reads.
    fn exit(&self) -> &Dense {
        match self {
            Self::Shared(q) => q,
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
        let packer = Packer::start(SafetensorsWriter::create(directory, &plan.shards())?);
        Ok(Self { b, job, packer })
    }

    /// Writes the embeddings.
    ///
    /// # Errors
    /// A tensor that cannot be read, a value too large for its type, device failure, I/O.
    pub(super) fn write_before_blocks(
        &mut self,
        bases: &Bases<'_>,
        times: &mut PhaseTimes,
    ) -> Result<()> {
        let before = |kind| matches!(kind, TensorKind::Embedding | TensorKind::Positions);
        self.write(before, bases, times)
    }

    /// Writes the tensors of a block.
    ///
    /// # Errors
    /// As [`write_before_blocks`](Self::write_before_blocks).
    pub(super) fn write_block(
        &mut self,
        block: usize,
        bases: &Bases<'_>,
        times: &mut PhaseTimes,
    ) -> Result<()> {
        self.write(|kind| kind.block() == Some(block), bases, times)
    }

    /// Writes the last norm and the output matrix.
    ///
    /// # Errors
    /// As [`write_before_blocks`](Self::write_before_blocks).
    pub(super) fn write_after_blocks(
        &mut self,
        bases: &Bases<'_>,
        times: &mut PhaseTimes,
    ) -> Result<()> {
        let after = |kind| matches!(kind, TensorKind::FinalNorm | TensorKind::LmHead);
        self.write(after, bases, times)
    }

    /// Completes the files.
    ///
    /// # Errors
    /// I/O.
    pub(super) fn finish(self, times: &mut PhaseTimes) -> Result<()> {
        times.time(Phase::Write, || self.packer.finish()).map(drop)
    }

    fn write(
        &mut self,
        which: impl Fn(TensorKind) -> bool,
        bases: &Bases<'_>,
        times: &mut PhaseTimes,
    ) -> Result<()> {
        let start = Instant::now();
        let tensors = self.job.slicing.model.tensors.iter();
        for (name, shape, kind) in tensors.filter(|(_, _, kind)| which(*kind)) {
            match *kind {
                TensorKind::Embedding | TensorKind::Positions => {
                    self.write_rows(name, name, shape[0], |b, rows| {
                        Ok(b.dense_product(&rows, bases.entry())?)
                    })?;
                }
                TensorKind::LmHead => {
                    let source = self.job.source;
                    let gain = self.vector(&source.final_norm().weight)?;
                    self.write_rows(name, &source.lm_head(), shape[0], |b, rows| {
                        Ok(slicegpt::reader(b, rows, &gain, bases.exit())?)
                    })?;
                }
                TensorKind::BlockNorm { .. } | TensorKind::FinalNorm => {
                    self.put(name, vec![1.0; shape[0]])?;
                }
                TensorKind::Linear { block, role } => {
                    let weight = self.linear(block, role, bases)?;
                    self.put(name, weight.to_f32())?;
                }
                TensorKind::LinearBias { role, .. } => {
                    let bias = self.vector(name)?;
                    let bias = Dense { rows: bias.len(), cols: 1, data: bias };
                    let bias = self.written(role, bias, bases)?;
                    self.put(name, bias.to_f32())?;
                }
                TensorKind::Other => {}
            }
        }
        times.charge(Phase::Slice, start.elapsed().as_secs_f64(), 0.0);
        Ok(())
    }

    /// A linear's weight with the sides turned that are in the stream.
    fn linear(&self, block: usize, role: Role, bases: &Bases<'_>) -> Result<Dense> {
        let (source, b) = (self.job.source, self.b);
        let (name, [rows, cols]) = {
            let names = source.linear(block, role);
            let name = names.map(|names| names.weight).unwrap_or_default();
            (name, source.config().linear_shape(role))
        };
        let values = source.read_f32(&name)?;
        source.check_finite(&name, &values)?;
        let mut weight = Dense::new(rows, cols, &values)?;
        if let Some(spec) = source.arch().linear(role)
            && spec.in_space == Space::Residual
        {
            let norm = match spec.capture {
                CapturePoint::AttnIn => source.attn_norm(block),
                _ => source.mlp_norm(block),
            };
            let gain = self.vector(&norm.weight)?;
            weight = slicegpt::reader(b, weight, &gain, bases.read_at(spec.capture))?;
        }
        self.written(role, weight, bases)
    }

    /// A weight or bias turned where it writes into the stream.
    fn written(&self, role: Role, weight: Dense, bases: &Bases<'_>) -> Result<Dense> {
        Ok(match self.job.source.arch().linear(role) {
            Some(spec) if spec.out_space == Space::Residual => {
                slicegpt::writer(self.b, &weight, bases.written_at(spec.capture))?
            }
            _ => weight,
        })
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
            self.put(name, turned.to_f32())?;
            source.reader().release(&[&source.tensor(from)?.stored_name]);
        }
        Ok(())
    }

    fn vector(&self, name: &str) -> Result<Vec<f64>> {
        let values = self.job.source.read_f32(name)?;
        self.job.source.check_finite(name, &values)?;
        Ok(values.into_iter().map(f64::from).collect())
    }

    fn put(&mut self, name: &str, mut values: Vec<f32>) -> Result<()> {
        let bytes = round_to_stored(name, self.job.slicing.dtype, &mut values)?;
        self.packer.write(name, 0, bytes)
    }
}
