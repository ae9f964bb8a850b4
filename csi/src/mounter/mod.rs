//! Mounting: file systems on block devices, bind mounts, and what is mounted where.
//!
//! Rests on mount(2), `/proc/self/mountinfo` and the programs that every node has for its file systems (`blkid`, `mkfs`,
//! `fsck`, `resize2fs`, `xfs_growfs`). Everything here blocks and is called on threads for that. What is mounted is read
//! from the kernel each time.
//!
//! INV-FORMAT: a file system is made only on a device that could be read at both ends and is zero there, and on which
//! `blkid` finds nothing ([`content`]). An unreadable device is never taken for an empty one.

pub mod content;
pub mod options;
pub mod programs;
pub mod table;

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use thiserror::Error;

use content::Content;
use options::Options;
use programs::Programs;
use table::{DeviceNumber, Mount, Table};

/// Mounts that may lie upon each other at one path before something is wrong.
const LAYERS_MAX: usize = 16;

/// A kind of file system that volumes may have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Filesystem {
    /// ext4.
    Ext4,
    /// XFS.
    Xfs,
}

impl Filesystem {
    /// As the kernel and `mkfs` call it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
        }
    }
}

impl FromStr for Filesystem {
    type Err = ();
    fn from_str(word: &str) -> Result<Self, ()> {
        match word {
            "ext4" => Ok(Self::Ext4),
            "xfs" => Ok(Self::Xfs),
            _ => Err(()),
        }
    }
}

/// Why something was not done.
#[derive(Debug, Error)]
pub enum MountError {
    /// A system call failed.
    #[error("{what}: {source}")]
    System {
        /// What was tried, and where.
        what: String,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// A program failed.
    #[error("{program} failed ({status}): {said}")]
    Program {
        /// The program with its arguments.
        program: String,
        /// How it ended.
        status: String,
        /// The end of what it printed.
        said: String,
    },
    /// A program is not there.
    #[error(
        "the program {0} is missing on this node: install the package that has it (e2fsprogs, xfsprogs or util-linux)"
    )]
    Missing(&'static str),
    /// The device cannot be read, so nothing is known of its content.
    #[error("{device} cannot be read, so that nothing is known of its content: {source}")]
    Unreadable {
        /// The device.
        device: String,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// Something else stands on the device than what was asked for.
    #[error("{device} holds {found} and is not formatted as {wanted}: {hint}")]
    Occupied {
        /// The device.
        device: String,
        /// What was found.
        found: String,
        /// What was asked for.
        wanted: &'static str,
        /// What to do.
        hint: &'static str,
    },
    /// Nothing may be written, and there is no file system yet.
    #[error("{0} is empty and may only be read: it cannot be formatted")]
    EmptyReadOnly(String),
    /// The file system is damaged beyond automatic repair.
    #[error(
        "the file system on {device} has errors that need a decision: run `{program}` by hand. It said: {said}"
    )]
    Damaged {
        /// The device.
        device: String,
        /// What to run.
        program: String,
        /// What the check printed.
        said: String,
    },
    /// The kernel does not let it grow while it is mounted.
    #[error(
        "the ext4 on {0} cannot grow while it is mounted, since this process lacks CAP_SYS_RESOURCE: it grows when the volume is staged again"
    )]
    GrowsWhenStaged(String),
    /// Something uses the mount.
    #[error("{0} is in use: end what has files open there")]
    Busy(String),
    /// Mount options are wrong.
    #[error("{0}")]
    Options(String),
}

pub(crate) fn system(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> MountError {
    let what = what.into();
    move |source| MountError::System { what, source }
}

fn errno(what: impl Into<String>) -> impl FnOnce(Errno) -> MountError {
    let what = what.into();
    move |source| MountError::System { what, source: source.into() }
}

/// A block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockDevice {
    /// Where its node is.
    pub path: PathBuf,
    /// Its number.
    pub number: DeviceNumber,
}

impl BlockDevice {
    /// The block device at a path.
    pub fn at(path: &Path) -> Result<Self, MountError> {
        let meta = std::fs::metadata(path).map_err(system(path.display().to_string()))?;
        if !meta.file_type().is_block_device() {
            let wrong = std::io::Error::other("it is no block device");
            return Err(system(path.display().to_string())(wrong));
        }
        Ok(Self { path: path.to_owned(), number: DeviceNumber::of(meta.rdev()) })
    }

    /// Its size now, in bytes.
    pub fn size_bytes(&self) -> Result<u64, MountError> {
        let unreadable = |source| MountError::Unreadable { device: self.path.display().to_string(), source };
        let mut device = File::open(&self.path).map_err(unreadable)?;
        device.seek(SeekFrom::End(0)).map_err(unreadable)
    }
}

/// Whether a block device's node is at a path (bound there, or itself); its number.
pub fn block_node(path: &Path) -> Option<DeviceNumber> {
    let meta = std::fs::metadata(path).ok()?;
    meta.file_type().is_block_device().then(|| DeviceNumber::of(meta.rdev()))
}

/// A path as the mount table has it. Its last part is not looked at: what is mounted there may be dead.
pub fn canonical(path: &Path) -> PathBuf {
    let parts = (path.parent(), path.file_name());
    match parts {
        (Some(parent), Some(name)) => match parent.canonicalize() {
            Ok(parent) => parent.join(name),
            Err(_) => path.to_owned(),
        },
        _ => path.to_owned(),
    }
}

/// Whether a mounted file system still does its work.
pub fn is_alive(mount: &Mount, writable: bool) -> bool {
    // What the kernel does to a file system whose device failed: it goes read-only or shuts down.
    let failed = ["shutdown", "emergency_ro"].iter().any(|word| mount.has_super_option(word));
    let turned_read_only = writable && mount.has_super_option("ro");
    !failed
        && !turned_read_only
        && rustix::fs::statfs(&mount.target).is_ok()
        && std::fs::read_dir(&mount.target)
            .is_ok_and(|mut list| list.next().is_none_or(|entry| entry.is_ok()))
}

/// Makes sure that a file system of the asked kind (`None`: whatever is there, else ext4) is on a device, checks it,
/// and mounts it.
pub fn format_and_mount(
    programs: &Programs,
    device: &BlockDevice,
    target: &Path,
    wanted: Option<Filesystem>,
    options: &Options,
) -> Result<(), MountError> {
    let name = device.path.display().to_string();
    let occupied = |found: String, hint: &'static str| MountError::Occupied {
        device: name.clone(),
        found,
        wanted: wanted.unwrap_or(Filesystem::Ext4).as_str(),
        hint,
    };
    let filesystem = match content::look(programs, &device.path)? {
        Content::Empty if options.read_only() => return Err(MountError::EmptyReadOnly(name)),
        Content::Empty => {
            let filesystem = wanted.unwrap_or(Filesystem::Ext4);
            programs.make(filesystem, &device.path)?;
            filesystem
        }
        Content::Filesystem(found) => match (found.parse::<Filesystem>(), wanted) {
            (Ok(found), None) => found,
            (Ok(found), Some(wanted)) if found == wanted => found,
            _ => return Err(occupied(found, "use that file system, or another volume")),
        },
        Content::Other(found) => {
            return Err(occupied(found, "if it is wanted, use it as raw block; if not, make a new volume"));
        }
    };
    if !options.read_only() {
        programs.check(filesystem, &device.path)?;
        // A volume may have been enlarged since it was last mounted.
        if smaller_than_device(filesystem, device)? && !Programs::may_grow_mounted_ext4()? {
            programs.grow_unmounted_ext4(&device.path)?;
        }
    }
    std::fs::create_dir_all(target).map_err(system(target.display().to_string()))?;
    let data = options.data(filesystem)?;
    let what = format!("mount {name} at {}", target.display());
    rustix::mount::mount(&device.path, target, filesystem.as_str(), options.flags(), data.as_deref())
        .map_err(errno(what))?;
    if options.read_only() { Ok(()) } else { grow(programs, filesystem, device, target) }
}

/// Whether an ext4 is smaller than its device. XFS finds out by itself.
fn smaller_than_device(filesystem: Filesystem, device: &BlockDevice) -> Result<bool, MountError> {
    // A file system is whole blocks of at most 64 KiB.
    const BLOCK_BYTES_MAX: u64 = 64 << 10;
    Ok(filesystem == Filesystem::Ext4
        && content::ext4_bytes(&device.path)? + BLOCK_BYTES_MAX <= device.size_bytes()?)
}

/// Grows a mounted file system to its device; nothing to do is fine.
pub fn grow(
    programs: &Programs,
    filesystem: Filesystem,
    device: &BlockDevice,
    mounted_at: &Path,
) -> Result<(), MountError> {
    if filesystem == Filesystem::Ext4 {
        if !smaller_than_device(filesystem, device)? {
            return Ok(());
        }
        if !Programs::may_grow_mounted_ext4()? {
            return Err(MountError::GrowsWhenStaged(device.path.display().to_string()));
        }
    }
    programs.grow(filesystem, &device.path, mounted_at)
}

/// Binds `source` at `target`.
pub fn bind(source: &Path, target: &Path, read_only: bool) -> Result<(), MountError> {
    let what = format!("bind {} at {}", source.display(), target.display());
    rustix::mount::mount_bind(source, target).map_err(errno(what.clone()))?;
    if !read_only {
        return Ok(());
    }
    let remounted = rustix::mount::mount_remount(target, MountFlags::BIND | MountFlags::RDONLY, "");
    remounted.map_err(|error| {
        if let Err(left) = unmount(target) {
            tracing::error!(error = %left, target = %target.display(), "a writable mount stays behind");
        }
        errno(what)(error)
    })
}

/// Unmounts everything that is mounted at a path; true if anything was. A file system whose device is dead goes too.
pub fn unmount(path: &Path) -> Result<bool, MountError> {
    let path = canonical(path);
    let mut any = false;
    for _ in 0..LAYERS_MAX {
        if Table::read()?.at(&path).is_none() {
            return Ok(any);
        }
        any = true;
        match rustix::mount::unmount(&path, UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::BUSY) => return Err(MountError::Busy(path.display().to_string())),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "unmounted without its consent");
                let flags = UnmountFlags::NOFOLLOW | UnmountFlags::DETACH;
                rustix::mount::unmount(&path, flags).map_err(errno(format!("unmount {}", path.display())))?;
            }
        }
    }
    Err(MountError::Busy(path.display().to_string()))
}

/// Takes away what is mounted at a path and works no more, even if something still has files open there: all that these
/// could get is errors.
pub fn clear_dead(path: &Path) -> Result<(), MountError> {
    match unmount(path) {
        Err(MountError::Busy(_)) => {
            let flags = UnmountFlags::NOFOLLOW | UnmountFlags::DETACH;
            rustix::mount::unmount(canonical(path), flags)
                .map_err(errno(format!("unmount {}", path.display())))?;
            unmount(path).map(drop)
        }
        other => other.map(drop),
    }
}

/// Removes a mount point, a directory or a file; nothing there is fine.
pub fn remove_target(path: &Path) -> Result<(), MountError> {
    let meta = match std::fs::symlink_metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(system(path.display().to_string())(error)),
    };
    // Never recursively: whatever is in there is not ours.
    let removed = if meta.is_dir() { std::fs::remove_dir(path) } else { std::fs::remove_file(path) };
    removed.map_err(system(format!("remove {}", path.display())))
}
