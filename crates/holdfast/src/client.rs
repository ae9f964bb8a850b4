//! The admin API's client.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::Duration;

use holdfast_node::admin::error::from_status;
use holdfast_node::admin::pb::admin_client::AdminClient;
use holdfast_types::{ErrorCode, UserError};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tower::service_fn;

/// How long any call may take; a verification reads whole volumes.
const DEADLINE: Duration = Duration::from_secs(900);

/// A connected client.
pub type Client = AdminClient<Channel>;

fn socket_of(admin: Option<String>) -> Result<PathBuf, UserError> {
    let address = admin.ok_or_else(|| {
        crate::cli::usage(
            "where is the cluster?",
            "give --admin unix:PATH or set HOLDFAST_ADMIN; `holdfast dev` prints it",
        )
    })?;
    let path = address.strip_prefix("unix:").ok_or_else(|| {
        crate::cli::usage(format!("'{address}' is no admin address"), "it begins with unix:")
    })?;
    Ok(PathBuf::from(path))
}

/// Connects to an admin socket.
pub async fn connect(path: &Path) -> Result<Client, UserError> {
    let shown = path.display().to_string();
    let path = path.to_owned();
    let connector = service_fn(move |_: Uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    let endpoint = Endpoint::from_static("http://holdfast.invalid").timeout(DEADLINE);
    let channel = endpoint.connect_with_connector(connector).await.map_err(|error| {
        let cause = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
        UserError::new(ErrorCode::Unavailable, format!("no daemon answers at {shown}: {cause}"))
            .hint("is it running, and does --admin (or HOLDFAST_ADMIN) name its socket?")
    })?;
    Ok(AdminClient::new(channel))
}

/// A result as users see it.
pub fn reply<T>(result: Result<tonic::Response<T>, tonic::Status>) -> Result<T, UserError> {
    result.map(tonic::Response::into_inner).map_err(|status| from_status(&status))
}

/// Runs a command against the admin API.
pub fn with_client<T, F>(admin: Option<String>, command: impl FnOnce(Client) -> F) -> Result<T, UserError>
where
    F: Future<Output = Result<T, UserError>>,
{
    let socket = socket_of(admin)?;
    runtime()?.block_on(async { command(connect(&socket).await?).await })
}

/// A runtime for commands.
pub fn runtime() -> Result<tokio::runtime::Runtime, UserError> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| UserError::new(ErrorCode::Internal, format!("no runtime: {error}")))
}
