//! The `holdfast` command: the daemon of a node, a whole cluster on loopback for development, and the admin commands.

mod cli;
mod client;
mod commands;
mod dev;
mod output;

use std::process::ExitCode;

use clap::Parser;
use holdfast_types::UserError;

use cli::{Cli, Command};
use output::Output;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return misused(&error),
    };
    let output = Output::new(cli.output);
    match run(cli, &output) {
        Ok(code) => code,
        Err(error) => {
            output.error(&error);
            ExitCode::from(error.code.exit_code())
        }
    }
}

/// A command line that is not understood, or a question about it; told as JSON to whoever asked for JSON.
fn misused(error: &clap::Error) -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if error.use_stderr() && cli::wants_json(&arguments) {
        let text = error.to_string();
        let first: Vec<&str> = text.lines().map(str::trim).take_while(|line| !line.is_empty()).collect();
        let message = first.join(" ").trim_start_matches("error: ").to_owned();
        let error = cli::usage(message, "`holdfast --help` lists commands and flags");
        Output::new(output::Format::Json).error(&error);
        return ExitCode::from(error.code.exit_code());
    }
    // Help that nobody reads to its end is no failure.
    let _shown = error.print();
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
}

fn log(default: &str) {
    let filter = tracing_subscriber::EnvFilter::try_from_env("HOLDFAST_LOG");
    let filter = filter.unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(default));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
}

fn run(cli: Cli, output: &Output) -> Result<ExitCode, UserError> {
    match cli.command {
        Command::Node {
            data_dir: Some(directory),
            metrics,
            scrub_period,
            io_engine,
            capacity,
            witness,
            witness_log,
            follow_parent,
            command: None,
        } => {
            log("info,openraft=warn");
            if follow_parent {
                dev::follow_parent()?;
            }
            let overrides = holdfast_node::daemon::Overrides {
                metrics,
                scrub_period_seconds: scrub_period,
                io_engine,
                capacity_bytes: capacity.map(|size| size.0),
                witness,
                witness_log_bytes: witness_log.map(|size| size.0),
            };
            holdfast_node::daemon::run(&directory, overrides).map(|()| ExitCode::SUCCESS)
        }
        Command::Node { command: Some(command), .. } => commands::node::run(command, cli.admin, output),
        Command::Node { .. } => Err(cli::usage(
            "holdfast node needs --data-dir DIR to run a daemon, or a command",
            "`holdfast node --help`; `holdfast dev` makes a whole cluster",
        )),
        Command::Dev { ctl: Some(cli::DevCommand::Ctl { dir, action }), .. } => {
            dev::ctl::send(&dev::ctl::directory(dir, cli.admin.as_deref()), &action, output)
        }
        Command::Dev { ctl: None, options } => {
            log("warn,openraft=error");
            dev::run(options, output)
        }
        Command::Volume { command } => commands::volume::run(command, cli.admin, output),
        Command::Snapshot { command } => commands::snapshot::run(command, cli.admin, output),
        Command::Replica { command } => commands::replica::run(command, cli.admin, output),
        Command::Fence { command } => commands::fence::run(command, cli.admin, output),
        Command::Csi { command } => {
            log("info");
            commands::csi::run(command, cli.admin)
        }
        Command::Status => commands::status(cli.admin, output),
        Command::Completions { shell } => {
            let mut command = <Cli as clap::CommandFactory>::command();
            clap_complete::generate(shell, &mut command, "holdfast", &mut std::io::stdout());
            Ok(ExitCode::SUCCESS)
        }
        Command::Later(words) => Err(cli::not_built(&words, "holdfast")),
    }
}
