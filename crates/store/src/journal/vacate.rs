//! Room behind the logs of replicas that do not run.
//!
//! A replica that waits for repair, or for being replaced, is not purged: its entries stay. They must not pin the
//! segments behind them, or a journal's worth of other volumes' writes later the whole store would stand still. So
//! while room is short and a segment behind the oldest one is not needed, the entries of such logs are written again at
//! the head, as copies (docs/FORMAT.md, tag 3). One that is damaged, or is found to be when it is read for this, is
//! written without its payload and stays damaged (tag 5): rubbish behind a list would be taken for a torn batch. Where a
//! payload stood before is given back once the copy is durable, as after a repair.

use bytes::Bytes;
use tokio::sync::oneshot;

use super::format::{self, EntryRecord, Record};
use super::group::{Done, GroupLog, Place};
use super::{Journal, planted};
use crate::{ReplicaIdentity, StoreError};

/// An entry that is to leave a segment.
struct Leaving {
    who: ReplicaIdentity,
    entry: EntryRecord,
    place: Place,
}

impl Leaving {
    fn payload_bytes(&self) -> usize {
        if self.entry.damaged { 0 } else { self.entry.payload_bytes as usize }
    }
}

impl GroupLog {
    /// Says whether the log's replica does not run, so that nobody will purge it for now.
    pub fn set_parked(&self, parked: bool) {
        self.group.borrow_mut().parked = parked;
        self.journal.reclaim();
        self.journal.kick();
    }
}

/// Payload that is read and handed over at once, in bytes: the entries of a list share it.
const STEP_BYTES: usize = 1 << 20;

impl Journal {
    /// Writes again what parked logs have in the oldest segment, if nothing else is in it and that makes room.
    pub(super) fn vacate(&self, tail: usize) {
        if planted("parked-logs-pin") {
            return;
        }
        let Some(mut leaving) = self.parked_in(tail).filter(|leaving| !leaving.is_empty()) else { return };
        if !self.gains(tail, &leaving) {
            return;
        }
        self.0.state.borrow_mut().set_copying(true);
        let journal = self.downgrade();
        holdfast_env::spawn("journal-vacate", async move {
            let mut outcome = Ok(());
            while !leaving.is_empty() && outcome.is_ok() {
                // The journal is not kept alive by what is tidied up in it.
                let Some(journal) = journal.upgrade().map(Self) else { return };
                if !journal.gains(tail, &leaving) {
                    break;
                }
                let rest = leaving.split_off(step(&leaving));
                outcome = journal.copy_from(tail, std::mem::replace(&mut leaving, rest)).await;
            }
            let Some(journal) = journal.upgrade().map(Self) else { return };
            journal.0.state.borrow_mut().set_copying(false);
            match outcome {
                Ok(()) if leaving.is_empty() => journal.reclaim(),
                Ok(()) => {}
                // It is looked at again when something else makes room.
                Err(error) => {
                    tracing::warn!(%error, "a log that does not run keeps its place in the journal")
                }
            }
            journal.kick();
        });
    }

    fn gains(&self, tail: usize, leaving: &[Leaving]) -> bool {
        let payload = leaving.iter().map(|leaving| leaving.payload_bytes() as u64).sum();
        let records = leaving.iter().map(|leaving| format::entry_bytes(&leaving.entry) as u64).sum();
        self.0.state.borrow().gains_by_vacating(tail, payload, records)
    }

    /// Entries with payload that parked logs have in a segment; none if it holds others, too: those are purged soon.
    fn parked_in(&self, segment: usize) -> Option<Vec<Leaving>> {
        let groups = self.0.groups.borrow();
        if !groups.values().any(|group| group.borrow().parked) {
            return None;
        }
        let mut out = Vec::new();
        for (who, group) in groups.iter() {
            let group = group.borrow();
            for meta in group.entries.iter().filter(|meta| meta.payload_bytes > 0) {
                let Some(place) = meta.place.filter(|place| place.segment == segment) else { continue };
                // Being repaired: it leaves by itself, or is still being written.
                if !group.parked || !meta.durable {
                    return None;
                }
                let mut entry = meta.record(group.committed_and_flushed(), true);
                entry.damaged = meta.faulty;
                out.push(Leaving { who: *who, entry, place });
            }
        }
        Some(out)
    }

    /// Durable when it returns.
    async fn copy_from(&self, segment: usize, leaving: Vec<Leaving>) -> Result<(), StoreError> {
        let mut copies = Vec::with_capacity(leaving.len());
        for Leaving { who, mut entry, place } in leaving {
            let mut payload = Bytes::new();
            if !entry.damaged {
                match self.read_whole(&entry, place).await {
                    Some(read) => payload = read,
                    None => entry.damaged = self.found_damaged(who, &entry, place)?,
                }
            }
            if entry.damaged && planted("rubbish-behind-a-list") {
                entry.damaged = false;
                payload = Bytes::from(vec![0; entry.payload_bytes as usize]);
            }
            self.0.state.borrow_mut().note_vacated(payload.len() as u64);
            copies.push((Record::Entry(who, entry), payload));
        }
        if let Some(error) = self.failed() {
            return Err(error);
        }
        let (sender, written) = oneshot::channel();
        // Nobody waits any more if the shard stops.
        let mut done: Option<Done> = Some(Box::new(move |result| drop(sender.send(result))));
        let last = copies.len().saturating_sub(1);
        for (n, (record, payload)) in copies.into_iter().enumerate() {
            let done = if n == last { done.take() } else { None };
            self.enqueue_copy(record, payload, Some(segment), done);
        }
        self.kick();
        written.await.unwrap_or_else(|_| Err(StoreError::Failed("the journal has stopped".into())))
    }

    /// An entry's payload, if it can be read and is the entry's.
    async fn read_whole(&self, entry: &EntryRecord, place: Place) -> Option<Bytes> {
        let read = self.read_place(Some(place), 0, entry.payload_bytes as usize).await.ok()?;
        (crc32fast::hash(&read) == entry.payload_crc).then_some(read)
    }

    /// Notes that an entry is damaged, if its replica still does not run and the entry is still there.
    fn found_damaged(
        &self,
        who: ReplicaIdentity,
        entry: &EntryRecord,
        place: Place,
    ) -> Result<bool, StoreError> {
        let groups = self.0.groups.borrow();
        let mut group = groups.get(&who).map(|group| group.borrow_mut()).filter(|group| group.parked);
        let meta = group.as_mut().and_then(|group| group.get_mut(entry.id.index));
        let Some(meta) = meta.filter(|meta| meta.id == entry.id && meta.place == Some(place)) else {
            return Err(StoreError::Failed(format!("entry {} was needed meanwhile", entry.id.index)));
        };
        tracing::error!(group = %who.group, index = %entry.id.index, "a log entry has become unreadable");
        meta.faulty = true;
        Ok(true)
    }
}

/// How many are handed over at once.
fn step(leaving: &[Leaving]) -> usize {
    let mut bytes = 0;
    let fits = leaving.iter().take_while(|leaving| {
        bytes += leaving.payload_bytes();
        bytes <= STEP_BYTES
    });
    fits.count().max(1)
}
