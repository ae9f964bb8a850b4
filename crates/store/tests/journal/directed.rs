//! One test per fault of the medium.

use std::io;
use std::time::Duration;

use holdfast_store::StoreError;
use holdfast_store::journal::{HUNG_AFTER, Journal, Recovery};
use holdfast_store::testing::{Fault, MemoryDisk, Tear, simulate};

use crate::life::{Life, formatted, identity, live, options};
use crate::model::{self, Groups, who};

async fn two_groups(life: &Life) {
    life.create(0);
    life.create(1);
    life.settle().await;
    life.append(who(0), 3);
    life.append(who(1), 3);
    life.settle().await;
}

fn prepared(seed: u64) -> (MemoryDisk, Groups) {
    let disk = MemoryDisk::from_image(&formatted(), seed);
    let groups = Groups::default();
    live(&disk, &groups, seed, |life| async move { two_groups(&life).await }).expect("lives");
    disk.power_cut(Tear::Nothing);
    (disk, groups)
}

fn reopened(disk: &MemoryDisk) -> Result<Vec<(holdfast_store::ReplicaIdentity, Recovery)>, StoreError> {
    simulate(5, async {
        let (_, groups) = Journal::open(disk.directory(), &identity(), &options()).await?;
        Ok(groups.into_iter().map(|group| (group.id, group.state)).collect())
    })
}

#[test]
fn a_failed_write_stops_the_store_and_nothing_is_tried_again() {
    for (number, fault) in [io::ErrorKind::Other, io::ErrorKind::StorageFull].into_iter().enumerate() {
        let (disk, groups) = prepared(number as u64);
        simulate(1, async {
            let (journal, _) = Journal::open(disk.directory(), &identity(), &options()).await.expect("opens");
            let life = Life { journal: journal.clone(), groups: groups.clone() };
            holdfast_env::sleep(Duration::from_millis(500)).await;
            disk.at(disk.operations(), Fault::Fail(fault));
            life.append(who(0), 1);
            life.vote(who(1), "never".into());
            life.settle().await;
            let failed = journal.failed().expect("the store has stopped");
            assert!(matches!(failed, StoreError::Io { .. }), "{failed}");
            let after = disk.operations();
            let log = journal.group(who(0)).expect("is there");
            assert_eq!(log.save_vote("x".into()).await, Err(failed.clone()));
            log.append(
                vec![model::entry(who(0), model::id(9, 4))],
                Box::new(move |result| {
                    assert_eq!(result, Err(failed));
                }),
            );
            holdfast_env::sleep(Duration::from_secs(5)).await;
            assert_eq!(disk.operations(), after, "the disk is not touched again");
        });
        disk.power_cut(Tear::Nothing);
        live(&disk, &groups, 3, |life| async move { life.settle().await }).expect("nothing is lost");
    }
}

#[test]
fn what_is_behind_a_batch_that_hangs_is_not_acknowledged() {
    let (disk, groups) = prepared(1);
    live(&disk, &groups, 1, |life| {
        let (disk, groups) = (disk.clone(), groups.clone());
        async move {
            holdfast_env::sleep(Duration::from_millis(500)).await;
            disk.at(disk.operations(), Fault::Hang(Duration::from_secs(9)));
            life.append(who(0), 1);
            life.append(who(1), 1);
            life.vote(who(1), "v".into());
            holdfast_env::sleep(Duration::from_secs(1)).await;
            assert!(!groups.borrow()[&who(1)].steps[0].1.get(), "a batch before it may be lost");
        }
    })
    .expect("lives");
    disk.power_cut(Tear::Nothing);
    live(&disk, &groups, 3, |life| async move { life.settle().await }).expect("nothing is lost");
}

#[test]
fn a_store_whose_segments_cannot_be_flushed_does_not_open() {
    let (disk, _) = prepared(1);
    disk.at(disk.operations(), Fault::Fail(io::ErrorKind::Other));
    assert!(matches!(reopened(&disk), Err(StoreError::Io { .. })));
}

#[test]
fn what_a_killed_process_left_in_the_cache_is_flushed_before_it_counts() {
    for stop in 0..30 {
        let (disk, groups) = prepared(stop);
        disk.at(disk.operations() + stop, Fault::Freeze);
        live(&disk, &groups, 1, |life| async move {
            life.append(who(0), 2);
            life.append(who(1), 2);
            life.vote(who(0), "v".into());
            life.settle().await;
        })
        .expect("lives");
        disk.kill();
        // The next process finds it, and counts on it.
        live(&disk, &groups, 2, |_| async {}).expect("reads the cache");
        disk.power_cut(Tear::Nothing);
        live(&disk, &groups, 3, |_| async {}).unwrap_or_else(|why| panic!("stopped at {stop}: {why}"));
    }
}

/// Writes while the idle journal's next batch is written elsewhere, or nowhere; then everything is read again.
fn write_goes_wrong(fault: Fault, another_follows: bool) -> Vec<Recovery> {
    let (disk, groups) = prepared(7);
    live(&disk, &groups, 1, |life| {
        let disk = disk.clone();
        async move {
            holdfast_env::sleep(Duration::from_millis(500)).await;
            disk.at(disk.operations(), fault);
            life.append(who(0), 3);
            life.settle().await;
            if another_follows {
                life.append(who(1), 3);
                life.settle().await;
                holdfast_env::sleep(Duration::from_millis(500)).await;
            }
        }
    })
    .expect("lives");
    disk.power_cut(Tear::Nothing);
    let found = reopened(&disk).expect("opens");
    disk.power_cut(Tear::Nothing);
    assert_eq!(reopened(&disk).expect("opens").len(), found.len());
    found.into_iter().map(|(_, state)| state).collect()
}

#[test]
fn a_lost_write_that_others_followed_is_noticed() {
    let found = write_goes_wrong(Fault::Lose, true);
    assert!(found.iter().all(|state| matches!(state, Recovery::Unknown(_))), "{found:?}");
}

#[test]
fn a_misdirected_write_is_noticed_even_if_it_is_the_last() {
    for another_follows in [true, false] {
        let found = write_goes_wrong(Fault::Misdirect(400 * 4096), another_follows);
        assert!(found.iter().all(|state| matches!(state, Recovery::Unknown(_))), "{found:?}");
    }
}

#[test]
fn an_idle_journal_says_that_its_last_batch_was_flushed() {
    let (disk, groups) = prepared(3);
    live(&disk, &groups, 1, |life| async move {
        life.append(who(0), 6);
        life.settle().await;
        holdfast_env::sleep(Duration::from_millis(500)).await;
    })
    .expect("lives");
    // Rot of the very last entry's payload: without the mark this would be a torn tail.
    let payloads = disk.names().into_iter().flat_map(|name| {
        let written = disk.written(&name).into_iter();
        written.map(move |(block, at)| (at, block, name.clone())).collect::<Vec<_>>()
    });
    let payloads =
        payloads.filter(|(_, block, name)| disk.block(name, *block).starts_with(model::PAYLOAD_MARK));
    let (_, block, name) = payloads.max().expect("payloads");
    disk.rot(&name, block * 4096 + 2000, 4);
    disk.power_cut(Tear::Nothing);
    let found = reopened(&disk).expect("opens");
    let faulty = found.iter().find(|(id, _)| *id == who(0)).map(|(_, state)| state.clone());
    assert!(matches!(&faulty, Some(Recovery::Faulty(ids)) if ids.len() == 1), "{found:?}");
}

#[test]
fn an_idle_journal_writes_one_mark_and_then_nothing() {
    let (disk, _) = prepared(3);
    simulate(1, async {
        let (_journal, _) = Journal::open(disk.directory(), &identity(), &options()).await.expect("opens");
        holdfast_env::sleep(Duration::from_secs(1)).await;
        let after = disk.operations();
        holdfast_env::sleep(Duration::from_secs(60)).await;
        assert_eq!(disk.operations(), after);
    });
    disk.kill();
    let before = disk.operations();
    reopened(&disk).expect("opens");
    let flushes = 1 + u64::from(options().segments);
    assert_eq!(disk.operations() - before, flushes, "segments are flushed, and nothing is written");
}

#[test]
fn a_journal_of_another_format_is_refused_not_taken_for_empty() {
    let (disk, _) = prepared(3);
    for copy in [0, 4096] {
        // The version, and the checksum does not matter: it is looked at first.
        disk.rot("journal/identity", copy + 8, 0x40);
    }
    let refused = reopened(&disk);
    assert!(
        matches!(&refused, Err(StoreError::Damaged { why, .. }) if why.contains("version")),
        "{refused:?}"
    );
}

#[test]
fn a_disk_that_hangs_is_noticed_and_forgiven() {
    let (disk, groups) = prepared(1);
    simulate(1, async {
        let (journal, _) = Journal::open(disk.directory(), &identity(), &options()).await.expect("opens");
        let life = Life { journal: journal.clone(), groups: groups.clone() };
        holdfast_env::sleep(Duration::from_millis(500)).await;
        let long = HUNG_AFTER / 2;
        disk.at(disk.operations(), Fault::Hang(long));
        life.append(who(0), 1);
        holdfast_env::sleep(long * 3).await;
        assert!(!journal.is_hung(), "a slow write is no hung disk");
        // Two batches are under way at once: the store hangs once, and until both have ended.
        disk.at(disk.operations(), Fault::Hang(HUNG_AFTER * 2));
        disk.at(disk.operations() + 1, Fault::Hang(HUNG_AFTER * 3));
        life.append(who(0), 1);
        holdfast_env::sleep(Duration::from_millis(1)).await;
        life.append(who(1), 1);
        holdfast_env::sleep(HUNG_AFTER + long).await;
        assert!(journal.is_hung());
        holdfast_env::sleep(HUNG_AFTER).await;
        assert!(journal.is_hung(), "the second batch still hangs");
        life.settle().await;
        assert_eq!((journal.is_hung(), journal.failed()), (false, None));
    });
    live(&disk, &groups, 3, |life| async move { life.settle().await }).expect("nothing is lost");
}
