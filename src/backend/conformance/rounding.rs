//! Rounding, the choice of scales, and sweeps that do both, against naive loops and the CPU backend.

use rand_chacha::ChaCha8Rng;
use sparsepack_formats::{
    DType, GgmlType,
    encoding::{IntGrid, ggml::BlockGrid},
};

use super::{Instance, random, rng, upper_factor};
use crate::backend::{
    Backend, Grid, Precision, Result, Rounding, ScaleSearch, Scales, SweepRule, cpu,
};

/// Integers of four bits with a scale for 16 columns, as f32 so that nothing else is rounded.
fn int4(cols: usize) -> Grid {
    let group_size = Some((cols / 2) as u32);
    let grid = IntGrid { bits: 4, group_size, symmetric: true, scale: DType::F32 };
    Grid::Int { grid, search: ScaleSearch::Mse }
}

pub(super) fn rounding_takes_the_nearest_value<B: Backend>(t: &Instance<B>) {
    for (rows, cols) in [(1, 32), (67, 64), (130, 32)] {
        let w = random(&mut rng(rows), rows * cols);
        let mut matrix = t.upload(&w, rows, cols);
        let mut rounding = t.rounding(int4(cols), rows, cols);
        t.backend.choose_scales(&matrix, None, &mut rounding).unwrap();
        t.backend.round(&mut matrix, &mut rounding).unwrap();
        let found = t.download(&matrix);
        // What lies on the grid stays where it is.
        t.backend.round(&mut matrix, &mut rounding).unwrap();
        assert_eq!(t.download(&matrix), found);
        let rounding = t.backend.fetch_rounding(rounding).unwrap().wait().unwrap();
        let Scales::Groups { scales, .. } = &rounding.scales else { panic!("groups") };
        for (i, (rounded, w)) in found.iter().zip(&w).enumerate() {
            let scale = scales[i / cols * 2 + i % cols / (cols / 2)];
            let code = rounding.codes[i];
            assert_eq!(rounded.to_bits(), (scale * f32::from(code)).to_bits());
            let nearest = (w / scale).round().clamp(-8.0, 7.0);
            assert_eq!(nearest as i8, code);
        }
    }
}

pub(super) fn roundings_of_other_shapes_are_refused<B: Backend>(t: &Instance<B>) {
    let refused = |result: Result<()>, what: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    };
    let mut wrong = t.rounding(int4(64), 3, 64);
    let (rows, cols) = (2, 32);
    let mut w = t.upload(&[0.0; 64], rows, cols);
    let of_another = "codes of another matrix than 2 × 32";
    refused(t.backend.choose_scales(&w, None, &mut wrong), of_another);
    refused(t.backend.round(&mut w, &mut wrong), of_another);
    let mut rounding = t.rounding(int4(cols), rows, cols);
    let chosen = t.backend.choose_scales(&w, Some(&[1.0; 31]), &mut rounding);
    refused(chosen, "31 weights of 32 columns");
    let cut = t.backend.rounding(int4(64), 3, 63).map(|_| ());
    refused(cut, "63 columns in groups of 32");
    for order in [vec![0; cols - 1], vec![cols; cols]] {
        assert!(t.backend.set_order(&mut rounding, &order).is_err());
    }

    let u = t.upload(&upper_factor(&mut rng(3), cols), cols, cols);
    let mut sweep = |columns, rule, rounding: &mut B::Rounding| {
        t.backend.obs_sweep(&mut w, &u, columns, rule, Some(rounding)).map(|_| ())
    };
    let nothing = SweepRule::Nothing;
    refused(sweep(0..32, nothing, &mut wrong), of_another);
    refused(sweep(0..8, nothing, &mut rounding), "groups of 16 in columns 0..8");
    let groups = SweepRule::Group { zeros: 1, m: 32 };
    refused(sweep(0..32, groups, &mut rounding), "groups of 32 in groups of 16");
    t.backend.set_order(&mut rounding, &(0..cols).collect::<Vec<_>>()).unwrap();
    refused(sweep(0..32, nothing, &mut rounding), "in another order");
    t.backend.fix_scales(&mut rounding);
    sweep(0..32, nothing, &mut rounding).unwrap();
}

/// Scales are fixed, so that the codes alone are compared.
pub(super) fn obs_sweep_rounds_and_feeds_errors_on<B: Backend>(t: &Instance<B>) {
    let (rows, cols) = (70, 64);
    let rng = &mut rng(9);
    let (w, u) = (random(rng, rows * cols), upper_factor(rng, cols));
    let mut matrix = t.upload(&w, rows, cols);
    let mut rounding = t.rounding(int4(cols), rows, cols);
    t.backend.choose_scales(&matrix, None, &mut rounding).unwrap();
    t.backend.fix_scales(&mut rounding);
    let factor = t.upload(&u, cols, cols);
    let rule = SweepRule::Nothing;
    let err =
        t.backend.obs_sweep(&mut matrix, &factor, 0..cols, rule, Some(&mut rounding)).unwrap();
    let (found, errors) = (t.download(&matrix), t.download(&err));
    let rounding = t.backend.fetch_rounding(rounding).unwrap().wait().unwrap();
    let Scales::Groups { scales, .. } = &rounding.scales else { panic!("groups") };
    let mut close = 0;
    for row in 0..rows {
        let mut now: Vec<f64> = w[row * cols..][..cols].iter().map(|w| f64::from(*w)).collect();
        for j in 0..cols {
            let scale = f64::from(scales[row * 2 + j / (cols / 2)]);
            let exact = now[j] / scale;
            let code = f64::from(rounding.codes[row * cols + j]);
            // In f32 a value on the border may go either way; the naive sweep follows.
            assert!((exact.clamp(-8.0, 7.0) - code).abs() < 0.5 + 1e-3, "{row}, {j}");
            close += usize::from((exact - code).abs() > 0.499);
            let value = scale * code;
            assert!((f64::from(found[row * cols + j]) - value).abs() < 1e-6);
            let error = (now[j] - value) / f64::from(u[j * cols + j]);
            assert!((f64::from(errors[row * cols + j]) - error).abs() < 1e-3, "{row}, {j}");
            for (k, now) in now.iter_mut().enumerate().skip(j + 1) {
                *now -= error * f64::from(u[j * cols + k]);
            }
        }
    }
    assert!(close < rows * cols / 50, "{close} codes on a border");
}

/// Grids of every kind, with scales of every type, chosen in every way.
fn grids() -> Vec<Grid> {
    let int = |bits, group_size, symmetric, scale| {
        let grid = IntGrid { bits, group_size, symmetric, scale };
        [ScaleSearch::Minmax, ScaleSearch::Mse].map(|search| Grid::Int { grid, search })
    };
    let block = |ty: &GgmlType| {
        let (ty, grid) = (*ty, BlockGrid::of(*ty).unwrap());
        // With scales of scales there is one way only.
        let searches = [ScaleSearch::Minmax, ScaleSearch::Mse];
        let searches = searches.into_iter().take(if grid.scales.is_some() { 1 } else { 2 });
        searches.map(move |search| Grid::Block { ty, grid, search })
    };
    let mut grids: Vec<Grid> = [
        int(4, Some(32), true, DType::F16),
        int(3, Some(64), false, DType::Bf16),
        int(8, None, true, DType::F32),
        int(8, Some(256), false, DType::F32),
    ]
    .concat();
    grids.extend([DType::Bf16, DType::F16, DType::F32].map(|scale| Grid::F8E4m3 { scale }));
    grids.extend(BlockGrid::TYPES.iter().flat_map(block));
    grids
}

/// Values of several magnitudes, with a row of zeros.
fn uneven(rng: &mut ChaCha8Rng, rows: usize, cols: usize) -> Vec<f32> {
    let mut w = random(rng, rows * cols);
    w.iter_mut().step_by(7).for_each(|w| *w *= 1e-4);
    w.iter_mut().step_by(31).for_each(|w| *w *= 8.0);
    w[(rows - 1) / 2 * cols..][..cols].fill(0.0);
    w
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Scale, zero point and minimum of every group.
fn groups_of(rounding: &Rounding) -> Vec<[f32; 3]> {
    match (&rounding.scales, rounding.grid()) {
        (Scales::Blocks(blocks), Grid::Block { grid, .. }) => {
            let groups = blocks.iter().flat_map(|block| (0..grid.groups()).map(|g| block.group(g)));
            groups.map(|(scale, min)| [scale, 0.0, min]).collect()
        }
        (Scales::Groups { scales, zero_points }, _) => {
            let points = zero_points.iter().map(|point| f32::from(*point));
            scales.iter().zip(points).map(|(scale, point)| [*scale, point, 0.0]).collect()
        }
        (Scales::Blocks(_), _) => panic!("blocks of no block type"),
    }
}

fn reference() -> Instance<cpu::Cpu> {
    Instance { backend: cpu::Cpu::new(Precision::F32, Some(1)).unwrap(), bf16: false }
}

/// Scales chosen for a matrix, and what it and its codes become under them.
fn chosen_and_rounded<B: Backend>(
    t: &Instance<B>,
    grid: Grid,
    (w, rows, cols): (&[f32], usize, usize),
    importance: Option<&[f32]>,
) -> (Vec<u32>, Rounding) {
    let mut matrix = t.upload(w, rows, cols);
    let mut rounding = t.rounding(grid, rows, cols);
    t.backend.choose_scales(&matrix, importance, &mut rounding).unwrap();
    t.backend.round(&mut matrix, &mut rounding).unwrap();
    (bits(&t.download(&matrix)), t.backend.fetch_rounding(rounding).unwrap().wait().unwrap())
}

/// What is rounded is what a reader decodes, and the scales of a model shall not depend on the device that
/// chose them, so both must be the same to the last bit everywhere.
pub(super) fn every_grid_rounds_as_on_the_cpu<B: Backend>(t: &Instance<B>) {
    let reference = reference();
    let int = |bits, group_size, symmetric, scale, search| Grid::Int {
        grid: IntGrid { bits, group_size, symmetric, scale },
        search,
    };
    let mse = ScaleSearch::Mse;
    let mut cases: Vec<(Grid, usize, usize)> =
        grids().into_iter().flat_map(|grid| [(grid, 1, 256), (grid, 37, 512)]).collect();
    // Groups and rows of odd lengths, more and fewer columns than a backend may hold at a time.
    cases.extend([
        (int(4, Some(7), true, DType::F16, mse), 33, 21),
        (int(2, Some(131), false, DType::F16, mse), 5, 393),
        (int(8, None, true, DType::Bf16, mse), 2, 301),
        (int(5, None, false, DType::F32, mse), 65, 1),
        (Grid::F8E4m3 { scale: DType::Bf16 }, 31, 129),
    ]);
    for (grid, rows, cols) in cases {
        let rng = &mut rng(rows * cols);
        let w = uneven(rng, rows, cols);
        let costs: Vec<f32> = random(rng, cols).iter().map(|cost| 0.01 + cost * cost).collect();
        for importance in [None, Some(costs.as_slice())] {
            let case = format!("{grid}, {rows} x {cols}, weighted {}", importance.is_some());
            let expected = chosen_and_rounded(&reference, grid, (&w, rows, cols), importance);
            let found = chosen_and_rounded(t, grid, (&w, rows, cols), importance);
            assert!(found.1.scales == expected.1.scales, "{case}: scales");
            assert!(found.1.codes == expected.1.codes, "{case}: codes");
            assert!(found.0 == expected.0, "{case}: values");
        }
    }
}

/// A matrix, and its factor.
#[derive(Clone, Copy)]
struct ToSweep<'a> {
    w: &'a [f32],
    u: &'a [f32],
    rows: usize,
    cols: usize,
    /// Columns of a block.
    block: usize,
}

/// A matrix after a sweep of column blocks by one of the [`rule`]s.
fn sweep_all<B: Backend>(
    t: &Instance<B>,
    ToSweep { w, u, rows, cols, block }: ToSweep<'_>,
    which: usize,
    rounding: &mut B::Rounding,
) -> Vec<f32> {
    let (b, zeros): (_, Vec<f32>) = (&t.backend, w.iter().map(|w| w.max(0.0)).collect());
    let (mut w, u) = (t.upload(w, rows, cols), t.upload(u, cols, cols));
    let zeros = t.upload(&zeros, rows, cols);
    for first in (0..cols).step_by(block) {
        let block = first..first + block;
        let rule = rule(which, &zeros, rows * block.len());
        let err = b.obs_sweep(&mut w, &u, block.clone(), rule, Some(&mut *rounding)).unwrap();
        b.trailing_update(&mut w, &err, &u, block).unwrap();
    }
    t.download(&w)
}

/// A rule by its number, for a block of so many weights. The last is for groups of 256 columns only.
fn rule<M>(which: usize, zeros_of: &M, weights: usize) -> SweepRule<'_, M> {
    match which {
        0 => SweepRule::Nothing,
        1 => SweepRule::ZerosOf(zeros_of),
        2 => SweepRule::Lowest { zeros: weights / 2 },
        3 => SweepRule::Lowest { zeros: weights },
        4 => SweepRule::Group { zeros: 2, m: 4 },
        5 => SweepRule::Group { zeros: 5, m: 16 },
        _ => SweepRule::Group { zeros: 100, m: 256 },
    }
}

/// The relative distance of two lists of values.
fn distance(found: &[f32], expected: &[f32]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let off = norm(&mut found.iter().zip(expected).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    if off == 0.0 { 0.0 } else { off / norm(&mut expected.iter().map(|x| f64::from(*x))) }
}

/// A factor whose errors do not grow on their way, so that a code that went the other way stays alone.
fn calm_factor(rng: &mut ChaCha8Rng, n: usize) -> Vec<f32> {
    let mut u = upper_factor(rng, n);
    let off_diagonal = u.iter_mut().enumerate().filter(|(i, _)| i % (n + 1) != 0);
    off_diagonal.for_each(|(_, u)| *u *= 0.2);
    u
}

/// How much of it is so.
fn share(of: impl ExactSizeIterator<Item = bool>) -> f64 {
    let all = of.len() as f64;
    of.filter(|is| *is).count() as f64 / all
}

pub(super) fn sweeps_round_as_on_the_cpu<B: Backend>(t: &Instance<B>) {
    let reference = reference();
    let (rows, cols, block) = (23, 512, 256);
    let rng = &mut rng(12);
    let (w, u) = (random(rng, rows * cols), upper_factor(rng, cols));
    let sweep = ToSweep { w: &w, u: &u, rows, cols, block };
    let order: Vec<usize> = (0..cols).map(|i| i * 205 % cols).collect();
    for grid in grids() {
        fn fixed<B: Backend>(
            t: &Instance<B>,
            sweep: ToSweep<'_>,
            grid: Grid,
            order: &[usize],
        ) -> (Vec<f32>, Rounding) {
            let ToSweep { w, rows, cols, .. } = sweep;
            let mut rounding = t.rounding(grid, rows, cols);
            t.backend.choose_scales(&t.upload(w, rows, cols), None, &mut rounding).unwrap();
            t.backend.fix_scales(&mut rounding);
            t.backend.set_order(&mut rounding, order).unwrap();
            let found = sweep_all(t, sweep, 4, &mut rounding);
            (found, t.backend.fetch_rounding(rounding).unwrap().wait().unwrap())
        }
        let expected = fixed(&reference, sweep, grid, &order);
        let found = fixed(t, sweep, grid, &order);
        let case = format!("{grid} in another order");
        // Sums differ in their last places, so a few values may go the other way.
        let codes = found.1.codes.iter().zip(&expected.1.codes);
        let same = share(codes.map(|(found, expected)| found == expected));
        let off = distance(&found.0, &expected.0);
        assert!(same > 0.99 && off < 0.05, "{case}: {same} of the codes, values off by {off}");
    }
}

/// Scales are those of the CPU where the weights are, which is before the first error has moved. After that
/// sums differ in their last places, so that of two scales, or two signs, that are nearly as good the other may
/// be taken.
pub(super) fn sweeps_choose_scales_as_on_the_cpu<B: Backend>(t: &Instance<B>) {
    let reference = reference();
    let mut wrong = Vec::new();
    for (rows, cols, block) in [(21, 512, 256), (1, 256, 256)] {
        let rng = &mut rng(14 + rows);
        let (w, u) = (random(rng, rows * cols), calm_factor(rng, cols));
        let sweep = ToSweep { w: &w, u: &u, rows, cols, block };
        for grid in grids() {
            // Whole rows are in one column block.
            let sweep =
                if grid.span(cols) == cols { ToSweep { block: cols, ..sweep } } else { sweep };
            let rules = if grid.group(cols).is_multiple_of(256) { 7 } else { 6 };
            for which in 0..rules {
                let mut rounding = reference.rounding(grid, rows, cols);
                let expected = sweep_all(&reference, sweep, which, &mut rounding);
                let mut found_rounding = t.rounding(grid, rows, cols);
                let found = sweep_all(t, sweep, which, &mut found_rounding);
                let found_rounding =
                    t.backend.fetch_rounding(found_rounding).unwrap().wait().unwrap();
                let case = format!("{grid}, {rows} rows, rule {which}");
                let off = distance(&found, &expected);
                let (scales, chosen) = (groups_of(&rounding), groups_of(&found_rounding));
                let close = chosen
                    .iter()
                    .zip(&scales)
                    .map(|([a, ..], [b, ..])| (a.abs() - b.abs()).abs() <= 0.02 * b.abs());
                let close = share(close);
                if off > 0.05 || (close < 0.9 && rows > 1) {
                    wrong.push(format!("{case}: {close} of the scales, values off by {off}"));
                }
                let groups = cols / grid.group(cols);
                let first =
                    |of: &[[f32; 3]]| of.iter().step_by(groups).flat_map(|of| bits(of)).collect();
                let (first_scales, first_chosen): (Vec<u32>, Vec<u32>) =
                    (first(&scales), first(&chosen));
                if which == 0 && first_scales != first_chosen {
                    wrong.push(format!("{case}: the first scales"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
