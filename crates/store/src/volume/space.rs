//! What a replica's blocks take on the medium.

use holdfast_types::CHUNK_BYTES;

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

/// How often sizes are asked for again when something was moved meanwhile.
const LOOKS_MAX: usize = 8;

/// What a snapshot more may have to keep, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Blocks of all layers that are home.
    pub home: u64,
    /// The same with whatever else may come home.
    pub most: u64,
    /// Whether what is home becomes less by itself: dropped snapshots are still to be merged, or what was thrown away to
    /// be removed.
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

    /// What all layers hold, which one snapshot more may have to keep, were everything written anew after it. What is not home
    /// yet comes home in whole chunks; whether they are there already is not known, so they count, but no layer holds
    /// more than the volume's size. None while too much is moved to tell.
    pub async fn held(&self) -> Result<Option<Held>, StoreError> {
        let own = format!("{}/", self.0.prefix);
        for _ in 0..LOOKS_MAX {
            let before = self.0.changes.get();
            let sizes = self.0.directory.sizes(&own).await.map_err(|error| StoreError::io(&own, &error))?;
            // What was moved in between was perhaps seen neither here nor there.
            if self.0.changes.get() == before {
                return Ok(Some(self.held_in(&Standing::of(sizes))));
            }
        }
        Ok(None)
    }

    fn held_in(&self, standing: &Standing) -> Held {
        let size = self.0.size.get().0.next_multiple_of(CHUNK_BYTES);
        let dirty = self.dirty();
        let is_falling = dirty.merges || dirty.layers || self.0.chain.has_retired();
        let mut held = Held { home: 0, most: 0, is_falling };
        for piece in self.0.chain.all() {
            let home = standing.of_file(&layers::name_of(&self.0.prefix, piece.id, "home"));
            let coming = piece.map.borrow().data_chunks() * CHUNK_BYTES;
            held.home += home.min(size);
            held.most += (home + coming).min(size);
        }
        held
    }
}
