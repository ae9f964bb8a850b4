//! Attach, lease and fence (DESIGN: epoch fencing, session lease, settling).
//!
//! Sessions on nodes attach, renew, write, give up and end; a leader renews, decides and settles; leaders change, and a
//! deposed one goes on believing. What decides is the product's own: `VolumeState`, `SessionLease`, `HolderWatch`,
//! `decide_attach`, `admit_renewal`, `admit_read` and `SettleWait` of `holdfast_protocol`.
//!
//! Abstracted: the group is one log of committed commands. Whatever was ever proposed may be committed at any later
//! moment, under any leader, any number of times, or never: that covers delay, loss, repetition, reordering and what a
//! deposed leader left behind, and more than Raft allows. A replica may have applied any prefix of the log, so reads are
//! no steps: the invariants look at what *every* prefix would answer to *every* session whose lease lives.
//!
//! Steps between which nothing is lost are one step. A leader decides on an Attach as it is asked, because what a late
//! request meets is either refused or the same as a fresh one; what is late is the command on its way into the log. A
//! renewal is granted as it is sent, because a grant that comes later gives a shorter lease; what is late is its answer.
//! A leader begins to wait for a former holder as the change is committed, because one that sees it later waits longer.
//!
//! Time goes in ticks; a lease is two of them. The clocks of sessions and those of leaders go at the slowest or the
//! fastest rate that the drift bound allows. The smaller scope has only the worst: slow sessions, fast leaders.

mod step;
mod world;

use std::fmt;
use std::time::Duration;

use holdfast_protocol::lease::{LeaseTerms, NotServed, admit_read};
use holdfast_types::Epoch;
use stateright::{Expectation, Model, Property};

pub use world::{Message, World};

/// How large the world is.
#[derive(Clone, Copy, Debug)]
pub struct Scope {
    /// Whether all rates of the clocks are looked at, not only the worst.
    pub all_rates: bool,
    /// Ticks of time.
    pub ticks: u8,
    /// Changes of leader.
    pub elections: u8,
    /// Attaches that are asked for, repetitions with another expectation included.
    pub attaches: u8,
    /// Renewals that are sent.
    pub renewals: u8,
    /// Writes that are sent.
    pub writes: u8,
    /// Detaches that are asked for.
    pub detaches: u8,
}

/// What is broken on purpose.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Broken {
    /// A fault of the product's own code.
    Planted(&'static str),
    /// The session counts its lease from when the answer came.
    LeaseFromAnswer,
    /// The leader settles without waiting.
    SettleAtOnce,
    /// A deposed leader that has not heard of it renews, from the state that it knew.
    RenewUnconfirmed,
    /// A session that confirmed its end goes on serving.
    ConfirmWithoutEnding,
    /// A new leader does not wait for leases that the one before granted.
    NewLeaderPresumesDead,
}

/// The model.
#[derive(Clone, Copy, Debug)]
pub struct Fence {
    /// Its size.
    pub scope: Scope,
    /// What is broken.
    pub broken: Option<Broken>,
}

/// Nodes that hold sessions.
pub(crate) const NODES: usize = 2;

/// Four of these are a tick of true time, by a clock that is slow and by one that is fast.
const SLOW: u64 = 3;
const FAST: u64 = 5;

/// Two ticks, with a bound on drift that makes a clock's extremes whole numbers.
pub(crate) fn terms() -> LeaseTerms {
    LeaseTerms { lease: Duration::from_nanos(8), drift_permille: 250 }
}

/// What can happen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[expect(missing_docs, reason = "the Display says it")]
pub enum Action {
    Tick,
    Elect,
    Ask { node: u8, force: bool },
    Commit(Message),
    Learn { node: u8 },
    Renew { node: u8, leader: u8 },
    Renewed { node: u8, number: u8 },
    Write { node: u8 },
    Acknowledge { node: u8, seq: u8 },
    GiveUp { node: u8, seq: u8 },
    Detach { node: u8 },
    ForceDetach,
    AskFormer { leader: u8, session: u8 },
    ProposeSettled { leader: u8 },
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tick => write!(f, "time goes on"),
            Self::Elect => write!(f, "another leader is elected"),
            Self::Ask { node, force } => {
                write!(f, "n{node} asks to attach{}", if *force { " by force" } else { "" })
            }
            Self::Commit(message) => write!(f, "committed: {message}"),
            Self::Learn { node } => write!(f, "n{node} learns that it is attached"),
            Self::Renew { node, leader } => write!(f, "leader {leader} grants what n{node} sends: a renewal"),
            Self::Renewed { node, number } => write!(f, "n{node} hears that renewal {number} was granted"),
            Self::Write { node } => write!(f, "n{node} sends a write"),
            Self::Acknowledge { node, seq } => write!(f, "n{node} hears that write {seq} was applied"),
            Self::GiveUp { node, seq } => write!(f, "n{node} gives write {seq} up"),
            Self::Detach { node } => write!(f, "n{node} ends its session and asks to detach"),
            Self::ForceDetach => write!(f, "an operator asks to detach by force"),
            Self::AskFormer { leader, session } => {
                write!(f, "leader {leader} asks s{session}, which confirms its end")
            }
            Self::ProposeSettled { leader } => write!(f, "leader {leader} proposes that it has settled"),
        }
    }
}

impl Fence {
    /// INV-LEASE: nobody who believes in its lease stands beside an applied write of a newer epoch.
    fn leases_hold(&self, world: &World) -> bool {
        world.living().all(|session| {
            !session.lease.valid(world.session_clock())
                || session.epoch.is_none_or(|epoch| world.written_in <= epoch)
        })
    }

    /// INV-LEASE, INV-SETTLE: whatever replica a session with a living lease reads from, it sees every acknowledged write.
    fn reads_are_fresh(&self, world: &World) -> bool {
        world.living().all(|session| {
            let Some(epoch) = session.epoch.filter(|_| session.lease.valid(world.session_clock())) else {
                return true;
            };
            (usize::from(session.floor)..world.states.len()).all(|prefix| {
                let answer = admit_read(&world.states[prefix], Epoch(epoch.into()), session.session_id());
                prefix >= usize::from(world.acknowledged)
                    || !matches!(answer, Ok(()))
                    || matches!(answer, Err(NotServed::Unsettled))
            })
        })
    }
}

impl Model for Fence {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        let worst = World::new([SLOW, FAST]);
        if !self.scope.all_rates {
            return vec![worst];
        }
        vec![worst, World::new([FAST, SLOW]), World::new([SLOW, SLOW]), World::new([FAST, FAST])]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        // What is wrong once is not looked into further.
        if self.broken.is_some()
            && !self
                .properties()
                .iter()
                .all(|p| p.expectation == Expectation::Sometimes || (p.condition)(self, world))
        {
            return;
        }
        step::actions(self, world, actions);
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        let fault = match self.broken {
            Some(Broken::Planted(name)) => Some(name),
            _ => None,
        };
        crate::plant(fault);
        let mut next = world.clone();
        step::take(self, &mut next, action).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::always("INV-FENCE: one writer", |_, world: &World| !world.wrong.fence),
            Property::always("INV-ONCE: no write has two effects", |_, world: &World| !world.wrong.once),
            Property::always("INV-LATE: nothing lands late", |_, world: &World| !world.wrong.late),
            Property::always("INV-LEASE: no write beside an older lease", Self::leases_hold),
            Property::always("INV-SETTLE: no stale read", Self::reads_are_fresh),
            Property::always("courtesy: a live holder is not replaced without force", |_, world: &World| {
                !world.wrong.courtesy
            }),
            Property::sometimes("a second holder's write is acknowledged", |_, world: &World| {
                world.acknowledged > 0 && world.written_in > 1
            }),
        ];
        // A new holder is given one full lease from when the leader first sees it.
        if self.scope.ticks >= 4 {
            properties.push(Property::sometimes(
                "a dead lease lets another in without force",
                |_, world: &World| world.let_in_unforced(),
            ));
        }
        if self.scope.elections > 0 {
            properties.push(Property::sometimes("a deposed leader believes on", |_, world: &World| {
                world.leaders.len() > 1
            }));
        }
        properties
    }
}
