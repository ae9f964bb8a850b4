//! A small NBD client over a unix socket: for demonstrations, benchmarks and tests. Any number of requests in flight;
//! simple replies only. Its futures are `Send` and run on an ordinary runtime.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{BufMut, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::oneshot;

use super::proto::*;

type Answer = io::Result<Bytes>;

struct Waiting {
    /// Bytes of payload that a good answer brings.
    payload: usize,
    answer: oneshot::Sender<Answer>,
}

#[derive(Default)]
struct Pending {
    next: u64,
    waiting: HashMap<u64, Waiting>,
    /// Why no more answers come.
    ended: Option<String>,
}

/// A connection to one export.
pub struct NbdClient {
    size: u64,
    writer: tokio::sync::Mutex<OwnedWriteHalf>,
    pending: Arc<Mutex<Pending>>,
    reading: tokio::task::JoinHandle<()>,
}

fn protocol(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.to_owned())
}

fn lock(pending: &Mutex<Pending>) -> std::sync::MutexGuard<'_, Pending> {
    // A panic elsewhere leaves the map whole: every change of it is one step.
    pending.lock().unwrap_or_else(PoisonError::into_inner)
}

impl NbdClient {
    /// Connects to the export `name` of the server at `socket`.
    pub async fn connect(socket: &Path, name: &str) -> io::Result<Self> {
        let mut stream = UnixStream::connect(socket).await?;
        if stream.read_u64().await? != MAGIC || stream.read_u64().await? != OPTION_MAGIC {
            return Err(protocol("the server does not speak NBD"));
        }
        let _server_flags = stream.read_u16().await?;
        let mut hello = BytesMut::new();
        hello.put_u32(u32::from(HANDSHAKE_FLAGS));
        hello.put_u64(OPTION_MAGIC);
        hello.put_u32(OPT_GO);
        hello.put_u32(4 + name.len() as u32 + 2);
        hello.put_u32(name.len() as u32);
        hello.put_slice(name.as_bytes());
        hello.put_u16(0);
        stream.write_all(&hello).await?;
        let size = Self::chosen(&mut stream).await?;
        let (reader, writer) = stream.into_split();
        let pending = Arc::new(Mutex::new(Pending::default()));
        let reading = tokio::spawn(read_answers(reader, pending.clone()));
        Ok(Self { size, writer: tokio::sync::Mutex::new(writer), pending, reading })
    }

    async fn chosen(stream: &mut UnixStream) -> io::Result<u64> {
        let mut size = None;
        loop {
            if stream.read_u64().await? != OPTION_REPLY_MAGIC {
                return Err(protocol("an option's reply does not begin with its magic"));
            }
            let _option = stream.read_u32().await?;
            let (kind, length) = (stream.read_u32().await?, stream.read_u32().await?);
            if length > OPTION_BYTES_MAX {
                return Err(protocol("an option's reply is too long"));
            }
            let mut data = vec![0; length as usize];
            stream.read_exact(&mut data).await?;
            match kind {
                REP_ACK => return size.ok_or_else(|| protocol("the server does not tell the export's size")),
                REP_INFO if data.len() >= 10 && data[..2] == INFO_EXPORT.to_be_bytes() => {
                    let bytes: [u8; 8] = data[2..10].try_into().map_err(|_| protocol("a short size"))?;
                    size = Some(u64::from_be_bytes(bytes));
                }
                REP_INFO => {}
                _ => {
                    let why = String::from_utf8_lossy(&data).into_owned();
                    return Err(io::Error::new(io::ErrorKind::NotFound, why));
                }
            }
        }
    }

    /// The export's size in bytes when the connection was made.
    pub fn size(&self) -> u64 {
        self.size
    }

    async fn request(&self, command: u16, flags: u16, offset: u64, length: u32, payload: Bytes) -> Answer {
        let (answer, result) = oneshot::channel();
        let cookie = {
            let mut pending = lock(&self.pending);
            if let Some(why) = &pending.ended {
                return Err(io::Error::new(io::ErrorKind::ConnectionAborted, why.clone()));
            }
            let cookie = pending.next;
            pending.next += 1;
            let payload = if command == CMD_READ { length as usize } else { 0 };
            pending.waiting.insert(cookie, Waiting { payload, answer });
            cookie
        };
        let mut head = BytesMut::with_capacity(28);
        head.put_u32(REQUEST_MAGIC);
        head.put_u16(flags);
        head.put_u16(command);
        head.put_u64(cookie);
        head.put_u64(offset);
        head.put_u32(length);
        {
            let mut writer = self.writer.lock().await;
            let sent = async {
                writer.write_all(&head).await?;
                writer.write_all(&payload).await
            };
            if let Err(error) = sent.await {
                end(&self.pending, &error.to_string());
            }
        }
        result.await.unwrap_or_else(|_| Err(io::ErrorKind::ConnectionAborted.into()))
    }

    /// Reads `length` bytes, at most 32 MiB.
    pub async fn read(&self, offset: u64, length: u32) -> io::Result<Bytes> {
        self.request(CMD_READ, 0, offset, length, Bytes::new()).await
    }
    /// Writes; durable when it returns.
    pub async fn write(&self, offset: u64, data: Bytes) -> io::Result<()> {
        let length = u32::try_from(data.len()).map_err(|_| protocol("a write is too long"))?;
        self.request(CMD_WRITE, CMD_FLAG_FUA, offset, length, data).await.map(drop)
    }
    /// Gives space back.
    pub async fn trim(&self, offset: u64, length: u32) -> io::Result<()> {
        self.request(CMD_TRIM, 0, offset, length, Bytes::new()).await.map(drop)
    }
}

impl Drop for NbdClient {
    fn drop(&mut self) {
        self.reading.abort();
    }
}

fn end(pending: &Mutex<Pending>, why: &str) {
    let mut pending = lock(pending);
    pending.ended = Some(why.to_owned());
    for (_, waiting) in pending.waiting.drain() {
        // Whoever gave up waiting does not mind.
        let _ = waiting.answer.send(Err(io::Error::new(io::ErrorKind::ConnectionAborted, why.to_owned())));
    }
}

async fn read_answers(reader: OwnedReadHalf, pending: Arc<Mutex<Pending>>) {
    let mut reader = BufReader::with_capacity(64 << 10, reader);
    let why = loop {
        match read_answer(&mut reader, &pending).await {
            Ok(()) => {}
            Err(error) => break error.to_string(),
        }
    };
    end(&pending, &why);
}

async fn read_answer(reader: &mut BufReader<OwnedReadHalf>, pending: &Mutex<Pending>) -> io::Result<()> {
    if reader.read_u32().await? != SIMPLE_REPLY_MAGIC {
        return Err(protocol("a reply does not begin with its magic"));
    }
    let (error, cookie) = (reader.read_u32().await?, reader.read_u64().await?);
    let waiting = lock(pending).waiting.remove(&cookie);
    let waiting = waiting.ok_or_else(|| protocol("a reply to nothing"))?;
    let answer = if error == 0 {
        let mut payload = vec![0; waiting.payload];
        reader.read_exact(&mut payload).await?;
        Ok(Bytes::from(payload))
    } else {
        Err(io::Error::from_raw_os_error(error as i32))
    };
    // Whoever gave up waiting does not mind.
    let _ = waiting.answer.send(answer);
    Ok(())
}
