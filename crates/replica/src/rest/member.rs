//! A replica whose group rests (INV-REST): what stops and what goes on.
//!
//! Nothing of Raft is changed but that it counts no time: no heartbeat is sent, nobody campaigns. Whatever is sent is
//! answered as ever. A leader that is asked for anything begins to send heartbeats again at once; until a majority has
//! answered it (*waking*), it asks a majority itself before it proposes anything or says what is committed, because it
//! may have been deposed long ago. A follower rests on until entries come, or another leader, or its leader's store says
//! that the group does not rest there any more. So a heartbeat that was late wakes nobody.
//!
//! Voters' leases have lapsed while a group rests. So whoever is asked for a vote meanwhile refuses, unless the leader
//! itself gives its place away, and lets the leader know; and a follower that woke by itself neither votes nor campaigns
//! for as long as a lease lasts.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use holdfast_env::Instant;
use holdfast_env::net::{Frame, Lane};
use holdfast_protocol::planted::is_planted;
use holdfast_protocol::rest::{Followed, HELD_BACK_MAX, Led, Quiet, Standing, WAKING_MAX};
use holdfast_store::EntryId;
use holdfast_types::{LogIndex, ReplicaId, StoreId, Term};
use openraft::ServerState;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::raft::AppendEntriesRequest;

use super::messages::{Leadership, Line, Message};
use crate::config::{LeaderId, Types};
use crate::confirm;
use crate::group::{Group, GroupError, stopped};
use crate::messages::REST;

/// How long a store is waited for that is told of something.
const CALL_DEADLINE: Duration = Duration::from_millis(700);

/// What a replica does about the rest of its group.
#[derive(Clone, Debug, Default)]
enum State {
    #[default]
    Awake,
    /// It leads, and the others are being asked.
    Asking(Leadership),
    /// It leads, and the group rests.
    Led(Leadership, Led),
    /// It leads, and has begun to send heartbeats again, at this moment.
    Waking(Leadership, Led, Instant),
    /// It follows, and the group rests.
    Followed(Leadership, StoreId, Followed),
}

/// Whether a replica rests, and what it waits for.
#[derive(Default)]
pub(crate) struct Rest {
    state: RefCell<State>,
    quiet: Cell<Quiet>,
    /// It has woken by itself: until then it neither campaigns nor votes.
    grace: Cell<Option<Instant>>,
    /// Raft's core waits for the disk.
    stalls: Cell<bool>,
    /// Its leader's store is being told that the group is wanted.
    calls: Cell<bool>,
    /// When that store last answered for it, before it woke.
    answered: Cell<Option<Instant>>,
    since: Cell<Option<Instant>>,
}

fn leadership(of: LeaderId) -> Leadership {
    Leadership { term: Term(of.term), leader: ReplicaId(of.node_id) }
}

impl Group {
    /// Whether its group rests, as far as it knows.
    pub fn is_resting(&self) -> bool {
        matches!(*self.rest().state.borrow(), State::Led(..) | State::Followed(..))
    }

    /// For how long it has.
    pub(crate) fn rested_for(&self) -> Duration {
        let since = self.rest().since.get().filter(|_| self.is_resting());
        since.map_or(Duration::ZERO, |since| Instant::now().since(since))
    }

    /// Whether it leads only as far as nobody has said otherwise while it rested: a majority has not answered it since.
    pub(crate) fn leads_on_trust(&self) -> bool {
        self.end_of_waking();
        matches!(*self.rest().state.borrow(), State::Led(..) | State::Waking(..))
    }

    /// The leadership that Raft knows, and whether it is this replica's own.
    fn leadership(&self) -> Option<(Leadership, bool)> {
        let metrics = self.raft().server_metrics();
        let now = metrics.borrow_watched();
        let is_own = now.state == ServerState::Leader && !self.mute().is_set();
        let follows = matches!(now.state, ServerState::Follower | ServerState::Learner);
        (now.vote.committed && (is_own || follows)).then(|| (leadership(now.vote.leader_id), is_own))
    }

    /// Raft counts time while nothing is in the way.
    pub(crate) fn set_ticks(&self) {
        let rest = self.rest();
        let leads = self.leadership().is_some_and(|(_, is_own)| is_own);
        let waits = !leads && rest.grace.get().is_some_and(|until| Instant::now() < until);
        let ticks = !rest.stalls.get() && !self.is_resting() && !waits;
        self.raft().runtime_config().tick(ticks);
    }

    /// Raft was made, perhaps anew: its core waits for nothing yet.
    pub(crate) fn rest_with_another_core(&self) {
        self.set_stalls(false);
    }

    pub(crate) fn set_stalls(&self, stalls: bool) {
        self.rest().stalls.set(stalls);
        self.set_ticks();
    }

    fn set_rest(&self, state: State) {
        let rested = self.is_resting();
        if let State::Followed(_, _, followed) = &*self.rest().state.borrow() {
            self.rest().answered.set(Some(Instant(followed.answered_at())));
        }
        *self.rest().state.borrow_mut() = state;
        let rests = self.is_resting();
        if rests != rested {
            self.rest().since.set(rests.then(Instant::now));
            self.counters().count(|usage| match rests {
                true => usage.rests += 1,
                false => usage.wakes += 1,
            });
        }
        self.set_ticks();
    }

    /// Its leadership, or the one that it follows, has changed: what rested under it does not.
    pub(crate) fn rest_ends_with_leadership(&self) {
        let now = self.leadership();
        let goes_on = match *self.rest().state.borrow() {
            State::Awake => true,
            State::Asking(under) | State::Led(under, _) | State::Waking(under, ..) => {
                now == Some((under, true))
            }
            State::Followed(under, ..) => now == Some((under, false)),
        };
        if !goes_on {
            self.set_rest(State::Awake);
        }
        self.set_ticks();
    }

    /// Ends the waking of a leader that a majority has answered, or that has had its time.
    fn end_of_waking(&self) {
        let since = match *self.rest().state.borrow() {
            State::Waking(_, _, since) => since,
            _ => return,
        };
        let waited = Instant::now().since(since);
        let answered = self.has_answers_within(waited);
        // Raft holds heartbeats back for two of these, at most.
        let longest = WAKING_MAX.max(self.timers().election_max * 3);
        if answered || waited > longest || self.is_only_voter() {
            self.set_rest(State::Awake);
        }
    }

    /// Whether a majority has answered a heartbeat that was sent within this long.
    fn has_answers_within(&self, age: Duration) -> bool {
        let metrics = self.raft().metrics();
        let acked = metrics.borrow_watched().last_quorum_acked;
        acked.is_some_and(|at| openraft::Instant::elapsed(&*at) <= age)
    }

    /// Something is wanted of the group: a leader that rests sends heartbeats again, at once.
    pub(crate) fn wake(&self) {
        let rest = self.rest();
        let mut quiet = rest.quiet.get();
        quiet.disturbed();
        rest.quiet.set(quiet);
        let state = rest.state.borrow().clone();
        match state {
            State::Led(under, led) => {
                tracing::debug!(group = %self.id().group, "a leader wakes its group");
                self.set_rest(State::Waking(under, led, Instant::now()));
                let raft = self.raft();
                holdfast_env::spawn("rest-heartbeat", async move {
                    // Raft may have stopped meanwhile, or holds its heartbeats back: the next tick tries again.
                    drop(raft.trigger().heartbeat().await);
                });
            }
            State::Asking(_) => self.set_rest(State::Awake),
            State::Awake | State::Waking(..) | State::Followed(..) => {}
        }
    }

    /// As [`Self::wake`], for whoever is to rest on what the leader then says or does: a majority has answered that it
    /// still follows.
    pub(crate) async fn awake(&self) -> Result<(), GroupError> {
        self.wake();
        if !self.leads_on_trust() || is_planted("woken-leader-unasked") {
            return Ok(());
        }
        self.confirm_leadership().await?;
        self.until_raft_proposes().await
    }

    /// Raft proposes nothing before a majority has answered one of its own heartbeats, which it may hold back for as long
    /// as two election timeouts.
    async fn until_raft_proposes(&self) -> Result<(), GroupError> {
        let mut metrics = self.raft().metrics();
        let answered = async {
            while !self.is_only_voter() && !self.has_answers_within(self.timers().election_max) {
                metrics.changed().await.map_err(stopped)?;
            }
            Ok(())
        };
        holdfast_env::timeout(self.timers().election_max * 3, answered)
            .await
            .unwrap_or(Err(GroupError::TimedOut))
    }

    /// Whether it still leads as it did, as far as it knows.
    pub(crate) fn leads_as(&self, leader: LeaderId) -> bool {
        self.leadership() == Some((leadership(leader), true))
    }

    /// When its leader was last answered for, or it woke.
    pub(crate) fn answered_for_at(&self) -> Option<Instant> {
        if self.is_answered_for() {
            return Some(Instant::now());
        }
        self.rest().answered.get().max(self.rest().grace.get())
    }

    /// Somebody wants the volume of this follower: its leader is told, or it wakes, if nobody answers for that leader.
    pub(crate) fn wanted_here(self: &Rc<Self>) {
        let (under, store, has_failed) = match *self.rest().state.borrow() {
            State::Followed(under, store, followed) => (under, store, followed.has_failed()),
            _ => return,
        };
        match has_failed {
            true => self.wake_alone(),
            false => self.call_leader(under, store),
        }
    }

    /// A leader that is waking: who it led as when it rested, and up to where what it has must be applied before anything
    /// is said of what is committed.
    pub(crate) fn woken(&self) -> Option<(LeaderId, LogIndex)> {
        self.wake();
        if !self.leads_on_trust() {
            return None;
        }
        let metrics = self.raft().server_metrics();
        let now = metrics.borrow_watched();
        let last = self.log().last().map_or(LogIndex::ZERO, |id| id.index);
        (now.state == ServerState::Leader).then_some((now.vote.leader_id, last))
    }

    /// A follower wakes by itself. For as long as its leader's lease lasted it leaves the leader its turn.
    pub(crate) fn wake_alone(self: &Rc<Self>) {
        if !matches!(*self.rest().state.borrow(), State::Followed(..)) {
            return;
        }
        let until = Instant::now() + self.timers().election_max;
        self.rest().grace.set(Some(until));
        self.set_rest(State::Awake);
        let weak = Rc::downgrade(self);
        holdfast_env::spawn("rest-grace", async move {
            holdfast_env::sleep_until(until).await;
            if let Some(group) = weak.upgrade() {
                group.set_ticks();
            }
        });
    }

    /// An append has come. Entries wake a follower, and so does another leader.
    pub(crate) fn rest_hears(self: &Rc<Self>, request: &AppendEntriesRequest<Types>) {
        let is_news = match *self.rest().state.borrow() {
            State::Followed(under, ..) => {
                !request.entries.is_empty() || leadership(request.vote.leader_id) != under
            }
            _ => false,
        };
        if is_news {
            self.wake_alone();
        }
    }

    /// Why it does not vote now, if it does not: its group rests, or did a moment ago. Whoever asks has missed something,
    /// so the leader is told, or wakes.
    pub(crate) fn votes_not(self: &Rc<Self>) -> Option<&'static str> {
        self.end_of_waking();
        let state = self.rest().state.borrow().clone();
        match state {
            State::Followed(..) => {
                self.wanted_here();
                Some("the group rests, and is being woken")
            }
            State::Led(..) | State::Waking(..) => {
                self.wake();
                Some("the group's leader wakes")
            }
            State::Awake | State::Asking(_) => {
                let waits = self.rest().grace.get().is_some_and(|until| Instant::now() < until);
                waits.then_some("the voter has just woken")
            }
        }
    }

    fn call_leader(self: &Rc<Self>, under: Leadership, store: StoreId) {
        if self.rest().calls.replace(true) {
            return;
        }
        let weak = Rc::downgrade(self);
        let (rpc, group) = (self.networks().rpc.clone(), self.id().group);
        holdfast_env::spawn("rest-call", async move {
            let frame = Frame::small(Message::Wake { group, under }.encode());
            if let Err(error) = rpc.call(store, Lane::Control, REST, frame, CALL_DEADLINE).await {
                tracing::debug!(%group, %store, %error, "the leader of a group that rests is not told that it is wanted");
            }
            if let Some(group) = weak.upgrade() {
                group.rest().calls.set(false);
            }
        });
    }

    /// What the replica knows of its group, beside what its state machine says.
    pub(crate) fn standing(&self, of_volume: Standing) -> Standing {
        let metrics = self.raft().metrics();
        let now = metrics.borrow_watched();
        let index = |id: Option<u64>| LogIndex(id.unwrap_or(0));
        let membership = now.membership_config.membership();
        let is_settled = membership.get_joint_config().len() == 1
            && now.membership_config.log_id() == now.committed_membership_config.log_id();
        let others = now.replication.iter().flatten().filter(|(id, _)| **id != self.id().replica.0);
        Standing {
            changes_members: !is_settled,
            is_busy: of_volume.is_busy
                || self.timers().election_max * 2 > HELD_BACK_MAX
                || now.running_state.is_err()
                || self.transfer().is_under_way()
                || self.mute().is_set()
                || self.owes_silence()
                || self.core_waits()
                || self.reloading().get()
                || self.adaptor().is_installing()
                || self.log().is_hung()
                || self.log().is_full()
                || !self.log().faulty().is_empty(),
            last: index(now.last_log_index),
            flushed: self.log().flushed(),
            committed: index(now.local_committed.map(|id| id.index)),
            applied: self.position().applied_index(),
            matched: others.map(|(_, at)| index(at.map(|at| at.index))).collect(),
            ..of_volume
        }
    }

    /// Whether it leads a group that has been quiet for long enough to be asked, and is asked now.
    pub(crate) fn may_ask(&self, now: Instant) -> bool {
        let rest = self.rest();
        self.end_of_waking();
        if !matches!(*rest.state.borrow(), State::Awake) || !self.is_leader() {
            return false;
        }
        let mut quiet = rest.quiet.get();
        let may = quiet.look(self.log().last().map_or(LogIndex::ZERO, |id| id.index), now.0);
        rest.quiet.set(quiet);
        may
    }

    /// Asks every other member whether the group may rest, and rests if all agree. `standing` tells whether it still may.
    /// The store that was not heard, if that is why not.
    pub(crate) async fn go_to_rest(&self, standing: impl Fn() -> Standing) -> Option<StoreId> {
        let (Some((under, true)), Some(last)) = (self.leadership(), self.log().last()) else { return None };
        if standing().may_rest().is_err() {
            return None;
        }
        self.set_rest(State::Asking(under));
        let others: Vec<_> =
            self.members().into_iter().filter(|(member, _)| *member != self.id().replica).collect();
        let agreed = match is_planted("rest-unasked") {
            true => Ok(()),
            false => self.ask_all(&others, under, last).await,
        };
        let still_asks = matches!(*self.rest().state.borrow(), State::Asking(asked) if asked == under);
        if let Err(unheard) = agreed {
            let mut quiet = self.rest().quiet.get();
            quiet.refused(Instant::now().0);
            self.rest().quiet.set(quiet);
            if still_asks {
                self.set_rest(State::Awake);
            }
            return unheard;
        }
        if !still_asks {
            return None;
        }
        let unchanged = self.leadership() == Some((under, true)) && self.log().last() == Some(last);
        if !unchanged || standing().may_rest().is_err() {
            self.set_rest(State::Awake);
            return None;
        }
        tracing::debug!(group = %self.id().group, index = %last.index, "a group rests");
        let led = Led::new(others.iter().map(|(member, _)| *member), Instant::now().0);
        self.set_rest(State::Led(under, led));
        None
    }

    /// Whether all agree; if not, the store that has not answered, if that is why.
    async fn ask_all(
        &self,
        others: &[(ReplicaId, StoreId)],
        under: Leadership,
        last: EntryId,
    ) -> Result<(), Option<StoreId>> {
        let group = self.id().group;
        let asked = others.iter().map(|(to, store)| async move {
            let frame = Frame::small(Message::Offer { group, to: *to, under, last }.encode());
            let answer = self.networks().rpc.call(*store, Lane::Control, REST, frame, CALL_DEADLINE).await;
            answer.map_err(|error| {
                tracing::debug!(%group, replica = %to, %error, "a group goes on: a member does not agree to rest");
                let refuses = matches!(error, holdfast_wire::rpc::CallError::Refused(_));
                (!refuses).then_some(*store)
            })
        });
        futures_util::future::join_all(asked).await.into_iter().try_for_each(|answer| answer.map(drop))
    }

    /// INV-REST: a follower agrees to rest, or says why not.
    pub(crate) fn agree(&self, under: Leadership, last: EntryId, standing: &Standing) -> Result<(), String> {
        let follows = self.leadership() == Some((under, false));
        let Some((_, store)) = self.leader().filter(|(leader, _)| *leader == under.leader && follows) else {
            return Err("it follows another leader".into());
        };
        if self.rest().grace.get().is_some_and(|until| Instant::now() < until) {
            return Err("it has just woken".into());
        }
        if self.log().last() != Some(last) && !is_planted("rest-while-behind") {
            return Err("it has another last entry".into());
        }
        standing.may_rest().map_err(|busy| busy.to_string())?;
        self.set_rest(State::Followed(under, store, Followed::new(Instant::now().0)));
        Ok(())
    }

    /// As leader: whether the group rests here under this leadership, or is only asked whether it may, or wakes. Whoever
    /// asks is heard of.
    pub(crate) fn rests_under(&self, line: &Line) -> bool {
        self.end_of_waking();
        if self.log().is_hung() || self.fault().is_some() || self.leadership() != Some((line.under, true)) {
            return false;
        }
        match &mut *self.rest().state.borrow_mut() {
            State::Led(under, led) | State::Waking(under, led, _) => {
                led.heard(line.follower, Instant::now().0);
                *under == line.under
            }
            State::Asking(under) => *under == line.under,
            State::Awake | State::Followed(..) => false,
        }
    }

    /// As leader: a member says that the group is wanted.
    pub(crate) fn wanted(&self, under: Leadership) {
        let is_it = matches!(*self.rest().state.borrow(), State::Led(led_under, _) if led_under == under);
        if is_it {
            self.wake();
        }
    }

    /// As follower that rests: what its store asks about, and whom.
    pub(crate) fn asks_about(&self) -> Option<(StoreId, Line)> {
        match *self.rest().state.borrow() {
            State::Followed(under, store, _) => {
                Some((store, Line { group: self.id().group, under, follower: self.id().replica }))
            }
            _ => None,
        }
    }

    /// What the leader's store said, or that it said nothing; whether to wake. Nothing if it rests no more as it was asked.
    pub(crate) fn told(&self, asked: &Line, rests: Option<bool>) -> bool {
        match &mut *self.rest().state.borrow_mut() {
            State::Followed(under, _, followed) if *under == asked.under => match rests {
                Some(true) => {
                    followed.answered(Instant::now().0);
                    false
                }
                Some(false) => true,
                None => followed.unanswered(),
            },
            _ => false,
        }
    }

    /// As leader of a group that rests: whether some member has not been heard of for too long.
    pub(crate) fn misses_somebody(&self, now: Instant) -> bool {
        self.end_of_waking();
        match &*self.rest().state.borrow() {
            State::Led(_, led) => led.missing(now.0).is_some(),
            _ => false,
        }
    }

    /// The store was stopped until now.
    pub(crate) fn rest_was_stopped(&self, now: Instant) {
        match &mut *self.rest().state.borrow_mut() {
            State::Led(_, led) | State::Waking(_, led, _) => led.was_stopped(now.0),
            State::Followed(_, _, followed) => followed.was_stopped(),
            State::Awake | State::Asking(_) => {}
        }
    }

    /// As leader of a group that rests: whether a majority of every configuration has been heard of a moment ago.
    pub(crate) fn is_heard_by_majority(&self) -> bool {
        let mut heard = match &*self.rest().state.borrow() {
            State::Led(_, led) | State::Waking(_, led, _) => led.lately(Instant::now().0),
            _ => return false,
        };
        heard.insert(self.id().replica);
        let heard = heard.into_iter().map(|id| id.0).collect();
        self.membership_as_leader().is_some_and(|membership| confirm::is_quorum(&membership, &heard))
    }

    /// As follower of a group that rests: whether its leader's store has answered for it a moment ago.
    pub(crate) fn is_answered_for(&self) -> bool {
        match &*self.rest().state.borrow() {
            State::Followed(_, _, followed) => followed.hears(Instant::now().0),
            _ => false,
        }
    }
}
