//! Forced recovery on one store: a volume that has lost its majority goes on from one survivor (INV-RECOVER, decision
//! 0155).
//!
//! First every survivor is *sealed*: it runs no more as a replica of the former group, and notes so before anything else.
//! So nobody's log changes while it is looked at which of them ends last. That one is *taken over*: its files stay as they
//! are, its log gets one more entry, by which it alone votes, in a term above all that were seen, and from then on it runs
//! as the only replica of a new group. What its log holds beyond what was committed is committed by that: an acknowledged
//! write may be known to this replica only. Since the group is another one, nothing that a replica or a session of the
//! former group says reaches it, and nothing needs to be compared: every call names its group.
//!
//! What is left of the former group is sealed, too, when it comes back, by whoever notices first: the replica itself,
//! which asks the others before it runs, or the reconciler. It is kept and served to nobody.

use std::rc::Rc;

use holdfast_protocol::planted::is_planted;
use holdfast_store::journal::GroupLog;
use holdfast_store::recovery_file::{Barred, Order, RecoveryError};
use holdfast_store::volume::{Manifest, VolumeData};
use holdfast_store::{EntryId, ReplicaIdentity, StoreError};
use holdfast_types::{GroupId, LogIndex, Term, VolumeId};
use tokio::sync::oneshot;

use crate::codec;
use crate::config::Peer;
use crate::group::GroupError;
use crate::host::{Faulty, Host, Standing, reaches};

impl From<Barred> for GroupError {
    fn from(barred: Barred) -> Self {
        Self::Refused(barred.to_string())
    }
}

impl From<RecoveryError> for GroupError {
    fn from(error: RecoveryError) -> Self {
        match error {
            RecoveryError::Barred(barred) => barred.into(),
            RecoveryError::Store(error) => error.into(),
        }
    }
}

/// A replica that was sealed, or has halted between two recoveries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SealedReplica {
    /// Who it is, by the group that it was of.
    pub id: ReplicaIdentity,
    /// The recovery that sealed it.
    pub order: Order,
    /// The last entry of its log.
    pub last: EntryId,
}

fn end_of(log: &GroupLog) -> EntryId {
    log.last().or(log.purged()).unwrap_or_default()
}

impl Host {
    /// The replicas here that were sealed.
    pub fn sealed(&self) -> Vec<SealedReplica> {
        let lines = self.recoveries.lines().into_iter();
        let sealed = lines.filter_map(|(id, line)| {
            line.sealed.map(|sealed| SealedReplica { id, order: sealed.order, last: sealed.last })
        });
        sealed.collect()
    }

    /// INV-RECOVER: ends a replica of a group that a recovery replaces, for good and durably; the last entry of its log.
    /// Again for the same recovery is fine; for another one it is refused, and both are named.
    pub async fn seal(
        &self,
        id: ReplicaIdentity,
        volume: VolumeId,
        order: Order,
        revision: u64,
    ) -> Result<EntryId, GroupError> {
        self.check_loaded()?;
        let turn = self.turn(id.group);
        let _one_at_a_time = turn.lock().await;
        if self.recoveries.knows(id) && self.recoveries.superseded(id.group).is_some() {
            let noted = self.recoveries.seal(id, order, EntryId::default()).await;
            self.halt_rivals().await;
            return Ok(noted?);
        }
        // The recovery was called off meanwhile.
        self.departures.may_end(id, revision)?;
        if self.standing_volume(id).is_none() {
            let gone =
                format!("replica {} does not stand here: there is nothing to recover from", id.replica);
            return Err(GroupError::Refused(gone));
        }
        self.check_not_starting(id)?;
        let by = order.id;
        let data = self.volume(id.group).map(|running| running.data().clone());
        self.stop_one(id).await;
        if let Some(data) = data {
            // Whoever goes on in these files opens them anew: no pass of the cleaner or of a healer may still be in them.
            data.retire().await;
        }
        self.rest(id, volume, format!("recovery {by} ends it"), true);
        let last = match self.log_of(id) {
            Some(log) => {
                // What is in it must not change any more, nor depend on what is not durable yet.
                log.prove_writable().await?;
                end_of(&log)
            }
            None => EntryId::default(),
        };
        let noted = self.with_the_reserve(|| self.note_sealed(id, order, last)).await?;
        let last = noted?;
        let why = Barred::Superseded { replica: id.replica, number: order.number, by };
        tracing::warn!(group = %id.group, replica = %id.replica, recovery = %by, last = last.index.0,
            "a replica is sealed: its group is replaced by a recovery");
        self.rest(id, volume, why.to_string(), false);
        Ok(last)
    }

    async fn note_sealed(
        &self,
        id: ReplicaIdentity,
        order: Order,
        last: EntryId,
    ) -> Result<Result<EntryId, Barred>, StoreError> {
        match self.recoveries.seal(id, order, last).await {
            Ok(last) => Ok(Ok(last)),
            Err(RecoveryError::Barred(barred)) => Ok(Err(barred)),
            Err(RecoveryError::Store(error)) => Err(error),
        }
    }

    fn rest(&self, id: ReplicaIdentity, volume: VolumeId, why: String, repairing: bool) {
        self.set_faulty(id.group, Some(Faulty { id, volume, why, repairing }));
    }

    /// What two recoveries have both taken runs no more.
    async fn halt_rivals(&self) {
        for (id, volume) in self.volumes().into_iter().map(|(volume, running)| (running.group().id(), volume))
        {
            if let Err(rivals) = self.recoveries.may_run(self.recoveries.files_of(id)) {
                tracing::error!(group = %id.group, replica = %id.replica, %rivals, "a replica halts");
                self.stop_one(id).await;
                self.rest(id, volume, rivals.to_string(), false);
            }
        }
    }

    /// INV-RECOVER: lets a replica that was sealed for this recovery go on as the only one of a new group, with all that
    /// its log holds. Again for the same recovery is fine.
    pub async fn take_over(
        self: &Rc<Self>,
        id: ReplicaIdentity,
        group: GroupId,
        order: Order,
        above: Term,
    ) -> Result<(), GroupError> {
        self.check_loaded()?;
        // What goes on is another group: nothing that the former one's replicas say may reach it.
        if group == id.group && !is_planted("recover-without-incarnation") {
            return Err(GroupError::Refused(
                "a volume goes on as a group of its own: draw another id".into(),
            ));
        }
        let turn = self.turn(id.group);
        let _one_at_a_time = turn.lock().await;
        // It may run as that already, or be about to: then this request is an old one. Groups follow each other, so whoever
        // takes two turns takes them in that order.
        let next_turn = (group != id.group).then(|| self.turn(group));
        let _neither_of_both = match &next_turn {
            Some(turn) => Some(turn.lock().await),
            None => None,
        };
        let next = ReplicaIdentity { group, ..id };
        self.check_not_starting(next)?;
        if self.volume(group).is_some_and(|running| running.group().id() == next) {
            return Ok(());
        }
        let files = self.recoveries.files_of(id);
        let log = self.journal().group(files).ok_or_else(|| not_from(id, "its log is gone"))?;
        let manifest = self.manifest_of(files).await?;
        if self.recoveries.may_run(files) != Ok(next) {
            self.may_lead_on(id, &log, &manifest)?;
            let sealed = self.sealed().into_iter().find(|sealed| sealed.id == id && sealed.order == order);
            if let Some(sealed) = sealed {
                self.begin_anew(id, &log, &manifest, sealed.last, above).await?;
            }
            // Refuses one that was sealed for another recovery, or for none.
            self.recoveries.take_over(id, group, order).await?;
            tracing::warn!(group = %id.group, replica = %id.replica, recovery = %order.id, to = %group,
                "a volume goes on from this replica alone");
        }
        // INV-RECOVER: whatever was said above, this is asked right before it runs.
        let runs_as = self.recoveries.may_run(files)?;
        if runs_as != next {
            let why = format!("replica {} goes on as another group by now", id.replica);
            return Err(GroupError::Refused(why));
        }
        self.stop_one(id).await;
        self.stop_one(next).await;
        self.remember(next).await?;
        let volume = manifest.identity.volume;
        let started = self.open_and_run(&Standing::Data(manifest), next, log).await;
        started.map(drop).map_err(|why| {
            tracing::error!(group = %group, replica = %id.replica, %why, "a replica does not run");
            self.rest(next, volume, why.clone(), false);
            GroupError::Stopped(why)
        })
    }

    async fn manifest_of(&self, files: ReplicaIdentity) -> Result<Manifest, GroupError> {
        let all = VolumeData::list(self.directory().clone()).await?;
        let found = all.into_iter().find(|manifest| manifest.identity.id == files);
        found.ok_or_else(|| not_from(files, "it holds no data"))
    }

    /// Everything that its log holds is there to be applied.
    fn may_lead_on(
        &self,
        id: ReplicaIdentity,
        log: &GroupLog,
        manifest: &Manifest,
    ) -> Result<(), GroupError> {
        if let Some(why) = self.unknown_log(self.recoveries.files_of(id)) {
            return Err(not_from(id, &format!("part of its log is unreadable ({why})")));
        }
        let damaged = log.faulty().len();
        if damaged > 0 {
            return Err(not_from(id, &format!("{damaged} entries of its log cannot be read")));
        }
        reaches(log, &manifest.checkpoint).map_err(|why| not_from(id, &why))
    }

    /// Writes the entry by which this replica alone votes, unless an earlier try has.
    async fn begin_anew(
        &self,
        id: ReplicaIdentity,
        log: &GroupLog,
        manifest: &Manifest,
        sealed: EntryId,
        above: Term,
    ) -> Result<(), GroupError> {
        let peer = Peer::data(self.identity().store);
        let after = sealed.index.max(manifest.checkpoint.id.index);
        if log.last().is_some_and(|last| last.index > sealed.index) {
            if codec::begins_alone(log, LogIndex(after.0 + 1), id.replica, peer) {
                return Ok(());
            }
            return Err(not_from(id, "its log has changed since it was sealed"));
        }
        let voted = log.vote().as_deref().and_then(codec::vote_term).unwrap_or_default();
        let term = voted.max(sealed.term).max(manifest.checkpoint.id.term).max(above).next();
        let entry = EntryId { term, leader: id.replica, index: LogIndex(after.0 + 1) };
        let alone = codec::sole_voter(entry, peer);
        let alone = alone.map_err(|error| GroupError::Stopped(error.to_string()))?;
        log.set_parked(false);
        log.save_vote(codec::vote_for(term, id.replica)).await?;
        let (done, written) = oneshot::channel();
        // Whoever waits for it is here.
        log.append(vec![alone], Box::new(move |result| drop(done.send(result))));
        written.await.map_err(|_| GroupError::Stopped("the journal has stopped".into()))??;
        Ok(())
    }
}

fn not_from(id: ReplicaIdentity, why: &str) -> GroupError {
    GroupError::Refused(format!(
        "the volume cannot go on from replica {}: {why}. Name another survivor",
        id.replica
    ))
}
