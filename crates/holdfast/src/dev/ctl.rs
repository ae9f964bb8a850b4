//! `holdfast dev ctl`: one JSON line asks, one answers.

use std::path::Path;
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

fn wrong(error: impl std::fmt::Display) -> UserError {
    UserError::new(ErrorCode::Internal, format!("the supervisor's answer: {error}"))
}

/// Asks the supervisor of a directory.
pub fn send(directory: &Path, action: &CtlAction, output: &Output) -> Result<ExitCode, UserError> {
    let path = directory.join("ctl.sock");
    let answer: Result<(), UserError> = runtime()?.block_on(async {
        let mut stream = UnixStream::connect(&path).await.map_err(|error| {
            UserError::new(ErrorCode::Unavailable, format!("{}: {error}", path.display()))
                .hint("does `holdfast dev` run with that --dir?")
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
        CtlAction::Pause { target } => cluster.pause(&target, true),
        CtlAction::Resume { target } => cluster.pause(&target, false),
        CtlAction::Partition { target } => cluster.cut(&target, true).await,
        CtlAction::Deafen { target } => cluster.cut(&target, false).await,
        CtlAction::Heal => cluster.heal().await,
        CtlAction::Delay { a, b, delay } => cluster.delay(&a, &b, &delay).await,
    }
}
