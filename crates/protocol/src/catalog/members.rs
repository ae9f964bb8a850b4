//! INV-MEMBER: who votes after the next change of a volume's voters. Pure, so that it can be attacked with every order
//! of moves, joins and departures.

use holdfast_types::{ReplicaId, StoreId};

use super::{ReplicaPhase, ReplicaRecord, VolumeRecord};

/// The voters after the next change: those that are to vote, `joining` if one joins, and as many of those that leave as
/// are needed to have `wanted` voters. Two replicas that are moved at once do not leave before both have their
/// successors. `voting` are the voters of the group now, of every configuration.
///
/// One that leaves and whose successor stands on its own store stays only as long as the group says so: it has to give
/// way before its successor can be made, and is not counted on. Those that share no node with one that votes stay before
/// others do (INV-PLACE), and of these those whose store answers.
pub fn target_voters(
    record: &VolumeRecord,
    voting: &[ReplicaId],
    joining: Option<ReplicaId>,
    wanted: usize,
    answers: impl Fn(&ReplicaRecord) -> bool,
) -> Vec<ReplicaId> {
    let phase = |phase| record.replicas.iter().filter(move |replica| replica.phase == phase);
    // One that is to vote and is no member of the group any more has to join again first: as long as it does not, the
    // others do not wait for it.
    let voters = phase(ReplicaPhase::Voter).map(|replica| replica.id);
    let mut target: Vec<ReplicaId> = voters.filter(|id| voting.contains(id)).collect();
    target.extend(joining);
    let stays = |replica: &&ReplicaRecord| voting.contains(&replica.id) && !gives_way(record, replica);
    let missing = wanted.saturating_sub(target.len());
    let mut leaving: Vec<&ReplicaRecord> = phase(ReplicaPhase::Leaving).filter(stays).collect();
    let meets = |replica: &ReplicaRecord| on_a_node_with(record, &target, replica);
    leaving.sort_by_key(|replica| (meets(replica), !answers(replica)));
    target.extend(leaving.into_iter().take(missing).map(|replica| replica.id));
    target
}

fn on_a_node_with(record: &VolumeRecord, voters: &[ReplicaId], replica: &ReplicaRecord) -> bool {
    let votes = |other: &&ReplicaRecord| voters.contains(&other.id) && other.id != replica.id;
    record.replicas.iter().filter(votes).any(|other| other.location.node == replica.location.node)
}

/// INV-PLACE: whether two of these voters would stand on one node, on two of its stores. Such a change waits for another.
pub fn share_a_node(record: &VolumeRecord, voters: &[ReplicaId]) -> bool {
    let among = record.replicas.iter().filter(|replica| voters.contains(&replica.id));
    among.into_iter().any(|replica| on_a_node_with(record, voters, replica))
}

/// Whether another replica joins on the store of this one, which leaves: this one has to go first.
pub fn gives_way(record: &VolumeRecord, leaving: &ReplicaRecord) -> bool {
    joins_on(record, leaving.store) && leaving.phase == ReplicaPhase::Leaving
}

fn joins_on(record: &VolumeRecord, store: StoreId) -> bool {
    record.replicas.iter().any(|replica| replica.phase == ReplicaPhase::Joining && replica.store == store)
}
