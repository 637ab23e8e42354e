//! What a compressed output is made of, as far as that is known before it is written.

use sparsepack_formats::container::{self, OriginalFile};

use super::{
    error::Result,
    plan::{OutputTensor, contradiction},
};
use crate::{
    model::{ModelSource, ModelTensor},
    recipe::{OutputFormat, Recipe, WeightDType},
};

/// The level to compress at, for the format that compresses.
///
/// # Errors
/// A level that does not exist, or for another format.
pub(super) fn level(recipe: &Recipe, format: OutputFormat) -> Result<Option<i32>> {
    match (recipe.output.level, format) {
        (Some(level), OutputFormat::Zst) if !container::LEVELS.contains(&level) => {
            Err(contradiction(format!(
                "level is {level} (expected {} to {})",
                container::LEVELS.start(),
                container::LEVELS.end()
            )))
        }
        (level, OutputFormat::Zst) => Ok(Some(level.unwrap_or(container::DEFAULT_LEVEL))),
        (Some(level), _) => {
            Err(contradiction(format!("level is {level}, but only --format zst compresses")))
        }
        (None, _) => Ok(None),
    }
}

/// The files of the source, when nothing is asked for that would change a tensor of them.
///
/// # Errors
/// A file that cannot be read.
pub(super) fn source_files(
    source: &ModelSource,
    recipe: &Recipe,
    format: OutputFormat,
) -> Result<Option<Vec<OriginalFile>>> {
    let asked = recipe.output.dtype.and_then(WeightDType::dense);
    let own = |tensor: &ModelTensor| tensor.encoding.value_dtype();
    let changes = |tensor: &ModelTensor| {
        asked.is_some_and(|asked| own(tensor).is_float_weight() && own(tensor) != asked)
    };
    let solves = recipe.prune.is_some() || recipe.quantize.is_some();
    if format != OutputFormat::Zst || solves || source.tensors().iter().any(changes) {
        return Ok(None);
    }
    let files = source.reader().original_files()?;
    Ok((!files.is_empty()).then_some(files))
}

/// Every tensor of the source as it is stored, those too that the model does not read.
///
/// # Errors
/// A size that overflows.
pub(super) fn outputs(source: &ModelSource) -> Result<Vec<OutputTensor>> {
    let tensors = source.tensors().iter().chain(source.ignored());
    tensors.map(|tensor| OutputTensor::new(tensor, tensor.encoding)).collect()
}

/// Bytes of tensor data; the most they can be where they are compressed.
///
/// # Errors
/// A size that overflows.
pub(super) fn output_bytes(outputs: &[OutputTensor], format: OutputFormat) -> Result<u64> {
    if format != OutputFormat::Zst {
        return Ok(outputs.iter().map(|output| output.bytes).sum());
    }
    let mut bytes = 0;
    for output in outputs {
        bytes += container::largest_size(&output.name, output.encoding, &output.shape)?;
    }
    Ok(bytes)
}
