//! For tests: planted faults, a disk in memory that can lose, tear, rot and misdirect, and a driver of virtual time.
//!
//! The disk's model of a medium is that of `docs/FORMAT.md`: a write stands in a volatile cache, where everybody reads
//! it, until a flush of its file or its own durability brings it to the medium. A power cut takes of each write in the
//! cache any subset of its 512-byte sectors. Every operation is numbered, so that a test can stop the world at any of
//! them, or make any of them fail.

mod disk;
mod driver;

use std::cell::RefCell;

pub use disk::{Fault, Image, MemoryDisk, Tear};
pub use driver::{Random, simulate};

thread_local! {
    static PLANTED: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// Faults that can be planted, and what a test must notice.
pub const KNOWN: [(&str, &str); 10] = [
    ("skip-journal-flush", "an acknowledged entry is lost"),
    ("cut-faulty-entry", "an entry that was acknowledged and rotted is cut"),
    ("forget-second-list", "a batch with one damaged list is lost"),
    ("reuse-at-once", "a segment is overwritten before anything durable says that it is not needed"),
    ("forget-vote", "an acknowledged vote is forgotten"),
    ("move-unflushed-home", "a block is home of which the journal knows nothing"),
    ("checkpoint-before-home-flush", "a checkpoint says home what was never flushed"),
    ("forget-hidden-runs", "a block is served of which an older version never came home"),
    ("page-in-place", "a torn table page leaves no older copy"),
    ("one-table-copy", "a rotten table page is replaced by a stale one"),
];

/// Plants faults by name on this thread, instead of those before.
///
/// # Panics
/// On a name that is not in [`KNOWN`]: a test that plants nothing would prove nothing.
pub fn plant(names: &[&str]) {
    for name in names {
        assert!(KNOWN.iter().any(|(known, _)| known == name), "no fault is named '{name}'");
    }
    PLANTED.with(|planted| *planted.borrow_mut() = names.iter().map(|name| (*name).to_owned()).collect());
}

/// Whether a fault is planted on this thread.
pub fn is_planted(name: &str) -> bool {
    PLANTED.with(|planted| planted.borrow().iter().any(|known| known == name))
}
