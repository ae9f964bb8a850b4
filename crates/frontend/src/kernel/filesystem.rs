//! A file system of one file, as the kernel's FUSE asks for it. Runs on fuser's thread.
//!
//! What does not touch the volume is answered here, so that looking at the file works whatever the volume does. The
//! rest goes to the shard. Nothing is cached by the kernel: the file is opened for direct I/O and attributes live no
//! time.

use std::ffi::OsStr;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use fuser::{
    BsdFileFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory,
    ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, Request as FuseRequest,
    TimeOrNow, WriteFlags,
};
use holdfast_types::{BLOCK_BYTES, limits};
use tokio::sync::mpsc;

use super::budget::{Budget, REQUESTS_MAX};
use super::serve::{Ask, Request};

/// The file's name within the mount.
pub(super) const FILE_NAME: &str = "volume";

const FILE: INodeNo = INodeNo(2);
/// Names and attributes are asked for anew each time.
const NO_TIME: Duration = Duration::ZERO;

const KEEP_SIZE: i32 = 0x01;
const PUNCH_HOLE: i32 = 0x02;
const ZERO_RANGE: i32 = 0x10;
const SEEK_DATA: i32 = 3;
const SEEK_HOLE: i32 = 4;

/// The file system.
pub(super) struct OneFile {
    pub(super) size: Arc<AtomicU64>,
    pub(super) read_only: bool,
    pub(super) owner: (u32, u32),
    pub(super) budget: Arc<Budget>,
    pub(super) requests: mpsc::UnboundedSender<Request>,
}

impl OneFile {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    fn attributes(&self, inode: INodeNo) -> Option<FileAttr> {
        let (kind, perm, size, nlink) = match inode {
            INodeNo::ROOT => (FileType::Directory, 0o500, 0, 2),
            FILE if self.read_only => (FileType::RegularFile, 0o400, self.size(), 1),
            FILE => (FileType::RegularFile, 0o600, self.size(), 1),
            _ => return None,
        };
        // A volume has no times of its own.
        let epoch = SystemTime::UNIX_EPOCH;
        Some(FileAttr {
            ino: inode,
            size,
            blocks: size.div_ceil(512),
            atime: epoch,
            mtime: epoch,
            ctime: epoch,
            crtime: epoch,
            kind,
            perm,
            nlink,
            uid: self.owner.0,
            gid: self.owner.1,
            rdev: 0,
            blksize: BLOCK_BYTES as u32,
            flags: 0,
        })
    }

    /// Hands a request to the shard once there is room. One that is not taken is answered EIO as it is dropped.
    fn ask(&self, bytes: usize, ask: impl FnOnce() -> Ask) -> bool {
        let Some(permit) = self.budget.take(bytes) else { return false };
        self.requests.send(Request { ask: ask(), _permit: permit }).is_ok()
    }
}

impl Filesystem for OneFile {
    fn init(&mut self, _: &FuseRequest, config: &mut KernelConfig) -> io::Result<()> {
        let request = limits::REQUEST_BYTES_MAX as u32;
        let refused = |what: &str| io::Error::other(format!("the kernel's FUSE refuses {what}"));
        config.set_max_write(request).map_err(|_| refused("requests of 1 MiB"))?;
        config.set_max_background(REQUESTS_MAX as u16).map_err(|_| refused("many requests"))?;
        // Without it asynchronous requests, such as a loop device's, would go one after the other.
        if config.add_capabilities(InitFlags::FUSE_ASYNC_DIO).is_err() {
            tracing::info!("the kernel's FUSE has no asynchronous direct I/O; the device will be slow");
        }
        Ok(())
    }

    fn lookup(&self, _: &FuseRequest, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.attributes(FILE) {
            Some(attributes) if parent == INodeNo::ROOT && name == FILE_NAME => {
                reply.entry(&NO_TIME, &attributes, Generation(0));
            }
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &FuseRequest, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(inode) {
            Some(attributes) => reply.attr(&NO_TIME, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    /// A volume's size is not changed by writing to it; times are taken and forgotten.
    fn setattr(
        &self,
        _: &FuseRequest,
        inode: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let Some(attributes) = self.attributes(inode) else { return reply.error(Errno::ENOENT) };
        let resized = size.is_some_and(|size| size != attributes.size);
        if resized || mode.is_some() || uid.is_some() || gid.is_some() {
            return reply.error(Errno::EPERM);
        }
        reply.attr(&NO_TIME, &attributes);
    }

    fn open(&self, _: &FuseRequest, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if inode != FILE {
            return reply.error(Errno::EISDIR);
        }
        if self.read_only && flags.acc_mode() != OpenAccMode::O_RDONLY {
            return reply.error(Errno::EROFS);
        }
        let direct = FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
        reply.opened(FileHandle(0), direct | FopenFlags::FOPEN_NOFLUSH);
    }

    fn read(
        &self,
        _: &FuseRequest,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.ask(size as usize, || Ask::Read { offset, length: size.into(), reply });
    }

    fn write(
        &self,
        _: &FuseRequest,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        self.ask(data.len(), || Ask::Write { offset, data: Bytes::copy_from_slice(data), reply });
    }

    fn flush(&self, _: &FuseRequest, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &FuseRequest, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        self.ask(0, || Ask::Sync { reply });
    }

    fn fallocate(
        &self,
        _: &FuseRequest,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let within = offset.checked_add(length).is_some_and(|end| end <= self.size());
        match mode & !KEEP_SIZE {
            PUNCH_HOLE => self.ask(0, || Ask::Trim { offset, length, reply }),
            ZERO_RANGE if within => self.ask(0, || Ask::Zero { offset, length, reply }),
            ZERO_RANGE => {
                reply.error(Errno::ENOSPC);
                false
            }
            // Room cannot be reserved: volumes are thin.
            _ => {
                reply.error(Errno::EOPNOTSUPP);
                false
            }
        };
    }

    fn lseek(&self, _: &FuseRequest, _: INodeNo, _: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        let Ok(offset) = u64::try_from(offset) else { return reply.error(Errno::ENXIO) };
        match whence {
            SEEK_DATA => self.ask(0, || Ask::SeekData { offset, reply }),
            SEEK_HOLE => self.ask(0, || Ask::SeekHole { offset, reply }),
            _ => {
                reply.error(Errno::EINVAL);
                false
            }
        };
    }

    fn readdir(
        &self,
        _: &FuseRequest,
        inode: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        if inode != INodeNo::ROOT {
            return reply.error(Errno::ENOTDIR);
        }
        let entries = [
            (INodeNo::ROOT, FileType::Directory, "."),
            (INodeNo::ROOT, FileType::Directory, ".."),
            (FILE, FileType::RegularFile, FILE_NAME),
        ];
        for (at, (inode, kind, name)) in entries.into_iter().enumerate().skip(offset as usize) {
            if reply.add(inode, at as u64 + 1, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &FuseRequest, _: INodeNo, reply: ReplyStatfs) {
        let block = BLOCK_BYTES as u32;
        let name = limits::NAME_LENGTH_MAX as u32;
        reply.statfs(self.size() / u64::from(block), 0, 0, 1, 0, block, name, block);
    }
}
