//! The blocks of one replica: block map over home file, chunk table, cleaner, checkpoint, and the staging layer of a
//! rebuild.
//!
//! What is applied enters the block map, which says where in the journal a block's newest content stands. The cleaner
//! moves it home. A block is read from the map if it is there, else from home if the table says data, and every block
//! is checked against its checksum, address included.
//!
//! Every layer of the volume has a map, a home file and a table of its own (`layers.rs`): what is absent in one shows
//! what is in the one below.
//!
//! Invariants: home and table are repeatable from the journal until the manifest names the checkpoint that covers
//! them; only blocks whose entries are locally flushed and applied are moved home; a chunk is punched only after the
//! checkpoint that emptied it. After a restart home may hold blocks newer than the checkpoint: the layer above serves
//! nothing until it has applied again up to what its recovered log calls committed.

mod adopt;
mod clean;
mod diff;
mod digest;
mod extent;
mod heal;
mod layers;
pub(crate) mod manifest;
mod marks;
mod merge;
mod owners;
mod pages;
mod read;
mod room;
mod sources;
mod space;
pub(crate) mod stage;
mod stage_lost;
pub(crate) mod table;

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;
use holdfast_env::disk::{Directory, OpenMode};
use holdfast_types::{BlockRange, ByteSize, ChunkIndex, LogIndex};

pub use adopt::{ChunkContent, ChunkNow};
pub use diff::{Diff, DiffExtent};
pub use digest::VolumeDigest;
pub use heal::{Finding, Health};
pub use layers::{LayerId, LayerMark, NoLayer, View};
pub use manifest::{Manifest, ReplicaFileIdentity};
pub use read::{CheckedBlocks, ReadError};
pub use room::Room;
pub use space::{Held, SpaceUsed};
pub use stage::StagingLayer;
pub use table::BlockSum;
/// Chunks of a page of the table.
pub const PAGE_CHUNKS: u64 = table::PAGE_CHUNKS;

use crate::journal::{Beside, CleaningPass, planted};
use crate::{EntryId, ReplicaIdentity, StoreError};
use extent::{Extent, What};
use layers::{Chain, open_files};
use manifest::ManifestFile;
use pages::Change;
use table::PageMark;

/// Where payloads of log entries are read from.
pub trait PayloadSource {
    /// The highest index up to which everything is durable here.
    fn flushed(&self) -> LogIndex;
    /// Blocks of an entry's payload, from memory or disk; not verified.
    fn read_payload(
        &self,
        index: LogIndex,
        block: u32,
        blocks: u32,
    ) -> LocalBoxFuture<'static, Result<Bytes, StoreError>>;
    /// Knows, durably when it returns, that everything up to `index` is committed: what may stand at home after a crash is
    /// repeated at the start, without anybody's help (INV-STAGE).
    fn keep_committed(&self, index: LogIndex) -> LocalBoxFuture<'static, Result<(), StoreError>>;
    /// A good moment to drop payloads from memory.
    fn evict_hint(&self) {}
    /// A pass of the cleaner begins to move something.
    fn begin_pass(&self) -> Option<CleaningPass> {
        None
    }
    /// It has done a piece of its work, and pauses while whoever writes to the journal is held up by it.
    fn give_way(&self) -> LocalBoxFuture<'static, Beside> {
        Box::pin(std::future::ready(Beside::Nobody))
    }
    /// It has ended, and entries up to `index` are not needed any more.
    fn end_pass(&self, _pass: Option<CleaningPass>, _index: LogIndex) {}
}

/// A state that everything up to an index has led to.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Checkpoint {
    /// The last entry contained; index 0 before the first.
    pub id: EntryId,
    /// Encoded membership as of that entry.
    pub membership: Bytes,
    /// Encoded state of the state machine as of that entry.
    pub state: Bytes,
    /// Below this index nothing may be served: the blocks may be newer than the checkpoint.
    pub serve_floor: LogIndex,
}

/// Gives the state at exactly its last applied entry.
pub trait CheckpointSource {
    /// The state now.
    fn capture(&self) -> Checkpoint;
    /// The newest state that is known of those not after `index`, if any is.
    fn captured_up_to(&self, index: LogIndex) -> Option<Checkpoint> {
        Some(self.capture()).filter(|now| now.id.index <= index)
    }
}

/// How blocks are cleared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clear {
    /// Given back.
    Trim,
    /// Zeros that were written.
    Zero,
}

/// What a block holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockKind {
    /// Data.
    Data,
    /// Zeros that were written.
    Zero,
    /// Nothing.
    Absent,
}

/// What the cleaner has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Dirty {
    /// Whether anything is not home, or the layers are not those of the checkpoint.
    pub any: bool,
    /// Whether the layers are not those of the checkpoint.
    pub layers: bool,
    /// Whether layers are to be merged.
    pub merges: bool,
    /// Bytes of data that are not home.
    pub bytes: u64,
    /// Blocks that were given back or zeroed, and are not so at home.
    pub cleared: u64,
    /// Runs of blocks that the map holds.
    pub runs: usize,
}

/// Counters of a replica's blocks since it was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct VolumeUsage {
    /// Bytes written home, by the cleaner and by rebuilds.
    pub home_bytes_written: u64,
    /// Bytes read from home.
    pub home_bytes_read: u64,
    /// Bytes of table pages written.
    pub table_bytes_written: u64,
    /// Bytes of manifests written.
    pub manifest_bytes_written: u64,
    /// Bytes of staging layers written.
    pub staging_bytes_written: u64,
    /// Flushes of home, table, manifest and staging files.
    pub flushes: u64,
    /// Checkpoints made by the cleaner.
    pub checkpoints: u64,
    /// Chunks given back to the file system.
    pub chunks_punched: u64,
    /// Reads of home that the medium answered with an error.
    pub read_errors: u64,
    /// Blocks and chunks of which it was found that home or table do not hold what they should, and those that do again.
    pub health: Health,
}

/// A chunk's change mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkSummary {
    /// The chunk.
    pub chunk: ChunkIndex,
    /// Incarnation of its last change.
    pub incarnation: u64,
    /// Entry of its last change.
    pub last_index: LogIndex,
    /// Whether it holds anything.
    pub present: bool,
}

struct Inner {
    directory: Rc<dyn Directory>,
    identity: ReplicaFileIdentity,
    prefix: String,
    chain: Chain,
    /// Which piece holds each block.
    owners: Rc<owners::Owners>,
    manifest_file: ManifestFile,
    manifest: RefCell<Manifest>,
    payloads: Rc<dyn PayloadSource>,
    size: Cell<ByteSize>,
    /// One cleaner or staging commit at a time.
    cleaning: tokio::sync::Mutex<()>,
    /// The files belong to somebody else from here on: nothing is written any more.
    is_retired: Cell<bool>,
    /// Counts up whenever home or table have changed, for readers that were under way.
    changes: Cell<u64>,
    usage: Cell<VolumeUsage>,
    /// Bytes written to tables that are no more, and their flushes.
    former_tables: Cell<(u64, u64)>,
    /// What a pass that has not ended aims at.
    aimed: RefCell<Option<Checkpoint>>,
    /// Rebuilds that compare what is home with a peer's. While there is one, nothing is moved home (INV-STAGE).
    rebuilds: Cell<u32>,
    /// Room that rebuilds took which were given up.
    abandoned: RefCell<Vec<room::Taken>>,
    /// What reads found bad.
    suspects: heal::Suspects,
}

/// The blocks of one replica. Cheap to clone.
#[derive(Clone)]
pub struct VolumeData(Rc<Inner>);

pub(crate) fn prefix_of(id: ReplicaIdentity) -> String {
    format!("replicas/{}-{}", id.group, id.replica)
}

/// Largest size that a home file can have without knowing the volume's: reads beyond its end are zeros anyway.
const SIZE_UNKNOWN: ByteSize = ByteSize(holdfast_types::limits::VOLUME_BYTES_MAX);

impl VolumeData {
    /// Makes the files of a new replica, durably.
    pub async fn create(
        directory: Rc<dyn Directory>,
        identity: ReplicaFileIdentity,
        spec_json: Bytes,
        initial: Checkpoint,
        payloads: Rc<dyn PayloadSource>,
    ) -> Result<Self, StoreError> {
        let prefix = prefix_of(identity.id);
        let who = identity.id;
        open_files(&directory, &prefix, (who, LayerId::BASE), OpenMode::CreateNew, &Rc::default()).await?;
        let file = ManifestFile::create(&directory, format!("{prefix}/manifest")).await?;
        let manifest = Manifest {
            identity: identity.clone(),
            spec_json,
            checkpoint: initial,
            generation: 1,
            staged: false,
            pieces: vec![LayerMark::ONLY],
            pages: Vec::new(),
            unlisted: false,
        };
        file.write(&manifest).await?;
        if !planted("replica-not-named") {
            directory.sync().await.map_err(|error| StoreError::flush(&prefix, &error))?;
        }
        Self::open(directory, &identity, payloads).await
    }

    /// Opens the files of a replica; a rebuild that was switched in is brought home first.
    pub async fn open(
        directory: Rc<dyn Directory>,
        expected: &ReplicaFileIdentity,
        payloads: Rc<dyn PayloadSource>,
    ) -> Result<Self, StoreError> {
        let prefix = prefix_of(expected.id);
        let manifest_file = ManifestFile::open(&directory, format!("{prefix}/manifest")).await?;
        let manifest = manifest_file.read().await?;
        if manifest.identity != *expected && !planted("foreign-replica") {
            return Err(StoreError::Identity {
                expected: format!("{expected:?}"),
                found: format!("{:?}", manifest.identity),
            });
        }
        let owners = Rc::default();
        let mut pieces = Vec::with_capacity(manifest.pieces.len());
        for mark in &manifest.pieces {
            let who = (expected.id, mark.id);
            let files = open_files(&directory, &prefix, who, OpenMode::Existing, &owners).await?;
            pieces.push((*mark, files));
        }
        let data = Self(Rc::new(Inner {
            directory,
            identity: expected.clone(),
            prefix,
            chain: Chain::new(pieces),
            owners,
            manifest_file,
            manifest: RefCell::new(manifest),
            payloads,
            size: Cell::new(SIZE_UNKNOWN),
            cleaning: tokio::sync::Mutex::new(()),
            is_retired: Cell::new(false),
            changes: Cell::new(0),
            usage: Cell::default(),
            former_tables: Cell::default(),
            aimed: RefCell::default(),
            rebuilds: Cell::new(0),
            abandoned: RefCell::default(),
            suspects: heal::Suspects::default(),
        }));
        data.share_memory();
        data.settle().await?;
        data.remove_left_overs().await?;
        data.finish_staging().await?;
        Ok(data)
    }

    /// Makes the second copies of the pages that the checkpoint wrote equal to the first, and gives back the chunks
    /// that it emptied: a crash may have come before either.
    async fn settle(&self) -> Result<(), StoreError> {
        let (listed, unlisted) = {
            let manifest = self.0.manifest.borrow();
            (manifest.pages.clone(), manifest.unlisted)
        };
        for piece in self.0.chain.all() {
            let Some(files) = piece.files() else { continue };
            files.flush_home().await?;
            let mut pages: Vec<PageMark> =
                listed.iter().filter(|(layer, _)| *layer == piece.id).map(|(_, page)| *page).collect();
            if unlisted && !planted("pages-of-no-list") {
                let every = 0..files.table.page_count().await?;
                pages.extend(every.map(|number| PageMark { number, generation: 0 }));
            }
            let empty = files.table.settle(&pages).await?;
            self.punch(&files, &empty).await?;
        }
        Ok(())
    }

    /// Manifests of every replica that stands in a directory. A damaged one is an error of its own, not of the others.
    pub async fn list(directory: Rc<dyn Directory>) -> Result<Vec<Manifest>, StoreError> {
        let names = directory.list("replicas/").await.map_err(|error| StoreError::io("replicas", &error))?;
        let mut out = Vec::new();
        for name in names.into_iter().filter(|name| name.ends_with("/manifest")) {
            let file = ManifestFile::open(&directory, name.clone()).await?;
            match file.read().await {
                Ok(manifest) => out.push(manifest),
                Err(error) => {
                    tracing::error!(%name, %error, "a replica's manifest cannot be read; it is left alone")
                }
            }
        }
        Ok(out)
    }

    /// Removes a replica's files, the manifest first, so that a crash leaves no half replica.
    pub async fn destroy(directory: Rc<dyn Directory>, id: ReplicaIdentity) -> Result<(), StoreError> {
        let prefix = prefix_of(id);
        let wrap = |error: std::io::Error| StoreError::io(&prefix, &error);
        directory.remove(&format!("{prefix}/manifest")).await.map_err(wrap)?;
        directory.sync().await.map_err(|error| StoreError::flush(&prefix, &error))?;
        for name in directory.list(&format!("{prefix}/")).await.map_err(wrap)? {
            directory.remove(&name).await.map_err(wrap)?;
        }
        directory.sync().await.map_err(|error| StoreError::flush(&prefix, &error))
    }

    /// Nothing else of this replica writes its files meanwhile.
    async fn alone(&self) -> Result<tokio::sync::MutexGuard<'_, ()>, StoreError> {
        let alone = self.0.cleaning.lock().await;
        if self.0.is_retired.get() {
            return Err(StoreError::Failed("the replica has ended, and its files are another's".into()));
        }
        Ok(alone)
    }

    /// Ends when nothing of this replica writes its files any more; whatever still runs of it finds itself refused. For
    /// whoever opens them anew in the same process.
    pub async fn retire(&self) {
        let _alone = self.0.cleaning.lock().await;
        self.0.is_retired.set(true);
    }

    /// The volume's specification, as it was when the replica was made.
    pub fn spec_json(&self) -> Bytes {
        self.0.manifest.borrow().spec_json.clone()
    }

    /// The last durable checkpoint.
    pub fn checkpoint(&self) -> Checkpoint {
        self.0.manifest.borrow().checkpoint.clone()
    }

    /// Applies a write whose payload is that of log entry `index`. No I/O.
    pub fn apply_write(&self, index: LogIndex, range: BlockRange, checksums: &[u32]) {
        let what = What::Data { offset: 0, checksums: checksums.into() };
        self.put(range, Extent { count: range.count.into(), index, what });
    }

    fn put(&self, range: BlockRange, run: Extent) {
        self.0.chain.top().map.borrow_mut().insert(range.start, run);
    }

    /// Applies a trim or zero. No I/O.
    pub fn apply_clear(&self, index: LogIndex, range: BlockRange, how: Clear) {
        let what = match how {
            Clear::Trim => What::Absent,
            Clear::Zero => What::Zero,
        };
        self.put(range, Extent { count: range.count.into(), index, what });
    }

    /// Notes the volume's size, which bounds digests. Reads beyond it are the caller's to refuse.
    pub fn set_size(&self, size: ByteSize) {
        self.0.size.set(size);
    }

    /// What is not home yet. Asked for after every run of applied entries, so it looks at no single block.
    pub fn dirty(&self) -> Dirty {
        let chain_changed = self.0.chain.changed_at() > self.0.manifest.borrow().checkpoint.id.index;
        let mut dirty = Dirty {
            any: chain_changed,
            layers: chain_changed,
            merges: self.next_merge().is_some(),
            ..Dirty::default()
        };
        for piece in self.0.chain.live().iter() {
            let map = piece.map.borrow();
            dirty.any |= !map.is_empty();
            dirty.bytes += map.data_blocks() * holdfast_types::BLOCK_BYTES as u64;
            dirty.cleared += map.cleared_blocks();
            dirty.runs += map.len();
        }
        dirty
    }

    /// Counters.
    pub fn usage(&self) -> VolumeUsage {
        let (mut table_bytes_written, mut table_flushes) = self.0.former_tables.get();
        for files in self.0.chain.all().iter().filter_map(|piece| piece.files()) {
            let (bytes, flushes) = files.table.written();
            table_bytes_written += bytes;
            table_flushes += flushes;
        }
        let usage = self.0.usage.get();
        VolumeUsage {
            table_bytes_written,
            manifest_bytes_written: self.0.manifest_file.bytes_written(),
            flushes: usage.flushes + table_flushes,
            health: self.health(),
            ..usage
        }
    }

    /// A table goes; what it has written stays counted.
    fn forget_table(&self, piece: &layers::Piece) {
        if let Some(files) = piece.files() {
            let ((bytes, flushes), former) = (files.table.written(), self.0.former_tables.get());
            self.0.former_tables.set((former.0 + bytes, former.1 + flushes));
        }
    }

    fn count(&self, more: impl FnOnce(&mut VolumeUsage)) {
        let mut usage = self.0.usage.get();
        more(&mut usage);
        self.0.usage.set(usage);
    }

    async fn flush_home(&self, files: &layers::PieceFiles) -> Result<(), StoreError> {
        self.count(|usage| usage.flushes += 1);
        files.flush_home().await
    }

    fn changed(&self) {
        self.0.changes.set(self.0.changes.get() + 1);
    }
}
