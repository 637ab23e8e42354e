//! `sparsepack plan`.

use std::path::PathBuf;

use clap::{Args, ValueHint};

use super::{
    CliError, Status,
    args::{DeviceArgs, RecipeArgs},
    render,
};
use crate::{
    backend::{Backend, BackendError, BackendJob, dispatch},
    model::ModelSource,
    pipeline::ConversionPlan,
};

/// Share of the measured product rate that whole conversions reach (41 % with bf16 products, 66 %
/// with f32 on the machine of the README's figures): the estimate errs on the long side.
const REACHED: f64 = 0.4;

#[derive(Debug, Args)]
pub(super) struct PlanArgs {
    /// Directory with config.json and safetensors, a .gguf file, or a packed output.
    #[arg(value_name = "MODEL", value_hint = ValueHint::AnyPath)]
    model: PathBuf,
    #[command(flatten)]
    recipe: RecipeArgs,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print the plan as JSON, every tensor included.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &PlanArgs) -> Result<Status, CliError> {
    let recipe = args.recipe.resolve()?;
    let source = ModelSource::open(&args.model)?;
    let plan = ConversionPlan::new(&source, &recipe)?;
    if args.json {
        render::json(&plan)?;
    } else {
        let seconds = match plan.flops {
            0.0 => None,
            flops => Some(flops / (REACHED * dispatch(args.device.resolve(), Ceiling)??)),
        };
        render::plan(&source, &plan, seconds)?;
    }
    Ok(Status::Done)
}

/// Measures how fast large products run.
struct Ceiling;

impl BackendJob for Ceiling {
    type Output = Result<f64, BackendError>;

    fn run<B: Backend>(self, b: &B) -> Self::Output {
        b.measure_gemm_ceiling()
    }
}
