//! A volume has lost its majority and goes on from one survivor, as another group (INV-RECOVER): with everything that the
//! survivor's log holds, without whoever held it, and whatever is left of the former group stays out of it.

mod group;

use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use group::steps::{Outcome, at, expect, test, until, within, write};
use group::{GROUP, Member, Switch, attach, block, first_leads, members, replica, start, start_on};
use holdfast_protocol::planted;
use holdfast_replica::administration::{ShardRequest, carry_out};
use holdfast_replica::{NewReplica, Timers};
use holdfast_session::{AttachOptions, Closed, Session, SessionError, VolumeTarget};
use holdfast_store::recovery_file::Order;
use holdfast_store::testing::{Fault, MemoryDisk, Tear, simulate};
use holdfast_store::{EntryId, ReplicaIdentity};
use holdfast_types::{GroupId, RecoveryId, ReplicaId, StoreId, Term, UserError, VolumeId};

const NEW: GroupId = GroupId(770);
const NEXT: GroupId = GroupId(7700);
const FIRST: Order = Order { number: 2, id: RecoveryId(0x5) };
const OTHER: Order = Order { number: 2, id: RecoveryId(0x6) };

fn of(group: GroupId, replica: u64) -> ReplicaIdentity {
    ReplicaIdentity { group, replica: ReplicaId(replica) }
}

async fn ask(member: &Member, request: ShardRequest) -> Result<(), UserError> {
    carry_out(&member.host, request).await.map(drop)
}

async fn done(member: &Member, request: ShardRequest) -> Outcome<()> {
    let what = format!("{request:?}");
    ask(member, request).await.map_err(|error| format!("{what}: {}", error.message))
}

/// The request is refused, and its answer says all of this.
async fn refused(member: &Member, request: ShardRequest, says: &[&str]) -> Outcome<()> {
    let what = format!("{request:?}");
    match ask(member, request).await {
        Err(error) if says.iter().all(|part| error.message.contains(part)) => Ok(()),
        other => Err(format!("{what} was answered {other:?}")),
    }
}

fn seal(id: ReplicaIdentity, order: Order) -> ShardRequest {
    ShardRequest::Seal { volume: VolumeId(9), id, order, revision: 7 }
}

fn take_over(id: ReplicaIdentity, group: GroupId, order: Order) -> ShardRequest {
    ShardRequest::TakeOver { id, group, order, above: Term(40) }
}

/// Attaches by force to a group that stands on these stores.
async fn attached_to(member: &Member, group: GroupId, stores: &[u64]) -> Outcome<Rc<Session>> {
    let target =
        VolumeTarget { group, stores: stores.iter().map(|store| StoreId((*store).into())).collect() };
    let options = AttachOptions {
        node: member.name.clone(),
        force: true,
        read_only: false,
        resume: false,
        only_at: None,
        patience: Duration::from_secs(20),
    };
    let timers = Timers::default();
    let attaching = Session::attach(member.rpc.clone(), &member.sessions, target, &options, &timers);
    within(30, "an attachment", attaching).await?.map_err(|error| error.to_string())
}

async fn restarted(place: &Path, switch: &Rc<Switch>, member: Member, number: u64) -> Member {
    member.host.stop().await;
    drop(member);
    start(place, switch, number, false).await
}

fn runs_as(member: &Member, group: GroupId) -> bool {
    member.host.volume(group).is_some()
}

/// Why a group's replica does not run here.
fn says(member: &Member, group: GroupId) -> String {
    let faulty = member.host.faulty();
    faulty.into_iter().find(|faulty| faulty.id.group == group).map(|faulty| faulty.why).unwrap_or_default()
}

/// What is left of the former group does not run, and says why.
async fn quarantined(member: &Member, number: u64) -> Outcome<()> {
    let is_so = || runs_as(member, GROUP) || says(member, GROUP).contains("quarantined");
    until("an old replica is quarantined", is_so).await?;
    if runs_as(member, GROUP) {
        return Err(format!("replica {number} of the former group runs beside the one that went on"));
    }
    Ok(())
}

/// Three members of whom the first leads; its log holds an entry that nobody else has, and that nobody was told of.
async fn disaster(place: &Path, switch: &Rc<Switch>) -> Outcome<(Member, Rc<Session>)> {
    let mut all = members(place, switch).await;
    within(30, "the first leads", first_leads(&all)).await?;
    let session = within(30, "an attachment", attach(&all[0], false)).await?.map_err(|e| e.to_string())?;
    write(&session, 1, 1).await?;
    all[2].host.stop().await;
    write(&session, 2, 2).await?;
    all[1].host.stop().await;
    let first = all.swap_remove(0);
    drop(all);
    let log = first.host.volume(GROUP).ok_or("it runs")?.log().clone();
    let before = log.last();
    let late = session.clone();
    holdfast_env::spawn("unanswered", async move { drop(late.write(at(3), block(3, 1)).await) });
    until("the write is in the log", || log.last() > before).await?;
    Ok((first, session))
}

/// The survivor goes on alone as `group`; those of the former group come back and stay out of it.
async fn recovery(place: &Path, group: GroupId) -> Outcome<()> {
    let switch = Rc::new(Switch::default());
    let (first, held) = disaster(place, &switch).await?;
    let before = held.epoch();
    // Twice: requests of the reconciler come again.
    for _ in 0..2 {
        done(&first, seal(of(GROUP, 1), FIRST)).await?;
    }
    if runs_as(&first, GROUP) {
        return Err("a replica runs that was sealed".into());
    }
    for _ in 0..2 {
        done(&first, take_over(of(GROUP, 1), group, FIRST)).await?;
    }
    let session = attached_to(&first, group, &[1]).await?;
    if session.epoch() <= before {
        return Err(format!("epoch {before} became {}", session.epoch()));
    }
    for number in [1, 2, 3] {
        expect(&session, number, number as u8).await?;
    }
    write(&session, 4, 4).await?;
    let ended = within(30, "whoever held it hears that it is over", held.read(at(1))).await?;
    if group == NEW && !matches!(ended, Err(SessionError::Closed(Closed::Fenced { .. }))) {
        return Err(format!("whoever held the volume was answered {ended:?}"));
    }
    drop((session, held));
    // It goes on alone after a restart, too, though nobody else of its former group answers.
    let first = restarted(place, &switch, first, 1).await;
    let is_decided = || [group, GROUP].iter().any(|of| runs_as(&first, *of) || !says(&first, *of).is_empty());
    until("the survivor is started", is_decided).await?;
    if !runs_as(&first, group) {
        return Err(format!(
            "the survivor does not run as what it became, and says: {}",
            says(&first, GROUP)
        ));
    }
    let session = attached_to(&first, group, &[1]).await?;
    expect(&session, 4, 4).await?;
    // A majority of the former group is back.
    let (second, third) = (start(place, &switch, 2, false).await, start(place, &switch, 3, false).await);
    for (member, number) in [(&second, 2), (&third, 3)] {
        quarantined(member, number).await?;
    }
    // And for good, whoever is there to be asked.
    switch.cut.borrow_mut().extend([(2, 1), (3, 1)].map(|(from, to)| (StoreId(from), StoreId(to))));
    let second = restarted(place, &switch, second, 2).await;
    let third = restarted(place, &switch, third, 3).await;
    for (member, number) in [(&second, 2), (&third, 3)] {
        quarantined(member, number).await?;
    }
    switch.cut.borrow_mut().clear();
    late_requests(&first).await?;
    grows_back(&first, &second, &session).await?;
    for member in [&first, &second, &third] {
        member.host.stop().await;
    }
    Ok(())
}

/// What was decided of the former group, and arrives now.
async fn late_requests(first: &Member) -> Outcome<()> {
    let new = replica(5);
    let create = ShardRequest::Create {
        volume: new.volume,
        id: new.id,
        size: new.size,
        spec_json: new.spec_json,
        witness: false,
    };
    refused(first, create, &["quarantined"]).await?;
    refused(first, ShardRequest::Destroy { id: of(GROUP, 1), revision: 99 }, &["quarantined"]).await?;
    refused(first, take_over(of(GROUP, 1), NEXT, OTHER), &["recovery"]).await?;
    if runs_as(first, NEW) { Ok(()) } else { Err("what came late has ended the volume".into()) }
}

/// A new replica joins on a store where one of the former group is kept.
async fn grows_back(first: &Member, second: &Member, session: &Session) -> Outcome<()> {
    let new = NewReplica { id: of(NEW, 12), ..replica(12) };
    let joined = second.host.create(&new).await.map_err(|error| error.to_string())?;
    let leader = first.host.volume(NEW).ok_or("it runs")?;
    let failed = |error: holdfast_replica::GroupError| error.to_string();
    leader.group().add_learner(ReplicaId(12), StoreId(2)).await.map_err(failed)?;
    leader.group().change_voters(&[ReplicaId(1), ReplicaId(12)]).await.map_err(failed)?;
    write(session, 5, 5).await?;
    let all = leader.log().last().map(|id| id.index).ok_or("its log is not empty")?;
    within(30, "the new replica has everything", joined.group().position().reached(all)).await?;
    expect(session, 1, 1).await?;
    if says(second, GROUP).contains("quarantined") { Ok(()) } else { Err("nothing is kept any more".into()) }
}

#[test]
fn one_of_three_goes_on_alone_and_the_former_group_stays_out_of_it() {
    test(async |place| recovery(place, NEW).await);
}

fn found(plant: impl FnOnce(), group: GroupId) -> String {
    let place = tempfile::tempdir().expect("a place");
    plant();
    let outcome = holdfast_env::real::run(async { recovery(place.path(), group).await });
    planted::plant(&[]);
    holdfast_store::testing::plant(&[]);
    outcome.expect_err("it is found")
}

#[test]
fn a_volume_that_goes_on_as_the_group_that_it_was_is_found() {
    let why = found(|| planted::plant(&["recover-without-incarnation"]), GROUP);
    assert!(why.contains("of the former group runs"), "{why}");
}

#[test]
fn a_store_that_does_not_say_what_was_replaced_is_found() {
    let why = found(|| planted::plant(&["superseded-not-told"]), NEW);
    assert!(why.contains("of the former group runs"), "{why}");
}

#[test]
fn a_store_that_forgets_what_it_took_over_is_found() {
    let why = found(|| holdfast_store::testing::plant(&["forget-recovery"]), NEW);
    assert!(why.contains("does not run as what it became"), "{why}");
}

/// Two operators force different survivors.
async fn rivals(place: &Path) -> Outcome<()> {
    let switch = Rc::new(Switch::default());
    let (first, _held) = disaster(place, &switch).await?;
    // A recovery that was called off: its requests come late.
    done(&first, ShardRequest::Keep { id: of(GROUP, 1), revision: 7 }).await?;
    let called_off = ShardRequest::Seal { volume: VolumeId(9), id: of(GROUP, 1), order: OTHER, revision: 6 };
    refused(&first, called_off, &["decide anew"]).await?;
    let (ours, theirs) = (FIRST.id.to_string(), OTHER.id.to_string());
    let both = [ours.as_str(), theirs.as_str()];
    done(&first, seal(of(GROUP, 1), FIRST)).await?;
    // Nothing calls it off any more, whoever has heard otherwise.
    let late = ShardRequest::Keep { id: of(GROUP, 1), revision: 8 };
    refused(&first, late, &["sealed for a recovery"]).await?;
    refused(&first, seal(of(GROUP, 1), OTHER), &both).await?;
    refused(&first, take_over(of(GROUP, 1), NEXT, OTHER), &both).await?;
    done(&first, take_over(of(GROUP, 1), NEW, FIRST)).await?;
    if !runs_as(&first, NEW) {
        return Err("the first of the two is not carried out".into());
    }
    // The other one has named this replica, too: neither goes on.
    refused(&first, seal(of(GROUP, 1), OTHER), &both).await?;
    let halted =
        |member: &Member| both.iter().all(|id| says(member, NEW).contains(id)) && !runs_as(member, NEW);
    if !halted(&first) {
        return Err(format!("it goes on, and says: {}", says(&first, NEW)));
    }
    let first = restarted(place, &switch, first, 1).await;
    if !halted(&first) {
        return Err(format!("it goes on after a restart, and says: {}", says(&first, NEW)));
    }
    // An old request of the one that was carried out changes nothing.
    refused(&first, take_over(of(GROUP, 1), NEW, FIRST), &both).await?;
    // Whoever decides between them recovers the volume from what has halted.
    let decided = Order { number: 3, id: RecoveryId(0x9) };
    done(&first, seal(of(NEW, 1), decided)).await?;
    refused(&first, take_over(of(GROUP, 1), NEW, FIRST), &["quarantined"]).await?;
    if runs_as(&first, NEW) {
        return Err("an old request has brought back what was ended".into());
    }
    done(&first, take_over(of(NEW, 1), NEXT, decided)).await?;
    let session = attached_to(&first, NEXT, &[1]).await?;
    expect(&session, 2, 2).await?;
    first.host.stop().await;
    Ok(())
}

#[test]
fn two_recoveries_with_different_survivors_halt_with_both_ids_named() {
    test(async |place| rivals(place).await);
}

#[test]
fn a_sealed_replica_that_is_kept_is_found() {
    let place = tempfile::tempdir().expect("a place");
    planted::plant(&["sealed-is-kept"]);
    let outcome = holdfast_env::real::run(async { rivals(place.path()).await });
    planted::plant(&[]);
    let why = outcome.expect_err("it is found");
    assert!(why.contains("Keep") && why.contains("was answered Ok"), "{why}");
}

/// A store with a replica of a group of three that has lost the others.
fn survivor(place: &Path) -> MemoryDisk {
    let disks: Vec<MemoryDisk> = (1..=3).map(MemoryDisk::new).collect();
    simulate(1, async {
        let switch = Rc::new(Switch::default());
        let mut all = Vec::new();
        for (disk, number) in disks.iter().zip(1..) {
            all.push(start_on(place, &switch, number, true, |_| disk.directory()).await);
        }
        group::begin(&all).await;
        first_leads(&all).await;
        let session = attach(&all[0], false).await.expect("attaches");
        write(&session, 7, 7).await.expect("writes");
        for member in &all {
            member.host.stop().await;
        }
    });
    disks[0].power_cut(Tear::Nothing);
    disks[0].clone()
}

async fn on(disk: &MemoryDisk, place: &Path) -> Member {
    start_on(place, &Rc::new(Switch::default()), 1, false, |_| disk.directory()).await
}

async fn recovered(member: &Member) -> Outcome<()> {
    done(member, seal(of(GROUP, 1), FIRST)).await?;
    done(member, take_over(of(GROUP, 1), NEW, FIRST)).await
}

/// The disk stops at the operation of this number after the store has started; whether the recovery had ended by then.
fn recovered_until(disk: &MemoryDisk, place: &Path, operation: u64) -> bool {
    simulate(2, async {
        let member = on(disk, place).await;
        disk.at(disk.operations() + operation, Fault::Freeze);
        let recovered = std::pin::pin!(recovered(&member));
        let stopped = std::pin::pin!(disk.frozen());
        match futures_util::future::select(recovered, stopped).await {
            futures_util::future::Either::Left((ended, _)) => {
                ended.expect("the disk does what it is told");
                true
            }
            futures_util::future::Either::Right(_) => false,
        }
    })
}

#[test]
fn whenever_the_power_goes_a_recovery_can_be_ended_and_nothing_is_lost() {
    let place = tempfile::tempdir().expect("a place");
    let whole = survivor(place.path());
    let mut cuts = 0;
    for operation in 0.. {
        let mut is_done = false;
        for tear in [Tear::Nothing, Tear::Everything, Tear::Random(operation)] {
            let disk = MemoryDisk::from_image(&whole.image(), operation);
            is_done = recovered_until(&disk, place.path(), operation);
            disk.power_cut(tear);
            cuts += 1;
            let what = format!("cut at {operation}, {tear:?}");
            simulate(3, async {
                let member = on(&disk, place.path()).await;
                assert!(!runs_as(&member, GROUP) || !is_done, "{what}: it was recovered");
                recovered(&member).await.unwrap_or_else(|why| panic!("{what}: {why}"));
                let session =
                    attached_to(&member, NEW, &[1]).await.unwrap_or_else(|why| panic!("{what}: {why}"));
                expect(&session, 7, 7).await.unwrap_or_else(|why| panic!("{what}: {why}"));
                let log = member.host.volume(NEW).expect("runs").log().clone();
                let forks = log.last().map_or(EntryId::default(), |last| last);
                assert!(forks.term > Term(40), "{what}: {forks:?}");
                member.host.stop().await;
            });
        }
        if is_done {
            break;
        }
    }
    assert!(cuts >= 24, "{cuts} times the power went");
}
