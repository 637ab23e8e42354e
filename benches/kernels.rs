//! Throughput of the products that dominate a conversion, for each arithmetic the processor offers.
//!
//! Prints GFLOP/s, the best of many repetitions. Only half of the Gram matrix and of the causal
//! scores is computed, and only that half is counted.
#![allow(clippy::print_stdout, reason = "a benchmark prints its table")]

use std::time::{Duration, Instant};

use sparsepack::backend::cpu::Cpu;
use sparsepack::backend::{
    Activation, AttentionShape, BackendError, BlockOps, SequenceLens, SolveOps, StatOps, Storage,
    SweepRule,
};

/// How long each kernel is repeated.
const BUDGET: Duration = Duration::from_millis(400);

fn main() -> Result<(), BackendError> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    for threads in if cores > 1 { vec![1, cores] } else { vec![1] } {
        for cpu in Cpu::every_arithmetic(Some(threads))? {
            println!("{}, {threads} threads", cpu.describe());
            cpu.scope(|| table(&cpu))?;
        }
    }
    Ok(())
}

fn table(cpu: &Cpu) -> Result<(), BackendError> {
    println!("  {:<34}{:>9.0} GFLOP/s", "ceiling", cpu.measure_gemm_ceiling()? / 1e9);
    for (tokens, input, output) in
        [(2048, 576, 1536), (2048, 1536, 576), (2048, 576, 960), (2048, 2048, 2048)]
    {
        let x = operand(cpu, tokens, input)?;
        let weight = cpu.prepare(&[&matrix(cpu, output, input)?])?;
        let flops = 2.0 * (tokens * input * output) as f64;
        row(&format!("linear {tokens}x{input}x{output}"), flops, || cpu.linear(&x, &weight, None))?;
    }
    let (tokens, hidden, features) = (2048, 576, 1536);
    let x = matrix(cpu, tokens, hidden)?;
    let gain = matrix(cpu, 1, hidden)?;
    row(&format!("rms_norm {tokens}x{hidden}"), 0.0, || cpu.rms_norm(&x, &gain, 1e-5))?;
    let normed = cpu.rms_norm(&x, &gain, 1e-5)?;
    row(&format!("finite rows {tokens}x{hidden}"), 0.0, || cpu.count_non_finite_rows(&normed))?;
    let gate_up = cpu.prepare(&[&matrix(cpu, 2 * features, hidden)?])?;
    let flops = 4.0 * (tokens * hidden * features) as f64;
    let silu = Activation::Silu;
    row(&format!("gated {tokens}x{hidden}x{features}"), flops, || {
        cpu.linear_gated(&normed, &gate_up, None, silu)
    })?;
    let inner = cpu.linear_gated(&normed, &gate_up, None, silu)?;
    let down = cpu.prepare(&[&matrix(cpu, hidden, features)?])?;
    let mut residual = matrix(cpu, tokens, hidden)?;
    row(&format!("residual {tokens}x{features}x{hidden}"), flops / 2.0, || {
        cpu.linear_add(&mut residual, &inner, &down, None)
    })?;
    for (tokens, d) in [(2048, 576), (2048, 1536), (8192, 1536)] {
        let x = operand(cpu, tokens, d)?;
        let mut h = cpu.zeros(d, d)?;
        let flops = (tokens * d * (d + 1)) as f64;
        row(&format!("gram {tokens}x{d}"), flops, || cpu.gram_accumulate(&mut h, &x))?;
    }
    for (lens, num_heads, num_kv_heads) in [(vec![2048], 9, 3), (vec![512; 4], 9, 3)] {
        let head_dim = 64;
        let shape = AttentionShape { num_heads, num_kv_heads, head_dim, scale: 0.125 };
        let scores: usize = lens.iter().map(|len| len * (len + 1) / 2).sum();
        let flops = 4.0 * (scores * num_heads * head_dim) as f64;
        let name = format!("attention {}x{} heads {num_heads}", lens.len(), lens[0]);
        let lens = SequenceLens::new(lens);
        let qkv = matrix(cpu, lens.tokens(), shape.qkv_cols())?;
        row(&name, flops, || cpu.causal_attention(&qkv, &shape, &lens))?;
    }
    let (rows, cols) = (576, 1536);
    let mut h = cpu.zeros(cols, cols)?;
    cpu.gram_accumulate(&mut h, &operand(cpu, 2 * cols, cols)?)?;
    let flops = 2.0 / 3.0 * (cols as f64).powi(3);
    row(&format!("inverse factor {cols}"), flops, || cpu.inverse_factor_upper(&h, 1.0))?;
    let u = cpu.inverse_factor_upper(&h, 1.0)?;
    let w = matrix(cpu, rows, cols)?;
    let rule = SweepRule::Lowest { zeros: rows * 64 };
    let flops = (rows * 128 * 128) as f64;
    row(&format!("obs sweep {rows}x128 of {cols}"), flops, || {
        cpu.obs_sweep(&mut cpu.duplicate(&w)?, &u, 0..128, rule, None)
    })
}

/// Prints the best rate of repeated work.
fn row<R>(
    name: &str,
    flops: f64,
    mut work: impl FnMut() -> Result<R, BackendError>,
) -> Result<(), BackendError> {
    let start = Instant::now();
    let mut best = Duration::MAX;
    while start.elapsed() < BUDGET {
        let round = Instant::now();
        std::hint::black_box(work()?);
        best = best.min(round.elapsed());
    }
    let secs = best.as_secs_f64();
    println!("  {name:<34}{:>9.0} GFLOP/s {:>9.2} ms", flops / secs / 1e9, secs * 1e3);
    Ok(())
}

fn matrix(cpu: &Cpu, rows: usize, cols: usize) -> Result<<Cpu as Storage>::Matrix, BackendError> {
    let value = |i: usize| ((i * 7919) % 1009) as f32 / 504.5 - 1.0;
    cpu.upload(&(0..rows * cols).map(value).collect::<Vec<_>>(), rows, cols)
}

/// A matrix as a norm leaves it: in the element type of products.
fn operand(cpu: &Cpu, rows: usize, cols: usize) -> Result<<Cpu as Storage>::Matrix, BackendError> {
    let gain = cpu.upload(&vec![1.0; cols], 1, cols)?;
    cpu.rms_norm(&matrix(cpu, rows, cols)?, &gain, 1e-5)
}
