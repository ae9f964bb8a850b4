//! One replica of the catalog on a shard.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::{Rc, Weak};
use std::time::Duration;

use holdfast_env::Instant;
use holdfast_protocol::catalog::{
    CatalogCommand, CatalogReply, CatalogState, Placed, ReplicaPhase, ReplicaRecord, SourceOrder,
    VolumePhase, VolumeRecord,
};
use holdfast_protocol::placement;
use holdfast_replica::administration::user_error;
use holdfast_replica::host::reaches;
use holdfast_replica::machine::Position;
use holdfast_replica::{Group, GroupError, Host, StateMachine};
use holdfast_store::ReplicaIdentity;
use holdfast_store::journal::GroupLog;
use holdfast_store::state_file::{StateFile, StateIdentity};
use holdfast_store::volume::{Checkpoint, CheckpointSource};
use holdfast_types::{
    ErrorCode, GroupId, LogIndex, ReplicaId, SnapshotId, StoreId, UserError, VolumeId, VolumeSpec, limits,
};
use holdfast_wire::rpc::Rpc;
use tokio::sync::Mutex;

use crate::machine::{CatalogMachine, decode_reply, encode_command};
use crate::messages::{CatalogAnswer, CatalogRequest};
use crate::timers::Ledger;
use crate::{reconciler, snapshots, volumes};

/// Entries between checkpoints.
const CHECKPOINT_EVERY: u64 = 256;
/// No volume is added beyond this size of the state: what else changes it must have room.
const STATE_BYTES_FULL: usize = limits::CATALOG_BYTES_MAX / 4 * 3;
/// How long a checkpoint waits for the local flush of what was applied, and how often it looks.
const FLUSH_PATIENCE: Duration = Duration::from_secs(5);
const FLUSH_LOOK: Duration = Duration::from_millis(5);

/// How the catalog's members behave.
#[derive(Clone, Copy, Debug)]
pub struct MemberOptions {
    /// After this time without an answer a node is lost, and its replicas are placed elsewhere.
    pub lost_after: Duration,
}

impl Default for MemberOptions {
    fn default() -> Self {
        Self { lost_after: Duration::from_secs(600) }
    }
}

/// A running member.
pub struct Member {
    pub(crate) group: Rc<Group>,
    pub(crate) machine: CatalogMachine,
    pub(crate) rpc: Rpc,
    pub(crate) options: MemberOptions,
    /// Volumes that are being worked on.
    pub(crate) working: RefCell<BTreeMap<VolumeId, Rc<Mutex<()>>>>,
    /// Snapshots that are being worked on.
    pub(crate) working_snapshots: RefCell<BTreeMap<SnapshotId, Rc<Mutex<()>>>>,
    /// Since when a store has not answered, or has said that it has stopped.
    pub(crate) silent: RefCell<BTreeMap<StoreId, Instant>>,
    /// Where the log of its group stood when a replica that leaves was first seen to vote no more.
    pub(crate) left_at: RefCell<BTreeMap<ReplicaId, LogIndex>>,
    /// What is known of the timers of volumes.
    pub(crate) timers: RefCell<Ledger>,
}

fn failed(error: impl std::fmt::Display) -> UserError {
    UserError::new(ErrorCode::Internal, format!("the catalog does not run here: {error}"))
}

async fn open_state(host: &Host, id: ReplicaIdentity) -> Result<StateFile, UserError> {
    let identity = StateIdentity { cluster: host.identity().cluster, store: host.identity().store, id };
    StateFile::open(host.directory(), "catalog-state", identity).await.map_err(failed)
}

/// The last checkpoint of a member that does not run yet.
pub(crate) async fn checkpoint_of(host: &Host, id: ReplicaIdentity) -> Result<Checkpoint, UserError> {
    Ok(open_state(host, id).await?.newest().unwrap_or_default())
}

impl Member {
    /// Runs the member of this id on a log. `fresh`: made just now. Its seat serves its calls.
    pub(crate) async fn run(
        host: &Rc<Host>,
        id: ReplicaIdentity,
        log: GroupLog,
        fresh: bool,
        options: MemberOptions,
    ) -> Result<Rc<Self>, UserError> {
        let file = open_state(host, id).await?;
        let checkpoint = file.newest();
        if fresh && checkpoint.is_some() {
            return Err(failed("its checkpoint is there, but its log is not"));
        }
        if !fresh {
            reaches(&log, &checkpoint.clone().unwrap_or_default()).map_err(failed)?;
        }
        let position = Position::recovered(checkpoint.as_ref(), log.committed());
        let position = Rc::new(position.map_err(failed)?);
        let machine = CatalogMachine::open(host.identity().cluster, file).map_err(failed)?;
        let inner = Rc::new(machine.clone());
        let group = Group::start(host.environment(), id, log, inner, position, fresh).await;
        let group = group.map_err(|error| user_error(&error))?;
        host.register(group.clone());
        let member = Rc::new(Self {
            group,
            machine,
            rpc: host.environment().rpc.clone(),
            options,
            working: RefCell::default(),
            working_snapshots: RefCell::default(),
            silent: RefCell::default(),
            left_at: RefCell::default(),
            timers: RefCell::default(),
        });
        holdfast_env::spawn("catalog-checkpoint", Self::keep_checkpoints(Rc::downgrade(&member)));
        holdfast_env::spawn("catalog-reconcile", reconciler::run(Rc::downgrade(&member)));
        Ok(member)
    }

    /// Whether nothing was ever written to this member.
    pub(crate) fn is_empty(&self) -> bool {
        self.group.log().last().is_none() && self.machine.checkpoint().is_none()
    }

    /// Whether this member leads the catalog, as far as it knows.
    pub fn is_leader(&self) -> bool {
        self.group.is_leader()
    }

    async fn keep_checkpoints(member: Weak<Self>) {
        loop {
            let Some(this) = member.upgrade() else { return };
            let applied = this.group.position().applied_index();
            let saved = this.machine.checkpoint().map_or(LogIndex::ZERO, |checkpoint| checkpoint.id.index);
            if applied.0 >= saved.0 + CHECKPOINT_EVERY
                && let Err(error) = this.save_checkpoint(applied).await
            {
                tracing::error!(%error, "the catalog makes no more checkpoints");
                return;
            }
            this.machine.changed().await;
        }
    }

    async fn save_checkpoint(&self, applied: LogIndex) -> Result<(), UserError> {
        let flushed = async {
            while self.group.log().flushed() < applied {
                holdfast_env::sleep(FLUSH_LOOK).await;
            }
        };
        if holdfast_env::timeout(FLUSH_PATIENCE, flushed).await.is_err() {
            return Ok(());
        }
        // What was applied since may not be flushed yet: a later checkpoint takes it.
        let checkpoint = self.group.machine().capture();
        if self.group.log().flushed() < checkpoint.id.index {
            return Ok(());
        }
        let index = checkpoint.id.index;
        if let Err(error) = self.machine.save(checkpoint).await {
            // Its log is small: it is tried again with the next change.
            let reserve = self.group.log().reserve().filter(|_| error.is_full()).cloned();
            let Some(reserve) = reserve else { return Err(failed(error)) };
            tracing::warn!(%error, "the medium is full: the catalog makes no checkpoint this time");
            return reserve.give_up().await.map_err(failed);
        }
        match self.group.purge(index).await {
            Err(GroupError::Stopped(why)) => Err(failed(why)),
            Err(error) => {
                tracing::warn!(%error, "the catalog's log was not purged this time");
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    pub(crate) async fn answer(self: &Rc<Self>, request: CatalogRequest) -> CatalogAnswer {
        match self.try_answer(request).await {
            Ok(answer) => answer,
            Err(AnswerError::Elsewhere) => {
                CatalogAnswer::Elsewhere { leader: self.group.leader().map(|(_, store)| store) }
            }
            Err(AnswerError::Refused(error)) => CatalogAnswer::Refused { error },
        }
    }

    async fn try_answer(self: &Rc<Self>, request: CatalogRequest) -> Result<CatalogAnswer, AnswerError> {
        match request {
            CatalogRequest::State => {
                let state = Box::new(self.read().await?);
                Ok(CatalogAnswer::State { state })
            }
            CatalogRequest::Apply { command } => {
                Ok(CatalogAnswer::Reply { reply: self.apply(&command).await? })
            }
            CatalogRequest::Create { spec, parameters, source } => {
                let record = self.create(*spec, parameters, source).await?;
                Ok(CatalogAnswer::Volume { record: Some(Box::new(record)) })
            }
            CatalogRequest::Settle { id } => {
                self.read().await?;
                self.settle(id).await?;
                let record = self.machine.with_state(|state| state.volumes.get(&id).cloned());
                Ok(CatalogAnswer::Volume { record: record.map(Box::new) })
            }
            CatalogRequest::CreateSnapshot { volume, name, key, created_ms } => {
                let record = self.create_snapshot(&volume, name, key, created_ms).await?;
                Ok(CatalogAnswer::Snapshot { record: Some(Box::new(record)) })
            }
            CatalogRequest::SettleSnapshot { id } => {
                self.read().await?;
                self.settle_snapshot(id, snapshots::PATIENCE).await?;
                let record = self.machine.with_state(|state| state.snapshots.get(&id).cloned());
                Ok(CatalogAnswer::Snapshot { record: record.map(Box::new) })
            }
            CatalogRequest::Seat | CatalogRequest::Sit { .. } => {
                Err(UserError::new(ErrorCode::Internal, "this is for the member's seat").into())
            }
            CatalogRequest::Add { id, node, replacing } => {
                let record = self.add_replica(id, &node, replacing).await?;
                Ok(CatalogAnswer::Volume { record: Some(Box::new(record)) })
            }
        }
    }

    /// The state as of now, confirmed with a quorum.
    pub(crate) async fn read(&self) -> Result<CatalogState, AnswerError> {
        let index = self.group.confirm_leadership().await.map_err(AnswerError::from)?;
        let reached = self.group.position().reached(index);
        holdfast_env::timeout(self.group.timers().election_max, reached)
            .await
            .map_err(|_| AnswerError::Elsewhere)?;
        Ok(self.machine.state())
    }

    /// Proposes a command and waits for its effect.
    pub(crate) async fn apply(&self, command: &CatalogCommand) -> Result<CatalogReply, AnswerError> {
        let data = encode_command(command)?;
        let (_, reply) = self.group.propose(data).await.map_err(AnswerError::from)?;
        Ok(decode_reply(&reply)?)
    }

    /// Where new replicas could go, as the stores themselves tell now.
    pub(crate) async fn candidates(&self, state: &CatalogState) -> Vec<placement::Candidate> {
        let reports = volumes::store_reports(&self.rpc, state).await;
        volumes::candidates(state, &reports)
    }

    /// Whether a record may be added.
    pub(crate) fn check_room(&self) -> Result<(), UserError> {
        if self.machine.encode_state().len() <= STATE_BYTES_FULL {
            return Ok(());
        }
        Err(UserError::new(
            ErrorCode::ResourceExhausted,
            "the catalog is as large as it may become: it must fit into one checkpoint and one answer",
        )
        .hint("delete volumes or snapshots that are not needed"))
    }

    async fn create(
        self: &Rc<Self>,
        spec: VolumeSpec,
        parameters: BTreeMap<String, String>,
        source: Option<SourceOrder>,
    ) -> Result<VolumeRecord, AnswerError> {
        let state = self.read().await?;
        let placed = match state.find(&spec.name) {
            Some(_) => Vec::new(),
            None => placement::place(&spec, &self.candidates(&state).await)?,
        };
        if !placed.is_empty() {
            self.check_room()?;
        }
        let command = CatalogCommand::CreateVolume {
            id: VolumeId(holdfast_env::random_u128()),
            group: GroupId(holdfast_env::random_u128()),
            spec,
            parameters,
            placed,
            source,
        };
        let CatalogReply::Volume { record } = self.apply(&command).await? else {
            return Err(UserError::new(ErrorCode::Internal, "a creation answered without a volume").into());
        };
        self.settle(record.id).await?;
        let now = self.machine.with_state(|state| state.volumes.get(&record.id).cloned());
        match now {
            Some(record) if matches!(record.phase, VolumePhase::Ready | VolumePhase::Filling) => Ok(record),
            Some(record) => {
                let name = &record.spec.name;
                Err(UserError::new(ErrorCode::Unavailable, format!("volume {name} is not ready yet"))
                    .hint("the reconciler goes on; ask again")
                    .into())
            }
            None => Err(UserError::new(ErrorCode::NotFound, "the volume was deleted meanwhile").into()),
        }
    }

    /// Adds a replica beside those that stay, on a node or a store that is named, or anywhere; a record with the joining
    /// replica. The domain of the one that is replaced counts as free.
    pub(crate) async fn add_replica(
        self: &Rc<Self>,
        id: VolumeId,
        node: &str,
        replacing: Option<ReplicaId>,
    ) -> Result<VolumeRecord, AnswerError> {
        let state = self.read().await?;
        let gone = || UserError::new(ErrorCode::NotFound, format!("there is no volume {id}"));
        let record = state.volumes.get(&id).ok_or_else(gone)?;
        let staying: Vec<Placed> = record
            .replicas
            .iter()
            .filter(|replica| replica.phase != ReplicaPhase::Leaving && Some(replica.id) != replacing)
            .map(ReplicaRecord::placed)
            .collect();
        let mut candidates = self.candidates(&state).await;
        if !node.is_empty() {
            let asked = |candidate: &placement::Candidate| {
                candidate.location.node.as_str() == node || candidate.store.to_string() == node
            };
            candidates.retain(asked);
        }
        let leaving = |store| record.replicas.iter().any(|replica| replica.store == store);
        candidates.retain(|candidate| !leaving(candidate.store));
        let replaced = record.replicas.iter().find(|replica| Some(replica.id) == replacing);
        let witness = replaced.is_some_and(|replica| replica.witness);
        let placed = placement::place_one(&record.spec, &candidates, &staying, witness)?;
        let revision = record.revision;
        let command = match replacing {
            Some(old) => CatalogCommand::ReplaceReplica { id, revision, old, placed },
            None => CatalogCommand::AddReplica { id, revision, placed },
        };
        match self.apply(&command).await? {
            CatalogReply::Volume { record } => Ok(*record),
            _ => Err(gone().into()),
        }
    }
}

/// Why a member did not answer.
pub(crate) enum AnswerError {
    /// Another member leads, or nobody.
    Elsewhere,
    /// It cannot be done.
    Refused(UserError),
}

impl From<UserError> for AnswerError {
    fn from(error: UserError) -> Self {
        Self::Refused(error)
    }
}

impl From<GroupError> for AnswerError {
    fn from(error: GroupError) -> Self {
        match error {
            GroupError::NotLeader { .. } | GroupError::TimedOut => Self::Elsewhere,
            other => Self::Refused(user_error(&other)),
        }
    }
}
