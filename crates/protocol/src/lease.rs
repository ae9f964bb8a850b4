//! The arithmetic of leases. All times are nanoseconds of one node's monotonic clock, given by the caller.
//!
//! INV-LEASE: while a session believes that its lease lives, no newer epoch has had a command admitted. The session
//! counts from when it *sent* the renewal, shortened by the drift bound; whoever waits for it to end counts from
//! later, lengthened by the drift bound. Only reads and courtesy rest on this, never writes.

use std::collections::BTreeMap;
use std::time::Duration;

use holdfast_types::NodeName;

use crate::command::VolumeCommand;
use crate::refusal::Refusal;
use crate::volume::VolumeState;

/// Renewals that may be unanswered at once.
const PENDING_MAX: usize = 16;

/// A lease and the drift that clocks may have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LeaseTerms {
    /// Its length.
    pub lease: Duration,
    /// How much faster or slower than true time a clock may run, in thousandths.
    pub drift_permille: u32,
}

impl LeaseTerms {
    /// What a holder may count on: shorter than the lease, whatever its clock does.
    pub fn held(&self) -> Duration {
        self.lease - self.lease * self.drift_permille / 1000
    }
    /// What others must wait: longer than the lease, whatever their clocks do.
    pub fn waited(&self) -> Duration {
        self.lease + self.lease * self.drift_permille / 1000
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// The session's side.
#[derive(Clone, Debug)]
pub struct SessionLease {
    terms: LeaseTerms,
    next: u64,
    sent: BTreeMap<u64, u64>,
    until: Option<u64>,
}

impl SessionLease {
    /// No lease yet.
    pub fn new(terms: LeaseTerms) -> Self {
        Self { terms, next: 0, sent: BTreeMap::new(), until: None }
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
    /// A renewal was granted: the lease counts from when it was sent.
    pub fn on_renewed(&mut self, number: u64) {
        if let Some(sent) = self.sent.remove(&number) {
            let until = sent.saturating_add(nanoseconds(self.terms.held()));
            self.until = Some(self.until.map_or(until, |before| before.max(until)));
            self.sent.retain(|other, _| *other > number);
        }
    }
    /// Whether reads may be served.
    pub fn valid(&self, now: u64) -> bool {
        self.until.is_some_and(|until| now < until)
    }
}

/// The leader's side: whether the holder may still be alive.
#[derive(Clone, Debug)]
pub struct HolderWatch {
    terms: LeaseTerms,
    /// The holder may be alive until then.
    until: u64,
}

impl HolderWatch {
    /// Nothing is known: a leader says when it began to lead before anything else.
    pub fn new(terms: LeaseTerms) -> Self {
        Self { terms, until: 0 }
    }
    /// A new leader does not know what the one before granted: it waits one full lease.
    pub fn began_leading(&mut self, now: u64) {
        self.until = self.until.max(now.saturating_add(nanoseconds(self.terms.waited())));
    }
    /// The holder's lease was renewed.
    pub fn granted(&mut self, now: u64) {
        self.until = self.until.max(now.saturating_add(nanoseconds(self.terms.waited())));
    }
    /// Whether the holder's lease has surely ended.
    pub fn presumed_dead(&self, now: u64) -> bool {
        now >= self.until
    }
    /// What a wait for a holder's end takes.
    pub fn lease_with_drift(terms: &LeaseTerms) -> Duration {
        terms.waited()
    }
}

/// What a leader does with an Attach.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum AttachDecision {
    /// Put it into the log.
    Propose {
        /// The holder before has ended, as the leader knows, or there is none.
        confirmed: bool,
    },
    /// Answer so.
    Refuse(Refusal),
}

/// The courtesy of not stealing a live volume: without force, an Attach by another node is refused while the
/// holder's lease may live. `command` is an Attach.
pub fn decide_attach(state: &VolumeState, watch: &HolderWatch, command: &VolumeCommand, now: u64) -> AttachDecision {
    let VolumeCommand::Attach { expected, node, session, force, .. } = command else {
        return AttachDecision::Refuse(Refusal::Malformed("not an attach".into()));
    };
    let Some(holder) = state.holder() else { return AttachDecision::Propose { confirmed: true } };
    if holder.session == *session {
        return AttachDecision::Propose { confirmed: true };
    }
    if *expected != state.epoch() && holder.node != *node && !force {
        return refuse_held(&holder.node, state, watch, now);
    }
    if *expected != state.epoch() {
        return AttachDecision::Refuse(Refusal::EpochMismatch { current: state.epoch() });
    }
    if watch.presumed_dead(now) {
        // The lease has ended: the former holder serves no read any more, and the epoch stops its writes.
        return AttachDecision::Propose { confirmed: true };
    }
    if *force || holder.node == *node {
        return AttachDecision::Propose { confirmed: false };
    }
    refuse_held(&holder.node, state, watch, now)
}

fn refuse_held(node: &NodeName, state: &VolumeState, watch: &HolderWatch, now: u64) -> AttachDecision {
    if watch.presumed_dead(now) {
        return AttachDecision::Refuse(Refusal::EpochMismatch { current: state.epoch() });
    }
    AttachDecision::Refuse(Refusal::HeldBy { node: node.clone(), epoch: state.epoch() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TERMS: LeaseTerms = LeaseTerms { lease: Duration::from_secs(1), drift_permille: 10 };
    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn a_session_counts_from_when_it_sent() {
        let mut lease = SessionLease::new(TERMS);
        assert!(!lease.valid(0));
        let first = lease.on_sent(SECOND);
        let second = lease.on_sent(SECOND * 3 / 2);
        lease.on_renewed(second);
        lease.on_renewed(first);
        assert!(lease.valid(SECOND * 2), "the older answer does not shorten the lease");
        assert!(lease.valid(SECOND * 3 / 2 + SECOND * 98 / 100));
        assert!(!lease.valid(SECOND * 5 / 2 - SECOND / 200), "one percent of drift is taken off");
    }

    #[test]
    fn whoever_waits_waits_longer_than_any_holder_counts() {
        let mut lease = SessionLease::new(TERMS);
        let mut watch = HolderWatch::new(TERMS);
        let number = lease.on_sent(0);
        watch.granted(0);
        lease.on_renewed(number);
        // The holder's clock runs 1 % slow, the waiter's 1 % fast: at every true time, dead here means invalid there.
        for true_time in (0..3 * SECOND).step_by(1_000_000) {
            let (slow, fast) = (true_time * 99 / 100, true_time * 101 / 100);
            assert!(!(watch.presumed_dead(fast) && lease.valid(slow)), "at {true_time}");
        }
    }
}
