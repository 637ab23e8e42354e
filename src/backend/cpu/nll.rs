//! Loss of next-token prediction.

use rayon::prelude::*;

use super::CpuMatrix;
use super::matrix::shape_error;
use super::simd;
use crate::backend::Result;

/// `ln Σ exp(logits) − logits[target]`: the maximum in f32, the sum in f64.
pub(super) fn token_nll(logits: &CpuMatrix, targets: &[u32]) -> Result<Vec<f64>> {
    const OPERATION: &str = "token_nll";
    let cols = logits.cols;
    if targets.len() != logits.rows {
        let detail = format!("{} targets for {} rows", targets.len(), logits.rows);
        return Err(shape_error(OPERATION, detail));
    }
    if let Some(target) = targets.iter().find(|&&target| target as usize >= cols) {
        return Err(shape_error(OPERATION, format!("target {target} of {cols} columns")));
    }
    let values = logits.widened();
    Ok(values
        .par_chunks_exact(cols.max(1))
        .zip(targets)
        .map_init(Vec::new, |scratch, (row, &target)| {
            let max = simd::max(row);
            let sum: f64 = row
                .chunks(1024)
                .map(|chunk| {
                    scratch.clear();
                    scratch.extend_from_slice(chunk);
                    f64::from(simd::exp_and_sum(scratch, max))
                })
                .sum();
            sum.ln() + f64::from(max) - f64::from(row[target as usize])
        })
        .collect())
}
