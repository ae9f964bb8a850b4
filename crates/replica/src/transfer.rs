//! Giving the leadership of a group to another voter.
//!
//! openraft's transfer is for good within a term: a leader that has triggered it refuses proposals and sends no
//! heartbeat from then on, whether the target takes the leadership or not. If it does not, the others elect somebody.

use std::cell::Cell;
use std::collections::BTreeMap;

use holdfast_types::ReplicaId;
use openraft::ServerState;
use openraft::async_runtime::watch::WatchReceiver;

use crate::config::{LogId, Membership};
use crate::group::{Group, GroupError, stopped};

/// No proposals and no leases meanwhile; ends with whoever transfers, also if it is given up.
struct Transferring<'g>(&'g Cell<bool>);

impl<'g> Transferring<'g> {
    fn begin(flag: &'g Cell<bool>) -> Result<Self, GroupError> {
        if flag.replace(true) {
            return Err(GroupError::Refused("a transfer of leadership is already under way".into()));
        }
        Ok(Self(flag))
    }
}

impl Drop for Transferring<'_> {
    fn drop(&mut self) {
        self.0.set(false);
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

    /// Gives leadership to `target`: proposals stop, the target catches up, the transfer is triggered; on failure
    /// proposals go on here if they can.
    pub async fn transfer_to(&self, target: ReplicaId) -> Result<(), GroupError> {
        if !self.is_leader() {
            return Err(GroupError::NotLeader { leader: self.leader().map(|(_, store)| store) });
        }
        if target == self.id().replica {
            return Ok(());
        }
        self.check_voter(target)?;
        let _transferring = Transferring::begin(self.transferring())?;
        self.drained(target).await?;
        self.raft().trigger().transfer_leader(target.0).await.map_err(stopped)?;
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
            .map_err(|_| GroupError::Refused(format!("replica {target} did not take the leadership")))
    }

    /// As [`Self::transfer_to`], but whether the target takes it is not waited for: with a disk that hangs it would not
    /// be seen here. Not tried if Raft's core waits for that disk: it would hear of it only afterwards.
    pub(crate) async fn offer_leadership(&self, target: ReplicaId) -> Result<(), GroupError> {
        self.check_voter(target)?;
        let _transferring = Transferring::begin(self.transferring())?;
        self.drained(target).await?;
        if self.core_waits() {
            return Err(GroupError::Refused("Raft waits for the disk".into()));
        }
        let trigger = self.raft().trigger();
        let triggered = holdfast_env::timeout(self.timers().election_max, trigger.transfer_leader(target.0));
        triggered.await.map_err(|_| GroupError::TimedOut)?.map_err(stopped)
    }

    /// Raft itself would let a learner campaign, and one that does not answer leaves the group without a leader.
    fn check_voter(&self, target: ReplicaId) -> Result<(), GroupError> {
        let metrics = self.raft().server_metrics();
        let now = metrics.borrow_watched();
        if now.membership_config.membership().voter_ids().any(|voter| voter == target.0) {
            return Ok(());
        }
        Err(GroupError::Refused(format!("replica {target} is no voter of the group")))
    }

    /// Waits until the target has everything: one that has not ignores the transfer.
    async fn drained(&self, target: ReplicaId) -> Result<(), GroupError> {
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
        let flag = Cell::new(false);
        let first = Transferring::begin(&flag).expect("none is under way");
        assert!(flag.get());
        assert!(Transferring::begin(&flag).is_err());
        assert!(flag.get(), "the refused one ends nothing");
        drop(first);
        assert!(!flag.get());
    }
}
