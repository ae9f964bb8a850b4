//! A copy of a node's data directory is started beside the node, and is refused; later, as an older copy, it is put back
//! in the directory's place: its replicas have forgotten what they acknowledged, which the others know. They do not run
//! under their old ids, are replaced, and nothing is lost.

use std::path::Path;
use std::time::Instant;

use holdfast_frontend::nbd::NbdClient;
use serde_json::Value;

use super::damaged_journal::{CLOSED, catalog_counts, until_said, whole};
use super::wrong_directory::copy;
use super::{Place, RECOVERY};
use crate::Outcome;
use crate::dev::Dev;
use crate::load::{Load, check_all};

const VOLUME: &str = "b";
const REQUESTS: u64 = 200;

/// The copy is a second process of one node: at the same address, and at one of its own.
async fn second_is_refused(dev: &Dev, copied: &Path) -> Outcome<()> {
    let wrong = |error: std::io::Error| error.to_string();
    let shown = copied.display().to_string();
    let path = copied.join("node.json");
    let own = std::fs::read_to_string(&path).map_err(wrong)?;
    let mut moved: Value = serde_json::from_str(&own).map_err(|error| error.to_string())?;
    moved["listen"] = "127.77.77.77:0".into();
    moved.as_object_mut().ok_or("node.json holds nothing")?.remove("metrics");
    for config in [own.clone(), moved.to_string()] {
        std::fs::write(&path, config).map_err(wrong)?;
        let (_, message, hint) = dev.program_refuses(&["node", "--data-dir", &shown]).await?.error()?;
        if !message.contains("another daemon of node") || !hint.contains("a copy of a data directory") {
            return Err(format!("a copy beside its node is refused otherwise: {message} / {hint}"));
        }
    }
    std::fs::write(&path, own).map_err(wrong)
}

/// The id of the replica on a node.
fn id_on(shown: &Value, node: &str) -> String {
    let replicas = shown["replicas"].as_array().into_iter().flatten();
    replicas.filter(|replica| replica["node"] == node).map(|replica| replica["id"].to_string()).collect()
}

/// Runs it.
pub async fn run(place: &Place<'_>) -> Outcome<()> {
    let dev = place.cluster(&["--journal", "64MiB"]).await?;
    let (guest, victim, other) = ("r1-z1-n1", "r1-z2-n1", "r1-z3-n1");
    dev.command(&["volume", "create", VOLUME, "--size", "64MiB"]).await?;
    dev.command(&["volume", "attach", "--frontend", "nbd", VOLUME, "--node", guest]).await?;
    let load = Load::start(VOLUME, dev.nbd(guest), 4, place.seed);
    load.progress(REQUESTS, RECOVERY).await?;
    let aside = tempfile::tempdir().map_err(|error| error.to_string())?;
    let copied = aside.path().join("copy");
    dev.ctl(&["kill", victim]).await?;
    copy(&dev.node(victim), &copied)?;
    dev.ctl(&["start", victim]).await?;
    dev.until(VOLUME, RECOVERY, "a healthy volume", |shown| shown["health"] == "healthy").await?;
    second_is_refused(&dev, &copied).await?;
    dev.command(&["node", "show", victim])
        .await
        .map_err(|why| format!("the node is disturbed by its copy: {why}"))?;

    // The catalog's member goes on, too.
    dev.command(&["volume", "create", "later", "--size", "1MiB"]).await?;
    load.progress(REQUESTS, RECOVERY).await?;
    let before = dev.insist(&["volume", "show", VOLUME], RECOVERY).await?;
    tokio::time::sleep(CLOSED).await;
    dev.ctl(&["kill", victim]).await?;
    let said_before = dev.log(victim).len();
    let store = dev.node(victim).join("store");
    std::fs::remove_dir_all(&store).map_err(|error| error.to_string())?;
    copy(&copied.join("store"), &store)?;
    load.progress(REQUESTS, RECOVERY).await?;
    let began = Instant::now();
    dev.ctl(&["start", victim]).await?;
    let said = until_said(&dev, victim, said_before).await?;
    if !said.contains("rolled back") {
        return Err(format!("it does not say that it was put back: {said}"));
    }
    load.progress(REQUESTS, RECOVERY).await?;
    let replaced = |shown: &Value| id_on(shown, victim) != id_on(&before, victim);
    dev.until(VOLUME, 2 * RECOVERY, "a replica under a new id", replaced).await?;
    whole(&dev, VOLUME).await.map_err(|why| format!("{why}; it said: {said}"))?;
    let healed = began.elapsed();
    let (history, _) = load.stop().await?;
    let client = NbdClient::connect(&dev.nbd(guest), VOLUME).await;
    let client = client.map_err(|error| format!("the volume is gone: {error}"))?;
    let blocks = check_all(&client, &history).await?;
    dev.verified(VOLUME, RECOVERY).await?;
    catalog_counts(&dev, other, "counted").await?;
    println!(
        "  a copy beside its node refused twice; put back: {said}\n    healed under a new id after {} ms, {blocks} \
         blocks as they should be, replicas equal, the catalog whole",
        healed.as_millis()
    );
    dev.stop().await
}
