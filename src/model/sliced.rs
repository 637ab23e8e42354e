//! What a model becomes when its residual stream gets narrower: class, configuration, tensors.

use serde_json::{Value, json};
use sparsepack_formats::{DType, ModelMetadata};

use super::arch::{Architecture, StockWidth};
use super::config::ModelConfig;
use super::error::{ModelError, Result};
use super::source::{ModelSource, TensorKind, expected};

/// Keys of a configuration that say what an earlier conversion did to the weights.
const RECORDS: [&str; 2] = ["quantization_config", "sparsepack"];

/// Name of the file beside a model sliced in blocks that tells transformers how to compute it:
/// `auto_map` of its config.json names the classes in it.
pub const SLICED_CODE_FILE: &str = "modeling_sliced.py";
/// What is in that file.
pub const SLICED_CODE: &str = include_str!("../../python/src/sparsepack/modeling_sliced.py");

/// A model whose residual stream is narrower than that of the model it comes from.
#[derive(Debug, Clone)]
pub struct SlicedModel {
    /// Its family.
    pub arch: &'static Architecture,
    /// Its dimensions.
    pub config: ModelConfig,
    /// Its config.json.
    pub json: Value,
    /// Every tensor in model order: name, shape, and what it is for.
    pub tensors: Vec<(String, Vec<usize>, TensorKind)>,
}

impl SlicedModel {
    /// The model with `width` columns in its residual stream, in one basis, with weights of `dtype`:
    /// its own class where that takes such a width, else one that computes the same.
    ///
    /// # Errors
    /// [`ModelError::CannotSlice`] for a family, a width or a tensor for which there is no such model, or
    /// a model that was sliced in blocks before.
    pub fn shared(source: &ModelSource, width: usize, dtype: DType) -> Result<Self> {
        let (own, config) = (source.arch(), source.config());
        refuse_sliced(own)?;
        let arch = match &own.stock_width {
            StockWidth::Any => own,
            StockWidth::Heads { .. } if width.is_multiple_of(config.num_attention_heads) => own,
            StockWidth::Heads { otherwise } => {
                same_without_that_rule(own, config, otherwise, width)?
            }
            StockWidth::Fixed => {
                let why = "has heads of hidden_size / num_attention_heads columns, so that its hidden \
                           size cannot change alone; use --basis block";
                return Err(refuse(own, why.to_owned()));
            }
        };
        Self::new(source, arch, narrower(config, width), dtype)
    }

    /// The model with `width` columns in its residual stream, in a basis of its own for each half of a
    /// block, with weights of `dtype`. With `head` its output matrix is sliced too. No stock class
    /// computes it.
    ///
    /// # Errors
    /// [`ModelError::CannotSlice`] for a model that was sliced so before, or a tensor that is unknown.
    pub fn in_blocks(source: &ModelSource, width: usize, head: bool, dtype: DType) -> Result<Self> {
        let (own, config) = (source.arch(), source.config());
        refuse_sliced(own)?;
        let Some(arch) = own.in_blocks() else {
            return Err(refuse(own, "has no sliced form".to_owned()));
        };
        let mut narrow = narrower(config, width);
        narrow.exit_size = (!head).then_some(config.hidden_size);
        if arch.lm_head_bias {
            narrow.biases = arch.linears.iter().map(|linear| linear.role).collect();
        }
        Self::new(source, arch, narrow, dtype)
    }

    fn new(
        source: &ModelSource,
        arch: &'static Architecture,
        config: ModelConfig,
        dtype: DType,
    ) -> Result<Self> {
        let mut others = source.tensors().iter().filter(|tensor| tensor.kind == TensorKind::Other);
        if let Some(tensor) = others.next() {
            let why =
                format!("has no tensor `{}`, so what slicing makes of it is unknown", tensor.name);
            return Err(refuse(source.arch(), why));
        }
        let mut json = overlay(source, config.to_hf_json(arch, dtype)?);
        if arch.shortcuts.is_some() {
            // In `SLICED_CODE_FILE`.
            json["auto_map"] = json!({
                "AutoConfig": "modeling_sliced.SlicedConfig",
                "AutoModelForCausalLM": "modeling_sliced.SlicedForCausalLM",
            });
        }
        let tensors = expected(arch, &config)
            .into_iter()
            .map(|tensor| (tensor.module + tensor.suffix, tensor.shape, tensor.kind))
            .collect();
        Ok(Self { arch, config, json, tensors })
    }
}

/// Refuses a family with matrices on its shortcuts.
fn refuse_sliced(own: &Architecture) -> Result<()> {
    if own.shortcuts.is_none() {
        return Ok(());
    }
    let why =
        "was sliced before, with a basis for each block; slice the model that it was made from";
    Err(refuse(own, why.to_owned()))
}

/// The dimensions of the same model with `width` columns in its residual stream.
fn narrower(config: &ModelConfig, width: usize) -> ModelConfig {
    ModelConfig {
        hidden_size: width,
        norm_eps: config.norm_eps * config.hidden_size as f32 / width as f32,
        tie_word_embeddings: false,
        ..config.clone()
    }
}

/// The family that computes the same and takes any width.
fn same_without_that_rule(
    own: &'static Architecture,
    config: &ModelConfig,
    otherwise: &str,
    width: usize,
) -> Result<&'static Architecture> {
    let heads = config.num_attention_heads;
    if let Some(role) = config.biases.first() {
        return Err(refuse(
            own,
            format!(
                "takes hidden sizes that {heads} heads divide, not {width}, and {otherwise}, which \
                 takes any, has no bias for {role}; choose a multiple of {heads} with --slice-width, \
                 or use --basis block"
            ),
        ));
    }
    let found = Architecture::all().iter().find(|arch| arch.name == otherwise);
    found.ok_or_else(|| refuse(own, format!("names an unknown family `{otherwise}`")))
}

/// The source's config.json with the keys of `sliced` in the place of its own.
fn overlay(source: &ModelSource, sliced: Value) -> Value {
    let mut json = match source.reader().metadata() {
        ModelMetadata::HuggingFace { config, .. } => config.clone(),
        _ => json!({}),
    };
    if let (Some(out), Value::Object(sliced)) = (json.as_object_mut(), sliced) {
        for key in RECORDS {
            out.remove(key);
        }
        out.extend(sliced);
    }
    json
}

fn refuse(arch: &Architecture, why: String) -> ModelError {
    ModelError::CannotSlice { class: arch.hf_class.clone(), why }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use sparsepack_formats::Encoding;

    use super::*;
    use crate::model::{CapturePoint, Role};

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
    }

    fn open(name: &str) -> ModelSource {
        ModelSource::open(&fixture(name)).unwrap()
    }

    /// A copy of a tiny model with an edited config.json.
    fn edited(name: &str, edit: impl FnOnce(&mut Value)) -> (tempfile::TempDir, ModelSource) {
        let dir = tempfile::tempdir().unwrap();
        let text = std::fs::read(fixture(name).join("config.json")).unwrap();
        let mut config = serde_json::from_slice(&text).unwrap();
        edit(&mut config);
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let file = "model.safetensors";
        std::fs::copy(fixture(name).join(file), dir.path().join(file)).unwrap();
        let source = ModelSource::open(dir.path()).unwrap();
        (dir, source)
    }

    fn shape(model: &SlicedModel, name: &str) -> Option<Vec<usize>> {
        let mut tensors = model.tensors.iter();
        tensors.find(|(tensor, ..)| tensor == name).map(|(_, shape, _)| shape.clone())
    }

    #[test]
    fn the_stock_class_stays_where_it_takes_the_width() {
        for (name, width, class) in [
            ("model", 96, "LlamaForCausalLM"),
            ("model", 97, "MistralForCausalLM"),
            ("tiny/llama-gqa", 28, "LlamaForCausalLM"),
            ("tiny/llama-gqa", 26, "MistralForCausalLM"),
            ("tiny/mistral", 33, "MistralForCausalLM"),
            ("tiny/qwen2", 1, "Qwen2ForCausalLM"),
        ] {
            let source = open(name);
            let sliced = SlicedModel::shared(&source, width, DType::Bf16).unwrap();
            let before = source.config();
            assert_eq!(sliced.arch.hf_class, class, "{name} {width}");
            assert_eq!(sliced.json["architectures"], json!([class]));
            assert_eq!(sliced.json["model_type"], json!(sliced.arch.model_type));
            assert_eq!(sliced.json["hidden_size"], width);
            assert_eq!(sliced.json["head_dim"], before.head_dim, "{name}");
            assert_eq!(sliced.json["tie_word_embeddings"], false);
            assert_eq!(sliced.json["dtype"], "bfloat16");
            // `eps d / d'`: as much beside a mean over fewer columns as before.
            let share = before.hidden_size as f32 / width as f32;
            let eps = sliced.json["rms_norm_eps"].as_f64().unwrap() as f32;
            assert!((eps / (before.norm_eps * share) - 1.0).abs() < 1e-6, "{name}: {eps}");
            let keys = ["num_attention_heads", "num_key_value_heads", "intermediate_size"];
            let own = |key: &str| source_json(&source)[key].clone();
            for key in keys {
                assert_eq!(sliced.json[key], own(key), "{name} {key}");
            }
        }
    }

    fn source_json(source: &ModelSource) -> Value {
        match source.reader().metadata() {
            ModelMetadata::HuggingFace { config, .. } => config.clone(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_planned_opens_as_the_model_that_is_meant() {
        let sources = ["model", "tiny/llama-gqa", "tiny/qwen2", "tiny/mistral", "tiny/opt"];
        for name in sources.map(open) {
            let mut sliced = vec![
                SlicedModel::in_blocks(&name, 24, false, DType::F16).unwrap(),
                SlicedModel::in_blocks(&name, 24, true, DType::F16).unwrap(),
            ];
            sliced.extend(SlicedModel::shared(&name, 24, DType::F16));
            for model in sliced {
                let again = name.outline(&model, DType::F16, Path::new("nowhere")).unwrap();
                assert_eq!(again.arch().name, model.arch.name);
                assert_eq!(*again.config(), model.config);
                let listed: Vec<_> = again.tensors().iter().map(|t| t.name.clone()).collect();
                let planned: Vec<_> = model.tensors.iter().map(|(name, ..)| name.clone()).collect();
                assert_eq!(listed, planned);
                let total: usize =
                    model.tensors.iter().map(|(_, shape, _)| shape.iter().product::<usize>()).sum();
                assert_eq!(model.config.parameters(model.arch).total(), total as u64);
                let f16 = Encoding::Dense { dtype: DType::F16 };
                assert!(again.tensors().iter().all(|tensor| tensor.encoding == f16));
            }
        }
    }

    #[test]
    fn blocks_have_matrices_on_their_shortcuts() {
        let source = open("tiny/llama-gqa");
        let [open_end, head] = [false, true]
            .map(|head| SlicedModel::in_blocks(&source, 24, head, DType::F32).unwrap());
        for sliced in [&open_end, &head] {
            assert_eq!(sliced.json["architectures"], json!(["SlicedLlamaForCausalLM"]));
            assert_eq!(sliced.json["model_type"], "sliced_llama");
            assert!(sliced.json["auto_map"]["AutoModelForCausalLM"].is_string());
            assert_eq!(shape(sliced, "model.embed_tokens.weight"), Some(vec![96, 24]));
            assert_eq!(shape(sliced, "model.layers.0.attn_shortcut.weight"), Some(vec![24, 24]));
            assert_eq!(shape(sliced, "model.layers.0.mlp_shortcut.weight"), Some(vec![24, 24]));
        }
        for (sliced, exit) in [(&open_end, 32), (&head, 24)] {
            assert_eq!(sliced.config.exit_width(), exit);
            assert_eq!(sliced.json.get("exit_size").is_some(), exit == 32);
            assert_eq!(shape(sliced, "model.layers.1.mlp_shortcut.weight"), Some(vec![exit, 24]));
            assert_eq!(shape(sliced, "model.layers.1.mlp.down_proj.weight"), Some(vec![exit, 96]));
            assert_eq!(shape(sliced, "model.norm.weight"), Some(vec![exit]));
            assert_eq!(shape(sliced, "lm_head.weight"), Some(vec![96, exit]));
        }
        let past = |kind: &TensorKind| match kind {
            TensorKind::Shortcut { block, past } => Some((*block, *past)),
            _ => None,
        };
        let shortcuts: Vec<_> = head.tensors.iter().filter_map(|(_, _, kind)| past(kind)).collect();
        let (attn, mlp) = (CapturePoint::AttnOut, CapturePoint::MlpHidden);
        assert_eq!(shortcuts, [(0, attn), (0, mlp), (1, attn), (1, mlp)]);
    }

    #[test]
    fn norms_with_a_mean_become_biases() {
        let source = open("tiny/opt");
        let sliced = SlicedModel::in_blocks(&source, 24, false, DType::F32).unwrap();
        assert_eq!(shape(&sliced, "lm_head.bias"), Some(vec![96]));
        assert_eq!(shape(&sliced, "model.decoder.layers.0.fc1.bias"), Some(vec![96]));
        assert_eq!(shape(&sliced, "model.decoder.layers.1.fc2.bias"), Some(vec![32]));
        assert!(sliced.tensors.iter().all(|(name, ..)| !name.ends_with("layer_norm.bias")));
        assert!(sliced.config.has_bias(Role::QProj));
    }

    #[test]
    fn records_of_earlier_conversions_go_and_other_keys_stay() {
        let (_dir, source) = edited("tiny/llama-gqa", |config| {
            config["sparsepack"] = json!({ "method": "wanda", "zeroed": 7 });
            config["of_the_user"] = json!([1, 2]);
        });
        let sliced = SlicedModel::shared(&source, 24, DType::F32).unwrap();
        assert!(sliced.json.get("sparsepack").is_none());
        assert_eq!(sliced.json["of_the_user"], json!([1, 2]));
    }

    fn refused(result: Result<SlicedModel>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn what_cannot_be_sliced_says_why_and_what_can_be_done() {
        let opt = open("tiny/opt");
        assert_eq!(
            refused(SlicedModel::shared(&opt, 24, DType::F32)),
            "cannot slice: OPTForCausalLM has heads of hidden_size / num_attention_heads columns, so \
             that its hidden size cannot change alone; use --basis block"
        );
        let (_dir, others) = edited("tiny/qwen2", |config| config["num_hidden_layers"] = 1.into());
        assert_eq!(
            refused(SlicedModel::shared(&others, 24, DType::F32)),
            "cannot slice: Qwen2ForCausalLM has no tensor \
             `model.layers.1.input_layernorm.weight`, so what slicing makes of it is unknown"
        );
        let llama = open("tiny/llama-gqa");
        let sliced = SlicedModel::in_blocks(&llama, 24, false, DType::F32).unwrap();
        let sliced = llama.outline(&sliced, DType::F32, Path::new("nowhere")).unwrap();
        for again in [
            SlicedModel::in_blocks(&sliced, 16, false, DType::F32),
            SlicedModel::shared(&sliced, 16, DType::F32),
        ] {
            assert_eq!(
                refused(again),
                "cannot slice: SlicedLlamaForCausalLM was sliced before, with a basis for each block; \
                 slice the model that it was made from"
            );
        }
    }
}
