//! What the processes that hold a volume counted.

use serde::{Deserialize, Serialize};

/// Counters of one process, or of several together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// Flushes of journals.
    pub journal_flushes: f64,
    /// How long they took, in seconds.
    pub flush_seconds: f64,
    /// Flushes of other files.
    pub other_flushes: f64,
    /// Bytes written to journals.
    pub journal_bytes: f64,
    /// Bytes written home.
    pub home_bytes: f64,
    /// Bytes of table pages and manifests.
    pub table_bytes: f64,
    /// Appends received from leaders.
    pub appends: f64,
    /// Entries in them.
    pub appended: f64,
    /// Bytes of blocks that are not home yet. Not a counter.
    pub dirty_bytes: f64,
}

impl Usage {
    /// Together.
    pub fn plus(self, other: Self) -> Self {
        Self {
            journal_flushes: self.journal_flushes + other.journal_flushes,
            flush_seconds: self.flush_seconds + other.flush_seconds,
            other_flushes: self.other_flushes + other.other_flushes,
            journal_bytes: self.journal_bytes + other.journal_bytes,
            home_bytes: self.home_bytes + other.home_bytes,
            table_bytes: self.table_bytes + other.table_bytes,
            appends: self.appends + other.appends,
            appended: self.appended + other.appended,
            dirty_bytes: self.dirty_bytes + other.dirty_bytes,
        }
    }
    /// Since `earlier`.
    pub fn since(self, earlier: Self) -> Self {
        Self {
            journal_flushes: self.journal_flushes - earlier.journal_flushes,
            flush_seconds: self.flush_seconds - earlier.flush_seconds,
            other_flushes: self.other_flushes - earlier.other_flushes,
            journal_bytes: self.journal_bytes - earlier.journal_bytes,
            home_bytes: self.home_bytes - earlier.home_bytes,
            table_bytes: self.table_bytes - earlier.table_bytes,
            appends: self.appends - earlier.appends,
            appended: self.appended - earlier.appended,
            dirty_bytes: self.dirty_bytes,
        }
    }
    /// Bytes written in all.
    pub fn written(&self) -> f64 {
        self.journal_bytes + self.home_bytes + self.table_bytes
    }
}
