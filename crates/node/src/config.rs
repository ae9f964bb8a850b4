//! `node.json`: who a node is. Written once, when the node is made.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use holdfast_env::real::sync_directory;
use holdfast_protocol::catalog::STORES_MAX;
use holdfast_replica::scrub::ScrubOptions;
use holdfast_types::{ClusterId, ErrorCode, Location, NodeName, ReplicaId, StoreId, UserError};
use holdfast_wire::pki::Credentials;
use serde::{Deserialize, Serialize};

/// A node of the cluster, as others reach it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerConfig {
    /// Its store.
    pub store: StoreId,
    /// Its name, which its certificate shows.
    pub node: NodeName,
    /// `host:port`.
    pub address: String,
    /// It is one of a node's other stores: no sessions run beside it, and nobody asks the node there.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub other: bool,
}

/// A store of a node beside its first one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreConfig {
    /// The store; drawn when it is added.
    pub store: StoreId,
    /// Where it stands: a directory of a disk of its own, beginning in the data directory if it is not absolute.
    pub directory: PathBuf,
    /// Where it listens for its peers, `host:port`.
    pub listen: String,
    /// Bytes of its journal; left out, those of the first store's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub journal_bytes: Option<u64>,
    /// Bytes of its medium that it may take, journal and reserve included; left out, all that it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity_bytes: Option<u64>,
    /// How its files are read and written; left out, as the first store's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_engine: Option<IoEngine>,
}

/// What a store of this node is, the first one or another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StorePlan {
    pub(crate) store: StoreId,
    pub(crate) directory: PathBuf,
    pub(crate) listen: String,
    pub(crate) journal_bytes: u64,
    pub(crate) capacity_bytes: Option<u64>,
    pub(crate) io_engine: IoEngine,
    /// Is there once the store was made, so that an empty directory is a disk that is not there. None for the only store
    /// of a node.
    pub(crate) stood: Option<PathBuf>,
}

/// A node's configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    /// The cluster.
    pub cluster: ClusterId,
    /// Where the node stands, and its name.
    pub location: Location,
    /// Its first store, which stands in the data directory and has the node's member of the catalog if there is one.
    /// Drawn when the node is made.
    pub store: StoreId,
    /// Its other stores, each on a disk of its own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub other_stores: Vec<StoreConfig>,
    /// Where it listens for its peers, `host:port`.
    pub listen: String,
    /// The stores of all nodes, those of this one included.
    pub peers: Vec<PeerConfig>,
    /// The catalog's members.
    pub catalog: BTreeMap<ReplicaId, StoreId>,
    /// Where it serves its metrics over HTTP, `host:port`; not at all if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<String>,
    /// Seconds without an answer after which a node is lost and its replicas are placed elsewhere.
    #[serde(default = "default_lost_after")]
    pub lost_after_seconds: u64,
    /// Bytes of the journal.
    #[serde(default = "default_journal_bytes")]
    pub journal_bytes: u64,
    /// Bytes of its medium that the store may take, journal and reserve included; left out, all that it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity_bytes: Option<u64>,
    /// How the store is scrubbed.
    #[serde(default)]
    pub scrub: ScrubConfig,
    /// Whether faults may be put between this node and others (development and tests).
    #[serde(default)]
    pub allow_faults: bool,
    /// What happens to unflushed writes when the daemon is killed; anything but `plain` needs `allow_faults`.
    #[serde(default)]
    pub disk: DiskMode,
    /// How the store's files are read and written.
    #[serde(default)]
    pub io_engine: IoEngine,
    /// The node takes witnesses only: it votes for volumes and holds no data.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub witness: bool,
    /// As a witness: bytes that the log of one volume may hold for a data replica that is away.
    #[serde(default = "default_witness_log_bytes")]
    pub witness_log_bytes: u64,
}

/// How files are read, written and flushed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum IoEngine {
    /// io_uring where the kernel allows it, else threads.
    Auto,
    /// io_uring; the daemon refuses to start without it.
    Uring,
    /// Blocking calls on a few threads.
    #[default]
    Threads,
}

impl From<IoEngine> for holdfast_env::real::disk::IoEngine {
    fn from(engine: IoEngine) -> Self {
        match engine {
            IoEngine::Auto => Self::Auto,
            IoEngine::Uring => Self::Uring,
            IoEngine::Threads => Self::Threads,
        }
    }
}

/// How a node scrubs its store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ScrubConfig {
    /// Seconds from the beginning of a pass to that of the next, counting the time that the daemon runs.
    pub period_seconds: u64,
    /// Bytes that it reads in a second, at most.
    pub bytes_per_second: u64,
}

impl Default for ScrubConfig {
    fn default() -> Self {
        let options = ScrubOptions::default();
        Self { period_seconds: options.period.as_secs(), bytes_per_second: options.bytes_per_second }
    }
}

impl ScrubConfig {
    /// As the store's task takes it.
    pub fn options(&self) -> ScrubOptions {
        let period = std::time::Duration::from_secs(self.period_seconds);
        ScrubOptions { period, bytes_per_second: self.bytes_per_second }
    }
}

/// What happens to unflushed writes when the daemon is killed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum DiskMode {
    /// The page cache keeps them, as it does when a process is killed.
    #[default]
    Plain,
    /// They are gone, as after a power cut.
    Discard,
    /// They are gone in part.
    Tear,
    /// So is what was flushed: a disk that lies. Loses data; shows that tests notice.
    Lie,
}

fn default_lost_after() -> u64 {
    600
}

fn default_witness_log_bytes() -> u64 {
    holdfast_types::limits::WITNESS_LOG_BYTES
}

fn default_journal_bytes() -> u64 {
    256 << 20
}

/// Where things are within a data directory.
#[derive(Clone, Debug)]
pub struct Layout(PathBuf);

impl Layout {
    /// Of this data directory.
    pub fn new(directory: &Path) -> Self {
        Self(directory.to_owned())
    }
    /// The configuration.
    pub fn config(&self) -> PathBuf {
        self.0.join("node.json")
    }
    /// The store.
    pub fn store(&self) -> PathBuf {
        self.0.join("store")
    }
    /// A directory as the configuration names it.
    pub fn within(&self, directory: &Path) -> PathBuf {
        self.0.join(directory)
    }
    /// Is there once another store of the node was made.
    pub fn stood(&self, store: StoreId) -> PathBuf {
        self.0.join("stores").join(format!("{store}-stood"))
    }
    /// Held by the daemon.
    pub fn lock(&self) -> PathBuf {
        self.0.join("lock")
    }
    /// The admin API's socket.
    pub fn admin_socket(&self) -> PathBuf {
        self.0.join("admin.sock")
    }
    /// The NBD socket.
    pub fn nbd_socket(&self) -> PathBuf {
        self.0.join("nbd.sock")
    }
    /// What is attached here, so that a restarted daemon takes it over.
    pub fn attachments(&self) -> PathBuf {
        self.0.join("attachments.json")
    }
    /// Where attached volumes are mounted as files.
    pub fn devices(&self) -> PathBuf {
        self.0.join("devices")
    }
    /// Is there once a member of the catalog has stood in this store: without one it has lost it.
    pub fn catalog_stood(&self) -> PathBuf {
        self.0.join("catalog-stood")
    }
    fn pki(&self, name: &str) -> PathBuf {
        self.0.join("pki").join(name)
    }
}

fn unreadable(path: &Path, error: impl std::fmt::Display) -> UserError {
    UserError::new(ErrorCode::Internal, format!("{}: {error}", path.display()))
        .hint("is this the data directory of a node? `holdfast dev` makes a whole cluster")
}

fn no_node(node: &str) -> UserError {
    UserError::new(ErrorCode::NotFound, format!("there is no node {node}"))
        .hint("`holdfast node list` shows them all")
}

fn write_private(path: &Path, text: &str) -> Result<(), UserError> {
    use std::os::unix::fs::OpenOptionsExt;
    let file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path);
    file.and_then(|mut file| {
        std::io::Write::write_all(&mut file, text.as_bytes())?;
        file.sync_all()
    })
    .map_err(|error| unreadable(path, error))
}

/// Holds a data directory for one daemon, until the file is closed. Stores are held one by one, and may be away.
pub(crate) fn hold(layout: &Layout) -> Result<std::fs::File, UserError> {
    let path = layout.lock();
    let file = std::fs::File::create(&path).map_err(|error| unreadable(&path, error))?;
    let held = rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive);
    held.map(|()| file).map_err(|_| {
        UserError::new(ErrorCode::Refused, format!("{} is in use by another daemon", path.display()))
            .hint("stop the other daemon, or give this one its own data directory")
    })
}

/// Makes a file whose being there is all it says; durable when it returns.
pub(crate) fn mark(path: &Path) -> Result<(), UserError> {
    let parent = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent).map_err(|error| unreadable(parent, error))?;
    write_private(path, "")?;
    sync_directory(parent).map_err(|error| unreadable(parent, error))
}

impl NodeConfig {
    /// Reads the configuration of a data directory.
    pub fn load(layout: &Layout) -> Result<Self, UserError> {
        let path = layout.config();
        let text = std::fs::read_to_string(&path).map_err(|error| unreadable(&path, error))?;
        let config: Self = serde_json::from_str(&text).map_err(|error| unreadable(&path, error))?;
        config.check(layout)?;
        Ok(config)
    }

    /// Whether its stores can be those of one node.
    fn check(&self, layout: &Layout) -> Result<(), UserError> {
        let wrong = |message: String, hint: &str| {
            let path = layout.config();
            Err(UserError::new(ErrorCode::InvalidArgument, format!("{}: {message}", path.display()))
                .hint(hint))
        };
        if self.other_stores.len() >= STORES_MAX {
            let message = format!("{} stores are more than {STORES_MAX}", self.other_stores.len() + 1);
            return wrong(message, "put several disks into one store");
        }
        if self.witness && !self.other_stores.is_empty() {
            return wrong("a witness node has one store".into(), "remove `other_stores`");
        }
        let plans = self.plans(layout);
        for (n, plan) in plans.iter().enumerate() {
            let others = || plans.iter().skip(n + 1);
            if others().any(|other| other.store == plan.store) {
                return wrong(format!("store {} is named twice", plan.store), "draw an id for each store");
            }
            if others().any(|other| other.listen == plan.listen) {
                return wrong(format!("two stores listen on {}", plan.listen), "give each a port of its own");
            }
            let within = |other: &StorePlan| {
                other.directory.starts_with(&plan.directory) || plan.directory.starts_with(&other.directory)
            };
            if others().any(within) {
                let message = format!("{} is not of one store alone", plan.directory.display());
                return wrong(message, "give each store a directory of its own, outside of the others'");
            }
        }
        let is_other = |store: &StoreId| self.other_stores.iter().any(|other| other.store == *store);
        if self.catalog.values().any(is_other) {
            let message = "the catalog's member stands on the node's first store".to_owned();
            return wrong(message, "name the first stores of nodes in `catalog`");
        }
        let first = |peer: &&PeerConfig| !peer.other;
        for peer in self.peers.iter().filter(first) {
            if self.peers.iter().filter(first).filter(|other| other.node == peer.node).count() > 1 {
                let message = format!("node {} has two first stores among `peers`", peer.node);
                return wrong(message, "say `\"other\": true` of all but the first store of each node");
            }
        }
        Ok(())
    }

    /// What its stores are, the first one first.
    pub(crate) fn plans(&self, layout: &Layout) -> Vec<StorePlan> {
        let first = StorePlan {
            store: self.store,
            directory: layout.store(),
            listen: self.listen.clone(),
            journal_bytes: self.journal_bytes,
            capacity_bytes: self.capacity_bytes,
            io_engine: self.io_engine,
            stood: (!self.other_stores.is_empty()).then(|| layout.stood(self.store)),
        };
        let other = |other: &StoreConfig| StorePlan {
            store: other.store,
            directory: layout.within(&other.directory),
            listen: other.listen.clone(),
            journal_bytes: other.journal_bytes.unwrap_or(self.journal_bytes),
            capacity_bytes: other.capacity_bytes,
            io_engine: other.io_engine.unwrap_or(self.io_engine),
            stood: Some(layout.stood(other.store)),
        };
        std::iter::once(first).chain(self.other_stores.iter().map(other)).collect()
    }

    /// Where others reach a store of this node.
    pub(crate) fn reached_at(&self, plan: &StorePlan) -> String {
        let known = self.peers.iter().find(|peer| peer.store == plan.store);
        known.map_or_else(|| plan.listen.clone(), |peer| peer.address.clone())
    }

    /// Makes a data directory: configuration and credentials.
    pub fn write(&self, layout: &Layout, credentials: &Credentials) -> Result<(), UserError> {
        let pki = layout.pki("");
        std::fs::create_dir_all(&pki).map_err(|error| unreadable(&pki, error))?;
        write_private(&layout.pki("ca.pem"), &credentials.authority)?;
        write_private(&layout.pki("node.pem"), &credentials.certificate)?;
        write_private(&layout.pki("node.key"), &credentials.key)?;
        let json = serde_json::to_string_pretty(self).map_err(|error| unreadable(&layout.config(), error))?;
        write_private(&layout.config(), &json)?;
        // The entries too, up to that of the directory itself.
        let root = layout.config();
        for path in std::iter::once(pki.as_path()).chain(root.ancestors().skip(1).take(2)) {
            if !path.as_os_str().is_empty() {
                sync_directory(path).map_err(|error| unreadable(path, error))?;
            }
        }
        Ok(())
    }

    /// The name of a store's node, for messages.
    pub fn node_of(&self, store: StoreId) -> String {
        let peer = self.peers.iter().find(|peer| peer.store == store);
        peer.map_or_else(|| format!("store {store}"), |peer| peer.node.to_string())
    }

    /// Where a node is asked: at its first store.
    pub fn home_of(&self, node: &str) -> Result<StoreId, UserError> {
        let first = self.peers.iter().find(|peer| peer.node.as_str() == node && !peer.other);
        first.map(|peer| peer.store).ok_or_else(|| no_node(node))
    }

    /// All stores of a node.
    pub fn stores_of(&self, node: &str) -> Result<Vec<StoreId>, UserError> {
        let of_node = self.peers.iter().filter(|peer| peer.node.as_str() == node);
        let stores: Vec<StoreId> = of_node.map(|peer| peer.store).collect();
        if stores.is_empty() { Err(no_node(node)) } else { Ok(stores) }
    }

    /// The node that a place for a replica means, and its stores there: a node's, or the one of that id.
    pub fn place(&self, place: &str) -> Result<(NodeName, Vec<StoreId>), UserError> {
        if let Some(peer) = self.peers.iter().find(|peer| peer.store.to_string() == place) {
            return Ok((peer.node.clone(), vec![peer.store]));
        }
        Ok((NodeName::new(place), self.stores_of(place)?))
    }
}

/// The credentials of a data directory.
pub fn load_credentials(layout: &Layout) -> Result<Credentials, UserError> {
    let read = |name: &str| {
        let path = layout.pki(name);
        std::fs::read_to_string(&path).map_err(|error| unreadable(&path, error))
    };
    Ok(Credentials { authority: read("ca.pem")?, certificate: read("node.pem")?, key: read("node.key")? })
}
