//! Snapshots over real processes: they keep what was there, tell exactly what changed, outlive the leader that makes
//! them and a replica that was away while they came and went, and give their space back.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use holdfast_frontend::nbd::NbdClient;
use serde_json::Value;

use super::{Place, RECOVERY};
use crate::Outcome;
use crate::dev::Dev;
use crate::random::Random;

const VOLUME: &str = "s";
const BLOCK: usize = 4096;
/// Blocks of the volume: 16 MiB.
const BLOCKS: usize = 4096;
/// What directories themselves take, and `volume show` does not count.
const DIRECTORY_BYTES: u64 = 64 << 10;
const GUEST: &str = "r1-z1-n1";
const FOLLOWER: &str = "r1-z3-n1";

/// What the volume must hold, and what differs since it was last asked.
struct Guest {
    client: NbdClient,
    image: Vec<u8>,
    changed: BTreeSet<usize>,
    random: Random,
}

async fn connect(dev: &Dev) -> Outcome<NbdClient> {
    let until = Instant::now() + RECOVERY;
    loop {
        match NbdClient::connect(&dev.nbd(GUEST), VOLUME).await {
            Ok(client) => return Ok(client),
            Err(error) if Instant::now() > until => return Err(format!("the guest cannot connect: {error}")),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

fn data(random: &mut Random, length: usize) -> Bytes {
    let mut data = BytesMut::with_capacity(length);
    while data.len() < length {
        data.extend_from_slice(&random.next().to_le_bytes());
    }
    data.freeze()
}

impl Guest {
    async fn write(&mut self, block: usize, count: usize) -> Outcome<()> {
        let data = data(&mut self.random, count * BLOCK);
        self.image[block * BLOCK..][..data.len()].copy_from_slice(&data);
        self.changed.extend(block..block + count);
        let written = self.client.write((block * BLOCK) as u64, data).await;
        written.map_err(|error| format!("a write failed: {error}"))
    }

    async fn trim(&mut self, block: usize, count: usize) -> Outcome<()> {
        self.image[block * BLOCK..][..count * BLOCK].fill(0);
        self.changed.extend(block..block + count);
        let trimmed = self.client.trim((block * BLOCK) as u64, (count * BLOCK) as u32).await;
        trimmed.map_err(|error| format!("a trim failed: {error}"))
    }

    /// Single blocks, runs over the edges of chunks, a whole chunk, and trims of blocks that hold data.
    async fn change_here_and_there(&mut self) -> Outcome<()> {
        for (block, count) in [(3, 1), (62, 4), (128, 64), (1000, 1), (4095, 1)] {
            self.write(block, count).await?;
        }
        self.trim(8, 2).await?;
        self.trim(190, 4).await
    }

    async fn check_head(&self, what: &str) -> Outcome<()> {
        for at in (0..self.image.len()).step_by(1 << 20) {
            let read =
                self.client.read(at as u64, 1 << 20).await.map_err(|error| format!("a read: {error}"))?;
            same(&read, &self.image[at..at + (1 << 20)], at / BLOCK, what)?;
        }
        Ok(())
    }

    /// The changed blocks as extents.
    fn take_extents(&mut self) -> Vec<(u64, u64)> {
        let mut extents: Vec<(u64, u64)> = Vec::new();
        for block in std::mem::take(&mut self.changed) {
            let (offset, length) = ((block * BLOCK) as u64, BLOCK as u64);
            match extents.last_mut() {
                Some((start, so_far)) if *start + *so_far == offset => *so_far += length,
                _ => extents.push((offset, length)),
            }
        }
        extents
    }
}

fn same(found: &[u8], wanted: &[u8], first: usize, what: &str) -> Outcome<()> {
    let pairs = found.chunks(BLOCK).zip(wanted.chunks(BLOCK)).enumerate();
    let wrong: Vec<usize> = pairs.filter(|(_, (a, b))| a != b).map(|(n, _)| first + n).take(8).collect();
    if wrong.is_empty() && found.len() == wanted.len() {
        return Ok(());
    }
    Err(format!("{what}: {} bytes of {}, blocks {wrong:?} differ", found.len(), wanted.len()))
}

/// A snapshot's content, as one node's daemon reads it.
async fn check_snapshot(dev: &Dev, node: &str, name: &str, wanted: &[u8], place: &Path) -> Outcome<()> {
    let file = place.join(format!("{name}-{node}.raw"));
    let path = file.display().to_string();
    let title = format!("{VOLUME}@{name}");
    dev.insist_at(node, &["snapshot", "export", &title, &path], RECOVERY).await?;
    let found = std::fs::read(&file).map_err(|error| format!("{path}: {error}"))?;
    std::fs::remove_file(&file).map_err(|error| format!("{path}: {error}"))?;
    same(&found, wanted, 0, &format!("{title} on {node}"))
}

async fn check_diff(dev: &Dev, ends: &[&str], wanted: &[(u64, u64)]) -> Outcome<()> {
    let mut arguments = vec!["snapshot", "diff"];
    arguments.extend(ends);
    let diff = dev.command(&arguments).await?;
    let number = |extent: &Value, name: &str| extent[name].as_u64().unwrap_or(u64::MAX);
    let found: Vec<(u64, u64)> = diff["extents"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|extent| (number(extent, "offset"), number(extent, "length")))
        .collect();
    let bytes: u64 = wanted.iter().map(|(_, length)| length).sum();
    if found != wanted || diff["bytes"] != bytes {
        return Err(format!("the difference {ends:?} is {diff}, not {wanted:?}"));
    }
    Ok(())
}

async fn take(dev: &Dev, name: &str) -> Outcome<Value> {
    let snapshot = dev.command(&["snapshot", "create", VOLUME, name]).await?;
    let sound = snapshot["ready"] == true
        && snapshot["volume"] == VOLUME
        && snapshot["size_bytes"] == (BLOCKS * BLOCK) as u64
        && snapshot["index"].as_u64().is_some_and(|index| index > 0);
    if sound { Ok(snapshot) } else { Err(format!("a snapshot is {snapshot}")) }
}

async fn names(dev: &Dev) -> Outcome<Vec<String>> {
    let list = dev.command(&["snapshot", "list", VOLUME]).await?;
    let list = list.as_array().ok_or_else(|| format!("{list} is no list"))?;
    Ok(list.iter().filter_map(|snapshot| snapshot["name"].as_str().map(str::to_owned)).collect())
}

/// A refusal with this exit code, in whose text every word is.
async fn refused(dev: &Dev, arguments: &[&str], exit: i32, words: &[&str]) -> Outcome<()> {
    let refused = dev.refused(arguments).await?;
    let missing: Vec<_> = words.iter().filter(|word| !refused.message.contains(**word)).collect();
    if refused.exit == Some(exit) && missing.is_empty() {
        return Ok(());
    }
    Err(format!("{arguments:?} ended with {:?}: {}; missing {missing:?}", refused.exit, refused.message))
}

fn sum_of(shown: &Value, name: &str) -> u64 {
    let replicas = shown["replicas"].as_array().into_iter().flatten();
    replicas.map(|replica| replica[name].as_u64().unwrap_or(0)).sum()
}

/// Kills the leader at the very moment of a creation, and repeats that until it succeeds.
async fn create_over_a_kill(dev: &Dev, name: &str) -> Outcome<Duration> {
    let shown = dev.command(&["volume", "show", VOLUME]).await?;
    let leader = shown["leader"].as_str().ok_or("nobody leads")?.to_owned();
    let began = Instant::now();
    let command = ["snapshot", "create", VOLUME, name];
    let kill = ["kill", leader.as_str()];
    let (first, killed) = tokio::join!(dev.try_command(&command), dev.ctl(&kill));
    killed?;
    let made = dev.insist(&command, RECOVERY).await?;
    let took = began.elapsed();
    if first.as_ref().is_ok_and(|first| first["id"] != made["id"]) {
        return Err(format!("one name, two snapshots: {first:?} and {made}"));
    }
    dev.ctl(&["start", &leader]).await?;
    let again = dev.insist(&command, RECOVERY).await?;
    if again["id"] != made["id"] || again["index"] != made["index"] {
        return Err(format!("a repeated creation made {again}, not {made}"));
    }
    Ok(took)
}

/// Waits until the replica of a node has applied as much as any.
async fn caught_up(dev: &Dev, node: &str) -> Outcome<()> {
    let is_there = |shown: &Value| {
        let replicas = || shown["replicas"].as_array().into_iter().flatten();
        let last = replicas().filter_map(|replica| replica["applied_index"].as_u64()).max();
        let mut this = replicas().filter(|replica| replica["node"] == node);
        this.any(|this| this["state"] == "healthy" && this["applied_index"].as_u64() == last)
    };
    dev.until(VOLUME, 2 * RECOVERY, "the replica catches up", is_there).await.map(drop)
}

async fn restores(dev: &Dev, guest: &mut Guest, image: &[u8]) -> Outcome<()> {
    refused(dev, &["snapshot", "restore", "s@two", "--yes"], 4, &["attached", GUEST, "detach"]).await?;
    dev.command(&["volume", "detach", VOLUME]).await?;
    refused(dev, &["snapshot", "restore", "s@two", "--yes"], 4, &["three"]).await?;
    refused(dev, &["snapshot", "restore", "s@two"], 2, &["--yes"]).await?;
    refused(dev, &["snapshot", "restore", "s@none", "--yes"], 3, &["s@none"]).await?;
    dev.command(&["snapshot", "delete", "s@three", "--yes"]).await?;
    for _ in 0..2 {
        dev.command(&["snapshot", "restore", "s@two", "--yes"]).await?;
    }
    dev.command(&["volume", "attach", "--frontend", "nbd", VOLUME, "--node", GUEST]).await?;
    guest.client = connect(dev).await?;
    guest.image = image.to_vec();
    guest.check_head("what was restored").await
}

/// Bytes below a directory as `du` counts them.
async fn du(place: &Path) -> Outcome<u64> {
    let output = tokio::process::Command::new("du").args(["-s", "-B1"]).arg(place).output().await;
    let output = output.map_err(|error| format!("du: {error}"))?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let bytes = said.split_whitespace().next().and_then(|bytes| bytes.parse().ok());
    bytes.filter(|_| output.status.success()).ok_or_else(|| format!("du of {}: '{said}'", place.display()))
}

/// What `volume show` tells of space is what `du` finds in each node's directory.
async fn compare_with_du(dev: &Dev) -> Outcome<()> {
    let shown = dev.command(&["volume", "show", VOLUME]).await?;
    let mut compared = 0;
    for replica in shown["replicas"].as_array().ok_or("there are no replicas")? {
        let node = replica["node"].as_str().ok_or("a replica without a node")?;
        let bytes = |key: &str| replica[key].as_u64().unwrap_or_default();
        let (allocated, used, snapshots) =
            (bytes("allocated_bytes"), bytes("used_bytes"), bytes("snapshot_bytes"));
        let found = du(&dev.data_dir(node).join("store/replicas")).await?;
        if found.abs_diff(allocated) > DIRECTORY_BYTES
            || snapshots == 0
            || snapshots >= used
            || used > allocated
        {
            return Err(format!(
                "{node} says {allocated} allocated, {used} used, {snapshots} of snapshots; du finds {found}"
            ));
        }
        compared += 1;
    }
    if compared == 3 { Ok(()) } else { Err(format!("{compared} replicas were compared")) }
}

/// Compares once nothing moves any more: the cleaner may have work between the report and `du`.
async fn told_is_true(dev: &Dev) -> Outcome<()> {
    let until = Instant::now() + RECOVERY;
    loop {
        match compare_with_du(dev).await {
            Ok(()) => return Ok(()),
            Err(why) if Instant::now() > until => return Err(why),
            Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
        }
    }
}

/// Deletes what is left; the bytes that snapshots held before and the milliseconds until they are given back.
async fn gives_back(dev: &Dev, guest: &mut Guest) -> Outcome<(u64, u128)> {
    guest.write(0, 256).await?;
    take(dev, "four").await?;
    guest.write(0, 256).await?;
    let holds = |shown: &Value| sum_of(shown, "snapshot_bytes") > 0 && shown["snapshots"] == 2;
    let shown = dev.until(VOLUME, 2 * RECOVERY, "snapshots hold space", holds).await?;
    let held = sum_of(&shown, "snapshot_bytes");
    told_is_true(dev).await?;
    refused(dev, &["volume", "delete", VOLUME, "--yes"], 4, &["attached"]).await?;
    let began = Instant::now();
    for name in ["s@two", "s@four"] {
        dev.command(&["snapshot", "delete", name, "--yes"]).await?;
    }
    let given = |shown: &Value| sum_of(shown, "snapshot_bytes") == 0 && shown["snapshots"] == 0;
    dev.until(VOLUME, 2 * RECOVERY, "the space is given back", given).await?;
    Ok((held, began.elapsed().as_millis()))
}

/// A quota refuses a snapshot that may have to keep more than it, and nothing else.
async fn a_quota_refuses(dev: &Dev, guest: &mut Guest) -> Outcome<()> {
    let set = async |quota| dev.command(&["volume", "set", VOLUME, "--snapshot-quota", quota]).await;
    let shown = set("1MiB").await?;
    if shown["snapshot_quota_bytes"] != 1 << 20 {
        return Err(format!("a quota of 1 MiB is shown as {shown}"));
    }
    let words = ["quota", "1 MiB", "--snapshot-quota"];
    refused(dev, &["snapshot", "create", VOLUME, "large"], 1, &words).await?;
    refused(dev, &["volume", "set", VOLUME, "--snapshot-quota", "0"], 2, &["none"]).await?;
    // One of those that have changed already.
    guest.write(1000, 1).await?;
    guest.changed.clear();
    if names(dev).await? != ["one"] {
        return Err(format!("what was refused left {:?}", names(dev).await?));
    }
    let shown = set("none").await?;
    let is_none = shown["snapshot_quota_bytes"].as_u64().unwrap_or_default() == 0;
    if is_none { Ok(()) } else { Err(format!("no quota is shown as {shown}")) }
}

/// Runs it.
pub async fn run(place: &Place<'_>) -> Outcome<()> {
    let dev = place.cluster(&["--journal", "64MiB"]).await?;
    let files = tempfile::tempdir().map_err(|error| error.to_string())?;
    let size = format!("{}", BLOCKS * BLOCK);
    dev.command(&["volume", "create", VOLUME, "--size", &size]).await?;
    dev.command(&["volume", "attach", "--frontend", "nbd", VOLUME, "--node", GUEST]).await?;
    let (client, random) = (connect(&dev).await?, Random::new(place.seed));
    let mut guest = Guest { client, image: vec![0; BLOCKS * BLOCK], changed: BTreeSet::new(), random };
    for block in [0, 100, 1000] {
        guest.write(block, 200).await?;
    }
    let filled = guest.take_extents();
    let first = take(&dev, "one").await?;
    let one = guest.image.clone();
    check_diff(&dev, &["s@one"], &filled).await?;
    check_diff(&dev, &["s@one", "s"], &[]).await?;
    guest.change_here_and_there().await?;
    let changed = guest.take_extents();
    let again = take(&dev, "one").await?;
    if again != first {
        return Err(format!("a repeated creation answers {again}, not {first}"));
    }
    guest.check_head("the head after a snapshot").await?;
    a_quota_refuses(&dev, &mut guest).await?;
    check_diff(&dev, &["s@one", "s"], &changed).await?;
    check_snapshot(&dev, GUEST, "one", &one, files.path()).await?;

    let took = create_over_a_kill(&dev, "two").await?;
    guest.client = connect(&dev).await?;
    let two = guest.image.clone();
    check_diff(&dev, &["s@one", "s@two"], &changed).await?;
    refused(&dev, &["snapshot", "diff", "s@two", "s@one"], 2, &["older"]).await?;
    println!(
        "  {} extents changed, told exactly; a creation over the leader's death took {} ms",
        changed.len(),
        took.as_millis()
    );

    // While one is away, a snapshot comes, one goes, and blocks change in between.
    dev.ctl(&["kill", FOLLOWER]).await?;
    guest.write(2000, 100).await?;
    take(&dev, "three").await?;
    let three = guest.image.clone();
    guest.change_here_and_there().await?;
    dev.command(&["snapshot", "delete", "s@one", "--yes"]).await?;
    dev.ctl(&["start", FOLLOWER]).await?;
    caught_up(&dev, FOLLOWER).await?;
    for node in [GUEST, FOLLOWER] {
        check_snapshot(&dev, node, "two", &two, files.path()).await?;
        check_snapshot(&dev, node, "three", &three, files.path()).await?;
    }
    guest.check_head("the head after a deletion").await?;
    if names(&dev).await? != ["two", "three"] {
        return Err(format!("the snapshots are {:?}", names(&dev).await?));
    }
    let index = dev.verified(VOLUME, RECOVERY).await?;

    restores(&dev, &mut guest, &two).await?;
    let (held, given_back) = gives_back(&dev, &mut guest).await?;
    guest.check_head("the head without snapshots").await?;
    let end = dev.verified(VOLUME, RECOVERY).await?;
    take(&dev, "last").await?;
    dev.command(&["volume", "detach", VOLUME]).await?;
    refused(&dev, &["volume", "delete", VOLUME, "--yes"], 4, &["last", "snapshot delete s@last"]).await?;
    dev.command(&["snapshot", "delete", "s@last", "--yes"]).await?;
    dev.command(&["volume", "delete", VOLUME, "--yes"]).await?;
    println!(
        "  replicas equal at {index} and {end}; {held} bytes of snapshots given back in {given_back} ms"
    );
    dev.stop().await
}
