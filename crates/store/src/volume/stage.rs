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
    BLOCK_BYTES, BlockIndex, BlockRange, ByteSize, DecodeError, Reader, Writer, block_checksum,
};

use super::table::BlockSum;
use super::{Checkpoint, VolumeData};
use crate::StoreError;
use crate::journal::planted;

const MAGIC: u64 = 0x6873_6166_7374_3031;
const KIND_DATA: u8 = 1;
const KIND_CLEAR: u8 = 2;
const KIND_END: u8 = 3;

struct Staging {
    data: VolumeData,
    file: Rc<dyn File>,
    at: Cell<u64>,
    blocks: Cell<u64>,
    open: RefCell<bool>,
}

impl Drop for Staging {
    fn drop(&mut self) {
        let rebuilds = &self.data.0.rebuilds;
        rebuilds.set(rebuilds.get() - 1);
    }
}

/// A rebuild's content that is not switched in yet. Cheap to clone.
#[derive(Clone)]
pub struct StagingLayer(Rc<Staging>);

struct RecordHead {
    kind: u8,
    range: BlockRange,
    crc: u32,
}

impl RecordHead {
    fn encode(&self) -> AlignedBuffer {
        let mut out = Writer::new();
        out.u64(MAGIC);
        out.u8(self.kind);
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
        let range = BlockRange::decode(&mut input)?;
        let crc = input.u32()?;
        let covered = block.len() - input.remaining();
        if magic != MAGIC || input.u32()? != crc32fast::hash(&block[..covered]) {
            return Err(DecodeError::Unknown { what: "staging record", value: magic });
        }
        Ok(Self { kind, range, crc })
    }
}

impl VolumeData {
    fn staging_name(&self) -> String {
        format!("{}/staging", self.0.prefix)
    }

    /// Begins a rebuild: what is home stays as it is until the layer is switched in or dropped. What was collected by
    /// one that did not end is thrown away. One at a time.
    pub async fn begin_staging(
        &self,
        _target: Checkpoint,
        _size: ByteSize,
    ) -> Result<StagingLayer, StoreError> {
        let name = self.staging_name();
        let wrap = |error: std::io::Error| StoreError::io(&name, &error);
        let _no_cleaning = self.0.cleaning.lock().await;
        if self.0.rebuilds.get() > 0 {
            return Err(StoreError::Failed("another rebuild of this replica has not ended yet".into()));
        }
        self.0.directory.remove(&name).await.map_err(wrap)?;
        let file = self.0.directory.open(&name, OpenMode::CreateNew).await.map_err(wrap)?;
        if !planted("staging-not-named") {
            self.0.directory.sync().await.map_err(wrap)?;
        }
        let staging = Staging {
            data: self.clone(),
            file,
            at: Cell::new(0),
            blocks: Cell::new(0),
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
        let checkpoint = self.checkpoint();
        let staged = self.move_home(&file, &name).await?;
        let (lines, emptied) = self.staged_lines(&staged, checkpoint.id.index).await?;
        self.flush_home().await?;
        let pages = self.0.table.write(lines).await?;
        self.write_manifest(checkpoint, false, Some(&pages)).await?;
        self.changed();
        self.0.table.write_other_copies().await?;
        self.punch(&emptied).await?;
        self.0.directory.remove(&name).await.map_err(wrap)?;
        self.0.directory.sync().await.map_err(wrap)
    }

    async fn move_home(
        &self,
        file: &Rc<dyn File>,
        name: &str,
    ) -> Result<BTreeMap<BlockIndex, BlockSum>, StoreError> {
        let mut staged = BTreeMap::new();
        let mut at = 0;
        loop {
            let wrap = |error: std::io::Error| StoreError::io(name, &error);
            let block = file.read_at(at, BLOCK_BYTES).await.map_err(wrap)?;
            let head =
                RecordHead::decode(block.as_slice()).map_err(|error| StoreError::damaged(name, &error))?;
            at += BLOCK_BYTES as u64;
            match head.kind {
                KIND_END => return Ok(staged),
                KIND_CLEAR => head.range.blocks().for_each(|block| {
                    staged.insert(block, BlockSum::Absent);
                }),
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
                    let offset = head.range.start.byte_offset();
                    self.count(|usage| usage.home_bytes_written += head.range.bytes());
                    let written = self.0.home.write_at(offset, bytes, Durability::Volatile).await;
                    written.map_err(|error| StoreError::io("home", &error))?;
                }
            }
        }
    }
}

impl StagingLayer {
    async fn record(&self, kind: u8, range: BlockRange, data: Bytes) -> Result<(), StoreError> {
        let staging = &self.0;
        let name = staging.data.staging_name();
        let wrap = |error: std::io::Error| StoreError::io(&name, &error);
        let head = RecordHead { kind, range, crc: crc32fast::hash(&data) }.encode();
        let mut whole = AlignedBuffer::zeroed(head.len() + data.len());
        whole.as_mut_slice()[..head.len()].copy_from_slice(head.as_slice());
        whole.as_mut_slice()[head.len()..head.len() + data.len()].copy_from_slice(&data);
        let at = staging.at.get();
        staging.at.set(at + whole.len() as u64);
        staging.data.count(|usage| usage.staging_bytes_written += whole.len() as u64);
        staging.file.write_at(at, whole, Durability::Volatile).await.map_err(wrap)?;
        Ok(())
    }

    /// Adds data blocks; `checksums` are those of the blocks.
    pub async fn put(&self, range: BlockRange, data: Bytes, checksums: &[u32]) -> Result<(), StoreError> {
        for ((block, data), sum) in range.blocks().zip(data.chunks_exact(BLOCK_BYTES)).zip(checksums) {
            if block_checksum(block, data) != *sum {
                let why = "it does not match its checksum".into();
                return Err(StoreError::Damaged { what: format!("block {} from the source", block.0), why });
            }
        }
        self.0.blocks.set(self.0.blocks.get() + u64::from(range.count));
        self.record(KIND_DATA, range, data).await
    }

    /// Adds blocks that hold nothing.
    pub async fn clear(&self, range: BlockRange) -> Result<(), StoreError> {
        self.record(KIND_CLEAR, range, Bytes::new()).await
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
        let _alone = data.0.cleaning.lock().await;
        self.record(KIND_END, BlockRange::new(BlockIndex(0), 0), Bytes::new()).await?;
        let name = data.staging_name();
        data.count(|usage| usage.flushes += 1);
        if !planted("switch-before-flush") {
            self.0.file.flush().await.map_err(|error| StoreError::io(&name, &error))?;
        }
        data.write_manifest(checkpoint, true, None).await?;
        // What the map holds is of entries that the checkpoint covers; what they made of their blocks was not compared.
        if !planted("keep-map-at-switch") {
            data.0.map.borrow_mut().clear();
        }
        data.changed();
        data.finish_staging().await
    }
}
