//! Sliced models against an independent derivation of the algorithm in f64: the same eigenvalues, the
//! same logits.

use std::{path::Path, time::Duration};

use sparsepack::{
    backend::{Dense, DenseOps, DeviceOptions, Precision, cpu::Cpu, dispatch},
    calibration::{CalibrationSet, Sampling},
    compress::{Basis, Correction},
    eval,
    model::{ModelSource, SLICED_CODE, SLICED_CODE_FILE},
    pipeline::{ConversionPlan, NoProgress, RunOptions, convert},
    recipe::{CalibrationRecipe, OutputRecipe, Recipe, SliceRecipe, WeightDType},
};

use super::{Difference, Golden, fixture};
use crate::harness::{Tensor, copy_dir, noise, read_tensors, write_tensors};

/// f32 forward passes, weights rounded to f32: the maker's own estimate is 7e-6.
const LOGITS: f64 = 3e-5;

const F32: DeviceOptions = DeviceOptions {
    device: sparsepack::backend::Device::Cpu,
    precision: Precision::F32,
    threads: None,
};

struct Logits<'a>(&'a ModelSource, &'a [u32]);

impl sparsepack::backend::BackendJob for Logits<'_> {
    type Output = Vec<f32>;

    fn run<B: sparsepack::backend::Backend>(self, b: &B) -> Vec<f32> {
        eval::logits(b, self.0, self.1).unwrap()
    }
}

/// Slices a tiny model as the golden case was, and returns its logits on the evaluation ids.
fn sliced_logits(golden: &Golden, model: &str, slice: SliceRecipe, out: &Path) -> Vec<f32> {
    sliced_logits_of(&fixture("tiny").join(model), golden, model, slice, out)
}

/// The same of the model in `path`, with the ids of `model`.
fn sliced_logits_of(
    path: &Path,
    golden: &Golden,
    model: &str,
    slice: SliceRecipe,
    out: &Path,
) -> Vec<f32> {
    let source = ModelSource::open(path).unwrap();
    let text = fixture("text/calibration.txt");
    let calibration =
        CalibrationRecipe { file: Some(text.clone()), samples: 4, seq_len: 24, seed: None };
    let output = OutputRecipe { dtype: Some(WeightDType::F32), ..OutputRecipe::default() };
    let recipe = Recipe { slice: Some(slice), calibration, output, ..Recipe::default() };
    let plan = ConversionPlan::new(&source, &recipe).unwrap();
    let sampling = Sampling { samples: 4, seq_len: 24, seed: None };
    let ids = golden.ids(&format!("{model}.ids"));
    let set = CalibrationSet::from_ids(&text, &ids, sampling).unwrap();
    let options = RunOptions {
        resume: false,
        checkpoint_interval: Duration::from_hours(1),
        memory_bytes: None,
    };
    convert(&source, &plan, Some(&set), out, F32, options, &NoProgress).unwrap();
    logits(out, model)
}

/// Logits of a model on the evaluation ids of `model`.
fn logits(path: &Path, model: &str) -> Vec<f32> {
    let source = ModelSource::open(path).unwrap();
    let ids = Golden::open(&format!("tiny/{model}/golden.safetensors")).ids("input_ids");
    dispatch(F32, Logits(&source, &ids)).unwrap()
}

fn check(model: &str, key: &str, slice: SliceRecipe) {
    let golden = Golden::open("golden/slicegpt.safetensors");
    let out = tempfile::tempdir().unwrap();
    let got = sliced_logits(&golden, model, slice, &out.path().join("out"));
    let recorded: Vec<f32> =
        golden.f64s(&format!("{key}.logits")).into_iter().map(|x| x as f32).collect();
    let difference = Difference::of(&got, &recorded);
    println!("{key}: {difference}");
    assert!(difference.within(LOGITS), "{key}: {difference}");
}

fn slice(width: usize, basis: Basis, head: bool) -> SliceRecipe {
    let correction = Some(Correction::None);
    SliceRecipe { basis, head, correction, ..SliceRecipe::new(None, Some(width)) }
}

#[test]
fn one_basis_for_the_whole_model() {
    for (model, narrow, whole) in [("llama-gqa", 24, 32), ("mistral", 32, 40), ("qwen2", 24, 32)] {
        for width in [narrow, whole] {
            let key = format!("{model}.shared.{width}");
            check(model, &key, slice(width, Basis::Shared, false));
        }
    }
}

#[test]
fn a_slice_that_is_fitted() {
    for (model, narrow, whole) in [("llama-gqa", 24, 32), ("mistral", 32, 40), ("qwen2", 24, 32)] {
        let fitted = |width| SliceRecipe {
            correction: Some(Correction::LeastSquares),
            damp: Some(0.3),
            ..slice(width, Basis::Shared, false)
        };
        check(model, &format!("{model}.shared.{narrow}.fitted"), fitted(narrow));
        // Where nothing is left out there is nothing to make up for.
        check(model, &format!("{model}.shared.{whole}"), fitted(whole));
    }
}

#[test]
fn biases_are_turned_and_not_fitted_twice() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (dir.path().join("model"), dir.path().join("out"));
    copy_dir(&fixture("tiny/llama-gqa"), &model);
    let config = std::fs::read_to_string(model.join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&config).unwrap();
    config["attention_bias"] = true.into();
    std::fs::write(model.join("config.json"), config.to_string()).unwrap();
    let mut tensors = read_tensors(&model);
    for block in 0..2 {
        for (seed, (linear, rows)) in
            [("q", 32), ("k", 16), ("v", 16), ("o", 32)].into_iter().enumerate()
        {
            let name = format!("model.layers.{block}.self_attn.{linear}_proj.bias");
            tensors.push(Tensor::f32(name, &[rows], &noise(seed as u64, rows)));
        }
    }
    write_tensors(&model, &tensors);
    let golden = Golden::open("golden/slicegpt.safetensors");
    let whole = SliceRecipe::new(None, Some(32));
    let got = sliced_logits_of(&model, &golden, "llama-gqa", whole, &out);
    let difference = Difference::of(&got, &logits(&model, "llama-gqa"));
    println!("biases: {difference}");
    assert!(difference.within(LOGITS), "{difference}");
}

#[test]
fn a_basis_for_each_half_of_a_block() {
    for (model, width) in [("llama-gqa", 24), ("mistral", 32), ("qwen2", 24), ("opt", 24)] {
        check(model, &format!("{model}.block.{width}"), slice(width, Basis::Block, false));
        check(model, &format!("{model}.block.{width}.head"), slice(width, Basis::Block, true));
    }
}

#[test]
fn a_model_that_is_turned_and_not_sliced_computes_the_same() {
    for (model, basis, head) in [
        ("llama-gqa", Basis::Shared, false),
        ("mistral", Basis::Block, true),
        ("qwen2", Basis::Block, false),
        ("opt", Basis::Block, true),
        ("opt", Basis::Block, false),
    ] {
        let golden = Golden::open("golden/slicegpt.safetensors");
        let out = tempfile::tempdir().unwrap();
        let width = if model == "mistral" { 40 } else { 32 };
        // The mean of OPT's stream is taken out, which leaves one direction less.
        let width = width - usize::from(model == "opt");
        let got = sliced_logits(&golden, model, slice(width, basis, head), &out.path().join("out"));
        let dense = Golden::open(&format!("tiny/{model}/golden.safetensors")).f32s("logits");
        let difference = Difference::of(&got, &dense);
        println!("{model} {basis:?}: {difference}");
        assert!(difference.within(1e-4), "{model} {basis:?}: {difference}");
    }
}

#[test]
fn code_for_transformers_stands_beside_models_that_it_has_no_class_for() {
    let golden = Golden::open("golden/slicegpt.safetensors");
    let temp = tempfile::tempdir().unwrap();
    let out = |name: &str| temp.path().join(name);
    sliced_logits(&golden, "qwen2", slice(24, Basis::Shared, false), &out("shared"));
    assert!(!out("shared").join(SLICED_CODE_FILE).exists());
    sliced_logits(&golden, "qwen2", slice(24, Basis::Block, false), &out("block"));
    let source = ModelSource::open(&out("block")).unwrap();
    let plan = ConversionPlan::new(&source, &Recipe::default()).unwrap();
    let options = RunOptions {
        resume: false,
        checkpoint_interval: Duration::from_hours(1),
        memory_bytes: None,
    };
    convert(&source, &plan, None, &out("again"), F32, options, &NoProgress).unwrap();
    for name in ["block", "again"] {
        let code = std::fs::read_to_string(out(name).join(SLICED_CODE_FILE)).unwrap();
        assert_eq!(code, SLICED_CODE, "{name}");
        let config = std::fs::read(out(name).join("config.json")).unwrap();
        let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
        for key in ["AutoConfig", "AutoModelForCausalLM"] {
            let class = config["auto_map"][key].as_str().unwrap();
            let class = class.strip_prefix("modeling_sliced.").unwrap();
            assert!(code.contains(&format!("\nclass {class}(")), "{class}");
        }
    }
}

#[test]
fn single_precision_would_lose_the_directions_at_the_cut() {
    let golden = Golden::open("golden/slicegpt.safetensors");
    let kept: usize = golden.metadata("precision.kept");
    let n = golden.shape("precision.covariance")[0];
    let covariance = Dense { rows: n, cols: n, data: golden.f64s("precision.covariance") };
    let recorded = golden.f64s("precision.projector");
    let b = Cpu::new(Precision::F32, Some(1)).unwrap();
    // Frobenius norm of the difference of the projectors.
    let lost = |covariance: &Dense| {
        let q = b.symmetric_eigen(covariance).unwrap().vectors.first_columns(kept);
        let projector = b.dense_product(&q, &q.transposed()).unwrap();
        let squares = projector.data.iter().zip(&recorded).map(|(a, b)| (a - b) * (a - b));
        squares.sum::<f64>().sqrt()
    };
    let rounded = Dense::new(n, n, &covariance.to_f32()).unwrap();
    assert!(lost(&covariance) < 1e-5);
    assert!(lost(&rounded) > 0.5);
}
