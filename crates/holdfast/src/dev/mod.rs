//! `holdfast dev`: a whole cluster on loopback, each node a child process, everything under one directory.
//!
//! The supervisor starts and stops the daemons, carries out faults (`dev ctl`), and serves an admin socket that
//! reaches any live node. It holds no state of the cluster: killed and started again on the same directory, the
//! cluster is there with all data.

pub mod cluster;
pub mod ctl;
mod faults;
mod proxy;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use holdfast_types::{ErrorCode, UserError};
use tokio::sync::Mutex;

use crate::cli::{DevOptions, not_built, usage};
use crate::client::runtime;
use crate::output::Output;
use cluster::Cluster;

/// A node's daemon ends with the supervisor, whatever ends that.
pub fn follow_parent() -> Result<(), UserError> {
    let wrong = |error| UserError::new(ErrorCode::Internal, format!("cannot follow the parent: {error}"));
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL)).map_err(wrong)
}

fn checked(options: &DevOptions) -> Result<(), UserError> {
    if options.witness {
        let mut error = not_built(&["explain".to_owned()]);
        error.message = "witness nodes are not built yet".into();
        return Err(error);
    }
    match options.demo.as_deref() {
        None => Ok(()),
        Some(demo @ ("zone-loss" | "postgres")) => {
            let mut error = not_built(&["explain".to_owned()]);
            error.message = format!("the demonstration {demo} is not built yet");
            Err(error)
        }
        Some(other) => Err(usage(format!("there is no demonstration '{other}'"), "use zone-loss")),
    }
}

/// Runs the cluster until SIGINT or SIGTERM.
pub fn run(options: DevOptions, output: &Output) -> Result<ExitCode, UserError> {
    checked(&options)?;
    let directory = absolute(&options.dir)?;
    runtime()?.block_on(async move {
        let cluster = Cluster::open(&directory, &options)?;
        let cluster = Arc::new(Mutex::new(cluster));
        let result = serve(&cluster, &directory, &options, output).await;
        cluster.lock().await.stop().await;
        result.map(|()| ExitCode::SUCCESS)
    })
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

async fn serve(
    cluster: &Arc<Mutex<Cluster>>,
    directory: &Path,
    options: &DevOptions,
    output: &Output,
) -> Result<(), UserError> {
    let stop = stop_signal()?;
    let starting = async {
        let mut starting = cluster.lock().await;
        starting.start_all()?;
        starting.wait_until_serving().await?;
        if let Some(wan) = &options.wan {
            starting.delay_regions(wan).await?;
        }
        starting.write_description()
    };
    tokio::pin!(stop);
    tokio::select! {
        started = starting => started?,
        () = &mut stop => return Ok(()),
    }
    let admin = proxy::serve(&directory.join("admin.sock"), cluster.clone())?;
    let control = ctl::serve(&directory.join("ctl.sock"), cluster.clone())?;
    greet(cluster, directory, output).await;
    tokio::select! {
        () = &mut stop => Ok(()),
        ended = admin => ended,
        ended = control => ended,
    }
}

async fn greet(cluster: &Arc<Mutex<Cluster>>, directory: &Path, output: &Output) {
    let description = cluster.lock().await.description();
    output.show(&description, || {
        let names = description.nodes.iter().map(|node| node.name.as_str()).collect::<Vec<_>>().join(", ");
        let first = description.nodes.first().map(|node| node.name.as_str()).unwrap_or_default();
        format!(
            "The cluster serves: {names}\n\nIn another shell:\n  \
             export HOLDFAST_ADMIN={}\n  \
             holdfast volume create data --size 1GiB\n  \
             holdfast volume attach data --node {first}\n  \
             holdfast status\n  \
             holdfast dev ctl --dir {} kill {first}\n\nInterrupt (Ctrl-C) to stop; the data stays.",
            description.admin,
            directory.display()
        )
    });
}

fn stop_signal() -> Result<impl Future<Output = ()>, UserError> {
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
