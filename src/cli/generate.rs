//! `sparsepack generate`.

use std::io::Write;

use clap::{Args, Command, Subcommand};
use clap_complete::Shell;

use super::{CliError, Status};
use crate::recipe::Recipe;

#[derive(Debug, Args)]
pub(super) struct GenerateArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// The man page of sparsepack and its commands (roff).
    Man,
    /// Completions for a shell.
    Completions {
        /// The shell.
        #[arg(value_name = "SHELL")]
        shell: Shell,
    },
    /// JSON schema of a recipe.
    RecipeSchema,
}

pub(super) fn run(args: &GenerateArgs, command: &mut Command) -> Result<Status, CliError> {
    let mut bytes = Vec::new();
    match args.what {
        What::Man => {
            command.build();
            man_pages(command, &mut bytes)?;
        }
        What::Completions { shell } => {
            clap_complete::generate(shell, command, "sparsepack", &mut bytes);
        }
        What::RecipeSchema => {
            serde_json::to_writer_pretty(&mut bytes, &schemars::schema_for!(Recipe))?;
            bytes.push(b'\n');
        }
    }
    std::io::stdout().lock().write_all(&bytes)?;
    Ok(Status::Done)
}

/// The page of a command, and those of the commands below it.
fn man_pages(command: &Command, bytes: &mut Vec<u8>) -> Result<(), CliError> {
    clap_mangen::Man::new(command.clone()).render(bytes)?;
    let subcommands = command.get_subcommands().filter(|sub| sub.get_name() != "help");
    subcommands.into_iter().try_for_each(|sub| man_pages(sub, bytes))
}
