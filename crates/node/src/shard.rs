//! A node's shard: its store, everything that stands on it, and the sessions that run here.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use holdfast_catalog::{CatalogClient, MemberOptions, Seat};
use holdfast_env::Instant;
use holdfast_env::disk::Directory;
use holdfast_env::real::disk::{OpenError, RealDirectory};
use holdfast_env::real::powercut::{self, PowerCutDirectory};
use holdfast_frontend::kernel;
use holdfast_frontend::nbd::NbdServer;
use holdfast_protocol::catalog::{CatalogCommand, NodeRecord};
use holdfast_replica::{GroupEnvironment, Host, Timers, administration};
use holdfast_session::Sessions;
use holdfast_store::journal::{Journal, StoreOptions};
use holdfast_store::{Budget, StoreError, StoreIdentity};
use holdfast_types::{DaemonStart, ErrorCode, StoreId, UserError};
use holdfast_wire::rpc::Rpc;
use holdfast_wire::tcp::{Faults, Peer, TcpNetwork, answers_as};
use holdfast_wire::tls::Tls;

use crate::attachments::Attachments;
use crate::config::{DiskMode, Layout, NodeConfig, load_credentials};
use crate::daemon::Overrides;
use crate::filling::{self, Fillings};
use crate::forward;

/// Segments of the journal.
const SEGMENTS: u64 = 16;
/// Between tries to tell the catalog about this node.
const REGISTER_PAUSE: Duration = Duration::from_secs(1);

/// A running shard.
pub(crate) struct Shard {
    pub(crate) config: NodeConfig,
    pub(crate) layout: Layout,
    pub(crate) start: DaemonStart,
    pub(crate) network: Rc<TcpNetwork>,
    pub(crate) rpc: Rpc,
    pub(crate) host: Rc<Host>,
    pub(crate) sessions: Rc<Sessions>,
    pub(crate) catalog: CatalogClient,
    pub(crate) nbd: NbdServer,
    pub(crate) attachments: Attachments,
    pub(crate) fillings: Fillings,
    pub(crate) timers: Timers,
    /// Runs for as long as the shard does.
    _seat: Option<Rc<Seat>>,
}

fn failed(what: &str, error: impl std::fmt::Display) -> UserError {
    UserError::new(ErrorCode::Internal, format!("{what}: {error}"))
}

fn store_error(error: StoreError) -> UserError {
    let hint = match &error {
        StoreError::Identity { .. } => "give each daemon its own data directory",
        StoreError::Io { full: true, .. } => "make room on the medium",
        StoreError::Capacity { .. } => "let it take more (--capacity, or `capacity_bytes` in node.json)",
        _ => {
            "if the disk is bad, give the node an empty data directory; the other replicas heal what is lost"
        }
    };
    failed("the store", error).hint(hint)
}

fn options(config: &NodeConfig) -> StoreOptions {
    let segment = (config.journal_bytes / SEGMENTS).next_multiple_of(4096).max(4 << 20);
    StoreOptions { segment_bytes: segment, segments: SEGMENTS as u32 }
}

/// The directory as the configuration wants it to behave when the daemon is killed.
fn with_disk_mode(config: &NodeConfig, real: Rc<RealDirectory>) -> Result<Rc<dyn Directory>, UserError> {
    let mode = match config.disk {
        DiskMode::Plain => return Ok(real),
        _ if !config.allow_faults => {
            return Err(UserError::new(
                ErrorCode::Refused,
                "a disk that loses writes is for development only",
            )
            .hint("remove `disk` from node.json"));
        }
        DiskMode::Discard => powercut::Mode::Discard,
        DiskMode::Tear => powercut::Mode::Tear,
        DiskMode::Lie => powercut::Mode::Lie,
    };
    Ok(PowerCutDirectory::new(real, mode))
}

async fn open_store(
    config: &NodeConfig,
    layout: &Layout,
) -> Result<(Rc<dyn Directory>, StoreIdentity, bool), UserError> {
    let real = RealDirectory::open_with(&layout.store(), config.io_engine.into()).map_err(|error| {
        let hint = match &error {
            OpenError::NoRing(_) => "start it with --io-engine threads, or set `io_engine` in node.json",
            OpenError::InUse(_) => "stop the other daemon, or give this one its own data directory",
            OpenError::Io { .. } => "look whether the data directory can be written",
        };
        UserError::new(ErrorCode::Refused, error.to_string()).hint(hint)
    })?;
    tracing::info!(engine = ?real.engine(), "the store's files are open");
    let directory = with_disk_mode(config, real)?;
    let identity =
        StoreIdentity { cluster: config.cluster, node: config.location.node.clone(), store: config.store };
    let fresh = match Journal::identity_of(&directory).await {
        Ok(_) => false,
        Err(StoreError::NotFormatted(_)) => true,
        Err(error) => return Err(store_error(error)),
    };
    if fresh {
        let planned = options(config);
        let journal = u64::from(planned.segments).saturating_mul(planned.segment_bytes);
        Budget::check(config.capacity_bytes, journal).map_err(store_error)?;
        Journal::format(directory.clone(), &identity, &planned).await.map_err(store_error)?;
    }
    Ok((directory, identity, fresh))
}

/// Refuses to be a second node of one identity: nobody may answer at this node's address before it listens there.
async fn refuse_second(config: &NodeConfig, tls: &Tls) -> Result<(), UserError> {
    let node = &config.location.node;
    let own = config.peers.iter().find(|peer| peer.store == config.store);
    let address = own.map_or(&config.listen, |peer| &peer.address);
    if !answers_as(tls, node, address).await {
        return Ok(());
    }
    Err(UserError::new(ErrorCode::Refused, format!("another daemon of node {node} answers at {address}"))
        .hint(
            "a copy of a data directory is the same node, not a second one: stop the other daemon first, \
         or make a data directory of its own for a new node",
        ))
}

impl Shard {
    /// Opens the store, starts its replicas, and listens.
    pub(crate) async fn start(layout: Layout, overrides: &Overrides) -> Result<Rc<Self>, UserError> {
        let config = overrides.apply(NodeConfig::load(&layout)?);
        let (directory, identity, fresh) = open_store(&config, &layout).await?;
        let credentials = load_credentials(&layout)?;
        let tls = Tls::new(config.cluster, &credentials)
            .and_then(|tls| tls.check_own(&credentials, &config.location.node).map(|()| tls))
            .map_err(|error| {
                failed("the node's certificate", error).hint(
                    "pki/ and node.json of a data directory belong together: restore both from one node",
                )
            })?;
        refuse_second(&config, &tls).await?;
        let network = TcpNetwork::listen(config.store, &config.listen, tls).await.map_err(|error| {
            failed(&format!("cannot listen on {}", config.listen), error)
                .hint("is another daemon running there?")
        })?;
        let peer = |peer: &crate::config::PeerConfig| {
            (peer.store, Peer { node: peer.node.clone(), address: peer.address.clone() })
        };
        network.set_peers(config.peers.iter().map(peer).collect());
        let rpc = Rpc::new(network.clone());
        let timers = Timers::default();
        let silence = if fresh { Duration::ZERO } else { timers.startup_silence() };
        let environment =
            GroupEnvironment { rpc: rpc.clone(), timers, silent_until: Instant::now() + silence };
        let (planned, capacity) = (options(&config), config.capacity_bytes);
        let opened = Host::open_within(environment, directory, identity, &planned, capacity);
        let host = opened.await.map_err(store_error)?;
        if config.witness {
            host.take_witnesses_only(config.witness_log_bytes);
        }
        let member_options = MemberOptions { lost_after: Duration::from_secs(config.lost_after_seconds) };
        let stood = layout.catalog_stood().exists();
        let seat = Seat::start(&host, &config.catalog, member_options, stood).await?;
        if !stood && seat.as_ref().is_some_and(|seat| seat.is_taken()) {
            crate::config::mark(&layout.catalog_stood())?;
        }
        host.load().await.map_err(store_error)?;
        administration::serve(&host);
        // Before anything is attached: what is made later stands in the same places.
        match kernel::clean_aside(layout.devices()).await {
            Ok(0) => {}
            Ok(left) => tracing::info!(left, "removed mounts and devices that a killed daemon left"),
            Err(error) => tracing::error!(%error, "what a killed daemon left cannot be removed"),
        }
        let nbd = NbdServer::bind(&layout.nbd_socket()).map_err(|error| failed("the NBD socket", error))?;
        let shard = Rc::new(Self {
            catalog: CatalogClient::new(rpc.clone(), config.catalog.values().copied().collect()),
            sessions: Sessions::serve(&rpc),
            start: DaemonStart(holdfast_env::random_u128()),
            attachments: Attachments::load(&layout)?,
            fillings: Fillings::default(),
            _seat: seat,
            config,
            layout,
            network,
            rpc,
            host,
            nbd,
            timers,
        });
        forward::serve(&shard);
        filling::serve(&shard);
        holdfast_env::spawn("register", Self::register(Rc::downgrade(&shard)));
        holdfast_env::spawn("resume", shard.clone().resume_attachments());
        Ok(shard)
    }

    /// Tells the catalog where this node is, until it knows.
    async fn register(shard: std::rc::Weak<Self>) {
        loop {
            let Some(this) = shard.upgrade() else { return };
            let own = this.config.peers.iter().find(|peer| peer.store == this.config.store);
            let node = NodeRecord {
                location: this.config.location.clone(),
                store: this.config.store,
                peer_address: own.map_or_else(|| this.config.listen.clone(), |peer| peer.address.clone()),
                admin: format!("unix:{}", this.layout.admin_socket().display()),
                cordoned: false,
                witness: this.config.witness,
            };
            let command = CatalogCommand::PutNode { cluster: this.config.cluster, node };
            match this.catalog.apply(command, Duration::from_secs(5)).await {
                Ok(_) => return,
                Err(error) if error.code == ErrorCode::Unavailable => {
                    tracing::debug!(%error, "the catalog does not know this node yet");
                }
                Err(error) => {
                    tracing::error!(%error, hint = error.hint, "the catalog refuses this node");
                    return;
                }
            }
            drop(this);
            holdfast_env::sleep(REGISTER_PAUSE).await;
        }
    }

    /// Replaces the faults between this node and others; refused outside development clusters.
    pub(crate) fn set_faults(
        &self,
        block_send: &[String],
        block_receive: &[String],
        delay_us: &BTreeMap<String, u64>,
    ) -> Result<(), UserError> {
        if !self.config.allow_faults {
            return Err(UserError::new(ErrorCode::Refused, "this node does not take faults")
                .hint("set allow_faults in node.json of a development cluster; never in production"));
        }
        let stores = |names: &[String]| -> Result<_, UserError> {
            names.iter().map(|name| self.config.store_of(name)).collect()
        };
        let delay: Result<BTreeMap<StoreId, Duration>, UserError> = delay_us
            .iter()
            .map(|(name, us)| Ok((self.config.store_of(name)?, Duration::from_micros(*us))))
            .collect();
        let (block_send, block_receive, delay) = (stores(block_send)?, stores(block_receive)?, delay?);
        self.network.set_faults(Faults { block_send, block_receive, delay });
        Ok(())
    }
}
