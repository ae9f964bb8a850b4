//! Fence certificates (INV-CERT): what the voters of a volume sign to tell the world that a node can change it no more.
//!
//! A statement says: as of this index of this group's log, the volume is at this epoch and held by that node or by nobody,
//! and not by the fenced one. Applied is committed, and every later command of an older epoch is refused when it
//! is applied, on every replica; so whatever the fenced node still sends changes nothing. A voter signs what it has
//! applied itself. A certificate is a statement with the signatures of a majority of every configuration that decides.
//!
//! It says nothing of reads that the fenced node answers itself from its cache, nor of what it attaches later.

use std::collections::{BTreeMap, BTreeSet};

use holdfast_types::{
    ClusterId, Epoch, GroupId, LogIndex, NodeName, RecoveryId, ReplicaId, VolumeId, Writer, limits,
};
use serde::{Deserialize, Serialize};

use crate::planted::is_planted;
use crate::volume::VolumeState;

/// What is signed begins with this: no other signature of a node's key is one of a fence.
const DOMAIN: &str = "holdfast fence certificate 1";
/// Configurations of a statement, at most: those of a joint one.
const CONFIGURATIONS_MAX: usize = 2;

/// Voters of one configuration, and the node on which each stands.
pub type Configuration = BTreeMap<ReplicaId, NodeName>;

/// What the voters of a volume's group have applied, about one node.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FenceStatement {
    /// The cluster.
    pub cluster: ClusterId,
    /// The volume.
    pub volume: VolumeId,
    /// Its group: another one after each forced recovery.
    pub group: GroupId,
    /// Which incarnation of the volume that is, from 1 on.
    pub incarnation: u64,
    /// The forced recovery that began it; nil for the first.
    pub recovery: RecoveryId,
    /// The node that is fenced.
    pub fenced: NodeName,
    /// The volume's epoch: nothing of an older one is applied any more.
    pub epoch: Epoch,
    /// Who holds the volume in this epoch; nobody if it has ended.
    pub holder: Option<NodeName>,
    /// Where in the group's log that was seen.
    pub index: LogIndex,
    /// The configurations that decide, two during a change of members.
    #[serde(with = "as_lists")]
    pub configurations: Vec<Configuration>,
}

/// Configurations as lists of voters: a map's keys are no numbers in every form of text.
mod as_lists {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use super::{Configuration, NodeName, ReplicaId};

    #[derive(Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Voter {
        replica: ReplicaId,
        node: NodeName,
    }

    pub(super) fn serialize<S: Serializer>(all: &[Configuration], out: S) -> Result<S::Ok, S::Error> {
        let list = |one: &Configuration| -> Vec<Voter> {
            one.iter().map(|(replica, node)| Voter { replica: *replica, node: node.clone() }).collect()
        };
        all.iter().map(list).collect::<Vec<_>>().serialize(out)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(input: D) -> Result<Vec<Configuration>, D::Error> {
        let lists = Vec::<Vec<Voter>>::deserialize(input)?;
        let map = |list: Vec<Voter>| -> Result<Configuration, D::Error> {
            let (count, map) = (list.len(), list.into_iter().map(|voter| (voter.replica, voter.node)));
            let map: Configuration = map.collect();
            let twice = || serde::de::Error::custom("a voter is named twice");
            if map.len() == count { Ok(map) } else { Err(twice()) }
        };
        lists.into_iter().map(map).collect()
    }
}

/// Why a voter does not sign.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NotSigned {
    /// The node holds the volume.
    #[error("node {0} holds the volume: it is not fenced")]
    Held(NodeName),
    /// Not applied yet.
    #[error("entry {0} is not applied here yet")]
    Behind(LogIndex),
    /// Something else is applied here.
    #[error("the volume is at epoch {here} here, held by {}, which is not what is to be signed", holder_name(.holder))]
    Differs {
        /// The epoch.
        here: Epoch,
        /// The holder.
        holder: Option<NodeName>,
    },
    /// The members are others by now.
    #[error("the group's members are being changed: ask again")]
    OtherMembers,
    /// Who is asked has no vote.
    #[error("replica {0} has no vote")]
    NoVote(ReplicaId),
}

fn holder_name(holder: &Option<NodeName>) -> &str {
    holder.as_ref().map_or("nobody", NodeName::as_str)
}

/// What one voter has applied.
pub struct Applied<'s> {
    /// The voter.
    pub replica: ReplicaId,
    /// The volume's state.
    pub state: &'s VolumeState,
    /// As of this entry.
    pub index: LogIndex,
    /// The voters that decide, by its own log.
    pub configurations: &'s [BTreeSet<ReplicaId>],
}

impl FenceStatement {
    /// What a voter signs: every field, in one way only.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Writer::with_capacity(512);
        out.text(DOMAIN);
        self.cluster.encode(&mut out);
        self.volume.encode(&mut out);
        self.group.encode(&mut out);
        out.u64(self.incarnation);
        self.recovery.encode(&mut out);
        self.fenced.encode(&mut out);
        self.epoch.encode(&mut out);
        out.bool(self.holder.is_some());
        if let Some(holder) = &self.holder {
            holder.encode(&mut out);
        }
        self.index.encode(&mut out);
        out.u32(self.configurations.len() as u32);
        for configuration in &self.configurations {
            out.u32(configuration.len() as u32);
            for (replica, node) in configuration {
                replica.encode(&mut out);
                node.encode(&mut out);
            }
        }
        out.finish().to_vec()
    }

    /// Why this is no statement that anybody would sign, whatever was applied.
    pub fn malformed(&self) -> Option<&'static str> {
        let empty = self.configurations.is_empty() || self.configurations.iter().any(BTreeMap::is_empty);
        if empty {
            return Some("it names no voters");
        }
        let voters = self.configurations.iter().map(BTreeMap::len).max().unwrap_or(0);
        if self.configurations.len() > CONFIGURATIONS_MAX || voters > limits::VOTERS_MAX {
            return Some("it names more voters than a group has");
        }
        let stands_twice = |configuration: &Configuration| {
            configuration.values().collect::<BTreeSet<_>>().len() < configuration.len()
        };
        if self.configurations.iter().any(stands_twice) {
            return Some("two voters of one configuration stand on one node");
        }
        if self.holder.as_ref() == Some(&self.fenced) {
            return Some("the node that it calls fenced holds the volume");
        }
        None
    }

    /// The node on which a voter stands; none if it has no vote.
    pub fn node_of(&self, voter: ReplicaId) -> Option<&NodeName> {
        self.configurations.iter().find_map(|configuration| configuration.get(&voter))
    }

    /// Whether a voter may sign it, by what it has applied itself.
    pub fn check(&self, applied: &Applied<'_>) -> Result<(), NotSigned> {
        if applied.index < self.index {
            return Err(NotSigned::Behind(self.index));
        }
        let state = applied.state;
        let holds = state.holder().map(|holder| holder.node.clone());
        if holds.as_ref() == Some(&self.fenced) && !is_planted("sign-what-is-held") {
            return Err(NotSigned::Held(self.fenced.clone()));
        }
        if state.epoch() != self.epoch || holds != self.holder {
            return Err(NotSigned::Differs { here: state.epoch(), holder: holds });
        }
        let named: Vec<BTreeSet<ReplicaId>> =
            self.configurations.iter().map(|configuration| configuration.keys().copied().collect()).collect();
        if named != applied.configurations {
            return Err(NotSigned::OtherMembers);
        }
        if self.node_of(applied.replica).is_none() {
            return Err(NotSigned::NoVote(applied.replica));
        }
        Ok(())
    }

    /// Whether these voters are a majority of every configuration.
    pub fn is_majority(&self, signed: &BTreeSet<ReplicaId>) -> bool {
        let has = |configuration: &Configuration| {
            let count = configuration.keys().filter(|voter| signed.contains(voter)).count();
            count > configuration.len() / 2 || is_planted("minority-certifies") && count > 0
        };
        !self.configurations.is_empty() && self.configurations.iter().all(has)
    }
}
