//! `--format zst`: archives that give their source back, pruned models that unpack to what
//! `--format safetensors` writes, and files that are damaged.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;

use crate::harness::{
    Command, Dir, Tensor, assert_same_files, assert_same_files_but, convert, copy_dir, files,
    fixture, noise, read_tensors, write_tensors,
};

const MAGNITUDE: [&str; 4] = ["--prune", "magnitude", "--sparsity", "2:4"];
const ZST: [&str; 2] = ["--format", "zst"];

fn unpack(packed: &Path, out: &Path) -> Command {
    Command::new("unpack").arg(packed).arg("-o").arg(out)
}

/// Archives `model`, unpacks it and expects the weights, the index and the configuration unchanged.
#[track_caller]
fn assert_archives(dir: &Dir, model: &Path) {
    let (archive, restored) = (dir.join("archive"), dir.join("restored"));
    convert(model, &archive).args(ZST).succeeds();
    Command::new("verify").arg(&archive).arg("--against").arg(model).succeeds();
    unpack(&archive, &restored).succeeds();
    let (source, restored) = (files(model), files(&restored));
    let kept = |name: &str| !name.starts_with("golden") && !name.starts_with("perplexity");
    for (name, bytes) in source.iter().filter(|(name, _)| kept(name)) {
        assert!(restored.get(name) == Some(bytes), "{name} differs");
    }
    assert_eq!(restored.len(), source.keys().filter(|name| kept(name)).count());
}

#[test]
fn an_archive_gives_back_every_file() {
    for name in ["model", "tiny/llama-sharded", "tiny/opt", "tiny/qwen2", "tiny/mistral"] {
        assert_archives(&Dir::new(), &fixture(name));
    }
}

#[test]
fn an_archive_of_a_packed_directory_stays_packed() {
    for (format, sparsity) in [
        ("packed", "2:4"),
        ("packed", "4:8"),
        ("packed", "50%"),
        ("torch-cutlass", "2:4"),
        ("compressed-tensors", "2:4"),
        ("compressed-tensors", "50%"),
    ] {
        let dir = Dir::new();
        let packed = dir.join("packed");
        let prune = ["--prune", "magnitude", "--sparsity", sparsity, "--format", format];
        convert(&fixture("model"), &packed).args(prune).succeeds();
        fs::remove_file(packed.join("manifest.json")).unwrap();
        assert_archives(&dir, &packed);
    }
}

/// The files of a directory with their headers as no writer of ours makes them.
fn rewrite_headers(dir: &Path) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "safetensors") {
            continue;
        }
        let bytes = fs::read(&path).unwrap();
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: BTreeMap<String, Value> =
            serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        let mut entries: Vec<String> = header
            .iter()
            .rev()
            .filter(|(name, _)| *name != "__metadata__")
            .map(|(name, entry)| format!("\n  {name:?} : {entry:#}"))
            .collect();
        let metadata = r#" "__metadata__": {"writer": "by \u0068and", "format": "pt"}"#;
        entries.insert(1, metadata.to_owned());
        let header = format!("{{{}}}", entries.join(","));
        let mut out = (header.len() as u64).to_le_bytes().to_vec();
        out.extend(header.as_bytes());
        out.extend(&bytes[8 + length..]);
        fs::write(&path, out).unwrap();
    }
}

#[test]
fn unusual_headers_and_shard_names_are_given_back() {
    let dir = Dir::new();
    let model = dir.join("model");
    copy_dir(&fixture("tiny/llama-sharded"), &model);
    rewrite_headers(&model);
    fs::remove_file(model.join("golden.safetensors")).unwrap();
    let odd = "weights 2 (of three).safetensors";
    fs::rename(model.join("model-00002-of-00003.safetensors"), model.join(odd)).unwrap();
    let index = model.join("model.safetensors.index.json");
    let text = fs::read_to_string(&index).unwrap();
    fs::write(&index, text.replace("model-00002-of-00003.safetensors", odd) + "\n\n").unwrap();
    assert_archives(&dir, &model);
}

#[test]
fn an_archive_keeps_what_a_model_does_not_read_and_values_that_are_not_finite() {
    let dir = Dir::new();
    let model = dir.join("model");
    copy_dir(&fixture("tiny/llama-mha-tied"), &model);
    let mut tensors = read_tensors(&model);
    let embeddings = tensors.iter().find(|tensor| tensor.name.contains("embed_tokens")).unwrap();
    let shape = embeddings.shape.clone();
    let values = noise(9, shape.iter().product());
    tensors.push(Tensor::f32("lm_head.weight", &shape, &values));
    let infinite = [f32::NEG_INFINITY, f32::NAN, -0.0];
    tensors.push(Tensor::f32("model.layers.0.self_attn.bias", &[3], &infinite));
    tensors.push(Tensor::f32("other", &[3], &infinite));
    write_tensors(&model, &tensors);
    assert_archives(&dir, &model);
    // Other formats hold the model, and refuse values that no model should have.
    convert(&model, &dir.join("plain")).fails(1).says(&["tensor `other` has the non-finite value"]);
    // The archive is a model too.
    Command::new("inspect").arg(dir.join("archive")).args(["--headers"]).succeeds();
}

#[test]
fn an_archive_can_be_archived_again() {
    let dir = Dir::new();
    let model = fixture("tiny/llama-sharded");
    let (first, second) = (dir.join("first"), dir.join("second"));
    convert(&model, &first).args(ZST).succeeds();
    convert(&first, &second).args(ZST).args(["--level", "9"]).succeeds();
    assert_ne!(
        fs::read(first.join("model.spz")).unwrap(),
        fs::read(second.join("model.spz")).unwrap()
    );
    let (from_first, from_second) = (dir.join("from-first"), dir.join("from-second"));
    unpack(&first, &from_first).succeeds();
    unpack(&second, &from_second).succeeds();
    assert_same_files(&from_first, &from_second);
}

#[test]
fn a_pruned_model_unpacks_to_what_safetensors_would_have_been() {
    let half: &[&str] = &["--prune", "magnitude", "--sparsity", "50%", "--dtype", "f32"];
    let cases: [(&str, &[&str]); 5] = [
        ("model", &MAGNITUDE),
        ("model", half),
        ("tiny/llama-sharded", &MAGNITUDE),
        ("tiny/llama-gqa.gguf", &["--dtype", "f16"]),
        ("tiny/opt", half),
    ];
    for (name, args) in cases {
        let dir = Dir::new();
        let [plain, zst, unpacked] = ["plain", "zst", "unpacked"].map(|name| dir.join(name));
        convert(&fixture(name), &plain).args(args).succeeds();
        convert(&fixture(name), &zst).args(args).args(ZST).succeeds();
        unpack(&zst, &unpacked).succeeds();
        assert_same_files_but(&plain, &unpacked, &["manifest.json"]);
        Command::new("verify").arg(&zst).arg("--against").arg(&plain).succeeds();
        // And so does converting it.
        let again = dir.join("again");
        convert(&zst, &again).succeeds();
        for (name, bytes) in files(&plain).iter().filter(|(name, _)| name.ends_with("safetensors"))
        {
            assert!(fs::read(again.join(name)).unwrap() == *bytes, "{name}");
        }
    }
}

#[test]
fn a_compressed_model_is_evaluated_and_inspected_like_any_other() {
    let dir = Dir::new();
    let [plain, zst] = ["plain", "zst"].map(|name| dir.join(name));
    convert(&fixture("model"), &plain).args(MAGNITUDE).succeeds();
    convert(&fixture("model"), &zst).args(MAGNITUDE).args(ZST).succeeds();
    let eval = |model: &Path| {
        let text = ["--text", "fixtures/text/heldout.txt", "--window", "128", "--max-windows", "4"];
        Command::new("eval").arg(model).args(text).arg("--json").succeeds().json()
    };
    let (expected, found) = (eval(&plain), eval(&zst));
    assert_eq!(found["perplexity"], expected["perplexity"]);
    let summary = Command::new("inspect").arg(&zst).arg("--json").succeeds().json();
    assert_eq!(summary["linear_sparsity"], 0.5);
    assert_eq!(summary["stored_bytes"], found["stored_bytes"]);
    assert!(summary["stored_bytes"].as_f64() < expected["stored_bytes"].as_f64().map(|n| n * 0.6));
    let compress = ["--calibration", "fixtures/text/calibration.txt", "--samples", "2"];
    let sparsegpt = ["--prune", "sparsegpt", "--sparsity", "4:8", "--seq-len", "64"];
    convert(&zst, &dir.join("next")).args(compress).args(sparsegpt).succeeds();
}

#[test]
fn the_report_and_the_manifest_give_the_compressed_size() {
    let dir = Dir::new();
    let zst = dir.join("zst");
    let ran = convert(&fixture("model"), &zst).args(MAGNITUDE).args(ZST).arg("--json").succeeds();
    let totals = &ran.json()["totals"];
    let size = fs::metadata(zst.join("model.spz")).unwrap().len();
    let stored = totals["bytes"].as_u64().unwrap();
    // Beside the frames there are a record and an entry of the index for each of 38 tensors.
    assert!(stored < size && size < stored + 38 * 1000, "{stored} of {size}");
    assert!(
        totals["pruned_bytes"].as_f64() < totals["pruned_dense_bytes"].as_f64().map(|n| n * 0.5)
    );
    let manifest: Value =
        serde_json::from_slice(&fs::read(zst.join("manifest.json")).unwrap()).unwrap();
    assert_eq!(manifest["recipe"]["output"]["level"], 1);
    let tensors = manifest["tensors"].as_array().unwrap();
    let sum: u64 = tensors.iter().map(|tensor| tensor["compressed_bytes"].as_u64().unwrap()).sum();
    assert_eq!(sum, stored);

    let plan = Command::new("plan").arg(fixture("model")).args(ZST).succeeds();
    assert!(plan.stdout().contains("at most "), "{}", plan.story());
    assert!(plan.stdout().contains("the source's own, byte for byte"), "{}", plan.story());
    let plan = Command::new("plan").arg(fixture("model")).args(ZST).arg("--json").succeeds().json();
    assert!(plan["output_bytes"].as_u64() > Some(size));
}

#[test]
fn threads_and_a_second_run_change_no_byte_and_the_manifest_repeats_the_level() {
    let dir = Dir::new();
    let run = |name: &str, args: &[&str]| -> PathBuf {
        let out = dir.join(name);
        convert(&fixture("model"), &out).args(args).succeeds();
        out
    };
    let common = ["--prune", "magnitude", "--sparsity", "50%", "--format", "zst", "--level", "5"];
    let one = run("one", &[&common[..], &["--threads", "1"]].concat());
    let four = run("four", &[&common[..], &["--threads", "4"]].concat());
    assert_same_files(&one, &four);
    let manifest = one.join("manifest.json");
    let again = run("again", &["--recipe", manifest.to_str().unwrap()]);
    assert_same_files(&one, &again);
}

#[test]
fn verify_and_unpack_name_a_damaged_tensor() {
    let dir = Dir::new();
    let zst = dir.join("zst");
    convert(&fixture("model"), &zst).args(MAGNITUDE).args(ZST).succeeds();
    let path = zst.join("model.spz");
    let good = fs::read(&path).unwrap();
    let end = good.len() - 48;
    let length = u64::from_le_bytes(good[end + 32..end + 40].try_into().unwrap()) as usize;
    let index: Value = serde_json::from_slice(&good[end - length..end]).unwrap();
    let tensors = index["tensors"].as_array().unwrap();
    let named = tensors.iter().find(|tensor| tensor["name"].as_str().unwrap().contains("1.mlp.up"));
    let named = named.unwrap();
    let name = named["name"].as_str().unwrap();
    let offset = named["components"][0]["chunks"][0]["offset"].as_u64().unwrap();
    let mut bytes = good.clone();
    bytes[offset as usize + 30] ^= 8;
    fs::write(&path, &bytes).unwrap();
    let ran = Command::new("verify").arg(&zst).fails(3);
    assert!(ran.stdout().contains(&format!("{name}: ")), "{}", ran.story());
    assert!(ran.stdout().contains(&format!("the frame at offset {offset}: ")), "{}", ran.story());
    assert!(ran.stdout().contains("1 mismatch"), "{}", ran.story());
    let out = dir.join("out");
    unpack(&zst, &out).fails(1).says(&[&format!("tensor `{name}`: the frame at offset {offset}")]);
    assert!(!out.exists());
}
