//! INV-TIMERS: the timers of a group change while it is written and read, replica by replica; what is acknowledged stays,
//! and nobody reads what is stale.

mod group;

use std::cell::Cell;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use group::stalling::Stall;
use group::steps::{Outcome, at, attached, expect, leads, test, until, within, write};
use group::{GROUP, Member, Switch, attach, begin, block, first_leads, members, start, start_on};
use holdfast_protocol::command::VolumeCommand;
use holdfast_protocol::planted;
use holdfast_protocol::timers::Timers;
use holdfast_protocol::volume::{Refusal, VolumeReply};
use holdfast_replica::messages::{DataReply, DataRequest};
use holdfast_replica::volume::Volume;
use holdfast_session::Session;
use holdfast_types::{LogIndex, StoreId};

fn timers(heartbeat_ms: u64) -> Timers {
    Timers::of_heartbeat(Duration::from_millis(heartbeat_ms))
}

fn volume(member: &Member) -> Rc<Volume> {
    member.host.volume(GROUP).expect("runs")
}

/// Has the leader carry out a command, whoever that is now, until it is done. Refusals that may end are waited out.
async fn by_the_leader(members: &[Member], command: VolumeCommand) -> Outcome<LogIndex> {
    let asking = async {
        loop {
            let request = DataRequest::Control { group: GROUP, command: command.encode() };
            let leader = members.iter().find(|member| leads(member));
            if let Some(leader) = leader {
                match volume(leader).answer(request, Bytes::new()).await.0 {
                    DataReply::Applied { index, reply: VolumeReply::Done { .. } } => return Ok(index),
                    DataReply::Applied { reply: VolumeReply::Refused(refusal), .. }
                        if refusal.retryable() => {}
                    DataReply::Elsewhere { .. } => {}
                    other => return Err(format!("{command:?} was answered {other:?}")),
                }
            }
            holdfast_env::sleep(Duration::from_millis(20)).await;
        }
    };
    within(30, "a command", asking).await?
}

/// Asks again while Raft waits for the disk, as the reconciler does.
async fn take_up(volume: &Volume) -> Outcome<()> {
    loop {
        match volume.take_up_timers().await {
            Ok(()) => return Ok(()),
            Err(error) if error.to_string().ends_with("ask again") => {
                holdfast_env::sleep(Duration::from_millis(20)).await;
            }
            Err(error) => return Err(error.to_string()),
        }
    }
}

/// One after the other takes up what the volume's state asks for, as the reconciler has it: a leader hands over first.
async fn everybody_takes_up(members: &[Member]) -> Outcome<()> {
    let asked = |member: &Member| volume(member).timers().run();
    let runs = |member: &Member| volume(member).group().timers();
    let state = |member: &Member| volume(member).timers();
    until("every replica has applied what the leader has", || {
        let leader = members.iter().find(|member| leads(member));
        leader.is_some_and(|leader| members.iter().all(|member| state(member) == state(leader)))
    })
    .await?;
    let working = async {
        let differs = |member: &&Member| asked(member) != runs(member);
        let follower = || members.iter().filter(differs).find(|member| !leads(member));
        while let Some(member) = follower().or_else(|| members.iter().find(differs)) {
            let group = volume(member).group().clone();
            if group.is_leader() {
                volume(member).take_up_timers().await.expect_err("a leader hands over first");
                let ready = |member: &&Member| {
                    asked(member) == runs(member) && !volume(member).group().owes_silence()
                };
                if let Some(next) = members.iter().find(ready) {
                    // It may have lost its place meanwhile: look again either way.
                    drop(group.transfer_to(volume(next).group().id().replica).await);
                }
            } else {
                take_up(&volume(member)).await?;
            }
            holdfast_env::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    };
    within(60, "everybody takes up the timers", working).await?
}

/// Both steps of a change. Ends as soon as the second is committed: who runs with the new timers is another matter.
async fn change(members: &[Member], to: Timers) -> Outcome<()> {
    by_the_leader(members, VolumeCommand::ChangeTimers { to }).await?;
    everybody_takes_up(members).await?;
    let change = members.iter().find_map(|member| volume(member).timers().change());
    let since = change.ok_or("the change is under way")?.since;
    by_the_leader(members, VolumeCommand::TimersSettled { since }).await.map(drop)
}

/// Writes one block after the other and reads each at once, until it is told to stop; how many.
async fn load(session: &Session, stop: &Cell<bool>) -> Outcome<u64> {
    let mut done = 0;
    while !stop.get() {
        let (number, value) = (done % 16, (done % 250) as u8 + 1);
        write(session, number, value).await?;
        expect(session, number, value).await?;
        done += 1;
    }
    Ok(done)
}

#[test]
fn timers_change_under_load_and_stay() {
    test(async |place: &Path| {
        let switch = Rc::new(Switch::default());
        let group = members(place, &switch).await;
        within(20, "the first member leads", first_leads(&group)).await?;
        let session = attached(&group[1]).await?;
        let stop = Cell::new(false);
        let changes = async {
            for heartbeat in [20, 100, 50, 10] {
                change(&group, timers(heartbeat)).await?;
                everybody_takes_up(&group).await?;
                for member in &group {
                    let now = volume(member).group().timers();
                    if now != timers(heartbeat) {
                        return Err(format!("{} runs with {now:?}", member.name));
                    }
                }
            }
            // The load goes on for a while with the shortest.
            holdfast_env::sleep(Duration::from_millis(500)).await;
            stop.set(true);
            Ok(())
        };
        let (changed, done) = futures_util::future::join(changes, load(&session, &stop)).await;
        changed?;
        if done? < 20 {
            return Err("there was hardly any load".into());
        }
        session.detach(Duration::from_secs(5)).await.map_err(|error| error.to_string())?;
        drop(session);
        for member in &group {
            member.host.stop().await;
        }
        drop(group);
        let mut group = Vec::new();
        for number in 1..=3 {
            group.push(start(place, &switch, number, false).await);
        }
        // Those that started first asked in vain for a while.
        until("every replica runs", || group.iter().all(|member| member.host.volume(GROUP).is_some()))
            .await?;
        for member in &group {
            until("what the log tells is applied", || volume(member).timers().run() == timers(10)).await?;
        }
        everybody_takes_up(&group).await?;
        let session = attached(&group[2]).await?;
        load(&session, &Cell::new(true)).await?;
        write(&session, 3, 9).await?;
        expect(&session, 3, 9).await
    });
}

#[test]
fn a_change_does_not_end_before_the_longer_lease_has() {
    test(async |place: &Path| {
        let switch = Rc::new(Switch::default());
        let group = members(place, &switch).await;
        within(20, "the first member leads", first_leads(&group)).await?;
        let began = holdfast_env::Instant::now();
        by_the_leader(&group, VolumeCommand::ChangeTimers { to: timers(10) }).await?;
        let other = VolumeCommand::ChangeTimers { to: timers(20) };
        let request = DataRequest::Control { group: GROUP, command: other.encode() };
        let answer = volume(&group[0]).answer(request, Bytes::new()).await.0;
        let refused = VolumeReply::Refused(Refusal::TimersChanging);
        if !matches!(&answer, DataReply::Applied { reply, .. } if *reply == refused) {
            return Err(format!("a second change was answered {answer:?}"));
        }
        let change = volume(&group[0]).timers().change().ok_or("it is under way")?;
        by_the_leader(&group, VolumeCommand::TimersSettled { since: change.since }).await?;
        let took = holdfast_env::Instant::now().since(began);
        if took < Timers::default().session_lease {
            return Err(format!("the change ended after {took:?}"));
        }
        Ok(())
    });
}

/// A holder is cut off at the very moment when its volume's leases have become shorter, and another node takes the
/// volume. What the former holder still reads from the replica beside it is not older than what was acknowledged.
async fn cut_off(place: &Path) -> Outcome<()> {
    let switch = Rc::new(Switch::default());
    let group = members(place, &switch).await;
    within(20, "the first member leads", first_leads(&group)).await?;
    let old = attached(&group[2]).await?;
    write(&old, 0, 1).await?;
    change(&group, timers(150)).await?;
    everybody_takes_up(&group).await?;
    within(20, "the first member leads again", first_leads(&group)).await?;
    change(&group, timers(10)).await?;
    for other in [1, 2].map(StoreId) {
        switch.cut.borrow_mut().extend([(StoreId(3), other), (other, StoreId(3))]);
    }
    let taker = group[..2].iter().find(|member| leads(member)).unwrap_or(&group[0]);
    let new = within(30, "an attachment", attach(taker, true)).await?.map_err(|error| error.to_string())?;
    write(&new, 0, 2).await?;
    // It has no lease, or it would not have to wait.
    match holdfast_env::timeout(Duration::from_millis(50), old.read(at(0))).await {
        Ok(Ok(data)) if data == block(1, 1) => Err("a stale read".into()),
        _ => Ok(()),
    }
}

#[test]
fn a_holder_that_is_cut_off_when_leases_become_shorter_reads_nothing_stale() {
    test(cut_off);
}

/// The same with leases granted by the longer of the two while they change. The read has to come before even that lease has
/// ended, which on busy cores it may not.
#[test]
fn leases_by_the_longer_timers_make_a_stale_read_and_it_is_noticed() {
    planted::plant(&["timers-unequal"]);
    let outcomes = (0..5).map(|_| {
        let place = tempfile::tempdir().expect("a place");
        holdfast_env::real::run(async { cut_off(place.path()).await })
    });
    let is_stale = |outcome: &Outcome<()>| *outcome == Err("a stale read".into());
    let mut seen = Vec::new();
    let is_found = outcomes.inspect(|outcome| seen.push(outcome.clone())).any(|outcome| is_stale(&outcome));
    planted::plant(&[]);
    assert!(is_found, "{seen:?}");
}

/// INV-ACK: Raft that is made anew takes for durable what its log holds.
#[test]
fn a_replica_takes_up_timers_only_when_its_log_is_durable() {
    test(async |place: &Path| {
        let switch = Rc::new(Switch::default());
        let stall = Stall::default();
        let mut group = Vec::new();
        for number in 1..=2 {
            group.push(start(place, &switch, number, true).await);
        }
        group.push(start_on(&place.join("n3"), &switch, 3, true, |inner| stall.over(inner)).await);
        begin(&group).await;
        within(20, "the first member leads", first_leads(&group)).await?;
        let session = attached(&group[0]).await?;
        by_the_leader(&group, VolumeCommand::ChangeTimers { to: timers(20) }).await?;
        until("the follower has applied it", || volume(&group[2]).timers().change().is_some()).await?;
        stall.begin();
        write(&session, 0, 1).await?;
        let last = volume(&group[0]).log().last().ok_or("the leader's log is empty")?.index;
        until("the follower holds it", || volume(&group[2]).log().last().is_some_and(|id| id.index >= last))
            .await?;
        let third = volume(&group[2]);
        let mut taking_up = std::pin::pin!(third.take_up_timers());
        if holdfast_env::timeout(Duration::from_millis(300), taking_up.as_mut()).await.is_ok() {
            return Err("it was made anew over what is not durable".into());
        }
        if let Some(fault) = third.fault() {
            return Err(format!("a replica that takes up timers is called faulty: {fault}"));
        }
        stall.end();
        within(20, "the end", taking_up).await?.map_err(|error| error.to_string())?;
        if third.log().flushed() < last {
            return Err("the log is not durable".into());
        }
        write(&session, 0, 2).await?;
        // The other two are the majority now.
        group[1].host.stop().await;
        write(&session, 0, 3).await?;
        expect(&session, 0, 3).await?;
        Ok(())
    });
}
