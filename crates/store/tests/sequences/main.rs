//! Every short sequence of operations on one replica, stopped at every moment, with every way in which what was not
//! flushed may be left: everything acknowledged is there, nothing is invented, every block reads right, and a recovery
//! may be repeated and stopped as often as it likes.
//!
//! `HOLDFAST_DEPTH` says how long the sequences are; `cargo xtask store --depth 4` is the long form.

mod crash;
mod model;
mod world;

use std::sync::atomic::{AtomicUsize, Ordering};

use holdfast_store::testing::plant;

use crash::Tried;
use world::Op;

/// Operations of the longest sequences here.
const DEPTH: usize = 3;

fn depth() -> usize {
    std::env::var("HOLDFAST_DEPTH").ok().and_then(|text| text.parse().ok()).unwrap_or(DEPTH)
}

/// Sequence `number` of those of `length` operations.
fn sequence(mut number: usize, length: usize) -> Vec<Op> {
    let mut out = Vec::with_capacity(length);
    for _ in 0..length {
        out.push(Op::ALL[number % Op::ALL.len()]);
        number /= Op::ALL.len();
    }
    out
}

/// Every sequence of up to `depth` operations, on as many threads as there are processors.
fn every_sequence(depth: usize) -> Result<Tried, String> {
    let all: Vec<Vec<Op>> = (1..=depth)
        .flat_map(|length| (0..Op::ALL.len().pow(length as u32)).map(move |n| sequence(n, length)))
        .collect();
    let next = AtomicUsize::new(0);
    let work = || {
        let image = world::prepared();
        let mut tried = Tried::default();
        while let Some(sequence) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
            let added = crash::every_crash(&image, sequence).map_err(|why| format!("{sequence:?}: {why}"));
            match added {
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
    let tried = every_sequence(depth()).unwrap_or_else(|why| panic!("{why}"));
    println!("up to {} operations: {tried}", depth());
    assert!(depth() < DEPTH || tried.states > 8_000, "{tried}: the sequences do less than they did");
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
    let image = world::prepared();
    for (fault, sequence) in faults {
        assert_eq!(crash::every_crash(&image, sequence).err(), None, "{sequence:?} without a fault");
        plant(&[fault]);
        let found = crash::every_crash(&image, sequence);
        plant(&[]);
        assert!(found.is_err(), "{fault} is not noticed by {sequence:?}");
    }
}
