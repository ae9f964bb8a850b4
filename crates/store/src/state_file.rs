//! The checkpoint of a group that has no blocks (the catalog): one small file in two generations, each checksummed.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use bytes::Bytes;
use holdfast_env::disk::{AlignedBuffer, Directory, Durability, File, OpenMode};
use holdfast_types::{
    ClusterId, DecodeError, GroupId, LogIndex, Reader, ReplicaId, StoreId, Term, Writer, limits,
};

use crate::journal::planted;
use crate::sealed::Seal;
use crate::volume::Checkpoint;
use crate::{EntryId, ReplicaIdentity, StoreError};

const SEAL: Seal = Seal { magic: 0x6873_6166_7374_3031, version: 1, body_bytes_max: SLOT_BYTES };
/// Room for one generation: the largest state, its membership and the head.
const SLOT_BYTES: usize = limits::CATALOG_BYTES_MAX + (1 << 20);

/// Whose state it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateIdentity {
    /// The cluster.
    pub cluster: ClusterId,
    /// The store.
    pub store: StoreId,
    /// The replica.
    pub id: ReplicaIdentity,
}

impl StateIdentity {
    pub(crate) fn encode(&self, out: &mut Writer) {
        self.cluster.encode(out);
        self.store.encode(out);
        self.id.group.encode(out);
        self.id.replica.encode(out);
    }

    pub(crate) fn decode(input: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            cluster: ClusterId::decode(input)?,
            store: StoreId::decode(input)?,
            id: ReplicaIdentity { group: GroupId::decode(input)?, replica: ReplicaId::decode(input)? },
        })
    }
}

/// The file.
pub struct StateFile {
    file: Rc<dyn File>,
    name: String,
    identity: StateIdentity,
    generation: Cell<u64>,
    newest: RefCell<Option<Checkpoint>>,
}

fn encode(identity: &StateIdentity, generation: u64, checkpoint: &Checkpoint) -> AlignedBuffer {
    let mut out = Writer::new();
    identity.encode(&mut out);
    out.u64(generation);
    checkpoint.id.term.encode(&mut out);
    checkpoint.id.leader.encode(&mut out);
    checkpoint.id.index.encode(&mut out);
    checkpoint.serve_floor.encode(&mut out);
    out.bytes(&checkpoint.membership);
    out.bytes(&checkpoint.state);
    let body = out.finish();
    SEAL.close(&body)
}

fn decode(slot: &[u8]) -> Result<(StateIdentity, u64, Checkpoint), DecodeError> {
    let body = SEAL.open(slot)?;
    let input = &mut Reader::new(body);
    let identity = StateIdentity::decode(input)?;
    let generation = input.u64()?;
    let id = EntryId {
        term: Term::decode(input)?,
        leader: ReplicaId::decode(input)?,
        index: LogIndex::decode(input)?,
    };
    let serve_floor = LogIndex::decode(input)?;
    let membership = Bytes::copy_from_slice(input.bytes(SLOT_BYTES)?);
    let state = Bytes::copy_from_slice(input.bytes(SLOT_BYTES)?);
    Ok((identity, generation, Checkpoint { id, membership, state, serve_floor }))
}

/// For fuzzing: reads `body` as if the file held it; what is read is written as it was meant.
#[cfg(any(test, feature = "testing"))]
pub(crate) fn fuzz(body: &[u8]) {
    let whole = SEAL.close(body);
    if let Ok((identity, generation, checkpoint)) = decode(whole.as_slice()) {
        let again = decode(encode(&identity, generation, &checkpoint).as_slice());
        assert_eq!(again, Ok((identity, generation, checkpoint)), "a state is written otherwise");
    }
}

impl StateFile {
    /// Opens the file, or makes an empty one. A file of somebody else is refused; a damaged one, too, since what it
    /// held may have been acknowledged.
    pub async fn open(
        directory: &Rc<dyn Directory>,
        name: &str,
        identity: StateIdentity,
    ) -> Result<Self, StoreError> {
        let wrap = |error: std::io::Error| StoreError::io(name, &error);
        let found = directory.list(name).await.map_err(wrap)?.iter().any(|other| other == name);
        let mode = if found { OpenMode::Existing } else { OpenMode::CreateNew };
        let file = directory.open(name, mode).await.map_err(wrap)?;
        let state = Self {
            file,
            name: name.to_owned(),
            identity,
            generation: Cell::new(0),
            newest: RefCell::default(),
        };
        if !found || state.file.size().await.map_err(wrap)?.length < 2 * SLOT_BYTES as u64 {
            // Its making may have been interrupted: nothing was ever written to it then.
            state.file.set_length(2 * SLOT_BYTES as u64).await.map_err(wrap)?;
            state.file.flush().await.map_err(wrap)?;
            directory.sync().await.map_err(wrap)?;
            return Ok(state);
        }
        state.load().await?;
        Ok(state)
    }

    async fn load(&self) -> Result<(), StoreError> {
        // A killed daemon may have left the newest generation in a cache, and the log is purged by what it says.
        self.file.flush().await.map_err(|error| StoreError::io(&self.name, &error))?;
        let mut problem = None;
        for slot in 0..2u64 {
            let read = self.file.read_at(slot * SLOT_BYTES as u64, SLOT_BYTES).await;
            let bytes = read.map_err(|error| StoreError::io(&self.name, &error))?;
            if bytes.as_slice()[..4096].iter().all(|byte| *byte == 0) {
                continue;
            }
            match decode(bytes.as_slice()) {
                Ok((identity, _, _)) if identity != self.identity => {
                    return Err(StoreError::Identity {
                        expected: format!("{:?}", self.identity),
                        found: format!("{identity:?}"),
                    });
                }
                Ok((_, generation, checkpoint)) if generation > self.generation.get() => {
                    self.generation.set(generation);
                    *self.newest.borrow_mut() = Some(checkpoint);
                }
                Ok(_) => {}
                Err(error) => problem = Some(error),
            }
        }
        match problem {
            // One generation may be torn: it was being written when the power went.
            Some(error) if self.newest.borrow().is_none() && self.generation.get() == 0 => {
                tracing::warn!(file = self.name, %error, "the first checkpoint was not finished");
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// The last checkpoint.
    pub fn newest(&self) -> Option<Checkpoint> {
        self.newest.borrow().clone()
    }

    /// Replaces the checkpoint; durable when it returns. One writer at a time.
    pub async fn write(&self, checkpoint: Checkpoint) -> Result<(), StoreError> {
        let generation = self.generation.get() + 1;
        let bytes = encode(&self.identity, generation, &checkpoint);
        if bytes.len() > SLOT_BYTES {
            return Err(StoreError::Failed(format!("a state of {} bytes is beyond its bound", bytes.len())));
        }
        let slot = if planted("state-in-place") { 0 } else { generation % 2 };
        let offset = slot * SLOT_BYTES as u64;
        let written = self.file.write_at(offset, bytes, Durability::Durable).await;
        written.map_err(|error| StoreError::io(&self.name, &error))?;
        self.generation.set(generation);
        *self.newest.borrow_mut() = Some(checkpoint);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> StateIdentity {
        let id = ReplicaIdentity { group: GroupId::CATALOG, replica: ReplicaId(1) };
        StateIdentity { cluster: ClusterId(1), store: StoreId(2), id }
    }

    fn checkpoint(index: u64) -> Checkpoint {
        let id = EntryId { index: LogIndex(index), ..EntryId::default() };
        Checkpoint { id, state: Bytes::from(format!("state {index}")), ..Checkpoint::default() }
    }

    #[test]
    fn the_newest_whole_generation_counts() {
        let place = tempfile::tempdir().expect("a place");
        holdfast_env::real::run(async {
            let directory: Rc<dyn Directory> =
                holdfast_env::real::disk::RealDirectory::open(place.path()).expect("opens");
            let file = StateFile::open(&directory, "state", identity()).await.expect("opens");
            assert_eq!(file.newest(), None);
            for index in 1..=3 {
                file.write(checkpoint(index)).await.expect("writes");
            }
            let file = StateFile::open(&directory, "state", identity()).await.expect("opens");
            assert_eq!(file.newest(), Some(checkpoint(3)));
            // Generation 4 is torn over generation 2.
            let mut torn = AlignedBuffer::zeroed(4096);
            torn.as_mut_slice().fill(0xa5);
            file.file.write_at(0, torn, Durability::Durable).await.expect("writes");
            let file = StateFile::open(&directory, "state", identity()).await.expect("opens");
            assert_eq!(file.newest(), Some(checkpoint(3)));
            let other = StateIdentity { cluster: ClusterId(9), ..identity() };
            let refused = StateFile::open(&directory, "state", other).await.map(|_| ());
            assert!(matches!(refused, Err(StoreError::Identity { .. })), "{refused:?}");
        });
    }
}
