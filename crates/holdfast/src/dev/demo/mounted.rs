//! A file system that is mounted for as long as a value lives.

use std::path::{Path, PathBuf};

use holdfast_types::UserError;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::failed;

/// A mounted file system; dropped, it is taken away from under whoever still uses it.
pub(super) struct Mounted {
    path: PathBuf,
    there: bool,
}

impl Mounted {
    /// Mounts an ext4 file system.
    pub(super) fn new(device: &str, path: &Path) -> Result<Self, UserError> {
        let wrong = |error: &dyn std::fmt::Display| failed(&format!("{device} cannot be mounted"), error);
        std::fs::create_dir_all(path).map_err(|error| wrong(&error))?;
        mount(device, path, c"ext4", MountFlags::NOATIME, c"").map_err(|error| wrong(&error))?;
        Ok(Self { path: path.to_owned(), there: true })
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Unmounts it; everything is on the device then.
    pub(super) fn unmount(mut self) -> Result<(), UserError> {
        self.there = false;
        unmount(&self.path, UnmountFlags::empty())
            .map_err(|error| failed("a file system stays mounted", error))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if self.there
            && let Err(error) = unmount(&self.path, UnmountFlags::DETACH)
        {
            tracing::warn!(%error, path = %self.path.display(), "a file system stays mounted");
        }
    }
}
