//! SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774), Algorithm 1, and GPTQ (Frantar et al. 2022,
//! arXiv 2210.17323): a sweep that prunes, rounds, or does both.
//!
//! | letter | meaning | shape | in the paper |
//! |---|---|---|---|
//! | `w` | weights, becoming the stored weights column by column | `[d_row, d_col]` | W |
//! | `h` | Hessian of the layer-wise loss, `2/n XXᵀ` | `[d_col, d_col]` | H, eq. 3 |
//! | `u` | upper Cholesky factor of `(H + λI)⁻¹` | `[d_col, d_col]` | H⁻¹ after line 3 |
//! | `err` | scaled errors of one column block | `[d_row, B]` | E, line 11 |
//! | `λ` | `damp · mean(diag H)`, or by feature `damp · H_jj` | | λ, §4 |
//!
//! Rows are independent given `u`; columns are visited left to right. Inside a column block of `B`
//! columns errors move at once ([`SolveOps::obs_sweep`](crate::backend::SolveOps::obs_sweep)); the
//! columns to the right of the block receive them in one product (line 15). The mask of a block is
//! chosen when the sweep reaches it (mask block = column block), or group by group for n:m. A weight
//! that is not pruned is rounded to the layer's grid, and its error moves on in the same way (SparseGPT
//! §3.4), so later prunes see earlier rounding.
//!
//! With activation order the two are done one after the other, on the same Hessian: a sweep in column
//! order prunes (masks compare columns of every kind, and n:m whole groups), and a second rounds what it
//! left, its zeros fixed, in the order of descending `diag H`.
//!
//! The scales of a group are chosen when the sweep reaches it, from the weights as errors have left
//! them and as pruning the group will leave them. Those of whole rows, and all of them with activation
//! order, are chosen before the first column that is rounded, after a sweep that only prunes, if anything
//! is pruned.
//!
//! Deviations from the reference implementations:
//! * an unstructured column block loses exactly `⌊sparsity · rows · B⌋` weights, where the
//!   reference's `<= threshold` takes one more (and all ties);
//! * damping is in proportion to each entry of the diagonal unless [`Damping::Mean`] is asked for;
//! * a Hessian that is not positive definite is damped ×10 up to three times, and each try is
//!   reported; after that the layer fails. The reference stops at the first failure, others fall
//!   back to an identity Hessian in silence;
//! * where groups (of n:m, or of scales chosen in the sweep) do not divide `B`, the column block becomes
//!   a multiple of them;
//! * GPTQ's reference chooses the scales of a group inside a column block before the block's own errors
//!   have moved; here they have.

use std::{ops::Range, time::Instant};

use super::{
    Damping, Layer, LayerReport, LayerSolver, Method, SolveError, SolveTimes, Solved,
    SolverOptions, Sparsity,
};
use crate::{
    backend::{Backend, BackendError, SweepRule},
    calibration::{StatKind, Statistic},
};

/// How often damping grows tenfold before a Hessian is given up.
const MAX_DAMP_INCREASES: u32 = 3;

/// The solver of SparseGPT, GPTQ, and of both at once.
#[derive(Debug, Clone, Copy)]
pub struct Obs {
    options: SolverOptions,
    /// Chooses what becomes zero before the sweep, where the sweep does not.
    pruner: Option<Method>,
}

/// The Hessian of layers that share an input, ready for their sweeps.
struct Factor<M> {
    u: M,
    /// `1 / u_jj²` of each feature: what an error in its column costs.
    cost: Vec<f32>,
    damp: f64,
    /// Features that are zero on every token.
    dead: Vec<usize>,
    /// The feature at each position of the sweep, where that is not the position itself.
    order: Option<Vec<usize>>,
}

/// The factors that layers with a common input need.
struct Factors<M> {
    /// Of the sweep that rounds; and prunes, if there is no other.
    sweep: Factor<M>,
    /// Of the sweep that prunes before, where the other has another order.
    pruning: Option<Factor<M>>,
}

impl<M> Factors<M> {
    /// The higher damping.
    fn damp(&self) -> f64 {
        self.pruning.as_ref().map_or(self.sweep.damp, |pruning| pruning.damp.max(self.sweep.damp))
    }
}

impl Obs {
    /// A solver with these settings. With a `pruner`, its zeros stay and the sweep only rounds.
    pub fn new(options: SolverOptions, pruner: Option<Method>) -> Self {
        Self { options, pruner }
    }

    /// The same, but columns are taken as they stand.
    fn by_column(&self) -> Self {
        Self { options: SolverOptions { act_order: false, ..self.options }, ..*self }
    }

    /// Factorises the Hessian of the layers, and leaves it as it was.
    fn factor<B: Backend>(
        &self,
        b: &B,
        h: &mut B::Matrix,
        layer: &str,
    ) -> Result<Factor<B::Matrix>, SolveError> {
        let diagonal = b.diagonal(h)?;
        let dead: Vec<usize> = (0..diagonal.len()).filter(|&j| diagonal[j] == 0.0).collect();
        let order = self.options.act_order.then(|| descending(&diagonal));
        // Features that are zero on every token have a zero row, which a one on the diagonal makes
        // invertible; outside the factor they count for nothing, and their weights are zeroed.
        b.set_diagonal(h, &dead.iter().map(|&j| (j, 1.0)).collect::<Vec<_>>())?;
        let factored = match &order {
            Some(order) => {
                let mut permuted = b.permute_symmetric(h, order)?;
                factor(b, &mut permuted, self.options, layer)
            }
            None => factor(b, h, self.options, layer),
        };
        b.set_diagonal(h, &diagonal.into_iter().enumerate().collect::<Vec<_>>())?;
        let (u, damp) = factored?;
        let swept: Vec<f32> = b.diagonal(&u)?.iter().map(|u| 1.0 / (u * u)).collect();
        let mut cost = swept.clone();
        for (position, &feature) in order.iter().flatten().enumerate() {
            cost[feature] = swept[position];
        }
        Ok(Factor { u, cost, damp, dead, order })
    }

    /// Prunes and rounds one layer. `pruned` has the zeros that are to stay.
    fn sweep<B: Backend>(
        &self,
        b: &B,
        layer: &mut Layer<B>,
        pruned: Option<&B::Matrix>,
        factor: &Factor<B::Matrix>,
    ) -> Result<Option<B::Rounding>, SolveError> {
        let (rows, cols) = b.shape(&layer.weight);
        b.zero_columns(&mut layer.weight, &factor.dead)?;
        let mut rounding = layer.grid.map(|grid| b.rounding(grid, rows, cols)).transpose()?;
        // Columns whose scales the sweep chooses at a time.
        let mut span = layer.grid.map_or(1, |grid| grid.span(cols));
        if let (Some(rounding), Some(grid)) = (&mut rounding, layer.grid)
            && (factor.order.is_some() || span == cols)
        {
            // With an order, what becomes zero is zero already.
            let prunes = pruned.is_some() || layer.sparsity.is_some();
            if prunes && factor.order.is_none() && grid.foresees_pruning() {
                let mut settled = layer.to_prune(b)?;
                self.sweep(b, &mut settled, pruned, factor)?;
                b.choose_scales(&settled.weight, Some(&factor.cost), rounding)?;
            } else {
                b.choose_scales(pruned.unwrap_or(&layer.weight), Some(&factor.cost), rounding)?;
            }
            b.fix_scales(rounding);
            span = 1;
        }
        let mut permuted = None;
        if let Some(order) = &factor.order {
            layer.weight = b.permute_columns(&layer.weight, order)?;
            permuted = pruned.map(|pruned| b.permute_columns(pruned, order)).transpose()?;
            if let Some(rounding) = &mut rounding {
                b.set_order(rounding, order)?;
            }
        }
        let pruned = permuted.as_ref().or(pruned);
        let sparsity = layer.sparsity.filter(|_| pruned.is_none());
        let blocks = column_blocks(cols, self.options.column_block, sparsity, span);
        let ruled = blocks.map(|block| {
            let rule = match (sparsity, pruned) {
                (_, Some(pruned)) => SweepRule::ZerosOf(pruned),
                (Some(sparsity), None) => block_rule(sparsity, rows, block.len()),
                (None, None) => SweepRule::Nothing,
            };
            (block, rule)
        });
        sweep_layer(b, &mut layer.weight, &factor.u, ruled, rounding.as_mut())?;
        if let Some(order) = &factor.order {
            layer.weight = b.permute_columns(&layer.weight, &inverse(order))?;
        }
        Ok(rounding)
    }

    /// Prunes and rounds one layer, and measures what that costs. `pruned` is what the pruner made of
    /// it.
    fn solve_layer<B: Backend>(
        &self,
        b: &B,
        mut layer: Layer<B>,
        pruned: Option<Solved<B>>,
        factors: &Factors<B::Matrix>,
        h: &B::Matrix,
        times: &mut SolveTimes,
    ) -> Result<Solved<B>, SolveError> {
        let (rows, cols) = b.shape(&layer.weight);
        let dense = b.duplicate(&layer.weight)?;
        let zeroed = match (&pruned, layer.sparsity) {
            (Some(pruned), _) => pruned.report.zeroed,
            (None, Some(sparsity)) => {
                Method::SparseGpt.zeros(sparsity, rows, cols, self.options) as u64
            }
            (None, None) => 0,
        };
        let mut pruned = pruned.map(|solved| solved.weight);

        let start = Instant::now();
        if let Some(factor) = &factors.pruning {
            let mut swept = layer.to_prune(b)?;
            self.by_column().sweep(b, &mut swept, pruned.as_ref(), factor)?;
            layer.weight = b.duplicate(&swept.weight)?;
            pruned = Some(swept.weight);
        }
        let kept = pruned.as_ref().or(layer.keep_zeros.then_some(&dense));
        let rounding = self.sweep(b, &mut layer, kept, &factors.sweep)?;
        let rounding = rounding.map(|rounding| b.fetch_rounding(rounding)).transpose()?;
        b.finish()?;
        times.sweep_secs += start.elapsed().as_secs_f64();

        let start = Instant::now();
        let all = b.quadratic_form(&dense, None, h)?;
        let relative = |weight: &B::Matrix| -> Result<f64, BackendError> {
            let lost = b.quadratic_form(&dense, Some(weight), h)?;
            Ok(if all > 0.0 { lost / all } else { 0.0 })
        };
        let nearest_error = match layer.grid {
            Some(grid) => {
                let mut nearest = b.duplicate(&dense)?;
                b.copy_zeros(&mut nearest, &layer.weight)?;
                let mut rounding = b.rounding(grid, rows, cols)?;
                b.choose_scales(&nearest, None, &mut rounding)?;
                b.round(&mut nearest, &mut rounding)?;
                Some(relative(&nearest)?)
            }
            None => None,
        };
        let relative_error = relative(&layer.weight)?;
        times.error_secs += start.elapsed().as_secs_f64();
        Ok(Solved {
            report: LayerReport {
                zeroed,
                relative_error: Some(relative_error),
                nearest_error,
                damp: Some(factors.damp()),
                dead_features: factors.sweep.dead.len(),
                ..LayerReport::new(layer.name, rows * cols)
            },
            weight: layer.weight,
            rounding,
        })
    }
}

impl<B: Backend> LayerSolver<B> for Obs {
    fn needs(&self) -> StatKind {
        StatKind::Hessian
    }

    fn solve(
        &self,
        b: &B,
        layers: Vec<Layer<B>>,
        statistic: &mut Statistic<B>,
        times: &mut SolveTimes,
    ) -> Result<Vec<Solved<B>>, SolveError> {
        super::statistic_matrix(&layers, statistic, StatKind::Hessian)?;
        let Some(first) = layers.first().map(|layer| layer.name.clone()) else {
            return Ok(Vec::new());
        };
        for layer in &layers {
            super::check_layer(layer, b.shape(&layer.weight).1)?;
        }
        let pruned = match self.pruner {
            Some(method) => {
                let copies =
                    layers.iter().map(|layer| layer.to_prune(b)).collect::<Result<_, _>>()?;
                let pruner = super::solver::<B>(Some(method), None, self.by_column().options);
                Some(pruner.solve(b, copies, statistic, times)?)
            }
            None => None,
        };
        let prunes = pruned.is_some() || layers.iter().any(|layer| layer.sparsity.is_some());
        let Some(h) = statistic.matrix_mut() else { return Ok(Vec::new()) };

        let start = Instant::now();
        let factors = Factors {
            sweep: self.factor(b, h, &first)?,
            pruning: (prunes && self.options.act_order)
                .then(|| self.by_column().factor(b, h, &first))
                .transpose()?,
        };
        b.finish()?;
        times.factor_secs += start.elapsed().as_secs_f64();

        let mut pruned = pruned.map(Vec::into_iter);
        layers
            .into_iter()
            .map(|layer| {
                let pruned = pruned.as_mut().and_then(Iterator::next);
                self.solve_layer(b, layer, pruned, &factors, h, times)
            })
            .collect()
    }
}

/// Indices by descending value, equal ones as they stand.
fn descending(values: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
    order
}

fn inverse(order: &[usize]) -> Vec<usize> {
    let mut inverse = vec![0; order.len()];
    for (position, &index) in order.iter().enumerate() {
        inverse[index] = position;
    }
    inverse
}

/// `u` for `h` with damping, and the damping that was needed. Leaves `h` with another diagonal.
fn factor<B: Backend>(
    b: &B,
    h: &mut B::Matrix,
    SolverOptions { damp, damping, .. }: SolverOptions,
    layer: &str,
) -> Result<(B::Matrix, f64), SolveError> {
    let diagonal = b.diagonal(h)?;
    let mean = diagonal.iter().map(|&d| f64::from(d)).sum::<f64>() / diagonal.len().max(1) as f64;
    let mut tried = damp;
    for attempt in 0..=MAX_DAMP_INCREASES {
        let added = match damping {
            Damping::Mean => tried * mean,
            Damping::Feature => {
                let damped = |(j, d): (usize, &f32)| (j, (f64::from(*d) * (1.0 + tried)) as f32);
                let entries: Vec<_> = diagonal.iter().enumerate().map(damped).collect();
                b.set_diagonal(h, &entries)?;
                0.0
            }
        };
        match b.inverse_factor_upper(h, added) {
            Ok(u) => return Ok((u, tried)),
            Err(BackendError::NotPositiveDefinite { pivot }) if attempt == MAX_DAMP_INCREASES => {
                return Err(SolveError::NotPositiveDefinite {
                    layer: layer.to_owned(),
                    pivot,
                    damp: tried,
                });
            }
            Err(BackendError::NotPositiveDefinite { pivot }) => {
                tracing::warn!(
                    layer,
                    pivot,
                    damp = tried,
                    "Hessian not positive definite, damping tenfold"
                );
                tried *= 10.0;
            }
            Err(other) => return Err(other.into()),
        }
    }
    unreachable!("the last attempt returns")
}

/// Column blocks of width `column_block`, made a multiple of `m` for n:m and of `span`, the columns
/// whose scales are chosen at a time; the last may be narrower.
pub fn column_blocks(
    cols: usize,
    column_block: usize,
    sparsity: Option<Sparsity>,
    span: usize,
) -> impl Iterator<Item = Range<usize>> {
    let group = match sparsity {
        Some(Sparsity::NofM { m, .. }) => m,
        Some(Sparsity::Unstructured(_)) | None => 1,
    };
    // A group of scales is whole groups of n:m.
    let unit = group.max(span).max(1);
    let width = column_block.max(unit) / unit * unit;
    (0..cols).step_by(width).map(move |start| start..(start + width).min(cols))
}

/// The rule for a block of `rows × width` weights.
fn block_rule<'a, M>(sparsity: Sparsity, rows: usize, width: usize) -> SweepRule<'a, M> {
    match sparsity {
        Sparsity::Unstructured(_) => SweepRule::Lowest { zeros: sparsity.zeros_of(rows * width) },
        Sparsity::NofM { n, m } => SweepRule::Group { zeros: m - n, m },
    }
}

/// Lines 5 to 16 of Algorithm 1: sweeps `w` block by block.
///
/// # Shapes
/// `w: [d_row, d_col]` f32, `u: [d_col, d_col]` upper triangular; the blocks cover the columns in
/// order.
///
/// # Errors
/// Device failure.
pub fn sweep_layer<'a, B: Backend>(
    b: &B,
    w: &mut B::Matrix,
    u: &B::Matrix,
    blocks: impl Iterator<Item = (Range<usize>, SweepRule<'a, B::Matrix>)>,
    mut rounding: Option<&mut B::Rounding>,
) -> Result<(), BackendError>
where
    B::Matrix: 'a,
{
    for (columns, rule) in blocks {
        let err = b.obs_sweep(w, u, columns.clone(), rule, rounding.as_deref_mut())?;
        b.trailing_update(w, &err, u, columns)?;
    }
    Ok(())
}
