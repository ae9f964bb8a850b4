//! One store of the node, on its shard's thread: its address, and what stands on it.
//!
//! INV-STORES: whatever becomes of a store, its address stays. One that cannot be opened says there why it does not serve,
//! and so does one whose disk has failed since; nothing else of the node ends with it.

use std::cell::{OnceCell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use holdfast_catalog::{MemberOptions, Seat};
use holdfast_env::Instant;
use holdfast_env::disk::Directory;
use holdfast_env::real::breaking::{BreakingDirectory, DiskFault};
use holdfast_env::real::disk::{OpenError, RealDirectory};
use holdfast_env::real::powercut::{self, PowerCutDirectory};
use holdfast_protocol::planted::is_planted;
use holdfast_replica::{GroupEnvironment, Host, Timers, administration};
use holdfast_store::journal::{Journal, StoreOptions};
use holdfast_store::{Budget, StoreError, StoreIdentity};
use holdfast_types::{ErrorCode, StoreId, UserError};
use holdfast_wire::rpc::Rpc;
use holdfast_wire::tcp::{Faults, Peer, TcpNetwork};
use holdfast_wire::tls::Tls;

use crate::config::{DiskMode, Layout, NodeConfig, StorePlan, mark};
use crate::voter;

/// Segments of the journal.
const SEGMENTS: u64 = 16;
/// Between tries to open a directory that is not there yet, or held.
pub(crate) const RETRY_PAUSE: Duration = Duration::from_secs(3);
/// Between looks whether a store has stopped.
const LOOK: Duration = Duration::from_millis(500);
/// How long replicas may take to stop. Nothing depends on it: a stop is a crash that was announced.
const STOP_DEADLINE: Duration = Duration::from_secs(5);

/// A store of this node.
pub(crate) struct LocalStore {
    pub(crate) plan: StorePlan,
    pub(crate) network: Rc<TcpNetwork>,
    pub(crate) rpc: Rpc,
    host: OnceCell<Rc<Host>>,
    /// Why it could not be opened.
    refused: RefCell<Option<UserError>>,
    /// Runs for as long as the store does.
    seat: OnceCell<Rc<Seat>>,
    /// Its disk, where it can be broken.
    disk: OnceCell<Rc<BreakingDirectory>>,
}

fn failed(what: &str, error: impl std::fmt::Display) -> UserError {
    UserError::new(ErrorCode::Internal, format!("{what}: {error}"))
}

fn store_error(plan: &StorePlan, error: &StoreError) -> UserError {
    let hint = match (error, &plan.stood) {
        (StoreError::Identity { .. }, _) => {
            "give each daemon its own data directory, and each store its own disk".to_owned()
        }
        (StoreError::Io { full: true, .. }, _) => "make room on the medium".to_owned(),
        (StoreError::Capacity { .. }, _) => {
            "let it take more (--capacity, or `capacity_bytes` in node.json)".to_owned()
        }
        (_, None) => {
            "if the disk is bad, give the node an empty data directory; the other replicas heal what is lost"
                .to_owned()
        }
        (_, Some(stood)) => format!(
            "if the disk is bad, give the store an empty directory on a good one and remove {}; the other replicas heal \
             what is lost",
            stood.display()
        ),
    };
    failed("the store", error).hint(hint)
}

fn options(plan: &StorePlan) -> StoreOptions {
    let segment = (plan.journal_bytes / SEGMENTS).next_multiple_of(4096).max(4 << 20);
    StoreOptions { segment_bytes: segment, segments: SEGMENTS as u32 }
}

/// A disk that is not mounted looks like an empty directory. Made anew there, a store would fill the medium below.
fn check_mounted(plan: &StorePlan) -> Result<(), UserError> {
    let Some(stood) = plan.stood.as_ref().filter(|stood| stood.exists()) else { return Ok(()) };
    let directory = plan.directory.display();
    let has_store = plan.directory.join("journal").exists();
    if has_store {
        return Ok(());
    }
    Err(UserError::new(ErrorCode::Refused, format!("{directory} holds no store, and once did")).hint(format!(
        "mount its disk; if it was replaced by an empty one, remove {} and start the daemon anew: the other replicas \
         heal what is lost",
        stood.display()
    )))
}

/// A store's directory, open and held, and who the store is.
pub(crate) struct OpenDirectory {
    directory: Rc<dyn Directory>,
    identity: StoreIdentity,
    fresh: bool,
    disk: Option<Rc<BreakingDirectory>>,
}

/// The directory as the configuration wants it to behave when the daemon is killed.
fn with_disk_mode(config: &NodeConfig, real: Rc<dyn Directory>) -> Result<Rc<dyn Directory>, UserError> {
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

/// Opens a store's directory, and makes the store if there is none. Fails if another daemon holds it.
pub(crate) async fn open_directory(
    config: &NodeConfig,
    plan: &StorePlan,
) -> Result<OpenDirectory, UserError> {
    check_mounted(plan)?;
    let real = RealDirectory::open_with(&plan.directory, plan.io_engine.into()).map_err(|error| {
        let hint = match &error {
            OpenError::NoRing(_) => "start it with --io-engine threads, or set `io_engine` in node.json",
            OpenError::InUse(_) => "stop the other daemon, or give this one its own data directory",
            OpenError::Io { .. } => "look whether the data directory can be written",
        };
        UserError::new(ErrorCode::Refused, error.to_string()).hint(hint)
    })?;
    tracing::info!(store = %plan.store, engine = ?real.engine(), "the store's files are open");
    let disk = config.allow_faults.then(|| BreakingDirectory::new(real.clone()));
    let breaking = disk.clone().map(|disk| -> Rc<dyn Directory> { disk });
    let directory = with_disk_mode(config, breaking.unwrap_or(real))?;
    let identity =
        StoreIdentity { cluster: config.cluster, node: config.location.node.clone(), store: plan.store };
    let fresh = match Journal::identity_of(&directory).await {
        Ok(_) => false,
        Err(StoreError::NotFormatted(_)) => true,
        Err(error) => return Err(store_error(plan, &error)),
    };
    if fresh {
        let planned = options(plan);
        let journal = u64::from(planned.segments).saturating_mul(planned.segment_bytes);
        Budget::check(plan.capacity_bytes, journal).map_err(|error| store_error(plan, &error))?;
        let formatted = Journal::format(directory.clone(), &identity, &planned).await;
        formatted.map_err(|error| store_error(plan, &error))?;
    }
    Ok(OpenDirectory { directory, identity, fresh, disk })
}

impl LocalStore {
    /// Listens at a store's address. Nothing is served there before [`Self::open`].
    pub(crate) async fn listen(
        config: &NodeConfig,
        plan: StorePlan,
        tls: Tls,
    ) -> Result<Rc<Self>, UserError> {
        let network = TcpNetwork::listen(plan.store, &plan.listen, tls).await.map_err(|error| {
            failed(&format!("cannot listen on {}", plan.listen), error)
                .hint("is another daemon running there?")
        })?;
        let node = &config.location.node;
        let own = config.other_stores.iter().map(|other| (other.store, &other.listen));
        let own = std::iter::once((config.store, &config.listen)).chain(own);
        let peer = |(store, address): (StoreId, &String)| {
            (store, Peer { node: node.clone(), address: address.clone() })
        };
        let mut peers: BTreeMap<StoreId, Peer> = own.map(peer).collect();
        // As others reach them, if that is written down.
        peers.extend(
            config
                .peers
                .iter()
                .map(|peer| (peer.store, Peer { node: peer.node.clone(), address: peer.address.clone() })),
        );
        network.set_peers(peers);
        let rpc = Rpc::new(network.clone());
        let (host, refused, seat) = (OnceCell::new(), RefCell::default(), OnceCell::new());
        Ok(Rc::new(Self { plan, network, rpc, host, refused, seat, disk: OnceCell::new() }))
    }

    /// Opens the store, whose directory may be open already, and starts what stands on it. If that is not to be, the store
    /// says why from then on. Without an open directory it waits for one: a disk may be mounted late, and a daemon before
    /// this one may hold it still.
    pub(crate) async fn open(
        self: &Rc<Self>,
        config: &NodeConfig,
        layout: &Layout,
        directory: Option<OpenDirectory>,
    ) -> Result<(), UserError> {
        let opened = match directory {
            Some(opened) => self.start(config, layout, opened).await,
            None => match self.wait_for_directory(config).await {
                Ok(opened) => self.start(config, layout, opened).await,
                Err(error) => Err(error),
            },
        };
        match &opened {
            Ok(()) => *self.refused.borrow_mut() = None,
            Err(error) => self.refuse(error),
        }
        opened
    }

    /// Nothing was opened before this ends, so it is tried again.
    async fn wait_for_directory(&self, config: &NodeConfig) -> Result<OpenDirectory, UserError> {
        loop {
            match open_directory(config, &self.plan).await {
                Err(error) if error.code == ErrorCode::Refused => self.refuse(&error),
                other => return other,
            }
            holdfast_env::sleep(RETRY_PAUSE).await;
        }
    }

    fn refuse(&self, error: &UserError) {
        if self.refused.borrow().as_ref() == Some(error) {
            return;
        }
        tracing::error!(store = %self.plan.store, directory = %self.plan.directory.display(), %error,
            hint = error.hint, "a store does not serve");
        administration::serve_refusal(&self.rpc, format!("{error}; {}", error.hint));
        *self.refused.borrow_mut() = Some(error.clone());
        if is_planted("foreign-store-ends-the-daemon") {
            std::process::abort();
        }
    }

    async fn start(
        self: &Rc<Self>,
        config: &NodeConfig,
        layout: &Layout,
        opened: OpenDirectory,
    ) -> Result<(), UserError> {
        let OpenDirectory { directory, identity, fresh, disk } = opened;
        if let Some(disk) = disk {
            let _first = self.disk.set(disk);
        }
        let timers = Timers::default();
        let silence = if fresh { Duration::ZERO } else { timers.startup_silence() };
        let environment =
            GroupEnvironment { rpc: self.rpc.clone(), timers, silent_until: Instant::now() + silence };
        let (planned, capacity) = (options(&self.plan), self.plan.capacity_bytes);
        let host = Host::open_within(environment, directory, identity, &planned, capacity);
        let host = host.await.map_err(|error| store_error(&self.plan, &error))?;
        if config.witness {
            host.take_witnesses_only(config.witness_log_bytes);
        }
        let member_options = MemberOptions { lost_after: Duration::from_secs(config.lost_after_seconds) };
        let stood = layout.catalog_stood().exists();
        if let Some(seat) = Seat::start(&host, &config.catalog, member_options, stood).await? {
            if !stood && seat.is_taken() {
                mark(&layout.catalog_stood())?;
            }
            let _first = self.seat.set(seat);
        }
        host.load().await.map_err(|error| store_error(&self.plan, &error))?;
        administration::serve(&host);
        voter::serve(&self.rpc, &host, config, layout)?;
        host.start_scrub(config.scrub.options());
        if let Some(stood) = self.plan.stood.as_ref().filter(|stood| !stood.exists()) {
            mark(stood)?;
        }
        let _first = self.host.set(host);
        holdfast_env::spawn("store-watch", Self::watch(Rc::downgrade(self)));
        Ok(())
    }

    /// Says it in the log when the store stops.
    async fn watch(store: std::rc::Weak<Self>) {
        loop {
            let Some(this) = store.upgrade() else { return };
            if let Some(error) = this.host().and_then(|host| host.journal().failed()) {
                tracing::error!(store = %this.plan.store, directory = %this.plan.directory.display(), %error,
                    "a store has stopped for good: its replicas are served elsewhere, and the node serves on");
                if is_planted("store-ends-the-daemon") {
                    std::process::abort();
                }
                return;
            }
            drop(this);
            holdfast_env::sleep(LOOK).await;
        }
    }

    /// What runs there, once it is open.
    pub(crate) fn host(&self) -> Option<Rc<Host>> {
        self.host.get().cloned()
    }

    /// Why it does not serve; empty while it does, or is about to.
    pub(crate) fn why_not(&self) -> String {
        let stopped = self.host().and_then(|host| host.journal().failed());
        let refused = || self.refused.borrow().as_ref().map(ToString::to_string);
        stopped.map(|error| error.to_string()).or_else(refused).unwrap_or_default()
    }

    /// Replaces the faults between this store and others, and that of its disk.
    pub(crate) fn set_faults(&self, faults: Faults, fault: DiskFault) -> Result<(), UserError> {
        self.network.set_faults(faults);
        match self.disk.get() {
            Some(disk) => disk.set(fault),
            None if fault == DiskFault::None => {}
            None => {
                let message = "the disk of this store cannot be broken: the store is not open";
                return Err(UserError::new(ErrorCode::Refused, message).hint("`holdfast status` says why"));
            }
        }
        Ok(())
    }

    /// Stops what runs there.
    pub(crate) async fn stop(&self) {
        let Some(host) = self.host() else { return };
        if holdfast_env::timeout(STOP_DEADLINE, host.stop()).await.is_err() {
            tracing::warn!(store = %self.plan.store,
                "the replicas did not stop in {STOP_DEADLINE:?}; the next start recovers them");
        }
    }
}
