//! `bench layer`: what it prints, and what it refuses.

use crate::{
    cli::expect_error,
    harness::{Command, Dir},
};

const TINY: [&str; 8] = ["--rows", "64", "--cols", "96", "--tokens", "300", "--device", "cpu"];
const PHASES: [&str; 6] = ["upload", "gram", "factor", "sweep", "error", "pack"];

fn layer(args: &[&str]) -> Command {
    Command::new("bench").arg("layer").args(args)
}

#[test]
fn a_table_has_a_line_for_every_phase() {
    let ran = layer(&TINY).args(["--compute", "f32", "--repeat", "2"]).succeeds();
    for phase in PHASES {
        let lines = ran.stdout().lines().filter(|line| line.trim_start().starts_with(phase));
        assert_eq!(lines.count(), 1, "{phase}\n{}", ran.story());
    }
    for line in ["layer of 64 x 96, sparsegpt 2:4, 300 tokens", "f32 products", "as 2:4 BF16"] {
        assert!(ran.stdout().contains(line), "{line}\n{}", ran.story());
    }
    assert_eq!(ran.stderr(), "");
}

#[test]
fn json_has_every_phase_with_its_count_rate_and_arithmetic() {
    let args = [&TINY[..], &["--compute", "f32", "--sparsity", "50%", "--json"]].concat();
    let report = layer(&args).succeeds().json();
    assert_eq!(report["encoding"], "bitmask", "{report}");
    assert_eq!(report["sparsity"], "50%");
    assert_eq!(report["repeat"], 3);
    let ceiling = report["gemm_ceiling_flops_per_sec"].as_f64().unwrap();
    let phases = report["phases"].as_array().unwrap();
    assert_eq!(phases.iter().map(|phase| &phase["phase"]).collect::<Vec<_>>(), PHASES);
    for phase in phases {
        let seconds = phase["seconds"].as_f64().unwrap();
        assert!(seconds > 0.0, "{phase}");
        let arithmetic = match phase["phase"].as_str().unwrap() {
            "gram" => Some("f32 products"),
            "factor" => Some("f64"),
            "sweep" | "error" => Some("f32"),
            _ => None,
        };
        assert_eq!(phase.get("arithmetic").and_then(|word| word.as_str()), arithmetic, "{phase}");
        let (count, rate, unit) = match arithmetic {
            Some(_) => ("flops", "tflops_per_sec", 1e12),
            None => ("bytes", "gbytes_per_sec", 1e9),
        };
        let (count, rate) = (phase[count].as_f64().unwrap(), phase[rate].as_f64().unwrap());
        assert!((rate * unit * seconds / count - 1.0).abs() < 1e-9, "{phase}");
        if arithmetic.is_some() {
            // What the share is cannot be told on a machine with other work; only what it is of.
            let share = phase["of_ceiling"].as_f64().unwrap();
            assert!(share > 0.0 && (share * ceiling / unit / rate - 1.0).abs() < 1e-9, "{phase}");
        }
    }
}

fn refused(name: &str, code: i32, args: &[&str]) {
    expect_error(name, code, &Dir::new(), layer(args));
}

#[test]
fn bench_groups_do_not_divide() {
    let args = ["--rows", "8", "--cols", "10", "--tokens", "4"];
    refused("bench_groups_do_not_divide", 1, &args);
}

#[test]
fn bench_of_too_few_zeros() {
    let args = ["--rows", "64", "--cols", "64", "--tokens", "4", "--sparsity", "5%"];
    refused("bench_of_too_few_zeros", 2, &args);
}

#[test]
fn bench_of_no_tokens() {
    refused("bench_of_no_tokens", 2, &["--rows", "8", "--cols", "8", "--tokens", "0"]);
}

#[test]
fn bench_repeated_never() {
    let args = ["--rows", "8", "--cols", "8", "--tokens", "4", "--repeat", "0"];
    refused("bench_repeated_never", 2, &args);
}

#[test]
fn bench_without_a_size() {
    refused("bench_without_a_size", 2, &["--rows", "8"]);
}

#[test]
fn a_layer_that_memory_cannot_hold_is_refused() {
    // 2^40 weights: 44 TB and more, of which no machine of this decade has a fifth to spare.
    let args = ["--rows", "1048576", "--cols", "1048576", "--tokens", "4", "--device", "cpu"];
    let ran = layer(&args).fails(2);
    ran.says(&["error: a layer of 1048576 x 1048576 needs", "choose smaller --rows or --cols"]);
}

#[test]
fn cuda_times_a_layer() {
    let args = ["--rows", "32", "--cols", "64", "--tokens", "96", "--repeat", "1", "--json"];
    let ran = layer(&args).args(["--device", "cuda:0"]).run();
    let missing = ["no CUDA device 0", "is not to be found"];
    if missing.iter().any(|what| ran.stderr().contains(what))
        && std::env::var_os("SPARSEPACK_REQUIRE_GPU").is_none()
    {
        println!("skipped: {}", ran.stderr());
        return;
    }
    let report = ran.exits(0).json();
    assert_eq!(report["phases"].as_array().unwrap().len(), PHASES.len());
    assert!(!report["compute"].as_str().unwrap().starts_with("CPU"), "{report}");
    let error = report["relative_error"].as_f64().unwrap();
    assert!(error > 0.0 && error < 0.5, "{error}");
}
