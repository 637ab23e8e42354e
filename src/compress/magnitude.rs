//! Magnitude pruning: the lowest `|w|` of a layer, without calibration.

use std::time::Instant;

use super::{Layer, LayerReport, LayerSolver, SolveError, SolveTimes, Solved};
use crate::{
    backend::Backend,
    calibration::{StatKind, Statistic},
};

/// Zeroes the lowest `|w|`, layer by layer (or group by group for n:m).
#[derive(Debug, Clone, Copy)]
pub struct Magnitude;

impl<B: Backend> LayerSolver<B> for Magnitude {
    fn needs(&self) -> StatKind {
        StatKind::None
    }

    fn solve(
        &self,
        b: &B,
        layers: Vec<Layer<B>>,
        _: &mut Statistic<B>,
        times: &mut SolveTimes,
    ) -> Result<Vec<Solved<B>>, SolveError> {
        let start = Instant::now();
        let solved = layers
            .into_iter()
            .map(|mut layer| {
                let (rows, cols) = b.shape(&layer.weight);
                super::check_layer(&layer, cols)?;
                let mut zeroed = 0;
                if let Some(sparsity) = layer.sparsity {
                    b.zero_lowest(&mut layer.weight, None, sparsity.per_tensor(rows, cols))?;
                    zeroed = sparsity.zeros_of(rows * cols) as u64;
                }
                Ok(Solved {
                    weight: layer.weight,
                    rounding: None,
                    report: LayerReport { zeroed, ..LayerReport::new(layer.name, rows * cols) },
                })
            })
            .collect();
        times.sweep_secs += start.elapsed().as_secs_f64();
        solved
    }
}
