//! INV-REST: the group of a volume that nobody holds rests as a whole, is watched while it does, and wakes for whoever
//! wants it.

mod group;

use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use group::steps::{Outcome, attached, expect, leads, test, until, within, write};
use group::{GROUP, Member, Switch, first_leads, members, start};
use holdfast_protocol::planted;
use holdfast_replica::messages::{DataReply, DataRequest};
use holdfast_replica::{Group, GroupUsage};
use holdfast_types::{LogIndex, StoreId, Term};

fn group_of(member: &Member) -> Rc<Group> {
    member.host.volume(GROUP).expect("runs").group().clone()
}

fn usage(member: &Member) -> GroupUsage {
    group_of(member).usage()
}

fn rests(members: &[Member]) -> bool {
    members.iter().all(|member| group_of(member).is_resting())
}

fn term(member: &Member) -> Term {
    group_of(member).report().term
}

fn cut(switch: &Switch, one: u64, other: u64) {
    let mut cut = switch.cut.borrow_mut();
    cut.insert((StoreId(one.into()), StoreId(other.into())));
    cut.insert((StoreId(other.into()), StoreId(one.into())));
}

/// A block is written, the volume is let go of, and its group rests; the first member leads.
async fn resting(place: &Path, switch: &Rc<Switch>) -> Outcome<Vec<Member>> {
    let members = members(place, switch).await;
    within(30, "the first leads", first_leads(&members)).await?;
    let session = attached(&members[0]).await?;
    write(&session, 1, 7).await?;
    within(20, "a detach", session.detach(Duration::from_secs(10)))
        .await?
        .map_err(|error| error.to_string())?;
    until("the group rests", || rests(&members)).await?;
    Ok(members)
}

/// A group that nothing happens to sends nothing, and everybody still says that it is well.
async fn nothing_is_sent(place: &Path) -> Outcome<()> {
    let switch = Rc::new(Switch::default());
    let members = resting(place, &switch).await?;
    let before: Vec<_> = members.iter().map(|member| (usage(member), term(member))).collect();
    // Longer than anybody needs to miss anybody.
    holdfast_env::sleep(Duration::from_secs(8)).await;
    for (member, (before, term_before)) in members.iter().zip(before) {
        let now = usage(member);
        if (now.appends_sent, now.appends_received) != (before.appends_sent, before.appends_received) {
            return Err(format!(
                "{} appends were sent while the group rested",
                now.appends_sent - before.appends_sent
            ));
        }
        if term(member) != term_before || now.wakes != before.wakes {
            return Err("it does not stay at rest".into());
        }
        let report = group_of(member).report();
        if report.is_leader != leads(member) || report.is_leader && !report.has_quorum {
            return Err(format!("the leader is not taken for one: {report:?}"));
        }
        if !report.is_leader && !report.hears_leader {
            return Err(format!("a follower says that it hears nobody: {report:?}"));
        }
    }
    Ok(())
}

#[test]
fn a_group_that_nothing_happens_to_sends_nothing_and_is_well() {
    test(async |place| nothing_is_sent(place).await);
}

#[test]
fn a_leader_that_rests_without_asking_is_found() {
    test(async |place| {
        planted::plant(&["rest-unasked"]);
        let switch = Rc::new(Switch::default());
        let members = members(place, &switch).await;
        within(30, "the first leads", first_leads(&members)).await?;
        let before = term(&members[0]);
        let deposed =
            until("somebody else campaigns", || members.iter().any(|member| term(member) > before)).await;
        planted::plant(&[]);
        deposed.map_err(|_| "nobody noticed that the others were not asked".into())
    });
}

#[test]
fn whoever_wants_the_volume_wakes_its_group() {
    test(async |place| {
        let switch = Rc::new(Switch::default());
        let members = resting(place, &switch).await?;
        let before = term(&members[0]);
        // Raft may hold its heartbeats back for two election timeouts: no longer than that, and a little.
        let session = within(4, "an attach to a volume that rests", attached(&members[2])).await??;
        write(&session, 2, 8).await?;
        expect(&session, 1, 7).await?;
        expect(&session, 2, 8).await?;
        if rests(&members) || term(&members[0]) != before {
            return Err("it was not simply woken".into());
        }
        // While it is held it does not rest, however idle it is.
        holdfast_env::sleep(Duration::from_secs(5)).await;
        if members.iter().any(|member| group_of(member).is_resting()) {
            return Err("a volume that is held rests".into());
        }
        within(20, "a detach", session.detach(Duration::from_secs(10)))
            .await?
            .map_err(|error| error.to_string())?;
        until("it rests again", || rests(&members)).await
    });
}

/// The leader's daemon dies while the group rests: the others find out and elect one of them, and nothing is lost.
async fn leader_dies(place: &Path, patience: u64) -> Outcome<()> {
    let switch = Rc::new(Switch::default());
    let mut members = resting(place, &switch).await?;
    let dead = members.remove(0);
    dead.muted.set(true);
    dead.host.stop().await;
    within(patience, "somebody else leads", async {
        while !members.iter().any(leads) {
            holdfast_env::sleep(Duration::from_millis(20)).await;
        }
    })
    .await?;
    let session = attached(&members[0]).await?;
    expect(&session, 1, 7).await
}

#[test]
fn a_leader_that_dies_while_its_group_rests_is_replaced() {
    test(async |place| leader_dies(place, 8).await);
}

#[test]
fn followers_that_do_not_watch_their_leader_are_found() {
    test(async |place| {
        planted::plant(&["rest-unwatched"]);
        let noticed = leader_dies(place, 8).await;
        planted::plant(&[]);
        match noticed {
            Err(why) if why.starts_with("somebody else leads") => Ok(()),
            other => Err(format!("nobody noticed that the leader was not watched: {other:?}")),
        }
    });
}

#[test]
fn a_follower_that_goes_away_wakes_its_leader_and_is_brought_up_to_date() {
    test(async |place| {
        let switch = Rc::new(Switch::default());
        let mut members = resting(place, &switch).await?;
        let before = term(&members[0]);
        let gone = members.remove(2);
        gone.muted.set(true);
        gone.host.stop().await;
        drop(gone);
        switch.cut.borrow_mut().clear();
        until("the leader wakes", || !group_of(&members[0]).is_resting()).await?;
        let session = attached(&members[0]).await?;
        write(&session, 3, 9).await?;
        within(20, "a detach", session.detach(Duration::from_secs(10)))
            .await?
            .map_err(|error| error.to_string())?;
        holdfast_env::sleep(Duration::from_secs(5)).await;
        if group_of(&members[0]).is_resting() {
            return Err("a group rests of which a member is away".into());
        }
        members.push(start(place, &switch, 3, false).await);
        until("it rests as a whole again", || rests(&members)).await?;
        let last = |member: &Member| group_of(member).report().applied;
        if members.iter().any(|member| last(member) != last(&members[0])) || term(&members[0]) != before {
            return Err("who came back was not simply brought up to date".into());
        }
        Ok(())
    });
}

/// A follower that starts while its group rests finds its leader, and deposes nobody.
#[test]
fn a_follower_that_restarts_deposes_nobody() {
    test(async |place| {
        let switch = Rc::new(Switch::default());
        let mut members = resting(place, &switch).await?;
        let before = term(&members[0]);
        let gone = members.remove(2);
        gone.muted.set(true);
        gone.host.stop().await;
        drop(gone);
        members.push(start(place, &switch, 3, false).await);
        let again = members.pop().expect("it was just started");
        until("it follows", || group_of(&again).report().leader == Some(group_of(&members[0]).id().replica))
            .await?;
        members.push(again);
        until("all rest again", || rests(&members)).await?;
        if members.iter().any(|member| term(member) != before) {
            return Err("somebody was deposed".into());
        }
        Ok(())
    });
}

/// A leader rests through its own deposition. What it then says of the volume is asked of a majority first.
async fn deposed(place: &Path) -> Outcome<DataReply> {
    let switch = Rc::new(Switch::default());
    let members = resting(place, &switch).await?;
    cut(&switch, 1, 2);
    cut(&switch, 1, 3);
    until("another leads", || members[1..].iter().any(leads)).await?;
    let session = attached(&members[1]).await?;
    write(&session, 1, 9).await?;
    if !group_of(&members[0]).is_resting() {
        return Err("the deposed leader has woken too soon for this test".into());
    }
    let request = DataRequest::Digest { group: GROUP, index: LogIndex::ZERO };
    let volume = members[0].host.volume(GROUP).expect("runs");
    Ok(within(20, "an answer", volume.answer(request, Bytes::new())).await?.0)
}

#[test]
fn a_leader_that_woke_asks_before_it_answers() {
    test(async |place| match deposed(place).await? {
        DataReply::Elsewhere { .. } => Ok(()),
        other => Err(format!("a deposed leader answered {other:?}")),
    });
}

#[test]
fn a_leader_that_woke_and_does_not_ask_is_found() {
    test(async |place| {
        planted::plant(&["woken-leader-unasked"]);
        let answered = deposed(place).await;
        planted::plant(&[]);
        match answered? {
            DataReply::Digest { .. } => Ok(()),
            other => Err(format!("the planted fault changes nothing: {other:?}")),
        }
    });
}

/// Nothing that carries blocks reaches the third member, which answers everything else; then all of it does. Ends when
/// that member has everything.
async fn one_is_behind(place: &Path) -> Outcome<()> {
    let switch = Rc::new(Switch::default());
    let members = members(place, &switch).await;
    within(30, "the first leads", first_leads(&members)).await?;
    *switch.damage.borrow_mut() = Some(Box::new(|_, to, frame| {
        if to == StoreId(3) && !frame.body.is_empty() {
            frame.body = vec![Bytes::from_static(b"damaged")];
        }
    }));
    let session = attached(&members[0]).await?;
    write(&session, 1, 7).await?;
    within(20, "a detach", session.detach(Duration::from_secs(10)))
        .await?
        .map_err(|error| error.to_string())?;
    let last = |member: &Member| group_of(member).report().applied;
    // Long enough to be asked.
    for _ in 0..60 {
        holdfast_env::sleep(Duration::from_millis(100)).await;
        if last(&members[2]) >= last(&members[0]) {
            return Err("it is not behind: the test shows nothing".into());
        }
        if members.iter().any(|member| group_of(member).is_resting()) {
            return Err("it rests while a member is behind".into());
        }
    }
    *switch.damage.borrow_mut() = None;
    let caught_up = async {
        while last(&members[2]) != last(&members[0]) {
            holdfast_env::sleep(Duration::from_millis(20)).await;
        }
    };
    within(10, "the member that was behind has everything", caught_up).await
}

#[test]
fn a_group_does_not_rest_while_a_member_is_behind() {
    test(async |place| one_is_behind(place).await);
}

#[test]
fn a_group_that_rests_while_a_member_is_behind_is_found() {
    test(async |place| {
        planted::plant(&["rest-while-behind"]);
        let noticed = one_is_behind(place).await;
        planted::plant(&[]);
        match noticed {
            Err(why) if why == "it rests while a member is behind" => Ok(()),
            other => Err(format!("nobody noticed that a member was behind: {other:?}")),
        }
    });
}
