//! Which grid each linear is rounded to: by the scheme that a recipe wants, the container of the output,
//! and the matrix itself.

use serde::{Serialize, Serializer};
use sparsepack_formats::{DType, ModelMetadata, encoding::ggml::BlockGrid};

use super::{
    error::{PipelineError, Result},
    plan::contradiction,
};
use crate::{
    backend::Grid,
    compress::{GridOptions, GroupSize, Quantizer, Scheme},
    model::{ModelSource, ModelTensor},
    recipe::{OutputFormat, QuantizeRecipe, Recipe, WeightDType},
};

/// What a recipe wants a layer to be rounded to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct WantedScheme {
    pub(super) scheme: Scheme,
    pub(super) group_size: Option<GroupSize>,
}

/// How a layer is rounded.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Quantization {
    /// With or without error feedback.
    pub method: Quantizer,
    /// To which values.
    #[serde(serialize_with = "as_text")]
    pub grid: Grid,
    /// Columns are rounded in the order of descending `diag H`, after pruning.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub act_order: bool,
}

fn as_text<S: Serializer>(grid: &Grid, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_str(grid)
}

/// Finds the grids of a conversion.
#[derive(Debug)]
pub(super) struct Grids<'a> {
    source: &'a ModelSource,
    recipe: &'a Recipe,
    format: OutputFormat,
}

impl<'a> Grids<'a> {
    /// For an output of this format.
    ///
    /// # Errors
    /// Options that cannot apply to the scheme.
    pub(super) fn new(
        source: &'a ModelSource,
        recipe: &'a Recipe,
        format: OutputFormat,
    ) -> Result<Self> {
        if let Some(quantize) = &recipe.quantize {
            check_options(quantize)?;
        }
        Ok(Self { source, recipe, format })
    }

    /// The grid of a linear with `cols` columns; `None` where the scheme falls back to a type that is
    /// not rounded to.
    ///
    /// # Errors
    /// A scheme that the container does not hold; a group size that the scheme does not have.
    pub(super) fn of_layer(
        &self,
        module: &str,
        cols: usize,
        wanted: WantedScheme,
    ) -> Result<Option<Quantization>> {
        let Some(quantize) = &self.recipe.quantize else { return Ok(None) };
        let WantedScheme { scheme, group_size } = wanted;
        self.check_container(module, scheme)?;
        if quantize.scales.is_some() && !has_choice_of_scales(scheme) {
            return Err(contradiction(format!(
                "{module}: a way of choosing scales is for integers, q8_0, q5_0 and q4_0; {scheme} has \
                 its own"
            )));
        }
        if group_size.is_some() && !matches!(scheme, Scheme::Int(_)) {
            return Err(contradiction(format!(
                "{module}: a group size is for integers; {scheme} has its own"
            )));
        }
        let scheme = match scheme {
            Scheme::Block(ty) => Scheme::Block(ty.fallback(cols)),
            other => other,
        };
        let options = GridOptions {
            group_size,
            symmetric: !quantize.asymmetric,
            scales: quantize.scales.unwrap_or_default(),
        };
        let tensor = self.source.tensor(&format!("{module}.weight"))?;
        let scale = element_type(self.source, self.recipe, tensor);
        let grid = scheme.grid(options, scale);
        let act_order = quantize.act_order.unwrap_or(quantize.method == Quantizer::Gptq);
        Ok(grid.map(|grid| Quantization { method: quantize.method, grid, act_order }))
    }

    /// Whether the source says that zeros of the linear `module` were made by pruning.
    pub(super) fn was_pruned(&self, module: &str) -> bool {
        let tensor = self.source.tensor(&format!("{module}.weight"));
        tensor.is_ok_and(|tensor| was_pruned(self.source, tensor))
    }

    fn check_container(&self, module: &str, scheme: Scheme) -> Result<()> {
        let (fits, expected) = match self.format {
            OutputFormat::Gguf => (
                matches!(scheme, Scheme::Block(_)),
                "a block type (q8_0, q6_k, q5_0, q5_k, q4_0, q4_k, q3_k, q2_k)",
            ),
            OutputFormat::Packed => (matches!(scheme, Scheme::Int(_)), "int2 to int8"),
            OutputFormat::CompressedTensors => {
                (!matches!(scheme, Scheme::Block(_)), "int2 to int8 or f8_e4m3")
            }
            OutputFormat::Safetensors | OutputFormat::TorchCutlass | OutputFormat::Zst => (
                false,
                "no quantization: it holds plain values; give --format packed, compressed-tensors or \
                 gguf (a packed directory can be compressed afterwards)",
            ),
        };
        if fits {
            return Ok(());
        }
        Err(PipelineError::Unsupported {
            format: self.format.name(),
            why: format!("{module} is to be {scheme}; expected {expected}"),
        })
    }
}

fn has_choice_of_scales(scheme: Scheme) -> bool {
    match scheme {
        Scheme::Int(_) => true,
        Scheme::F8E4m3 => false,
        Scheme::Block(ty) => BlockGrid::of(ty).is_some_and(|grid| grid.scales.is_none()),
    }
}

fn check_options(quantize: &QuantizeRecipe) -> Result<()> {
    let integers = matches!(quantize.scheme, Scheme::Int(_));
    let stray =
        [("asymmetric", quantize.asymmetric), ("a group size", quantize.group_size.is_some())];
    if let Some((what, _)) = stray.into_iter().find(|(_, given)| *given && !integers) {
        return Err(contradiction(format!(
            "{what} is for integers; {} has its own way",
            quantize.scheme
        )));
    }
    if quantize.act_order == Some(true) && quantize.method == Quantizer::Rtn {
        return Err(contradiction(
            "act-order is the order in which gptq takes columns; rtn rounds them all at once"
                .into(),
        ));
    }
    Ok(())
}

/// Type of scales, and of the values that codes stand for: the type of weights that is asked for, or
/// the tensor's own, bf16 where that is a mixed file's or too narrow.
pub(super) fn element_type(source: &ModelSource, recipe: &Recipe, tensor: &ModelTensor) -> DType {
    let asked = recipe.output.dtype.and_then(WeightDType::dense);
    let gguf = matches!(source.reader().metadata(), ModelMetadata::Gguf(_));
    let own = tensor.encoding.value_dtype();
    match asked.unwrap_or(if gguf { DType::Bf16 } else { own }) {
        dtype @ (DType::F32 | DType::F16) => dtype,
        _ => DType::Bf16,
    }
}

/// Whether the source says that a tensor's zeros were made by pruning: it is stored packed, or
/// `config.json` has a record of a run that pruned.
pub(super) fn was_pruned(source: &ModelSource, tensor: &ModelTensor) -> bool {
    let recorded = match source.reader().metadata() {
        ModelMetadata::HuggingFace { config, .. } => {
            config.get("sparsepack").is_some_and(|record| record.get("sparsity").is_some())
        }
        _ => false,
    };
    let linear = matches!(tensor.kind, crate::model::TensorKind::Linear { .. });
    tensor.encoding.is_sparse() || (recorded && linear)
}
