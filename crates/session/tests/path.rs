//! The whole path in one process: three stores on a real file system, their groups, and sessions, over a network in
//! memory whose links can be cut.

mod group;

use std::cell::Cell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use group::Member;
use group::{GROUP, Switch, attach, block, members, start};
use holdfast_env::net::{Frame, Lane};
use holdfast_replica::messages::REBUILD;
use holdfast_session::SessionError;
use holdfast_types::{BlockIndex, BlockRange, LogIndex, Reader, ReplicaId, StoreId, Writer};

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
fn a_write_whose_entry_another_leader_discards_is_repeated() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let switch = Rc::new(Switch::default());
        let group = members(place.path(), &switch).await;
        let session = attach(&group[0], false).await.expect("attaches");
        session.write(BlockRange::new(BlockIndex(0), 1), block(1, 1)).await.expect("writes");
        let leads =
            |member: &Member| member.host.volume(GROUP).is_some_and(|volume| volume.group().is_leader());
        assert!(leads(&group[0]), "the session is beside the leader");
        for other in [2, 3].map(StoreId) {
            switch.cut.borrow_mut().extend([(StoreId(1), other), (other, StoreId(1))]);
        }
        let pending = holdfast_env::spawn("write", {
            let session = session.clone();
            async move { session.write(BlockRange::new(BlockIndex(0), 1), block(2, 1)).await }
        });
        let elected = async {
            while !group[1..].iter().any(leads) {
                holdfast_env::sleep(Duration::from_millis(5)).await;
            }
        };
        holdfast_env::timeout(Duration::from_secs(10), elected).await.expect("another leader is elected");
        switch.cut.borrow_mut().clear();
        pending.await.expect("ends").expect("the write is repeated until it is done");
        let read = session.read(BlockRange::new(BlockIndex(0), 1)).await.expect("reads");
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

/// The question of a rebuild how far its source has applied, to whichever replica of the group stands on store 1.
async fn asked_by_a_rebuild(member: &Member, replica: ReplicaId, from: LogIndex) -> Result<LogIndex, String> {
    const POSITION: u8 = 24;
    let mut head = Writer::new();
    GROUP.encode(&mut head);
    head.u8(POSITION);
    replica.encode(&mut head);
    from.encode(&mut head);
    head.u32(0);
    let frame = Frame::small(head.finish());
    let answer = member.rpc.call(StoreId(1), Lane::Bulk, REBUILD, frame, Duration::from_secs(5)).await;
    let answer = answer.map_err(|error| error.to_string())?;
    LogIndex::decode(&mut Reader::new(&answer.head)).map_err(|error| error.to_string())
}

#[test]
fn a_rebuild_takes_nothing_from_another_replica_than_the_one_that_offered() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let switch = Rc::new(Switch::default());
        let group = members(place.path(), &switch).await;
        let session = attach(&group[0], false).await.expect("attaches");
        session.write(BlockRange::new(BlockIndex(0), 1), block(1, 1)).await.expect("writes");
        let applied = group[0].host.volume(GROUP).expect("runs").group().position().applied_index();
        let told = asked_by_a_rebuild(&group[1], ReplicaId(1), applied).await.expect("answers");
        assert!(told >= applied);
        // Replica 4 may have stood there, or come in its place; and one that is made anew has applied nothing.
        let refused = asked_by_a_rebuild(&group[1], ReplicaId(4), applied).await.expect_err("is refused");
        assert!(refused.contains("replica 4 offered its content"), "{refused}");
        let refused = asked_by_a_rebuild(&group[1], ReplicaId(1), LogIndex(1 << 40)).await;
        let refused = refused.expect_err("is refused");
        assert!(refused.contains("here is replica 1, as of"), "{refused}");
        for member in &group {
            member.host.stop().await;
        }
    });
}

#[test]
fn a_holder_that_died_is_followed_without_force_once_its_lease_has_ended() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let switch = Rc::new(Switch::default());
        let group = members(place.path(), &switch).await;
        let old = attach(&group[0], false).await.expect("attaches");
        old.write(BlockRange::new(BlockIndex(0), 1), block(1, 1)).await.expect("writes");
        // It ends without a word to anybody.
        old.abort();
        let refused = attach(&group[1], false).await;
        assert!(matches!(refused, Err(SessionError::Refused(_))), "its lease may still live");
        let followed = async {
            loop {
                match attach(&group[1], false).await {
                    Err(SessionError::Refused(_)) => holdfast_env::sleep(Duration::from_millis(50)).await,
                    other => return other.expect("attaches"),
                }
            }
        };
        let new = holdfast_env::timeout(Duration::from_secs(20), followed).await.expect("the lease ends");
        assert_eq!(new.read(BlockRange::new(BlockIndex(0), 1)).await.expect("reads"), block(1, 1));
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
