//! `sparsepack plan`.

use std::path::PathBuf;

use clap::{Args, ValueHint};

use super::{CliError, Status, args::RecipeArgs, render};
use crate::{model::ModelSource, pipeline::ConversionPlan};

#[derive(Debug, Args)]
pub(super) struct PlanArgs {
    /// Directory with config.json and safetensors, a .gguf file, or a packed output.
    #[arg(value_name = "MODEL", value_hint = ValueHint::AnyPath)]
    model: PathBuf,
    #[command(flatten)]
    recipe: RecipeArgs,
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
        render::plan(&source, &plan)?;
    }
    Ok(Status::Done)
}
