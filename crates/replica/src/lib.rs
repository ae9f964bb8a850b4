//! One volume's Raft group on one store: openraft's log storage and state machine over `holdfast_store`, its network
//! over `holdfast_wire`.
//!
//! [`host::Host`] holds the replicas of a store, [`volume::Volume`] is one of them, [`group::Group`] the Raft part
//! that it shares with the catalog. Everything is single-threaded and belongs to the store's shard.
//!
//! **Architecture invariants.** Nothing here decides fencing: that is `holdfast_protocol`. Nothing outside
//! `append_streams`, `codec`, `config`, `confirm`, `core`, `group`, `log`, `machine`, `membership`, `network`,
//! `rest::member` and `transfer` names an openraft type.

pub mod administration;
mod append_streams;
mod catch_up;
mod cleaner;
mod codec;
mod compare;
pub mod config;
mod confirm;
mod core;
mod destroy;
pub mod fencing;
mod given_up;
mod gray;
pub mod group;
mod heal;
pub mod host;
mod log;
pub mod machine;
mod membership;
pub mod messages;
mod network;
pub mod observe;
pub mod past;
mod payload;
mod quota;
pub mod rebuild;
pub mod recover;
pub mod repair;
mod rest;
mod rotten_source;
pub mod scrub;
mod serve;
mod session_messages;
pub mod snapshot_messages;
mod snapshots;
mod space;
mod stall;
mod survey;
mod transfer;
mod usage;
pub mod volume;
pub mod witness;

pub use config::{AppData, AppReply, Peer, Timers};
pub use gray::{SLOW_FACTOR, SLOW_FLOOR};
pub use group::{Group, GroupEnvironment, GroupError};
pub use host::{Faulty, Host, NewReplica};
pub use machine::{ApplyError, CheckError, Position, Staged, StateMachine};
pub use payload::Payload;
pub use survey::{StoreSpace, Survey};
pub use usage::GroupUsage;
pub use volume::Volume;
pub use witness::Witness;
