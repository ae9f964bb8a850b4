//! The slowest writes while the disk of one follower stalls for 100 ms in every second, beside those of healthy disks.
//! Three processes without a frontend; healthy and stalling take turns.

use std::path::Path;

use crate::Outcome;
use crate::load::{Figures, Operation, Pattern, Work};
use crate::trio::Trio;

const SPAN: u64 = 64 << 20;
const BLOCK: u64 = 4096;
/// The member whose disk stalls: a follower, the first one leads.
const SLOW: usize = 2;

/// Figures of each turn.
#[derive(Default)]
pub struct Turns {
    /// Requests at once.
    pub depth: u64,
    /// All disks healthy.
    pub healthy: Vec<Figures>,
    /// One follower's disk stalling.
    pub stalling: Vec<Figures>,
}

fn work(seed: u64, depth: u64, milliseconds: u64) -> Work {
    Work {
        operation: Operation::Write,
        pattern: Pattern::Random,
        bytes: BLOCK,
        depth,
        milliseconds,
        span: SPAN,
        seed: seed * 7919,
    }
}

/// Measures at each depth.
pub fn measure(directory: &Path, rounds: u64, milliseconds: u64) -> Outcome<Vec<Turns>> {
    let mut trio = Trio::start(directory, SPAN)?;
    // Once over everything: nothing below is a first write.
    trio.work(&Work { pattern: Pattern::Sequential, milliseconds: 0, bytes: 1 << 20, ..work(1, 4, 0) })?;
    let mut all: Vec<Turns> = [1, 8].map(|depth| Turns { depth, ..Turns::default() }).into();
    for round in 1..=rounds {
        for turns in &mut all {
            let depth = turns.depth;
            turns.healthy.push(trio.work(&work(2 * round, depth, milliseconds))?);
            trio.stall(SLOW, true)?;
            let stalling = trio.work(&work(2 * round + 1, depth, milliseconds));
            trio.stall(SLOW, false)?;
            turns.stalling.push(stalling?);
            if let (Some(healthy), Some(stalling)) = (turns.healthy.last(), turns.stalling.last()) {
                println!(
                    "  round {round}, depth {depth}: p99.9 healthy {:.0} us, stalling {:.0} us ({} and {} writes)",
                    healthy.p999_us, stalling.p999_us, healthy.count, stalling.count
                );
            }
        }
    }
    Ok(all)
}
