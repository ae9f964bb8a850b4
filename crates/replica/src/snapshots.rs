//! What a replica tells of snapshots.
//!
//! Any replica may that has applied one and may serve (INV-STAGE): what it holds never changes, so no lease and no floor
//! is needed. That a snapshot does not exist only a leader with a quorum says; so does what the volume holds now.

use std::time::Duration;

use bytes::Bytes;
use holdfast_protocol::volume::Snapshot;
use holdfast_store::volume::{CheckedBlocks, ReadError, View};
use holdfast_types::{BlockRange, ChunkIndex, LogIndex, SnapshotId, limits};

use crate::messages::DataReply;
use crate::snapshot_messages::{EXTENTS_MAX, Extents, SnapshotRequest};
use crate::volume::{Volume, kind_number};

/// How long a question waits for what is applied.
const PATIENCE: Duration = Duration::from_millis(500);
/// Extents asked of the store at once: the chunk that reaches it may add one per block.
const EXTENTS_ASKED: usize = EXTENTS_MAX - holdfast_types::CHUNK_BLOCKS as usize;

type Answer = Result<(DataReply, Vec<Bytes>), DataReply>;

impl Volume {
    /// Answers a question about snapshots.
    pub(crate) async fn about_snapshot(&self, ask: SnapshotRequest) -> (DataReply, Vec<Bytes>) {
        let answer = match ask {
            SnapshotRequest::Read { snapshot, range } => self.read_snapshot(snapshot, range).await,
            SnapshotRequest::Status { snapshot, range } => self.snapshot_status(snapshot, range).await,
            SnapshotRequest::Diff { from, to, from_chunk } => self.diff(from, to, from_chunk).await,
        };
        answer.unwrap_or_else(|reply| (reply, Vec::new()))
    }

    /// A snapshot that this replica may serve; else what to answer.
    async fn served(&self, id: SnapshotId) -> Result<Snapshot, DataReply> {
        if self.log().is_hung() && !self.group().is_leader() {
            return Err(self.elsewhere("the disk of this store hangs"));
        }
        let position = self.group().position();
        if let Some(found) = self.living(id).filter(|found| position.has_reached(found.index)) {
            return Ok(found);
        }
        if !self.group().is_leader() {
            return Err(self.elsewhere("this replica does not know that snapshot yet"));
        }
        self.catch_up().await?;
        self.living(id).ok_or(DataReply::NoSnapshot)
    }

    /// As leader: everything that was committed before is applied here.
    async fn catch_up(&self) -> Result<(), DataReply> {
        let index = self.group().confirm_leadership().await.map_err(|error| self.group_error(error))?;
        let reached = holdfast_env::timeout(PATIENCE, self.group().position().reached(index)).await;
        reached.map_err(|_| self.elsewhere("the leader has not applied far enough yet"))
    }

    /// INV-STAGE: a rebuild that was switched in meanwhile shows what is not applied yet.
    fn still_serves(&self, index: LogIndex) -> Result<(), DataReply> {
        if self.group().position().has_reached(index) {
            return Ok(());
        }
        Err(self.elsewhere("this replica is being rebuilt"))
    }

    fn failed(&self, error: &ReadError) -> DataReply {
        match error {
            ReadError::NoSnapshot(_) => DataReply::NoSnapshot,
            other => self.read_failed(other),
        }
    }

    async fn read_snapshot(&self, id: SnapshotId, range: BlockRange) -> Answer {
        let snapshot = self.served(id).await?;
        check_range(&snapshot, range)?;
        let read = self.data().read_view(View::Snapshot(snapshot.index), range).await;
        let CheckedBlocks { data, checksums } = read.map_err(|error| self.failed(&error))?;
        self.still_serves(snapshot.index)?;
        let applied = self.group().position().applied_index();
        Ok((DataReply::Blocks { applied, checksums }, vec![data]))
    }

    async fn snapshot_status(&self, id: SnapshotId, range: BlockRange) -> Answer {
        let snapshot = self.served(id).await?;
        check_range(&snapshot, range)?;
        let runs = self.data().view_status(View::Snapshot(snapshot.index), range).await;
        let runs = runs.map_err(|error| self.failed(&error))?;
        self.still_serves(snapshot.index)?;
        let runs = runs.into_iter().map(|(count, kind)| (count, kind_number(kind))).collect();
        let applied = self.group().position().applied_index();
        Ok((DataReply::Status { applied, runs }, Vec::new()))
    }

    async fn diff(&self, from: Option<SnapshotId>, to: Option<SnapshotId>, from_chunk: u64) -> Answer {
        let (view, size, index) = match to {
            Some(id) => {
                let snapshot = self.served(id).await?;
                (View::Snapshot(snapshot.index), snapshot.size, snapshot.index)
            }
            None => {
                self.catch_up().await?;
                (View::Head, self.state().size(), self.group().position().applied_index())
            }
        };
        let from = match from {
            Some(id) => Some(self.served(id).await?.index),
            None => None,
        };
        if from.is_some_and(|from| from > index) {
            return Err(DataReply::Failed("the first of the two is newer than the second".into()));
        }
        let found = self.data().diff(from, view, ChunkIndex(from_chunk), EXTENTS_ASKED).await;
        let found = found.map_err(|error| self.failed(&error))?;
        self.still_serves(index)?;
        let mut extents: Vec<BlockRange> = Vec::with_capacity(found.extents.len());
        for extent in found.extents {
            // Data and zeros apart: here only that they differ counts.
            match extents.last_mut() {
                Some(last) if last.end() == extent.start => last.count += extent.count as u32,
                _ => extents.push(BlockRange::new(extent.start, extent.count as u32)),
            }
        }
        let applied = self.group().position().applied_index();
        let next_chunk = found.next.map(|chunk| chunk.0);
        let reply = Extents { extents, next_chunk, applied, blocks: size.blocks() };
        Ok((DataReply::Extents(Box::new(reply)), Vec::new()))
    }
}

/// Refuses what is beyond the snapshot or one answer.
fn check_range(snapshot: &Snapshot, range: BlockRange) -> Result<(), DataReply> {
    if range.count == 0 || range.count > limits::REQUEST_BLOCKS_MAX {
        let most = limits::REQUEST_BLOCKS_MAX;
        return Err(DataReply::Failed(format!("{} blocks, between 1 and {most} allowed", range.count)));
    }
    if range.end().0 > snapshot.size.blocks() {
        return Err(DataReply::Failed(format!("the snapshot has {} blocks", snapshot.size.blocks())));
    }
    Ok(())
}
