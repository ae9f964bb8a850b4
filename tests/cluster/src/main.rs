//! Tests of real processes on loopback, run by `cargo xtask cluster`: SIGKILL and power cuts under a load that
//! verifies every answer. Each run prints its seed and its figures.

mod dev;
mod history;
mod holder;
mod interop;
mod kills;
mod load;
mod powercut;
mod random;
mod scenarios;
mod script;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// What went wrong, as a sentence.
pub type Outcome<T> = Result<T, String>;

#[derive(Parser)]
struct Arguments {
    /// The `holdfast` program to test.
    #[arg(long)]
    program: PathBuf,
    /// Keep the cluster's directory here instead of removing it.
    #[arg(long)]
    keep: Option<PathBuf>,
    #[command(subcommand)]
    scenario: Scenario,
}

#[derive(Subcommand)]
enum Scenario {
    /// SIGKILL of leader, follower, attached node, all at once and at random, under a verifying load.
    Kills {
        #[arg(long)]
        kills: u32,
        #[arg(long)]
        seed: u64,
        /// What happens to unflushed writes: plain, discard, tear or lie.
        #[arg(long, default_value = "plain")]
        disk: String,
        /// Kill everybody at once every time.
        #[arg(long)]
        all_at_once: bool,
    },
    /// Says which named attacks there are.
    List,
    /// Named attacks; all of them if none is named.
    Scenarios {
        /// Which.
        names: Vec<String>,
        #[arg(long)]
        seed: u64,
        /// Times that what can be repeated is repeated.
        #[arg(long, default_value_t = 1)]
        rounds: u32,
    },
    /// Power cuts of a virtual machine in which a whole cluster runs under a load that the host checks.
    Powercut(powercut::Plan),
    /// What runs inside of that machine.
    Guest(powercut::GuestPlan),
    /// Programs that know nothing of Holdfast on every frontend; ext4 over kills. Needs root.
    Interop {
        /// Less of everything, for the test suites.
        #[arg(long)]
        brief: bool,
        /// Only steps whose name contains this.
        #[arg(long)]
        only: Option<String>,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("no runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let Arguments { program, keep, scenario } = arguments;
    let result = runtime.block_on(async move {
        match scenario {
            Scenario::Kills { kills, seed, disk, all_at_once } => {
                kills::run(&program, keep, &kills::Plan { kills, seed, disk, all_at_once }).await
            }
            Scenario::List => {
                scenarios::list();
                Ok(())
            }
            Scenario::Scenarios { names, seed, rounds } => {
                let place = scenarios::Place { program: &program, keep, seed, rounds };
                scenarios::run(&names, &place).await
            }
            Scenario::Powercut(plan) => powercut::run(&plan).await,
            Scenario::Guest(plan) => powercut::guest(&program, &plan).await,
            Scenario::Interop { brief, only } => interop::run(&program, keep, brief, only.as_deref()).await,
        }
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            println!("FAILED: {why}");
            ExitCode::FAILURE
        }
    }
}
