//! `cargo xtask cluster`: builds the programs and runs the kill loop of `tests/cluster`.

use std::path::PathBuf;
use std::process::Command;

/// How it is called.
pub const USAGE: &str = "cargo xtask cluster [--kills N] [--seed S] [--disk plain|discard|tear|lie] \
[--all-at-once] [--keep DIR] [--profile release|dev]";

struct Arguments {
    kills: String,
    seed: String,
    disk: String,
    all_at_once: bool,
    keep: Option<String>,
    profile: String,
}

fn parse(given: &[&str]) -> Option<Arguments> {
    let mut out = Arguments {
        kills: "100".into(),
        seed: "1".into(),
        disk: "plain".into(),
        all_at_once: false,
        keep: None,
        profile: "release".into(),
    };
    let mut rest = given.iter();
    while let Some(flag) = rest.next() {
        if *flag == "--all-at-once" {
            out.all_at_once = true;
            continue;
        }
        let value = rest.next()?.to_string();
        match *flag {
            "--kills" => out.kills = value,
            "--seed" => out.seed = value,
            "--disk" => out.disk = value,
            "--keep" => out.keep = Some(value),
            "--profile" => out.profile = value,
            _ => return None,
        }
    }
    Some(out)
}

/// Where cargo puts the programs of a profile.
pub fn programs(profile: &str) -> Result<PathBuf, String> {
    let metadata =
        cargo_metadata::MetadataCommand::new().no_deps().exec().map_err(|error| error.to_string())?;
    let directory = if profile == "dev" { "debug" } else { profile };
    Ok(metadata.target_directory.join(directory).into_std_path_buf())
}

fn try_run(arguments: &Arguments) -> Result<bool, String> {
    let profile = format!("--profile={}", arguments.profile);
    let packages = ["-p", "holdfast", "-p", "holdfast-cluster"];
    if !crate::cargo(&[&["build", "--locked", &profile][..], &packages].concat(), &[]) {
        return Ok(false);
    }
    let programs = programs(&arguments.profile)?;
    let mut command = Command::new(programs.join("holdfast-cluster"));
    command.arg("--program").arg(programs.join("holdfast"));
    if let Some(keep) = &arguments.keep {
        command.args(["--keep", keep]);
    }
    command.args([
        "kills",
        "--kills",
        &arguments.kills,
        "--seed",
        &arguments.seed,
        "--disk",
        &arguments.disk,
    ]);
    if arguments.all_at_once {
        command.arg("--all-at-once");
    }
    let status = command.status().map_err(|error| error.to_string())?;
    Ok(status.success())
}

/// Runs it; false if a check failed.
pub fn run(given: &[&str]) -> bool {
    let Some(arguments) = parse(given) else {
        eprintln!("usage: {USAGE}");
        return false;
    };
    try_run(&arguments).unwrap_or_else(|why| {
        println!("{why}");
        false
    })
}
