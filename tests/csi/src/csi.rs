//! A CO's side of the contract: calls with sensible arguments, and what must come back.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use holdfast_csi::proto;
use holdfast_csi::proto::controller_client::ControllerClient;
use holdfast_csi::proto::identity_client::IdentityClient;
use holdfast_csi::proto::node_client::NodeClient;
use holdfast_csi::proto::volume_capability::access_mode::Mode;
use holdfast_csi::proto::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status};

use crate::Outcome;

/// No call may hang.
const DEADLINE: Duration = Duration::from_secs(90);
/// Size of volumes whose size does not matter: room for every file system.
pub const SIZE: i64 = 320 << 20;

/// The services at one socket.
#[derive(Clone)]
pub struct Csi {
    /// Identity.
    pub identity: IdentityClient<Channel>,
    /// Controller.
    pub controller: ControllerClient<Channel>,
    /// Node.
    pub node: NodeClient<Channel>,
}

/// How volumes are used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum As {
    /// Raw block.
    Block,
    /// This file system.
    Filesystem(&'static str),
}

/// A capability for one node.
pub fn capability(used: As, mode: Mode) -> proto::VolumeCapability {
    let access_type = match used {
        As::Block => AccessType::Block(BlockVolume {}),
        As::Filesystem(kind) => AccessType::Mount(MountVolume { fs_type: kind.into(), ..Default::default() }),
    };
    proto::VolumeCapability {
        access_type: Some(access_type),
        access_mode: Some(AccessMode { mode: mode.into() }),
    }
}

/// A request for a new volume.
pub fn create(name: &str, bytes: i64) -> proto::CreateVolumeRequest {
    proto::CreateVolumeRequest {
        name: name.into(),
        capacity_range: Some(proto::CapacityRange { required_bytes: bytes, limit_bytes: 0 }),
        volume_capabilities: vec![capability(As::Block, Mode::SingleNodeWriter)],
        ..Default::default()
    }
}

/// Segments of a topology.
pub fn topology(segments: &[(&str, &str)]) -> proto::Topology {
    proto::Topology { segments: segments.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect() }
}

/// A call that must be refused with this code, in words that name these things.
pub fn refused<T>(
    what: &str,
    answer: Result<Response<T>, Status>,
    code: Code,
    words: &[&str],
) -> Outcome<()> {
    match answer {
        Ok(_) => Err(format!("{what} was accepted, {code:?} was expected")),
        Err(status) if status.code() != code => {
            Err(format!("{what} was refused with {status:?}, not {code:?}"))
        }
        Err(status) if !status.details().is_empty() => {
            Err(format!("{what}: a status has details: {status:?}"))
        }
        Err(status) => match words.iter().find(|word| !status.message().contains(*word)) {
            None => Ok(()),
            Some(word) => Err(format!("{what}: '{}' does not name {word}", status.message())),
        },
    }
}

/// A call that must succeed.
pub fn accepted<T>(what: &str, answer: Result<Response<T>, Status>) -> Outcome<T> {
    answer
        .map(Response::into_inner)
        .map_err(|status| format!("{what} failed: {:?}: {}", status.code(), status.message()))
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

impl Csi {
    /// The services at a socket.
    pub fn at(socket: &Path) -> Outcome<Self> {
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display()))
            .map_err(|error| error.to_string())?
            .timeout(DEADLINE);
        let channel = endpoint.connect_lazy();
        Ok(Self {
            identity: IdentityClient::new(channel.clone()),
            controller: ControllerClient::new(channel.clone()),
            node: NodeClient::new(channel),
        })
    }

    /// Makes a volume.
    pub async fn make(&mut self, request: proto::CreateVolumeRequest) -> Outcome<proto::Volume> {
        let what = format!("CreateVolume {}", request.name);
        accepted(&what, self.controller.create_volume(request).await)?
            .volume
            .ok_or_else(|| format!("{what} answered without a volume"))
    }

    /// Deletes a volume.
    pub async fn delete(&mut self, id: &str) -> Outcome<()> {
        let request = proto::DeleteVolumeRequest { volume_id: id.into(), ..Default::default() };
        accepted("DeleteVolume", self.controller.delete_volume(request).await).map(drop)
    }

    /// A request to publish at the controller.
    pub fn publish_request(id: &str, node: &str, used: As) -> proto::ControllerPublishVolumeRequest {
        proto::ControllerPublishVolumeRequest {
            volume_id: id.into(),
            node_id: node.into(),
            volume_capability: Some(capability(used, Mode::SingleNodeWriter)),
            ..Default::default()
        }
    }

    /// Publishes at the controller.
    pub async fn publish(&mut self, id: &str, node: &str, used: As) -> Outcome<HashMap<String, String>> {
        let request = Self::publish_request(id, node, used);
        let answer = self.controller.controller_publish_volume(request).await;
        Ok(accepted(&format!("ControllerPublishVolume to {node}"), answer)?.publish_context)
    }

    /// Unpublishes at the controller.
    pub async fn unpublish(&mut self, id: &str, node: &str) -> Outcome<()> {
        let request = proto::ControllerUnpublishVolumeRequest {
            volume_id: id.into(),
            node_id: node.into(),
            ..Default::default()
        };
        let answer = self.controller.controller_unpublish_volume(request).await;
        accepted(&format!("ControllerUnpublishVolume from {node}"), answer).map(drop)
    }

    /// A request to stage.
    pub fn stage_request(id: &str, staging: &Path, used: As) -> proto::NodeStageVolumeRequest {
        proto::NodeStageVolumeRequest {
            volume_id: id.into(),
            staging_target_path: text(staging),
            volume_capability: Some(capability(used, Mode::SingleNodeWriter)),
            ..Default::default()
        }
    }

    /// Stages.
    pub async fn stage(&mut self, id: &str, staging: &Path, used: As) -> Outcome<()> {
        let answer = self.node.node_stage_volume(Self::stage_request(id, staging, used)).await;
        accepted("NodeStageVolume", answer).map(drop)
    }

    /// Unstages.
    pub async fn unstage(&mut self, id: &str, staging: &Path) -> Outcome<()> {
        let request =
            proto::NodeUnstageVolumeRequest { volume_id: id.into(), staging_target_path: text(staging) };
        accepted("NodeUnstageVolume", self.node.node_unstage_volume(request).await).map(drop)
    }

    /// A request to publish on the node.
    pub fn target_request(
        id: &str,
        staging: &Path,
        target: &Path,
        used: As,
    ) -> proto::NodePublishVolumeRequest {
        proto::NodePublishVolumeRequest {
            volume_id: id.into(),
            staging_target_path: text(staging),
            target_path: text(target),
            volume_capability: Some(capability(used, Mode::SingleNodeWriter)),
            ..Default::default()
        }
    }

    /// Publishes on the node.
    pub async fn publish_at(&mut self, id: &str, staging: &Path, target: &Path, used: As) -> Outcome<()> {
        let answer = self.node.node_publish_volume(Self::target_request(id, staging, target, used)).await;
        accepted("NodePublishVolume", answer).map(drop)
    }

    /// Unpublishes on the node.
    pub async fn unpublish_at(&mut self, id: &str, target: &Path) -> Outcome<()> {
        let request = proto::NodeUnpublishVolumeRequest { volume_id: id.into(), target_path: text(target) };
        accepted("NodeUnpublishVolume", self.node.node_unpublish_volume(request).await).map(drop)
    }

    /// Grows a volume at the controller and on the node.
    pub async fn expand(&mut self, id: &str, at: &Path, bytes: i64) -> Outcome<i64> {
        let range = Some(proto::CapacityRange { required_bytes: bytes, limit_bytes: 0 });
        let request = proto::ControllerExpandVolumeRequest {
            volume_id: id.into(),
            capacity_range: range,
            ..Default::default()
        };
        let answer = self.controller.controller_expand_volume(request).await;
        let grown = accepted("ControllerExpandVolume", answer)?;
        if grown.capacity_bytes != bytes || !grown.node_expansion_required {
            return Err(format!("ControllerExpandVolume answered {grown:?}"));
        }
        let request = proto::NodeExpandVolumeRequest {
            volume_id: id.into(),
            volume_path: text(at),
            capacity_range: range,
            ..Default::default()
        };
        Ok(accepted("NodeExpandVolume", self.node.node_expand_volume(request).await)?.capacity_bytes)
    }

    /// Total bytes of a volume at a path.
    pub async fn total_bytes(&mut self, id: &str, at: &Path) -> Outcome<i64> {
        let request = proto::NodeGetVolumeStatsRequest {
            volume_id: id.into(),
            volume_path: text(at),
            ..Default::default()
        };
        let stats = accepted("NodeGetVolumeStats", self.node.node_get_volume_stats(request).await)?;
        let first = stats.usage.first().ok_or("NodeGetVolumeStats answered without usage")?;
        Ok(first.total)
    }
}
