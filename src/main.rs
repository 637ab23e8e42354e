//! The `sparsepack` binary: parse, run, report, exit.

use std::process::ExitCode;

fn main() -> ExitCode {
    sparsepack::cli::main()
}
