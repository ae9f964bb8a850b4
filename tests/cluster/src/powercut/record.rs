//! What the machine said, and whether it may say so.
//!
//! Lines: `w FIRST COUNT STAMP` before a write, `a FIRST COUNT STAMP` after its answer, `deaf` before the disk drops
//! writes, `recovered` when the cluster serves again, `r BLOCK STAMP` for every block read then, `all COUNT` when all
//! were, `verified`, `failed WHY`. Stamp 0 is a trim; the blocks of one write have stamps that count up from the first.

use crate::Outcome;
use crate::history::History;

/// Where the machine stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Phase {
    /// It starts.
    #[default]
    Starting,
    /// It reads everything.
    Checking,
    /// It writes.
    Loaded,
    /// Its disk drops writes: nothing that it says was acknowledged counts.
    Deaf,
}

/// What was said so far.
#[derive(Default)]
pub struct Record {
    history: History,
    phase: Phase,
    in_phase: u64,
    /// Writes acknowledged.
    pub acknowledged: u64,
    /// Blocks read and found right.
    pub checked: u64,
    /// Times that the cluster came back.
    pub recoveries: u64,
    /// Times that the replicas were compared and equal.
    pub verified: u64,
    /// Times that the disk went deaf.
    pub deaf: u64,
}

fn numbers<const N: usize>(words: &[&str]) -> Outcome<[u64; N]> {
    let parsed: Result<Vec<u64>, _> = words.iter().map(|word| word.parse()).collect();
    let parsed = parsed.map_err(|error| format!("{words:?} are no numbers: {error}"))?;
    parsed.try_into().map_err(|_| format!("{words:?} are not {N} numbers"))
}

/// The blocks of a write with their stamps.
fn blocks([first, count, stamp]: [u64; 3]) -> impl Iterator<Item = (u64, u64)> {
    (0..count).map(move |n| (first + n, if stamp == 0 { 0 } else { stamp + n }))
}

impl Record {
    /// The machine starts.
    pub fn begin(&mut self) {
        self.phase = Phase::Starting;
    }

    /// Writes acknowledged since the load began last.
    pub fn acknowledged_in_phase(&self) -> u64 {
        self.in_phase
    }

    /// A line of the machine.
    pub fn heard(&mut self, line: &str) -> Outcome<Phase> {
        let words: Vec<_> = line.split_whitespace().collect();
        match *words.as_slice() {
            ["w", ref rest @ ..] => {
                blocks(numbers(rest)?).for_each(|(block, stamp)| self.history.unknown(block, stamp));
            }
            ["a", ref rest @ ..] if self.phase == Phase::Loaded => {
                blocks(numbers(rest)?).for_each(|(block, stamp)| self.history.acknowledged(block, stamp));
                self.acknowledged += 1;
                self.in_phase += 1;
            }
            ["deaf"] => {
                self.phase = Phase::Deaf;
                self.deaf += 1;
            }
            ["recovered"] => {
                self.phase = Phase::Checking;
                self.recoveries += 1;
            }
            ["r", ref rest @ ..] if self.phase == Phase::Checking => {
                let [block, stamp] = numbers(rest)?;
                self.history.shows(block, stamp)?;
                self.checked += 1;
            }
            ["all", count] if self.phase == Phase::Checking => {
                let [count] = numbers(&[count])?;
                if count < self.history.blocks().last().map_or(0, |last| last + 1) {
                    return Err(format!("only {count} blocks were read"));
                }
                self.phase = Phase::Loaded;
                self.in_phase = 0;
            }
            ["verified"] => self.verified += 1,
            ["failed", ..] => return Err(line.to_owned()),
            // The last line before a cut may be torn, and what is acknowledged by a deaf disk is not.
            _ => {}
        }
        Ok(self.phase)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hear(record: &mut Record, lines: &[&str]) -> Outcome<()> {
        lines.iter().try_for_each(|line| record.heard(line).map(drop))
    }

    #[test]
    fn what_was_acknowledged_must_be_shown_and_what_a_deaf_disk_took_need_not() {
        let mut record = Record::default();
        hear(&mut record, &["recovered", "all 0", "w 3 2 10", "a 3 2 10", "w 3 1 20", "deaf", "a 3 1 20"])
            .expect("all of it may be said");
        hear(&mut record, &["recovered", "r 3 10", "r 4 11"]).expect("is as acknowledged");
        assert!(hear(&mut record, &["r 3 20"]).is_err(), "it was shown not to have happened");
        assert!(hear(&mut record, &["r 4 0"]).is_err(), "an acknowledged write was lost");
        assert!(hear(&mut record, &["all 4"]).is_err(), "not every block was read");
        assert!(hear(&mut record, &["all 5", "failed to mount"]).is_err());
    }
}
