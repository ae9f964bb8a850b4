//! The blocks of a replica over a log in memory, all of it flushed.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;
use holdfast_env::disk::Directory;
use holdfast_env::real::disk::RealDirectory;
use holdfast_store::volume::{Checkpoint, CheckpointSource, PayloadSource, ReplicaFileIdentity, VolumeData};
use holdfast_store::{EntryId, ReplicaIdentity, StoreError};
use holdfast_types::{
    BLOCK_BYTES, BlockRange, ByteSize, ClusterId, GroupId, LogIndex, NodeName, ReplicaId, StoreId, VolumeId,
    block_checksum,
};

pub const SIZE: ByteSize = ByteSize(1 << 20);

/// Payloads by index.
#[derive(Default)]
pub struct Log(RefCell<BTreeMap<u64, Bytes>>);

impl PayloadSource for Log {
    fn flushed(&self) -> LogIndex {
        LogIndex(u64::MAX)
    }
    fn read_payload(
        &self,
        index: LogIndex,
        block: u32,
        blocks: u32,
    ) -> LocalBoxFuture<'static, Result<Bytes, StoreError>> {
        let found = self.0.borrow().get(&index.0).cloned();
        let (from, bytes) = (block as usize * BLOCK_BYTES, blocks as usize * BLOCK_BYTES);
        let found = found.map(|whole| whole.slice(from..from + bytes));
        Box::pin(async move { found.ok_or_else(|| StoreError::Failed("no such entry".into())) })
    }
    fn keep_committed(&self, _: LogIndex) -> LocalBoxFuture<'static, Result<(), StoreError>> {
        Box::pin(async { Ok(()) })
    }
}

/// The state at an index, which is applied and durable.
pub struct At(pub u64);

impl CheckpointSource for At {
    fn capture(&self) -> Checkpoint {
        checkpoint(self.0)
    }
}

pub fn checkpoint(index: u64) -> Checkpoint {
    Checkpoint { id: EntryId { index: LogIndex(index), ..EntryId::default() }, ..Checkpoint::default() }
}

/// Applies entry `index`, which fills blocks with a byte.
pub fn write(data: &VolumeData, log: &Log, index: u64, range: BlockRange, fill: u8) {
    let payload = Bytes::from(vec![fill; range.bytes() as usize]);
    let blocks = range.blocks().zip(payload.chunks_exact(BLOCK_BYTES));
    let sums: Vec<u32> = blocks.map(|(block, data)| block_checksum(block, data)).collect();
    log.0.borrow_mut().insert(index, payload);
    data.apply_write(LogIndex(index), range, &sums);
}

fn identity() -> ReplicaFileIdentity {
    ReplicaFileIdentity {
        cluster: ClusterId(1),
        store: StoreId(1),
        node: NodeName::new("n"),
        volume: VolumeId(1),
        id: ReplicaIdentity { group: GroupId(1), replica: ReplicaId(1) },
        incarnation: 1,
    }
}

pub async fn replica(place: &Path, log: &Rc<Log>) -> VolumeData {
    replica_in(RealDirectory::open(place).expect("opens"), log).await
}

pub async fn replica_in(directory: Rc<dyn Directory>, log: &Rc<Log>) -> VolumeData {
    // Longer than a sector, so that a manifest can be torn.
    let spec = Bytes::from(vec![b' '; 3000]);
    let data = VolumeData::create(directory, identity(), spec, checkpoint(0), log.clone()).await;
    let data = data.expect("creates");
    data.set_size(SIZE);
    data
}

/// Opens what was made; the blocks are as of the checkpoint.
pub async fn reopened(directory: Rc<dyn Directory>, log: &Rc<Log>) -> Result<VolumeData, StoreError> {
    let data = VolumeData::open(directory, &identity(), log.clone()).await?;
    data.set_size(SIZE);
    Ok(data)
}
