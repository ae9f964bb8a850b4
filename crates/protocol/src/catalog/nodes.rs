//! The nodes of a cluster and their stores.
//!
//! A node is one daemon with one store or several. Its first store is the node's address: sessions run beside it, and
//! what concerns the node is asked there. Each of the others has an address of its own and fails alone.

use std::collections::BTreeSet;

use holdfast_types::{ClusterId, ErrorCode, Location, StoreId, UserError, limits};
use serde::{Deserialize, Serialize};

use super::state::refused;
use super::{CatalogReply, CatalogResult, CatalogState, NODES_MAX, is_false};

/// Stores of a node.
pub const STORES_MAX: usize = 16;

/// A node as the catalog knows it. What was written when a node had one store says nothing of others, and what concerns
/// one store only still says nothing.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NodeRecord {
    /// Where it stands, and its name.
    pub location: Location,
    /// Its first store.
    pub store: StoreId,
    /// Where its peers reach it, `host:port`.
    pub peer_address: String,
    /// Where its admin API is reached from the same machine.
    pub admin: String,
    /// Nothing new is placed on it.
    pub cordoned: bool,
    /// It takes witnesses only, never data (INV-PLACE).
    #[serde(default, skip_serializing_if = "is_false")]
    pub witness: bool,
    /// Where its first store stands on that machine, if it has others.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub directory: String,
    /// Its other stores.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub others: Vec<StoreRecord>,
}

/// A store of a node.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct StoreRecord {
    /// The store.
    pub store: StoreId,
    /// Where its peers reach it, `host:port`.
    pub peer_address: String,
    /// Where it stands on its machine; empty for the only store of a node.
    pub directory: String,
}

impl NodeRecord {
    /// All its stores, the first one first.
    pub fn stores(&self) -> impl Iterator<Item = StoreRecord> + '_ {
        let first = StoreRecord {
            store: self.store,
            peer_address: self.peer_address.clone(),
            directory: self.directory.clone(),
        };
        std::iter::once(first).chain(self.others.iter().cloned())
    }

    /// Whether a store is one of its own.
    pub fn has(&self, store: StoreId) -> bool {
        self.store == store || self.others.iter().any(|other| other.store == store)
    }

    fn check(&self) -> Result<(), UserError> {
        let name = &self.location.node;
        limits::check_name("node", name.as_str())?;
        limits::check_name("region", &self.location.region)?;
        limits::check_name("zone", &self.location.zone)?;
        let distinct: BTreeSet<StoreId> = self.stores().map(|store| store.store).collect();
        if distinct.len() != self.others.len() + 1 {
            let message = format!("node {name} names one store twice");
            return Err(refused(ErrorCode::Refused, message).hint("give each store an id of its own"));
        }
        if distinct.len() > STORES_MAX {
            let message = format!("node {name} has {} stores, {STORES_MAX} is the most", distinct.len());
            return Err(refused(ErrorCode::Refused, message).hint("put several disks into one store"));
        }
        if self.witness && !self.others.is_empty() {
            let message = format!("node {name} is a witness: it has one store");
            return Err(refused(ErrorCode::Refused, message).hint("leave its other stores out"));
        }
        Ok(())
    }
}

impl CatalogState {
    /// The node of a store.
    pub fn node_of(&self, store: StoreId) -> Option<&NodeRecord> {
        self.nodes.values().find(|node| node.has(store))
    }

    /// The first store of the node on which a store stands: what concerns the node is asked there.
    pub fn home_of(&self, store: StoreId) -> StoreId {
        self.node_of(store).map_or(store, |node| node.store)
    }

    /// Whether anything of a volume stands on a store, or may.
    fn is_used(&self, store: StoreId) -> bool {
        self.volumes.values().any(|volume| {
            volume.replicas.iter().any(|replica| replica.store == store)
                || volume.quarantined.iter().any(|kept| kept.store == store)
        })
    }

    pub(super) fn put_node(&mut self, cluster: ClusterId, node: &NodeRecord) -> CatalogResult {
        let name = &node.location.node;
        node.check()?;
        if cluster != self.cluster {
            return Err(refused(
                ErrorCode::Refused,
                format!("node {name} is of cluster {cluster}, this is cluster {}", self.cluster),
            )
            .hint("give the node an empty data directory, or start it in its own cluster"));
        }
        let elsewhere = |store: StoreId| {
            self.nodes.values().find(|other| other.has(store) && other.location.node != *name)
        };
        if let Some(other) = node.stores().find_map(|store| elsewhere(store.store)) {
            let other = &other.location.node;
            return Err(refused(
                ErrorCode::Refused,
                format!("the store of {name} is known as that of {other}"),
            )
            .hint("was a disk image copied? Give one of the two an empty data directory"));
        }
        let before = self.nodes.get(name);
        if before.is_some_and(|before| before.store == node.store && before.witness != node.witness) {
            let (was, is) = if node.witness { ("data", "a witness") } else { ("a witness", "data") };
            return Err(refused(
                ErrorCode::Refused,
                format!("node {name} was made for {was} and is now started for {is}"),
            )
            .hint("start it as it was before, or make another node with a data directory of its own"));
        }
        if before.is_some_and(|before| before.store != node.store) {
            return Err(refused(ErrorCode::Refused, format!("node {name} had another store before"))
                .hint("start it under a new name; its lost replicas are replaced"));
        }
        if before.is_none() && self.nodes.len() >= NODES_MAX {
            return Err(refused(ErrorCode::ResourceExhausted, "the cluster has as many nodes as it can"));
        }
        let cordoned = before.is_some_and(|before| before.cordoned);
        let mut record = NodeRecord { cordoned, ..node.clone() };
        // A store that its node leaves out is lost, not forgotten, for as long as something is to be replaced or
        // destroyed there.
        let left_out = before.iter().flat_map(|before| &before.others).filter(|other| !node.has(other.store));
        record.others.extend(left_out.filter(|other| self.is_used(other.store)).cloned());
        self.nodes.insert(name.clone(), record);
        Ok(CatalogReply::Done)
    }
}
