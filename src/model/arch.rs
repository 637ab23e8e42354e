//! Architectures as data: one TOML table a family says how its tensors and configuration keys are
//! called and which kinds of norm, MLP and positions it has. Code looks at the kinds only.

use std::sync::LazyLock;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::error::{ModelError, Result};
use super::roles::{CapturePoint, Role, Space};

/// The tables, in the order in which a GGUF architecture is looked up: Llama before Mistral, whose
/// GGUF files say `llama` too.
const TABLES: [&str; 4] = [
    include_str!("arch/llama.toml"),
    include_str!("arch/mistral.toml"),
    include_str!("arch/qwen2.toml"),
    include_str!("arch/opt.toml"),
];

#[expect(clippy::expect_used, reason = "the tables are part of the program; a test parses each")]
static ARCHITECTURES: LazyLock<Vec<Architecture>> = LazyLock::new(|| {
    let tables = TABLES.iter();
    let stock: Vec<Architecture> =
        tables.map(|text| toml::from_str(text).expect("a valid architecture table")).collect();
    let sliced: Vec<Architecture> = stock.iter().map(Architecture::sliced).collect();
    stock.into_iter().chain(sliced).collect()
});

/// Kind of normalization.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormKind {
    /// Root mean square, with a gain.
    Rms,
    /// Mean and variance, with a gain and a bias.
    Layer,
}

/// Kind of MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MlpKind {
    /// `down(activation(gate(x)) · up(x))`.
    Gated,
    /// `down(activation(up(x)))`.
    Plain,
}

/// How a model knows positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Positions {
    /// Rotary embeddings of queries and keys.
    Rope,
    /// A learned vector per position, added to the token's embedding.
    Learned {
        /// Row of the table that belongs to position 0.
        offset: usize,
    },
}

/// What the class of a family in transformers makes of a hidden size that is not
/// `num_attention_heads × head_dim` (checked with transformers 5.17).
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StockWidth {
    /// Takes it.
    Any,
    /// Takes it where the heads divide it.
    Heads {
        /// Name of a family that computes the same, without biases, and takes any.
        otherwise: String,
    },
    /// Computes `head_dim` from it.
    Fixed,
}

/// Whether a linear has a bias.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BiasRule {
    /// No.
    Never,
    /// Yes.
    Always,
    /// When this configuration key is true.
    Key(String),
}

/// One family of models.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Architecture {
    /// Our name, e.g. `llama`.
    pub name: String,
    /// Class in `architectures` of a config.json, e.g. `LlamaForCausalLM`.
    pub hf_class: String,
    /// `model_type` of a config.json.
    pub model_type: String,
    /// `general.architecture` of a GGUF file, where GGUF has this family.
    pub gguf: Option<String>,
    /// Kind of every norm.
    pub norm: NormKind,
    /// Kind of every MLP.
    pub mlp: MlpKind,
    /// Kind of positions.
    pub positions: Positions,
    /// What the stock class makes of a hidden size that is not all heads together.
    pub stock_width: StockWidth,
    /// Epsilon of the norms where no configuration key holds it.
    pub fixed_norm_eps: Option<f32>,
    /// Configuration keys whose names differ between families.
    pub keys: ConfigKeys,
    /// Values of configuration keys that a config.json may omit.
    pub defaults: Map<String, Value>,
    /// Values that the forward pass relies on.
    #[serde(default)]
    pub requires: Vec<Requirement>,
    /// Token embeddings.
    pub embed: TableSpec,
    /// Position embeddings, of learned positions.
    pub position_embed: Option<TableSpec>,
    /// Norm before attention.
    pub attn_norm: NormSpec,
    /// Norm before the MLP.
    pub mlp_norm: NormSpec,
    /// Norm after the last block.
    pub final_norm: NormSpec,
    /// Output matrix; the embeddings serve where they are tied.
    pub lm_head: TableSpec,
    /// Whether the output matrix has a bias.
    #[serde(skip)]
    pub lm_head_bias: bool,
    /// Matrices that turn the residual stream before it is added to, of a sliced family.
    #[serde(skip)]
    pub shortcuts: Option<Shortcuts>,
    /// The linears of a block, in the order in which it applies them.
    pub linears: Vec<LinearSpec>,
}

/// Configuration keys whose names differ between families.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigKeys {
    /// Width inside the MLP.
    pub intermediate_size: String,
    /// Activation function.
    pub activation: String,
    /// Epsilon of the norms.
    pub norm_eps: Option<String>,
    /// Width of the attention window, for families that have one.
    pub sliding_window: Option<String>,
    /// Width of the embeddings, which must equal `hidden_size`.
    pub embed_width: Option<String>,
}

/// A configuration key that must have one value, which is also what its absence means.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Requirement {
    /// The key.
    pub key: String,
    /// The only value that the forward pass does.
    pub value: Value,
}

/// The matrices on the shortcuts of a block whose attention and MLP have bases of their own. Names are
/// without `.weight` and hold `{block}`.
#[derive(Debug, Clone)]
pub struct Shortcuts {
    /// Past the attention.
    pub attn: String,
    /// Past the MLP.
    pub mlp: String,
}

/// A matrix outside the blocks. Names are without `.weight`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TableSpec {
    /// Hugging Face name.
    pub name: String,
    /// GGUF name.
    pub gguf: Option<String>,
}

/// A norm. Names are without `.weight` and may hold `{block}`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NormSpec {
    /// Hugging Face name.
    pub name: String,
    /// Whether there is a bias beside the gain.
    #[serde(default)]
    pub bias: bool,
    /// GGUF name.
    pub gguf: Option<String>,
}

/// A linear of a block. Names are without `.weight` and hold `{block}`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinearSpec {
    /// What it does.
    pub role: Role,
    /// Hugging Face name.
    pub name: String,
    /// Space of its inputs.
    pub in_space: Space,
    /// Space of its outputs.
    pub out_space: Space,
    /// Where its inputs are observed.
    pub capture: CapturePoint,
    /// Whether it has a bias.
    pub bias: BiasRule,
    /// GGUF name.
    pub gguf: Option<String>,
    /// Whether a GGUF file has its rows in the order of ggml's interleaved rope.
    #[serde(default)]
    pub gguf_permuted: bool,
}

/// `name` with the block's number in place of `{block}`.
pub(crate) fn in_block(name: &str, block: usize) -> String {
    name.replace("{block}", &block.to_string())
}

impl LinearSpec {
    /// Hugging Face name in block `block`, without `.weight`: what selectors match.
    pub fn module(&self, block: usize) -> String {
        in_block(&self.name, block)
    }

    /// Hugging Face name of the weight in block `block`.
    pub fn weight(&self, block: usize) -> String {
        in_block(&self.name, block) + ".weight"
    }

    /// Hugging Face name that a bias has in block `block`.
    pub fn bias(&self, block: usize) -> String {
        in_block(&self.name, block) + ".bias"
    }
}

impl NormSpec {
    /// Hugging Face name of the gain in block `block`, which a norm outside the blocks ignores.
    pub fn weight(&self, block: usize) -> String {
        in_block(&self.name, block) + ".weight"
    }

    /// Hugging Face name of the bias, if the norm has one.
    pub fn bias(&self, block: usize) -> Option<String> {
        self.bias.then(|| in_block(&self.name, block) + ".bias")
    }
}

impl TableSpec {
    /// Hugging Face name of the matrix.
    pub fn weight(&self) -> String {
        format!("{}.weight", self.name)
    }
}

impl Architecture {
    /// Every supported architecture.
    pub fn all() -> &'static [Self] {
        &ARCHITECTURES
    }

    /// Those that checkpoints come in.
    fn stock() -> impl Iterator<Item = &'static Self> {
        Self::all().iter().filter(|arch| arch.shortcuts.is_none())
    }

    /// The architecture of a config.json: by `architectures`, or by `model_type` where that is
    /// missing.
    ///
    /// # Errors
    /// [`ModelError::UnsupportedArchitecture`] naming it and the supported ones.
    pub fn for_hf(config: &Value) -> Result<&'static Self> {
        let class = config.pointer("/architectures/0").and_then(Value::as_str);
        let model_type = config.get("model_type").and_then(Value::as_str);
        let found = match (class, model_type) {
            (Some(class), _) => Self::all().iter().find(|arch| arch.hf_class == class),
            (None, Some(name)) => Self::all().iter().find(|arch| arch.model_type == name),
            (None, None) => {
                return Err(ModelError::MissingKey {
                    key: "architectures".to_owned(),
                    expected: "a list with one class name",
                });
            }
        };
        found.ok_or_else(|| ModelError::UnsupportedArchitecture {
            found: class.or(model_type).unwrap_or_default().to_owned(),
            supported: list(Self::stock().map(|arch| arch.hf_class.as_str())),
        })
    }

    /// The architecture that a GGUF file calls `name` in `general.architecture`.
    ///
    /// # Errors
    /// [`ModelError::UnsupportedArchitecture`] naming it and the supported ones.
    pub fn for_gguf(name: &str) -> Result<&'static Self> {
        let mut supported: Vec<&str> =
            Self::all().iter().filter_map(|arch| arch.gguf.as_deref()).collect();
        supported.dedup();
        Self::all().iter().find(|arch| arch.gguf.as_deref() == Some(name)).ok_or_else(|| {
            ModelError::UnsupportedArchitecture {
                found: name.to_owned(),
                supported: list(supported.iter().copied()),
            }
        })
    }

    /// The family of a model of this one that is sliced with a basis for each block: no stock class,
    /// the same names, norms without mean and bias, matrices on the shortcuts.
    fn sliced(&self) -> Self {
        let attn = &self.linears[0].name;
        let block = attn.split_once("{block}").map_or("", |(before, _)| before).to_owned();
        let shortcut = |name: &str| format!("{block}{{block}}.{name}_shortcut");
        let stock = |norm: &NormSpec| NormSpec { bias: false, gguf: None, ..norm.clone() };
        let folds_bias = self.norm == NormKind::Layer;
        let linear = |linear: &LinearSpec| LinearSpec {
            bias: if folds_bias { BiasRule::Always } else { linear.bias.clone() },
            gguf: None,
            ..linear.clone()
        };
        let mut keys = self.keys.clone();
        keys.norm_eps.get_or_insert_with(|| "norm_eps".to_owned());
        let mut defaults = self.defaults.clone();
        defaults.insert("tie_word_embeddings".to_owned(), false.into());
        Self {
            name: format!("sliced-{}", self.name),
            hf_class: format!("Sliced{}", self.hf_class),
            model_type: format!("sliced_{}", self.model_type),
            gguf: None,
            norm: NormKind::Rms,
            fixed_norm_eps: None,
            stock_width: StockWidth::Any,
            keys,
            defaults,
            attn_norm: stock(&self.attn_norm),
            mlp_norm: stock(&self.mlp_norm),
            final_norm: stock(&self.final_norm),
            lm_head_bias: folds_bias,
            linears: self.linears.iter().map(linear).collect(),
            shortcuts: Some(Shortcuts { attn: shortcut("attn"), mlp: shortcut("mlp") }),
            ..self.clone()
        }
    }

    /// The family of models of this one that are sliced with a basis for each block.
    pub fn in_blocks(&self) -> Option<&'static Self> {
        let name = format!("sliced-{}", self.name);
        Self::all().iter().find(|arch| arch.name == name)
    }

    /// The linear with this role, if the family has it.
    pub fn linear(&self, role: Role) -> Option<&LinearSpec> {
        self.linears.iter().find(|linear| linear.role == role)
    }

    /// The linears whose inputs are observed at `point`: one stage of a block.
    pub fn stage(&self, point: CapturePoint) -> impl Iterator<Item = &LinearSpec> {
        self.linears.iter().filter(move |linear| linear.capture == point)
    }
}

fn list<'a>(names: impl Iterator<Item = &'a str>) -> String {
    names.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_table_parses_and_describes_a_whole_block() {
        for (text, arch) in TABLES.iter().zip(Architecture::all()) {
            assert!(toml::from_str::<Architecture>(text).is_ok());
            let roles: Vec<Role> = arch.linears.iter().map(|linear| linear.role).collect();
            let expected: Vec<Role> = Role::ALL
                .into_iter()
                .filter(|role| arch.mlp == MlpKind::Gated || *role != Role::GateProj)
                .collect();
            assert_eq!(roles, expected, "{}", arch.name);
            for linear in &arch.linears {
                let wanted = match linear.role {
                    Role::QProj | Role::KProj => (Space::Residual, Space::Qk, CapturePoint::AttnIn),
                    Role::VProj => (Space::Residual, Space::V, CapturePoint::AttnIn),
                    Role::OProj => (Space::V, Space::Residual, CapturePoint::AttnOut),
                    Role::GateProj | Role::UpProj => {
                        (Space::Residual, Space::Mlp, CapturePoint::MlpIn)
                    }
                    Role::DownProj => (Space::Mlp, Space::Residual, CapturePoint::MlpHidden),
                };
                assert_eq!((linear.in_space, linear.out_space, linear.capture), wanted);
                assert_eq!(linear.gguf.is_some(), arch.gguf.is_some());
                assert!(linear.name.contains("{block}") && !linear.name.ends_with(".weight"));
            }
            assert_eq!(arch.norm == NormKind::Layer, arch.final_norm.bias, "{}", arch.name);
            assert_eq!(
                matches!(arch.positions, Positions::Learned { .. }),
                arch.position_embed.is_some()
            );
            assert!(arch.keys.norm_eps.is_some() != arch.fixed_norm_eps.is_some());
        }
    }

    #[test]
    fn tables_refuse_unknown_fields() {
        let text = format!("surprise = 1\n{}", TABLES[0]);
        assert!(toml::from_str::<Architecture>(&text).is_err());
    }

    #[test]
    fn architectures_are_found_by_class_then_by_model_type() {
        let name = |config: Value| Architecture::for_hf(&config).map(|arch| arch.name.as_str());
        assert_eq!(name(json!({"architectures": ["OPTForCausalLM"]})).unwrap(), "opt");
        assert_eq!(name(json!({"model_type": "qwen2"})).unwrap(), "qwen2");
        let other = json!({"architectures": ["LlamaForSequenceClassification"],
                           "model_type": "llama"});
        assert_eq!(
            name(other).unwrap_err().to_string(),
            "unsupported architecture `LlamaForSequenceClassification`; supported: \
             LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, OPTForCausalLM"
        );
        assert!(matches!(name(json!({})), Err(ModelError::MissingKey { .. })));
        assert_eq!(Architecture::for_gguf("llama").unwrap().name, "llama");
        assert_eq!(
            Architecture::for_gguf("mamba").unwrap_err().to_string(),
            "unsupported architecture `mamba`; supported: llama, qwen2"
        );
    }
}
