//! Snapshots over a whole group: a follower that was away while snapshots were made, dropped and restored is healed by
//! chunks with every layer.

mod group;

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use group::{GROUP, Member, Switch, asked, attach, block, control, members, snapshot, start};
use holdfast_protocol::command::VolumeCommand;
use holdfast_session::Session;
use holdfast_store::volume::View;
use holdfast_types::{BlockIndex, BlockRange, Epoch, SnapshotId, StoreId};

/// Blocks that the test writes.
const BLOCKS: u64 = 8 * 256;

/// Overwrites everything until the log does not reach back to where it was.
async fn fill_the_journal(leader: &Member, session: &Session, rounds: u64, seed: &Cell<u8>) {
    for round in 0..rounds {
        seed.set(seed.get().wrapping_add(1).max(1));
        let start = BlockIndex(256 * (round % 8));
        session.write(BlockRange::new(start, 256), block(seed.get(), 256)).await.expect("writes");
    }
    let purged = leader.host.volume(GROUP).and_then(|volume| volume.log().purged());
    assert!(purged.is_some(), "the log was purged under pressure");
}

async fn content(member: &Member, view: View) -> Vec<u8> {
    let volume = member.host.volume(GROUP).expect("runs");
    let mut out = Vec::new();
    for start in (0..BLOCKS).step_by(256) {
        let read = volume.data().read_view(view, BlockRange::new(BlockIndex(start), 256)).await;
        out.extend_from_slice(&read.unwrap_or_else(|error| panic!("{view:?}: {error}")).data);
    }
    out
}

fn cut_off_the_third(switch: &Switch) {
    for other in [1, 2].map(StoreId) {
        switch.cut.borrow_mut().extend([(StoreId(3), other), (other, StoreId(3))]);
    }
}

async fn healed(group: &[Member]) {
    let last = group[0].host.volume(GROUP).expect("runs").group().position().applied_index();
    for member in group {
        let volume = member.host.volume(GROUP).expect("runs");
        let reached = volume.group().position().reached(last);
        let healed = holdfast_env::timeout(Duration::from_secs(30), reached).await;
        assert!(healed.is_ok(), "at {:?} of {last}", volume.group().position().applied_index());
    }
}

/// All replicas have the same layers, and show the same in every view.
async fn all_equal(group: &[Member], views: &[(View, Vec<u8>)]) {
    let layers = group[0].host.volume(GROUP).expect("runs").data().layers();
    assert_eq!(layers.len(), views.len());
    for member in group {
        let volume = member.host.volume(GROUP).expect("runs");
        assert_eq!(volume.data().layers(), layers);
        for (view, expected) in views {
            assert!(content(member, *view).await == *expected, "{view:?} differs");
        }
    }
}

#[test]
fn a_follower_that_was_away_is_healed_with_every_layer() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let switch = Rc::new(Switch::default());
        let mut group = members(place.path(), &switch).await;
        let session = attach(&group[0], false).await.expect("attaches");
        let seed = Cell::new(0);
        let write = async |start: u64, count: u32| {
            seed.set(seed.get() + 1);
            let range = BlockRange::new(BlockIndex(start), count);
            session.write(range, block(seed.get(), count)).await.expect("writes");
        };
        write(0, 200).await;
        snapshot(&group[0], 1).await;
        write(10, 100).await;
        healed(&group).await;
        cut_off_the_third(&switch);
        let second = snapshot(&group[0], 2).await;
        let at_second = content(&group[0], View::Snapshot(second)).await;
        session.trim(BlockRange::new(BlockIndex(20), 64)).await.expect("trims");
        write(90, 20).await;
        let third = snapshot(&group[0], 3).await;
        let at_third = content(&group[0], View::Snapshot(third)).await;
        control(&group[0], VolumeCommand::DropSnapshot { id: SnapshotId(1) }).await;
        fill_the_journal(&group[0], &session, 72, &seed).await;
        switch.cut.borrow_mut().clear();
        healed(&group).await;
        assert!(group[2].host.volume(GROUP).expect("runs").healed_by_chunks() > 0);
        let head = content(&group[0], View::Head).await;
        let views = [(View::Snapshot(second), at_second), (View::Snapshot(third), at_third.clone())];
        all_equal(&group, &[views.as_slice(), &[(View::Head, head)]].concat()).await;

        // What came after the third snapshot is thrown away while the follower is away, and the second one goes.
        cut_off_the_third(&switch);
        let epoch: Epoch = session.epoch();
        session.detach(Duration::from_secs(5)).await.expect("detaches");
        drop(session);
        control(&group[0], VolumeCommand::RestoreSnapshot { id: SnapshotId(3), epoch }).await;
        assert!(content(&group[0], View::Head).await == at_third, "the head is as the snapshot");
        control(&group[0], VolumeCommand::DropSnapshot { id: SnapshotId(2) }).await;
        let session = attach(&group[0], false).await.expect("attaches");
        fill_the_journal(&group[0], &session, 72, &seed).await;
        switch.cut.borrow_mut().clear();
        healed(&group).await;
        let head = content(&group[0], View::Head).await;
        let views = [(View::Snapshot(third), at_third), (View::Head, head)];
        all_equal(&group, &views).await;
        session.detach(Duration::from_secs(5)).await.expect("detaches");
        drop(session);
        for member in &group {
            member.host.stop().await;
        }
        group.clear();
        for number in 1..=3 {
            group.push(start(place.path(), &switch, number, false).await);
        }
        for member in &group {
            asked(&member.host).await;
        }
        attach(&group[0], false).await.expect("attaches again");
        healed(&group).await;
        all_equal(&group, &views).await;
        for member in &group {
            member.host.stop().await;
        }
    });
}
