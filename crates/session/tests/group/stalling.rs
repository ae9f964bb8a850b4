//! A disk that stops completing what it is asked to write, until it goes on, or that takes long for it.

use std::cell::Cell;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::LocalBoxFuture;
use holdfast_env::disk::{AlignedBuffer, Directory, Durability, File, FileSize, OpenMode, Space};
use tokio::sync::Notify;

#[derive(Default)]
struct Shared {
    stalled: Cell<bool>,
    slowness: Cell<Duration>,
    /// The next write or flush fails.
    fails: Cell<bool>,
    /// Writes and flushes that were asked for since one failed.
    asked_since: Cell<Option<u64>>,
    ended: Notify,
}

/// While it lasts, nothing that is written or flushed ends.
#[derive(Clone, Default)]
pub struct Stall(Rc<Shared>);

impl Stall {
    /// A directory on such a disk.
    pub fn over(&self, inner: Rc<dyn Directory>) -> Rc<dyn Directory> {
        Rc::new(StallingDirectory { inner, stall: self.clone() })
    }
    pub fn begin(&self) {
        self.0.stalled.set(true);
    }
    pub fn end(&self) {
        self.0.stalled.set(false);
        self.0.ended.notify_waiters();
    }
    /// From now on each write and each flush takes so much longer.
    pub fn slow(&self, slowness: Duration) {
        self.0.slowness.set(slowness);
    }
    /// The next write or flush fails, and changes nothing; all later ones are done.
    pub fn fail_once(&self) {
        self.0.fails.set(true);
    }
    /// Writes and flushes that were asked for since one failed; `None` if none did.
    pub fn asked_since_failure(&self) -> Option<u64> {
        self.0.asked_since.get()
    }
    fn outcome(&self) -> io::Result<()> {
        self.0.asked_since.set(self.0.asked_since.get().map(|count| count + 1));
        if self.0.fails.replace(false) {
            self.0.asked_since.set(Some(0));
            return Err(io::Error::from_raw_os_error(5));
        }
        Ok(())
    }
    async fn over_by_now(&self) {
        let slowness = self.0.slowness.get();
        if slowness > Duration::ZERO {
            holdfast_env::sleep(slowness).await;
        }
        loop {
            let ended = self.0.ended.notified();
            if !self.0.stalled.get() {
                return;
            }
            ended.await;
        }
    }
}

struct StallingDirectory {
    inner: Rc<dyn Directory>,
    stall: Stall,
}

struct StallingFile {
    inner: Rc<dyn File>,
    stall: Stall,
}

impl Directory for StallingDirectory {
    fn open(&self, name: &str, mode: OpenMode) -> LocalBoxFuture<'static, io::Result<Rc<dyn File>>> {
        let (opening, stall) = (self.inner.open(name, mode), self.stall.clone());
        Box::pin(async move {
            let file: Rc<dyn File> = Rc::new(StallingFile { inner: opening.await?, stall });
            Ok(file)
        })
    }
    fn list(&self, prefix: &str) -> LocalBoxFuture<'static, io::Result<Vec<String>>> {
        self.inner.list(prefix)
    }
    fn sizes(&self, prefix: &str) -> LocalBoxFuture<'static, io::Result<Vec<(String, FileSize)>>> {
        self.inner.sizes(prefix)
    }
    fn remove(&self, name: &str) -> LocalBoxFuture<'static, io::Result<()>> {
        self.inner.remove(name)
    }
    fn rename(&self, from: &str, to: &str) -> LocalBoxFuture<'static, io::Result<()>> {
        self.inner.rename(from, to)
    }
    fn sync(&self) -> LocalBoxFuture<'static, io::Result<()>> {
        self.inner.sync()
    }
    fn space(&self) -> LocalBoxFuture<'static, io::Result<Space>> {
        self.inner.space()
    }
}

impl File for StallingFile {
    fn write_at(
        &self,
        offset: u64,
        buffer: AlignedBuffer,
        durability: Durability,
    ) -> LocalBoxFuture<'static, io::Result<AlignedBuffer>> {
        let (inner, stall) = (self.inner.clone(), self.stall.clone());
        Box::pin(async move {
            stall.over_by_now().await;
            stall.outcome()?;
            inner.write_at(offset, buffer, durability).await
        })
    }
    fn read_at(&self, offset: u64, length: usize) -> LocalBoxFuture<'static, io::Result<AlignedBuffer>> {
        self.inner.read_at(offset, length)
    }
    fn flush(&self) -> LocalBoxFuture<'static, io::Result<()>> {
        let (inner, stall) = (self.inner.clone(), self.stall.clone());
        Box::pin(async move {
            stall.over_by_now().await;
            stall.outcome()?;
            inner.flush().await
        })
    }
    fn allocate(&self, offset: u64, length: u64) -> LocalBoxFuture<'static, io::Result<()>> {
        self.inner.allocate(offset, length)
    }
    fn punch(&self, offset: u64, length: u64) -> LocalBoxFuture<'static, io::Result<()>> {
        self.inner.punch(offset, length)
    }
    fn set_length(&self, length: u64) -> LocalBoxFuture<'static, io::Result<()>> {
        self.inner.set_length(length)
    }
    fn size(&self) -> LocalBoxFuture<'static, io::Result<FileSize>> {
        self.inner.size()
    }
}
