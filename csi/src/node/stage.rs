//! Staging: attach under the volume's next epoch, and mount the file system once for the node. Unstaging is the reverse.

use std::path::PathBuf;

use holdfast_types::ErrorCode;
use tonic::Status;

use super::{FRONTEND, Inner, READ_ONLY_CONTEXT, blocking, mount_status, options};
use crate::admin::pb;
use crate::arguments::{self, Access, Use};
use crate::controller::FSTYPE_CONTEXT;
use crate::errors::status;
use crate::mounter::options::Options;
use crate::mounter::table::{Mount, Table};
use crate::mounter::{self, BlockDevice, Filesystem};
use crate::names::is_volume_id;
use crate::proto;

/// The kernel's number for loop devices, which is what volumes appear as.
pub(super) const LOOP_MAJOR: u32 = 7;

/// A checked request.
pub(super) struct Order {
    id: String,
    path: PathBuf,
    used: Use,
    read_only: bool,
    /// What the volume's parameters ask for.
    default: Option<Filesystem>,
    options: Options,
}

impl Order {
    pub(super) fn check(request: proto::NodeStageVolumeRequest) -> Result<Self, Status> {
        let id = arguments::text("volume_id", &request.volume_id)?.to_owned();
        let path = arguments::absolute("staging_target_path", &request.staging_target_path)?;
        let used = arguments::capability(request.volume_capability.as_ref())?;
        arguments::map("publish_context", &request.publish_context)?;
        arguments::map("volume_context", &request.volume_context)?;
        let published_read_only = request.publish_context.get(READ_ONLY_CONTEXT).is_some_and(|v| v == "true");
        let read_only = used.reads_only() || published_read_only;
        let word = request.volume_context.get(FSTYPE_CONTEXT).map(String::as_str).unwrap_or_default();
        let options = options(&used.access, read_only)?;
        Ok(Self { id, path, default: arguments::filesystem(word)?, read_only, options, used })
    }

    pub(super) fn id(&self) -> &str {
        &self.id
    }
}

/// Whether a node may attach a volume: it was published to it and has not been unpublished
/// (INV-PERMIT).
fn permitted(volume: &pb::Volume, node: &str) -> Result<(), Status> {
    if volume.published_to.split(',').any(|name| name == node) {
        return Ok(());
    }
    let message = format!("volume {} is not published to node {node}: publish it first", volume.name);
    Err(Status::failed_precondition(message))
}

async fn attach(inner: &Inner, order: &Order) -> Result<BlockDevice, Status> {
    let me = inner.me().await?.name.clone();
    let volume = inner.existing(&order.id).await?;
    permitted(&volume, &me)?;
    if !volume.attached_to.is_empty() && volume.attached_to != me {
        return Err(Status::failed_precondition(format!(
            "volume {} is attached to node {}: unpublish it there first",
            volume.name, volume.attached_to
        )));
    }
    let request = pb::AttachVolumeRequest {
        name: order.id.clone(),
        node: me.clone(),
        frontend: FRONTEND.into(),
        force: false,
        read_only: order.read_only,
    };
    let attached = inner.admin.attach_volume(request).await.map_err(status)?;
    // Unpublishing takes the permission back first and ends attachments then. Whichever of the two came first here,
    // nothing stays attached without permission.
    let now = inner.existing(&order.id).await;
    if let Err(refused) = now.and_then(|volume| permitted(&volume, &me)) {
        detach(inner, &order.id).await?;
        return Err(refused);
    }
    blocking(move || BlockDevice::at(attached.device.as_ref()).map_err(mount_status)).await
}

/// Attaches a volume here and, unless it is raw block, mounts it.
pub(super) async fn stage(inner: &Inner, order: Order) -> Result<(), Status> {
    let device = attach(inner, &order).await?;
    match &order.used.access {
        Access::Block => Ok(()),
        Access::Mount { .. } => {
            let programs = inner.programs.clone();
            blocking(move || mount(&programs, &device, &order)).await
        }
    }
}

/// What a mount at the staging path means for a request.
enum Found {
    /// It is what is asked for.
    Same,
    /// It is of an earlier device of the volume, or its device has failed.
    Dead,
    /// It is something else.
    Other(Status),
}

fn compare(mount: &Mount, device: &BlockDevice, order: &Order) -> Found {
    let alive = mounter::is_alive(mount, !order.read_only && !order.options.read_only());
    if mount.device != device.number {
        // An earlier device seems well for as long as nobody reads what is not cached.
        return if alive && mount.device.major != LOOP_MAJOR {
            let message = format!("something else is mounted at {}", mount.target.display());
            Found::Other(Status::failed_precondition(message))
        } else {
            Found::Dead
        };
    }
    let asked = match &order.used.access {
        Access::Mount { filesystem, .. } => filesystem.map(Filesystem::as_str),
        Access::Block => None,
    };
    if asked.is_some_and(|asked| asked != mount.kind) {
        let message = format!("the volume is staged as {}, with another capability", mount.kind);
        return Found::Other(Status::already_exists(message));
    }
    if !alive {
        return Found::Dead;
    }
    if mount.read_only() != order.options.read_only() {
        return Found::Other(Status::already_exists("the volume is staged with another capability"));
    }
    Found::Same
}

fn mount(programs: &mounter::programs::Programs, device: &BlockDevice, order: &Order) -> Result<(), Status> {
    let path = mounter::canonical(&order.path);
    if let Some(mount) = Table::read().map_err(mount_status)?.at(&path) {
        match compare(mount, device, order) {
            Found::Same => return Ok(()),
            Found::Other(why) => return Err(why),
            Found::Dead => {
                tracing::warn!(volume = order.id, path = %path.display(), "a dead mount is replaced");
                mounter::clear_dead(&path).map_err(mount_status)?;
            }
        }
    }
    let wanted = match &order.used.access {
        Access::Mount { filesystem, .. } => filesystem.or(order.default),
        Access::Block => None,
    };
    mounter::format_and_mount(programs, device, &path, wanted, &order.options).map_err(mount_status)
}

async fn detach(inner: &Inner, id: &str) -> Result<(), Status> {
    let node = inner.me().await?.name.clone();
    let request = pb::DetachVolumeRequest { name: id.to_owned(), force: false, node };
    match inner.admin.detach_volume(request).await {
        Ok(_) => Ok(()),
        Err(error) if error.code == ErrorCode::NotFound => Ok(()),
        Err(error) => Err(status(error)),
    }
}

/// Unmounts, then detaches. What is not there is done already.
pub(super) async fn unstage(inner: &Inner, id: String, path: PathBuf) -> Result<(), Status> {
    blocking(move || mounter::unmount(&path).map_err(mount_status)).await?;
    if is_volume_id(&id) { detach(inner, &id).await } else { Ok(()) }
}
