//! Bounded space: a volume is overwritten for ever in what it takes once; it is thin; trim gives back; a full medium
//! is waited for.

use std::rc::Rc;
use std::time::Duration;

use holdfast_env::disk::Directory;
use holdfast_env::real::disk::{IoEngine, OpenError, RealDirectory};
use holdfast_store::StoreError;
use holdfast_store::testing::{Fault, MemoryDisk, Random, Tear};
use holdfast_types::{BLOCK_BYTES, CHUNK_BYTES, limits};

use crate::crashes::{formatted, live};
use crate::replica::{BLOCKS, Command, Reference, Replica, What, options};

const VOLUME_BYTES: u64 = BLOCKS * BLOCK_BYTES as u64;

fn total(disk: &MemoryDisk) -> u64 {
    disk.names().iter().map(|name| disk.allocated(name)).sum()
}

/// Writes so many bytes at random places, cleaning as the cleaner does.
async fn overwrite(replica: &Replica, random: &Random, bytes: u64) -> Result<(), String> {
    let mut written = 0;
    while written < bytes {
        let command = Command::at_random(random);
        written += u64::from(command.count) * BLOCK_BYTES as u64 * u64::from(command.what == What::Write);
        replica.submit(command);
        let _admitted = replica.log.admit(command.count as usize * BLOCK_BYTES).await;
        if replica.data.dirty().bytes > 2 << 20 || replica.journal.pressure().used_percent >= 50 {
            replica.clean().await.map_err(|error| error.to_string())?;
        }
        let usage = replica.journal.usage();
        let journal_bytes = u64::from(options().segments) * options().segment_bytes;
        assert_eq!(usage.bytes_total, journal_bytes);
        assert!(usage.bytes_cached <= limits::LOG_TAIL_BYTES_MAX as u64 + (1 << 20), "{usage:?}");
        assert!(usage.entries_indexed <= journal_bytes / (2 * BLOCK_BYTES as u64), "{usage:?}");
        assert!(replica.data.dirty().runs as u64 <= usage.entries_indexed * 2 + 2, "{usage:?}");
    }
    replica.flushed().await;
    Ok(())
}

#[test]
fn a_volume_is_overwritten_for_ever_in_bounded_space() {
    let disk = MemoryDisk::from_image(&formatted(), 1);
    let reference = Rc::new(Reference::default());
    let journal_bytes = u64::from(options().segments) * options().segment_bytes;
    let mut after_first = 0;
    for round in 0..3 {
        live(&disk, &reference, round, |replica| async move {
            overwrite(&replica, &Random::new(round), 5 * journal_bytes).await?;
            replica.clean().await.map_err(|error| error.to_string())?;
            assert_eq!(replica.check().await?, Vec::<u64>::new());
            Ok(())
        })
        .unwrap_or_else(|why| panic!("round {round}: {why}"));
        disk.power_cut(Tear::Nothing);
        let home = disk.names().into_iter().find(|name| name.ends_with("/home")).expect("is there");
        assert!(disk.allocated(&home) <= VOLUME_BYTES, "{}", disk.allocated(&home));
        if round == 0 {
            after_first = total(&disk);
        }
        // Trims come and go; what cannot be exceeded is the volume and its fixed files.
        assert!(
            total(&disk) <= after_first.max(journal_bytes + VOLUME_BYTES + (4 << 20)),
            "{}",
            total(&disk)
        );
    }
}

async fn real(path: &std::path::Path, engine: IoEngine) -> Rc<dyn Directory> {
    loop {
        match RealDirectory::open_with(path, engine) {
            Ok(directory) => return directory,
            // The tasks of the journal before end one by one; its lock goes with the last of them.
            Err(OpenError::InUse(_)) => holdfast_env::yield_now().await,
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn home_is_thin_and_trim_gives_back_on_a_real_file_system() {
    [IoEngine::Threads, IoEngine::Auto].into_iter().for_each(home_is_thin_on);
}

fn home_is_thin_on(engine: IoEngine) {
    let place = tempfile::tempdir().expect("a place");
    let reference = Rc::new(Reference::default());
    let command = |what, start, count| Command { what, start, count };
    holdfast_env::real::run(async {
        let directory = real(place.path(), engine).await;
        Replica::create(directory.clone()).await;
        let replica = Replica::open(directory, &reference).await.expect("opens");
        let before = replica.data.space().await.expect("space").blocks;
        for n in 0..8 {
            replica.submit(command(What::Write, n * 256, 128));
        }
        replica.flushed().await;
        replica.clean().await.expect("cleans");
        let full = replica.data.space().await.expect("space").blocks - before;
        let written = 8 * 128 * BLOCK_BYTES as u64;
        assert!((written..=written + 4 * CHUNK_BYTES).contains(&full), "{full} for {written} written");
        // Trimmed reads as zeros at once; the space comes with the checkpoint.
        for n in 0..7 {
            replica.submit(command(What::Trim, n * 256, 128));
        }
        assert_eq!(replica.check().await.expect("reads"), Vec::<u64>::new());
        replica.flushed().await;
        replica.clean().await.expect("cleans");
        let left = replica.data.space().await.expect("space").blocks - before;
        assert!(left <= 128 * BLOCK_BYTES as u64 + 2 * CHUNK_BYTES, "{left} are left of {full}");
    });
    holdfast_env::real::run(async {
        let replica = Replica::open(real(place.path(), engine).await, &reference).await.expect("opens");
        assert_eq!(replica.check().await.expect("reads"), Vec::<u64>::new());
    });
}

/// Chunks that a checkpoint emptied are given back, also if the power goes before they are.
#[test]
fn emptied_chunks_are_given_back_after_a_cut() {
    let image = formatted();
    let command = |what, start, count| Command { what, start, count };
    for stop in 0.. {
        let disk = MemoryDisk::from_image(&image, stop);
        let reference = Rc::new(Reference::default());
        let result = live(&disk, &reference, 1, |replica| async move {
            replica.submit(command(What::Write, 0, 256));
            replica.clean().await.map_err(|error| error.to_string())
        });
        result.expect("lives");
        disk.kill();
        let begin = disk.operations();
        disk.at(begin + stop, Fault::Freeze);
        live(&disk, &reference, 2, |replica| async move {
            replica.submit(command(What::Trim, 0, 256));
            replica.clean().await.map_err(|error| error.to_string())
        })
        .expect("lives");
        let stopped = disk.operations() > begin + stop;
        disk.power_cut(Tear::Random(stop));
        let is_trimmed = reference.commands.borrow().len() == 2;
        live(&disk, &reference, 3, |replica| async move {
            replica.clean().await.map_err(|error| error.to_string())
        })
        .expect("lives");
        let home = disk.names().into_iter().find(|name| name.ends_with("/home")).expect("is there");
        if is_trimmed && reference.commands.borrow().len() == 2 {
            assert_eq!(disk.allocated(&home), 0, "stopped at {stop}");
        }
        if !stopped {
            return;
        }
    }
}

#[test]
fn a_full_medium_is_an_error_that_passes() {
    let disk = MemoryDisk::from_image(&formatted(), 1);
    let reference = Rc::new(Reference::default());
    let limit = disk.clone();
    live(&disk, &reference, 1, |replica| async move {
        replica.submit(Command { what: What::Write, start: 0, count: 200 });
        replica.flushed().await;
        limit.limit_space(Some(total(&limit) + CHUNK_BYTES));
        let refused = replica.data.clean(&*replica).await;
        assert!(matches!(refused, Err(StoreError::Io { full: true, .. })), "{refused:?}");
        assert_eq!(replica.check().await?, Vec::<u64>::new());
        limit.limit_space(None);
        replica.clean().await.map_err(|error| error.to_string())?;
        assert_eq!(replica.data.checkpoint().id.index.0, 1);
        Ok(())
    })
    .expect("lives");
    disk.power_cut(Tear::Nothing);
    live(&disk, &reference, 2, |_| async { Ok(()) }).expect("lives");
}

#[test]
fn a_failed_flush_of_home_makes_no_checkpoint() {
    for stop in 0..40 {
        let disk = MemoryDisk::from_image(&formatted(), stop);
        let reference = Rc::new(Reference::default());
        let faulty = disk.clone();
        live(&disk, &reference, 1, |replica| async move {
            replica.submit(Command { what: What::Write, start: 0, count: 100 });
            replica.flushed().await;
            // Later than the closing mark of the journal.
            holdfast_env::sleep(Duration::from_secs(1)).await;
            faulty.at(faulty.operations() + stop, Fault::Fail(std::io::ErrorKind::Other));
            if let Err(error) = replica.clean().await {
                assert!(matches!(error, StoreError::Io { full: false, .. }), "{error}");
            }
            Ok(())
        })
        .expect("lives");
        disk.power_cut(Tear::Nothing);
        live(&disk, &reference, 2, |_| async { Ok(()) })
            .unwrap_or_else(|why| panic!("operation {stop}: {why}"));
    }
}

/// INV-RECOVER: whoever goes on in a replica's files opens them anew, in the same process.
#[test]
fn a_pass_is_waited_for_and_nothing_is_written_after_a_replica_has_ended() {
    let disk = MemoryDisk::from_image(&formatted(), 1);
    let (reference, of) = (Rc::new(Reference::default()), disk.clone());
    live(&disk, &reference, 1, |replica| async move {
        overwrite(&replica, &Random::new(1), 1 << 20).await?;
        // The pass is under way when the replica is ended.
        let (passed, ()) = futures_util::future::join(replica.clean(), replica.data.retire()).await;
        passed.map_err(|error| error.to_string())?;
        replica.submit(Command { what: What::Write, start: 5, count: 1 });
        replica.flushed().await;
        let before = of.operations();
        let refused = replica.clean().await.map(drop).expect_err("is refused");
        assert!(matches!(refused, StoreError::Failed(_)), "{refused:?}");
        assert_eq!(of.operations(), before, "nothing is written");
        Ok(())
    })
    .unwrap_or_else(|why| panic!("{why}"));
}
