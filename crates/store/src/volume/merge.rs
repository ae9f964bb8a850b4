//! Merging pieces of one logical layer, after the snapshot between them was dropped: the younger into the older.
//!
//! INV-LAYER: two pieces are merged only when the durable manifest says that nothing living ends between them. One
//! batch of chunks: the younger piece's blocks are copied to the older one's home, where only blocks change that the
//! younger hides; flushed; the older one's lines, younger over older, and the manifest that lists them; only then, with
//! another manifest, the younger one's lines are emptied, and its chunks given back. So whatever is read first, of the
//! younger or of the older, is right at every moment, and a crash at any step repeats or continues.
//!
//! From the manifest on that has the drop, the cleaner brings everything of the younger piece home in the older one. So
//! the younger only loses, and a merge ends under any load.

use std::collections::BTreeMap;
use std::rc::Rc;

use holdfast_env::disk::{AlignedBuffer, Durability};
use holdfast_types::{BLOCK_BYTES, BlockIndex, CHUNK_BLOCKS, ChunkIndex, LogIndex};

use super::layers::{LayerMark, Piece, PieceFiles};
use super::room::{Room, Taken};
use super::table::{BlockSum, Chunk};
use super::{Change, PAGE_CHUNKS, VolumeData};
use crate::StoreError;
use crate::journal::planted;

/// Chunks that one step merges: 16 MiB.
const CHUNKS_MAX: usize = 64;
/// The same on a full medium, where a step needs room before it makes some: 2 MiB.
const CHUNKS_MAX_TIGHT: usize = 8;
/// Pieces beyond which nothing else is done before some were merged. Those of living snapshots cannot be so many.
const PIECES_MAX: usize = 1024;
/// Table pages that one step looks at.
const PAGES_MAX: u64 = 1024;

/// How far a piece was looked through for what is to be merged.
#[derive(Clone, Copy, Default)]
pub(super) struct Scan {
    page: u64,
    /// Something was found since it began at the first page.
    found: bool,
}

/// The lines that one step merges.
type Lines = BTreeMap<ChunkIndex, Chunk>;

impl VolumeData {
    /// The older and the younger of the two oldest pieces that are to be merged.
    pub(super) fn next_merge(&self) -> Option<(Rc<Piece>, Rc<Piece>)> {
        let marks = if planted("merge-before-manifest") {
            self.0.chain.at(LogIndex(u64::MAX)).into_iter().map(|(_, mark)| mark).collect()
        } else {
            self.0.manifest.borrow().pieces.clone()
        };
        let pair = marks.windows(2).filter(|pair| pair[0].frozen.is_none());
        let live = self.0.chain.live();
        // What a restore has thrown away goes as it is.
        let find = |mark: &LayerMark| live.iter().find(|piece| piece.id == mark.id).cloned();
        let mut pairs = pair.filter_map(|pair| Some((find(&pair[0])?, find(&pair[1])?)));
        pairs.find(|(_, younger)| younger.files().is_some())
    }

    /// A bounded step of merging; true if there is more to do. Errors are as those of [`Self::clean`].
    pub async fn merge_step(&self) -> Result<bool, StoreError> {
        self.merge_step_in(Room::Whole).await
    }

    /// As [`Self::merge_step`], in as little room as it takes.
    pub async fn merge_step_tight(&self) -> Result<bool, StoreError> {
        self.merge_step_in(Room::Tight).await
    }

    async fn merge_step_in(&self, room: Room) -> Result<bool, StoreError> {
        let _one_at_a_time = self.alone().await?;
        if self.0.rebuilds.get() > 0 { Ok(false) } else { self.merge_some(room).await }
    }

    /// So many pieces are too many: some are merged before another checkpoint adds to them. The caller is alone.
    pub(super) async fn merge_if_too_many(&self, room: Room) -> Result<(), StoreError> {
        let are_many = || self.0.manifest.borrow().pieces.len() > PIECES_MAX;
        while are_many() && self.merge_some(room).await? {}
        Ok(())
    }

    async fn merge_some(&self, room: Room) -> Result<bool, StoreError> {
        let Some((older, younger)) = self.next_merge() else { return Ok(false) };
        self.write_owed_copies().await?;
        let (Some(into), Some(from)) = (older.files(), younger.files()) else { return Ok(false) };
        let before = younger.scan.get();
        let (lines, is_end) = self.look(&younger, &from, room).await?;
        if !lines.is_empty() {
            if planted("empty-before-merged") {
                self.empty_lines(&younger, &from, &lines).await?;
            }
            let mut taken = Taken::default();
            let merged = self.merge_lines(&older, (&into, &from), &lines, room, &mut taken).await;
            if merged.as_ref().is_err_and(StoreError::is_full) {
                younger.scan.set(before);
            }
            self.or_give_back(merged, &taken).await?;
            self.empty_lines(&younger, &from, &lines).await?;
        } else if is_end && !younger.scan.get().found {
            self.end_merge(&older, &younger).await?;
            return Ok(self.next_merge().is_some());
        }
        if is_end {
            // Once more from the beginning: the piece goes only after a look that found nothing at all.
            younger.scan.set(Scan::default());
        }
        Ok(true)
    }

    /// Lines of the younger piece that hold something, and whether its last page was reached.
    async fn look(&self, piece: &Piece, files: &PieceFiles, room: Room) -> Result<(Lines, bool), StoreError> {
        let most = if room == Room::Tight { CHUNKS_MAX_TIGHT } else { CHUNKS_MAX };
        let count = files.table.page_count().await?;
        let mut scan = piece.scan.get();
        let end = count.min(scan.page + PAGES_MAX);
        let mut found = Lines::new();
        while scan.page < end && found.len() < most {
            let lines = files.table.lines(scan.page).await;
            let lines = lines.inspect_err(|_| self.suspect_chunk(ChunkIndex(scan.page * PAGE_CHUNKS)))?;
            found.extend(lines.into_iter().filter(|(_, line)| line.is_present()));
            scan.page += 1;
        }
        scan.found |= !found.is_empty();
        piece.scan.set(scan);
        Ok((found, scan.page >= count))
    }

    /// Brings lines, and the blocks that they name, from the younger piece into the older one.
    async fn merge_lines(
        &self,
        older: &Piece,
        (into, from): (&Rc<PieceFiles>, &PieceFiles),
        lines: &Lines,
        room: Room,
        taken: &mut Taken,
    ) -> Result<(), StoreError> {
        let runs = lines.iter().flat_map(|(chunk, line)| data_runs(*chunk, line));
        self.take_home(taken, into, runs, room).await?;
        self.take_pages(taken, into, lines.keys().copied()).await?;
        let checkpoint = self.checkpoint();
        self.take_manifest(&checkpoint, self.pieces(), lines.len()).await?;
        let mut merged = Lines::new();
        let mut emptied = Vec::new();
        for (chunk, line) in lines {
            let mut there = self.line_of(into, *chunk).await?;
            let had_data = there.has_data();
            there.put_over(line);
            self.copy_chunk(into, from, *chunk, line).await?;
            if had_data && !there.has_data() {
                emptied.push(*chunk);
            }
            merged.insert(*chunk, there);
        }
        self.flush_home(into).await?;
        let pages = into.table.write(merged).await?;
        let pages: Vec<_> = pages.into_iter().map(|page| (older.id, page)).collect();
        self.write_manifest(Change { pages: Some(&pages), ..Change::default() }).await?;
        self.changed();
        into.table.write_other_copies().await?;
        self.punch(into, &emptied).await
    }

    /// The older piece has all of it, durably.
    async fn empty_lines(&self, younger: &Piece, from: &PieceFiles, lines: &Lines) -> Result<(), StoreError> {
        let chunks: Vec<ChunkIndex> = lines.keys().copied().collect();
        let emptied = lines.iter().map(|(chunk, line)| (*chunk, line.emptied())).collect();
        let pages = from.table.write(emptied).await?;
        let pages: Vec<_> = pages.into_iter().map(|page| (younger.id, page)).collect();
        self.write_manifest(Change { pages: Some(&pages), ..Change::default() }).await?;
        self.changed();
        from.table.write_other_copies().await?;
        self.punch(from, &chunks).await
    }

    /// Copies the data blocks of a chunk as they are: one that does not match its checksum does not match it there
    /// either, and is healed like any other.
    async fn copy_chunk(
        &self,
        into: &PieceFiles,
        from: &PieceFiles,
        chunk: ChunkIndex,
        line: &Chunk,
    ) -> Result<(), StoreError> {
        for (first, count) in data_runs(chunk, line) {
            let data = read_what_can_be_read(from, first, count as usize).await;
            self.count(|usage| usage.home_bytes_written += data.len() as u64);
            let written = into.home.write_at(first.byte_offset(), data, Durability::Volatile).await;
            written.map_err(|error| StoreError::io("home", &error))?;
        }
        Ok(())
    }

    /// The younger piece holds nothing any more, and what is applied goes to the older: it goes.
    async fn end_merge(&self, older: &Rc<Piece>, younger: &Rc<Piece>) -> Result<(), StoreError> {
        let mut pieces = self.0.manifest.borrow().pieces.clone();
        let Some(at) = pieces.iter().position(|mark| mark.id == younger.id) else { return Ok(()) };
        let frozen = pieces.remove(at).frozen;
        if let Some(mark) = pieces.iter_mut().find(|mark| mark.id == older.id) {
            mark.frozen = frozen;
        }
        let change = Change { pieces: Some(pieces), pages: Some(&[]), ..Change::default() };
        self.write_manifest(change).await?;
        // From here on without a wait: nobody sees one without the other.
        self.forget_table(younger);
        self.0.chain.merged(older, younger);
        self.0.owners.clear();
        self.changed();
        self.share_memory();
        self.remove_left_overs().await
    }
}

/// Runs of data blocks of a chunk.
fn data_runs(chunk: ChunkIndex, line: &Chunk) -> Vec<(BlockIndex, u64)> {
    let is_data = |within: usize| matches!(line.get(within), BlockSum::Data(_));
    let blocks = CHUNK_BLOCKS as usize;
    let (mut at, mut runs) = (0, Vec::new());
    while at < blocks {
        let length = (at..blocks).take_while(|within| is_data(*within)).count();
        if length > 0 {
            runs.push((BlockIndex(chunk.first_block().0 + at as u64), length as u64));
        }
        at += length.max(1);
    }
    runs
}

/// Blocks of home; zeros for those that the medium does not give back, which match no checksum but that of zeros.
async fn read_what_can_be_read(from: &PieceFiles, first: BlockIndex, blocks: usize) -> AlignedBuffer {
    if let Ok(data) = from.home.read_at(first.byte_offset(), blocks * BLOCK_BYTES).await {
        return data;
    }
    let mut out = AlignedBuffer::zeroed(blocks * BLOCK_BYTES);
    for n in 0..blocks {
        let block = BlockIndex(first.0 + n as u64);
        match from.home.read_at(block.byte_offset(), BLOCK_BYTES).await {
            Ok(data) => {
                out.as_mut_slice()[n * BLOCK_BYTES..(n + 1) * BLOCK_BYTES].copy_from_slice(data.as_slice());
            }
            Err(error) => {
                tracing::warn!(block = block.0, %error, "a block cannot be read; another replica has it")
            }
        }
    }
    out
}
