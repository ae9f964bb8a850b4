//! The store's table: one store alone, on the disk as it is, without Raft and network. Nothing here passes or fails on
//! time.
//!
//! Whatever has a floor takes turns with it in every round. What is written is durable when it is answered, as it is in a
//! daemon.

mod appends;
pub mod memory;
mod place;
mod raw;
mod reads;
mod recovery;
pub mod text;
mod writes;

use std::path::{Path, PathBuf};
use std::time::Instant;

use holdfast_env::real::disk::IoEngine;

use crate::Outcome;
use crate::report::Machine;

/// How to measure.
#[derive(clap::Args, Clone, Debug)]
pub struct Plan {
    /// Where the table is written.
    #[arg(long, default_value = "benches/results")]
    pub results: PathBuf,
    /// What is measured, for the table's head and name.
    #[arg(long, default_value = "unknown")]
    pub commit: String,
    /// Rounds; the table shows the median.
    #[arg(long, default_value_t = 5)]
    pub rounds: u64,
    /// Size of the journal that is written over many times, in MiB.
    #[arg(long, default_value_t = 64)]
    pub journal_mib: u64,
    /// What carries reads and writes of files, but for the appends, which show both.
    #[arg(long, default_value = "threads")]
    pub io_engine: Engine,
    /// Less of everything: shows that it works, and says little.
    #[arg(long)]
    pub quick: bool,
    /// Only these sections.
    #[arg(long)]
    pub only: Vec<String>,
    /// Where the data is put while it runs: the file system that is measured. Default: beside the program.
    #[arg(long)]
    pub directory: Option<PathBuf>,
}

/// What carries reads and writes of files.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum Engine {
    /// Blocking calls on a few threads.
    Threads,
    /// io_uring.
    Uring,
}

impl Engine {
    fn name(self) -> &'static str {
        match self {
            Self::Threads => "threads",
            Self::Uring => "uring",
        }
    }
}

impl From<Engine> for IoEngine {
    fn from(engine: Engine) -> Self {
        match engine {
            Engine::Threads => Self::Threads,
            Engine::Uring => Self::Uring,
        }
    }
}

impl Plan {
    fn milliseconds(&self, whole: u64) -> u64 {
        if self.quick { whole / 4 } else { whole }
    }
    fn bytes(&self, whole: u64) -> u64 {
        if self.quick { whole / 4 } else { whole }
    }
    fn wants(&self, section: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| only == section)
    }
}

const SECTIONS: [&str; 6] = ["appends", "writes", "map", "layers", "recovery", "memory"];

fn head(plan: &Plan, machine: &Machine, seconds: f64) -> String {
    let quick = if plan.quick { " --quick" } else { "" };
    let only: String = plan.only.iter().map(|section| format!(" --only {section}")).collect();
    let engine = plan.io_engine.name();
    let rounds = format!("--rounds {} --journal-mib {} --io-engine {engine}", plan.rounds, plan.journal_mib);
    let warning = match plan.quick {
        true => "A short form, which shows that it works: its figures say little.\n",
        false => "",
    };
    format!(
        "# Store bench, {}\n\n`cargo xtask bench store {rounds}{quick}{only}`, {seconds:.0} s.\n{}\n{warning}One store \
         alone in one process: its journal and its volumes, their cleaner; no Raft, no network. Medians over the rounds; in \
         each round floor and subject take turns; a ratio is the median of the rounds' ratios. Everything that is written is \
         durable when it is answered. A figure counts only from quiet cores: look at the load.\n",
        plan.commit,
        machine.sentence(),
    )
}

fn section(plan: &Plan, place: &Path, name: &str) -> Outcome<text::Table> {
    println!("{name}");
    let table = holdfast_env::real::run(async {
        match name {
            "appends" => appends::run(plan, place).await,
            "writes" => writes::run(plan, place).await,
            "map" => reads::from_the_map(plan, place).await,
            "layers" => reads::layers(plan, place).await,
            "recovery" => recovery::run(plan, place).await,
            _ => memory::run(plan, place),
        }
    });
    table.map_err(|why| format!("{name}: {why}"))
}

/// Measures and writes the table.
pub fn run(plan: &Plan) -> Outcome<()> {
    if let Some(unknown) = plan.only.iter().find(|only| !SECTIONS.contains(&only.as_str())) {
        return Err(format!("there is no section '{unknown}': they are {}", SECTIONS.join(", ")));
    }
    let began = Instant::now();
    let beside = std::env::current_exe().ok().and_then(|program| Some(program.parent()?.to_path_buf()));
    let base = plan.directory.clone().or(beside).unwrap_or_default();
    let machine = Machine::look(&base);
    let mut tables = String::new();
    for name in SECTIONS.into_iter().filter(|name| plan.wants(name)) {
        // Of its own, so that nothing of one section fills the disk while another runs.
        let place =
            tempfile::Builder::new().prefix("s").tempdir_in(&base).map_err(|error| error.to_string())?;
        tables += &format!("\n{}", section(plan, place.path(), name)?.markdown());
    }
    let text = head(plan, &machine, began.elapsed().as_secs_f64()) + &tables;
    println!("\n{text}");
    std::fs::create_dir_all(&plan.results).map_err(|error| error.to_string())?;
    let path = plan.results.join(format!("store-{}.md", plan.commit));
    std::fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()))?;
    println!("written to {}", path.display());
    Ok(())
}
