//! The programs of the node that know file systems, as child processes.
//!
//! Called as Kubernetes' own mount library calls them. None is killed while it works: a check or a resize cut off in the
//! middle would be worse than a slow one.

use std::io::ErrorKind;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use super::content::{self, Content};
use super::{Filesystem, MountError, system};

/// Bytes of a program's words that an error repeats.
const SAID_BYTES_MAX: usize = 600;

/// Where the programs are found.
#[derive(Clone, Debug)]
pub struct Programs {
    path: String,
}

impl Default for Programs {
    fn default() -> Self {
        // Unprivileged users' paths lack those where such programs are.
        let given = std::env::var("PATH").unwrap_or_default();
        Self { path: format!("{given}:/usr/sbin:/sbin:/usr/bin:/bin") }
    }
}

/// The end of what a program printed.
fn said(output: &Output) -> String {
    let all = [&output.stdout[..], &output.stderr[..]].concat();
    let text = String::from_utf8_lossy(&all).trim().replace('\n', "; ");
    let from =
        text.char_indices().map(|(at, _)| at).find(|at| text.len() - at <= SAID_BYTES_MAX).unwrap_or(0);
    text[from..].to_owned()
}

fn failed(program: &str, arguments: &[&str], output: &Output) -> MountError {
    MountError::Program {
        program: [&[program], arguments].concat().join(" "),
        status: output.status.to_string(),
        said: said(output),
    }
}

fn text(path: &Path) -> Result<&str, MountError> {
    path.to_str().ok_or_else(|| MountError::Options(format!("the path {} is no text", path.display())))
}

impl Programs {
    fn run(&self, program: &'static str, arguments: &[&str]) -> Result<Output, MountError> {
        let mut command = Command::new(program);
        command.args(arguments).env("PATH", &self.path).env("LC_ALL", "C").stdin(Stdio::null());
        tracing::debug!(program, ?arguments, "runs");
        command.output().map_err(|error| match error.kind() {
            ErrorKind::NotFound => MountError::Missing(program),
            _ => system(program)(error),
        })
    }

    fn must(&self, program: &'static str, arguments: &[&str]) -> Result<Output, MountError> {
        let output = self.run(program, arguments)?;
        if output.status.success() { Ok(output) } else { Err(failed(program, arguments, &output)) }
    }

    /// What `blkid` finds on a device; `None` if it finds nothing.
    pub(super) fn signature(&self, device: &Path) -> Result<Option<Content>, MountError> {
        let arguments = ["-p", "-s", "TYPE", "-s", "PTTYPE", "-o", "export", text(device)?];
        let output = self.run("blkid", &arguments)?;
        match output.status.code() {
            Some(0) => Ok(content::parse(&String::from_utf8_lossy(&output.stdout))
                .or_else(|| Some(Content::Other("a signature of an unknown kind".into())))),
            Some(2) => Ok(None),
            Some(8) => Ok(Some(Content::Other("signatures of several kinds".into()))),
            _ => Err(failed("blkid", &arguments, &output)),
        }
    }

    /// Makes a file system on a device that is empty. What is there after all, mkfs.xfs refuses by itself.
    pub fn make(&self, filesystem: Filesystem, device: &Path) -> Result<(), MountError> {
        tracing::info!(device = %device.display(), filesystem = filesystem.as_str(), "is empty and is formatted");
        let device = text(device)?;
        match filesystem {
            // No reserve for root, and nothing to discard: the device is empty.
            Filesystem::Ext4 => self.must("mkfs.ext4", &["-q", "-m0", "-E", "nodiscard", device]),
            Filesystem::Xfs => self.must("mkfs.xfs", &["-q", "-K", device]),
        }
        .map(drop)
    }

    /// Checks and repairs what can be repaired without a decision.
    pub fn check(&self, filesystem: Filesystem, device: &Path) -> Result<(), MountError> {
        // XFS repairs itself from its log when it is mounted.
        if filesystem == Filesystem::Xfs {
            return Ok(());
        }
        let output = self.run("fsck", &["-a", text(device)?])?;
        const UNCORRECTED: i32 = 4;
        match output.status.code() {
            Some(0) => Ok(()),
            Some(1) => {
                tracing::warn!(device = %device.display(), said = said(&output), "the file system was repaired");
                Ok(())
            }
            Some(code) if code & UNCORRECTED == 0 => {
                tracing::warn!(device = %device.display(), code, said = said(&output), "the check did not end well");
                Ok(())
            }
            Some(UNCORRECTED..) => Err(MountError::Damaged {
                device: device.display().to_string(),
                program: format!("fsck.{} {}", filesystem.as_str(), device.display()),
                said: said(&output),
            }),
            _ => Err(failed("fsck", &["-a", text(device)?], &output)),
        }
    }

    /// Grows an ext4 that is not mounted to its device, after the full check that this takes.
    pub fn grow_unmounted_ext4(&self, device: &Path) -> Result<(), MountError> {
        let arguments = ["-f", "-p", text(device)?];
        let output = self.run("e2fsck", &arguments)?;
        const CORRECTED: i32 = 1;
        if !matches!(output.status.code(), Some(0 | CORRECTED)) {
            return Err(failed("e2fsck", &arguments, &output));
        }
        self.must("resize2fs", &[text(device)?]).map(drop)
    }

    /// Whether the kernel lets an ext4 grow while it is mounted: that takes CAP_SYS_RESOURCE, which root in a container
    /// may lack.
    pub fn may_grow_mounted_ext4() -> Result<bool, MountError> {
        let path = "/proc/self/status";
        let status = std::fs::read_to_string(path).map_err(system(path))?;
        let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
        let bits = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0);
        const CAP_SYS_RESOURCE: u32 = 24;
        Ok(bits >> CAP_SYS_RESOURCE & 1 == 1)
    }

    /// Grows a mounted file system to its device; nothing to do is fine.
    pub fn grow(&self, filesystem: Filesystem, device: &Path, mounted_at: &Path) -> Result<(), MountError> {
        match filesystem {
            Filesystem::Ext4 => self.must("resize2fs", &[text(device)?]),
            Filesystem::Xfs => self.must("xfs_growfs", &["-d", text(mounted_at)?]),
        }
        .map(drop)
    }

    /// Lets a loop device see that what it stands on has grown.
    pub fn see_size(&self, device: &Path) -> Result<(), MountError> {
        self.must("losetup", &["-c", text(device)?]).map(drop)
    }
}
