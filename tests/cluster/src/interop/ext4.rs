//! ext4 on a block device while daemons are killed.

use std::time::{Duration, Instant};

use super::Ground;
use super::files::{Guest, Load};
use super::tools::tool;
use crate::Outcome;

/// Files written between two kills.
const FILES_BETWEEN: u64 = 60;
/// How long the guest may stand still over a kill.
const PATIENCE: Duration = Duration::from_secs(30);

/// The zone of the leader is killed while a guest elsewhere writes: the guest sees a pause and nothing else.
pub async fn leader_killed(ground: &Ground) -> Outcome<String> {
    let volume = ground.volume("ext4", &ground.far()?, "loop").await?;
    tool("mkfs.ext4", &["-q", "-F", &volume.device]).await?;
    let guest = Guest::mount(&volume.device, &ground.place.join("ext4")).await?;
    let mut load = Load::start(guest.path());
    load.progress(FILES_BETWEEN, PATIENCE).await?;
    for _ in 0..ground.amount.leader_kills {
        let leader = ground.leader(&volume.name).await?;
        if leader == volume.node {
            return Err(format!("{leader} leads, but has no replica to lead with"));
        }
        let zone = leader.rsplit_once('-').map_or(leader.as_str(), |(zone, _)| zone);
        ground.dev.ctl(&["kill", zone]).await?;
        load.progress(FILES_BETWEEN, PATIENCE).await?;
        ground.dev.ctl(&["start", zone]).await?;
        ground.healthy(&volume.name).await?;
    }
    load.progress(FILES_BETWEEN, PATIENCE).await?;
    let flushed = load.stop().await?;
    flushed.ended.clone().map_err(|why| format!("the guest saw an error: {why}"))?;
    flushed.check(guest.path())?;
    guest.unmount().await?;
    // -n changes nothing and fails if there is anything to repair, a journal to replay included.
    tool("e2fsck", &["-f", "-n", &volume.device]).await?;
    let index = ground.done_with(volume).await?;
    Ok(format!(
        "{} kills of the leader's zone, no error, {} files as flushed ({} read back meanwhile), longest file {} ms, \
         fsck clean, replicas equal at {index}",
        ground.amount.leader_kills,
        flushed.count(),
        flushed.checked,
        flushed.longest.as_millis()
    ))
}

/// The node that has the volume is killed while a guest there writes; the volume is taken by force elsewhere. What the
/// guest had flushed is there, and the journal makes the rest whole.
pub async fn holder_killed(ground: &Ground) -> Outcome<String> {
    let holders = ["r1-z1-n1", "r1-z2-n1"];
    let mut volume = ground.volume("moved", holders[0], "loop").await?;
    tool("mkfs.ext4", &["-q", "-F", &volume.device]).await?;
    let (mut files, mut longest) = (0, Duration::ZERO);
    for round in 0..ground.amount.holder_kills as usize {
        let mount = ground.place.join(format!("moved{round}"));
        let guest = Guest::mount(&volume.device, &mount).await?;
        let mut load = Load::start(&guest.path().join(format!("round{round}")));
        load.progress(FILES_BETWEEN, PATIENCE).await?;
        let victim = volume.node.clone();
        ground.dev.ctl(&["kill", &victim]).await?;
        let flushed = load.fail().await?;
        if flushed.ended.is_ok() {
            return Err("the guest of a killed daemon saw no error".into());
        }
        drop(guest);
        let began = Instant::now();
        let next = holders[(round + 1) % holders.len()];
        volume = ground.attach(&volume.name, next, "loop", true).await?;
        // ext4 replays its journal as it is mounted.
        let guest = Guest::mount(&volume.device, &mount).await?;
        longest = longest.max(began.elapsed());
        flushed.check(&guest.path().join(format!("round{round}")))?;
        files += flushed.count();
        guest.unmount().await?;
        tool("e2fsck", &["-f", "-n", &volume.device]).await?;
        ground.dev.ctl(&["start", &victim]).await?;
        ground.healthy(&volume.name).await?;
        nothing_left(ground, &victim)?;
    }
    let index = ground.done_with(volume).await?;
    Ok(format!(
        "{} kills of the attached node, {files} files as flushed, attached and mounted elsewhere within {} ms, fsck \
         clean, replicas equal at {index}",
        ground.amount.holder_kills,
        longest.as_millis()
    ))
}

/// A daemon that starts removes the dead mount that the one before it left.
fn nothing_left(ground: &Ground, node: &str) -> Outcome<()> {
    let devices = ground.dev.data_dir(node).join("devices");
    let devices = devices.display().to_string();
    let mounts = std::fs::read_to_string("/proc/self/mounts").map_err(|error| error.to_string())?;
    match mounts.lines().find(|line| line.split(' ').nth(1).is_some_and(|path| path.starts_with(&devices))) {
        Some(line) => Err(format!("the daemon of {node} has not removed: {line}")),
        None => Ok(()),
    }
}
