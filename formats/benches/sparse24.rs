//! Throughput of 2:4 rows by instruction set, one thread, against `memcpy`.
//!
//! GB/s counts dense bytes, for encoding as for decoding, and so does `memcpy`, which copies the same
//! dense bytes. Buffers are larger than any cache and have been written before. Best of some runs, in
//! processor time where the system tells it (Linux), so that other work counts less.
#![allow(clippy::print_stdout, reason = "a benchmark prints its table")]

use std::time::{Duration, Instant};

use sparsepack_formats::{
    DType, FormatError,
    encoding::{
        MatrixShape,
        sparse24::{self, Kernel},
    },
};

/// Bytes of the dense matrix: well beyond a last-level cache.
const DENSE_BYTES: usize = 1 << 30;

/// How long each row of the table is repeated.
const BUDGET: Duration = Duration::from_secs(4);

fn main() -> Result<(), FormatError> {
    println!("{:<34}{:>8}  {:>9}", "", "GB/s", "of memcpy");
    sparse24(DType::Bf16)?;
    sparse24(DType::F32)
}

fn sparse24(dtype: DType) -> Result<(), FormatError> {
    let cols = 4096;
    let matrix = MatrixShape { rows: DENSE_BYTES / cols / dtype.size_bytes(), cols };
    let dense = random_2of4(dtype);
    let mut out = vec![1; DENSE_BYTES];
    let copy = best(|| {
        out.copy_from_slice(&dense);
        Ok(())
    })?;
    row("memcpy", copy, copy);
    let (mut values, mut metadata) =
        (vec![1; DENSE_BYTES / 2], vec![1; matrix.rows * cols.div_ceil(8)]);
    for kernel in Kernel::available() {
        let secs = best(|| {
            assert!(kernel.pack(dtype, &dense, &mut values, &mut metadata));
            Ok(())
        })?;
        row(&format!("sparse24 {dtype} pack {kernel:?}"), secs, copy);
        let secs = best(|| {
            assert!(kernel.unpack(dtype, &values, &metadata, &mut out));
            Ok(())
        })?;
        row(&format!("sparse24 {dtype} unpack {kernel:?}"), secs, copy);
    }
    let secs = best(|| {
        values.clear();
        metadata.clear();
        sparse24::encode("w", dtype, matrix, &dense, &mut values, &mut metadata)
    })?;
    row(&format!("sparse24 {dtype} encode"), secs, copy);
    let secs = best(|| {
        out.clear();
        sparse24::decode("w", dtype, matrix, &values, &metadata, 0..matrix.rows, &mut out)
    })?;
    row(&format!("sparse24 {dtype} decode"), secs, copy);
    let secs =
        best(|| sparse24::encode_into("w", dtype, matrix, &dense, &mut values, &mut metadata))?;
    row(&format!("sparse24 {dtype} encode_into"), secs, copy);
    let secs = best(|| {
        sparse24::decode_into("w", dtype, matrix, &values, &metadata, 0..matrix.rows, &mut out)
    })?;
    row(&format!("sparse24 {dtype} decode_into"), secs, copy);
    assert!(out == dense);
    Ok(())
}

/// Two random values in every group of four, at random places.
fn random_2of4(dtype: DType) -> Vec<u8> {
    let size = dtype.size_bytes();
    let mut dense = vec![0; DENSE_BYTES];
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    for group in dense.chunks_exact_mut(4 * size) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let first = state as usize % 4;
        let second = (first + 1 + (state >> 8) as usize % 3) % 4;
        let bytes = (state | 1 << 16 | 1 << 32).to_le_bytes();
        group[first * size..][..size].copy_from_slice(&bytes[2..][..size]);
        group[second * size..][..size].copy_from_slice(&bytes[4..][..size]);
    }
    dense
}

fn best(mut work: impl FnMut() -> Result<(), FormatError>) -> Result<f64, FormatError> {
    let start = Instant::now();
    let mut best = f64::MAX;
    while start.elapsed() < BUDGET {
        let round = (Instant::now(), processor_secs());
        work()?;
        let secs = match (round.1, processor_secs()) {
            (Some(before), Some(after)) => after - before,
            _ => round.0.elapsed().as_secs_f64(),
        };
        best = best.min(secs);
    }
    Ok(best)
}

/// Seconds that this thread has run on a processor.
fn processor_secs() -> Option<f64> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    let nanoseconds: u64 = text.split(' ').next()?.parse().ok()?;
    Some(nanoseconds as f64 / 1e9)
}

fn row(name: &str, secs: f64, copy: f64) {
    println!("{name:<34}{:>8.1}  {:>7.0} %", DENSE_BYTES as f64 / secs / 1e9, 100.0 * copy / secs);
}
