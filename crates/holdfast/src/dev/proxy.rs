//! The supervisor's admin socket: each connection goes to a node that lives.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use holdfast_types::{ErrorCode, UserError};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Mutex;

use super::cluster::Cluster;

/// Listens at `path` for its owner only, replacing what an earlier supervisor left.
pub fn listen(path: &Path) -> Result<UnixListener, UserError> {
    let wrong = |error| UserError::new(ErrorCode::Internal, format!("{}: {error}", path.display()));
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(wrong(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(wrong)?;
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).map_err(wrong)?;
    Ok(listener)
}

/// Serves until it cannot.
pub fn serve(
    path: &Path,
    cluster: Arc<Mutex<Cluster>>,
) -> Result<impl Future<Output = Result<(), UserError>> + use<>, UserError> {
    let listener = listen(path)?;
    Ok(async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    tokio::spawn(pass(stream, cluster.clone()));
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection was not accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    })
}

async fn pass(mut user: UnixStream, cluster: Arc<Mutex<Cluster>>) {
    let sockets = cluster.lock().await.live_sockets();
    for socket in sockets {
        if let Ok(mut node) = UnixStream::connect(&socket).await {
            // Either side may leave when it likes.
            let _ended = tokio::io::copy_bidirectional(&mut user, &mut node).await;
            return;
        }
    }
}
