//! What is there, as the admin API shows it.

use std::collections::BTreeMap;

use holdfast_catalog::volumes::{self, StoreReports};
use holdfast_protocol::catalog::{
    CatalogState, NodeRecord, Quarantined, ReplicaPhase, ReplicaRecord, StoreRecord, VolumePhase,
    VolumeRecord, VolumeSource,
};
use holdfast_protocol::placement;
use holdfast_replica::administration::StoreReport;
use holdfast_replica::messages::ReplicaReport;
use holdfast_types::{NodeName, ReplicaId, StoreId, TopologyTerm, VolumeId};

use crate::admin::pb;
use crate::problems;

/// Entries that a replica may be behind and still be called healthy.
const LAG_HEALTHY: u64 = 256;
/// Bytes that an entry is taken for where the lag in bytes is estimated: the largest request.
const BYTES_PER_ENTRY: u64 = 4096;

type Reports = BTreeMap<ReplicaId, Result<ReplicaReport, String>>;

pub(crate) fn term(term: &TopologyTerm) -> pb::TopologyTerm {
    pb::TopologyTerm { region: term.region.clone(), zone: term.zone.clone(), node: term.node.clone() }
}

/// A volume with what its replicas say of themselves.
pub(crate) fn volume(record: &VolumeRecord, reports: &Reports) -> pb::Volume {
    let leader = volumes::leader_of(reports);
    let committed = leader.map_or(0, |(_, report)| report.committed.0);
    let replicas: Vec<pb::Replica> =
        record.replicas.iter().map(|at| replica(at, reports.get(&at.id), leader, committed)).collect();
    // The highest epoch that any replica has applied: only the leader's is confirmed, but nothing below counts. Of one
    // epoch the replica that has applied most: a detach that the holder confirmed ends none.
    let filling = record.phase == VolumePhase::Filling;
    let newest = reports
        .values()
        .filter_map(|report| report.as_ref().ok())
        .max_by_key(|report| (report.epoch, report.applied));
    let locations: Vec<_> = record.data().map(|at| at.location.clone()).collect();
    let source = record.source.as_ref();
    pb::Volume {
        id: record.id.to_string(),
        name: record.spec.name.clone(),
        size_bytes: record.spec.size.0,
        health: health(record, leader.map(|(_, report)| report), &replicas).into(),
        epoch: newest.map_or(0, |report| report.epoch.0),
        attached_to: newest.filter(|_| !filling).map(|report| report.holder.clone()).unwrap_or_default(),
        leader: leader
            .and_then(|(id, _)| record.replicas.iter().find(|at| at.id == id))
            .map(|at| at.location.node.to_string())
            .unwrap_or_default(),
        incarnation: record.incarnation.number.to_string(),
        recovery: match record.incarnation.is_first() {
            true => String::new(),
            false => record.incarnation.recovery.to_string(),
        },
        quarantined: record.quarantined.iter().map(quarantined).collect(),
        survive: record.spec.survive.as_str().into(),
        replicas,
        published_to: record.published.keys().map(NodeName::as_str).collect::<Vec<_>>().join(","),
        access_from: serde_json::to_value(record.spec.access_from)
            .ok()
            .and_then(|value| value.as_str().map(str::to_owned))
            .unwrap_or_default(),
        accessible: placement::accessible(&record.spec, &locations).iter().map(term).collect(),
        parameters: record.parameters.clone().into_iter().collect(),
        frontend: String::new(),
        device: String::new(),
        snapshots: leader.map_or(0, |(_, report)| report.snapshots),
        phase: match record.phase {
            VolumePhase::Creating => "creating",
            VolumePhase::Filling => "filling",
            VolumePhase::Ready => "ready",
            VolumePhase::Recovering => "recovering",
            VolumePhase::Deleting => "deleting",
        }
        .into(),
        timers: record.spec.timers.as_str().into(),
        snapshot_quota_bytes: record.spec.snapshot_quota.map_or(0, |quota| quota.0),
        heartbeat_ms: leader.map_or(0, |(_, report)| report.runs.heartbeat.as_millis() as u32),
        timers_changing: leader.is_some_and(|(_, report)| report.timers.change().is_some()),
        waits_for_room: leader.is_some_and(|(_, report)| report.waits_for_room),
        source_volume: source.map(|source| source.volume.to_string()).unwrap_or_default(),
        source_snapshot: source
            .filter(|source| !source.own)
            .map(|source| source.snapshot.to_string())
            .unwrap_or_default(),
        filled_percent: source.map_or(100, VolumeSource::percent),
        filled_by: newest.filter(|_| filling).map(|report| report.holder.clone()).unwrap_or_default(),
    }
}

fn quarantined(kept: &Quarantined) -> pb::QuarantinedReplica {
    pb::QuarantinedReplica {
        id: kept.replica.0,
        node: kept.location.node.to_string(),
        recovery: kept.by.to_string(),
    }
}

fn health(record: &VolumeRecord, leader: Option<&ReplicaReport>, replicas: &[pb::Replica]) -> &'static str {
    let Some(leader) = leader.filter(|_| record.phase == VolumePhase::Ready) else {
        return if record.phase == VolumePhase::Ready { "no-quorum" } else { "recovering" };
    };
    // A replica that has left the group is on the list until its node is there to delete it: nobody waits for that.
    let is_member = |id: ReplicaId| leader.voters.contains(&id) || leader.learners.contains(&id);
    let has_left = |at: &ReplicaRecord| at.phase == ReplicaPhase::Leaving && !is_member(at.id);
    let counted = || record.replicas.iter().zip(replicas).filter(|(at, _)| !has_left(at));
    if counted().any(|(at, _)| at.phase != ReplicaPhase::Voter) {
        return "recovering";
    }
    if counted().all(|(_, shown)| shown.state == "healthy") { "healthy" } else { "degraded" }
}

fn replica(
    at: &ReplicaRecord,
    report: Option<&Result<ReplicaReport, String>>,
    leader: Option<(ReplicaId, &ReplicaReport)>,
    committed: u64,
) -> pb::Replica {
    let mut shown = pb::Replica {
        id: at.id.0,
        node: at.location.node.to_string(),
        region: at.location.region.clone(),
        zone: at.location.zone.clone(),
        role: "voter".into(),
        state: "unreachable".into(),
        store: at.store.to_string(),
        ..Default::default()
    };
    if at.phase == ReplicaPhase::Joining {
        shown.role = "learner".into();
    }
    if at.witness {
        shown.role = "witness".into();
    }
    if at.phase == ReplicaPhase::Leaving {
        shown.state = "removing".into();
    }
    let Some(Ok(report)) = report else { return shown };
    let behind = committed.saturating_sub(report.applied.0);
    shown.state = match at.phase {
        ReplicaPhase::Leaving => "removing",
        ReplicaPhase::Joining => "rebuilding",
        ReplicaPhase::Voter if report.repairing => "repairing",
        ReplicaPhase::Voter if !report.fault.is_empty() => "faulty",
        ReplicaPhase::Voter if report.is_full => "full",
        ReplicaPhase::Voter if !report.past_budget.is_empty() => "past-budget",
        ReplicaPhase::Voter if behind > LAG_HEALTHY => "catching-up",
        ReplicaPhase::Voter => "healthy",
    }
    .into();
    if leader.is_some_and(|(id, _)| id == at.id) && !at.witness {
        shown.role = "leader".into();
    } else if report.voters.contains(&at.id) && !at.witness {
        shown.role = "voter".into();
    }
    shown.term = report.term.0;
    shown.last_log_index = report.last_log.0;
    shown.committed_index = report.committed.0;
    shown.applied_index = report.applied.0;
    shown.lag_bytes = behind * BYTES_PER_ENTRY;
    shown.used_bytes = report.used_bytes;
    shown.snapshot_bytes = report.snapshot_bytes;
    shown.allocated_bytes = report.allocated_bytes;
    shown.journal_bytes = report.journal_bytes;
    shown.purged_index = report.purged.0;
    shown.healed_by = report.healed_by.clone();
    shown.healed_bytes = report.healed_bytes;
    shown.bad_blocks = report.bad_blocks;
    shown.healed_blocks = report.healed_blocks;
    shown.scrubbed_chunks = report.scrubbed_chunks;
    shown.scrub_passes = report.scrub_passes;
    shown.since_scrub_seconds = (report.scrub_passes > 0).then_some(report.since_scrub_seconds);
    shown.unsettled_chunks = report.unsettled_chunks;
    shown.past_budget = report.past_budget.clone();
    shown
}

fn store(record: StoreRecord, report: Option<&StoreReport>) -> pb::Store {
    let mut shown = pb::Store {
        id: record.store.to_string(),
        peer_address: record.peer_address,
        directory: record.directory,
        state: "unreachable".into(),
        ..Default::default()
    };
    if let Some(report) = report {
        shown.state = if report.failed.is_empty() { "ready" } else { "failed" }.into();
        shown.total_bytes = report.total_bytes;
        shown.available_bytes = report.available_bytes;
        shown.used_bytes = report.total_bytes.saturating_sub(report.available_bytes);
        shown.journal_bytes = report.journal_bytes;
        shown.allocated_bytes = report.allocated_bytes;
        shown.blocks_bytes = report.used_bytes;
        shown.snapshot_bytes = report.snapshot_bytes;
        shown.reserve_bytes = report.reserve_bytes;
        shown.capacity_bytes = report.capacity_bytes;
        shown.replicas = report.replicas.len() as u32;
        shown.failed = report.failed.clone();
        shown.flush_us = report.flush_us;
        shown.hung_ms = report.hung_ms;
        shown.full_ms = report.full_ms;
        shown.waiting_volumes = report.waiting;
    }
    shown
}

/// A node with what its stores say of themselves. It is `degraded` while some of them serve and some do not.
pub(crate) fn node(record: &NodeRecord, reports: &StoreReports) -> pb::Node {
    let stores: Vec<pb::Store> = record
        .stores()
        .map(|known| (reports.get(&known.store), known))
        .map(|(r, known)| store(known, r))
        .collect();
    let all_are = |state: &str| stores.iter().all(|store| store.state == state);
    let state = match () {
        () if all_are("unreachable") => "unreachable",
        () if stores.iter().all(|store| store.state != "ready") => "failed",
        () if !all_are("ready") => "degraded",
        () if record.cordoned => "cordoned",
        () => "ready",
    };
    pb::Node {
        name: record.location.node.to_string(),
        region: record.location.region.clone(),
        zone: record.location.zone.clone(),
        state: state.into(),
        admin_address: record.admin.clone(),
        cordoned: record.cordoned,
        witness: record.witness,
        stores,
        last_seen: String::new(),
    }
}

/// Cluster health from its parts.
pub(crate) fn status(state: &CatalogState, reports: &StoreReports, volumes: &[pb::Volume]) -> pb::Status {
    let nodes: Vec<pb::Node> = state.nodes.values().map(|record| node(record, reports)).collect();
    let subject = |store: StoreId| problems::subject(state, store);
    let mut problems: Vec<pb::Problem> = problems::of_stores(state, &nodes);
    let mut problem = |subject: String, what: String, doing: &str| {
        problems.push(pb::Problem { subject, what, since: String::new(), doing: doing.into() });
    };
    for (store, report) in reports {
        for (_, _, why) in report.replicas.iter().filter(|(volume, _, _)| *volume == VolumeId::NIL) {
            let what = format!("the catalog's member does not run there: {why}");
            problem(subject(*store), what, "the catalog's other members replace it");
        }
        for (volume, id, why) in report.replicas.iter().filter(|(_, _, why)| !why.is_empty()) {
            if let Some(record) = state.volumes.get(volume) {
                let what = format!("replica {} on {} does not run: {why}", id.replica, subject(*store));
                let doing = match (id.group == record.group, report.repairing.contains(id)) {
                    (false, _) => {
                        "it is of before a recovery: kept and not served, until the volume is deleted"
                    }
                    (true, true) => "it runs once the others have answered",
                    (true, false) => "it is replaced",
                };
                problem(format!("volume {}", record.spec.name), what, doing);
            }
        }
    }
    problems.extend(problems::of_disks(reports, subject));
    let mut problem = |subject: String, what: String, doing: &str| {
        problems.push(pb::Problem { subject, what, since: String::new(), doing: doing.into() });
    };
    let mut counts: BTreeMap<String, u32> = BTreeMap::new();
    for volume in volumes {
        *counts.entry(volume.health.clone()).or_default() += 1;
        for replica in volume.replicas.iter().filter(|replica| replica.bad_blocks > 0) {
            let what = format!("{} blocks are bad on node {}", replica.bad_blocks, replica.node);
            let doing = "they are read elsewhere, and healed from the other replicas";
            problem(format!("volume {}", volume.name), what, doing);
        }
        for replica in volume.replicas.iter().filter(|replica| !replica.past_budget.is_empty()) {
            let what =
                format!("one full copy: the witness on node {} says: {}", replica.node, replica.past_budget);
            let doing = "the data replica that is behind catches up from the full copy, or is placed anew where it can be";
            problem(format!("volume {}", volume.name), what, doing);
        }
        // One that is being filled has nothing wrong with it.
        if volume.health != "healthy" && volume.phase != "filling" {
            let away: Vec<&str> = volume
                .replicas
                .iter()
                .filter(|replica| replica.state != "healthy")
                .map(|replica| replica.node.as_str())
                .collect();
            let doing = match volume.health.as_str() {
                "no-quorum" => "I/O waits until a majority of its replicas is back",
                _ if volume.waits_for_room => {
                    "writes wait, reads and trims go on; writes go on by themselves when room is made on the media"
                }
                _ => "the replicas heal by themselves",
            };
            let what = format!("{}: not healthy on {}", volume.health, away.join(", "));
            problem(format!("volume {}", volume.name), what, doing);
        }
    }
    let failed = volumes.iter().any(|volume| volume.health == "no-quorum");
    let health = match (failed, problems.is_empty()) {
        (true, _) => "failed",
        (false, false) => "degraded",
        (false, true) => "healthy",
    };
    pb::Status {
        health: health.into(),
        problems,
        nodes,
        volumes: counts.into_iter().collect(),
        catalog_leader: String::new(),
    }
}
