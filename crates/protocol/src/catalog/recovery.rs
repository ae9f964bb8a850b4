//! INV-RECOVER: a volume that has lost its majority for good, and somebody who accepts the loss. The recovery is written
//! down first and carried out then. Until the first survivor was sealed it may be called off; after that it is ended. While
//! it is under way another one is refused, with both ids named.

use std::collections::BTreeMap;

use holdfast_types::{
    ErrorCode, GroupId, Location, LogIndex, RecoveryId, ReplicaId, StoreId, Term, UserError, VolumeId,
};
use serde::{Deserialize, Serialize};

use super::state::refused;
use super::{
    CatalogCommand, CatalogResult, CatalogState, ReplicaPhase, ReplicaRecord, VolumePhase, VolumeRecord,
};
use crate::planted::is_planted;

/// Which life of a volume this is. A new one begins with each forced recovery.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Incarnation {
    /// Counts from 1.
    pub number: u64,
    /// The recovery that began it; [`RecoveryId::NIL`] for the first.
    pub recovery: RecoveryId,
    /// The one before; [`RecoveryId::NIL`] for the first and the second.
    pub parent: RecoveryId,
}

impl Default for Incarnation {
    fn default() -> Self {
        Self { number: 1, recovery: RecoveryId::NIL, parent: RecoveryId::NIL }
    }
}

impl Incarnation {
    /// Whether the volume was never recovered.
    pub fn is_first(&self) -> bool {
        *self == Self::default()
    }
}

/// A recovery that is under way.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Recovery {
    /// Its id.
    pub id: RecoveryId,
    /// The group as which the volume goes on.
    pub group: GroupId,
    /// The replicas that it goes on from: the one of them that has most.
    pub survivors: Vec<ReplicaId>,
    /// Survivors are being sealed: it is not called off any more.
    #[serde(default)]
    pub sealing: bool,
}

/// What is left of a group that was replaced: kept where it is, and served to nobody.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Quarantined {
    /// The group that it was of.
    pub group: GroupId,
    /// The replica.
    pub replica: ReplicaId,
    /// Its store.
    pub store: StoreId,
    /// Where that stood.
    pub location: Location,
    /// The incarnation that has replaced it.
    pub number: u64,
    /// The recovery that began that.
    pub by: RecoveryId,
}

/// What is heard of a replica before a recovery.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Heard {
    /// Its store answers and does not say that it is gone from there: it may hold what others do not.
    pub lives: bool,
    /// Why it cannot go on, although its store answers; empty if it can.
    pub unfit: String,
    /// It hears another one that takes itself for the leader. The catalog may not hear that one.
    pub hears_leader: bool,
    /// It has never been a member.
    pub is_blank: bool,
    /// It leads, with a quorum.
    pub leads: bool,
    /// Voters as it knows them.
    pub voters: Vec<ReplicaId>,
    /// No change of the voters is under way, as far as it knows.
    pub settled: bool,
}

fn listed(ids: &[ReplicaId]) -> String {
    ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// INV-RECOVER: whether a volume may go on from these survivors: only where nobody else can.
pub fn may_recover(
    record: &VolumeRecord,
    survivors: &[ReplicaId],
    heard: &BTreeMap<ReplicaId, Heard>,
) -> Result<(), UserError> {
    let name = &record.spec.name;
    let silent = Heard::default();
    let of = |id: ReplicaId| heard.get(&id).unwrap_or(&silent);
    if record.replicas.iter().any(|replica| of(replica.id).leads) {
        let message = format!("volume {name} has a leader and a quorum: there is nothing to recover");
        return Err(refused(ErrorCode::Refused, message).hint("lost replicas are replaced by themselves"));
    }
    if let Some(hearing) = record.replicas.iter().find(|replica| of(replica.id).hears_leader) {
        let message =
            format!("replica {} of volume {name} hears a leader, though none answers here", hearing.id);
        return Err(refused(ErrorCode::Refused, message).hint(
            "the volume may be in use behind a partition: heal it, or stop the nodes that are cut off",
        ));
    }
    check_survivors(record, survivors)?;
    if let Some(away) = survivors.iter().find(|id| !of(**id).lives) {
        let message = format!("survivor {away} does not answer");
        return Err(refused(ErrorCode::Refused, message)
            .hint(format!("name only replicas that answer; `holdfast volume recover {name}` shows them")));
    }
    if let Some(unfit) = survivors.iter().find(|id| !of(**id).unfit.is_empty() || of(**id).is_blank) {
        let why = if of(*unfit).is_blank { "it has never held anything" } else { &of(*unfit).unfit };
        let message = format!("the volume cannot go on from replica {unfit}: {why}");
        return Err(refused(ErrorCode::Refused, message)
            .hint(format!("`holdfast volume recover {name}` shows which replicas can")));
    }
    let excluded = record.replicas.iter().filter(|replica| !survivors.contains(&replica.id));
    let answering = excluded.filter(|replica| of(replica.id).lives && !of(replica.id).is_blank);
    if let Some(other) = answering.into_iter().next().filter(|_| !is_planted("recover-while-answered")) {
        let message = format!(
            "replica {} on node {} is not among the survivors, and answers: it may hold what they do not",
            other.id, other.location.node
        );
        return Err(refused(ErrorCode::Refused, message)
            .hint("name it as a survivor, too; or stop its node for good if it is not to go on"));
    }
    // One that does not run knows no voters: whichever does counts.
    survivors.iter().try_for_each(|id| check_minority(name, survivors, of(*id)))
}

fn check_survivors(record: &VolumeRecord, survivors: &[ReplicaId]) -> Result<(), UserError> {
    let find = |id: &ReplicaId| record.replicas.iter().find(|replica| replica.id == *id);
    if let Some(stranger) = survivors.iter().find(|id| find(id).is_none()) {
        let message = format!("volume {} has no replica {stranger}", record.spec.name);
        return Err(refused(ErrorCode::InvalidArgument, message).hint("`holdfast volume show` lists them"));
    }
    let is_data = |id: &ReplicaId| find(id).is_some_and(|replica| !replica.witness);
    if !survivors.iter().any(is_data) {
        let message = "no survivor holds data: a volume does not go on from witnesses alone";
        return Err(refused(ErrorCode::InvalidArgument, message).hint("name a replica that holds data"));
    }
    Ok(())
}

/// Those that are a majority need no recovery: they elect a leader.
fn check_minority(name: &str, survivors: &[ReplicaId], one: &Heard) -> Result<(), UserError> {
    let voting = one.voters.iter().filter(|id| survivors.contains(id)).count();
    if one.settled && voting * 2 > one.voters.len() {
        let message = format!(
            "replicas {} are a majority of the voters {} of volume {name}: they elect a leader by themselves",
            listed(survivors),
            listed(&one.voters)
        );
        return Err(refused(ErrorCode::Refused, message)
            .hint("wait; if they do not, `holdfast status` says what is wrong with them"));
    }
    Ok(())
}

/// On which revision of the volume survivors are told that they are sealed. Once one of them is, nothing calls the recovery
/// off: then also those are sealed that were told of being kept before, by whoever had not heard of it yet.
pub fn revision_of_seals(record: &VolumeRecord, is_any_sealed: bool) -> u64 {
    record.revision + u64::from(is_any_sealed)
}

/// INV-RECOVER: of the survivors that hold data, with the ends of their logs, the one that has everything of which any of
/// them knows that it was committed: whose log a majority would elect.
pub fn source_of(ends: &[(ReplicaId, Term, LogIndex)]) -> Option<ReplicaId> {
    let order = |(id, term, index): &&(ReplicaId, Term, LogIndex)| (*term, *index, std::cmp::Reverse(*id));
    let best = match is_planted("recover-from-the-shorter") {
        true => ends.iter().min_by_key(order),
        false => ends.iter().max_by_key(order),
    };
    best.map(|(id, _, _)| *id)
}

impl CatalogState {
    pub(super) fn apply_to_recovery(&mut self, command: &CatalogCommand) -> CatalogResult {
        match command {
            CatalogCommand::RecoverVolume { id, revision, recovery, group, survivors } => {
                let asked =
                    Recovery { id: *recovery, group: *group, survivors: survivors.clone(), sealing: false };
                let under_way =
                    self.volumes.get(id).and_then(|volume| volume.recovery.clone().map(|now| (now, volume)));
                if let Some((now, volume)) = under_way {
                    return again(&now, &asked, volume);
                }
                self.change(*id, Some(*revision), |volume| begin(volume, asked))
            }
            CatalogCommand::RecoverySealing { id, revision } => self.change(*id, Some(*revision), |volume| {
                under_way(volume)?.sealing = true;
                Ok(())
            }),
            CatalogCommand::RecoveryAbandoned { id, revision, kept } => {
                self.change(*id, Some(*revision), |volume| {
                    if under_way(volume)?.sealing && !kept {
                        let why = "survivors were sealed already: the recovery is ended";
                        return Err(refused(ErrorCode::Refused, why));
                    }
                    (volume.recovery, volume.phase) = (None, VolumePhase::Ready);
                    Ok(())
                })
            }
            CatalogCommand::VolumeRecovered { id, revision, source } => {
                self.change(*id, Some(*revision), |volume| end(volume, *source))
            }
            CatalogCommand::DropQuarantined { id, revision, group, replica } => {
                self.change(*id, Some(*revision), |volume| {
                    if volume.phase != VolumePhase::Deleting {
                        let why = "what was replaced is kept for as long as its volume is there";
                        return Err(refused(ErrorCode::Refused, why));
                    }
                    volume.quarantined.retain(|kept| (kept.group, kept.replica) != (*group, *replica));
                    Ok(())
                })
            }
            _ => Err(refused(ErrorCode::Internal, "the command is not one of a recovery")),
        }
    }
}

/// Another request while one is under way: the same survivors are the same recovery.
fn again(now: &Recovery, asked: &Recovery, volume: &VolumeRecord) -> CatalogResult {
    let sorted = |recovery: &Recovery| {
        let mut survivors = recovery.survivors.clone();
        survivors.sort_unstable();
        survivors
    };
    if now.id == asked.id || sorted(now) == sorted(asked) {
        return Ok(super::CatalogReply::Volume { record: Box::new(volume.clone()) });
    }
    let message = format!(
        "recovery {} of volume {} from replicas {} is under way, and recovery {} names replicas {}",
        now.id,
        volume.spec.name,
        listed(&now.survivors),
        asked.id,
        listed(&asked.survivors)
    );
    Err(refused(ErrorCode::Refused, message)
        .hint("let the first one end, then decide whether there is another"))
}

fn under_way(volume: &mut VolumeRecord) -> Result<&mut Recovery, UserError> {
    let why = format!("no recovery of volume {} is under way", volume.spec.name);
    volume.recovery.as_mut().ok_or_else(|| refused(ErrorCode::Refused, why))
}

fn begin(volume: &mut VolumeRecord, asked: Recovery) -> Result<(), UserError> {
    volume.check_ready()?;
    check_survivors(volume, &asked.survivors)?;
    if asked.group == volume.group || asked.id == RecoveryId::NIL {
        return Err(refused(ErrorCode::Internal, "a recovery needs an id and a group of its own"));
    }
    (volume.recovery, volume.phase) = (Some(asked), VolumePhase::Recovering);
    Ok(())
}

fn end(volume: &mut VolumeRecord, source: ReplicaId) -> Result<(), UserError> {
    let recovery = under_way(volume)?.clone();
    if !recovery.sealing || !recovery.survivors.contains(&source) {
        return Err(refused(ErrorCode::Refused, "the volume goes on from a survivor that was sealed"));
    }
    let number = volume.incarnation.number + 1;
    let kept = |replica: &ReplicaRecord| Quarantined {
        group: volume.group,
        replica: replica.id,
        store: replica.store,
        location: replica.location.clone(),
        number,
        by: recovery.id,
    };
    let left: Vec<Quarantined> =
        volume.replicas.iter().filter(|replica| replica.id != source).map(kept).collect();
    volume.quarantined.extend(left);
    volume.replicas.retain(|replica| replica.id == source);
    for replica in &mut volume.replicas {
        (replica.phase, replica.made) = (ReplicaPhase::Voter, true);
    }
    volume.incarnation = Incarnation { number, recovery: recovery.id, parent: volume.incarnation.recovery };
    (volume.group, volume.recovery, volume.phase) = (recovery.group, None, VolumePhase::Ready);
    Ok(())
}

/// The volume's recovery, as its stores are told of it.
pub fn order_of(record: &VolumeRecord) -> Option<(u64, RecoveryId)> {
    record.recovery.as_ref().map(|recovery| (record.incarnation.number + 1, recovery.id))
}

/// A recovery of a volume, for whoever asks for one.
pub fn recover(
    record: &VolumeRecord,
    ids: (RecoveryId, GroupId),
    survivors: Vec<ReplicaId>,
) -> CatalogCommand {
    let id: VolumeId = record.id;
    CatalogCommand::RecoverVolume { id, revision: record.revision, recovery: ids.0, group: ids.1, survivors }
}
