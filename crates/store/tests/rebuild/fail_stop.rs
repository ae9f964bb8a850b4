//! FAULTS row 14, of one store: whatever write, flush or change of names of its files fails, the store stops, and
//! nothing is written after it; also if whoever asked for it has given up meanwhile.

use std::io::ErrorKind;
use std::rc::Rc;

use bytes::Bytes;
use futures_util::FutureExt;
use holdfast_env::disk::Directory;
use holdfast_store::journal::{Journal, StoreOptions};
use holdfast_store::scrub_file::{ScrubFile, ScrubPlace};
use holdfast_store::state_file::{StateFile, StateIdentity};
use holdfast_store::testing::{Fault, MemoryDisk, simulate};
use holdfast_store::volume::{LayerId, LayerMark, VolumeData};
use holdfast_store::{FailStop, ReplicaIdentity, StoreError, StoreIdentity};
use holdfast_types::{
    BLOCK_BYTES, BlockIndex, BlockRange, ClusterId, GroupId, LogIndex, NodeName, ReplicaId, StoreId,
    block_checksum,
};

use crate::replica::{At, Log, checkpoint, replica_in, write};

const OPTIONS: StoreOptions = StoreOptions { segment_bytes: 2 << 20, segments: 5 };

async fn store(disk: &MemoryDisk) -> (Journal, Rc<dyn Directory>) {
    let identity = StoreIdentity { cluster: ClusterId(1), node: NodeName::new("n"), store: StoreId(2) };
    Journal::format(disk.directory(), &identity, &OPTIONS).await.expect("formats");
    let (journal, _) = Journal::open(disk.directory(), &identity, &OPTIONS).await.expect("opens");
    let directory = Rc::new(FailStop::new(disk.directory(), journal.clone()));
    (journal, directory)
}

fn range(start: u64) -> BlockRange {
    BlockRange::new(BlockIndex(start), 4)
}

async fn rebuild(data: &VolumeData) -> Result<(), StoreError> {
    let staging = data.begin_staging(vec![LayerMark { id: LayerId::BASE, frozen: None }]).await?;
    let bytes = Bytes::from(vec![9; range(8).bytes() as usize]);
    let blocks = range(8).blocks().zip(bytes.chunks_exact(BLOCK_BYTES));
    let sums: Vec<u32> = blocks.map(|(block, data)| block_checksum(block, data)).collect();
    staging.put(LayerId::BASE, range(8), bytes, &sums).await?;
    staging.commit(checkpoint(20)).await
}

/// Everything that writes to a store beside its journal.
async fn live(data: &VolumeData, log: &Log, directory: &Rc<dyn Directory>) -> Result<(), StoreError> {
    write(data, log, 1, range(0), 1);
    data.clean(&At(1)).await?;
    data.apply_snapshot(LogIndex(2));
    write(data, log, 3, range(2), 3);
    data.clean(&At(3)).await?;
    data.apply_drop_snapshot(LogIndex(4), LogIndex(2));
    data.apply_clear(LogIndex(5), BlockRange::new(BlockIndex(0), 64), holdfast_store::volume::Clear::Trim);
    write(data, log, 6, range(64), 6);
    data.clean(&At(6)).await?;
    while data.merge_step().await? {}
    rebuild(data).await?;
    let who = ReplicaIdentity { group: GroupId(1), replica: ReplicaId(1) };
    let whose = StateIdentity { cluster: ClusterId(1), store: StoreId(2), id: who };
    let state = StateFile::open(directory, "catalog-state", whose).await?;
    state.write(checkpoint(3)).await?;
    ScrubFile::open(directory.clone()).await.write(&ScrubPlace::default()).await;
    VolumeData::destroy(directory.clone(), who).await
}

#[test]
fn whatever_fails_to_be_written_stops_the_store_and_nothing_is_written_after_it() {
    let mut operation = 0;
    let (mut stopped, mut refused) = (0, 0);
    loop {
        let disk = MemoryDisk::new(3);
        let log = Rc::new(Log::default());
        let reached = simulate(3, async {
            let (journal, directory) = store(&disk).await;
            let data = replica_in(directory.clone(), &log).await;
            let fails = disk.operations() + operation;
            disk.at(fails, Fault::Fail(ErrorKind::Other));
            let outcome = live(&data, &log, &directory).await;
            if disk.operations() <= fails {
                outcome.expect("nothing has failed");
                return false;
            }
            if journal.failed().is_none() {
                // A file could not be opened: nothing has changed, and it is for the caller to judge.
                refused += 1;
                return true;
            }
            stopped += 1;
            let before = disk.operations();
            write(&data, &log, 30, range(128), 30);
            data.clean(&At(30)).await.expect_err("the store has stopped");
            rebuild(&data).await.expect_err("the store has stopped");
            directory.sync().await.expect_err("the store has stopped");
            ScrubFile::open(directory.clone()).await.write(&ScrubPlace::default()).await;
            assert_eq!(disk.operations(), before, "something was written after operation {operation} failed");
            true
        });
        if !reached {
            break;
        }
        operation += 1;
    }
    println!("{operation} operations failed: {stopped} stopped the store, {refused} refused to open a file");
    assert!(stopped > 50 && refused < 10, "{stopped} and {refused}");
}

#[test]
fn a_full_medium_stops_nothing_unless_a_flush_says_so() {
    simulate(4, async {
        let (disk, log) = (MemoryDisk::new(4), Rc::new(Log::default()));
        let (journal, directory) = store(&disk).await;
        let data = replica_in(directory.clone(), &log).await;
        write(&data, &log, 1, range(0), 1);
        disk.limit_space(Some(0));
        data.clean(&At(1)).await.expect_err("there is no room");
        assert_eq!(journal.failed(), None);
        disk.limit_space(None);
        data.clean(&At(1)).await.expect("there is room");
        // What a flush could not write for want of room may be gone.
        disk.at(disk.operations(), Fault::Fail(ErrorKind::StorageFull));
        directory.sync().await.expect_err("fails");
        assert!(journal.failed().is_some());
    });
}

#[test]
fn a_failure_counts_though_nobody_waits_for_it_any_more() {
    simulate(5, async {
        let (disk, log) = (MemoryDisk::new(5), Rc::new(Log::default()));
        let (journal, directory) = store(&disk).await;
        let data = replica_in(directory, &log).await;
        write(&data, &log, 1, range(0), 1);
        disk.at(disk.operations() + 1, Fault::Fail(ErrorKind::Other));
        let mut pass = data.clean(&At(1)).boxed_local();
        let before = disk.operations();
        while disk.operations() < before + 2 {
            assert!((&mut pass).now_or_never().is_none(), "it waits for the disk");
            holdfast_env::yield_now().await;
        }
        drop(pass);
        let failed = async {
            while journal.failed().is_none() {
                journal.pressure_changed().await;
            }
        };
        holdfast_env::timeout(std::time::Duration::from_secs(5), failed).await.expect("the store stops");
    });
}
