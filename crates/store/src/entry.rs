//! What a group's log holds, and who a store is.

use bytes::Bytes;
use holdfast_types::{ClusterId, GroupId, LogIndex, NodeName, ReplicaId, StoreId, Term};

/// Identity of a log entry: a Raft log id. Order is by term, then leader, then index, as Raft compares logs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct EntryId {
    /// Term of the leader that made it.
    pub term: Term,
    /// That leader.
    pub leader: ReplicaId,
    /// Position in the log.
    pub index: LogIndex,
}

/// One entry of a group's log. The store does not look into it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LogEntry {
    /// Its identity.
    pub id: EntryId,
    /// What it is, for the layer above (blank, command, membership).
    pub kind: u8,
    /// The command without its payload; at most 16 KiB (`MAX_HEAD_BYTES`), membership included.
    pub head: Bytes,
    /// Block data: empty or a multiple of 4096 bytes, at most `limits::REQUEST_BYTES_MAX`.
    pub payload: Bytes,
}

/// An entry as far as it is known without a read of the disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EntryHead {
    /// Its identity.
    pub id: EntryId,
    /// What it is: see [`LogEntry::kind`].
    pub kind: u8,
    /// The command without its payload: see [`LogEntry::head`].
    pub head: Bytes,
    /// Bytes of its block data.
    pub payload_bytes: u32,
    /// The block data, if it is in memory; empty if it has none.
    pub payload: Option<Bytes>,
}

impl LogEntry {
    /// Bytes that the entry holds in memory, for bounds.
    pub fn bytes(&self) -> usize {
        self.head.len() + self.payload.len()
    }
}

/// Who a store is; in every header, so that a misplaced disk is refused.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StoreIdentity {
    /// The cluster that it belongs to.
    pub cluster: ClusterId,
    /// The node that it belongs to.
    pub node: NodeName,
    /// Itself.
    pub store: StoreId,
}

/// Who a group's replica on this store is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ReplicaIdentity {
    /// The group.
    pub group: GroupId,
    /// The replica.
    pub replica: ReplicaId,
}
