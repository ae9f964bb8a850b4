//! How long a guest's writes stall when the leadership changes: planned, by SIGKILL, by a silent partition. The guest
//! sits on a node that lives and that everybody else hears.

use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use super::guest::{Guest, Seen};
use crate::Outcome;
use crate::cluster::DevCluster;

const VOLUME: &str = "stalls";
const SIZE: u64 = 64 << 20;
/// How long a restarted voter may neither vote nor campaign, and some more: a round begins with three that do.
const SETTLED: Duration = Duration::from_millis(2500);
/// Looked at for at least so long after a transfer, a kill, and a partition: longer than what is expected, so that a
/// stall that begins late is in it.
const TRANSFER: Duration = Duration::from_millis(500);
const KILL: Duration = Duration::from_millis(2000);
const PARTITION: Duration = Duration::from_millis(3500);

/// What was seen of each event.
#[derive(Default)]
pub struct Stalls {
    /// Between the leader's heartbeats, in milliseconds.
    pub heartbeat_ms: u64,
    /// Planned transfers.
    pub planned: Vec<Seen>,
    /// Kills of the leader's daemon.
    pub killed: Vec<Seen>,
    /// Partitions of the leader.
    pub partitioned: Vec<Seen>,
    /// The same time without any event.
    pub nothing: Vec<Seen>,
}

struct Stage {
    cluster: DevCluster,
    guest: Guest,
    /// Where the guest is, and the others.
    home: String,
    others: Vec<String>,
}

fn replica_on(shown: &Value, node: &str) -> Outcome<String> {
    let replicas = shown["replicas"].as_array().ok_or("the volume has no replicas")?;
    let on = replicas.iter().find(|replica| replica["node"] == node);
    let id = on.and_then(|replica| replica["id"].as_u64());
    id.map(|id| id.to_string()).ok_or_else(|| format!("no replica stands on {node}"))
}

impl Stage {
    fn start(program: &Path, directory: &Path, timers: &str) -> Outcome<Self> {
        let cluster = DevCluster::start(program, directory, &[])?;
        let mut names = cluster.nodes()?.into_iter().map(|node| node.name);
        let home = names.next().ok_or("the cluster has no nodes")?;
        cluster.attached(VOLUME, SIZE, &home, &["--timers", timers])?;
        // They are brought about in the background.
        cluster.volume_until(VOLUME, "the timers", |shown| {
            let is_fast = shown["heartbeat_ms"].as_u64().is_some_and(|heartbeat| heartbeat < 50);
            shown["timers_changing"] == false && is_fast == (timers == "tight")
        })?;
        let guest = Guest::start(&cluster.nbd(&home), VOLUME)?;
        Ok(Self { others: names.collect(), cluster, guest, home })
    }

    /// Hands the leadership to the replica on a node under the guest's writes.
    fn lead(&self, node: &str) -> Outcome<Seen> {
        let shown = self.cluster.volume_until(VOLUME, "a leader", |shown| shown["leader"].is_string())?;
        let replica = replica_on(&shown, node)?;
        self.guest.flows(Duration::from_millis(300))?;
        self.guest.begin();
        self.cluster.command(&["replica", "lead", VOLUME, &replica])?;
        self.guest.seen(TRANSFER)
    }

    fn healthy(&self) -> Outcome<()> {
        self.cluster.volume_until(VOLUME, "three healthy replicas", |shown| shown["health"] == "healthy")?;
        self.guest.flows(SETTLED)
    }

    fn leader(&self) -> Outcome<String> {
        let shown = self.cluster.volume_until(VOLUME, "a leader", |shown| shown["leader"].is_string())?;
        Ok(shown["leader"].as_str().unwrap_or_default().to_owned())
    }

    /// One round on a victim: three planned transfers that end on it, and then it dies and is cut off.
    fn round(&self, victim: &str, other: &str, stalls: &mut Stalls) -> Outcome<()> {
        for node in [other, &self.home, victim] {
            if self.leader()? != node {
                stalls.planned.push(self.lead(node)?);
            }
        }
        self.guest.begin();
        stalls.nothing.push(self.guest.seen(KILL)?);
        self.guest.begin();
        self.cluster.fault(&["kill", victim])?;
        stalls.killed.push(self.guest.seen(KILL)?);
        self.cluster.fault(&["start", victim])?;
        self.healthy()?;
        if self.leader()? != victim {
            stalls.planned.push(self.lead(victim)?);
        }
        self.guest.begin();
        self.cluster.fault(&["partition", victim])?;
        stalls.partitioned.push(self.guest.seen(PARTITION)?);
        self.cluster.fault(&["heal"])?;
        self.healthy()
    }
}

fn told(what: &str, seen: &[Seen]) -> String {
    let all: Vec<String> = seen.iter().map(|seen| seen.gap.as_millis().to_string()).collect();
    format!("{what} {} ms", all.join(" "))
}

/// Measures.
pub fn measure(program: &Path, directory: &Path, timers: &str, rounds: u64) -> Outcome<Stalls> {
    let stage = Stage::start(program, directory, timers)?;
    let shown = stage.cluster.command(&["volume", "show", VOLUME])?;
    let heartbeat_ms = shown["heartbeat_ms"].as_u64().unwrap_or_default();
    let mut stalls = Stalls { heartbeat_ms, ..Stalls::default() };
    let [first, second] = stage.others.as_slice() else { return Err("there are not three nodes".into()) };
    for round in 0..rounds {
        let (victim, other) = if round % 2 == 0 { (first, second) } else { (second, first) };
        stage.round(victim, other, &mut stalls).map_err(|why| format!("round {}: {why}", round + 1))?;
        println!(
            "  round {}: {}; {}; {}",
            round + 1,
            told("killed", &stalls.killed),
            told("partitioned", &stalls.partitioned),
            told("planned", &stalls.planned)
        );
    }
    Ok(stalls)
}
