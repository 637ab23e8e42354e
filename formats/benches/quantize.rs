//! Throughput of the ggml quantizers and decoders on one thread.
//!
//! Prints MB/s of f32 values, the best of many repetitions, for values from a bell curve. Rows do
//! not depend on each other, so callers multiply this by their threads.
#![allow(clippy::print_stdout, reason = "a benchmark prints its table")]

use std::time::{Duration, Instant};

use sparsepack_formats::encoding::ggml;
use sparsepack_formats::{Encoding, GgmlType, Result};

/// How long each function is repeated.
const BUDGET: Duration = Duration::from_millis(400);

const ROWS: usize = 256;
const COLS: usize = 2048;

fn main() -> Result<()> {
    let values = bell_curve(ROWS * COLS);
    let rows: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    println!("{ROWS} x {COLS}, MB/s of f32 {:>14} {:>9}", "quantize", "decode");
    for ty in GgmlType::all().filter(|ty| ty.block_len() > 1) {
        let mut blocks = Vec::new();
        let quantize = best(|| {
            blocks.clear();
            ggml::encode("w", ty, COLS, 0, &rows, &mut blocks)
        })?;
        let mut decoded = vec![0.0; values.len()];
        let decode = best(|| {
            Encoding::Ggml { ty }.decode_all_f32("w", &[ROWS, COLS], &[&blocks], &mut decoded)
        })?;
        let rate = |time: Duration| rows.len() as f64 / time.as_secs_f64() / 1e6;
        println!("  {:<32}{:>9.0}{:>10.0}", ty.name(), rate(quantize), rate(decode));
    }
    Ok(())
}

fn best(mut work: impl FnMut() -> Result<()>) -> Result<Duration> {
    let start = Instant::now();
    let mut best = Duration::MAX;
    while start.elapsed() < BUDGET {
        let round = Instant::now();
        work()?;
        best = best.min(round.elapsed());
    }
    Ok(best)
}

/// Sums of twelve numbers from a linear congruential generator: nearly normal, deviation 0.05.
fn bell_curve(count: usize) -> Vec<f32> {
    let mut state = 24u32;
    let mut uniform = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32
    };
    (0..count).map(|_| ((0..12).map(|_| uniform()).sum::<f32>() - 6.0) * 0.05).collect()
}
