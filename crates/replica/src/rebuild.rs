//! Healing by chunks: a replica whose log has been purged past it compares with the leader and takes what differs.
//!
//! The leader offers its checkpoint (`offer`); the receiver pulls: change marks per chunk, then block checksums of
//! the chunks whose marks differ, then the blocks that differ, into a staging layer that is switched in atomically
//! (INV-STAGE). The leader's content moves on meanwhile, so what is staged is the checkpoint or newer, all of it
//! committed; the receiver serves nothing until it has applied the log up to the leader's applied index at the end,
//! after which it is exact. The leader holds its purge while somebody pulls, and paces writers that outrun it (`hold.rs`).
//!
//! Layers are compared one by one, as the offered checkpoint names them: a layer's content is what all its pieces say
//! together, its mark the latest of them, and absent, zero and data are three things. A frozen layer of the checkpoint
//! must still be one at the source, and the one that was written must still begin where it began; else the pull is
//! refused, the source makes a newer checkpoint, and the rebuild begins again with that. While it holds, what is
//! fuzzy is fuzzy within one layer: each block of it is of some moment after the checkpoint at which the layer was
//! written, and the log after the checkpoint, repeated up to the serve floor, writes, freezes, drops and restores
//! everything again that may have been seen (INV-STAGE).
//!
//! A replica takes one offer at a time: a newer one ends the comparison for the older, and waits for it if it is being
//! switched in. Two at once would write into one staging file.

mod hold;
mod source;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;
use holdfast_env::net::{Frame, Lane};
use holdfast_protocol::planted::is_planted;
use holdfast_protocol::volume::VolumeState;
use holdfast_store::volume::{
    BlockSum, Checkpoint, ChunkSummary, LayerId, LayerMark, ReadError, StagingLayer,
};
use holdfast_store::{InUse, Reserve, StoreError};
use holdfast_types::{
    BlockIndex, BlockRange, ByteSize, CHUNK_BLOCKS, ChunkIndex, DecodeError, GroupId, LogIndex, Reader,
    ReplicaId, StoreId, Writer, limits,
};
use holdfast_wire::rpc::{CallError, Responder, Rpc};
use tokio::sync::Notify;

use crate::codec;
use crate::config::Vote;
use crate::group::GroupError;
use crate::machine::Staged;
use crate::messages;
use crate::rotten_source;
use crate::volume::Volume;
pub(crate) use hold::PurgeHold;
use source::Source;

/// A receiver answers an offer at least this often, done or not.
const POLL: Duration = Duration::from_secs(1);
/// How long the answer to an offer may take, which comes with every poll whatever the rebuild does. One that was lost, in a
/// cut that swallows frames, is made again then: until it is, the receiver gets nothing.
const OFFER_DEADLINE: Duration = POLL.saturating_mul(5);
/// How long a source may take to answer, and after how long it is asked again, in case the question was lost: whichever answer
/// comes first counts.
const CALL_DEADLINE: Duration = Duration::from_secs(10);
const ASK_AGAIN: Duration = Duration::from_secs(5);
/// How long a replica that is being rebuilt applies what it can of its own log first. It may be unable to: what of it
/// is committed, only a leader could tell whose log still has it. So is one whose rebuild was outrun: what it would have to
/// apply is gone where it came from. Without it marks are not trusted, and checksums are compared.
const OWN_LOG_PATIENCE: Duration = Duration::from_secs(1);
/// Change marks per call.
const SUMMARIES_MAX: u32 = 4096;
/// Chunks whose checksums are asked for at once.
const CHECKSUM_CHUNKS_MAX: usize = 64;

const IN_PROGRESS: u8 = 0;
const DONE: u8 = 1;
const FAILED: u8 = 2;

// 1 to 4 did not name layers, 11 to 14 not whom they ask.
const SUMMARIES: u8 = 21;
const CHECKSUMS: u8 = 22;
const BLOCKS: u8 = 23;
const POSITION: u8 = 24;

/// Why a rebuild did not end well.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RebuildError {
    /// The peer did not answer.
    #[error("the peer does not answer: {0}")]
    Call(#[from] CallError),
    /// The peer's message is not understood.
    #[error("the peer's answer is not understood: {0}")]
    Malformed(#[from] DecodeError),
    /// A store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The receiver says why.
    #[error("{0}")]
    Failed(String),
}

/// The leader's side of a snapshot: offers it again and again until the receiver has it.
pub(crate) async fn offer(rpc: &Rpc, to: StoreId, frame: Frame) -> Result<Bytes, RebuildError> {
    loop {
        let answer = rpc.call(to, Lane::Bulk, messages::RAFT, frame.clone(), OFFER_DEADLINE).await?;
        let mut input = Reader::new(&answer.head);
        match input.u8()? {
            IN_PROGRESS => {}
            DONE => return Ok(answer.head.slice(1..)),
            _ => return Err(RebuildError::Failed(String::from_utf8_lossy(&answer.head[1..]).into_owned())),
        }
    }
}

/// What a leader offers to a replica.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Offer {
    /// The replica. A later one of the group on this store begins anew.
    pub(crate) replica: ReplicaId,
    /// The leader's vote.
    pub(crate) vote: Vote,
    /// The checkpoint.
    pub(crate) index: LogIndex,
}

/// One rebuild of a replica that is under way.
pub(crate) struct Receiving {
    offer: Offer,
    outcome: RefCell<Option<Result<Bytes, String>>>,
    ended: Notify,
    given_up: Cell<bool>,
    give_up: Notify,
}

impl Receiving {
    fn give_up(&self) {
        self.given_up.set(true);
        self.give_up.notify_waiters();
    }

    /// Runs what may be broken off: fails as soon as another offer counts.
    pub(crate) async fn unless_given_up<T>(
        &self,
        work: impl Future<Output = Result<T, RebuildError>>,
    ) -> Result<T, RebuildError> {
        let given_up = async {
            loop {
                let notified = self.give_up.notified();
                if self.given_up.get() {
                    return;
                }
                notified.await;
            }
        };
        futures_util::pin_mut!(given_up, work);
        match futures_util::future::select(given_up, work).await {
            futures_util::future::Either::Left(_) => {
                Err(RebuildError::Failed("another offer is taken, or the replica goes".into()))
            }
            futures_util::future::Either::Right((result, _)) => result,
        }
    }

    async fn ended(&self) {
        loop {
            let ended = self.ended.notified();
            if self.outcome.borrow().is_some() {
                return;
            }
            ended.await;
        }
    }
}

/// Rebuilds under way on a shard, at most one per group.
#[derive(Default)]
pub(crate) struct Receivers {
    running: RefCell<BTreeMap<GroupId, Rc<Receiving>>>,
}

impl Receivers {
    /// Answers one offer: starts `work` if it is new, waits a moment, and tells how it stands.
    pub(crate) fn poll(
        self: &Rc<Self>,
        group: GroupId,
        offer: Offer,
        responder: Responder,
        work: impl FnOnce(Rc<Receiving>) -> LocalBoxFuture<'static, Result<Bytes, RebuildError>>,
    ) {
        let before = self.running.borrow().get(&group).cloned();
        let receiving = match before {
            Some(same) if same.offer == offer => same,
            Some(newer) if newer.offer.replica == offer.replica && newer.offer.vote > offer.vote => {
                return responder.refuse("a newer leader's offer is taken");
            }
            before => self.begin(group, offer, before, work),
        };
        let receivers = self.clone();
        holdfast_env::spawn("rebuild-poll", async move {
            // Not ended in time is what is answered.
            let _in_progress = holdfast_env::timeout(POLL, receiving.ended()).await;
            let outcome = receiving.outcome.borrow().clone();
            let mut out = Writer::new();
            match &outcome {
                None => out.u8(IN_PROGRESS),
                Some(Ok(bytes)) => {
                    out.u8(DONE);
                    out.raw(bytes);
                }
                Some(Err(why)) => {
                    out.u8(FAILED);
                    out.raw(why.as_bytes());
                }
            }
            if outcome.is_some() {
                let mut running = receivers.running.borrow_mut();
                if running.get(&group).is_some_and(|now| Rc::ptr_eq(now, &receiving)) {
                    running.remove(&group);
                }
            }
            responder.reply(Frame::small(out.finish()));
        });
    }

    fn begin(
        &self,
        group: GroupId,
        offer: Offer,
        before: Option<Rc<Receiving>>,
        work: impl FnOnce(Rc<Receiving>) -> LocalBoxFuture<'static, Result<Bytes, RebuildError>>,
    ) -> Rc<Receiving> {
        let receiving = Rc::new(Receiving {
            offer,
            outcome: RefCell::new(None),
            ended: Notify::new(),
            given_up: Cell::new(false),
            give_up: Notify::new(),
        });
        self.running.borrow_mut().insert(group, receiving.clone());
        let (task, note) = (work(receiving.clone()), receiving.clone());
        holdfast_env::spawn("rebuild", async move {
            if let Some(before) = before {
                before.give_up();
                before.ended().await;
            }
            let outcome = task.await.map_err(|error| error.to_string());
            *note.outcome.borrow_mut() = Some(outcome);
            note.ended.notify_waiters();
        });
        receiving
    }

    /// Ends what a group receives, and waits for it: its replica goes.
    pub(crate) async fn forget(&self, group: GroupId) {
        let running = self.running.borrow_mut().remove(&group);
        if let Some(receiving) = running {
            receiving.give_up();
            receiving.ended().await;
        }
    }
}

fn put_summary(out: &mut Writer, summary: &ChunkSummary) {
    out.u64(summary.chunk.0);
    out.u64(summary.incarnation);
    summary.last_index.encode(out);
    out.bool(summary.present);
}

fn get_summary(input: &mut Reader<'_>) -> Result<ChunkSummary, DecodeError> {
    Ok(ChunkSummary {
        chunk: ChunkIndex(input.u64()?),
        incarnation: input.u64()?,
        last_index: LogIndex::decode(input)?,
        present: input.bool()?,
    })
}

pub(crate) fn put_sum(out: &mut Writer, sum: &BlockSum) {
    match sum {
        BlockSum::Absent => out.u8(0),
        BlockSum::Zero => out.u8(1),
        BlockSum::Data(crc) => {
            out.u8(2);
            out.u32(*crc);
        }
    }
}

pub(crate) fn get_sum(input: &mut Reader<'_>) -> Result<BlockSum, DecodeError> {
    Ok(match input.u8()? {
        0 => BlockSum::Absent,
        1 => BlockSum::Zero,
        2 => BlockSum::Data(input.u32()?),
        other => return Err(DecodeError::Unknown { what: "block sum", value: other.into() }),
    })
}

/// Serves a receiver's pulls from this replica.
pub(crate) async fn serve(volume: &Volume, mut input: Reader<'_>) -> Result<Frame, RebuildError> {
    // After a restart home may be newer than what is applied: then nobody could tell what the content is as of.
    if !volume.group().position().has_reached(LogIndex::ZERO) {
        return Err(RebuildError::Failed("this replica has not caught up with its own log yet".into()));
    }
    let kind = input.u8()?;
    let (asked, from) = (ReplicaId::decode(&mut input)?, LogIndex::decode(&mut input)?);
    check_source(volume, asked, from)?;
    volume.hold().renew(from);
    let count = input.count("layers", limits::SNAPSHOTS_PER_VOLUME_MAX + 1)?;
    let layers = (0..count).map(|_| LayerMark::decode(&mut input)).collect::<Result<Vec<_>, _>>()?;
    check_layering(volume, &layers)?;
    let answer = answer(volume, kind, &layers, &mut input).await;
    // What was looked at is of these layers only if they were there all the time.
    check_layering(volume, &layers)?;
    let frame = answer?;
    volume.group().counters().count(|usage| usage.chunk_bytes_sent += frame.bytes() as u64);
    Ok(frame)
}

/// INV-STAGE: only who offered the checkpoint is pulled from. In its place another replica of the group may stand here
/// by now, which has nothing yet and would give zeros for what it never had.
fn check_source(volume: &Volume, asked: ReplicaId, from: LogIndex) -> Result<(), RebuildError> {
    let (here, applied) = (volume.group().id().replica, volume.group().position().applied_index());
    if (here == asked && applied >= from) || is_planted("rebuild-from-anybody") {
        return Ok(());
    }
    Err(RebuildError::Failed(format!(
        "replica {asked} offered its content as of index {from}; here is replica {here}, as of {applied}"
    )))
}

/// Refuses a layering that is not this replica's any more; a checkpoint of the one that is will be made.
fn check_layering(volume: &Volume, asked: &[LayerMark]) -> Result<(), RebuildError> {
    let ours = volume.data().layers();
    let stands = |asked: &LayerMark| match asked.frozen {
        Some(_) => ours.contains(asked),
        None => ours.iter().any(|layer| layer.id == asked.id),
    };
    if asked.iter().all(stands) {
        return Ok(());
    }
    volume.machine().want_checkpoint();
    Err(RebuildError::Failed("the layers are other ones by now: a newer checkpoint is made".into()))
}

async fn answer(
    volume: &Volume,
    kind: u8,
    layers: &[LayerMark],
    input: &mut Reader<'_>,
) -> Result<Frame, RebuildError> {
    let mut out = Writer::new();
    let mut body = Vec::new();
    let layer = layers.first().map_or(LayerId::BASE, |layer| layer.id);
    match kind {
        SUMMARIES => {
            let from = ChunkIndex(input.u64()?);
            let count = input.count("chunks", SUMMARIES_MAX as usize)?;
            let summaries = volume.data().chunk_summaries(layer, from, count as u32).await?;
            out.u32(summaries.len() as u32);
            summaries.iter().for_each(|summary| put_summary(&mut out, summary));
        }
        CHECKSUMS => {
            let count = input.count("chunks", CHECKSUM_CHUNKS_MAX)?;
            out.u32(count as u32);
            let until = rotten_source::deadline();
            for _ in 0..count {
                let chunk = ChunkIndex(input.u64()?);
                let sums = rotten_source::checksums(volume, layer, chunk, until).await?;
                sums.iter().for_each(|sum| put_sum(&mut out, sum));
            }
        }
        BLOCKS => {
            let (range, until) = (BlockRange::decode(input)?, rotten_source::deadline());
            let blocks = rotten_source::blocks(volume, layer, range, until).await?;
            blocks.checksums.iter().for_each(|sum| out.u32(*sum));
            body.push(blocks.data);
        }
        POSITION => volume.group().position().applied_index().encode(&mut out),
        other => return Err(DecodeError::Unknown { what: "rebuild call", value: other.into() }.into()),
    }
    Ok(Frame { head: out.finish(), body })
}

/// What a rebuild took.
pub(crate) struct Received {
    /// Content to switch in.
    pub(crate) staged: Rc<dyn Staged>,
    /// Below this index nothing may be served after the switch.
    pub(crate) serve_floor: LogIndex,
    /// Bytes that crossed the network for it.
    pub(crate) bytes: u64,
}

/// Runs to its end what the disk must not see half of, even if the rebuild is given up meanwhile.
async fn undivided<T: 'static>(
    work: impl Future<Output = Result<T, StoreError>> + 'static,
) -> Result<T, StoreError> {
    let ended = holdfast_env::spawn("rebuild-step", work).await;
    ended.unwrap_or_else(|_| Err(StoreError::Failed("a step of the rebuild was broken off".into())))
}

/// Compares this replica's content with that of the source, a replica on a store, and stages what differs.
pub(crate) async fn pull(
    volume: &Volume,
    rpc: &Rpc,
    (replica, store): (ReplicaId, StoreId),
    target: &Checkpoint,
) -> Result<Received, RebuildError> {
    let group = volume.group().id().group;
    let members = codec::membership_from(&target.membership)?;
    let others = members.membership().nodes().map(|(_, peer)| peer.store);
    let source = Source {
        rpc: rpc.clone(),
        replica,
        store,
        others: others.filter(|other| *other != store && *other != rpc.local()).collect(),
        group,
        hold_from: target.id.index,
        received: Cell::new(0),
        counters: volume.group().counters().clone(),
    };
    let state = VolumeState::decode(&target.state)?;
    let layers = layers_of(&state);
    source.position(&layers).await?;
    // The comparison speaks of what is home, and until the switch nothing more is moved there: what the map holds or
    // gets meanwhile is of a log that is about to go. So as much as can be is brought home before.
    let reached = volume.group().position().reached(LogIndex::ZERO);
    let marks_hold = holdfast_env::timeout(OWN_LOG_PATIENCE, reached).await.is_ok();
    let using = volume.log().reserve().filter(|reserve| reserve.is_full()).map(Reserve::in_use);
    if using.is_none() {
        let (data, group) = (volume.data().clone(), volume.group().clone());
        match undivided(async move { data.clean(group.machine()).await }).await {
            Ok(_) => {}
            // A page may be lost, which the rebuild brings. What the map covers equals nothing of the source's.
            Err(error @ StoreError::Damaged { .. }) => {
                tracing::warn!(group = %volume.group().id().group, %error, "not all is brought home before a rebuild");
            }
            Err(error) => return Err(error.into()),
        }
    }
    let (data, marks) = (volume.data().clone(), layers.clone());
    let staging = undivided(async move { data.begin_staging(marks).await }).await?;
    for layer in layers {
        pull_layer(volume, &source, &staging, layer, state.size(), marks_hold).await?;
    }
    let taking = staging.clone();
    undivided(async move { taking.take_room().await }).await?;
    let serve_floor = source.position(&[]).await?;
    let bytes = source.received.get();
    Ok(Received { staged: Rc::new(StagedContent { staging, _using: using }), serve_floor, bytes })
}

/// The layers of a volume in the words of the store.
pub(crate) fn layers_of(state: &VolumeState) -> Vec<LayerMark> {
    let layers = state.layers().into_iter();
    layers.map(|layer| LayerMark { id: LayerId(layer.began), frozen: layer.frozen }).collect()
}

async fn pull_layer(
    volume: &Volume,
    source: &Source,
    staging: &StagingLayer,
    layer: LayerMark,
    size: ByteSize,
    marks_hold: bool,
) -> Result<(), RebuildError> {
    let chunks = size.chunks();
    let mut next = 0;
    while next < chunks {
        let count = SUMMARIES_MAX.min(u32::try_from(chunks - next).unwrap_or(u32::MAX));
        let theirs = source.summaries(layer, ChunkIndex(next), count).await?;
        let mut ours = volume.data().home_summaries(layer, ChunkIndex(next), count).await?;
        if !marks_hold {
            ours.iter_mut().for_each(|summary| summary.last_index = LogIndex::ZERO);
        }
        let differing = differing_chunks(&ours, &theirs);
        for some in differing.chunks(CHECKSUM_CHUNKS_MAX) {
            let sums = source.checksums(layer, some).await?;
            for (chunk, theirs) in some.iter().zip(&sums) {
                stage_chunk(volume, source, staging, layer, *chunk, theirs, size.blocks()).await?;
            }
        }
        next += u64::from(count);
    }
    Ok(())
}

/// Chunks whose change marks differ. Equal marks of one incarnation mean equal content (INV-MARK): both replicas hold
/// what the same prefix of the same log made of the chunk. (A replica that may not serve yet holds blocks newer or older than
/// its marks say. Index zero, which no change has, equals nobody's.)
fn differing_chunks(ours: &[ChunkSummary], theirs: &[ChunkSummary]) -> Vec<ChunkIndex> {
    let mine: BTreeMap<ChunkIndex, &ChunkSummary> =
        ours.iter().map(|summary| (summary.chunk, summary)).collect();
    let mut out: Vec<ChunkIndex> = Vec::new();
    for theirs in theirs {
        let same = mine.get(&theirs.chunk).is_some_and(|ours| {
            let marks = (ours.incarnation, ours.last_index) == (theirs.incarnation, theirs.last_index);
            marks && theirs.last_index > LogIndex::ZERO
        });
        let both_empty = !theirs.present && mine.get(&theirs.chunk).is_none_or(|ours| !ours.present);
        if !same && !both_empty {
            out.push(theirs.chunk);
        }
    }
    let known: BTreeSet<ChunkIndex> = theirs.iter().map(|summary| summary.chunk).collect();
    out.extend(
        ours.iter().filter(|ours| ours.present && !known.contains(&ours.chunk)).map(|ours| ours.chunk),
    );
    out.sort();
    out
}

/// Whether a block of a layer is the same here. In the oldest one nothing is below, and absent is as good as zero.
fn is_same(layer: LayerMark, ours: Option<BlockSum>, theirs: BlockSum) -> bool {
    let is_data = |sum: BlockSum| matches!(sum, BlockSum::Data(_));
    let both_zero = ours.is_some_and(|ours| !is_data(ours)) && !is_data(theirs);
    ours == Some(theirs) || (layer.id == LayerId::BASE && both_zero)
}

async fn stage_chunk(
    volume: &Volume,
    source: &Source,
    staging: &StagingLayer,
    layer: LayerMark,
    chunk: ChunkIndex,
    theirs: &[BlockSum],
    blocks: u64,
) -> Result<(), RebuildError> {
    let ours = volume.data().home_checksums(layer, chunk).await?;
    let first = chunk.first_block();
    let count = CHUNK_BLOCKS.min(blocks.saturating_sub(first.0)) as usize;
    let kind = |at: usize| std::mem::discriminant(&theirs[at]);
    let mut at = 0;
    while at < count {
        if is_same(layer, ours[at], theirs[at]) {
            at += 1;
            continue;
        }
        let differs = |n: &usize| !is_same(layer, ours[*n], theirs[*n]) && kind(*n) == kind(at);
        let end = at + (at..count).take_while(differs).count();
        let range = BlockRange::new(BlockIndex(first.0 + at as u64), (end - at) as u32);
        match theirs[at] {
            BlockSum::Absent => staging.clear(layer.id, range).await?,
            BlockSum::Zero => staging.zero(layer.id, range).await?,
            BlockSum::Data(_) => {
                let (data, sums) = match source.blocks(layer, range).await {
                    Ok(found) => found,
                    // The source may have it on a medium that gives or keeps nothing there: others have the same.
                    Err(error) => {
                        let wanted = &theirs[at..end];
                        rotten_source::blocks_elsewhere(volume, &source.others, layer, range, wanted)
                            .await
                            .ok_or(error)?
                    }
                };
                staging.put(layer.id, range, data, &sums).await?;
            }
        }
        at = end;
    }
    Ok(())
}

struct StagedContent {
    staging: StagingLayer,
    /// On a full medium it stands in the room of the reserve.
    _using: Option<InUse>,
}

impl Staged for StagedContent {
    fn commit(&self, checkpoint: Checkpoint) -> LocalBoxFuture<'static, Result<(), StoreError>> {
        let staging = self.staging.clone();
        Box::pin(async move { staging.commit(checkpoint).await })
    }
}

impl From<ReadError> for RebuildError {
    fn from(error: ReadError) -> Self {
        Self::Failed(error.to_string())
    }
}

impl From<GroupError> for RebuildError {
    fn from(error: GroupError) -> Self {
        Self::Failed(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    const GROUP: GroupId = GroupId(1);

    #[test]
    fn only_equal_marks_of_changes_are_trusted() {
        let summary = |chunk, incarnation, last_index, present| ChunkSummary {
            chunk: ChunkIndex(chunk),
            incarnation,
            last_index: LogIndex(last_index),
            present,
        };
        // Equal; newer there; another incarnation; emptied there; unknown there; of no change; unknown here.
        let ours = [
            summary(0, 1, 5, true),
            summary(1, 1, 5, true),
            summary(2, 1, 5, true),
            summary(3, 1, 5, true),
            summary(4, 1, 5, true),
            summary(5, 1, 0, true),
        ];
        let theirs = [
            summary(0, 1, 5, true),
            summary(1, 1, 6, true),
            summary(2, 2, 5, true),
            summary(3, 1, 9, false),
            summary(5, 1, 7, true),
            summary(6, 1, 7, true),
        ];
        let differing: Vec<u64> = differing_chunks(&ours, &theirs).iter().map(|chunk| chunk.0).collect();
        assert_eq!(differing, [1, 2, 3, 4, 5, 6]);
    }

    fn offer(term: u64, index: u64) -> Offer {
        let vote = Vote::new_committed(term, 1);
        Offer { replica: ReplicaId(3), vote, index: LogIndex(index) }
    }

    fn told(receiving: &Receiving) -> Option<Result<Bytes, String>> {
        receiving.outcome.borrow().clone()
    }

    /// The link broke for a moment, and the leader has made another checkpoint meanwhile.
    #[test]
    fn a_newer_offer_ends_the_comparison_for_the_older_before_it_begins() {
        holdfast_env::real::run(async {
            let receivers = Rc::new(Receivers::default());
            let pulling = Rc::new(Cell::new(0));
            let pull = |receiving: Rc<Receiving>, pulling: Rc<Cell<u32>>| {
                let work = async move {
                    struct Pulling(Rc<Cell<u32>>);
                    impl Drop for Pulling {
                        fn drop(&mut self) {
                            self.0.set(self.0.get() - 1);
                        }
                    }
                    assert_eq!(pulling.replace(1), 0, "two rebuilds write into one staging file");
                    let _pulling = Pulling(pulling);
                    receiving.unless_given_up(std::future::pending::<Result<Bytes, _>>()).await
                };
                work.boxed_local()
            };
            let first = receivers.begin(GROUP, offer(1, 10), None, |r| pull(r, pulling.clone()));
            while pulling.get() == 0 {
                holdfast_env::yield_now().await;
            }
            let second =
                receivers.begin(GROUP, offer(1, 20), Some(first.clone()), |r| pull(r, pulling.clone()));
            first.ended().await;
            assert!(matches!(told(&first), Some(Err(_))));
            while pulling.get() == 0 {
                holdfast_env::yield_now().await;
            }
            assert_eq!(told(&second), None);
            receivers.forget(GROUP).await;
            assert!(matches!(told(&second), Some(Err(_))), "the replica went, and what it received with it");
            assert!(receivers.running.borrow().is_empty());
        });
    }

    #[test]
    fn a_switch_that_is_under_way_is_waited_for() {
        holdfast_env::real::run(async {
            let receivers = Rc::new(Receivers::default());
            let switched = Rc::new(Notify::new());
            let switching = switched.clone();
            let first = receivers.begin(GROUP, offer(1, 10), None, |_| {
                async move {
                    switching.notified().await;
                    Ok(Bytes::from_static(b"done"))
                }
                .boxed_local()
            });
            let begun = Rc::new(Cell::new(false));
            let note = begun.clone();
            let second = receivers.begin(GROUP, offer(2, 20), Some(first.clone()), |_| {
                async move {
                    note.set(true);
                    Ok(Bytes::new())
                }
                .boxed_local()
            });
            for _ in 0..100 {
                holdfast_env::yield_now().await;
            }
            assert!(!begun.get(), "its staging file would be taken from under it");
            switched.notify_one();
            second.ended().await;
            assert_eq!(told(&first), Some(Ok(Bytes::from_static(b"done"))));
        });
    }
}
