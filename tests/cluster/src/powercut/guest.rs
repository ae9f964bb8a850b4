//! What runs in the machine: the file system, the cluster on it, the load, and what is said of it on the serial line.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use holdfast_frontend::nbd::NbdClient;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::Outcome;
use crate::dev::Dev;
use crate::history::{BLOCK, contents, stamp_of};
use crate::random::Random;

const DISK: &str = "/dev/vda";
const MAPPED: &str = "/dev/dm-0";
const MOUNT: &str = "/data";
const VOLUME: &str = "v";
const WORKERS: u64 = 3;
const BLOCKS_PER_WORKER: u64 = 128;
const RUN_MAX: u64 = 4;
const TRIM_ONE_IN: u64 = 8;
/// Acknowledgements after which the disk goes deaf: at least, and so many more at most.
const DEAF_AFTER: (u64, u64) = (20, 100);
/// For everything that has to come by itself; the machine is emulated.
const PATIENCE: Duration = Duration::from_secs(150);

/// What the host wants.
#[derive(Args)]
pub struct GuestPlan {
    /// Number of this start.
    #[arg(long)]
    round: u64,
    #[arg(long)]
    seed: u64,
    #[arg(long)]
    fs: String,
    /// The disk is new.
    #[arg(long)]
    fresh: bool,
    /// Times that the disk goes deaf.
    #[arg(long)]
    flakes: u64,
}

/// Says a line, and waits until it has left the machine: what follows must not become durable before.
fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    let said = writeln!(out, "{line}").and_then(|()| out.flush());
    let left = rustix::termios::tcdrain(&out);
    if said.is_err() || left.is_err() {
        std::process::exit(1);
    }
}

fn tool(program: &str, arguments: &[&str]) -> Outcome<String> {
    let output = Command::new(program).args(arguments).output();
    let output = output.map_err(|error| format!("{program} cannot be run: {error}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(format!("{program} {} failed: {said}", arguments.join(" ")));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The disk behind dm-flakey.
struct Flaky {
    sectors: String,
    fs: String,
}

impl Flaky {
    fn make(fs: &str) -> Outcome<Self> {
        let sectors = tool("/bin/busybox", &["blockdev", "--getsz", DISK])?;
        let flaky = Self { sectors, fs: fs.to_owned() };
        tool("dmsetup", &["create", "disk", "--noudevsync", "--table", &flaky.healthy()])?;
        Ok(flaky)
    }

    fn healthy(&self) -> String {
        format!("0 {} linear {DISK} 0", self.sectors)
    }

    fn switch(&self, table: &str) -> Outcome<()> {
        // Not frozen first: that would flush what the cut is to lose.
        tool("dmsetup", &["suspend", "--nolockfs", "--noudevsync", "disk"])?;
        tool("dmsetup", &["load", "disk", "--table", table])?;
        tool("dmsetup", &["resume", "--noudevsync", "disk"]).map(drop)
    }

    fn go_deaf(&self) -> Outcome<()> {
        self.switch(&format!("0 {} flakey {DISK} 0 0 3600 1 drop_writes", self.sectors))
    }

    fn mount(&self) -> Outcome<()> {
        tool("/bin/busybox", &["mount", "-t", &self.fs, MAPPED, MOUNT]).map(drop)
    }

    /// Unmounts a deaf disk, whose last writes are dropped, and mounts it as it was before it went deaf.
    async fn cut(&self) -> Outcome<()> {
        let until = Instant::now() + PATIENCE;
        while let Err(why) = tool("/bin/busybox", &["umount", MOUNT]) {
            if Instant::now() > until {
                return Err(why);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.switch(&self.healthy())?;
        self.mount()
    }
}

fn pids(directory: &Path) -> Outcome<Vec<Pid>> {
    let json = std::fs::read(directory.join("dev.json")).map_err(|error| error.to_string())?;
    let description: Value = serde_json::from_slice(&json).map_err(|error| error.to_string())?;
    let nodes = description["nodes"].as_array().ok_or("dev.json has no nodes")?;
    Ok(nodes.iter().filter_map(|node| Pid::from_raw(i32::try_from(node["pid"].as_i64()?).ok()?)).collect())
}

/// Writes and trims, and says so.
struct Worker {
    first: u64,
    stamp: u64,
    random: Random,
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
}

impl Worker {
    async fn run(mut self, client: Arc<NbdClient>) -> Outcome<()> {
        while !self.stop.load(Ordering::Relaxed) {
            let first = self.first + self.random.below(BLOCKS_PER_WORKER - RUN_MAX);
            let count = 1 + self.random.below(RUN_MAX);
            let trims = self.random.below(TRIM_ONE_IN) == 0;
            self.stamp += RUN_MAX;
            let stamp = if trims { 0 } else { self.stamp };
            say(&format!("w {first} {count} {stamp}"));
            let offset = first * BLOCK as u64;
            let done = if trims {
                client.trim(offset, (count as usize * BLOCK) as u32).await
            } else {
                let stamps: Vec<u64> = (0..count).map(|n| stamp + n).collect();
                client.write(offset, contents(first, &stamps)).await
            };
            match done {
                Ok(()) => say(&format!("a {first} {count} {stamp}")),
                // Nobody answers on a disk that drops its writes, for long.
                Err(_) if self.stop.load(Ordering::Relaxed) => return Ok(()),
                Err(error) => return Err(format!("a request failed: {error}")),
            }
            self.acknowledged.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }
}

/// A running cluster with its attached volume.
struct Running {
    dev: Dev,
    client: Arc<NbdClient>,
}

impl Running {
    async fn start(program: &Path, directory: &Path) -> Outcome<Self> {
        let dev = Dev::start(program, Some(directory.to_owned()), &["--journal", "64MiB"]).await?;
        let nodes = dev.nodes()?;
        let node = nodes.first().ok_or("no nodes")?;
        dev.insist(&["volume", "create", VOLUME, "--size", "16MiB"], PATIENCE).await?;
        dev.insist(&["volume", "attach", VOLUME, "--node", node, "--force"], PATIENCE).await?;
        let client = NbdClient::connect(&dev.nbd(node), VOLUME).await.map_err(|error| error.to_string())?;
        Ok(Self { dev, client: Arc::new(client) })
    }

    /// Reads everything and says what it is.
    async fn show(&self) -> Outcome<()> {
        say("recovered");
        let blocks = WORKERS * BLOCKS_PER_WORKER;
        for block in 0..blocks {
            let data = self.client.read(block * BLOCK as u64, BLOCK as u32).await;
            let data = data.map_err(|error| format!("a read failed: {error}"))?;
            say(&format!("r {block} {}", stamp_of(block, &data)?));
        }
        self.dev.verified(VOLUME, PATIENCE).await?;
        say("verified");
        say(&format!("all {blocks}"));
        Ok(())
    }
}

/// One life of the cluster: it comes back, shows everything, and is loaded until the disk goes deaf, or for ever.
async fn life(program: &Path, plan: &GuestPlan, disk: &Flaky, number: u64) -> Outcome<()> {
    let directory = PathBuf::from(MOUNT).join("c");
    let running = Running::start(program, &directory).await?;
    running.show().await?;
    let life = plan.round * 1000 + number;
    let mut random = Random::new(plan.seed.wrapping_mul(1000).wrapping_add(number));
    let (stop, acknowledged) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut workers = tokio::task::JoinSet::new();
    for worker in 0..WORKERS {
        let worker = Worker {
            first: worker * BLOCKS_PER_WORKER,
            stamp: (life + 1) << 32,
            random: Random::new(random.next()),
            stop: stop.clone(),
            acknowledged: acknowledged.clone(),
        };
        workers.spawn(worker.run(running.client.clone()));
    }
    let last = number == plan.flakes;
    let goal = if last { u64::MAX } else { DEAF_AFTER.0 + random.below(DEAF_AFTER.1) };
    while acknowledged.load(Ordering::Relaxed) < goal {
        // A worker ends by an error only.
        let ended = tokio::time::timeout(Duration::from_millis(5), workers.join_next()).await;
        if let Ok(Some(ended)) = ended {
            ended.map_err(|error| error.to_string())??;
        }
    }
    say("deaf");
    disk.go_deaf()?;
    stop.store(true, Ordering::Relaxed);
    let daemons = pids(&directory)?;
    drop(running);
    for pid in daemons {
        match kill_process(pid, Signal::KILL) {
            // They die with their supervisor, or before.
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => return Err(format!("{pid:?} cannot be killed: {error}")),
        }
    }
    while let Some(ended) = workers.join_next().await {
        ended.map_err(|error| error.to_string())??;
    }
    disk.cut().await
}

async fn lives(program: &Path, plan: &GuestPlan) -> Outcome<()> {
    let disk = Flaky::make(&plan.fs)?;
    if plan.fresh {
        tool(&format!("mkfs.{}", plan.fs), &[if plan.fs == "xfs" { "-q" } else { "-F" }, MAPPED])?;
    }
    disk.mount()?;
    for number in 0..=plan.flakes {
        life(program, plan, &disk, number).await?;
    }
    Ok(())
}

/// Runs it until the power goes.
pub async fn run(program: &Path, plan: &GuestPlan) -> Outcome<()> {
    let ended = lives(program, plan).await;
    if let Err(why) = &ended {
        say(&format!("failed {}", why.replace('\n', " ")));
    }
    ended
}
