//! What the guests saw, and whether a disk could have behaved so: linearizability of every block.
//!
//! An operation on several blocks is one on each of them, with the same beginning and end. A write whose outcome the
//! guest does not know may have happened at any time until a session of a newer epoch was attached, or never: after
//! that it must not show itself, and it must not come and go. So one check holds everything that is promised: no
//! acknowledged write is lost, no read is stale, no write of an older epoch counts after a newer one was attached.
//!
//! That a session was attached shows itself by its operations only, and the first of them ends after the lease of the
//! former holder. So until then that one may read what was before a write of its own that nobody has acknowledged; and
//! what is demanded is an order in which no write of an older epoch comes after an operation of a newer one.
//!
//! The check is exact. It walks a block's events in order and keeps every state that some order of the operations
//! under way allows; when none is left, the history is impossible.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};
use holdfast_types::{BLOCK_BYTES, BlockRange, Epoch};

use crate::mix;

/// What a block holds: the stamp of a write, or zeros.
pub type Stamp = u64;
const ZEROS: Stamp = 0;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum What {
    Write(Stamp),
    Read(Stamp),
}

/// When a moment was, and its place among all moments.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Moment {
    order: u64,
    /// Microseconds since the beginning, for people.
    pub at: u64,
}

#[derive(Clone, Debug)]
struct Operation {
    node: u64,
    epoch: Epoch,
    range: BlockRange,
    /// Per block; empty for a read that has no answer.
    what: Vec<What>,
    began: Moment,
    /// When it was known to have happened.
    acknowledged: Option<Moment>,
    /// A write of unknown outcome cannot happen after this.
    not_after: Option<Moment>,
}

/// Names an operation.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct OperationId(usize);

#[derive(Default)]
struct Inner {
    operations: Vec<Operation>,
    order: u64,
    stamp: Stamp,
    /// Writes that are not known to have happened.
    open: BTreeSet<OperationId>,
    /// Nodes whose reads may be stale.
    distrusted: BTreeSet<u64>,
}

/// Everything that guests did.
#[derive(Default)]
pub struct History(Mutex<Inner>);

/// The content of a block for a stamp: every word tells block, stamp and place.
fn content(block: u64, stamp: Stamp) -> [u8; BLOCK_BYTES] {
    let mut data = [0; BLOCK_BYTES];
    if stamp != ZEROS {
        let base = mix(mix(block) ^ stamp.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        for (place, word) in data.chunks_exact_mut(8).enumerate() {
            let value = if place == 0 { stamp } else { base ^ (place as u64) };
            word.copy_from_slice(&value.to_le_bytes());
        }
    }
    data
}

/// The stamp that a block carries in front.
pub fn stamp_of(data: &[u8]) -> Stamp {
    let mut first = [0; 8];
    first.copy_from_slice(&data[..8]);
    u64::from_le_bytes(first)
}

impl Inner {
    fn moment(&mut self, at: u64) -> Moment {
        self.order += 1;
        Moment { order: self.order, at }
    }
    fn begin(&mut self, at: u64, node: u64, epoch: Epoch, range: BlockRange, what: Vec<What>) -> OperationId {
        let began = self.moment(at);
        let id = OperationId(self.operations.len());
        let operation = Operation { node, epoch, range, what, began, acknowledged: None, not_after: None };
        self.operations.push(operation);
        id
    }
}

impl History {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A write begins; the data to write.
    pub fn write(&self, at: u64, node: u64, epoch: Epoch, range: BlockRange) -> (OperationId, Bytes) {
        let mut inner = self.inner();
        let mut data = BytesMut::with_capacity(range.count as usize * BLOCK_BYTES);
        let mut what = Vec::with_capacity(range.count as usize);
        for block in range.blocks() {
            inner.stamp += 1;
            data.extend_from_slice(&content(block.0, inner.stamp));
            what.push(What::Write(inner.stamp));
        }
        let id = inner.begin(at, node, epoch, range, what);
        inner.open.insert(id);
        (id, data.freeze())
    }

    /// A trim or zero begins.
    pub fn clear(&self, at: u64, node: u64, epoch: Epoch, range: BlockRange) -> OperationId {
        let mut inner = self.inner();
        let id = inner.begin(at, node, epoch, range, vec![What::Write(ZEROS); range.count as usize]);
        inner.open.insert(id);
        id
    }

    /// A write, trim or zero was acknowledged.
    pub fn acknowledged(&self, at: u64, id: OperationId) {
        let mut inner = self.inner();
        let moment = inner.moment(at);
        inner.operations[id.0].acknowledged = Some(moment);
        inner.open.remove(&id);
    }

    /// A read begins.
    pub fn read(&self, at: u64, node: u64, epoch: Epoch, range: BlockRange) -> OperationId {
        self.inner().begin(at, node, epoch, range, Vec::new())
    }

    /// A read was answered; what is wrong with the data by itself, if anything is.
    pub fn answered(&self, at: u64, id: OperationId, data: &[u8]) -> Result<(), String> {
        let mut inner = self.inner();
        let moment = inner.moment(at);
        let last = inner.stamp;
        let operation = &mut inner.operations[id.0];
        let expected = operation.range.count as usize * BLOCK_BYTES;
        if data.len() != expected {
            return Err(format!("a read of {expected} bytes was answered with {}", data.len()));
        }
        let mut what = Vec::with_capacity(operation.range.count as usize);
        for (block, data) in operation.range.blocks().zip(data.chunks_exact(BLOCK_BYTES)) {
            let stamp = stamp_of(data);
            if stamp > last || *data != content(block.0, stamp) {
                return Err(format!("block {} holds what nobody wrote there (stamp {stamp})", block.0));
            }
            what.push(What::Read(stamp));
        }
        operation.what = what;
        operation.acknowledged = Some(moment);
        Ok(())
    }

    /// A session of `epoch` is attached: no write of an older one counts from here on.
    pub fn attached(&self, at: u64, epoch: Epoch) {
        self.attached_again(at, epoch, &[]);
    }

    /// As [`Self::attached`], but for writes of older sessions that this one sends again under their numbers.
    pub fn attached_again(&self, at: u64, epoch: Epoch, again: &[OperationId]) {
        let mut inner = self.inner();
        let moment = inner.moment(at);
        let older = |id: &OperationId| inner.operations[id.0].epoch < epoch && !again.contains(id);
        let older: Vec<OperationId> = inner.open.iter().copied().filter(older).collect();
        for id in again {
            inner.operations[id.0].epoch = epoch;
        }
        for id in older {
            inner.operations[id.0].not_after = Some(moment);
            inner.open.remove(&id);
        }
    }

    /// Reads of this node may be stale: its clock keeps no bound, and leases rest on that. They must still show what
    /// was once written there, and everything else counts as ever.
    pub fn allow_stale_reads(&self, node: u64) {
        self.inner().distrusted.insert(node);
    }

    /// The first stamp of a write; zeros of everything else.
    pub fn stamp(&self, id: OperationId) -> Stamp {
        match self.inner().operations[id.0].what.first() {
            Some(What::Write(stamp)) => *stamp,
            _ => ZEROS,
        }
    }

    /// Blocks that were ever written, in order.
    pub fn blocks(&self) -> Vec<u64> {
        let inner = self.inner();
        let written = inner.operations.iter().filter(|o| matches!(o.what.first(), Some(What::Write(_))));
        let blocks: BTreeSet<u64> =
            written.flat_map(|operation| operation.range.blocks().map(|block| block.0)).collect();
        blocks.into_iter().collect()
    }

    /// The write that a stamp is of, for people.
    pub fn who_wrote(&self, stamp: Stamp) -> String {
        let inner = self.inner();
        let writer = inner.operations.iter().enumerate().find(|(_, o)| o.what.contains(&What::Write(stamp)));
        match writer {
            Some((number, o)) if stamp != ZEROS => format!(
                "stamp {stamp}, #{number} by n{} epoch {} at {:.6} s, {}",
                o.node,
                o.epoch,
                o.began.at as f64 / 1e6,
                if o.acknowledged.is_some() { "acknowledged" } else { "outcome unknown" }
            ),
            _ => "zeros".to_owned(),
        }
    }

    /// Acknowledged operations, and writes whose outcome stayed unknown.
    pub fn counts(&self) -> (usize, usize) {
        let inner = self.inner();
        let done = inner.operations.iter().filter(|o| o.acknowledged.is_some()).count();
        let unknown = inner
            .operations
            .iter()
            .filter(|o| o.acknowledged.is_none() && matches!(o.what.first(), Some(What::Write(_))));
        (done, unknown.count())
    }

    /// Whether a disk could have behaved so; else what shows that it could not.
    pub fn check(&self) -> Result<(), String> {
        let inner = self.inner();
        let mut by_block: BTreeMap<u64, Vec<Event>> = BTreeMap::new();
        let newer = inner.first_shown();
        for (number, operation) in inner.operations.iter().enumerate() {
            let may_be_stale = inner.distrusted.contains(&operation.node);
            for (block, what) in operation.range.blocks().zip(&operation.what) {
                if may_be_stale && matches!(what, What::Read(_)) {
                    continue;
                }
                let events = by_block.entry(block.0).or_default();
                let epoch = operation.epoch;
                events.push(Event {
                    order: operation.began.order,
                    number,
                    epoch,
                    what: *what,
                    step: Step::Began,
                });
                let shown = operation.not_after.and_then(|_| shown_by(&newer, operation.epoch));
                // The former holder may go on, in vain.
                let shown = shown.map(|shown| shown.max(operation.began));
                let end = match (operation.acknowledged, shown) {
                    // An acknowledgement that came after a newer session showed itself: it happened before that.
                    (Some(at), shown) => Some((shown.map_or(at, |shown| shown.min(at)), Step::Happened)),
                    (None, Some(shown)) => Some((shown, Step::Expired)),
                    (None, None) => None,
                };
                if let Some((at, step)) = end {
                    events.push(Event { order: at.order, number, epoch, what: *what, step });
                }
            }
        }
        for (block, mut events) in by_block {
            events.sort_by_key(|event| (event.order, event.number));
            if let Err(event) = check_block(&events) {
                return Err(inner.explain(block, &events, &event));
            }
        }
        Ok(())
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    Began,
    /// It must have happened by now.
    Happened,
    /// If it has not happened by now, it never does.
    Expired,
}

#[derive(Clone, Copy, Debug)]
struct Event {
    order: u64,
    number: usize,
    epoch: Epoch,
    what: What,
    step: Step,
}

/// When an epoch newer than this one had first shown itself, on any block.
fn shown_by(shown: &BTreeMap<Epoch, Moment>, epoch: Epoch) -> Option<Moment> {
    shown.range((Bound::Excluded(epoch), Bound::Unbounded)).map(|(_, at)| *at).min()
}

/// Operations under way at once on one block, at most.
const UNDER_WAY_MAX: usize = 64;

/// A state that is possible.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Possible {
    /// What the block holds.
    value: Stamp,
    /// Which of the operations under way have happened.
    happened: u64,
    /// The newest epoch of which anything has happened: no write of an older one does any more.
    newest: Epoch,
}

impl Possible {
    fn after(self, place: usize, operation: &UnderWay) -> Self {
        let value = match operation.what {
            What::Write(stamp) | What::Read(stamp) => stamp,
        };
        Self { value, happened: self.happened | 1 << place, newest: self.newest.max(operation.epoch) }
    }
}

#[derive(Clone, Copy)]
struct UnderWay {
    number: usize,
    epoch: Epoch,
    what: What,
}

struct Walk {
    under_way: Vec<Option<UnderWay>>,
    /// Those under way that may never happen.
    optional: u64,
    possible: BTreeSet<Possible>,
}

impl Walk {
    /// Operations that have not happened in a state, and could.
    fn open(&self, state: Possible) -> impl Iterator<Item = (usize, &UnderWay)> {
        let all = self.under_way.iter().enumerate();
        let all = all.filter_map(|(place, operation)| Some((place, operation.as_ref()?)));
        all.filter(move |(place, operation)| {
            let could = match operation.what {
                What::Write(_) => operation.epoch >= state.newest,
                What::Read(stamp) => stamp == state.value,
            };
            could && state.happened & (1 << place) == 0
        })
    }

    /// Reads that see what they answered may happen at once where that rules nothing out.
    fn with_reads(&self, mut state: Possible) -> Possible {
        let oldest =
            self.open(state).filter(|(_, o)| matches!(o.what, What::Write(_))).map(|(_, o)| o.epoch).min();
        let reads = self.open(state).filter(|(_, o)| matches!(o.what, What::Read(_)));
        let free = reads.filter(|(_, o)| oldest.is_none_or(|oldest| o.epoch <= oldest.max(state.newest)));
        let free: Vec<(usize, UnderWay)> = free.map(|(place, operation)| (place, *operation)).collect();
        for (place, operation) in free {
            state = state.after(place, &operation);
        }
        state
    }

    /// Whether whatever may follow one state may follow the other, too: what need not happen at all is still open there.
    fn covers(&self, one: &Possible, other: &Possible) -> bool {
        let same = one.value == other.value && (one.happened ^ other.happened) & !self.optional == 0;
        same && one.happened & !other.happened == 0 && one.newest <= other.newest
    }

    /// Every state that operations under way may lead to, but for those that another one covers.
    fn spread(&mut self) {
        let mut pending: Vec<Possible> = self.possible.iter().map(|state| self.with_reads(*state)).collect();
        let mut all: BTreeSet<Possible> = pending.iter().copied().collect();
        while let Some(state) = pending.pop() {
            for (place, operation) in self.open(state) {
                let next = self.with_reads(state.after(place, operation));
                if !all.iter().any(|known| self.covers(known, &next)) {
                    all.insert(next);
                    pending.push(next);
                }
            }
        }
        self.possible = all;
    }

    fn place_of(&self, number: usize) -> Option<usize> {
        self.under_way.iter().position(|operation| operation.is_some_and(|other| other.number == number))
    }
}

fn check_block(events: &[Event]) -> Result<(), Event> {
    let start = Possible { value: ZEROS, happened: 0, newest: Epoch(0) };
    let ended = events.iter().filter(|event| event.step == Step::Happened);
    let required: BTreeSet<usize> = ended.map(|event| event.number).collect();
    let mut walk = Walk { under_way: Vec::new(), optional: 0, possible: BTreeSet::from([start]) };
    for event in events {
        if event.step == Step::Began {
            let free = walk.under_way.iter().position(Option::is_none);
            let place = free.unwrap_or(walk.under_way.len());
            if place >= UNDER_WAY_MAX {
                return Err(*event);
            }
            if place == walk.under_way.len() {
                walk.under_way.push(None);
            }
            if !required.contains(&event.number) {
                walk.optional |= 1 << place;
            }
            walk.under_way[place] =
                Some(UnderWay { number: event.number, epoch: event.epoch, what: event.what });
            continue;
        }
        let Some(place) = walk.place_of(event.number) else { return Err(*event) };
        walk.spread();
        let bit = 1 << place;
        let kept = walk
            .possible
            .iter()
            .filter(|state| event.step == Step::Expired || state.happened & bit != 0)
            .map(|state| Possible { happened: state.happened & !bit, ..*state });
        walk.possible = kept.collect();
        walk.under_way[place] = None;
        walk.optional &= !bit;
        if walk.possible.is_empty() {
            return Err(*event);
        }
    }
    Ok(())
}

impl Inner {
    /// Per epoch, the end of the first operation that ended.
    fn first_shown(&self) -> BTreeMap<Epoch, Moment> {
        let mut first: BTreeMap<Epoch, Moment> = BTreeMap::new();
        for operation in self.operations.iter().filter(|operation| !operation.what.is_empty()) {
            let is_read = matches!(operation.what.first(), Some(What::Read(_)));
            let Some(at) = operation.acknowledged else { continue };
            if is_read && self.distrusted.contains(&operation.node) {
                continue;
            }
            first.entry(operation.epoch).and_modify(|known| *known = at.min(*known)).or_insert(at);
        }
        first
    }

    fn explain(&self, block: u64, events: &[Event], at: &Event) -> String {
        let place = events.iter().position(|event| event.order == at.order && event.number == at.number);
        let upto = place.unwrap_or(0);
        let mut lines = vec![format!("block {block} behaves as no disk may; its last events:")];
        for event in &events[upto.saturating_sub(16)..=upto] {
            let operation = &self.operations[event.number];
            let at = match event.step {
                Step::Began => Some(operation.began),
                Step::Happened => operation.acknowledged,
                Step::Expired => operation.not_after,
            };
            lines.push(format!(
                "  {:>12.6} s  n{} epoch {} #{} {:?} {:?}",
                at.map_or(0.0, |moment| moment.at as f64 / 1e6),
                operation.node,
                operation.epoch,
                event.number,
                event.what,
                event.step
            ));
        }
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use holdfast_types::BlockIndex;

    const BLOCK: BlockRange = BlockRange { start: BlockIndex(5), count: 1 };
    const OLD: Epoch = Epoch(1);
    const NEW: Epoch = Epoch(2);

    fn read(history: &History, at: u64, epoch: Epoch, data: &[u8]) {
        let id = history.read(at, 1, epoch, BLOCK);
        history.answered(at + 1, id, data).expect("a well-formed block");
    }

    #[test]
    fn concurrent_operations_may_have_happened_in_either_order() {
        let history = History::default();
        let (a, first) = history.write(1, 1, OLD, BLOCK);
        let (b, second) = history.write(2, 1, OLD, BLOCK);
        read(&history, 3, OLD, &second);
        read(&history, 4, OLD, &first);
        history.acknowledged(8, a);
        history.acknowledged(9, b);
        assert_eq!(history.check(), Ok(()));
        read(&history, 10, OLD, &second);
        assert!(history.check().is_err(), "it was overwritten before");
    }

    #[test]
    fn a_lost_and_a_stale_block_are_noticed() {
        let history = History::default();
        let (a, first) = history.write(1, 1, OLD, BLOCK);
        history.acknowledged(2, a);
        let (b, _) = history.write(3, 1, OLD, BLOCK);
        read(&history, 4, OLD, &first);
        assert_eq!(history.check(), Ok(()));
        history.acknowledged(8, b);
        read(&history, 9, OLD, &first);
        assert!(history.check().is_err());
    }

    #[test]
    fn only_reads_may_be_stale_where_that_is_allowed() {
        let history = History::default();
        history.allow_stale_reads(1);
        let (a, first) = history.write(1, 1, OLD, BLOCK);
        history.acknowledged(2, a);
        let (b, _) = history.write(3, 1, OLD, BLOCK);
        history.acknowledged(4, b);
        read(&history, 5, OLD, &first);
        assert_eq!(history.check(), Ok(()));
        let id = history.read(6, 2, OLD, BLOCK);
        history.answered(7, id, &first).expect("a well-formed block");
        assert!(history.check().is_err(), "a write was lost");
    }

    #[test]
    fn a_write_of_unknown_outcome_may_show_itself_until_the_next_epoch_and_never_later() {
        let history = History::default();
        let (_, unknown) = history.write(1, 1, OLD, BLOCK);
        read(&history, 2, OLD, &[0; BLOCK_BYTES]);
        history.attached(3, NEW);
        assert_eq!(history.check(), Ok(()));
        read(&history, 4, NEW, &unknown);
        assert_eq!(history.check(), Ok(()));
        let late = History::default();
        let (_, unknown) = late.write(1, 1, OLD, BLOCK);
        late.attached(3, NEW);
        read(&late, 4, NEW, &[0; BLOCK_BYTES]);
        assert_eq!(late.check(), Ok(()));
        read(&late, 6, NEW, &unknown);
        assert!(late.check().is_err(), "it landed late");
    }

    #[test]
    fn a_former_holder_may_read_what_was_before_its_own_write_that_nobody_acknowledged() {
        let history = History::default();
        let (a, data) = history.write(1, 1, OLD, BLOCK);
        history.attached(3, NEW);
        let by_new = history.read(4, 2, NEW, BLOCK);
        read(&history, 5, OLD, &[0; BLOCK_BYTES]);
        history.acknowledged(7, a);
        history.answered(8, by_new, &data).expect("a well-formed block");
        assert_eq!(history.check(), Ok(()));
        read(&history, 9, OLD, &[0; BLOCK_BYTES]);
        assert!(history.check().is_err(), "it is acknowledged now");
    }

    #[test]
    fn once_a_newer_epoch_has_done_anything_the_former_holder_reads_nothing_stale() {
        let history = History::default();
        let (_, data) = history.write(1, 1, OLD, BLOCK);
        history.attached(3, NEW);
        let elsewhere = BlockRange { start: BlockIndex(9), count: 1 };
        let (b, _) = history.write(4, 2, NEW, elsewhere);
        history.acknowledged(5, b);
        read(&history, 6, OLD, &[0; BLOCK_BYTES]);
        assert_eq!(history.check(), Ok(()), "it may never have happened");
        read(&history, 8, NEW, &data);
        assert!(history.check().is_err(), "the lease had ended, or it landed late");
    }

    #[test]
    fn nothing_of_an_older_epoch_comes_after_what_a_newer_one_has_done() {
        let history = History::default();
        let (_, unknown) = history.write(1, 1, OLD, BLOCK);
        history.attached(3, NEW);
        let (b, _) = history.write(4, 2, NEW, BLOCK);
        history.acknowledged(5, b);
        // The session before is attached still, and sees its own write over the newer one.
        read(&history, 6, OLD, &unknown);
        assert!(history.check().is_err(), "it landed late");
    }

    #[test]
    fn what_a_former_holder_begins_after_that_never_happens() {
        let history = History::default();
        history.attached(1, NEW);
        let (a, _) = history.write(2, 2, NEW, BLOCK);
        history.acknowledged(3, a);
        let (_, late) = history.write(4, 1, OLD, BLOCK);
        history.attached(5, Epoch(3));
        assert_eq!(history.check(), Ok(()));
        read(&history, 6, Epoch(3), &late);
        assert!(history.check().is_err());
    }

    #[test]
    fn what_was_trimmed_may_be_written_and_trimmed_again() {
        let history = History::default();
        let a = history.clear(1, 1, OLD, BLOCK);
        let (b, data) = history.write(2, 1, OLD, BLOCK);
        read(&history, 3, OLD, &data);
        let c = history.clear(4, 1, OLD, BLOCK);
        history.acknowledged(5, a);
        history.acknowledged(6, b);
        history.acknowledged(7, c);
        read(&history, 8, OLD, &[0; BLOCK_BYTES]);
        assert_eq!(history.check(), Ok(()));
    }
}
