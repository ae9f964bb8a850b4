//! Two zones with data and a witness node (docs/FAULTS.md): a volume without any parameter stands on them; each of the
//! three is lost in turn under load, and writes go on; and what only the lost zone and the witness had acknowledged is
//! read in the other zone.

use std::sync::atomic::Ordering;
use std::time::Instant;

use bytes::Bytes;
use holdfast_frontend::nbd::NbdClient;
use serde_json::Value;

use super::{Place, RECOVERY};
use crate::Outcome;
use crate::dev::Dev;
use crate::load::{Load, check_all};

const VOLUME: &str = "w";
const WORKERS: u64 = 4;
const REQUESTS: u64 = 100;
const ONE: &str = "r1-z1-n1";
const TWO: &str = "r1-z2-n1";
const WITNESS: &str = "w-z1-n1";
const MIB: u64 = 1 << 20;
/// Written while only one zone and the witness are there.
const TAIL_MIB: u64 = 6;

fn healthy(shown: &Value) -> bool {
    shown["health"] == "healthy"
}

fn roles(shown: &Value) -> Vec<(String, String)> {
    let text = |replica: &Value, name: &str| replica[name].as_str().unwrap_or_default().to_owned();
    let all = shown["replicas"].as_array().into_iter().flatten();
    all.map(|replica| (text(replica, "node"), text(replica, "role"))).collect()
}

/// What a user sees of a witness.
async fn shown(dev: &Dev) -> Outcome<()> {
    let created = dev.command(&["volume", "create", VOLUME, "--size", "64MiB"]).await?;
    let mut standing = roles(&created);
    standing.sort();
    let nodes: Vec<&str> = standing.iter().map(|(node, _)| node.as_str()).collect();
    if nodes != [ONE, TWO, WITNESS] || standing[2].1 != "witness" {
        return Err(format!("the volume stands on {standing:?}"));
    }
    let listed = dev.command(&["node", "list"]).await?;
    let kinds: Vec<_> = listed.as_array().into_iter().flatten().map(|node| &node["witness"]).collect();
    if kinds != [false, false, true] {
        return Err(format!("the nodes are {listed}"));
    }
    let refused = dev.refused(&["volume", "attach", VOLUME, "--node", WITNESS]).await?;
    let (_, message, _) = refused.error()?;
    if !message.contains("is a witness") {
        return Err(format!("an attachment to a witness was refused with: {message}"));
    }
    Ok(())
}

async fn attach(dev: &Dev, node: &str, force: bool) -> Outcome<()> {
    let mut arguments = vec!["volume", "attach", "--frontend", "nbd", VOLUME, "--node", node];
    if force {
        arguments.push("--force");
    }
    dev.insist(&arguments, RECOVERY).await.map(drop)
}

/// Loses a node under the load of a guest elsewhere.
async fn lose(dev: &Dev, load: &Load, lost: &str) -> Outcome<()> {
    load.progress(REQUESTS, RECOVERY).await?;
    dev.ctl(&["kill", lost]).await?;
    let began = Instant::now();
    load.progress(REQUESTS, RECOVERY).await?;
    println!("  {lost} lost: {REQUESTS} requests {} ms later", began.elapsed().as_millis());
    dev.ctl(&["start", lost]).await?;
    dev.until(VOLUME, 2 * RECOVERY, "everybody is back", healthy).await.map(drop)
}

/// What the second zone has not, the first acknowledges with the witness, and is gone.
async fn tail(dev: &Dev) -> Outcome<()> {
    dev.ctl(&["partition", TWO]).await?;
    let client = NbdClient::connect(&dev.nbd(ONE), VOLUME).await.map_err(|error| error.to_string())?;
    for at in 0..TAIL_MIB {
        let data = Bytes::from(vec![at as u8 + 1; MIB as usize]);
        client.write(at * MIB, data).await.map_err(|error| format!("a write failed: {error}"))?;
    }
    dev.ctl(&["kill", ONE]).await?;
    dev.ctl(&["heal"]).await?;
    let began = Instant::now();
    attach(dev, TWO, true).await?;
    let client = NbdClient::connect(&dev.nbd(TWO), VOLUME).await.map_err(|error| error.to_string())?;
    for at in 0..TAIL_MIB {
        let read =
            client.read(at * MIB, MIB as u32).await.map_err(|error| format!("a read failed: {error}"))?;
        if read.iter().any(|byte| *byte != at as u8 + 1) {
            return Err(format!("what was acknowledged at {at} MiB is not there"));
        }
    }
    println!(
        "  {TAIL_MIB} MiB that {ONE} and the witness held: read at {TWO} {} ms later",
        began.elapsed().as_millis()
    );
    dev.ctl(&["start", ONE]).await?;
    dev.until(VOLUME, 2 * RECOVERY, "everybody is back", healthy).await.map(drop)
}

/// A guest in the second zone, then one in the first, with the same blocks: each keeps writing while others are lost.
async fn guests(dev: &Dev, seed: u64) -> Outcome<()> {
    attach(dev, TWO, false).await?;
    let load = Load::start(VOLUME, dev.nbd(TWO), WORKERS, seed);
    lose(dev, &load, ONE).await?;
    let failed = || load.figures.errors.load(Ordering::Relaxed);
    let told = "requests failed although the guest's node lived";
    if failed() > 0 {
        return Err(told.into());
    }
    attach(dev, ONE, true).await?;
    load.moved(dev.nbd(ONE));
    load.progress(REQUESTS, RECOVERY).await?;
    let of_the_move = failed();
    for lost in [WITNESS, TWO] {
        lose(dev, &load, lost).await?;
    }
    load.progress(REQUESTS, RECOVERY).await?;
    if failed() > of_the_move {
        return Err(told.into());
    }
    let (history, _) = load.stop().await?;
    let client = NbdClient::connect(&dev.nbd(ONE), VOLUME).await.map_err(|error| error.to_string())?;
    let blocks = check_all(&client, &history).await?;
    println!("  {blocks} blocks as they should be, equal at {}", dev.verified(VOLUME, RECOVERY).await?);
    Ok(())
}

/// Runs it.
pub async fn run(place: &Place<'_>) -> Outcome<()> {
    let dev = place.cluster(&["--zones", "2", "--witness", "--journal", "64MiB"]).await?;
    shown(&dev).await?;
    guests(&dev, place.seed).await?;
    tail(&dev).await?;
    println!("  equal at {}", dev.verified(VOLUME, RECOVERY).await?);
    dev.stop().await
}
