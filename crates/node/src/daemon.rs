//! One node from start to stop.

use std::path::Path;
use std::rc::Rc;

use futures_util::future::join_all;
use holdfast_types::{ErrorCode, UserError};
use tokio::net::UnixListener;
use tokio::sync::oneshot;
use tokio_stream::wrappers::UnixListenerStream;

use crate::admin::pb::admin_server::AdminServer;
use crate::admin::service::AdminService;
use crate::config::{IoEngine, Layout, NodeConfig};
use crate::handle::{self, ShardHandle};
use crate::metrics;
use crate::shard::Shard;
use crate::threads::StoreThread;

/// How long the threads of other stores may take to stop, beyond what they give their replicas.
const STOP_DEADLINE: std::time::Duration = std::time::Duration::from_secs(7);
/// Threads of the runtime that serves the admin API and the metrics.
const ADMIN_THREADS: usize = 1;

fn failed(what: &str, error: impl std::fmt::Display) -> UserError {
    UserError::new(ErrorCode::Internal, format!("{what}: {error}"))
}

/// What the command line says instead of a node's configuration.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// Where it serves its metrics over HTTP.
    pub metrics: Option<String>,
    /// Seconds between the beginnings of two passes of the scrub.
    pub scrub_period_seconds: Option<u64>,
    /// How the files of all its stores are read and written.
    pub io_engine: Option<IoEngine>,
    /// How many bytes of its medium the store may take, if the node has one.
    pub capacity_bytes: Option<u64>,
    /// It takes witnesses only.
    pub witness: bool,
    /// As a witness: bytes that the log of one volume may hold for a data replica that is away.
    pub witness_log_bytes: Option<u64>,
}

impl Overrides {
    /// A configuration as the command line wants it.
    pub(crate) fn apply(&self, mut config: NodeConfig) -> Result<NodeConfig, UserError> {
        if !config.other_stores.is_empty() && self.capacity_bytes.is_some() {
            let message = "--capacity names no store, and this node has several";
            return Err(UserError::new(ErrorCode::InvalidArgument, message)
                .hint("set `capacity_bytes` of the store in node.json"));
        }
        if !config.other_stores.is_empty() && self.witness {
            return Err(UserError::new(ErrorCode::InvalidArgument, "a witness node has one store")
                .hint("remove `other_stores` from node.json"));
        }
        for other in &mut config.other_stores {
            other.io_engine = self.io_engine.or(other.io_engine);
        }
        config.io_engine = self.io_engine.unwrap_or(config.io_engine);
        config.capacity_bytes = self.capacity_bytes.or(config.capacity_bytes);
        config.witness |= self.witness;
        config.witness_log_bytes = self.witness_log_bytes.unwrap_or(config.witness_log_bytes);
        config.scrub.period_seconds = self.scrub_period_seconds.unwrap_or(config.scrub.period_seconds);
        config.metrics = self.metrics.clone().or(config.metrics);
        Ok(config)
    }
}

/// Runs the node of a data directory until SIGTERM or SIGINT. What `overrides` leaves out its configuration tells.
pub fn run(directory: &Path, overrides: Overrides) -> Result<(), UserError> {
    crate::planted::plant()?;
    let layout = Layout::new(directory);
    let (handle, jobs) = handle::channel();
    holdfast_env::real::run(async move {
        let shard = Shard::start(layout.clone(), &overrides).await?;
        let metrics = shard.config.metrics.as_deref().map(metrics::bind).transpose()?;
        if let Some(metrics) = &metrics {
            tracing::info!(url = %format_args!("http://{}/metrics", metrics.address()), "serving metrics");
        }
        let admin = AdminThread::start(&layout, handle, metrics)?;
        holdfast_env::spawn("jobs", jobs.serve(shard.clone()));
        tracing::info!(node = %shard.config.location.node, address = %shard.network.address(), "serving");
        wait_for_signal().await?;
        tracing::info!(attached = shard.attachments.count(), "stopping");
        admin.stop();
        stop(shard).await;
        Ok(())
    })
}

async fn stop(shard: Rc<Shard>) {
    // Attachments stay: the next daemon takes them over. What was acknowledged is in the journals. Devices of the
    // kernel go: without a daemon they would only answer with errors.
    shard.hide_all().await;
    let others = join_all(shard.others.iter().map(StoreThread::stop));
    let (_, others) = futures_util::join!(shard.store.stop(), holdfast_env::timeout(STOP_DEADLINE, others));
    if others.is_err() {
        tracing::warn!("not every store stopped in {STOP_DEADLINE:?}; the next start recovers them");
    }
}

async fn wait_for_signal() -> Result<(), UserError> {
    use tokio::signal::unix::{SignalKind, signal};
    let wrong = |error: std::io::Error| failed("signals", error);
    let mut terminate = signal(SignalKind::terminate()).map_err(wrong)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(wrong)?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

struct AdminThread {
    stop: oneshot::Sender<()>,
    thread: std::thread::JoinHandle<()>,
}

impl AdminThread {
    /// Serves the admin API on the node's unix socket, for its owner only.
    fn start(
        layout: &Layout,
        handle: ShardHandle,
        metrics: Option<metrics::Server>,
    ) -> Result<Self, UserError> {
        let path = layout.admin_socket();
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(failed("the admin socket", error));
            }
            _ => {}
        }
        let listener = std::os::unix::net::UnixListener::bind(&path)
            .and_then(|listener| {
                std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
                listener.set_nonblocking(true)?;
                Ok(listener)
            })
            .map_err(|error| failed("the admin socket", error))?;
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new()
            .name("admin".into())
            .spawn(move || {
                if let Err(error) = serve(listener, handle, metrics, stopped) {
                    tracing::error!(%error, "the admin API has ended");
                }
            })
            .map_err(|error| failed("the admin thread", error))?;
        Ok(Self { stop, thread })
    }

    fn stop(self) {
        // It may have ended by itself already.
        let _ = self.stop.send(());
        if self.thread.join().is_err() {
            tracing::error!("the admin thread has panicked");
        }
    }
}

fn serve(
    listener: std::os::unix::net::UnixListener,
    handle: ShardHandle,
    metrics: Option<metrics::Server>,
    stopped: oneshot::Receiver<()>,
) -> Result<(), Box<dyn std::error::Error>> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(ADMIN_THREADS).enable_all().build()?;
    runtime.block_on(async {
        let incoming = UnixListenerStream::new(UnixListener::from_std(listener)?);
        let serving = tonic::transport::Server::builder()
            .add_service(AdminServer::new(AdminService(handle.clone())))
            .serve_with_incoming(incoming);
        let metrics = async {
            match metrics {
                Some(server) => server.serve(handle).await,
                None => std::future::pending().await,
            }
        };
        // Calls under way end with the daemon: each is safe to repeat.
        tokio::select! {
            result = serving => result?,
            result = metrics => result?,
            _ = stopped => {}
        }
        Ok(())
    })
}
