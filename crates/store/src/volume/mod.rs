//! The blocks of one replica: block map over home file, chunk table, cleaner, checkpoint, and the staging layer of a
//! rebuild.
//!
//! What is applied enters the block map, which says where in the journal a block's newest content stands. The cleaner
//! moves it home. A block is read from the map if it is there, else from home if the table says data, and every block
//! is checked against its checksum, address included.
//!
//! Invariants: home and table are repeatable from the journal until the manifest names the checkpoint that covers
//! them; only blocks whose entries are locally flushed and applied are moved home; a chunk is punched only after the
//! checkpoint that emptied it. After a restart home may hold blocks newer than the checkpoint: the layer above serves
//! nothing until it has applied again up to the end of its recovered log.

mod clean;
mod extent;
mod heal;
mod manifest;
mod read;
mod stage;
mod table;

use std::cell::{Cell, RefCell};
use std::fmt;
use std::rc::Rc;

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;
use holdfast_env::disk::{Directory, File, OpenMode};
use holdfast_types::{BlockIndex, BlockRange, ByteSize, ChunkIndex, LogIndex};

pub use heal::{ChunkContent, ChunkNow, Finding, Health};
pub use manifest::{Manifest, ReplicaFileIdentity};
pub use read::{CheckedBlocks, ReadError};
pub use stage::StagingLayer;
pub use table::BlockSum;

use crate::journal::planted;
use crate::{EntryId, ReplicaIdentity, StoreError};
use extent::{Extent, ExtentMap, What};
use manifest::{ManifestFile, PAGES_LISTED_MAX};
use table::{PageMark, Table};

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
    /// A good moment to drop payloads from memory.
    fn evict_hint(&self) {}
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
    /// Whether anything is not home.
    pub any: bool,
    /// Bytes of data that are not home.
    pub bytes: u64,
    /// Runs of blocks that the map holds.
    pub runs: usize,
}

/// Space of a replica in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct SpaceUsed {
    /// Allocated for blocks.
    pub allocated: u64,
    /// Allocated for the table.
    pub table: u64,
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

/// A digest of a volume's whole content: equal content, equal digest; zero and absent blocks are equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VolumeDigest {
    sums: (u32, u32),
    /// Blocks whose checksum does not match.
    pub bad_blocks: u64,
}

impl fmt::Display for VolumeDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}{:08x}", self.sums.0, self.sums.1)
    }
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
    home: Rc<dyn File>,
    table: Table,
    manifest_file: ManifestFile,
    manifest: RefCell<Manifest>,
    payloads: Rc<dyn PayloadSource>,
    map: RefCell<ExtentMap>,
    size: Cell<ByteSize>,
    /// One cleaner or staging commit at a time.
    cleaning: tokio::sync::Mutex<()>,
    /// Counts up whenever home or table have changed, for readers that were under way.
    changes: Cell<u64>,
    usage: Cell<VolumeUsage>,
    /// Rebuilds that compare what is home with a peer's. While there is one, nothing is moved home (INV-STAGE).
    rebuilds: Cell<u32>,
    /// What reads found bad.
    suspects: heal::Suspects,
}

/// The blocks of one replica. Cheap to clone.
#[derive(Clone)]
pub struct VolumeData(Rc<Inner>);

fn prefix_of(id: ReplicaIdentity) -> String {
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
        for name in ["home", "table"] {
            let name = format!("{prefix}/layer-0/{name}");
            let wrap = |error: std::io::Error| StoreError::io(&name, &error);
            directory.remove(&name).await.map_err(wrap)?;
            directory.open(&name, OpenMode::CreateNew).await.map_err(wrap)?;
        }
        let file = ManifestFile::create(&directory, format!("{prefix}/manifest")).await?;
        let manifest = Manifest {
            identity: identity.clone(),
            spec_json,
            checkpoint: initial,
            generation: 1,
            staged: false,
            pages: Some(Vec::new()),
        };
        file.write(&manifest).await?;
        if !planted("replica-not-named") {
            directory.sync().await.map_err(|error| StoreError::io(&prefix, &error))?;
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
        let (home, _) = open_file(&directory, &prefix, "home").await?;
        let (table_file, table_name) = open_file(&directory, &prefix, "table").await?;
        let data = Self(Rc::new(Inner {
            table: Table::new(table_file, table_name, expected.id),
            directory,
            identity: expected.clone(),
            prefix,
            home,
            manifest_file,
            manifest: RefCell::new(manifest),
            payloads,
            map: RefCell::default(),
            size: Cell::new(SIZE_UNKNOWN),
            cleaning: tokio::sync::Mutex::new(()),
            changes: Cell::new(0),
            usage: Cell::default(),
            rebuilds: Cell::new(0),
            suspects: heal::Suspects::default(),
        }));
        data.0.home.flush().await.map_err(|error| StoreError::io("home", &error))?;
        let listed = data.0.manifest.borrow().pages.clone();
        let empty = data.0.table.settle(listed.as_deref()).await?;
        // A crash may have come between the checkpoint that emptied them and their punching.
        data.punch(&empty).await?;
        data.finish_staging().await?;
        Ok(data)
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
        directory.sync().await.map_err(wrap)?;
        for name in directory.list(&format!("{prefix}/")).await.map_err(wrap)? {
            directory.remove(&name).await.map_err(wrap)?;
        }
        directory.sync().await.map_err(wrap)
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
        self.0.map.borrow_mut().insert(range.start, Extent { count: range.count.into(), index, what });
    }

    /// Applies a trim or zero. No I/O.
    pub fn apply_clear(&self, index: LogIndex, range: BlockRange, how: Clear) {
        let what = match how {
            Clear::Trim => What::Absent,
            Clear::Zero => What::Zero,
        };
        self.0.map.borrow_mut().insert(range.start, Extent { count: range.count.into(), index, what });
    }

    /// Notes the volume's size, which bounds digests. Reads beyond it are the caller's to refuse.
    pub fn set_size(&self, size: ByteSize) {
        self.0.size.set(size);
    }

    /// What is not home yet. Asked for after every run of applied entries, so it looks at no single block.
    pub fn dirty(&self) -> Dirty {
        let map = self.0.map.borrow();
        Dirty {
            any: !map.is_empty(),
            bytes: map.data_blocks() * holdfast_types::BLOCK_BYTES as u64,
            runs: map.len(),
        }
    }

    /// Space on the medium.
    pub async fn space(&self) -> Result<SpaceUsed, StoreError> {
        let home = self.0.home.size().await.map_err(|error| StoreError::io("home", &error))?;
        let table =
            self.0.table.file().size().await.map_err(|error| StoreError::io(self.0.table.name(), &error))?;
        Ok(SpaceUsed { allocated: home.allocated, table: table.allocated })
    }

    /// Counters.
    pub fn usage(&self) -> VolumeUsage {
        let (table_bytes_written, table_flushes) = self.0.table.written();
        let usage = self.0.usage.get();
        VolumeUsage {
            table_bytes_written,
            manifest_bytes_written: self.0.manifest_file.bytes_written(),
            flushes: usage.flushes + table_flushes,
            health: self.health(),
            ..usage
        }
    }

    fn count(&self, more: impl FnOnce(&mut VolumeUsage)) {
        let mut usage = self.0.usage.get();
        more(&mut usage);
        self.0.usage.set(usage);
    }

    async fn flush_home(&self) -> Result<(), StoreError> {
        self.count(|usage| usage.flushes += 1);
        self.0.home.flush().await.map_err(|error| StoreError::io("home", &error))
    }

    fn changed(&self) {
        self.0.changes.set(self.0.changes.get() + 1);
    }

    /// Writes the next generation. `pages` are those that the checkpoint wrote; without them the list stays.
    async fn write_manifest(
        &self,
        checkpoint: Checkpoint,
        staged: bool,
        pages: Option<&[PageMark]>,
    ) -> Result<(), StoreError> {
        let mut next = self.0.manifest.borrow().clone();
        if let Some(pages) = pages {
            let all = [self.0.table.stale().as_slice(), pages].concat();
            next.pages = (all.len() <= PAGES_LISTED_MAX).then_some(all);
        }
        next.checkpoint = checkpoint;
        next.staged = staged;
        next.generation += 1;
        self.count(|usage| usage.flushes += 1);
        self.0.manifest_file.write(&next).await?;
        *self.0.manifest.borrow_mut() = next;
        Ok(())
    }

    /// Change marks of the chunks from `from` on, of `count` chunks, that were ever changed.
    pub async fn chunk_summaries(
        &self,
        from: ChunkIndex,
        count: u32,
    ) -> Result<Vec<ChunkSummary>, StoreError> {
        let mut out = Vec::new();
        for chunk in (from.0..from.0 + u64::from(count)).map(ChunkIndex) {
            let line = self.0.table.chunk(chunk).await.inspect_err(|_| self.suspect_chunk(chunk))?;
            let mut summary = ChunkSummary {
                chunk,
                incarnation: line.incarnation,
                last_index: line.last_index,
                present: line.is_present(),
            };
            let range = BlockRange::new(chunk.first_block(), holdfast_types::CHUNK_BLOCKS as u32);
            for (_, run) in self.0.map.borrow().over(range) {
                summary.incarnation = self.0.identity.incarnation;
                summary.last_index = summary.last_index.max(run.index);
                summary.present |= !matches!(run.what, What::Absent);
            }
            if summary.last_index > LogIndex::ZERO {
                out.push(summary);
            }
        }
        Ok(out)
    }

    /// As [`Self::chunk_summaries`], of what is home alone, for a replica that is being rebuilt: what the map holds goes
    /// when the rebuild is switched in. A chunk that the map covers equals no other.
    pub async fn home_summaries(
        &self,
        from: ChunkIndex,
        count: u32,
    ) -> Result<Vec<ChunkSummary>, StoreError> {
        let mut out = Vec::new();
        for chunk in (from.0..from.0 + u64::from(count)).map(ChunkIndex) {
            let line = self.0.table.chunk(chunk).await?;
            let range = BlockRange::new(chunk.first_block(), holdfast_types::CHUNK_BLOCKS as u32);
            let covered = !self.0.map.borrow().over(range).is_empty();
            let (incarnation, last_index) =
                if covered { (0, LogIndex::ZERO) } else { (line.incarnation, line.last_index) };
            if covered || last_index > LogIndex::ZERO {
                out.push(ChunkSummary {
                    chunk,
                    incarnation,
                    last_index,
                    present: covered || line.is_present(),
                });
            }
        }
        Ok(out)
    }

    /// How each block of a chunk is at home; `None` for those that the map covers.
    pub async fn home_checksums(&self, chunk: ChunkIndex) -> Result<Vec<Option<BlockSum>>, StoreError> {
        let line = self.0.table.chunk(chunk).await?;
        let mut sums: Vec<Option<BlockSum>> =
            (0..holdfast_types::CHUNK_BLOCKS as usize).map(|n| Some(line.get(n))).collect();
        let range = BlockRange::new(chunk.first_block(), holdfast_types::CHUNK_BLOCKS as u32);
        for (at, run) in self.0.map.borrow().over(range) {
            for n in 0..run.count {
                sums[BlockIndex(at.0 + n).within_chunk()] = None;
            }
        }
        Ok(sums)
    }

    /// How each block of a chunk is now.
    pub async fn chunk_checksums(&self, chunk: ChunkIndex) -> Result<Vec<BlockSum>, StoreError> {
        let line = self.0.table.chunk(chunk).await?;
        let mut sums: Vec<BlockSum> =
            (0..holdfast_types::CHUNK_BLOCKS as usize).map(|n| line.get(n)).collect();
        let range = BlockRange::new(chunk.first_block(), holdfast_types::CHUNK_BLOCKS as u32);
        for (at, run) in self.0.map.borrow().over(range) {
            for n in 0..run.count {
                sums[BlockIndex(at.0 + n).within_chunk()] = sum_of(&run, n);
            }
        }
        Ok(sums)
    }
}

fn sum_of(run: &Extent, n: u64) -> BlockSum {
    match run.what {
        What::Zero => BlockSum::Zero,
        What::Absent => BlockSum::Absent,
        What::Data { .. } => run.checksum(n).map_or(BlockSum::Absent, BlockSum::Data),
    }
}

async fn open_file(
    directory: &Rc<dyn Directory>,
    prefix: &str,
    name: &str,
) -> Result<(Rc<dyn File>, String), StoreError> {
    let name = format!("{prefix}/layer-0/{name}");
    let file =
        directory.open(&name, OpenMode::Existing).await.map_err(|error| StoreError::io(&name, &error))?;
    Ok((file, name))
}
