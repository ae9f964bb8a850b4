//! What goes wrong in a store.

use std::io;

use holdfast_types::{ByteSize, DecodeError};

/// An error of a store. Cloneable, since one failure answers many waiters.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The medium or the file system refuses. After a failed write or flush the store has stopped for good: restart
    /// the daemon, and replace the disk if it happens again.
    #[error("{what}: {cause}")]
    Io {
        /// What was tried, with the file's name.
        what: String,
        /// The cause.
        cause: String,
        /// Whether the medium is full.
        full: bool,
    },
    /// What is on the disk belongs to somebody else.
    #[error("this directory belongs to {found}, not to {expected}: is the right disk mounted here?")]
    Identity {
        /// Who was expected.
        expected: String,
        /// Whose it is.
        found: String,
    },
    /// There is no store here, or its making was interrupted.
    #[error("there is no finished store here: {0}")]
    NotFormatted(String),
    /// Something on the disk is damaged.
    #[error("{what} is damaged: {why}")]
    Damaged {
        /// What.
        what: String,
        /// How.
        why: String,
    },
    /// The store may take less than it needs to work.
    #[error(
        "a store cannot do with {}: with its journal, and as much kept back, it needs {} ({least} bytes)",
        ByteSize(*.asked), ByteSize(*.least)
    )]
    Capacity {
        /// What it may take.
        asked: u64,
        /// What it needs at least.
        least: u64,
    },
    /// The store or a part of it has stopped.
    #[error("{0}")]
    Failed(String),
}

impl StoreError {
    /// Wraps an I/O error with what was tried.
    pub fn io(what: impl Into<String>, error: &io::Error) -> Self {
        let full = matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
        Self::Io { what: what.into(), cause: error.to_string(), full }
    }
    /// Wraps the error of a flush. Whatever its cause, what was to be flushed is unknown from here on: never only a full
    /// medium.
    pub fn flush(what: impl Into<String>, error: &io::Error) -> Self {
        Self::Io { what: what.into(), cause: error.to_string(), full: false }
    }
    /// Whether only room is missing: what was tried may be tried again when there is some.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Io { full: true, .. })
    }
    /// Something that does not decode.
    pub fn damaged(what: impl Into<String>, error: &DecodeError) -> Self {
        Self::Damaged { what: what.into(), why: error.to_string() }
    }
}
