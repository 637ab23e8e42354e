//! Temporary directories, the binary, and assertions that show what the binary said.

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    fs,
    path::{Path, PathBuf},
    process::{Child, Output, Stdio},
    sync::LazyLock,
    thread::sleep,
    time::{Duration, Instant},
};

use serde_json::Value;
use sparsepack_formats::{DType, Encoding, SafetensorsWriter, ShardLayout};

/// Windows enough for a Hessian that is worth inverting, few enough to be quick.
pub(crate) const CALIBRATION: [&str; 6] =
    ["--calibration", "fixtures/text/calibration.txt", "--samples", "4", "--seq-len", "64"];

/// Names the directory that compiled kernels are kept in.
pub(crate) const KERNEL_CACHE: &str = "SPARSEPACK_KERNEL_CACHE";

/// A directory that goes away with the test.
pub(crate) struct Dir(tempfile::TempDir);

impl Dir {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes a file and returns its path.
    pub(crate) fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    }
}

/// The root of the repository: where cargo says it is now, since tests may run on another machine than
/// they were built on (`.ci/gpu`), else where it was.
pub(crate) fn root() -> &'static Path {
    static ROOT: LazyLock<PathBuf> = LazyLock::new(|| {
        std::env::var_os("CARGO_MANIFEST_DIR")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from)
    });
    &ROOT
}

/// The program, found in the same way.
fn program() -> OsString {
    std::env::var_os("CARGO_BIN_EXE_sparsepack")
        .unwrap_or_else(|| env!("CARGO_BIN_EXE_sparsepack").into())
}

pub(crate) fn fixture(name: &str) -> PathBuf {
    root().join("fixtures").join(name)
}

/// Copies the files of one directory.
pub(crate) fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// Every file below `dir`, by its relative name.
pub(crate) fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    fn walk(dir: &Path, prefix: &str, found: &mut BTreeMap<String, Vec<u8>>) {
        let Ok(entries) = fs::read_dir(dir) else { return };
        for entry in entries {
            let entry = entry.unwrap();
            let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
            if entry.path().is_dir() {
                walk(&entry.path(), &format!("{name}/"), found);
            } else {
                found.insert(name, fs::read(entry.path()).unwrap());
            }
        }
    }
    let mut found = BTreeMap::new();
    walk(dir, "", &mut found);
    found
}

/// Fails, naming the first file that differs, unless both directories hold the same bytes.
#[track_caller]
pub(crate) fn assert_same_files(left: &Path, right: &Path) {
    assert_same_files_but(left, right, &[]);
}

/// As [`assert_same_files`] without looking at some files.
#[track_caller]
pub(crate) fn assert_same_files_but(left: &Path, right: &Path, but: &[&str]) {
    let (mut left, mut right) = (files(left), files(right));
    for name in but {
        left.remove(*name);
        right.remove(*name);
    }
    assert_eq!(left.keys().collect::<Vec<_>>(), right.keys().collect::<Vec<_>>());
    for (name, bytes) in &left {
        assert!(bytes == &right[name], "{name} differs");
    }
}

/// The binary with its arguments, run in the root of the repository.
pub(crate) struct Command(std::process::Command);

impl Command {
    pub(crate) fn new(name: &str) -> Self {
        let mut command = std::process::Command::new(program());
        // Tests mean the CPU, also where there is a GPU, unless they say otherwise.
        command.arg(name).current_dir(root()).stdin(Stdio::null()).env("CUDA_VISIBLE_DEVICES", "");
        // Nor do they touch the user's files; `.ci/gpu` names a directory for all of them.
        if std::env::var_os(KERNEL_CACHE).is_none() {
            command.env(KERNEL_CACHE, "off");
        }
        Self(command)
    }

    pub(crate) fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.0.arg(arg);
        self
    }

    pub(crate) fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.0.args(args);
        self
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.0.env(name, value);
        self
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn env_remove(mut self, name: &str) -> Self {
        self.0.env_remove(name);
        self
    }

    pub(crate) fn spawn(mut self) -> Child {
        self.0.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    pub(crate) fn run(mut self) -> Ran {
        let output = self.0.output().unwrap();
        Ran { command: format!("{:?}", self.0), output }
    }

    /// Runs it and expects exit code 0.
    #[track_caller]
    pub(crate) fn succeeds(self) -> Ran {
        self.run().exits(0)
    }

    /// Runs it and expects this exit code and no panic.
    #[track_caller]
    pub(crate) fn fails(self, code: i32) -> Ran {
        self.run().exits(code)
    }
}

/// A `convert` of `model` into `out`.
pub(crate) fn convert(model: &Path, out: &Path) -> Command {
    Command::new("convert").arg(model).arg("-o").arg(out)
}

/// Finished blocks that the journal of an interrupted conversion has.
pub(crate) fn checkpoints(out: &Path) -> usize {
    let journal = fs::read(out.join(".work/journal.jsonl")).unwrap_or_default();
    journal.split(|&byte| byte == b'\n').count() - 1
}

/// Waits until a run has `arrived`, which must be before it ends.
#[track_caller]
pub(crate) fn wait_until(child: &mut Child, arrived: impl Fn() -> bool) {
    let start = Instant::now();
    while !arrived() {
        assert!(start.elapsed() < Duration::from_mins(1), "never arrived");
        assert!(child.try_wait().unwrap().is_none(), "finished before it arrived");
        sleep(Duration::from_millis(2));
    }
}

/// Kills the run of `command` into `out` when it has `arrived`.
#[track_caller]
pub(crate) fn kill_when(command: Command, out: &Path, arrived: impl Fn() -> bool) {
    let mut child = command.spawn();
    wait_until(&mut child, arrived);
    child.kill().unwrap();
    child.wait().unwrap();
    for finished in ["manifest.json", "model.safetensors", "model.spz"] {
        assert!(!out.join(finished).exists(), "{finished}");
    }
}

/// Resumes a killed conversion of the fixture model, which has four blocks, with the `command` that
/// was killed: only the blocks that are left are done, and the files are those of `whole`.
#[track_caller]
pub(crate) fn assert_resumes(command: Command, out: &Path, whole: &Path) {
    let done = checkpoints(out);
    let ran = command.arg("--resume").succeeds();
    let blocks = ran.stderr().matches("block done").count();
    assert_eq!(blocks, 4 - done, "blocks after {done} checkpoints\n{}", ran.story());
    assert_same_files(whole, out);
}

/// A finished run of the binary.
pub(crate) struct Ran {
    command: String,
    output: Output,
}

impl Ran {
    pub(crate) fn stdout(&self) -> &str {
        std::str::from_utf8(&self.output.stdout).unwrap()
    }

    pub(crate) fn stderr(&self) -> &str {
        std::str::from_utf8(&self.output.stderr).unwrap()
    }

    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        match serde_json::from_str(self.stdout()) {
            Ok(value) => value,
            Err(error) => panic!("stdout is not JSON: {error}\n{}", self.story()),
        }
    }

    #[track_caller]
    pub(crate) fn exits(self, code: i32) -> Self {
        assert_eq!(self.output.status.code(), Some(code), "{}", self.story());
        assert!(!self.stderr().contains("panicked"), "{}", self.story());
        self
    }

    /// Expects every one of `parts` in the standard error.
    #[track_caller]
    pub(crate) fn says(&self, parts: &[&str]) -> &Self {
        for part in parts {
            assert!(self.stderr().contains(part), "stderr lacks `{part}`\n{}", self.story());
        }
        self
    }

    /// Everything that is known about the run.
    pub(crate) fn story(&self) -> String {
        format!(
            "command: {}\nstatus: {}\n--- stdout\n{}\n--- stderr\n{}",
            self.command,
            self.output.status,
            String::from_utf8_lossy(&self.output.stdout),
            String::from_utf8_lossy(&self.output.stderr)
        )
    }
}

/// Compares `text` with a recorded file, or records it under `UPDATE_EXPECT=1`.
#[track_caller]
pub(crate) fn expect_file(path: &Path, text: &str) {
    if std::env::var_os("UPDATE_EXPECT").is_some_and(|value| value == "1") {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
        return;
    }
    let expected = fs::read_to_string(path).unwrap_or_default();
    assert!(
        expected == text,
        "{} differs (UPDATE_EXPECT=1 records it again)\n--- expected\n{expected}\n--- found\n{text}",
        path.display()
    );
}

/// A dense tensor for [`write_model`].
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Vec<u8>,
}

impl Tensor {
    pub(crate) fn f32(name: impl Into<String>, shape: &[usize], values: &[f32]) -> Self {
        Self {
            name: name.into(),
            dtype: DType::F32,
            shape: shape.to_vec(),
            bytes: values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        }
    }
}

/// Writes `model.safetensors` into `dir`.
pub(crate) fn write_tensors(dir: &Path, tensors: &[Tensor]) {
    fs::create_dir_all(dir).unwrap();
    let layout = ShardLayout {
        tensors: tensors
            .iter()
            .map(|tensor| {
                (tensor.name.clone(), Encoding::Dense { dtype: tensor.dtype }, tensor.shape.clone())
            })
            .collect(),
        metadata: BTreeMap::new(),
    };
    let mut writer = SafetensorsWriter::create(dir, &[layout]).unwrap();
    for tensor in tensors {
        writer.write(&tensor.name, 0, &tensor.bytes).unwrap();
    }
    writer.finish().unwrap();
}

/// Every tensor of a dense checkpoint.
pub(crate) fn read_tensors(dir: &Path) -> Vec<Tensor> {
    let reader = sparsepack_formats::open(dir).unwrap();
    let tensors = reader.tensors().iter();
    tensors
        .map(|info| Tensor {
            name: info.name.clone(),
            dtype: info.encoding.value_dtype(),
            shape: info.shape.clone(),
            bytes: reader.components(&info.name).unwrap()[0].to_vec(),
        })
        .collect()
}

/// Numbers in `-0.5..0.5` that look random and are the same every time.
pub(crate) fn noise(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..count).map(|_| next()).collect()
}

/// Puts `config.json` of a Llama of these `sizes`, and the fixture model's tokenizer, beside its tensors.
pub(crate) fn write_llama_config(dir: &Path, sizes: Value) {
    let mut config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": true,
        "torch_dtype": "float32",
    });
    let Value::Object(sizes) = sizes else { panic!("sizes are an object") };
    config.as_object_mut().unwrap().extend(sizes);
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    fs::copy(fixture("model/tokenizer.json"), dir.join("tokenizer.json")).unwrap();
}
