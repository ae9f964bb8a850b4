//! Running other people's programs with a deadline.

use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

use crate::Outcome;

/// No program may hang.
const DEADLINE: Duration = Duration::from_secs(300);

/// Runs a program that must succeed; what it printed.
pub async fn tool(program: &str, arguments: &[&str]) -> Outcome<String> {
    let run = Command::new(program).args(arguments).stdin(Stdio::null()).kill_on_drop(true).output();
    let line = || format!("{program} {}", arguments.join(" "));
    let output = tokio::time::timeout(DEADLINE, run)
        .await
        .map_err(|_| format!("{} hangs", line()))?
        .map_err(|error| format!("{program} cannot be run: {error}"))?;
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(printed);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{} failed ({}): {} {}", line(), output.status, printed.trim(), said.trim()))
}
