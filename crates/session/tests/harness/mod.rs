//! Three stores on a real file system, their groups, and sessions, in one process, over a network in memory whose links
//! can be cut and whose frames to a store can be held back.
#![allow(dead_code, reason = "each test uses a part of it")]

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::{Rc, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;
use holdfast_env::Instant;
use holdfast_env::net::{Frame, FrameHandler, Lane, Network, SendError};
use holdfast_env::real::disk::{OpenError, RealDirectory};
use holdfast_replica::{GroupEnvironment, Host, NewReplica, Timers};
use holdfast_session::{AttachOptions, Session, SessionError, Sessions, VolumeTarget};
use holdfast_store::journal::{Journal, StoreOptions};
use holdfast_store::{ReplicaIdentity, StoreIdentity};
use holdfast_types::{BLOCK_BYTES, ByteSize, ClusterId, GroupId, NodeName, ReplicaId, StoreId, VolumeId};
use holdfast_wire::rpc::Rpc;

/// A frame with its sender and lane.
pub type Waiting = (StoreId, Lane, Frame);

#[derive(Default)]
pub struct Switch {
    pub handlers: RefCell<BTreeMap<StoreId, Rc<dyn FrameHandler>>>,
    pub cut: RefCell<BTreeSet<(StoreId, StoreId)>>,
    /// Frames to these stores wait here, in the order in which they came.
    pub held: RefCell<BTreeMap<StoreId, Vec<Waiting>>>,
}

struct Port {
    switch: Rc<Switch>,
    local: StoreId,
}

impl Network for Port {
    fn local(&self) -> StoreId {
        self.local
    }
    fn send(&self, to: StoreId, lane: Lane, frame: Frame) -> Result<(), SendError> {
        let (switch, from) = (Rc::downgrade(&self.switch), self.local);
        holdfast_env::spawn("deliver", async move {
            let Some(switch) = Weak::upgrade(&switch) else { return };
            if switch.cut.borrow().contains(&(from, to)) {
                return;
            }
            if let Some(held) = switch.held.borrow_mut().get_mut(&to) {
                return held.push((from, lane, frame));
            }
            let handler = switch.handlers.borrow().get(&to).cloned();
            if let Some(handler) = handler {
                handler.on_frame(from, lane, frame);
            }
        });
        Ok(())
    }
    fn ready(&self, _to: StoreId, _lane: Lane) -> LocalBoxFuture<'static, ()> {
        Box::pin(std::future::ready(()))
    }
    fn set_handler(&self, handler: Rc<dyn FrameHandler>) {
        self.switch.handlers.borrow_mut().insert(self.local, handler);
    }
}

pub const GROUP: GroupId = GroupId(77);
pub const CLUSTER: ClusterId = ClusterId(5);

pub struct Member {
    pub host: Rc<Host>,
    pub sessions: Rc<Sessions>,
    pub rpc: Rpc,
    pub name: NodeName,
}

pub async fn start(place: &std::path::Path, switch: &Rc<Switch>, number: u64, fresh: bool) -> Member {
    let silence = if fresh { Duration::ZERO } else { Timers::default().startup_silence() };
    start_silent(place, switch, number, fresh, silence).await
}

/// A member whose voters are silent at first.
pub async fn start_silent(
    place: &std::path::Path,
    switch: &Rc<Switch>,
    number: u64,
    fresh: bool,
    silence: Duration,
) -> Member {
    let (host, rpc, name) = open(place, switch, number, fresh, silence).await;
    host.load().await.expect("loads");
    if fresh {
        host.create(&replica(number)).await.expect("creates");
    }
    asked(&host).await;
    let sessions = Sessions::serve(&rpc);
    Member { host, sessions, rpc, name }
}

/// How long a member that starts is waited for, whose peers do not answer.
const ASKING_MAX: Duration = Duration::from_secs(3);

/// The replica runs, or does not and says why, unless its peers do not answer what they know of it.
pub async fn asked(host: &Host) {
    let asking = async {
        while host.faulty().iter().any(|faulty| faulty.repairing && faulty.why.starts_with("it asks")) {
            holdfast_env::sleep(Duration::from_millis(5)).await;
        }
    };
    // Whether it has answers is for each test to look at.
    let _ = holdfast_env::timeout(ASKING_MAX, asking).await;
}

/// What every store is told to hold.
pub fn replica(number: u64) -> NewReplica {
    let id = ReplicaIdentity { group: GROUP, replica: ReplicaId(number) };
    NewReplica { volume: VolumeId(9), id, size: ByteSize(64 << 20), spec_json: Bytes::new() }
}

/// A store that has not loaded its replicas yet.
pub async fn open(
    place: &std::path::Path,
    switch: &Rc<Switch>,
    number: u64,
    fresh: bool,
    silence: Duration,
) -> (Rc<Host>, Rpc, NodeName) {
    let path = place.join(format!("n{number}"));
    // The tasks of the daemon before end one by one; its lock goes with the last of them.
    let opened = async {
        loop {
            match RealDirectory::open(&path) {
                Err(OpenError::InUse(_)) => holdfast_env::yield_now().await,
                other => return other.expect("a directory"),
            }
        }
    };
    let directory =
        holdfast_env::timeout(Duration::from_secs(10), opened).await.expect("the daemon before has ended");
    let name = NodeName::new(format!("n{number}"));
    let identity = StoreIdentity { cluster: CLUSTER, node: name.clone(), store: StoreId(number.into()) };
    let options = StoreOptions { segment_bytes: 4 << 20, segments: 6 };
    if fresh {
        Journal::format(directory.clone(), &identity, &options).await.expect("formats");
    }
    let network = Rc::new(Port { switch: switch.clone(), local: identity.store });
    let rpc = Rpc::new(network);
    let timers = Timers::default();
    let silent_until = Instant::now() + silence;
    let environment = GroupEnvironment { rpc: rpc.clone(), timers, silent_until };
    let host = Host::open(environment, directory, identity, &options).await.expect("opens");
    (host, rpc, name)
}

pub fn target() -> VolumeTarget {
    VolumeTarget { group: GROUP, stores: (1..=3).map(StoreId).collect() }
}

pub async fn attach(member: &Member, force: bool) -> Result<Rc<Session>, SessionError> {
    let options = AttachOptions {
        node: member.name.clone(),
        force,
        read_only: false,
        resume: false,
        only_at: None,
        patience: Duration::from_secs(20),
    };
    Session::attach(member.rpc.clone(), &member.sessions, target(), &options, &Timers::default()).await
}

pub fn block(value: u8, count: u32) -> Bytes {
    vec![value; count as usize * BLOCK_BYTES].into()
}

pub async fn members(place: &std::path::Path, switch: &Rc<Switch>) -> Vec<Member> {
    let mut members = Vec::new();
    for number in 1..=3 {
        members.push(start(place, switch, number, true).await);
    }
    let voters = (1..=3).map(|n| (ReplicaId(n), StoreId(n.into()))).collect();
    members[0].host.volume(GROUP).expect("runs").group().bootstrap(&voters).await.expect("begins");
    members
}
