//! Counters of one replica since its daemon started: plain numbers on the shard's thread.

use std::cell::Cell;
use std::rc::Rc;

/// What a replica did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GroupUsage {
    /// Commands that were proposed here.
    pub proposals: u64,
    /// Appends sent to followers, those without entries included.
    pub appends_sent: u64,
    /// Entries in them.
    pub entries_sent: u64,
    /// Payload of entries that were committed before they were sent: what heals a follower by the log, in bytes.
    pub catch_up_bytes_sent: u64,
    /// Appends received.
    pub appends_received: u64,
    /// Entries in them.
    pub entries_received: u64,
    /// Entries applied.
    pub entries_applied: u64,
    /// Times that the log was purged.
    pub purges: u64,
    /// Times that this replica became leader.
    pub leaderships: u64,
    /// Times that it gave its leadership away because of the disk below it.
    pub leaderships_given: u64,
    /// Times that it began to rest.
    pub rests: u64,
    /// Times that it woke.
    pub wakes: u64,
    /// Writes that waited so that a rebuild could end.
    pub paced_writes: u64,
    /// Bytes received while being rebuilt by chunks.
    pub chunk_bytes_received: u64,
    /// Bytes sent to replicas that were being rebuilt by chunks.
    pub chunk_bytes_sent: u64,
}

/// The counters, shared by the parts of a replica.
#[derive(Clone, Debug, Default)]
pub(crate) struct Counters(Rc<Cell<GroupUsage>>);

impl Counters {
    pub(crate) fn count(&self, more: impl FnOnce(&mut GroupUsage)) {
        let mut usage = self.0.get();
        more(&mut usage);
        self.0.set(usage);
    }
    pub(crate) fn now(&self) -> GroupUsage {
        self.0.get()
    }
}
