//! What is mounted, from `/proc/self/mountinfo`.

use std::fmt;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use super::{MountError, system};

/// A device's number.
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord)]
pub struct DeviceNumber {
    /// The driver's part.
    pub major: u32,
    /// The device's part.
    pub minor: u32,
}

impl DeviceNumber {
    /// From `st_dev` or `st_rdev`.
    pub fn of(number: u64) -> Self {
        Self { major: rustix::fs::major(number), minor: rustix::fs::minor(number) }
    }
}

impl fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// A mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// The device of the file system.
    pub device: DeviceNumber,
    /// What of the file system is mounted, from its root.
    pub root: PathBuf,
    /// Where.
    pub target: PathBuf,
    /// The kind of file system.
    pub kind: String,
    /// Options of this mount.
    options: Vec<String>,
    /// Options of the file system.
    super_options: Vec<String>,
}

impl Mount {
    /// Whether nothing can be written through it.
    pub fn read_only(&self) -> bool {
        self.options.iter().chain(&self.super_options).any(|option| option == "ro")
    }
    /// Whether the file system has an option.
    pub fn has_super_option(&self, word: &str) -> bool {
        self.super_options.iter().any(|option| option == word)
    }
}

/// All mounts that this process sees, in the order in which they were made.
pub struct Table(Vec<Mount>);

/// The kernel writes blanks and backslashes as octal escapes.
fn unescape(text: &str) -> PathBuf {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let digits = bytes.get(at + 1..at + 4).filter(|_| bytes[at] == b'\\');
        let code = digits
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(code) => {
                out.push(code);
                at += 4;
            }
            None => {
                out.push(bytes[at]);
                at += 1;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(out))
}

/// One line; `None` if it is not understood.
fn parse(line: &str) -> Option<Mount> {
    let (before, after) = line.split_once(" - ")?;
    let mut fields = before.split(' ').skip(2);
    let (major, minor) = fields.next()?.split_once(':')?;
    let device = DeviceNumber { major: major.parse().ok()?, minor: minor.parse().ok()? };
    let (root, target, options) = (fields.next()?, fields.next()?, fields.next()?);
    let mut rest = after.split(' ');
    let (kind, _source, super_options) = (rest.next()?, rest.next()?, rest.next().unwrap_or_default());
    let list = |text: &str| text.split(',').map(str::to_owned).collect();
    Some(Mount {
        device,
        root: unescape(root),
        target: unescape(target),
        kind: kind.to_owned(),
        options: list(options),
        super_options: list(super_options),
    })
}

impl Table {
    /// The mounts of now.
    pub fn read() -> Result<Self, MountError> {
        let path = "/proc/self/mountinfo";
        let bytes = std::fs::read(path).map_err(system(path))?;
        Ok(Self::parse(&String::from_utf8_lossy(&bytes)))
    }

    fn parse(text: &str) -> Self {
        Self(text.lines().filter_map(parse).collect())
    }

    /// The topmost mount at a path (see [`super::canonical`]).
    pub fn at(&self, path: &Path) -> Option<&Mount> {
        self.0.iter().rev().find(|mount| mount.target == path)
    }

    /// Mounts of the file system on a device.
    pub fn of_filesystem(&self, device: DeviceNumber) -> impl Iterator<Item = &Mount> {
        self.0.iter().filter(move |mount| mount.device == device)
    }

    /// Paths at which a block device's node is bound.
    pub fn of_block_node(&self, device: DeviceNumber) -> Vec<&Path> {
        let bound = self
            .0
            .iter()
            .filter(|mount| mount.kind == "devtmpfs" && super::block_node(&mount.target) == Some(device));
        bound.map(|mount| mount.target.as_path()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINES: &str = "\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,errors=remount-ro
30 22 7:3 / /a\\040b/stage rw,nosuid shared:9 - xfs /dev/loop3 rw,nouuid
31 22 7:3 / /pods/x ro,relatime - xfs /dev/loop3 rw,nouuid
32 22 0:5 /loop4 /pods/y rw - devtmpfs udev rw,mode=755
33 22 7:9 / /pods/x rw - ext4 /dev/loop9 ro,shutdown
not a mount at all";

    #[test]
    fn the_kernels_table_is_read() {
        let table = Table::parse(LINES);
        let stage = table.at(Path::new("/a b/stage")).expect("is mounted");
        assert_eq!(stage.device, DeviceNumber { major: 7, minor: 3 });
        assert!(!stage.read_only());
        let top = table.at(Path::new("/pods/x")).expect("is mounted");
        assert_eq!((top.device.minor, top.kind.as_str()), (9, "ext4"));
        assert!(top.read_only() && top.has_super_option("shutdown"));
        let targets: Vec<&Path> = table.of_filesystem(stage.device).map(|m| m.target.as_path()).collect();
        assert_eq!(targets, [Path::new("/a b/stage"), Path::new("/pods/x")]);
        assert_eq!(table.at(Path::new("/pods/y")).map(|m| m.root.clone()), Some("/loop4".into()));
        assert!(table.at(Path::new("/nowhere")).is_none());
    }
}
