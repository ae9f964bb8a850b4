//! The catalog's state machine: which nodes there are, which volumes are wanted, and where their replicas stand.
//!
//! Commands are proposed by whoever serves a user and by the reconciler. A command that changes a volume names the
//! revision that it was decided on, so that two reconcilers never act on each other's half-made decisions
//! (INV-CATALOG). Nothing on the I/O path asks this.

mod clones;
mod members;
mod nodes;
pub mod recovery;
mod snapshots;
mod state;

use std::collections::BTreeMap;

use holdfast_types::{
    ByteSize, ClusterId, GroupId, Location, LogIndex, NodeName, RecoveryId, ReplicaId, SnapshotId, StoreId,
    TimersPolicy, UserError, VolumeId, VolumeSpec,
};
use serde::{Deserialize, Serialize};

pub use clones::{SourceOrder, VolumeSource};
pub use members::{gives_way, share_a_node, target_voters};
pub use nodes::{NodeRecord, STORES_MAX, StoreRecord};
pub use recovery::{Incarnation, Quarantined, Recovery};
pub use snapshots::{SnapshotPhase, SnapshotRecord};
pub use state::{CatalogReply, CatalogState};

/// Nodes of a cluster.
pub const NODES_MAX: usize = 1024;
/// Volumes of a cluster.
pub const VOLUMES_MAX: usize = 100_000;

/// What was written before there were witnesses says nothing of them, and what concerns none still says nothing.
fn is_false(value: &bool) -> bool {
    !value
}

/// What is to happen with a volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VolumePhase {
    /// Its replicas are being made.
    Creating,
    /// They are there, and what the volume begins with is being copied into them.
    Filling,
    /// It can be attached.
    Ready,
    /// It has lost its majority, and is being made to go on from a survivor (INV-RECOVER).
    Recovering,
    /// Its replicas are being removed; its name is free again.
    Deleting,
}

/// What is to happen with a replica.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReplicaPhase {
    /// It votes.
    Voter,
    /// It is to become a voter.
    Joining,
    /// It is to be removed.
    Leaving,
}

/// A replica as the catalog wants it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ReplicaRecord {
    /// Never given out twice in a cluster.
    pub id: ReplicaId,
    /// Its store.
    pub store: StoreId,
    /// Where that stood when the replica was placed.
    pub location: Location,
    /// What is to happen with it.
    pub phase: ReplicaPhase,
    /// It votes and keeps the log, and holds no data.
    #[serde(default, skip_serializing_if = "is_false")]
    pub witness: bool,
    /// It was made on its store, and is never made there again: an emptied store would come back under its old id
    /// (INV-TERM).
    #[serde(default, skip_serializing_if = "is_false")]
    pub made: bool,
}

impl ReplicaRecord {
    /// Where it stands.
    pub fn placed(&self) -> Placed {
        Placed { store: self.store, location: self.location.clone(), witness: self.witness }
    }
}

/// A volume as the catalog wants it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VolumeRecord {
    /// Its id.
    pub id: VolumeId,
    /// Its Raft group.
    pub group: GroupId,
    /// What was asked for.
    pub spec: VolumeSpec,
    /// Parameters as they were given, to be shown.
    pub parameters: BTreeMap<String, String>,
    /// The size it was created with: a new replica that repeats the log begins with it, as the others did.
    pub first_size: ByteSize,
    /// What it began with, if it is a copy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<VolumeSource>,
    /// What is to happen with it.
    pub phase: VolumePhase,
    /// Its replicas.
    pub replicas: Vec<ReplicaRecord>,
    /// Which life of the volume this is.
    #[serde(default, skip_serializing_if = "Incarnation::is_first")]
    pub incarnation: Incarnation,
    /// The recovery that is under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recovery: Option<Recovery>,
    /// What is left of groups that were replaced. It goes with the volume.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub quarantined: Vec<Quarantined>,
    /// Nodes that may attach it (CSI publish), each with whether only to read.
    pub published: BTreeMap<NodeName, bool>,
    /// Counts up with every change.
    pub revision: u64,
}

impl VolumeRecord {
    /// Stores of the data replicas that vote or are to vote. A witness serves nobody.
    pub fn stores(&self) -> Vec<StoreId> {
        let staying = self.data().filter(|replica| replica.phase != ReplicaPhase::Leaving);
        staying.map(|replica| replica.store).collect()
    }

    /// The replicas that hold data.
    pub fn data(&self) -> impl Iterator<Item = &ReplicaRecord> {
        self.replicas.iter().filter(|replica| !replica.witness)
    }
}

/// A new replica: the store and where it stands.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Placed {
    /// The store.
    pub store: StoreId,
    /// Where it stands.
    pub location: Location,
    /// It is a witness.
    #[serde(default, skip_serializing_if = "is_false")]
    pub witness: bool,
}

/// A change of the catalog.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum CatalogCommand {
    /// A node tells where it is.
    PutNode {
        /// The cluster that the node believes to be in.
        cluster: ClusterId,
        /// The node; its cordon is kept as it was.
        node: NodeRecord,
    },
    /// Stop or resume placing on a node.
    SetCordon {
        /// The node.
        node: NodeName,
        /// Whether to stop.
        cordoned: bool,
    },
    /// A new volume. Idempotent by name.
    CreateVolume {
        /// Its id if it is new; random.
        id: VolumeId,
        /// Its group if it is new; random.
        group: GroupId,
        /// What is asked for.
        spec: VolumeSpec,
        /// Parameters as given.
        parameters: BTreeMap<String, String>,
        /// Where its replicas go.
        placed: Vec<Placed>,
        /// What it begins with; nothing if left out.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        source: Option<SourceOrder>,
    },
    /// Its replicas are there.
    VolumeReady {
        /// The volume.
        id: VolumeId,
        /// The revision that this was decided on.
        revision: u64,
    },
    /// So much of what a volume begins with is there. Idempotent; what is less than is known is left out of account.
    FillProgress {
        /// The volume.
        id: VolumeId,
        /// Everything below is copied, durable on a majority; in bytes.
        filled: ByteSize,
        /// Bytes of what is copied.
        size: ByteSize,
    },
    /// INV-FILL: everything is copied, and whoever did it has let go of the volume. Idempotent.
    VolumeFilled {
        /// The volume.
        id: VolumeId,
    },
    /// Remove a volume. Idempotent.
    DeleteVolume {
        /// The volume.
        id: VolumeId,
    },
    /// A deleted volume's last replica is gone.
    ForgetVolume {
        /// The volume.
        id: VolumeId,
        /// The revision that this was decided on.
        revision: u64,
    },
    /// The volume has grown.
    SetSize {
        /// The volume.
        id: VolumeId,
        /// Its size; a smaller one than it has is left out of account.
        size: ByteSize,
    },
    /// How soon a dead leader is to be missed. Idempotent.
    SetTimers {
        /// The volume.
        id: VolumeId,
        /// The policy.
        timers: TimersPolicy,
    },
    /// How much snapshots may add to a volume's size; what they hold already stays. Idempotent.
    SetSnapshotQuota {
        /// The volume.
        id: VolumeId,
        /// Bytes; `None` bounds nothing.
        quota: Option<ByteSize>,
    },
    /// One more replica.
    AddReplica {
        /// The volume.
        id: VolumeId,
        /// The revision that this was decided on.
        revision: u64,
        /// Where it goes.
        placed: Placed,
    },
    /// One more replica, and one less once that votes. One step: a volume whose old replica leaves without a new one
    /// would lose a copy, and one that gets a new one and keeps the old has an even number of voters.
    ReplaceReplica {
        /// The volume.
        id: VolumeId,
        /// The revision that this was decided on.
        revision: u64,
        /// The replica that leaves.
        old: ReplicaId,
        /// Where the new one goes.
        placed: Placed,
    },
    /// A replica that joins was made on its store.
    ReplicaMade {
        /// The volume.
        id: VolumeId,
        /// The revision that this was decided on.
        revision: u64,
        /// The replica.
        replica: ReplicaId,
    },
    /// A replica that was to leave runs again and goes on voting; what was to take its place on its store leaves. One
    /// step: with half of it the volume would have a voter too few for ever.
    KeepReplica {
        /// The volume.
        id: VolumeId,
        /// The revision that this was decided on.
        revision: u64,
        /// The replica that runs again.
        old: ReplicaId,
        /// The one that leaves instead.
        joining: ReplicaId,
    },
    /// What is to happen with a replica.
    SetReplica {
        /// The volume.
        id: VolumeId,
        /// The revision that this was decided on.
        revision: u64,
        /// The replica.
        replica: ReplicaId,
        /// What is to happen with it.
        phase: ReplicaPhase,
    },
    /// A replica is gone.
    DropReplica {
        /// The volume.
        id: VolumeId,
        /// The revision that this was decided on.
        revision: u64,
        /// The replica.
        replica: ReplicaId,
    },
    /// Let a volume that has lost its majority go on from these survivors. Idempotent; refused while another one is under
    /// way.
    RecoverVolume {
        /// The volume.
        id: VolumeId,
        /// The revision that this was decided on.
        revision: u64,
        /// The recovery; random.
        recovery: RecoveryId,
        /// The group as which the volume goes on; random.
        group: GroupId,
        /// The survivors.
        survivors: Vec<ReplicaId>,
    },
    /// Survivors are sealed from here on.
    RecoverySealing {
        /// The volume.
        id: VolumeId,
        /// The revision that this was decided on.
        revision: u64,
    },
    /// The recovery is called off: somebody else answers.
    RecoveryAbandoned {
        /// The volume.
        id: VolumeId,
        /// The revision that this was decided on.
        revision: u64,
        /// No survivor was sealed, and none will be: each was told that it is kept.
        #[serde(default)]
        kept: bool,
    },
    /// The volume goes on.
    VolumeRecovered {
        /// The volume.
        id: VolumeId,
        /// The revision that this was decided on.
        revision: u64,
        /// The survivor that it goes on from.
        source: ReplicaId,
    },
    /// What was left of a deleted volume's former group is gone.
    DropQuarantined {
        /// The volume.
        id: VolumeId,
        /// The revision that this was decided on.
        revision: u64,
        /// The group.
        group: GroupId,
        /// The replica.
        replica: ReplicaId,
    },
    /// A node may attach the volume. Idempotent.
    Publish {
        /// The volume.
        id: VolumeId,
        /// The node.
        node: NodeName,
        /// Only to read.
        read_only: bool,
    },
    /// A node may not attach the volume any more; all of them if none is named. Idempotent.
    Unpublish {
        /// The volume.
        id: VolumeId,
        /// The node.
        node: Option<NodeName>,
    },
    /// A new snapshot. Idempotent by volume, name and key.
    CreateSnapshot {
        /// Its id if it is new; random.
        id: SnapshotId,
        /// The volume.
        volume: VolumeId,
        /// Its name.
        name: String,
        /// A name that is unique in the cluster; empty for none.
        #[serde(default)]
        key: String,
        /// Wall time of who asks for it, in milliseconds since 1970.
        created_ms: u64,
    },
    /// The snapshot is in its volume's log. Idempotent.
    SnapshotReady {
        /// The snapshot.
        id: SnapshotId,
        /// Where it stands there.
        index: LogIndex,
        /// The volume's size at that moment.
        size: ByteSize,
    },
    /// Remove a snapshot. Idempotent.
    DeleteSnapshot {
        /// The snapshot.
        id: SnapshotId,
    },
    /// A deleted snapshot is gone from its volume. Idempotent.
    ForgetSnapshot {
        /// The snapshot.
        id: SnapshotId,
    },
}

/// A command's answer on its way.
pub type CatalogResult = Result<CatalogReply, UserError>;

#[cfg(test)]
mod tests;
