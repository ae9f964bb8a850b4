//! `cargo xtask sim`: the deterministic simulation of `tests/sim`; `cargo xtask mutants sim`: proves that it finds
//! faults that are planted.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

/// How it is called.
pub const USAGE: &str = "cargo xtask sim [--seeds N] [--from S] [--seed S] [--trace] [--check-determinism] \
[--plant FAULT] [--keep-going] [--profile dev|release]
       cargo xtask sim --list | --scenarios | --scenario NAME [--scenario NAME ...] [--seeds N] [--from S] [--seed S] \
[--trace] [--plant FAULT] [--profile dev|release]";

/// Faults that the simulation must find, each from a first seed on within so many.
const MUTANTS: &[(&str, u64, u64)] = &[
    ("skip-epoch-check", 1, 20),
    ("retry-applied-twice", 1, 20),
    ("attach-without-compare", 1, 20),
    ("unsettled-ignored", 1, 20),
    ("late-write-applied", 1, 40),
    ("window-forgotten", 1, 20),
    ("read-below-floor", 1, 20),
    ("floor-of-writes-forgotten", 1, 20),
    ("serve-floor-ignored", 1, 20),
    ("rebuilt-serves-at-once", 1, 20),
    ("settled-at-once", 1, 20),
    ("fence-not-obeyed", 1, 20),
    ("numbers-from-one", 1, 20),
    ("lease-too-long", 1, 100),
    ("lease-from-answer", 1, 40),
    ("lease-unasked-after-read", 1, 60),
    ("silence-skipped", 1, 20),
    ("data-after-detach", 1, 40),
    ("append-acknowledged-early", 1, 20),
    ("purge-too-far", 1, 20),
    ("joint-not-understood", 1, 20),
    ("leader-restore", 1, 40),
    ("skip-journal-flush", 1, 20),
    ("vote-not-flushed", 1, 40),
    ("forget-vote", 1, 20),
    ("acknowledge-out-of-order", 1, 20),
    ("checkpoint-before-home-flush", 1, 60),
    ("move-unflushed-home", 1, 60),
    ("home-before-commit", 1, 60),
    ("forget-hidden-runs", 101, 60),
    ("switch-before-flush", 1, 40),
    ("rebuild-from-anybody", 1, 40),
    ("forget-truncation", 1, 40),
    ("rebuild-is-outrun", 20_221, 20),
    ("append-clock", 1_795_700_000, 500),
];

/// Fresh seeds of the suite.
const SUITE_SEEDS: u64 = 40;
/// Seeds of which the suite compares two processes.
const SUITE_TWICE: u64 = 4;
/// Seeds with which the suite plays every script.
const SUITE_SCRIPT_SEEDS: u64 = 2;
/// Planted faults of the suite: the first so many.
const SUITE_MUTANTS: usize = 3;

#[derive(Default)]
struct Arguments {
    seeds: Option<u64>,
    from: Option<u64>,
    seed: Option<u64>,
    trace: bool,
    /// Scripts of faults instead of drawn ones.
    scripts: bool,
    check_determinism: bool,
    pass_on: Vec<String>,
    profile: Option<String>,
}

fn parse(given: &[&str]) -> Option<Arguments> {
    let mut out = Arguments::default();
    let mut rest = given.iter();
    while let Some(flag) = rest.next() {
        match *flag {
            "--trace" => out.trace = true,
            "--list" => out.pass_on.push("--list-scenarios".into()),
            "--scenarios" => {
                out.scripts = true;
                out.pass_on.push("--scenarios".into());
            }
            "--scenario" => {
                out.scripts = true;
                out.pass_on.extend(["--scenario".to_owned(), (*rest.next()?).to_owned()]);
            }
            "--check-determinism" => out.check_determinism = true,
            "--keep-going" => out.pass_on.push("--keep-going".into()),
            "--seeds" => out.seeds = Some(rest.next()?.parse().ok()?),
            "--from" => out.from = Some(rest.next()?.parse().ok()?),
            "--seed" => out.seed = Some(rest.next()?.parse().ok()?),
            "--plant" => out.pass_on.extend(["--plant".to_owned(), (*rest.next()?).to_owned()]),
            "--profile" => out.profile = Some((*rest.next()?).to_owned()),
            _ => return None,
        }
    }
    Some(out)
}

/// The built simulator.
struct Simulator {
    program: PathBuf,
    /// Where traces go.
    place: PathBuf,
}

impl Simulator {
    fn build(profile: &str) -> Result<Self, String> {
        let flag = format!("--profile={profile}");
        // Of the whole workspace, as `cargo test` builds it: what is built for the one is there for the other.
        if !crate::cargo(&["build", "--locked", &flag, "--workspace", "--bin", "holdfast-sim"], &[]) {
            return Err("the simulator cannot be built".into());
        }
        let metadata =
            cargo_metadata::MetadataCommand::new().no_deps().exec().map_err(|error| error.to_string())?;
        let target = metadata.target_directory.into_std_path_buf();
        let directory = if profile == "dev" { "debug" } else { profile };
        let place = target.join("sim");
        std::fs::create_dir_all(&place).map_err(|error| format!("{}: {error}", place.display()))?;
        Ok(Self { program: target.join(directory).join("holdfast-sim"), place })
    }

    fn run(&self, arguments: &[String]) -> Result<bool, String> {
        let status = Command::new(&self.program).args(arguments).status();
        Ok(status.map_err(|error| error.to_string())?.success())
    }

    fn output(&self, arguments: &[String]) -> Result<(bool, String), String> {
        let output = Command::new(&self.program).args(arguments).stderr(Stdio::inherit()).output();
        let output = output.map_err(|error| error.to_string())?;
        Ok((output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned()))
    }

    /// Runs one seed in two processes and compares their traces byte for byte.
    fn same_twice(&self, seed: u64) -> Result<bool, String> {
        let paths = ["a", "b"].map(|run| self.place.join(format!("seed-{seed}-{run}.trace")));
        for path in &paths {
            let arguments = ["--seed", &seed.to_string(), "--trace", &path.display().to_string()];
            let (passed, said) = self.output(&arguments.map(str::to_owned))?;
            if !passed {
                println!("{said}");
                return Ok(false);
            }
        }
        let read = |path: &Path| std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()));
        let (first, second) = (read(&paths[0])?, read(&paths[1])?);
        let same = first == second;
        if same {
            println!("seed {seed}: two processes, one trace of {} bytes", first.len());
            for path in &paths {
                std::fs::remove_file(path).map_err(|error| error.to_string())?;
            }
        } else {
            let line =
                first.split(|b| *b == b'\n').zip(second.split(|b| *b == b'\n')).position(|(a, b)| a != b);
            let at = line.map_or_else(|| "their length".into(), |line| format!("line {}", line + 1));
            println!("seed {seed}: the traces differ in {at}: {} {}", paths[0].display(), paths[1].display());
        }
        Ok(same)
    }

    /// Whether a planted fault is found within its bound.
    fn finds(&self, (fault, from, bound): (&str, u64, u64)) -> Result<bool, String> {
        let (from, count) = (from.to_string(), bound.to_string());
        let arguments = ["--from", &from, "--seeds", &count, "--plant", fault].map(str::to_owned);
        let (passed, said) = self.output(&arguments)?;
        let found = said.lines().find_map(|line| line.strip_prefix("seed ")?.strip_suffix(" FAILED:"));
        let what = said.lines().skip_while(|line| !line.ends_with(" FAILED:")).nth(1).unwrap_or_default();
        let what: String = what.trim().chars().take(120).collect();
        let Some(seed) = found.filter(|_| !passed) else {
            println!("{fault:24} NOT FOUND by {bound} seeds from {from}");
            return Ok(false);
        };
        // What fails without it shows nothing of it.
        let (innocent, _) = self.output(&["--seed".to_owned(), seed.to_owned()])?;
        let verdict = if innocent { "found" } else { "NOT FOUND: without it fails too" };
        println!("{fault:24} {verdict} by seed {seed}, of {bound} from {from}: {what}");
        Ok(innocent)
    }
}

fn try_run(arguments: &Arguments) -> Result<bool, String> {
    let simulator = Simulator::build(arguments.profile.as_deref().unwrap_or("dev"))?;
    let from = arguments.seed.or(arguments.from).unwrap_or(1);
    if arguments.check_determinism {
        let count = arguments.seeds.unwrap_or(1);
        for seed in from..from + count {
            if !simulator.same_twice(seed)? {
                return Ok(false);
            }
        }
        return Ok(true);
    }
    let mut pass_on = arguments.pass_on.clone();
    match arguments.seed {
        Some(seed) => pass_on.extend(["--seed".into(), seed.to_string()]),
        None => {
            let usual = if arguments.scripts { SUITE_SCRIPT_SEEDS } else { 100 };
            let count = arguments.seeds.unwrap_or(usual).to_string();
            pass_on.extend(["--from".into(), from.to_string(), "--seeds".into(), count]);
        }
    }
    if arguments.trace {
        let path = simulator.place.join(format!("seed-{from}.trace"));
        println!("the trace is written to {}", path.display());
        pass_on.extend(["--trace".into(), path.display().to_string()]);
    }
    simulator.run(&pass_on)
}

fn reported(result: Result<bool, String>) -> bool {
    result.unwrap_or_else(|why| {
        println!("{why}");
        false
    })
}

/// Runs it; false if a check failed.
pub fn run(given: &[&str]) -> bool {
    match parse(given) {
        Some(arguments) => reported(try_run(&arguments)),
        None => {
            eprintln!("usage: {USAGE}");
            false
        }
    }
}

/// `cargo xtask mutants sim`: every planted fault must be found within its bound.
pub fn mutants() -> bool {
    let all = || -> Result<bool, String> {
        let simulator = Simulator::build("dev")?;
        let mut found = true;
        for mutant in MUTANTS {
            found &= simulator.finds(*mutant)?;
        }
        Ok(found)
    };
    reported(all())
}

/// The suite: seeds that have failed once, fresh ones, the scripts of faults, two processes compared, and planted faults.
pub fn suite() -> bool {
    let all = || -> Result<bool, String> {
        let simulator = Simulator::build("dev")?;
        let known = include_str!("../../tests/sim/seeds.txt");
        let known: Vec<String> = known
            .lines()
            .filter_map(|line| line.split('#').next().map(str::trim).filter(|seed| !seed.is_empty()))
            .flat_map(|seed| ["--seed".to_owned(), seed.to_owned()])
            .collect();
        let since = SystemTime::now().duration_since(UNIX_EPOCH).map_err(|error| error.to_string())?;
        let base = since.as_secs();
        println!("fresh seeds from {base}");
        let fresh = ["--from", &base.to_string(), "--seeds", &SUITE_SEEDS.to_string()].map(str::to_owned);
        let mut passed = (known.is_empty() || simulator.run(&known)?) && simulator.run(&fresh)?;
        let (scripts, from) = (SUITE_SCRIPT_SEEDS.to_string(), base.to_string());
        let scripts = ["--scenarios", "--from", &from, "--seeds", &scripts].map(str::to_owned);
        passed = passed && simulator.run(&scripts)?;
        for seed in 1..=SUITE_TWICE {
            passed = passed && simulator.same_twice(seed)?;
        }
        for mutant in &MUTANTS[..SUITE_MUTANTS] {
            passed = passed && simulator.finds(*mutant)?;
        }
        Ok(passed)
    };
    reported(all())
}
