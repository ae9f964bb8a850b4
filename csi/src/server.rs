//! Serving the services on a unix socket.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use holdfast_types::{ErrorCode, UserError};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

use crate::admin::Admin;
use crate::controller::ControllerService;
use crate::identity::IdentityService;
use crate::node::NodeService;
use crate::proto::controller_server::ControllerServer;
use crate::proto::identity_server::IdentityServer;
use crate::proto::node_server::NodeServer;

/// Calls of one connection that are worked on at once.
const CALLS_MAX: usize = 64;

/// Which services are served beside identity.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// The controller service, once or several times in a cluster.
    Controller,
    /// The node service, on each node.
    Node,
    /// Both.
    Both,
}

/// Listens at a path for its owner only, replacing what an earlier process left there.
pub fn listen(path: &Path) -> Result<UnixListener, UserError> {
    let wrong = |error| UserError::new(ErrorCode::Internal, format!("{}: {error}", path.display()));
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(wrong(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(wrong)?;
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o600)).map_err(wrong)?;
    Ok(listener)
}

/// Serves until `stop` ends; calls under way are answered first.
pub async fn serve(
    listener: UnixListener,
    admin: &Path,
    role: Role,
    stop: impl Future<Output = ()>,
) -> Result<(), UserError> {
    let admin = Admin::new(admin);
    let identity = IdentityServer::new(IdentityService { admin: admin.clone() });
    let controller =
        (role != Role::Node).then(|| ControllerServer::new(ControllerService::new(admin.clone())));
    let node = (role != Role::Controller).then(|| NodeServer::new(NodeService::new(admin)));
    Server::builder()
        .concurrency_limit_per_connection(CALLS_MAX)
        .add_service(identity)
        .add_optional_service(controller)
        .add_optional_service(node)
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop)
        .await
        .map_err(|error| UserError::new(ErrorCode::Internal, format!("the CSI services have ended: {error}")))
}
