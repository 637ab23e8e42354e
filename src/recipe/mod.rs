//! What a user asks for: a recipe in TOML (or the manifest of a finished run), and its flags.
//!
//! Unknown keys are errors, and so is a selector that matches nothing.

mod percent;
mod selector;

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use sparsepack_formats::{DType, GgmlType};

pub use percent::{ParsePercentError, Percent};
pub use selector::{BlockRange, ParseSelectorError, Selector};

use crate::compress::{
    Basis, Candidate, Choice, Correction, Damping, GroupSize, Method, Quantizer, ScaleSearch,
    Scheme, SolverOptions, Sparsity,
};

/// A whole recipe. Every part may be left out.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Recipe {
    /// How the residual stream is made narrower, before anything else.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slice: Option<SliceRecipe>,
    /// How linears are pruned unless a rule says otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prune: Option<PruneRecipe>,
    /// How linears are rounded unless a rule says otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quantize: Option<QuantizeRecipe>,
    /// A size to reach, in the place of both.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub budget: Option<BudgetRecipe>,
    /// How layers are solved, whatever is done to them.
    pub solver: SolverRecipe,
    /// Exceptions, first match wins.
    #[serde(rename = "rule", skip_serializing_if = "Vec::is_empty")]
    pub rules: Vec<Rule>,
    /// What solvers learn from.
    pub calibration: CalibrationRecipe,
    /// What is written.
    pub output: OutputRecipe,
}

/// How much narrower the residual stream becomes, and in which basis.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SliceRecipe {
    /// Fraction of the hidden size to leave out; or `width`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fraction: Option<Percent>,
    /// Hidden size to keep; or `fraction`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub width: Option<usize>,
    /// What a width that follows from a fraction is rounded down to a multiple of.
    #[serde(default = "SliceRecipe::default_multiple")]
    pub multiple: usize,
    /// `shared`, or `block`.
    #[serde(default)]
    pub basis: Basis,
    /// `least-squares`, which is for the shared basis and its default, or `none`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub correction: Option<Correction>,
    /// How strongly fitted weights are drawn towards those of a plain slice: a fraction of each
    /// feature's own energy, 0.3 by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub damp: Option<f64>,
    /// Slice the output matrix too, in the block basis; in the shared one it always is.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub head: bool,
}

impl SliceRecipe {
    /// 64: whole blocks of every ggml type but the K types.
    fn default_multiple() -> usize {
        64
    }

    /// Everything else by default.
    pub fn new(fraction: Option<Percent>, width: Option<usize>) -> Self {
        Self {
            fraction,
            width,
            multiple: Self::default_multiple(),
            basis: Basis::default(),
            correction: None,
            damp: None,
            head: false,
        }
    }
}

/// Method, target and order of pruning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PruneRecipe {
    /// `sparsegpt`, `wanda` or `magnitude`.
    pub method: Method,
    /// `2:4`, `4:8`, ... or a percentage like `50%`.
    pub sparsity: Sparsity,
    /// Which layers; all linears of the decoder blocks by default.
    #[serde(default = "Selector::all_linears")]
    pub targets: Vec<Selector>,
    /// Which of them stay dense.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ignore: Vec<Selector>,
}

impl PruneRecipe {
    /// Every linear of the decoder blocks.
    pub fn new(method: Method, sparsity: Sparsity) -> Self {
        Self { method, sparsity, targets: Selector::all_linears(), ignore: Vec::new() }
    }
}

/// Grid and method of rounding.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QuantizeRecipe {
    /// `int4`, `f8_e4m3`, `q4_0`, ...
    pub scheme: Scheme,
    /// `gptq`, or `rtn` to round to nearest.
    #[serde(default)]
    pub method: Quantizer,
    /// Columns that share a scale, or `channel`; by default 128, and a whole row for 8 bits. For
    /// integers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group_size: Option<GroupSize>,
    /// Integers have zero points of their own.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub asymmetric: bool,
    /// How scales of integers (and of `q8_0`, `q5_0` and `q4_0`) are chosen; `mse` by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scales: Option<ScaleSearch>,
    /// Round the columns in the order of descending `diag H`, after pruning; `false`: as they stand,
    /// in the sweep that prunes. By default `true` with `gptq`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub act_order: Option<bool>,
    /// Which layers; all linears of the decoder blocks by default.
    #[serde(default = "Selector::all_linears")]
    pub targets: Vec<Selector>,
    /// Which of them stay as they are.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ignore: Vec<Selector>,
}

impl QuantizeRecipe {
    /// Every linear of the decoder blocks, everything else by default.
    pub fn new(scheme: Scheme) -> Self {
        Self {
            scheme,
            method: Quantizer::default(),
            group_size: None,
            asymmetric: false,
            scales: None,
            act_order: None,
            targets: Selector::all_linears(),
            ignore: Vec::new(),
        }
    }
}

/// A size that the linears of the blocks are to reach; each gets what costs its output least.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BudgetRecipe {
    /// Stored bits per weight of all linears, scales and positions included.
    pub target_bits: f64,
    /// What layers may become; by default a choice of what the format holds.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub candidates: Vec<Candidate>,
    /// Columns that share a scale, of integers narrower than 8 bits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group_size: Option<GroupSize>,
}

impl BudgetRecipe {
    /// The group size of a scheme, where it is the budget's to say.
    pub fn group_of(&self, scheme: Scheme) -> Option<GroupSize> {
        self.group_size.filter(|_| matches!(scheme, Scheme::Int(bits) if bits < 8))
    }
}

/// How layers are solved. What no layer's method uses is refused.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SolverRecipe {
    /// Only these decoder blocks, for trials; all by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blocks: Option<BlockRange>,
    /// Order of capture and solving inside a block, for methods that look at inputs; `true` by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sequential: Option<Sequential>,
    /// Damping of the Hessian as a fraction of what `damping` says; 0.1 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub damp: Option<f64>,
    /// Damping in proportion to each feature's entry of the Hessian's diagonal, by default, or to their
    /// mean.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub damping: Option<Damping>,
    /// Columns between lazy updates of `sparsegpt` and `gptq`; 128 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub column_block: Option<usize>,
}

impl SolverRecipe {
    /// What the solvers are told.
    pub fn options(&self) -> SolverOptions {
        let default = SolverOptions::default();
        SolverOptions {
            damp: self.damp.unwrap_or(default.damp),
            damping: self.damping.unwrap_or(default.damping),
            column_block: self.column_block.unwrap_or(default.column_block),
            ..default
        }
    }
}

/// Order of capture and solving inside a block.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Sequential {
    /// Stage by stage: linears that share an input are solved before the next input is captured.
    #[default]
    True,
    /// The whole block is captured dense, then all its linears are solved (the reference's order).
    Block,
}

/// An exception for some layers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Which layers; every selector must match one.
    pub targets: Vec<Selector>,
    /// Another method.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub method: Option<Method>,
    /// Another sparsity, or `none`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sparsity: Option<Choice<Sparsity>>,
    /// Another grid, or `none`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantize: Option<Choice<Scheme>>,
    /// Another group of columns that share a scale.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group_size: Option<GroupSize>,
    /// Leave the layers as they are.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dense: bool,
}

/// What solvers learn from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CalibrationRecipe {
    /// A `.txt` file, or `.jsonl` with a `text` key per line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// Number of windows.
    pub samples: usize,
    /// Tokens of a window.
    pub seq_len: usize,
    /// Random windows with this seed; in order from the start when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
}

impl Default for CalibrationRecipe {
    fn default() -> Self {
        Self { file: None, samples: 128, seq_len: 2048, seed: None }
    }
}

/// What is written.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OutputRecipe {
    /// Container and encoding of pruned layers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<OutputFormat>,
    /// Element or block type of weights; the source's own where the container has it, else bf16.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dtype: Option<WeightDType>,
    /// Most bytes of tensors in a file; 4 GiB by default, and no limit for GGUF.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shard_size: Option<u64>,
    /// Accept block types that store most zeros of a pruned layer as small values.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub allow_zero_loss: bool,
    /// Compression level of `zst`, 1 to 19; 1 by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 19))]
    pub level: Option<i32>,
}

/// Container and encoding of pruned layers.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum OutputFormat {
    /// Plain Hugging Face directory, zeros stored; loads everywhere.
    Safetensors,
    /// Safetensors shards with sparse layers as kept values and their positions.
    Packed,
    /// 2:4 layers as the packed values and metadata of `PyTorch`'s CUTLASS semi-structured tensors.
    TorchCutlass,
    /// Legacy: sparse layers as compressed-tensors 0.9 to 0.14 stored them; read with transformers 4.57.
    CompressedTensors,
    /// One GGUF file (or the files of a split) for llama.cpp and its relatives.
    Gguf,
    /// One file of zstd frames, for archives and downloads; unpack gives the safetensors back.
    Zst,
}

impl OutputFormat {
    /// Every format, as the command line lists them.
    pub const ALL: [Self; 6] = [
        Self::Safetensors,
        Self::Packed,
        Self::TorchCutlass,
        Self::CompressedTensors,
        Self::Gguf,
        Self::Zst,
    ];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Safetensors => "safetensors",
            Self::Packed => "packed",
            Self::TorchCutlass => "torch-cutlass",
            Self::CompressedTensors => "compressed-tensors",
            Self::Gguf => "gguf",
            Self::Zst => "zst",
        }
    }

    /// Who reads a format that is not for everyone, in words; `quantized` where it holds codes on a
    /// grid.
    pub fn readers(self, quantized: bool) -> Option<&'static str> {
        match self {
            Self::CompressedTensors if quantized => Some(
                "transformers with a current compressed-tensors (checked with transformers 5.17 and \
                 compressed-tensors 0.20); sparsepack",
            ),
            Self::Safetensors | Self::Packed => None,
            Self::Gguf => Some("llama.cpp and what else reads its files"),
            Self::Zst => Some("sparsepack; unpack gives plain files back"),
            Self::TorchCutlass => Some(
                "components for PyTorch's SparseSemiStructuredTensorCUTLASS (checked with torch 2.10); \
                 no model loader reads them, sparsepack does",
            ),
            Self::CompressedTensors => Some(
                "legacy: read by compressed-tensors 0.9.2 to 0.14.0.1, sparse-24-bitmask also through \
                 transformers 4.57; later releases of either do not read it, sparsepack does",
            ),
        }
    }
}

/// Type of written weights: an element type, or a block type of GGUF files.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "snake")]
#[expect(non_camel_case_types, reason = "ggml's own spelling")]
pub enum WeightDType {
    /// bfloat16.
    Bf16,
    /// IEEE binary16.
    F16,
    /// IEEE binary32.
    F32,
    /// 8-bit float (e4m3) for the linears, without scales: weights below 2^-10 become zero, and
    /// above 464 are an error.
    #[serde(rename = "f8_e4m3")]
    #[value(name = "f8_e4m3")]
    F8E4m3,
    /// 8.5 bits a weight; keeps zeros.
    Q8_0,
    /// 5.5 bits a weight; keeps zeros.
    Q5_0,
    /// 4.5 bits a weight; keeps zeros.
    Q4_0,
    /// 6.6 bits a weight; keeps zeros.
    Q6_K,
    /// 5.5 bits a weight; moves zeros.
    Q5_K,
    /// 4.5 bits a weight; moves zeros.
    Q4_K,
    /// 3.4 bits a weight; keeps zeros.
    Q3_K,
    /// 2.6 bits a weight; moves zeros.
    Q2_K,
    /// 4.25 bits a weight, as floats of 4 bits; keeps zeros.
    Mxfp4,
}

impl WeightDType {
    /// The element type, unless it is a block type.
    pub const fn dense(self) -> Option<DType> {
        match self {
            Self::Bf16 => Some(DType::Bf16),
            Self::F16 => Some(DType::F16),
            Self::F32 => Some(DType::F32),
            Self::F8E4m3 => Some(DType::F8E4m3),
            _ => None,
        }
    }

    /// The type in a GGUF file, if it has it.
    pub const fn ggml(self) -> Option<GgmlType> {
        Some(match self {
            Self::F8E4m3 => return None,
            Self::Bf16 => GgmlType::BF16,
            Self::F16 => GgmlType::F16,
            Self::F32 => GgmlType::F32,
            Self::Q8_0 => GgmlType::Q8_0,
            Self::Q5_0 => GgmlType::Q5_0,
            Self::Q4_0 => GgmlType::Q4_0,
            Self::Q6_K => GgmlType::Q6_K,
            Self::Q5_K => GgmlType::Q5_K,
            Self::Q4_K => GgmlType::Q4_K,
            Self::Q3_K => GgmlType::Q3_K,
            Self::Q2_K => GgmlType::Q2_K,
            Self::Mxfp4 => GgmlType::MXFP4,
        })
    }
}

/// Why a recipe cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecipeError {
    /// The file cannot be read.
    #[error("{path}: cannot read the recipe")]
    Read {
        /// The recipe.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The TOML does not parse or has unknown keys.
    #[error("{path}: not a recipe")]
    Toml {
        /// The recipe.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// The JSON does not parse or has unknown keys.
    #[error("{path}: not a manifest with a recipe")]
    Json {
        /// The manifest.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A selector that matches no layer.
    #[error("selector `{selector}` in {place} matches no layer; layers are named like `{example}`")]
    NoMatch {
        /// The selector.
        selector: String,
        /// Where it stands.
        place: &'static str,
        /// A name that exists.
        example: String,
    },
    /// Options that contradict each other or have nothing to apply to.
    #[error("{what}")]
    Contradiction {
        /// What is wrong and what to do.
        what: String,
    },
}

impl Recipe {
    /// Reads a recipe: TOML, or the `manifest.json` of a finished run.
    ///
    /// # Errors
    /// [`RecipeError`] naming the file and the place.
    pub fn read(path: &Path) -> Result<Self, RecipeError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| RecipeError::Read { path: path.to_owned(), source })?;
        if text.trim_start().starts_with('{') {
            #[derive(Deserialize)]
            struct Manifest {
                recipe: Recipe,
            }
            let manifest: Manifest = serde_json::from_str(&text)
                .map_err(|source| RecipeError::Json { path: path.to_owned(), source })?;
            return Ok(manifest.recipe);
        }
        toml::from_str(&text)
            .map_err(|source| RecipeError::Toml { path: path.to_owned(), source: Box::new(source) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Recipe, toml::de::Error> {
        toml::from_str(text)
    }

    #[test]
    fn a_recipe_survives_json_and_back() {
        let recipe = parse(
            r#"
            [prune]
            method = "sparsegpt"
            sparsity = "2:4"
            ignore = ["re:.*down_proj$", "blocks:0..2"]
            [quantize]
            scheme = "int4"
            group_size = 64
            [[rule]]
            targets = ["down_proj"]
            sparsity = "50%"
            quantize = "int8"
            group_size = "channel"
            [[rule]]
            targets = ["q_proj"]
            sparsity = "none"
            [solver]
            sequential = "block"
            [calibration]
            file = "text.txt"
            samples = 32
            [output]
            format = "packed"
            dtype = "bf16"
            "#,
        )
        .unwrap();
        let prune = recipe.prune.as_ref().unwrap();
        assert_eq!((recipe.solver.damp, recipe.solver.options().column_block), (None, 128));
        assert_eq!(prune.targets, Selector::all_linears());
        let json = serde_json::to_string(&recipe).unwrap();
        assert_eq!(serde_json::from_str::<Recipe>(&json).unwrap(), recipe);
    }

    #[test]
    fn unknown_keys_and_values_are_named() {
        let error = |text| parse(text).unwrap_err().to_string();
        assert!(error("[prune]\nmethod = 'x'\nsparsity = '2:4'").contains("unknown variant `x`"));
        assert!(error("[calibration]\nsample = 3").contains("unknown field `sample`"));
        assert!(
            error("[prune]\nmethod = 'wanda'\nsparsity = '5:4'").contains("less than the group")
        );
    }
}
