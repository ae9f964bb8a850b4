//! Repair of entries whose payload rotted: somebody who has the same entry gives its payload, and it is written again.
//!
//! What recovery calls faulty stays so until a payload of the same length and checksum is durable in a new place. The
//! record is that of a copy (docs/FORMAT.md, tag 3) with its payload behind it: a recovery takes the newest record of
//! an entry, so a crash before it is durable finds the entry faulty again, and one after it finds it good. The old
//! place is given back only once the new one is durable.

use bytes::Bytes;
use holdfast_types::{LogIndex, Term};
use tokio::sync::oneshot;

use super::format::Record;
use super::group::{Done, GroupLog, Meta};
use crate::{EntryId, StoreError};

/// An entry and what its payload must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntrySum {
    /// Which entry.
    pub id: EntryId,
    /// Bytes of its payload.
    pub payload_bytes: u32,
    /// CRC-32 of its payload.
    pub payload_crc: u32,
}

fn sum(meta: &Meta) -> EntrySum {
    EntrySum { id: meta.id, payload_bytes: meta.payload_bytes, payload_crc: meta.payload_crc }
}

impl GroupLog {
    /// Entries whose payload recovery found damaged and that were not repaired since, the first one first.
    pub fn faulty(&self) -> Vec<EntrySum> {
        self.group.borrow().entries.iter().filter(|meta| meta.faulty).map(sum).collect()
    }

    /// What the payload of an entry that the log holds must be.
    pub fn sum(&self, index: LogIndex) -> Option<EntrySum> {
        self.group.borrow().get(index).map(sum)
    }

    /// The highest term in the log.
    pub fn last_term(&self) -> Term {
        self.last().map_or(Term(0), |id| id.term)
    }

    /// Heads of the entries of one kind, in order. Heads are always readable.
    pub fn heads_of(&self, kind: u8) -> Vec<(EntryId, Bytes)> {
        let group = self.group.borrow();
        let entries = group.entries.iter().filter(|meta| meta.kind == kind);
        entries.map(|meta| (meta.id, meta.head.clone())).collect()
    }

    /// Writes the payload of a faulty entry anew; durable when it returns. `false` if the entry has left the log
    /// meanwhile. Refused if the payload is not the entry's.
    pub async fn repair(&self, id: EntryId, payload: Bytes) -> Result<bool, StoreError> {
        if let Some(error) = self.journal.failed() {
            return Err(error);
        }
        let record = {
            let mut group = self.group.borrow_mut();
            let committed = group.committed_and_flushed();
            let Some(meta) = group.get_mut(id.index).filter(|meta| meta.id == id) else { return Ok(false) };
            let is_it =
                meta.payload_bytes as usize == payload.len() && crc32fast::hash(&payload) == meta.payload_crc;
            if !is_it {
                return Err(StoreError::Damaged {
                    what: format!("a payload for entry {} of group {}", id.index, self.who.group),
                    why: "it is not the entry's".into(),
                });
            }
            if !meta.faulty {
                return Ok(true);
            }
            let added = if meta.payload.is_none() { payload.len() } else { 0 };
            // Not evicted before it is durable in its new place: the old one holds rubbish.
            meta.payload = Some(payload.clone());
            meta.durable = false;
            let record = meta.record(committed, true);
            group.cached_bytes += added;
            group.evicted_below = group.evicted_below.min(id.index.0);
            record
        };
        let (sender, receiver) = oneshot::channel();
        // The waiter was dropped with its task; the entry is written all the same.
        let done: Done = Box::new(move |result| drop(sender.send(result)));
        self.journal.enqueue(Record::Entry(self.who, record), payload, Some(done));
        self.journal.kick();
        receiver.await.unwrap_or_else(|_| Err(StoreError::Failed("the journal has stopped".into())))?;
        let group = self.group.borrow();
        Ok(group.get(id.index).is_some_and(|meta| meta.id == id && !meta.faulty))
    }
}
