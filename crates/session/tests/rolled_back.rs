//! INV-ROLLBACK: an older copy of a store is put back (docs/FAULTS.md, row 36). Its replica has forgotten votes and
//! entries that it had acknowledged, and knows nothing of that; the others do. It must not run, and nothing is lost.
//! Where nothing was put back, everybody comes back unaided.

mod group;

use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use group::steps::{Outcome, attached, copy, expect, leads, runs, test, until, within, write};
use group::{GROUP, Member, Switch, first_leads, members, start, start_on};
use holdfast_env::disk::Directory;
use holdfast_env::net::Frame;
use holdfast_env::real::powercut::{Mode, PowerCutDirectory};
use holdfast_protocol::planted;
use holdfast_replica::messages;
use holdfast_types::{ReplicaId, StoreId};
use holdfast_wire::rpc::CallHead;

/// Why its replica does not run, and whether it is to be replaced.
fn fault(member: &Member) -> Option<(String, bool)> {
    member.host.faulty().into_iter().next().map(|faulty| (faulty.why, !faulty.repairing))
}

fn is_refused(member: &Member) -> bool {
    fault(member).is_some_and(|(why, is_given_up)| is_given_up && why.contains("rolled back"))
}

/// Everything that the first has is durable on the other.
async fn has_everything(first: &Member, other: &Member) -> Outcome<()> {
    let log = |member: &Member| member.host.volume(GROUP).expect("runs").log().clone();
    until("a follower has everything", || log(other).flushed() >= log(first).last().expect("entries").index)
        .await
}

/// Keeps a copy of a stopped member's directory.
fn keep(place: &Path, number: u64) {
    copy(&place.join(format!("n{number}")), &place.join("copy"));
}

/// Puts the copy back in place of what the member's directory holds.
fn put_back(place: &Path, number: u64) {
    let own = place.join(format!("n{number}"));
    std::fs::remove_dir_all(&own).expect("removes what is there");
    std::fs::rename(place.join("copy"), &own).expect("moves the copy");
}

async fn stop(member: Member) {
    member.host.stop().await;
}

/// Stops a member, copies what it has, and starts it again.
async fn copied(place: &Path, switch: &Rc<Switch>, group: &mut Vec<Member>, number: u64) -> Outcome<()> {
    let at = number as usize - 1;
    let member = group.remove(at);
    member.host.stop().await;
    until("the closing mark", || member.host.journal().is_marked()).await?;
    drop(member);
    keep(place, number);
    group.insert(at, start(place, switch, number, false).await);
    Ok(())
}

#[test]
fn a_replica_that_was_put_back_is_refused_for_good_and_the_volume_stays_up() {
    test(async |place| {
        let switch = Rc::new(Switch::default());
        let mut group = members(place, &switch).await;
        within(20, "the first member leads", first_leads(&group)).await?;
        let session = attached(&group[0]).await?;
        for number in 1..=5 {
            write(&session, number, number as u8 + 100).await?;
        }
        has_everything(&group[0], &group[2]).await?;
        copied(place, &switch, &mut group, 3).await?;
        assert!(runs(&group[2]), "nothing was put back yet: {:?}", fault(&group[2]));
        for number in 6..=10 {
            write(&session, number, number as u8 + 100).await?;
        }
        has_everything(&group[0], &group[2]).await?;
        stop(group.remove(2)).await;
        put_back(place, 3);
        let third = start(place, &switch, 3, false).await;
        until("it is refused", || is_refused(&third)).await?;
        let (why, _) = fault(&third).expect("it says why");
        println!("{why}");
        assert!(!runs(&third) && why.contains("it had acknowledged entries up to"), "{why}");
        write(&session, 11, 111).await?;
        for number in 1..=11 {
            expect(&session, number, number as u8 + 100).await?;
        }
        // Whoever knew it is away: it was noted.
        stop(third).await;
        session.abort();
        let first = group.remove(0);
        stop(first).await;
        let third = start(place, &switch, 3, false).await;
        until("it is refused again", || is_refused(&third)).await?;
        assert!(!runs(&third) && !leads(&group[0]));
        Ok(())
    });
}

/// Drops Raft's calls of the first member on their way, and nothing else.
fn silence_raft_of_first(switch: &Switch) {
    let damage = |from: StoreId, _to: StoreId, frame: &mut Frame| {
        let is_raft = CallHead::read(&frame.head).is_some_and(|head| head.service == messages::RAFT);
        if from == StoreId(1) && is_raft {
            frame.head.truncate(1);
        }
    };
    *switch.damage.borrow_mut() = Some(Box::new(damage));
}

/// The first and the second acknowledge a write that the third has not; then the second is put back to before it, and
/// the third and it could elect a leader without the first.
async fn acknowledged_by_two(place: &Path) -> Outcome<()> {
    let switch = Rc::new(Switch::default());
    let mut group = members(place, &switch).await;
    within(20, "the first member leads", first_leads(&group)).await?;
    let session = attached(&group[0]).await?;
    write(&session, 1, 101).await?;
    has_everything(&group[0], &group[1]).await?;
    has_everything(&group[0], &group[2]).await?;
    copied(place, &switch, &mut group, 2).await?;
    for (from, to) in [(1u64, 3u64), (3, 1), (2, 3), (3, 2)] {
        switch.cut.borrow_mut().insert((StoreId(from.into()), StoreId(to.into())));
    }
    write(&session, 1, 102).await?;
    session.abort();
    silence_raft_of_first(&switch);
    stop(group.remove(1)).await;
    put_back(place, 2);
    switch.cut.borrow_mut().clear();
    let second = start(place, &switch, 2, false).await;
    until("it is refused, or runs", || runs(&second) || is_refused(&second)).await?;
    let third = group.remove(1);
    let first = group.remove(0);
    if runs(&second) {
        // It should not: show what comes of it.
        stop(first).await;
        let session = attached(&third).await?;
        expect(&session, 1, 102).await?;
        return Err("a replica runs that was put back".into());
    }
    *switch.damage.borrow_mut() = None;
    let session = attached(&third).await?;
    expect(&session, 1, 102).await?;
    write(&session, 2, 103).await?;
    drop(first);
    Ok(())
}

/// FAULTS row 15: a disk confirms flushes that it does not make, and then its power goes.
#[test]
fn a_disk_that_lied_about_its_flushes_costs_its_replica_and_no_write() {
    test(async |place| {
        let switch = Rc::new(Switch::default());
        let mut group = members(place, &switch).await;
        within(20, "the first member leads", first_leads(&group)).await?;
        let session = attached(&group[0]).await?;
        write(&session, 1, 101).await?;
        has_everything(&group[0], &group[2]).await?;
        stop(group.remove(2)).await;
        let lies = |inner| PowerCutDirectory::new(inner, Mode::Lie) as Rc<dyn Directory>;
        let third = start_on(&place.join("n3"), &switch, 3, false, lies).await;
        until("it runs", || runs(&third)).await?;
        for number in 2..=6 {
            write(&session, number, number as u8 + 100).await?;
        }
        has_everything(&group[0], &third).await?;
        stop(third).await;
        // Everything that it confirmed is gone; what was there before stands.
        let third = start(place, &switch, 3, false).await;
        until("it is refused", || is_refused(&third)).await?;
        write(&session, 7, 107).await?;
        for number in 1..=7 {
            expect(&session, number, number as u8 + 100).await?;
        }
        Ok(())
    });
}

#[test]
fn what_was_acknowledged_by_a_replica_that_was_put_back_is_not_lost() {
    test(acknowledged_by_two);
}

#[test]
fn without_the_question_an_acknowledged_write_is_lost_and_it_is_noticed() {
    planted::plant(&["run-rolled-back"]);
    let place = tempfile::tempdir().expect("a place");
    let result = holdfast_env::real::run(async { acknowledged_by_two(place.path()).await });
    planted::plant(&[]);
    let why = result.expect_err("INV-ROLLBACK is broken, and nothing was noticed");
    println!("without the question: {why}");
    assert!(why.contains("an acknowledged write was lost"), "it fails for another reason: {why}");
}

#[test]
fn what_the_leader_told_its_followers_counts_when_it_is_gone_and_they_have_restarted() {
    test(async |place| {
        let switch = Rc::new(Switch::default());
        let mut group = members(place, &switch).await;
        within(20, "the first member leads", first_leads(&group)).await?;
        let session = attached(&group[0]).await?;
        write(&session, 1, 101).await?;
        has_everything(&group[0], &group[1]).await?;
        copied(place, &switch, &mut group, 2).await?;
        write(&session, 1, 102).await?;
        session.abort();
        has_everything(&group[0], &group[1]).await?;
        has_everything(&group[0], &group[2]).await?;
        // The third is told, and writes it down, in the rounds that come.
        holdfast_env::sleep(Duration::from_secs(12)).await;
        stop(group.remove(0)).await;
        stop(group.remove(0)).await;
        stop(group.remove(0)).await;
        put_back(place, 2);
        let third = start(place, &switch, 3, false).await;
        let second = start(place, &switch, 2, false).await;
        until("it is refused", || is_refused(&second)).await?;
        let (why, _) = fault(&second).expect("it says why");
        assert!(why.contains("replica 3 knows it"), "{why}");
        assert!(!runs(&second));
        let first = start(place, &switch, 1, false).await;
        let session = attached(&first).await?;
        expect(&session, 1, 102).await?;
        drop(third);
        Ok(())
    });
}

#[test]
fn a_whole_group_that_restarts_comes_back_unaided() {
    test(async |place| {
        let switch = Rc::new(Switch::default());
        let group = members(place, &switch).await;
        within(20, "the first member leads", first_leads(&group)).await?;
        let session = attached(&group[0]).await?;
        for number in 1..=5 {
            write(&session, number, number as u8 + 100).await?;
        }
        session.abort();
        for member in group {
            stop(member).await;
        }
        let link = |from: u64, to: u64| (StoreId(from.into()), StoreId(to.into()));
        let links = [(1, 2), (2, 1), (1, 3), (3, 1), (2, 3), (3, 2)];
        switch.cut.borrow_mut().extend(links.map(|(from, to)| link(from, to)));
        let mut group = Vec::new();
        for number in 1..=3 {
            let member = start(place, &switch, number, false).await;
            let (why, is_given_up) = fault(&member).expect("it asks");
            assert!(!runs(&member) && !is_given_up && why.contains("do not answer"), "{why}");
            group.push(member);
        }
        switch.cut.borrow_mut().clear();
        until("all run", || group.iter().all(runs)).await?;
        let session = attached(&group[0]).await?;
        for number in 1..=5 {
            expect(&session, number, number as u8 + 100).await?;
        }
        write(&session, 6, 106).await
    });
}

#[test]
fn two_of_three_come_back_without_the_third() {
    test(async |place| {
        let switch = Rc::new(Switch::default());
        let group = members(place, &switch).await;
        within(20, "the first member leads", first_leads(&group)).await?;
        let session = attached(&group[0]).await?;
        write(&session, 1, 101).await?;
        session.abort();
        for member in group {
            stop(member).await;
        }
        let first = start(place, &switch, 1, false).await;
        assert!(!runs(&first), "it runs without a majority");
        let third = start(place, &switch, 3, false).await;
        until("both run", || runs(&first) && runs(&third)).await?;
        let session = attached(&first).await?;
        expect(&session, 1, 101).await?;
        write(&session, 2, 102).await?;
        assert_eq!(third.host.volume(GROUP).expect("runs").group().id().replica, ReplicaId(3));
        Ok(())
    });
}
