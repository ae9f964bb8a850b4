//! What groups did, and what of it a recovery may find.
//!
//! The reference knows, per group, the order in which log operations were asked for and which of them were
//! acknowledged. A recovered log must be the state after some prefix of them that includes every acknowledged one;
//! votes and purges may overtake the log, and never go back behind what was acknowledged.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use bytes::Bytes;
use holdfast_store::journal::{GroupLog, RecoveredGroup, Recovery};
use holdfast_store::{EntryId, LogEntry, ReplicaIdentity, StoreError};
use holdfast_types::{BLOCK_BYTES, GroupId, LogIndex, ReplicaId, Term};

/// Set when something was acknowledged.
pub type Acknowledged = Rc<Cell<bool>>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogStep {
    Append(EntryId),
    TruncateFrom(u64),
}

#[derive(Default)]
pub struct GroupModel {
    pub created: Acknowledged,
    pub dropping: Option<Acknowledged>,
    /// The log as it was found at the start of this life.
    base: BTreeMap<u64, EntryId>,
    pub steps: Vec<(LogStep, Acknowledged)>,
    pub votes: Vec<(Bytes, Acknowledged)>,
    pub purges: Vec<(EntryId, Acknowledged)>,
    pub committed: u64,
    pub term: u64,
}

pub type Groups = Rc<RefCell<BTreeMap<ReplicaIdentity, GroupModel>>>;

pub fn who(group: u64) -> ReplicaIdentity {
    ReplicaIdentity { group: GroupId(100 + u128::from(group)), replica: ReplicaId(1) }
}

pub fn id(term: u64, index: u64) -> EntryId {
    EntryId { term: Term(term), leader: ReplicaId(term % 3 + 1), index: LogIndex(index) }
}

/// What begins every payload block, so that a damaged block says whose it was.
pub const PAYLOAD_MARK: &[u8] = b"payload ";

/// The one entry that an identity stands for.
pub fn entry(who: ReplicaIdentity, id: EntryId) -> LogEntry {
    let name = format!("{} {} {}", who.group, id.term, id.index);
    let mixed = id.index.0.wrapping_mul(0x9e37_79b9).wrapping_add(id.term.0 * 77) >> 3;
    let blocks = [0, 1, 0, 2, 250, 1, 256, 40][mixed as usize % 8];
    let head = if mixed % 13 == 5 { format!("{name} {}", "h".repeat(3000)) } else { name.clone() };
    let mut payload = Vec::with_capacity(blocks * BLOCK_BYTES);
    for n in 0..blocks {
        let start = payload.len();
        payload.extend_from_slice(PAYLOAD_MARK);
        payload.extend_from_slice(format!("{name} {n};").as_bytes());
        payload.resize(start + BLOCK_BYTES, mixed as u8);
    }
    LogEntry { id, kind: 1, head: head.into(), payload: payload.into() }
}

impl GroupModel {
    fn apply(log: &mut BTreeMap<u64, EntryId>, step: LogStep) {
        match step {
            LogStep::Append(id) => {
                log.insert(id.index.0, id);
            }
            LogStep::TruncateFrom(from) => {
                log.split_off(&from);
            }
        }
    }

    pub fn all_acknowledged(&self) -> bool {
        self.created.get()
            && self.dropping.as_ref().is_none_or(|flag| flag.get())
            && self.steps.iter().all(|(_, flag)| flag.get())
            && self.votes.iter().all(|(_, flag)| flag.get())
            && self.purges.iter().all(|(_, flag)| flag.get())
    }

    /// What may be found of something of which the last counts.
    fn candidates<T: Clone + PartialEq>(issued: &[(T, Acknowledged)]) -> Vec<Option<T>> {
        let last = issued.iter().rposition(|(_, flag)| flag.get());
        let mut out: Vec<Option<T>> =
            issued[last.unwrap_or(0)..].iter().map(|(t, _)| Some(t.clone())).collect();
        if last.is_none() {
            out.push(None);
        }
        out
    }

    fn check_log(&self, log: &GroupLog) -> Result<(), String> {
        let purged = log.purged();
        let allowed = Self::candidates(&self.purges);
        if !allowed.contains(&purged) {
            return Err(format!("purged up to {purged:?}, allowed were {allowed:?}"));
        }
        let vote = log.vote();
        let allowed = Self::candidates(&self.votes);
        if !allowed.contains(&vote) {
            return Err(format!("the vote is {vote:?}, allowed were {allowed:?}"));
        }
        let first = purged.map_or(0, |id| id.index.0 + 1);
        let mut found = BTreeMap::new();
        let end = log.last().map_or(0, |id| id.index.0 + 1);
        for index in first..end {
            let id = log.entry_id(LogIndex(index)).ok_or(format!("entry {index} is not in the log"))?;
            found.insert(index, id);
        }
        let needed = self.steps.iter().rposition(|(_, flag)| flag.get()).map_or(0, |last| last + 1);
        let mut state = self.base.clone();
        let mut closest = String::new();
        for n in 0..=self.steps.len() {
            if n > 0 {
                Self::apply(&mut state, self.steps[n - 1].0);
            }
            let kept: BTreeMap<u64, EntryId> = state.range(first..).map(|(k, v)| (*k, *v)).collect();
            if n >= needed && kept == found {
                return Ok(());
            }
            if n == needed {
                closest = format!("{:?}", kept.iter().map(|(k, v)| (*k, v.term.0)).collect::<Vec<_>>());
            }
        }
        let found: Vec<_> = found.iter().map(|(k, v)| (*k, v.term.0)).collect();
        Err(format!("the log holds (index, term) {found:?}; acknowledged was at least {closest}"))
    }

    /// Takes what was found for what is.
    fn rebase(&mut self, log: &GroupLog) {
        let yes = || Rc::new(Cell::new(true));
        let first = log.purged().map_or(0, |id| id.index.0 + 1);
        let end = log.last().map_or(0, |id| id.index.0 + 1);
        self.base = (first..end).filter_map(|n| Some((n, log.entry_id(LogIndex(n))?))).collect();
        self.steps.clear();
        self.votes = log.vote().map(|vote| (vote, yes())).into_iter().collect();
        self.purges = log.purged().map(|id| (id, yes())).into_iter().collect();
        self.created = yes();
        self.dropping = None;
        let last = self.base.values().next_back().map_or(0, |id| id.term.0);
        self.term = self.term.max(last) + 1;
    }
}

/// Reads every entry of a log: each is the one that was appended, or refuses because it is damaged.
async fn check_entries(group: &RecoveredGroup, faulty: &[EntryId]) -> Result<(), String> {
    let log = &group.log;
    let first = log.purged().map_or(0, |id| id.index.0 + 1);
    let end = log.last().map_or(0, |id| id.index.0 + 1);
    for index in first..end {
        let expected = log.entry_id(LogIndex(index)).ok_or("an entry is missing")?;
        match log.read(LogIndex(index), LogIndex(index + 1), 1).await {
            Ok(read) if read == [entry(group.id, expected)] => {
                if faulty.contains(&expected) {
                    return Err(format!("entry {index} is good and was called faulty"));
                }
            }
            Ok(_) => return Err(format!("entry {index} reads as something else")),
            Err(StoreError::Damaged { .. } | StoreError::Io { .. }) if faulty.contains(&expected) => {}
            Err(error) => return Err(format!("entry {index}: {error}")),
        }
    }
    Ok(())
}

/// Checks what was recovered, then takes it for what is. With `damaged`, a group may say that it is faulty or unknown;
/// then nothing else is asked of it but that it says which.
pub async fn check(
    groups: &Groups,
    recovered: &[RecoveredGroup],
    damaged: bool,
) -> Result<Vec<(ReplicaIdentity, Recovery)>, String> {
    for found in recovered.iter().filter(|found| !matches!(found.state, Recovery::Unknown(_))) {
        let none = Vec::new();
        let faulty = if let Recovery::Faulty(ids) = &found.state { ids } else { &none };
        check_entries(found, faulty).await.map_err(|why| format!("group {}: {why}", found.id.group))?;
    }
    let mut out = Vec::new();
    let mut models = groups.borrow_mut();
    let issued: Vec<ReplicaIdentity> = models.keys().copied().collect();
    if let Some(stranger) = recovered.iter().find(|found| !issued.contains(&found.id)) {
        return Err(format!("group {} was never made", stranger.id.group));
    }
    let nothing_known = damaged && recovered.iter().any(|found| matches!(found.state, Recovery::Unknown(_)));
    for who in issued {
        let Some(model) = models.get_mut(&who) else { continue };
        let wrap = |why: String| format!("group {}: {why}", who.group);
        let Some(found) = recovered.iter().find(|found| found.id == who) else {
            if model.created.get() && model.dropping.is_none() && !nothing_known {
                return Err(wrap("it was made and is gone".into()));
            }
            models.remove(&who);
            continue;
        };
        let is_unknown = damaged && matches!(found.state, Recovery::Unknown(_));
        if model.dropping.as_ref().is_some_and(|flag| flag.get()) && !is_unknown {
            return Err(wrap("it was dropped and is back".into()));
        }
        match &found.state {
            Recovery::Unknown(_) if damaged => {}
            Recovery::Unknown(why) => return Err(wrap(format!("unknown: {why}"))),
            Recovery::Faulty(ids) if !damaged => return Err(wrap(format!("faulty: {ids:?}"))),
            state => {
                if found.vote_lost {
                    return Err(wrap("its vote is called lost".into()));
                }
                let none = Vec::new();
                let faulty = if let Recovery::Faulty(ids) = state { ids } else { &none };
                model.check_log(&found.log).map_err(wrap)?;
                let known = faulty.iter().all(|id| found.log.entry_id(id.index) == Some(*id));
                if !known {
                    return Err(wrap(format!("faulty entries {faulty:?} are not in the log")));
                }
                let committed = found.log.committed().map_or(0, |id| id.index.0);
                if committed > model.committed {
                    return Err(wrap(format!("{committed} is committed, {} was said", model.committed)));
                }
            }
        }
        model.rebase(&found.log);
        out.push((who, found.state.clone()));
    }
    Ok(out)
}
