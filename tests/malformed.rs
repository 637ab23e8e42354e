//! Inputs that are wrong: each is refused with a message that names the place, and leaves nothing.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value};
use sparsepack_formats::DType;

use crate::harness::{
    CALIBRATION, Command, Dir, Tensor, assert_same_files, convert, copy_dir, files, fixture,
    read_tensors, write_tensors,
};

const MAGNITUDE: [&str; 4] = ["--prune", "magnitude", "--sparsity", "50%"];
const UP: &str = "model.layers.1.mlp.up_proj.weight";
const Q: &str = "model.layers.0.self_attn.q_proj.weight";

/// A model to break, in its own directory, and where its conversion would go.
struct Broken {
    dir: Dir,
    model: PathBuf,
}

impl Broken {
    fn copy(name: &str) -> Self {
        let dir = Dir::new();
        let model = dir.join("model");
        let from = fixture(name);
        if from.is_dir() {
            copy_dir(&from, &model);
        } else {
            fs::create_dir(&model).unwrap();
            fs::copy(from, model.join("model.gguf")).unwrap();
        }
        Self { dir, model }
    }

    fn tiny() -> Self {
        Self::copy("tiny/llama-gqa")
    }

    fn weights(&self) -> PathBuf {
        self.model.join("model.safetensors")
    }

    /// Expects a conversion to fail with `code`, to say all of `parts`, and to leave nothing.
    #[track_caller]
    fn refuses(&self, code: i32, args: &[&str], parts: &[&str]) {
        self.refuses_path(&self.model, code, args, parts);
    }

    #[track_caller]
    fn refuses_path(&self, model: &Path, code: i32, args: &[&str], parts: &[&str]) {
        let out = self.dir.join("out");
        let ran = convert(model, &out).args(args).fails(code);
        ran.says(&["error: "]).says(parts);
        assert_eq!(ran.stdout(), "", "{}", ran.story());
        let left: Vec<String> = files(&out).into_keys().collect();
        assert!(!out.exists(), "left behind: {left:?}\n{}", ran.story());
    }

    /// Rewrites the header of the weights, whose length may change.
    fn edit_header(&self, edit: impl FnOnce(String) -> String) {
        let bytes = fs::read(self.weights()).unwrap();
        let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header = String::from_utf8(bytes[8..8 + len].to_vec()).unwrap();
        let header = edit(header);
        let mut edited = (header.len() as u64).to_le_bytes().to_vec();
        edited.extend_from_slice(header.as_bytes());
        edited.extend_from_slice(&bytes[8 + len..]);
        fs::write(self.weights(), edited).unwrap();
    }

    /// Changes what the header says about one tensor.
    fn edit_tensor(&self, name: &str, key: &str, edit: impl FnOnce(&Value) -> Value) {
        self.edit_header(|text| {
            let mut header: Map<String, Value> = serde_json::from_str(&text).unwrap();
            let value = &mut header[name][key];
            *value = edit(value);
            serde_json::to_string(&header).unwrap()
        });
    }

    fn edit_config(&self, key: &str, value: impl Into<Value>) {
        let path = self.model.join("config.json");
        let mut config: Map<String, Value> =
            serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config.insert(key.to_owned(), value.into());
        fs::write(path, serde_json::to_vec(&config).unwrap()).unwrap();
    }

    fn edit_weights(&self, edit: impl FnOnce(&mut Vec<Tensor>)) {
        let mut tensors = read_tensors(&self.model);
        edit(&mut tensors);
        write_tensors(&self.model, &tensors);
    }

    /// Overwrites the value at `index` of an f32 tensor.
    fn poison(&self, name: &str, index: usize, value: f32) {
        self.edit_weights(|tensors| {
            let tensor = tensors.iter_mut().find(|tensor| tensor.name == name).unwrap();
            assert_eq!(tensor.dtype, DType::F32);
            tensor.bytes[index * 4..index * 4 + 4].copy_from_slice(&value.to_le_bytes());
        });
    }
}

// --- containers ---

#[test]
fn truncated_weights() {
    let broken = Broken::tiny();
    let bytes = fs::read(broken.weights()).unwrap();
    fs::write(broken.weights(), &bytes[..bytes.len() - 100]).unwrap();
    let found = format!("but the file has {} bytes", bytes.len() - 100);
    broken.refuses(1, &MAGNITUDE, &["model.safetensors: tensor `", "ends at byte", &found]);
}

#[test]
fn header_longer_than_the_file() {
    let broken = Broken::tiny();
    let mut bytes = fs::read(broken.weights()).unwrap();
    let len = bytes.len() as u64;
    bytes[..8].copy_from_slice(&len.to_le_bytes());
    fs::write(broken.weights(), bytes).unwrap();
    broken.refuses(1, &MAGNITUDE, &["model.safetensors: the header ends at byte"]);
}

#[test]
fn header_that_is_not_json() {
    let broken = Broken::tiny();
    broken.edit_header(|text| text.replacen(':', ";", 1));
    broken.refuses(1, &MAGNITUDE, &["model.safetensors: offset 23: the header is not valid: "]);
}

#[test]
fn overlapping_tensors() {
    let broken = Broken::tiny();
    broken.edit_tensor(UP, "data_offsets", |offsets| {
        let [start, end] = [0, 1].map(|i| offsets[i].as_u64().unwrap() - 4);
        serde_json::json!([start, end])
    });
    broken.refuses(1, &MAGNITUDE, &["model.safetensors: tensor `", "overlap"]);
}

#[test]
fn offsets_beyond_the_file() {
    let broken = Broken::tiny();
    broken.edit_tensor(UP, "data_offsets", |offsets| {
        let [start, end] = [0, 1].map(|i| offsets[i].as_u64().unwrap() + (1 << 30));
        serde_json::json!([start, end])
    });
    broken.refuses(1, &MAGNITUDE, &["model.safetensors", UP]);
}

#[test]
fn two_tensors_of_one_name() {
    let broken = Broken::tiny();
    let other = UP.replace(".1.", ".0.");
    broken.edit_header(|text| text.replace(&other, UP));
    broken.refuses(1, &MAGNITUDE, &["model.safetensors: tensor `", UP, "appears twice"]);
}

#[test]
fn missing_shard() {
    let broken = Broken::copy("tiny/llama-sharded");
    fs::remove_file(broken.model.join("model-00002-of-00003.safetensors")).unwrap();
    let shard = "names shard `model-00002-of-00003.safetensors`, which";
    broken.refuses(1, &MAGNITUDE, &["model.safetensors.index.json", shard]);
}

#[test]
fn truncated_gguf() {
    let broken = Broken::copy("tiny/qwen2.gguf");
    let path = broken.model.join("model.gguf");
    let bytes = fs::read(&path).unwrap();
    for keep in [10, bytes.len() / 4, bytes.len() - 1] {
        fs::write(&path, &bytes[..keep]).unwrap();
        let found = format!("but the file has {keep} bytes");
        broken.refuses_path(&path, 1, &MAGNITUDE, &["model.gguf: ", "ends at byte", &found]);
    }
}

#[test]
fn something_else_entirely() {
    let broken = Broken::tiny();
    let path = broken.dir.write("notes.txt", "not a model\n");
    broken.refuses_path(&path, 1, &[], &["notes.txt: not a checkpoint", "expected a GGUF file"]);
}

#[test]
fn empty_directory() {
    let broken = Broken::tiny();
    let path = broken.dir.join("empty");
    fs::create_dir(&path).unwrap();
    broken.refuses_path(&path, 1, &[], &["empty: not a checkpoint"]);
}

// --- models ---

#[test]
fn shape_that_the_configuration_does_not_have() {
    let broken = Broken::tiny();
    broken.edit_config("intermediate_size", 88);
    let shapes = "has shape [96, 32] (expected [88, 32] by the configuration)";
    broken.refuses(1, &MAGNITUDE, &["tensor `model.layers.0.mlp.gate_proj.weight`", shapes]);
}

#[test]
fn weights_of_integers() {
    let broken = Broken::tiny();
    broken.edit_tensor(UP, "dtype", |_| "I32".into());
    broken.refuses(1, &MAGNITUDE, &[UP, "is stored as I32 (expected F32, F16, BF16"]);
}

#[test]
fn weights_in_double_precision() {
    let broken = Broken::tiny();
    broken.edit_weights(|tensors| {
        let tensor = tensors.iter_mut().find(|tensor| tensor.name == UP).unwrap();
        tensor.dtype = DType::F64;
        tensor.bytes.extend_from_within(..);
    });
    broken.refuses(1, &MAGNITUDE, &[UP, "is stored as F64"]);
}

#[test]
fn missing_tensor() {
    let broken = Broken::tiny();
    broken.edit_weights(|tensors| tensors.retain(|tensor| tensor.name != UP));
    broken.refuses(1, &MAGNITUDE, &[UP, "is missing (expected shape [96, 32])"]);
}

#[test]
fn unsupported_architecture() {
    let broken = Broken::tiny();
    broken.edit_config("architectures", serde_json::json!(["GPT2LMHeadModel"]));
    broken.edit_config("model_type", "gpt2");
    let parts = ["unsupported architecture `GPT2LMHeadModel`; supported: ", "Llama", "OPT"];
    broken.refuses(1, &MAGNITUDE, &parts);
}

#[test]
fn missing_configuration() {
    let broken = Broken::tiny();
    fs::remove_file(broken.model.join("config.json")).unwrap();
    broken.refuses(1, &MAGNITUDE, &["not a checkpoint (a directory without config.json)"]);
}

#[test]
fn not_a_number_in_a_linear() {
    let broken = Broken::tiny();
    broken.poison(UP, 3 * 32 + 5, f32::NAN);
    broken.refuses(1, &MAGNITUDE, &[UP, "non-finite value NaN at row 3, column 5"]);
}

#[test]
fn infinity_in_the_embedding() {
    let broken = Broken::tiny();
    broken.poison("model.embed_tokens.weight", 95 * 32, f32::INFINITY);
    let parts = ["tensor `model.embed_tokens.weight`", "non-finite value inf at row 95, column 0"];
    broken.refuses(1, &MAGNITUDE, &parts);
}

#[test]
fn not_a_number_in_a_norm() {
    let broken = Broken::tiny();
    broken.poison("model.layers.1.input_layernorm.weight", 7, f32::NAN);
    let parts = ["tensor `model.layers.1.input_layernorm.weight`", "NaN at row 0, column 7"];
    broken.refuses(1, &MAGNITUDE, &parts);
}

#[test]
fn infinity_in_the_final_norm() {
    let broken = Broken::tiny();
    broken.poison("model.norm.weight", 0, f32::NEG_INFINITY);
    broken.refuses(1, &[], &["tensor `model.norm.weight`", "non-finite value -inf"]);
}

#[test]
fn value_too_large_for_the_output() {
    let broken = Broken::tiny();
    broken.poison(UP, 0, 1e30);
    broken.refuses(1, &["--dtype", "f16"], &[UP]);
}

#[test]
fn value_too_large_for_eight_bits() {
    let broken = Broken::tiny();
    broken.poison(UP, 5, 465.0);
    let args = ["--dtype", "f8_e4m3"];
    broken.refuses(1, &args, &[UP, "value 4.65e2 at index 5 is too large for F8_E4M3"]);
}

#[test]
fn eight_bit_weights_with_scales() {
    let broken = Broken::tiny();
    broken.edit_weights(|tensors| {
        let tensor = tensors.iter_mut().find(|tensor| tensor.name == UP).unwrap();
        tensor.dtype = DType::F8E4m3;
        tensor.bytes.truncate(tensor.bytes.len() / 4);
        let scales = UP.replace(".weight", ".weight_scale");
        tensors.push(Tensor::f32(scales, &[1], &[0.5]));
    });
    let scales = "with the scales `model.layers.1.mlp.up_proj.weight_scale` (expected no scales)";
    broken.refuses(1, &[], &[UP, "is F8_E4M3", scales]);
}

#[test]
fn not_a_number_in_a_matrix_that_is_scanned() {
    let broken = Broken::tiny();
    broken.poison(UP, 40, f32::NAN);
    let args = ["--format", "packed"];
    broken.refuses(1, &args, &[UP, "non-finite value NaN at row 1, column 8"]);
}

#[test]
fn group_that_does_not_fit_the_columns() {
    let broken = Broken::copy("tiny/mistral");
    let args = ["--prune", "magnitude", "--sparsity", "8:16"];
    broken.refuses(1, &args, &["model.layers.0.self_attn.q_proj", "40", "16"]);
}

// --- calibration ---

const WANDA: [&str; 8] =
    ["--prune", "wanda", "--sparsity", "2:4", "--samples", "4", "--seq-len", "64"];

#[track_caller]
fn refuses_text(text: &[u8], name: &str, parts: &[&str]) {
    let broken = Broken::copy("model");
    let path = broken.dir.write(name, text);
    let mut args = WANDA.to_vec();
    args.extend(["--calibration", path.to_str().unwrap()]);
    broken.refuses(1, &args, parts);
}

#[test]
fn calibration_too_short() {
    let parts = ["short.txt: 4 windows of 64 tokens need 256 tokens, but the text has "];
    refuses_text(b"Only a few words.", "short.txt", &parts);
}

#[test]
fn calibration_that_is_not_utf8() {
    refuses_text(b"abc\xff\xfe", "text.txt", &["text.txt: not UTF-8 at byte 3"]);
}

#[test]
fn calibration_lines_without_text() {
    let lines = b"{\"text\": \"a\"}\n{\"content\": \"b\"}\n";
    refuses_text(lines, "text.jsonl", &["text.jsonl: line 2: no string under the key `text`"]);
}

#[test]
fn missing_tokenizer() {
    let broken = Broken::copy("model");
    fs::remove_file(broken.model.join("tokenizer.json")).unwrap();
    let mut args = WANDA.to_vec();
    args.extend(["--calibration", "fixtures/text/calibration.txt"]);
    broken.refuses(1, &args, &["tokenizer.json"]);
}

#[test]
fn tokenizer_that_cannot_be_written() {
    let broken = Broken::copy("tiny/qwen2.gguf");
    let path = broken.model.join("model.gguf");
    let bytes = fs::read(&path).unwrap();
    let gpt2 = b"tokenizer.ggml.model\x08\0\0\0\x04\0\0\0\0\0\0\0gpt2";
    let at = bytes.windows(gpt2.len()).position(|window| window == gpt2).unwrap();
    let mut edited = bytes.clone();
    edited[at + gpt2.len() - 4..at + gpt2.len()].copy_from_slice(b"bert");
    fs::write(&path, edited).unwrap();
    broken.refuses_path(&path, 1, &MAGNITUDE, &["bert"]);
}

#[test]
fn broken_inputs_fail_every_command_alike() {
    let broken = Broken::tiny();
    let bytes = fs::read(broken.weights()).unwrap();
    fs::write(broken.weights(), &bytes[..bytes.len() / 2]).unwrap();
    let text = ["--text", "fixtures/text/heldout.txt"];
    for (command, args) in [("inspect", &[][..]), ("plan", &MAGNITUDE[..]), ("eval", &text[..])] {
        Command::new(command)
            .arg(&broken.model)
            .args(args.iter().copied())
            .fails(1)
            .says(&["ends at byte"]);
    }
}

// --- limits of the machine ---

#[test]
fn little_memory_gives_the_same_bytes() {
    let dir = Dir::new();
    let (plenty, little) = (dir.join("plenty"), dir.join("little"));
    let mut args = WANDA.to_vec();
    args[1] = "sparsegpt";
    args.extend(["--calibration", "fixtures/text/calibration.txt"]);
    let model = fixture("model");
    convert(&model, &plenty).args(&args).succeeds();
    let spilled = convert(&model, &little).args(&args).args(["--memory", "1MiB"]).succeeds();
    spilled.says(&["go to a temporary file"]);
    assert_same_files(&plenty, &little);
}

/// A small file system of its own.
pub(crate) struct SmallDisk(Dir);

impl SmallDisk {
    /// Mounts one, or says why not.
    pub(crate) fn mount(bytes: u64) -> Option<Self> {
        let dir = Dir::new();
        let size = format!("size={bytes}");
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "tmpfs"])
            .arg(dir.path())
            .output();
        if mounted.is_ok_and(|output| output.status.success()) {
            return Some(Self(dir));
        }
        println!("skipped: a tmpfs cannot be mounted here");
        None
    }

    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(self.0.path()).status();
    }
}

#[test]
fn full_disk_is_noticed_before_work_starts() {
    let Some(disk) = SmallDisk::mount(1 << 20) else { return };
    let out = disk.join("out");
    let ran = convert(&fixture("model"), &out).args(MAGNITUDE).fails(1);
    ran.says(&["bytes are needed but only 1048576 are free", out.to_str().unwrap()]);
    assert!(!out.exists());
}

#[test]
fn weights_that_overflow_when_solved() {
    let broken = Broken::copy("model");
    broken.edit_weights(|tensors| {
        let tensor = tensors.iter_mut().find(|tensor| tensor.name == Q).unwrap();
        let cols = tensor.shape[1];
        let huge = half::bf16::from_f32(3e38).to_le_bytes().repeat(cols);
        tensor.bytes[3 * 2 * cols..][..2 * cols].copy_from_slice(&huge);
    });
    let args: Vec<&str> =
        ["--prune", "sparsegpt", "--sparsity", "2:4"].into_iter().chain(CALIBRATION).collect();
    let solved = "1 rows have NaN or infinite weights after solving";
    broken.refuses(1, &args, &["model.layers.0.self_attn.q_proj", solved]);
}
