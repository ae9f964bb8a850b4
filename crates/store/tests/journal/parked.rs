//! INV-ROOM beside a replica that does not run: nobody purges its log, and it holds up nobody; what of it is readable
//! stays so, and what is damaged stays damaged and known, wherever the power is cut.

use std::cell::Cell;
use std::time::Duration;

use bytes::Bytes;
use holdfast_store::journal::{GroupLog, Journal, RecoveredGroup, Recovery, StoreOptions};
use holdfast_store::testing::{Fault, Image, MemoryDisk, Tear, simulate};
use holdfast_store::{EntryId, LogEntry, ReplicaIdentity};
use holdfast_types::{GroupId, LogIndex, ReplicaId, Term};

use crate::life::identity;

const OPTIONS: StoreOptions = StoreOptions { segment_bytes: 2 << 20, segments: 8 };
const PARKED: ReplicaIdentity = ReplicaIdentity { group: GroupId(1), replica: ReplicaId(1) };
const BUSY: ReplicaIdentity = ReplicaIdentity { group: GroupId(2), replica: ReplicaId(1) };
/// Entries of the parked log: a good part of the segments that it shares with the other.
const ENTRIES: u64 = 40;
/// In the oldest segment.
const DAMAGED: u64 = 5;

fn entry(who: ReplicaIdentity, index: u64) -> LogEntry {
    let id = EntryId { term: Term(1), leader: ReplicaId(1), index: LogIndex(index) };
    // What the busy log writes beside the other one is small: nothing is purged of a journal that is full.
    let bytes = if who == BUSY && index >= ENTRIES { 256 << 10 } else { 64 << 10 };
    let mut payload = vec![(index * 7 + who.group.0 as u64) as u8; bytes];
    payload[..16].copy_from_slice(format!("{:>5}{index:>11}", who.group.0).as_bytes());
    LogEntry { id, kind: 1, head: Bytes::from_static(b"head"), payload: payload.into() }
}

async fn append(log: &GroupLog, index: u64) -> Result<(), String> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let who = log.id();
    log.append(vec![entry(who, index)], Box::new(move |result| drop(sender.send(result))));
    receiver.await.map_err(|error| error.to_string())?.map_err(|error| error.to_string())
}

async fn open(disk: &MemoryDisk) -> (Journal, Vec<RecoveredGroup>) {
    Journal::open(disk.directory(), &identity(), &OPTIONS).await.expect("opens")
}

/// A store whose one log has a damaged entry, and lies in the oldest segments.
fn with_a_damaged_log() -> Image {
    let disk = MemoryDisk::new(1);
    simulate(1, async {
        Journal::format(disk.directory(), &identity(), &OPTIONS).await.expect("formats");
        let (journal, _) = open(&disk).await;
        let parked = journal.create_group(PARKED).await.expect("creates");
        let busy = journal.create_group(BUSY).await.expect("creates");
        for index in 0..ENTRIES {
            append(&parked, index).await.expect("appends");
            // Others have something in the same segments.
            append(&busy, index).await.expect("appends");
            if index > 0 {
                busy.purge(entry(BUSY, index - 1).id).await.expect("purges");
            }
        }
        holdfast_env::sleep(Duration::from_millis(500)).await;
    });
    disk.kill();
    let head = entry(PARKED, DAMAGED).payload;
    let mut damaged = 0;
    for file in disk.names() {
        for (block, _) in disk.written(&file) {
            if disk.block(&file, block).starts_with(&head[..16]) {
                disk.rot(&file, block * 4096 + 100, 4);
                damaged += 1;
            }
        }
    }
    assert_eq!(damaged, 1, "the entry stands in one place");
    disk.image()
}

/// Many journals' worth of writes of the other log, each purged once it and the next are durable; notes what is.
async fn churn(busy: &GroupLog, entries: u64, durable: &Cell<u64>) -> Result<(), String> {
    let first = busy.last().map_or(0, |id| id.index.0 + 1);
    for index in first..first + entries {
        append(busy, index).await?;
        durable.set(index);
        if index > first {
            busy.purge(entry(BUSY, index - 1).id).await.map_err(|error| error.to_string())?;
        }
    }
    Ok(())
}

fn logs(recovered: Vec<RecoveredGroup>) -> (RecoveredGroup, GroupLog) {
    let (mut parked, mut busy) = (None, None);
    for group in recovered {
        if group.id == PARKED { parked = Some(group) } else { busy = Some(group.log) }
    }
    (parked.expect("the parked log"), busy.expect("the busy log"))
}

async fn check(parked: &RecoveredGroup) {
    assert!(!parked.vote_lost);
    assert_eq!(parked.state, Recovery::Faulty(vec![entry(PARKED, DAMAGED).id]));
    read_all(&parked.log, DAMAGED).await;
}

async fn read_all(log: &GroupLog, but: u64) {
    for index in (0..ENTRIES).filter(|index| *index != but) {
        let read = log.read(LogIndex(index), LogIndex(index + 1), 1).await.expect("is read");
        assert_eq!(read, [entry(PARKED, index)], "entry {index}");
    }
}

#[test]
fn a_log_that_nobody_purges_holds_up_nobody() {
    let image = with_a_damaged_log();
    let disk = MemoryDisk::from_image(&image, 2);
    simulate(2, async {
        let (journal, recovered) = open(&disk).await;
        let (parked, busy) = logs(recovered);
        check(&parked).await;
        parked.log.set_parked(true);
        let durable = Cell::default();
        let written = churn(&busy, 400, &durable);
        let ended = holdfast_env::timeout(Duration::from_secs(600), written).await;
        ended.expect("the store stands still").expect("is written");
        let usage = journal.usage();
        println!("{} bytes of journal for {} of payload", usage.bytes_written, 400 * (256 << 10));
        // A segment that is copied makes room for more than it takes.
        assert!(usage.bytes_written < 2 * 400 * (256 << 10), "{usage:?}");
        check(&parked).await;
    });
    disk.kill();
    simulate(3, async {
        let (_, recovered) = open(&disk).await;
        let (parked, _) = logs(recovered);
        check(&parked).await;
        parked.log.set_parked(true);
        let good = entry(PARKED, DAMAGED);
        assert_eq!(parked.log.repair(good.id, good.payload).await, Ok(true));
        read_all(&parked.log, u64::MAX).await;
    });
    disk.kill();
    simulate(4, async {
        let (parked, _) = logs(open(&disk).await.1);
        assert_eq!(parked.state, Recovery::Clean);
        read_all(&parked.log, u64::MAX).await;
    });
}

/// The repair and the copy of the same entry may be under way at once, in either order.
#[test]
fn a_repair_is_not_undone_by_a_copy() {
    let image = with_a_damaged_log();
    for round in 0..40 {
        let disk = MemoryDisk::from_image(&image, round);
        simulate(round, async {
            let (_journal, recovered) = open(&disk).await;
            let (parked, busy) = logs(recovered);
            // Until room is short; then the entries begin to leave the oldest segment as soon as they may.
            churn(&busy, 8, &Cell::default()).await.expect("writes");
            parked.log.set_parked(true);
            holdfast_env::sleep(Duration::from_micros(100 * round)).await;
            let good = entry(PARKED, DAMAGED);
            assert_eq!(parked.log.repair(good.id, good.payload).await, Ok(true));
            churn(&busy, 20, &Cell::default()).await.expect("writes");
        });
        disk.kill();
        simulate(round, async {
            let (parked, _) = logs(open(&disk).await.1);
            assert_eq!(parked.state, Recovery::Clean, "round {round}");
            read_all(&parked.log, u64::MAX).await;
        });
    }
}

#[test]
fn a_log_that_is_copied_survives_every_power_cut() {
    let image = with_a_damaged_log();
    let mut stop = 0;
    let mut cuts = 0;
    loop {
        let tear = if stop % 2 == 0 { Tear::Nothing } else { Tear::Random(stop) };
        let disk = MemoryDisk::from_image(&image, 5);
        let durable = Cell::new(0);
        let ended = simulate(5, async {
            let (_journal, recovered) = open(&disk).await;
            let (parked, busy) = logs(recovered);
            disk.at(disk.operations() + stop, Fault::Freeze);
            parked.log.set_parked(true);
            let written = Box::pin(churn(&busy, 60, &durable));
            matches!(
                futures_util::future::select(written, Box::pin(disk.frozen())).await,
                futures_util::future::Either::Left(_)
            )
        });
        if ended {
            break;
        }
        disk.power_cut(tear);
        simulate(6, async {
            let (_journal, recovered) = open(&disk).await;
            let (parked, busy) = logs(recovered);
            check(&parked).await;
            let last = busy.last().map_or(0, |id| id.index.0);
            assert!(
                last >= durable.get(),
                "stop {stop}: {} was durable, and {last} is the last",
                durable.get()
            );
            let read = busy.read(LogIndex(last), LogIndex(last + 1), 1).await.expect("is read");
            assert_eq!(read, [entry(BUSY, last)]);
            // And it goes on from there.
            parked.log.set_parked(true);
            churn(&busy, 40, &durable).await.expect("writes");
            check(&parked).await;
        });
        cuts += 1;
        stop += 1;
    }
    println!("{cuts} power cuts");
    assert!(cuts > 60, "{cuts}");
}
