//! `--demo zone-loss`: a volume with a directory tree on it outlives the loss of zones.
//!
//! *Act 1*: the guest is on a node without a replica, and the leader's zone is killed under its writes: I/O stalls, goes
//! on, and nothing errors. *Act 2*: the guest is beside a replica, and that whole zone is killed: the volume goes to
//! another node by force. The zone stays away until no living replica has the log any more that it would need.

use std::sync::Arc;
use std::time::Instant;

use holdfast_frontend::nbd::NbdClient;
use holdfast_node::admin::pb;
use holdfast_types::{ByteSize, ErrorCode, UserError};
use serde_json::json;

use super::acts;
use super::guest::{Guest, Ledger};
use super::report::{Report, millis, rate, span};
use super::stage::{self, Stage};
use super::tree::{self, Tree};
use super::{check_data, failed};

/// Requests of the guest before something happens to it.
const BEFORE: u64 = 400;
/// Requests that show that I/O goes on.
const AFTER: u64 = 800;
/// Bytes that may be written until the log of a dead zone must have been purged, in journals.
const PURGED_WITHIN_JOURNALS: u64 = 6;
/// Bytes sent to heal by chunks at most, in percent of the distinct bytes that changed (DESIGN §14).
const SENT_PERCENT_MAX: u64 = 110;

/// Plays it.
pub(super) async fn play(
    stage: &Stage,
    report: &mut Report<'_>,
    data: u64,
    journal: u64,
) -> Result<(), UserError> {
    check_data(data)?;
    let mut show = prologue(stage, report, data).await?;
    show.act_one(report).await?;
    let lost = show.act_two(report).await?;
    show.return_of(report, &lost, journal).await?;
    show.epilogue(report, &lost).await
}

struct Show<'s> {
    stage: &'s Stage,
    tree: Tree,
    ledger: Arc<Ledger>,
    /// Where the guest is.
    node: String,
    client: Arc<NbdClient>,
    /// Zones that have died once; another one is taken next.
    died: Vec<String>,
}

/// A zone that died with the guest in it.
struct Lost {
    zone: String,
    node: String,
    /// An index of the log that nobody in the zone can have.
    index: u64,
    written_before: u64,
}

async fn prologue<'s>(stage: &'s Stage, report: &mut Report<'_>, data: u64) -> Result<Show<'s>, UserError> {
    report.act("A volume that survives a zone");
    let zones: std::collections::BTreeSet<&str> =
        stage.nodes().iter().map(|node| node.zone.as_str()).collect();
    let (zones, nodes) = (zones.len(), stage.nodes().len());
    let below = stage.directory().display();
    report.fact(
        "cluster",
        format!("{zones} zones with {} nodes each, as child processes below {below}", nodes / zones.max(1)),
        json!({"zones": zones, "nodes": nodes}),
    );
    report.step("creating the volume");
    let volume = stage.create().await?;
    let on: Vec<&str> = volume.replicas.iter().map(|replica| replica.node.as_str()).collect();
    report.fact(
        "volume",
        format!("{}, replicas on {}", ByteSize(volume.size_bytes), on.join(", ")),
        json!({"size_bytes": volume.size_bytes, "replicas": on}),
    );
    let without = stage.nodes().iter().find(|node| !on.contains(&node.name.as_str()));
    let node = without.ok_or_else(|| failed("the cluster", "every node has a replica"))?.name.clone();
    let client = attach(stage, &node, false).await?.1;
    let counting = report.count_bytes("loading a directory tree", data);
    let tree = tree::load(&client, data, &counting).await?;
    drop(counting);
    report.fact(
        "loaded",
        format!(
            "{}: {} files and links, {}, as a tar archive in {} ({}), checksum {}",
            tree.root.display(),
            tree.len(),
            ByteSize(tree.content_bytes),
            span(tree.took),
            rate(tree.archive_bytes, tree.took),
            tree.checksum()
        ),
        json!({
            "tree": tree.root.display().to_string(),
            "files": tree.len(),
            "bytes": tree.content_bytes,
            "checksum": tree.checksum(),
        }),
    );
    Ok(Show { stage, tree, ledger: Ledger::new(), node, client, died: Vec::new() })
}

/// Attaches the volume and connects to it as a guest would.
async fn attach(
    stage: &Stage,
    node: &str,
    force: bool,
) -> Result<(pb::Attachment, Arc<NbdClient>), UserError> {
    let attached = stage.attach(node, "nbd", force).await?;
    let client = stage.connect(node).await.map_err(|error| failed(&attached.device, error))?;
    Ok((attached, Arc::new(client)))
}

impl Show<'_> {
    async fn check_content(&self, report: &mut Report<'_>) {
        let outcome = self.ledger.check_all(&self.client).await;
        report.check("every write that was acknowledged is there", outcome);
        let counting = report.count_bytes("reading the tree back", self.tree.archive_bytes);
        let outcome = tree::check(&self.client, &self.tree, &counting).await;
        drop(counting);
        report.check("the tree is whole", outcome);
    }

    async fn act_one(&mut self, report: &mut Report<'_>) -> Result<(), UserError> {
        report.act("Act 1: the leader's zone dies while the guest writes on a node without a replica");
        report.step("the guest writes");
        let guest = Guest::start(&self.client, &self.ledger);
        guest.progress(BEFORE).await?;
        let zone = self.leader_elsewhere(report).await?;
        guest.progress(BEFORE).await?;
        report.step(format!("killing zone {zone}"));
        self.ledger.begin_gap();
        let before = self.ledger.figures();
        let killed = self.stage.kill(&zone).await?;
        guest.progress(AFTER).await?;
        let after = self.ledger.figures();
        report.fact(
            "killed",
            format!("zone {zone}, {killed} daemons, by SIGKILL, after {} writes", before.writes),
            json!({"killed_zone": zone, "writes_before": before.writes}),
        );
        let volume = self.stage.volume().await?;
        let now = format!("no answer for {}; {} leads now", span(after.gap), volume.leader);
        report.fact("stall", now, json!({"stall_ms": millis(after.gap), "new_leader": volume.leader}));
        report.step(format!("zone {zone} comes back"));
        self.died.push(zone.clone());
        // Two cores carry three zones here: the guest leaves some of them to the healing.
        guest.calm_down();
        self.stage.start(&zone).await?;
        let index = stage::committed(&self.stage.volume().await?);
        let healed = self.stage.healed(index).await?;
        let stopped = guest.stop().await;
        let done = self.ledger.figures();
        let answered = done.writes + done.reads - before.writes - before.reads;
        report.check(
            "nothing errored, and nothing hangs",
            match (stopped, done.errors) {
                (Err(why), _) => Err(why),
                (Ok(()), 0) => Ok(format!("{answered} requests answered since the kill")),
                (Ok(()), errors) => Err(format!("{errors} requests failed")),
            },
        );
        report.check("every read was right", self.ledger.right());
        acts::road(report, &zone, &healed);
        self.check_content(report).await;
        Ok(())
    }

    /// The leader follows the guest; it is given to another zone, so that the leader's loss is not the guest's.
    async fn leader_elsewhere(&self, report: &mut Report<'_>) -> Result<String, UserError> {
        self.ledger.begin_gap();
        let (zone, leader) = acts::leader_outside(self.stage, &self.stage.zone_of(&self.node)?).await?;
        let stall = self.ledger.figures().gap;
        report.fact(
            "guest",
            format!(
                "on {}; the leadership was handed to {leader} under its writes, no answer for {}",
                self.node,
                span(stall)
            ),
            json!({"guest": self.node, "leader": leader, "planned_stall_ms": millis(stall)}),
        );
        Ok(zone)
    }

    async fn act_two(&mut self, report: &mut Report<'_>) -> Result<Lost, UserError> {
        report.act("Act 2: the guest's own zone dies, with a replica beside it");
        let (home, died) = (self.stage.zone_of(&self.node)?, self.died.clone());
        let another = |replica: &pb::Replica| replica.zone != home && !died.contains(&replica.zone);
        let (zone, node) = self.beside_a_replica(report, another).await?;
        let epoch = self.stage.volume().await?.epoch;
        let guest = Guest::start(&self.client, &self.ledger);
        guest.progress(BEFORE).await?;
        report.step(format!("killing zone {zone}"));
        let writes = self.ledger.figures().writes;
        let killed = Instant::now();
        let daemons = self.stage.kill(&zone).await?;
        let ended = guest.stop().await.map(|()| "its requests failed with its node".to_owned());
        report.fact(
            "killed",
            format!("zone {zone}, {daemons} daemons, by SIGKILL, after {writes} writes"),
            json!({"killed_zone": zone, "writes_before": writes}),
        );
        report.check("the guest on it does not hang", ended);
        self.ledger.begin_away();
        let written_before = self.ledger.figures().written_bytes;
        let elsewhere = self.stage.volume().await?;
        let elsewhere = elsewhere.replicas.iter().find(|replica| replica.zone != zone);
        let elsewhere = elsewhere.ok_or_else(|| failed("the volume", "all replicas are in one zone"))?;
        report.step("attaching elsewhere by force");
        let (attached, client) = attach(self.stage, &elsewhere.node, true).await?;
        (self.node, self.client) = (attached.node.clone(), client);
        let first = self.client.read(0, 4096).await;
        let back = killed.elapsed();
        report.fact(
            "moved",
            format!(
                "to {} with --force, epoch {}; served {} after the kill",
                self.node,
                attached.epoch,
                span(back)
            ),
            json!({"moved_to": self.node, "epoch": attached.epoch, "back_ms": millis(back)}),
        );
        report.check(
            "the new holder has a newer epoch and is served",
            match first {
                Err(error) => Err(error.to_string()),
                Ok(_) if attached.epoch <= epoch => {
                    Err(format!("epoch {} came after {epoch}", attached.epoch))
                }
                Ok(_) => Ok(format!("{} after {epoch}", attached.epoch)),
            },
        );
        self.check_content(report).await;
        // The new epoch's first entry is committed, and was never sent to the dead zone.
        let index = stage::committed(&self.stage.volume().await?);
        Ok(Lost { zone, node, index, written_before })
    }

    /// Moves the guest, as planned, onto the node of a replica; the leader follows.
    async fn beside_a_replica(
        &mut self,
        report: &mut Report<'_>,
        which: impl Fn(&pb::Replica) -> bool,
    ) -> Result<(String, String), UserError> {
        let volume = self.stage.volume().await?;
        let (zone, node) = volume
            .replicas
            .iter()
            .find(|replica| which(replica))
            .map(|replica| (replica.zone.clone(), replica.node.clone()))
            .ok_or_else(|| failed("the volume", "no zone is left for the guest"))?;
        report.step(format!("moving the guest to {node}"));
        self.stage.detach().await?;
        self.client = attach(self.stage, &node, false).await?.1;
        self.node = node.clone();
        self.stage.until("the leader's coming", |volume| (volume.leader == node).then_some(())).await?;
        report.fact(
            "guest",
            format!("on {node}, beside a replica; the leader has followed"),
            json!({"guest": node, "leader": node}),
        );
        Ok((zone, node))
    }

    async fn return_of(
        &mut self,
        report: &mut Report<'_>,
        lost: &Lost,
        journal: u64,
    ) -> Result<(), UserError> {
        report.act("The lost zone comes back after the log has been purged past it");
        report.step("writing on until the log is purged");
        let guest = Guest::start(&self.client, &self.ledger);
        let limit = lost.written_before + journal * PURGED_WITHIN_JOURNALS;
        let purged = loop {
            guest.progress(BEFORE).await?;
            let volume = self.stage.volume().await?;
            if stage::is_purged_past(&volume, lost.index) {
                break volume.replicas.iter().map(|replica| replica.purged_index).max().unwrap_or(0);
            }
            if self.ledger.figures().written_bytes > limit {
                let written = ByteSize(limit - lost.written_before);
                let message = format!("the log is not purged past the dead zone after {written} of writes");
                return Err(UserError::new(ErrorCode::TimedOut, message));
            }
        };
        let stopped = guest.stop().await;
        report.check("the volume was written on with a zone missing", stopped.map(|()| String::new()));
        let written = self.ledger.figures().written_bytes - lost.written_before;
        let distinct = self.ledger.dirtied_bytes();
        report.fact(
            "away",
            format!(
                "{} written, {} of them distinct; the log is purged to index {purged}, and zone {} knows none above {}",
                ByteSize(written),
                ByteSize(distinct),
                lost.zone,
                lost.index
            ),
            json!({"written_bytes": written, "distinct_bytes": distinct, "purged_index": purged, "lost_index": lost.index}),
        );
        report.step(format!("zone {} comes back", lost.zone));
        let back = Instant::now();
        let index = stage::committed(&self.stage.volume().await?);
        self.stage.start(&lost.zone).await?;
        let healed = self.stage.healed(index).await?;
        acts::road(report, &lost.zone, &healed);
        report.fact("took", span(back.elapsed()), json!({"heal_ms": millis(back.elapsed())}));
        let replica = healed.replicas.iter().find(|replica| replica.zone == lost.zone);
        report.check("it was healed by what changed, not by a copy", sent_enough(replica, distinct));
        report.check("its old attachment is gone", self.old_holder(&lost.node).await);
        Ok(())
    }

    /// The node that held the volume when it died serves it no more.
    async fn old_holder(&self, node: &str) -> Result<String, String> {
        let Ok(client) = self.stage.connect(node).await else {
            return Ok(format!("{node} does not export the volume any more"));
        };
        match client.write(super::SCRATCH_AT, vec![0; 4096].into()).await {
            Err(error) => Ok(format!("a write on {node} fails: {error}")),
            Ok(()) => Err(format!("a write on {node} was accepted")),
        }
    }

    async fn epilogue(&mut self, report: &mut Report<'_>, lost: &Lost) -> Result<(), UserError> {
        report.act("All replicas, read from disk at one index");
        report.step("verifying all replicas");
        let verified = self.stage.verify().await?;
        report.check("the replicas are equal", acts::equal(&verified));
        let lost = lost.zone.clone();
        let (zone, _) = self.beside_a_replica(report, |replica| replica.zone == lost).await?;
        report.step(format!("reading in {zone}"));
        self.check_content(report).await;
        self.stage.detach().await
    }
}

/// Whether a replica was healed by chunks, with little more sent than what had changed.
fn sent_enough(replica: Option<&pb::Replica>, distinct: u64) -> Result<String, String> {
    let replica = replica.ok_or("the zone has no replica")?;
    let (road, sent) = (replica.healed_by.as_str(), replica.healed_bytes);
    if road != "chunks" {
        return Err(format!("the log was purged, yet it was healed by '{road}'"));
    }
    let percent = sent * 100 / distinct.max(1);
    let text = format!("{} sent for {} that changed, {percent} %", ByteSize(sent), ByteSize(distinct));
    if percent <= SENT_PERCENT_MAX { Ok(text) } else { Err(text) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replica(road: &str, sent: u64) -> pb::Replica {
        pb::Replica { healed_by: road.into(), healed_bytes: sent, ..Default::default() }
    }

    #[test]
    fn a_heal_that_copies_everything_or_used_a_log_that_is_gone_is_noticed() {
        assert!(sent_enough(Some(&replica("chunks", 1050)), 1000).is_ok());
        assert!(sent_enough(Some(&replica("chunks", 1200)), 1000).is_err(), "more than what changed");
        assert!(sent_enough(Some(&replica("log", 1000)), 1000).is_err());
        assert!(sent_enough(Some(&replica("", 0)), 1000).is_err(), "nothing healed it");
        assert!(sent_enough(None, 1000).is_err());
    }
}
