//! One store of its own, without Raft and network: its journal, and volumes whose commands are committed as soon as they
//! are durable here. What a replica adds to it is `bench first`'s to measure.

use std::cell::{Cell, RefCell};
use std::path::Path;
use std::rc::Rc;

use bytes::Bytes;
use holdfast_env::JoinHandle;
use holdfast_env::disk::Directory;
use holdfast_env::real::disk::{IoEngine, RealDirectory};
use holdfast_store::journal::{GroupLog, Journal, StoreOptions, levels};
use holdfast_store::volume::{Checkpoint, CheckpointSource, ReplicaFileIdentity, VolumeData};
use holdfast_store::{EntryId, LogEntry, ReplicaIdentity, StoreError, StoreIdentity};
use holdfast_types::{
    BLOCK_BYTES, BlockIndex, BlockRange, ByteSize, ClusterId, GroupId, LogIndex, NodeName, ReplicaId,
    StoreId, Term, VolumeId, block_checksum,
};
use tokio::sync::{Notify, oneshot};

use crate::Outcome;
use crate::load::Target;

/// Kinds of log entries.
const WRITE: u8 = 1;
const SNAPSHOT: u8 = 2;
/// As in a replica: blocks that are not home, at which they are brought there.
const CLEAN_AT_BYTES: u64 = 16 << 20;
/// Entries of a log that are read again at once, as openraft does.
const REPEAT_ENTRIES: u64 = 64;

/// As a sentence.
pub fn wrong(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// A journal of so many MiB: sixteen segments, as by default, of at least 2 MiB.
pub fn journal_of(mib: u64) -> StoreOptions {
    let segment_bytes = (mib << 20) / 16;
    StoreOptions { segment_bytes: segment_bytes.max(2 << 20), segments: 16 }
}

fn store_identity() -> StoreIdentity {
    StoreIdentity { cluster: ClusterId(1), node: NodeName::new("bench"), store: StoreId(1) }
}

fn replica(number: u64) -> ReplicaIdentity {
    ReplicaIdentity { group: GroupId(u128::from(number)), replica: ReplicaId(1) }
}

fn file_identity(number: u64) -> ReplicaFileIdentity {
    let StoreIdentity { cluster, node, store } = store_identity();
    let volume = VolumeId(u128::from(number));
    ReplicaFileIdentity { cluster, store, node, volume, id: replica(number), incarnation: 1 }
}

fn entry_id(index: u64) -> EntryId {
    EntryId { term: Term(1), leader: ReplicaId(1), index: LogIndex(index) }
}

/// A store that runs.
pub struct Store {
    directory: Rc<dyn Directory>,
    /// Its journal.
    pub journal: Journal,
}

impl Store {
    /// Makes one in a directory that has none.
    pub async fn format(path: &Path, options: &StoreOptions, engine: IoEngine) -> Outcome<Self> {
        let directory: Rc<dyn Directory> = RealDirectory::open_with(path, engine).map_err(wrong)?;
        Journal::format(directory.clone(), &store_identity(), options).await.map_err(wrong)?;
        let (journal, _) =
            Journal::open(directory.clone(), &store_identity(), options).await.map_err(wrong)?;
        Ok(Self { directory, journal })
    }

    /// Opens it again, as after a kill; without its volumes.
    pub async fn open(path: &Path, engine: IoEngine) -> Outcome<Self> {
        let directory: Rc<dyn Directory> = RealDirectory::open_with(path, engine).map_err(wrong)?;
        // The journal's own layout counts.
        let options = StoreOptions::default();
        let (journal, _) =
            Journal::open(directory.clone(), &store_identity(), &options).await.map_err(wrong)?;
        Ok(Self { directory, journal })
    }

    /// A log of its own.
    pub async fn log(&self, number: u64) -> Outcome<GroupLog> {
        let log = self.journal.create_group(replica(number)).await.map_err(wrong)?;
        append(&log, LogEntry { id: entry_id(0), kind: 0, head: Bytes::new(), payload: Bytes::new() })
            .await?;
        Ok(log)
    }

    /// Makes a volume.
    pub async fn create(&self, number: u64, bytes: u64) -> Outcome<Rc<Volume>> {
        let log = self.log(number).await?;
        let (payloads, initial) = (Rc::new(log.clone()), Checkpoint::default());
        let made = VolumeData::create(
            self.directory.clone(),
            file_identity(number),
            Bytes::new(),
            initial,
            payloads,
        );
        let data = made.await.map_err(wrong)?;
        data.set_size(ByteSize(bytes));
        Ok(Volume::new(self.journal.clone(), log, data))
    }

    /// Opens a volume and repeats its log from the checkpoint on.
    pub async fn reopen(&self, number: u64, bytes: u64) -> Outcome<Rc<Volume>> {
        let log = self.journal.group(replica(number)).ok_or("the volume's log is gone")?;
        let opened =
            VolumeData::open(self.directory.clone(), &file_identity(number), Rc::new(log.clone())).await;
        let data = opened.map_err(wrong)?;
        data.set_size(ByteSize(bytes));
        let volume = Volume::new(self.journal.clone(), log, data);
        volume.repeat()?;
        Ok(volume)
    }
}

/// Appends one entry and waits until it is durable.
pub async fn append(log: &GroupLog, entry: LogEntry) -> Outcome<()> {
    let (sender, receiver) = oneshot::channel();
    // Who waits no more has gone with the run.
    log.append(vec![entry], Box::new(|result| drop(sender.send(result))));
    receiver.await.map_err(wrong)?.map_err(wrong)
}

/// An entry that only the journal knows.
pub fn plain_entry(log: &GroupLog, payload: Bytes) -> LogEntry {
    let index = log.last().map_or(0, |id| id.index.0) + 1;
    LogEntry { id: entry_id(index), kind: WRITE, head: Bytes::new(), payload }
}

/// What was applied of a volume's log.
struct Applied {
    data: VolumeData,
    last: Cell<EntryId>,
    changed: Notify,
}

/// A volume on a store.
pub struct Volume {
    journal: Journal,
    log: GroupLog,
    applied: Rc<Applied>,
    closed: Cell<bool>,
    cleaner: RefCell<Option<JoinHandle<()>>>,
}

impl CheckpointSource for Applied {
    fn capture(&self) -> Checkpoint {
        Checkpoint { id: self.last.get(), ..Checkpoint::default() }
    }
}

impl Applied {
    fn apply(&self, id: EntryId, kind: u8, head: &[u8]) -> Outcome<()> {
        match kind {
            WRITE => {
                let (range, sums) = parts_of(head).ok_or("an entry's head is not understood")?;
                self.data.apply_write(id.index, range, &sums);
            }
            SNAPSHOT => self.data.apply_snapshot(id.index),
            _ => {}
        }
        self.last.set(id);
        self.changed.notify_waiters();
        Ok(())
    }
}

fn head_of(range: BlockRange, sums: &[u32]) -> Bytes {
    let mut head = Vec::with_capacity(12 + 4 * sums.len());
    head.extend_from_slice(&range.start.0.to_le_bytes());
    head.extend_from_slice(&range.count.to_le_bytes());
    sums.iter().for_each(|sum| head.extend_from_slice(&sum.to_le_bytes()));
    head.into()
}

fn parts_of(head: &[u8]) -> Option<(BlockRange, Vec<u32>)> {
    let (start, rest) = head.split_first_chunk::<8>()?;
    let (count, sums) = rest.split_first_chunk::<4>()?;
    let sums = sums.chunks_exact(4).filter_map(|sum| sum.try_into().ok()).map(u32::from_le_bytes).collect();
    Some((BlockRange::new(BlockIndex(u64::from_le_bytes(*start)), u32::from_le_bytes(*count)), sums))
}

/// Blocks from a byte offset on.
pub fn blocks(offset: u64, bytes: u64) -> BlockRange {
    let block = BLOCK_BYTES as u64;
    BlockRange::new(BlockIndex(offset / block), (bytes / block) as u32)
}

impl Volume {
    fn new(journal: Journal, log: GroupLog, data: VolumeData) -> Rc<Self> {
        let last = Cell::new(data.checkpoint().id);
        let applied = Rc::new(Applied { data, last, changed: Notify::new() });
        Rc::new(Self { journal, log, applied, closed: Cell::new(false), cleaner: RefCell::default() })
    }

    /// Its blocks.
    pub fn data(&self) -> &VolumeData {
        &self.applied.data
    }

    fn repeat(&self) -> Outcome<()> {
        let end = self.log.last().map_or(LogIndex::ZERO, |last| last.index.next());
        let mut next = self.applied.last.get().index.next();
        while next < end {
            let upto = LogIndex(next.0 + REPEAT_ENTRIES).min(end);
            let entries = self.log.read_heads(next, upto);
            let last = entries.last().ok_or("an entry is missing")?.id.index;
            let mut each = entries.iter();
            each.try_for_each(|entry| self.applied.apply(entry.id, entry.kind, &entry.head))?;
            next = last.next();
        }
        Ok(())
    }

    /// Appends a command and applies it once it is durable: in the order of the log, which is that of `done`.
    async fn submit(&self, kind: u8, head: Bytes, payload: Bytes) -> Outcome<()> {
        let entry = LogEntry { kind, head: head.clone(), ..plain_entry(&self.log, payload) };
        let (sender, receiver) = oneshot::channel();
        let (applied, id) = (self.applied.clone(), entry.id);
        let done = move |result: Result<(), StoreError>| {
            drop(sender.send(result.map_err(wrong).and_then(|()| applied.apply(id, kind, &head))));
        };
        self.log.append(vec![entry], Box::new(done));
        receiver.await.map_err(wrong)?
    }

    /// Freezes what is written.
    pub async fn snapshot(&self) -> Outcome<()> {
        self.submit(SNAPSHOT, Bytes::new(), Bytes::new()).await
    }

    /// Brings everything home, and purges the log.
    pub async fn settle(&self) -> Outcome<()> {
        while self.data().dirty().any {
            self.clean().await?;
        }
        self.purge().await
    }

    async fn clean(&self) -> Outcome<()> {
        self.data().clean(&*self.applied).await.map(drop).map_err(wrong)
    }

    async fn purge(&self) -> Outcome<()> {
        let checkpoint = self.data().checkpoint().id;
        if self.log.purged().is_none_or(|purged| purged.index < checkpoint.index) {
            self.log.purge(checkpoint).await.map_err(wrong)?;
        }
        Ok(())
    }

    /// What a replica's cleaner does, until [`Self::close`] or the store has failed.
    pub fn start_cleaner(self: &Rc<Self>) {
        let volume = self.clone();
        let cleaner = holdfast_env::spawn("cleaner", async move {
            while !volume.closed.get() && volume.journal.failed().is_none() {
                if let Err(error) = volume.clean_when_due().await {
                    // Whoever writes is told why.
                    volume.journal.stop(&StoreError::Failed(error));
                }
            }
        });
        self.cleaner.replace(Some(cleaner));
    }

    /// Ends the cleaner.
    pub async fn close(&self) -> Outcome<()> {
        self.closed.set(true);
        self.applied.changed.notify_waiters();
        let cleaner = self.cleaner.take();
        match cleaner {
            Some(cleaner) => cleaner.await.map_err(wrong),
            None => Ok(()),
        }
    }

    async fn clean_when_due(&self) -> Outcome<()> {
        let (pressure_changed, changed) = (self.journal.pressure_changed(), self.applied.changed.notified());
        let pressure = self.journal.pressure();
        let pressed = pressure.line_waits || pressure.line_percent >= levels::PURGE;
        if pressed {
            self.purge().await?;
        }
        let dirty = self.data().dirty();
        let due = dirty.bytes >= CLEAN_AT_BYTES.min(self.log.clean_at_bytes()) || (pressed && dirty.any);
        if due {
            self.clean().await?;
        }
        if pressed {
            self.purge().await?;
        }
        if !due {
            futures_util::pin_mut!(pressure_changed, changed);
            futures_util::future::select(pressure_changed, changed).await;
        }
        Ok(())
    }

    /// Bytes written so far: to the journal, home, and to tables and manifests.
    pub fn written(&self) -> [u64; 3] {
        let (journal, data) = (self.journal.usage(), self.data().usage());
        [
            journal.bytes_written,
            data.home_bytes_written,
            data.table_bytes_written + data.manifest_bytes_written,
        ]
    }
}

impl Target for Volume {
    async fn read(&self, offset: u64, bytes: u64) -> Outcome<()> {
        self.data().read_checked(blocks(offset, bytes)).await.map(drop).map_err(wrong)
    }
    async fn write(&self, offset: u64, data: Bytes) -> Outcome<()> {
        let range = blocks(offset, data.len() as u64);
        let each = range.blocks().zip(data.chunks_exact(BLOCK_BYTES));
        let sums: Vec<u32> = each.map(|(block, data)| block_checksum(block, data)).collect();
        let _admitted = self.log.admit(data.len()).await;
        self.submit(WRITE, head_of(range, &sums), data).await
    }
}
