//! A disk that stops completing what it is asked to write, until it goes on.

use std::cell::Cell;
use std::io;
use std::rc::Rc;

use futures_util::future::LocalBoxFuture;
use holdfast_env::disk::{AlignedBuffer, Directory, Durability, File, FileSize, OpenMode, Space};
use tokio::sync::Notify;

/// While it lasts, nothing that is written or flushed ends.
#[derive(Clone, Default)]
pub struct Stall(Rc<(Cell<bool>, Notify)>);

impl Stall {
    /// A directory on such a disk.
    pub fn over(&self, inner: Rc<dyn Directory>) -> Rc<dyn Directory> {
        Rc::new(StallingDirectory { inner, stall: self.clone() })
    }
    pub fn begin(&self) {
        self.0.0.set(true);
    }
    pub fn end(&self) {
        self.0.0.set(false);
        self.0.1.notify_waiters();
    }
    async fn over_by_now(&self) {
        loop {
            let ended = self.0.1.notified();
            if !self.0.0.get() {
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
