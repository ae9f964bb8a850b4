//! Which replicas of a store have been through a forced recovery of their volume (INV-RECOVER, decision 0155).
//!
//! A volume that has lost its majority goes on as a new Raft group, which begins with what one survivor holds. The files
//! of that survivor stay where they are, under the identity that they were made with; this file says as which group the
//! replica runs since, and from which entry on its log is that group's. It also says which replicas were *sealed*: they
//! run no more as what they were, whoever asks for it and however often the daemon starts. A survivor is sealed before
//! it is looked at which of them holds most, so that none of them changes meanwhile, and whatever is left over of the
//! former group when it comes back. What is sealed is kept and served to nobody.
//!
//! A recovery has an id. A replica that was sealed or taken over for one is not given to another one of the same number:
//! two operators who name different survivors get no mixture. Where one of them had been carried out, that replica
//! halts, and both ids are named.
//!
//! One small file in two equal copies, either of which may rot. If neither can be read nothing of the store may run:
//! nobody knows what was sealed.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use holdfast_env::disk::{AlignedBuffer, Directory};
use holdfast_types::{
    ClusterId, DecodeError, GroupId, LogIndex, Reader, RecoveryId, ReplicaId, StoreId, Term, Writer,
};
use tokio::sync::Mutex;

use crate::journal::planted;
use crate::sealed::Seal;
use crate::twin_file::{Copied, Found, TwinFile};
use crate::{EntryId, ReplicaIdentity, StoreError};

mod lines;

pub use lines::{Barred, Line, Lines, Order, Sealed};

const NAME: &str = "recoveries";
const SEAL: Seal = Seal { magic: 0x6873_6166_7265_3031, version: 1, body_bytes_max: BODY_BYTES_MAX };
/// Room for one copy, in bytes.
const COPY_BYTES: usize = 256 << 10;
/// Replicas that have a line.
pub const LINES_MAX: usize = 1024;
const HEAD_BYTES: usize = 8 + 2 + 4 + 4;
const ENTRY_BYTES: usize = 8 + 8 + 8;
const ORDER_BYTES: usize = 8 + 16;
const LINE_BYTES: usize = 24 + 16 + 16 + ORDER_BYTES + ENTRY_BYTES + 1 + ORDER_BYTES + ENTRY_BYTES + 16;
const BODY_BYTES_MAX: usize = 16 + 16 + 8 + 4 + LINES_MAX * LINE_BYTES;
const _: () = assert!(HEAD_BYTES + BODY_BYTES_MAX <= COPY_BYTES, "every line has room in a copy");

/// What the file says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Memory {
    cluster: ClusterId,
    store: StoreId,
    /// Counts up with every change.
    generation: u64,
    lines: Lines,
}

fn put_entry(out: &mut Writer, entry: &EntryId) {
    entry.term.encode(out);
    entry.leader.encode(out);
    entry.index.encode(out);
}

fn get_entry(input: &mut Reader<'_>) -> Result<EntryId, DecodeError> {
    let (term, leader) = (Term::decode(input)?, ReplicaId::decode(input)?);
    Ok(EntryId { term, leader, index: LogIndex::decode(input)? })
}

fn put_order(out: &mut Writer, order: &Order) {
    out.u64(order.number);
    order.id.encode(out);
}

fn get_order(input: &mut Reader<'_>) -> Result<Order, DecodeError> {
    Ok(Order { number: input.u64()?, id: RecoveryId::decode(input)? })
}

impl Memory {
    fn encode(&self) -> AlignedBuffer {
        let mut out = Writer::new();
        self.cluster.encode(&mut out);
        self.store.encode(&mut out);
        out.u64(self.generation);
        out.u32(self.lines.0.len() as u32);
        for (id, line) in &self.lines.0 {
            id.group.encode(&mut out);
            id.replica.encode(&mut out);
            line.group.encode(&mut out);
            line.before.encode(&mut out);
            put_order(&mut out, &line.order);
            put_entry(&mut out, &line.fork);
            out.bool(line.sealed.is_some());
            if let Some(sealed) = &line.sealed {
                put_order(&mut out, &sealed.order);
                put_entry(&mut out, &sealed.last);
            }
            line.rival.encode(&mut out);
        }
        let body = out.finish();
        SEAL.close(&body)
    }
}

impl Copied for Memory {
    fn decode(copy: &[u8]) -> Result<Self, DecodeError> {
        let mut input = Reader::new(SEAL.open(copy)?);
        let mut out = Self {
            cluster: ClusterId::decode(&mut input)?,
            store: StoreId::decode(&mut input)?,
            generation: input.u64()?,
            lines: Lines::default(),
        };
        for _ in 0..input.count("lines", LINES_MAX)? {
            let (group, replica) = (GroupId::decode(&mut input)?, ReplicaId::decode(&mut input)?);
            let (runs_as, before) = (GroupId::decode(&mut input)?, GroupId::decode(&mut input)?);
            let (order, fork) = (get_order(&mut input)?, get_entry(&mut input)?);
            let sealed = match input.bool()? {
                true => Some(Sealed { order: get_order(&mut input)?, last: get_entry(&mut input)? }),
                false => None,
            };
            let rival = RecoveryId::decode(&mut input)?;
            let line = Line { group: runs_as, before, order, fork, sealed, rival };
            out.lines.0.insert(ReplicaIdentity { group, replica }, line);
        }
        input.end()?;
        Ok(out)
    }

    fn generation(&self) -> u64 {
        self.generation
    }

    fn whose(&self) -> (ClusterId, StoreId) {
        (self.cluster, self.store)
    }
}

/// For fuzzing: reads `body` as if the file held it; what is read is written as it was meant.
#[cfg(any(test, feature = "testing"))]
pub(crate) fn fuzz(body: &[u8]) {
    let whole = SEAL.close(body);
    if let Ok(found) = Memory::decode(whole.as_slice()) {
        let again = Memory::decode(found.encode().as_slice());
        assert_eq!(again, Ok(found), "what was recovered is written otherwise");
    }
}

/// The file. It is made when there is something to write.
pub struct RecoveryFile {
    file: TwinFile,
    memory: RefCell<Memory>,
    is_unreadable: Cell<bool>,
    writing: Mutex<()>,
}

/// Why a change was not made.
#[derive(Debug, thiserror::Error)]
pub enum RecoveryError {
    /// It may not be.
    #[error(transparent)]
    Barred(#[from] Barred),
    /// It could not be written.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl RecoveryFile {
    /// Opens a store's file; without one nothing was recovered. One of another store is refused.
    pub async fn open(
        directory: Rc<dyn Directory>,
        cluster: ClusterId,
        store: StoreId,
    ) -> Result<Self, StoreError> {
        let file = TwinFile::new(directory, NAME, COPY_BYTES);
        let found = file.load::<Memory>((cluster, store)).await?;
        let opened = Self {
            file,
            memory: RefCell::new(Memory { cluster, store, ..Memory::default() }),
            is_unreadable: Cell::new(matches!(found, Found::Unreadable)),
            writing: Mutex::default(),
        };
        let Found::Newest(newest, is_whole) = found else { return Ok(opened) };
        *opened.memory.borrow_mut() = newest.clone();
        if !is_whole {
            opened.write(&newest).await?;
        }
        Ok(opened)
    }

    /// Whether a replica may run that stands in files of this identity: the group as which it does.
    pub fn may_run(&self, files: ReplicaIdentity) -> Result<ReplicaIdentity, Barred> {
        if self.is_unreadable.get() {
            return Err(Barred::Unreadable);
        }
        self.memory.borrow().lines.may_run(files)
    }

    /// As what a replica is known that stands in files of this identity, whether or not it may run.
    pub fn known_as(&self, files: ReplicaIdentity) -> ReplicaIdentity {
        self.memory.borrow().lines.known_as(files)
    }

    /// Whether a recovery has been at a replica that is, or was, known as `id`.
    pub fn knows(&self, id: ReplicaIdentity) -> bool {
        self.memory.borrow().lines.knows(id)
    }

    /// Whether a replica runs no more as `id`: it was sealed, or goes on as another.
    pub fn is_over(&self, id: ReplicaIdentity) -> bool {
        self.memory.borrow().lines.is_over(id)
    }

    /// The identity of the files of a replica that runs, or ran last, as `id`.
    pub fn files_of(&self, id: ReplicaIdentity) -> ReplicaIdentity {
        self.memory.borrow().lines.files_of(id)
    }

    /// The last entry of a replica's log that is of a group before the one as which it runs.
    pub fn fork_of(&self, id: ReplicaIdentity) -> LogIndex {
        let memory = self.memory.borrow();
        memory.lines.0.get(&memory.lines.files_of(id)).map_or(LogIndex::ZERO, |line| line.fork.index)
    }

    /// Which recovery has replaced a group, as far as this store knows.
    pub fn superseded(&self, group: GroupId) -> Option<Order> {
        self.memory.borrow().lines.superseded(group)
    }

    /// Whether a replica of this name may be made here: nothing of a group that was replaced, and not over the files of
    /// one that goes on.
    pub fn may_make(&self, id: ReplicaIdentity) -> Result<(), Barred> {
        if self.is_unreadable.get() {
            return Err(Barred::Unreadable);
        }
        match self.superseded(id.group) {
            Some(order) => {
                Err(Barred::Superseded { replica: id.replica, number: order.number, by: order.id })
            }
            None => Ok(()),
        }
    }

    /// Whether the files of a replica may go when it is destroyed under this name: not while it goes on under another.
    pub fn may_destroy(&self, id: ReplicaIdentity) -> Result<(), Barred> {
        match self.memory.borrow().lines.former(id) {
            Some((_, line)) => {
                Err(Barred::Superseded { replica: id.replica, number: line.order.number, by: line.order.id })
            }
            None => Ok(()),
        }
    }

    /// Every replica with a line: as what it is known, and the line.
    pub fn lines(&self) -> Vec<(ReplicaIdentity, Line)> {
        self.memory.borrow().lines.known()
    }

    /// INV-RECOVER: notes, durably, that a replica whose log ends with `last` runs as what it is no more; the end of its
    /// log when it was sealed. Again for the same recovery is fine.
    pub async fn seal(
        &self,
        id: ReplicaIdentity,
        order: Order,
        last: EntryId,
    ) -> Result<EntryId, RecoveryError> {
        self.change(|memory| memory.lines.seal(id, order, last)).await
    }

    /// Notes, durably, that a replica that was sealed for a recovery runs as another group from here on. Again for the
    /// same recovery is fine.
    pub async fn take_over(
        &self,
        id: ReplicaIdentity,
        group: GroupId,
        order: Order,
    ) -> Result<(), RecoveryError> {
        self.change(|memory| memory.lines.take_over(id, group, order)).await
    }

    /// A replica whose files are gone needs no line any more.
    pub async fn forget(&self, files: ReplicaIdentity) -> Result<(), RecoveryError> {
        if !self.memory.borrow().lines.0.contains_key(&files) {
            return Ok(());
        }
        self.change(|memory| {
            memory.lines.0.remove(&files);
            Ok(())
        })
        .await
    }

    /// What a change leaves behind is written although it says no: that a rival came is to be known.
    async fn change<T>(
        &self,
        change: impl FnOnce(&mut Memory) -> Result<T, Barred>,
    ) -> Result<T, RecoveryError> {
        if self.is_unreadable.get() {
            return Err(Barred::Unreadable.into());
        }
        let _one_at_a_time = self.writing.lock().await;
        let mut next = self.memory.borrow().clone();
        let outcome = change(&mut next);
        if next.lines.0.len() > LINES_MAX {
            let why = "more replicas were recovered on this store than it can remember: delete volumes that are not \
                       needed, or move replicas away";
            return Err(StoreError::Failed(why.into()).into());
        }
        if next != *self.memory.borrow() {
            next.generation += 1;
            if !planted("forget-recovery") {
                self.write(&next).await?;
            }
            *self.memory.borrow_mut() = next;
        }
        Ok(outcome?)
    }

    async fn write(&self, memory: &Memory) -> Result<(), StoreError> {
        self.file.write(&memory.encode(), if planted("recovery-in-one-copy") { 1 } else { 2 }).await
    }
}

#[cfg(test)]
mod tests;
