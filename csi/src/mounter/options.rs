//! Mount options: those that the kernel takes as flags, and those that it passes on to the file system.

use std::ffi::CString;

use rustix::mount::MountFlags;

use super::{Filesystem, MountError};

/// Options that are flags.
const FLAGS: &[(&str, MountFlags)] = &[
    ("ro", MountFlags::RDONLY),
    ("nosuid", MountFlags::NOSUID),
    ("nodev", MountFlags::NODEV),
    ("noexec", MountFlags::NOEXEC),
    ("sync", MountFlags::SYNCHRONOUS),
    ("dirsync", MountFlags::DIRSYNC),
    ("noatime", MountFlags::NOATIME),
    ("nodiratime", MountFlags::NODIRATIME),
    ("relatime", MountFlags::RELATIME),
    ("strictatime", MountFlags::STRICTATIME),
    ("lazytime", MountFlags::LAZYTIME),
    ("nosymfollow", MountFlags::NOSYMFOLLOW),
];
/// Options that say what is so anyway, or that only mount(8) knows.
const IGNORED: &[&str] = &[
    "", "defaults", "rw", "suid", "dev", "exec", "async", "atime", "diratime", "_netdev", "nofail", "auto",
    "noauto",
];
/// Options that would make of a mount something else than what CSI asks for.
const REFUSED: &[&str] =
    &["bind", "rbind", "remount", "move", "loop", "shared", "slave", "private", "unbindable"];

/// Parsed options.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    flags: MountFlags,
    data: Vec<String>,
}

impl Options {
    /// From words, each of which may be a list with commas; the last one of two that contradict counts.
    pub fn parse(words: &[String], read_only: bool) -> Result<Self, MountError> {
        let mut out = Self { flags: MountFlags::empty(), data: Vec::new() };
        for word in words.iter().flat_map(|words| words.split(',')) {
            let word = word.trim();
            let name = word.split('=').next().unwrap_or_default();
            if REFUSED.contains(&name) {
                return Err(MountError::Options(format!("the mount option '{word}' is not for volumes")));
            }
            if word.bytes().any(|byte| byte < b' ') {
                return Err(MountError::Options("a mount option has control characters".into()));
            }
            match FLAGS.iter().find(|(flag, _)| *flag == word) {
                Some((_, flag)) => out.flags |= *flag,
                None if word == "rw" => out.flags -= MountFlags::RDONLY,
                None if IGNORED.contains(&word) => {}
                None => out.data.push(word.to_owned()),
            }
        }
        if read_only {
            out.flags |= MountFlags::RDONLY;
        }
        Ok(out)
    }

    /// Whether nothing may be written.
    pub fn read_only(&self) -> bool {
        self.flags.contains(MountFlags::RDONLY)
    }

    /// The flags.
    pub fn flags(&self) -> MountFlags {
        self.flags
    }

    /// What the file system is told.
    pub fn data(&self, filesystem: Filesystem) -> Result<Option<CString>, MountError> {
        let mut words: Vec<&str> = self.data.iter().map(String::as_str).collect();
        // A copy of a volume has its file system's id as well and may be mounted beside it.
        if filesystem == Filesystem::Xfs && !words.contains(&"nouuid") {
            words.push("nouuid");
        }
        if words.is_empty() {
            return Ok(None);
        }
        let text = CString::new(words.join(","));
        text.map(Some).map_err(|_| MountError::Options("a mount option has a zero byte".into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(words: &[&str]) -> Result<Options, MountError> {
        Options::parse(&words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>(), false)
    }

    #[test]
    fn flags_are_told_from_what_the_file_system_is_told() {
        let parsed = options(&["noatime,nosuid", "data=ordered", "_netdev"]).expect("is understood");
        assert_eq!(parsed.flags(), MountFlags::NOATIME | MountFlags::NOSUID);
        let data = |parsed: &Options, kind| {
            let data = parsed.data(kind).expect("is a text");
            data.map(|text| text.to_string_lossy().into_owned())
        };
        assert_eq!(data(&parsed, Filesystem::Ext4).as_deref(), Some("data=ordered"));
        assert_eq!(data(&parsed, Filesystem::Xfs).as_deref(), Some("data=ordered,nouuid"));
        assert_eq!(data(&options(&[]).expect("is understood"), Filesystem::Ext4), None);
    }

    #[test]
    fn read_only_is_seen_and_other_kinds_of_mounts_are_refused() {
        assert!(options(&["ro"]).expect("is understood").read_only());
        assert!(!options(&["ro", "rw"]).expect("is understood").read_only());
        assert!(Options::parse(&["rw".into()], true).expect("is understood").read_only());
        for wrong in ["bind", "remount,ro", "loop=/dev/loop0", "a\nb"] {
            assert!(options(&[wrong]).is_err(), "{wrong}");
        }
    }
}
