//! The manifest: who a replica is, and its last checkpoint. A small file in two generations, each checksummed.

use std::cell::Cell;
use std::rc::Rc;

use bytes::Bytes;
use holdfast_env::disk::{ALIGNMENT, AlignedBuffer, Directory, Durability, File, OpenMode};
use holdfast_types::{
    ClusterId, DecodeError, GroupId, LogIndex, NodeName, Reader, ReplicaId, StoreId, Term, VolumeId, Writer,
};

use super::Checkpoint;
use super::layers::{LayerId, LayerMark};
use super::table::PageMark;
use crate::journal::planted;
use crate::sealed::Seal;
use crate::{EntryId, ReplicaIdentity, StoreError};

/// Versions 1 and 2 were never released: they listed no table pages, and no layers.
const SEAL: Seal = Seal { magic: 0x6873_6166_6d66_3031, version: 3, body_bytes_max: SLOT_BYTES };
/// Layers that a manifest names at most, those that are to be merged included.
const PIECES_NAMED_MAX: usize = 8192;
/// Pages that a manifest lists at most: those that were just written, and those that are lost.
pub(super) const PAGES_LISTED_MAX: usize = 8192;
/// Room for one generation, in bytes.
const SLOT_BYTES: usize = 1 << 20;
/// Largest state in a checkpoint, in bytes.
const STATE_BYTES_MAX: usize = 512 << 10;

/// Whose files these are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaFileIdentity {
    /// The cluster.
    pub cluster: ClusterId,
    /// The store.
    pub store: StoreId,
    /// The node.
    pub node: NodeName,
    /// The volume.
    pub volume: VolumeId,
    /// The replica.
    pub id: ReplicaIdentity,
    /// The volume's incarnation number.
    pub incarnation: u64,
}

impl ReplicaFileIdentity {
    pub(crate) fn encode(&self, out: &mut Writer) {
        self.cluster.encode(out);
        self.store.encode(out);
        self.node.encode(out);
        self.volume.encode(out);
        self.id.group.encode(out);
        self.id.replica.encode(out);
        out.u64(self.incarnation);
    }

    pub(crate) fn decode(input: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            cluster: ClusterId::decode(input)?,
            store: StoreId::decode(input)?,
            node: NodeName::decode(input)?,
            volume: VolumeId::decode(input)?,
            id: ReplicaIdentity { group: GroupId::decode(input)?, replica: ReplicaId::decode(input)? },
            incarnation: input.u64()?,
        })
    }
}

/// What a manifest says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// Whose files.
    pub identity: ReplicaFileIdentity,
    /// The volume's specification as JSON, so that a disk describes itself.
    pub spec_json: Bytes,
    /// The last checkpoint.
    pub checkpoint: Checkpoint,
    /// Counts up with every write.
    pub generation: u64,
    /// A rebuild was switched in and is being moved home.
    pub staged: bool,
    /// The pieces of the volume's layers, oldest first.
    pub(super) pieces: Vec<LayerMark>,
    /// Table pages that were written for it, whose second copies may still be older, and those that are lost.
    pub(super) pages: Vec<(LayerId, PageMark)>,
    /// There is no such list: any page may be one of those. Older versions wrote this when there were too many.
    pub(super) unlisted: bool,
}

pub(crate) fn put_checkpoint(out: &mut Writer, checkpoint: &Checkpoint) {
    checkpoint.id.term.encode(out);
    checkpoint.id.leader.encode(out);
    checkpoint.id.index.encode(out);
    checkpoint.serve_floor.encode(out);
    out.bytes(&checkpoint.membership);
    out.bytes(&checkpoint.state);
}

pub(crate) fn get_checkpoint(input: &mut Reader<'_>) -> Result<Checkpoint, DecodeError> {
    let id = EntryId {
        term: Term::decode(input)?,
        leader: ReplicaId::decode(input)?,
        index: LogIndex::decode(input)?,
    };
    let serve_floor = LogIndex::decode(input)?;
    let membership = Bytes::copy_from_slice(input.bytes(STATE_BYTES_MAX)?);
    let state = Bytes::copy_from_slice(input.bytes(STATE_BYTES_MAX)?);
    Ok(Checkpoint { id, membership, state, serve_floor })
}

impl Manifest {
    fn encode(&self) -> AlignedBuffer {
        let mut out = Writer::new();
        self.identity.encode(&mut out);
        out.u64(self.generation);
        out.bool(self.staged);
        out.bytes(&self.spec_json);
        put_checkpoint(&mut out, &self.checkpoint);
        out.u32(self.pieces.len() as u32);
        self.pieces.iter().for_each(|piece| piece.encode(&mut out));
        out.bool(!self.unlisted);
        out.u32(self.pages.len() as u32);
        for (layer, page) in &self.pages {
            layer.0.encode(&mut out);
            out.u64(page.number);
            out.u64(page.generation);
        }
        let body = out.finish();
        SEAL.close(&body)
    }

    /// No less than the bytes of this manifest with another checkpoint, and lists of so many pieces and pages.
    pub(super) fn bytes_with(&self, checkpoint: &Checkpoint, pieces: usize, pages: usize) -> usize {
        /// Everything of known length, and lengths.
        const FIXED: usize = 1024;
        let pages = pages.min(PAGES_LISTED_MAX);
        FIXED
            + self.spec_json.len()
            + checkpoint.membership.len()
            + checkpoint.state.len()
            + pieces * 17
            + pages * 24
    }

    fn decode(slot: &[u8]) -> Result<Self, DecodeError> {
        let body = SEAL.open(slot)?;
        let input = &mut Reader::new(body);
        let identity = ReplicaFileIdentity::decode(input)?;
        let generation = input.u64()?;
        let staged = input.bool()?;
        let spec_json = Bytes::copy_from_slice(input.bytes(STATE_BYTES_MAX)?);
        let checkpoint = get_checkpoint(input)?;
        let count = input.count("layers", PIECES_NAMED_MAX)?;
        let pieces = (0..count).map(|_| LayerMark::decode(input)).collect::<Result<Vec<_>, _>>()?;
        check_pieces(&pieces)?;
        let unlisted = !input.bool()?;
        let count = input.count("table pages", PAGES_LISTED_MAX)?;
        let mut pages = Vec::with_capacity(count);
        for _ in 0..count {
            let layer = LayerId(LogIndex::decode(input)?);
            pages.push((layer, PageMark { number: input.u64()?, generation: input.u64()? }));
        }
        input.clone().end()?;
        Ok(Self { identity, spec_json, checkpoint, generation, staged, pieces, pages, unlisted })
    }
}

/// Refuses what no chain of layers looks like.
fn check_pieces(pieces: &[LayerMark]) -> Result<(), DecodeError> {
    let begins_with_base = pieces.first().is_some_and(|first| first.id == LayerId::BASE);
    let in_order = pieces.windows(2).all(|pair| {
        pair[0].id < pair[1].id && pair[0].frozen.is_none_or(|at| pair[0].id.0 < at && at <= pair[1].id.0)
    });
    let ends_with_top = pieces.last().is_some_and(|last| last.frozen.is_none());
    if begins_with_base && in_order && ends_with_top {
        return Ok(());
    }
    Err(DecodeError::Unknown { what: "chain of layers", value: pieces.len() as u64 })
}

/// For fuzzing: reads `body` as if a manifest held it; what is read is written as it was meant.
#[cfg(any(test, feature = "testing"))]
pub(crate) fn fuzz(body: &[u8]) {
    let whole = SEAL.close(body);
    if let Ok(found) = Manifest::decode(whole.as_slice()) {
        assert_eq!(Manifest::decode(found.encode().as_slice()), Ok(found), "a manifest is written otherwise");
    }
}

/// The manifest's file.
pub(super) struct ManifestFile {
    file: Rc<dyn File>,
    name: String,
    bytes_written: Cell<u64>,
    /// Room that was taken in each slot since the file was opened.
    taken: [Cell<u64>; 2],
}

impl ManifestFile {
    pub(super) async fn create(directory: &Rc<dyn Directory>, name: String) -> Result<Self, StoreError> {
        let wrap = |error: std::io::Error| StoreError::io(&name, &error);
        directory.remove(&name).await.map_err(wrap)?;
        let file = directory.open(&name, OpenMode::CreateNew).await.map_err(wrap)?;
        file.set_length(2 * SLOT_BYTES as u64).await.map_err(wrap)?;
        Ok(Self { file, name, bytes_written: Cell::new(0), taken: Default::default() })
    }

    pub(super) async fn open(directory: &Rc<dyn Directory>, name: String) -> Result<Self, StoreError> {
        let file =
            directory.open(&name, OpenMode::Existing).await.map_err(|error| StoreError::io(&name, &error))?;
        Ok(Self { file, name, bytes_written: Cell::new(0), taken: Default::default() })
    }

    /// Bytes written, each generation with a flush.
    pub(super) fn bytes_written(&self) -> u64 {
        self.bytes_written.get()
    }

    /// Takes room for a generation of so many bytes.
    pub(super) async fn take_room(&self, generation: u64, bytes: usize) -> Result<(), StoreError> {
        let taken = &self.taken[(generation % 2) as usize];
        let wanted = bytes.next_multiple_of(ALIGNMENT).min(SLOT_BYTES) as u64;
        if taken.get() >= wanted {
            return Ok(());
        }
        let allocated = self.file.allocate(generation % 2 * SLOT_BYTES as u64, wanted).await;
        allocated.map_err(|error| StoreError::io(&self.name, &error))?;
        taken.set(wanted);
        Ok(())
    }

    /// Writes a generation over the older one; durable when it returns.
    pub(super) async fn write(&self, manifest: &Manifest) -> Result<(), StoreError> {
        let bytes = manifest.encode();
        if bytes.len() > SLOT_BYTES {
            return Err(StoreError::Failed(format!(
                "a checkpoint of {} bytes is beyond its bound",
                bytes.len()
            )));
        }
        let slot = if planted("manifest-in-place") { 0 } else { manifest.generation % 2 };
        let offset = slot * SLOT_BYTES as u64;
        self.bytes_written.set(self.bytes_written.get() + bytes.len() as u64);
        let written = self.file.write_at(offset, bytes, Durability::Durable).await;
        written.map_err(|error| StoreError::io(&self.name, &error)).map(drop)
    }

    /// The newest generation that is whole. On stable storage when it returns: a killed daemon may have left it in a
    /// cache, and the log is purged by what it says.
    pub(super) async fn read(&self) -> Result<Manifest, StoreError> {
        self.file.flush().await.map_err(|error| StoreError::flush(&self.name, &error))?;
        let mut newest: Option<Manifest> = None;
        let mut problem = DecodeError::Short { missing: 0 };
        for slot in 0..2 {
            let bytes = match self.file.read_at(slot * SLOT_BYTES as u64, SLOT_BYTES).await {
                Ok(bytes) => bytes,
                Err(error) => {
                    tracing::warn!(name = %self.name, %error, "a generation of a manifest cannot be read");
                    continue;
                }
            };
            match Manifest::decode(bytes.as_slice()) {
                Ok(found) if newest.as_ref().is_none_or(|n| n.generation < found.generation) => {
                    newest = Some(found)
                }
                Ok(_) => {}
                Err(error) => problem = error,
            }
        }
        newest.ok_or_else(|| StoreError::damaged(&self.name, &problem))
    }
}
