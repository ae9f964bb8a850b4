//! Development tasks: `cargo xtask test` runs every suite, prints each one's seconds and ends with how many passed.

use std::process::{Command, ExitCode};
use std::time::Instant;

/// One suite of the tests.
struct Suite {
    name: &'static str,
    what: &'static str,
    arguments: &'static [&'static str],
    environment: &'static [(&'static str, &'static str)],
}

const SUITES: &[Suite] = &[
    Suite { name: "fmt", what: "the formatting", arguments: &["fmt", "--all", "--check"], environment: &[] },
    Suite {
        name: "clippy",
        what: "the lints",
        arguments: &["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"],
        environment: &[],
    },
    Suite {
        name: "docs",
        what: "the docstrings",
        arguments: &["doc", "--workspace", "--no-deps", "--locked"],
        environment: &[("RUSTDOCFLAGS", "-D warnings")],
    },
    Suite {
        name: "unit",
        what: "unit, property and in-process tests",
        arguments: &["test", "--workspace", "--locked"],
        environment: &[],
    },
];

fn run(suite: &Suite) -> bool {
    println!("== {}: {}", suite.name, suite.what);
    let mut command = Command::new(env!("CARGO"));
    command.args(suite.arguments).envs(suite.environment.iter().copied());
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

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["test"] => test(None),
        ["test", "--suite", name] => test(Some(name)),
        _ => {
            eprintln!("usage: cargo xtask test [--suite NAME]");
            ExitCode::from(2)
        }
    }
}
