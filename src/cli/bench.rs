//! `sparsepack bench`.
#![allow(clippy::doc_markdown, reason = "doc comments here are help texts, shown without markup")]

use clap::{Args, Subcommand};

use super::{CliError, Status, args::DeviceArgs, convert::available_memory, render};
use crate::{
    backend::{Device, dispatch},
    compress::Sparsity,
    pipeline::LayerBench,
};

/// Most rows and columns of a layer, and most tokens.
const MAX_SIDE: i64 = 1 << 20;
const MAX_TOKENS: i64 = 1 << 30;

/// Worked example of `--help`.
const EXAMPLE: &str = "\
Example: what a layer of a 7B model takes
  sparsepack bench layer --rows 4096 --cols 4096 --tokens 32768 --sparsity 2:4";

#[derive(Debug, Args)]
pub(super) struct BenchArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Time each phase of one layer on made-up inputs: SparseGPT, packed in bf16.
    Layer(LayerArgs),
}

#[derive(Debug, Args)]
#[command(after_help = EXAMPLE)]
struct LayerArgs {
    /// Output features.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=MAX_SIDE))]
    rows: u32,
    /// Input features.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=MAX_SIDE))]
    cols: u32,
    /// Calibration tokens, in batches of 2048.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=MAX_TOKENS))]
    tokens: u32,
    /// Kept:group like 2:4, or a percentage of zeros like 50%.
    #[arg(long, value_name = "SPARSITY", default_value = "2:4")]
    sparsity: Sparsity,
    /// Rounds whose median is taken; one before them is not counted.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    repeat: u16,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &BenchArgs) -> Result<Status, CliError> {
    let What::Layer(args) = &args.what;
    let bench = LayerBench {
        rows: args.rows as usize,
        cols: args.cols as usize,
        tokens: args.tokens as usize,
        sparsity: args.sparsity,
        repeat: usize::from(args.repeat),
    };
    bench.encoding()?;
    let device = args.device.resolve();
    check_memory(&bench, device.device == Device::Cpu)?;
    let times = dispatch(device, bench)??;
    if args.json {
        render::json(&times)?;
    } else {
        render::layer_times(&times)?;
    }
    Ok(Status::Done)
}

/// Refuses a layer that the host cannot hold, where the system says what it can.
fn check_memory(bench: &LayerBench, on_host: bool) -> Result<(), CliError> {
    let needed = bench.host_bytes(on_host);
    match available_memory() {
        Some(free) if needed > free => Err(CliError::Usage(format!(
            "a layer of {} x {} needs {} of memory, and {} can be had; choose smaller --rows or --cols",
            bench.rows,
            bench.cols,
            render::bytes(needed),
            render::bytes(free)
        ))),
        _ => Ok(()),
    }
}
