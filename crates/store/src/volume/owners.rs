//! Which piece holds each block of a chunk, for volumes of many layers: so that a read asks one table, and not that of
//! every layer.
//!
//! An entry says of each block of a chunk which piece, of those up to a newest one, is the newest whose table holds
//! something of it. Of block maps it says nothing.
//!
//! INV-LAYER: an entry is right at every moment. Whoever changes what memory shows of a table's page tells it without a
//! wait between ([`Owners::told`]). Pieces that go take every entry with them ([`Owners::clear`]). Those that come are
//! newer than the newest that an entry knows, or their tables are empty and what is written there is told. What was
//! asked for with waits between is kept only if nothing changed meanwhile ([`Owners::keep`]), and it is asked of the
//! chain as it is. A reader looks at the maps and at the entry in one moment; what is moved after that moves to an older
//! piece, and is looked for there.
//!
//! Bounded: so many chunks, each at one place; another chunk of the same place drives it out.

use std::cell::{Cell, RefCell};

use holdfast_types::{BlockIndex, CHUNK_BLOCKS, ChunkIndex};

use super::layers::{LayerId, Pieces};
use super::table::{Chunk, PAGE_CHUNKS, Table};
use super::{VolumeData, planted};
use crate::StoreError;

/// Chunks of which it is known: 4 GiB of a volume, in less than 4 MiB of memory.
const CHUNKS_MAX: u64 = 16384;
const BLOCKS: usize = CHUNK_BLOCKS as usize;
/// Stands for no piece.
const NOBODY: u8 = u8::MAX;

/// Of whom a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    /// The table of this piece holds something of it.
    Piece(LayerId),
    /// No table does.
    Nobody,
    /// It was not found out.
    Unknown,
}

#[derive(Clone)]
struct Entry {
    chunk: ChunkIndex,
    /// The newest piece that was asked. Younger ones are asked when they are needed.
    newest: LayerId,
    /// Pieces that hold something, and per block which of them.
    pieces: Vec<LayerId>,
    of: [u8; BLOCKS],
}

impl Entry {
    fn owner(&self, within: usize) -> Option<LayerId> {
        self.pieces.get(usize::from(self.of[within])).copied()
    }

    /// False if it has no room.
    fn set(&mut self, within: usize, owner: LayerId) -> bool {
        let at = self.pieces.iter().position(|piece| *piece == owner).unwrap_or_else(|| {
            self.pieces.push(owner);
            self.pieces.len() - 1
        });
        self.of[within] = at as u8;
        at < usize::from(NOBODY)
    }

    /// A piece's table says so from now on; false if that leaves open of whom a block is.
    fn told(&mut self, piece: LayerId, line: &Chunk) -> bool {
        (0..BLOCKS).all(|within| match (self.owner(within), line.holds(within)) {
            (owner, true) => owner.is_some_and(|owner| owner >= piece) || self.set(within, piece),
            (owner, false) => owner != Some(piece),
        })
    }
}

/// What is known of a volume's chunks.
#[derive(Default)]
pub(super) struct Owners {
    /// By the chunk's number modulo their number; none before the first is kept.
    entries: RefCell<Vec<Option<Box<Entry>>>>,
    /// Counts what may have made an answer old that is being put together.
    changes: Cell<u64>,
}

impl Owners {
    fn changed(&self) {
        self.changes.set(self.changes.get() + 1);
    }

    fn with<T>(&self, chunk: ChunkIndex, work: impl FnOnce(&mut Option<Box<Entry>>) -> T) -> Option<T> {
        let mut entries = self.entries.borrow_mut();
        let at = chunk.0.checked_rem(entries.len() as u64)? as usize;
        let place = &mut entries[at];
        if place.as_ref().is_some_and(|entry| entry.chunk == chunk) { Some(work(place)) } else { None }
    }

    /// Whether every block's owner is known, of the pieces up to one.
    fn knows(&self, chunk: ChunkIndex, newest: LayerId) -> bool {
        let knows = self.with(chunk, |entry| entry.as_ref().is_some_and(|entry| entry.newest >= newest));
        knows.unwrap_or(false)
    }

    /// Of whom a block is, of the pieces up to `newest`.
    pub(super) fn owner(&self, block: BlockIndex, newest: LayerId) -> Owner {
        let found = self.with(block.chunk(), |entry| {
            let entry = entry.as_ref().filter(|entry| entry.newest >= newest)?;
            Some(match entry.owner(block.within_chunk()) {
                None => Owner::Nobody,
                Some(owner) if owner <= newest => Owner::Piece(owner),
                // One that a younger piece hides.
                Some(_) => Owner::Unknown,
            })
        });
        found.flatten().unwrap_or(Owner::Unknown)
    }

    /// Memory shows another page of a piece's table.
    pub(super) fn told(&self, piece: LayerId, page: u64, lines: &[Chunk]) {
        self.changed();
        if planted("owners-not-told") {
            return;
        }
        for (chunk, line) in (page * PAGE_CHUNKS..).map(ChunkIndex).zip(lines) {
            self.with(chunk, |place| {
                let known = place.take_if(|entry| entry.newest >= piece && !entry.told(piece, line));
                // It is asked for again.
                drop(known);
            });
        }
    }

    /// Nothing is known any more.
    pub(super) fn clear(&self) {
        self.changed();
        self.entries.borrow_mut().iter_mut().for_each(|place| *place = None);
    }

    fn begin(&self, chunk: ChunkIndex) -> (u64, Option<Entry>) {
        let known = self.with(chunk, |place| place.as_deref().cloned()).flatten();
        (self.changes.get(), known)
    }

    fn keep(&self, since: u64, entry: Entry, chunks: u64) {
        if self.changes.get() != since && !planted("owners-kept-late") {
            return;
        }
        let mut entries = self.entries.borrow_mut();
        if entries.is_empty() {
            entries.resize_with(chunks.clamp(1, CHUNKS_MAX) as usize, || None);
        }
        let at = (entry.chunk.0 % entries.len() as u64) as usize;
        entries[at] = Some(Box::new(entry));
    }
}

impl VolumeData {
    /// Finds out of whom the blocks of a chunk are, if it is not known, in a view of now. Only pieces are asked that are
    /// newer than those that were.
    pub(super) async fn find_owners(&self, pieces: &Pieces, chunk: ChunkIndex) -> Result<(), StoreError> {
        let Some(newest) = pieces.last().map(|piece| piece.id) else { return Ok(()) };
        let owners = &self.0.owners;
        if owners.knows(chunk, newest) || !self.0.chain.shows(pieces) {
            return Ok(());
        }
        let (since, known) = owners.begin(chunk);
        let asked = known.as_ref().map(|entry| entry.newest);
        let nothing = Entry { chunk, newest, pieces: Vec::new(), of: [NOBODY; BLOCKS] };
        let mut entry = Entry { newest, ..known.unwrap_or(nothing) };
        let mut open = u64::MAX;
        for piece in pieces.iter().rev().take_while(|piece| asked.is_none_or(|asked| piece.id > asked)) {
            let Some(files) = piece.files() else { continue };
            let held = files.table.held(chunk).await? & open;
            let mut fits = true;
            (0..BLOCKS).filter(|within| held >> within & 1 == 1).for_each(|within| {
                fits &= entry.set(within, piece.id);
            });
            if !fits {
                return Ok(());
            }
            open &= !held;
            if open == 0 {
                break;
            }
        }
        owners.keep(since, entry, self.0.size.get().chunks());
        Ok(())
    }
}

impl Table {
    /// Which blocks of a chunk it holds something of, a bit per block.
    async fn held(&self, chunk: ChunkIndex) -> Result<u64, StoreError> {
        self.line(chunk, Chunk::held).await
    }
}
