//! A leader stands on a disk that answers (INV-GRAY).
//!
//! A disk that hangs or is slow leaves its daemon well: heartbeats would go on for ever, though a vote, a truncation or
//! a purge there takes for ever, too. So one task of each store looks at its journal.
//!
//! *Hung*: every group that is led here asks its other voters to prove that they can write. If those who do, without
//! this replica, are a majority of every configuration, one of them is offered the leadership, and in any case this
//! replica falls silent: it sends no append and no heartbeat, and does not take itself for the leader. The others elect
//! somebody within an election timeout. openraft's core is not asked: it may be waiting for the disk itself.
//! Without such a majority nothing would be won, and it goes on.
//!
//! *Slow*: the leadership is handed over as it is for an attachment, to a voter of a majority that is several times
//! faster. A group is given away for slowness once in a while only.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::{Rc, Weak};
use std::time::Duration;

use futures_util::StreamExt;
use holdfast_env::Instant;
use holdfast_protocol::planted::is_planted;
use holdfast_store::RecentLatency;
use holdfast_store::journal::Journal;
use holdfast_types::ReplicaId;
use tokio::sync::Notify;

use crate::config::Membership;
use crate::confirm;
use crate::group::Group;
use crate::host::Host;

/// Between two looks at the journal.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How long the other voters have to prove that they can write.
const PROOF_PATIENCE: Duration = Duration::from_millis(500);
/// Between two such questions of one group, whatever came of the first.
const ASK_AGAIN_AFTER: Duration = Duration::from_secs(1);
/// Groups of a store that give way at once.
const AT_ONCE: usize = 256;
/// No disk is called slow whose flushes take less, sustained.
pub const SLOW_FLOOR: Duration = Duration::from_millis(40);
/// How many times faster than the own flush the others must acknowledge, their way through the network included.
pub const SLOW_FACTOR: u32 = 4;
/// Between two transfers of one group for slowness.
const GIVE_AGAIN_AFTER: Duration = Duration::from_secs(30);

/// Whether a replica keeps its appends and heartbeats to itself. Cheap to clone; shared by its clients.
#[derive(Clone, Default)]
pub(crate) struct Mute(Rc<(Cell<bool>, Notify)>);

impl Mute {
    pub(crate) fn is_set(&self) -> bool {
        self.0.0.get()
    }
    fn set(&self, muted: bool) {
        if self.0.0.replace(muted) != muted {
            self.0.1.notify_waiters();
        }
    }
    /// Ends at the next change since this call.
    pub(crate) fn changed(&self) -> impl Future<Output = ()> + '_ {
        self.0.1.notified()
    }
    /// Ends when it is set.
    pub(crate) async fn begun(&self) {
        loop {
            let changed = self.changed();
            if self.is_set() {
                return;
            }
            changed.await;
        }
    }
}

/// How long followers have been taking to acknowledge entries. Cheap to clone.
#[derive(Clone, Default)]
pub(crate) struct Acks(Rc<RefCell<BTreeMap<ReplicaId, RecentLatency>>>);

impl Acks {
    pub(crate) fn record(&self, from: ReplicaId, sent: Instant) {
        let now = Instant::now();
        self.0.borrow_mut().entry(from).or_default().record(now, now.since(sent));
    }
    pub(crate) fn sustained(&self, of: ReplicaId) -> Option<Duration> {
        self.0.borrow().get(&of)?.sustained(Instant::now())
    }
}

/// When a group last did something about the disk below it.
#[derive(Default)]
pub(crate) struct Damping {
    asked: Cell<Option<Instant>>,
    given: Cell<Option<Instant>>,
}

/// Whether `last` is so long ago that it may be done again; then it is noted as done.
fn may_again(last: &Cell<Option<Instant>>, after: Duration) -> bool {
    let now = Instant::now();
    let may = last.get().is_none_or(|last| now.since(last) >= after);
    if may {
        last.set(Some(now));
    }
    may
}

/// Looks after the leaderships of a store until it is dropped or has failed: then its groups stop by themselves.
pub(crate) async fn watch(host: Weak<Host>) {
    loop {
        holdfast_env::sleep(LOOK_EVERY).await;
        let Some((journal, groups)) = host.upgrade().map(|host| (host.journal().clone(), host.all_groups()))
        else {
            return;
        };
        if journal.failed().is_some() {
            return;
        }
        look(&journal, &groups).await;
    }
}

async fn look(journal: &Journal, groups: &[Rc<Group>]) {
    let leading = groups.iter().filter(|group| group.is_leader());
    if journal.is_hung() && !is_planted("lead-on-a-hung-disk") {
        let giving = leading.map(|group| group.fall_silent_if_others_can_write(journal));
        return futures_util::stream::iter(giving).buffer_unordered(AT_ONCE).collect().await;
    }
    groups.iter().for_each(|group| group.mute().set(false));
    if let Some(own) = journal.sustained_flush().filter(|own| *own >= SLOW_FLOOR) {
        let giving = leading.map(|group| group.hand_to_faster(own));
        futures_util::stream::iter(giving).buffer_unordered(AT_ONCE).collect().await
    }
}

impl Group {
    /// The other voters that proved that they can write, if a majority of every configuration did, without this one.
    async fn who_can_write(&self, membership: &Membership) -> Option<BTreeSet<u64>> {
        if is_planted("give-to-who-cannot-write") {
            return Some(membership.voter_ids().filter(|voter| *voter != self.id().replica.0).collect());
        }
        let ask = |client: crate::network::Client| async move { client.can_write(PROOF_PATIENCE).await };
        confirm::majority(self.networks(), membership, BTreeSet::new(), ask).await
    }

    /// Those of `voters` that are there to lead, best first: what they have of the log decides.
    pub(crate) fn by_progress(&self, voters: &BTreeSet<u64>) -> Vec<ReplicaId> {
        let matched = self.matched();
        // A witness would only hand the leadership on.
        let mut voters: Vec<u64> =
            voters.iter().copied().filter(|voter| !self.is_witness(ReplicaId(*voter))).collect();
        voters.sort_by_key(|voter| std::cmp::Reverse(matched.get(voter).copied().flatten()));
        voters.into_iter().map(ReplicaId).collect()
    }

    async fn fall_silent_if_others_can_write(&self, journal: &Journal) {
        let Some(membership) = self.membership_as_leader() else { return };
        if !may_again(&self.damping().asked, ASK_AGAIN_AFTER) {
            return;
        }
        let Some(able) = self.who_can_write(&membership).await else {
            tracing::warn!(group = %self.id().group, "the disk below the leader hangs, and no other majority can write");
            return;
        };
        if let Some(best) = self.by_progress(&able).first()
            && journal.is_hung()
            && let Err(error) = self.offer_leadership(*best).await
        {
            tracing::info!(group = %self.id().group, %error, "the others elect a leader when they miss this one");
        }
        if journal.is_hung() {
            tracing::warn!(group = %self.id().group, "the disk below the leader hangs: it falls silent");
            self.counters().count(|usage| usage.leaderships_given += 1);
            self.mute().set(true);
        }
    }

    /// The other voters that acknowledge several times faster than the disk below this one flushes, if a majority of
    /// every configuration does.
    fn who_is_faster(&self, membership: &Membership, own: Duration) -> Option<BTreeSet<u64>> {
        let others = membership.voter_ids().filter(|voter| ReplicaId(*voter) != self.id().replica);
        let is_faster = |voter: &u64| {
            self.acks().sustained(ReplicaId(*voter)).is_some_and(|ack| own >= ack * SLOW_FACTOR)
        };
        let faster: BTreeSet<u64> = others.filter(is_faster).collect();
        confirm::is_quorum(membership, &faster).then_some(faster)
    }

    async fn hand_to_faster(&self, own: Duration) {
        let Some(membership) = self.membership_as_leader() else { return };
        let Some(faster) = self.who_is_faster(&membership, own) else { return };
        if !may_again(&self.damping().given, GIVE_AGAIN_AFTER) {
            return;
        }
        tracing::warn!(group = %self.id().group, flush = ?own, "the disk below the leader is slow: it hands over");
        for target in self.by_progress(&faster).into_iter().take(2) {
            match self.transfer_to(target).await {
                Ok(()) => return self.counters().count(|usage| usage.leaderships_given += 1),
                Err(error) => tracing::warn!(group = %self.id().group, %target, %error, "not handed over"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mute_wakes_who_waits_for_it() {
        holdfast_env::real::run(async {
            let mute = Mute::default();
            {
                let mut begun = std::pin::pin!(mute.begun());
                assert!(futures_util::poll!(&mut begun).is_pending());
                mute.set(false);
                assert!(futures_util::poll!(&mut begun).is_pending());
                mute.set(true);
                begun.await;
            }
            mute.begun().await;
            let mut changed = std::pin::pin!(mute.changed());
            assert!(futures_util::poll!(&mut changed).is_pending());
            mute.set(true);
            assert!(futures_util::poll!(&mut changed).is_pending(), "nothing has changed");
            mute.set(false);
            changed.await;
        });
    }

    #[test]
    fn what_was_done_lately_is_not_done_again() {
        holdfast_env::real::run(async {
            let last = Cell::new(None);
            assert!(may_again(&last, Duration::from_secs(60)));
            assert!(!may_again(&last, Duration::from_secs(60)));
            assert!(may_again(&last, Duration::ZERO));
        });
    }
}
