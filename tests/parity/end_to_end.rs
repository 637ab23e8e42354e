//! Perplexities of the small trained model, dense and pruned, against those recorded with
//! transformers and llm-compressor.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex, OnceLock},
    time::Duration,
};

use sparsepack::{
    backend::{DeviceOptions, Precision, dispatch},
    calibration::{CalibrationSet, Sampling, StatKind, read_text},
    compress::{Damping, Method},
    eval::PerplexityJob,
    model::{ModelSource, Tokenizer},
    pipeline::{ConversionPlan, MANIFEST, NoProgress, RunOptions, convert},
    recipe::{
        CalibrationRecipe, OutputFormat, OutputRecipe, PruneRecipe, Recipe, Rule, Sequential,
        SolverRecipe, WeightDType,
    },
};
use tempfile::TempDir;

use super::fixture;

/// Tokens of a window, calibration and held-out windows of the recorded values.
const WINDOW: usize = 256;
const CALIBRATION: usize = 64;
const HELD_OUT: usize = 24;

const F32: DeviceOptions = DeviceOptions {
    device: sparsepack::backend::Device::Cpu,
    precision: Precision::F32,
    threads: None,
};

/// One conversion of the fixture model.
#[derive(Debug, Clone, Copy)]
struct Run {
    method: Method,
    sparsity: &'static str,
    sequential: Sequential,
    output: (OutputFormat, WeightDType),
    samples: usize,
    device: DeviceOptions,
}

impl Run {
    /// As the reference does it: its order, f32 all through.
    fn reference(method: Method, sparsity: &'static str) -> Self {
        Self {
            method,
            sparsity,
            sequential: Sequential::Block,
            output: (OutputFormat::Safetensors, WeightDType::F32),
            samples: CALIBRATION,
            device: F32,
        }
    }

    fn recipe(self) -> Recipe {
        let prune = PruneRecipe::new(self.method, self.sparsity.parse().unwrap());
        // As the reference, where it has such settings.
        let (needs, hessian) = (self.method.needs(), self.method == Method::SparseGpt);
        let solver = SolverRecipe {
            sequential: (needs > StatKind::None).then_some(self.sequential),
            damp: hessian.then_some(0.01),
            damping: hessian.then_some(Damping::Mean),
            ..SolverRecipe::default()
        };
        let mut calibration = CalibrationRecipe::default();
        if self.method != Method::Magnitude {
            calibration.file = Some(fixture("text/calibration.txt"));
            calibration.samples = self.samples;
            calibration.seq_len = WINDOW;
        }
        let (format, dtype) = self.output;
        let output =
            OutputRecipe { format: Some(format), dtype: Some(dtype), ..OutputRecipe::default() };
        Recipe { prune: Some(prune), solver, calibration, output, ..Recipe::default() }
    }

    fn convert(self, out: &Path) {
        convert_fixture(&self.recipe(), self.device, out);
    }

    /// Perplexity after the conversion, measured once for all tests.
    fn perplexity(self) -> f64 {
        static KNOWN: Mutex<BTreeMap<String, Arc<OnceLock<f64>>>> = Mutex::new(BTreeMap::new());
        let cell = Arc::clone(KNOWN.lock().unwrap().entry(format!("{self:?}")).or_default());
        *cell.get_or_init(|| {
            let dir = TempDir::new().unwrap();
            let out = dir.path().join("out");
            self.convert(&out);
            perplexity(&out, F32)
        })
    }
}

fn convert_fixture(recipe: &Recipe, device: DeviceOptions, out: &Path) {
    let source = ModelSource::open(&fixture("model")).unwrap();
    let calibration = recipe.calibration.file.as_ref().map(|text| {
        let CalibrationRecipe { samples, seq_len, seed, .. } = recipe.calibration;
        let sampling = Sampling { samples, seq_len, seed };
        let tokenizer = Tokenizer::open(&source).unwrap();
        CalibrationSet::load(text, &tokenizer, source.config(), sampling).unwrap()
    });
    let plan = ConversionPlan::new(&source, recipe).unwrap();
    let options = RunOptions {
        resume: false,
        checkpoint_interval: Duration::from_hours(1),
        memory_bytes: None,
    };
    let calibration = calibration.as_ref();
    convert(&source, &plan, calibration, out, device, options, &NoProgress).unwrap();
}

fn perplexity(model: &Path, device: DeviceOptions) -> f64 {
    let source = ModelSource::open(model).unwrap();
    let text = read_text(&fixture("text/heldout.txt")).unwrap();
    let ids = Tokenizer::open(&source).unwrap().encode(&text).unwrap();
    let windows: Vec<Vec<u32>> =
        ids.chunks_exact(WINDOW).take(HELD_OUT).map(<[u32]>::to_vec).collect();
    let job = PerplexityJob {
        source: &source,
        windows: &windows,
        text_tokens: ids.len(),
        progress: &NoProgress,
    };
    dispatch(device, job).unwrap().unwrap().0.perplexity
}

fn recorded(key: &str) -> f64 {
    let text = std::fs::read_to_string(fixture("model/perplexity.json")).unwrap();
    serde_json::from_str::<BTreeMap<String, f64>>(&text).unwrap()[key]
}

#[track_caller]
fn assert_near(what: &str, got: f64, recorded: f64, tolerance: f64) {
    let difference = got / recorded - 1.0;
    println!("perplexity {what}: {got:.4}, recorded {recorded:.4}, {difference:+.1e}");
    assert!(difference.abs() <= tolerance, "{what}: {got} for {recorded}");
}

#[test]
fn dense() {
    assert_near("dense", perplexity(&fixture("model"), F32), recorded("dense"), 1e-3);
}

#[test]
fn dense_with_the_fastest_products() {
    let device = DeviceOptions { precision: Precision::Auto, ..F32 };
    let got = perplexity(&fixture("model"), device);
    assert_near("dense, fastest products", got, recorded("dense"), 5e-3);
}

#[track_caller]
fn agrees(method: Method, sparsity: &'static str, tolerance: f64) {
    let key = format!("{} {sparsity}", method.name());
    assert_near(&key, Run::reference(method, sparsity).perplexity(), recorded(&key), tolerance);
}

#[test]
fn sparsegpt_2_4() {
    agrees(Method::SparseGpt, "2:4", 2e-2);
}

#[test]
fn sparsegpt_half() {
    agrees(Method::SparseGpt, "50%", 2e-2);
}

#[test]
fn wanda_2_4() {
    agrees(Method::Wanda, "2:4", 1e-2);
}

#[test]
fn wanda_half() {
    agrees(Method::Wanda, "50%", 1e-2);
}

#[test]
fn magnitude_2_4() {
    agrees(Method::Magnitude, "2:4", 1e-2);
}

#[test]
fn magnitude_half() {
    agrees(Method::Magnitude, "50%", 1e-2);
}

/// Solving stage by stage calibrates the later layers of a block on pruned inputs, which may be
/// better than the reference's order but not worse.
#[test]
fn sparsegpt_2_4_in_stages_is_as_good() {
    let run = Run { sequential: Sequential::True, ..Run::reference(Method::SparseGpt, "2:4") };
    let (got, recorded) = (run.perplexity(), recorded("sparsegpt 2:4"));
    println!("perplexity sparsegpt 2:4 in stages: {got:.4}, recorded in blocks {recorded:.4}");
    assert!(got <= recorded * 1.02, "{got} for {recorded}");
}

#[track_caller]
fn ranks(sparsity: &'static str) {
    let pruned = [Method::SparseGpt, Method::Wanda, Method::Magnitude]
        .map(|method| Run::reference(method, sparsity).perplexity());
    let mut worse = recorded("dense");
    for perplexity in pruned {
        assert!(perplexity > worse, "{sparsity}: {pruned:?}");
        worse = perplexity;
    }
}

#[test]
fn methods_rank_at_2_4() {
    ranks("2:4");
}

#[test]
fn methods_rank_at_half() {
    ranks("50%");
}

/// Wanda beside SparseGPT on one input reads its norms off the Hessian.
#[test]
fn a_layer_pruned_by_wanda_is_the_same_beside_sparsegpt() {
    let dir = TempDir::new().unwrap();
    let reference = |method| Run { samples: 4, ..Run::reference(method, "50%") };
    let mut mixed = reference(Method::SparseGpt).recipe();
    mixed.rules.push(Rule {
        targets: vec!["k_proj".parse().unwrap()],
        method: Some(Method::Wanda),
        sparsity: None,
        quantize: None,
        group_size: None,
        dense: false,
    });
    let weight = |name: &str, recipe: &Recipe| {
        let out = dir.path().join(name);
        convert_fixture(recipe, F32, &out);
        // Block 0: its input does not depend on what the other layers became.
        let tensor = "model.layers.0.self_attn.k_proj.weight";
        ModelSource::open(&out).unwrap().read_f32(tensor).unwrap()
    };
    assert_eq!(weight("mixed", &mixed), weight("wanda", &reference(Method::Wanda).recipe()));
}

#[track_caller]
fn assert_equal_on_1_and_4_threads(run: Run) {
    let dir = TempDir::new().unwrap();
    let [one, four] = [1, 4].map(|threads| {
        let out = dir.path().join(threads.to_string());
        Run { device: DeviceOptions { threads: Some(threads), ..run.device }, ..run }.convert(&out);
        files(&out)
    });
    assert!(one.keys().eq(four.keys()), "{:?} and {:?}", one.keys(), four.keys());
    for (name, bytes) in &one {
        assert!(four[name] == *bytes, "{name} differs");
    }
}

/// Every file of an output. The manifest says on what it was made, which is the one thing that
/// differs.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let mut bytes = std::fs::read(entry.path()).unwrap();
        if entry.file_name() == MANIFEST {
            let mut manifest: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
            manifest.as_object_mut().unwrap().remove("device").unwrap();
            bytes = manifest.to_string().into_bytes();
        }
        files.insert(entry.file_name().into_string().unwrap(), bytes);
    }
    files
}

#[test]
fn one_and_four_threads_write_equal_files_in_f32() {
    assert_equal_on_1_and_4_threads(Run {
        samples: 12,
        ..Run::reference(Method::SparseGpt, "50%")
    });
}

#[test]
fn one_and_four_threads_write_equal_files_with_the_fastest_products() {
    assert_equal_on_1_and_4_threads(Run {
        sequential: Sequential::True,
        output: (OutputFormat::Packed, WeightDType::Bf16),
        samples: 12,
        device: DeviceOptions { precision: Precision::Auto, ..F32 },
        ..Run::reference(Method::SparseGpt, "2:4")
    });
}
