//! Volumes as files and block devices of the kernel: a FUSE mount that shows one file, and a loop device on it.
//!
//! The kernel's requests are taken by a thread of fuser (`filesystem`), pass to the shard by messages bounded in number
//! and bytes (`budget`), are carried out beside the session (`serve`), and are answered from there. Nothing of ours is
//! kept dirty in the page cache: the file is opened for direct I/O. A file system on the loop device has its own cache,
//! as on any disk, and its flushes complete at once because nothing acknowledged is volatile.
//!
//! Whoever opens the file waits for the shard, so the shard itself never does: mounting, binding, resizing and
//! unmounting run on threads of their own (`helper`), with deadlines. What a killed daemon leaves behind — a mount that
//! answers "transport endpoint is not connected", a loop device on it — is removed by [`clean`] before anything is made
//! in its place.

mod budget;
mod filesystem;
mod helper;
mod loop_device;
mod loop_ioctl;
mod mount;
mod serve;

use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{Mutex, mpsc};

use crate::edge::Edge;
use budget::Budget;
use filesystem::{FILE_NAME, OneFile};
use loop_device::LoopDevice;
use mount::Mounted;

/// How long making, resizing or removing a device may take. Nothing of it waits for the volume.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long a block device that nobody has open may take to write out and be unbound.
const WRITE_OUT_PATIENCE: Duration = Duration::from_secs(5);

/// Why a device could not be made, changed or removed.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// This machine or this user has no such devices.
    #[error("{what} cannot be made: {why}")]
    Unavailable {
        /// What is missing.
        what: &'static str,
        /// Why.
        why: String,
        /// What to do next.
        hint: &'static str,
    },
    /// Somebody has mounted or opened it.
    #[error("{} is in use", .0.display())]
    InUse(PathBuf),
    /// The kernel refused.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: String,
        /// Its answer.
        source: io::Error,
    },
    /// The kernel did not answer. What was asked may still happen.
    #[error("{what} did not end within {seconds} s")]
    TimedOut {
        /// What was being done.
        what: &'static str,
        /// How long it was waited for.
        seconds: u64,
    },
}

impl KernelError {
    /// What to do next.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Unavailable { hint, .. } => hint,
            Self::InUse(_) => "unmount and close it first, or use --force: what is in use then sees errors",
            Self::Io { .. } => "the kernel's log (`dmesg`) may tell more",
            Self::TimedOut { .. } => "see what holds the device (`lsof`, `dmesg`) and try again",
        }
    }
}

/// What the guest is shown.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shown {
    /// A regular file.
    File,
    /// A block device.
    Loop {
        /// Whether the loop device passes the page cache of the file by. Faster, and nothing is held twice.
        direct_io: bool,
    },
}

/// How a device is taken away.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Close {
    /// Refused while it is mounted or open.
    Orderly,
    /// Whatever happens; what is in use then sees errors.
    Forced,
}

/// Whether files can be shown on this machine by this user; else why not.
pub fn file_available() -> Result<(), KernelError> {
    mount::available()
}

/// Whether block devices can be shown on this machine by this user; else why not.
pub fn loop_available() -> Result<(), KernelError> {
    mount::available()?;
    loop_device::available()
}

/// Removes what daemons that were killed left at and under `directory`: dead mounts, and loop devices on their files.
/// Tells how many of them there were. Blocks; never call it on a thread that serves a device.
pub fn clean(directory: &Path) -> Result<usize, KernelError> {
    mount::clean(directory)
}

/// [`clean`] from a shard's thread.
pub async fn clean_aside(directory: PathBuf) -> Result<usize, KernelError> {
    helper::run("cleaning devices", PATIENCE, move || clean(&directory)).await?
}

/// What must be undone.
struct Parts {
    mounted: Mounted,
    looped: Option<LoopDevice>,
    budget: Arc<Budget>,
}

/// A device of the kernel on a served [`Edge`]. It stays until [`KernelDevice::close`]; a dropped one is closed by
/// force in the background.
pub struct KernelDevice {
    path: PathBuf,
    edge: Rc<Edge>,
    size: Arc<AtomicU64>,
    direct_io: bool,
    /// One change at a time.
    parts: Mutex<Option<Parts>>,
}

impl KernelDevice {
    /// Shows `edge` at `directory`, which is made, and cleaned of what a killed daemon left there. Must be called on
    /// the shard's thread.
    pub async fn open(edge: &Rc<Edge>, directory: &Path, shown: Shown) -> Result<Self, KernelError> {
        match shown {
            Shown::File => file_available()?,
            Shown::Loop { .. } => loop_available()?,
        }
        if let Err(error) = rustix::process::configure_io_flusher_behavior(true) {
            tracing::debug!(%error, "the shard has no precedence in reclaim");
        }
        let (requests, inbox) = mpsc::unbounded_channel();
        let budget = Arc::new(Budget::default());
        let size = Arc::new(AtomicU64::new(edge.size_bytes()));
        let read_only = edge.device().read_only();
        let files = OneFile {
            size: size.clone(),
            read_only,
            owner: (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw()),
            budget: budget.clone(),
            requests,
        };
        holdfast_env::spawn("fuse-serve", serve::serve(edge.clone(), inbox, size.clone()));
        let directory = directory.to_owned();
        let opening =
            helper::run("opening a device", PATIENCE, move || build(files, &directory, read_only, shown));
        let (path, direct_io, mounted, looped) = opening.await??;
        let parts = Parts { mounted, looped, budget };
        Ok(Self { path, edge: edge.clone(), size, direct_io, parts: Mutex::new(Some(parts)) })
    }

    /// What a guest opens or mounts: the file or the block device.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is a loop device that passes the page cache of its file by.
    pub fn direct_io(&self) -> bool {
        self.direct_io
    }

    /// Shows the device's present size, after it has grown.
    pub async fn resized(&self) -> Result<(), KernelError> {
        self.size.store(self.edge.size_bytes(), Ordering::Relaxed);
        let parts = self.parts.lock().await;
        let Some(looped) = parts.as_ref().and_then(|parts| parts.looped.clone()) else { return Ok(()) };
        helper::run("resizing a loop device", PATIENCE, move || looped.set_capacity()).await?
    }

    /// Takes it away. An orderly close that is refused leaves it as it was; a second one does nothing.
    pub async fn close(&self, how: Close) -> Result<(), KernelError> {
        let mut slot = self.parts.lock().await;
        let Some(parts) = slot.take() else { return Ok(()) };
        let (left, result) = helper::run("closing a device", PATIENCE, move || parts.close(how)).await?;
        *slot = left;
        result
    }
}

impl Drop for KernelDevice {
    fn drop(&mut self) {
        let Some(parts) = self.parts.get_mut().take() else { return };
        tracing::warn!(device = %self.path.display(), "a device is taken away by force");
        let closing = std::thread::Builder::new().name("closing a device".into()).spawn(move || {
            if let (_, Err(error)) = parts.close(Close::Forced) {
                tracing::warn!(%error, "a dropped device was not taken away");
            }
        });
        if let Err(error) = closing {
            tracing::warn!(%error, "a dropped device was not taken away");
        }
    }
}

fn build(
    files: OneFile,
    directory: &Path,
    read_only: bool,
    shown: Shown,
) -> Result<(PathBuf, bool, Mounted, Option<LoopDevice>), KernelError> {
    let failed = |source| KernelError::Io { what: format!("making {}", directory.display()), source };
    if let Some(above) = directory.parent() {
        std::fs::create_dir_all(above).map_err(failed)?;
    }
    let left = clean(directory)?;
    if left > 0 {
        tracing::info!(left, directory = %directory.display(), "removed what a killed daemon left");
    }
    std::fs::create_dir_all(directory).map_err(failed)?;
    let directory = directory.canonicalize().map_err(failed)?;
    let budget = files.budget.clone();
    let mounted = Mounted::new(files, &directory)?;
    let file = directory.join(FILE_NAME);
    let Shown::Loop { direct_io } = shown else { return Ok((file, false, mounted, None)) };
    match LoopDevice::bind(&file, read_only, direct_io) {
        Ok(device) => Ok((device.path(), device.direct_io(), mounted, Some(device))),
        Err(error) => {
            mounted.abort(&budget);
            Err(error)
        }
    }
}

impl Parts {
    /// What is left, if anything, and the result.
    fn close(self, how: Close) -> (Option<Self>, Result<(), KernelError>) {
        match how {
            Close::Orderly => self.close_orderly(),
            Close::Forced => (None, self.close_by_force()),
        }
    }

    fn close_orderly(mut self) -> (Option<Self>, Result<(), KernelError>) {
        if let Some(device) = self.looped.take() {
            let path = device.path();
            match device.clear(true) {
                Ok(None) => {}
                // Its last writes go to the file, which is still served.
                Ok(Some(clearing)) => {
                    let device = clearing.release();
                    if !device.wait_unbound(WRITE_OUT_PATIENCE) {
                        self.looped = Some(device);
                        return (Some(self), Err(KernelError::InUse(path)));
                    }
                }
                Err((device, error)) => {
                    self.looped = Some(device);
                    return (Some(self), Err(error));
                }
            }
        }
        let Self { mounted, looped, budget } = self;
        let (mounted, result) = mounted.unmount(&budget);
        (mounted.map(|mounted| Self { mounted, looped, budget }), result)
    }

    /// The device is marked first, while the kernel still knows its file's name; then the mount ends, and with it
    /// every request that the device waits for; then the device can be let go.
    fn close_by_force(self) -> Result<(), KernelError> {
        let Self { mounted, looped, budget } = self;
        budget.close();
        let marked = looped.map(|device| device.clear(false)).transpose();
        mounted.abort(&budget);
        match marked {
            Ok(marked) => {
                if let Some(device) = marked.flatten().map(loop_device::Clearing::release)
                    && !device.wait_unbound(mount::UNBIND_PATIENCE)
                {
                    let device = device.path();
                    tracing::warn!(device = %device.display(), "the device is in use; it goes when it is closed");
                }
                Ok(())
            }
            Err((_, error)) => Err(error),
        }
    }
}
