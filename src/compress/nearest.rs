//! Rounding to the nearest value of the grid, without calibration.

use std::time::Instant;

use super::{
    Layer, LayerReport, LayerSolver, Method, SolveError, SolveTimes, Solved, SolverOptions,
};
use crate::{
    backend::Backend,
    calibration::{StatKind, Statistic},
};

/// Rounds every weight to the nearest value; scales are chosen for the least squared error of the
/// weights, or as the grid says. Zeros stay where the grid has a zero.
#[derive(Debug, Clone, Copy)]
pub struct Nearest {
    options: SolverOptions,
    /// Prunes first.
    pruner: Option<Method>,
}

impl Nearest {
    /// Rounds what `pruner`, with these settings, leaves, if there is one.
    pub fn new(options: SolverOptions, pruner: Option<Method>) -> Self {
        Self { options, pruner }
    }
}

impl<B: Backend> LayerSolver<B> for Nearest {
    fn needs(&self) -> StatKind {
        self.pruner.map_or(StatKind::None, Method::needs)
    }

    fn solve(
        &self,
        b: &B,
        layers: Vec<Layer<B>>,
        statistic: &mut Statistic<B>,
        times: &mut SolveTimes,
    ) -> Result<Vec<Solved<B>>, SolveError> {
        let mut dense = Vec::new();
        for layer in &layers {
            let cols = b.shape(&layer.weight).1;
            super::check_layer(layer, cols)?;
            // What the error is measured against, where that is possible.
            let known = statistic.kind() == StatKind::Hessian;
            dense.push(known.then(|| b.duplicate(&layer.weight)).transpose()?);
        }
        let grids: Vec<_> = layers.iter().map(|layer| layer.grid).collect();
        let mut solved: Vec<Solved<B>> = match self.pruner {
            Some(method) => {
                let pruner = super::solver::<B>(Some(method), None, self.options);
                let layers = layers.into_iter().map(|layer| Layer { grid: None, ..layer });
                pruner.solve(b, layers.collect(), statistic, times)?
            }
            None => layers.into_iter().map(|layer| unpruned(b, layer)).collect(),
        };
        for ((solved, grid), dense) in solved.iter_mut().zip(grids).zip(dense) {
            let Some(grid) = grid else { continue };
            let start = Instant::now();
            let (rows, cols) = b.shape(&solved.weight);
            let mut rounding = b.rounding(grid, rows, cols)?;
            b.choose_scales(&solved.weight, None, &mut rounding)?;
            b.round(&mut solved.weight, &mut rounding)?;
            solved.rounding = Some(b.fetch_rounding(rounding)?);
            times.sweep_secs += start.elapsed().as_secs_f64();

            let start = Instant::now();
            solved.report.relative_error = match (&dense, statistic.matrix()) {
                (Some(dense), Some(h)) => {
                    let lost = b.quadratic_form(dense, Some(&solved.weight), h)?;
                    let all = b.quadratic_form(dense, None, h)?;
                    Some(if all > 0.0 { lost / all } else { 0.0 })
                }
                // A pruner's own measure does not count what rounding adds.
                _ => None,
            };
            times.error_secs += start.elapsed().as_secs_f64();
        }
        Ok(solved)
    }
}

fn unpruned<B: Backend>(b: &B, layer: Layer<B>) -> Solved<B> {
    let (rows, cols) = b.shape(&layer.weight);
    let report = LayerReport::new(layer.name, rows * cols);
    Solved { weight: layer.weight, rounding: None, report }
}
