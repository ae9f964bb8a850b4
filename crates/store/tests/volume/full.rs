//! INV-SPACE: a pass that finds no room changes nothing and keeps nothing, wherever it is that it finds none; and what
//! the reserve leaves is enough to bring the journal home, to trim, and to drop snapshots.

use std::rc::Rc;

use holdfast_store::testing::{MemoryDisk, Tear};
use holdfast_store::{Reserve, StoreError};
use holdfast_types::{BLOCK_BYTES, CHUNK_BYTES};

use crate::crashes::{formatted, live};
use crate::layers::check_views;
use crate::replica::{BLOCKS, Command, Reference, Replica, What, options};

fn command(what: What, start: u64, count: u32) -> Command {
    Command { what, start, count }
}

fn text(error: StoreError) -> String {
    error.to_string()
}

/// Two layers on the medium, and a third that is to come; data, zeros and trims over old chunks and new ones, on pages
/// that are there and on one that is not.
async fn prepare(replica: &Replica) -> Result<(), String> {
    replica.submit(command(What::Write, 0, 200));
    replica.submit(command(What::Snapshot, 0, 0));
    replica.submit(command(What::Write, 64, 64));
    replica.clean().await.map_err(text)?;
    replica.submit(command(What::Trim, 64, 64));
    replica.submit(command(What::Write, 10, 20));
    replica.submit(command(What::Write, 14 * 64 + 5, 130));
    replica.submit(command(What::Snapshot, 0, 0));
    replica.submit(command(What::Zero, 30, 40));
    replica.submit(command(What::Write, 300, 3));
    replica.submit(command(What::Write, BLOCKS - 64, 64));
    replica.flushed().await;
    Ok(())
}

/// A pass that finds room so many times only; whether that was enough.
fn pass(grants: u64, cut: bool) -> bool {
    let disk = MemoryDisk::from_image(&formatted(), grants);
    let reference = Rc::new(Reference::default());
    let (limited, mut was_enough) = (disk.clone(), false);
    let enough = &mut was_enough;
    live(&disk, &reference, grants, |replica| async move {
        prepare(&replica).await?;
        let before = limited.used();
        limited.limit_allocations(Some(grants));
        let outcome = replica.data.clean(&*replica).await;
        limited.limit_allocations(None);
        match outcome {
            Ok(_) => *enough = true,
            Err(error) if error.is_full() => {
                assert_eq!(limited.used(), before, "after {grants} grants: what was taken was kept");
                assert_eq!(replica.data.checkpoint().id.index.0, 3);
            }
            Err(error) => return Err(format!("after {grants} grants: {error}")),
        }
        check_views(&replica, true).await?;
        if !cut {
            // Room was made: the next pass does all of it.
            replica.clean().await.map_err(text)?;
            assert_eq!(replica.data.checkpoint().id.index, replica.applied());
            check_views(&replica, true).await?;
        }
        Ok(())
    })
    .unwrap_or_else(|why| panic!("{grants} grants: {why}"));
    disk.power_cut(Tear::Random(grants));
    live(&disk, &reference, grants + 1, |replica| async move {
        check_views(&replica, true).await?;
        replica.clean().await.map_err(text)?;
        check_views(&replica, true).await
    })
    .unwrap_or_else(|why| panic!("{grants} grants, opened again: {why}"));
    was_enough
}

#[test]
fn a_pass_that_finds_no_room_changes_nothing_wherever_that_is() {
    for cut in [false, true] {
        let enough = (0..100).find(|grants| pass(*grants, cut)).expect("a pass needs less");
        assert!(
            enough > 8,
            "the pass took room {enough} times: it was to take chunks, pages, files, a manifest"
        );
    }
}

/// The same of a step that merges layers.
#[test]
fn a_merge_that_finds_no_room_changes_nothing_wherever_that_is() {
    for grants in 0..100 {
        let disk = MemoryDisk::from_image(&formatted(), grants);
        let reference = Rc::new(Reference::default());
        let (limited, mut was_enough) = (disk.clone(), false);
        let enough = &mut was_enough;
        live(&disk, &reference, grants, |replica| async move {
            prepare(&replica).await?;
            replica.clean().await.map_err(text)?;
            for snapshot in reference_snapshots(&replica) {
                replica.submit(command(What::Drop, snapshot, 0));
            }
            replica.clean().await.map_err(text)?;
            let before = limited.used();
            limited.limit_allocations(Some(grants));
            let outcome = replica.data.merge_step().await;
            limited.limit_allocations(None);
            match outcome {
                Ok(_) => *enough = true,
                Err(error) if error.is_full() => assert_eq!(limited.used(), before),
                Err(error) => return Err(error.to_string()),
            }
            check_views(&replica, true).await?;
            while replica.data.merge_step().await.map_err(text)? {}
            assert_eq!(replica.data.pieces(), 1);
            check_views(&replica, true).await
        })
        .unwrap_or_else(|why| panic!("{grants} grants: {why}"));
        disk.power_cut(Tear::Random(grants));
        live(&disk, &reference, 2, |replica| async move { check_views(&replica, true).await })
            .unwrap_or_else(|why| panic!("{grants} grants, opened again: {why}"));
        if was_enough {
            assert!(grants > 2, "the step took room {grants} times");
            return;
        }
    }
    panic!("a step of a merge needs less");
}

fn reference_snapshots(replica: &Replica) -> Vec<u64> {
    replica.reference.snapshots()
}

/// Writes at new places until a pass finds no room on a medium that has so many bytes left beside the reserve.
async fn fill(disk: &MemoryDisk, replica: &Replica, left: u64, from: u64) -> Result<Reserve, String> {
    let bytes = u64::from(options().segments) * options().segment_bytes;
    let reserve = Reserve::open(disk.directory(), bytes).await.map_err(text)?;
    assert!(!reserve.is_full());
    disk.limit_space(Some(disk.used() + left));
    for chunk in from..BLOCKS / 64 {
        replica.submit(command(What::Write, chunk * 64, 64));
        replica.flushed().await;
        match replica.clean().await {
            Ok(()) => {}
            Err(error) if error.is_full() => {
                reserve.give_up().await.map_err(text)?;
                return Ok(reserve);
            }
            Err(error) => return Err(error.to_string()),
        }
    }
    Err("the medium was never full".into())
}

async fn clean_tight(replica: &Replica) -> Result<(), String> {
    let checkpoint = replica.data.clean_tight(replica).await.map_err(text)?;
    assert_eq!(checkpoint.id.index, replica.applied(), "everything is home");
    replica.log.purge(checkpoint.id).await.map_err(text)
}

#[test]
fn what_waits_in_the_journal_comes_home_and_trims_make_room_on_a_full_medium() {
    let disk = MemoryDisk::from_image(&formatted(), 1);
    let (reference, medium) = (Rc::new(Reference::default()), disk.clone());
    live(&disk, &reference, 1, |replica| async move {
        let reserve = fill(&medium, &replica, 3 * CHUNK_BYTES, 0).await?;
        assert!(reserve.is_full());
        // Many small writes at new places: with a chunk for each there would not be room for them.
        for chunk in 6..BLOCKS / 64 {
            replica.submit(command(What::Write, chunk * 64 + chunk % 60, 1));
        }
        replica.flushed().await;
        clean_tight(&replica).await?;
        assert_eq!(replica.check().await?, Vec::<u64>::new());
        assert!(!reserve.refill().await.map_err(text)?, "they took some of it");
        // One that is trimmed before it comes home, too.
        replica.submit(command(What::Write, 6 * 64, 64));
        replica.submit(command(What::Trim, 0, BLOCKS as u32));
        replica.flushed().await;
        clean_tight(&replica).await?;
        assert!(reserve.refill().await.map_err(text)? && !reserve.is_full(), "there is room again");
        assert_eq!(replica.check().await?, Vec::<u64>::new());
        replica.submit(command(What::Write, 0, 64));
        replica.clean().await.map_err(text)
    })
    .expect("lives");
    disk.limit_space(None);
    disk.power_cut(Tear::Nothing);
    live(&disk, &reference, 2, |_| async { Ok(()) }).expect("lives");
}

/// Over a snapshot a trim gives nothing back: what shows through must be hidden, which takes room in the table. The drop
/// of the snapshot does.
#[test]
fn a_snapshot_is_dropped_and_makes_room_on_a_full_medium() {
    let disk = MemoryDisk::from_image(&formatted(), 1);
    let (reference, medium) = (Rc::new(Reference::default()), disk.clone());
    live(&disk, &reference, 1, |replica| async move {
        for chunk in 0..8 {
            replica.submit(command(What::Write, chunk * 64, 64));
        }
        replica.submit(command(What::Snapshot, 0, 0));
        replica.clean().await.map_err(text)?;
        let reserve = fill(&medium, &replica, 5 * CHUNK_BYTES, 0).await?;
        replica.submit(command(What::Trim, 14 * 64, (BLOCKS - 14 * 64) as u32));
        replica.submit(command(What::Trim, 5 * 64, 64));
        replica.flushed().await;
        clean_tight(&replica).await?;
        check_views(&replica, true).await?;
        assert!(!reserve.refill().await.map_err(text)?, "the snapshot still holds all of it");
        let snapshot = replica.reference.snapshots()[0];
        replica.submit(command(What::Drop, snapshot, 0));
        replica.flushed().await;
        clean_tight(&replica).await?;
        while replica.data.merge_step_tight().await.map_err(text)? {}
        check_views(&replica, true).await?;
        assert!(reserve.refill().await.map_err(text)?, "there is room again");
        assert_eq!(replica.data.pieces(), 1);
        Ok(())
    })
    .expect("lives");
    disk.limit_space(None);
    disk.power_cut(Tear::Nothing);
    live(&disk, &reference, 2, |replica| async move { check_views(&replica, true).await }).expect("lives");
}

/// A process that is killed while the medium is full finds it full, and one that is killed while it is not, not.
#[test]
fn a_reserve_is_whole_or_the_medium_is_full() {
    let disk = MemoryDisk::from_image(&formatted(), 1);
    let bytes = 16 * BLOCK_BYTES as u64;
    holdfast_store::testing::simulate(1, async {
        let reserve = Reserve::open(disk.directory(), bytes).await.expect("opens");
        assert!(!reserve.is_full());
        assert_eq!(disk.allocated("reserve"), bytes);
        disk.limit_space(Some(disk.used()));
        let reserve = Reserve::open(disk.directory(), bytes).await.expect("opens");
        assert!(!reserve.is_full(), "it stands already");
        reserve.give_up().await.expect("is given up");
        assert_eq!(disk.allocated("reserve"), 0);
        let using = reserve.in_use();
        assert!(!reserve.refill().await.expect("looks"), "somebody needs the room");
        drop(using);
        disk.limit_space(Some(disk.used() + bytes - 1));
        assert!(!reserve.refill().await.expect("looks"));
        assert_eq!(disk.allocated("reserve"), 0, "a part of it is in the way");
        let reserve = Reserve::open(disk.directory(), bytes).await.expect("opens");
        assert!(reserve.is_full() && reserve.times_full() == 1);
        disk.limit_space(None);
        assert!(reserve.refill().await.expect("looks"));
        assert!(!reserve.is_full());
    });
}
