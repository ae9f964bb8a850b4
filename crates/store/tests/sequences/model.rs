//! What was asked for and what of it was acknowledged; outlives the process.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use bytes::Bytes;
use holdfast_store::{EntryId, LogEntry};
use holdfast_types::{BLOCK_BYTES, BlockIndex, BlockRange, LogIndex, Reader, ReplicaId, Term, Writer};

/// Set when something was acknowledged.
pub type Acknowledged = Rc<Cell<bool>>;

/// What an entry does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    Nothing,
    Write {
        start: u64,
        count: u32,
    },
    Trim {
        start: u64,
        count: u32,
    },
    /// Named by its index.
    Snapshot,
    Drop {
        snapshot: u64,
    },
    /// Back to the newest snapshot.
    Restore {
        snapshot: u64,
    },
}

impl Command {
    pub fn range(self) -> BlockRange {
        match self {
            Self::Nothing | Self::Snapshot => BlockRange::new(BlockIndex(0), 0),
            // Written where a range begins.
            Self::Drop { snapshot } | Self::Restore { snapshot } => BlockRange::new(BlockIndex(snapshot), 0),
            Self::Write { start, count } | Self::Trim { start, count } => {
                BlockRange::new(BlockIndex(start), count)
            }
        }
    }

    fn head(self) -> Bytes {
        let mut out = Writer::new();
        out.u8(match self {
            Self::Nothing => 0,
            Self::Write { .. } => 1,
            Self::Trim { .. } => 2,
            Self::Snapshot => 3,
            Self::Drop { .. } => 4,
            Self::Restore { .. } => 5,
        });
        out.u64(self.range().start.0);
        out.u32(self.range().count);
        out.finish()
    }

    pub fn of(entry: &LogEntry) -> Option<Self> {
        let mut input = Reader::new(&entry.head);
        let (kind, start, count) = (input.u8().ok()?, input.u64().ok()?, input.u32().ok()?);
        Some(match kind {
            0 => Self::Nothing,
            1 => Self::Write { start, count },
            2 => Self::Trim { start, count },
            3 => Self::Snapshot,
            4 => Self::Drop { snapshot: start },
            _ => Self::Restore { snapshot: start },
        })
    }
}

pub fn id(term: u64, index: u64) -> EntryId {
    EntryId { term: Term(term), leader: ReplicaId(1), index: LogIndex(index) }
}

/// What an entry writes to a block.
pub fn content(id: EntryId, block: u64) -> [u8; BLOCK_BYTES] {
    let mut data = [(id.term.0 * 16 + id.index.0) as u8; BLOCK_BYTES];
    data[..8].copy_from_slice(&id.term.0.to_le_bytes());
    data[8..16].copy_from_slice(&id.index.0.to_le_bytes());
    data[16..24].copy_from_slice(&block.to_le_bytes());
    data
}

/// The one entry that an identity and a command stand for.
pub fn entry(id: EntryId, command: Command) -> LogEntry {
    let mut payload = Vec::new();
    if let Command::Write { .. } = command {
        command.range().blocks().for_each(|block| payload.extend_from_slice(&content(id, block.0)));
    }
    LogEntry { id, kind: 1, head: command.head(), payload: payload.into() }
}

#[derive(Clone, Copy, Debug)]
pub enum Step {
    Append(EntryId, Command),
    TruncateFrom(u64),
}

#[derive(Default)]
pub struct Model {
    pub steps: RefCell<Vec<(Step, Acknowledged)>>,
    pub votes: RefCell<Vec<(Bytes, Acknowledged)>>,
    pub purges: RefCell<Vec<(EntryId, Acknowledged)>>,
    /// The highest checkpoint that a cleaning pass has answered.
    pub cleaned: Cell<u64>,
    pub committed: RefCell<BTreeMap<u64, (EntryId, Command)>>,
    pub term: Cell<u64>,
    /// Operations that have not ended.
    pub running: Rc<Cell<u32>>,
}

pub type Log = BTreeMap<u64, (EntryId, Command)>;

/// What may be found of something of which the last counts.
fn candidates<T: Clone>(issued: &[(T, Acknowledged)]) -> Vec<Option<T>> {
    let last = issued.iter().rposition(|(_, flag)| flag.get());
    let mut out: Vec<Option<T>> = issued[last.unwrap_or(0)..].iter().map(|(t, _)| Some(t.clone())).collect();
    if last.is_none() {
        out.push(None);
    }
    out
}

impl Model {
    /// Of a log that was found: all of it counts from now on.
    pub fn of(log: &Log, vote: Option<Bytes>, purged: Option<EntryId>, term: u64) -> Self {
        let yes = || Rc::new(Cell::new(true));
        let model = Self::default();
        let steps = log.values().map(|(id, command)| (Step::Append(*id, *command), yes()));
        *model.steps.borrow_mut() = steps.collect();
        *model.votes.borrow_mut() = vote.map(|vote| (vote, yes())).into_iter().collect();
        *model.purges.borrow_mut() = purged.map(|id| (id, yes())).into_iter().collect();
        model.term.set(term);
        model
    }

    /// What was acknowledged so far, for telling states apart.
    pub fn acknowledged(&self) -> Vec<bool> {
        let steps = self.steps.borrow().iter().map(|(_, flag)| flag.get()).collect::<Vec<_>>();
        let votes = self.votes.borrow().iter().map(|(_, flag)| flag.get()).collect::<Vec<_>>();
        let purges = self.purges.borrow().iter().map(|(_, flag)| flag.get()).collect::<Vec<_>>();
        let cleaned = (0..64).map(|bit| self.cleaned.get() & (1 << bit) != 0).collect();
        [steps, votes, purges, cleaned].concat()
    }

    pub fn check_vote(&self, vote: &Option<Bytes>) -> Result<(), String> {
        let allowed = candidates(&self.votes.borrow());
        if allowed.contains(vote) { Ok(()) } else { Err(format!("the vote is {vote:?}, not of {allowed:?}")) }
    }

    pub fn check_purged(&self, purged: &Option<EntryId>) -> Result<(), String> {
        let allowed = candidates(&self.purges.borrow());
        if allowed.contains(purged) {
            Ok(())
        } else {
            Err(format!("purged up to {purged:?}, not one of {allowed:?}"))
        }
    }

    /// The log above what is purged must be that after some of the steps, with every one that was acknowledged.
    pub fn check_log(&self, found: &Log, purged: Option<EntryId>) -> Result<(), String> {
        let steps = self.steps.borrow();
        let needed = steps.iter().rposition(|(_, flag)| flag.get()).map_or(0, |last| last + 1);
        let first = purged.map_or(0, |id| id.index.0 + 1);
        let mut log = Log::new();
        let mut wanted = Vec::new();
        for n in 0..=steps.len() {
            match n.checked_sub(1).map(|n| steps[n].0) {
                Some(Step::Append(id, command)) => {
                    log.insert(id.index.0, (id, command));
                }
                Some(Step::TruncateFrom(from)) => {
                    log.split_off(&from);
                }
                None => {}
            }
            let kept = log.range(first..).map(|(index, entry)| (*index, *entry)).collect::<Log>();
            if n >= needed && kept == *found {
                return Ok(());
            }
            if n == needed {
                wanted = kept.into_values().map(|(id, _)| (id.term.0, id.index.0)).collect();
            }
        }
        let found: Vec<_> = found.values().map(|(id, _)| (id.term.0, id.index.0)).collect();
        Err(format!("the log holds (term, index) {found:?}; acknowledged was at least {wanted:?}"))
    }

    /// What the volume and every living snapshot show, by what was committed up to an index; the snapshots in their
    /// order, the volume last.
    pub fn views(&self, upto: u64) -> BTreeMap<ViewName, Content> {
        let (mut head, mut views) = (Content::new(), BTreeMap::new());
        for (id, command) in self.committed.borrow().range(..=upto).map(|(_, entry)| *entry) {
            match command {
                Command::Nothing => {}
                Command::Write { .. } => head.extend(command.range().blocks().map(|block| (block.0, id))),
                Command::Trim { .. } => command.range().blocks().for_each(|block| {
                    head.remove(&block.0);
                }),
                Command::Snapshot => drop(views.insert(ViewName::of(id.index.0), head.clone())),
                Command::Drop { snapshot } => drop(views.remove(&ViewName::of(snapshot))),
                Command::Restore { snapshot } => head = views[&ViewName::of(snapshot)].clone(),
            }
        }
        views.insert(ViewName::HEAD, head);
        views
    }
}

/// Who wrote each block last; blocks that hold zeros are absent.
pub type Content = BTreeMap<u64, EntryId>;

/// A snapshot by its index, or the volume, which comes last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ViewName(LogIndex);

impl ViewName {
    pub const HEAD: Self = Self(LogIndex(u64::MAX));

    pub fn of(snapshot: u64) -> Self {
        Self(LogIndex(snapshot))
    }

    pub fn snapshot(self) -> Option<LogIndex> {
        (self != Self::HEAD).then_some(self.0)
    }
}
