//! Layers: copy-on-write generations of a volume's blocks. A snapshot is a frozen layer.
//!
//! The replicated state knows *logical* layers: one per living snapshot and the one that is written, each named by the
//! index where it began. On disk each consists of one or more *pieces*, each with a block map, a home file and a table
//! of its own. A piece begins at a snapshot (or a restore) and ends at the next. When a snapshot is dropped its
//! boundary vanishes: two pieces are one logical layer from then on, read one through the other, until the younger one
//! was merged into the older (`merge.rs`).
//!
//! INV-LAYER: what a view shows never changes but by what is applied to that view. In a piece that has one below,
//! what was given back is recorded as zero, because absent falls through. Pieces are merged only when the durable
//! manifest says that nothing living ends between them.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;

use holdfast_env::disk::{Directory, File, OpenMode};
use holdfast_types::{LogIndex, Reader, Writer};

use super::extent::ExtentMap;
use super::owners::Owners;
use super::read::ReadError;
use super::table::{PageOwner, Table};
use super::{Clear, VolumeData};
use crate::StoreError;

/// Names a layer: the index where it began, zero for the base.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct LayerId(pub LogIndex);

impl LayerId {
    /// The oldest layer.
    pub const BASE: Self = Self(LogIndex::ZERO);
}

/// A layer, and the snapshot that froze it; `None` for one that goes on in the next, or is the last.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LayerMark {
    /// Which.
    pub id: LayerId,
    /// The index of the living snapshot at its end.
    pub frozen: Option<LogIndex>,
}

impl LayerMark {
    /// The only layer of a volume without snapshots.
    pub const ONLY: Self = Self { id: LayerId::BASE, frozen: None };

    /// Whether a piece of this id lies in it.
    pub(super) fn spans(&self, piece: LayerId) -> bool {
        piece >= self.id && self.frozen.is_none_or(|end| piece.0 < end)
    }

    /// For messages and files.
    pub fn encode(&self, out: &mut Writer) {
        self.id.0.encode(out);
        out.bool(self.frozen.is_some());
        self.frozen.unwrap_or_default().encode(out);
    }

    /// The inverse.
    pub fn decode(input: &mut Reader<'_>) -> Result<Self, holdfast_types::DecodeError> {
        let id = LayerId(LogIndex::decode(input)?);
        let is_frozen = input.bool()?;
        let at = LogIndex::decode(input)?;
        Ok(Self { id, frozen: is_frozen.then_some(at) })
    }
}

/// What is read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum View {
    /// The volume as it is now.
    Head,
    /// As it was at the snapshot of this index.
    Snapshot(LogIndex),
}

/// A layering that is not this replica's, or not any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("there is no layer that begins at {}", .0.0)]
pub struct NoLayer(pub LayerId);

/// Where a piece ends.
#[derive(Clone, Copy, Default)]
struct End {
    /// The snapshot there.
    snapshot: Option<LogIndex>,
    /// The command that dropped it.
    dropped: Option<LogIndex>,
}

/// Files of a piece.
pub(super) struct PieceFiles {
    pub(super) home: Rc<dyn File>,
    pub(super) table: Table,
}

impl PieceFiles {
    pub(super) async fn flush_home(&self) -> Result<(), StoreError> {
        self.home.flush().await.map_err(|error| StoreError::flush("home", &error))
    }
}

/// One generation of blocks as it stands in memory and on disk.
pub(super) struct Piece {
    pub(super) id: LayerId,
    pub(super) map: RefCell<ExtentMap>,
    files: RefCell<Option<Rc<PieceFiles>>>,
    end: Cell<End>,
    /// The restore that threw it away. It stays until a durable checkpoint has that.
    retired: Cell<Option<LogIndex>>,
    /// How far its merge into the older piece has looked.
    pub(super) scan: Cell<super::merge::Scan>,
}

impl Piece {
    fn new(id: LayerId, files: Option<Rc<PieceFiles>>, snapshot: Option<LogIndex>) -> Rc<Self> {
        Rc::new(Self {
            id,
            map: RefCell::default(),
            files: RefCell::new(files),
            end: Cell::new(End { snapshot, dropped: None }),
            retired: Cell::new(None),
            scan: Cell::default(),
        })
    }

    pub(super) fn is_base(&self) -> bool {
        self.id == LayerId::BASE
    }

    /// None before its first checkpoint.
    pub(super) fn files(&self) -> Option<Rc<PieceFiles>> {
        self.files.borrow().clone()
    }

    /// The living snapshot at its end.
    pub(super) fn frozen(&self) -> Option<LogIndex> {
        self.mark_at(LogIndex(u64::MAX)).frozen
    }

    /// As it was when `index` was applied.
    fn mark_at(&self, index: LogIndex) -> LayerMark {
        let End { snapshot, dropped } = self.end.get();
        let living = dropped.is_none_or(|at| at > index);
        LayerMark { id: self.id, frozen: snapshot.filter(|at| living && *at <= index) }
    }

    fn is_there_at(&self, index: LogIndex) -> bool {
        self.id.0 <= index && self.retired.get().is_none_or(|at| at > index)
    }
}

/// The pieces that a view reads, oldest first.
#[derive(Clone)]
pub(super) struct Pieces {
    chain: Rc<[Rc<Piece>]>,
    from: usize,
    to: usize,
}

impl std::ops::Deref for Pieces {
    type Target = [Rc<Piece>];
    fn deref(&self) -> &[Rc<Piece>] {
        &self.chain[self.from..self.to]
    }
}

/// All pieces of a replica.
pub(super) struct Chain {
    /// What is read, oldest first, never empty.
    live: RefCell<Rc<[Rc<Piece>]>>,
    /// Thrown away, and not yet by a durable checkpoint.
    retired: RefCell<Vec<Rc<Piece>>>,
    /// The last command that changed the chain.
    changed_at: Cell<LogIndex>,
    /// Whether the map of any piece but the newest holds something. Only the newest one's grows.
    maps_below: Cell<bool>,
}

impl Chain {
    pub(super) fn new(pieces: Vec<(LayerMark, Rc<PieceFiles>)>) -> Self {
        let live = pieces.into_iter().map(|(mark, files)| Piece::new(mark.id, Some(files), mark.frozen));
        Self {
            live: RefCell::new(live.collect()),
            retired: RefCell::default(),
            changed_at: Cell::default(),
            maps_below: Cell::new(false),
        }
    }

    fn set(&self, live: Vec<Rc<Piece>>) {
        *self.live.borrow_mut() = live.into();
        self.look_at_maps();
    }

    fn look_at_maps(&self) {
        let live = self.live.borrow();
        let below = live.split_last().map_or(&live[..], |(_, below)| below);
        self.maps_below.set(below.iter().any(|piece| !piece.map.borrow().is_empty()));
    }

    /// What a durable checkpoint has brought home leaves the maps.
    pub(super) fn drop_up_to(&self, index: LogIndex) {
        self.all().iter().for_each(|piece| piece.map.borrow_mut().drop_up_to(index));
        self.look_at_maps();
    }

    pub(super) fn live(&self) -> Pieces {
        let chain = self.live.borrow().clone();
        Pieces { from: 0, to: chain.len(), chain }
    }

    /// Whether pieces are a view of what is read now, from the oldest piece on.
    pub(super) fn shows(&self, pieces: &Pieces) -> bool {
        pieces.from == 0 && Rc::ptr_eq(&pieces.chain, &self.live.borrow())
    }

    /// Those of a view of now whose maps may hold something, the newest first, each with its number.
    pub(super) fn with_maps<'p>(&self, pieces: &'p Pieces) -> impl Iterator<Item = (usize, &'p Rc<Piece>)> {
        let count = if self.maps_below.get() { pieces.len() } else { 1 };
        pieces.iter().enumerate().rev().take(count)
    }

    pub(super) fn top(&self) -> Rc<Piece> {
        self.live.borrow().last().expect("a volume has a layer that is written").clone()
    }

    /// Those that were thrown away, too; by id.
    pub(super) fn all(&self) -> Vec<Rc<Piece>> {
        let mut all = self.live.borrow().to_vec();
        all.extend(self.retired.borrow().iter().cloned());
        all.sort_by_key(|piece| piece.id);
        all
    }

    /// Whether anything that was thrown away is still there.
    pub(super) fn has_retired(&self) -> bool {
        !self.retired.borrow().is_empty()
    }

    pub(super) fn changed_at(&self) -> LogIndex {
        self.changed_at.get()
    }

    /// The chain as it was when `index` was applied.
    pub(super) fn at(&self, index: LogIndex) -> Vec<(Rc<Piece>, LayerMark)> {
        let there = self.all().into_iter().filter(|piece| piece.is_there_at(index));
        there.map(|piece| (piece.clone(), piece.mark_at(index))).collect()
    }

    /// INV-LAYER: freezes the layer that is written.
    fn snapshot(&self, index: LogIndex) {
        let mut live = self.live.borrow().to_vec();
        let top = self.top();
        assert!(top.end.get().snapshot.is_none() && top.id.0 < index, "INV-LAYER: snapshots come in order");
        top.end.set(End { snapshot: Some(index), dropped: None });
        live.push(Piece::new(LayerId(index), None, None));
        self.set(live);
        self.changed_at.set(index);
    }

    fn drop_snapshot(&self, index: LogIndex, snapshot: LogIndex) {
        let live = self.live();
        let piece = live.iter().find(|piece| piece.frozen() == Some(snapshot));
        let piece = piece.expect("INV-LAYER: the replicated state drops living snapshots only");
        piece.end.set(End { snapshot: Some(snapshot), dropped: Some(index) });
        self.changed_at.set(index);
    }

    fn restore(&self, index: LogIndex, snapshot: LogIndex) {
        let mut live = self.live.borrow().to_vec();
        let at = live.iter().position(|piece| piece.frozen() == Some(snapshot));
        let at = at.expect("INV-LAYER: the replicated state restores living snapshots only");
        for piece in live.drain(at + 1..) {
            assert!(piece.frozen().is_none(), "INV-LAYER: only the newest snapshot is restored");
            piece.retired.set(Some(index));
            // A checkpoint of before, made from now on, is served only together with this command (`with_floor`).
            piece.map.borrow_mut().clear();
            self.retired.borrow_mut().push(piece);
        }
        live.push(Piece::new(LayerId(index), None, None));
        self.set(live);
        self.changed_at.set(index);
    }

    /// Pieces that no checkpoint has seen, and between which nothing living ends any more at `index`, become one, so
    /// that snapshots that come and go between two checkpoints leave nothing to merge.
    pub(super) fn fold_unseen(&self, index: LogIndex) {
        let live = self.live.borrow().to_vec();
        let mut folded: Vec<Rc<Piece>> = Vec::with_capacity(live.len());
        for piece in live {
            let joins = folded.last().filter(|older| {
                let unseen = older.files.borrow().is_none() && piece.files.borrow().is_none();
                unseen && older.end.get().dropped.is_some_and(|at| at <= index)
            });
            match joins {
                Some(older) => older.take_over(&piece),
                None => folded.push(piece),
            }
        }
        self.set(folded);
    }

    /// The younger of two pieces is empty on disk, durably so: what it has in memory is the older one's.
    pub(super) fn merged(&self, older: &Rc<Piece>, younger: &Rc<Piece>) {
        older.take_over(younger);
        let live = self.live.borrow().iter().filter(|piece| piece.id != younger.id).cloned().collect();
        self.set(live);
        self.retired.borrow_mut().retain(|piece| piece.id != younger.id);
    }

    /// Forgets what a durable checkpoint at `index` has thrown away; gives it.
    pub(super) fn take_retired(&self, index: LogIndex) -> Vec<Rc<Piece>> {
        let mut retired = self.retired.borrow_mut();
        let is_gone = |piece: &Rc<Piece>| piece.retired.get().is_some_and(|at| at <= index);
        let (gone, kept) = retired.drain(..).partition(is_gone);
        *retired = kept;
        gone
    }

    /// The pieces of a chain that is to come, with the files of those that the durable manifest names. (Others may be
    /// left of a pass that failed.)
    pub(super) fn prepare(&self, marks: &[LayerMark], named: &[LayerMark]) -> Vec<Rc<Piece>> {
        let known = self.all();
        let coming = marks.iter().map(|mark| {
            let is_named = named.iter().any(|named| named.id == mark.id);
            let found = known.iter().find(|piece| is_named && piece.id == mark.id);
            let files = found.and_then(|piece| piece.files());
            Piece::new(mark.id, files, mark.frozen)
        });
        coming.collect()
    }

    /// Everything is replaced by what a rebuild has brought.
    pub(super) fn replace(&self, pieces: Vec<Rc<Piece>>) {
        self.set(pieces);
        self.retired.borrow_mut().clear();
        self.changed_at.set(LogIndex::ZERO);
    }
}

impl Piece {
    fn take_over(&self, younger: &Self) {
        let map = std::mem::take(&mut *younger.map.borrow_mut());
        self.map.borrow_mut().fold(map);
        self.end.set(younger.end.get());
    }
}

/// Groups a chain's pieces into its logical layers.
fn logical(pieces: &[Rc<Piece>]) -> Vec<LayerMark> {
    let mut out: Vec<LayerMark> = Vec::new();
    let mut goes_on = false;
    for piece in pieces {
        let frozen = piece.frozen();
        match out.last_mut().filter(|_| goes_on) {
            Some(last) => last.frozen = frozen,
            None => out.push(LayerMark { id: piece.id, frozen }),
        }
        goes_on = frozen.is_none();
    }
    out
}

pub(super) fn name_of(prefix: &str, id: LayerId, file: &str) -> String {
    format!("{prefix}/layer-{}/{file}", id.0.0)
}

pub(super) async fn open_files(
    directory: &Rc<dyn Directory>,
    prefix: &str,
    (who, id): PageOwner,
    mode: OpenMode,
    owners: &Rc<Owners>,
) -> Result<Rc<PieceFiles>, StoreError> {
    let (home, table) = (name_of(prefix, id, "home"), name_of(prefix, id, "table"));
    let mut files = Vec::with_capacity(2);
    for name in [&home, &table] {
        let wrap = |error: std::io::Error| StoreError::io(name, &error);
        if mode == OpenMode::CreateNew {
            // What an interrupted pass has left.
            directory.remove(name).await.map_err(wrap)?;
        }
        files.push(directory.open(name, mode).await.map_err(wrap)?);
    }
    let (table_file, home) = (files.remove(1), files.remove(0));
    Ok(Rc::new(PieceFiles { home, table: Table::new(table_file, table, (who, id), owners.clone()) }))
}

impl VolumeData {
    /// Freezes what is written, as of log entry `index`. O(1), no I/O.
    pub fn apply_snapshot(&self, index: LogIndex) {
        self.0.chain.snapshot(index);
        self.chain_changed();
    }

    /// Forgets a living snapshot. O(1), no I/O; what only it holds goes in the background.
    ///
    /// # Panics
    /// If there is none: the replicated state says which there are.
    pub fn apply_drop_snapshot(&self, index: LogIndex, snapshot: LogIndex) {
        self.0.chain.drop_snapshot(index, snapshot);
        self.chain_changed();
    }

    /// Throws away what was applied after the newest living snapshot. No I/O.
    ///
    /// # Panics
    /// If there is none at `snapshot`, or it is not the newest: the replicated state says which there are.
    pub fn apply_restore(&self, index: LogIndex, snapshot: LogIndex) {
        self.0.chain.restore(index, snapshot);
        self.0.owners.clear();
        self.chain_changed();
    }

    /// The logical layers, oldest first.
    pub fn layers(&self) -> Vec<LayerMark> {
        logical(&self.0.chain.live())
    }

    /// Pieces that the layers consist of; as many as there are layers when nothing is to be merged.
    pub fn pieces(&self) -> usize {
        self.0.chain.live().len()
    }

    /// The pieces of a view.
    pub(super) fn view(&self, view: View) -> Result<Pieces, ReadError> {
        let mut pieces = self.0.chain.live();
        if let View::Snapshot(index) = view {
            let at = pieces.iter().position(|piece| piece.frozen() == Some(index));
            pieces.to = at.ok_or(ReadError::NoSnapshot(index))? + 1;
        }
        Ok(pieces)
    }

    /// The pieces above a snapshot, up to a view that is not older.
    pub(super) fn between(&self, from: Option<LogIndex>, to: View) -> Result<Pieces, ReadError> {
        let mut pieces = self.view(to)?;
        if let Some(from) = from {
            let end = self.view(View::Snapshot(from))?.to;
            pieces.from = if end <= pieces.to { end } else { return Err(ReadError::NoSnapshot(from)) };
        }
        Ok(pieces)
    }

    /// The pieces of a logical layer.
    pub(super) fn layer(&self, id: LayerId) -> Result<Pieces, NoLayer> {
        let mut pieces = self.0.chain.live();
        let from = pieces.iter().position(|piece| piece.id == id).ok_or(NoLayer(id))?;
        if from > 0 && pieces[from - 1].frozen().is_none() {
            return Err(NoLayer(id));
        }
        let length = pieces[from..].iter().take_while(|piece| piece.frozen().is_none()).count() + 1;
        pieces.to = (from + length).min(pieces.to);
        pieces.from = from;
        Ok(pieces)
    }

    /// The pieces of a logical layer that ends where the mark says; both this replica and another one that have such
    /// a layer mean the same by it, as of what they have applied.
    pub(super) fn layer_of(&self, mark: LayerMark) -> Result<Pieces, NoLayer> {
        let is_there = self.layers().contains(&mark);
        if is_there { self.layer(mark.id) } else { Err(NoLayer(mark.id)) }
    }

    /// How a run that was cleared is recorded in a piece (INV-LAYER).
    pub(super) fn cleared_in(piece: &Piece, how: Clear) -> super::BlockSum {
        let falls_through = crate::journal::planted("trim-falls-through");
        match how {
            Clear::Zero => super::BlockSum::Zero,
            Clear::Trim if piece.is_base() || falls_through => super::BlockSum::Absent,
            Clear::Trim => super::BlockSum::Zero,
        }
    }

    /// Makes the files of pieces that have none, durably, before anything is moved there.
    pub(super) async fn create_files(&self, pieces: &[Rc<Piece>]) -> Result<(), StoreError> {
        let mut made = false;
        for piece in pieces.iter().filter(|piece| piece.files.borrow().is_none()) {
            let who = (self.0.identity.id, piece.id);
            let (directory, prefix, owners) = (&self.0.directory, &self.0.prefix, &self.0.owners);
            let files = open_files(directory, prefix, who, OpenMode::CreateNew, owners).await?;
            *piece.files.borrow_mut() = Some(files);
            made = true;
        }
        if made {
            self.0.directory.sync().await.map_err(|error| StoreError::flush(&self.0.prefix, &error))?;
            self.share_memory();
        }
        Ok(())
    }

    /// Forgets files that a pass that failed has made and no manifest names, before their names go to others. They are
    /// made anew when they are needed: what is to go there is in memory still.
    pub(super) fn forget_unnamed_files(&self) {
        if crate::journal::planted("keep-unnamed-files") {
            return;
        }
        let named = &self.0.manifest.borrow().pieces;
        let all = self.0.chain.all();
        let unnamed = all.iter().filter(|piece| !named.iter().any(|mark| mark.id == piece.id));
        for piece in unnamed.filter(|piece| piece.files().is_some()) {
            self.forget_table(piece);
            piece.files.replace(None);
            self.0.owners.clear();
        }
    }

    /// Removes the files of layers that the manifest does not name: of an interrupted pass, merged, or thrown away.
    pub(super) async fn remove_left_overs(&self) -> Result<(), StoreError> {
        self.forget_unnamed_files();
        let wrap = |error: std::io::Error| StoreError::io(&self.0.prefix, &error);
        let named: BTreeSet<String> = {
            let manifest = self.0.manifest.borrow();
            let names = manifest
                .pieces
                .iter()
                .flat_map(|mark| ["home", "table"].map(|file| name_of(&self.0.prefix, mark.id, file)));
            names.collect()
        };
        let found = self.0.directory.list(&format!("{}/layer-", self.0.prefix)).await.map_err(wrap)?;
        let left: Vec<String> = found.into_iter().filter(|name| !named.contains(name)).collect();
        for name in &left {
            self.0.directory.remove(name).await.map_err(wrap)?;
        }
        if left.is_empty() {
            return Ok(());
        }
        self.0.directory.sync().await.map_err(|error| StoreError::flush(&self.0.prefix, &error))
    }

    /// Second copies that a full medium has left undone: a manifest with another list must not come before them.
    pub(super) async fn write_owed_copies(&self) -> Result<(), StoreError> {
        for files in self.0.chain.all().iter().filter_map(|piece| piece.files()) {
            files.table.write_other_copies().await?;
        }
        Ok(())
    }

    /// Every table gets its part of the memory for pages.
    pub(super) fn share_memory(&self) {
        let all = self.0.chain.all();
        for files in all.iter().filter_map(|piece| piece.files()) {
            files.table.share_memory(all.len());
        }
    }

    /// The chain is another one: who was reading looks again.
    pub(super) fn chain_changed(&self) {
        self.forget_ended_layers();
        self.changed();
    }
}
