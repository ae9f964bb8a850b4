//! Two of a volume's three replicas are lost for good. Somebody is told what would be lost, accepts it, and the volume goes
//! on from the third, under the guest's verifying load, and gets its copies back. Then the lost disks come back, both at
//! once, a majority of what the volume was: they rest, and harm nobody.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use holdfast_frontend::nbd::NbdClient;
use serde_json::Value;

use super::{Place, RECOVERY};
use crate::Outcome;
use crate::dev::Dev;
use crate::load::{Load, check_all};

const VOLUME: &str = "f";
const WORKERS: u64 = 4;
const REQUESTS: u64 = 100;
const REFUSED: i32 = 4;

fn replicas(shown: &Value) -> Vec<(String, String)> {
    let all = shown["replicas"].as_array().into_iter().flatten();
    all.filter_map(|replica| Some((replica["node"].as_str()?.to_owned(), replica["id"].to_string())))
        .collect()
}

fn healthy_with(count: usize) -> impl Fn(&Value) -> bool {
    move |shown| shown["health"] == "healthy" && replicas(shown).len() == count
}

/// The volume's replicas on a node that stays, and on two that the catalog does not stand on.
async fn arranged(dev: &Dev) -> Outcome<(String, [String; 2])> {
    let shown = dev.until(VOLUME, RECOVERY, "a healthy volume", healthy_with(3)).await?;
    let mut survivor = String::new();
    let mut lost = Vec::new();
    for (node, id) in replicas(&shown) {
        if node.starts_with("r1-z1") {
            survivor = node;
            continue;
        }
        let to = format!("{}-n2", node.trim_end_matches("-n1").trim_end_matches("-n2"));
        if to != node {
            dev.command(&["replica", "move", VOLUME, &id, "--to", &to]).await?;
            dev.until(VOLUME, 2 * RECOVERY, "a moved replica", healthy_with(3)).await?;
        }
        lost.push(to);
    }
    let lost = lost.try_into().map_err(|lost| format!("two replicas are to be lost: {lost:?}"))?;
    Ok((survivor, lost))
}

async fn refused(dev: &Dev, arguments: &[&str], says: &str) -> Outcome<()> {
    let refused = dev.refused(arguments).await?;
    if refused.exit != Some(REFUSED) || !refused.message.contains(says) {
        return Err(format!("{} was refused otherwise: {refused:?}", arguments.join(" ")));
    }
    Ok(())
}

/// What is told beforehand.
async fn explained(dev: &Dev, survivor: &str) -> Outcome<String> {
    let told = dev.command(&["volume", "recover", VOLUME]).await?;
    let of = |replica: &Value| replica["node"] == survivor;
    let all = told["replicas"].as_array().ok_or("no replicas are told of")?;
    let right = all.iter().all(|replica| match of(replica) {
        true => replica["source"] == true && replica["last_log_index"].as_u64() > Some(0),
        false => replica["source"] == false && replica["state"] == "unreachable",
    });
    let loss = told["loss"][0].as_str().unwrap_or_default();
    if !right || told["recovered"] != false || !told["refused"].is_null() || !loss.contains("is lost") {
        return Err(format!("it is told otherwise: {told}"));
    }
    Ok(loss.to_owned())
}

/// How many replicas stand on a node's disk.
fn standing(node: &Path) -> usize {
    let entries = std::fs::read_dir(node.join("store/replicas")).into_iter().flatten().flatten();
    entries.filter(|entry| entry.path().join("manifest").exists()).count()
}

/// The lost disks are back.
async fn back(dev: &Dev, lost: &[String; 2], load: &Load) -> Outcome<()> {
    for node in lost {
        dev.ctl(&["start", node]).await?;
    }
    let began = Instant::now();
    while !lost.iter().all(|node| dev.log(node).contains("a replica is sealed")) {
        if began.elapsed() > RECOVERY {
            return Err("what was lost is back and does not rest".into());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    load.progress(REQUESTS, RECOVERY).await?;
    let status = dev.insist(&["status"], RECOVERY).await?;
    if !status["problems"].to_string().contains("quarantined") {
        return Err(format!("nothing tells of what rests: {status}"));
    }
    if !lost.iter().all(|node| standing(&dev.node(node)) == 1) {
        return Err("what was lost is not kept".into());
    }
    Ok(())
}

/// A certificate of before: that of a volume that is no more.
async fn place_of_certificate(dev: &Dev, fenced: &str) -> Outcome<String> {
    let file = dev.node(fenced).join("fenced.json").display().to_string();
    dev.command(&["fence", "certify", VOLUME, "--node", fenced, "--out", &file]).await?;
    dev.command(&["fence", "verify", &file]).await?;
    Ok(file)
}

/// Runs it.
pub async fn run(place: &Place<'_>) -> Outcome<()> {
    let dev = place.cluster(&["--nodes-per-zone", "2", "--journal", "64MiB"]).await?;
    dev.command(&["volume", "create", VOLUME, "--size", "64MiB", "--zones", "r1-z1,r1-z2,r1-z3"]).await?;
    let (survivor, lost) = arranged(&dev).await?;
    dev.command(&["volume", "attach", "--frontend", "nbd", VOLUME, "--node", &survivor]).await?;
    let load = Load::start(VOLUME, dev.nbd(&survivor), WORKERS, place.seed);
    load.progress(REQUESTS, RECOVERY).await?;
    let force = ["volume", "recover", VOLUME, "--survivors", &survivor, "--accept-loss"];
    refused(&dev, &force, "quorum").await?;
    let certificate = place_of_certificate(&dev, &lost[0]).await?;
    for node in &lost {
        dev.ctl(&["kill", node]).await?;
    }
    let before = dev.until(VOLUME, RECOVERY, "no quorum", |shown| shown["health"] == "no-quorum").await?;
    refused(
        &dev,
        &["volume", "recover", VOLUME, "--survivors", &lost[0], "--accept-loss"],
        "does not answer",
    )
    .await?;
    let loss = explained(&dev, &survivor).await?;

    let began = Instant::now();
    let told = dev.command(&force).await?;
    if told["recovered"] != true || told["incarnation"] != "2" || told["recovery"].is_null() {
        return Err(format!("it was recovered otherwise: {told}"));
    }
    let took = began.elapsed();
    // Whoever held it is fenced, at once and without waiting for anybody.
    while load.figures.errors.load(Ordering::Relaxed) < WORKERS {
        if began.elapsed() > RECOVERY {
            return Err("a device of the former group hangs".into());
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let attached =
        dev.insist(&["volume", "attach", "--frontend", "nbd", VOLUME, "--node", &survivor], RECOVERY).await?;
    if attached["epoch"].as_u64() <= before["epoch"].as_u64() {
        return Err(format!("epoch {} became {}", before["epoch"], attached["epoch"]));
    }
    load.moved(dev.nbd(&survivor));
    load.progress(REQUESTS, RECOVERY).await?;
    let shown = dev.until(VOLUME, 2 * RECOVERY, "three copies again", healthy_with(3)).await?;
    if replicas(&shown).iter().any(|(node, _)| lost.contains(node)) || shown["incarnation"] != "2" {
        return Err(format!("its copies stand otherwise: {shown}"));
    }
    let healed = began.elapsed();
    back(&dev, &lost, &load).await?;
    refused(&dev, &force, "quorum").await?;
    refused(&dev, &["fence", "verify", &certificate], "incarnation 1").await?;
    let (history, _) = load.stop().await?;
    let client = NbdClient::connect(&dev.nbd(&survivor), VOLUME).await.map_err(|error| error.to_string())?;
    let blocks = check_all(&client, &history).await?;
    drop(client);
    let index = dev.verified(VOLUME, RECOVERY).await?;
    gone(&dev, &lost).await?;
    println!(
        "  told beforehand: {loss}\n    went on from {survivor} within {} ms, three copies after {} ms; {blocks} blocks as \
         they should be, equal at {index}; the lost disks came back and rested, and went with the volume",
        took.as_millis(),
        healed.as_millis()
    );
    dev.stop().await
}

/// What rests goes with its volume.
async fn gone(dev: &Dev, lost: &[String; 2]) -> Outcome<()> {
    dev.insist(&["volume", "detach", VOLUME], RECOVERY).await?;
    dev.command(&["volume", "delete", VOLUME, "--yes"]).await?;
    let began = Instant::now();
    while lost.iter().any(|node| standing(&dev.node(node)) > 0) {
        if began.elapsed() > RECOVERY {
            return Err("what rests does not go with its volume".into());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}
