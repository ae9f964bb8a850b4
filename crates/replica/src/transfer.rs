//! Giving the leadership of a group to another voter.
//!
//! openraft's transfer is for good within a term: a leader that has triggered it refuses proposals and sends no
//! heartbeat from then on, whether the target takes the leadership or not. If it does not, the others elect somebody.

use std::cell::Cell;
use std::collections::BTreeMap;

use holdfast_protocol::planted::is_planted;
use holdfast_types::ReplicaId;
use openraft::ServerState;
use openraft::async_runtime::watch::WatchReceiver;
use tokio::sync::Notify;

use crate::config::{LogId, Membership};
use crate::group::{Group, GroupError, stopped};

/// Entries that a member which keeps up may lack.
const ON_THE_WAY: u64 = 16;

/// No leases meanwhile, and proposals wait; ends with whoever transfers, also if it is given up.
#[derive(Default)]
pub(crate) struct Transfer {
    under_way: Cell<bool>,
    ended: Notify,
}

impl Transfer {
    pub(crate) fn is_under_way(&self) -> bool {
        self.under_way.get()
    }

    /// Ends when none is under way.
    pub(crate) async fn over(&self) {
        loop {
            let ended = self.ended.notified();
            if !self.is_under_way() {
                return;
            }
            ended.await;
        }
    }

    fn begin(&self) -> Result<Transferring<'_>, GroupError> {
        if self.under_way.replace(true) {
            return Err(GroupError::Refused("a transfer of leadership is already under way".into()));
        }
        Ok(Transferring(self))
    }
}

struct Transferring<'g>(&'g Transfer);

impl Drop for Transferring<'_> {
    fn drop(&mut self) {
        self.0.under_way.set(false);
        self.0.ended.notify_waiters();
    }
}

impl Group {
    /// The membership, if this replica leads.
    pub(crate) fn membership_as_leader(&self) -> Option<Membership> {
        let metrics = self.raft().server_metrics();
        let now = metrics.borrow_watched();
        (now.state == ServerState::Leader).then(|| now.membership_config.membership().clone())
    }

    /// What of its log each follower has, as its leader knows.
    pub(crate) fn matched(&self) -> BTreeMap<u64, Option<LogId>> {
        let metrics = self.raft().metrics();
        metrics.borrow_watched().replication.clone().unwrap_or_default()
    }

    /// Whether a member lacks more of the log than what is on its way to one that keeps up.
    pub(crate) fn is_somebody_behind(&self) -> bool {
        let last = self.log().last().map_or(0, |id| id.index.0);
        self.matched().values().any(|id| id.map_or(0, |id| id.index) + ON_THE_WAY < last)
    }

    /// Whether a witness campaigns when it misses its leader.
    pub(crate) fn let_campaign(&self, may: bool) {
        self.raft().runtime_config().elect(may);
    }

    /// Gives leadership to `target`: proposals wait, the target catches up, the transfer is triggered. Whoever waited is
    /// told of the new leader as soon as it is known here; on failure proposals go on here if they can.
    pub async fn transfer_to(&self, target: ReplicaId) -> Result<(), GroupError> {
        if !self.is_leader() {
            return Err(GroupError::NotLeader { leader: self.leader().map(|(_, store)| store) });
        }
        if target == self.id().replica {
            return Ok(());
        }
        self.check_voter(target)?;
        self.wake();
        let _transferring = self.transfer().begin()?;
        self.drained(target).await?;
        self.trigger_transfer(target).await?;
        let left = async {
            loop {
                let changed = self.leadership_changed();
                if self.leading_since().is_none() {
                    return;
                }
                changed.await;
            }
        };
        holdfast_env::timeout(self.timers().election_max, left)
            .await
            .map_err(|_| GroupError::Refused(format!("replica {target} did not take the leadership")))?;
        // Who waits with a proposal would otherwise have to look for the new leader. It has been elected, or will be.
        let _known = holdfast_env::timeout(self.timers().election_max, self.led_by_another()).await;
        Ok(())
    }

    /// Ends when another replica is known to lead.
    async fn led_by_another(&self) {
        let mut metrics = self.raft().server_metrics();
        loop {
            let leader = metrics.borrow_watched().current_leader;
            if leader.is_some_and(|leader| leader != self.id().replica.0) || metrics.changed().await.is_err()
            {
                return;
            }
        }
    }

    /// As [`Self::transfer_to`], but whether the target takes it is not waited for: with a disk that hangs it would not
    /// be seen here. Not tried if Raft's core waits for that disk: it would hear of it only afterwards.
    pub(crate) async fn offer_leadership(&self, target: ReplicaId) -> Result<(), GroupError> {
        self.check_voter(target)?;
        self.wake();
        let _transferring = self.transfer().begin()?;
        self.drained(target).await?;
        if self.core_waits() {
            return Err(GroupError::Refused("Raft waits for the disk".into()));
        }
        self.trigger_transfer(target).await
    }

    /// Raft takes the order at once, unless its core waits for the disk.
    async fn trigger_transfer(&self, target: ReplicaId) -> Result<(), GroupError> {
        let raft = self.raft();
        let trigger = raft.trigger();
        let triggered = holdfast_env::timeout(self.timers().election_max, trigger.transfer_leader(target.0));
        triggered.await.map_err(|_| GroupError::TimedOut)?.map_err(stopped)
    }

    /// Raft itself would let a learner campaign, and one that does not answer leaves the group without a leader.
    fn check_voter(&self, target: ReplicaId) -> Result<(), GroupError> {
        let metrics = self.raft().server_metrics();
        let now = metrics.borrow_watched();
        let membership = now.membership_config.membership();
        if membership.get_node(&target.0).is_some_and(|peer| peer.witness) {
            return Err(GroupError::Refused(format!(
                "replica {target} is a witness: it leads nothing for long"
            )));
        }
        if membership.voter_ids().any(|voter| voter == target.0) {
            return Ok(());
        }
        Err(GroupError::Refused(format!(
            "replica {target} is no voter of the group: choose one that is and holds data"
        )))
    }

    /// Waits until the target has everything: one that has not ignores the transfer.
    async fn drained(&self, target: ReplicaId) -> Result<(), GroupError> {
        if is_planted("transfer-without-drain") {
            return Ok(());
        }
        let patience = self.timers().election_max;
        let mut metrics = self.raft().metrics();
        let matched = async {
            loop {
                {
                    let now = metrics.borrow_watched();
                    let target_at =
                        now.replication.as_ref().and_then(|map| map.get(&target.0)).copied().flatten();
                    if target_at.map(|id| id.index) >= now.last_log_index && now.last_log_index.is_some() {
                        return Ok::<(), GroupError>(());
                    }
                }
                metrics.changed().await.map_err(stopped)?;
            }
        };
        let late = |_| GroupError::Refused(format!("replica {target} did not catch up in {patience:?}"));
        holdfast_env::timeout(patience, matched).await.map_err(late)?
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transfer_that_is_given_up_is_over() {
        holdfast_env::real::run(async {
            let transfer = Transfer::default();
            let first = transfer.begin().expect("none is under way");
            assert!(transfer.is_under_way());
            assert!(transfer.begin().is_err());
            assert!(transfer.is_under_way(), "the refused one ends nothing");
            let mut over = std::pin::pin!(transfer.over());
            assert!(futures_util::poll!(&mut over).is_pending());
            drop(first);
            over.await;
        });
    }
}
