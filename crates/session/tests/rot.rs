//! Blocks that rot on one replica's disk, that its disk does not give, and bits that flip between the session and the
//! disks (INV-CHECKED, INV-HEAL), found by readers or by the scrub: nobody reads anything wrong, and what is bad is healed from the others.

mod group;

use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;

use group::damage::{
    LONG, SCRUB, again, all_equal, all_home, bytes_at, damaging, file_of, flip, put_bytes, range, stop,
    until, volume, within,
};
use group::unreadable::Unreadable;
use group::{GROUP, Member, Switch, attach, begin, block, first_leads, members, start, start_on};
use holdfast_protocol::planted::plant;
use holdfast_session::Session;
use holdfast_types::StoreId;
use holdfast_wire::rpc::{CallKind, Service};

/// Of the services of docs/wire.md.
const RAFT: Service = holdfast_replica::messages::RAFT;
const DATA: Service = holdfast_replica::messages::DATA;
const HEAL: Service = holdfast_replica::messages::HEAL;
const REBUILD: Service = holdfast_replica::messages::REBUILD;

async fn written(members: &[Member]) -> Rc<Session> {
    within(first_leads(members)).await;
    let session = attach(&members[1], false).await.expect("attaches");
    session.write(range(0, 8), block(7, 8)).await.expect("writes");
    session.write(range(100, 8), block(9, 8)).await.expect("writes");
    all_home(members).await;
    session
}

#[test]
fn a_rotten_block_is_read_elsewhere_and_healed_in_place() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let switch = Rc::new(Switch::default());
        let members = members(place.path(), &switch).await;
        let session = written(&members).await;
        let homes: Vec<PathBuf> = (1..=3).map(|n| file_of(place.path(), n, "home")).collect();
        let others: Vec<Vec<u8>> = homes.iter().map(|home| std::fs::read(home).expect("is read")).collect();
        let good = flip(&homes[1], 3);
        assert_eq!(within(session.read(range(0, 8))).await.expect("reads"), block(7, 8));
        let second = volume(&members[1]);
        until("it is healed", || second.data().health().healed_blocks == 1).await;
        assert_eq!(bytes_at(&homes[1], 3), good, "home holds it again");
        let health = second.data().health();
        assert_eq!((health.found_blocks, health.bad_blocks), (1, 0));
        for (n, (home, before)) in homes.iter().zip(&others).enumerate() {
            assert_eq!(&std::fs::read(home).expect("is read"), before, "home of replica {}", n + 1);
        }
        for other in [0, 2] {
            assert_eq!(volume(&members[other]).data().health(), Default::default());
        }
        // The reader beside it is answered by it again.
        let before = second.data().usage().home_bytes_read;
        assert_eq!(within(session.read(range(0, 8))).await.expect("reads"), block(7, 8));
        assert!(second.data().usage().home_bytes_read > before);
        stop(&members).await;
    });
}

/// The leader has nobody before it in line, and is asked first by those who have no replica.
#[test]
fn a_leader_that_cannot_read_a_block_is_no_end_of_it() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let switch = Rc::new(Switch::default());
        let members = members(place.path(), &switch).await;
        let session = written(&members).await;
        for number in [1, 2] {
            flip(&file_of(place.path(), number, "home"), 3);
        }
        assert_eq!(within(session.read(range(0, 8))).await.expect("reads"), block(7, 8));
        for at in [0, 1] {
            let volume = volume(&members[at]);
            until("it is healed", || volume.data().health().healed_blocks == 1).await;
        }
        stop(&members).await;
    });
}

#[test]
fn a_block_that_the_disk_does_not_give_is_read_elsewhere_and_written_anew() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let switch = Rc::new(Switch::default());
        let unreadable = Unreadable::default();
        let mut members = Vec::new();
        for number in 1..=3 {
            let path = place.path().join(format!("n{number}"));
            let wrap = |inner| if number == 2 { unreadable.over(inner) } else { inner };
            members.push(start_on(&path, &switch, number, true, wrap).await);
        }
        begin(&members).await;
        let session = written(&members).await;
        unreadable.make("home", 3);
        assert_eq!(within(session.read(range(0, 8))).await.expect("reads"), block(7, 8));
        let second = volume(&members[1]);
        until("it is healed", || second.data().health().healed_blocks == 1).await;
        assert!(second.data().usage().read_errors > 0);
        assert_eq!(second.data().health().bad_blocks, 0);
        assert!(!unreadable.any(), "it was written anew");
        assert_eq!(second.fault(), None);
        stop(&members).await;
    });
}

/// Both copies of a page: what its chunks hold only the other replicas know.
#[test]
fn a_lost_page_of_the_table_comes_back_from_the_others() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let switch = Rc::new(Switch::default());
        let mut members = members(place.path(), &switch).await;
        let session = written(&members).await;
        let table = file_of(place.path(), 2, "table");
        session.detach(LONG).await.expect("detaches");
        members[1].host.stop().await;
        (0..2).for_each(|copy| _ = flip(&table, copy));
        // What memory knows of the page goes with the daemon.
        again(place.path(), &switch, &mut members, 2).await;
        let session = attach(&members[1], false).await.expect("attaches");
        let second = volume(&members[1]);
        // Until then it sends readers elsewhere and finds nothing.
        within(second.group().position().reached(volume(&members[0]).group().report().last_log)).await;
        assert_eq!(within(session.read(range(0, 8))).await.expect("reads"), block(7, 8));
        until("it is healed", || second.data().health().healed_pages == 1).await;
        assert_eq!(second.data().health().bad_blocks, 0);
        // And the page takes what is written from then on.
        session.write(range(2, 1), block(5, 1)).await.expect("writes");
        all_home(&members).await;
        assert_eq!(second.fault(), None);
        let digest = async |at: usize| volume(&members[at]).data().digest().await.expect("is read");
        let first = digest(0).await;
        assert_eq!((digest(1).await, digest(2).await), (first, first));
        assert_eq!(first.bad_blocks, 0);
        stop(&members).await;
    });
}

/// The cleaner meets the lost page before any reader does: it waits, and the replica is not given up.
#[test]
fn a_cleaner_that_meets_a_lost_page_waits_until_it_is_healed() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let switch = Rc::new(Switch::default());
        let mut members = members(place.path(), &switch).await;
        let session = written(&members).await;
        let table = file_of(place.path(), 3, "table");
        members[2].host.stop().await;
        (0..2).for_each(|copy| _ = flip(&table, copy));
        again(place.path(), &switch, &mut members, 3).await;
        session.write(range(2, 1), block(5, 1)).await.expect("writes");
        let third = volume(&members[2]);
        // Quiet for some seconds, it is cleaned.
        until("it is cleaned", || third.data().health().healed_pages == 1 && !third.data().dirty().any).await;
        assert_eq!(third.fault(), None);
        stop(&members).await;
    });
}

#[test]
fn a_bit_that_flips_between_the_session_and_the_leader_costs_a_repetition() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let switch = Rc::new(Switch::default());
        let members = members(place.path(), &switch).await;
        let session = written(&members).await;
        let damaged = damaging(&switch, DATA, CallKind::Request, 2, |from, to| from != to);
        within(session.write(range(20, 2), block(3, 2))).await.expect("is repeated until it comes whole");
        assert_eq!(damaged.get(), 2);
        *switch.damage.borrow_mut() = None;
        assert_eq!(within(session.read(range(20, 2))).await.expect("reads"), block(3, 2));
        assert!(all_equal(&members).await);
        stop(&members).await;
    });
}

#[test]
fn a_bit_that_flips_between_the_leader_and_a_follower_is_not_stored() {
    for (planted, equal) in [(vec![], true), (vec!["damaged-in-flight"], false)] {
        let place = tempfile::tempdir().expect("a place");
        holdfast_env::real::run(async {
            let switch = Rc::new(Switch::default());
            let members = members(place.path(), &switch).await;
            let session = written(&members).await;
            plant(&planted);
            let damaged = damaging(&switch, RAFT, CallKind::Request, 1, |_, to| to == StoreId(3));
            within(session.write(range(20, 2), block(3, 2))).await.expect("writes");
            until("a bit flips", || damaged.get() == 1).await;
            *switch.damage.borrow_mut() = None;
            if equal {
                assert!(all_equal(&members).await);
            } else {
                // What was stored is found when it is moved home, at the latest.
                let last = volume(&members[0]).group().report().last_log;
                let third = volume(&members[2]);
                within(third.group().position().reached(last)).await;
                within(third.data().clean(third.group().machine())).await.expect_err("it is damaged");
            }
            plant(&[]);
            stop(&members).await;
        });
    }
}

#[test]
fn a_bit_that_flips_between_a_replica_and_the_session_is_not_read() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let switch = Rc::new(Switch::default());
        let members = members(place.path(), &switch).await;
        let session = written(&members).await;
        let damaged = damaging(&switch, DATA, CallKind::Answer, 3, |_, to| to == StoreId(2));
        assert_eq!(within(session.read(range(0, 8))).await.expect("reads"), block(7, 8));
        assert_eq!(damaged.get(), 3, "each of them was asked");
        stop(&members).await;
    });
}

#[test]
fn a_bit_that_flips_while_a_block_is_healed_is_not_written() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let switch = Rc::new(Switch::default());
        let members = members(place.path(), &switch).await;
        let session = written(&members).await;
        let home = file_of(place.path(), 2, "home");
        let good = flip(&home, 3);
        // Of both peers; after a second it is tried again.
        let damaged = damaging(&switch, HEAL, CallKind::Answer, 2, |_, _| true);
        assert_eq!(within(session.read(range(0, 8))).await.expect("reads"), block(7, 8));
        let second = volume(&members[1]);
        until("both were damaged", || damaged.get() == 2).await;
        until("it is healed", || second.data().health().healed_blocks == 1).await;
        assert_eq!(bytes_at(&home, 3), good);
        stop(&members).await;
    });
}

#[test]
fn a_bit_that_flips_during_a_rebuild_is_not_taken() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let switch = Rc::new(Switch::default());
        let mut members = members(place.path(), &switch).await;
        let session = written(&members).await;
        let third = members.remove(2);
        third.host.stop().await;
        drop(third);
        // More than the journal holds.
        let purged = || volume(&members[0]).group().report().purged;
        let before = volume(&members[0]).group().report().last_log;
        let written = RefCell::new(0u64);
        let fill = async {
            while purged() <= before {
                let at = *written.borrow() % 32;
                session.write(range(at * 256, 256), block(at as u8, 256)).await.expect("writes");
                *written.borrow_mut() += 1;
            }
        };
        holdfast_env::timeout(3 * LONG, fill).await.expect("the log is purged");
        let damaged = damaging(&switch, REBUILD, CallKind::Answer, 1, |_, _| true);
        members.push(start(place.path(), &switch, 3, false).await);
        let third = volume(&members[2]);
        until("a bit flips", || damaged.get() == 1).await;
        until("it is rebuilt", || third.healed_by_chunks() > 0).await;
        assert!(all_equal(&members).await);
        stop(&members).await;
    });
}

#[test]
fn cold_rot_is_found_by_the_scrub() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let switch = Rc::new(Switch::default());
        let members = members(place.path(), &switch).await;
        let _session = written(&members).await;
        let home = file_of(place.path(), 3, "home");
        let good = [flip(&home, 3), flip(&home, 102)];
        let whole = flip(&file_of(place.path(), 3, "table"), 1);
        members.iter().for_each(|member| member.host.start_scrub(SCRUB));
        for member in &members {
            let volume = volume(member);
            until("a pass ends", || volume.scrub_progress().passes == 1).await;
            assert_eq!(volume.scrub_progress().unsettled, 0);
        }
        let third = volume(&members[2]).data().health();
        assert_eq!((third.found_blocks, third.healed_blocks, third.healed_pages), (2, 2, 1));
        assert_eq!([bytes_at(&home, 3), bytes_at(&home, 102)], good);
        assert_eq!(bytes_at(&file_of(place.path(), 3, "table"), 1), whole);
        for other in [0, 1] {
            assert_eq!(volume(&members[other]).data().health(), Default::default());
        }
        // Asked for, it looks again at once.
        members[2].host.scrub_now(GROUP);
        let third = volume(&members[2]);
        until("another pass ends", || third.scrub_progress().passes == 2).await;
        assert_eq!(third.data().health().found_blocks, 2);
        stop(&members).await;
    });
}

/// The disk reported the writes of a block and of its page in the table and dropped them all: what is left is old and
/// true to itself.
#[test]
fn a_lost_write_whose_table_was_lost_with_it_is_found_by_comparison() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let switch = Rc::new(Switch::default());
        let mut members = members(place.path(), &switch).await;
        let session = written(&members).await;
        let (home, table) = (file_of(place.path(), 2, "home"), file_of(place.path(), 2, "table"));
        let old = [bytes_at(&home, 3), bytes_at(&table, 0), bytes_at(&table, 1)];
        session.write(range(3, 1), block(5, 1)).await.expect("writes");
        all_home(&members).await;
        // The checkpoint after that says nothing of the page any more.
        session.write(range(12_800, 1), block(6, 1)).await.expect("writes");
        all_home(&members).await;
        session.detach(LONG).await.expect("detaches");
        all_home(&members).await;
        members[1].host.stop().await;
        put_bytes(&home, 3, &old[0]);
        (0..2).for_each(|copy| put_bytes(&table, copy, &old[1 + copy as usize]));
        again(place.path(), &switch, &mut members, 2).await;
        assert!(!all_equal(&members).await, "nothing is wrong: this shows nothing");
        let second = volume(&members[1]);
        assert_eq!(second.data().digest().await.expect("is read").bad_blocks, 0, "no checksum shows it");
        members.iter().for_each(|member| member.host.start_scrub(SCRUB));
        for member in &members {
            let volume = volume(member);
            until("a pass ends", || volume.scrub_progress().passes == 1).await;
        }
        assert!(all_equal(&members).await);
        assert_eq!(second.data().health().replaced_chunks, 1);
        for other in [0, 2] {
            assert_eq!(volume(&members[other]).data().health().replaced_chunks, 0);
        }
        let session = attach(&members[1], false).await.expect("attaches");
        assert_eq!(within(session.read(range(3, 1))).await.expect("reads"), block(5, 1));
        stop(&members).await;
    });
}

/// Writes go on all the while: nothing is taken for wrong that is only not there yet.
#[test]
fn a_scrub_under_writes_replaces_nothing() {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let switch = Rc::new(Switch::default());
        let members = members(place.path(), &switch).await;
        let session = written(&members).await;
        members.iter().for_each(|member| member.host.start_scrub(SCRUB));
        let mut at = 0u64;
        let passed =
            |members: &[Member]| members.iter().all(|member| volume(member).scrub_progress().passes >= 3);
        while !passed(&members) {
            within(session.write(range(at % 4096, 4), block(at as u8, 4))).await.expect("writes");
            at += 37;
            for member in &members {
                let progress = volume(member).scrub_progress();
                if progress.chunk == 0 && progress.passes < 3 {
                    member.host.scrub_now(GROUP);
                }
            }
        }
        assert!(all_equal(&members).await);
        for member in &members {
            assert_eq!(volume(member).data().health(), Default::default());
        }
        stop(&members).await;
    });
}
