//! openraft's types made concrete, and its configuration with the settings that safety rests on.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use holdfast_protocol::planted::is_planted;
pub use holdfast_protocol::timers::Timers;
use holdfast_protocol::volume::VolumeReply;
use holdfast_types::StoreId;
use openraft::SnapshotPolicy;

use crate::payload::Payload;

/// What a log entry of a group carries: an encoded command of its state machine, and block data beside it.
#[derive(Clone, PartialEq, Eq)]
pub struct AppData {
    /// The command, encoded by the group's state machine; at most 16 KiB for volumes.
    pub head: Bytes,
    /// Block data.
    pub payload: Payload,
}

impl fmt::Debug for AppData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "command of {}+{} bytes", self.head.len(), self.payload.len())
    }
}
impl fmt::Display for AppData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// What applying an entry answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AppReply {
    /// Blank and membership entries.
    Nothing,
    /// A volume's answer.
    Volume(VolumeReply),
    /// Another state machine's encoded answer.
    Opaque(Bytes),
}
impl fmt::Display for AppReply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// Where a voter or learner stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Peer {
    /// Its store, which is also its network address.
    pub store: StoreId,
    /// It votes and keeps the log, and holds no data (INV-WITNESS).
    pub witness: bool,
}

impl Peer {
    /// One that holds data.
    pub fn data(store: StoreId) -> Self {
        Self { store, witness: false }
    }
}

/// What a replica of a group is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// It holds what the group's entries say.
    Full,
    /// It votes and keeps the log. It leads only to bring another up to date, and when it campaigns its owner decides
    /// (INV-WITNESS).
    Witness,
}

/// Who only says where it stands holds data.
impl From<StoreId> for Peer {
    fn from(store: StoreId) -> Self {
        Self::data(store)
    }
}

openraft::declare_raft_types!(
    /// The one type configuration of every group.
    pub Types:
        D = AppData,
        R = AppReply,
        NodeId = u64,
        Node = Peer,
        AsyncRuntime = holdfast_env::Runtime
);

pub(crate) type LeaderId = openraft::impls::leader_id_adv::LeaderId<u64, u64>;
pub(crate) type Vote = openraft::type_config::alias::VoteOf<Types>;
pub(crate) type LogId = openraft::type_config::alias::LogIdOf<Types>;
pub(crate) type Entry = openraft::type_config::alias::EntryOf<Types>;
pub(crate) type Membership = openraft::Membership<u64, Peer>;
pub(crate) type StoredMembership = openraft::type_config::alias::StoredMembershipOf<Types>;
pub(crate) type SnapshotMeta = openraft::type_config::alias::SnapshotMetaOf<Types>;
pub(crate) type Snapshot = openraft::type_config::alias::SnapshotOf<Types, crate::machine::SnapshotData>;
pub(crate) type Raft = openraft::Raft<Types, crate::machine::Machine>;

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// openraft's configuration of a group. The settings that safety rests on are asserted here (INV-TERM), whatever
/// openraft's defaults become.
pub fn raft_config(timers: &Timers, group: &str) -> Arc<openraft::Config> {
    let config = openraft::Config {
        cluster_name: group.to_owned(),
        heartbeat_interval: milliseconds(timers.heartbeat),
        election_timeout_min: milliseconds(timers.election_min),
        election_timeout_max: milliseconds(timers.election_max),
        // The checkpoint is made by the cleaner and shown to openraft; it never asks for one by itself.
        snapshot_policy: SnapshotPolicy::Never,
        // Nor does it purge by itself whatever a checkpoint covers: others may need it (`cleaner.rs`).
        max_in_snapshot_log_to_keep: u64::MAX,
        // A follower is healed by log for as long as the log is there, however far behind it is.
        replication_lag_threshold: u64::MAX / 4,
        max_payload_entries: 1024,
        max_append_entries: Some(1024),
        api_channel_size: Some(1024),
        notification_channel_size: Some(1024),
        // The snapshot call ends when the rebuild ends; it is long polled, so the limit is one of patience only.
        install_snapshot_timeout: 24 * 3600 * 1000,
        // Entries leave before the leader's own flush: a restarted leader must win a new term (INV-TERM).
        enable_leader_restore: Some(is_planted("leader-restore")),
        enable_pre_vote: Some(true),
        // A leader that can send but not hear must step down.
        quorum_loss_probe_interval: Some(2 * milliseconds(timers.election_max)),
        // Elections wait for the start-up silence; the group switches them on.
        enable_elect: false,
        ..Default::default()
    };
    let config = config.validate().expect("the timers satisfy openraft's inequalities");
    assert!(
        config.enable_leader_restore == Some(false) || is_planted("leader-restore"),
        "INV-TERM: leader restore is off"
    );
    assert_eq!(config.enable_pre_vote, Some(true), "pre-vote is on");
    assert!(
        config.quorum_loss_probe_interval >= Some(2 * config.election_timeout_max),
        "a deaf leader steps down"
    );
    Arc::new(config)
}
