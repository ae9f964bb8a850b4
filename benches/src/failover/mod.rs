//! The table of failover: how long writes stall when leaders go, how slow a follower may be, what healing sends.
//!
//! Real processes on one machine: each figure stands beside the goal of the design and beside what the machine does when
//! nothing happens. Nothing here passes or fails on time.

mod guest;
mod heal;
mod slow;
mod stalls;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::Outcome;
use crate::load::Figures;
use crate::report::Machine;
use crate::store::text::{Table, median};
use guest::Seen;
use heal::Healed;
use slow::Turns;
use stalls::Stalls;

/// How to measure.
#[derive(clap::Args, Clone, Debug)]
pub struct Plan {
    /// The `holdfast` program.
    #[arg(long)]
    pub program: PathBuf,
    /// Where the table is written.
    #[arg(long, default_value = "benches/results")]
    pub results: PathBuf,
    /// What is measured, for the table's head and name.
    #[arg(long, default_value = "unknown")]
    pub commit: String,
    /// The profile that the programs were built with, for the table's head.
    #[arg(long, default_value = "release")]
    pub built: String,
    /// Rounds: a kill, a partition and some planned transfers each.
    #[arg(long, default_value_t = 5)]
    pub rounds: u64,
    /// Only these sections.
    #[arg(long)]
    pub only: Vec<Section>,
    /// Where the data is put while it runs. Default: beside the program.
    #[arg(long)]
    pub directory: Option<PathBuf>,
}

/// A part of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Section {
    /// Stalls when the leadership changes, with the timers that a network inside a region has.
    Stalls,
    /// The same with `timers: tight`.
    Tight,
    /// A follower whose disk stalls.
    Slow,
    /// Bytes that healing sends.
    Heal,
}

/// How long each load beside a stalling disk runs.
const SLOW_MS: u64 = 3000;

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn row(what: &str, goal: &str, seen: &[Seen]) -> Vec<String> {
    let gaps: Vec<f64> = seen.iter().map(|seen| milliseconds(seen.gap)).collect();
    let slowest = seen.iter().map(|seen| milliseconds(seen.slowest)).fold(0.0, f64::max);
    let worst = gaps.iter().copied().fold(0.0, f64::max);
    vec![
        what.to_owned(),
        format!("{:.0}", median(gaps.clone())),
        format!("{worst:.0}"),
        format!("{slowest:.0}"),
        goal.to_owned(),
        gaps.len().to_string(),
    ]
}

fn stalls(timers: &str, killed: &str, stalls: &Stalls) -> Table {
    let columns = ["event", "median ms", "worst ms", "slowest write ms", "goal ms", "times"];
    let title = format!("Stall of writes, timers: {timers} (heartbeat {} ms)", stalls.heartbeat_ms);
    let mut table = Table::new(&title, &columns);
    table.row(row("nothing, for as long", "the floor", &stalls.nothing));
    table.row(row("leadership handed over, planned", "≤ 50", &stalls.planned));
    table.row(row("SIGKILL of the leader's daemon", killed, &stalls.killed));
    table.row(row("silent partition of the leader", "≤ 2000", &stalls.partitioned));
    table.note(
        "The longest time between two acknowledged writes of 4 KiB over NBD: four writers, each 8 ms after its last \
         answer. The guest's node lives, and another one leads when it is killed or cut off. The slowest write may be \
         slower than the gap is long: others were answered meanwhile."
            .into(),
    );
    table
}

fn slow(all: &[Turns]) -> Table {
    let columns = ["writes of 4 KiB", "healthy", "one follower stalling", "ratio", "goal"];
    let mut table = Table::new("A follower whose disk stalls for 100 ms a second", &columns);
    for turns in all {
        let of = |figures: &[Figures]| median(figures.iter().map(|figures| figures.p999_us / 1e3).collect());
        let (healthy, stalling) = (of(&turns.healthy), of(&turns.stalling));
        table.row(vec![
            format!("QD{}, p99.9 in ms", turns.depth),
            format!("{healthy:.1}"),
            format!("{stalling:.1}"),
            format!("{:.2} ×", stalling / healthy),
            "≤ 1.5 ×".into(),
        ]);
    }
    table.note("In-process sessions; healthy and stalling take turns; medians over the rounds.".into());
    table
}

fn healing(healed: &[Healed]) -> Table {
    let columns =
        ["road", "MiB written", "MiB distinct", "MiB sent", "sent ÷ floor", "goal", "healthy after s"];
    let mut table = Table::new("Bytes sent to heal a replica that was away", &columns);
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    for of in healed {
        let by_log = of.road == "log";
        let (floor, goal) = if by_log { (of.written, "≤ 1.05") } else { (of.distinct, "≤ 1.10") };
        table.row(vec![
            of.road.clone(),
            format!("{:.1}", mib(of.written)),
            format!("{:.1}", mib(of.distinct)),
            format!("{:.1}", mib(of.sent)),
            format!("{:.3}", of.sent as f64 / floor as f64),
            goal.into(),
            format!("{:.1}", of.took.as_secs_f64()),
        ]);
    }
    table.note(
        "The floor is what was written, by log, and the distinct blocks that changed, by chunks. The log's blocks are \
         anywhere; the changed ones are every other block of a part of the volume. Healthy after: from the start of \
         its daemon, its start-up silence included."
            .into(),
    );
    table
}

fn head(plan: &Plan, machine: &Machine, took: Duration) -> String {
    format!(
        "# Failover, {}\n\n`cargo xtask bench failover --rounds {}{}`, {:.0} s; built with the profile {}.\n{}\n\
         Three daemons, or three processes, share the disk and the cores; what is compared takes turns. An election \
         timeout is 3–6 heartbeats. A figure counts only from quiet cores: look at the load.\n\n",
        plan.commit,
        plan.rounds,
        if plan.built == "release" { "" } else { " --profile dev" },
        took.as_secs_f64(),
        plan.built,
        machine.sentence(),
    )
}

/// Measures and writes the table.
pub fn run(plan: &Plan) -> Outcome<()> {
    let began = Instant::now();
    let beside = plan.program.parent().map(Path::to_path_buf).unwrap_or_default();
    let base = plan.directory.clone().unwrap_or(beside);
    // Short: unix sockets below it have a bound.
    let place = tempfile::Builder::new().prefix("f").tempdir_in(&base).map_err(|error| error.to_string())?;
    let make = |name: &str| {
        let path = place.path().join(name);
        std::fs::create_dir(&path).map(|()| path).map_err(|error| error.to_string())
    };
    let machine = Machine::look(place.path());
    let wanted = |section| plan.only.is_empty() || plan.only.contains(&section);
    let mut tables = Vec::new();
    if wanted(Section::Stalls) {
        println!("stalls");
        let seen = stalls::measure(&plan.program, &make("s")?, "auto", plan.rounds)?;
        tables.push(stalls("auto", "≤ 1000", &seen));
    }
    if wanted(Section::Tight) {
        println!("stalls with tight timers");
        let seen = stalls::measure(&plan.program, &make("q")?, "tight", plan.rounds)?;
        tables.push(stalls("tight", "≤ 300", &seen));
    }
    if wanted(Section::Slow) {
        println!("a slow follower");
        tables.push(slow(&slow::measure(&make("t")?, plan.rounds, SLOW_MS)?));
    }
    if wanted(Section::Heal) {
        println!("healing");
        tables.push(healing(&heal::measure(&plan.program, &make("h")?)?));
    }
    let tables: Vec<String> = tables.iter().map(Table::markdown).collect();
    let text = head(plan, &machine, began.elapsed()) + &tables.join("\n");
    println!("\n{text}");
    std::fs::create_dir_all(&plan.results).map_err(|error| error.to_string())?;
    let path = plan.results.join(format!("failover-{}.md", plan.commit));
    std::fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()))?;
    println!("written to {}", path.display());
    Ok(())
}
