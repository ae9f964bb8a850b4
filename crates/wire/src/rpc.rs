//! Calls between shards: a request and its answer over the frames of a [`Network`].
//!
//! Requests of one (peer, lane) reach their handlers in the order in which they were started. Every call has a
//! deadline, because the network may swallow without a word; calls in flight are bounded per peer.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use holdfast_env::net::{Frame, FrameHandler, Lane, Network, SendError};
use holdfast_env::{Instant, Sleep};
use holdfast_types::{DecodeError, Reader, StoreId, Writer, limits};
use tokio::sync::oneshot;

/// Version of the call layer's head.
const VERSION: u8 = 1;
const REQUEST: u8 = 1;
const RESPONSE: u8 = 2;
const REFUSAL: u8 = 3;
/// Bytes of the call layer's head in front of the caller's.
const HEAD_BYTES: usize = 11;
/// Calls in flight to one peer.
const PENDING_MAX: usize = 8192;

/// Which service of a shard is called.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Service(pub u8);

/// Whether a frame asks or answers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CallKind {
    /// It asks.
    Request,
    /// It answers.
    Answer,
    /// It says why there is no answer.
    Refusal,
}

/// The call layer's head of a frame, for whoever looks at frames on their way.
#[derive(Clone, Copy, Debug)]
pub struct CallHead<'f> {
    /// Whether it asks or answers.
    pub kind: CallKind,
    /// The service.
    pub service: Service,
    /// Names the call among those of its caller.
    pub id: u64,
    /// The service's own head.
    pub rest: &'f [u8],
}

impl<'f> CallHead<'f> {
    /// The call layer's part of a frame's head; `None` if it is none.
    pub fn read(head: &'f [u8]) -> Option<Self> {
        let mut input = Reader::new(head);
        if input.u8().ok()? != VERSION {
            return None;
        }
        let kind = match input.u8().ok()? {
            REQUEST => CallKind::Request,
            RESPONSE => CallKind::Answer,
            REFUSAL => CallKind::Refusal,
            _ => return None,
        };
        let (service, id) = (Service(input.u8().ok()?), input.u64().ok()?);
        Some(Self { kind, service, id, rest: &head[HEAD_BYTES..] })
    }
}

/// Why a call has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// It did not leave.
    #[error(transparent)]
    Send(#[from] SendError),
    /// The link broke; whether the request arrived is unknown.
    #[error("the link broke before the answer came")]
    Disconnected,
    /// No answer in time; whether the request arrived is unknown.
    #[error("no answer in time")]
    TimedOut,
    /// The peer refuses.
    #[error("the peer refuses: {0}")]
    Refused(String),
    /// The answer is not understood.
    #[error("the answer is not understood: {0}")]
    Malformed(String),
    /// Too many calls to the peer are in flight.
    #[error("{0} calls to the peer are in flight already")]
    Busy(usize),
}

/// Answers requests. Called on the shard's thread, in order of arrival; must not block.
pub trait Handler {
    /// A request arrived.
    fn handle(&self, from: StoreId, lane: Lane, request: Frame, responder: Responder);
    /// A link to a peer broke.
    fn peer_lost(&self, _peer: StoreId, _lane: Lane) {}
}

type Answer = Result<Frame, CallError>;

struct Waiting {
    to: StoreId,
    lane: Lane,
    answer: oneshot::Sender<Answer>,
}

struct Inner {
    network: Rc<dyn Network>,
    next: Cell<u64>,
    waiting: RefCell<BTreeMap<u64, Waiting>>,
    per_peer: RefCell<BTreeMap<StoreId, usize>>,
    services: RefCell<BTreeMap<u8, Rc<dyn Handler>>>,
    malformed: Cell<u64>,
}

/// A shard's calls. Cheap to clone.
#[derive(Clone)]
pub struct Rpc(Rc<Inner>);

impl Rpc {
    /// Calls over `network`; becomes its handler.
    pub fn new(network: Rc<dyn Network>) -> Self {
        let inner = Rc::new(Inner {
            network: network.clone(),
            // An answer to a call of the process before this one, under the same number, would be taken for another's.
            next: Cell::new(holdfast_env::random_u64() >> 1),
            waiting: RefCell::default(),
            per_peer: RefCell::default(),
            services: RefCell::default(),
            malformed: Cell::new(0),
        });
        network.set_handler(Rc::new(Incoming(Rc::downgrade(&inner))));
        Self(inner)
    }

    /// The store that this shard serves.
    pub fn local(&self) -> StoreId {
        self.0.network.local()
    }

    /// Lets `handler` answer a service's requests.
    pub fn serve(&self, service: Service, handler: Rc<dyn Handler>) {
        self.0.services.borrow_mut().insert(service.0, handler);
    }

    /// Frames that made no sense.
    pub fn malformed(&self) -> u64 {
        self.0.malformed.get()
    }

    /// Queues the request now; the future gives the answer. Dropping it gives the call up.
    pub fn start(
        &self,
        to: StoreId,
        lane: Lane,
        service: Service,
        request: Frame,
        deadline: Duration,
    ) -> Pending {
        let (answer, receiver) = oneshot::channel();
        let id = self.0.next.get();
        self.0.next.set(id + 1);
        let pending = |error| Pending {
            inner: Weak::new(),
            id,
            answer: receiver_of(Err(error)),
            deadline: holdfast_env::sleep(Duration::from_secs(1)),
        };
        let busy = self.0.per_peer.borrow().get(&to).copied().unwrap_or(0);
        if busy >= PENDING_MAX {
            return pending(CallError::Busy(busy));
        }
        if request.head.len() + HEAD_BYTES > limits::FRAME_HEAD_BYTES_MAX {
            return pending(SendError::TooLarge { bytes: request.bytes() }.into());
        }
        *self.0.per_peer.borrow_mut().entry(to).or_default() += 1;
        self.0.waiting.borrow_mut().insert(id, Waiting { to, lane, answer });
        let frame = Frame { head: with_head(REQUEST, service, id, &request.head), body: request.body };
        if let Err(error) = self.0.network.send(to, lane, frame) {
            self.0.forget(id);
            return pending(error.into());
        }
        let inner = Rc::downgrade(&self.0);
        Pending { inner, id, answer: receiver, deadline: holdfast_env::sleep(deadline) }
    }

    /// Calls, waiting for room in the peer's queue first if it is full; all within the deadline.
    pub async fn call(
        &self,
        to: StoreId,
        lane: Lane,
        service: Service,
        request: Frame,
        deadline: Duration,
    ) -> Result<Frame, CallError> {
        let until = Instant::now() + deadline;
        loop {
            let left = until.since(Instant::now());
            match self.start(to, lane, service, request.clone(), left).await {
                Err(CallError::Send(SendError::QueueFull { .. })) => {
                    let ready = self.0.network.ready(to, lane);
                    if holdfast_env::timeout(left, ready).await.is_err() {
                        return Err(CallError::TimedOut);
                    }
                }
                answer => return answer,
            }
        }
    }
}

fn receiver_of(answer: Answer) -> oneshot::Receiver<Answer> {
    let (sender, receiver) = oneshot::channel();
    let sent = sender.send(answer);
    debug_assert!(sent.is_ok(), "the receiver is held");
    receiver
}

fn with_head(kind: u8, service: Service, id: u64, head: &[u8]) -> Bytes {
    let mut out = Writer::with_capacity(HEAD_BYTES + head.len());
    out.u8(VERSION);
    out.u8(kind);
    out.u8(service.0);
    out.u64(id);
    out.raw(head);
    out.finish()
}

impl Inner {
    fn forget(&self, id: u64) -> Option<oneshot::Sender<Answer>> {
        let waiting = self.waiting.borrow_mut().remove(&id)?;
        let mut per_peer = self.per_peer.borrow_mut();
        if let Some(count) = per_peer.get_mut(&waiting.to) {
            *count -= 1;
            if *count == 0 {
                per_peer.remove(&waiting.to);
            }
        }
        Some(waiting.answer)
    }

    fn settle(&self, id: u64, answer: Answer) {
        if let Some(waiting) = self.forget(id) {
            // Nobody waits any more: the caller has given up meanwhile.
            let _ = waiting.send(answer);
        }
    }

    fn on_frame(self: &Rc<Self>, from: StoreId, lane: Lane, frame: Frame) -> Result<(), DecodeError> {
        let mut input = Reader::new(&frame.head);
        let version = input.u8()?;
        if version != VERSION {
            return Err(DecodeError::Unknown { what: "call version", value: version.into() });
        }
        let (kind, service, id) = (input.u8()?, input.u8()?, input.u64()?);
        let head = frame.head.slice(HEAD_BYTES..);
        match kind {
            REQUEST => {
                let responder =
                    Responder { inner: Some(self.clone()), to: from, lane, service: Service(service), id };
                let handler = self.services.borrow().get(&service).cloned();
                match handler {
                    Some(handler) => handler.handle(from, lane, Frame { head, body: frame.body }, responder),
                    None => responder.refuse(format!("service {service} is not served here")),
                }
            }
            RESPONSE => self.settle(id, Ok(Frame { head, body: frame.body })),
            REFUSAL => self.settle(id, Err(CallError::Refused(String::from_utf8_lossy(&head).into_owned()))),
            other => return Err(DecodeError::Unknown { what: "call kind", value: other.into() }),
        }
        Ok(())
    }
}

struct Incoming(Weak<Inner>);

impl FrameHandler for Incoming {
    fn on_frame(&self, from: StoreId, lane: Lane, frame: Frame) {
        let Some(inner) = self.0.upgrade() else { return };
        if let Err(error) = inner.on_frame(from, lane, frame) {
            inner.malformed.set(inner.malformed.get() + 1);
            tracing::warn!(%from, %error, "a frame makes no sense and is dropped");
        }
    }

    fn on_disconnect(&self, peer: StoreId, lane: Lane) {
        let Some(inner) = self.0.upgrade() else { return };
        let lost: Vec<u64> = {
            let waiting = inner.waiting.borrow();
            waiting.iter().filter(|(_, w)| w.to == peer && w.lane == lane).map(|(id, _)| *id).collect()
        };
        for id in lost {
            inner.settle(id, Err(CallError::Disconnected));
        }
        let handlers: Vec<_> = inner.services.borrow().values().cloned().collect();
        for handler in handlers {
            handler.peer_lost(peer, lane);
        }
    }
}

/// An answer that is on its way.
pub struct Pending {
    inner: Weak<Inner>,
    id: u64,
    answer: oneshot::Receiver<Answer>,
    deadline: Sleep,
}

impl Future for Pending {
    type Output = Answer;
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Answer> {
        if let Poll::Ready(answer) = Pin::new(&mut self.answer).poll(context) {
            return Poll::Ready(answer.unwrap_or(Err(CallError::Disconnected)));
        }
        Pin::new(&mut self.deadline).poll(context).map(|()| Err(CallError::TimedOut))
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if let Some(inner) = self.inner.upgrade() {
            drop(inner.forget(self.id));
        }
    }
}

/// Answers one request. Dropped without an answer it refuses, so that no caller waits for nothing.
pub struct Responder {
    inner: Option<Rc<Inner>>,
    to: StoreId,
    lane: Lane,
    service: Service,
    id: u64,
}

impl Responder {
    /// The lane on which the request came.
    pub fn lane(&self) -> Lane {
        self.lane
    }

    /// Sends the answer.
    pub fn reply(mut self, response: Frame) {
        self.send(RESPONSE, &response.head, response.body);
    }

    /// Says why there is no answer.
    pub fn refuse(mut self, why: impl Into<String>) {
        let why = why.into();
        self.send(REFUSAL, &why.as_bytes()[..why.len().min(limits::TEXT_LENGTH_MAX)], Vec::new());
    }

    fn send(&mut self, kind: u8, head: &[u8], body: Vec<Bytes>) {
        let Some(inner) = self.inner.take() else { return };
        let frame = Frame { head: with_head(kind, self.service, self.id, head), body };
        let (to, lane) = (self.to, self.lane);
        if let Err(SendError::QueueFull { .. }) = inner.network.send(to, lane, frame.clone()) {
            // The caller has a deadline; the answer waits for room meanwhile.
            holdfast_env::spawn("rpc-answer", async move {
                loop {
                    inner.network.ready(to, lane).await;
                    match inner.network.send(to, lane, frame.clone()) {
                        // Others that waited, too, were first.
                        Err(SendError::QueueFull { .. }) => {}
                        Err(error) => {
                            tracing::debug!(%to, %error, "an answer is lost; its caller has a deadline");
                            return;
                        }
                        Ok(()) => return,
                    }
                }
            });
        }
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        self.send(REFUSAL, b"the request was dropped", Vec::new());
    }
}
