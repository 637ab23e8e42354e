//! Brings one decoder block to the device.

use std::{mem, panic::resume_unwind, thread::ScopedJoinHandle};

use sparsepack_formats::{DType, encoding::dense};

use super::error::Result;
use crate::{
    backend::{Backend, BackendError, Fetch, Rounding, StoredValues},
    model::{Block, CapturePoint, LayerNames, Linears, ModelSource, Norm, Role},
};

/// A decoder block being worked on. Its linears are on their way to the device until
/// [`install`](Self::install) stacks those of a capture point for products.
#[derive(Debug)]
pub struct LoadedBlock<B: Backend> {
    /// What runs.
    pub block: Block<B>,
    /// The linears in the architecture's order.
    pub linears: Vec<LoadedLinear<B>>,
}

/// The weight of a linear, `[out_features, in_features]`.
#[derive(Debug)]
pub enum LoadedWeight<B: Backend> {
    /// As the source has it.
    Source(B::Staged),
    /// As it will be stored (f32).
    Solved(B::Matrix),
    /// Nowhere but in the layout for products, or yet to be solved for.
    Elsewhere,
}

/// One linear.
#[derive(Debug)]
pub struct LoadedLinear<B: Backend> {
    /// What it is in its block.
    pub role: Role,
    /// The input it shares.
    pub capture: CapturePoint,
    /// Hugging Face name of its weight.
    pub tensor: String,
    /// The weight.
    pub weight: LoadedWeight<B>,
    /// Codes and scales of the weight, once it is rounded to a grid.
    pub rounding: Option<Fetch<Rounding>>,
    /// Bias `[out_features]`, where there is one.
    pub bias: Option<Vec<f32>>,
    /// `out_features`.
    pub rows: usize,
    /// `in_features`.
    pub cols: usize,
}

impl<B: Backend> LoadedBlock<B> {
    /// Reads block `index`. Weights are checked to be finite.
    ///
    /// # Errors
    /// A tensor that cannot be read or holds NaN or infinity; device failure.
    pub fn load(b: &B, source: &ModelSource, index: usize) -> Result<Self> {
        let arch = source.arch();
        let mut linears = Vec::with_capacity(arch.linears.len());
        for spec in &arch.linears {
            let [rows, cols] = source.config().linear_shape_in(index, spec.role);
            let Some(names) = source.linear(index, spec.role) else { continue };
            linears.push(LoadedLinear {
                role: spec.role,
                capture: spec.capture,
                weight: LoadedWeight::Source(stage(b, source, &names.weight, rows, cols)?),
                rounding: None,
                bias: names.bias.map(|bias| read_finite(source, &bias)).transpose()?,
                tensor: names.weight,
                rows,
                cols,
            });
        }
        let eps = source.config().norm_eps;
        let block = Block {
            attn_norm: load_norm(b, source, &source.attn_norm(index), eps)?,
            mlp_norm: load_norm(b, source, &source.mlp_norm(index), eps)?,
            linears: [None, None, None, None],
            shortcuts: load_shortcuts(b, source, index)?,
        };
        Ok(Self { block, linears })
    }

    /// The block ready to run, and nothing else.
    ///
    /// # Errors
    /// Device failure.
    pub fn into_runnable(mut self, b: &B) -> Result<Block<B>> {
        self.install_all(b)?;
        Ok(self.block)
    }

    /// The linears that share the input at `point`.
    pub fn at(&mut self, point: CapturePoint) -> impl Iterator<Item = &mut LoadedLinear<B>> {
        self.linears.iter_mut().filter(move |linear| linear.capture == point)
    }

    /// Stacks the linears of `point`, ready for products. Weights that were solved are nowhere else then;
    /// the source's stay, and can be solved.
    ///
    /// # Errors
    /// Device failure.
    pub fn install(&mut self, b: &B, point: CapturePoint) -> Result<()> {
        let weights = self
            .at(point)
            .map(|linear| linear.take(b))
            .collect::<std::result::Result<Vec<_>, _>>()?;
        self.block.linears[point as usize] = None;
        let weight = b.prepare(&weights.iter().collect::<Vec<_>>())?;
        drop(weights);
        let members: Vec<&LoadedLinear<B>> =
            self.linears.iter().filter(|linear| linear.capture == point).collect();
        let bias = if members.iter().any(|linear| linear.bias.is_some()) {
            let mut stacked = Vec::new();
            for linear in &members {
                match &linear.bias {
                    Some(bias) => stacked.extend_from_slice(bias),
                    None => stacked.resize(stacked.len() + linear.rows, 0.0),
                }
            }
            Some(b.upload(&stacked, 1, stacked.len())?)
        } else {
            None
        };
        self.block.linears[point as usize] = Some(Linears { weight, bias });
        Ok(())
    }

    /// Stacks every linear.
    ///
    /// # Errors
    /// Device failure.
    pub fn install_all(&mut self, b: &B) -> Result<()> {
        CapturePoint::ALL.into_iter().try_for_each(|point| self.install(b, point))
    }
}

impl<B: Backend> LoadedLinear<B> {
    /// A copy of the weight, f32.
    ///
    /// # Errors
    /// Device failure.
    pub fn matrix(&self, b: &B) -> std::result::Result<B::Matrix, BackendError> {
        match &self.weight {
            LoadedWeight::Source(staged) => b.receive(staged),
            LoadedWeight::Solved(weight) => b.duplicate(weight),
            LoadedWeight::Elsewhere => Err(self.gone()),
        }
    }

    /// The weight, f32, which is then only kept if it is the source's.
    ///
    /// # Errors
    /// Device failure.
    pub(super) fn take(&mut self, b: &B) -> std::result::Result<B::Matrix, BackendError> {
        match &self.weight {
            LoadedWeight::Source(staged) => b.receive(staged),
            _ => match mem::replace(&mut self.weight, LoadedWeight::Elsewhere) {
                LoadedWeight::Solved(weight) => Ok(weight),
                _ => Err(self.gone()),
            },
        }
    }

    fn gone(&self) -> BackendError {
        let detail = format!("{} is elsewhere", self.tensor);
        BackendError::Shape { operation: "install", detail }
    }
}

/// Begins to bring a weight to the device, and refuses NaN and infinity.
fn stage<B: Backend>(
    b: &B,
    source: &ModelSource,
    name: &str,
    rows: usize,
    cols: usize,
) -> Result<B::Staged> {
    if let Some((dtype, bytes)) = source.plain_values(name)?
        && dense::first_non_finite(dtype, &bytes).is_none()
    {
        return Ok(b.stage(StoredValues { dtype, bytes: &bytes }, rows, cols)?);
    }
    let values = read_finite(source, name)?;
    let bytes = bytemuck::cast_slice(&values);
    Ok(b.stage(StoredValues { dtype: DType::F32, bytes }, rows, cols)?)
}

/// Reads blocks one after the other: each while the one before is worked on, where the device has memory of
/// its own and so leaves the host's free.
#[derive(Debug)]
pub struct BlockReader<'a, B: Backend> {
    b: &'a B,
    source: &'a ModelSource,
    reads_ahead: bool,
    ahead: Option<LoadedBlock<B>>,
}

impl<'a, B: Backend> BlockReader<'a, B> {
    /// Nothing is read yet.
    ///
    /// # Errors
    /// Device failure.
    pub fn new(b: &'a B, source: &'a ModelSource) -> Result<Self> {
        Ok(Self { b, source, reads_ahead: b.free_memory()?.is_some(), ahead: None })
    }

    /// Asks the system for what comes after block `index` and what is read beside it.
    pub fn prefetch(&self, index: usize) {
        self.source.prefetch(index + 1 + usize::from(self.reads_ahead));
    }

    /// Block `index`, which is that read beside the last work, if one was.
    ///
    /// # Errors
    /// As [`LoadedBlock::load`].
    pub fn load(&mut self, index: usize) -> Result<LoadedBlock<B>> {
        match self.ahead.take() {
            Some(loaded) => Ok(loaded),
            None => LoadedBlock::load(self.b, self.source, index),
        }
    }

    /// Does `work` while block `next`, if any, is read on another thread, where that is of use.
    ///
    /// # Errors
    /// That of the work, else as [`LoadedBlock::load`].
    pub fn beside<R>(
        &mut self,
        next: Option<usize>,
        work: impl FnOnce() -> Result<R>,
    ) -> Result<R> {
        let (b, source) = (self.b, self.source);
        let next = next.filter(|_| self.reads_ahead);
        let (done, read) = std::thread::scope(|scope| {
            let reading =
                next.map(|index| scope.spawn(move || LoadedBlock::load(b, source, index)));
            let done = work();
            let join = |reading: ScopedJoinHandle<'_, _>| match reading.join() {
                Ok(read) => read,
                Err(panic) => resume_unwind(panic),
            };
            (done, reading.map(join).transpose())
        });
        let done = done?;
        self.ahead = read?;
        Ok(done)
    }
}

/// The matrices on the shortcuts of a sliced model's block.
fn load_shortcuts<B: Backend>(
    b: &B,
    source: &ModelSource,
    index: usize,
) -> Result<[Option<B::Weight>; 4]> {
    let mut shortcuts = [None, None, None, None];
    for point in CapturePoint::ALL {
        let Some(name) = source.shortcut(index, point) else { continue };
        let &[rows, cols] = source.tensor(&name)?.shape.as_slice() else { continue };
        let weight = b.upload(&read_finite(source, &name)?, rows, cols)?;
        shortcuts[point as usize] = Some(b.prepare(&[&weight])?);
    }
    Ok(shortcuts)
}

/// Reads a norm.
///
/// # Errors
/// A tensor that cannot be read or is not finite; device failure.
pub fn load_norm<B: Backend>(
    b: &B,
    source: &ModelSource,
    names: &LayerNames,
    eps: f32,
) -> Result<Norm<B>> {
    let row = |name: &str| -> Result<B::Matrix> {
        let values = read_finite(source, name)?;
        Ok(b.upload(&values, 1, values.len())?)
    };
    let gain = row(&names.weight)?;
    Ok(match &names.bias {
        Some(bias) => Norm::Layer { gain, bias: row(bias)?, eps },
        None => Norm::Rms { gain, eps },
    })
}

/// Decodes a tensor and refuses NaN and infinity.
fn read_finite(source: &ModelSource, name: &str) -> Result<Vec<f32>> {
    let values = source.read_f32(name)?;
    source.check_finite(name, &values)?;
    Ok(values)
}
