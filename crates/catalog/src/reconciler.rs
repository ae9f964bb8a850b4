//! Makes reality match the catalog: small idempotent steps, taken by the member that leads.
//!
//! Every decision is a catalog command that names the revision it was made on, so a leader that has lost its place
//! decides nothing. What a step does to a replica bears repetition: a new leader begins again where it cannot know.

use std::rc::{Rc, Weak};
use std::time::Duration;

use futures_util::future::join_all;
use holdfast_env::Instant;
use holdfast_protocol::catalog::{
    CatalogCommand, CatalogState, Placed, ReplicaPhase, ReplicaRecord, VolumePhase, VolumeRecord, gives_way,
    share_a_node, target_voters,
};
use holdfast_protocol::command::VolumeCommand;
use holdfast_protocol::placement;
use holdfast_replica::administration::{ShardRequest, StoreReport};
use holdfast_replica::messages::ReplicaReport;
use holdfast_store::ReplicaIdentity;
use holdfast_types::{ErrorCode, OnQuorumLoss, ReadPolicy, ReplicaId, StoreId, UserError, VolumeId};

use crate::member::{AnswerError, Member};
use crate::volumes::{self, StoreReports};

/// Between looks at everything.
const PERIOD: Duration = Duration::from_secs(1);
/// How long a new group may take to elect its first leader.
const FIRST_LEADER: Duration = Duration::from_secs(10);
/// Steps of one volume in one go.
const STEPS_MAX: usize = 32;
/// Entries that a joining replica may be behind when it becomes a voter.
const CAUGHT_UP_WITHIN: u64 = 1024;

/// What a step came to.
#[derive(PartialEq, Eq)]
pub(crate) enum Step {
    /// Something was done; look again.
    Progress,
    /// Nothing is to be done, or it needs time.
    Rest,
}

/// Whether a faulty replica may be removed to make place.
#[derive(PartialEq, Eq)]
enum GivesWay {
    /// The others vote without it.
    Now,
    /// Too few others are there.
    Later,
    /// It runs.
    Never,
}

/// Works while this member leads.
pub(crate) async fn run(member: Weak<Member>) {
    loop {
        let Some(this) = member.upgrade() else { return };
        if !this.is_leader() {
            // Whoever leads counts anew: what was seen in an earlier term says nothing of the time between.
            this.silent.borrow_mut().clear();
            this.left_at.borrow_mut().clear();
            this.timers.borrow_mut().forget();
        }
        if this.is_leader()
            && let Ok(state) = this.read().await
        {
            this.look_at_stores(&state).await;
            if let Err(AnswerError::Refused(error)) = this.look_at_seats().await {
                tracing::info!(%error, "the catalog's membership is changed later");
            }
            for record in state.volumes.values() {
                let needs_work = record.phase != VolumePhase::Ready
                    || record.replicas.iter().any(|replica| replica.phase != ReplicaPhase::Voter);
                if needs_work && let Err(AnswerError::Refused(error)) = this.settle(record.id).await {
                    tracing::info!(volume = record.spec.name, %error, "the reconciler tries again later");
                }
            }
            this.settle_snapshots(&state).await;
            this.settle_timers(&state).await;
        }
        drop(this);
        holdfast_env::sleep(PERIOD).await;
    }
}

pub(crate) fn retry_later(message: impl Into<String>) -> AnswerError {
    UserError::new(ErrorCode::Unavailable, message).hint("the reconciler goes on; ask again").into()
}

impl Member {
    /// Works on one volume until nothing is to be done or something is in the way.
    pub(crate) async fn settle(self: &Rc<Self>, id: VolumeId) -> Result<(), AnswerError> {
        let lock = self.working.borrow_mut().entry(id).or_default().clone();
        let _one_at_a_time = lock.lock().await;
        for _ in 0..STEPS_MAX {
            let Some(record) = self.machine.with_state(|state| state.volumes.get(&id).cloned()) else {
                self.working.borrow_mut().remove(&id);
                return Ok(());
            };
            if self.step(&record).await? == Step::Rest {
                return Ok(());
            }
        }
        Ok(())
    }

    async fn step(self: &Rc<Self>, record: &VolumeRecord) -> Result<Step, AnswerError> {
        match record.phase {
            VolumePhase::Creating => self.make(record).await,
            VolumePhase::Deleting => self.remove(record).await,
            VolumePhase::Filling => {
                let filled = self.fill(record).await;
                // A copy takes long: what happens to its replicas meanwhile does not wait for it.
                if matches!(filled, Ok(Step::Progress)) {
                    filled
                } else {
                    self.replicas(record).await.and(filled)
                }
            }
            VolumePhase::Ready => self.replicas(record).await,
            VolumePhase::Recovering => self.recover(record).await,
        }
    }

    /// A step with the first of its replicas that allows one: none holds the others up.
    async fn replicas(&self, record: &VolumeRecord) -> Result<Step, AnswerError> {
        let mut outcome = Ok(Step::Rest);
        let phase = |phase| record.replicas.iter().filter(move |replica| replica.phase == phase);
        for replica in phase(ReplicaPhase::Joining).chain(phase(ReplicaPhase::Leaving)) {
            let stepped = match replica.phase {
                ReplicaPhase::Joining => self.join(record, replica).await,
                _ => self.leave(record, replica).await,
            };
            match stepped {
                Ok(Step::Rest) => {}
                Err(AnswerError::Refused(error)) => outcome = Err(AnswerError::Refused(error)),
                stepped => return stepped,
            }
        }
        outcome
    }

    async fn create_replica(
        &self,
        record: &VolumeRecord,
        replica: &ReplicaRecord,
    ) -> Result<(), AnswerError> {
        let request = ShardRequest::Create {
            volume: record.id,
            id: ReplicaIdentity { group: record.group, replica: replica.id },
            size: record.first_size,
            spec_json: volumes::spec_json(record)?,
            witness: replica.witness,
        };
        volumes::shard(&self.rpc, replica.store, &request).await?;
        Ok(())
    }

    async fn make(&self, record: &VolumeRecord) -> Result<Step, AnswerError> {
        let made = record.replicas.iter().map(|replica| self.create_replica(record, replica));
        for result in join_all(made).await {
            result?;
        }
        let first = record.data().next().ok_or_else(|| retry_later("the volume has no replicas"))?;
        let voters = record.replicas.iter().map(|replica| (replica.id, replica.store)).collect();
        let witnesses = record.replicas.iter().filter(|replica| replica.witness).map(|replica| replica.id);
        let bootstrap =
            ShardRequest::Bootstrap { group: record.group, voters, witnesses: witnesses.collect() };
        volumes::shard(&self.rpc, first.store, &bootstrap).await?;
        let led = async {
            while volumes::leader_of(&volumes::replica_reports(&self.rpc, record).await).is_none() {
                holdfast_env::sleep(Duration::from_millis(20)).await;
            }
        };
        let led = holdfast_env::timeout(FIRST_LEADER, led).await;
        led.map_err(|_| retry_later("the volume's replicas have not elected a leader yet"))?;
        let spec = &record.spec;
        if spec.on_quorum_loss != OnQuorumLoss::Suspend || spec.read_policy != ReadPolicy::Nearest {
            let policy = VolumeCommand::SetPolicy {
                on_quorum_loss: spec.on_quorum_loss,
                read_policy: spec.read_policy,
            };
            volumes::control(&self.rpc, record.group, &record.stores(), &policy, FIRST_LEADER).await?;
        }
        let ready = CatalogCommand::VolumeReady { id: record.id, revision: record.revision };
        self.apply(&ready).await?;
        Ok(Step::Progress)
    }

    async fn destroy_replica(
        &self,
        record: &VolumeRecord,
        replica: &ReplicaRecord,
    ) -> Result<(), AnswerError> {
        let id = ReplicaIdentity { group: record.group, replica: replica.id };
        let destroy = ShardRequest::Destroy { id, revision: record.revision };
        volumes::shard(&self.rpc, replica.store, &destroy).await?;
        Ok(())
    }

    async fn drop_replica(&self, record: &VolumeRecord, replica: ReplicaId) -> Result<Step, AnswerError> {
        let command = CatalogCommand::DropReplica { id: record.id, revision: record.revision, replica };
        self.apply(&command).await?;
        self.left_at.borrow_mut().remove(&replica);
        Ok(Step::Progress)
    }

    /// A deletion never waits for a dead node: its replica stays on the list until the node is back.
    async fn remove(&self, record: &VolumeRecord) -> Result<Step, AnswerError> {
        if record.replicas.is_empty() && record.quarantined.is_empty() {
            let forget = CatalogCommand::ForgetVolume { id: record.id, revision: record.revision };
            self.apply(&forget).await?;
            return Ok(Step::Progress);
        }
        for replica in &record.replicas {
            match self.destroy_replica(record, replica).await {
                Ok(()) => return self.drop_replica(record, replica.id).await,
                Err(AnswerError::Refused(error)) => {
                    tracing::info!(volume = record.spec.name, %error, "a deleted replica stays for now");
                }
                Err(elsewhere) => return Err(elsewhere),
            }
        }
        self.remove_quarantined(record).await
    }

    /// The leader's store and what it reports.
    pub(crate) async fn leader(
        &self,
        record: &VolumeRecord,
    ) -> Result<(StoreId, ReplicaReport), AnswerError> {
        let reports = volumes::replica_reports(&self.rpc, record).await;
        let (id, report) =
            volumes::leader_of(&reports).ok_or_else(|| retry_later("no replica of the volume leads now"))?;
        if report.is_witness {
            return Err(retry_later("a witness leads the volume until a data replica has everything"));
        }
        let store = record.replicas.iter().find(|replica| replica.id == id).map(|replica| replica.store);
        Ok((store.ok_or_else(|| retry_later("the volume's leader is not in the catalog"))?, report.clone()))
    }

    async fn join(&self, record: &VolumeRecord, joining: &ReplicaRecord) -> Result<Step, AnswerError> {
        for old in &record.replicas {
            if old.phase == ReplicaPhase::Leaving && old.store == joining.store {
                match self.make_way(record, old).await? {
                    GivesWay::Now => {
                        self.destroy_replica(record, old).await?;
                        return self.drop_replica(record, old.id).await;
                    }
                    GivesWay::Later => return Ok(Step::Rest),
                    GivesWay::Never => return self.call_off(record, old, joining).await,
                }
            }
        }
        if !joining.made {
            self.create_replica(record, joining).await?;
            let (id, revision, replica) = (record.id, record.revision, joining.id);
            self.apply(&CatalogCommand::ReplicaMade { id, revision, replica }).await?;
            return Ok(Step::Progress);
        }
        let (store, report) = self.leader(record).await?;
        if let Some(step) = self.take_back_strays(record, &report).await? {
            return Ok(step);
        }
        let group = record.group;
        // A change that was interrupted half-way is taken up again: both configurations count until then.
        if !report.voters.contains(&joining.id) || !report.settled_membership {
            let is_learner = report.learners.contains(&joining.id);
            if !report.voters.contains(&joining.id) && !is_learner {
                let add = ShardRequest::AddLearner {
                    group,
                    replica: joining.id,
                    store: joining.store,
                    witness: joining.witness,
                };
                volumes::shard(&self.rpc, store, &add).await?;
                return Ok(Step::Progress);
            }
            let matched = report.matched.iter().find(|(id, _)| *id == joining.id).map_or(0, |(_, at)| at.0);
            if matched + CAUGHT_UP_WITHIN < report.last_log.0 || matched == 0 {
                return Ok(Step::Rest);
            }
            if !self.change_voters(record, store, &report, Some(joining.id)).await? {
                return Ok(Step::Rest);
            }
        }
        let command = CatalogCommand::SetReplica {
            id: record.id,
            revision: record.revision,
            replica: joining.id,
            phase: ReplicaPhase::Voter,
        };
        self.apply(&command).await?;
        Ok(Step::Progress)
    }

    /// INV-MEMBER: one change, of exactly the voters that it was decided on. False if it has to wait for another one.
    async fn change_voters(
        &self,
        record: &VolumeRecord,
        leader: StoreId,
        report: &ReplicaReport,
        joining: Option<ReplicaId>,
    ) -> Result<bool, AnswerError> {
        let wanted = placement::voters(&record.spec)?;
        let answers = |replica: &ReplicaRecord| self.answers(replica);
        let voters = target_voters(record, &report.voters, joining, wanted, answers);
        if joining.is_some() && share_a_node(record, &voters) {
            return Ok(false);
        }
        self.set_voters(record, leader, report, voters).await?;
        Ok(true)
    }

    fn answers(&self, replica: &ReplicaRecord) -> bool {
        !self.silent.borrow().contains_key(&replica.store)
    }

    /// A replica that is to vote and is no member of its group: a change that was decided on before it was kept came
    /// late. It joins again, with what it has. INV-MEMBER: its store hears of it first, for whoever removed it may have
    /// told the store to destroy it. INV-TERM: it is not made there if it is gone.
    async fn take_back_strays(
        &self,
        record: &VolumeRecord,
        report: &ReplicaReport,
    ) -> Result<Option<Step>, AnswerError> {
        let is_stray = |replica: &&ReplicaRecord| {
            replica.phase == ReplicaPhase::Voter && !report.voters.contains(&replica.id)
        };
        if !report.settled_membership {
            return Ok(None);
        }
        for stray in record.replicas.iter().filter(is_stray) {
            match self.take_back(record, stray).await {
                Ok(()) => return Ok(Some(Step::Progress)),
                // Others do not wait for a store that does not answer.
                Err(AnswerError::Refused(error)) => {
                    tracing::warn!(volume = record.spec.name, replica = %stray.id, %error, "it does not join again now");
                }
                Err(elsewhere) => return Err(elsewhere),
            }
        }
        Ok(None)
    }

    async fn take_back(&self, record: &VolumeRecord, stray: &ReplicaRecord) -> Result<(), AnswerError> {
        tracing::warn!(volume = record.spec.name, replica = %stray.id, "a voter is no member of its group: it joins again");
        let (id, revision, replica, phase) = (record.id, record.revision, stray.id, ReplicaPhase::Joining);
        let identity = ReplicaIdentity { group: record.group, replica };
        let keep = ShardRequest::Keep { id: identity, revision };
        match volumes::shard(&self.rpc, stray.store, &keep).await {
            Ok(_) => {}
            // It votes no more, so nothing is lost with it, and nobody waits for its turn.
            Err(error) if error.code == ErrorCode::NotFound => {
                return self.replace_in_place(record, stray).await;
            }
            Err(error) => return Err(error.into()),
        }
        let command = match stray.made {
            false => CatalogCommand::ReplicaMade { id, revision, replica },
            true => CatalogCommand::SetReplica { id, revision, replica, phase },
        };
        self.apply(&command).await?;
        Ok(())
    }

    async fn set_voters(
        &self,
        record: &VolumeRecord,
        leader: StoreId,
        report: &ReplicaReport,
        voters: Vec<ReplicaId>,
    ) -> Result<(), AnswerError> {
        let expected = report.voters.clone();
        let change = ShardRequest::ChangeVoters { group: record.group, expected, voters };
        volumes::shard(&self.rpc, leader, &change).await?;
        Ok(())
    }

    /// Has a faulty replica removed from the voters before the one that takes its place is there: what it holds may be
    /// the second copy of what was acknowledged, and once the change is committed it is not. Only while the others can
    /// commit it.
    async fn make_way(&self, record: &VolumeRecord, old: &ReplicaRecord) -> Result<GivesWay, AnswerError> {
        let reports = volumes::replica_reports(&self.rpc, record).await;
        let (leading, leader) =
            volumes::leader_of(&reports).ok_or_else(|| retry_later("no replica of the volume leads now"))?;
        if !leader.voters.contains(&old.id) {
            // One that votes no more is kept by nobody, though it runs; and it stays while that may still be undone.
            return Ok(if leader.settled_membership { GivesWay::Now } else { GivesWay::Later });
        }
        let fine = |id: ReplicaId| {
            reports.get(&id).is_some_and(|report| report.as_ref().is_ok_and(|r| r.fault.is_empty()))
        };
        if fine(old.id) {
            return Ok(GivesWay::Never);
        }
        // What a witness has and no data replica has may be on the faulty one, too.
        if leader.is_witness || !stands_without(leader, leading, old.id, fine) {
            return Ok(GivesWay::Later);
        }
        let store = record.replicas.iter().find(|replica| replica.id == leading).map(|replica| replica.store);
        let store = store.ok_or_else(|| retry_later("the volume's leader is not in the catalog"))?;
        let others = leader.voters.iter().copied().filter(|id| *id != old.id).collect();
        self.set_voters(record, store, leader, others).await?;
        Ok(GivesWay::Now)
    }

    /// The replica that was to give way runs after all.
    async fn call_off(
        &self,
        record: &VolumeRecord,
        old: &ReplicaRecord,
        joining: &ReplicaRecord,
    ) -> Result<Step, AnswerError> {
        tracing::info!(volume = record.spec.name, replica = %old.id, "the replica runs again and is kept");
        let (id, revision) = (record.id, record.revision);
        self.apply(&CatalogCommand::KeepReplica { id, revision, old: old.id, joining: joining.id }).await?;
        Ok(Step::Progress)
    }

    async fn leave(&self, record: &VolumeRecord, leaving: &ReplicaRecord) -> Result<Step, AnswerError> {
        if gives_way(record, leaving) {
            // The one that joins there sees to it.
            return Ok(Step::Rest);
        }
        let (store, report) = self.leader(record).await?;
        if let Some(step) = self.take_back_strays(record, &report).await? {
            return Ok(step);
        }
        // Nothing is destroyed by a change that may still be undone.
        if report.voters.contains(&leaving.id) || !report.settled_membership {
            // What was noted when it left before says nothing of what it has acknowledged since.
            self.left_at.borrow_mut().remove(&leaving.id);
            let wanted = placement::voters(&record.spec)?;
            let answers = |replica: &ReplicaRecord| self.answers(replica);
            if target_voters(record, &report.voters, None, wanted, answers).contains(&leaving.id) {
                let joins = record.replicas.iter().any(|replica| replica.phase == ReplicaPhase::Joining);
                let why = "a replica leaves only when enough others vote";
                return if joins { Ok(Step::Rest) } else { Err(retry_later(why)) };
            }
            self.change_voters(record, store, &report, None).await?;
            return Ok(Step::Progress);
        }
        if report.learners.contains(&leaving.id) {
            let remove = ShardRequest::RemoveLearner { group: record.group, replica: leaving.id };
            volumes::shard(&self.rpc, store, &remove).await?;
            return Ok(Step::Progress);
        }
        // It is destroyed when its node is back; nobody waits for that. And not before the others have what it had.
        if !self.answers(leaving) || !self.others_have_all(record, leaving, &report) {
            return Ok(Step::Rest);
        }
        self.destroy_replica(record, leaving).await?;
        self.drop_replica(record, leaving.id).await
    }

    /// Whether the voters that stay have everything that was in the log when this replica was first seen to vote no more:
    /// a majority of them, and beside a witness, which may have purged what the one before had, all that hold data.
    fn others_have_all(
        &self,
        record: &VolumeRecord,
        leaving: &ReplicaRecord,
        report: &ReplicaReport,
    ) -> bool {
        let noted = *self.left_at.borrow_mut().entry(leaving.id).or_insert(report.last_log);
        let has_all = |replica: &&ReplicaRecord| {
            let matched = report.matched.iter().find(|(id, _)| *id == replica.id).map_or(0, |(_, at)| at.0);
            replica.id == report.replica || matched >= noted.0
        };
        let data = || record.data().filter(|replica| report.voters.contains(&replica.id));
        let have = data().filter(has_all).count();
        let beside_a_witness = data().count() < report.voters.len();
        let wanted = if beside_a_witness { data().count() } else { report.voters.len() / 2 + 1 };
        have >= wanted
    }

    /// Notes which stores are silent, and has the replicas of lost stores and faulty replicas placed anew. INV-STORES: a
    /// node whose other stores answer has lost one store, no more and no less.
    async fn look_at_stores(self: &Rc<Self>, state: &CatalogState) {
        let reports = volumes::store_reports(&self.rpc, state).await;
        let now = Instant::now();
        let mut lost = Vec::new();
        for store in state.nodes.values().flat_map(|node| node.stores()).map(|store| store.store) {
            // A store that has stopped does not come back by itself, though its node answers.
            if reports.get(&store).is_some_and(|report| report.failed.is_empty()) {
                self.silent.borrow_mut().remove(&store);
                continue;
            }
            let since = *self.silent.borrow_mut().entry(store).or_insert(now);
            if now.since(since) >= self.options.lost_after {
                lost.push(store);
            }
        }
        let made = |record: &&VolumeRecord| matches!(record.phase, VolumePhase::Ready | VolumePhase::Filling);
        for record in state.volumes.values().filter(made) {
            if let Err(AnswerError::Refused(error)) = self.replace_one(record, &lost, state, &reports).await {
                tracing::warn!(volume = record.spec.name, %error, "a lost replica is not replaced yet");
            }
            if let Err(AnswerError::Refused(error)) = self.grow_back(record, state, &reports).await {
                tracing::warn!(volume = record.spec.name, %error, "a recovered volume does not get its copies yet");
            }
        }
        self.quarantine(state, &reports).await;
    }

    /// Has one replica of a volume placed anew that is lost or faulty; also one that was to take another's place.
    async fn replace_one(
        &self,
        record: &VolumeRecord,
        lost: &[StoreId],
        state: &CatalogState,
        reports: &StoreReports,
    ) -> Result<(), AnswerError> {
        // With one full copy left, a data replica that does not answer is lost now, if there is another place for it.
        let phase = |phase| record.replicas.iter().filter(move |replica| replica.phase == phase);
        let one_copy = phase(ReplicaPhase::Voter).any(|replica| has_one_copy(reports, record, replica));
        let silent = |store: StoreId| one_copy && self.silent.borrow().contains_key(&store);
        let is_lost = |replica: &&ReplicaRecord| {
            lost.contains(&replica.store) || (!replica.witness && silent(replica.store))
        };
        let is_faulty = |replica: &&ReplicaRecord| {
            let report = reports.get(&replica.store).filter(|report| report.failed.is_empty());
            // What repairs itself from its peers is let be, under its old id.
            report.is_some_and(|report| {
                !runs_on(report, record, replica.id) && !is_repairing(report, record, replica.id)
            })
        };
        let (joining, voters) = (|| phase(ReplicaPhase::Joining), || phase(ReplicaPhase::Voter));
        if let Some(replica) = joining().find(is_lost).or_else(|| voters().find(is_lost)) {
            return self.replace_elsewhere(record, replica, state, reports).await;
        }
        let faulty = joining().find(|replica| replica.made && is_faulty(replica));
        // One at a time: the others are to be a quorum meanwhile.
        let faulty = faulty.or_else(|| voters().find(is_faulty).filter(|_| joining().next().is_none()));
        match faulty {
            Some(replica) => self.replace_in_place(record, replica).await,
            None => Ok(()),
        }
    }

    async fn replace_in_place(&self, record: &VolumeRecord, old: &ReplicaRecord) -> Result<(), AnswerError> {
        let placed = Placed { store: old.store, location: old.location.clone(), witness: old.witness };
        self.replace(record, old, placed).await
    }

    async fn replace_elsewhere(
        &self,
        record: &VolumeRecord,
        old: &ReplicaRecord,
        state: &CatalogState,
        reports: &StoreReports,
    ) -> Result<(), AnswerError> {
        // What leaves takes up no domain, and its store is not free before it is gone.
        let leaves = |replica: &&ReplicaRecord| replica.phase == ReplicaPhase::Leaving;
        let taken: Vec<StoreId> =
            record.replicas.iter().filter(leaves).map(|replica| replica.store).collect();
        let staying: Vec<Placed> = record
            .replicas
            .iter()
            .filter(|replica| replica.id != old.id && !leaves(replica))
            .map(ReplicaRecord::placed)
            .collect();
        let mut candidates = volumes::candidates(state, reports);
        candidates.retain(|candidate| !taken.contains(&candidate.store));
        let placed = placement::place_one(&record.spec, &candidates, &staying, old.witness)?;
        self.replace(record, old, placed).await
    }

    async fn replace(
        &self,
        record: &VolumeRecord,
        old: &ReplicaRecord,
        placed: Placed,
    ) -> Result<(), AnswerError> {
        tracing::warn!(volume = record.spec.name, replica = %old.id, from = %old.location.node,
            to = %placed.location.node, "a lost replica is replaced");
        let (id, revision) = (record.id, record.revision);
        self.apply(&CatalogCommand::ReplaceReplica { id, revision, old: old.id, placed }).await?;
        Ok(())
    }
}

/// Whether a store, which has loaded everything that its disk holds, says that this replica runs there.
fn runs_on(report: &StoreReport, record: &VolumeRecord, replica: ReplicaId) -> bool {
    let id = ReplicaIdentity { group: record.group, replica };
    report.replicas.iter().any(|(_, other, fault)| *other == id && fault.is_empty())
}

/// Whether a store says that this replica does not run because its log is being repaired.
fn is_repairing(report: &StoreReport, record: &VolumeRecord, replica: ReplicaId) -> bool {
    report.repairing.contains(&ReplicaIdentity { group: record.group, replica })
}

/// Whether a store says that its witness's log has gone beyond its budget.
fn has_one_copy(reports: &StoreReports, record: &VolumeRecord, replica: &ReplicaRecord) -> bool {
    let id = ReplicaIdentity { group: record.group, replica: replica.id };
    reports.get(&replica.store).is_some_and(|report| report.one_copy.contains(&id))
}

/// Whether the others of a replica are a quorum that can commit a change without it: they run, and are not far behind.
fn stands_without(
    leader: &ReplicaReport,
    leading: ReplicaId,
    without: ReplicaId,
    fine: impl Fn(ReplicaId) -> bool,
) -> bool {
    let is_near = |id: ReplicaId| {
        let matched = leader.matched.iter().find(|(other, _)| *other == id).map_or(0, |(_, at)| at.0);
        id == leading || matched + CAUGHT_UP_WITHIN >= leader.last_log.0
    };
    let others = || leader.voters.iter().copied().filter(|id| *id != without);
    let ready = others().filter(|id| fine(*id) && is_near(*id)).count();
    ready > others().count() / 2 && ready > leader.voters.len() / 2
}
