//! The network seam: frames between shards, each addressed by the store that it serves.
//!
//! A link between two shards and a lane is an ordered stream. It may break at any time: then frames that were queued
//! or under way are lost, both sides are told ([`FrameHandler::on_disconnect`]), and the next send dials again. While
//! it lasts, frames arrive whole, unchanged, once and in order. Silence is not an error: a partition may swallow
//! everything without a word, so whoever waits for an answer sets a deadline.

use std::rc::Rc;

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;
use holdfast_types::StoreId;

/// Which stream of a pair of shards. Small urgent frames (heartbeats, votes, lease renewals, answers to them) never
/// wait behind bulk data.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Lane {
    /// Heartbeats, votes, renewals, admin.
    Control,
    /// Appends, reads, writes, rebuild.
    Bulk,
}

/// A message: a small head, and a payload in parts that is sent without being copied together.
#[derive(Clone, Debug, Default)]
pub struct Frame {
    /// At most `limits::FRAME_HEAD_BYTES_MAX`.
    pub head: Bytes,
    /// Head and body together at most `limits::FRAME_BYTES_MAX`. Arrives as at most one part.
    pub body: Vec<Bytes>,
}

impl Frame {
    /// A frame without payload.
    pub fn small(head: Bytes) -> Self {
        Self { head, body: Vec::new() }
    }
    /// Bytes of the payload.
    pub fn body_bytes(&self) -> usize {
        self.body.iter().map(Bytes::len).sum()
    }
    /// Bytes of head and payload.
    pub fn bytes(&self) -> usize {
        self.head.len() + self.body_bytes()
    }
    /// The payload as one slice; copies only if it has several parts.
    pub fn into_body(mut self) -> Bytes {
        match self.body.len() {
            0 => Bytes::new(),
            1 => self.body.remove(0),
            _ => self.body.concat().into(),
        }
    }
}

/// Why a frame was not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// Nobody knows an address for the store, or the last dial failed a moment ago.
    #[error("store {to} cannot be reached: {why}")]
    Unreachable {
        /// The addressee.
        to: StoreId,
        /// What is wrong.
        why: String,
    },
    /// The peer's queue is full; see [`Network::ready`].
    #[error("{queued} bytes are already queued for store {to}")]
    QueueFull {
        /// The addressee.
        to: StoreId,
        /// Bytes in its queue.
        queued: usize,
    },
    /// The frame is beyond a bound. A fault of the caller.
    #[error("a frame of {bytes} bytes is beyond the bound")]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
}

/// A shard's way to the others.
pub trait Network {
    /// The store that this shard serves.
    fn local(&self) -> StoreId;
    /// Queues a frame, dialling if there is no link. Never blocks. A frame to the shard itself is delivered to its
    /// own handler, later.
    fn send(&self, to: StoreId, lane: Lane, frame: Frame) -> Result<(), SendError>;
    /// Ends when a frame may be queued for `to` (at once if the link is down: then `send` says why).
    fn ready(&self, to: StoreId, lane: Lane) -> LocalBoxFuture<'static, ()>;
    /// Sets who gets incoming frames; called once, before anything arrives.
    fn set_handler(&self, handler: Rc<dyn FrameHandler>);
}

/// Gets what arrives. Called on the shard's thread; must not block.
pub trait FrameHandler {
    /// A frame from another shard (or itself).
    fn on_frame(&self, from: StoreId, lane: Lane, frame: Frame);
    /// A link broke: answers that were expected over it will not come.
    fn on_disconnect(&self, peer: StoreId, lane: Lane);
}
