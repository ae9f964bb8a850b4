//! One disk: the journal that all groups of a store share, and the blocks of each replica. Knows nothing of Raft or
//! of the network. Byte layouts and their argument are in `docs/FORMAT.md`.

mod budget;
pub mod destroyed_file;
mod entry;
mod error;
mod fail_stop;
pub mod journal;
pub mod past_file;
mod recent;
pub mod recovery_file;
mod reserve;
pub mod scrub_file;
mod sealed;
mod standing;
pub mod state_file;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod twin_file;
pub mod volume;
pub mod witness_file;

pub use budget::Budget;
pub use entry::{EntryHead, EntryId, LogEntry, ReplicaIdentity, StoreIdentity};
pub use error::StoreError;
pub use fail_stop::FailStop;
pub use recent::RecentLatency;
pub use reserve::{InUse, Reserve};
pub use standing::Standing;
