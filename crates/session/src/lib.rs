//! The client side of an attachment: takes an epoch, keeps its lease, writes and reads, and ends when it is fenced.
//!
//! A session survives the loss of any minority of its volume's replicas without an error: requests are repeated under
//! the same number until they are applied exactly once (INV-ONCE), and wait while there is no quorum. When a newer
//! epoch exists, everything fails at once and for good.
//!
//! **Architecture invariant:** a write's acknowledgement comes from the volume's state machine only; a read's floor
//! never falls.

mod calls;
mod floor;
mod lease;
mod service;
mod session;
mod usage;

pub use service::Sessions;
pub use session::{AttachOptions, Closed, Session, SessionError, VolumeTarget};
pub use usage::SessionUsage;
