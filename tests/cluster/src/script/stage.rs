//! A development cluster as a place where scripts are played.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use holdfast_scenario::{Backend, Condition, Deed, NodeName, Nodes, Script, Step};
use holdfast_types::{BlockIndex, BlockRange, Epoch};
use serde_json::Value;

use super::guest::{Guest, Record, Running};
use crate::Outcome;
use crate::dev::Dev;
use crate::scenarios::{Place, RECOVERY};

const VOLUME: &str = "s";
/// The scripts' bounds are those of an idle machine. This one may be busy with other things, and its programs built
/// without optimization; what is bounded here is that the same happens, soon.
const PATIENCE: u32 = 4;
/// Connections of a filling, and blocks that each writes at once.
const FILLERS: u64 = 4;
const FILL_RUN: u64 = 64;
const BLOCKS_PER_MIB: u64 = 256;
/// Answers that the last guest must get when everything is healed.
const LAST_ANSWERS: u64 = 20;

#[derive(Default)]
struct Mark {
    /// Answers of every guest, in their order.
    answers: Vec<u64>,
    term: u64,
    sent: u64,
}

/// A cluster on which a script is played.
pub struct Stage {
    dev: Dev,
    record: Arc<Record>,
    /// The nodes' names, by letter.
    nodes: Vec<String>,
    guests: Vec<Running>,
    workers: u64,
    seed: u64,
    /// Whether the script asks what is sent; it lets every daemon run, then.
    counts_bytes: bool,
    mark: Mark,
    /// What the leader had committed at the last look.
    committed: u64,
    /// Bytes of the last rebuild by chunks of each node's replica, told before its daemon was killed.
    healed: BTreeMap<NodeName, u64>,
}

/// Whether the script needs a node beside those of the replicas.
fn needs_more_nodes(script: &Script) -> bool {
    let beside = |node: &NodeName| node.place() >= 3;
    script.steps.iter().any(|step| match step {
        Step::Do(Deed::Attach { node, .. } | Deed::Replace { to: node, .. }) => beside(node),
        _ => false,
    })
}

fn number(value: &Value, name: &str) -> u64 {
    value[name].as_u64().unwrap_or(0)
}

/// What a node's store still holds of replicas: in a script's cluster there is one volume, so all of it is of this one.
fn replica_files(dev: &Dev, node: &str) -> Outcome<Vec<String>> {
    let (mut pending, mut found) = (vec![dev.node(node).join("store")], Vec::new());
    while let Some(directory) = pending.pop() {
        let entries = std::fs::read_dir(&directory).map_err(|error| error.to_string())?;
        for entry in entries.flatten() {
            if entry.path().is_dir() {
                pending.push(entry.path());
            } else if ["home", "table"].iter().any(|name| entry.file_name() == *name) {
                found.push(entry.path().display().to_string());
            }
        }
    }
    Ok(found)
}

/// The nodes on which the volume has a replica that is not only waiting to be deleted.
fn nodes_of(shown: &Value) -> Vec<&str> {
    let replicas = shown["replicas"].as_array().into_iter().flatten();
    replicas
        .filter(|replica| replica["state"] != "removing")
        .filter_map(|replica| replica["node"].as_str())
        .collect()
}

impl Stage {
    /// Starts a cluster and makes the volume.
    pub async fn set_up(place: &Place<'_>, script: &Script) -> Outcome<Self> {
        let mut options = vec!["--journal", "64MiB"];
        if needs_more_nodes(script) {
            options.extend(["--nodes-per-zone", "2"]);
        }
        if script.steps.iter().any(|step| matches!(step, Step::Do(Deed::PowerCut(_)))) {
            options.extend(["--disk", "tear"]);
        }
        let dev = place.cluster(&options).await?;
        dev.command(&["volume", "create", VOLUME, "--size", "256MiB"]).await?;
        let shown = dev.command(&["volume", "show", VOLUME]).await?;
        let replicas = shown["replicas"].as_array().into_iter().flatten();
        let mut nodes: Vec<String> =
            replicas.filter_map(|replica| replica["node"].as_str().map(str::to_owned)).collect();
        let mut beside: Vec<String> = dev.nodes()?.into_iter().filter(|node| !nodes.contains(node)).collect();
        // The first beside is in the zone of the last replica, which it may replace.
        let zone = |node: &str| node.rsplit_once('-').map(|(zone, _)| zone.to_owned());
        let last = nodes.last().and_then(|node| zone(node));
        beside.sort_by_key(|node| zone(node) != last);
        nodes.extend(beside);
        let record = Record::new();
        for node in &script.stale_reads_allowed.0 {
            record.history.allow_stale_reads(node.place() as u64 + 1);
        }
        let asks_for_bytes = |step: &Step| matches!(step, Step::Hold { what: Condition::SentAtMost(_), .. });
        Ok(Self {
            dev,
            record,
            nodes,
            guests: Vec::new(),
            workers: script.workers,
            seed: place.seed,
            counts_bytes: script.steps.iter().any(asks_for_bytes),
            mark: Mark::default(),
            committed: 0,
            healed: BTreeMap::new(),
        })
    }

    /// Ends the cluster.
    pub async fn stop(self) -> Outcome<()> {
        self.dev.stop().await
    }

    fn name(&self, node: NodeName) -> Outcome<&str> {
        let name = self.nodes.get(node.place()).ok_or_else(|| format!("there is no node {node}"));
        name.map(String::as_str)
    }
    /// Names of those that there are: a script may name a node beside that this cluster does not need.
    fn names(&self, nodes: &Nodes) -> Vec<&str> {
        nodes.0.iter().filter_map(|node| self.nodes.get(node.place()).map(String::as_str)).collect()
    }
    fn newest(&self) -> Outcome<&Arc<Guest>> {
        self.guests.last().map(|running| &running.guest).ok_or_else(|| "nobody is attached".to_owned())
    }
    fn guest_on(&self, node: NodeName) -> Outcome<(usize, &Guest)> {
        let on = |(_, running): &(usize, &Running)| running.guest.place == node.place();
        let found = self.guests.iter().enumerate().rev().find(on);
        found
            .map(|(at, running)| (at, &*running.guest))
            .ok_or_else(|| format!("there never was a guest on {node}"))
    }
    fn answers_since_mark(&self, at: usize) -> u64 {
        let before = self.mark.answers.get(at).copied().unwrap_or(0);
        self.guests[at].guest.answers() - before
    }

    async fn shown(&self) -> Outcome<Value> {
        let shown = self.dev.try_command(&["volume", "show", VOLUME]).await;
        shown.map_err(|refused| refused.message)
    }
    fn replica<'v>(&self, shown: &'v Value, name: &str) -> Option<&'v Value> {
        shown["replicas"].as_array()?.iter().find(|replica| replica["node"] == name)
    }
    /// Bytes that the last rebuild by chunks took, since its daemon started.
    async fn healed_by_chunks(&self, node: NodeName) -> Outcome<Option<u64>> {
        let shown = self.shown().await?;
        let this = self.replica(&shown, self.name(node)?).ok_or("it has no replica")?;
        Ok((this["healed_by"] == "chunks").then(|| number(this, "healed_bytes")))
    }
    /// Keeps what a daemon tells before it is killed; one that does not answer tells nothing.
    async fn note_healed(&mut self, node: NodeName) {
        if let Ok(Some(bytes)) = self.healed_by_chunks(node).await {
            self.healed.insert(node, bytes);
        }
    }
    async fn term(&self) -> Outcome<u64> {
        let shown = self.shown().await?;
        let replicas = shown["replicas"].as_array().into_iter().flatten();
        Ok(replicas.map(|replica| number(replica, "term")).max().unwrap_or(0))
    }

    /// Whoever leads is cut off for a moment, until the one leads that is meant.
    async fn lead(&self, node: NodeName) -> Outcome<()> {
        let (wanted, began) = (self.name(node)?.to_owned(), Instant::now());
        loop {
            let led = |shown: &Value| shown["leader"].as_str().is_some_and(|leader| !leader.is_empty());
            let shown = self.dev.until(VOLUME, RECOVERY, "a leader", led).await?;
            let leader = shown["leader"].as_str().unwrap_or_default().to_owned();
            if leader == wanted {
                return Ok(());
            }
            if began.elapsed() > 3 * RECOVERY {
                return Err(format!("{leader} leads"));
            }
            self.dev.ctl(&["partition", &leader]).await?;
            let other =
                |shown: &Value| shown["leader"].as_str().is_some_and(|l| !l.is_empty() && l != leader);
            self.dev.until(VOLUME, RECOVERY, "another leader", other).await?;
            self.dev.ctl(&["heal"]).await?;
        }
    }

    async fn attach(&mut self, node: NodeName, force: bool) -> Outcome<()> {
        let name = self.name(node)?.to_owned();
        let mut attach = vec!["volume", "attach", VOLUME, "--node", &name, "--frontend", "nbd"];
        attach.extend(force.then_some("--force"));
        let attached = self.dev.insist(&attach, RECOVERY).await?;
        let epoch = attached["epoch"].as_u64().ok_or_else(|| format!("no epoch in {attached}"))?;
        let seed = self.seed.wrapping_mul(1000).wrapping_add(self.guests.len() as u64);
        let (place, socket) = (node.place(), self.dev.nbd(&name));
        let running = Guest::start(&self.record, (place, socket), VOLUME, Epoch(epoch), (self.workers, seed));
        self.guests.push(running);
        Ok(())
    }

    async fn fill(&self, mib: u64, over: u64) -> Outcome<()> {
        let (guest, next) = (self.newest()?, AtomicU64::new(0));
        let (runs, places) = (mib * BLOCKS_PER_MIB / FILL_RUN, over * BLOCKS_PER_MIB / FILL_RUN);
        let filler = || async {
            let client = guest.connect().await?;
            loop {
                let run = next.fetch_add(1, Ordering::Relaxed);
                if run >= runs {
                    return Ok::<(), String>(());
                }
                let range = BlockRange::new(BlockIndex(run % places * FILL_RUN), FILL_RUN as u32);
                guest.write(&client, range).await.map_err(|error| format!("a write: {error}"))?;
            }
        };
        futures_util::future::try_join_all((0..FILLERS).map(|_| filler())).await.map(drop)
    }

    async fn replace(&self, from: NodeName, to: NodeName) -> Outcome<()> {
        let shown = self.shown().await?;
        let old = self.replica(&shown, self.name(from)?).ok_or("it has no replica")?;
        let id = number(old, "id").to_string();
        let to = self.name(to)?;
        let began = self.dev.insist(&["replica", "move", VOLUME, &id, "--to", to], RECOVERY).await;
        began.map(drop)
    }

    async fn partition(&self, groups: &[Nodes]) -> Outcome<()> {
        for (at, one) in groups.iter().enumerate() {
            for (from, to) in groups[at + 1..].iter().flat_map(|other| [(one, other), (other, one)]) {
                for from in self.names(from) {
                    for to in self.names(to) {
                        self.dev.ctl(&["cut", from, to]).await?;
                    }
                }
            }
        }
        Ok(())
    }

    async fn caught_up(&mut self, node: NodeName) -> Outcome<()> {
        let shown = self.shown().await?;
        let leader = shown["leader"].as_str().unwrap_or_default();
        let committed = |name| self.replica(&shown, name).map(|replica| number(replica, "committed_index"));
        let leading = committed(leader).ok_or("nobody leads")?;
        let this = self.replica(&shown, self.name(node)?).ok_or("it has no replica")?;
        let (applied, state) = (number(this, "applied_index"), this["state"].clone());
        // The leader does not stand still: what it had a moment ago counts.
        let goal = std::mem::replace(&mut self.committed, leading);
        if goal > 0 && applied >= goal && state == "healthy" {
            return Ok(());
        }
        Err(format!("it has applied {applied} of {goal}, and is {state}"))
    }

    /// Bytes that all nodes have sent to others since their daemons started.
    async fn sent(&self) -> Outcome<u64> {
        let mut sent = 0;
        for node in &self.nodes {
            sent += self.dev.counter(node, "holdfast_peer_sent_bytes_total").await?;
        }
        Ok(sent)
    }

    async fn set_mark(&mut self) -> Outcome<()> {
        let answers = self.guests.iter().map(|running| running.guest.answers()).collect();
        let sent = if self.counts_bytes { self.sent().await? } else { 0 };
        self.mark = Mark { answers, term: self.term().await?, sent };
        Ok(())
    }
}

impl Backend for Stage {
    fn now(&self) -> Duration {
        self.record.elapsed()
    }
    async fn pause(&self, duration: Duration) {
        tokio::time::sleep(duration).await;
    }
    fn look_every(&self) -> Duration {
        Duration::from_millis(100)
    }
    fn patience(&self, within: Duration) -> Duration {
        within * PATIENCE
    }

    async fn perform(&mut self, deed: &Deed) -> Outcome<()> {
        let ctl = async |word: &str, node: &NodeName| self.dev.ctl(&[word, self.name(*node)?]).await;
        match deed {
            Deed::Lead(node) => self.lead(*node).await,
            Deed::Attach { node, force } => self.attach(*node, *force).await,
            Deed::Fill { mib, over } => self.fill(*mib, *over).await,
            Deed::Partition(groups) => self.partition(groups).await,
            Deed::CutOneWay { from, to } => match self.nodes.get(from.place().max(to.place())) {
                Some(_) => self.dev.ctl(&["cut", self.name(*from)?, self.name(*to)?]).await,
                None => Ok(()), // a node beside that this cluster does not have
            },
            Deed::Heal => self.dev.ctl(&["heal"]).await,
            // With a disk that tears, SIGKILL is a power cut.
            Deed::Kill(node) | Deed::PowerCut(node) => {
                self.note_healed(*node).await;
                self.dev.ctl(&["kill", self.name(*node)?]).await
            }
            Deed::Start(node) => ctl("start", node).await,
            Deed::Pause(node) => ctl("pause", node).await,
            Deed::Resume(node) => ctl("resume", node).await,
            Deed::ClockRate { .. } | Deed::ClockJump { .. } => {
                Err("a process has no clock of its own: the script is for the simulation".to_owned())
            }
            Deed::Replace { from, to } => self.replace(*from, *to).await,
            Deed::Mark => self.set_mark().await,
        }
    }

    async fn is_so(&mut self, condition: &Condition) -> Outcome<()> {
        let verdict = |holds: bool, instead: String| if holds { Ok(()) } else { Err(instead) };
        match condition {
            Condition::Leads(nodes) => {
                let shown = self.shown().await?;
                let leader = shown["leader"].as_str().unwrap_or_default();
                verdict(self.names(nodes).contains(&leader), format!("the leader is '{leader}'"))
            }
            Condition::Answered(answers) => {
                let guest = self.newest()?;
                let had = self.answers_since_mark(self.guests.len() - 1);
                let ended = if guest.has_ended() { ", and the volume is not to be had there" } else { "" };
                verdict(had >= *answers, format!("it had {had} answers{ended}"))
            }
            Condition::Unanswered(node) => {
                let (at, guest) = self.guest_on(*node)?;
                let (had, asks) = (self.answers_since_mark(at), guest.waits());
                verdict(had == 0 && asks, format!("it had {had} answers, and waits for one: {asks}"))
            }
            Condition::Fenced(node) => {
                verdict(self.guest_on(*node)?.1.has_ended(), "it is served, or waits".to_owned())
            }
            Condition::TermsAtMost(terms) => {
                let grown = self.term().await?.saturating_sub(self.mark.term);
                verdict(grown <= *terms, format!("{grown} new terms"))
            }
            Condition::CaughtUp(node) => self.caught_up(*node).await,
            Condition::Members(nodes) => {
                let shown = self.shown().await?;
                let (mut on, mut wanted) = (nodes_of(&shown), self.names(nodes));
                on.sort_unstable();
                wanted.sort_unstable();
                let healthy = shown["health"] == "healthy";
                verdict(on == wanted && healthy, format!("it is on {on:?}, {}", shown["health"]))
            }
            Condition::Gone(node) => {
                let shown = self.shown().await?;
                let name = self.name(*node)?;
                let files = replica_files(&self.dev, name)?;
                let is_gone = files.is_empty() && !nodes_of(&shown).contains(&name);
                verdict(is_gone, format!("it is on {:?}; files: {files:?}", nodes_of(&shown)))
            }
            Condition::HealedByChunks { node, at_most } => {
                let healed = self.healed_by_chunks(*node).await?;
                let bytes = healed.or(self.healed.get(node).copied()).unwrap_or(0);
                verdict((1..=at_most << 20).contains(&bytes), format!("{bytes} bytes of chunks healed it"))
            }
            Condition::SentAtMost(mib) => {
                let sent = self.sent().await?.saturating_sub(self.mark.sent);
                verdict(sent <= mib << 20, format!("{:.1} MiB were sent", sent as f64 / f64::from(1 << 20)))
            }
        }
    }

    fn sound(&self) -> Outcome<()> {
        self.record.check()
    }

    async fn finish(&mut self) -> Outcome<()> {
        self.dev.ctl(&["heal"]).await?;
        self.dev.ctl(&["resume", "r1"]).await?;
        self.dev.ctl(&["start", "r1"]).await?;
        if self.newest()?.has_ended() {
            self.attach(NodeName('a'), true).await?;
        }
        let last = self.newest()?.clone();
        let (goal, until) = (last.answers() + LAST_ANSWERS, Instant::now() + RECOVERY);
        while last.answers() < goal {
            if Instant::now() > until {
                return Err(format!("no progress within {RECOVERY:?} when healed"));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        for running in std::mem::take(&mut self.guests) {
            running.stop().await?;
        }
        let blocks = last.read_all().await?;
        self.record.check()?;
        self.record.history.check()?;
        let index = self.dev.verified(VOLUME, RECOVERY).await?;
        let (operations, unknown) = self.record.history.counts();
        println!(
            "  {operations} operations, {unknown} of unknown outcome, every block as a disk may be; {blocks} blocks read \
             at the end, replicas equal at {index}"
        );
        Ok(())
    }
}
