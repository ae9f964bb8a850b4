//! Three stores on a real file system, their group, and a network in memory whose links can be cut.

#![allow(dead_code, reason = "each test uses a part of it")]

pub mod damage;
mod slow;
pub mod stalling;
pub mod steps;
pub mod unreadable;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::rc::{Rc, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;
use holdfast_env::Instant;
use holdfast_env::disk::Directory;
use holdfast_env::net::{Frame, FrameHandler, Lane, Network, SendError};
use holdfast_env::real::disk::{OpenError, RealDirectory};
use holdfast_protocol::command::VolumeCommand;
use holdfast_protocol::volume::VolumeReply;
use holdfast_replica::messages::{DataReply, DataRequest};
use holdfast_replica::{GroupEnvironment, Host, NewReplica, Timers};
use holdfast_session::{AttachOptions, Session, SessionError, Sessions, VolumeTarget};
use holdfast_store::journal::{Journal, StoreOptions};
use holdfast_store::{ReplicaIdentity, StoreIdentity};
use holdfast_types::{
    BLOCK_BYTES, ByteSize, ClusterId, Epoch, GroupId, LogIndex, NodeName, ReplicaId, SnapshotId, StoreId,
    VolumeId,
};
use holdfast_wire::rpc::Rpc;

/// What a link does to frames: sender, receiver, the frame.
pub type Damage = Box<dyn FnMut(StoreId, StoreId, &mut Frame)>;

/// The network between the stores.
#[derive(Default)]
pub struct Switch {
    handlers: RefCell<BTreeMap<StoreId, Rc<dyn FrameHandler>>>,
    /// (from, to): dropped without a word.
    pub cut: RefCell<BTreeSet<(StoreId, StoreId)>>,
    /// Damages frames on their way.
    pub damage: RefCell<Option<Damage>>,
    /// Stores whose disk is slow.
    pub slow: RefCell<BTreeSet<StoreId>>,
    /// What stores may take of their media, of those that may not take all.
    pub capacity: RefCell<BTreeMap<StoreId, u64>>,
}

struct Port {
    switch: Rc<Switch>,
    local: StoreId,
    /// Its daemon has crashed: nothing it sends arrives.
    muted: Rc<Cell<bool>>,
}

impl Network for Port {
    fn local(&self) -> StoreId {
        self.local
    }
    fn send(&self, to: StoreId, lane: Lane, mut frame: Frame) -> Result<(), SendError> {
        if self.muted.get() {
            return Ok(());
        }
        if let Some(damage) = self.switch.damage.borrow_mut().as_mut() {
            damage(self.local, to, &mut frame);
        }
        let (switch, from) = (Rc::downgrade(&self.switch), self.local);
        holdfast_env::spawn("deliver", async move {
            let Some(switch) = Weak::upgrade(&switch) else { return };
            if switch.cut.borrow().contains(&(from, to)) {
                return;
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

/// The group of all tests.
pub const GROUP: GroupId = GroupId(77);
const CLUSTER: ClusterId = ClusterId(5);

/// One daemon's part of the group.
pub struct Member {
    pub host: Rc<Host>,
    pub sessions: Rc<Sessions>,
    pub rpc: Rpc,
    pub name: NodeName,
    /// Set, nothing that it sends arrives any more.
    pub muted: Rc<Cell<bool>>,
}

/// Starts a member on its directory under `place`.
pub async fn start(place: &Path, switch: &Rc<Switch>, number: u64, fresh: bool) -> Member {
    start_on(&place.join(format!("n{number}")), switch, number, fresh, |directory| directory).await
}

/// Starts a member on a directory, through what `wrap` makes of it.
pub async fn start_on(
    path: &Path,
    switch: &Rc<Switch>,
    number: u64,
    fresh: bool,
    wrap: impl FnOnce(Rc<dyn Directory>) -> Rc<dyn Directory>,
) -> Member {
    start_as(path, switch, number, fresh, wrap, Kind::Data).await
}

/// What a member is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It holds data.
    Data,
    /// It is a witness, whose log may hold so many bytes.
    Witness(u64),
}

/// The replica that a member is told to make.
pub fn replica(number: u64) -> NewReplica {
    let id = ReplicaIdentity { group: GROUP, replica: ReplicaId(number) };
    NewReplica { volume: VolumeId(9), id, size: ByteSize(64 << 20), spec_json: Bytes::new() }
}

/// As [`start_on`], of a kind.
pub async fn start_as(
    path: &Path,
    switch: &Rc<Switch>,
    number: u64,
    fresh: bool,
    wrap: impl FnOnce(Rc<dyn Directory>) -> Rc<dyn Directory>,
    kind: Kind,
) -> Member {
    // The tasks of the daemon before end one by one; its lock goes with the last of them.
    let opened = async {
        loop {
            match RealDirectory::open(path) {
                Err(OpenError::InUse(_)) => holdfast_env::yield_now().await,
                other => return other.expect("a directory"),
            }
        }
    };
    let directory =
        holdfast_env::timeout(Duration::from_secs(10), opened).await.expect("the daemon before has ended");
    let directory = wrap(directory);
    let name = NodeName::new(format!("n{number}"));
    let identity = StoreIdentity { cluster: CLUSTER, node: name.clone(), store: StoreId(number.into()) };
    let options = StoreOptions { segment_bytes: 4 << 20, segments: 6 };
    if fresh {
        Journal::format(directory.clone(), &identity, &options).await.expect("formats");
    }
    let muted = Rc::new(Cell::new(false));
    let directory: Rc<dyn Directory> = if switch.slow.borrow().contains(&identity.store) {
        Rc::new(slow::Slow { inner: directory, delay: Duration::from_millis(30) })
    } else {
        directory
    };
    let network = Rc::new(Port { switch: switch.clone(), local: identity.store, muted: muted.clone() });
    let rpc = Rpc::new(network);
    let timers = Timers::default();
    let silent_until = Instant::now() + if fresh { Duration::ZERO } else { timers.startup_silence() };
    let environment = GroupEnvironment { rpc: rpc.clone(), timers, silent_until };
    let capacity = switch.capacity.borrow().get(&identity.store).copied();
    let opened = Host::open_within(environment, directory, identity, &options, capacity);
    let host = opened.await.expect("opens");
    if let Kind::Witness(budget) = kind {
        host.take_witnesses_only(budget);
    }
    host.load().await.expect("loads");
    match kind {
        Kind::Data if fresh => drop(host.create(&replica(number)).await.expect("creates")),
        Kind::Witness(_) if fresh => drop(host.create_witness(&replica(number)).await.expect("creates")),
        _ => {}
    }
    asked(&host).await;
    let sessions = Sessions::serve(&rpc);
    Member { host, sessions, rpc, name, muted }
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

fn target() -> VolumeTarget {
    VolumeTarget { group: GROUP, stores: (1..=3).map(StoreId).collect() }
}

/// Attaches from a member.
pub async fn attach(member: &Member, force: bool) -> Result<Rc<Session>, SessionError> {
    attach_at(member, force, None).await
}

/// Attaches from a member, in this epoch only if one is named.
pub async fn attach_at(
    member: &Member,
    force: bool,
    only_at: Option<Epoch>,
) -> Result<Rc<Session>, SessionError> {
    let options = AttachOptions {
        node: member.name.clone(),
        force,
        read_only: false,
        resume: false,
        only_at,
        patience: Duration::from_secs(20),
    };
    Session::attach(member.rpc.clone(), &member.sessions, target(), &options, &Timers::default()).await
}

/// Blocks full of one byte.
pub fn block(value: u8, count: u32) -> Bytes {
    vec![value; count as usize * BLOCK_BYTES].into()
}

/// Makes a group of three new members begin.
pub async fn begin(members: &[Member]) {
    let voters = (1..=3).map(|n| (ReplicaId(n), StoreId(n.into()))).collect();
    members[0].host.volume(GROUP).expect("runs").group().bootstrap(&voters).await.expect("begins");
}

/// Three new members whose group has begun.
pub async fn members(place: &Path, switch: &Rc<Switch>) -> Vec<Member> {
    let mut members = Vec::new();
    for number in 1..=3 {
        members.push(start(place, switch, number, true).await);
    }
    begin(&members).await;
    members
}

/// The first member leads.
pub async fn first_leads(members: &[Member]) {
    let group = |member: &Member| member.host.volume(GROUP).expect("runs").group().clone();
    loop {
        if group(&members[0]).is_leader() {
            return;
        }
        if let Some(leader) = members.iter().map(group).find(|group| group.is_leader()) {
            // It may have lost its place meanwhile: look again either way.
            drop(leader.transfer_to(ReplicaId(1)).await);
        }
        holdfast_env::sleep(Duration::from_millis(10)).await;
    }
}

/// A command of the volume, by its leader; where it stands in the log.
pub async fn control(member: &Member, command: VolumeCommand) -> LogIndex {
    let volume = member.host.volume(GROUP).expect("runs");
    let request = DataRequest::Control { group: GROUP, command: command.encode() };
    match volume.answer(request, Bytes::new()).await.0 {
        DataReply::Applied { index, reply: VolumeReply::Done { .. } | VolumeReply::Snapshotted { .. } } => {
            index
        }
        other => panic!("{command:?} answered {other:?}"),
    }
}

/// Makes a snapshot; its index.
pub async fn snapshot(member: &Member, id: u128) -> LogIndex {
    let name = format!("s{id}");
    control(member, VolumeCommand::Snapshot { id: SnapshotId(id), name, created_ms: 0 }).await
}
