//! How a replica that was behind caught up, as told to users: by the log, or by chunks, and what that took.
//!
//! Pure bookkeeping over what the leader sends; nothing rests on it.

use holdfast_types::LogIndex;

/// Entries that a replica may be behind without being called so: a running follower trails by what is in flight.
const TRAILING_MAX: u64 = 256;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// Nothing was heard yet: whatever is missing was missed.
    Fresh,
    /// Up to date, or nearly.
    Level,
    /// It misses what was committed up to `target`.
    Behind { target: LogIndex, bytes: u64 },
    /// Its content came by chunks; the log after that is the tail of the same catch-up.
    Rebuilt,
}

/// One append that came from the leader.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Heard {
    /// The end of this replica's log before it.
    pub(crate) last: LogIndex,
    /// What the leader says is committed.
    pub(crate) committed: LogIndex,
    /// The first entry that came; none in a heartbeat.
    pub(crate) first: Option<LogIndex>,
    /// Bytes of the message.
    pub(crate) bytes: u64,
}

/// The bookkeeping of one replica.
#[derive(Debug)]
pub(crate) struct CatchUp(State);

impl Default for CatchUp {
    fn default() -> Self {
        Self(State::Fresh)
    }
}

impl CatchUp {
    /// Takes note of an append. The bytes that the log brought, when a catch-up has ended with it.
    pub(crate) fn hear(&mut self, heard: Heard) -> Option<u64> {
        let missing = heard.committed.0.saturating_sub(heard.last.0);
        self.0 = match self.0 {
            State::Fresh if missing > 0 => State::Behind { target: heard.committed, bytes: 0 },
            State::Level if missing > TRAILING_MAX => State::Behind { target: heard.committed, bytes: 0 },
            State::Rebuilt if missing > TRAILING_MAX => State::Rebuilt,
            State::Behind { target, bytes } if heard.last >= target => {
                self.0 = State::Level;
                return Some(bytes);
            }
            behind @ State::Behind { .. } => behind,
            State::Fresh | State::Level | State::Rebuilt => State::Level,
        };
        if let State::Behind { target, bytes } = &mut self.0
            && heard.first.is_some_and(|first| first <= *target)
        {
            *bytes += heard.bytes;
        }
        None
    }

    /// The content has come by chunks.
    pub(crate) fn rebuilt(&mut self) {
        self.0 = State::Rebuilt;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(last: u64, committed: u64, first: Option<u64>) -> Heard {
        Heard { last: LogIndex(last), committed: LogIndex(committed), first: first.map(LogIndex), bytes: 100 }
    }

    #[test]
    fn what_the_log_brought_is_counted_up_to_where_the_leader_was() {
        let mut catch_up = CatchUp::default();
        assert_eq!(catch_up.hear(heard(10, 30, None)), None, "it is behind");
        assert_eq!(catch_up.hear(heard(10, 32, Some(11))), None);
        assert_eq!(catch_up.hear(heard(20, 34, Some(21))), None);
        assert_eq!(catch_up.hear(heard(30, 36, Some(31))), Some(200), "what follows is no part of it");
        assert_eq!(catch_up.hear(heard(31, 40, Some(32))), None);
    }

    #[test]
    fn a_follower_that_only_trails_has_not_been_healed() {
        let mut catch_up = CatchUp::default();
        assert_eq!(catch_up.hear(heard(0, 0, None)), None);
        for index in 1..100 {
            assert_eq!(catch_up.hear(heard(index, index + 20, Some(index + 1))), None);
        }
        assert_eq!(catch_up.hear(heard(100, 1000, Some(101))), None, "it was cut off for a while");
        assert_eq!(catch_up.hear(heard(1000, 1001, None)), Some(100));
    }

    #[test]
    fn the_log_after_chunks_is_not_another_road() {
        let mut catch_up = CatchUp::default();
        assert_eq!(catch_up.hear(heard(10, 5000, None)), None);
        catch_up.rebuilt();
        assert_eq!(catch_up.hear(heard(4000, 6000, Some(4001))), None);
        assert_eq!(catch_up.hear(heard(6000, 6100, Some(6001))), None);
        assert_eq!(catch_up.hear(heard(6100, 9000, Some(6101))), None, "later it is behind again");
        assert_eq!(catch_up.hear(heard(9000, 9000, None)), Some(100));
    }
}
