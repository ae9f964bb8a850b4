//! A disk that does not give some blocks until they are written anew.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::io;
use std::rc::Rc;

use futures_util::future::LocalBoxFuture;
use holdfast_env::disk::{ALIGNMENT, AlignedBuffer, Directory, Durability, File, FileSize, OpenMode, Space};

/// Blocks that cannot be read, by the ends of their files' names.
#[derive(Clone, Default)]
pub struct Unreadable(Rc<RefCell<BTreeSet<(String, u64)>>>);

impl Unreadable {
    /// A directory on such a disk.
    pub fn over(&self, inner: Rc<dyn Directory>) -> Rc<dyn Directory> {
        Rc::new(BadDirectory { inner, blocks: self.clone() })
    }
    /// Makes a block unreadable.
    pub fn make(&self, name: &str, block: u64) {
        self.0.borrow_mut().insert((name.to_owned(), block));
    }
    /// Whether any is left.
    pub fn any(&self) -> bool {
        !self.0.borrow().is_empty()
    }
}

struct BadDirectory {
    inner: Rc<dyn Directory>,
    blocks: Unreadable,
}

struct BadFile {
    inner: Rc<dyn File>,
    name: String,
    blocks: Unreadable,
}

impl Directory for BadDirectory {
    fn open(&self, name: &str, mode: OpenMode) -> LocalBoxFuture<'static, io::Result<Rc<dyn File>>> {
        let (opening, blocks) = (self.inner.open(name, mode), self.blocks.clone());
        let name = name.rsplit('/').next().unwrap_or_default().to_owned();
        Box::pin(async move {
            let file: Rc<dyn File> = Rc::new(BadFile { inner: opening.await?, name, blocks });
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

impl BadFile {
    fn touched(&self, offset: u64, length: usize) -> impl Iterator<Item = (String, u64)> {
        let (first, name) = (offset / ALIGNMENT as u64, self.name.clone());
        (first..first + (length / ALIGNMENT) as u64).map(move |block| (name.clone(), block))
    }
}

impl File for BadFile {
    fn write_at(
        &self,
        offset: u64,
        buffer: AlignedBuffer,
        durability: Durability,
    ) -> LocalBoxFuture<'static, io::Result<AlignedBuffer>> {
        let mut blocks = self.blocks.0.borrow_mut();
        self.touched(offset, buffer.len()).for_each(|block| _ = blocks.remove(&block));
        self.inner.write_at(offset, buffer, durability)
    }
    fn read_at(&self, offset: u64, length: usize) -> LocalBoxFuture<'static, io::Result<AlignedBuffer>> {
        let blocks = self.blocks.0.borrow();
        if self.touched(offset, length).any(|block| blocks.contains(&block)) {
            return Box::pin(std::future::ready(Err(io::Error::other("a block cannot be read"))));
        }
        self.inner.read_at(offset, length)
    }
    fn flush(&self) -> LocalBoxFuture<'static, io::Result<()>> {
        self.inner.flush()
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
