//! A disk that stalls for a while in every second, when it is told to.

use std::cell::Cell;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::LocalBoxFuture;
use holdfast_env::Instant;
use holdfast_env::disk::{AlignedBuffer, Directory, Durability, File, FileSize, OpenMode, Space};

/// For so long of every [`PERIOD`] nothing that is written or flushed ends.
const STALL: Duration = Duration::from_millis(100);
const PERIOD: Duration = Duration::from_secs(1);

/// Since when the disk stalls once in every second; cheap to clone.
#[derive(Clone, Default)]
pub struct Stalls(Rc<Cell<Option<Instant>>>);

impl Stalls {
    /// A directory on such a disk.
    pub fn over(&self, inner: Rc<dyn Directory>) -> Rc<dyn Directory> {
        Rc::new(StallingDirectory { inner, stalls: self.clone() })
    }

    /// Begins or ends.
    pub fn set(&self, stalls: bool) {
        self.0.set(stalls.then(Instant::now));
    }

    /// Ends when the disk does not stall.
    async fn over_by_now(&self) {
        let Some(since) = self.0.get() else { return };
        let into = Duration::from_nanos((Instant::now().since(since).as_nanos() % PERIOD.as_nanos()) as u64);
        if into < STALL {
            holdfast_env::sleep(STALL - into).await;
        }
    }
}

struct StallingDirectory {
    inner: Rc<dyn Directory>,
    stalls: Stalls,
}

struct StallingFile {
    inner: Rc<dyn File>,
    stalls: Stalls,
}

impl Directory for StallingDirectory {
    fn open(&self, name: &str, mode: OpenMode) -> LocalBoxFuture<'static, io::Result<Rc<dyn File>>> {
        let (opening, stalls) = (self.inner.open(name, mode), self.stalls.clone());
        Box::pin(async move {
            let file: Rc<dyn File> = Rc::new(StallingFile { inner: opening.await?, stalls });
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
        let (inner, stalls) = (self.inner.clone(), self.stalls.clone());
        Box::pin(async move {
            stalls.over_by_now().await;
            inner.write_at(offset, buffer, durability).await
        })
    }
    fn read_at(&self, offset: u64, length: usize) -> LocalBoxFuture<'static, io::Result<AlignedBuffer>> {
        self.inner.read_at(offset, length)
    }
    fn flush(&self) -> LocalBoxFuture<'static, io::Result<()>> {
        let (inner, stalls) = (self.inner.clone(), self.stalls.clone());
        Box::pin(async move {
            stalls.over_by_now().await;
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
