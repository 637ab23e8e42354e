//! `sparsepack unpack`.

use std::path::PathBuf;

use clap::{Args, ValueHint};

use super::{CliError, Status, render};
use crate::pipeline::unpack;

#[derive(Debug, Args)]
pub(super) struct UnpackArgs {
    /// A packed or compressed output of convert.
    #[arg(value_name = "PACKED", value_hint = ValueHint::DirPath)]
    packed: PathBuf,
    /// Directory for the plain safetensors; made, or empty.
    #[arg(short, long, value_name = "DENSE", value_hint = ValueHint::DirPath)]
    output: PathBuf,
}

pub(super) fn run(args: &UnpackArgs) -> Result<Status, CliError> {
    let bytes = unpack(&args.packed, &args.output)?;
    render::unpacked(&args.output, bytes)?;
    Ok(Status::Done)
}
