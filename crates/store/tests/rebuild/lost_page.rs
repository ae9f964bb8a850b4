//! Rebuilds of replicas with a table page that is lost or distrusted, before the comparison or after it (INV-STAGE, INV-HEAL).

use std::rc::Rc;

use futures_util::future::{Either, select};
use holdfast_store::testing::{Fault, MemoryDisk, Tear, simulate};
use holdfast_store::volume::{
    BlockSum, ChunkContent, Finding, LayerId, LayerMark, PAGE_CHUNKS, ReadError, StagingLayer, VolumeData,
};
use holdfast_types::{BlockIndex, BlockRange, ByteSize, CHUNK_BLOCKS, ChunkIndex, LogIndex};

use crate::replica::{At, Log, checkpoint, reopened, replica_in, write};

const PAGE_BLOCKS: u64 = PAGE_CHUNKS * CHUNK_BLOCKS;
/// Two pages.
const CHUNKS: u64 = 2 * PAGE_CHUNKS;
const LARGE: ByteSize = ByteSize(CHUNKS * CHUNK_BLOCKS * 4096);
/// In two chunks of the first page, and in the second page.
const PLACES: [u64; 3] = [5, 200, PAGE_BLOCKS + 3];
const LAST: u64 = 5;

fn range(start: u64, count: u32) -> BlockRange {
    BlockRange::new(BlockIndex(start), count)
}

/// What every replica applies; the receiver has not got the last two.
fn apply(data: &VolumeData, log: &Log, entries: std::ops::RangeInclusive<u64>) {
    for index in entries {
        let at = PLACES[(index - 1) as usize % 3];
        write(data, log, index, range(at, 2 + index as u32), index as u8);
    }
}

async fn replica(disk: &MemoryDisk, log: &Rc<Log>) -> VolumeData {
    let data = replica_in(disk.directory(), log).await;
    data.set_size(LARGE);
    data
}

async fn source(log: &Rc<Log>) -> VolumeData {
    let data = replica(&MemoryDisk::new(2), log).await;
    apply(&data, log, 1..=LAST);
    data.clean(&At(LAST)).await.expect("is cleaned");
    data
}

/// Collects what differs, as a rebuild does.
async fn collect(data: &VolumeData, source: &VolumeData) -> StagingLayer {
    let staging = data.begin_staging(vec![LayerMark::ONLY]).await.expect("begins");
    let ours = data.home_summaries(LayerMark::ONLY, ChunkIndex(0), CHUNKS as u32).await.expect("is read");
    let theirs = source.chunk_summaries(LayerId::BASE, ChunkIndex(0), CHUNKS as u32).await.expect("is read");
    for chunk in (0..CHUNKS).map(ChunkIndex) {
        let find = |all: &[holdfast_store::volume::ChunkSummary]| {
            all.iter().find(|summary| summary.chunk == chunk).map(|summary| summary.last_index)
        };
        if find(&ours) == find(&theirs) {
            continue;
        }
        let home = data.home_checksums(LayerMark::ONLY, chunk).await.expect("is read");
        let sums = source.layer_checksums(LayerId::BASE, chunk).await.expect("is read");
        for (n, (home, sum)) in (0..).zip(home.into_iter().zip(sums)) {
            let block = range(chunk.first_block().0 + n, 1);
            match sum {
                sum if home == Some(sum) => {}
                BlockSum::Data(sum) => {
                    let read = source.read_layer(LayerId::BASE, block).await.expect("is whole").data;
                    staging.put(LayerId::BASE, block, read, &[sum]).await.expect("is staged");
                }
                _ => staging.clear(LayerId::BASE, block).await.expect("is staged"),
            }
        }
    }
    staging.take_room().await.expect("there is room");
    staging
}

/// How many blocks are bad; the others are as the source has them.
async fn bad_blocks(data: &VolumeData, source: &VolumeData) -> usize {
    let mut bad = 0;
    for block in 0..CHUNKS * CHUNK_BLOCKS {
        let right = source.read(range(block, 1)).await.expect("is whole");
        match data.read(range(block, 1)).await {
            Ok(read) => assert!(read == right, "block {block} is wrong"),
            Err(ReadError::BadBlocks(_)) => bad += 1,
            Err(error) => panic!("block {block}: {error}"),
        }
    }
    bad
}

async fn page_of(source: &VolumeData) -> Vec<ChunkContent> {
    let mut out = Vec::new();
    for chunk in (0..PAGE_CHUNKS).map(ChunkIndex) {
        let now = source.chunk_now(LayerMark::ONLY, chunk).await.expect("is read");
        let mut blocks = Vec::new();
        for n in (0..CHUNK_BLOCKS).filter(|n| matches!(now.sums[*n as usize], BlockSum::Data(_))) {
            let block = BlockIndex(chunk.first_block().0 + n);
            blocks.push((block, source.read(range(block.0, 1)).await.expect("is whole")));
        }
        out.push(ChunkContent { chunk, now, applied: LogIndex(LAST), blocks });
    }
    out
}

/// What it has compared with must stay as it was: else the switch meets a page that is lost.
#[test]
fn nothing_is_distrusted_while_a_rebuild_is_collected() {
    simulate(1, async {
        let log = Rc::new(Log::default());
        let data = replica(&MemoryDisk::new(1), &log).await;
        apply(&data, &log, 1..=3);
        data.clean(&At(3)).await.expect("is cleaned");
        let source = source(&log).await;
        let staging = collect(&data, &source).await;
        assert!(!data.distrust(LayerMark::ONLY, ChunkIndex(0)).await.expect("is looked at"));
        data.read(range(PLACES[0], 1)).await.expect("is served");
        staging.commit(checkpoint(LAST)).await.expect("is switched in");
        assert_eq!(bad_blocks(&data, &source).await, 0);
        drop(staging);
        assert!(data.distrust(LayerMark::ONLY, ChunkIndex(0)).await.expect("is noted"));
    });
}

/// A rebuild up to the `stop`th operation after the switch began. `before` says what happens to the receiver before the
/// comparison.
async fn rebuilt<F: AsyncFnOnce(&VolumeData)>(
    disk: &MemoryDisk,
    log: &Rc<Log>,
    stop: u64,
    before: F,
) -> bool {
    let data = replica(disk, log).await;
    apply(&data, log, 1..=3);
    data.clean(&At(3)).await.expect("is cleaned");
    before(&data).await;
    let source = source(log).await;
    let staging = collect(&data, &source).await;
    disk.at(disk.operations() + stop, Fault::Freeze);
    match select(Box::pin(staging.commit(checkpoint(LAST))), Box::pin(disk.frozen())).await {
        Either::Left((committed, _)) => {
            committed.expect("is switched in");
            true
        }
        Either::Right(_) => false,
    }
}

/// Neither what the cleaner cannot bring home there, nor a power cut at any moment, is in the way.
#[test]
fn a_rebuild_restores_a_page_that_is_not_believed() {
    let (mut old, mut new) = (0, 0);
    for stop in 0.. {
        let (disk, log) = (MemoryDisk::new(stop), Rc::new(Log::default()));
        let ended = simulate(stop, async {
            rebuilt(&disk, &log, stop, async |data: &VolumeData| {
                assert!(data.distrust(LayerMark::ONLY, ChunkIndex(0)).await.expect("is noted"));
                apply(data, &log, 4..=4);
                data.clean(&At(4)).await.expect_err("the page is not there");
            })
            .await
        });
        disk.power_cut(Tear::Random(stop));
        simulate(stop, async {
            let data =
                reopened(disk.directory(), &log).await.unwrap_or_else(|error| panic!("{stop}: {error}"));
            data.set_size(LARGE);
            if data.checkpoint().id.index == LogIndex(LAST) {
                assert_eq!(bad_blocks(&data, &source(&log).await).await, 0, "stopped at {stop}");
                new += 1;
            } else {
                data.read(range(PLACES[0], 1)).await.expect_err("it is not believed");
                old += 1;
            }
        });
        if ended {
            break;
        }
    }
    assert!(old > 1 && new > 3, "{old} {new}");
}

/// Then the rebuild has brought a part of it. The replica opens all the same, and the others heal it.
#[test]
fn a_page_that_is_lost_after_the_comparison_is_healed_by_others() {
    let mut switched = 0;
    for stop in 0.. {
        let (disk, log) = (MemoryDisk::new(stop), Rc::new(Log::default()));
        let ended = simulate(stop, rebuilt(&disk, &log, stop, async |_: &VolumeData| {}));
        disk.power_cut(Tear::Random(stop));
        let table = disk.names().into_iter().find(|name| name.ends_with("/table")).expect("it is there");
        (0..2).for_each(|copy| disk.rot(&table, copy * 4096 + 20, 1));
        simulate(stop, async {
            let data =
                reopened(disk.directory(), &log).await.unwrap_or_else(|error| panic!("{stop}: {error}"));
            data.set_size(LARGE);
            let found = data.verify_chunk(LayerId::BASE, ChunkIndex(0)).await.expect("is looked at");
            assert_eq!(found, Finding::Lost);
            if data.checkpoint().id.index < LogIndex(LAST) {
                return;
            }
            switched += 1;
            let source = source(&log).await;
            assert_eq!(bad_blocks(&data, &source).await as u64, PAGE_BLOCKS, "stopped at {stop}");
            let page = page_of(&source).await;
            assert!(data.adopt(LayerMark::ONLY, &page, LogIndex(LAST)).await.expect("is adopted"));
            assert_eq!(bad_blocks(&data, &source).await, 0);
        });
        if ended {
            break;
        }
    }
    assert!(switched > 3, "{switched}");
}
