//! Healing of volumes with snapshots (INV-HEAL, INV-LAYER): each layer by itself, and whatever the crash, no view shows
//! anything but what it must.

use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{Either, select};
use holdfast_store::testing::{Fault, Image, MemoryDisk, Tear, simulate};
use holdfast_store::volume::{BlockSum, ChunkContent, Finding, LayerId, LayerMark, ReadError, View};
use holdfast_types::{BlockIndex, BlockRange, CHUNK_BLOCKS, ChunkIndex, LogIndex};

use crate::crashes::{formatted, live};
use crate::replica::{Command, Reference, Replica, What, check_blocks};

/// Blocks of the first page.
const PAGE_BLOCKS: u64 = 14 * CHUNK_BLOCKS;
const SNAPSHOT: u64 = 2;
const FROZEN: LayerMark = LayerMark { id: LayerId::BASE, frozen: Some(LogIndex(SNAPSHOT)) };
const NEWEST: LayerMark = LayerMark { id: LayerId(LogIndex(SNAPSHOT)), frozen: None };

fn command(what: What, start: u64, count: u32) -> Command {
    Command { what, start, count }
}

/// A replica at rest with a snapshot and a layer over it.
fn rested(image: &Image) -> (MemoryDisk, Rc<Reference>) {
    let disk = MemoryDisk::from_image(image, 5);
    let reference = Rc::new(Reference::default());
    live(&disk, &reference, 5, |replica| async move {
        replica.submit(command(What::Write, 0, 140));
        replica.submit(command(What::Snapshot, 0, 0));
        replica.submit(command(What::Write, 10, 48));
        replica.submit(command(What::Trim, 64, 70));
        replica.clean().await.map_err(|error| error.to_string())
    })
    .expect("lives");
    disk.power_cut(Tear::Nothing);
    (disk, reference)
}

fn table(disk: &MemoryDisk, layer: u64) -> String {
    let end = format!("/layer-{layer}/table");
    disk.names().into_iter().find(|name| name.ends_with(&end)).expect("the table is there")
}

fn lose_pages(disk: &MemoryDisk, layers: &[u64]) {
    for layer in layers {
        let table = table(disk, *layer);
        (0..2).for_each(|copy| disk.rot(&table, copy * 4096 + 20, 1));
    }
}

/// The chunks of the first page of a layer as a replica has them.
async fn page_of(replica: &Replica, layer: LayerMark) -> Vec<ChunkContent> {
    let mut contents = Vec::new();
    for chunk in (0..14).map(ChunkIndex) {
        let now = replica.data.chunk_now(layer, chunk).await.expect("is read");
        let mut blocks: Vec<(BlockIndex, Bytes)> = Vec::new();
        for n in 0..CHUNK_BLOCKS {
            let block = BlockIndex(chunk.first_block().0 + n);
            if matches!(now.sums[n as usize], BlockSum::Data(_)) {
                let read = replica.data.read_layer(layer.id, BlockRange::new(block, 1)).await;
                blocks.push((block, read.expect("is whole").data));
            }
        }
        contents.push(ChunkContent { chunk, now, applied: replica.applied(), blocks });
    }
    contents
}

/// Every block of the first page in every view is what it must be, or is called bad; how many are.
async fn check_views(replica: &Replica) -> Result<usize, String> {
    let mut bad = 0;
    for (index, expected) in replica.reference.views(replica.applied().0) {
        let view = if index == u64::MAX { View::Head } else { View::Snapshot(LogIndex(index)) };
        for block in (0..PAGE_BLOCKS).map(BlockIndex) {
            let range = BlockRange::new(block, 1);
            match replica.data.read_view(view, range).await {
                Ok(read) => {
                    check_blocks(range, &read.data, &expected).map_err(|why| format!("{view:?}: {why}"))?
                }
                Err(ReadError::BadBlocks(_)) => bad += 1,
                Err(error) => return Err(format!("{view:?}: {error}")),
            }
        }
    }
    Ok(bad)
}

#[test]
fn a_block_that_the_head_hides_is_verified_and_healed_in_its_layer() {
    let (disk, reference) = rested(&formatted());
    let home = table(&disk, 0).replace("/table", "/home");
    simulate(11, async {
        let replica = Replica::open(disk.directory(), &reference).await.expect("opens");
        let right = replica.data.read_layer(LayerId::BASE, BlockRange::new(BlockIndex(20), 1)).await;
        let right = (BlockIndex(20), right.expect("is whole").data);
        let head = replica.data.read(BlockRange::new(BlockIndex(20), 1)).await.expect("is whole");
        disk.rot(&home, 20 * 4096 + 17, 4);
        // What is on its way to the younger layer covers nothing of the older.
        replica.submit(command(What::Write, 20, 1));
        let bad = Finding::Bad(vec![BlockIndex(20)]);
        let verify = async |layer| replica.data.verify_chunk(layer, ChunkIndex(0)).await.expect("is read");
        assert_eq!((verify(LayerId::BASE).await, verify(NEWEST.id).await), (bad.clone(), Finding::Whole));
        let heal = async |data| {
            replica.data.heal_blocks(LayerId::BASE, ChunkIndex(0), &[data]).await.expect("is tried")
        };
        assert_eq!(
            heal((BlockIndex(20), head)).await,
            bad,
            "what the head shows is not what the layer holds"
        );
        assert_eq!(heal(right).await, Finding::Whole);
        assert_eq!(check_views(&replica).await, Ok(0));
        let health = replica.data.health();
        assert_eq!((health.found_blocks, health.healed_blocks, health.bad_blocks), (1, 1, 0));
    });
}

/// What an old page of a younger layer does not have is not read from the older one, though that is where it was known
/// to be.
#[test]
fn what_is_distrusted_hides_what_is_below() {
    let (disk, reference) = rested(&formatted());
    let block = BlockRange::new(BlockIndex(5), 1);
    simulate(11, async {
        let replica = Replica::open(disk.directory(), &reference).await.expect("opens");
        replica.data.read(block).await.expect("is whole");
        assert!(replica.data.distrust(NEWEST, ChunkIndex(0)).await.expect("is noted"));
        assert_eq!(replica.data.read(block).await, Err(ReadError::BadBlocks(vec![5])));
        let frozen = replica.data.read_view(View::Snapshot(LogIndex(SNAPSHOT)), block).await;
        check_blocks(block, &frozen.expect("is whole").data, &[1; 64]).expect("shows the snapshot");
        assert_eq!(replica.data.health().bad_blocks, CHUNK_BLOCKS);
    });
    disk.power_cut(Tear::Nothing);
    simulate(12, async {
        let replica = Replica::open(disk.directory(), &reference).await.expect("opens");
        assert_eq!(replica.data.read(block).await, Err(ReadError::BadBlocks(vec![5])), "durably");
    });
}

#[test]
fn a_lost_page_of_each_layer_comes_back_from_a_peer_and_holds() {
    let image = formatted();
    for lost in [&[0][..], &[SNAPSHOT], &[0, SNAPSHOT]] {
        let (twin, twin_reference) = rested(&image);
        let (disk, reference) = rested(&image);
        lose_pages(&disk, lost);
        let pages = simulate(3, async {
            let replica = Replica::open(twin.directory(), &twin_reference).await.expect("opens");
            [page_of(&replica, FROZEN).await, page_of(&replica, NEWEST).await]
        });
        simulate(4, async {
            let replica = Replica::open(disk.directory(), &reference).await.expect("opens");
            assert!(check_views(&replica).await.expect("nothing is wrong") > 0);
            for (layer, page) in [FROZEN, NEWEST].into_iter().zip(&pages) {
                if !lost.contains(&layer.id.0.0) {
                    continue;
                }
                let found = replica.data.verify_chunk(layer.id, ChunkIndex(0)).await.expect("is read");
                assert_eq!(found, Finding::Lost);
                // Of the wrong layer it is not taken.
                let other = if layer == FROZEN {
                    LayerMark::ONLY
                } else {
                    LayerMark { frozen: Some(LogIndex(9)), ..NEWEST }
                };
                assert!(!replica.data.adopt(other, page, replica.applied()).await.expect("is tried"));
                assert!(replica.data.adopt(layer, page, replica.applied()).await.expect("is adopted"));
            }
            assert_eq!(check_views(&replica).await, Ok(0));
            replica.submit(command(What::Write, 5, 100));
            replica.clean().await.expect("the pages are written again");
        });
        disk.power_cut(Tear::Nothing);
        simulate(5, async {
            let replica = Replica::open(disk.directory(), &reference).await.expect("opens");
            assert_eq!(check_views(&replica).await, Ok(0), "{lost:?}");
        });
    }
}

/// Two layers of the durable checkpoint are one by a drop that is not durable yet, and their page is lost in either or
/// both. The power goes at any moment of its restoration, and takes the drop with it.
fn cut_adoption(image: &Image, lost: &[u64], stop: u64, tear: Tear) -> Result<(bool, bool), String> {
    let then = |replica: &Replica| {
        replica.submit(command(What::Write, 20, 5));
        replica.submit(command(What::Trim, 30, 3));
    };
    let dropped = command(What::Drop, SNAPSHOT, 0);
    let (twin, twin_reference) = rested(image);
    let page = simulate(3, async {
        let replica = Replica::open(twin.directory(), &twin_reference).await.expect("opens");
        then(&replica);
        replica.submit(dropped);
        page_of(&replica, LayerMark::ONLY).await
    });
    let (disk, reference) = rested(image);
    lose_pages(&disk, lost);
    let ended = simulate(stop, async {
        let replica = Replica::open(disk.directory(), &reference).await.expect("opens");
        then(&replica);
        replica.flushed().await;
        // What is durable is known to be committed: the restoration has nothing to write down behind the drop, and need not wait
        // for it.
        replica.log.keep_committed(replica.applied()).await.expect("is noted");
        disk.at(disk.operations(), Fault::Hang(Duration::from_secs(3600)));
        replica.submit(dropped);
        holdfast_env::sleep(Duration::from_millis(10)).await;
        disk.at(disk.operations() + stop, Fault::Freeze);
        let adopting = Box::pin(replica.data.adopt(LayerMark::ONLY, &page, replica.applied()));
        match select(adopting, Box::pin(disk.frozen())).await {
            Either::Left((adopted, _)) => {
                assert!(adopted.expect("is tried"), "it is adopted");
                assert_eq!(check_views(&replica).await, Ok(0));
                true
            }
            Either::Right(_) => false,
        }
    });
    disk.power_cut(tear);
    let bad = simulate(stop, async {
        let replica = Replica::open(disk.directory(), &reference).await?;
        check_views(&replica).await
    })?;
    Ok((ended, bad == 0))
}

#[test]
fn a_page_of_two_layers_that_became_one_is_restored_whatever_the_cut() {
    let image = formatted();
    for lost in [&[0][..], &[SNAPSHOT], &[0, SNAPSHOT]] {
        let (mut bad, mut whole) = (0, 0);
        for tear in [Tear::Nothing, Tear::Everything, Tear::Random(1)] {
            for stop in 0.. {
                let (ended, is_whole) = cut_adoption(&image, lost, stop, tear)
                    .unwrap_or_else(|why| panic!("{lost:?} stopped at {stop}, {tear:?}: {why}"));
                *(if is_whole { &mut whole } else { &mut bad }) += 1;
                if ended {
                    break;
                }
            }
        }
        assert!(bad > 3 && whole > 0, "{lost:?}: {bad} {whole}");
    }
}
