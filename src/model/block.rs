//! A decoder block and its forward pass, written once for every architecture and backend.
//!
//! A block is four steps, each starting at a [`CapturePoint`]: the linears that share an input.
//! [`Block::enter`] computes the input of the first; [`Block::step`] applies the linears of one
//! point and goes on to the input of the next. The calibration loop stops between steps to solve
//! the linears whose input it has just seen; an ordinary forward pass runs the steps in a row.

use crate::{
    backend::{AttentionShape, Backend, BackendError, RopeTables, SequenceLens},
    model::{Architecture, CapturePoint, MlpKind, ModelConfig},
};

/// A normalisation layer on the device.
#[derive(Debug)]
pub enum Norm<B: Backend> {
    /// `RMSNorm`: `gain [1, features]`.
    Rms {
        /// Gain.
        gain: B::Matrix,
        /// Added to the mean square.
        eps: f32,
    },
    /// `LayerNorm`: `gain` and `bias [1, features]`.
    Layer {
        /// Gain.
        gain: B::Matrix,
        /// Bias.
        bias: B::Matrix,
        /// Added to the variance.
        eps: f32,
    },
}

impl<B: Backend> Norm<B> {
    /// Normalises each row of `x`.
    ///
    /// # Errors
    /// Device failure.
    pub fn apply(&self, b: &B, x: &B::Matrix) -> Result<B::Matrix, BackendError> {
        match self {
            Self::Rms { gain, eps } => b.rms_norm(x, gain, *eps),
            Self::Layer { gain, bias, eps } => b.layer_norm(x, gain, bias, *eps),
        }
    }
}

/// The linears of one capture point, stacked along their outputs (`q;k;v`, `gate;up`).
#[derive(Debug)]
pub struct Linears<B: Backend> {
    /// Stacked weights.
    pub weight: B::Weight,
    /// Stacked biases `[1, out]`, zero where a linear has none; absent when none has.
    pub bias: Option<B::Matrix>,
}

/// What does not change from block to block.
#[derive(Debug, Clone)]
pub struct BlockGeometry {
    attention: AttentionShape,
    rope: Option<RopeTables>,
    mlp: MlpKind,
    activation: crate::backend::Activation,
}

impl BlockGeometry {
    /// The geometry of a model for sequences of up to `positions` tokens; of 0 where no block will run.
    ///
    /// # Errors
    /// Heads that the device's attention does not take, unless no block will run.
    pub fn new<B: Backend>(
        b: &B,
        arch: &Architecture,
        config: &ModelConfig,
        positions: usize,
    ) -> Result<Self, BackendError> {
        let attention = AttentionShape {
            num_heads: config.num_attention_heads,
            num_kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            scale: 1.0 / (config.head_dim as f32).sqrt(),
        };
        if positions > 0 {
            b.check_attention(&attention)?;
        }
        Ok(Self {
            attention,
            rope: config.rope_tables(positions),
            mlp: arch.mlp,
            activation: config.activation,
        })
    }
}

/// One decoder block on the device. The linears of a point may be absent while they are still to
/// be solved; running a step without its linears is a defect of the caller.
#[derive(Debug)]
pub struct Block<B: Backend> {
    /// Norm before the attention.
    pub attn_norm: Norm<B>,
    /// Norm before the MLP.
    pub mlp_norm: Norm<B>,
    /// Linears by capture point, in [`CapturePoint::ALL`] order.
    pub linears: [Option<Linears<B>>; 4],
    /// What turns the residual stream before the linears of a point add to it, of a sliced model.
    pub shortcuts: [Option<B::Weight>; 4],
}

/// Activations of a batch between two steps.
#[derive(Debug)]
pub struct Activations<B: Backend> {
    /// The residual stream `[tokens, hidden]`, f32.
    pub residual: B::Matrix,
    /// Input of the linears at the current capture point; `None` after the last step.
    pub input: Option<B::Matrix>,
}

impl<B: Backend> Block<B> {
    /// Starts the block: the input of the attention projections.
    ///
    /// # Errors
    /// Device failure.
    pub fn enter(&self, b: &B, residual: B::Matrix) -> Result<Activations<B>, BackendError> {
        let input = self.attn_norm.apply(b, &residual)?;
        Ok(Activations { residual, input: Some(input) })
    }

    /// Recomputes the input of `point` from the residual stream, where it is a function of it
    /// alone: the two points that follow a norm.
    ///
    /// # Errors
    /// Device failure.
    pub fn input_from_residual(
        &self,
        b: &B,
        point: CapturePoint,
        residual: &B::Matrix,
    ) -> Result<Option<B::Matrix>, BackendError> {
        match point {
            CapturePoint::AttnIn => self.attn_norm.apply(b, residual).map(Some),
            CapturePoint::MlpIn => self.mlp_norm.apply(b, residual).map(Some),
            CapturePoint::AttnOut | CapturePoint::MlpHidden => Ok(None),
        }
    }

    /// Applies the linears of `point` to its input and goes on to the input of the next point.
    ///
    /// # Errors
    /// Device failure; the input or the linears of `point` are absent.
    pub fn step(
        &self,
        b: &B,
        geometry: &BlockGeometry,
        point: CapturePoint,
        at: Activations<B>,
        lens: &SequenceLens,
    ) -> Result<Activations<B>, BackendError> {
        match point {
            CapturePoint::AttnIn => {
                let Activations { residual, input } = at;
                let (input, linears) = self.ready(point, input)?;
                let mut qkv = b.linear(&input, &linears.weight, linears.bias.as_ref())?;
                drop(input);
                if let Some(tables) = &geometry.rope {
                    b.rope(&mut qkv, &geometry.attention, tables, lens)?;
                }
                let input = Some(b.causal_attention(&qkv, &geometry.attention, lens)?);
                Ok(Activations { residual, input })
            }
            CapturePoint::AttnOut => {
                let residual = self.write(b, point, at)?;
                let input = Some(self.mlp_norm.apply(b, &residual)?);
                Ok(Activations { residual, input })
            }
            CapturePoint::MlpIn => {
                let Activations { residual, input } = at;
                let (input, linears) = self.ready(point, input)?;
                let (weight, bias) = (&linears.weight, linears.bias.as_ref());
                let input = Some(match geometry.mlp {
                    MlpKind::Gated => b.linear_gated(&input, weight, bias, geometry.activation)?,
                    MlpKind::Plain => {
                        b.activation(&b.linear(&input, weight, bias)?, geometry.activation)?
                    }
                });
                Ok(Activations { residual, input })
            }
            CapturePoint::MlpHidden => {
                Ok(Activations { residual: self.write(b, point, at)?, input: None })
            }
        }
    }

    /// Adds what the linears of `point`, a point that ends a half of the block, make of its input to
    /// the residual stream.
    ///
    /// # Errors
    /// Device failure; the input or the linears of `point` are absent.
    pub fn write(
        &self,
        b: &B,
        point: CapturePoint,
        at: Activations<B>,
    ) -> Result<B::Matrix, BackendError> {
        let Activations { mut residual, input } = at;
        let (input, linears) = self.ready(point, input)?;
        if let Some(shortcut) = &self.shortcuts[point as usize] {
            residual = b.linear(&residual, shortcut, None)?;
        }
        b.linear_add(&mut residual, &input, &linears.weight, linears.bias.as_ref())?;
        Ok(residual)
    }

    /// Runs one of [`CapturePoint::HALVES`], from residual stream to residual stream.
    ///
    /// # Errors
    /// Device failure; linears of the half are absent.
    pub fn half(
        &self,
        b: &B,
        geometry: &BlockGeometry,
        [reads, writes]: [CapturePoint; 2],
        residual: B::Matrix,
        lens: &SequenceLens,
    ) -> Result<B::Matrix, BackendError> {
        let input = self.input_from_residual(b, reads, &residual)?;
        let at = self.step(b, geometry, reads, Activations { residual, input }, lens)?;
        self.write(b, writes, at)
    }

    /// The input and the linears of `point`, which must be there.
    fn ready(
        &self,
        point: CapturePoint,
        input: Option<B::Matrix>,
    ) -> Result<(B::Matrix, &Linears<B>), BackendError> {
        let absent = |what: &str| BackendError::Shape {
            operation: "block step",
            detail: format!("no {what} at {point:?}"),
        };
        let input = input.ok_or_else(|| absent("input"))?;
        let linears = self.linears[point as usize].as_ref().ok_or_else(|| absent("linears"))?;
        Ok((input, linears))
    }

    /// Runs the whole block, showing the input of every capture point to `observe`.
    ///
    /// # Errors
    /// Device failure, or what `observe` returns.
    pub fn forward<E: From<BackendError>>(
        &self,
        b: &B,
        geometry: &BlockGeometry,
        residual: B::Matrix,
        lens: &SequenceLens,
        mut observe: impl FnMut(CapturePoint, &B::Matrix) -> Result<(), E>,
    ) -> Result<B::Matrix, E> {
        let mut at = self.enter(b, residual)?;
        for point in CapturePoint::ALL {
            if let Some(input) = &at.input {
                observe(point, input)?;
            }
            at = self.step(b, geometry, point, at, lens)?;
        }
        Ok(at.residual)
    }
}
