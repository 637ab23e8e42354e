//! GGUF outputs: what they hold, that nothing is lost on the way there and back, and what is refused.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use serde_json::{Value, json};
use sparsepack::{
    backend::{DeviceOptions, Precision, cpu::Cpu},
    eval,
    model::{ModelSource, Tokenizer},
    pipeline::{ConversionPlan, Manifest, NoProgress, RunOptions, VerifyOptions, convert, verify},
    recipe::{OutputFormat, OutputRecipe, PruneRecipe, Recipe, WeightDType},
};
use sparsepack_formats::{
    DType, Encoding, GgmlType, ModelMetadata,
    gguf::{GgufMetadata, GgufValue},
};

use crate::harness::{Command, Dir, convert as convert_command, copy_dir, fixture};

const F32: Encoding = Encoding::Dense { dtype: DType::F32 };
const Q8_0: Encoding = Encoding::Ggml { ty: GgmlType::Q8_0 };
const Q5_1: Encoding = Encoding::Ggml { ty: GgmlType::Q5_1 };

fn gguf(dtype: Option<WeightDType>) -> Recipe {
    Recipe {
        output: OutputRecipe { format: Some(OutputFormat::Gguf), dtype, ..OutputRecipe::default() },
        ..Recipe::default()
    }
}

/// 2:4 by magnitude, which needs no calibration.
fn pruned(mut recipe: Recipe) -> Recipe {
    let method = sparsepack::compress::Method::Magnitude;
    recipe.prune = Some(PruneRecipe::new(method, "2:4".parse().unwrap()));
    recipe
}

fn run(model: &Path, recipe: &Recipe, out: &Path) -> ConversionPlan {
    let source = ModelSource::open(model).unwrap();
    let plan = ConversionPlan::new(&source, recipe).unwrap();
    let options = RunOptions {
        resume: false,
        checkpoint_interval: Duration::from_hours(1),
        memory_bytes: None,
    };
    convert(&source, &plan, None, out, DeviceOptions::default(), options, &NoProgress).unwrap();
    let report = verify(out, None, &VerifyOptions::default()).unwrap();
    assert_eq!(report.findings, []);
    plan
}

fn plan_error(model: &Path, recipe: &Recipe) -> String {
    let source = ModelSource::open(model).unwrap();
    let error = ConversionPlan::new(&source, recipe).unwrap_err().to_string();
    error.replace(&model.display().to_string(), "MODEL")
}

fn metadata(source: &ModelSource) -> &GgufMetadata {
    let ModelMetadata::Gguf(metadata) = source.reader().metadata() else {
        panic!("not GGUF metadata")
    };
    metadata
}

#[track_caller]
fn assert_same_values(out: &Path, against: &Path) {
    let report = verify(out, Some(against), &VerifyOptions::default()).unwrap();
    assert_eq!(report.findings, []);
    assert_eq!(report.compared, report.tensors);
}

/// A tiny model with a tokenizer of its 96 tokens beside it.
pub(crate) fn with_tokenizer(dir: &Dir, tiny: &str) -> PathBuf {
    let model = dir.join(tiny);
    copy_dir(&fixture(&format!("tiny/{tiny}")), &model);
    let from_gguf = dir.join("from-gguf");
    if !from_gguf.exists() {
        convert_command(&fixture("tiny/llama-gqa.gguf"), &from_gguf).succeeds();
    }
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(from_gguf.join(name), model.join(name)).unwrap();
    }
    model
}

/// A model whose JSON file `name` is edited.
fn edited(dir: &Dir, tiny: &str, name: &str, edit: impl FnOnce(&mut Value)) -> PathBuf {
    let model = with_tokenizer(dir, tiny);
    let path = model.join(name);
    let mut value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    edit(&mut value);
    fs::write(path, value.to_string()).unwrap();
    model
}

// --- from Hugging Face ---

#[test]
fn every_value_and_token_arrives() {
    let dir = Dir::new();
    let model = fixture("model");
    for (dtype, name) in [(None, "own"), (Some(WeightDType::F32), "f32")] {
        let out = dir.join(name);
        run(&model, &gguf(dtype), &out);
        let mut names: Vec<_> =
            fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["manifest.json", "model.gguf"]);
        assert_same_values(&out, &model);
        let (before, after) =
            (ModelSource::open(&model).unwrap(), ModelSource::open(&out).unwrap());
        assert_eq!(before.config(), after.config());
        let text = fs::read_to_string(fixture("text/heldout.txt")).unwrap();
        let ids = |source| Tokenizer::open(source).unwrap().encode(&text[..20_000]).unwrap();
        assert_eq!(ids(&before), ids(&after));
    }
}

#[test]
fn the_keys_are_those_of_the_converter_of_llama_cpp() {
    let dir = Dir::new();
    let out = dir.join("out");
    run(&fixture("model"), &gguf(Some(WeightDType::Q8_0)), &out);
    let source = ModelSource::open(&out).unwrap();
    let metadata = metadata(&source);
    let text = |value: &str| GgufValue::String(value.to_owned());
    for (key, value) in [
        ("general.architecture", text("llama")),
        ("general.type", text("model")),
        ("general.name", text("model")),
        ("llama.block_count", GgufValue::U32(4)),
        ("llama.context_length", GgufValue::U32(512)),
        ("llama.embedding_length", GgufValue::U32(128)),
        ("llama.feed_forward_length", GgufValue::U32(384)),
        ("llama.attention.head_count", GgufValue::U32(4)),
        ("llama.attention.head_count_kv", GgufValue::U32(2)),
        ("llama.attention.key_length", GgufValue::U32(32)),
        ("llama.attention.value_length", GgufValue::U32(32)),
        ("llama.vocab_size", GgufValue::U32(1024)),
        ("llama.rope.dimension_count", GgufValue::U32(32)),
        ("llama.rope.freq_base", GgufValue::F32(10_000.0)),
        ("llama.attention.layer_norm_rms_epsilon", GgufValue::F32(1e-5)),
        ("general.file_type", GgufValue::U32(7)),
        ("general.quantization_version", GgufValue::U32(2)),
        ("tokenizer.ggml.model", text("gpt2")),
        ("tokenizer.ggml.pre", text("smollm")),
        ("tokenizer.ggml.bos_token_id", GgufValue::U32(0)),
        ("tokenizer.ggml.eos_token_id", GgufValue::U32(0)),
        ("tokenizer.ggml.unknown_token_id", GgufValue::U32(0)),
        ("tokenizer.ggml.add_bos_token", GgufValue::Bool(false)),
    ] {
        assert_eq!(metadata.get(key), Some(&value), "{key}");
    }
    assert_eq!(metadata.strings("tokenizer.ggml.tokens").unwrap().get(0), Some("<|endoftext|>"));
    assert_eq!(metadata.i32s("tokenizer.ggml.token_type").unwrap()[..2], [3, 1]);
    assert_eq!(metadata.strings("tokenizer.ggml.merges").unwrap().get(0), Some("Ġ t"));
    assert_eq!(metadata.len(), 23 + 3);
    let tensors = source.reader().tensors();
    assert_eq!(tensors.get("token_embd.weight").unwrap().encoding, Q8_0);
    assert_eq!(tensors.get("blk.3.attn_output.weight").unwrap().encoding, Q8_0);
    assert_eq!(tensors.get("blk.0.ffn_norm.weight").unwrap().encoding, F32);
    assert_eq!(tensors.get("output_norm.weight").unwrap().encoding, F32);
    assert!(tensors.get("output.weight").is_none(), "the output matrix is tied");
}

/// Logits of a model before and after; stored rotary factors are rounded to f32.
fn same_logits(tiny: &str, tolerance: f32) {
    let dir = Dir::new();
    let model = with_tokenizer(&dir, tiny);
    let out = dir.join("out");
    run(&model, &gguf(Some(WeightDType::F32)), &out);
    assert_same_values(&out, &model);
    let b = Cpu::new(Precision::F32, Some(1)).unwrap();
    let logits = |path: &Path| {
        let source = ModelSource::open(path).unwrap();
        eval::logits(&b, &source, &[1, 5, 40, 7, 90, 33, 2, 11, 64, 8, 9, 10]).unwrap()
    };
    let (before, after) = (logits(&model), logits(&out));
    let worst = before.iter().zip(&after).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst <= tolerance, "{tiny}: {worst}");
}

#[test]
fn grouped_heads_and_an_output_matrix() {
    same_logits("llama-gqa", 0.0);
}

#[test]
fn a_tied_output_matrix() {
    same_logits("llama-mha-tied", 0.0);
}

#[test]
fn scaled_rope_becomes_a_tensor_of_factors() {
    same_logits("llama3-rope", 1e-5);
}

#[test]
fn mistral_is_written_as_llama() {
    same_logits("mistral", 0.0);
}

#[test]
fn qwen2_with_biases_and_rows_in_order() {
    same_logits("qwen2", 0.0);
}

#[test]
fn rope_factors_survive_every_way() {
    let dir = Dir::new();
    let (first, second, back) = (dir.join("first"), dir.join("second"), dir.join("back"));
    run(&with_tokenizer(&dir, "llama3-rope"), &gguf(None), &first);
    run(&first, &gguf(None), &second);
    let file = |out: &Path| fs::read(out.join("model.gguf")).unwrap();
    assert!(file(&first) == file(&second));
    convert_command(&second, &back).succeeds();
    let config: Value =
        serde_json::from_slice(&fs::read(back.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["rope_parameters"]["rope_type"], "llama3");
    assert_eq!(config["rope_parameters"]["original_max_position_embeddings"], 32);
}

#[test]
fn eight_bit_floats_become_bf16_exactly() {
    let dir = Dir::new();
    let (f8, out) = (dir.join("f8"), dir.join("out"));
    convert_command(&fixture("model"), &f8).args(["--dtype", "f8_e4m3"]).succeeds();
    run(&f8, &gguf(None), &out);
    assert_same_values(&out, &f8);
    let source = ModelSource::open(&out).unwrap();
    let q = source.tensor("model.layers.0.self_attn.q_proj.weight").unwrap();
    assert_eq!(q.encoding, Encoding::Dense { dtype: DType::Bf16 });
    let error = plan_error(&fixture("model"), &gguf(Some(WeightDType::F8E4m3)));
    assert_eq!(error, "--format gguf cannot hold this: GGUF has no type f8_e4m3");
}

#[test]
fn pruned_rows_stand_where_gguf_wants_them() {
    let dir = Dir::new();
    let model = with_tokenizer(&dir, "llama-gqa");
    let (ours, plain) = (dir.join("gguf"), dir.join("plain"));
    run(&model, &pruned(gguf(None)), &ours);
    let mut recipe = pruned(Recipe::default());
    recipe.output.format = Some(OutputFormat::Safetensors);
    run(&model, &recipe, &plain);
    assert_same_values(&ours, &plain);
}

// --- SentencePiece ---

/// `fixtures/spm` without one of its files.
fn sentencepiece(dir: &Dir, without: &str) -> PathBuf {
    let model = dir.join(&format!("without-{without}"));
    copy_dir(&fixture("spm"), &model);
    fs::remove_file(model.join(without)).unwrap();
    model
}

/// Text and ids by llama.cpp.
fn sentencepiece_ids() -> Vec<(String, Vec<u32>)> {
    let golden: Value =
        serde_json::from_slice(&fs::read(fixture("spm/ids.json")).unwrap()).unwrap();
    let case = |case: &Value| {
        let ids = serde_json::from_value(case["ids"].clone()).unwrap();
        (case["text"].as_str().unwrap().to_owned(), ids)
    };
    golden["cases"].as_array().unwrap().iter().map(case).collect()
}

#[track_caller]
fn assert_ids_of_llama_cpp(model: &Path) {
    let tokenizer = Tokenizer::open(&ModelSource::open(model).unwrap()).unwrap();
    for (text, ids) in sentencepiece_ids() {
        assert_eq!(tokenizer.encode(&text).unwrap(), ids, "{text:?}");
    }
}

#[test]
fn a_sentencepiece_vocabulary_arrives_from_either_file() {
    let dir = Dir::new();
    let mut found = Vec::new();
    for without in ["ids.json", "tokenizer.json", "tokenizer.model"] {
        let out = dir.join(&format!("out-{without}"));
        run(&sentencepiece(&dir, without), &gguf(None), &out);
        assert_ids_of_llama_cpp(&out);
        found.push(metadata(&ModelSource::open(&out).unwrap()).clone());
    }
    let text = |value: &str| GgufValue::String(value.to_owned());
    let template = fs::read_to_string(fixture("spm/chat_template.jinja")).unwrap();
    for (key, value) in [
        ("model", text("llama")),
        ("pre", text("default")),
        ("bos_token_id", GgufValue::U32(1)),
        ("eos_token_id", GgufValue::U32(2)),
        ("unknown_token_id", GgufValue::U32(0)),
        ("add_bos_token", GgufValue::Bool(true)),
        ("add_space_prefix", GgufValue::Bool(true)),
    ] {
        for metadata in &found {
            assert_eq!(metadata.get(&format!("tokenizer.ggml.{key}")), Some(&value), "{key}");
        }
    }
    for metadata in &found {
        assert_eq!(metadata.str("tokenizer.chat_template").unwrap(), template);
        assert!(metadata.get("tokenizer.ggml.merges").is_none());
        let types = metadata.i32s("tokenizer.ggml.token_type").unwrap();
        assert_eq!((types[..4].to_vec(), types[259], types[600]), (vec![2, 3, 3, 6], 1, 5));
        let tokens = metadata.strings("tokenizer.ggml.tokens").unwrap();
        assert_eq!((tokens.len(), tokens.get(607)), (608, Some("[PAD607]")));
        // Scores of control tokens are not used.
        let scores =
            |metadata: &GgufMetadata| metadata.f32s("tokenizer.ggml.scores").unwrap()[3..].to_vec();
        assert_eq!(scores(metadata), scores(&found[0]));
        let key = "tokenizer.ggml.token_type";
        assert_eq!(metadata.get(key), found[0].get(key));
    }
}

#[test]
fn a_sentencepiece_vocabulary_comes_back() {
    let dir = Dir::new();
    let (first, back, second) = (dir.join("first"), dir.join("back"), dir.join("second"));
    run(&fixture("spm"), &gguf(None), &first);
    convert_command(&first, &back).args(["--dtype", "f16"]).succeeds();
    assert_ids_of_llama_cpp(&back);
    let settings: Value =
        serde_json::from_slice(&fs::read(back.join("tokenizer_config.json")).unwrap()).unwrap();
    for (key, value) in [
        ("bos_token", json!("<s>")),
        ("eos_token", json!("</s>")),
        ("unk_token", json!("<unk>")),
        ("add_bos_token", json!(true)),
        ("add_prefix_space", json!(true)),
    ] {
        assert_eq!(settings[key], value, "{key}");
    }
    run(&back, &gguf(None), &second);
    let (first, second) = (ModelSource::open(&first).unwrap(), ModelSource::open(&second).unwrap());
    for key in ["tokens", "token_type", "add_space_prefix", "add_bos_token", "bos_token_id"] {
        let key = format!("tokenizer.ggml.{key}");
        assert_eq!(metadata(&first).get(&key), metadata(&second).get(&key), "{key}");
    }
    assert_ids_of_llama_cpp(&dir.join("second"));
}

#[test]
fn a_directory_with_tokenizer_model_alone_is_tokenized() {
    let dir = Dir::new();
    let model = sentencepiece(&dir, "tokenizer.json");
    assert_ids_of_llama_cpp(&model);
    let text = ["--text", "fixtures/text/heldout.txt", "--window", "64", "--max-windows", "1"];
    Command::new("eval").arg(&model).args(text).succeeds();
}

// --- from GGUF ---

#[test]
fn a_rewrite_gives_the_same_bytes() {
    for name in ["llama-gqa", "qwen2"] {
        let dir = Dir::new();
        let source = fixture(&format!("tiny/{name}.gguf"));
        run(&source, &gguf(None), &dir.join("out"));
        assert!(
            fs::read(dir.join("out/model.gguf")).unwrap() == fs::read(source).unwrap(),
            "{name}"
        );
    }
}

#[test]
fn what_is_not_pruned_keeps_its_blocks() {
    let dir = Dir::new();
    let (dense, out) = (dir.join("dense"), dir.join("out"));
    // Rows of 128 and 384 columns are no blocks of 256: Q5_K becomes Q5_1.
    let plan = run(&fixture("model"), &gguf(Some(WeightDType::Q5_K)), &dense);
    assert_eq!(plan.fallbacks.len(), 29);
    assert_eq!((plan.fallbacks[0].asked, plan.fallbacks[0].used), (GgmlType::Q5_K, GgmlType::Q5_1));
    let mut recipe = pruned(gguf(None));
    recipe.prune.as_mut().unwrap().targets = vec!["down_proj".parse().unwrap()];
    run(&dense, &recipe, &out);
    let (before, after) = (ModelSource::open(&dense).unwrap(), ModelSource::open(&out).unwrap());
    for tensor in before.tensors() {
        let now = after.tensor(&tensor.name).unwrap();
        if tensor.name.ends_with("down_proj.weight") {
            assert_eq!((tensor.encoding, now.encoding), (Q5_1, Q8_0), "{}", tensor.name);
        } else {
            let bytes = |source: &ModelSource| {
                source.reader().components(&tensor.stored_name).unwrap()[0].to_vec()
            };
            assert!(bytes(&before) == bytes(&after), "{}", tensor.name);
        }
    }
    // Every key but those about the types is kept, in order.
    let keys = |source: &ModelSource| -> Vec<(String, GgufValue)> {
        let pairs = metadata(source).iter();
        pairs.map(|(key, value)| (key.to_owned(), value.clone())).collect()
    };
    assert_eq!(keys(&before), keys(&after), "most weights are Q5_1 still");
    run(&dense, &gguf(Some(WeightDType::F16)), &dir.join("f16"));
    let f16 = ModelSource::open(&dir.join("f16")).unwrap();
    for ((key, was), (_, is)) in keys(&before).iter().zip(keys(&f16)) {
        match key.as_str() {
            "general.file_type" => assert_eq!((was, is), (&GgufValue::U32(9), GgufValue::U32(1))),
            _ => assert_eq!(*was, is, "{key}"),
        }
    }
}

// --- files ---

#[test]
fn a_split_holds_the_same_model() {
    let dir = Dir::new();
    let (split, whole) = (dir.join("split"), dir.join("whole"));
    let mut recipe = gguf(None);
    recipe.output.shard_size = Some(500_000);
    let plan = run(&fixture("model"), &recipe, &split);
    assert_eq!(plan.file_count(), 5);
    let first = split.join("model-00001-of-00005.gguf");
    assert!(first.is_file());
    assert_same_values(&split, &fixture("model"));
    assert_eq!(ModelSource::open(&first).unwrap().tensors().len(), 38);
    run(&first, &gguf(None), &whole);
    assert_same_values(&whole, &split);
    assert!(metadata(&ModelSource::open(&whole).unwrap()).get("split.count").is_none());
    fs::remove_file(split.join("model-00003-of-00005.gguf")).unwrap();
    Command::new("inspect").arg(&split).fails(1).says(&["model-00003-of-00005.gguf: not found"]);
}

#[test]
fn shards_of_safetensors_have_the_size_asked_for_too() {
    let dir = Dir::new();
    let out = dir.join("out");
    convert_command(&fixture("model"), &out).args(["--shard-size", "500kB"]).succeeds();
    assert!(out.join("model-00001-of-00005.safetensors").is_file());
    Command::new("verify").arg(&out).succeeds();
}

#[test]
fn every_command_takes_an_output() {
    let dir = Dir::new();
    let out = dir.join("out");
    let args = ["--format", "gguf", "--dtype", "q8_0", "--prune", "magnitude", "--sparsity", "2:4"];
    convert_command(&fixture("model"), &out).args(args).succeeds();
    Command::new("verify").arg(&out).succeeds();
    let summary = Command::new("inspect").arg(&out).arg("--json").succeeds().json();
    assert_eq!(summary["linear_sparsity"], 0.5);
    let text = ["--text", "fixtures/text/heldout.txt", "--window", "64", "--max-windows", "2"];
    Command::new("eval").arg(&out).args(text).succeeds();
    Command::new("plan").arg(&out).succeeds();
    let unpack = Command::new("unpack").arg(&out).arg("-o").arg(dir.join("dense"));
    unpack.fails(1).says(&["is GGUF, not a packed output", "--format safetensors"]);
    let file = fixture("tiny/llama-gqa.gguf");
    let unpack = Command::new("unpack").arg(file).arg("-o").arg(dir.join("dense"));
    unpack.fails(1).says(&["llama-gqa.gguf: is GGUF, not a packed output", "--format safetensors"]);
    let decoded = dir.join("decoded");
    convert_command(&out, &decoded).args(["--dtype", "f32"]).succeeds();
    assert_same_values(&decoded, &out);
}

#[test]
fn damage_is_found() {
    let dir = Dir::new();
    let out = dir.join("out");
    run(&fixture("model"), &gguf(None), &out);
    let path = out.join("model.gguf");
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes.len() - 1000;
    bytes[at] ^= 1;
    fs::write(&path, bytes).unwrap();
    let report = verify(&out, None, &VerifyOptions::default()).unwrap();
    assert_eq!(report.findings.len(), 1);
    assert!(report.findings[0].what.starts_with("component "), "{:?}", report.findings);
}

// --- zeros ---

#[test]
fn types_that_move_zeros_are_refused_for_pruned_layers() {
    let recipe = pruned(gguf(Some(WeightDType::Q5_K)));
    let expected = "--format gguf cannot hold this: `model.layers.0.self_attn.q_proj.weight` is \
                    pruned, and Q5_1 blocks store most zeros as small values";
    let error = plan_error(&fixture("model"), &recipe);
    assert!(error.starts_with(expected), "{error}");
    // What was pruned before, too.
    let dir = Dir::new();
    for format in [OutputFormat::Safetensors, OutputFormat::Packed] {
        let out = dir.join(format.name());
        let mut recipe = pruned(Recipe::default());
        recipe.output.format = Some(format);
        run(&fixture("model"), &recipe, &out);
        let error = plan_error(&out, &gguf(Some(WeightDType::Q5_K)));
        assert!(error.starts_with(expected), "{error}");
        let gguf_out = dir.join(&format!("{}-gguf", format.name()));
        run(&out, &gguf(Some(WeightDType::Q8_0)), &gguf_out);
    }
    let file = |name: &str| fs::read(dir.join(name).join("model.gguf")).unwrap().len();
    assert_eq!(file("safetensors-gguf"), file("packed-gguf"));
}

#[test]
fn lost_zeros_are_recorded_when_they_are_allowed() {
    let dir = Dir::new();
    let out = dir.join("out");
    let args = ["--format", "gguf", "--dtype", "q5_k", "--prune", "magnitude", "--sparsity", "2:4"];
    let ran =
        convert_command(&fixture("model"), &out).args(args).arg("--allow-zero-loss").succeeds();
    assert!(
        ran.stdout().contains("zeros lost      28 layers: of 393,216 zeros"),
        "{}",
        ran.story()
    );
    assert!(
        ran.stdout().contains("Q5_1 for Q5_K   25 tensors (embed_tokens, q_proj"),
        "{}",
        ran.story()
    );
    let manifest = Manifest::read(&out).unwrap();
    let again = convert_command(&fixture("model"), &dir.join("again"))
        .args(args)
        .args(["--allow-zero-loss", "--json"])
        .succeeds()
        .json();
    assert_eq!(again["fallbacks"].as_array().unwrap().len(), 29);
    assert_eq!(
        again["fallbacks"][0],
        json!({"tensor": "model.embed_tokens.weight", "cols": 128, "asked": "Q5_K", "used": "Q5_1"})
    );
    let lost = again["zeros_lost"].as_array().unwrap();
    let source = ModelSource::open(&out).unwrap();
    let mut layers = 0;
    for tensor in &manifest.tensors {
        let Some(report) = &tensor.report else { continue };
        layers += 1;
        let values = source.read_f32(&tensor.name).unwrap();
        let zeros = values.iter().filter(|value| **value == 0.0).count() as u64;
        assert_eq!(report.stored_zeros, Some(zeros), "{}", tensor.name);
        assert!(zeros < report.zeroed / 2, "{}", tensor.name);
        let record = json!({"tensor": tensor.name, "zeroed": report.zeroed, "stored_zeros": zeros});
        assert!(lost.contains(&record), "{record}");
    }
    assert_eq!((layers, lost.len()), (28, 28));
    let exact = convert_command(&fixture("model"), &dir.join("exact"))
        .args(["--format", "gguf", "--dtype", "q8_0", "--prune", "magnitude", "--sparsity", "2:4"])
        .arg("--json")
        .succeeds()
        .json();
    assert_eq!((&exact["fallbacks"], &exact["zeros_lost"]), (&json!([]), &json!([])));
    Command::new("verify").arg(&out).succeeds();
}

// --- refusals ---

#[test]
fn what_gguf_cannot_say_is_refused_by_name() {
    let dir = Dir::new();
    let refusal = |model: &Path| plan_error(model, &gguf(None));
    assert_eq!(
        refusal(&fixture("tiny/opt")),
        "--format gguf cannot hold this: GGUF has no architecture for OPTForCausalLM"
    );
    assert_eq!(
        refusal(&fixture("tiny/llama-gqa")),
        "MODEL/tokenizer.json: not found; expected the tokenizer of the model as tokenizer.json or tokenizer.model"
    );
    let relu = edited(&dir, "llama-gqa", "config.json", |config| {
        config["hidden_act"] = json!("relu");
    });
    assert!(refusal(&relu).starts_with("configuration key `hidden_act` is relu, which is not"));
    let more = edited(&dir, "llama-gqa", "config.json", |config| {
        config["num_hidden_layers"] = json!(1);
    });
    assert!(
        refusal(&more).contains("GGUF files of LlamaForCausalLM have no tensor `model.layers.1."),
        "{}",
        refusal(&more)
    );
}

#[test]
fn tokenizers_that_llama_cpp_cannot_name_are_refused() {
    let dir = Dir::new();
    let refusal = |edit: &dyn Fn(&mut Value)| {
        plan_error(&edited(&dir, "llama-gqa", "tokenizer.json", edit), &gguf(None))
    };
    let message = refusal(&|tokenizer| {
        tokenizer["pre_tokenizer"] = json!({"type": "Whitespace"});
    });
    assert!(message.contains("llama.cpp has no name for the way it normalizes and splits"));
    let message = refusal(&|tokenizer| tokenizer["model"]["type"] = json!("Unigram"));
    assert!(message.contains("a model of type Unigram; GGUF output is for byte-level and"));
    let message = refusal(&|tokenizer| tokenizer["model"]["vocab"]["<0x0A>"] = json!(3));
    assert!(message.contains("`byte_fallback` is "), "{message}");
    let message = refusal(&|tokenizer| tokenizer["model"]["vocab"]["more"] = json!(96));
    assert!(message.contains("token `more` has no id below the model's vocab_size of 96"));
    let message = refusal(&|tokenizer| tokenizer["model"]["vocab"]["more"] = json!(7));
    assert!(message.contains("id 7 is that of `"), "{message}");
    let message = refusal(&|tokenizer| tokenizer["model"]["merges"][0] = json!(["a b", "c"]));
    assert!(message.contains("(expected two parts without spaces)"), "{message}");
}

#[test]
fn settings_of_the_tokenizer_arrive() {
    let dir = Dir::new();
    let model = edited(&dir, "llama-gqa", "tokenizer_config.json", |settings| {
        settings["chat_template"] = json!([
            {"name": "default", "template": "{{ a }}"},
            {"name": "tool_use", "template": "{{ b }}"},
        ]);
        settings["add_bos_token"] = json!(true);
        settings["add_eos_token"] = json!(true);
        settings["pad_token"] = json!({"content": "<|eos|>"});
    });
    let tokenizer = model.join("tokenizer.json");
    let mut value: Value = serde_json::from_slice(&fs::read(&tokenizer).unwrap()).unwrap();
    let added = value["added_tokens"].as_array_mut().unwrap();
    added[1]["special"] = json!(false);
    // The last id loses its token.
    value["model"]["vocab"].as_object_mut().unwrap().retain(|_, id| *id != 95);
    fs::write(&tokenizer, value.to_string()).unwrap();
    run(&model, &gguf(None), &dir.join("out"));
    let source = ModelSource::open(&dir.join("out")).unwrap();
    let metadata = metadata(&source);
    assert_eq!(metadata.str("tokenizer.chat_template").unwrap(), "{{ a }}");
    assert_eq!(metadata.str("tokenizer.chat_template.tool_use").unwrap(), "{{ b }}");
    let names: Vec<_> = metadata.strings("tokenizer.chat_templates").unwrap().iter().collect();
    assert_eq!(names, ["tool_use"]);
    assert!(metadata.bool("tokenizer.ggml.add_bos_token").unwrap());
    assert!(metadata.bool("tokenizer.ggml.add_eos_token").unwrap());
    assert_eq!(metadata.u64("tokenizer.ggml.padding_token_id").unwrap(), 1);
    let types = metadata.i32s("tokenizer.ggml.token_type").unwrap();
    assert_eq!((types[0], types[1], types[2], types[95]), (3, 4, 1, 5));
    assert_eq!(metadata.strings("tokenizer.ggml.tokens").unwrap().get(95), Some("[PAD95]"));
    fs::write(model.join("chat_template.jinja"), "{{ c }}").unwrap();
    run(&model, &gguf(None), &dir.join("again"));
    let source = ModelSource::open(&dir.join("again")).unwrap();
    assert_eq!(self::metadata(&source).str("tokenizer.chat_template").unwrap(), "{{ c }}");
}
