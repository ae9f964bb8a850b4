//! What comes between two steps: a call before the store has loaded, files that are gone, an answer behind a fence, a
//! transfer of leadership to one who may not take it.

mod harness;

use std::rc::Rc;
use std::time::Duration;

use harness::{GROUP, Switch, asked, attach, block, members, open, replica, start_silent};
use holdfast_env::net::{Frame, Lane};
use holdfast_replica::GroupError;
use holdfast_replica::messages::{SESSION, SessionRequest};
use holdfast_types::{BlockIndex, BlockRange, Epoch, ReplicaId, StoreId};

const FIRST: BlockRange = BlockRange { start: BlockIndex(0), count: 1 };

async fn stop(group: &[harness::Member]) {
    for member in group {
        member.host.stop().await;
    }
}

#[test]
fn a_replica_is_not_made_anew_while_its_store_loads() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let switch = Rc::new(Switch::default());
        let mut group = members(place.path(), &switch).await;
        let session = attach(&group[0], false).await.expect("attaches");
        session.write(FIRST, block(7, 1)).await.expect("writes");
        let before = group.pop().expect("three members");
        before.host.stop().await;
        drop(before);
        // The reconciler repeats what it had no answer for.
        let (host, ..) = open(place.path(), &switch, 3, false, Duration::ZERO).await;
        let made = host.create(&replica(3)).await.map(|_| ());
        assert!(matches!(made, Err(GroupError::Refused(_))), "{made:?}");
        let removed = host.destroy(replica(3).id, 1).await;
        assert!(matches!(removed, Err(GroupError::Refused(_))), "{removed:?}");
        host.load().await.expect("loads");
        asked(&host).await;
        let volume = host.create(&replica(3)).await.expect("is there");
        let last = group[0].host.volume(GROUP).expect("runs").group().position().applied_index();
        let caught_up = volume.group().position().reached(last);
        holdfast_env::timeout(Duration::from_secs(10), caught_up).await.expect("catches up");
        assert_eq!(volume.data().read(FIRST).await.expect("is read"), block(7, 1));
        host.stop().await;
        stop(&group).await;
    });
}

#[test]
fn a_log_that_was_used_gets_no_empty_files() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let switch = Rc::new(Switch::default());
        let mut group = members(place.path(), &switch).await;
        let session = attach(&group[0], false).await.expect("attaches");
        session.write(FIRST, block(7, 1)).await.expect("writes");
        let before = group.pop().expect("three members");
        before.host.stop().await;
        drop(before);
        std::fs::remove_dir_all(place.path().join("n3/replicas")).expect("its files are lost");
        let (host, ..) = open(place.path(), &switch, 3, false, Duration::ZERO).await;
        host.load().await.expect("loads");
        let made = host.create(&replica(3)).await.map(|_| ());
        assert!(
            matches!(made, Err(GroupError::Refused(_))),
            "its votes and its log are not of an empty one: {made:?}"
        );
        host.destroy(replica(3).id, 1).await.expect("is removed");
        host.create(&replica(4)).await.expect("another may come");
        host.stop().await;
        stop(&group).await;
    });
}

#[test]
fn an_answer_behind_a_fence_is_not_given_to_the_reader() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let switch = Rc::new(Switch::default());
        let group = members(place.path(), &switch).await;
        let session = attach(&group[0], false).await.expect("attaches");
        session.write(FIRST, block(7, 1)).await.expect("writes");
        switch.held.borrow_mut().insert(StoreId(1), Vec::new());
        let reading = holdfast_env::spawn("read", {
            let session = session.clone();
            async move { session.read(FIRST).await }
        });
        let fence = SessionRequest::Fence {
            group: GROUP,
            session: session.id(),
            epoch: Epoch(session.epoch().0 + 1),
        };
        // Its own replica is asked first: the request, then the answer, come back to it.
        let mut through = false;
        loop {
            holdfast_env::yield_now().await;
            let frames = std::mem::take(switch.held.borrow_mut().get_mut(&StoreId(1)).expect("is held"));
            let handler = switch.handlers.borrow()[&StoreId(1)].clone();
            for (from, lane, frame) in frames {
                // An answer with the block in it.
                through |= lane == Lane::Bulk && from == StoreId(1) && frame.body_bytes() == 4096;
                handler.on_frame(from, lane, frame);
            }
            if through {
                break;
            }
        }
        // In the same turn, before the reader has looked: another node has forced its way in.
        session_fence(&switch, &fence);
        let read = reading.await.expect("ends");
        assert!(read.is_err(), "the end was confirmed: whoever holds the volume now may have written since");
        switch.held.borrow_mut().clear();
        stop(&group).await;
    });
}

/// The fence as a frame of the call layer, delivered at once.
fn session_fence(switch: &Rc<Switch>, fence: &SessionRequest) {
    let mut head = holdfast_types::Writer::new();
    head.u8(1);
    head.u8(1);
    head.u8(SESSION.0);
    head.u64(u64::MAX);
    head.raw(&fence.encode());
    let handler = switch.handlers.borrow()[&StoreId(1)].clone();
    handler.on_frame(StoreId(2), Lane::Control, Frame::small(head.finish()));
}

#[test]
fn leadership_goes_to_voters_only_and_a_silent_one_does_not_take_it() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let switch = Rc::new(Switch::default());
        let mut group = members(place.path(), &switch).await;
        let session = attach(&group[0], false).await.expect("attaches");
        session.write(FIRST, block(1, 1)).await.expect("writes");
        let leads =
            |member: &harness::Member| member.host.volume(GROUP).is_some_and(|v| v.group().is_leader());
        let at = group.iter().position(leads).expect("somebody leads");
        let leader = group[at].host.volume(GROUP).expect("runs").group().clone();
        let nobody = leader.transfer_to(ReplicaId(99)).await;
        assert!(matches!(nobody, Err(GroupError::Refused(_))), "{nobody:?}");
        leader.transfer_to(leader.id().replica).await.expect("it leads already");
        session.write(FIRST, block(2, 1)).await.expect("writes");
        assert!(leads(&group[at]), "nothing has changed");
        // Another voter restarts and is silent for as long as leases that it granted may live.
        let silent = if at == 2 { 1 } else { 2 };
        group[silent].host.stop().await;
        let number = silent as u64 + 1;
        drop(group.remove(silent));
        let again = start_silent(place.path(), &switch, number, false, Duration::from_secs(3600)).await;
        let last = leader.position().applied_index();
        let caught_up = again.host.volume(GROUP).expect("runs");
        let caught_up =
            holdfast_env::timeout(Duration::from_secs(10), caught_up.group().position().reached(last));
        caught_up.await.expect("catches up");
        let refused = leader.transfer_to(ReplicaId(number)).await;
        assert!(matches!(refused, Err(GroupError::Refused(_))), "{refused:?}");
        assert!(!leads(&again), "a silent voter campaigned");
        // Whatever the failed transfer left in Raft, the group goes on.
        let written = holdfast_env::timeout(Duration::from_secs(20), session.write(FIRST, block(3, 1))).await;
        written.expect("the group is led again").expect("writes");
        again.host.stop().await;
        stop(&group).await;
    });
}
