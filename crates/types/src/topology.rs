//! Where things stand: cluster ⊃ region ⊃ zone ⊃ node ⊃ store.

use serde::{Deserialize, Serialize};

use crate::ids::NodeName;

/// The place of a node.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
pub struct Location {
    /// Region, for example `eu-west`.
    pub region: String,
    /// Zone within the region, for example `eu-west-1a`. Zones of equal name in two regions are two zones.
    pub zone: String,
    /// The node.
    pub node: NodeName,
}

/// A failure domain whose loss is survived, or whose members are compared.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Domain {
    /// One machine.
    Node,
    /// One zone.
    Zone,
    /// One region.
    Region,
}

impl Location {
    /// The name of the domain of the given kind that this place is in, unambiguous within the cluster.
    pub fn domain(&self, kind: Domain) -> String {
        match kind {
            Domain::Region => self.region.clone(),
            Domain::Zone => format!("{}/{}", self.region, self.zone),
            Domain::Node => self.node.0.clone(),
        }
    }
}
