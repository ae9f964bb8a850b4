//! Histories: at random over several lives, and short ones exhaustively.

use std::cell::Cell;
use std::rc::Rc;

use holdfast_store::testing::{Fault, Image, MemoryDisk, Random, Tear, plant};

use crate::life::{Life, formatted, live, wander};
use crate::model::{Groups, who};

/// Lives that end at random operations by a kill or a power cut.
pub fn random_history(image: &Image, seed: u64) -> Result<(), String> {
    let random = Random::new(seed);
    let disk = MemoryDisk::from_image(image, seed);
    let groups = Groups::default();
    let next_group = Rc::new(Cell::new(0));
    for life in 0..4 {
        if life > 0 || random.one_in(4) {
            // The first life is long, so that segments are used again.
            disk.at(disk.operations() + random.below(60), Fault::Freeze);
        }
        let (seed, next_group) = (random.next(), next_group.clone());
        live(&disk, &groups, seed, |life| wander(life, seed, next_group))
            .map_err(|why| format!("life {life}: {why}"))?;
        match random.below(4) {
            0 => disk.kill(),
            1 => disk.power_cut(Tear::Nothing),
            _ => disk.power_cut(Tear::Random(random.next())),
        }
    }
    live(&disk, &groups, seed, |life| async move { life.settle().await })
        .map_err(|why| format!("at the end: {why}"))
}

fn seeds() -> u64 {
    std::env::var("HOLDFAST_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(300)
}

#[test]
fn nothing_acknowledged_is_lost_in_any_history() {
    let image = formatted();
    for seed in 0..seeds() {
        if let Err(why) = random_history(&image, seed) {
            panic!("seed {seed}: {why}");
        }
    }
}

/// Whether some of the first seeds notices a planted fault.
fn is_noticed(fault: &str) -> bool {
    let image = formatted();
    plant(&[fault]);
    let noticed = (0..200).any(|seed| random_history(&image, seed).is_err());
    plant(&[]);
    noticed
}

#[test]
fn a_journal_that_does_not_flush_is_noticed() {
    assert!(is_noticed("skip-journal-flush"));
}

#[test]
fn a_recovery_that_forgets_votes_is_noticed() {
    assert!(is_noticed("forget-vote"));
}

#[test]
fn a_segment_that_is_reused_too_early_is_noticed() {
    assert!(is_noticed("reuse-at-once"));
}

type Script = fn(&Life);

/// Short histories; each runs up to every operation of its disk, with every way of tearing.
const SCRIPTS: [Script; 6] = [
    |life| {
        life.append(who(0), 3);
        life.vote(who(0), "a".into());
        life.append(who(0), 2);
    },
    |life| {
        life.append(who(0), 4);
        life.truncate(who(0), 2);
        life.append(who(0), 2);
    },
    |life| {
        life.vote(who(0), "a".into());
        life.vote(who(1), "b".into());
        life.vote(who(0), "c".into());
    },
    |life| {
        life.append(who(0), 1);
        life.append(who(1), 6);
        life.truncate(who(1), 1);
        life.vote(who(1), "d".into());
    },
    |life| {
        life.truncate(who(0), 0);
        life.append(who(0), 5);
        life.drop_group(who(1));
    },
    |life| {
        if let Some(committed) = life.commit(who(0)) {
            life.purge(who(0), committed);
        }
        life.append(who(0), 7);
    },
];

/// Two groups with a few entries, then the script; both are cut off, and something follows.
fn short_history(image: &Image, script: Script, stop: u64, tear: Tear) -> Result<bool, String> {
    let disk = MemoryDisk::from_image(image, stop);
    let groups = Groups::default();
    live(&disk, &groups, 1, |life| async move {
        life.create(0);
        life.create(1);
        life.settle().await;
        life.append(who(0), 2);
        life.append(who(1), 2);
        life.settle().await;
    })?;
    disk.kill();
    let begin = disk.operations();
    disk.at(begin + stop, Fault::Freeze);
    live(&disk, &groups, 2, |life| async move {
        script(&life);
        life.settle().await;
    })?;
    let stopped = disk.operations() > begin + stop;
    disk.power_cut(tear);
    // What was cut stays cut, and what is written over it lasts; the second stop comes before the cut is durable.
    for stop in [6, 7, 40] {
        disk.at(disk.operations() + stop, Fault::Freeze);
        live(&disk, &groups, 3, |life| async move {
            for who in life.alive() {
                life.append(who, 1);
                life.vote(who, "later".into());
            }
            life.settle().await;
        })?;
        disk.power_cut(tear);
    }
    live(&disk, &groups, 4, |life| async move { life.settle().await })?;
    Ok(stopped)
}

#[test]
fn every_cut_of_short_histories() {
    let image = formatted();
    let tears = [Tear::Nothing, Tear::Everything, Tear::Sectors(1), Tear::Sectors(0xfe), Tear::Sectors(0x55)];
    let tears = || tears.into_iter().chain((1..4).map(Tear::Random));
    let mut cases = 0;
    for (number, script) in SCRIPTS.into_iter().enumerate() {
        for tear in tears() {
            for stop in 0.. {
                match short_history(&image, script, stop, tear) {
                    Ok(true) => cases += 1,
                    Ok(false) => break,
                    Err(why) => panic!("script {number}, stopped at {stop}, {tear:?}: {why}"),
                }
            }
        }
    }
    println!("{cases} cases");
    assert!(cases > 350, "only {cases} cases: the scripts have become shorter than they were");
}
