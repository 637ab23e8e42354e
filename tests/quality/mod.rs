//! A real model through the whole program: SmolLM2-135M-Instruct from its `Q4_1` GGUF file.
//!
//! Minutes, not seconds, hence ignored:
//! `cargo test --release --test main -- --ignored --nocapture quality`.

use std::{
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use serde_json::Value;

use crate::harness::{Command, Dir, convert, root};

/// Perplexity after llm-compressor's SparseGPT at 2:4 in its own (block) order: 32 calibration
/// windows of 2048 tokens, all 22 held-out windows of 2048 tokens, the texts of `fixtures/text`.
const REFERENCE: f64 = 89.69;

/// How much worse than the reference still passes. One-shot 2:4 of so small a model is chaotic: the
/// rounding of bf16 products, which moves the dense perplexity by 0.03 %, moves the pruned one by up
/// to 4 % either way through a few masks early on (README, Methods). A broken solver is far off: the
/// next best method has twice the perplexity.
const TOLERANCE: f64 = 0.05;

/// Calibration windows of the reference.
const SAMPLES: usize = 32;

/// Resident memory that the reference's conversion may take.
const MEMORY_BYTES: u64 = 1_000_000_000;

/// Every run uses all cores, so the tests take turns.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn smollm2() -> PathBuf {
    let default = || root().join("target/models/SmolLM2-135M-Instruct.Q4_1.gguf");
    let path = std::env::var_os("SPARSEPACK_SMOLLM2").map_or_else(default, PathBuf::from);
    assert!(
        path.is_file(),
        "{} is missing: run fixtures/make/fetch_smollm2.sh, or set SPARSEPACK_SMOLLM2",
        path.display()
    );
    path
}

/// Prunes SmolLM2 and returns what the command says of it.
fn prune(out: &Path, method: &str, sparsity: &str, samples: usize, more: &[&str]) -> Value {
    let start = Instant::now();
    let samples = samples.to_string();
    let mut command = convert(&smollm2(), out)
        .args(["--quiet", "--json", "--prune", method, "--sparsity", sparsity])
        .args(more);
    if method != "magnitude" {
        let text = ["--calibration", "fixtures/text/calibration.txt", "--seq-len", "2048"];
        command = command.args(text).args(["--samples", &samples]);
    }
    let report = command.succeeds().json();
    println!("convert {method} {sparsity}: {:.0} s", start.elapsed().as_secs_f64());
    report
}

fn perplexity(model: &Path) -> f64 {
    let text = ["--quiet", "--json", "--text", "fixtures/text/heldout.txt"];
    let report = Command::new("eval").arg(model).args(text).succeeds().json();
    report["perplexity"].as_f64().unwrap()
}

#[track_caller]
fn assert_as_good_as_the_reference(what: &str, measured: f64) {
    println!("{what}: perplexity {measured:.4}, reference {REFERENCE}");
    let limit = REFERENCE * (1.0 + TOLERANCE);
    assert!(measured <= limit, "{what}: perplexity {measured}, at most {limit} expected");
}

#[test]
#[ignore = "needs the real model: fixtures/make/fetch_smollm2.sh"]
fn packed_2_4_is_good_small_and_exact() {
    let _turn = turn();
    let dir = Dir::new();
    let (packed, plain) = (dir.join("packed"), dir.join("plain"));
    let report = prune(&packed, "sparsegpt", "2:4", SAMPLES, &["--format", "packed"]);

    let totals = |key: &str| report["totals"][key].as_u64().unwrap();
    let (stored, dense) = (totals("pruned_bytes"), totals("pruned_dense_bytes"));
    println!("pruned tensors: {stored} of {dense} bytes");
    assert!(stored > 0);
    assert_eq!(stored * 16, dense * 9);
    assert_eq!(totals("zeroed") * 2, totals("pruned_parameters"));

    // Only some systems tell; those that do must stay below.
    if let Some(peak) = report["peak_rss_bytes"].as_u64() {
        println!("peak memory: {peak} bytes");
        assert!(peak < MEMORY_BYTES, "peak memory {peak} bytes, below {MEMORY_BYTES} expected");
    }

    let verified = Command::new("verify").arg(&packed).arg("--json").succeeds().json();
    assert_eq!(verified["checked"], verified["tensors"]);

    Command::new("unpack").arg(&packed).arg("-o").arg(&plain).succeeds();
    let against = Command::new("verify").arg(&packed).arg("--against").arg(&plain);
    let compared = against.arg("--json").succeeds().json();
    assert_eq!(compared["compared"], compared["tensors"]);

    assert_as_good_as_the_reference("stage by stage", perplexity(&packed));
}

#[test]
#[ignore = "needs the real model: fixtures/make/fetch_smollm2.sh"]
fn block_order_is_as_good_as_the_reference() {
    let _turn = turn();
    let dir = Dir::new();
    let out = dir.join("out");
    prune(&out, "sparsegpt", "2:4", SAMPLES, &["--format", "packed", "--sequential", "block"]);
    assert_as_good_as_the_reference("block order", perplexity(&out));
}

#[test]
#[ignore = "needs the real model: fixtures/make/fetch_smollm2.sh"]
fn methods_rank_as_published() {
    let _turn = turn();
    let dense = perplexity(&smollm2());
    println!("dense: perplexity {dense:.4}");
    for sparsity in ["2:4", "50%"] {
        let dir = Dir::new();
        let mut better = ("dense", dense);
        for method in ["sparsegpt", "wanda", "magnitude"] {
            let out = dir.join(method);
            prune(&out, method, sparsity, SAMPLES, &[]);
            let measured = perplexity(&out);
            println!("{method} {sparsity}: perplexity {measured:.4}");
            assert!(
                better.1 < measured,
                "{sparsity}: {} has {}, {method} has {measured}",
                better.0,
                better.1
            );
            better = (method, measured);
        }
    }
}
