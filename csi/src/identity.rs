//! The identity service.

use std::time::Duration;

use tonic::{Request, Response, Status};

use crate::admin::{Admin, pb};
use crate::proto;
use crate::proto::identity_server::Identity;
use crate::proto::plugin_capability::{Service, Type, VolumeExpansion, service, volume_expansion};

/// How long a probe waits for the daemon.
const PROBE_PATIENCE: Duration = Duration::from_millis(800);

/// Who the driver is and whether it is ready.
pub(crate) struct IdentityService {
    pub(crate) admin: Admin,
}

#[tonic::async_trait]
impl Identity for IdentityService {
    async fn get_plugin_info(
        &self,
        _: Request<proto::GetPluginInfoRequest>,
    ) -> Result<Response<proto::GetPluginInfoResponse>, Status> {
        Ok(Response::new(proto::GetPluginInfoResponse {
            name: crate::DRIVER_NAME.into(),
            vendor_version: env!("CARGO_PKG_VERSION").into(),
            manifest: Default::default(),
        }))
    }

    async fn get_plugin_capabilities(
        &self,
        _: Request<proto::GetPluginCapabilitiesRequest>,
    ) -> Result<Response<proto::GetPluginCapabilitiesResponse>, Status> {
        let service = |kind: service::Type| Type::Service(Service { r#type: kind.into() });
        let expansion =
            |kind: volume_expansion::Type| Type::VolumeExpansion(VolumeExpansion { r#type: kind.into() });
        // The same from every instance, also from one that serves a node only: they belong to the driver's version.
        let kinds = [
            service(service::Type::ControllerService),
            service(service::Type::VolumeAccessibilityConstraints),
            expansion(volume_expansion::Type::Online),
        ];
        let capabilities =
            kinds.into_iter().map(|kind| proto::PluginCapability { r#type: Some(kind) }).collect();
        Ok(Response::new(proto::GetPluginCapabilitiesResponse { capabilities }))
    }

    /// Not ready while the daemon does not answer. That is no error: restarting the driver would not help.
    async fn probe(&self, _: Request<proto::ProbeRequest>) -> Result<Response<proto::ProbeResponse>, Status> {
        let asked = self.admin.get_info(pb::GetInfoRequest {});
        let answered = tokio::time::timeout(PROBE_PATIENCE, asked).await;
        let ready = matches!(answered, Ok(Ok(_)));
        Ok(Response::new(proto::ProbeResponse { ready: Some(ready) }))
    }
}
