//! Statistics of activations that the solvers need.

use super::{Result, Storage};

/// Accumulation of activation statistics.
pub trait StatOps: Storage {
    /// Lower triangle of `h += xᵀx`; the strict upper triangle of `h` stays unspecified.
    ///
    /// # Shapes
    /// `h: [features, features]` f32, `x: [tokens, features]`.
    ///
    /// # Errors
    /// Shapes that do not fit; device failure.
    fn gram_accumulate(&self, h: &mut Self::Matrix, x: &Self::Matrix) -> Result<()>;

    /// `c += aᵀb`.
    ///
    /// # Shapes
    /// `c: [m, n]` f32, `a: [tokens, m]`, `b: [tokens, n]`.
    ///
    /// # Errors
    /// Shapes that do not fit; device failure.
    fn cross_accumulate(
        &self,
        c: &mut Self::Matrix,
        a: &Self::Matrix,
        b: &Self::Matrix,
    ) -> Result<()>;

    /// Multiplies each row of `x` with its factor.
    ///
    /// # Errors
    /// Another number of factors than rows; device failure.
    fn scale_rows(&self, x: &mut Self::Matrix, factors: &[f32]) -> Result<()>;

    /// `sums[j] += Σ_t x[t, j]²`, sums of a call in f32 or better.
    ///
    /// # Shapes
    /// `sums: [1, features]` f32, `x: [tokens, features]`.
    ///
    /// # Errors
    /// Shapes that do not fit; device failure.
    fn column_sq_norm(&self, sums: &mut Self::Matrix, x: &Self::Matrix) -> Result<()>;

    /// Rows of `x` that hold a NaN or an infinity.
    ///
    /// # Errors
    /// Device failure.
    fn count_non_finite_rows(&self, x: &Self::Matrix) -> Result<usize>;
}
