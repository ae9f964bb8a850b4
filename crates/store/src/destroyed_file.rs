//! What a store has destroyed, and what was kept after its end had been decided.
//!
//! A request to make a replica may arrive after the one to destroy it: late, out of order, or of a leader of the catalog
//! that has been replaced. Made anew it would be blank under an id that has voted, and a member that still counts it
//! could form a second quorum with it. So a store notes what it destroys before anything of it is gone, and never makes
//! it again (INV-TERM). In the same way a request to destroy a replica may arrive after that replica was taken back; the
//! store notes the decision that took it back, and obeys none that is older (INV-MEMBER).
//!
//! The ids of a group only grow, and none is given twice (INV-CATALOG): the highest id that was destroyed stands for all
//! below it. A group has one line. Of more groups than there is room for those with the lowest ids are put together in
//! one number, below which nothing of any group is made anew: ids are given once in a cluster. The catalog's own are
//! drawn, so each of them is kept.
//!
//! One small file. Both its copies are written before anything is removed, and made equal when it is opened: either may
//! rot. If neither can be read, nothing is made on the store any more.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use holdfast_env::disk::{AlignedBuffer, Directory};
use holdfast_types::{ClusterId, DecodeError, GroupId, Reader, ReplicaId, StoreId, Writer};
use tokio::sync::Mutex;

use crate::journal::planted;
use crate::sealed::Seal;
use crate::twin_file::{Copied, Found, TwinFile};
use crate::{ReplicaIdentity, StoreError};

const NAME: &str = "destroyed";
const SEAL: Seal = Seal { magic: 0x6873_6166_6465_3031, version: 1, body_bytes_max: BODY_BYTES_MAX };
/// Room for one copy, in bytes.
const COPY_BYTES: usize = 256 << 10;
/// Groups that have a line of their own.
pub const GROUPS_MAX: usize = 4096;
/// Members of the catalog that one store can lose.
pub const DRAWN_MAX: usize = 1024;
const HEAD_BYTES: usize = 8 + 2 + 4 + 4;
const LINE_BYTES: usize = 16 + 8 + 8 + 8;
const BODY_BYTES_MAX: usize = 16 + 16 + 8 + 8 + 4 + GROUPS_MAX * LINE_BYTES + 4 + DRAWN_MAX * 8;
const _: () = assert!(HEAD_BYTES + BODY_BYTES_MAX <= COPY_BYTES, "every line has room in a copy");

/// Why a store does not do what it is asked to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Remembered {
    /// It has destroyed the replica, or a later one of its group.
    #[error(
        "replica {replica} was destroyed on this store, or one that came after it: it may have voted and does not come \
         back without its memory. Place a new replica, which gets an id of its own"
    )]
    Destroyed {
        /// The replica.
        replica: ReplicaId,
    },
    /// It cannot say what it has destroyed.
    #[error(
        "what was destroyed on this store cannot be read any more, so no replica is made on it. Move away what stands \
         on it, and give the node an empty data directory under a new name"
    )]
    Unreadable,
    /// The replica was taken back after its end had been decided.
    #[error(
        "replica {replica} was taken back by a decision on revision {kept}, and this one is on revision {decided}: \
         decide anew"
    )]
    Kept {
        /// The replica.
        replica: ReplicaId,
        /// The revision of its volume on which it was taken back.
        kept: u64,
        /// The revision on which its end was decided.
        decided: u64,
    },
}

/// What is known of one group. At most one of its replicas stands on a store at a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Line {
    /// The highest id that was destroyed; 0 for none.
    destroyed: ReplicaId,
    /// The replica that was taken back; 0 for none.
    kept: ReplicaId,
    /// The revision on which it was.
    revision: u64,
}

/// What the file says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Memory {
    cluster: ClusterId,
    store: StoreId,
    /// Counts up with every change.
    generation: u64,
    /// Everything up to here that no line tells of.
    floor: ReplicaId,
    groups: BTreeMap<GroupId, Line>,
    /// Members of the catalog.
    drawn: BTreeSet<ReplicaId>,
}

impl Memory {
    fn encode(&self) -> AlignedBuffer {
        let mut out = Writer::new();
        self.cluster.encode(&mut out);
        self.store.encode(&mut out);
        out.u64(self.generation);
        self.floor.encode(&mut out);
        out.u32(self.groups.len() as u32);
        for (group, line) in &self.groups {
            group.encode(&mut out);
            line.destroyed.encode(&mut out);
            line.kept.encode(&mut out);
            out.u64(line.revision);
        }
        out.u32(self.drawn.len() as u32);
        self.drawn.iter().for_each(|replica| replica.encode(&mut out));
        let body = out.finish();
        SEAL.close(&body)
    }

    fn was_destroyed(&self, id: ReplicaIdentity) -> bool {
        if id.group == GroupId::CATALOG {
            return self.drawn.contains(&id.replica);
        }
        let line = self.groups.get(&id.group).copied().unwrap_or_default();
        id.replica <= line.destroyed.max(self.floor)
    }

    fn destroy(&mut self, id: ReplicaIdentity) -> Result<(), StoreError> {
        let is_kept = self.groups.get(&id.group).is_some_and(|line| line.kept == id.replica);
        if self.was_destroyed(id) && !is_kept {
            return Ok(());
        }
        if id.group == GroupId::CATALOG {
            if self.drawn.len() == DRAWN_MAX {
                let why = "it has lost more members of the catalog than it can remember: replace its disk";
                return Err(StoreError::Failed(why.into()));
            }
            self.drawn.insert(id.replica);
        } else {
            let mut line = self.groups.get(&id.group).copied().unwrap_or_default();
            line.destroyed = line.destroyed.max(id.replica);
            if is_kept {
                (line.kept, line.revision) = (ReplicaId(0), 0);
            }
            self.put(id.group, line)?;
        }
        self.generation += 1;
        Ok(())
    }

    fn keep(&mut self, id: ReplicaIdentity, revision: u64) -> Result<(), StoreError> {
        let mut line = self.groups.get(&id.group).copied().unwrap_or_default();
        if line.kept == id.replica && line.revision >= revision {
            return Ok(());
        }
        (line.kept, line.revision) = (id.replica, revision);
        self.put(id.group, line)?;
        self.generation += 1;
        Ok(())
    }

    /// Puts a line; of the others those with the lowest id goes if there is no room. A replica that was taken back keeps
    /// its line for as long as it stands.
    fn put(&mut self, group: GroupId, line: Line) -> Result<(), StoreError> {
        if self.groups.len() == GROUPS_MAX && !self.groups.contains_key(&group) {
            let lines = self.groups.iter().filter(|(_, line)| line.kept == ReplicaId(0));
            let lowest = lines.min_by_key(|(_, line)| line.destroyed).map(|(group, line)| (*group, *line));
            let (oldest, gone) = lowest.ok_or_else(|| {
                StoreError::Failed("more replicas were taken back here than it can remember".into())
            })?;
            self.groups.remove(&oldest);
            self.floor = self.floor.max(gone.destroyed);
        }
        self.groups.insert(group, line);
        Ok(())
    }
}

impl Copied for Memory {
    fn decode(copy: &[u8]) -> Result<Self, DecodeError> {
        let mut input = Reader::new(SEAL.open(copy)?);
        let mut out = Self {
            cluster: ClusterId::decode(&mut input)?,
            store: StoreId::decode(&mut input)?,
            generation: input.u64()?,
            floor: ReplicaId::decode(&mut input)?,
            ..Self::default()
        };
        for _ in 0..input.count("groups", GROUPS_MAX)? {
            let group = GroupId::decode(&mut input)?;
            let (destroyed, kept) = (ReplicaId::decode(&mut input)?, ReplicaId::decode(&mut input)?);
            out.groups.insert(group, Line { destroyed, kept, revision: input.u64()? });
        }
        for _ in 0..input.count("members of the catalog", DRAWN_MAX)? {
            out.drawn.insert(ReplicaId::decode(&mut input)?);
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
        assert_eq!(again, Ok(found), "what was destroyed is written otherwise");
    }
}

/// The file. It is made when there is something to write.
pub struct DestroyedFile {
    file: TwinFile,
    memory: RefCell<Memory>,
    /// The generation that both copies have at least.
    written: Cell<u64>,
    is_unreadable: Cell<bool>,
    writing: Mutex<()>,
}

impl DestroyedFile {
    /// Opens a store's file; without one nothing was destroyed. One of another store is refused.
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
            written: Cell::new(0),
            is_unreadable: Cell::new(matches!(found, Found::Unreadable)),
            writing: Mutex::default(),
        };
        let Found::Newest(newest, is_whole) = found else { return Ok(opened) };
        opened.written.set(if is_whole { newest.generation } else { 0 });
        *opened.memory.borrow_mut() = newest;
        match opened.save().await {
            // It is tried again with the next change, which makes room.
            Err(error) if error.is_full() => Ok(opened),
            saved => saved.map(|()| opened),
        }
    }

    /// INV-TERM: whether this replica may be made here.
    pub fn may_make(&self, id: ReplicaIdentity) -> Result<(), Remembered> {
        if self.is_unreadable.get() {
            return Err(Remembered::Unreadable);
        }
        if self.memory.borrow().was_destroyed(id) {
            return Err(Remembered::Destroyed { replica: id.replica });
        }
        Ok(())
    }

    /// INV-MEMBER: whether this replica may be destroyed here, as was decided on this revision of its volume.
    pub fn may_destroy(&self, id: ReplicaIdentity, revision: u64) -> Result<(), Remembered> {
        let line = self.memory.borrow().groups.get(&id.group).copied().unwrap_or_default();
        if line.kept == id.replica && revision < line.revision {
            return Err(Remembered::Kept { replica: id.replica, kept: line.revision, decided: revision });
        }
        Ok(())
    }

    /// Notes that this replica is destroyed; durable, in both copies, when it returns. It cannot be made from the moment
    /// of the call on. Where only room is missing it may be tried again.
    pub async fn note_destroyed(&self, id: ReplicaIdentity) -> Result<(), StoreError> {
        if self.is_unreadable.get() {
            // Nothing is made here any more.
            return Ok(());
        }
        self.memory.borrow_mut().destroy(id)?;
        self.save().await
    }

    /// Notes that this replica was taken back on this revision of its volume; durable when it returns.
    pub async fn note_kept(&self, id: ReplicaIdentity, revision: u64) -> Result<(), StoreError> {
        if self.is_unreadable.get() {
            return Err(StoreError::Failed(Remembered::Unreadable.to_string()));
        }
        self.memory.borrow_mut().keep(id, revision)?;
        self.save().await
    }

    async fn save(&self) -> Result<(), StoreError> {
        let wanted = self.memory.borrow().generation;
        let _one_at_a_time = self.writing.lock().await;
        if self.written.get() >= wanted || planted("forget-destroyed") {
            return Ok(());
        }
        let (generation, bytes) = {
            let memory = self.memory.borrow();
            (memory.generation, memory.encode())
        };
        self.file.write(&bytes, if planted("destroyed-in-one-copy") { 1 } else { 2 }).await?;
        self.written.set(generation);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
