//! The cleaner: moves the newest applied and flushed blocks home, in block order, and makes a checkpoint.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use holdfast_env::disk::{AlignedBuffer, Durability};
use holdfast_types::{
    BLOCK_BYTES, BlockIndex, CHUNK_BYTES, ChunkIndex, LogIndex, block_checksum, limits::REQUEST_BLOCKS_MAX,
};

use super::extent::{Extent, ExtentMap, What};
use super::layers::{LayerId, LayerMark, Piece, PieceFiles};
use super::marks::sum_of;
use super::room::{Room, Taken};
use super::table::{BlockSum, Chunk};
use super::{Change, Checkpoint, CheckpointSource, VolumeData};
use crate::StoreError;
use crate::journal::{Beside, planted};

/// Home writes under way at once, and while they hold up whoever writes to the journal.
const WRITES_MAX: usize = 4;
const WRITES_YIELDING: usize = 1;
/// Bytes that one flush of home brings to the medium while somebody writes to the journal, whose batches stand behind
/// it: one flush of much data is one that nobody gets in between of.
const FLUSH_BYTES_BESIDE: u64 = 4 << 20;
/// How long to wait for the local flush of what was applied, and how often to look.
const FLUSH_PATIENCE: Duration = Duration::from_secs(5);
const FLUSH_LOOK: Duration = Duration::from_millis(2);

type HomeWrite = futures_util::future::LocalBoxFuture<'static, std::io::Result<AlignedBuffer>>;

/// The home writes of a pass to one piece.
#[derive(Default)]
struct HomeWrites {
    under_way: VecDeque<HomeWrite>,
    unflushed: u64,
}

impl HomeWrites {
    async fn end_oldest(&mut self) -> Result<(), StoreError> {
        match self.under_way.pop_front() {
            Some(oldest) => oldest.await.map(drop).map_err(|error| StoreError::io("home", &error)),
            None => Ok(()),
        }
    }
}

/// What one pass does to one piece.
struct Work {
    files: Rc<PieceFiles>,
    piece: Rc<Piece>,
    /// What goes home there.
    runs: Vec<(BlockIndex, Extent)>,
    /// The lines that change, and whether the chunk held data before.
    lines: BTreeMap<ChunkIndex, (bool, Chunk)>,
}

impl VolumeData {
    /// One pass: everything applied and flushed up to now goes home, and a checkpoint says so. While a rebuild is
    /// collected nothing is done, and the checkpoint before is answered.
    ///
    /// Order: files of new layers, room for all of it, home data, home flush, table pages, table flush, manifest, second
    /// copies of the pages; each for all layers together, but for table pages that are too many for one manifest
    /// (`pages.rs`). A crash before the manifest leaves the checkpoint before,
    /// from which the journal repeats everything. After an error that is no lack of space the store must stop: what was
    /// written is unknown. After one that is, nothing has changed.
    pub async fn clean(&self, source: &dyn CheckpointSource) -> Result<Checkpoint, StoreError> {
        self.clean_in(source, Room::Whole).await
    }

    /// As [`Self::clean`], in as little room as it takes.
    pub async fn clean_tight(&self, source: &dyn CheckpointSource) -> Result<Checkpoint, StoreError> {
        self.clean_in(source, Room::Tight).await
    }

    async fn clean_in(&self, source: &dyn CheckpointSource, room: Room) -> Result<Checkpoint, StoreError> {
        let _one_at_a_time = self.alone().await?;
        if self.0.rebuilds.get() > 0 && !planted("clean-while-rebuilding") {
            return Ok(self.checkpoint());
        }
        self.give_back_abandoned().await?;
        self.merge_if_too_many(room).await?;
        let Some(target) = self.target(source).await else { return Ok(self.checkpoint()) };
        let pass = self.0.payloads.begin_pass();
        self.0.aimed.replace(Some(target.clone()));
        self.0.chain.fold_unseen(target.id.index);
        let (pieces, marks): (Vec<_>, Vec<_>) = self.0.chain.at(target.id.index).into_iter().unzip();
        let moving = self.moving(target.id.index);
        self.write_owed_copies().await?;
        self.create_files(&pieces).await?;
        let mut work = self.work(moving).await?;
        let mut taken = Taken::default();
        let made = self.make_checkpoint(&target, marks, &work, room, &mut taken).await;
        self.or_give_back(made, &taken).await?;
        self.0.aimed.replace(None);
        self.count(|usage| usage.checkpoints += 1);
        self.0.chain.drop_up_to(target.id.index);
        self.changed();
        for Work { files, lines, .. } in &mut work {
            files.table.write_other_copies().await?;
            lines.retain(|_, (had, line)| *had && !line.has_data());
            let emptied: Vec<ChunkIndex> = lines.keys().copied().collect();
            self.punch(files, &emptied).await?;
        }
        self.forget_retired(target.id.index).await?;
        self.0.payloads.end_pass(pass, target.id.index);
        self.0.payloads.evict_hint();
        Ok(target)
    }

    /// A pass up to its manifest.
    async fn make_checkpoint(
        &self,
        target: &Checkpoint,
        marks: Vec<LayerMark>,
        work: &[Work],
        room: Room,
        taken: &mut Taken,
    ) -> Result<(), StoreError> {
        self.take_room(target, marks.len(), work, room, taken).await?;
        if planted("checkpoint-before-home-flush") {
            let pieces = Some(marks.clone());
            self.write_manifest(Change { checkpoint: Some(target.clone()), pieces, ..Change::default() })
                .await?;
        }
        self.0.payloads.keep_committed(target.id.index).await?;
        // Who reads home now looks again if it does not match.
        self.changed();
        for Work { files, runs, .. } in work {
            self.write_home(files, runs).await?;
        }
        for Work { files, .. } in work.iter().filter(|work| !work.runs.is_empty()) {
            self.flush_home(files).await?;
        }
        let mut pages = Vec::new();
        for Work { files, piece, lines, .. } in work {
            let lines = lines.iter().map(|(chunk, (_, line))| (*chunk, line.clone())).collect();
            self.write_lines(&mut pages, piece.id, files, lines).await?;
        }
        let change = Change {
            checkpoint: Some(target.clone()),
            staged: Some(false),
            pieces: Some(marks),
            pages: Some(&pages),
        };
        self.write_manifest(change).await
    }

    /// Takes the room for all of it before anything is written (INV-SPACE).
    async fn take_room(
        &self,
        target: &Checkpoint,
        pieces: usize,
        work: &[Work],
        room: Room,
        taken: &mut Taken,
    ) -> Result<(), StoreError> {
        for Work { files, runs, lines, .. } in work {
            let data = runs.iter().filter(|(_, run)| matches!(run.what, What::Data { .. }));
            self.take_home(taken, files, data.map(|(start, run)| (*start, run.count)), room).await?;
            self.take_pages(taken, files, lines.keys().copied()).await?;
        }
        let lines: usize = work.iter().map(|work| work.lines.len()).sum();
        self.take_manifest(target, pieces, lines).await
    }

    /// Layers that the checkpoint has thrown away give their files back.
    async fn forget_retired(&self, index: LogIndex) -> Result<(), StoreError> {
        let gone = self.0.chain.take_retired(index);
        if gone.is_empty() {
            return Ok(());
        }
        gone.iter().for_each(|piece| self.forget_table(piece));
        self.share_memory();
        self.remove_left_overs().await
    }

    /// What goes home, by the piece that it goes to: the newest version within each layer. In layers that are being
    /// merged everything goes to the oldest piece, so that the younger ones only lose; the second list says which
    /// blocks they lose by it. Both are repeatable from the journal.
    fn moving(&self, index: LogIndex) -> Moving {
        let marks = self.0.manifest.borrow().pieces.clone();
        let mut moving = Moving::default();
        for piece in self.0.chain.all() {
            let runs = piece.map.borrow().up_to(index);
            if runs.is_empty() {
                continue;
            }
            // INV-LAYER: by what is durable alone.
            let mut at = marks.iter().position(|mark| mark.id == piece.id);
            let mut to = piece.id;
            while let Some(older) = at.and_then(|at| at.checked_sub(1)).filter(|n| marks[*n].frozen.is_none())
            {
                let ranges = runs.iter().map(|(start, run)| (*start, run.count));
                moving.lost.entry(to).or_default().extend(ranges);
                (at, to) = (Some(older), marks[older].id);
            }
            let there = moving.runs.entry(to).or_default();
            runs.into_iter().for_each(|(start, run)| there.insert(start, run));
        }
        moving
    }

    async fn work(&self, moving: Moving) -> Result<Vec<Work>, StoreError> {
        let mut out = Vec::new();
        for piece in self.0.chain.all() {
            let runs =
                moving.runs.get(&piece.id).map(|map| map.up_to(LogIndex(u64::MAX))).unwrap_or_default();
            let lost = moving.lost.get(&piece.id).map(Vec::as_slice).unwrap_or_default();
            if runs.is_empty() && lost.is_empty() {
                continue;
            }
            let files = piece.files().expect("the files of what goes home were made");
            let mut lines = self.lost_lines(&files, lost).await?;
            if !runs.is_empty() {
                lines.extend(self.changed_lines(&piece, &files, &runs).await?);
            }
            out.push(Work { files, piece, runs, lines });
        }
        Ok(out)
    }

    /// Lines of a younger piece without the blocks that go to an older one instead. Its marks stay.
    async fn lost_lines(
        &self,
        files: &PieceFiles,
        lost: &[(BlockIndex, u64)],
    ) -> Result<BTreeMap<ChunkIndex, (bool, Chunk)>, StoreError> {
        let mut lines: BTreeMap<ChunkIndex, (bool, Chunk)> = BTreeMap::new();
        for (start, count) in lost {
            for block in (start.0..start.0 + count).map(BlockIndex) {
                if let std::collections::btree_map::Entry::Vacant(e) = lines.entry(block.chunk()) {
                    let line = files.table.chunk(block.chunk()).await?;
                    e.insert((line.has_data(), line));
                }
                if let Some((_, line)) = lines.get_mut(&block.chunk()) {
                    line.set(block.within_chunk(), BlockSum::Absent);
                }
            }
        }
        Ok(lines)
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
        // A pass that failed has changed the chain for its target, so a later one never aims below it.
        let aimed = self.0.aimed.borrow().clone();
        let least = aimed.as_ref().map_or(before, |aimed| aimed.id.index.max(before));
        let durable = async {
            loop {
                let found = source.captured_up_to(self.0.payloads.flushed());
                let found = found.filter(|found| found.id.index > least);
                match found.or_else(|| aimed.clone().filter(|aimed| aimed.id.index > before)) {
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

    /// The table lines of every chunk that the runs change in a piece, and whether the chunk held data before.
    async fn changed_lines(
        &self,
        piece: &Rc<Piece>,
        files: &PieceFiles,
        runs: &[(BlockIndex, Extent)],
    ) -> Result<BTreeMap<ChunkIndex, (bool, Chunk)>, StoreError> {
        let mut lines: BTreeMap<ChunkIndex, (bool, Chunk)> = BTreeMap::new();
        let mut present = BTreeSet::new();
        for (start, run) in runs {
            let last = BlockIndex(start.0 + run.count - 1).chunk();
            for chunk in (start.chunk().0..=last.0).map(ChunkIndex) {
                if let std::collections::btree_map::Entry::Vacant(e) = lines.entry(chunk) {
                    let line = self.line_of(files, chunk).await?;
                    let was_present = line.is_present() || self.is_in_younger(piece, chunk).await?;
                    present.extend(was_present.then_some(chunk));
                    e.insert((line.has_data(), line));
                }
                let Some((_, line)) = lines.get_mut(&chunk) else { continue };
                let first = chunk.first_block().0.max(start.0);
                let end = (chunk.first_block().0 + holdfast_types::CHUNK_BLOCKS).min(start.0 + run.count);
                for block in (first..end).map(BlockIndex) {
                    line.set(block.within_chunk(), sum_of(piece, run, block.0 - start.0));
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
    pub(super) async fn line_of(&self, files: &PieceFiles, chunk: ChunkIndex) -> Result<Chunk, StoreError> {
        files.table.chunk(chunk).await.inspect_err(|_| self.suspect_chunk(chunk))
    }

    /// Whether a younger piece of the same logical layer holds anything of a chunk.
    async fn is_in_younger(&self, piece: &Rc<Piece>, chunk: ChunkIndex) -> Result<bool, StoreError> {
        let live = self.0.chain.live();
        let mut before = None;
        for younger in live.iter().skip_while(|other| other.id <= piece.id) {
            let older = before.unwrap_or(piece);
            if older.frozen().is_some() {
                return Ok(false);
            }
            if let Some(files) = younger.files()
                && files.table.chunk(chunk).await?.is_present()
            {
                return Ok(true);
            }
            before = Some(younger);
        }
        Ok(false)
    }

    async fn write_home(&self, files: &PieceFiles, runs: &[(BlockIndex, Extent)]) -> Result<(), StoreError> {
        let mut writes = HomeWrites::default();
        let mut outcome = self.start_home_writes(files, runs, &mut writes).await;
        // One that was still under way when the pass is repeated could end after what that writes.
        for write in writes.under_way {
            outcome = outcome.and(write.await.map(drop).map_err(|error| StoreError::io("home", &error)));
        }
        outcome
    }

    async fn start_home_writes(
        &self,
        files: &PieceFiles,
        runs: &[(BlockIndex, Extent)],
        writes: &mut HomeWrites,
    ) -> Result<(), StoreError> {
        let mut merged: Vec<Bytes> = Vec::new();
        let mut merged_at = BlockIndex(0);
        let mut merged_blocks = 0u64;
        for (start, run) in runs {
            let What::Data { offset, .. } = &run.what else { continue };
            let follows = merged_blocks > 0 && merged_at.0 + merged_blocks == start.0;
            if !follows || merged_blocks + run.count > u64::from(REQUEST_BLOCKS_MAX) {
                self.start_home_write(files, writes, merged_at, &mut merged).await?;
                (merged_at, merged_blocks) = (*start, 0);
            }
            let payload = self.0.payloads.read_payload(run.index, *offset, run.count as u32).await?;
            self.verify(*start, run, &payload)?;
            merged_blocks += run.count;
            merged.push(payload);
        }
        self.start_home_write(files, writes, merged_at, &mut merged).await
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
        files: &PieceFiles,
        writes: &mut HomeWrites,
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
        let beside = self.0.payloads.give_way().await;
        let most = if beside == Beside::HeldUp { WRITES_YIELDING } else { WRITES_MAX };
        while writes.under_way.len() >= most {
            writes.end_oldest().await?;
        }
        if beside != Beside::Nobody && writes.unflushed >= FLUSH_BYTES_BESIDE {
            while !writes.under_way.is_empty() {
                writes.end_oldest().await?;
            }
            writes.unflushed = 0;
            self.flush_home(files).await?;
        }
        writes.unflushed += buffer.len() as u64;
        self.count(|usage| usage.home_bytes_written += buffer.len() as u64);
        writes.under_way.push_back(files.home.write_at(at.byte_offset(), buffer, Durability::Volatile));
        Ok(())
    }

    /// Gives chunks back that the checkpoint just made has emptied.
    pub(super) async fn punch(&self, files: &PieceFiles, emptied: &[ChunkIndex]) -> Result<(), StoreError> {
        for chunk in emptied {
            if !files.table.chunk(*chunk).await?.has_data() {
                let offset = chunk.first_block().byte_offset();
                files
                    .home
                    .punch(offset, CHUNK_BYTES)
                    .await
                    .map_err(|error| StoreError::io("home", &error))?;
                self.count(|usage| usage.chunks_punched += 1);
            }
        }
        Ok(())
    }
}

/// What one pass moves.
#[derive(Default)]
struct Moving {
    runs: BTreeMap<LayerId, ExtentMap>,
    lost: BTreeMap<LayerId, Vec<(BlockIndex, u64)>>,
}
