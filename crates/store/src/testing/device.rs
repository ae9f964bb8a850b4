//! A directory on a device that takes time: one operation after the other, so that whoever brings much lets the others
//! wait.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use holdfast_env::Instant;
use holdfast_env::disk::{AlignedBuffer, Directory, Durability, File, FileSize, OpenMode, Space};

/// How fast a device is.
#[derive(Clone, Copy, Debug)]
pub struct Speed {
    /// Of every operation.
    pub each: Duration,
    /// Of a flush, or of a durable write beyond that, without the bytes that it brings to the medium.
    pub flush: Duration,
    /// Bytes that are moved in a second.
    pub bytes_per_second: u64,
    /// Bytes a second at which a flush brings to the medium what was written to its file before.
    pub flushed_per_second: u64,
}

/// A device below a directory. Cheap to clone; every clone is the same device.
#[derive(Clone)]
pub struct Device {
    inner: Rc<dyn Directory>,
    speed: Rc<Cell<Speed>>,
    free_at: Rc<Cell<Instant>>,
    /// Bytes of each file that were written and not flushed.
    unflushed: Rc<RefCell<BTreeMap<String, u64>>>,
}

struct Handle {
    inner: Rc<dyn File>,
    device: Device,
    name: String,
}

impl Device {
    /// A device with what `inner` holds.
    pub fn new(inner: Rc<dyn Directory>, speed: Speed) -> Self {
        let (free_at, unflushed) = (Rc::default(), Rc::default());
        Self { inner, speed: Rc::new(Cell::new(speed)), free_at, unflushed }
    }

    /// From now on it is so fast.
    pub fn set_speed(&self, speed: Speed) {
        self.speed.set(speed);
    }

    /// Ends when the device has had so much time for it.
    fn busy(&self, time: Duration) -> LocalBoxFuture<'static, ()> {
        let until = self.free_at.get().max(Instant::now()) + time;
        self.free_at.set(until);
        holdfast_env::sleep_until(until).boxed_local()
    }

    fn moved(&self, bytes: usize) -> Duration {
        let speed = self.speed.get();
        speed.each + Duration::from_secs_f64(bytes as f64 / speed.bytes_per_second as f64)
    }

    fn flushed(&self, bytes: u64) -> Duration {
        let speed = self.speed.get();
        speed.flush + Duration::from_secs_f64(bytes as f64 / speed.flushed_per_second as f64)
    }
}

impl Directory for Device {
    fn open(&self, name: &str, mode: OpenMode) -> LocalBoxFuture<'static, io::Result<Rc<dyn File>>> {
        let (opening, device, name) = (self.inner.open(name, mode), self.clone(), name.to_owned());
        async move {
            let file: Rc<dyn File> = Rc::new(Handle { inner: opening.await?, device, name });
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
        self.inner.remove(name)
    }
    fn rename(&self, from: &str, to: &str) -> LocalBoxFuture<'static, io::Result<()>> {
        self.inner.rename(from, to)
    }
    fn sync(&self) -> LocalBoxFuture<'static, io::Result<()>> {
        let (busy, syncing) = (self.busy(self.flushed(0)), self.inner.sync());
        async move {
            busy.await;
            syncing.await
        }
        .boxed_local()
    }
    fn space(&self) -> LocalBoxFuture<'static, io::Result<Space>> {
        self.inner.space()
    }
}

impl File for Handle {
    fn write_at(
        &self,
        offset: u64,
        buffer: AlignedBuffer,
        durability: Durability,
    ) -> LocalBoxFuture<'static, io::Result<AlignedBuffer>> {
        let mut time = self.device.moved(buffer.len());
        match durability {
            Durability::Durable => time += self.device.flushed(buffer.len() as u64),
            Durability::Volatile => {
                *self.device.unflushed.borrow_mut().entry(self.name.clone()).or_default() +=
                    buffer.len() as u64;
            }
        }
        let (busy, writing) = (self.device.busy(time), self.inner.write_at(offset, buffer, durability));
        async move {
            busy.await;
            writing.await
        }
        .boxed_local()
    }
    fn read_at(&self, offset: u64, length: usize) -> LocalBoxFuture<'static, io::Result<AlignedBuffer>> {
        let busy = self.device.busy(self.device.moved(length));
        let reading = self.inner.read_at(offset, length);
        async move {
            busy.await;
            reading.await
        }
        .boxed_local()
    }
    fn flush(&self) -> LocalBoxFuture<'static, io::Result<()>> {
        let bytes = self.device.unflushed.borrow_mut().remove(&self.name).unwrap_or_default();
        let (busy, flushing) = (self.device.busy(self.device.flushed(bytes)), self.inner.flush());
        async move {
            busy.await;
            flushing.await
        }
        .boxed_local()
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
