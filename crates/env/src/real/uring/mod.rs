//! Reads, writes and flushes on a ring of the kernel (io_uring), driven by the thread that asks: no thread is woken for
//! them. One ring per directory.
//!
//! A request is under way from the call on, whether its future is polled, awaited or dropped: as with the threads. At
//! most [`REQUESTS_MAX`] are with the kernel; the others wait in order. Results are those of the threads: what was
//! written in part goes on, a read ends with the file, an interrupted read or write is repeated, a flush never is.

mod ring;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Notify, oneshot};

use crate::disk::{ALIGNMENT, AlignedBuffer, Durability};
use ring::{Kind, Request, Ring};

/// Requests that are with the kernel at once.
const REQUESTS_MAX: u32 = 64;
/// Until the kernel is asked again that had no memory: it tells nobody when it has.
const AGAIN_AFTER: Duration = Duration::from_millis(1);

type Answer = oneshot::Sender<io::Result<AlignedBuffer>>;

/// A request and who waits for it.
struct Job {
    request: Request,
    answer: Answer,
    /// The file system knows no durable writes: it is flushed once it is written.
    flush_after: bool,
}

/// What the answer to a job is told from, while its request is with the kernel.
struct Waiting {
    answer: Answer,
    flush_after: bool,
}

struct State {
    ring: Ring,
    /// By the request's place.
    waiting: Vec<Option<Waiting>>,
    line: VecDeque<Job>,
}

/// What becomes of a request that has come back.
enum Next {
    Again,
    Flush,
    End(io::Result<()>),
}

fn next_of(request: &mut Request, flush_after: bool, result: io::Result<usize>) -> (Next, bool) {
    let length = request.buffer.len();
    let next = match (request.kind, result) {
        (Kind::Flush, result) => Next::End(result.map(drop)),
        (_, Err(error)) if error.kind() == io::ErrorKind::Interrupted => Next::Again,
        (Kind::Write { durable: true }, Err(error))
            if error.raw_os_error() == Some(Errno::OPNOTSUPP.raw_os_error()) =>
        {
            request.kind = Kind::Write { durable: false };
            return (Next::Again, true);
        }
        (_, Err(error)) => Next::End(Err(error)),
        (Kind::Write { .. }, Ok(0)) if length > 0 => Next::End(Err(io::ErrorKind::WriteZero.into())),
        (Kind::Read, Ok(0)) => Next::End(Ok(())),
        (kind, Ok(count)) => {
            request.done += count;
            let ended = request.done >= length
                // The end of the file is within this block.
                || (kind == Kind::Read && !request.done.is_multiple_of(ALIGNMENT));
            match ended {
                false => Next::Again,
                true if flush_after => Next::Flush,
                true => Next::End(Ok(())),
            }
        }
    };
    (next, flush_after)
}

/// The buffer of a request that has ended well: beyond the end of the file are zeros.
fn ended(mut request: Request) -> AlignedBuffer {
    if request.kind == Kind::Read {
        request.buffer.as_mut_slice()[request.done..].fill(0);
    }
    request.buffer
}

impl State {
    /// Hands over as much of the line as there is room for. An error if the kernel takes nothing now.
    fn advance(&mut self) -> io::Result<()> {
        while self.ring.has_room() {
            let Some(Job { request, answer, flush_after }) = self.line.pop_front() else { break };
            match self.ring.push(request) {
                Ok(place) => self.waiting[place] = Some(Waiting { answer, flush_after }),
                Err(request) => {
                    self.line.push_front(Job { request, answer, flush_after });
                    break;
                }
            }
        }
        self.ring.submit()
    }

    /// Takes what has ended, and hands over what waits.
    fn turn(&mut self) -> io::Result<()> {
        loop {
            let mut any = false;
            while let Some((place, mut request, result)) = self.ring.complete() {
                any = true;
                let Some(Waiting { answer, flush_after }) = self.waiting[place].take() else { continue };
                let (next, flush_after) = next_of(&mut request, flush_after, result);
                match next {
                    Next::Again => self.line.push_front(Job { request, answer, flush_after }),
                    Next::Flush => {
                        request.kind = Kind::Flush;
                        self.line.push_front(Job { request, answer, flush_after: false });
                    }
                    // Nobody waits any more: the caller was dropped, and the work was done all the same.
                    Next::End(result) => drop(answer.send(result.map(|()| ended(request)))),
                }
            }
            self.advance()?;
            if !any {
                return Ok(());
            }
        }
    }
}

struct Inner {
    state: RefCell<State>,
    /// The kernel could not take what was pushed.
    stuck: Notify,
    closing: Notify,
}

impl Inner {
    fn turn(&self) {
        if let Err(error) = self.state.borrow_mut().turn() {
            tracing::debug!(%error, "the kernel takes no requests now");
            self.stuck.notify_one();
        }
    }
}

/// A ring that runs on this thread's runtime. Dropped, it ends when everything that is under way has.
pub(super) struct Uring {
    inner: Rc<Inner>,
}

impl Drop for Uring {
    fn drop(&mut self) {
        self.inner.closing.notify_one();
    }
}

async fn drive(completions: AsyncFd<OwnedFd>, inner: Rc<Inner>) {
    let mut closing = false;
    loop {
        tokio::select! {
            ready = completions.readable() => match ready {
                // Cleared first: what completes while it is taken is told again.
                Ok(mut guard) => guard.clear_ready(),
                Err(error) => {
                    tracing::error!(%error, "the runtime is gone");
                    return;
                }
            },
            () = inner.stuck.notified() => tokio::time::sleep(AGAIN_AFTER).await,
            () = inner.closing.notified() => closing = true,
        }
        inner.turn();
        let state = inner.state.borrow();
        if closing && state.ring.under_way() == 0 && state.line.is_empty() {
            return;
        }
    }
}

impl Uring {
    /// Sets a ring up, if the kernel allows it and this thread has a runtime.
    pub(super) fn new() -> io::Result<Self> {
        if tokio::runtime::Handle::try_current().is_err() {
            return Err(io::Error::other("this thread has no runtime to drive a ring"));
        }
        let ring = Ring::new(REQUESTS_MAX)?;
        let completions = ring.watch()?;
        let waiting = (0..REQUESTS_MAX).map(|_| None).collect();
        let state = RefCell::new(State { ring, waiting, line: VecDeque::new() });
        let inner = Rc::new(Inner { state, stuck: Notify::new(), closing: Notify::new() });
        tokio::task::spawn_local(drive(completions, inner.clone()));
        Ok(Self { inner })
    }

    fn run(
        &self,
        file: &Arc<OwnedFd>,
        kind: Kind,
        offset: u64,
        buffer: AlignedBuffer,
    ) -> LocalBoxFuture<'static, io::Result<AlignedBuffer>> {
        let (answer, receiver) = oneshot::channel();
        let request = Request { file: file.clone(), kind, offset, buffer, done: 0 };
        let inner = Rc::downgrade(&self.inner);
        self.inner.state.borrow_mut().line.push_back(Job { request, answer, flush_after: false });
        self.inner.turn();
        async move { receiver.await.map_err(|_| gone(&inner))? }.boxed_local()
    }

    pub(super) fn read(
        &self,
        file: &Arc<OwnedFd>,
        offset: u64,
        buffer: AlignedBuffer,
    ) -> LocalBoxFuture<'static, io::Result<AlignedBuffer>> {
        match buffer.is_empty() {
            true => async move { Ok(buffer) }.boxed_local(),
            false => self.run(file, Kind::Read, offset, buffer),
        }
    }

    pub(super) fn write(
        &self,
        file: &Arc<OwnedFd>,
        offset: u64,
        buffer: AlignedBuffer,
        durability: Durability,
    ) -> LocalBoxFuture<'static, io::Result<AlignedBuffer>> {
        match buffer.is_empty() {
            true => async move { Ok(buffer) }.boxed_local(),
            false => {
                self.run(file, Kind::Write { durable: durability == Durability::Durable }, offset, buffer)
            }
        }
    }

    /// Never repeated: the kernel marks pages clean after a failed flush.
    pub(super) fn flush(&self, file: &Arc<OwnedFd>) -> LocalBoxFuture<'static, io::Result<()>> {
        self.run(file, Kind::Flush, 0, AlignedBuffer::default()).map(|done| done.map(drop)).boxed_local()
    }
}

fn gone(inner: &Weak<Inner>) -> io::Error {
    let what = if inner.strong_count() == 0 { "the ring is gone" } else { "the ring has lost a request" };
    io::Error::other(what)
}

#[cfg(test)]
mod tests;
