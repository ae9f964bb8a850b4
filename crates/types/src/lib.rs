//! The vocabulary of Holdfast: identifiers, sizes, topology, the volume specification, limits, a bounds-checked
//! codec and the error that reaches users. No I/O, no async, no clock.
//!
//! Units never mix: a [`BlockIndex`] counts 4 KiB blocks, a [`LogIndex`] counts log entries, a size in bytes is a
//! [`ByteSize`]. A bare integer in a public signature is a fault.

pub mod checksum;
pub mod codec;
pub mod error;
pub mod histogram;
pub mod ids;
pub mod limits;
pub mod sizes;
pub mod spec;
pub mod topology;

pub use checksum::block_checksum;
pub use codec::{DecodeError, Reader, Writer};
pub use error::{ErrorCode, UserError};
pub use histogram::{LATENCY_BOUNDS_US, LatencyHistogram};
pub use ids::*;
pub use sizes::*;
pub use spec::*;
pub use topology::*;
