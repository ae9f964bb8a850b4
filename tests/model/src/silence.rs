//! The voters' lease for their leader, and the silence of a voter whose daemon has started again (DESIGN: session lease).
//!
//! Three voters. A leader counts its lease from when it sent a heartbeat that a majority answered; a voter that answered
//! neither grants a vote nor campaigns until that lease has ended by its own clock. A daemon that starts again has
//! forgotten what it answered, and is silent for one lease instead; a group that is only loaded again by a running daemon
//! owes what the daemon remembers. The silence is the product's `StartupSilence`.
//!
//! Renewals do not rest on this any more (decision 0073): a leader asks a majority each time. It remains a second line,
//! and keeps a restarted voter from deposing a living leader.

use std::fmt;

use holdfast_protocol::lease::StartupSilence;
use stateright::{Model, Property};

use crate::fence::terms;

const VOTERS: usize = 3;
/// The leader's clock, and the voters': the rates that are worst for it.
const LEADER_RATE: u64 = 3;
const VOTER_RATE: u64 = 5;

/// What is broken on purpose.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Broken {
    /// A daemon that starts again votes at once.
    NoSilence,
    /// A group that is loaded again owes only what remains since the daemon's start.
    ForgottenWhenUnloaded,
    /// The leader counts from when the answer came.
    LeaseFromAnswer,
    /// A fault of the product's own code.
    Planted(&'static str),
}

/// The model: so many ticks, so many restarts and reloads.
#[derive(Clone, Copy, Debug)]
pub struct Silence {
    /// Ticks of time; a lease is two.
    pub ticks: u8,
    /// Restarts and reloads together.
    pub restarts: u8,
    /// What is broken.
    pub broken: Option<Broken>,
}

/// A voter.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Voter {
    started: u64,
    acknowledged: Option<u64>,
    silence: StartupSilence,
}

/// Everything. Voter 0 leads.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct World {
    tick: u8,
    voters: [Voter; VOTERS],
    /// When the leader sent the heartbeats that are answered and not heard of: voter and tick.
    answers: Vec<(u8, u8)>,
    /// The leader's lease by its own clock.
    until: u64,
    deposed: bool,
    restarts: u8,
}

/// What can happen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[expect(missing_docs, reason = "the Display says it")]
pub enum Action {
    Tick,
    Beat { voter: u8 },
    Hear { voter: u8, sent: u8 },
    Restart { voter: u8 },
    Reload { voter: u8 },
    Elect { candidate: u8, other: u8 },
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tick => write!(f, "time goes on"),
            Self::Beat { voter } => write!(f, "voter {voter} answers a heartbeat"),
            Self::Hear { voter, sent } => {
                write!(f, "the leader hears voter {voter} answer what it sent at tick {sent}")
            }
            Self::Restart { voter } => write!(f, "voter {voter}'s daemon starts again"),
            Self::Reload { voter } => write!(f, "voter {voter}'s group is loaded again"),
            Self::Elect { candidate, other } => write!(f, "voter {candidate} is elected by voter {other}"),
        }
    }
}

impl Silence {
    fn is_free(&self, world: &World, voter: usize) -> bool {
        let (now, voter) = (u64::from(world.tick) * VOTER_RATE, &world.voters[voter]);
        let promised = StartupSilence::existing(&terms(), 0, voter.acknowledged);
        !voter.silence.is_silent(now) && (voter.acknowledged.is_none() || !promised.is_silent(now))
    }
}

impl Model for Silence {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        let voter = Voter { started: 0, acknowledged: None, silence: StartupSilence::new_group() };
        let voters = [voter; VOTERS];
        vec![World { tick: 0, voters, answers: Vec::new(), until: 0, deposed: false, restarts: 0 }]
    }

    fn actions(&self, world: &World, out: &mut Vec<Action>) {
        if world.tick < self.ticks {
            out.push(Action::Tick);
        }
        for voter in 1..VOTERS as u8 {
            if !world.answers.contains(&(voter, world.tick)) {
                out.push(Action::Beat { voter });
            }
            if world.restarts < self.restarts {
                out.extend([Action::Restart { voter }, Action::Reload { voter }]);
            }
            out.extend(
                (0..VOTERS as u8)
                    .filter(|other| *other != voter)
                    .map(|other| Action::Elect { candidate: voter, other }),
            );
        }
        out.extend(world.answers.iter().map(|(voter, sent)| Action::Hear { voter: *voter, sent: *sent }));
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        crate::plant(match self.broken {
            Some(Broken::Planted(name)) => Some(name),
            _ => None,
        });
        let mut next = world.clone();
        let now = u64::from(world.tick) * VOTER_RATE;
        match action {
            Action::Tick => next.tick += 1,
            Action::Beat { voter } => {
                if world.deposed {
                    return None;
                }
                next.voters[usize::from(voter)].acknowledged = Some(now);
                next.answers.push((voter, world.tick));
                next.answers.sort_unstable();
            }
            // With its own, one answer is a majority of three.
            Action::Hear { voter, sent } => {
                next.answers.retain(|answer| *answer != (voter, sent));
                let from = if self.broken == Some(Broken::LeaseFromAnswer) { world.tick } else { sent };
                let held = u64::try_from(terms().held().as_nanos()).unwrap_or(u64::MAX);
                next.until = next.until.max(u64::from(from) * LEADER_RATE + held);
            }
            Action::Restart { voter } => {
                let voter = &mut next.voters[usize::from(voter)];
                (voter.started, voter.acknowledged) = (now, None);
                voter.silence = match self.broken {
                    Some(Broken::NoSilence) => StartupSilence::new_group(),
                    _ => StartupSilence::existing(&terms(), now, None),
                };
                next.restarts += 1;
            }
            Action::Reload { voter } => {
                let voter = &mut next.voters[usize::from(voter)];
                if self.broken == Some(Broken::ForgottenWhenUnloaded) {
                    voter.acknowledged = None;
                }
                let known = voter.acknowledged;
                voter.silence = StartupSilence::existing(&terms(), voter.started, known);
                next.restarts += 1;
            }
            // The leader itself may have been told; it votes for nobody while it leads.
            Action::Elect { candidate, other } => {
                let voters = [candidate, other].map(usize::from);
                if other == 0 || world.deposed || !voters.iter().all(|voter| self.is_free(world, *voter)) {
                    return None;
                }
                next.deposed = true;
            }
        }
        (next != *world).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("INV-LEASE: no second leader beside a living lease", |_, world: &World| {
                !world.deposed || u64::from(world.tick) * LEADER_RATE >= world.until
            }),
            Property::sometimes("another leader is elected after a lease", |_, world: &World| {
                world.deposed && world.until > 0
            }),
        ]
    }
}
