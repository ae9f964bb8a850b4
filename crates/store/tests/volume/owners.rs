//! INV-LAYER: what is known of whom blocks are is never older than what is home: whatever happens after it was found out,
//! and while it is found out.

use std::rc::Rc;

use holdfast_store::StoreError;
use holdfast_store::testing::{Image, MemoryDisk, simulate};
use holdfast_types::{BlockIndex, BlockRange};

use crate::crashes::{formatted, live};
use crate::layers::{FIRST, check_views};
use crate::replica::{Command, Reference, Replica, What};

fn command(what: What, start: u64, count: u32) -> Command {
    Command { what, start, count }
}

fn failed(error: StoreError) -> String {
    error.to_string()
}

/// Three layers, home: the oldest has all, the others some of it. The snapshots are 2 and 4.
async fn three_layers(replica: &Replica) -> Result<(), String> {
    replica.submit(command(What::Write, FIRST, 128));
    replica.submit(command(What::Snapshot, 0, 0));
    replica.submit(command(What::Write, FIRST + 10, 20));
    replica.submit(command(What::Snapshot, 0, 0));
    replica.submit(command(What::Write, FIRST + 20, 20));
    replica.clean().await.map_err(failed)
}

/// What, its first block and their number.
type Order = (What, u64, u32);

/// Commands that come when everything was read, each with a name.
const EVENTS: [(&str, &[Order]); 8] = [
    ("a write over what only the oldest layer has", &[(What::Write, FIRST + 60, 8)]),
    ("a write over what the newest has", &[(What::Write, FIRST + 25, 3)]),
    ("a trim", &[(What::Trim, FIRST + 12, 3)]),
    ("zeros", &[(What::Zero, FIRST + 65, 30)]),
    ("a snapshot, and a write", &[(What::Snapshot, 0, 0), (What::Write, FIRST + 5, 70)]),
    ("a drop, whose layer is merged", &[(What::Drop, 4, 0)]),
    ("drops of both, and writes", &[(What::Drop, 2, 0), (What::Write, FIRST + 62, 3), (What::Drop, 4, 0)]),
    ("a restore, and a write", &[(What::Restore, 4, 0), (What::Write, FIRST + 2, 20)]),
];

/// Everything is known, then it is changed, comes home and is merged.
fn after(image: &Image, commands: &[Order]) -> Result<(), String> {
    let disk = MemoryDisk::from_image(image, 1);
    let reference = Rc::new(Reference::default());
    live(&disk, &reference, 1, |replica| async move {
        three_layers(&replica).await?;
        check_views(&replica, false).await?;
        for (what, start, count) in commands {
            replica.submit(command(*what, *start, *count));
            check_views(&replica, false).await?;
        }
        replica.clean().await.map_err(failed)?;
        check_views(&replica, false).await?;
        while replica.data.merge_step().await.map_err(failed)? {
            check_views(&replica, false).await?;
            replica.submit(command(What::Write, FIRST + 30, 2));
            replica.clean().await.map_err(failed)?;
            check_views(&replica, false).await?;
        }
        check_views(&replica, false).await
    })
}

#[test]
fn what_was_found_out_is_told_of_every_change() {
    let image = formatted();
    let wrong: Vec<String> = EVENTS
        .iter()
        .filter_map(|(name, commands)| after(&image, commands).err().map(|why| format!("{name}: {why}")))
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// A read that begins so many turns after a cleaning pass has, of chunks of which nothing is in memory.
fn while_cleaning(image: &Image, turns: u32) -> Result<(), String> {
    let disk = MemoryDisk::from_image(image, u64::from(turns));
    let reference = Rc::new(Reference::default());
    live(&disk, &reference, 1, |replica| async move { three_layers(&replica).await })?;
    disk.kill();
    simulate(u64::from(turns), async {
        let replica = Replica::open(disk.directory(), &reference).await?;
        replica.submit(command(What::Write, FIRST + 4, 90));
        replica.flushed().await;
        let data = replica.data.clone();
        let reader = holdfast_env::spawn("reader", async move {
            for _ in 0..turns {
                holdfast_env::yield_now().await;
            }
            data.read(BlockRange::new(BlockIndex(FIRST), 128)).await.map(drop)
        });
        replica.clean().await.map_err(failed)?;
        let read = reader.await.map_err(|error| error.to_string())?;
        read.map_err(|error| error.to_string())?;
        check_views(&replica, false).await
    })
    .map_err(|why| format!("{turns} turns: {why}"))
}

#[test]
fn what_is_found_out_while_blocks_come_home_is_not_kept() {
    let image = formatted();
    for turns in 0..300 {
        while_cleaning(&image, turns).unwrap_or_else(|why| panic!("{why}"));
    }
}

/// What readers see of every view while layers are merged under them, at every speed of theirs.
fn while_merging(image: &Image, turns: u32) -> Result<(), String> {
    let disk = MemoryDisk::from_image(image, u64::from(turns));
    let reference = Rc::new(Reference::default());
    live(&disk, &reference, 1, |replica| async move { three_layers(&replica).await })?;
    disk.kill();
    simulate(u64::from(turns), async {
        let replica = Replica::open(disk.directory(), &reference).await?;
        replica.submit(command(What::Drop, 2, 0));
        replica.submit(command(What::Write, FIRST + 15, 3));
        replica.flushed().await;
        replica.clean().await.map_err(failed)?;
        let reading = replica.clone();
        let reader = holdfast_env::spawn("reader", async move {
            for round in 0..6 {
                for _ in 0..turns * round {
                    holdfast_env::yield_now().await;
                }
                check_views(&reading, false).await?;
            }
            Ok::<(), String>(())
        });
        while replica.data.merge_step().await.map_err(failed)? {}
        reader.await.map_err(|error| error.to_string())??;
        check_views(&replica, false).await
    })
    .map_err(|why| format!("{turns} turns: {why}"))
}

#[test]
fn readers_see_the_same_while_layers_are_merged() {
    let image = formatted();
    for turns in 0..40 {
        while_merging(&image, turns).unwrap_or_else(|why| panic!("{why}"));
    }
}
