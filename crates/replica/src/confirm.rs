//! Whether a majority follows a leader now (INV-LEASE).
//!
//! openraft's own clock cannot tell. It counts an answer for every request in flight that ends at the same entry, so also
//! for a heartbeat that was made long after that answer was sent: a leader that was stopped for seconds reads old answers,
//! takes its new heartbeats for answered, and would go on granting leases beside its successor. So the question is asked
//! anew, and each voter's answer counts for this question alone.

use std::collections::BTreeSet;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use holdfast_env::net::Lane;
use holdfast_types::ReplicaId;

use crate::config::{Membership, Vote};
use crate::network::{Client, Networks};

/// Whether voters enough for every configuration of the membership answer that `vote` is still theirs. The replica itself
/// counts as one of them: that it has not given its vote away is for the caller to have seen.
pub(crate) async fn majority_follows(
    networks: &Networks,
    vote: Vote,
    membership: &Membership,
    deadline: Duration,
) -> bool {
    let ask = |client: Client| async move { client.follows(vote, deadline).await };
    majority(networks, membership, BTreeSet::from([networks.local.0]), ask).await.is_some()
}

/// Asks every other voter; those who said yes, and `agreed`, as soon as they are a majority of every configuration.
pub(crate) async fn majority<A: Future<Output = bool>>(
    networks: &Networks,
    membership: &Membership,
    mut agreed: BTreeSet<u64>,
    ask: impl Fn(Client) -> A,
) -> Option<BTreeSet<u64>> {
    let others = membership.voter_ids().filter(|voter| ReplicaId(*voter) != networks.local);
    let mut answers: FuturesUnordered<_> = others
        .filter_map(|voter| {
            Some((voter, networks.client(voter, membership.get_node(&voter)?, Lane::Control)))
        })
        .map(|(voter, client)| {
            let answer = ask(client);
            async move { (voter, answer.await) }
        })
        .collect();
    while !is_quorum(membership, &agreed) {
        if let (voter, true) = answers.next().await? {
            agreed.insert(voter);
        }
    }
    Some(agreed)
}

/// Whether these voters are a majority of every configuration.
pub(crate) fn is_quorum(membership: &Membership, following: &BTreeSet<u64>) -> bool {
    let configs = membership.get_joint_config();
    configs.iter().all(|voters| voters.intersection(following).count() * 2 > voters.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Peer;

    #[test]
    fn a_quorum_is_one_of_every_configuration() {
        let nodes = (1..=5).map(|id| (id, Peer::default()));
        let nodes: std::collections::BTreeMap<u64, Peer> = nodes.collect();
        let joint = vec![BTreeSet::from([1, 2, 3]), BTreeSet::from([1, 4, 5])];
        let membership = Membership::new(joint, nodes).expect("is well formed");
        let is_quorum = |following: &[u64]| is_quorum(&membership, &following.iter().copied().collect());
        assert!(is_quorum(&[1, 2, 4]));
        assert!(!is_quorum(&[1, 2, 3]), "of the old configuration alone");
        assert!(!is_quorum(&[1, 4, 5]), "of the new configuration alone");
        assert!(!is_quorum(&[1]));
    }
}
