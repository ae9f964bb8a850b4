//! Where the blocks of a read are, in a volume of many layers: by the maps and by what is known of the tables, looked at
//! in one moment. The same as looking through the layers from the newest on (`read.rs`), without asking each.

use std::rc::Rc;

use holdfast_types::{BlockIndex, BlockRange};

use super::VolumeData;
use super::extent::Extent;
use super::layers::{Piece, Pieces};
use super::owners::Owner;
use super::read::{Filled, Gaps, is_planted_hole};
use crate::StoreError;

/// Where a run of blocks is.
pub(super) struct Source {
    start: BlockIndex,
    count: u32,
    from: From,
}

enum From {
    /// In the journal: this run of a map, its first block.
    Run(BlockIndex, Extent),
    /// At home in a piece, by its number in the view.
    Home(usize),
    /// Nowhere.
    Nothing,
    /// It is to be looked for.
    Unknown,
}

/// A run of a map, and the number of its piece.
struct Hit {
    piece: usize,
    start: BlockIndex,
    run: Extent,
}

/// What one block is; equal neighbours are one source.
#[derive(Clone, Copy, PartialEq)]
enum Of {
    Hit(usize),
    Home(usize),
    Nothing,
    Unknown,
}

fn number_of(pieces: &[Rc<Piece>], owner: Owner) -> Option<Of> {
    match owner {
        Owner::Nobody => Some(Of::Nothing),
        Owner::Piece(id) => pieces.binary_search_by_key(&id, |piece| piece.id).ok().map(Of::Home),
        Owner::Unknown => None,
    }
}

impl VolumeData {
    /// The maps' runs in a range, the newest piece's first.
    fn hits(&self, pieces: &Pieces, range: BlockRange) -> Vec<Hit> {
        let mut hits = Vec::new();
        for (piece, of) in self.0.chain.with_maps(pieces) {
            let map = of.map.borrow();
            if !map.is_empty() {
                let runs = map.over(range).into_iter().filter(|(_, run)| !is_planted_hole(of, run));
                hits.extend(runs.map(|(start, run)| Hit { piece, start, run }));
            }
        }
        hits
    }

    /// Where each block of a range is. Without a wait.
    pub(super) fn sources(&self, pieces: &Pieces, range: BlockRange) -> Vec<Source> {
        let whole = |from| vec![Source { start: range.start, count: range.count, from }];
        let Some(newest) = pieces.last().map(|piece| piece.id).filter(|_| self.0.chain.shows(pieces)) else {
            return whole(From::Unknown);
        };
        let hits = self.hits(pieces, range);
        // Of each block the first hit: that of the newest piece.
        let mut first = vec![None; if hits.is_empty() { 0 } else { range.count as usize }];
        for (n, hit) in hits.iter().enumerate() {
            let at = (hit.start.0 - range.start.0) as usize;
            first[at..at + hit.run.count as usize].iter_mut().for_each(|first| _ = first.get_or_insert(n));
        }
        let of = |block: BlockIndex| {
            let home = number_of(pieces, self.0.owners.owner(block, newest)).unwrap_or(Of::Unknown);
            match (first.get((block.0 - range.start.0) as usize).copied().flatten(), home) {
                (_, Of::Unknown) | (None, _) => home,
                // In one piece the map is newer than home.
                (Some(hit), Of::Home(piece)) if hits[hit].piece < piece => home,
                (Some(hit), _) => Of::Hit(hit),
            }
        };
        let mut sources: Vec<(Of, BlockIndex, u32)> = Vec::new();
        for block in range.blocks() {
            match (of(block), sources.last_mut()) {
                (of, Some((last, _, count))) if *last == of => *count += 1,
                (of, _) => sources.push((of, block, 1)),
            }
        }
        let source = |(of, start, count): (Of, BlockIndex, u32)| {
            let from = match of {
                Of::Hit(n) => {
                    let hit = &hits[n];
                    From::Run(start, hit.run.part(start.0 - hit.start.0, count.into()))
                }
                Of::Home(piece) => From::Home(piece),
                Of::Nothing => From::Nothing,
                Of::Unknown => From::Unknown,
            };
            Source { start, count, from }
        };
        sources.into_iter().map(source).collect()
    }

    /// Reads what is known where; gives back the rest.
    pub(super) async fn read_sources(
        &self,
        pieces: &Pieces,
        range: BlockRange,
        sources: &[Source],
        out: &mut Filled<'_>,
    ) -> Result<Gaps, StoreError> {
        let mut unknown = Gaps::new();
        for Source { start, count, from } in sources {
            match from {
                From::Nothing => {}
                From::Unknown => unknown.push((*start, *count)),
                From::Run(start, run) => self.read_run(range, *start, run, out).await?,
                From::Home(piece) => match pieces[*piece].files() {
                    Some(files) => {
                        // What was merged meanwhile, or moved, is in an older piece.
                        let mut below = Gaps::new();
                        self.read_home(&files, range, (*start, *count), out, &mut below).await?;
                        self.read_layers(&pieces[..*piece], below, range, out).await?;
                    }
                    None => unknown.push((*start, *count)),
                },
            }
        }
        Ok(unknown)
    }
}
