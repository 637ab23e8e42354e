//! Slicing through the command line: what it refuses, that a sliced model is as good a source as any,
//! and that the numbers it promises are those it writes.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use sparsepack::{model::ModelSource, pipeline::Manifest};

use crate::{
    gguf::with_tokenizer,
    harness::{
        CALIBRATION, Command, Dir, Ran, Tensor, assert_resumes, assert_same_files,
        assert_same_files_but, checkpoints, convert, copy_dir, fixture, kill_when, noise,
        read_tensors, write_tensors,
    },
};

const TEXT: &str = "fixtures/text/calibration.txt";
const NARROW: [&str; 2] = ["--slice-width", "96"];
const F32: [&str; 4] = ["--dtype", "f32", "--compute", "f32"];
/// Parameters of the fixture model, and those of each column of its stream once it is sliced and the
/// output matrix is its own: vocabulary 1024, 4 blocks, 384 query, key, value and output features, an
/// MLP of 384, 9 norms.
const PARAMETERS: u64 = 918_656;
const PER_COLUMN: u64 = 2 * 1024 + 4 * (384 + 3 * 384) + 9;

fn model() -> PathBuf {
    fixture("model")
}

/// Slices the fixture model to 96 columns.
fn narrow(out: &Path) -> Command {
    convert(&model(), out).args(NARROW).args(CALIBRATION)
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn config(out: &Path) -> Value {
    read_json(&out.join("config.json"))
}

/// Expects every tensor of two outputs to be stored as the same bytes.
#[track_caller]
fn assert_same_tensors(left: &Path, right: &Path) {
    let (left, right) =
        (sparsepack_formats::open(left).unwrap(), sparsepack_formats::open(right).unwrap());
    let names = |reader: &dyn sparsepack_formats::CheckpointReader| -> Vec<String> {
        reader.tensors().iter().map(|info| info.name.clone()).collect()
    };
    assert_eq!(names(left.as_ref()), names(right.as_ref()));
    for info in left.tensors() {
        let name = info.name.as_str();
        let other = right.tensors().get(name).unwrap();
        assert_eq!((info.encoding, &info.shape), (other.encoding, &other.shape), "{name}");
        let same = left.components(name).unwrap() == right.components(name).unwrap();
        assert!(same, "{name} differs");
    }
}

/// Expects `plan` and `convert` to refuse a model with the same words, and `convert` to leave nothing.
#[track_caller]
fn refused_by(model: &Path, args: &[&str], parts: &[&str]) {
    let dir = Dir::new();
    let out = dir.join("out");
    let commands = [Command::new("plan").arg(model), convert(model, &out)];
    for command in commands {
        let ran = command.args(args.iter().copied()).fails(2);
        ran.says(parts);
        assert_eq!(ran.stdout(), "", "{}", ran.story());
    }
    assert!(!out.exists());
}

/// As [`refused_by`] with the fixture model and a calibration text.
#[track_caller]
fn refused(args: &[&str], parts: &[&str]) {
    refused_by(&model(), &[args, &CALIBRATION].concat(), parts);
}

// --- what is refused ---

#[test]
fn a_share_is_a_percentage_between_nothing_and_everything() {
    for share in ["0%", "100%", "25", "0.25", "-5%", "101%", "nan%", "some"] {
        let flag = format!("--slice={share}");
        let told = format!("`{share}` is not a share; write a percentage above 0% and below 100%");
        refused(&[&flag], &[&told, "like 25%"]);
    }
}

#[test]
fn a_width_is_between_one_column_and_all() {
    for width in ["0", "129", "18446744073709551615"] {
        let told =
            format!("the slice width is {width} (expected 1 to 128, the model's hidden size)");
        refused(&["--slice-width", width], &[&told]);
    }
    refused(&["--slice-width", "-1"], &["-1"]);
    refused(&["--slice", "20%", "--slice-width", "96"], &["--slice", "cannot be used with"]);
}

#[test]
fn a_share_must_leave_a_multiple() {
    for flags in [&["--slice", "20%"][..], &["--slice-width", "96"]] {
        let flags = [flags, &["--slice-multiple", "0"]].concat();
        refused(&flags, &["the slice width cannot be a multiple of 0"]);
    }
    refused(
        &["--slice", "60%"],
        &[
            "slicing 60% of 128 columns leaves 51, fewer than the 64 that widths are a multiple of; slice \
           less, or give a smaller --slice-multiple",
        ],
    );
    refused(
        &["--slice", "99.9%", "--slice-multiple", "1"],
        &["of 128 columns leaves 0, fewer than the 1"],
    );
}

#[test]
fn slicing_needs_text_with_enough_tokens() {
    refused_by(&model(), &NARROW, &["slicing needs calibration text: give --calibration FILE"]);
    let short = ["--calibration", TEXT, "--samples", "3", "--seq-len", "31"];
    refused_by(
        &model(),
        &[&NARROW[..], &short].concat(),
        &["93 calibration tokens", "fewer than the 96 that are to stay", "--samples"],
    );
    for (samples, seq_len, told) in [
        ("0", "64", "0 calibration windows of 64 tokens (expected at least 1 of at least 2)"),
        ("4", "1", "4 calibration windows of 1 tokens (expected at least 1 of at least 2)"),
        ("4", "1024", "longer than the model's max_position_embeddings of 512"),
        ("4", "18446744073709551615", "max_position_embeddings of 512"),
        ("18446744073709551615", "64", "expected at most"),
    ] {
        let text = ["--calibration", TEXT, "--samples", samples, "--seq-len", seq_len];
        refused_by(&model(), &[&NARROW[..], &text].concat(), &[told]);
    }
    // What solvers learn from has the same limit.
    let text = ["--calibration", TEXT, "--samples", "18446744073709551615", "--seq-len", "64"];
    let wanda = ["--prune", "wanda", "--sparsity", "2:4"];
    refused_by(&model(), &[&wanda[..], &text].concat(), &["expected at most"]);
}

#[test]
fn flags_that_are_about_nothing_are_named() {
    for flag in [
        &["--basis", "block"][..],
        &["--slice-multiple", "32"],
        &["--slice-head"],
        &["--slice-correction", "none"],
        &["--slice-damp", "0.1"],
    ] {
        let told = format!("{} is about slicing, but no --slice PERCENT is given", flag[0]);
        refused_by(&model(), flag, &[&told]);
    }
    refused(
        &["--slice-width", "96", "--slice-head"],
        &["the shared basis always slices the output matrix; --slice-head is about --basis block"],
    );
    refused(&["--slice-width", "96", "--basis", "head"], &["--basis", "shared, block"]);
    let block = ["--slice-width", "96", "--basis", "block"];
    refused(
        &[&block[..], &["--slice-correction", "least-squares"]].concat(),
        &["weights are fitted in the shared basis only"],
    );
    for other in [&block[..], &["--slice-width", "96", "--slice-correction", "none"]] {
        refused(
            &[other, &["--slice-damp", "0.1"]].concat(),
            &["the damping is that of the fit, but sliced weights are not fitted here"],
        );
    }
    for damp in ["0", "-1", "nan", "inf"] {
        let flag = format!("--slice-damp={damp}");
        refused(&["--slice-width", "96", &flag], &["(expected a positive number)"]);
    }
}

#[test]
fn a_size_budget_is_fitted_afterwards() {
    let budget = ["--target-bits", "4", "--group-size", "32", "--format", "packed"];
    refused(&[&NARROW[..], &budget].concat(), &["slice first, and fit the result in a second"]);
}

#[test]
fn a_recipe_says_either_a_share_or_a_width() {
    let dir = Dir::new();
    let calibration = format!("[calibration]\nfile = '{TEXT}'\nsamples = 4\nseq_len = 64\n");
    for (slice, parts) in [
        ("", &["[slice] needs either a fraction to leave out or a width to keep"][..]),
        ("width = 96\nfraction = '20%'\n", &["[slice] needs either a fraction"]),
        ("width = 96\nratio = 0.2\n", &["not a recipe", "unknown field `ratio`"]),
        ("fraction = 0.2\n", &["not a recipe", "fraction"]),
        ("fraction = '0%'\n", &["not a recipe", "`0%` is not a share"]),
        ("width = 96\nbasis = 'both'\n", &["not a recipe", "unknown variant `both`"]),
        ("width = -1\n", &["not a recipe"]),
    ] {
        let recipe = dir.write("recipe.toml", format!("[slice]\n{slice}{calibration}"));
        refused_by(&model(), &["--recipe", recipe.to_str().unwrap()], parts);
    }
}

#[test]
fn opt_is_sliced_in_blocks_only() {
    let slice = ["--slice-width", "24", "--calibration", TEXT, "--samples", "4", "--seq-len", "24"];
    refused_by(
        &fixture("tiny/opt"),
        &slice,
        &["cannot slice: OPTForCausalLM", "use --basis block"],
    );
    let block = [&slice[..], &["--basis", "block"]].concat();
    Command::new("plan").arg(fixture("tiny/opt")).args(block).succeeds();
}

/// A Llama with biases of its attention.
fn with_biases(dir: &Dir) -> PathBuf {
    let model = dir.join("biased");
    let mut tensors = read_tensors(&fixture("tiny/llama-gqa"));
    for block in 0..2 {
        for (linear, features) in [("q", 32), ("k", 16), ("v", 16), ("o", 32)] {
            let name = format!("model.layers.{block}.self_attn.{linear}_proj.bias");
            tensors.push(Tensor::f32(name, &[features], &noise(features as u64, features)));
        }
    }
    write_tensors(&model, &tensors);
    let mut config = config(&fixture("tiny/llama-gqa"));
    config["attention_bias"] = true.into();
    fs::write(model.join("config.json"), config.to_string()).unwrap();
    model
}

#[test]
fn a_llama_with_biases_takes_multiples_of_its_heads() {
    let dir = Dir::new();
    let model = with_biases(&dir);
    let text = ["--calibration", TEXT, "--samples", "4", "--seq-len", "24"];
    let width = |width| [&["--slice-width", width][..], &text].concat();
    let told = ["LlamaForCausalLM", "4 heads", "not 26", "a multiple of 4", "--basis block"];
    refused_by(&model, &width("26"), &told);
    let plan = |args: &[&str]| {
        let plan = Command::new("plan").arg(&model).args(args.iter().copied()).arg("--json");
        plan.succeeds().json()["slice"]["class"].clone()
    };
    assert_eq!(plan(&width("28")), "LlamaForCausalLM");
    assert_eq!(plan(&[&width("26")[..], &["--basis", "block"]].concat()), "SlicedLlamaForCausalLM");
}

#[test]
fn no_container_takes_what_its_readers_cannot_have() {
    let block = ["--basis", "block", "--format", "gguf"];
    refused(
        &[&NARROW[..], &block].concat(),
        &["GGUF has no architecture for SlicedLlamaForCausalLM", "--basis shared"],
    );
    refused(
        &[&NARROW[..], &["--format", "packed"]].concat(),
        &["a sliced model has no zeros", "--prune"],
    );
}

#[test]
fn a_model_sliced_in_blocks_is_not_sliced_again() {
    let dir = Dir::new();
    let out = dir.join("out");
    narrow(&out).args(["--basis", "block"]).succeeds();
    for basis in ["block", "shared"] {
        let again = [&["--slice-width", "64", "--basis", basis][..], &CALIBRATION].concat();
        refused_by(&out, &again, &["SlicedLlamaForCausalLM was sliced before"]);
    }
}

#[test]
fn a_model_sliced_in_one_basis_can_be_sliced_again() {
    let dir = Dir::new();
    let (first, second) = (dir.join("first"), dir.join("second"));
    narrow(&first).succeeds();
    convert(&first, &second).args(["--slice-width", "64"]).args(CALIBRATION).succeeds();
    let config = config(&second);
    assert_eq!((&config["hidden_size"], &config["head_dim"]), (&json!(64), &json!(32)));
    let eps = config["rms_norm_eps"].as_f64().unwrap();
    assert!((eps / 2e-5 - 1.0).abs() < 1e-6, "{eps}");
    assert_eq!(config["sparsepack"]["slice"]["from_hidden_size"], 96);
}

/// Text of one word has a few directions only, which is known when they are found.
#[test]
fn too_few_directions_are_an_error_that_leaves_nothing() {
    let dir = Dir::new();
    let text = dir.write("same.txt", " the".repeat(400));
    for basis in ["shared", "block"] {
        let out = dir.join("out");
        let command = convert(&model(), &out)
            .args(NARROW)
            .args(["--basis", basis, "--samples", "4", "--seq-len", "64", "--calibration"])
            .arg(&text);
        command.fails(2).says(&[
            "the calibration text spans",
            "fewer than the 96 that are to stay; give more text or a smaller width",
        ]);
        assert!(!out.exists());
        // What was in the directory stays.
        fs::create_dir(&out).unwrap();
        let command = convert(&model(), &out)
            .args(NARROW)
            .args(["--basis", basis, "--samples", "4", "--seq-len", "64", "--calibration"])
            .arg(&text);
        command.fails(2);
        assert!(!out.join("model.safetensors").exists() && !out.join(".work").exists());
        let _ = fs::remove_dir(&out);
    }
}

#[test]
fn text_that_is_too_short_leaves_nothing() {
    let dir = Dir::new();
    let (text, out) = (dir.write("short.txt", "one two three"), dir.join("out"));
    let command = convert(&model(), &out).args(NARROW).args(["--samples", "4", "--seq-len", "64"]);
    command.arg("--calibration").arg(text).fails(1).says(&["short.txt", "4 windows of 64 tokens"]);
    assert!(!out.exists());
}

// --- one run and two ---

/// Slices and goes on in one run and in two, with the same calibration.
fn in_one_run_and_in_two(slice: &[&str], rest: &[&str]) {
    let dir = Dir::new();
    let (sliced, second, whole) = (dir.join("sliced"), dir.join("second"), dir.join("whole"));
    let text = |command: Command| command.args(CALIBRATION);
    text(convert(&model(), &sliced).args(slice.iter().copied())).succeeds();
    text(convert(&sliced, &second).args(rest.iter().copied())).succeeds();
    let both = [slice, rest].concat();
    text(convert(&model(), &whole).args(both)).succeeds();
    assert_same_tensors(&whole, &second);
    if whole.join("config.json").exists() {
        assert_eq!(config(&whole), config(&second), "{rest:?}");
    }
    for out in [&whole, &second] {
        Command::new("verify").arg(out).succeeds();
    }
}

#[test]
fn pruning_after_slicing_is_pruning_the_slice() {
    let prune = ["--prune", "sparsegpt", "--sparsity", "2:4"];
    in_one_run_and_in_two(&NARROW, &prune);
    in_one_run_and_in_two(&NARROW, &[&prune[..], &["--format", "packed"]].concat());
    let block = ["--slice-width", "96", "--basis", "block", "--slice-head"];
    in_one_run_and_in_two(&block, &[&prune[..], &["--format", "packed"]].concat());
}

#[test]
fn quantizing_after_slicing_is_quantizing_the_slice() {
    let int4 = ["--quantize", "int4", "--group-size", "32", "--format", "packed"];
    in_one_run_and_in_two(&NARROW, &int4);
    in_one_run_and_in_two(&["--slice-width", "96", "--basis", "block"], &int4);
    in_one_run_and_in_two(&NARROW, &["--quantize", "q8_0", "--format", "gguf"]);
    let both =
        ["--prune", "wanda", "--sparsity", "50%", "--quantize", "int8", "--format", "packed"];
    in_one_run_and_in_two(&NARROW, &both);
}

// --- the same again ---

#[test]
fn the_manifest_reproduces_the_run() {
    for (basis, prune) in [("shared", true), ("block", false)] {
        let dir = Dir::new();
        let (first, again) = (dir.join("first"), dir.join("again"));
        let mut command = convert(&model(), &first).args(CALIBRATION);
        command = command.args(["--slice", "20%", "--slice-multiple", "16", "--basis", basis]);
        if prune {
            command = command.args(["--prune", "sparsegpt", "--sparsity", "4:8"]);
        }
        command.args(["--threads", "1"]).succeeds();
        let manifest = read_json(&first.join("manifest.json"));
        // The width it came to, not the share that gave it.
        let slice = &manifest["recipe"]["slice"];
        assert_eq!(slice.get("fraction"), None);
        assert_eq!((&slice["width"], &slice["multiple"]), (&json!(96), &json!(16)));
        assert_eq!(slice["basis"], basis);
        assert_eq!(manifest["slice"]["after"]["hidden_size"], 96);
        let recipe = first.join("manifest.json");
        let command = convert(&model(), &again).arg("--recipe").arg(recipe);
        command.args(["--threads", "2"]).succeeds();
        assert_same_files(&first, &again);
    }
}

#[test]
fn memory_does_not_change_bytes() {
    let dir = Dir::new();
    for basis in ["shared", "block"] {
        let (roomy, tight) = (dir.join(&format!("{basis}-a")), dir.join(&format!("{basis}-b")));
        narrow(&roomy).args(["--basis", basis]).succeeds();
        narrow(&tight).args(["--basis", basis, "--memory", "1MiB"]).succeeds();
        assert_same_files(&roomy, &tight);
    }
}

#[test]
fn flags_replace_the_share_of_a_recipe() {
    let dir = Dir::new();
    let recipe = dir.write(
        "recipe.toml",
        format!(
            "[slice]\nfraction = '40%'\nmultiple = 8\nbasis = 'block'\n\
             [calibration]\nfile = '{TEXT}'\nsamples = 4\nseq_len = 64\n"
        ),
    );
    let slice = |args: &[&str]| {
        let plan = Command::new("plan").arg(model()).arg("--recipe").arg(&recipe);
        plan.args(args.iter().copied()).arg("--json").succeeds().json()["recipe"]["slice"].clone()
    };
    assert_eq!(slice(&[])["width"], 72);
    assert_eq!(slice(&[])["basis"], "block");
    assert_eq!(slice(&["--slice", "20%"])["width"], 96);
    assert_eq!(slice(&["--slice-width", "100"])["width"], 100);
    assert_eq!(slice(&["--slice-multiple", "1"])["width"], 76);
    assert_eq!(slice(&["--basis", "shared"])["basis"], "shared");
    assert_eq!(slice(&["--slice-head"])["head"], true);
}

// --- interrupted ---

const SLOW: [&str; 12] = [
    "--slice-width",
    "96",
    "--samples",
    "64",
    "--seq-len",
    "256",
    "--compute",
    "f32",
    "--checkpoint-secs",
    "0",
    "--calibration",
    TEXT,
];

fn slow(basis: &str, out: &Path) -> Command {
    let prune = ["--prune", "sparsegpt", "--sparsity", "2:4", "--format", "packed"];
    convert(&model(), out).args(SLOW).args(["--basis", basis]).args(prune).args(["--threads", "1"])
}

#[test]
fn a_run_killed_while_slicing_starts_again() {
    let dir = Dir::new();
    for basis in ["shared", "block"] {
        let (whole, out) = (dir.join(&format!("whole-{basis}")), dir.join(basis));
        slow(basis, &whole).succeeds();
        kill_when(slow(basis, &out), &out, || out.join(".work/sliced").is_dir());
        assert!(!out.join(".work/slice.json").exists());
        slow(basis, &out).fails(2).says(&["holds an interrupted conversion", "--resume"]);
        slow(basis, &out).arg("--resume").succeeds();
        assert_same_files(&whole, &out);
    }
}

#[test]
fn a_run_killed_after_slicing_keeps_its_slice() {
    let dir = Dir::new();
    for basis in ["shared", "block"] {
        let (whole, out) = (dir.join(&format!("whole-{basis}")), dir.join(basis));
        slow(basis, &whole).succeeds();
        for count in [0, 2] {
            let _ = fs::remove_dir_all(&out);
            let finished = || out.join(".work/slice.json").is_file() && checkpoints(&out) >= count;
            kill_when(slow(basis, &out), &out, finished);
            let made = |path: &str| fs::metadata(out.join(path)).unwrap().modified().unwrap();
            let (sliced, done) = (made(".work/slice.json"), checkpoints(&out));
            // Killed once more, so that the slice can be seen not to be made anew.
            if done < 2 {
                let further = || checkpoints(&out) > done;
                kill_when(slow(basis, &out).arg("--resume"), &out, further);
                assert_eq!(sliced, made(".work/slice.json"));
            }
            assert_resumes(slow(basis, &out), &out, &whole);
        }
    }
}

#[test]
fn another_slice_is_not_resumed() {
    let dir = Dir::new();
    let out = dir.join("out");
    kill_when(slow("shared", &out), &out, || checkpoints(&out) >= 1);
    let before = checkpoints(&out);
    let resume = |args: &[&str]| -> Ran {
        let ran = slow("shared", &out).arg("--resume").args(args.iter().copied()).fails(1);
        assert_eq!(checkpoints(&out), before);
        ran
    };
    for other in [["--seed", "1"], ["--dtype", "f16"]] {
        resume(&other).says(&["cannot resume", "sliced by another version or recipe"]);
    }
    let resume_as = |basis: &str, width: &str| {
        let prune = ["--prune", "sparsegpt", "--sparsity", "2:4", "--format", "packed", "--resume"];
        let slice = ["--slice-width", width, "--basis", basis, "--threads", "1"];
        let command = convert(&model(), &out).args(&SLOW[2..]).args(slice).args(prune);
        command.fails(1).says(&["cannot resume", "sliced by another version or recipe"]);
    };
    resume_as("shared", "64");
    resume_as("block", "96");
    // The same slice, and another pruning of it.
    resume(&["--ignore", "down_proj"]).says(&["cannot resume: the plan (recipe and outputs) was"]);
    // Not slicing any more.
    let prune = ["--prune", "sparsegpt", "--sparsity", "2:4", "--format", "packed", "--resume"];
    let command = convert(&model(), &out).args(&SLOW[2..]).args(["--threads", "1"]).args(prune);
    command.fails(1).says(&["cannot resume"]);
    assert_eq!(checkpoints(&out), before);
    slow("shared", &out).arg("--resume").succeeds();
    Command::new("verify").arg(&out).succeeds();
}

// --- sources and formats ---

#[test]
fn gguf_files_are_sliced_as_their_models_are() {
    let dir = Dir::new();
    for tiny in ["llama-gqa", "qwen2"] {
        let (from_gguf, from_hf) =
            (dir.join(&format!("{tiny}-gguf")), dir.join(&format!("{tiny}-hf")));
        let slice = ["--slice-width", "24", "--dtype", "f32"];
        let file = fixture(&format!("tiny/{tiny}.gguf"));
        convert(&file, &from_gguf).args(slice).args(CALIBRATION).succeeds();
        let hf = with_tokenizer(&dir, tiny);
        convert(&hf, &from_hf).args(slice).args(CALIBRATION).succeeds();
        assert_same_tensors(&from_gguf, &from_hf);
        Command::new("verify").arg(&from_gguf).succeeds();
        assert!(from_gguf.join("tokenizer.json").is_file());
        let source = ModelSource::open(&from_gguf).unwrap();
        assert_eq!(*source.config(), *ModelSource::open(&from_hf).unwrap().config());
        let plan = Command::new("plan").arg(&file).args(slice).args(CALIBRATION).arg("--json");
        let plan = plan.succeeds().json();
        let written = Manifest::read(&from_gguf).unwrap().totals.bytes;
        assert_eq!(plan["output_bytes"].as_u64(), Some(written));
    }
}

#[test]
fn outputs_are_sliced_as_what_they_hold() {
    let dir = Dir::new();
    let prune = ["--prune", "magnitude", "--sparsity", "2:4"];
    let expected = dir.join("expected");
    for format in ["safetensors", "packed", "gguf", "zst"] {
        let (source, out) = (dir.join(&format!("source-{format}")), dir.join(format));
        convert(&model(), &source).args(prune).args(["--format", format]).succeeds();
        convert(&source, &out).args(NARROW).args(CALIBRATION).succeeds();
        Command::new("verify").arg(&out).succeeds();
        if format == "safetensors" {
            fs::rename(&out, &expected).unwrap();
        } else {
            assert_same_tensors(&expected, &out);
        }
    }
    // What was quantized is sliced as what it decodes to, in bf16.
    let (int4, out) = (dir.join("int4"), dir.join("of-int4"));
    let quantize = ["--quantize", "int4", "--group-size", "32", "--quantizer", "rtn"];
    convert(&model(), &int4).args(quantize).args(["--format", "packed"]).succeeds();
    convert(&int4, &out).args(NARROW).args(CALIBRATION).succeeds();
    let source = ModelSource::open(&out).unwrap();
    let mut kinds: Vec<String> =
        source.tensors().iter().map(|tensor| tensor.encoding.to_string()).collect();
    kinds.dedup();
    assert_eq!(kinds, ["BF16"]);
}

fn perplexity(model: &Path) -> f64 {
    let text = ["--text", "fixtures/text/heldout.txt", "--window", "128", "--max-windows", "2"];
    let command = Command::new("eval").arg(model).args(text).args(["--compute", "f32", "--json"]);
    command.succeeds().json()["perplexity"].as_f64().unwrap()
}

#[test]
fn every_container_holds_the_same_slice() {
    let dir = Dir::new();
    let dense = perplexity(&model());
    for basis in ["shared", "block"] {
        let out = |format: &str| dir.join(&format!("{basis}-{format}"));
        let formats: &[&str] = if basis == "shared" {
            &["safetensors", "zst", "gguf"]
        } else {
            &["safetensors", "zst"]
        };
        for format in formats {
            let flags = ["--basis", basis, "--format", format];
            narrow(&out(format)).args(flags).args(F32).succeeds();
            Command::new("verify").arg(out(format)).succeeds();
        }
        let plain = perplexity(&out("safetensors"));
        assert!(plain > dense && plain < 20.0 * dense, "{basis}: {plain}, {dense} before");
        for format in &formats[1..] {
            let found = perplexity(&out(format));
            assert!((found / plain - 1.0).abs() < 1e-6, "{basis} {format}: {found} for {plain}");
            let against = Command::new("verify").arg(out(format)).arg("--against");
            against.arg(out("safetensors")).succeeds();
        }
        let unpacked = dir.join(&format!("{basis}-unpacked"));
        Command::new("unpack").arg(out("zst")).arg("-o").arg(&unpacked).succeeds();
        assert_same_files_but(&out("safetensors"), &unpacked, &["manifest.json", "config.json"]);
        // What the record in the configuration says of the format is another.
        let [mut plain, mut unpacked] = [config(&out("safetensors")), config(&unpacked)];
        for config in [&mut plain, &mut unpacked] {
            config["sparsepack"]["format"].take();
        }
        assert_eq!(plain, unpacked);
    }
}

#[test]
fn a_slice_that_leaves_nothing_out_computes_the_same() {
    let dir = Dir::new();
    let dense = perplexity(&model());
    for flags in
        [&["--basis", "shared"][..], &["--basis", "block"], &["--basis", "block", "--slice-head"]]
    {
        let out = dir.join(&flags.concat());
        let command = convert(&model(), &out).args(["--slice-width", "128"]).args(CALIBRATION);
        command.args(F32).args(flags.iter().copied()).succeeds();
        let found = perplexity(&out);
        assert!((found / dense - 1.0).abs() < 1e-4, "{flags:?}: {found} for {dense}");
        let manifest = Manifest::read(&out).unwrap();
        let kept = manifest.slice.unwrap().kept_variance;
        assert!(kept.iter().all(|share| (share - 1.0).abs() < 1e-12), "{kept:?}");
    }
}

#[test]
fn large_models_are_sliced_into_shards() {
    let dir = Dir::new();
    let (one, many) = (dir.join("one"), dir.join("many"));
    narrow(&one).succeeds();
    narrow(&many).args(["--shard-size", "500kB"]).succeeds();
    assert!(many.join("model.safetensors.index.json").is_file());
    Command::new("verify").arg(&many).arg("--against").arg(&one).succeeds();
}

// --- what the output says of itself ---

#[test]
fn the_configuration_is_that_of_the_narrower_model() {
    let dir = Dir::new();
    for (width, class, model_type) in
        [("96", "LlamaForCausalLM", "llama"), ("98", "MistralForCausalLM", "mistral")]
    {
        let out = dir.join(width);
        convert(&model(), &out).args(["--slice-width", width]).args(CALIBRATION).succeeds();
        let config = config(&out);
        let columns: u64 = width.parse().unwrap();
        assert_eq!(config["architectures"], json!([class]));
        assert_eq!(config["model_type"], model_type);
        assert_eq!(config["hidden_size"], columns);
        assert_eq!(config["head_dim"], 32);
        assert_eq!(config["num_attention_heads"], 4);
        assert_eq!(config["tie_word_embeddings"], false);
        assert_eq!(config["dtype"], "bfloat16");
        assert!(config.get("quantization_config").is_none());
        let eps = config["rms_norm_eps"].as_f64().unwrap();
        assert!((eps / (1e-5 * 128.0 / columns as f64) - 1.0).abs() < 1e-6, "{eps}");
        let record = json!({ "basis": "shared", "from_hidden_size": 128 });
        assert_eq!(config["sparsepack"]["slice"], record);
        let source = ModelSource::open(&out).unwrap();
        assert_eq!(source.config().hidden_size as u64, columns);
        assert!(source.tensor("lm_head.weight").is_ok());
        for tensor in source.tensors().iter().filter(|tensor| tensor.name.contains("norm")) {
            let gain = source.read_f32(&tensor.name).unwrap();
            assert!(gain.iter().all(|gain| gain.to_bits() == 1f32.to_bits()), "{}", tensor.name);
        }
    }
    let out = dir.join("block");
    narrow(&out).args(["--basis", "block"]).succeeds();
    let config = config(&out);
    assert_eq!(config["architectures"], json!(["SlicedLlamaForCausalLM"]));
    assert_eq!((&config["hidden_size"], &config["exit_size"]), (&json!(96), &json!(128)));
    assert_eq!(config["sparsepack"]["slice"]["basis"], "block");
}

#[test]
fn what_slicing_undoes_is_not_on_record() {
    let dir = Dir::new();
    for (format, how) in [
        ("compressed-tensors", &["--quantize", "int8", "--quantizer", "rtn"][..]),
        ("packed", &["--prune", "magnitude", "--sparsity", "2:4"]),
    ] {
        let (source, out) = (dir.join(&format!("source-{format}")), dir.join(format));
        convert(&model(), &source).args(how.iter().copied()).args(["--format", format]).succeeds();
        convert(&source, &out).args(NARROW).args(CALIBRATION).succeeds();
        let config = config(&out);
        assert!(config.get("quantization_config").is_none(), "{config}");
        let record = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "format": "safetensors",
            "slice": { "basis": "shared", "from_hidden_size": 128 },
        });
        assert_eq!(config["sparsepack"], record, "{format}");
    }
}

#[test]
fn pruning_a_slice_keeps_the_record_of_the_slice() {
    let dir = Dir::new();
    let (sliced, pruned, copied) = (dir.join("sliced"), dir.join("pruned"), dir.join("copied"));
    narrow(&sliced).succeeds();
    let prune = ["--prune", "magnitude", "--sparsity", "2:4", "--format", "packed"];
    convert(&sliced, &pruned).args(prune).succeeds();
    convert(&sliced, &copied).args(["--dtype", "f16"]).succeeds();
    for out in [&pruned, &copied] {
        assert_eq!(config(out)["sparsepack"]["slice"]["from_hidden_size"], 128);
    }
    assert_eq!(config(&pruned)["sparsepack"]["sparsity"], "2:4");
}

/// A stranger's key of the same name is no record of ours.
#[test]
fn a_record_that_is_none_is_replaced() {
    let dir = Dir::new();
    let (source, out) = (dir.join("source"), dir.join("out"));
    copy_dir(&model(), &source);
    let mut before = config(&source);
    before["sparsepack"] = json!("yes");
    fs::write(source.join("config.json"), before.to_string()).unwrap();
    for (name, how) in [
        ("pruned", &["--prune", "magnitude", "--sparsity", "2:4"][..]),
        ("quantized", &["--quantize", "int8", "--quantizer", "rtn", "--format", "packed"]),
    ] {
        let out = dir.join(name);
        convert(&source, &out).args(how.iter().copied()).succeeds();
        assert!(config(&out)["sparsepack"]["version"].is_string());
    }
    convert(&source, &out).args(NARROW).args(CALIBRATION).succeeds();
    assert_eq!(config(&out)["sparsepack"]["slice"]["from_hidden_size"], 128);
}

// --- numbers ---

fn plan(args: &[&str]) -> Command {
    Command::new("plan").arg(model()).args(args.iter().copied()).args(CALIBRATION)
}

#[test]
fn growth_is_said_first() {
    let dir = Dir::new();
    let wide = ["--slice", "10%", "--slice-multiple", "1"];
    let told = "LARGER: this slice makes the model larger, from 918,656 to 943,115 parameters; \
                117,760 of them for an output matrix of its own";
    let converted = || convert(&model(), &dir.join("out")).args(wide).args(CALIBRATION);
    for ran in [plan(&wide).succeeds(), converted().succeeds()] {
        assert_eq!(ran.stdout().lines().next(), Some(told), "{}", ran.story());
    }
    let block = ["--slice-width", "112", "--basis", "block", "--slice-head"];
    let ran = plan(&block).succeeds();
    let first = ran.stdout().lines().next().unwrap();
    // Two square matrices a block.
    let (parameters, shortcuts) = (PER_COLUMN * 112 + 8 * 112 * 112, 8 * 112 * 112);
    assert_eq!((parameters, shortcuts), (1_018_864, 100_352));
    for part in
        ["LARGER: ", "to 1,018,864 parameters", "; 100,352 of them for matrices on the shortcuts"]
    {
        assert!(first.contains(part), "{first}");
    }
    // One column less than that of the same size.
    for (width, larger) in [("112", false), ("113", true)] {
        let ran = plan(&["--slice-width", width]).succeeds();
        assert_eq!(ran.stdout().contains("LARGER"), larger, "{}", ran.story());
        let json = plan(&["--slice-width", width, "--json"]).succeeds().json();
        let after = json["slice"]["after"]["parameters"].as_u64().unwrap();
        assert_eq!(after, PER_COLUMN * width.parse::<u64>().unwrap());
        assert_eq!(json["slice"]["before"]["parameters"], PARAMETERS);
        assert_eq!(after > PARAMETERS, larger);
    }
}

#[test]
fn plan_and_conversion_agree() {
    let dir = Dir::new();
    let pruned = ["--prune", "sparsegpt", "--sparsity", "2:4", "--format", "packed"];
    for (at, rest) in [
        &[][..],
        &["--basis", "block"],
        &["--basis", "block", "--slice-head"],
        &["--format", "gguf"],
        &["--format", "gguf", "--dtype", "q8_0"],
        &["--dtype", "f32"],
        &["--quantize", "int4", "--group-size", "32", "--format", "packed"],
        &pruned,
    ]
    .into_iter()
    .enumerate()
    {
        let out = dir.join(&format!("out-{at}"));
        let args = [&NARROW[..], rest].concat();
        let planned = plan(&args).arg("--json").succeeds().json();
        let done =
            convert(&model(), &out).args(args).args(CALIBRATION).arg("--json").succeeds().json();
        let reader = sparsepack_formats::open(&out).unwrap();
        let stored: u64 = reader.tensors().iter().map(|info| info.stored_bytes).sum();
        assert_eq!(planned["output_bytes"], stored, "{rest:?}");
        assert_eq!(done["totals"]["bytes"], stored, "{rest:?}");
        assert_eq!(planned["slice"]["after"]["bytes"], stored, "{rest:?}");
        let mut slice = done["slice"].clone();
        let kept = slice.as_object_mut().unwrap().remove("kept_variance").unwrap();
        assert_eq!(slice, planned["slice"], "{rest:?}");
        let rotations = match (rest.contains(&"block"), rest.contains(&"--slice-head")) {
            (false, _) => 1,
            (true, false) => 8,
            (true, true) => 9,
        };
        let kept = kept.as_array().unwrap();
        assert_eq!(kept.len(), rotations, "{rest:?}");
        let share = |value: &Value| value.as_f64().is_some_and(|share| share > 0.5 && share < 1.0);
        assert!(kept.iter().all(share), "{kept:?}");
        assert_eq!(read_json(&out.join("manifest.json"))["slice"], done["slice"]);
        for key in ["before", "after"] {
            for size in ["hidden_size", "parameters", "bytes", "decode_bytes", "flops_per_token"] {
                assert!(
                    planned["slice"][key][size].as_u64().is_some_and(|n| n > 0),
                    "{key} {size}"
                );
            }
        }
    }
}

#[test]
fn plan_and_conversion_say_what_a_slice_is() {
    let dir = Dir::new();
    let converted = narrow(&dir.join("out")).succeeds();
    let planned = plan(&NARROW).succeeds();
    for ran in [&planned, &converted] {
        for line in [
            "  slice           shared basis, hidden size 128 -> 96, class LlamaForCausalLM\n",
            "    parameters                  918,656 ->        787,296  (85.7%)\n",
            "    FLOP a token              1,835,008 ->      1,376,256  (75.0%)\n",
            "    output matrix        98,304 parameters, which were the embeddings'\n",
        ] {
            assert!(ran.stdout().contains(line), "{line}{}", ran.story());
        }
    }
    assert!(!planned.stdout().contains("kept variance"));
    assert!(converted.stdout().contains("    kept variance        9"), "{}", converted.story());
}
