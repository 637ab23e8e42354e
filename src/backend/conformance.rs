//! Every operation against naive loops in f64, one body for all backends.
//!
//! Inputs of products are rounded to the backend's product type before both sides see them, so the
//! tolerances only cover what the backend does with them.

mod dense;
mod pack;
mod rounding;

use half::bf16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;
use dense::{
    dense_products_follow_the_definition, eigenvalues_over_ten_decades_are_found,
    eigenvectors_are_orthonormal_and_reconstruct, equal_eigenvalues_have_a_whole_basis,
    solve_right_divides, solve_right_names_the_pivot, what_has_no_eigenvectors_is_refused,
};
use pack::{
    large_matrices_come_and_go, packing_is_that_of_the_format, staged_values_arrive,
    stored_types_round_to_nearest, values_too_large_to_store_are_named,
};
use rounding::{
    every_grid_rounds_as_on_the_cpu, obs_sweep_rounds_and_feeds_errors_on,
    rounding_takes_the_nearest_value, roundings_of_other_shapes_are_refused,
    sweeps_choose_scales_as_on_the_cpu, sweeps_round_as_on_the_cpu,
};

/// f32 sums of f32 terms: a few units in the last place of the sum of magnitudes.
const F32_SUM: f64 = 4e-6;
/// bf16 products are exact in f32, so their sums are as good as f32 sums; AMX and AVX-512 flush
/// denormals and add pairs first.
const BF16_SUM: f64 = 4e-6;
/// One rounding to bf16 (half a unit of 8 significant bits), and the f32 work before it.
const BF16_ROUND: f64 = 0.0039 + 1e-5;
/// Element-wise f32 work with the backends' own exponential.
const F32_ELEMENT: f64 = 3e-6;
/// f64 factorisation of a matrix of condition 1e3, rounded to f32.
const FACTOR: f64 = 1e-6;

/// A backend and the arithmetic its tests expect.
pub(super) struct Instance<B> {
    pub(super) backend: B,
    pub(super) bf16: bool,
}

impl<B: Backend> Instance<B> {
    /// Values as a product sees them.
    fn product_values(&self, values: &[f32]) -> Vec<f32> {
        let round = |value: &f32| bf16::from_f32(*value).to_f32();
        if self.bf16 { values.iter().map(round).collect() } else { values.to_vec() }
    }

    fn sum_tolerance(&self) -> f64 {
        if self.bf16 { BF16_SUM } else { F32_SUM }
    }

    /// Of results that feed products.
    fn element_tolerance(&self) -> f64 {
        if self.bf16 { BF16_ROUND } else { F32_ELEMENT }
    }

    fn upload(&self, values: &[f32], rows: usize, cols: usize) -> B::Matrix {
        self.backend.upload(values, rows, cols).unwrap()
    }

    fn download(&self, matrix: &B::Matrix) -> Vec<f32> {
        self.backend.download(matrix).unwrap()
    }

    fn rounding(&self, grid: Grid, rows: usize, cols: usize) -> B::Rounding {
        self.backend.rounding(grid, rows, cols).unwrap()
    }
}

fn random(rng: &mut ChaCha8Rng, len: usize) -> Vec<f32> {
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

fn rng(seed: usize) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed as u64)
}

/// `|got − expected| ≤ tolerance · scale` for each `(expected, scale)`.
#[track_caller]
fn assert_close(got: &[f32], expected: &[(f64, f64)], tolerance: f64, what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (i, (got, (expected, scale))) in got.iter().zip(expected).enumerate() {
        let error = (f64::from(*got) - expected).abs();
        assert!(
            error <= tolerance * scale + 1e-30,
            "{what} [{i}]: {got} for {expected}: {error:e}"
        );
    }
}

/// Each value with its own magnitude as scale.
fn relative(expected: Vec<f64>) -> Vec<(f64, f64)> {
    expected.into_iter().map(|x| (x, x.abs())).collect()
}

/// `Σ_i a(i) b(i)` and the sum of magnitudes.
fn dot(n: usize, a: impl Fn(usize) -> f32, b: impl Fn(usize) -> f32) -> (f64, f64) {
    (0..n).fold((0.0, 0.0), |(sum, scale), i| {
        let term = f64::from(a(i)) * f64::from(b(i));
        (sum + term, scale + term.abs())
    })
}

fn matrices_round_trip<B: Backend>(t: &Instance<B>) {
    let values = random(&mut rng(1), 35);
    let matrix = t.upload(&values, 5, 7);
    assert_eq!(t.backend.shape(&matrix), (5, 7));
    assert_eq!(t.download(&t.backend.duplicate(&matrix).unwrap()), values);
    let host = t.backend.offload(matrix).unwrap();
    assert_eq!(host.data, HostData::F32(values.clone()));
    assert_eq!(t.download(&t.backend.onload(host).unwrap()), values);
    assert_eq!(t.download(&t.backend.zeros(3, 2).unwrap()), [0.0; 6]);
    assert!(t.backend.upload(&values, 5, 8).is_err());
    assert!(!t.backend.describe().is_empty());
    let data = HostData::Bf16(values.iter().map(|v| bf16::from_f32(*v)).collect());
    let half = HostMatrix { rows: 5, cols: 7, data };
    let back = t.backend.offload(t.backend.onload(half.clone()).unwrap()).unwrap();
    assert_eq!(back, half);
}

fn linear_is_x_wt<B: Backend>(t: &Instance<B>) {
    let shapes =
        [(1, 1, 1), (3, 5, 7), (31, 33, 65), (64, 32, 16), (70, 100, 129), (300, 96, 1300)];
    for (seed, (m, n, k)) in shapes.into_iter().enumerate() {
        let rng = &mut rng(seed);
        let x = t.product_values(&random(rng, m * k));
        let w = t.product_values(&random(rng, n * k));
        let bias = random(rng, n);
        let first = n / 3;
        let top = t.upload(&w[..first * k], first, k);
        let bottom = t.upload(&w[first * k..], n - first, k);
        let weight = t.backend.prepare(&[&top, &bottom]).unwrap();
        let x_device = t.upload(&x, m, k);
        let bias_device = t.upload(&bias, 1, n);
        for with_bias in [false, true] {
            let bias_arg = with_bias.then_some(&bias_device);
            let out = t.backend.linear(&x_device, &weight, bias_arg).unwrap();
            assert_eq!(t.backend.shape(&out), (m, n));
            let expected: Vec<_> = (0..m * n)
                .map(|i| {
                    let (row, col) = (i / n, i % n);
                    let (sum, scale) = dot(k, |p| x[row * k + p], |p| w[col * k + p]);
                    let bias = if with_bias { f64::from(bias[col]) } else { 0.0 };
                    (sum + bias, scale + bias.abs())
                })
                .collect();
            let what = format!("linear {m}x{n}x{k}");
            assert_close(&t.download(&out), &expected, t.sum_tolerance(), &what);
        }
        let wrong = t.upload(&vec![0.0; m * (k + 1)], m, k + 1);
        assert!(matches!(
            t.backend.linear(&wrong, &weight, None),
            Err(BackendError::Shape { operation: "linear", .. })
        ));
    }
}

fn norms_normalise_rows<B: Backend>(t: &Instance<B>) {
    for (seed, (rows, cols)) in [(1, 1), (3, 17), (65, 130)].into_iter().enumerate() {
        let rng = &mut rng(seed);
        let (x, gain, bias) = (random(rng, rows * cols), random(rng, cols), random(rng, cols));
        let x_device = t.upload(&x, rows, cols);
        let gain_device = t.upload(&gain, 1, cols);
        let bias_device = t.upload(&bias, 1, cols);
        let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
        let mut rms = Vec::new();
        let mut layer = Vec::new();
        for row in x.chunks(cols).map(wide) {
            let n = cols as f64;
            let mean_square = row.iter().map(|x| x * x).sum::<f64>() / n;
            let mean = row.iter().sum::<f64>() / n;
            let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
            for (col, x) in row.iter().enumerate() {
                let (gain, bias) = (f64::from(gain[col]), f64::from(bias[col]));
                rms.push(x / (mean_square + 1e-5).sqrt() * gain);
                let deviation = 1.0 / (variance + 1e-5).sqrt();
                let scaled = (x - mean) * deviation * gain;
                // Rounding of the mean is amplified by the deviation.
                let scale = scaled.abs() + bias.abs() + mean.abs() * deviation * gain.abs();
                layer.push((scaled + bias, scale));
            }
        }
        let tolerance = t.element_tolerance();
        let out = t.backend.rms_norm(&x_device, &gain_device, 1e-5).unwrap();
        assert_close(&t.download(&out), &relative(rms), tolerance, "rms_norm");
        let out = t.backend.layer_norm(&x_device, &gain_device, &bias_device, 1e-5).unwrap();
        assert_close(&t.download(&out), &layer, tolerance, "layer_norm");
    }
}

fn rope_tables(positions: usize, half_dim: usize) -> RopeTables {
    let angle = |i: usize| {
        let (position, j) = (i / half_dim, i % half_dim);
        position as f64 * 10_000f64.powf(-(j as f64) / half_dim as f64)
    };
    let values =
        |f: fn(f64) -> f64| (0..positions * half_dim).map(|i| f(angle(i)) as f32).collect();
    RopeTables { half_dim, cos: values(f64::cos), sin: values(f64::sin) }
}

fn rope_rotates_half_split_pairs<B: Backend>(t: &Instance<B>) {
    let shape = AttentionShape { num_heads: 3, num_kv_heads: 1, head_dim: 6, scale: 1.0 };
    let lens = SequenceLens::new(vec![5, 1, 40]);
    let (tokens, cols) = (lens.tokens(), shape.qkv_cols());
    let tables = rope_tables(40, 3);
    let before = random(&mut rng(3), tokens * cols);
    let mut qkv = t.upload(&before, tokens, cols);
    t.backend.rope(&mut qkv, &shape, &tables, &lens).unwrap();
    let after = t.download(&qkv);
    let positions: Vec<usize> = lens.ranges().flat_map(|range| 0..range.len()).collect();
    let expected: Vec<_> = (0..tokens * cols)
        .map(|i| {
            let (row, col) = (i / cols, i % cols);
            let (head, j) = (col / 6, col % 6);
            if head == 4 {
                // Untouched, but for the rounding to the type of products.
                return (f64::from(before[i]), if t.bf16 { 1.0 } else { 0.0 });
            }
            let angle = positions[row] * 3 + j % 3;
            let (cos, sin) = (f64::from(tables.cos[angle]), f64::from(tables.sin[angle]));
            let other = f64::from(before[if j < 3 { i + 3 } else { i - 3 }]);
            let sign = if j < 3 { -1.0 } else { 1.0 };
            (f64::from(before[i]) * cos + sign * other * sin, 1.0)
        })
        .collect();
    let tolerance = if t.bf16 { 2.0 * BF16_ROUND } else { 2e-7 };
    assert_close(&after, &expected, tolerance, "rope");
    let short = rope_tables(39, 3);
    let mut qkv = t.upload(&before, tokens, cols);
    assert!(t.backend.rope(&mut qkv, &shape, &short, &lens).is_err());
}

fn attention_is_causal_softmax<B: Backend>(t: &Instance<B>) {
    let cases: [(usize, usize, usize, &[usize]); 5] = [
        (1, 1, 2, &[1]),
        (4, 2, 16, &[33, 1, 7]),
        (3, 3, 10, &[65]),
        (3, 1, 64, &[130, 64]),
        (2, 1, 80, &[17]),
    ];
    for (seed, (num_heads, num_kv_heads, head_dim, lens)) in cases.into_iter().enumerate() {
        let scale = 1.0 / (head_dim as f32).sqrt();
        let shape = AttentionShape { num_heads, num_kv_heads, head_dim, scale };
        let lens = SequenceLens::new(lens.to_vec());
        let (tokens, cols) = (lens.tokens(), shape.qkv_cols());
        let values: Vec<f32> =
            random(&mut rng(seed), tokens * cols).iter().map(|x| 3.0 * x).collect();
        let values = t.product_values(&values);
        let qkv = t.upload(&values, tokens, cols);
        let out = t.backend.causal_attention(&qkv, &shape, &lens).unwrap();
        assert_eq!(t.backend.shape(&out), (tokens, num_heads * head_dim));
        let expected = naive_attention(&values, &shape, &lens);
        // In bf16 a probability is rounded before it meets its value.
        let tolerance = if t.bf16 { 2.0 * BF16_ROUND } else { 1e-5 };
        assert_close(&t.download(&out), &expected, tolerance, "attention");
    }
}

fn attention_is_refused_before_it_runs<B: Backend>(t: &Instance<B>) {
    let lens = SequenceLens::new(vec![1]);
    for head_dim in [16, 256, 258, 512] {
        let shape = AttentionShape { num_heads: 1, num_kv_heads: 1, head_dim, scale: 1.0 };
        let qkv = t.backend.zeros(1, shape.qkv_cols()).unwrap();
        let checked = t.backend.check_attention(&shape).map_err(|error| error.to_string());
        let ran = t.backend.causal_attention(&qkv, &shape, &lens).map(|_| ());
        assert_eq!(checked, ran.map_err(|error| error.to_string()), "{head_dim}");
    }
}

/// Outputs, each with the attention-weighted mean magnitude of the values.
fn naive_attention(qkv: &[f32], shape: &AttentionShape, lens: &SequenceLens) -> Vec<(f64, f64)> {
    let (cols, hd) = (shape.qkv_cols(), shape.head_dim);
    let group = shape.num_heads / shape.num_kv_heads;
    let mut expected = Vec::new();
    for range in lens.ranges() {
        for row in range.clone() {
            for head in 0..shape.num_heads {
                let k = (shape.num_heads + head / group) * hd;
                let v = k + shape.num_kv_heads * hd;
                let at = |row: usize, col: usize| qkv[row * cols + col];
                let scores: Vec<f64> = (range.start..=row)
                    .map(|key| dot(hd, |i| at(row, head * hd + i), |i| at(key, k + i)).0)
                    .map(|score| score * f64::from(shape.scale))
                    .collect();
                let max = scores.iter().copied().fold(f64::MIN, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
                let total: f64 = weights.iter().sum();
                for i in 0..hd {
                    let terms = weights.iter().zip(range.clone());
                    let terms = terms.map(|(p, key)| p / total * f64::from(at(key, v + i)));
                    let (sum, scale) =
                        terms.fold((0.0, 0.0), |(sum, scale), x| (sum + x, scale + x.abs()));
                    expected.push((sum, scale));
                }
            }
        }
    }
    expected
}

/// An activation as a formula in f64.
type Formula = fn(f64) -> f64;

fn activations_match_their_formulas<B: Backend>(t: &Instance<B>) {
    let (rows, features) = (37, 21);
    let values: Vec<f32> = random(&mut rng(5), rows * features).iter().map(|x| 6.0 * x).collect();
    let x = t.upload(&values, rows, features);
    let cases: [(Activation, Formula); 4] = [
        (Activation::Silu, |x| x / (1.0 + (-x).exp())),
        (Activation::Relu, |x| x.max(0.0)),
        (Activation::Gelu, |x| x * normal_cdf(x)),
        (Activation::GeluTanh, |x| {
            let z = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
            0.5 * x * (1.0 + z.tanh())
        }),
    ];
    for (activation, function) in cases {
        // The tail of the tanh form cancels in the expected value itself.
        let scale = |x: f64| function(x).abs() + 1e-6 * x.abs();
        let plain: Vec<_> =
            values.iter().map(|x| f64::from(*x)).map(|x| (function(x), scale(x))).collect();
        let out = t.backend.activation(&x, activation).unwrap();
        let tolerance = t.element_tolerance();
        assert_close(&t.download(&out), &plain, tolerance, &format!("{activation:?}"));
    }
}

/// `Φ(x)` by Simpson's rule on the density.
fn normal_cdf(x: f64) -> f64 {
    let steps = 4000;
    let lower = -12.0f64;
    let width = (x - lower) / f64::from(steps);
    let density = |i: i32| (-0.5 * (lower + f64::from(i) * width).powi(2)).exp();
    let inner: f64 = (1..steps).map(|i| if i % 2 == 0 { 2.0 } else { 4.0 } * density(i)).sum();
    (density(0) + inner + density(steps)) * width / 3.0 / (2.0 * std::f64::consts::PI).sqrt()
}

fn fused_linears_equal_their_parts<B: Backend>(t: &Instance<B>) {
    // Features that are whole panels, several gated chunks, and neither.
    for (seed, (m, f, k)) in
        [(1, 1, 1), (33, 7, 40), (70, 96, 33), (300, 1088, 65)].into_iter().enumerate()
    {
        let rng = &mut rng(seed);
        let x = t.product_values(&random(rng, m * k));
        let w = t.product_values(&random(rng, 2 * f * k));
        let (bias, start) = (random(rng, 2 * f), random(rng, m * 2 * f));
        let x_device = t.upload(&x, m, k);
        let weight = t.backend.prepare(&[&t.upload(&w, 2 * f, k)]).unwrap();
        let bias_device = t.upload(&bias, 1, 2 * f);
        for with_bias in [false, true] {
            let bias_arg = with_bias.then_some(&bias_device);
            let output = |row: usize, col: usize| {
                let (sum, scale) = dot(k, |p| x[row * k + p], |p| w[col * k + p]);
                let bias = if with_bias { f64::from(bias[col]) } else { 0.0 };
                (sum + bias, scale + bias.abs())
            };
            let added: Vec<_> = (0..m * 2 * f)
                .map(|i| {
                    let (sum, scale) = output(i / (2 * f), i % (2 * f));
                    (sum + f64::from(start[i]), scale + f64::from(start[i]).abs())
                })
                .collect();
            let mut residual = t.upload(&start, m, 2 * f);
            t.backend.linear_add(&mut residual, &x_device, &weight, bias_arg).unwrap();
            let what = format!("linear_add {m}x{f}x{k}");
            assert_close(&t.download(&residual), &added, t.sum_tolerance(), &what);

            let gated: Vec<_> = (0..m * f)
                .map(|i| {
                    let (row, col) = (i / f, i % f);
                    let ((gate, gate_scale), (up, up_scale)) =
                        (output(row, col), output(row, f + col));
                    let silu = gate / (1.0 + (-gate).exp());
                    // An error of a factor moves the product by the other factor; the slope of
                    // silu is below 1.1.
                    (
                        silu * up,
                        (silu * up).abs() + 1.1 * gate_scale * up.abs() + silu.abs() * up_scale,
                    )
                })
                .collect();
            let out =
                t.backend.linear_gated(&x_device, &weight, bias_arg, Activation::Silu).unwrap();
            assert_eq!(t.backend.shape(&out), (m, f));
            let tolerance = t.sum_tolerance() + t.element_tolerance();
            assert_close(&t.download(&out), &gated, tolerance, &format!("gated {m}x{f}x{k}"));
        }
    }
    let x = t.upload(&[1.0; 6], 2, 3);
    let odd = t.backend.prepare(&[&t.upload(&[1.0; 9], 3, 3)]).unwrap();
    assert!(t.backend.linear_gated(&x, &odd, None, Activation::Silu).is_err());
    let mut narrow = t.upload(&[1.0; 4], 2, 2);
    assert!(t.backend.linear_add(&mut narrow, &x, &odd, None).is_err());
}

fn token_nll_is_log_sum_exp<B: Backend>(t: &Instance<B>) {
    let (rows, cols) = (5, 2500);
    let logits: Vec<f32> = random(&mut rng(7), rows * cols).iter().map(|x| 20.0 * x).collect();
    let targets: Vec<u32> = vec![0, 2499, 7, 1024, 1023];
    let nll = t.backend.token_nll(&t.upload(&logits, rows, cols), &targets).unwrap();
    for ((row, target), nll) in logits.chunks(cols).zip(&targets).zip(&nll) {
        let sum: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
        let expected = sum.ln() - f64::from(row[*target as usize]);
        assert!((nll - expected).abs() < 1e-5, "{nll} {expected}");
    }
    let logits = t.upload(&logits, rows, cols);
    assert!(t.backend.token_nll(&logits, &[0, 0, 0, 0, 2500]).is_err());
    assert!(t.backend.token_nll(&logits, &[0]).is_err());
}

fn gram_is_the_lower_triangle_of_xtx<B: Backend>(t: &Instance<B>) {
    for (seed, (tokens, d)) in [(1, 1), (33, 7), (70, 65), (1100, 130)].into_iter().enumerate() {
        let rng = &mut rng(seed);
        let start = random(rng, d * d);
        let x = t.product_values(&random(rng, tokens * d));
        let mut h = t.upload(&start, d, d);
        t.backend.gram_accumulate(&mut h, &t.upload(&x, tokens, d)).unwrap();
        let h = t.download(&h);
        for i in 0..d {
            let expected: Vec<_> = (0..=i)
                .map(|j| {
                    let (sum, scale) = dot(tokens, |t| x[t * d + i], |t| x[t * d + j]);
                    let start = f64::from(start[i * d + j]);
                    (start + sum, start.abs() + scale)
                })
                .collect();
            assert_close(&h[i * d..][..=i], &expected, t.sum_tolerance(), "gram");
        }
    }
    let mut h = t.backend.zeros(3, 3).unwrap();
    let x = t.backend.zeros(2, 4).unwrap();
    assert!(t.backend.gram_accumulate(&mut h, &x).is_err());
}

fn cross_sums_are_atb<B: Backend>(t: &Instance<B>) {
    let shapes = [(1, 1, 1), (33, 7, 40), (70, 65, 3), (1100, 130, 96)];
    for (seed, (tokens, m, n)) in shapes.into_iter().enumerate() {
        let rng = &mut rng(seed);
        let start = random(rng, m * n);
        let a = t.product_values(&random(rng, tokens * m));
        let b = t.product_values(&random(rng, tokens * n));
        let mut c = t.upload(&start, m, n);
        let (left, right) = (t.upload(&a, tokens, m), t.upload(&b, tokens, n));
        t.backend.cross_accumulate(&mut c, &left, &right).unwrap();
        let expected: Vec<_> = (0..m * n)
            .map(|at| {
                let (sum, scale) = dot(tokens, |t| a[t * m + at / n], |t| b[t * n + at % n]);
                let start = f64::from(start[at]);
                (start + sum, start.abs() + scale)
            })
            .collect();
        assert_close(&t.download(&c), &expected, t.sum_tolerance(), "cross_accumulate");
        assert!(t.backend.cross_accumulate(&mut c, &right, &left).is_err() || m == n);
    }
    let mut c = t.backend.zeros(2, 3).unwrap();
    let (a, b) = (t.backend.zeros(4, 2).unwrap(), t.backend.zeros(5, 3).unwrap());
    assert!(t.backend.cross_accumulate(&mut c, &a, &b).is_err());
}

fn rows_are_scaled<B: Backend>(t: &Instance<B>) {
    let (rows, cols) = (37, 5);
    let values = random(&mut rng(21), rows * cols);
    let factors = random(&mut rng(22), rows);
    let mut x = t.upload(&values, rows, cols);
    t.backend.scale_rows(&mut x, &factors).unwrap();
    let product = |(at, x): (usize, &f32)| f64::from(*x) * f64::from(factors[at / cols]);
    let expected = values.iter().enumerate().map(product).collect();
    assert_close(&t.download(&x), &relative(expected), F32_ELEMENT, "scale_rows");
    assert!(t.backend.scale_rows(&mut x, &factors[1..]).is_err());
    // What only feeds products stays in their type.
    let gain = t.upload(&vec![1.0; cols], 1, cols);
    let mut normed = t.backend.rms_norm(&t.upload(&values, rows, cols), &gain, 1e-6).unwrap();
    let before = t.download(&normed);
    t.backend.scale_rows(&mut normed, &vec![0.5; rows]).unwrap();
    let halves: Vec<f32> = before.iter().map(|x| x / 2.0).collect();
    assert_eq!(t.download(&normed), halves);
}

fn column_statistics<B: Backend>(t: &Instance<B>) {
    let (rows, cols) = (777, 35);
    let mut x = random(&mut rng(9), rows * cols);
    let mut sums = t.upload(&vec![2.0; cols], 1, cols);
    let matrix = t.upload(&x, rows, cols);
    t.backend.column_sq_norm(&mut sums, &matrix).unwrap();
    let expected: Vec<_> =
        (0..cols).map(|j| 2.0 + dot(rows, |i| x[i * cols + j], |i| x[i * cols + j]).0).collect();
    assert_close(&t.download(&sums), &relative(expected), F32_SUM, "column_sq_norm");
    assert_eq!(t.backend.count_non_finite_rows(&matrix).unwrap(), 0);
    x[5 * cols] = f32::NAN;
    x[5 * cols + 3] = f32::INFINITY;
    x[776 * cols + 34] = f32::NEG_INFINITY;
    assert_eq!(t.backend.count_non_finite_rows(&t.upload(&x, rows, cols)).unwrap(), 2);
}

fn diagonals_and_columns<B: Backend>(t: &Instance<B>) {
    let values: Vec<f32> = (0..16u8).map(f32::from).collect();
    let mut h = t.upload(&values, 4, 4);
    assert_eq!(t.backend.diagonal(&h).unwrap(), [0.0, 5.0, 10.0, 15.0]);
    t.backend.set_diagonal(&mut h, &[(0, 1.5), (3, 2.5)]).unwrap();
    assert_eq!(t.backend.diagonal(&h).unwrap(), [1.5, 5.0, 10.0, 2.5]);
    t.backend.zero_columns(&mut h, &[1, 3]).unwrap();
    assert_eq!(t.download(&h)[..4], [1.5, 0.0, 2.0, 0.0]);
    assert!(t.backend.set_diagonal(&mut h, &[(4, 0.0)]).is_err());
    assert!(t.backend.zero_columns(&mut h, &[4]).is_err());
    assert!(t.backend.diagonal(&t.backend.zeros(2, 3).unwrap()).is_err());
}

/// A positive definite matrix whose strict upper triangle holds nonsense.
fn positive_definite(rng: &mut ChaCha8Rng, n: usize) -> Vec<f32> {
    let x = random(rng, 2 * n * n);
    let entry = |i: usize, j: usize| dot(2 * n, |t| x[t * n + i], |t| x[t * n + j]).0 as f32;
    (0..n * n).map(|i| if i / n >= i % n { entry(i / n, i % n) } else { f32::NAN }).collect()
}

fn inverse_factor_inverts<B: Backend>(t: &Instance<B>) {
    for n in [1, 2, 17, 65] {
        let h = positive_definite(&mut rng(n), n);
        let damp = 0.25;
        let u = t.download(&t.backend.inverse_factor_upper(&t.upload(&h, n, n), damp).unwrap());
        let at = |i: usize, j: usize| f64::from(if i >= j { h[i * n + j] } else { h[j * n + i] });
        for i in 0..n {
            assert!(u[i * n..][..i].iter().all(|&below| below == 0.0));
            for j in 0..n {
                // (UᵀU (H + damp I))[i, j] is the identity's entry.
                let mut sum = 0.0;
                for k in 0..n {
                    let inverse = dot(i.min(k) + 1, |p| u[p * n + i], |p| u[p * n + k]).0;
                    sum += inverse * (at(k, j) + if k == j { damp } else { 0.0 });
                }
                let expected = f64::from(u8::from(i == j));
                assert!((sum - expected).abs() < FACTOR * 50.0 * n as f64, "{n}: {i},{j}: {sum}");
            }
        }
    }
    let mut h = positive_definite(&mut rng(3), 5);
    h[2 * 5 + 2] = -100.0;
    let result = t.backend.inverse_factor_upper(&t.upload(&h, 5, 5), 0.0);
    assert!(matches!(result, Err(BackendError::NotPositiveDefinite { pivot: 2 })), "{result:?}");
    h[2 * 5 + 2] = f32::NAN;
    let result = t.backend.inverse_factor_upper(&t.upload(&h, 5, 5), 0.0);
    assert!(matches!(result, Err(BackendError::NotPositiveDefinite { pivot: 2 })), "{result:?}");
}

/// The naive choice: sort all by (score, index).
fn naive_lowest(scores: &[f32], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[a].total_cmp(&scores[b]).then(a.cmp(&b)));
    order.truncate(count);
    order
}

/// Values with many ties.
fn coarse(rng: &mut ChaCha8Rng, len: usize) -> Vec<f32> {
    (0..len).map(|_| (rng.random_range(-8i8..8) as f32) / 4.0).collect()
}

fn zero_lowest_counts_exactly<B: Backend>(t: &Instance<B>) {
    for (seed, (rows, cols)) in [(1, 8), (9, 24), (150, 40)].into_iter().enumerate() {
        let rng = &mut rng(seed);
        for w in [random(rng, rows * cols), coarse(rng, rows * cols)] {
            let scale: Vec<f32> = coarse(rng, cols).iter().map(|x| x.abs() + 0.5).collect();
            let scale_device = t.upload(&scale, 1, cols);
            let half = rows * cols / 2;
            let selections = [
                Selection::Tensor { zeros: 0 },
                Selection::Tensor { zeros: half + 1 },
                Selection::Tensor { zeros: rows * cols },
                Selection::Row { zeros: cols / 3 },
                Selection::Group { zeros: 2, m: 4 },
                Selection::Group { zeros: 3, m: 8 },
            ];
            for selection in selections {
                for scaled in [false, true] {
                    let (unit, zeros) = match selection {
                        Selection::Tensor { zeros } => (rows * cols, zeros),
                        Selection::Row { zeros } => (cols, zeros),
                        Selection::Group { zeros, m } => (m, zeros),
                    };
                    let mut expected = w.clone();
                    for start in (0..rows * cols).step_by(unit) {
                        let scores: Vec<f32> = (start..start + unit)
                            .map(|i| w[i].abs() * if scaled { scale[i % cols] } else { 1.0 })
                            .collect();
                        for i in naive_lowest(&scores, zeros) {
                            expected[start + i] = 0.0;
                        }
                    }
                    let mut matrix = t.upload(&w, rows, cols);
                    let scale = scaled.then_some(&scale_device);
                    t.backend.zero_lowest(&mut matrix, scale, selection).unwrap();
                    assert_eq!(t.download(&matrix), expected, "{selection:?} scaled {scaled}");
                }
            }
        }
    }
    let mut w = t.backend.zeros(2, 6).unwrap();
    assert!(t.backend.zero_lowest(&mut w, None, Selection::Group { zeros: 2, m: 4 }).is_err());
}

/// An upper triangular factor with a dominant diagonal.
fn upper_factor(rng: &mut ChaCha8Rng, n: usize) -> Vec<f32> {
    let entry = |i: usize, value: f32| match (i / n).cmp(&(i % n)) {
        std::cmp::Ordering::Less => 0.1 * value,
        std::cmp::Ordering::Equal => 1.0 + 0.5 * value,
        std::cmp::Ordering::Greater => 0.0,
    };
    random(rng, n * n).into_iter().enumerate().map(|(i, value)| entry(i, value)).collect()
}

fn obs_sweep_follows_algorithm_1<B: Backend>(t: &Instance<B>) {
    for (seed, (rows, cols, columns)) in
        [(1, 4, 0..4), (5, 24, 8..24), (70, 200, 64..192), (33, 40, 36..40)].into_iter().enumerate()
    {
        let rng = &mut rng(seed);
        let (w, u) = (random(rng, rows * cols), upper_factor(rng, cols));
        let width = columns.len();
        let rules = [
            SweepRule::Lowest { zeros: rows * width * 6 / 10 },
            SweepRule::Group { zeros: 2, m: 4 },
            SweepRule::Group { zeros: 0, m: 2 },
        ];
        for rule in rules {
            let mut matrix = t.upload(&w, rows, cols);
            let factor = t.upload(&u, cols, cols);
            let err =
                t.backend.obs_sweep(&mut matrix, &factor, columns.clone(), rule, None).unwrap();
            let (expected_w, expected_err) = naive_sweep(&w, &u, rows, cols, columns.clone(), rule);
            let unit = |x: Vec<f64>| x.into_iter().map(|x| (x, 1.0)).collect::<Vec<_>>();
            assert_close(&t.download(&matrix), &unit(expected_w), 1e-5, "swept weights");
            assert_close(&t.download(&err), &unit(expected_err.clone()), 1e-5, "sweep errors");

            // The lazy update, from the same errors.
            let before = t.download(&matrix);
            let errors = t.download(&err);
            t.backend.trailing_update(&mut matrix, &err, &factor, columns.clone()).unwrap();
            let after: Vec<_> = (0..rows * cols)
                .map(|i| {
                    let (row, col) = (i / cols, i % cols);
                    let old = f64::from(before[i]);
                    if col < columns.end {
                        return (old, 0.0);
                    }
                    let u = |p: usize| u[(columns.start + p) * cols + col];
                    let (sum, scale) = dot(width, |p| errors[row * width + p], u);
                    (old - sum, old.abs() + scale)
                })
                .collect();
            assert_close(&t.download(&matrix), &after, F32_SUM, "trailing update");
        }
    }
}

fn naive_sweep<M>(
    w: &[f32],
    u: &[f32],
    rows: usize,
    cols: usize,
    columns: std::ops::Range<usize>,
    rule: SweepRule<'_, M>,
) -> (Vec<f64>, Vec<f64>) {
    let width = columns.len();
    let mut w: Vec<f64> = w.iter().map(|w| f64::from(*w)).collect();
    let mut err = vec![0.0; rows * width];
    let mut zero = vec![false; rows * width];
    let u = |i: usize, j: usize| f64::from(u[(columns.start + i) * cols + columns.start + j]);
    let score = |w: &[f64], row: usize, j: usize| {
        (w[row * cols + columns.start + j] / u(j, j)).powi(2) as f32
    };
    if let SweepRule::Lowest { zeros } = rule {
        let scores: Vec<f32> = (0..rows * width).map(|i| score(&w, i / width, i % width)).collect();
        for i in naive_lowest(&scores, zeros) {
            zero[i] = true;
        }
    }
    for j in 0..width {
        for row in 0..rows {
            if let SweepRule::Group { zeros, m } = rule
                && j % m == 0
            {
                let scores: Vec<f32> = (j..j + m).map(|j| score(&w, row, j)).collect();
                for i in naive_lowest(&scores, zeros) {
                    zero[row * width + j + i] = true;
                }
            }
            if zero[row * width + j] {
                let at = row * cols + columns.start;
                let error = w[at + j] / u(j, j);
                err[row * width + j] = error;
                w[at + j] = 0.0;
                (j + 1..width).for_each(|k| w[at + k] -= error * u(j, k));
            }
        }
    }
    (w, err)
}

fn quadratic_form_sums_rows<B: Backend>(t: &Instance<B>) {
    for (rows, n) in [(1, 1), (3, 17), (150, 70)] {
        let rng = &mut rng(n);
        let h = positive_definite(rng, n);
        let (a, b) = (random(rng, rows * n), random(rng, rows * n));
        let at = |i: usize, j: usize| f64::from(if i >= j { h[i * n + j] } else { h[j * n + i] });
        let expected = |d: &dyn Fn(usize) -> f64| -> f64 {
            let pairs = (0..rows).flat_map(|r| (0..n * n).map(move |i| (r, i / n, i % n)));
            pairs.map(|(r, i, j)| d(r * n + i) * at(i, j) * d(r * n + j)).sum()
        };
        let (a_device, b_device) = (t.upload(&a, rows, n), t.upload(&b, rows, n));
        let h_device = t.upload(&h, n, n);
        let alone = t.backend.quadratic_form(&a_device, None, &h_device).unwrap();
        let expected_alone = expected(&|i| f64::from(a[i]));
        assert!((alone - expected_alone).abs() < 1e-5 * expected_alone);
        let between = t.backend.quadratic_form(&a_device, Some(&b_device), &h_device).unwrap();
        let expected_between = expected(&|i| f64::from(a[i] - b[i]));
        assert!((between - expected_between).abs() < 1e-5 * expected_between);
    }
}

fn ceiling_is_positive<B: Backend>(t: &Instance<B>) {
    assert!(t.backend.measure_gemm_ceiling().unwrap() > 1e6);
}

/// Bytes of every operation's result on shapes that spread over several strips.
fn fingerprint<B: Backend>(t: &Instance<B>) -> Vec<u32> {
    let rng = &mut rng(42);
    let b = &t.backend;
    let lens = SequenceLens::new(vec![300, 500]);
    let shape = AttentionShape { num_heads: 3, num_kv_heads: 1, head_dim: 32, scale: 0.2 };
    let (tokens, d) = (lens.tokens(), shape.qkv_cols());
    let x = t.upload(&random(rng, tokens * d), tokens, d);
    let w = t.upload(&random(rng, d * d), d, d);
    let gain = t.upload(&random(rng, d), 1, d);
    let normed = b.rms_norm(&x, &gain, 1e-5).unwrap();
    let weight = b.prepare(&[&w]).unwrap();
    let qkv = b.linear(&normed, &weight, Some(&gain)).unwrap();
    let mut rotated = b.duplicate(&qkv).unwrap();
    b.rope(&mut rotated, &shape, &rope_tables(500, 16), &lens).unwrap();
    let attended = b.causal_attention(&rotated, &shape, &lens).unwrap();
    let even = b.prepare(&[&w, &w]).unwrap();
    let gated = b.linear_gated(&normed, &even, None, Activation::Silu).unwrap();
    let mut added = b.duplicate(&x).unwrap();
    b.linear_add(&mut added, &normed, &weight, Some(&gain)).unwrap();
    let mut h = b.zeros(d, d).unwrap();
    b.gram_accumulate(&mut h, &normed).unwrap();
    b.gram_accumulate(&mut h, &qkv).unwrap();
    let mut sums = b.zeros(1, d).unwrap();
    b.column_sq_norm(&mut sums, &normed).unwrap();
    let u = b.inverse_factor_upper(&h, 0.1).unwrap();
    // Large enough to be factored in parts.
    let mut large = b.zeros(1024, 1024).unwrap();
    b.gram_accumulate(&mut large, &t.upload(&random(rng, 1024 * 1024), 1024, 1024)).unwrap();
    let large = b.inverse_factor_upper(&large, 10.0).unwrap();
    let mut swept = b.duplicate(&qkv).unwrap();
    let rule = SweepRule::Lowest { zeros: tokens * 64 };
    let err = b.obs_sweep(&mut swept, &u, 0..128, rule, None).unwrap();
    b.trailing_update(&mut swept, &err, &u, 0..128).unwrap();
    let mut zeroed = b.duplicate(&qkv).unwrap();
    b.zero_lowest(&mut zeroed, None, Selection::Tensor { zeros: tokens * d / 2 }).unwrap();
    let form = b.quadratic_form(&qkv, Some(&swept), &h).unwrap();
    let nll = b.token_nll(&qkv, &vec![1; tokens]).unwrap();
    let mut bits: Vec<u32> = [
        &normed, &qkv, &rotated, &attended, &gated, &added, &sums, &u, &large, &swept, &err,
        &zeroed,
    ]
    .iter()
    .flat_map(|matrix| t.download(matrix))
    .map(f32::to_bits)
    .collect();
    let h = t.download(&h);
    bits.extend((0..d).flat_map(|i| h[i * d..][..=i].to_vec()).map(f32::to_bits));
    // Large enough for the eigenvectors to be found in parts.
    let mut symmetric = Dense::new(d, d, &h).unwrap();
    (0..d).for_each(|i| symmetric.data[i * d..][i + 1..d].fill(0.0));
    let eigen = b.symmetric_eigen(&symmetric).unwrap();
    let product = b.dense_product(&eigen.vectors, &symmetric).unwrap();
    let mut definite = symmetric;
    definite.add(&Dense::identity(d, d).scaled(tokens as f64));
    let solved = b.solve_right(&product, &definite).unwrap();
    let dense = [eigen.values, eigen.vectors.data, product.data, solved.data];
    let wide = nll.into_iter().chain([form]).chain(dense.into_iter().flatten()).map(f64::to_bits);
    bits.extend(wide.flat_map(|bits| [bits as u32, (bits >> 32) as u32]));
    bits
}

/// A backend on the CPU, or `None` where the processor lacks the arithmetic.
fn cpu_instance(arithmetic: &str, threads: usize) -> Option<Instance<cpu::Cpu>> {
    let mut backends = cpu::Cpu::every_arithmetic(Some(threads)).unwrap().into_iter();
    let backend = backends.find(|backend| backend.describe().contains(arithmetic))?;
    let bf16 = backend.describe().contains("bf16");
    Some(Instance { backend, bf16 })
}

#[test]
fn precision_chooses_the_arithmetic() {
    let best = cpu::Cpu::every_arithmetic(Some(1)).unwrap().get(1).map(Storage::describe);
    let describe = |precision| cpu::Cpu::new(precision, Some(1)).map(|cpu| cpu.describe());
    assert_eq!(describe(Precision::F32).unwrap(), "CPU, f32 products");
    if let Some(best) = best {
        assert_eq!(describe(Precision::Auto).unwrap(), best);
        assert_eq!(describe(Precision::Bf16).unwrap(), best);
    } else {
        assert_eq!(describe(Precision::Auto).unwrap(), describe(Precision::F32).unwrap());
        let error = describe(Precision::Bf16).unwrap_err();
        assert!(error.to_string().contains("no bf16 products"), "{error}");
    }
}

/// A GPU, or `None` where there is none and it is not required.
#[cfg(feature = "cuda")]
fn cuda_instance(arithmetic: &str, threads: usize) -> Option<Instance<cuda::Cuda>> {
    let bf16 = arithmetic.contains("bf16");
    let precision = if bf16 { Precision::Bf16 } else { Precision::F32 };
    match cuda::Cuda::new(0, precision, Some(threads)) {
        Ok(backend) => Some(Instance { backend, bf16 }),
        Err(error) => {
            let required = std::env::var_os("SPARSEPACK_REQUIRE_GPU").is_some();
            assert!(!required, "SPARSEPACK_REQUIRE_GPU is set, but {error}");
            None
        }
    }
}

/// Runs each body on an instance inside its pool.
macro_rules! backend_tests {
    ($make:ident, $instance:ident, $arithmetic:expr; $($test:ident),* $(,)?) => {
        mod $instance {
            use super::*;

            $(
                #[test]
                #[allow(clippy::print_stdout, reason = "a skipped test says so")]
                fn $test() {
                    match $make($arithmetic, 2) {
                        Some(instance) => instance.backend.scope(|| super::$test(&instance)),
                        None => println!("skipped: no {}", $arithmetic),
                    }
                }
            )*

            #[test]
            #[allow(clippy::print_stdout, reason = "a skipped test says so")]
            fn results_do_not_depend_on_the_number_of_threads() {
                let run = |threads| {
                    let instance = $make($arithmetic, threads)?;
                    Some(instance.backend.scope(|| fingerprint(&instance)))
                };
                match run(1) {
                    Some(one) => {
                        assert!(one == run(2).unwrap(), "1 and 2 threads differ");
                        assert!(one == run(5).unwrap(), "1 and 5 threads differ");
                    }
                    None => println!("skipped: no {}", $arithmetic),
                }
            }
        }
    };
}

fn columns_are_permuted_and_zeros_copied<B: Backend>(t: &Instance<B>) {
    let rng = &mut rng(5);
    let (rows, n) = (37, 21);
    let order: Vec<usize> = (0..n).map(|i| i * 8 % n).collect();
    let w = random(rng, rows * n);
    let permuted = t.backend.permute_columns(&t.upload(&w, rows, n), &order).unwrap();
    let expected: Vec<f32> =
        w.chunks(n).flat_map(|row| order.iter().map(|&column| row[column])).collect();
    assert_eq!(t.download(&permuted), expected);

    let h = positive_definite(rng, n);
    let at = |i: usize, j: usize| h[i.max(j) * n + i.min(j)];
    let permuted = t.backend.permute_symmetric(&t.upload(&h, n, n), &order).unwrap();
    let found = t.download(&permuted);
    for i in 0..n {
        for j in 0..=i {
            assert_eq!(found[i * n + j].to_bits(), at(order[i], order[j]).to_bits(), "{i}, {j}");
        }
    }
    for bad in [vec![0; n - 1], vec![n; n]] {
        assert!(t.backend.permute_columns(&t.upload(&w, rows, n), &bad).is_err());
        assert!(t.backend.permute_symmetric(&t.upload(&h, n, n), &bad).is_err());
    }

    let mask: Vec<f32> = w.iter().map(|w| if *w < 0.0 { 0.0 } else { 1.0 }).collect();
    let mut zeroed = t.upload(&w, rows, n);
    t.backend.copy_zeros(&mut zeroed, &t.upload(&mask, rows, n)).unwrap();
    let expected: Vec<f32> = w.iter().map(|w| w.max(0.0)).collect();
    assert_eq!(t.download(&zeroed), expected);
}

/// A matrix after the sweep of all its columns at once, with so many zeros of every `m`.
fn sweep_groups<B: Backend>(
    b: &B,
    (w, u, rows, cols): (&[f32], &[f32], usize, usize),
    (zeros, m): (usize, usize),
) -> Vec<f32> {
    let mut w = b.upload(w, rows, cols).unwrap();
    let u = b.upload(u, cols, cols).unwrap();
    b.obs_sweep(&mut w, &u, 0..cols, SweepRule::Group { zeros, m }, None).unwrap();
    b.download(&w).unwrap()
}

/// Groups wider than what a backend may sweep at a time.
fn wide_groups_lose_their_lowest<B: Backend>(t: &Instance<B>) {
    let reference = cpu::Cpu::new(Precision::F32, Some(1)).unwrap();
    let rng = &mut rng(13);
    for (rows, cols, zeros, m) in [(9, 320, 80, 160), (5, 300, 7, 10), (33, 384, 190, 384)] {
        let (w, u) = (random(rng, rows * cols), upper_factor(rng, cols));
        let expected = sweep_groups(&reference, (&w, &u, rows, cols), (zeros, m));
        let found = sweep_groups(&t.backend, (&w, &u, rows, cols), (zeros, m));
        for group in found.chunks(m) {
            assert_eq!(group.iter().filter(|w| **w == 0.0).count(), zeros, "{zeros}:{m}");
        }
        let differ = expected.iter().zip(&found).filter(|(a, b)| (**a == 0.0) != (**b == 0.0));
        assert!(differ.count() <= 2 * found.len() / 1000, "{zeros}:{m}");
    }
}

macro_rules! every_operation {
    ($make:ident, $instance:ident, $arithmetic:expr) => {
        backend_tests! {
            $make, $instance, $arithmetic;
            matrices_round_trip, linear_is_x_wt, norms_normalise_rows,
            rope_rotates_half_split_pairs, attention_is_causal_softmax, attention_is_refused_before_it_runs,
            activations_match_their_formulas, fused_linears_equal_their_parts, token_nll_is_log_sum_exp,
            gram_is_the_lower_triangle_of_xtx, cross_sums_are_atb, rows_are_scaled,
            column_statistics, diagonals_and_columns,
            inverse_factor_inverts, zero_lowest_counts_exactly, obs_sweep_follows_algorithm_1,
            quadratic_form_sums_rows, ceiling_is_positive, columns_are_permuted_and_zeros_copied,
            every_grid_rounds_as_on_the_cpu, sweeps_round_as_on_the_cpu, sweeps_choose_scales_as_on_the_cpu,
            wide_groups_lose_their_lowest, rounding_takes_the_nearest_value,
            roundings_of_other_shapes_are_refused, obs_sweep_rounds_and_feeds_errors_on,
            dense_products_follow_the_definition, eigenvectors_are_orthonormal_and_reconstruct,
            eigenvalues_over_ten_decades_are_found, equal_eigenvalues_have_a_whole_basis,
            what_has_no_eigenvectors_is_refused, solve_right_divides, solve_right_names_the_pivot,
            staged_values_arrive, large_matrices_come_and_go, stored_types_round_to_nearest,
            values_too_large_to_store_are_named, packing_is_that_of_the_format,
        }
    };
}

every_operation!(cpu_instance, cpu_f32, "f32 products");
every_operation!(cpu_instance, cpu_bf16_amx, "bf16 products (AMX)");
every_operation!(cpu_instance, cpu_bf16_avx512, "bf16 products (AVX512-BF16)");
#[cfg(feature = "cuda")]
every_operation!(cuda_instance, cuda_f32, "CUDA device");
#[cfg(feature = "cuda")]
every_operation!(cuda_instance, cuda_bf16, "CUDA device (bf16 products)");
