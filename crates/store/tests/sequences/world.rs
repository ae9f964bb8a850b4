//! One replica at work: its journal and its blocks, opened as a daemon opens them.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;
use holdfast_env::disk::Directory;
use holdfast_store::journal::{GroupLog, Journal, Recovery, StoreOptions};
use holdfast_store::volume::{
    Checkpoint, CheckpointSource, Clear, LayerMark, ReplicaFileIdentity, View, VolumeData,
};
use holdfast_store::{EntryId, LogEntry, ReplicaIdentity, StoreError, StoreIdentity};
use holdfast_types::{
    BLOCK_BYTES, BlockIndex, BlockRange, ByteSize, ClusterId, GroupId, LogIndex, NodeName, ReplicaId,
    StoreId, VolumeId, block_checksum,
};

use crate::model::{self, Acknowledged, Command, Content, Log, Model, Step, ViewName, content, entry, id};
use crate::ops::Op;

/// The operations meet at the border of two chunks, whose lines stand in different halves of a table page.
pub const FIRST: u64 = 6 * 64;
pub const A: u64 = FIRST + 63;
pub const BLOCKS: u64 = FIRST + 128;

/// Longer than what an idle journal waits before it says that its last batch was flushed.
pub const IDLE: Duration = Duration::from_millis(300);

pub const WHO: ReplicaIdentity = ReplicaIdentity { group: GroupId(9), replica: ReplicaId(1) };

pub fn store() -> StoreIdentity {
    StoreIdentity { cluster: ClusterId(1), node: NodeName::new("n"), store: StoreId(2) }
}

pub fn options() -> StoreOptions {
    StoreOptions { segment_bytes: 2 << 20, segments: 4 }
}

pub fn files() -> ReplicaFileIdentity {
    ReplicaFileIdentity {
        cluster: ClusterId(1),
        store: StoreId(2),
        node: NodeName::new("n"),
        volume: VolumeId(3),
        id: WHO,
        incarnation: 1,
    }
}

/// What a recovery found and made of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Observed {
    log: Vec<EntryId>,
    vote: Option<Bytes>,
    purged: Option<EntryId>,
    checkpoint: EntryId,
    layers: Vec<LayerMark>,
}

pub struct World {
    journal: Journal,
    log: GroupLog,
    pub data: VolumeData,
    applied: Cell<EntryId>,
    model: RefCell<Rc<Model>>,
}

/// Longer than a sector, so that it can be torn.
fn state_at(id: EntryId) -> Checkpoint {
    let state = Bytes::from(format!("state {} {:3000}", id.index, ""));
    Checkpoint { id, state, ..Checkpoint::default() }
}

impl CheckpointSource for World {
    fn capture(&self) -> Checkpoint {
        state_at(self.applied.get())
    }
    /// Every state of the past is known here.
    fn captured_up_to(&self, index: LogIndex) -> Option<Checkpoint> {
        let upto = index.0.min(self.applied.get().index.0);
        self.model().committed.borrow().get(&upto).map(|(id, _)| state_at(*id))
    }
}

/// Starts an operation now, so that its place in line is that of the model, and lets it end by itself.
fn start(mut work: LocalBoxFuture<'static, ()>) {
    let waker = std::task::Waker::noop();
    if work.as_mut().poll(&mut std::task::Context::from_waker(waker)).is_pending() {
        holdfast_env::spawn("operation", work);
    }
}

impl World {
    pub fn model(&self) -> Rc<Model> {
        self.model.borrow().clone()
    }

    /// Opens the replica as a daemon does, and checks what it finds against the model.
    pub async fn recover(directory: Rc<dyn Directory>, model: &Rc<Model>) -> Result<Rc<Self>, String> {
        let opened = Journal::open(directory.clone(), &store(), &options()).await;
        let (journal, mut groups) = opened.map_err(|error| error.to_string())?;
        let group = groups.pop().ok_or("the log is gone")?;
        if group.state != Recovery::Clean || group.vote_lost || journal.doubt() {
            return Err(format!("the log is {:?}", group.state));
        }
        let log = group.log;
        let found = read_log(&log).await?;
        model.check_purged(&log.purged())?;
        model.check_vote(&log.vote())?;
        model.check_log(&found, log.purged())?;
        let opened = VolumeData::open(directory, &files(), Rc::new(log.clone())).await;
        let data = opened.map_err(|error| error.to_string())?;
        data.set_size(ByteSize(BLOCKS * BLOCK_BYTES as u64));
        let applied = Cell::new(data.checkpoint().id);
        let world = Rc::new(Self { journal, log, data, applied, model: RefCell::new(model.clone()) });
        world.check_checkpoint()?;
        world.repeat(&found)?;
        Ok(world)
    }

    fn check_checkpoint(&self) -> Result<(), String> {
        let checkpoint = self.data.checkpoint();
        let index = checkpoint.id.index.0;
        let model = self.model();
        if index < model.cleaned.get() || self.log.purged().is_some_and(|id| id.index.0 > index) {
            let (cleaned, purged) = (model.cleaned.get(), self.log.purged());
            return Err(format!("the checkpoint is {index}; answered was {cleaned}, purged {purged:?}"));
        }
        let known = model.committed.borrow().get(&index).map(|(id, _)| *id);
        // The one that a replica is made with has no state.
        let state = if index == 0 { checkpoint.state.clone() } else { state_at(checkpoint.id).state };
        if (index > 0 && known != Some(checkpoint.id)) || checkpoint.state != state {
            return Err(format!("the checkpoint {:?} was never made", checkpoint.id));
        }
        if self.log.last().is_none_or(|last| last.index.0 < index) {
            return Err(format!("the log ends at {:?}, the checkpoint is {index}", self.log.last()));
        }
        Ok(())
    }

    /// Applies what is committed, and takes from others what may not be missing.
    fn repeat(self: &Rc<Self>, found: &Log) -> Result<(), String> {
        let model = self.model();
        let committed = model.committed.borrow().clone();
        let from = self.applied.get().index.0 + 1;
        for (index, (id, command)) in committed.range(from..) {
            if found.get(index).map(|(id, _)| id) != Some(id) {
                break;
            }
            self.apply(*id, *command);
        }
        let floor = self.data.checkpoint().serve_floor.0;
        if floor > self.applied.get().index.0 {
            self.catch_up(floor);
        }
        Ok(())
    }

    /// As a follower does: what the others do not have is cut, and what it misses is appended, up to an index.
    fn catch_up(self: &Rc<Self>, upto: u64) {
        let applied = self.applied.get().index.0;
        if self.log.last().is_some_and(|last| last.index.0 > applied) {
            let log = self.log.clone();
            start(Box::pin(async move { drop(log.truncate_after(Some(LogIndex(applied))).await) }));
        }
        let committed = self.model().committed.borrow().clone();
        for (id, command) in committed.range(applied + 1..=upto).map(|(_, entry)| *entry) {
            self.log.append(vec![entry(id, command)], Box::new(drop));
            self.apply(id, command);
        }
    }

    fn apply(&self, id: EntryId, command: Command) {
        match command {
            Command::Nothing => {}
            Command::Write { .. } => {
                let blocks = command.range().blocks();
                let sums: Vec<u32> =
                    blocks.map(|block| block_checksum(block, &content(id, block.0))).collect();
                self.data.apply_write(id.index, command.range(), &sums);
            }
            Command::Trim { .. } => self.data.apply_clear(id.index, command.range(), Clear::Trim),
            Command::Snapshot => self.data.apply_snapshot(id.index),
            Command::Drop { snapshot } => self.data.apply_drop_snapshot(id.index, LogIndex(snapshot)),
            Command::Restore { snapshot } => self.data.apply_restore(id.index, LogIndex(snapshot)),
        }
        self.applied.set(id);
    }

    /// Reads every block of the two chunks, in the volume and in each living snapshot (INV-LAYER).
    pub async fn check(&self) -> Result<(), String> {
        let views = self.model().views(self.applied.get().index.0);
        let ends: Vec<_> = self.data.layers().into_iter().map(|layer| layer.frozen).collect();
        let living = views.keys().map(|of| of.snapshot());
        if !living.clone().eq(ends.iter().copied()) {
            return Err(format!("layers end at {ends:?}, views are {:?}", living.collect::<Vec<_>>()));
        }
        for (of, expected) in &views {
            self.check_view(*of, expected).await.map_err(|why| format!("view {of:?}: {why}"))?;
        }
        Ok(())
    }

    async fn check_view(&self, of: ViewName, expected: &Content) -> Result<(), String> {
        let view = of.snapshot().map_or(View::Head, View::Snapshot);
        let range = BlockRange::new(BlockIndex(FIRST), (BLOCKS - FIRST) as u32);
        let data = self.data.read_view(view, range).await.map_err(|error| error.to_string())?.data;
        for (block, found) in (FIRST..).zip(data.chunks_exact(BLOCK_BYTES)) {
            let id = expected.get(&block);
            let wanted = id.map_or([0; BLOCK_BYTES], |id| content(*id, block));
            if found != wanted {
                let number =
                    |at: usize| u64::from_le_bytes(found[at..at + 8].try_into().expect("eight bytes"));
                return Err(format!(
                    "block {block} holds (term, index) {:?}, not {id:?}",
                    (number(0), number(8))
                ));
            }
        }
        Ok(())
    }

    /// Nothing is left to merge: as many pieces and files as layers.
    pub fn check_merged(&self) -> Result<(), String> {
        let (pieces, layers) = (self.data.pieces(), self.data.layers().len());
        if pieces == layers { Ok(()) } else { Err(format!("{pieces} pieces of {layers} layers")) }
    }

    pub async fn observe(&self) -> Result<Observed, String> {
        let log = read_log(&self.log).await?;
        Ok(Observed {
            log: log.values().map(|(id, _)| *id).collect(),
            vote: self.log.vote(),
            purged: self.log.purged(),
            checkpoint: self.data.checkpoint().id,
            layers: self.data.layers(),
        })
    }

    /// What is there now is what counts; the next entries are of a new term.
    pub async fn rebase(&self) -> Result<(), String> {
        let log = read_log(&self.log).await?;
        let before = self.model();
        let model = Model::of(&log, self.log.vote(), self.log.purged(), before.term.get() + 1);
        let applied = self.applied.get().index.0;
        let committed = before.committed.borrow();
        *model.committed.borrow_mut() = committed.range(..=applied).map(|(k, v)| (*k, *v)).collect();
        drop(committed);
        model.cleaned.set(self.data.checkpoint().id.index.0);
        *self.model.borrow_mut() = Rc::new(model);
        Ok(())
    }

    /// Appends a command; what is committed is applied at once, with everything before it.
    fn submit(&self, command: Command, is_committed: bool) {
        let model = self.model();
        let id = id(model.term.get(), self.log.last().map_or(0, |id| id.index.0) + 1);
        let flag = Acknowledged::default();
        model.steps.borrow_mut().push((Step::Append(id, command), flag.clone()));
        self.log.append(vec![entry(id, command)], Box::new(move |result| flag.set(result.is_ok())));
        if !is_committed {
            return;
        }
        let from = self.applied.get().index.0 + 1;
        for index in from..=id.index.0 {
            // Entries are known by the steps that appended them; the newest of an index counts.
            let steps = model.steps.borrow();
            let newest = steps.iter().rev().find_map(|(step, _)| match step {
                Step::Append(id, command) if id.index.0 == index => Some((*id, *command)),
                _ => None,
            });
            let Some((id, command)) = newest else { continue };
            model.committed.borrow_mut().insert(index, (id, command));
            self.apply(id, command);
        }
        self.log.note_committed(id);
    }

    /// Starts an operation; only a flush is waited for.
    pub async fn play(self: &Rc<Self>, op: Op) {
        let model = self.model();
        match op {
            Op::WriteA => self.submit(Command::Write { start: A, count: 1 }, true),
            Op::WriteAB => self.submit(Command::Write { start: A, count: 2 }, true),
            Op::TrimA => self.submit(Command::Trim { start: A, count: 1 }, true),
            Op::Snapshot => self.submit(Command::Snapshot, true),
            Op::Drop => self.with_snapshot(|living| living.last(), |snapshot| Command::Drop { snapshot }),
            Op::DropOldest => {
                self.with_snapshot(|living| living.first(), |snapshot| Command::Drop { snapshot });
            }
            Op::Restore => {
                self.with_snapshot(|living| living.last(), |snapshot| Command::Restore { snapshot });
            }
            Op::Append => self.submit(Command::Write { start: A, count: 1 }, false),
            Op::Truncate => {
                let keep = self.applied.get().index;
                let flag = Acknowledged::default();
                model.steps.borrow_mut().push((Step::TruncateFrom(keep.0 + 1), flag.clone()));
                model.term.set(model.term.get() + 1);
                let log = self.log.clone();
                self.begin(async move { flag.set(log.truncate_after(Some(keep)).await.is_ok()) });
            }
            Op::Flush => self.settle().await,
            Op::Clean => {
                let cleaned = self.clone().clean_and_merge();
                self.begin(async move { cleaned.await.expect("nothing goes wrong") });
            }
            Op::Purge => {
                let upto = self.data.checkpoint().id;
                if self.log.entry_id(upto.index) == Some(upto) {
                    let flag = Acknowledged::default();
                    model.purges.borrow_mut().push((upto, flag.clone()));
                    let log = self.log.clone();
                    self.begin(async move { flag.set(log.purge(upto).await.is_ok()) });
                }
            }
            Op::Vote => {
                let vote = Bytes::from(format!("vote {}", model.votes.borrow().len()));
                let flag = Acknowledged::default();
                model.votes.borrow_mut().push((vote.clone(), flag.clone()));
                let log = self.log.clone();
                self.begin(async move { flag.set(log.save_vote(vote).await.is_ok()) });
            }
        }
    }

    /// What is to be merged by an older checkpoint is tried first: what no checkpoint has seen may not be.
    async fn clean_and_merge(self: Rc<Self>) -> Result<(), StoreError> {
        let model = self.model();
        self.data.merge_step().await?;
        let made = self.data.clean(&*self).await?;
        model.cleaned.set(model.cleaned.get().max(made.id.index.0));
        while self.data.merge_step().await? {}
        Ok(())
    }

    /// Nothing happens where no snapshot lives.
    fn with_snapshot(&self, which: fn(&[u64]) -> Option<&u64>, command: fn(u64) -> Command) {
        let views = self.model().views(self.applied.get().index.0);
        let living: Vec<u64> = views.keys().filter_map(|of| of.snapshot()).map(|index| index.0).collect();
        if let Some(snapshot) = which(&living) {
            self.submit(command(*snapshot), true);
        }
    }

    fn begin(&self, work: impl Future<Output = ()> + 'static) {
        let running = self.model().running.clone();
        running.set(running.get() + 1);
        start(Box::pin(async move {
            work.await;
            running.set(running.get() - 1);
        }));
    }

    /// Waits until everything has ended.
    pub async fn settle(&self) {
        let model = self.model();
        let busy = || {
            let steps = model.steps.borrow();
            model.running.get() > 0 || steps.iter().any(|(_, flag)| !flag.get())
        };
        while busy() && self.journal.failed().is_none() {
            holdfast_env::sleep(Duration::from_millis(1)).await;
        }
    }
}

/// Reads every entry; each is the one that its identity stands for.
async fn read_log(log: &GroupLog) -> Result<Log, String> {
    let first = log.purged().map_or(0, |id| id.index.0 + 1);
    let end = log.last().map_or(0, |id| id.index.0 + 1);
    let mut out = Log::new();
    for index in first..end {
        let read = log.read(LogIndex(index), LogIndex(index + 1), 1).await;
        let [found] = <[LogEntry; 1]>::try_from(read.map_err(|error| error.to_string())?)
            .map_err(|read| format!("entry {index} is {} entries", read.len()))?;
        let command = Command::of(&found).ok_or("a head does not decode")?;
        if found != model::entry(found.id, command) {
            return Err(format!("entry {index} reads as something else"));
        }
        out.insert(index, (found.id, command));
    }
    Ok(out)
}
