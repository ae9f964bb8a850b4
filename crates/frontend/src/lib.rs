//! How an attached volume appears to a guest: an NBD export on a unix socket, and a FUSE file with a loop device on it.
//!
//! A frontend serves a [`Device`]: whole blocks, at most 1 MiB at once. The [`Edge`] in between gives guests bytes: it
//! splits, reads around what is not aligned, and keeps read-modify-write of one block apart from other writes to it.
//! Nothing acknowledged is volatile, so FLUSH and FUA complete at once.
//!
//! Frontends run on the shard's own thread, beside the session. An NBD request crosses no thread on its way; one of the
//! kernel crosses one, fuser's.

mod device;
mod edge;
pub mod kernel;
pub mod nbd;

pub use device::{Device, DeviceError, Run, RunKind};
pub use edge::Edge;
