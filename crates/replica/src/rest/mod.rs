//! Groups of volumes that nobody holds rest (INV-REST, decision 0165): what their stores do about it.
//!
//! One task of each store asks the leaders' stores once a second, each in one call, whether the groups that follow here
//! still rest there, and wakes those that do not; it wakes the groups that are led here and of which a member's store does
//! not ask any more. Another task looks for groups that are led here and have been quiet, and asks their members. Groups
//! that wake do so in lots: each may cost an election.
//!
//! The rules are `holdfast_protocol::rest`, what a replica does is [`member`]. The catalog's group does not rest.

pub(crate) mod member;
mod messages;

use std::collections::{BTreeMap, BTreeSet};
use std::rc::{Rc, Weak};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use holdfast_env::Instant;
use holdfast_env::net::{Frame, Lane};
use holdfast_protocol::rest::{ASK_EVERY, LEFT_ALONE, Standing, was_stopped};
use holdfast_protocol::timers::Timers;
use holdfast_protocol::volume::VolumeState;
use holdfast_types::{GroupId, StoreId};
use holdfast_wire::rpc::{Responder, Rpc};

use crate::group::Group;
use crate::host::Host;
use crate::messages::REST;
use messages::{ASKED_MAX, Line, Message, decode_answer, encode_answer};

/// How long a store has to answer.
const ANSWER_PATIENCE: Duration = Duration::from_millis(700);
/// An answer that was waited for so long was not waited for: this store was stopped.
const STOPPED_AFTER: Duration = Duration::from_secs(2);
/// Groups that wake at once, and the pause after them.
const LOT: usize = 64;
const LOT_PAUSE: Duration = Duration::from_millis(100);
/// Groups whose members are asked in one round, and at once.
const OFFERS_MAX: usize = 256;
const OFFERS_AT_ONCE: usize = 32;

impl Host {
    /// The groups here that may rest, those of volumes.
    fn groups_that_may_rest(&self) -> Vec<Rc<Group>> {
        let volumes = self.volumes().into_iter().map(|(_, volume)| volume.group().clone());
        let witnesses = self.witnesses().into_iter().map(|witness| witness.group().clone());
        volumes.chain(witnesses).collect()
    }

    /// What the replica of a group here knows about whether it may rest.
    fn standing(&self, group: GroupId) -> Option<(Rc<Group>, Standing)> {
        if let Some(volume) = self.volume(group) {
            let is_busy = volume.fault().is_some() || volume.hold().index().is_some();
            let known = known_of(&volume.state(), volume.timers().run(), volume.group());
            let standing = volume.group().standing(Standing { is_busy, ..known });
            return Some((volume.group().clone(), standing));
        }
        let witness = self.witness(group)?;
        let is_busy = witness.fault().is_some() || witness.group().is_leader();
        let known = known_of(&witness.state(), witness.timers_to_run(), witness.group());
        let standing = witness.group().standing(Standing { is_busy, ..known });
        Some((witness.group().clone(), standing))
    }

    /// Answers another store about groups that rest.
    pub(crate) fn on_rest(&self, request: &Frame, responder: Responder) {
        let message = match Message::decode(&request.head) {
            Ok(message) => message,
            Err(error) => return responder.refuse(error.to_string()),
        };
        match message {
            Message::Offer { group, to, under, last } => {
                let agreed = match self.standing(group) {
                    Some((member, standing)) if member.id().replica == to => {
                        member.agree(under, last, &standing)
                    }
                    _ => Err("no such replica runs here".into()),
                };
                match agreed {
                    Ok(()) => responder.reply(Frame::small(bytes::Bytes::new())),
                    Err(why) => responder.refuse(why),
                }
            }
            Message::Ask(lines) => {
                let rests: Vec<bool> = lines.iter().map(|line| self.rests_here(line)).collect();
                responder.reply(Frame::small(encode_answer(&rests)));
            }
            Message::Wake { group, under } => {
                if let Some(led) = self.group(group) {
                    led.wanted(under);
                }
                responder.reply(Frame::small(bytes::Bytes::new()));
            }
        }
    }

    fn rests_here(&self, line: &Line) -> bool {
        let led = self.group(line.group).filter(|led| led.id().replica == line.under.leader);
        led.is_some_and(|led| led.rests_under(line))
    }
}

fn known_of(state: &VolumeState, timers: Timers, group: &Group) -> Standing {
    Standing {
        is_held: state.holder().is_some(),
        is_unsettled: state.unsettled().is_some(),
        changes_timers: state.timers().change().is_some() || group.timers() != timers,
        ..Standing::default()
    }
}

/// Asks for the groups that rest here, and wakes those that must not, for as long as the store is there.
pub(crate) async fn watch(host: Weak<Host>) {
    let mut waking: BTreeSet<GroupId> = BTreeSet::new();
    loop {
        let next = Instant::now() + ASK_EVERY;
        while !waking.is_empty() && Instant::now() < next {
            let Some(host) = host.upgrade() else { return };
            wake_a_lot(&host, &mut waking);
            drop(host);
            holdfast_env::sleep(LOT_PAUSE).await;
        }
        holdfast_env::sleep_until(next).await;
        let Some((groups, rpc)) = look(&host, next, &mut waking) else { return };
        let asked = questions(&groups).into_iter().map(|(store, lines)| ask(&rpc, store, lines));
        let mut asked: FuturesUnordered<_> = asked.collect();
        while let Some(told) = asked.next().await {
            let Some(host) = host.upgrade() else { return };
            for (line, rests) in told {
                let wakes = host.group(line.group).is_some_and(|member| member.told(&line, rests));
                if wakes {
                    waking.insert(line.group);
                }
            }
        }
        if !waking.is_empty() {
            tracing::info!(
                groups = waking.len(),
                "groups that rested wake: members or leaders are not heard"
            );
        }
    }
}

fn wake_a_lot(host: &Host, waking: &mut BTreeSet<GroupId>) {
    for _ in 0..LOT {
        let Some(group) = waking.pop_first() else { return };
        if let Some(member) = host.group(group) {
            member.wake();
            member.wake_alone();
        }
    }
}

/// The groups that may rest here. What is led here and misses somebody is to wake.
fn look(host: &Weak<Host>, due: Instant, waking: &mut BTreeSet<GroupId>) -> Option<(Vec<Rc<Group>>, Rpc)> {
    let host = host.upgrade().filter(|host| host.journal().failed().is_none())?;
    let (groups, now) = (host.groups_that_may_rest(), Instant::now());
    if was_stopped(due.0, now.0) {
        groups.iter().for_each(|group| group.rest_was_stopped(now));
    }
    let missing = groups.iter().filter(|group| group.misses_somebody(now));
    waking.extend(missing.map(|group| group.id().group));
    Some((groups, host.environment().rpc.clone()))
}

/// What is asked, by the leader's store.
fn questions(groups: &[Rc<Group>]) -> BTreeMap<StoreId, Vec<Line>> {
    let mut questions: BTreeMap<StoreId, Vec<Line>> = BTreeMap::new();
    for (store, line) in groups.iter().filter_map(|group| group.asks_about()) {
        questions.entry(store).or_default().push(line);
    }
    questions
}

/// Asks a store about all groups that follow it. What it does not answer is not known, unless this store was stopped
/// meanwhile: then it was not asked.
async fn ask(rpc: &Rpc, store: StoreId, lines: Vec<Line>) -> Vec<(Line, Option<bool>)> {
    let mut told = Vec::with_capacity(lines.len());
    for (number, part) in lines.chunks(ASKED_MAX).enumerate() {
        let began = Instant::now();
        let frame = Frame::small(Message::Ask(part.to_vec()).encode());
        let answer = rpc.call(store, Lane::Control, REST, frame, ANSWER_PATIENCE).await;
        let answer = answer.ok().and_then(|frame| decode_answer(&frame.head, part.len()));
        match answer {
            Some(rests) => told.extend(part.iter().copied().zip(rests.into_iter().map(Some))),
            None if Instant::now().since(began) > STOPPED_AFTER => return told,
            // Whoever does not answer one question is not asked the rest.
            None => {
                told.extend(lines[number * ASKED_MAX..].iter().map(|line| (*line, None)));
                return told;
            }
        }
    }
    told
}

/// Lets groups rest that are led here and have been quiet, for as long as the store is there.
pub(crate) async fn offer(host: Weak<Host>) {
    // Stores that did not answer, and until when their groups are left alone.
    let mut unheard: BTreeMap<StoreId, Instant> = BTreeMap::new();
    loop {
        holdfast_env::sleep(ASK_EVERY).await;
        let now = Instant::now();
        unheard.retain(|_, until| now < *until);
        let Some(due) = due(&host, &unheard) else { return };
        let asking = due.into_iter().map(|group| {
            let (host, id) = (host.clone(), group.id().group);
            async move {
                let standing = || {
                    host.upgrade().and_then(|host| host.standing(id)).map_or_else(busy, |(_, known)| known)
                };
                group.go_to_rest(standing).await
            }
        });
        let silent: Vec<Option<StoreId>> =
            futures_util::stream::iter(asking).buffer_unordered(OFFERS_AT_ONCE).collect().await;
        unheard.extend(silent.into_iter().flatten().map(|store| (store, Instant::now() + LEFT_ALONE)));
    }
}

/// Of a replica that does not run any more.
fn busy() -> Standing {
    Standing { is_busy: true, ..Standing::default() }
}

/// Groups whose members are to be asked now.
fn due(host: &Weak<Host>, unheard: &BTreeMap<StoreId, Instant>) -> Option<Vec<Rc<Group>>> {
    let host = host.upgrade().filter(|host| host.journal().failed().is_none())?;
    let now = Instant::now();
    let volumes = host.volumes().into_iter().map(|(_, volume)| volume.group().clone());
    let hears = |group: &Rc<Group>| group.members().iter().all(|(_, store)| !unheard.contains_key(store));
    let quiet = volumes.filter(|group| group.may_ask(now));
    let due = quiet.filter(|group| {
        host.standing(group.id().group).is_some_and(|(_, known)| known.may_rest().is_ok()) && hears(group)
    });
    Some(due.take(OFFERS_MAX).collect())
}
