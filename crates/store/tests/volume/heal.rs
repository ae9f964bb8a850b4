//! Healing (INV-HEAL): what a peer gives is written only where and when it is right, and home holds it afterwards.

use std::rc::Rc;

use bytes::Bytes;
use holdfast_store::testing::{Fault, MemoryDisk, Tear, simulate};
use holdfast_store::volume::{BlockSum, ChunkContent, Finding, LayerId, LayerMark};
use holdfast_types::{BlockIndex, BlockRange, CHUNK_BLOCKS, ChunkIndex, LogIndex};

use crate::crashes::{formatted, live};
use crate::replica::{Command, Reference, Replica, What};
use crate::rot::{at_rest, file};

fn write(start: u64, count: u32) -> Command {
    Command { what: What::Write, start, count }
}

/// A replica at rest whose chunk 0 holds data in blocks 3 to 12, and nothing is on its way home.
fn rested() -> (MemoryDisk, Rc<Reference>) {
    let disk = MemoryDisk::from_image(&formatted(), 5);
    let reference = Rc::new(Reference::default());
    live(&disk, &reference, 5, |replica| async move {
        replica.submit(write(0, 64));
        replica.clean().await.map_err(|error| error.to_string())?;
        replica.submit(write(3, 10));
        replica.submit(write(70 * 64 / 10, 30));
        replica.clean().await.map_err(|error| error.to_string())
    })
    .expect("lives");
    disk.power_cut(Tear::Nothing);
    (disk, reference)
}

fn on<F: Future>(work: F) -> F::Output {
    simulate(11, work)
}

async fn open(disk: &MemoryDisk, reference: &Rc<Reference>) -> Rc<Replica> {
    Replica::open(disk.directory(), reference).await.expect("opens")
}

/// What a block reads as, on a replica where it is whole.
async fn content(replica: &Replica, block: u64) -> (BlockIndex, Bytes) {
    let data = replica.data.read(BlockRange::new(BlockIndex(block), 1)).await.expect("is whole");
    (BlockIndex(block), data)
}

const CHUNK: ChunkIndex = ChunkIndex(0);
const BLOCK: u64 = 5;

#[test]
fn a_rotten_block_is_healed_with_what_the_table_says_and_with_nothing_else() {
    let (disk, reference) = rested();
    let home = file(&disk, "/home");
    on(async {
        let replica = open(&disk, &reference).await;
        let (right, other) = (content(&replica, BLOCK).await, content(&replica, 6).await);
        disk.rot(&home, BLOCK * 4096 + 17, 4);
        let rotten = disk.block(&home, BLOCK);
        assert_eq!(replica.check().await.expect("is checked"), [BLOCK]);
        assert_eq!(replica.data.take_suspect(), Some(CHUNK), "who reads it tells the healer");
        let bad = Finding::Bad(vec![BlockIndex(BLOCK)]);
        assert_eq!(replica.data.verify_chunk(LayerId::BASE, CHUNK).await.expect("is read"), bad);
        let wrong = [(BlockIndex(BLOCK), other.1)];
        assert_eq!(replica.data.heal_blocks(LayerId::BASE, CHUNK, &wrong).await.expect("is tried"), bad);
        assert_eq!(disk.block(&home, BLOCK), rotten, "what does not match was written");
        assert_eq!(replica.data.health().bad_blocks, 1);
        let healed = replica.data.heal_blocks(LayerId::BASE, CHUNK, &[right]).await.expect("is healed");
        assert_eq!(healed, Finding::Whole);
        let health = replica.data.health();
        assert_eq!((health.found_blocks, health.healed_blocks, health.bad_blocks), (1, 1, 0));
    });
    disk.power_cut(Tear::Nothing);
    on(async {
        let replica = open(&disk, &reference).await;
        assert_eq!(replica.check().await.expect("is checked"), Vec::<u64>::new(), "healed durably");
    });
}

/// The cleaner came between: the block holds what is newer, whatever a peer that was asked before it says.
#[test]
fn healing_never_writes_older_content_over_newer() {
    let (disk, reference) = rested();
    let home = file(&disk, "/home");
    on(async {
        let replica = open(&disk, &reference).await;
        let old = content(&replica, BLOCK).await;
        disk.rot(&home, BLOCK * 4096 + 17, 4);
        replica.data.verify_chunk(LayerId::BASE, CHUNK).await.expect("is read");
        // On its way home: what home holds does not count.
        replica.submit(write(BLOCK, 1));
        let healed = replica
            .data
            .heal_blocks(LayerId::BASE, CHUNK, std::slice::from_ref(&old))
            .await
            .expect("is tried");
        assert_eq!(healed, Finding::Whole);
        replica.clean().await.expect("cleans");
        let healed = replica
            .data
            .heal_blocks(LayerId::BASE, CHUNK, std::slice::from_ref(&old))
            .await
            .expect("is tried");
        assert_eq!(healed, Finding::Whole);
        // Bad again, under the newer checksum.
        disk.rot(&home, BLOCK * 4096 + 17, 4);
        let healed = replica.data.heal_blocks(LayerId::BASE, CHUNK, &[old]).await.expect("is tried");
        assert_eq!(healed, Finding::Bad(vec![BlockIndex(BLOCK)]));
        assert_eq!(replica.check().await.expect("is checked"), [BLOCK]);
    });
}

/// Many histories, in which a healer with content of any time meets the cleaner at every step.
#[test]
fn a_cleaner_and_a_healer_at_once_leave_every_block_right() {
    for seed in 0..40 {
        let (disk, reference) = at_rest(&formatted(), seed).expect("lives");
        let home = file(&disk, "/home");
        simulate(seed, async {
            let replica = open(&disk, &reference).await;
            let state = replica.data.chunk_now(LayerMark::ONLY, CHUNK).await.expect("is read");
            let Some(n) = state.sums.iter().position(|sum| matches!(sum, BlockSum::Data(_))) else { return };
            let old = content(&replica, n as u64).await;
            disk.rot(&home, n as u64 * 4096 + 1, 1);
            replica.submit(write(n as u64, 1));
            let offered = [old];
            let (cleaned, healed) = futures_util::future::join(
                replica.clean(),
                replica.data.heal_blocks(LayerId::BASE, CHUNK, &offered),
            )
            .await;
            cleaned.expect("cleans");
            healed.expect("is tried");
            assert_eq!(replica.check().await.expect("is checked"), Vec::<u64>::new(), "seed {seed}");
        });
    }
}

#[test]
fn an_error_of_the_medium_makes_one_block_bad_until_it_is_written_anew() {
    let (disk, reference) = rested();
    let home = file(&disk, "/home");
    on(async {
        let replica = open(&disk, &reference).await;
        let right = content(&replica, BLOCK).await;
        // Once: the neighbours and the block itself are read one by one.
        disk.hiccup(&home, BLOCK);
        assert_eq!(replica.check().await.expect("is checked"), Vec::<u64>::new());
        assert_eq!(replica.data.usage().read_errors, 1);
        // Until it is written.
        disk.make_unreadable(&home, BLOCK);
        assert_eq!(replica.check().await.expect("is checked"), [BLOCK]);
        let healed = replica
            .data
            .heal_blocks(LayerId::BASE, CHUNK, std::slice::from_ref(&right))
            .await
            .expect("is healed");
        assert_eq!(healed, Finding::Whole);
        assert_eq!(replica.check().await.expect("is checked"), Vec::<u64>::new());
        // For good: it is said to be bad for as long as it is.
        disk.make_dead(&home, BLOCK);
        assert_eq!(replica.check().await.expect("is checked"), [BLOCK]);
        let healed = replica.data.heal_blocks(LayerId::BASE, CHUNK, &[right]).await.expect("is tried");
        assert_eq!(healed, Finding::Bad(vec![BlockIndex(BLOCK)]));
        assert_eq!(replica.data.health().bad_blocks, 1);
    });
}

/// A write of the cleaner's that is lost or goes elsewhere, under a table that says otherwise.
#[test]
fn home_writes_that_are_lost_or_misdirected_are_found_and_healed() {
    for fault in [Fault::Lose, Fault::Misdirect(40 * 4096)] {
        let (disk, reference) = rested();
        on(async {
            let replica = open(&disk, &reference).await;
            let before = content(&replica, 40).await;
            replica.submit(write(BLOCK, 1));
            replica.flushed().await;
            let right = content(&replica, BLOCK).await;
            // The chunk has its room already: the cleaner takes room for the manifest, the journal says what is committed, and
            // then comes the block.
            disk.at(disk.operations() + 2, fault);
            replica.clean().await.expect("the disk says that it is done");
            let misdirected = matches!(fault, Fault::Misdirect(_));
            let bad = if misdirected { vec![BLOCK, 40] } else { vec![BLOCK] };
            assert_eq!(replica.check().await.expect("is checked"), bad, "{fault:?}");
            let healed =
                replica.data.heal_blocks(LayerId::BASE, CHUNK, &[right, before]).await.expect("is healed");
            assert_eq!(healed, Finding::Whole);
            assert_eq!(replica.check().await.expect("is checked"), Vec::<u64>::new(), "{fault:?}");
            assert_eq!(replica.data.health().healed_blocks, bad.len() as u64);
        });
    }
}

fn lose_page(disk: &MemoryDisk) {
    let table = file(disk, "/table");
    disk.rot(&table, 20, 1);
    disk.rot(&table, 4096 + 20, 1);
}

/// The chunks of the first page as a replica has them.
async fn page_of(replica: &Replica) -> Vec<ChunkContent> {
    let mut contents = Vec::new();
    for chunk in (0..14).map(ChunkIndex) {
        let now = replica.data.chunk_now(LayerMark::ONLY, chunk).await.expect("is read");
        let mut blocks = Vec::new();
        for n in 0..CHUNK_BLOCKS {
            if matches!(now.sums[n as usize], BlockSum::Data(_)) {
                blocks.push(content(replica, chunk.first_block().0 + n).await);
            }
        }
        contents.push(ChunkContent { chunk, now, applied: replica.applied(), blocks });
    }
    contents
}

#[test]
fn a_lost_page_comes_back_from_a_peer_and_holds() {
    for seed in 0..10 {
        let (twin, twin_reference) = at_rest(&formatted(), seed).expect("lives");
        let (disk, reference) = at_rest(&formatted(), seed).expect("lives");
        lose_page(&disk);
        let page = simulate(seed, async { page_of(&*open(&twin, &twin_reference).await).await });
        simulate(seed, async {
            let replica = open(&disk, &reference).await;
            assert_eq!(
                replica.data.verify_chunk(LayerId::BASE, CHUNK).await.expect("is read"),
                Finding::Lost
            );
            assert!(replica.data.adopt(LayerMark::ONLY, &page, replica.applied()).await.expect("is adopted"));
            assert_eq!(replica.check().await.expect("is checked"), Vec::<u64>::new(), "seed {seed}");
            replica.submit(write(5, 100));
            replica.clean().await.expect("the page is written again");
        });
        disk.power_cut(Tear::Nothing);
        simulate(seed, async {
            let replica = open(&disk, &reference).await;
            assert_eq!(replica.check().await.expect("is checked"), Vec::<u64>::new(), "seed {seed}");
        });
    }
}

/// The power goes at any moment of it: the page is lost still, or it is right.
#[test]
fn a_page_that_is_half_restored_says_nothing_wrong() {
    let image = formatted();
    let (twin, twin_reference) = at_rest(&image, 3).expect("lives");
    let page = simulate(3, async { page_of(&*open(&twin, &twin_reference).await).await });
    let (mut lost, mut healed) = (0, 0);
    for stop in 0.. {
        let (disk, reference) = at_rest(&image, 3).expect("lives");
        lose_page(&disk);
        let ended = simulate(stop, async {
            let replica = open(&disk, &reference).await;
            disk.at(disk.operations() + stop, Fault::Freeze);
            let adopting = Box::pin(replica.data.adopt(LayerMark::ONLY, &page, replica.applied()));
            let frozen = Box::pin(disk.frozen());
            matches!(
                futures_util::future::select(adopting, frozen).await,
                futures_util::future::Either::Left(_)
            )
        });
        disk.power_cut(Tear::Random(stop));
        let bad = simulate(stop, async { open(&disk, &reference).await.check().await });
        match bad.unwrap_or_else(|why| panic!("stopped at {stop}: {why}")) {
            bad if bad.is_empty() => healed += 1,
            _ => lost += 1,
        }
        if ended {
            break;
        }
    }
    assert!(lost > 3 && healed > 0, "{lost} {healed}");
}

/// Chunks of another time are refused: of one that is behind this replica's checkpoint, or ahead of what it has applied.
async fn adopts_another_time(replica: &Replica) -> (bool, bool) {
    let now = replica.data.chunk_now(LayerMark::ONLY, CHUNK).await.expect("is read");
    let content = |last, applied| {
        let now = holdfast_store::volume::ChunkNow { last_index: LogIndex(last), ..now.clone() };
        vec![ChunkContent { chunk: CHUNK, now, applied: LogIndex(applied), blocks: Vec::new() }]
    };
    let checkpoint = replica.data.checkpoint().id.index.0;
    let behind = replica
        .data
        .adopt(LayerMark::ONLY, &content(1, checkpoint - 1), replica.applied())
        .await
        .expect("is tried");
    let applied = replica.applied();
    let ahead = replica
        .data
        .adopt(LayerMark::ONLY, &content(applied.0 + 1, applied.0 + 1), applied)
        .await
        .expect("is tried");
    (behind, ahead)
}

#[test]
fn a_chunk_of_another_time_is_not_adopted() {
    let (disk, reference) = rested();
    on(async {
        let replica = open(&disk, &reference).await;
        assert_eq!(adopts_another_time(&replica).await, (false, false));
    });
}

#[test]
fn a_page_with_one_rotten_copy_has_two_good_ones_after_the_scrub() {
    for copy in 0..2 {
        let (disk, reference) = rested();
        let table = file(&disk, "/table");
        on(async {
            let replica = open(&disk, &reference).await;
            let whole = disk.block(&table, copy);
            disk.rot(&table, copy * 4096 + 30, 1);
            assert!(replica.data.verify_page(CHUNK).await.expect("is read"));
            assert_eq!(disk.block(&table, copy), whole);
            assert_eq!(replica.data.health().healed_pages, 1);
            // Both, while memory still knows the page.
            replica.check().await.expect("is checked");
            lose_page(&disk);
            assert!(replica.data.verify_page(CHUNK).await.expect("is read"));
            assert_eq!(disk.block(&table, copy), whole);
        });
    }
}

/// The disk reported both writes of a page and dropped them: its copies are whole, equal, and old.
#[test]
fn a_page_whose_writes_were_lost_is_written_again_while_memory_knows_it() {
    let (disk, reference) = rested();
    let table = file(&disk, "/table");
    let old = disk.block(&table, 0);
    on(async {
        let replica = open(&disk, &reference).await;
        replica.submit(write(20, 2));
        replica.clean().await.expect("cleans");
        let new = disk.block(&table, 0);
        (0..2).for_each(|copy| disk.put_block(&table, copy, &old));
        assert!(replica.data.verify_page(CHUNK).await.expect("is read"));
        assert_eq!((disk.block(&table, 0), disk.block(&table, 1)), (new.clone(), new));
    });
}

/// What a page says that is not believed may be old; what matches a checksum that another replica knows is right there.
#[test]
fn a_page_that_is_not_believed_gives_blocks_to_who_knows_their_checksums() {
    let (disk, reference) = rested();
    let (twin, twin_reference) = rested();
    twin.rot(&file(&twin, "/home"), BLOCK * 4096 + 17, 4);
    disk.rot(&file(&disk, "/home"), 6 * 4096 + 17, 4);
    on(async {
        let replica = open(&disk, &reference).await;
        let old = async |mask| replica.data.old_blocks(LayerMark::ONLY, CHUNK, mask).await.expect("is read");
        assert_eq!(old(1 << BLOCK).await, [], "it is believed");
        assert!(!replica.data.awaits_pages());
        assert!(replica.data.distrust(LayerMark::ONLY, CHUNK).await.expect("is noted"));
        assert!(replica.data.awaits_pages());
        let blocks = old(1 << BLOCK | 1 << 6).await;
        assert_eq!(blocks.len(), 1, "one that rotted is not given");
        let twin = open(&twin, &twin_reference).await;
        let bad = Finding::Bad(vec![BlockIndex(BLOCK)]);
        assert_eq!(twin.data.verify_chunk(LayerId::BASE, CHUNK).await.expect("is read"), bad);
        let healed = twin.data.heal_blocks(LayerId::BASE, CHUNK, &blocks).await;
        assert_eq!(healed.expect("is healed"), Finding::Whole);
    });
}
