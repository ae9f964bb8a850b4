//! `holdfast csi`: thin CSI servers over the admin API. Restarting them touches no I/O.

use std::process::ExitCode;

use holdfast_csi::Role;
use holdfast_csi::admin::socket_of;
use holdfast_types::UserError;

use crate::cli::{CsiCommand, usage};
use crate::client::runtime;
use crate::dev::stop_signal;

/// Serves until SIGINT or SIGTERM.
pub fn run(command: CsiCommand, admin: Option<String>) -> Result<ExitCode, UserError> {
    let (role, endpoint) = match command {
        CsiCommand::Controller { endpoint } => (Role::Controller, endpoint),
        CsiCommand::Node { endpoint } => (Role::Node, endpoint),
    };
    let admin = admin.ok_or_else(|| {
        usage(
            "which node's admin API?",
            "give --admin unix:PATH or set HOLDFAST_ADMIN; `holdfast dev` prints it",
        )
    })?;
    let (endpoint, admin) = (socket_of(&endpoint)?, socket_of(&admin)?);
    let runtime = runtime()?;
    let served = runtime.block_on(async {
        let stop = stop_signal()?;
        let listener = holdfast_csi::listen(&endpoint)?;
        tracing::info!(endpoint = %endpoint.display(), admin = %admin.display(), ?role, "serves");
        holdfast_csi::serve(listener, &admin, role, stop).await
    });
    // A call that hangs in the kernel must not keep the server from ending: it is repeated by its caller.
    runtime.shutdown_background();
    served.map(|()| ExitCode::SUCCESS)
}
