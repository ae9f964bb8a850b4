//! What reads bytes of a disk, for a fuzzer: no panic, no allocation beyond its bound, and nothing invented.
//!
//! Checksums are made right first, so that what stands behind them is reached. The journal is different: a real one is
//! damaged, and recovery may only find what was written, or say that something is missing.

use std::cell::OnceCell;

use bytes::Bytes;
use holdfast_types::{BLOCK_BYTES, ClusterId, GroupId, LogIndex, NodeName, ReplicaId, StoreId, Term};

use super::{Image, MemoryDisk, simulate};
use crate::journal::{GroupLog, Journal, StoreOptions};
use crate::{EntryId, LogEntry, ReplicaIdentity, StoreIdentity};

/// Takes any bytes, and panics if they are read as what they are not.
pub type Target = fn(&[u8]);

/// What can be fuzzed, by name.
pub const TARGETS: [(&str, Target); 10] = [
    ("list", crate::journal::format::fuzz),
    ("journal", journal),
    ("manifest", crate::volume::manifest::fuzz),
    ("table", crate::volume::table::fuzz),
    ("staging", crate::volume::stage::fuzz),
    ("state", crate::state_file::fuzz),
    ("past", crate::past_file::fuzz),
    ("witness", crate::witness_file::fuzz),
    ("destroyed", crate::destroyed_file::fuzz),
    ("recoveries", crate::recovery_file::fuzz),
];

const SEGMENTS: u32 = 4;
/// Entries of the journal that is damaged.
const ENTRIES: u64 = 12;
/// Bytes of one damage.
const DAMAGE_BYTES: usize = 6;
/// More at once is no damage that says anything.
const DAMAGES_MAX: usize = 12;

thread_local! {
    static WRITTEN: OnceCell<Image> = const { OnceCell::new() };
}

fn identity() -> StoreIdentity {
    StoreIdentity { cluster: ClusterId(1), node: NodeName::new("n"), store: StoreId(2) }
}

fn options() -> StoreOptions {
    StoreOptions { segment_bytes: 2 << 20, segments: SEGMENTS }
}

fn entry(index: u64) -> LogEntry {
    let id = EntryId { term: Term(1 + index / 5), leader: ReplicaId(1), index: LogIndex(index) };
    let payload = vec![index as u8 + 1; (index % 4) as usize * BLOCK_BYTES];
    LogEntry { id, kind: 1, head: Bytes::from(format!("entry {index}")), payload: payload.into() }
}

fn written() -> Image {
    let disk = MemoryDisk::new(0);
    simulate(1, async {
        let directory = disk.directory();
        Journal::format(directory.clone(), &identity(), &options()).await.expect("it can be formatted");
        let opened = Journal::open(directory, &identity(), &options()).await;
        let (journal, _) = opened.expect("it can be opened");
        let who = ReplicaIdentity { group: GroupId(7), replica: ReplicaId(1) };
        let log = journal.create_group(who).await.expect("a group can be made");
        for index in 0..ENTRIES {
            log.append(vec![entry(index)], Box::new(drop));
            if index % 3 == 2 {
                log.save_vote(format!("vote {index}").into()).await.expect("a vote can be saved");
            }
        }
        log.purge(entry(2).id).await.expect("the log can be purged");
        holdfast_env::sleep(std::time::Duration::from_secs(1)).await;
    });
    disk.kill();
    disk.image()
}

/// Damages a journal as `input` says, six bytes a damage: what, where (block and byte), and with what.
fn journal(input: &[u8]) {
    let image = WRITTEN.with(|image| image.get_or_init(written).clone());
    let disk = MemoryDisk::from_image(&image, 1);
    let name = "journal/0000";
    let blocks = disk
        .written(name)
        .iter()
        .filter(|(block, _)| disk.block(name, *block).iter().any(|b| *b != 0))
        .count();
    for damage in input.chunks_exact(DAMAGE_BYTES).take(DAMAGES_MAX) {
        let [what, block, other, low, high, bits] = damage else { continue };
        let (block, other) = (u64::from(*block) % blocks as u64, u64::from(*other) % blocks as u64);
        match what % 4 {
            0 => disk.rot(
                name,
                block * BLOCK_BYTES as u64 + u64::from(u16::from_le_bytes([*low, *high]) % 4096),
                *bits,
            ),
            1 => disk.make_unreadable(name, block),
            // A block at a place where it does not belong.
            2 => disk.replace(name, block, &disk.block(name, other)),
            _ => disk.replace(name, block, &[0; BLOCK_BYTES]),
        }
    }
    simulate(2, async {
        // Nothing but its identity makes a journal unreadable as a whole, and that was not touched.
        let opened = Journal::open(disk.directory(), &identity(), &options()).await;
        let (_journal, groups) = opened.expect("a damaged journal opens and says what is damaged");
        for group in groups {
            check(&group.log).await;
        }
        holdfast_env::sleep(std::time::Duration::from_secs(1)).await;
    });
}

/// What is found was written, or is refused.
async fn check(log: &GroupLog) {
    let first = log.purged().map_or(0, |id| id.index.0 + 1);
    let end = log.last().map_or(0, |id| id.index.0 + 1);
    assert!(end <= ENTRIES, "an entry {end} was never written");
    for index in first..end {
        if let Ok(read) = log.read(LogIndex(index), LogIndex(index + 1), 1).await {
            assert_eq!(read, [entry(index)], "entry {index} was never written so");
        }
    }
    if let Some(vote) = log.vote() {
        let known = (0..ENTRIES).any(|index| index % 3 == 2 && vote == format!("vote {index}"));
        assert!(known, "the vote {vote:?} was never saved");
    }
}
