//! INV-BUDGET: a store never takes more of its medium than it may, what was refused goes on when room was made, and nothing
//! is refused whose room was taken before. A budget that is smaller than what stands is as good as a full medium.

use std::io;
use std::rc::Rc;

use holdfast_env::disk::{AlignedBuffer, Directory, Durability, OpenMode};
use holdfast_store::testing::{MemoryDisk, Random, simulate};
use holdfast_store::{Budget, Reserve, StoreError};
use holdfast_types::{BLOCK_BYTES, CHUNK_BYTES};

use crate::crashes::formatted;
use crate::replica::{BLOCKS, Command, Reference, Replica, What};

const BLOCK: u64 = BLOCK_BYTES as u64;
/// What the store's reserve takes.
const RESERVE: u64 = 2 << 20;
/// The least that a budget may be beside a journal of that size.
const LEAST: u64 = 2 * RESERVE + (16 << 20);

async fn open(disk: &MemoryDisk, capacity: u64) -> (Budget, Rc<dyn Directory>) {
    let directory = disk.directory();
    let budget = Budget::open(&directory, Some(capacity), RESERVE).await.expect("opens");
    let guarded = budget.guard(directory);
    (budget, guarded)
}

fn is_refused<T>(outcome: &io::Result<T>) -> bool {
    outcome.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::QuotaExceeded)
}

#[test]
fn a_budget_that_holds_no_journal_is_refused() {
    simulate(1, async {
        let directory = MemoryDisk::new(1).directory();
        let refused = Budget::open(&directory, Some(LEAST - 1), RESERVE).await.err();
        assert_eq!(refused, Some(StoreError::Capacity { asked: LEAST - 1, least: LEAST }));
        let refused = Budget::open(&directory, Some(0), u64::MAX).await.err();
        assert_eq!(refused, Some(StoreError::Capacity { asked: 0, least: u64::MAX }));
        assert!(Budget::open(&directory, Some(LEAST), RESERVE).await.is_ok());
        let none = Budget::open(&directory, None, RESERVE).await.expect("opens");
        assert_eq!((none.capacity(), none.has_refused()), (None, false));
    });
}

#[test]
fn what_is_full_takes_no_more_and_what_stands_is_written_as_before() {
    let disk = MemoryDisk::new(1);
    simulate(1, async {
        let (budget, directory) = open(&disk, LEAST).await;
        let file = directory.open("a", OpenMode::CreateNew).await.expect("creates");
        file.allocate(0, LEAST).await.expect("fits");
        assert_eq!(directory.space().await.expect("space").available, 0);
        assert!(!budget.has_refused());
        assert!(is_refused(&file.allocate(LEAST, BLOCK).await));
        assert!(is_refused(
            &file.write_at(LEAST, AlignedBuffer::zeroed(BLOCK_BYTES), Durability::Volatile).await
        ));
        assert!(budget.has_refused());
        assert_eq!(disk.used(), LEAST);
        // What was taken is taken again without any, also by who opens it anew.
        let again = directory.open("a", OpenMode::Existing).await.expect("opens");
        for file in [&file, &again] {
            file.allocate(0, LEAST).await.expect("stands");
            let block = AlignedBuffer::zeroed(BLOCK_BYTES);
            file.write_at(LEAST - BLOCK, block, Durability::Durable).await.expect("stands");
        }
        // Room that is made is found when it is needed.
        file.punch(0, 4 * BLOCK).await.expect("punches");
        let other = directory.open("b", OpenMode::CreateNew).await.expect("creates");
        other.allocate(0, 3 * BLOCK).await.expect("there is room");
        assert!(is_refused(&other.allocate(3 * BLOCK, 2 * BLOCK).await));
        directory.remove("a").await.expect("removes");
        other.allocate(3 * BLOCK, LEAST - 3 * BLOCK).await.expect("there is room");
        assert_eq!(budget.count_now().await.expect("counts").total(), LEAST);
    });
}

/// Several users at once, each with files of its own.
#[test]
fn nobody_takes_more_than_the_budget_whatever_is_done_at_once() {
    for seed in 0..20 {
        let disk = MemoryDisk::new(seed);
        let limited = disk.clone();
        simulate(seed, async move {
            let (budget, directory) = open(&limited, LEAST).await;
            let users = (0..4).map(|user| user_of(seed * 10 + user, limited.clone(), directory.clone()));
            let refused: u64 = futures_util::future::join_all(users).await.into_iter().sum();
            assert!(refused > 10, "the budget was refused {refused} times");
            assert_eq!(budget.count_now().await.expect("counts").total(), limited.used());
            let left = directory.space().await.expect("space").available;
            assert_eq!(left, LEAST - limited.used(), "everything has ended, so it is known");
        });
    }
}

async fn user_of(seed: u64, disk: MemoryDisk, directory: Rc<dyn Directory>) -> u64 {
    let (random, name, mut refused) = (Random::new(seed), format!("f{seed}"), 0);
    let mut file = directory.open(&name, OpenMode::CreateNew).await.expect("creates");
    for _ in 0..120 {
        let (offset, length) = (random.below(3000) * BLOCK, (1 + random.below(900)) * BLOCK);
        let outcome = match random.below(8) {
            0..=3 => file.allocate(offset, length).await,
            // At its end, as a log is written.
            4 => {
                let end = file.size().await.expect("a size").length;
                let buffer = AlignedBuffer::zeroed(length as usize);
                file.write_at(end, buffer, Durability::Volatile).await.map(drop)
            }
            5 => file.punch(offset, length).await,
            6 => {
                file = directory.open(&name, OpenMode::Existing).await.expect("opens");
                Ok(())
            }
            _ if random.one_in(4) => {
                directory.remove(&name).await.expect("removes");
                file = directory.open(&name, OpenMode::CreateNew).await.expect("creates");
                Ok(())
            }
            _ => directory.rename(&name, &name).await,
        };
        refused += u64::from(is_refused(&outcome));
        assert!(is_refused(&outcome) || outcome.is_ok(), "{outcome:?}");
        let used = disk.used();
        assert!(used <= LEAST, "seed {seed}: {used} bytes stand, and {LEAST} are allowed");
    }
    refused
}

fn command(what: What, start: u64, count: u32) -> Command {
    Command { what, start, count }
}

fn text(error: StoreError) -> String {
    error.to_string()
}

async fn clean_tight(replica: &Replica) -> Result<(), String> {
    replica.flushed().await;
    let checkpoint = replica.data.clean_tight(replica).await.map_err(text)?;
    assert_eq!(checkpoint.id.index, replica.applied(), "everything is home");
    replica.log.purge(checkpoint.id).await.map_err(text)
}

/// Everything is trimmed, and there is room again.
async fn trims_make_room(replica: &Replica, reserve: &Reserve) -> Result<(), String> {
    replica.submit(command(What::Trim, 0, BLOCKS as u32));
    clean_tight(replica).await?;
    assert!(reserve.refill().await.map_err(text)? && !reserve.is_full(), "there is room again");
    replica.submit(command(What::Write, 0, 64));
    replica.flushed().await;
    replica.clean().await.map_err(text)?;
    assert_eq!(replica.check().await?, Vec::<u64>::new());
    Ok(())
}

#[test]
fn a_store_does_on_its_budget_what_it_does_on_a_full_medium() {
    let disk = MemoryDisk::from_image(&formatted(), 1);
    let reference = Rc::new(Reference::default());
    let lives = simulate(1, async {
        let (budget, directory) = open(&disk, LEAST).await;
        let replica = Replica::open(directory.clone(), &reference).await?;
        let reserve = Reserve::open(directory.clone(), RESERVE).await.map_err(text)?;
        assert!(!reserve.is_full());
        let mut full = false;
        for chunk in 0..BLOCKS / 64 {
            replica.submit(command(What::Write, chunk * 64, 64));
            replica.flushed().await;
            match replica.clean().await {
                Ok(()) => {}
                Err(error) if error.is_full() => {
                    full = true;
                    break;
                }
                Err(error) => return Err(text(error)),
            }
        }
        assert!(full && budget.has_refused(), "the budget was to be too small");
        assert!(disk.used() <= LEAST);
        reserve.give_up().await.map_err(text)?;
        clean_tight(&replica).await?;
        assert_eq!(replica.check().await?, Vec::<u64>::new());
        assert!(disk.used() <= LEAST);
        assert!(!reserve.refill().await.map_err(text)?, "the room of the reserve is used");
        trims_make_room(&replica, &reserve).await?;
        assert!(disk.used() <= LEAST);
        Ok(())
    });
    lives.unwrap_or_else(|why: String| panic!("{why}"));
}

/// The store was larger when it was closed than it may be now: the reserve stands, and more.
#[test]
fn a_store_beyond_its_budget_is_full_and_trims_make_room() {
    let disk = MemoryDisk::from_image(&formatted(), 1);
    let reference = Rc::new(Reference::default());
    let lives = simulate(1, async {
        let replica = Replica::open(disk.directory(), &reference).await?;
        drop(Reserve::open(disk.directory(), RESERVE).await.map_err(text)?);
        for chunk in 0..BLOCKS / 64 {
            replica.submit(command(What::Write, chunk * 64, 64));
            replica.flushed().await;
            replica.clean().await.map_err(text)?;
        }
        Ok(())
    });
    lives.unwrap_or_else(|why: String| panic!("{why}"));
    let stood = disk.used();
    assert!(stood > LEAST + CHUNK_BYTES);
    let lives = simulate(2, async {
        let (budget, directory) = open(&disk, LEAST).await;
        let replica = Replica::open(directory.clone(), &reference).await?;
        let reserve = Reserve::open(directory.clone(), RESERVE).await.map_err(text)?;
        assert!(reserve.is_full() && budget.has_refused(), "more stands than the store may take");
        assert_eq!(disk.allocated("reserve"), 0, "its room is for what makes room");
        let space = directory.space().await.map_err(|error| error.to_string())?;
        assert_eq!((space.total, space.available), (LEAST, RESERVE));
        // What waits in the journal comes home all the same.
        replica.submit(command(What::Write, 5, 3));
        clean_tight(&replica).await?;
        assert!(!reserve.refill().await.map_err(text)?);
        trims_make_room(&replica, &reserve).await?;
        assert!(disk.used() <= LEAST);
        // From now on the budget is all there is.
        let rest = directory.open("rest", OpenMode::CreateNew).await.expect("creates");
        assert!(is_refused(&rest.allocate(0, stood - disk.used()).await));
        rest.allocate(0, LEAST - disk.used()).await.map_err(|error| error.to_string())?;
        Ok(())
    });
    lives.unwrap_or_else(|why: String| panic!("{why}"));
}
