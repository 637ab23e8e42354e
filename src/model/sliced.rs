//! What a model becomes when its residual stream gets narrower: class, configuration, tensors.

use serde_json::{Value, json};
use sparsepack_formats::{DType, ModelMetadata};

use super::arch::{Architecture, StockWidth};
use super::config::ModelConfig;
use super::error::{ModelError, Result};
use super::source::{ModelSource, TensorKind};

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
            StockWidth::Heads { otherwise } => same_without_that_rule(own, config, otherwise, width)?,
            StockWidth::Fixed => {
                return Err(refuse(
                    own,
                    format!(
                        "has heads of hidden_size / num_attention_heads columns, so that its hidden \
                         size cannot change alone; use --basis block"
                    ),
                ));
            }
        };
        let config = ModelConfig {
            hidden_size: width,
            norm_eps: config.norm_eps * config.hidden_size as f32 / width as f32,
            tie_word_embeddings: false,
            ..config.clone()
        };
        let json = overlay(source, config.to_hf_json(arch, dtype)?);
        let tensors = tensors(source, arch, &config)?;
        Ok(Self { arch, config, json, tensors })
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
        RECORDS.iter().for_each(|key| drop(out.remove(*key)));
        out.extend(sliced);
    }
    json
}

/// The tensors of a model with another width: those of the source, and an output matrix.
fn tensors(
    source: &ModelSource,
    arch: &Architecture,
    config: &ModelConfig,
) -> Result<Vec<(String, Vec<usize>, TensorKind)>> {
    let width = config.hidden_size;
    let mut all = Vec::new();
    for tensor in source.tensors() {
        let shape = match tensor.kind {
            TensorKind::Embedding | TensorKind::Positions | TensorKind::LmHead => {
                vec![tensor.shape[0], width]
            }
            TensorKind::BlockNorm { .. } | TensorKind::FinalNorm => vec![width],
            TensorKind::Linear { role, .. } => config.linear_shape(role).to_vec(),
            TensorKind::LinearBias { role, .. } => config.linear_shape(role)[..1].to_vec(),
            TensorKind::Other => {
                return Err(refuse(
                    source.arch(),
                    format!("has no tensor `{}`, so what slicing makes of it is unknown", tensor.name),
                ));
            }
        };
        all.push((tensor.name.clone(), shape, tensor.kind));
    }
    if source.config().tie_word_embeddings {
        let shape = vec![config.vocab_size, width];
        all.push((arch.lm_head.weight(), shape, TensorKind::LmHead));
    }
    Ok(all)
}

fn refuse(arch: &Architecture, why: String) -> ModelError {
    ModelError::CannotSlice { class: arch.hf_class.clone(), why }
}
