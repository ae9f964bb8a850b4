//! Table pages that are lost when a rebuild's content is brought home: they are no reason to give the replica up.
//!
//! A rebuild brings all of such a page's chunks, for they differ from any other replica's. Then the page is restored
//! from what it brought. If it was lost only after it had been compared, a part of it was brought: it stays lost, durably,
//! and the healer takes it from another replica.

use std::collections::{BTreeMap, BTreeSet};

use holdfast_types::{BlockIndex, CHUNK_BLOCKS, ChunkIndex};

use super::layers::{LayerId, PieceFiles};
use super::pages::Pages;
use super::table::{BlockSum, Chunk, Table};
use super::{Change, VolumeData};
use crate::StoreError;
use crate::journal::planted;

impl VolumeData {
    /// A chunk's line, or none if its page is lost: from here on it counts as that.
    pub(super) async fn line_or_lost(
        &self,
        files: &PieceFiles,
        chunk: ChunkIndex,
    ) -> Result<Chunk, StoreError> {
        if let Some(line) = files.table.chunk_if_there(chunk).await? {
            return Ok(line);
        }
        // What a page says that is lost now and is there in a moment would be of before the switch.
        files.table.distrust(chunk);
        Ok(Chunk::default())
    }

    /// Takes lines of lost pages out of `lines`, and restores those pages of which everything was staged. Each is listed
    /// by a manifest of its own before the next one is written.
    pub(super) async fn restore_staged(
        &self,
        pages: &mut Pages,
        (piece, files): (LayerId, &PieceFiles),
        lines: &mut BTreeMap<ChunkIndex, Chunk>,
        staged: &BTreeMap<BlockIndex, BlockSum>,
    ) -> Result<(), StoreError> {
        let mut lost = BTreeSet::new();
        for chunk in lines.keys() {
            if files.table.is_lost(*chunk).await? {
                lost.extend(Table::page_chunks(*chunk).next());
            }
        }
        for first in lost {
            let chunks: Vec<ChunkIndex> = Table::page_chunks(first).collect();
            let of_page: BTreeMap<ChunkIndex, Chunk> =
                chunks.iter().filter_map(|chunk| Some((*chunk, lines.remove(chunk)?))).collect();
            let is_staged = |chunk: &ChunkIndex| {
                let first = chunk.first_block();
                staged.range(first..BlockIndex(first.0 + CHUNK_BLOCKS)).count() as u64 == CHUNK_BLOCKS
            };
            if !chunks.iter().all(is_staged) && !planted("restore-what-was-not-staged") {
                tracing::warn!(replica = %self.0.prefix, chunk = first.0, "a table page is lost, and a rebuild brought a part of it");
                chunks.iter().for_each(|chunk| self.suspect_chunk(*chunk));
                continue;
            }
            self.write_manifest(Change { pages: Some(pages), ..Change::default() }).await?;
            self.write_owed_copies().await?;
            pages.clear();
            let restored = files.table.restore(of_page).await?;
            pages.extend(restored.into_iter().map(|page| (piece, page)));
            self.count_health(|health| health.healed_pages += 1);
        }
        Ok(())
    }
}
