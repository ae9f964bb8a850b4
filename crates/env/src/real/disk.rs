//! Files of a real directory: direct I/O where the file system allows it. Reads, writes and flushes are blocking calls on
//! a few threads, or go over a ring of the kernel (`uring/`), as the [`IoEngine`] says; everything else is rare and goes
//! to the threads.
//!
//! A failed write or flush is reported as it is and never repeated here: what it covered is unknown.

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use rustix::fs::{FallocateFlags, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use tokio::sync::oneshot;

use super::names::Names;
use super::uring::Uring;
use crate::disk::{ALIGNMENT, AlignedBuffer, Directory, Durability, File, FileSize, OpenMode, Space};

/// Threads that carry blocking calls of one directory.
const THREADS: usize = 4;
/// Largest single read or write, in bytes; longer ones are several.
const CALL_BYTES_MAX: usize = 16 << 20;

type Job = Box<dyn FnOnce() + Send>;

/// What waits for a thread.
#[derive(Default)]
struct Waiting {
    jobs: VecDeque<Job>,
    closed: bool,
}

/// A few threads for blocking calls. A job wakes one of them, and none if all are busy.
struct Pool {
    waiting: Arc<(Mutex<Waiting>, Condvar)>,
}

fn lock(waiting: &Mutex<Waiting>) -> std::sync::MutexGuard<'_, Waiting> {
    // Jobs run outside of it, so whoever panicked left it whole.
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

fn work(waiting: &(Mutex<Waiting>, Condvar)) {
    loop {
        let mut now = lock(&waiting.0);
        let job = loop {
            match now.jobs.pop_front() {
                Some(job) => break job,
                None if now.closed => return,
                None => now = waiting.1.wait(now).unwrap_or_else(PoisonError::into_inner),
            }
        };
        drop(now);
        job();
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        lock(&self.waiting.0).closed = true;
        self.waiting.1.notify_all();
    }
}

impl Pool {
    fn new() -> io::Result<Self> {
        let waiting: Arc<(Mutex<Waiting>, Condvar)> = Arc::default();
        for number in 0..THREADS {
            let waiting = waiting.clone();
            thread::Builder::new().name(format!("disk-{number}")).spawn(move || work(&waiting))?;
        }
        Ok(Self { waiting })
    }

    fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> LocalBoxFuture<'static, io::Result<T>> {
        let (sender, receiver) = oneshot::channel();
        let job: Job = Box::new(move || {
            // Nobody waits any more: the caller was dropped, and the work is done all the same.
            let _ = sender.send(work());
        });
        lock(&self.waiting.0).jobs.push_back(job);
        self.waiting.1.notify_one();
        async move { receiver.await.map_err(|_| io::Error::other("a disk thread has panicked"))? }
            .boxed_local()
    }
}

/// How files are read, written and flushed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum IoEngine {
    /// By the kernel's ring where it allows one, else by threads.
    Auto,
    /// By the kernel's ring (io_uring), or not at all.
    Uring,
    /// By blocking calls on a few threads.
    #[default]
    Threads,
}

/// What carries a directory's calls.
struct Carrier {
    pool: Pool,
    ring: Option<Uring>,
}

impl std::ops::Deref for Carrier {
    type Target = Pool;
    fn deref(&self) -> &Pool {
        &self.pool
    }
}

/// Sets up what an engine needs.
fn ring_for(
    engine: IoEngine,
    set_up: impl FnOnce() -> io::Result<Uring>,
) -> Result<Option<Uring>, OpenError> {
    match engine {
        IoEngine::Threads => Ok(None),
        IoEngine::Uring => set_up().map(Some).map_err(OpenError::NoRing),
        IoEngine::Auto => Ok(set_up()
            .inspect_err(
                |error| tracing::info!(%error, "io_uring is not to be had here: threads carry disk calls"),
            )
            .ok()),
    }
}

/// A directory of the file system, held exclusively.
pub struct RealDirectory {
    root: PathBuf,
    names: Arc<Names>,
    pool: Rc<Carrier>,
    _lock: OwnedFd,
}

/// Why a directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process holds it.
    #[error("{} is in use by another process: two daemons must not share a data directory", .0.display())]
    InUse(PathBuf),
    /// The kernel gives no ring, and one was asked for.
    #[error("io_uring is not to be had here ({0}): choose the engine `threads`, or `auto`")]
    NoRing(#[source] io::Error),
    /// The file system refuses.
    #[error("{}: {source}", path.display())]
    Io {
        /// The directory.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

impl RealDirectory {
    /// Opens a directory, made if it does not exist, and takes its lock until dropped.
    pub fn open(path: &Path) -> Result<Rc<Self>, OpenError> {
        Self::open_with(path, IoEngine::default())
    }

    /// As [`Self::open`], with an engine. A ring is driven by this thread's runtime, which must outlive the directory.
    pub fn open_with(path: &Path, engine: IoEngine) -> Result<Rc<Self>, OpenError> {
        Self::open_on(path, engine, Uring::new)
    }

    fn open_on(
        path: &Path,
        engine: IoEngine,
        set_up: impl FnOnce() -> io::Result<Uring>,
    ) -> Result<Rc<Self>, OpenError> {
        let wrap = |source: io::Error| OpenError::Io { path: path.to_owned(), source };
        fs::create_dir_all(path).map_err(wrap)?;
        let lock = rustix::fs::open(
            path.join("lock"),
            OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC,
            Mode::from(0o600),
        )
        .map_err(|e| wrap(e.into()))?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(OpenError::InUse(path.to_owned())),
            Err(error) => return Err(wrap(error.into())),
        }
        let ring = ring_for(engine, set_up)?;
        let pool = Rc::new(Carrier { pool: Pool::new().map_err(wrap)?, ring });
        let names = Arc::new(Names::new(path));
        Ok(Rc::new(Self { root: path.to_owned(), names, pool, _lock: lock }))
    }

    /// What carries its reads, writes and flushes: never [`IoEngine::Auto`].
    pub fn engine(&self) -> IoEngine {
        if self.pool.ring.is_some() { IoEngine::Uring } else { IoEngine::Threads }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.root
    }

    fn at(&self, name: &str) -> io::Result<PathBuf> {
        let relative = Path::new(name);
        let plain = relative.components().all(|part| matches!(part, std::path::Component::Normal(_)));
        if !plain || name.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("'{name}' is not a plain file name"),
            ));
        }
        Ok(self.root.join(relative))
    }
}

fn open_file(path: &Path, mode: OpenMode, names: &Names) -> io::Result<OwnedFd> {
    let base = OFlags::RDWR | OFlags::CLOEXEC;
    if mode == OpenMode::Existing {
        return open_with(path, base);
    }
    names.make_way(path)?;
    let made = open_with(path, base | OFlags::CREATE | OFlags::EXCL);
    names.changed(path.parent().map(Path::to_owned));
    made
}

fn open_with(path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    match rustix::fs::open(path, flags | OFlags::DIRECT, Mode::from(0o600)) {
        Ok(file) => Ok(file),
        // tmpfs and some others have no direct I/O; durability rests on RWF_DSYNC and fdatasync either way. The
        // failed call may have created the file.
        Err(Errno::INVAL) => {
            Ok(rustix::fs::open(path, flags - OFlags::CREATE - OFlags::EXCL, Mode::from(0o600))?)
        }
        Err(error) => Err(error.into()),
    }
}

/// Names of the files that begin so. Only the directory that the prefix names is walked: who opens a hundred replicas
/// does not look at all of them a hundred times.
fn list_files(root: &Path, prefix: &str) -> io::Result<Vec<String>> {
    let within = prefix.rsplit_once('/').map_or("", |(directory, _)| directory);
    let mut out = Vec::new();
    let mut pending = vec![root.join(within)];
    while let Some(directory) = pending.pop() {
        let entries = match fs::read_dir(&directory) {
            Ok(entries) => entries,
            // It never was.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        for entry in entries {
            let entry = entry?;
            let path = entry.path();
            let relative = path.strip_prefix(root).map_err(io::Error::other)?;
            let name = relative.to_str().ok_or_else(|| io::Error::other("a file name is not UTF-8"))?;
            if entry.file_type()?.is_dir() {
                if name.starts_with(prefix) || prefix.starts_with(name) {
                    pending.push(path);
                }
            } else if name.starts_with(prefix) {
                out.push(name.to_owned());
            }
        }
    }
    out.sort();
    Ok(out)
}

/// Sizes of the files whose names begin so. Only the directory that the prefix names is walked.
fn size_files(root: &Path, prefix: &str) -> io::Result<Vec<(String, FileSize)>> {
    let within = prefix.rsplit_once('/').map_or("", |(directory, _)| directory);
    let mut out = Vec::new();
    let mut pending = vec![root.join(within)];
    while let Some(directory) = pending.pop() {
        let entries = match fs::read_dir(&directory) {
            Ok(entries) => entries,
            // It never was, or has gone since it was seen.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        for entry in entries {
            let path = entry?.path();
            let found = match fs::symlink_metadata(&path) {
                Ok(found) => found,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            if found.is_dir() {
                pending.push(path);
                continue;
            }
            let relative = path.strip_prefix(root).map_err(io::Error::other)?;
            let name = relative.to_str().ok_or_else(|| io::Error::other("a file name is not UTF-8"))?;
            if name.starts_with(prefix) {
                let size = FileSize { length: found.len(), allocated: found.blocks() * 512 };
                out.push((name.to_owned(), size));
            }
        }
    }
    out.sort_by(|one, other| one.0.cmp(&other.0));
    Ok(out)
}

impl Directory for RealDirectory {
    fn open(&self, name: &str, mode: OpenMode) -> LocalBoxFuture<'static, io::Result<Rc<dyn File>>> {
        let (path, pool, names) = (self.at(name), self.pool.clone(), self.names.clone());
        async move {
            let path = path?;
            let file = pool.run(move || open_file(&path, mode, &names)).await?;
            let file: Rc<dyn File> = Rc::new(RealFile { file: Arc::new(file), pool });
            Ok(file)
        }
        .boxed_local()
    }

    fn list(&self, prefix: &str) -> LocalBoxFuture<'static, io::Result<Vec<String>>> {
        let (root, prefix) = (self.root.clone(), prefix.to_owned());
        self.pool.run(move || list_files(&root, &prefix))
    }

    fn sizes(&self, prefix: &str) -> LocalBoxFuture<'static, io::Result<Vec<(String, FileSize)>>> {
        let (root, prefix) = (self.root.clone(), prefix.to_owned());
        self.pool.run(move || size_files(&root, &prefix))
    }

    fn remove(&self, name: &str) -> LocalBoxFuture<'static, io::Result<()>> {
        let (path, names) = (self.at(name), self.names.clone());
        self.pool.run(move || {
            let path = path?;
            let removed = fs::remove_file(&path);
            names.changed(path.parent().map(Path::to_owned));
            match removed {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                other => other,
            }
        })
    }

    fn rename(&self, from: &str, to: &str) -> LocalBoxFuture<'static, io::Result<()>> {
        let (from, to, names) = (self.at(from), self.at(to), self.names.clone());
        self.pool.run(move || {
            let (from, to) = (from?, to?);
            let renamed = fs::rename(&from, &to);
            names.changed([&from, &to].into_iter().filter_map(|path| path.parent()).map(Path::to_owned));
            renamed
        })
    }

    fn sync(&self) -> LocalBoxFuture<'static, io::Result<()>> {
        let names = self.names.clone();
        self.pool.run(move || names.flush())
    }

    fn space(&self) -> LocalBoxFuture<'static, io::Result<Space>> {
        let root = self.root.clone();
        self.pool.run(move || {
            let found = rustix::fs::statvfs(&root)?;
            Ok(Space { total: found.f_blocks * found.f_frsize, available: found.f_bavail * found.f_frsize })
        })
    }
}

struct RealFile {
    file: Arc<OwnedFd>,
    pool: Rc<Carrier>,
}

/// Repeats a call that a signal interrupted before it did anything.
fn retry<T>(mut call: impl FnMut() -> Result<T, Errno>) -> io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return other.map_err(io::Error::from),
        }
    }
}

fn write_all(file: &OwnedFd, offset: u64, bytes: &[u8], durability: Durability) -> io::Result<()> {
    use rustix::io::ReadWriteFlags;
    let mut flags = match durability {
        Durability::Volatile => ReadWriteFlags::empty(),
        Durability::Durable => ReadWriteFlags::DSYNC,
    };
    let mut needs_flush = false;
    let mut done = 0;
    while done < bytes.len() {
        let part = &bytes[done..bytes.len().min(done + CALL_BYTES_MAX)];
        let written = rustix::io::pwritev2(file, &[io::IoSlice::new(part)], offset + done as u64, flags);
        match written {
            Err(Errno::INTR) => {}
            Err(Errno::OPNOTSUPP) if !flags.is_empty() => {
                (flags, needs_flush) = (ReadWriteFlags::empty(), true);
            }
            Err(error) => return Err(error.into()),
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => done += count,
        }
    }
    if needs_flush { rustix::fs::fdatasync(file).map_err(io::Error::from) } else { Ok(()) }
}

fn read_all(file: &OwnedFd, offset: u64, mut buffer: AlignedBuffer) -> io::Result<AlignedBuffer> {
    let mut done = 0;
    while done < buffer.len() {
        let end = buffer.len().min(done + CALL_BYTES_MAX);
        let part = &mut buffer.as_mut_slice()[done..end];
        let count = retry(|| rustix::io::pread(file, &mut *part, offset + done as u64))?;
        if count == 0 {
            break; // beyond the end: zeros
        }
        done += count;
        if !done.is_multiple_of(ALIGNMENT) {
            break; // the end of the file is within this block
        }
    }
    buffer.as_mut_slice()[done..].fill(0);
    Ok(buffer)
}

impl File for RealFile {
    fn write_at(
        &self,
        offset: u64,
        buffer: AlignedBuffer,
        durability: Durability,
    ) -> LocalBoxFuture<'static, io::Result<AlignedBuffer>> {
        if let Some(ring) = &self.pool.ring {
            return ring.write(&self.file, offset, buffer, durability);
        }
        let file = self.file.clone();
        self.pool.run(move || {
            write_all(&file, offset, buffer.as_slice(), durability)?;
            Ok(buffer)
        })
    }

    fn read_at(&self, offset: u64, length: usize) -> LocalBoxFuture<'static, io::Result<AlignedBuffer>> {
        if let Some(ring) = &self.pool.ring {
            return ring.read(&self.file, offset, AlignedBuffer::zeroed(length));
        }
        let file = self.file.clone();
        // Cleared where it is read: it may be much.
        self.pool.run(move || read_all(&file, offset, AlignedBuffer::zeroed(length)))
    }

    fn read_into(
        &self,
        offset: u64,
        buffer: AlignedBuffer,
    ) -> LocalBoxFuture<'static, io::Result<AlignedBuffer>> {
        if let Some(ring) = &self.pool.ring {
            return ring.read(&self.file, offset, buffer);
        }
        let file = self.file.clone();
        self.pool.run(move || read_all(&file, offset, buffer))
    }

    fn flush(&self) -> LocalBoxFuture<'static, io::Result<()>> {
        if let Some(ring) = &self.pool.ring {
            return ring.flush(&self.file);
        }
        let file = self.file.clone();
        // Never repeated: the kernel marks pages clean after a failed flush.
        self.pool.run(move || rustix::fs::fdatasync(&*file).map_err(io::Error::from))
    }

    fn allocate(&self, offset: u64, length: u64) -> LocalBoxFuture<'static, io::Result<()>> {
        let file = self.file.clone();
        self.pool.run(move || match rustix::fs::fallocate(&*file, FallocateFlags::empty(), offset, length) {
            // Only a hint against fragmentation: without it the write itself allocates.
            Err(Errno::OPNOTSUPP) => Ok(()),
            other => other.map_err(io::Error::from),
        })
    }

    fn punch(&self, offset: u64, length: u64) -> LocalBoxFuture<'static, io::Result<()>> {
        let file = self.file.clone();
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        self.pool.run(move || rustix::fs::fallocate(&*file, flags, offset, length).map_err(io::Error::from))
    }

    fn set_length(&self, length: u64) -> LocalBoxFuture<'static, io::Result<()>> {
        let file = self.file.clone();
        self.pool.run(move || rustix::fs::ftruncate(&*file, length).map_err(io::Error::from))
    }

    fn size(&self) -> LocalBoxFuture<'static, io::Result<FileSize>> {
        let file = self.file.clone();
        self.pool.run(move || {
            let found = rustix::fs::fstat(file.as_fd())?;
            Ok(FileSize { length: found.st_size as u64, allocated: found.st_blocks as u64 * 512 })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_a_second_owner_is_refused() {
        for engine in [IoEngine::Threads, IoEngine::Auto] {
            files_work(engine);
        }
    }

    #[test]
    fn without_a_ring_auto_falls_back_and_uring_says_why() {
        let place = tempfile::tempdir().expect("a temporary directory");
        crate::real::run(async {
            for errno in [Errno::PERM, Errno::NOSYS, Errno::NOMEM] {
                let none = || Err(errno.into());
                let refused = RealDirectory::open_on(place.path(), IoEngine::Uring, none).err();
                let why = refused.expect("there is no ring").to_string();
                assert!(why.contains("`threads`"), "{why}");
                let directory = RealDirectory::open_on(place.path(), IoEngine::Auto, none).expect("opens");
                assert_eq!(directory.engine(), IoEngine::Threads);
                let file = directory.open(&errno.to_string(), OpenMode::CreateNew).await.expect("creates");
                let block = AlignedBuffer::copy_of(&[9; 4096]);
                file.write_at(0, block, Durability::Durable).await.expect("writes");
                assert_eq!(file.read_at(0, 4096).await.expect("reads").as_slice(), [9; 4096]);
            }
        });
        // Nothing drives a ring here.
        let directory = RealDirectory::open_with(place.path(), IoEngine::Auto).expect("opens");
        assert_eq!(directory.engine(), IoEngine::Threads);
    }

    fn files_work(engine: IoEngine) {
        let place = tempfile::tempdir().expect("a temporary directory");
        crate::real::run(async {
            let directory = RealDirectory::open_with(place.path(), engine).expect("opens");
            println!("{engine:?} is {:?}", directory.engine());
            assert!(matches!(RealDirectory::open(place.path()), Err(OpenError::InUse(_))));
            let file = directory.open("a/b", OpenMode::CreateNew).await.expect("creates");
            assert!(directory.open("a/b", OpenMode::CreateNew).await.is_err());
            assert!(directory.open("../x", OpenMode::CreateNew).await.is_err());
            let data = AlignedBuffer::copy_of(&[7; 5000]);
            file.write_at(8192, data, Durability::Durable).await.expect("writes");
            file.flush().await.expect("flushes");
            let back = file.read_at(4096, 16384).await.expect("reads");
            assert_eq!(&back.as_slice()[..4096], &[0; 4096]);
            assert_eq!(&back.as_slice()[4096..9096], &[7; 5000]);
            assert_eq!(&back.as_slice()[9096..], &vec![0; 16384 - 9096]);
            let used = AlignedBuffer::copy_of(&[9; 16384]);
            assert_eq!(file.read_into(4096, used).await.expect("reads").as_slice(), back.as_slice());
            let used = AlignedBuffer::copy_of(&[9; 8192]);
            assert_eq!(file.read_into(1 << 20, used).await.expect("reads").as_slice(), [0; 8192]);
            file.punch(8192, 4096).await.expect("punches");
            let back = file.read_at(8192, 4096).await.expect("reads");
            assert_eq!(back.as_slice(), &[0; 4096]);
            let size = file.size().await.expect("a size");
            let sizes = directory.sizes("a/").await.expect("sizes");
            assert_eq!(sizes, [("a/b".to_owned(), size)]);
            assert_eq!(size.length, 16384);
            assert_eq!(directory.sizes("a/c").await.expect("sizes"), []);
            assert_eq!(directory.sizes("b/").await.expect("nothing is there"), []);
            let all = directory.sizes("").await.expect("sizes");
            assert_eq!(all.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["a/b", "lock"]);
            directory.rename("a/b", "a/c").await.expect("renames");
            directory.sync().await.expect("syncs");
            assert_eq!(directory.list("a/").await.expect("lists"), ["a/c"]);
            directory.remove("a/c").await.expect("removes");
            directory.remove("a/c").await.expect("removing twice is fine");
            assert!(directory.space().await.expect("space").total > 0);
        });
    }
}
