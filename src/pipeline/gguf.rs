//! Outputs in GGUF: the type of each tensor, its name and rows, and the files.
//!
//! Matrices get the type asked for, all of them alike (what llama.cpp calls pure), or keep their
//! own. Vectors are F32 from a Hugging Face source and keep their type from a GGUF file. A pruned
//! matrix never silently gets a type that moves zeros: one pruned in this run, a packed one, and the
//! linears of a source whose config.json says that sparsepack pruned it.

use serde::Serialize;
use sparsepack_formats::{
    DType, Encoding, GgmlType, GgufLayout, ModelMetadata, encoding::MatrixShape, gguf::GgufMetadata,
};

use super::{
    error::{PipelineError, Result},
    plan::{BlockPlan, OutputTensor, TablePlan},
    quantize,
};
use crate::{
    compress::Scheme,
    model::{GGUF_ROPE_FACTORS, GgufSummary, ModelSource, ModelTensor, TensorKind, gguf_metadata},
    recipe::Recipe,
};

/// Type of a pruned tensor whose own would move zeros: the least lossy that does not.
const SPARSE_TYPE: GgmlType = GgmlType::Q8_0;

/// A tensor whose rows are not whole blocks of the type asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Fallback {
    /// Hugging Face name.
    pub tensor: String,
    /// Elements of a row.
    pub cols: usize,
    /// The type asked for.
    pub asked: GgmlType,
    /// The type that is used instead, as llama-quantize does.
    pub used: GgmlType,
}

/// What a GGUF output consists of besides its tensors.
#[derive(Debug, Clone)]
pub(super) struct GgufPlan {
    pub(super) metadata: GgufMetadata,
    /// Tensors that get another type than the one asked for.
    pub(super) fallbacks: Vec<Fallback>,
    /// Positions of the outputs in a file that has them all: a GGUF source's own order is kept.
    order: Vec<usize>,
}

/// Plans the tensors and metadata of a GGUF output.
///
/// # Errors
/// A family, a tensor or a tokenizer that GGUF does not have; a pruned tensor whose type moves
/// zeros.
pub(super) fn plan(
    source: &ModelSource,
    recipe: &Recipe,
    blocks: &[BlockPlan],
    tables: &[TablePlan],
) -> Result<(Vec<OutputTensor>, GgufPlan)> {
    let is_gguf = matches!(source.reader().metadata(), ModelMetadata::Gguf(_));
    let mut outputs = Vec::new();
    let mut fallbacks = Vec::new();
    outputs.extend(rope_factors(source)?);
    for tensor in source.tensors() {
        let place = tensor.gguf.as_ref().ok_or_else(|| {
            let family = &source.arch().hf_class;
            refuse(match source.arch().gguf {
                None if source.arch().shortcuts.is_some() => {
                    format!("GGUF has no architecture for {family}; slice with --basis shared")
                }
                None => format!("GGUF has no architecture for {family}"),
                Some(_) => format!("GGUF files of {family} have no tensor `{}`", tensor.name),
            })
        })?;
        let module = tensor.name.strip_suffix(".weight");
        let mut layers = blocks.iter().flat_map(|block| &block.layers);
        let layer = layers.find(|layer| Some(layer.module.as_str()) == module);
        let pruned = layer.is_some_and(|layer| layer.prune.is_some())
            || tables.iter().any(|table| Some(table.module.as_str()) == module)
            || quantize::was_pruned(source, tensor);
        let encoding = match matrix_type(tensor) {
            Some(own) => {
                let wanted =
                    Wanted { own, pruned, scheme: layer.and_then(|layer| layer.block_type) };
                let ty = choose(tensor, wanted, recipe, &mut fallbacks)?;
                Encoding::from(ty)
            }
            None if is_gguf => tensor.encoding,
            None => Encoding::Dense { dtype: DType::F32 },
        };
        let linear = match tensor.kind {
            TensorKind::Linear { role, .. } => Some(role),
            _ => None,
        };
        let components = encoding.components(&tensor.name, &tensor.shape)?;
        outputs.push(OutputTensor {
            name: tensor.name.clone(),
            stored_name: Some(place.name.clone()),
            encoding,
            shape: tensor.shape.clone(),
            bytes: components.iter().map(|component| component.bytes).sum(),
            block: tensor.kind.block(),
            linear,
            permuted_heads: place.permuted_heads,
        });
    }
    let own = |output: &OutputTensor| {
        source.tensor(&output.name).is_ok_and(|tensor| tensor.encoding == output.encoding)
    };
    let changed = outputs.iter().any(|output| output.name != GGUF_ROPE_FACTORS && !own(output));
    let metadata = gguf_metadata(source, summary(&outputs), changed)?;
    let position = |output: &OutputTensor| source.reader().tensors().position(output.stored_name());
    let mut order: Vec<usize> = (0..outputs.len()).collect();
    if is_gguf {
        order.sort_by_key(|index| position(&outputs[*index]));
    }
    Ok((outputs, GgufPlan { metadata, fallbacks, order }))
}

impl GgufPlan {
    /// The files, each with its tensors; `starts` are the first outputs of each.
    pub(super) fn layout(&self, outputs: &[OutputTensor], starts: &[usize]) -> GgufLayout {
        let file_of = |index: usize| starts.partition_point(|start| *start <= index) - 1;
        let mut files = vec![Vec::new(); starts.len()];
        for &index in &self.order {
            let output = &outputs[index];
            let tensor = (output.stored_name().to_owned(), output.encoding, output.shape.clone());
            files[file_of(index)].push(tensor);
        }
        GgufLayout { metadata: self.metadata.clone(), files }
    }
}

/// The divisors of the rotary frequencies, which GGUF stores as a tensor. Always F32: ggml's rope
/// takes no other type.
fn rope_factors(source: &ModelSource) -> Result<Option<OutputTensor>> {
    let Some(factors) = source.rope_factors() else { return Ok(None) };
    let encoding = Encoding::Dense { dtype: DType::F32 };
    let shape = vec![factors.len()];
    let components = encoding.components(GGUF_ROPE_FACTORS, &shape)?;
    Ok(Some(OutputTensor {
        name: GGUF_ROPE_FACTORS.to_owned(),
        stored_name: None,
        encoding,
        bytes: components.iter().map(|component| component.bytes).sum(),
        shape,
        block: None,
        linear: None,
        permuted_heads: None,
    }))
}

/// The type that holds a matrix's values as they are, or `None` for a vector.
fn matrix_type(tensor: &ModelTensor) -> Option<GgmlType> {
    if !matches!(
        tensor.kind,
        TensorKind::Linear { .. } | TensorKind::Embedding | TensorKind::LmHead
    ) {
        return None;
    }
    Some(match (tensor.encoding, tensor.encoding.value_dtype()) {
        (Encoding::Ggml { ty }, _) => ty,
        (_, DType::F16) => GgmlType::F16,
        // GGUF has no 8-bit float; BF16 holds each of its values.
        (_, DType::Bf16 | DType::F8E4m3) => GgmlType::BF16,
        _ => GgmlType::F32,
    })
}

/// What decides the type of a matrix.
struct Wanted {
    /// The type that holds its values as they are.
    own: GgmlType,
    /// Whether its zeros were made by pruning.
    pruned: bool,
    /// The block type that it is quantized to.
    scheme: Option<GgmlType>,
}

/// The type of a matrix: the one it is quantized to, or else the one asked for.
fn choose(
    tensor: &ModelTensor,
    Wanted { own, pruned, scheme }: Wanted,
    recipe: &Recipe,
    fallbacks: &mut Vec<Fallback>,
) -> Result<GgmlType> {
    let table = matches!(tensor.kind, TensorKind::Embedding | TensorKind::LmHead);
    let asked = match (scheme, recipe.output.dtype) {
        (Some(scheme), _) => scheme,
        (None, Some(dtype)) => {
            dtype.ggml().ok_or_else(|| refuse("GGUF has no type f8_e4m3".to_owned()))?
        }
        // A file of one type, unless something else is asked for.
        (None, None) if table => match recipe.quantize.as_ref().map(|quantize| quantize.scheme) {
            Some(Scheme::Block(ty)) => ty,
            _ if pruned && !own.keeps_zeros() => SPARSE_TYPE,
            _ => own,
        },
        (None, None) if pruned && !own.keeps_zeros() => SPARSE_TYPE,
        (None, None) => own,
    };
    let cols = MatrixShape::of(&tensor.shape).cols;
    let used = asked.fallback(cols);
    if used != asked {
        fallbacks.push(Fallback { tensor: tensor.name.clone(), cols, asked, used });
    }
    if pruned && !used.keeps_zeros() && !recipe.output.allow_zero_loss {
        return Err(refuse(format!(
            "`{}` is pruned, and {used} blocks store most zeros as small values; choose q8_0, q6_k, \
             q5_0, q4_0, q3_k, mxfp4 or a float type, or give --allow-zero-loss",
            tensor.name
        )));
    }
    Ok(used)
}

/// `general.file_type` by the type of most weights: llama.cpp's `llama_ftype`, the pure or small
/// one where a type has several.
fn summary(outputs: &[OutputTensor]) -> GgufSummary {
    let mut elements: Vec<(u32, u64)> = Vec::new();
    for output in outputs {
        let file_type = file_type(output.encoding);
        let count = output.shape.iter().map(|&dim| dim as u64).product::<u64>();
        match elements.iter_mut().find(|(known, _)| *known == file_type) {
            Some((_, sum)) => *sum += count,
            None => elements.push((file_type, count)),
        }
    }
    let most = elements.iter().max_by_key(|(_, count)| *count);
    GgufSummary {
        file_type: most.map_or(0, |(file_type, _)| *file_type),
        quantized: outputs.iter().any(|output| matches!(output.encoding, Encoding::Ggml { .. })),
    }
}

fn file_type(encoding: Encoding) -> u32 {
    match encoding {
        Encoding::Ggml { ty } => match ty {
            GgmlType::Q4_0 => 2,
            GgmlType::Q4_1 => 3,
            GgmlType::Q8_0 => 7,
            GgmlType::Q5_0 => 8,
            GgmlType::Q5_1 => 9,
            GgmlType::Q2_K => 10,
            GgmlType::Q3_K => 11,
            GgmlType::Q4_K => 14,
            GgmlType::Q5_K => 16,
            GgmlType::Q6_K => 18,
            GgmlType::BF16 => 32,
            GgmlType::MXFP4 => 38,
            GgmlType::F16 => 1,
            _ => 0,
        },
        other => match other.value_dtype() {
            DType::F16 => 1,
            DType::Bf16 => 32,
            _ => 0,
        },
    }
}

fn refuse(why: String) -> PipelineError {
    PipelineError::Unsupported { format: "gguf", why }
}
