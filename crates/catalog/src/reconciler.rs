//! Makes reality match the catalog: small idempotent steps, taken by the member that leads.
//!
//! Every decision is a catalog command that names the revision it was made on, so a leader that has lost its place
//! decides nothing. What a step does to a replica bears repetition: a new leader begins again where it cannot know.

use std::rc::{Rc, Weak};
use std::time::Duration;

use futures_util::future::join_all;
use holdfast_env::Instant;
use holdfast_protocol::catalog::{
    CatalogCommand, CatalogState, Placed, ReplicaPhase, ReplicaRecord, VolumePhase, VolumeRecord,
};
use holdfast_protocol::command::VolumeCommand;
use holdfast_protocol::placement;
use holdfast_replica::administration::{ShardRequest, StoreReport};
use holdfast_replica::messages::ReplicaReport;
use holdfast_store::ReplicaIdentity;
use holdfast_types::{ErrorCode, OnQuorumLoss, ReadPolicy, ReplicaId, StoreId, UserError, VolumeId};

use crate::member::{AnswerError, Member};
use crate::volumes;

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
        }
        if this.is_leader()
            && let Ok(state) = this.read().await
        {
            this.look_at_nodes(&state).await;
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
        }
    }

    async fn replicas(&self, record: &VolumeRecord) -> Result<Step, AnswerError> {
        let find = |phase| record.replicas.iter().find(|replica| replica.phase == phase);
        if let Some(joining) = find(ReplicaPhase::Joining) {
            return self.join(record, joining).await;
        }
        match find(ReplicaPhase::Leaving) {
            Some(leaving) => self.leave(record, leaving).await,
            None => Ok(Step::Rest),
        }
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
        };
        volumes::shard(&self.rpc, replica.store, &request).await?;
        Ok(())
    }

    async fn make(&self, record: &VolumeRecord) -> Result<Step, AnswerError> {
        let made = record.replicas.iter().map(|replica| self.create_replica(record, replica));
        for result in join_all(made).await {
            result?;
        }
        let first = record.replicas.first().ok_or_else(|| retry_later("the volume has no replicas"))?;
        let voters = record.replicas.iter().map(|replica| (replica.id, replica.store)).collect();
        let bootstrap = ShardRequest::Bootstrap { group: record.group, voters };
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
        volumes::shard(&self.rpc, replica.store, &ShardRequest::Destroy { id }).await?;
        Ok(())
    }

    async fn drop_replica(&self, record: &VolumeRecord, replica: ReplicaId) -> Result<Step, AnswerError> {
        let command = CatalogCommand::DropReplica { id: record.id, revision: record.revision, replica };
        self.apply(&command).await?;
        Ok(Step::Progress)
    }

    /// A deletion never waits for a dead node: its replica stays on the list until the node is back.
    async fn remove(&self, record: &VolumeRecord) -> Result<Step, AnswerError> {
        if record.replicas.is_empty() {
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
        Ok(Step::Rest)
    }

    /// The leader's store and what it reports.
    pub(crate) async fn leader(
        &self,
        record: &VolumeRecord,
    ) -> Result<(StoreId, ReplicaReport), AnswerError> {
        let reports = volumes::replica_reports(&self.rpc, record).await;
        let (id, report) =
            volumes::leader_of(&reports).ok_or_else(|| retry_later("no replica of the volume leads now"))?;
        let store = record.replicas.iter().find(|replica| replica.id == id).map(|replica| replica.store);
        Ok((store.ok_or_else(|| retry_later("the volume's leader is not in the catalog"))?, report.clone()))
    }

    async fn join(&self, record: &VolumeRecord, joining: &ReplicaRecord) -> Result<Step, AnswerError> {
        // A faulty replica on the same store gives way first.
        for old in &record.replicas {
            if old.phase == ReplicaPhase::Leaving && old.store == joining.store {
                match self.gives_way(record, old).await? {
                    GivesWay::Now => self.destroy_replica(record, old).await?,
                    GivesWay::Later => return Ok(Step::Rest),
                    GivesWay::Never => return self.call_off(record, old, joining).await,
                }
            }
        }
        self.create_replica(record, joining).await?;
        let (store, report) = self.leader(record).await?;
        let group = record.group;
        // A change that was interrupted half-way is taken up again: both configurations count until then.
        if !report.voters.contains(&joining.id) || !report.settled_membership {
            let is_learner = report.learners.contains(&joining.id);
            if !report.voters.contains(&joining.id) && !is_learner {
                let add = ShardRequest::AddLearner { group, replica: joining.id, store: joining.store };
                volumes::shard(&self.rpc, store, &add).await?;
                return Ok(Step::Progress);
            }
            let matched = report.matched.iter().find(|(id, _)| *id == joining.id).map_or(0, |(_, at)| at.0);
            if matched + CAUGHT_UP_WITHIN < report.last_log.0 || matched == 0 {
                return Ok(Step::Rest);
            }
            let mut voters = wanted_voters(record);
            voters.push(joining.id);
            let change = ShardRequest::ChangeVoters { group, voters };
            volumes::shard(&self.rpc, store, &change).await?;
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

    /// Whether a faulty replica may be removed before the one that takes its place is there. Only while the others are
    /// a quorum without it: what it holds may be the second copy of what was acknowledged.
    async fn gives_way(&self, record: &VolumeRecord, old: &ReplicaRecord) -> Result<GivesWay, AnswerError> {
        let reports = volumes::replica_reports(&self.rpc, record).await;
        if reports.get(&old.id).is_some_and(|report| report.as_ref().is_ok_and(|r| r.fault.is_empty())) {
            return Ok(GivesWay::Never);
        }
        let (_, leader) =
            volumes::leader_of(&reports).ok_or_else(|| retry_later("no replica of the volume leads now"))?;
        let is_healthy = |id: &&ReplicaId| {
            **id != old.id
                && reports.get(id).is_some_and(|r| r.as_ref().is_ok_and(|report| report.fault.is_empty()))
        };
        let healthy = leader.voters.iter().filter(is_healthy).count();
        Ok(if healthy > leader.voters.len() / 2 { GivesWay::Now } else { GivesWay::Later })
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
        let set = |revision, replica, phase| CatalogCommand::SetReplica { id, revision, replica, phase };
        self.apply(&set(revision, joining.id, ReplicaPhase::Leaving)).await?;
        self.apply(&set(revision + 1, old.id, ReplicaPhase::Voter)).await?;
        Ok(Step::Progress)
    }

    async fn leave(&self, record: &VolumeRecord, leaving: &ReplicaRecord) -> Result<Step, AnswerError> {
        let (store, report) = self.leader(record).await?;
        if report.voters.contains(&leaving.id) || report.learners.contains(&leaving.id) {
            let voters = wanted_voters(record);
            if voters.len() < placement::voters(&record.spec)? {
                return Err(retry_later("a replica leaves only when enough others vote"));
            }
            let change = ShardRequest::ChangeVoters { group: record.group, voters };
            volumes::shard(&self.rpc, store, &change).await?;
        }
        self.destroy_replica(record, leaving).await?;
        self.drop_replica(record, leaving.id).await
    }

    /// Notes which nodes are silent, and has the replicas of lost nodes and faulty replicas placed anew.
    async fn look_at_nodes(self: &Rc<Self>, state: &CatalogState) {
        let reports = volumes::store_reports(&self.rpc, state).await;
        let now = Instant::now();
        let mut lost = Vec::new();
        for name in state.nodes.keys() {
            // A store that has stopped does not come back by itself, though its node answers.
            if reports.get(name).is_some_and(|report| report.failed.is_empty()) {
                self.silent.borrow_mut().remove(name);
                continue;
            }
            let since = *self.silent.borrow_mut().entry(name.clone()).or_insert(now);
            if now.since(since) >= self.options.lost_after {
                lost.push(name.clone());
            }
        }
        let made = |record: &&VolumeRecord| matches!(record.phase, VolumePhase::Ready | VolumePhase::Filling);
        for record in state.volumes.values().filter(made) {
            if record.replicas.iter().any(|replica| replica.phase == ReplicaPhase::Joining) {
                continue;
            }
            let voters = || record.replicas.iter().filter(|replica| replica.phase == ReplicaPhase::Voter);
            let on_lost = voters().find(|replica| lost.contains(&replica.location.node));
            let faulty = voters().find(|replica| {
                let report = reports.get(&replica.location.node).filter(|report| report.failed.is_empty());
                // What repairs itself from its peers is let be, under its old id.
                report.is_some_and(|report| {
                    !runs_on(report, record, replica.id) && !is_repairing(report, record, replica.id)
                })
            });
            let result = match (faulty, on_lost) {
                (Some(replica), _) => self.replace_in_place(record, replica).await,
                (None, Some(replica)) => self.replace_elsewhere(record, replica, state, &reports).await,
                (None, None) => Ok(()),
            };
            if let Err(AnswerError::Refused(error)) = result {
                tracing::warn!(volume = record.spec.name, %error, "a lost replica is not replaced yet");
            }
        }
    }

    async fn replace_in_place(&self, record: &VolumeRecord, old: &ReplicaRecord) -> Result<(), AnswerError> {
        let placed = Placed { store: old.store, location: old.location.clone() };
        self.replace(record, old, placed).await
    }

    async fn replace_elsewhere(
        &self,
        record: &VolumeRecord,
        old: &ReplicaRecord,
        state: &CatalogState,
        reports: &std::collections::BTreeMap<holdfast_types::NodeName, StoreReport>,
    ) -> Result<(), AnswerError> {
        let staying: Vec<Placed> = record
            .replicas
            .iter()
            .filter(|replica| replica.id != old.id)
            .map(|replica| Placed { store: replica.store, location: replica.location.clone() })
            .collect();
        let placed = placement::place_one(&record.spec, &volumes::candidates(state, reports), &staying)?;
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

fn wanted_voters(record: &VolumeRecord) -> Vec<ReplicaId> {
    let voters = record.replicas.iter().filter(|replica| replica.phase == ReplicaPhase::Voter);
    voters.map(|replica| replica.id).collect()
}
