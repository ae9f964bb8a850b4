//! Publishing: a bind mount of the staged file system, or of the device's node, at the path of a pod.

use std::path::{Path, PathBuf};

use tonic::Status;

use super::stage::LOOP_MAJOR;
use super::{Inner, READ_ONLY_CONTEXT, blocking, mount_status, options};
use crate::arguments::{self, Access, Use};
use crate::errors::invalid;
use crate::mounter::table::Table;
use crate::mounter::{self, BlockDevice};
use crate::proto;

/// A checked request.
pub(super) struct Order {
    id: String,
    staging: PathBuf,
    target: PathBuf,
    used: Use,
    read_only: bool,
}

impl Order {
    pub(super) fn check(request: proto::NodePublishVolumeRequest) -> Result<Self, Status> {
        let id = arguments::text("volume_id", &request.volume_id)?.to_owned();
        let target = arguments::absolute("target_path", &request.target_path)?;
        let used = arguments::capability(request.volume_capability.as_ref())?;
        arguments::map("publish_context", &request.publish_context)?;
        arguments::map("volume_context", &request.volume_context)?;
        if request.staging_target_path.is_empty() {
            return Err(Status::failed_precondition(
                "staging_target_path is missing: stage the volume first",
            ));
        }
        let staging = arguments::absolute("staging_target_path", &request.staging_target_path)?;
        let attached_read_only =
            used.reads_only() || request.publish_context.get(READ_ONLY_CONTEXT).is_some_and(|v| v == "true");
        if used.access == Access::Block && request.readonly && !attached_read_only {
            // A read-only mount of a device's node does not keep anybody from writing to the device.
            return Err(invalid(
                "a raw block volume is read-only only if it is published so by the controller",
            ));
        }
        let read_only = attached_read_only || request.readonly || options(&used.access, false)?.read_only();
        Ok(Self { id, staging, target, used, read_only })
    }

    pub(super) fn id(&self) -> &str {
        &self.id
    }
}

/// Publishes a staged volume at a path.
pub(super) async fn publish(inner: &Inner, order: Order) -> Result<(), Status> {
    let volume = inner.existing(&order.id).await?;
    let device = inner.device(&volume).await?.ok_or_else(|| {
        Status::failed_precondition(format!(
            "volume {} is not staged on this node: stage it first",
            volume.name
        ))
    })?;
    blocking(move || match order.used.access {
        Access::Block => publish_block(&order, &device),
        Access::Mount { .. } => publish_mount(&order, &device),
    })
    .await
}

/// Refuses a second path of a volume that is for one writer.
fn only_target<'m>(
    order: &Order,
    target: &Path,
    mut others: impl Iterator<Item = &'m Path>,
) -> Result<(), Status> {
    if order.used.several_targets() {
        return Ok(());
    }
    match others.find(|other| *other != target) {
        None => Ok(()),
        Some(other) => Err(Status::failed_precondition(format!(
            "the volume is published at {} and its access mode allows one path only",
            other.display()
        ))),
    }
}

/// Takes away what an earlier device of the volume left at a target.
fn clear_stale(table: &Table, target: &Path) -> Result<(), Status> {
    let Some(mount) = table.at(target) else { return Ok(()) };
    let ours = mount.device.major == LOOP_MAJOR || mount.kind == "devtmpfs";
    if !ours && mounter::is_alive(mount, false) {
        let message = format!("something else is mounted at {}", target.display());
        return Err(Status::already_exists(message));
    }
    tracing::warn!(path = %target.display(), "a dead mount is replaced");
    mounter::clear_dead(target).map_err(mount_status)
}

fn publish_mount(order: &Order, device: &BlockDevice) -> Result<(), Status> {
    let (staging, target) = (mounter::canonical(&order.staging), mounter::canonical(&order.target));
    let table = Table::read().map_err(mount_status)?;
    if table.at(&staging).is_none_or(|mount| mount.device != device.number) {
        let message = format!("the volume is not staged at {}: stage it first", staging.display());
        return Err(Status::failed_precondition(message));
    }
    let targets = table.of_filesystem(device.number).map(|mount| mount.target.as_path());
    only_target(order, &target, targets.filter(|other| *other != staging))?;
    match table.at(&target) {
        Some(mount) if mount.device == device.number && mount.read_only() == order.read_only => return Ok(()),
        Some(mount) if mount.device == device.number => {
            return Err(Status::already_exists("the volume is published there in another mode"));
        }
        _ => clear_stale(&table, &target)?,
    }
    let made = std::fs::create_dir_all(&target);
    made.map_err(mounter::system(target.display().to_string())).map_err(mount_status)?;
    mounter::bind(&staging, &target, order.read_only).map_err(mount_status)
}

fn publish_block(order: &Order, device: &BlockDevice) -> Result<(), Status> {
    let target = mounter::canonical(&order.target);
    let table = Table::read().map_err(mount_status)?;
    only_target(order, &target, table.of_block_node(device.number).into_iter())?;
    if table.at(&target).is_some() && mounter::block_node(&target) == Some(device.number) {
        return Ok(());
    }
    clear_stale(&table, &target)?;
    let made = (|| {
        if let Some(parent) = target.parent() {
            std::fs::create_dir_all(parent)?;
        }
        std::fs::OpenOptions::new().create(true).append(true).open(&target)
    })();
    made.map_err(mounter::system(target.display().to_string())).map_err(mount_status)?;
    mounter::bind(&device.path, &target, false).map_err(mount_status)
}

/// Takes a path of a pod away. What is not there is done already.
pub(super) async fn unpublish(target: PathBuf) -> Result<(), Status> {
    blocking(move || {
        mounter::unmount(&target).map_err(mount_status)?;
        mounter::remove_target(&target).map_err(mount_status)
    })
    .await
}
