//! Statistics of activations: the Gram matrix and column norms.
//!
//! Only the lower triangle of `XᵀX` is computed. Threads take strips of rows of the result, never
//! ranges of tokens, so each element's sum runs over the tokens in one fixed order.

use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use super::bf16::pack::{self, Source};
use super::bf16::{BLOCK, Isa, Line, Session, Sums, TILE_LINES, Target};
use super::buffers::Scratch;
use super::linalg::{self, View, ViewMut};
use super::matrix::{STRIP, shape_error, strip_len};
use super::simd::vectorised;
use super::{CpuMatrix, Products};
use crate::backend::{HostData, Result};

/// Features of a strip of an f32 Gram matrix.
const F32_STRIP: usize = 256;
/// Tokens packed at a time: the panels of 1536 features stay in the second-level cache.
const PACKED_TOKENS: usize = 512;
/// Lines of a strip multiplied at a time: 16 KiB, a third of the first-level cache.
const PART_LINES: usize = 16 * TILE_LINES;

/// Lower triangle of `h += xᵀx`.
pub(super) fn gram_accumulate(products: Products, h: &mut CpuMatrix, x: &CpuMatrix) -> Result<()> {
    const OPERATION: &str = "gram_accumulate";
    let d = x.cols;
    h.expect_shape(OPERATION, d, d)?;
    let h = h.f32s_mut(OPERATION)?;
    match products {
        Products::F32 => gram_f32(h, x),
        Products::Bf16(isa) => gram_bf16(isa, h, &x.narrowed(), d),
    }
    Ok(())
}

fn gram_f32(h: &mut [f32], x: &CpuMatrix) {
    let (tokens, d) = (x.rows, x.cols);
    let x = x.widened();
    let columns =
        |from: usize, cols| View { data: &x[from.min(x.len())..], rows: tokens, cols, stride: d };
    h.par_chunks_mut(strip_len(F32_STRIP, d)).enumerate().rev().with_max_len(1).for_each(
        |(strip, h)| {
            let rows = h.len() / d;
            let first = strip * F32_STRIP;
            let a = columns(first, rows);
            if first > 0 {
                let left = ViewMut { data: h, rows, cols: first, stride: d };
                linalg::add_matmul_tn(left, a, columns(0, first));
            }
            let diagonal = ViewMut { data: &mut h[first..], rows, cols: rows, stride: d };
            linalg::add_gram_lower(diagonal, a);
        },
    );
}

fn gram_bf16(isa: Isa, h: &mut [f32], x: &[bf16], d: usize) {
    if d == 0 {
        return;
    }
    // Transposed tile by tile, a panel of the right operand is one of the left.
    for_panels(Source::dense(x, x.len() / d, d), |_, columns, lines| {
        let strips = h.par_chunks_mut(BLOCK * d).enumerate().rev().with_max_len(1);
        strips.for_each_init(Vec::new, |a, (strip, h)| {
            let panels = &columns[..(strip + 1) * lines];
            let own = &columns[strip * lines..][..lines];
            add_strip(isa, own, panels, a, h, d);
        });
    });
}

/// Packs `x` as right operand, some tokens at a time, and shows `use_panels` which tokens these are,
/// their panels, and the lines of a panel.
fn for_panels(x: Source<'_>, mut use_panels: impl FnMut(Range<usize>, &[Line], usize)) {
    for first in (0..x.rows).step_by(PACKED_TOKENS) {
        let tokens = first..x.rows.min(first + PACKED_TOKENS);
        let lines = pack::lines(tokens.len());
        let mut columns = Scratch::<Line>::take(x.cols.div_ceil(BLOCK) * lines);
        columns.par_chunks_mut(lines).enumerate().for_each(|(panel, columns)| {
            let features = panel * BLOCK..(panel + 1) * BLOCK;
            pack::columns(x.part(tokens.clone(), features), columns);
        });
        use_panels(tokens, &columns, lines);
    }
}

/// Adds to a strip of rows of `h`, `d` values each: `own` is the panel of its features, `panels` are
/// those of its columns. The tokens go in parts, so that a part of the strip stays in the first-level
/// cache while all panels pass by.
fn add_strip(isa: Isa, own: &[Line], panels: &[Line], a: &mut Vec<Line>, h: &mut [f32], d: usize) {
    let session = Session::start(isa);
    let mut sums = Sums::ZERO;
    let (rows, lines) = (h.len() / d, own.len());
    for (part, own) in own.chunks(PART_LINES).enumerate() {
        a.clear();
        a.extend_from_slice(own);
        pack::transpose(a);
        for (panel, b) in panels.chunks_exact(lines).enumerate() {
            let b = &b[part * PART_LINES..][..a.len()];
            let col = panel * BLOCK;
            let out = Target { out: &mut h[col..], stride: d, rows, cols: d - col, add: true };
            session.block_into(a, b, out, &mut sums);
        }
    }
}

/// `c += aᵀ b`.
pub(super) fn cross_accumulate(
    products: Products,
    c: &mut CpuMatrix,
    a: &CpuMatrix,
    b: &CpuMatrix,
) -> Result<()> {
    const OPERATION: &str = "cross_accumulate";
    c.expect_shape(OPERATION, a.cols, b.cols)?;
    b.expect_shape(OPERATION, a.rows, b.cols)?;
    let c = c.f32s_mut(OPERATION)?;
    if a.cols == 0 || b.cols == 0 {
        return Ok(());
    }
    match products {
        Products::F32 => cross_f32(c, a, b),
        Products::Bf16(isa) => {
            let (wide, narrow) = (a.narrowed(), b.narrowed());
            let wide = Source::dense(&wide, a.rows, a.cols);
            cross_bf16(isa, c, wide, Source::dense(&narrow, b.rows, b.cols));
        }
    }
    Ok(())
}

fn cross_f32(c: &mut [f32], a: &CpuMatrix, b: &CpuMatrix) {
    let (tokens, rows, cols) = (a.rows, a.cols, b.cols);
    let (a, b) = (a.widened(), b.widened());
    c.par_chunks_mut(strip_len(F32_STRIP, cols)).enumerate().for_each(|(strip, c)| {
        let first = strip * F32_STRIP;
        let count = c.len() / cols;
        let a = &a[first.min(a.len())..];
        let a = View { data: a, rows: tokens, cols: count, stride: rows };
        let c = ViewMut { data: c, rows: count, cols, stride: cols };
        linalg::add_matmul_tn(c, a, View::dense(&b, tokens, cols));
    });
}

fn cross_bf16(isa: Isa, c: &mut [f32], a: Source<'_>, b: Source<'_>) {
    let cols = b.cols;
    for_panels(b, |tokens, columns, lines| {
        let strips = c.par_chunks_mut(BLOCK * cols).enumerate().with_max_len(1);
        strips.for_each_init(
            || (Scratch::<Line>::take(lines), Vec::new()),
            |(own, transposed), (strip, c)| {
                pack::columns(a.part(tokens.clone(), strip * BLOCK..(strip + 1) * BLOCK), own);
                add_strip(isa, own, columns, transposed, c, cols);
            },
        );
    });
}

/// Multiplies each row with its factor.
pub(super) fn scale_rows(x: &mut CpuMatrix, factors: &[f32]) -> Result<()> {
    const OPERATION: &str = "scale_rows";
    if factors.len() != x.rows {
        return Err(shape_error(
            OPERATION,
            format!("{} factors for {} rows", factors.len(), x.rows),
        ));
    }
    let cols = x.cols.max(1);
    match &mut x.data {
        HostData::F32(values) => {
            values.par_chunks_exact_mut(cols).zip(factors).for_each(|(row, factor)| {
                for value in row {
                    *value *= factor;
                }
            });
        }
        HostData::Bf16(values) => {
            values.par_chunks_exact_mut(cols).zip(factors).for_each(|(row, factor)| {
                for value in row {
                    *value = bf16::from_f32(value.to_f32() * factor);
                }
            });
        }
    }
    Ok(())
}

/// `sums[j] += Σ_t x[t, j]²`.
pub(super) fn column_sq_norm(sums: &mut CpuMatrix, x: &CpuMatrix) -> Result<()> {
    const OPERATION: &str = "column_sq_norm";
    sums.expect_shape(OPERATION, 1, x.cols)?;
    let partial: Vec<Vec<f32>> = (0..x.rows.div_ceil(STRIP * 8))
        .into_par_iter()
        .map(|strip| {
            let mut scratch = Vec::new();
            let first = strip * STRIP * 8;
            let rows = x.rows_f32(first..x.rows.min(first + STRIP * 8), &mut scratch);
            let mut sums = vec![0.0; x.cols];
            rows.chunks_exact(x.cols.max(1)).for_each(|row| add_squares(row, &mut sums));
            sums
        })
        .collect();
    let sums = sums.f32s_mut(OPERATION)?;
    let mut wide: Vec<f64> = sums.iter().map(|&sum| f64::from(sum)).collect();
    for partial in &partial {
        wide.iter_mut().zip(partial).for_each(|(sum, part)| *sum += f64::from(*part));
    }
    sums.iter_mut().zip(wide).for_each(|(sum, wide)| *sum = wide as f32);
    Ok(())
}

vectorised! {
    fn add_squares<'a>(x: &'a [f32], sums: &'a mut [f32]) {
        sums.iter_mut().zip(x).for_each(|(sum, x)| *sum += x * x);
    }
}

/// Rows with a NaN or an infinity.
pub(super) fn count_non_finite_rows(x: &CpuMatrix) -> usize {
    let cols = x.cols.max(1);
    let count =
        |bad: &dyn Fn(usize) -> bool, rows: usize| (0..rows).filter(|row| bad(*row)).count();
    match &x.data {
        HostData::F32(values) => values
            .par_chunks(strip_len(STRIP, x.cols))
            .map(|strip| {
                count(&|row| has_non_finite(&strip[row * cols..][..cols]), strip.len() / cols)
            })
            .sum(),
        HostData::Bf16(values) => values
            .par_chunks(strip_len(STRIP, x.cols))
            .map(|strip| {
                count(&|row| has_non_finite_bf16(&strip[row * cols..][..cols]), strip.len() / cols)
            })
            .sum(),
    }
}

vectorised! {
    /// Whether an exponent is all ones.
    fn has_non_finite_bf16<'a>(x: &'a [bf16]) -> bool {
        x.iter().fold(false, |found, x| found | (x.to_bits() & 0x7F80 == 0x7F80))
    }
}

vectorised! {
    fn has_non_finite<'a>(x: &'a [f32]) -> bool {
        x.iter().fold(false, |found, x| found | !x.is_finite())
    }
}
