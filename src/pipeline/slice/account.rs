//! What a slice saves and what it costs, in numbers that follow from the shapes.

use serde::{Deserialize, Serialize};

use super::super::plan::OutputTensor;
use crate::{
    compress::Basis,
    model::{ModelSource, TensorKind},
};

/// The size of a model in the ways that matter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sizes {
    /// Columns of the residual stream.
    pub hidden_size: u64,
    /// All parameters.
    pub parameters: u64,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Bytes of weights that decoding a token reads: all of them, but one row of a table that is only
    /// looked up.
    pub decode_bytes: u64,
    /// FLOP of a token's forward pass, without the products of queries, keys and values.
    pub flops_per_token: u64,
}

/// A slice in numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SliceAccount {
    /// How directions were chosen.
    pub basis: Basis,
    /// Class of the sliced model.
    pub class: String,
    /// The source, as it is stored.
    pub before: Sizes,
    /// The output.
    pub after: Sizes,
    /// Parameters of the matrices on the shortcuts.
    pub shortcut_parameters: u64,
    /// Parameters of the output matrix, where it was the embeddings before and is one of its own now.
    pub untied_parameters: u64,
    /// Share of the variance of the stream along the kept directions, of each rotation; known after the
    /// run.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kept_variance: Vec<f64>,
}

impl SliceAccount {
    /// Whether slicing makes the model larger.
    pub fn grows(&self) -> bool {
        self.after.parameters > self.before.parameters
    }
}

impl Sizes {
    /// Those of a checkpoint.
    pub(in super::super) fn of_source(source: &ModelSource) -> Self {
        let tensors = source.tensors().iter();
        Self::new(
            source,
            tensors
                .map(|tensor| (tensor.name.as_str(), tensor.shape.as_slice(), tensor.stored_bytes)),
        )
    }

    /// Those of the planned outputs of a model.
    pub(in super::super) fn of_outputs(model: &ModelSource, outputs: &[OutputTensor]) -> Self {
        let outputs = outputs.iter();
        Self::new(
            model,
            outputs.map(|output| (output.name.as_str(), output.shape.as_slice(), output.bytes)),
        )
    }

    fn new<'a>(
        model: &ModelSource,
        tensors: impl Iterator<Item = (&'a str, &'a [usize], u64)>,
    ) -> Self {
        let config = model.config();
        let flops = config.flops_per_token(model.arch(), 0);
        let mut sizes = Self {
            hidden_size: config.hidden_size as u64,
            parameters: 0,
            bytes: 0,
            decode_bytes: 0,
            flops_per_token: flops.linear + flops.lm_head,
        };
        for (name, shape, bytes) in tensors {
            sizes.parameters += shape.iter().map(|&n| n as u64).product::<u64>();
            sizes.bytes += bytes;
            let kind = model.tensor(name).map(|tensor| tensor.kind);
            let looked_up = match kind {
                Ok(TensorKind::Embedding) => !config.tie_word_embeddings,
                Ok(TensorKind::Positions) => true,
                _ => false,
            };
            let rows = if looked_up { shape[0] as u64 } else { 1 };
            sizes.decode_bytes += bytes / rows.max(1);
        }
        sizes
    }
}
