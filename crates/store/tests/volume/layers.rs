//! INV-LAYER: every view shows what it must after any history of writes, snapshots, drops, restores, checkpoints,
//! merges and power cuts; and at every cut of a merge.

use std::collections::BTreeMap;
use std::rc::Rc;

use holdfast_store::testing::{Fault, Image, MemoryDisk, Tear};
use holdfast_store::volume::{BlockKind, View};
use holdfast_types::{BLOCK_BYTES, BlockIndex, BlockRange, ChunkIndex, LogIndex};
use proptest::prelude::*;

use crate::crashes::{formatted, live};
use crate::replica::{BLOCKS, Command, Reference, Replica, What, check_blocks};

/// What the steps touch: two chunks on each side of the border between two pages of the table.
pub const FIRST: u64 = 12 * 64;
const COUNT: u64 = 4 * 64;

fn view_of(index: u64) -> View {
    if index == u64::MAX { View::Head } else { View::Snapshot(LogIndex(index)) }
}

/// Reads every view, and compares content and status with what it must be, and the views with each other.
pub async fn check_views(replica: &Replica, whole: bool) -> Result<(), String> {
    let views = replica.reference.views(replica.applied().0);
    for (index, expected) in &views {
        let (first, end) = if whole { (0, BLOCKS) } else { (FIRST, FIRST + COUNT) };
        for start in (first..end).step_by(128) {
            let range = BlockRange::new(BlockIndex(start), 128);
            let read = replica.data.read_view(view_of(*index), range).await;
            let data = read.map_err(|error| format!("view {index}: {error}"))?.data;
            check_blocks(range, &data, expected).map_err(|why| format!("view {index}: {why}"))?;
            let status = replica.data.view_status(view_of(*index), range).await;
            let mut block = start;
            for (count, kind) in status.map_err(|error| format!("view {index}: {error}"))? {
                for _ in 0..count {
                    if (kind == BlockKind::Data) != (expected[block as usize] != 0) {
                        return Err(format!("view {index}: block {block} is {kind:?}"));
                    }
                    block += 1;
                }
            }
        }
    }
    check_diffs(replica, &views).await
}

/// Each view against the one before it, and against nothing.
async fn check_diffs(replica: &Replica, views: &BTreeMap<u64, Vec<u64>>) -> Result<(), String> {
    let nothing = vec![0; BLOCKS as usize];
    let mut before: Option<(u64, &Vec<u64>)> = None;
    for (index, content) in views {
        for from in [None, before] {
            let (from_index, old) =
                from.map_or((None, &nothing), |(index, old)| (Some(LogIndex(index)), old));
            let mut told = vec![None; BLOCKS as usize];
            let mut next = Some(ChunkIndex(0));
            while let Some(first) = next {
                let part = replica.data.diff(from_index, view_of(*index), first, 3).await;
                let part = part.map_err(|error| error.to_string())?;
                for extent in part.extents {
                    for block in extent.start.0..extent.start.0 + extent.count {
                        told[block as usize] = Some(extent.kind);
                    }
                }
                next = part.next;
            }
            for (block, told) in told.iter().enumerate() {
                let must = content[block] != old[block];
                let kind = if content[block] == 0 { BlockKind::Zero } else { BlockKind::Data };
                if (must && told.is_none()) || told.is_some_and(|told| told != kind) {
                    return Err(format!("diff {from_index:?} to {index}: block {block} is {told:?}"));
                }
            }
        }
        before = Some((*index, content));
    }
    Ok(())
}

#[derive(Clone, Debug)]
enum Step {
    Change(What, u64, u32),
    Snapshot,
    /// One of the living snapshots.
    Drop(usize),
    Restore,
    Flush,
    Clean,
    Merge,
}

/// What happens until the next restart.
#[derive(Clone, Debug)]
struct Life {
    steps: Vec<Step>,
    /// The world stops at this operation of the disk.
    stop: Option<u64>,
    /// What the cut leaves; without one it is a kill.
    tear: Option<u64>,
}

fn step() -> impl Strategy<Value = Step> {
    let change = |what, count: u32| {
        (0..COUNT - u64::from(count), 1..=count)
            .prop_map(move |(at, count)| Step::Change(what, FIRST + at, count))
    };
    prop_oneof![
        6 => change(What::Write, 20),
        2 => change(What::Trim, 90),
        2 => change(What::Zero, 30),
        3 => Just(Step::Snapshot),
        3 => any::<usize>().prop_map(Step::Drop),
        1 => Just(Step::Restore),
        2 => Just(Step::Flush),
        4 => Just(Step::Clean),
        4 => Just(Step::Merge),
    ]
}

fn a_life() -> impl Strategy<Value = Life> {
    let stop = prop::option::of(0u64..150);
    let tear = prop::option::weighted(0.8, any::<u64>());
    (prop::collection::vec(step(), 1..24), stop, tear).prop_map(|(steps, stop, tear)| Life {
        steps,
        stop,
        tear,
    })
}

async fn take(replica: &Replica, step: &Step) -> Result<(), String> {
    let failed = |error: holdfast_store::StoreError| error.to_string();
    let living = replica.reference.snapshots();
    let submit = |what, start, count| replica.submit(Command { what, start, count });
    match step {
        Step::Change(what, start, count) => submit(*what, *start, *count),
        Step::Snapshot if living.len() < 6 => submit(What::Snapshot, 0, 0),
        Step::Drop(which) if !living.is_empty() => submit(What::Drop, living[which % living.len()], 0),
        Step::Restore if !living.is_empty() => submit(What::Restore, living[living.len() - 1], 0),
        Step::Snapshot | Step::Drop(_) | Step::Restore => {}
        Step::Flush => replica.flushed().await,
        Step::Clean => replica.clean().await.map_err(failed)?,
        Step::Merge => drop(replica.data.merge_step().await.map_err(failed)?),
    }
    check_views(replica, false).await
}

/// Everything home and merged: as many files as layers.
async fn settle(replica: &Replica, disk: &MemoryDisk) -> Result<(), String> {
    replica.flushed().await;
    for _ in 0..1000 {
        let dirty = replica.data.dirty();
        if dirty.any {
            replica.clean().await.map_err(|error| error.to_string())?;
        } else if dirty.merges {
            replica.data.merge_step().await.map_err(|error| error.to_string())?;
        } else {
            break;
        }
        check_views(replica, false).await?;
    }
    let layers = replica.data.layers().len();
    let homes = disk.names().iter().filter(|name| name.ends_with("/home")).count();
    if (replica.data.pieces(), homes) != (layers, layers) || layers != replica.reference.snapshots().len() + 1
    {
        return Err(format!("{} pieces, {homes} files, {layers} layers", replica.data.pieces()));
    }
    check_views(replica, true).await
}

fn history(image: &Image, lives: &[Life]) -> Result<(), String> {
    let disk = MemoryDisk::from_image(image, 1);
    let reference = Rc::new(Reference::default());
    for (n, life) in lives.iter().enumerate() {
        if let Some(stop) = life.stop {
            disk.at(disk.operations() + stop, Fault::Freeze);
        }
        let steps = life.steps.clone();
        live(&disk, &reference, n as u64, |replica| async move {
            check_views(&replica, false).await?;
            for (at, step) in steps.iter().enumerate() {
                take(&replica, step).await.map_err(|why| format!("step {at} {step:?}: {why}"))?;
            }
            Ok(())
        })
        .map_err(|why| format!("life {n}: {why}"))?;
        match life.tear {
            Some(seed) => disk.power_cut(Tear::Random(seed)),
            None => disk.kill(),
        }
    }
    let end = disk.clone();
    live(&disk, &reference, 98, |replica| async move { settle(&replica, &end).await })
        .map_err(|why| format!("at the end: {why}"))?;
    disk.power_cut(Tear::Nothing);
    live(&disk, &reference, 99, |replica| async move { check_views(&replica, true).await })
        .map_err(|why| format!("after the end: {why}"))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, max_shrink_iters: 2000, ..ProptestConfig::default() })]

    #[test]
    fn every_view_is_right_after_any_history(lives in prop::collection::vec(a_life(), 1..5)) {
        let image = formatted();
        history(&image, &lives).map_err(TestCaseError::fail)?;
    }
}

fn command(what: What, start: u64, count: u32) -> Command {
    Command { what, start, count }
}

/// Layers over each other; the snapshot between the two upper ones goes, and they are merged, while it is written on.
/// The part after the first checkpoint is stopped at an operation.
fn cut_merge(image: &Image, stop: u64, tear: Tear) -> Result<bool, String> {
    let disk = MemoryDisk::from_image(image, stop);
    let reference = Rc::new(Reference::default());
    live(&disk, &reference, 1, |replica| async move {
        let clean = || async { replica.clean().await.map_err(|error| error.to_string()) };
        replica.submit(command(What::Write, FIRST, 140));
        replica.submit(command(What::Snapshot, 0, 0)); // 2
        replica.submit(command(What::Write, FIRST + 10, 48));
        replica.submit(command(What::Trim, FIRST + 64, 70));
        clean().await?;
        replica.submit(command(What::Snapshot, 0, 0)); // 5
        replica.submit(command(What::Write, FIRST + 20, 20));
        replica.submit(command(What::Trim, FIRST + 40, 5));
        replica.submit(command(What::Write, FIRST + 125, 10));
        clean().await
    })?;
    disk.kill();
    let begin = disk.operations();
    disk.at(begin + stop, Fault::Freeze);
    live(&disk, &reference, 2, |replica| async move {
        let failed = |error: holdfast_store::StoreError| error.to_string();
        replica.submit(command(What::Drop, 5, 0));
        replica.submit(command(What::Write, FIRST + 22, 3));
        // Nothing may be merged before the drop is durable.
        replica.data.merge_step().await.map_err(failed)?;
        check_views(&replica, false).await?;
        replica.clean().await.map_err(failed)?;
        check_views(&replica, false).await?;
        while replica.data.merge_step().await.map_err(failed)? {
            check_views(&replica, false).await?;
            replica.submit(command(What::Write, FIRST + 24, 4));
            replica.submit(command(What::Trim, FIRST + 126, 2));
            replica.clean().await.map_err(failed)?;
            check_views(&replica, false).await?;
        }
        replica.submit(command(What::Drop, 2, 0));
        replica.clean().await.map_err(failed)?;
        while replica.data.merge_step().await.map_err(failed)? {
            check_views(&replica, false).await?;
        }
        Ok(())
    })?;
    let stopped = disk.operations() > begin + stop;
    disk.power_cut(tear);
    live(&disk, &reference, 3, |replica| async move {
        check_views(&replica, false).await?;
        replica.data.merge_step().await.map_err(|error| error.to_string())?;
        check_views(&replica, false).await
    })?;
    disk.power_cut(tear);
    let end = disk.clone();
    live(&disk, &reference, 4, |replica| async move { settle(&replica, &end).await })?;
    Ok(stopped)
}

fn every_cut(image: &Image) -> Result<u32, String> {
    let mut cases = 0;
    for tear in [Tear::Nothing, Tear::Everything, Tear::Sectors(0x0f), Tear::Random(1), Tear::Random(2)] {
        for stop in 0.. {
            match cut_merge(image, stop, tear).map_err(|why| format!("stop {stop}, {tear:?}: {why}"))? {
                true => cases += 1,
                false => break,
            }
        }
    }
    Ok(cases)
}

#[test]
fn every_cut_of_a_merge() {
    let cases = every_cut(&formatted()).unwrap_or_else(|why| panic!("{why}"));
    println!("{cases} cases");
    assert!(cases > 200, "only {cases} cases");
}

#[test]
fn what_was_given_back_hides_an_older_layer() {
    let image = formatted();
    let stopped = cut_merge(&image, u64::MAX / 2, Tear::Nothing).unwrap_or_else(|why| panic!("{why}"));
    assert!(!stopped);
}

/// Writes go on faster than merging: the younger layer only loses, and the merge ends.
#[test]
fn a_merge_ends_under_load() {
    let disk = MemoryDisk::from_image(&formatted(), 1);
    let reference = Rc::new(Reference::default());
    live(&disk, &reference, 1, |replica| async move {
        let failed = |error: holdfast_store::StoreError| error.to_string();
        replica.submit(command(What::Write, 0, 200));
        replica.clean().await.map_err(failed)?;
        replica.submit(command(What::Snapshot, 0, 0));
        for n in 0..40 {
            replica.submit(command(What::Write, n * 64 + n % 7, 30));
        }
        replica.clean().await.map_err(failed)?;
        replica.submit(command(What::Drop, 2, 0));
        replica.clean().await.map_err(failed)?;
        let mut steps = 0;
        while replica.data.merge_step().await.map_err(failed)? {
            steps += 1;
            assert!(steps < 10, "the merge does not end");
            for n in 0..40 {
                replica.submit(command(What::Write, n * 64 + steps, 30));
            }
            replica.clean().await.map_err(failed)?;
        }
        assert_eq!(replica.data.pieces(), 1);
        check_views(&replica, true).await
    })
    .expect("lives");
}

/// Snapshots that come and go between two checkpoints leave no layers behind.
#[test]
fn what_no_checkpoint_has_seen_is_folded_in_memory() {
    let disk = MemoryDisk::from_image(&formatted(), 1);
    let reference = Rc::new(Reference::default());
    let end = disk.clone();
    live(&disk, &reference, 1, |replica| async move {
        for n in 0..300 {
            replica.submit(command(What::Write, FIRST + n % 60, 1));
            replica.submit(command(What::Snapshot, 0, 0));
            let made = replica.applied().0;
            if n > 0 {
                replica.submit(command(What::Drop, made - 3 + u64::from(n == 1), 0));
            }
        }
        replica.clean().await.map_err(|error| error.to_string())?;
        assert!(replica.data.pieces() <= 4, "{} pieces", replica.data.pieces());
        settle(&replica, &end).await
    })
    .expect("lives");
}

#[test]
fn space_is_told_by_layer() {
    let disk = MemoryDisk::from_image(&formatted(), 1);
    let reference = Rc::new(Reference::default());
    live(&disk, &reference, 1, |replica| async move {
        for _ in 0..3 {
            replica.submit(command(What::Write, 0, 64));
            replica.submit(command(What::Snapshot, 0, 0));
        }
        replica.submit(command(What::Write, 0, 64));
        replica.clean().await.map_err(|error| error.to_string())?;
        let space = replica.data.space().await.map_err(|error| error.to_string())?;
        let chunk = 64 * BLOCK_BYTES as u64;
        assert_eq!(space.blocks, 2 * chunk);
        assert!(space.snapshots > 2 * chunk && space.snapshots <= 2 * chunk + 4 * 8192, "{space:?}");
        Ok(())
    })
    .expect("lives");
}
