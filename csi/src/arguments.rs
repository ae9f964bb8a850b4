//! What a CO sends, checked: texts within the specification's limits, sizes, volume capabilities.

use std::collections::HashMap;
use std::path::{Component, Path, PathBuf};

use tonic::Status;

use crate::errors::invalid;
use crate::mounter::Filesystem;
use crate::proto::volume_capability::AccessType;
use crate::proto::volume_capability::access_mode::Mode;
use crate::proto::{CapacityRange, VolumeCapability};

/// Longest id or name, in bytes (specification, "Size Limits").
const TEXT_BYTES_MAX: usize = 128;
/// Longest node id, in bytes.
const NODE_ID_BYTES_MAX: usize = 256;
/// Largest map, keys and values together, in bytes.
const MAP_BYTES_MAX: usize = 4096;
/// Longest path, in bytes: the kernel's.
const PATH_BYTES_MAX: usize = 4095;
/// Size of a volume whose size nobody asked for, in bytes.
const DEFAULT_BYTES: u64 = 1 << 30;
/// Size of a block, of which volumes are whole numbers.
const BLOCK_BYTES: u64 = 4096;
/// Smallest volume that mkfs.xfs takes, in bytes.
const XFS_BYTES_MIN: u64 = 300 << 20;

fn bounded<'t>(field: &str, text: &'t str, most: usize) -> Result<&'t str, Status> {
    if text.is_empty() {
        return Err(invalid(format!("{field} is missing")));
    }
    if text.len() > most {
        return Err(invalid(format!("{field} has {} bytes, more than {most}", text.len())));
    }
    Ok(text)
}

/// A required id or name.
pub(crate) fn text<'t>(field: &str, text: &'t str) -> Result<&'t str, Status> {
    bounded(field, text, TEXT_BYTES_MAX)
}

/// A required node id.
pub(crate) fn node_id(id: &str) -> Result<&str, Status> {
    bounded("node_id", id, NODE_ID_BYTES_MAX)
}

/// The name of a new volume: CSI forbids control characters only.
pub(crate) fn name(name: &str) -> Result<&str, Status> {
    let name = text("name", name)?;
    if name.chars().any(|c| c.is_control() && !['\t', '\n', '\r'].contains(&c)) {
        return Err(invalid("name has control characters"));
    }
    Ok(name)
}

/// A required path.
pub(crate) fn path(field: &str, path: &str) -> Result<PathBuf, Status> {
    let path = Path::new(bounded(field, path, PATH_BYTES_MAX)?);
    if path.as_os_str().as_encoded_bytes().contains(&0) {
        return Err(invalid(format!("{field} has a zero byte")));
    }
    Ok(path.to_owned())
}

/// A required path that is made or mounted on: absolute, without `..`.
pub(crate) fn absolute(field: &str, text: &str) -> Result<PathBuf, Status> {
    let path = path(field, text)?;
    if !path.is_absolute() || path.components().any(|part| part == Component::ParentDir) {
        return Err(invalid(format!("{field} '{text}' must be an absolute path without '..'")));
    }
    Ok(path)
}

/// A map within its limit.
pub(crate) fn map(field: &str, map: &HashMap<String, String>) -> Result<(), Status> {
    let bytes: usize = map.iter().map(|(key, value)| key.len() + value.len()).sum();
    if bytes > MAP_BYTES_MAX {
        return Err(invalid(format!("{field} has {bytes} bytes, more than {MAP_BYTES_MAX}")));
    }
    Ok(())
}

/// How a volume is to be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Use {
    pub(crate) access: Access,
    pub(crate) mode: Mode,
}

/// What a volume appears as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// A block device.
    Block,
    /// A file system; `None` leaves the kind to the volume's parameters.
    Mount { filesystem: Option<Filesystem>, flags: Vec<String> },
}

impl Use {
    /// Whether nothing is ever written.
    pub(crate) fn reads_only(&self) -> bool {
        self.mode == Mode::SingleNodeReaderOnly
    }
    /// Whether the volume may be published at several paths of its node.
    pub(crate) fn several_targets(&self) -> bool {
        self.mode == Mode::SingleNodeMultiWriter
    }
}

/// The kind of file system that a word means; `None` if it is empty.
pub(crate) fn filesystem(word: &str) -> Result<Option<Filesystem>, Status> {
    match word {
        "" => Ok(None),
        word => word
            .parse()
            .map(Some)
            .map_err(|()| invalid(format!("the file system '{word}' is not supported: use ext4 or xfs"))),
    }
}

/// A required capability.
pub(crate) fn capability(given: Option<&VolumeCapability>) -> Result<Use, Status> {
    let given = given.ok_or_else(|| invalid("volume_capability is missing"))?;
    let mode = given.access_mode.as_ref().ok_or_else(|| invalid("access_mode is missing"))?.mode;
    let mode = match Mode::try_from(mode) {
        Ok(Mode::Unknown) | Err(_) => return Err(invalid(format!("the access mode {mode} is unknown"))),
        Ok(Mode::MultiNodeReaderOnly | Mode::MultiNodeSingleWriter | Mode::MultiNodeMultiWriter) => {
            return Err(invalid(
                "a volume is used on one node at a time: access modes of several nodes are not built yet",
            ));
        }
        Ok(mode) => mode,
    };
    let access = match given.access_type.as_ref().ok_or_else(|| invalid("access_type is missing"))? {
        AccessType::Block(_) => Access::Block,
        AccessType::Mount(mount) => {
            let bytes: usize = mount.mount_flags.iter().map(String::len).sum();
            if bytes > MAP_BYTES_MAX {
                return Err(invalid(format!("mount_flags have {bytes} bytes, more than {MAP_BYTES_MAX}")));
            }
            if !mount.volume_mount_group.is_empty() {
                return Err(invalid("volume_mount_group is not supported: the CO sets the group"));
            }
            Access::Mount { filesystem: filesystem(&mount.fs_type)?, flags: mount.mount_flags.clone() }
        }
    };
    Ok(Use { access, mode })
}

/// Required capabilities, all of which are to be had.
pub(crate) fn capabilities(given: &[VolumeCapability]) -> Result<Vec<Use>, Status> {
    if given.is_empty() {
        return Err(invalid("volume_capabilities are missing"));
    }
    given.iter().map(|one| capability(Some(one))).collect()
}

/// What size is asked for, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// At least this; not 0.
    pub(crate) required: u64,
    /// At most this; 0 for no limit.
    pub(crate) limit: u64,
}

impl Wanted {
    /// Whether a volume of this size is what is asked for.
    pub(crate) fn allows(self, size: u64) -> bool {
        size >= self.required && (self.limit == 0 || size <= self.limit)
    }
}

/// A size range; one that is left out means an ordinary volume.
pub(crate) fn capacity(range: Option<&CapacityRange>) -> Result<Wanted, Status> {
    let Some(range) = range else { return Ok(Wanted { required: DEFAULT_BYTES, limit: 0 }) };
    let number = |field: &str, value: i64| {
        u64::try_from(value).map_err(|_| invalid(format!("{field} {value} is negative")))
    };
    let required = number("required_bytes", range.required_bytes)?;
    let limit = number("limit_bytes", range.limit_bytes)?;
    if required == 0 && limit == 0 {
        return Err(invalid("capacity_range has neither required_bytes nor limit_bytes"));
    }
    if limit > 0 && limit < required.max(BLOCK_BYTES) {
        return Err(Status::out_of_range(format!(
            "no volume has at least {required} and at most {limit} bytes: volumes are whole blocks of {BLOCK_BYTES}"
        )));
    }
    if required == 0 {
        return Ok(Wanted { required: DEFAULT_BYTES.min(limit / BLOCK_BYTES * BLOCK_BYTES), limit });
    }
    Ok(Wanted { required, limit })
}

/// Refuses a size that no file system of the asked kind can be made on.
pub(crate) fn room_for_filesystem(
    uses: &[Use],
    default: Option<Filesystem>,
    wanted: Wanted,
) -> Result<(), Status> {
    let is_xfs = |one: &Use| match &one.access {
        Access::Mount { filesystem, .. } => filesystem.or(default) == Some(Filesystem::Xfs),
        Access::Block => false,
    };
    if uses.iter().any(is_xfs) && wanted.required.next_multiple_of(BLOCK_BYTES) < XFS_BYTES_MIN {
        return Err(Status::out_of_range(format!(
            "xfs needs {XFS_BYTES_MIN} bytes at least, {} are asked for: ask for more, or use ext4",
            wanted.required
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::volume_capability::{AccessMode, MountVolume};
    use tonic::Code;

    fn range(required_bytes: i64, limit_bytes: i64) -> Result<Wanted, Code> {
        capacity(Some(&CapacityRange { required_bytes, limit_bytes })).map_err(|status| status.code())
    }

    #[test]
    fn sizes_are_ranges() {
        assert_eq!(capacity(None).map_err(|s| s.code()), Ok(Wanted { required: 1 << 30, limit: 0 }));
        assert_eq!(range(0, 0), Err(Code::InvalidArgument));
        assert_eq!(range(-1, 0), Err(Code::InvalidArgument));
        assert_eq!(range(10, -1), Err(Code::InvalidArgument));
        assert_eq!(range(8192, 4096), Err(Code::OutOfRange));
        assert_eq!(range(0, 4095), Err(Code::OutOfRange));
        assert_eq!(range(0, 10_000), Ok(Wanted { required: 8192, limit: 10_000 }));
        assert_eq!(range(5, 0), Ok(Wanted { required: 5, limit: 0 }));
        let wanted = Wanted { required: 5, limit: 8192 };
        assert!(wanted.allows(4096) && wanted.allows(8192) && !wanted.allows(12288) && !wanted.allows(4));
    }

    fn asked(mode: Mode, fs_type: &str) -> VolumeCapability {
        let mount = MountVolume { fs_type: fs_type.into(), ..Default::default() };
        VolumeCapability {
            access_type: Some(AccessType::Mount(mount)),
            access_mode: Some(AccessMode { mode: mode.into() }),
        }
    }

    #[test]
    fn capabilities_of_one_node_are_had_and_others_refused() {
        let used = capability(Some(&asked(Mode::SingleNodeWriter, "xfs"))).expect("is had");
        assert_eq!(used.access, Access::Mount { filesystem: Some(Filesystem::Xfs), flags: vec![] });
        assert!(!used.reads_only() && !used.several_targets());
        for wrong in [
            asked(Mode::Unknown, ""),
            asked(Mode::MultiNodeMultiWriter, ""),
            asked(Mode::MultiNodeReaderOnly, ""),
            asked(Mode::SingleNodeWriter, "ntfs"),
            VolumeCapability::default(),
        ] {
            let refused = capability(Some(&wrong)).expect_err("is refused");
            assert_eq!(refused.code(), Code::InvalidArgument, "{wrong:?}");
        }
        assert_eq!(capability(None).expect_err("is refused").code(), Code::InvalidArgument);
        assert_eq!(capabilities(&[]).expect_err("is refused").code(), Code::InvalidArgument);
    }

    #[test]
    fn texts_have_limits() {
        assert!(text("volume_id", &"a".repeat(128)).is_ok());
        assert!(text("volume_id", &"a".repeat(129)).is_err());
        assert!(text("volume_id", "").is_err());
        assert!(name("größe").is_ok());
        assert!(name("a\u{1}").is_err());
        assert!(absolute("target_path", &format!("/{}", "a/".repeat(200))).is_ok());
        assert!(absolute("target_path", "some/path").is_err());
        assert!(absolute("target_path", "/a/../b").is_err());
        assert!(map("parameters", &HashMap::from([("a".into(), "b".repeat(4096))])).is_err());
    }

    #[test]
    fn xfs_needs_room() {
        let xfs = [capability(Some(&asked(Mode::SingleNodeWriter, "xfs"))).expect("is had")];
        let any = [capability(Some(&asked(Mode::SingleNodeWriter, ""))).expect("is had")];
        let small = Wanted { required: 100 << 20, limit: 0 };
        assert!(room_for_filesystem(&xfs, None, small).is_err());
        assert!(room_for_filesystem(&any, Some(Filesystem::Xfs), small).is_err());
        assert!(room_for_filesystem(&any, None, small).is_ok());
        assert!(room_for_filesystem(&xfs, None, Wanted { required: 300 << 20, limit: 0 }).is_ok());
    }
}
