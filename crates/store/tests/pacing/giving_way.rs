//! The cleaner gives way to whoever writes, and stops giving way as the journal fills up (INV-YIELD).

use std::time::Duration;

use holdfast_store::testing::{Speed, plant, simulate};

use crate::bench::{Guest, SPEED, Store, Took};

/// A disk on which one flush of much data takes long.
const LAZY: Speed = Speed { flushed_per_second: 150_000_000, ..SPEED };

/// What a guest sees who writes little, while another one keeps the cleaner busy with so many requests of 64 KiB at once
/// and a pause after each. And what that one sees, the highest fill, and how long the cleaner paused.
fn beside(depth: u64, pause: u64) -> (Took, Took, u32, Duration) {
    simulate(1, async {
        let store = Store::new(32).await;
        store.device.set_speed(LAZY);
        let (one, other) = (store.volume(1).await, store.volume(2).await);
        let highest = crate::admission::watch(&store);
        let little = Guest { volume: one, depth: 1, bytes: 4096, pause: Duration::from_millis(1) };
        let much = Guest { volume: other, depth, bytes: 64 << 10, pause: Duration::from_millis(pause) };
        let time = Duration::from_secs(12);
        let both = futures_util::future::join(little.run(time), much.run(time)).await;
        let usage = store.journal.usage();
        println!(
            "little: median {:?}, 99 % {:?}, longest {:?}; much: {:.0} a second; at most {} %, paused for {:?}",
            both.0.within(50),
            both.0.within(99),
            both.0.longest(),
            both.1.rate(),
            highest.get(),
            usage.cleaners_paused
        );
        (both.0, both.1, highest.get(), usage.cleaners_paused)
    })
}

#[test]
fn who_writes_is_given_way_to() {
    let (little, much, highest, paused) = beside(1, 5);
    assert!(!paused.is_zero() && highest < 100);
    plant(&["never-give-way"]);
    let (held_up, as_much, ..) = beside(1, 5);
    assert!(held_up.longest() > 2 * little.longest(), "the cleaner holds up nobody");
    assert!(much.rate() > 0.95 * as_much.rate(), "who keeps it busy loses by it");
}

#[test]
fn a_cleaner_that_is_needed_gives_way_to_nobody() {
    let (_, much, highest, _) = beside(8, 0);
    assert!(highest < 100, "the line has stopped");
    plant(&["never-hurry"]);
    let (_, starved, ..) = beside(8, 0);
    assert!(much.rate() > 1.2 * starved.rate(), "it is not needed");
}
