//! Replicas change under load: one is moved, one added, one removed. The guest notices nothing but time.

use std::sync::atomic::Ordering;
use std::time::Instant;

use holdfast_frontend::nbd::NbdClient;
use serde_json::Value;

use super::{Place, RECOVERY};
use crate::Outcome;
use crate::dev::Dev;
use crate::load::{Load, check_all};

const VOLUME: &str = "m";
const WORKERS: u64 = 4;
const REQUESTS: u64 = 100;

fn replicas(shown: &Value) -> Vec<(u64, String)> {
    let all = shown["replicas"].as_array().into_iter().flatten();
    all.map(|r| (r["id"].as_u64().unwrap_or(0), r["node"].as_str().unwrap_or_default().to_owned())).collect()
}

/// Waits until the volume is healthy on exactly these nodes.
async fn settled(dev: &Dev, load: &Load, nodes: &[&str]) -> Outcome<Value> {
    let mut wanted: Vec<&str> = nodes.to_vec();
    wanted.sort_unstable();
    let there = |shown: &Value| {
        let mut on: Vec<String> = replicas(shown).into_iter().map(|(_, node)| node).collect();
        on.sort_unstable();
        shown["health"] == "healthy" && on == wanted
    };
    let shown = dev.until(VOLUME, 2 * RECOVERY, &format!("healthy on {wanted:?}"), there).await?;
    load.progress(REQUESTS, RECOVERY).await?;
    if load.figures.errors.load(Ordering::Relaxed) > 0 {
        return Err("requests failed while replicas changed".into());
    }
    Ok(shown)
}

/// Begins a move. Its first steps may meet a volume whose leadership is just being handed over: then the reconciler goes
/// on, once the catalog knows of it.
async fn begin_move(dev: &Dev, replica: &str, to: &str) -> Outcome<()> {
    let until = Instant::now() + RECOVERY;
    loop {
        match dev.command(&["replica", "move", VOLUME, replica, "--to", to]).await {
            Ok(_) => return Ok(()),
            Err(why) if !why.contains("unavailable") || Instant::now() > until => return Err(why),
            Err(_) => {}
        }
        let shown = dev.command(&["volume", "show", VOLUME]).await?;
        if replicas(&shown).iter().any(|(_, node)| node == to) {
            return Ok(());
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
}

fn on(shown: &Value, node: &str) -> Outcome<String> {
    let found = replicas(shown).into_iter().find(|(_, at)| at == node);
    found.map(|(id, _)| id.to_string()).ok_or_else(|| format!("no replica on {node}: {shown}"))
}

/// Runs it.
pub async fn run(place: &Place<'_>) -> Outcome<()> {
    let dev = place.cluster(&["--nodes-per-zone", "2", "--journal", "64MiB"]).await?;
    dev.command(&["volume", "create", VOLUME, "--size", "64MiB", "--survive", "node"]).await?;
    let shown = dev.command(&["volume", "show", VOLUME]).await?;
    let nodes: Vec<String> = replicas(&shown).into_iter().map(|(_, node)| node).collect();
    let [a, b, c] = &nodes[..] else { return Err(format!("three replicas are wanted: {nodes:?}")) };
    let twin = |node: &str| {
        node.strip_suffix("-n1").map_or_else(|| node.replace("-n2", "-n1"), |zone| format!("{zone}-n2"))
    };
    dev.command(&["volume", "attach", "--frontend", "nbd", VOLUME, "--node", a]).await?;
    let load = Load::start(VOLUME, dev.nbd(a), WORKERS, place.seed);
    load.progress(REQUESTS, RECOVERY).await?;
    let began = Instant::now();

    // A follower to its zone's other node, then the leader's own replica away from under the guest.
    let to = twin(c);
    dev.command(&["replica", "move", VOLUME, &on(&shown, c)?, "--to", &to]).await?;
    let shown = settled(&dev, &load, &[a, b, &to]).await?;
    let moved = began.elapsed();
    let first = twin(a);
    dev.command(&["replica", "move", VOLUME, &on(&shown, a)?, "--to", &first]).await?;
    let shown = settled(&dev, &load, &[&first, b, &to]).await?;
    let moved_leader = began.elapsed() - moved;

    // Two at once: the second does not wait for the first, and the volume keeps three voters all the same.
    let homes = [twin(b), twin(&to)];
    for (node, home) in [b, &to].into_iter().zip(&homes) {
        begin_move(&dev, &on(&shown, node)?, home).await?;
    }
    let shown = settled(&dev, &load, &[&first, &homes[0], &homes[1]]).await?;
    for (node, home) in [b, &to].into_iter().zip(&homes) {
        begin_move(&dev, &on(&shown, home)?, node).await?;
    }
    let shown = settled(&dev, &load, &[&first, b, &to]).await?;
    let moved_two = began.elapsed() - moved - moved_leader;

    // A fourth, and one of the four away again.
    dev.command(&["replica", "add", VOLUME, "--node", a]).await?;
    let shown =
        settled(&dev, &load, &[&first, b, &to, a]).await.map_err(|why| format!("{why}; was {shown}"))?;
    dev.command(&["replica", "remove", VOLUME, &on(&shown, &first)?, "--yes"]).await?;
    let shown = settled(&dev, &load, &[a, b, &to]).await?;
    let changed = began.elapsed() - moved - moved_leader - moved_two;
    let ids: Vec<u64> = replicas(&shown).into_iter().map(|(id, _)| id).collect();
    let (history, figures) = load.stop().await?;
    let client = NbdClient::connect(&dev.nbd(a), VOLUME).await.map_err(|error| error.to_string())?;
    let blocks = check_all(&client, &history).await?;
    let index = dev.verified(VOLUME, RECOVERY).await?;
    println!(
        "  a follower moved in {} ms, the leader's replica in {} ms, two at once and back in {} ms, one added and one removed in {} ms, under {} requests \
         without an error; now replicas {ids:?}; {blocks} blocks as they should be, equal at {index}",
        moved.as_millis(),
        moved_leader.as_millis(),
        moved_two.as_millis(),
        changed.as_millis(),
        figures.done()
    );
    dev.stop().await
}
