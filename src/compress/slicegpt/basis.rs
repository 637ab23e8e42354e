//! Second moments and their principal directions.

use super::centred_rows;
use crate::backend::{Backend, BackendError, Dense};

/// Second moment of the rows of a stream, summed in f64 over what a device sums in f32.
#[derive(Debug, Clone)]
pub struct Covariance {
    /// `Σ xᵀx`, `[d, d]`; the lower triangle is right.
    sum: Dense,
}

impl Covariance {
    /// Of no rows yet.
    pub fn new(features: usize) -> Self {
        Self { sum: Dense::zeros(features, features) }
    }

    /// Adds the rows of `x: [tokens, d]`.
    ///
    /// # Errors
    /// Device failure.
    pub fn add<B: Backend>(&mut self, b: &B, x: &B::Matrix) -> Result<(), BackendError> {
        let features = b.shape(x).1;
        let mut gram = b.zeros(features, features)?;
        b.gram_accumulate(&mut gram, x)?;
        self.sum.add(&Dense::new(features, features, &b.download(&gram)?)?);
        Ok(())
    }

    /// Makes it that of the rows less each row's own mean over the features.
    pub fn centre(&mut self) {
        let sum = std::mem::replace(&mut self.sum, Dense::zeros(0, 0));
        let once = centred_rows(sum.mirrored());
        self.sum = centred_rows(once.transposed());
    }
}

/// Principal directions of a stream.
#[derive(Debug, Clone)]
pub struct Rotation {
    /// The kept directions in columns, `[d, d']`.
    pub q: Dense,
    /// Variance along every direction, kept ones first, in descending order.
    pub eigenvalues: Vec<f64>,
}

impl Rotation {
    /// The `width` directions of largest variance.
    ///
    /// # Errors
    /// A second moment that is not finite; device failure.
    pub fn principal<B: Backend>(
        b: &B,
        covariance: &Covariance,
        width: usize,
    ) -> Result<Self, BackendError> {
        let eigen = b.symmetric_eigen(&covariance.sum)?;
        Ok(Self { q: eigen.vectors.first_columns(width), eigenvalues: eigen.values })
    }

    /// Share of the variance along the kept directions.
    pub fn kept(&self) -> f64 {
        let positive = |values: &[f64]| values.iter().map(|value| value.max(0.0)).sum::<f64>();
        let all = positive(&self.eigenvalues);
        if all > 0.0 { positive(&self.eigenvalues[..self.q.cols]) / all } else { 1.0 }
    }

    /// Directions with more variance than rounding leaves.
    pub fn rank(&self) -> usize {
        let largest = self.eigenvalues.first().copied().unwrap_or(0.0);
        let floor = largest * f64::EPSILON * self.eigenvalues.len() as f64;
        self.eigenvalues.iter().filter(|&&value| value > floor).count()
    }
}
