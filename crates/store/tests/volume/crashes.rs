//! Power cuts at every moment of a cleaner's pass, and kills at random ones.

use std::rc::Rc;
use std::time::Duration;

use futures_util::future::{Either, select};
use holdfast_store::testing::{Fault, Image, MemoryDisk, Random, Tear, plant, simulate};

use crate::replica::{BLOCKS, Command, Reference, Replica, What};

pub fn formatted() -> Image {
    let disk = MemoryDisk::new(0);
    simulate(1, Replica::create(disk.directory()));
    disk.image()
}

/// Opens the replica, checks every block, and does some work, until it is done or the world stops.
pub fn live<W: Future<Output = Result<(), String>>>(
    disk: &MemoryDisk,
    reference: &Rc<Reference>,
    seed: u64,
    work: impl FnOnce(Rc<Replica>) -> W,
) -> Result<(), String> {
    let life = async {
        let replica = Replica::open(disk.directory(), reference).await?;
        let bad = replica.check().await?;
        if !bad.is_empty() {
            return Err(format!("blocks {bad:?} are bad"));
        }
        work(replica).await
    };
    simulate(seed, async {
        match select(Box::pin(life), Box::pin(disk.frozen())).await {
            Either::Left((result, _)) => result,
            Either::Right(_) => Ok(()),
        }
    })
}

async fn wander(replica: Rc<Replica>, seed: u64) -> Result<(), String> {
    let random = Random::new(seed);
    for _ in 0..random.below(60) {
        match random.below(12) {
            0..8 => replica.submit(Command::at_random(&random)),
            8 => replica.flushed().await,
            9 | 10 => replica.clean().await.map_err(|error| error.to_string())?,
            _ => drop(replica.check().await?),
        }
        if replica.journal.pressure().used_percent >= 50 {
            replica.clean().await.map_err(|error| error.to_string())?;
        }
    }
    Ok(())
}

fn random_history(image: &Image, seed: u64) -> Result<(), String> {
    let random = Random::new(seed);
    let disk = MemoryDisk::from_image(image, seed);
    let reference = Rc::new(Reference::default());
    for life in 0..4 {
        disk.at(disk.operations() + random.below(250), Fault::Freeze);
        let seed = random.next();
        live(&disk, &reference, seed, |replica| wander(replica, seed))
            .map_err(|why| format!("life {life}: {why}"))?;
        match random.below(4) {
            0 => disk.kill(),
            1 => disk.power_cut(Tear::Nothing),
            _ => disk.power_cut(Tear::Random(random.next())),
        }
    }
    live(&disk, &reference, seed, |replica| async move {
        drop(replica.check().await?);
        Ok(())
    })
    .map_err(|why| format!("at the end: {why}"))
}

#[test]
fn every_block_is_right_after_any_history() {
    let image = formatted();
    for seed in 0..50 {
        if let Err(why) = random_history(&image, seed) {
            panic!("seed {seed}: {why}");
        }
    }
}

fn command(what: What, start: u64, count: u32) -> Command {
    Command { what, start, count }
}

/// A first checkpoint.
pub fn cleaned_once(image: &Image, seed: u64) -> Result<(MemoryDisk, Rc<Reference>), String> {
    let disk = MemoryDisk::from_image(image, seed);
    let reference = Rc::new(Reference::default());
    live(&disk, &reference, 1, |replica| async move {
        // Page 0 gets a checkpoint of its own before; page 1 is written for the first time when it is cut.
        replica.submit(command(What::Write, 0, 200));
        replica.submit(command(What::Write, 300, 64));
        replica.clean().await.map_err(|error| error.to_string())
    })?;
    disk.kill();
    Ok((disk, reference))
}

/// Two checkpoints more, with data, zeros and trims over what is there.
pub fn clean_twice_more(disk: &MemoryDisk, reference: &Rc<Reference>) -> Result<(), String> {
    live(disk, reference, 2, |replica| async move {
        replica.submit(command(What::Write, 100, 30));
        replica.submit(command(What::Trim, 256, 128));
        replica.submit(command(What::Zero, 10, 5));
        replica.submit(command(What::Write, 14 * 64 + 3, 40));
        replica.submit(command(What::Write, BLOCKS - 10, 10));
        replica.clean().await.map_err(|error| error.to_string())?;
        replica.submit(command(What::Write, 300, 5));
        replica.clean().await.map_err(|error| error.to_string())
    })
}

/// Checkpoints over each other; the second one or the third is stopped at an operation.
fn cut_cleaning(image: &Image, stop: u64, tear: Tear) -> Result<bool, String> {
    let (disk, reference) = cleaned_once(image, stop)?;
    let begin = disk.operations();
    disk.at(begin + stop, Fault::Freeze);
    clean_twice_more(&disk, &reference)?;
    let stopped = disk.operations() > begin + stop;
    disk.power_cut(tear);
    for _ in 0..2 {
        live(&disk, &reference, 3, |replica| async move {
            replica.submit(command(What::Write, 110, 3));
            replica.clean().await.map_err(|error| error.to_string())
        })?;
        disk.power_cut(tear);
    }
    live(&disk, &reference, 4, |_| async { Ok(()) })?;
    Ok(stopped)
}

fn every_cut(image: &Image) -> Result<u32, String> {
    let mut cases = 0;
    let tears = [Tear::Nothing, Tear::Everything, Tear::Sectors(0x0f), Tear::Random(1), Tear::Random(2)];
    for tear in tears {
        for stop in 0.. {
            match cut_cleaning(image, stop, tear).map_err(|why| format!("stop {stop}, {tear:?}: {why}"))? {
                true => cases += 1,
                false => break,
            }
        }
    }
    Ok(cases)
}

#[test]
fn every_cut_of_a_cleaning_pass() {
    let cases = every_cut(&formatted()).unwrap_or_else(|why| panic!("{why}"));
    println!("{cases} cases");
    assert!(cases > 100, "only {cases} cases");
}

fn is_noticed(fault: &str) -> bool {
    let image = formatted();
    plant(&[fault]);
    let noticed = every_cut(&image).is_err() || (0..40).any(|seed| random_history(&image, seed).is_err());
    plant(&[]);
    noticed
}

#[test]
fn a_checkpoint_before_the_home_flush_is_noticed() {
    assert!(is_noticed("checkpoint-before-home-flush"));
}

/// A pass while the journal's disk takes long for the last entry, over a block that an entry before it wrote; then the
/// power goes.
fn cleaned_before_the_flush(image: &Image) -> Result<(), String> {
    let disk = MemoryDisk::from_image(image, 1);
    let reference = Rc::new(Reference::default());
    let slow = disk.clone();
    live(&disk, &reference, 1, |replica| async move {
        replica.submit(command(What::Write, 0, 8));
        replica.flushed().await;
        // Else this is what waits for the disk.
        let known = replica.log.keep_committed(replica.log.flushed()).await;
        known.map_err(|error| error.to_string())?;
        // Later than the closing mark of the journal.
        holdfast_env::sleep(Duration::from_secs(1)).await;
        slow.at(slow.operations(), Fault::Hang(Duration::from_secs(60)));
        replica.submit(command(What::Write, 0, 8));
        replica.data.clean(&*replica).await.map(drop).map_err(|error| error.to_string())
    })?;
    disk.power_cut(Tear::Nothing);
    live(&disk, &reference, 2, |_| async { Ok(()) })
}

#[test]
fn what_is_not_flushed_is_not_moved_home() {
    let image = formatted();
    cleaned_before_the_flush(&image).unwrap_or_else(|why| panic!("{why}"));
    plant(&["move-unflushed-home"]);
    assert!(cleaned_before_the_flush(&image).is_err());
    plant(&[]);
}

#[test]
fn what_comes_home_is_known_to_be_committed() {
    assert!(is_noticed("home-before-commit"));
}

#[test]
fn a_table_page_that_is_written_in_place_is_noticed() {
    assert!(is_noticed("page-in-place"));
}

/// The journal is full, and what stands in line hides a block that was durable; then it is cleaned, and the power goes.
fn hidden_by_what_waits(image: &Image) -> Result<(), String> {
    let disk = MemoryDisk::from_image(image, 1);
    let reference = Rc::new(Reference::default());
    live(&disk, &reference, 1, |replica| async move {
        let write = |start, count| replica.submit(Command { what: What::Write, start, count });
        write(0, 8);
        replica.flushed().await;
        let waits = |replica: &Replica| replica.journal.usage().waiting_records > 4;
        while !waits(&replica) {
            write(200, 200);
            holdfast_env::sleep(Duration::from_millis(5)).await;
        }
        write(0, 8);
        let checkpoint = replica.data.clean(&*replica).await.map_err(|error| error.to_string())?;
        assert!(checkpoint.id.index.0 > 1 && waits(&replica), "{checkpoint:?}");
        Ok(())
    })?;
    disk.power_cut(Tear::Nothing);
    live(&disk, &reference, 2, |_| async { Ok(()) })
}

#[test]
fn what_newer_commands_hide_is_not_served_before_they_are_applied_again() {
    let image = formatted();
    hidden_by_what_waits(&image).unwrap_or_else(|why| panic!("{why}"));
    plant(&["forget-hidden-runs"]);
    assert!(hidden_by_what_waits(&image).is_err());
    plant(&[]);
}
