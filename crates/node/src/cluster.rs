//! Making a new cluster whose nodes are all known: an authority, and a data directory per node.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use holdfast_env::Driver;
use holdfast_protocol::catalog::STORES_MAX;
use holdfast_types::{ClusterId, ErrorCode, Location, NodeName, ReplicaId, StoreId, UserError};
use holdfast_wire::pki::Authority;

use crate::config::{DiskMode, IoEngine, Layout, NodeConfig, PeerConfig, ScrubConfig, StoreConfig};

/// Members of a catalog.
const CATALOG_MEMBERS: usize = 3;
/// The port on which nodes of a loopback cluster listen; their addresses differ.
const PORT: u16 = 7400;
/// The region of a witness node: no other node is there.
const WITNESS_REGION: &str = "w";
/// The port on which they serve their metrics.
const METRICS_PORT: u16 = 7401;
/// The port on which the first of a node's other stores listens; the next ones follow.
const OTHER_PORT: u16 = 7402;

/// What a cluster on loopback looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoopbackPlan {
    /// Regions.
    pub regions: usize,
    /// Zones of each region.
    pub zones: usize,
    /// Nodes of each zone.
    pub nodes_per_zone: usize,
    /// Stores of each node that holds data.
    pub stores: usize,
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

/// The stores of a node beside its first one: directories in its data directory, as if each were a disk.
fn other_stores(
    plan: &LoopbackPlan,
    at: &Location,
    host: &str,
    random: &mut impl FnMut() -> u128,
) -> Vec<StoreConfig> {
    let count = if at.region == WITNESS_REGION { 1 } else { plan.stores };
    let other = |n: usize| StoreConfig {
        store: StoreId(random().max(1)),
        directory: format!("store-{}", n + 1).into(),
        listen: format!("{host}:{}", usize::from(OTHER_PORT) + n - 1),
        journal_bytes: None,
        capacity_bytes: None,
        io_engine: None,
    };
    (1..count).map(other).collect()
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
    if plan.stores == 0 || plan.stores > STORES_MAX {
        let message = format!("a node has 1 to {STORES_MAX} stores");
        return Err(UserError::new(ErrorCode::InvalidArgument, message).hint("see --stores"));
    }
    let cluster = ClusterId(random().max(1));
    let failed = |error: &dyn std::fmt::Display| UserError::new(ErrorCode::Internal, error.to_string());
    let authority = Authority::create(cluster).map_err(|error| failed(&error))?;
    // A network of its own on loopback, so that two clusters on a machine do not meet.
    let (a, b) = ((random() % 200) as u8 + 30, (random() % 250) as u8);
    let host = |n: usize| format!("127.{a}.{b}.{}", n + 1);
    let others: Vec<Vec<StoreConfig>> =
        nodes.iter().enumerate().map(|(n, (at, _))| other_stores(plan, at, &host(n), &mut random)).collect();
    let mut peers = Vec::new();
    for (n, ((location, store), others)) in nodes.iter().zip(&others).enumerate() {
        let peer = |store, address, other| PeerConfig { store, node: location.node.clone(), address, other };
        peers.push(peer(*store, format!("{}:{PORT}", host(n)), false));
        peers.extend(others.iter().map(|other| peer(other.store, other.listen.clone(), true)));
    }
    let mut made = Vec::new();
    for (n, ((location, store), other_stores)) in nodes.iter().zip(others).enumerate() {
        let config = NodeConfig {
            cluster,
            location: location.clone(),
            store: *store,
            other_stores,
            listen: format!("{}:{PORT}", host(n)),
            peers: peers.clone(),
            catalog: catalog(&nodes),
            metrics: Some(format!("{}:{METRICS_PORT}", host(n))),
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
            stores: 1,
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
    fn nodes_of_two_stores_are_made_and_read_and_impossible_ones_refused() {
        let place = tempfile::tempdir().expect("a place");
        let plan = LoopbackPlan {
            regions: 1,
            zones: 2,
            nodes_per_zone: 1,
            stores: 2,
            witness: true,
            lost_after_seconds: 600,
            journal_bytes: 64 << 20,
            disk: DiskMode::Plain,
            io_engine: IoEngine::default(),
        };
        let mut next = 0;
        let made = create_loopback(place.path(), &plan, || {
            next += 1;
            next
        });
        let (path, config) = made.expect("is made").swap_remove(0);
        let layout = Layout::new(&path);
        assert_eq!(NodeConfig::load(&layout).expect("is read"), config);
        assert_eq!(config.peers.len(), 5, "the witness node has one store");
        let node = config.location.node.as_str();
        assert_eq!(config.home_of(node), Ok(config.store));
        let other = config.other_stores[0].clone();
        assert_eq!(config.stores_of(node), Ok(vec![config.store, other.store]));
        assert_eq!(config.node_of(other.store), node);
        let (there, stores) = config.place(&other.store.to_string()).expect("a store is a place");
        assert_eq!((there.as_str(), stores), (node, vec![other.store]));
        let refused = |change: &dyn Fn(&mut NodeConfig)| {
            let mut changed = config.clone();
            change(&mut changed);
            let json = serde_json::to_vec(&changed).expect("JSON");
            std::fs::write(layout.config(), json).expect("writes");
            NodeConfig::load(&layout).expect_err("it cannot be").message
        };
        for (what, change) in [
            (
                "named twice",
                &(|c: &mut NodeConfig| c.other_stores[0].store = c.store) as &dyn Fn(&mut NodeConfig),
            ),
            ("listen on", &|c| c.other_stores[0].listen = c.listen.clone()),
            ("one store alone", &|c| c.other_stores[0].directory = "store/below".into()),
            ("one store", &|c| c.witness = true),
            ("first store", &|c| c.catalog = [(ReplicaId(9), c.other_stores[0].store)].into()),
            ("two first stores", &|c| c.peers[1].other = false),
            ("more than", &|c| c.other_stores = vec![c.other_stores[0].clone(); STORES_MAX]),
        ] {
            let said = refused(change);
            assert!(said.contains(what), "{what}: {said}");
        }
        let overrides = crate::daemon::Overrides { capacity_bytes: Some(1 << 30), ..Default::default() };
        let said = overrides.apply(config.clone()).expect_err("it names no store").message;
        assert!(said.contains("--capacity"), "{said}");
    }

    #[test]
    fn the_third_vote_of_two_sites_is_the_witness_node_s() {
        let members = |regions, zones| {
            let plan = LoopbackPlan {
                regions,
                zones,
                nodes_per_zone: 1,
                stores: 1,
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
