//! The cleaner: moves the newest applied and flushed blocks home, in block order, and makes a checkpoint.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use holdfast_env::disk::{AlignedBuffer, Durability};
use holdfast_types::{
    BLOCK_BYTES, BlockIndex, CHUNK_BYTES, ChunkIndex, LogIndex, block_checksum, limits::REQUEST_BLOCKS_MAX,
};

use super::extent::{Extent, What};
use super::table::{BlockSum, Chunk};
use super::{Checkpoint, CheckpointSource, VolumeData};
use crate::StoreError;
use crate::journal::planted;

/// Home writes under way at once.
const WRITES_MAX: usize = 4;
/// How long to wait for the local flush of what was applied, and how often to look.
const FLUSH_PATIENCE: Duration = Duration::from_secs(5);
const FLUSH_LOOK: Duration = Duration::from_millis(2);

impl VolumeData {
    /// One pass: everything applied and flushed up to now goes home, and a checkpoint says so. While a rebuild is
    /// collected nothing is done, and the checkpoint before is answered.
    ///
    /// Order: home data, home flush, table pages, table flush, manifest, second copies of the pages. A crash before the
    /// manifest leaves the checkpoint before, from which the journal repeats everything. After an error that is no
    /// lack of space the store must stop: what was written is unknown.
    pub async fn clean(&self, source: &dyn CheckpointSource) -> Result<Checkpoint, StoreError> {
        let _one_at_a_time = self.0.cleaning.lock().await;
        if self.0.rebuilds.get() > 0 && !planted("clean-while-rebuilding") {
            return Ok(self.checkpoint());
        }
        let Some(target) = self.target(source).await else { return Ok(self.checkpoint()) };
        let runs = self.0.map.borrow().up_to(target.id.index);
        let lines = self.changed_lines(&runs).await?;
        if planted("checkpoint-before-home-flush") {
            self.write_manifest(target.clone(), false, None).await?;
        }
        // Who reads home now looks again if it does not match.
        self.changed();
        self.write_home(&runs).await?;
        self.flush_home().await?;
        let emptied: Vec<ChunkIndex> = lines
            .iter()
            .filter(|(_, (had, line))| *had && !line.has_data())
            .map(|(chunk, _)| *chunk)
            .collect();
        let lines = lines.into_iter().map(|(chunk, (_, line))| (chunk, line)).collect();
        let pages = self.0.table.write(lines).await?;
        self.write_manifest(target.clone(), false, Some(&pages)).await?;
        self.count(|usage| usage.checkpoints += 1);
        self.0.map.borrow_mut().drop_up_to(target.id.index);
        self.changed();
        self.0.table.write_other_copies().await?;
        self.punch(&emptied).await?;
        self.0.payloads.evict_hint();
        Ok(target)
    }

    /// The state to clean up to: the newest that is durable here. Apply may come before the local flush, and what is
    /// not durable must not be moved (the journal would not repeat it). In a full journal what is not durable waits
    /// for the room that only cleaning makes, so an older state must do (INV-ROOM).
    async fn target(&self, source: &dyn CheckpointSource) -> Option<Checkpoint> {
        if planted("move-unflushed-home") {
            return Some(source.capture());
        }
        let before = self.checkpoint().id.index;
        if source.capture().id.index <= before {
            return None;
        }
        let durable = async {
            loop {
                let found = source.captured_up_to(self.0.payloads.flushed());
                match found.filter(|found| found.id.index > before) {
                    Some(found) => return Self::with_floor(found, source.capture().id.index),
                    None => holdfast_env::sleep(FLUSH_LOOK).await,
                }
            }
        };
        holdfast_env::timeout(FLUSH_PATIENCE, durable).await.ok()
    }

    /// What newer entries have overwritten is not in the map any more and never comes home. So an older state is whole
    /// only together with them: after a restart nothing is served before they are applied again (INV-STAGE).
    fn with_floor(target: Checkpoint, applied: LogIndex) -> Checkpoint {
        let hides = target.id.index < applied && !planted("forget-hidden-runs");
        let floor = if hides { applied } else { LogIndex::ZERO };
        Checkpoint { serve_floor: target.serve_floor.max(floor), ..target }
    }

    /// The table lines of every chunk that the runs change, and whether the chunk held data before.
    async fn changed_lines(
        &self,
        runs: &[(BlockIndex, Extent)],
    ) -> Result<BTreeMap<ChunkIndex, (bool, Chunk)>, StoreError> {
        let mut lines: BTreeMap<ChunkIndex, (bool, Chunk)> = BTreeMap::new();
        let mut present = BTreeSet::new();
        for (start, run) in runs {
            let last = BlockIndex(start.0 + run.count - 1).chunk();
            for chunk in (start.chunk().0..=last.0).map(ChunkIndex) {
                if let std::collections::btree_map::Entry::Vacant(e) = lines.entry(chunk) {
                    let line = self.line_of(chunk).await?;
                    present.extend(line.is_present().then_some(chunk));
                    e.insert((line.has_data(), line));
                }
                let Some((_, line)) = lines.get_mut(&chunk) else { continue };
                let first = chunk.first_block().0.max(start.0);
                let end = (chunk.first_block().0 + holdfast_types::CHUNK_BLOCKS).min(start.0 + run.count);
                for block in (first..end).map(BlockIndex) {
                    line.set(block.within_chunk(), super::sum_of(run, block.0 - start.0));
                }
                let unmarked = planted("trim-leaves-no-mark") && matches!(run.what, What::Absent);
                line.last_index = if unmarked { line.last_index } else { line.last_index.max(run.index) };
                line.incarnation = self.0.identity.incarnation;
            }
        }
        // Giving back nothing changes nothing. It counts in a chunk that changes otherwise: its mark tells of all of it
        // (INV-MARK).
        lines.retain(|chunk, (_, line)| present.contains(chunk) || line.is_present());
        Ok(lines)
    }

    /// A chunk's line. If its page is lost it is noted for the healer.
    async fn line_of(&self, chunk: ChunkIndex) -> Result<Chunk, StoreError> {
        self.0.table.chunk(chunk).await.inspect_err(|_| self.suspect_chunk(chunk))
    }

    async fn write_home(&self, runs: &[(BlockIndex, Extent)]) -> Result<(), StoreError> {
        let mut writes = Vec::new();
        let mut merged: Vec<Bytes> = Vec::new();
        let mut merged_at = BlockIndex(0);
        let mut merged_blocks = 0u64;
        for (start, run) in runs {
            let What::Data { offset, .. } = &run.what else { continue };
            let follows = merged_blocks > 0 && merged_at.0 + merged_blocks == start.0;
            if !follows || merged_blocks + run.count > u64::from(REQUEST_BLOCKS_MAX) {
                self.start_home_write(&mut writes, merged_at, &mut merged).await?;
                (merged_at, merged_blocks) = (*start, 0);
            }
            let payload = self.0.payloads.read_payload(run.index, *offset, run.count as u32).await?;
            self.verify(*start, run, &payload)?;
            merged_blocks += run.count;
            merged.push(payload);
        }
        self.start_home_write(&mut writes, merged_at, &mut merged).await?;
        for write in writes {
            write.await.map_err(|error: std::io::Error| StoreError::io("home", &error))?;
        }
        Ok(())
    }

    fn verify(&self, start: BlockIndex, run: &Extent, payload: &[u8]) -> Result<(), StoreError> {
        for (n, data) in (0u64..).zip(payload.chunks_exact(BLOCK_BYTES)) {
            let block = BlockIndex(start.0 + n);
            if run.checksum(n) != Some(block_checksum(block, data)) {
                return Err(StoreError::Damaged {
                    what: format!("block {} in log entry {}", block.0, run.index),
                    why: "its checksum does not match; replace this replica, the others hold the data".into(),
                });
            }
        }
        Ok(())
    }

    async fn start_home_write(
        &self,
        writes: &mut Vec<futures_util::future::LocalBoxFuture<'static, std::io::Result<AlignedBuffer>>>,
        at: BlockIndex,
        merged: &mut Vec<Bytes>,
    ) -> Result<(), StoreError> {
        if merged.is_empty() {
            return Ok(());
        }
        let bytes: usize = merged.iter().map(Bytes::len).sum();
        let mut buffer = AlignedBuffer::zeroed(bytes);
        let mut filled = 0;
        for payload in merged.drain(..) {
            buffer.as_mut_slice()[filled..filled + payload.len()].copy_from_slice(&payload);
            filled += payload.len();
        }
        self.allocate_chunks(at, bytes as u64).await?;
        if writes.len() >= WRITES_MAX {
            let oldest = writes.remove(0);
            oldest.await.map_err(|error| StoreError::io("home", &error))?;
        }
        self.count(|usage| usage.home_bytes_written += buffer.len() as u64);
        writes.push(self.0.home.write_at(at.byte_offset(), buffer, Durability::Volatile));
        Ok(())
    }

    /// A chunk's first write allocates it whole, so that random writes do not shatter the file's extents.
    async fn allocate_chunks(&self, at: BlockIndex, bytes: u64) -> Result<(), StoreError> {
        let last = BlockIndex(at.0 + bytes / BLOCK_BYTES as u64 - 1).chunk();
        for chunk in (at.chunk().0..=last.0).map(ChunkIndex) {
            if !self.0.table.chunk(chunk).await?.has_data() {
                let offset = chunk.first_block().byte_offset();
                let allocated = self.0.home.allocate(offset, CHUNK_BYTES).await;
                allocated.map_err(|error| StoreError::io("home", &error))?;
            }
        }
        Ok(())
    }

    /// Gives chunks back that the checkpoint just made has emptied.
    pub(super) async fn punch(&self, emptied: &[ChunkIndex]) -> Result<(), StoreError> {
        for chunk in emptied {
            if !self.0.table.chunk(*chunk).await?.has_data() {
                let offset = chunk.first_block().byte_offset();
                self.0
                    .home
                    .punch(offset, CHUNK_BYTES)
                    .await
                    .map_err(|error| StoreError::io("home", &error))?;
                self.count(|usage| usage.chunks_punched += 1);
            }
        }
        Ok(())
    }

    /// Lines as they are to be after a rebuild's blocks came home.
    pub(super) async fn staged_lines(
        &self,
        staged: &BTreeMap<BlockIndex, BlockSum>,
        index: LogIndex,
    ) -> Result<(BTreeMap<ChunkIndex, Chunk>, Vec<ChunkIndex>), StoreError> {
        let mut lines: BTreeMap<ChunkIndex, Chunk> = BTreeMap::new();
        for (block, sum) in staged {
            if let std::collections::btree_map::Entry::Vacant(e) = lines.entry(block.chunk()) {
                e.insert(self.0.table.chunk(block.chunk()).await?);
            }
            if let Some(line) = lines.get_mut(&block.chunk()) {
                line.set(block.within_chunk(), *sum);
                line.last_index = line.last_index.max(index);
                line.incarnation = self.0.identity.incarnation;
            }
        }
        let emptied = lines.iter().filter(|(_, line)| !line.has_data()).map(|(chunk, _)| *chunk).collect();
        Ok((lines, emptied))
    }
}
