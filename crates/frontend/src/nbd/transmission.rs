//! Requests and replies of one connection.

use std::io;
use std::rc::Rc;

use bytes::{BufMut, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::{Semaphore, SemaphorePermit, mpsc};

use super::handshake::{Negotiated, broken};
use super::proto::*;
use crate::device::{DeviceError, RunKind};
use crate::edge::Edge;

/// Requests of one connection in flight.
const REQUESTS_MAX: usize = 256;
/// Payload bytes of one connection in flight, in KiB: two of the largest requests.
const PAYLOAD_KIB_MAX: usize = 64 << 10;
/// Replies up to this size are gathered into one write, in bytes.
const GATHER_BYTES_MAX: usize = 16 << 10;

struct Reply {
    head: Bytes,
    body: Bytes,
}

#[derive(Clone, Copy)]
struct Request {
    flags: u16,
    command: u16,
    cookie: u64,
    offset: u64,
    length: u32,
}

struct Connection {
    edge: Rc<Edge>,
    structured: bool,
    allocation: bool,
    replies: mpsc::UnboundedSender<Reply>,
    requests: Semaphore,
    payload: Semaphore,
}

/// Serves until the client leaves, or an error.
pub(super) async fn run(stream: UnixStream, negotiated: Negotiated) -> io::Result<()> {
    let (reader, writer) = stream.into_split();
    // Bounded by the permits: a reply exists only for a request that holds one.
    let (replies, outbox) = mpsc::unbounded_channel();
    let connection = Rc::new(Connection {
        edge: negotiated.export.edge,
        structured: negotiated.structured,
        allocation: negotiated.allocation,
        replies,
        requests: Semaphore::new(REQUESTS_MAX),
        payload: Semaphore::new(PAYLOAD_KIB_MAX),
    });
    let writing = write_replies(writer, outbox);
    let reading = async {
        let result = read_requests(BufReader::with_capacity(64 << 10, reader), &connection).await;
        // What is under way is answered before the connection closes.
        let drained = connection.requests.acquire_many(REQUESTS_MAX as u32).await;
        drop(drained);
        drop(connection);
        result
    };
    tokio::pin!(writing);
    tokio::select! {
        result = reading => {
            writing.await?;
            result
        }
        result = &mut writing => result,
    }
}

async fn read_requests(
    mut reader: BufReader<tokio::net::unix::OwnedReadHalf>,
    connection: &Rc<Connection>,
) -> io::Result<()> {
    loop {
        let magic = match reader.read_u32().await {
            Ok(magic) => magic,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error),
        };
        if magic != REQUEST_MAGIC {
            return Err(broken("a request does not begin with its magic"));
        }
        let request = Request {
            flags: reader.read_u16().await?,
            command: reader.read_u16().await?,
            cookie: reader.read_u64().await?,
            offset: reader.read_u64().await?,
            length: reader.read_u32().await?,
        };
        if request.command == CMD_DISC {
            return Ok(());
        }
        let carries = matches!(request.command, CMD_WRITE | CMD_READ);
        if request.command == CMD_WRITE && request.length > PAYLOAD_BYTES_MAX {
            return Err(broken("a write is longer than was agreed"));
        }
        let kib = if carries { (request.length.min(PAYLOAD_BYTES_MAX) >> 10) + 1 } else { 1 };
        let slot = connection.requests.acquire().await.map_err(io::Error::other)?;
        let room = connection.payload.acquire_many(kib).await.map_err(io::Error::other)?;
        let payload = if request.command == CMD_WRITE {
            read_payload(&mut reader, request.length as usize).await?
        } else {
            Bytes::new()
        };
        forget(slot);
        forget(room);
        let connection = connection.clone();
        holdfast_env::spawn("nbd-request", async move {
            let reply = connection.answer(request, payload).await;
            // A closed outbox means that the client is gone: nobody waits for the reply.
            let _ = connection.replies.send(reply);
            connection.requests.add_permits(1);
            connection.payload.add_permits(kib as usize);
        });
    }
}

/// The request's task gives the permits back; a permit cannot be borrowed from what the task owns itself.
fn forget(permit: SemaphorePermit<'_>) {
    permit.forget();
}

async fn read_payload(
    reader: &mut BufReader<tokio::net::unix::OwnedReadHalf>,
    length: usize,
) -> io::Result<Bytes> {
    let mut payload = BytesMut::with_capacity(length);
    let mut limited = reader.take(length as u64);
    while payload.len() < length {
        if limited.read_buf(&mut payload).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(payload.freeze())
}

async fn write_replies(
    mut writer: OwnedWriteHalf,
    mut outbox: mpsc::UnboundedReceiver<Reply>,
) -> io::Result<()> {
    let mut gathered = BytesMut::with_capacity(2 * GATHER_BYTES_MAX);
    let mut batch = Vec::new();
    while outbox.recv_many(&mut batch, REQUESTS_MAX).await > 0 {
        for reply in batch.drain(..) {
            gathered.put_slice(&reply.head);
            if reply.body.len() <= GATHER_BYTES_MAX {
                gathered.put_slice(&reply.body);
            } else {
                writer.write_all(&gathered).await?;
                gathered.clear();
                writer.write_all(&reply.body).await?;
            }
            if gathered.len() >= GATHER_BYTES_MAX {
                writer.write_all(&gathered).await?;
                gathered.clear();
            }
        }
        writer.write_all(&gathered).await?;
        gathered.clear();
    }
    Ok(())
}

impl Connection {
    async fn answer(&self, request: Request, payload: Bytes) -> Reply {
        if let Err(why) = self.acceptable(request) {
            return self.error(request.cookie, EINVAL, why);
        }
        let (offset, length) = (request.offset, u64::from(request.length));
        let writing = matches!(request.command, CMD_WRITE | CMD_TRIM | CMD_WRITE_ZEROES);
        let done = match request.command {
            CMD_READ => return self.read(request).await,
            CMD_BLOCK_STATUS => return self.block_status(request).await,
            CMD_WRITE => self.edge.write(offset, payload).await,
            CMD_TRIM => self.edge.trim(offset, length).await,
            CMD_WRITE_ZEROES if request.flags & CMD_FLAG_NO_HOLE == 0 => self.edge.trim(offset, length).await,
            CMD_WRITE_ZEROES => self.edge.zero(offset, length).await,
            // Nothing acknowledged is volatile, and caching is up to the replica.
            _ => match self.edge.device().ended() {
                Some(why) => Err(DeviceError::Ended(why)),
                None => Ok(()),
            },
        };
        match done {
            Ok(()) => self.done(request.cookie),
            Err(error) => self.failed(request.cookie, &error, writing),
        }
    }

    fn acceptable(&self, request: Request) -> Result<(), &'static str> {
        let allowed = match request.command {
            CMD_READ => CMD_FLAG_DF,
            CMD_WRITE_ZEROES => CMD_FLAG_NO_HOLE | CMD_FLAG_FAST_ZERO,
            CMD_BLOCK_STATUS => CMD_FLAG_REQ_ONE,
            CMD_WRITE | CMD_FLUSH | CMD_TRIM | CMD_CACHE => 0,
            _ => return Err("the command is unknown"),
        };
        if request.flags & !(allowed | CMD_FLAG_FUA) != 0 {
            return Err("a flag does not fit the command");
        }
        if request.command == CMD_BLOCK_STATUS && !self.allocation {
            return Err("no meta context was chosen");
        }
        if request.length == 0 && !matches!(request.command, CMD_FLUSH) {
            return Err("the length is zero");
        }
        Ok(())
    }

    async fn read(&self, request: Request) -> Reply {
        if request.length > PAYLOAD_BYTES_MAX {
            return self.error(request.cookie, EOVERFLOW, "a read is longer than was agreed");
        }
        match self.edge.read(request.offset, request.length.into()).await {
            Ok(body) if self.structured => {
                let offset = request.offset.to_be_bytes();
                let head = final_chunk(CHUNK_OFFSET_DATA, request.cookie, &offset, body.len());
                Reply { head, body }
            }
            Ok(body) => Reply { head: simple_reply(0, request.cookie), body },
            Err(error) => self.failed(request.cookie, &error, false),
        }
    }

    async fn block_status(&self, request: Request) -> Reply {
        let runs = match self.edge.status(request.offset, request.length.into()).await {
            Ok(runs) => runs,
            Err(error) => return self.failed(request.cookie, &error, false),
        };
        let mut payload = BytesMut::new();
        payload.put_u32(BASE_ALLOCATION_ID);
        let count = if request.flags & CMD_FLAG_REQ_ONE != 0 { 1 } else { runs.len() };
        for (bytes, kind) in runs.into_iter().take(count) {
            payload.put_u32(bytes as u32);
            payload.put_u32(match kind {
                RunKind::Data => 0,
                RunKind::Zero => STATE_ZERO,
                RunKind::Absent => STATE_HOLE | STATE_ZERO,
            });
        }
        Reply { head: final_chunk(CHUNK_BLOCK_STATUS, request.cookie, &payload, 0), body: Bytes::new() }
    }

    fn done(&self, cookie: u64) -> Reply {
        let head =
            if self.structured { final_chunk(CHUNK_NONE, cookie, &[], 0) } else { simple_reply(0, cookie) };
        Reply { head, body: Bytes::new() }
    }

    fn failed(&self, cookie: u64, error: &DeviceError, writing: bool) -> Reply {
        tracing::debug!(%error, "a request failed");
        self.error(cookie, error_number(error, writing), &error.to_string())
    }

    fn error(&self, cookie: u64, number: u32, message: &str) -> Reply {
        let head =
            if self.structured { error_chunk(number, cookie, message) } else { simple_reply(number, cookie) };
        Reply { head, body: Bytes::new() }
    }
}
