//! A virtual machine whose power is cut: a whole cluster runs in it on a real kernel's file system, under a load. The
//! host, which keeps its power, notes what was issued and acknowledged, and checks what the next start shows.
//!
//! What the disk itself was told to keep it keeps: QEMU's file stands for a disk without a volatile cache. So this
//! attacks what the guest's kernel had in memory: the file system's names, sizes and extents, and whatever was written
//! without a flush through the page cache. Lost and torn writes of the disk are the kill loop's (`--disk tear`).
//! Within one start the disk also goes deaf (dm-flakey drops all writes), the cluster is killed and the file system
//! mounted again, which is a power cut in a tenth of the time.

mod guest;
mod record;

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use clap::Args;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

use crate::Outcome;
use crate::random::Random;
pub use guest::{GuestPlan, run as guest};
use record::{Phase, Record};

/// Emulated, so everything takes its time.
const SILENCE: Duration = Duration::from_secs(180);
/// Bytes of the machine's disk; the file is sparse.
const DISK_BYTES: u64 = 6 << 30;
/// Acknowledgements after which the power goes: at least, and so many more at most.
const CUT_AFTER: (u64, u64) = (20, 300);

/// What to do.
#[derive(Args)]
pub struct Plan {
    /// Directory with `kernel` and `initramfs`.
    #[arg(long)]
    vm: PathBuf,
    /// Power cuts for each file system.
    #[arg(long)]
    rounds: u32,
    #[arg(long)]
    seed: u64,
    /// File systems.
    #[arg(long = "fs", default_values = ["ext4", "xfs"])]
    file_systems: Vec<String>,
    /// Times per start that the disk goes deaf.
    #[arg(long, default_value_t = 2)]
    flakes: u32,
}

struct Machine {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Machine {
    fn start(vm: &Path, disk: &Path, arguments: &[String]) -> Outcome<Self> {
        let drive = format!("file={},format=raw,if=virtio,cache=writeback", disk.display());
        let append = format!(
            "console=ttyS0 quiet panic=-1 mitigations=off random.trust_cpu=on hf={}",
            arguments.join(",")
        );
        let console = format!("file:{}", disk.with_extension("console").display());
        let mut child = Command::new("qemu-system-x86_64")
            .args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "3072"])
            .args(["-nodefaults", "-display", "none", "-no-reboot", "-serial", &console, "-serial", "stdio"])
            .args(["-drive", &drive, "-append", &append])
            .arg("-kernel")
            .arg(vm.join("kernel"))
            .arg("-initrd")
            .arg(vm.join("initramfs"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| format!("qemu-system-x86_64 cannot be started: {error}"))?;
        let stdout = child.stdout.take().ok_or("the machine has no serial line")?;
        Ok(Self { child, lines: BufReader::new(stdout).lines() })
    }

    /// The next line; `None` when the machine has ended.
    async fn line(&mut self) -> Outcome<Option<String>> {
        let next = tokio::time::timeout(SILENCE, self.lines.next_line()).await;
        let next = next.map_err(|_| format!("the machine is silent for {SILENCE:?}"))?;
        next.map_err(|error| format!("the machine's serial line: {error}"))
    }

    /// Cuts the power. What the machine said before still counts.
    async fn cut(mut self, record: &mut Record) -> Outcome<()> {
        self.child.start_kill().map_err(|error| format!("the machine cannot be killed: {error}"))?;
        while let Some(line) = self.line().await? {
            record.heard(&line)?;
        }
        self.child.wait().await.map(drop).map_err(|error| error.to_string())
    }
}

/// One start of the machine, until its power is cut under load.
async fn round(
    plan: &Plan,
    disk: &Path,
    fs: &str,
    number: u32,
    after: u64,
    record: &mut Record,
) -> Outcome<()> {
    let mut arguments = vec![
        format!("--round={number}"),
        format!("--fs={fs}"),
        format!("--flakes={}", plan.flakes),
        format!("--seed={}", plan.seed.wrapping_add(number.into())),
    ];
    if number == 0 {
        arguments.push("--fresh".into());
    }
    let mut machine = Machine::start(&plan.vm, disk, &arguments)?;
    record.begin();
    let last = record.deaf + u64::from(plan.flakes);
    loop {
        let Some(line) = machine.line().await? else {
            let console = disk.with_extension("console");
            let said = std::fs::read_to_string(&console).unwrap_or_default();
            let tail: Vec<_> = said.lines().rev().take(20).collect();
            let tail: Vec<_> = tail.into_iter().rev().collect();
            return Err(format!("the machine ended by itself:\n{}", tail.join("\n")));
        };
        let loaded = record.heard(&line)? == Phase::Loaded;
        if loaded && record.deaf == last && record.acknowledged_in_phase() >= after {
            break;
        }
    }
    machine.cut(record).await?;
    println!(
        "{fs}, start {number}: {} recoveries so far, the power goes after {after} writes",
        record.recoveries
    );
    Ok(())
}

/// Runs it.
pub async fn run(plan: &Plan) -> Outcome<()> {
    println!("power cuts: {} of each of {:?}, seed {}", plan.rounds, plan.file_systems, plan.seed);
    for fs in &plan.file_systems {
        let place = tempfile::Builder::new().prefix("hfvm").tempdir().map_err(|error| error.to_string())?;
        let disk = place.path().join("disk");
        let file = std::fs::File::create(&disk).map_err(|error| error.to_string())?;
        file.set_len(DISK_BYTES).map_err(|error| error.to_string())?;
        let mut random = Random::new(plan.seed);
        let mut record = Record::default();
        let began = Instant::now();
        // The start after the last cut shows what it left.
        for number in 0..=plan.rounds {
            let after = CUT_AFTER.0 + random.below(CUT_AFTER.1);
            round(plan, &disk, fs, number, after, &mut record)
                .await
                .map_err(|why| format!("{fs}, start {number} of seed {}: {why}", plan.seed))?;
        }
        println!(
            "{fs}: {} power cuts, {} times deaf; {} writes acknowledged, {} blocks checked after {} recoveries, {} \
             verifications equal, in {:.0} s",
            plan.rounds,
            record.deaf,
            record.acknowledged,
            record.checked,
            record.recoveries,
            record.verified,
            began.elapsed().as_secs_f64()
        );
    }
    Ok(())
}
