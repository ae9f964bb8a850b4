//! Random interleavings of several nodes and sessions (attaching, forcing, detaching, writing, restarting, going on
//! as zombies) over a network that delays, drops, duplicates and reorders, against the reference; and every planted
//! fault of the state machine, which this test must find.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use holdfast_types::{
    AttachmentId, BlockIndex, BlockRange, ByteSize, Epoch, LogIndex, NodeName, Seq, SessionId, SnapshotId,
    StoreId,
};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner};

use super::reference::Reference;
use super::snapshots::Layered;
use super::{BLOCKS, volume};
use crate::command::{AttachMode, Tag, VolumeCommand};
use crate::planted;
use crate::timers::Timers;
use crate::volume::{VolumeReply, VolumeState};

const NODES: u8 = 3;

/// One step. Numbers choose among what there is, modulo its count.
#[derive(Clone, PartialEq, Debug)]
enum Op {
    Attach { actor: u8, stale: u8, force: bool, confirmed: bool, read_only: bool, id: u8 },
    Write { actor: u8, kind: u8, block: u8, jump: bool, guess: bool },
    Retry { actor: u8, which: u8 },
    GiveUp { actor: u8, which: u8 },
    Detach { actor: u8, force: bool, confirmed: bool, of_current: bool },
    Settled,
    Restart { actor: u8, keeper: bool },
    Resize { blocks: u8 },
    Snapshot { id: u8, name: u8 },
    DropSnapshot { id: u8 },
    Restore { id: u8, newest: bool, stale: u8 },
    ChangeTimers { heartbeat: u8 },
    TimersSettled { stale: u8 },
    Deliver { which: u16, keep: bool, reply_lost: bool },
    Drop { which: u16 },
    Reencode,
}

fn any_op() -> impl Strategy<Value = Op> {
    let attach = (any::<u8>(), 0_u8..8, any::<[bool; 3]>(), 0_u8..4, 0_u8..3);
    prop_oneof![
        4 => attach.prop_map(|(actor, stale, [force, confirmed, read_only], rare, id)| Op::Attach {
            actor, stale, force, confirmed, read_only: read_only && rare == 0, id
        }),
        10 => (any::<u8>(), 0_u8..3, 0_u8..20, 0_u8..20, 0_u8..20)
            .prop_map(|(actor, kind, block, jump, guess)| Op::Write { actor, kind, block, jump: jump == 0, guess: guess == 0 }),
        4 => (any::<u8>(), any::<u8>()).prop_map(|(actor, which)| Op::Retry { actor, which }),
        2 => (any::<u8>(), any::<u8>()).prop_map(|(actor, which)| Op::GiveUp { actor, which }),
        2 => (any::<u8>(), any::<[bool; 3]>()).prop_map(|(actor, [force, confirmed, of_current])| Op::Detach {
            actor, force, confirmed, of_current
        }),
        3 => Just(Op::Settled),
        1 => (any::<u8>(), any::<bool>()).prop_map(|(actor, keeper)| Op::Restart { actor, keeper }),
        1 => (0_u8..32).prop_map(|blocks| Op::Resize { blocks }),
        3 => (0_u8..10, 0_u8..6).prop_map(|(id, name)| Op::Snapshot { id, name }),
        1 => (0_u8..10).prop_map(|id| Op::DropSnapshot { id }),
        3 => (0_u8..10, 0_u8..4, 0_u8..6)
            .prop_map(|(id, newest, stale)| Op::Restore { id, newest: newest > 0, stale }),
        1 => (0_u8..3).prop_map(|heartbeat| Op::ChangeTimers { heartbeat }),
        1 => (0_u8..3).prop_map(|stale| Op::TimersSettled { stale }),
        20 => (any::<u16>(), 0_u8..4, 0_u8..4)
            .prop_map(|(which, keep, lost)| Op::Deliver { which, keep: keep == 0, reply_lost: lost == 0 }),
        1 => any::<u16>().prop_map(|which| Op::Drop { which }),
        1 => Just(Op::Reencode),
    ]
}

/// A session, alive or left behind.
#[derive(Clone)]
struct Actor {
    node: u8,
    session: SessionId,
    epoch: Epoch,
    next: Seq,
    /// Takes its first number from the answer to its Attach.
    counts_anew: bool,
    waiting: BTreeMap<Seq, VolumeCommand>,
}

struct Packet {
    actor: usize,
    command: VolumeCommand,
    knows: usize,
}

struct World {
    state: VolumeState,
    reference: Reference,
    layered: Layered,
    index: u64,
    ids: u128,
    actors: Vec<Actor>,
    network: Vec<Packet>,
    /// What the run has reached, so that a test that reaches nothing is noticed.
    seen: BTreeSet<&'static str>,
    /// Whether every answer must equal the reference's; else only what must never happen is checked.
    strict: bool,
}

impl World {
    fn new(strict: bool) -> Self {
        let mut world = Self {
            state: volume(),
            reference: Reference::new(ByteSize(BLOCKS * 4096)),
            layered: Layered::default(),
            index: 0,
            ids: 0,
            actors: Vec::new(),
            network: Vec::new(),
            seen: BTreeSet::new(),
            strict,
        };
        for node in 0..NODES {
            let actor = world.actor(node);
            world.actors.push(actor);
        }
        world
    }

    fn id(&mut self) -> u128 {
        self.ids += 1;
        self.ids
    }

    fn actor(&mut self, node: u8) -> Actor {
        let session = SessionId(self.id());
        let (epoch, next) = (Epoch::ZERO, Seq(1));
        Actor { node, session, epoch, next, counts_anew: true, waiting: BTreeMap::new() }
    }

    fn send(&mut self, actor: usize, command: VolumeCommand) {
        // A bound, so that delivery keeps up: the oldest is lost.
        if self.network.len() >= 40 {
            self.network.remove(0);
        }
        self.network.push(Packet { actor, command, knows: self.reference.ended() });
    }

    fn step(&mut self, op: &Op) -> Result<(), String> {
        match op {
            Op::Attach { actor, stale, force, confirmed, read_only, id } => {
                let number = usize::from(*actor) % self.actors.len();
                let actor = &self.actors[number];
                let stale = if *stale < 6 { 0 } else { u64::from(*stale) - 5 };
                let command = VolumeCommand::Attach {
                    expected: Epoch(self.reference.epoch().saturating_sub(stale)),
                    node: NodeName::new(format!("n{}", actor.node)),
                    store: StoreId(actor.node.into()),
                    session: actor.session,
                    // Nobody takes care that it is unique.
                    attachment: AttachmentId((u128::from(*id) + 1) << 64),
                    mode: if *read_only { AttachMode::ReadOnly } else { AttachMode::Exclusive },
                    force: *force,
                    confirmed: *confirmed,
                };
                self.send(number, command);
            }
            Op::Write { actor, kind, block, jump, guess } => self.write(*actor, *kind, *block, *jump, *guess),
            Op::Retry { actor, which } => {
                let number = usize::from(*actor) % self.actors.len();
                let waiting = &self.actors[number].waiting;
                if let Some(command) =
                    waiting.values().nth(usize::from(*which) % waiting.len().max(1)).cloned()
                {
                    self.send(number, command);
                }
            }
            Op::GiveUp { actor, which } => {
                let number = usize::from(*actor) % self.actors.len();
                let waiting = &mut self.actors[number].waiting;
                let seq = waiting.keys().nth(usize::from(*which) % waiting.len().max(1)).copied();
                seq.map(|seq| waiting.remove(&seq));
            }
            Op::Detach { actor, force, confirmed, of_current } => {
                let number = usize::from(*actor) % self.actors.len();
                let own = self.actors[number].epoch;
                let epoch = if *of_current { Epoch(self.reference.epoch()) } else { own };
                self.send(number, VolumeCommand::Detach { epoch, force: *force, confirmed: *confirmed });
            }
            Op::Settled => {
                if let Some(epoch) = self.reference.unsettled() {
                    self.send(0, VolumeCommand::Settled { epoch: Epoch(epoch) });
                }
            }
            Op::Restart { actor, keeper } => self.restart(*actor, *keeper),
            Op::Resize { blocks } => {
                self.send(0, VolumeCommand::Resize { size: ByteSize((u64::from(*blocks) + 1) * 4096) });
            }
            Op::Snapshot { id, name } => {
                let name = format!("s{name}");
                self.send(0, VolumeCommand::Snapshot { id: snapshot_id(*id), name, created_ms: 1 });
            }
            Op::DropSnapshot { id } => self.send(0, VolumeCommand::DropSnapshot { id: snapshot_id(*id) }),
            Op::Restore { id, newest, stale } => {
                let last = self.state.snapshots().last().map(|snapshot| snapshot.id);
                let id = last.filter(|_| *newest).unwrap_or(snapshot_id(*id));
                let epoch = Epoch(self.reference.epoch().saturating_sub(u64::from(*stale == 0)));
                self.send(0, VolumeCommand::RestoreSnapshot { id, epoch });
            }
            Op::ChangeTimers { heartbeat } => {
                let heartbeat = Duration::from_millis(u64::from(*heartbeat) * 30 + 20);
                self.send(0, VolumeCommand::ChangeTimers { to: Timers::of_heartbeat(heartbeat) });
            }
            Op::TimersSettled { stale } => {
                if let Some(change) = self.state.timers().change() {
                    let since = LogIndex(change.since.0 - u64::from(*stale == 0));
                    self.send(0, VolumeCommand::TimersSettled { since });
                }
            }
            Op::Deliver { which, keep, reply_lost } => return self.deliver(*which, *keep, *reply_lost),
            Op::Drop { which } => {
                if !self.network.is_empty() {
                    self.network.swap_remove(usize::from(*which) % self.network.len());
                }
            }
            Op::Reencode => {
                self.state =
                    VolumeState::decode(&self.state.encode()).map_err(|error| format!("decode: {error}"))?;
            }
        }
        Ok(())
    }

    fn write(&mut self, actor: u8, kind: u8, block: u8, jump: bool, guess: bool) {
        let number = usize::from(actor) % self.actors.len();
        let actor = &mut self.actors[number];
        if actor.epoch == Epoch::ZERO {
            return;
        }
        let seq = if jump { Seq(actor.next.0 + 4090) } else { actor.next };
        actor.next = seq.next();
        let oldest = actor.waiting.keys().next().copied().unwrap_or(seq);
        // A session that has lost its mind claims the current epoch, whoever holds it.
        let epoch = if guess { Epoch(self.reference.epoch()) } else { actor.epoch };
        let tag = Tag { epoch, session: actor.session, seq, oldest };
        let range = BlockRange::new(BlockIndex(block.into()), 1);
        let command = match kind {
            0 => VolumeCommand::Write { tag, range, checksums: vec![1] },
            1 => VolumeCommand::Trim { tag, range },
            _ => VolumeCommand::Zero { tag, range },
        };
        actor.waiting.insert(seq, command.clone());
        self.send(number, command);
    }

    /// The daemon of a node starts anew; what it was before goes on as a zombie. With a keeper it knows its numbers.
    fn restart(&mut self, actor: u8, keeper: bool) {
        let number = usize::from(actor) % self.actors.len();
        let before = self.actors[number].clone();
        let mut after = self.actor(before.node);
        if keeper {
            (after.next, after.counts_anew) = (before.next, before.epoch == Epoch::ZERO);
        }
        if self.actors.len() < 10 {
            self.actors.push(after);
        } else {
            self.actors[number] = after;
            self.network
                .iter_mut()
                .filter(|packet| packet.actor == number)
                .for_each(|packet| packet.actor = usize::MAX);
        }
    }

    fn deliver(&mut self, which: u16, keep: bool, reply_lost: bool) -> Result<(), String> {
        if self.network.is_empty() {
            return Ok(());
        }
        let at = usize::from(which) % self.network.len();
        let (actor, command, knows) = {
            let packet = &self.network[at];
            (packet.actor, packet.command.clone(), packet.knows)
        };
        if !keep {
            self.network.swap_remove(at);
        }
        self.index += 1;
        let index = LogIndex(self.index);
        let before = self.state.clone();
        let reply = self.state.apply(index, &command);
        self.layered.effect(index, &command, &reply, &before);
        self.reference.forbid(&command, &reply).map_err(|why| format!("{why}, at {index}"))?;
        let expected = self.reference.apply(index, &command, knows);
        if self.strict && reply != expected {
            return Err(format!(
                "{command:?} was answered {reply:?}, the reference says {expected:?}, at {index}"
            ));
        }
        if matches!(reply, VolumeReply::Refused(_)) && command.tag().is_none() && self.state != before {
            return Err(format!("{command:?} was refused and changed the state"));
        }
        if self.strict {
            self.layered.check(&self.state, &self.reference).map_err(|why| format!("{why}, at {index}"))?;
        }
        self.note(&command, &reply);
        if let (false, Some(actor)) = (reply_lost, self.actors.get_mut(actor)) {
            actor.learn(&command, &reply);
        }
        Ok(())
    }

    fn note(&mut self, command: &VolumeCommand, reply: &VolumeReply) {
        use crate::volume::Refusal as R;
        let what = match reply {
            VolumeReply::Attached { next, .. } if *next > Seq(1) => "numbers kept",
            VolumeReply::Attached { .. } => "attached",
            VolumeReply::Done { fresh } if command.tag().is_some() => {
                if *fresh {
                    "fresh"
                } else {
                    "duplicate"
                }
            }
            VolumeReply::Done { fresh: true } if matches!(command, VolumeCommand::RestoreSnapshot { .. }) => {
                "restored"
            }
            VolumeReply::Done { fresh: true } if matches!(command, VolumeCommand::TimersSettled { .. }) => {
                "timers changed"
            }
            VolumeReply::Done { .. } => "done",
            VolumeReply::Snapshotted { index, .. } if index.0 == self.index => "snapshotted",
            VolumeReply::Snapshotted { .. } => "snapshotted before",
            VolumeReply::Refused(refusal) => match refusal {
                R::OldEpoch { .. } => "old epoch",
                R::NotAttached => "not attached",
                R::NotHolder => "not holder",
                R::ReadOnly => "read-only",
                R::Unsettled => "unsettled",
                R::TooOld { .. } => "too old",
                R::BeyondWindow => "beyond window",
                R::OutOfRange { .. } => "out of range",
                R::EpochMismatch { .. } => "mismatch",
                R::HeldBy { .. } => "held",
                R::CannotShrink { .. } => "cannot shrink",
                R::Malformed(_) => "malformed",
                R::SnapshotNameTaken => "name taken",
                R::SnapshotsFull => "snapshots full",
                R::SnapshotQuota { .. } | R::SnapshotsUnsettled => "snapshot quota",
                R::NoSuchSnapshot => "no such snapshot",
                R::SnapshotDropped => "snapshot dropped",
                R::NewerSnapshots { .. } => "newer snapshots",
                R::Attached { .. } => "attached, not restored",
                R::TimersChanging => "timers changing",
            },
        };
        self.seen.insert(what);
    }
}

fn snapshot_id(number: u8) -> SnapshotId {
    SnapshotId(u128::from(number) + 1)
}

impl Actor {
    fn learn(&mut self, command: &VolumeCommand, reply: &VolumeReply) {
        match (command, reply) {
            (VolumeCommand::Attach { .. }, VolumeReply::Attached { epoch, next, .. })
                if *epoch > self.epoch =>
            {
                self.epoch = *epoch;
                if self.counts_anew {
                    (self.next, self.counts_anew) = (*next, false);
                }
            }
            (command, VolumeReply::Done { .. }) => {
                if let Some(tag) = command.tag() {
                    self.waiting.remove(&tag.seq);
                }
            }
            _ => {}
        }
    }
}

fn run(ops: &[Op], strict: bool) -> Result<BTreeSet<&'static str>, TestCaseError> {
    let mut world = World::new(strict);
    for op in ops {
        world.step(op).map_err(TestCaseError::fail)?;
    }
    // A state that came from its encoding goes on equally.
    let mut twin =
        VolumeState::decode(&world.state.encode()).map_err(|e| TestCaseError::fail(e.to_string()))?;
    for (index, packet) in (world.index + 1..).zip(&world.network) {
        let index = LogIndex(index);
        prop_assert_eq!(twin.apply(index, &packet.command), world.state.apply(index, &packet.command));
    }
    prop_assert_eq!(twin, world.state);
    Ok(world.seen)
}

fn runner(cases: u32) -> TestRunner {
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 2000, ..Config::default() };
    TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha))
}

fn any_ops() -> impl Strategy<Value = Vec<Op>> {
    prop::collection::vec(any_op(), 1..250)
}

proptest! {
    #![proptest_config(Config { cases: 400, failure_persistence: None, ..Config::default() })]
    /// INV-FENCE, INV-ONCE, INV-LATE, INV-SETTLE, INV-ACK, INV-SNAPSHOT, INV-RESTORE, and equality with the reference in every answer.
    #[test]
    fn every_interleaving_obeys_the_reference(ops in any_ops()) {
        planted::plant(&[]);
        run(&ops, true)?;
    }
}

/// The random runs reach every answer that there is, else they would prove little.
#[test]
fn the_model_reaches_every_answer() {
    planted::plant(&[]);
    let seen = std::cell::RefCell::new(BTreeSet::new());
    let result = runner(400).run(&any_ops(), |ops| {
        seen.borrow_mut().extend(run(&ops, true)?);
        Ok(())
    });
    assert_eq!(result, Ok(()));
    let expected = BTreeSet::from([
        "numbers kept",
        "attached",
        "fresh",
        "duplicate",
        "done",
        "old epoch",
        "not attached",
        "not holder",
        "read-only",
        "unsettled",
        "too old",
        "beyond window",
        "out of range",
        "mismatch",
        "held",
        "cannot shrink",
        "snapshotted",
        "snapshotted before",
        "restored",
        "name taken",
        "no such snapshot",
        "snapshot dropped",
        "newer snapshots",
        "attached, not restored",
        "timers changed",
        "timers changing",
    ]);
    assert_eq!(seen.into_inner(), expected);
}

/// Each planted fault of the state machine is found, and as a breach of the invariant that it breaks.
#[test]
fn every_planted_fault_is_found() {
    // These are of the parts around it, whose own tests find them.
    let elsewhere = [
        "INV-LEASE",
        "INV-TIMERS",
        "INV-TERM",
        "INV-CHECKED",
        "INV-GRAY",
        "INV-ROLLBACK",
        "INV-SPACE",
        "INV-ADMIT",
        "INV-WITNESS",
        "INV-STAGE",
        "INV-ACK",
        "INV-MEMBER",
        "INV-RECOVER",
        "INV-QUOTA",
        "INV-PLACE",
        "INV-STORES",
        "INV-CERT",
        "INV-REST",
        "progress",
    ];
    let inside =
        |(fault, broken): &(&str, &str)| !elsewhere.contains(broken) && !planted::OUTSIDE.contains(fault);
    for (fault, invariant) in planted::KNOWN.iter().copied().filter(inside) {
        planted::plant(&[fault]);
        let result = runner(400).run(&any_ops(), |ops| run(&ops, false).map(drop));
        planted::plant(&[]);
        match result {
            Err(TestError::Fail(why, _)) => {
                assert!(why.message().starts_with(invariant), "{fault} was found as: {}", why.message());
            }
            other => panic!("{fault} was not found: {other:?}"),
        }
    }
}
