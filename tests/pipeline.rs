//! Whole conversions through the library: every model family, method and format.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::{Map, Value};
use sparsepack::{
    backend::DeviceOptions,
    calibration::{CalibrationSet, Sampling},
    compress::{Method, Sparsity},
    model::ModelSource,
    pipeline::{
        ConversionPlan, MANIFEST, Manifest, NoProgress, RunOptions, VerifyOptions, convert, unpack,
        verify,
    },
    recipe::{
        CalibrationRecipe, OutputFormat, OutputRecipe, PruneRecipe, Recipe, Sequential, WeightDType,
    },
};
use sparsepack_formats::{DType, Encoding};

use crate::harness::{
    Command, Dir, Tensor, assert_same_files, convert as convert_command, copy_dir, fixture, noise,
    read_tensors, root, write_tensors,
};

const WINDOWS: usize = 4;
const WINDOW: usize = 32;

pub(crate) fn recipe(method: Method, sparsity: &str, format: OutputFormat) -> Recipe {
    let sparsity: Sparsity = sparsity.parse().unwrap();
    let calibrated = method != Method::Magnitude;
    Recipe {
        prune: Some(PruneRecipe::new(method, sparsity)),
        calibration: CalibrationRecipe {
            // The windows are made here; the name only says that there are some.
            file: calibrated.then(|| PathBuf::from("ids")),
            samples: WINDOWS,
            seq_len: WINDOW,
            seed: None,
        },
        output: OutputRecipe { format: Some(format), ..OutputRecipe::default() },
        ..Recipe::default()
    }
}

pub(crate) fn with(mut recipe: Recipe, change: impl FnOnce(&mut Recipe)) -> Recipe {
    change(&mut recipe);
    recipe
}

/// Converts with calibration windows of ids that look random.
pub(crate) fn run(model: &Path, recipe: &Recipe, out: &Path) -> ConversionPlan {
    let source = ModelSource::open(model).unwrap();
    let plan = ConversionPlan::new(&source, recipe).unwrap();
    let vocab = source.config().vocab_size as f32;
    let noise = noise(11, WINDOWS * WINDOW);
    let ids: Vec<u32> = noise.iter().map(|value| ((value + 0.5) * vocab) as u32).collect();
    let sampling = Sampling { samples: WINDOWS, seq_len: WINDOW, seed: None };
    let set = CalibrationSet::from_ids(Path::new("ids"), &ids, sampling).unwrap();
    let calibration = recipe.calibration.file.is_some().then_some(&set);
    let options = RunOptions {
        resume: false,
        checkpoint_interval: Duration::from_hours(1),
        memory_bytes: None,
    };
    let device = DeviceOptions::default();
    convert(&source, &plan, calibration, out, device, options, &NoProgress).unwrap();
    plan
}

/// The output holds what the plan said, to the byte and to the zero.
fn check_against_plan(out: &Path, plan: &ConversionPlan, what: &str) {
    let manifest = Manifest::read(out).unwrap();
    let reader = sparsepack_formats::open(out).unwrap();
    assert_eq!(manifest.tensors.len(), plan.outputs.len(), "{what}");
    assert_eq!(manifest.totals.bytes, plan.output_bytes, "{what}");
    let stored: u64 = reader.tensors().iter().map(|info| info.stored_bytes).sum();
    assert_eq!(stored, plan.output_bytes, "{what}");
    for (output, record) in plan.outputs.iter().zip(&manifest.tensors) {
        let what = format!("{what}: {}", output.name);
        assert_eq!(record.name, output.name, "{what}");
        let bytes: u64 = record.components.iter().map(|component| component.bytes).sum();
        assert_eq!(bytes, output.bytes, "{what}");
        let info = reader.tensors().get(&output.name).unwrap();
        assert_eq!((info.stored_bytes, info.encoding), (output.bytes, output.encoding), "{what}");
        let mut layers = plan.blocks.iter().flat_map(|block| &block.layers);
        let layer = layers.find(|layer| output.name == format!("{}.weight", layer.module));
        assert_eq!(record.pruned.is_some(), layer.is_some(), "{what}");
        let (Some(layer), Some(report)) = (layer, &record.report) else { continue };
        let planned = (layer.rows * layer.cols) as u64 / 2;
        assert_eq!(report.zeroed, planned, "{what}");
        let values = reader.read_f32(&output.name).unwrap();
        let zeros = values.iter().filter(|value| **value == 0.0).count() as u64;
        assert_eq!(zeros, planned, "{what}");
    }
    let pruned: usize = plan.blocks.iter().map(|block| block.layers.len()).sum();
    let packed = reader.tensors().iter().filter(|info| info.encoding.is_packed());
    if plan.format == OutputFormat::Packed {
        assert_eq!(packed.count(), pruned, "{what}");
    }
}

fn every_method_and_format(name: &str) {
    let dir = Dir::new();
    let model = fixture(name);
    for method in [Method::Magnitude, Method::Wanda, Method::SparseGpt] {
        for (format, sparsity) in [
            (OutputFormat::Safetensors, "50%"),
            (OutputFormat::Packed, "2:4"),
            (OutputFormat::Packed, "4:8"),
            (OutputFormat::Packed, "50%"),
        ] {
            let what = format!("{name} {} {sparsity} {format:?}", method.name());
            let out = dir.join(&what.replace(['/', ':', '%'], "-"));
            let sequential = if sparsity == "50%" { Sequential::Block } else { Sequential::True };
            let recipe = with(recipe(method, sparsity, format), |recipe| {
                // Magnitude pruning captures nothing, in whatever order.
                let captures = method != Method::Magnitude;
                recipe.solver.sequential = captures.then_some(sequential);
            });
            let plan = run(&model, &recipe, &out);
            let report = verify(&out, None, &VerifyOptions::default()).unwrap();
            assert_eq!(report.findings, [], "{what}");
            check_against_plan(&out, &plan, &what);
            ModelSource::open(&out).unwrap();
            if method == Method::SparseGpt && sparsity != "4:8" {
                let again = dir.join("again");
                run(&model, &recipe, &again);
                assert_same_files(&out, &again);
                fs::remove_dir_all(again).unwrap();
            }
        }
    }
}

macro_rules! families {
    ($($test:ident: $name:literal;)*) => {
        $(#[test] fn $test() { every_method_and_format($name); })*
    };
}

families! {
    llama_with_grouped_heads: "tiny/llama-gqa";
    llama_in_shards: "tiny/llama-sharded";
    llama_with_a_tied_head: "tiny/llama-mha-tied";
    llama_with_scaled_rope: "tiny/llama3-rope";
    mistral: "tiny/mistral";
    qwen2: "tiny/qwen2";
    opt: "tiny/opt";
    llama_from_gguf: "tiny/llama-gqa.gguf";
    qwen2_from_gguf: "tiny/qwen2.gguf";
}

fn magnitude_2_of_4() -> Recipe {
    recipe(Method::Magnitude, "2:4", OutputFormat::Safetensors)
}

fn by_name(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    read_tensors(dir).into_iter().map(|tensor| (tensor.name, tensor.bytes)).collect()
}

#[test]
fn a_tied_head_stays_tied() {
    for name in ["tiny/llama-mha-tied", "tiny/qwen2", "tiny/opt", "tiny/qwen2.gguf"] {
        let dir = Dir::new();
        let out = dir.join("out");
        run(&fixture(name), &magnitude_2_of_4(), &out);
        let names = by_name(&out);
        assert!(!names.keys().any(|name| name.contains("lm_head")), "{name}");
        assert!(ModelSource::open(&out).unwrap().config().tie_word_embeddings, "{name}");
    }
}

#[test]
fn only_the_blocks_asked_for_are_pruned() {
    let dir = Dir::new();
    let out = dir.join("out");
    let model = fixture("tiny/llama-gqa");
    let recipe = with(recipe(Method::SparseGpt, "2:4", OutputFormat::Safetensors), |recipe| {
        recipe.solver.blocks = Some("1..2".parse().unwrap());
    });
    run(&model, &recipe, &out);
    let (before, after) = (by_name(&model), by_name(&out));
    for (name, bytes) in &before {
        let pruned = name.contains("layers.1.") && name.contains("_proj");
        assert_eq!(*bytes != after[name], pruned, "{name}");
    }
}

#[test]
fn what_is_not_pruned_keeps_its_bytes() {
    for name in ["tiny/opt", "tiny/mistral", "tiny/llama-sharded", "tiny/llama-mha-tied"] {
        let dir = Dir::new();
        let out = dir.join("out");
        run(&fixture(name), &Recipe::default(), &out);
        assert!(by_name(&fixture(name)) == by_name(&out), "{name}");
    }
}

#[test]
fn tensors_of_no_known_role_are_carried_over() {
    let dir = Dir::new();
    let (model, out) = (dir.join("model"), dir.join("out"));
    copy_dir(&fixture("tiny/llama-gqa"), &model);
    let mut tensors = read_tensors(&model);
    tensors.push(Tensor::f32("score.weight", &[2, 32], &noise(3, 64)));
    write_tensors(&model, &tensors);
    run(&model, &magnitude_2_of_4(), &out);
    assert_eq!(by_name(&out)["score.weight"], by_name(&model)["score.weight"]);
}

#[test]
fn both_orders_solve_differently() {
    let dir = Dir::new();
    let outs = [Sequential::True, Sequential::Block].map(|order| {
        let out = dir.join(&format!("{order:?}"));
        let recipe = with(recipe(Method::SparseGpt, "2:4", OutputFormat::Packed), |recipe| {
            recipe.solver.sequential = Some(order);
        });
        run(&fixture("tiny/llama-gqa"), &recipe, &out);
        out
    });
    // The first linears of the first block see the same inputs in both; the last of it do not.
    let record = |out: &Path, name: &str| {
        let manifest = Manifest::read(out).unwrap();
        let found = manifest.tensors.into_iter().find(|tensor| tensor.name == name);
        found.unwrap().components
    };
    let same = |name: &str| record(&outs[0], name) == record(&outs[1], name);
    assert!(same("model.layers.0.self_attn.q_proj.weight"));
    assert!(!same("model.layers.0.mlp.down_proj.weight"));
}

#[test]
fn threads_do_not_change_a_byte() {
    let dir = Dir::new();
    let outs = ["1", "2", "3"].map(|threads| {
        let out = dir.join(threads);
        convert_command(&fixture("model"), &out)
            .args(crate::harness::CALIBRATION)
            .args(["--prune", "sparsegpt", "--sparsity", "2:4", "--threads", threads])
            .succeeds();
        out
    });
    assert_same_files(&outs[0], &outs[1]);
    assert_same_files(&outs[0], &outs[2]);
}

#[test]
fn the_manifest_says_nothing_about_the_machine() {
    let dir = Dir::new();
    let model = dir.join("model");
    copy_dir(&fixture("model"), &model);
    let out = dir.join("out");
    convert_command(&model, &out)
        .args(crate::harness::CALIBRATION)
        .args(["--prune", "wanda", "--sparsity", "2:4"])
        .succeeds();
    let text = fs::read_to_string(out.join(MANIFEST)).unwrap();
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let places = [dir.path().to_str().unwrap(), root().to_str().unwrap(), host.trim()];
    for place in places.into_iter().filter(|place| !place.is_empty()) {
        assert!(!text.contains(&format!("{place}/")) && !text.contains(&format!("\"{place}")));
    }
    for key in ["\"secs\"", "\"time\"", "\"date\"", "\"host\"", "\"path\""] {
        assert!(!text.contains(key), "{key}");
    }
}

fn json(path: &Path) -> Map<String, Value> {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn the_configuration_keeps_every_key() {
    for name in ["model", "tiny/llama-mha-tied", "tiny/opt", "tiny/mistral", "tiny/qwen2"] {
        let dir = Dir::new();
        let out = dir.join("out");
        run(&fixture(name), &magnitude_2_of_4(), &out);
        let (before, after) =
            (json(&fixture(name).join("config.json")), json(&out.join("config.json")));
        for (key, value) in &before {
            assert_eq!(after.get(key), Some(value), "{name}: {key}");
        }
        assert!(!after.contains_key("quantization_config"), "{name}");
        assert_eq!(after["sparsepack"]["method"], "magnitude", "{name}");
    }
}

/// The encoding of the linears, all alike.
fn encoding_of_linears(dir: &Path) -> Encoding {
    let source = ModelSource::open(dir).unwrap();
    let linears = source.tensors().iter().filter(|tensor| tensor.name.ends_with("_proj.weight"));
    let mut encodings: Vec<Encoding> = linears.map(|tensor| tensor.encoding).collect();
    // Room for values differs from shape to shape.
    for encoding in &mut encodings {
        if let Encoding::Bitmask { kept, .. } = encoding {
            *kept = 0;
        }
    }
    encodings.dedup();
    assert_eq!(encodings.len(), 1, "{encodings:?}");
    encodings[0]
}

const DTYPE: DType = DType::F32;

/// Patterns, and what a packed output of f32 weights holds them in.
const PACKED: [(&str, Encoding); 6] = [
    ("2:4", Encoding::Sparse24 { dtype: DTYPE }),
    ("4:8", Encoding::Nm { n: 4, m: 8, dtype: DTYPE }),
    ("1:4", Encoding::Nm { n: 1, m: 4, dtype: DTYPE }),
    ("8:16", Encoding::Nm { n: 8, m: 16, dtype: DTYPE }),
    ("15:16", Encoding::Nm { n: 15, m: 16, dtype: DTYPE }),
    ("70%", Encoding::Bitmask { dtype: DTYPE, kept: 0 }),
];

#[test]
fn packed_and_plain_outputs_hold_the_same_bits() {
    let dir = Dir::new();
    for (sparsity, encoding) in PACKED {
        let [plain, packed] = [OutputFormat::Safetensors, OutputFormat::Packed].map(|format| {
            let out = dir.join(&format!("{}-{format:?}", sparsity.replace([':', '%'], "-")));
            run(&fixture("tiny/llama-gqa"), &recipe(Method::SparseGpt, sparsity, format), &out);
            out
        });
        assert_eq!(encoding_of_linears(&packed), encoding, "{sparsity}");
        let report = verify(&packed, Some(&plain), &VerifyOptions::default()).unwrap();
        assert_eq!(report.findings, [], "{sparsity}");
        let unpacked = dir.join("unpacked");
        unpack(&packed, &unpacked).unwrap();
        assert!(by_name(&plain) == by_name(&unpacked), "{sparsity}");
        fs::remove_dir_all(unpacked).unwrap();
    }
}

fn repack() -> Recipe {
    Recipe {
        output: OutputRecipe { format: Some(OutputFormat::Packed), ..OutputRecipe::default() },
        ..Recipe::default()
    }
}

#[test]
fn a_pruned_checkpoint_is_packed_as_it_is() {
    let dir = Dir::new();
    for (sparsity, encoding) in PACKED {
        let name = |kind: &str| dir.join(&format!("{}-{kind}", sparsity.replace([':', '%'], "-")));
        let (plain, packed, again) = (name("plain"), name("packed"), name("again"));
        let pruning = recipe(Method::SparseGpt, sparsity, OutputFormat::Safetensors);
        run(&fixture("tiny/llama-gqa"), &pruning, &plain);
        let plan = run(&plain, &repack(), &packed);
        assert_eq!(plan.scan.unwrap().tensors, 2 * 7 + 2, "{sparsity}");
        assert_eq!(encoding_of_linears(&packed), encoding, "{sparsity}");
        let report = verify(&packed, Some(&plain), &VerifyOptions::default()).unwrap();
        assert_eq!((report.findings, report.compared), (vec![], report.tensors), "{sparsity}");
        // A packed source packs to the same bytes.
        run(&packed, &repack(), &again);
        let weights = |dir: &Path| fs::read(dir.join("model.safetensors")).unwrap();
        assert!(weights(&packed) == weights(&again), "{sparsity}");
        assert_eq!(json(&packed.join("config.json"))["sparsepack"]["format"], "packed");
    }
}

#[test]
fn each_matrix_is_packed_as_suits_it() {
    let dir = Dir::new();
    let (model, out) = (dir.join("model"), dir.join("out"));
    copy_dir(&fixture("tiny/llama-gqa"), &model);
    let mut tensors = read_tensors(&model);
    let mut keep = |name: &str, kept: &dyn Fn(usize) -> bool| {
        let tensor = tensors.iter_mut().find(|tensor| tensor.name == name).unwrap();
        let elements = tensor.bytes.chunks_exact_mut(4).enumerate();
        elements.filter(|(index, _)| !kept(*index)).for_each(|(_, element)| element.fill(0));
    };
    keep("model.layers.0.self_attn.q_proj.weight", &|index| index % 4 < 2);
    keep("model.layers.0.self_attn.k_proj.weight", &|index| index % 8 < 3);
    keep("model.layers.0.self_attn.v_proj.weight", &|index| index < 300);
    keep("model.layers.0.self_attn.o_proj.weight", &|_| false);
    keep("model.embed_tokens.weight", &|index| index % 2 == 0);
    write_tensors(&model, &tensors);
    run(&model, &repack(), &out);
    let reader = sparsepack_formats::open(&out).unwrap();
    let dense = Encoding::Dense { dtype: DTYPE };
    for (name, encoding) in [
        ("model.layers.0.self_attn.q_proj.weight", Encoding::Sparse24 { dtype: DTYPE }),
        ("model.layers.0.self_attn.k_proj.weight", Encoding::Nm { n: 3, m: 8, dtype: DTYPE }),
        ("model.layers.0.self_attn.v_proj.weight", Encoding::Bitmask { dtype: DTYPE, kept: 300 }),
        ("model.layers.0.self_attn.o_proj.weight", Encoding::Bitmask { dtype: DTYPE, kept: 0 }),
        ("model.embed_tokens.weight", Encoding::Sparse24 { dtype: DTYPE }),
        ("model.layers.0.mlp.up_proj.weight", dense),
        ("model.layers.0.input_layernorm.weight", dense),
    ] {
        assert_eq!(reader.tensors().get(name).unwrap().encoding, encoding, "{name}");
    }
    assert_eq!(verify(&out, Some(&model), &VerifyOptions::default()).unwrap().findings, []);
}

#[test]
fn layers_that_are_packed_and_left_alone_stay_packed() {
    let dir = Dir::new();
    let (first, second) = (dir.join("first"), dir.join("second"));
    let pruning = |sparsity, blocks: &str| {
        with(recipe(Method::Magnitude, sparsity, OutputFormat::Packed), |recipe| {
            recipe.solver.blocks = Some(blocks.parse().unwrap());
        })
    };
    run(&fixture("tiny/llama-gqa"), &pruning("60%", "0..1"), &first);
    let plan = run(&first, &pruning("4:8", "1..2"), &second);
    assert_eq!(plan.scan, None);
    let encoding = |dir: &Path, name: &str| {
        sparsepack_formats::open(dir).unwrap().tensors().get(name).unwrap().encoding
    };
    assert_eq!(encoding(&first, UP), encoding(&second, UP));
    let other = UP.replace("layers.0", "layers.1");
    assert_eq!(encoding(&second, &other), Encoding::Nm { n: 4, m: 8, dtype: DTYPE });
}

#[test]
fn eight_bit_floats_are_for_the_linears() {
    let dir = Dir::new();
    let model = fixture("tiny/llama-mha-tied");
    for sparsity in ["2:4", "3:8", "50%"] {
        let [plain, packed] = [OutputFormat::Safetensors, OutputFormat::Packed].map(|format| {
            let out = dir.join(&format!("{}-{format:?}", sparsity.replace([':', '%'], "-")));
            let mut recipe = recipe(Method::SparseGpt, sparsity, format);
            recipe.output.dtype = Some(WeightDType::F8E4m3);
            run(&model, &recipe, &out);
            out
        });
        let dtype = |name: &str| {
            let reader = sparsepack_formats::open(&plain).unwrap();
            reader.tensors().get(name).unwrap().encoding.value_dtype()
        };
        assert_eq!(dtype(UP), DType::F8E4m3);
        assert_eq!(dtype("model.embed_tokens.weight"), DType::Bf16);
        assert_eq!(dtype("model.norm.weight"), DType::Bf16);
        assert_eq!(json(&plain.join("config.json"))["torch_dtype"], "bfloat16");
        assert!(encoding_of_linears(&packed).is_packed());
        let report = verify(&packed, Some(&plain), &VerifyOptions::default()).unwrap();
        assert_eq!(report.findings, [], "{sparsity}");
    }
}

#[test]
fn pruned_patterns_are_found_again() {
    let dir = Dir::new();
    for (sparsity, pattern) in [("2:4", "2:4"), ("4:8", "4:8"), ("1:4", "1:4"), ("8:16", "8:16")] {
        let out = dir.join(&sparsity.replace(':', "-"));
        run(
            &fixture("tiny/llama-gqa"),
            &recipe(Method::SparseGpt, sparsity, OutputFormat::Safetensors),
            &out,
        );
        let summary = Command::new("inspect").arg(&out).arg("--json").succeeds().json();
        let tensors = summary["tensors"].as_array().unwrap();
        let up = tensors.iter().find(|t| t["name"] == "model.layers.1.mlp.up_proj.weight").unwrap();
        assert_eq!(up["pattern"], pattern, "{sparsity}");
    }
}

// --- verify finds what changed ---

struct Damaged {
    dir: Dir,
    out: PathBuf,
}

impl Damaged {
    fn new() -> Self {
        let dir = Dir::new();
        let out = dir.join("out");
        let recipe = recipe(Method::Magnitude, "2:4", OutputFormat::Packed);
        run(&fixture("tiny/llama-gqa"), &recipe, &out);
        Self { dir, out }
    }

    /// Flips a bit in the first byte of a stored component.
    fn flip(&self, tensor: &str, component: usize) {
        let path = self.out.join("model.safetensors");
        let reader = sparsepack_formats::open(&self.out).unwrap();
        let part = reader.components(tensor).unwrap()[component].to_vec();
        drop(reader);
        let mut bytes = fs::read(&path).unwrap();
        let at = bytes.windows(part.len()).position(|window| window == part).unwrap();
        bytes[at] ^= 1;
        fs::write(path, bytes).unwrap();
    }

    /// Expects a finding about `subject`.
    #[track_caller]
    fn found(&self, subject: &str, what: &str) {
        let report = Command::new("verify").arg(&self.out).arg("--json").fails(3).json();
        let findings = report["findings"].as_array().unwrap();
        let finding = findings.iter().find(|finding| finding["subject"] == subject);
        let text = finding.map(|finding| finding["what"].as_str().unwrap()).unwrap_or_default();
        assert!(text.contains(what), "{report:#}");
    }
}

const UP: &str = "model.layers.0.mlp.up_proj.weight";

#[test]
fn verify_finds_a_flipped_value() {
    let damaged = Damaged::new();
    damaged.flip(UP, 0);
    damaged.found(UP, "expected sha256");
    let ran = Command::new("verify").arg(&damaged.out).fails(3);
    assert!(ran.stdout().contains("1 mismatch"), "{}", ran.story());
}

#[test]
fn verify_finds_a_flipped_position() {
    let damaged = Damaged::new();
    damaged.flip(UP, 1);
    damaged.found(UP, "expected sha256");
}

#[test]
fn verify_finds_weights_of_another_run() {
    let damaged = Damaged::new();
    let other = damaged.dir.join("other");
    let recipe = recipe(Method::Wanda, "2:4", OutputFormat::Packed);
    run(&fixture("tiny/llama-gqa"), &recipe, &other);
    fs::copy(other.join("model.safetensors"), damaged.out.join("model.safetensors")).unwrap();
    damaged.found(UP, "expected sha256");
}

#[test]
fn verify_finds_a_missing_tensor_and_an_unknown_one() {
    let dir = Dir::new();
    let out = dir.join("out");
    run(&fixture("tiny/llama-gqa"), &magnitude_2_of_4(), &out);
    let mut tensors = read_tensors(&out);
    let tensor = tensors.iter_mut().find(|tensor| tensor.name == UP).unwrap();
    tensor.name = "stray.weight".to_owned();
    write_tensors(&out, &tensors);
    let damaged = Damaged { dir, out };
    damaged.found(UP, "is in the manifest but not in the files");
    damaged.found("stray.weight", "is in the files but not in the manifest");
}

#[test]
fn verify_finds_a_pattern_that_does_not_hold() {
    let dir = Dir::new();
    let out = dir.join("out");
    run(&fixture("tiny/llama-gqa"), &magnitude_2_of_4(), &out);
    // A manifest that promises more than the file keeps, with honest digests.
    let mut manifest = json(&out.join(MANIFEST));
    for tensor in manifest["tensors"].as_array_mut().unwrap() {
        if tensor["name"] == UP {
            tensor["pruned"]["sparsity"] = "1:4".into();
        }
    }
    fs::write(out.join(MANIFEST), serde_json::to_vec(&manifest).unwrap()).unwrap();
    Damaged { dir, out }.found(UP, "more than 1 of 4 weights are not zero");
}
