//! The dimensions of a model by the keys of a GGUF file, in and out.

use sparsepack_formats::TensorIndex;
use sparsepack_formats::gguf::{GgufMetadata, GgufValue};

use super::super::arch::{Architecture, BiasRule, NormKind, Positions, in_block};
use super::super::error::{ModelError, Result};
use super::super::rope::RopeConfig;
use super::ModelConfig;
use super::hf::read_biases;
use crate::backend::Activation;

impl ModelConfig {
    /// Reads the keys of a GGUF file of architecture `arch`. What a GGUF file only says by its
    /// tensors (tied embeddings, biases, size of the vocabulary) is read from `tensors`.
    ///
    /// # Errors
    /// A missing or senseless key, or a value that the forward pass does not do, each by name.
    pub fn from_gguf(
        arch: &Architecture,
        metadata: &GgufMetadata,
        tensors: &TensorIndex,
    ) -> Result<Self> {
        let prefix = metadata.str("general.architecture")?;
        let key = |name: &str| format!("{prefix}.{name}");
        let size = |name: &str| {
            let value = metadata.u64(&key(name))?;
            usize::try_from(value).map_err(|_| invalid(&key(name), &value.to_string(), "a size"))
        };
        let optional_size = |name: &str| metadata.get(&key(name)).map(|_| size(name)).transpose();
        refuse_unsupported(metadata, &key)?;
        let hidden_size = size("embedding_length")?;
        let heads = size("attention.head_count")?;
        let head_dim = match optional_size("attention.key_length")? {
            Some(head_dim) => head_dim,
            None if heads > 0 && hidden_size.is_multiple_of(heads) => hidden_size / heads,
            None => {
                let expected = format!("a divisor of embedding_length = {hidden_size}");
                return Err(invalid(&key("attention.head_count"), &heads.to_string(), &expected));
            }
        };
        for name in ["attention.value_length", "rope.dimension_count"] {
            if let Some(found) = optional_size(name)?.filter(|found| *found != head_dim) {
                return Err(ModelError::UnsupportedValue {
                    key: key(name),
                    found: found.to_string(),
                    supported: format!("the head dimension, {head_dim}"),
                });
            }
        }
        let norm_eps = metadata.f32(&key(match arch.norm {
            NormKind::Rms => "attention.layer_norm_rms_epsilon",
            NormKind::Layer => "attention.layer_norm_epsilon",
        }))?;
        let rope = match (arch.positions, metadata.get(&key("rope.freq_base"))) {
            (Positions::Learned { .. }, _) => None,
            // llama.cpp's default.
            (Positions::Rope, None) => Some(10_000.0),
            (Positions::Rope, Some(_)) => Some(f64::from(metadata.f32(&key("rope.freq_base"))?)),
        };
        let table = arch.embed.gguf.as_deref().unwrap_or_default();
        let head = arch.lm_head.gguf.as_deref().unwrap_or_default();
        let rows = |name: &str| tensors.get(name).and_then(|info| info.shape.first().copied());
        let vocab_size = match (rows(&format!("{table}.weight")), optional_size("vocab_size")?) {
            (Some(rows), _) => rows,
            (None, Some(size)) => size,
            (None, None) => metadata.strings("tokenizer.ggml.tokens")?.len(),
        };
        let token = |name: &str| {
            let id = metadata.get(&format!("tokenizer.ggml.{name}_token_id"))?.as_u64()?;
            u32::try_from(id).ok()
        };
        let biased = |flag: &str| {
            Ok(arch.linears.iter().any(|linear| {
                let name = linear.gguf.as_deref().unwrap_or_default();
                linear.bias == BiasRule::Key(flag.to_owned())
                    && tensors.get(&(in_block(name, 0) + ".bias")).is_some()
            }))
        };
        let config = Self {
            hidden_size,
            exit_size: None,
            intermediate_size: size("feed_forward_length")?,
            num_hidden_layers: size("block_count")?,
            num_attention_heads: heads,
            num_key_value_heads: optional_size("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            vocab_size,
            max_position_embeddings: size("context_length")?,
            norm_eps,
            // GGUF has no key for it: llama.cpp computes SwiGLU for these architectures.
            activation: Activation::Silu,
            rope: rope.map(|theta| RopeConfig { theta, scaling: None, factors: None }),
            tie_word_embeddings: tensors.get(&format!("{head}.weight")).is_none(),
            bos_token_id: token("bos"),
            eos_token_ids: token("eos").into_iter().collect(),
            sliding_window: optional_size("attention.sliding_window")?,
            biases: read_biases(arch, biased)?,
        };
        config.validate(arch.positions)?;
        Ok(config)
    }
}

impl ModelConfig {
    /// Adds the keys of architecture `arch`, in the order of llama.cpp's converter.
    ///
    /// # Errors
    /// [`ModelError::NoGguf`] for a family that GGUF does not have; [`ModelError::UnsupportedValue`]
    /// for a setting that GGUF has no key for.
    pub fn put_gguf(&self, arch: &Architecture, metadata: &mut GgufMetadata) -> Result<()> {
        let Some(prefix) = &arch.gguf else {
            return Err(ModelError::NoGguf { architecture: arch.hf_class.clone() });
        };
        if self.activation != Activation::Silu {
            return Err(ModelError::UnsupportedValue {
                key: arch.keys.activation.clone(),
                found: format!("{:?}", self.activation).to_lowercase(),
                supported: "silu, which llama.cpp computes for this architecture".to_owned(),
            });
        }
        let mut put = |key: &str, value: usize| -> Result<()> {
            let number = u32::try_from(value).map_err(|_| {
                invalid(&format!("{prefix}.{key}"), &value.to_string(), "a number of 32 bits")
            })?;
            metadata.set(&format!("{prefix}.{key}"), GgufValue::U32(number));
            Ok(())
        };
        put("block_count", self.num_hidden_layers)?;
        put("context_length", self.max_position_embeddings)?;
        put("embedding_length", self.hidden_size)?;
        put("feed_forward_length", self.intermediate_size)?;
        put("attention.head_count", self.num_attention_heads)?;
        put("attention.head_count_kv", self.num_key_value_heads)?;
        put("attention.key_length", self.head_dim)?;
        put("attention.value_length", self.head_dim)?;
        put("vocab_size", self.vocab_size)?;
        if let Some(window) = self.sliding_window {
            put("attention.sliding_window", window)?;
        }
        if self.rope.is_some() {
            put("rope.dimension_count", self.head_dim)?;
        }
        let mut put = |key: &str, value: f32| {
            metadata.set(&format!("{prefix}.{key}"), GgufValue::F32(value));
        };
        if let Some(rope) = &self.rope {
            put("rope.freq_base", rope.theta as f32);
        }
        put(
            match arch.norm {
                NormKind::Rms => "attention.layer_norm_rms_epsilon",
                NormKind::Layer => "attention.layer_norm_epsilon",
            },
            self.norm_eps,
        );
        Ok(())
    }
}

/// Keys that change what a forward pass computes.
fn refuse_unsupported(metadata: &GgufMetadata, key: &impl Fn(&str) -> String) -> Result<()> {
    let unsupported = |name: &str, found: String, supported: &str| {
        Err(ModelError::UnsupportedValue { key: key(name), found, supported: supported.to_owned() })
    };
    match metadata.get(&key("expert_count")).and_then(GgufValue::as_u64) {
        None | Some(0) => {}
        Some(experts) => return unsupported("expert_count", experts.to_string(), "0 (dense)"),
    }
    match metadata.get(&key("rope.scaling.type")).and_then(GgufValue::as_str) {
        None | Some("none") => {}
        Some(found) => return unsupported("rope.scaling.type", found.to_owned(), "none"),
    }
    for name in ["rope.scale_linear", "rope.scaling.factor"] {
        match metadata.get(&key(name)).and_then(GgufValue::as_f32) {
            None | Some(0.0 | 1.0) => {}
            Some(found) => return unsupported(name, found.to_string(), "1"),
        }
    }
    Ok(())
}

fn invalid(key: &str, found: &str, expected: &str) -> ModelError {
    ModelError::InvalidValue {
        key: key.to_owned(),
        found: found.to_owned(),
        expected: expected.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn metadata(edit: &[(&str, GgufValue)]) -> GgufMetadata {
        let mut metadata = GgufMetadata::new(Path::new("m.gguf"));
        metadata.set("general.architecture", GgufValue::String("llama".to_owned()));
        for (key, value) in [
            ("context_length", 128),
            ("embedding_length", 32),
            ("block_count", 2),
            ("feed_forward_length", 96),
            ("attention.head_count", 4),
            ("vocab_size", 96),
        ] {
            metadata.set(&format!("llama.{key}"), GgufValue::U32(value));
        }
        metadata.set("llama.attention.layer_norm_rms_epsilon", GgufValue::F32(1e-5));
        for (key, value) in edit {
            metadata.set(&format!("llama.{key}"), value.clone());
        }
        metadata
    }

    fn read(edit: &[(&str, GgufValue)]) -> Result<ModelConfig> {
        let arch = Architecture::for_gguf("llama")?;
        ModelConfig::from_gguf(arch, &metadata(edit), &TensorIndex::default())
    }

    #[test]
    fn keys_that_a_file_may_omit_have_defaults() {
        let config = read(&[]).unwrap();
        assert_eq!((config.num_key_value_heads, config.head_dim, config.vocab_size), (4, 8, 96));
        assert_eq!(config.rope.map(|rope| rope.theta), Some(10_000.0));
        assert!(config.tie_word_embeddings, "there is no output.weight");
        assert_eq!((config.bos_token_id, config.sliding_window), (None, None));
    }

    #[test]
    fn defects_are_named_by_their_key() {
        let text = |value: &str| GgufValue::String(value.to_owned());
        for (key, value, expected) in [
            (
                "expert_count",
                GgufValue::U32(8),
                "`llama.expert_count` is 8, which is not supported",
            ),
            ("rope.scaling.type", text("yarn"), "`llama.rope.scaling.type` is yarn, which is not"),
            ("rope.dimension_count", GgufValue::U32(4), "supported: the head dimension, 8"),
            ("attention.head_count", GgufValue::U32(5), "(expected a divisor of embedding_length"),
            ("attention.head_count_kv", GgufValue::U32(3), "(expected a divisor of num_attention"),
            ("block_count", text("two"), "expected non-negative integer, found string"),
        ] {
            let message = read(&[(key, value)]).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
    }
}
