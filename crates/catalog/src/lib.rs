//! The catalog: the cluster's own Raft group, and the reconciler that makes reality match it.
//!
//! [`seat::Seat`] is the catalog's place on a shard, [`member::Member`] the replica that runs there; [`client::CatalogClient`] finds the leader from any
//! shard; [`volumes`] speaks with the replicas of volumes. What the catalog holds and which changes it accepts is
//! decided in `holdfast_protocol::catalog`.
//!
//! **Architecture invariant:** no read or write of a volume waits for anything here.

pub mod client;
pub mod filling;
mod machine;
pub mod member;
mod messages;
mod reconciler;
pub mod recovery;
pub mod seat;
mod snapshots;
mod timers;
pub mod volumes;

pub use client::CatalogClient;
pub use member::{Member, MemberOptions};
pub use seat::Seat;
