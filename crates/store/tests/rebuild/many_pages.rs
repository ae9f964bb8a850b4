//! More table pages than one manifest can list, and marks that are taken while layers are merged.

use std::rc::Rc;
use std::time::Duration;

use holdfast_store::testing::{MemoryDisk, Tear, simulate};
use holdfast_store::volume::{Clear, LayerId, LayerMark, PAGE_CHUNKS, ReadError, VolumeData};
use holdfast_types::{BlockIndex, BlockRange, ByteSize, CHUNK_BLOCKS, ChunkIndex, LogIndex};

use crate::replica::{At, Log, reopened, replica_in, write};

/// More than the 8192 of a manifest's list.
const PAGES: u64 = 8300;
const PAGE_BLOCKS: u64 = PAGE_CHUNKS * CHUNK_BLOCKS;
const LARGE: ByteSize = ByteSize((PAGES + 1) * PAGE_BLOCKS * 4096);

fn block(number: u64) -> BlockRange {
    BlockRange::new(BlockIndex(number), 1)
}

fn file(disk: &MemoryDisk, end: &str) -> String {
    disk.names().into_iter().find(|name| name.ends_with(end)).expect("it is there")
}

async fn is_bad(data: &VolumeData, at: u64) -> bool {
    match data.read(block(at)).await {
        Ok(_) => false,
        Err(ReadError::BadBlocks(_)) => true,
        Err(error) => panic!("block {at}: {error}"),
    }
}

/// A page was lost before, and the writes of another are lost with those of its block, when zeros change thousands of
/// others in the same pass.
#[test]
fn what_many_pages_do_is_not_forgotten() {
    let disk = MemoryDisk::new(1);
    let log = Rc::new(Log::default());
    let (lost, victim) = (PAGE_BLOCKS, (PAGES - 1) * PAGE_BLOCKS);
    simulate(1, async {
        let data = replica_in(disk.directory(), &log).await;
        data.set_size(LARGE);
        write(&data, &log, 1, block(lost), 1);
        write(&data, &log, 2, block(victim), 2);
        data.clean(&At(2)).await.expect("is cleaned");
        data.distrust(LayerMark::ONLY, BlockIndex(lost).chunk()).await.expect("is noted");
        assert!(is_bad(&data, lost).await);
        let (home, table) = (file(&disk, "/home"), file(&disk, "/table"));
        let page = (PAGES - 1) * 2;
        let old = [disk.block(&table, page), disk.block(&table, page + 1), disk.block(&home, victim)];
        let count = u32::try_from((PAGES - 3) * PAGE_BLOCKS).expect("fits");
        data.apply_clear(LogIndex(3), BlockRange::new(BlockIndex(2 * PAGE_BLOCKS), count), Clear::Zero);
        write(&data, &log, 4, block(victim), 4);
        data.clean(&At(4)).await.expect("is cleaned");
        disk.put_block(&table, page, &old[0]);
        disk.put_block(&table, page + 1, &old[1]);
        disk.put_block(&home, victim, &old[2]);
    });
    disk.power_cut(Tear::Nothing);
    simulate(2, async {
        let data = reopened(disk.directory(), &log).await.expect("opens");
        data.set_size(LARGE);
        assert!(is_bad(&data, lost).await, "it is forgotten that a page is lost");
        assert!(is_bad(&data, victim).await, "an older copy of a page is believed");
    });
}

#[test]
fn a_chunk_that_is_merged_while_its_mark_is_taken_is_not_taken_for_empty() {
    let disk = MemoryDisk::new(1);
    let log = Rc::new(Log::default());
    simulate(1, async {
        let data = replica_in(disk.directory(), &log).await;
        write(&data, &log, 1, block(100), 1);
        data.clean(&At(1)).await.expect("is cleaned");
        data.apply_snapshot(LogIndex(2));
        write(&data, &log, 3, block(5), 3);
        data.clean(&At(3)).await.expect("is cleaned");
        data.apply_drop_snapshot(LogIndex(4), LogIndex(2));
        data.clean(&At(4)).await.expect("is cleaned");
    });
    simulate(2, async {
        // What memory knew of the pages is gone.
        let data = reopened(disk.directory(), &log).await.expect("opens");
        assert_eq!(data.pieces(), 2);
        disk.slow_read(&file(&disk, "layer-2/table"), 0, Duration::from_secs(60));
        let merged = async {
            holdfast_env::sleep(Duration::from_secs(1)).await;
            while data.merge_step().await.expect("merges") {}
            assert_eq!(data.pieces(), 1);
        };
        let marks = data.chunk_summaries(LayerId::BASE, ChunkIndex(0), 1);
        let (marks, ()) = futures_util::future::join(marks, merged).await;
        let marks = marks.expect("is read");
        assert_eq!(marks.len(), 1);
        assert!(marks[0].present && marks[0].last_index == LogIndex(3), "{marks:?}");
    });
}

/// The newest generation of a manifest, made one of those that older versions wrote when there were too many pages for its
/// list.
fn without_list(slot: &[u8]) -> Vec<u8> {
    let length = u32::from_le_bytes(slot[10..14].try_into().expect("four bytes")) as usize;
    let body = &slot[18..18 + length];
    // That there is a list, of one page, and the page.
    let (before, list) = body.split_at(length - 29);
    assert_eq!(list[..5], [1, 1, 0, 0, 0], "the tail of a manifest");
    let body = [before, &[0; 5]].concat();
    let length = u32::try_from(body.len()).expect("fits").to_le_bytes();
    let mut forged = [&slot[..10], &length, &crc32fast::hash(&body).to_le_bytes(), &body].concat();
    forged.resize(4096, 0);
    forged
}

#[test]
fn a_manifest_without_a_list_is_read_and_every_page_looked_at() {
    let disk = MemoryDisk::new(1);
    let log = Rc::new(Log::default());
    simulate(1, async {
        let data = replica_in(disk.directory(), &log).await;
        write(&data, &log, 1, block(5), 1);
        data.clean(&At(1)).await.expect("is cleaned");
    });
    disk.power_cut(Tear::Nothing);
    let (table, manifest) = (file(&disk, "/table"), file(&disk, "/manifest"));
    let whole = disk.block(&table, 0);
    disk.put_block(&manifest, 0, &without_list(&disk.block(&manifest, 0)));
    // The power cut came before its second copy was written.
    disk.put_block(&table, 1, &[0; 4096]);
    simulate(2, async {
        let data = reopened(disk.directory(), &log).await.expect("opens");
        assert_eq!(data.checkpoint().id.index, LogIndex(1));
        assert!(!is_bad(&data, 5).await);
    });
    assert_eq!([disk.block(&table, 0), disk.block(&table, 1)], [whole.clone(), whole]);
}
