//! Which output format holds which encoding: the one table that planning obeys and the README shows.

use sparsepack_formats::{DType, Encoding};

use super::{
    error::{PipelineError, Result},
    plan::OutputTensor,
};
use crate::recipe::OutputFormat;

/// Whether tensors of this encoding can stand in an output of this format. What is compressed is dense,
/// or, where a directory is archived as it is, anything that safetensors hold.
pub fn supports(format: OutputFormat, encoding: Encoding) -> bool {
    let archived = format == OutputFormat::Zst;
    match encoding {
        Encoding::Dense { dtype } => {
            let in_ggml = matches!(dtype, DType::F32 | DType::F16 | DType::Bf16);
            format != OutputFormat::Gguf || in_ggml
        }
        Encoding::Sparse24 { .. }
        | Encoding::Nm { .. }
        | Encoding::Bitmask { .. }
        | Encoding::Int { .. } => archived || format == OutputFormat::Packed,
        Encoding::TorchCutlass { .. } => archived || format == OutputFormat::TorchCutlass,
        Encoding::CtSparse24Bitmask { .. }
        | Encoding::CtSparseBitmask { .. }
        | Encoding::CtPackQuantized { .. }
        | Encoding::CtIntQuantized { .. }
        | Encoding::CtFloatQuantized { .. } => {
            archived || format == OutputFormat::CompressedTensors
        }
        Encoding::Ggml { .. } => format == OutputFormat::Gguf,
        _ => false,
    }
}

/// Refuses outputs in an encoding that the format does not hold.
///
/// # Errors
/// [`PipelineError::Unsupported`] naming the first such tensor.
pub(super) fn check(format: OutputFormat, outputs: &[OutputTensor]) -> Result<()> {
    match outputs.iter().find(|output| !supports(format, output.encoding)) {
        None => Ok(()),
        Some(output) => Err(PipelineError::Unsupported {
            format: format.name(),
            why: format!("`{}` is {}", output.name, output.encoding),
        }),
    }
}
