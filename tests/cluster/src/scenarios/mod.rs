//! Named attacks on real processes: a file per fault, named by the fault. Each brings up a cluster of its own, prints
//! its figures and leaves nothing behind. What needs nothing but the words of `holdfast_scenario` is a script there, and
//! is played here by `crate::script`.

mod bad_requests;
mod copies;
mod damaged_journal;
mod deaf_leader;
mod fence_certificate;
mod forced_recovery;
mod foreign_peer;
mod full_disk;
mod left_behind;
mod lost_node;
mod lost_quorum;
mod moved_replicas;
mod new_holder;
mod power_cut;
mod restored_copy;
mod rotten_entry;
mod snapshots;
mod store_lost;
mod witness;
mod wrong_directory;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::Outcome;

/// How long a cluster whose daemons all run may take to serve again.
pub const RECOVERY: Duration = crate::kills::RECOVERY;

/// What every scenario gets.
pub struct Place<'p> {
    /// The `holdfast` program.
    pub program: &'p Path,
    /// Where to keep the cluster's directory, if it is to be kept.
    pub keep: Option<PathBuf>,
    /// Where choices come from.
    pub seed: u64,
    /// Times that what can be repeated is repeated.
    pub rounds: u32,
}

impl Place<'_> {
    /// A cluster for the scenario.
    pub async fn cluster(&self, options: &[&str]) -> Outcome<crate::dev::Dev> {
        crate::dev::Dev::start(self.program, self.keep.clone(), options).await
    }
}

/// Every scenario: its name and what it does.
pub const ALL: [(&str, &str); 25] = [
    ("partition", "the attached node is cut off, and the volume taken by force"),
    ("partition-detach", "the same with a forced detach, then an attach"),
    ("partition-leader-killed", "the same, and the leader is killed while the new holder waits"),
    ("pause", "the attached node is stopped by SIGSTOP, and the volume taken by force"),
    ("pause-detach", "the same with a forced detach, then an attach"),
    ("pause-leader-killed", "the same, and the leader is killed while the new holder waits"),
    ("fence-certificate", "the attached node dies, and a majority signs that it is fenced"),
    ("deaf-leader", "the leader can send but not hear, for good"),
    ("power-cut", "all nodes are killed at once and what they had not flushed is torn, with several volumes"),
    ("lost-quorum", "two zones die: I/O waits, goes on under the same epoch, and can be aborted"),
    ("bad-requests", "sizes, names, nodes and parameters that cannot be"),
    ("wrong-directory", "a second daemon on a directory; a directory of another cluster"),
    ("foreign-peer", "a peer without a certificate, and one with another cluster's"),
    ("damaged-journal", "a journal with flipped bits, and one that was cut short"),
    ("rotten-entry", "a few log entries rot on one node and are repaired in place from its peers"),
    ("restored-copy", "an older copy of a node's directory is put back; a copy is started beside the node"),
    ("left-behind", "a replica that was away is healed by log, and by chunks once the log is purged"),
    ("moved-replicas", "a replica is moved, added and removed under load"),
    ("lost-node", "a node that stays away is replaced"),
    (
        "forced-recovery",
        "two of three replicas are lost for good: the volume goes on from the third, and they come back",
    ),
    ("snapshots", "snapshots over writes, the leader's death, an absence and their own end"),
    ("full-disk", "the media of two of three nodes fill up, and room is made by trims"),
    (
        "witness",
        "two zones and a witness: each is lost in turn, and what only the lost zone and the witness had is kept",
    ),
    (
        "store-lost",
        "nodes of two stores lose one each: its disk fails, hangs, is not mounted, or is another one's",
    ),
    ("copies", "the node that copies a snapshot into a new volume is killed in the middle"),
];

async fn one(name: &str, place: &Place<'_>) -> Outcome<()> {
    use new_holder::{Fault, Road};
    match name {
        "partition" => new_holder::run(place, Fault::Partition, Road::Force).await,
        "partition-detach" => new_holder::run(place, Fault::Partition, Road::DetachThenAttach).await,
        "partition-leader-killed" => new_holder::run(place, Fault::Partition, Road::LeaderKilled).await,
        "pause" => new_holder::run(place, Fault::Pause, Road::Force).await,
        "pause-detach" => new_holder::run(place, Fault::Pause, Road::DetachThenAttach).await,
        "pause-leader-killed" => new_holder::run(place, Fault::Pause, Road::LeaderKilled).await,
        "fence-certificate" => fence_certificate::run(place).await,
        "deaf-leader" => deaf_leader::run(place).await,
        "power-cut" => power_cut::run(place).await,
        "lost-quorum" => lost_quorum::run(place).await,
        "bad-requests" => bad_requests::run(place).await,
        "wrong-directory" => wrong_directory::run(place).await,
        "forced-recovery" => forced_recovery::run(place).await,
        "foreign-peer" => foreign_peer::run(place).await,
        "damaged-journal" => damaged_journal::run(place).await,
        "rotten-entry" => rotten_entry::run(place).await,
        "restored-copy" => restored_copy::run(place).await,
        "left-behind" => left_behind::run(place).await,
        "moved-replicas" => moved_replicas::run(place).await,
        "lost-node" => lost_node::run(place).await,
        "snapshots" => snapshots::run(place).await,
        "full-disk" => full_disk::run(place).await,
        "copies" => copies::run(place).await,
        "store-lost" => store_lost::run(place).await,
        "witness" => witness::run(place).await,
        other => match holdfast_scenario::scripts::named(other) {
            Some(script) => crate::script::run(place, &script).await,
            None => {
                let known: Vec<&str> = all().iter().map(|(name, _)| *name).collect();
                Err(format!("there is no scenario '{other}'; there are: {}", known.join(", ")))
            }
        },
    }
}

/// Those of this crate, and the scripts that are played on real processes.
fn all() -> Vec<(&'static str, &'static str)> {
    let scripts = crate::script::all().into_iter().map(|script| (script.name, script.what));
    ALL.into_iter().chain(scripts).collect()
}

/// Says what there is, and what is left to the simulation.
pub fn list() {
    for (name, what) in all() {
        println!("{name:28} {what}");
    }
    for (name, why) in crate::script::not_played() {
        println!("{name:28} NOT PLAYED on real processes: {why}");
    }
}

/// Runs the scenarios of these names, all of them if none is named.
pub async fn run(names: &[String], place: &Place<'_>) -> Outcome<()> {
    let known = all();
    let all: Vec<String> = known.iter().map(|(name, _)| (*name).to_owned()).collect();
    let chosen = if names.is_empty() { &all } else { names };
    let mut failed = Vec::new();
    for name in chosen {
        let what = known.iter().find(|(known, _)| known == name).map_or("", |(_, what)| what);
        println!("{name}: {what} (seed {})", place.seed);
        let began = Instant::now();
        let result = one(name, place).await;
        let seconds = began.elapsed().as_secs_f64();
        match result {
            Ok(()) => println!("  passed, {seconds:.1} s"),
            Err(why) => {
                println!("  FAILED after {seconds:.1} s: {why}");
                failed.push(name.as_str());
            }
        }
    }
    println!("{} scenarios passed, {} failed", chosen.len() - failed.len(), failed.len());
    if failed.is_empty() { Ok(()) } else { Err(failed.join(", ")) }
}
