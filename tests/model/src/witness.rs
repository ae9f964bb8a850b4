//! Two data replicas and a witness (DESIGN: witness): the abstract Raft of [`crate::raft`] with a third voter that keeps
//! the log and no data, purges what every data voter is known to have, goes beyond its budget while one is away, and leads
//! only to bring a data replica up to date.
//!
//! A site is lost with its disk and never comes back; one that is away is one that nobody happens to send anything to. That
//! a write may be acknowledged is that a data replica that leads has committed it.

use std::fmt;

use stateright::{Model, Property};

use crate::raft::{Ballot, Entry, Kind, Mask, Members, REPLICAS, Replica, Role, committable, grants};

/// The replica that is the witness.
const WITNESS: usize = 2;
/// Replicas of the volume.
const VOTERS: usize = 3;

/// What is broken on purpose.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Broken {
    /// The witness purges what is committed, whoever has it.
    PurgesEarly,
    /// The witness believes what is told of entries that are not committed.
    ToldUncommitted,
    /// The witness campaigns though it has purged what a data voter lacks.
    CampaignsPastBudget,
    /// The same, and a data replica takes a snapshot of it for its data.
    SnapshotTaken,
    /// Beyond its budget, the witness lets go whatever it holds, whether or not a data replica leads.
    OverrunWithoutLeader,
    /// A witness that has purged forgets where its log ended, and votes as if it were empty.
    EndForgotten,
}

/// The model.
#[derive(Clone, Copy, Debug)]
pub struct Witness {
    /// Campaigns.
    pub campaigns: u8,
    /// Crashes.
    pub crashes: u8,
    /// Lost disks: one at most, or nothing is promised.
    pub lost: u8,
    /// Writes.
    pub writes: u8,
    /// Whether the witness's budget is one entry; else it has room for all.
    pub budget: bool,
    /// What is broken.
    pub broken: Option<Broken>,
}

/// Everything.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct World {
    replicas: [Replica; VOTERS],
    /// How much of its log the witness has let go.
    purged: u8,
    /// What the witness knows of the data voters: how much of the committed log each has made durable.
    known: [u8; 2],
    /// Up to where a data replica took a snapshot for data.
    hollow: [u8; 2],
    /// Up to where the witness let go what somebody lacked.
    overran: u8,
    committed: Vec<(Entry, Ballot)>,
    /// How long the longest log was when the first disk was lost.
    at_loss: Option<u8>,
    used: [u8; 4],
    wrong: Wrong,
}

/// What must never happen, and did.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Wrong {
    lost: bool,
    cannot_hand_over: bool,
    last_copy: bool,
}

const CAMPAIGNS: usize = 0;
const CRASHES: usize = 1;
const LOST: usize = 2;
const WRITES: usize = 3;

/// What can happen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[expect(missing_docs, reason = "the Display says it")]
pub enum Action {
    Campaign(u8),
    Grant { voter: u8, candidate: u8 },
    Lead(u8),
    Write(u8),
    Send { leader: u8, to: u8 },
    Flush(u8),
    Commit(u8),
    Crash(u8),
    LoseDisk(u8),
    Tell(u8),
    Purge,
    Overrun,
}

fn name(replica: u8) -> &'static str {
    ["d0", "d1", "the witness"][usize::from(replica)]
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Campaign(n) => write!(f, "{} campaigns", name(*n)),
            Self::Grant { voter, candidate } => write!(f, "{} votes for {}", name(*voter), name(*candidate)),
            Self::Lead(n) => write!(f, "{} leads", name(*n)),
            Self::Write(n) => write!(f, "{} takes a write", name(*n)),
            Self::Send { leader, to } => write!(f, "{} sends {} an entry", name(*leader), name(*to)),
            Self::Flush(n) => write!(f, "{} flushes its own log", name(*n)),
            Self::Commit(n) => write!(f, "{} commits", name(*n)),
            Self::Crash(n) => write!(f, "{} crashes and starts again", name(*n)),
            Self::LoseDisk(n) => write!(f, "{} is lost with its disk", name(*n)),
            Self::Tell(n) => write!(f, "{} tells the witness what everybody has", name(*n)),
            Self::Purge => write!(f, "the witness purges"),
            Self::Overrun => write!(f, "the witness purges beyond its budget"),
        }
    }
}

const MEMBERS: Members = Members { old: 0, new: 0b111, learners: 0 };

impl Witness {
    fn may(&self, world: &World, what: usize) -> bool {
        world.used[what] < [self.campaigns, self.crashes, self.lost, self.writes][what]
    }

    fn actions_of(&self, world: &World, n: usize, out: &mut Vec<Action>) {
        let (replica, id) = (&world.replicas[n], n as u8);
        if self.may(world, CRASHES) {
            out.push(Action::Crash(id));
        }
        if self.may(world, LOST) {
            out.push(Action::LoseDisk(id));
        }
        let barred = n == WITNESS
            && world.known.iter().any(|known| *known < world.purged)
            && !matches!(self.broken, Some(Broken::CampaignsPastBudget | Broken::SnapshotTaken));
        if self.may(world, CAMPAIGNS) && !replica.leads() && !barred {
            out.push(Action::Campaign(id));
        }
        let others =
            (0..VOTERS as u8).filter(|other| *other != id && !world.replicas[usize::from(*other)].lost);
        match replica.role {
            Role::Follower => {}
            Role::Candidate(votes) => {
                out.extend(others.map(|voter| Action::Grant { voter, candidate: id }));
                if MEMBERS.is_quorum(votes) {
                    out.push(Action::Lead(id));
                }
            }
            Role::Leader(_) => {
                out.extend(others.map(|to| Action::Send { leader: id, to }));
                out.extend([Action::Flush(id), Action::Commit(id)]);
                if n != WITNESS {
                    out.push(Action::Tell(id));
                    if self.may(world, WRITES) {
                        out.push(Action::Write(id));
                    }
                }
            }
        }
    }

    /// How far the witness may let go.
    fn may_purge(&self, world: &World) -> u8 {
        let witness = &world.replicas[WITNESS];
        let durable = witness.committed.min(witness.flushed);
        if self.broken == Some(Broken::PurgesEarly) {
            return durable;
        }
        durable.min(world.known[0]).min(world.known[1])
    }

    /// How far the witness may let go beyond its budget: what the data replica that it follows is known to have. Without
    /// one, what it holds may be the last copy.
    fn may_overrun(&self, world: &World) -> u8 {
        let witness = &world.replicas[WITNESS];
        let durable = witness.committed.min(witness.flushed);
        if self.broken == Some(Broken::OverrunWithoutLeader) {
            return durable;
        }
        let leader = (0..WITNESS).find(|data| {
            let data = &world.replicas[*data];
            data.leads() && data.vote == witness.vote
        });
        leader.map_or(0, |leader| durable.min(world.known[leader]))
    }

    fn send(&self, world: &mut World, leader: usize, to: usize) {
        let source = world.replicas[leader].clone();
        let target = &mut world.replicas[to];
        if target.vote > source.vote {
            let vote = target.vote;
            (world.replicas[leader].vote, world.replicas[leader].role) = (vote, Role::Follower);
            return;
        }
        let agreed = source.agrees(target);
        if leader == WITNESS && agreed < usize::from(world.purged) {
            // It has not got what the other needs next.
            if self.broken == Some(Broken::SnapshotTaken) {
                target.log = source.log[..usize::from(world.purged)].to_vec();
                (target.flushed, target.vote, target.role) = (world.purged, source.vote, Role::Follower);
                world.hollow[to] = world.purged;
            }
            return;
        }
        if target.vote < source.vote || target.leads() {
            (target.vote, target.role) = (source.vote, Role::Follower);
        }
        if agreed < source.log.len() {
            target.log.truncate(agreed);
            target.log.push(source.log[agreed]);
        }
        let has = source.agrees(target) as u8;
        target.flushed = target.log.len() as u8;
        target.committed = target.committed.max(source.committed.min(has));
        if let Role::Leader(matched) = &mut world.replicas[leader].role {
            matched[to] = has;
        }
    }

    fn commit(&self, world: &mut World, leader: usize) -> bool {
        let end = committable(&world.replicas[leader], MEMBERS, false);
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

    fn lead(&self, world: &mut World, n: usize) {
        let lost = (0..VOTERS).filter(|n| world.replicas[*n].lost).fold(0, |mask, n| mask | 1 << n);
        if let Role::Candidate(votes) = world.replicas[n].role
            && n == WITNESS
            && votes & 0b011 & !lost != 0
            && self.broken != Some(Broken::SnapshotTaken)
        {
            world.wrong.cannot_hand_over |= !world.can_hand_over(votes & !lost);
        }
        let mut matched = [0; REPLICAS];
        matched[n] = world.replicas[n].flushed;
        let replica = &mut world.replicas[n];
        let ballot = replica.vote;
        let hollow = if n == WITNESS { 0 } else { world.hollow[n] };
        let mut before = world.committed.iter().enumerate().filter(|(_, (_, under))| *under < ballot);
        world.wrong.lost |=
            before.any(|(at, (entry, _))| replica.log.get(at) != Some(entry) || at < usize::from(hollow));
        replica.role = Role::Leader(matched);
        replica.log.push(Entry { ballot, kind: Kind::Blank });
    }

    fn tell(&self, world: &mut World, leader: usize) {
        let Role::Leader(mut matched) = world.replicas[leader].role else { return };
        matched[leader] = world.replicas[leader].flushed;
        let committed = world.replicas[leader].committed;
        for (known, has) in world.known.iter_mut().zip(matched) {
            let told = if self.broken == Some(Broken::ToldUncommitted) { has } else { has.min(committed) };
            *known = told.max(*known);
        }
    }

    fn lose(&self, world: &mut World, n: usize) {
        world.used[LOST] += 1;
        world.at_loss = world.replicas.iter().map(|replica| replica.log.len() as u8).max();
        world.replicas[n] = Replica { lost: true, ..Replica::new() };
        if n == WITNESS {
            world.purged = 0;
        }
    }
}

impl World {
    /// On how many media a committed entry stands.
    fn media(&self, at: usize) -> usize {
        let has = |n: &usize| {
            let replica = &self.replicas[*n];
            let gone = if *n == WITNESS { self.purged } else { self.hollow[*n] };
            at < usize::from(replica.flushed)
                && replica.log[at] == self.committed[at].0
                && at >= usize::from(gone)
        };
        (0..VOTERS).filter(has).count()
    }

    /// What is committed and promised to last: not what the witness let go beyond its budget.
    fn promised(&self) -> impl Iterator<Item = usize> + use<> {
        usize::from(self.overran)..self.committed.len()
    }

    /// Whether every write that is promised so stands on two media: all before a loss, and those after it.
    fn stand_on_two(&self) -> bool {
        let since = self.at_loss.map_or(0, usize::from);
        self.promised().filter(|at| *at >= since).all(|at| self.media(at) >= 2)
    }

    /// Whether the witness has what one of these data replicas lacks.
    fn can_hand_over(&self, to: Mask) -> bool {
        let witness = &self.replicas[WITNESS];
        let has_for = |data: usize| witness.agrees(&self.replicas[data]) >= usize::from(self.purged);
        (0..WITNESS).any(|data| to & (1 << data) != 0 && has_for(data))
    }
}

impl Model for Witness {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        let ballot = Ballot { term: 1, replica: 0 };
        let blank = Entry { ballot, kind: Kind::Blank };
        let one = Replica { vote: ballot, log: vec![blank], flushed: 1, ..Replica::new() };
        let mut replicas = [one.clone(), one.clone(), one];
        replicas[0].committed = 1;
        replicas[0].role = Role::Leader([1, 1, 1, 0]);
        vec![World {
            replicas,
            purged: 0,
            known: [0; 2],
            hollow: [0; 2],
            overran: 0,
            committed: vec![(blank, ballot)],
            at_loss: None,
            used: [0; 4],
            wrong: Wrong::default(),
        }]
    }

    fn actions(&self, world: &World, out: &mut Vec<Action>) {
        if world.wrong != Wrong::default() {
            return;
        }
        (0..VOTERS).filter(|n| !world.replicas[*n].lost).for_each(|n| self.actions_of(world, n, out));
        let witness = &world.replicas[WITNESS];
        if witness.lost {
            return;
        }
        if self.may_purge(world) > world.purged {
            out.push(Action::Purge);
        }
        if self.budget
            && witness.committed.min(witness.flushed) > world.purged + 1
            && self.may_overrun(world) > world.purged
        {
            out.push(Action::Overrun);
        }
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
                let asks = &world.replicas[usize::from(candidate)];
                let voter_state = &mut next.replicas[usize::from(voter)];
                let forgets = self.broken == Some(Broken::EndForgotten)
                    && usize::from(voter) == WITNESS
                    && usize::from(world.purged) == voter_state.log.len();
                if !grants(voter_state, asks.vote, asks.last(), !forgets) {
                    return None;
                }
                (voter_state.vote, voter_state.role) = (asks.vote, Role::Follower);
                if let Role::Candidate(votes) = &mut next.replicas[usize::from(candidate)].role {
                    let vote: Mask = 1 << voter;
                    *votes |= vote;
                }
            }
            Action::Lead(n) => self.lead(&mut next, n.into()),
            Action::Write(n) => {
                next.used[WRITES] += 1;
                let (number, replica) = (next.used[WRITES], &mut next.replicas[usize::from(n)]);
                replica.log.push(Entry { ballot: replica.vote, kind: Kind::Write(number) });
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
            Action::Crash(n) => {
                next.used[CRASHES] += 1;
                let replica = &mut next.replicas[usize::from(n)];
                replica.log.truncate(replica.flushed.into());
                (replica.committed, replica.role) = (0, Role::Follower);
            }
            Action::LoseDisk(n) => self.lose(&mut next, n.into()),
            Action::Tell(n) => self.tell(&mut next, n.into()),
            Action::Purge => next.purged = self.may_purge(world),
            Action::Overrun => {
                next.purged = self.may_overrun(world);
                next.overran = next.purged;
                next.wrong.last_copy =
                    (0..next.committed.len().min(next.purged.into())).any(|at| next.media(at) == 0);
            }
        }
        (next != *world).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always("INV-WITNESS: no leader lacks what is committed", |_, world: &World| {
                !world.wrong.lost
            }),
            Property::always("INV-WITNESS: no acknowledged write is lost", |_, world: &World| {
                world.promised().all(|at| world.media(at) >= 1)
            }),
            Property::always("INV-WITNESS: two media", |_, world: &World| world.stand_on_two()),
            Property::always("INV-WITNESS: a witness that is elected can hand over", |_, world: &World| {
                !world.wrong.cannot_hand_over
            }),
            Property::always(
                "INV-WITNESS: what goes beyond the budget stands on a full copy",
                |_, world: &World| !world.wrong.last_copy,
            ),
            Property::sometimes("the witness leads", |_, world: &World| world.replicas[WITNESS].leads()),
            Property::sometimes("the witness purges", |_, world: &World| world.purged > 1),
        ];
        if self.budget {
            properties.push(Property::sometimes("the witness is beyond its budget", |_, world: &World| {
                world.known.iter().any(|known| *known < world.overran)
            }));
        }
        if self.lost > 0 {
            properties.push(Property::sometimes(
                "a write is committed after a site was lost",
                |_, world: &World| {
                    world.at_loss.is_some_and(|at| world.promised().any(|entry| entry >= usize::from(at)))
                },
            ));
        }
        properties
    }
}
