//! The power goes at every operation, either copy rots, requests come twice, late, and for other recoveries.

use super::*;
use crate::testing::{Fault, MemoryDisk, Tear, simulate};

const CLUSTER: ClusterId = ClusterId(1);
const STORE: StoreId = StoreId(2);
const OLD: GroupId = GroupId(7);
const NEW: GroupId = GroupId(70);
const NEXT: GroupId = GroupId(700);

fn of(group: GroupId, replica: u64) -> ReplicaIdentity {
    ReplicaIdentity { group, replica: ReplicaId(replica) }
}

fn order(number: u64, id: u128) -> Order {
    Order { number, id: RecoveryId(id) }
}

fn entry(index: u64) -> EntryId {
    EntryId { term: Term(3), leader: ReplicaId(2), index: LogIndex(index) }
}

async fn open(disk: &MemoryDisk) -> RecoveryFile {
    RecoveryFile::open(disk.directory(), CLUSTER, STORE).await.expect("opens")
}

fn barred<T: std::fmt::Debug>(outcome: Result<T, RecoveryError>) -> Barred {
    match outcome {
        Err(RecoveryError::Barred(barred)) => barred,
        other => panic!("it is not refused: {other:?}"),
    }
}

/// What happens to a store, one after the other.
const EVENTS: usize = 4;

async fn event(file: &RecoveryFile, number: usize) -> Result<(), StoreError> {
    let done = match number {
        0 => file.seal(of(OLD, 1), order(2, 5), entry(90)).await.map(drop),
        1 => file.seal(of(GroupId(8), 4), order(2, 6), entry(9)).await.map(drop),
        2 => file.take_over(of(OLD, 1), NEW, order(2, 5)).await,
        _ => file.seal(of(NEW, 1), order(3, 9), entry(120)).await.map(drop),
    };
    done.map_err(|error| match error {
        RecoveryError::Store(error) => error,
        RecoveryError::Barred(barred) => panic!("event {number}: {barred}"),
    })
}

fn is_known(file: &RecoveryFile, number: usize) -> bool {
    let line = file.lines().into_iter().find(|(id, _)| id.replica == ReplicaId(1)).map(|(_, line)| line);
    match number {
        0 => line.is_some(),
        1 => file.superseded(GroupId(8)) == Some(order(2, 6)),
        2 => line.is_some_and(|line| line.group == NEW && line.before == OLD && line.fork == entry(90)),
        _ => file.superseded(NEW) == Some(order(3, 9)),
    }
}

/// Lives through the events until the disk stops; how many were noted.
fn live(disk: &MemoryDisk) -> usize {
    let noted = Rc::new(Cell::new(0));
    let (count, of) = (noted.clone(), disk.clone());
    simulate(1, async move {
        let events = async {
            let file = RecoveryFile::open(of.directory(), CLUSTER, STORE).await?;
            for number in count.get()..EVENTS {
                event(&file, number).await?;
                count.set(count.get() + 1);
            }
            Ok::<(), StoreError>(())
        };
        let stopped = std::pin::pin!(of.frozen());
        if let futures_util::future::Either::Left((ended, _)) =
            futures_util::future::select(std::pin::pin!(events), stopped).await
        {
            ended.expect("the disk does what it is told");
        }
    });
    noted.get()
}

/// Of the events exactly the first are known: those that were noted, and perhaps one that was being noted.
fn check(disk: &MemoryDisk, noted: usize, what: &str) {
    simulate(2, async {
        let file = open(disk).await;
        let known: Vec<bool> = (0..EVENTS).map(|number| is_known(&file, number)).collect();
        let count = known.iter().take_while(|known| **known).count();
        assert!(known[count..].iter().all(|known| !known), "{what}: {known:?}");
        assert!(count == noted || count == noted + 1, "{what}: {noted} were noted, {count} are known");
        let runs = file.may_run(of(OLD, 1));
        match count {
            0 => assert_eq!(runs, Ok(of(OLD, 1)), "{what}"),
            3 => assert_eq!(runs, Ok(of(NEW, 1)), "{what}"),
            _ => assert!(matches!(runs, Err(Barred::Superseded { .. })), "{what}: {runs:?}"),
        }
        assert_eq!(
            file.may_run(of(GroupId(9), 1)),
            Ok(of(GroupId(9), 1)),
            "{what}: nobody else is concerned"
        );
    });
}

#[test]
fn what_was_sealed_is_known_whenever_the_power_goes() {
    let whole = MemoryDisk::new(1);
    assert_eq!(live(&whole), EVENTS);
    let tears = [Tear::Nothing, Tear::Everything, Tear::Sectors(0x0f), Tear::Random(3), Tear::Random(4)];
    // The last time after everything.
    for cut in 0..=whole.operations() {
        for tear in tears {
            let disk = MemoryDisk::new(1);
            disk.at(cut, Fault::Freeze);
            let noted = live(&disk);
            disk.power_cut(tear);
            check(&disk, noted, &format!("cut at {cut}, {tear:?}"));
            // Opening it has made both copies equal: either may rot now.
            for copy in 0..2 {
                let rotten = disk.copy();
                if rotten.names().iter().any(|name| name == NAME) && noted > 0 {
                    rotten.rot(NAME, copy * COPY_BYTES as u64 + 30, 1);
                }
                check(&rotten, noted, &format!("cut at {cut}, {tear:?}, copy {copy} has rotted"));
            }
        }
    }
}

#[test]
fn either_copy_is_as_new_as_what_was_answered() {
    let whole = MemoryDisk::new(1);
    live(&whole);
    for copy in 0..2 {
        let disk = whole.copy();
        disk.power_cut(Tear::Nothing);
        disk.make_unreadable(NAME, copy * (COPY_BYTES / 4096) as u64);
        check(&disk, EVENTS, &format!("copy {copy} cannot be read"));
    }
}

#[test]
fn a_store_that_cannot_say_what_was_sealed_runs_nothing() {
    let disk = MemoryDisk::new(1);
    live(&disk);
    disk.rot(NAME, 30, 1);
    disk.rot(NAME, COPY_BYTES as u64 + 30, 1);
    simulate(1, async {
        let file = open(&disk).await;
        assert_eq!(file.may_run(of(GroupId(9), 1)), Err(Barred::Unreadable));
        assert_eq!(file.may_make(of(GroupId(9), 1)), Err(Barred::Unreadable));
        assert_eq!(barred(file.seal(of(OLD, 1), order(2, 5), entry(1)).await), Barred::Unreadable);
    });
}

#[test]
fn what_comes_twice_or_late_changes_nothing() {
    let disk = MemoryDisk::new(1);
    simulate(1, async {
        let file = open(&disk).await;
        let (first, next) = (order(2, 5), order(3, 9));
        let never = barred(file.take_over(of(OLD, 1), NEW, first).await);
        assert!(matches!(never, Barred::NotSealed { .. }), "{never}");
        assert!(disk.names().is_empty(), "where nothing was recovered there is no file");
        for again in 0..3 {
            let last = file.seal(of(OLD, 1), first, entry(90 + again)).await.expect("is sealed");
            assert_eq!(last, entry(90), "its log ends where it did when it was sealed");
        }
        for _ in 0..2 {
            file.take_over(of(OLD, 1), NEW, first).await.expect("goes on");
            assert_eq!(file.may_run(of(OLD, 1)), Ok(of(NEW, 1)));
            assert_eq!(file.seal(of(OLD, 1), first, entry(200)).await.expect("was sealed"), entry(90));
        }
        assert_eq!((file.files_of(of(NEW, 1)), file.fork_of(of(NEW, 1))), (of(OLD, 1), LogIndex(90)));
        // What was decided about the former group does not touch the files.
        assert!(file.may_destroy(of(OLD, 1)).is_err() && file.may_make(of(OLD, 3)).is_err());
        assert!(file.may_destroy(of(NEW, 1)).is_ok() && file.may_make(of(NEW, 3)).is_ok());
        // A later recovery of what goes on.
        file.seal(of(NEW, 1), next, entry(120)).await.expect("is sealed");
        let late = barred(file.take_over(of(OLD, 1), NEW, first).await);
        assert!(matches!(late, Barred::Superseded { number: 3, .. }), "{late}");
        file.take_over(of(NEW, 1), NEXT, next).await.expect("goes on");
        assert_eq!(file.may_run(of(OLD, 1)), Ok(of(NEXT, 1)));
        assert_eq!([OLD, NEW, NEXT].map(|group| file.superseded(group)), [Some(next), Some(next), None]);
        let late = barred(file.seal(of(NEW, 1), order(2, 77), entry(1)).await);
        assert!(matches!(late, Barred::Superseded { number: 3, .. }), "{late}");
        assert_eq!(file.may_run(of(OLD, 1)), Ok(of(NEXT, 1)));
        file.forget(of(OLD, 1)).await.expect("is forgotten");
        assert!(file.lines().is_empty());
    });
}

#[test]
fn two_recoveries_of_one_replica_halt_it_with_both_ids_named() {
    let (mine, other) = (order(2, 5), order(2, 6));
    for restart in [false, true] {
        let disk = MemoryDisk::new(1);
        simulate(1, async {
            let mut file = open(&disk).await;
            file.seal(of(OLD, 1), mine, entry(90)).await.expect("is sealed");
            let rivals = Barred::Rivals { replica: ReplicaId(1), ours: RecoveryId(5), theirs: RecoveryId(6) };
            assert_eq!(barred(file.seal(of(OLD, 1), other, entry(90)).await), rivals);
            assert_eq!(barred(file.take_over(of(OLD, 1), GroupId(71), other).await), rivals);
            // Where one of them was carried out, that one goes on no more.
            file.take_over(of(OLD, 1), NEW, mine).await.expect("goes on");
            assert_eq!(barred(file.seal(of(OLD, 1), other, entry(90)).await), rivals);
            assert_eq!(barred(file.take_over(of(OLD, 1), NEW, mine).await), rivals, "an old request");
            if restart {
                file = open(&disk).await;
            }
            assert_eq!(file.may_run(of(OLD, 1)), Err(rivals));
            // A recovery of what has halted decides.
            file.seal(of(NEW, 1), order(3, 9), entry(95)).await.expect("is sealed");
            file.take_over(of(NEW, 1), NEXT, order(3, 9)).await.expect("goes on");
            assert_eq!(file.may_run(of(OLD, 1)), Ok(of(NEXT, 1)));
        });
    }
}

#[test]
fn the_file_of_another_store_is_refused_and_it_is_bounded() {
    let disk = MemoryDisk::new(1);
    simulate(1, async {
        let file = open(&disk).await;
        for replica in 1..=LINES_MAX as u64 {
            let id = of(GroupId(replica.into()), replica);
            file.seal(id, order(2, 5), entry(1)).await.expect("has room");
        }
        let more = file.seal(of(GroupId(5000), 5000), order(2, 5), entry(1)).await;
        assert!(matches!(more, Err(RecoveryError::Store(StoreError::Failed(_)))), "{more:?}");
        assert_eq!(file.may_run(of(GroupId(5000), 5000)), Ok(of(GroupId(5000), 5000)));
        let other = RecoveryFile::open(disk.directory(), CLUSTER, StoreId(9)).await.map(drop);
        assert!(matches!(other, Err(StoreError::Identity { .. })), "{other:?}");
    });
}

/// The bytes, as docs/FORMAT.md has them: a copy of this version is read for ever.
#[test]
fn a_copy_of_this_format_is_read() {
    let golden = include_bytes!("../../tests/golden/recoveries-1");
    let adopted = Line { before: OLD, order: order(2, 5), fork: entry(90), ..Line::of(NEW) };
    let sealed = Some(Sealed { order: order(2, 6), last: entry(9) });
    let expected = Memory {
        cluster: CLUSTER,
        store: STORE,
        generation: 4,
        lines: Lines(
            [
                (of(OLD, 1), Line { rival: RecoveryId(8), ..adopted }),
                (of(GroupId(8), 4), Line { sealed, ..Line::of(GroupId(8)) }),
            ]
            .into(),
        ),
    };
    let bytes = expected.encode();
    let end = bytes.as_slice().iter().rposition(|byte| *byte != 0).expect("is not empty") + 1;
    assert_eq!(&bytes.as_slice()[..end], golden, "the format has changed: raise its version");
    let mut copy = golden.to_vec();
    copy.resize(4096, 0);
    assert_eq!(Memory::decode(&copy), Ok(expected));
}
