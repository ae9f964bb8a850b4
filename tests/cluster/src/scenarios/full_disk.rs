//! The media of two of three nodes fill up, one of them the leader's. Writes wait without an error, the cluster says so,
//! reads and trims go on, and what waits goes on by itself when there is room; a daemon may be killed meanwhile. Needs
//! root: the media are small file systems in files.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use holdfast_frontend::nbd::NbdClient;
use serde_json::Value;

use super::{Place, RECOVERY};
use crate::Outcome;
use crate::dev::Dev;

const VOLUME: &str = "f";
const MIB: u64 = 1 << 20;
const VOLUME_MIB: u64 = 192;
/// The medium has room for the whole volume, until somebody else takes most of it.
const MEDIUM_BYTES: u64 = 1 << 30;
const LEFT_BYTES: u64 = 40 << 20;
/// How long writes are left waiting.
const WAITS: Duration = Duration::from_secs(3);
/// What is kept of what was written, when the rest is trimmed.
const KEPT_MIB: u64 = 8;

/// A file system in a file, mounted until it is dropped.
struct Medium(PathBuf);

fn call(program: &str, arguments: &[&str]) -> Outcome<()> {
    let output = Command::new(program).args(arguments).output();
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr).trim()))
}

impl Medium {
    fn mount(image: &Path, at: &Path) -> Outcome<Self> {
        let text = |path: &Path| path.display().to_string();
        let wrong = |error: std::io::Error| format!("{}: {error}", image.display());
        std::fs::create_dir_all(at).map_err(wrong)?;
        std::fs::File::create(image).and_then(|file| file.set_len(MEDIUM_BYTES)).map_err(wrong)?;
        call("mkfs.ext4", &["-q", "-m", "0", "-F", &text(image)])?;
        call("mount", &["-o", "loop", &text(image), &text(at)])?;
        Ok(Self(at.to_owned()))
    }
}

impl Drop for Medium {
    fn drop(&mut self) {
        if let Err(why) = call("umount", &["-l", &self.0.display().to_string()]) {
            println!("  {why}");
        }
    }
}

/// Others fill a medium, as far as what is left for the node.
fn fill(at: &Path) -> Outcome<()> {
    let output = Command::new("df").args(["--output=avail", "-B1"]).arg(at).output();
    let output = output.map_err(|error| format!("df: {error}"))?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let free = said.lines().last().and_then(|line| line.trim().parse::<u64>().ok());
    let free = free.ok_or_else(|| format!("df says {said}"))?;
    let taken = free.saturating_sub(LEFT_BYTES).to_string();
    call("fallocate", &["-l", &taken, &at.join("ballast").display().to_string()])
}

fn is_root() -> bool {
    let output = Command::new("id").arg("-u").output();
    output.is_ok_and(|output| output.stdout.trim_ascii() == b"0")
}

fn data(at_mib: u64) -> Bytes {
    (0..MIB / 8).flat_map(|n| (at_mib << 32 | n).to_le_bytes()).collect::<Vec<u8>>().into()
}

async fn connect(socket: &Path) -> Outcome<NbdClient> {
    NbdClient::connect(socket, VOLUME).await.map_err(|error| format!("the guest cannot connect: {error}"))
}

/// Writes the volume from its begin to its end; how far it is.
fn start_writing(client: Arc<NbdClient>) -> (Arc<AtomicU64>, tokio::task::JoinHandle<Outcome<()>>) {
    let written = Arc::new(AtomicU64::new(0));
    let count = written.clone();
    let writer = tokio::spawn(async move {
        for at in 0..VOLUME_MIB {
            let done = client.write(at * MIB, data(at)).await;
            done.map_err(|error| format!("a write failed where it should wait: {error}"))?;
            count.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    });
    (written, writer)
}

fn problem<'s>(status: &'s Value, node: &str) -> Option<&'s str> {
    let problems = status["problems"].as_array()?;
    let subject = format!("node {node}");
    let of_node = problems.iter().filter(|problem| problem["subject"] == subject.as_str());
    of_node.filter_map(|problem| problem["what"].as_str()).find(|what| what.contains("the medium is full"))
}

/// Ends when the leader's node says that writes wait for room, or does not any more.
async fn until_waiting(dev: &Dev, leader: &str, wanted: bool) -> Outcome<()> {
    let until = Instant::now() + RECOVERY;
    loop {
        let status = dev.command(&["status"]).await?;
        if problem(&status, leader).is_some_and(|what| what.contains("writes to 1 volumes wait")) == wanted {
            return Ok(());
        }
        if Instant::now() > until {
            return Err(format!("writes were to wait: {wanted}; status says {status}"));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn stands_still(written: &AtomicU64) -> Outcome<u64> {
    let before = written.load(Ordering::Relaxed);
    tokio::time::sleep(WAITS).await;
    let now = written.load(Ordering::Relaxed);
    if now > before + 1 { Err(format!("{} MiB were written on full media", now - before)) } else { Ok(now) }
}

async fn check(client: &NbdClient, at_mib: std::ops::Range<u64>) -> Outcome<()> {
    for at in at_mib {
        let read =
            client.read(at * MIB, MIB as u32).await.map_err(|error| format!("a read failed: {error}"))?;
        if read != data(at) {
            return Err(format!("what was written to MiB {at} is not there"));
        }
    }
    Ok(())
}

/// Trims what was written but for the last of it; how much stays untouched from where.
async fn trim(client: &NbdClient, from: u64, written: u64) -> Outcome<u64> {
    let upto = written.saturating_sub(KEPT_MIB).max(from);
    for at in from..upto {
        let trimmed = client.trim(at * MIB, MIB as u32).await;
        trimmed.map_err(|error| format!("a trim failed on full media: {error}"))?;
    }
    Ok(upto)
}

/// Runs it.
pub async fn run(place: &Place<'_>) -> Outcome<()> {
    if !is_root() {
        println!("  skipped: it mounts small file systems, which needs root");
        return Ok(());
    }
    let own = tempfile::Builder::new().prefix("hf").tempdir().map_err(|error| error.to_string())?;
    let directory = place.keep.clone().unwrap_or_else(|| own.path().join("c"));
    let (leader, full, other) = ("r1-z1-n1", "r1-z2-n1", "r1-z3-n1");
    let mut media = Vec::new();
    for node in [leader, full] {
        media.push(Medium::mount(&own.path().join(format!("{node}.img")), &directory.join(node))?);
    }
    let dev = Dev::start(place.program, Some(directory), &["--journal", "64MiB"]).await?;
    dev.command(&["volume", "create", VOLUME, "--size", &format!("{VOLUME_MIB}MiB")]).await?;
    dev.command(&["volume", "attach", "--frontend", "nbd", VOLUME, "--node", leader]).await?;
    let led_there = |shown: &Value| shown["leader"] == leader;
    dev.until(VOLUME, RECOVERY, "the leader beside the guest", led_there).await?;
    let client = Arc::new(connect(&dev.nbd(leader)).await?);
    [leader, full].into_iter().try_for_each(|node| fill(&dev.node(node)))?;
    let (written, writer) = start_writing(client.clone());
    until_waiting(&dev, leader, true).await?;
    let first = stands_still(&written).await?;
    check(&client, 0..first).await?;
    // The other one finds out when it brings home what its journal holds.
    let says_so = |shown: &Value| {
        let mut replicas = shown["replicas"].as_array().into_iter().flatten();
        let states_are_right =
            replicas.all(|replica| (replica["state"] == "full") == (replica["node"] != other));
        shown["waits_for_room"] == true && states_are_right
    };
    dev.until(VOLUME, RECOVERY, "volume show says who is full", says_so).await?;
    // A daemon starts on a full medium, and its replica is as before.
    dev.ctl(&["kill", full]).await?;
    dev.ctl(&["start", full]).await?;
    let mut trimmed = 0;
    let (mut times, mut resumed) = (0, Duration::ZERO);
    let until = Instant::now() + 4 * RECOVERY;
    while !writer.is_finished() {
        let before = written.load(Ordering::Relaxed);
        trimmed = trim(&client, trimmed, before).await?;
        let made = Instant::now();
        while !writer.is_finished() && written.load(Ordering::Relaxed) == before && Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        if Instant::now() > until {
            return Err(format!(
                "of {VOLUME_MIB} MiB {before} were written, and no more after room was made"
            ));
        }
        (times, resumed) = (times + 1, resumed.max(made.elapsed()));
        // Until it waits again, or has ended.
        let mut last = u64::MAX;
        while !writer.is_finished() && last != written.load(Ordering::Relaxed) {
            last = written.load(Ordering::Relaxed);
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
    writer.await.map_err(|error| error.to_string())??;
    check(&client, trimmed..VOLUME_MIB).await?;
    trim(&client, trimmed, VOLUME_MIB).await?;
    until_waiting(&dev, leader, false).await?;
    check(&client, VOLUME_MIB - KEPT_MIB..VOLUME_MIB).await?;
    let index = dev.verified(VOLUME, 2 * RECOVERY).await?;
    println!(
        "  writes waited at {first} MiB for {} s and longer without an error, and went on {times} times, {} ms after room \
         was made at the latest; replicas equal at {index}",
        WAITS.as_secs(),
        resumed.as_millis()
    );
    drop(client);
    dev.stop().await?;
    drop(media);
    Ok(())
}
