//! One replica of one Raft group: openraft over the journal and the peer network, whatever its state machine is.
//!
//! Owns the start-up silence (a restarted voter neither grants nor campaigns until every lease that it may have
//! granted before has ended) and the ordering of incoming appends. INV-TERM: leader restore is off
//! ([`crate::config::raft_config`]).

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::Either;
use holdfast_env::Instant;
use holdfast_env::net::{Frame, Lane};
use holdfast_protocol::planted::is_planted;
use holdfast_store::journal::GroupLog;
use holdfast_store::{EntryId, ReplicaIdentity, StoreError};
use holdfast_types::{LogIndex, Reader, ReplicaId, StoreId, Term};
use holdfast_wire::rpc::{Responder, Rpc};
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{ClientWriteError, RaftError};
use openraft::raft::AppendEntriesRequest;
use openraft::raft::linearizable_read::LinearizerOption;
use openraft::{ChangeMembers, ReadPolicy, ServerState};
use tokio::sync::{Notify, mpsc, oneshot};

use crate::catch_up::{CatchUp, Heard};
use crate::codec;
use crate::config::{AppData, AppReply, Entry, Peer, Raft, Timers, Types, raft_config};
use crate::confirm;
use crate::gray::{Acks, Damping, Mute};
use crate::log::Log;
use crate::machine::{CheckError, Machine, Position, SnapshotData, StateMachine};
use crate::messages::{Method, RaftHead};
use crate::network::Networks;
use crate::past::Grants;
use crate::space::Fulls;
use crate::stall::{Stall, Stalled};
use crate::usage::{Counters, GroupUsage};

/// Appends of one stream that wait for Raft; the sender keeps fewer in flight.
const STREAM_QUEUE_MAX: usize = 64;
/// What a leader is told whose data is not taken.
const NO_ROOM: &str = "the medium is full";
/// How long a proposal may take before its outcome is called unknown.
pub const PROPOSE_DEADLINE: Duration = Duration::from_secs(10);

/// What every group of a shard shares.
#[derive(Clone)]
pub struct GroupEnvironment {
    /// The shard's calls.
    pub rpc: Rpc,
    /// The group's timers.
    pub timers: Timers,
    /// Until when this daemon's voters are silent.
    pub silent_until: Instant,
}

/// Why a group could not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GroupError {
    /// Another replica leads, or nobody. The outcome of a proposal is unknown: repeat it under the same tag.
    #[error("this replica does not lead the group")]
    NotLeader {
        /// Where the leader stands, if known.
        leader: Option<StoreId>,
    },
    /// No answer in time; the outcome is unknown.
    #[error("no quorum answered in time")]
    TimedOut,
    /// The replica has stopped for good: its store failed, or an entry could not be applied.
    #[error("the replica has stopped: {0}")]
    Stopped(String),
    /// Block data does not match its checksums: it was damaged before it came here.
    #[error("{0}")]
    Damaged(String),
    /// The request is wrong for the group's state.
    #[error("{0}")]
    Refused(String),
}

struct AppendStream {
    id: u64,
    requests: mpsc::Sender<(AppendEntriesRequest<Types>, Responder)>,
    /// Dropped with the stream: what it still holds goes then. A disk that hangs would gather one stream after another.
    _ended: oneshot::Sender<()>,
}

/// A running replica.
pub struct Group {
    id: ReplicaIdentity,
    raft: Raft,
    networks: Networks,
    log: GroupLog,
    machine: Machine,
    timers: Timers,
    stalled: Stalled,
    damping: Damping,
    silent_until: Cell<Instant>,
    /// The newest stream of each peer and lane: heartbeats have one of their own.
    streams: RefCell<BTreeMap<(ReplicaId, Lane), AppendStream>>,
    leading_since: Cell<Option<(Term, Instant)>>,
    leadership: Notify,
    transferring: Cell<bool>,
    catch_up: RefCell<CatchUp>,
    /// Bytes of the last catch-up by log that has ended.
    caught_up: Cell<Option<u64>>,
    counters: Counters,
}

pub(crate) fn stopped(error: impl std::fmt::Display) -> GroupError {
    GroupError::Stopped(error.to_string())
}

impl Group {
    /// Starts the replica from what its journal and checkpoint hold. A `fresh` replica (created in this run of the
    /// daemon) owes no start-up silence.
    pub async fn start(
        environment: &GroupEnvironment,
        id: ReplicaIdentity,
        log: GroupLog,
        machine: Rc<dyn StateMachine>,
        position: Rc<Position>,
        fresh: bool,
    ) -> Result<Rc<Self>, GroupError> {
        let config = raft_config(&environment.timers, &id.group.to_string());
        let counters = Counters::default();
        let networks = Networks {
            rpc: environment.rpc.clone(),
            group: id.group,
            local: id.replica,
            counters: counters.clone(),
            mute: Mute::default(),
            acks: Acks::default(),
            grants: Grants::default(),
            fulls: Fulls::default(),
        };
        let machine = Machine {
            inner: machine,
            position: position.clone(),
            log: log.clone(),
            counters: counters.clone(),
            captures: Rc::default(),
        };
        let (stall, stalled) = Stall::new();
        let storage = Log::new(log.clone(), position, stall);
        let raft = Raft::new(id.replica.0, config, networks.clone(), storage, machine.clone())
            .await
            .map_err(stopped)?;
        let silent_until = if fresh { Instant::now() } else { environment.silent_until };
        let group = Rc::new(Self {
            id,
            raft,
            networks,
            log,
            machine,
            timers: environment.timers,
            stalled: stalled.clone(),
            damping: Damping::default(),
            silent_until: Cell::new(silent_until),
            streams: RefCell::default(),
            leading_since: Cell::new(None),
            leadership: Notify::new(),
            transferring: Cell::new(false),
            catch_up: RefCell::default(),
            caught_up: Cell::new(None),
            counters,
        });
        holdfast_env::spawn("group-silence", Self::end_silence(Rc::downgrade(&group), silent_until));
        holdfast_env::spawn("group-ticks", Self::tick_unless_stalled(Rc::downgrade(&group), stalled));
        holdfast_env::spawn("group-leadership", Self::watch_leadership(Rc::downgrade(&group)));
        Ok(group)
    }

    async fn end_silence(group: std::rc::Weak<Self>, until: Instant) {
        holdfast_env::sleep_until(until).await;
        if let Some(group) = group.upgrade() {
            group.raft.runtime_config().elect(true);
        }
    }

    async fn tick_unless_stalled(group: std::rc::Weak<Self>, stalled: Stalled) {
        let mut stalls = true;
        while stalled.until(stalls).await {
            let Some(group) = group.upgrade() else { return };
            group.raft.runtime_config().tick(!stalls);
            stalls = !stalls;
        }
    }

    /// Notes when this replica began to lead, which leases and settling count from.
    async fn watch_leadership(group: std::rc::Weak<Self>) {
        let Some((mut metrics, mute)) =
            group.upgrade().map(|group| (group.raft.server_metrics(), group.mute().clone()))
        else {
            return;
        };
        loop {
            let muted_or_not = mute.changed();
            {
                let Some(group) = group.upgrade() else { return };
                let leading = {
                    let now = metrics.borrow_watched();
                    let leads = now.state == ServerState::Leader && !mute.is_set();
                    leads.then_some(Term(now.vote.leader_id.term))
                };
                let before = group.leading_since.get().map(|(term, _)| term);
                if leading != before {
                    group.leading_since.set(leading.map(|term| (term, Instant::now())));
                    if leading.is_some() {
                        group.counters.count(|usage| usage.leaderships += 1);
                    }
                    group.leadership.notify_waiters();
                }
            }
            let (changed, muted_or_not) = (std::pin::pin!(metrics.changed()), std::pin::pin!(muted_or_not));
            let woken = futures_util::future::select(changed, muted_or_not).await;
            if let Either::Left((Err(_), _)) = woken {
                // Raft has stopped, whatever it last said.
                let Some(group) = group.upgrade() else { return };
                group.leading_since.set(None);
                return group.leadership.notify_waiters();
            }
        }
    }

    /// Who it is.
    pub fn id(&self) -> ReplicaIdentity {
        self.id
    }
    /// The group's timers.
    pub fn timers(&self) -> &Timers {
        &self.timers
    }
    /// How far it has applied.
    pub fn position(&self) -> &Position {
        &self.machine.position
    }
    /// Its part of the journal.
    pub fn log(&self) -> &GroupLog {
        &self.log
    }
    /// Counters since the daemon started.
    pub fn usage(&self) -> GroupUsage {
        self.counters.now()
    }
    pub(crate) fn counters(&self) -> &Counters {
        &self.counters
    }
    /// Since when it leads, and in which term.
    pub fn leading_since(&self) -> Option<(Term, Instant)> {
        self.leading_since.get()
    }
    /// Ends at the next change of leadership of this replica.
    pub fn leadership_changed(&self) -> impl Future<Output = ()> + '_ {
        self.leadership.notified()
    }
    /// Whether it is giving its leadership away: then it renews no lease.
    pub fn is_transferring(&self) -> bool {
        self.transferring.get() || self.mute().is_set()
    }
    /// Whether it has fallen silent, because the disk below hangs and others can write.
    pub fn is_silent(&self) -> bool {
        self.mute().is_set()
    }
    pub(crate) fn transferring(&self) -> &Cell<bool> {
        &self.transferring
    }
    pub(crate) fn raft(&self) -> &Raft {
        &self.raft
    }
    pub(crate) fn networks(&self) -> &Networks {
        &self.networks
    }
    pub(crate) fn mute(&self) -> &Mute {
        &self.networks.mute
    }
    pub(crate) fn acks(&self) -> &Acks {
        &self.networks.acks
    }
    pub(crate) fn fulls(&self) -> &Fulls {
        &self.networks.fulls
    }
    pub(crate) fn damping(&self) -> &Damping {
        &self.damping
    }
    /// Whether Raft's core waits for the disk.
    pub(crate) fn core_waits(&self) -> bool {
        self.stalled.waits()
    }

    /// Begins a new group with these voters. Called once, on one replica of it; a repeat is refused by Raft and that
    /// is fine.
    pub async fn bootstrap(&self, voters: &BTreeMap<ReplicaId, StoreId>) -> Result<(), GroupError> {
        let members: BTreeMap<u64, Peer> =
            voters.iter().map(|(id, store)| (id.0, Peer { store: *store })).collect();
        match self.raft.initialize(members).await {
            Ok(()) => Ok(()),
            Err(RaftError::APIError(openraft::errors::InitializeError::NotAllowed(_))) => Ok(()),
            Err(RaftError::APIError(error)) => Err(GroupError::Refused(error.to_string())),
            Err(RaftError::Fatal(error)) => Err(stopped(error)),
        }
    }

    /// Puts a command into the log and waits until it is applied here.
    pub async fn propose(&self, data: AppData) -> Result<(EntryId, AppReply), GroupError> {
        self.machine.inner.check(&data).map_err(|error| match error {
            CheckError::Damaged(why) => GroupError::Damaged(why),
            CheckError::Malformed(why) => GroupError::Refused(why),
        })?;
        if self.is_transferring() {
            return Err(GroupError::NotLeader { leader: None });
        }
        self.counters.count(|usage| usage.proposals += 1);
        let write = holdfast_env::timeout(PROPOSE_DEADLINE, self.raft.client_write(data));
        let silent = std::pin::pin!(self.mute().begun());
        match futures_util::future::select(std::pin::pin!(write), silent).await {
            Either::Left((Err(_), _)) => Err(GroupError::TimedOut),
            Either::Left((Ok(Ok(done)), _)) => Ok((codec::entry_id(&done.log_id), done.data)),
            Either::Left((Ok(Err(error)), _)) => Err(self.write_error(error)),
            // Its outcome is unknown: another leader knows.
            Either::Right(_) => Err(GroupError::NotLeader { leader: None }),
        }
    }

    fn write_error(&self, error: RaftError<Types, ClientWriteError<Types>>) -> GroupError {
        match error {
            // Discarded with its outcome unknown, or never appended: either way it is repeated under the same tag.
            RaftError::APIError(
                ClientWriteError::ForwardToLeader(elsewhere) | ClientWriteError::LogEntryDiscarded(elsewhere),
            ) => GroupError::NotLeader { leader: elsewhere.leader_node.map(|peer| peer.store) },
            RaftError::APIError(other) => GroupError::Refused(other.to_string()),
            RaftError::Fatal(error) => stopped(error),
        }
    }

    /// Confirms with a quorum that this replica still leads; the index that a linearizable read must have applied.
    pub async fn confirm_leadership(&self) -> Result<LogIndex, GroupError> {
        let confirmed = async {
            // Waits while openraft holds its heartbeats back: a leader that hears nobody must fall silent, and the
            // question below is an append like any other. From here on it has given its vote to nobody else.
            let index = match self.raft.get_read_log_id(self.reading()).await {
                Ok((read, _)) => LogIndex(read.log_id().index),
                Err(RaftError::Fatal(error)) => return Err(stopped(error)),
                Err(RaftError::APIError(_)) => return Err(self.not_leader()),
            };
            if is_planted("append-clock") || self.majority_follows().await {
                Ok(index)
            } else {
                Err(self.not_leader())
            }
        };
        holdfast_env::timeout(self.timers.election_max, confirmed).await.unwrap_or(Err(GroupError::TimedOut))
    }

    fn not_leader(&self) -> GroupError {
        let another = self.leader().filter(|(leader, _)| *leader != self.id.replica);
        GroupError::NotLeader { leader: another.map(|(_, store)| store) }
    }

    /// Whether a majority answers, from now on, that it follows this leader.
    async fn majority_follows(&self) -> bool {
        let (vote, membership) = {
            let metrics = self.raft.server_metrics();
            let now = metrics.borrow_watched();
            if now.state != ServerState::Leader || self.mute().is_set() {
                return false;
            }
            (now.vote, now.membership_config.membership().clone())
        };
        confirm::majority_follows(&self.networks, vote, &membership, self.timers.election_max).await
    }

    /// The majority is asked; openraft's clock need only show that the leader has heard of it lately.
    fn reading(&self) -> LinearizerOption {
        if is_planted("append-clock") {
            return ReadPolicy::ReadIndex.into();
        }
        LinearizerOption::new(None, true)
    }

    /// The leader that this replica follows, and its store.
    pub fn leader(&self) -> Option<(ReplicaId, StoreId)> {
        let metrics = self.raft.server_metrics();
        let now = metrics.borrow_watched();
        let leader = now.current_leader?;
        let peer = now.membership_config.membership().get_node(&leader)?;
        Some((ReplicaId(leader), peer.store))
    }

    /// Whether it leads now, as far as it knows. One that has fallen silent or has stopped does not.
    pub fn is_leader(&self) -> bool {
        let metrics = self.raft.metrics();
        let now = metrics.borrow_watched();
        now.state == ServerState::Leader && now.running_state.is_ok() && !self.mute().is_set()
    }

    /// Voters and learners with their stores, leader's view or own.
    pub fn members(&self) -> Vec<(ReplicaId, StoreId)> {
        let metrics = self.raft.server_metrics();
        let now = metrics.borrow_watched();
        now.membership_config.membership().nodes().map(|(id, peer)| (ReplicaId(*id), peer.store)).collect()
    }

    /// Adds a learner; returns when the change is committed, not when it has caught up.
    pub async fn add_learner(&self, id: ReplicaId, store: StoreId) -> Result<(), GroupError> {
        let added =
            holdfast_env::timeout(PROPOSE_DEADLINE, self.raft.add_learner(id.0, Peer { store }, false)).await;
        match added {
            Err(_) => Err(GroupError::TimedOut),
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(self.write_error(error)),
        }
    }

    /// Changes the voters by joint consensus; those left out are removed. INV-MEMBER: one change at a time, by
    /// openraft's rule that a change waits for the one before it.
    pub async fn change_voters(&self, voters: &[ReplicaId]) -> Result<(), GroupError> {
        let ids = voters.iter().map(|id| id.0).collect();
        let change = self.raft.change_membership(ChangeMembers::ReplaceAllVoters(ids), false);
        match holdfast_env::timeout(PROPOSE_DEADLINE, change).await {
            Err(_) => Err(GroupError::TimedOut),
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(self.write_error(error)),
        }
    }

    /// Shows openraft the last checkpoint, then lets it purge the log up to `upto` (never past the checkpoint).
    pub async fn purge(&self, upto: LogIndex) -> Result<(), GroupError> {
        let Some(checkpoint) = self.machine.inner.checkpoint() else { return Ok(()) };
        if checkpoint.id.index == LogIndex::ZERO {
            return Ok(());
        }
        self.raft.trigger().snapshot().await.map_err(stopped)?;
        let mut metrics = self.raft.metrics();
        let shown = async {
            while metrics.borrow_watched().snapshot.map(|id| id.index) < Some(checkpoint.id.index.0) {
                metrics.changed().await.map_err(stopped)?;
            }
            Ok::<(), GroupError>(())
        };
        holdfast_env::timeout(PROPOSE_DEADLINE, shown).await.map_err(|_| GroupError::TimedOut)??;
        self.counters.count(|usage| usage.purges += 1);
        // A leader puts a purge off while its replication may read what would go, and forgets it when it steps down;
        // asked for the same index again, openraft takes it for done. Asked for one more, it does what its snapshot
        // covers.
        let all = upto >= checkpoint.id.index;
        let upto = if all { checkpoint.id.index.next() } else { upto };
        self.raft.trigger().purge_log(upto.0).await.map_err(stopped)
    }

    /// The state machine at exactly the last applied entry, for the cleaner.
    pub fn machine(&self) -> &(impl holdfast_store::volume::CheckpointSource + Clone + use<>) {
        &self.machine
    }

    /// What the replica knows of itself and, as leader, of the others.
    pub fn report(&self) -> crate::messages::ReplicaReport {
        let metrics = self.raft.metrics();
        let now = metrics.borrow_watched();
        let membership = now.membership_config.membership();
        let index = |id: Option<u64>| LogIndex(id.unwrap_or(0));
        let matched = now.replication.iter().flatten();
        crate::messages::ReplicaReport {
            replica: self.id.replica,
            is_leader: now.state == ServerState::Leader && now.running_state.is_ok() && !self.mute().is_set(),
            has_quorum: now
                .last_quorum_acked
                .as_ref()
                .is_some_and(|at| openraft::Instant::elapsed(&**at) <= self.timers.election_max),
            leader: now.current_leader.map(ReplicaId),
            voters: membership.voter_ids().map(ReplicaId).collect(),
            learners: membership.learner_ids().map(ReplicaId).collect(),
            settled_membership: membership.get_joint_config().len() == 1
                && now.membership_config.log_id() == now.committed_membership_config.log_id(),
            term: Term(now.current_term),
            last_log: index(now.last_log_index),
            committed: index(now.local_committed.map(|id| id.index)),
            applied: self.machine.position.applied_index(),
            purged: index(now.purged.map(|id| id.index)),
            checkpoint: self.machine.inner.checkpoint().map_or(LogIndex::ZERO, |c| c.id.index),
            matched: matched.map(|(id, at)| (ReplicaId(*id), index(at.map(|at| at.index)))).collect(),
            fault: now.running_state.as_ref().err().map(ToString::to_string).unwrap_or_default(),
            ..Default::default()
        }
    }

    /// Why Raft has stopped here, if it has.
    pub fn fault(&self) -> Option<String> {
        self.raft.metrics().borrow_watched().running_state.as_ref().err().map(ToString::to_string)
    }

    /// Stops the replica. What was acknowledged stays in the journal.
    pub async fn stop(&self) {
        self.streams.borrow_mut().clear();
        if let Err(error) = self.raft.shutdown().await {
            tracing::warn!(group = %self.id.group, %error, "the replica's task ended badly");
        }
    }

    /// Handles one of Raft's calls. Called in order of arrival; answers later.
    pub(crate) fn handle(
        self: &Rc<Self>,
        head: &RaftHead,
        mut input: Reader<'_>,
        body: Bytes,
        responder: Responder,
    ) {
        if let Err(why) = self.dispatch(head, &mut input, body, responder) {
            tracing::warn!(group = %self.id.group, from = %head.from, %why, "a malformed call was refused");
        }
    }

    fn dispatch(
        self: &Rc<Self>,
        head: &RaftHead,
        input: &mut Reader<'_>,
        body: Bytes,
        responder: Responder,
    ) -> Result<(), holdfast_types::DecodeError> {
        match head.method {
            Method::StreamAppend => {
                let stream = input.u64()?;
                let bytes = input.remaining() + body.len();
                let request = codec::append_request_from(input, body)?;
                self.hear(&request, bytes);
                if !self.has_room_for(&request.entries) {
                    responder.refuse(NO_ROOM);
                } else if self.check_entries(&request.entries) {
                    self.stream_append(head.from, stream, request, responder);
                }
            }
            Method::Append => {
                let bytes = input.remaining() + body.len();
                let request = codec::append_request_from(input, body)?;
                // A leader that only asks who follows it tells nothing of its log.
                if request.prev_log_id.is_some() || !request.entries.is_empty() {
                    self.hear(&request, bytes);
                }
                if !self.has_room_for(&request.entries) {
                    responder.refuse(NO_ROOM);
                } else if self.check_entries(&request.entries) {
                    let log = self.log.clone();
                    self.answer(responder, |raft| async move {
                        let response = raft.append_entries(request).await;
                        response.map(|response| codec::append_response(&response, log.is_full()))
                    });
                }
            }
            Method::Vote | Method::PreVote | Method::TransferLeader | Method::ProveWritable
                if Instant::now() < self.silent_until.get() =>
            {
                // A lease that this voter granted before its restart may still live (INV-LEASE).
                responder.refuse("the voter is in its start-up silence");
            }
            Method::Vote => {
                let request = codec::vote_request_from(input)?;
                self.answer(responder, |raft| async move {
                    raft.vote(request).await.map(|r| codec::vote_response(&r))
                });
            }
            Method::PreVote => {
                let request = codec::vote_request_from(input)?;
                self.answer(responder, |raft| async move {
                    raft.pre_vote(request).await.map(|r| codec::vote_response(&r))
                });
            }
            Method::TransferLeader => {
                let request = codec::transfer_request_from(input)?;
                if *request.to_node_id() == self.id.replica.0 && self.log.is_hung() {
                    responder.refuse("the disk of this store hangs");
                    return Ok(());
                }
                self.answer(responder, |raft| async move {
                    // A target that refuses is noticed by the leader, which goes on leading.
                    let handled = raft.handle_transfer_leader(request).await;
                    handled.map(|_rejected| Bytes::new())
                });
            }
            Method::ProveWritable => self.prove_writable(responder),
            Method::InstallSnapshot => responder.refuse("snapshots are taken by the shard"),
        }
        Ok(())
    }

    /// Answers once the disk has taken what a vote would take. While it hangs nothing is put in line for it.
    fn prove_writable(&self, responder: Responder) {
        if let Some(why) = self.fault() {
            return responder.refuse(why);
        }
        if self.log.is_hung() {
            return responder.refuse("the disk of this store hangs");
        }
        let log = self.log.clone();
        holdfast_env::spawn("prove-writable", async move {
            match log.prove_writable().await {
                Ok(()) => responder.reply(Frame::small(Bytes::new())),
                Err(error) => responder.refuse(error.to_string()),
            }
        });
    }

    /// Whether entries are taken now. A leader that is refused goes on without this replica, and purges its log; one that
    /// waited for an answer would keep it.
    fn has_room_for(&self, entries: &[Entry]) -> bool {
        let has_room = !bring_data(entries) || self.log.takes_data_of_others();
        if !has_room {
            tracing::debug!(group = %self.id.group, "the medium is full: data is not taken");
        }
        has_room
    }

    fn hear(&self, request: &AppendEntriesRequest<Types>, bytes: usize) {
        let heard = Heard {
            last: self.log.last().map_or(LogIndex::ZERO, |id| id.index),
            committed: request.leader_commit.map_or(LogIndex::ZERO, |id| LogIndex(id.index)),
            first: request.entries.first().map(|entry| LogIndex(entry.log_id.index)),
            bytes: bytes as u64,
        };
        if let Some(bytes) = self.catch_up.borrow_mut().hear(heard) {
            self.caught_up.set(Some(bytes));
        }
    }

    /// Bytes of a catch-up by log that has ended since the last call.
    pub(crate) fn take_caught_up(&self) -> Option<u64> {
        self.caught_up.take()
    }

    /// The content has come by chunks: the log that follows is not counted as another catch-up.
    pub(crate) fn note_rebuilt(&self) {
        self.catch_up.borrow_mut().rebuilt();
        self.caught_up.set(None);
    }

    /// Refuses entries whose block data does not match its checksums: a flipped bit on the way must not be stored.
    fn check_entries(&self, entries: &[Entry]) -> bool {
        self.counters.count(|usage| {
            usage.appends_received += 1;
            usage.entries_received += entries.len() as u64;
        });
        entries.iter().all(|entry| match &entry.payload {
            openraft::EntryPayload::Normal(data) => match self.machine.inner.check(data) {
                Ok(()) => true,
                Err(why) => {
                    tracing::error!(group = %self.id.group, %why, "an entry was damaged on the way and is refused");
                    false
                }
            },
            _ => true,
        })
    }

    fn answer<F, E>(&self, responder: Responder, call: impl FnOnce(Raft) -> F)
    where
        F: Future<Output = Result<Bytes, E>> + 'static,
        E: std::fmt::Display + 'static,
    {
        let work = call(self.raft.clone());
        holdfast_env::spawn("raft-call", async move {
            match work.await {
                Ok(head) => responder.reply(Frame::small(head)),
                Err(error) => responder.refuse(error.to_string()),
            }
        });
    }

    fn stream_append(
        self: &Rc<Self>,
        from: ReplicaId,
        id: u64,
        request: AppendEntriesRequest<Types>,
        responder: Responder,
    ) {
        let mut streams = self.streams.borrow_mut();
        let from = (from, responder.lane());
        let current = streams.get(&from).filter(|stream| stream.id == id && !stream.requests.is_closed());
        let sender = match current {
            Some(stream) => stream.requests.clone(),
            None => {
                let (sender, receiver) = mpsc::channel(STREAM_QUEUE_MAX);
                let (_ended, replaced) = oneshot::channel::<()>();
                streams.insert(from, AppendStream { id, requests: sender.clone(), _ended });
                let serving = serve_stream(self.raft.clone(), self.log.clone(), receiver);
                holdfast_env::spawn("raft-stream", async move {
                    futures_util::pin_mut!(serving);
                    futures_util::future::select(replaced, serving).await;
                });
                sender
            }
        };
        drop(streams);
        if let Err(error) = sender.try_send((request, responder)) {
            let (_, responder) = error.into_inner();
            responder.refuse("too many appends are waiting");
        }
    }

    /// Installs a snapshot that a leader offers; the block content was staged before.
    pub(crate) async fn install(
        &self,
        vote: crate::config::Vote,
        meta: crate::config::SnapshotMeta,
        data: SnapshotData,
    ) -> Result<Bytes, GroupError> {
        let snapshot = crate::config::Snapshot { meta, snapshot: data };
        let response = self.raft.install_full_snapshot(vote, snapshot).await.map_err(stopped)?;
        Ok(codec::vote_bytes(&response.vote))
    }
}

/// Whether entries bring block data.
fn bring_data(entries: &[Entry]) -> bool {
    entries.iter().any(|entry| match &entry.payload {
        openraft::EntryPayload::Normal(data) => !data.payload.is_empty(),
        _ => false,
    })
}

/// Feeds one stream of appends to Raft and gives its answers to the responders, in order.
async fn serve_stream(
    raft: Raft,
    log: GroupLog,
    receiver: mpsc::Receiver<(AppendEntriesRequest<Types>, Responder)>,
) {
    let waiting: Rc<RefCell<std::collections::VecDeque<Responder>>> = Rc::default();
    let (queue, answering) = (waiting.clone(), log.clone());
    let requests = futures_util::stream::unfold(receiver, move |mut receiver| {
        let (queue, log) = (queue.clone(), log.clone());
        async move {
            let (request, responder) = receiver.recv().await?;
            if !request.entries.is_empty() {
                log.has_room().await;
            }
            queue.borrow_mut().push_back(responder);
            Some((request, receiver))
        }
    });
    let mut answers = std::pin::pin!(raft.stream_append(requests));
    while let Some(answer) = answers.next().await {
        let Some(responder) = waiting.borrow_mut().pop_front() else { return };
        match answer {
            Ok(result) => {
                responder.reply(Frame::small(codec::stream_result(&result, answering.is_full())));
            }
            Err(fatal) => responder.refuse(fatal.to_string()),
        }
    }
}

impl holdfast_store::volume::CheckpointSource for Machine {
    fn capture(&self) -> holdfast_store::volume::Checkpoint {
        Machine::capture(self)
    }
    fn captured_up_to(&self, index: LogIndex) -> Option<holdfast_store::volume::Checkpoint> {
        Machine::captured_up_to(self, index)
    }
}

/// A store's failure as a group's.
impl From<StoreError> for GroupError {
    fn from(error: StoreError) -> Self {
        Self::Stopped(error.to_string())
    }
}
