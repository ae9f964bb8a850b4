//! `cargo xtask bench first`: builds the programs and measures the data path beside the machine's floors.

use std::process::Command;

use crate::cluster::programs;

/// How it is called.
pub const USAGE: &str = "cargo xtask bench first [--rounds N] [--size-mib N] [--directory DIR]";

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

fn try_run(given: &[&str]) -> Result<bool, String> {
    let build = ["build", "--locked", "--release", "-p", "holdfast", "-p", "holdfast-bench"];
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
    command.args(["first", "--commit", &commit(), "--program"]).arg(programs.join("holdfast")).args(given);
    let status = command.status().map_err(|error| error.to_string())?;
    Ok(status.success())
}

/// Runs it; false if it failed.
pub fn run(given: &[&str]) -> bool {
    try_run(given).unwrap_or_else(|why| {
        println!("{why}");
        false
    })
}
