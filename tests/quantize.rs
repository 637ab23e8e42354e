//! Whole conversions that quantize, alone and with pruning, through the command line.

use std::path::Path;

use sparsepack::{model::ModelSource, pipeline::Manifest};

use crate::harness::{Dir, convert, fixture};

/// A conversion of the fixture model, which has rows of 128 and 384.
fn quantize(out: &Path, args: &[&str]) -> Manifest {
    let mut command = convert(&fixture("model"), out);
    command = command.args(args);
    if !args.contains(&"rtn") {
        command = command
            .args(["--samples", "8", "--seq-len", "64", "--calibration"])
            .arg(fixture("text/calibration.txt"));
    }
    command.succeeds();
    crate::harness::Command::new("verify").arg(out).succeeds();
    Manifest::read(out).unwrap()
}

/// `‖w − ŵ‖² / ‖w‖²` over the linears of the blocks.
fn distance(a: &Path, b: &Path) -> f64 {
    let (a, b) = (ModelSource::open(a).unwrap(), ModelSource::open(b).unwrap());
    let (mut lost, mut all) = (0.0, 0.0);
    for tensor in a.tensors().iter().filter(|tensor| tensor.name.ends_with("_proj.weight")) {
        let (x, y) = (a.read_f32(&tensor.name).unwrap(), b.read_f32(&tensor.name).unwrap());
        lost += x.iter().zip(&y).map(|(x, y)| f64::from(x - y).powi(2)).sum::<f64>();
        all += x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
    }
    lost / all
}

#[test]
fn every_scheme_is_stored_and_helps_the_output() {
    let dir = Dir::new();
    for (format, scheme, bits, args) in [
        ("packed", "int4", 4.5, &["--group-size", "32"][..]),
        ("packed", "int3", 3.25, &["--group-size", "64"]),
        ("packed", "int4", 4.75, &["--group-size", "32", "--asymmetric"]),
        ("packed", "int8", 8.1, &[]),
        ("compressed-tensors", "int4", 4.2, &[]),
        ("compressed-tensors", "int8", 8.2, &["--asymmetric"]),
        ("compressed-tensors", "f8_e4m3", 8.2, &[]),
        ("gguf", "q8_0", 8.5, &[]),
        ("gguf", "q5_0", 5.5, &[]),
        ("gguf", "q4_0", 4.5, &[]),
    ] {
        let out = dir.join(&format!("{format}-{scheme}-{}", args.len()));
        let flags = [&["--format", format, "--quantize", scheme], args].concat();
        let manifest = quantize(&out, &flags);
        let what = format!("{format} {scheme} {args:?}");
        let quantized: Vec<_> =
            manifest.tensors.iter().filter(|tensor| tensor.quantized.is_some()).collect();
        assert_eq!(quantized.len(), 28, "{what}");
        for tensor in quantized {
            let report = tensor.report.as_ref().unwrap();
            let (error, nearest) = (report.relative_error.unwrap(), report.nearest_error.unwrap());
            assert!(error < nearest, "{what}: {}: {error} {nearest}", tensor.name);
            let stored = report.bits_per_weight.unwrap();
            assert!((stored - bits).abs() < 0.2, "{what}: {}: {stored} bits", tensor.name);
        }
    }
}

#[test]
fn rounding_to_nearest_is_within_half_a_step() {
    let dir = Dir::new();
    for (format, scheme, most) in [
        ("packed", "int8", 6e-5),
        ("packed", "int4", 1.5e-2),
        ("compressed-tensors", "int4", 1.5e-2),
        ("gguf", "q8_0", 4e-5),
        ("gguf", "q4_0", 1.2e-2),
    ] {
        let out = dir.join(&format!("{format}-{scheme}"));
        quantize(&out, &["--format", format, "--quantize", scheme, "--quantizer", "rtn"]);
        // Rows in another order, as those of q and k in a GGUF file, would be far away.
        let found = distance(&fixture("model"), &out);
        assert!(found < most, "{format} {scheme}: {found}");
    }
}

#[test]
fn pruned_weights_stay_exact_zeros_on_every_grid() {
    let dir = Dir::new();
    for (format, scheme, sparsity, method, args) in [
        ("packed", "int4", "2:4", "sparsegpt", &["--group-size", "32"][..]),
        ("packed", "int8", "4:8", "wanda", &["--group-size", "32", "--asymmetric"]),
        ("packed", "int4", "50%", "sparsegpt", &["--asymmetric"]),
        ("packed", "int2", "50%", "magnitude", &[]),
        ("compressed-tensors", "int4", "2:4", "sparsegpt", &[]),
        ("compressed-tensors", "f8_e4m3", "50%", "wanda", &[]),
        ("gguf", "q4_0", "2:4", "sparsegpt", &[]),
        ("gguf", "q8_0", "50%", "magnitude", &[]),
    ] {
        let out = dir.join(&format!("{format}-{scheme}-{}", sparsity.replace(':', "of")));
        let flags =
            ["--format", format, "--quantize", scheme, "--prune", method, "--sparsity", sparsity];
        let manifest = quantize(&out, &[&flags, args].concat());
        let source = ModelSource::open(&out).unwrap();
        let pruned = manifest.tensors.iter().filter(|tensor| tensor.pruned.is_some());
        let mut layers = 0;
        for tensor in pruned {
            layers += 1;
            assert!(tensor.quantized.is_some(), "{}", tensor.name);
            let values = source.read_f32(&tensor.name).unwrap();
            let zeros = values.iter().filter(|value| **value == 0.0).count();
            let what = format!("{format} {scheme} {sparsity}: {}", tensor.name);
            assert!(zeros * 2 >= values.len() - 256, "{what}: {zeros} of {}", values.len());
            if let Some((n, m)) = sparsity.split_once(':') {
                let (n, m): (usize, usize) = (n.parse().unwrap(), m.parse().unwrap());
                let fits = |group: &[f32]| group.iter().filter(|value| **value != 0.0).count() <= n;
                assert!(values.chunks(m).all(fits), "{what}");
            }
        }
        assert_eq!(layers, 28, "{format} {scheme} {sparsity}");
    }
}

#[test]
fn a_sparse_source_keeps_its_zeros() {
    let dir = Dir::new();
    let (pruned, quantized) = (dir.join("pruned"), dir.join("quantized"));
    convert(&fixture("model"), &pruned)
        .args(["--prune", "magnitude", "--sparsity", "2:4", "--format", "packed"])
        .succeeds();
    let mut command = convert(&pruned, &quantized);
    command = command.args(["--quantize", "int4", "--group-size", "32", "--format", "packed"]);
    command = command.args(["--samples", "8", "--seq-len", "64", "--calibration"]);
    command.arg(fixture("text/calibration.txt")).succeeds();
    let (before, after) =
        (ModelSource::open(&pruned).unwrap(), ModelSource::open(&quantized).unwrap());
    for tensor in after.tensors().iter().filter(|tensor| tensor.name.ends_with("_proj.weight")) {
        assert_eq!(tensor.encoding.to_string(), "2:4 int4 g32 BF16", "{}", tensor.name);
        let (x, y) =
            (before.read_f32(&tensor.name).unwrap(), after.read_f32(&tensor.name).unwrap());
        assert!(x.iter().zip(&y).all(|(x, y)| *x != 0.0 || *y == 0.0), "{}", tensor.name);
    }
    // What is quantized and left alone is copied as it is.
    let copied = dir.join("copied");
    convert(&quantized, &copied).args(["--format", "packed"]).succeeds();
    let read = |out: &Path| std::fs::read(out.join("model.safetensors")).unwrap();
    assert!(read(&copied) == read(&quantized));
}

#[test]
fn rules_give_layers_grids_and_patterns_of_their_own() {
    let dir = Dir::new();
    let recipe = dir.write(
        "recipe.toml",
        r#"
        [prune]
        method = "sparsegpt"
        sparsity = "2:4"
        [quantize]
        scheme = "int4"
        group_size = 64
        [[rule]]
        targets = ["blocks:0..1"]
        dense = true
        [[rule]]
        targets = ["down_proj"]
        sparsity = "none"
        quantize = "int8"
        [[rule]]
        targets = ["o_proj"]
        quantize = "none"
        [[rule]]
        targets = ["k_proj"]
        sparsity = "50%"
        group_size = 32
        [output]
        format = "packed"
        "#,
    );
    let out = dir.join("out");
    let manifest = quantize(&out, &["--recipe", recipe.to_str().unwrap()]);
    let encoding = |name: &str| {
        let name = format!("model.layers.{name}_proj.weight");
        let tensor = manifest.tensors.iter().find(|tensor| tensor.name == name).unwrap();
        tensor.encoding.to_string()
    };
    assert_eq!(encoding("0.self_attn.q"), "BF16");
    assert_eq!(encoding("1.self_attn.q"), "2:4 int4 g64 BF16");
    assert_eq!(encoding("1.mlp.down"), "int8 BF16");
    assert_eq!(encoding("1.self_attn.o"), "2:4 BF16");
    assert_eq!(encoding("1.self_attn.k"), "bitmask int4 g32 BF16");
}

/// Stored bits per weight of the linears.
fn linear_bits(manifest: &Manifest) -> f64 {
    let linears = manifest.tensors.iter().filter(|tensor| tensor.name.ends_with("_proj.weight"));
    let (mut bits, mut weights) = (0, 0);
    for tensor in linears {
        bits += tensor.components.iter().map(|component| component.bytes * 8).sum::<u64>();
        weights += tensor.shape.iter().map(|&n| n as u64).product::<u64>();
    }
    bits as f64 / weights as f64
}

#[test]
fn a_size_budget_is_kept_and_used() {
    let dir = Dir::new();
    let (out, again) = (dir.join("out"), dir.join("again"));
    let budget = ["--format", "packed", "--target-bits", "3.4", "--group-size", "32"];
    let candidates = ["--candidates", "int6,int4,int3,2:4 int4,50% int3"];
    let manifest = quantize(&out, &[&budget[..], &candidates].concat());
    let bits = linear_bits(&manifest);
    assert!(bits <= 3.4 && bits > 3.3, "{bits}");
    let mut kinds: Vec<String> =
        manifest.tensors.iter().map(|tensor| tensor.encoding.to_string()).collect();
    kinds.sort();
    kinds.dedup();
    // Dense norms and embeddings, and at least two of the candidates.
    assert!(kinds.len() >= 3, "{kinds:?}");
    // What was chosen stands in the manifest, and is not measured again.
    assert_eq!(manifest.recipe.budget, None);
    convert(&fixture("model"), &again).arg("--recipe").arg(out.join("manifest.json")).succeeds();
    let read = |out: &Path| std::fs::read(out.join("model.safetensors")).unwrap();
    assert!(read(&again) == read(&out));
}

#[test]
fn a_gguf_budget_mixes_block_types() {
    let dir = Dir::new();
    let out = dir.join("out");
    let budget = ["--format", "gguf", "--target-bits", "5.2", "--candidates", "q8_0,q5_0,q4_0"];
    let manifest = quantize(&out, &budget);
    let bits = linear_bits(&manifest);
    assert!(bits <= 5.2 && bits > 4.8, "{bits}");
}
