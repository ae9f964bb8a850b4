//! `node.json`: who a node is. Written once, when the node is made.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use holdfast_env::real::sync_directory;
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
}

/// A node's configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    /// The cluster.
    pub cluster: ClusterId,
    /// Where the node stands, and its name.
    pub location: Location,
    /// Its store; drawn when the node is made.
    pub store: StoreId,
    /// Where it listens for its peers, `host:port`.
    pub listen: String,
    /// All nodes, this one included.
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

fn write_private(path: &Path, text: &str) -> Result<(), UserError> {
    use std::os::unix::fs::OpenOptionsExt;
    let file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path);
    file.and_then(|mut file| {
        std::io::Write::write_all(&mut file, text.as_bytes())?;
        file.sync_all()
    })
    .map_err(|error| unreadable(path, error))
}

/// Makes a file whose being there is all it says; durable when it returns.
pub(crate) fn mark(path: &Path) -> Result<(), UserError> {
    write_private(path, "")?;
    let parent = path.parent().unwrap_or(Path::new("."));
    sync_directory(parent).map_err(|error| unreadable(parent, error))
}

impl NodeConfig {
    /// Reads the configuration of a data directory.
    pub fn load(layout: &Layout) -> Result<Self, UserError> {
        let path = layout.config();
        let text = std::fs::read_to_string(&path).map_err(|error| unreadable(&path, error))?;
        serde_json::from_str(&text).map_err(|error| unreadable(&path, error))
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

    /// The store of a node.
    pub fn store_of(&self, node: &str) -> Result<StoreId, UserError> {
        self.peers.iter().find(|peer| peer.node.as_str() == node).map(|peer| peer.store).ok_or_else(|| {
            UserError::new(ErrorCode::NotFound, format!("there is no node {node}"))
                .hint("`holdfast node list` shows them all")
        })
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
