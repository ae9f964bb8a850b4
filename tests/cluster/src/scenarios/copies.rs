//! Volumes that begin with a snapshot, or with what another volume holds: the node that copies is killed in the middle,
//! another one goes on from there, and nobody uses the copy or takes its source away before it is whole.

use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use holdfast_frontend::nbd::NbdClient;
use serde_json::Value;

use super::{Place, RECOVERY};
use crate::Outcome;
use crate::dev::Dev;
use crate::random::Random;

const MIB: usize = 1 << 20;
/// What is written: several seconds of copying at the bound of a node.
const WRITTEN: usize = 192 * MIB;
const GUEST: &str = "r1-z1-n1";

async fn connect(dev: &Dev, node: &str, volume: &str) -> Outcome<NbdClient> {
    dev.insist(&["volume", "attach", volume, "--node", node], RECOVERY).await?;
    NbdClient::connect(&dev.nbd(node), volume).await.map_err(|error| format!("{volume}: {error}"))
}

/// One MiB that its place and a seed determine.
fn part(seed: u64, at: usize) -> Bytes {
    let mut random = Random::new(seed ^ at as u64);
    let mut data = BytesMut::with_capacity(MIB);
    while data.len() < MIB {
        data.extend_from_slice(&random.next().to_le_bytes());
    }
    data.freeze()
}

async fn write(client: &NbdClient, seed: u64, parts: impl Iterator<Item = usize>) -> Outcome<()> {
    for at in parts {
        let written = client.write((at * MIB) as u64, part(seed, at)).await;
        written.map_err(|error| format!("a write failed: {error}"))?;
    }
    Ok(())
}

/// Every part has the content of its seed, and beyond them there are zeros.
async fn check(client: &NbdClient, seed_of: impl Fn(usize) -> u64, what: &str) -> Outcome<()> {
    for at in 0..=WRITTEN / MIB {
        let found = client.read((at * MIB) as u64, MIB as u32).await.map_err(|error| error.to_string())?;
        let wanted = if at == WRITTEN / MIB { Bytes::from(vec![0; MIB]) } else { part(seed_of(at), at) };
        if found != wanted {
            return Err(format!("{what}: MiB {at} is not what it must be"));
        }
    }
    Ok(())
}

fn percent(shown: &Value) -> u64 {
    shown["filled_percent"].as_u64().unwrap_or_default()
}

/// Kills the node that copies; which one, and how far it was.
async fn kill_in_the_middle(dev: &Dev) -> Outcome<(String, u64)> {
    let midway =
        |shown: &Value| shown["phase"] == "ready" || (percent(shown) > 0 && shown["filled_by"].is_string());
    let shown = dev.until("c", RECOVERY, "the copy makes progress", midway).await?;
    if shown["phase"] == "ready" {
        return Err("the copy was there before anybody could kill".into());
    }
    let node = shown["filled_by"].as_str().unwrap_or_default().to_owned();
    dev.ctl(&["kill", &node]).await?;
    Ok((node, percent(&shown)))
}

async fn refused_while_filling(dev: &Dev, arguments: &[&str]) -> Outcome<()> {
    let (_, message, _) = dev.refused(arguments).await?.error()?;
    if message.contains("is being filled") {
        return Ok(());
    }
    Err(format!("{} was refused because '{message}'", arguments.join(" ")))
}

async fn snapshots(dev: &Dev) -> Outcome<Vec<String>> {
    let list = dev.command(&["snapshot", "list", "a"]).await?;
    let names = list.as_array().into_iter().flatten().filter_map(|one| one["name"].as_str());
    Ok(names.map(str::to_owned).collect())
}

/// Runs it.
pub async fn run(place: &Place<'_>) -> Outcome<()> {
    let dev = place.cluster(&["--journal", "128MiB"]).await?;
    let size = format!("{}MiB", WRITTEN / MIB + 16);
    dev.command(&["volume", "create", "a", "--size", &size]).await?;
    let source = connect(&dev, GUEST, "a").await?;
    let (old, new) = (place.seed, place.seed ^ 0xffff_0000);
    write(&source, old, 0..WRITTEN / MIB).await?;
    dev.command(&["snapshot", "create", "a", "s"]).await?;
    write(&source, new, (0..WRITTEN / MIB).step_by(7)).await?;

    let arguments = ["volume", "create", "c", "--from-snapshot", "a@s"];
    let began = Instant::now();
    let attack = async {
        let started = |shown: &Value| shown["phase"] == "filling";
        dev.until("c", RECOVERY, "the copy begins", started).await?;
        refused_while_filling(&dev, &["volume", "attach", "c", "--node", GUEST]).await?;
        refused_while_filling(&dev, &["snapshot", "delete", "a@s", "--yes"]).await?;
        kill_in_the_middle(&dev).await
    };
    // The command may have been served by the node that dies: it is asked again, as a user would.
    let (created, attacked) = tokio::join!(dev.try_command(&arguments), attack);
    let (killed, was) = attacked?;
    let shown = dev.insist(&arguments, 2 * RECOVERY).await?;
    if shown["phase"] != "ready" || percent(&shown) != 100 {
        return Err(format!("the command ended with {shown}; the first with {created:?}"));
    }
    let took = began.elapsed();
    let log: String = dev.nodes()?.iter().filter(|node| **node != killed).map(|node| dev.log(node)).collect();
    // The one that went on began where the first was known to be, not at the beginning.
    let resumed = log.lines().any(|line| line.contains("fills a volume") && !line.contains("from=0"));
    if !resumed {
        return Err(format!("nobody went on from {was} %: it began anew"));
    }
    dev.ctl(&["start", &killed]).await?;
    let guest = if killed == GUEST { "r1-z2-n1" } else { GUEST };
    let copy = connect(&dev, guest, "c").await?;
    check(&copy, |_| old, "the copy of the snapshot").await?;
    dev.command(&["snapshot", "delete", "a@s", "--yes"]).await?;

    // A copy of what a volume holds now, which is in use.
    dev.insist(&["volume", "create", "d", "--from-volume", "a"], 2 * RECOVERY).await?;
    let second = connect(&dev, guest, "d").await?;
    let changed = |at: usize| if at.is_multiple_of(7) { new } else { old };
    check(&second, changed, "the copy of the volume").await?;
    let until = Instant::now() + RECOVERY;
    while !snapshots(&dev).await?.is_empty() {
        if Instant::now() > until {
            return Err(format!("snapshots stay behind: {:?}", snapshots(&dev).await?));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    dev.insist(&["volume", "detach", "a"], RECOVERY).await?;
    dev.insist(&["volume", "delete", "a", "--yes"], RECOVERY).await?;
    check(&copy, |_| old, "the copy whose source is gone").await?;
    for volume in ["c", "d"] {
        dev.insist(&["volume", "detach", volume], RECOVERY).await?;
        dev.verified(volume, RECOVERY).await?;
    }
    println!(
        "  {killed} was killed when {was} % were there, another went on; whole after {:.1} s; both copies equal",
        took.as_secs_f64()
    );
    dev.stop().await
}
