//! A crash, and another one during the first batch after it: what was written after that stays.

use bytes::Bytes;
use holdfast_store::journal::{GroupLog, Journal, Recovery, StoreOptions};
use holdfast_store::testing::{MemoryDisk, simulate};
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

/// The log as recovery finds it; clean, since nothing that was flushed is ever damaged here.
async fn recovered(disk: &MemoryDisk) -> GroupLog {
    let (_, mut groups) = Journal::open(disk.directory(), &identity(), &options()).await.expect("opens");
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

/// Spoils the first block of that content, as if the write of it had been cut short.
fn tear(disk: &MemoryDisk, fill: u8) {
    for name in disk.names().into_iter().filter(|name| name.starts_with("journal/0")) {
        let written = disk.written(&name).into_iter().map(|(block, _)| block);
        let mut holding = written.filter(|block| disk.block(&name, *block).iter().all(|byte| *byte == fill));
        if let Some(block) = holding.next() {
            return (0..BLOCK as u64).for_each(|byte| disk.rot(&name, block * BLOCK as u64 + byte, fill));
        }
    }
    panic!("no block of {fill:#x}");
}

#[test]
fn what_follows_two_torn_tails_is_not_cut_with_them() {
    // Time stands still while there is work: no closing mark comes in between.
    let disk = MemoryDisk::new(1);
    simulate(1, async {
        let directory = disk.directory();
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
    disk.kill();
    tear(&disk, 0xa1);
    simulate(2, async {
        let log = recovered(&disk).await;
        assert_eq!(log.last().map(|id| id.index), Some(LogIndex(0)), "the torn tail is void");
        append(&log, entry(1, 0xb1, 1));
        flushed(&log, 1).await;
    });
    // The second crash: the batch that said so is torn, too.
    disk.kill();
    tear(&disk, 0xb1);
    simulate(3, async {
        let log = recovered(&disk).await;
        assert_eq!(log.last().map(|id| id.index), Some(LogIndex(0)), "the second torn tail is void");
        append(&log, entry(1, 0xc1, 1));
        flushed(&log, 1).await;
    });
    disk.kill();
    simulate(4, async {
        let log = recovered(&disk).await;
        assert_eq!(log.last().map(|id| id.index), Some(LogIndex(1)), "an acknowledged entry is lost");
        let read = log.read(LogIndex(1), LogIndex(2), 1 << 20).await.expect("is read");
        assert_eq!(read, [entry(1, 0xc1, 1)]);
    });
}
