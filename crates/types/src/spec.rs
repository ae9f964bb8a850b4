//! What a user asks of a volume.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::sizes::ByteSize;
use crate::topology::Domain;

/// Which loss a volume survives.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Survive {
    /// No loss: one replica.
    None,
    /// The loss of one node.
    Node,
    /// The loss of one zone.
    Zone,
    /// The loss of one region.
    Region,
}

impl Survive {
    /// The domain in which no two voters may stand together.
    pub fn domain(self) -> Option<Domain> {
        match self {
            Self::None => None,
            Self::Node => Some(Domain::Node),
            Self::Zone => Some(Domain::Zone),
            Self::Region => Some(Domain::Region),
        }
    }
    /// As users write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Node => "node",
            Self::Zone => "zone",
            Self::Region => "region",
        }
    }
}

impl FromStr for Survive {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text {
            "none" => Self::None,
            "node" => Self::Node,
            "zone" => Self::Zone,
            "region" => Self::Region,
            other => return Err(format!("survive '{other}' is none of: none, node, zone, region")),
        })
    }
}

/// What happens to I/O when a volume has no quorum.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnQuorumLoss {
    /// Wait, for as long as it takes.
    #[default]
    Suspend,
    /// Answer with an error after so many seconds.
    Error {
        /// Seconds of waiting.
        after_seconds: u32,
    },
}

/// Which replica serves reads.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReadPolicy {
    /// The local one if it can, else the nearest that can, else the leader.
    #[default]
    Nearest,
    /// Only the leader.
    Leader,
}

/// How soon a dead leader is missed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TimersPolicy {
    /// As the network between the replicas allows.
    #[default]
    Auto,
    /// As soon as a fast network allows: more heartbeats, and less patience with a busy node.
    Tight,
}

impl TimersPolicy {
    /// As users write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Tight => "tight",
        }
    }
}

impl FromStr for TimersPolicy {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "tight" => Ok(Self::Tight),
            other => Err(format!("timers '{other}' is none of: auto, tight")),
        }
    }
}

/// From where a volume may be used; the node affinity of its PersistentVolume.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AccessFrom {
    /// Any node.
    #[default]
    Anywhere,
    /// Nodes of the regions where data replicas stand.
    Region,
    /// Nodes of the zones where data replicas stand.
    Zone,
    /// Nodes that have a data replica.
    Replica,
}

/// A topology term: a region, or a zone of a region.
#[derive(Clone, PartialEq, Eq, Debug, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct TopologyTerm {
    /// Region; empty for any.
    pub region: String,
    /// Zone; empty for any.
    pub zone: String,
    /// Node; empty for any.
    #[serde(default)]
    pub node: String,
}

/// The specification of a volume.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VolumeSpec {
    /// Unique name.
    pub name: String,
    /// Size, whole blocks.
    pub size: ByteSize,
    /// The loss it survives.
    pub survive: Survive,
    /// Data replicas: 1, 2 (with a witness), 3 or 5; `None` lets placement choose.
    pub replicas: Option<u8>,
    /// Where data replicas may stand (any of these terms); empty for anywhere.
    pub allowed: Vec<TopologyTerm>,
    /// Where the first replica should stand, best first.
    pub preferred: Vec<TopologyTerm>,
    /// What I/O does without a quorum.
    pub on_quorum_loss: OnQuorumLoss,
    /// Which replica serves reads.
    pub read_policy: ReadPolicy,
    /// From where it may be used.
    pub access_from: AccessFrom,
    /// How soon a dead leader is missed.
    #[serde(default)]
    pub timers: TimersPolicy,
    /// Bytes that snapshots may add to its size, on each replica; `None` bounds nothing.
    #[serde(default)]
    pub snapshot_quota: Option<ByteSize>,
}
