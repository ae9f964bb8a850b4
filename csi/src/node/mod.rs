//! The node service: attaches volumes through the daemon of this node, and mounts them.
//!
//! What is attached is asked of the daemon, what is mounted of the kernel; so a call repeated after a crash, or after the
//! daemon's restart left a dead device behind, finds what is missing and does only that.

mod publish;
mod sizes;
mod stage;

use std::sync::Arc;

use tokio::sync::OnceCell;
use tonic::{Request, Response, Status};

use crate::admin::{Admin, pb};
use crate::arguments::{self, Access};
use crate::errors::{no_volume, status};
use crate::inflight::InFlight;
use crate::mounter::options::Options;
use crate::mounter::programs::Programs;
use crate::mounter::{BlockDevice, MountError};
use crate::names::is_volume_id;
use crate::proto;
use crate::proto::node_server::Node;
use crate::proto::node_service_capability::{Rpc, Type, rpc};
use crate::topology;

/// In the publish context: whether the volume is published for reading only.
pub(crate) const READ_ONLY_CONTEXT: &str = "readonly";
/// How volumes appear to the kernel.
const FRONTEND: &str = "loop";

const CAPABILITIES: &[rpc::Type] = &[
    rpc::Type::StageUnstageVolume,
    rpc::Type::GetVolumeStats,
    rpc::Type::ExpandVolume,
    rpc::Type::SingleNodeMultiWriter,
];

/// What calls need.
struct Inner {
    admin: Admin,
    programs: Programs,
    me: OnceCell<pb::NodeInfo>,
}

/// Calls about volumes on this node.
#[derive(Clone)]
pub(crate) struct NodeService {
    inner: Arc<Inner>,
    calls: InFlight,
}

impl NodeService {
    pub(crate) fn new(admin: Admin) -> Self {
        let inner = Inner { admin, programs: Programs::default(), me: OnceCell::new() };
        Self { inner: Arc::new(inner), calls: InFlight::default() }
    }
}

fn mount_status(error: MountError) -> Status {
    let message = error.to_string();
    match error {
        MountError::Options(_) => Status::invalid_argument(message),
        MountError::Occupied { .. }
        | MountError::EmptyReadOnly(_)
        | MountError::Busy(_)
        | MountError::GrowsWhenStaged(_)
        | MountError::Missing(_) => Status::failed_precondition(message),
        MountError::System { .. }
        | MountError::Program { .. }
        | MountError::Unreadable { .. }
        | MountError::Damaged { .. } => Status::internal(message),
    }
}

/// Does what blocks on a thread for that.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Status> + Send + 'static,
) -> Result<T, Status> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(Status::internal(format!("the work has ended in the middle: {error}"))))
}

impl Inner {
    /// This node. It never changes its name or place.
    async fn me(&self) -> Result<&pb::NodeInfo, Status> {
        self.me.get_or_try_init(|| self.admin.get_info(pb::GetInfoRequest {})).await.map_err(status)
    }

    async fn existing(&self, id: &str) -> Result<pb::Volume, Status> {
        let found = if is_volume_id(id) { self.admin.find(id).await.map_err(status)? } else { None };
        found.ok_or_else(|| no_volume(id))
    }

    /// The device of a volume that is attached here; none if it is not.
    async fn device(&self, volume: &pb::Volume) -> Result<Option<BlockDevice>, Status> {
        let me = self.me().await?;
        if volume.attached_to != me.name || volume.frontend != FRONTEND || volume.device.is_empty() {
            return Ok(None);
        }
        let path = volume.device.clone();
        blocking(move || BlockDevice::at(path.as_ref()).map_err(mount_status)).await.map(Some)
    }
}

/// The options of a mount, checked before anything is done.
fn options(access: &Access, read_only: bool) -> Result<Options, Status> {
    match access {
        Access::Block => Options::parse(&[], read_only),
        Access::Mount { flags, .. } => Options::parse(flags, read_only),
    }
    .map_err(mount_status)
}

#[tonic::async_trait]
impl Node for NodeService {
    async fn node_stage_volume(
        &self,
        request: Request<proto::NodeStageVolumeRequest>,
    ) -> Result<Response<proto::NodeStageVolumeResponse>, Status> {
        let order = stage::Order::check(request.into_inner())?;
        let (inner, subject) = (self.inner.clone(), order.id().to_owned());
        self.calls
            .carry_out(&subject, async move {
                stage::stage(&inner, order).await?;
                Ok(proto::NodeStageVolumeResponse {})
            })
            .await
    }

    async fn node_unstage_volume(
        &self,
        request: Request<proto::NodeUnstageVolumeRequest>,
    ) -> Result<Response<proto::NodeUnstageVolumeResponse>, Status> {
        let request = request.into_inner();
        let id = arguments::text("volume_id", &request.volume_id)?.to_owned();
        let path = arguments::absolute("staging_target_path", &request.staging_target_path)?;
        let inner = self.inner.clone();
        self.calls
            .carry_out(&id.clone(), async move {
                stage::unstage(&inner, id, path).await?;
                Ok(proto::NodeUnstageVolumeResponse {})
            })
            .await
    }

    async fn node_publish_volume(
        &self,
        request: Request<proto::NodePublishVolumeRequest>,
    ) -> Result<Response<proto::NodePublishVolumeResponse>, Status> {
        let order = publish::Order::check(request.into_inner())?;
        let (inner, subject) = (self.inner.clone(), order.id().to_owned());
        self.calls
            .carry_out(&subject, async move {
                publish::publish(&inner, order).await?;
                Ok(proto::NodePublishVolumeResponse {})
            })
            .await
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<proto::NodeUnpublishVolumeRequest>,
    ) -> Result<Response<proto::NodeUnpublishVolumeResponse>, Status> {
        let request = request.into_inner();
        let id = arguments::text("volume_id", &request.volume_id)?.to_owned();
        let target = arguments::absolute("target_path", &request.target_path)?;
        self.calls
            .carry_out(&id, async move {
                publish::unpublish(target).await?;
                Ok(proto::NodeUnpublishVolumeResponse {})
            })
            .await
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<proto::NodeGetVolumeStatsRequest>,
    ) -> Result<Response<proto::NodeGetVolumeStatsResponse>, Status> {
        let request = request.into_inner();
        let id = arguments::text("volume_id", &request.volume_id)?;
        let path = arguments::path("volume_path", &request.volume_path)?;
        let usage = sizes::usage(&self.inner, id, path).await?;
        Ok(Response::new(proto::NodeGetVolumeStatsResponse { usage, volume_condition: None }))
    }

    async fn node_expand_volume(
        &self,
        request: Request<proto::NodeExpandVolumeRequest>,
    ) -> Result<Response<proto::NodeExpandVolumeResponse>, Status> {
        let request = request.into_inner();
        let id = arguments::text("volume_id", &request.volume_id)?.to_owned();
        let path = arguments::path("volume_path", &request.volume_path)?;
        if request.volume_capability.is_some() {
            arguments::capability(request.volume_capability.as_ref())?;
        }
        let wanted = request.capacity_range.map(|range| arguments::capacity(Some(&range))).transpose()?;
        let inner = self.inner.clone();
        self.calls
            .carry_out(&id.clone(), async move {
                let size = sizes::expand(inner, id, path, wanted).await?;
                let capacity_bytes = i64::try_from(size).unwrap_or(i64::MAX);
                Ok(proto::NodeExpandVolumeResponse { capacity_bytes })
            })
            .await
    }

    async fn node_get_capabilities(
        &self,
        _: Request<proto::NodeGetCapabilitiesRequest>,
    ) -> Result<Response<proto::NodeGetCapabilitiesResponse>, Status> {
        let capability = |kind: &rpc::Type| proto::NodeServiceCapability {
            r#type: Some(Type::Rpc(Rpc { r#type: (*kind).into() })),
        };
        let capabilities = CAPABILITIES.iter().map(capability).collect();
        Ok(Response::new(proto::NodeGetCapabilitiesResponse { capabilities }))
    }

    async fn node_get_info(
        &self,
        _: Request<proto::NodeGetInfoRequest>,
    ) -> Result<Response<proto::NodeGetInfoResponse>, Status> {
        let me = self.inner.me().await?;
        Ok(Response::new(proto::NodeGetInfoResponse {
            node_id: me.name.clone(),
            max_volumes_per_node: 0,
            accessible_topology: Some(topology::of_node(me)),
        }))
    }
}
