//! What a witness has on a store besides its log: who it is, and the fencing state as of its last checkpoint. A small file
//! in two generations, each checksummed; there is no home file and no table.
//!
//! The log is purged by what it says (INV-WITNESS), so a generation is durable before anything is purged.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use bytes::Bytes;
use holdfast_env::disk::{ALIGNMENT, AlignedBuffer, Directory, Durability, File, OpenMode};
use holdfast_types::{DecodeError, LogIndex, Reader, Writer};

use crate::journal::planted;
use crate::sealed::Seal;
use crate::volume::manifest::{ReplicaFileIdentity, get_checkpoint, put_checkpoint};
use crate::volume::{Checkpoint, prefix_of};
use crate::{ReplicaIdentity, StoreError};

const SEAL: Seal = Seal { magic: 0x6873_6166_7769_3031, version: 1, body_bytes_max: SLOT_BYTES };
/// Room for one generation, in bytes: the largest state, and a specification.
const SLOT_BYTES: usize = 512 << 10;
/// Largest specification, in bytes.
const SPEC_BYTES_MAX: usize = 64 << 10;

/// What the file says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WitnessManifest {
    /// Whose file.
    pub identity: ReplicaFileIdentity,
    /// The volume's specification as JSON, so that a disk describes itself.
    pub spec_json: Bytes,
    /// The fencing state, and the entry that it is as of.
    pub checkpoint: Checkpoint,
    /// Every data voter is known to have everything up to here, durably and committed. What the checkpoint covers beyond
    /// it may be gone from all logs but one.
    pub everywhere: LogIndex,
    /// Counts up with every write.
    pub generation: u64,
}

impl WitnessManifest {
    fn encode(&self) -> AlignedBuffer {
        let mut out = Writer::new();
        self.identity.encode(&mut out);
        out.u64(self.generation);
        self.everywhere.encode(&mut out);
        out.bytes(&self.spec_json);
        put_checkpoint(&mut out, &self.checkpoint);
        let body = out.finish();
        SEAL.close(&body)
    }

    fn decode(slot: &[u8]) -> Result<Self, DecodeError> {
        let body = SEAL.open(slot)?;
        let input = &mut Reader::new(body);
        let identity = ReplicaFileIdentity::decode(input)?;
        let generation = input.u64()?;
        let everywhere = LogIndex::decode(input)?;
        let spec_json = Bytes::copy_from_slice(input.bytes(SPEC_BYTES_MAX)?);
        let checkpoint = get_checkpoint(input)?;
        input.clone().end()?;
        Ok(Self { identity, spec_json, checkpoint, everywhere, generation })
    }
}

/// For fuzzing: reads `body` as if the file held it; what is read is written as it was meant.
#[cfg(any(test, feature = "testing"))]
pub(crate) fn fuzz(body: &[u8]) {
    let whole = SEAL.close(body);
    if let Ok(found) = WitnessManifest::decode(whole.as_slice()) {
        let again = WitnessManifest::decode(found.encode().as_slice());
        assert_eq!(again, Ok(found), "a witness's file is written otherwise");
    }
}

fn name_of(id: ReplicaIdentity) -> String {
    format!("{}/witness", prefix_of(id))
}

/// The file.
pub struct WitnessFile {
    file: Rc<dyn File>,
    name: String,
    now: RefCell<WitnessManifest>,
    /// Room that was taken in each slot since the file was opened, in bytes.
    taken: [Cell<usize>; 2],
}

impl WitnessFile {
    /// Makes a witness's file; durable when it returns. One that a crash left behind unfinished is made anew.
    pub async fn create(
        directory: &Rc<dyn Directory>,
        identity: ReplicaFileIdentity,
        spec_json: Bytes,
        initial: Checkpoint,
    ) -> Result<Self, StoreError> {
        let name = name_of(identity.id);
        let wrap = |error: std::io::Error| StoreError::io(&name, &error);
        directory.remove(&name).await.map_err(wrap)?;
        let file = directory.open(&name, OpenMode::CreateNew).await.map_err(wrap)?;
        file.set_length(2 * SLOT_BYTES as u64).await.map_err(wrap)?;
        let first = WitnessManifest {
            identity,
            spec_json,
            checkpoint: initial,
            everywhere: LogIndex::ZERO,
            generation: 0,
        };
        let made = Self { file, name, now: RefCell::new(first.clone()), taken: Default::default() };
        made.write(first.checkpoint, first.everywhere).await?;
        directory.sync().await.map_err(|error| StoreError::flush(&made.name, &error))?;
        Ok(made)
    }

    /// Opens the file of a witness. One of somebody else is refused.
    pub async fn open(
        directory: &Rc<dyn Directory>,
        expected: &ReplicaFileIdentity,
    ) -> Result<Self, StoreError> {
        let (file, now) = Self::read(directory, name_of(expected.id)).await?;
        if now.identity != *expected {
            return Err(StoreError::Identity {
                expected: format!("{expected:?}"),
                found: format!("{:?}", now.identity),
            });
        }
        let name = name_of(expected.id);
        Ok(Self { file, name, now: RefCell::new(now), taken: Default::default() })
    }

    /// The newest generation that is whole. On stable storage when it returns: a killed daemon may have left it in a
    /// cache, and the log is purged by what it says.
    async fn read(
        directory: &Rc<dyn Directory>,
        name: String,
    ) -> Result<(Rc<dyn File>, WitnessManifest), StoreError> {
        let wrap = |error: std::io::Error| StoreError::io(&name, &error);
        let file = directory.open(&name, OpenMode::Existing).await.map_err(wrap)?;
        file.flush().await.map_err(|error| StoreError::flush(&name, &error))?;
        let (mut newest, mut problem) = (None::<WitnessManifest>, DecodeError::Short { missing: 0 });
        for slot in 0..2 {
            let read = match file.read_at(slot * SLOT_BYTES as u64, SLOT_BYTES).await {
                Ok(bytes) => WitnessManifest::decode(bytes.as_slice()),
                Err(error) => {
                    tracing::warn!(%name, %error, "a generation of a witness's file cannot be read");
                    continue;
                }
            };
            match read {
                Ok(found) if newest.as_ref().is_none_or(|newest| newest.generation < found.generation) => {
                    newest = Some(found);
                }
                Ok(_) => {}
                Err(error) => problem = error,
            }
        }
        let newest = newest.ok_or_else(|| StoreError::damaged(&name, &problem))?;
        Ok((file, newest))
    }

    /// Every witness of a store; one whose file cannot be read is reported and left alone.
    pub async fn list(directory: &Rc<dyn Directory>) -> Result<Vec<WitnessManifest>, StoreError> {
        let names = directory.list("replicas/").await.map_err(|error| StoreError::io("replicas", &error))?;
        let mut out = Vec::new();
        for name in names.into_iter().filter(|name| name.ends_with("/witness")) {
            match Self::read(directory, name.clone()).await {
                Ok((_, manifest)) => out.push(manifest),
                Err(error) => {
                    tracing::error!(%name, %error, "a witness's file cannot be read; it is left alone");
                }
            }
        }
        Ok(out)
    }

    /// Removes a witness's file, and what stands beside it. Removing it again is fine.
    pub async fn destroy(directory: &Rc<dyn Directory>, id: ReplicaIdentity) -> Result<(), StoreError> {
        let prefix = prefix_of(id);
        let wrap = |error: std::io::Error| StoreError::io(&prefix, &error);
        directory.remove(&name_of(id)).await.map_err(wrap)?;
        for name in directory.list(&format!("{prefix}/")).await.map_err(wrap)? {
            directory.remove(&name).await.map_err(wrap)?;
        }
        directory.sync().await.map_err(|error| StoreError::flush(&prefix, &error))
    }

    /// What it says.
    pub fn newest(&self) -> WitnessManifest {
        self.now.borrow().clone()
    }

    /// Replaces the checkpoint; durable when it returns. One writer at a time.
    pub async fn write(&self, checkpoint: Checkpoint, everywhere: LogIndex) -> Result<(), StoreError> {
        let before = self.newest();
        let generation = before.generation + 1;
        let next = WitnessManifest { checkpoint, everywhere, generation, ..before };
        let bytes = next.encode();
        if bytes.len() > SLOT_BYTES {
            let bytes = bytes.len();
            return Err(StoreError::Failed(format!(
                "a witness's state of {bytes} bytes is beyond its bound"
            )));
        }
        let slot = if planted("state-in-place") { 0 } else { generation % 2 };
        self.take_room(slot, bytes.len()).await?;
        let written = self.file.write_at(slot * SLOT_BYTES as u64, bytes, Durability::Durable).await;
        written.map_err(|error| StoreError::io(&self.name, &error))?;
        *self.now.borrow_mut() = next;
        Ok(())
    }

    /// A generation that finds no room leaves the one before it as it is.
    async fn take_room(&self, slot: u64, bytes: usize) -> Result<(), StoreError> {
        let wanted = bytes.next_multiple_of(ALIGNMENT).min(SLOT_BYTES);
        let taken = &self.taken[slot as usize];
        if taken.get() < wanted {
            let allocated = self.file.allocate(slot * SLOT_BYTES as u64, wanted as u64).await;
            allocated.map_err(|error| StoreError::io(&self.name, &error))?;
            taken.set(wanted);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use holdfast_types::{ClusterId, GroupId, NodeName, ReplicaId, StoreId, VolumeId};

    use super::*;
    use crate::EntryId;
    use crate::testing::{MemoryDisk, Tear, simulate};

    fn identity(replica: u64) -> ReplicaFileIdentity {
        ReplicaFileIdentity {
            cluster: ClusterId(1),
            store: StoreId(2),
            node: NodeName::new("w"),
            volume: VolumeId(3),
            id: ReplicaIdentity { group: GroupId(4), replica: ReplicaId(replica) },
            incarnation: 1,
        }
    }

    fn checkpoint(index: u64) -> Checkpoint {
        let id = EntryId { index: LogIndex(index), ..EntryId::default() };
        Checkpoint { id, state: Bytes::from(format!("state {index}")), ..Checkpoint::default() }
    }

    async fn create(directory: &Rc<dyn Directory>) -> WitnessFile {
        let spec = Bytes::from_static(b"{}");
        WitnessFile::create(directory, identity(5), spec, checkpoint(0)).await.expect("is made")
    }

    #[test]
    fn the_newest_whole_generation_counts_whenever_the_power_goes() {
        for seed in 0..40 {
            let disk = MemoryDisk::new(seed);
            let acknowledged = Rc::new(Cell::new(0));
            let (noted, writing) = (acknowledged.clone(), disk.clone());
            simulate(seed, async move {
                let file = create(&writing.directory()).await;
                for index in 1..=3 {
                    file.write(checkpoint(index), LogIndex(index - 1)).await.expect("writes");
                    noted.set(index);
                }
                // The fourth is on its way when the power goes.
                let mut fourth = Box::pin(file.write(checkpoint(4), LogIndex(4)));
                assert!(futures_util::poll!(fourth.as_mut()).is_pending());
            });
            disk.power_cut(if seed % 2 == 0 { Tear::Nothing } else { Tear::Random(seed) });
            let directory = disk.directory();
            simulate(seed, async move {
                let found = WitnessFile::list(&directory).await.expect("lists");
                let index = found[0].checkpoint.id.index.0;
                assert!(index == 3 || index == 4, "{index}");
                assert_eq!(found[0].checkpoint, checkpoint(index));
                assert_eq!(found[0].everywhere.0, if index == 3 { 2 } else { 4 });
                assert_eq!((found.len(), found[0].identity.clone()), (1, identity(5)));
                let opened = WitnessFile::open(&directory, &identity(5)).await.expect("opens");
                assert_eq!(opened.newest(), found[0]);
            });
            assert_eq!(acknowledged.get(), 3);
        }
    }

    #[test]
    fn the_file_of_another_is_refused_and_one_that_is_gone_is_gone() {
        let disk = MemoryDisk::new(1);
        simulate(1, async move {
            let directory = disk.directory();
            create(&directory).await;
            let other = ReplicaFileIdentity { volume: VolumeId(9), ..identity(5) };
            let refused = WitnessFile::open(&directory, &other).await.map(drop);
            assert!(matches!(refused, Err(StoreError::Identity { .. })), "{refused:?}");
            for _ in 0..2 {
                WitnessFile::destroy(&directory, identity(5).id).await.expect("is removed");
                assert_eq!(WitnessFile::list(&directory).await.expect("lists"), []);
            }
        });
    }

    /// The bytes, as docs/FORMAT.md has them: a generation of this version is read for ever.
    #[test]
    fn a_generation_of_this_format_is_read() {
        let golden = include_bytes!("../tests/golden/witness-1");
        let expected = WitnessManifest {
            identity: identity(5),
            spec_json: Bytes::from_static(b"{}"),
            checkpoint: checkpoint(7),
            everywhere: LogIndex(6),
            generation: 2,
        };
        let bytes = expected.encode();
        let end = bytes.as_slice().iter().rposition(|byte| *byte != 0).expect("is not empty") + 1;
        if std::env::var_os("HOLDFAST_WRITE_GOLDEN").is_some() {
            let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/witness-1");
            std::fs::write(path, &bytes.as_slice()[..end]).expect("writes");
        }
        assert_eq!(&bytes.as_slice()[..end], golden, "the format has changed: raise its version");
        let mut slot = golden.to_vec();
        slot.resize(4096, 0);
        assert_eq!(WitnessManifest::decode(&slot), Ok(expected));
    }
}
