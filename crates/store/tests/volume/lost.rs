//! What the medium loses though it said that it had it, what stands where it does not belong, and what belongs to
//! somebody else.

use std::rc::Rc;

use holdfast_env::disk::Directory;
use holdfast_store::journal::Journal;
use holdfast_store::testing::{Fault, Image, MemoryDisk, Tear, simulate};
use holdfast_store::volume::VolumeData;
use holdfast_store::{ReplicaIdentity, StoreError, StoreIdentity};
use holdfast_types::{BLOCK_BYTES, ClusterId, NodeName, ReplicaId, StoreId};

use crate::crashes::{clean_twice_more, cleaned_once, formatted, live};
use crate::replica::{Reference, Replica, file_identity, identity, options};

#[test]
fn what_was_made_is_there_after_a_power_cut() {
    let disk = MemoryDisk::new(0);
    simulate(1, Replica::create(disk.directory()));
    disk.power_cut(Tear::Nothing);
    let reference = Rc::new(Reference::default());
    live(&disk, &reference, 2, |_| async { Ok(()) }).unwrap_or_else(|why| panic!("{why}"));
}

/// Opens the replica: it is refused, or every block is right or called bad.
fn right_or_bad(disk: &MemoryDisk, reference: &Rc<Reference>) -> Result<usize, String> {
    let opened = simulate(8, async {
        match Replica::open(disk.directory(), reference).await {
            Ok(replica) => replica.check().await.map(Some),
            Err(_) => Ok(None),
        }
    });
    Ok(opened?.map_or(1, |bad| bad.len()))
}

/// One write of home, table or manifest is lost, and the power goes at some moment after it.
fn lost_write(image: &Image, number: u64, after: u64) -> Result<usize, String> {
    let (disk, reference) = cleaned_once(image, 1)?;
    disk.at(number, Fault::Lose);
    disk.at(number + after, Fault::Freeze);
    clean_twice_more(&disk, &reference)?;
    disk.power_cut(Tear::Nothing);
    let first = right_or_bad(&disk, &reference)?;
    // It is not forgotten that something is lost.
    disk.kill();
    Ok(first.max(right_or_bad(&disk, &reference)?))
}

#[test]
fn a_lost_write_of_home_table_or_manifest_is_never_read_as_something_else() {
    let image = formatted();
    let (disk, reference) = cleaned_once(&image, 1).expect("lives");
    let begin = disk.operations();
    clean_twice_more(&disk, &reference).expect("lives");
    let writes: Vec<u64> =
        ["/home", "/table", "/manifest"].iter().flat_map(|end| disk.writes_to(end, begin)).collect();
    let (mut cases, mut noticed) = (0, 0);
    for number in writes {
        for after in (1..12).chain([1000]) {
            let found = lost_write(&image, number, after)
                .unwrap_or_else(|why| panic!("write {number} is lost, {after} later the power goes: {why}"));
            cases += 1;
            noticed += u32::from(found > 0);
        }
    }
    println!("{cases} cases, {noticed} noticed");
    assert!(cases > 100 && noticed > 20, "{cases} cases, {noticed} noticed");
}

#[test]
fn after_any_cut_of_a_cleaning_pass_either_copy_of_every_page_may_rot() {
    let image = formatted();
    for tear in [Tear::Nothing, Tear::Everything] {
        for stop in 0.. {
            let (disk, reference) = cleaned_once(&image, 1).expect("lives");
            let begin = disk.operations();
            disk.at(begin + stop, Fault::Freeze);
            clean_twice_more(&disk, &reference).expect("lives");
            let stopped = disk.operations() > begin + stop;
            disk.power_cut(tear);
            live(&disk, &reference, 3, |_| async { Ok(()) }).expect("lives");
            disk.power_cut(Tear::Nothing);
            let image = disk.image();
            for copy in 0..2 {
                let disk = MemoryDisk::from_image(&image, copy);
                let table = disk.names().into_iter().find(|name| name.ends_with("/table")).expect("is there");
                for (block, _) in disk.written(&table).into_iter().filter(|(block, _)| block % 2 == copy) {
                    disk.rot(&table, block * BLOCK_BYTES as u64 + 30, 1);
                }
                live(&disk, &reference, 4, |_| async { Ok(()) })
                    .unwrap_or_else(|why| panic!("stopped at {stop}, copies {copy} rotten: {why}"));
            }
            if !stopped {
                break;
            }
        }
    }
}

#[test]
fn a_store_of_somebody_else_is_refused() {
    let disk = MemoryDisk::from_image(&formatted(), 1);
    let strangers = [
        StoreIdentity { cluster: ClusterId(9), ..identity() },
        StoreIdentity { node: NodeName::new("other"), ..identity() },
        StoreIdentity { store: StoreId(9), ..identity() },
    ];
    for stranger in strangers {
        let opened = simulate(1, async {
            Journal::open(disk.directory(), &stranger, &options()).await.map(|(_, groups)| groups.len())
        });
        assert!(matches!(opened, Err(StoreError::Identity { .. })), "{stranger:?}: {opened:?}");
    }
}

/// As when an operator copies directories about: each file says whose it is.
#[test]
fn the_files_of_another_replica_are_refused() {
    let disk = MemoryDisk::from_image(&formatted(), 1);
    simulate(1, async {
        let (journal, mut groups) =
            Journal::open(disk.directory(), &identity(), &options()).await.expect("opens");
        let log = Rc::new(groups.pop().expect("the group").log);
        let mine = file_identity();
        let id = ReplicaIdentity { replica: ReplicaId(2), ..mine.id };
        let place = |id: ReplicaIdentity| format!("replicas/{}-{}/", id.group, id.replica);
        for name in disk.list(&place(mine.id)).await.expect("lists") {
            let end = name.strip_prefix(&place(mine.id)).expect("listed by it");
            disk.rename(&name, &format!("{}{end}", place(id))).await.expect("renames");
        }
        let opened = VolumeData::open(
            disk.directory(),
            &{
                let mut other = mine;
                other.id = id;
                other
            },
            log,
        )
        .await;
        assert!(matches!(opened.map(drop), Err(StoreError::Identity { .. })));
        drop(journal);
    });
}
