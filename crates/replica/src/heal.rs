//! Read repair: what home does not hold as it should is fetched from other replicas and put back, layer by layer.
//!
//! Whoever reads a bad block is answered by another replica at once ([`crate::volume`]); the chunk is noted, and this
//! task heals it behind the reader's back, one chunk of a volume at a time. A peer is asked that has applied at least as
//! much as this replica, and what it sends is checked against this replica's own table, address included. Only where the
//! table is lost, or where every peer holds something else than it says, the chunk is taken as a peer has it; the store
//! refuses what is of another time (INV-HEAL).
//!
//! A peer is asked for a chunk of one layer, which is named with its end, and tells what that layer holds, whatever is
//! above or below: so what the head hides is healed, too. A peer that has no such layer is of another time, and says so.
//!
//! What cannot be healed now is tried again, less and less often: the peers may be away, or the medium may refuse.

use std::collections::BTreeMap;
use std::rc::{Rc, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use holdfast_env::Instant;
use holdfast_env::net::{Frame, Lane};
use holdfast_store::StoreError;
use holdfast_store::journal::Journal;
use holdfast_store::volume::{BlockSum, ChunkContent, ChunkNow, Finding, LayerMark, ReadError};
use holdfast_types::{
    BLOCK_BYTES, BlockIndex, BlockRange, CHUNK_BLOCKS, ChunkIndex, DecodeError, GroupId, LogIndex, Reader,
    StoreId, Writer, block_checksum,
};
use holdfast_wire::rpc::CallError;

use crate::compare::{self, Verdict};
use crate::messages;
use crate::rebuild::{get_sum, put_sum};
use crate::volume::Volume;

/// How long one call to a peer may take.
const CALL_DEADLINE: Duration = Duration::from_secs(5);
/// How long a peer waits until it has applied as far as the asker.
const APPLY_PATIENCE: Duration = Duration::from_secs(1);
/// How long the asker waits until it has applied and flushed what a peer's chunk shows.
const FOLLOW_PATIENCE: Duration = Duration::from_secs(1);
/// Looks at a chunk that is being written, until it holds still.
const LOOKS_MAX: usize = 8;
/// Chunks that one call tells of.
pub(crate) const CHUNKS_MAX: usize = 64;
/// Between tries of a chunk that could not be healed; doubles.
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(300);
/// Chunks that are tried again; what does not fit is found again by reads and by the scrub.
const RETRIES_MAX: usize = 1024;

// Kinds of questions.
const CHUNKS: u8 = 1;
pub(crate) const DIGESTS: u8 = 2;

pub(crate) const LOST: u8 = 0;
pub(crate) const HELD: u8 = 1;
/// As lost; some of the blocks that were wanted follow, which may be old.
const OLD: u8 = 2;

/// Why a peer could not tell.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum HealError {
    /// The peer did not answer.
    #[error("the peer does not answer: {0}")]
    Call(#[from] CallError),
    /// The peer's message is not understood.
    #[error("the peer's answer is not understood: {0}")]
    Malformed(#[from] DecodeError),
    /// A store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The peer says why.
    #[error("{0}")]
    Failed(String),
}

/// What a replica says of one of its chunks.
#[derive(Clone, Debug)]
pub(crate) struct Told {
    pub(crate) chunk: ChunkIndex,
    /// What it had applied then.
    pub(crate) applied: LogIndex,
    /// What the chunk holds; `None` if it does not know.
    pub(crate) now: Option<ChunkNow>,
    /// Blocks that it gives although it does not know what the chunk holds: only a checksum tells what they are worth.
    old: u64,
}

fn put_told(out: &mut Writer, told: &Told) {
    told.applied.encode(out);
    let Some(now) = &told.now else {
        if told.old == 0 {
            return out.u8(LOST);
        }
        out.u8(OLD);
        return out.u64(told.old);
    };
    out.u8(HELD);
    out.u64(now.incarnation);
    now.last_index.encode(out);
    now.sums.iter().for_each(|sum| put_sum(out, sum));
}

fn get_told(input: &mut Reader<'_>, chunk: ChunkIndex) -> Result<Told, DecodeError> {
    let applied = LogIndex::decode(input)?;
    let mut old = 0;
    let now = match input.u8()? {
        LOST => None,
        OLD => {
            old = input.u64()?;
            None
        }
        HELD => Some(ChunkNow {
            incarnation: input.u64()?,
            last_index: LogIndex::decode(input)?,
            sums: (0..CHUNK_BLOCKS).map(|_| get_sum(input)).collect::<Result<_, _>>()?,
        }),
        other => return Err(DecodeError::Unknown { what: "chunk", value: other.into() }),
    };
    Ok(Told { chunk, applied, now, old })
}

/// What this replica holds of a chunk of a layer, and as of when; `None` if it has no such layer.
pub(crate) async fn look(
    volume: &Volume,
    layer: LayerMark,
    chunk: ChunkIndex,
) -> Result<Option<Told>, StoreError> {
    let now = match volume.data().chunk_now(layer, chunk).await {
        Ok(now) => Some(now),
        Err(ReadError::Store(StoreError::Damaged { .. })) => None,
        Err(ReadError::Store(error)) => return Err(error),
        Err(_) => return Ok(None),
    };
    // No wait since the look: this is what had been applied at it.
    Ok(Some(Told { chunk, applied: volume.group().position().applied_index(), now, old: 0 }))
}

fn other_layers() -> HealError {
    HealError::Failed("this replica has no such layer".into())
}

/// Answers a peer's question.
pub(crate) async fn serve(volume: &Volume, mut input: Reader<'_>) -> Result<Frame, HealError> {
    let at_least = LogIndex::decode(&mut input)?;
    let reached = volume.group().position().reached(at_least);
    if holdfast_env::timeout(APPLY_PATIENCE, reached).await.is_err() {
        return Err(HealError::Failed("this replica is behind".into()));
    }
    match input.u8()? {
        CHUNKS => serve_chunks(volume, input).await,
        DIGESTS => compare::serve_digests(volume, input).await,
        other => Err(DecodeError::Unknown { what: "question about chunks", value: other.into() }.into()),
    }
}

/// Tells a peer of chunks of a layer, with the blocks of them that it wants.
async fn serve_chunks(volume: &Volume, mut input: Reader<'_>) -> Result<Frame, HealError> {
    let layer = LayerMark::decode(&mut input)?;
    let count = input.count("chunks", CHUNKS_MAX)?;
    let chunks: Vec<ChunkIndex> =
        (0..count).map(|_| input.u64().map(ChunkIndex)).collect::<Result<_, _>>()?;
    let wanted = input.u64()?;
    input.end()?;
    let mut out = Writer::new();
    let mut body = Vec::new();
    out.u32(chunks.len() as u32);
    for chunk in &chunks {
        let told = if wanted == 0 {
            look(volume, layer, *chunk).await?.ok_or_else(other_layers)?
        } else {
            let (told, blocks) = look_with_blocks(volume, layer, *chunk, wanted).await?;
            body.extend(blocks);
            told
        };
        put_told(&mut out, &told);
    }
    Ok(Frame { head: out.finish(), body })
}

/// Wanted data blocks of a chunk of a layer, in order, and what the chunk was when they were read.
async fn look_with_blocks(
    volume: &Volume,
    layer: LayerMark,
    chunk: ChunkIndex,
    wanted: u64,
) -> Result<(Told, Vec<Bytes>), HealError> {
    for _ in 0..LOOKS_MAX {
        let before = look(volume, layer, chunk).await?.ok_or_else(other_layers)?;
        let Some(now) = &before.now else { return old_blocks(volume, layer, before, wanted).await };
        let mut blocks = Vec::new();
        for block in data_blocks(chunk, now, wanted) {
            let read = volume.data().read_layer(layer.id, BlockRange::new(block, 1)).await;
            blocks.push(read.map_err(|error| HealError::Failed(error.to_string()))?.data);
        }
        let after = look(volume, layer, chunk).await?.ok_or_else(other_layers)?;
        if after.now == before.now {
            return Ok((after, blocks));
        }
    }
    Err(HealError::Failed("the chunk is being written".into()))
}

/// What is left of a chunk whose page is not believed. Who wants all of it wants to know what it holds, and nobody here
/// does.
async fn old_blocks(
    volume: &Volume,
    layer: LayerMark,
    told: Told,
    wanted: u64,
) -> Result<(Told, Vec<Bytes>), HealError> {
    if wanted == u64::MAX {
        return Ok((told, Vec::new()));
    }
    let blocks = volume.data().old_blocks(layer, told.chunk, wanted).await?;
    let old = blocks.iter().fold(0, |mask, (block, _)| mask | 1 << block.within_chunk());
    Ok((Told { old, ..told }, blocks.into_iter().map(|(_, data)| data).collect()))
}

/// The blocks of a mask that are data.
fn data_blocks(chunk: ChunkIndex, now: &ChunkNow, mask: u64) -> Vec<BlockIndex> {
    let is_data = |block: &BlockIndex| matches!(now.sums[block.within_chunk()], BlockSum::Data(_));
    blocks_of(chunk, mask).into_iter().filter(is_data).collect()
}

fn blocks_of(chunk: ChunkIndex, mask: u64) -> Vec<BlockIndex> {
    let of_mask = (0..CHUNK_BLOCKS).filter(|n| mask >> n & 1 == 1);
    of_mask.map(|n| BlockIndex(chunk.first_block().0 + n)).collect()
}

/// The beginning of a question. INV-HEAL: one that is behind does not answer it.
pub(crate) fn question(volume: &Volume, kind: u8) -> Writer {
    let mut head = Writer::new();
    let group: GroupId = volume.group().id().group;
    group.encode(&mut head);
    volume.group().position().applied_index().encode(&mut head);
    head.u8(kind);
    head
}

pub(crate) async fn call(volume: &Volume, store: StoreId, question: Writer) -> Result<Frame, HealError> {
    let frame = Frame::small(question.finish());
    Ok(volume.rpc().call(store, Lane::Bulk, messages::HEAL, frame, CALL_DEADLINE).await?)
}

/// Asks the replica on another store for chunks of a layer, as of what is applied here or later; with the data blocks of
/// a mask, which must be what that replica says of them.
pub(crate) async fn ask(
    volume: &Volume,
    store: StoreId,
    layer: LayerMark,
    chunks: &[ChunkIndex],
    wanted: u64,
) -> Result<Vec<(Told, Vec<(BlockIndex, Bytes)>)>, HealError> {
    let mut head = question(volume, CHUNKS);
    layer.encode(&mut head);
    head.u32(chunks.len() as u32);
    chunks.iter().for_each(|chunk| head.u64(chunk.0));
    head.u64(wanted);
    let answer = call(volume, store, head).await?;
    let head = answer.head.clone();
    let mut body = answer.into_body();
    let mut input = Reader::new(&head);
    let count = input.count("chunks", CHUNKS_MAX)?;
    if count != chunks.len() {
        return Err(HealError::Failed(format!("{count} chunks came for {}", chunks.len())));
    }
    let mut out = Vec::with_capacity(count);
    for chunk in chunks {
        let told = get_told(&mut input, *chunk)?;
        let given = match &told.now {
            Some(now) => data_blocks(*chunk, now, wanted),
            None => blocks_of(*chunk, told.old & wanted),
        };
        let mut blocks = Vec::new();
        for block in given {
            if body.len() < BLOCK_BYTES {
                return Err(HealError::Failed("blocks are missing".into()));
            }
            let data = body.split_to(BLOCK_BYTES);
            let sum = BlockSum::Data(block_checksum(block, &data));
            if told.now.as_ref().is_some_and(|now| now.sums[block.within_chunk()] != sum) {
                return Err(HealError::Failed(format!("block {} was damaged on the way", block.0)));
            }
            blocks.push((block, data));
        }
        out.push((told, blocks));
    }
    Ok(out)
}

/// Whom to ask: the leader, then the other voters. A store has one voice, also while a replica that leaves and its
/// successor both stand there.
pub(crate) fn peers(volume: &Volume) -> Vec<StoreId> {
    let group = volume.group();
    let leader = group.leader().map(|(_, store)| store);
    let voters = group.voters();
    let others =
        group.data_members().into_iter().filter(|(id, _)| *id != group.id().replica && voters.contains(id));
    let mut stores: Vec<StoreId> = others.map(|(_, store)| store).collect();
    stores.sort_by_key(|store| (Some(*store) != leader, *store));
    stores.dedup();
    stores
}

/// Chunks that could not be healed yet: when to try again, and how long to wait after that.
type Retries = BTreeMap<ChunkIndex, (Instant, Duration)>;

/// Heals one volume until it stops or its store fails.
pub(crate) async fn run(volume: Weak<Volume>, journal: Journal) {
    let mut retries = Retries::new();
    loop {
        let Some(this) = volume.upgrade().filter(|this| !this.is_stopped()) else { return };
        if journal.failed().is_some() {
            return;
        }
        let now = Instant::now();
        let due = || retries.iter().find(|(_, (at, _))| *at <= now).map(|(chunk, _)| *chunk);
        let Some(chunk) = this.data().take_suspect().or_else(due) else {
            let next = retries.values().map(|(at, _)| *at).min();
            wait(&this, next).await;
            continue;
        };
        match heal(&this, chunk).await {
            Ok(true) => _ = retries.remove(&chunk),
            Ok(false) => put_off(&mut retries, chunk),
            Err(error) => {
                tracing::warn!(group = %this.group().id().group, chunk = chunk.0, %error, "a chunk is not healed");
                put_off(&mut retries, chunk);
            }
        }
    }
}

async fn wait(volume: &Rc<Volume>, until: Option<Instant>) {
    let suspected = volume.data().suspected();
    match until {
        Some(until) => {
            let due = holdfast_env::sleep_until(until);
            futures_util::pin_mut!(suspected, due);
            futures_util::future::select(suspected, due).map(drop).await;
        }
        None => suspected.await,
    }
}

fn put_off(retries: &mut Retries, chunk: ChunkIndex) {
    let pause = retries.get(&chunk).map_or(RETRY_MIN, |(_, pause)| (*pause * 2).min(RETRY_MAX));
    if retries.len() < RETRIES_MAX || retries.contains_key(&chunk) {
        retries.insert(chunk, (Instant::now() + pause, pause));
    }
}

/// Heals what is bad of a chunk, in every layer; true if nothing is any more.
pub(crate) async fn heal(volume: &Volume, chunk: ChunkIndex) -> Result<bool, StoreError> {
    // Before that, home may be newer than its table (INV-STAGE).
    let served = volume.group().position().reached(LogIndex::ZERO);
    if holdfast_env::timeout(FOLLOW_PATIENCE, served).await.is_err() {
        return Ok(false);
    }
    let mut is_whole = true;
    for layer in volume.data().layers() {
        is_whole &= match volume.data().verify_chunk(layer.id, chunk).await? {
            Finding::Whole => true,
            Finding::Bad(blocks) => heal_blocks(volume, layer, chunk, blocks).await?,
            Finding::Lost => replace(volume, layer, chunk).await?,
        };
    }
    Ok(is_whole)
}

async fn heal_blocks(
    volume: &Volume,
    layer: LayerMark,
    chunk: ChunkIndex,
    mut bad: Vec<BlockIndex>,
) -> Result<bool, StoreError> {
    // Whether anybody holds other blocks than this replica's table says, and whether anybody holds those.
    let (mut other, mut same) = (false, false);
    for store in peers(volume) {
        let mask = bad.iter().fold(0, |mask, block| mask | 1 << block.within_chunk());
        let (told, blocks) = match ask(volume, store, layer, &[chunk], mask).await.map(|mut all| all.pop()) {
            Ok(Some((told, blocks))) if told.now.is_some() || !blocks.is_empty() => (told, blocks),
            Ok(_) => continue,
            Err(error) => {
                tracing::debug!(%store, chunk = chunk.0, %error, "a peer does not heal a chunk");
                continue;
            }
        };
        match volume.data().heal_blocks(layer.id, chunk, &blocks).await? {
            Finding::Whole => return Ok(true),
            Finding::Lost => return replace(volume, layer, chunk).await,
            Finding::Bad(left) => bad = left,
        }
        if told.now.is_none() {
            continue;
        }
        match same_sums(volume, layer, &told, &bad).await? {
            true => same = true,
            false => other = true,
        }
    }
    // If a peer sent what the table says, the medium does not keep it: nothing else would be kept, either.
    if other && !same { replace(volume, layer, chunk).await } else { Ok(false) }
}

async fn same_sums(
    volume: &Volume,
    layer: LayerMark,
    told: &Told,
    blocks: &[BlockIndex],
) -> Result<bool, StoreError> {
    let ours = look(volume, layer, told.chunk).await?.and_then(|ours| ours.now);
    let (Some(ours), Some(theirs)) = (ours, &told.now) else { return Ok(false) };
    Ok(blocks.iter().all(|block| {
        let n = block.within_chunk();
        theirs.sums[n] == ours.sums[n]
    }))
}

/// Takes a chunk of a layer as the others have it, since what this replica knows of it is lost or wrong.
async fn replace(volume: &Volume, layer: LayerMark, chunk: ChunkIndex) -> Result<bool, StoreError> {
    match compare::judge(volume, layer, chunk, true).await? {
        Verdict::Take(store) => adopt_from(volume, layer, chunk, store).await,
        Verdict::Keep | Verdict::Unsettled => Ok(false),
    }
}

/// Takes a chunk of a layer, or the page of chunks that it belongs to, as a peer has it; false if that cannot be done now.
pub(crate) async fn adopt_from(
    volume: &Volume,
    layer: LayerMark,
    chunk: ChunkIndex,
    store: StoreId,
) -> Result<bool, StoreError> {
    let mut contents = Vec::new();
    for chunk in volume.data().chunks_to_adopt(layer, chunk).await? {
        match ask(volume, store, layer, &[chunk], u64::MAX).await.map(|mut all| all.pop()) {
            Ok(Some((Told { applied, now: Some(now), .. }, blocks))) => {
                contents.push(ChunkContent { chunk, now, applied, blocks });
            }
            Ok(_) => return Ok(false),
            Err(error) => {
                tracing::debug!(%store, chunk = chunk.0, %error, "a peer does not give a chunk");
                return Ok(false);
            }
        }
    }
    // The peer may show what has not arrived here yet.
    let newest = contents.iter().map(|content| content.now.last_index).max().unwrap_or_default();
    let position = volume.group().position();
    let here = async {
        position.reached(newest).await;
        while volume.log().flushed() < newest {
            holdfast_env::sleep(Duration::from_millis(5)).await;
        }
    };
    if holdfast_env::timeout(FOLLOW_PATIENCE, here).await.is_err() {
        return Ok(false);
    }
    volume.data().adopt(layer, &contents, position.applied_index()).await
}
