//! One session.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use holdfast_env::Instant;
use holdfast_env::net::Lane;
use holdfast_protocol::command::{AttachMode, Tag, VolumeCommand};
use holdfast_protocol::lease::SessionLease;
use holdfast_protocol::planted::is_planted;
use holdfast_protocol::volume::{Refusal, VolumeReply};
use holdfast_replica::Timers;
use holdfast_replica::messages::{DataReply, DataRequest};
use holdfast_types::{
    AttachmentId, BLOCK_BYTES, BlockRange, ByteSize, Epoch, GroupId, LogIndex, NodeName, Seq, SessionId,
    StoreId, block_checksum, limits,
};
use holdfast_wire::rpc::{CallError, Rpc};
use tokio::sync::{Notify, Semaphore};

use crate::calls::{self, Members};
use crate::floor::{Floor, InFlight};
use crate::lease;
use crate::service::Sessions;
use crate::usage::SessionUsage;

/// How long one call to a replica may take before it is repeated elsewhere. Writes are repeated under the same
/// number, so a slow answer costs a repetition, never a second effect.
const CALL_DEADLINE: Duration = Duration::from_secs(3);
/// The shortest time that an attach waits for one replica; it grows, for a cluster that is slow rather than silent.
const ATTACH_CALL_DEADLINE_MIN: Duration = Duration::from_millis(500);
/// Between repetitions while nobody answers.
const RETRY_PAUSE: Duration = Duration::from_millis(20);

/// Where a volume's replicas are.
#[derive(Clone, Debug)]
pub struct VolumeTarget {
    /// Its group.
    pub group: GroupId,
    /// Stores of its voters.
    pub stores: Vec<StoreId>,
}

/// How to attach.
#[derive(Clone, Debug)]
pub struct AttachOptions {
    /// The node that attaches.
    pub node: NodeName,
    /// Take the volume even if its holder is alive.
    pub force: bool,
    /// Only read.
    pub read_only: bool,
    /// Take over what this node already holds, after a restart of its daemon; refused if anybody else came since.
    pub resume: bool,
    /// Attach in this epoch of the volume or not at all: refused if anybody attached or detached since.
    pub only_at: Option<Epoch>,
    /// Give up after this time.
    pub patience: Duration,
}

/// Why a session has ended.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Closed {
    /// A newer epoch exists.
    #[error("fenced: the volume is at epoch {current} ({why})")]
    Fenced {
        /// The volume's epoch.
        current: Epoch,
        /// What took it.
        why: String,
    },
    /// Detached on request.
    #[error("detached")]
    Detached,
}

/// Why a session could not do what was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// The session has ended.
    #[error("{0}")]
    Closed(Closed),
    /// The request is beyond the volume.
    #[error("{start}+{count} blocks are beyond the volume's end at {blocks}")]
    OutOfRange {
        /// First block.
        start: u64,
        /// Number of blocks.
        count: u32,
        /// Blocks of the volume.
        blocks: u64,
    },
    /// The session was attached to read only.
    #[error("the volume is attached read-only")]
    ReadOnly,
    /// The volume is attached elsewhere, or policy forbids it.
    #[error("{0}")]
    Refused(Refusal),
    /// No quorum answered within the time that the volume's policy or the caller allows.
    #[error("no quorum of the volume's replicas answered within {0:?}")]
    NoQuorum(Duration),
    /// A replica answered what makes no sense.
    #[error("{0}")]
    Failed(String),
}

/// A running session.
pub struct Session {
    rpc: Rpc,
    id: SessionId,
    group: GroupId,
    epoch: Epoch,
    attachment: AttachmentId,
    read_only: bool,
    size: Cell<ByteSize>,
    members: Members,
    /// Other stores of this machine.
    near: Rc<[StoreId]>,
    floor: Floor,
    in_flight: InFlight,
    slots: Semaphore,
    lease: RefCell<SessionLease>,
    lease_changed: Notify,
    error_after: Cell<Option<Duration>>,
    closed: Rc<RefCell<Option<Closed>>>,
    closed_notify: Rc<Notify>,
    /// Writes under way by first block: overlapping ones go one after the other, as a disk's queue would.
    writes: RefCell<BTreeMap<Seq, BlockRange>>,
    write_done: Notify,
    usage: Rc<RefCell<SessionUsage>>,
}

impl Session {
    /// Takes an epoch of the volume.
    pub async fn attach(
        rpc: Rpc,
        sessions: &Sessions,
        target: VolumeTarget,
        options: &AttachOptions,
        timers: &Timers,
    ) -> Result<Rc<Self>, SessionError> {
        let id = SessionId(holdfast_env::random_u128());
        let proposed = AttachmentId(holdfast_env::random_u128());
        let members = Members::new(target.stores.clone());
        // Until a leader says how long the volume's are.
        let terms = holdfast_replica::volume::lease_terms(timers.session_lease);
        let began = Instant::now();
        let mut expected = options.only_at.unwrap_or(Epoch::ZERO);
        let mut deadline = ATTACH_CALL_DEADLINE_MIN;
        let (epoch, attachment, index, next) = loop {
            if began + options.patience < Instant::now() {
                return Err(SessionError::NoQuorum(options.patience));
            }
            let command = VolumeCommand::Attach {
                expected,
                node: options.node.clone(),
                store: rpc.local(),
                session: id,
                attachment: proposed,
                mode: if options.read_only { AttachMode::ReadOnly } else { AttachMode::Exclusive },
                force: options.force,
                confirmed: false,
            };
            let reply = control(&rpc, &members, target.group, &command, deadline).await;
            if reply.is_none() {
                deadline = (deadline * 3 / 2).min(CALL_DEADLINE);
            }
            match reply {
                Some(DataReply::Applied {
                    reply: VolumeReply::Attached { epoch, attachment, index, next },
                    ..
                }) => {
                    break (epoch, attachment, index, next);
                }
                Some(DataReply::Applied { reply: VolumeReply::Refused(refusal), .. }) => match refusal {
                    Refusal::EpochMismatch { current, holder } => {
                        let taken = options.resume && holder.as_ref() != Some(&options.node);
                        if taken || options.only_at.is_some() {
                            return Err(SessionError::Refused(Refusal::EpochMismatch { current, holder }));
                        }
                        expected = current;
                    }
                    refusal if refusal.retryable() => holdfast_env::sleep(RETRY_PAUSE).await,
                    refusal => return Err(SessionError::Refused(refusal)),
                },
                Some(DataReply::Failed(why)) => return Err(SessionError::Failed(why)),
                _ => holdfast_env::sleep(RETRY_PAUSE).await,
            }
        };
        let session = Rc::new(Self {
            rpc,
            id,
            group: target.group,
            epoch,
            attachment,
            read_only: options.read_only,
            size: Cell::new(ByteSize(0)),
            members,
            near: sessions.near(),
            floor: Floor::new(index),
            in_flight: InFlight::new(if is_planted("numbers-from-one") { Seq(1) } else { next }),
            slots: Semaphore::new(limits::SESSION_IN_FLIGHT_MAX),
            lease: RefCell::new(SessionLease::new(terms)),
            lease_changed: Notify::new(),
            error_after: Cell::new(None),
            closed: Rc::default(),
            closed_notify: Rc::new(Notify::new()),
            writes: RefCell::default(),
            write_done: Notify::new(),
            usage: sessions.usage_of(target.group),
        });
        sessions.add(&session);
        holdfast_env::spawn("session-lease", lease::keep(Rc::downgrade(&session)));
        session.wait_for_lease(options.patience).await?;
        Ok(session)
    }

    /// The session's id.
    pub fn id(&self) -> SessionId {
        self.id
    }
    /// Its epoch.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }
    /// Its attachment.
    pub fn attachment(&self) -> AttachmentId {
        self.attachment
    }
    /// The volume's group.
    pub fn group(&self) -> GroupId {
        self.group
    }
    /// Size of the volume; may grow.
    pub fn size(&self) -> ByteSize {
        self.size.get()
    }
    /// Ends when the volume is known to be larger than `known`, with its size; `None` if the session has ended.
    pub async fn grown_beyond(&self, known: ByteSize) -> Option<ByteSize> {
        loop {
            let changed = self.lease_changed.notified();
            if self.closed_now().is_some() {
                return None;
            }
            if self.size.get() > known {
                return Some(self.size.get());
            }
            changed.await;
        }
    }
    /// Whether writes are refused.
    pub fn read_only(&self) -> bool {
        self.read_only
    }
    /// Why it has ended, if it has.
    pub fn closed_now(&self) -> Option<Closed> {
        self.closed.borrow().clone()
    }
    /// Ends when the session has ended.
    pub fn closed(self: &Rc<Self>) -> impl Future<Output = Closed> + use<> {
        let session = self.clone();
        async move {
            session.closed_event().await;
            session.closed_now().unwrap_or(Closed::Detached)
        }
    }

    pub(crate) fn closed_event(&self) -> impl Future<Output = ()> + use<> {
        let (notify, closed) = (self.closed_notify.clone(), self.closed.clone());
        async move {
            loop {
                let notified = notify.notified();
                if closed.borrow().is_some() {
                    return;
                }
                notified.await;
            }
        }
    }
    pub(crate) fn rpc(&self) -> &Rpc {
        &self.rpc
    }
    pub(crate) fn members(&self) -> &Members {
        &self.members
    }
    /// The length of its lease: what was granted last.
    pub(crate) fn lease_length(&self) -> Duration {
        self.lease.borrow().length()
    }
    pub(crate) fn with_lease<T>(&self, use_lease: impl FnOnce(&mut SessionLease) -> T) -> T {
        let result = use_lease(&mut self.lease.borrow_mut());
        self.lease_changed.notify_waiters();
        result
    }
    pub(crate) fn renewed(&self, size: u64, error_after_seconds: u32) {
        self.size.set(ByteSize(size));
        let after = Duration::from_secs(error_after_seconds.into());
        self.error_after.set((error_after_seconds > 0).then_some(after));
        self.lease_changed.notify_waiters();
    }
    pub(crate) fn close(&self, why: Closed) {
        let mut closed = self.closed.borrow_mut();
        if closed.is_none() {
            tracing::warn!(group = %self.group, epoch = %self.epoch, %why, "the session has ended");
            *closed = Some(why);
        }
        drop(closed);
        // INV-LEASE: an answer that is on its way counts no more. The end may be confirmed to others at once, and then
        // nobody waits for the lease.
        self.lease.borrow_mut().end();
        // Whoever waits for a slot must not wait for ever.
        self.slots.close();
        self.closed_notify.notify_waiters();
        self.lease_changed.notify_waiters();
    }

    fn ended(&self) -> SessionError {
        SessionError::Closed(self.closed_now().unwrap_or(Closed::Detached))
    }

    /// Whether it would answer a read at this moment (INV-LEASE).
    pub fn serves_reads(&self) -> bool {
        self.closed_now().is_none() && self.lease_is_valid()
    }

    fn lease_is_valid(&self) -> bool {
        self.lease.borrow().valid(Instant::now().0)
    }

    async fn wait_for_lease(&self, patience: Duration) -> Result<(), SessionError> {
        let wait = async {
            loop {
                let changed = self.lease_changed.notified();
                if let Some(closed) = self.closed_now() {
                    return Err(SessionError::Closed(closed));
                }
                if self.lease_is_valid() && self.size.get().0 > 0 {
                    return Ok(());
                }
                changed.await;
            }
        };
        match holdfast_env::timeout(patience, wait).await {
            Ok(result) => result,
            Err(_) => Err(SessionError::NoQuorum(patience)),
        }
    }

    fn check(&self, range: BlockRange, writing: bool) -> Result<(), SessionError> {
        if let Some(closed) = self.closed_now() {
            return Err(SessionError::Closed(closed));
        }
        if writing && self.read_only {
            return Err(SessionError::ReadOnly);
        }
        let blocks = self.size.get().blocks();
        if range.count == 0 || range.end().0 > blocks {
            return Err(SessionError::OutOfRange { start: range.start.0, count: range.count, blocks });
        }
        Ok(())
    }

    /// Runs `work` until it ends, the session ends, or the volume's policy gives up waiting for a quorum.
    async fn bounded<T>(
        &self,
        work: impl Future<Output = Result<T, SessionError>>,
    ) -> Result<T, SessionError> {
        let closed = self.closed_event();
        if let Some(closed) = self.closed_now() {
            return Err(SessionError::Closed(closed));
        }
        let policy = async {
            match self.error_after.get() {
                Some(after) => {
                    holdfast_env::sleep(after).await;
                    SessionError::NoQuorum(after)
                }
                None => std::future::pending().await,
            }
        };
        futures_util::pin_mut!(work, closed, policy);
        let ended = futures_util::future::select(closed, policy);
        match futures_util::future::select(work, ended).await {
            futures_util::future::Either::Left((result, _)) => result,
            futures_util::future::Either::Right((futures_util::future::Either::Left(_), _)) => {
                Err(SessionError::Closed(self.closed_now().unwrap_or(Closed::Detached)))
            }
            futures_util::future::Either::Right((futures_util::future::Either::Right((error, _)), _)) => {
                Err(error)
            }
        }
    }

    /// Writes whole blocks: durable on a majority when it returns. At most 1 MiB.
    pub async fn write(&self, range: BlockRange, data: Bytes) -> Result<(), SessionError> {
        self.check(range, true)?;
        if data.len() as u64 != range.bytes() || data.len() > limits::REQUEST_BYTES_MAX {
            return Err(SessionError::Failed(format!("{} bytes for {} blocks", data.len(), range.count)));
        }
        let checksums = range
            .blocks()
            .zip(data.chunks_exact(BLOCK_BYTES))
            .map(|(block, data)| block_checksum(block, data))
            .collect();
        self.submit(range, data, |tag| VolumeCommand::Write { tag, range, checksums }).await
    }

    /// Gives blocks back; they read as zeros.
    pub async fn trim(&self, range: BlockRange) -> Result<(), SessionError> {
        self.check(range, true)?;
        self.submit(range, Bytes::new(), |tag| VolumeCommand::Trim { tag, range }).await
    }

    /// Makes blocks zero.
    pub async fn zero(&self, range: BlockRange) -> Result<(), SessionError> {
        self.check(range, true)?;
        self.submit(range, Bytes::new(), |tag| VolumeCommand::Zero { tag, range }).await
    }

    async fn submit(
        &self,
        range: BlockRange,
        payload: Bytes,
        command: impl FnOnce(Tag) -> VolumeCommand,
    ) -> Result<(), SessionError> {
        let (began, bytes) = (Instant::now(), payload.len() as u64);
        let result = self.submit_tagged(range, payload, command).await;
        let took = Instant::now().since(began);
        let mut usage = self.usage.borrow_mut();
        match &result {
            Ok(()) if bytes > 0 => {
                usage.writes.record(took);
                usage.written_bytes += bytes;
            }
            Ok(()) => usage.clears.record(took),
            Err(_) => usage.errors += 1,
        }
        result
    }

    async fn submit_tagged(
        &self,
        range: BlockRange,
        payload: Bytes,
        command: impl FnOnce(Tag) -> VolumeCommand,
    ) -> Result<(), SessionError> {
        let _slot = self.slots.acquire().await.map_err(|_| self.ended())?;
        self.wait_for_overlaps(range).await?;
        let seq = self.in_flight.begin();
        self.writes.borrow_mut().insert(seq, range);
        let mut guard = WriteGuard { session: self, seq, has_ended: false };
        let tag = Tag { epoch: self.epoch, session: self.id, seq, oldest: self.in_flight.oldest() };
        let request = DataRequest::Propose { group: self.group, command: command(tag).encode() };
        let result = self.bounded(self.propose(&request, payload)).await;
        guard.has_ended = true;
        drop(guard);
        if let Err(error) = &result
            && self.closed_now().is_none()
        {
            // INV-LATE: an error was reported, so this write must never land; only a new epoch makes sure.
            let why = format!("a write failed ({error}); attach again");
            self.close(Closed::Fenced { current: self.epoch, why });
        }
        result
    }

    async fn wait_for_overlaps(&self, range: BlockRange) -> Result<(), SessionError> {
        loop {
            let done = self.write_done.notified();
            if let Some(closed) = self.closed_now() {
                return Err(SessionError::Closed(closed));
            }
            let overlaps = self
                .writes
                .borrow()
                .values()
                .any(|other| other.start < range.end() && range.start < other.end());
            if !overlaps {
                return Ok(());
            }
            done.await;
        }
    }

    /// One call to another store; `None` as soon as a leader that is not there has proved itself: what is silent is not
    /// waited for when somebody is known who answers. The call may have its effect all the same: a write's repetition carries the same number (INV-ONCE).
    async fn call_elsewhere(
        &self,
        to: StoreId,
        request: &DataRequest,
        body: Vec<Bytes>,
    ) -> Option<Result<(DataReply, Bytes), CallError>> {
        let call = calls::call(&self.rpc, to, Lane::Bulk, request, body, CALL_DEADLINE);
        let moved = self.members.led_elsewhere(to);
        futures_util::pin_mut!(call, moved);
        match futures_util::future::select(call, moved).await {
            futures_util::future::Either::Left((answer, _)) => Some(answer),
            futures_util::future::Either::Right(_) => None,
        }
    }

    /// Repeats a command under its number until the state machine has answered.
    async fn propose(&self, request: &DataRequest, payload: Bytes) -> Result<(), SessionError> {
        let body = if payload.is_empty() { Vec::new() } else { vec![payload] };
        loop {
            let to = self.members.leader_or_next();
            let Some(answer) = self.call_elsewhere(to, request, body.clone()).await else { continue };
            match answer {
                Ok((DataReply::Applied { index, reply }, _)) => match reply {
                    VolumeReply::Done { .. } => {
                        self.members.set_leader(Some(to));
                        if !is_planted("floor-of-writes-forgotten") {
                            self.floor.raise(index);
                        }
                        return Ok(());
                    }
                    VolumeReply::Refused(refusal) if refusal.retryable() => {}
                    VolumeReply::Refused(refusal) => return Err(self.refused(refusal)),
                    VolumeReply::Attached { .. } | VolumeReply::Snapshotted { .. } => {
                        return Err(SessionError::Failed("a write was answered as another command".into()));
                    }
                },
                Ok((DataReply::Elsewhere { leader, .. }, _)) => {
                    self.members.set_leader(leader);
                    if leader.is_some_and(|leader| leader != to) {
                        continue;
                    }
                }
                Ok((DataReply::Fenced { current, why }, _)) => {
                    let closed = Closed::Fenced { current, why };
                    self.close(closed.clone());
                    return Err(SessionError::Closed(closed));
                }
                Ok((DataReply::Failed(why), _)) => return Err(SessionError::Failed(why)),
                Ok((other, _)) => {
                    return Err(SessionError::Failed(format!("a write was answered {other:?}")));
                }
                Err(error) => {
                    tracing::debug!(%error, "a write is repeated");
                    self.members.set_leader(None);
                }
            }
            // What was damaged on the way is sent again; what was damaged here never gets better.
            check_own(request, body.first())?;
            self.usage.borrow_mut().repeats += 1;
            holdfast_env::sleep(RETRY_PAUSE).await;
        }
    }

    fn refused(&self, refusal: Refusal) -> SessionError {
        match refusal {
            Refusal::OldEpoch { current } => {
                let closed = Closed::Fenced { current, why: "another attachment replaced this one".into() };
                self.close(closed.clone());
                SessionError::Closed(closed)
            }
            Refusal::NotAttached | Refusal::NotHolder => {
                let closed = Closed::Fenced { current: self.epoch, why: refusal.to_string() };
                self.close(closed.clone());
                SessionError::Closed(closed)
            }
            other => SessionError::Refused(other),
        }
    }

    /// Reads whole blocks, at most 1 MiB: the newest acknowledged content, or newer.
    pub async fn read(&self, range: BlockRange) -> Result<Bytes, SessionError> {
        self.check(range, false)?;
        let began = Instant::now();
        let slot = self.slots.acquire().await.map_err(|_| self.ended())?;
        let result = self.bounded(self.read_somewhere(range)).await;
        drop(slot);
        let took = Instant::now().since(began);
        let mut usage = self.usage.borrow_mut();
        match &result {
            Ok(data) => {
                usage.reads.record(took);
                usage.read_bytes += data.len() as u64;
            }
            Err(_) => usage.errors += 1,
        }
        result
    }

    /// Which blocks hold data: runs of (count, 0 data, 1 zero, 2 absent).
    pub async fn block_status(&self, range: BlockRange) -> Result<Vec<(u32, u8)>, SessionError> {
        self.check(range, false)?;
        let make = |floor| DataRequest::BlockStatus {
            group: self.group,
            range,
            epoch: self.epoch,
            session: self.id,
            floor,
        };
        let work = self.ask(make, |reply, _| match reply {
            DataReply::Status { applied, runs } => Some((applied, runs)),
            _ => None,
        });
        self.bounded(work).await
    }

    async fn read_somewhere(&self, range: BlockRange) -> Result<Bytes, SessionError> {
        let make = |floor| DataRequest::Read {
            group: self.group,
            range,
            epoch: self.epoch,
            session: self.id,
            floor,
        };
        self.ask(make, |reply, body| match reply {
            DataReply::Blocks { applied, checksums } => {
                let sums = checksums.iter().zip(range.blocks().zip(body.chunks_exact(BLOCK_BYTES)));
                let whole = body.len() as u64 == range.bytes() && checksums.len() == range.count as usize;
                let intact =
                    whole && sums.into_iter().all(|(sum, (block, data))| block_checksum(block, data) == *sum);
                if !intact {
                    tracing::error!(group = %self.group, "a read was damaged on the way and is repeated");
                    return None;
                }
                Some((applied, body))
            }
            _ => None,
        })
        .await
    }

    /// Asks replicas until one answers at or above the floor while the lease is alive: the local one first, or the one
    /// on another store of this machine, then the leader, then the others (INV-LEASE).
    async fn ask<T>(
        &self,
        make: impl Fn(LogIndex) -> DataRequest,
        accept: impl Fn(DataReply, Bytes) -> Option<(LogIndex, T)>,
    ) -> Result<T, SessionError> {
        loop {
            let local = self.rpc.local();
            let leader = self.members.leader_or_next();
            let mut order = Vec::with_capacity(4);
            let here = std::iter::once(local).chain(self.near.iter().copied());
            order.extend(here.filter(|store| self.members.has(*store)));
            order.push(leader);
            order.extend(self.members.others(leader));
            order.dedup();
            for to in order {
                while !self.lease_is_valid() {
                    let changed = self.lease_changed.notified();
                    if self.lease_is_valid() {
                        break;
                    }
                    changed.await;
                }
                let request = make(self.floor.get());
                let answer = if to == local {
                    calls::call(&self.rpc, to, Lane::Bulk, &request, Vec::new(), CALL_DEADLINE).await
                } else {
                    let Some(answer) = self.call_elsewhere(to, &request, Vec::new()).await else { break };
                    answer
                };
                let (reply, body) = match answer {
                    Ok(answer) => answer,
                    Err(error) => {
                        tracing::debug!(%error, "a read goes to another replica");
                        self.usage.borrow_mut().repeats += 1;
                        continue;
                    }
                };
                match reply {
                    DataReply::Fenced { current, why } => {
                        let closed = Closed::Fenced { current, why };
                        self.close(closed.clone());
                        return Err(SessionError::Closed(closed));
                    }
                    DataReply::Failed(why) => return Err(SessionError::Failed(why)),
                    reply => {
                        let accepted = accept(reply, body);
                        // The lease must still live now: else a newer holder's write may have been acknowledged
                        // before this answer.
                        let lives = self.lease_is_valid() || is_planted("lease-unasked-after-read");
                        if let (Some((applied, value)), true) = (accepted, lives) {
                            self.floor.raise(applied);
                            return Ok(value);
                        }
                    }
                }
            }
            holdfast_env::sleep(RETRY_PAUSE).await;
        }
    }

    /// Ends the session here and now, without a quorum: what is under way fails, and nothing is served any more. The
    /// volume stays held until the session's lease has ended; then anybody may attach it.
    pub fn abort(&self) {
        self.close(Closed::Detached);
    }

    /// Gives the attachment back. Waits for requests under way first.
    pub async fn detach(&self, patience: Duration) -> Result<(), SessionError> {
        let drained = self.slots.acquire_many(limits::SESSION_IN_FLIGHT_MAX as u32);
        // Not drained in time, or ended meanwhile: closing fails what is left.
        if let Ok(Ok(slots)) = holdfast_env::timeout(patience, drained).await {
            slots.forget();
        }
        let began = Instant::now();
        let command = VolumeCommand::Detach { epoch: self.epoch, force: false, confirmed: true };
        // From here on nothing of this session is served, so the holder has confirmed its end.
        self.close(Closed::Detached);
        loop {
            match control(&self.rpc, &self.members, self.group, &command, CALL_DEADLINE).await {
                Some(DataReply::Applied { reply: VolumeReply::Refused(refusal), .. })
                    if !refusal.retryable() =>
                {
                    // Somebody else's epoch is there already: the attachment has ended all the same.
                    tracing::info!(%refusal, "the attachment had ended before its detach");
                    return Ok(());
                }
                Some(DataReply::Applied { reply: VolumeReply::Done { .. }, .. }) => return Ok(()),
                Some(DataReply::Failed(why)) => return Err(SessionError::Failed(why)),
                _ if began + patience < Instant::now() => return Err(SessionError::NoQuorum(patience)),
                _ => holdfast_env::sleep(RETRY_PAUSE).await,
            }
        }
    }
}

/// Whether a write's data is still what its checksums were computed of.
fn check_own(request: &DataRequest, payload: Option<&Bytes>) -> Result<(), SessionError> {
    let (DataRequest::Propose { command, .. }, Some(payload)) = (request, payload) else { return Ok(()) };
    let Ok(VolumeCommand::Write { range, checksums, .. }) = VolumeCommand::decode(command) else {
        return Err(SessionError::Failed("a write was damaged in this node's memory".into()));
    };
    let mut blocks = range.blocks().zip(payload.chunks_exact(BLOCK_BYTES)).zip(&checksums);
    match blocks.find(|((block, data), sum)| block_checksum(*block, data) != **sum) {
        None => Ok(()),
        Some(((block, _), _)) => {
            let why = format!("block {} was damaged in this node's memory before it was written", block.0);
            Err(SessionError::Failed(why))
        }
    }
}

struct WriteGuard<'s> {
    session: &'s Session,
    seq: Seq,
    has_ended: bool,
}

impl Drop for WriteGuard<'_> {
    fn drop(&mut self) {
        if !self.has_ended {
            // INV-LATE: nobody waits for it any more, and it may be on its way still; only a new epoch makes sure that it
            // does not land after what is written next.
            let why = "a write was given up before it was answered; attach again".into();
            self.session.close(Closed::Fenced { current: self.session.epoch, why });
        }
        self.session.in_flight.done(self.seq);
        self.session.writes.borrow_mut().remove(&self.seq);
        self.session.write_done.notify_waiters();
    }
}

/// Asks for a control command once; `None` if nobody could answer this time.
async fn control(
    rpc: &Rpc,
    members: &Members,
    group: GroupId,
    command: &VolumeCommand,
    deadline: Duration,
) -> Option<DataReply> {
    let to = members.leader_or_next();
    let request = DataRequest::Control { group, command: command.encode() };
    match calls::call(rpc, to, Lane::Control, &request, Vec::new(), deadline).await {
        Ok((DataReply::Elsewhere { leader, why }, _)) => {
            tracing::debug!(%why, "a control command goes elsewhere");
            members.set_leader(leader.filter(|leader| *leader != to));
            None
        }
        Ok((reply, _)) => Some(reply),
        Err(error) => {
            tracing::debug!(%error, "a control command goes elsewhere");
            members.set_leader(None);
            None
        }
    }
}
