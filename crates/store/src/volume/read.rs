//! Reading blocks.

use bytes::{Bytes, BytesMut};
use holdfast_types::{BLOCK_BYTES, BlockIndex, BlockRange, CHUNK_BLOCKS, ChunkIndex, block_checksum, limits};

use super::extent::{Extent, What};
use super::table::BlockSum;
use super::{BlockKind, VolumeData, VolumeDigest};
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
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Where a run of blocks is to be read.
enum Piece {
    Run(BlockIndex, Extent),
    Home(BlockIndex, u32),
}

impl VolumeData {
    /// The blocks of a range; what is absent or zero reads as zeros. Every block is checked.
    pub async fn read(&self, range: BlockRange) -> Result<Bytes, ReadError> {
        if range.count > limits::REQUEST_BLOCKS_MAX {
            return Err(ReadError::OutOfRange { count: range.count });
        }
        let mut lookups = 0;
        loop {
            let before = self.0.changes.get();
            let mut out = BytesMut::zeroed(range.bytes() as usize);
            match self.read_into(range, &mut out).await {
                Ok(bad) if bad.is_empty() => return Ok(out.freeze()),
                Ok(bad) => {
                    lookups += 1;
                    if self.0.changes.get() == before || lookups >= LOOKUPS_MAX {
                        return Err(ReadError::BadBlocks(bad));
                    }
                }
                Err(error) => {
                    lookups += 1;
                    // The entry was purged between look-up and read: its blocks are home by now.
                    if self.0.changes.get() == before || lookups >= LOOKUPS_MAX {
                        return Err(error.into());
                    }
                }
            }
        }
    }

    fn pieces(&self, range: BlockRange) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let mut at = range.start.0;
        for (start, run) in self.0.map.borrow().over(range) {
            if start.0 > at {
                pieces.push(Piece::Home(BlockIndex(at), (start.0 - at) as u32));
            }
            at = start.0 + run.count;
            pieces.push(Piece::Run(start, run));
        }
        if at < range.end().0 {
            pieces.push(Piece::Home(BlockIndex(at), (range.end().0 - at) as u32));
        }
        pieces
    }

    /// Fills `out`; gives the blocks that do not match.
    async fn read_into(&self, range: BlockRange, out: &mut [u8]) -> Result<Vec<u64>, StoreError> {
        let mut bad = Vec::new();
        for piece in self.pieces(range) {
            let (start, count) = match &piece {
                Piece::Run(start, run) => (*start, run.count as usize),
                Piece::Home(start, count) => (*start, *count as usize),
            };
            let from = (start.0 - range.start.0) as usize * BLOCK_BYTES;
            let place = &mut out[from..from + count * BLOCK_BYTES];
            match piece {
                Piece::Run(start, run) => self.read_run(start, &run, place, &mut bad).await?,
                Piece::Home(start, count) => self.read_home(start, count, place, &mut bad).await?,
            }
        }
        Ok(bad)
    }

    async fn read_run(
        &self,
        start: BlockIndex,
        run: &Extent,
        place: &mut [u8],
        bad: &mut Vec<u64>,
    ) -> Result<(), StoreError> {
        let What::Data { offset, .. } = &run.what else { return Ok(()) };
        let payload = self.0.payloads.read_payload(run.index, *offset, run.count as u32).await?;
        place.copy_from_slice(&payload);
        for (n, data) in (0u64..).zip(place.chunks_exact(BLOCK_BYTES)) {
            let block = BlockIndex(start.0 + n);
            if run.checksum(n) != Some(block_checksum(block, data)) {
                bad.push(block.0);
            }
        }
        Ok(())
    }

    async fn read_home(
        &self,
        start: BlockIndex,
        count: u32,
        place: &mut [u8],
        bad: &mut Vec<u64>,
    ) -> Result<(), StoreError> {
        let mut sums = Vec::with_capacity(count as usize);
        for block in BlockRange::new(start, count).blocks() {
            match self.0.table.block(block).await {
                Ok(sum) => sums.push(sum),
                // What the page said is lost: its blocks are as good as rotten, and others have them.
                Err(StoreError::Damaged { .. }) => {
                    bad.push(block.0);
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
            self.count(|usage| usage.home_bytes_read += (run * BLOCK_BYTES) as u64);
            let read = self.0.home.read_at(first.byte_offset(), run * BLOCK_BYTES).await;
            let data = read.map_err(|error| StoreError::io("home", &error))?;
            let part = &mut place[at * BLOCK_BYTES..(at + run) * BLOCK_BYTES];
            part.copy_from_slice(data.as_slice());
            for (n, data) in part.chunks_exact(BLOCK_BYTES).enumerate() {
                let block = BlockIndex(first.0 + n as u64);
                let matches = sums[at + n] == BlockSum::Data(block_checksum(block, data));
                if !matches && !planted("home-unchecked") {
                    bad.push(block.0);
                }
            }
            at += run;
        }
        Ok(())
    }

    /// What the blocks of a range are, in runs.
    pub async fn block_status(&self, range: BlockRange) -> Result<Vec<(u32, BlockKind)>, ReadError> {
        if range.count > limits::REQUEST_BLOCKS_MAX {
            return Err(ReadError::OutOfRange { count: range.count });
        }
        let mut runs: Vec<(u32, BlockKind)> = Vec::new();
        let mut chunk: Option<(ChunkIndex, Vec<BlockSum>)> = None;
        for block in range.blocks() {
            if chunk.as_ref().is_none_or(|(at, _)| *at != block.chunk()) {
                chunk = Some((block.chunk(), self.chunk_checksums(block.chunk()).await?));
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

    /// Reads every block, from disk where it is not in memory, and digests the content.
    pub async fn digest(&self) -> Result<VolumeDigest, StoreError> {
        let mut first = crc32fast::Hasher::new();
        let mut second = crc32fast::Hasher::new_with_initial(0x9e37_79b9);
        let mut bad_blocks = 0;
        let chunks = self.0.size.get().chunks();
        let blocks = self.0.size.get().blocks();
        for chunk in (0..chunks).map(ChunkIndex) {
            let start = chunk.first_block();
            let count = CHUNK_BLOCKS.min(blocks - start.0) as u32;
            let empty =
                self.chunk_checksums(chunk).await?.iter().all(|sum| !matches!(sum, BlockSum::Data(_)));
            if empty {
                continue;
            }
            let range = BlockRange::new(start, count);
            let data = match self.read(range).await {
                Ok(data) => data,
                Err(ReadError::BadBlocks(bad)) => {
                    bad_blocks += bad.len() as u64;
                    continue;
                }
                Err(ReadError::Store(error)) => return Err(error),
                Err(error) => return Err(StoreError::Failed(error.to_string())),
            };
            for (block, data) in range.blocks().zip(data.chunks_exact(BLOCK_BYTES)) {
                if data.iter().any(|byte| *byte != 0) {
                    for hasher in [&mut first, &mut second] {
                        hasher.update(&block.0.to_le_bytes());
                        hasher.update(data);
                    }
                }
            }
        }
        Ok(VolumeDigest { sums: (first.finalize(), second.finalize()), bad_blocks })
    }
}
