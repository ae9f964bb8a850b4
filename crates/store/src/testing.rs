//! For tests: planted faults, a disk in memory that can lose, tear, rot and misdirect, and a driver of virtual time.
//!
//! The disk's model of a medium is that of `docs/FORMAT.md`: a write stands in a volatile cache, where everybody reads
//! it, until a flush of its file or its own durability brings it to the medium. A power cut takes of each write in the
//! cache any subset of its 512-byte sectors. Every operation is numbered, so that a test can stop the world at any of
//! them, or make any of them fail.

mod device;
mod disk;
mod driver;
pub mod fuzz;
mod planted;

pub use device::{Device, Speed};
pub use disk::{Fault, Image, Left, MemoryDisk, Tear};
pub use driver::{Random, simulate};
pub use planted::{KNOWN, is_planted, plant};
