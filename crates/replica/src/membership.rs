//! Who belongs to a group, and how that changes.

use std::collections::{BTreeMap, BTreeSet};

use holdfast_types::{ReplicaId, StoreId};
use openraft::ChangeMembers;
use openraft::async_runtime::watch::WatchReceiver;
use openraft::errors::{ClientWriteError, RaftError};

use crate::config::{Membership, Peer, Types};
use crate::group::{Group, GroupError, PROPOSE_DEADLINE, stopped};

type MembershipChanged =
    Result<openraft::raft::ClientWriteResponse<Types>, RaftError<Types, ClientWriteError<Types>>>;

impl Group {
    fn with_membership<T>(&self, look: impl FnOnce(&Membership) -> T) -> T {
        let metrics = self.raft().server_metrics();
        let now = metrics.borrow_watched();
        look(now.membership_config.membership())
    }

    /// Voters and learners with their stores, leader's view or own.
    pub fn members(&self) -> Vec<(ReplicaId, StoreId)> {
        self.with_membership(|membership| {
            membership.nodes().map(|(id, peer)| (ReplicaId(*id), peer.store)).collect()
        })
    }

    /// Voters of every configuration.
    pub fn voters(&self) -> Vec<ReplicaId> {
        self.with_membership(|membership| membership.voter_ids().map(ReplicaId).collect())
    }

    /// The voters of each configuration that decides: two during a change.
    pub fn configurations(&self) -> Vec<BTreeSet<ReplicaId>> {
        self.with_membership(|membership| {
            let configurations = membership.get_joint_config().iter();
            configurations.map(|voters| voters.iter().map(|id| ReplicaId(*id)).collect()).collect()
        })
    }

    /// Whether nobody else votes.
    pub(crate) fn is_only_voter(&self) -> bool {
        self.voters() == [self.id().replica]
    }

    /// The leader that this replica follows, and its store.
    pub fn leader(&self) -> Option<(ReplicaId, StoreId)> {
        let metrics = self.raft().server_metrics();
        let now = metrics.borrow_watched();
        let leader = now.current_leader?;
        let peer = now.membership_config.membership().get_node(&leader)?;
        Some((ReplicaId(leader), peer.store))
    }

    /// Voters and learners that hold data, with their stores: whoever is asked for blocks, or to lead.
    pub fn data_members(&self) -> Vec<(ReplicaId, StoreId)> {
        self.with_membership(|membership| {
            let data = membership.nodes().filter(|(_, peer)| !peer.witness);
            data.map(|(id, peer)| (ReplicaId(*id), peer.store)).collect()
        })
    }

    /// Voters that hold data, of every configuration.
    pub(crate) fn data_voters(&self) -> Vec<ReplicaId> {
        self.with_membership(|membership| {
            let is_data = |id: &u64| membership.get_node(id).is_some_and(|peer| !peer.witness);
            membership.voter_ids().filter(is_data).map(ReplicaId).collect()
        })
    }

    /// Whether a member of the group is a witness.
    pub(crate) fn is_witness(&self, id: ReplicaId) -> bool {
        self.with_membership(|membership| membership.get_node(&id.0).is_some_and(|peer| peer.witness))
    }

    /// Begins a new group with these voters. Called once, on one replica of it; a repeat is refused by Raft and that
    /// is fine.
    pub async fn bootstrap(&self, voters: &BTreeMap<ReplicaId, StoreId>) -> Result<(), GroupError> {
        self.bootstrap_with(voters.iter().map(|(id, store)| (id.0, Peer::data(*store))).collect()).await
    }

    /// As [`Self::bootstrap`], with what each voter is.
    pub async fn bootstrap_with(&self, members: BTreeMap<u64, Peer>) -> Result<(), GroupError> {
        match self.raft().initialize(members).await {
            Ok(()) => Ok(()),
            Err(RaftError::APIError(openraft::errors::InitializeError::NotAllowed(_))) => Ok(()),
            Err(RaftError::APIError(error)) => Err(GroupError::Refused(error.to_string())),
            Err(RaftError::Fatal(error)) => Err(stopped(error)),
        }
    }

    /// Waits until a change of the membership is committed.
    async fn changed<C: Future<Output = MembershipChanged>>(&self, change: C) -> Result<(), GroupError> {
        match holdfast_env::timeout(PROPOSE_DEADLINE, change).await {
            Err(_) => Err(GroupError::TimedOut),
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(self.write_error(error)),
        }
    }

    /// Adds a learner; returns when the change is committed, not when it has caught up.
    pub async fn add_learner(&self, id: ReplicaId, peer: impl Into<Peer>) -> Result<(), GroupError> {
        self.awake().await?;
        self.changed(self.raft().add_learner(id.0, peer.into(), false)).await
    }

    /// Changes the voters by joint consensus; those left out are removed. INV-MEMBER: one change at a time, by
    /// openraft's rule that a change waits for the one before it.
    pub async fn change_voters(&self, voters: &[ReplicaId]) -> Result<(), GroupError> {
        self.awake().await?;
        let voters = ChangeMembers::ReplaceAllVoters(voters.iter().map(|id| id.0).collect());
        self.changed(self.raft().change_membership(voters, false)).await
    }

    /// Forgets a learner; none of that id is fine. Refused if it votes.
    pub async fn remove_learner(&self, id: ReplicaId) -> Result<(), GroupError> {
        self.awake().await?;
        let gone = ChangeMembers::RemoveNodes(std::iter::once(id.0).collect());
        self.changed(self.raft().change_membership(gone, false)).await
    }

    /// As leader: ends a change of the voters that a leader before it has left half done, if there is one. Both
    /// configurations count until then.
    pub async fn finish_change(&self) -> Result<(), GroupError> {
        let Some(membership) = self.membership_as_leader() else { return Ok(()) };
        match &membership.get_joint_config()[..] {
            [_, .., last] => {
                let voters: Vec<ReplicaId> = last.iter().map(|id| ReplicaId(*id)).collect();
                self.change_voters(&voters).await
            }
            _ => Ok(()),
        }
    }

    /// A round trip to the farthest voter, for a while, in microseconds; 0 if none has answered for a while.
    pub(crate) fn farthest_voter_us(&self) -> u64 {
        let voters = self.voters().into_iter();
        let trips = voters.filter_map(|voter| self.networks().round_trips.sustained(voter));
        trips.max().map_or(0, |trip| u64::try_from(trip.as_micros()).unwrap_or(u64::MAX))
    }
}
