//! All nodes lose their power at once: what was not flushed is gone in part, and every group, those of several volumes
//! and the catalog's, comes back unaided with all that was acknowledged.

use std::time::{Duration, Instant};

use holdfast_frontend::nbd::NbdClient;
use serde_json::Value;

use super::{Place, RECOVERY};
use crate::Outcome;
use crate::dev::Dev;
use crate::load::{Load, check_all};
use crate::random::Random;

const VOLUMES: usize = 3;
const WORKERS: u64 = 3;
const REQUESTS: u64 = 30;
/// Rounds of one repetition.
const ROUNDS: u32 = 3;

/// Runs it.
pub async fn run(place: &Place<'_>) -> Outcome<()> {
    for disk in ["discard", "tear"] {
        with_disk(place, disk).await.map_err(|why| format!("disk {disk}: {why}"))?;
    }
    Ok(())
}

async fn with_disk(place: &Place<'_>, disk: &str) -> Outcome<()> {
    let dev = place.cluster(&["--disk", disk, "--journal", "64MiB"]).await?;
    let nodes = dev.nodes()?;
    let mut random = Random::new(place.seed);
    let mut loads = Vec::new();
    for (number, node) in (0..VOLUMES).zip(nodes.iter().cycle()) {
        let name = format!("p{number}");
        dev.command(&["volume", "create", &name, "--size", "64MiB"]).await?;
        dev.command(&["volume", "attach", "--frontend", "nbd", &name, "--node", node]).await?;
        let load = Load::start(&name, dev.nbd(node), WORKERS, random.next());
        loads.push((name, node.clone(), load));
    }
    let mut made: Vec<String> = Vec::new();
    let mut longest = Duration::ZERO;
    for round in 0..ROUNDS * place.rounds {
        // Acknowledged by the catalog just before the lights go out.
        let name = format!("c{round}");
        dev.insist(&["volume", "create", &name, "--size", "1MiB"], RECOVERY).await?;
        made.push(name);
        progress(&loads).await?;
        tokio::time::sleep(Duration::from_millis(random.below(100))).await;
        dev.ctl(&["kill", "r1"]).await?;
        dev.ctl(&["start", "r1"]).await?;
        let began = Instant::now();
        progress(&loads).await.map_err(|why| format!("round {round}: {why}"))?;
        check_catalog(&dev, &made).await.map_err(|why| format!("round {round}: {why}"))?;
        longest = longest.max(began.elapsed());
    }
    let mut blocks = 0;
    for (name, node, load) in loads {
        let (history, _) = load.stop().await?;
        let client = NbdClient::connect(&dev.nbd(&node), &name).await;
        let client = client.map_err(|error| format!("{name} is gone at the end: {error}"))?;
        blocks += check_all(&client, &history).await?;
        dev.verified(&name, RECOVERY).await?;
    }
    println!(
        "  disk {disk}: {} rounds, {VOLUMES} attached volumes and the catalog back within {} ms; {blocks} blocks and {} \
         volumes as they should be, replicas equal",
        ROUNDS * place.rounds,
        longest.as_millis(),
        made.len()
    );
    dev.stop().await
}

async fn progress(loads: &[(String, String, Load)]) -> Outcome<()> {
    for (name, _, load) in loads {
        load.progress(REQUESTS, RECOVERY).await.map_err(|why| format!("{name}: {why}"))?;
    }
    Ok(())
}

/// Everything that was created is there.
async fn check_catalog(dev: &Dev, made: &[String]) -> Outcome<()> {
    let listed = dev.insist(&["volume", "list"], RECOVERY).await?;
    let names: Vec<&str> =
        listed.as_array().into_iter().flatten().filter_map(|v: &Value| v["name"].as_str()).collect();
    match made.iter().find(|name| !names.contains(&name.as_str())) {
        Some(lost) => Err(format!("volume {lost} was created and is gone; there are {names:?}")),
        None => Ok(()),
    }
}
