//! A crash, and another one during the first batch after it: what was written after that stays.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::rc::Rc;

use bytes::Bytes;
use holdfast_env::disk::Directory;
use holdfast_env::real::disk::{OpenError, RealDirectory};
use holdfast_store::journal::{GroupLog, Journal, Recovery, StoreOptions};
use holdfast_store::{EntryId, LogEntry, ReplicaIdentity, StoreIdentity};
use holdfast_types::{ClusterId, GroupId, LogIndex, NodeName, ReplicaId, StoreId, Term};

const WHO: ReplicaIdentity = ReplicaIdentity { group: GroupId(7), replica: ReplicaId(1) };
const BLOCK: usize = 4096;

fn identity() -> StoreIdentity {
    StoreIdentity { cluster: ClusterId(1), node: NodeName::new("n"), store: StoreId(1) }
}

fn options() -> StoreOptions {
    StoreOptions { segment_bytes: 4 << 20, segments: 4 }
}

async fn directory(path: &Path) -> Rc<dyn Directory> {
    // The tasks of the journal before end one by one; its lock goes with the last of them.
    loop {
        match RealDirectory::open(path) {
            Ok(directory) => return directory,
            Err(OpenError::InUse(_)) => holdfast_env::yield_now().await,
            Err(error) => panic!("{error}"),
        }
    }
}

/// The log as recovery finds it; clean, since nothing that was flushed is ever damaged here.
async fn recovered(path: &Path) -> GroupLog {
    let (_, mut groups) = Journal::open(directory(path).await, &identity(), &options()).await.expect("opens");
    let found = groups.pop().expect("the group is there");
    assert_eq!(found.state, Recovery::Clean);
    found.log
}

fn entry(index: u64, fill: u8, blocks: usize) -> LogEntry {
    let id = EntryId { term: Term(1), leader: ReplicaId(1), index: LogIndex(index) };
    LogEntry { id, kind: 1, head: Bytes::from_static(b"head"), payload: vec![fill; blocks * BLOCK].into() }
}

async fn flushed(log: &GroupLog, index: u64) {
    while log.flushed() < LogIndex(index) {
        holdfast_env::yield_now().await;
    }
}

fn append(log: &GroupLog, entry: LogEntry) {
    log.append(vec![entry], Box::new(|result| result.expect("is flushed")));
}

/// Zeroes the first block of that content, as if the write of it had been cut short.
fn tear(path: &Path, fill: u8) {
    for number in 0..4 {
        let name = path.join(format!("journal/{number:04}"));
        let bytes = std::fs::read(&name).expect("a segment");
        let at = bytes.chunks(BLOCK).position(|block| block.iter().all(|byte| *byte == fill));
        if let Some(at) = at {
            let file = std::fs::OpenOptions::new().write(true).open(&name).expect("opens");
            return file.write_all_at(&[0; BLOCK], (at * BLOCK) as u64).expect("tears");
        }
    }
    panic!("no block of {fill:#x}");
}

#[test]
fn what_follows_two_torn_tails_is_not_cut_with_them() {
    let place = tempfile::tempdir().expect("a place");
    let path = place.path();
    holdfast_env::real::run(async {
        let directory = directory(path).await;
        Journal::format(directory.clone(), &identity(), &options()).await.expect("formats");
        let (journal, _) = Journal::open(directory, &identity(), &options()).await.expect("opens");
        let log = journal.create_group(WHO).await.expect("creates");
        append(&log, entry(0, 0x10, 1));
        flushed(&log, 0).await;
        // Two batches at once: neither says of the other that it was flushed.
        append(&log, entry(1, 0xa1, 16));
        append(&log, entry(2, 0xa2, 1));
        flushed(&log, 2).await;
    });
    // The first crash: the first of the two never arrived whole.
    tear(path, 0xa1);
    holdfast_env::real::run(async {
        let log = recovered(path).await;
        assert_eq!(log.last().map(|id| id.index), Some(LogIndex(0)), "the torn tail is void");
        append(&log, entry(1, 0xb1, 1));
        flushed(&log, 1).await;
    });
    // The second crash: the batch that said so is torn, too.
    tear(path, 0xb1);
    holdfast_env::real::run(async {
        let log = recovered(path).await;
        assert_eq!(log.last().map(|id| id.index), Some(LogIndex(0)), "the second torn tail is void");
        append(&log, entry(1, 0xc1, 1));
        flushed(&log, 1).await;
    });
    holdfast_env::real::run(async {
        let log = recovered(path).await;
        assert_eq!(log.last().map(|id| id.index), Some(LogIndex(1)), "an acknowledged entry is lost");
        let read = log.read(LogIndex(1), LogIndex(2), 1 << 20).await.expect("is read");
        assert_eq!(read, [entry(1, 0xc1, 1)]);
    });
}
