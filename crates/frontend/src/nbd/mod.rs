//! The NBD server: fixed newstyle over a unix socket, several exports by name.
//!
//! Offered: LIST, INFO, GO, EXPORT_NAME, STRUCTURED_REPLY, meta context `base:allocation`; READ, WRITE, FLUSH, FUA,
//! TRIM, WRITE_ZEROES (with FAST_ZERO), BLOCK_STATUS, CACHE, DISC; several connections per export. Source: the protocol
//! document of the NetworkBlockDevice project (doc/proto.md).
//!
//! A client that breaks the protocol is disconnected and counted. Requests in flight are bounded per connection by
//! number and by bytes; beyond that the server stops reading. When the device has ended, every request is answered
//! ESHUTDOWN at once; nothing hangs.

mod client;
mod handshake;
mod proto;
mod server;
mod transmission;

pub use client::NbdClient;
pub use server::{Exports, NbdServer};
