//! The power goes at every operation, either copy rots, the medium is full, there are more groups than lines.

use holdfast_types::GroupId;

use super::*;
use crate::testing::{Fault, MemoryDisk, Tear, simulate};

const CLUSTER: ClusterId = ClusterId(1);
const STORE: StoreId = StoreId(2);

fn of(group: u128, replica: u64) -> ReplicaIdentity {
    ReplicaIdentity { group: GroupId(group), replica: ReplicaId(replica) }
}

async fn open(disk: &MemoryDisk) -> DestroyedFile {
    DestroyedFile::open(disk.directory(), CLUSTER, STORE).await.expect("opens")
}

/// What happens to a store, one after the other.
#[derive(Clone, Copy)]
enum Event {
    Destroyed(ReplicaIdentity),
    Kept(ReplicaIdentity, u64),
}

const EVENTS: [Event; 5] = [
    Event::Destroyed(ReplicaIdentity { group: GroupId(7), replica: ReplicaId(3) }),
    Event::Destroyed(ReplicaIdentity { group: GroupId(8), replica: ReplicaId(4) }),
    Event::Kept(ReplicaIdentity { group: GroupId(7), replica: ReplicaId(5) }, 12),
    Event::Destroyed(ReplicaIdentity { group: GroupId::CATALOG, replica: ReplicaId(1 << 47 | 9) }),
    Event::Destroyed(ReplicaIdentity { group: GroupId(7), replica: ReplicaId(6) }),
];

impl Event {
    async fn note(self, file: &DestroyedFile) -> Result<(), StoreError> {
        match self {
            Self::Destroyed(id) => file.note_destroyed(id).await,
            Self::Kept(id, revision) => file.note_kept(id, revision).await,
        }
    }
    fn is_known(self, file: &DestroyedFile) -> bool {
        match self {
            Self::Destroyed(id) => file.may_make(id).is_err(),
            Self::Kept(id, revision) => file.may_destroy(id, revision - 1).is_err(),
        }
    }
}

/// Lives through the events until the disk stops; how many were noted.
fn live(disk: &MemoryDisk) -> usize {
    let noted = Rc::new(Cell::new(0));
    let (count, of) = (noted.clone(), disk.clone());
    simulate(1, async move {
        let events = async {
            let file = DestroyedFile::open(of.directory(), CLUSTER, STORE).await?;
            for event in EVENTS.iter().skip(count.get()) {
                event.note(&file).await?;
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
        let known: Vec<bool> = EVENTS.iter().map(|event| event.is_known(&file)).collect();
        let count = known.iter().take_while(|known| **known).count();
        assert!(known[count..].iter().all(|known| !known), "{what}: {known:?}");
        assert!(count == noted || count == noted + 1, "{what}: {noted} were noted, {count} are known");
        assert_eq!(file.may_make(of(7, 9)), Ok(()), "{what}: a later replica of the group may come");
        assert_eq!(file.may_make(of(9, 1)), Ok(()), "{what}: and any of another group");
        assert_eq!(file.may_destroy(of(7, 5), 12), Ok(()), "{what}: what is decided later is obeyed");
        assert_eq!(file.may_destroy(of(8, 5), 0), Ok(()), "{what}: and nobody else was taken back");
    });
}

#[test]
fn what_was_destroyed_is_known_whenever_the_power_goes() {
    let whole = MemoryDisk::new(1);
    assert_eq!(live(&whole), EVENTS.len());
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
        check(&disk, EVENTS.len(), &format!("copy {copy} cannot be read"));
    }
}

#[test]
fn a_store_that_cannot_say_what_it_destroyed_makes_nothing() {
    let disk = MemoryDisk::new(1);
    live(&disk);
    disk.rot(NAME, 30, 1);
    disk.rot(NAME, COPY_BYTES as u64 + 30, 1);
    // The second time round, too: opening it has healed nothing.
    for _ in 0..2 {
        simulate(1, async {
            let file = open(&disk).await;
            assert_eq!(file.may_make(of(9, 900)), Err(Remembered::Unreadable));
            file.note_destroyed(of(7, 6)).await.expect("what is here can go");
            file.note_kept(of(7, 6), 3).await.expect_err("nobody is promised what cannot be remembered");
        });
    }
}

#[test]
fn the_file_of_another_store_is_refused_and_none_is_empty() {
    let disk = MemoryDisk::new(1);
    simulate(1, async {
        let file = open(&disk).await;
        assert_eq!(file.may_make(of(7, 1)), Ok(()));
        assert!(disk.names().is_empty(), "a store that has destroyed nothing has no file");
        file.note_destroyed(of(7, 1)).await.expect("notes");
        let other = DestroyedFile::open(disk.directory(), CLUSTER, StoreId(9)).await.map(drop);
        assert!(matches!(other, Err(StoreError::Identity { .. })), "{other:?}");
    });
}

#[test]
fn a_full_medium_refuses_at_first_and_takes_no_more_room_later() {
    let disk = MemoryDisk::new(1);
    simulate(1, async {
        let file = open(&disk).await;
        disk.limit_space(Some(4096));
        let refused = file.note_destroyed(of(7, 1)).await.expect_err("there is no room");
        assert!(refused.is_full(), "{refused:?}");
        assert!(file.may_make(of(7, 1)).is_err(), "it may be gone by the next try");
        disk.limit_space(None);
        file.note_destroyed(of(7, 1)).await.expect("notes");
        disk.limit_space(Some(disk.used()));
        for group in 8..2000 {
            file.note_destroyed(of(group, 2)).await.expect("has its room");
        }
    });
    disk.power_cut(Tear::Nothing);
    simulate(2, async {
        let file = open(&disk).await;
        assert!(file.may_make(of(7, 1)).is_err());
        assert!(file.may_make(of(1999, 2)).is_err());
    });
}

#[test]
fn it_is_bounded_and_forgets_nothing_that_it_drops() {
    let disk = MemoryDisk::new(1);
    let groups = GROUPS_MAX as u64 + 50;
    simulate(1, async {
        let file = open(&disk).await;
        {
            let mut memory = file.memory.borrow_mut();
            memory.keep(of(5, 5), 8).expect("is kept");
            (10..groups).for_each(|id| memory.destroy(of(id.into(), id)).expect("has room"));
            (0..DRAWN_MAX as u64).for_each(|id| {
                let id = ReplicaIdentity { group: GroupId::CATALOG, replica: ReplicaId(1 << 47 | id) };
                memory.destroy(id).expect("has room");
            });
            assert_eq!(memory.groups.len(), GROUPS_MAX);
        }
        let one_more = ReplicaIdentity { group: GroupId::CATALOG, replica: ReplicaId(1) };
        file.note_destroyed(one_more).await.expect_err("it would be forgotten");
        file.note_destroyed(of(groups.into(), groups)).await.expect("notes");
        let file = open(&disk).await;
        for id in 10..=groups {
            assert!(file.may_make(of(id.into(), id)).is_err(), "{id}");
            assert_eq!(file.may_make(of(id.into(), groups + 1)), Ok(()), "{id}");
        }
        assert!(file.may_destroy(of(5, 5), 7).is_err(), "one that stands keeps its line");
        file.note_destroyed(of(5, 5)).await.expect("notes");
        assert_eq!(file.may_destroy(of(5, 5), 7), Ok(()), "and has none when it is gone");
    });
}

/// The bytes, as docs/FORMAT.md has them: a copy of this version is read for ever.
#[test]
fn a_copy_of_this_format_is_read() {
    let golden = include_bytes!("../../tests/golden/destroyed-1");
    let line =
        |destroyed, kept, revision| Line { destroyed: ReplicaId(destroyed), kept: ReplicaId(kept), revision };
    let expected = Memory {
        cluster: CLUSTER,
        store: STORE,
        generation: 4,
        floor: ReplicaId(2),
        groups: [(GroupId(7), line(3, 0, 0)), (GroupId(8), line(4, 5, 12))].into(),
        drawn: [ReplicaId(1 << 47 | 9)].into(),
    };
    let bytes = expected.encode();
    let end = bytes.as_slice().iter().rposition(|byte| *byte != 0).expect("is not empty") + 1;
    assert_eq!(&bytes.as_slice()[..end], golden, "the format has changed: raise its version");
    let mut copy = golden.to_vec();
    copy.resize(4096, 0);
    assert_eq!(Memory::decode(&copy), Ok(expected));
}
