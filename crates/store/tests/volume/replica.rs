//! A replica without Raft: every command is committed as soon as it is appended, and applied at once.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use holdfast_env::disk::Directory;
use holdfast_store::journal::{GroupLog, Journal, Recovery, StoreOptions};
use holdfast_store::testing::Random;
use holdfast_store::volume::{
    Checkpoint, CheckpointSource, Clear, ReadError, ReplicaFileIdentity, VolumeData,
};
use holdfast_store::{EntryId, LogEntry, ReplicaIdentity, StoreError, StoreIdentity};
use holdfast_types::{
    BLOCK_BYTES, BlockIndex, BlockRange, ByteSize, ClusterId, GroupId, LogIndex, NodeName, Reader, ReplicaId,
    StoreId, Term, VolumeId, Writer, block_checksum,
};

/// Blocks of the volume: 40 chunks on three pages of the table.
pub const BLOCKS: u64 = 40 * 64;

const WHO: ReplicaIdentity = ReplicaIdentity { group: GroupId(9), replica: ReplicaId(1) };

pub fn identity() -> StoreIdentity {
    StoreIdentity { cluster: ClusterId(1), node: NodeName::new("n"), store: StoreId(2) }
}

pub fn options() -> StoreOptions {
    StoreOptions { segment_bytes: 2 << 20, segments: 6 }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    Write,
    Zero,
    Trim,
    /// A snapshot; named by its index.
    Snapshot,
    /// The snapshot of index `start` goes.
    Drop,
    /// Back to the snapshot of index `start`, the newest.
    Restore,
}

/// A command of the log.
#[derive(Clone, Copy, Debug)]
pub struct Command {
    pub what: What,
    pub start: u64,
    pub count: u32,
}

impl Command {
    pub fn at_random(random: &Random) -> Self {
        let what = match random.below(8) {
            0 => What::Trim,
            1 => What::Zero,
            _ => What::Write,
        };
        let most = if what == What::Write { 48 } else { 300 };
        let count = 1 + random.below(most);
        let start = random.below(BLOCKS - count + 1);
        Self { what, start, count: count as u32 }
    }

    pub fn range(&self) -> BlockRange {
        BlockRange::new(BlockIndex(self.start), self.count)
    }

    fn encode(&self) -> Bytes {
        let mut out = Writer::new();
        out.u8(self.what as u8);
        out.u64(self.start);
        out.u32(self.count);
        out.finish()
    }

    fn decode(head: &[u8]) -> Option<Self> {
        let mut input = Reader::new(head);
        let what = match input.u8().ok()? {
            0 => What::Write,
            1 => What::Zero,
            2 => What::Trim,
            3 => What::Snapshot,
            4 => What::Drop,
            _ => What::Restore,
        };
        Some(Self { what, start: input.u64().ok()?, count: input.u32().ok()? })
    }
}

/// What entry `index` writes to a block.
fn content(index: u64, block: u64) -> [u8; BLOCK_BYTES] {
    let mut data = [(index % 251) as u8; BLOCK_BYTES];
    data[..8].copy_from_slice(&index.to_le_bytes());
    data[8..16].copy_from_slice(&block.to_le_bytes());
    data
}

/// What was asked for, and how much of it was acknowledged; outlives the process.
#[derive(Default)]
pub struct Reference {
    pub commands: RefCell<Vec<Command>>,
    pub acknowledged: Cell<u64>,
}

impl Reference {
    /// The entry that wrote each block last, up to an index; 0 where zeros are.
    pub fn content(&self, upto: u64) -> Vec<u64> {
        self.views(upto).remove(&u64::MAX).expect("there is a head")
    }

    /// The same of every living snapshot, by its index, and of the head, under the greatest.
    pub fn views(&self, upto: u64) -> BTreeMap<u64, Vec<u64>> {
        let mut head = vec![0; BLOCKS as usize];
        let mut views = BTreeMap::new();
        for (index, command) in (1u64..).zip(self.commands.borrow().iter()).take(upto as usize) {
            match command.what {
                What::Snapshot => drop(views.insert(index, head.clone())),
                What::Drop => drop(views.remove(&command.start)),
                What::Restore => head = views[&command.start].clone(),
                what => command.range().blocks().for_each(|block| {
                    head[block.0 as usize] = if what == What::Write { index } else { 0 };
                }),
            }
        }
        views.insert(u64::MAX, head);
        views
    }

    /// Indices of the living snapshots.
    pub fn snapshots(&self) -> Vec<u64> {
        let mut living = Vec::new();
        for (index, command) in (1u64..).zip(self.commands.borrow().iter()) {
            match command.what {
                What::Snapshot => living.push(index),
                What::Drop => living.retain(|other| *other != command.start),
                _ => {}
            }
        }
        living
    }
}

pub struct Replica {
    pub journal: Journal,
    pub log: GroupLog,
    pub data: VolumeData,
    applied: Cell<EntryId>,
    pub reference: Rc<Reference>,
}

fn state_at(id: EntryId) -> Checkpoint {
    Checkpoint { id, state: Bytes::from(format!("state {}", id.index)), ..Checkpoint::default() }
}

impl CheckpointSource for Replica {
    fn capture(&self) -> Checkpoint {
        state_at(self.applied.get())
    }
    /// Every state of the past is known here.
    fn captured_up_to(&self, index: LogIndex) -> Option<Checkpoint> {
        Some(state_at(id(index.0.min(self.applied.get().index.0))))
    }
}

fn id(index: u64) -> EntryId {
    EntryId { term: Term(1), leader: ReplicaId(1), index: LogIndex(index) }
}

pub fn file_identity() -> ReplicaFileIdentity {
    ReplicaFileIdentity {
        cluster: ClusterId(1),
        store: StoreId(2),
        node: NodeName::new("n"),
        volume: VolumeId(3),
        id: WHO,
        incarnation: 1,
    }
}

impl Replica {
    /// Makes a store with a new replica.
    pub async fn create(directory: Rc<dyn Directory>) {
        Journal::format(directory.clone(), &identity(), &options()).await.expect("formats");
        let (journal, _) = Journal::open(directory.clone(), &identity(), &options()).await.expect("opens");
        let log = journal.create_group(WHO).await.expect("creates");
        log.append(
            vec![LogEntry { id: id(0), kind: 0, head: Bytes::new(), payload: Bytes::new() }],
            Box::new(|r| r.expect("is flushed")),
        );
        let payloads = Rc::new(log.clone());
        let initial = Checkpoint::default();
        VolumeData::create(directory, file_identity(), "{}".into(), initial, payloads)
            .await
            .expect("creates");
    }

    /// Opens it as a daemon does: recovers the log, and repeats it from the checkpoint on.
    pub async fn open(directory: Rc<dyn Directory>, reference: &Rc<Reference>) -> Result<Rc<Self>, String> {
        let opened = Journal::open(directory.clone(), &identity(), &options()).await;
        let (journal, mut groups) = opened.map_err(|error| error.to_string())?;
        let group = groups.pop().ok_or("the log is gone")?;
        if group.state != Recovery::Clean {
            return Err(format!("the log is {:?}", group.state));
        }
        let log = group.log;
        let opened = VolumeData::open(directory, &file_identity(), Rc::new(log.clone())).await;
        let data = opened.map_err(|error| error.to_string())?;
        data.set_size(ByteSize(BLOCKS * BLOCK_BYTES as u64));
        let checkpoint = data.checkpoint();
        if log.purged().is_some_and(|purged| purged.index > checkpoint.id.index) {
            return Err("refused: the checkpoint is older than the log".into());
        }
        let last = log.last().ok_or("the log is empty")?.index.0;
        if last < checkpoint.id.index.0 || last < reference.acknowledged.get() {
            let (checkpoint, acknowledged) = (checkpoint.id.index, reference.acknowledged.get());
            return Err(format!(
                "the log ends at {last}, the checkpoint is {checkpoint}, acknowledged {acknowledged}"
            ));
        }
        if checkpoint.id.index > LogIndex::ZERO
            && checkpoint.state != format!("state {}", checkpoint.id.index)
        {
            return Err("the checkpoint's state is of another index".into());
        }
        let asked = reference.commands.take();
        let (kept, lost) = asked.split_at(last as usize);
        *reference.commands.borrow_mut() = kept.to_vec();
        let applied = Cell::new(checkpoint.id);
        let replica = Rc::new(Self { journal, log, data, applied, reference: reference.clone() });
        // INV-STAGE: a replica serves as soon as it has applied again what is known to be committed.
        let known = replica.log.committed().map_or(0, |id| id.index.0);
        let floor = known.max(checkpoint.serve_floor.0).max(checkpoint.id.index.0).min(last);
        for index in checkpoint.id.index.0 + 1..=last {
            if index == floor + 1 {
                replica.check().await.map_err(|why| format!("at its floor {floor}: {why}"))?;
            }
            let read = replica.log.read(LogIndex(index), LogIndex(index + 1), 1).await;
            let entry = read.map_err(|error| error.to_string())?.pop().ok_or("an entry is missing")?;
            replica.apply(&entry)?;
        }
        // What was applied here is committed, and comes again from others; nothing is served before that.
        let missing = checkpoint.serve_floor.0.saturating_sub(last) as usize;
        lost.iter().take(missing).for_each(|command| replica.submit(*command));
        Ok(replica)
    }

    fn apply(&self, entry: &LogEntry) -> Result<(), String> {
        let index = entry.id.index;
        if index > LogIndex::ZERO {
            let command = Command::decode(&entry.head).ok_or("a head does not decode")?;
            let range = command.range();
            match command.what {
                What::Write => {
                    let blocks = range.blocks().zip(entry.payload.chunks_exact(BLOCK_BYTES));
                    let sums: Vec<u32> = blocks.map(|(block, data)| block_checksum(block, data)).collect();
                    self.data.apply_write(index, range, &sums);
                }
                What::Zero => self.data.apply_clear(index, range, Clear::Zero),
                What::Trim => self.data.apply_clear(index, range, Clear::Trim),
                What::Snapshot => self.data.apply_snapshot(index),
                What::Drop => self.data.apply_drop_snapshot(index, LogIndex(command.start)),
                What::Restore => self.data.apply_restore(index, LogIndex(command.start)),
            }
        }
        self.applied.set(entry.id);
        Ok(())
    }

    /// Appends and applies a command. It is acknowledged when the log is flushed up to it.
    pub fn submit(&self, command: Command) {
        let index = self.log.last().map_or(0, |id| id.index.0) + 1;
        let mut payload = Vec::new();
        if command.what == What::Write {
            command.range().blocks().for_each(|block| payload.extend_from_slice(&content(index, block.0)));
        }
        let entry = LogEntry { id: id(index), kind: 1, head: command.encode(), payload: payload.into() };
        self.reference.commands.borrow_mut().push(command);
        let reference = self.reference.clone();
        let done = Box::new(move |result: Result<(), StoreError>| {
            if result.is_ok() {
                reference.acknowledged.set(index);
            }
        });
        self.log.append(vec![entry.clone()], done);
        self.apply(&entry).expect("an own command decodes");
    }

    pub fn applied(&self) -> LogIndex {
        self.applied.get().index
    }

    pub async fn flushed(&self) {
        while self.log.flushed() < self.applied.get().index && self.journal.failed().is_none() {
            holdfast_env::sleep(Duration::from_millis(1)).await;
        }
    }

    /// What the cleaner does: brings everything home, and purges the log up to there.
    pub async fn clean(&self) -> Result<(), StoreError> {
        let checkpoint = self.data.clean(self).await?;
        if checkpoint.id.index > self.log.purged().map_or(LogIndex::ZERO, |id| id.index) {
            self.log.purge(checkpoint.id).await?;
        }
        Ok(())
    }

    /// Reads every block; gives those that are called bad.
    pub async fn check(&self) -> Result<Vec<u64>, String> {
        let expected = self.reference.content(self.applied.get().index.0);
        let mut bad = Vec::new();
        for start in (0..BLOCKS).step_by(128) {
            let range = BlockRange::new(BlockIndex(start), 128);
            match self.data.read(range).await {
                Ok(data) => check_blocks(range, &data, &expected)?,
                Err(ReadError::BadBlocks(_)) => {
                    for block in range.blocks() {
                        match self.data.read(BlockRange::new(block, 1)).await {
                            Ok(data) => check_blocks(BlockRange::new(block, 1), &data, &expected)?,
                            Err(ReadError::BadBlocks(_)) => bad.push(block.0),
                            Err(error) => return Err(error.to_string()),
                        }
                    }
                }
                Err(error) => return Err(error.to_string()),
            }
        }
        Ok(bad)
    }
}

pub fn check_blocks(range: BlockRange, data: &[u8], expected: &[u64]) -> Result<(), String> {
    for (block, data) in range.blocks().zip(data.chunks_exact(BLOCK_BYTES)) {
        let index = expected[block.0 as usize];
        let wanted = if index == 0 { [0; BLOCK_BYTES] } else { content(index, block.0) };
        if data != wanted {
            let found = u64::from_le_bytes(data[..8].try_into().expect("eight bytes"));
            return Err(format!("block {} holds entry {found}, not {index}", block.0));
        }
    }
    Ok(())
}
