//! Peak memory: one block and the activations, whatever the depth of the model; a few rows where
//! nothing is computed.

use std::{fs, path::Path};

use sparsepack_formats::{DType, Encoding, SafetensorsWriter, ShardLayout};

use crate::harness::{Command, Dir, Tensor, convert, noise, write_llama_config, write_tensors};

const HIDDEN: usize = 512;
const MLP: usize = 1536;
const VOCAB: usize = 1024;
const HEADS: usize = 8;

/// A random Llama with the vocabulary of the fixture model, so that its tokenizer fits.
fn write_model(dir: &Path, blocks: usize) {
    let mut tensors = Vec::new();
    let mut add = |name: String, shape: &[usize]| {
        let seed = tensors.len() as u64 + 1;
        let count = shape.iter().product();
        let values = match shape {
            [_] => vec![1.0; count],
            _ => noise(seed, count)
                .iter()
                .map(|value| value * 2.0 / (HIDDEN as f32).sqrt())
                .collect(),
        };
        tensors.push(Tensor::f32(name, shape, &values));
    };
    add("model.embed_tokens.weight".to_owned(), &[VOCAB, HIDDEN]);
    for block in 0..blocks {
        let mut layer = |name: &str, shape: &[usize]| {
            add(format!("model.layers.{block}.{name}.weight"), shape);
        };
        layer("input_layernorm", &[HIDDEN]);
        for name in ["q_proj", "k_proj", "v_proj", "o_proj"] {
            layer(&format!("self_attn.{name}"), &[HIDDEN, HIDDEN]);
        }
        layer("post_attention_layernorm", &[HIDDEN]);
        layer("mlp.gate_proj", &[MLP, HIDDEN]);
        layer("mlp.up_proj", &[MLP, HIDDEN]);
        layer("mlp.down_proj", &[HIDDEN, MLP]);
    }
    add("model.norm.weight".to_owned(), &[HIDDEN]);
    write_tensors(dir, &tensors);
    write_llama_config(
        dir,
        serde_json::json!({
            "hidden_size": HIDDEN,
            "intermediate_size": MLP,
            "num_hidden_layers": blocks,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "vocab_size": VOCAB,
        }),
    );
}

const ARGS: [&str; 10] = [
    "--prune",
    "sparsegpt",
    "--sparsity",
    "2:4",
    "--samples",
    "64",
    "--seq-len",
    "256",
    "--calibration",
    "fixtures/text/calibration.txt",
];

/// Over the plan: what the allocator keeps and the products' own buffers.
const MOST_EXCESS: f64 = 1.3;

struct Peaks {
    measured: f64,
    planned: f64,
}

fn peaks(dir: &Dir, blocks: usize) -> Peaks {
    let model = dir.join(&format!("model-{blocks}"));
    write_model(&model, blocks);
    let plan = Command::new("plan").arg(&model).args(ARGS).arg("--json").succeeds().json();
    let out = dir.join(&format!("out-{blocks}"));
    let report = convert(&model, &out).args(ARGS).arg("--json").succeeds().json();
    fs::remove_dir_all(&model).unwrap();
    fs::remove_dir_all(&out).unwrap();
    let peaks = Peaks {
        measured: report["peak_rss_bytes"].as_f64().unwrap(),
        planned: plan["budget"]["peak_bytes"].as_f64().unwrap(),
    };
    let (measured, planned) = (peaks.measured / 1e6, peaks.planned / 1e6);
    println!("{blocks} blocks: peak {measured:.1} MB, planned {planned:.1} MB");
    peaks
}

#[test]
fn peak_memory_does_not_grow_with_depth_and_is_planned() {
    let dir = Dir::new();
    let (shallow, deep) = (peaks(&dir, 3), peaks(&dir, 12));
    let growth = deep.measured / shallow.measured;
    assert!(growth < 1.1, "12 blocks take {growth:.2} times the memory of 3");
    let excess = deep.measured / deep.planned;
    assert!(excess < MOST_EXCESS, "peak memory is {excess:.2} times what was planned");
}

/// Features of a wide MLP: each of its two matrices takes [`WIDE_BYTES`] in bf16.
const WIDE: usize = 700_000;
const NARROW: usize = 192;
const WIDE_BYTES: usize = WIDE * NARROW * 2;

/// The most that a conversion may take that only repacks, whatever the size of the model.
const MOST_STREAMING: usize = 200_000_000;

/// An OPT of one block whose two MLP matrices are large: holes in a sparse file, but for some rows.
fn write_wide_model(dir: &Path) {
    let matrices = [
        ("embed_tokens.weight", vec![VOCAB, NARROW]),
        ("embed_positions.weight", vec![34, NARROW]),
        ("layers.0.self_attn.q_proj.weight", vec![NARROW, NARROW]),
        ("layers.0.self_attn.k_proj.weight", vec![NARROW, NARROW]),
        ("layers.0.self_attn.v_proj.weight", vec![NARROW, NARROW]),
        ("layers.0.self_attn.out_proj.weight", vec![NARROW, NARROW]),
        ("layers.0.fc1.weight", vec![WIDE, NARROW]),
        ("layers.0.fc2.weight", vec![NARROW, WIDE]),
        ("layers.0.self_attn_layer_norm.weight", vec![NARROW]),
        ("layers.0.self_attn_layer_norm.bias", vec![NARROW]),
        ("layers.0.final_layer_norm.weight", vec![NARROW]),
        ("layers.0.final_layer_norm.bias", vec![NARROW]),
        ("final_layer_norm.weight", vec![NARROW]),
        ("final_layer_norm.bias", vec![NARROW]),
    ];
    let encoding = Encoding::Dense { dtype: DType::Bf16 };
    let tensors = matrices.map(|(name, shape)| (format!("model.decoder.{name}"), encoding, shape));
    let layout = ShardLayout { tensors: tensors.into(), ..ShardLayout::default() };
    fs::create_dir_all(dir).unwrap();
    let mut writer = SafetensorsWriter::create(dir, &[layout]).unwrap();
    // Whole rows of ones and whole rows of zeros: no pattern but a mask.
    let some: Vec<u8> = [0x80, 0x3F].repeat(WIDE / 16 * NARROW);
    writer.write("model.decoder.layers.0.fc1.weight", 0, &some).unwrap();
    // What is not written reads as zeros; the file has its full size from the start.
    drop(writer);
    fs::rename(dir.join("model.safetensors.part"), dir.join("model.safetensors")).unwrap();
    let config = serde_json::json!({
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "hidden_size": NARROW,
        "word_embed_proj_dim": NARROW,
        "ffn_dim": WIDE,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 32,
        "enable_bias": false,
        "do_layer_norm_before": true,
        "activation_function": "relu",
        "tie_word_embeddings": true,
        "torch_dtype": "bfloat16",
    });
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
}

#[test]
fn a_repack_streams_whatever_the_size_of_a_matrix() {
    const { assert!(WIDE_BYTES > MOST_STREAMING + MOST_STREAMING / 4) };
    let dir = Dir::new();
    let (model, out) = (dir.join("model"), dir.join("out"));
    write_wide_model(&model);
    let args = ["--format", "packed", "--json"];
    let report = convert(&model, &out).args(args).succeeds().json();
    let peak = report["peak_rss_bytes"].as_u64().unwrap();
    println!("two matrices of {} MB: peak {} MB", WIDE_BYTES / 1_000_000, peak / 1_000_000);
    assert!(peak < MOST_STREAMING as u64, "peak memory is {peak} bytes");
    let reader = sparsepack_formats::open(&out).unwrap();
    let info = reader.tensors().get("model.decoder.layers.0.fc1.weight").unwrap();
    let kept = WIDE / 16 * NARROW;
    let bitmask = Encoding::Bitmask { dtype: DType::Bf16, kept: kept as u64 };
    assert_eq!(info.encoding, bitmask);
}
