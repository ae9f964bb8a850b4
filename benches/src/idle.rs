//! What replicas cost while nothing happens: volumes that nobody has attached, on three daemons.
//!
//! The floor is the same cluster without any volume, measured just before.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::Outcome;
use crate::child::cpu_ns;
use crate::cluster::{DevCluster, Node};
use crate::report::Machine;
use crate::store::text::Table;

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
    /// Replicas per daemon, in rising order: 100, 1000 unless told. Each is of a volume of its own.
    #[arg(long)]
    pub replicas: Vec<u64>,
    /// For how many seconds each count is watched.
    #[arg(long, default_value_t = 30)]
    pub seconds: u64,
    /// For how many seconds volumes may be made, for each count.
    #[arg(long, default_value_t = 1800)]
    pub patience: u64,
    /// Where the data is put while it runs. Default: beside the program.
    #[arg(long)]
    pub directory: Option<PathBuf>,
}

const SIZE: &str = "1GiB";
/// Between two looks at volumes that are being made.
const LOOK: Duration = Duration::from_secs(1);
/// Elections and first checkpoints have ended by then.
const SETTLE: Duration = Duration::from_secs(10);
/// Groups rest by then, if they do at all: one that did not agree at first is left alone for ten seconds.
const REST: Duration = Duration::from_secs(30);

/// What the daemons use together.
#[derive(Clone, Copy, Debug)]
struct Cost {
    /// Seconds of a core per second.
    cores: f64,
    resident_bytes: u64,
}

/// Bytes of a process that are in memory.
fn resident(pid: u32) -> Outcome<u64> {
    let path = format!("/proc/{pid}/status");
    let text = std::fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()).and_then(|kib| kib.parse::<u64>().ok());
    kib.map(|kib| kib << 10).ok_or_else(|| format!("{path} does not tell what is resident"))
}

fn watch(nodes: &[Node], seconds: u64) -> Outcome<Cost> {
    let cpu = || nodes.iter().map(|node| cpu_ns(node.pid)).sum::<Outcome<u64>>();
    let (began, before) = (Instant::now(), cpu()?);
    std::thread::sleep(Duration::from_secs(seconds));
    let used = cpu()? - before;
    let resident_bytes = nodes.iter().map(|node| resident(node.pid)).sum::<Outcome<u64>>()?;
    Ok(Cost { cores: used as f64 / 1e9 / began.elapsed().as_secs_f64(), resident_bytes })
}

fn healthy(listed: &Value) -> u64 {
    let volumes = listed["volumes"].as_array().or_else(|| listed.as_array());
    let is_healthy = |volume: &&Value| volume["health"] == "healthy";
    volumes.into_iter().flatten().filter(is_healthy).count() as u64
}

/// Makes volumes until there are so many, and waits until all are healthy; how long that took.
fn make(cluster: &DevCluster, from: u64, to: u64, patience: Duration) -> Outcome<Duration> {
    let began = Instant::now();
    for number in from..to {
        cluster.command(&["volume", "create", &format!("v{number}"), "--size", SIZE])?;
        if began.elapsed() > patience {
            return Err(format!("{number} volumes were made in {patience:?}, not {to}"));
        }
    }
    loop {
        let there = healthy(&cluster.command(&["volume", "list"])?);
        if there >= to {
            return Ok(began.elapsed());
        }
        if began.elapsed() > patience {
            return Err(format!("{there} of {to} volumes are healthy after {patience:?}"));
        }
        std::thread::sleep(LOOK);
    }
}

fn measure(plan: &Plan, directory: &Path) -> Outcome<Table> {
    let cluster = DevCluster::start(&plan.program, directory, &[])?;
    let nodes = cluster.nodes()?;
    let columns = ["replicas per daemon", "of a core per daemon", "memory per replica", "made in s"];
    let mut table = Table::new("Idle replicas", &columns);
    std::thread::sleep(SETTLE);
    let floor = watch(&nodes, plan.seconds)?;
    let daemons = nodes.len() as f64;
    let percent = |cores: f64| format!("{:.2} %", cores * 100.0 / daemons);
    let mib = floor.resident_bytes as f64 / daemons / f64::from(1 << 20);
    table.row(vec![
        "none: the floor".into(),
        percent(floor.cores),
        format!("{mib:.0} MiB in all"),
        "".into(),
    ]);
    let counts = if plan.replicas.is_empty() { vec![100, 1000] } else { plan.replicas.clone() };
    let mut there = 0;
    for count in counts {
        let took = match make(&cluster, there, count, Duration::from_secs(plan.patience)) {
            Ok(took) => took,
            Err(why) => {
                table.note(format!("{count} per daemon: not measured. {why}."));
                break;
            }
        };
        there = count;
        std::thread::sleep(SETTLE + REST);
        let cost = watch(&nodes, plan.seconds)?;
        let each = cost.resident_bytes.saturating_sub(floor.resident_bytes) as f64 / daemons / count as f64;
        table.row(vec![
            count.to_string(),
            percent(cost.cores),
            format!("{:.0} KiB", each / 1024.0),
            format!("{:.0}", took.as_secs_f64()),
        ]);
    }
    table.note(
        "Nobody holds these volumes, so their groups rest. Every replica is loaded: replicas do not hibernate yet, and \
         groups of volumes that are attached do not rest. Goal of the design: 10,000 hibernating and 1,000 attached idle \
         replicas on a node within 1 % of a core, 4 KiB each of the former, 200 KiB each of the latter. Memory is what is resident above the floor."
            .into(),
    );
    Ok(table)
}

/// Measures and writes the table.
pub fn run(plan: &Plan) -> Outcome<()> {
    let began = Instant::now();
    let beside = plan.program.parent().map(Path::to_path_buf).unwrap_or_default();
    let base = plan.directory.clone().unwrap_or(beside);
    let place = tempfile::Builder::new().prefix("i").tempdir_in(&base).map_err(|error| error.to_string())?;
    let machine = Machine::look(place.path());
    let table = measure(plan, &place.path().join("c"))?;
    let counts: String = plan.replicas.iter().map(|count| format!(" --replicas {count}")).collect();
    let text = format!(
        "# Idle replicas, {}\n\n`cargo xtask bench idle{counts} --seconds {}`, {:.0} s; built with the profile {}.\n{}\n\n",
        plan.commit,
        plan.seconds,
        began.elapsed().as_secs_f64(),
        plan.built,
        machine.sentence(),
    ) + &table.markdown();
    println!("\n{text}");
    std::fs::create_dir_all(&plan.results).map_err(|error| error.to_string())?;
    let path = plan.results.join(format!("idle-{}.md", plan.commit));
    std::fs::write(&path, text).map_err(|error| format!("{}: {error}", path.display()))?;
    println!("written to {}", path.display());
    Ok(())
}
