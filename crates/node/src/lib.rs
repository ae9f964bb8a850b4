//! The daemon of a node: composes the shard (store, replicas, catalog member, sessions, frontends) and serves the
//! admin API.
//!
//! [`daemon::run`] is one node. Its first shard runs on the calling thread, with the first store and all sessions; each
//! other store has a thread and a shard of its own (`threads`). The admin API runs on a small ordinary runtime and speaks
//! with the shards by messages (`handle`). What concerns another node is forwarded over the
//! peer network (`forward`), so that any node answers for the cluster.

pub mod admin;
mod attachments;
pub mod cluster;
pub mod config;
pub mod daemon;
mod device;
pub mod fence;
mod filling;
mod forward;
mod handle;
mod metrics;
mod operations;
mod parameters;
mod planted;
mod problems;
mod recovery;
mod shard;
mod shown;
mod snapshots;
mod store;
mod threads;
mod views;
mod voter;

pub use config::NodeConfig;

/// Removes the mounts and block devices that the killed daemon of a data directory left; tells how many there were.
/// The daemon does so itself when it starts. Blocks.
pub fn clean_devices(directory: &std::path::Path) -> Result<usize, holdfast_types::UserError> {
    let layout = config::Layout::new(directory);
    holdfast_frontend::kernel::clean(&layout.devices()).map_err(|error| shown::user_error(&error))
}
