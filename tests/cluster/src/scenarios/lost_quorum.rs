//! Two of three zones die. I/O waits without an error and goes on under the same epoch when they are back; a device that
//! waits can be aborted, by its owner and without a quorum.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::{Place, RECOVERY};
use crate::Outcome;
use crate::dev::Dev;
use crate::load::Load;

const VOLUME: &str = "q";
const WORKERS: u64 = 4;
const REQUESTS: u64 = 50;
/// How long I/O is left waiting.
const SUSPENDED: Duration = Duration::from_secs(3);

async fn epoch(dev: &Dev) -> Outcome<u64> {
    let shown = dev.until(VOLUME, RECOVERY, "a healthy volume", |shown| shown["health"] == "healthy").await?;
    shown["epoch"].as_u64().ok_or_else(|| format!("no epoch in {shown}"))
}

async fn suspend(dev: &Dev, load: &Load, dead: &[String]) -> Outcome<()> {
    for node in dead {
        dev.ctl(&["kill", node]).await?;
    }
    // What was answered when the last of them died has arrived.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let (done, errors) = (load.figures.done(), load.figures.errors.load(Ordering::Relaxed));
    tokio::time::sleep(SUSPENDED).await;
    load.check()?;
    if load.figures.done() != done {
        return Err("requests were answered without a quorum".into());
    }
    if load.figures.errors.load(Ordering::Relaxed) != errors || errors > 0 {
        return Err("requests failed where they should wait".into());
    }
    Ok(())
}

/// Runs it.
pub async fn run(place: &Place<'_>) -> Outcome<()> {
    let dev = place.cluster(&["--journal", "64MiB"]).await?;
    let nodes = dev.nodes()?;
    let at = place.seed as usize % nodes.len();
    let guest = nodes[at].clone();
    let dead: Vec<String> = nodes.iter().filter(|node| **node != guest).cloned().collect();
    dev.command(&["volume", "create", VOLUME, "--size", "64MiB"]).await?;
    dev.command(&["volume", "attach", "--frontend", "nbd", VOLUME, "--node", &guest]).await?;
    let load = Load::start(VOLUME, dev.nbd(&guest), WORKERS, place.seed);
    load.progress(REQUESTS, RECOVERY).await?;
    let before = epoch(&dev).await?;
    suspend(&dev, &load, &dead).await?;
    for node in &dead {
        dev.ctl(&["start", node]).await?;
    }
    let back = Instant::now();
    load.progress(REQUESTS, RECOVERY).await?;
    let resumed = back.elapsed();
    let after = epoch(&dev).await?;
    if after != before || load.figures.errors.load(Ordering::Relaxed) > 0 {
        return Err(format!("epoch {before} became {after}, or requests failed, though the node lived"));
    }
    suspend(&dev, &load, &dead).await?;
    let aborted = Instant::now();
    let answer = dev.try_command_at(&guest, &["volume", "detach", VOLUME, "--force"]).await;
    let answer = answer.map_err(|refused| format!("the abort was refused: {}", refused.message))?;
    if answer["was_attached"] != true {
        return Err(format!("the abort found nothing: {answer}"));
    }
    while load.figures.errors.load(Ordering::Relaxed) < WORKERS {
        if aborted.elapsed() > RECOVERY {
            return Err("an aborted device hangs".into());
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let failed = aborted.elapsed();
    for node in &dead {
        dev.ctl(&["start", node]).await?;
    }
    // Whoever comes next waits for nothing but the end of the lease.
    let next = &dead[0];
    dev.insist(&["volume", "attach", "--frontend", "nbd", VOLUME, "--node", next], RECOVERY).await?;
    load.moved(dev.nbd(next));
    load.progress(REQUESTS, RECOVERY).await?;
    load.stop().await?;
    let index = dev.verified(VOLUME, RECOVERY).await?;
    println!(
        "  I/O waited {} ms and went on {} ms after the nodes were back, under epoch {before}; aborted, the device failed \
         within {} ms and the volume went on elsewhere; replicas equal at {index}",
        (SUSPENDED + Duration::from_millis(1500)).as_millis(),
        resumed.as_millis(),
        failed.as_millis()
    );
    dev.stop().await
}
