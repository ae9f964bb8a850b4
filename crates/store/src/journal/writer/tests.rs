//! What is written behind what overtook it.

use holdfast_env::disk::Directory;
use holdfast_env::real::disk::RealDirectory;
use holdfast_types::{ClusterId, GroupId, LogIndex, NodeName, ReplicaId, StoreId, Term};

use super::super::StoreOptions;
use super::*;
use crate::{LogEntry, StoreIdentity};

fn entry(term: u64) -> LogEntry {
    let id = EntryId { term: Term(term), leader: ReplicaId(1), index: LogIndex(1) };
    LogEntry { id, kind: 1, head: Bytes::from_static(b"head"), payload: Bytes::new() }
}

async fn append(log: &super::super::GroupLog, entry: LogEntry) {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    log.append(vec![entry], Box::new(|result| sender.send(result).expect("somebody waits")));
    receiver.await.expect("is answered").expect("is flushed");
}

/// What makes room goes first, but not when it does not fit into what is left of a segment and the rest does.
#[test]
fn a_copy_that_was_overtaken_does_not_bring_back_what_was_cut() {
    let place = tempfile::tempdir().expect("a place");
    let identity = StoreIdentity { cluster: ClusterId(1), node: NodeName::new("n"), store: StoreId(1) };
    let options = StoreOptions { segment_bytes: 4 << 20, segments: 4 };
    let who = ReplicaIdentity { group: GroupId(7), replica: ReplicaId(1) };
    holdfast_env::real::run(async {
        let directory: std::rc::Rc<dyn Directory> = RealDirectory::open(place.path()).expect("opens");
        Journal::format(directory.clone(), &identity, &options).await.expect("formats");
        let (journal, _) = Journal::open(directory.clone(), &identity, &options).await.expect("opens");
        let log = journal.create_group(who).await.expect("creates");
        append(&log, LogEntry { id: EntryId::default(), ..entry(0) }).await;
        append(&log, entry(1)).await;
        let copy = log.group.borrow().get(LogIndex(1)).map(|meta| meta.record(LogIndex(0), true));
        log.truncate_after(Some(LogIndex(0))).await.expect("is cut");
        append(&log, entry(2)).await;
        let (sender, written) = tokio::sync::oneshot::channel();
        let done: Done = Box::new(|result| sender.send(result).expect("somebody waits"));
        journal.enqueue_urgent(Record::Entry(who, copy.expect("an entry")), Some(done));
        journal.kick();
        written.await.expect("is answered").expect("is written");
        let (_, mut groups) = Journal::open(directory, &identity, &options).await.expect("opens");
        let log = groups.pop().expect("the group").log;
        assert_eq!(log.last().map(|id| id.term), Some(Term(2)), "an entry that was cut is back");
    });
}
