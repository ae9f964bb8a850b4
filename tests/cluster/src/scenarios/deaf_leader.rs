//! The leader can send but not hear, for good: its heartbeats must not keep the others from electing another one.

use std::sync::atomic::Ordering;
use std::time::Instant;

use super::new_holder::lead_elsewhere;
use super::{Place, RECOVERY};
use crate::Outcome;
use crate::load::Load;

const VOLUME: &str = "d";
const WORKERS: u64 = 4;
/// Requests before, and while the leader stays deaf.
const REQUESTS: u64 = 100;

/// Runs it.
pub async fn run(place: &Place<'_>) -> Outcome<()> {
    let dev = place.cluster(&["--journal", "64MiB"]).await?;
    let nodes = dev.nodes()?;
    let guest = &nodes[place.seed as usize % nodes.len()];
    dev.command(&["volume", "create", VOLUME, "--size", "64MiB"]).await?;
    dev.command(&["volume", "attach", "--frontend", "nbd", VOLUME, "--node", guest]).await?;
    let load = Load::start(VOLUME, dev.nbd(guest), WORKERS, place.seed);
    load.progress(REQUESTS, RECOVERY).await?;
    // The guest's own node must hear: another one leads.
    lead_elsewhere(&dev, VOLUME, guest).await?;
    load.progress(REQUESTS, RECOVERY).await?;
    let shown = dev.insist(&["volume", "show", VOLUME], RECOVERY).await?;
    let deaf = shown["leader"].as_str().ok_or("nobody leads")?.to_owned();
    if deaf == *guest {
        return Err("the leader went back to the guest's node by itself".into());
    }
    load.figures.take_longest();
    let errors = load.figures.errors.load(Ordering::Relaxed);
    dev.ctl(&["deafen", &deaf]).await?;
    let began = Instant::now();
    let led = |shown: &serde_json::Value| {
        shown["leader"].as_str().is_some_and(|leader| !leader.is_empty() && leader != deaf)
    };
    let shown = dev.until(VOLUME, RECOVERY, "a leader that hears", led).await?;
    let seen = began.elapsed();
    load.progress(4 * REQUESTS, RECOVERY).await?;
    let stall = load.figures.take_longest();
    if load.figures.errors.load(Ordering::Relaxed) > errors {
        return Err("requests failed, though two of three nodes hear".into());
    }
    dev.ctl(&["heal"]).await?;
    load.progress(REQUESTS, RECOVERY).await?;
    load.stop().await?;
    let index = dev.verified(VOLUME, RECOVERY).await?;
    println!(
        "  {deaf} was deaf: {} was seen to lead after {} ms, the longest request took {} ms; replicas equal at {index}",
        shown["leader"].as_str().unwrap_or_default(),
        seen.as_millis(),
        stall.as_millis()
    );
    dev.stop().await
}
