//! What a leader does for whoever pulls from it: it keeps its log, and slows its writers a little when a rebuild has been
//! outrun again and again.
//!
//! A rebuild ends with the log that was written meanwhile. Where writers fill the journal faster than that, the log is
//! purged, and the rebuild begins again with what differs by then; with a small journal it would never end, and the
//! volume would stay short of a copy for as long as the load lasts. So from the third round on writers are paced, such
//! that the room left for the log lasts as long as a round may take: evenly, for a bounded time, and only while
//! whoever pulls is there (decision 0157). A replica that is away slows nobody.

use std::cell::Cell;
use std::time::Duration;

use holdfast_env::Instant;
use holdfast_protocol::planted::is_planted;
use holdfast_store::journal::levels;
use holdfast_types::LogIndex;

use crate::volume::Volume;

/// How long a leader keeps its log for a receiver that has gone silent.
const HOLD: Duration = Duration::from_secs(30);
/// Rounds of a rebuild that slow nobody.
const FREE_ROUNDS: u32 = 2;
/// Rounds for which writers are paced, at most: the guest comes first.
const PACED_ROUNDS: u32 = 4;
/// How long writers are paced in one round, at most.
const PACED_FOR: Duration = Duration::from_secs(20);
/// How long one write waits, at most: what the room allows is looked at again with the next one.
const WAIT_MAX: Duration = Duration::from_millis(500);

#[derive(Clone, Copy)]
struct Held {
    /// The checkpoint that was offered to whoever has pulled last.
    index: LogIndex,
    /// The newest one that was offered.
    newest: LogIndex,
    until: Instant,
    round: u32,
    /// Since when writers are paced in this round.
    paced_since: Option<Instant>,
}

/// Purging waits while somebody pulls from this replica.
#[derive(Default)]
pub(crate) struct PurgeHold {
    held: Cell<Option<Held>>,
    /// When the next write that is paced has its turn.
    next: Cell<Instant>,
}

impl PurgeHold {
    /// Somebody pulls what was offered as of `index`. A later offer is another round: the one before was outrun.
    pub(super) fn renew(&self, index: LogIndex) {
        let until = Instant::now() + HOLD;
        let held = match self.held() {
            None => Held { index, newest: index, until, round: 1, paced_since: None },
            Some(held) if index > held.newest => {
                let round = held.round.saturating_add(1);
                Held { index, newest: index, until, round, paced_since: None }
            }
            // Another receiver goes on with its own.
            Some(held) => Held { index, until, ..held },
        };
        self.held.set(Some(held));
    }

    fn held(&self) -> Option<Held> {
        self.held.get().filter(|held| Instant::now() < held.until)
    }

    /// The index that must stay in the log, if any.
    pub(crate) fn index(&self) -> Option<LogIndex> {
        self.held().map(|held| held.index)
    }

    /// Whether writers are slowed now, if somebody is behind at all.
    pub(crate) fn is_outrun(&self) -> bool {
        let paced = FREE_ROUNDS + 1..=FREE_ROUNDS + PACED_ROUNDS;
        self.held().is_some_and(|held| paced.contains(&held.round)) && !is_planted("rebuild-is-outrun")
    }

    /// How long a write of so many bytes waits, while the log may grow by `room` bytes before it is purged.
    pub(crate) fn wait(&self, bytes: u64, room: u64) -> Duration {
        let now = Instant::now();
        let Some(held) = self.held().filter(|_| self.is_outrun()) else { return Duration::ZERO };
        let since = held.paced_since.unwrap_or(now);
        self.held.set(Some(Held { paced_since: Some(since), ..held }));
        let left = (since + PACED_FOR).since(now);
        // With no room left the round is lost, or the time for it is over.
        if room == 0 || left.is_zero() {
            return Duration::ZERO;
        }
        let share = left.mul_f64((bytes as f64 / room as f64).min(1.0));
        let turn = self.next.get().max(now).min(now + WAIT_MAX);
        self.next.set(turn + share);
        turn.since(now)
    }
}

impl Volume {
    /// Where a rebuild was outrun again and again, writers leave it the time that it takes.
    pub(crate) async fn pace(&self, bytes: usize) {
        if bytes == 0 || !self.hold().is_outrun() || !self.group().is_somebody_behind() {
            return;
        }
        let wait = self.hold().wait(bytes as u64, self.log().room_below(levels::GIVE_UP));
        self.group().counters().count(|usage| usage.paced_writes += u64::from(!wait.is_zero()));
        holdfast_env::sleep(wait).await;
    }
}

#[cfg(test)]
mod tests {
    use holdfast_store::testing::simulate;

    use super::*;

    const MEBIBYTE: u64 = 1 << 20;

    /// Bytes that are written in so many seconds, by one writer that waits whenever it is told to.
    async fn written(hold: &PurgeHold, room: u64, seconds: u64) -> u64 {
        let until = Instant::now() + Duration::from_secs(seconds);
        let mut bytes = 0;
        while Instant::now() < until {
            holdfast_env::sleep(hold.wait(MEBIBYTE / 4, room.saturating_sub(bytes))).await;
            bytes += MEBIBYTE / 4;
            holdfast_env::sleep(Duration::from_millis(5)).await;
        }
        bytes
    }

    #[test]
    fn writers_are_paced_only_when_a_rebuild_was_outrun_and_for_a_bounded_time() {
        simulate(1, async {
            let hold = PurgeHold::default();
            for round in 1..=FREE_ROUNDS {
                hold.renew(LogIndex(round.into()));
                assert!(!hold.is_outrun());
                assert!(written(&hold, 40 * MEBIBYTE, 1).await > 45 * MEBIBYTE, "nobody waits");
            }
            hold.renew(LogIndex(10));
            // The first receiver goes on with its round.
            hold.renew(LogIndex(1));
            assert_eq!(hold.index(), Some(LogIndex(1)));
            let slow = written(&hold, 40 * MEBIBYTE, 5).await;
            assert!((5..25).contains(&(slow / MEBIBYTE)), "{slow} bytes in a quarter of the time");
            // It may take this long, and no longer.
            let _slowly = written(&hold, 40 * MEBIBYTE, 16).await;
            hold.renew(LogIndex(10));
            assert!(written(&hold, 40 * MEBIBYTE, 1).await > 45 * MEBIBYTE);
            for round in 0..PACED_ROUNDS {
                assert!(hold.is_outrun(), "round {round}");
                hold.renew(LogIndex(u64::from(round) + 11));
            }
            assert!(!hold.is_outrun(), "the guest comes first");
        });
    }

    #[test]
    fn nobody_waits_where_nobody_pulls() {
        simulate(1, async {
            let hold = PurgeHold::default();
            (1..=3).for_each(|index| hold.renew(LogIndex(index)));
            assert!(hold.is_outrun());
            holdfast_env::sleep(HOLD).await;
            assert!(!hold.is_outrun() && hold.index().is_none());
        });
    }
}
