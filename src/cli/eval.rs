//! `sparsepack eval`.

use std::path::PathBuf;

use clap::{Args, ValueHint};
use serde::Serialize;

use super::{CliError, Status, args::DeviceArgs, progress::Bar, render};
use crate::{
    backend::dispatch,
    calibration::{DatasetError, read_text},
    eval::{Perplexity, PerplexityJob},
    model::{ModelSource, Tokenizer},
    pipeline::NoProgress,
};

#[derive(Debug, Args)]
pub(super) struct EvalArgs {
    /// Directory with config.json and safetensors, a .gguf file, or a packed output.
    #[arg(value_name = "MODEL", value_hint = ValueHint::AnyPath)]
    model: PathBuf,
    /// Text to predict; use one that no calibration has seen.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    text: PathBuf,
    /// Tokens of a window.
    #[arg(long, value_name = "TOKENS", default_value_t = 2048)]
    window: usize,
    /// Evaluate at most this many windows, from the start of the text.
    #[arg(long, value_name = "N")]
    max_windows: Option<usize>,
    /// Exit with code 3 when the perplexity is above this.
    #[arg(long, value_name = "PERPLEXITY")]
    fail_above: Option<f64>,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// What an evaluation prints.
#[derive(Debug, Serialize)]
pub(super) struct EvalReport {
    /// The text's file name.
    pub(super) text: String,
    #[serde(flatten)]
    pub(super) perplexity: Perplexity,
    /// Weights of the model.
    pub(super) parameters: u64,
    /// Operations a token, at half a window of context.
    pub(super) flops_per_token: u64,
    /// Bytes of the stored tensors.
    pub(super) stored_bytes: u64,
    /// Device and arithmetic.
    pub(super) compute: String,
}

pub(super) fn run(args: &EvalArgs, quiet: bool) -> Result<Status, CliError> {
    let source = ModelSource::open(&args.model)?;
    let config = source.config();
    config.check_sequence(args.window)?;
    if args.window < 2 {
        return Err(CliError::Usage("--window must be at least 2 tokens".to_owned()));
    }
    let tokenizer = Tokenizer::open(&source)?;
    let ids = tokenizer.encode(&read_text(&args.text)?)?;
    let windows: Vec<Vec<u32>> = ids
        .chunks_exact(args.window)
        .take(args.max_windows.unwrap_or(usize::MAX))
        .map(<[u32]>::to_vec)
        .collect();
    if windows.is_empty() {
        return Err(DatasetError::TooShort {
            path: args.text.clone(),
            samples: 1,
            seq_len: args.window,
            needed: args.window,
            found: ids.len(),
        }
        .into());
    }
    let bar = Bar::new("evaluating");
    let job = PerplexityJob {
        source: &source,
        windows: &windows,
        text_tokens: ids.len(),
        progress: if quiet { &NoProgress } else { &bar },
    };
    let device = args.device.resolve();
    let (perplexity, compute) = dispatch(device, job)??;
    let flops = config.flops_per_token(source.arch(), args.window / 2);
    let report = EvalReport {
        text: args.text.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        perplexity,
        parameters: config.parameters(source.arch()).total(),
        flops_per_token: flops.linear + flops.attention + flops.lm_head,
        stored_bytes: source.tensors().iter().map(|tensor| tensor.stored_bytes).sum(),
        compute,
    };
    if args.json {
        render::json(&report)?;
    } else {
        render::eval(&report)?;
    }
    let measured = report.perplexity.perplexity;
    // A model that gives NaN is worse than any limit.
    let above = args.fail_above.is_some_and(|limit| measured > limit || measured.is_nan());
    Ok(if above { Status::Mismatch } else { Status::Done })
}
