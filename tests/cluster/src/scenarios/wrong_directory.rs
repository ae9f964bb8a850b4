//! Daemons on data directories that are not theirs: a second one on a directory in use, a store or a certificate of
//! another cluster, and a directory that is no node's.

use std::path::Path;

use super::{Place, RECOVERY};
use crate::Outcome;
use crate::dev::{Dev, Refused};
use crate::load::Load;

const VOLUME: &str = "w";

fn moved(from: &Path, to: &Path) -> Outcome<()> {
    std::fs::rename(from, to).map_err(|error| format!("{} to {}: {error}", from.display(), to.display()))
}

fn says(refused: &Refused, words: &[&str]) -> Outcome<()> {
    let (_, message, hint) = refused.error()?;
    let whole = format!("{message} / {hint}");
    if hint.is_empty() {
        return Err(format!("it does not say what to do: {whole}"));
    }
    match words.iter().find(|word| !whole.contains(**word)) {
        Some(word) => Err(format!("it does not say '{word}': {whole}")),
        None => Ok(()),
    }
}

async fn node_refuses(dev: &Dev, directory: &Path, words: &[&str]) -> Outcome<()> {
    let shown = directory.display().to_string();
    let refused = dev.program_refuses(&["node", "--data-dir", &shown]).await?;
    says(&refused, words)
}

/// Runs it.
pub async fn run(place: &Place<'_>) -> Outcome<()> {
    let dev = place.cluster(&["--journal", "64MiB"]).await?;
    let (victim, guest) = ("r1-z1-n1", "r1-z2-n1");
    dev.command(&["volume", "create", VOLUME, "--size", "64MiB"]).await?;
    dev.command(&["volume", "attach", "--frontend", "nbd", VOLUME, "--node", guest]).await?;
    let load = Load::start(VOLUME, dev.nbd(guest), 4, place.seed);
    load.progress(50, RECOVERY).await?;

    node_refuses(&dev, &dev.node(victim), &["in use"])
        .await
        .map_err(|why| format!("a second daemon: {why}"))?;
    dev.command(&["node", "show", victim])
        .await
        .map_err(|why| format!("the first daemon is disturbed: {why}"))?;

    let other = Dev::start(place.program, None, &["--zones", "1", "--journal", "64MiB"]).await?;
    let foreign = other.node("r1-z1-n1");
    let aside = tempfile::tempdir().map_err(|error| error.to_string())?;
    let (store, own) = (dev.node(victim).join("store"), aside.path().join("store"));
    let copied = aside.path().join("foreign");
    other.ctl(&["kill", "r1-z1-n1"]).await?;
    copy(&foreign, &copied)?;
    other.stop().await?;

    dev.ctl(&["kill", victim]).await?;
    moved(&store, &own)?;
    moved(&copied.join("store"), &store)?;
    let words = ["belongs to", "data directory"];
    node_refuses(&dev, &dev.node(victim), &words)
        .await
        .map_err(|why| format!("another cluster's store: {why}"))?;
    moved(&store, &copied.join("store"))?;
    moved(&own, &store)?;

    let (pki, own) = (dev.node(victim).join("pki"), aside.path().join("pki"));
    moved(&pki, &own)?;
    moved(&copied.join("pki"), &pki)?;
    node_refuses(&dev, &dev.node(victim), &["certificate"])
        .await
        .map_err(|why| format!("another cluster's certificate: {why}"))?;
    moved(&pki, &copied.join("pki"))?;
    moved(&own, &pki)?;

    let empty = tempfile::tempdir().map_err(|error| error.to_string())?;
    node_refuses(&dev, empty.path(), &["node.json"])
        .await
        .map_err(|why| format!("an empty directory: {why}"))?;
    if std::fs::read_dir(empty.path()).map_err(|error| error.to_string())?.next().is_some() {
        return Err("a refused daemon left files behind".into());
    }

    load.progress(50, RECOVERY).await?;
    dev.ctl(&["start", victim]).await?;
    dev.until(VOLUME, RECOVERY, "a healthy volume", |shown| shown["health"] == "healthy").await?;
    load.progress(50, RECOVERY).await?;
    load.stop().await?;
    let index = dev.verified(VOLUME, RECOVERY).await?;
    println!(
        "  4 daemons refused by a typed error; the node was whole afterwards, replicas equal at {index}"
    );
    dev.stop().await
}

/// Copies a directory with everything in it but sockets.
pub fn copy(from: &Path, to: &Path) -> Outcome<()> {
    let wrong = |error: std::io::Error| format!("{}: {error}", from.display());
    std::fs::create_dir_all(to).map_err(wrong)?;
    for entry in std::fs::read_dir(from).map_err(wrong)? {
        let entry = entry.map_err(wrong)?;
        let kind = entry.file_type().map_err(wrong)?;
        let there = to.join(entry.file_name());
        if kind.is_dir() {
            copy(&entry.path(), &there)?;
        } else if kind.is_file() {
            std::fs::copy(entry.path(), there).map_err(wrong)?;
        }
    }
    Ok(())
}
