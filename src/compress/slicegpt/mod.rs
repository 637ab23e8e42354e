//! SliceGPT (Ashkboos et al. 2024, arXiv 2401.15024): the residual stream is turned into a basis of
//! its principal directions, and the least of them are left out.
//!
//! | letter | meaning | shape | in the paper |
//! |---|---|---|---|
//! | `x` | rows of the residual stream, as they are or each divided by its root mean square | `[tokens, d]` | X |
//! | `c` | their second moment `Σ xᵀx` | `[d, d]` | C, §3.3 |
//! | `q` | its first `d'` eigenvectors, in columns | `[d, d']` | Q D, §3.4 |
//! | `w` | a weight in Hugging Face's orientation | `[out, in]` | Wᵀ |
//!
//! A matrix that reads the stream becomes `w diag(g) q` with the gain `g` of the norm before it, one
//! that writes into it `qᵀ w`. A norm over `d'` columns divides by another mean than the one over `d`:
//! with an epsilon of `eps · d / d'` it is too large by `√(d / d')`, which goes into the readers and not
//! into its gain, so that a gain stays one, exact in any type.
//!
//! All of it is f64: with eigenvalues over ten decades an f32 decomposition loses the smaller ones, and
//! with them the directions at the cut (the paper's Table 4).

mod basis;
mod correct;

pub use basis::{Covariance, Rotation};
pub use correct::Fit;

use crate::backend::{BackendError, Dense, DenseOps};

/// How the directions of the residual stream are chosen.
#[derive(
    Debug,
    Clone,
    Copy,
    Default,
    PartialEq,
    Eq,
    serde::Serialize,
    serde::Deserialize,
    schemars::JsonSchema,
    clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Basis {
    /// One for the whole model, which stays what it was, only narrower.
    #[default]
    Shared,
    /// One before each attention and each MLP, with matrices on the shortcuts between them: the paper's.
    Block,
}

impl Basis {
    /// The name used on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Shared => "shared",
            Self::Block => "block",
        }
    }
}

/// What is done about the error of a slice.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    serde::Serialize,
    serde::Deserialize,
    schemars::JsonSchema,
    clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum Correction {
    /// Weights are fitted, point by point, to what the dense model does on the calibration text.
    LeastSquares,
    /// Nothing.
    None,
}

/// `w diag(gain) q · √(d / d')`: a weight that reads the stream through a norm.
///
/// # Shapes
/// `w: [out, d]`, `gain: [d]`, `q: [d, d']` → `[out, d']`.
///
/// # Errors
/// Shapes that do not fit; device failure.
pub fn reader<B: DenseOps>(
    b: &B,
    w: Dense,
    gain: &[f64],
    q: &Dense,
) -> Result<Dense, BackendError> {
    let scale = (q.rows as f64 / q.cols as f64).sqrt();
    Ok(b.dense_product(&w.scale_columns(gain), q)?.scaled(scale))
}

/// `qᵀ w`: a weight that writes into the stream.
///
/// # Shapes
/// `w: [d, in]`, `q: [d, d']` → `[d', in]`. A bias is a weight with one column.
///
/// # Errors
/// Shapes that do not fit; device failure.
pub fn writer<B: DenseOps>(b: &B, w: &Dense, q: &Dense) -> Result<Dense, BackendError> {
    b.dense_product(&q.transposed(), w)
}

/// Subtracts from each column its mean: what is written has mean zero over the features, and a
/// `LayerNorm` that reads it need not subtract one.
#[must_use]
pub fn centred_rows(mut w: Dense) -> Dense {
    let (rows, cols) = (w.rows, w.cols);
    for j in 0..cols {
        let column = || (0..rows).map(move |i| i * cols + j);
        let mean = column().map(|at| w.data[at]).sum::<f64>() / rows.max(1) as f64;
        column().for_each(|at| w.data[at] -= mean);
    }
    w
}

#[cfg(test)]
mod tests;
