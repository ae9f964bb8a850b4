//! Forced recovery as users ask for it: what would be lost, and then the word of somebody who accepts it.

use std::rc::Rc;

use holdfast_catalog::recovery::{heard, may_go_on};
use holdfast_catalog::volumes::{self, Reports};
use holdfast_protocol::catalog::recovery::{may_recover, recover, source_of};
use holdfast_protocol::catalog::{CatalogReply, ReplicaPhase, ReplicaRecord, VolumePhase, VolumeRecord};
use holdfast_replica::messages::ReplicaReport;
use holdfast_types::{ErrorCode, GroupId, RecoveryId, ReplicaId, UserError};

use crate::admin::pb;
use crate::operations::{CREATE_PATIENCE, PATIENCE};
use crate::shard::Shard;

/// The replicas that are meant by their ids or their nodes.
fn named(record: &VolumeRecord, survivors: &[String]) -> Result<Vec<ReplicaId>, UserError> {
    let mut found = Vec::new();
    for text in survivors {
        let is_meant = |replica: &&ReplicaRecord| {
            let by_node = replica.location.node.as_str() == text && replica.phase != ReplicaPhase::Joining;
            by_node || replica.id.to_string() == *text
        };
        let replica = record.replicas.iter().find(is_meant).ok_or_else(|| {
            let message = format!("volume {} has no replica '{text}', by id or by node", record.spec.name);
            UserError::new(ErrorCode::InvalidArgument, message)
                .hint(format!("`holdfast replica list {}` shows them", record.spec.name))
        })?;
        if !found.contains(&replica.id) {
            found.push(replica.id);
        }
    }
    Ok(found)
}

fn of(reports: &Reports, id: ReplicaId) -> Result<&ReplicaReport, &str> {
    match reports.get(&id) {
        Some(Ok(report)) => Ok(report),
        Some(Err(why)) => Err(why),
        None => Err("it was not asked"),
    }
}

/// The survivor that the volume would go on from.
fn source(record: &VolumeRecord, survivors: &[ReplicaId], reports: &Reports) -> Option<ReplicaId> {
    let data = record.data().filter(|replica| survivors.contains(&replica.id));
    let end = |replica: &ReplicaRecord| {
        let report = of(reports, replica.id).ok()?;
        Some((replica.id, report.last_term, report.last_log))
    };
    source_of(&data.filter_map(end).collect::<Vec<_>>())
}

fn shown(replica: &ReplicaRecord, reports: &Reports, survivors: &[ReplicaId]) -> pb::RecoveryReplica {
    let mut shown = pb::RecoveryReplica {
        id: replica.id.0,
        node: replica.location.node.to_string(),
        zone: replica.location.zone.clone(),
        survivor: survivors.contains(&replica.id),
        witness: replica.witness,
        ..Default::default()
    };
    let report = match of(reports, replica.id) {
        Ok(report) => report,
        Err(why) => {
            (shown.state, shown.why) = ("unreachable".into(), why.into());
            return shown;
        }
    };
    shown.state = match (may_go_on(report), report.last_log.0) {
        (false, _) => "faulty",
        (true, 0) => "blank",
        (true, _) => "answers",
    }
    .into();
    shown.why = report.fault.clone();
    shown.term = report.term.0;
    shown.last_log_term = report.last_term.0;
    shown.last_log_index = report.last_log.0;
    shown.committed_index = report.committed.0;
    shown
}

/// What may be lost, in sentences: what is known, and what nobody can know.
fn loss(
    record: &VolumeRecord,
    survivors: &[ReplicaId],
    source: Option<ReplicaId>,
    reports: &Reports,
) -> Vec<String> {
    let Some((id, report)) = source.and_then(|id| Some((id, of(reports, id).ok()?))) else {
        return vec!["No replica that holds data answers: everything would be lost.".into()];
    };
    let others: Vec<String> = record
        .replicas
        .iter()
        .filter(|replica| !survivors.contains(&replica.id))
        .map(|replica| format!("{} ({})", replica.id, replica.location.node))
        .collect();
    let mut out = vec![format!(
        "It goes on from replica {id}, whose log ends with entry {} of term {}. Whatever replicas {} acknowledged after \
         that is lost; how much that is nobody who answers can tell.",
        report.last_log,
        report.last_term,
        others.join(", ")
    )];
    if report.last_log > report.committed {
        out.push(format!(
            "Entries {} to {} of replica {id} are kept, though it does not know of each that it was acknowledged.",
            report.committed.0 + 1,
            report.last_log
        ));
    }
    if !report.fault.is_empty() {
        out.push(format!("Replica {id} does not run: {}.", report.fault));
    }
    out.push(
        "Whoever holds the volume is fenced; what is lost now and comes back later is kept and served to nobody.".into(),
    );
    out
}

impl Shard {
    /// Tells what a recovery would lose; with `accept_loss`, brings it about.
    pub(crate) async fn recover_volume(
        self: Rc<Self>,
        request: pb::RecoverVolumeRequest,
    ) -> Result<pb::RecoverVolumeReply, UserError> {
        let record = self.record(&request.name).await?;
        if request.accept_loss && request.survivors.is_empty() {
            let message = "a recovery names the replicas that the volume goes on from";
            return Err(UserError::new(ErrorCode::InvalidArgument, message)
                .hint(format!("`holdfast volume recover {}` tells which answer", request.name)));
        }
        let reports = volumes::replica_reports(&self.rpc, &record).await;
        let heard = heard(&self.rpc, &record, &reports).await;
        let answering = || {
            let lives = |replica: &&ReplicaRecord| {
                heard
                    .get(&replica.id)
                    .is_some_and(|heard| heard.lives && heard.unfit.is_empty() && !heard.is_blank)
            };
            record.replicas.iter().filter(lives).map(|replica| replica.id).collect()
        };
        let survivors = match named(&record, &request.survivors)? {
            named if named.is_empty() => answering(),
            named => named,
        };
        let source = source(&record, &survivors, &reports);
        let mut told = pb::RecoverVolumeReply {
            incarnation: record.incarnation.number.to_string(),
            replicas: record.replicas.iter().map(|replica| shown(replica, &reports, &survivors)).collect(),
            loss: loss(&record, &survivors, source, &reports),
            ..Default::default()
        };
        told.replicas.iter_mut().for_each(|replica| replica.source = Some(ReplicaId(replica.id)) == source);
        // One that is under way has asked already; its survivors are not what they were.
        let allowed = match record.phase {
            VolumePhase::Recovering => Ok(()),
            _ => record.check_ready().and_then(|()| may_recover(&record, &survivors, &heard)),
        };
        if !request.accept_loss {
            told.refused = allowed.err().map(|error| error.message).unwrap_or_default();
            return Ok(told);
        }
        allowed?;
        let now = self.carry_out_recovery(&record, survivors).await?;
        told.recovered = true;
        told.recovery = now.incarnation.recovery.to_string();
        told.incarnation = now.incarnation.number.to_string();
        let went_on = now.replicas.first().map(|replica| replica.id.0);
        told.replicas.iter_mut().for_each(|replica| replica.source = Some(replica.id) == went_on);
        Ok(told)
    }

    async fn carry_out_recovery(
        &self,
        record: &VolumeRecord,
        survivors: Vec<ReplicaId>,
    ) -> Result<VolumeRecord, UserError> {
        let ids = (RecoveryId(holdfast_env::random_u128()), GroupId(holdfast_env::random_u128()));
        let name = &record.spec.name;
        let gone = || UserError::new(ErrorCode::NotFound, format!("volume {name} is gone"));
        let begun = self.catalog.apply(recover(record, ids, survivors), PATIENCE).await?;
        let CatalogReply::Volume { record: begun } = begun else { return Err(gone()) };
        let asked = begun.recovery.as_ref().map(|recovery| recovery.id);
        let now = self.catalog.settle(record.id, CREATE_PATIENCE).await?.ok_or_else(gone)?;
        match now.phase {
            VolumePhase::Recovering => {
                let message = format!("the recovery of volume {name} is under way and has not ended yet");
                Err(UserError::new(ErrorCode::TimedOut, message)
                    .hint(format!("the reconciler goes on; `holdfast volume show {name}` tells when it has")))
            }
            _ if asked.is_some() && asked == Some(now.incarnation.recovery) => Ok(now),
            _ => {
                let message = format!("the recovery of volume {name} was called off: somebody else answers");
                Err(UserError::new(ErrorCode::Refused, message)
                    .hint(format!("`holdfast volume recover {name}` tells who")))
            }
        }
    }
}
