//! Deterministic simulation of the product's data path: the store, replicas and sessions that ship, over a simulated
//! clock, disk and network, from one seed. See `docs/simulation.md`.

mod disk;
mod executor;
mod faults;
mod frames;
mod guests;
mod history;
mod hooks;
mod network;
mod plan;
mod random;
mod run;
mod trace;
mod world;

use std::collections::BTreeMap;
use std::io::BufWriter;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;

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

fn simulate(seed: u64, trace: Option<&PathBuf>) -> Report {
    let out = trace.map(|path| -> Box<dyn std::io::Write> {
        let file = std::fs::File::create(path).expect("the trace's file can be made");
        Box::new(BufWriter::with_capacity(1 << 20, file))
    });
    run::run(Plan::draw(seed), out)
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

fn print_marks(marks: &BTreeMap<&'static str, u64>) {
    for (mark, count) in marks {
        println!("  {count:>9} {mark}");
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    trace::install_subscriber(arguments.trace.is_some());
    std::panic::set_hook(Box::new(|_| {}));
    plant(&arguments.plant);
    let chosen = if arguments.seed.is_empty() {
        (arguments.from..arguments.from + arguments.seeds).collect()
    } else {
        arguments.seed.clone()
    };
    let began = Instant::now();
    let (mut failed, mut time, mut operations) = (Vec::new(), 0, 0);
    let mut marks: BTreeMap<&'static str, u64> = BTreeMap::new();
    let mut ran = 0;
    for seed in &chosen {
        ran += 1;
        let seed = *seed;
        let report = simulate(seed, arguments.trace.as_ref());
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
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Plants faults where each is known.
fn plant(names: &[String]) {
    let known = |name: &str| holdfast_protocol::planted::KNOWN.iter().any(|(known, _)| *known == name);
    let (protocol, store): (Vec<&str>, Vec<&str>) =
        names.iter().map(String::as_str).partition(|name| known(name));
    holdfast_protocol::planted::plant(&protocol);
    holdfast_store::testing::plant(&store);
}
