//! A loop device on a file. Everything here blocks and may touch the file: never on the thread that serves it.
//!
//! The daemon keeps no descriptor of the device open. Were the last one closed by a dying daemon, the kernel would
//! write the device's dirty pages to a file that nobody serves any more, and the dying process would wait for itself.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Mode, OFlags, makedev, mknodat};

use super::KernelError;
use super::loop_ioctl::{self, LO_FLAGS_DIRECT_IO, LO_FLAGS_READ_ONLY};

const CONTROL: &str = "/dev/loop-control";
/// Major number of loop devices.
const LOOP_MAJOR: u32 = 7;
/// Tries to get a free device before others do.
const TRIES_MAX: usize = 64;
/// Between looks whether it is.
const UNBIND_LOOK: Duration = Duration::from_millis(5);

/// A bound loop device. Dropping it leaves it bound; see [`LoopDevice::clear`].
#[derive(Clone, Debug)]
pub(super) struct LoopDevice {
    number: u32,
    backing: PathBuf,
}

/// A device that will be unbound as soon as nobody has it open; holds it until it is dropped.
pub(super) struct Clearing {
    device: LoopDevice,
    held: File,
}

/// Whether this process may make loop devices.
pub(super) fn available() -> Result<(), KernelError> {
    OpenOptions::new().read(true).write(true).open(CONTROL).map(drop).map_err(|error| {
        KernelError::Unavailable {
            what: "a loop device",
            why: format!("{CONTROL}: {error}"),
            hint: "run the daemon as root on a kernel with the loop driver, or use --frontend fuse or nbd",
        }
    })
}

/// The device's file; made if nothing has made it, as in a container with a `/dev` of its own.
fn node(number: u32) -> io::Result<PathBuf> {
    let path = PathBuf::from(format!("/dev/loop{number}"));
    if !path.exists() {
        let made =
            mknodat(CWD, &path, FileType::BlockDevice, Mode::RUSR | Mode::WUSR, makedev(LOOP_MAJOR, number));
        match made {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(path)
}

/// The file that a device is bound to, as the kernel names it.
fn backing_of(number: u32) -> Option<PathBuf> {
    let text = std::fs::read_to_string(format!("/sys/block/loop{number}/loop/backing_file")).ok()?;
    Some(PathBuf::from(text.trim_end_matches('\n')))
}

/// Devices that are bound to files under `directory`.
pub(super) fn bound_under(directory: &Path) -> io::Result<Vec<LoopDevice>> {
    let mut found = Vec::new();
    let devices = match std::fs::read_dir("/sys/block") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
        devices => devices?,
    };
    for entry in devices {
        let name = entry?.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("loop")?.parse().ok());
        if let Some(number) = number
            && let Some(backing) = backing_of(number)
            && backing.starts_with(directory)
        {
            found.push(LoopDevice { number, backing });
        }
    }
    Ok(found)
}

impl LoopDevice {
    /// Binds a free device to the file at `backing`. With `direct_io` the page cache of the file is passed by, where
    /// the file allows it.
    pub(super) fn bind(backing: &Path, read_only: bool, direct_io: bool) -> Result<Self, KernelError> {
        let failed = |what: &str| {
            let what = format!("{what} a loop device on {}", backing.display());
            move |source| KernelError::Io { what, source }
        };
        let file = OpenOptions::new().read(true).write(!read_only).open(backing).map_err(failed("making"))?;
        let control = OpenOptions::new().read(true).write(true).open(CONTROL).map_err(failed("finding"))?;
        let mut flags = if read_only { LO_FLAGS_READ_ONLY } else { 0 };
        if direct_io {
            flags |= LO_FLAGS_DIRECT_IO;
        }
        for _ in 0..TRIES_MAX {
            let number = loop_ioctl::get_free(&control).map_err(failed("finding"))?;
            let path = node(number).map_err(failed("finding"))?;
            let device =
                OpenOptions::new().read(true).write(!read_only).open(path).map_err(failed("opening"))?;
            match loop_ioctl::configure(&device, file.as_fd(), flags) {
                Ok(()) => return Ok(Self { number, backing: backing.to_owned() }),
                Err(error) if error.raw_os_error() == Some(rustix::io::Errno::BUSY.raw_os_error()) => {}
                Err(error) => return Err(failed("binding")(error)),
            }
        }
        Err(failed("binding")(io::Error::other("others were faster every time")))
    }

    /// The block device.
    pub(super) fn path(&self) -> PathBuf {
        PathBuf::from(format!("/dev/loop{}", self.number))
    }

    /// Whether the kernel passes the page cache by.
    pub(super) fn direct_io(&self) -> bool {
        let told = std::fs::read_to_string(format!("/sys/block/loop{}/loop/dio", self.number));
        told.is_ok_and(|text| text.trim() == "1")
    }

    fn failed(&self, what: &str) -> impl Fn(io::Error) -> KernelError + use<> {
        let what = format!("{what} {}", self.path().display());
        move |source| KernelError::Io { what: what.clone(), source }
    }

    /// Waits at most `patience` until it is unbound; false if somebody still has it open.
    pub(super) fn wait_unbound(&self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        while self.is_ours() {
            if Instant::now() > until {
                return false;
            }
            std::thread::sleep(UNBIND_LOOK);
        }
        true
    }

    fn is_ours(&self) -> bool {
        backing_of(self.number).as_ref() == Some(&self.backing)
    }

    /// Takes over the size of the file.
    pub(super) fn set_capacity(&self) -> Result<(), KernelError> {
        let failed = self.failed("resizing");
        // The kernel asks the file system for the size only when somebody else does.
        std::fs::metadata(&self.backing).map_err(&failed)?;
        let device = File::open(self.path()).map_err(&failed)?;
        loop_ioctl::set_capacity(&device).map_err(&failed)
    }

    /// Begins to unbind it. With `exclusive` it is refused while somebody has claimed it: mounted it, or stacked
    /// something on it. `None` if it has been unbound already, by whomsoever.
    pub(super) fn clear(self, exclusive: bool) -> Result<Option<Clearing>, (Self, KernelError)> {
        let flags = if exclusive { OFlags::EXCL } else { OFlags::empty() };
        let held = match OpenOptions::new().read(true).custom_flags(flags.bits() as i32).open(self.path()) {
            Ok(held) => held,
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                let path = self.path();
                return Err((self, KernelError::InUse(path)));
            }
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::NXIO.raw_os_error()) => {
                return Ok(None);
            }
            Err(error) => {
                let error = self.failed("opening")(error);
                return Err((self, error));
            }
        };
        // While it is held it cannot be bound to anything else, so what is seen now is what is unbound.
        if !self.is_ours() {
            return Ok(None);
        }
        match loop_ioctl::clear(&held) {
            Ok(()) => Ok(Some(Clearing { device: self, held })),
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::NXIO.raw_os_error()) => Ok(None),
            Err(error) => {
                let error = self.failed("unbinding")(error);
                Err((self, error))
            }
        }
    }
}

impl Clearing {
    /// Lets it go; it is unbound once nobody has it open. Tells which device that is.
    pub(super) fn release(self) -> LoopDevice {
        // Closing the last descriptor writes the device's dirty pages to its file.
        drop(self.held);
        self.device
    }
}
