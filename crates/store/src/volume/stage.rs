//! The staging layer of a rebuild: collects what differs, then is switched in atomically (INV-STAGE).
//!
//! One file beside home: a log of records, each a header block and its data. It is made durable, then the manifest
//! says `staged` with the new checkpoint: from that moment the replica is at the new checkpoint, whatever happens.
//! Then the blocks are moved home and the manifest says so. A crash before the switch leaves the old state; a crash
//! after it repeats the move, which may be repeated as often as needed.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use bytes::Bytes;
use holdfast_env::disk::{AlignedBuffer, Durability, File, OpenMode};
use holdfast_types::{
    BLOCK_BYTES, BlockIndex, BlockRange, ChunkIndex, DecodeError, LogIndex, Reader, Writer, block_checksum,
    limits,
};

use super::layers::{LayerId, LayerMark, Piece, Pieces};
use super::room::{Room, Taken};
use super::table::{BlockSum, Chunk};
use super::{Change, Checkpoint, VolumeData};
use crate::StoreError;
use crate::journal::planted;

const MAGIC: u64 = 0x6873_6166_7374_3032;
const KIND_DATA: u8 = 1;
const KIND_CLEAR: u8 = 2;
const KIND_END: u8 = 3;
const KIND_ZERO: u8 = 4;

struct Staging {
    data: VolumeData,
    layers: Vec<LayerMark>,
    file: Rc<dyn File>,
    at: Cell<u64>,
    blocks: Cell<u64>,
    /// What will take room at home: data, and zeros and what is cleared, which take it in the table only.
    runs: RefCell<Vec<(LayerId, BlockRange, bool)>>,
    /// Room that was taken for it at home, until it is switched in.
    taken: RefCell<Option<Taken>>,
    /// The pieces that the switch makes, once room was taken in them.
    coming: RefCell<Option<Vec<Rc<Piece>>>>,
    open: RefCell<bool>,
}

impl Drop for Staging {
    fn drop(&mut self) {
        // Nothing can be awaited here: whoever cleans or stages next gives it back.
        if let Some(taken) = self.taken.take() {
            self.data.0.abandoned.borrow_mut().push(taken);
        }
        let rebuilds = &self.data.0.rebuilds;
        rebuilds.set(rebuilds.get() - 1);
    }
}

/// A rebuild's content that is not switched in yet. Cheap to clone.
#[derive(Clone)]
pub struct StagingLayer(Rc<Staging>);

struct RecordHead {
    kind: u8,
    layer: LayerId,
    range: BlockRange,
    crc: u32,
}

impl RecordHead {
    fn encode(&self) -> AlignedBuffer {
        let mut out = Writer::new();
        out.u64(MAGIC);
        out.u8(self.kind);
        self.layer.0.encode(&mut out);
        self.range.encode(&mut out);
        out.u32(self.crc);
        let crc = crc32fast::hash(out.as_slice());
        out.u32(crc);
        AlignedBuffer::copy_of(out.as_slice())
    }

    fn decode(block: &[u8]) -> Result<Self, DecodeError> {
        let mut input = Reader::new(block);
        let magic = input.u64()?;
        let kind = input.u8()?;
        let layer = LayerId(LogIndex::decode(&mut input)?);
        let range = BlockRange::decode(&mut input)?;
        let crc = input.u32()?;
        let covered = block.len() - input.remaining();
        if magic != MAGIC || input.u32()? != crc32fast::hash(&block[..covered]) {
            return Err(DecodeError::Unknown { what: "staging record", value: magic });
        }
        // As many are put in at once, and so many bytes are read at once.
        if kind == KIND_DATA && range.count > limits::REQUEST_BLOCKS_MAX {
            return Err(DecodeError::Unknown { what: "staged blocks", value: range.count.into() });
        }
        if !(KIND_DATA..=KIND_ZERO).contains(&kind) {
            return Err(DecodeError::Unknown { what: "kind of a staging record", value: kind.into() });
        }
        Ok(Self { kind, layer, range, crc })
    }
}

/// For fuzzing: reads `bytes` as if a record of a staging file began with them; what is read is written as it was.
#[cfg(any(test, feature = "testing"))]
pub(crate) fn fuzz(bytes: &[u8]) {
    let mut out = Writer::new();
    out.u64(MAGIC);
    out.raw(&bytes[..bytes.len().min(25)]);
    let crc = crc32fast::hash(out.as_slice());
    out.u32(crc);
    if let Ok(head) = RecordHead::decode(out.as_slice()) {
        assert_eq!(head.encode().as_slice()[..out.len()], *out.as_slice(), "a record is written otherwise");
    }
}

impl VolumeData {
    fn staging_name(&self) -> String {
        format!("{}/staging", self.0.prefix)
    }

    /// Begins a rebuild: what is home stays as it is until the layer is switched in or dropped. What was collected by
    /// one that did not end is thrown away. One at a time.
    ///
    /// `layers` are those of the checkpoint that comes. What stands here of each of them is kept, whatever pieces it
    /// consists of; the others go with the switch, and those that are missing are made.
    pub async fn begin_staging(&self, layers: Vec<LayerMark>) -> Result<StagingLayer, StoreError> {
        let name = self.staging_name();
        let wrap = |error: std::io::Error| StoreError::io(&name, &error);
        let _no_cleaning = self.alone().await?;
        if self.0.rebuilds.get() > 0 {
            return Err(StoreError::Failed("another rebuild of this replica has not ended yet".into()));
        }
        self.give_back_abandoned().await?;
        self.0.directory.remove(&name).await.map_err(wrap)?;
        let file = self.0.directory.open(&name, OpenMode::CreateNew).await.map_err(wrap)?;
        if !planted("staging-not-named") {
            self.0.directory.sync().await.map_err(|error| StoreError::flush(&name, &error))?;
        }
        let staging = Staging {
            data: self.clone(),
            layers,
            file,
            at: Cell::new(0),
            blocks: Cell::new(0),
            runs: RefCell::default(),
            taken: RefCell::default(),
            coming: RefCell::default(),
            open: RefCell::new(true),
        };
        self.0.rebuilds.set(self.0.rebuilds.get() + 1);
        Ok(StagingLayer(Rc::new(staging)))
    }

    /// Brings home what was switched in, if anything was.
    pub(super) async fn finish_staging(&self) -> Result<(), StoreError> {
        let name = self.staging_name();
        let wrap = |error: std::io::Error| StoreError::io(&name, &error);
        if !self.0.manifest.borrow().staged {
            return self.0.directory.remove(&name).await.map_err(wrap);
        }
        let file = self.0.directory.open(&name, OpenMode::Existing).await.map_err(wrap)?;
        let staged = self.move_home(&file, &name).await?;
        let mut pages = Vec::new();
        let mut emptied = Vec::new();
        for (layer, staged) in &staged {
            let pieces = self.staged_layer(*layer)?;
            for (piece, mut lines) in pieces.iter().zip(self.staged_lines(&pieces, staged).await?) {
                let Some(files) = piece.files() else { continue };
                self.flush_home(&files).await?;
                self.restore_staged(&mut pages, (piece.id, &files), &mut lines, staged).await?;
                let empty: Vec<ChunkIndex> =
                    lines.iter().filter(|(_, line)| !line.has_data()).map(|(chunk, _)| *chunk).collect();
                self.write_lines(&mut pages, piece.id, &files, lines).await?;
                emptied.push((files, empty));
            }
        }
        self.write_manifest(Change { staged: Some(false), pages: Some(&pages), ..Change::default() }).await?;
        self.changed();
        for (files, empty) in &emptied {
            files.table.write_other_copies().await?;
            self.punch(files, empty).await?;
        }
        self.directory_remove(&name).await?;
        self.remove_left_overs().await
    }

    async fn directory_remove(&self, name: &str) -> Result<(), StoreError> {
        let wrap = |error: std::io::Error| StoreError::io(name, &error);
        self.0.directory.remove(name).await.map_err(wrap)?;
        self.0.directory.sync().await.map_err(|error| StoreError::flush(name, &error))
    }

    fn staged_layer(&self, layer: LayerId) -> Result<Pieces, StoreError> {
        self.layer(layer).map_err(|error| StoreError::Damaged {
            what: self.staging_name(),
            why: format!("{error}; replace this replica"),
        })
    }

    /// Lines of a layer's pieces as they are to be after a rebuild's blocks came home. Data and zeros stand in the
    /// newest piece; what is absent is so in all of them. The mark is in the oldest, which stays when they are merged
    /// (INV-MARK). A frozen layer's is not above its end: there it could equal one that a layer after it got, of what
    /// a restore has thrown away since.
    async fn staged_lines(
        &self,
        pieces: &[Rc<Piece>],
        staged: &BTreeMap<BlockIndex, BlockSum>,
    ) -> Result<Vec<BTreeMap<ChunkIndex, Chunk>>, StoreError> {
        let frozen = pieces.last().and_then(|piece| piece.frozen());
        let index = self.checkpoint().id.index;
        let index = frozen.map_or(index, |end| end.min(index));
        let mut out = Vec::with_capacity(pieces.len());
        for (n, piece) in pieces.iter().enumerate() {
            let (is_oldest, is_newest) = (n == 0, n + 1 == pieces.len());
            let mut lines: BTreeMap<ChunkIndex, Chunk> = BTreeMap::new();
            let files = piece.files().expect("the files of a layer that was switched in were made");
            for (block, sum) in staged {
                if let std::collections::btree_map::Entry::Vacant(e) = lines.entry(block.chunk()) {
                    e.insert(self.line_or_lost(&files, block.chunk()).await?);
                }
                let Some(line) = lines.get_mut(&block.chunk()) else { continue };
                if is_newest || *sum == BlockSum::Absent {
                    line.set(block.within_chunk(), *sum);
                }
                if is_oldest {
                    line.last_index = line.last_index.max(index);
                    line.incarnation = self.0.identity.incarnation;
                }
            }
            out.push(lines);
        }
        Ok(out)
    }

    async fn move_home(&self, file: &Rc<dyn File>, name: &str) -> Result<Staged, StoreError> {
        let mut all = Staged::new();
        let mut at = 0;
        loop {
            let wrap = |error: std::io::Error| StoreError::io(name, &error);
            let block = file.read_at(at, BLOCK_BYTES).await.map_err(wrap)?;
            let head =
                RecordHead::decode(block.as_slice()).map_err(|error| StoreError::damaged(name, &error))?;
            at += BLOCK_BYTES as u64;
            if head.kind == KIND_END {
                return Ok(all);
            }
            let staged = all.entry(head.layer).or_default();
            match head.kind {
                KIND_CLEAR => staged.extend(head.range.blocks().map(|block| (block, BlockSum::Absent))),
                KIND_ZERO => staged.extend(head.range.blocks().map(|block| (block, BlockSum::Zero))),
                _ => {
                    let bytes = file.read_at(at, head.range.bytes() as usize).await.map_err(wrap)?;
                    if crc32fast::hash(bytes.as_slice()) != head.crc && !planted("staged-unchecked") {
                        let why = "its checksum does not match; replace this replica".into();
                        return Err(StoreError::Damaged { what: format!("a staged block in {name}"), why });
                    }
                    for (block, data) in head.range.blocks().zip(bytes.as_slice().chunks_exact(BLOCK_BYTES)) {
                        staged.insert(block, BlockSum::Data(block_checksum(block, data)));
                    }
                    at += head.range.bytes();
                    self.move_record(&head, bytes).await?;
                }
            }
        }
    }

    async fn move_record(&self, head: &RecordHead, bytes: AlignedBuffer) -> Result<(), StoreError> {
        let pieces = self.staged_layer(head.layer)?;
        let files = pieces.last().and_then(|piece| piece.files());
        let files = files.expect("the files of a layer that was switched in were made");
        self.count(|usage| usage.home_bytes_written += head.range.bytes());
        let offset = head.range.start.byte_offset();
        let written = files.home.write_at(offset, bytes, Durability::Volatile).await;
        written.map(drop).map_err(|error| StoreError::io("home", &error))
    }

    /// The pieces as they are after the switch to `layers`.
    fn pieces_for(&self, layers: &[LayerMark]) -> Vec<LayerMark> {
        let there: Vec<LayerId> = self.0.manifest.borrow().pieces.iter().map(|mark| mark.id).collect();
        let mut out = Vec::with_capacity(layers.len());
        for layer in layers {
            let mut ids: Vec<LayerId> = there.iter().copied().filter(|id| layer.spans(*id)).collect();
            if ids.first() != Some(&layer.id) {
                ids.insert(0, layer.id);
            }
            let last = ids.len() - 1;
            let marks = ids.into_iter().enumerate();
            out.extend(marks.map(|(n, id)| LayerMark { id, frozen: layer.frozen.filter(|_| n == last) }));
        }
        out
    }
}

/// What was staged, by layer.
type Staged = BTreeMap<LayerId, BTreeMap<BlockIndex, BlockSum>>;

impl StagingLayer {
    async fn record(
        &self,
        kind: u8,
        layer: LayerId,
        range: BlockRange,
        data: Bytes,
    ) -> Result<(), StoreError> {
        let staging = &self.0;
        let name = staging.data.staging_name();
        let wrap = |error: std::io::Error| StoreError::io(&name, &error);
        let head = RecordHead { kind, layer, range, crc: crc32fast::hash(&data) }.encode();
        let mut whole = AlignedBuffer::zeroed(head.len() + data.len());
        whole.as_mut_slice()[..head.len()].copy_from_slice(head.as_slice());
        whole.as_mut_slice()[head.len()..head.len() + data.len()].copy_from_slice(&data);
        let at = staging.at.get();
        staging.at.set(at + whole.len() as u64);
        staging.data.count(|usage| usage.staging_bytes_written += whole.len() as u64);
        if let Err(error) = staging.file.write_at(at, whole, Durability::Volatile).await.map_err(wrap) {
            if error.is_full() {
                // Nobody else is to wait for what this one took (INV-SPACE).
                staging.file.punch(0, staging.at.get()).await.map_err(wrap)?;
            }
            return Err(error);
        }
        Ok(())
    }

    /// Takes the room that the content needs at home, so that the switch finds it. If there is none, nothing was switched
    /// in, and what was collected is given back (INV-SPACE).
    pub async fn take_room(&self) -> Result<(), StoreError> {
        let data = &self.0.data;
        let _alone = data.alone().await?;
        let marks = data.pieces_for(&self.0.layers);
        let named = data.0.manifest.borrow().pieces.clone();
        data.give_back_abandoned().await?;
        // Their names go to the files that are made now.
        data.forget_unnamed_files();
        let coming = data.0.chain.prepare(&marks, &named);
        let mut taken = Taken::default();
        let mut outcome = self.take_room_in(&coming, &mut taken).await;
        if outcome.is_ok() {
            // The last record.
            let end = self.0.file.allocate(self.0.at.get(), BLOCK_BYTES as u64).await;
            outcome = end.map_err(|error| StoreError::io(data.staging_name(), &error));
        }
        if outcome.as_ref().is_err_and(StoreError::is_full) {
            let name = data.staging_name();
            let given = self.0.file.punch(0, self.0.at.get()).await;
            given.map_err(|error| StoreError::io(&name, &error))?;
        }
        // Nothing was written yet, so whatever went wrong all of it goes back.
        if outcome.is_err() {
            data.give_back(&taken).await?;
        }
        outcome?;
        self.0.coming.replace(Some(coming));
        self.0.taken.replace(Some(taken));
        Ok(())
    }

    async fn take_room_in(&self, coming: &[Rc<Piece>], taken: &mut Taken) -> Result<(), StoreError> {
        let data = &self.0.data;
        data.create_files(coming).await?;
        let runs = self.0.runs.borrow().clone();
        for layer in &self.0.layers {
            let of_layer = || runs.iter().filter(|(of, _, _)| *of == layer.id);
            // Data go to the youngest of a layer's pieces; each of them gets a line, the oldest the mark.
            let newest = coming.iter().rev().find(|piece| layer.spans(piece.id));
            if let Some(files) = newest.and_then(|piece| piece.files()) {
                let home = of_layer().filter(|(_, _, is_data)| *is_data);
                let home = home.map(|(_, range, _)| (range.start, range.count.into()));
                data.take_home(taken, &files, home, Room::Tight).await?;
            }
            let pieces = coming.iter().filter(|piece| layer.spans(piece.id));
            for files in pieces.filter_map(|piece| piece.files()) {
                data.take_pages(taken, &files, of_layer().map(|(_, range, _)| range.start.chunk())).await?;
            }
        }
        data.take_manifest(&data.checkpoint(), coming.len(), runs.len()).await
    }

    /// Adds data blocks of a layer; `checksums` are those of the blocks.
    pub async fn put(
        &self,
        layer: LayerId,
        range: BlockRange,
        data: Bytes,
        checksums: &[u32],
    ) -> Result<(), StoreError> {
        for ((block, data), sum) in range.blocks().zip(data.chunks_exact(BLOCK_BYTES)).zip(checksums) {
            if block_checksum(block, data) != *sum {
                let why = "it does not match its checksum".into();
                return Err(StoreError::Damaged { what: format!("block {} from the source", block.0), why });
            }
        }
        self.0.blocks.set(self.0.blocks.get() + u64::from(range.count));
        self.0.runs.borrow_mut().push((layer, range, true));
        self.record(KIND_DATA, layer, range, data).await
    }

    /// Adds blocks that are absent in a layer, whatever is below.
    pub async fn clear(&self, layer: LayerId, range: BlockRange) -> Result<(), StoreError> {
        self.0.runs.borrow_mut().push((layer, range, false));
        self.record(KIND_CLEAR, layer, range, Bytes::new()).await
    }

    /// Adds blocks that are zeros in a layer, and hide what is below.
    pub async fn zero(&self, layer: LayerId, range: BlockRange) -> Result<(), StoreError> {
        self.0.runs.borrow_mut().push((layer, range, false));
        self.record(KIND_ZERO, layer, range, Bytes::new()).await
    }

    /// Data blocks collected so far.
    pub fn blocks(&self) -> u64 {
        self.0.blocks.get()
    }

    /// Switches the content in, as of `checkpoint`: all or nothing, durable when it returns. What the block map holds
    /// goes: the rebuild has compared what is home, and nothing was moved there since.
    pub async fn commit(&self, checkpoint: Checkpoint) -> Result<(), StoreError> {
        if !self.0.open.replace(false) {
            return Err(StoreError::Failed("the rebuild was switched in already".into()));
        }
        let data = &self.0.data;
        let _alone = data.alone().await?;
        self.record(KIND_END, LayerId::BASE, BlockRange::new(BlockIndex(0), 0), Bytes::new()).await?;
        let name = data.staging_name();
        data.count(|usage| usage.flushes += 1);
        if !planted("switch-before-flush") {
            self.0.file.flush().await.map_err(|error| StoreError::flush(&name, &error))?;
        }
        data.write_owed_copies().await?;
        let marks = data.pieces_for(&self.0.layers);
        // Files of the layers that are missing here, in memory under the chain that comes.
        let named = data.0.manifest.borrow().pieces.clone();
        let coming = self.0.coming.take().unwrap_or_else(|| data.0.chain.prepare(&marks, &named));
        data.create_files(&coming).await?;
        let change = Change {
            checkpoint: Some(checkpoint),
            staged: Some(true),
            pieces: Some(marks),
            ..Change::default()
        };
        data.write_manifest(change).await?;
        // It is used from now on.
        self.0.taken.take();
        // What the maps hold is of entries that the checkpoint covers; what they made of their blocks was not compared.
        if !planted("keep-map-at-switch") {
            data.0.chain.replace(coming);
        }
        data.0.owners.clear();
        data.share_memory();
        data.chain_changed();
        data.finish_staging().await
    }
}
