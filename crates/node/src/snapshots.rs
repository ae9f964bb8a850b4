//! Snapshots as users ask for them: made, listed, deleted, restored, compared and read, from any node.

use std::rc::Rc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use holdfast_catalog::volumes;
use holdfast_env::Instant;
use holdfast_protocol::catalog::{
    CatalogCommand, CatalogState, SnapshotPhase, SnapshotRecord, VolumePhase, VolumeRecord,
};
use holdfast_protocol::command::VolumeCommand;
use holdfast_protocol::volume::VolumeReply;
use holdfast_replica::messages::{DataReply, DataRequest};
use holdfast_replica::snapshot_messages::SnapshotRequest;
use holdfast_types::{
    BLOCK_BYTES, BlockIndex, BlockRange, CHUNK_BYTES, Epoch, ErrorCode, SnapshotId, StoreId, UserError,
    block_checksum, limits,
};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::admin::pb;
use crate::operations::PATIENCE;
use crate::shard::Shard;

/// How long a snapshot may take: longer than the catalog's member waits for the volume's log.
const CREATE_PATIENCE: Duration = Duration::from_secs(20);
/// Snapshots on one page of a list.
const PAGE_MAX: usize = 1000;
/// Between looks for a leader.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

fn invalid(message: impl Into<String>, hint: impl Into<String>) -> UserError {
    UserError::new(ErrorCode::InvalidArgument, message).hint(hint)
}

/// A moment as RFC 3339 in UTC; empty if it is beyond the calendar.
fn rfc3339(ms: u64) -> String {
    let moment = OffsetDateTime::from_unix_timestamp_nanos(i128::from(ms) * 1_000_000);
    moment.ok().and_then(|moment| moment.format(&Rfc3339).ok()).unwrap_or_default()
}

pub(crate) fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or_default()
}

fn view(state: &CatalogState, record: &SnapshotRecord) -> pb::Snapshot {
    let volume = state.volumes.get(&record.volume).map(|volume| volume.spec.name.clone());
    pb::Snapshot {
        id: record.id.to_string(),
        name: record.name.clone(),
        volume: volume.unwrap_or_default(),
        volume_id: record.volume.to_string(),
        size_bytes: record.size.0,
        created: rfc3339(record.created_ms),
        index: record.index.0,
        ready: record.phase == SnapshotPhase::Ready,
        state: match record.phase {
            SnapshotPhase::Creating => "creating",
            SnapshotPhase::Ready => "ready",
            SnapshotPhase::Deleting => "deleting",
        }
        .into(),
        key: record.key.clone(),
        copy: record.copy.map(|copy| copy.to_string()).unwrap_or_default(),
    }
}

/// A snapshot that can be read, and its volume.
pub(crate) fn readable<'s>(
    state: &'s CatalogState,
    text: &str,
) -> Result<(&'s SnapshotRecord, &'s VolumeRecord), UserError> {
    let record = state.get_snapshot(text)?;
    if record.phase != SnapshotPhase::Ready {
        return Err(UserError::new(ErrorCode::Unavailable, format!("snapshot {text} is not ready yet"))
            .hint("ask again in a moment"));
    }
    let gone = || UserError::new(ErrorCode::NotFound, format!("the volume of snapshot {text} is gone"));
    Ok((record, state.volumes.get(&record.volume).ok_or_else(gone)?))
}

/// The two ends of a comparison: what each names in the volume's log, and the volume.
type Ends<'s> = (Option<SnapshotId>, Option<SnapshotId>, &'s VolumeRecord);

fn ends<'s>(state: &'s CatalogState, from: &str, to: &str) -> Result<Ends<'s>, UserError> {
    // What is no snapshot is a volume: what that holds now.
    let newer = if to.contains('@') || state.find_snapshot(to).is_some() {
        let (record, volume) = readable(state, to)?;
        (Some(record), volume)
    } else {
        (None, state.get(to)?)
    };
    let (to_record, volume) = newer;
    if from.is_empty() {
        return Ok((None, to_record.map(|record| record.id), volume));
    }
    let (from_record, of) = readable(state, from)?;
    if of.id != volume.id {
        let message = format!("{from} and {to} are of different volumes");
        return Err(invalid(message, "compare two snapshots of one volume, or one with its volume"));
    }
    if to_record.is_some_and(|to| to.index < from_record.index) {
        return Err(invalid(format!("{from} is newer than {to}"), "name the older one first"));
    }
    Ok((Some(from_record.id), to_record.map(|record| record.id), volume))
}

/// Whole blocks, not too many.
fn block_range(offset: u64, length: u32) -> Result<BlockRange, UserError> {
    let whole = offset.is_multiple_of(BLOCK_BYTES as u64) && (length as usize).is_multiple_of(BLOCK_BYTES);
    if !whole || length == 0 || length as usize > limits::REQUEST_BYTES_MAX {
        let message = format!("{length} bytes at {offset} are no range of a read");
        return Err(invalid(message, "read whole blocks of 4096 bytes, at most 1 MiB at once"));
    }
    let count = length / BLOCK_BYTES as u32;
    Ok(BlockRange::new(BlockIndex(offset / BLOCK_BYTES as u64), count))
}

/// Whether a replica's answer is the range that was asked for, undamaged.
pub(crate) fn is_whole(range: BlockRange, checksums: &[u32], data: &[u8]) -> bool {
    let blocks = range.blocks().zip(data.chunks_exact(BLOCK_BYTES));
    data.len() as u64 == range.bytes()
        && checksums.len() == range.count as usize
        && blocks.zip(checksums).all(|((block, data), sum)| block_checksum(block, data) == *sum)
}

pub(crate) fn unexpected(reply: DataReply) -> UserError {
    match reply {
        DataReply::NoSnapshot => UserError::new(ErrorCode::NotFound, "the snapshot was deleted meanwhile")
            .hint("`holdfast snapshot list` shows those that are there"),
        DataReply::Failed(why) => UserError::new(ErrorCode::Internal, why),
        other => UserError::new(ErrorCode::Internal, format!("a replica answered {other:?}")),
    }
}

impl Shard {
    /// Makes a snapshot. A volume that is attached goes on; what was acknowledged before is in it.
    pub(crate) async fn create_snapshot(
        self: Rc<Self>,
        request: pb::CreateSnapshotRequest,
    ) -> Result<pb::Snapshot, UserError> {
        limits::check_name("snapshot", &request.name)?;
        let created_ms = now_ms();
        let pb::CreateSnapshotRequest { volume, name, key } = request;
        let record = self.catalog.create_snapshot(&volume, &name, &key, created_ms, CREATE_PATIENCE).await?;
        Ok(view(&self.catalog.state(PATIENCE).await?, &record))
    }

    pub(crate) async fn snapshot(self: Rc<Self>, name: String) -> Result<pb::Snapshot, UserError> {
        let state = self.catalog.state(PATIENCE).await?;
        Ok(view(&state, state.get_snapshot(&name)?))
    }

    pub(crate) async fn snapshots(
        self: Rc<Self>,
        request: pb::ListSnapshotsRequest,
    ) -> Result<pb::ListSnapshotsReply, UserError> {
        let state = self.catalog.state(PATIENCE).await?;
        let volume = if request.volume.is_empty() { None } else { Some(state.get(&request.volume)?.id) };
        let after: Option<SnapshotId> = match request.token.as_str() {
            "" => None,
            token => Some(token.parse().map_err(|_| {
                invalid(format!("'{token}' is no token of a list"), "begin the list anew, without a token")
            })?),
        };
        let mut rest = state
            .snapshots
            .values()
            .filter(|record| volume.is_none_or(|volume| record.volume == volume))
            .filter(|record| request.key.is_empty() || record.key == request.key)
            .filter(|record| after.is_none_or(|after| record.id > after))
            .peekable();
        let max = if request.max == 0 { PAGE_MAX } else { (request.max as usize).min(PAGE_MAX) };
        let page: Vec<&SnapshotRecord> = rest.by_ref().take(max).collect();
        let more = rest.peek().is_some();
        let next_token = page.last().filter(|_| more).map(|last| last.id.to_string()).unwrap_or_default();
        let snapshots = page.into_iter().map(|record| view(&state, record)).collect();
        Ok(pb::ListSnapshotsReply { snapshots, next_token })
    }

    /// Deletes a snapshot; false if there was none. It need not wait for its volume: the reconciler finishes it.
    pub(crate) async fn delete_snapshot(self: Rc<Self>, name: String) -> Result<bool, UserError> {
        let state = self.catalog.state(PATIENCE).await?;
        let Some(record) = state.find_snapshot(&name) else { return Ok(false) };
        self.catalog.apply(CatalogCommand::DeleteSnapshot { id: record.id }, PATIENCE).await?;
        if let Err(error) = self.catalog.settle_snapshot(record.id, CREATE_PATIENCE).await {
            tracing::info!(snapshot = name, %error, "the reconciler finishes a deletion later");
        }
        Ok(true)
    }

    /// INV-RESTORE: in the epoch in which the volume was seen to be held by nobody.
    pub(crate) async fn restore_snapshot(self: Rc<Self>, name: String) -> Result<pb::Volume, UserError> {
        let state = self.catalog.state(PATIENCE).await?;
        let (snapshot, volume) = readable(&state, &name)?;
        let epoch = self.epoch_of_nobody(volume).await?;
        let command = VolumeCommand::RestoreSnapshot { id: snapshot.id, epoch };
        let restored = volumes::control(&self.rpc, volume.group, &volume.stores(), &command, PATIENCE).await;
        match restored {
            Ok(VolumeReply::Done { .. }) => Ok(self.show(volume).await),
            Ok(other) => {
                Err(UserError::new(ErrorCode::Internal, format!("a restore was answered {other:?}")))
            }
            Err(error) => {
                let volume = &volume.spec.name;
                Err(error.hint(format!(
                    "`holdfast snapshot list {volume}` and `holdfast volume show {volume}` tell more"
                )))
            }
        }
    }

    /// The epoch of a volume that nobody holds, from a leader with a quorum.
    async fn epoch_of_nobody(&self, record: &VolumeRecord) -> Result<Epoch, UserError> {
        let name = &record.spec.name;
        let until = Instant::now() + PATIENCE;
        loop {
            let reports = volumes::replica_reports(&self.rpc, record).await;
            match volumes::leader_of(&reports) {
                Some((_, leader)) if leader.holder.is_empty() => return Ok(leader.epoch),
                Some((_, leader)) => {
                    let message = format!("volume {name} is attached to node {}", leader.holder);
                    return Err(UserError::new(ErrorCode::Refused, message)
                        .hint(format!("`holdfast volume detach {name}` first")));
                }
                None if Instant::now() >= until => {
                    let message = format!("volume {name} has no leader now");
                    return Err(UserError::new(ErrorCode::Unavailable, message)
                        .hint("`holdfast volume show` tells which replicas answer"));
                }
                None => holdfast_env::sleep(RETRY_PAUSE).await,
            }
        }
    }

    /// The stores of a volume's replicas, this node's own first.
    fn nearest(&self, record: &VolumeRecord) -> Vec<StoreId> {
        let mut stores = record.stores();
        self.nearest_first(&mut stores);
        stores
    }

    pub(crate) async fn diff_snapshots(
        self: Rc<Self>,
        request: pb::DiffSnapshotsRequest,
    ) -> Result<pb::DiffSnapshotsReply, UserError> {
        let state = self.catalog.state(PATIENCE).await?;
        let (from, to, volume) = ends(&state, &request.from, &request.to)?;
        if volume.phase != VolumePhase::Ready || !request.offset.is_multiple_of(CHUNK_BYTES) {
            return Err(invalid(
                format!("a comparison cannot begin at {}", request.offset),
                "begin at 0, or with the next_offset of the page before",
            ));
        }
        let ask = SnapshotRequest::Diff { from, to, from_chunk: request.offset / CHUNK_BYTES };
        let ask = DataRequest::Snapshot { group: volume.group, ask };
        let (reply, _) = volumes::ask_any(&self.rpc, &self.nearest(volume), &ask, PATIENCE).await?;
        let DataReply::Extents(found) = reply else { return Err(unexpected(reply)) };
        let bytes = |blocks: u64| blocks * BLOCK_BYTES as u64;
        let extents = found
            .extents
            .iter()
            .map(|extent| pb::Extent { offset: bytes(extent.start.0), length: bytes(extent.count.into()) });
        Ok(pb::DiffSnapshotsReply {
            extents: extents.collect(),
            next_offset: found.next_chunk.map_or(0, |chunk| chunk * CHUNK_BYTES),
            size_bytes: bytes(found.blocks),
        })
    }

    pub(crate) async fn read_snapshot(
        self: Rc<Self>,
        request: pb::ReadSnapshotRequest,
    ) -> Result<pb::ReadSnapshotReply, UserError> {
        let range = block_range(request.offset, request.length)?;
        let state = self.catalog.state(PATIENCE).await?;
        let (snapshot, volume) = readable(&state, &request.snapshot)?;
        if range.end().0 > snapshot.size.blocks() {
            let message = format!("snapshot {} has {}", request.snapshot, snapshot.size);
            return Err(UserError::new(ErrorCode::OutOfRange, message).hint("read within it"));
        }
        let ask = SnapshotRequest::Read { snapshot: snapshot.id, range };
        let ask = DataRequest::Snapshot { group: volume.group, ask };
        let (reply, data) = volumes::ask_any(&self.rpc, &self.nearest(volume), &ask, PATIENCE).await?;
        match reply {
            DataReply::Blocks { checksums, .. } if is_whole(range, &checksums, &data) => {
                Ok(pb::ReadSnapshotReply { data: data.to_vec() })
            }
            DataReply::Blocks { .. } => {
                Err(UserError::new(ErrorCode::Unavailable, "what a replica sent was damaged on its way")
                    .hint("ask again"))
            }
            other => Err(unexpected(other)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_told_in_utc() {
        assert_eq!(rfc3339(1_764_078_123_456), "2025-11-25T13:42:03.456Z");
        assert_eq!(rfc3339(u64::MAX), "");
    }

    #[test]
    fn ranges_are_whole_blocks_and_bounded() {
        assert!(block_range(8192, 4096).is_ok());
        for (offset, length) in [(1, 4096), (0, 0), (0, 4095), (0, (1 << 20) + 4096)] {
            assert!(block_range(offset, length).is_err(), "{length} at {offset}");
        }
    }
}
