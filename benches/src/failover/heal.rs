//! What is sent to heal a replica that was away: by log against the bytes that were written meanwhile, by chunks against
//! the distinct blocks that changed.
//!
//! Healing by log is counted by the replica: bytes of the messages that brought the log it had missed, their heads
//! included. Healing by chunks likewise: bytes of all answers that it asked for, comparisons included.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use holdfast_frontend::nbd::NbdClient;
use serde_json::Value;

use crate::Outcome;
use crate::cluster::{DevCluster, until};
use crate::load::Places;

const VOLUME: &str = "heal";
const SIZE: u64 = 256 << 20;
const BLOCK: u64 = 4096;
/// Writes at once.
const DEPTH: u64 = 16;
/// Blocks written while the log is retained.
const LOGGED: u64 = 4096;
/// Places of the volume whose every other one is written until the log has been purged.
const CHANGED: u64 = 8192;
/// How long writing may go on until the log is purged.
const PURGED: Duration = Duration::from_secs(120);

/// How a replica was healed.
#[derive(Clone, Debug)]
pub struct Healed {
    /// `log` or `chunks`.
    pub road: String,
    /// Bytes sent for it.
    pub sent: u64,
    /// Bytes that guests wrote meanwhile.
    pub written: u64,
    /// Bytes of the distinct blocks among them.
    pub distinct: u64,
    /// From the start of its daemon until it was healthy again.
    pub took: Duration,
}

struct Writer {
    client: NbdClient,
    places: Places,
    written: u64,
    distinct: BTreeSet<u64>,
}

impl Writer {
    /// Writes these blocks, each with content that nothing had before.
    async fn write(&mut self, blocks: &[u64]) -> Outcome<()> {
        for run in blocks.chunks(DEPTH as usize) {
            let content = |block: &u64, places: &mut Places| {
                let data: Vec<u8> = (0..BLOCK / 8).flat_map(|_| places.next().to_le_bytes()).collect();
                (block * BLOCK, Bytes::from(data))
            };
            let run: Vec<(u64, Bytes)> = run.iter().map(|block| content(block, &mut self.places)).collect();
            let writes = run.iter().map(|(offset, data)| self.client.write(*offset, data.clone()));
            let written: std::io::Result<Vec<()>> =
                futures_util::future::join_all(writes).await.into_iter().collect();
            written.map_err(|error| format!("a write: {error}"))?;
            self.written += run.len() as u64 * BLOCK;
            self.distinct.extend(run.iter().map(|(offset, _)| *offset));
        }
        Ok(())
    }

    fn begin(&mut self) {
        self.written = 0;
        self.distinct.clear();
    }
}

struct Stage {
    cluster: DevCluster,
    away: String,
    writer: Writer,
}

fn replica<'v>(shown: &'v Value, node: &str) -> Option<&'v Value> {
    shown["replicas"].as_array()?.iter().find(|replica| replica["node"] == node)
}

fn number(value: Option<&Value>, name: &str) -> u64 {
    value.and_then(|value| value[name].as_u64()).unwrap_or(0)
}

impl Stage {
    async fn start(program: &Path, directory: &Path) -> Outcome<Self> {
        // Small, so that its log is purged soon.
        let cluster = DevCluster::start(program, directory, &["--journal", "64MiB"])?;
        let nodes = cluster.nodes()?;
        let (home, away) = (&nodes[0].name, nodes[nodes.len() - 1].name.clone());
        cluster.attached(VOLUME, SIZE, home, &[])?;
        let client = NbdClient::connect(&cluster.nbd(home), VOLUME).await;
        let client = client.map_err(|error| format!("the guest cannot connect: {error}"))?;
        let writer = Writer { client, places: Places::new(17), written: 0, distinct: BTreeSet::new() };
        Ok(Self { cluster, away, writer })
    }

    /// Starts the replica that was away; how it was healed.
    fn back(&self) -> Outcome<Healed> {
        let began = Instant::now();
        self.cluster.fault(&["start", &self.away])?;
        let healthy = |shown: &Value| {
            let all = shown["replicas"].as_array().into_iter().flatten();
            let last = all.map(|replica| number(Some(replica), "applied_index")).max();
            let this = replica(shown, &self.away);
            this.is_some_and(|this| this["state"] == "healthy" && this["healed_by"].is_string())
                && Some(number(this, "applied_index")) == last
        };
        let shown = self.cluster.volume_until(VOLUME, "the replica that was away", healthy)?;
        let took = began.elapsed();
        let this = replica(&shown, &self.away);
        let road = this.and_then(|this| this["healed_by"].as_str()).unwrap_or_default().to_owned();
        Ok(Healed {
            road,
            sent: number(this, "healed_bytes"),
            written: self.writer.written,
            distinct: self.writer.distinct.len() as u64 * BLOCK,
            took,
        })
    }

    async fn by_log(&mut self) -> Outcome<Healed> {
        self.cluster.fault(&["kill", &self.away])?;
        self.writer.begin();
        let blocks: Vec<u64> = (0..LOGGED).map(|_| self.writer.places.next() % (SIZE / BLOCK)).collect();
        self.writer.write(&blocks).await?;
        self.back()
    }

    async fn by_chunks(&mut self) -> Outcome<Healed> {
        let shown = self.cluster.command(&["volume", "show", VOLUME])?;
        let last = number(replica(&shown, &self.away), "last_log_index");
        self.cluster.fault(&["kill", &self.away])?;
        self.writer.begin();
        let blocks: Vec<u64> = (0..CHANGED / 2).map(|number| number * 2).collect();
        let began = Instant::now();
        loop {
            self.writer.write(&blocks).await?;
            let shown = self.cluster.command(&["volume", "show", VOLUME])?;
            let leader = shown["leader"].as_str().unwrap_or_default();
            if number(replica(&shown, leader), "purged_index") > last {
                break;
            }
            if began.elapsed() > PURGED {
                return Err(format!("the log is not purged in {PURGED:?}"));
            }
        }
        self.back()
    }
}

/// Measures both roads.
pub fn measure(program: &Path, directory: &Path) -> Outcome<Vec<Healed>> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.map_err(|error| error.to_string())?;
    let mut stage = runtime.block_on(Stage::start(program, directory))?;
    let blocks: Vec<u64> = (0..CHANGED).collect();
    // Nothing that is measured is a first write.
    runtime.block_on(stage.writer.write(&blocks))?;
    let by_log = runtime.block_on(stage.by_log())?;
    let healed = vec![by_log, runtime.block_on(stage.by_chunks())?];
    for (road, of) in ["log", "chunks"].iter().zip(&healed) {
        println!(
            "  healed by {}: {} bytes sent, {} written, {} distinct",
            of.road, of.sent, of.written, of.distinct
        );
        if of.road != *road {
            return Err(format!("the replica was to be healed by {road} and was by '{}'", of.road));
        }
    }
    let equal = until("equal replicas", || {
        Ok(stage.cluster.command(&["volume", "verify", VOLUME]).ok().map(|report| report["equal"] == true))
    })?;
    if !equal {
        return Err("the replicas differ after they were healed".into());
    }
    Ok(healed)
}
