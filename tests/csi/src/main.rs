//! Tests of the CSI driver against a development cluster of real processes, run by `cargo xtask csi`.
//!
//! Those about volumes run for anybody; those that mount need root, `/dev/fuse` and loop devices.

mod cluster;
mod csi;
mod scenarios;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;

use cluster::Cluster;
use scenarios::{Needs, SCENARIOS};

/// What went wrong, as a sentence.
pub type Outcome<T> = Result<T, String>;

#[derive(Parser)]
struct Arguments {
    /// The `holdfast` program to test.
    #[arg(long)]
    program: PathBuf,
    /// Leave out what needs root.
    #[arg(long)]
    unprivileged: bool,
    /// Only these.
    names: Vec<String>,
}

async fn run(arguments: &Arguments) -> Outcome<bool> {
    let known: Vec<&str> = SCENARIOS.iter().map(|scenario| scenario.name).collect();
    if let Some(unknown) = arguments.names.iter().find(|name| !known.contains(&name.as_str())) {
        return Err(format!("there is no scenario {unknown}; there are: {}", known.join(", ")));
    }
    let chosen = SCENARIOS
        .iter()
        .filter(|scenario| arguments.names.is_empty() || arguments.names.iter().any(|n| n == scenario.name))
        .filter(|scenario| !arguments.unprivileged || scenario.needs == Needs::Nothing);
    let cluster = Cluster::start(&arguments.program).await?;
    let (mut passed, mut failed) = (0, 0);
    for scenario in chosen {
        let began = Instant::now();
        let result = (scenario.run)(&cluster).await;
        let seconds = began.elapsed().as_secs_f64();
        match result {
            Ok(()) => {
                passed += 1;
                println!("  passed {seconds:5.1} s  {}", scenario.name);
            }
            Err(why) => {
                failed += 1;
                println!("  FAILED {seconds:5.1} s  {}: {why}", scenario.name);
            }
        }
    }
    let left = cluster.stop().await?;
    println!("csi: {passed} passed, {failed} failed; {} mounts left behind", left.len());
    for mount in &left {
        println!("  left behind: {mount}");
    }
    Ok(failed == 0 && passed > 0 && left.is_empty())
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
    let result = runtime.block_on(run(&arguments));
    // A thread may hang in the kernel with a file system that a failed test left.
    runtime.shutdown_background();
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(why) => {
            println!("FAILED: {why}");
            ExitCode::FAILURE
        }
    }
}
