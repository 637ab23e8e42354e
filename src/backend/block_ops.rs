//! Operations of a decoder block's forward pass.

use super::{Result, Storage};

/// Lengths of the sequences stacked in one activation matrix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SequenceLens(Vec<usize>);

impl SequenceLens {
    /// Sequences of these lengths, one after the other.
    pub fn new(lens: Vec<usize>) -> Self {
        Self(lens)
    }

    /// Row range of each sequence.
    pub fn ranges(&self) -> impl Iterator<Item = std::ops::Range<usize>> + '_ {
        self.0.iter().scan(0, |start, len| {
            let range = *start..*start + len;
            *start = range.end;
            Some(range)
        })
    }

    /// Rows of all sequences together.
    pub fn tokens(&self) -> usize {
        self.0.iter().sum()
    }

    /// The longest sequence.
    pub fn longest(&self) -> usize {
        self.0.iter().copied().max().unwrap_or(0)
    }
}

/// Head geometry of an attention whose queries, keys and values lie side by side in one matrix:
/// `num_heads` query heads, then `num_kv_heads` key heads, then as many value heads, each
/// `head_dim` columns wide.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Columns of a head.
    pub head_dim: usize,
    /// Factor on query·key before the softmax, usually `1/√head_dim`.
    pub scale: f32,
}

impl AttentionShape {
    /// Columns of the stacked query, key and value matrix.
    pub fn qkv_cols(&self) -> usize {
        (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
    }
}

/// Cosines and sines of rotary embeddings, `[positions, head_dim / 2]` each, f32 row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeTables {
    /// Half the head dimension: number of angles.
    pub half_dim: usize,
    /// `cos(position · frequency_j)`.
    pub cos: Vec<f32>,
    /// `sin(position · frequency_j)`.
    pub sin: Vec<f32>,
}

/// Element-wise activation of an MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x · σ(x)`.
    Silu,
    /// `max(x, 0)`.
    Relu,
    /// `x · Φ(x)`, exact.
    Gelu,
    /// The tanh approximation of GELU.
    GeluTanh,
}

/// Operations of a decoder block. Inputs named `x` are `[tokens, features]`.
///
/// Operations whose result only feeds matrix products (norms, attention, activations) return it in
/// the element type of the backend's products; everything else returns f32.
pub trait BlockOps: Storage {
    /// Lays out weights `[out_i, in]`, stacked along `out`, for [`linear`](Self::linear).
    ///
    /// # Errors
    /// Weights of different widths; out of device memory.
    fn prepare(&self, weights: &[&Self::Matrix]) -> Result<Self::Weight>;

    /// `x Wᵀ + bias`: `[tokens, in] × [out, in] → [tokens, out]`, f32. `bias` is `[1, out]`.
    ///
    /// # Errors
    /// Shapes that do not fit; device failure.
    fn linear(
        &self,
        x: &Self::Matrix,
        weight: &Self::Weight,
        bias: Option<&Self::Matrix>,
    ) -> Result<Self::Matrix>;

    /// `residual += x Wᵀ + bias`: a linear that writes into the residual stream, without a matrix
    /// in between.
    ///
    /// # Errors
    /// Shapes that do not fit; device failure.
    fn linear_add(
        &self,
        residual: &mut Self::Matrix,
        x: &Self::Matrix,
        weight: &Self::Weight,
        bias: Option<&Self::Matrix>,
    ) -> Result<()>;

    /// `activation(gate) · up` of `x Wᵀ + bias`, whose outputs are the gates and then as many ups,
    /// without a matrix in between.
    ///
    /// # Errors
    /// Shapes that do not fit; device failure.
    fn linear_gated(
        &self,
        x: &Self::Matrix,
        weight: &Self::Weight,
        bias: Option<&Self::Matrix>,
        activation: Activation,
    ) -> Result<Self::Matrix>;

    /// `x / √(mean(x²) + eps) · gain`, row by row, sums in f32 or better. `gain` is `[1, features]`.
    ///
    /// # Errors
    /// Shapes that do not fit; device failure.
    fn rms_norm(&self, x: &Self::Matrix, gain: &Self::Matrix, eps: f32) -> Result<Self::Matrix>;

    /// `(x − mean) / √(var + eps) · gain + bias`, row by row.
    ///
    /// # Errors
    /// Shapes that do not fit; device failure.
    fn layer_norm(
        &self,
        x: &Self::Matrix,
        gain: &Self::Matrix,
        bias: &Self::Matrix,
        eps: f32,
    ) -> Result<Self::Matrix>;

    /// Rotates query and key heads of a stacked `qkv` matrix in place, half-split as in Hugging
    /// Face models: `(a, b) → (a cos − b sin, b cos + a sin)` with `a = head[j]`,
    /// `b = head[j + head_dim/2]`; positions count from 0 in each sequence. Values are
    /// not rotated. The result feeds attention only, so that a backend may round it to the type of
    /// its products.
    ///
    /// # Errors
    /// Shapes that do not fit; device failure.
    fn rope(
        &self,
        qkv: &mut Self::Matrix,
        shape: &AttentionShape,
        tables: &RopeTables,
        lens: &SequenceLens,
    ) -> Result<()>;

    /// Whether [`causal_attention`](Self::causal_attention) takes heads of this shape, for those who would
    /// do other work first.
    ///
    /// # Errors
    /// That of the attention itself, where the device has no way to compute it.
    fn check_attention(&self, _shape: &AttentionShape) -> Result<()> {
        Ok(())
    }

    /// Causal softmax attention, each sequence by itself: `[tokens, qkv_cols] → [tokens, num_heads
    /// · head_dim]`. Never holds a tokens × tokens matrix for more than a block of queries.
    ///
    /// # Errors
    /// Shapes that do not fit; device failure.
    fn causal_attention(
        &self,
        qkv: &Self::Matrix,
        shape: &AttentionShape,
        lens: &SequenceLens,
    ) -> Result<Self::Matrix>;

    /// `activation(x)`.
    ///
    /// # Errors
    /// Device failure.
    fn activation(&self, x: &Self::Matrix, activation: Activation) -> Result<Self::Matrix>;

    /// Negative log-likelihood `ln Σ exp(logits) − logits[target]` of each row, in f64.
    ///
    /// # Errors
    /// A target beyond the columns; device failure.
    fn token_nll(&self, logits: &Self::Matrix, targets: &[u32]) -> Result<Vec<f64>>;
}
