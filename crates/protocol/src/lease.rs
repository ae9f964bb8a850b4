//! The arithmetic of leases. All times are nanoseconds of one node's monotonic clock, given by the caller; times of
//! two clocks are never compared.
//!
//! INV-LEASE: while a session believes that its lease lives, no newer epoch has had a command admitted. The session
//! counts from when it *sent* the renewal, shortened by the drift bound; whoever waits for it to end counts from
//! later, lengthened by the drift bound. Only reads and courtesy rest on this, never writes.
//!
//! A lease that has ended is not a holder's confirmation: between the leader's decision and the commit the same
//! holder may be granted a new one. So an Attach over a dead lease is proposed unconfirmed, and settles like a forced
//! one (INV-SETTLE).

use std::collections::BTreeMap;
use std::time::Duration;

use holdfast_types::{Epoch, SessionId};

use crate::command::VolumeCommand;
use crate::planted::is_planted;
use crate::refusal::Refusal;
use crate::timers::{Change, ChangeWatch};
use crate::volume::{Unsettled, VolumeState};

/// Renewals that may be unanswered at once; the oldest is forgotten first.
const PENDING_MAX: usize = 16;

/// A lease and the drift that clocks may have.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct LeaseTerms {
    /// Its length.
    pub lease: Duration,
    /// How much faster or slower than true time a clock may run, in thousandths; 10 is one percent.
    pub drift_permille: u32,
}

impl LeaseTerms {
    /// What a holder may count on by its own clock: no more true time than the lease, however slow that clock is.
    pub fn held(&self) -> Duration {
        if is_planted("lease-too-long") {
            return self.lease + self.lease / 8;
        }
        self.lease.saturating_sub(self.drift())
    }
    /// What others must wait by their own clock: no less true time than the lease, however fast that clock is.
    pub fn waited(&self) -> Duration {
        self.lease.saturating_add(self.drift())
    }
    fn drift(&self) -> Duration {
        if is_planted("drift-ignored") {
            return Duration::ZERO;
        }
        self.lease.saturating_mul(self.drift_permille) / 1000
    }
    fn waited_from(&self, now: u64) -> u64 {
        now.saturating_add(nanoseconds(self.waited()))
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// The session's side.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct SessionLease {
    terms: LeaseTerms,
    next: u64,
    sent: BTreeMap<u64, u64>,
    until: Option<u64>,
    ended: bool,
}

impl SessionLease {
    /// No lease yet.
    pub fn new(terms: LeaseTerms) -> Self {
        Self { terms, next: 0, sent: BTreeMap::new(), until: None, ended: false }
    }
    /// A renewal is about to be sent; the number names it.
    pub fn on_sent(&mut self, now: u64) -> u64 {
        self.next += 1;
        self.sent.insert(self.next, now);
        while self.sent.len() > PENDING_MAX {
            self.sent.pop_first();
        }
        self.next
    }
    /// A renewal was granted for so long: the lease counts from when it was sent, however long the answer took.
    pub fn on_renewed(&mut self, number: u64, lease: Duration) {
        if let Some(sent) = self.sent.remove(&number) {
            self.terms.lease = lease;
            let until = sent.saturating_add(nanoseconds(self.terms.held()));
            self.until = Some(self.until.map_or(until, |before| before.max(until)));
            self.sent.retain(|other, _| *other > number);
        }
    }
    /// The length of the lease that was granted last.
    pub fn length(&self) -> Duration {
        self.terms.lease
    }
    /// The session is over. Only after this may its end be confirmed to anybody.
    pub fn end(&mut self) {
        self.ended = true;
    }
    /// Whether reads may be served.
    pub fn valid(&self, now: u64) -> bool {
        !self.ended && self.until.is_some_and(|until| now < until)
    }
}

/// The leader's side: whether the holder may still be alive. Made anew for each term in which the leader leads.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct HolderWatch {
    terms: LeaseTerms,
    /// The holder may be alive until then; `None` before it is known when the leader began to lead.
    until: Option<u64>,
    /// The epoch that `until` is about, once seen.
    epoch: Option<Epoch>,
    renewing: bool,
    ended: Option<SessionId>,
    change: ChangeWatch,
}

impl HolderWatch {
    /// Nothing is known: a leader says when it began to lead before anything else, and until then nobody is dead.
    pub fn new(terms: LeaseTerms) -> Self {
        Self { terms, until: None, epoch: None, renewing: false, ended: None, change: ChangeWatch::default() }
    }
    /// The volume's timers may have changed: from here on these count. What is waited for already stays. INV-TIMERS.
    pub fn follow(&mut self, terms: LeaseTerms) {
        self.terms = terms;
    }
    /// A new leader does not know what the one before granted: it waits one full lease.
    pub fn began_leading(&mut self, now: u64) {
        self.renewing = true;
        self.extend(now);
    }
    /// The holder's lease was renewed, or begun by an Attach.
    pub fn granted(&mut self, now: u64) {
        self.extend(now);
    }
    fn extend(&mut self, now: u64) {
        let until = self.terms.waited_from(now);
        self.until = Some(self.until.map_or(until, |before| before.max(until)));
    }
    /// A transfer of leadership begins: from here on nothing is renewed in this term.
    pub fn stop_renewing(&mut self) {
        self.renewing = false;
    }
    /// Whether a renewal may be granted.
    pub fn may_renew(&self) -> bool {
        self.renewing
    }
    /// Whether the leader may end this change of timers, which it has applied: INV-TIMERS.
    pub fn may_end(&mut self, change: Change, now: u64) -> bool {
        self.change.until(change, now, self.terms.waited()) <= now
    }
    /// The session has confirmed its end: it serves nothing any more, and never will.
    pub fn confirmed_end(&mut self, session: SessionId) {
        self.ended = Some(session);
    }
    /// Whether the session has confirmed its end.
    pub fn has_ended(&self, session: SessionId) -> bool {
        self.ended == Some(session)
    }
    /// A holder that this watch has not seen before gets one full lease from now, in case the answer to its Attach,
    /// and so its first [`Self::granted`], was lost. The first epoch seen in a term is covered by
    /// [`Self::began_leading`].
    fn observe(&mut self, epoch: Epoch, now: u64) {
        if self.epoch.replace(epoch).is_some_and(|before| before != epoch) {
            self.extend(now);
        }
    }
    /// Whether the holder's lease has ended, if it is not renewed meanwhile.
    pub fn presumed_dead(&self, now: u64) -> bool {
        self.until.is_some_and(|until| now >= until)
    }
    /// What a wait for a holder's end takes.
    pub fn lease_with_drift(terms: &LeaseTerms) -> Duration {
        terms.waited()
    }
}

/// Why a replica does not serve a reader.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NotServed {
    /// The reader's epoch is over.
    OldEpoch,
    /// A former holder may still be served by others (INV-SETTLE); later it may be different.
    Unsettled,
    /// This replica has not heard of the epoch yet; another may have.
    UnknownEpoch,
    /// The epoch is current, and the reader's session does not hold it.
    NotHolder,
}

/// Whether a replica serves a reader, as far as its applied state says. That it has applied up to the reader's floor,
/// and that the reader's lease lives, are for others to see to.
pub fn admit_read(state: &VolumeState, epoch: Epoch, session: SessionId) -> Result<(), NotServed> {
    if epoch < state.epoch() {
        return Err(NotServed::OldEpoch);
    }
    if state.unsettled().is_some() && !is_planted("unsettled-ignored") {
        return Err(NotServed::Unsettled);
    }
    if epoch > state.epoch() {
        return Err(NotServed::UnknownEpoch);
    }
    if state.holder().is_some_and(|holder| holder.session == session) {
        Ok(())
    } else {
        Err(NotServed::NotHolder)
    }
}

/// Whether a leader renews the lease of a session. `state` is what it has applied, up to a point that it has confirmed
/// to be current after the request arrived (INV-LEASE).
pub fn admit_renewal(state: &VolumeState, epoch: Epoch, session: SessionId) -> bool {
    epoch == state.epoch() && state.holder().is_some_and(|holder| holder.session == session)
}

/// What a leader does with an Attach.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum AttachDecision {
    /// Put it into the log, as [`VolumeCommand::admitted`] makes it.
    Propose {
        /// The holder before has confirmed its end, as the leader knows, or there is none.
        confirmed: bool,
    },
    /// Answer so.
    Refuse(Refusal),
}

/// The courtesy of not stealing a live volume: without force, an Attach by another node is refused while the
/// holder's lease may live. `command` is an Attach; `state` is what the leader has applied, up to a point that it
/// has confirmed to be current.
pub fn decide_attach(
    state: &VolumeState,
    watch: &mut HolderWatch,
    command: &VolumeCommand,
    now: u64,
) -> AttachDecision {
    let VolumeCommand::Attach { expected, node, session, force, .. } = command else {
        return AttachDecision::Refuse(Refusal::Malformed("not an attach".into()));
    };
    if let Err(refusal) = command.check() {
        return AttachDecision::Refuse(refusal);
    }
    watch.observe(state.epoch(), now);
    let Some(holder) = state.holder() else {
        // Compare-and-set keeps this true until the command applies.
        return if *expected == state.epoch() {
            AttachDecision::Propose { confirmed: true }
        } else {
            AttachDecision::Refuse(state.mismatch())
        };
    };
    if state.is_repeated_attach(*session, *expected) {
        return AttachDecision::Propose { confirmed: false };
    }
    let confirmed = watch.has_ended(holder.session);
    let free = holder.node == *node || *force || confirmed || watch.presumed_dead(now);
    if !free {
        // Said before the mismatch of epochs: it is what stays true when the caller asks again.
        return AttachDecision::Refuse(Refusal::HeldBy { node: holder.node.clone(), epoch: holder.epoch });
    }
    if *expected != state.epoch() {
        return AttachDecision::Refuse(state.mismatch());
    }
    AttachDecision::Propose { confirmed }
}

/// When a leader may propose `Settled`: every former holder has confirmed its end, or one full lease has passed
/// since the commit of the change. INV-SETTLE.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct SettleWait {
    epoch: Epoch,
    waiting: Vec<SessionId>,
    until: u64,
}

impl SettleWait {
    /// `since` is the later of when this leader saw the change committed and when it was elected: a leader before it
    /// may have renewed up to then.
    pub fn new(terms: &LeaseTerms, unsettled: &Unsettled, since: u64) -> Self {
        let waiting = unsettled.holders.iter().map(|holder| holder.session).collect();
        Self { epoch: unsettled.epoch, waiting, until: terms.waited_from(since) }
    }
    /// The epoch to propose `Settled` for.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }
    /// A former holder has confirmed its end.
    pub fn confirmed_end(&mut self, session: SessionId) {
        self.waiting.retain(|waiting| *waiting != session);
    }
    /// Whether `Settled` may be proposed.
    pub fn is_over(&self, now: u64) -> bool {
        self.waiting.is_empty() || now >= self.until
    }
    /// When it may be proposed at the latest.
    pub fn until(&self) -> u64 {
        self.until
    }
}

/// Whether a voter still owes silence: it neither grants votes nor campaigns for one full lease after its daemon
/// started, because leases that it acknowledged before are forgotten. INV-LEASE.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct StartupSilence {
    until: u64,
}

impl StartupSilence {
    /// A group that existed before. Loaded later, it owes what remains since the daemon's start and of the last
    /// lease that this process acknowledged for it.
    pub fn existing(terms: &LeaseTerms, daemon_started: u64, last_acknowledged: Option<u64>) -> Self {
        let from = last_acknowledged.map_or(daemon_started, |last| last.max(daemon_started));
        Self { until: terms.waited_from(from) }
    }
    /// A newly created group owes none.
    pub fn new_group() -> Self {
        Self { until: 0 }
    }
    /// Whether the voter must be silent.
    pub fn is_silent(&self, now: u64) -> bool {
        now < self.until
    }
    /// When the silence ends.
    pub fn until(&self) -> u64 {
        self.until
    }
}
