//! A simulated network: per pair of nodes and lane an ordered stream, as `holdfast_env::net` describes it and as the
//! real one behaves.
//!
//! A stream is dialled by its first frame. Frames arrive whole, once and in order, after a delay; a link between two
//! nodes may be cut in one direction or both, and then either swallows frames or holds them back until it is healed
//! (what TCP does, for a while). A stream breaks when it is told to, when its receiver is gone, when it was held back
//! for too long or cannot be dialled: then its queue is lost, both sides are told, and sends are refused for a moment.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;

use futures_util::future::LocalBoxFuture;
use holdfast_env::Instant;
use holdfast_env::net::{Frame, FrameHandler, Lane, Network, SendError};
use holdfast_types::{StoreId, limits};
use tokio::sync::Notify;

use crate::executor::{Executor, MICROSECOND, MILLISECOND, Owner, SECOND, WORLD};
use crate::frames::{self, Kind};
use crate::hooks::{CrashPoint, Hooks};
use crate::keeper::Keeper;
use crate::random::Random;
use crate::trace::Trace;

/// How long a dial may take.
const DIAL_DEADLINE: u64 = 3 * SECOND;
/// Sends are refused for so long after a stream broke.
const DIAL_PAUSE: u64 = 100 * MILLISECOND;
/// A stream that was held back for so long breaks.
const HELD_MAX: u64 = 10 * SECOND;
/// How often a held stream looks again.
const HELD_LOOK: u64 = 5 * MILLISECOND;

/// What a cut does to frames.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Cut {
    /// They vanish.
    Swallow,
    /// They wait, and arrive when the cut is healed.
    Hold,
}

/// How long frames take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Delays {
    /// Mean, in nanoseconds.
    pub(crate) mean: u64,
    /// One frame in so many takes up to `spike` more; 0 is none.
    pub(crate) spike_one_in: u64,
    pub(crate) spike: u64,
    /// Nanoseconds per byte.
    pub(crate) per_byte: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Way {
    from: u64,
    to: u64,
    lane: Lane,
}

struct Sent {
    due: u64,
    frame: Frame,
}

#[derive(Default)]
struct Stream {
    queue: RefCell<VecDeque<Sent>>,
    bytes: Cell<usize>,
    last_due: Cell<u64>,
    running: Cell<bool>,
    dialled: Cell<bool>,
    refused_until: Cell<u64>,
    /// Counts up whenever it breaks.
    life: Cell<u64>,
    changed: Notify,
}

enum Arrival {
    Frame(u64, Lane, Frame),
    Lost(u64, Lane),
}

/// Where frames for one boot of a node arrive.
struct Port {
    owner: Owner,
    handler: RefCell<Option<Rc<dyn FrameHandler>>>,
    inbox: RefCell<VecDeque<Arrival>>,
    arrived: Notify,
    paused: Cell<bool>,
}

/// The network.
pub(crate) struct Switch {
    executor: Rc<Executor>,
    trace: Rc<Trace>,
    hooks: Rc<Hooks>,
    keeper: Rc<Keeper>,
    random: RefCell<Random>,
    delays: Cell<Delays>,
    streams: RefCell<BTreeMap<Way, Rc<Stream>>>,
    ports: RefCell<BTreeMap<u64, Rc<Port>>>,
    cuts: RefCell<BTreeMap<(u64, u64), Cut>>,
    /// Streams that do not move, while the others of their nodes do.
    held: RefCell<BTreeSet<Way>>,
    /// Ways on which nothing goes on once the next to go is a call of a rebuild.
    held_pulls: RefCell<BTreeSet<(u64, u64)>>,
    /// Ways on which what is sent from now on vanishes, while what is on its way arrives.
    vanishing: RefCell<BTreeSet<(u64, u64)>>,
    /// Nodes that owe their group silence, and until when by their own clocks.
    silent: RefCell<BTreeMap<u64, Instant>>,
    /// Machines without power: what is sent to them vanishes.
    dark: RefCell<BTreeSet<u64>>,
    /// Requests whose answers are of interest, by who asked whom.
    asked: RefCell<BTreeMap<(u64, u64, u64), Kind>>,
    /// Bytes of frames that nodes have sent to others.
    sent_bytes: Cell<u64>,
}

impl Switch {
    pub(crate) fn new(
        executor: Rc<Executor>,
        trace: Rc<Trace>,
        hooks: Rc<Hooks>,
        keeper: Rc<Keeper>,
        random: Random,
        delays: Delays,
    ) -> Rc<Self> {
        Rc::new(Self {
            executor,
            trace,
            hooks,
            keeper,
            random: RefCell::new(random),
            delays: Cell::new(delays),
            streams: RefCell::default(),
            ports: RefCell::default(),
            cuts: RefCell::default(),
            held: RefCell::default(),
            held_pulls: RefCell::default(),
            vanishing: RefCell::default(),
            silent: RefCell::default(),
            dark: RefCell::default(),
            asked: RefCell::default(),
            sent_bytes: Cell::new(0),
        })
    }

    /// Connects one boot of a node.
    pub(crate) fn attach(self: &Rc<Self>, node: u64, owner: Owner) -> Rc<dyn Network> {
        if self.dark.borrow_mut().remove(&node) {
            // The machine is back and knows nothing of connections from before.
            let ways: Vec<Way> = self.streams.borrow().keys().filter(|way| way.to == node).copied().collect();
            for way in ways {
                self.break_stream(way, "the machine has started again");
            }
        }
        let port = Rc::new(Port {
            owner,
            handler: RefCell::default(),
            inbox: RefCell::default(),
            arrived: Notify::new(),
            paused: Cell::new(false),
        });
        self.ports.borrow_mut().insert(node, port.clone());
        self.executor.spawn_for(owner, Box::pin(receive(port.clone())));
        Rc::new(Attached { switch: self.clone(), node, port })
    }

    /// The process of a node is gone. With `silent`, nobody is told: the machine is gone, too.
    pub(crate) fn detach(self: &Rc<Self>, node: u64, silent: bool) {
        let port = self.ports.borrow_mut().remove(&node);
        if let Some(port) = port {
            self.executor.within(port.owner, || drop(port.handler.borrow_mut().take()));
        }
        if silent {
            self.dark.borrow_mut().insert(node);
        }
        let ways: Vec<Way> =
            self.streams.borrow().keys().filter(|way| way.from == node || way.to == node).copied().collect();
        for way in ways {
            let stream = self.stream(way);
            if way.from == node {
                // What has left may still arrive; the peer hears of the end after it.
                let kept = self.random.borrow_mut().below(stream.queue.borrow().len() as u64 + 1) as usize;
                stream.queue.borrow_mut().truncate(kept);
                self.end_after_queue(way, silent);
            } else if !silent {
                self.break_stream(way, "the peer's process has ended");
            }
        }
    }

    /// The sender of a stream is gone: the receiver is told once what has left was delivered.
    fn end_after_queue(self: &Rc<Self>, way: Way, silent: bool) {
        let (switch, stream) = (self.clone(), self.stream(way));
        let life = stream.life.get();
        let at = stream.last_due.get().max(self.executor.time()) + MILLISECOND;
        let sleep = self.executor.sleep_until_time(if silent { at + HELD_MAX } else { at });
        self.executor.spawn_for(
            WORLD,
            Box::pin(async move {
                sleep.await;
                if stream.life.get() == life {
                    switch.break_stream(way, "the peer is gone");
                }
            }),
        );
    }

    pub(crate) fn set_paused(&self, node: u64, paused: bool) {
        if let Some(port) = self.ports.borrow().get(&node) {
            port.paused.set(paused);
        }
    }

    pub(crate) fn set_delays(&self, delays: Delays) {
        self.delays.set(delays);
    }
    /// Bytes of frames that nodes have sent to others so far, whether or not they arrived.
    pub(crate) fn sent_bytes(&self) -> u64 {
        self.sent_bytes.get()
    }
    pub(crate) fn delays(&self) -> Delays {
        self.delays.get()
    }

    /// Cuts the way from one node to another.
    pub(crate) fn cut(&self, from: u64, to: u64, cut: Cut) {
        self.trace.add(0, format_args!("CUT {from}->{to} {cut:?}"));
        self.cuts.borrow_mut().insert((from, to), cut);
    }

    pub(crate) fn heal(&self, from: u64, to: u64) {
        if self.cuts.borrow_mut().remove(&(from, to)).is_some() {
            self.trace.add(0, format_args!("HEAL {from}->{to}"));
        }
    }

    /// Holds what one node sends to another on a lane back, or lets it go.
    pub(crate) fn hold(&self, (from, to): (u64, u64), lane: Lane, hold: bool) {
        self.trace.add(0, format_args!("{lane:?} {from}->{to} {}", if hold { "HELD" } else { "GOES ON" }));
        let (way, mut held) = (Way { from, to, lane }, self.held.borrow_mut());
        if hold {
            held.insert(way)
        } else {
            held.remove(&way)
        };
    }

    /// Holds one node back that pulls from another, or lets it go on.
    pub(crate) fn hold_pulls(&self, way: (u64, u64), hold: bool) {
        self.trace.add(0, format_args!("PULLS {}->{} {}", way.0, way.1, if hold { "HELD" } else { "GO ON" }));
        let mut held = self.held_pulls.borrow_mut();
        if hold {
            held.insert(way)
        } else {
            held.remove(&way)
        };
    }

    /// Whether a node waits that pulls from another and is held back.
    pub(crate) fn pull_waits(&self, (from, to): (u64, u64)) -> bool {
        let way = Way { from, to, lane: Lane::Bulk };
        self.holds_pull(way, &self.stream(way))
    }

    fn holds_pull(&self, way: Way, stream: &Stream) -> bool {
        let is_held = self.held_pulls.borrow().contains(&(way.from, way.to));
        is_held && {
            let queue = stream.queue.borrow();
            queue.front().is_some_and(|sent| frames::look(&sent.frame.head).kind == Kind::Rebuild)
        }
    }

    /// What one node sends to another from now on vanishes; what is on its way arrives, or is held back as before.
    pub(crate) fn vanish(&self, way: (u64, u64)) {
        self.trace.add(0, format_args!("{}->{} VANISHES from now on", way.0, way.1));
        self.vanishing.borrow_mut().insert(way);
    }

    /// Answers on their way from one node to another on a lane.
    pub(crate) fn answers_on_their_way(&self, (from, to): (u64, u64), lane: Lane) -> usize {
        let stream = self.stream(Way { from, to, lane });
        let queue = stream.queue.borrow();
        queue.iter().filter(|sent| frames::look(&sent.frame.head).kind == Kind::Answer).count()
    }

    /// A node that has started again, with replicas from before, neither votes nor campaigns before a time of its
    /// own clock; `None`: its replica is a new one, which owes nothing.
    pub(crate) fn owes_silence(&self, node: u64, until: Option<Instant>) {
        let mut silent = self.silent.borrow_mut();
        match until {
            Some(until) => silent.insert(node, until),
            None => silent.remove(&node),
        };
    }

    /// INV-LEASE: what a node says of votes while it owes silence.
    fn breaks_silence(&self, node: u64, what: &str) {
        let Some(owner) = self.ports.borrow().get(&node).map(|port| port.owner) else { return };
        let now = self.executor.within(owner, Instant::now);
        let until = self.silent.borrow().get(&node).copied();
        if let Some(left) = until.filter(|until| now < *until).map(|until| until.since(now)) {
            self.trace.violation(format_args!(
                "INV-LEASE: n{node} {what}, and owes silence for {left:?} after its start"
            ));
        }
    }

    pub(crate) fn heal_all(&self) {
        self.trace.add(0, format_args!("HEAL all links"));
        self.held.borrow_mut().clear();
        self.held_pulls.borrow_mut().clear();
        self.vanishing.borrow_mut().clear();
        self.cuts.borrow_mut().clear();
    }

    /// Breaks every stream between two nodes.
    pub(crate) fn break_between(self: &Rc<Self>, one: u64, other: u64) {
        let between = |way: &&Way| [(one, other), (other, one)].contains(&(way.from, way.to));
        let ways: Vec<Way> = self.streams.borrow().keys().filter(between).copied().collect();
        for way in ways {
            self.break_stream(way, "a fault");
        }
    }

    fn stream(&self, way: Way) -> Rc<Stream> {
        self.streams.borrow_mut().entry(way).or_default().clone()
    }

    fn cut_of(&self, from: u64, to: u64) -> Option<Cut> {
        self.cuts.borrow().get(&(from, to)).copied()
    }

    fn is_dark(&self, node: u64) -> bool {
        self.dark.borrow().contains(&node)
    }

    fn break_stream(&self, way: Way, why: &str) {
        let stream = self.stream(way);
        let idle = !stream.dialled.get() && stream.queue.borrow().is_empty();
        if idle {
            return;
        }
        self.trace.add(way.to, format_args!("BROKEN {}->{} {:?}: {why}", way.from, way.to, way.lane));
        stream.life.set(stream.life.get() + 1);
        stream.queue.borrow_mut().clear();
        stream.bytes.set(0);
        stream.dialled.set(false);
        stream.running.set(false);
        stream.refused_until.set(self.executor.time() + DIAL_PAUSE);
        stream.changed.notify_waiters();
        self.arrive(way.from, Arrival::Lost(way.to, way.lane));
        self.arrive(way.to, Arrival::Lost(way.from, way.lane));
    }

    fn arrive(&self, at: u64, arrival: Arrival) -> bool {
        let ports = self.ports.borrow();
        let Some(port) = ports.get(&at) else { return false };
        port.inbox.borrow_mut().push_back(arrival);
        port.arrived.notify_one();
        true
    }

    fn send(self: &Rc<Self>, way: Way, frame: Frame) -> Result<(), SendError> {
        let (to, bytes) = (StoreId(way.to.into()), frame.bytes());
        if frame.head.len() > limits::FRAME_HEAD_BYTES_MAX || bytes > limits::FRAME_BYTES_MAX {
            return Err(SendError::TooLarge { bytes });
        }
        let frame = Frame { head: frame.head.clone(), body: one_part(frame) };
        self.keeper.note(&frame);
        if way.from == way.to {
            self.arrive(way.to, Arrival::Frame(way.from, way.lane, frame));
            return Ok(());
        }
        let stream = self.stream(way);
        if self.executor.time() < stream.refused_until.get() {
            return Err(SendError::Unreachable { to, why: "the last connection has just broken".into() });
        }
        if stream.bytes.get() + bytes > limits::PEER_QUEUE_BYTES_MAX {
            return Err(SendError::QueueFull { to, queued: stream.bytes.get() });
        }
        self.sent_bytes.set(self.sent_bytes.get() + bytes as u64);
        let due = self.due(&stream, bytes);
        self.note(way, &frame, due);
        if self.vanishing.borrow().contains(&(way.from, way.to)) {
            return Ok(());
        }
        stream.bytes.set(stream.bytes.get() + bytes);
        stream.queue.borrow_mut().push_back(Sent { due, frame });
        if !stream.running.replace(true) {
            let task = self.clone().carry(way, stream.clone(), stream.life.get());
            self.executor.spawn_for(WORLD, Box::pin(task));
        }
        Ok(())
    }

    fn due(&self, stream: &Stream, bytes: usize) -> u64 {
        let delays = self.delays.get();
        let mut random = self.random.borrow_mut();
        let mut takes = 20 * MICROSECOND + random.around(delays.mean) + delays.per_byte * bytes as u64;
        if delays.spike_one_in > 0 && random.below(delays.spike_one_in) == 0 {
            takes += random.around(delays.spike);
        }
        let due = (self.executor.time() + takes).max(stream.last_due.get());
        stream.last_due.set(due);
        due
    }

    /// Traces a frame, and crashes its sender right after it if that is armed.
    fn note(&self, way: Way, frame: &Frame, due: u64) {
        let told = frames::look(&frame.head);
        let crc = crc32fast::hash(&frame.head);
        self.trace.add(
            way.from,
            format_args!(
                "send ->{} {:?} {:?} #{} {}+{} {crc:08x} due {}",
                way.to,
                way.lane,
                told.kind,
                told.id,
                frame.head.len(),
                frame.body_bytes(),
                due / MICROSECOND
            ),
        );
        let mut asked = self.asked.borrow_mut();
        match told.kind {
            Kind::Vote | Kind::PreVote | Kind::Append => {
                asked.insert((way.from, way.to, told.id), told.kind);
                if told.kind != Kind::Append {
                    self.breaks_silence(way.from, "asks for votes");
                }
                if told.kind == Kind::Append {
                    self.hooks.reached(way.from, CrashPoint::AfterAppendSent);
                }
            }
            Kind::Answer => match asked.remove(&(way.to, way.from, told.id)) {
                Some(Kind::PreVote) => self.breaks_silence(way.from, "answers who asks for its vote"),
                Some(Kind::Vote) => {
                    self.breaks_silence(way.from, "answers who asks for its vote");
                    self.hooks.reached(way.from, CrashPoint::AfterVoteAnswer);
                }
                Some(Kind::Append) => {
                    self.hooks.reached(way.from, CrashPoint::AfterAppendAnswer);
                }
                _ => {}
            },
            _ => {}
        }
    }

    /// Carries what one life of a stream has queued, until the queue is empty or the stream breaks.
    async fn carry(self: Rc<Self>, way: Way, stream: Rc<Stream>, life: u64) {
        if !stream.dialled.get() && !self.dial(way, &stream, life).await {
            return;
        }
        loop {
            let Some(due) = stream.queue.borrow().front().map(|sent| sent.due) else {
                stream.running.set(false);
                return;
            };
            self.executor.sleep_until_time(due).await;
            if stream.life.get() != life || !self.wait_while_held(way, &stream, life).await {
                return;
            }
            let Some(sent) = stream.queue.borrow_mut().pop_front() else { continue };
            stream.bytes.set(stream.bytes.get().saturating_sub(sent.frame.bytes()));
            stream.changed.notify_waiters();
            if self.cut_of(way.from, way.to) == Some(Cut::Swallow) || self.is_dark(way.to) {
                self.trace.add(way.to, format_args!("swallowed from {} {:?}", way.from, way.lane));
                continue;
            }
            self.trace.add(way.to, format_args!("arrives from {} {:?}", way.from, way.lane));
            if !self.arrive(way.to, Arrival::Frame(way.from, way.lane, sent.frame)) {
                self.break_stream(way, "nobody is there");
                return;
            }
        }
    }

    async fn dial(&self, way: Way, stream: &Stream, life: u64) -> bool {
        let takes = 2 * self.delays.get().mean + 50 * MICROSECOND;
        let began = self.executor.time();
        self.executor.sleep_for(takes).await;
        let blocked = || {
            self.cut_of(way.from, way.to).is_some()
                || self.cut_of(way.to, way.from).is_some()
                || self.is_dark(way.to)
        };
        while stream.life.get() == life && blocked() && self.executor.time() < began + DIAL_DEADLINE {
            self.executor.sleep_for(HELD_LOOK).await;
        }
        if stream.life.get() != life {
            return false;
        }
        if blocked() || !self.ports.borrow().contains_key(&way.to) {
            stream.dialled.set(true); // so that the break is told
            self.break_stream(way, "it cannot be dialled");
            return false;
        }
        stream.dialled.set(true);
        true
    }

    /// Waits for the end of a cut that holds frames back, and while the receiver is paused; false if the stream broke.
    async fn wait_while_held(&self, way: Way, stream: &Stream, life: u64) -> bool {
        let began = self.executor.time();
        loop {
            let held = self.cut_of(way.from, way.to) == Some(Cut::Hold)
                || self.held.borrow().contains(&way)
                || self.holds_pull(way, stream);
            let paused = self.ports.borrow().get(&way.to).is_some_and(|port| port.paused.get());
            if !held && !paused {
                return true;
            }
            if held && self.executor.time() > began + HELD_MAX {
                self.break_stream(way, "it was silent for too long");
                return false;
            }
            self.executor.sleep_for(HELD_LOOK).await;
            if stream.life.get() != life {
                return false;
            }
        }
    }
}

fn one_part(frame: Frame) -> Vec<bytes::Bytes> {
    let body = frame.into_body();
    if body.is_empty() { Vec::new() } else { vec![body] }
}

async fn receive(port: Rc<Port>) {
    loop {
        let next = port.inbox.borrow_mut().pop_front();
        let Some(arrival) = next else {
            port.arrived.notified().await;
            continue;
        };
        let handler = port.handler.borrow().clone();
        let Some(handler) = handler else { continue };
        match arrival {
            Arrival::Frame(from, lane, frame) => handler.on_frame(StoreId(from.into()), lane, frame),
            Arrival::Lost(peer, lane) => handler.on_disconnect(StoreId(peer.into()), lane),
        }
        drop(handler);
        // Each frame is handled in a turn of its own, among the tasks of the node.
        holdfast_env::yield_now().await;
    }
}

/// One boot's way into the network.
struct Attached {
    switch: Rc<Switch>,
    node: u64,
    port: Rc<Port>,
}

impl Attached {
    fn way(&self, to: StoreId, lane: Lane) -> Way {
        Way { from: self.node, to: u64::try_from(to.0).unwrap_or(u64::MAX), lane }
    }
    /// A process that is gone sends nothing any more, not even while it is torn down.
    fn is_gone(&self) -> bool {
        !self.switch.executor.is_alive(self.port.owner)
    }
}

impl Network for Attached {
    fn local(&self) -> StoreId {
        StoreId(self.node.into())
    }
    fn send(&self, to: StoreId, lane: Lane, frame: Frame) -> Result<(), SendError> {
        if self.is_gone() {
            return Ok(());
        }
        self.switch.send(self.way(to, lane), frame)
    }
    fn ready(&self, to: StoreId, lane: Lane) -> LocalBoxFuture<'static, ()> {
        let stream = self.switch.stream(self.way(to, lane));
        Box::pin(async move {
            loop {
                let changed = stream.changed.notified();
                if !stream.running.get() || stream.bytes.get() < limits::PEER_QUEUE_BYTES_MAX / 2 {
                    return;
                }
                changed.await;
            }
        })
    }
    fn set_handler(&self, handler: Rc<dyn FrameHandler>) {
        *self.port.handler.borrow_mut() = Some(handler);
    }
}
