//! The real network of a shard: one listening port, and per peer and lane one TCP connection in each direction, dialled
//! by the side that sends on it.
//!
//! A connection carries frames one way only, so two shards never dial into each other, and a one-way cut is what it is
//! called. Whoever waits for an answer has a deadline; a broken connection in either direction tells both sides.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::rc::{Rc, Weak};
use std::time::Duration;

use futures_util::future::LocalBoxFuture;
use holdfast_env::net::{Frame, FrameHandler, Lane, Network, SendError};
use holdfast_types::{NodeName, StoreId};
use tokio::io::BufReader;
use tokio::net::{TcpListener, TcpStream};

use crate::frame::{self, FrameError, Hello};
use crate::link::Link;
use crate::tls::Tls;

/// How long an incoming connection may take to say who it is.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(5);
/// Incoming connections at once; more are closed unheard.
const CONNECTIONS_MAX: usize = 4096;

/// Bytes read from a connection at once.
const READ_BUFFER: usize = 64 << 10;

/// What every connection between peers is set to.
pub(crate) fn tune(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    // A model of a network's bandwidth and delay (BBR, where that is the default) only slows what never leaves the
    // machine. Where it cannot be set, the default serves.
    if stream.peer_addr()?.ip().is_loopback()
        && let Err(error) = rustix::net::sockopt::set_tcp_congestion(stream, LOOPBACK_CONGESTION_CONTROL)
    {
        tracing::debug!(%error, "the congestion control of a connection on loopback stays as it is");
    }
    Ok(())
}

/// The congestion control that every kernel has.
const LOOPBACK_CONGESTION_CONTROL: &str = "reno";

/// Where a store listens, and whose it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The node that its certificate must name.
    pub node: NodeName,
    /// `host:port`.
    pub address: String,
}

/// How long somebody may take to show who answers at an address.
const PROBE_DEADLINE: Duration = Duration::from_secs(1);

/// Whether somebody at an address shows a certificate of this node of this cluster.
pub async fn answers_as(tls: &Tls, node: &NodeName, address: &str) -> bool {
    let shown = async {
        let stream = TcpStream::connect(address).await.ok()?;
        let stream = tls.connector.connect(Tls::server_name(), stream).await.ok()?;
        tls.node_of(stream.get_ref().1.peer_certificates()).ok()
    };
    let shown = holdfast_env::timeout(PROBE_DEADLINE, shown).await;
    shown.ok().flatten().is_some_and(|name| name == node.to_string())
}

/// What passed a shard's network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Frames written.
    pub frames_sent: u64,
    /// Their bytes.
    pub bytes_sent: u64,
    /// Frames read.
    pub frames_received: u64,
    /// Their bytes.
    pub bytes_received: u64,
    /// Connections closed because the peer sent what is no frame.
    pub malformed: u64,
    /// Connections refused: no or a foreign certificate, a wrong hello, too many.
    pub refused: u64,
}

impl Counters {
    pub(crate) fn sent(&mut self, bytes: usize) {
        self.frames_sent += 1;
        self.bytes_sent += bytes as u64;
    }
}

/// Faults put between this shard and others, for tests and the development cluster.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// Frames to these are dropped without a word.
    pub block_send: BTreeSet<StoreId>,
    /// Frames from these are dropped without a word.
    pub block_receive: BTreeSet<StoreId>,
    /// Frames to these leave so much later.
    pub delay: BTreeMap<StoreId, Duration>,
}

pub(crate) struct Shared {
    pub(crate) local: StoreId,
    pub(crate) tls: Tls,
    pub(crate) counters: RefCell<Counters>,
    peers: RefCell<BTreeMap<StoreId, Peer>>,
    handler: RefCell<Option<Rc<dyn FrameHandler>>>,
    faults: RefCell<Faults>,
    incoming: std::cell::Cell<usize>,
}

impl Shared {
    pub(crate) fn peer(&self, store: StoreId) -> Option<Peer> {
        self.peers.borrow().get(&store).cloned()
    }

    pub(crate) fn lost(&self, peer: StoreId, lane: Lane) {
        let handler = self.handler.borrow().clone();
        if let Some(handler) = handler {
            handler.on_disconnect(peer, lane);
        }
    }

    fn deliver(&self, from: StoreId, lane: Lane, frame: Frame) {
        {
            let mut counters = self.counters.borrow_mut();
            counters.frames_received += 1;
            counters.bytes_received += frame.bytes() as u64;
        }
        if self.faults.borrow().block_receive.contains(&from) {
            return;
        }
        let handler = self.handler.borrow().clone();
        if let Some(handler) = handler {
            handler.on_frame(from, lane, frame);
        }
    }

    async fn greet(
        self: &Rc<Self>,
        stream: TcpStream,
    ) -> Result<(Hello, tokio_rustls::server::TlsStream<BufReader<TcpStream>>), String> {
        tune(&stream).map_err(|error| error.to_string())?;
        // TLS takes 4 KiB at a time; below it whole runs of frames come with one call.
        let stream = BufReader::with_capacity(READ_BUFFER, stream);
        let mut stream = self.tls.acceptor.accept(stream).await.map_err(|error| error.to_string())?;
        let node =
            self.tls.node_of(stream.get_ref().1.peer_certificates()).map_err(|error| error.to_string())?;
        let first = frame::read(&mut stream).await.map_err(|error| error.to_string())?;
        let hello = Hello::decode(&first).map_err(|error| error.to_string())?;
        if hello.to != self.local {
            return Err(format!("node {node} looks for store {}, this is {}", hello.to, self.local));
        }
        match self.peer(hello.from) {
            Some(peer) if peer.node.to_string() != node => {
                Err(format!("node {node} speaks for store {}, which is of node {}", hello.from, peer.node))
            }
            Some(_) => Ok((hello, stream)),
            None => Err(format!("node {node} speaks for store {}, which nobody has named here", hello.from)),
        }
    }

    async fn receive(self: Rc<Self>, stream: TcpStream, from: SocketAddr) {
        let greeted = holdfast_env::timeout(HANDSHAKE_DEADLINE, self.greet(stream)).await;
        let greeted = greeted.unwrap_or_else(|_| Err("it did not say in time who it is".to_owned()));
        let (hello, mut stream) = match greeted {
            Ok(greeted) => greeted,
            Err(why) => {
                self.counters.borrow_mut().refused += 1;
                tracing::warn!(%from, %why, "an incoming connection was refused");
                return;
            }
        };
        let why = loop {
            match frame::read(&mut stream).await {
                Ok(frame) => self.deliver(hello.from, hello.lane, frame),
                Err(error) => break error,
            }
        };
        if let FrameError::Malformed(why) = why {
            self.counters.borrow_mut().malformed += 1;
            tracing::warn!(%from, %why, "a peer was disconnected");
        }
        self.lost(hello.from, hello.lane);
    }

    async fn listen(shared: Weak<Self>, listener: TcpListener) {
        loop {
            let accepted = listener.accept().await;
            let Some(shared) = shared.upgrade() else { return };
            let (stream, from) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::error!(%error, "an incoming connection could not be taken");
                    // Out of descriptors, most likely: give others the time to close some.
                    holdfast_env::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            if shared.incoming.get() >= CONNECTIONS_MAX {
                shared.counters.borrow_mut().refused += 1;
                continue;
            }
            shared.incoming.set(shared.incoming.get() + 1);
            holdfast_env::spawn("peer-incoming", async move {
                shared.clone().receive(stream, from).await;
                shared.incoming.set(shared.incoming.get() - 1);
            });
        }
    }
}

/// A shard's network over TCP.
pub struct TcpNetwork {
    shared: Rc<Shared>,
    links: RefCell<BTreeMap<(StoreId, Lane), Rc<Link>>>,
    address: SocketAddr,
}

impl TcpNetwork {
    /// Listens for peers of the store `local`. Port 0 takes a free one: see [`Self::address`].
    pub async fn listen(local: StoreId, address: &str, tls: Tls) -> std::io::Result<Rc<Self>> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let shared = Rc::new(Shared {
            local,
            tls,
            counters: RefCell::default(),
            peers: RefCell::default(),
            handler: RefCell::default(),
            faults: RefCell::default(),
            incoming: std::cell::Cell::new(0),
        });
        holdfast_env::spawn("peer-listen", Shared::listen(Rc::downgrade(&shared), listener));
        Ok(Rc::new(Self { shared, links: RefCell::default(), address }))
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Replaces what is known of where the stores are.
    pub fn set_peers(&self, peers: BTreeMap<StoreId, Peer>) {
        *self.shared.peers.borrow_mut() = peers;
    }

    /// Replaces the faults.
    pub fn set_faults(&self, faults: Faults) {
        *self.shared.faults.borrow_mut() = faults;
    }

    /// What has passed so far.
    pub fn counters(&self) -> Counters {
        *self.shared.counters.borrow()
    }

    /// Bytes that wait for each peer and lane.
    pub fn queued(&self) -> Vec<(StoreId, Lane, u64)> {
        self.links.borrow().iter().map(|((to, lane), link)| (*to, *lane, link.queued())).collect()
    }

    fn link(&self, to: StoreId, lane: Lane) -> Rc<Link> {
        self.links.borrow_mut().entry((to, lane)).or_insert_with(|| Link::new(to, lane)).clone()
    }
}

impl Network for TcpNetwork {
    fn local(&self) -> StoreId {
        self.shared.local
    }

    fn send(&self, to: StoreId, lane: Lane, frame: Frame) -> Result<(), SendError> {
        if to == self.shared.local {
            let shared = self.shared.clone();
            holdfast_env::spawn("peer-self", async move { shared.deliver(to, lane, frame) });
            return Ok(());
        }
        let delay = {
            let faults = self.shared.faults.borrow();
            if faults.block_send.contains(&to) {
                return Ok(());
            }
            faults.delay.get(&to).copied().unwrap_or_default()
        };
        if self.shared.peer(to).is_none() {
            return Err(SendError::Unreachable { to, why: "no address is known for it".into() });
        }
        self.link(to, lane).send(&self.shared, frame, delay)
    }

    fn ready(&self, to: StoreId, lane: Lane) -> LocalBoxFuture<'static, ()> {
        if to == self.shared.local {
            return Box::pin(std::future::ready(()));
        }
        Box::pin(self.link(to, lane).ready())
    }

    fn set_handler(&self, handler: Rc<dyn FrameHandler>) {
        *self.shared.handler.borrow_mut() = Some(handler);
    }
}
