//! The state of the model of fencing.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use holdfast_protocol::command::{AttachMode, Tag, VolumeCommand};
use holdfast_protocol::lease::{HolderWatch, SessionLease, SettleWait};
use holdfast_protocol::volume::VolumeState;
use holdfast_types::{
    AttachmentId, BlockIndex, BlockRange, ByteSize, Epoch, NodeName, Seq, SessionId, StoreId,
};

use super::{NODES, terms};

/// What is on its way, or in the log.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[expect(missing_docs, reason = "as in the protocol")]
pub enum Message {
    Attach { node: u8, session: u8, expected: u8, force: bool, confirmed: bool },
    Write { session: u8, epoch: u8, seq: u8, oldest: u8 },
    Detach { epoch: u8, confirmed: bool },
    Settled { epoch: u8 },
}

impl fmt::Display for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Attach { node, session, expected, force, .. } => {
                let how = if *force { ", forced" } else { "" };
                write!(f, "attach of s{session} on n{node} over epoch {expected}{how}")
            }
            Self::Write { session, epoch, seq, oldest } => {
                write!(f, "write {seq} of s{session}, epoch {epoch}, oldest {oldest}")
            }
            Self::Detach { epoch, confirmed } => {
                write!(f, "detach of epoch {epoch}{}", if *confirmed { "" } else { ", forced" })
            }
            Self::Settled { epoch } => write!(f, "settled for epoch {epoch}"),
        }
    }
}

pub(crate) fn session_id(session: u8) -> SessionId {
    SessionId(u128::from(session) + 1)
}

impl Message {
    /// The command of the product's log.
    pub(crate) fn command(self) -> VolumeCommand {
        match self {
            Self::Attach { node, session, expected, force, confirmed } => VolumeCommand::Attach {
                expected: Epoch(expected.into()),
                node: NodeName::new(format!("n{node}")),
                store: StoreId(u128::from(node) + 1),
                session: session_id(session),
                attachment: AttachmentId((u128::from(session) + 1) << 64),
                mode: AttachMode::Exclusive,
                force,
                confirmed,
            },
            Self::Write { session, epoch, seq, oldest } => VolumeCommand::Write {
                tag: Tag {
                    epoch: Epoch(epoch.into()),
                    session: session_id(session),
                    seq: Seq(seq.into()),
                    oldest: Seq(oldest.into()),
                },
                range: BlockRange::new(BlockIndex(0), 1),
                checksums: vec![0],
            },
            Self::Detach { epoch, confirmed } => {
                VolumeCommand::Detach { epoch: Epoch(epoch.into()), force: !confirmed, confirmed }
            }
            Self::Settled { epoch } => VolumeCommand::Settled { epoch: Epoch(epoch.into()) },
        }
    }
}

/// A session that runs, or waits for the answer to its Attach.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Session {
    pub(crate) id: u8,
    /// Its epoch, once it has learned it.
    pub(crate) epoch: Option<u8>,
    pub(crate) floor: u8,
    pub(crate) lease: SessionLease,
    pub(crate) next: u8,
    pub(crate) waiting: BTreeSet<u8>,
}

impl Session {
    pub(crate) fn new(id: u8) -> Self {
        let lease = SessionLease::new(terms());
        Self { id, epoch: None, floor: 0, lease, next: 1, waiting: BTreeSet::new() }
    }
    pub(crate) fn session_id(&self) -> SessionId {
        session_id(self.id)
    }
}

/// One that leads, or was deposed and has not heard of it.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Leader {
    /// By its own clock.
    pub(crate) since: u64,
    pub(crate) watch: HolderWatch,
    pub(crate) settle: Option<SettleWait>,
    /// How much of the log there was when it was deposed; it knows of no more. Told apart only where it matters.
    pub(crate) knows: Option<u8>,
}

/// What must never happen, and did.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Wrong {
    pub(crate) fence: bool,
    pub(crate) once: bool,
    pub(crate) late: bool,
    pub(crate) courtesy: bool,
}

/// What the model has used up of its scope.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Used {
    pub(crate) attaches: u8,
    pub(crate) renewals: u8,
    pub(crate) writes: u8,
    pub(crate) detaches: u8,
}

/// Everything.
#[derive(Clone, Debug)]
pub struct World {
    pub(crate) tick: u8,
    /// Of the sessions' clocks and of the leaders'.
    pub(crate) rates: [u64; 2],
    /// The committed commands that changed the state.
    pub(crate) log: Vec<Message>,
    /// The state after each prefix of the log.
    pub(crate) states: Vec<Arc<VolumeState>>,
    pub(crate) sessions: [Option<Session>; NODES],
    /// By term; the last one leads.
    pub(crate) leaders: Vec<Leader>,
    pub(crate) next_session: u8,
    /// Commands on their way into the log. None is ever forgotten.
    pub(crate) proposals: BTreeSet<Message>,
    /// Renewals that were granted: session and number.
    pub(crate) grants: BTreeSet<(u8, u8)>,
    /// Where each write was applied first: session and number.
    pub(crate) applied: BTreeMap<(u8, u8), u8>,
    /// Told apart from the product's state, to check it: who holds the volume, in which epoch.
    pub(crate) tenure: Option<(u8, u8)>,
    pub(crate) tenures: u8,
    /// The highest number given up, by attachment; and what was applied.
    pub(crate) oldest: BTreeMap<AttachmentId, u8>,
    pub(crate) effects: BTreeSet<(AttachmentId, u8)>,
    /// The highest index whose write was acknowledged.
    pub(crate) acknowledged: u8,
    /// The newest epoch in which a write was applied.
    pub(crate) written_in: u8,
    pub(crate) wrong: Wrong,
    pub(crate) used: Used,
}

impl World {
    pub(crate) fn new(rates: [u64; 2]) -> Self {
        let mut world = Self {
            tick: 0,
            rates,
            log: Vec::new(),
            states: vec![Arc::new(VolumeState::new(ByteSize(4096)))],
            sessions: Default::default(),
            leaders: Vec::new(),
            next_session: 0,
            proposals: BTreeSet::new(),
            grants: BTreeSet::new(),
            applied: BTreeMap::new(),
            tenure: None,
            tenures: 0,
            oldest: BTreeMap::new(),
            effects: BTreeSet::new(),
            acknowledged: 0,
            written_in: 0,
            wrong: Wrong::default(),
            used: Used::default(),
        };
        world.elect(false);
        world
    }

    pub(crate) fn session_clock(&self) -> u64 {
        u64::from(self.tick) * self.rates[0]
    }
    pub(crate) fn leader_clock(&self) -> u64 {
        u64::from(self.tick) * self.rates[1]
    }
    pub(crate) fn end(&self) -> u8 {
        self.log.len() as u8
    }
    pub(crate) fn head(&self) -> &Arc<VolumeState> {
        &self.states[self.log.len()]
    }
    pub(crate) fn head_epoch(&self) -> u8 {
        self.head().epoch().0 as u8
    }
    pub(crate) fn living(&self) -> impl Iterator<Item = &Session> {
        self.sessions.iter().flatten()
    }
    pub(crate) fn leader(&mut self) -> &mut Leader {
        self.leaders.last_mut().expect("there is a leader from the start")
    }
    pub(crate) fn elect(&mut self, presumes_dead: bool) {
        let (since, end) = (self.leader_clock(), self.end());
        if let Some(before) = self.leaders.last_mut() {
            // What it may still do is propose what it waits for; and renew wrongly, if that is what is broken.
            (before.watch, before.since, before.knows) = (HolderWatch::new(terms()), 0, Some(end));
        }
        let mut watch = HolderWatch::new(terms());
        if presumes_dead {
            watch.granted(0);
        } else {
            watch.began_leading(since);
        }
        self.leaders.push(Leader { since, watch, settle: None, knows: None });
        self.see_unsettled();
    }

    pub(crate) fn forget_what_the_deposed_know(&mut self) {
        let deposed = self.leaders.len() - 1;
        self.leaders[..deposed].iter_mut().for_each(|leader| leader.knows = Some(0));
    }

    /// The leader begins to wait for a former holder as soon as it can know of it.
    pub(crate) fn see_unsettled(&mut self) {
        let (now, unsettled) = (self.leader_clock(), self.head().unsettled().cloned());
        let leader = self.leader();
        if unsettled.is_none() {
            leader.settle = None;
        }
        if let Some(unsettled) = unsettled
            && leader.settle.as_ref().is_none_or(|settle| settle.epoch() < unsettled.epoch)
        {
            leader.settle = Some(SettleWait::new(&terms(), &unsettled, now.max(leader.since)));
        }
    }

    /// Whether a node was let in without force over another that had not given the volume back.
    pub(crate) fn let_in_unforced(&self) -> bool {
        self.log.windows(2).any(|pair| {
            matches!(pair, [Message::Attach { node: before, .. }, Message::Attach { node, force: false, .. }]
                if before != node)
        })
    }

    /// What tells two worlds apart: everything but what follows from the log.
    fn key(&self) -> impl Hash + PartialEq {
        (
            (self.tick, &self.rates, &self.log, &self.sessions, &self.leaders, self.next_session),
            (&self.proposals, &self.grants, self.acknowledged, self.wrong, self.used),
        )
    }
}

impl PartialEq for World {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Hash for World {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.key().hash(state);
    }
}
