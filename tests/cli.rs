//! The command line as a contract: what each command prints, and how it fails.

use std::{fs, io::Read, path::Path};

use serde_json::Value;

use crate::harness::{
    CALIBRATION, Command, Dir, Ran, assert_same_files, assert_same_files_but, convert, expect_file,
    fixture, root,
};

const MAGNITUDE: [&str; 4] = ["--prune", "magnitude", "--sparsity", "2:4"];
const SPARSEGPT: [&str; 4] = ["--prune", "sparsegpt", "--sparsity", "2:4"];
const COMMANDS: [&str; 8] =
    ["inspect", "plan", "convert", "eval", "verify", "unpack", "bench", "generate"];

fn model() -> std::path::PathBuf {
    fixture("model")
}

/// A packed output of `fixtures/model`, pruned by magnitude.
fn packed(dir: &Dir) -> std::path::PathBuf {
    let out = dir.join("packed");
    convert(&model(), &out).args(MAGNITUDE).args(["--format", "packed"]).succeeds();
    out
}

fn tensor<'a>(summary: &'a Value, name: &str) -> &'a Value {
    let tensors = summary["tensors"].as_array().unwrap();
    tensors.iter().find(|tensor| tensor["name"] == name).unwrap()
}

const DOWN: &str = "model.layers.1.mlp.down_proj.weight";

// --- every command does its work ---

#[test]
fn inspect_lists_every_tensor() {
    let ran = Command::new("inspect").arg(model()).succeeds();
    assert!(ran.stdout().contains("llama, 4 blocks, hidden size 128, vocabulary 1024"));
    assert_eq!(ran.stdout().lines().count(), 2 + 38, "{}", ran.story());
    assert_eq!(ran.stderr(), "");
}

#[test]
fn inspect_as_json_has_sparsity_and_pattern() {
    let dir = Dir::new();
    let summary = Command::new("inspect").arg(packed(&dir)).arg("--json").succeeds().json();
    assert_eq!(summary["architecture"], "llama");
    assert_eq!(summary["linear_sparsity"], 0.5);
    let down = tensor(&summary, DOWN);
    assert_eq!(down["pattern"], "2:4");
    assert_eq!(down["sparsity"], 0.5);
    assert_eq!(down["encoding"], "sparse24");
    assert_eq!(down["shape"], serde_json::json!([128, 384]));
}

#[test]
fn inspect_headers_reads_no_values() {
    let summary = Command::new("inspect").arg(model()).args(["--headers", "--json"]).succeeds();
    assert!(tensor(&summary.json(), DOWN).get("sparsity").is_none());
}

#[test]
fn inspect_lists_tensors_without_a_configuration() {
    let file = fixture("golden/wanda.safetensors");
    let ran = Command::new("inspect").arg(file).succeeds();
    assert!(ran.stdout().contains("tensors without a configuration"), "{}", ran.story());
}

#[test]
fn inspect_reads_gguf() {
    let summary = Command::new("inspect").arg(fixture("tiny/qwen2.gguf")).arg("--json").succeeds();
    assert_eq!(summary.json()["architecture"], "qwen2");
}

#[test]
fn plan_says_what_and_how_much() {
    let ran = Command::new("plan").arg(model()).args(SPARSEGPT).args(CALIBRATION).succeeds();
    for line in
        ["prune           28 layers of 4 blocks, sparsegpt 2:4", "peak memory", "arithmetic"]
    {
        assert!(ran.stdout().contains(line), "{}", ran.story());
    }
}

#[test]
fn plan_as_json_lists_layers_and_outputs() {
    let plan = Command::new("plan")
        .arg(model())
        .args(MAGNITUDE)
        .args(["--format", "packed", "--json"])
        .succeeds()
        .json();
    assert_eq!(plan["blocks"].as_array().unwrap().len(), 4);
    assert_eq!(plan["outputs"].as_array().unwrap().len(), 38);
    assert!(plan["budget"]["peak_bytes"].as_u64().unwrap() > 0);
}

#[test]
fn convert_reports_totals() {
    let dir = Dir::new();
    let ran = convert(&model(), &dir.join("out")).args(MAGNITUDE).succeeds();
    assert!(
        ran.stdout().contains("393,216 of 786,432 in pruned layers (50.00%)"),
        "{}",
        ran.story()
    );
}

#[test]
fn convert_as_json_reports_totals() {
    let dir = Dir::new();
    let report = convert(&model(), &dir.join("out"))
        .args(SPARSEGPT)
        .args(CALIBRATION)
        .args(["--format", "packed", "--json"])
        .succeeds()
        .json();
    let totals = &report["totals"];
    assert_eq!(totals["pruned_parameters"], 786_432);
    assert_eq!(totals["zeroed"], 393_216);
    assert_eq!(totals["pruned_bytes"], 786_432 * 2 * 9 / 16);
    assert!(report["peak_rss_bytes"].as_u64().unwrap() > 0);
    assert!(report["phases"].as_array().is_some_and(|phases| !phases.is_empty()));
}

#[test]
fn convert_without_pruning_repacks() {
    let dir = Dir::new();
    let out = dir.join("out");
    convert(&model(), &out).succeeds();
    Command::new("verify").arg(&out).arg("--against").arg(model()).succeeds();
}

#[test]
fn every_pattern_packs_verifies_unpacks_and_evaluates() {
    let dir = Dir::new();
    for (sparsity, encoding, percent) in [
        ("4:8", "nm", 56.25),
        ("1:4", "nm", 31.25),
        ("8:16", "nm", 56.25),
        ("50%", "bitmask", 56.4),
    ] {
        let name = |kind: &str| dir.join(&format!("{}-{kind}", sparsity.replace([':', '%'], "-")));
        let (dense, packed, unpacked) = (name("dense"), name("packed"), name("unpacked"));
        let prune = ["--prune", "magnitude", "--sparsity", sparsity];
        convert(&model(), &dense).args(prune).succeeds();
        let report = convert(&model(), &packed)
            .args(prune)
            .args(["--format", "packed", "--json"])
            .succeeds()
            .json();
        let bytes = report["totals"]["pruned_bytes"].as_f64().unwrap();
        let share = 100.0 * bytes / (786_432.0 * 2.0);
        assert!((share - percent).abs() < 0.1, "{sparsity}: {share} % of dense");
        let summary = Command::new("inspect").arg(&packed).arg("--json").succeeds().json();
        assert_eq!(tensor(&summary, DOWN)["encoding"], encoding, "{sparsity}");
        Command::new("verify").arg(&packed).arg("--against").arg(&dense).succeeds();
        Command::new("unpack").arg(&packed).arg("-o").arg(&unpacked).succeeds();
        assert_same_files_but(&dense, &unpacked, &["manifest.json"]);
        let perplexity = |model: &Path| {
            eval(model).arg("--json").succeeds().json()["perplexity"].as_f64().unwrap().to_bits()
        };
        assert_eq!(perplexity(&packed), perplexity(&dense), "{sparsity}");
        // Without pruning, what is sparse already is packed.
        let repacked = name("repacked");
        convert(&dense, &repacked).args(["--format", "packed"]).succeeds();
        Command::new("verify").arg(&repacked).arg("--against").arg(&packed).succeeds();
        let plain = name("plain");
        Command::new("unpack").arg(&repacked).arg("-o").arg(&plain).succeeds();
        assert_same_files_but(&dense, &plain, &["manifest.json"]);
    }
}

#[test]
fn inspect_and_plan_name_the_encodings() {
    let dir = Dir::new();
    let (dense, packed) = (dir.join("dense"), dir.join("packed"));
    convert(&model(), &dense).args(["--prune", "magnitude", "--sparsity", "4:8"]).succeeds();
    let plan = Command::new("plan").arg(&dense).args(["--format", "packed"]).succeeds();
    for line in [
        "  prune           nothing\n",
        "  packed          28 x 4:8 BF16\n",
        "  scanned         29 matrices of the source (1.8 MB) for zeros, to choose encodings\n",
    ] {
        assert!(plan.stdout().contains(line), "{line}{}", plan.story());
    }
    convert(&dense, &packed).args(["--format", "packed"]).succeeds();
    let ran = Command::new("inspect").arg(&packed).succeeds();
    assert_eq!(ran.stdout().matches("  4:8 BF16 ").count(), 28, "{}", ran.story());
    let plan = Command::new("plan").arg(model()).args(MAGNITUDE).args(["--format", "packed"]);
    let plan = plan.succeeds();
    assert!(plan.stdout().contains("  packed          28 x 2:4 BF16\n"), "{}", plan.story());
    assert!(!plan.stdout().contains("scanned"), "{}", plan.story());
}

fn eval(model: &Path) -> Command {
    let text = ["--text", "fixtures/text/heldout.txt", "--window", "256", "--max-windows", "2"];
    Command::new("eval").arg(model).args(text)
}

#[test]
fn eval_as_json_states_its_protocol() {
    let report = eval(&model()).arg("--json").succeeds().json();
    let perplexity = report["perplexity"].as_f64().unwrap();
    assert!((10.0..100.0).contains(&perplexity), "{perplexity}");
    for (key, value) in [("window", 256), ("windows", 2), ("predicted_tokens", 2 * 255)] {
        assert_eq!(report[key], value, "{key} in {report}");
    }
    assert_eq!(report["text"], "heldout.txt");
    for key in ["text_tokens", "parameters", "flops_per_token", "stored_bytes", "compute"] {
        assert!(!report[key].is_null(), "{key} in {report}");
    }
}

#[test]
fn eval_reads_a_packed_output() {
    let dir = Dir::new();
    let ran = eval(&packed(&dir)).succeeds();
    assert!(ran.stdout().starts_with("perplexity "), "{}", ran.story());
}

#[test]
fn eval_fails_above_a_limit_with_3() {
    eval(&model()).args(["--fail-above", "5"]).fails(3);
    eval(&model()).args(["--fail-above", "500"]).succeeds();
}

#[test]
fn verify_accepts_a_finished_output() {
    let dir = Dir::new();
    let ran = Command::new("verify").arg(packed(&dir)).succeeds();
    assert!(ran.stdout().contains("38 of 38 tensors checked"), "{}", ran.story());
    assert!(ran.stdout().contains("all as promised"), "{}", ran.story());
}

#[test]
fn verify_a_sample_checks_fewer() {
    let dir = Dir::new();
    let report =
        Command::new("verify").arg(packed(&dir)).args(["--sample", "10%", "--json"]).succeeds();
    assert_eq!(report.json()["checked"], 4);
}

#[test]
fn verify_against_another_model_finds_the_difference() {
    let dir = Dir::new();
    let ran = Command::new("verify").arg(packed(&dir)).arg("--against").arg(model()).fails(3);
    assert!(ran.stdout().contains("q_proj.weight: row 0, column "), "{}", ran.story());
}

#[test]
fn unpack_gives_what_safetensors_would_have_been() {
    let dir = Dir::new();
    let (dense, unpacked) = (dir.join("dense"), dir.join("unpacked"));
    let packed = packed(&dir);
    convert(&model(), &dense).args(MAGNITUDE).succeeds();
    Command::new("unpack").arg(&packed).arg("-o").arg(&unpacked).succeeds();
    assert_same_files_but(&dense, &unpacked, &["manifest.json"]);
    Command::new("verify").arg(&packed).arg("--against").arg(&unpacked).succeeds();
}

#[test]
fn generate_man_covers_every_command() {
    let ran = Command::new("generate").arg("man").succeeds();
    for command in COMMANDS {
        assert!(ran.stdout().contains(&format!(".TH sparsepack-{command}")), "{command}");
    }
}

#[test]
fn generate_completions_is_a_bash_function() {
    let ran = Command::new("generate").args(["completions", "bash"]).succeeds();
    assert!(ran.stdout().contains("_sparsepack()"));
}

#[test]
fn generate_recipe_schema_knows_every_section() {
    let schema = Command::new("generate").arg("recipe-schema").succeeds().json();
    for section in ["prune", "rule", "calibration", "output"] {
        assert!(schema["properties"].get(section).is_some(), "{section}");
    }
}

#[test]
fn every_command_explains_itself() {
    for command in COMMANDS {
        let ran = Command::new(command).arg("-h").succeeds();
        assert!(ran.stdout().contains(&format!("Usage: sparsepack {command}")), "{}", ran.story());
        let longest = ran.stdout().lines().map(str::len).max().unwrap();
        assert!(longest <= 100, "{longest} columns\n{}", ran.story());
        assert_eq!(ran.stderr(), "");
    }
}

// --- streams and exit codes ---

#[test]
fn logs_stay_out_of_standard_output() {
    let dir = Dir::new();
    let ran = convert(&model(), &dir.join("out"))
        .args(SPARSEGPT)
        .args(CALIBRATION)
        .args(["--json", "-v"])
        .succeeds();
    ran.json();
    assert_eq!(ran.stderr().matches("block done").count(), 4, "{}", ran.story());
}

#[test]
fn quiet_is_silent() {
    let dir = Dir::new();
    let out = dir.join("out");
    let ran = convert(&model(), &out).args(SPARSEGPT).args(CALIBRATION).arg("--quiet").succeeds();
    assert_eq!(ran.stderr(), "");
    assert_eq!(eval(&out).arg("-q").succeeds().stderr(), "");
}

#[test]
fn no_command_is_bad_usage() {
    Command::new("--verbose").fails(2).says(&["Usage: sparsepack"]);
}

#[test]
fn an_unknown_flag_is_bad_usage() {
    Command::new("inspect").args(["model", "--frobnicate"]).fails(2).says(&["--frobnicate"]);
}

#[test]
fn a_missing_model_fails_with_1() {
    Command::new("inspect").arg("no/such/model").fails(1).says(&["error: ", "no/such/model"]);
}

#[test]
fn a_closed_pipe_is_no_failure() {
    for flags in [&["--headers"][..], &["--headers", "--json"]] {
        let command = Command::new("inspect").arg(model()).args(flags.iter().copied());
        let mut child = command.spawn();
        drop(child.stdout.take());
        let status = child.wait().unwrap();
        let mut stderr = String::new();
        child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
        assert_eq!((status.code(), stderr.as_str()), (Some(0), ""), "{flags:?}");
    }
}

// --- recipes ---

const RECIPE: &str = r#"
[prune]
method = "magnitude"
sparsity = "2:4"
ignore = ["blocks:3"]

[[rule]]
targets = ["re:model\\.layers\\.0\\..*"]
dense = true

[[rule]]
targets = ["down_proj"]
sparsity = "75%"

[[rule]]
targets = ["model.layers.2.self_attn.q_proj"]
method = "wanda"
sparsity = "4:8"

[calibration]
file = "fixtures/text/calibration.txt"
samples = 4
seq_len = 64

[output]
format = "packed"
"#;

/// `METHOD SPARSITY ENCODING` of a pruned tensor, or its encoding.
fn how(manifest: &Value, name: &str) -> String {
    let tensor = tensor(manifest, name);
    let encoding = tensor["encoding"].as_str().unwrap();
    match tensor.get("pruned") {
        None => encoding.to_owned(),
        Some(pruned) => format!(
            "{} {} {encoding}",
            pruned["method"].as_str().unwrap(),
            pruned["sparsity"].as_str().unwrap()
        ),
    }
}

fn manifest(out: &Path) -> Value {
    serde_json::from_slice(&fs::read(out.join("manifest.json")).unwrap()).unwrap()
}

#[test]
fn rules_are_exceptions_and_the_first_wins() {
    let dir = Dir::new();
    let (recipe, out) = (dir.write("recipe.toml", RECIPE), dir.join("out"));
    convert(&model(), &out).arg("--recipe").arg(recipe).succeeds();
    let manifest = manifest(&out);
    let expected = [
        ("0.mlp.down_proj", "dense"),
        ("0.self_attn.q_proj", "dense"),
        ("1.mlp.down_proj", "magnitude 75% bitmask"),
        ("1.self_attn.q_proj", "magnitude 2:4 sparse24"),
        ("2.self_attn.q_proj", "wanda 4:8 nm"),
        ("2.mlp.up_proj", "magnitude 2:4 sparse24"),
        ("3.mlp.down_proj", "magnitude 75% bitmask"),
        ("3.mlp.up_proj", "dense"),
    ];
    for (module, how_it_is) in expected {
        assert_eq!(how(&manifest, &format!("model.layers.{module}.weight")), how_it_is, "{module}");
    }
    Command::new("verify").arg(&out).succeeds();
}

#[test]
fn flags_override_the_recipe() {
    let dir = Dir::new();
    let recipe = dir.write("recipe.toml", RECIPE);
    let plan = Command::new("plan")
        .arg(model())
        .arg("--recipe")
        .arg(recipe)
        .args(["--prune", "sparsegpt", "--sparsity", "4:8", "--samples", "2", "--seed", "5"])
        .args(["--sequential", "block", "--ignore", "up_proj", "--format", "safetensors", "--json"])
        .succeeds()
        .json();
    let recipe = &plan["recipe"];
    assert_eq!(recipe["prune"]["method"], "sparsegpt");
    assert_eq!(recipe["prune"]["sparsity"], "4:8");
    assert_eq!(recipe["solver"]["sequential"], "block");
    assert_eq!(recipe["prune"]["ignore"], serde_json::json!(["up_proj"]));
    assert_eq!(recipe["calibration"]["samples"], 2);
    assert_eq!(recipe["calibration"]["seed"], 5);
    assert_eq!(recipe["calibration"]["seq_len"], 64);
    assert_eq!(recipe["output"]["format"], "safetensors");
}

#[test]
fn a_manifest_is_a_recipe_that_reproduces_it() {
    let dir = Dir::new();
    let (first, second) = (dir.join("first"), dir.join("second"));
    convert(&model(), &first)
        .args(SPARSEGPT)
        .args(CALIBRATION)
        .args(["--seed", "3", "--ignore", "down_proj", "--format", "packed", "--dtype", "f16"])
        .succeeds();
    convert(&model(), &second).arg("--recipe").arg(first.join("manifest.json")).succeeds();
    assert_same_files(&first, &second);
}

/// A rule's method is as good a reason for a setting as the recipe's.
#[test]
fn settings_of_solvers_apply_where_one_layer_is_solved_so() {
    let dir = Dir::new();
    let solver = |rule: &str| {
        let text = format!(
            "[prune]\nmethod = 'magnitude'\nsparsity = '2:4'\n{rule}\
             [calibration]\nfile = 'fixtures/text/calibration.txt'\nsamples = 2\nseq_len = 64\n"
        );
        let recipe = dir.write("recipe.toml", text);
        let plan = Command::new("plan").arg(model()).arg("--recipe").arg(recipe);
        plan.args(["--sequential", "block", "--json"])
    };
    let rule = |method: &str| format!("[[rule]]\ntargets = ['down_proj']\nmethod = '{method}'\n");
    let sparsegpt = solver(&rule("sparsegpt")).args(["--damp", "0.2"]).succeeds().json();
    let filled = serde_json::json!({
        "sequential": "block", "damp": 0.2, "damping": "feature", "column_block": 128
    });
    assert_eq!(sparsegpt["recipe"]["solver"], filled);
    let wanda = solver(&rule("wanda")).succeeds().json();
    assert_eq!(wanda["recipe"]["solver"], serde_json::json!({ "sequential": "block" }));
    solver("").fails(2).says(&["sequential is the order"]);
}

#[test]
fn a_manifest_of_a_trial_reproduces_its_blocks() {
    let dir = Dir::new();
    let (first, second) = (dir.join("first"), dir.join("second"));
    convert(&model(), &first).args(MAGNITUDE).args(["--blocks", "1..3"]).succeeds();
    convert(&model(), &second).arg("--recipe").arg(first.join("manifest.json")).succeeds();
    assert_same_files(&first, &second);
}

#[test]
fn json_lines_are_calibration_text() {
    let dir = Dir::new();
    let text = fs::read_to_string(root().join("fixtures/text/calibration.txt")).unwrap();
    let documents: Vec<String> = text
        .split("\n\n")
        .take(8)
        .map(|text| serde_json::json!({ "text": text }).to_string())
        .collect();
    let file = dir.write("text.jsonl", documents.join("\n"));
    convert(&model(), &dir.join("out"))
        .args(["--prune", "wanda", "--sparsity", "2:4", "--samples", "2", "--seq-len", "64"])
        .arg("--calibration")
        .arg(file)
        .succeeds();
}

// --- messages: the text is part of the interface ---

/// Compares what a failing command says with `errors/NAME.txt`.
#[track_caller]
pub(crate) fn expect_error(name: &str, code: i32, dir: &Dir, command: Command) {
    let ran: Ran = command.fails(code);
    let text = ran
        .stderr()
        .replace(dir.path().to_str().unwrap(), "DIR")
        .replace(root().to_str().unwrap(), "ROOT");
    assert_eq!(ran.stdout(), "", "{}", ran.story());
    expect_file(&root().join(format!("tests/cli/errors/{name}.txt")), &text);
}

fn plan_error(name: &str, args: &[&str]) {
    expect_error(name, 2, &Dir::new(), Command::new("plan").arg("fixtures/model").args(args));
}

fn recipe_error(name: &str, text: &str) {
    let dir = Dir::new();
    let recipe = dir.write("recipe.toml", text);
    let command = Command::new("plan").arg("fixtures/model").arg("--recipe").arg(recipe);
    expect_error(name, 2, &dir, command);
}

macro_rules! plan_errors {
    ($($name:ident: $args:expr;)*) => {
        $(#[test] fn $name() { plan_error(stringify!($name), &$args); })*
    };
}

plan_errors! {
    prune_without_sparsity: ["--prune", "wanda"];
    level_of_what_is_not_compressed: ["--level", "3"];
    level_out_of_range: ["--format", "zst", "--level", "20"];
    sparsity_without_prune: ["--sparsity", "2:4"];
    sequential_without_prune: ["--sequential", "block"];
    targets_without_prune: ["--targets", "down_proj"];
    ignore_without_prune: ["--ignore", "down_proj"];
    blocks_without_prune: ["--blocks", "0..2"];
    samples_without_text: ["--prune", "magnitude", "--sparsity", "2:4", "--samples", "3"];
    calibration_missing: ["--prune", "sparsegpt", "--sparsity", "2:4"];
    calibration_unused: [
        "--prune", "magnitude", "--sparsity", "2:4", "--calibration", "fixtures/text/calibration.txt"
    ];
    calibration_windows_of_one: [
        "--prune", "wanda", "--sparsity", "2:4", "--seq-len", "1",
        "--calibration", "fixtures/text/calibration.txt"
    ];
    calibration_windows_too_long: [
        "--prune", "wanda", "--sparsity", "2:4", "--seq-len", "100000",
        "--calibration", "fixtures/text/calibration.txt"
    ];
    target_matches_nothing: [
        "--prune", "magnitude", "--sparsity", "2:4", "--targets", "Linear,dwn_proj"
    ];
    ignore_matches_nothing: [
        "--prune", "magnitude", "--sparsity", "2:4", "--ignore", "re:.*lm_head"
    ];
    everything_is_ignored: ["--prune", "magnitude", "--sparsity", "2:4", "--ignore", "Linear"];
    blocks_out_of_range: ["--prune", "magnitude", "--sparsity", "2:4", "--blocks", "2..9"];
    blocks_malformed: ["--prune", "magnitude", "--sparsity", "2:4", "--blocks", "3..1"];
    selector_malformed: ["--prune", "magnitude", "--sparsity", "2:4", "--targets", "re:("];
    sparsity_malformed: ["--prune", "magnitude", "--sparsity", "5:4"];
    packed_without_pruning: ["--format", "packed"];
    packed_with_5_percent: ["--prune", "magnitude", "--sparsity", "5%", "--format", "packed"];
    block_type_in_safetensors: ["--dtype", "q8_0"];
    zeros_lost: [
        "--prune", "magnitude", "--sparsity", "2:4", "--format", "gguf", "--dtype", "q5_k"
    ];
    zero_loss_without_gguf: ["--allow-zero-loss"];
    shard_size_of_zero: ["--shard-size", "0"];
    recipe_missing: ["--recipe", "fixtures/no-such-recipe.toml"];
    scheme_malformed: ["--quantize", "int9", "--format", "packed"];
    group_size_without_quantize: ["--group-size", "64"];
    quantize_in_safetensors: ["--quantize", "int4", "--quantizer", "rtn"];
    quantize_blocks_in_packed: ["--quantize", "q4_0", "--quantizer", "rtn", "--format", "packed"];
    quantize_integers_in_gguf: ["--quantize", "int4", "--quantizer", "rtn", "--format", "gguf"];
    quantize_without_text: ["--quantize", "int4", "--format", "packed"];
    quantize_group_of_blocks: [
        "--quantize", "q4_0", "--group-size", "64", "--quantizer", "rtn", "--format", "gguf"
    ];
    quantize_asymmetric_blocks: [
        "--quantize", "q4_0", "--asymmetric", "--quantizer", "rtn", "--format", "gguf"
    ];
    candidates_without_budget: ["--candidates", "int4"];
    budget_in_a_plan: [
        "--target-bits", "4", "--calibration", "fixtures/text/calibration.txt", "--format", "packed"
    ];
    budget_beside_quantize: ["--target-bits", "4", "--quantize", "int4", "--format", "packed"];
    budget_of_some_layers: ["--target-bits", "4", "--targets", "down_proj", "--format", "packed"];
    scales_without_quantize: ["--scales", "mse"];
    quantize_group_of_one: ["--quantize", "int4", "--group-size", "1", "--format", "packed"];
    quantize_group_of_nothing: ["--quantize", "int4", "--group-size", "0", "--format", "packed"];
    damp_without_hessian: [
        "--quantize", "int4", "--quantizer", "rtn", "--damp", "0.1", "--format", "packed"
    ];
    damping_without_hessian: [
        "--prune", "wanda", "--sparsity", "2:4", "--damping", "mean",
        "--calibration", "fixtures/text/calibration.txt"
    ];
    sequential_without_inputs: ["--prune", "magnitude", "--sparsity", "2:4", "--sequential", "true"];
    quantize_act_order_to_nearest: [
        "--quantize", "int4", "--quantizer", "rtn", "--act-order", "--format", "packed"
    ];
}

/// Targets that the layers of a model cannot have: nothing is wrong with the arguments themselves.
fn misfit(name: &str, args: &[&str]) {
    expect_error(name, 1, &Dir::new(), Command::new("plan").arg("fixtures/model").args(args));
}

macro_rules! misfits {
    ($($name:ident: $args:expr;)*) => {
        $(#[test] fn $name() { misfit(stringify!($name), &$args); })*
    };
}

misfits! {
    quantize_group_size: [
        "--quantize", "int4", "--group-size", "48", "--quantizer", "rtn", "--format", "packed"
    ];
    quantize_straddle: [
        "--prune", "magnitude", "--sparsity", "4:8", "--quantize", "int4", "--group-size", "4",
        "--quantizer", "rtn", "--format", "packed"
    ];
}

macro_rules! recipe_errors {
    ($($name:ident: $text:expr;)*) => {
        $(#[test] fn $name() { recipe_error(stringify!($name), $text); })*
    };
}

recipe_errors! {
    recipe_unknown_key: "[prune]\nmethod = 'wanda'\nsparsity = '2:4'\ndamping = 0.1\n";
    recipe_unknown_section: "[pruning]\nmethod = 'wanda'\n";
    recipe_unknown_method: "[prune]\nmethod = 'obc'\nsparsity = '2:4'\n";
    recipe_bad_damp: "[prune]\nmethod = 'magnitude'\nsparsity = '2:4'\n[solver]\ndamp = 0.0\n";
    recipe_bad_level: "[output]\nformat = 'zst'\nlevel = 0\n";
    recipe_bad_column_block: "[prune]\nmethod = 'magnitude'\nsparsity = '2:4'\n[solver]\ncolumn_block = 0\n";
    recipe_damp_of_nothing: "[solver]\ndamp = 0.1\n";
    recipe_blocks_of_nothing: "[solver]\nblocks = '0..2'\n";
    recipe_column_block_without_hessian:
        "[prune]\nmethod = 'magnitude'\nsparsity = '2:4'\n[solver]\ncolumn_block = 64\n";
    recipe_sequential_to_nearest:
        "[quantize]\nscheme = 'int4'\nmethod = 'rtn'\n[solver]\nsequential = 'block'\n\
         [output]\nformat = 'packed'\n";
    recipe_group_of_one: "[quantize]\nscheme = 'int4'\ngroup_size = 1\n";
    recipe_rule_without_prune: "[[rule]]\ntargets = ['down_proj']\ndense = true\n";
    recipe_rule_matches_nothing:
        "[prune]\nmethod = 'magnitude'\nsparsity = '2:4'\n\
         [[rule]]\ntargets = ['down_proj', 'blocks:7']\ndense = true\n";
    recipe_rule_contradicts_itself:
        "[prune]\nmethod = 'magnitude'\nsparsity = '2:4'\n\
         [[rule]]\ntargets = ['down_proj']\ndense = true\nsparsity = '50%'\n";
    recipe_rule_says_nothing:
        "[prune]\nmethod = 'magnitude'\nsparsity = '2:4'\n[[rule]]\ntargets = ['down_proj']\n";
    recipe_rule_quantizes_without_quantize:
        "[prune]\nmethod = 'magnitude'\nsparsity = '2:4'\n\
         [[rule]]\ntargets = ['down_proj']\nquantize = 'int8'\n";
    recipe_quantizes_a_table:
        "[quantize]\nscheme = 'int4'\nmethod = 'rtn'\ntargets = ['model.embed_tokens']\n\
         [output]\nformat = 'packed'\n";
    recipe_json_is_no_manifest: "{ \"tensors\": [] }";
}

fn convert_error(name: &str, args: &[&str]) {
    let dir = Dir::new();
    let command = convert(&model(), &dir.join("out")).args(args);
    expect_error(name, 2, &dir, command);
}

#[test]
fn budget_beside_pruning() {
    let prune = ["--prune", "magnitude", "--sparsity", "2:4", "--target-bits", "4"];
    convert_error("budget_beside_pruning", &prune);
}

#[test]
fn budget_without_text() {
    convert_error("budget_without_text", &["--target-bits", "4", "--format", "packed"]);
}

#[test]
fn budget_too_small() {
    let budget = ["--target-bits", "1.5", "--format", "packed", "--candidates", "int4"];
    let text = ["--group-size", "32", "--samples", "2", "--seq-len", "32", "--calibration"];
    let text = [&text[..], &["fixtures/text/calibration.txt", "--device", "cpu"]].concat();
    convert_error("budget_too_small", &[&budget[..], &text].concat());
}

#[test]
fn eval_window_of_one() {
    let text = ["--text", "fixtures/text/heldout.txt", "--window", "1"];
    let command = Command::new("eval").arg("fixtures/model").args(text);
    expect_error("eval_window_of_one", 2, &Dir::new(), command);
}

#[test]
fn verify_without_a_manifest() {
    let command = Command::new("verify").arg("fixtures/model");
    expect_error("verify_without_a_manifest", 1, &Dir::new(), command);
}

#[test]
fn unpack_of_a_plain_model() {
    let dir = Dir::new();
    let command = Command::new("unpack").arg("fixtures/model").arg("-o").arg(dir.join("out"));
    expect_error("unpack_of_a_plain_model", 1, &dir, command);
}

#[test]
fn output_finished() {
    let dir = Dir::new();
    let out = packed(&dir);
    expect_error("output_finished", 2, &dir, convert(&model(), &out).args(MAGNITUDE));
}

#[test]
fn output_of_someone_else() {
    let dir = Dir::new();
    dir.write("out/notes.txt", "mine");
    expect_error("output_of_someone_else", 2, &dir, convert(&model(), &dir.join("out")));
    assert_eq!(fs::read(dir.join("out/notes.txt")).unwrap(), b"mine");
}

#[test]
fn output_is_a_file() {
    let dir = Dir::new();
    let out = dir.write("out", "mine");
    expect_error("output_is_a_file", 2, &dir, convert(&model(), &out));
}

#[test]
fn output_is_the_input() {
    let dir = Dir::new();
    crate::harness::copy_dir(&model(), &dir.join("model"));
    let model = dir.join("model");
    expect_error("output_is_the_input", 2, &dir, convert(&model, &model));
}

#[test]
fn output_holds_the_input_file() {
    let dir = Dir::new();
    fs::copy(fixture("tiny/qwen2.gguf"), dir.join("m.gguf")).unwrap();
    let command = convert(&dir.join("m.gguf"), dir.path());
    expect_error("output_holds_the_input_file", 2, &dir, command);
}
