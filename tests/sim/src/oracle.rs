//! Watches over what all replicas apply, as it happens: one history for all of them, and the rules of `docs/INVARIANTS.md`
//! that can be told from it, written down a second time and independently of the state machine.
//!
//! - The entry at an index, and the state after it, are the same on every replica for all time: across crashes,
//!   rebuilds and replaced replicas. What was applied once anywhere stays.
//! - Single writer: no data command counts but that of the holder of the newest epoch (INV-FENCE), each number of an
//!   attachment counts once (INV-ONCE), nothing counts that its session has given up (INV-LATE), and nothing while a
//!   former holder may be alive (INV-SETTLE).
//! - When a newer epoch's first command counts, no session of an older one believes that its lease lives (INV-LEASE).
//! - Memberships change by joint consensus, and no id that was removed comes back (INV-MEMBER).

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::{Rc, Weak};

use holdfast_protocol::command::{Tag, VolumeCommand};
use holdfast_protocol::volume::{Refusal, VolumeReply};
use holdfast_replica::observe::{Brought, Observer};
use holdfast_replica::{AppReply, Payload};
use holdfast_session::Session;
use holdfast_store::{EntryId, ReplicaIdentity};
use holdfast_types::{
    AttachmentId, BLOCK_BYTES, Epoch, LogIndex, NodeName, ReplicaId, SessionId, block_checksum,
};

use crate::content::Content;
use crate::executor::{Executor, Owner};
use crate::trace::Trace;

/// What is known of an index.
struct Link {
    id: EntryId,
    /// Of the entry; unknown where it was only ever a part of somebody's state.
    entry: u32,
    state: u32,
}

/// A session that may be alive.
struct Alive {
    owner: Owner,
    session: Weak<Session>,
}

/// What an attachment has used.
#[derive(Default)]
struct Used {
    applied: BTreeSet<u64>,
    oldest: u64,
}

struct Held {
    session: SessionId,
    node: NodeName,
    attachment: AttachmentId,
}

/// The rules, over the one history.
#[derive(Default)]
struct Rules {
    /// The index that comes next.
    next: u64,
    epoch: Epoch,
    holder: Option<Held>,
    unsettled: Option<Epoch>,
    used: BTreeMap<AttachmentId, Used>,
    voters: Vec<BTreeSet<u64>>,
    removed: BTreeSet<u64>,
    /// Epochs under which something could be read or written: they were current, held and settled at some entry. One that
    /// was replaced before it had settled was never admitted by any replica, whatever its session believes.
    admitted: BTreeSet<Epoch>,
}

/// Watches one simulation.
pub(crate) struct Oracle {
    executor: Rc<Executor>,
    trace: Rc<Trace>,
    chain: RefCell<BTreeMap<u64, Link>>,
    /// What the entries of the chain have made of the blocks.
    pub(crate) content: Content,
    /// Of replicas that were rebuilt, up to what their blocks may show what was written.
    shows: RefCell<BTreeMap<ReplicaId, LogIndex>>,
    /// The same of replicas whose blocks are being switched.
    may_show: RefCell<BTreeMap<ReplicaId, LogIndex>>,
    rules: RefCell<Rules>,
    alive: RefCell<Vec<Alive>>,
    /// Clocks run as is promised: leases may be relied on.
    pub(crate) leases_hold: Cell<bool>,
}

fn hash_of(brought: &Brought<'_>) -> u32 {
    match brought {
        Brought::Blank => 0,
        Brought::Membership { voters, learners } => {
            crc32fast::hash(format!("{voters:?} {learners:?}").as_bytes())
        }
        Brought::Command(data, reply) => {
            let mut hasher = crc32fast::Hasher::new();
            hasher.update(&data.head);
            hasher.update(&data.payload.len().to_le_bytes());
            if let AppReply::Volume(reply) = reply {
                hasher.update(&reply.encode());
            }
            hasher.finalize()
        }
    }
}

/// Replicas are compared by the heads of entries, which have the checksum of each block: so the blocks have to match them,
/// where they are in memory.
fn matches_its_head(command: &VolumeCommand, payload: &Payload) -> Result<(), String> {
    let (VolumeCommand::Write { range, checksums, .. }, Payload::Here(bytes)) = (command, payload) else {
        return Ok(());
    };
    if bytes.len() as u64 != range.bytes() {
        return Err(format!("{} bytes were written to {range:?}", bytes.len()));
    }
    let blocks = range.blocks().zip(bytes.chunks_exact(BLOCK_BYTES));
    let wrong = blocks.zip(checksums).find(|((block, data), sum)| block_checksum(*block, data) != **sum);
    match wrong {
        Some(((block, _), _)) => Err(format!("block {} of an entry does not match its checksum", block.0)),
        None => Ok(()),
    }
}

impl Oracle {
    pub(crate) fn new(executor: Rc<Executor>, trace: Rc<Trace>, leases_hold: bool) -> Rc<Self> {
        Rc::new(Self {
            executor,
            trace,
            chain: RefCell::default(),
            content: Content::default(),
            shows: RefCell::default(),
            may_show: RefCell::default(),
            rules: RefCell::default(),
            alive: RefCell::default(),
            leases_hold: Cell::new(leases_hold),
        })
    }

    /// A session has begun in a process.
    pub(crate) fn session_began(&self, owner: Owner, session: &Rc<Session>) {
        let mut alive = self.alive.borrow_mut();
        alive.retain(|known| known.session.strong_count() > 0 && self.executor.is_alive(known.owner));
        alive.push(Alive { owner, session: Rc::downgrade(session) });
    }

    /// The entry that was applied at an index.
    pub(crate) fn applied_id(&self, index: LogIndex) -> Option<EntryId> {
        self.chain.borrow().get(&index.0).map(|link| link.id)
    }

    fn breach(&self, who: ReplicaIdentity, id: EntryId, what: &str) {
        self.trace.violation(format_args!(
            "entry {} of term {} on replica {}: {what}",
            id.index, id.term, who.replica
        ));
    }

    /// INV-LEASE: whether a session of an epoch before `epoch` would serve reads at this moment.
    fn lives_before(&self, epoch: Epoch) -> Option<String> {
        if !self.leases_hold.get() {
            return None;
        }
        let (alive, rules) = (self.alive.borrow(), self.rules.borrow());
        alive.iter().find_map(|known| {
            let session = known.session.upgrade().filter(|session| session.epoch() < epoch)?;
            let was_admitted = rules.admitted.contains(&session.epoch());
            let lives = was_admitted
                && self.executor.is_alive(known.owner)
                && self.executor.within(known.owner, || session.serves_reads());
            lives.then(|| format!("the session of epoch {} believes that its lease lives", session.epoch()))
        })
    }

    fn judge(&self, id: EntryId, brought: &Brought<'_>) -> Result<(), String> {
        let mut rules = self.rules.borrow_mut();
        if id.index.0 != rules.next {
            return Err(format!("it is applied, and nobody has applied entry {}", rules.next));
        }
        rules.next += 1;
        match brought {
            Brought::Blank => Ok(()),
            Brought::Membership { voters, .. } => rules.membership(voters, &self.trace),
            Brought::Command(data, AppReply::Volume(reply)) => {
                let command = VolumeCommand::decode(&data.head).map_err(|error| error.to_string())?;
                matches_its_head(&command, &data.payload)?;
                let newer = match command.tag() {
                    Some(tag) => {
                        let newer = rules.data(tag, reply, &self.trace)?;
                        if let VolumeReply::Done { fresh: true } = reply {
                            self.content.counted(id.index, &command);
                        }
                        newer
                    }
                    None => rules.control(&command, reply, id.index, &self.trace)?,
                };
                if rules.holder.is_some() && rules.unsettled.is_none() {
                    let epoch = rules.epoch;
                    rules.admitted.insert(epoch);
                }
                drop(rules);
                match newer.and_then(|epoch| self.lives_before(epoch)) {
                    Some(why) => Err(format!("INV-LEASE: {why}")),
                    None => Ok(()),
                }
            }
            Brought::Command(_, other) => Err(format!("a volume's command answered {other}")),
        }
    }
}

impl Observer for Oracle {
    fn applied(&self, who: ReplicaIdentity, id: EntryId, brought: &Brought<'_>, state: &[u8]) {
        let link = Link { id, entry: hash_of(brought), state: crc32fast::hash(state) };
        let known = self.chain.borrow().get(&id.index.0).map(|known| {
            (known.id == link.id && known.entry == link.entry, known.id, known.state == link.state)
        });
        match known {
            Some((true, _, true)) => {}
            Some((same, known, _)) => self.breach(
                who,
                id,
                &format!(
                    "INV-TERM: another {} was applied there, of term {}",
                    if same { "state" } else { "entry" },
                    known.term
                ),
            ),
            None => {
                self.chain.borrow_mut().insert(id.index.0, link);
                if let Err(why) = self.judge(id, brought) {
                    self.breach(who, id, &why);
                }
            }
        }
    }

    fn installed(&self, who: ReplicaIdentity, id: EntryId, state: &[u8]) {
        // The switch has ended, or a start has found out that it had not happened.
        self.may_show.borrow_mut().remove(&who.replica);
        if id.index == LogIndex::ZERO {
            return;
        }
        let state = crc32fast::hash(state);
        match self.chain.borrow().get(&id.index.0) {
            Some(known) if known.id == id && known.state == state => {}
            Some(_) => self.breach(who, id, "INV-STAGE: its state is not that of those who applied it"),
            None => self.breach(who, id, "INV-STAGE: its state is of what nobody has applied"),
        }
    }

    fn rebuilding(&self, who: ReplicaIdentity, up_to: LogIndex) {
        self.may_show.borrow_mut().insert(who.replica, up_to);
    }

    fn rebuilt(&self, who: ReplicaIdentity, up_to: LogIndex) {
        self.shows.borrow_mut().insert(who.replica, up_to);
    }

    fn serves(&self, who: ReplicaIdentity, applied: LogIndex) {
        let of = |map: &RefCell<BTreeMap<_, _>>| map.borrow().get(&who.replica).copied();
        let shows = of(&self.shows).max(of(&self.may_show));
        if let Some(shows) = shows.filter(|shows| applied < *shows) {
            self.trace.violation(format_args!(
                "INV-STAGE: replica {} would serve readers as of {applied}, and shows what was written up to {shows}",
                who.replica
            ));
        }
    }
}

impl Rules {
    /// INV-MEMBER.
    fn membership(&mut self, voters: &[Vec<u64>], trace: &Trace) -> Result<(), String> {
        let sets: Vec<BTreeSet<u64>> = voters.iter().map(|set| set.iter().copied().collect()).collect();
        let before = std::mem::replace(&mut self.voters, sets.clone());
        if let Some(back) = sets.iter().flatten().find(|id| self.removed.contains(id)) {
            return Err(format!("INV-MEMBER: replica {back} votes again after it was removed"));
        }
        if sets.len() > 1 {
            trace.mark("memberships changed by joint consensus");
        }
        if let (Some(last), Some(first)) = (before.last(), sets.first()) {
            if first != last {
                return Err(format!("INV-MEMBER: {before:?} is followed by {sets:?}"));
            }
            let now: BTreeSet<u64> = sets.iter().flatten().copied().collect();
            self.removed.extend(before.iter().flatten().filter(|id| !now.contains(id)));
        }
        Ok(())
    }

    fn is_of_holder(&self, tag: &Tag) -> bool {
        tag.epoch == self.epoch && self.holder.as_ref().is_some_and(|holder| holder.session == tag.session)
    }

    /// The epoch of a data command that counts.
    fn data(&mut self, tag: &Tag, reply: &VolumeReply, trace: &Trace) -> Result<Option<Epoch>, String> {
        let is_of_holder = self.is_of_holder(tag);
        let unsettled = self.unsettled.is_some();
        let attachment = self.holder.as_ref().map(|holder| holder.attachment).unwrap_or(AttachmentId::NIL);
        let used = self.used.entry(attachment).or_default();
        let before = used.oldest;
        if is_of_holder && !unsettled {
            used.oldest = used.oldest.max(tag.oldest.0);
        }
        let given_up = tag.seq.0 < used.oldest;
        let again = used.applied.contains(&tag.seq.0);
        match reply {
            VolumeReply::Done { .. } if !is_of_holder => Err(format!(
                "INV-FENCE: a write of epoch {} counts, and the volume is at epoch {}",
                tag.epoch, self.epoch
            )),
            VolumeReply::Done { .. } if unsettled => {
                Err("INV-SETTLE: a write counts before former holders have ended".into())
            }
            VolumeReply::Done { .. } if given_up => Err(format!(
                "INV-LATE: number {} counts, and its session has given up everything below {before}",
                tag.seq
            )),
            VolumeReply::Done { fresh: true } if again => {
                Err(format!("INV-ONCE: number {} of one attachment counts twice", tag.seq))
            }
            VolumeReply::Done { fresh: true } => {
                used.applied.insert(tag.seq.0);
                Ok(Some(tag.epoch))
            }
            VolumeReply::Done { fresh: false } if !again => {
                Err(format!("INV-ONCE: number {} is said to have counted, and never did", tag.seq))
            }
            VolumeReply::Done { fresh: false } => {
                trace.mark("repetitions that had counted");
                Ok(None)
            }
            VolumeReply::Refused(refusal) => {
                let allowed = match refusal {
                    Refusal::OldEpoch { .. } => tag.epoch < self.epoch,
                    Refusal::EpochMismatch { .. } => tag.epoch > self.epoch,
                    Refusal::NotAttached => self.holder.is_none(),
                    Refusal::NotHolder => !is_of_holder,
                    Refusal::Unsettled => unsettled,
                    Refusal::TooOld { .. } => given_up,
                    _ => true,
                };
                match refusal {
                    Refusal::OldEpoch { .. } => trace.mark("writes of an old epoch refused"),
                    Refusal::TooOld { .. } => trace.mark("writes that were given up refused"),
                    Refusal::Unsettled => trace.mark("writes refused before it had settled"),
                    Refusal::NotAttached => trace.mark("writes after a detach refused"),
                    _ => {}
                }
                if allowed { Ok(None) } else { Err(format!("it is refused for no reason: {refusal}")) }
            }
            other => Err(format!("a data command answered {other:?}")),
        }
    }

    /// What a command without data does; the epoch before which no session may believe in its lease any more.
    fn control(
        &mut self,
        command: &VolumeCommand,
        reply: &VolumeReply,
        at: LogIndex,
        trace: &Trace,
    ) -> Result<Option<Epoch>, String> {
        match (command, reply) {
            (VolumeCommand::Attach { .. }, VolumeReply::Attached { .. }) => {
                self.attached(command, reply, at, trace)
            }
            (VolumeCommand::Detach { epoch, confirmed, force }, VolumeReply::Done { fresh: true }) => {
                if *epoch != self.epoch || self.holder.is_none() {
                    return Err(format!("INV-FENCE: epoch {epoch} is detached, at epoch {}", self.epoch));
                }
                if !force && !confirmed {
                    return Err("INV-FENCE: somebody is detached who has not confirmed it".into());
                }
                self.end_tenure(*confirmed);
                if !confirmed {
                    self.epoch = self.epoch.next();
                }
                // Before that epoch has settled its former holders may live, and nothing of a newer one counts yet.
                Ok((*confirmed && self.unsettled.is_none()).then(|| self.epoch.next()))
            }
            (VolumeCommand::Settled { epoch }, VolumeReply::Done { fresh: true }) => {
                trace.mark("changes of holder that settled");
                if self.unsettled.take() != Some(*epoch) {
                    return Err(format!("INV-SETTLE: epoch {epoch} settles, which does not wait"));
                }
                Ok(Some(*epoch))
            }
            (VolumeCommand::Attach { .. }, VolumeReply::Refused(Refusal::EpochMismatch { .. })) => {
                trace.mark("attaches that came second");
                Ok(None)
            }
            _ => Ok(None),
        }
    }

    fn end_tenure(&mut self, confirmed: bool) {
        if self.holder.take().is_some() && !confirmed && self.unsettled.is_none() {
            self.unsettled = Some(self.epoch.next());
        }
    }

    fn attached(
        &mut self,
        command: &VolumeCommand,
        reply: &VolumeReply,
        at: LogIndex,
        trace: &Trace,
    ) -> Result<Option<Epoch>, String> {
        let (
            VolumeCommand::Attach { expected, node, session, force, confirmed, .. },
            VolumeReply::Attached { epoch, attachment, index, next },
        ) = (command, reply)
        else {
            return Err("not an attach".into());
        };
        let repeated = self.holder.as_ref().is_some_and(|holder| holder.session == *session);
        if repeated && *epoch == self.epoch && expected.next() == *epoch {
            trace.mark("attaches repeated");
            return Ok(None);
        }
        if *expected != self.epoch || *epoch != self.epoch.next() || *index != at {
            return Err(format!(
                "INV-FENCE: an attach that expects epoch {expected} takes epoch {epoch}, at epoch {}",
                self.epoch
            ));
        }
        let same_node = self.holder.as_ref().filter(|holder| holder.node == *node);
        if self.holder.is_some() && same_node.is_none() && !force && !confirmed {
            return Err("INV-FENCE: a holder is replaced without force, and has not confirmed it".into());
        }
        let kept = same_node.is_some_and(|holder| holder.attachment == *attachment);
        if kept {
            trace.mark("attachments that outlived their daemon");
        }
        if same_node.is_some() != kept || (!kept && self.used.contains_key(attachment)) {
            return Err(format!("INV-ONCE: attachment {attachment} is not the node's own"));
        }
        let used = self.used.entry(*attachment).or_default();
        if used.applied.last().is_some_and(|last| next.0 <= *last) {
            return Err(format!("INV-ONCE: numbers from {next} on were used before"));
        }
        let had = self.holder.is_some();
        self.end_tenure(*confirmed);
        self.epoch = *epoch;
        self.holder = Some(Held { session: *session, node: node.clone(), attachment: *attachment });
        Ok((had && *confirmed).then_some(*epoch))
    }
}
