//! `sparsepack convert`.

use std::{path::PathBuf, time::Duration};

use clap::{Args, ValueHint};

use super::{
    CliError, Status,
    args::{DeviceArgs, RecipeArgs, parse_bytes},
    progress::Bar,
    render,
};
use crate::{
    calibration::{CalibrationSet, Sampling},
    model::{ModelSource, Tokenizer},
    pipeline::{ConversionPlan, NoProgress, RunOptions, convert, fit},
    recipe::Recipe,
};

/// Worked example of `--help`.
const EXAMPLE: &str = "\
Example: prune a model to 2:4 and pack it
  sparsepack convert model.gguf -o model-2of4 --prune sparsegpt --sparsity 2:4 \\
      --calibration text.txt --samples 32 --format packed";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLE)]
pub(super) struct ConvertArgs {
    /// Directory with config.json and safetensors, a .gguf file, or a packed output.
    #[arg(value_name = "MODEL", value_hint = ValueHint::AnyPath)]
    model: PathBuf,
    /// Output directory; made, or empty.
    #[arg(short, long, value_name = "OUT", value_hint = ValueHint::DirPath)]
    output: PathBuf,
    #[command(flatten)]
    recipe: RecipeArgs,
    #[command(flatten)]
    device: DeviceArgs,
    /// Spill activations to disk above this much memory [default: what is available].
    #[arg(long, value_name = "SIZE", value_parser = parse_bytes)]
    memory: Option<u64>,
    /// Continue an interrupted conversion.
    #[arg(long)]
    resume: bool,
    /// Least seconds between checkpoints for --resume.
    #[arg(long, value_name = "SECS", default_value_t = 60)]
    checkpoint_secs: u64,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &ConvertArgs, quiet: bool) -> Result<Status, CliError> {
    let mut recipe = args.recipe.resolve()?;
    let source = ModelSource::open(&args.model)?;
    let mut calibration = None;
    if recipe.budget.is_some() {
        calibration = load_calibration(&source, &recipe)?;
        recipe = fit_budget(&source, &recipe, calibration.as_ref(), args, quiet)?;
    }
    let plan = ConversionPlan::new(&source, &recipe)?;
    if calibration.is_none() {
        calibration = load_calibration(&source, &recipe)?;
    }
    let options = RunOptions {
        resume: args.resume,
        checkpoint_interval: Duration::from_secs(args.checkpoint_secs),
        memory_bytes: args.memory.or_else(available_memory),
    };
    let bar = Bar::new("converting");
    let progress: &dyn crate::pipeline::Progress = if quiet { &NoProgress } else { &bar };
    let converted = convert(
        &source,
        &plan,
        calibration.as_ref(),
        &args.output,
        args.device.resolve(),
        options,
        progress,
    )?;
    if args.json {
        render::json(&render::ConvertedJson::new(&plan, &converted))?;
    } else {
        render::converted(&args.output, &plan, &converted)?;
    }
    Ok(Status::Done)
}

/// The recipe that keeps to its size budget.
fn fit_budget(
    source: &ModelSource,
    recipe: &Recipe,
    calibration: Option<&CalibrationSet>,
    args: &ConvertArgs,
    quiet: bool,
) -> Result<Recipe, CliError> {
    let bar = Bar::new("measuring");
    let progress: &dyn crate::pipeline::Progress = if quiet { &NoProgress } else { &bar };
    let memory = args.memory.or_else(available_memory);
    let fitted = fit(source, recipe, calibration, args.device.resolve(), memory, progress)?;
    for (candidate, layers, bits) in &fitted.chosen {
        tracing::info!(
            candidate = %candidate,
            layers,
            bits_per_weight = %format_args!("{bits:.3}"),
            "fitted"
        );
    }
    tracing::info!(
        bits_per_weight = %format_args!("{:.3}", fitted.bits_per_weight),
        "fitted in all"
    );
    Ok(fitted.recipe)
}

/// The calibration windows of a recipe, if it has a text.
pub(super) fn load_calibration(
    source: &ModelSource,
    recipe: &Recipe,
) -> Result<Option<CalibrationSet>, CliError> {
    let calibration = &recipe.calibration;
    let Some(file) = &calibration.file else { return Ok(None) };
    let tokenizer = Tokenizer::open(source)?;
    let sampling = Sampling {
        samples: calibration.samples,
        seq_len: calibration.seq_len,
        seed: calibration.seed,
    };
    Ok(Some(CalibrationSet::load(file, &tokenizer, source.config(), sampling)?))
}

/// Memory that the system says can be had without swapping, less a fifth.
pub(super) fn available_memory() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find(|line| line.starts_with("MemAvailable:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024 / 5 * 4)
}
