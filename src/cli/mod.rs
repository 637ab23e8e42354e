//! The command line: arguments to library calls, results to text or JSON.
//!
//! Standard output carries what was asked for; progress, logs and errors go to standard error.

mod args;
mod bench;
mod convert;
mod error;
mod eval;
mod generate;
mod inspect;
mod plan;
mod progress;
mod render;
mod unpack;
mod verify;

use std::{io::IsTerminal, process::ExitCode};

use clap::{CommandFactory, Parser, Subcommand};
use tracing::level_filters::LevelFilter;

pub use error::CliError;

/// Streaming converter and packer for LLM checkpoints.
#[derive(Debug, Parser)]
#[command(name = "sparsepack", version, propagate_version = true, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,

    /// More log lines on standard error (-v debug, -vv trace).
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    verbose: u8,

    /// Warnings and errors only; no progress bar.
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show what a checkpoint holds.
    Inspect(inspect::InspectArgs),
    /// Show what convert would do, without reading tensor data.
    Plan(plan::PlanArgs),
    /// Prune a checkpoint and write it out, packed or plain.
    Convert(convert::ConvertArgs),
    /// Measure perplexity on a text.
    Eval(eval::EvalArgs),
    /// Check an output: digests, pattern, and another checkpoint.
    Verify(verify::VerifyArgs),
    /// Write a packed or compressed directory as plain safetensors, bit for bit.
    Unpack(unpack::UnpackArgs),
    /// Measure how fast this machine prunes a layer.
    Bench(bench::BenchArgs),
    /// Print a man page, shell completions, or the recipe schema.
    Generate(generate::GenerateArgs),
}

/// How a command ended when nothing failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Status {
    /// All is well.
    Done,
    /// A check found something: exit code 3.
    Mismatch,
}

/// Parses the process's arguments, runs the command and turns the result into an exit code:
/// 0 done, 1 failed, 2 bad usage or recipe, 3 a check found a mismatch.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let code = if error.use_stderr() { 2 } else { 0 };
            // Nothing is left to do when the terminal is gone.
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    start_logging(cli.verbose, cli.quiet);
    match cli.command.run(cli.quiet) {
        Ok(Status::Done) => ExitCode::SUCCESS,
        Ok(Status::Mismatch) => ExitCode::from(3),
        Err(error) if error.is_broken_pipe() => ExitCode::SUCCESS,
        Err(error) => {
            render::error(&error);
            ExitCode::from(error.exit_code())
        }
    }
}

impl Command {
    fn run(self, quiet: bool) -> Result<Status, CliError> {
        match self {
            Self::Inspect(args) => inspect::run(&args),
            Self::Plan(args) => plan::run(&args),
            Self::Convert(args) => convert::run(&args, quiet),
            Self::Eval(args) => eval::run(&args, quiet),
            Self::Verify(args) => verify::run(&args),
            Self::Unpack(args) => unpack::run(&args),
            Self::Bench(args) => bench::run(&args),
            Self::Generate(args) => generate::run(&args, &mut Cli::command()),
        }
    }
}

fn start_logging(verbose: u8, quiet: bool) {
    let level = match (quiet, verbose) {
        (true, _) => LevelFilter::WARN,
        (false, 0) => LevelFilter::INFO,
        (false, 1) => LevelFilter::DEBUG,
        (false, _) => LevelFilter::TRACE,
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(progress::log_writer)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .without_time()
        .init();
}

#[cfg(test)]
mod tests;
