//! The admin API of a node, as the driver uses it: over its unix socket, reconnecting by itself.

use std::path::{Path, PathBuf};
use std::time::Duration;

use holdfast_types::{ErrorCode, UserError};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Response, Status};
use tower::service_fn;

use pb::admin_client::AdminClient;

/// Generated from `proto/holdfast/admin.proto`.
#[allow(missing_docs, clippy::all, clippy::disallowed_types, clippy::unwrap_used)]
pub mod pb {
    tonic::include_proto!("holdfast.admin.v1");
}

/// Carries the whole error as JSON.
const TRAILER: &str = "holdfast-error-bin";
/// How long any call may take: longer than an attach that waits for a former holder's lease.
const DEADLINE: Duration = Duration::from_secs(120);

/// A client. Connects when it is first used, and again when the daemon has restarted.
#[derive(Clone)]
pub struct Admin {
    client: AdminClient<Channel>,
    socket: PathBuf,
}

/// The socket that an address `unix:PATH` or `unix://PATH` names.
pub fn socket_of(address: &str) -> Result<PathBuf, UserError> {
    let path = address.strip_prefix("unix://").or_else(|| address.strip_prefix("unix:"));
    match path {
        Some(path) if !path.is_empty() => Ok(PathBuf::from(path)),
        _ => Err(UserError::new(ErrorCode::InvalidArgument, format!("'{address}' is no address"))
            .hint("write unix:PATH")),
    }
}

macro_rules! calls {
    ($($(#[$doc:meta])* $name:ident($request:ident) -> $reply:ident;)*) => {
        impl Admin {
            $(
                $(#[$doc])*
                pub async fn $name(&self, request: pb::$request) -> Result<pb::$reply, UserError> {
                    let answer = self.client.clone().$name(request).await;
                    answer.map(Response::into_inner).map_err(|status| self.error(&status))
                }
            )*
        }
    };
}

calls! {
    /// Who the node is.
    get_info(GetInfoRequest) -> NodeInfo;
    /// Makes a volume; idempotent by name.
    create_volume(CreateVolumeRequest) -> Volume;
    /// A page of volumes.
    list_volumes(ListVolumesRequest) -> ListVolumesReply;
    /// A volume by name or id.
    get_volume(GetVolumeRequest) -> Volume;
    /// Deletes a volume.
    delete_volume(DeleteVolumeRequest) -> DeleteVolumeReply;
    /// Grows a volume.
    resize_volume(ResizeVolumeRequest) -> Volume;
    /// Permits a node to attach.
    publish_volume(PublishVolumeRequest) -> PublishVolumeReply;
    /// Takes the permission back; ends what is attached, by force if need be.
    unpublish_volume(UnpublishVolumeRequest) -> UnpublishVolumeReply;
    /// Attaches.
    attach_volume(AttachVolumeRequest) -> Attachment;
    /// Detaches.
    detach_volume(DetachVolumeRequest) -> DetachVolumeReply;
    /// Makes a snapshot; idempotent by volume, name and key.
    create_snapshot(CreateSnapshotRequest) -> Snapshot;
    /// A snapshot by its id.
    get_snapshot(GetSnapshotRequest) -> Snapshot;
    /// A page of snapshots.
    list_snapshots(ListSnapshotsRequest) -> ListSnapshotsReply;
    /// Deletes a snapshot; idempotent.
    delete_snapshot(DeleteSnapshotRequest) -> DeleteSnapshotReply;
    /// Room for new volumes.
    get_capacity(GetCapacityRequest) -> Capacity;
}

impl Admin {
    /// The API at a socket.
    pub fn new(socket: &Path) -> Self {
        let path = socket.to_owned();
        let connector = service_fn(move |_: Uri| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        let endpoint = Endpoint::from_static("http://holdfast.invalid").timeout(DEADLINE);
        let client = AdminClient::new(endpoint.connect_with_connector_lazy(connector));
        Self { client, socket: socket.to_owned() }
    }

    /// A volume by its id, or none.
    pub async fn find(&self, id: &str) -> Result<Option<pb::Volume>, UserError> {
        match self.get_volume(pb::GetVolumeRequest { name: id.to_owned() }).await {
            Ok(volume) => Ok(Some(volume)),
            Err(error) if error.code == ErrorCode::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The error that a status carries; a status of the transport becomes one with its text.
    fn error(&self, status: &Status) -> UserError {
        let carried = status
            .metadata()
            .get_bin(TRAILER)
            .and_then(|value| value.to_bytes().ok())
            .and_then(|json| serde_json::from_slice(&json).ok());
        if let Some(error) = carried {
            return error;
        }
        let code = match status.code() {
            // The transport's word for a daemon that is away or was killed during the call.
            Code::Unavailable | Code::Unknown | Code::Cancelled => ErrorCode::Unavailable,
            Code::DeadlineExceeded => ErrorCode::TimedOut,
            _ => ErrorCode::Internal,
        };
        let socket = self.socket.display();
        UserError::new(code, format!("the daemon at {socket} does not answer: {}", status.message()))
            .hint("is it running? The call is repeated")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_name_a_socket() {
        assert_eq!(socket_of("unix:/a/b").map_err(|e| e.code), Ok(PathBuf::from("/a/b")));
        assert_eq!(socket_of("unix:///a/b").map_err(|e| e.code), Ok(PathBuf::from("/a/b")));
        for wrong in ["", "unix:", "tcp://1.2.3.4:5", "/a/b"] {
            assert_eq!(socket_of(wrong).map_err(|e| e.code), Err(ErrorCode::InvalidArgument), "{wrong}");
        }
    }
}
