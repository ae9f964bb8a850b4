//! The sending side of one stream to one peer: a queue bounded in bytes, and the task that dials and writes.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use holdfast_env::Instant;
use holdfast_env::net::{Frame, Lane, SendError};
use holdfast_types::{StoreId, limits};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufWriter};
use tokio::net::TcpStream;
use tokio::sync::Notify;

use crate::frame::{self, Hello};
use crate::tcp::{Shared, tune};
use crate::tls::Tls;

/// How long a dial with its handshake may take.
const DIAL_DEADLINE: Duration = Duration::from_secs(3);
/// After a failed dial, sends are refused for so long before the next one.
const DIAL_PAUSE: Duration = Duration::from_millis(100);
/// Unacknowledged data breaks the connection after so long, in milliseconds.
const USER_TIMEOUT_MS: u32 = 10_000;
const WRITE_BUFFER: usize = 128 << 10;

struct Queued {
    due: Instant,
    frame: Frame,
}

/// One outgoing stream.
pub(crate) struct Link {
    to: StoreId,
    lane: Lane,
    queue: RefCell<VecDeque<Queued>>,
    bytes: Cell<usize>,
    filled: Notify,
    drained: Rc<Notify>,
    running: Cell<bool>,
    failed: RefCell<Option<(Instant, String)>>,
}

impl Link {
    pub(crate) fn new(to: StoreId, lane: Lane) -> Rc<Self> {
        Rc::new(Self {
            to,
            lane,
            queue: RefCell::default(),
            bytes: Cell::new(0),
            filled: Notify::new(),
            drained: Rc::default(),
            running: Cell::new(false),
            failed: RefCell::default(),
        })
    }

    /// Bytes that wait.
    pub(crate) fn queued(&self) -> u64 {
        self.bytes.get() as u64
    }

    pub(crate) fn send(
        self: &Rc<Self>,
        shared: &Rc<Shared>,
        frame: Frame,
        delay: Duration,
    ) -> Result<(), SendError> {
        let bytes = frame.bytes();
        if frame.head.len() > limits::FRAME_HEAD_BYTES_MAX || bytes > limits::FRAME_BYTES_MAX {
            return Err(SendError::TooLarge { bytes });
        }
        if !self.running.get()
            && let Some((until, why)) = &*self.failed.borrow()
            && Instant::now() < *until
        {
            return Err(SendError::Unreachable { to: self.to, why: why.clone() });
        }
        if self.bytes.get() + bytes > limits::PEER_QUEUE_BYTES_MAX {
            return Err(SendError::QueueFull { to: self.to, queued: self.bytes.get() });
        }
        self.bytes.set(self.bytes.get() + bytes);
        self.queue.borrow_mut().push_back(Queued { due: Instant::now() + delay, frame });
        self.filled.notify_one();
        if !self.running.replace(true) {
            holdfast_env::spawn("peer-link", self.clone().run(shared.clone()));
        }
        Ok(())
    }

    /// Ends when the queue has room, or the link is down.
    pub(crate) async fn ready(self: Rc<Self>) {
        loop {
            let drained = self.drained.notified();
            if !self.running.get() || self.bytes.get() < limits::PEER_QUEUE_BYTES_MAX / 2 {
                return;
            }
            drained.await;
        }
    }

    async fn run(self: Rc<Self>, shared: Rc<Shared>) {
        let ended = self.serve(&shared).await;
        let why = ended.err().map_or_else(|| "closed".to_owned(), |error| error.to_string());
        tracing::debug!(to = %self.to, lane = ?self.lane, %why, "the link to a peer is down");
        *self.failed.borrow_mut() = Some((Instant::now() + DIAL_PAUSE, why));
        self.queue.borrow_mut().clear();
        self.bytes.set(0);
        self.running.set(false);
        self.drained.notify_waiters();
        shared.lost(self.to, self.lane);
    }

    async fn serve(&self, shared: &Rc<Shared>) -> std::io::Result<()> {
        let dialled = holdfast_env::timeout(DIAL_DEADLINE, self.dial(shared)).await;
        let stream = dialled.map_err(|_| std::io::Error::from(std::io::ErrorKind::TimedOut))??;
        let (mut reader, writer) = tokio::io::split(stream);
        let mut writer = BufWriter::with_capacity(WRITE_BUFFER, writer);
        // The peer sends nothing on this connection: whatever comes is its end.
        let mut byte = [0];
        let ended = reader.read(&mut byte);
        let writing = self.write_all(shared, &mut writer);
        futures_util::pin_mut!(ended, writing);
        match futures_util::future::select(ended, writing).await {
            futures_util::future::Either::Left((end, _)) => {
                end?;
                Err(std::io::Error::new(
                    std::io::ErrorKind::ConnectionAborted,
                    "the peer closed the connection",
                ))
            }
            futures_util::future::Either::Right((result, _)) => result,
        }
    }

    async fn dial(&self, shared: &Rc<Shared>) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
        let peer = shared.peer(self.to).ok_or_else(|| std::io::Error::other("no address is known for it"))?;
        let stream = TcpStream::connect(&peer.address).await?;
        tune(&stream)?;
        rustix::net::sockopt::set_tcp_user_timeout(&stream, USER_TIMEOUT_MS)?;
        let mut stream = shared.tls.connector.connect(Tls::server_name(), stream).await?;
        let node =
            shared.tls.node_of(stream.get_ref().1.peer_certificates()).map_err(std::io::Error::other)?;
        if node != peer.node.to_string() {
            return Err(std::io::Error::other(format!(
                "node {node} answers at the address of node {}",
                peer.node
            )));
        }
        let hello = Hello { from: shared.local, to: self.to, lane: self.lane };
        frame::write(&mut stream, &hello.encode()).await?;
        stream.flush().await?;
        Ok(stream)
    }

    async fn write_all<W: tokio::io::AsyncWrite + Unpin>(
        &self,
        shared: &Rc<Shared>,
        writer: &mut BufWriter<W>,
    ) -> std::io::Result<()> {
        loop {
            let next = self.queue.borrow_mut().pop_front();
            let Some(Queued { due, frame }) = next else {
                writer.flush().await?;
                self.filled.notified().await;
                continue;
            };
            if Instant::now() < due {
                writer.flush().await?;
                holdfast_env::sleep_until(due).await;
            }
            frame::write(writer, &frame).await?;
            shared.counters.borrow_mut().sent(frame.bytes());
            self.bytes.set(self.bytes.get().saturating_sub(frame.bytes()));
            self.drained.notify_waiters();
        }
    }
}
