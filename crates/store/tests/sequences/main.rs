//! Every short sequence of operations on one replica, stopped at every moment, with every way in which what was not
//! flushed may be left: everything acknowledged is there, nothing is invented, every block reads right, and a recovery
//! may be repeated and stopped as often as it likes.
//!
//! `HOLDFAST_DEPTH` says how long the sequences are; `cargo xtask store --depth 4` is the long form.

mod crash;
mod model;
mod ops;
mod start;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};

use holdfast_store::testing::plant;

use crash::Tried;
use ops::{Op, is_idle, is_of_layers};
use start::Start;

/// Operations of the longest sequences here.
const DEPTH: usize = 3;

fn depth() -> usize {
    std::env::var("HOLDFAST_DEPTH").ok().and_then(|text| text.parse().ok()).unwrap_or(DEPTH)
}

/// Sequence `number` of those of `length` operations.
fn sequence(ops: &[Op], mut number: usize, length: usize) -> Vec<Op> {
    let mut out = Vec::with_capacity(length);
    for _ in 0..length {
        out.push(ops[number % ops.len()]);
        number /= ops.len();
    }
    out
}

/// All of up to `depth` operations.
fn sequences(ops: &[Op], depth: usize) -> impl Iterator<Item = Vec<Op>> {
    let all = (1..=depth).flat_map(move |length| {
        (0..ops.len().pow(length as u32)).map(move |number| sequence(ops, number, length))
    });
    all.filter(|sequence| !is_idle(sequence))
}

/// A panic is an answer, too: INV-LAYER is asserted where commands are repeated.
fn crash_everywhere(start: &Start, sequence: &[Op]) -> Result<Tried, String> {
    let found = catch_unwind(AssertUnwindSafe(|| crash::every_crash(start, sequence)));
    found.unwrap_or_else(|_| Err("it panics".into())).map_err(|why| format!("{sequence:?}: {why}"))
}

/// Every crash of sequences, on as many threads as there are processors.
fn every_crash(begin: fn() -> Start, all: &[Vec<Op>]) -> Result<Tried, String> {
    let next = AtomicUsize::new(0);
    let work = || {
        let start = begin();
        let mut tried = Tried::default();
        while let Some(sequence) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
            match crash_everywhere(&start, sequence) {
                Ok(added) => tried.add(added),
                Err(why) => {
                    next.store(all.len(), Ordering::Relaxed);
                    return Err(why);
                }
            }
        }
        Ok(tried)
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let mut total = Tried::default();
        for worker in workers {
            total.add(worker.join().expect("a worker ends")?);
        }
        Ok(total)
    })
}

#[test]
fn every_crash_of_every_short_sequence() {
    let all: Vec<_> = sequences(&Op::PLAIN, depth()).collect();
    let tried = every_crash(Start::plain, &all).unwrap_or_else(|why| panic!("{why}"));
    println!("up to {} operations: {tried}", depth());
    assert!(depth() < DEPTH || tried.states > 8_000, "{tried}: the sequences do less than they did");
}

/// The same of a volume with a snapshot: each view shows what it must.
#[test]
fn every_crash_of_every_short_sequence_with_snapshots() {
    let all: Vec<_> = sequences(&Op::LAYERED, depth()).filter(|sequence| is_of_layers(sequence)).collect();
    let tried = every_crash(Start::layered, &all).unwrap_or_else(|why| panic!("{why}"));
    println!("up to {} operations with snapshots: {tried}", depth());
    assert!(depth() < DEPTH || tried.states > 3_500, "{tried}: the sequences do less than they did");
}

/// Each fault shows in a sequence that is right without it.
fn all_show(start: &Start, faults: &[(&str, &[Op])]) {
    for (fault, sequence) in faults {
        assert_eq!(crash_everywhere(start, sequence).err(), None, "without a fault");
        plant(&[fault]);
        let found = crash_everywhere(start, sequence);
        plant(&[]);
        match found {
            Ok(_) => panic!("{fault} is not noticed by {sequence:?}"),
            Err(why) => println!("{fault}: {why}"),
        }
    }
}

/// The checks themselves are checked: these faults show within few sequences.
#[test]
fn faults_show_in_short_sequences() {
    let faults: [(&str, &[Op]); 7] = [
        ("skip-journal-flush", &[Op::WriteA, Op::Flush]),
        ("vote-not-flushed", &[Op::Vote]),
        ("forget-vote", &[Op::Vote]),
        ("forget-truncation", &[Op::Append, Op::Truncate]),
        ("checkpoint-before-home-flush", &[Op::WriteA, Op::Clean]),
        ("page-in-place", &[Op::WriteA, Op::Clean]),
        ("trust-behind-a-hole", &[Op::WriteA, Op::Vote]),
    ];
    all_show(&Start::plain(), &faults);
}

#[test]
fn faults_of_layers_show_in_short_sequences() {
    let faults: [(&str, &[Op]); 3] = [
        ("trim-falls-through", &[Op::Snapshot, Op::TrimA]),
        ("merge-before-manifest", &[Op::Drop, Op::Clean, Op::Clean]),
        ("empty-before-merged", &[Op::Drop, Op::Clean]),
    ];
    all_show(&Start::layered(), &faults);
}
