//! The real network on loopback: frames both ways, strangers kept out, bounds kept, breaks told.

mod proxy;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use holdfast_env::net::{Frame, FrameHandler, Lane, Network, SendError};
use holdfast_types::{ClusterId, NodeName, StoreId};
use holdfast_wire::pki::Authority;
use holdfast_wire::tcp::{Faults, Peer, TcpNetwork};
use holdfast_wire::tls::Tls;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Notify;

const CLUSTER: ClusterId = ClusterId(7);

#[derive(Default)]
struct Seen {
    frames: RefCell<Vec<(StoreId, Lane, Frame)>>,
    lost: RefCell<Vec<(StoreId, Lane)>>,
    changed: Notify,
}

impl FrameHandler for Seen {
    fn on_frame(&self, from: StoreId, lane: Lane, frame: Frame) {
        self.frames.borrow_mut().push((from, lane, frame));
        self.changed.notify_one();
    }
    fn on_disconnect(&self, peer: StoreId, lane: Lane) {
        self.lost.borrow_mut().push((peer, lane));
        self.changed.notify_one();
    }
}

impl Seen {
    async fn until(&self, what: impl Fn(&Self) -> bool) {
        let wait = async {
            while !what(self) {
                self.changed.notified().await;
            }
        };
        holdfast_env::timeout(Duration::from_secs(10), wait).await.expect("it happens in time");
    }
}

struct Shard {
    network: Rc<TcpNetwork>,
    seen: Rc<Seen>,
    name: NodeName,
}

async fn shard(authority: &Authority, number: u128) -> Shard {
    let name = NodeName::new(format!("n{number}"));
    let tls = Tls::new(CLUSTER, &authority.issue(&name).expect("issues")).expect("is valid");
    let network = TcpNetwork::listen(StoreId(number), "127.0.0.1:0", tls).await.expect("listens");
    let seen = Rc::new(Seen::default());
    network.set_handler(seen.clone());
    Shard { network, seen, name }
}

fn introduce(shards: &[&Shard]) {
    let peers: BTreeMap<StoreId, Peer> = shards
        .iter()
        .map(|s| (s.network.local(), Peer { node: s.name.clone(), address: s.network.address().to_string() }))
        .collect();
    for shard in shards {
        shard.network.set_peers(peers.clone());
    }
}

fn frame(head: &'static [u8], body: usize) -> Frame {
    let body =
        if body == 0 { Vec::new() } else { vec![Bytes::from(vec![7; body]), Bytes::from_static(b"end")] };
    Frame { head: Bytes::from_static(head), body }
}

async fn until_refused(shard: &Shard, count: u64) {
    let refused = async {
        while shard.network.counters().refused < count {
            holdfast_env::yield_now().await;
        }
    };
    let waited = holdfast_env::timeout(Duration::from_secs(10), refused).await;
    waited.unwrap_or_else(|_| panic!("{count} are refused: {:?}", shard.network.counters()));
}

fn authority() -> Authority {
    let made = Authority::create(CLUSTER).expect("is made");
    // As after a restart: what was stored is what signs.
    Authority::load(CLUSTER, made.certificate().to_owned(), made.key()).expect("is read again")
}

#[test]
fn frames_go_both_ways_whole_and_in_order() {
    holdfast_env::real::run(async {
        let authority = authority();
        let (a, b) = (shard(&authority, 1).await, shard(&authority, 2).await);
        introduce(&[&a, &b]);
        for (head, body) in [(b"one" as &[u8], 0), (b"two", 1 << 20), (b"three", 0)] {
            a.network.send(StoreId(2), Lane::Bulk, frame(head, body)).expect("is queued");
        }
        b.network.send(StoreId(1), Lane::Control, frame(b"back", 0)).expect("is queued");
        b.seen.until(|seen| seen.frames.borrow().len() == 3).await;
        a.seen.until(|seen| seen.frames.borrow().len() == 1).await;
        let got: Vec<_> = b.seen.frames.borrow().clone();
        let heads: Vec<&[u8]> = got.iter().map(|(_, _, frame)| &frame.head[..]).collect();
        assert_eq!(heads, [b"one" as &[u8], b"two", b"three"]);
        assert!(got.iter().all(|(from, lane, _)| *from == StoreId(1) && *lane == Lane::Bulk));
        let body = got[1].2.clone().into_body();
        assert_eq!((body.len(), &body[1 << 20..]), ((1 << 20) + 3, b"end" as &[u8]));
        a.network.send(StoreId(1), Lane::Bulk, frame(b"self", 0)).expect("is queued");
        a.seen.until(|seen| seen.frames.borrow().len() == 2).await;
    });
}

#[test]
fn a_foreign_certificate_and_a_false_name_are_refused() {
    holdfast_env::real::run(async {
        let ours = authority();
        let (a, b) = (shard(&ours, 1).await, shard(&ours, 2).await);
        let foreign = shard(&authority(), 3).await;
        // n4 is of the cluster, but speaks for the store of n2.
        let liar = shard(&ours, 4).await;
        introduce(&[&a, &b, &foreign]);
        let book = |store: u128, node: &str| {
            let peer = Peer { node: NodeName::new(node), address: a.network.address().to_string() };
            BTreeMap::from([(StoreId(store), peer)])
        };
        liar.network.set_peers(book(1, "n1"));
        liar.network.send(StoreId(1), Lane::Bulk, frame(b"x", 0)).expect("is queued");
        liar.seen.until(|seen| !seen.lost.borrow().is_empty()).await;
        foreign.network.send(StoreId(1), Lane::Bulk, frame(b"x", 0)).expect("is queued");
        foreign.seen.until(|seen| !seen.lost.borrow().is_empty()).await;
        assert!(matches!(
            foreign.network.send(StoreId(1), Lane::Bulk, frame(b"x", 0)),
            Err(SendError::Unreachable { .. })
        ));
        assert!(a.seen.frames.borrow().is_empty());
        // The dialling side may hear of its refusal before the other has counted it.
        until_refused(&a, 2).await;
    });
}

#[test]
fn a_peer_without_a_certificate_is_refused() {
    holdfast_env::real::run(async {
        let a = shard(&authority(), 1).await;
        let mut stream = tokio::net::TcpStream::connect(a.network.address()).await.expect("connects");
        stream.write_all(&[0x16; 4096]).await.expect("sends");
        let mut rest = Vec::new();
        // Whether the end comes as a reset or an alert is the kernel's business.
        let _end = stream.read_to_end(&mut rest).await;
        until_refused(&a, 1).await;
    });
}

#[test]
fn a_broken_link_is_told_and_dialled_again() {
    holdfast_env::real::run(async {
        let authority = authority();
        let a = shard(&authority, 1).await;
        let b = shard(&authority, 2).await;
        introduce(&[&a, &b]);
        a.network.send(StoreId(2), Lane::Bulk, frame(b"one", 0)).expect("is queued");
        b.seen.until(|seen| seen.frames.borrow().len() == 1).await;
        // Nobody listens there any more.
        let gone = Peer { node: b.name.clone(), address: "127.0.0.1:1".into() };
        let c = shard(&authority, 3).await;
        introduce(&[&a, &c]);
        a.network.set_peers(BTreeMap::from([(StoreId(9), gone)]));
        a.network.send(StoreId(9), Lane::Bulk, frame(b"x", 0)).expect("is queued");
        a.seen.until(|seen| seen.lost.borrow().contains(&(StoreId(9), Lane::Bulk))).await;
        introduce(&[&a, &c]);
        a.network.send(StoreId(3), Lane::Bulk, frame(b"two", 0)).expect("is queued");
        c.seen.until(|seen| seen.frames.borrow().len() == 1).await;
    });
}

#[test]
fn a_queue_is_bounded_and_a_partition_is_silent() {
    holdfast_env::real::run(async {
        let authority = authority();
        let (a, b) = (shard(&authority, 1).await, shard(&authority, 2).await);
        introduce(&[&a, &b]);
        a.network.set_faults(Faults { block_send: [StoreId(2)].into(), ..Faults::default() });
        a.network.send(StoreId(2), Lane::Bulk, frame(b"dropped", 0)).expect("nobody is told");
        a.network.set_faults(Faults::default());
        let mut queued = 0;
        let full = loop {
            match a.network.send(StoreId(2), Lane::Bulk, frame(b"big", 4 << 20)) {
                Ok(()) => queued += 1,
                Err(error) => break error,
            }
        };
        assert!(matches!(full, SendError::QueueFull { .. }) && queued < 16, "{full} after {queued}");
        let too_large = a.network.send(StoreId(2), Lane::Bulk, frame(b"huge", 9 << 20));
        assert!(matches!(too_large, Err(SendError::TooLarge { .. })));
        a.network.ready(StoreId(2), Lane::Bulk).await;
        a.network.send(StoreId(2), Lane::Bulk, frame(b"fits", 4 << 20)).expect("there is room again");
        b.seen.until(|seen| seen.frames.borrow().len() == queued + 1).await;
        assert!(b.seen.frames.borrow().iter().all(|(_, _, frame)| &frame.head[..] != b"dropped"));
    });
}

/// A frame that tells its number, and a body that follows from it.
fn numbered(number: u32) -> Frame {
    let body: Vec<u8> = (0..8192).map(|at| (number as usize + at) as u8).collect();
    Frame { head: Bytes::copy_from_slice(&number.to_le_bytes()), body: vec![Bytes::from(body)] }
}

/// What arrived, in its order; each is as it was sent.
fn numbers(seen: &Seen) -> Vec<u32> {
    let frames = seen.frames.borrow();
    let number = |(_, _, frame): &(StoreId, Lane, Frame)| {
        let number = u32::from_le_bytes(frame.head[..].try_into().expect("a number"));
        assert_eq!(frame.clone().into_body(), numbered(number).into_body(), "frame {number} is damaged");
        number
    };
    frames.iter().map(number).collect()
}

/// Damage below TLS ends the connection, whatever it is; nothing that was damaged, lost, repeated or out of order on the
/// way is ever taken for a frame, and the next connection carries on.
#[test]
fn what_is_damaged_on_the_wire_breaks_the_connection_and_is_never_delivered() {
    const CONNECTIONS: u64 = 6;
    for damage in proxy::ALL {
        holdfast_env::real::run(async move {
            let authority = authority();
            let (a, b) = (shard(&authority, 1).await, shard(&authority, 2).await);
            introduce(&[&a, &b]);
            let proxy = proxy::Proxy::listen(b.network.address(), damage).await;
            let through = Peer { node: b.name.clone(), address: proxy.address.to_string() };
            a.network.set_peers(BTreeMap::from([(StoreId(2), through)]));
            let (mut sent, mut healed_at) = (0_u32, None);
            let carried = async {
                loop {
                    // Sends are refused for a moment after a break: the next number is tried then.
                    if a.network.send(StoreId(2), Lane::Bulk, numbered(sent)).is_ok() {
                        sent += 1;
                    }
                    holdfast_env::sleep(Duration::from_millis(1)).await;
                    if proxy.damaged() >= CONNECTIONS && healed_at.is_none() {
                        proxy.heal();
                        healed_at = Some(sent);
                    }
                    let last = numbers(&b.seen).last().copied();
                    if healed_at.is_some_and(|at| last.is_some_and(|last| last > at + 50)) {
                        return;
                    }
                }
            };
            let carried = holdfast_env::timeout(Duration::from_secs(30), carried).await;
            carried.unwrap_or_else(|_| panic!("{damage:?}: it goes on: {:?}", b.network.counters()));
            let arrived = numbers(&b.seen);
            assert!(
                arrived.is_sorted_by(|one, next| one < next),
                "{damage:?}: once and in order: {arrived:?}"
            );
            assert!(arrived.len() < sent as usize, "{damage:?}: what was under way is lost");
            let broken = a.seen.lost.borrow().len() as u64;
            assert!(broken >= CONNECTIONS, "{damage:?}: {broken} breaks were told to the sender");
        });
    }
}
