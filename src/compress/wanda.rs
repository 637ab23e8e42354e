//! Wanda (Sun et al. 2023, arXiv 2306.11695): the lowest `|w_ij| · ‖x_j‖₂` of every row; the
//! remaining weights are not changed.

use std::time::Instant;

use super::{Layer, LayerReport, LayerSolver, SolveError, SolveTimes, Solved};
use crate::{
    backend::Backend,
    calibration::{StatKind, Statistic},
};

/// Zeroes the lowest `|w| · ‖x_j‖` of every row (or group for n:m).
#[derive(Debug, Clone, Copy)]
pub struct Wanda;

impl<B: Backend> LayerSolver<B> for Wanda {
    fn needs(&self) -> StatKind {
        StatKind::ColumnNorm
    }

    fn solve(
        &self,
        b: &B,
        layers: Vec<Layer<B>>,
        statistic: &mut Statistic<B>,
        times: &mut SolveTimes,
    ) -> Result<Vec<Solved<B>>, SolveError> {
        let squares = feature_squares(b, &layers, statistic)?;
        let norms: Vec<f32> = squares.iter().map(|square| square.sqrt()).collect();
        let scale = b.upload(&norms, 1, norms.len())?;
        let dead_features = squares.iter().filter(|&&square| square == 0.0).count();

        layers
            .into_iter()
            .map(|layer| {
                let (rows, cols) = b.shape(&layer.weight);
                super::check_layer(&layer, cols)?;
                let start = Instant::now();
                let mut weight = b.duplicate(&layer.weight)?;
                if let Some(sparsity) = layer.sparsity {
                    b.zero_lowest(&mut weight, Some(&scale), sparsity.per_row(cols))?;
                }
                times.sweep_secs += start.elapsed().as_secs_f64();

                let start = Instant::now();
                let dense = b.download(&layer.weight)?;
                let pruned = b.download(&weight)?;
                let relative_error = diagonal_error(&dense, &pruned, &squares);
                times.error_secs += start.elapsed().as_secs_f64();
                Ok(Solved {
                    weight,
                    rounding: None,
                    report: LayerReport {
                        zeroed: layer
                            .sparsity
                            .map_or(0, |sparsity| (sparsity.zeros_of(cols) * rows) as u64),
                        relative_error: Some(relative_error),
                        dead_features,
                        ..LayerReport::new(layer.name, rows * cols)
                    },
                })
            })
            .collect()
    }
}

/// `‖x_j‖²` of every input feature, up to a common factor, which changes no ranking within a row:
/// a Hessian has twice the mean over sequences on its diagonal.
fn feature_squares<B: Backend>(
    b: &B,
    layers: &[Layer<B>],
    statistic: &Statistic<B>,
) -> Result<Vec<f32>, SolveError> {
    if statistic.kind() == StatKind::Hessian {
        let h = super::statistic_matrix(layers, statistic, StatKind::Hessian)?;
        return Ok(b.diagonal(h)?);
    }
    let squares = super::statistic_matrix(layers, statistic, StatKind::ColumnNorm)?;
    Ok(b.download(squares)?)
}

/// `Σ (w − ŵ)² ‖x_j‖² / Σ w² ‖x_j‖²`: the output error if features were uncorrelated.
fn diagonal_error(dense: &[f32], pruned: &[f32], squares: &[f32]) -> f64 {
    let (mut lost, mut all) = (0.0, 0.0);
    for (dense, pruned) in dense.chunks(squares.len()).zip(pruned.chunks(squares.len())) {
        for ((&w, &q), &square) in dense.iter().zip(pruned).zip(squares) {
            lost += f64::from(w - q).powi(2) * f64::from(square);
            all += f64::from(w).powi(2) * f64::from(square);
        }
    }
    if all > 0.0 { lost / all } else { 0.0 }
}
