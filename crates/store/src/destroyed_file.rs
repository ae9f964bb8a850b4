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

use holdfast_env::disk::{AlignedBuffer, Directory, Durability, File, OpenMode};
use holdfast_types::{ClusterId, DecodeError, GroupId, Reader, ReplicaId, StoreId, Writer};
use tokio::sync::Mutex;

use crate::journal::planted;
use crate::sealed::Seal;
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
    directory: Rc<dyn Directory>,
    file: RefCell<Option<Rc<dyn File>>>,
    memory: RefCell<Memory>,
    /// The generation that both copies have at least.
    written: Cell<u64>,
    is_unreadable: Cell<bool>,
    writing: Mutex<()>,
}

fn wrap(error: std::io::Error) -> StoreError {
    StoreError::io(NAME, &error)
}

impl DestroyedFile {
    /// Opens a store's file; without one nothing was destroyed. One of another store is refused.
    pub async fn open(
        directory: Rc<dyn Directory>,
        cluster: ClusterId,
        store: StoreId,
    ) -> Result<Self, StoreError> {
        let is_there = directory.list(NAME).await.map_err(wrap)?.iter().any(|name| name == NAME);
        let opened = Self {
            directory,
            file: RefCell::default(),
            memory: RefCell::new(Memory { cluster, store, ..Memory::default() }),
            written: Cell::new(0),
            is_unreadable: Cell::new(false),
            writing: Mutex::default(),
        };
        if is_there {
            opened.load().await?;
        }
        Ok(opened)
    }

    async fn load(&self) -> Result<(), StoreError> {
        let file = self.directory.open(NAME, OpenMode::Existing).await.map_err(wrap)?;
        if file.size().await.map_err(wrap)?.length < 2 * COPY_BYTES as u64 {
            // Its making was interrupted: nothing was ever written to it, and nothing destroyed.
            return Ok(());
        }
        // A killed daemon may have left the newest generation in a cache.
        file.flush().await.map_err(|error| StoreError::flush(NAME, &error))?;
        let (mut copies, mut problem) = (Vec::new(), None);
        for copy in 0..2 {
            let read = file.read_at(copy * COPY_BYTES as u64, COPY_BYTES).await;
            match read.map_err(|error| error.to_string()) {
                Ok(bytes) if bytes.as_slice().iter().all(|byte| *byte == 0) => copies.push(None),
                Ok(bytes) => match Memory::decode(bytes.as_slice()) {
                    Ok(found) => copies.push(Some(found)),
                    Err(error) => problem = Some(error.to_string()),
                },
                Err(error) => problem = Some(error),
            }
        }
        if let Some(why) = problem {
            tracing::error!(file = NAME, %why, copies = copies.len(), "a copy of what was destroyed here is lost");
        }
        let expected = self.memory.borrow().clone();
        if let Some(other) = copies.iter().flatten().find(|found| found.store != expected.store) {
            let name = |memory: &Memory| format!("store {} of cluster {}", memory.store, memory.cluster);
            return Err(StoreError::Identity { expected: name(&expected), found: name(other) });
        }
        *self.file.borrow_mut() = Some(file);
        if copies.is_empty() {
            self.is_unreadable.set(true);
            return Ok(());
        }
        let is_whole = copies.len() == 2 && copies[0] == copies[1];
        let newest = copies.into_iter().flatten().max_by_key(|found| found.generation);
        let Some(newest) = newest else { return Ok(()) };
        self.written.set(if is_whole { newest.generation } else { 0 });
        *self.memory.borrow_mut() = newest;
        match self.save().await {
            // It is tried again with the next change, which makes room.
            Err(error) if error.is_full() => Ok(()),
            saved => saved,
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
        let file = self.made().await?;
        let copies = if planted("destroyed-in-one-copy") { 1 } else { 2 };
        for copy in 0..copies {
            let bytes = AlignedBuffer::copy_of(bytes.as_slice());
            file.write_at(copy * COPY_BYTES as u64, bytes, Durability::Durable).await.map_err(wrap)?;
        }
        self.written.set(generation);
        Ok(())
    }

    /// The file, with room for both copies, so that destroying needs none later.
    async fn made(&self) -> Result<Rc<dyn File>, StoreError> {
        let opened = self.file.borrow().clone();
        if let Some(file) = opened {
            return Ok(file);
        }
        // A try before this one may have found no room for it.
        let there = self.directory.open(NAME, OpenMode::Existing).await;
        let file = match there {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                self.directory.open(NAME, OpenMode::CreateNew).await.map_err(wrap)?
            }
            there => there.map_err(wrap)?,
        };
        file.allocate(0, 2 * COPY_BYTES as u64).await.map_err(wrap)?;
        file.set_length(2 * COPY_BYTES as u64).await.map_err(wrap)?;
        file.flush().await.map_err(|error| StoreError::flush(NAME, &error))?;
        self.directory.sync().await.map_err(|error| StoreError::flush(NAME, &error))?;
        *self.file.borrow_mut() = Some(file.clone());
        Ok(file)
    }
}

#[cfg(test)]
mod tests;
