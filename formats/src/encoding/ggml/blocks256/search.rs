//! The scale of one group of a K-quant: a search over a grid of scales, or over the codes.
//!
//! ggml's searches (`make_qx_quants`, `make_qkx2_quants`, `make_q3_quants`) with the same sums in
//! the same order. [`LANES`] groups are searched together, each in a lane of its own, so that a sum
//! runs over the elements of its group in order and still vectorises.
#![allow(clippy::needless_range_loop, reason = "`c` is the lane, in several arrays at once")]
#![allow(clippy::needless_bitwise_bool, reason = "without branches the lanes vectorise")]
#![allow(clippy::float_cmp, reason = "whole numbers")]

use crate::encoding::ggml::quantize::largest;

/// Groups searched together.
pub(super) const LANES: usize = 8;

/// One number for each of them.
pub(super) type Lanes = [f32; LANES];

/// Their elements, group after group.
pub(super) type Groups<T, const N: usize> = [[T; N]; LANES];

/// A magnitude below this counts as zero.
pub(super) const SMALLEST: f32 = 1e-15;

/// The integer nearest to `value` (ties to even) within `low..=high`, as a float. `low` and `high`
/// are integers below 2²².
pub(super) fn round_within(value: f32, low: f32, high: f32) -> f32 {
    // Above 2²³ floats are integers, so the addition rounds; a loop of it vectorises.
    const INTEGERS: f32 = 12_582_912.0;
    let limited = if value < high { value } else { high };
    let limited = if limited > low { limited } else { low };
    (limited + INTEGERS) - INTEGERS
}

/// `value ≈ scale·code + min` for each element of a group.
#[derive(Clone, Copy)]
pub(super) struct Affine {
    pub(super) scale: f32,
    /// At most zero.
    pub(super) min: f32,
}

/// The grid of [`affine`]: step `i < count` divides the range of the values into
/// `top + first + i/10` parts.
pub(super) struct Grid {
    /// The greatest code.
    pub(super) top: f32,
    pub(super) first: f32,
    pub(super) count: usize,
}

/// Finds scale and minimum with the least sum of `weights · error(difference)`. First come those of
/// the range, then for each step of the grid the codes it gives, and the least-squares scale and
/// minimum for these codes; a step starts from the best minimum so far. The codes go to `codes`.
pub(super) fn affine<const N: usize>(
    groups: &Groups<f32, N>,
    weights: &Groups<f32, N>,
    grid: &Grid,
    error: impl Fn(f32) -> f32,
    codes: &mut Groups<u8, N>,
) -> [Affine; LANES] {
    let (values, weights) = (transpose(groups), transpose(weights));
    let (mut min, mut max) = (values[0], values[0]);
    let mut sums = Sums { w: weights[0], wx: lanes(|c| weights[0][c] * values[0][c]) };
    for (x, w) in values.iter().zip(&weights).skip(1) {
        for c in 0..LANES {
            min[c] = if x[c] < min[c] { x[c] } else { min[c] };
            max[c] = if x[c] > max[c] { x[c] } else { max[c] };
            sums.w[c] += w[c];
            sums.wx[c] += w[c] * x[c];
        }
    }
    let min = min.map(|min| if min > 0.0 { 0.0 } else { min });
    let inverse = lanes(|c| grid.top / (max[c] - min[c]));
    let mut best = Fit { scale: inverse.map(|i| 1.0 / i), min, error: [0.0; LANES] };
    let mut best_start = (inverse, min);
    for (x, w) in values.iter().zip(&weights) {
        for c in 0..LANES {
            let code = round_within(inverse[c] * (x[c] - min[c]), 0.0, grid.top);
            best.error[c] += w[c] * error(best.scale[c] * code + best.min[c] - x[c]);
        }
    }
    for step in 0..grid.count {
        let parts = grid.first + 0.1 * step as f32 + grid.top;
        let inverse = lanes(|c| parts / (max[c] - best.min[c]));
        let start = (inverse, best.min);
        let fit = least_squares(&values, &weights, &sums, grid.top, start, &error);
        for c in 0..LANES {
            if fit.error[c] < best.error[c] {
                (best.scale[c], best.min[c], best.error[c]) =
                    (fit.scale[c], fit.min[c], fit.error[c]);
                (best_start.0[c], best_start.1[c]) = (inverse[c], start.1[c]);
            }
        }
    }
    std::array::from_fn(|c| {
        if max[c] <= min[c] {
            codes[c] = [0; N];
            return Affine { scale: 0.0, min: min[c] };
        }
        let (inverse, start) = (best_start.0[c], best_start.1[c]);
        codes[c] = groups[c].map(|x| round_within(inverse * (x - start), 0.0, grid.top) as u8);
        Affine { scale: best.scale[c], min: best.min[c] }
    })
}

struct Sums {
    w: Lanes,
    wx: Lanes,
}

struct Fit {
    scale: Lanes,
    min: Lanes,
    /// NaN where the fit is not determined.
    error: Lanes,
}

/// The fit for the codes of `inverse · (value − min)`.
fn least_squares<const N: usize>(
    values: &[Lanes; N],
    weights: &[Lanes; N],
    sums: &Sums,
    top: f32,
    (inverse, min): (Lanes, Lanes),
    error: impl Fn(f32) -> f32,
) -> Fit {
    let mut codes = [[0.0; LANES]; N];
    let (mut sum_l, mut sum_l2, mut sum_xl) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
    for ((x, w), codes) in values.iter().zip(weights).zip(&mut codes) {
        for c in 0..LANES {
            let l = round_within(inverse[c] * (x[c] - min[c]), 0.0, top);
            let wl = w[c] * l;
            sum_l[c] += wl;
            sum_l2[c] += wl * l;
            sum_xl[c] += wl * x[c];
            codes[c] = l;
        }
    }
    let determinant = lanes(|c| {
        let determinant = sums.w[c] * sum_l2[c] - sum_l[c] * sum_l[c];
        if determinant > 0.0 { determinant } else { f32::NAN }
    });
    let free_min = lanes(|c| (sum_l2[c] * sums.wx[c] - sum_l[c] * sum_xl[c]) / determinant[c]);
    let free_scale = lanes(|c| (sums.w[c] * sum_xl[c] - sums.wx[c] * sum_l[c]) / determinant[c]);
    let (mut scale, mut min, mut errors) = (free_scale, free_min, [0.0; LANES]);
    for c in 0..LANES {
        if min[c] > 0.0 {
            (scale[c], min[c]) = (sum_xl[c] / sum_l2[c], 0.0);
        }
    }
    for ((x, w), l) in values.iter().zip(weights).zip(&codes) {
        for c in 0..LANES {
            errors[c] += w[c] * error(scale[c] * l[c] + min[c] - x[c]);
        }
    }
    Fit { scale, min, error: errors }
}

/// The scale of `value ≈ scale·(code − top)` that is the least-squares one, weighted with the
/// squares of the values, for the codes that give the least error. The grid divides the largest
/// magnitude into `top + i/10` parts, `i` in `−9..=9`. The codes go to `codes`.
pub(super) fn symmetric<const N: usize>(
    groups: &Groups<f32, N>,
    top: f32,
    codes: &mut Groups<u8, N>,
) -> Lanes {
    let values = transpose(groups);
    let max = lanes(|c| largest(&groups[c]).1);
    let (mut best_inverse, mut scale, mut best) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
    // Zero first: the others must be better.
    for step in [0i8, -9, -8, -7, -6, -5, -4, -3, -2, -1, 1, 2, 3, 4, 5, 6, 7, 8, 9] {
        let parts = -(top + 0.1 * f32::from(step));
        let inverse = max.map(|max| parts / max);
        let (mut sum_xl, mut sum_l2) = ([0.0; LANES], [0.0; LANES]);
        for x in &values {
            for c in 0..LANES {
                let w = x[c] * x[c];
                let l = round_within(inverse[c] * x[c], -top, top - 1.0);
                sum_xl[c] += w * x[c] * l;
                sum_l2[c] += w * l * l;
            }
        }
        for c in 0..LANES {
            let (xl, l2) = (sum_xl[c], sum_l2[c]);
            if step == 0 || l2 > 0.0 && xl * xl > best[c] * l2 {
                scale[c] = if l2 == 0.0 { 0.0 } else { xl / l2 };
                best[c] = scale[c] * xl;
                best_inverse[c] = inverse[c];
            }
        }
    }
    lanes(|c| {
        if max[c].abs() < SMALLEST {
            codes[c] = [0; N];
            return 0.0;
        }
        codes[c] =
            groups[c].map(|x| (round_within(best_inverse[c] * x, -top, top - 1.0) + top) as u8);
        scale[c]
    })
}

/// The same scale by another search: it starts from the codes of the plain scale and changes single
/// codes where that makes the error less, in at most five rounds over the group.
///
/// Like ggml's, it changes nothing in a group whose largest magnitude belongs to a positive value:
/// there all products of value and level are negative, and only positive sums are looked at.
pub(super) fn symmetric_by_code<const N: usize>(
    groups: &Groups<f32, N>,
    top: f32,
    codes: &mut Groups<u8, N>,
) -> Lanes {
    let values = transpose(groups);
    let max = lanes(|c| largest(&groups[c]).1);
    let mut levels = values.map(|x| lanes(|c| round_within(-top / max[c] * x[c], -top, top - 1.0)));
    let (mut sum_xl, mut sum_l2) = ([0.0; LANES], [0.0; LANES]);
    for (x, l) in values.iter().zip(&levels) {
        for c in 0..LANES {
            let w = x[c] * x[c];
            sum_xl[c] += w * x[c] * l[c];
            sum_l2[c] += w * l[c] * l[c];
        }
    }
    for _ in 0..5 {
        let before = levels;
        for (x, level) in values.iter().zip(&mut levels) {
            for c in 0..LANES {
                let w = x[c] * x[c];
                let other_xl = sum_xl[c] - w * x[c] * level[c];
                let other_l2 = sum_l2[c] - w * level[c] * level[c];
                let l = round_within(x[c] * other_l2 / other_xl, -top, top - 1.0);
                let (xl, l2) = (other_xl + w * x[c] * l, other_l2 + w * l * l);
                let less = xl * xl * sum_l2[c] > sum_xl[c] * sum_xl[c] * l2;
                let change = (other_xl > 0.0) & (l != level[c]) & (l2 > 0.0) & less;
                level[c] = if change { l } else { level[c] };
                sum_xl[c] = if change { xl } else { sum_xl[c] };
                sum_l2[c] = if change { l2 } else { sum_l2[c] };
            }
        }
        if levels == before {
            break;
        }
    }
    lanes(|c| {
        if max[c].abs() < SMALLEST {
            codes[c] = [0; N];
            return 0.0;
        }
        codes[c] = std::array::from_fn(|i| (levels[i][c] + top) as u8);
        if sum_l2[c] > 0.0 { sum_xl[c] / sum_l2[c] } else { 0.0 }
    })
}

fn lanes(value: impl FnMut(usize) -> f32) -> Lanes {
    std::array::from_fn(value)
}

/// Element `i` of every group side by side.
fn transpose<const N: usize>(groups: &Groups<f32, N>) -> [Lanes; N] {
    std::array::from_fn(|i| std::array::from_fn(|c| groups[c][i]))
}
