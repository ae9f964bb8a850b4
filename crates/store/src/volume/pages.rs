//! Writing table pages under manifests, which list them: as many as change, and no more at once than a list may have.
//!
//! A page is listed until its second copy is written, so that an older copy is not believed when the new one is lost; one
//! that is lost is listed until it is restored. If more pages change than a list has room for, they are written part by
//! part, each under a manifest of its own over the checkpoint that there is: what they say that is newer is repeated from
//! the journal before anything is served, as after any crash in a pass.

use std::collections::BTreeMap;

use holdfast_types::ChunkIndex;

use super::layers::{LayerId, LayerMark, PieceFiles};
use super::manifest::PAGES_LISTED_MAX;
use super::table::{Chunk, PageMark};
use super::{Checkpoint, PAGE_CHUNKS, VolumeData};
use crate::StoreError;
use crate::journal::planted;

/// Pages that are written under one manifest; the rest of its list is for those that are lost.
const WRITTEN_MAX: usize = PAGES_LISTED_MAX / 2;

/// Pages that were written, by layer.
pub(super) type Pages = Vec<(LayerId, PageMark)>;

/// What the next manifest says otherwise.
#[derive(Default)]
pub(super) struct Change<'a> {
    pub(super) checkpoint: Option<Checkpoint>,
    pub(super) staged: Option<bool>,
    pub(super) pieces: Option<Vec<LayerMark>>,
    /// The pages that were written for it; without them the list stays.
    pub(super) pages: Option<&'a [(LayerId, PageMark)]>,
}

impl VolumeData {
    /// Writes the next generation. Of the list of pages nothing is forgotten: pages that are lost stay on it.
    pub(super) async fn write_manifest(&self, change: Change<'_>) -> Result<(), StoreError> {
        let mut next = self.0.manifest.borrow().clone();
        if let Some(checkpoint) = change.checkpoint {
            next.checkpoint = checkpoint;
        }
        if let Some(staged) = change.staged {
            next.staged = staged;
        }
        if let Some(pieces) = change.pieces {
            next.pieces = pieces;
        }
        if let Some(pages) = change.pages {
            (next.pages, next.unlisted) = (pages.to_vec(), false);
            for piece in self.0.chain.all() {
                let stale = piece.files().map(|files| files.table.stale()).unwrap_or_default();
                next.pages.extend(stale.into_iter().map(|page| (piece.id, page)));
            }
        }
        let names: Vec<LayerId> = next.pieces.iter().map(|piece| piece.id).collect();
        next.pages.retain(|(layer, _)| names.contains(layer));
        if next.pages.len() > PAGES_LISTED_MAX {
            if !planted("forget-lost-pages") {
                let (lost, most) = (next.pages.len(), PAGES_LISTED_MAX);
                return Err(StoreError::Failed(format!(
                    "{lost} table pages are lost or were just written, and {most} can be told of; replace this replica"
                )));
            }
            next.pages.clear();
        }
        next.generation += 1;
        self.count(|usage| usage.flushes += 1);
        self.0.manifest_file.write(&next).await?;
        *self.0.manifest.borrow_mut() = next;
        Ok(())
    }

    /// Writes lines of a piece to its table, and adds their pages to those that the next manifest is to list. If these
    /// become too many, one lists those before.
    pub(super) async fn write_lines(
        &self,
        pages: &mut Pages,
        piece: LayerId,
        files: &PieceFiles,
        mut lines: BTreeMap<ChunkIndex, Chunk>,
    ) -> Result<(), StoreError> {
        let most = if planted("forget-lost-pages") { usize::MAX } else { WRITTEN_MAX };
        while let Some(behind) = split_behind(&mut lines, most) {
            if pages.len() + count_pages(&lines) > most {
                self.write_manifest(Change { pages: Some(pages), ..Change::default() }).await?;
                self.write_owed_copies().await?;
                pages.clear();
            }
            let written = files.table.write(lines).await?;
            pages.extend(written.into_iter().map(|page| (piece, page)));
            lines = behind;
        }
        Ok(())
    }
}

fn page_numbers(lines: &BTreeMap<ChunkIndex, Chunk>) -> Vec<u64> {
    let mut numbers: Vec<u64> = lines.keys().map(|chunk| chunk.0 / PAGE_CHUNKS).collect();
    numbers.dedup();
    numbers
}

fn count_pages(lines: &BTreeMap<ChunkIndex, Chunk>) -> usize {
    page_numbers(lines).len()
}

/// Leaves the lines of the first `most` pages, and gives those behind them; `None` when there are no lines.
fn split_behind(lines: &mut BTreeMap<ChunkIndex, Chunk>, most: usize) -> Option<BTreeMap<ChunkIndex, Chunk>> {
    if lines.is_empty() {
        return None;
    }
    match page_numbers(lines).get(most) {
        Some(number) => Some(lines.split_off(&ChunkIndex(number * PAGE_CHUNKS))),
        None => Some(BTreeMap::new()),
    }
}
