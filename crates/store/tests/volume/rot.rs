//! Rot of home, table and manifest: never read as something else, and found with what is left.

use std::rc::Rc;

use holdfast_store::testing::{Image, MemoryDisk, Random, Tear, plant, simulate};
use holdfast_types::BLOCK_BYTES;

use crate::crashes::{formatted, live};
use crate::replica::{Command, Reference, Replica};

/// A replica at rest: everything is home, after several checkpoints.
pub fn at_rest(image: &Image, seed: u64) -> Result<(MemoryDisk, Rc<Reference>), String> {
    let disk = MemoryDisk::from_image(image, seed);
    let reference = Rc::new(Reference::default());
    live(&disk, &reference, seed, |replica| async move {
        let random = Random::new(seed);
        for _ in 0..2 + random.below(4) {
            for _ in 0..4 {
                replica.submit(Command::at_random(&random));
            }
            replica.clean().await.map_err(|error| error.to_string())?;
        }
        Ok(())
    })?;
    disk.power_cut(Tear::Nothing);
    Ok((disk, reference))
}

fn damage(disk: &MemoryDisk, name: &str, random: &Random) -> u64 {
    let written: Vec<u64> = disk.written(name).into_iter().map(|(block, _)| block).collect();
    let block = written[random.below(written.len() as u64) as usize];
    if random.one_in(3) {
        disk.make_unreadable(name, block);
    } else {
        // A page's padding is not covered where nobody looks; its first bytes always are.
        disk.rot(name, block * BLOCK_BYTES as u64 + random.below(40), 1 << random.below(8));
    }
    block
}

pub fn file(disk: &MemoryDisk, end: &str) -> String {
    disk.names().into_iter().find(|name| name.ends_with(end)).expect("the file is there")
}

fn bad_blocks(disk: &MemoryDisk, reference: &Rc<Reference>) -> Result<Vec<u64>, String> {
    simulate(8, async { Replica::open(disk.directory(), reference).await?.check().await })
}

fn rotten_table(image: &Image, seed: u64) -> Result<(), String> {
    let (disk, reference) = at_rest(image, seed)?;
    damage(&disk, &file(&disk, "/table"), &Random::new(seed + 1000));
    let bad = bad_blocks(&disk, &reference)?;
    if bad.is_empty() { Ok(()) } else { Err(format!("{bad:?} are bad, the page has a second copy")) }
}

#[test]
fn a_rotten_table_page_has_a_second_copy_that_is_as_new() {
    let image = formatted();
    for seed in 0..60 {
        rotten_table(&image, seed).unwrap_or_else(|why| panic!("seed {seed}: {why}"));
    }
}

#[test]
fn a_table_with_one_new_copy_of_each_page_is_noticed() {
    let image = formatted();
    plant(&["one-table-copy"]);
    assert!((0..60).any(|seed| rotten_table(&image, seed).is_err()));
    plant(&[]);
}

#[test]
fn a_page_that_lost_both_copies_makes_its_blocks_bad_and_no_others() {
    let (disk, reference) = at_rest(&formatted(), 3).expect("lives");
    let table = file(&disk, "/table");
    disk.rot(&table, 20, 1);
    disk.rot(&table, 4096 + 20, 1);
    let bad = bad_blocks(&disk, &reference).expect("opens");
    assert!(!bad.is_empty() && bad.iter().all(|block| *block < 14 * 64), "{bad:?}");
}

#[test]
fn a_rotten_home_block_is_bad_and_no_other() {
    let image = formatted();
    let mut hits = 0;
    for seed in 0..40 {
        let (disk, reference) = at_rest(&image, seed).expect("lives");
        let block = damage(&disk, &file(&disk, "/home"), &Random::new(seed + 1000));
        match bad_blocks(&disk, &reference) {
            Ok(bad) if bad == [block] => hits += 1,
            Ok(bad) => assert_eq!(bad, Vec::<u64>::new(), "seed {seed}: {block} was damaged"),
            Err(why) => panic!("seed {seed}: {why}"),
        }
    }
    assert!(hits > 10, "only {hits} damaged blocks were in use");
}

#[test]
fn a_lost_manifest_generation_is_refused_or_harmless() {
    let image = formatted();
    let mut refused = 0;
    for seed in 0..30 {
        let (disk, reference) = at_rest(&image, seed).expect("lives");
        damage(&disk, &file(&disk, "/manifest"), &Random::new(seed + 1000));
        match bad_blocks(&disk, &reference) {
            Ok(bad) => assert_eq!(bad, Vec::<u64>::new(), "seed {seed}"),
            Err(why) => {
                assert!(why.starts_with("refused"), "seed {seed}: {why}");
                refused += 1;
            }
        }
    }
    assert!(refused > 5, "only {refused}");
}
