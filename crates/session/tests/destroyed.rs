//! Requests of the reconciler that come late, out of order, or twice: nobody who was destroyed is made again under its
//! id (INV-TERM), whatever the store has been through, and nobody is destroyed who was taken back (INV-MEMBER).

mod group;

use std::path::Path;
use std::rc::Rc;

use bytes::Bytes;
use group::{GROUP, Kind, Member, Switch, begin, replica, start, start_as, start_on};
use holdfast_protocol::planted;
use holdfast_replica::administration::{ShardRequest, carry_out};
use holdfast_store::testing::{Fault, MemoryDisk, Tear, simulate};
use holdfast_types::{ErrorCode, LogIndex, ReplicaId, StoreId, UserError};

type Outcome = Result<(), String>;

fn create(number: u64, witness: bool) -> ShardRequest {
    let new = replica(number);
    ShardRequest::Create { volume: new.volume, id: new.id, size: new.size, spec_json: Bytes::new(), witness }
}

fn destroy(number: u64, revision: u64) -> ShardRequest {
    ShardRequest::Destroy { id: replica(number).id, revision }
}

fn keep(number: u64, revision: u64) -> ShardRequest {
    ShardRequest::Keep { id: replica(number).id, revision }
}

async fn ask(member: &Member, request: ShardRequest) -> Result<(), UserError> {
    carry_out(&member.host, request).await.map(drop)
}

/// The request is refused, and its answer says this.
async fn refused(member: &Member, request: ShardRequest, says: &str) -> Outcome {
    let what = format!("{request:?}");
    match ask(member, request).await {
        Err(error) if error.code == ErrorCode::Refused && error.message.contains(says) => Ok(()),
        other => Err(format!("{what} was answered {other:?}")),
    }
}

async fn done(member: &Member, request: ShardRequest) -> Outcome {
    let what = format!("{request:?}");
    ask(member, request).await.map_err(|error| format!("{what}: {}", error.message))
}

async fn restarted(place: &Path, switch: &Rc<Switch>, member: Member, number: u64, kind: Kind) -> Member {
    member.host.stop().await;
    drop(member);
    start_as(&place.join(format!("n{number}")), switch, number, false, |same| same, kind).await
}

/// A replica is destroyed, and the request that made it arrives again.
async fn late_creations(place: &Path, kind: Kind) -> Outcome {
    let switch = Rc::new(Switch::default());
    let path = place.join("n5");
    let mut member = start_as(&path, &switch, 5, true, |same| same, kind).await;
    let witness = kind != Kind::Data;
    let never = "does not come back without its memory";
    done(&member, create(5, witness)).await?;
    done(&member, destroy(5, 1)).await?;
    // It was never here: its creation is still on its way.
    done(&member, destroy(6, 2)).await?;
    for restart in [false, true, true] {
        if restart {
            member = restarted(place, &switch, member, 5, kind).await;
        }
        refused(&member, create(5, witness), never).await?;
        refused(&member, create(6, witness), never).await?;
        done(&member, destroy(5, 1)).await?;
        assert!(member.host.volumes().is_empty() && member.host.faulty().is_empty(), "nothing stands here");
    }
    // One that comes after them is another one.
    done(&member, create(7, witness)).await?;
    done(&member, create(7, witness)).await?;
    member.host.stop().await;
    Ok(())
}

#[test]
fn what_was_destroyed_is_not_made_again() {
    for kind in [Kind::Data, Kind::Witness(1 << 20)] {
        let place = tempfile::tempdir().expect("a place");
        let outcome = holdfast_env::real::run(async { late_creations(place.path(), kind).await });
        outcome.unwrap_or_else(|why| panic!("{why}"));
    }
}

#[test]
fn a_store_that_forgets_what_it_destroyed_is_found() {
    holdfast_store::testing::plant(&["forget-destroyed"]);
    let place = tempfile::tempdir().expect("a place");
    let outcome = holdfast_env::real::run(async { late_creations(place.path(), Kind::Data).await });
    holdfast_store::testing::plant(&[]);
    let why = outcome.expect_err("it is found");
    assert!(why.contains("Create") && why.contains("was answered Ok"), "{why}");
}

/// A voter is taken back after its end was decided, and the request to destroy it arrives then.
async fn late_destruction(place: &Path) -> Outcome {
    let switch = Rc::new(Switch::default());
    let mut members = Vec::new();
    for number in 1..=3 {
        members.push(start(place, &switch, number, true).await);
    }
    begin(&members).await;
    let old = "was taken back by a decision on revision 12";
    done(&members[2], keep(3, 12)).await?;
    refused(&members[2], destroy(3, 11), old).await?;
    let third = members.pop().ok_or("three members")?;
    let third = restarted(place, &switch, third, 3, Kind::Data).await;
    refused(&third, destroy(3, 11), old).await?;
    // A request that took it back earlier, and comes late itself, changes nothing.
    done(&third, keep(3, 4)).await?;
    refused(&third, destroy(3, 11), old).await?;
    let runs = third.host.volume(GROUP).is_some_and(|volume| volume.group().id() == replica(3).id);
    assert!(runs, "the voter runs: {:?}", third.host.faulty());
    // What is decided afterwards counts.
    done(&third, destroy(3, 12)).await?;
    let gone = ask(&third, keep(3, 13)).await;
    let is_told = gone.as_ref().is_err_and(|error| error.code == ErrorCode::NotFound);
    assert!(is_told, "whoever asks must know that it can only be replaced: {gone:?}");
    refused(&third, create(3, false), "does not come back").await?;
    for member in members.iter().chain([&third]) {
        member.host.stop().await;
    }
    Ok(())
}

#[test]
fn a_voter_that_was_taken_back_is_not_destroyed_by_an_older_decision() {
    let place = tempfile::tempdir().expect("a place");
    let outcome = holdfast_env::real::run(async { late_destruction(place.path()).await });
    outcome.unwrap_or_else(|why| panic!("{why}"));
}

#[test]
fn a_store_that_obeys_a_late_destruction_is_found() {
    planted::plant(&["late-destroy-obeyed"]);
    let place = tempfile::tempdir().expect("a place");
    let outcome = holdfast_env::real::run(async { late_destruction(place.path()).await });
    planted::plant(&[]);
    let why = outcome.expect_err("it is found");
    assert!(why.contains("Destroy") && why.contains("was answered Ok"), "{why}");
}

/// A store with the only voter of a group that has elected it.
fn with_a_voter(place: &Path) -> MemoryDisk {
    let disk = MemoryDisk::new(1);
    simulate(1, async {
        let member = on(&disk, place, true).await;
        let voters = [(ReplicaId(1), StoreId(1))].into();
        let group = member.host.volume(GROUP).expect("runs").group().clone();
        group.bootstrap(&voters).await.expect("begins");
        // Its members first, then a leader's first entry.
        group.position().reached(LogIndex(1)).await;
        assert!(group.is_leader());
        member.host.stop().await;
    });
    disk.power_cut(Tear::Nothing);
    disk
}

async fn on(disk: &MemoryDisk, place: &Path, fresh: bool) -> Member {
    let switch = Rc::new(Switch::default());
    start_on(place, &switch, 1, fresh, |_| disk.directory()).await
}

/// The disk stops at the operation of this number after the store has started; whether the replica was destroyed by then.
fn destroyed_until(disk: &MemoryDisk, place: &Path, operation: u64) -> bool {
    simulate(2, async {
        let member = on(disk, place, false).await;
        disk.at(disk.operations() + operation, Fault::Freeze);
        let destroyed = std::pin::pin!(member.host.destroy(replica(1).id, 1));
        let stopped = std::pin::pin!(disk.frozen());
        match futures_util::future::select(destroyed, stopped).await {
            futures_util::future::Either::Left((ended, _)) => {
                ended.expect("the disk does what it is told");
                true
            }
            futures_util::future::Either::Right(_) => false,
        }
    })
}

#[test]
fn whenever_the_power_goes_a_voter_is_there_with_what_it_had_or_never_again() {
    let place = tempfile::tempdir().expect("a place");
    let whole = with_a_voter(place.path());
    let (mut kept, mut gone) = (0, 0);
    for operation in 0.. {
        let mut is_done = false;
        for tear in [Tear::Nothing, Tear::Everything, Tear::Random(operation)] {
            let disk = MemoryDisk::from_image(&whole.image(), operation);
            is_done = destroyed_until(&disk, place.path(), operation);
            disk.power_cut(tear);
            let what = format!("cut at {operation}, {tear:?}");
            simulate(3, async {
                let member = on(&disk, place.path(), false).await;
                // The request that made it, late.
                match member.host.create(&replica(1)).await {
                    Ok(volume) => {
                        assert!(!is_done, "{what}: it was destroyed");
                        let log = volume.group().log().clone();
                        assert!(log.last().is_some() && log.vote().is_some(), "{what}: it is blank");
                        kept += 1;
                    }
                    Err(_) => gone += 1,
                }
                member.host.destroy(replica(1).id, 1).await.expect("is destroyed in the end");
                member.host.create(&replica(1)).await.map(drop).expect_err("never again");
            });
        }
        if is_done {
            break;
        }
    }
    assert!(kept >= 3 && gone >= 15, "{kept} times it was there, {gone} times gone");
}
