//! A directory whose unflushed writes stand in this process only: when the process is killed, they are gone, as after a
//! power cut. SIGKILL alone cannot show a missing flush, since the page cache survives it.
//!
//! For development clusters and tests: a node with `disk` set in its configuration stands on this. What it models:
//! every write that no flush or durable write has covered is lost; with [`Mode::Tear`], parts of such writes, and
//! parts of durable writes that have not completed, may be on the medium, block by block and in any order. What it
//! does not: lost renames and creations, and punched ranges that come back.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;

use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;

use crate::disk::{ALIGNMENT, AlignedBuffer, Directory, Durability, File, FileSize, OpenMode, Space};

const BLOCK: u64 = ALIGNMENT as u64;

/// What happens to writes that are not flushed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// They are lost.
    Discard,
    /// They are lost in part.
    Tear,
    /// Everything is lost, flushed or not: a disk that lies, to prove that tests notice.
    Lie,
}

/// The directory.
pub struct PowerCutDirectory {
    inner: Rc<dyn Directory>,
    mode: Mode,
    /// Files by name: handles of one file share what is unflushed.
    files: Rc<RefCell<BTreeMap<String, Rc<PowerCutFile>>>>,
}

impl PowerCutDirectory {
    /// Stands on `inner`.
    pub fn new(inner: Rc<dyn Directory>, mode: Mode) -> Rc<Self> {
        Rc::new(Self { inner, mode, files: Rc::default() })
    }
}

impl Directory for PowerCutDirectory {
    fn open(&self, name: &str, mode: OpenMode) -> LocalBoxFuture<'static, io::Result<Rc<dyn File>>> {
        if mode == OpenMode::Existing
            && let Some(file) = self.files.borrow().get(name)
        {
            let file: Rc<dyn File> = Rc::new(Handle(file.clone()));
            return std::future::ready(Ok(file)).boxed_local();
        }
        let (opening, how, files) = (self.inner.open(name, mode), self.mode, self.files.clone());
        let name = name.to_owned();
        async move {
            let inner = opening.await?;
            let file = Rc::new(PowerCutFile { inner, mode: how, unflushed: RefCell::default() });
            files.borrow_mut().insert(name, file.clone());
            let file: Rc<dyn File> = Rc::new(Handle(file));
            Ok(file)
        }
        .boxed_local()
    }
    fn list(&self, prefix: &str) -> LocalBoxFuture<'static, io::Result<Vec<String>>> {
        self.inner.list(prefix)
    }
    fn sizes(&self, prefix: &str) -> LocalBoxFuture<'static, io::Result<Vec<(String, FileSize)>>> {
        self.inner.sizes(prefix)
    }
    fn remove(&self, name: &str) -> LocalBoxFuture<'static, io::Result<()>> {
        self.files.borrow_mut().remove(name);
        self.inner.remove(name)
    }
    fn rename(&self, from: &str, to: &str) -> LocalBoxFuture<'static, io::Result<()>> {
        let mut files = self.files.borrow_mut();
        files.remove(to);
        if let Some(file) = files.remove(from) {
            files.insert(to.to_owned(), file);
        }
        self.inner.rename(from, to)
    }
    fn sync(&self) -> LocalBoxFuture<'static, io::Result<()>> {
        self.inner.sync()
    }
    fn space(&self) -> LocalBoxFuture<'static, io::Result<Space>> {
        self.inner.space()
    }
}

struct PowerCutFile {
    inner: Rc<dyn File>,
    mode: Mode,
    /// Blocks that stand in memory only, by number.
    unflushed: RefCell<BTreeMap<u64, Rc<AlignedBuffer>>>,
}

struct Handle(Rc<PowerCutFile>);

/// Blocks of a buffer with their numbers.
fn blocks(offset: u64, buffer: &AlignedBuffer) -> impl Iterator<Item = (u64, &[u8])> {
    debug_assert!(offset.is_multiple_of(BLOCK), "writes are aligned");
    buffer.as_slice().chunks(ALIGNMENT).enumerate().map(move |(n, data)| (offset / BLOCK + n as u64, data))
}

impl PowerCutFile {
    fn keep(&self, offset: u64, buffer: &AlignedBuffer) {
        let mut unflushed = self.unflushed.borrow_mut();
        for (number, data) in blocks(offset, buffer) {
            unflushed.insert(number, Rc::new(AlignedBuffer::copy_of(data)));
        }
    }

    /// Writes a random part of the blocks to the medium, as a kernel's write-back or a disk's cache might.
    async fn leak(&self, offset: u64, buffer: &AlignedBuffer) -> io::Result<()> {
        let parts: Vec<(u64, AlignedBuffer)> = blocks(offset, buffer)
            .filter(|_| crate::random_u64().is_multiple_of(2))
            .map(|(number, data)| (number, AlignedBuffer::copy_of(data)))
            .collect();
        for (number, data) in parts {
            self.inner.write_at(number * BLOCK, data, Durability::Volatile).await?;
        }
        Ok(())
    }

    async fn flush(&self) -> io::Result<()> {
        let pages: Vec<_> = self.unflushed.borrow().iter().map(|(n, data)| (*n, data.clone())).collect();
        for (number, data) in &pages {
            let copy = AlignedBuffer::copy_of(data.as_slice());
            self.inner.write_at(number * BLOCK, copy, Durability::Volatile).await?;
        }
        self.inner.flush().await?;
        // What was written again meanwhile is not flushed yet.
        let mut unflushed = self.unflushed.borrow_mut();
        for (number, data) in pages {
            if unflushed.get(&number).is_some_and(|now| Rc::ptr_eq(now, &data)) {
                unflushed.remove(&number);
            }
        }
        Ok(())
    }

    fn clear(&self, offset: u64, length: u64) {
        let (first, end) = (offset / BLOCK, (offset + length).div_ceil(BLOCK));
        self.unflushed.borrow_mut().retain(|number, _| *number < first || *number >= end);
    }
}

impl File for Handle {
    fn write_at(
        &self,
        offset: u64,
        buffer: AlignedBuffer,
        durability: Durability,
    ) -> LocalBoxFuture<'static, io::Result<AlignedBuffer>> {
        let file = self.0.clone();
        async move {
            match (durability, file.mode) {
                (Durability::Volatile, Mode::Discard) | (_, Mode::Lie) => file.keep(offset, &buffer),
                (Durability::Volatile, Mode::Tear) => {
                    file.keep(offset, &buffer);
                    file.leak(offset, &buffer).await?;
                }
                (Durability::Durable, mode) => {
                    if mode == Mode::Tear {
                        file.leak(offset, &buffer).await?;
                    }
                    file.clear(offset, buffer.len() as u64);
                    return file.inner.write_at(offset, buffer, durability).await;
                }
            }
            Ok(buffer)
        }
        .boxed_local()
    }

    fn read_at(&self, offset: u64, length: usize) -> LocalBoxFuture<'static, io::Result<AlignedBuffer>> {
        let file = self.0.clone();
        async move {
            let mut buffer = file.inner.read_at(offset, length).await?;
            let (first, end) = (offset / BLOCK, (offset + length as u64).div_ceil(BLOCK));
            for (number, data) in file.unflushed.borrow().range(first..end) {
                let at = ((number - first) * BLOCK) as usize;
                buffer.as_mut_slice()[at..at + data.len()].copy_from_slice(data.as_slice());
            }
            Ok(buffer)
        }
        .boxed_local()
    }

    fn flush(&self) -> LocalBoxFuture<'static, io::Result<()>> {
        let file = self.0.clone();
        async move { if file.mode == Mode::Lie { Ok(()) } else { file.flush().await } }.boxed_local()
    }

    fn allocate(&self, offset: u64, length: u64) -> LocalBoxFuture<'static, io::Result<()>> {
        self.0.inner.allocate(offset, length)
    }

    fn punch(&self, offset: u64, length: u64) -> LocalBoxFuture<'static, io::Result<()>> {
        self.0.clear(offset, length);
        self.0.inner.punch(offset, length)
    }

    fn set_length(&self, length: u64) -> LocalBoxFuture<'static, io::Result<()>> {
        self.0.clear(length, u64::MAX - length - BLOCK);
        self.0.inner.set_length(length)
    }

    fn size(&self) -> LocalBoxFuture<'static, io::Result<FileSize>> {
        self.0.inner.size()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::real::disk::RealDirectory;

    fn page(value: u8) -> AlignedBuffer {
        AlignedBuffer::copy_of(&[value; ALIGNMENT])
    }

    /// What stands at block 0 after the process ended: read around the overlay.
    async fn on_medium(inner: &Rc<dyn Directory>) -> u8 {
        let file = inner.open("f", OpenMode::Existing).await.expect("opens");
        file.read_at(0, ALIGNMENT).await.expect("reads").as_slice()[0]
    }

    #[test]
    fn only_what_was_flushed_outlives_the_process() {
        for (mode, kept) in [(Mode::Discard, 1), (Mode::Lie, 0)] {
            let place = tempfile::tempdir().expect("a place");
            crate::real::run(async {
                let inner: Rc<dyn Directory> = RealDirectory::open(place.path()).expect("opens");
                let cut = PowerCutDirectory::new(inner.clone(), mode);
                let file = cut.open("f", OpenMode::CreateNew).await.expect("creates");
                file.write_at(0, page(1), Durability::Volatile).await.expect("writes");
                assert_eq!(on_medium(&inner).await, 0);
                file.flush().await.expect("flushes");
                assert_eq!(on_medium(&inner).await, kept);
                file.write_at(0, page(2), Durability::Volatile).await.expect("writes");
                assert_eq!(on_medium(&inner).await, kept);
                let again = cut.open("f", OpenMode::Existing).await.expect("opens");
                assert_eq!(again.read_at(0, ALIGNMENT).await.expect("reads").as_slice()[0], 2);
                file.write_at(0, page(3), Durability::Durable).await.expect("writes");
                assert_eq!(on_medium(&inner).await, kept * 3);
            });
        }
    }
}
