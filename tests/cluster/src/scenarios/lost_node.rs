//! A node dies and stays away: after the time that the cluster was given, its replicas are placed on the zone's other
//! node, under load, and the volume survives the next loss. The lost node's return changes nothing.

use std::sync::atomic::Ordering;
use std::time::Instant;

use holdfast_frontend::nbd::NbdClient;
use serde_json::Value;

use super::{Place, RECOVERY};
use crate::Outcome;
use crate::load::{Load, check_all};

const VOLUME: &str = "l";
const WORKERS: u64 = 4;
const REQUESTS: u64 = 100;
const LOST_AFTER: &str = "3";

fn nodes(shown: &Value) -> Vec<String> {
    let all = shown["replicas"].as_array().into_iter().flatten();
    all.filter_map(|replica| replica["node"].as_str().map(str::to_owned)).collect()
}

/// Runs it.
pub async fn run(place: &Place<'_>) -> Outcome<()> {
    let options = ["--nodes-per-zone", "2", "--journal", "64MiB", "--lost-after", LOST_AFTER];
    let dev = place.cluster(&options).await?;
    dev.command(&["volume", "create", VOLUME, "--size", "64MiB"]).await?;
    let shown = dev.command(&["volume", "show", VOLUME]).await?;
    let on = nodes(&shown);
    let [guest, lost, next] = &on[..] else { return Err(format!("three replicas are wanted: {on:?}")) };
    dev.command(&["volume", "attach", "--frontend", "nbd", VOLUME, "--node", guest]).await?;
    let load = Load::start(VOLUME, dev.nbd(guest), WORKERS, place.seed);
    load.progress(REQUESTS, RECOVERY).await?;
    dev.ctl(&["kill", lost]).await?;
    let began = Instant::now();
    // The lost one stays on the list until its node is there to delete it.
    let replaced = |shown: &Value| shown["health"] == "healthy" && nodes(shown).len() == 4;
    let shown = dev.until(VOLUME, 2 * RECOVERY, "the lost replica is replaced", replaced).await?;
    let took = began.elapsed();
    load.progress(REQUESTS, RECOVERY).await?;
    // The new replica counts: the next loss stops nothing.
    dev.ctl(&["kill", next]).await?;
    load.progress(REQUESTS, RECOVERY).await?;
    dev.ctl(&["start", next]).await?;
    dev.ctl(&["start", lost]).await?;
    let forgotten = |shown: &Value| shown["health"] == "healthy" && nodes(shown).len() == 3;
    dev.until(VOLUME, RECOVERY, "the lost replica is deleted when its node is back", forgotten).await?;
    load.progress(REQUESTS, RECOVERY).await?;
    if load.figures.errors.load(Ordering::Relaxed) > 0 {
        return Err("requests failed although the guest's node lived".into());
    }
    let (history, _) = load.stop().await?;
    let client = NbdClient::connect(&dev.nbd(guest), VOLUME).await.map_err(|error| error.to_string())?;
    let blocks = check_all(&client, &history).await?;
    let index = dev.verified(VOLUME, RECOVERY).await?;
    println!(
        "  {lost} was lost after {LOST_AFTER} s: replaced within {} ms, then on {:?}; {blocks} blocks as they should be, \
         equal at {index}",
        took.as_millis(),
        nodes(&shown)
    );
    dev.stop().await
}
