//! A journal that rots or is cut short while its daemon is away: the daemon says so, what cannot be trusted does not
//! vote, the replica is replaced, and nothing that was acknowledged is lost.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use holdfast_frontend::nbd::NbdClient;
use serde_json::Value;

use super::{Place, RECOVERY};
use crate::Outcome;
use crate::dev::Dev;
use crate::history::History;
use crate::load::{Load, check_all};
use crate::random::Random;

const VOLUME: &str = "j";
const REQUESTS: u64 = 200;
const BLOCK: u64 = 4096;
/// After so much idleness every batch is named as flushed, so that damage to it is no torn tail.
pub const CLOSED: Duration = Duration::from_millis(1000);

pub fn segments(node: &Path) -> Outcome<Vec<PathBuf>> {
    let wrong = |error: std::io::Error| error.to_string();
    let mut found = Vec::new();
    for entry in std::fs::read_dir(node.join("store/journal")).map_err(wrong)? {
        let path = entry.map_err(wrong)?.path();
        if path.file_name().is_some_and(|name| name != "identity") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Flips a bit in some blocks that hold something, all over the journal.
fn flip(node: &Path, random: &mut Random) -> Outcome<usize> {
    let wrong = |error: std::io::Error| error.to_string();
    let mut flipped = 0;
    for path in segments(node)? {
        let file = std::fs::File::options().read(true).write(true).open(&path).map_err(wrong)?;
        let blocks = file.metadata().map_err(wrong)?.len() / BLOCK;
        let mut block = vec![0; BLOCK as usize];
        for number in 0..blocks {
            file.read_exact_at(&mut block, number * BLOCK).map_err(wrong)?;
            if block.iter().all(|byte| *byte == 0) || random.below(6) != 0 {
                continue;
            }
            block[random.below(BLOCK) as usize] ^= 1 << random.below(8);
            file.write_all_at(&block, number * BLOCK).map_err(wrong)?;
            flipped += 1;
        }
    }
    Ok(flipped)
}

fn truncate(node: &Path) -> Outcome<()> {
    let wrong = |error: std::io::Error| error.to_string();
    for path in segments(node)? {
        let file = std::fs::File::options().write(true).open(&path).map_err(wrong)?;
        let length = file.metadata().map_err(wrong)?.len();
        file.set_len(length / 2 / BLOCK * BLOCK).map_err(wrong)?;
    }
    Ok(())
}

/// Every problem that the cluster speaks of.
async fn problems(dev: &Dev) -> Outcome<String> {
    let status = dev.insist(&["status"], RECOVERY).await?;
    Ok(status["problems"].to_string())
}

pub async fn whole(dev: &Dev, volume: &str) -> Outcome<()> {
    let healthy = |shown: &Value| {
        shown["health"] == "healthy"
            && shown["replicas"].as_array().is_some_and(|replicas| replicas.len() == 3)
    };
    dev.until(volume, 2 * RECOVERY, "three healthy replicas", healthy).await.map(drop)
}

async fn check(dev: &Dev, guest: &str, history: &Arc<History>) -> Outcome<u64> {
    let client = NbdClient::connect(&dev.nbd(guest), VOLUME).await;
    let client = client.map_err(|error| format!("the volume is gone: {error}"))?;
    let blocks = check_all(&client, history).await?;
    dev.verified(VOLUME, RECOVERY).await?;
    Ok(blocks)
}

/// The catalog has a quorum without `other`, so `victim` counts again.
pub async fn catalog_counts(dev: &Dev, other: &str, name: &str) -> Outcome<()> {
    let quiet = Instant::now();
    while problems(dev).await? != "[]" {
        if quiet.elapsed() > RECOVERY {
            return Err(format!("the cluster is not whole: {}", problems(dev).await?));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // A seat is filled in steps, and the last of them, the vote, shows itself only by counting.
    tokio::time::sleep(CLOSED * 3).await;
    dev.ctl(&["kill", other]).await?;
    let made = dev.insist(&["volume", "list"], RECOVERY).await;
    dev.ctl(&["start", other]).await?;
    made.map_err(|why| format!("the catalog's new member does not count: {why}"))?;
    dev.insist(&["volume", "create", name, "--size", "1MiB"], RECOVERY).await.map(drop)
}

struct Damage<'d> {
    dev: &'d Dev,
    guest: &'d str,
    victim: &'d str,
    other: &'d str,
    history: Arc<History>,
}

impl Damage<'_> {
    /// Damages the victim's store while its daemon is away, and follows what becomes of it.
    async fn heals(&self, what: &str, damage: impl FnOnce(&Path) -> Outcome<String>) -> Outcome<()> {
        let Self { dev, victim, .. } = self;
        tokio::time::sleep(CLOSED).await;
        dev.ctl(&["kill", victim]).await?;
        let said_before = dev.log(victim).len();
        let done = damage(&dev.node(victim))?;
        let began = Instant::now();
        dev.ctl(&["start", victim]).await?;
        let said = until_said(dev, victim, said_before).await?;
        whole(dev, VOLUME).await.map_err(|why| format!("{done}: {why}; it said: {said}"))?;
        let healed = began.elapsed();
        let blocks = check(dev, self.guest, &self.history).await?;
        catalog_counts(dev, self.other, what).await?;
        println!(
            "  {done}: {said}\n    healed after {} ms, {blocks} blocks as they should be, replicas equal, the catalog whole",
            healed.as_millis()
        );
        Ok(())
    }
}

/// Runs it.
pub async fn run(place: &Place<'_>) -> Outcome<()> {
    let dev = place.cluster(&["--journal", "64MiB"]).await?;
    let (guest, victim, other) = ("r1-z1-n1", "r1-z2-n1", "r1-z3-n1");
    let mut random = Random::new(place.seed);
    dev.command(&["volume", "create", VOLUME, "--size", "64MiB"]).await?;
    dev.command(&["volume", "attach", "--frontend", "nbd", VOLUME, "--node", guest]).await?;
    let load = Load::start(VOLUME, dev.nbd(guest), 4, place.seed);
    load.progress(REQUESTS, RECOVERY).await?;
    let (history, _) = load.stop().await?;
    let damage = Damage { dev: &dev, guest, victim, other, history };
    damage
        .heals("flipped", |node| flip(node, &mut random).map(|bits| format!("{bits} bits flipped")))
        .await?;
    damage.heals("truncated", |node| truncate(node).map(|()| "cut to half its length".into())).await?;
    let emptied = |node: &Path| {
        let removed = std::fs::remove_dir_all(node.join("store"));
        removed.map(|()| "emptied".to_owned()).map_err(|error| error.to_string())
    };
    damage.heals("emptied", emptied).await?;
    dev.stop().await
}

/// The daemon's own words about the damage.
pub async fn until_said(dev: &Dev, victim: &str, before: usize) -> Outcome<String> {
    let began = Instant::now();
    loop {
        let logged = dev.log(victim);
        let lines = logged.get(before..).unwrap_or_default().lines();
        let said: Vec<&str> = lines.filter(|line| line.contains("does not run")).collect();
        if let Some(last) = said.last() {
            let why = last.split_once("why=").map_or(*last, |(_, why)| why);
            return Ok(format!("{} groups do not run, {why}", said.len()));
        }
        if began.elapsed() > RECOVERY {
            return Err("the daemon says nothing of the damage".into());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
