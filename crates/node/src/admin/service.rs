//! The admin API's service: each call goes to the shard.

use holdfast_types::UserError;
use tonic::{Request, Response, Status};

use super::error::to_status;
use super::pb;
use super::pb::admin_server::Admin;
use crate::handle::ShardHandle;
use crate::shard::NodeFaults;

/// The service of one node.
pub(crate) struct AdminService(pub(crate) ShardHandle);

type Reply<T> = Result<Response<T>, Status>;

fn reply<T>(result: Result<T, UserError>) -> Reply<T> {
    result.map(Response::new).map_err(|error| to_status(&error))
}

#[tonic::async_trait]
impl Admin for AdminService {
    async fn get_info(&self, _: Request<pb::GetInfoRequest>) -> Reply<pb::NodeInfo> {
        reply(self.0.run(|shard| shard.info()).await)
    }
    async fn get_status(&self, _: Request<pb::GetStatusRequest>) -> Reply<pb::Status> {
        reply(self.0.run(|shard| shard.status()).await)
    }
    async fn list_nodes(&self, _: Request<pb::ListNodesRequest>) -> Reply<pb::ListNodesReply> {
        reply(self.0.run(|shard| shard.nodes()).await)
    }
    async fn set_cordon(&self, request: Request<pb::SetCordonRequest>) -> Reply<pb::Node> {
        let request = request.into_inner();
        reply(self.0.run(move |shard| shard.cordon(request.name, request.cordoned)).await)
    }
    async fn create_volume(&self, request: Request<pb::CreateVolumeRequest>) -> Reply<pb::Volume> {
        let request = request.into_inner();
        reply(self.0.run(move |shard| shard.create_volume(request)).await)
    }
    async fn list_volumes(&self, request: Request<pb::ListVolumesRequest>) -> Reply<pb::ListVolumesReply> {
        let request = request.into_inner();
        reply(self.0.run(move |shard| shard.volumes(request)).await)
    }
    async fn get_volume(&self, request: Request<pb::GetVolumeRequest>) -> Reply<pb::Volume> {
        let name = request.into_inner().name;
        reply(self.0.run(move |shard| shard.volume(name)).await)
    }
    async fn delete_volume(&self, request: Request<pb::DeleteVolumeRequest>) -> Reply<pb::DeleteVolumeReply> {
        let name = request.into_inner().name;
        let existed = self.0.run(move |shard| shard.delete_volume(name)).await;
        reply(existed.map(|existed| pb::DeleteVolumeReply { existed }))
    }
    async fn set_volume(&self, request: Request<pb::SetVolumeRequest>) -> Reply<pb::Volume> {
        let request = request.into_inner();
        reply(self.0.run(move |shard| shard.set_volume(request)).await)
    }
    async fn resize_volume(&self, request: Request<pb::ResizeVolumeRequest>) -> Reply<pb::Volume> {
        let request = request.into_inner();
        reply(self.0.run(move |shard| shard.resize_volume(request)).await)
    }
    async fn publish_volume(
        &self,
        request: Request<pb::PublishVolumeRequest>,
    ) -> Reply<pb::PublishVolumeReply> {
        let request = request.into_inner();
        let done = self.0.run(move |shard| shard.publish(request)).await;
        reply(done.map(|()| pb::PublishVolumeReply {}))
    }
    async fn unpublish_volume(
        &self,
        request: Request<pb::UnpublishVolumeRequest>,
    ) -> Reply<pb::UnpublishVolumeReply> {
        let request = request.into_inner();
        let done = self.0.run(move |shard| shard.unpublish(request)).await;
        reply(done.map(|()| pb::UnpublishVolumeReply {}))
    }
    async fn attach_volume(&self, request: Request<pb::AttachVolumeRequest>) -> Reply<pb::Attachment> {
        let request = request.into_inner();
        reply(self.0.run(move |shard| shard.attach_volume(request)).await)
    }
    async fn detach_volume(&self, request: Request<pb::DetachVolumeRequest>) -> Reply<pb::DetachVolumeReply> {
        let request = request.into_inner();
        let work = move |shard: std::rc::Rc<crate::shard::Shard>| {
            shard.detach_volume(request.name, request.force, request.node)
        };
        reply(self.0.run(work).await)
    }
    async fn certify_fence(&self, request: Request<pb::CertifyFenceRequest>) -> Reply<pb::FenceCertificate> {
        let request = request.into_inner();
        reply(self.0.run(move |shard| shard.certify_fence(request)).await)
    }
    async fn verify_fence(&self, request: Request<pb::FenceCertificate>) -> Reply<pb::VerifiedFence> {
        let request = request.into_inner();
        reply(self.0.run(move |shard| shard.verify_fence(request)).await)
    }
    async fn recover_volume(
        &self,
        request: Request<pb::RecoverVolumeRequest>,
    ) -> Reply<pb::RecoverVolumeReply> {
        let request = request.into_inner();
        reply(self.0.run(move |shard| shard.recover_volume(request)).await)
    }
    async fn verify_volume(&self, request: Request<pb::VerifyVolumeRequest>) -> Reply<pb::VerifyReport> {
        let name = request.into_inner().name;
        reply(self.0.run(move |shard| shard.verify_volume(name)).await)
    }
    async fn scrub_volume(&self, request: Request<pb::ScrubVolumeRequest>) -> Reply<pb::Volume> {
        let name = request.into_inner().name;
        reply(self.0.run(move |shard| shard.scrub_volume(name)).await)
    }
    async fn get_capacity(&self, request: Request<pb::GetCapacityRequest>) -> Reply<pb::Capacity> {
        let request = request.into_inner();
        reply(self.0.run(move |shard| shard.capacity(request)).await)
    }
    async fn create_snapshot(&self, request: Request<pb::CreateSnapshotRequest>) -> Reply<pb::Snapshot> {
        let request = request.into_inner();
        reply(self.0.run(move |shard| shard.create_snapshot(request)).await)
    }
    async fn get_snapshot(&self, request: Request<pb::GetSnapshotRequest>) -> Reply<pb::Snapshot> {
        let name = request.into_inner().snapshot;
        reply(self.0.run(move |shard| shard.snapshot(name)).await)
    }
    async fn list_snapshots(
        &self,
        request: Request<pb::ListSnapshotsRequest>,
    ) -> Reply<pb::ListSnapshotsReply> {
        let request = request.into_inner();
        reply(self.0.run(move |shard| shard.snapshots(request)).await)
    }
    async fn delete_snapshot(
        &self,
        request: Request<pb::DeleteSnapshotRequest>,
    ) -> Reply<pb::DeleteSnapshotReply> {
        let name = request.into_inner().snapshot;
        let existed = self.0.run(move |shard| shard.delete_snapshot(name)).await;
        reply(existed.map(|existed| pb::DeleteSnapshotReply { existed }))
    }
    async fn restore_snapshot(&self, request: Request<pb::RestoreSnapshotRequest>) -> Reply<pb::Volume> {
        let name = request.into_inner().snapshot;
        reply(self.0.run(move |shard| shard.restore_snapshot(name)).await)
    }
    async fn diff_snapshots(
        &self,
        request: Request<pb::DiffSnapshotsRequest>,
    ) -> Reply<pb::DiffSnapshotsReply> {
        let request = request.into_inner();
        reply(self.0.run(move |shard| shard.diff_snapshots(request)).await)
    }
    async fn read_snapshot(&self, request: Request<pb::ReadSnapshotRequest>) -> Reply<pb::ReadSnapshotReply> {
        let request = request.into_inner();
        reply(self.0.run(move |shard| shard.read_snapshot(request)).await)
    }
    async fn replace_replica(&self, request: Request<pb::ReplaceReplicaRequest>) -> Reply<pb::Volume> {
        let request = request.into_inner();
        reply(self.0.run(move |shard| shard.replace_replica(request)).await)
    }
    async fn add_replica(&self, request: Request<pb::AddReplicaRequest>) -> Reply<pb::Volume> {
        let request = request.into_inner();
        reply(self.0.run(move |shard| shard.add_replica(request.volume, request.node)).await)
    }
    async fn remove_replica(&self, request: Request<pb::RemoveReplicaRequest>) -> Reply<pb::Volume> {
        let request = request.into_inner();
        reply(self.0.run(move |shard| shard.remove_replica(request.volume, request.replica)).await)
    }
    async fn lead_replica(&self, request: Request<pb::LeadReplicaRequest>) -> Reply<pb::Volume> {
        let request = request.into_inner();
        reply(self.0.run(move |shard| shard.lead_replica(request.volume, request.replica)).await)
    }
    async fn set_faults(&self, request: Request<pb::SetFaultsRequest>) -> Reply<pb::SetFaultsReply> {
        let request = request.into_inner();
        let work = move |shard: std::rc::Rc<crate::shard::Shard>| async move {
            let faults = NodeFaults {
                block_send: request.block_send,
                block_receive: request.block_receive,
                delay_us: request.delay_us.into_iter().collect(),
                disks: request.disks.into_iter().collect(),
            };
            shard.set_faults(faults).await
        };
        reply(self.0.run(work).await.map(|()| pb::SetFaultsReply {}))
    }
}
