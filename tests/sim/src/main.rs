//! Deterministic simulation of the product's data path: the store, replicas and sessions that ship, over a simulated
//! clock, disk and network, from one seed. See `docs/simulation.md`.

mod churn;
mod content;
mod disk;
mod executor;
mod faults;
mod frames;
mod guests;
mod hooks;
mod keeper;
mod look;
mod network;
mod oracle;
mod plan;
mod random;
mod run;
mod scenario;
mod scenes;
mod trace;
mod world;

use std::collections::BTreeMap;
use std::io::BufWriter;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use holdfast_scenario::{Script, history};

use plan::Plan;
use run::Report;

/// Simulates seeds and says which fail.
#[derive(Parser)]
struct Arguments {
    /// How many seeds.
    #[arg(long, default_value_t = 1)]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 1)]
    from: u64,
    /// This seed instead; may be repeated. Says what each did.
    #[arg(long)]
    seed: Vec<u64>,
    /// Write the text of the trace to this file.
    #[arg(long)]
    trace: Option<PathBuf>,
    /// This script of faults instead of drawn ones, with each of the seeds; may be repeated.
    #[arg(long)]
    scenario: Vec<String>,
    /// Every script that can be simulated.
    #[arg(long)]
    scenarios: bool,
    /// Say which scripts there are, and where each is played.
    #[arg(long)]
    list_scenarios: bool,
    /// Plant this fault; may be repeated.
    #[arg(long)]
    plant: Vec<String>,
    /// Go on after a failing seed.
    #[arg(long)]
    keep_going: bool,
    /// Print the hash of every seed's trace.
    #[arg(long)]
    hashes: bool,
}

fn simulate(seed: u64, script: Option<&Script>, trace: Option<&PathBuf>) -> Report {
    let out = trace.map(|path| -> Box<dyn std::io::Write> {
        let file = std::fs::File::create(path).expect("the trace's file can be made");
        Box::new(BufWriter::with_capacity(1 << 20, file))
    });
    match script {
        Some(script) => scenario::run(script.clone(), seed, out),
        None => run::run(Plan::draw(seed), out),
    }
}

/// Plays scripts with every seed; false if one failed.
fn play(scripts: &[Script], seeds: &[u64], arguments: &Arguments) -> bool {
    let mut failed = 0;
    for script in scripts {
        let began = Instant::now();
        let (mut time, mut operations, mut wrong) = (0, 0, Vec::new());
        for seed in seeds {
            let report = simulate(*seed, Some(script), arguments.trace.as_ref());
            time += report.time;
            operations += report.operations;
            if arguments.hashes {
                println!("hash {} {seed} {:016x}", script.name, report.hash);
            }
            if !report.violations.is_empty() {
                wrong.push(report);
            }
        }
        let verdict = if wrong.is_empty() { "passed" } else { "FAILED" };
        let (count, took) = (seeds.len(), began.elapsed().as_secs_f64());
        println!(
            "{:28} {verdict} with {count} seeds: {:.0} s simulated in {took:.1} s, {operations} operations",
            script.name,
            time as f64 / 1e9
        );
        for report in &wrong {
            println!("  seed {} FAILED:", report.seed);
            report.violations.iter().for_each(|violation| println!("    {violation}"));
            println!("    replay: cargo xtask sim --scenario {} --seed {} --trace", script.name, report.seed);
        }
        failed += usize::from(!wrong.is_empty());
    }
    println!("{} scripts passed, {failed} failed", scripts.len() - failed);
    failed == 0
}

fn print_failure(report: &Report, planted: &[String]) {
    println!("seed {} FAILED:", report.seed);
    for violation in &report.violations {
        println!("  {violation}");
    }
    let plants: String = planted.iter().map(|name| format!(" --plant {name}")).collect();
    println!("  replay: cargo xtask sim --seed {} --trace{plants}", report.seed);
}

fn print_one(report: &Report) {
    println!(
        "seed {}: {:.1} s simulated, {} operations, {} of unknown outcome, {} polls, {} trace lines, hash {:016x}",
        report.seed,
        report.time as f64 / 1e9,
        report.operations,
        report.unknown,
        report.polls,
        report.lines,
        report.hash
    );
}

/// What so many seeds must have covered, every line of it.
const COVERS_ALL: u64 = 1000;
const MUST_BE_COVERED: [&str; 35] = [
    "attaches after a restart",
    "attaches by force",
    "attaches repeated",
    "attaches that came second",
    "attaches without force",
    "attachments that outlived their daemon",
    "changes of holder that settled",
    "checkpoints",
    "crash points reached",
    "detaches",
    "former holders that did not confirm",
    "late creations refused",
    "leaders that fell silent",
    "learners that became voters",
    "memberships changed by joint consensus",
    "power cuts that tore pages",
    "purges",
    "rebuilds by chunks",
    "recoveries with a torn tail",
    "repetitions that had counted",
    "replays that counted",
    "replays that had counted before",
    "replicas replaced",
    "requests that straggle",
    "looks into replicas",
    "scenes: a lease that is granted late",
    "scenes: a log that is cut just before its end",
    "scenes: a rebuild that loses its power at the switch",
    "scenes: another replica comes in the place of a rebuild's source",
    "scenes: blocks come home over a slow journal",
    "scenes: writes that arrive after a detach",
    "transfers of leadership",
    "volumes taken from who does not hear of it",
    "writes of an old epoch refused",
    "writes that were given up refused",
];

/// Whether enough seeds have covered everything that is rare.
fn covers_all(ran: u64, marks: &BTreeMap<&'static str, u64>) -> bool {
    let missing: Vec<_> = MUST_BE_COVERED.iter().filter(|mark| !marks.contains_key(*mark)).collect();
    if ran < COVERS_ALL || missing.is_empty() {
        return true;
    }
    println!("NOT COVERED by {ran} seeds: {missing:?}");
    false
}

fn print_marks(marks: &BTreeMap<&'static str, u64>) {
    for (mark, count) in marks {
        println!("  {count:>9} {mark}");
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    trace::install_subscriber(arguments.trace.is_some());
    executor::remember_where_panics_are();
    plant(&arguments.plant);
    if arguments.list_scenarios {
        scenario::list();
        return ExitCode::SUCCESS;
    }
    let chosen: Vec<u64> = if arguments.seed.is_empty() {
        (arguments.from..arguments.from + arguments.seeds).collect()
    } else {
        arguments.seed.clone()
    };
    if arguments.scenarios || !arguments.scenario.is_empty() {
        let passed = scenario::chosen(&arguments.scenario).map(|scripts| play(&scripts, &chosen, &arguments));
        let passed = passed.unwrap_or_else(|why| {
            println!("{why}");
            false
        });
        return if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    let began = Instant::now();
    let (mut failed, mut time, mut operations) = (Vec::new(), 0, 0);
    let mut marks: BTreeMap<&'static str, u64> = BTreeMap::new();
    let mut ran = 0;
    for seed in &chosen {
        ran += 1;
        let seed = *seed;
        let report = simulate(seed, None, arguments.trace.as_ref());
        time += report.time;
        operations += report.operations;
        for (mark, count) in &report.marks {
            *marks.entry(mark).or_default() += count;
        }
        if arguments.hashes {
            println!("hash {seed} {:016x}", report.hash);
        }
        if !arguments.seed.is_empty() {
            print_one(&report);
        }
        if !report.violations.is_empty() {
            print_failure(&report, &arguments.plant);
            failed.push(seed);
            if !arguments.keep_going {
                break;
            }
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    println!(
        "{ran} seeds from {}: {} failed; {:.0} s simulated in {seconds:.1} s, {operations} operations",
        chosen.first().copied().unwrap_or_default(),
        failed.len(),
        time as f64 / 1e9
    );
    print_marks(&marks);
    if failed.is_empty() && covers_all(ran, &marks) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Plants faults where each is known.
fn plant(names: &[String]) {
    let known = |name: &str| holdfast_protocol::planted::KNOWN.iter().any(|(known, _)| *known == name);
    let (protocol, store): (Vec<&str>, Vec<&str>) =
        names.iter().map(String::as_str).partition(|name| known(name));
    holdfast_protocol::planted::plant(&protocol);
    holdfast_store::testing::plant(&store);
}
