//! A digest of everything that a volume holds, its snapshots included, to compare replicas at one index.

use std::fmt;

use holdfast_types::{BLOCK_BYTES, BlockIndex, BlockRange, CHUNK_BLOCKS, ChunkIndex};

use super::layers::{LayerId, LayerMark};
use super::read::ReadError;
use super::table::BlockSum;
use super::{PAGE_CHUNKS, VolumeData};
use crate::StoreError;

/// A digest of a volume's whole content, of every layer: equal content, equal digest. In the oldest layer zero and absent
/// blocks are equal; in others they are not, for absent shows what is below.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VolumeDigest {
    sums: (u32, u32),
    /// Blocks whose checksum does not match.
    pub bad_blocks: u64,
}

impl fmt::Display for VolumeDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}{:08x}", self.sums.0, self.sums.1)
    }
}

/// A digest that is being taken.
struct Digesting {
    hashers: [crc32fast::Hasher; 2],
    bad_blocks: u64,
}

impl Digesting {
    fn add(&mut self, bytes: &[u8]) {
        self.hashers.iter_mut().for_each(|hasher| hasher.update(bytes));
    }

    fn add_block(&mut self, layer: LayerId, block: BlockIndex, sum: BlockSum, data: &[u8]) {
        let is_zero = data.iter().all(|byte| *byte == 0);
        if sum == BlockSum::Absent || (layer == LayerId::BASE && is_zero) {
            return;
        }
        self.add(&block.0.to_le_bytes());
        // Shorter than a block.
        self.add(if is_zero { b"zero" } else { data });
    }
}

impl VolumeData {
    /// Reads every block of every layer, from disk where it is not in memory, and digests the content.
    pub async fn digest(&self) -> Result<VolumeDigest, StoreError> {
        let second = crc32fast::Hasher::new_with_initial(0x9e37_79b9);
        let mut digesting = Digesting { hashers: [crc32fast::Hasher::new(), second], bad_blocks: 0 };
        for layer in self.layers() {
            if layer.id != LayerId::BASE {
                digesting.add(&layer.id.0.0.to_le_bytes());
            }
            match self.digest_layer(layer, &mut digesting).await {
                Ok(()) => {}
                Err(ReadError::Store(error)) => return Err(error),
                Err(error) => return Err(StoreError::Failed(error.to_string())),
            }
        }
        let [first, second] = digesting.hashers.map(crc32fast::Hasher::finalize);
        Ok(VolumeDigest { sums: (first, second), bad_blocks: digesting.bad_blocks })
    }

    async fn digest_layer(&self, layer: LayerMark, digesting: &mut Digesting) -> Result<(), ReadError> {
        let blocks = self.0.size.get().blocks();
        for chunk in (0..self.chunks_of_layer(layer).await?).map(ChunkIndex) {
            let start = chunk.first_block();
            let count = CHUNK_BLOCKS.min(blocks - start.0) as u32;
            let range = BlockRange::new(start, count);
            let sums = match self.layer_checksums(layer.id, chunk).await {
                Ok(sums) if sums.iter().all(|sum| *sum == BlockSum::Absent) => continue,
                Ok(sums) => sums,
                // Its page is lost: whatever it holds cannot be told.
                Err(ReadError::Store(StoreError::Damaged { .. })) => {
                    digesting.bad_blocks += u64::from(count);
                    continue;
                }
                Err(error) => return Err(error),
            };
            match self.read_layer(layer.id, range).await {
                Ok(read) => {
                    let data = range.blocks().zip(sums).zip(read.data.chunks_exact(BLOCK_BYTES));
                    data.for_each(|((block, sum), data)| digesting.add_block(layer.id, block, sum, data));
                }
                Err(ReadError::BadBlocks(bad)) => digesting.bad_blocks += bad.len() as u64,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Chunks of the volume beyond which a layer holds nothing. The map first: what is in neither when it is looked at was
    /// never written.
    async fn chunks_of_layer(&self, layer: LayerMark) -> Result<u64, ReadError> {
        let pieces = self.layer(layer.id)?;
        let in_maps = pieces.iter().map(|piece| piece.map.borrow().end().0.div_ceil(CHUNK_BLOCKS));
        let mut chunks = in_maps.max().unwrap_or_default();
        for files in pieces.iter().filter_map(|piece| piece.files()) {
            chunks = chunks.max(files.table.page_count().await? * PAGE_CHUNKS);
        }
        Ok(chunks.min(self.0.size.get().chunks()))
    }
}
