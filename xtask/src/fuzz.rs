//! `cargo xtask fuzz`: libFuzzer over every reader of the store's bytes, each for a bounded time, from the corpus that
//! the tests read. Built by the stable compiler: coverage is a pass of LLVM's, and no sanitizer is asked for.

use std::path::{Path, PathBuf};
use std::process::Command;

/// How it is called.
pub const USAGE: &str = "cargo xtask fuzz --seconds N [TARGET…]";

/// What libFuzzer needs of the compiler, as `cargo fuzz` gives it, without a sanitizer.
const FLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1";

/// No input is longer: a table page and its checksums.
const INPUT_BYTES_MAX: u64 = 8192;
/// One input that takes longer is a failure.
const INPUT_SECONDS_MAX: u64 = 20;
/// More memory than this is a failure: every reader bounds what it allocates.
const MEMORY_MIB_MAX: u64 = 512;

fn store() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/store")
}

/// What can be fuzzed (`holdfast_store::testing::fuzz`): each target has a corpus of its name.
fn targets() -> Result<Vec<String>, String> {
    let place = store().join("tests/corpus");
    let wrong = |error: std::io::Error| format!("{}: {error}", place.display());
    let entries = std::fs::read_dir(&place).map_err(wrong)?;
    let names = entries.map(|entry| Ok(entry.map_err(wrong)?.file_name().to_string_lossy().into_owned()));
    let mut names = names.collect::<Result<Vec<_>, String>>()?;
    names.sort();
    Ok(names)
}

fn build() -> Result<PathBuf, String> {
    let place = store().join("fuzz");
    // For one target, so that build scripts are not instrumented.
    let host = host()?;
    let mut command = Command::new(env!("CARGO"));
    command.args(["build", "--release", "--locked", "--target", &host]).current_dir(&place);
    command.env("RUSTFLAGS", FLAGS).env_remove("CARGO_TARGET_DIR").env_remove("CARGO_ENCODED_RUSTFLAGS");
    let built = command.status().map_err(|error| error.to_string())?;
    if !built.success() {
        return Err("the fuzzer cannot be built".into());
    }
    Ok(place.join("target").join(host).join("release/reader"))
}

fn host() -> Result<String, String> {
    let said = Command::new("rustc").arg("-vV").output().map_err(|error| error.to_string())?;
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    let host = said.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned).ok_or_else(|| "rustc does not say its host".into())
}

/// Fuzzes one reader; what is found new is kept outside the tree, an input that fails is named.
fn fuzz(program: &Path, target: &str, seconds: u64) -> Result<bool, String> {
    let place = store().join("fuzz/target/found").join(target);
    let failed = store().join("fuzz/target/failed").join(target);
    for directory in [&place, &failed] {
        std::fs::create_dir_all(directory).map_err(|error| format!("{}: {error}", directory.display()))?;
    }
    let status = Command::new(program)
        .env("HOLDFAST_FUZZ", target)
        .arg(&place)
        .arg(store().join("tests/corpus").join(target))
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-max_len={INPUT_BYTES_MAX}"))
        .arg(format!("-timeout={INPUT_SECONDS_MAX}"))
        .arg(format!("-rss_limit_mb={MEMORY_MIB_MAX}"))
        .arg(format!("-artifact_prefix={}/", failed.display()))
        .args(["-print_final_stats=1", "-verbosity=0"])
        .status()
        .map_err(|error| format!("{}: {error}", program.display()))?;
    let verdict = if status.success() { "nothing found" } else { "FAILED: put the input into the corpus" };
    println!("{target:9} {seconds} s: {verdict}");
    Ok(status.success())
}

fn try_run(seconds: u64, chosen: &[&str]) -> Result<bool, String> {
    let targets = targets()?;
    if let Some(unknown) = chosen.iter().find(|name| !targets.iter().any(|target| target == *name)) {
        return Err(format!("there is no target '{unknown}'; there are: {}", targets.join(", ")));
    }
    let program = build()?;
    let mut passed = true;
    for target in targets.iter().filter(|name| chosen.is_empty() || chosen.contains(&name.as_str())) {
        passed &= fuzz(&program, target, seconds)?;
    }
    Ok(passed)
}

/// Runs it; false if an input makes a reader panic, invent, or take more than its bound.
pub fn run(given: &[&str]) -> bool {
    let (seconds, chosen) = match given {
        ["--seconds", seconds, chosen @ ..] => (seconds.parse().ok(), chosen),
        _ => (None, &[][..]),
    };
    let Some(seconds) = seconds else {
        eprintln!("usage: {USAGE}");
        return false;
    };
    try_run(seconds, chosen).unwrap_or_else(|why| {
        println!("{why}");
        false
    })
}
