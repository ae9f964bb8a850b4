//! Healing: what home and table should hold is compared with what they do hold, and made so again.
//!
//! The table's checksum, address included, says what a home block must be. A block that is that may be written over
//! home at any time: it is what home holds anyway, or what the journal repeats (INV-HEAL). Where the table itself is
//! lost or shown to be old, whole chunks are adopted from another replica: only such that tell of a change that is
//! flushed and applied here, and of no time before this replica's checkpoint, so that the journal repeats the rest. In
//! a volume with several layers blocks are healed in whichever layer has them, and no chunk is adopted.
//!
//! Owns the list of what reads found bad. It asks nobody: whoever fetches blocks from peers gives them to
//! [`VolumeData::heal_blocks`] and [`VolumeData::adopt`]. Everything that is written is written under the cleaner's
//! lock.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use bytes::Bytes;
use holdfast_env::disk::{AlignedBuffer, Durability};
use holdfast_types::{
    BLOCK_BYTES, BlockIndex, BlockRange, CHUNK_BLOCKS, CHUNK_BYTES, ChunkIndex, LogIndex, block_checksum,
};
use tokio::sync::Notify;

use super::layers::{LayerId, Piece, PieceFiles};
use super::marks::sum_of;
use super::table::{BlockSum, Chunk, PageFound, Table};
use super::{Change, VolumeData};
use crate::StoreError;
use crate::journal::planted;

/// Chunks that are noted as suspect at once. What does not fit is found by the next read of it, or by the scrub.
const SUSPECTS_MAX: usize = 1024;
/// Blocks in a row that cannot be read, after which the rest of a range is taken for unreadable, too: each may take
/// the medium seconds.
const UNREADABLE_MAX: usize = 8;

/// What was found to be bad since the replica was opened, and what became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Health {
    /// Blocks that did not match their checksums or could not be read, each counted once until it is well again.
    pub found_blocks: u64,
    /// Blocks that were written anew and match again.
    pub healed_blocks: u64,
    /// Table pages that were written anew, from their other copy, from memory or from a peer.
    pub healed_pages: u64,
    /// Chunks that differed from what the other replicas agree on, and were replaced by it.
    pub replaced_chunks: u64,
    /// Blocks that are bad now.
    pub bad_blocks: u64,
}

/// What reads found bad, and what was confirmed of it.
#[derive(Default)]
pub(super) struct Suspects {
    waiting: RefCell<BTreeSet<ChunkIndex>>,
    found: Notify,
    /// Bad blocks of each chunk, a bit per block; of a chunk whose page is lost, all.
    bad: RefCell<BTreeMap<ChunkIndex, u64>>,
    counted: Cell<Health>,
}

/// How a chunk is at home.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// As it should be.
    Whole,
    /// These blocks are not what the table says. (Of what the block map covers home says nothing.)
    Bad(Vec<BlockIndex>),
    /// The table's page is lost: nobody here knows what the chunk holds.
    Lost,
}

/// What a chunk holds now, as this replica shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkNow {
    /// Incarnation of its last change.
    pub incarnation: u64,
    /// Entry of its last change; zero before the first.
    pub last_index: LogIndex,
    /// How each block is.
    pub sums: Vec<BlockSum>,
}

impl ChunkNow {
    /// Whether every block reads the same. What is absent and what is zero reads as zeros.
    pub fn reads_as(&self, other: &Self) -> bool {
        let data = |sum: &BlockSum| match sum {
            BlockSum::Data(crc) => Some(*crc),
            BlockSum::Zero | BlockSum::Absent => None,
        };
        self.sums.iter().map(data).eq(other.sums.iter().map(data))
    }
}

/// A chunk of another replica, to be adopted.
#[derive(Clone, Debug)]
pub struct ChunkContent {
    /// Which.
    pub chunk: ChunkIndex,
    /// What it is there.
    pub now: ChunkNow,
    /// What that replica had applied when it said so: the chunk did not change between its last change and then.
    pub applied: LogIndex,
    /// Its data blocks.
    pub blocks: Vec<(BlockIndex, Bytes)>,
}

impl VolumeData {
    /// Notes that blocks do not match, for the healer.
    pub(super) fn suspect(&self, blocks: &[u64]) {
        blocks.iter().for_each(|block| self.suspect_chunk(BlockIndex(*block).chunk()));
    }

    /// Notes that a chunk is to be looked at.
    pub fn suspect_chunk(&self, chunk: ChunkIndex) {
        let mut waiting = self.0.suspects.waiting.borrow_mut();
        if waiting.len() < SUSPECTS_MAX {
            waiting.insert(chunk);
            self.0.suspects.found.notify_one();
        }
    }

    /// Takes a chunk that is to be looked at.
    pub fn take_suspect(&self) -> Option<ChunkIndex> {
        self.0.suspects.waiting.borrow_mut().pop_first()
    }

    /// Ends when a chunk was noted, or [`Self::wake_healer`] was called. One waits at a time.
    pub async fn suspected(&self) {
        self.0.suspects.found.notified().await;
    }

    /// Ends [`Self::suspected`].
    pub fn wake_healer(&self) {
        self.0.suspects.found.notify_one();
    }

    /// What was found and healed.
    pub fn health(&self) -> Health {
        let bad = self.0.suspects.bad.borrow().values().map(|mask| u64::from(mask.count_ones())).sum();
        Health { bad_blocks: bad, ..self.0.suspects.counted.get() }
    }

    fn count_health(&self, more: impl FnOnce(&mut Health)) {
        let mut counted = self.0.suspects.counted.get();
        more(&mut counted);
        self.0.suspects.counted.set(counted);
    }

    fn note(&self, chunk: ChunkIndex, finding: &Finding) {
        let mask = match finding {
            Finding::Whole => 0,
            Finding::Bad(blocks) => blocks.iter().fold(0, |mask, block| mask | 1 << block.within_chunk()),
            Finding::Lost => u64::MAX,
        };
        let mut bad = self.0.suspects.bad.borrow_mut();
        let before = if mask == 0 { bad.remove(&chunk) } else { bad.insert(chunk, mask) };
        let new = u64::from((mask & !before.unwrap_or(0)).count_ones());
        if new > 0 {
            tracing::error!(replica = %self.0.prefix, chunk = chunk.0, new, "blocks at home are bad");
        }
        self.count_health(|health| health.found_blocks += new);
    }

    /// Reads blocks of home; those that the medium does not give are returned, and zeros stand in their places.
    pub(super) async fn read_home_blocks(
        &self,
        files: &PieceFiles,
        first: BlockIndex,
        place: &mut [u8],
    ) -> Vec<BlockIndex> {
        self.count(|usage| usage.home_bytes_read += place.len() as u64);
        let error = match files.home.read_at(first.byte_offset(), place.len()).await {
            Ok(data) => {
                place.copy_from_slice(data.as_slice());
                return Vec::new();
            }
            Err(error) => error,
        };
        tracing::error!(replica = %self.0.prefix, block = first.0, %error, "home cannot be read");
        self.count(|usage| usage.read_errors += 1);
        let mut unreadable = Vec::new();
        let mut in_a_row = 0;
        for (n, part) in (0u64..).zip(place.chunks_exact_mut(BLOCK_BYTES)) {
            let block = BlockIndex(first.0 + n);
            let read = match in_a_row < UNREADABLE_MAX {
                true => files.home.read_at(block.byte_offset(), BLOCK_BYTES).await.ok(),
                false => None,
            };
            match read {
                Some(data) => {
                    part.copy_from_slice(data.as_slice());
                    in_a_row = 0;
                }
                None => {
                    part.fill(0);
                    unreadable.push(block);
                    in_a_row += 1;
                }
            }
        }
        unreadable
    }

    /// Looks at a chunk on the medium, at home and in the table, and notes how it is. A table page with one rotten copy
    /// is healed from the other.
    pub async fn verify_chunk(&self, chunk: ChunkIndex) -> Result<Finding, StoreError> {
        let mut is_whole = true;
        for files in self.layer_files() {
            is_whole &= match files.table.chunk(chunk).await {
                Ok(line) => self.mismatches(&files, chunk, &line).await.is_empty(),
                Err(_) => false,
            };
        }
        let finding = if is_whole {
            Finding::Whole
        } else {
            // The cleaner may just have been moving it.
            let _nothing_moves = self.0.cleaning.lock().await;
            self.verify_alone(chunk).await?
        };
        self.note(chunk, &finding);
        Ok(finding)
    }

    /// The files of every layer that is read.
    fn layer_files(&self) -> Vec<Rc<PieceFiles>> {
        self.0.chain.live().iter().filter_map(|piece| piece.files()).collect()
    }

    /// Looks at the page of a chunk on the medium. True if it is whole, or is so again.
    pub async fn verify_page(&self, chunk: ChunkIndex) -> Result<bool, StoreError> {
        let _nothing_moves = self.0.cleaning.lock().await;
        self.scrub_page(chunk).await
    }

    async fn scrub_page(&self, chunk: ChunkIndex) -> Result<bool, StoreError> {
        let mut is_there = true;
        for files in self.layer_files() {
            let found = files.table.scrub_page(chunk).await?;
            if found == PageFound::Repaired {
                tracing::warn!(replica = %self.0.prefix, chunk = chunk.0, "a table page was healed");
                self.count_health(|health| health.healed_pages += 1);
            }
            is_there &= found != PageFound::Lost;
        }
        Ok(is_there)
    }

    /// As [`Self::verify_chunk`], while nothing is moved.
    async fn verify_alone(&self, chunk: ChunkIndex) -> Result<Finding, StoreError> {
        if !self.scrub_page(chunk).await? {
            return Ok(Finding::Lost);
        }
        let mut bad = Vec::new();
        for files in self.layer_files() {
            let line = files.table.chunk(chunk).await?;
            bad.extend(self.mismatches(&files, chunk, &line).await);
        }
        bad.retain(|block| !self.is_covered(*block));
        bad.sort();
        bad.dedup();
        Ok(if bad.is_empty() { Finding::Whole } else { Finding::Bad(bad) })
    }

    fn is_covered(&self, block: BlockIndex) -> bool {
        let covers = |piece: &Rc<Piece>| !piece.map.borrow().over(BlockRange::new(block, 1)).is_empty();
        self.0.chain.live().iter().any(covers)
    }

    /// Blocks of a chunk that the medium does not give as a line says.
    async fn mismatches(&self, files: &PieceFiles, chunk: ChunkIndex, line: &Chunk) -> Vec<BlockIndex> {
        let first = chunk.first_block();
        let is_data = |n: usize| matches!(line.get(n), BlockSum::Data(_));
        let Some(start) = (0..CHUNK_BLOCKS as usize).find(|n| is_data(*n)) else { return Vec::new() };
        let end = (start..CHUNK_BLOCKS as usize).rev().find(|n| is_data(*n)).map_or(start, |last| last + 1);
        let mut home = AlignedBuffer::zeroed((end - start) * BLOCK_BYTES);
        let at = BlockIndex(first.0 + start as u64);
        let unreadable = self.read_home_blocks(files, at, home.as_mut_slice()).await;
        let blocks = (start..end).zip(home.as_slice().chunks_exact(BLOCK_BYTES));
        blocks
            .filter_map(|(n, data)| {
                let block = BlockIndex(first.0 + n as u64);
                let BlockSum::Data(expected) = line.get(n) else { return None };
                let bad = unreadable.contains(&block) || block_checksum(block, data) != expected;
                bad.then_some(block)
            })
            .collect()
    }

    /// Writes blocks of a chunk over home that are what the table says, and looks whether home holds them now.
    /// INV-HEAL: what does not match the table's checksum, address included, is not written.
    pub async fn heal_blocks(
        &self,
        chunk: ChunkIndex,
        blocks: &[(BlockIndex, Bytes)],
    ) -> Result<Finding, StoreError> {
        let _nothing_moves = self.0.cleaning.lock().await;
        let before = match self.verify_alone(chunk).await? {
            Finding::Bad(bad) => bad,
            other => {
                self.note(chunk, &other);
                return Ok(other);
            }
        };
        for files in self.layer_files() {
            let line = files.table.chunk(chunk).await?;
            let is_bad = self.mismatches(&files, chunk, &line).await;
            let fits = |block: BlockIndex, data: &Bytes| {
                planted("heal-unchecked")
                    || line.get(block.within_chunk()) == BlockSum::Data(block_checksum(block, data))
            };
            let wanted = |block: &BlockIndex| before.contains(block) && is_bad.contains(block);
            let right: Vec<_> =
                blocks.iter().filter(|(block, data)| wanted(block) && fits(*block, data)).collect();
            for (block, data) in &right {
                self.write_block_home(&files, *block, data).await?;
            }
            if !right.is_empty() {
                self.flush_home(&files).await?;
                self.changed();
            }
        }
        let after = self.verify_alone(chunk).await?;
        let left = if let Finding::Bad(bad) = &after { bad.as_slice() } else { &[] };
        let healed = before.iter().filter(|block| !left.contains(block)).count() as u64;
        if healed > 0 {
            tracing::warn!(replica = %self.0.prefix, chunk = chunk.0, healed, "blocks at home are healed");
        }
        self.note(chunk, &after);
        self.count_health(|health| health.healed_blocks += healed);
        Ok(after)
    }

    async fn write_block_home(
        &self,
        files: &PieceFiles,
        block: BlockIndex,
        data: &Bytes,
    ) -> Result<(), StoreError> {
        self.count(|usage| usage.home_bytes_written += BLOCK_BYTES as u64);
        let buffer = AlignedBuffer::copy_of(data);
        let written = files.home.write_at(block.byte_offset(), buffer, Durability::Volatile).await;
        written.map(drop).map_err(|error| StoreError::io("home", &error))
    }

    /// What a chunk holds now, with its last change: taken in one moment.
    pub async fn chunk_now(&self, chunk: ChunkIndex) -> Result<ChunkNow, StoreError> {
        let (pieces, lines) = loop {
            let before = self.0.changes.get();
            let pieces = self.0.chain.live();
            let mut lines = Vec::with_capacity(pieces.len());
            for piece in pieces.iter() {
                lines.push(match piece.files() {
                    Some(files) => files.table.chunk(chunk).await?,
                    None => Chunk::default(),
                });
            }
            if self.0.changes.get() == before {
                break (pieces, lines);
            }
        };
        let sums = vec![BlockSum::Absent; CHUNK_BLOCKS as usize];
        let mut now = ChunkNow { incarnation: 0, last_index: LogIndex::ZERO, sums };
        let range = BlockRange::new(chunk.first_block(), CHUNK_BLOCKS as u32);
        for line in &lines {
            if line.last_index > now.last_index {
                (now.incarnation, now.last_index) = (line.incarnation, line.last_index);
            }
            for (n, sum) in now.sums.iter_mut().enumerate() {
                *sum = if line.get(n) == BlockSum::Absent { *sum } else { line.get(n) };
            }
        }
        for piece in pieces.iter() {
            for (at, run) in piece.map.borrow().over(range) {
                now.incarnation = self.0.identity.incarnation;
                now.last_index = now.last_index.max(run.index);
                for n in 0..run.count {
                    now.sums[BlockIndex(at.0 + n).within_chunk()] = sum_of(piece, &run, n);
                }
            }
        }
        Ok(now)
    }

    /// Chunks that must come together with this one: those of its page if that is lost, else it alone.
    pub async fn chunks_to_adopt(&self, chunk: ChunkIndex) -> Result<Vec<ChunkIndex>, StoreError> {
        let Some((_, files)) = self.only_layer() else { return Ok(vec![chunk]) };
        Ok(match files.table.is_lost(chunk).await? {
            true => Table::page_chunks(chunk).collect(),
            false => vec![chunk],
        })
    }

    /// The only layer of a volume without snapshots. What another replica tells of a chunk is what it reads as: of
    /// which layer each block is it does not say, so chunks are adopted only where there is one.
    fn only_layer(&self) -> Option<(LayerId, Rc<PieceFiles>)> {
        let pieces = self.0.chain.all();
        let [piece] = pieces.as_slice() else { return None };
        Some((piece.id, piece.files()?))
    }

    /// Whether content of another replica may stand here. INV-HEAL: its last change is applied and durable here (the
    /// journal repeats it), and it is not of before the checkpoint (what came between is nowhere else).
    fn may_adopt(&self, content: &ChunkContent, applied: LogIndex) -> bool {
        let last = content.now.last_index;
        let checkpoint = self.checkpoint().id.index;
        last <= applied.min(self.0.payloads.flushed()) && content.applied >= checkpoint
            || planted("adopt-anything")
    }

    /// Takes chunks as another replica has them: all of a page, or one ([`Self::chunks_to_adopt`]). `applied` is what
    /// this replica has applied. False if that cannot be done now; nothing has changed then.
    ///
    /// The order is the cleaner's. The checkpoint stays: what the chunks hold is repeated from it.
    pub async fn adopt(&self, chunks: &[ChunkContent], applied: LogIndex) -> Result<bool, StoreError> {
        let _nothing_moves = self.0.cleaning.lock().await;
        let (Some(first), Some((layer, files))) = (chunks.first(), self.only_layer()) else {
            return Ok(false);
        };
        let whole_page = files.table.is_lost(first.chunk).await?;
        let wanted = self.chunks_to_adopt(first.chunk).await?;
        let given: Vec<ChunkIndex> = chunks.iter().map(|content| content.chunk).collect();
        if self.0.rebuilds.get() > 0
            || wanted != given
            || !chunks.iter().all(|content| self.may_adopt(content, applied))
        {
            return Ok(false);
        }
        let mut lines = BTreeMap::new();
        for content in chunks {
            lines.insert(content.chunk, self.write_content(&files, content).await?);
        }
        self.flush_home(&files).await?;
        let pages = match whole_page {
            true => files.table.restore(lines).await?,
            false => files.table.write(lines).await?,
        };
        let pages: Vec<_> = pages.into_iter().map(|page| (layer, page)).collect();
        self.write_manifest(Change { pages: Some(&pages), ..Change::default() }).await?;
        self.changed();
        files.table.write_other_copies().await?;
        for content in chunks {
            let found = self.verify_alone(content.chunk).await?;
            self.note(content.chunk, &found);
        }
        tracing::warn!(replica = %self.0.prefix, chunk = first.chunk.0, whole_page, "chunks were taken from a peer");
        self.count_health(|health| match whole_page {
            true => health.healed_pages += 1,
            false => health.replaced_chunks += 1,
        });
        Ok(true)
    }

    /// Brings a chunk's blocks home; its line.
    async fn write_content(&self, files: &PieceFiles, content: &ChunkContent) -> Result<Chunk, StoreError> {
        let mut line = Chunk::default();
        (line.incarnation, line.last_index) = (content.now.incarnation, content.now.last_index);
        if !content.blocks.is_empty() {
            let offset = content.chunk.first_block().byte_offset();
            let allocated = files.home.allocate(offset, CHUNK_BYTES).await;
            allocated.map_err(|error| StoreError::io("home", &error))?;
        }
        for (n, sum) in content.now.sums.iter().enumerate() {
            line.set(n, *sum);
        }
        for (block, data) in &content.blocks {
            if line.get(block.within_chunk()) != BlockSum::Data(block_checksum(*block, data)) {
                let why = "it does not match its checksum".into();
                return Err(StoreError::Damaged { what: format!("block {} from a peer", block.0), why });
            }
            self.write_block_home(files, *block, data).await?;
        }
        Ok(line)
    }
}
