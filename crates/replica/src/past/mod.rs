//! What the replicas of a group know of each other's past, so that one that was put back to an older state does not
//! vote and acknowledge again as if nothing had been (INV-ROLLBACK, FAULTS row 36).
//!
//! An older copy of a store's directory is whole and true to itself: only others can know that it once was further.
//! They learn it at no cost of its own. A candidate knows who granted it a vote; a leader knows how far each follower
//! has durably acknowledged its log, and tells the other followers now and then. Each keeps that, in memory at once and
//! in a small file before long. A replica that starts asks everybody of its group before its core runs; if somebody
//! knows that it had a later vote or more entries than it has now, it notes that durably and never runs again under its
//! id. It is replaced, as one that lost its vote is.
//!
//! How it could be broken: by a line that tells of what was not durable, or that a later leader may cut. So a line
//! names the vote that it was acknowledged under, and is compared by `verdict` only.
//!
//! What it does not find: a copy that is older only by what nobody who answers has heard of yet (docs/decisions/0091).

mod messages;
mod verdict;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::{Rc, Weak};
use std::time::Duration;

use futures_util::future::join_all;
use holdfast_env::Instant;
use holdfast_env::disk::Directory;
use holdfast_env::net::{Frame, Lane};
use holdfast_protocol::planted::is_planted;
use holdfast_store::journal::GroupLog;
use holdfast_store::past_file::{Acknowledged, LINES_MAX, Lines, PastFile};
use holdfast_store::recovery_file::Order;
use holdfast_store::state_file::StateIdentity;
use holdfast_store::volume::Checkpoint;
use holdfast_store::{ReplicaIdentity, StoreError};
use holdfast_types::{GroupId, LogIndex, ReplicaId, StoreId, Term};
use holdfast_wire::rpc::{Responder, Rpc};
use tokio::sync::Notify;

use crate::codec;
use crate::group::Group;
use crate::host::Host;
use crate::messages::PAST;
use crate::repair::Members;
use messages::{Answer, Message, TOLD_MAX};
pub(crate) use verdict::Own;
use verdict::{forgotten, is_enough};

const CALL_DEADLINE: Duration = Duration::from_secs(1);
/// How long everybody is waited for, before a majority is enough. About as long as a restarted voter is silent anyway.
const PATIENCE: Duration = Duration::from_secs(1);
/// The first wait between two rounds of questions, and the longest.
const PAUSE: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// Between two rounds of telling followers, and of looking at what is to be written.
const TELL_EVERY: Duration = Duration::from_secs(5);
/// Between two writes of one file, unless a vote has changed.
const WRITE_EVERY: Duration = Duration::from_secs(60);
/// Files that are written in one round: each costs a flush.
const WRITES_MAX: usize = 8;

/// What one replica knows.
pub(crate) struct Past {
    own: ReplicaId,
    file: PastFile,
    lines: RefCell<Lines>,
    unwritten: Cell<bool>,
    /// A vote is among what is not written yet.
    urgent: Cell<bool>,
    written: Cell<Option<Instant>>,
}

impl Past {
    fn learn(&self, of: ReplicaId, known: &Acknowledged) {
        let mut lines = self.lines.borrow_mut();
        if lines.len() >= LINES_MAX && !lines.contains_key(&of) {
            if of != self.own {
                return;
            }
            // What keeps this replica from running has room in any case.
            lines.pop_first();
        }
        let line = lines.entry(of).or_default();
        let vote = (line.term, line.leader);
        if line.learn(known) {
            self.unwritten.set(true);
            self.urgent.set(self.urgent.get() || (line.term, line.leader) != vote);
        }
    }

    /// Replicas that are gone for good are forgotten, before their lines take the room of others.
    fn prune(&self, members: &[(ReplicaId, StoreId)]) {
        let mut lines = self.lines.borrow_mut();
        if lines.len() > 2 * members.len() + 8 {
            lines.retain(|id, _| *id == self.own || members.iter().any(|(member, _)| member == id));
        }
    }

    fn is_due(&self) -> bool {
        let is_old = self.written.get().is_none_or(|at| Instant::now().since(at) >= WRITE_EVERY);
        self.unwritten.get() && (self.urgent.get() || is_old)
    }

    /// Durable when it returns. What cannot be written for want of room stays due.
    async fn write(&self) -> Result<(), StoreError> {
        let lines = self.lines.borrow().clone();
        let was_urgent = self.urgent.replace(false);
        self.unwritten.set(false);
        let written = self.file.write(&lines).await;
        if written.is_err() {
            self.unwritten.set(true);
            self.urgent.set(self.urgent.get() || was_urgent);
        }
        self.written.set(Some(Instant::now()));
        written
    }
}

/// What the replicas of one store know.
#[derive(Default)]
pub(crate) struct Pasts {
    of: RefCell<BTreeMap<GroupId, Rc<Past>>>,
    /// What a store was told last, and has confirmed.
    told: RefCell<BTreeMap<Line, Acknowledged>>,
}

/// To which store, and of whom.
type Line = (StoreId, GroupId, ReplicaId);

impl Pasts {
    /// Reads what a replica knew.
    pub(crate) async fn open(
        &self,
        directory: &Rc<dyn Directory>,
        name: String,
        identity: StateIdentity,
    ) -> Result<(), StoreError> {
        let (file, lines) = PastFile::open(directory, name, identity).await?;
        let past = Past {
            own: identity.id.replica,
            file,
            lines: RefCell::new(lines),
            unwritten: Cell::new(false),
            urgent: Cell::new(false),
            written: Cell::new(None),
        };
        self.of.borrow_mut().insert(identity.id.group, Rc::new(past));
        Ok(())
    }

    pub(crate) fn forget(&self, id: ReplicaIdentity) {
        let mut of = self.of.borrow_mut();
        if of.get(&id.group).is_some_and(|past| past.own == id.replica) {
            of.remove(&id.group);
        }
    }

    fn get(&self, group: GroupId) -> Option<Rc<Past>> {
        self.of.borrow().get(&group).cloned()
    }
}

/// Votes that others have granted to a replica. Cheap to clone; shared by its clients.
#[derive(Clone, Default)]
pub(crate) struct Grants(Rc<RefCell<Lines>>);

impl Grants {
    pub(crate) fn record(&self, by: ReplicaId, term: Term, candidate: ReplicaId) {
        let mut lines = self.0.borrow_mut();
        if lines.len() < LINES_MAX || lines.contains_key(&by) {
            let granted = Acknowledged { term, leader: candidate, ..Acknowledged::default() };
            lines.entry(by).or_default().learn(&granted);
        }
    }
}

/// What a running replica knows now: who voted for it, and as leader, how far everybody has come.
fn witnessed(group: &Group) -> Lines {
    let mut lines = group.networks().grants.0.borrow().clone();
    if !group.is_leader() {
        return lines;
    }
    let report = group.report();
    let own = group.id().replica;
    let line = |matched: LogIndex| {
        let committed = matched.min(report.committed);
        Acknowledged { term: report.term, leader: own, matched, committed }
    };
    for (id, matched) in report.matched.iter().filter(|(id, matched)| *id != own && *matched > LogIndex::ZERO)
    {
        lines.entry(*id).or_default().learn(&line(*matched));
    }
    if report.is_leader {
        // Its vote was durable before it led.
        lines.insert(own, line(group.log().flushed()));
    }
    lines
}

/// Takes what the running replica knows into what is kept, and gives all of it: its own line too, for others.
fn gather(host: &Host, past: &Past, group: GroupId) -> Lines {
    let mut own = None;
    if let Some(running) = host.group(group) {
        for (id, known) in witnessed(&running) {
            if id == past.own {
                own = Some(known);
            } else {
                past.learn(id, &known);
            }
        }
        past.prune(&running.members());
    }
    let mut lines = past.lines.borrow().clone();
    lines.remove(&past.own);
    lines.extend(own.map(|known| (past.own, known)));
    lines
}

/// How far a replica that has not started is with its questions.
#[derive(Default)]
pub(crate) struct Asking {
    since: Cell<Option<Instant>>,
    answered: RefCell<BTreeSet<ReplicaId>>,
    leader_answered: Cell<bool>,
    /// Leaders that called it meanwhile: it may not know them.
    callers: RefCell<BTreeMap<ReplicaId, StoreId>>,
    woken: Notify,
}

impl Asking {
    pub(crate) fn called_by(&self, replica: ReplicaId, store: StoreId) {
        let mut callers = self.callers.borrow_mut();
        if callers.len() < LINES_MAX && callers.insert(replica, store).is_none() {
            self.wake();
        }
    }

    /// Somebody of the group asks, too: it may answer now.
    pub(crate) fn wake(&self) {
        self.woken.notify_one();
    }

    /// Ends when the next round is worth it.
    pub(crate) async fn pause(&self, longest: Duration) {
        // Either way it is time.
        let _ = holdfast_env::timeout(longest, self.woken.notified()).await;
    }
}

/// What has come of the questions so far.
pub(crate) enum Look {
    /// It may run.
    Clear,
    /// Too few have answered.
    Wait(String),
    /// It was further once, and must not run.
    RolledBack(String),
    /// A recovery has replaced its group: it is quarantined.
    Superseded(Order),
}

/// What the replica has, to be compared with what others know.
pub(crate) fn own(log: &GroupLog, checkpoint: LogIndex, has_dropped: bool) -> Own {
    let vote = log.vote().as_deref().and_then(codec::vote_leader).unwrap_or_default();
    let last = log.last().map_or(LogIndex::ZERO, |id| id.index).max(checkpoint);
    Own { vote, last, has_dropped }
}

fn rolled_back(by: ReplicaId, own_id: ReplicaId, why: &str) -> String {
    let who =
        if by == own_id { "was found out earlier".to_owned() } else { format!("replica {by} knows it") };
    format!(
        "rolled back: {why} ({who}). An older copy of its store was put back, or its disk has lost what it had \
         confirmed. Replace the replica; the others hold the data"
    )
}

/// Whether there is anybody to be asked.
pub(crate) fn is_alone(id: ReplicaIdentity, members: &Members) -> bool {
    members.peers.keys().all(|peer| *peer == id.replica)
}

/// Ends when a replica may run that is no volume's, with why not if it must not. `said` is told why it waits.
/// Asks for as long as the host is there.
pub async fn may_run(
    host: Weak<Host>,
    log: GroupLog,
    checkpoint: Checkpoint,
    said: impl Fn(String),
) -> Result<(), String> {
    let (asking, mut pause, id) = (Asking::default(), PAUSE, log.id());
    let own = own(&log, checkpoint.id.index, false);
    let members = codec::members_of(&checkpoint.membership, &log, LogIndex::ZERO);
    let members = members.map_err(|error| format!("its memberships are not understood: {error}"))?;
    loop {
        let host = host.upgrade().ok_or("the shard is stopping")?;
        match look(&host, id, &asking, &members, &own).await {
            Look::Clear => return Ok(()),
            Look::RolledBack(why) => return Err(why),
            Look::Superseded(order) => return Err(format!("recovery {} has replaced its group", order.id)),
            Look::Wait(why) => said(why),
        }
        drop(host);
        holdfast_env::sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// Asks everybody who has not answered yet, once.
pub(crate) async fn look(
    host: &Rc<Host>,
    id: ReplicaIdentity,
    asking: &Asking,
    members: &Members,
    own: &Own,
) -> Look {
    if is_planted("run-rolled-back") {
        return Look::Clear;
    }
    let Some(past) = host.pasts().get(id.group) else { return Look::Wait("it is being removed".into()) };
    let noted = past.lines.borrow().get(&id.replica).and_then(|known| forgotten(own, known));
    if let Some(why) = noted {
        return Look::RolledBack(rolled_back(id.replica, id.replica, &why));
    }
    let began = asking.since.get().unwrap_or_else(Instant::now);
    asking.since.set(Some(began));
    let mut everybody = asking.callers.borrow().clone();
    everybody.extend(members.peers.iter().map(|(peer, store)| (*peer, *store)));
    everybody.remove(&id.replica);
    let rpc = &host.environment().rpc;
    let left = everybody.iter().filter(|(peer, _)| !asking.answered.borrow().contains(peer));
    let asked = left.map(|(peer, store)| async move { (*peer, ask(rpc, *store, id).await) });
    for (peer, answer) in join_all(asked.collect::<Vec<_>>()).await {
        let Some(answer) = answer else { continue };
        asking.answered.borrow_mut().insert(peer);
        asking.leader_answered.set(asking.leader_answered.get() || answer.leads);
        if let Some(order) = answer.superseded {
            return Look::Superseded(order);
        }
        if let Some(known) = answer.known
            && let Some(why) = forgotten(own, &known)
        {
            return found(&past, id, peer, &known, &why).await;
        }
    }
    let everybody: BTreeSet<ReplicaId> = everybody.into_keys().collect();
    let answered = asking.answered.borrow();
    let was_patient = Instant::now().since(began) >= PATIENCE;
    let leads = asking.leader_answered.get();
    if is_enough(id.replica, &members.voters, &everybody, &answered, leads, was_patient) {
        return Look::Clear;
    }
    let list = |ids: Vec<&ReplicaId>| ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    Look::Wait(format!(
        "it asks replicas {} what they know of it before it runs; {} do not answer",
        list(everybody.iter().collect()),
        list(everybody.difference(&answered).collect())
    ))
}

/// Notes what was found out, so that it counts also when whoever knew it is away.
async fn found(past: &Past, id: ReplicaIdentity, by: ReplicaId, known: &Acknowledged, why: &str) -> Look {
    let why = rolled_back(by, id.replica, why);
    tracing::error!(group = %id.group, replica = %id.replica, %why, "a replica does not run");
    past.learn(id.replica, known);
    if let Err(error) = past.write().await {
        tracing::error!(%error, "what was found out of a replica's past is not durable");
    }
    Look::RolledBack(why)
}

/// Up to where every one of these replicas is known to have everything, durably and committed: a fact for ever. Their
/// leader is asked for what it knows now, if there is one.
pub(crate) async fn everywhere(host: &Host, group: &Group, replicas: &[ReplicaId]) -> LogIndex {
    let id = group.id();
    let Some(past) = host.pasts().get(id.group) else { return LogIndex::ZERO };
    if let Some((leader, store)) = group.leader().filter(|(leader, _)| *leader != id.replica) {
        let rpc = &host.environment().rpc;
        let asked = replicas.iter().map(|replica| async move {
            let of = ReplicaIdentity { group: id.group, replica: *replica };
            (*replica, ask(rpc, store, of).await)
        });
        for (replica, answer) in join_all(asked).await {
            if let Some(known) = answer.and_then(|answer| answer.known) {
                past.learn(replica, &known);
            } else {
                tracing::debug!(group = %id.group, %leader, %replica, "its leader does not tell how far it is");
            }
        }
    }
    known_everywhere(host, id.group, replicas)
}

/// As [`everywhere`], of what was heard before.
pub(crate) fn known_everywhere(host: &Host, group: GroupId, replicas: &[ReplicaId]) -> LogIndex {
    let Some(past) = host.pasts().get(group) else { return LogIndex::ZERO };
    let lines = past.lines.borrow();
    let known =
        replicas.iter().map(|replica| lines.get(replica).map_or(LogIndex::ZERO, |line| line.committed));
    known.min().unwrap_or_default()
}

async fn ask(rpc: &Rpc, store: StoreId, id: ReplicaIdentity) -> Option<Answer> {
    let question = Message::Ask { group: id.group, replica: id.replica };
    let frame = Frame::small(question.encode());
    match rpc.call(store, Lane::Control, PAST, frame, CALL_DEADLINE).await {
        Ok(frame) => Answer::decode(&frame.head)
            .inspect_err(|error| tracing::warn!(%store, %error, "an answer about the past is not understood"))
            .ok(),
        Err(error) => {
            tracing::debug!(group = %id.group, %store, %error, "a peer does not say what it knows");
            None
        }
    }
}

/// Answers a question, or takes news.
pub(crate) fn serve(host: &Host, request: &Frame, responder: Responder) {
    let message = match Message::decode(&request.head) {
        Ok(message) => message,
        Err(error) => return responder.refuse(error.to_string()),
    };
    match message {
        Message::Ask { group, .. }
            if host.recoveries.superseded(group).is_some() && !is_planted("superseded-not-told") =>
        {
            let superseded = host.recoveries.superseded(group);
            responder.reply(Frame::small(Answer { superseded, ..Answer::default() }.encode()));
        }
        Message::Ask { group, replica } => match host.pasts().get(group) {
            Some(past) => {
                host.wake_starting(group);
                let known = gather(host, &past, group).get(&replica).copied();
                // A leader that rests may have been deposed meanwhile: it does not stand for a majority.
                let running = host.group(group).filter(|running| !running.leads_on_trust());
                let report = running.map(|running| running.report());
                let leads = report.is_some_and(|report| report.is_leader && report.has_quorum);
                responder.reply(Frame::small(Answer { leads, known, superseded: None }.encode()));
            }
            None if host.is_loaded() => responder.reply(Frame::small(Answer::default().encode())),
            None => responder.refuse("the store is loading"),
        },
        Message::Tell(lines) => {
            for (group, replica, known) in &lines {
                if let Some(past) = host.pasts().get(*group).filter(|past| past.own != *replica) {
                    past.learn(*replica, known);
                }
            }
            responder.reply(Frame::small(bytes::Bytes::new()));
        }
    }
}

/// Keeps what is known, and tells it to the followers of the groups that are led here, for as long as the host is there.
pub(crate) async fn keep(host: Weak<Host>) {
    loop {
        holdfast_env::sleep(TELL_EVERY).await;
        let (news, rpc) = {
            let Some(host) = host.upgrade().filter(|host| host.journal().failed().is_none()) else { return };
            (news(&host), host.environment().rpc.clone())
        };
        let confirmed = tell(&rpc, news).await;
        let Some(host) = host.upgrade() else { return };
        host.pasts().told.borrow_mut().extend(confirmed);
        let mut due: Vec<Rc<Past>> =
            host.pasts().of.borrow().values().filter(|past| past.is_due()).cloned().collect();
        due.sort_by_key(|past| past.written.get());
        for past in due.into_iter().take(WRITES_MAX) {
            if let Err(error) = past.write().await {
                tracing::warn!(%error, "what is known of other replicas' past cannot be written now");
            }
        }
    }
}

/// What followers of the groups that are led here have not confirmed yet.
fn news(host: &Host) -> Vec<(Line, Acknowledged)> {
    let mut current = BTreeMap::new();
    let pasts: Vec<_> = host.pasts().of.borrow().iter().map(|(id, past)| (*id, past.clone())).collect();
    let mut unchanged = BTreeSet::new();
    for (group, past) in pasts {
        // Nothing has come since it was told the last time.
        if host.group(group).is_some_and(|running| running.rested_for() > 3 * TELL_EVERY) {
            unchanged.insert(group);
            continue;
        }
        let lines = gather(host, &past, group);
        let Some(leading) = host.group(group).filter(|running| running.is_leader()) else { continue };
        for (member, store) in leading.members().into_iter().filter(|(member, _)| *member != past.own) {
            let of_others = lines.iter().filter(|(id, _)| **id != member);
            current.extend(of_others.map(|(id, known)| ((store, group, *id), *known)));
        }
    }
    let mut told = host.pasts().told.borrow_mut();
    told.retain(|line, _| current.contains_key(line) || unchanged.contains(&line.1));
    current.into_iter().filter(|(line, known)| told.get(line) != Some(known)).collect()
}

/// Tells everything; what was confirmed.
async fn tell(rpc: &Rpc, news: Vec<(Line, Acknowledged)>) -> Vec<(Line, Acknowledged)> {
    let mut by_store: BTreeMap<StoreId, Vec<(Line, Acknowledged)>> = BTreeMap::new();
    for (line, known) in news {
        by_store.entry(line.0).or_default().push((line, known));
    }
    let told = by_store.into_iter().map(|(store, lines)| async move {
        let mut confirmed = Vec::new();
        for part in lines.chunks(TOLD_MAX) {
            let told = part.iter().map(|((_, group, id), known)| (*group, *id, *known)).collect();
            let frame = Frame::small(Message::Tell(told).encode());
            match rpc.call(store, Lane::Control, PAST, frame, CALL_DEADLINE).await {
                Ok(_) => confirmed.extend_from_slice(part),
                Err(error) => {
                    tracing::debug!(%store, %error, "a peer does not hear what is known of others");
                    break;
                }
            }
        }
        confirmed
    });
    join_all(told.collect::<Vec<_>>()).await.into_iter().flatten().collect()
}
