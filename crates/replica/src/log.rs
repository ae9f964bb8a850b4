//! openraft's log storage over a group's part of the journal.
//!
//! Entries are readable when `append` returns and durable when its callback fires. `append` never blocks and never
//! fails by itself: a store that has failed answers every callback with its error, which is fatal to the group.

use std::fmt::Debug;
use std::io;
use std::ops::{Bound, RangeBounds};
use std::rc::Rc;

use holdfast_protocol::planted::is_planted;
use holdfast_store::StoreError;
use holdfast_store::journal::GroupLog;
use holdfast_types::{LogIndex, limits};
use openraft::storage::{IOFlushed, LogState, RaftLogStorage};
use openraft::{OptionalSend, RaftLogReader};

use crate::codec;
use crate::config::{Entry, LogId, Types, Vote};
use crate::machine::Position;
use crate::stall::Stall;

/// One group's log.
#[derive(Clone)]
pub(crate) struct Log {
    journal: GroupLog,
    position: Rc<Position>,
    stall: Stall,
}

/// A store's error as openraft takes it: any of them is fatal to the group.
pub(crate) fn io_error(error: StoreError) -> io::Error {
    io::Error::other(error)
}

fn broken(error: holdfast_types::DecodeError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

impl Log {
    pub(crate) fn new(journal: GroupLog, position: Rc<Position>, stall: Stall) -> Self {
        Self { journal, position, stall }
    }

    async fn read_some(&self, from: u64, to_exclusive: u64, bytes_max: usize) -> io::Result<Vec<Entry>> {
        let entries =
            self.journal.read(LogIndex(from), LogIndex(to_exclusive), bytes_max).await.map_err(io_error)?;
        entries.into_iter().map(|entry| codec::from_log_entry(entry).map_err(broken)).collect()
    }

    /// The part of `[from, to)` that the log holds.
    fn clip(&self, from: u64, to_exclusive: u64) -> (u64, u64) {
        let first = self.journal.purged().map_or(0, |id| id.index.0 + 1);
        let end = self.journal.last().map_or(first, |id| id.index.0 + 1);
        (from.max(first), to_exclusive.min(end))
    }

    /// A store that has stopped took nothing of what was appended since. What Raft was told of and cannot be read any more
    /// is missing, not empty: it would pass for applied.
    fn is_there(&self, from: u64, to_exclusive: u64) -> io::Result<()> {
        match self.journal.failed() {
            Some(error) if from < to_exclusive => Err(io_error(error)),
            _ => Ok(()),
        }
    }
}

impl RaftLogReader<Types> for Log {
    /// What is applied, or looked at for its identity or membership: without block data that is not in memory. After a start
    /// openraft asks for the whole log twice, which would read every payload of the journal twice.
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry>, io::Error> {
        let from = match range.start_bound() {
            Bound::Included(index) => *index,
            Bound::Excluded(index) => index + 1,
            Bound::Unbounded => 0,
        };
        let to_exclusive = match range.end_bound() {
            Bound::Included(index) => index.saturating_add(1),
            Bound::Excluded(index) => *index,
            Bound::Unbounded => u64::MAX,
        };
        let wanted_end = to_exclusive;
        let (from, to_exclusive) = self.clip(from, to_exclusive);
        if wanted_end != u64::MAX {
            self.is_there(from.max(to_exclusive), wanted_end)?;
        }
        let entries = self.journal.read_heads(LogIndex(from), LogIndex(to_exclusive));
        if (entries.len() as u64) < to_exclusive.saturating_sub(from) {
            let missing = from + entries.len() as u64;
            return Err(io::Error::other(format!(
                "the journal holds entry {missing} but does not return it"
            )));
        }
        if entries.iter().any(|entry| entry.payload.is_none()) {
            // After a start the whole log is repeated, and nothing of it waits for anything: others have their turn in between.
            holdfast_env::yield_now().await;
        }
        entries.into_iter().map(|entry| codec::from_entry_head(entry).map_err(broken)).collect()
    }

    /// What is sent to others.
    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, io::Error> {
        let (from, to_exclusive) = self.clip(start, end);
        if from >= to_exclusive {
            self.is_there(start, end)?;
            return Ok(Vec::new());
        }
        self.read_some(from, to_exclusive, limits::APPEND_BYTES_MAX).await
    }

    async fn read_vote(&mut self) -> Result<Option<Vote>, io::Error> {
        self.journal.vote().map(|bytes| codec::vote_from(&bytes).map_err(broken)).transpose()
    }
}

impl RaftLogStorage<Types> for Log {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<Types>, io::Error> {
        let purged = self.journal.purged().map(codec::log_id);
        let last = self.journal.last().map(codec::log_id).or(purged);
        Ok(LogState { last_purged_log_id: purged, last_log_id: last })
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote) -> Result<(), io::Error> {
        let _waiting = self.stall.waiting();
        self.journal.save_vote(codec::vote_bytes(vote)).await.map_err(io_error)
    }

    async fn save_committed(&mut self, committed: Option<LogId>) -> Result<(), io::Error> {
        if let Some(id) = committed {
            self.journal.note_committed(codec::entry_id(&id));
        }
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId>, io::Error> {
        Ok(self.journal.committed().map(codec::log_id))
    }

    async fn append<I>(&mut self, entries: I, callback: IOFlushed<Types>) -> Result<(), io::Error>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries = entries.into_iter().map(|entry| codec::to_log_entry(&entry)).collect();
        if is_planted("append-acknowledged-early") {
            self.journal.append(entries, Box::new(|_| {}));
            callback.io_completed(Ok(()));
            return Ok(());
        }
        self.journal.append(entries, Box::new(move |result| callback.io_completed(result.map_err(io_error))));
        Ok(())
    }

    async fn truncate_after(&mut self, last: Option<LogId>) -> Result<(), io::Error> {
        let _waiting = self.stall.waiting();
        let keep = last.map(|id| LogIndex(id.index));
        self.journal.truncate_after(keep).await.map_err(io_error)?;
        self.position.truncated_after(keep.unwrap_or_default());
        Ok(())
    }

    /// Waits for the disk only where the log would have a gap without it.
    async fn purge(&mut self, upto: LogId) -> Result<(), io::Error> {
        let mut upto = codec::entry_id(&upto);
        if is_planted("purge-too-far") {
            upto = self.position.applied().map_or(upto, |applied| applied.max(upto));
        }
        if self.journal.purge_soon(upto).map_err(io_error)? {
            return Ok(());
        }
        let _waiting = self.stall.waiting();
        self.journal.purge(upto).await.map_err(io_error)
    }
}

#[cfg(test)]
mod tests {
    use holdfast_store::journal::{Journal, StoreOptions};
    use holdfast_store::testing::{MemoryDisk, simulate};
    use holdfast_store::{EntryId, LogEntry, ReplicaIdentity, StoreIdentity};
    use holdfast_types::{ClusterId, GroupId, NodeName, ReplicaId, StoreId, Term};

    use bytes::Bytes;
    use tokio::sync::oneshot;

    use super::*;
    use crate::payload::Payload;

    /// A log of one group, on a store that is opened (again).
    async fn opened(disk: &MemoryDisk, make: bool) -> (Journal, Log) {
        let options = StoreOptions { segment_bytes: 2 << 20, segments: 5 };
        let identity = StoreIdentity { cluster: ClusterId(1), node: NodeName::new("n"), store: StoreId(2) };
        let who = ReplicaIdentity { group: GroupId(1), replica: ReplicaId(1) };
        if make {
            Journal::format(disk.directory(), &identity, &options).await.expect("formats");
        }
        let (journal, _) = Journal::open(disk.directory(), &identity, &options).await.expect("opens");
        let group = match make {
            true => journal.create_group(who).await.expect("is made"),
            false => journal.group(who).expect("is there"),
        };
        (journal, Log::new(group, Rc::default(), Stall::new().0))
    }

    fn command(index: u64, payload: Bytes) -> LogEntry {
        let id = EntryId { term: Term(1), leader: ReplicaId(1), index: LogIndex(index) };
        LogEntry { id, kind: 1, head: Bytes::from_static(b"head"), payload }
    }

    fn payload_of(entry: &Entry) -> Payload {
        match &entry.payload {
            openraft::EntryPayload::Normal(data) => data.payload.clone(),
            other => panic!("{other:?} is no command"),
        }
    }

    #[test]
    fn entries_are_applied_without_block_data_and_sent_with_it() {
        simulate(1, async {
            let (disk, block) = (MemoryDisk::new(1), Bytes::from(vec![7; 4096]));
            let (journal, mut log) = opened(&disk, true).await;
            let (done, durable) = oneshot::channel();
            let entries = vec![command(0, Bytes::new()), command(1, block.clone())];
            log.journal.append(entries, Box::new(|result| drop(done.send(result))));
            durable.await.expect("is answered").expect("is durable");
            let entries = log.try_get_log_entries(0..2).await.expect("reads");
            assert_eq!(payload_of(&entries[1]), Payload::Here(block.clone()), "it is in memory");
            drop((journal, log));

            let (_journal, mut log) = opened(&disk, false).await;
            let entries = log.try_get_log_entries(0..2).await.expect("reads");
            assert_eq!(payload_of(&entries[0]), Payload::NONE, "there is none to be left");
            assert_eq!(payload_of(&entries[1]), Payload::InJournal(4096));
            let sent = log.limited_get_log_entries(0, 2).await.expect("reads");
            assert_eq!(payload_of(&sent[1]), Payload::Here(block.clone()));
            assert_eq!(codec::to_log_entry(&sent[1]), command(1, block));
            let cut_short = std::panic::AssertUnwindSafe(|| codec::to_log_entry(&entries[1]));
            assert!(std::panic::catch_unwind(cut_short).is_err(), "it would pass for one without block data");
        });
    }

    #[test]
    fn what_a_stopped_store_never_took_is_missing_and_not_empty() {
        simulate(1, async {
            let (journal, mut log) = opened(&MemoryDisk::new(1), true).await;
            // Nobody misses what was never appended.
            assert!(log.limited_get_log_entries(1, 2).await.expect("reads").is_empty());
            assert!(log.try_get_log_entries(1..2).await.expect("reads").is_empty());
            journal.stop(&StoreError::Failed("a flush failed".into()));
            let missing = log.limited_get_log_entries(1, 2).await.expect_err("it is missing");
            assert!(missing.to_string().contains("a flush failed"), "{missing}");
            assert!(log.limited_get_log_entries(1, 1).await.expect("asks for nothing").is_empty());
            // What is applied is read this way.
            let missing = log.try_get_log_entries(1..2).await.expect_err("it is missing");
            assert!(missing.to_string().contains("a flush failed"), "{missing}");
        });
    }
}
