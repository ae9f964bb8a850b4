//! An abstract Raft, as openraft has it: votes and logs compare by ballots of term and node, which are totally ordered, so
//! one term may have several leaders, one after the other; a membership counts from when it is in the log; joint
//! memberships need a majority of both; entries leave a leader before its own flush.
//!
//! A question and its answer are one step, since a late answer is stamped with a ballot and counts for nothing else. A
//! crash loses what was not flushed and everything volatile, and the replica runs again at once.

/// Replicas that the models have at most.
pub const REPLICAS: usize = 4;

/// A set of replicas, one bit each.
pub type Mask = u8;

/// Who leads, and since when.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Ballot {
    /// The term.
    pub term: u8,
    /// The replica.
    pub replica: u8,
}

/// A membership: learners count for nothing.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Members {
    /// The voters before, while a change is under way; else nobody.
    pub old: Mask,
    /// The voters.
    pub new: Mask,
    /// Those who are sent the log and do not vote.
    pub learners: Mask,
}

fn majority(of: Mask, agreed: Mask) -> bool {
    (of & agreed).count_ones() * 2 > of.count_ones()
}

impl Members {
    /// Whether these are a majority of every configuration.
    pub fn is_quorum(&self, agreed: Mask) -> bool {
        majority(self.new, agreed) && (self.old == 0 || majority(self.old, agreed))
    }
    /// Everybody who votes.
    pub fn voters(&self) -> Mask {
        self.old | self.new
    }
    /// Everybody who is sent the log.
    pub fn everybody(&self) -> Mask {
        self.voters() | self.learners
    }
    /// Whether a change is under way.
    pub fn is_joint(&self) -> bool {
        self.old != 0
    }
}

/// What an entry is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Kind {
    /// The first of a leader.
    Blank,
    /// A write, by number: no two are the same.
    Write(u8),
    /// A membership.
    Members(Members),
}

/// An entry.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Entry {
    /// Under which ballot it was made; with its index, its id.
    pub ballot: Ballot,
    /// What it is.
    pub kind: Kind,
}

/// What a replica is doing.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Role {
    /// It follows, or waits.
    Follower,
    /// It asks for votes, and has these.
    Candidate(Mask),
    /// It leads; how far each is known to have flushed the leader's log.
    Leader([u8; REPLICAS]),
}

/// A replica.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Replica {
    /// Its vote; durable before it is told.
    pub vote: Ballot,
    /// Its log, from index 1.
    pub log: Vec<Entry>,
    /// How much of it is durable.
    pub flushed: u8,
    /// How much of it is known to be committed; volatile.
    pub committed: u8,
    /// What it does.
    pub role: Role,
    /// Its disk is lost.
    pub lost: bool,
}

impl Replica {
    /// An empty one.
    pub fn new() -> Self {
        let vote = Ballot::default();
        Self { vote, log: Vec::new(), flushed: 0, committed: 0, role: Role::Follower, lost: false }
    }
    /// What compares logs: the ballot of the last entry, then the length.
    pub fn last(&self) -> (Ballot, usize) {
        (self.log.last().map(|entry| entry.ballot).unwrap_or_default(), self.log.len())
    }
    /// The membership that counts, and its index; the first one is not in the log.
    pub fn members(&self, first: Members) -> (Members, usize) {
        let found = self.log.iter().enumerate().rev().find_map(|(at, entry)| match entry.kind {
            Kind::Members(members) => Some((members, at + 1)),
            _ => None,
        });
        found.unwrap_or((first, 0))
    }
    /// Whether it leads.
    pub fn leads(&self) -> bool {
        matches!(self.role, Role::Leader(_))
    }
    /// How much of its log is the same as another's, by the ids of entries.
    pub fn agrees(&self, other: &Self) -> usize {
        self.log.iter().zip(&other.log).take_while(|(a, b)| a.ballot == b.ballot).count()
    }
}

impl Default for Replica {
    fn default() -> Self {
        Self::new()
    }
}

/// A vote is granted to a higher ballot whose log is not behind.
pub fn grants(voter: &Replica, ballot: Ballot, last: (Ballot, usize), compare_logs: bool) -> bool {
    ballot > voter.vote && (last >= voter.last() || !compare_logs)
}

/// The end of the leader's log that may be committed: an entry of its own ballot that a quorum has flushed.
pub fn committable(leader: &Replica, first: Members, count_older: bool) -> usize {
    let Role::Leader(matched) = leader.role else { return 0 };
    let (members, _) = leader.members(first);
    let mut ends = (usize::from(leader.committed) + 1..=leader.log.len()).rev();
    let quorum = |end: usize| {
        let have = (0..REPLICAS).filter(|n| usize::from(matched[*n]) >= end).fold(0, |mask, n| mask | 1 << n);
        members.is_quorum(have)
    };
    let own = |end: usize| count_older || leader.log[end - 1].ballot == leader.vote;
    ends.find(|end| own(*end) && quorum(*end)).unwrap_or(0)
}
