//! The disk seam: a store's directory and its files.
//!
//! Assumptions about the medium, on which the store's recovery rests (numbered in `docs/FORMAT.md`): a write that was
//! not followed by a flush may be lost, kept or torn at 512-byte boundaries, in any order against other writes; a
//! durable write or a flush that returned `Ok` keeps everything that it covers; a flush that failed leaves nothing
//! known about what it covered, and is never retried.

use std::io;
use std::rc::Rc;

use futures_util::future::LocalBoxFuture;

/// Alignment of offsets, lengths and memory of direct I/O, in bytes.
pub const ALIGNMENT: usize = 4096;

#[derive(
    Clone, Copy, zerocopy::FromBytes, zerocopy::IntoBytes, zerocopy::Immutable, zerocopy::KnownLayout,
)]
#[repr(C, align(4096))]
struct Page([u8; ALIGNMENT]);

/// Memory aligned to 4096 bytes, its length a multiple of 4096; zeroed at first.
#[derive(Clone, Default)]
pub struct AlignedBuffer(Vec<Page>);

impl AlignedBuffer {
    /// `length` zero bytes; `length` is rounded up to a multiple of 4096.
    pub fn zeroed(length: usize) -> Self {
        Self(vec![Page([0; ALIGNMENT]); length.div_ceil(ALIGNMENT)])
    }
    /// A copy of `bytes`, padded with zeros to a multiple of 4096.
    pub fn copy_of(bytes: &[u8]) -> Self {
        let mut buffer = Self::zeroed(bytes.len());
        buffer.as_mut_slice()[..bytes.len()].copy_from_slice(bytes);
        buffer
    }
    /// The bytes.
    pub fn as_slice(&self) -> &[u8] {
        zerocopy::IntoBytes::as_bytes(self.0.as_slice())
    }
    /// The bytes, to change.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        zerocopy::IntoBytes::as_mut_bytes(self.0.as_mut_slice())
    }
    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.0.len() * ALIGNMENT
    }
    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl AsRef<[u8]> for AlignedBuffer {
    fn as_ref(&self) -> &[u8] {
        self.as_slice()
    }
}

impl std::fmt::Debug for AlignedBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AlignedBuffer({} bytes)", self.len())
    }
}

/// Whether a write must be on stable storage when it completes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Durability {
    /// It may still be lost until the next [`File::flush`].
    Volatile,
    /// It is on stable storage when it completes (O_DSYNC).
    Durable,
}

/// How a file is opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OpenMode {
    /// It must exist.
    Existing,
    /// It must not exist. Its name is durable only after [`Directory::sync`].
    CreateNew,
}

/// One file. All methods may be called concurrently; overlapping writes in flight have no order.
pub trait File {
    /// Writes `buffer` at `offset`. For direct I/O `offset` must be a multiple of 4096.
    fn write_at(
        &self,
        offset: u64,
        buffer: AlignedBuffer,
        durability: Durability,
    ) -> LocalBoxFuture<'static, io::Result<AlignedBuffer>>;
    /// Reads `length` bytes at `offset`, both multiples of 4096. Beyond the end of the file: zeros.
    fn read_at(&self, offset: u64, length: usize) -> LocalBoxFuture<'static, io::Result<AlignedBuffer>>;
    /// As [`Self::read_at`], over what stood in `buffer`, as many bytes as it has: for whoever reads much, and would have as
    /// much memory cleared for each read.
    fn read_into(
        &self,
        offset: u64,
        buffer: AlignedBuffer,
    ) -> LocalBoxFuture<'static, io::Result<AlignedBuffer>> {
        self.read_at(offset, buffer.len())
    }
    /// Everything that was written before this call is on stable storage when it returns `Ok` (fdatasync).
    fn flush(&self) -> LocalBoxFuture<'static, io::Result<()>>;
    /// Reserves space for a range, which then reads as it did before (zeros if it was a hole).
    fn allocate(&self, offset: u64, length: u64) -> LocalBoxFuture<'static, io::Result<()>>;
    /// Gives a range back to the file system; it reads as zeros. Durable after [`Self::flush`].
    fn punch(&self, offset: u64, length: u64) -> LocalBoxFuture<'static, io::Result<()>>;
    /// Changes the length. Durable after [`Self::flush`].
    fn set_length(&self, length: u64) -> LocalBoxFuture<'static, io::Result<()>>;
    /// The length, and the bytes allocated on the medium.
    fn size(&self) -> LocalBoxFuture<'static, io::Result<FileSize>>;
}

/// Sizes of a file in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FileSize {
    /// Apparent length.
    pub length: u64,
    /// Allocated on the medium.
    pub allocated: u64,
}

/// Space of the medium in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Space {
    /// In all.
    pub total: u64,
    /// Free for this process.
    pub available: u64,
}

/// A store's directory. Names may contain `/` for sub-directories, which are created as needed.
pub trait Directory {
    /// Opens a file for reading and writing with direct I/O where the file system allows it.
    fn open(&self, name: &str, mode: OpenMode) -> LocalBoxFuture<'static, io::Result<Rc<dyn File>>>;
    /// Names of all files below `prefix`, sorted.
    fn list(&self, prefix: &str) -> LocalBoxFuture<'static, io::Result<Vec<String>>>;
    /// Names and sizes of all files below `prefix`, sorted, looked at in one go; one that comes or goes meanwhile may be
    /// among them or not.
    fn sizes(&self, prefix: &str) -> LocalBoxFuture<'static, io::Result<Vec<(String, FileSize)>>>;
    /// Removes a file; no error if it does not exist. Durable after [`Self::sync`].
    fn remove(&self, name: &str) -> LocalBoxFuture<'static, io::Result<()>>;
    /// Renames a file over another, atomically. Durable after [`Self::sync`].
    fn rename(&self, from: &str, to: &str) -> LocalBoxFuture<'static, io::Result<()>>;
    /// Makes creations, removals and renames durable (fsync of the directories).
    fn sync(&self) -> LocalBoxFuture<'static, io::Result<()>>;
    /// Space of the medium.
    fn space(&self) -> LocalBoxFuture<'static, io::Result<Space>>;
}
