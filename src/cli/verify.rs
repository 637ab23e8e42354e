//! `sparsepack verify`.

use std::path::PathBuf;

use clap::{Args, ValueHint};

use super::{CliError, Status, render};
use crate::pipeline::{VerifyOptions, verify};

#[derive(Debug, Args)]
pub(super) struct VerifyArgs {
    /// A finished output of convert.
    #[arg(value_name = "OUT", value_hint = ValueHint::DirPath)]
    output: PathBuf,
    /// Also check that every tensor decodes to the same bits as in this checkpoint.
    #[arg(long, value_name = "MODEL", value_hint = ValueHint::AnyPath)]
    against: Option<PathBuf>,
    /// Check this share of the tensors only, spread evenly, like 5%.
    #[arg(long, value_name = "SHARE", value_parser = parse_share)]
    sample: Option<f64>,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &VerifyArgs) -> Result<Status, CliError> {
    let options = VerifyOptions { sample: args.sample };
    let report = verify(&args.output, args.against.as_deref(), &options)?;
    if args.json {
        render::json(&report)?;
    } else {
        render::verify(&args.output, &report)?;
    }
    Ok(if report.findings.is_empty() { Status::Done } else { Status::Mismatch })
}

fn parse_share(text: &str) -> Result<f64, String> {
    let (number, factor) = match text.strip_suffix('%') {
        Some(percent) => (percent, 0.01),
        None => (text, 1.0),
    };
    match number.trim().parse::<f64>() {
        Ok(value) if value * factor > 0.0 && value * factor <= 1.0 => Ok(value * factor),
        _ => Err("write a share like 5%, above 0 and at most 100%".to_owned()),
    }
}
