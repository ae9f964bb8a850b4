//! Carries out forced recoveries (INV-RECOVER, decisions 0155 and 0156), lets what is left of a former group rest when it
//! comes back, and gives a recovered volume its copies again.

use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::future::join_all;
use holdfast_protocol::catalog::recovery::{Heard, may_recover, order_of, revision_of_seals, source_of};
use holdfast_protocol::catalog::{
    CatalogCommand, CatalogState, Placed, Quarantined, Recovery, ReplicaPhase, ReplicaRecord, VolumePhase,
    VolumeRecord,
};
use holdfast_protocol::command::VolumeCommand;
use holdfast_protocol::placement;
use holdfast_replica::administration::{ShardRequest, StoreReport};
use holdfast_replica::messages::{DataReply, DataRequest, ReplicaReport};
use holdfast_store::ReplicaIdentity;
use holdfast_store::recovery_file::Order;
use holdfast_types::{ReplicaId, StoreId, Term};
use holdfast_wire::rpc::Rpc;

use crate::member::{AnswerError, Member};
use crate::reconciler::{Step, retry_later};
use crate::volumes::{self, Reports, StoreReports};

/// How long a replica that goes on alone may take to lead and to apply what it has.
const ALONE: Duration = Duration::from_secs(20);
/// How long it may take for one look at it.
const LOOK: Duration = Duration::from_secs(2);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(50);

/// What is heard of every replica of a volume now, from itself and from its store. A store that answers and cannot tell
/// yet, since it is loading, counts as one that has the replica.
pub async fn heard(rpc: &Rpc, record: &VolumeRecord, reports: &Reports) -> BTreeMap<ReplicaId, Heard> {
    let asked = record.replicas.iter().map(|replica| async move {
        let told = match reports.get(&replica.id) {
            Some(Ok(report)) => of_replica(report),
            _ => of_store(rpc, record, replica).await,
        };
        (replica.id, told)
    });
    join_all(asked).await.into_iter().collect()
}

/// Whether a volume can go on from a replica that says this of itself: it runs, or only waits for others, or for somebody to
/// decide between two recoveries.
pub fn may_go_on(report: &ReplicaReport) -> bool {
    !report.is_damaged && (report.fault.is_empty() || report.repairing || report.is_halted)
}

fn of_replica(report: &ReplicaReport) -> Heard {
    let is_fit = may_go_on(report);
    Heard {
        lives: true,
        unfit: if is_fit { String::new() } else { format!("it does not run: {}", report.fault) },
        hears_leader: report.hears_leader,
        is_blank: report.last_log.0 == 0 && report.checkpoint.0 == 0,
        leads: report.is_leader && report.has_quorum,
        voters: report.voters.clone(),
        settled: report.settled_membership,
    }
}

/// Of a replica that does not answer by itself.
async fn of_store(rpc: &Rpc, record: &VolumeRecord, replica: &ReplicaRecord) -> Heard {
    let id = ReplicaIdentity { group: record.group, replica: replica.id };
    let unfit = match volumes::store_answer(rpc, replica.store).await {
        None => return Heard::default(),
        Some(Ok(report)) if went_on(record, replica.id, &report) => {
            "it goes on as another group: another catalog has recovered the volume".to_owned()
        }
        Some(Ok(report)) if !report.replicas.iter().any(|(_, other, _)| *other == id) => {
            return Heard::default();
        }
        Some(Ok(_)) => "its store answers, and the replica does not: ask again".to_owned(),
        Some(Err(why)) => format!("its store answers, and cannot tell of it yet: {why}"),
    };
    Heard { lives: true, unfit, ..Heard::default() }
}

/// Whether a replica runs there as a group that the record knows nothing of: a catalog that was put back to before, or of
/// which there are two, does not know that the volume was recovered.
fn went_on(record: &VolumeRecord, replica: ReplicaId, report: &StoreReport) -> bool {
    let under_way = record.recovery.as_ref().map(|recovery| recovery.group);
    let is_known = |group| {
        group == record.group
            || under_way == Some(group)
            || record.quarantined.iter().any(|kept| (kept.group, kept.replica) == (group, replica))
    };
    let mut there = report.replicas.iter();
    there.any(|(volume, id, _)| *volume == record.id && id.replica == replica && !is_known(id.group))
}

/// Whether another catalog has recovered the volume from what this one's recovery left, and that has not halted yet.
fn is_rival(record: &VolumeRecord, kept: &Quarantined, report: &StoreReport) -> bool {
    let by = kept.by.to_string();
    let halted = |fault: &str| fault.contains(&by);
    let mut there = report.replicas.iter();
    went_on(record, kept.replica, report)
        && !there.any(|(_, id, fault)| id.replica == kept.replica && halted(fault))
}

fn order(record: &VolumeRecord) -> Option<Order> {
    order_of(record).map(|(number, id)| Order { number, id })
}

impl Member {
    /// A step of a recovery that is under way.
    pub(crate) async fn recover(&self, record: &VolumeRecord) -> Result<Step, AnswerError> {
        let (Some(recovery), Some(order)) = (&record.recovery, order(record)) else { return Ok(Step::Rest) };
        let (id, revision) = (record.id, record.revision);
        if !recovery.sealing {
            let reports = volumes::replica_reports(&self.rpc, record).await;
            let heard = heard(&self.rpc, record, &reports).await;
            if let Err(error) = may_recover(record, &recovery.survivors, &heard) {
                tracing::warn!(volume = record.spec.name, recovery = %recovery.id, %error, "a recovery is called off");
                self.apply(&CatalogCommand::RecoveryAbandoned { id, revision, kept: false }).await?;
                return Err(error.into());
            }
            self.apply(&CatalogCommand::RecoverySealing { id, revision }).await?;
            return Ok(Step::Progress);
        }
        let (source, store) = match already(&self.rpc, record, recovery).await {
            Some(found) => found,
            None => self.take_over(record, recovery, order).await?,
        };
        let report = alone(&self.rpc, recovery, store).await?;
        self.let_go(record, recovery, store, &report).await?;
        self.apply(&CatalogCommand::VolumeRecovered { id, revision, source }).await?;
        tracing::warn!(volume = record.spec.name, recovery = %recovery.id, from = %source, "a volume goes on from a survivor");
        Ok(Step::Progress)
    }

    /// Seals every survivor, and lets the one go on that has most.
    async fn take_over(
        &self,
        record: &VolumeRecord,
        recovery: &Recovery,
        order: Order,
    ) -> Result<(ReplicaId, StoreId), AnswerError> {
        let survivors: Vec<&ReplicaRecord> =
            record.replicas.iter().filter(|replica| recovery.survivors.contains(&replica.id)).collect();
        let is_any_sealed = self.look_again(record, recovery, order, &survivors).await?;
        let revision = revision_of_seals(record, is_any_sealed);
        let sealed = survivors.iter().map(|replica| async {
            let id = ReplicaIdentity { group: record.group, replica: replica.id };
            let seal = ShardRequest::Seal { volume: record.id, id, order, revision };
            volumes::shard(&self.rpc, replica.store, &seal).await
        });
        for result in join_all(sealed).await {
            result?;
        }
        // Nothing of them changes any more.
        let reports = volumes::replica_reports(&self.rpc, record).await;
        if volumes::leader_of(&reports).is_some() {
            return Err(retry_later("a replica of the former group leads: stop its node, or cut it off"));
        }
        let (mut ends, mut above) = (Vec::new(), Term(0));
        for replica in &survivors {
            let Some(Ok(report)) = reports.get(&replica.id) else {
                return Err(retry_later(format!("survivor {} does not answer", replica.id)));
            };
            above = above.max(report.term);
            if !replica.witness {
                ends.push((replica.id, report.last_term, report.last_log));
            }
        }
        let source = source_of(&ends).ok_or_else(|| retry_later("no survivor holds data"))?;
        let at = survivors.iter().find(|replica| replica.id == source);
        let store = at.map(|replica| replica.store).ok_or_else(|| retry_later("no survivor holds data"))?;
        let id = ReplicaIdentity { group: record.group, replica: source };
        let take_over = ShardRequest::TakeOver { id, group: recovery.group, order, above };
        volumes::shard(&self.rpc, store, &take_over).await?;
        Ok((source, store))
    }

    /// INV-RECOVER: while nobody was sealed yet, somebody may have come back. Then the recovery is called off, once every
    /// survivor has noted that a request to seal it is of before; one that is sealed does not. Whether one is sealed.
    async fn look_again(
        &self,
        record: &VolumeRecord,
        recovery: &Recovery,
        order: Order,
        survivors: &[&ReplicaRecord],
    ) -> Result<bool, AnswerError> {
        if self.is_any_sealed(record, order, survivors).await? {
            return Ok(true);
        }
        let reports = volumes::replica_reports(&self.rpc, record).await;
        let heard = heard(&self.rpc, record, &reports).await;
        let Err(error) = may_recover(record, &recovery.survivors, &heard) else { return Ok(false) };
        for replica in survivors {
            let id = ReplicaIdentity { group: record.group, replica: replica.id };
            // What is decided once this is called off is on a later revision.
            let keep = ShardRequest::Keep { id, revision: record.revision + 1 };
            volumes::shard(&self.rpc, replica.store, &keep).await?;
        }
        if self.is_any_sealed(record, order, survivors).await? {
            return Ok(true);
        }
        tracing::warn!(volume = record.spec.name, recovery = %recovery.id, %error, "a recovery is called off");
        let (id, revision) = (record.id, record.revision);
        self.apply(&CatalogCommand::RecoveryAbandoned { id, revision, kept: true }).await?;
        Err(error.into())
    }

    async fn is_any_sealed(
        &self,
        record: &VolumeRecord,
        order: Order,
        survivors: &[&ReplicaRecord],
    ) -> Result<bool, AnswerError> {
        for replica in survivors {
            let id = ReplicaIdentity { group: record.group, replica: replica.id };
            let report = volumes::shard(&self.rpc, replica.store, &ShardRequest::Report).await?;
            let sealed = report.map(|report| report.sealed).unwrap_or_default();
            if sealed.iter().any(|sealed| sealed.id == id && sealed.order == order) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Ends the attachment that there was, under a new epoch; its holder cannot confirm it. And gives the volume the size
    /// that it was told to have.
    async fn let_go(
        &self,
        record: &VolumeRecord,
        recovery: &Recovery,
        store: StoreId,
        report: &ReplicaReport,
    ) -> Result<(), AnswerError> {
        if !report.holder.is_empty() {
            let detach = VolumeCommand::Detach { epoch: report.epoch, force: true, confirmed: false };
            volumes::control(&self.rpc, recovery.group, &[store], &detach, LOOK).await?;
        }
        if report.size < record.spec.size.0 {
            let resize = VolumeCommand::Resize { size: record.spec.size };
            volumes::control(&self.rpc, recovery.group, &[store], &resize, LOOK).await?;
        }
        Ok(())
    }

    /// INV-RECOVER: what is left of a former group is sealed where it turns up. Where it goes on for another recovery of
    /// the same number it halts instead, with both named.
    pub(crate) async fn quarantine(&self, state: &CatalogState, reports: &StoreReports) {
        for record in state.volumes.values() {
            for kept in &record.quarantined {
                let Some(report) = reports.get(&kept.store) else { continue };
                let id = ReplicaIdentity { group: kept.group, replica: kept.replica };
                let stands = report.replicas.iter().any(|(_, other, _)| *other == id);
                let is_sealed = report.sealed.iter().any(|sealed| sealed.id == id);
                if is_sealed || !(stands || is_rival(record, kept, report)) {
                    continue;
                }
                let order = Order { number: kept.number, id: kept.by };
                let seal = ShardRequest::Seal { volume: record.id, id, order, revision: record.revision };
                match volumes::shard(&self.rpc, kept.store, &seal).await {
                    Ok(_) => {
                        tracing::warn!(volume = record.spec.name, replica = %kept.replica, "a replica of a \
                        former group is back, and rests")
                    }
                    Err(error) => {
                        tracing::error!(volume = record.spec.name, replica = %kept.replica, %error, "a replica of a \
                            former group is back, and is not sealed");
                    }
                }
            }
        }
    }

    /// Gives a recovered volume the copies that it is to have, one after the other.
    pub(crate) async fn grow_back(
        &self,
        record: &VolumeRecord,
        state: &CatalogState,
        reports: &StoreReports,
    ) -> Result<(), AnswerError> {
        let is_busy = record.replicas.iter().any(|replica| replica.phase == ReplicaPhase::Joining);
        if record.incarnation.is_first() || record.phase != VolumePhase::Ready || is_busy {
            return Ok(());
        }
        let staying = || record.replicas.iter().filter(|replica| replica.phase != ReplicaPhase::Leaving);
        let placed: Vec<Placed> = staying().map(ReplicaRecord::placed).collect();
        let mut candidates = volumes::candidates(state, reports);
        let wanted = placement::voters(&record.spec)?;
        let witnesses = placement::witnesses(&record.spec, &candidates)?;
        let have = placed.iter().filter(|placed| placed.witness).count();
        let witness = match (placed.len() - have, have) {
            (data, _) if data < wanted - witnesses => false,
            (_, have) if have < witnesses => true,
            _ => return Ok(()),
        };
        candidates.retain(|candidate| !record.replicas.iter().any(|other| other.store == candidate.store));
        let placed = placement::place_one(&record.spec, &candidates, &placed, witness)?;
        tracing::warn!(volume = record.spec.name, to = %placed.location.node, "a recovered volume gets a copy");
        let (id, revision) = (record.id, record.revision);
        self.apply(&CatalogCommand::AddReplica { id, revision, placed }).await?;
        Ok(())
    }

    /// Removes what is left of a deleted volume's former groups. Nobody waits for a dead node.
    pub(crate) async fn remove_quarantined(&self, record: &VolumeRecord) -> Result<Step, AnswerError> {
        for kept in &record.quarantined {
            let (group, replica) = (kept.group, kept.replica);
            let id = ReplicaIdentity { group, replica };
            let destroy = ShardRequest::Destroy { id, revision: record.revision };
            match volumes::shard(&self.rpc, kept.store, &destroy).await {
                Ok(_) => {
                    let (id, revision) = (record.id, record.revision);
                    self.apply(&CatalogCommand::DropQuarantined { id, revision, group, replica }).await?;
                    return Ok(Step::Progress);
                }
                Err(error) => {
                    tracing::info!(volume = record.spec.name, %error, "what is left of a former group stays for now");
                }
            }
        }
        Ok(Step::Rest)
    }
}

/// Who goes on already: another leader of the catalog may have come so far.
async fn already(rpc: &Rpc, record: &VolumeRecord, recovery: &Recovery) -> Option<(ReplicaId, StoreId)> {
    for replica in record.replicas.iter().filter(|replica| recovery.survivors.contains(&replica.id)) {
        if let Some(report) = look(rpc, recovery, replica.store).await
            && report.replica == replica.id
        {
            return Some((replica.id, replica.store));
        }
    }
    None
}

async fn look(rpc: &Rpc, recovery: &Recovery, store: StoreId) -> Option<ReplicaReport> {
    let request = DataRequest::Report { group: recovery.group };
    match volumes::ask(rpc, store, &request, LOOK).await {
        Ok(DataReply::Report(report)) => Some(*report),
        _ => None,
    }
}

/// Ends when the replica leads alone and has applied everything that it has.
async fn alone(rpc: &Rpc, recovery: &Recovery, store: StoreId) -> Result<ReplicaReport, AnswerError> {
    let led = async {
        loop {
            if let Some(report) = look(rpc, recovery, store).await
                && report.is_leader
                && report.has_quorum
                && report.applied == report.last_log
            {
                return report;
            }
            holdfast_env::sleep(PAUSE).await;
        }
    };
    let led = holdfast_env::timeout(ALONE, led).await;
    led.map_err(|_| retry_later("the survivor does not lead alone yet"))
}

#[cfg(test)]
mod tests {
    use holdfast_store::recovery_file::Barred;
    use holdfast_types::{
        AccessFrom, ByteSize, GroupId, Location, OnQuorumLoss, ReadPolicy, RecoveryId, Survive, TimersPolicy,
        VolumeId, VolumeSpec,
    };

    use super::*;

    fn spec() -> VolumeSpec {
        VolumeSpec {
            name: "a".into(),
            size: ByteSize(1 << 20),
            survive: Survive::Zone,
            replicas: None,
            allowed: Vec::new(),
            preferred: Vec::new(),
            on_quorum_loss: OnQuorumLoss::Suspend,
            read_policy: ReadPolicy::Nearest,
            access_from: AccessFrom::Anywhere,
            timers: TimersPolicy::Auto,
            snapshot_quota: None,
        }
    }

    #[test]
    fn a_record_of_before_there_were_recoveries_is_of_the_first_incarnation() {
        let spec = spec();
        let (id, group) = (VolumeId(7), GroupId(8));
        let json = serde_json::json!({"id": id, "group": group, "spec": spec, "parameters": {}, "first_size": 1 << 20,
            "phase": "ready", "replicas": [], "published": {}, "revision": 3});
        let read: VolumeRecord = serde_json::from_value(json.clone()).expect("is read");
        assert!(read.incarnation.is_first() && read.recovery.is_none() && read.quarantined.is_empty());
        assert_eq!(serde_json::to_value(&read).expect("is written"), json, "and written as before");
    }

    fn there(group: u128, replica: u64, fault: &str) -> StoreReport {
        let id = ReplicaIdentity { group: GroupId(group), replica: ReplicaId(replica) };
        StoreReport { replicas: vec![(VolumeId(7), id, fault.into())], ..StoreReport::default() }
    }

    /// Group 8 was replaced by group 80; replica 2 was left behind.
    fn recovered() -> VolumeRecord {
        let json = serde_json::json!({"id": VolumeId(7), "group": GroupId(80), "spec": spec(), "parameters": {},
            "first_size": 1 << 20, "phase": "ready", "replicas": [], "published": {}, "revision": 3});
        let mut record: VolumeRecord = serde_json::from_value(json).expect("is read");
        record.quarantined.push(Quarantined {
            group: GroupId(8),
            replica: ReplicaId(2),
            store: StoreId(2),
            location: Location::default(),
            number: 2,
            by: RecoveryId(5),
        });
        record
    }

    #[test]
    fn what_goes_on_for_another_catalog_is_heard_and_halted_once() {
        let record = recovered();
        let kept = &record.quarantined[0];
        assert!(went_on(&record, ReplicaId(2), &there(99, 2, "")), "a group that the record does not know");
        assert!(
            !went_on(&record, ReplicaId(2), &there(80, 2, ""))
                && !went_on(&record, ReplicaId(2), &there(8, 2, ""))
        );
        assert!(!went_on(&record, ReplicaId(2), &there(99, 3, "")), "another replica");
        let mut other = there(99, 2, "");
        other.replicas[0].0 = VolumeId(70);
        assert!(!went_on(&record, ReplicaId(2), &other), "another volume");
        let mut under_way = record.clone();
        under_way.recovery = Some(Recovery {
            id: RecoveryId(6),
            group: GroupId(99),
            survivors: vec![ReplicaId(2)],
            sealing: true,
        });
        assert!(!went_on(&under_way, ReplicaId(2), &there(99, 2, "")), "its own recovery");
        assert!(is_rival(&record, kept, &there(99, 2, "")));
        let rivals =
            Barred::Rivals { replica: ReplicaId(2), ours: RecoveryId(6), theirs: kept.by }.to_string();
        assert!(!is_rival(&record, kept, &there(99, 2, &rivals)), "it has halted");
        let by_another =
            Barred::Rivals { replica: ReplicaId(2), ours: RecoveryId(6), theirs: RecoveryId(7) }.to_string();
        assert!(is_rival(&record, kept, &there(99, 2, &by_another)), "it does not know of this one yet");
    }
}
