//! A group's part of the journal: the index of its entries in memory, and the handle that others use.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use bytes::Bytes;
use holdfast_types::{BLOCK_BYTES, LogIndex, limits};
use tokio::sync::oneshot;

use super::format::{EntryRecord, GroupState, HEAD_BYTES_MAX, Record, VOTE_BYTES_MAX};
use super::{Admitted, Beside, CleaningPass, Journal, planted};
use crate::{EntryHead, EntryId, LogEntry, ReplicaIdentity, StoreError};

/// Called once when something is on stable storage, or with why it never will be.
pub type Done = Box<dyn FnOnce(Result<(), StoreError>)>;

/// Where an entry stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) segment: usize,
    /// Byte offset of the payload in the segment.
    pub(super) offset: u64,
}

/// An entry as the index knows it.
#[derive(Clone, Debug)]
pub(super) struct Meta {
    pub(super) id: EntryId,
    pub(super) kind: u8,
    pub(super) head: Bytes,
    pub(super) payload_bytes: u32,
    pub(super) payload_crc: u32,
    /// The payload, while it is in memory. Never evicted before it is durable.
    pub(super) payload: Option<Bytes>,
    /// Where its payload stands; `None` until it is handed to the disk.
    pub(super) place: Option<Place>,
    pub(super) durable: bool,
    /// Recovery found its payload damaged, and it is not repaired yet.
    pub(super) faulty: bool,
}

impl Meta {
    pub(super) fn record(&self, committed: LogIndex, copy: bool) -> EntryRecord {
        EntryRecord {
            id: self.id,
            kind: self.kind,
            head: self.head.clone(),
            payload_bytes: self.payload_bytes,
            payload_crc: self.payload_crc,
            committed,
            copy,
            damaged: false,
        }
    }
}

/// The index of one group.
#[derive(Default)]
pub(super) struct Group {
    pub(super) state: GroupState,
    /// The segment with the newest record of the group's state.
    pub(super) state_segment: Option<usize>,
    /// Entries without gaps; the first one's index is `first`.
    pub(super) entries: VecDeque<Meta>,
    pub(super) first: u64,
    pub(super) flushed: LogIndex,
    pub(super) cached_bytes: usize,
    /// Payload of the entries, in memory or not.
    pub(super) held_bytes: u64,
    /// What is durably known to be committed, as far as it was asked for.
    pub(super) committed_kept: LogIndex,
    /// Nobody purges it: its replica does not run.
    pub(super) parked: bool,
    /// Entries before this index have no payload in memory.
    pub(super) evicted_below: u64,
    /// Entries before this index were told to be dispensable.
    pub(super) told_below: u64,
    /// Payload of those of them that are still here.
    pub(super) dispensable_bytes: u64,
}

impl Group {
    pub(super) fn last(&self) -> Option<EntryId> {
        self.entries.back().map(|meta| meta.id).or(self.state.purged)
    }
    /// What is known to be committed and may be written out of turn. What overtakes the line must not speak of entries that
    /// stand in it: after a crash it would be about those which they were to replace.
    pub(super) fn committed_and_flushed(&self) -> LogIndex {
        if planted("commit-out-of-turn") {
            self.state.committed
        } else {
            self.state.committed.min(self.flushed)
        }
    }
    /// The state as it is written, now or out of turn.
    pub(super) fn state_to_write(&self, truncate_from: Option<LogIndex>) -> GroupState {
        GroupState { truncate_from, committed: self.committed_and_flushed(), ..self.state.clone() }
    }
    pub(super) fn get(&self, index: LogIndex) -> Option<&Meta> {
        let at = index.0.checked_sub(self.first)?;
        self.entries.get(usize::try_from(at).ok()?)
    }
    pub(super) fn get_mut(&mut self, index: LogIndex) -> Option<&mut Meta> {
        let at = index.0.checked_sub(self.first)?;
        self.entries.get_mut(usize::try_from(at).ok()?)
    }

    pub(super) fn push(&mut self, meta: Meta) {
        if self.entries.is_empty() {
            self.first = meta.id.index.0;
            self.evicted_below = self.evicted_below.max(self.first);
        }
        assert_eq!(meta.id.index.0, self.first + self.entries.len() as u64, "entries have no gaps");
        self.cached_bytes += meta.payload.as_ref().map_or(0, Bytes::len);
        self.held_bytes += u64::from(meta.payload_bytes);
        self.entries.push_back(meta);
    }

    /// Drops payloads of the oldest durable entries while there are more than the bound.
    pub(super) fn evict(&mut self) {
        self.evicted_below = self.evicted_below.max(self.first);
        while self.cached_bytes > limits::LOG_TAIL_BYTES_MAX {
            let index = LogIndex(self.evicted_below);
            let Some(meta) = self.get_mut(index) else { return };
            if !meta.durable {
                return;
            }
            let freed = meta.payload.take().map_or(0, |payload| payload.len());
            self.cached_bytes -= freed;
            self.evicted_below += 1;
        }
    }

    /// Removes entries from `from` on; what was removed is given back for the accounting of segments.
    pub(super) fn truncate_from(&mut self, from: LogIndex) -> Vec<Meta> {
        let keep_count = from.0.saturating_sub(self.first).min(self.entries.len() as u64) as usize;
        let removed: Vec<Meta> = self.entries.drain(keep_count..).collect();
        self.forget(&removed);
        self.flushed = self.flushed.min(LogIndex(from.0.saturating_sub(1)));
        self.evicted_below = self.evicted_below.min(from.0);
        removed
    }

    /// Removes entries up to `upto`.
    pub(super) fn purge(&mut self, upto: EntryId) -> Vec<Meta> {
        let count = (upto.index.0 + 1).saturating_sub(self.first).min(self.entries.len() as u64) as usize;
        let removed: Vec<Meta> = self.entries.drain(..count).collect();
        self.forget(&removed);
        self.first = upto.index.0 + 1;
        self.state.purged = Some(self.state.purged.map_or(upto, |before| before.max(upto)));
        self.flushed = self.flushed.max(upto.index);
        removed
    }

    /// Payload of the entries up to `upto` that this has not been asked for before.
    fn more_dispensable(&mut self, upto: LogIndex) -> u64 {
        let (from, end) = (self.told_below.max(self.first), upto.0 + 1);
        self.told_below = self.told_below.max(end);
        let skipped = (from - self.first).min(self.entries.len() as u64) as usize;
        let count = end.saturating_sub(from).min(self.entries.len() as u64) as usize;
        let more = self.entries.iter().skip(skipped).take(count);
        let bytes = more.map(|meta| u64::from(meta.payload_bytes)).sum();
        self.dispensable_bytes += bytes;
        bytes
    }

    fn forget(&mut self, removed: &[Meta]) {
        let dispensable = removed.iter().take_while(|meta| meta.id.index.0 < self.told_below);
        self.dispensable_bytes -= dispensable.map(|meta| u64::from(meta.payload_bytes)).sum::<u64>();
        let bytes: usize = removed.iter().filter_map(|meta| meta.payload.as_ref()).map(Bytes::len).sum();
        self.cached_bytes -= bytes;
        self.held_bytes -= removed.iter().map(|meta| u64::from(meta.payload_bytes)).sum::<u64>();
    }

    /// Entries become durable in order.
    pub(super) fn made_durable(&mut self, id: EntryId) {
        if let Some(meta) = self.get_mut(id.index).filter(|meta| meta.id == id) {
            meta.durable = true;
            meta.faulty = false;
        }
        while self.get(self.flushed.next()).is_some_and(|meta| meta.durable) {
            self.flushed = self.flushed.next();
        }
        self.evict();
    }
}

/// Handle of one group's log. Cheap to clone.
#[derive(Clone)]
pub struct GroupLog {
    pub(super) journal: Journal,
    pub(super) who: ReplicaIdentity,
    pub(super) group: Rc<RefCell<Group>>,
}

impl GroupLog {
    /// Whose log it is.
    pub fn id(&self) -> ReplicaIdentity {
        self.who
    }

    /// Adds entries after the last one. They can be read at once; `done` is called when all of them are durable.
    pub fn append(&self, entries: Vec<LogEntry>, done: Done) {
        if let Some(error) = self.journal.failed() {
            return done(Err(error));
        }
        if self.group.borrow().state.dropped {
            return done(Err(StoreError::Failed("the group was dropped".into())));
        }
        let count = entries.len();
        if count == 0 {
            return done(Ok(()));
        }
        let mut done = Some(done);
        for (n, entry) in entries.into_iter().enumerate() {
            assert!(entry.head.len() <= HEAD_BYTES_MAX, "a command's head is bounded");
            assert!(entry.payload.len().is_multiple_of(BLOCK_BYTES), "payloads are whole blocks");
            let meta = Meta {
                id: entry.id,
                kind: entry.kind,
                head: entry.head,
                payload_bytes: entry.payload.len() as u32,
                payload_crc: crc32fast::hash(&entry.payload),
                payload: Some(entry.payload.clone()),
                place: None,
                durable: false,
                faulty: false,
            };
            let record = {
                let mut group = self.group.borrow_mut();
                let record = meta.record(group.state.committed, false);
                group.push(meta);
                record
            };
            let last = if n + 1 == count { done.take() } else { None };
            self.journal.enqueue(Record::Entry(self.who, record), entry.payload, last);
        }
        self.group.borrow_mut().evict();
        self.journal.kick();
    }

    /// Writes the group's state and waits until it is durable.
    async fn write_state(
        &self,
        truncate_from: Option<LogIndex>,
        urgent: bool,
        removed: Vec<Meta>,
    ) -> Result<(), StoreError> {
        let durable = self.put_state(truncate_from, urgent, removed)?;
        durable.await.unwrap_or_else(|_| Err(StoreError::Failed("the journal has stopped".into())))
    }

    /// Puts the group's state in line. Until it is durable the segments of the entries that it removes are kept,
    /// whether anybody waits or not.
    fn put_state(
        &self,
        truncate_from: Option<LogIndex>,
        urgent: bool,
        removed: Vec<Meta>,
    ) -> Result<oneshot::Receiver<Result<(), StoreError>>, StoreError> {
        if let Some(error) = self.journal.failed() {
            return Err(error);
        }
        if !self.journal.0.groups.borrow().contains_key(&self.who) {
            return Err(StoreError::Failed("the group was dropped".into()));
        }
        let state = self.group.borrow().state_to_write(truncate_from);
        let (sender, receiver) = oneshot::channel();
        self.journal.removed(&removed);
        let removed = if planted("release-at-once") {
            self.journal.released(&removed);
            Vec::new()
        } else {
            removed
        };
        let journal = self.journal.downgrade();
        let done: Done = Box::new(move |result| {
            if let (Ok(()), Some(journal)) = (&result, journal.upgrade().map(Journal)) {
                journal.released(&removed);
            }
            // The waiter was dropped with its task; the state is written all the same.
            let _ = sender.send(result);
        });
        let record = Record::State(self.who, state);
        if urgent {
            self.journal.enqueue_urgent(record, Some(done));
        } else {
            self.journal.enqueue(record, Bytes::new(), Some(done));
        }
        self.journal.kick();
        Ok(receiver)
    }

    pub(super) async fn create(&self) -> Result<(), StoreError> {
        self.write_state(None, false, Vec::new()).await
    }

    /// Drops everything. What was in line before may still be written, and counts for nothing.
    pub(super) async fn drop_all(&self) -> Result<(), StoreError> {
        let removed = {
            let mut group = self.group.borrow_mut();
            group.state.dropped = true;
            let removed = group.entries.drain(..).collect::<Vec<_>>();
            (group.cached_bytes, group.held_bytes, group.dispensable_bytes) = (0, 0, 0);
            removed
        };
        self.write_state(None, true, removed).await
    }

    /// Waits until a payload of `bytes` may be proposed (INV-ADMIT). A proposal may be committed by others long before it
    /// is durable here, so that it is over does not mean that it has left the line.
    pub async fn admit(&self, bytes: usize) -> Admitted {
        self.journal.admit(self.who, bytes).await
    }

    /// Ends when the journal can take an append of a leader elsewhere with so much payload without a long line; as the
    /// journal fills, a little later. Others may commit without this store meanwhile.
    pub async fn take_in(&self, bytes: usize) {
        self.journal.take_in(bytes).await;
    }

    /// Bytes that the line may grow by until so many percent of what it may take are in use.
    pub fn room_below(&self, percent: u32) -> u64 {
        let usage = self.journal.usage_of_line();
        (usage.1 / 100 * u64::from(percent)).saturating_sub(usage.0)
    }

    /// Bytes that are not home at which a volume is cleaned without pressure, if the journal has a say in it.
    pub fn clean_at_bytes(&self) -> u64 {
        self.journal.0.options.clean_at_bytes()
    }

    /// Whether data of a leader elsewhere is taken now: on a full medium only while the journal is rather empty.
    pub fn takes_data_of_others(&self) -> bool {
        self.journal.takes_data_of_others()
    }

    /// The reserve of the store, if there is one.
    pub fn reserve(&self) -> Option<&crate::Reserve> {
        self.journal.reserve()
    }

    /// Whether the medium below is full: see [`super::Journal::is_full`].
    pub fn is_full(&self) -> bool {
        self.journal.is_full()
    }

    /// Why the store has stopped, if it has.
    pub fn failed(&self) -> Option<StoreError> {
        self.journal.failed()
    }

    /// Whether the disk below hangs: see [`super::Journal::is_hung`].
    pub fn is_hung(&self) -> bool {
        self.journal.is_hung()
    }

    /// Writes the group's state again, as it is: whoever gets an answer knows that the disk has taken a vote's worth of
    /// writing since it asked.
    pub async fn prove_writable(&self) -> Result<(), StoreError> {
        self.write_state(None, false, Vec::new()).await
    }

    /// Keeps a vote: durable when it returns.
    pub async fn save_vote(&self, vote: Bytes) -> Result<(), StoreError> {
        assert!(vote.len() <= VOTE_BYTES_MAX, "a vote is small");
        self.group.borrow_mut().state.vote = Some(vote);
        if planted("vote-not-flushed") {
            let log = self.clone();
            holdfast_env::spawn("vote", async move { drop(log.write_state(None, false, Vec::new()).await) });
            return Ok(());
        }
        self.write_state(None, false, Vec::new()).await
    }

    /// The last vote.
    pub fn vote(&self) -> Option<Bytes> {
        self.group.borrow().state.vote.clone()
    }

    /// Notes what is committed; it goes with the next entry and is a lower bound after a restart.
    pub fn note_committed(&self, id: EntryId) {
        let mut group = self.group.borrow_mut();
        group.state.committed = group.state.committed.max(id.index);
    }

    /// Knows that everything up to `index` is committed; durable when it returns. A full journal has room for it: cleaning,
    /// which makes room, waits for this.
    pub async fn keep_committed(&self, index: LogIndex) -> Result<(), StoreError> {
        let known = {
            let mut group = self.group.borrow_mut();
            // What lies beyond is not durable here, and comes from others again.
            let known = index.min(group.flushed);
            if group.committed_kept >= known || planted("home-before-commit") {
                return Ok(());
            }
            group.state.committed = group.state.committed.max(known);
            known
        };
        self.write_state(None, true, Vec::new()).await?;
        let mut group = self.group.borrow_mut();
        group.committed_kept = group.committed_kept.max(known);
        Ok(())
    }

    /// The highest entry known to be committed, if the log still knows it.
    pub fn committed(&self) -> Option<EntryId> {
        let group = self.group.borrow();
        let index = group.state.committed.min(group.last()?.index);
        group.get(index).map(|meta| meta.id).or(group.state.purged)
    }

    /// Cuts off everything after `keep` (everything, if `None`); durable when it returns.
    pub async fn truncate_after(&self, keep: Option<LogIndex>) -> Result<(), StoreError> {
        let from = keep.map_or(LogIndex::ZERO, LogIndex::next);
        let removed = self.group.borrow_mut().truncate_from(from);
        self.write_state(Some(from), false, removed).await
    }

    /// Forgets entries up to `upto`; they never come back. Their segments may be reused.
    pub async fn purge(&self, upto: EntryId) -> Result<(), StoreError> {
        let removed = self.group.borrow_mut().purge(upto);
        self.write_state(None, true, removed).await
    }

    /// As [`Self::purge`], without waiting for the disk: a crash before it is durable brings entries back, which a
    /// checkpoint covers. Only where the log holds `upto` (otherwise false, and nothing is done): what is appended next
    /// could become durable first, and leave a gap behind entries that come back.
    pub fn purge_soon(&self, upto: EntryId) -> Result<bool, StoreError> {
        if self.entry_id(upto.index) != Some(upto) {
            return Ok(false);
        }
        let removed = self.group.borrow_mut().purge(upto);
        let _nobody_waits = self.put_state(None, true, removed)?;
        Ok(true)
    }

    /// Whether nothing was ever written to it since it was made.
    pub fn is_unused(&self) -> bool {
        self.last().is_none() && self.vote().is_none()
    }
    /// The last purged entry.
    pub fn purged(&self) -> Option<EntryId> {
        self.group.borrow().state.purged
    }
    /// The last entry, purged or not.
    pub fn last(&self) -> Option<EntryId> {
        self.group.borrow().last()
    }
    /// Payload of the entries that the log holds, in bytes.
    pub fn held_bytes(&self) -> u64 {
        self.group.borrow().held_bytes
    }
    /// Identity of an entry that the log holds.
    pub fn entry_id(&self, index: LogIndex) -> Option<EntryId> {
        self.group.borrow().get(index).map(|meta| meta.id)
    }
    /// The highest index up to which everything is durable.
    pub fn flushed(&self) -> LogIndex {
        self.group.borrow().flushed
    }

    /// Entries of `[from, to)`, from memory or from disk and then verified: as many as fit into `bytes_max`, at least
    /// one if there is one.
    pub async fn read(
        &self,
        from: LogIndex,
        to: LogIndex,
        bytes_max: usize,
    ) -> Result<Vec<LogEntry>, StoreError> {
        let mut out = Vec::new();
        let mut bytes = 0;
        for index in from.0..to.0 {
            let found = self.group.borrow().get(LogIndex(index)).cloned();
            let Some(meta) = found else { break };
            bytes += meta.head.len() + meta.payload_bytes as usize;
            if bytes > bytes_max && !out.is_empty() {
                break;
            }
            let payload = match &meta.payload {
                Some(payload) => payload.clone(),
                None => self.verified_payload(&meta).await?,
            };
            out.push(LogEntry { id: meta.id, kind: meta.kind, head: meta.head, payload });
        }
        Ok(out)
    }

    /// Entries of `[from, to)`, with the block data of those only that have it in memory. No I/O: whoever applies entries needs
    /// none of it, since block data is found by its entry's index and verified by the checksums in the head.
    pub fn read_heads(&self, from: LogIndex, to: LogIndex) -> Vec<EntryHead> {
        let group = self.group.borrow();
        let known = (from.0..to.0).map_while(|index| group.get(LogIndex(index)));
        let head = |meta: &Meta| EntryHead {
            id: meta.id,
            kind: meta.kind,
            head: meta.head.clone(),
            payload_bytes: meta.payload_bytes,
            payload: meta.payload.clone(),
        };
        known.map(head).collect()
    }

    async fn verified_payload(&self, meta: &Meta) -> Result<Bytes, StoreError> {
        if meta.payload_bytes == 0 {
            return Ok(Bytes::new());
        }
        let payload = self.journal.read_place(meta.place, 0, meta.payload_bytes as usize).await?;
        if crc32fast::hash(&payload) != meta.payload_crc {
            return Err(StoreError::Damaged {
                what: format!("entry {} of group {}", meta.id.index, self.who.group),
                why: "its checksum does not match; replace this replica, the others hold the data".into(),
            });
        }
        Ok(payload)
    }

    /// Blocks of an entry's payload. Not verified here: the caller holds the block checksums.
    pub async fn read_payload(&self, index: LogIndex, block: u32, blocks: u32) -> Result<Bytes, StoreError> {
        let (start, length) = (block as usize * BLOCK_BYTES, blocks as usize * BLOCK_BYTES);
        let found = self.group.borrow().get(index).cloned();
        let meta = found
            .ok_or_else(|| StoreError::Failed(format!("entry {index} is not in the journal any more")))?;
        if start + length > meta.payload_bytes as usize {
            return Err(StoreError::Failed(format!("entry {index} has no block {}", block + blocks - 1)));
        }
        match &meta.payload {
            Some(payload) => Ok(payload.slice(start..start + length)),
            None => self.journal.read_place(meta.place, start as u64, length).await,
        }
    }
}

impl crate::volume::PayloadSource for GroupLog {
    fn flushed(&self) -> LogIndex {
        Self::flushed(self)
    }
    fn read_payload(
        &self,
        index: LogIndex,
        block: u32,
        blocks: u32,
    ) -> futures_util::future::LocalBoxFuture<'static, Result<Bytes, StoreError>> {
        let log = self.clone();
        Box::pin(async move { Self::read_payload(&log, index, block, blocks).await })
    }
    fn keep_committed(
        &self,
        index: LogIndex,
    ) -> futures_util::future::LocalBoxFuture<'static, Result<(), StoreError>> {
        let log = self.clone();
        Box::pin(async move { Self::keep_committed(&log, index).await })
    }
    fn evict_hint(&self) {
        self.group.borrow_mut().evict();
    }
    fn begin_pass(&self) -> Option<CleaningPass> {
        Some(self.journal.begin_pass())
    }
    fn give_way(&self) -> futures_util::future::LocalBoxFuture<'static, Beside> {
        let journal = self.journal.clone();
        Box::pin(async move { journal.give_way().await })
    }
    fn end_pass(&self, pass: Option<CleaningPass>, index: LogIndex) {
        let bytes = self.group.borrow_mut().more_dispensable(index);
        pass.iter().for_each(|pass| pass.made(bytes));
    }
}
