//! The admin API: generated types, and errors on its wire.

pub mod error;
pub(crate) mod service;

/// Generated from `proto/holdfast/admin.proto`.
#[allow(missing_docs, clippy::all, clippy::disallowed_types, clippy::unwrap_used)]
pub mod pb {
    tonic::include_proto!("holdfast.admin.v1");
}
