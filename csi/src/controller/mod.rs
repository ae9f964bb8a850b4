//! The controller service: volumes and who may attach them. Several may serve at once.

mod create;
mod snapshots;

use holdfast_types::ErrorCode;
use tonic::{Request, Response, Status};

use crate::admin::{Admin, pb};
use crate::arguments;
use crate::errors::{invalid, no_volume, status};
use crate::inflight::InFlight;
use crate::names::is_volume_id;
use crate::proto;
use crate::proto::controller_server::Controller;
use crate::proto::controller_service_capability::{Rpc, Type, rpc};
use crate::{node, topology};

/// The parameter that says which file system is made, as sidecars and users write it.
pub(crate) const FSTYPE_PARAMETER: &str = "csi.storage.k8s.io/fstype";
/// The same in the context of a volume.
pub(crate) const FSTYPE_CONTEXT: &str = "fstype";

const CAPABILITIES: &[rpc::Type] = &[
    rpc::Type::CreateDeleteVolume,
    rpc::Type::PublishUnpublishVolume,
    rpc::Type::ListVolumes,
    rpc::Type::GetCapacity,
    rpc::Type::PublishReadonly,
    rpc::Type::ExpandVolume,
    rpc::Type::CreateDeleteSnapshot,
    rpc::Type::ListSnapshots,
    rpc::Type::CloneVolume,
    rpc::Type::GetVolume,
    rpc::Type::SingleNodeMultiWriter,
];

/// Calls about volumes.
pub(crate) struct ControllerService {
    admin: Admin,
    calls: InFlight,
}

impl ControllerService {
    pub(crate) fn new(admin: Admin) -> Self {
        Self { admin, calls: InFlight::default() }
    }
}

fn not_built<T>(what: &str) -> Result<Response<T>, Status> {
    Err(Status::unimplemented(format!("{what} are not built yet")))
}

/// A volume as CSI shows it.
fn shown(volume: &pb::Volume) -> proto::Volume {
    let fstype = volume.parameters.get(FSTYPE_PARAMETER).filter(|fstype| !fstype.is_empty());
    proto::Volume {
        capacity_bytes: bytes(volume.size_bytes),
        volume_id: volume.id.clone(),
        volume_context: fstype
            .map(|fstype| (FSTYPE_CONTEXT.to_owned(), fstype.clone()))
            .into_iter()
            .collect(),
        content_source: create::content_source(volume),
        accessible_topology: volume.accessible.iter().map(topology::of_term).collect(),
    }
}

/// Bytes as CSI counts them.
fn bytes(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// A volume that must exist.
async fn existing(admin: &Admin, id: &str) -> Result<pb::Volume, Status> {
    let found = if is_volume_id(id) { admin.find(id).await.map_err(status)? } else { None };
    found.ok_or_else(|| no_volume(id))
}

async fn delete(admin: Admin, id: String) -> Result<proto::DeleteVolumeResponse, Status> {
    // An id that cannot be one of ours is of a volume that does not exist.
    if is_volume_id(&id) {
        admin.delete_volume(pb::DeleteVolumeRequest { name: id }).await.map_err(status)?;
    }
    Ok(proto::DeleteVolumeResponse {})
}

async fn publish(
    admin: Admin,
    id: String,
    node: String,
    read_only: bool,
) -> Result<proto::ControllerPublishVolumeResponse, Status> {
    let volume = existing(&admin, &id).await?;
    create::check_filled(&volume)?;
    let request = pb::PublishVolumeRequest { name: id, node, read_only };
    admin.publish_volume(request).await.map_err(status)?;
    let context = read_only.then(|| (node::READ_ONLY_CONTEXT.to_owned(), "true".to_owned()));
    Ok(proto::ControllerPublishVolumeResponse { publish_context: context.into_iter().collect() })
}

async fn unpublish(
    admin: Admin,
    id: String,
    node: String,
) -> Result<proto::ControllerUnpublishVolumeResponse, Status> {
    // A volume that is gone is attached nowhere.
    if is_volume_id(&id) {
        admin.unpublish_volume(pb::UnpublishVolumeRequest { name: id, node }).await.map_err(status)?;
    }
    Ok(proto::ControllerUnpublishVolumeResponse {})
}

async fn expand(
    admin: Admin,
    id: String,
    wanted: arguments::Wanted,
) -> Result<proto::ControllerExpandVolumeResponse, Status> {
    let volume = existing(&admin, &id).await?;
    // A volume never shrinks: a smaller request, as after a failed expansion, is met by what is there.
    let size_bytes = if volume.size_bytes >= wanted.required {
        if !wanted.allows(volume.size_bytes) {
            return Err(Status::out_of_range(format!(
                "volume {} has {} bytes and cannot shrink to the limit of {}",
                volume.name, volume.size_bytes, wanted.limit
            )));
        }
        volume.size_bytes
    } else {
        let request =
            pb::ResizeVolumeRequest { name: id, size_bytes: wanted.required, limit_bytes: wanted.limit };
        admin.resize_volume(request).await.map_err(status)?.size_bytes
    };
    Ok(proto::ControllerExpandVolumeResponse {
        capacity_bytes: bytes(size_bytes),
        // Also raw blocks: the device of the node has to see its new size.
        node_expansion_required: true,
    })
}

#[tonic::async_trait]
impl Controller for ControllerService {
    async fn create_volume(
        &self,
        request: Request<proto::CreateVolumeRequest>,
    ) -> Result<Response<proto::CreateVolumeResponse>, Status> {
        let order = create::Order::check(request.into_inner())?;
        let (admin, subject) = (self.admin.clone(), order.name().to_owned());
        self.calls
            .carry_out(&subject, async move {
                let volume = create::create(&admin, order).await?;
                Ok(proto::CreateVolumeResponse { volume: Some(shown(&volume)) })
            })
            .await
    }

    async fn delete_volume(
        &self,
        request: Request<proto::DeleteVolumeRequest>,
    ) -> Result<Response<proto::DeleteVolumeResponse>, Status> {
        let id = arguments::text("volume_id", &request.get_ref().volume_id)?.to_owned();
        self.calls.carry_out(&id.clone(), delete(self.admin.clone(), id)).await
    }

    async fn controller_publish_volume(
        &self,
        request: Request<proto::ControllerPublishVolumeRequest>,
    ) -> Result<Response<proto::ControllerPublishVolumeResponse>, Status> {
        let request = request.into_inner();
        let id = arguments::text("volume_id", &request.volume_id)?.to_owned();
        let node = arguments::node_id(&request.node_id)?.to_owned();
        let used = arguments::capability(request.volume_capability.as_ref())?;
        arguments::map("volume_context", &request.volume_context)?;
        let read_only = request.readonly || used.reads_only();
        self.calls.carry_out(&id.clone(), publish(self.admin.clone(), id, node, read_only)).await
    }

    async fn controller_unpublish_volume(
        &self,
        request: Request<proto::ControllerUnpublishVolumeRequest>,
    ) -> Result<Response<proto::ControllerUnpublishVolumeResponse>, Status> {
        let request = request.into_inner();
        let id = arguments::text("volume_id", &request.volume_id)?.to_owned();
        if !request.node_id.is_empty() {
            arguments::node_id(&request.node_id)?;
        }
        self.calls.carry_out(&id.clone(), unpublish(self.admin.clone(), id, request.node_id)).await
    }

    async fn validate_volume_capabilities(
        &self,
        request: Request<proto::ValidateVolumeCapabilitiesRequest>,
    ) -> Result<Response<proto::ValidateVolumeCapabilitiesResponse>, Status> {
        let request = request.into_inner();
        let id = arguments::text("volume_id", &request.volume_id)?;
        if request.volume_capabilities.is_empty() {
            return Err(invalid("volume_capabilities are missing"));
        }
        arguments::map("parameters", &request.parameters)?;
        let volume = existing(&self.admin, id).await?;
        let refused = match arguments::capabilities(&request.volume_capabilities) {
            Err(why) => Some(why.message().to_owned()),
            Ok(_) if request.mutable_parameters.is_empty() => create::differing(&volume, &request.parameters),
            Ok(_) => Some("mutable parameters are not built yet".into()),
        };
        let mut answer = proto::ValidateVolumeCapabilitiesResponse::default();
        match refused {
            Some(why) => answer.message = why,
            None => {
                answer.confirmed = Some(proto::validate_volume_capabilities_response::Confirmed {
                    volume_context: request.volume_context,
                    volume_capabilities: request.volume_capabilities,
                    parameters: request.parameters,
                    mutable_parameters: Default::default(),
                });
            }
        }
        Ok(Response::new(answer))
    }

    async fn list_volumes(
        &self,
        request: Request<proto::ListVolumesRequest>,
    ) -> Result<Response<proto::ListVolumesResponse>, Status> {
        let request = request.into_inner();
        let max = u32::try_from(request.max_entries)
            .map_err(|_| invalid(format!("max_entries {} is negative", request.max_entries)))?;
        let token = request.starting_token;
        if !token.is_empty() && !is_volume_id(&token) {
            return Err(Status::aborted(format!(
                "'{token}' is no token of a list: begin anew, without a token"
            )));
        }
        let mut page =
            self.admin.list_volumes(pb::ListVolumesRequest { max, token }).await.map_err(status)?;
        let mut volumes = std::mem::take(&mut page.volumes);
        // Without a limit the whole list is asked for.
        while max == 0 && !page.next_token.is_empty() {
            let token = std::mem::take(&mut page.next_token);
            page = self.admin.list_volumes(pb::ListVolumesRequest { max, token }).await.map_err(status)?;
            volumes.append(&mut page.volumes);
        }
        let entry = |volume: &pb::Volume| proto::list_volumes_response::Entry {
            volume: Some(shown(volume)),
            status: None,
        };
        let entries = volumes.iter().map(entry).collect();
        Ok(Response::new(proto::ListVolumesResponse { entries, next_token: page.next_token }))
    }

    async fn get_capacity(
        &self,
        request: Request<proto::GetCapacityRequest>,
    ) -> Result<Response<proto::GetCapacityResponse>, Status> {
        let request = request.into_inner();
        arguments::map("parameters", &request.parameters)?;
        let accessible = request.accessible_topology.iter().map(topology::term).collect::<Result<_, _>>()?;
        if !request.volume_capabilities.is_empty()
            && arguments::capabilities(&request.volume_capabilities).is_err()
        {
            // No volume can be made that is used so.
            return Ok(Response::new(proto::GetCapacityResponse::default()));
        }
        let asked = pb::GetCapacityRequest { accessible, parameters: request.parameters };
        let capacity = self.admin.get_capacity(asked).await.map_err(status)?;
        Ok(Response::new(proto::GetCapacityResponse {
            available_capacity: bytes(capacity.available_bytes),
            maximum_volume_size: Some(bytes(capacity.maximum_volume_bytes)),
            minimum_volume_size: None,
        }))
    }

    async fn controller_get_capabilities(
        &self,
        _: Request<proto::ControllerGetCapabilitiesRequest>,
    ) -> Result<Response<proto::ControllerGetCapabilitiesResponse>, Status> {
        let capability = |kind: &rpc::Type| proto::ControllerServiceCapability {
            r#type: Some(Type::Rpc(Rpc { r#type: (*kind).into() })),
        };
        let capabilities = CAPABILITIES.iter().map(capability).collect();
        Ok(Response::new(proto::ControllerGetCapabilitiesResponse { capabilities }))
    }

    async fn controller_expand_volume(
        &self,
        request: Request<proto::ControllerExpandVolumeRequest>,
    ) -> Result<Response<proto::ControllerExpandVolumeResponse>, Status> {
        let request = request.into_inner();
        let id = arguments::text("volume_id", &request.volume_id)?.to_owned();
        if request.capacity_range.is_none() {
            return Err(invalid("capacity_range is missing"));
        }
        let wanted = arguments::capacity(request.capacity_range.as_ref())?;
        if request.volume_capability.is_some() {
            arguments::capability(request.volume_capability.as_ref())?;
        }
        self.calls.carry_out(&id.clone(), expand(self.admin.clone(), id, wanted)).await
    }

    async fn controller_get_volume(
        &self,
        request: Request<proto::ControllerGetVolumeRequest>,
    ) -> Result<Response<proto::ControllerGetVolumeResponse>, Status> {
        let id = arguments::text("volume_id", &request.get_ref().volume_id)?;
        let volume = existing(&self.admin, id).await?;
        let published_node_ids =
            volume.published_to.split(',').filter(|node| !node.is_empty()).map(str::to_owned).collect();
        Ok(Response::new(proto::ControllerGetVolumeResponse {
            volume: Some(shown(&volume)),
            status: Some(proto::controller_get_volume_response::VolumeStatus {
                published_node_ids,
                volume_condition: None,
            }),
        }))
    }

    async fn create_snapshot(
        &self,
        request: Request<proto::CreateSnapshotRequest>,
    ) -> Result<Response<proto::CreateSnapshotResponse>, Status> {
        let order = snapshots::Order::check(request.into_inner())?;
        let subject = order.subject();
        self.calls.carry_out(&subject, snapshots::create(self.admin.clone(), order)).await
    }

    async fn delete_snapshot(
        &self,
        request: Request<proto::DeleteSnapshotRequest>,
    ) -> Result<Response<proto::DeleteSnapshotResponse>, Status> {
        let id = arguments::text("snapshot_id", &request.get_ref().snapshot_id)?.to_owned();
        self.calls.carry_out(&id.clone(), snapshots::delete(self.admin.clone(), id)).await
    }

    async fn list_snapshots(
        &self,
        request: Request<proto::ListSnapshotsRequest>,
    ) -> Result<Response<proto::ListSnapshotsResponse>, Status> {
        Ok(Response::new(snapshots::list(&self.admin, request.into_inner()).await?))
    }

    async fn get_snapshot(
        &self,
        _: Request<proto::GetSnapshotRequest>,
    ) -> Result<Response<proto::GetSnapshotResponse>, Status> {
        not_built("calls for one snapshot")
    }

    async fn controller_modify_volume(
        &self,
        _: Request<proto::ControllerModifyVolumeRequest>,
    ) -> Result<Response<proto::ControllerModifyVolumeResponse>, Status> {
        not_built("changes of a volume's parameters")
    }
}

/// Whether an error says that a volume exists already.
fn is_taken(error: &holdfast_types::UserError) -> bool {
    error.code == ErrorCode::AlreadyExists
}
