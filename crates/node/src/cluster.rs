//! Making a new cluster whose nodes are all known: an authority, and a data directory per node.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use holdfast_env::Driver;
use holdfast_types::{ClusterId, ErrorCode, Location, NodeName, ReplicaId, StoreId, UserError};
use holdfast_wire::pki::Authority;

use crate::config::{DiskMode, IoEngine, Layout, NodeConfig, PeerConfig, ScrubConfig};

/// Members of a catalog.
const CATALOG_MEMBERS: usize = 3;
/// The port on which nodes of a loopback cluster listen; their addresses differ.
const PORT: u16 = 7400;
/// The region of a witness node: no other node is there.
const WITNESS_REGION: &str = "w";
/// The port on which they serve their metrics.
const METRICS_PORT: u16 = 7401;

/// What a cluster on loopback looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoopbackPlan {
    /// Regions.
    pub regions: usize,
    /// Zones of each region.
    pub zones: usize,
    /// Nodes of each zone.
    pub nodes_per_zone: usize,
    /// A witness node in a region of its own.
    pub witness: bool,
    /// Seconds after which a silent node is lost.
    pub lost_after_seconds: u64,
    /// Bytes of each node's journal.
    pub journal_bytes: u64,
    /// What happens to unflushed writes when a daemon is killed.
    pub disk: DiskMode,
    /// How the stores' files are read and written.
    pub io_engine: IoEngine,
}

/// Where each node of a cluster stands and what it is.
pub type Nodes = Vec<(PathBuf, NodeConfig)>;

/// A random id, from the kernel.
pub fn random_id() -> u128 {
    let driver = holdfast_env::real::RealDriver::new();
    (u128::from(driver.random_u64()) << 64) | u128::from(driver.random_u64())
}

/// The locations of a plan, in order.
fn locations(plan: &LoopbackPlan) -> Vec<Location> {
    let mut all = Vec::new();
    for region in 1..=plan.regions {
        for zone in 1..=plan.zones {
            for node in 1..=plan.nodes_per_zone {
                all.push(Location {
                    region: format!("r{region}"),
                    zone: format!("r{region}-z{zone}"),
                    node: NodeName::new(format!("r{region}-z{zone}-n{node}")),
                });
            }
        }
    }
    if plan.witness {
        let (region, zone) = (WITNESS_REGION.to_owned(), format!("{WITNESS_REGION}-z1"));
        all.push(Location { region, zone, node: NodeName::new(format!("{WITNESS_REGION}-z1-n1")) });
    }
    all
}

/// The catalog's members: spread over regions, then zones, then nodes. Three places with data do without the witness
/// node; two zones, or two regions, have their third vote there.
fn catalog(nodes: &[(Location, StoreId)]) -> BTreeMap<ReplicaId, StoreId> {
    let members = if nodes.len() < CATALOG_MEMBERS { 1 } else { CATALOG_MEMBERS };
    let (witnesses, data): (Vec<_>, Vec<_>) = nodes.iter().partition(|(at, _)| at.region == WITNESS_REGION);
    let distinct = |domain: fn(&Location) -> &str| {
        data.iter().map(|(at, _)| domain(at)).collect::<std::collections::BTreeSet<_>>().len()
    };
    let two_sites = distinct(|at| &at.region) == 2 || distinct(|at| &at.zone) == 2;
    let third = witnesses.into_iter().next().filter(|_| two_sites && members > 1);
    let mut chosen: Vec<&(Location, StoreId)> = Vec::new();
    while chosen.len() < members - usize::from(third.is_some()) {
        let sharing = |candidate: &Location| {
            let same_region = chosen.iter().filter(|(at, _)| at.region == candidate.region).count();
            let same_zone = chosen.iter().filter(|(at, _)| at.zone == candidate.zone).count();
            (same_zone, same_region)
        };
        let free = data.iter().filter(|node| !chosen.contains(node));
        match free.min_by_key(|(at, _)| sharing(at)) {
            Some(next) => chosen.push(next),
            None => break,
        }
    }
    chosen.extend(third);
    chosen.into_iter().enumerate().map(|(n, (_, store))| (ReplicaId(n as u64 + 1), *store)).collect()
}

/// Makes the data directories of a cluster on loopback under `directory`. `random` is called for ids.
pub fn create_loopback(
    directory: &Path,
    plan: &LoopbackPlan,
    mut random: impl FnMut() -> u128,
) -> Result<Nodes, UserError> {
    let nodes: Vec<(Location, StoreId)> =
        locations(plan).into_iter().map(|location| (location, StoreId(random().max(1)))).collect();
    if nodes.is_empty() || nodes.len() > 250 {
        return Err(UserError::new(ErrorCode::InvalidArgument, "a cluster has 1 to 250 nodes")
            .hint("see --regions, --zones and --nodes-per-zone"));
    }
    let cluster = ClusterId(random().max(1));
    let failed = |error: &dyn std::fmt::Display| UserError::new(ErrorCode::Internal, error.to_string());
    let authority = Authority::create(cluster).map_err(|error| failed(&error))?;
    // A network of its own on loopback, so that two clusters on a machine do not meet.
    let (a, b) = ((random() % 200) as u8 + 30, (random() % 250) as u8);
    let peers: Vec<PeerConfig> = nodes
        .iter()
        .enumerate()
        .map(|(n, (location, store))| PeerConfig {
            store: *store,
            node: location.node.clone(),
            address: format!("127.{a}.{b}.{}:{PORT}", n + 1),
        })
        .collect();
    let mut made = Vec::new();
    for ((location, store), peer) in nodes.iter().zip(&peers) {
        let config = NodeConfig {
            cluster,
            location: location.clone(),
            store: *store,
            listen: peer.address.clone(),
            peers: peers.clone(),
            catalog: catalog(&nodes),
            metrics: peer
                .address
                .strip_suffix(&format!(":{PORT}"))
                .map(|host| format!("{host}:{METRICS_PORT}")),
            lost_after_seconds: plan.lost_after_seconds,
            journal_bytes: plan.journal_bytes,
            capacity_bytes: None,
            scrub: ScrubConfig::default(),
            allow_faults: true,
            disk: plan.disk,
            io_engine: plan.io_engine,
            witness: location.region == WITNESS_REGION,
            witness_log_bytes: holdfast_types::limits::WITNESS_LOG_BYTES,
        };
        let path = directory.join(location.node.as_str());
        std::fs::create_dir_all(&path).map_err(|error| failed(&error))?;
        let credentials = authority.issue(&location.node).map_err(|error| failed(&error))?;
        config.write(&Layout::new(&path), &credentials)?;
        made.push((path, config));
    }
    Ok(made)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_catalog_spreads_over_zones() {
        let plan = LoopbackPlan {
            regions: 1,
            zones: 3,
            nodes_per_zone: 2,
            witness: false,
            lost_after_seconds: 600,
            journal_bytes: 64 << 20,
            disk: DiskMode::Plain,
            io_engine: IoEngine::default(),
        };
        let nodes: Vec<_> =
            locations(&plan).into_iter().enumerate().map(|(n, at)| (at, StoreId(n as u128 + 1))).collect();
        let members = catalog(&nodes);
        assert_eq!(members.values().map(|store| store.0).collect::<Vec<_>>(), [1, 3, 5]);
        assert_eq!(catalog(&nodes[..2]).len(), 1);
    }

    #[test]
    fn the_third_vote_of_two_sites_is_the_witness_node_s() {
        let members = |regions, zones| {
            let plan = LoopbackPlan {
                regions,
                zones,
                nodes_per_zone: 1,
                witness: true,
                lost_after_seconds: 600,
                journal_bytes: 64 << 20,
                disk: DiskMode::Plain,
                io_engine: IoEngine::default(),
            };
            let places = locations(&plan).into_iter().enumerate();
            let nodes: Vec<_> = places.map(|(n, at)| (at, StoreId(n as u128 + 1))).collect();
            let names = |store: &StoreId| nodes[store.0 as usize - 1].0.node.to_string();
            catalog(&nodes).values().map(names).collect::<Vec<_>>()
        };
        assert_eq!(members(1, 2), ["r1-z1-n1", "r1-z2-n1", "w-z1-n1"]);
        assert_eq!(members(2, 1), ["r1-z1-n1", "r2-z1-n1", "w-z1-n1"]);
        assert_eq!(members(2, 2), ["r1-z1-n1", "r2-z1-n1", "w-z1-n1"], "no region has two of the three");
        assert_eq!(members(1, 3), ["r1-z1-n1", "r1-z2-n1", "r1-z3-n1"]);
    }
}
