//! `cargo xtask bench first`: builds the programs and measures the data path beside the machine's floors. `cargo xtask
//! bench store`: one store alone.

use std::process::Command;

use crate::cluster::programs;

/// How it is called.
pub const USAGE: &str = "cargo xtask bench first [--rounds N] [--size-mib N] [--directory DIR]
       cargo xtask bench store [--rounds N] [--journal-mib N] [--quick] [--only SECTION]… [--directory DIR]";

/// A table that can be measured.
#[derive(Clone, Copy, PartialEq)]
pub enum Table {
    /// The data path of a cluster.
    First,
    /// One store.
    Store,
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

fn try_run(table: Table, given: &[&str]) -> Result<bool, String> {
    let mut build = vec!["build", "--locked", "--release", "-p", "holdfast-bench"];
    if table == Table::First {
        build.extend(["-p", "holdfast"]);
    }
    if !crate::cargo(&build, &[]) {
        return Ok(false);
    }
    let programs = programs("release")?;
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
