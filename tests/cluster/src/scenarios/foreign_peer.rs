//! Peers that do not belong: one that speaks no TLS, and a whole daemon of another cluster that claims to be one of ours.
//! They are refused, counted in the log, and nothing else happens.

use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::wrong_directory::copy;
use super::{Place, RECOVERY};
use crate::Outcome;
use crate::dev::Dev;
use crate::load::Load;

const VOLUME: &str = "f";
const REFUSED: &str = "an incoming connection was refused";

fn config(dev: &Dev, node: &str) -> Outcome<Value> {
    let json = std::fs::read(dev.node(node).join("node.json")).map_err(|error| error.to_string())?;
    serde_json::from_slice(&json).map_err(|error| error.to_string())
}

fn refusals(dev: &Dev, node: &str) -> usize {
    dev.log(node).lines().filter(|line| line.contains(REFUSED)).count()
}

async fn until_refused(dev: &Dev, node: &str, before: usize, what: &str) -> Outcome<()> {
    let began = Instant::now();
    while refusals(dev, node) <= before {
        if began.elapsed() > RECOVERY {
            return Err(format!("{node} does not say that it refused {what}"));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// Speaks to a node's peer port without a certificate; ends when the node hangs up.
async fn without_certificate(address: &str, words: &[u8]) -> Outcome<()> {
    let wrong = |error: std::io::Error| format!("{address}: {error}");
    let mut stream = TcpStream::connect(address).await.map_err(wrong)?;
    stream.write_all(words).await.map_err(wrong)?;
    let mut answer = Vec::new();
    let read = tokio::time::timeout(RECOVERY, stream.read_to_end(&mut answer)).await;
    match read {
        Err(_) => Err("the node keeps a connection that speaks no TLS".into()),
        // Closed or reset: either way it is over.
        Ok(_) => Ok(()),
    }
}

/// Runs it.
pub async fn run(place: &Place<'_>) -> Outcome<()> {
    let dev = place.cluster(&["--journal", "64MiB"]).await?;
    let guest = "r1-z1-n1";
    dev.command(&["volume", "create", VOLUME, "--size", "64MiB"]).await?;
    dev.command(&["volume", "attach", "--frontend", "nbd", VOLUME, "--node", guest]).await?;
    let load = Load::start(VOLUME, dev.nbd(guest), 4, place.seed);
    load.progress(50, RECOVERY).await?;

    let ours = config(&dev, guest)?;
    let address = ours["listen"].as_str().ok_or("no address")?.to_owned();
    for words in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 4096], &[0x16, 0x03, 0x01, 0xff, 0xff]] {
        let before = refusals(&dev, guest);
        without_certificate(&address, words).await?;
        until_refused(&dev, guest, before, "a peer without a certificate").await?;
    }

    foreign_daemon(&dev, place, &ours, "r1-z2-n1").await?;
    load.progress(50, RECOVERY).await?;
    let (_, figures) = load.stop().await?;
    if figures.errors.load(std::sync::atomic::Ordering::Relaxed) > 0 {
        return Err("the guest was disturbed".into());
    }
    let listed = dev.command(&["node", "list"]).await?;
    if listed.as_array().map_or(0, Vec::len) != 3 {
        return Err(format!("there are three nodes, not {listed}"));
    }
    let index = dev.verified(VOLUME, RECOVERY).await?;
    println!(
        "  3 peers without a certificate and a daemon with a foreign one refused; replicas equal at {index}"
    );
    dev.stop().await
}

/// A daemon of another cluster that was told our addresses, and that it is our node.
async fn foreign_daemon(dev: &Dev, place: &Place<'_>, ours: &Value, victim: &str) -> Outcome<()> {
    let other = Dev::start(place.program, None, &["--zones", "1", "--journal", "64MiB"]).await?;
    let aside = tempfile::tempdir().map_err(|error| error.to_string())?;
    let directory = aside.path().join("n");
    let listen = config(&other, "r1-z1-n1")?["listen"].clone();
    other.ctl(&["kill", "r1-z1-n1"]).await?;
    copy(&other.node("r1-z1-n1"), &directory)?;
    other.stop().await?;
    // Its store is as foreign as its certificate: the daemon makes itself a new one.
    std::fs::remove_dir_all(directory.join("store")).map_err(|error| error.to_string())?;
    let mut config = ours.clone();
    let object = config.as_object_mut().ok_or("node.json is no object")?;
    object.insert("listen".into(), listen);
    object.remove("metrics");
    // As far as it knows, it has never been in a catalog: it tries to begin ours.
    std::fs::remove_file(directory.join("catalog-stood")).map_err(|error| error.to_string())?;
    // It claims to be the first node, and speaks to the other two. The cluster's id is in its certificate; with its own it would not even start.
    let foreign = std::fs::read(directory.join("node.json")).map_err(|error| error.to_string())?;
    let foreign: Value = serde_json::from_slice(&foreign).map_err(|error| error.to_string())?;
    config["cluster"] = foreign["cluster"].clone();
    std::fs::write(directory.join("node.json"), config.to_string()).map_err(|error| error.to_string())?;
    let before = refusals(dev, victim);
    let mut daemon = tokio::process::Command::new(place.program)
        .args(["node", "--data-dir"])
        .arg(&directory)
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| error.to_string())?;
    let refused = until_refused(dev, victim, before, "a daemon with a foreign certificate").await;
    daemon.kill().await.map_err(|error| error.to_string())?;
    refused
}
