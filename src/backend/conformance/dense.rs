//! f64 algebra of small matrices.

use super::*;

/// A few hundred roundings of f64, relative to the largest magnitude there is.
const F64: f64 = 1e-13;

fn dense(rng: &mut ChaCha8Rng, rows: usize, cols: usize) -> Dense {
    let data = (0..rows * cols).map(|_| rng.random_range(-1.0..1.0)).collect();
    Dense { rows, cols, data }
}

/// A symmetric matrix.
fn symmetric(rng: &mut ChaCha8Rng, n: usize) -> Dense {
    let mut a = dense(rng, n, n);
    a.add(&a.transposed());
    a
}

/// `a` with values above the diagonal that are not its own.
fn lower_of(a: &Dense) -> Dense {
    let n = a.cols;
    let mut lower = a.clone();
    let above = (0..n).flat_map(|i| (i + 1..n).map(move |j| i * n + j));
    above.for_each(|at| lower.data[at] = 7e5);
    lower
}

/// `a b` by the definition.
fn naive_product(a: &Dense, b: &Dense) -> Dense {
    let mut out = Dense::zeros(a.rows, b.cols);
    for i in 0..a.rows {
        for j in 0..b.cols {
            let terms = (0..a.cols).map(|k| a.data[i * a.cols + k] * b.data[k * b.cols + j]);
            out.data[i * b.cols + j] = terms.sum();
        }
    }
    out
}

#[track_caller]
fn assert_dense(got: &Dense, expected: &Dense, tolerance: f64, what: &str) {
    assert_eq!((got.rows, got.cols), (expected.rows, expected.cols), "{what}");
    let scale = expected.data.iter().fold(1.0, |most: f64, value| most.max(value.abs()));
    for (i, (got, expected)) in got.data.iter().zip(&expected.data).enumerate() {
        let error = (got - expected).abs();
        assert!(error <= tolerance * scale, "{what} [{i}]: {got} for {expected}: {error:e}");
    }
}

#[track_caller]
fn is_shape_error<T: std::fmt::Debug>(result: Result<T>, expected: &'static str) {
    match result {
        Err(BackendError::Shape { operation, .. }) => assert_eq!(operation, expected),
        other => panic!("{expected}: {other:?}"),
    }
}

pub(super) fn dense_products_follow_the_definition<B: Backend>(t: &Instance<B>) {
    let shapes = [(1, 1, 1), (3, 5, 7), (33, 31, 65), (70, 129, 100), (1, 200, 3), (0, 4, 3)];
    for (seed, (m, k, n)) in shapes.into_iter().enumerate() {
        let rng = &mut rng(seed);
        let (a, b) = (dense(rng, m, k), dense(rng, k, n));
        let product = t.backend.dense_product(&a, &b).unwrap();
        assert_dense(&product, &naive_product(&a, &b), F64, &format!("product {m}x{k}x{n}"));
        is_shape_error(t.backend.dense_product(&a, &Dense::zeros(k + 1, n)), "dense_product");
    }
}

pub(super) fn eigenvectors_are_orthonormal_and_reconstruct<B: Backend>(t: &Instance<B>) {
    for (seed, n) in [1, 2, 3, 7, 33, 64, 97].into_iter().enumerate() {
        let a = symmetric(&mut rng(seed), n);
        let Eigen { values, vectors } = t.backend.symmetric_eigen(&lower_of(&a)).unwrap();
        assert_eq!((values.len(), vectors.rows, vectors.cols), (n, n, n));
        assert!(values.is_sorted_by(|a, b| a >= b), "{n}: {values:?}");
        let what = |of: &str| format!("{of} of {n}");
        let gram = naive_product(&vectors.transposed(), &vectors);
        assert_dense(&gram, &Dense::identity(n, n), F64, &what("orthonormality"));
        let scaled = vectors.clone().scale_columns(&values);
        let again = naive_product(&scaled, &vectors.transposed());
        assert_dense(&again, &a, F64 * n as f64, &what("reconstruction"));
        for j in 0..n {
            let column = (0..n).map(|i| vectors.data[i * n + j]);
            let largest =
                column.fold(0.0, |most: f64, v| if v.abs() > most.abs() { v } else { most });
            assert!(largest > 0.0, "{n}: the largest component of vector {j} is {largest}");
        }
    }
}

/// Small eigenvalues keep their digits beside large ones as far as f64 has them.
pub(super) fn eigenvalues_over_ten_decades_are_found<B: Backend>(t: &Instance<B>) {
    let n = 40;
    let basis = t.backend.symmetric_eigen(&symmetric(&mut rng(8), n)).unwrap().vectors;
    let wanted: Vec<f64> = (0..n).map(|i| 10f64.powf(-(i as f64) / 4.0)).collect();
    let a = naive_product(&basis.clone().scale_columns(&wanted), &basis.transposed());
    let found = t.backend.symmetric_eigen(&a).unwrap();
    for (found, wanted) in found.values.iter().zip(&wanted) {
        assert!((found - wanted).abs() < 1e-14, "{found} for {wanted}");
    }
    // And with them the directions at a cut far below what f32 tells apart.
    let projector = |q: &Dense| naive_product(q, &q.transposed());
    let kept = n - 4;
    let (found, wanted) = (found.vectors.first_columns(kept), basis.first_columns(kept));
    assert_dense(&projector(&found), &projector(&wanted), 1e-4, "projector");
}

/// Of repeated eigenvalues any basis will do.
pub(super) fn equal_eigenvalues_have_a_whole_basis<B: Backend>(t: &Instance<B>) {
    for (n, a) in [(5, Dense::identity(5, 5)), (6, Dense::zeros(6, 6))] {
        let Eigen { values, vectors } = t.backend.symmetric_eigen(&a).unwrap();
        assert_eq!(values, a.diagonal());
        let gram = naive_product(&vectors.transposed(), &vectors);
        assert_dense(&gram, &Dense::identity(n, n), F64, "orthonormality");
    }
    // Twice the same direction with opposite signs: the first of two equal magnitudes is positive.
    let a = Dense::new(2, 2, &[0.0, -1.0, -1.0, 0.0]).unwrap();
    let Eigen { values, vectors } = t.backend.symmetric_eigen(&a).unwrap();
    let half = 0.5f64.sqrt();
    assert_dense(
        &vectors,
        &Dense { rows: 2, cols: 2, data: vec![half, half, -half, half] },
        F64,
        "signs",
    );
    assert!((values[0] - 1.0).abs() < F64 && (values[1] + 1.0).abs() < F64);
}

pub(super) fn what_has_no_eigenvectors_is_refused<B: Backend>(t: &Instance<B>) {
    for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        for at in [0, 3 * 5 + 1, 4 * 5 + 4] {
            let mut a = symmetric(&mut rng(1), 5);
            a.data[at] = bad;
            match t.backend.symmetric_eigen(&a) {
                Err(BackendError::NoEigenvectors { size: 5 }) => {}
                other => panic!("{bad} at {at}: {other:?}"),
            }
        }
    }
    is_shape_error(t.backend.symmetric_eigen(&Dense::zeros(3, 4)), "symmetric_eigen");
}

pub(super) fn solve_right_divides<B: Backend>(t: &Instance<B>) {
    for (seed, (n, m)) in
        [(1, 1), (1, 4), (2, 1), (7, 3), (33, 70), (97, 2), (5, 0)].into_iter().enumerate()
    {
        let rng = &mut rng(seed);
        let g = dense(rng, n, n);
        let mut a = naive_product(&g, &g.transposed());
        a.add(&Dense::identity(n, n));
        let b = dense(rng, m, n);
        let x = t.backend.solve_right(&b, &lower_of(&a)).unwrap();
        assert_eq!((x.rows, x.cols), (m, n));
        // Backward stable: the residual is small whatever the condition of `a`.
        let residual = naive_product(&x, &a);
        assert_dense(&residual, &b, 1e-10, &format!("solve_right {m}x{n}"));
        is_shape_error(t.backend.solve_right(&Dense::zeros(m, n + 1), &a), "solve_right");
    }
    is_shape_error(t.backend.solve_right(&Dense::zeros(2, 3), &Dense::zeros(3, 4)), "solve_right");
}

pub(super) fn solve_right_names_the_pivot<B: Backend>(t: &Instance<B>) {
    let n = 9;
    for pivot in [0, 4, n - 1] {
        let mut a = Dense::identity(n, n);
        a.data[pivot * (n + 1)] = -1.0;
        match t.backend.solve_right(&Dense::zeros(2, n), &a) {
            Err(BackendError::NotPositiveDefinite { pivot: found }) => assert_eq!(found, pivot),
            other => panic!("{pivot}: {other:?}"),
        }
    }
    let singular = Dense::zeros(3, 3);
    let result = t.backend.solve_right(&Dense::zeros(1, 3), &singular);
    assert!(matches!(result, Err(BackendError::NotPositiveDefinite { pivot: 0 })), "{result:?}");
    let mut nan = Dense::identity(3, 3);
    nan.data[4] = f64::NAN;
    let result = t.backend.solve_right(&Dense::zeros(1, 3), &nan);
    assert!(matches!(result, Err(BackendError::NotPositiveDefinite { .. })), "{result:?}");
}
