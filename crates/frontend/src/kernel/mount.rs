//! Mounting and unmounting. Everything here blocks: never on the thread that serves the file.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fuser::{BackgroundSession, Config, MountOption, Session};
use rustix::mount::{UnmountFlags, unmount};

use super::KernelError;
use super::budget::Budget;
use super::filesystem::OneFile;
use super::loop_device::{self, Clearing};

const DEVICE: &str = "/dev/fuse";
/// How long a device whose file is gone may take to be unbound: nothing is left to write.
pub(super) const UNBIND_PATIENCE: Duration = Duration::from_millis(300);
/// How long a session's thread may take to see that its mount is gone.
const JOIN_PATIENCE: Duration = Duration::from_secs(3);
/// Between looks whether it has.
const JOIN_LOOK: Duration = Duration::from_millis(2);
/// Mounts over one another that are taken away at once.
const STACKED_MAX: usize = 64;

/// A mounted file system and the thread that takes the kernel's requests.
pub(super) struct Mounted {
    directory: PathBuf,
    session: BackgroundSession,
}

/// Whether this process may mount FUSE.
pub(super) fn available() -> Result<(), KernelError> {
    let unavailable = |why: String| KernelError::Unavailable {
        what: "a FUSE file",
        why,
        hint: "run the daemon as root on a kernel with FUSE, install fusermount3 (Debian: fuse3), or use \
               --frontend nbd",
    };
    let device = std::fs::OpenOptions::new().read(true).write(true).open(DEVICE);
    device.map_err(|error| unavailable(format!("{DEVICE}: {error}")))?;
    let helper = || {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path)
            .any(|directory| ["fusermount3", "fusermount"].iter().any(|name| directory.join(name).exists()))
    };
    if rustix::process::geteuid().is_root() || helper() {
        return Ok(());
    }
    Err(unavailable("only root may mount, and there is no fusermount3 to ask".into()))
}

impl Mounted {
    /// Mounts at `directory`, which exists.
    pub(super) fn new(files: OneFile, directory: &Path) -> Result<Self, KernelError> {
        let failed = |source| KernelError::Io { what: format!("mounting {}", directory.display()), source };
        let mut config = Config::default();
        config.mount_options = vec![
            MountOption::FSName("holdfast".into()),
            MountOption::NoDev,
            MountOption::NoSuid,
            MountOption::NoExec,
            MountOption::NoAtime,
        ];
        if files.read_only {
            config.mount_options.push(MountOption::RO);
        }
        // Memory that the device's own requests need must not wait for this very device to take dirty pages.
        if let Err(error) = rustix::process::configure_io_flusher_behavior(true) {
            tracing::debug!(%error, "the thread of a FUSE file has no precedence in reclaim");
        }
        let session = Session::new(files, directory, &config).map_err(failed)?;
        let session = session.spawn().map_err(failed)?;
        Ok(Self { directory: directory.to_owned(), session })
    }

    /// Unmounts if nobody has the file open; else gives itself back.
    pub(super) fn unmount(self, budget: &Budget) -> (Option<Self>, Result<(), KernelError>) {
        match unmount(&self.directory, UnmountFlags::NOFOLLOW) {
            Err(rustix::io::Errno::BUSY) => {
                let path = self.directory.clone();
                (Some(self), Err(KernelError::InUse(path)))
            }
            result => {
                budget.close();
                self.end(result);
                (None, Ok(()))
            }
        }
    }

    /// Unmounts whatever happens: requests under way end with an error, and who has the file open keeps a dead one.
    pub(super) fn abort(self, budget: &Budget) {
        budget.close();
        let result = take_away(&self.directory);
        self.end(result);
    }

    /// Ends the session after an attempt to unmount.
    fn end(self, unmounted: rustix::io::Result<()>) {
        let Self { directory, session } = self;
        let ended = match unmounted {
            Ok(()) => join(session),
            // Without root it is fusermount's to do.
            Err(error) => {
                tracing::debug!(%error, "fusermount is asked to unmount");
                session.umount_and_join()
            }
        };
        if let Err(error) = ended {
            tracing::warn!(%error, directory = %directory.display(), "a FUSE session did not end well");
        }
        if let Err(error) = std::fs::remove_dir(&directory) {
            tracing::debug!(%error, directory = %directory.display(), "a mount point stays");
        }
    }
}

/// Waits for the thread of a session whose mount is gone.
fn join(session: BackgroundSession) -> io::Result<()> {
    let until = Instant::now() + JOIN_PATIENCE;
    while !session.guard.is_finished() {
        if Instant::now() > until {
            // Another mount namespace has a copy of the mount. Its requests are answered with EIO until it goes.
            // Forgotten and not dropped: that would unmount what is made next at this place.
            std::mem::forget(session);
            return Err(io::Error::other("the mount lives on in another mount namespace"));
        }
        std::thread::sleep(JOIN_LOOK);
    }
    session.join()
}

fn take_away(directory: &Path) -> rustix::io::Result<()> {
    unmount(directory, UnmountFlags::FORCE | UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
}

/// Undoes the escapes of `/proc/self/mountinfo`: a backslash and three octal digits.
fn unescape(text: &str) -> PathBuf {
    let bytes = text.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let digits = bytes.get(at + 1..at + 4).filter(|_| bytes[at] == b'\\');
        let octal = digits.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match octal {
            Some(byte) => {
                plain.push(byte);
                at += 4;
            }
            None => {
                plain.push(bytes[at]);
                at += 1;
            }
        }
    }
    PathBuf::from(OsString::from_vec(plain))
}

/// FUSE mounts at or under `directory` in a text of `/proc/self/mountinfo`, the latest first.
fn fuse_mounts(mountinfo: &str, directory: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = mountinfo
        .lines()
        .filter_map(|line| {
            let (place, kind) = line.split_once(" - ")?;
            let fuse = kind.split(' ').next().is_some_and(|kind| kind == "fuse" || kind.starts_with("fuse."));
            let path = unescape(place.split(' ').nth(4)?);
            (fuse && path.starts_with(directory)).then_some(path)
        })
        .collect();
    found.reverse();
    found
}

/// Removes FUSE mounts at and under `directory` and loop devices on their files, whose daemon has been killed. Never
/// looks into a mount. Tells how many mounts and devices it found.
pub(super) fn clean(directory: &Path) -> Result<usize, KernelError> {
    let failed = |source| KernelError::Io { what: format!("cleaning {}", directory.display()), source };
    // The directory itself may be a dead mount point; the one above it is not.
    let directory = match (directory.parent().map(Path::canonicalize), directory.file_name()) {
        (Some(Ok(above)), Some(name)) => above.join(name),
        (Some(Err(error)), _) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        (Some(Err(error)), _) => return Err(failed(error)),
        _ => return Err(failed(io::Error::other("not a directory of ours"))),
    };
    let mut found = 0;
    let mut clearing = Vec::new();
    for device in loop_device::bound_under(&directory).map_err(failed)? {
        found += 1;
        match device.clear(false) {
            Ok(device) => clearing.extend(device),
            Err((_, error)) => return Err(error),
        }
    }
    for _ in 0..STACKED_MAX {
        let mountinfo = std::fs::read_to_string("/proc/self/mountinfo").map_err(failed)?;
        let mounts = fuse_mounts(&mountinfo, &directory);
        if mounts.is_empty() {
            break;
        }
        for mount in mounts {
            found += 1;
            take_away(&mount).map_err(|error| failed(error.into()))?;
        }
    }
    let released: Vec<_> = clearing.into_iter().map(Clearing::release).collect();
    for device in released {
        if !device.wait_unbound(UNBIND_PATIENCE) {
            tracing::warn!(device = %device.path().display(), "a dead device is in use; it goes when it is closed");
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_mounts_are_found() {
        let mountinfo = "36 35 98:0 / /a/devices/v\\040w rw,nosuid - fuse holdfast rw\n\
                         37 35 98:0 / /a/devices2 rw - fuse holdfast rw\n\
                         38 35 98:0 / /a/devices rw - ext4 /dev/loop3 rw\n\
                         39 35 98:0 / /a/devices/x rw shared:3 - fuse.sshfs y rw\n";
        let found = fuse_mounts(mountinfo, Path::new("/a/devices"));
        assert_eq!(found, [Path::new("/a/devices/x"), Path::new("/a/devices/v w")]);
    }
}
