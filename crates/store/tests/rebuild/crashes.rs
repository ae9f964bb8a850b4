//! A rebuild is stopped at every moment, and what is collected for it rots: afterwards the replica is as it was, or as
//! its source, and never a mixture (INV-STAGE).

use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;

use bytes::Bytes;
use futures_util::future::{Either, select};
use holdfast_store::StoreError;
use holdfast_store::testing::{Fault, Image, MemoryDisk, Random, Tear, simulate};
use holdfast_store::volume::{LayerId, LayerMark, VolumeData};
use holdfast_types::{BLOCK_BYTES, BlockIndex, BlockRange, block_checksum};

use crate::replica::{At, Log, SIZE, checkpoint, reopened, replica_in, write};

/// The checkpoint before the rebuild, and that of its source.
const OLD: u64 = 2;
const NEW: u64 = 9;
/// Applied after the rebuild.
const LATER: u64 = 10;

/// What is in blocks that are not zeros.
type Content = BTreeMap<u64, u8>;

fn range(start: u64, count: u32) -> BlockRange {
    BlockRange::new(BlockIndex(start), count)
}

fn fill(content: &mut Content, range: BlockRange, byte: u8) {
    range.blocks().for_each(|block| {
        content.insert(block.0, byte);
    });
}

fn old_content() -> Content {
    let mut content = Content::new();
    fill(&mut content, range(0, 4), 0xaa);
    fill(&mut content, range(70, 2), 0xab);
    content
}

/// What the source has: it differs in blocks 0, 70 and 200 to 202.
fn new_content() -> Content {
    let mut content = old_content();
    fill(&mut content, range(0, 1), 0xd0);
    fill(&mut content, range(200, 3), 0xd1);
    content.remove(&70);
    content
}

struct Case {
    disk: MemoryDisk,
    log: Rc<Log>,
    /// The rebuild was reported to be switched in.
    switched: Rc<Cell<bool>>,
    /// The entry after it was applied.
    later: Rc<Cell<bool>>,
}

/// A replica with a checkpoint.
fn prepared(seed: u64) -> Case {
    let disk = MemoryDisk::new(seed);
    let log = Rc::new(Log::default());
    simulate(1, async {
        let data = replica_in(disk.directory(), &log).await;
        write(&data, &log, 1, range(0, 4), 0xaa);
        write(&data, &log, 2, range(70, 2), 0xab);
        data.clean(&At(OLD)).await.expect("is cleaned");
    });
    disk.power_cut(Tear::Nothing);
    Case { disk, log, switched: Rc::default(), later: Rc::default() }
}

async fn put(staging: &holdfast_store::volume::StagingLayer, range: BlockRange, byte: u8) {
    let data = Bytes::from(vec![byte; range.bytes() as usize]);
    let blocks = range.blocks().zip(data.chunks_exact(BLOCK_BYTES));
    let sums: Vec<u32> = blocks.map(|(block, data)| block_checksum(block, data)).collect();
    staging.put(LayerId::BASE, range, data, &sums).await.expect("is staged");
}

impl Case {
    /// The rebuild, while the own log goes on; then an entry of the new log, and a checkpoint.
    async fn rebuild(&self) -> Result<(), StoreError> {
        let data = reopened(self.disk.directory(), &self.log).await?;
        let staging = data.begin_staging(vec![LayerMark::ONLY]).await?;
        write(&data, &self.log, OLD + 1, range(1, 1), 0xac);
        put(&staging, range(0, 1), 0xd0).await;
        staging.clear(LayerId::BASE, range(70, 1)).await?;
        put(&staging, range(200, 3), 0xd1).await;
        staging.commit(checkpoint(NEW)).await?;
        self.switched.set(true);
        drop(staging);
        self.later.set(true);
        write(&data, &self.log, LATER, range(5, 1), 0xdd);
        data.clean(&At(LATER)).await.map(drop)
    }

    /// Runs until the world stops or the rebuild has ended; whether it was stopped.
    fn run(&self, stop: u64) -> bool {
        let begin = self.disk.operations();
        self.disk.at(begin + stop, Fault::Freeze);
        simulate(2, async {
            let ended = select(Box::pin(self.rebuild()), Box::pin(self.disk.frozen())).await;
            if let Either::Left((result, _)) = ended {
                result.expect("nothing went wrong");
            }
        });
        self.disk.operations() > begin + stop
    }

    async fn check(&self) -> Result<(), String> {
        let data = reopened(self.disk.directory(), &self.log).await.map_err(|error| error.to_string())?;
        let index = data.checkpoint().id.index.0;
        let mut expected = match index {
            OLD if !self.switched.get() => {
                // Its own log says so, and is repeated.
                write(&data, &self.log, OLD + 1, range(1, 1), 0xac);
                let mut content = old_content();
                fill(&mut content, range(1, 1), 0xac);
                content
            }
            NEW | LATER => new_content(),
            _ => return Err(format!("the checkpoint is {index}, switched in: {}", self.switched.get())),
        };
        if index == NEW && self.later.get() {
            write(&data, &self.log, LATER, range(5, 1), 0xdd);
        }
        if index == LATER || (index == NEW && self.later.get()) {
            fill(&mut expected, range(5, 1), 0xdd);
        }
        compare(&data, &expected).await
    }

    /// Opens and checks, until it is done or the world stops.
    fn checked(&self) -> Result<(), String> {
        simulate(3, async {
            match select(Box::pin(self.check()), Box::pin(self.disk.frozen())).await {
                Either::Left((result, _)) => result,
                Either::Right(_) => Ok(()),
            }
        })
    }
}

async fn compare(data: &VolumeData, expected: &Content) -> Result<(), String> {
    for start in (0..SIZE.0 / BLOCK_BYTES as u64).step_by(64) {
        let bytes = data.read(range(start, 64)).await.map_err(|error| error.to_string())?;
        for (block, found) in (start..).zip(bytes.chunks_exact(BLOCK_BYTES)) {
            let byte = expected.get(&block).copied().unwrap_or_default();
            if found.iter().any(|found| *found != byte) {
                return Err(format!("block {block} holds {:#x}, not {byte:#x}", found[0]));
            }
        }
    }
    Ok(())
}

/// A power cut in the rebuild, and another one while it is recovered from.
fn cut_twice(stop: u64, again: u64, tear: Tear) -> Result<bool, String> {
    let case = prepared(stop);
    let stopped = case.run(stop);
    case.disk.power_cut(tear);
    case.disk.at(case.disk.operations() + again, Fault::Freeze);
    case.checked()?;
    case.disk.power_cut(tear);
    case.checked()?;
    Ok(stopped)
}

#[test]
fn every_cut_of_a_rebuild_leaves_all_of_it_or_nothing() {
    let tears = [Tear::Nothing, Tear::Everything, Tear::Sectors(0x0f), Tear::Random(1), Tear::Random(2)];
    let mut cases = 0;
    for tear in tears {
        for again in [2, 4, 6, 9, 99] {
            for stop in 0.. {
                let result = cut_twice(stop, again, tear);
                let why = |why| panic!("stopped at {stop}, then at {again}, {tear:?}: {why}");
                if !result.unwrap_or_else(why) {
                    break;
                }
                cases += 1;
            }
        }
    }
    println!("{cases} cases");
    assert!(cases > 500, "only {cases} cases");
}

/// Every block of what is collected rots, at every moment.
fn rotten_staging(image: &Image, case: &Case, block: u64, name: &str) -> Result<(), String> {
    let disk = MemoryDisk::from_image(image, block);
    let random = Random::new(block);
    // A head's first bytes are covered by its checksum; of data everything is.
    disk.rot(name, block * BLOCK_BYTES as u64 + random.below(25), 1 << random.below(8));
    let (log, switched, later) = (case.log.clone(), case.switched.clone(), case.later.clone());
    match (Case { disk, log, switched, later }).checked() {
        Err(why) if why.contains("is damaged") => Ok(()),
        other => other,
    }
}

#[test]
fn what_rots_before_it_comes_home_is_refused() {
    let mut cases = 0;
    for stop in 0.. {
        let case = prepared(stop);
        let stopped = case.run(stop);
        case.disk.power_cut(Tear::Everything);
        let image = case.disk.image();
        for name in case.disk.names().iter().filter(|name| name.ends_with("/staging")) {
            for (block, _) in case.disk.written(name) {
                cases += 1;
                rotten_staging(&image, &case, block, name)
                    .unwrap_or_else(|why| panic!("stopped at {stop}, block {block} of {name}: {why}"));
            }
        }
        if !stopped {
            break;
        }
    }
    assert!(cases > 50, "only {cases} cases");
}

/// A block carries its address in its checksum: at another place it is not good, whoever sent it there.
#[test]
fn a_block_of_another_address_is_not_staged() {
    let case = prepared(1);
    simulate(1, async {
        let data = reopened(case.disk.directory(), &case.log).await.expect("opens");
        let staging = data.begin_staging(vec![LayerMark::ONLY]).await.expect("begins");
        let content = Bytes::from(vec![7; BLOCK_BYTES]);
        let sum = block_checksum(BlockIndex(7), &content);
        let refused = staging.put(LayerId::BASE, range(8, 1), content.clone(), &[sum]).await;
        assert!(matches!(refused, Err(StoreError::Damaged { .. })), "{refused:?}");
        staging.put(LayerId::BASE, range(7, 1), content, &[sum]).await.expect("at its own place it is good");
    });
}
