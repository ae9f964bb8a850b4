//! The timers of a volume's group, as its log says, and how they change.
//!
//! A change is two commands: the first names the new timers beside the old ones, the second ends the change. INV-TIMERS:
//! whatever timers change in between, a session's lease never outlives what a later leader waits. Between the two
//! commands leases are granted by the shorter and waited for by the longer of the two lengths, and the second is
//! admitted only one longer lease after its proposer saw the first ([`ChangeWatch`]): then no lease of before the change
//! lives any more. The rule rests on the log alone, not on what Raft runs with: a leader grants what the state it has
//! applied says, and who waits has applied at least as much.
//!
//! What Raft runs with ([`VolumeTimers::run`]) follows the state by and by, replica by replica. Between the two commands
//! it is heartbeats of the faster and election timeouts of the slower: beside the old timers and beside the new ones no
//! follower misses a leader that is alive, and no voter gives a leader up sooner than that leader may count on.

use std::time::Duration;

use holdfast_types::{DecodeError, LogIndex, Reader, TimersPolicy, Writer};

use crate::planted::is_planted;
use crate::refusal::Refusal;

/// The timers of a group.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Timers {
    /// Between heartbeats of a leader.
    pub heartbeat: Duration,
    /// Shortest election timeout.
    pub election_min: Duration,
    /// Longest election timeout; also the voters' lease for their leader.
    pub election_max: Duration,
    /// The lease of a session.
    pub session_lease: Duration,
}

/// The shortest heartbeat: below it the ticks of an idle group cost more than its failover is worth.
pub const HEARTBEAT_MIN: Duration = Duration::from_millis(10);
/// The longest lease: an operator waits for it.
pub const LEASE_MAX: Duration = Duration::from_secs(60);

impl Default for Timers {
    /// Inside a region: a killed leader is replaced within one second.
    fn default() -> Self {
        Self::of_heartbeat(Duration::from_millis(50))
    }
}

impl Timers {
    /// The timers that go with a heartbeat: a dead leader is replaced after about ten of them. Its voters count on it for
    /// six, and the first of them campaigns three to six later.
    pub const fn of_heartbeat(heartbeat: Duration) -> Self {
        Self {
            heartbeat,
            election_min: heartbeat.saturating_mul(3),
            election_max: heartbeat.saturating_mul(6),
            session_lease: heartbeat.saturating_mul(20),
        }
    }

    /// How long a restarted voter neither grants nor campaigns: until every lease that it may have granted before
    /// has ended. Raft's voter leases are volatile, so this stands in for remembering them.
    pub fn startup_silence(&self) -> Duration {
        let longest = self.session_lease.max(self.election_max);
        longest + longest / 50
    }

    /// Of two the faster heartbeats and the slower election timeouts: right beside each of them.
    fn between(self, other: Self) -> Self {
        Self {
            heartbeat: self.heartbeat.min(other.heartbeat),
            election_min: self.election_min.max(other.election_min),
            election_max: self.election_max.max(other.election_max),
            session_lease: self.session_lease.max(other.session_lease),
        }
    }

    /// Refuses timers with which a group flaps or an operator waits for ever.
    pub fn check(&self) -> Result<(), Refusal> {
        let bad = |why: &str| Err(Refusal::Malformed(format!("these timers make no sense: {why}")));
        if self.heartbeat < HEARTBEAT_MIN {
            return bad("a heartbeat is 10 ms at least");
        }
        if self.election_min < self.heartbeat * 2 || self.election_max <= self.election_min {
            return bad(
                "an election timeout is two heartbeats at least, and the longest longer than the shortest",
            );
        }
        if self.session_lease < self.election_max || self.session_lease > LEASE_MAX {
            return bad(
                "a session's lease is as long as the longest election timeout at least, and 60 s at most",
            );
        }
        Ok(())
    }

    /// Appends it to an encoding.
    pub fn encode(&self, out: &mut Writer) {
        for duration in [self.heartbeat, self.election_min, self.election_max, self.session_lease] {
            out.u32(u32::try_from(duration.as_millis()).unwrap_or(u32::MAX));
        }
    }

    /// Reads what [`Self::encode`] wrote.
    pub fn decode(input: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let mut next = || Ok(Duration::from_millis(input.u32()?.into()));
        Ok(Self { heartbeat: next()?, election_min: next()?, election_max: next()?, session_lease: next()? })
    }
}

/// The heartbeats of `timers: auto`, in milliseconds, each with the longest round trip between the replicas that it is
/// for, in milliseconds. The shortest election timeout is four round trips at least: one is lost on the way to a voter
/// and back, twice, before anybody campaigns.
pub const LADDER: [(u64, u64); 4] = [(50, 25), (100, 60), (200, 150), (400, u64::MAX)];
/// The heartbeat of `timers: tight`, and the longest round trip that it is for: beyond, `auto` counts.
pub const TIGHT: (u64, u64) = (15, 5);

/// The timers that a volume should have by its policy and a round trip to the farthest voter (zero if nothing is known:
/// then nothing is changed for the network's sake), and whether that is so because of the policy alone. What the volume
/// has now stays while it fits: a network that lies on the border does not change it to and fro.
pub fn choose(policy: TimersPolicy, round_trip: Duration, now: Timers) -> (Timers, bool) {
    let mut ladder = LADDER.to_vec();
    if policy == TimersPolicy::Tight {
        ladder.insert(0, TIGHT);
    }
    let timers = |at: usize| Timers::of_heartbeat(Duration::from_millis(ladder[at].0));
    let limit = |at: usize| Duration::from_millis(ladder[at].1);
    let fits = (0..ladder.len()).find(|at| round_trip <= limit(*at)).unwrap_or(ladder.len() - 1);
    let Some(at) = (0..ladder.len()).find(|at| timers(*at) == now) else { return (timers(fits), true) };
    if policy == TimersPolicy::Tight && at > 0 && round_trip * 2 <= limit(0) {
        // Asked for, and nothing is in the way.
        return (timers(0), true);
    }
    if round_trip > limit(at) {
        return (timers(fits), false);
    }
    let faster = (0..at).find(|faster| !round_trip.is_zero() && round_trip * 2 <= limit(*faster));
    (timers(faster.unwrap_or(at)), false)
}

/// A change that has begun.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Change {
    /// The log index of the command that began it; the one that ends it names it.
    pub since: LogIndex,
    /// The timers afterwards.
    pub to: Timers,
}

/// The timers of a volume, replicated.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VolumeTimers {
    settled: Timers,
    change: Option<Change>,
}

impl VolumeTimers {
    /// The same on a cluster whose default timers are others, equal on all its nodes. A simulation has such; a daemon's
    /// are the defaults.
    #[must_use]
    pub fn with_defaults(mut self, defaults: Timers) -> Self {
        if self.settled == Timers::default() {
            self.settled = defaults;
        }
        self
    }
    /// Those that the last change that ended has left, or the defaults.
    pub fn settled(&self) -> Timers {
        self.settled
    }
    /// The change under way.
    pub fn change(&self) -> Option<Change> {
        self.change
    }
    /// The timers that there will be once no change is under way.
    pub fn wanted(&self) -> Timers {
        self.change.map_or(self.settled, |change| change.to)
    }
    /// Whether they are the defaults, and never were anything else that is still to be told.
    pub(crate) fn is_default(&self) -> bool {
        *self == Self::default()
    }
    /// What Raft is to run with.
    pub fn run(&self) -> Timers {
        self.change.map_or(self.settled, |change| self.settled.between(change.to))
    }
    /// The lease that a leader grants.
    pub fn granted_lease(&self) -> Duration {
        let (settled, wanted) = (self.settled.session_lease, self.wanted().session_lease);
        if is_planted("timers-unequal") {
            return settled.max(wanted);
        }
        settled.min(wanted)
    }
    /// The lease that whoever waits for a holder's end must take it for.
    pub fn waited_lease(&self) -> Duration {
        self.settled.session_lease.max(self.wanted().session_lease)
    }

    /// Begins a change; whether it is news.
    pub(crate) fn begin(&mut self, index: LogIndex, to: Timers) -> Result<bool, Refusal> {
        to.check()?;
        match self.change {
            Some(change) if change.to == to => Ok(false),
            Some(_) => Err(Refusal::TimersChanging),
            None if self.settled == to => Ok(false),
            None => {
                self.change = Some(Change { since: index, to });
                Ok(true)
            }
        }
    }

    /// Ends the change that began at `since`; whether it is news.
    pub(crate) fn end(&mut self, since: LogIndex) -> bool {
        match self.change {
            Some(change) if change.since == since => {
                *self = Self { settled: change.to, change: None };
                true
            }
            // It has ended already, or speaks of a change before this one.
            _ => false,
        }
    }

    /// Appends it to an encoding.
    pub fn encode(&self, out: &mut Writer) {
        self.settled.encode(out);
        out.bool(self.change.is_some());
        if let Some(change) = &self.change {
            change.since.encode(out);
            change.to.encode(out);
        }
    }

    /// Reads what [`Self::encode`] wrote.
    pub fn decode(input: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let settled = Timers::decode(input)?;
        let change = if input.bool()? {
            Some(Change { since: LogIndex::decode(input)?, to: Timers::decode(input)? })
        } else {
            None
        };
        let all = std::iter::once(settled).chain(change.map(|change| change.to));
        for timers in all {
            if timers.check().is_err() {
                let value = u64::try_from(timers.heartbeat.as_millis()).unwrap_or(u64::MAX);
                return Err(DecodeError::Unknown { what: "timers", value });
            }
        }
        Ok(Self { settled, change })
    }
}

/// When a leader may end a change of timers. Made anew for each term in which the leader leads. INV-TIMERS.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct ChangeWatch(Option<(LogIndex, u64)>);

impl ChangeWatch {
    /// The leader has applied the beginning of this change, at `now` or before. Until when it waits: `wait` is what a
    /// wait for the longest lease takes by its clock ([`crate::lease::LeaseTerms::waited`]).
    ///
    /// Whatever was granted by timers of before the change was asked for before the change was committed: by this leader,
    /// because it grants by what it has applied; by one before it, because a grant is confirmed by a quorum that has
    /// elected nobody since.
    pub fn until(&mut self, change: Change, now: u64, wait: Duration) -> u64 {
        let since = match self.0 {
            Some((seen, since)) if seen == change.since => since,
            _ => now,
        };
        self.0 = Some((change.since, since));
        since.saturating_add(u64::try_from(wait.as_nanos()).unwrap_or(u64::MAX))
    }
}
