//! A directory whose disk can be broken while it is in use: every call fails, or none returns.
//!
//! For development clusters and tests: real disks break so, and no program can make one do it. What was flushed before
//! stays as it is; a new process finds the disk whole again.

use std::cell::Cell;
use std::future::Future;
use std::io;
use std::rc::Rc;

use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use tokio::sync::Notify;

use crate::disk::{AlignedBuffer, Directory, Durability, File, FileSize, OpenMode, Space};

/// What a disk does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum DiskFault {
    /// It works.
    #[default]
    None,
    /// Every call ends with an error.
    Fails,
    /// No call ends.
    Hangs,
}

#[derive(Default)]
struct Disk {
    fault: Cell<DiskFault>,
    changed: Notify,
}

impl Disk {
    /// Does what was asked, if the disk answers.
    fn call<T: 'static>(
        self: &Rc<Self>,
        work: impl FnOnce() -> LocalBoxFuture<'static, io::Result<T>> + 'static,
    ) -> LocalBoxFuture<'static, io::Result<T>> {
        if self.fault.get() == DiskFault::None {
            // Asked for at once, in the order of the calls; the answer comes if the disk is whole then.
            return self.clone().answered(work()).boxed_local();
        }
        let disk = self.clone();
        async move {
            disk.whole().await?;
            work().await
        }
        .boxed_local()
    }

    async fn answered<T>(self: Rc<Self>, work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
        let done = work.await;
        self.whole().await.and(done)
    }

    /// Waits while the disk hangs.
    async fn whole(&self) -> io::Result<()> {
        loop {
            let changed = self.changed.notified();
            match self.fault.get() {
                DiskFault::None => return Ok(()),
                DiskFault::Fails => {
                    return Err(io::Error::from_raw_os_error(rustix::io::Errno::IO.raw_os_error()));
                }
                DiskFault::Hangs => changed.await,
            }
        }
    }
}

/// The directory.
pub struct BreakingDirectory {
    inner: Rc<dyn Directory>,
    disk: Rc<Disk>,
}

impl BreakingDirectory {
    /// Stands on `inner`.
    pub fn new(inner: Rc<dyn Directory>) -> Rc<Self> {
        Rc::new(Self { inner, disk: Rc::default() })
    }

    /// What the disk does from now on.
    pub fn set(&self, fault: DiskFault) {
        self.disk.fault.set(fault);
        self.disk.changed.notify_waiters();
    }
}

impl Directory for BreakingDirectory {
    fn open(&self, name: &str, mode: OpenMode) -> LocalBoxFuture<'static, io::Result<Rc<dyn File>>> {
        let (inner, name, disk) = (self.inner.clone(), name.to_owned(), self.disk.clone());
        let opening = self.disk.call(move || inner.open(&name, mode));
        async move {
            let file: Rc<dyn File> = Rc::new(BreakingFile { inner: opening.await?, disk });
            Ok(file)
        }
        .boxed_local()
    }
    fn list(&self, prefix: &str) -> LocalBoxFuture<'static, io::Result<Vec<String>>> {
        let (inner, prefix) = (self.inner.clone(), prefix.to_owned());
        self.disk.call(move || inner.list(&prefix))
    }
    fn sizes(&self, prefix: &str) -> LocalBoxFuture<'static, io::Result<Vec<(String, FileSize)>>> {
        let (inner, prefix) = (self.inner.clone(), prefix.to_owned());
        self.disk.call(move || inner.sizes(&prefix))
    }
    fn remove(&self, name: &str) -> LocalBoxFuture<'static, io::Result<()>> {
        let (inner, name) = (self.inner.clone(), name.to_owned());
        self.disk.call(move || inner.remove(&name))
    }
    fn rename(&self, from: &str, to: &str) -> LocalBoxFuture<'static, io::Result<()>> {
        let (inner, from, to) = (self.inner.clone(), from.to_owned(), to.to_owned());
        self.disk.call(move || inner.rename(&from, &to))
    }
    fn sync(&self) -> LocalBoxFuture<'static, io::Result<()>> {
        let inner = self.inner.clone();
        self.disk.call(move || inner.sync())
    }
    fn space(&self) -> LocalBoxFuture<'static, io::Result<Space>> {
        let inner = self.inner.clone();
        self.disk.call(move || inner.space())
    }
}

struct BreakingFile {
    inner: Rc<dyn File>,
    disk: Rc<Disk>,
}

impl File for BreakingFile {
    fn write_at(
        &self,
        offset: u64,
        buffer: AlignedBuffer,
        durability: Durability,
    ) -> LocalBoxFuture<'static, io::Result<AlignedBuffer>> {
        let inner = self.inner.clone();
        self.disk.call(move || inner.write_at(offset, buffer, durability))
    }
    fn read_at(&self, offset: u64, length: usize) -> LocalBoxFuture<'static, io::Result<AlignedBuffer>> {
        let inner = self.inner.clone();
        self.disk.call(move || inner.read_at(offset, length))
    }
    fn flush(&self) -> LocalBoxFuture<'static, io::Result<()>> {
        let inner = self.inner.clone();
        self.disk.call(move || inner.flush())
    }
    fn allocate(&self, offset: u64, length: u64) -> LocalBoxFuture<'static, io::Result<()>> {
        let inner = self.inner.clone();
        self.disk.call(move || inner.allocate(offset, length))
    }
    fn punch(&self, offset: u64, length: u64) -> LocalBoxFuture<'static, io::Result<()>> {
        let inner = self.inner.clone();
        self.disk.call(move || inner.punch(offset, length))
    }
    fn set_length(&self, length: u64) -> LocalBoxFuture<'static, io::Result<()>> {
        let inner = self.inner.clone();
        self.disk.call(move || inner.set_length(length))
    }
    fn size(&self) -> LocalBoxFuture<'static, io::Result<FileSize>> {
        let inner = self.inner.clone();
        self.disk.call(move || inner.size())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::real::disk::RealDirectory;

    #[test]
    fn a_broken_disk_fails_and_a_hung_one_answers_when_it_is_whole_again() {
        let place = tempfile::tempdir().expect("a place");
        let real = RealDirectory::open(place.path()).expect("a directory");
        crate::real::run(async move {
            let directory = BreakingDirectory::new(real);
            let file = directory.open("f", OpenMode::CreateNew).await.expect("a file");
            let write = || file.write_at(0, AlignedBuffer::zeroed(4096), Durability::Durable);
            write().await.expect("the disk is whole");
            directory.set(DiskFault::Fails);
            assert!(write().await.is_err() && file.flush().await.is_err());
            assert!(directory.open("f", OpenMode::Existing).await.is_err());
            directory.set(DiskFault::Hangs);
            let mut waits = write();
            let soon = std::time::Duration::from_millis(50);
            assert!(crate::timeout(soon, &mut waits).await.is_err(), "it hangs");
            directory.set(DiskFault::None);
            waits.await.expect("it goes on");
        });
    }
}
