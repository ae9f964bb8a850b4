//! A replica that was away catches up: by log while it is retained; by chunks once the log was purged past it, and then
//! no more is sent than what changed.

use std::path::Path;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use holdfast_frontend::nbd::NbdClient;
use serde_json::Value;

use super::{Place, RECOVERY};
use crate::Outcome;
use crate::dev::Dev;
use crate::random::Random;

const VOLUME: &str = "h";
const MIB: u64 = 1 << 20;
/// One write.
const WRITE: u64 = MIB;
/// Of the volume, what is written while the replica is away.
const DIRTIED: u64 = 24;
/// Before, what all replicas have.
const FILLED: u64 = 8;

/// Incompressible, and different for every call.
fn data(random: &mut Random, length: u64) -> Bytes {
    let mut data = BytesMut::with_capacity(length as usize);
    while (data.len() as u64) < length {
        data.extend_from_slice(&random.next().to_le_bytes());
    }
    data.freeze()
}

async fn connect(socket: &Path) -> Outcome<NbdClient> {
    NbdClient::connect(socket, VOLUME).await.map_err(|error| format!("the guest cannot connect: {error}"))
}

async fn write(client: &NbdClient, random: &mut Random, at_mib: u64) -> Outcome<()> {
    let written = client.write(at_mib * MIB, data(random, WRITE)).await;
    written.map_err(|error| format!("a write failed: {error}"))
}

fn replica<'v>(shown: &'v Value, node: &str) -> Option<&'v Value> {
    shown["replicas"].as_array()?.iter().find(|replica| replica["node"] == node)
}

fn number(value: Option<&Value>, name: &str) -> u64 {
    value.and_then(|value| value[name].as_u64()).unwrap_or(0)
}

/// Starts the node and waits until its replica is healthy; how long that took, and how it says that it was healed.
async fn bring_back(dev: &Dev, node: &str) -> Outcome<(Duration, String, u64)> {
    let began = Instant::now();
    dev.ctl(&["start", node]).await?;
    let caught_up = |shown: &Value| {
        let last = shown["replicas"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|r| number(Some(r), "applied_index"))
            .max();
        let this = replica(shown, node);
        this.is_some_and(|this| this["state"] == "healthy") && Some(number(this, "applied_index")) == last
    };
    let shown = dev.until(VOLUME, 2 * RECOVERY, "the replica catches up", caught_up).await?;
    let this = replica(&shown, node);
    let by = this.and_then(|this| this["healed_by"].as_str()).unwrap_or_default().to_owned();
    Ok((began.elapsed(), by, number(this, "healed_bytes")))
}

/// Runs it.
pub async fn run(place: &Place<'_>) -> Outcome<()> {
    let dev = place.cluster(&["--journal", "64MiB"]).await?;
    let (guest, away) = ("r1-z1-n1", "r1-z3-n1");
    let mut random = Random::new(place.seed);
    dev.command(&["volume", "create", VOLUME, "--size", "256MiB"]).await?;
    dev.command(&["volume", "attach", "--frontend", "nbd", VOLUME, "--node", guest]).await?;
    let client = connect(&dev.nbd(guest)).await?;
    for at in 0..FILLED {
        write(&client, &mut random, at).await?;
    }

    // Far less than the journal holds.
    dev.ctl(&["kill", away]).await?;
    for at in 0..4 {
        write(&client, &mut random, at).await?;
    }
    let (took, by, bytes) = bring_back(&dev, away).await?;
    if by == "chunks" {
        return Err("4 MiB away were healed by chunks, though the log holds them".into());
    }
    println!("  4 MiB away: healed by log in {} ms ({by} {bytes})", took.as_millis());
    dev.verified(VOLUME, RECOVERY).await?;

    let shown = dev.command(&["volume", "show", VOLUME]).await?;
    let last = number(replica(&shown, away), "last_log_index");
    dev.ctl(&["kill", away]).await?;
    let (mut written, began) = (0, Instant::now());
    let purged = loop {
        for at in 0..DIRTIED {
            write(&client, &mut random, 2 * at).await?;
            written += WRITE;
        }
        let shown = dev.command(&["volume", "show", VOLUME]).await?;
        let purged = number(replica(&shown, shown["leader"].as_str().unwrap_or_default()), "purged_index");
        if purged > last {
            break purged;
        }
        if began.elapsed() > 2 * RECOVERY {
            return Err(format!("the log is not purged past {last} after {written} bytes: {purged}"));
        }
    };
    let (took, by, bytes) = bring_back(&dev, away).await?;
    let dirtied = DIRTIED * WRITE;
    println!(
        "  {written} bytes written over {dirtied} distinct ones while away, log purged to {purged} past {last}: healed by \
         {by} in {} ms, {bytes} bytes sent, {:.2} of what was dirtied",
        took.as_millis(),
        bytes as f64 / dirtied as f64
    );
    if by != "chunks" {
        return Err(format!("the log was purged past the replica, yet it was healed by '{by}'"));
    }
    // Whole chunks are compared, and what was written meanwhile comes on top: far from a full copy all the same.
    if bytes < dirtied || bytes > dirtied * 11 / 10 {
        return Err(format!("{bytes} bytes were sent for {dirtied} dirtied ones"));
    }
    let index = dev.verified(VOLUME, RECOVERY).await?;
    println!("  replicas equal at {index}");
    dev.stop().await
}
