//! `holdfast dev ctl`: one JSON line asks, one answers.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use holdfast_types::{ErrorCode, UserError};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::sync::Mutex;

use super::cluster::Cluster;
use super::proxy::listen;
use crate::cli::CtlAction;
use crate::client::runtime;
use crate::output::Output;

/// The supervisor's socket for faults, within its directory.
pub const SOCKET: &str = "ctl.sock";

fn wrong(error: impl std::fmt::Display) -> UserError {
    UserError::new(ErrorCode::Internal, format!("the supervisor's answer: {error}"))
}

/// The directory of the cluster that is meant: the one that is named, else the one whose supervisor the admin address
/// points to, else the default.
pub fn directory(named: Option<PathBuf>, admin: Option<&str>) -> PathBuf {
    let beside = || {
        let socket = Path::new(admin?.strip_prefix("unix:")?);
        let directory = socket.parent()?;
        directory.join(SOCKET).exists().then(|| directory.to_owned())
    };
    named.or_else(beside).unwrap_or_else(|| PathBuf::from(crate::cli::DEFAULT_DIRECTORY))
}

/// Asks the supervisor of a directory.
pub fn send(directory: &Path, action: &CtlAction, output: &Output) -> Result<ExitCode, UserError> {
    let path = directory.join(SOCKET);
    let answer: Result<(), UserError> = runtime()?.block_on(async {
        let mut stream = UnixStream::connect(&path).await.map_err(|error| {
            let message = format!("no development cluster runs in {}: {error}", directory.display());
            UserError::new(ErrorCode::Unavailable, message)
                .hint("start one with `holdfast dev`, or name the directory of one that runs with --dir")
        })?;
        let mut line = serde_json::to_string(action).map_err(wrong)?;
        line.push('\n');
        stream.write_all(line.as_bytes()).await.map_err(wrong)?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).await.map_err(wrong)?;
        serde_json::from_str(&answer).map_err(wrong)?
    });
    answer?;
    output.show(&serde_json::json!({"done": true}), || "done".into());
    Ok(ExitCode::SUCCESS)
}

/// Carries out what comes, one connection at a time: faults happen in order.
pub fn serve(
    path: &Path,
    cluster: Arc<Mutex<Cluster>>,
) -> Result<impl Future<Output = Result<(), UserError>> + use<>, UserError> {
    let listener = listen(path)?;
    Ok(async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    if let Err(error) = one(stream, &cluster).await {
                        tracing::debug!(%error, "a control connection has ended");
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "a control connection was not accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    })
}

async fn one(stream: UnixStream, cluster: &Arc<Mutex<Cluster>>) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    let read = tokio::time::timeout(Duration::from_secs(5), stream.read_line(&mut line)).await;
    read.map_err(|_| std::io::Error::new(std::io::ErrorKind::TimedOut, "nothing was asked"))??;
    let outcome: Result<(), UserError> = match serde_json::from_str::<CtlAction>(&line) {
        Ok(action) => carry_out(action, &mut *cluster.lock().await).await,
        Err(error) => Err(UserError::new(ErrorCode::InvalidArgument, error.to_string())),
    };
    let mut answer = serde_json::to_string(&outcome)?;
    answer.push('\n');
    stream.get_mut().write_all(answer.as_bytes()).await
}

async fn carry_out(action: CtlAction, cluster: &mut Cluster) -> Result<(), UserError> {
    match action {
        CtlAction::Kill { target, daemon_only: _ } => cluster.kill(&target).await,
        CtlAction::Start { target } => cluster.start(&target).await,
        CtlAction::Pause { target } => cluster.pause(&target, true).await,
        CtlAction::Resume { target } => cluster.pause(&target, false).await,
        CtlAction::Partition { target } => cluster.cut(&target, true).await,
        CtlAction::Deafen { target } => cluster.cut(&target, false).await,
        CtlAction::Cut { from, to } => cluster.cut_one_way(&from, &to).await,
        CtlAction::BreakDisk { node, store, hang } => cluster.break_disk(&node, &store, hang).await,
        CtlAction::Heal => cluster.heal().await,
        CtlAction::Delay { a, b, delay } => cluster.delay(&a, &b, &delay).await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cluster_is_found_by_name_then_by_admin_address_then_here() {
        let place = tempfile::tempdir().expect("a directory");
        let admin = format!("unix:{}", place.path().join("admin.sock").display());
        let here = PathBuf::from(crate::cli::DEFAULT_DIRECTORY);
        assert_eq!(directory(None, Some(&admin)), here, "nobody listens there");
        std::fs::write(place.path().join(SOCKET), "").expect("a file");
        assert_eq!(directory(None, Some(&admin)), place.path());
        assert_eq!(directory(Some("x".into()), Some(&admin)), PathBuf::from("x"));
        assert_eq!(directory(None, None), here);
        assert_eq!(directory(None, Some("unix:/")), here);
    }
}
