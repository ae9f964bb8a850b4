//! `cargo xtask cluster`: builds the programs and runs the kill loop or the named scenarios of `tests/cluster`.

use std::path::PathBuf;
use std::process::Command;

/// How it is called.
pub const USAGE: &str = "cargo xtask cluster [--kills N] [--seed S] [--disk plain|discard|tear|lie] \
[--all-at-once] [--keep DIR] [--profile release|dev]
       cargo xtask cluster --list | --scenarios | --scenario NAME [--scenario NAME ...] [--rounds N] [--seed S] \
[--keep DIR] [--profile release|dev]";

struct Arguments {
    kills: String,
    seed: String,
    disk: String,
    all_at_once: bool,
    /// `Some`: these scenarios instead of the kill loop; all of them if empty.
    scenarios: Option<Vec<String>>,
    /// Only say which there are.
    list: bool,
    rounds: String,
    keep: Option<String>,
    profile: String,
}

fn parse(given: &[&str]) -> Option<Arguments> {
    let mut out = Arguments {
        kills: "100".into(),
        seed: "1".into(),
        disk: "plain".into(),
        all_at_once: false,
        scenarios: None,
        list: false,
        rounds: "1".into(),
        keep: None,
        profile: "release".into(),
    };
    let mut rest = given.iter();
    while let Some(flag) = rest.next() {
        if *flag == "--all-at-once" {
            out.all_at_once = true;
            continue;
        }
        if *flag == "--scenarios" {
            out.scenarios = Some(Vec::new());
            continue;
        }
        if *flag == "--list" {
            out.list = true;
            continue;
        }
        let value = rest.next()?.to_string();
        match *flag {
            "--kills" => out.kills = value,
            "--seed" => out.seed = value,
            "--disk" => out.disk = value,
            "--scenario" => out.scenarios.get_or_insert_default().push(value),
            "--rounds" => out.rounds = value,
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
    if arguments.list {
        command.arg("list");
    } else if let Some(names) = &arguments.scenarios {
        command.args(["scenarios", "--seed", &arguments.seed, "--rounds", &arguments.rounds]).args(names);
    } else {
        let Arguments { kills, seed, disk, .. } = arguments;
        command.args(["kills", "--kills", kills, "--seed", seed, "--disk", disk]);
        command.args(arguments.all_at_once.then_some("--all-at-once"));
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
