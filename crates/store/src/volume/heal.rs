//! Healing: what home and table should hold is compared with what they do hold, and made so again.
//!
//! The table's checksum, address included, says what a home block must be. A block that is that may be written over
//! home at any time: it is what home holds anyway, or what the journal repeats (INV-HEAL). Where the table itself is
//! lost or shown to be old, whole chunks are adopted from another replica (`adopt.rs`).
//!
//! Everything is about a chunk of one logical layer: a block that the head hides is healed as well as one that it shows.
//! Of a layer that consists of several pieces only what it shows counts; what a younger piece of it hides goes when they
//! are merged.
//!
//! Owns the list of what reads found bad. It asks nobody: whoever fetches blocks from peers gives them to
//! [`VolumeData::heal_blocks`] and [`VolumeData::adopt`]. Everything that is written is written under the cleaner's
//! lock.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use bytes::Bytes;
use holdfast_env::disk::{AlignedBuffer, Durability};
use holdfast_types::{BLOCK_BYTES, BlockIndex, BlockRange, CHUNK_BLOCKS, ChunkIndex, block_checksum};
use tokio::sync::Notify;

use super::VolumeData;
use super::layers::{LayerId, Piece, PieceFiles};
use super::table::{BlockSum, Chunk, PageFound};
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
    /// Bad blocks of each layer's chunks, a bit per block; of a chunk whose page is lost, all.
    bad: RefCell<BTreeMap<(LayerId, ChunkIndex), u64>>,
    counted: Cell<Health>,
    /// Woken when it was noted how a chunk is.
    noted: Notify,
}

/// How a chunk of a layer is at home.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// As it should be.
    Whole,
    /// These blocks are not what the table says. (Of what the block map covers home says nothing.)
    Bad(Vec<BlockIndex>),
    /// The table's page is lost: nobody here knows what the chunk holds.
    Lost,
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

    pub(super) fn count_health(&self, more: impl FnOnce(&mut Health)) {
        let mut counted = self.0.suspects.counted.get();
        more(&mut counted);
        self.0.suspects.counted.set(counted);
    }

    pub(super) fn note(&self, layer: LayerId, chunk: ChunkIndex, finding: &Finding) {
        let mask = match finding {
            Finding::Whole => 0,
            Finding::Bad(blocks) => blocks.iter().fold(0, |mask, block| mask | 1 << block.within_chunk()),
            Finding::Lost => u64::MAX,
        };
        let mut bad = self.0.suspects.bad.borrow_mut();
        let place = (layer, chunk);
        let before = if mask == 0 { bad.remove(&place) } else { bad.insert(place, mask) };
        let new = u64::from((mask & !before.unwrap_or(0)).count_ones());
        if new > 0 {
            let (layer, chunk) = (layer.0.0, chunk.0);
            tracing::error!(replica = %self.0.prefix, layer, chunk, new, "blocks at home are bad");
        }
        self.count_health(|health| health.found_blocks += new);
        drop(bad);
        self.0.suspects.noted.notify_waiters();
    }

    /// Whether nothing of a chunk is known to be bad, in any layer.
    fn is_well(&self, chunk: ChunkIndex) -> bool {
        !self.0.suspects.bad.borrow().keys().any(|(_, bad)| *bad == chunk)
    }

    /// Ends when nothing of a chunk is known to be bad any more.
    pub async fn well(&self, chunk: ChunkIndex) {
        loop {
            let noted = self.0.suspects.noted.notified();
            if self.is_well(chunk) {
                return;
            }
            noted.await;
        }
    }

    /// Of layers that are no more nothing is bad. What was bad may be so in the layer that they have gone into.
    pub(super) fn forget_ended_layers(&self) {
        let mut bad = self.0.suspects.bad.borrow_mut();
        if bad.is_empty() {
            return;
        }
        let there: BTreeSet<LayerId> = self.layers().iter().map(|layer| layer.id).collect();
        bad.retain(|(layer, chunk), _| {
            let stays = there.contains(layer);
            if !stays {
                self.suspect_chunk(*chunk);
            }
            stays
        });
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

    /// Looks at a chunk of a layer on the medium, at home and in the table, and notes how it is. A table page with one
    /// rotten copy is healed from the other. Of a layer that is no more nothing is bad.
    pub async fn verify_chunk(&self, layer: LayerId, chunk: ChunkIndex) -> Result<Finding, StoreError> {
        let is_whole = match self.shown(layer, chunk).await {
            Ok(lines) => {
                let mut is_whole = true;
                for (files, line) in &lines {
                    is_whole &= self.mismatches(files, chunk, line).await.is_empty();
                }
                is_whole
            }
            Err(_) => false,
        };
        let finding = if is_whole {
            Finding::Whole
        } else {
            // The cleaner may just have been moving it.
            let _nothing_moves = self.alone().await?;
            self.verify_alone(layer, chunk).await?
        };
        self.note(layer, chunk, &finding);
        Ok(finding)
    }

    /// The files of a layer's pieces, the oldest first; none of a layer that is no more.
    pub(super) fn layer_files(&self, layer: LayerId) -> Vec<Rc<PieceFiles>> {
        let pieces = self.layer(layer).ok();
        pieces.iter().flat_map(|pieces| pieces.iter()).filter_map(|piece| piece.files()).collect()
    }

    /// What a layer shows of a chunk at home: the lines of its pieces, the youngest first, each without what those
    /// before it hide.
    async fn shown(
        &self,
        layer: LayerId,
        chunk: ChunkIndex,
    ) -> Result<Vec<(Rc<PieceFiles>, Chunk)>, StoreError> {
        let mut lines = Vec::new();
        let mut hidden = 0;
        for files in self.layer_files(layer).into_iter().rev() {
            let mut line = files.table.chunk(chunk).await?;
            hidden = line.hide(hidden);
            lines.push((files, line));
        }
        Ok(lines)
    }

    /// Looks at the pages of a chunk, in every layer, on the medium. True if they are whole, or are so again.
    pub async fn verify_page(&self, chunk: ChunkIndex) -> Result<bool, StoreError> {
        let _nothing_moves = self.alone().await?;
        let files: Vec<_> = self.0.chain.live().iter().filter_map(|piece| piece.files()).collect();
        self.scrub_page(&files, chunk).await
    }

    async fn scrub_page(&self, files: &[Rc<PieceFiles>], chunk: ChunkIndex) -> Result<bool, StoreError> {
        let mut is_there = true;
        for files in files {
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
    pub(super) async fn verify_alone(
        &self,
        layer: LayerId,
        chunk: ChunkIndex,
    ) -> Result<Finding, StoreError> {
        if !self.scrub_page(&self.layer_files(layer), chunk).await? {
            return Ok(Finding::Lost);
        }
        let mut bad = Vec::new();
        for (files, line) in self.shown(layer, chunk).await? {
            bad.extend(self.mismatches(&files, chunk, &line).await);
        }
        bad.retain(|block| !self.is_covered(layer, *block));
        bad.sort();
        Ok(if bad.is_empty() { Finding::Whole } else { Finding::Bad(bad) })
    }

    /// Whether something is on its way home over a block of a layer. What an older or a younger layer has of it does not
    /// cover it.
    fn is_covered(&self, layer: LayerId, block: BlockIndex) -> bool {
        let covers = |piece: &Rc<Piece>| !piece.map.borrow().over(BlockRange::new(block, 1)).is_empty();
        self.layer(layer).is_ok_and(|pieces| pieces.iter().any(covers))
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

    /// Writes blocks of a layer's chunk over home that are what the table says, and looks whether home holds them now.
    /// INV-HEAL: what does not match the table's checksum, address included, is not written.
    pub async fn heal_blocks(
        &self,
        layer: LayerId,
        chunk: ChunkIndex,
        blocks: &[(BlockIndex, Bytes)],
    ) -> Result<Finding, StoreError> {
        let _nothing_moves = self.alone().await?;
        let before = match self.verify_alone(layer, chunk).await? {
            Finding::Bad(bad) => bad,
            other => {
                self.note(layer, chunk, &other);
                return Ok(other);
            }
        };
        for (files, line) in self.shown(layer, chunk).await? {
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
        let after = self.verify_alone(layer, chunk).await?;
        let left = if let Finding::Bad(bad) = &after { bad.as_slice() } else { &[] };
        let healed = before.iter().filter(|block| !left.contains(block)).count() as u64;
        if healed > 0 {
            tracing::warn!(replica = %self.0.prefix, chunk = chunk.0, healed, "blocks at home are healed");
        }
        self.note(layer, chunk, &after);
        self.count_health(|health| health.healed_blocks += healed);
        Ok(after)
    }

    pub(super) async fn write_block_home(
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
}
