//! openraft's network over [`Rpc`]: votes and heartbeats on the control lane, appends on the bulk lane, pipelined.
//!
//! Every call has a deadline: the network swallows silently. Nothing is dialled before the first request of a
//! stream was pulled (openraft backs off only inside it), and a stream that met an error waits before the next.

use std::collections::VecDeque;
use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::LocalBoxStream;
use futures_util::{Stream, StreamExt};
use holdfast_env::net::{Frame, Lane};
use holdfast_env::{Instant, Sleep};
use holdfast_protocol::planted::is_planted;
use holdfast_types::{GroupId, LogIndex, ReplicaId, StoreId, Term, Writer};
use holdfast_wire::rpc::{CallError, Pending, Rpc};
use openraft::OptionalSend;
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::network::{Backoff, RPCOption, RaftNetworkFactory, v2::RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendResult, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};

use crate::codec;
use crate::config::{Peer, Role, Snapshot, Types, Vote};
use crate::given_up::GivenUp;
use crate::gray::{Acks, Mute};
use crate::machine::SnapshotData;
use crate::messages::{self, Method};
use crate::past::Grants;
use crate::space::Fulls;
use crate::usage::Counters;

/// Appends of one stream that are under way at once. Two keep the link and the disk busy; more only queue.
pub(crate) const STREAM_IN_FLIGHT_MAX: usize = 4;
/// How long an append may stay unanswered (the follower answers after its flush).
const APPEND_DEADLINE: Duration = Duration::from_secs(5);
/// How long a mere commit waits for an append to carry it. At depth one the next write comes sooner, and a frame and
/// its answer are saved; followers learn of a commit that much later when nothing follows.
const COMMIT_HOLD: Duration = Duration::from_millis(2);
/// Wait after a failed stream before openraft tries again.
const BACKOFF: Duration = Duration::from_millis(50);
/// The same while the medium of the follower is full: it may refuse whatever it is sent.
const FULL_BACKOFF: Duration = Duration::from_millis(500);

/// Makes clients of one replica's peers.
#[derive(Clone)]
pub(crate) struct Networks {
    pub(crate) rpc: Rpc,
    pub(crate) group: GroupId,
    pub(crate) local: ReplicaId,
    pub(crate) counters: Counters,
    pub(crate) mute: Mute,
    pub(crate) acks: Acks,
    pub(crate) grants: Grants,
    pub(crate) fulls: Fulls,
    pub(crate) given_up: GivenUp,
    pub(crate) round_trips: Acks,
    pub(crate) role: Role,
}

/// A client of one peer.
pub(crate) struct Client {
    rpc: Rpc,
    group: GroupId,
    local: ReplicaId,
    target: ReplicaId,
    store: StoreId,
    lane: Lane,
    counters: Counters,
    mute: Mute,
    acks: Acks,
    grants: Grants,
    fulls: Fulls,
    given_up: GivenUp,
    round_trips: Acks,
    role: Role,
}

/// Nothing is sent while the disk below hangs (see [`crate::gray`]).
#[derive(Debug, thiserror::Error)]
#[error("the disk below hangs: this replica is silent")]
struct Silent;

/// Entries that the journal keeps for nobody any more are not sent either.
#[derive(Debug, thiserror::Error)]
#[error("the journal needs the room of what the follower lacks: it gets blocks instead")]
struct NotKept;

/// Whoever needs more than a log holds needs blocks.
#[derive(Debug, thiserror::Error)]
#[error("this leader is a witness and has no blocks to give")]
struct NoBlocks;

fn silent() -> RPCError<Types> {
    RPCError::Unreachable(Unreachable::new(&Silent))
}

fn not_kept() -> RPCError<Types> {
    RPCError::Unreachable(Unreachable::new(&NotKept))
}

impl Networks {
    pub(crate) fn client(&self, target: u64, peer: &Peer, lane: Lane) -> Client {
        Client {
            rpc: self.rpc.clone(),
            group: self.group,
            local: self.local,
            target: ReplicaId(target),
            store: peer.store,
            lane,
            counters: self.counters.clone(),
            mute: self.mute.clone(),
            acks: self.acks.clone(),
            grants: self.grants.clone(),
            fulls: self.fulls.clone(),
            given_up: self.given_up.clone(),
            round_trips: self.round_trips.clone(),
            role: self.role,
        }
    }
}

impl RaftNetworkFactory<Types> for Networks {
    type Network = Client;

    async fn new_client(&mut self, target: u64, peer: &Peer) -> Client {
        self.client(target, peer, Lane::Bulk)
    }

    async fn new_heartbeat_client(&mut self, target: u64, peer: &Peer) -> Client {
        self.client(target, peer, Lane::Control)
    }
}

fn unreachable(error: &CallError) -> RPCError<Types> {
    match error {
        // Asking again at once would only be refused again.
        CallError::Send(_) | CallError::Refused(_) => RPCError::Unreachable(Unreachable::new(error)),
        _ => RPCError::Network(NetworkError::new(error)),
    }
}

fn malformed(error: holdfast_types::DecodeError) -> RPCError<Types> {
    RPCError::Network(NetworkError::new(&error))
}

impl Client {
    fn head(&self, method: Method) -> Writer {
        messages::raft_head(self.group, self.local, self.target, method)
    }

    async fn call(
        &self,
        lane: Lane,
        head: Writer,
        body: Vec<Bytes>,
        deadline: Duration,
    ) -> Result<Bytes, RPCError<Types>> {
        let frame = Frame { head: head.finish(), body };
        let answer = self.rpc.call(self.store, lane, messages::RAFT, frame, deadline).await;
        answer.map(|frame| frame.head).map_err(|error| unreachable(&error))
    }

    fn note_append(&self, request: &AppendEntriesRequest<Types>, body: &[Bytes]) {
        let last = request.entries.last().map(openraft::entry::RaftEntry::log_id);
        let is_catch_up = last.is_some() && last <= request.leader_commit;
        self.counters.count(|usage| {
            usage.appends_sent += 1;
            usage.entries_sent += request.entries.len() as u64;
            if is_catch_up {
                usage.catch_up_bytes_sent += body.iter().map(|part| part.len() as u64).sum::<u64>();
            }
        });
    }

    async fn append(
        &self,
        request: &AppendEntriesRequest<Types>,
        deadline: Duration,
    ) -> Result<AppendEntriesResponse<Types>, RPCError<Types>> {
        if self.mute.is_set() {
            return Err(silent());
        }
        let mut head = self.head(Method::Append);
        let body = codec::append_request(request, &mut head);
        self.note_append(request, &body);
        let sent = Instant::now();
        let answer = self.call(self.lane, head, body, deadline).await?;
        if request.entries.is_empty() && self.lane == Lane::Control {
            // Nothing waits for a disk: a heartbeat, or the question who follows.
            self.round_trips.record(self.target, sent);
        }
        let (response, is_full) = codec::append_response_from(&answer).map_err(malformed)?;
        self.fulls.heard(self.target, is_full);
        Ok(response)
    }

    /// Whether the voter still follows the leader of `vote`: an append of nothing after nothing, which is refused only
    /// if the voter has given its vote to another.
    pub(crate) async fn follows(&self, vote: Vote, deadline: Duration) -> bool {
        let nothing =
            AppendEntriesRequest { vote, prev_log_id: None, entries: Vec::new(), leader_commit: None };
        matches!(self.append(&nothing, deadline).await, Ok(AppendEntriesResponse::Success))
    }

    /// Whether the voter's disk has taken a write since this was asked.
    pub(crate) async fn can_write(&self, deadline: Duration) -> bool {
        let head = self.head(Method::ProveWritable);
        self.call(Lane::Control, head, Vec::new(), deadline).await.is_ok()
    }

    fn start_append(&self, stream: u64, request: &AppendEntriesRequest<Types>) -> Pending {
        let mut head = self.head(Method::StreamAppend);
        head.u64(stream);
        let body = codec::append_request(request, &mut head);
        self.note_append(request, &body);
        let frame = Frame { head: head.finish(), body };
        self.rpc.start(self.store, self.lane, messages::RAFT, frame, APPEND_DEADLINE)
    }
}

impl RaftNetworkV2<Types> for Client {
    type SnapshotData = SnapshotData;

    async fn append_entries(
        &mut self,
        request: AppendEntriesRequest<Types>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<Types>, RPCError<Types>> {
        self.append(&request, option.hard_ttl()).await
    }

    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        _option: RPCOption,
    ) -> futures_util::future::LocalBoxFuture<
        's,
        Result<LocalBoxStream<'s, Result<StreamAppendResult<Types>, RPCError<Types>>>, RPCError<Types>>,
    >
    where
        S: Stream<Item = AppendEntriesRequest<Types>> + OptionalSend + Unpin + 'static,
    {
        Box::pin(async move {
            let pipeline = Pipeline {
                client: self,
                stream: holdfast_env::random_u64(),
                input: Some(input),
                in_flight: VecDeque::new(),
                begun: false,
                held: None,
                refused: None,
                ended: false,
            };
            Ok(futures_util::stream::unfold(pipeline, Pipeline::next).boxed_local())
        })
    }

    async fn vote(
        &mut self,
        request: VoteRequest<Types>,
        option: RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        let mut head = self.head(Method::Vote);
        codec::vote_request(&request, &mut head);
        let answer = self.call(Lane::Control, head, Vec::new(), option.hard_ttl()).await?;
        let response = codec::vote_response_from(&answer).map_err(malformed)?;
        if response.vote_granted {
            let of = request.vote.leader_id;
            self.grants.record(self.target, Term(of.term), ReplicaId(of.node_id));
        }
        Ok(response)
    }

    async fn pre_vote(
        &mut self,
        request: VoteRequest<Types>,
        option: RPCOption,
    ) -> Result<VoteResponse<Types>, RPCError<Types>> {
        let mut head = self.head(Method::PreVote);
        codec::vote_request(&request, &mut head);
        let answer = self.call(Lane::Control, head, Vec::new(), option.hard_ttl()).await?;
        codec::vote_response_from(&answer).map_err(malformed)
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<Types>, StreamingError<Types>> {
        // INV-WITNESS: a witness has no blocks, and what it has purged every data replica has, or only a data replica
        // can give. It leads until one of those takes over, and whoever needs more than its log waits that long.
        if self.role == Role::Witness && !is_planted("witness-sends-a-snapshot") {
            return Err(StreamingError::Unreachable(Unreachable::new(&NoBlocks)));
        }
        let mut head = self.head(Method::InstallSnapshot);
        codec::put_vote(&mut head, &vote);
        codec::snapshot_meta(&snapshot.meta, &mut head);
        let body = vec![snapshot.snapshot.state.clone()];
        let frame = Frame { head: head.finish(), body };
        let work = crate::rebuild::offer(&self.rpc, self.store, frame);
        let answer = futures_util::future::select(Box::pin(work), Box::pin(cancel)).await;
        match answer {
            futures_util::future::Either::Left((Ok(bytes), _)) => {
                let vote =
                    codec::vote_from(&bytes).map_err(|e| StreamingError::Network(NetworkError::new(&e)))?;
                Ok(SnapshotResponse::new(vote))
            }
            futures_util::future::Either::Left((Err(error), _)) => {
                Err(StreamingError::Unreachable(Unreachable::new(&error)))
            }
            futures_util::future::Either::Right((closed, _)) => Err(StreamingError::Closed(closed)),
        }
    }

    async fn transfer_leader(
        &mut self,
        request: TransferLeaderRequest<Types>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<Types>, RPCError<Types>> {
        let mut head = self.head(Method::TransferLeader);
        codec::transfer_request(&request, &mut head);
        self.call(Lane::Control, head, Vec::new(), option.hard_ttl()).await?;
        Ok(Ok(()))
    }

    fn backoff(&self) -> Option<Backoff> {
        let pause = if self.fulls.is_full(self.target) { FULL_BACKOFF } else { BACKOFF };
        Some(Backoff::new(std::iter::repeat(pause)))
    }
}

/// One `stream_append`: requests leave in order, answers are given back in order, and the first error ends it.
struct Pipeline<'c, S> {
    client: &'c mut Client,
    stream: u64,
    input: Option<S>,
    /// What waits for its answer; if it has entries, since when, and the first of them.
    in_flight: VecDeque<(Pending, Option<(Instant, LogIndex)>)>,
    /// Whether a request has left: the first one of a stream is never held, it finds out where the follower stands.
    begun: bool,
    /// A request without entries that only tells of a commit, and until when it waits.
    held: Option<(AppendEntriesRequest<Types>, Sleep)>,
    /// A request came while nothing may be sent, or of entries that are kept for nobody any more.
    refused: Option<fn() -> RPCError<Types>>,
    ended: bool,
}

type StreamItem = Result<StreamAppendResult<Types>, RPCError<Types>>;

impl<S: Stream<Item = AppendEntriesRequest<Types>> + Unpin> Pipeline<'_, S> {
    async fn next(mut self) -> Option<(StreamItem, Self)> {
        if self.ended {
            return None;
        }
        let answer = self.answer().await;
        if let Some(why) = self.refused {
            self.ended = true;
            return Some((Err(why()), self));
        }
        let item = match answer? {
            Ok(frame) => {
                codec::stream_result_from(&frame.head).map_err(malformed).map(|(result, is_full)| {
                    self.client.fulls.heard(self.client.target, is_full);
                    result
                })
            }
            Err(error) => Err(unreachable(&error)),
        };
        self.ended = !matches!(item, Ok(Ok(_)));
        Some((item, self))
    }

    fn send(&mut self, request: &AppendEntriesRequest<Types>) {
        self.begun = true;
        let pending = self.client.start_append(self.stream, request);
        let first = request.entries.first().map(|entry| LogIndex(entry.log_id.index));
        self.in_flight.push_back((pending, first.map(|first| (Instant::now(), first))));
    }

    /// Sends a request, or holds it if it only tells of a commit. What is sent carries the newest commit, so what was
    /// held has been said with it; openraft counts a request as answered by the answer to any later one. (And, in its
    /// clock, by the answer to an earlier one that ends at the same entry: see [`crate::confirm`].)
    fn take(&mut self, request: AppendEntriesRequest<Types>) {
        // On the control lane such a request is a heartbeat.
        let only_commits =
            request.entries.is_empty() && request.prev_log_id.is_some() && self.client.lane == Lane::Bulk;
        if !only_commits || !self.begun {
            self.held = None;
            return self.send(&request);
        }
        let until = match self.held.take() {
            Some((_, until)) => until,
            None => holdfast_env::sleep(COMMIT_HOLD),
        };
        self.held = Some((request, until));
    }

    /// The answer to the oldest request in flight, sending new ones meanwhile. `None` when input and answers ended.
    async fn answer(&mut self) -> Option<Result<Frame, CallError>> {
        let given_up = self.client.given_up.clone();
        let mut grace = None;
        let mut more_given_up = std::pin::pin!(given_up.changed());
        std::future::poll_fn(|context| {
            use std::pin::Pin;
            use std::task::Poll;
            while more_given_up.as_mut().poll(context).is_ready() {
                more_given_up.set(given_up.changed());
            }
            while self.in_flight.len() < STREAM_IN_FLIGHT_MAX {
                let Some(input) = &mut self.input else { break };
                match Pin::new(input).poll_next(context) {
                    Poll::Ready(Some(_)) if self.client.mute.is_set() => {
                        self.refused = Some(silent);
                        return Poll::Ready(None);
                    }
                    Poll::Ready(Some(request)) => self.take(request),
                    Poll::Ready(None) => (self.input, self.held) = (None, None),
                    Poll::Pending => break,
                }
            }
            if self.in_flight.len() < STREAM_IN_FLIGHT_MAX
                && let Some((_, until)) = &mut self.held
                && Pin::new(until).poll(context).is_ready()
                && let Some((request, _)) = self.held.take()
            {
                self.send(&request);
            }
            let Some((first, of)) = self.in_flight.front_mut() else {
                return if self.input.is_none() { Poll::Ready(None) } else { Poll::Pending };
            };
            match Pin::new(first).poll(context) {
                Poll::Ready(answer) => {
                    if let (Ok(_), Some((since, _))) = (&answer, *of) {
                        self.client.acks.record(self.client.target, since);
                    }
                    self.in_flight.pop_front();
                    Poll::Ready(Some(answer))
                }
                Poll::Pending => {
                    let oldest = self.in_flight.iter().find_map(|(_, of)| *of);
                    let until = oldest.and_then(|(sent, first)| given_up.when(sent, first));
                    let Some(until) = until else { return Poll::Pending };
                    while Instant::now() < until {
                        let ends = grace.get_or_insert_with(|| holdfast_env::sleep_until(until));
                        if Pin::new(ends).poll(context).is_pending() {
                            return Poll::Pending;
                        }
                        // It was for an earlier one.
                        grace = None;
                    }
                    self.refused = Some(not_kept);
                    Poll::Ready(None)
                }
            }
        })
        .await
    }
}
