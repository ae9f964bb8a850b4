//! What a replica's blocks take on the medium.

use holdfast_types::{BLOCK_BYTES, CHUNK_BYTES};

use super::VolumeData;
use super::layers::{self, LayerId};
use crate::{Standing, StoreError};

/// Space of a replica on its medium, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct SpaceUsed {
    /// For blocks of the oldest layer and of the one that is written: all there are without snapshots.
    pub blocks: u64,
    /// For the layers between them, blocks and tables.
    pub snapshots: u64,
    /// For everything that is the replica's: blocks, tables and snapshots, its manifest, and what a rebuild has staged.
    pub allocated: u64,
}

/// What a snapshot more may have to keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Bytes of blocks in all layers.
    pub bytes: u64,
    /// Whether it becomes less by itself: dropped snapshots are still to be merged, or what was thrown away to be removed.
    pub is_falling: bool,
}

impl VolumeData {
    /// Space on the medium, looked at now.
    pub async fn space(&self) -> Result<SpaceUsed, StoreError> {
        let own = format!("{}/", self.0.prefix);
        let sizes = self.0.directory.sizes(&own).await.map_err(|error| StoreError::io(&own, &error))?;
        Ok(self.space_in(&Standing::of(sizes)))
    }

    /// Space on the medium as it was counted then.
    pub fn space_in(&self, standing: &Standing) -> SpaceUsed {
        let mut used = SpaceUsed::default();
        let top = self.layers().last().map_or(LayerId::BASE, |layer| layer.id);
        for piece in self.0.chain.all() {
            let file = |name| standing.of_file(&layers::name_of(&self.0.prefix, piece.id, name));
            if piece.is_base() || piece.id >= top {
                used.blocks += file("home");
            } else {
                used.snapshots += file("home") + file("table");
            }
        }
        used.allocated = standing.below(&format!("{}/", self.0.prefix));
        used
    }

    /// Bytes of blocks that one snapshot more may have to keep, were everything written anew after it: what all layers
    /// hold. Of what is not home yet it is not known whether it takes room that is taken already, so it counts whole;
    /// but no layer holds more than the volume's size. So this errs upwards only.
    pub async fn held(&self) -> Result<Held, StoreError> {
        let own = format!("{}/", self.0.prefix);
        let sizes = self.0.directory.sizes(&own).await.map_err(|error| StoreError::io(&own, &error))?;
        let standing = Standing::of(sizes);
        let most = self.0.size.get().0.next_multiple_of(CHUNK_BYTES);
        let of_piece = |piece: &layers::Piece| {
            let home = standing.of_file(&layers::name_of(&self.0.prefix, piece.id, "home"));
            (home + piece.map.borrow().data_blocks() * BLOCK_BYTES as u64).min(most)
        };
        let dirty = self.dirty();
        Ok(Held {
            bytes: self.0.chain.all().iter().map(|piece| of_piece(piece)).sum(),
            is_falling: dirty.merges || dirty.layers || self.0.chain.has_retired(),
        })
    }
}
