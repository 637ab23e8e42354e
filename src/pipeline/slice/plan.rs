//! What slicing a model comes to, from its header alone.

use sparsepack_formats::{DType, ModelMetadata, OutputFile};
use tempfile::TempDir;

use super::super::{
    budget::{MemoryBudget, block_forward_flops, block_weights, gram_flops},
    error::{PipelineError, Result},
    plan::{OutputTensor, check_calibration, contradiction, without_budget},
};
use super::{Sizes, SliceAccount};
use crate::{
    calibration::StatKind,
    compress::{Basis, Correction},
    model::{CapturePoint, ModelConfig, ModelSource, SlicedModel, TensorKind, sidecars},
    recipe::{CalibrationRecipe, Recipe, SliceRecipe, WeightDType},
};

/// Best on held-out text of those tried (docs/NUMERICS.md).
const DEFAULT_DAMP: f64 = 0.3;

/// A model that is to be sliced, and what it becomes.
#[derive(Debug)]
pub(in super::super) struct Slicing {
    /// As asked for, with the width it comes to.
    pub(in super::super) recipe: SliceRecipe,
    /// Columns that stay.
    pub(in super::super) width: usize,
    /// Columns there are.
    pub(in super::super) hidden_size: usize,
    /// Type of the sliced weights, before anything else is done to them.
    pub(in super::super) dtype: DType,
    /// The sliced model.
    pub(in super::super) model: SlicedModel,
    /// The same as a plan sees it.
    pub(in super::super) outline: ModelSource,
    /// Memory that finding the bases takes.
    pub(in super::super) budget: MemoryBudget,
    /// FLOP that it takes.
    pub(in super::super) flops: f64,
    /// The source in numbers.
    pub(in super::super) before: Sizes,
    /// Where its tokenizer lies, when the source has none in files.
    _files: Option<TempDir>,
}

impl Slicing {
    /// The slicing that `recipe` asks for.
    ///
    /// # Errors
    /// A share or a width that leaves nothing or everything, a family or a width for which there is no
    /// model, calibration with fewer tokens than directions.
    pub(in super::super) fn new(
        source: &ModelSource,
        recipe: &Recipe,
        slice: &SliceRecipe,
    ) -> Result<Self> {
        let hidden_size = source.config().hidden_size;
        let width = width(slice, hidden_size)?;
        without_budget(recipe)?;
        let calibration = &recipe.calibration;
        if calibration.file.is_none() {
            return Err(contradiction(
                "slicing needs calibration text: give --calibration FILE".into(),
            ));
        }
        check_calibration(recipe, StatKind::None, source.config().max_position_embeddings)?;
        let tokens = calibration.samples * calibration.seq_len;
        if tokens < width {
            return Err(contradiction(format!(
                "{tokens} calibration tokens have at most as many directions, fewer than the {width} \
                 that are to stay; give more with --samples"
            )));
        }
        let damp = damp(slice)?;
        if slice.head && slice.basis == Basis::Shared {
            return Err(contradiction(
                "the shared basis always slices the output matrix; --slice-head is about --basis block"
                    .into(),
            ));
        }
        let dtype = dtype(source, recipe);
        let model = match slice.basis {
            Basis::Shared => SlicedModel::shared(source, width, dtype)?,
            Basis::Block => SlicedModel::in_blocks(source, width, slice.head, dtype)?,
        };
        let (directory, files) =
            if let ModelMetadata::HuggingFace { directory, .. } = source.reader().metadata() {
                (directory.clone(), None)
            } else {
                let files = tokenizer_files(source)?;
                (files.path().to_owned(), Some(files))
            };
        let outline = source.outline(&model, dtype, &directory)?;
        let fits = damp.is_some();
        let recipe = SliceRecipe {
            fraction: None,
            width: Some(width),
            correction: Some(if fits { Correction::LeastSquares } else { Correction::None }),
            damp,
            ..slice.clone()
        };
        Ok(Self {
            recipe,
            width,
            hidden_size,
            dtype,
            budget: MemoryBudget::of_slicing(source, width, fits, calibration),
            flops: flops(source, &model.config, fits, calibration),
            model,
            outline,
            before: Sizes::of_source(source),
            _files: files,
        })
    }

    /// Whether weights are fitted to the dense model.
    pub(in super::super) fn fits(&self) -> bool {
        self.recipe.damp.is_some()
    }

    /// What the slice saves and costs, with the model stored as `outputs`.
    pub(in super::super) fn account(
        &self,
        source: &ModelSource,
        outputs: &[OutputTensor],
    ) -> SliceAccount {
        let config = source.config();
        let untied = config.tie_word_embeddings && !self.model.config.tie_word_embeddings;
        let head = (config.vocab_size * self.model.config.exit_width()) as u64;
        SliceAccount {
            basis: self.recipe.basis,
            class: self.model.arch.hf_class.clone(),
            before: self.before,
            after: Sizes::of_outputs(&self.outline, outputs),
            shortcut_parameters: self.model.config.shortcut_weights(self.model.arch),
            untied_parameters: if untied { head } else { 0 },
            kept_variance: Vec::new(),
        }
    }

    /// Bytes of the sliced model in the work directory.
    pub(in super::super) fn bytes(&self) -> u64 {
        self.outline.tensors().iter().map(|tensor| tensor.stored_bytes).sum()
    }
}

/// The damping of the fit, where there is one.
fn damp(slice: &SliceRecipe) -> Result<Option<f64>> {
    let shared = slice.basis == Basis::Shared;
    let default = if shared { Correction::LeastSquares } else { Correction::None };
    match (slice.correction.unwrap_or(default), slice.damp) {
        (Correction::LeastSquares, _) if !shared => Err(contradiction(
            "weights are fitted in the shared basis only; --basis block has no correction".into(),
        )),
        (Correction::None, Some(_)) => Err(contradiction(
            "the damping is that of the fit, but sliced weights are not fitted here".into(),
        )),
        (Correction::None, None) => Ok(None),
        (Correction::LeastSquares, Some(damp)) if !(damp.is_finite() && damp > 0.0) => Err(
            contradiction(format!("the damping of the fit is {damp} (expected a positive number)")),
        ),
        (Correction::LeastSquares, damp) => Ok(Some(damp.unwrap_or(DEFAULT_DAMP))),
    }
}

/// One forward pass, and the second moments of the stream before every norm; to fit, one more of both
/// models, and the sums of what they read and write.
fn flops(
    source: &ModelSource,
    sliced: &ModelConfig,
    fits: bool,
    calibration: &CalibrationRecipe,
) -> f64 {
    let (arch, config) = (source.arch(), source.config());
    let blocks = config.num_hidden_layers as f64;
    let (hidden, kept) = (config.hidden_size as f64, sliced.hidden_size as f64);
    let tokens = (calibration.samples * calibration.seq_len) as f64;
    let window = calibration.seq_len as f64;
    let forward = |config: &ModelConfig| {
        blocks * block_forward_flops(config, block_weights(arch, config), tokens, window)
    };
    let basis = forward(config) + (2.0 * blocks + 1.0) * gram_flops(tokens, hidden);
    if !fits {
        return basis;
    }
    let sums =
        |outputs: f64, inputs: f64| 2.0 * tokens * outputs * inputs + gram_flops(tokens, inputs);
    let written = [CapturePoint::AttnOut, CapturePoint::MlpHidden]
        .map(|point| sums(kept, config.capture_width(point) as f64));
    let sums = (2.0 * blocks + 1.0) * sums(hidden, kept) + blocks * written.iter().sum::<f64>();
    basis + forward(config) + forward(sliced) + sums
}

/// The columns that stay.
fn width(slice: &SliceRecipe, hidden_size: usize) -> Result<usize> {
    let SliceRecipe { fraction, width, multiple, .. } = *slice;
    if multiple == 0 {
        return Err(contradiction("the slice width cannot be a multiple of 0".into()));
    }
    match (fraction, width) {
        (Some(fraction), None) => {
            // A hair above, so that 70 % of 10 columns are 7 for want of a binary 0.7.
            let kept = hidden_size as f64 * (1.0 - fraction.share()) + 1e-9;
            let width = kept as usize / multiple * multiple;
            if width == 0 {
                return Err(contradiction(format!(
                    "slicing {fraction} of {hidden_size} columns leaves {}, fewer than the {multiple} \
                     that widths are a multiple of; slice less, or give a smaller --slice-multiple",
                    kept as usize
                )));
            }
            Ok(width)
        }
        (None, Some(width)) if (1..=hidden_size).contains(&width) => Ok(width),
        (None, Some(width)) => Err(contradiction(format!(
            "the slice width is {width} (expected 1 to {hidden_size}, the model's hidden size)"
        ))),
        (None, None) | (Some(_), Some(_)) => Err(contradiction(
            "[slice] needs either a fraction to leave out or a width to keep".into(),
        )),
    }
}

/// The type asked for, else that of the source's linears; bf16 for what is stored in blocks or codes.
fn dtype(source: &ModelSource, recipe: &Recipe) -> DType {
    let asked = recipe.output.dtype.and_then(WeightDType::dense);
    let linear = |kind| matches!(kind, TensorKind::Linear { .. });
    let own = source.tensors().iter().find(|tensor| linear(tensor.kind));
    let own = own.filter(|tensor| !tensor.encoding.is_quantized());
    let own = own.map(|tensor| tensor.encoding.value_dtype());
    let plain = |dtype: &DType| matches!(dtype, DType::F32 | DType::F16 | DType::Bf16);
    asked.filter(plain).or(own.filter(plain)).unwrap_or(DType::Bf16)
}

/// The files that tokenizer and generation settings of a GGUF file become, in a temporary directory.
fn tokenizer_files(source: &ModelSource) -> Result<TempDir> {
    let directory = tempfile::tempdir().map_err(|source| PipelineError::Io {
        path: std::env::temp_dir(),
        action: "create a temporary directory",
        source,
    })?;
    for sidecar in sidecars(source)? {
        super::super::output::put_sidecar(directory.path(), &sidecar)?;
    }
    OutputFile::sync_directory(directory.path())?;
    Ok(directory)
}
