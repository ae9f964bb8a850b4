//! The node's other stores: a shard each, on a thread of its own.
//!
//! INV-STORES: a thread that ends, whatever ended it, ends nothing but its store.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use holdfast_types::{ErrorCode, UserError};
use holdfast_wire::pki::Credentials;
use holdfast_wire::tls::Tls;
use tokio::sync::oneshot;

use crate::config::{Layout, NodeConfig, StorePlan};
use crate::handle::{self, Handle, Jobs};
use crate::store::{LocalStore, RETRY_PAUSE};

/// How long a store's thread may take to tell how it is.
const ASK_DEADLINE: Duration = Duration::from_secs(1);

/// A store on its thread, as the node's first shard sees it.
pub(crate) struct StoreThread {
    pub(crate) plan: StorePlan,
    pub(crate) handle: Handle<LocalStore>,
    stop: Cell<Option<oneshot::Sender<()>>>,
    ended: Cell<Option<oneshot::Receiver<()>>>,
}

/// What a thread is given.
struct Given {
    config: NodeConfig,
    layout: Layout,
    plan: StorePlan,
    tls: Tls,
    jobs: Jobs<LocalStore>,
    stop: oneshot::Receiver<()>,
}

/// The node's certificate for one shard.
pub(crate) fn tls(config: &NodeConfig, credentials: &Credentials) -> Result<Tls, UserError> {
    let checked = Tls::new(config.cluster, credentials)
        .and_then(|tls| tls.check_own(credentials, &config.location.node).map(|()| tls));
    checked.map_err(|error| {
        UserError::new(ErrorCode::Internal, format!("the node's certificate: {error}"))
            .hint("pki/ and node.json of a data directory belong together: restore both from one node")
    })
}

impl StoreThread {
    /// Starts a store's thread. What becomes of the store it says itself, at its address.
    pub(crate) fn start(
        config: &NodeConfig,
        layout: &Layout,
        plan: StorePlan,
        tls: Tls,
    ) -> Result<Self, UserError> {
        let (handle, jobs) = handle::channel();
        let (stop, stopped) = oneshot::channel();
        let (running, ended) = oneshot::channel::<()>();
        let given = Given {
            config: config.clone(),
            layout: layout.clone(),
            plan: plan.clone(),
            tls,
            jobs,
            stop: stopped,
        };
        let spawned = std::thread::Builder::new().name("store".into()).spawn(move || {
            // Dropped on every way out, a panic among them.
            let _running = running;
            holdfast_env::real::run(run(given));
        });
        spawned.map_err(|error| UserError::new(ErrorCode::Internal, format!("a store's thread: {error}")))?;
        Ok(Self { plan, handle, stop: Cell::new(Some(stop)), ended: Cell::new(Some(ended)) })
    }

    /// Does something on the store's thread, if that has time for it: it may wait for its disk.
    pub(crate) async fn ask<T, W>(&self, work: W) -> Result<T, UserError>
    where
        T: Send + 'static,
        W: FnOnce(&LocalStore) -> T + Send + 'static,
    {
        let asked = self.handle.run(|store| async move { Ok(work(&store)) });
        let late = |_| UserError::new(ErrorCode::Unavailable, "the store's thread does not answer");
        holdfast_env::timeout(ASK_DEADLINE, asked).await.map_err(late)?
    }

    /// Stops the store; ends when its thread has.
    pub(crate) async fn stop(&self) {
        if let Some(stop) = self.stop.take() {
            // It may have ended by itself already.
            let _ = stop.send(());
        }
        if let Some(ended) = self.ended.take() {
            // Nothing is sent: it ends when the thread does.
            let _ = ended.await;
        }
    }
}

async fn run(given: Given) {
    let Given { config, layout, plan, tls, jobs, mut stop } = given;
    if let Err(error) = crate::planted::plant() {
        return tracing::error!(%error, "a store does not run");
    }
    let store = plan.store;
    let local = loop {
        match LocalStore::listen(&config, plan.clone(), tls.clone()).await {
            Ok(local) => break local,
            Err(error) => tracing::error!(%store, %error, hint = error.hint, "a store does not run yet"),
        }
        // Whoever has the port may leave it.
        if holdfast_env::timeout(RETRY_PAUSE, &mut stop).await.is_ok() {
            return;
        }
    };
    holdfast_env::spawn("jobs", jobs.serve(local.clone()));
    tracing::info!(%store, address = %local.network.address(), "a store serves");
    let opening = local.clone();
    holdfast_env::spawn("store-open", async move { open(&opening, &config, &layout).await });
    // The sender goes with the node.
    let _ = stop.await;
    local.stop().await;
}

async fn open(store: &Rc<LocalStore>, config: &NodeConfig, layout: &Layout) {
    // What went wrong is in the log, and told to whoever asks the store.
    let _told = store.open(config, layout, None).await;
}
