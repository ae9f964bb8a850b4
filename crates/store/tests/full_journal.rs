//! INV-ROOM: whatever fills the journal, a vote and a purge can be written, and after a purge everything goes on;
//! also when the process ends at the worst moment.

use std::cell::Cell;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use holdfast_env::disk::Directory;
use holdfast_env::real::disk::{IoEngine, OpenError, RealDirectory};
use holdfast_store::journal::{GroupLog, Journal, RecoveredGroup, StoreOptions};
use holdfast_store::{EntryId, LogEntry, ReplicaIdentity, StoreIdentity};
use holdfast_types::{ClusterId, GroupId, LogIndex, NodeName, ReplicaId, StoreId, Term};

/// The ring where the kernel gives one.
const ENGINES: [IoEngine; 2] = [IoEngine::Threads, IoEngine::Auto];

const WHO: ReplicaIdentity = ReplicaIdentity { group: GroupId(7), replica: ReplicaId(1) };

fn identity() -> StoreIdentity {
    StoreIdentity { cluster: ClusterId(1), node: NodeName::new("n"), store: StoreId(1) }
}

fn options() -> StoreOptions {
    StoreOptions { segment_bytes: 4 << 20, segments: 16 }
}

async fn directory(path: &Path, engine: IoEngine) -> Rc<dyn Directory> {
    // The tasks of the journal before end one by one; its lock goes with the last of them.
    loop {
        match RealDirectory::open_with(path, engine) {
            Ok(directory) => return directory,
            Err(OpenError::InUse(_)) => holdfast_env::yield_now().await,
            Err(error) => panic!("{error}"),
        }
    }
}

async fn open(path: &Path, engine: IoEngine) -> (Journal, Option<RecoveredGroup>) {
    let directory = directory(path, engine).await;
    if Journal::identity_of(&directory).await.is_err() {
        Journal::format(directory.clone(), &identity(), &options()).await.expect("formats");
    }
    let (journal, mut groups) = Journal::open(directory, &identity(), &options()).await.expect("opens");
    (journal, groups.pop())
}

fn id(index: u64) -> EntryId {
    EntryId { term: Term(1), leader: ReplicaId(1), index: LogIndex(index) }
}

fn entry(index: u64) -> LogEntry {
    LogEntry {
        id: id(index),
        kind: 1,
        head: Bytes::from_static(b"head"),
        payload: vec![index as u8; 1 << 20].into(),
    }
}

/// Entries on the way at once.
const ON_THE_WAY: u64 = 8;

/// Appends entries of 1 MiB as on a follower, whose leader nothing here slows, until the line stands; the last that is durable.
async fn fill(journal: &Journal, log: &GroupLog, first: u64) -> u64 {
    let durable = Rc::new(Cell::new(first - 1));
    for index in first.. {
        let told = durable.clone();
        let done = Box::new(move |result: Result<(), _>| {
            result.expect("is flushed");
            told.set(index);
        });
        log.append(vec![entry(index)], done);
        let gone_on = async {
            while index - durable.get() >= ON_THE_WAY {
                holdfast_env::yield_now().await;
            }
        };
        futures_util::pin_mut!(gone_on);
        // A slow disk is not a full journal, and a line that has just been let on is not one that stands.
        while holdfast_env::timeout(Duration::from_millis(500), &mut gone_on).await.is_err() {
            if journal.pressure().line_waits {
                return durable.get();
            }
        }
    }
    unreachable!("a journal is bounded")
}

/// A new log with its first entry.
async fn begin(journal: &Journal) -> GroupLog {
    let log = journal.create_group(WHO).await.expect("creates");
    log.append(vec![entry(0)], Box::new(|result| result.expect("is flushed")));
    log
}

async fn within<T>(what: &str, work: impl Future<Output = T>) -> T {
    holdfast_env::timeout(Duration::from_secs(10), work).await.unwrap_or_else(|_| panic!("{what} hangs"))
}

#[test]
fn a_full_journal_takes_a_vote_and_a_purge() {
    ENGINES.into_iter().for_each(a_full_journal_takes_a_vote_and_a_purge_on);
}

fn a_full_journal_takes_a_vote_and_a_purge_on(engine: IoEngine) {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let (journal, _) = open(place.path(), engine).await;
        let log = begin(&journal).await;
        let mut next = 1;
        for round in 0..4u8 {
            let durable = fill(&journal, &log, next).await;
            assert!(durable >= next + 20, "round {round}: only {durable} were written");
            // A vote lets the line through; without one only the purge does.
            if round % 2 == 0 {
                within("a vote", log.save_vote(vec![round; 16].into())).await.expect("is saved");
            }
            within("a purge", log.purge(id(durable))).await.expect("is purged");
            // What waited for room is written now.
            next = within("the line", async {
                while log.flushed() < log.last().expect("entries").index {
                    holdfast_env::yield_now().await;
                }
                log.flushed().0 + 1
            })
            .await;
        }
    });
}

#[test]
fn a_restart_with_a_full_journal_goes_on() {
    ENGINES.into_iter().for_each(a_restart_with_a_full_journal_goes_on_on);
}

fn a_restart_with_a_full_journal_goes_on_on(engine: IoEngine) {
    let place = tempfile::tempdir().expect("a place");
    let mut last_vote = None;
    for round in 0..6u8 {
        holdfast_env::real::run(async {
            let (journal, recovered) = open(place.path(), engine).await;
            let log = match recovered {
                Some(recovered) => {
                    assert_eq!(recovered.state, holdfast_store::journal::Recovery::Clean, "round {round}");
                    assert_eq!(recovered.log.vote(), last_vote, "round {round}");
                    recovered.log
                }
                None => begin(&journal).await,
            };
            // Also with nothing free, as the round before left it.
            let vote = Bytes::from(vec![round; 16]);
            within("a vote", log.save_vote(vote.clone())).await.expect("is saved");
            last_vote = Some(vote);
            if let Some(last) = log.last().filter(|last| last.index > LogIndex::ZERO) {
                let upto = EntryId { index: last.index, ..last };
                within("a purge", log.purge(upto)).await.expect("is purged");
            }
            let first = log.last().map_or(1, |last| last.index.0 + 1);
            let durable = fill(&journal, &log, first).await;
            assert!(durable >= first + 20, "round {round}: only {} were written", durable + 1 - first);
            // A cold end: no purge, no stop.
        });
    }
}

#[test]
fn nothing_is_admitted_while_a_long_line_stands() {
    ENGINES.into_iter().for_each(nothing_is_admitted_while_a_long_line_stands_on);
}

fn nothing_is_admitted_while_a_long_line_stands_on(engine: IoEngine) {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let (journal, _) = open(place.path(), engine).await;
        let log = begin(&journal).await;
        // As on a leader whose followers commit without it: proposals are over, their entries stand in line. More than
        // the journal holds, so that the line stays.
        for index in 1..=60 {
            log.append(vec![entry(index)], Box::new(|result| result.expect("is flushed")));
        }
        let admitted = holdfast_env::timeout(Duration::from_secs(1), log.admit(4096)).await;
        let usage = journal.usage();
        assert!(usage.waiting_bytes > 8 << 20, "a full journal: {usage:?}");
        assert!(admitted.is_err(), "nothing is admitted behind {} bytes", usage.waiting_bytes);
        within("a purge", log.purge(id(log.flushed().0))).await.expect("is purged");
        drop(within("an admission", log.admit(4096)).await);
    });
}

#[test]
fn a_journal_that_fills_up_while_nobody_waits_is_noticed_by_who_waits_next() {
    ENGINES.into_iter().for_each(a_journal_that_fills_up_while_nobody_waits_is_noticed_by_who_waits_next_on);
}

fn a_journal_that_fills_up_while_nobody_waits_is_noticed_by_who_waits_next_on(engine: IoEngine) {
    let place = tempfile::tempdir().expect("a place");
    holdfast_env::real::run(async {
        let (journal, _) = open(place.path(), engine).await;
        let log = begin(&journal).await;
        // As the cleaner does: it asks for news, looks, and is busy while the journal fills up to the last segment.
        let changed = journal.pressure_changed();
        let before = journal.pressure().used_percent;
        fill(&journal, &log, 1).await;
        assert!(journal.pressure().used_percent > before);
        let told = holdfast_env::timeout(Duration::from_secs(1), changed).await;
        assert!(told.is_ok(), "nothing changes in a full journal: who missed it would sleep");
    });
}

#[test]
fn what_overtakes_the_line_calls_nothing_committed_that_stands_in_it() {
    ENGINES.into_iter().for_each(what_overtakes_the_line_calls_nothing_committed_that_stands_in_it_on);
}

/// A new leader's entries, which are committed elsewhere, stand in line behind the truncation that makes room for them,
/// when what is known to be committed is written out of turn and the process ends.
fn what_overtakes_the_line_calls_nothing_committed_that_stands_in_it_on(engine: IoEngine) {
    let place = tempfile::tempdir().expect("a place");
    let anew = |index| EntryId { term: Term(2), ..id(index) };
    let cut = holdfast_env::real::run(async {
        let (journal, _) = open(place.path(), engine).await;
        let log = begin(&journal).await;
        let durable = fill(&journal, &log, 1).await;
        assert!(durable >= 20, "only {durable} were written");
        let cut = durable - 5;
        let truncating = log.clone();
        holdfast_env::spawn("truncation", async move {
            // The process ends while it stands in line.
            drop(truncating.truncate_after(Some(LogIndex(cut - 1))).await);
        });
        while log.last().is_some_and(|last| last.index.0 >= cut) {
            holdfast_env::yield_now().await;
        }
        for index in cut..cut + 4 {
            log.append(vec![LogEntry { id: anew(index), ..entry(index) }], Box::new(|_| {}));
        }
        log.note_committed(anew(cut + 3));
        within("what is committed", log.keep_committed(LogIndex(cut + 3))).await.expect("is written");
        cut
    });
    holdfast_env::real::run(async {
        let (_journal, recovered) = open(place.path(), engine).await;
        let log = recovered.expect("a log").log;
        let known = log.committed().expect("something is committed");
        assert!(known.index.0 < cut || known.term == Term(2), "{known:?} was never committed: cut at {cut}");
    });
}
