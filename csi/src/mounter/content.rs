//! What is on a device: nothing, a file system, or something else.
//!
//! `blkid` answers the same (2) for a device without a signature and for one that it cannot read, and it knows only
//! content that has a signature. So the device is read here first: only one whose both ends are readable and zero, and on
//! which `blkid` then finds nothing, is empty.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use super::MountError;
use super::programs::Programs;

/// Bytes read at the beginning: all signatures of file systems, partition tables and volume managers stand there.
const HEAD_BYTES: u64 = 4 << 20;
/// Bytes read at the end: second copies of partition tables, signatures of old RAIDs.
const TAIL_BYTES: u64 = 1 << 20;

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Surely nothing.
    Empty,
    /// A file system of this kind.
    Filesystem(String),
    /// Something that is not to be touched.
    Other(String),
}

fn is_zero(device: &mut File, from: u64, count: u64) -> std::io::Result<bool> {
    device.seek(SeekFrom::Start(from))?;
    let mut buffer = vec![0u8; 1 << 18];
    let (mut left, mut zero) = (count, true);
    while left > 0 {
        let part = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        // A device that ends early is no device that was read.
        device.read_exact(&mut buffer[..part])?;
        zero &= buffer[..part].iter().all(|byte| *byte == 0);
        left -= part as u64;
    }
    Ok(zero)
}

/// Whether both ends of a device are zero; an error if they cannot be read in full.
fn ends_are_zero(path: &Path) -> std::io::Result<bool> {
    let mut device = File::open(path)?;
    let size = device.seek(SeekFrom::End(0))?;
    if size == 0 {
        return Err(std::io::Error::other("it has no bytes"));
    }
    let head = is_zero(&mut device, 0, HEAD_BYTES.min(size))?;
    let tail = is_zero(&mut device, size.saturating_sub(TAIL_BYTES), TAIL_BYTES.min(size))?;
    Ok(head && tail)
}

/// Looks at a device.
pub fn look(programs: &Programs, path: &Path) -> Result<Content, MountError> {
    let unreadable = |source| MountError::Unreadable { device: path.display().to_string(), source };
    let zero = ends_are_zero(path).map_err(unreadable)?;
    match programs.signature(path)? {
        Some(content) => Ok(content),
        None if zero => Ok(Content::Empty),
        None => Ok(Content::Other("data without a known signature".into())),
    }
}

/// Bytes of an ext4 file system, from its first superblock.
pub fn ext4_bytes(path: &Path) -> Result<u64, MountError> {
    let unreadable = |source| MountError::Unreadable { device: path.display().to_string(), source };
    let mut block = [0u8; 1024];
    let mut device = File::open(path).map_err(unreadable)?;
    device.seek(SeekFrom::Start(1024)).map_err(unreadable)?;
    device.read_exact(&mut block).map_err(unreadable)?;
    let word =
        |at: usize| u64::from(u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]));
    // Offsets of the kernel's `struct ext4_super_block`: s_magic, s_log_block_size, s_feature_incompat, s_blocks_count.
    const MAGIC: [u8; 2] = [0x53, 0xef];
    const INCOMPAT_64BIT: u64 = 0x80;
    if block[0x38..0x3a] != MAGIC || word(0x18) > 6 {
        return Err(unreadable(std::io::Error::other("its superblock is none of ext4")));
    }
    let high = if word(0x60) & INCOMPAT_64BIT != 0 { word(0x150) } else { 0 };
    Ok((high << 32 | word(0x4)) << (10 + word(0x18)))
}

/// What `blkid -o export` says.
pub(super) fn parse(said: &str) -> Option<Content> {
    let value = |key: &str| said.lines().find_map(|line| line.strip_prefix(key)).filter(|v| !v.is_empty());
    match (value("TYPE="), value("PTTYPE=")) {
        // A partition table beside a file system: which of the two is meant is not for us to say.
        (Some(kind), Some(table)) => Some(Content::Other(format!("{kind} and a partition table ({table})"))),
        (Some(kind), None) => Some(Content::Filesystem(kind.to_owned())),
        (None, Some(table)) => Some(Content::Other(format!("a partition table ({table})"))),
        (None, None) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn device(size: u64, at: u64, bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.as_file().set_len(size).expect("has room");
        file.seek(SeekFrom::Start(at)).expect("seeks");
        file.write_all(bytes).expect("is written");
        file
    }

    #[test]
    fn only_zeros_at_both_ends_are_empty() {
        let size = 64 << 20;
        let programs = Programs::default();
        let looked = |file: &tempfile::NamedTempFile| look(&programs, file.path()).expect("is readable");
        assert_eq!(looked(&device(size, 0, b"")), Content::Empty);
        for at in [0, 700, HEAD_BYTES - 1, size - TAIL_BYTES, size - 1] {
            let content = looked(&device(size, at, b"x"));
            assert!(matches!(content, Content::Other(_)), "{content:?} at {at}");
        }
    }

    #[test]
    fn signatures_are_told_apart() {
        let programs = Programs::default();
        let luks = device(64 << 20, 0, b"LUKS\xba\xbe\x00\x02");
        assert!(!matches!(look(&programs, luks.path()).expect("is readable"), Content::Empty));
        assert_eq!(parse("TYPE=ext4\nUUID=1"), Some(Content::Filesystem("ext4".into())));
        assert!(matches!(parse("PTTYPE=gpt"), Some(Content::Other(_))));
        assert!(matches!(parse("TYPE=vfat\nPTTYPE=dos"), Some(Content::Other(_))));
        assert_eq!(parse(""), None);
    }

    #[test]
    fn an_ext4_tells_its_size() {
        let programs = Programs::default();
        let file = device(64 << 20, 0, b"");
        programs.make(super::super::Filesystem::Ext4, file.path()).expect("is made");
        assert_eq!(look(&programs, file.path()).expect("is read"), Content::Filesystem("ext4".into()));
        assert_eq!(ext4_bytes(file.path()).expect("is ext4"), 64 << 20);
        file.as_file().set_len(128 << 20).expect("grows");
        assert_eq!(ext4_bytes(file.path()).expect("is ext4"), 64 << 20);
        programs.grow_unmounted_ext4(file.path()).expect("is grown");
        assert_eq!(ext4_bytes(file.path()).expect("is ext4"), 128 << 20);
        assert!(ext4_bytes(device(1 << 20, 0, b"").path()).is_err());
    }

    #[test]
    fn what_cannot_be_read_is_not_empty() {
        let programs = Programs::default();
        let none = look(&programs, Path::new("/nonexistent/device"));
        assert!(matches!(none, Err(MountError::Unreadable { .. })), "{none:?}");
        let empty = tempfile::NamedTempFile::new().expect("a file");
        let short = look(&programs, empty.path());
        assert!(matches!(short, Err(MountError::Unreadable { .. })), "{short:?}");
        // A directory opens but does not read: like a device that answers every read with an error.
        let directory = tempfile::tempdir().expect("a directory");
        let dead = look(&programs, directory.path());
        assert!(matches!(dead, Err(MountError::Unreadable { .. })), "{dead:?}");
    }
}
