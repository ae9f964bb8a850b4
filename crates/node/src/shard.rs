//! A node's first shard: its first store, the sessions that run on the node, and the threads of its other stores.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use holdfast_catalog::CatalogClient;
use holdfast_env::real::breaking::DiskFault;
use holdfast_frontend::kernel;
use holdfast_frontend::nbd::NbdServer;
use holdfast_protocol::catalog::{CatalogCommand, NodeRecord, StoreRecord};
use holdfast_replica::Timers;
use holdfast_session::Sessions;
use holdfast_types::{DaemonStart, ErrorCode, StoreId, UserError};
use holdfast_wire::rpc::Rpc;
use holdfast_wire::tcp::{Faults, TcpNetwork, answers_as};
use holdfast_wire::tls::Tls;

use crate::attachments::Attachments;
use crate::config::{Layout, NodeConfig, StorePlan, hold, load_credentials};
use crate::daemon::Overrides;
use crate::filling::{self, Fillings};
use crate::forward;
use crate::store::{LocalStore, open_directory};
use crate::threads::{self, StoreThread};

/// Between tries to tell the catalog about this node.
const REGISTER_PAUSE: Duration = Duration::from_secs(1);

/// Between times that the catalog is told of a node of several stores again.
const REGISTER_AGAIN: Duration = Duration::from_secs(60);

/// A running shard.
pub(crate) struct Shard {
    pub(crate) config: NodeConfig,
    pub(crate) layout: Layout,
    pub(crate) start: DaemonStart,
    pub(crate) network: Rc<TcpNetwork>,
    pub(crate) rpc: Rpc,
    /// The node's first store. Sessions use its address, and need its disk no more than any other.
    pub(crate) store: Rc<LocalStore>,
    /// The others.
    pub(crate) others: Vec<StoreThread>,
    pub(crate) sessions: Rc<Sessions>,
    pub(crate) catalog: CatalogClient,
    pub(crate) nbd: NbdServer,
    pub(crate) attachments: Attachments,
    pub(crate) fillings: Fillings,
    pub(crate) timers: Timers,
    /// The cluster authority's certificate, as PEM.
    pub(crate) authority: String,
    /// Its data directory, for as long as the daemon runs.
    _held: std::fs::File,
}

/// What others want to befall this node's traffic and disks, for tests.
#[derive(Clone, Debug, Default)]
pub(crate) struct NodeFaults {
    pub(crate) block_send: Vec<String>,
    pub(crate) block_receive: Vec<String>,
    pub(crate) delay_us: BTreeMap<String, u64>,
    /// What the disks of stores do, by id or directory.
    pub(crate) disks: BTreeMap<String, String>,
}

/// Refuses to be a second node of one identity: nobody may answer at this node's address before it listens there.
async fn refuse_second(config: &NodeConfig, first: &StorePlan, tls: &Tls) -> Result<(), UserError> {
    let (node, address) = (&config.location.node, config.reached_at(first));
    if !answers_as(tls, node, &address).await {
        return Ok(());
    }
    Err(UserError::new(ErrorCode::Refused, format!("another daemon of node {node} answers at {address}"))
        .hint(
            "a copy of a data directory is the same node, not a second one: stop the other daemon first, \
         or make a data directory of its own for a new node",
        ))
}

impl Shard {
    /// Opens the stores, starts their replicas, and listens. A node of one store is nothing without it; one of several
    /// serves with those that can be opened (INV-STORES), and does not wait for any.
    pub(crate) async fn start(layout: Layout, overrides: &Overrides) -> Result<Rc<Self>, UserError> {
        let config = overrides.apply(NodeConfig::load(&layout)?)?;
        let held = hold(&layout)?;
        let credentials = load_credentials(&layout)?;
        let tls = || threads::tls(&config, &credentials);
        let mut plans = config.plans(&layout).into_iter();
        let first = plans.next().ok_or_else(|| UserError::new(ErrorCode::Internal, "a node has a store"))?;
        let is_alone = config.other_stores.is_empty();
        let directory = if is_alone { Some(open_directory(&config, &first).await?) } else { None };
        refuse_second(&config, &first, &tls()?).await?;
        let store = LocalStore::listen(&config, first, tls()?).await?;
        let others = plans.map(|plan| StoreThread::start(&config, &layout, plan, tls()?));
        let others = others.collect::<Result<Vec<_>, UserError>>()?;
        if is_alone {
            store.open(&config, &layout, directory).await?;
        } else {
            let (store, config, layout) = (store.clone(), config.clone(), layout.clone());
            holdfast_env::spawn("store-open", async move {
                // What went wrong is in the log, and told to whoever asks the store.
                let _told = store.open(&config, &layout, None).await;
            });
        }
        // Before anything is attached: what is made later stands in the same places.
        match kernel::clean_aside(layout.devices()).await {
            Ok(0) => {}
            Ok(left) => tracing::info!(left, "removed mounts and devices that a killed daemon left"),
            Err(error) => tracing::error!(%error, "what a killed daemon left cannot be removed"),
        }
        let nbd = NbdServer::bind(&layout.nbd_socket())
            .map_err(|error| UserError::new(ErrorCode::Internal, format!("the NBD socket: {error}")))?;
        let (network, rpc) = (store.network.clone(), store.rpc.clone());
        let near = others.iter().map(|other| other.plan.store).collect();
        let shard = Rc::new(Self {
            catalog: CatalogClient::new(rpc.clone(), config.catalog.values().copied().collect()),
            sessions: Sessions::serve_near(&rpc, near),
            start: DaemonStart(holdfast_env::random_u128()),
            attachments: Attachments::load(&layout)?,
            fillings: Fillings::default(),
            authority: credentials.authority,
            config,
            layout,
            network,
            rpc,
            store,
            others,
            nbd,
            timers: Timers::default(),
            _held: held,
        });
        forward::serve(&shard);
        filling::serve(&shard);
        holdfast_env::spawn("register", Self::register(Rc::downgrade(&shard)));
        holdfast_env::spawn("resume", shard.clone().resume_attachments());
        Ok(shard)
    }

    /// This node as the catalog is to know it.
    fn node_record(&self) -> NodeRecord {
        let has_others = !self.others.is_empty();
        let of_store = |plan: &StorePlan| StoreRecord {
            store: plan.store,
            peer_address: self.config.reached_at(plan),
            // Where it stands is told where there is more than one.
            directory: match has_others {
                true => std::path::absolute(&plan.directory).unwrap_or_else(|_| plan.directory.clone()),
                false => std::path::PathBuf::new(),
            }
            .display()
            .to_string(),
        };
        let first = of_store(&self.store.plan);
        NodeRecord {
            location: self.config.location.clone(),
            store: first.store,
            peer_address: first.peer_address,
            admin: format!("unix:{}", self.layout.admin_socket().display()),
            cordoned: false,
            witness: self.config.witness,
            directory: first.directory,
            others: self.others.iter().map(|other| of_store(&other.plan)).collect(),
        }
    }

    /// Whether the catalog knows all stores of this node, or cannot be asked now.
    async fn is_known(&self, node: &NodeRecord) -> bool {
        let Ok(state) = self.catalog.state(Duration::from_secs(5)).await else { return true };
        let known = state.nodes.get(&node.location.node);
        known.is_some_and(|known| node.stores().all(|store| known.has(store.store)))
    }

    /// Tells the catalog where this node is, and looks now and then whether it knows: a member of before there were several
    /// stores forgets the others.
    async fn register(shard: std::rc::Weak<Self>) {
        let mut is_known = false;
        loop {
            let Some(this) = shard.upgrade() else { return };
            let (mut pause, node) = (REGISTER_PAUSE, this.node_record());
            if is_known && this.is_known(&node).await {
                drop(this);
                holdfast_env::sleep(REGISTER_AGAIN).await;
                continue;
            }
            let command = CatalogCommand::PutNode { cluster: this.config.cluster, node };
            match this.catalog.apply(command, Duration::from_secs(5)).await {
                Ok(_) if this.others.is_empty() => return,
                Ok(_) => (is_known, pause) = (true, REGISTER_AGAIN),
                Err(error) if error.code == ErrorCode::Unavailable => {
                    tracing::debug!(%error, "the catalog does not know this node yet");
                }
                Err(error) => {
                    tracing::error!(%error, hint = error.hint, "the catalog refuses this node");
                    return;
                }
            }
            drop(this);
            holdfast_env::sleep(pause).await;
        }
    }

    /// The stores of a volume's replicas, those of this node first, and of these the one on this shard.
    pub(crate) fn nearest_first(&self, stores: &mut [StoreId]) {
        let is_other = |store: &StoreId| self.others.iter().any(|other| other.plan.store == *store);
        stores.sort_by_key(|store| (*store != self.config.store, !is_other(store)));
    }

    /// Replaces the faults between this node and others, and of its disks; refused outside development clusters.
    pub(crate) async fn set_faults(&self, wanted: NodeFaults) -> Result<(), UserError> {
        if !self.config.allow_faults {
            return Err(UserError::new(ErrorCode::Refused, "this node does not take faults")
                .hint("set allow_faults in node.json of a development cluster; never in production"));
        }
        let stores = |names: &[String]| -> Result<_, UserError> {
            let of_each: Result<Vec<_>, _> = names.iter().map(|name| self.config.stores_of(name)).collect();
            Ok(of_each?.into_iter().flatten().collect())
        };
        let mut delay = BTreeMap::new();
        for (name, us) in &wanted.delay_us {
            let of_node = self.config.stores_of(name)?.into_iter();
            delay.extend(of_node.map(|store| (store, Duration::from_micros(*us))));
        }
        let faults = Faults {
            block_send: stores(&wanted.block_send)?,
            block_receive: stores(&wanted.block_receive)?,
            delay,
        };
        let disks = self.disk_faults(&wanted.disks)?;
        let fault = |plan: &StorePlan| disks.get(&plan.store).copied().unwrap_or_default();
        for other in &self.others {
            let (faults, fault) = (faults.clone(), fault(&other.plan));
            other.handle.run(move |store| async move { store.set_faults(faults, fault) }).await?;
        }
        self.store.set_faults(faults, fault(&self.store.plan))
    }

    fn disk_faults(
        &self,
        wanted: &BTreeMap<String, String>,
    ) -> Result<BTreeMap<StoreId, DiskFault>, UserError> {
        let plans = || std::iter::once(&self.store.plan).chain(self.others.iter().map(|other| &other.plan));
        let mut faults = BTreeMap::new();
        for (name, fault) in wanted {
            let is_meant = |plan: &&StorePlan| {
                plan.store.to_string() == *name || plan.directory == self.layout.within(name.as_ref())
            };
            let plan = plans().find(is_meant).ok_or_else(|| {
                UserError::new(ErrorCode::NotFound, format!("this node has no store {name}"))
                    .hint("`holdfast node show` lists them with their directories")
            })?;
            let fault = match fault.as_str() {
                "fails" => DiskFault::Fails,
                "hangs" => DiskFault::Hangs,
                other => {
                    let message = format!("a disk cannot be made to do '{other}'");
                    return Err(UserError::new(ErrorCode::InvalidArgument, message).hint("fails or hangs"));
                }
            };
            faults.insert(plan.store, fault);
        }
        Ok(faults)
    }
}
