//! One replica of one Raft group: openraft over the journal and the peer network, whatever its state machine is.
//!
//! Owns the start-up silence (a restarted voter neither grants nor campaigns until every lease that it may have
//! granted before has ended) and the ordering of incoming appends. INV-TERM: leader restore is off
//! ([`crate::config::raft_config`]).

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::Either;
use holdfast_env::Instant;
use holdfast_env::net::Frame;
use holdfast_protocol::planted::is_planted;
use holdfast_store::journal::GroupLog;
use holdfast_store::{EntryId, ReplicaIdentity, StoreError};
use holdfast_types::{LogIndex, Reader, ReplicaId, StoreId, Term};
use holdfast_wire::rpc::{Responder, Rpc};
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{ClientWriteError, RaftError};
use openraft::raft::AppendEntriesRequest;
use openraft::raft::linearizable_read::LinearizerOption;
use openraft::{ReadPolicy, ServerState};
use tokio::sync::Notify;

use crate::append_streams::AppendStreams;
use crate::catch_up::{CatchUp, Heard};
use crate::codec;
use crate::config::{AppData, AppReply, Entry, LeaderId, Raft, Role, Timers, Types};
use crate::confirm;
use crate::core::Core;
use crate::given_up::GivenUp;
use crate::gray::{Acks, Damping, Mute};
use crate::machine::{CheckError, Machine, Position, SnapshotData, StateMachine};
use crate::messages::{Method, RaftHead};
use crate::network::Networks;
use crate::past::Grants;
use crate::rest::member::Rest;
use crate::space::Fulls;
use crate::stall::Stalled;
use crate::transfer::Transfer;
use crate::usage::{Counters, GroupUsage};

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

/// A running replica.
pub struct Group {
    id: ReplicaIdentity,
    role: Role,
    core: RefCell<Core>,
    reloading: Cell<bool>,
    networks: Networks,
    log: GroupLog,
    machine: Machine,
    damping: Damping,
    started: Instant,
    /// When the last append of a leader came, which is no sooner than the leader counts its lease from.
    acknowledged: Cell<Option<Instant>>,
    silent_until: Cell<Instant>,
    streams: AppendStreams,
    leading_since: Cell<Option<(Term, Instant)>>,
    leadership: Notify,
    transfer: Transfer,
    catch_up: RefCell<CatchUp>,
    /// Bytes of the last catch-up by log that has ended.
    caught_up: Cell<Option<u64>>,
    counters: Counters,
    rest: Rest,
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
        Self::start_as(Role::Full, environment, id, log, machine, position, fresh).await
    }

    /// As [`Self::start`], in a role.
    pub(crate) async fn start_as(
        role: Role,
        environment: &GroupEnvironment,
        id: ReplicaIdentity,
        log: GroupLog,
        machine: Rc<dyn StateMachine>,
        position: Rc<Position>,
        fresh: bool,
    ) -> Result<Rc<Self>, GroupError> {
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
            given_up: GivenUp::new(log.clone()),
            round_trips: Acks::default(),
            role,
        };
        let machine = Machine {
            inner: machine,
            position: position.clone(),
            log: log.clone(),
            counters: counters.clone(),
            captures: Rc::default(),
            retired: Rc::default(),
            installing: Rc::default(),
        };
        let core = Core::start(id, environment.timers, &networks, &log, &machine, 1).await?;
        let talks = fresh || is_planted("silence-skipped");
        let silent_until = if talks { Instant::now() } else { environment.silent_until };
        let group = Rc::new(Self {
            id,
            role,
            core: RefCell::new(core),
            reloading: Cell::new(false),
            networks,
            log,
            machine,
            damping: Damping::default(),
            started: Instant::now(),
            acknowledged: Cell::new(None),
            silent_until: Cell::new(silent_until),
            streams: AppendStreams::default(),
            leading_since: Cell::new(None),
            leadership: Notify::new(),
            transfer: Transfer::default(),
            catch_up: RefCell::default(),
            caught_up: Cell::new(None),
            counters,
            rest: Rest::default(),
        });
        group.watch();
        Ok(group)
    }

    /// Looks after the Raft that runs now, until there is another one.
    pub(crate) fn watch(self: &Rc<Self>) {
        let weak = Rc::downgrade(self);
        let (number, stalled) = {
            let core = self.core.borrow();
            (core.number, core.stalled.clone())
        };
        self.rest_with_another_core();
        holdfast_env::spawn("group-silence", Self::end_silence(weak.clone(), number));
        holdfast_env::spawn("group-ticks", Self::tick_unless_stalled(weak.clone(), number, stalled));
        holdfast_env::spawn("group-leadership", Self::watch_leadership(weak, number));
    }

    /// The group, while its Raft is the one of that number.
    fn of_core(group: &std::rc::Weak<Self>, number: u64) -> Option<Rc<Self>> {
        group.upgrade().filter(|group| group.core.borrow().number == number)
    }

    async fn end_silence(group: std::rc::Weak<Self>, number: u64) {
        let Some(until) = Self::of_core(&group, number).map(|group| group.silent_until.get()) else { return };
        holdfast_env::sleep_until(until).await;
        if let Some(group) = Self::of_core(&group, number).filter(|group| group.role == Role::Full) {
            group.raft().runtime_config().elect(true);
        }
    }

    async fn tick_unless_stalled(group: std::rc::Weak<Self>, number: u64, stalled: Stalled) {
        let mut stalls = true;
        while stalled.until(stalls).await {
            let Some(group) = Self::of_core(&group, number) else { return };
            group.set_stalls(stalls);
            stalls = !stalls;
        }
    }

    /// Notes when this replica began to lead, which leases and settling count from.
    async fn watch_leadership(group: std::rc::Weak<Self>, number: u64) {
        let Some((mut metrics, mute)) =
            Self::of_core(&group, number).map(|group| (group.raft().server_metrics(), group.mute().clone()))
        else {
            return;
        };
        loop {
            let muted_or_not = mute.changed();
            {
                let Some(group) = Self::of_core(&group, number) else { return };
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
                group.rest_ends_with_leadership();
            }
            let (changed, muted_or_not) = (std::pin::pin!(metrics.changed()), std::pin::pin!(muted_or_not));
            let woken = futures_util::future::select(changed, muted_or_not).await;
            if let Either::Left((Err(_), _)) = woken {
                // Raft has stopped, whatever it last said.
                let Some(group) = Self::of_core(&group, number) else { return };
                group.leading_since.set(None);
                return group.leadership.notify_waiters();
            }
        }
    }

    /// Who it is.
    pub fn id(&self) -> ReplicaIdentity {
        self.id
    }
    /// The timers that Raft runs with.
    pub fn timers(&self) -> Timers {
        self.core.borrow().timers
    }
    /// Whether it neither votes nor campaigns yet.
    pub fn owes_silence(&self) -> bool {
        Instant::now() < self.silent_until.get()
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
    pub(crate) fn rest(&self) -> &Rest {
        &self.rest
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
        self.transfer.is_under_way() || self.mute().is_set()
    }
    /// Whether it has fallen silent, because the disk below hangs and others can write.
    pub fn is_silent(&self) -> bool {
        self.mute().is_set()
    }
    pub(crate) fn transfer(&self) -> &Transfer {
        &self.transfer
    }
    pub(crate) fn raft(&self) -> Raft {
        self.core.borrow().raft.clone()
    }
    pub(crate) fn core(&self) -> &RefCell<Core> {
        &self.core
    }
    pub(crate) fn reloading(&self) -> &Cell<bool> {
        &self.reloading
    }
    pub(crate) fn started(&self) -> Instant {
        self.started
    }
    pub(crate) fn acknowledged(&self) -> Option<Instant> {
        self.acknowledged.get()
    }
    /// When a leader last called, or its store last answered for it.
    pub(crate) fn heard_leader_at(&self) -> Option<Instant> {
        self.acknowledged.get().max(self.answered_for_at())
    }
    /// It is silent until then, at least.
    pub(crate) fn silent(&self, until: Instant) {
        self.silent_until.set(self.silent_until.get().max(until));
    }
    /// What still waits in streams of appends is refused.
    pub(crate) fn forget_streams(&self) {
        self.streams.clear();
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
    pub(crate) fn given_up(&self) -> &GivenUp {
        &self.networks.given_up
    }
    pub(crate) fn fulls(&self) -> &Fulls {
        &self.networks.fulls
    }
    pub(crate) fn damping(&self) -> &Damping {
        &self.damping
    }
    /// Whether Raft's core waits for the disk.
    pub(crate) fn core_waits(&self) -> bool {
        self.core.borrow().stalled.waits()
    }

    /// Puts a command into the log and waits until it is applied here.
    pub async fn propose(&self, data: AppData) -> Result<(EntryId, AppReply), GroupError> {
        self.machine.inner.check(&data).map_err(|error| match error {
            CheckError::Damaged(why) => GroupError::Damaged(why),
            CheckError::Malformed(why) => GroupError::Refused(why),
        })?;
        if self.transfer.is_under_way() {
            self.transfer.over().await;
            if !self.is_leader() {
                return Err(self.not_leader());
            }
        }
        if self.mute().is_set() {
            return Err(GroupError::NotLeader { leader: None });
        }
        self.awake().await?;
        self.counters.count(|usage| usage.proposals += 1);
        let raft = self.raft();
        let write = holdfast_env::timeout(PROPOSE_DEADLINE, raft.client_write(data));
        let silent = std::pin::pin!(self.mute().begun());
        match futures_util::future::select(std::pin::pin!(write), silent).await {
            Either::Left((Err(_), _)) => Err(GroupError::TimedOut),
            Either::Left((Ok(Ok(done)), _)) => Ok((codec::entry_id(&done.log_id), done.data)),
            Either::Left((Ok(Err(error)), _)) => Err(self.write_error(error)),
            // Its outcome is unknown: another leader knows.
            Either::Right(_) => Err(GroupError::NotLeader { leader: None }),
        }
    }

    pub(crate) fn write_error(&self, error: RaftError<Types, ClientWriteError<Types>>) -> GroupError {
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
            // One that has rested has heard nobody for long, and asks at once.
            let woken = self.woken();
            let unasked = woken.is_some() && is_planted("woken-leader-unasked");
            let (leader, index) = match woken {
                Some(woken) => woken,
                None => match self.raft().get_read_log_id(self.reading()).await {
                    Ok((read, _)) => (read.log_id().leader_id, LogIndex(read.log_id().index)),
                    Err(RaftError::Fatal(error)) => return Err(stopped(error)),
                    Err(RaftError::APIError(_)) => return Err(self.not_leader()),
                },
            };
            let follows = unasked || is_planted("append-clock") || self.majority_follows(leader).await;
            if follows && (woken.is_none() || unasked || self.leads_as(leader)) {
                Ok(index)
            } else {
                Err(self.not_leader())
            }
        };
        holdfast_env::timeout(self.timers().election_max, confirmed)
            .await
            .unwrap_or(Err(GroupError::TimedOut))
    }

    fn not_leader(&self) -> GroupError {
        let another = self.leader().filter(|(leader, _)| *leader != self.id.replica);
        GroupError::NotLeader { leader: another.map(|(_, store)| store) }
    }

    /// Whether a majority answers, from now on, that it follows this replica as the leader that it was when it was asked.
    async fn majority_follows(&self, leader: LeaderId) -> bool {
        let (vote, membership) = {
            let metrics = self.raft().server_metrics();
            let now = metrics.borrow_watched();
            if now.state != ServerState::Leader || now.vote.leader_id != leader || self.mute().is_set() {
                return false;
            }
            (now.vote, now.membership_config.membership().clone())
        };
        confirm::majority_follows(&self.networks, vote, &membership, self.timers().election_max).await
    }

    /// The majority is asked; openraft's clock need only show that the leader has heard of it lately.
    fn reading(&self) -> LinearizerOption {
        if is_planted("append-clock") {
            return ReadPolicy::ReadIndex.into();
        }
        LinearizerOption::new(None, true)
    }

    /// Whether it leads now, as far as it knows. One that has fallen silent or has stopped does not.
    pub fn is_leader(&self) -> bool {
        let metrics = self.raft().metrics();
        let now = metrics.borrow_watched();
        now.state == ServerState::Leader && now.running_state.is_ok() && !self.mute().is_set()
    }

    /// Shows openraft the last checkpoint, then lets it purge the log up to `upto` (never past the checkpoint).
    pub async fn purge(&self, upto: LogIndex) -> Result<(), GroupError> {
        let number = self.core.borrow().number;
        match self.purge_now(upto).await {
            // Whoever purges goes on: it was the former Raft that has stopped.
            Err(GroupError::Stopped(why)) if self.reloading.get() || self.core.borrow().number != number => {
                Err(GroupError::Refused(format!("Raft was made anew meanwhile: {why}")))
            }
            purged => purged,
        }
    }

    async fn purge_now(&self, upto: LogIndex) -> Result<(), GroupError> {
        let Some(checkpoint) = self.machine.inner.checkpoint() else { return Ok(()) };
        if checkpoint.id.index == LogIndex::ZERO {
            return Ok(());
        }
        self.raft().trigger().snapshot().await.map_err(stopped)?;
        let mut metrics = self.raft().metrics();
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
        self.raft().trigger().purge_log(upto.0).await.map_err(stopped)
    }

    /// The state machine at exactly the last applied entry, for the cleaner.
    pub fn machine(&self) -> &(impl holdfast_store::volume::CheckpointSource + Clone + use<>) {
        &self.machine
    }
    pub(crate) fn adaptor(&self) -> &Machine {
        &self.machine
    }

    /// What the replica knows of itself and, as leader, of the others.
    pub fn report(&self) -> crate::messages::ReplicaReport {
        let metrics = self.raft().metrics();
        let now = metrics.borrow_watched();
        let membership = now.membership_config.membership();
        let index = |id: Option<u64>| LogIndex(id.unwrap_or(0));
        let matched = now.replication.iter().flatten();
        let leads = now.state == ServerState::Leader && now.running_state.is_ok() && !self.mute().is_set();
        // Whoever votes alone is its own quorum, and nobody's answer ever says so.
        let is_alone = membership.voter_ids().eq([self.id.replica.0]) && !self.log.is_hung();
        let has_answers = now
            .last_quorum_acked
            .as_ref()
            .is_some_and(|at| openraft::Instant::elapsed(&**at) <= self.timers().election_max);
        crate::messages::ReplicaReport {
            replica: self.id.replica,
            is_leader: leads,
            has_quorum: is_alone && leads || has_answers || leads && self.is_heard_by_majority(),
            leader: now.current_leader.map(ReplicaId),
            voters: membership.voter_ids().map(ReplicaId).collect(),
            learners: membership.learner_ids().map(ReplicaId).collect(),
            settled_membership: membership.get_joint_config().len() == 1
                && now.membership_config.log_id() == now.committed_membership_config.log_id(),
            term: Term(now.current_term),
            last_log: index(now.last_log_index),
            last_term: self.log.last_term(),
            is_damaged: !self.log.faulty().is_empty(),
            hears_leader: !leads && self.hears_leader(),
            committed: index(now.local_committed.map(|id| id.index)),
            applied: self.machine.position.applied_index(),
            purged: index(now.purged.map(|id| id.index)),
            checkpoint: self.machine.inner.checkpoint().map_or(LogIndex::ZERO, |c| c.id.index),
            matched: matched.map(|(id, at)| (ReplicaId(*id), index(at.map(|at| at.index)))).collect(),
            fault: self.fault().unwrap_or_default(),
            runs: self.timers(),
            owes_silence: self.owes_silence(),
            round_trip_us: self.farthest_voter_us(),
            journal_bytes: self.log.held_bytes(),
            ..Default::default()
        }
    }

    /// Whether another replica that takes itself for the leader was heard a moment ago, or its store for it.
    fn hears_leader(&self) -> bool {
        let called = self.acknowledged.get().map(|at| Instant::now().since(at));
        called.is_some_and(|since| since <= 2 * self.timers().election_max) || self.is_answered_for()
    }

    /// Why Raft has stopped here, if it has.
    pub fn fault(&self) -> Option<String> {
        if self.reloading.get() {
            return None;
        }
        self.raft().metrics().borrow_watched().running_state.as_ref().err().map(ToString::to_string)
    }

    /// Stops the replica. What was acknowledged stays in the journal.
    pub async fn stop(&self) {
        self.streams.clear();
        if let Err(error) = self.raft().shutdown().await {
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
                self.acknowledged.set(Some(Instant::now()));
                let stream = input.u64()?;
                let bytes = input.remaining() + body.len();
                let request = codec::append_request_from(input, body)?;
                self.rest_hears(&request);
                self.hear(&request, bytes);
                if !self.has_room_for(&request.entries) {
                    responder.refuse(NO_ROOM);
                } else if self.check_entries(&request.entries) {
                    self.streams.append(&self.raft(), &self.log, (head.from, stream), request, responder);
                }
            }
            Method::Append => {
                self.acknowledged.set(Some(Instant::now()));
                let bytes = input.remaining() + body.len();
                let request = codec::append_request_from(input, body)?;
                self.rest_hears(&request);
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
                if let Some(why) = self.votes_not().filter(|_| !request.leadership_transfer) {
                    responder.refuse(why);
                    return Ok(());
                }
                self.answer(responder, |raft| async move {
                    raft.vote(request).await.map(|r| codec::vote_response(&r))
                });
            }
            Method::PreVote => {
                let request = codec::vote_request_from(input)?;
                if let Some(why) = self.votes_not() {
                    responder.refuse(why);
                    return Ok(());
                }
                self.answer(responder, |raft| async move {
                    raft.pre_vote(request).await.map(|r| codec::vote_response(&r))
                });
            }
            Method::TransferLeader => {
                let request = codec::transfer_request_from(input)?;
                if self.role == Role::Witness && *request.to_node_id() == self.id.replica.0 {
                    responder.refuse("a witness takes no leadership: it would only hand it on");
                    return Ok(());
                }
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
        let work = call(self.raft().clone());
        holdfast_env::spawn("raft-call", async move {
            match work.await {
                Ok(head) => responder.reply(Frame::small(head)),
                Err(error) => responder.refuse(error.to_string()),
            }
        });
    }

    /// Installs a snapshot that a leader offers; the block content was staged before.
    pub(crate) async fn install(
        self: &Rc<Self>,
        vote: crate::config::Vote,
        meta: crate::config::SnapshotMeta,
        data: SnapshotData,
    ) -> Result<Bytes, GroupError> {
        self.wake_alone();
        let snapshot = crate::config::Snapshot { meta, snapshot: data };
        let response = self.raft().install_full_snapshot(vote, snapshot).await.map_err(stopped)?;
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
