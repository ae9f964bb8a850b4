//! A few log entries rot on one node while its daemon is away: the replica is repaired in place from its peers, under
//! its old id, by the entries that rotted and nothing else.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use holdfast_frontend::nbd::NbdClient;
use serde_json::Value;

use super::damaged_journal::{CLOSED, segments};
use super::{Place, RECOVERY};
use crate::Outcome;
use crate::dev::Dev;
use crate::random::Random;

const VOLUME: &str = "e";
const BLOCK: u64 = 4096;
/// Writes of one block each: one log entry each.
const WRITES: u64 = 400;
/// Of these rot.
const ROTTEN: usize = 12;

/// What block `number` holds: recognizable in a journal.
fn content(number: u64) -> Vec<u8> {
    let mut content = vec![0x5a; BLOCK as usize];
    content[..16].copy_from_slice(b"a rotten entry: ");
    content[16..24].copy_from_slice(&number.to_le_bytes());
    content
}

/// Flips a bit in some of the blocks that the guest wrote, wherever they stand in a journal.
fn rot(node: &Path, random: &mut Random) -> Outcome<Vec<u64>> {
    let wrong = |error: std::io::Error| error.to_string();
    let mut places = Vec::new();
    for path in segments(node)? {
        let bytes = std::fs::read(&path).map_err(wrong)?;
        for (at, data) in (0u64..).zip(bytes.chunks_exact(BLOCK as usize)) {
            let number = u64::from_le_bytes(data[16..24].try_into().map_err(|_| "eight bytes")?);
            if data == content(number) {
                places.push((number, path.clone(), at * BLOCK));
            }
        }
    }
    // In order of the log: some in the middle, and the last one.
    places.sort();
    let last = places.pop().ok_or("the journal holds nothing that the guest wrote")?;
    let mut chosen = vec![last];
    while chosen.len() < ROTTEN && !places.is_empty() {
        chosen.push(places.swap_remove(random.below(places.len() as u64) as usize));
    }
    for (_, path, offset) in &chosen {
        let file = std::fs::File::options().read(true).write(true).open(path).map_err(wrong)?;
        let at = offset + random.below(BLOCK);
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).map_err(wrong)?;
        file.write_all_at(&[byte[0] ^ (1 << random.below(8))], at).map_err(wrong)?;
    }
    Ok(chosen.into_iter().map(|(number, _, _)| number).collect())
}

/// The replicas with their nodes, as the catalog knows them.
fn ids(shown: &Value) -> Vec<(String, String)> {
    let replicas = shown["replicas"].as_array().into_iter().flatten();
    let mut ids: Vec<_> = replicas.map(|r| (r["node"].to_string(), r["id"].to_string())).collect();
    ids.sort();
    ids
}

fn healthy(shown: &Value) -> bool {
    shown["health"] == "healthy" && ids(shown).len() == 3
}

/// What the daemon said of its repair: entries and bytes.
fn repaired(log: &str) -> Option<(u64, u64)> {
    let line = log.lines().rfind(|line| line.contains("the log is whole again"))?;
    let number = |name: &str| line.split_once(name)?.1.split_whitespace().next()?.parse().ok();
    Some((number(" entries=")?, number(" bytes=")?))
}

async fn write(client: &NbdClient, number: u64) -> Outcome<()> {
    let written = client.write(number * BLOCK, content(number).into()).await;
    written.map_err(|error| format!("a write failed: {error}"))
}

async fn everything(client: &NbdClient) -> Outcome<()> {
    for number in 0..=WRITES {
        let read = client.read(number * BLOCK, BLOCK as u32).await.map_err(|error| error.to_string())?;
        if read != content(number) {
            return Err(format!("block {number} is not what was acknowledged"));
        }
    }
    Ok(())
}

/// The daemon has said that it repaired its log.
async fn until_repaired(dev: &Dev, victim: &str, before: usize) -> Outcome<(u64, u64)> {
    let began = Instant::now();
    loop {
        if let Some(figures) = repaired(dev.log(victim).get(before..).unwrap_or_default()) {
            return Ok(figures);
        }
        if began.elapsed() > RECOVERY {
            return Err("the log was not repaired".into());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Runs it.
pub async fn run(place: &Place<'_>) -> Outcome<()> {
    let dev = place.cluster(&["--journal", "64MiB"]).await?;
    let (guest, victim) = ("r1-z1-n1", "r1-z2-n1");
    let mut random = Random::new(place.seed);
    dev.command(&["volume", "create", VOLUME, "--size", "64MiB"]).await?;
    dev.command(&["volume", "attach", VOLUME, "--node", guest]).await?;
    let before = ids(&dev.until(VOLUME, RECOVERY, "three healthy replicas", healthy).await?);
    let client = NbdClient::connect(&dev.nbd(guest), VOLUME).await.map_err(|error| error.to_string())?;
    for number in 0..WRITES {
        write(&client, number).await?;
    }
    // The replica has everything, and its journal says that it was flushed.
    dev.verified(VOLUME, RECOVERY).await?;
    tokio::time::sleep(CLOSED).await;
    dev.ctl(&["kill", victim]).await?;
    let said_before = dev.log(victim).len();
    let rotten = rot(&dev.node(victim), &mut random)?;
    write(&client, WRITES).await?;
    let began = Instant::now();
    dev.ctl(&["start", victim]).await?;
    let (entries, bytes) = until_repaired(&dev, victim, said_before).await?;
    let repaired_in = began.elapsed();
    if entries != rotten.len() as u64 || bytes != entries * BLOCK {
        return Err(format!("{} entries rotted; {entries} were repaired with {bytes} bytes", rotten.len()));
    }
    let after = ids(&dev.until(VOLUME, 2 * RECOVERY, "three healthy replicas", healthy).await?);
    if after != before {
        return Err(format!("the replicas were {before:?} and are {after:?}"));
    }
    everything(&client).await?;
    dev.verified(VOLUME, RECOVERY).await?;
    println!(
        "  {entries} entries rotted and were repaired in place with {bytes} bytes, {} ms after the start of the daemon; \
         the same replicas as before, equal",
        repaired_in.as_millis()
    );
    dev.stop().await
}
