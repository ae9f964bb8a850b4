//! The kernel's ring, and what is under way on it. The only place with unsafe code.
//!
//! Whatever the kernel may still read or write belongs to the ring: a request owns its file and its buffer from the
//! moment in which its entry is pushed until its completion is taken. Nobody else can reach them meanwhile, whatever
//! happens to who asked. A ring that is dropped waits for all of them first.

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use io_uring::{IoUring, opcode, squeue, types};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::disk::AlignedBuffer;

/// What the kernel is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Fills the buffer.
    Read,
    /// Writes it, durably if so said.
    Write { durable: bool },
    /// As `fdatasync`.
    Flush,
}

/// A request.
pub(super) struct Request {
    pub(super) file: Arc<OwnedFd>,
    pub(super) kind: Kind,
    /// Where in the file the buffer begins.
    pub(super) offset: u64,
    pub(super) buffer: AlignedBuffer,
    /// Bytes of it that are done.
    pub(super) done: usize,
}

/// Largest part of a buffer that one entry covers, in bytes.
const PART_BYTES_MAX: usize = 16 << 20;

impl Request {
    fn entry(&mut self) -> squeue::Entry {
        let file = types::Fd(self.file.as_raw_fd());
        let at = self.offset + self.done as u64;
        let rest = &mut self.buffer.as_mut_slice()[self.done..];
        let length = rest.len().min(PART_BYTES_MAX) as u32;
        match self.kind {
            Kind::Read => opcode::Read::new(file, rest.as_mut_ptr(), length).offset(at).build(),
            Kind::Write { durable } => {
                let flags = if durable { dsync() } else { 0 };
                opcode::Write::new(file, rest.as_ptr(), length).offset(at).rw_flags(flags).build()
            }
            Kind::Flush => opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC).build(),
        }
    }
}

/// `RWF_DSYNC`.
fn dsync() -> i32 {
    rustix::io::ReadWriteFlags::DSYNC.bits() as i32
}

/// Whether the kernel may take it a moment later: it lacks memory, or completions wait to be taken.
fn is_passing(error: &io::Error) -> bool {
    let passing = [Errno::AGAIN, Errno::BUSY, Errno::INTR];
    passing.iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

/// A ring with room for so many requests.
pub(super) struct Ring {
    ring: IoUring,
    under_way: Vec<Option<Request>>,
    free: Vec<usize>,
    /// Entries that were pushed and that the kernel has not taken yet.
    untaken: usize,
}

impl Ring {
    /// Sets it up: an error if the kernel has none, or allows none.
    pub(super) fn new(requests: u32) -> io::Result<Self> {
        let ring = IoUring::new(requests)?;
        let mut probe = io_uring::Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [opcode::Read::CODE, opcode::Write::CODE, opcode::Fsync::CODE];
        if !needed.into_iter().all(|code| probe.is_supported(code)) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let under_way = (0..requests).map(|_| None).collect();
        Ok(Self { ring, under_way, free: (0..requests as usize).rev().collect(), untaken: 0 })
    }

    /// Readable while completions wait to be taken.
    pub(super) fn watch(&self) -> io::Result<AsyncFd<OwnedFd>> {
        // SAFETY: the ring's descriptor stays open for as long as `self` is borrowed.
        let ring = unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) };
        let own = rustix::io::fcntl_dupfd_cloexec(ring, 0)?;
        // SAFETY: an `OwnedFd` is open until it is dropped, and always names the same descriptor.
        let watched = unsafe { AsyncFd::register_with_interest(own, Interest::READABLE) };
        watched.map_err(io::Error::from)
    }

    /// Whether another request fits.
    pub(super) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Requests that have not ended.
    pub(super) fn under_way(&self) -> usize {
        self.under_way.len() - self.free.len()
    }

    /// Takes a request over; the place by which its completion is known. Gives it back if there is no room.
    pub(super) fn push(&mut self, mut request: Request) -> Result<usize, Request> {
        let Some(place) = self.free.pop() else { return Err(request) };
        let entry = request.entry().user_data(place as u64);
        self.under_way[place] = Some(request);
        // SAFETY: the entry points to the buffer and names the file of a request that `under_way` owns from here until
        // `complete` takes it out, after the kernel has said that it is done with it. The buffer is on the heap, so it
        // stays where it is when the request is moved; nothing reaches it through `under_way` meanwhile. `Drop` waits
        // for every request, and a ring that is leaked leaks them, too.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        match pushed {
            Ok(()) => {
                self.untaken += 1;
                Ok(place)
            }
            // The kernel has not taken earlier ones yet; it never saw this one.
            Err(_) => match self.under_way[place].take() {
                Some(request) => {
                    self.free.push(place);
                    Err(request)
                }
                None => unreachable!("it was put there above"),
            },
        }
    }

    /// Hands what was pushed to the kernel. An error leaves it pushed.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        while self.untaken > 0 {
            match self.ring.submit() {
                Ok(taken) => self.untaken -= taken.min(self.untaken),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// A request that has ended, its place, and what the kernel said.
    pub(super) fn complete(&mut self) -> Option<(usize, Request, io::Result<usize>)> {
        let completion = self.ring.completion().next()?;
        let place = completion.user_data() as usize;
        let request = self.under_way[place].take().expect("a request completes once");
        self.free.push(place);
        let result = match completion.result() {
            error if error < 0 => Err(io::Error::from_raw_os_error(-error)),
            count => Ok(count as usize),
        };
        Some((place, request, result))
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        while self.under_way() > 0 {
            // What was pushed and not taken is taken now: an entry that stays would be of freed memory.
            let waited = self.ring.submit_and_wait(1);
            while self.complete().is_some() {}
            match waited {
                Ok(_) => {}
                Err(error) if is_passing(&error) => {}
                Err(error) => {
                    tracing::error!(%error, "the ring does not answer: what is under way on it is left to the kernel");
                    std::mem::forget(std::mem::take(&mut self.under_way));
                    self.free.clear();
                    return;
                }
            }
        }
    }
}
