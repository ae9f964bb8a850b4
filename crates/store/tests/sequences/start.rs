//! Stores that the sequences begin with.

use std::rc::Rc;

use bytes::Bytes;
use holdfast_env::disk::{Directory, Durability, OpenMode};
use holdfast_store::EntryId;
use holdfast_store::journal::Journal;
use holdfast_store::testing::{Image, MemoryDisk, simulate};
use holdfast_store::volume::{Checkpoint, VolumeData};
use holdfast_types::BLOCK_BYTES;

use crate::model::{Command, Log, Model, entry, id};
use crate::ops::Op;
use crate::world::{A, IDLE, WHO, World, files, options, store};

/// What sequences begin with.
pub struct Start {
    pub image: Image,
    commands: &'static [Command],
    /// What a replica goes on with after a recovery.
    pub go_on: &'static [Op],
}

/// Of all that is home: an empty entry, and a write of both blocks.
const PLAIN: [Command; 2] = [Command::Nothing, Command::Write { start: A, count: 2 }];

/// A snapshot that hides a version of A, so that one operation merges and one restores.
const LAYERED: [Command; 4] = [PLAIN[0], PLAIN[1], Command::Snapshot, Command::Write { start: A, count: 1 }];

fn first_entries(commands: &[Command]) -> impl Iterator<Item = (EntryId, Command)> {
    (0..).zip(commands).map(|(index, command)| (id(1, index), *command))
}

/// Segments that are much smaller than a store may be made with, so that short sequences use them again. Nothing here
/// is larger than two blocks.
const SEGMENT_BYTES: u64 = 16 * BLOCK_BYTES as u64;

/// Writes into the store's identity that its segments are small.
async fn with_small_segments(directory: &Rc<dyn Directory>) {
    let file = directory.open("journal/identity", OpenMode::Existing).await.expect("is there");
    let mut both = file.read_at(0, 2 * BLOCK_BYTES).await.expect("is read");
    // Behind magic, version, cluster, store and the node's name; docs/FORMAT.md.
    let at = 46 + store().node.as_str().len();
    for copy in both.as_mut_slice().chunks_exact_mut(BLOCK_BYTES) {
        let found = u64::from_le_bytes(copy[at..at + 8].try_into().expect("eight bytes"));
        assert_eq!(found, options().segment_bytes, "the size of a segment stands elsewhere");
        copy[at..at + 8].copy_from_slice(&SEGMENT_BYTES.to_le_bytes());
        let crc = crc32fast::hash(&copy[..at + 20]);
        copy[at + 20..at + 24].copy_from_slice(&crc.to_le_bytes());
    }
    file.write_at(0, both, Durability::Durable).await.expect("is written");
}

impl Start {
    pub fn plain() -> Self {
        Self { image: prepared(&PLAIN), commands: &PLAIN, go_on: &Op::GO_ON }
    }

    pub fn layered() -> Self {
        Self { image: prepared(&LAYERED), commands: &LAYERED, go_on: &Op::GO_ON_LAYERED }
    }

    /// What the model knows at the beginning.
    pub fn model(&self) -> Model {
        first_model(self.commands)
    }
}

fn first_model(commands: &[Command]) -> Model {
    let log: Log = first_entries(commands).map(|(id, command)| (id.index.0, (id, command))).collect();
    let model = Model::of(&log, None, None, 1);
    *model.committed.borrow_mut() = log;
    model
}

/// A store with a replica that has a checkpoint.
fn prepared(commands: &[Command]) -> Image {
    let disk = MemoryDisk::new(0);
    simulate(1, async {
        let directory = disk.directory();
        Journal::format(directory.clone(), &store(), &options()).await.expect("formats");
        with_small_segments(&directory).await;
        let (journal, _) = Journal::open(directory.clone(), &store(), &options()).await.expect("opens");
        let log = journal.create_group(WHO).await.expect("creates");
        let entries = first_entries(commands).map(|(id, command)| entry(id, command)).collect();
        log.append(entries, Box::new(|result| result.expect("is flushed")));
        let (spec, payloads) = (Bytes::new(), Rc::new(log));
        VolumeData::create(directory, files(), spec, Checkpoint::default(), payloads).await.expect("creates");
    });
    disk.kill();
    let model = Rc::new(first_model(commands));
    simulate(2, async {
        let world = World::recover(disk.directory(), &model).await.expect("opens");
        world.data.clean(&*world).await.expect("is cleaned");
        holdfast_env::sleep(IDLE).await;
    });
    disk.kill();
    disk.image()
}
