//! How long something took lately, in constant space.

use std::time::Duration;

use holdfast_env::Instant;

/// Width of a slot.
const SLOT: Duration = Duration::from_millis(500);
/// Slots that count: what is older is forgotten.
const SLOTS: usize = 6;
/// Slots that must hold something, and how much they must hold, before anything is said.
const SLOTS_MIN: usize = 3;
const SAMPLES_MIN: u64 = 8;

#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    number: u64,
    count: u64,
    sum_ns: u64,
}

/// The last three seconds of a latency. One outlier does not move it, several in a row do, and silence says nothing.
#[derive(Clone, Debug, Default)]
pub struct RecentLatency {
    slots: [Slot; SLOTS],
}

fn slot_of(at: Instant) -> u64 {
    at.0 / SLOT.as_nanos() as u64
}

impl RecentLatency {
    /// One more, which ended now and took so long.
    pub fn record(&mut self, now: Instant, took: Duration) {
        let number = slot_of(now);
        let slot = &mut self.slots[number as usize % SLOTS];
        if slot.number != number {
            *slot = Slot { number, ..Slot::default() };
        }
        slot.count += 1;
        slot.sum_ns = slot.sum_ns.saturating_add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
    }

    /// The median of the slots' means: what has been sustained. `None` if too little happened to say.
    pub fn sustained(&self, now: Instant) -> Option<Duration> {
        let current = slot_of(now);
        let recent = self.slots.iter().filter(|slot| slot.count > 0 && slot.number + SLOTS as u64 > current);
        let (mut means, mut count) = (Vec::with_capacity(SLOTS), 0);
        for slot in recent {
            means.push(slot.sum_ns / slot.count);
            count += slot.count;
        }
        if means.len() < SLOTS_MIN || count < SAMPLES_MIN {
            return None;
        }
        means.sort_unstable();
        Some(Duration::from_nanos(means[means.len() / 2]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64) -> Instant {
        Instant(ms * 1_000_000)
    }

    #[test]
    fn what_is_sustained_counts_and_an_outlier_does_not() {
        let mut recent = RecentLatency::default();
        let ms = Duration::from_millis;
        for n in 0..30 {
            recent.record(at(10_000 + 100 * n), ms(2));
        }
        recent.record(at(12_950), Duration::from_secs(2));
        assert_eq!(recent.sustained(at(12_999)), Some(ms(2)));
        for n in 0..30 {
            recent.record(at(13_000 + 100 * n), ms(200));
        }
        assert_eq!(recent.sustained(at(15_999)), Some(ms(200)));
        assert_eq!(recent.sustained(at(17_999)), None, "two slots are left of it");
    }

    #[test]
    fn little_says_nothing() {
        let mut recent = RecentLatency::default();
        for n in 0..7 {
            recent.record(at(400 * n), Duration::from_secs(1));
        }
        assert_eq!(recent.sustained(at(2_800)), None);
        recent.record(at(2_900), Duration::from_secs(1));
        assert_eq!(recent.sustained(at(2_900)), Some(Duration::from_secs(1)));
        assert_eq!(RecentLatency::default().sustained(at(0)), None);
    }
}
