//! What the blocks of a chunk are, seen through the layers; and the change marks that rebuilds compare.

use std::rc::Rc;

use holdfast_types::{BlockIndex, BlockRange, CHUNK_BLOCKS, ChunkIndex, LogIndex};

use super::extent::{Extent, What};
use super::layers::{LayerId, LayerMark, NoLayer, Piece, View};
use super::read::ReadError;
use super::table::BlockSum;
use super::{ChunkSummary, Clear, VolumeData};
use crate::StoreError;
use crate::journal::planted;

fn blocks_of(chunk: ChunkIndex) -> BlockRange {
    BlockRange::new(chunk.first_block(), CHUNK_BLOCKS as u32)
}

fn chunks_of(from: ChunkIndex, count: u32) -> impl Iterator<Item = ChunkIndex> {
    (from.0..from.0.saturating_add(u64::from(count))).map(ChunkIndex)
}

/// What block `n` of a run is in its piece.
pub(super) fn sum_of(piece: &Piece, run: &Extent, n: u64) -> BlockSum {
    match run.what {
        What::Zero => VolumeData::cleared_in(piece, Clear::Zero),
        What::Absent => VolumeData::cleared_in(piece, Clear::Trim),
        What::Data { .. } => run.checksum(n).map_or(BlockSum::Absent, BlockSum::Data),
    }
}

/// What each block of a chunk is in some pieces, the newest that says anything first; absent if none does.
pub(super) async fn resolve(pieces: &[Rc<Piece>], chunk: ChunkIndex) -> Result<Vec<BlockSum>, StoreError> {
    let mut found: Vec<Option<BlockSum>> = vec![None; CHUNK_BLOCKS as usize];
    for piece in pieces.iter().rev() {
        for (at, run) in piece.map.borrow().over(blocks_of(chunk)) {
            for n in 0..run.count {
                found[BlockIndex(at.0 + n).within_chunk()].get_or_insert_with(|| sum_of(piece, &run, n));
            }
        }
        if found.iter().all(Option::is_some) {
            break;
        }
        let Some(files) = piece.files() else { continue };
        let line = files.table.chunk(chunk).await?;
        for (within, found) in found.iter_mut().enumerate() {
            let sum = line.get(within);
            if found.is_none() && sum != BlockSum::Absent {
                *found = Some(sum);
            }
        }
    }
    Ok(found.into_iter().map(|sum| sum.unwrap_or(BlockSum::Absent)).collect())
}

impl ChunkSummary {
    /// Of a chunk of which nobody here knows what it holds: it equals no other.
    fn unknown(chunk: ChunkIndex) -> Self {
        Self { chunk, incarnation: 0, last_index: LogIndex::ZERO, present: true }
    }
}

impl VolumeData {
    /// How each block of a chunk is now.
    pub async fn chunk_checksums(&self, chunk: ChunkIndex) -> Result<Vec<BlockSum>, StoreError> {
        resolve(&self.0.chain.live(), chunk).await
    }

    /// How each block of a chunk is in a view.
    pub async fn view_checksums(&self, view: View, chunk: ChunkIndex) -> Result<Vec<BlockSum>, ReadError> {
        let sums = resolve(&self.view(view)?, chunk).await?;
        // One that was dropped meanwhile may be merged already.
        self.view(view)?;
        Ok(sums)
    }

    /// How each block of a chunk is in one layer, whatever is below.
    pub async fn layer_checksums(
        &self,
        layer: LayerId,
        chunk: ChunkIndex,
    ) -> Result<Vec<BlockSum>, ReadError> {
        let sums = resolve(&self.layer(layer)?, chunk).await;
        let sums = sums.inspect_err(|_| self.suspect_chunk(chunk))?;
        self.layer(layer)?;
        Ok(sums)
    }

    /// Change marks of a layer's chunks from `from` on, of `count` chunks, that were ever changed in it. The mark of a
    /// layer that consists of several pieces is the latest of them (INV-MARK). A chunk whose page is lost equals no other.
    pub async fn chunk_summaries(
        &self,
        layer: LayerId,
        from: ChunkIndex,
        count: u32,
    ) -> Result<Vec<ChunkSummary>, ReadError> {
        let mut out = Vec::new();
        for chunk in chunks_of(from, count) {
            let summary = self.summary(layer, chunk).await?;
            if summary.last_index > LogIndex::ZERO || summary.present {
                out.push(summary);
            }
        }
        self.layer(layer)?;
        Ok(out)
    }

    /// Taken in one moment: what is moved meanwhile, from the map to home or from a younger piece to an older one, would
    /// be seen in neither.
    async fn summary(&self, layer: LayerId, chunk: ChunkIndex) -> Result<ChunkSummary, ReadError> {
        loop {
            let before = self.0.changes.get();
            let pieces = self.layer(layer)?;
            let found = match table_summary(&pieces, chunk).await {
                Ok(summary) => Some(summary),
                Err(StoreError::Damaged { .. }) => None,
                Err(error) => return Err(error.into()),
            };
            if self.0.changes.get() != before && !planted("summary-of-two-moments") {
                continue;
            }
            let Some(mut summary) = found else {
                self.suspect_chunk(chunk);
                return Ok(ChunkSummary::unknown(chunk));
            };
            for piece in pieces.iter() {
                for (_, run) in piece.map.borrow().over(blocks_of(chunk)) {
                    summary.incarnation = self.0.identity.incarnation;
                    summary.last_index = summary.last_index.max(run.index);
                    summary.present |= sum_of(piece, &run, 0) != BlockSum::Absent;
                }
            }
            return Ok(summary);
        }
    }

    /// The pieces that are on disk here of what is one layer elsewhere, as the durable manifest names them.
    fn home_pieces(&self, layer: LayerMark) -> Vec<Rc<Piece>> {
        let named: Vec<LayerId> = {
            let manifest = self.0.manifest.borrow();
            manifest.pieces.iter().map(|mark| mark.id).filter(|id| layer.spans(*id)).collect()
        };
        self.0.chain.all().into_iter().filter(|piece| named.contains(&piece.id)).collect()
    }

    /// Everything in memory that an older process of this layer's commands has left or will leave.
    fn covering(&self, layer: LayerMark) -> Vec<Rc<Piece>> {
        self.0.chain.all().into_iter().filter(|piece| layer.spans(piece.id)).collect()
    }

    /// As [`Self::chunk_summaries`], of what is home alone, for a replica that is being rebuilt: what the map holds goes
    /// when the rebuild is switched in. A chunk that the map covers equals no other, nor does one whose page is lost.
    pub async fn home_summaries(
        &self,
        layer: LayerMark,
        from: ChunkIndex,
        count: u32,
    ) -> Result<Vec<ChunkSummary>, StoreError> {
        let (pieces, covering) = (self.home_pieces(layer), self.covering(layer));
        let mut out = Vec::new();
        for chunk in chunks_of(from, count) {
            let (mut summary, is_lost) = match table_summary(&pieces, chunk).await {
                Ok(summary) => (summary, false),
                Err(StoreError::Damaged { .. }) => (ChunkSummary::unknown(chunk), true),
                Err(error) => return Err(error),
            };
            let range = blocks_of(chunk);
            if is_lost || covering.iter().any(|piece| !piece.map.borrow().over(range).is_empty()) {
                summary = ChunkSummary::unknown(chunk);
                out.push(summary);
            } else if summary.last_index > LogIndex::ZERO {
                out.push(summary);
            }
        }
        Ok(out)
    }

    /// How each block of a chunk is at home in what is one layer elsewhere; `None` for those that the map covers,
    /// and for all if their page is lost.
    pub async fn home_checksums(
        &self,
        layer: LayerMark,
        chunk: ChunkIndex,
    ) -> Result<Vec<Option<BlockSum>>, StoreError> {
        let mut sums = vec![BlockSum::Absent; CHUNK_BLOCKS as usize];
        for piece in self.home_pieces(layer) {
            let Some(files) = piece.files() else { continue };
            let Some(line) = files.table.chunk_if_there(chunk).await? else {
                return Ok(vec![None; CHUNK_BLOCKS as usize]);
            };
            for (within, sum) in sums.iter_mut().enumerate() {
                if line.get(within) != BlockSum::Absent {
                    *sum = line.get(within);
                }
            }
        }
        let mut sums: Vec<Option<BlockSum>> = sums.into_iter().map(Some).collect();
        for piece in self.covering(layer) {
            for (at, run) in piece.map.borrow().over(blocks_of(chunk)) {
                for n in 0..run.count {
                    sums[BlockIndex(at.0 + n).within_chunk()] = None;
                }
            }
        }
        Ok(sums)
    }
}

/// The mark of a chunk over some pieces' tables, the youngest first: a merge moves from it to the older one.
async fn table_summary(pieces: &[Rc<Piece>], chunk: ChunkIndex) -> Result<ChunkSummary, StoreError> {
    let mut mark = (LogIndex::ZERO, 0);
    let mut present = false;
    let mut order: Vec<_> = pieces.iter().rev().filter_map(|piece| piece.files()).collect();
    if planted("summary-of-two-moments") {
        order.reverse();
    }
    for files in order {
        let line = files.table.chunk(chunk).await?;
        mark = mark.max(line.mark());
        present |= line.is_present();
    }
    Ok(ChunkSummary { chunk, incarnation: mark.1, last_index: mark.0, present })
}

impl From<NoLayer> for ReadError {
    fn from(error: NoLayer) -> Self {
        Self::NoLayer(error)
    }
}
