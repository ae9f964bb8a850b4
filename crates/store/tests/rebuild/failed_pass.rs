//! A pass of the cleaner fails on a full medium after it has made files of a layer and folded others, and what comes
//! after it does not undo, or build on, what no manifest has named.

use std::rc::Rc;

use bytes::Bytes;
use holdfast_store::testing::{MemoryDisk, Tear, simulate};
use holdfast_store::volume::{Checkpoint, CheckpointSource, LayerId, VolumeData};
use holdfast_types::{BLOCK_BYTES, BlockIndex, BlockRange, LogIndex, block_checksum};

use crate::replica::{At, Log, checkpoint, reopened, replica_in, write};

/// Applied up to one index, while the newest state that is known to be durable is an older one.
struct Behind {
    applied: u64,
    captured: u64,
}

impl CheckpointSource for Behind {
    fn capture(&self) -> Checkpoint {
        checkpoint(self.applied)
    }
    fn captured_up_to(&self, _: LogIndex) -> Option<Checkpoint> {
        Some(checkpoint(self.captured))
    }
}

fn range(start: u64) -> BlockRange {
    BlockRange::new(BlockIndex(start), 4)
}

async fn fail_a_pass(disk: &MemoryDisk, data: &VolumeData, index: u64) {
    disk.limit_space(Some(0));
    data.clean(&At(index)).await.expect_err("the medium is full");
    disk.limit_space(None);
}

#[test]
fn files_that_a_failed_pass_made_are_made_anew_when_they_were_removed() {
    let (disk, log) = (MemoryDisk::new(1), Rc::new(Log::default()));
    simulate(1, async {
        let data = replica_in(disk.directory(), &log).await;
        write(&data, &log, 1, range(0), 1);
        data.apply_snapshot(LogIndex(2));
        write(&data, &log, 3, range(0), 3);
        data.clean(&At(3)).await.expect("is cleaned");
        data.apply_drop_snapshot(LogIndex(4), LogIndex(2));
        data.clean(&At(4)).await.expect("is cleaned");
        write(&data, &log, 5, range(4), 5);
        data.apply_snapshot(LogIndex(6));
        write(&data, &log, 7, range(128), 7);
        fail_a_pass(&disk, &data, 7).await;
        // The merge ends, and removes what no manifest names.
        while data.merge_step().await.expect("merges") {}
        data.clean(&At(7)).await.expect("is cleaned");
        drop(data);
        disk.power_cut(Tear::Nothing);
        let data =
            reopened(disk.directory(), &log).await.expect("everything that the manifest names is there");
        for (start, byte) in [(0, 3), (4, 5), (128, 7)] {
            let read = data.read(range(start)).await.expect("is read");
            assert!(read.iter().all(|found| *found == byte), "blocks from {start} on");
        }
    });
}

#[test]
fn a_pass_never_aims_below_one_that_failed() {
    let (disk, log) = (MemoryDisk::new(1), Rc::new(Log::default()));
    simulate(1, async {
        let data = replica_in(disk.directory(), &log).await;
        write(&data, &log, 1, range(0), 1);
        data.clean(&At(1)).await.expect("is cleaned");
        data.apply_snapshot(LogIndex(2));
        data.apply_snapshot(LogIndex(3));
        data.apply_drop_snapshot(LogIndex(4), LogIndex(3));
        write(&data, &log, 5, range(0), 5);
        // It has made one of the two layers that end in nothing living.
        fail_a_pass(&disk, &data, 5).await;
        let made = data.clean(&Behind { applied: 5, captured: 3 }).await.expect("is cleaned");
        assert_eq!(
            made.id.index,
            LogIndex(5),
            "the state at entry 3 has a snapshot that the layers have no more"
        );
    });
}

/// FAULTS row 16: a pass finds no room when it has made the files of a new layer; then a rebuild begins, makes files of
/// the same layer, takes its room, and is given up. Later passes write to files that have a name.
#[test]
fn a_rebuild_that_is_given_up_takes_no_names_from_files_of_a_failed_pass() {
    let mut grants = 0;
    loop {
        let (disk, log) = (MemoryDisk::new(1), Rc::new(Log::default()));
        let failed = simulate(1, async {
            let data = replica_in(disk.directory(), &log).await;
            write(&data, &log, 1, range(0), 1);
            data.clean(&At(1)).await.expect("is cleaned");
            data.apply_snapshot(LogIndex(2));
            write(&data, &log, 3, range(0), 3);
            disk.limit_allocations(Some(grants));
            let failed = data.clean(&At(3)).await.is_err();
            disk.limit_allocations(None);
            let used = disk.used();
            let staging = data.begin_staging(data.layers()).await.expect("begins");
            let bytes = Bytes::from(vec![9; range(128).bytes() as usize]);
            let blocks = range(128).blocks().zip(bytes.chunks_exact(BLOCK_BYTES));
            let sums: Vec<u32> = blocks.map(|(block, data)| block_checksum(block, data)).collect();
            staging.put(LayerId(LogIndex(2)), range(128), bytes, &sums).await.expect("is staged");
            staging.take_room().await.expect("there is room");
            assert!(disk.used() > used + range(128).bytes());
            drop(staging);
            data.clean(&At(3)).await.expect("is cleaned");
            drop(data);
            disk.power_cut(Tear::Nothing);
            let data = reopened(disk.directory(), &log).await.expect("opens");
            let read = data.read(range(0)).await.expect("is read");
            assert!(
                read.iter().all(|found| *found == 3),
                "after {grants} grants: the pass wrote where nobody looks"
            );
            failed
        });
        if !failed {
            break;
        }
        grants += 1;
    }
    assert!(grants > 3, "{grants}");
}
