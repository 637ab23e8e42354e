//! Groups of arguments that several commands share, and what they resolve to.
#![allow(clippy::doc_markdown, reason = "doc comments here are help texts, shown without markup")]

use std::path::PathBuf;

use clap::{Args, ValueEnum, ValueHint};

use super::CliError;
use crate::{
    backend::{Device, DeviceOptions, Precision, ScaleSearch},
    compress::{
        Basis, Candidate, Correction, Damping, GroupSize, Method, Quantizer, Scheme, Sparsity,
    },
    recipe::{
        BlockRange, BudgetRecipe, OutputFormat, Percent, PruneRecipe, QuantizeRecipe, Recipe,
        RecipeError, Selector, Sequential, SliceRecipe, WeightDType,
    },
};

/// Where the arithmetic runs.
#[derive(Debug, Args)]
#[command(next_help_heading = "Device")]
pub(super) struct DeviceArgs {
    /// Device to compute on: cpu, cuda:N, or auto, which is cuda:0 if there is one.
    #[arg(long, value_name = "DEVICE", default_value = "auto", value_parser = parse_device)]
    device: Device,
    /// Arithmetic of matrix products.
    #[arg(long, value_name = "TYPE", default_value = "auto")]
    compute: Compute,
    /// CPU threads; all cores by default.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
}

/// `--device`.
fn parse_device(text: &str) -> Result<Device, String> {
    let refused = || format!("expected auto, cpu or cuda:N, found {text:?}");
    match text {
        "auto" => Ok(Device::Auto),
        "cpu" => Ok(Device::Cpu),
        _ => match text.strip_prefix("cuda") {
            Some(index) => cuda_device(index).ok_or_else(refused)?,
            None => Err(refused()),
        },
    }
}

/// The GPU that `:N` means, or nothing for another text.
#[cfg(feature = "cuda")]
fn cuda_device(index: &str) -> Option<Result<Device, String>> {
    match index {
        "" => Some(Ok(Device::Cuda(0))),
        _ => index.strip_prefix(':')?.parse().ok().map(|index| Ok(Device::Cuda(index))),
    }
}

#[cfg(not(feature = "cuda"))]
#[allow(clippy::unnecessary_wraps, reason = "the signature is that of the other build")]
fn cuda_device(_: &str) -> Option<Result<Device, String>> {
    Some(Err("this build has no CUDA backend".to_owned()))
}

/// `--compute`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Compute {
    /// bf16 products with f32 sums where the device has them, else f32.
    Auto,
    /// f32 products throughout.
    F32,
    /// bf16 products with f32 sums, or an error.
    Bf16,
}

impl DeviceArgs {
    pub(super) fn resolve(&self) -> DeviceOptions {
        let precision = match self.compute {
            Compute::Auto => Precision::Auto,
            Compute::F32 => Precision::F32,
            Compute::Bf16 => Precision::Bf16,
        };
        DeviceOptions { device: self.device, precision, threads: self.threads.map(usize::from) }
    }
}

/// What to do with the model: flags override the recipe.
#[derive(Debug, Args)]
pub(super) struct RecipeArgs {
    /// Recipe in TOML, or the manifest.json of an earlier run; flags override it.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    recipe: Option<PathBuf>,

    #[command(flatten)]
    slice: SliceArgs,

    #[command(flatten)]
    prune: PruneArgs,

    #[command(flatten)]
    quantize: QuantizeArgs,

    #[command(flatten)]
    solver: SolverArgs,

    #[command(flatten)]
    calibration: CalibrationArgs,

    #[command(flatten)]
    output: FormatArgs,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Slicing")]
struct SliceArgs {
    /// Share of the hidden size to leave out, like 20%.
    #[arg(long, value_name = "PERCENT", conflicts_with = "slice_width")]
    slice: Option<Percent>,
    /// Hidden size to keep, instead of a share to leave out.
    #[arg(long, value_name = "COLUMNS")]
    slice_width: Option<usize>,
    /// Round the width that --slice gives down to a multiple of this [default: 64].
    #[arg(long, value_name = "COLUMNS")]
    slice_multiple: Option<usize>,
    /// One basis for a model that stock programs load, or one a block [default: shared].
    #[arg(long, value_name = "BASIS")]
    basis: Option<Basis>,
    /// Fit the sliced weights to the dense model, in the shared basis [default: least-squares].
    #[arg(long, value_name = "HOW")]
    slice_correction: Option<Correction>,
    /// How strongly fitted weights are drawn towards plainly sliced ones [default: 0.3].
    #[arg(long, value_name = "FRACTION")]
    slice_damp: Option<f64>,
    /// Slice the output matrix too, with --basis block.
    #[arg(long)]
    slice_head: bool,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Pruning")]
struct PruneArgs {
    /// How weights are chosen.
    #[arg(long, value_name = "METHOD")]
    prune: Option<MethodChoice>,
    /// Kept:group like 2:4, or a percentage of zeros like 50%.
    #[arg(long, value_name = "SPARSITY")]
    sparsity: Option<Sparsity>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Quantization")]
struct QuantizeArgs {
    /// Grid of the linears: int2 to int8, f8_e4m3, or for GGUF a block type (q8_0, q4_0, q4_k, ...).
    #[arg(long, value_name = "SCHEME")]
    quantize: Option<Scheme>,
    /// With error feedback, or to nearest [default: gptq].
    #[arg(long, value_name = "METHOD")]
    quantizer: Option<Quantizer>,
    /// Columns that share a scale, or channel [default: 128; channel for int8].
    #[arg(long, value_name = "COLUMNS")]
    group_size: Option<GroupSize>,
    /// Give each group of integers a zero point.
    #[arg(long)]
    asymmetric: bool,
    /// How scales of integers are chosen [default: mse].
    #[arg(long, value_name = "HOW")]
    scales: Option<ScaleSearch>,
    /// Stored bits per weight to reach, choosing what each layer becomes.
    #[arg(long, value_name = "BITS")]
    target_bits: Option<f64>,
    /// What layers may become within --target-bits, like "int4,2:4 int4,int8".
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    candidates: Vec<Candidate>,
    /// Round columns by descending Hessian diagonal once pruned; false: in one sweep [default: true].
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    act_order: Option<bool>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Layers")]
struct SolverArgs {
    /// Order inside a block: stage by stage, or the whole block at once.
    #[arg(long, value_name = "ORDER")]
    sequential: Option<Sequential>,
    /// Layers to prune or quantize: Linear, a role (down_proj), a name, re:PATTERN, blocks:0..8.
    #[arg(long, value_name = "SELECTOR", value_delimiter = ',')]
    targets: Vec<Selector>,
    /// Layers to leave as they are, selected the same way.
    #[arg(long, value_name = "SELECTOR", value_delimiter = ',')]
    ignore: Vec<Selector>,
    /// These blocks only, for trials.
    #[arg(long, value_name = "RANGE")]
    blocks: Option<BlockRange>,
    /// Damping of the Hessian, as a fraction.
    #[arg(long, value_name = "FRACTION")]
    damp: Option<f64>,
    /// Of what: each feature's own entry of the diagonal, or the mean of all.
    #[arg(long, value_name = "OF")]
    damping: Option<Damping>,
}

/// `--prune`.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum MethodChoice {
    /// Optimal-brain-surgeon sweep that also updates the kept weights.
    Sparsegpt,
    /// Lowest |w| times input norm in each row.
    Wanda,
    /// Lowest |w|; needs no calibration.
    Magnitude,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Calibration")]
struct CalibrationArgs {
    /// Calibration text: .txt, or .jsonl with a "text" key per line.
    #[arg(long = "calibration", value_name = "FILE", value_hint = ValueHint::FilePath)]
    file: Option<PathBuf>,
    /// Calibration windows [default: 128].
    #[arg(long, value_name = "N")]
    samples: Option<usize>,
    /// Tokens of a window [default: 2048].
    #[arg(long, value_name = "TOKENS")]
    seq_len: Option<usize>,
    /// Random windows with this seed, instead of windows in order from the start.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Output")]
struct FormatArgs {
    /// Container and encoding [default: safetensors].
    #[arg(long, value_name = "FORMAT")]
    format: Option<OutputFormat>,
    /// Type of weights, block types for GGUF only [default: the source's, else bf16].
    #[arg(long, value_name = "TYPE")]
    dtype: Option<WeightDType>,
    /// Most bytes of tensors in a file [default: 4GiB; no limit for GGUF].
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    shard_size: Option<u64>,
    /// Accept GGUF block types that move the zeros of pruned layers (q5_k, q4_k, q2_k).
    #[arg(long)]
    allow_zero_loss: bool,
    /// Compression level of --format zst, 1 to 19 [default: 1].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..=19))]
    level: Option<i32>,
}

impl RecipeArgs {
    /// The recipe file with the flags on top.
    pub(super) fn resolve(&self) -> Result<Recipe, CliError> {
        let mut recipe = match &self.recipe {
            Some(path) => Recipe::read(path)?,
            None => Recipe::default(),
        };
        self.slice.apply(&mut recipe)?;
        self.prune.apply(&mut recipe)?;
        self.quantize.apply(&mut recipe)?;
        self.solver.apply(&mut recipe)?;
        let calibration = &mut recipe.calibration;
        let flags = &self.calibration;
        calibration.file = flags.file.clone().or(calibration.file.take());
        calibration.samples = flags.samples.unwrap_or(calibration.samples);
        calibration.seq_len = flags.seq_len.unwrap_or(calibration.seq_len);
        calibration.seed = flags.seed.or(calibration.seed);
        if calibration.file.is_none()
            && (flags.samples.is_some() || flags.seq_len.is_some() || flags.seed.is_some())
        {
            return Err(CliError::Usage(
                "--samples, --seq-len and --seed describe a calibration text, but none is given \
                 with --calibration"
                    .to_owned(),
            ));
        }
        recipe.output.format = self.output.format.or(recipe.output.format);
        recipe.output.dtype = self.output.dtype.or(recipe.output.dtype);
        recipe.output.shard_size = self.output.shard_size.or(recipe.output.shard_size);
        recipe.output.allow_zero_loss |= self.output.allow_zero_loss;
        recipe.output.level = self.output.level.or(recipe.output.level);
        Ok(recipe)
    }
}

impl SliceArgs {
    fn apply(&self, recipe: &mut Recipe) -> Result<(), CliError> {
        let asked = self.slice.is_some() || self.slice_width.is_some();
        if recipe.slice.is_none() {
            let flags = [
                ("--slice-multiple", self.slice_multiple.is_some()),
                ("--basis", self.basis.is_some()),
                ("--slice-correction", self.slice_correction.is_some()),
                ("--slice-damp", self.slice_damp.is_some()),
                ("--slice-head", self.slice_head),
            ];
            match flags.into_iter().find(|(_, given)| *given) {
                _ if asked => recipe.slice = Some(SliceRecipe::new(None, None)),
                Some((flag, _)) => return Err(stray(flag, "slicing", "--slice PERCENT")),
                None => return Ok(()),
            }
        }
        if let Some(slice) = &mut recipe.slice {
            if asked {
                (slice.fraction, slice.width) = (self.slice, self.slice_width);
            }
            slice.multiple = self.slice_multiple.unwrap_or(slice.multiple);
            slice.basis = self.basis.unwrap_or(slice.basis);
            slice.correction = self.slice_correction.or(slice.correction);
            slice.damp = self.slice_damp.or(slice.damp);
            slice.head |= self.slice_head;
        }
        Ok(())
    }
}

impl PruneArgs {
    fn apply(&self, recipe: &mut Recipe) -> Result<(), CliError> {
        let method = self.prune.map(|choice| match choice {
            MethodChoice::Sparsegpt => Method::SparseGpt,
            MethodChoice::Wanda => Method::Wanda,
            MethodChoice::Magnitude => Method::Magnitude,
        });
        if recipe.prune.is_none() {
            match (method, self.sparsity) {
                (Some(method), Some(sparsity)) => {
                    recipe.prune = Some(PruneRecipe::new(method, sparsity));
                }
                (Some(_), None) => {
                    return Err(CliError::Usage(
                        "--prune needs --sparsity, for example --sparsity 2:4".to_owned(),
                    ));
                }
                (None, Some(_)) => {
                    return Err(stray("--sparsity", "pruning", "--prune METHOD"));
                }
                (None, None) => return Ok(()),
            }
        }
        if let Some(prune) = &mut recipe.prune {
            prune.method = method.unwrap_or(prune.method);
            prune.sparsity = self.sparsity.unwrap_or(prune.sparsity);
        }
        Ok(())
    }
}

impl QuantizeArgs {
    fn apply(&self, recipe: &mut Recipe) -> Result<(), CliError> {
        if let Some(target_bits) = self.target_bits {
            let candidates = Vec::new();
            let budget = BudgetRecipe { target_bits, candidates, group_size: None };
            recipe.budget.get_or_insert(budget).target_bits = target_bits;
        }
        if let Some(budget) = &mut recipe.budget {
            budget_decides(&[
                ("--quantize", self.quantize.is_some()),
                ("--quantizer", self.quantizer.is_some()),
                ("--asymmetric", self.asymmetric),
                ("--scales", self.scales.is_some()),
                ("--act-order", self.act_order.is_some()),
            ])?;
            budget.group_size = self.group_size.or(budget.group_size);
            if !self.candidates.is_empty() {
                budget.candidates.clone_from(&self.candidates);
            }
            return Ok(());
        }
        if !self.candidates.is_empty() {
            return Err(stray("--candidates", "a size budget", "--target-bits BITS"));
        }
        if recipe.quantize.is_none() {
            let flags = [
                ("--quantizer", self.quantizer.is_some()),
                ("--group-size", self.group_size.is_some()),
                ("--asymmetric", self.asymmetric),
                ("--scales", self.scales.is_some()),
                ("--act-order", self.act_order.is_some()),
            ];
            match (self.quantize, flags.into_iter().find(|(_, given)| *given)) {
                (Some(scheme), _) => recipe.quantize = Some(QuantizeRecipe::new(scheme)),
                (None, Some((flag, _))) => {
                    return Err(stray(flag, "quantization", "--quantize SCHEME"));
                }
                (None, None) => return Ok(()),
            }
        }
        if let Some(quantize) = &mut recipe.quantize {
            quantize.scheme = self.quantize.unwrap_or(quantize.scheme);
            quantize.method = self.quantizer.unwrap_or(quantize.method);
            quantize.group_size = self.group_size.or(quantize.group_size);
            quantize.asymmetric |= self.asymmetric;
            quantize.scales = self.scales.or(quantize.scales);
            quantize.act_order = self.act_order.or(quantize.act_order);
        }
        Ok(())
    }
}

/// Refuses options that a size budget would leave without effect.
fn budget_decides(flags: &[(&str, bool)]) -> Result<(), CliError> {
    match flags.iter().find(|(_, given)| *given) {
        Some((flag, _)) => Err(CliError::Usage(format!(
            "{flag} says what a size budget (--target-bits) decides for every linear of the blocks"
        ))),
        None => Ok(()),
    }
}

impl SolverArgs {
    fn apply(&self, recipe: &mut Recipe) -> Result<(), CliError> {
        let flags = [
            ("--sequential", self.sequential.is_some()),
            ("--targets", !self.targets.is_empty()),
            ("--ignore", !self.ignore.is_empty()),
            ("--blocks", self.blocks.is_some()),
            ("--damp", self.damp.is_some()),
            ("--damping", self.damping.is_some()),
        ];
        if recipe.prune.is_none() && recipe.quantize.is_none() && recipe.budget.is_none() {
            return match flags.into_iter().find(|(_, given)| *given) {
                Some((flag, _)) => Err(stray(
                    flag,
                    "pruning and quantization",
                    "--prune METHOD or --quantize SCHEME",
                )),
                None => Ok(()),
            };
        }
        if recipe.budget.is_some() {
            budget_decides(&flags[1..=2])?;
        }
        let solver = &mut recipe.solver;
        solver.sequential = self.sequential.or(solver.sequential);
        solver.damp = self.damp.or(solver.damp);
        solver.damping = self.damping.or(solver.damping);
        solver.blocks = self.blocks.clone().or(solver.blocks.take());
        let prune = recipe.prune.as_mut().map(|prune| (&mut prune.targets, &mut prune.ignore));
        let quantize = recipe.quantize.as_mut();
        let quantize = quantize.map(|quantize| (&mut quantize.targets, &mut quantize.ignore));
        for (targets, ignore) in prune.into_iter().chain(quantize) {
            if !self.targets.is_empty() {
                targets.clone_from(&self.targets);
            }
            if !self.ignore.is_empty() {
                ignore.clone_from(&self.ignore);
            }
        }
        Ok(())
    }
}

/// A flag about something that is not asked for.
fn stray(flag: &str, about: &str, needed: &str) -> CliError {
    let what = format!("{flag} is about {about}, but no {needed} is given");
    RecipeError::Contradiction { what }.into()
}

/// Parses a size like `8GiB`, `500MB` or `1048576`.
///
/// # Errors
/// What is wrong, in words.
pub(super) fn parse_bytes(text: &str) -> Result<u64, String> {
    let split = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: f64 = number.parse().map_err(|_| "write a size like 8GiB or 500MB".to_owned())?;
    let factor: f64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kb" => 1e3,
        "m" | "mb" => 1e6,
        "g" | "gb" => 1e9,
        "t" | "tb" => 1e12,
        "kib" => 1024.0,
        "mib" => 1024.0 * 1024.0,
        "gib" => 1024.0 * 1024.0 * 1024.0,
        "tib" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        other => return Err(format!("`{other}` is not a unit; write KiB, MiB, GiB, KB, MB or GB")),
    };
    Ok((number * factor) as u64)
}

#[cfg(test)]
mod tests {
    use super::parse_bytes;

    #[test]
    fn sizes_parse_with_binary_and_decimal_units() {
        assert_eq!(parse_bytes("8GiB"), Ok(8 << 30));
        assert_eq!(parse_bytes("1.5MB"), Ok(1_500_000));
        assert_eq!(parse_bytes("4096"), Ok(4096));
        assert!(parse_bytes("8GX").is_err());
        assert!(parse_bytes("many").is_err());
    }
}
