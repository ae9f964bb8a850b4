//! Development tasks: `cargo xtask test` runs every suite, prints each one's seconds and ends with how many passed;
//! `cargo xtask cluster` is the kill loop over real processes, as long as one likes; `cargo xtask sim` is the
//! deterministic simulation, and `cargo xtask mutants sim` proves that it finds planted faults, `cargo xtask mutants
//! store` that the tests of the store do; `cargo xtask model` checks the models; `cargo xtask fuzz`
//! looks for inputs that no test has; `cargo xtask bench
//! first`, `bench store`, `bench failover` and `bench idle` measure.

mod bench;
mod cluster;
mod csi;
mod fuzz;
mod interop;
mod model;
mod mutants;
mod powercut;
mod sim;
mod store;

use std::process::{Command, ExitCode};
use std::time::Instant;

/// One suite of the tests.
struct Suite {
    name: &'static str,
    what: &'static str,
    how: How,
}

/// How a suite is run.
enum How {
    /// Cargo with these arguments and variables.
    Cargo(&'static [&'static str], &'static [(&'static str, &'static str)]),
    /// The kill loop over real processes with these arguments.
    Cluster(&'static [&'static str]),
    /// The demonstration that a user sees, with less data.
    Demo(&'static [&'static str]),
    /// Other people's programs on every frontend.
    Interop(&'static [&'static str]),
    /// Our tests of the CSI driver; those that mount are left out where nothing can be mounted.
    Csi,
    /// csi-sanity, as file systems and as raw block. Fails where nothing can be mounted, naming what is missing.
    Sanity,
    /// The deterministic simulation, bounded.
    Sim,
}

/// Of the attacks those that say most; `cargo xtask cluster --scenarios` runs all of them.
const ATTACKS: &[&str] = &[
    "--profile",
    "dev",
    "--seed",
    "1",
    "--scenario",
    "partition",
    "--scenario",
    "pause",
    "--scenario",
    "partition-leader-killed",
    "--scenario",
    "pause-leader-killed",
    "--scenario",
    "deaf-leader",
    "--scenario",
    "power-cut",
    "--scenario",
    "lost-quorum",
    "--scenario",
    "bad-requests",
    "--scenario",
    "wrong-directory",
    "--scenario",
    "foreign-peer",
    "--scenario",
    "damaged-journal",
    "--scenario",
    "rotten-entry",
    "--scenario",
    "left-behind",
    "--scenario",
    "moved-replicas",
    "--scenario",
    "lost-node",
    "--scenario",
    "snapshots",
    "--scenario",
    "copies",
    "--scenario",
    "witness",
    // Scripts, which the simulation plays, too.
    "--scenario",
    "leader-in-the-minority",
    "--scenario",
    "partial-partition",
    "--scenario",
    "membership-change-crashes",
    "--scenario",
    "removed-replica-returns",
];

const SUITES: &[Suite] = &[
    Suite { name: "fmt", what: "the formatting", how: How::Cargo(&["fmt", "--all", "--check"], &[]) },
    Suite {
        name: "clippy",
        what: "the lints",
        how: How::Cargo(&["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"], &[]),
    },
    Suite {
        name: "docs",
        what: "the docstrings",
        how: How::Cargo(&["doc", "--workspace", "--no-deps", "--locked"], &[("RUSTDOCFLAGS", "-D warnings")]),
    },
    Suite {
        name: "unit",
        what: "unit, property and in-process tests",
        how: How::Cargo(&["test", "--workspace", "--locked"], &[]),
    },
    Suite {
        name: "sim",
        what: "the deterministic simulation: fresh seeds, known ones, two processes, planted faults",
        how: How::Sim,
    },
    Suite {
        name: "cluster",
        what: "kills of real processes whose unflushed writes are torn, under a verifying load",
        how: How::Cluster(&["--kills", "12", "--seed", "1", "--disk", "tear", "--profile", "dev"]),
    },
    Suite {
        name: "attacks",
        what: "named attacks on real processes, a fault each (docs/FAULTS.md)",
        how: How::Cluster(ATTACKS),
    },
    Suite {
        name: "demo",
        what: "the demonstration zone-loss with a small tree, unflushed writes discarded at the kills",
        how: How::Demo(&["--demo", "zone-loss", "--demo-data", "32MiB", "--disk", "discard"]),
    },
    Suite {
        name: "interop",
        what: "NBD tools, QEMU, fio, ext4 and xfs on every frontend; ext4 over kills of leader and attached node",
        how: How::Interop(&["--brief", "--profile", "dev"]),
    },
    Suite { name: "csi", what: "the CSI driver over a cluster of real processes", how: How::Csi },
    Suite { name: "sanity", what: "csi-sanity, the contract's own suite", how: How::Sanity },
];

fn run(suite: &Suite) -> bool {
    println!("== {}: {}", suite.name, suite.what);
    match suite.how {
        How::Cluster(arguments) => cluster::run(arguments),
        How::Demo(arguments) => demo(arguments).unwrap_or_else(|why| {
            println!("{why}");
            false
        }),
        How::Interop(arguments) => interop::run(arguments),
        How::Csi => csi::scenarios(&[]),
        How::Sanity => {
            // Both, also if the first fails: each tells something.
            let results = ["mount", "block"].map(|mode| csi::sanity(&["--mode", mode]));
            results.into_iter().all(|passed| passed)
        }
        How::Sim => sim::suite(),
        How::Cargo(arguments, environment) => cargo(arguments, environment),
    }
}

/// Builds the program and plays a demonstration; false if a check of it did not hold.
fn demo(arguments: &[&str]) -> Result<bool, String> {
    if !cargo(&["build", "--locked", "-p", "holdfast"], &[]) {
        return Ok(false);
    }
    let program = cluster::programs("dev")?.join("holdfast");
    let status = Command::new(program).arg("dev").args(arguments).status();
    status.map(|status| status.success()).map_err(|error| format!("the demonstration: {error}"))
}

/// Runs cargo; false if it fails.
fn cargo(arguments: &[&str], environment: &[(&str, &str)]) -> bool {
    let mut command = Command::new(env!("CARGO"));
    command.args(arguments).envs(environment.iter().copied());
    match command.status() {
        Ok(status) => status.success(),
        Err(error) => {
            println!("cargo cannot be run: {error}");
            false
        }
    }
}

fn test(only: Option<&str>) -> ExitCode {
    let chosen: Vec<&Suite> =
        SUITES.iter().filter(|suite| only.is_none_or(|name| name == suite.name)).collect();
    if chosen.is_empty() {
        let known: Vec<&str> = SUITES.iter().map(|suite| suite.name).collect();
        eprintln!("there is no suite of that name; there are: {}", known.join(", "));
        return ExitCode::from(2);
    }
    let results: Vec<(&str, bool, f64)> = chosen
        .into_iter()
        .map(|suite| {
            let began = Instant::now();
            (suite.name, run(suite), began.elapsed().as_secs_f64())
        })
        .collect();
    for (name, passed, seconds) in &results {
        println!("{:8} {:6} {seconds:7.1} s", name, if *passed { "passed" } else { "FAILED" });
    }
    let failed = results.iter().filter(|(_, passed, _)| !passed).count();
    println!("{} suites passed, {failed} failed", results.len() - failed);
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn success(passed: bool) -> ExitCode {
    if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["test"] => test(None),
        ["test", "--suite", name] => test(Some(name)),
        ["bench", "first", ref rest @ ..] => success(bench::run(bench::Table::First, rest)),
        ["bench", "store", ref rest @ ..] => success(bench::run(bench::Table::Store, rest)),
        ["bench", "failover", ref rest @ ..] => success(bench::run(bench::Table::Failover, rest)),
        ["bench", "idle", ref rest @ ..] => success(bench::run(bench::Table::Idle, rest)),
        ["cluster", ref rest @ ..] => success(cluster::run(rest)),
        ["fuzz", ref rest @ ..] => success(fuzz::run(rest)),
        ["interop", ref rest @ ..] => success(interop::run(rest)),
        ["sim", ref rest @ ..] => success(sim::run(rest)),
        ["model", ref rest @ ..] => success(model::run(rest)),
        ["mutants", "sim"] => success(sim::mutants()),
        ["mutants", "store", ref only @ ..] => success(store::mutants(only)),
        ["sanity", ref rest @ ..] => success(csi::sanity(rest)),
        ["csi", ref rest @ ..] => success(csi::scenarios(rest)),
        ["store", ref rest @ ..] => success(store::run(rest)),
        ["powercut", ref rest @ ..] => success(powercut::main(rest)),
        ["mutants", ref rest @ ..] => success(mutants::run(rest)),
        _ => {
            eprintln!(
                "usage: cargo xtask test [--suite NAME]\n       {}\n       {}\n       {}\n       {}\n       {}\n       cargo xtask mutants sim\n       {}\n       {}\n       {}\n       {}\n       {}",
                cluster::USAGE,
                fuzz::USAGE,
                interop::USAGE,
                model::USAGE,
                mutants::USAGE,
                sim::USAGE,
                store::USAGE,
                bench::USAGE,
                powercut::USAGE,
                csi::USAGE
            );
            ExitCode::from(2)
        }
    }
}
