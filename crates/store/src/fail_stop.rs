//! The one rule for writes and flushes that fail: they stop the store.
//!
//! What a failed write or flush left behind is unknown, and asking once more may get an answer that is not true (the
//! kernel drops what it could not write, and calls the next flush a success). So nothing is tried again: the store
//! stops, and comes back by the recovery of its next start. Every file of a store beside its journal is opened through
//! this directory, so that nobody who writes one has to remember it; but not the reserve, in which nothing is written, and
//! which belongs to the journal.

use std::io;
use std::rc::Rc;

use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use holdfast_env::disk::{AlignedBuffer, Directory, Durability, File, FileSize, OpenMode, Space};

use crate::StoreError;
use crate::journal::{Journal, planted};

/// A store's directory, of which no write, flush or change of names may fail without stopping the store. Only a medium
/// that is full may refuse a write: that leaves what was there before.
#[derive(Clone)]
pub struct FailStop {
    inner: Rc<dyn Directory>,
    journal: Journal,
}

impl FailStop {
    /// Guards `inner` for the store of `journal`.
    pub fn new(inner: Rc<dyn Directory>, journal: Journal) -> Self {
        Self { inner, journal }
    }

    /// Whether nothing may be written any more.
    fn check(&self) -> io::Result<()> {
        match self.journal.failed() {
            Some(why) => Err(io::Error::other(format!("the store has stopped: {why}"))),
            None => Ok(()),
        }
    }

    /// Does what changes the disk, unless the store has stopped, and stops it if that fails.
    fn guarded<T: 'static>(
        &self,
        what: String,
        refusal: fn(&io::Error) -> bool,
        change: impl FnOnce() -> LocalBoxFuture<'static, io::Result<T>>,
    ) -> LocalBoxFuture<'static, io::Result<T>> {
        if let Err(stopped) = self.check() {
            return async move { Err(stopped) }.boxed_local();
        }
        let (journal, change) = (self.journal.clone(), change());
        // A task of its own: whoever asked may give up, and the failure counts nevertheless.
        let ended = holdfast_env::spawn("disk-change", async move {
            let outcome = change.await;
            if let Err(error) = &outcome
                && !refusal(error)
                && !planted("failed-write-goes-on")
            {
                journal.stop(&StoreError::io(what, error));
            }
            outcome
        });
        ended
            .map(|outcome| outcome.unwrap_or_else(|_| Err(io::Error::other("the shard is stopping"))))
            .boxed_local()
    }
}

/// A refusal that changed nothing: there is no room.
fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// There is no room, or the file system cannot do this at all.
fn is_full_or_unsupported(error: &io::Error) -> bool {
    is_full(error) || error.kind() == io::ErrorKind::Unsupported
}

/// A flush that fails is never a refusal: what it covered may be gone, also for want of room.
fn never(_: &io::Error) -> bool {
    false
}

impl Directory for FailStop {
    fn open(&self, name: &str, mode: OpenMode) -> LocalBoxFuture<'static, io::Result<Rc<dyn File>>> {
        if let (OpenMode::CreateNew, Err(stopped)) = (mode, self.check()) {
            return async move { Err(stopped) }.boxed_local();
        }
        // It changes no data: a want of descriptors passes, and a missing file is for the caller to judge.
        let open = self.inner.open(name, mode);
        let (guard, name) = (self.clone(), name.to_owned());
        open.map(move |opened| Ok(Rc::new(Guarded { inner: opened?, guard, name }) as Rc<dyn File>))
            .boxed_local()
    }
    fn list(&self, prefix: &str) -> LocalBoxFuture<'static, io::Result<Vec<String>>> {
        self.inner.list(prefix)
    }
    fn sizes(&self, prefix: &str) -> LocalBoxFuture<'static, io::Result<Vec<(String, FileSize)>>> {
        self.inner.sizes(prefix)
    }
    fn remove(&self, name: &str) -> LocalBoxFuture<'static, io::Result<()>> {
        self.guarded(format!("removing {name}"), is_full, || self.inner.remove(name))
    }
    fn rename(&self, from: &str, to: &str) -> LocalBoxFuture<'static, io::Result<()>> {
        self.guarded(format!("renaming {from} to {to}"), is_full, || self.inner.rename(from, to))
    }
    fn sync(&self) -> LocalBoxFuture<'static, io::Result<()>> {
        self.guarded("flushing the directory".into(), never, || self.inner.sync())
    }
    fn space(&self) -> LocalBoxFuture<'static, io::Result<Space>> {
        self.inner.space()
    }
}

/// A file of a [`FailStop`] directory.
struct Guarded {
    inner: Rc<dyn File>,
    guard: FailStop,
    name: String,
}

impl Guarded {
    fn what(&self, doing: &str) -> String {
        format!("{doing} {}", self.name)
    }
}

impl File for Guarded {
    fn write_at(
        &self,
        offset: u64,
        buffer: AlignedBuffer,
        durability: Durability,
    ) -> LocalBoxFuture<'static, io::Result<AlignedBuffer>> {
        let write = || self.inner.write_at(offset, buffer, durability);
        self.guard.guarded(self.what("writing"), is_full, write)
    }
    fn read_at(&self, offset: u64, length: usize) -> LocalBoxFuture<'static, io::Result<AlignedBuffer>> {
        self.inner.read_at(offset, length)
    }
    fn read_into(
        &self,
        offset: u64,
        buffer: AlignedBuffer,
    ) -> LocalBoxFuture<'static, io::Result<AlignedBuffer>> {
        self.inner.read_into(offset, buffer)
    }
    fn flush(&self) -> LocalBoxFuture<'static, io::Result<()>> {
        self.guard.guarded(self.what("flushing"), never, || self.inner.flush())
    }
    fn allocate(&self, offset: u64, length: u64) -> LocalBoxFuture<'static, io::Result<()>> {
        let allocate = || self.inner.allocate(offset, length);
        self.guard.guarded(self.what("allocating for"), is_full_or_unsupported, allocate)
    }
    fn punch(&self, offset: u64, length: u64) -> LocalBoxFuture<'static, io::Result<()>> {
        let punch = || self.inner.punch(offset, length);
        self.guard.guarded(self.what("giving back of"), is_full_or_unsupported, punch)
    }
    fn set_length(&self, length: u64) -> LocalBoxFuture<'static, io::Result<()>> {
        self.guard.guarded(self.what("setting the length of"), is_full, || self.inner.set_length(length))
    }
    fn size(&self) -> LocalBoxFuture<'static, io::Result<FileSize>> {
        self.inner.size()
    }
}
