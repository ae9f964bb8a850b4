//! When the group of a volume rests, and who wakes it (INV-REST). A group in which nothing happens stops its timers:
//! its leader sends no heartbeat and its followers count none.
//!
//! A group rests as a whole, by consent of every member, and only while nobody holds its volume and nothing is left to be
//! done: whatever rests has nothing that a failover would have to be quick for. From then on the *stores* of followers ask
//! the leader's store whether their groups still rest there, all of them in one question. Two questions in a row without
//! an answer wake a follower, and a follower that does not ask wakes its leader.
//!
//! Everything here is arithmetic and rules; times are nanoseconds of one node's clock, given by the caller.
//!
//! How it could be broken: by a member that rests while it lacks an entry, by a leader whose answer nobody checks after
//! it has rested through its own deposition, and by a store that was stopped and counts what it has missed.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use holdfast_types::{LogIndex, ReplicaId};

use crate::planted::is_planted;

/// How long nothing must have happened in a group before its leader asks the others.
pub const QUIET_BEFORE: Duration = Duration::from_secs(3);
/// How long a group is left alone after a member did not agree.
pub const LEFT_ALONE: Duration = Duration::from_secs(10);
/// Between two questions of a store.
pub const ASK_EVERY: Duration = Duration::from_secs(1);
/// So many questions in a row must fail before followers wake.
pub const FAILURES_MAX: u8 = 2;
/// Whoever has not asked for so long wakes its leader.
pub const UNHEARD_MAX: Duration = Duration::from_secs(5);
/// What was heard within this long counts as heard now.
pub const HEARD_LATELY: Duration = Duration::from_secs(3);
/// A leader that woke is taken for one whose group rests until a majority has answered it, and no longer than this or three
/// of the longest election timeouts: until then Raft may hold its heartbeats back.
pub const WAKING_MAX: Duration = Duration::from_secs(2);
/// A store that sleeps so much longer than it wanted was itself stopped.
const STOPPED_AFTER: Duration = Duration::from_secs(2);
/// Raft holds back the heartbeats of a leader that woke for two of the longest election timeouts, and takes no proposal
/// meanwhile. Where that is longer than this a group does not rest: whoever attaches waits for it.
pub const HELD_BACK_MAX: Duration = Duration::from_secs(1);

const _: () = {
    let rounds = ASK_EVERY.as_millis() * FAILURES_MAX as u128;
    assert!(
        rounds < UNHEARD_MAX.as_millis(),
        "a follower wakes before its leader does, if neither hears the other"
    );
    assert!(HEARD_LATELY.as_millis() < UNHEARD_MAX.as_millis(), "what rests is heard");
};

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// What a replica knows of its group when it is asked, or asks itself, whether it may rest.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Standing {
    /// Somebody holds the volume.
    pub is_held: bool,
    /// A change of holder has not settled.
    pub is_unsettled: bool,
    /// A change of timers is under way, or Raft runs with others than the volume says.
    pub changes_timers: bool,
    /// A change of members is under way.
    pub changes_members: bool,
    /// Something else is under way: a transfer, a rebuild, a start, a disk that hangs or is full.
    pub is_busy: bool,
    /// The last entry of its log.
    pub last: LogIndex,
    /// Up to where its log is durable.
    pub flushed: LogIndex,
    /// The last entry that it knows to be committed.
    pub committed: LogIndex,
    /// The last entry that it has applied.
    pub applied: LogIndex,
    /// As leader: what each other member has of the log.
    pub matched: Vec<LogIndex>,
}

/// Why a group does not rest.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Busy {
    /// Somebody holds the volume.
    #[error("somebody holds the volume")]
    Held,
    /// A former holder's lease may live.
    #[error("a change of holder has not settled")]
    Unsettled,
    /// Timers or members change.
    #[error("the timers or members of the group are changing")]
    Changing,
    /// Something is under way.
    #[error("a transfer, a rebuild or a start is under way, or the disk is not well")]
    Busy,
    /// Not everything is everywhere.
    #[error("not every member has the last entry, durably and applied")]
    Behind,
}

impl Standing {
    /// INV-REST: whether the group may rest as far as this replica knows.
    pub fn may_rest(&self) -> Result<(), Busy> {
        if self.is_held {
            return Err(Busy::Held);
        }
        if self.is_unsettled {
            return Err(Busy::Unsettled);
        }
        if self.changes_timers || self.changes_members {
            return Err(Busy::Changing);
        }
        if self.is_busy {
            return Err(Busy::Busy);
        }
        let own = [self.flushed, self.committed, self.applied];
        let is_everywhere = own.iter().chain(&self.matched).all(|index| *index == self.last);
        if self.last == LogIndex::ZERO || !is_everywhere && !is_planted("rest-while-behind") {
            return Err(Busy::Behind);
        }
        Ok(())
    }
}

/// How long nothing has happened in a group, as its leader has seen it.
#[derive(Clone, Copy, Default, Debug)]
pub struct Quiet {
    since: Option<(LogIndex, u64)>,
    not_before: u64,
}

impl Quiet {
    /// Looks at a group whose last entry is this; whether its members may be asked now.
    pub fn look(&mut self, last: LogIndex, now: u64) -> bool {
        let since = match self.since {
            Some((seen, since)) if seen == last => since,
            _ => now,
        };
        self.since = Some((last, since));
        now >= self.not_before && now.saturating_sub(since) >= nanoseconds(QUIET_BEFORE)
    }
    /// Something happens: it begins anew.
    pub fn disturbed(&mut self) {
        self.since = None;
    }
    /// A member does not agree, or was not heard: the group is left alone for a while.
    pub fn refused(&mut self, now: u64) {
        self.since = None;
        self.not_before = now.saturating_add(nanoseconds(LEFT_ALONE));
    }
}

/// The leader's side of a group that rests: who was heard of, and when.
#[derive(Clone, Default, Debug)]
pub struct Led {
    heard: BTreeMap<ReplicaId, u64>,
    /// The store was stopped until then: what it has missed is nobody's fault.
    from: u64,
}

impl Led {
    /// All of these have agreed, by `now`.
    pub fn new(others: impl IntoIterator<Item = ReplicaId>, now: u64) -> Self {
        Self { heard: others.into_iter().map(|id| (id, now)).collect(), from: now }
    }
    /// A member's store asks.
    pub fn heard(&mut self, member: ReplicaId, now: u64) {
        if let Some(at) = self.heard.get_mut(&member) {
            *at = now.max(*at);
        }
    }
    /// This store was stopped until now.
    pub fn was_stopped(&mut self, now: u64) {
        self.from = now;
    }
    /// A member that has not asked for too long.
    pub fn missing(&self, now: u64) -> Option<ReplicaId> {
        let late = |at: u64| now.saturating_sub(at.max(self.from)) > nanoseconds(UNHEARD_MAX);
        self.heard.iter().find(|(_, at)| late(**at)).map(|(id, _)| *id)
    }
    /// Those who have asked a moment ago.
    pub fn lately(&self, now: u64) -> BTreeSet<ReplicaId> {
        let is_late = |at: u64| now.saturating_sub(at) > nanoseconds(HEARD_LATELY);
        self.heard.iter().filter(|(_, at)| !is_late(**at)).map(|(id, _)| *id).collect()
    }
}

/// A follower's side of a group that rests: whether its leader's store answers for it.
#[derive(Clone, Copy, Default, Debug)]
pub struct Followed {
    failures: u8,
    answered: u64,
}

impl Followed {
    /// It has agreed, at `now`: its leader is there.
    pub fn new(now: u64) -> Self {
        Self { failures: 0, answered: now }
    }
    /// The group rests there.
    pub fn answered(&mut self, now: u64) {
        (self.failures, self.answered) = (0, now);
    }
    /// There was no answer; whether that is enough to wake.
    pub fn unanswered(&mut self) -> bool {
        self.failures = self.failures.saturating_add(1);
        self.has_failed()
    }
    /// This store was stopped: what it has missed counts for nothing.
    pub fn was_stopped(&mut self) {
        self.failures = 0;
    }
    /// Whether enough questions have failed for it to wake.
    pub fn has_failed(&self) -> bool {
        self.failures >= FAILURES_MAX && !is_planted("rest-unwatched")
    }
    /// When its leader was last answered for.
    pub fn answered_at(&self) -> u64 {
        self.answered
    }
    /// Whether its leader was answered for a moment ago.
    pub fn hears(&self, now: u64) -> bool {
        now.saturating_sub(self.answered) <= nanoseconds(HEARD_LATELY)
    }
}

/// Whether a store that wanted to go on at `due` and goes on at `now` was itself stopped.
pub fn was_stopped(due: u64, now: u64) -> bool {
    now.saturating_sub(due) > nanoseconds(STOPPED_AFTER)
}
