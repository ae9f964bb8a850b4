//! Requests of the kernel, answered on the shard's thread.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use fuser::{Errno, ReplyData, ReplyEmpty, ReplyLseek, ReplyWrite};
use tokio::sync::mpsc;

use super::budget::Permit;
use crate::device::{DeviceError, RunKind};
use crate::edge::Edge;

/// Requests taken from the queue in one turn.
const TURN_MAX: usize = 64;
/// How far one question for data or a hole looks, in bytes. Beyond it the answer is a permitted guess.
const SEEK_BYTES_MAX: u64 = 1 << 30;

/// What the kernel asks. Each carries its reply; one that is dropped unanswered is answered EIO.
pub(super) enum Ask {
    Read { offset: u64, length: u64, reply: ReplyData },
    Write { offset: u64, data: Bytes, reply: ReplyWrite },
    Trim { offset: u64, length: u64, reply: ReplyEmpty },
    Zero { offset: u64, length: u64, reply: ReplyEmpty },
    Sync { reply: ReplyEmpty },
    SeekData { offset: u64, reply: ReplyLseek },
    SeekHole { offset: u64, reply: ReplyLseek },
}

/// A request and the room that it takes.
pub(super) struct Request {
    pub(super) ask: Ask,
    pub(super) _permit: Permit,
}

fn errno(error: &DeviceError, writing: bool) -> Errno {
    tracing::debug!(%error, "a request of the kernel failed");
    match error {
        DeviceError::Ended(_) | DeviceError::Failed(_) => Errno::EIO,
        DeviceError::ReadOnly => Errno::EROFS,
        DeviceError::OutOfRange if writing => Errno::ENOSPC,
        DeviceError::OutOfRange => Errno::EINVAL,
    }
}

/// Serves until the file system is gone. Bounded by the permits: a request exists only with one. `size` is what the
/// file shows.
pub(super) async fn serve(edge: Rc<Edge>, mut inbox: mpsc::UnboundedReceiver<Request>, size: Arc<AtomicU64>) {
    let mut turn = Vec::with_capacity(TURN_MAX);
    while inbox.recv_many(&mut turn, TURN_MAX).await > 0 {
        size.store(edge.size_bytes(), Ordering::Relaxed);
        for request in turn.drain(..) {
            let edge = edge.clone();
            holdfast_env::spawn("fuse-request", async move {
                let Request { ask, _permit } = request;
                answer(&edge, ask).await;
            });
        }
    }
}

async fn answer(edge: &Edge, ask: Ask) {
    match ask {
        Ask::Read { offset, length, reply } => {
            // As of any file, what is beyond the end is not there.
            let length = length.min(edge.size_bytes().saturating_sub(offset));
            if length == 0 {
                return reply.data(&[]);
            }
            match edge.read(offset, length).await {
                Ok(data) => reply.data(&data),
                Err(error) => reply.error(errno(&error, false)),
            }
        }
        Ask::Write { offset, data, reply } => {
            let length = data.len() as u32;
            match edge.write(offset, data).await {
                Ok(()) => reply.written(length),
                Err(error) => reply.error(errno(&error, true)),
            }
        }
        Ask::Trim { offset, length, reply } => {
            // A hole beyond the end is one already.
            let length = length.min(edge.size_bytes().saturating_sub(offset));
            done(edge.trim(offset, length).await, reply);
        }
        Ask::Zero { offset, length, reply } => done(edge.zero(offset, length).await, reply),
        // Nothing acknowledged is volatile.
        Ask::Sync { reply } => {
            done(edge.device().ended().map_or(Ok(()), |why| Err(DeviceError::Ended(why))), reply);
        }
        Ask::SeekData { offset, reply } => sought(seek(edge, offset, false).await, reply),
        Ask::SeekHole { offset, reply } => sought(seek(edge, offset, true).await, reply),
    }
}

fn done(result: Result<(), DeviceError>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(&error, true)),
    }
}

fn sought(found: Result<Option<u64>, DeviceError>, reply: ReplyLseek) {
    match found {
        Ok(Some(at)) => reply.offset(at as i64),
        Ok(None) => reply.error(Errno::ENXIO),
        Err(error) => reply.error(errno(&error, false)),
    }
}

/// The first data or the first hole at or after `offset`; `None` if there is none before the end. After a while of
/// looking, zeros may be called data and data may be said to reach the end: both are permitted, the contrary of
/// neither is.
async fn seek(edge: &Edge, offset: u64, hole: bool) -> Result<Option<u64>, DeviceError> {
    let size = edge.size_bytes();
    if offset >= size {
        return Ok(None);
    }
    let mut at = offset;
    while at < size {
        if at - offset >= SEEK_BYTES_MAX {
            return Ok(Some(if hole { size } else { at }));
        }
        for (bytes, kind) in edge.status(at, size - at).await? {
            if (kind != RunKind::Data) == hole {
                return Ok(Some(at));
            }
            at += bytes;
        }
    }
    // The end of a file counts as a hole.
    Ok(hole.then_some(size))
}
