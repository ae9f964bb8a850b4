//! The CSI sockets of a development cluster: one for each node, with identity, controller and node services.
//!
//! Served by the supervisor: they outlive the daemons, as the driver's pods do, and say so when a daemon is away.

use holdfast_csi::Role;
use holdfast_csi::admin::socket_of;
use holdfast_types::UserError;

use super::cluster::Description;

/// Serves until the supervisor ends.
pub fn serve(cluster: &Description) -> Result<(), UserError> {
    for node in &cluster.nodes {
        let listener = holdfast_csi::listen(&socket_of(&node.csi)?)?;
        let (admin, name) = (socket_of(&node.admin)?, node.name.clone());
        tokio::spawn(async move {
            let served = holdfast_csi::serve(listener, &admin, Role::Both, std::future::pending()).await;
            if let Err(error) = served {
                tracing::error!(node = name, %error, "its CSI socket is not served any more");
            }
        });
    }
    Ok(())
}
