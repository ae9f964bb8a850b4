//! Measures the data path beside the floors of the machine that it runs on: `cargo xtask bench first`; one store alone:
//! `cargo xtask bench store`; what happens when leaders go: `cargo xtask bench failover`; what idle replicas cost:
//! `cargo xtask bench idle`.
//!
//! In the first table everything that is measured is a child process that is told what to do line by line; floor and subject take turns
//! in every round, so that what disturbs the machine disturbs both. Nothing here passes or fails on time.

mod child;
mod client;
mod cluster;
mod daemons;
mod disk;
mod echo;
mod failover;
mod first;
mod floors;
mod idle;
mod load;
mod member;
mod report;
mod store;
mod trio;
mod usage;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// What went wrong, as a sentence.
pub type Outcome<T> = Result<T, String>;

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// The first table: durable writes and reads of a replicated volume, in-process and over NBD.
    First(first::Plan),
    /// The store's table: one store alone, without Raft and network.
    Store(store::Plan),
    /// The table of failover: stalls, a slow follower, bytes that healing sends.
    Failover(failover::Plan),
    /// What replicas cost while nothing happens.
    Idle(idle::Plan),
    /// What a store needs of memory (a part of `store`).
    #[command(hide = true)]
    StoreMemory {
        #[arg(long)]
        question: store::memory::Question,
        #[arg(long)]
        directory: PathBuf,
    },
    /// One process of three that hold a volume (a part of `first`).
    #[command(hide = true)]
    Member {
        #[arg(long)]
        directory: PathBuf,
        #[arg(long)]
        number: usize,
    },
    /// An NBD client (a part of `first`).
    #[command(hide = true)]
    Client {
        #[arg(long)]
        socket: PathBuf,
        #[arg(long)]
        export: String,
    },
    /// Answers every frame with a small one (a part of `first`).
    #[command(hide = true)]
    Echo {
        #[arg(long)]
        address: String,
    },
    /// Sends a frame to both echoes and waits for the first answer (a part of `first`).
    #[command(hide = true)]
    Ask {
        #[arg(long)]
        address: Vec<String>,
    },
}

fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Command::First(plan) => first::run(&plan),
        Command::Store(plan) => store::run(&plan),
        Command::Failover(plan) => failover::run(&plan),
        Command::Idle(plan) => idle::run(&plan),
        Command::StoreMemory { question, directory } => store::memory::answer(question, &directory),
        Command::Member { directory, number } => member::run(&directory, number),
        Command::Client { socket, export } => client::run(&socket, &export),
        Command::Echo { address } => echo::answer(&address),
        Command::Ask { address } => echo::ask(&address),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("FAILED: {why}");
            ExitCode::FAILURE
        }
    }
}
