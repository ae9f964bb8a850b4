//! What a replica tells of snapshots. Any replica that has applied one may: it never changes.

use bytes::Bytes;

use crate::messages::DataReply;
use crate::snapshot_messages::SnapshotRequest;
use crate::volume::{SNAPSHOTS_NOT_BUILT, Volume};

impl Volume {
    /// Answers a question about snapshots.
    pub(crate) async fn about_snapshot(&self, _ask: SnapshotRequest) -> (DataReply, Vec<Bytes>) {
        (DataReply::Failed(SNAPSHOTS_NOT_BUILT.into()), Vec::new())
    }
}
