//! The whole path in one process: three stores on a real file system, their groups, and sessions, over a network in
//! memory whose links can be cut.

mod slow;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::{Rc, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;
use holdfast_env::Instant;
use holdfast_env::disk::Directory;
use holdfast_env::net::{Frame, FrameHandler, Lane, Network, SendError};
use holdfast_env::real::disk::{OpenError, RealDirectory};
use holdfast_replica::{GroupEnvironment, Host, NewReplica, Timers};
use holdfast_session::{AttachOptions, Session, SessionError, Sessions, VolumeTarget};
use holdfast_store::journal::{Journal, StoreOptions};
use holdfast_store::{ReplicaIdentity, StoreIdentity};
use holdfast_types::{
    BLOCK_BYTES, BlockIndex, BlockRange, ByteSize, ClusterId, GroupId, NodeName, ReplicaId, StoreId, VolumeId,
};
use holdfast_wire::rpc::Rpc;

#[derive(Default)]
struct Switch {
    handlers: RefCell<BTreeMap<StoreId, Rc<dyn FrameHandler>>>,
    cut: RefCell<BTreeSet<(StoreId, StoreId)>>,
    /// Stores whose disk is slow.
    slow: RefCell<BTreeSet<StoreId>>,
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

const GROUP: GroupId = GroupId(77);
const CLUSTER: ClusterId = ClusterId(5);

struct Member {
    host: Rc<Host>,
    sessions: Rc<Sessions>,
    rpc: Rpc,
    name: NodeName,
}

async fn start(place: &std::path::Path, switch: &Rc<Switch>, number: u64, fresh: bool) -> Member {
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
    let mut directory: Rc<dyn Directory> =
        holdfast_env::timeout(Duration::from_secs(10), opened).await.expect("the daemon before has ended");
    let name = NodeName::new(format!("n{number}"));
    let identity = StoreIdentity { cluster: CLUSTER, node: name.clone(), store: StoreId(number.into()) };
    let options = StoreOptions { segment_bytes: 4 << 20, segments: 6 };
    if fresh {
        Journal::format(directory.clone(), &identity, &options).await.expect("formats");
    }
    if switch.slow.borrow().contains(&identity.store) {
        directory = Rc::new(slow::Slow { inner: directory, delay: Duration::from_millis(30) });
    }
    let network = Rc::new(Port { switch: switch.clone(), local: identity.store });
    let rpc = Rpc::new(network);
    let timers = Timers::default();
    let silent_until = Instant::now() + if fresh { Duration::ZERO } else { timers.startup_silence() };
    let environment = GroupEnvironment { rpc: rpc.clone(), timers, silent_until };
    let host = Host::open(environment, directory, identity, &options).await.expect("opens");
    host.load().await.expect("loads");
    if fresh {
        let id = ReplicaIdentity { group: GROUP, replica: ReplicaId(number) };
        let new = NewReplica { volume: VolumeId(9), id, size: ByteSize(64 << 20), spec_json: Bytes::new() };
        host.create(&new).await.expect("creates");
    }
    let sessions = Sessions::serve(&rpc);
    Member { host, sessions, rpc, name }
}

fn target() -> VolumeTarget {
    VolumeTarget { group: GROUP, stores: (1..=3).map(StoreId).collect() }
}

async fn attach(member: &Member, force: bool) -> Result<Rc<Session>, SessionError> {
    let options = AttachOptions {
        node: member.name.clone(),
        force,
        read_only: false,
        resume: false,
        patience: Duration::from_secs(20),
    };
    Session::attach(member.rpc.clone(), &member.sessions, target(), &options, &Timers::default()).await
}

fn block(value: u8, count: u32) -> Bytes {
    vec![value; count as usize * BLOCK_BYTES].into()
}

async fn members(place: &std::path::Path, switch: &Rc<Switch>) -> Vec<Member> {
    let mut members = Vec::new();
    for number in 1..=3 {
        members.push(start(place, switch, number, true).await);
    }
    let voters = (1..=3).map(|n| (ReplicaId(n), StoreId(n.into()))).collect();
    members[0].host.volume(GROUP).expect("runs").group().bootstrap(&voters).await.expect("begins");
    members
}

#[test]
fn what_is_written_is_read_after_every_daemon_restarted() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let switch = Rc::new(Switch::default());
        let group = members(place.path(), &switch).await;
        let session = attach(&group[1], false).await.expect("attaches");
        session.write(BlockRange::new(BlockIndex(3), 2), block(7, 2)).await.expect("writes");
        session.write(BlockRange::new(BlockIndex(4), 1), block(8, 1)).await.expect("writes");
        session.trim(BlockRange::new(BlockIndex(3), 1)).await.expect("trims");
        let read = session.read(BlockRange::new(BlockIndex(2), 3)).await.expect("reads");
        assert_eq!(read, [block(0, 2), block(8, 1)].concat());
        let other = attach(&group[2], false).await;
        assert!(matches!(other, Err(SessionError::Refused(_))), "a live holder is not robbed without force");
        session.detach(Duration::from_secs(5)).await.expect("detaches");
        drop(session);
        for member in &group {
            member.host.stop().await;
        }
        drop(group);
        let mut group = Vec::new();
        for number in 1..=3 {
            group.push(start(place.path(), &switch, number, false).await);
        }
        let session = attach(&group[0], false).await.expect("attaches again");
        let read = session.read(BlockRange::new(BlockIndex(2), 3)).await.expect("reads");
        assert_eq!(read, [block(0, 2), block(8, 1)].concat());
        for member in &group {
            member.host.stop().await;
        }
    });
}

#[test]
fn a_forced_attach_fences_the_holder_who_hears_nothing() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let switch = Rc::new(Switch::default());
        let group = members(place.path(), &switch).await;
        let old = attach(&group[0], false).await.expect("attaches");
        old.write(BlockRange::new(BlockIndex(0), 1), block(1, 1)).await.expect("writes");
        for other in [2, 3].map(StoreId) {
            switch.cut.borrow_mut().extend([(StoreId(1), other), (other, StoreId(1))]);
        }
        let pending = holdfast_env::spawn("late write", {
            let old = old.clone();
            async move { old.write(BlockRange::new(BlockIndex(0), 1), block(9, 1)).await }
        });
        let new = attach(&group[1], true).await.expect("attaches by force");
        assert!(new.epoch() > old.epoch());
        new.write(BlockRange::new(BlockIndex(0), 1), block(2, 1)).await.expect("writes");
        switch.cut.borrow_mut().clear();
        let late = pending.await.expect("ends");
        assert!(matches!(late, Err(SessionError::Closed(_))), "the late write fails: {late:?}");
        let read = new.read(BlockRange::new(BlockIndex(0), 1)).await.expect("reads");
        assert_eq!(read, block(2, 1));
        for member in &group {
            member.host.stop().await;
        }
    });
}

#[test]
fn a_follower_that_was_left_behind_is_healed_by_chunks() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let switch = Rc::new(Switch::default());
        let group = members(place.path(), &switch).await;
        let session = attach(&group[0], false).await.expect("attaches");
        session.write(BlockRange::new(BlockIndex(0), 16), block(1, 16)).await.expect("writes");
        for other in [1, 2].map(StoreId) {
            switch.cut.borrow_mut().extend([(StoreId(3), other), (other, StoreId(3))]);
        }
        let written = Cell::new(0u64);
        // Three times the journal of 24 MiB, over 8 MiB of blocks.
        for round in 0..72u64 {
            let start = BlockIndex(256 * (round % 8));
            session.write(BlockRange::new(start, 256), block(round as u8, 256)).await.expect("writes");
            written.set(written.get() + (1 << 20));
        }
        let purged = || group[0].host.volume(GROUP).and_then(|volume| volume.log().purged());
        assert!(purged().is_some(), "the log was purged under pressure");
        switch.cut.borrow_mut().clear();
        let last = group[0].host.volume(GROUP).expect("runs").group().position().applied_index();
        let lagging = group[2].host.volume(GROUP).expect("runs");
        let healed =
            holdfast_env::timeout(Duration::from_secs(30), lagging.group().position().reached(last)).await;
        assert!(healed.is_ok(), "at {:?} of {last}", lagging.group().position().applied_index());
        let mut digests = BTreeSet::new();
        for member in &group {
            let volume = member.host.volume(GROUP).expect("runs");
            volume.group().position().reached(last).await;
            let digest = volume.data().digest().await.expect("digests");
            assert_eq!(digest.bad_blocks, 0);
            digests.insert(digest.to_string());
        }
        assert_eq!(digests.len(), 1, "all replicas are equal");
        for member in &group {
            member.host.stop().await;
        }
    });
}

#[test]
fn a_leader_whose_disk_is_slow_goes_on_when_its_journal_is_full() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let switch = Rc::new(Switch::default());
        switch.slow.borrow_mut().insert(StoreId(1));
        let group = members(place.path(), &switch).await;
        let session = attach(&group[0], false).await.expect("attaches");
        let leads = || group[0].host.volume(GROUP).is_some_and(|volume| volume.group().is_leader());
        assert!(leads(), "the slow one began the group and leads it");
        // Followers commit without it: it has applied what is not durable on its own disk, and its journal of 24 MiB
        // fills up four times.
        let writing = async {
            for round in 0..48u64 {
                let writes = (0..8u64).map(|n| {
                    let start = BlockIndex(64 * (8 * (round % 8) + n));
                    session.write(BlockRange::new(start, 64), block(round as u8, 64))
                });
                let all = futures_util::future::join_all(writes).await;
                all.into_iter().collect::<Result<Vec<()>, _>>().expect("writes");
            }
        };
        holdfast_env::timeout(Duration::from_secs(60), writing).await.expect("the writes go on");
        let volume = group[0].host.volume(GROUP).expect("runs");
        let flushed = async {
            while volume.log().flushed() < volume.log().last().expect("entries").index {
                holdfast_env::sleep(Duration::from_millis(5)).await;
            }
        };
        holdfast_env::timeout(Duration::from_secs(30), flushed)
            .await
            .expect("everything is durable here, too");
        assert!(volume.log().purged().is_some(), "the journal was filled more than once");
        for member in &group {
            member.host.stop().await;
        }
    });
}
