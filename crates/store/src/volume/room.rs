//! Room on the medium for what a pass writes, taken before it writes anything.
//!
//! INV-SPACE: a pass that finds no room leaves the medium as it was: what it took it gives back. So a pass that fails
//! does not eat what trims and drops need, and may be repeated for as long as it takes.

use std::rc::Rc;

use holdfast_types::{BlockIndex, CHUNK_BLOCKS, CHUNK_BYTES, ChunkIndex};

use super::layers::PieceFiles;
use super::{Checkpoint, VolumeData};
use crate::StoreError;
use crate::journal::planted;

/// How much room is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Room {
    /// A chunk's first write takes room for all of it, so that random writes do not shatter the file's extents.
    Whole,
    /// No more than what is written: the medium is full, and the store's reserve was given up for it.
    Tight,
}

/// What a pass has taken that was not there before.
#[derive(Default)]
pub(super) struct Taken {
    chunks: Vec<(Rc<PieceFiles>, ChunkIndex)>,
    pages: Vec<(Rc<PieceFiles>, ChunkIndex)>,
}

/// The part of a run of blocks that lies in a chunk, in bytes of the file.
fn part_in(chunk: ChunkIndex, at: BlockIndex, count: u64) -> (u64, u64) {
    let first = chunk.first_block().0.max(at.0);
    let end = (chunk.first_block().0 + CHUNK_BLOCKS).min(at.0 + count);
    (BlockIndex(first).byte_offset(), BlockIndex(end).byte_offset() - BlockIndex(first).byte_offset())
}

impl VolumeData {
    /// Takes room at home for runs of blocks, in block order.
    pub(super) async fn take_home(
        &self,
        taken: &mut Taken,
        files: &Rc<PieceFiles>,
        runs: impl Iterator<Item = (BlockIndex, u64)>,
        room: Room,
    ) -> Result<(), StoreError> {
        let mut last = None;
        for (at, count) in runs {
            let end = BlockIndex(at.0 + count - 1).chunk();
            for chunk in (at.chunk().0..=end.0).map(ChunkIndex) {
                // Where the page is lost nobody knows: such a chunk gets room, and is never given back.
                let line = files.table.chunk_if_there(chunk).await?;
                let has_data = line.as_ref().is_some_and(|line| line.has_data());
                let is_new = line.is_some() && !has_data;
                let (offset, length) = match room {
                    // It was taken whole when it was new.
                    Room::Whole if has_data || last == Some(chunk) => continue,
                    Room::Whole => (chunk.first_block().byte_offset(), CHUNK_BYTES),
                    Room::Tight => part_in(chunk, at, count),
                };
                if is_new && last != Some(chunk) {
                    taken.chunks.push((files.clone(), chunk));
                }
                last = Some(chunk);
                let allocated = files.home.allocate(offset, length).await;
                allocated.map_err(|error| StoreError::io("home", &error))?;
            }
        }
        Ok(())
    }

    /// Takes room in the table for the lines of chunks, in order: for both copies of each page that is new.
    pub(super) async fn take_pages(
        &self,
        taken: &mut Taken,
        files: &Rc<PieceFiles>,
        chunks: impl Iterator<Item = ChunkIndex>,
    ) -> Result<(), StoreError> {
        let mut last = None;
        for chunk in chunks {
            let page = chunk.0 / super::PAGE_CHUNKS;
            if last.replace(page) == Some(page) || !files.table.is_new_page(chunk).await? {
                continue;
            }
            taken.pages.push((files.clone(), chunk));
            files.table.take_page(chunk).await?;
        }
        Ok(())
    }

    /// Takes room for the next manifest, with another checkpoint and a list of so many pages.
    pub(super) async fn take_manifest(
        &self,
        checkpoint: &Checkpoint,
        pieces: usize,
        pages: usize,
    ) -> Result<(), StoreError> {
        let stale: usize = {
            let all = self.0.chain.all();
            all.iter().filter_map(|piece| piece.files()).map(|files| files.table.stale().len()).sum()
        };
        let (generation, bytes) = {
            let manifest = self.0.manifest.borrow();
            (manifest.generation + 1, manifest.bytes_with(checkpoint, pieces, pages + stale))
        };
        self.0.manifest_file.take_room(generation, bytes).await
    }

    /// Gives back what of it is not used.
    pub(super) async fn give_back(&self, taken: &Taken) -> Result<(), StoreError> {
        if planted("keep-what-was-taken") {
            return Ok(());
        }
        for (files, chunk) in &taken.chunks {
            self.punch(files, std::slice::from_ref(chunk)).await?;
        }
        for (files, chunk) in &taken.pages {
            files.table.give_page_back(*chunk).await?;
        }
        Ok(())
    }

    /// The outcome of a pass: if there was no room for it, what it had taken goes back first.
    pub(super) async fn or_give_back<T>(
        &self,
        outcome: Result<T, StoreError>,
        taken: &Taken,
    ) -> Result<T, StoreError> {
        if outcome.as_ref().is_err_and(StoreError::is_full) {
            self.give_back(taken).await?;
        }
        outcome
    }

    /// Gives back what rebuilds took that were given up. The caller holds the cleaning lock.
    pub(super) async fn give_back_abandoned(&self) -> Result<(), StoreError> {
        let abandoned = std::mem::take(&mut *self.0.abandoned.borrow_mut());
        for taken in &abandoned {
            self.give_back(taken).await?;
        }
        Ok(())
    }
}
