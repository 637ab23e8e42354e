//! Hidden states and logits of the tiny models against transformers.

use sparsepack::{
    backend::{Backend, BackendError, Precision, SequenceLens, Storage, cpu::Cpu},
    eval::{self, LmHead},
    model::{Activations, BlockGeometry, CapturePoint, ModelSource, embed},
    pipeline::{LoadedBlock, PipelineError},
};

use super::{Difference, Golden, fixture};

/// f32 products on both sides, summed in different orders.
const F32: f64 = 1e-4;
/// Every operand of a product rounded to 8 significant bits (2⁻⁹ each), through two blocks.
const BF16: f64 = 5e-2;

/// The golden file of a model; a GGUF file holds the weights of the directory of its name.
fn golden(model: &str) -> Golden {
    let directory = model.trim_end_matches(".gguf");
    Golden::open(&format!("tiny/{directory}/golden.safetensors"))
}

fn open(model: &str) -> ModelSource {
    ModelSource::open(&fixture("tiny").join(model)).unwrap()
}

/// The residual stream before each block and after the last, then the logits.
fn states<B: Backend>(b: &B, source: &ModelSource, ids: &[u32]) -> Vec<Vec<f32>> {
    let config = source.config();
    let geometry = BlockGeometry::new(b, source.arch(), config, ids.len()).unwrap();
    let lens = SequenceLens::new(vec![ids.len()]);
    let mut states = vec![embed(source, ids).unwrap()];
    let mut residual = b.upload(&states[0], ids.len(), config.hidden_size).unwrap();
    for index in 0..config.num_hidden_layers {
        let mut loaded = LoadedBlock::load(b, source, index).unwrap();
        loaded.install_all(b).unwrap();
        let forward =
            loaded.block.forward::<PipelineError>(b, &geometry, residual, &lens, |_, _| Ok(()));
        residual = forward.unwrap();
        states.push(b.download(&residual).unwrap());
    }
    let head = LmHead::load(b, source).unwrap();
    states.push(b.download(&head.logits(b, &residual).unwrap()).unwrap());
    states
}

fn agrees(model: &str) {
    let (golden, source) = (golden(model), open(model));
    let b = Cpu::new(Precision::F32, Some(1)).unwrap();
    let states = states(&b, &source, &golden.ids("input_ids"));
    let (logits, hidden) = states.split_last().unwrap();
    let mut worst = Difference::default();
    for (index, hidden) in hidden.iter().enumerate() {
        let difference = Difference::of(hidden, &golden.f32s(&format!("hidden_{index}")));
        assert!(difference.within(F32), "{model} hidden_{index}: {difference}");
        worst = worst.worst(difference);
    }
    let difference = Difference::of(logits, &golden.f32s("logits"));
    println!("forward {model}: hidden {worst}; logits {difference}");
    assert!(difference.within(F32), "{model} logits: {difference}");
}

macro_rules! models {
    ($($name:ident: $model:literal),+ $(,)?) => {
        $(
            #[test]
            fn $name() {
                agrees($model);
            }
        )+

        const MODELS: &[&str] = &[$($model),+];
    };
}

models! {
    llama_gqa: "llama-gqa",
    llama_sharded: "llama-sharded",
    llama_mha_tied: "llama-mha-tied",
    llama3_rope: "llama3-rope",
    mistral: "mistral",
    qwen2: "qwen2",
    opt: "opt",
    llama_gguf: "llama-gqa.gguf",
    qwen2_gguf: "qwen2.gguf",
}

#[test]
fn bf16_products_stay_near_the_logits() {
    let b = match Cpu::new(Precision::Bf16, Some(1)) {
        Err(BackendError::PrecisionUnavailable { .. }) => {
            return println!("skipped: no bf16 products");
        }
        b => b.unwrap(),
    };
    for model in MODELS {
        let golden = golden(model);
        let logits = eval::logits(&b, &open(model), &golden.ids("input_ids")).unwrap();
        let difference = Difference::of(&logits, &golden.f32s("logits"));
        println!("forward {model} bf16: logits {difference}");
        assert!(difference.within(BF16), "{model}: {difference}");
    }
}

#[test]
fn logits_of_a_sequence_are_those_of_its_blocks() {
    let b = Cpu::new(Precision::F32, Some(1)).unwrap();
    let (source, ids) = (open("qwen2"), golden("qwen2").ids("input_ids"));
    let logits = eval::logits(&b, &source, &ids).unwrap();
    assert_eq!(logits, *states(&b, &source, &ids).last().unwrap());
}

/// The calibration loop stops at each capture point, moves activations to the host and recomputes
/// what follows a norm; nothing of it may change a bit.
#[test]
fn a_block_in_stages_equals_the_whole() {
    for model in MODELS {
        let (source, ids) = (open(model), golden(model).ids("input_ids"));
        let b = Cpu::new(Precision::Auto, Some(1)).unwrap();
        let config = source.config();
        let geometry = BlockGeometry::new(&b, source.arch(), config, ids.len()).unwrap();
        // Two sequences in one batch.
        let lens = SequenceLens::new(vec![16, ids.len() - 16]);
        let mut loaded = LoadedBlock::load(&b, &source, 0).unwrap();
        loaded.install_all(&b).unwrap();
        let start = embed(&source, &ids).unwrap();
        let residual = || b.upload(&start, ids.len(), config.hidden_size).unwrap();

        let whole = loaded
            .block
            .forward::<BackendError>(&b, &geometry, residual(), &lens, |_, _| Ok(()))
            .unwrap();
        let mut at = loaded.block.enter(&b, residual()).unwrap();
        for point in CapturePoint::ALL {
            let Activations { residual, input } = at;
            let residual = b.onload(b.offload(residual).unwrap()).unwrap();
            let recomputed = loaded.block.input_from_residual(&b, point, &residual).unwrap();
            let input = recomputed.or(input).map(|input| b.offload(input).unwrap());
            let input = input.map(|input| b.onload(input).unwrap());
            at = Activations { residual, input };
            at = loaded.block.step(&b, &geometry, point, at, &lens).unwrap();
        }
        assert_eq!(b.download(&at.residual).unwrap(), b.download(&whole).unwrap(), "{model}");
    }
}
