//! `holdfast dev`: a whole cluster on loopback, each node a child process, everything under one directory.
//!
//! The supervisor starts and stops the daemons, carries out faults (`dev ctl`), and serves an admin socket that
//! reaches any live node. It holds no state of the cluster: killed and started again on the same directory, the
//! cluster is there with all data.

pub mod cluster;
mod csi;
pub mod ctl;
mod demo;
mod faults;
mod proxy;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use holdfast_types::{ErrorCode, UserError};
use tokio::sync::Mutex;

use crate::cli::{DevOptions, usage};
use crate::client::runtime;
use crate::output::Output;
use cluster::Cluster;

/// A node's daemon ends with the supervisor, whatever ends that.
pub fn follow_parent() -> Result<(), UserError> {
    let wrong = |error| UserError::new(ErrorCode::Internal, format!("cannot follow the parent: {error}"));
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL)).map_err(wrong)
}

/// The running cluster, as everything that serves it holds it.
pub(crate) type Shared = Arc<Mutex<Cluster>>;

/// Runs the cluster until SIGINT or SIGTERM, or until its demonstration has ended.
pub fn run(options: DevOptions, output: &Output) -> Result<ExitCode, UserError> {
    if let Some(which) = options.demo {
        return demo::run(which, &options, output);
    }
    let directory = absolute(&options.directory())?;
    let runtime = runtime()?;
    let result = runtime.block_on(async move {
        let work = async |cluster: Shared| {
            greet(&cluster, &directory, output).await;
            std::future::pending::<Result<(), UserError>>().await
        };
        with_cluster(&directory, &options, work).await.map(|_interrupted| ExitCode::SUCCESS)
    });
    // CSI calls may hang in the kernel with the volume that they are about.
    runtime.shutdown_background();
    result
}

fn absolute(path: &Path) -> Result<PathBuf, UserError> {
    let wrong =
        |error: std::io::Error| UserError::new(ErrorCode::Internal, format!("{}: {error}", path.display()));
    std::fs::create_dir_all(path).map_err(wrong)?;
    let full = path.canonicalize().map_err(wrong)?;
    // The longest socket below is `<node>/admin.sock`; the kernel takes 107 bytes.
    if full.as_os_str().len() > 70 {
        return Err(usage(
            format!("{} is too long for unix sockets", full.display()),
            "choose a directory with a shorter path",
        ));
    }
    Ok(full)
}

/// Starts the cluster of a directory, serves its sockets, does `work`, and stops all that was started, whatever
/// happens. None if SIGINT or SIGTERM came before the work had ended.
async fn with_cluster<T>(
    directory: &Path,
    options: &DevOptions,
    work: impl AsyncFnOnce(Shared) -> Result<T, UserError>,
) -> Result<Option<T>, UserError> {
    let stop = stop_signal()?;
    let cluster = Arc::new(Mutex::new(Cluster::open(directory, options)?));
    let serving = async {
        start(&cluster, options).await?;
        let admin = proxy::serve(&directory.join("admin.sock"), cluster.clone())?;
        let control = ctl::serve(&directory.join(ctl::SOCKET), cluster.clone())?;
        csi::serve(&cluster.lock().await.description())?;
        // Last: who waits for it finds everything else there.
        cluster.lock().await.write_description()?;
        tokio::select! {
            done = work(cluster.clone()) => done.map(Some),
            ended = admin => ended.map(|()| None),
            ended = control => ended.map(|()| None),
        }
    };
    let result = tokio::select! {
        result = serving => result,
        () = stop => Ok(None),
    };
    cluster.lock().await.stop().await;
    result
}

async fn start(cluster: &Shared, options: &DevOptions) -> Result<(), UserError> {
    let mut starting = cluster.lock().await;
    starting.start_all()?;
    starting.wait_until_serving().await?;
    match &options.wan {
        Some(wan) => starting.delay_regions(wan).await,
        None => Ok(()),
    }
}

async fn greet(cluster: &Shared, directory: &Path, output: &Output) {
    let description = cluster.lock().await.description();
    output.show(&description, || {
        let names: Vec<&str> = description.nodes.iter().map(|node| node.name.as_str()).collect();
        let first = names.first().copied().unwrap_or_default();
        let others: Vec<&str> = zones(&description.nodes).into_iter().skip(1).collect();
        let mut hints = vec![
            format!("export HOLDFAST_ADMIN={}", description.admin),
            "holdfast volume create data --size 1GiB".into(),
            format!("holdfast volume attach data --node {first} --frontend nbd"),
            "holdfast status".into(),
        ];
        if let Some(zone) = others.first() {
            hints.push(explained(&format!("holdfast dev ctl kill {zone}"), "lose a zone: I/O goes on"));
            hints.push(explained(&format!("holdfast dev ctl start {zone}"), "it heals by itself"));
        }
        hints.push(explained("holdfast volume verify data", "every replica, read from disk"));
        if let Some(program) = unlisted_program() {
            hints.insert(1, format!("alias holdfast={program}"));
        }
        format!(
            "The cluster serves: {}\n\nIn another shell:\n  {}\n\nInterrupt (Ctrl-C) to stop; the data stays in {}.",
            names.join(", "),
            hints.join("\n  "),
            directory.display()
        )
    });
}

fn explained(command: &str, why: &str) -> String {
    format!("{command:<34}# {why}")
}

/// The zones, each once, in order.
fn zones(nodes: &[cluster::NodeDescription]) -> Vec<&str> {
    let mut zones: Vec<&str> = nodes.iter().map(|node| node.zone.as_str()).collect();
    zones.dedup();
    zones
}

/// This program's path, if a shell would not find it by its name.
fn unlisted_program() -> Option<String> {
    let program = std::env::current_exe().ok()?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let listed = std::env::split_paths(&path)
        .filter_map(|directory| directory.join("holdfast").canonicalize().ok())
        .any(|found| found == program);
    (!listed).then(|| program.display().to_string())
}

/// Ends at SIGINT or SIGTERM.
pub fn stop_signal() -> Result<impl Future<Output = ()>, UserError> {
    use tokio::signal::unix::{SignalKind, signal};
    let wrong = |error| UserError::new(ErrorCode::Internal, format!("signals: {error}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(wrong)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(wrong)?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
