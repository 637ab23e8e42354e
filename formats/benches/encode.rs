//! Throughput of the encodings on one thread, against a plain copy of the same bytes.
//!
//! `cargo bench -p sparsepack-formats --bench encode` prints GB/s of dense bytes, encoded and decoded.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a program that prints")]

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use sparsepack_formats::{
    DType, Encoder, Encoding, QuantizedRows,
    encoding::{IntGrid, Kept},
};

/// How often a number of the table is measured.
const ROUNDS: usize = 3;

/// How long each time: many ticks of the scheduler, at which processor time advances.
const ROUND: Duration = Duration::from_millis(120);

/// Larger than a core's caches in every type (16 to 63 MB), and columns that many groups divide.
const SHAPE: [usize; 2] = [4096, 3840];

/// Rows encoded and decoded at a time, as conversions do.
const CHUNK_ROWS: usize = 128;

/// Whether an element is other than 0, by row and column.
type Keep = fn(usize, usize) -> bool;

fn main() {
    for dtype in [DType::Bf16, DType::F32, DType::I8] {
        let bytes = SHAPE[0] * SHAPE[1] * dtype.size_bytes();
        println!("{dtype} {} x {}, GB/s of dense bytes", SHAPE[0], SHAPE[1]);
        let source = matrix(dtype, |_, _| true);
        let mut target = vec![0; bytes];
        let copy = rate(bytes, || {
            target.copy_from_slice(black_box(&source));
            black_box(&mut target);
        });
        println!("  {:<24} encode {copy:>6.2}                decode {copy:>6.2}", "memcpy");
        let kept = count(half);
        for (encoding, keep) in cases(dtype, kept) {
            let dense = match keep {
                Some((n, m)) => matrix(dtype, move |row, col| rotated(row, col, n, m)),
                None => matrix(dtype, half),
            };
            measure(encoding, &dense, copy);
        }
        if dtype == DType::Bf16 {
            for (encoding, keep) in quantized_cases(kept) {
                measure_codes(encoding, keep, copy);
            }
        }
    }
}

/// Encodings with the pattern to measure each on; half of the elements at random without one.
fn cases(dtype: DType, kept: u64) -> Vec<(Encoding, Option<(usize, usize)>)> {
    let nm = |n, m| (Encoding::Nm { n, m, dtype }, Some((usize::from(n), usize::from(m))));
    let of_torch = (dtype != DType::F32).then_some(Encoding::TorchCutlass { dtype });
    let foreign = [of_torch, Some(Encoding::CtSparse24Bitmask { dtype })].into_iter().flatten();
    let mut cases: Vec<_> = foreign.map(|encoding| (encoding, Some((2, 4)))).collect();
    cases.extend([
        (Encoding::Dense { dtype }, None),
        (Encoding::Sparse24 { dtype }, Some((2, 4))),
        nm(1, 4),
        nm(4, 8),
        nm(6, 8),
        nm(8, 16),
        nm(5, 10),
        (Encoding::Bitmask { dtype, kept }, None),
        (Encoding::CtSparseBitmask { dtype, kept }, None),
    ]);
    cases
}

/// Encodings of codes for BF16 values, with the pattern to measure each on; every code is other than 0
/// without one.
fn quantized_cases(room: u64) -> Vec<(Encoding, Keep)> {
    let grid = |bits, group_size| IntGrid { bits, group_size, symmetric: true, scale: DType::Bf16 };
    let int4 = |kept| Encoding::Int { grid: grid(4, Some(128)), kept };
    let every: Keep = |_, _| true;
    vec![
        (int4(Kept::All), every),
        (int4(Kept::Sparse24), |row, col| rotated(row, col, 2, 4)),
        (int4(Kept::Nm { n: 4, m: 8 }), |row, col| rotated(row, col, 4, 8)),
        (int4(Kept::Bitmask { kept: room }), half),
        (Encoding::Int { grid: grid(8, None), kept: Kept::All }, every),
        (Encoding::CtPackQuantized { grid: grid(4, Some(128)) }, every),
        (Encoding::CtIntQuantized { grid: grid(8, None) }, every),
        (Encoding::CtFloatQuantized { scale: DType::Bf16 }, every),
    ]
}

fn measure_codes(encoding: Encoding, keep: Keep, copy: f64) {
    let [rows, cols] = SHAPE;
    // 1 to 7 are on every grid measured, as bits of an 8-bit float too.
    let code = |index: usize| {
        if keep(index / cols, index % cols) { (index % 7) as i8 + 1 } else { 0 }
    };
    let codes: Vec<i8> = (0..rows * cols).map(code).collect();
    let groups = match encoding {
        Encoding::Int { grid, .. } | Encoding::CtPackQuantized { grid } => {
            grid.groups("w.weight", cols).unwrap()
        }
        _ => 1,
    };
    let scales = vec![0.5; CHUNK_ROWS * groups];
    measure_with(encoding, rows * cols * 2, copy, |encoder, append| {
        for codes in codes.chunks(CHUNK_ROWS * cols) {
            let rows = QuantizedRows { codes, scales: &scales, zero_points: &[] };
            append(encoder.quantized_rows(rows).unwrap());
        }
    });
}

fn measure(encoding: Encoding, dense: &[u8], copy: f64) {
    let row_bytes = dense.len() / SHAPE[0];
    measure_with(encoding, dense.len(), copy, |encoder, append| {
        for chunk in dense.chunks(CHUNK_ROWS * row_bytes) {
            append(encoder.rows(chunk).unwrap());
        }
    });
}

/// Prints the row of one encoding of `bytes` dense bytes; `feed` gives an encoder all rows, and
/// `append` takes what comes out.
fn measure_with(
    encoding: Encoding,
    bytes: usize,
    copy: f64,
    feed: impl Fn(&mut Encoder, &mut dyn FnMut(Vec<Vec<u8>>)),
) {
    let encode = || {
        let mut encoder = Encoder::new(encoding, "w.weight", &SHAPE).unwrap();
        let mut parts = vec![vec![]; encoding.components("w.weight", &SHAPE).unwrap().len()];
        let mut append = |more: Vec<Vec<u8>>| {
            for (part, more) in parts.iter_mut().zip(more) {
                part.push(more);
            }
        };
        feed(&mut encoder, &mut append);
        append(encoder.finish().unwrap());
        parts
    };
    let encoded = rate(bytes, &encode);
    let parts: Vec<Vec<u8>> = encode().iter().map(|part| part.concat()).collect();
    let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
    let mut out = vec![];
    let decoded = rate(bytes, || {
        for row in (0..SHAPE[0]).step_by(CHUNK_ROWS) {
            out.clear();
            let rows = row..row + CHUNK_ROWS;
            encoding.decode_dense("w.weight", &SHAPE, &parts, rows, &mut out).unwrap();
            black_box(&out);
        }
    });
    println!(
        "  {:<24} encode {encoded:>6.2} ({:>4.0} %)       decode {decoded:>6.2} ({:>4.0} %)",
        encoding.to_string(),
        100.0 * encoded / copy,
        100.0 * decoded / copy
    );
}

/// A matrix with a byte other than 0 in every element that `keep` names.
fn matrix(dtype: DType, keep: impl Fn(usize, usize) -> bool) -> Vec<u8> {
    let size = dtype.size_bytes();
    let mut bytes = vec![0; SHAPE[0] * SHAPE[1] * size];
    for (index, element) in bytes.chunks_exact_mut(size).enumerate() {
        if keep(index / SHAPE[1], index % SHAPE[1]) {
            element.fill(index as u8 | 1);
        }
    }
    bytes
}

/// Whether half of the elements at random have this one.
fn half(row: usize, col: usize) -> bool {
    hash(row * SHAPE[1] + col) & 1 == 0
}

/// Whether a rotation of `n` neighbours in each group of `m` has this one.
fn rotated(row: usize, col: usize, n: usize, m: usize) -> bool {
    (col + hash(row * SHAPE[1] + col / m)) % m < n
}

fn count(keep: impl Fn(usize, usize) -> bool) -> u64 {
    let kept = |row: usize| (0..SHAPE[1]).filter(|&col| keep(row, col)).count() as u64;
    (0..SHAPE[0]).map(kept).sum()
}

fn hash(index: usize) -> usize {
    (index as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) as usize >> 40
}

/// GB/s of the fastest round, by processor time where the system tells it, so that other work on the
/// machine counts less.
fn rate<R>(bytes: usize, mut work: impl FnMut() -> R) -> f64 {
    let mut best = f64::MAX;
    for _ in 0..ROUNDS {
        let (start, before) = (Instant::now(), processor_secs());
        let (mut secs, mut count) = (0.0, 0.0);
        while secs < ROUND.as_secs_f64() {
            black_box(work());
            count += 1.0;
            secs = match (before, processor_secs()) {
                (Some(before), Some(now)) => now - before,
                _ => start.elapsed().as_secs_f64(),
            };
        }
        best = best.min(secs / count);
    }
    bytes as f64 / best / 1e9
}

/// Seconds that this thread has run on a processor.
fn processor_secs() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    let nanoseconds: u64 = text.split(' ').next()?.parse().ok()?;
    Some(nanoseconds as f64 / 1e9)
}
