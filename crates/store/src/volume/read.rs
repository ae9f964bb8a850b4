//! Reading blocks.

use std::rc::Rc;

use bytes::{Bytes, BytesMut};
use holdfast_types::{BLOCK_BYTES, BlockIndex, BlockRange, ChunkIndex, LogIndex, block_checksum, limits};

use super::extent::{Extent, What};
use super::layers::{LayerId, NoLayer, Piece, PieceFiles, Pieces, View};
use super::table::BlockSum;
use super::{BlockKind, VolumeData};
use crate::StoreError;
use crate::journal::planted;

/// A read that raced with the cleaner is looked up again so often.
const LOOKUPS_MAX: usize = 8;

/// Why blocks could not be read here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// More than one request may carry.
    #[error("{count} blocks are more than one read may have")]
    OutOfRange {
        /// Blocks asked for.
        count: u32,
    },
    /// These blocks do not match their checksums here: ask another replica.
    #[error("blocks {0:?} do not match their checksums on this replica")]
    BadBlocks(Vec<u64>),
    /// There is no such snapshot, or it was dropped meanwhile.
    #[error("the volume has no snapshot of index {0} here")]
    NoSnapshot(LogIndex),
    /// The layering is another one by now.
    #[error(transparent)]
    NoLayer(NoLayer),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Blocks with the checksums that they were checked against: those that were computed where they were written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckedBlocks {
    /// The blocks.
    pub data: Bytes,
    /// Their checksums, in order; those of zeros for what is absent or zero.
    pub checksums: Vec<u32>,
}

/// A block of zeros.
const ZEROS: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];

/// What a read fills.
pub(super) struct Filled<'o> {
    data: &'o mut [u8],
    /// Of data; what is absent or zero has none.
    sums: Vec<Option<u32>>,
    bad: Vec<u64>,
}

/// Where a run of blocks is to be read.
enum Part {
    Run(BlockIndex, Extent),
    Home(BlockIndex, u32),
}

/// Runs of blocks of which nothing was found yet.
pub(super) type Gaps = Vec<(BlockIndex, u32)>;

impl VolumeData {
    /// The blocks of a range; what is absent or zero reads as zeros. Every block is checked. What does not match is
    /// noted for the healer.
    pub async fn read(&self, range: BlockRange) -> Result<Bytes, ReadError> {
        self.read_checked(range).await.map(|blocks| blocks.data)
    }

    /// As [`Self::read`], with the checksums.
    pub async fn read_checked(&self, range: BlockRange) -> Result<CheckedBlocks, ReadError> {
        self.read_pieces(range, || self.view(View::Head)).await
    }

    /// As [`Self::read_checked`], of a view.
    pub async fn read_view(&self, view: View, range: BlockRange) -> Result<CheckedBlocks, ReadError> {
        self.read_pieces(range, || self.view(view)).await
    }

    /// As [`Self::read_checked`], of one layer, whatever is below.
    pub async fn read_layer(&self, layer: LayerId, range: BlockRange) -> Result<CheckedBlocks, ReadError> {
        self.read_pieces(range, || Ok(self.layer(layer)?)).await
    }

    async fn read_pieces(
        &self,
        range: BlockRange,
        pieces: impl Fn() -> Result<Pieces, ReadError>,
    ) -> Result<CheckedBlocks, ReadError> {
        if range.count > limits::REQUEST_BLOCKS_MAX {
            return Err(ReadError::OutOfRange { count: range.count });
        }
        let mut lookups = 0;
        loop {
            let before = self.0.changes.get();
            let mut out = BytesMut::zeroed(range.bytes() as usize);
            let mut filled =
                Filled { data: &mut out, sums: vec![None; range.count as usize], bad: Vec::new() };
            let read = self.read_into(&pieces()?, range, &mut filled).await;
            // INV-LAYER: a snapshot that was dropped meanwhile may be merged already, and show what came after it.
            pieces()?;
            let (sums, bad) = (filled.sums, filled.bad);
            lookups += 1;
            let again = self.0.changes.get() != before && lookups < LOOKUPS_MAX;
            match read {
                Ok(()) if bad.is_empty() => {
                    let of_zeros = |block| block_checksum(block, &ZEROS);
                    let sums = range.blocks().zip(sums);
                    let checksums = sums.map(|(block, sum)| sum.unwrap_or_else(|| of_zeros(block))).collect();
                    return Ok(CheckedBlocks { data: out.freeze(), checksums });
                }
                // The cleaner has moved them meanwhile, or the entry was purged between look-up and read.
                _ if again => {}
                Ok(()) => {
                    self.suspect(&bad);
                    return Err(ReadError::BadBlocks(bad));
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn parts(piece: &Piece, gaps: &[(BlockIndex, u32)]) -> Vec<Part> {
        let mut parts = Vec::new();
        for (start, count) in gaps {
            let range = BlockRange::new(*start, *count);
            let mut at = range.start.0;
            for (start, run) in piece.map.borrow().over(range) {
                if start.0 > at {
                    parts.push(Part::Home(BlockIndex(at), (start.0 - at) as u32));
                }
                at = start.0 + run.count;
                parts.push(Part::Run(start, run));
            }
            if at < range.end().0 {
                parts.push(Part::Home(BlockIndex(at), (range.end().0 - at) as u32));
            }
        }
        parts
    }

    /// Fills `out`. In a volume of many layers it is known which of them holds what, or found out first.
    async fn read_into(
        &self,
        pieces: &Pieces,
        range: BlockRange,
        out: &mut Filled<'_>,
    ) -> Result<(), StoreError> {
        let mut unknown: Gaps = vec![(range.start, range.count)];
        if pieces.len() > 1 && range.count > 0 {
            for chunk in (range.start.chunk().0..=BlockIndex(range.end().0 - 1).chunk().0).map(ChunkIndex) {
                match self.find_owners(pieces, chunk).await {
                    // The long way tells which blocks a lost page makes bad.
                    Ok(()) | Err(StoreError::Damaged { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
            // INV-LAYER: maps and owners are looked at without a wait between.
            let sources = self.sources(pieces, range);
            unknown = self.read_sources(pieces, range, &sources, out).await?;
        }
        self.read_layers(pieces, unknown, range, out).await
    }

    /// Fills the gaps, newest piece first. Of each block the map is looked at before the table, and a younger piece
    /// before an older: what is moved meanwhile moves in this direction.
    pub(super) async fn read_layers(
        &self,
        pieces: &[Rc<Piece>],
        mut gaps: Gaps,
        range: BlockRange,
        out: &mut Filled<'_>,
    ) -> Result<(), StoreError> {
        for piece in pieces.iter().rev() {
            if gaps.is_empty() {
                break;
            }
            let mut below = Gaps::new();
            for part in Self::parts(piece, &gaps) {
                match part {
                    Part::Run(start, run) if is_planted_hole(piece, &run) => {
                        below.push((start, run.count as u32));
                    }
                    Part::Run(start, run) => self.read_run(range, start, &run, out).await?,
                    Part::Home(start, count) => match piece.files() {
                        Some(files) => {
                            self.read_home(&files, range, (start, count), out, &mut below).await?;
                        }
                        None => below.push((start, count)),
                    },
                }
            }
            gaps = below;
        }
        Ok(())
    }

    pub(super) async fn read_run(
        &self,
        range: BlockRange,
        start: BlockIndex,
        run: &Extent,
        out: &mut Filled<'_>,
    ) -> Result<(), StoreError> {
        let What::Data { offset, .. } = &run.what else { return Ok(()) };
        let payload = self.0.payloads.read_payload(run.index, *offset, run.count as u32).await?;
        let first = (start.0 - range.start.0) as usize;
        out.data[first * BLOCK_BYTES..][..payload.len()].copy_from_slice(&payload);
        for n in 0..run.count as usize {
            let block = BlockIndex(start.0 + n as u64);
            let data = &out.data[(first + n) * BLOCK_BYTES..][..BLOCK_BYTES];
            out.sums[first + n] = run.checksum(n as u64);
            if out.sums[first + n] != Some(block_checksum(block, data)) {
                out.bad.push(block.0);
            }
        }
        Ok(())
    }

    /// Reads what a piece has at home of a range; what is absent there goes to `below`.
    pub(super) async fn read_home(
        &self,
        files: &PieceFiles,
        range: BlockRange,
        (start, count): (BlockIndex, u32),
        out: &mut Filled<'_>,
        below: &mut Gaps,
    ) -> Result<(), StoreError> {
        let mut sums = Vec::with_capacity(count as usize);
        for block in BlockRange::new(start, count).blocks() {
            match files.table.block(block).await {
                Ok(BlockSum::Absent) => {
                    match below.last_mut() {
                        Some((first, count)) if first.0 + u64::from(*count) == block.0 => *count += 1,
                        _ => below.push((block, 1)),
                    }
                    sums.push(BlockSum::Absent);
                }
                Ok(sum) => sums.push(sum),
                // What the page said is lost: its blocks are as good as rotten, and others have them.
                Err(StoreError::Damaged { .. }) => {
                    out.bad.push(block.0);
                    sums.push(BlockSum::Absent);
                }
                Err(error) => return Err(error),
            }
        }
        let mut at = 0;
        while at < sums.len() {
            if !matches!(sums[at], BlockSum::Data(_)) {
                at += 1;
                continue;
            }
            let run = sums[at..].iter().take_while(|sum| matches!(sum, BlockSum::Data(_))).count();
            let first = BlockIndex(start.0 + at as u64);
            let from = (first.0 - range.start.0) as usize;
            let part = &mut out.data[from * BLOCK_BYTES..(from + run) * BLOCK_BYTES];
            let unreadable = self.read_home_blocks(files, first, part).await;
            for (n, data) in part.chunks_exact(BLOCK_BYTES).enumerate() {
                let block = BlockIndex(first.0 + n as u64);
                let BlockSum::Data(expected) = sums[at + n] else { continue };
                out.sums[from + n] = Some(expected);
                let matches = !unreadable.contains(&block) && block_checksum(block, data) == expected;
                if !matches && !planted("home-unchecked") {
                    out.bad.push(block.0);
                }
            }
            at += run;
        }
        Ok(())
    }

    /// What the blocks of a range are, in runs.
    pub async fn block_status(&self, range: BlockRange) -> Result<Vec<(u32, BlockKind)>, ReadError> {
        self.view_status(View::Head, range).await
    }

    /// As [`Self::block_status`], of a view.
    pub async fn view_status(
        &self,
        view: View,
        range: BlockRange,
    ) -> Result<Vec<(u32, BlockKind)>, ReadError> {
        if range.count > limits::REQUEST_BLOCKS_MAX {
            return Err(ReadError::OutOfRange { count: range.count });
        }
        let mut runs: Vec<(u32, BlockKind)> = Vec::new();
        let mut chunk: Option<(ChunkIndex, Vec<BlockSum>)> = None;
        for block in range.blocks() {
            if chunk.as_ref().is_none_or(|(at, _)| *at != block.chunk()) {
                chunk = Some((block.chunk(), self.view_checksums(view, block.chunk()).await?));
            }
            let kind = match chunk.as_ref().map(|(_, sums)| sums[block.within_chunk()]) {
                Some(BlockSum::Data(_)) => BlockKind::Data,
                Some(BlockSum::Zero) => BlockKind::Zero,
                _ => BlockKind::Absent,
            };
            match runs.last_mut() {
                Some((count, last)) if *last == kind => *count += 1,
                _ => runs.push((1, kind)),
            }
        }
        Ok(runs)
    }
}

pub(super) fn is_planted_hole(piece: &Piece, run: &Extent) -> bool {
    let is_trim = matches!(run.what, What::Absent);
    is_trim && !piece.is_base() && crate::journal::planted("trim-falls-through")
}
