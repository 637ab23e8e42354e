//! Checks on the table of arguments itself.

use clap::{Arg, Command, CommandFactory};

use super::Cli;

fn commands(command: &Command) -> Vec<&Command> {
    let mut all = vec![command];
    for sub in command.get_subcommands() {
        all.extend(commands(sub));
    }
    all
}

#[test]
fn the_table_is_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn every_argument_has_one_line_of_help() {
    let root = Cli::command();
    for command in commands(&root) {
        for argument in command.get_arguments() {
            let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
            assert!(!help.is_empty(), "{} {}", command.get_name(), argument.get_id());
            assert!(help.len() <= 96, "{} {}: {help}", command.get_name(), argument.get_id());
        }
    }
}

#[test]
fn every_value_has_a_name_in_capitals() {
    let root = Cli::command();
    let takes_value = |argument: &&Arg| argument.get_action().takes_values();
    for command in commands(&root) {
        for argument in command.get_arguments().filter(takes_value) {
            for name in argument.get_value_names().unwrap_or_default() {
                assert_eq!(name.to_uppercase(), name.as_str(), "{}", command.get_name());
            }
        }
    }
}
