//! Repair of rotten payloads: it lasts once it is acknowledged, whatever the power does meanwhile; nothing but the
//! entry's own payload is taken; and the place of the old one is given back.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use holdfast_store::journal::{Journal, Recovery, StoreOptions};
use holdfast_store::testing::{Fault, Image, MemoryDisk, Random, Tear, simulate};
use holdfast_store::{EntryId, ReplicaIdentity, StoreError};

use crate::damage::{overwrite, settled};
use crate::life::{identity, live, options};
use crate::model::{self, Groups, PAYLOAD_MARK};

type Entries = BTreeSet<(ReplicaIdentity, EntryId)>;

const SEGMENTS: u32 = 12;

/// An empty store with room for what is repaired.
fn formatted() -> Image {
    let disk = MemoryDisk::new(0);
    let options = StoreOptions { segments: SEGMENTS, ..options() };
    simulate(1, async {
        Journal::format(disk.directory(), &identity(), &options).await.expect("formats");
    });
    disk.image()
}

/// A quiet disk on which some payloads have rotted.
fn rotten(image: &Image, seed: u64) -> Result<(MemoryDisk, Groups), String> {
    let random = Random::new(seed);
    let disk = MemoryDisk::from_image(image, seed);
    let groups = Groups::default();
    live(&disk, &groups, seed, |life| async move {
        for number in 0..3 {
            life.create(seed * 3 + number);
        }
        life.settle().await;
        for _ in 0..2 {
            for who in life.alive() {
                life.append(who, 2);
            }
            life.settle().await;
        }
        holdfast_env::sleep(Duration::from_millis(500)).await;
    })?;
    disk.kill();
    let places: Vec<_> =
        settled(&disk, u64::MAX).into_iter().filter(|place| place.bytes.starts_with(PAYLOAD_MARK)).collect();
    for _ in 0..4 {
        let place = &places[random.below(places.len() as u64) as usize];
        if random.one_in(4) {
            disk.make_unreadable(&place.file, place.block);
        } else {
            disk.rot(&place.file, place.block * 4096 + random.below(4096), 1 << random.below(8));
        }
    }
    Ok((disk, groups))
}

/// What a life found damaged, and what of it is acknowledged to be repaired.
#[derive(Default)]
struct Seen {
    faulty: RefCell<Entries>,
    repaired: RefCell<Entries>,
}

/// Opens, checks, and repairs everything, until it is done or the disk stops.
fn repairing_life(disk: &MemoryDisk, groups: &Groups, seed: u64) -> Result<Rc<Seen>, String> {
    let seen = Rc::new(Seen::default());
    let work = async {
        let (journal, recovered) =
            Journal::open(disk.directory(), &identity(), &options()).await.map_err(|e| e.to_string())?;
        let found = model::check(groups, &recovered, true).await?;
        for (who, state) in found {
            match state {
                Recovery::Clean => {}
                Recovery::Unknown(why) => return Err(format!("group {} is unknown: {why}", who.group)),
                Recovery::Faulty(ids) => {
                    seen.faulty.borrow_mut().extend(ids.into_iter().map(|id| (who, id)));
                }
            }
        }
        let repairs = seen.faulty.borrow().clone().into_iter().map(|(who, id)| {
            let (log, seen) = (journal.group(who).expect("is there"), seen.clone());
            async move {
                let mut wrong = model::entry(who, id).payload.to_vec();
                wrong[7] ^= 1;
                let refused = log.repair(id, wrong.into()).await;
                if !matches!(refused, Err(StoreError::Damaged { .. })) {
                    return Err(format!("a payload that is not the entry's gave {refused:?}"));
                }
                match log.repair(id, model::entry(who, id).payload).await {
                    Ok(true) => drop(seen.repaired.borrow_mut().insert((who, id))),
                    other => return Err(format!("repairing {id:?} gave {other:?}")),
                }
                let read = log.read(id.index, id.index.next(), 1).await.map_err(|error| error.to_string())?;
                if read == [model::entry(who, id)] {
                    Ok(())
                } else {
                    Err("it reads as something else".into())
                }
            }
        });
        futures_util::future::try_join_all(repairs).await.map(drop)
    };
    let result = simulate(seed, async {
        let ended = futures_util::future::select(Box::pin(work), Box::pin(disk.frozen())).await;
        match ended {
            futures_util::future::Either::Left((result, _)) => result,
            futures_util::future::Either::Right(_) => Ok(()),
        }
    });
    result.map(|()| seen)
}

/// Whether the disk stopped before everything was repaired.
fn cut_at(image: &Image, seed: u64, stop: u64, tear: Tear) -> Result<bool, String> {
    let (disk, groups) = rotten(image, seed)?;
    disk.at(disk.operations() + stop, Fault::Freeze);
    let first = repairing_life(&disk, &groups, 1)?;
    let stopped =
        first.repaired.borrow().len() < first.faulty.borrow().len() || first.faulty.borrow().is_empty();
    disk.power_cut(tear);
    let second = repairing_life(&disk, &groups, 2)?;
    let again = second.faulty.borrow();
    if let Some(back) = again.iter().find(|id| first.repaired.borrow().contains(id)) {
        return Err(format!("{back:?} was repaired and is damaged again"));
    }
    if !first.faulty.borrow().is_empty() && !again.is_subset(&first.faulty.borrow()) {
        return Err(format!("damaged were {:?}, then {again:?}", first.faulty.borrow()));
    }
    disk.power_cut(tear);
    let third = repairing_life(&disk, &groups, 3)?;
    let left = third.faulty.borrow();
    if left.is_empty() { Ok(stopped) } else { Err(format!("{left:?} are damaged after their repair")) }
}

#[test]
fn a_repair_lasts_from_its_acknowledgement_on_wherever_the_power_is_cut() {
    let image = formatted();
    let tears = [Tear::Nothing, Tear::Everything, Tear::Sectors(0x55), Tear::Random(3)];
    let (mut cases, mut whole) = (0, 0);
    for seed in 0..3 {
        for tear in tears {
            for stop in 0..40 {
                match cut_at(&image, seed, stop, tear) {
                    Ok(true) => cases += 1,
                    Ok(false) => {
                        whole += 1;
                        break;
                    }
                    Err(why) => panic!("seed {seed}, stopped at {stop}, {tear:?}: {why}"),
                }
            }
        }
    }
    println!("{cases} cuts in the middle of a repair, {whole} repairs");
    assert!(cases > 60 && whole > 0, "only {cases} cuts, {whole} repairs");
}

#[test]
fn the_segment_of_a_payload_that_was_repaired_is_used_again() {
    let image = formatted();
    let hits = Cell::new(0);
    for seed in 0..6 {
        let (disk, groups) = rotten(&image, seed).expect("lives");
        let first = repairing_life(&disk, &groups, 1).unwrap_or_else(|why| panic!("seed {seed}: {why}"));
        hits.set(hits.get() + first.faulty.borrow().len());
        disk.kill();
        // In one life: repaired, then written over and over. A segment that stays pinned stops that.
        let (disk, groups) = rotten(&image, seed).expect("lives");
        simulate(2, async {
            let opened = Journal::open(disk.directory(), &identity(), &options()).await;
            let (journal, recovered) = opened.expect("opens");
            model::check(&groups, &recovered, true).await.expect("as it was");
            for found in &recovered {
                for sum in found.log.faulty() {
                    let payload = model::entry(found.id, sum.id).payload;
                    assert_eq!(found.log.repair(sum.id, payload).await, Ok(true));
                }
                if let Some(last) = found.log.last() {
                    found.log.purge(last).await.expect("purges");
                }
            }
            let writing = overwrite(&journal, 90);
            let done = holdfast_env::timeout(Duration::from_secs(600), writing).await;
            assert!(done.is_ok(), "seed {seed}: the journal is full of what nobody needs");
            // Everything is purged: only what is in the newest segments may be in use.
            let used = journal.usage().bytes_used / options().segment_bytes;
            assert!(
                used <= u64::from(SEGMENTS / 2) + 1,
                "seed {seed}: {used} segments are in use and nothing is needed"
            );
        });
    }
    assert!(hits.get() >= 6, "only {} entries were damaged", hits.get());
}
