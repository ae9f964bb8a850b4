//! openraft's state machine over one of ours, and the position up to which a replica has applied.
//!
//! What is applied lives in memory and in the journal; it becomes durable by a checkpoint (`StateMachine::checkpoint`)
//! and is repeated from the journal after a restart.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::rc::Rc;

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;
use futures_util::{Stream, TryStreamExt};
use holdfast_protocol::planted::is_planted;
use holdfast_store::journal::GroupLog;
use holdfast_store::volume::Checkpoint;
use holdfast_store::{EntryId, StoreError};
use holdfast_types::LogIndex;
use openraft::entry::RaftEntry;
use openraft::storage::{EntryResponder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend, RaftSnapshotBuilder};
use tokio::sync::Notify;

use crate::codec;
use crate::config::{AppData, AppReply, LogId, Snapshot, SnapshotMeta, StoredMembership, Types};
use crate::observe::{Brought, observed};
use crate::usage::Counters;

/// Why an entry could not be applied. Fatal: a replica that skipped an entry would diverge, so it stops.
#[derive(Debug, Clone, thiserror::Error)]
#[error("entry {index} cannot be applied: {why}")]
pub struct ApplyError {
    /// The entry.
    pub index: LogIndex,
    /// What is wrong with it, and what to do.
    pub why: String,
}

/// Why a command does not enter the log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CheckError {
    /// It makes no sense, and would make none if it came again.
    #[error("{0}")]
    Malformed(String),
    /// Block data does not match its checksums: a bit has flipped since they were computed. Who sent it may have it
    /// whole.
    #[error("{0}")]
    Damaged(String),
}

/// A replicated state machine. Single-threaded; `apply` does no I/O.
pub trait StateMachine {
    /// Refuses a command before it enters the log: malformed, or block data that does not match its checksums.
    /// Called where a command is proposed and where a follower receives it.
    fn check(&self, data: &AppData) -> Result<(), CheckError>;
    /// Applies a committed command. Deterministic.
    fn apply(&self, id: EntryId, data: &AppData) -> Result<AppReply, ApplyError>;
    /// The state as of the last applied entry.
    fn encode_state(&self) -> Bytes;
    /// The last durable checkpoint.
    fn checkpoint(&self) -> Option<Checkpoint>;
    /// Replaces everything by a checkpoint that came from the leader, durably, atomically.
    fn install(
        &self,
        checkpoint: Checkpoint,
        staged: Option<Rc<dyn Staged>>,
    ) -> LocalBoxFuture<'_, Result<(), StoreError>>;
    /// Every entry was applied up to `index`; for whoever watches the state.
    fn after_apply(&self, _index: LogIndex) {}
}

/// Block content that a rebuild has staged for a checkpoint.
pub trait Staged {
    /// Switches the content in, atomically and durably, as of `checkpoint`.
    fn commit(&self, checkpoint: Checkpoint) -> LocalBoxFuture<'static, Result<(), StoreError>>;
}

/// What travels as openraft's snapshot.
pub struct SnapshotData {
    /// The state machine's encoded state.
    pub(crate) state: Bytes,
    /// Block content, when this replica received the snapshot.
    pub(crate) staged: Option<Rc<dyn Staged>>,
    /// No read is served below this index after it is installed.
    pub(crate) serve_floor: LogIndex,
}

/// How far a replica has applied, and when it may serve.
#[derive(Default)]
pub struct Position {
    applied: Cell<Option<EntryId>>,
    membership: RefCell<StoredMembership>,
    /// INV-STAGE: the home file may hold blocks of entries up to here; below it nothing is served.
    lasting_floor: Cell<LogIndex>,
    /// As `lasting_floor`, for entries of the recovered log. What had come home is known to be committed, so the replica
    /// applies up to here by itself, even where nobody could commit anything.
    recovered_floor: Cell<LogIndex>,
    changed: Notify,
}

impl Position {
    /// A replica that starts from `checkpoint`, with a recovered log that is known to be committed up to `committed`.
    pub fn recovered(
        checkpoint: Option<&Checkpoint>,
        committed: Option<EntryId>,
    ) -> Result<Self, StoreError> {
        let position = Self::default();
        if let Some(checkpoint) = checkpoint {
            position.set_checkpoint(checkpoint)?;
        }
        position.recovered_floor.set(committed.map_or(LogIndex::ZERO, |id| id.index));
        Ok(position)
    }

    fn set_checkpoint(&self, checkpoint: &Checkpoint) -> Result<(), StoreError> {
        let membership = codec::membership_from(&checkpoint.membership).map_err(|error| {
            StoreError::Failed(format!("the checkpoint's membership is damaged: {error}"))
        })?;
        self.applied.set((checkpoint.id.index > LogIndex::ZERO).then_some(checkpoint.id));
        *self.membership.borrow_mut() = membership;
        self.lasting_floor.set(checkpoint.serve_floor.max(checkpoint.id.index));
        self.changed.notify_waiters();
        Ok(())
    }

    /// The last applied entry.
    pub fn applied(&self) -> Option<EntryId> {
        self.applied.get()
    }
    /// Its index, zero before the first.
    pub fn applied_index(&self) -> LogIndex {
        self.applied.get().map_or(LogIndex::ZERO, |id| id.index)
    }
    pub(crate) fn membership_bytes(&self) -> Bytes {
        codec::membership_bytes(&self.membership.borrow())
    }
    /// The index that must be applied before anything is served.
    pub fn serve_floor(&self) -> LogIndex {
        if is_planted("serve-floor-ignored") {
            return LogIndex::ZERO;
        }
        self.lasting_floor.get().max(self.recovered_floor.get())
    }
    /// The part of it that a checkpoint has to keep. That of the recovered log is found anew at every start, and kept
    /// here it would outlive the truncation of that log: a replica that waits for entries that never come.
    pub(crate) fn lasting_floor(&self) -> LogIndex {
        self.lasting_floor.get()
    }
    pub(crate) fn truncated_after(&self, index: LogIndex) {
        self.recovered_floor.set(self.recovered_floor.get().min(index));
        self.changed.notify_waiters();
    }
    fn advance(&self, id: EntryId) {
        assert!(
            id.index.0 == self.applied_index().0 + 1 || self.applied.get().is_none(),
            "entries are applied in order, each once: {id:?} after {:?}",
            self.applied.get()
        );
        self.applied.set(Some(id));
    }
    /// Ends when `index` is applied and the replica may serve.
    pub async fn reached(&self, index: LogIndex) {
        loop {
            let changed = self.changed.notified();
            if self.applied_index() >= index.max(self.serve_floor()) {
                return;
            }
            changed.await;
        }
    }
    /// Whether `index` is applied and the replica may serve.
    pub fn has_reached(&self, index: LogIndex) -> bool {
        self.applied_index() >= index.max(self.serve_floor())
    }
}

/// Adaptor to openraft.
#[derive(Clone)]
pub(crate) struct Machine {
    pub(crate) inner: Rc<dyn StateMachine>,
    pub(crate) position: Rc<Position>,
    pub(crate) log: GroupLog,
    pub(crate) counters: Counters,
    /// States of the near past, for a cleaner that has to stay behind the local flush.
    pub(crate) captures: Rc<Captures>,
    /// The Raft that this one serves has ended: nothing of it may be applied any more, another one does.
    pub(crate) retired: Rc<Cell<bool>>,
    /// A checkpoint of the leader is being switched in.
    pub(crate) installing: Rc<Cell<bool>>,
}

/// While a checkpoint of the leader is being switched in.
struct Installing {
    flag: Rc<Cell<bool>>,
    position: Rc<Position>,
}

impl Installing {
    fn begin(machine: &Machine) -> Self {
        machine.installing.set(true);
        Self { flag: machine.installing.clone(), position: machine.position.clone() }
    }
}

impl Drop for Installing {
    fn drop(&mut self) {
        self.flag.set(false);
        self.position.changed.notify_waiters();
    }
}

/// States of the near past, by index: those that wait for the local flush, and the newest that does not.
#[derive(Default)]
pub(crate) struct Captures {
    kept: RefCell<VecDeque<Checkpoint>>,
    /// Applied since the last one.
    bytes: Cell<usize>,
    entries: Cell<usize>,
}

/// So many bytes of payload, or so many entries, lie between two captures.
const CAPTURE_EVERY_BYTES: usize = 2 << 20;
const CAPTURE_EVERY_ENTRIES: usize = 1024;
/// Captures at once: more than what admission lets stand in line before the local flush.
const CAPTURES_MAX: usize = 48;

impl Captures {
    fn applied(&self, payload: usize) {
        self.bytes.set(self.bytes.get() + payload);
        self.entries.set(self.entries.get() + 1);
    }
    fn is_due(&self) -> bool {
        self.bytes.get() >= CAPTURE_EVERY_BYTES || self.entries.get() >= CAPTURE_EVERY_ENTRIES
    }
    fn keep(&self, checkpoint: Checkpoint, flushed: LogIndex) {
        self.bytes.set(0);
        self.entries.set(0);
        let mut kept = self.kept.borrow_mut();
        while kept.get(1).is_some_and(|second| second.id.index <= flushed) {
            kept.pop_front();
        }
        if kept.len() < CAPTURES_MAX {
            kept.push_back(checkpoint);
        }
    }
    fn up_to(&self, index: LogIndex) -> Option<Checkpoint> {
        self.kept.borrow().iter().rev().find(|kept| kept.id.index <= index).cloned()
    }
    fn clear(&self) {
        self.kept.borrow_mut().clear();
    }
}

impl Machine {
    /// The newest known state that is not after `index`.
    pub(crate) fn captured_up_to(&self, index: LogIndex) -> Option<Checkpoint> {
        let now = self.position.applied_index() <= index;
        if now { Some(self.capture()) } else { self.captures.up_to(index) }
    }

    /// The state at exactly the last applied entry.
    pub(crate) fn capture(&self) -> Checkpoint {
        Checkpoint {
            id: self.position.applied().unwrap_or_default(),
            membership: self.position.membership_bytes(),
            state: self.inner.encode_state(),
            serve_floor: self.position.lasting_floor(),
        }
    }

    fn snapshot(&self) -> Result<Option<Snapshot>, io::Error> {
        let Some(checkpoint) = self.inner.checkpoint() else { return Ok(None) };
        if checkpoint.id.index == LogIndex::ZERO {
            return Ok(None);
        }
        let last_membership = codec::membership_from(&checkpoint.membership).map_err(io::Error::other)?;
        let meta = SnapshotMeta { last_log_id: Some(codec::log_id(checkpoint.id)), last_membership };
        let data =
            SnapshotData { state: checkpoint.state, staged: None, serve_floor: checkpoint.serve_floor };
        Ok(Some(Snapshot { meta, snapshot: data }))
    }

    pub(crate) fn is_installing(&self) -> bool {
        self.installing.get()
    }
    /// Ends when nothing of a leader's is being switched in.
    pub(crate) async fn installed(&self) {
        loop {
            let changed = self.position.changed.notified();
            if !self.is_installing() {
                return;
            }
            changed.await;
        }
    }

    /// Raft ends with its core; what it had asked of its machine may still be under way.
    fn check_serves(&self) -> io::Result<()> {
        if self.retired.get() {
            return Err(io::Error::other("Raft was made anew with other timers; this one has ended"));
        }
        Ok(())
    }

    fn apply_one(
        &self,
        id: EntryId,
        payload: &EntryPayload<AppData, u64, crate::config::Peer>,
    ) -> io::Result<AppReply> {
        let reply = match payload {
            EntryPayload::Blank => AppReply::Nothing,
            EntryPayload::Membership(membership) => {
                let stored = StoredMembership::new(Some(codec::log_id(id)), membership.clone());
                *self.position.membership.borrow_mut() = stored;
                AppReply::Nothing
            }
            EntryPayload::Normal(data) => {
                self.captures.applied(data.payload.len());
                self.inner.apply(id, data).map_err(io::Error::other)?
            }
        };
        self.position.advance(id);
        self.counters.count(|usage| usage.entries_applied += 1);
        observed(|observer| {
            let state = self.inner.encode_state();
            observer.applied(self.log.id(), id, &brought(payload, &reply), &state);
        });
        self.tell_whether_it_serves();
        Ok(reply)
    }

    fn tell_whether_it_serves(&self) {
        observed(|observer| {
            if self.position.has_reached(LogIndex::ZERO) {
                observer.serves(self.log.id(), self.position.applied_index());
            }
        });
    }
}

/// An applied entry, for whoever watches.
fn brought<'e>(
    payload: &'e EntryPayload<AppData, u64, crate::config::Peer>,
    reply: &'e AppReply,
) -> Brought<'e> {
    match payload {
        EntryPayload::Blank => Brought::Blank,
        EntryPayload::Membership(membership) => Brought::Membership {
            voters: membership.get_joint_config().iter().map(|set| set.iter().copied().collect()).collect(),
            learners: membership.learner_ids().collect(),
        },
        EntryPayload::Normal(data) => Brought::Command(data, reply),
    }
}

impl RaftSnapshotBuilder<Types> for Machine {
    type SnapshotData = SnapshotData;

    async fn build_snapshot(&mut self) -> Result<Snapshot, io::Error> {
        self.snapshot()?
            .ok_or_else(|| io::Error::other("there is no checkpoint yet; ask again after one was made"))
    }
}

impl RaftStateMachine<Types> for Machine {
    type SnapshotData = SnapshotData;
    type SnapshotBuilder = Self;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembership), io::Error> {
        let applied = self.position.applied().map(codec::log_id);
        Ok((applied, self.position.membership.borrow().clone()))
    }

    async fn apply<S>(&mut self, mut entries: S) -> Result<(), io::Error>
    where
        S: Stream<Item = Result<EntryResponder<Types>, io::Error>> + Unpin + OptionalSend,
    {
        while let Some((entry, responder)) = entries.try_next().await? {
            self.check_serves()?;
            let reply = self.apply_one(codec::entry_id(&entry.log_id()), &entry.payload)?;
            if let Some(responder) = responder {
                responder.send(reply);
            }
        }
        if self.captures.is_due() {
            self.captures.keep(self.capture(), self.log.flushed());
        }
        self.position.changed.notify_waiters();
        self.inner.after_apply(self.position.applied_index());
        Ok(())
    }

    async fn try_create_snapshot_builder(&mut self, force: bool) -> Option<Self> {
        (force || self.inner.checkpoint().is_some_and(|c| c.id.index > LogIndex::ZERO)).then(|| self.clone())
    }

    async fn get_snapshot_builder(&mut self) -> Self {
        self.clone()
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, data: SnapshotData) -> Result<(), io::Error> {
        self.check_serves()?;
        let _installing = Installing::begin(self);
        let Some(last) = meta.last_log_id else { return Ok(()) };
        let id = codec::entry_id(&last);
        if id.index <= self.position.applied_index() {
            // At start openraft offers the replica its own checkpoint again.
            return Ok(());
        }
        let checkpoint = Checkpoint {
            id,
            membership: codec::membership_bytes(&meta.last_membership),
            state: data.state,
            serve_floor: data.serve_floor,
        };
        // INV-STAGE: from here on nothing is served until everything that is being switched in is applied.
        if !is_planted("rebuilt-serves-at-once") {
            self.position.lasting_floor.set(checkpoint.serve_floor.max(id.index));
        }
        observed(|observer| observer.rebuilding(self.log.id(), checkpoint.serve_floor));
        self.tell_whether_it_serves();
        self.captures.clear();
        self.inner.install(checkpoint.clone(), data.staged).await.map_err(crate::log::io_error)?;
        self.position.set_checkpoint(&checkpoint).map_err(crate::log::io_error)?;
        observed(|observer| {
            observer.installed(self.log.id(), id, &checkpoint.state);
            observer.rebuilt(self.log.id(), checkpoint.serve_floor);
        });
        self.tell_whether_it_serves();
        self.inner.after_apply(self.position.applied_index());
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        self.snapshot()
    }
}

#[cfg(test)]
mod tests {
    use holdfast_types::{ReplicaId, Term};

    use super::*;

    #[test]
    fn a_checkpoint_keeps_no_floor_of_a_log_that_may_be_cut() {
        let last = EntryId { term: Term(3), leader: ReplicaId(1), index: LogIndex(100) };
        let position = Position::recovered(None, Some(last)).expect("there is nothing to read");
        assert_eq!(position.serve_floor(), LogIndex(100));
        assert_eq!(position.lasting_floor(), LogIndex::ZERO, "a checkpoint made now");
        position.truncated_after(LogIndex(90));
        assert_eq!(position.serve_floor(), LogIndex(90));
        let rebuilt = Checkpoint {
            id: EntryId { index: LogIndex(40), ..last },
            membership: position.membership_bytes(),
            state: Bytes::new(),
            serve_floor: LogIndex(60),
        };
        let position = Position::recovered(Some(&rebuilt), Some(last)).expect("it is readable");
        assert_eq!(position.lasting_floor(), LogIndex(60), "what a rebuild brought shows up to here");
    }
}
