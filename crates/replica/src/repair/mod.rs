//! Repair of a replica's log from its peers, before the replica runs (FAULTS rows 5 to 7).
//!
//! A replica whose journal has entries of known identity and unreadable payload does not start its group: it neither
//! votes nor campaigns nor acknowledges. It asks every replica of its group that it knows of, and any of them that has
//! the entry readable, running or itself damaged, gives the payload; only one of the same id, length and checksum is
//! taken. It is written anew durably, and with the last one the replica starts under its old id, with its whole log.
//! What nobody can give is dropped only on the strength of `verdict`; else the replica waits, or is given up to be
//! replaced under a new id.

mod messages;
mod verdict;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::{Rc, Weak};
use std::time::Duration;

use bytes::Bytes;
use holdfast_env::net::{Frame, Lane};
use holdfast_store::journal::{EntrySum, GroupLog};
use holdfast_store::{ReplicaIdentity, StoreError};
use holdfast_types::{DecodeError, GroupId, LogIndex, ReplicaId, StoreId, Term, limits};
use holdfast_wire::rpc::{CallError, Responder, Rpc};

use crate::codec;
use crate::host::{Faulty, Host, Standing};
use crate::messages::REPAIR;
use crate::past::{self, Asking, Look};
use messages::{Answer, Has, WANTED_MAX, Wanted};
pub(crate) use verdict::Members;
use verdict::{Damaged, Heard, Verdict, verdict};

const CALL_DEADLINE: Duration = Duration::from_secs(3);
/// The first wait between two rounds, and the longest.
const BACKOFF: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// Rounds in vain after which the log makes way for others in the journal.
const ROUNDS_UNPARKED: u32 = 5;
/// How long a repaired entry may wait for room in the journal. A journal that is full of what cannot be purged before
/// this replica runs has none.
const ROOM_DEADLINE: Duration = Duration::from_secs(30);

/// What was repaired since the daemon started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct RepairUsage {
    /// Log entries that were repaired.
    pub entries: u64,
    /// Payload received for them, in bytes.
    pub bytes: u64,
    /// Log entries that were dropped, since they cannot have been committed.
    pub dropped: u64,
}

/// A replica that is being repaired, or asks what the others know of it, before it runs.
pub(crate) struct Repair {
    pub(crate) id: ReplicaIdentity,
    pub(crate) log: GroupLog,
    /// It is being started: it cannot be destroyed now.
    pub(crate) is_starting: Cell<bool>,
    /// Peers that did not answer last time.
    silent: RefCell<BTreeSet<ReplicaId>>,
    /// What it asks of its past, once its log is whole.
    pub(crate) asking: Asking,
}

/// Why a peer has not helped.
#[derive(Debug, thiserror::Error)]
enum AskError {
    #[error(transparent)]
    Call(#[from] CallError),
    #[error("its answer is not understood: {0}")]
    Malformed(#[from] DecodeError),
    #[error("its answer does not match the question")]
    Wrong,
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the journal has no room for repaired entries")]
    NoRoom,
}

/// Begins to repair a replica whose log is damaged, and then, as with any other, to ask the others what they know of it.
pub(crate) fn begin(host: &Rc<Host>, standing: Standing, id: ReplicaIdentity, log: GroupLog) {
    let (is_starting, silent, asking) = (Cell::new(false), RefCell::default(), Asking::default());
    let repair = Rc::new(Repair { id, log, is_starting, silent, asking });
    let count = repair.log.faulty().len();
    host.repair_begins(&repair);
    if count == 0 {
        note(host, &repair, &standing, "it asks the others what they know of it before it runs", true);
    } else {
        let why = format!("damaged: {count} log entries cannot be read; repairing them");
        note(host, &repair, &standing, &why, true);
        tracing::error!(group = %repair.id.group, replica = %repair.id.replica, entries = count,
            "log entries are damaged; the replica does not run before they are repaired from its peers");
    }
    holdfast_env::spawn("repair", run(Rc::downgrade(host), repair, standing));
}

fn note(host: &Host, repair: &Repair, standing: &Standing, why: &str, repairing: bool) {
    let volume = standing.identity().volume;
    let fault = Faulty { id: repair.id, volume, why: why.to_owned(), repairing };
    host.set_faulty(repair.id.group, Some(fault));
}

async fn run(host: Weak<Host>, repair: Rc<Repair>, standing: Standing) {
    let (mut rounds, mut backoff, mut received) = (0, BACKOFF, RepairUsage::default());
    let mut said = String::new();
    loop {
        let Some(host) = host.upgrade().filter(|host| host.is_repairing(&repair)) else { return };
        if host.journal().failed().is_some() {
            return;
        }
        let step = if repair.log.faulty().is_empty() {
            ask_of_past(&host, &repair, &standing, received.dropped > 0).await
        } else {
            round(&host, &repair, &standing, rounds, &mut received).await
        };
        if !host.is_repairing(&repair) {
            return;
        }
        let (why, repairing) = match step {
            Step::Run => return start(&host, &repair, &standing, received).await,
            Step::Progress => {
                (rounds, backoff) = (0, BACKOFF);
                continue;
            }
            Step::Wait(why) => (why, true),
            Step::GiveUp(why) => (why, false),
        };
        if why != said {
            tracing::warn!(group = %repair.id.group, replica = %repair.id.replica, %why, "a replica is not started yet");
            said.clone_from(&why);
        }
        note(&host, &repair, &standing, &why, repairing);
        drop(host);
        if repair.log.faulty().is_empty() {
            repair.asking.pause(backoff).await;
        } else {
            holdfast_env::sleep(backoff).await;
        }
        rounds += 1;
        // Nobody purges its log, and it takes longer than a moment.
        if rounds > ROUNDS_UNPARKED {
            repair.log.set_parked(true);
        }
        backoff = (backoff * 2).min(BACKOFF_MAX);
    }
}

async fn start(host: &Rc<Host>, repair: &Rc<Repair>, standing: &Standing, received: RepairUsage) {
    if received != RepairUsage::default() {
        tracing::warn!(group = %repair.id.group, replica = %repair.id.replica, entries = received.entries,
            bytes = received.bytes, dropped = received.dropped, "the log is whole again; the replica starts");
    }
    repair.is_starting.set(true);
    let started = host.start_repaired(standing, repair.id, repair.log.clone(), received.bytes).await;
    host.repair_ends(repair);
    match started {
        Ok(()) => host.set_faulty(repair.id.group, None),
        Err(why) => {
            tracing::error!(group = %repair.id.group, replica = %repair.id.replica, %why, "a replica does not run");
            note(host, repair, standing, &why, false);
        }
    }
}

enum Step {
    Run,
    Progress,
    Wait(String),
    GiveUp(String),
}

/// Asks the others what they know of the replica, whose log is whole.
async fn ask_of_past(host: &Rc<Host>, repair: &Repair, standing: &Standing, has_dropped: bool) -> Step {
    let members = match host.members_of(repair.id, standing, &repair.log) {
        Ok(members) => members,
        Err(error) => {
            return Step::GiveUp(format!("its memberships are not understood: {error}. Replace the replica"));
        }
    };
    let own = past::own(&repair.log, standing.checkpoint().id.index, has_dropped);
    match past::look(host, repair.id, &repair.asking, &members, &own).await {
        Look::Clear => Step::Run,
        Look::Wait(why) => Step::Wait(why),
        Look::RolledBack(why) => Step::GiveUp(why),
        // INV-RECOVER: its group was replaced while it was away.
        Look::Superseded(order) => {
            match host.seal(repair.id, standing.identity().volume, order, u64::MAX).await {
                Ok(_) => Step::GiveUp("its group was replaced by a recovery".into()),
                Err(error) => Step::Wait(error.to_string()),
            }
        }
    }
}

/// Asks everybody once.
async fn round(
    host: &Rc<Host>,
    repair: &Rc<Repair>,
    standing: &Standing,
    rounds: u32,
    received: &mut RepairUsage,
) -> Step {
    let log = &repair.log;
    let members = match host.members_of(repair.id, standing, log) {
        Ok(members) => members,
        Err(error) => {
            return Step::GiveUp(format!("its memberships are not understood: {error}. Replace the replica"));
        }
    };
    let before = log.faulty().len();
    let mut heard: BTreeMap<ReplicaId, Heard> = BTreeMap::new();
    let mut others: Vec<(ReplicaId, StoreId)> = members
        .peers
        .iter()
        .map(|(id, store)| (*id, *store))
        .filter(|(id, _)| *id != repair.id.replica)
        .collect();
    // Whoever did not answer last time comes last: a silent peer costs the whole deadline.
    others.sort_by_key(|(id, _)| repair.silent.borrow().contains(id));
    for (peer, store) in others {
        match ask(host, repair.id.group, log, store, received).await {
            Ok((answering, said)) => {
                repair.silent.borrow_mut().remove(&peer);
                heard.insert(answering, said);
            }
            Err(AskError::NoRoom) => {
                return Step::GiveUp(
                    "damaged, and the journal has no room for repaired entries. \
                     The replica is to be replaced; the others hold the data"
                        .into(),
                );
            }
            Err(error) => {
                repair.silent.borrow_mut().insert(peer);
                tracing::debug!(group = %repair.id.group, %peer, %error, "a peer does not help");
            }
        }
        if log.faulty().is_empty() {
            return Step::Progress;
        }
    }
    let entries = log.faulty();
    if entries.len() < before {
        return Step::Progress;
    }
    let checkpoint = standing.checkpoint().id;
    if entries.first().is_some_and(|first| first.id.index <= checkpoint.index) {
        // Nobody gives them, and they are not needed: what they wrote is at home.
        return match log.purge(checkpoint).await {
            Ok(()) => Step::Progress,
            Err(error) => Step::Wait(error.to_string()),
        };
    }
    let term = log.vote().as_deref().and_then(codec::vote_term).unwrap_or_default();
    let committed = log.committed().map_or(LogIndex::ZERO, |id| id.index);
    let damaged = Damaged { id: repair.id.replica, term: term.max(log.last_term()), committed, entries };
    match verdict(&damaged, &members, &heard, rounds) {
        Verdict::Wait(why) => Step::Wait(why),
        Verdict::GiveUp(why) => Step::GiveUp(why),
        Verdict::Drop(from) => drop_from(host, repair, from, received).await,
    }
}

async fn drop_from(host: &Host, repair: &Repair, from: LogIndex, received: &mut RepairUsage) -> Step {
    let log = &repair.log;
    let last = log.last().map_or(from, |id| id.index);
    tracing::warn!(group = %repair.id.group, replica = %repair.id.replica, %from, %last,
        "damaged entries that a majority never had and never will take are dropped");
    // The entry before: an entry with payload is never the first one of a log.
    match log.truncate_after(from.0.checked_sub(1).map(LogIndex)).await {
        Ok(()) => {
            let dropped = last.0 + 1 - from.0;
            received.dropped += dropped;
            host.count_repaired(RepairUsage { dropped, ..RepairUsage::default() });
            Step::Progress
        }
        Err(error) => Step::Wait(error.to_string()),
    }
}

/// Asks one store for everything that is damaged, and writes what it gives.
async fn ask(
    host: &Rc<Host>,
    group: GroupId,
    log: &GroupLog,
    store: StoreId,
    received: &mut RepairUsage,
) -> Result<(ReplicaId, Heard), AskError> {
    let mut heard = Heard::default();
    let mut left = log.faulty();
    loop {
        let part: Vec<EntrySum> = left.drain(..left.len().min(WANTED_MAX)).collect();
        let wanted = Wanted { group, entries: part };
        let frame = Frame::small(wanted.encode());
        let rpc: &Rpc = &host.environment().rpc;
        let frame = rpc.call(store, Lane::Bulk, REPAIR, frame, CALL_DEADLINE).await?;
        let answer = Answer::decode(&frame.head)?;
        if answer.has.len() != wanted.entries.len() {
            return Err(AskError::Wrong);
        }
        let mut body = frame.into_body();
        let mut took = 0;
        for (sum, has) in wanted.entries.iter().zip(&answer.has) {
            match has {
                Has::Payload if body.len() >= sum.payload_bytes as usize => {
                    let payload = body.split_to(sum.payload_bytes as usize);
                    took += u64::from(write(host, log, sum, payload, received).await?);
                }
                Has::Payload => return Err(AskError::Wrong),
                Has::MoreThanFits => left.push(*sum),
                other => drop(heard.of.insert(sum.id.index, *other)),
            }
        }
        heard.term = answer.term;
        if left.is_empty() {
            return Ok((answer.replica, heard));
        }
        if took == 0 && answer.has.iter().all(|has| *has == Has::MoreThanFits) {
            return Err(AskError::Wrong);
        }
    }
}

/// Writes one entry anew; whether it counted.
async fn write(
    host: &Host,
    log: &GroupLog,
    sum: &EntrySum,
    payload: Bytes,
    received: &mut RepairUsage,
) -> Result<bool, AskError> {
    let bytes = payload.len() as u64;
    let written = holdfast_env::timeout(ROOM_DEADLINE, log.repair(sum.id, payload)).await;
    let repaired = written.map_err(|_| AskError::NoRoom)??;
    if repaired {
        received.entries += 1;
        received.bytes += bytes;
        host.count_repaired(RepairUsage { entries: 1, bytes, dropped: 0 });
    }
    Ok(repaired)
}

/// What this store has of what a peer asks for. `is_trusted`: the log is whole, so that what is not in it never was.
pub(crate) fn serve(log: GroupLog, is_trusted: bool, request: &Frame, responder: Responder) {
    let wanted = match Wanted::decode(&request.head) {
        Ok(wanted) => wanted,
        Err(error) => return responder.refuse(error.to_string()),
    };
    holdfast_env::spawn("repair-serve", async move {
        match answer(&log, is_trusted, &wanted).await {
            Ok(frame) => responder.reply(frame),
            Err(error) => responder.refuse(error.to_string()),
        }
    });
}

async fn answer(log: &GroupLog, is_trusted: bool, wanted: &Wanted) -> Result<Frame, StoreError> {
    // What is said below rests on this vote: it must not be forgotten.
    let term: Term = log.vote().as_deref().and_then(codec::vote_term).unwrap_or_default();
    let (mut has, mut body, mut bytes) = (Vec::with_capacity(wanted.entries.len()), Vec::new(), 0);
    for sum in &wanted.entries {
        let (what, payload) = look(log, is_trusted, sum, limits::APPEND_BYTES_MAX - bytes).await;
        bytes += payload.len();
        if what == Has::Payload {
            body.push(payload);
        }
        has.push(what);
    }
    if has.contains(&Has::Never) {
        log.prove_writable().await?;
    }
    let head = Answer { replica: log.id().replica, term, has }.encode();
    Ok(Frame { head, body })
}

async fn look(log: &GroupLog, is_trusted: bool, wanted: &EntrySum, room: usize) -> (Has, Bytes) {
    let index = wanted.id.index;
    let has = match log.sum(index) {
        Some(sum) if sum == *wanted && sum.payload_bytes as usize > room => Has::MoreThanFits,
        Some(sum) if sum == *wanted => {
            let read = log.read(index, index.next(), limits::REQUEST_BYTES_MAX).await;
            let entry = read.ok().and_then(|mut entries| entries.pop()).filter(|entry| entry.id == wanted.id);
            if let Some(entry) = entry {
                return (Has::Payload, entry.payload);
            }
            // It may have been purged while it was read.
            if log.sum(index).is_some() { Has::Unreadable } else { Has::Purged }
        }
        Some(sum) if sum.id == wanted.id => {
            tracing::error!(group = %log.id().group, entry = ?wanted.id,
                "one log id stands for two payloads: nothing is taken from either");
            Has::Unsure
        }
        _ if log.purged().is_some_and(|purged| purged.index >= index) => Has::Purged,
        _ if is_trusted => Has::Never,
        _ => Has::Unsure,
    };
    (has, Bytes::new())
}

impl Host {
    pub(crate) fn repair_begins(&self, repair: &Rc<Repair>) {
        self.repairs.borrow_mut().insert(repair.id.group, repair.clone());
    }
    /// Whether this repair is still the group's: its replica was not destroyed, and the host not stopped.
    pub(crate) fn is_repairing(&self, repair: &Rc<Repair>) -> bool {
        self.repairs.borrow().get(&repair.id.group).is_some_and(|now| Rc::ptr_eq(now, repair))
    }
    pub(crate) fn repair_ends(&self, repair: &Rc<Repair>) {
        if self.is_repairing(repair) {
            self.repairs.borrow_mut().remove(&repair.id.group);
        }
    }
    pub(crate) fn count_repaired(&self, more: RepairUsage) {
        let now = self.repaired.get();
        self.repaired.set(RepairUsage {
            entries: now.entries + more.entries,
            bytes: now.bytes + more.bytes,
            dropped: now.dropped + more.dropped,
        });
    }
    /// What was repaired of the logs here since the daemon started.
    pub fn repaired(&self) -> RepairUsage {
        self.repaired.get()
    }
}
