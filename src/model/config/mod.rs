//! The dimensions of a model, whichever file they come from.
//!
//! Invariant: a [`ModelConfig`] that [`from_hf`](ModelConfig::from_hf) or
//! [`from_gguf`](ModelConfig::from_gguf) returns has passed [`validate`](ModelConfig::validate), so
//! products of its dimensions do not overflow.

mod counts;
mod gguf;
mod hf;

use std::collections::BTreeSet;

pub use counts::{FlopsPerToken, ParameterCount};

use super::arch::Positions;
use super::error::{ModelError, Result};
use super::roles::{CapturePoint, Role};
use super::rope::{self, RopeConfig};
use crate::backend::{Activation, RopeTables};

/// Dimensions and settings of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the residual stream after the last block, of a sliced model whose output matrix is
    /// not; else it stays [`hidden_size`](Self::hidden_size).
    pub exit_size: Option<usize>,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides the query heads.
    pub num_key_value_heads: usize,
    /// Columns of a head; `num_attention_heads × head_dim` need not be `hidden_size`.
    pub head_dim: usize,
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// The longest sequence.
    pub max_position_embeddings: usize,
    /// Epsilon of every norm.
    pub norm_eps: f32,
    /// Activation of the MLP.
    pub activation: Activation,
    /// Rotary embeddings, of architectures that have them.
    pub rope: Option<RopeConfig>,
    /// Whether the embeddings are the output matrix too.
    pub tie_word_embeddings: bool,
    /// Token that starts a text.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    /// Tokens that a query sees at most, of families that limit them.
    pub sliding_window: Option<usize>,
    /// The linears that have a bias.
    pub biases: BTreeSet<Role>,
}

/// Upper limits, an order of magnitude above the largest published models: beyond them a
/// configuration is a mistake or an attack, and below them no product of two or three overflows.
const MAX_WIDTH: usize = 1 << 22;
const MAX_BLOCKS: usize = 1 << 14;
const MAX_HEADS: usize = 1 << 14;
const MAX_HEAD_DIM: usize = 1 << 14;
const MAX_VOCAB: usize = 1 << 26;
const MAX_POSITIONS: usize = 1 << 32;

impl ModelConfig {
    /// Whether the linears of this role have a bias.
    pub fn has_bias(&self, role: Role) -> bool {
        self.biases.contains(&role)
    }

    /// `[out_features, in_features]` of a role's weight.
    pub fn linear_shape(&self, role: Role) -> [usize; 2] {
        let (q, kv) = (self.q_features(), self.kv_features());
        let (hidden, mlp) = (self.hidden_size, self.intermediate_size);
        match role {
            Role::QProj => [q, hidden],
            Role::KProj | Role::VProj => [kv, hidden],
            Role::OProj => [hidden, q],
            Role::GateProj | Role::UpProj => [mlp, hidden],
            Role::DownProj => [hidden, mlp],
        }
    }

    /// [`linear_shape`](Self::linear_shape) in a block: the last one may write a stream of another
    /// width.
    pub fn linear_shape_in(&self, block: usize, role: Role) -> [usize; 2] {
        match role {
            Role::DownProj => [self.width_after(block), self.intermediate_size],
            _ => self.linear_shape(role),
        }
    }

    /// Columns of the residual stream after a block.
    pub fn width_after(&self, block: usize) -> usize {
        let last = block + 1 == self.num_hidden_layers;
        self.exit_size.filter(|_| last).unwrap_or(self.hidden_size)
    }

    /// Columns of the residual stream that the output matrix reads.
    pub fn exit_width(&self) -> usize {
        self.exit_size.unwrap_or(self.hidden_size)
    }

    /// Epsilon of the last norm: all norms add the same to the mean over as many columns.
    pub fn exit_norm_eps(&self) -> f32 {
        match self.exit_size {
            Some(size) => self.norm_eps * self.hidden_size as f32 / size as f32,
            None => self.norm_eps,
        }
    }

    /// Width of the activations at a capture point.
    pub fn capture_width(&self, point: CapturePoint) -> usize {
        match point {
            CapturePoint::AttnIn | CapturePoint::MlpIn => self.hidden_size,
            CapturePoint::AttnOut => self.q_features(),
            CapturePoint::MlpHidden => self.intermediate_size,
        }
    }

    /// Columns of all query heads.
    pub fn q_features(&self) -> usize {
        self.num_attention_heads * self.head_dim
    }

    /// Columns of all key heads, and of all value heads.
    pub fn kv_features(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// Cosines and sines of positions `0..positions`, or `None` for a model without rotary
    /// embeddings. Angles are rounded to f32 as in the reference implementation.
    pub fn rope_tables(&self, positions: usize) -> Option<RopeTables> {
        self.rope.as_ref().map(|rope| rope::tables(rope, self.head_dim, positions))
    }

    /// Refuses sequences of `tokens` tokens that the model has no positions for, or that a sliding
    /// window would cut (the forward pass attends to the whole sequence).
    ///
    /// # Errors
    /// [`ModelError::SequenceTooLong`] naming the limit.
    pub fn check_sequence(&self, tokens: usize) -> Result<()> {
        let limits = [
            (Some(self.max_position_embeddings), "max_position_embeddings"),
            (self.sliding_window, "sliding_window"),
        ];
        match limits.into_iter().find(|(limit, _)| limit.is_some_and(|limit| tokens > limit)) {
            Some((Some(limit), key)) => Err(ModelError::SequenceTooLong { tokens, limit, key }),
            _ => Ok(()),
        }
    }

    /// Checks every dimension by itself and against the others.
    ///
    /// # Errors
    /// [`ModelError::InvalidValue`] naming key, value and expectation.
    pub fn validate(&self, positions: Positions) -> Result<()> {
        let range = |key: &str, value: usize, limit: usize| {
            check((1..=limit).contains(&value), key, value, || format!("1 to {limit}"))
        };
        range("hidden_size", self.hidden_size, MAX_WIDTH)?;
        if let Some(size) = self.exit_size {
            range("exit_size", size, MAX_WIDTH)?;
        }
        range("intermediate_size", self.intermediate_size, MAX_WIDTH)?;
        range("num_hidden_layers", self.num_hidden_layers, MAX_BLOCKS)?;
        range("num_attention_heads", self.num_attention_heads, MAX_HEADS)?;
        range("num_key_value_heads", self.num_key_value_heads, self.num_attention_heads)?;
        range("head_dim", self.head_dim, MAX_HEAD_DIM)?;
        range("vocab_size", self.vocab_size, MAX_VOCAB)?;
        range("max_position_embeddings", self.max_position_embeddings, MAX_POSITIONS)?;
        check(self.q_features() <= MAX_WIDTH, "head_dim", self.head_dim, || {
            format!("at most {MAX_WIDTH} with {} heads", self.num_attention_heads)
        })?;
        let heads = self.num_attention_heads;
        check(
            heads.is_multiple_of(self.num_key_value_heads),
            "num_key_value_heads",
            self.num_key_value_heads,
            || format!("a divisor of num_attention_heads = {heads}"),
        )?;
        if positions == Positions::Rope {
            check(self.head_dim.is_multiple_of(2), "head_dim", self.head_dim, || {
                "an even number".to_owned()
            })?;
        }
        let eps = self.norm_eps;
        check(eps.is_finite() && eps > 0.0 && eps < 1.0, "norm epsilon", eps, || {
            "a number between 0 and 1".to_owned()
        })?;
        if let Some(window) = self.sliding_window {
            range("sliding_window", window, MAX_POSITIONS)?;
        }
        self.rope.as_ref().map_or(Ok(()), |rope| rope.validate(self.head_dim))
    }
}

/// An [`InvalidValue`](ModelError::InvalidValue) unless `valid`.
pub(crate) fn check(
    valid: bool,
    key: &str,
    found: impl std::fmt::Display,
    expected: impl FnOnce() -> String,
) -> Result<()> {
    if valid {
        return Ok(());
    }
    Err(ModelError::InvalidValue {
        key: key.to_owned(),
        found: found.to_string(),
        expected: expected(),
    })
}

/// The shortest decimal that reads back as `value`, so that 1e-5 as f32 stays `1e-5` in JSON.
pub(crate) fn shortest_f64(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}
