//! What a model becomes when its residual stream gets narrower: class, configuration, tensors.

use serde_json::{Value, json};
use sparsepack_formats::{DType, ModelMetadata};

use super::arch::{Architecture, StockWidth};
use super::config::ModelConfig;
use super::error::{ModelError, Result};
use super::source::{ModelSource, TensorKind, expected};

/// Keys of a configuration that say what an earlier conversion did to the weights.
const RECORDS: [&str; 2] = ["quantization_config", "sparsepack"];

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
    /// [`ModelError::CannotSlice`] for a family, a width or a tensor for which there is no such model.
    pub fn shared(source: &ModelSource, width: usize, dtype: DType) -> Result<Self> {
        let (own, config) = (source.arch(), source.config());
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
        let Some(arch) = own.in_blocks() else {
            return Err(refuse(own, "was sliced before, with a basis for each block".to_owned()));
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
