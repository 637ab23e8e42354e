//! Conversions on a GPU against the same on the CPU, and what happens when the GPU fails.
//!
//! Without `SPARSEPACK_REQUIRE_GPU=1` the GPU is the software device of `tests/software_gpu`, built once
//! for all tests; with it, the machine's.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    sync::OnceLock,
};

use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use crate::harness::{
    Command, Dir, KERNEL_CACHE, Ran, Tensor, assert_resumes, assert_same_files, checkpoints,
    convert, files, fixture, kill_when, noise, root, write_llama_config, write_tensors,
};

const TEXT: [&str; 2] = ["--calibration", "fixtures/text/calibration.txt"];
/// Windows enough for GPU and CPU to find nearly the same masks.
const CALIBRATION: [&str; 4] = ["--samples", "32", "--seq-len", "128"];
const SPARSEGPT: [&str; 4] = ["--prune", "sparsegpt", "--sparsity", "2:4"];

/// Whether tests shall run on the machine's own GPU.
fn real() -> bool {
    std::env::var_os("SPARSEPACK_REQUIRE_GPU").is_some()
}

/// The folder of the software device.
fn software() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("software_gpu");
        let script = root().join("tests/software_gpu/build.sh");
        let build = std::process::Command::new(script).arg(&out).stdin(Stdio::null()).output();
        let build = build.unwrap();
        assert!(build.status.success(), "{}", String::from_utf8_lossy(&build.stderr));
        out
    })
}

/// `command` where a GPU is to be found.
fn on_gpu(command: Command) -> Command {
    let command = command.env_remove("CUDA_VISIBLE_DEVICES");
    if real() { command } else { command.env("LD_LIBRARY_PATH", software()) }
}

/// A conversion of the fixture model on a GPU.
fn gpu(out: &Path, args: &[&str]) -> Command {
    on_gpu(convert(&fixture("model"), out)).args(TEXT).args(CALIBRATION).args(args).args(GPU)
}

/// A conversion that takes the software device a few seconds.
fn light(out: &Path) -> Command {
    let args = ["--prune", "wanda", "--sparsity", "2:4", "--samples", "4", "--seq-len", "64"];
    on_gpu(convert(&fixture("model"), out)).args(TEXT).args(args).args(GPU)
}

/// Launches after which [`light`] is in one of the middle blocks.
const LOST_AFTER: &str = "150";

const GPU: [&str; 2] = ["--device", "cuda:0"];

fn cpu(out: &Path, args: &[&str]) -> Command {
    convert(&fixture("model"), out).args(TEXT).args(CALIBRATION).args(args)
}

/// Perplexity on the CPU, in f32.
fn perplexity(model: &Path) -> f64 {
    let args = ["--text", "fixtures/text/heldout.txt", "--window", "128", "--compute", "f32"];
    let eval = Command::new("eval").arg(model).args(args).args(["--max-windows", "32", "--json"]);
    eval.succeeds().json()["perplexity"].as_f64().unwrap()
}

/// The weights of a linear in a plain output, as bf16 bits.
fn weights(out: &Path, name: &str) -> Vec<u16> {
    let bytes = std::fs::read(out.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let data = tensors.tensor(name).unwrap().data();
    data.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])).collect()
}

/// The share of weights that are zero in one and not in the other.
fn masks_differ(a: &Path, b: &Path, name: &str) -> f64 {
    let (a, b) = (weights(a, name), weights(b, name));
    let zero = |bits: u16| bits << 1 == 0;
    let differ = a.iter().zip(&b).filter(|(a, b)| zero(**a) != zero(**b)).count();
    differ as f64 / a.len() as f64
}

/// Both conversions, and the ratio of their perplexities.
fn both(dir: &Dir, args: &[&str]) -> (PathBuf, PathBuf, f64) {
    let (on_gpu, on_cpu) = (dir.join("gpu"), dir.join("cpu"));
    let ran = gpu(&on_gpu, args).succeeds();
    assert!(real() || ran.stdout().contains("Software GPU"), "{}", ran.story());
    cpu(&on_cpu, args).succeeds();
    let ratio = perplexity(&on_gpu) / perplexity(&on_cpu);
    println!("{args:?}: perplexity on the GPU is {ratio:.4} of that on the CPU");
    (on_gpu, on_cpu, ratio)
}

#[test]
fn sparsegpt_agrees_with_the_cpu() {
    for (compute, tolerance) in [("f32", 0.005), ("bf16", 0.01)] {
        let dir = Dir::new();
        let args: Vec<&str> = SPARSEGPT.into_iter().chain(["--compute", compute]).collect();
        let (a, b, ratio) = both(&dir, &args);
        // Nothing but rounding has gone before the first layers; later ones see what came of ties.
        for linear in ["q_proj", "k_proj", "v_proj"] {
            let name = format!("model.layers.0.self_attn.{linear}.weight");
            let differ = masks_differ(&a, &b, &name);
            assert!(differ <= 0.001, "{compute}: {name}: {differ}");
        }
        assert!((ratio - 1.0).abs() < tolerance, "{compute}: {ratio}");
    }
}

#[test]
fn unstructured_sparsegpt_agrees_with_the_cpu() {
    let dir = Dir::new();
    let (a, b, ratio) =
        both(&dir, &["--prune", "sparsegpt", "--sparsity", "50%", "--compute", "f32"]);
    let differ = masks_differ(&a, &b, "model.layers.0.self_attn.q_proj.weight");
    assert!(differ <= 0.001, "{differ}");
    assert!((ratio - 1.0).abs() < 0.005, "{ratio}");
}

#[test]
fn magnitude_equals_the_cpu() {
    let dir = Dir::new();
    let args = ["--prune", "magnitude", "--sparsity", "50%"];
    let (a, b) = (dir.join("gpu"), dir.join("cpu"));
    on_gpu(convert(&fixture("model"), &a)).args(args).args(GPU).succeeds();
    convert(&fixture("model"), &b).args(args).succeeds();
    let model = |out: &Path| std::fs::read(out.join("model.safetensors")).unwrap();
    assert!(model(&a) == model(&b), "bytes differ");
}

#[test]
fn wanda_agrees_with_the_cpu() {
    let dir = Dir::new();
    let (a, b, ratio) = both(&dir, &["--prune", "wanda", "--sparsity", "50%", "--compute", "f32"]);
    let differ = masks_differ(&a, &b, "model.layers.0.self_attn.q_proj.weight");
    assert!(differ <= 0.001, "{differ}");
    assert!((ratio - 1.0).abs() < 0.005, "{ratio}");
}

#[test]
fn rounding_agrees_with_the_cpu() {
    let minmax = ["--scales", "minmax", "--act-order=false"];
    let cases: [&[&str]; 4] = [
        &["--quantize", "int4", "--group-size", "32"],
        &["--quantize", "int4", "--group-size", "32", "--act-order=false"],
        &[&["--quantize", "int4", "--group-size", "64"][..], &minmax].concat(),
        &["--quantize", "int8", "--prune", "sparsegpt", "--sparsity", "2:4"],
    ];
    for case in cases {
        let dir = Dir::new();
        let args: Vec<&str> =
            case.iter().copied().chain(["--compute", "f32", "--format", "packed"]).collect();
        let (_, _, ratio) = both(&dir, &args);
        assert!((ratio - 1.0).abs() < 0.01, "{args:?}: {ratio}");
    }
}

/// The size of a dimension whose rows hold whole blocks of K types.
fn wide(size: usize) -> usize {
    match size {
        384 => 512,
        // The vocabulary.
        1024 => 1024,
        _ => 2 * size,
    }
}

/// The fixture model with features, heads and MLP features of zeros, so that it computes the same: the mean
/// square that a norm divides by is half of what it was, which gains and epsilon make up for.
fn write_wide_model(dir: &Dir) -> PathBuf {
    let bytes = std::fs::read(fixture("model/model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let widened = tensors.iter().map(|(name, tensor)| {
        let values: Vec<u16> = tensor
            .data()
            .chunks_exact(2)
            .map(|pair| u16::from_le_bytes([pair[0], pair[1]]))
            .collect();
        let shape: Vec<usize> = tensor.shape().iter().copied().map(wide).collect();
        let (dtype, data) = if let &[rows, cols] = tensor.shape() {
            let mut data = vec![0u16; shape[0] * shape[1]];
            for row in 0..rows {
                data[row * shape[1]..][..cols].copy_from_slice(&values[row * cols..][..cols]);
            }
            (Dtype::BF16, data.into_iter().flat_map(u16::to_le_bytes).collect::<Vec<u8>>())
        } else {
            let gain = |bits: &u16| f32::from_bits(u32::from(*bits) << 16) * 0.5f32.sqrt();
            let mut gains: Vec<f32> = values.iter().map(gain).collect();
            gains.resize(shape[0], 0.0);
            (Dtype::F32, gains.into_iter().flat_map(f32::to_le_bytes).collect())
        };
        (name.to_owned(), (dtype, shape, data))
    });
    let widened: Vec<_> = widened.collect();
    let views = widened.iter().map(|(name, (dtype, shape, data))| {
        (name.as_str(), TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    dir.write("wide/model.safetensors", safetensors::serialize(views, None).unwrap());
    let config = std::fs::read(fixture("model/config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    for key in ["hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"] {
        config[key] = wide(config[key].as_u64().unwrap() as usize).into();
    }
    config["rms_norm_eps"] = (config["rms_norm_eps"].as_f64().unwrap() / 2.0).into();
    dir.write("wide/config.json", config.to_string());
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        dir.write(&format!("wide/{name}"), std::fs::read(fixture("model").join(name)).unwrap());
    }
    dir.join("wide")
}

#[test]
fn blocks_with_scales_of_scales_agree_with_the_cpu() {
    let dir = Dir::new();
    let model = write_wide_model(&dir);
    let case = ["--quantize", "q4_k", "--act-order=false", "--format", "gguf", "--compute", "f32"];
    let calibration = ["--samples", "8", "--seq-len", "64"];
    let run = |out| convert(&model, out).args(TEXT).args(calibration).args(case);
    let (a, b) = (dir.join("gpu"), dir.join("cpu"));
    on_gpu(run(&a)).args(GPU).succeeds();
    let ran = run(&b).succeeds();
    assert!(ran.stdout().contains("(4.500 bits a weight)"), "{}", ran.story());
    let ratio = perplexity(&a) / perplexity(&b);
    println!("perplexity on the GPU is {ratio:.4} of that on the CPU");
    assert!((ratio - 1.0).abs() < 0.01, "{ratio}");
}

#[test]
fn slicing_agrees_with_the_cpu() {
    let dir = Dir::new();
    let args = ["--slice-width", "96", "--slice-multiple", "32", "--compute", "f32"];
    let (_, _, ratio) = both(&dir, &args);
    assert!((ratio - 1.0).abs() < 0.005, "{ratio}");
}

#[test]
fn perplexity_agrees_with_the_cpu() {
    let args = ["--text", "fixtures/text/heldout.txt", "--window", "128", "--max-windows", "8"];
    for (compute, tolerance) in [("f32", 1e-5), ("bf16", 2e-3)] {
        let eval = || Command::new("eval").arg(fixture("model")).args(args);
        let eval = || eval().args(["--compute", compute, "--json"]);
        let perplexity = |command: Command| command.succeeds().json()["perplexity"].as_f64();
        let on_cpu = perplexity(eval()).unwrap();
        let on_gpu = perplexity(on_gpu(eval()).args(GPU)).unwrap();
        assert!((on_gpu / on_cpu - 1.0).abs() < tolerance, "{compute}: {on_gpu} for {on_cpu}");
    }
}

/// Of the planned memory of a device, what is for code and workspaces of NVIDIA's libraries. The software
/// device's need none.
const LIBRARIES: u64 = 512 << 20;

#[test]
fn what_is_planned_is_enough_and_activations_that_do_not_fit_go_to_the_host() {
    if real() {
        println!("skipped: the device's memory cannot be set");
        return;
    }
    for sequential in ["true", "block"] {
        let samples = ["--samples", "16", "--seq-len", "64", "--sequential", sequential];
        planned_is_enough(&[&SPARSEGPT[..], &TEXT, &samples].concat());
    }
}

fn planned_is_enough(args: &[&str]) {
    let dir = Dir::new();
    let plan = Command::new("plan").arg(fixture("model")).args(args).arg("--json");
    let budget = &plan.succeeds().json()["budget"];
    let planned = |name: &str| budget[name].as_u64().unwrap();
    let run = |name: &str, bytes: u64| {
        let out = dir.join(name);
        let convert = on_gpu(convert(&fixture("model"), &out)).args(args).args(GPU);
        convert.env("SOFTWARE_GPU_MEMORY", bytes.to_string()).succeeds();
        out
    };
    let (need, hidden) = (planned("device_bytes"), planned("hidden_bytes"));
    let ample = run("ample", need + 2 * hidden);
    assert_same_files(&ample, &run("some", need + hidden / 2));
    assert_same_files(&ample, &run("none", need - LIBRARIES));
}

#[test]
fn a_killed_run_on_a_gpu_goes_on_to_the_same_bytes() {
    let dir = Dir::new();
    let (whole, out) = (dir.join("whole"), dir.join("out"));
    light(&whole).succeeds();
    let run = || light(&out).args(["--checkpoint-secs", "0"]);
    kill_when(run(), &out, || checkpoints(&out) >= 1);
    assert_resumes(run(), &out, &whole);
}

#[test]
fn a_gpu_that_is_lost_ends_the_run_and_another_goes_on() {
    if real() {
        println!("skipped: the device cannot be lost on purpose");
        return;
    }
    let dir = Dir::new();
    let (whole, out) = (dir.join("whole"), dir.join("out"));
    light(&whole).succeeds();
    let run = || light(&out).args(["--checkpoint-secs", "0"]);
    let ran = run().env("SOFTWARE_GPU_LOST_AFTER", LOST_AFTER).fails(1);
    ran.says(&["Software GPU", "ECC"]);
    assert!(!out.join("manifest.json").exists());
    assert!((1..4).contains(&checkpoints(&out)), "{} checkpoints", checkpoints(&out));
    assert_resumes(run(), &out, &whole);
}

#[test]
fn too_little_memory_is_named() {
    if real() {
        println!("skipped: the device's memory cannot be set");
        return;
    }
    let dir = Dir::new();
    let ran = gpu(&dir.join("out"), &SPARSEGPT).env("SOFTWARE_GPU_MEMORY", "1000000").fails(1);
    ran.says(&["Software GPU", "bytes for", "of 1000000 bytes are free", "--device cpu"]);
}

/// The lines of a log that have `word`.
fn logged<'a>(ran: &'a Ran, word: &str) -> Vec<&'a str> {
    ran.stderr().lines().filter(|line| line.contains(word)).collect()
}

const COMPILED: &str = "DEBUG compiled ";

#[test]
fn kernels_are_compiled_once() {
    let dir = Dir::new();
    let cache = dir.join("cache");
    let run = |out: &str| light(&dir.join(out)).arg("-v").env(KERNEL_CACHE, &cache).succeeds();
    let first = run("first");
    let kept = files(&cache);
    let compiled = logged(&first, COMPILED);
    assert!(compiled.len() > 5, "{}", first.story());
    assert_eq!(compiled.len(), kept.len(), "{:?}", kept.keys());

    let second = run("second");
    assert_eq!(logged(&second, COMPILED), [""; 0]);
    assert_eq!(logged(&second, "was compiled before").len(), compiled.len());
    assert_same_files(&dir.join("first"), &dir.join("second"));

    let damaged = cache.join(kept.keys().next().unwrap());
    std::fs::write(&damaged, "not machine code").unwrap();
    let third = run("third");
    third.says(&["kernels are compiled again: it is damaged"]);
    assert_eq!(logged(&third, COMPILED).len(), 1, "{}", third.story());
    assert!(std::fs::metadata(&damaged).unwrap().len() > 32, "it is not replaced");
}

#[test]
fn no_kernels_are_kept_if_that_is_off_or_where_others_may_write() {
    use std::os::unix::fs::PermissionsExt;
    let dir = Dir::new();
    // What would be the user's cache.
    let home = dir.join("home");
    std::fs::create_dir(&home).unwrap();
    let run = |out: &str, setting: &str| {
        let run = light(&dir.join(out)).arg("-v").env(KERNEL_CACHE, setting);
        run.env("HOME", &home).env("XDG_CACHE_HOME", home.join("xdg")).succeeds()
    };
    assert!(logged(&run("off", "off"), COMPILED).len() > 5);
    assert_eq!(files(&home).len(), 0);

    let exposed = dir.join("exposed");
    std::fs::create_dir(&exposed).unwrap();
    std::fs::set_permissions(&exposed, PermissionsExt::from_mode(0o777)).unwrap();
    let ran = run("exposed-out", exposed.to_str().unwrap());
    ran.says(&["WARN compiled kernels are not kept", "others may write to it; mode 777"]);
    assert!(files(&exposed).is_empty() && files(&home).is_empty());

    run("of-user", "");
    let kept = files(&home);
    assert!(kept.len() > 5, "{:?}", kept.keys());
    assert!(
        kept.keys().all(|name| name.starts_with("xdg/sparsepack/kernels/")),
        "{:?}",
        kept.keys()
    );
}

/// A Llama of one block whose one head has `head_dim` columns, with the vocabulary of the fixture model.
fn write_model(dir: &Path, head_dim: usize) {
    const HIDDEN: usize = 128;
    const MLP: usize = 128;
    const VOCAB: usize = 1024;
    let layer = |name: &str| format!("model.layers.0.{name}.weight");
    let shapes = [
        ("model.embed_tokens.weight".to_owned(), vec![VOCAB, HIDDEN]),
        (layer("input_layernorm"), vec![HIDDEN]),
        (layer("self_attn.q_proj"), vec![head_dim, HIDDEN]),
        (layer("self_attn.k_proj"), vec![head_dim, HIDDEN]),
        (layer("self_attn.v_proj"), vec![head_dim, HIDDEN]),
        (layer("self_attn.o_proj"), vec![HIDDEN, head_dim]),
        (layer("post_attention_layernorm"), vec![HIDDEN]),
        (layer("mlp.gate_proj"), vec![MLP, HIDDEN]),
        (layer("mlp.up_proj"), vec![MLP, HIDDEN]),
        (layer("mlp.down_proj"), vec![HIDDEN, MLP]),
        ("model.norm.weight".to_owned(), vec![HIDDEN]),
    ];
    let tensors = shapes.iter().zip(1..).map(|((name, shape), seed)| {
        Tensor::f32(name, shape, &noise(seed, shape.iter().product()))
    });
    write_tensors(dir, &tensors.collect::<Vec<_>>());
    write_llama_config(
        dir,
        serde_json::json!({
            "hidden_size": HIDDEN,
            "intermediate_size": MLP,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": head_dim,
            "vocab_size": VOCAB,
        }),
    );
}

#[test]
fn heads_that_are_too_wide_are_refused_at_the_start() {
    let dir = Dir::new();
    let (model, out) = (dir.join("model"), dir.join("out"));
    write_model(&model, 512);
    let too_wide =
        "heads of 512 columns; the GPU's kernels have at most 256, --device cpu has no limit";
    let calibration = ["--samples", "2", "--seq-len", "32"];
    let convert = |args: &[&str]| {
        let run = on_gpu(convert(&model, &out)).args(TEXT).args(calibration).args(args);
        run.args(["-v", "--compute", "f32"])
    };
    let slice = ["--slice-width", "16", "--slice-multiple", "16"];
    let fit = ["--target-bits", "4", "--format", "packed"];
    for args in [SPARSEGPT.as_slice(), &slice, &fit] {
        let ran = convert(args).args(GPU).fails(1);
        ran.says(&[too_wide]);
        // Nothing was launched, so no kernel was compiled.
        assert_eq!(logged(&ran, COMPILED), [""; 0], "{}", ran.story());
        assert!(
            !out.exists() || files(&out).is_empty(),
            "{args:?} leaves {:?}",
            files(&out).keys()
        );
    }
    let eval = Command::new("eval").arg(&model).args(["--text", "fixtures/text/heldout.txt"]);
    let ran = on_gpu(eval.args(["-v", "--window", "32", "--max-windows", "2"])).args(GPU).fails(1);
    ran.says(&[too_wide]);
    assert_eq!(logged(&ran, COMPILED), [""; 0], "{}", ran.story());

    // What runs no block takes any head, and so does the CPU.
    let magnitude = ["--prune", "magnitude", "--sparsity", "50%"];
    let ran = on_gpu(self::convert(&model, &dir.join("magnitude"))).args(magnitude).args(GPU);
    ran.succeeds();
    convert(&SPARSEGPT).args(["--device", "cpu"]).succeeds();
}

#[test]
fn devices_that_are_not_there_are_named() {
    let dir = Dir::new();
    let magnitude = ["--prune", "magnitude", "--sparsity", "50%"];
    let convert = |out: &str| on_gpu(convert(&fixture("model"), &dir.join(out))).args(magnitude);
    let on = |device: &str| convert("out").args(["--device", device]);
    on("cuda:77").fails(1).says(&["no CUDA device 77", "counted from 0"]);
    on("cuda:x").fails(2).says(&["expected auto, cpu or cuda:N, found \"cuda:x\""]);
    if real() {
        return;
    }
    on("cuda:0").env("SOFTWARE_GPU_COUNT", "0").fails(1).says(&["the driver sees no device"]);
    let old = on("cuda:0").env("SOFTWARE_GPU_DRIVER_VERSION", "11080").fails(1);
    old.says(&["no CUDA device 0: the driver is for CUDA 11.8; 12.0 or newer is needed"]);
    let auto = on("auto").env("SOFTWARE_GPU_COUNT", "0").succeeds();
    auto.says(&["computing on the CPU: no CUDA device 0: the driver sees no device"]);
    convert("gpu").succeeds().says(&["computing on cuda:0, Software GPU"]);
}

#[test]
fn missing_libraries_are_named() {
    if real() {
        println!("skipped: the machine's libraries are not to be taken away");
        return;
    }
    let dir = Dir::new();
    let out = dir.join("out");
    let run = |libraries: &Path| {
        convert(&fixture("model"), &out)
            .args(["--prune", "magnitude", "--sparsity", "50%"])
            .args(GPU)
            .env("LD_LIBRARY_PATH", libraries)
    };
    run(dir.path()).fails(1).says(&["no CUDA device 0", "libcuda is not to be found"]);
    let rest = [("libcuda.so.1", "libnvrtc"), ("libnvrtc.so", "libcublas")];
    for (library, missing) in rest.into_iter().chain([("libcublas.so", "libcusolver")]) {
        std::os::unix::fs::symlink(software().join("libsoftware_gpu.so"), dir.join(library))
            .unwrap();
        run(dir.path()).fails(1).says(&[missing, "is not to be found"]);
    }
}
