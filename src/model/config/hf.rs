//! `config.json` in and out, in the spelling of transformers 5 (`rope_parameters`, `dtype`) and of
//! the versions before (`rope_theta`, `rope_scaling`, `torch_dtype`).

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};
use sparsepack_formats::DType;

use super::super::arch::{Architecture, BiasRule, Positions};
use super::super::error::{ModelError, Result};
use super::super::rope::{Llama3Scaling, RopeConfig};
use super::{ModelConfig, shortest_f64};
use crate::backend::Activation;

/// Activations by the names that transformers gives them; of several, the first is written.
const ACTIVATIONS: [(&str, Activation); 7] = [
    ("silu", Activation::Silu),
    ("swish", Activation::Silu),
    ("relu", Activation::Relu),
    ("gelu", Activation::Gelu),
    ("gelu_pytorch_tanh", Activation::GeluTanh),
    ("gelu_new", Activation::GeluTanh),
    ("gelu_python_tanh", Activation::GeluTanh),
];

impl ModelConfig {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// A missing or senseless key, or a value that the forward pass does not do, each by name.
    pub fn from_hf(arch: &Architecture, config: &Value) -> Result<Self> {
        let keys = Keys { config, defaults: &arch.defaults };
        for requirement in &arch.requires {
            if keys.get(&requirement.key).is_some_and(|value| *value != requirement.value) {
                return Err(keys.unsupported(&requirement.key, requirement.value.to_string()));
            }
        }
        refuse_unsupported(&keys)?;
        let hidden_size = keys.size("hidden_size")?;
        if let Some(key) = &arch.keys.embed_width
            && keys.optional_size(key)?.is_some_and(|width| width != hidden_size)
        {
            return Err(keys.unsupported(key, format!("hidden_size = {hidden_size}")));
        }
        let heads = keys.size("num_attention_heads")?;
        let head_dim = match keys.optional_size("head_dim")? {
            Some(head_dim) => head_dim,
            None if heads > 0 && hidden_size.is_multiple_of(heads) => hidden_size / heads,
            None => {
                return Err(ModelError::InvalidValue {
                    key: "num_attention_heads".to_owned(),
                    found: heads.to_string(),
                    expected: format!("a divisor of hidden_size = {hidden_size}"),
                });
            }
        };
        let norm_eps = match (&arch.keys.norm_eps, arch.fixed_norm_eps) {
            (Some(key), _) => keys.number(key)? as f32,
            (None, eps) => eps.unwrap_or_default(),
        };
        let rope = match arch.positions {
            Positions::Rope => Some(read_rope(&keys)?),
            Positions::Learned { .. } => None,
        };
        let exit_size = match arch.shortcuts {
            Some(_) => keys.optional_size("exit_size")?,
            None => None,
        };
        let config = Self {
            hidden_size,
            exit_size,
            intermediate_size: keys.size(&arch.keys.intermediate_size)?,
            num_hidden_layers: keys.size("num_hidden_layers")?,
            num_attention_heads: heads,
            num_key_value_heads: keys.optional_size("num_key_value_heads")?.unwrap_or(heads),
            head_dim,
            vocab_size: keys.size("vocab_size")?,
            max_position_embeddings: keys.size("max_position_embeddings")?,
            norm_eps,
            activation: read_activation(&keys, &arch.keys.activation)?,
            rope,
            tie_word_embeddings: keys.flag("tie_word_embeddings")?,
            bos_token_id: keys.tokens("bos_token_id")?.first().copied(),
            eos_token_ids: keys.tokens("eos_token_id")?,
            sliding_window: match &arch.keys.sliding_window {
                Some(key) => keys.optional_size(key)?,
                None => None,
            },
            biases: read_biases(arch, |key| keys.flag(key))?,
        };
        config.validate(arch.positions)?;
        Ok(config)
    }

    /// The `config.json` of this model with weights of `dtype`, loadable by transformers 4 and 5.
    ///
    /// # Errors
    /// [`ModelError::RopeFactors`] when the rotary embeddings have no spelling there.
    pub fn to_hf_json(&self, arch: &Architecture, dtype: DType) -> Result<Value> {
        let mut out = Map::new();
        let mut put = |key: &str, value: Value| out.insert(key.to_owned(), value);
        put("architectures", json!([arch.hf_class]));
        put("model_type", json!(arch.model_type));
        put("hidden_size", json!(self.hidden_size));
        put(&arch.keys.intermediate_size, json!(self.intermediate_size));
        put("num_hidden_layers", json!(self.num_hidden_layers));
        put("num_attention_heads", json!(self.num_attention_heads));
        if arch.positions == Positions::Rope || arch.shortcuts.is_some() {
            put("num_key_value_heads", json!(self.num_key_value_heads));
            put("head_dim", json!(self.head_dim));
        }
        if let Some(size) = self.exit_size {
            put("exit_size", json!(size));
        }
        put("vocab_size", json!(self.vocab_size));
        put("max_position_embeddings", json!(self.max_position_embeddings));
        put(&arch.keys.activation, json!(activation_name(self.activation)));
        if let Some(key) = &arch.keys.norm_eps {
            put(key, json!(shortest_f64(self.norm_eps)));
        }
        if let Some(key) = &arch.keys.sliding_window {
            put(key, json!(self.sliding_window));
        }
        if let Some(key) = &arch.keys.embed_width {
            put(key, json!(self.hidden_size));
        }
        put("tie_word_embeddings", json!(self.tie_word_embeddings));
        put("bos_token_id", json!(self.bos_token_id));
        put(
            "eos_token_id",
            match self.eos_token_ids.as_slice() {
                [] => Value::Null,
                [token] => json!(token),
                tokens => json!(tokens),
            },
        );
        for linear in &arch.linears {
            if let BiasRule::Key(key) = &linear.bias {
                put(key, json!(self.has_bias(linear.role)));
            }
        }
        for requirement in &arch.requires {
            put(&requirement.key, requirement.value.clone());
        }
        if let Some(rope) = &self.rope {
            write_rope(rope, self.head_dim, &mut put)?;
        }
        let dtype = match dtype {
            DType::F16 => "float16",
            DType::Bf16 => "bfloat16",
            _ => "float32",
        };
        put("torch_dtype", json!(dtype));
        put("dtype", json!(dtype));
        Ok(Value::Object(out))
    }
}

/// Keys of any family that change what a forward pass computes.
fn refuse_unsupported(keys: &Keys<'_>) -> Result<()> {
    if keys
        .get("quantization_config")
        .is_some_and(sparsepack_formats::compressed_tensors::is_foreign)
    {
        return Err(keys.unsupported(
            "quantization_config",
            "weights without quantization, or quantized by compressed-tensors",
        ));
    }
    let types = keys.get("layer_types").and_then(Value::as_array);
    if types.is_some_and(|types| types.iter().any(|kind| kind != "full_attention")) {
        return Err(keys.unsupported("layer_types", "full_attention everywhere"));
    }
    let one = |value: &Value| value.as_f64() == Some(1.0);
    if keys.get("partial_rotary_factor").is_some_and(|value| !one(value)) {
        return Err(keys.unsupported("partial_rotary_factor", "1.0"));
    }
    Ok(())
}

fn read_activation(keys: &Keys<'_>, key: &str) -> Result<Activation> {
    let name = keys.text(key)?;
    ACTIVATIONS
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, kind)| *kind)
        .ok_or_else(|| keys.unsupported(key, ACTIVATIONS.map(|(name, _)| name).join(", ")))
}

fn activation_name(activation: Activation) -> &'static str {
    ACTIVATIONS.iter().find(|(_, kind)| *kind == activation).map_or("silu", |(name, _)| name)
}

/// The roles whose linears have a bias, where `flag` reads a configuration key.
pub(super) fn read_biases(
    arch: &Architecture,
    flag: impl Fn(&str) -> Result<bool>,
) -> Result<BTreeSet<super::Role>> {
    let mut biases = BTreeSet::new();
    for linear in &arch.linears {
        let has = match &linear.bias {
            BiasRule::Never => false,
            BiasRule::Always => true,
            BiasRule::Key(key) => flag(key)?,
        };
        if has {
            biases.insert(linear.role);
        }
    }
    Ok(biases)
}

/// Reads `rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` of before.
fn read_rope(keys: &Keys<'_>) -> Result<RopeConfig> {
    let parameters = keys.get("rope_parameters").or_else(|| keys.get("rope_scaling"));
    let Some(parameters) = parameters else {
        return Ok(RopeConfig { theta: keys.number("rope_theta")?, scaling: None, factors: None });
    };
    let none = Map::new();
    let inner = Keys { config: parameters, defaults: &none };
    let theta = match inner.get("rope_theta") {
        Some(_) => inner.number("rope_theta")?,
        None => keys.number("rope_theta")?,
    };
    refuse_unsupported(&inner)?;
    let kind = inner.get("rope_type").or_else(|| inner.get("type"));
    let scaling = match kind.map_or(Some("default"), Value::as_str) {
        Some("default") => None,
        Some("llama3") => Some(Llama3Scaling {
            factor: inner.number("factor")?,
            low_freq_factor: inner.number("low_freq_factor")?,
            high_freq_factor: inner.number("high_freq_factor")?,
            original_max_position_embeddings: inner.size("original_max_position_embeddings")?,
        }),
        _ => {
            return Err(ModelError::UnsupportedValue {
                key: "rope_type".to_owned(),
                found: kind.map(Value::to_string).unwrap_or_default(),
                supported: "default, llama3".to_owned(),
            });
        }
    };
    Ok(RopeConfig { theta, scaling, factors: None })
}

fn write_rope(
    rope: &RopeConfig,
    head_dim: usize,
    put: &mut impl FnMut(&str, Value) -> Option<Value>,
) -> Result<()> {
    let scaling = match &rope.factors {
        Some(factors) => rope.llama3_of_factors(factors, head_dim)?,
        None => rope.scaling,
    };
    put("rope_theta", json!(rope.theta));
    let Some(scaling) = scaling else {
        put("rope_scaling", Value::Null);
        put("rope_parameters", json!({"rope_type": "default", "rope_theta": rope.theta}));
        return Ok(());
    };
    let mut parameters = json!({
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    });
    put("rope_scaling", parameters.clone());
    parameters["rope_theta"] = json!(rope.theta);
    put("rope_parameters", parameters);
    Ok(())
}

/// A JSON object with defaults for absent keys. A key that is `null` counts as unset.
struct Keys<'a> {
    config: &'a Value,
    defaults: &'a Map<String, Value>,
}

impl<'a> Keys<'a> {
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.config.get(key).or_else(|| self.defaults.get(key)).filter(|value| !value.is_null())
    }

    fn unsupported(&self, key: &str, supported: impl Into<String>) -> ModelError {
        ModelError::UnsupportedValue {
            key: key.to_owned(),
            found: self.get(key).map(abbreviated).unwrap_or_default(),
            supported: supported.into(),
        }
    }

    fn required<T>(
        &self,
        key: &str,
        expected: &'static str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<T> {
        let value = self
            .get(key)
            .ok_or_else(|| ModelError::MissingKey { key: key.to_owned(), expected })?;
        convert(value).ok_or_else(|| ModelError::InvalidValue {
            key: key.to_owned(),
            found: abbreviated(value),
            expected: expected.to_owned(),
        })
    }

    fn size(&self, key: &str) -> Result<usize> {
        self.required(key, "a positive whole number", |value| {
            value.as_u64().and_then(|value| value.try_into().ok())
        })
    }

    fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        self.get(key).map(|_| self.size(key)).transpose()
    }

    fn number(&self, key: &str) -> Result<f64> {
        self.required(key, "a number", Value::as_f64)
    }

    fn flag(&self, key: &str) -> Result<bool> {
        self.required(key, "true or false", Value::as_bool)
    }

    fn text(&self, key: &str) -> Result<&'a str> {
        self.required(key, "a string", Value::as_str)
    }

    /// A token id, a list of them, or none.
    fn tokens(&self, key: &str) -> Result<Vec<u32>> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        if self.get(key).is_none() {
            return Ok(Vec::new());
        }
        self.required(key, "a token id or a list of them", |value| match value {
            Value::Array(ids) => ids.iter().map(id).collect(),
            one => id(one).map(|id| vec![id]),
        })
    }
}

/// A value as errors show it: an object of a hundred lines does not help.
fn abbreviated(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= 60 {
        return text;
    }
    text.chars().take(57).collect::<String>() + "..."
}

#[cfg(test)]
mod tests {
    use super::super::super::Role;
    use super::*;

    fn fixture(name: &str) -> (&'static Architecture, Value) {
        let path = format!("{}/fixtures/tiny/{name}/config.json", env!("CARGO_MANIFEST_DIR"));
        let config = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        (Architecture::for_hf(&config).unwrap(), config)
    }

    fn read(name: &str) -> ModelConfig {
        let (arch, config) = fixture(name);
        ModelConfig::from_hf(arch, &config).unwrap()
    }

    #[test]
    fn both_spellings_of_rope_are_read() {
        let plain = |theta| Some(RopeConfig { theta, scaling: None, factors: None });
        assert_eq!(read("llama-gqa").rope, plain(5000.0));
        assert_eq!(read("llama-mha-tied").rope, plain(100_000.0));
        assert_eq!(read("llama-mha-tied").head_dim, 12);
        let scaling = Some(Llama3Scaling {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 32,
        });
        assert_eq!(
            read("llama3-rope").rope,
            Some(RopeConfig { theta: 500.0, scaling, factors: None })
        );
        assert_eq!(read("opt").rope, None);
    }

    #[test]
    fn the_width_at_the_exit_survives_json_and_back() {
        for name in ["llama-gqa", "mistral", "qwen2", "opt"] {
            let (arch, config) = fixture(name);
            let sliced = arch.in_blocks().unwrap();
            for exit_size in [None, Some(40)] {
                let mut config = ModelConfig::from_hf(arch, &config).unwrap();
                (config.hidden_size, config.exit_size) = (20, exit_size);
                (config.norm_eps, config.tie_word_embeddings) = (2.5e-3, false);
                if sliced.lm_head_bias {
                    config.biases = sliced.linears.iter().map(|linear| linear.role).collect();
                }
                let json = config.to_hf_json(sliced, DType::F16).unwrap();
                assert_eq!(json.get("exit_size"), exit_size.map(|size| json!(size)).as_ref());
                assert!(std::ptr::eq(Architecture::for_hf(&json).unwrap(), sliced));
                assert_eq!(ModelConfig::from_hf(sliced, &json).unwrap(), config, "{name}");
                assert_eq!(config.exit_width(), exit_size.unwrap_or(20));
                let eps = 2.5e-3 * 20.0 / config.exit_width() as f32;
                assert!((config.exit_norm_eps() / eps - 1.0).abs() < 1e-6);
                for block in 0..2 {
                    let rows = if block == 1 { config.exit_width() } else { 20 };
                    assert_eq!(config.linear_shape_in(block, Role::DownProj)[0], rows);
                }
            }
            // A width of nothing is refused, and other families have no such key.
            let mut json = ModelConfig::from_hf(arch, &config).unwrap();
            json.exit_size = Some(0);
            let json = json.to_hf_json(sliced, DType::F32).unwrap();
            let error = ModelConfig::from_hf(sliced, &json).unwrap_err().to_string();
            assert!(error.starts_with("configuration key `exit_size` is 0"), "{error}");
        }
    }

    #[test]
    fn keys_that_differ_between_families_are_read() {
        let opt = read("opt");
        assert_eq!((opt.intermediate_size, opt.num_key_value_heads), (96, 4));
        assert_eq!((opt.activation, opt.norm_eps), (Activation::Relu, 1e-5));
        assert!(opt.tie_word_embeddings && opt.has_bias(Role::DownProj));
        let qwen = read("qwen2");
        assert!(qwen.has_bias(Role::VProj) && !qwen.has_bias(Role::OProj));
        let mistral = read("mistral");
        assert_eq!(mistral.linear_shape(Role::QProj), [64, 40]);
        assert_eq!(mistral.linear_shape(Role::KProj), [32, 40]);
        assert_eq!(mistral.linear_shape(Role::OProj), [40, 64]);
    }

    #[test]
    fn written_configurations_read_back_equal() {
        for name in ["llama-gqa", "llama3-rope", "llama-mha-tied", "mistral", "qwen2", "opt"] {
            let (arch, _) = fixture(name);
            let config = read(name);
            let json = config.to_hf_json(arch, DType::Bf16).unwrap();
            assert_eq!(Architecture::for_hf(&json).unwrap().name, arch.name);
            assert_eq!(ModelConfig::from_hf(arch, &json).unwrap(), config, "{name}");
            assert_eq!(json["torch_dtype"], "bfloat16");
        }
    }

    /// The error that one changed key gives.
    fn error(name: &str, key: &str, value: Value) -> String {
        let (arch, mut config) = fixture(name);
        if value.is_null() {
            config.as_object_mut().unwrap().remove(key);
        } else {
            config[key] = value;
        }
        ModelConfig::from_hf(arch, &config).unwrap_err().to_string()
    }

    #[test]
    fn what_the_forward_pass_does_not_do_is_refused_by_name() {
        for (name, key, value, supported) in [
            ("llama-gqa", "hidden_act", json!("quick_gelu"), "silu, swish, relu"),
            ("llama-gqa", "rope_parameters", json!({"rope_type": "yarn"}), "default, llama3"),
            (
                "llama-gqa",
                "quantization_config",
                json!({"quant_method": "gptq"}),
                "weights without",
            ),
            ("llama-gqa", "partial_rotary_factor", json!(0.5), "1.0"),
            ("qwen2", "use_sliding_window", json!(true), "false"),
            ("qwen2", "layer_types", json!(["sliding_attention"]), "full_attention"),
            ("opt", "do_layer_norm_before", json!(false), "true"),
            ("opt", "word_embed_proj_dim", json!(16), "hidden_size = 32"),
            ("opt", "_remove_final_layer_norm", json!(true), "false"),
        ] {
            let message = error(name, key, value);
            assert!(message.contains("which is not supported; supported: "), "{message}");
            assert!(message.contains(supported), "{message}");
        }
    }

    #[test]
    fn senseless_values_are_refused_by_name() {
        for (key, value, expected) in [
            ("hidden_size", json!(0), "`num_attention_heads`|`hidden_size` is 0"),
            ("hidden_size", json!(-4), "`hidden_size` is -4 (expected a positive whole number)"),
            ("hidden_size", json!(1u64 << 40), "`hidden_size` is 1099511627776 (expected 1 to"),
            ("hidden_size", json!(null), "`hidden_size` is missing (expected a positive whole"),
            ("num_key_value_heads", json!(3), "`num_key_value_heads` is 3 (expected a divisor of"),
            ("num_key_value_heads", json!(8), "`num_key_value_heads` is 8 (expected 1 to 4)"),
            ("head_dim", json!(7), "`head_dim` is 7 (expected an even number)"),
            ("vocab_size", json!("many"), "`vocab_size` is \"many\" (expected a positive whole"),
            ("rms_norm_eps", json!(-1.0), "`norm epsilon` is -1 (expected a number between"),
            ("eos_token_id", json!([1, "x"]), "(expected a token id or a list of them)"),
        ] {
            let message = error("llama-gqa", key, value);
            assert!(expected.split('|').any(|part| message.contains(part)), "{message}");
        }
    }

    #[test]
    fn a_sliding_window_limits_the_sequence_only() {
        let (arch, mut config) = fixture("mistral");
        config["sliding_window"] = json!(16);
        let config = ModelConfig::from_hf(arch, &config).unwrap();
        assert!(config.check_sequence(16).is_ok());
        assert_eq!(
            config.check_sequence(17).unwrap_err().to_string(),
            "a sequence of 17 tokens is longer than the model's 16 (sliding_window)"
        );
        assert!(read("mistral").check_sequence(128).is_ok());
        assert!(read("mistral").check_sequence(129).is_err());
    }
}
