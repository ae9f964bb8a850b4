//! Log entries that rot while their replica is away (docs/FAULTS.md, rows 5 to 7). What may have been acknowledged is
//! never cut: the replica does not run before its peers have given it what it cannot read, and then runs on under its
//! old id. Where nobody can, the volume waits.

mod group;

use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::rc::Rc;

use group::steps::{Outcome, at, attached, expect, leads, runs, test, until, within, write};
use group::{GROUP, Member, Switch, block, first_leads, members, start};
use holdfast_replica::Faulty;
use holdfast_replica::repair::RepairUsage;
use holdfast_session::Session;
use holdfast_types::{BLOCK_BYTES, BlockIndex, BlockRange, LogIndex, ReplicaId, StoreId};

fn cut(switch: &Switch, number: u64) {
    for other in (1..=3).filter(|other| *other != number) {
        let (one, other) = (StoreId(number.into()), StoreId(other.into()));
        switch.cut.borrow_mut().extend([(one, other), (other, one)]);
    }
}

/// Ends a daemon whose journal says that everything in it was flushed: what rots then is no torn tail.
async fn stop(member: Member) -> Outcome<()> {
    member.host.stop().await;
    until("the closing mark", || member.host.journal().is_marked()).await
}

/// Flips a bit in every block of a member's journal that is full of `value`.
fn rot(place: &Path, number: u64, value: u8) -> usize {
    let directory = place.join(format!("n{number}")).join("journal");
    let (mut flipped, whole) = (0, block(value, 1));
    for entry in std::fs::read_dir(directory).expect("lists") {
        let path = entry.expect("an entry").path();
        let file = std::fs::File::options().read(true).write(true).open(&path).expect("opens");
        let mut bytes = std::fs::read(&path).expect("reads");
        for (number, data) in (0u64..).zip(bytes.chunks_exact_mut(BLOCK_BYTES)) {
            if *data == *whole {
                data[100] ^= 4;
                file.write_all_at(data, number * BLOCK_BYTES as u64).expect("writes");
                flipped += 1;
            }
        }
    }
    flipped
}

fn damage(member: &Member) -> Option<Faulty> {
    member.host.faulty().into_iter().next()
}

fn says(member: &Member, what: &str) -> bool {
    damage(member).is_some_and(|faulty| faulty.why.contains(what))
}

async fn equal(members: &[&Member]) -> Outcome<()> {
    let volumes: Vec<_> = members.iter().map(|member| member.host.volume(GROUP).expect("runs")).collect();
    let highest = volumes.iter().map(|volume| volume.group().position().applied_index()).max();
    let mut digests = BTreeSet::new();
    for volume in volumes {
        let reached = volume.group().position().reached(highest.unwrap_or_default());
        within(20, "a replica catches up", reached).await?;
        let digest = volume.data().digest().await.map_err(|error| error.to_string())?;
        if digest.bad_blocks > 0 {
            return Err(format!("{} bad blocks", digest.bad_blocks));
        }
        digests.insert(digest.to_string());
    }
    if digests.len() == 1 { Ok(()) } else { Err(format!("the replicas differ: {digests:?}")) }
}

/// Ends a session without a word, as a killed daemon does.
fn abort(session: Rc<Session>) {
    session.abort();
}

/// Row 5.
#[test]
fn a_rotten_entry_in_the_middle_is_repaired_in_place_and_the_volume_stays_up() {
    test(async |place| {
        let switch = Rc::new(Switch::default());
        let mut group = members(place, &switch).await;
        within(20, "the first member leads", first_leads(&group)).await?;
        let session = attached(&group[0]).await?;
        for number in 1..=20 {
            write(&session, number, number as u8 + 100).await?;
        }
        until("the third replica has everything", || {
            let log = |member: &Member| member.host.volume(GROUP).expect("runs").log().clone();
            log(&group[2]).flushed() >= log(&group[0]).last().expect("entries").index
        })
        .await?;
        stop(group.remove(2)).await?;
        assert_eq!(rot(place, 3, 107), 1);
        assert_eq!(rot(place, 3, 112), 1);
        cut(&switch, 3);
        let third = start(place, &switch, 3, false).await;
        until("it says what is wrong", || says(&third, "1, 2 do not answer")).await?;
        let faulty = damage(&third).expect("it is damaged");
        assert!(faulty.repairing && faulty.why.contains("2 log entries"), "{faulty:?}");
        assert!(!runs(&third), "it runs on entries that it cannot read");
        write(&session, 21, 121).await?;
        switch.cut.borrow_mut().clear();
        until("it runs again", || runs(&third)).await?;
        assert_eq!(third.host.repaired(), RepairUsage { entries: 2, bytes: 8192, dropped: 0 });
        assert_eq!(
            (damage(&third), third.host.volume(GROUP).expect("runs").group().id().replica),
            (None, ReplicaId(3))
        );
        write(&session, 22, 122).await?;
        for number in 1..=22 {
            expect(&session, number, number as u8 + 100).await?;
        }
        equal(&[&group[0], &group[1], &third]).await?;
        // Once more from its own journal: the repair lasts, and the third is as good as any.
        abort(session);
        stop(third).await?;
        stop(group.remove(1)).await?;
        let third = start(place, &switch, 3, false).await;
        assert!(runs(&third) && damage(&third).is_none(), "{:?}", damage(&third));
        let session = attached(&group[0]).await?;
        for number in 1..=22 {
            expect(&session, number, number as u8 + 100).await?;
        }
        equal(&[&group[0], &third]).await
    });
}

/// A and B commit, C is away; B stops, its last entry rots, A dies. B and C must not lose it.
async fn last_acknowledged(place: &Path) -> Outcome<()> {
    let switch = Rc::new(Switch::default());
    let mut group = members(place, &switch).await;
    within(20, "the first member leads", first_leads(&group)).await?;
    let session = attached(&group[0]).await?;
    write(&session, 1, 101).await?;
    cut(&switch, 3);
    write(&session, 1, 102).await?;
    abort(session);
    let (first, second) = (group.remove(0), group.remove(0));
    let c = &group[0];
    stop(second).await?;
    assert_eq!(rot(place, 2, 102), 1);
    stop(first).await?;
    switch.cut.borrow_mut().clear();
    let b = start(place, &switch, 2, false).await;
    until("B says that it is damaged, or runs", || runs(&b) || says(&b, "1 do not answer")).await?;
    if runs(&b) {
        // It should not: show what comes of it.
        let session = attached(c).await?;
        expect(&session, 1, 102).await?;
        return Err("B runs with an entry that it cannot read".into());
    }
    if leads(c) {
        return Err("C leads without what was acknowledged".into());
    }
    let a = start(place, &switch, 1, false).await;
    until("B runs again", || runs(&b)).await?;
    assert_eq!(b.host.repaired().bytes, 4096);
    let session = attached(c).await?;
    expect(&session, 1, 102).await?;
    equal(&[&a, &b, c]).await
}

/// Row 6.
#[test]
fn a_rotten_last_acknowledged_entry_is_no_torn_tail_and_is_not_lost() {
    test(last_acknowledged);
}

#[test]
fn a_recovery_that_cuts_what_rotted_loses_the_write_and_is_noticed() {
    holdfast_store::testing::plant(&["cut-faulty-entry"]);
    let place = tempfile::tempdir().expect("a place");
    let result = holdfast_env::real::run(async { last_acknowledged(place.path()).await });
    holdfast_store::testing::plant(&[]);
    let why = result.expect_err("a write was forgotten and nothing was noticed");
    println!("with a recovery that cuts: {why}");
    assert!(why.contains("an acknowledged write was lost"), "it fails for another reason: {why}");
}

/// Row 7.
#[test]
fn an_entry_that_rotted_on_a_quorum_halts_the_volume_and_is_not_made_up() {
    test(async |place| {
        let switch = Rc::new(Switch::default());
        let mut group = members(place, &switch).await;
        within(20, "the first member leads", first_leads(&group)).await?;
        let session = attached(&group[0]).await?;
        cut(&switch, 3);
        write(&session, 1, 102).await?;
        abort(session);
        let (first, second) = (group.remove(0), group.remove(0));
        stop(second).await?;
        stop(first).await?;
        assert_eq!((rot(place, 1, 102), rot(place, 2, 102)), (1, 1));
        switch.cut.borrow_mut().clear();
        let a = start(place, &switch, 1, false).await;
        let b = start(place, &switch, 2, false).await;
        let c = &group[0];
        for member in [&a, &b] {
            until("it says that nobody can read it", || says(member, "nothing is made up")).await?;
            assert!(damage(member).is_some_and(|faulty| faulty.repairing), "it is not to be replaced");
        }
        assert!(!runs(&a) && !runs(&b) && !leads(c), "somebody runs without what was acknowledged");
        // A copy that can be read turns up: a bit is put right again.
        stop(a).await?;
        let again = rot_back(place, 1, 102);
        assert_eq!(again, 1);
        let a = start(place, &switch, 1, false).await;
        until("both run again", || runs(&a) && runs(&b)).await?;
        let session = attached(c).await?;
        expect(&session, 1, 102).await?;
        equal(&[&a, &b, c]).await
    });
}

/// Undoes [`rot`].
fn rot_back(place: &Path, number: u64, value: u8) -> usize {
    let directory = place.join(format!("n{number}")).join("journal");
    let mut mended = 0;
    for entry in std::fs::read_dir(directory).expect("lists") {
        let path = entry.expect("an entry").path();
        let file = std::fs::File::options().read(true).write(true).open(&path).expect("opens");
        let bytes = std::fs::read(&path).expect("reads");
        for (number, data) in (0u64..).zip(bytes.chunks_exact(BLOCK_BYTES)) {
            let is_it = data[100] == value ^ 4 && data.iter().filter(|byte| **byte != value).count() == 1;
            if is_it {
                file.write_all_at(&[value], number * BLOCK_BYTES as u64 + 100).expect("writes");
                mended += 1;
            }
        }
    }
    mended
}

#[test]
fn two_damaged_replicas_repair_each_other() {
    test(async |place| {
        let switch = Rc::new(Switch::default());
        let mut group = members(place, &switch).await;
        within(20, "the first member leads", first_leads(&group)).await?;
        let session = attached(&group[0]).await?;
        cut(&switch, 3);
        for number in 1..=4 {
            write(&session, number, number as u8 + 100).await?;
        }
        abort(session);
        let (first, second) = (group.remove(0), group.remove(0));
        stop(second).await?;
        stop(first).await?;
        assert_eq!((rot(place, 1, 102), rot(place, 2, 103)), (1, 1));
        let a = start(place, &switch, 1, false).await;
        let b = start(place, &switch, 2, false).await;
        until("both run again", || runs(&a) && runs(&b)).await?;
        let session = attached(&a).await?;
        for number in 1..=4 {
            expect(&session, number, number as u8 + 100).await?;
        }
        switch.cut.borrow_mut().clear();
        equal(&[&a, &b, &group[0]]).await
    });
}

/// The old leader alone has the entry, which nobody else ever saw: the others say so and vote in a higher term.
#[test]
fn a_rotten_entry_that_cannot_have_been_committed_is_dropped_on_a_nack_quorum() {
    test(async |place| {
        let switch = Rc::new(Switch::default());
        let mut group = members(place, &switch).await;
        within(20, "the first member leads", first_leads(&group)).await?;
        let session = attached(&group[0]).await?;
        write(&session, 1, 101).await?;
        cut(&switch, 1);
        let log = group[0].host.volume(GROUP).expect("runs").log().clone();
        let last = |log: &holdfast_store::journal::GroupLog| log.last().map_or(LogIndex::ZERO, |id| id.index);
        let before = last(&log);
        let pending = {
            let session = session.clone();
            holdfast_env::spawn("write", async move { session.write(at(2), block(99, 1)).await })
        };
        until("the entry is durable on the old leader", || {
            last(&log) > before && log.flushed() == last(&log)
        })
        .await?;
        abort(session);
        drop(pending);
        until("another leads", || group[1..].iter().any(leads)).await?;
        let first = group.remove(0);
        stop(first).await?;
        assert_eq!(rot(place, 1, 99), 1);
        let session = attached(&group[0]).await?;
        write(&session, 2, 50).await?;
        switch.cut.borrow_mut().clear();
        let a = start(place, &switch, 1, false).await;
        until("it runs again", || runs(&a)).await?;
        let repaired = a.host.repaired();
        assert!(repaired.dropped >= 1 && repaired.entries == 0, "{repaired:?}");
        expect(&session, 1, 101).await?;
        expect(&session, 2, 50).await?;
        equal(&[&group[0], &group[1], &a]).await
    });
}

#[test]
fn a_rotten_entry_that_the_others_have_purged_gives_the_replica_up_with_the_reason() {
    test(async |place| {
        let switch = Rc::new(Switch::default());
        let mut group = members(place, &switch).await;
        within(20, "the first member leads", first_leads(&group)).await?;
        let session = attached(&group[0]).await?;
        write(&session, 1, 101).await?;
        let log = |member: &Member| member.host.volume(GROUP).expect("runs").log().clone();
        until("the third replica has it", || {
            log(&group[2]).flushed() >= log(&group[0]).last().expect("one").index
        })
        .await?;
        stop(group.remove(2)).await?;
        assert_eq!(rot(place, 3, 101), 1);
        // Three times the journal of 24 MiB.
        for round in 0..72u64 {
            let range = BlockRange::new(BlockIndex(256 * (round % 8)), 256);
            let written = within(20, "a write", session.write(range, block(round as u8, 256))).await?;
            written.map_err(|error| error.to_string())?;
        }
        until("the others have purged it", || group.iter().all(|member| log(member).purged().is_some()))
            .await?;
        let third = start(place, &switch, 3, false).await;
        until("it is given up", || damage(&third).is_some_and(|faulty| !faulty.repairing)).await?;
        assert!(says(&third, "have purged them") && !runs(&third), "{:?}", damage(&third));
        Ok(())
    });
}
