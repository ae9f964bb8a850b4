//! `cargo xtask bench first`: builds the programs and measures the data path beside the machine's floors. `cargo xtask
//! bench store`: one store alone. `cargo xtask bench failover`: what happens when leaders go.

use std::process::Command;

use crate::cluster::programs;

/// How it is called.
pub const USAGE: &str = "cargo xtask bench first [--rounds N] [--size-mib N] [--directory DIR]
       cargo xtask bench store [--rounds N] [--journal-mib N] [--quick] [--only SECTION]… [--directory DIR]
       cargo xtask bench failover [--rounds N] [--only SECTION]… [--directory DIR] [--profile release|dev]
       cargo xtask bench idle [--replicas N]… [--seconds N] [--patience S] [--directory DIR] [--profile release|dev]";

/// A table that can be measured.
#[derive(Clone, Copy, PartialEq)]
pub enum Table {
    /// The data path of a cluster.
    First,
    /// One store.
    Store,
    /// Leaders that go.
    Failover,
    /// Replicas to which nothing happens.
    Idle,
}

/// The commit, with a mark if the tree differs from it.
fn commit() -> String {
    let git = |arguments: &[&str]| {
        let output =
            Command::new("git").args(arguments).output().ok().filter(|output| output.status.success());
        output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let Some(head) = git(&["rev-parse", "--short=10", "HEAD"]) else { return "unknown".into() };
    // The results themselves do not make another program.
    let changed = git(&["status", "--porcelain", "--", ":!benches/results"]);
    if changed.is_none_or(|changed| changed.is_empty()) { head } else { format!("{head}-changed") }
}

/// The profile to build with, and what is left for the program.
fn profile<'g>(given: &[&'g str]) -> Result<(&'g str, Vec<&'g str>), String> {
    let Some(at) = given.iter().position(|argument| *argument == "--profile") else {
        return Ok(("release", given.to_vec()));
    };
    let profile = given.get(at + 1).ok_or_else(|| format!("usage: {USAGE}"))?;
    Ok((profile, [&given[..at], &given[at + 2..]].concat()))
}

fn try_run(table: Table, given: &[&str]) -> Result<bool, String> {
    let (profile, given) = profile(given)?;
    let by_profile = format!("--profile={profile}");
    let mut build = vec!["build", "--locked", &by_profile, "-p", "holdfast-bench"];
    if table != Table::Store {
        build.extend(["-p", "holdfast"]);
    }
    if !crate::cargo(&build, &[]) {
        return Ok(false);
    }
    let programs = programs(profile)?;
    let bench = programs.join("holdfast-bench");
    // Before everything else, where that is allowed: neighbours disturb less.
    let allowed = Command::new("nice").args(["-n", "-20", "true"]).output();
    let mut command = match allowed {
        Ok(output) if output.status.success() && output.stderr.is_empty() => {
            let mut nice = Command::new("nice");
            nice.args(["-n", "-20"]).arg(bench);
            nice
        }
        _ => Command::new(bench),
    };
    match table {
        Table::First => command.arg("first").arg("--program").arg(programs.join("holdfast")),
        Table::Store => command.arg("store"),
        Table::Failover | Table::Idle => {
            let table = if table == Table::Idle { "idle" } else { "failover" };
            command.args([table, "--built", profile]).arg("--program").arg(programs.join("holdfast"))
        }
    };
    command.args(["--commit", &commit()]).args(given);
    let status = command.status().map_err(|error| error.to_string())?;
    Ok(status.success())
}

/// Runs it; false if it failed.
pub fn run(table: Table, given: &[&str]) -> bool {
    try_run(table, given).unwrap_or_else(|why| {
        println!("{why}");
        false
    })
}
