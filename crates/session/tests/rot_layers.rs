//! Rot and lost writes in volumes with snapshots (INV-HEAL, INV-LAYER): each layer is healed from the same layer of the
//! others, also what no reader of the head ever sees; and what cannot be healed is not served.

mod group;

use std::path::Path;
use std::rc::Rc;

use bytes::Bytes;
use group::damage::{
    LONG, SCRUB, again, all_equal, all_home, bytes_at, damaging, file_in, file_of, flip, put_bytes, range,
    stop, until, volume, within,
};
use group::{GROUP, Member, Switch, attach, block, control, first_leads, members, snapshot, start};
use holdfast_protocol::command::VolumeCommand;
use holdfast_session::Session;
use holdfast_store::volume::View;
use holdfast_types::{LogIndex, SnapshotId, StoreId};
use holdfast_wire::rpc::{CallKind, Service};

const HEAL: Service = holdfast_replica::messages::HEAL;

/// A group with a snapshot whose blocks 0 to 7 the head hides.
struct Snapshotted {
    session: Rc<Session>,
    index: LogIndex,
}

async fn snapshotted(members: &[Member]) -> Snapshotted {
    within(first_leads(members)).await;
    let session = attach(&members[1], false).await.expect("attaches");
    session.write(range(0, 8), block(7, 8)).await.expect("writes");
    session.write(range(100, 8), block(9, 8)).await.expect("writes");
    all_home(members).await;
    let index = snapshot(&members[0], 1).await;
    session.write(range(0, 8), block(8, 8)).await.expect("writes");
    all_home(members).await;
    Snapshotted { session, index }
}

async fn shown(member: &Member, view: View, start: u64, count: u32) -> Bytes {
    let read = volume(member).data().read_view(view, range(start, count)).await;
    read.unwrap_or_else(|error| panic!("{view:?} of {}: {error}", member.name)).data
}

async fn scrubbed(members: &[Member]) {
    let before: Vec<u64> = members.iter().map(|m| volume(m).scrub_progress().passes).collect();
    for member in members {
        if before.iter().all(|passes| *passes == 0) {
            member.host.start_scrub(SCRUB);
        } else {
            member.host.scrub_now(GROUP);
        }
    }
    for (member, before) in members.iter().zip(before) {
        let volume = volume(member);
        until("a pass ends", || volume.scrub_progress().passes > before).await;
    }
}

/// The disk of the second member drops what was written to a block of a layer and to its page in the table: what is left
/// is old and true to itself.
async fn lose_a_write(
    place: &Path,
    switch: &Rc<Switch>,
    members: &mut Vec<Member>,
    session: Rc<Session>,
    layer: LogIndex,
) {
    let (home, table) = (file_in(place, 2, layer, "home"), file_in(place, 2, layer, "table"));
    let old = [bytes_at(&home, 3), bytes_at(&table, 0), bytes_at(&table, 1)];
    session.write(range(3, 1), block(5, 1)).await.expect("writes");
    all_home(members).await;
    // The checkpoint after that says nothing of the page any more.
    session.write(range(12_800, 1), block(6, 1)).await.expect("writes");
    all_home(members).await;
    session.detach(LONG).await.expect("detaches");
    drop(session);
    all_home(members).await;
    members[1].host.stop().await;
    put_bytes(&home, 3, &old[0]);
    (0..2).for_each(|copy| put_bytes(&table, copy, &old[1 + copy as usize]));
    again(place, switch, members, 2).await;
    let last = volume(&members[0]).group().report().last_log;
    within(volume(&members[1]).group().position().reached(last)).await;
    assert_eq!(
        shown(&members[1], View::Head, 3, 1).await,
        block(8, 1),
        "nothing is wrong: this shows nothing"
    );
}

#[test]
fn a_lost_write_in_the_newest_layer_is_found_by_comparison_and_healed() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let switch = Rc::new(Switch::default());
        let mut members = members(place.path(), &switch).await;
        let Snapshotted { session, index } = snapshotted(&members).await;
        lose_a_write(place.path(), &switch, &mut members, session, index).await;
        scrubbed(&members).await;
        assert!(shown(&members[1], View::Head, 3, 1).await == block(5, 1));
        assert_eq!(volume(&members[1]).data().health().replaced_chunks, 1);
        for other in [0, 2] {
            assert_eq!(volume(&members[other]).data().health(), Default::default());
        }
        assert!(all_equal(&members).await);
        for member in &members {
            assert!(shown(member, View::Snapshot(index), 0, 8).await == block(7, 8));
        }
        stop(&members).await;
    });
}

/// `volume verify` finds it by the digests, the scrub by comparison.
#[test]
fn a_lost_write_in_a_frozen_layer_is_found_by_comparison_and_healed() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let switch = Rc::new(Switch::default());
        let mut members = members(place.path(), &switch).await;
        within(first_leads(&members)).await;
        let session = attach(&members[1], false).await.expect("attaches");
        session.write(range(0, 8), block(7, 8)).await.expect("writes");
        all_home(&members).await;
        let (home, table) = (file_of(place.path(), 2, "home"), file_of(place.path(), 2, "table"));
        let old = [bytes_at(&home, 3), bytes_at(&table, 0), bytes_at(&table, 1)];
        session.write(range(3, 1), block(5, 1)).await.expect("writes");
        all_home(&members).await;
        let index = snapshot(&members[0], 1).await;
        session.write(range(0, 8), block(8, 8)).await.expect("writes");
        session.detach(LONG).await.expect("detaches");
        drop(session);
        all_home(&members).await;
        members[1].host.stop().await;
        put_bytes(&home, 3, &old[0]);
        (0..2).for_each(|copy| put_bytes(&table, copy, &old[1 + copy as usize]));
        again(place.path(), &switch, &mut members, 2).await;
        let digest = async |at: usize| volume(&members[at]).data().digest().await.expect("is read");
        let last = volume(&members[0]).group().report().last_log;
        within(volume(&members[1]).group().position().reached(last)).await;
        let second = digest(1).await;
        assert_eq!(second.bad_blocks, 0, "no checksum shows it");
        assert_ne!(second, digest(0).await, "the replicas hold different snapshots");
        assert_eq!(digest(2).await, digest(0).await);
        scrubbed(&members).await;
        assert!(all_equal(&members).await);
        let mut expected = block(7, 8).to_vec();
        expected[3 * 4096..4 * 4096].fill(5);
        for member in &members {
            assert!(shown(member, View::Snapshot(index), 0, 8).await == expected);
            let replaced = volume(member).data().health().replaced_chunks;
            assert_eq!(replaced, u64::from(member.name == members[1].name));
        }
        stop(&members).await;
    });
}

/// As long as no peer gives the chunk, others are read, after a restart, too; and it is said.
#[test]
fn what_is_shown_to_be_old_and_cannot_be_healed_is_not_served() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let switch = Rc::new(Switch::default());
        let mut members = members(place.path(), &switch).await;
        let Snapshotted { session, index } = snapshotted(&members).await;
        lose_a_write(place.path(), &switch, &mut members, session, index).await;
        let damaged = damaging(&switch, HEAL, CallKind::Answer, u32::MAX, |_, _| true);
        scrubbed(&members).await;
        assert!(damaged.get() > 0, "the others were asked");
        for restarted in [false, true] {
            if restarted {
                members[1].host.stop().await;
                again(place.path(), &switch, &mut members, 2).await;
                let last = volume(&members[0]).group().report().last_log;
                within(volume(&members[1]).group().position().reached(last)).await;
            }
            let second = volume(&members[1]);
            let here = second.data().read(range(3, 1)).await;
            assert!(here.is_err(), "what is old is served, restarted: {restarted}");
            let session = within(attach(&members[1], false)).await.expect("attaches");
            assert_eq!(within(session.read(range(3, 1))).await.expect("reads"), block(5, 1));
            until("it is said", || second.data().health().bad_blocks > 0).await;
            session.detach(LONG).await.expect("detaches");
        }
        *switch.damage.borrow_mut() = None;
        let second = volume(&members[1]);
        until("it is healed", || second.data().health().bad_blocks == 0).await;
        assert!(shown(&members[1], View::Head, 3, 1).await == block(5, 1));
        assert!(all_equal(&members).await);
        stop(&members).await;
    });
}

/// What one replica alone tells may be all that is left of the others: the page stays, and the next pass tries again.
#[test]
fn what_too_few_others_hold_is_not_distrusted() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let switch = Rc::new(Switch::default());
        let mut members = members(place.path(), &switch).await;
        let Snapshotted { session, index } = snapshotted(&members).await;
        lose_a_write(place.path(), &switch, &mut members, session, index).await;
        let first = members.remove(0);
        first.host.stop().await;
        drop(first);
        let damaged = damaging(&switch, HEAL, CallKind::Answer, u32::MAX, |_, _| true);
        let second = volume(&members[0]);
        let passed = async |passes| {
            until("a pass ends", || second.scrub_progress().passes > passes).await;
            second.scrub_progress()
        };
        members[0].host.start_scrub(SCRUB);
        let progress = passed(0).await;
        assert!(damaged.get() > 1, "it was tried {} times", damaged.get());
        assert_eq!((progress.unsettled, second.data().health().bad_blocks), (1, 0));
        second.data().read(range(100, 8)).await.expect("its neighbours are served");
        *switch.damage.borrow_mut() = None;
        members[0].host.scrub_now(GROUP);
        assert_eq!(passed(progress.passes).await.unsettled, 0);
        assert!(shown(&members[0], View::Head, 3, 1).await == block(5, 1));
        stop(&members).await;
    });
}

/// One has a page that is not believed, the other a rotten block in that page, and the third is gone.
#[test]
fn two_that_need_each_other_heal_each_other() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let switch = Rc::new(Switch::default());
        let mut members = members(place.path(), &switch).await;
        let Snapshotted { session, index } = snapshotted(&members).await;
        lose_a_write(place.path(), &switch, &mut members, session, index).await;
        damaging(&switch, HEAL, CallKind::Answer, u32::MAX, |_, _| true);
        scrubbed(&members).await;
        let (first, second) = (volume(&members[0]), volume(&members[1]));
        assert!(second.data().health().bad_blocks > 0, "its page is distrusted");
        members.remove(2).host.stop().await;
        flip(&file_in(place.path(), 1, index, "home"), 4);
        *switch.damage.borrow_mut() = None;
        first.data().read(range(4, 1)).await.expect_err("it has rotted");
        until("the first is healed by the second", || first.data().health().healed_blocks == 1).await;
        members[1].host.scrub_now(GROUP);
        until("the second is healed by the first", || second.data().health().bad_blocks == 0).await;
        for member in &members {
            assert!(shown(member, View::Head, 3, 1).await == block(5, 1));
            assert!(shown(member, View::Head, 4, 4).await == block(8, 4));
        }
        stop(&members).await;
    });
}

#[test]
fn a_rotten_block_that_the_head_hides_is_healed() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let switch = Rc::new(Switch::default());
        let members = members(place.path(), &switch).await;
        let Snapshotted { session, index } = snapshotted(&members).await;
        let homes = [1, 2].map(|number| file_of(place.path(), number, "home"));
        let good = homes.each_ref().map(|home| flip(home, 3));
        // Nor is it covered by what is on its way to the younger layer.
        session.write(range(3, 1), block(4, 1)).await.expect("writes");
        scrubbed(&members).await;
        for (at, home) in homes.iter().enumerate() {
            let health = volume(&members[at]).data().health();
            assert_eq!((health.found_blocks, health.healed_blocks, health.bad_blocks), (1, 1, 0));
            assert_eq!(bytes_at(home, 3), good[at]);
            assert!(shown(&members[at], View::Snapshot(index), 0, 8).await == block(7, 8));
        }
        stop(&members).await;
    });
}

/// The leader's disk has lost a block of a frozen layer, where no reader looks. `heals` if others can give it to the
/// leader.
fn rebuild_from_a_rotten_leader(heals: bool) {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let switch = Rc::new(Switch::default());
        let mut members = members(place.path(), &switch).await;
        all_home(&members).await;
        let third = members.remove(2);
        third.host.stop().await;
        drop(third);
        let Snapshotted { session, index } = snapshotted(&members).await;
        flip(&file_of(place.path(), 1, "home"), 3);
        // More than the journal holds.
        let purged = || volume(&members[0]).group().report().purged;
        let before = volume(&members[0]).group().report().last_log;
        let fill = async {
            let mut at = 0u64;
            while purged() <= before {
                session.write(range(at % 32 * 256, 256), block(at as u8, 256)).await.expect("writes");
                at += 1;
            }
        };
        holdfast_env::timeout(3 * LONG, fill).await.expect("the log is purged");
        if !heals {
            damaging(&switch, HEAL, CallKind::Answer, u32::MAX, |_, to| to == StoreId(1));
        }
        members.push(start(place.path(), &switch, 3, false).await);
        let third = volume(&members[2]);
        let last = volume(&members[0]).group().report().last_log;
        within(third.group().position().reached(last)).await;
        assert!(third.healed_by_chunks() > 0);
        assert!(shown(&members[2], View::Snapshot(index), 0, 8).await == block(7, 8));
        if !heals {
            assert_eq!(volume(&members[0]).data().health().healed_blocks, 0);
            *switch.damage.borrow_mut() = None;
        }
        until("the leader is healed", || volume(&members[0]).data().health().healed_blocks == 1).await;
        assert!(all_equal(&members).await);
        for member in &members {
            assert!(shown(member, View::Snapshot(index), 0, 8).await == block(7, 8));
        }
        stop(&members).await;
    });
}

#[test]
fn a_leader_with_rot_that_the_head_hides_heals_it_and_rebuilds_others() {
    rebuild_from_a_rotten_leader(true);
}

#[test]
fn a_rebuild_takes_from_others_what_its_source_cannot_give() {
    rebuild_from_a_rotten_leader(false);
}

/// Of the frozen layer, of the newest, and of one that is being merged, whose snapshot was dropped.
#[test]
fn lost_pages_of_layers_come_back_from_the_others() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let switch = Rc::new(Switch::default());
        let mut members = members(place.path(), &switch).await;
        let Snapshotted { session, index } = snapshotted(&members).await;
        let second = snapshot(&members[0], 2).await;
        session.write(range(4, 8), block(3, 8)).await.expect("writes");
        all_home(&members).await;
        session.detach(LONG).await.expect("detaches");
        drop(session);
        all_home(&members).await;
        members[1].host.stop().await;
        for layer in [LogIndex::ZERO, index, second] {
            let table = file_in(place.path(), 2, layer, "table");
            (0..2).for_each(|copy| _ = flip(&table, copy));
        }
        let dropped = VolumeCommand::DropSnapshot { id: SnapshotId(2) };
        control(&members[0], dropped).await;
        again(place.path(), &switch, &mut members, 2).await;
        let healer = volume(&members[1]);
        let last = volume(&members[0]).group().report().last_log;
        within(healer.group().position().reached(last)).await;
        scrubbed(&members).await;
        until("they are healed", || healer.data().health().bad_blocks == 0).await;
        until("it is merged", || healer.data().pieces() == 2).await;
        assert_eq!(healer.fault(), None);
        let session = attach(&members[1], false).await.expect("attaches");
        session.write(range(2, 1), block(5, 1)).await.expect("writes");
        assert!(all_equal(&members).await);
        let head = [block(8, 2), block(5, 1), block(8, 1), block(3, 8)].concat();
        for member in &members {
            assert!(shown(member, View::Head, 0, 12).await == head);
            assert!(shown(member, View::Snapshot(index), 0, 8).await == block(7, 8));
        }
        stop(&members).await;
    });
}
