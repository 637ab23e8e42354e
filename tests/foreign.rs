//! Output formats that other libraries define.

use std::{fs, path::Path};

use serde_json::{Value, json};
use sparsepack::{
    compress::Method,
    model::ModelSource,
    pipeline::{ConversionPlan, Manifest, VerifyOptions, unpack, verify},
    recipe::{OutputFormat, OutputRecipe, Recipe, WeightDType},
};
use sparsepack_formats::{DType, Encoding};

use crate::{
    harness::{Command, Dir, assert_same_files, copy_dir, fixture, read_tensors},
    pipeline::{recipe, run, with},
};

const FOREIGN: [OutputFormat; 2] = [OutputFormat::TorchCutlass, OutputFormat::CompressedTensors];

fn config(dir: &Path) -> Value {
    serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap()
}

/// The packed output says the same as a plain one of the same recipe, in every way of reading it.
fn assert_equals_plain(out: &Path, plain: &Path, dir: &Dir) {
    let report = verify(out, Some(plain), &VerifyOptions::default()).unwrap();
    assert_eq!(report.findings, []);
    assert_eq!(report.compared, report.tensors);
    let unpacked = dir.join("unpacked");
    unpack(out, &unpacked).unwrap();
    let (found, expected) = (read_tensors(&unpacked), read_tensors(plain));
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(&expected) {
        assert_eq!((&found.name, found.dtype), (&expected.name, expected.dtype));
        assert!(found.bytes == expected.bytes, "{}", found.name);
    }
    assert_eq!(config(&unpacked).get("quantization_config"), None);
    fs::remove_dir_all(unpacked).unwrap();
}

#[test]
fn every_method_and_format_equals_the_plain_output() {
    let model = fixture("model");
    for method in [Method::Magnitude, Method::Wanda, Method::SparseGpt] {
        let dir = Dir::new();
        for (sparsity, formats) in
            [("2:4", &FOREIGN[..]), ("50%", &FOREIGN[1..]), ("6:8", &FOREIGN[1..])]
        {
            let plain = dir.join(&format!("plain-{}", sparsity.replace([':', '%'], "-")));
            run(&model, &recipe(method, sparsity, OutputFormat::Safetensors), &plain);
            for format in formats {
                let out = dir.join("out");
                let plan = run(&model, &recipe(method, sparsity, *format), &out);
                let manifest = Manifest::read(&out).unwrap();
                assert_eq!(manifest.readers.as_deref(), format.readers(false));
                assert_eq!(manifest.totals.bytes, plan.output_bytes);
                for (output, record) in plan.outputs.iter().zip(&manifest.tensors) {
                    assert_eq!(output.encoding.is_packed(), output.linear.is_some());
                    let bytes: u64 = record.components.iter().map(|part| part.bytes).sum();
                    assert_eq!(bytes, output.bytes, "{}", output.name);
                }
                assert_equals_plain(&out, &plain, &dir);
                fs::remove_dir_all(out).unwrap();
            }
        }
    }
}

#[test]
fn compressed_tensors_are_named_and_declared_as_their_readers_expect() {
    let dir = Dir::new();
    let out = dir.join("out");
    let recipe =
        with(recipe(Method::Magnitude, "2:4", OutputFormat::CompressedTensors), |recipe| {
            recipe.prune.as_mut().unwrap().ignore =
                vec!["re:.*\\.0\\.self_attn\\.o_proj".parse().unwrap()];
        });
    run(&fixture("model"), &recipe, &out);
    let text = fs::read(out.join("model.safetensors")).unwrap();
    let header: Value = serde_json::from_slice(
        &text[8..8 + u64::from_le_bytes(text[..8].try_into().unwrap()) as usize],
    )
    .unwrap();
    let module = "model.layers.1.mlp.down_proj";
    let entry = |suffix: &str| {
        let entry = &header[format!("{module}{suffix}")];
        (entry["dtype"].clone(), entry["shape"].clone())
    };
    assert_eq!(entry(".compressed"), (json!("BF16"), json!([128, 192])));
    assert_eq!(entry(".bitmask"), (json!("U8"), json!([128, 48])));
    assert_eq!(entry(".shape"), (json!("I64"), json!([2, 1])));
    assert_eq!(entry(".weight"), (Value::Null, Value::Null));
    assert_eq!(header["__metadata__"], json!({"format": "pt"}));
    let quantization = &config(&out)["quantization_config"];
    assert_eq!(quantization["quant_method"], "compressed-tensors");
    let sparsity = &quantization["sparsity_config"];
    assert_eq!(sparsity["format"], "sparse-24-bitmask");
    assert_eq!(sparsity["ignore"], json!(["model.layers.0.self_attn.o_proj", "lm_head"]));
    assert_eq!(sparsity["targets"], json!(["Linear"]));
    let share = sparsity["global_sparsity"].as_f64().unwrap();
    assert!(share > 0.3 && share < 0.5, "{share}");
    // The manifest names the components as the file does.
    let manifest = Manifest::read(&out).unwrap();
    let record = manifest.tensors.iter().find(|t| t.name == format!("{module}.weight")).unwrap();
    assert_eq!(record.encoding, Encoding::CtSparse24Bitmask { dtype: DType::Bf16 });
    assert_eq!(record.components[1].name, format!("{module}.bitmask"));
}

#[test]
fn perplexity_is_that_of_the_plain_output() {
    let dir = Dir::new();
    let mut measured = vec![];
    for format in ["safetensors", "torch-cutlass", "compressed-tensors"] {
        let out = dir.join(format);
        let ran = crate::harness::convert(&fixture("model"), &out)
            .args(["--prune", "magnitude", "--sparsity", "2:4", "--format", format])
            .succeeds();
        assert_eq!(ran.stdout().contains("  format  "), format != "safetensors", "{}", ran.story());
        let text = ["--text", "fixtures/text/heldout.txt", "--window", "64", "--json"];
        let eval = Command::new("eval").arg(&out).args(text).succeeds().json();
        measured.push(eval["perplexity"].as_f64().unwrap());
        let inspect = Command::new("inspect").arg(&out).arg("--json").succeeds().json();
        assert_eq!(inspect["linear_sparsity"], json!(0.5), "{format}");
    }
    assert!(measured[0] > 1.0);
    assert_eq!(measured, [measured[0]; 3]);
}

#[test]
fn a_finished_2_of_4_model_is_repacked_and_plain_again() {
    let dir = Dir::new();
    let plain = dir.join("plain");
    run(&fixture("model"), &recipe(Method::Magnitude, "2:4", OutputFormat::Safetensors), &plain);
    for format in FOREIGN {
        let repack = Recipe {
            output: OutputRecipe { format: Some(format), ..OutputRecipe::default() },
            ..Recipe::default()
        };
        let (out, again) = (dir.join("out"), dir.join("again"));
        let plan = run(&plain, &repack, &out);
        assert!(plan.outputs.iter().all(|o| o.encoding.is_packed() == o.linear.is_some()));
        assert_equals_plain(&out, &plain, &dir);
        let pruned = dir.join("pruned");
        run(&fixture("model"), &recipe(Method::Magnitude, "2:4", format), &pruned);
        let shard = |dir: &Path| fs::read(dir.join("model.safetensors")).unwrap();
        assert!(shard(&out) == shard(&pruned), "{format:?}");
        run(&out, &Recipe::default(), &again);
        assert!(shard(&again) == shard(&plain), "{format:?}");
        assert_eq!(config(&again).get("quantization_config"), None);
        for done in [out, again, pruned] {
            fs::remove_dir_all(done).unwrap();
        }
    }
}

#[test]
fn a_second_run_gives_the_same_bytes() {
    let dir = Dir::new();
    for format in FOREIGN {
        let outs = ["a", "b"].map(|name| {
            let out = dir.join(&format!("{name}-{}", format.name()));
            run(&fixture("model"), &recipe(Method::SparseGpt, "2:4", format), &out);
            out
        });
        assert_same_files(&outs[0], &outs[1]);
    }
}

/// Why `model` cannot be converted.
fn refusal(model: &Path, recipe: &Recipe) -> String {
    let source = ModelSource::open(model).unwrap();
    ConversionPlan::new(&source, recipe).map(|_| ()).unwrap_err().to_string()
}

const ADVICE: &str = "prune it otherwise, leave it dense, or write --format packed";

#[test]
fn what_a_format_cannot_hold_is_refused_before_anything_is_written() {
    let q_proj = "model.layers.0.self_attn.q_proj.weight";
    let mut asked = recipe(Method::Magnitude, "4:8", OutputFormat::TorchCutlass);
    assert_eq!(
        refusal(&fixture("model"), &asked),
        format!(
            "--format torch-cutlass cannot hold this: {q_proj} becomes 4:8 sparse, not 2:4; {ADVICE}"
        )
    );
    asked = recipe(Method::Magnitude, "2:4", OutputFormat::TorchCutlass);
    asked.output.dtype = Some(WeightDType::F32);
    assert_eq!(
        refusal(&fixture("model"), &asked),
        format!(
            "--format torch-cutlass cannot hold this: {q_proj} does not fit (tensor `{q_proj}`: torch-cutlass values of type F32; expected F16, BF16 or I8); {ADVICE}"
        )
    );
    asked.output.dtype = Some(WeightDType::Bf16);
    assert_eq!(
        refusal(&fixture("tiny/qwen2"), &asked),
        format!(
            "--format torch-cutlass cannot hold this: {q_proj} does not fit (tensor `{q_proj}`: torch-cutlass needs a multiple of 32 rows and of 64 columns for BF16, found 32 × 32); {ADVICE}"
        )
    );
    for format in FOREIGN {
        let asked = with(recipe(Method::Magnitude, "2:4", format), |recipe| {
            recipe.prune.as_mut().unwrap().targets = vec!["model.embed_tokens".parse().unwrap()];
        });
        assert_eq!(
            refusal(&fixture("model"), &asked),
            format!(
                "--format {} cannot hold this: model.embed_tokens.weight is not the weight of a linear; {ADVICE}",
                format.name()
            )
        );
        let nothing = Recipe {
            output: OutputRecipe { format: Some(format), ..OutputRecipe::default() },
            ..Recipe::default()
        };
        assert_eq!(
            refusal(&fixture("model"), &nothing),
            format!(
                "--format {} cannot hold this: no matrix of the source has zeros enough to become smaller; prune it with --prune or write --format safetensors",
                format.name()
            )
        );
    }
}

#[test]
fn a_source_that_another_library_quantized_is_refused() {
    let dir = Dir::new();
    let model = dir.join("model");
    copy_dir(&fixture("tiny/qwen2"), &model);
    let mut changed = config(&model);
    let mut open = |quantization: Value| {
        changed["quantization_config"] = quantization;
        fs::write(model.join("config.json"), changed.to_string()).unwrap();
        ModelSource::open(&model).map(|_| ()).map_err(|error| {
            let error: &dyn std::error::Error = &error;
            let chain = std::iter::successors(Some(error), |error| error.source());
            chain.map(ToString::to_string).collect::<Vec<_>>().join(": ")
        })
    };
    let error = open(json!({"quant_method": "gptq", "bits": 4})).unwrap_err();
    assert!(error.contains("`quantization_config` is"), "{error}");
    let text = "weights without quantization, or quantized by compressed-tensors";
    assert!(error.contains(text), "{error}");
    // A group that says nothing of weights.
    let groups = json!({"group_0": {"targets": ["Linear"]}});
    let method = "compressed-tensors";
    let quantization = json!({"quant_method": method, "quantization_status": "compressed", "config_groups": groups});
    let error = open(quantization).unwrap_err();
    assert!(error.contains("config_groups.group_0"), "{error}");
    let sparsity = json!({"format": "dense"});
    open(json!({"quant_method": "compressed-tensors", "sparsity_config": sparsity})).unwrap();
}

#[test]
fn damage_is_found() {
    let dir = Dir::new();
    for format in FOREIGN {
        let out = dir.join(format.name());
        run(&fixture("model"), &recipe(Method::Magnitude, "2:4", format), &out);
        let file = out.join("model.safetensors");
        let mut bytes = fs::read(&file).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 0x10;
        fs::write(&file, bytes).unwrap();
        let report = verify(&out, None, &VerifyOptions::default()).unwrap();
        assert_eq!(report.findings.len(), 1, "{:?}", report.findings);
        assert!(report.findings[0].what.contains("sha256"), "{:?}", report.findings);
    }
}
