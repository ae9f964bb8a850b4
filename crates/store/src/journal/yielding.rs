//! The cleaner gives way: while batches of the journal take longer than they do without it, it pauses between its writes.
//!
//! What is compared is a batch's time from its hand-over to the disk until it is durable with what batches of about its
//! size took lately while no pass was active; that is learned in the pauses, too. So a disk that is slow by itself is
//! not taken for one that the cleaner holds up.
//!
//! Bounds on both sides (INV-YIELD): a pause is at most so many times as long as the work before it, so a pass always goes
//! on; it becomes shorter the more there is that is not home, and there is none when that is as much as comes with what
//! is cleaned at once (`levels.rs`), before any write is slowed. And while nothing is written nobody is given way to.

use std::time::Duration;

use holdfast_env::Instant;

use super::{Inner, Journal, levels, planted};

/// Classes of batches by size: up to 4 KiB, 8 KiB, …, and all that are larger.
const CLASSES: usize = 11;
/// How much the newest batch counts for the baseline, and for what is found now.
const BASELINE_WEIGHT: f64 = 0.05;
const NOW_WEIGHT: f64 = 0.2;
/// A batch counts for so many times its baseline at most.
const TIMES_MAX: f64 = 20.0;
/// Above so many times the baseline the cleaner pauses for longer, below so many for less time.
const SLOW_ABOVE: f64 = 2.0;
const FINE_BELOW: f64 = 1.4;
/// A pause is so many times as long as the work before it, at most, and takes no longer than this.
const PAUSE_TIMES_MAX: f64 = 9.0;
const PAUSE_MAX: Duration = Duration::from_millis(50);
/// Nobody waits for a disk that has had no batch for so long.
const QUIET_AFTER: Duration = Duration::from_millis(50);

/// Who writes to the journal beside a pass of the cleaner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beside {
    /// Nobody, for a while.
    Nobody,
    /// Somebody does.
    Somebody,
    /// Somebody does, and was held up by it: it has paused for that.
    HeldUp,
}

/// How the journal's batches fare.
#[derive(Default)]
pub(super) struct Foreground {
    /// Seconds by class, while no pass was active; zero before the first.
    baseline: [f64; CLASSES],
    /// How many times as long as that they take now.
    times: f64,
    last: Instant,
    /// Pauses, in times of the work.
    yields: f64,
    worked_since: Instant,
    /// How long passes have paused, all together.
    pub(super) paused: Duration,
}

fn class_of(bytes: usize) -> usize {
    let blocks = bytes.div_ceil(4096).max(1).next_power_of_two();
    (blocks.trailing_zeros() as usize).min(CLASSES - 1)
}

impl Foreground {
    /// A batch of so many bytes took so long; `alone` if no pass was active meanwhile.
    pub(super) fn batch(&mut self, bytes: usize, took: Duration, alone: bool, now: Instant) {
        let (seconds, baseline) = (took.as_secs_f64(), &mut self.baseline[class_of(bytes)]);
        if *baseline == 0.0 {
            *baseline = seconds;
        } else if alone || seconds < *baseline {
            *baseline += BASELINE_WEIGHT * (seconds - *baseline);
        }
        let times = (seconds / baseline.max(1e-6)).min(TIMES_MAX);
        self.times += NOW_WEIGHT * (times - self.times);
        self.last = now;
    }

    fn is_quiet(&self, now: Instant) -> bool {
        now.since(self.last) > QUIET_AFTER || planted("never-give-way")
    }

    /// How long to pause after what was done since the last pause, in a journal of whose line so much is not home.
    fn pause(&mut self, owed_percent: f64, now: Instant) -> Duration {
        if self.is_quiet(now) {
            self.yields = 0.0;
        } else if self.times > SLOW_ABOVE {
            self.yields = (self.yields * 1.3 + 0.2).min(PAUSE_TIMES_MAX);
        } else if self.times < FINE_BELOW {
            self.yields *= 0.8;
        }
        let (from, to) = (f64::from(levels::YIELD_LESS), f64::from(levels::YIELD_NOT));
        let ease = ((to - owed_percent) / (to - from)).clamp(0.0, 1.0);
        let ease = if planted("never-hurry") { 1.0 } else { ease };
        let worked = now.since(self.worked_since).min(PAUSE_MAX);
        worked.mul_f64(self.yields * ease).min(PAUSE_MAX)
    }
}

impl Journal {
    /// How much of what the line may take is not home, in percent. What is kept for others goes when it is needed.
    fn owed_percent(&self) -> f64 {
        let (taken, line) = self.usage_of_line();
        let kept: u64 = self.0.groups.borrow().values().map(|group| group.borrow().dispensable_bytes).sum();
        taken.saturating_sub(kept) as f64 * 100.0 / line as f64
    }

    /// A pass has done a piece of its work, and pauses while batches of the journal are held up by it.
    pub(super) async fn give_way(&self) -> Beside {
        let now = Instant::now();
        let pause = self.0.foreground.borrow_mut().pause(self.owed_percent(), now);
        if !pause.is_zero() {
            let _resting = Resting::new(&self.0);
            holdfast_env::sleep(pause).await;
        }
        let mut foreground = self.0.foreground.borrow_mut();
        let goes_on = Instant::now();
        foreground.worked_since = goes_on;
        foreground.paused += goes_on.since(now);
        match pause.is_zero() {
            false => Beside::HeldUp,
            true if foreground.is_quiet(goes_on) => Beside::Nobody,
            true => Beside::Somebody,
        }
    }
}

/// A pass that waits for others: what cleaners can do is not what they do meanwhile.
struct Resting<'j>(&'j Inner);

impl<'j> Resting<'j> {
    fn new(journal: &'j Inner) -> Self {
        journal.cleaning.borrow_mut().end(Instant::now());
        Self(journal)
    }
}

impl Drop for Resting<'_> {
    fn drop(&mut self) {
        self.0.cleaning.borrow_mut().begin(Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Instant {
        Instant(ms * 1_000_000)
    }

    #[test]
    fn pauses_grow_while_batches_are_held_up_and_end_when_they_are_not() {
        let (mut foreground, ms) = (Foreground::default(), Duration::from_millis);
        let mut now = 1000;
        let mut run = |foreground: &mut Foreground, took: u64, percent: f64| {
            let mut pause = Duration::ZERO;
            for _ in 0..50 {
                now += 5;
                foreground.batch(8192, ms(took), took == 1, at(now));
                foreground.worked_since = at(now - 1);
                pause = foreground.pause(percent, at(now));
            }
            (pause, at(now))
        };
        assert_eq!(run(&mut foreground, 1, 10.0).0, Duration::ZERO);
        let (held_up, last) = run(&mut foreground, 10, 10.0);
        assert_eq!(held_up, ms(9), "a tenth of the time is the cleaner's in any case");
        assert_eq!(foreground.pause(55.0, last), Duration::ZERO, "it is urgent");
        let half = foreground.pause(45.0, last);
        assert!(half > ms(4) && half < ms(5), "{half:?}");
        assert_eq!(foreground.pause(10.0, last + ms(60)), Duration::ZERO, "nobody writes");
        assert!(run(&mut foreground, 10, 10.0).0 > ms(8));
        assert!(run(&mut foreground, 1, 10.0).0 < Duration::from_micros(20), "it is as before");
    }

    #[test]
    fn a_disk_that_has_become_slow_by_itself_is_the_new_baseline() {
        let (mut foreground, ms) = (Foreground::default(), Duration::from_millis);
        (0..50).for_each(|n| foreground.batch(4096, ms(1), true, at(n)));
        (50..250).for_each(|n| foreground.batch(4096, ms(10), true, at(n)));
        assert!(foreground.times < FINE_BELOW, "{}", foreground.times);
        assert_eq!([0, 1, 4096, 4097, 2 << 20, 9 << 20].map(class_of), [0, 0, 0, 1, 9, 10]);
    }
}
