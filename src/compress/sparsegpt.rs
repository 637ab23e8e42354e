//! SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774), Algorithm 1.
//!
//! | letter | meaning | shape | in the paper |
//! |---|---|---|---|
//! | `w` | weights, becoming the pruned weights column by column | `[d_row, d_col]` | W |
//! | `h` | Hessian of the layer-wise loss, `2/n XXᵀ` | `[d_col, d_col]` | H, eq. 3 |
//! | `u` | upper Cholesky factor of `(H + λI)⁻¹` | `[d_col, d_col]` | H⁻¹ after line 3 |
//! | `err` | scaled errors of one column block | `[d_row, B]` | E, line 11 |
//! | `λ` | `damp · mean(diag H)` | | λ, §4 |
//!
//! Rows are independent given `u`; columns are visited left to right. Inside a column block of `B`
//! columns errors move at once ([`SolveOps::obs_sweep`](crate::backend::SolveOps::obs_sweep)); the
//! columns to the right of the block receive them in one product (line 15). The mask of a block is
//! chosen when the sweep reaches it (mask block = column block), or group by group for n:m.
//!
//! Deviations from the reference implementation:
//! * an unstructured column block loses exactly `⌊sparsity · rows · B⌋` weights, where the
//!   reference's `<= threshold` takes one more (and all ties);
//! * a Hessian that is not positive definite is damped ×10 up to three times, and each try is
//!   reported; after that the layer fails. The reference stops at the first failure, others fall
//!   back to an identity Hessian in silence;
//! * for n:m with `m` not dividing `B`, the column block shrinks to a multiple of `m`.

use std::{ops::Range, time::Instant};

use super::{
    Layer, LayerReport, LayerSolver, Method, SolveError, SolveTimes, Solved, SolverOptions,
    Sparsity,
};
use crate::{
    backend::{Backend, BackendError, SweepRule},
    calibration::{StatKind, Statistic},
};

/// How often damping grows tenfold before a Hessian is given up.
const MAX_DAMP_INCREASES: u32 = 3;

/// The SparseGPT solver.
#[derive(Debug, Clone, Copy)]
pub struct SparseGpt {
    options: SolverOptions,
}

impl SparseGpt {
    /// A solver with these settings.
    pub fn new(options: SolverOptions) -> Self {
        Self { options }
    }
}

impl<B: Backend> LayerSolver<B> for SparseGpt {
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
        let Some(h) = statistic.matrix_mut() else { return Ok(Vec::new()) };

        let start = Instant::now();
        let dead = dead_features(b, h)?;
        // A one on the diagonal makes a dead feature's zero row invertible; outside the factor the
        // feature counts for nothing.
        set_diagonal(b, h, &dead, 1.0)?;
        let factored = factor(b, h, self.options.damp, &first);
        set_diagonal(b, h, &dead, 0.0)?;
        let (u, damp) = factored?;
        times.factor_secs += start.elapsed().as_secs_f64();

        layers
            .into_iter()
            .map(|mut layer| {
                let (rows, cols) = b.shape(&layer.weight);
                super::check_groups(&layer.name, layer.sparsity, cols)?;
                let dense = b.duplicate(&layer.weight)?;

                let start = Instant::now();
                b.zero_columns(&mut layer.weight, &dead)?;
                let blocks = column_blocks(cols, self.options.column_block, layer.sparsity);
                let ruled = blocks.map(|block| {
                    let rule = block_rule(layer.sparsity, rows, block.len());
                    (block, rule)
                });
                sweep_layer(b, &mut layer.weight, &u, ruled)?;
                times.sweep_secs += start.elapsed().as_secs_f64();

                let start = Instant::now();
                let lost = b.quadratic_form(&dense, Some(&layer.weight), h)?;
                let all = b.quadratic_form(&dense, None, h)?;
                times.error_secs += start.elapsed().as_secs_f64();
                Ok(Solved {
                    weight: layer.weight,
                    report: LayerReport {
                        layer: layer.name,
                        weights: (rows * cols) as u64,
                        zeroed: Method::SparseGpt.zeros(layer.sparsity, rows, cols, self.options)
                            as u64,
                        relative_error: Some(if all > 0.0 { lost / all } else { 0.0 }),
                        damp: Some(damp),
                        dead_features: dead.len(),
                        stored_zeros: None,
                    },
                })
            })
            .collect()
    }
}

/// Features that are zero on every token: they have a zero row in `h`, and their weights, which
/// multiply zeros, are pruned first.
fn dead_features<B: Backend>(b: &B, h: &B::Matrix) -> Result<Vec<usize>, BackendError> {
    let diagonal = b.diagonal(h)?;
    Ok((0..diagonal.len()).filter(|&j| diagonal[j] == 0.0).collect())
}

fn set_diagonal<B: Backend>(
    b: &B,
    h: &mut B::Matrix,
    features: &[usize],
    value: f32,
) -> Result<(), BackendError> {
    let entries: Vec<(usize, f32)> = features.iter().map(|&j| (j, value)).collect();
    b.set_diagonal(h, &entries)
}

/// `u` for `h + damp · mean(diag h) · I`, and the damping that was needed.
fn factor<B: Backend>(
    b: &B,
    h: &B::Matrix,
    damp: f64,
    layer: &str,
) -> Result<(B::Matrix, f64), SolveError> {
    let diagonal = b.diagonal(h)?;
    let mean = diagonal.iter().map(|&d| f64::from(d)).sum::<f64>() / diagonal.len().max(1) as f64;
    let mut tried = damp;
    for attempt in 0..=MAX_DAMP_INCREASES {
        match b.inverse_factor_upper(h, tried * mean) {
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

/// Column blocks of width `column_block`, shrunk to a multiple of `m` for n:m; the last may be
/// narrower.
pub fn column_blocks(
    cols: usize,
    column_block: usize,
    sparsity: Sparsity,
) -> impl Iterator<Item = Range<usize>> {
    let width = match sparsity {
        Sparsity::Unstructured(_) => column_block,
        Sparsity::NofM { m, .. } => column_block.max(m) / m * m,
    };
    (0..cols).step_by(width.max(1)).map(move |start| start..(start + width).min(cols))
}

/// The rule for a block of `rows × width` weights.
fn block_rule(sparsity: Sparsity, rows: usize, width: usize) -> SweepRule {
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
pub fn sweep_layer<B: Backend>(
    b: &B,
    w: &mut B::Matrix,
    u: &B::Matrix,
    blocks: impl Iterator<Item = (Range<usize>, SweepRule)>,
) -> Result<(), BackendError> {
    for (columns, rule) in blocks {
        let err = b.obs_sweep(w, u, columns.clone(), rule)?;
        b.trailing_update(w, &err, u, columns)?;
    }
    Ok(())
}
