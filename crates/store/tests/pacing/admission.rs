//! Writers are slowed as the journal fills up, each a little and in turn (INV-ADMIT).

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use holdfast_env::Instant;
use holdfast_store::testing::{plant, simulate};

use crate::bench::{Guest, MIB, Store, Took, Volume};

const REQUEST: u64 = 64 << 10;

/// Asks for all that it can get, from so many requests at once.
fn big(volume: Rc<Volume>, depth: u64) -> Guest {
    Guest { volume, depth, bytes: REQUEST, pause: Duration::ZERO }
}

/// The highest fill of the line, in percent, as long as somebody looks.
pub fn watch(store: &Store) -> Rc<Cell<u32>> {
    let (highest, journal) = (Rc::new(Cell::new(0)), store.journal.clone());
    let noted = Rc::downgrade(&highest);
    holdfast_env::spawn("watch", async move {
        while let Some(noted) = noted.upgrade() {
            noted.set(noted.get().max(journal.pressure().line_percent));
            drop(noted);
            holdfast_env::sleep(Duration::from_millis(1)).await;
        }
    });
    highest
}

/// What a guest sees who writes as fast as it can, for longer than the journal has room; and the highest fill.
fn overload(segments: u32, seconds: u64) -> (Took, u32) {
    simulate(1, async {
        let store = Store::new(segments).await;
        let (volume, highest) = (store.volume(1).await, watch(&store));
        let took = big(volume, 4).run(Duration::from_secs(seconds)).await;
        let written = took.times.len() as u64 * REQUEST / MIB;
        assert!(
            written > 4 * u64::from(segments) * 2,
            "{written} MiB went through the journal several times"
        );
        let usage = store.journal.usage();
        println!(
            "{segments} segments: {:.0} writes a second, mean {:?}, longest {:?}, {} slowed for {:?}, at most {} %",
            took.rate(),
            took.mean(),
            took.longest(),
            usage.slowed_writes,
            usage.slowed_for,
            highest.get()
        );
        (took, highest.get())
    })
}

#[test]
fn writers_who_outrun_the_cleaner_are_slowed_evenly_and_the_line_never_stops() {
    for segments in [4, 6, 16] {
        let (took, highest) = overload(segments, 8);
        assert!(took.longest() < 8 * took.mean(), "there is a cliff");
        assert!(highest < 100, "the line has stopped");
    }
}

#[test]
fn without_admission_they_run_into_the_end_of_the_line() {
    let (paced, _) = overload(16, 8);
    plant(&["no-admission"]);
    let (free, highest) = overload(16, 8);
    assert!(highest >= 98, "the line had room all the time");
    assert!(free.longest() > 3 * paced.longest(), "there is no cliff to be seen");
    assert!(paced.rate() > 0.9 * free.rate(), "what is taken from the cliff is not lost");
}

/// How long writes take of a volume that writes little, beside one that writes as fast as it can, and of that one.
fn beside() -> (Took, Took) {
    simulate(1, async {
        let store = Store::new(6).await;
        let (one, other) = (store.volume(1).await, store.volume(2).await);
        let seldom = Guest { volume: one, depth: 1, bytes: 4096, pause: Duration::from_millis(5) };
        let time = Duration::from_secs(5);
        let both = futures_util::future::join(seldom.run(time), big(other, 64).run(time)).await;
        println!("little: mean {:?}, longest {:?}", both.0.mean(), both.0.longest());
        println!("much: mean {:?}, longest {:?}", both.1.mean(), both.1.longest());
        both
    })
}

#[test]
fn who_writes_little_is_hardly_slowed_by_who_writes_much() {
    let (little, much) = beside();
    assert!(little.mean() * 4 < much.mean(), "it waits as who writes much does");
    plant(&["first-come"]);
    let (unfair, _) = beside();
    assert!(unfair.mean() > 3 * little.mean(), "in one line it would not wait longer");
}

/// Writes of a volume in so many seconds, whose guest gives up waiting again and again.
async fn impatient(volume: Rc<Volume>, seconds: u64) -> usize {
    let until = Instant::now() + Duration::from_secs(seconds);
    let workers = (0..64).map(|worker: u64| {
        let volume = volume.clone();
        holdfast_env::spawn("impatient", async move {
            let mut writes = 0;
            while Instant::now() < until {
                let (start, payload) = ((worker * 100 + writes) * 16, vec![1; REQUEST as usize].into());
                volume.write_impatiently(start, payload, Duration::from_millis(30)).await;
                writes += 1;
            }
            writes
        })
    });
    let mut all = 0;
    for worker in workers.collect::<Vec<_>>() {
        all += worker.await.expect("ends");
    }
    all as usize
}

#[test]
fn who_gives_up_waiting_again_and_again_has_its_share_all_the_same() {
    simulate(1, async {
        let store = Store::new(6).await;
        let (one, other) = (store.volume(1).await, store.volume(2).await);
        let patient = big(other, 64).run(Duration::from_secs(5));
        let (impatient, patient) = futures_util::future::join(impatient(one, 5), patient).await;
        println!("{impatient} writes of the impatient, {} of the patient", patient.times.len());
        assert!(impatient * 2 > patient.times.len(), "what it did not get counts against it");
    });
}
