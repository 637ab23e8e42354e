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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::recipe::{CalibrationRecipe, OutputRecipe, Recipe, SliceRecipe, WeightDType};

    fn open(name: &str) -> ModelSource {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
        ModelSource::open(&fixtures.join(name)).unwrap()
    }

    fn account(name: &str, width: usize, basis: Basis, head: bool) -> SliceAccount {
        let slice = SliceRecipe { basis, head, ..SliceRecipe::new(None, Some(width)) };
        let calibration = CalibrationRecipe {
            file: Some("text".into()),
            samples: 4,
            seq_len: 32,
            ..CalibrationRecipe::default()
        };
        let output = OutputRecipe { dtype: Some(WeightDType::F32), ..OutputRecipe::default() };
        let recipe = Recipe { slice: Some(slice), calibration, output, ..Recipe::default() };
        let plan = super::super::super::plan::ConversionPlan::new(&open(name), &recipe).unwrap();
        plan.slice.unwrap()
    }

    #[test]
    fn sizes_of_a_checkpoint_are_counted() {
        // bf16; vocabulary 1024, hidden 128, 4 blocks, 64 key/value columns, MLP 384, tied.
        let sizes = Sizes::of_source(&open("model"));
        let block = 128 * (128 + 64 + 64 + 128) + 3 * 128 * 384;
        let parameters = 1024 * 128 + 4 * (block + 2 * 128) + 128;
        let linear = 2 * (4 * block + 1024 * 128);
        let expected = Sizes {
            hidden_size: 128,
            parameters,
            bytes: 2 * parameters,
            // The tied embeddings are read whole, as the output matrix.
            decode_bytes: 2 * parameters,
            flops_per_token: linear,
        };
        assert_eq!(sizes, expected);
        // Not tied: one row of the embeddings.
        let untied = Sizes::of_source(&open("tiny/llama-gqa"));
        assert_eq!(untied.decode_bytes, untied.bytes - 95 * 32 * 4);
        // Learned positions: one row of them; the embeddings are tied.
        let learned = Sizes::of_source(&open("tiny/opt"));
        assert_eq!(learned.decode_bytes, learned.bytes - (64 + 2 - 1) * 32 * 4);
    }

    #[test]
    fn one_basis_unties_the_output_matrix() {
        let SliceAccount { before, after, untied_parameters, shortcut_parameters, .. } =
            account("model", 96, Basis::Shared, false);
        assert_eq!((before.hidden_size, after.hidden_size), (128, 96));
        assert_eq!((untied_parameters, shortcut_parameters), (1024 * 96, 0));
        let block = 96 * (128 + 64 + 64 + 128) + 3 * 96 * 384;
        assert_eq!(after.parameters, 2 * 1024 * 96 + 4 * (block + 2 * 96) + 96);
        assert_eq!(after.bytes, 4 * after.parameters);
        assert_eq!(after.decode_bytes, after.bytes - 4 * 1023 * 96);
        assert_eq!(after.flops_per_token, 2 * (4 * block + 1024 * 96));
        // An output matrix that was its own before is nothing new.
        assert_eq!(account("tiny/llama-gqa", 24, Basis::Shared, false).untied_parameters, 0);
    }

    #[test]
    fn a_basis_for_each_block_has_shortcuts() {
        let whole = account("model", 96, Basis::Block, true);
        assert_eq!(whole.shortcut_parameters, 4 * 2 * 96 * 96);
        assert_eq!(whole.untied_parameters, 1024 * 96);
        let open_end = account("model", 96, Basis::Block, false);
        assert_eq!(open_end.shortcut_parameters, (4 * 2 - 1) * 96 * 96 + 96 * 128);
        assert_eq!(open_end.untied_parameters, 1024 * 128);
        let shared = account("model", 96, Basis::Shared, false);
        assert_eq!(whole.after.parameters, shared.after.parameters + whole.shortcut_parameters);
        let (one, other) = (whole.after.flops_per_token, shared.after.flops_per_token);
        assert_eq!(one, other + 2 * whole.shortcut_parameters);
    }

    #[test]
    fn growth_is_more_parameters_than_before() {
        assert!(account("model", 127, Basis::Shared, false).grows());
        assert!(!account("model", 96, Basis::Shared, false).grows());
        assert!(account("tiny/llama-gqa", 28, Basis::Block, false).grows());
        assert!(!account("tiny/llama-gqa", 32, Basis::Shared, false).grows());
        let same = account("tiny/llama-gqa", 32, Basis::Shared, false);
        assert_eq!(same.after.parameters, same.before.parameters);
    }
}
