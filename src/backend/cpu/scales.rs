//! Scales for groups of weights: the ones with the least squared error.
//!
//! A strip of rows is searched at once, each row in a lane of its own: `values` are the columns of a
//! group, one after the other, each with the weights of `rows` rows. `h` weights the squared error of
//! a column: what an error there costs once the columns to its right have made up for it.
//!
//! For each candidate the codes are found, and the scale with the least error *for these codes* in
//! closed form (least squares); the best candidate wins. Searches of this kind are ggml's
//! (`make_qx_quants`, `make_qkx2_quants`); weights and candidates are ours.
#![allow(clippy::inline_always, reason = "parts of a vectorised body")]

/// The integer nearest to `value`, ties to even, of magnitude below 2²².
#[inline(always)]
pub(super) fn nearest(value: f32) -> f32 {
    // Above 2²³ floats are integers, so the addition rounds; a loop of it vectorises.
    const INTEGERS: f32 = 12_582_912.0;
    (value + INTEGERS) - INTEGERS
}

/// `value` limited to `low..=high`; NaN becomes `low`.
#[inline(always)]
pub(super) fn limited(value: f32, low: f32, high: f32) -> f32 {
    let value = if value > low { value } else { low };
    if value < high { value } else { high }
}

/// `1 / value`, zero for zero.
#[inline(always)]
fn inverse(value: f32) -> f32 {
    if value == 0.0 { 0.0 } else { 1.0 / value }
}

/// The columns of a group, with what an error in each costs.
#[derive(Clone, Copy)]
pub(super) struct Group<'a> {
    pub(super) values: &'a [f32],
    pub(super) h: &'a [f32],
    pub(super) rows: usize,
}

impl<'a> Group<'a> {
    #[inline(always)]
    fn columns(self) -> impl Iterator<Item = (&'a [f32], f32)> {
        self.values.chunks_exact(self.rows).zip(self.h.iter().copied())
    }

    /// Columns `first..first + count` of the group.
    #[inline(always)]
    pub(super) fn part(self, first: usize, count: usize) -> Self {
        let values = &self.values[first * self.rows..][..count * self.rows];
        Self { values, h: &self.h[first..][..count], rows: self.rows }
    }

    /// The value of the largest magnitude in each row.
    #[inline(always)]
    pub(super) fn extremes(self) -> Vec<f32> {
        let mut extremes = vec![0.0f32; self.rows];
        for (column, _) in self.columns() {
            for (extreme, x) in extremes.iter_mut().zip(column) {
                *extreme = if x.abs() > extreme.abs() { *x } else { *extreme };
            }
        }
        extremes
    }

    /// Least and greatest value of each row.
    #[inline(always)]
    pub(super) fn range(self) -> (Vec<f32>, Vec<f32>) {
        let mut low = vec![f32::INFINITY; self.rows];
        let mut high = vec![f32::NEG_INFINITY; self.rows];
        for (column, _) in self.columns() {
            for ((low, high), x) in low.iter_mut().zip(&mut high).zip(column) {
                *low = if x < low { *x } else { *low };
                *high = if x > high { *x } else { *high };
            }
        }
        (low, high)
    }

    /// The weighted squared error of each row, rounded to `scale · code − min` with codes `low..=high`.
    #[inline(always)]
    pub(super) fn error(self, scale: &[f32], min: &[f32], low: f32, high: f32) -> Vec<f32> {
        let mut errors = vec![0.0f32; self.rows];
        let inverses: Vec<f32> = scale.iter().map(|scale| inverse(*scale)).collect();
        for (column, h) in self.columns() {
            let parameters = scale.iter().zip(&inverses).zip(min);
            for ((error, x), ((scale, inverse), min)) in
                errors.iter_mut().zip(column).zip(parameters)
            {
                let q = nearest(limited((x + min) * inverse, low, high));
                let off = scale * q - min - x;
                *error += h * off * off;
            }
        }
        errors
    }
}

/// The scale of `value ≈ scale·code`, codes `low..=high`, of each row. A candidate divides the row's
/// value in `extremes` into so many `parts`, so the scale has the sign of the two.
#[inline(always)]
pub(super) fn symmetric(
    group: Group<'_>,
    extremes: &[f32],
    parts: &[f32],
    (low, high): (f32, f32),
) -> Vec<f32> {
    let rows = group.rows;
    let (mut scale, mut best) = (vec![0.0f32; rows], vec![0.0f32; rows]);
    let (mut xq, mut qq) = (vec![0.0f32; rows], vec![0.0f32; rows]);
    let mut inverses = vec![0.0f32; rows];
    for parts in parts {
        xq.fill(0.0);
        qq.fill(0.0);
        for (inverse, extreme) in inverses.iter_mut().zip(extremes) {
            *inverse = if *extreme == 0.0 { 0.0 } else { parts / extreme };
        }
        for (column, h) in group.columns() {
            let sums = xq.iter_mut().zip(&mut qq);
            for (((xq, qq), x), inverse) in sums.zip(column).zip(&inverses) {
                let q = nearest(limited(x * inverse, low, high));
                *xq += h * x * q;
                *qq += h * q * q;
            }
        }
        for lane in 0..rows {
            let (xq, qq) = (xq[lane], qq[lane]);
            let fit = xq / qq;
            // What these codes take off the error of rounding everything to zero.
            let gain = xq * fit;
            let better = qq > 0.0 && gain > best[lane];
            scale[lane] = if better { fit } else { scale[lane] };
            best[lane] = if better { gain } else { best[lane] };
        }
    }
    scale
}

/// Scale and minimum of `value ≈ scale·code − min`, codes `0..=top` and `min ≥ 0`, of each row. A
/// candidate divides the range above the minimum into so many `parts`, and starts from the best
/// minimum so far.
#[inline(always)]
pub(super) fn affine(group: Group<'_>, parts: &[f32], top: f32) -> (Vec<f32>, Vec<f32>) {
    let rows = group.rows;
    let (low, high) = group.range();
    let mut min: Vec<f32> = low.iter().map(|low| if *low < 0.0 { -low } else { 0.0 }).collect();
    let mut scale: Vec<f32> =
        high.iter().zip(&min).map(|(high, min)| ((high + min) / top).max(0.0)).collect();
    let mut best = group.error(&scale, &min, 0.0, top);
    let (mut sum, mut sum_x) = (0.0f32, vec![0.0f32; rows]);
    let mut sum_xx = vec![0.0f32; rows];
    for (column, h) in group.columns() {
        sum += h;
        for ((sum_x, sum_xx), x) in sum_x.iter_mut().zip(&mut sum_xx).zip(column) {
            *sum_x += h * x;
            *sum_xx += h * x * x;
        }
    }
    let (mut q_sum, mut qq, mut xq) = (vec![0.0f32; rows], vec![0.0f32; rows], vec![0.0f32; rows]);
    for parts in parts {
        let inverses: Vec<f32> =
            high.iter().zip(&min).map(|(high, min)| parts * inverse(high + min)).collect();
        q_sum.fill(0.0);
        qq.fill(0.0);
        xq.fill(0.0);
        for (column, h) in group.columns() {
            let sums = q_sum.iter_mut().zip(&mut qq).zip(&mut xq);
            let parameters = inverses.iter().zip(&min);
            for ((((q_sum, qq), xq), x), (inverse, min)) in sums.zip(column).zip(parameters) {
                let q = nearest(limited((x + min) * inverse, 0.0, top));
                *q_sum += h * q;
                *qq += h * q * q;
                *xq += h * x * q;
            }
        }
        for lane in 0..rows {
            let (q_sum, qq, xq) = (q_sum[lane], qq[lane], xq[lane]);
            let determinant = sum * qq - q_sum * q_sum;
            let free_scale = (sum * xq - sum_x[lane] * q_sum) / determinant;
            let free_min = (q_sum * xq - qq * sum_x[lane]) / determinant;
            let bounded = free_min < 0.0;
            let fit_scale = if bounded { xq / qq } else { free_scale };
            let fit_min = if bounded { 0.0 } else { free_min };
            let error = sum_xx[lane]
                + fit_scale * (fit_scale * qq - 2.0 * xq)
                + fit_min * (fit_min * sum + 2.0 * sum_x[lane] - 2.0 * fit_scale * q_sum);
            let better = determinant > 0.0 && fit_scale > 0.0 && error < best[lane];
            scale[lane] = if better { fit_scale } else { scale[lane] };
            min[lane] = if better { fit_min } else { min[lane] };
            best[lane] = if better { error } else { best[lane] };
        }
    }
    (scale, min)
}
