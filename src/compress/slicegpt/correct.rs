//! Least squares: a sliced weight that makes up for what slicing has done to its inputs so far.
//!
//! The sliced model runs beside the dense one. Where it reads its stream, `x`, in the place of the
//! dense one's, `y`, the best linear guess of `y` is `x tᵀ` with `t = (Σ yᵀx)(Σ xᵀx)⁻¹`, and a weight `w`
//! that read `y` becomes `w t`. Where it writes, `y` is what the stream still lacks, and `t` is the
//! weight itself. Both are drawn towards what plain slicing gives, `t₀`, feature by feature:
//!
//! `t = t₀ + (Σ yᵀx − t₀ Σ xᵀx)(Σ xᵀx + λ diag Σ xᵀx)⁻¹`

use crate::backend::{BackendError, Dense, DenseOps};

/// Sums of what a sliced weight reads, `x`, and of what it is to give, `y`.
#[derive(Debug, Clone)]
pub struct Fit {
    /// `Σ yᵀx`, `[outputs, inputs]`.
    pub cross: Dense,
    /// `Σ xᵀx`, `[inputs, inputs]`; the lower triangle is right.
    pub gram: Dense,
}

impl Fit {
    /// The fitted map, drawn towards `t0` with strength `damp`.
    ///
    /// # Shapes
    /// `t0: [outputs, inputs]`.
    ///
    /// # Errors
    /// Shapes that do not fit; device failure.
    pub fn solve<B: DenseOps>(&self, b: &B, t0: &Dense, damp: f64) -> Result<Dense, BackendError> {
        let gram = self.gram.clone().mirrored();
        let mut missing = b.dense_product(t0, &gram)?.scaled(-1.0);
        missing.add(&self.cross);
        let mut damped = gram;
        let n = damped.cols;
        for j in 0..n {
            let entry = &mut damped.data[j * (n + 1)];
            // A feature that is zero on every token tells nothing, and stays as it is.
            *entry = if *entry > 0.0 { *entry * (1.0 + damp) } else { 1.0 };
        }
        let mut t = b.solve_right(&missing, &damped)?;
        t.add(t0);
        Ok(t)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Precision, cpu::Cpu};

    /// `y = x tᵀ` exactly.
    fn sums(b: &Cpu, x: &Dense, t: &Dense) -> Fit {
        let y = b.dense_product(x, &t.transposed()).unwrap();
        Fit {
            cross: b.dense_product(&y.transposed(), x).unwrap(),
            gram: b.dense_product(&x.transposed(), x).unwrap(),
        }
    }

    #[test]
    fn a_linear_map_is_found_and_damping_draws_towards_the_start() {
        let b = Cpu::new(Precision::F32, Some(1)).unwrap();
        let x: Vec<f32> = (0..24).map(|i| ((i * 7 + i * i) % 11) as f32 - 5.0).collect();
        let x = Dense::new(8, 3, &x).unwrap();
        let t = Dense::new(2, 3, &[1.0, 2.0, -1.0, 0.5, 0.0, 3.0]).unwrap();
        let start = Dense::zeros(2, 3);
        let fit = sums(&b, &x, &t);
        let distance = |found: &Dense, t: &Dense| {
            found.data.iter().zip(&t.data).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt()
        };
        assert!(distance(&fit.solve(&b, &start, 0.0).unwrap(), &t) < 1e-12);
        // From the solution no damping leads away.
        assert!(distance(&fit.solve(&b, &t, 10.0).unwrap(), &t) < 1e-12);
        let (weak, strong) =
            (fit.solve(&b, &start, 0.1).unwrap(), fit.solve(&b, &start, 10.0).unwrap());
        assert!(distance(&weak, &start) > distance(&strong, &start));
        assert!(distance(&weak, &t) < distance(&strong, &t));
    }

    #[test]
    fn a_feature_without_data_stays_as_it_was() {
        let b = Cpu::new(Precision::F32, Some(1)).unwrap();
        let x = Dense::new(3, 2, &[1.0, 0.0, 2.0, 0.0, -1.0, 0.0]).unwrap();
        let fit = sums(&b, &x, &Dense::new(1, 2, &[3.0, 4.0]).unwrap());
        let t = fit.solve(&b, &Dense::new(1, 2, &[0.0, 7.0]).unwrap(), 0.0).unwrap();
        assert!((t.data[0] - 3.0).abs() < 1e-12 && (t.data[1] - 7.0).abs() < 1e-12);
    }
}
