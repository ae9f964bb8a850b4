//! Writing batches, and reusing segments.

mod place;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use holdfast_env::Instant;
use holdfast_env::disk::{ALIGNMENT, Durability};

use super::format::{self, List, Record};
use super::group::{Done, Meta};
use super::levels::{self, RESERVE_FOR_ROOM, RESERVE_FOR_STATE};
use super::{HUNG_AFTER, Journal, planted, segment_name};
use crate::{EntryId, ReplicaIdentity, StoreError};
use place::{Moved, Placed};

/// Batches under way at once: one is written while the next gathers.
const IN_FLIGHT_MAX: usize = 2;
/// Largest batch, in bytes of payload.
const BATCH_BYTES_MAX: usize = 2 << 20;
/// Largest batch, in records.
const BATCH_RECORDS_MAX: usize = 4096;
/// Blocks of a batch without records. The last segment keeps two of them: one for saying that others are free, one for
/// a closing mark.
const DECLARATION_BLOCKS: u32 = 2;
/// What leaves a segment must leave one of so many parts of it free, or of one behind it.
const VACATED_PARTS: u64 = 4;
/// Blocks that are left for other urgent records when a segment is vacated.
const KEPT_BLOCKS: u64 = 32;
/// After so much idleness a closing mark says that the last batch was flushed.
const CLOSING_MARK_AFTER: Duration = Duration::from_millis(100);

pub(super) struct Queued {
    record: Record,
    payload: Bytes,
    done: Option<Done>,
    /// The segment that the entry leaves with this copy (`vacate.rs`).
    leaves: Option<usize>,
}

/// Segments and bytes of payload there.
type Superseded = Vec<(usize, u32)>;

struct InFlight {
    seq: u64,
    since: Instant,
    ended: bool,
    entries: Vec<(ReplicaIdentity, EntryId)>,
    /// Segments with payloads that this batch writes again, and their bytes.
    superseded: Superseded,
    /// Entries that this batch moves out of a segment.
    moved: Vec<Moved>,
    done: Vec<Done>,
}

#[derive(Clone, Copy, Debug)]
struct FreeSegment {
    number: usize,
    /// It may be overwritten once this batch, which no longer counts on it, is durable.
    after: u64,
}

#[derive(Clone, Debug, Default)]
struct Segment {
    /// First batch in it.
    first_seq: u64,
    /// Entries with payload that are still needed.
    live: u64,
    /// Bytes of their payload.
    live_bytes: u64,
    /// Entries without payload that were removed, while the record that removes them is not durable: a recovery
    /// before that still needs them.
    leaving: u64,
}

/// Where the journal stands.
pub(super) struct State {
    queue: VecDeque<Queued>,
    /// Payload in the queue, and votes and truncations in it.
    queue_bytes: u64,
    queue_states: usize,
    urgent: VecDeque<Queued>,
    in_flight: VecDeque<InFlight>,
    next_seq: u64,
    last: (u64, u32),
    flushed: u64,
    head: usize,
    head_block: u32,
    segment_blocks: u32,
    /// In use, oldest first; the last one is the head.
    used: VecDeque<usize>,
    free: VecDeque<FreeSegment>,
    segments: Vec<Segment>,
    /// Batches that recovery found never to have been acknowledged.
    cut: Option<(u64, u64)>,
    marked: u64,
    life: u32,
    /// A closing mark is being waited for.
    marking: bool,
    copying: bool,
    /// Bytes that were copied out of segments since anything was last purged or cut.
    vacated: u64,
    /// There was no room for the line when it was last looked at.
    blocked: bool,
    /// Bounds of the table (`levels.rs`) that it has passed.
    level: usize,
}

/// What recovery hands over.
pub(super) struct Start {
    pub(super) next_seq: u64,
    pub(super) last: (u64, u32),
    pub(super) head: usize,
    pub(super) head_block: u32,
    pub(super) segment_blocks: u32,
    /// Segments in use, oldest first, each with its first batch.
    pub(super) used: Vec<(usize, u64)>,
    pub(super) segments: usize,
    pub(super) cut: Option<(u64, u64)>,
    /// The last batch, if it is a mark that names every batch before it as flushed.
    pub(super) marked: u64,
}

impl State {
    pub(super) fn new(start: Start) -> Self {
        let mut segments = vec![Segment::default(); start.segments];
        for (number, first_seq) in &start.used {
            segments[*number].first_seq = *first_seq;
        }
        let used: VecDeque<usize> = start.used.iter().map(|(number, _)| *number).collect();
        let unused = (0..start.segments).filter(|number| !used.contains(number));
        let free = unused.map(|number| FreeSegment { number, after: 0 }).collect();
        Self {
            queue: VecDeque::new(),
            queue_bytes: 0,
            queue_states: 0,
            urgent: VecDeque::new(),
            in_flight: VecDeque::new(),
            next_seq: start.next_seq,
            last: start.last,
            flushed: start.last.0,
            head: start.head,
            head_block: start.head_block,
            segment_blocks: start.segment_blocks,
            used,
            free,
            segments,
            cut: start.cut,
            marked: start.marked,
            life: holdfast_env::random_u64() as u32,
            marking: false,
            copying: false,
            vacated: 0,
            blocked: false,
            level: 0,
        }
    }

    /// When the oldest batch that is not durable was handed to the disk.
    pub(super) fn oldest_batch(&self) -> Option<Instant> {
        self.in_flight.front().map(|batch| batch.since)
    }
    pub(super) fn used_segments(&self) -> usize {
        self.used.len()
    }
    pub(super) fn used_percent(&self) -> u32 {
        (self.used.len().saturating_sub(1) * 100 / self.segments.len()) as u32
    }
    /// Bytes of what the line may fill that are taken. Segments that nobody needs are free, whether they have been taken
    /// back already or not.
    pub(super) fn line_taken(&self) -> u64 {
        let is_needed = |number: &usize| {
            let segment = &self.segments[*number];
            segment.live + segment.leaving > 0
        };
        let behind_head = self.used.iter().take(self.used.len().saturating_sub(1));
        let needed = behind_head.skip_while(|number| !is_needed(number)).count() as u64;
        let block = ALIGNMENT as u64;
        needed * u64::from(self.segment_blocks) * block + u64::from(self.head_block) * block
    }
    /// Notes how far the line has come; whether it has passed another bound of the table since.
    fn passed_level(&mut self) -> bool {
        let line = levels::line_segments(self.segments.len()) as u64;
        let whole = line * u64::from(self.segment_blocks) * ALIGNMENT as u64;
        let percent = (self.line_taken() * 100 / whole) as u32;
        let level = levels::BOUNDS.iter().filter(|bound| percent >= **bound).count();
        std::mem::replace(&mut self.level, level) < level
    }
    /// Whether what stands in line waits for room.
    pub(super) fn line_waits(&self) -> bool {
        self.blocked && !self.queue.is_empty()
    }
    pub(super) fn add_live(&mut self, segment: usize, bytes: u32) {
        self.segments[segment].live += 1;
        self.segments[segment].live_bytes += u64::from(bytes);
    }
    fn remove_live(&mut self, segment: usize, bytes: u32) {
        self.segments[segment].live -= 1;
        self.segments[segment].live_bytes -= u64::from(bytes);
    }
    /// Entries were removed in memory.
    pub(super) fn leave(&mut self, removed: &[Meta]) {
        for place in removed.iter().filter(|meta| meta.payload_bytes == 0).filter_map(|meta| meta.place) {
            self.segments[place.segment].leaving += 1;
        }
    }
    /// Their removal is durable.
    pub(super) fn release(&mut self, removed: &[Meta]) {
        self.vacated = 0;
        for meta in removed {
            let Some(place) = meta.place else { continue };
            if meta.payload_bytes > 0 {
                self.remove_live(place.segment, meta.payload_bytes);
            } else {
                self.segments[place.segment].leaving -= 1;
            }
        }
    }

    /// Whether to copy so many bytes of payload and of records, all that is left in the oldest segment, gains room:
    /// there or in a segment behind it is something that nobody needs; and they fit into what may be written now.
    pub(super) fn gains_by_vacating(&self, tail: usize, payload: u64, records: u64) -> bool {
        let whole = u64::from(self.segment_blocks) * ALIGNMENT as u64;
        let is_sparse = |number: &usize| {
            let most = whole / VACATED_PARTS * (VACATED_PARTS - 1);
            *number != self.head && self.segments[*number].live_bytes <= most
        };
        let batches = payload / BATCH_BYTES_MAX as u64 + 2;
        let lists = 2 * (records + batches * ALIGNMENT as u64);
        let needed = payload + lists + KEPT_BLOCKS * ALIGNMENT as u64;
        let room = self.usable() as u64 * whole;
        // One lap is enough until something else has changed.
        let is_in_vain = self.vacated > whole * self.segments.len() as u64;
        tail != self.head && needed <= room && !is_in_vain && self.used.iter().any(is_sparse)
    }
    pub(super) fn note_vacated(&mut self, bytes: u64) {
        self.vacated += bytes;
    }
    pub(super) fn set_copying(&mut self, copying: bool) {
        self.copying = copying;
    }

    fn oldest(&self) -> u64 {
        self.used.front().map_or(self.next_seq, |tail| self.segments[*tail].first_seq)
    }

    /// Payload that stands in line.
    pub(super) fn waiting_bytes(&self) -> u64 {
        self.queue_bytes
    }

    fn count(&mut self, queued: &Queued, coming: bool) {
        let bytes = queued.payload.len() as u64;
        let state = usize::from(matches!(queued.record, Record::State(..)));
        if coming {
            self.queue_bytes += bytes;
            self.queue_states += state;
        } else {
            self.queue_bytes -= bytes;
            self.queue_states -= state;
        }
    }

    /// Records that stand in line.
    pub(super) fn waiting_records(&self) -> u64 {
        (self.queue.len() + self.urgent.len()) as u64
    }

    /// Segments that may be written now.
    fn usable(&self) -> usize {
        self.free.iter().filter(|free| free.after <= self.flushed).count()
    }

    /// Free segments that the line may not touch, now that it is made up as it is.
    fn reserve_of_line(&self) -> usize {
        if planted("no-reserve") {
            return 0;
        }
        if self.usable() > RESERVE_FOR_ROOM + RESERVE_FOR_STATE {
            return RESERVE_FOR_ROOM;
        }
        let state_waits = self.queue_states > 0;
        if state_waits { RESERVE_FOR_ROOM } else { levels::kept_segments(self.segments.len()) }
    }

    /// Takes the next segment; `false` if none may be taken now.
    fn next_segment(&mut self) -> bool {
        let keep = if self.urgent.is_empty() { self.reserve_of_line() } else { 0 };
        self.usable() > keep && self.take_segment()
    }

    fn take_segment(&mut self) -> bool {
        let at = self.free.iter().position(|free| free.after <= self.flushed);
        let Some(free) = at.and_then(|at| self.free.remove(at)) else { return false };
        self.head = free.number;
        self.head_block = 0;
        self.segments[free.number] = Segment { first_seq: self.next_seq, ..Segment::default() };
        self.used.push_back(free.number);
        true
    }

    /// Whether an empty batch should say that segments are free: what stands in line may wait for nothing else.
    fn may_declare(&mut self) -> bool {
        let cooling = self.free.iter().any(|free| free.after > self.flushed);
        if !cooling || !self.in_flight.is_empty() {
            return false;
        }
        self.segment_blocks - self.head_block >= DECLARATION_BLOCKS || self.take_segment()
    }

    /// Records for one batch that fits into what is left of the head segment.
    fn gather(&mut self) -> Vec<Queued> {
        let usable = self.usable();
        let kept = if usable == 0 { 2 * DECLARATION_BLOCKS } else { 0 };
        let room = (self.segment_blocks - self.head_block).saturating_sub(kept) as usize * ALIGNMENT;
        let mut taken = Vec::new();
        let (mut payload, mut list) = (0, 17);
        let fits =
            |payload: usize, list: usize| List::blocks_for(list) as usize * 2 * ALIGNMENT + payload <= room;
        // A head segment that was taken out of the reserve stays reserved.
        let line_may_write = usable >= self.reserve_of_line();
        for urgent in [true, false] {
            if !urgent && !line_may_write {
                break;
            }
            loop {
                let source = if urgent { &mut self.urgent } else { &mut self.queue };
                let Some(next) = source.front() else { break };
                let (p, l) = (payload + next.payload.len(), list + format::record_bytes(&next.record));
                if taken.len() >= BATCH_RECORDS_MAX
                    || (p > BATCH_BYTES_MAX && !taken.is_empty())
                    || !fits(p, l)
                {
                    break;
                }
                (payload, list) = (p, l);
                let Some(queued) = source.pop_front() else { break };
                if !urgent {
                    self.count(&queued, false);
                }
                taken.push(queued);
            }
        }
        taken
    }
}

struct Batch {
    seq: u64,
    segment: usize,
    offset: u64,
    buffer: holdfast_env::disk::AlignedBuffer,
    payload_bytes: u64,
}

impl Journal {
    pub(super) fn log_recovered(&self) {
        let state = self.0.state.borrow();
        tracing::info!(
            store = %self.0.identity.store,
            used = state.used.len(),
            segments = state.segments.len(),
            head_block = state.head_block,
            segment_blocks = state.segment_blocks,
            live_in_oldest = state.used.front().map_or(0, |tail| state.segments[*tail].live),
            "the journal is open"
        );
    }

    pub(super) fn enqueue(&self, record: Record, payload: Bytes, done: Option<Done>) {
        let queued = Queued { record, payload, done, leaves: None };
        let mut state = self.0.state.borrow_mut();
        state.count(&queued, true);
        state.queue.push_back(queued);
    }

    /// Takes what a dropped group still has in line, and tells who waits for it.
    pub(super) fn forget_queued(&self, who: ReplicaIdentity) {
        let mut taken = Vec::new();
        {
            let mut state = self.0.state.borrow_mut();
            let state = &mut *state;
            for line in [&mut state.queue, &mut state.urgent] {
                let (theirs, rest): (Vec<_>, Vec<_>) =
                    line.drain(..).partition(|queued| queued.record.who() == Some(who));
                line.extend(rest);
                taken.push(theirs);
            }
            taken[0].iter().for_each(|queued| state.count(queued, false));
        }
        for done in taken.into_iter().flatten().filter_map(|queued| queued.done) {
            done(Err(StoreError::Failed("the group was dropped".into())));
        }
        self.0.shorter.notify_waiters();
        self.admit_waiting();
    }

    /// For records that make room: they may take the reserve, and overtake what waits for room.
    pub(super) fn enqueue_urgent(&self, record: Record, done: Option<Done>) {
        self.enqueue_copy(record, Bytes::new(), None, done);
    }

    /// The same for an entry that leaves a segment with its payload.
    pub(super) fn enqueue_copy(
        &self,
        record: Record,
        payload: Bytes,
        leaves: Option<usize>,
        done: Option<Done>,
    ) {
        self.0.state.borrow_mut().urgent.push_back(Queued { record, payload, done, leaves });
    }

    /// Starts as many batches as may be under way.
    pub(super) fn kick(&self) {
        while self.failed().is_none() {
            let Some(batch) = self.next_batch() else { return };
            self.write_batch(batch);
        }
    }

    /// Hands a batch to the disk.
    fn write_batch(&self, batch: Batch) {
        let file = self.0.files[batch.segment].clone();
        let journal = self.clone();
        let mut usage = self.0.usage.get();
        usage.flushes += 1;
        usage.bytes_written += batch.buffer.len() as u64;
        usage.payload_bytes_written += batch.payload_bytes;
        self.0.usage.set(usage);
        let (began, bytes) = (Instant::now(), batch.buffer.len());
        let skipped = planted("skip-journal-flush");
        let durability = if skipped { Durability::Volatile } else { Durability::Durable };
        let write = file.write_at(batch.offset, batch.buffer, durability);
        holdfast_env::spawn("journal-batch", async move {
            match write.await {
                Ok(_) => {
                    let now = Instant::now();
                    let took = now.since(began);
                    journal.0.flush_latency.borrow_mut().record(took);
                    journal.0.recent_flushes.borrow_mut().record(now, took);
                    let alone = journal.0.cleaning.borrow().is_idle_since(began);
                    journal.0.foreground.borrow_mut().batch(bytes, took, alone, now);
                    if took > HUNG_AFTER {
                        tracing::warn!(store = %journal.0.identity.store, ?took, "the disk hung, and has answered");
                    }
                    journal.completed(batch.seq);
                }
                Err(_) if planted("failed-write-counts") => journal.completed(batch.seq),
                Err(error) => journal.fail(&StoreError::io(segment_name(batch.segment as u32), &error)),
            }
        });
    }

    /// Makes the next batch, if there is something to write and room for it.
    fn next_batch(&self) -> Option<Batch> {
        let mut state = self.0.state.borrow_mut();
        if state.in_flight.len() >= IN_FLIGHT_MAX || (state.queue.is_empty() && state.urgent.is_empty()) {
            return None;
        }
        let mut taken = state.gather();
        if taken.is_empty() {
            let next = state.next_segment();
            drop(state);
            if next {
                self.0.changed.notify_waiters();
            }
            self.reclaim();
            state = self.0.state.borrow_mut();
            taken = state.gather();
            if taken.is_empty() && !next && !state.may_declare() {
                if !std::mem::replace(&mut state.blocked, true) {
                    drop(state);
                    self.0.changed.notify_waiters();
                }
                return None;
            }
        }
        state.blocked = false;
        let batch = self.build(&mut state, taken);
        // Who keeps something in the journal may wait for nothing else: a head segment that fills slowly.
        if state.passed_level() {
            self.0.changed.notify_waiters();
        }
        Some(batch)
    }

    fn build(&self, state: &mut State, taken: Vec<Queued>) -> Batch {
        let seq = state.next_seq;
        state.next_seq += 1;
        let mut records = Vec::with_capacity(taken.len() + 1);
        if let Some((from, to)) = state.cut.take().filter(|_| !planted("forget-cut")) {
            records.push(Record::Cut { from, to });
        }
        let mut payloads = Vec::new();
        let mut done = Vec::new();
        // Records that only move an entry, by their place in the list.
        let mut moves = BTreeSet::new();
        for queued in taken {
            done.extend(queued.done);
            let Some(record) = self.as_of_now(queued.record, queued.leaves) else { continue };
            if queued.leaves.is_some() {
                moves.insert(records.len());
            }
            records.push(record);
            if !queued.payload.is_empty() {
                payloads.push(queued.payload);
            }
        }
        let list = List {
            store: self.0.identity.store,
            segment: state.head as u32,
            start_block: state.head_block,
            list_blocks: 0,
            total_blocks: 0,
            seq,
            previous: state.last.0,
            previous_crc: state.last.1,
            flushed: state.flushed,
            oldest: state.oldest(),
            life: state.life,
            records,
            crc: 0,
        };
        let (list, buffer, offsets) = format::make_batch(list, &payloads, self.0.salt);
        let start = u64::from(state.head_block) * ALIGNMENT as u64;
        let Placed { entries, superseded, moved } = self.place(state, &list, start, &offsets, &moves);
        state.last = (seq, list.crc);
        state.head_block += list.total_blocks;
        let segment = state.head;
        let since = Instant::now();
        state.in_flight.push_back(InFlight { seq, since, ended: false, entries, superseded, moved, done });
        let payload_bytes = payloads.iter().map(|payload| payload.len() as u64).sum();
        Batch { seq, segment, offset: start, buffer, payload_bytes }
    }

    /// A group's state as it is now: what makes room overtakes what stands in line, and an older state that was
    /// written after a newer one would bring back a purged position or an earlier vote. A copy of an entry that was
    /// removed since is not written: behind the truncation it would bring the entry back.
    fn as_of_now(&self, record: Record, leaves: Option<usize>) -> Option<Record> {
        let groups = self.0.groups.borrow();
        match record {
            Record::State(who, queued) => {
                let now = groups.get(&who)?.borrow().state_to_write(queued.truncate_from);
                Some(Record::State(who, now))
            }
            Record::Entry(who, entry) => {
                let group = groups.get(&who)?.borrow();
                let meta = group.get(entry.id.index).filter(|meta| meta.id == entry.id);
                // What stands elsewhere by now was repaired there: an older copy behind it would undo that.
                let at =
                    meta.filter(|meta| meta.durable).and_then(|meta| meta.place).map(|place| place.segment);
                if leaves.is_some() && at != leaves && !planted("copy-undoes-repair") {
                    return None;
                }
                let is_there = meta.is_some();
                // Behind the word that the group was dropped it would outlive that word.
                let still = is_there || !entry.copy || planted("copy-what-was-cut");
                let counts = !group.state.dropped && still;
                counts.then_some(Record::Entry(who, entry))
            }
            other => Some(other),
        }
    }

    /// A batch is on stable storage. What it holds is durable once every batch before it is (INV-ACK).
    fn completed(&self, seq: u64) {
        let mut finished = Vec::new();
        {
            let mut state = self.0.state.borrow_mut();
            if let Some(batch) = state.in_flight.iter_mut().find(|batch| batch.seq == seq) {
                batch.ended = true;
            }
            if planted("acknowledge-out-of-order")
                && let Some(at) = state.in_flight.iter().position(|batch| batch.seq == seq)
            {
                finished.extend(state.in_flight.remove(at));
            }
            while state.in_flight.front().is_some_and(|batch| batch.ended) {
                let Some(batch) = state.in_flight.pop_front() else { break };
                state.flushed = batch.seq;
                finished.push(batch);
            }
        }
        self.0.shorter.notify_waiters();
        let mut gives_back = false;
        for batch in finished {
            {
                let mut state = self.0.state.borrow_mut();
                gives_back |= !batch.superseded.is_empty() || !batch.moved.is_empty();
                batch.superseded.iter().for_each(|(segment, bytes)| state.remove_live(*segment, *bytes));
            }
            batch.moved.iter().for_each(|moved| self.moved(moved));
            {
                let groups = self.0.groups.borrow();
                for (who, id) in &batch.entries {
                    if let Some(group) = groups.get(who) {
                        group.borrow_mut().made_durable(*id);
                    }
                }
            }
            for done in batch.done {
                done(Ok(()));
            }
        }
        if gives_back {
            self.reclaim();
        }
        self.kick();
        self.admit_waiting();
        self.close_when_idle();
    }

    /// Stops the store for good. Whatever waits is told; nothing is tried again.
    pub(super) fn fail(&self, error: &StoreError) {
        if self.failed().is_some() {
            return;
        }
        tracing::error!(store = %self.0.identity.store, %error, "the store has stopped");
        *self.0.failed.borrow_mut() = Some(error.clone());
        let mut waiting: Vec<Done> = Vec::new();
        {
            let mut state = self.0.state.borrow_mut();
            waiting.extend(state.in_flight.drain(..).flat_map(|batch| batch.done));
            waiting.extend(state.urgent.drain(..).filter_map(|queued| queued.done));
            waiting.extend(state.queue.drain(..).filter_map(|queued| queued.done));
            (state.queue_bytes, state.queue_states) = (0, 0);
        }
        for done in waiting {
            done(Err(error.clone()));
        }
        self.0.changed.notify_waiters();
        self.0.shorter.notify_waiters();
        self.admit_waiting();
    }

    /// Says, some time after the last batch, that it was flushed: a later rot of it is then no torn tail.
    pub(super) fn close_when_idle(&self) {
        if self.0.state.borrow().marking || self.is_marked() || self.failed().is_some() {
            return;
        }
        self.0.state.borrow_mut().marking = true;
        let journal = self.downgrade();
        holdfast_env::spawn("journal-mark", async move {
            let mut last = 0;
            loop {
                {
                    let Some(journal) = journal.upgrade().map(Journal) else { return };
                    let now = journal.0.state.borrow().last.0;
                    if journal.is_marked() || journal.failed().is_some() || (now == last && journal.is_idle())
                    {
                        journal.0.state.borrow_mut().marking = false;
                        return journal.write_mark();
                    }
                    last = now;
                }
                holdfast_env::sleep(CLOSING_MARK_AFTER).await;
            }
        });
    }

    /// Whether everything that was written is named as flushed: no later rot of it is taken for a torn tail.
    pub fn is_marked(&self) -> bool {
        let state = self.0.state.borrow();
        state.marked == state.last.0
    }

    /// Nothing is being written. What stands in line then waits for room, which may take long.
    fn is_idle(&self) -> bool {
        self.0.state.borrow().in_flight.is_empty()
    }

    fn write_mark(&self) {
        if self.is_marked() || self.failed().is_some() || planted("no-closing-mark") {
            return;
        }
        let batch = {
            let mut state = self.0.state.borrow_mut();
            // The rest of a segment out of the reserve stays with those that it is reserved for.
            if state.segment_blocks - state.head_block < 2 * DECLARATION_BLOCKS && !state.take_segment() {
                return;
            }
            // The mark is a batch of its own; none follows it.
            state.marked = state.next_seq;
            self.build(&mut state, Vec::new())
        };
        self.write_batch(batch);
    }

    /// Frees the oldest segments that nothing needs, while few are free. What is small and still needed is written
    /// again first, so that no idle group pins a segment.
    pub(super) fn reclaim(&self) {
        loop {
            let tail = {
                let state = self.0.state.borrow();
                let enough = state.free.len() * 2 > state.segments.len();
                let Some(tail) = state.used.front().copied() else { return };
                let needed = state.segments[tail].live + state.segments[tail].leaving > 0;
                if enough || tail == state.head || state.copying {
                    return;
                }
                if needed {
                    drop(state);
                    return self.vacate(tail);
                }
                tail
            };
            let needed = if planted("small-records-left") { Vec::new() } else { self.small_records_in(tail) };
            let mut state = self.0.state.borrow_mut();
            if needed.is_empty() {
                state.used.pop_front();
                // A batch made from now on says that nothing of this segment is counted on; the segment may be
                // overwritten once that batch is durable.
                let after = if planted("reuse-at-once") { 0 } else { state.next_seq };
                state.free.push_back(FreeSegment { number: tail, after });
                drop(state);
                self.0.changed.notify_waiters();
                continue;
            }
            state.copying = true;
            let count = needed.len();
            for (n, record) in needed.into_iter().enumerate() {
                let journal = self.downgrade();
                let done: Option<Done> = (n + 1 == count).then(|| -> Done {
                    Box::new(move |result| {
                        let Some(journal) = journal.upgrade().map(Journal) else { return };
                        journal.0.state.borrow_mut().copying = false;
                        if result.is_ok() {
                            journal.reclaim();
                            journal.kick();
                        }
                    })
                });
                state.urgent.push_back(Queued { record, payload: Bytes::new(), done, leaves: None });
            }
            return;
        }
    }

    /// Records of `segment` that are still needed and have no payload.
    fn small_records_in(&self, segment: usize) -> Vec<Record> {
        let mut out = Vec::new();
        for (who, group) in self.0.groups.borrow().iter() {
            let group = group.borrow();
            if group.state_segment == Some(segment) {
                out.push(Record::State(*who, group.state_to_write(None)));
            }
            for meta in &group.entries {
                if meta.payload_bytes == 0 && meta.place.is_some_and(|place| place.segment == segment) {
                    out.push(Record::Entry(*who, meta.record(group.committed_and_flushed(), true)));
                }
            }
        }
        out
    }
}
