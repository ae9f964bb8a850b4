//! Changes of membership over crashes, lost disks and removed replicas that come back (DESIGN: membership, restart
//! safety): the abstract Raft of [`crate::raft`], four replicas, of which three vote at first.

use std::fmt;

use stateright::{Model, Property};

use crate::raft::{Ballot, Entry, Kind, Mask, Members, REPLICAS, Replica, Role, committable, grants};

/// What is broken on purpose.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Broken {
    /// A change of voters in one step.
    SingleStep,
    /// The second half of a change does not wait until the first is committed.
    FinishEarly,
    /// A leader that starts again goes on leading under its ballot.
    LeaderRestore,
    /// A replica whose disk was lost comes back empty under its id.
    IdReused,
    /// A vote is told before it is flushed.
    VoteUnflushed,
    /// A follower answers before it has flushed.
    AnswerUnflushed,
    /// Votes are granted whatever the candidate's log.
    LogsNotCompared,
    /// A leader counts who has an entry of an older ballot, and commits it.
    OlderCommitted,
}

/// The model.
#[derive(Clone, Copy, Debug)]
pub struct Membership {
    /// Campaigns.
    pub campaigns: u8,
    /// Crashes.
    pub crashes: u8,
    /// Lost disks.
    pub lost: u8,
    /// Writes.
    pub writes: u8,
    /// Changes of the voters.
    pub changes: u8,
    /// Whether the fourth replica must be made a learner first.
    pub learner_first: bool,
    /// What is broken.
    pub broken: Option<Broken>,
}

/// What must never happen, and did.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Wrong {
    two_leaders: bool,
    lost: bool,
    reused: bool,
}

/// Everything.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct World {
    replicas: [Replica; REPLICAS],
    /// What was committed, whoever remembers, and under which ballot first.
    committed: Vec<(Entry, Ballot)>,
    /// Ballots under which somebody led.
    led: Vec<Ballot>,
    used: [u8; 5],
    wrong: Wrong,
}

const CAMPAIGNS: usize = 0;
const CRASHES: usize = 1;
const LOST: usize = 2;
const WRITES: usize = 3;
const CHANGES: usize = 4;

/// What can happen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[expect(missing_docs, reason = "the Display says it")]
pub enum Action {
    Campaign(u8),
    Grant { voter: u8, candidate: u8 },
    Lead(u8),
    Write(u8),
    AddLearner(u8),
    Change { leader: u8, voters: Mask },
    Finish(u8),
    Send { leader: u8, to: u8 },
    Flush(u8),
    Commit(u8),
    Crash(u8),
    LoseDisk(u8),
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Campaign(n) => write!(f, "r{n} campaigns"),
            Self::Grant { voter, candidate } => write!(f, "r{voter} votes for r{candidate}"),
            Self::Lead(n) => write!(f, "r{n} leads"),
            Self::Write(n) => write!(f, "r{n} takes a write"),
            Self::AddLearner(n) => write!(f, "r{n} adds the learner r3"),
            Self::Change { leader, voters } => {
                let voters = (0..REPLICAS).filter(|n| voters & (1 << n) != 0).map(|n| format!("r{n}"));
                write!(f, "r{leader} begins to change the voters to {}", voters.collect::<Vec<_>>().join(" "))
            }
            Self::Finish(n) => write!(f, "r{n} ends the change"),
            Self::Send { leader, to } => write!(f, "r{leader} sends r{to} an entry"),
            Self::Flush(n) => write!(f, "r{n} flushes its own log"),
            Self::Commit(n) => write!(f, "r{n} commits"),
            Self::Crash(n) => write!(f, "r{n} crashes and starts again"),
            Self::LoseDisk(n) => write!(f, "r{n} loses its disk"),
        }
    }
}

/// Who votes at first; the fourth is a learner, or nobody yet.
fn first(model: &Membership) -> Members {
    Members { old: 0, new: 0b0111, learners: if model.learner_first { 0 } else { 0b1000 } }
}

fn append(world: &mut World, leader: usize, kind: Kind) {
    let replica = &mut world.replicas[leader];
    let entry = Entry { ballot: replica.vote, kind };
    replica.log.push(entry);
    let at = replica.log.len();
    // INV-TERM: nobody has another entry under this id.
    let other =
        |replica: &Replica| replica.log.get(at - 1).is_some_and(|e| e.ballot == entry.ballot && *e != entry);
    world.wrong.reused |= world.replicas.iter().any(other);
}

impl Membership {
    fn may(&self, world: &World, what: usize) -> bool {
        world.used[what] < [self.campaigns, self.crashes, self.lost, self.writes, self.changes][what]
    }

    fn actions_of(&self, world: &World, n: usize, out: &mut Vec<Action>) {
        let (replica, id) = (&world.replicas[n], n as u8);
        if replica.lost {
            return;
        }
        let (members, at) = replica.members(first(self));
        if self.may(world, CRASHES) {
            out.push(Action::Crash(id));
        }
        if self.may(world, LOST) {
            out.push(Action::LoseDisk(id));
        }
        if self.may(world, CAMPAIGNS) && !replica.leads() && members.voters() & (1 << n) != 0 {
            out.push(Action::Campaign(id));
        }
        let others =
            (0..REPLICAS as u8).filter(|other| *other != id && !world.replicas[usize::from(*other)].lost);
        match replica.role {
            Role::Follower => {}
            Role::Candidate(votes) => {
                let asked = others.filter(|other| members.voters() & (1 << other) != 0);
                out.extend(asked.map(|voter| Action::Grant { voter, candidate: id }));
                if members.is_quorum(votes) {
                    out.push(Action::Lead(id));
                }
            }
            Role::Leader(_) => {
                let sent = others.filter(|other| members.everybody() & (1 << other) != 0);
                out.extend(sent.map(|to| Action::Send { leader: id, to }));
                out.extend([Action::Flush(id), Action::Commit(id)]);
                if self.may(world, WRITES) {
                    out.push(Action::Write(id));
                }
                let is_committed = at <= usize::from(replica.committed);
                let early = self.broken == Some(Broken::FinishEarly);
                if members.is_joint() && (is_committed || early) {
                    out.push(Action::Finish(id));
                }
                if !members.is_joint() && is_committed {
                    self.changes_of(world, id, members, out);
                }
            }
        }
    }

    /// The voter that leaves makes room for the fourth replica; either of two, so that the leader may be it.
    fn changes_of(&self, world: &World, leader: u8, members: Members, out: &mut Vec<Action>) {
        if members.everybody() & 0b1000 == 0 {
            if self.changes > 0 {
                out.push(Action::AddLearner(leader));
            }
        } else if self.may(world, CHANGES) {
            let targets: [Mask; 2] = [0b1011, 0b1110];
            let new = targets.into_iter().filter(|voters| *voters != members.new);
            out.extend(new.map(|voters| Action::Change { leader, voters }));
        }
    }

    fn send(&self, world: &mut World, leader: usize, to: usize) {
        let source = world.replicas[leader].clone();
        let target = &mut world.replicas[to];
        if target.vote > source.vote {
            // The answer tells of a higher ballot.
            let vote = target.vote;
            (world.replicas[leader].vote, world.replicas[leader].role) = (vote, Role::Follower);
            return;
        }
        if target.vote < source.vote || target.leads() {
            (target.vote, target.role) = (source.vote, Role::Follower);
        }
        // What has the same id is the same, as far as a follower can tell.
        let agreed = source.agrees(target);
        if agreed < source.log.len() {
            target.log.truncate(agreed);
            target.log.push(source.log[agreed]);
        }
        let has = source.agrees(target);
        if self.broken == Some(Broken::AnswerUnflushed) {
            target.flushed = target.flushed.min(agreed as u8);
        } else {
            target.flushed = target.log.len() as u8;
        }
        target.committed = target.committed.max(source.committed.min(has as u8));
        if let Role::Leader(matched) = &mut world.replicas[leader].role {
            matched[to] = has as u8;
        }
    }

    fn commit(&self, world: &mut World, leader: usize) -> bool {
        let older = self.broken == Some(Broken::OlderCommitted);
        let end = committable(&world.replicas[leader], first(self), older);
        if end == 0 {
            return false;
        }
        world.replicas[leader].committed = end as u8;
        for at in 0..end {
            let entry = world.replicas[leader].log[at];
            match world.committed.get(at) {
                Some((before, _)) => world.wrong.lost |= *before != entry,
                None => world.committed.push((entry, world.replicas[leader].vote)),
            }
        }
        true
    }

    fn crash(&self, world: &mut World, n: usize) {
        world.used[CRASHES] += 1;
        let replica = &mut world.replicas[n];
        let led = replica.leads();
        replica.log.truncate(replica.flushed.into());
        replica.committed = 0;
        replica.role = Role::Follower;
        if self.broken == Some(Broken::LeaderRestore) && led {
            let mut matched = [0; REPLICAS];
            matched[n] = replica.flushed;
            replica.role = Role::Leader(matched);
        }
        if self.broken == Some(Broken::VoteUnflushed) && !led {
            replica.vote = replica.log.last().map(|entry| entry.ballot).unwrap_or_default();
        }
    }

    fn lead(&self, world: &mut World, n: usize) {
        let mut matched = [0; REPLICAS];
        matched[n] = world.replicas[n].flushed;
        let ballot = world.replicas[n].vote;
        world.wrong.two_leaders |= world.led.contains(&ballot);
        world.led.push(ballot);
        world.led.sort_unstable();
        let log = &world.replicas[n].log;
        // One that hears late that it was elected may lack what a later ballot has committed: it can commit nothing.
        let mut before = world.committed.iter().enumerate().filter(|(_, (_, under))| *under < ballot);
        world.wrong.lost |= before.any(|(at, (entry, _))| log.get(at) != Some(entry));
        world.replicas[n].role = Role::Leader(matched);
        append(world, n, Kind::Blank);
    }

    /// INV-MEMBER: whether two replicas could be elected by voters of which none is asked by both.
    fn disjoint_quorums(&self, world: &World) -> bool {
        let all = (1_u8 << REPLICAS) - 1;
        let would_vote = |n: usize| {
            let last = world.replicas[n].last();
            let votes = |v: &usize| !world.replicas[*v].lost && world.replicas[*v].last() <= last;
            (0..REPLICAS).filter(votes).fold(0, |mask, v| mask | 1 << v)
        };
        let able = |n: &usize| {
            let replica = &world.replicas[*n];
            !replica.lost && replica.members(first(self)).0.voters() & (1 << n) != 0
        };
        let candidates: Vec<(usize, Members, Mask)> = (0..REPLICAS)
            .filter(able)
            .map(|n| (n, world.replicas[n].members(first(self)).0, would_vote(n)))
            .collect();
        candidates.iter().any(|(a, of_a, votes_a)| {
            let rest = candidates.iter().filter(|(b, ..)| b > a);
            let mut pairs = rest.flat_map(|other| (1..all).map(move |mask| (other, mask)));
            pairs.any(|((_, of_b, votes_b), mask)| {
                of_a.is_quorum(votes_a & mask) && of_b.is_quorum(votes_b & !mask)
            })
        })
    }
}

impl Model for Membership {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        // The first leader leads, and its first entry is committed.
        let ballot = Ballot { term: 1, replica: 0 };
        let blank = Entry { ballot, kind: Kind::Blank };
        let mut replicas = [Replica::new(), Replica::new(), Replica::new(), Replica::new()];
        for replica in &mut replicas[..3] {
            (replica.vote, replica.log, replica.flushed) = (ballot, vec![blank], 1);
        }
        replicas[0].committed = 1;
        replicas[0].role = Role::Leader([1, 1, 1, 0]);
        // So that what is broken is within reach: a write that has reached nobody else.
        if self.broken == Some(Broken::OlderCommitted) {
            replicas[0].log.push(Entry { ballot, kind: Kind::Write(1) });
        }
        let wrong = Wrong::default();
        vec![World { replicas, committed: vec![(blank, ballot)], led: vec![ballot], used: [0; 5], wrong }]
    }

    fn actions(&self, world: &World, out: &mut Vec<Action>) {
        // What is wrong once is not looked into further.
        if world.wrong != Wrong::default() {
            return;
        }
        (0..REPLICAS).for_each(|n| self.actions_of(world, n, out));
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        let mut next = world.clone();
        match action {
            Action::Campaign(n) => {
                next.used[CAMPAIGNS] += 1;
                let replica = &mut next.replicas[usize::from(n)];
                replica.vote = Ballot { term: replica.vote.term + 1, replica: n };
                replica.role = Role::Candidate(1 << n);
            }
            Action::Grant { voter, candidate } => {
                let (ballot, last) = (
                    world.replicas[usize::from(candidate)].vote,
                    world.replicas[usize::from(candidate)].last(),
                );
                let voter_state = &mut next.replicas[usize::from(voter)];
                if !grants(voter_state, ballot, last, self.broken != Some(Broken::LogsNotCompared)) {
                    return None;
                }
                (voter_state.vote, voter_state.role) = (ballot, Role::Follower);
                if let Role::Candidate(votes) = &mut next.replicas[usize::from(candidate)].role {
                    *votes |= 1 << voter;
                }
            }
            Action::Lead(n) => self.lead(&mut next, n.into()),
            Action::Write(n) => {
                next.used[WRITES] += 1;
                let number = next.used[WRITES];
                append(&mut next, n.into(), Kind::Write(number));
            }
            Action::AddLearner(n) => {
                let members = world.replicas[usize::from(n)].members(first(self)).0;
                append(&mut next, n.into(), Kind::Members(Members { learners: 0b1000, ..members }));
            }
            Action::Change { leader, voters } => {
                next.used[CHANGES] += 1;
                let members = world.replicas[usize::from(leader)].members(first(self)).0;
                let old = if self.broken == Some(Broken::SingleStep) { 0 } else { members.new };
                append(&mut next, leader.into(), Kind::Members(Members { old, new: voters, learners: 0 }));
            }
            Action::Finish(n) => {
                let members = world.replicas[usize::from(n)].members(first(self)).0;
                append(&mut next, n.into(), Kind::Members(Members { old: 0, ..members }));
            }
            Action::Send { leader, to } => self.send(&mut next, leader.into(), to.into()),
            Action::Flush(n) => {
                let replica = &mut next.replicas[usize::from(n)];
                replica.flushed = replica.log.len() as u8;
                if let Role::Leader(matched) = &mut replica.role {
                    matched[usize::from(n)] = replica.flushed;
                }
            }
            Action::Commit(n) => {
                if !self.commit(&mut next, n.into()) {
                    return None;
                }
            }
            Action::Crash(n) => self.crash(&mut next, n.into()),
            Action::LoseDisk(n) => {
                next.used[LOST] += 1;
                next.replicas[usize::from(n)] =
                    Replica { lost: self.broken != Some(Broken::IdReused), ..Replica::new() };
            }
        }
        (next != *world).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always("INV-TERM: one leader under a ballot", |_, world: &World| {
                !world.wrong.two_leaders
            }),
            Property::always("INV-TERM: no log id is used twice", |_, world: &World| !world.wrong.reused),
            Property::always("INV-MEMBER: no committed entry is lost", |_, world: &World| !world.wrong.lost),
            Property::always("INV-MEMBER: no two disjoint quorums", |model: &Self, world: &World| {
                !model.disjoint_quorums(world)
            }),
            Property::sometimes("another leader commits", |_, world: &World| {
                world.committed.last().is_some_and(|(entry, _)| entry.ballot.term > 1)
            }),
        ];
        if self.changes > 0 {
            properties.push(Property::sometimes("a change is committed whole", |_, world: &World| {
                let last = world.committed.last();
                last.is_some_and(
                    |(e, _)| matches!(e.kind, Kind::Members(m) if !m.is_joint() && m.new != 0b0111),
                )
            }));
        }
        properties
    }
}
