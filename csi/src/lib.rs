//! The CSI driver: identity, controller and node services over a node's admin API, and the mounter.
//!
//! It keeps nothing: what volumes there are, who may attach them and who does is asked of the cluster each time, what
//! is mounted is asked of the kernel. So it may be killed and started at any time, several controllers may serve at
//! once, and no I/O passes through it. What it holds in memory is only which volumes a call of its own is under way for.
//!
//! It could be broken by deciding from memory or from a path what only the cluster or the kernel knows, and by making a
//! file system where something else may stand ([`mounter::content`]).

pub mod admin;
mod arguments;
mod controller;
mod errors;
mod identity;
mod inflight;
pub mod mounter;
mod names;
mod node;
mod server;
mod topology;

pub use server::{Role, listen, serve};

/// The name of the driver: `driver` of a PersistentVolume, `provisioner` of a StorageClass.
pub const DRIVER_NAME: &str = "csi.holdfast.dev";

/// Generated from `proto/csi/csi.proto`.
#[allow(missing_docs, clippy::all, clippy::disallowed_types, clippy::unwrap_used)]
pub mod proto {
    tonic::include_proto!("csi.v1");
}
