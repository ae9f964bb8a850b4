//! What a rebuild does about blocks and pages of its source that have rotted, perhaps where no reader ever looks: the source
//! heals what it is asked for, and what it cannot give the receiver takes from others.

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use holdfast_env::Instant;
use holdfast_store::StoreError;
use holdfast_store::volume::{BlockSum, CheckedBlocks, LayerId, LayerMark, ReadError, VolumeData};
use holdfast_types::{BlockIndex, BlockRange, ChunkIndex, StoreId, block_checksum};

use crate::heal;
use crate::volume::Volume;

/// How long a source heals what one question asks for; shorter than a call.
const HEAL_PATIENCE: Duration = Duration::from_secs(5);

/// Until when what a question asks for that has come now is healed.
pub(crate) fn deadline() -> Instant {
    Instant::now() + HEAL_PATIENCE
}

/// How each block of a chunk is in a layer of this source.
pub(crate) async fn checksums(
    volume: &Volume,
    layer: LayerId,
    chunk: ChunkIndex,
    until: Instant,
) -> Result<Vec<BlockSum>, ReadError> {
    match volume.data().layer_checksums(layer, chunk).await {
        Err(ReadError::Store(StoreError::Damaged { .. })) => {
            heal_first(volume.data().clone(), chunk, until).await;
            volume.data().layer_checksums(layer, chunk).await
        }
        other => other,
    }
}

/// Blocks of a layer of this source.
pub(crate) async fn blocks(
    volume: &Volume,
    layer: LayerId,
    range: BlockRange,
    until: Instant,
) -> Result<CheckedBlocks, ReadError> {
    match volume.data().read_layer(layer, range).await {
        Err(ReadError::BadBlocks(bad)) => {
            let chunks: BTreeSet<ChunkIndex> = bad.iter().map(|block| BlockIndex(*block).chunk()).collect();
            for chunk in chunks {
                heal_first(volume.data().clone(), chunk, until).await;
            }
            volume.data().read_layer(layer, range).await
        }
        other => other,
    }
}

/// What is asked for is bad here: the healer is told, and waited for. If it takes too long the question fails, and all
/// goes on that has begun: what is written is not broken off halfway.
async fn heal_first(data: VolumeData, chunk: ChunkIndex, until: Instant) {
    let looking = data.clone();
    let looked = holdfast_env::spawn("rotten-source", async move {
        for layer in looking.layers() {
            if let Err(error) = looking.verify_chunk(layer.id, chunk).await {
                // The healer finds the same, and does what is to be done.
                tracing::error!(chunk = chunk.0, %error, "what a rebuild asks for is not looked at");
            }
        }
        looking.suspect_chunk(chunk);
    });
    let healed = async {
        if looked.await.is_ok() {
            data.well(chunk).await;
        }
    };
    let late = holdfast_env::timeout(until.since(Instant::now()), healed).await.is_err();
    if late {
        tracing::warn!(chunk = chunk.0, "what a rebuild asks for is not healed yet");
    }
}

/// Blocks of one chunk from another replica than the source: the very ones that the source's checksums tell of.
pub(crate) async fn blocks_elsewhere(
    volume: &Volume,
    others: &[StoreId],
    layer: LayerMark,
    range: BlockRange,
    wanted: &[BlockSum],
) -> Option<(Bytes, Vec<u32>)> {
    let mask = range.blocks().fold(0, |mask, block| mask | 1 << block.within_chunk());
    for store in others {
        let found = match heal::ask(volume, *store, layer, &[range.start.chunk()], mask).await {
            Ok(mut found) => found.pop().map(|(_, blocks)| blocks).unwrap_or_default(),
            Err(error) => {
                tracing::debug!(%store, %error, "a peer does not give blocks for a rebuild");
                continue;
            }
        };
        let sums: Vec<u32> = found.iter().map(|(block, data)| block_checksum(*block, data)).collect();
        let are_wanted = sums.len() == wanted.len()
            && sums.iter().zip(wanted).all(|(sum, wanted)| *wanted == BlockSum::Data(*sum));
        if are_wanted {
            let mut data = BytesMut::with_capacity(range.bytes() as usize);
            found.iter().for_each(|(_, block)| data.extend_from_slice(block));
            return Some((data.freeze(), sums));
        }
    }
    None
}
