//! The journal of one store: the only place where an acknowledgement is earned.
//!
//! All groups of a store share its segments and its flushes. What gathers while a batch is being written goes into
//! the next one; a batch is one durable write; batches complete in order. Segments are written once in full when the
//! store is made and then reused in place, oldest first (an overwrite flushes twice as fast as a fresh extent).
//!
//! Invariants: nothing is reported durable before its batch and every batch before it is on stable storage (INV-ACK);
//! a segment is not reused before a later batch that says so is durable; a failed write or flush stops the store for
//! good; what recovery cannot prove never to have been durable is never cut (docs/FORMAT.md has the argument).

mod admission;
pub(crate) mod format;
mod group;
pub mod levels;
mod recover;
mod repair;
mod vacate;
mod writer;
mod yielding;

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::rc::{Rc, Weak};
use std::time::Duration;

use bytes::Bytes;
use holdfast_env::Instant;
use holdfast_env::disk::{ALIGNMENT, AlignedBuffer, Directory, Durability, File, OpenMode};
use holdfast_types::{
    ClusterId, DecodeError, GroupId, LatencyHistogram, NodeName, Reader, ReplicaId, StoreId, Writer,
};
use tokio::sync::Notify;

use admission::{Admission, Cleaning};
pub use admission::{Admitted, CleaningPass, OTHERS_WAIT_MAX};
pub use group::{Done, GroupLog};
use group::{Group, Meta, Place};
pub use repair::EntrySum;
use writer::State;
pub use yielding::Beside;
use yielding::Foreground;

use crate::{EntryId, RecentLatency, ReplicaIdentity, Reserve, StoreError, StoreIdentity};

/// A disk that has not answered for a batch after so long is taken to hang, until it does.
pub const HUNG_AFTER: Duration = Duration::from_secs(2);
const IDENTITY_FILE: &str = "journal/identity";
const IDENTITY_MAGIC: u64 = 0x6873_6166_6964_3031;
/// Goes up with every change of the journal's bytes, so that another version's journal is refused, not taken for empty.
const IDENTITY_VERSION: u16 = 2;

/// How a store is laid out; fixed when it is made.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// Bytes of a segment; a multiple of 4096, at least 2 MiB.
    pub segment_bytes: u64,
    /// Number of segments, at least 4.
    pub segments: u32,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self { segment_bytes: 16 << 20, segments: 16 }
    }
}

/// How full the journal is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pressure {
    /// Segments in use, in percent.
    pub used_percent: u32,
    /// What is needed of what the line may take, in percent (`levels`); more than 100 once it has stopped.
    pub line_percent: u32,
    /// What stands in line waits for room, which only a purge makes.
    pub line_waits: bool,
}

/// Counters of a journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct JournalUsage {
    /// Bytes of all segments.
    pub bytes_total: u64,
    /// Bytes of segments that hold something needed.
    pub bytes_used: u64,
    /// Batches written, which is also the number of flushes: closing marks and declarations included.
    pub flushes: u64,
    /// Bytes written, with lists, copies and padding.
    pub bytes_written: u64,
    /// Bytes of payload among them.
    pub payload_bytes_written: u64,
    /// Log entries written.
    pub entries_written: u64,
    /// Records that stand in line.
    pub waiting_records: u64,
    /// Bytes of payload that stand in line.
    pub waiting_bytes: u64,
    /// Log entries that the index in memory holds.
    pub entries_indexed: u64,
    /// Payload that is kept in memory, in bytes.
    pub bytes_cached: u64,
    /// Bytes that entries may fill before they wait for room.
    pub line_bytes: u64,
    /// Those of them that are needed.
    pub line_bytes_taken: u64,
    /// Writes that waited to be let in because the journal was filling up.
    pub slowed_writes: u64,
    /// How long they waited, all together.
    pub slowed_for: Duration,
    /// How long cleaners paused to give way to batches of the journal.
    pub cleaners_paused: Duration,
}

/// What recovery found out about a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Recovery {
    /// Everything that may have been acknowledged is there.
    Clean,
    /// These entries may have been acknowledged and cannot be read. They are never cut.
    Faulty(Vec<EntryId>),
    /// Part of the journal that may have been this group's cannot be read at all.
    Unknown(String),
}

/// A group that the journal holds.
pub struct RecoveredGroup {
    /// Whose log it is.
    pub id: ReplicaIdentity,
    /// The log.
    pub log: GroupLog,
    /// What is left of it.
    pub state: Recovery,
    /// A vote may have been lost: the replica must not vote again under its id.
    pub vote_lost: bool,
}

/// A group that stands for the journal itself: it is there if some part of the journal, once durable, was found
/// unreadable. Its state is kept as any group's is.
const DOUBT: ReplicaIdentity = ReplicaIdentity { group: GroupId::NIL, replica: ReplicaId(0) };

struct Inner {
    identity: StoreIdentity,
    options: StoreOptions,
    salt: u64,
    files: Vec<Rc<dyn File>>,
    state: RefCell<State>,
    groups: RefCell<BTreeMap<ReplicaIdentity, Rc<RefCell<Group>>>>,
    failed: RefCell<Option<StoreError>>,
    changed: Notify,
    usage: Cell<JournalUsage>,
    flush_latency: RefCell<LatencyHistogram>,
    recent_flushes: RefCell<RecentLatency>,
    /// What stands in line has become less.
    shorter: Notify,
    /// Who waits to be let in.
    admission: RefCell<Admission>,
    /// How fast cleaners make room.
    cleaning: RefCell<Cleaning>,
    /// How batches fare while they do.
    foreground: RefCell<Foreground>,
    /// The store's reserve; there is none where nobody asked for it.
    reserve: OnceCell<Reserve>,
}

/// The journal of one store. Cheap to clone.
#[derive(Clone)]
pub struct Journal(Rc<Inner>);

fn segment_name(number: u32) -> String {
    format!("journal/{number:04}")
}

struct IdentityBlock {
    identity: StoreIdentity,
    options: StoreOptions,
    salt: u64,
}

impl IdentityBlock {
    fn encode(&self) -> AlignedBuffer {
        let mut out = Writer::new();
        out.u64(IDENTITY_MAGIC);
        out.u16(IDENTITY_VERSION);
        self.identity.cluster.encode(&mut out);
        self.identity.store.encode(&mut out);
        self.identity.node.encode(&mut out);
        out.u64(self.options.segment_bytes);
        out.u32(self.options.segments);
        out.u64(self.salt);
        let crc = crc32fast::hash(out.as_slice());
        out.u32(crc);
        let block = AlignedBuffer::copy_of(out.as_slice());
        let mut both = AlignedBuffer::zeroed(2 * block.len());
        both.as_mut_slice()[..block.len()].copy_from_slice(block.as_slice());
        both.as_mut_slice()[block.len()..].copy_from_slice(block.as_slice());
        both
    }

    fn decode(block: &[u8]) -> Result<Self, DecodeError> {
        let mut input = Reader::new(block);
        let magic = input.u64()?;
        if magic != IDENTITY_MAGIC {
            return Err(DecodeError::Unknown { what: "store magic", value: magic });
        }
        let version = input.u16()?;
        if version != IDENTITY_VERSION {
            return Err(DecodeError::Unknown { what: "store format version", value: version.into() });
        }
        let cluster = ClusterId::decode(&mut input)?;
        let store = StoreId::decode(&mut input)?;
        let node = NodeName::decode(&mut input)?;
        let options = StoreOptions { segment_bytes: input.u64()?, segments: input.u32()? };
        if options.segment_bytes == 0 || !options.segment_bytes.is_multiple_of(ALIGNMENT as u64) {
            return Err(DecodeError::Unknown { what: "size of a segment", value: options.segment_bytes });
        }
        if (options.segments as usize) < levels::SEGMENTS_MIN {
            return Err(DecodeError::Unknown { what: "number of segments", value: 0 });
        }
        let salt = input.u64()?;
        let covered = block.len() - input.remaining();
        let crc = input.u32()?;
        if crc != crc32fast::hash(&block[..covered]) {
            return Err(DecodeError::Unknown { what: "store checksum", value: crc.into() });
        }
        Ok(Self { identity: StoreIdentity { cluster, node, store }, options, salt })
    }
}

async fn read_identity(directory: &Rc<dyn Directory>) -> Result<IdentityBlock, StoreError> {
    let missing = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::NotFound => StoreError::NotFormatted("it has no journal/identity".into()),
        _ => StoreError::io(IDENTITY_FILE, &error),
    };
    let file = directory.open(IDENTITY_FILE, OpenMode::Existing).await.map_err(missing)?;
    let bytes = file.read_at(0, 8192).await.map_err(|error| StoreError::io(IDENTITY_FILE, &error))?;
    let (first, second) = bytes.as_slice().split_at(4096);
    IdentityBlock::decode(first)
        .or_else(|_| IdentityBlock::decode(second))
        .map_err(|error| StoreError::damaged("journal/identity (both copies)", &error))
}

impl Journal {
    /// Makes a store: writes every segment in full, then its identity, so that a crash in between leaves no store.
    pub async fn format(
        directory: Rc<dyn Directory>,
        identity: &StoreIdentity,
        options: &StoreOptions,
    ) -> Result<(), StoreError> {
        assert!(
            options.segments as usize >= levels::SEGMENTS_MIN && options.segment_bytes >= 2 << 20,
            "a segment has room for the largest entry"
        );
        if read_identity(&directory).await.is_ok() {
            return Err(StoreError::Failed("there is a store here already".into()));
        }
        for number in 0..options.segments {
            let name = segment_name(number);
            let wrap = |error: std::io::Error| StoreError::io(&name, &error);
            directory.remove(&name).await.map_err(wrap)?;
            let file = directory.open(&name, OpenMode::CreateNew).await.map_err(wrap)?;
            file.allocate(0, options.segment_bytes).await.map_err(wrap)?;
            let mut offset = 0;
            while offset < options.segment_bytes {
                let length = (4 << 20).min(options.segment_bytes - offset);
                let zeros = AlignedBuffer::zeroed(length as usize);
                file.write_at(offset, zeros, Durability::Volatile).await.map_err(wrap)?;
                offset += length;
            }
            file.flush().await.map_err(wrap)?;
        }
        let wrap = |error: std::io::Error| StoreError::io(IDENTITY_FILE, &error);
        directory.remove(IDENTITY_FILE).await.map_err(wrap)?;
        let file = directory.open(IDENTITY_FILE, OpenMode::CreateNew).await.map_err(wrap)?;
        let salt = holdfast_env::random_u64();
        let block = IdentityBlock { identity: identity.clone(), options: options.clone(), salt };
        file.write_at(0, block.encode(), Durability::Durable).await.map_err(wrap)?;
        file.flush().await.map_err(wrap)?;
        directory.sync().await.map_err(wrap)
    }

    /// The identity of the store in `directory`.
    pub async fn identity_of(directory: &Rc<dyn Directory>) -> Result<StoreIdentity, StoreError> {
        Ok(read_identity(directory).await?.identity)
    }

    /// Opens a store and recovers what its journal holds. `options` are those of the day it was made, if they differ.
    pub async fn open(
        directory: Rc<dyn Directory>,
        expected: &StoreIdentity,
        _options: &StoreOptions,
    ) -> Result<(Self, Vec<RecoveredGroup>), StoreError> {
        // Names that a process before this one made may be there and not be durable yet.
        directory.sync().await.map_err(|error| StoreError::io("the store's directory", &error))?;
        let block = read_identity(&directory).await?;
        if block.identity != *expected && !planted("foreign-store") {
            let name = |id: &StoreIdentity| {
                format!("store {} of node {} of cluster {}", id.store, id.node, id.cluster)
            };
            return Err(StoreError::Identity { expected: name(expected), found: name(&block.identity) });
        }
        let mut files = Vec::new();
        for number in 0..block.options.segments {
            let name = segment_name(number);
            let file = directory.open(&name, OpenMode::Existing).await;
            files.push(file.map_err(|error| StoreError::io(&name, &error))?);
        }
        recover::open(block.identity, block.options, block.salt, files).await
    }

    /// Makes a group's log; durable when it returns.
    pub async fn create_group(&self, who: ReplicaIdentity) -> Result<GroupLog, StoreError> {
        assert!(who.group != GroupId::NIL, "a group has an id");
        if self.group(who).is_some() {
            return Err(StoreError::Failed(format!(
                "replica {} of group {} has a log already",
                who.replica, who.group
            )));
        }
        let group = Rc::new(RefCell::new(Group::default()));
        self.0.groups.borrow_mut().insert(who, group.clone());
        let log = GroupLog { journal: self.clone(), who, group };
        log.create().await?;
        Ok(log)
    }

    /// The log of a group.
    pub fn group(&self, who: ReplicaIdentity) -> Option<GroupLog> {
        let group = self.0.groups.borrow().get(&who)?.clone();
        Some(GroupLog { journal: self.clone(), who, group })
    }

    /// Forgets a group for good; durable when it returns. Forgetting it again is fine.
    pub async fn drop_group(&self, who: ReplicaIdentity) -> Result<(), StoreError> {
        let Some(log) = self.group(who) else { return Ok(()) };
        log.drop_all().await?;
        // What still stands in line would bring the group back.
        self.forget_queued(who);
        self.0.groups.borrow_mut().remove(&who);
        Ok(())
    }

    /// Why the store has stopped, if it has.
    pub fn failed(&self) -> Option<StoreError> {
        self.0.failed.borrow().clone()
    }

    /// Stops the store for good: another of its files could not be written or flushed, and what that leaves behind is
    /// unknown. Nothing is tried again.
    pub fn stop(&self, error: &StoreError) {
        self.fail(error);
    }

    /// Opens the store's reserve, as large as the journal, or makes it.
    pub async fn open_reserve(&self, directory: Rc<dyn Directory>) -> Result<(), StoreError> {
        let bytes = u64::from(self.0.options.segments) * self.0.options.segment_bytes;
        let reserve = Reserve::open(directory, bytes).await?;
        self.0.reserve.set(reserve).map_err(|_| StoreError::Failed("the reserve is open already".into()))
    }

    /// The store's reserve, if it was opened.
    pub fn reserve(&self) -> Option<&Reserve> {
        self.0.reserve.get()
    }

    /// Whether the medium below is full: then no data is taken that needs room (INV-SPACE).
    pub fn is_full(&self) -> bool {
        self.reserve().is_some_and(Reserve::is_full)
    }

    /// What of the journal cannot be read though it may have been acknowledged. A group whose identity is used again
    /// after this (the catalog's) may have had a log here.
    pub fn doubt(&self) -> bool {
        self.0.groups.borrow().contains_key(&DOUBT)
    }

    /// Bytes of all segments.
    pub(super) fn bytes_total(&self) -> u64 {
        u64::from(self.0.options.segments) * self.0.options.segment_bytes
    }

    /// How full the journal is.
    pub fn pressure(&self) -> Pressure {
        let state = self.0.state.borrow();
        let line_percent = (state.line_taken() * 100 / self.0.options.line_bytes()) as u32;
        Pressure { used_percent: state.used_percent(), line_percent, line_waits: state.line_waits() }
    }

    /// Ends when the pressure has changed since this call (not since the future is first polled), or the store has
    /// failed.
    pub fn pressure_changed(&self) -> impl Future<Output = ()> + '_ {
        self.0.changed.notified()
    }

    /// Whether data of leaders elsewhere is taken, who commit it without this store. On a full medium most of the journal
    /// is kept for what makes room: a volume that is led from here may need it (INV-SPACE).
    fn takes_data_of_others(&self) -> bool {
        !self.is_full() || self.pressure().line_percent < levels::FULL_TAKES_BELOW
    }

    /// Bytes of what the line may take that are taken, and all of them.
    fn usage_of_line(&self) -> (u64, u64) {
        (self.0.state.borrow().line_taken(), self.0.options.line_bytes())
    }

    /// Counters.
    pub fn usage(&self) -> JournalUsage {
        let total = self.bytes_total();
        let state = self.0.state.borrow();
        let mut usage = JournalUsage {
            bytes_total: total,
            bytes_used: state.used_segments() as u64 * self.0.options.segment_bytes,
            waiting_records: state.waiting_records(),
            waiting_bytes: state.waiting_bytes(),
            line_bytes: self.0.options.line_bytes(),
            line_bytes_taken: state.line_taken(),
            slowed_writes: self.0.admission.borrow().slowed,
            slowed_for: self.0.admission.borrow().waited,
            cleaners_paused: self.0.foreground.borrow().paused,
            ..self.0.usage.get()
        };
        for group in self.0.groups.borrow().values() {
            let group = group.borrow();
            usage.entries_indexed += group.entries.len() as u64;
            usage.bytes_cached += group.cached_bytes as u64;
        }
        usage
    }

    /// Whether the disk has not answered for a batch within [`HUNG_AFTER`].
    pub fn is_hung(&self) -> bool {
        self.hung_since().is_some()
    }

    /// Since when the disk has not answered for its oldest batch, if that is longer than [`HUNG_AFTER`].
    pub fn hung_since(&self) -> Option<Instant> {
        let oldest = self.0.state.borrow().oldest_batch();
        oldest.filter(|since| Instant::now().since(*since) > HUNG_AFTER)
    }

    /// How long batches have been taking for a while until they were durable; `None` if there were too few to say.
    pub fn sustained_flush(&self) -> Option<Duration> {
        self.0.recent_flushes.borrow().sustained(Instant::now())
    }

    /// How long batches took from their hand-over to the disk until they were durable.
    pub fn flush_latency(&self) -> LatencyHistogram {
        self.0.flush_latency.borrow().clone()
    }

    async fn read_place(&self, place: Option<Place>, start: u64, length: usize) -> Result<Bytes, StoreError> {
        let place = place.ok_or_else(|| {
            StoreError::Failed("an entry's payload is neither in memory nor on disk".into())
        })?;
        let file = self.0.files[place.segment].clone();
        let read = file.read_at(place.offset + start, length).await;
        let buffer = read.map_err(|error| StoreError::io(segment_name(place.segment as u32), &error))?;
        Ok(Bytes::from_owner(buffer))
    }

    fn downgrade(&self) -> Weak<Inner> {
        Rc::downgrade(&self.0)
    }

    /// Entries are gone from memory; what says so is not durable yet.
    fn removed(&self, removed: &[Meta]) {
        self.0.state.borrow_mut().leave(removed);
    }

    /// Entries are not needed any more.
    fn released(&self, removed: &[Meta]) {
        self.0.state.borrow_mut().release(removed);
        self.reclaim();
        self.kick();
        self.0.changed.notify_waiters();
    }
}

/// Whether a test has planted a fault; never, in a release.
#[cfg(any(test, feature = "testing"))]
pub(crate) fn planted(name: &str) -> bool {
    crate::testing::is_planted(name)
}

#[cfg(not(any(test, feature = "testing")))]
pub(crate) const fn planted(_name: &str) -> bool {
    false
}
