//! How full a volume is, and growing what stands on it.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tonic::Status;

use super::{Inner, blocking, mount_status};
use crate::arguments::Wanted;
use crate::mounter::programs::Programs;
use crate::mounter::table::{DeviceNumber, Mount, Table};
use crate::mounter::{self, BlockDevice, Filesystem};
use crate::proto::VolumeUsage;
use crate::proto::volume_usage::Unit;

/// How long a file system may take to tell how full it is: a volume without a quorum answers nothing.
const STATS_PATIENCE: Duration = Duration::from_secs(5);
/// How long the device may take to show its new size.
const GROW_PATIENCE: Duration = Duration::from_secs(10);
/// Between looks at the device.
const LOOK: Duration = Duration::from_millis(50);

fn not_at(id: &str, path: &Path) -> Status {
    Status::not_found(format!("volume {id} is not at {}", path.display()))
}

/// What of a volume is at a path.
enum At {
    Block,
    Mounted(Mount),
}

fn at(device: DeviceNumber, path: &Path) -> Result<Option<At>, Status> {
    let path = mounter::canonical(path);
    let table = Table::read().map_err(mount_status)?;
    match table.at(&path) {
        Some(mount) if mount.device == device => return Ok(Some(At::Mounted(mount.clone()))),
        _ => {}
    }
    Ok((mounter::block_node(&path) == Some(device)).then_some(At::Block))
}

fn count(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// Bytes and, for a file system, inodes.
pub(super) async fn usage(inner: &Inner, id: &str, path: PathBuf) -> Result<Vec<VolumeUsage>, Status> {
    let volume = inner.existing(id).await?;
    let device = inner.device(&volume).await?.ok_or_else(|| not_at(id, &path))?;
    let id = id.to_owned();
    let asked = blocking(move || match at(device.number, &path)? {
        None => Err(not_at(&id, &path)),
        Some(At::Block) => {
            let total = count(device.size_bytes().map_err(mount_status)?);
            Ok(vec![VolumeUsage { total, unit: Unit::Bytes.into(), ..Default::default() }])
        }
        Some(At::Mounted(mount)) => of_filesystem(&mount),
    });
    tokio::time::timeout(STATS_PATIENCE, asked)
        .await
        .unwrap_or_else(|_| Err(Status::unavailable("the volume does not answer now")))
}

fn of_filesystem(mount: &Mount) -> Result<Vec<VolumeUsage>, Status> {
    let at = &mount.target;
    let stat =
        rustix::fs::statvfs(at).map_err(|error| Status::internal(format!("{}: {error}", at.display())))?;
    let usage = |unit: Unit, one: u64, total: u64, free: u64, available: u64| VolumeUsage {
        available: count(available.saturating_mul(one)),
        total: count(total.saturating_mul(one)),
        used: count(total.saturating_sub(free).saturating_mul(one)),
        unit: unit.into(),
    };
    Ok(vec![
        usage(Unit::Bytes, stat.f_frsize, stat.f_blocks, stat.f_bfree, stat.f_bavail),
        usage(Unit::Inodes, 1, stat.f_files, stat.f_ffree, stat.f_favail),
    ])
}

/// Lets device and file system see that the volume has grown; the size afterwards, in bytes.
pub(super) async fn expand(
    inner: Arc<Inner>,
    id: String,
    path: PathBuf,
    wanted: Option<Wanted>,
) -> Result<u64, Status> {
    let volume = inner.existing(&id).await?;
    let device = inner.device(&volume).await?.ok_or_else(|| not_at(&id, &path))?;
    if wanted.is_some_and(|wanted| wanted.required > volume.size_bytes) {
        return Err(Status::out_of_range(format!(
            "volume {} has {} bytes: expand it at the controller first",
            volume.name, volume.size_bytes
        )));
    }
    let (programs, size) = (inner.programs.clone(), volume.size_bytes);
    blocking(move || {
        let found = at(device.number, &path)?.ok_or_else(|| not_at(&id, &path))?;
        see(&programs, &device, size)?;
        if let At::Mounted(mount) = found {
            grow(&programs, &device, &mount)?;
        }
        device.size_bytes().map_err(mount_status)
    })
    .await
}

/// Ends when the device has the volume's size.
fn see(programs: &Programs, device: &BlockDevice, size: u64) -> Result<(), Status> {
    let until = Instant::now() + GROW_PATIENCE;
    loop {
        let now = device.size_bytes().map_err(mount_status)?;
        if now >= size {
            return Ok(());
        }
        if Instant::now() > until {
            let message = format!("{} has {now} bytes yet, not {size}: try again", device.path.display());
            return Err(Status::unavailable(message));
        }
        programs.see_size(&device.path).map_err(mount_status)?;
        std::thread::sleep(LOOK);
    }
}

fn grow(programs: &Programs, device: &BlockDevice, mount: &Mount) -> Result<(), Status> {
    let filesystem: Filesystem =
        mount.kind.parse().map_err(|()| Status::internal(format!("cannot grow {}", mount.kind)))?;
    // Through a mount that may write: XFS grows by a call on it.
    let table = Table::read().map_err(mount_status)?;
    let Some(writable) = table.of_filesystem(device.number).find(|mount| !mount.read_only()) else {
        return Ok(());
    };
    mounter::grow(programs, filesystem, device, &writable.target).map_err(mount_status)
}
