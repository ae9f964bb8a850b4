//! What follows from what the peers say of entries that cannot be read here. Pure.
//!
//! An entry may be dropped only if it cannot have been committed and never will be on the strength of this replica's
//! old acknowledgement (INV-TERM, FAULTS: nack quorum). That is so if, in the newest committed configuration that this
//! replica knows of and in each after it, a majority of the voters
//!
//! - has a log that is not in doubt and shows something else at that index, or ends before it, so that a quorum of
//!   acknowledgements was never complete: a voter that had held a committed entry would hold it still; and
//! - has a durable vote for a *higher term than any that this replica has voted in*, so that no leader that this
//!   replica ever acknowledged anything to can complete a quorum with them any more. A later leader counts what is
//!   acknowledged to itself, and this replica does not run.
//!
//! The id is not used again: this replica keeps its vote, and wins no election but in a higher term. If anything of
//! this is in doubt nothing is dropped; the replica is replaced, where the others can do without it, or waits.

use std::collections::{BTreeMap, BTreeSet};

use holdfast_store::journal::EntrySum;
use holdfast_types::{LogIndex, ReplicaId, StoreId, Term};

use super::messages::Has;

/// Rounds in which the peers that answer could not help, after which the replica is given up to be replaced. Peers that
/// start at the same time have that long to come.
pub(crate) const PATIENCE_ROUNDS: u32 = 6;

/// Who belongs to a group, as far as a log and its checkpoint know.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Members {
    /// Everybody, with where they stand.
    pub(crate) peers: BTreeMap<ReplicaId, StoreId>,
    /// The voters of each configuration that may still decide.
    pub(crate) voters: Vec<BTreeSet<ReplicaId>>,
}

/// What a peer said of the entries that are still damaged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Heard {
    /// The term of its durable vote.
    pub(crate) term: Term,
    /// Of each entry.
    pub(crate) of: BTreeMap<LogIndex, Has>,
}

/// The damaged replica itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Damaged {
    pub(crate) id: ReplicaId,
    /// The term of its vote.
    pub(crate) term: Term,
    /// What it knows to be committed.
    pub(crate) committed: LogIndex,
    /// What cannot be read, in order; not empty.
    pub(crate) entries: Vec<EntrySum>,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Ask again.
    Wait(String),
    /// Everything from here on was never committed and never will be by what this replica acknowledged.
    Drop(LogIndex),
    /// The log cannot be repaired: the replica is to be replaced, once the others can do without it.
    GiveUp(String),
}

fn list(ids: impl Iterator<Item = ReplicaId>) -> String {
    ids.map(|id| id.to_string()).collect::<Vec<_>>().join(", ")
}

/// The voters that can be counted on for never completing a quorum with the first damaged entry.
fn nacks(damaged: &Damaged, heard: &BTreeMap<ReplicaId, Heard>, first: LogIndex) -> BTreeSet<ReplicaId> {
    let counts = |(id, heard): &(&ReplicaId, &Heard)| {
        **id != damaged.id && heard.term > damaged.term && heard.of.get(&first) == Some(&Has::Never)
    };
    heard.iter().filter(counts).map(|(id, _)| *id).collect()
}

fn is_majority_everywhere(voters: &[BTreeSet<ReplicaId>], of: &BTreeSet<ReplicaId>) -> bool {
    !voters.is_empty() && voters.iter().all(|config| config.intersection(of).count() > config.len() / 2)
}

/// Decides after `rounds` rounds in which nothing was repaired.
pub(crate) fn verdict(
    damaged: &Damaged,
    members: &Members,
    heard: &BTreeMap<ReplicaId, Heard>,
    rounds: u32,
) -> Verdict {
    let Some(first) = damaged.entries.first().map(|sum| sum.id.index) else {
        return Verdict::Wait("nothing is damaged".into());
    };
    if first > damaged.committed && is_majority_everywhere(&members.voters, &nacks(damaged, heard, first)) {
        return Verdict::Drop(first);
    }
    let says = |what: Has| {
        let said = heard.iter().filter(move |(_, heard)| heard.of.values().any(|has| *has == what));
        said.map(|(id, _)| *id).collect::<BTreeSet<_>>()
    };
    let (purged, never, unreadable) = (says(Has::Purged), says(Has::Never), says(Has::Unreadable));
    let count = damaged.entries.len();
    let what = format!("damaged: {count} log entries cannot be read, the first at index {first}");
    let still_coming = rounds < PATIENCE_ROUNDS || !says(Has::MoreThanFits).is_empty();
    if !purged.is_empty() && !still_coming {
        let by = list(purged.into_iter());
        return Verdict::GiveUp(format!(
            "{what}, and replicas {by} have purged them, so that they can be had only by a rebuild. \
             The replica is to be replaced; the others hold the data"
        ));
    }
    if is_majority_everywhere(&members.voters, &never) && !still_coming {
        let by = list(never.into_iter());
        return Verdict::GiveUp(format!(
            "{what}; replicas {by} never had them, and whether they may be dropped is in doubt. \
             The replica is to be replaced; the others hold the data"
        ));
    }
    let others = members.peers.keys().filter(|id| **id != damaged.id);
    let silent: Vec<ReplicaId> = others.clone().copied().filter(|id| !heard.contains_key(id)).collect();
    let mut why = format!("{what}; repairing them from replicas {}", list(others.copied()));
    if !silent.is_empty() {
        why += &format!("; {} do not answer", list(silent.iter().copied()));
    }
    if !unreadable.is_empty() {
        let by = list(unreadable.into_iter());
        why += &format!("; {by} cannot read them either");
    }
    if silent.is_empty() && !still_coming {
        why += "; no readable copy is known, and nothing is made up: the volume waits for a replica that has one";
    }
    Verdict::Wait(why)
}

#[cfg(test)]
mod tests {
    use holdfast_store::EntryId;

    use super::*;

    fn damaged(indices: &[u64]) -> Damaged {
        let sum = |index: &u64| EntrySum {
            id: EntryId { term: Term(2), leader: ReplicaId(1), index: LogIndex(*index) },
            payload_bytes: 4096,
            payload_crc: 1,
        };
        let entries = indices.iter().map(sum).collect();
        Damaged { id: ReplicaId(1), term: Term(3), committed: LogIndex(5), entries }
    }

    fn members(configs: &[&[u64]]) -> Members {
        let voters: Vec<BTreeSet<_>> =
            configs.iter().map(|ids| ids.iter().map(|id| ReplicaId(*id)).collect()).collect();
        let peers = voters.iter().flatten().map(|id| (*id, StoreId(id.0.into()))).collect();
        Members { peers, voters }
    }

    fn heard(said: &[(u64, u64, Has)], index: u64) -> BTreeMap<ReplicaId, Heard> {
        let one = |(id, term, has): &(u64, u64, Has)| {
            (ReplicaId(*id), Heard { term: Term(*term), of: [(LogIndex(index), *has)].into() })
        };
        said.iter().map(one).collect()
    }

    fn decide(said: &[(u64, u64, Has)], configs: &[&[u64]], rounds: u32) -> Verdict {
        verdict(&damaged(&[7]), &members(configs), &heard(said, 7), rounds)
    }

    const THREE: &[&[u64]] = &[&[1, 2, 3]];
    const LATE: u32 = PATIENCE_ROUNDS;

    #[test]
    fn only_a_majority_that_votes_in_a_higher_term_lets_an_entry_be_dropped() {
        let both = [(2, 4, Has::Never), (3, 4, Has::Never)];
        assert_eq!(decide(&both, THREE, 1), Verdict::Drop(LogIndex(7)));
        let kept: [&[(u64, u64, Has)]; 6] = [
            // One voter of three is no majority, whatever it says.
            &[(2, 4, Has::Never)],
            // Somebody who may only have lost it, or cannot read it, says nothing.
            &[(2, 4, Has::Never), (3, 4, Has::Unsure)],
            &[(2, 4, Has::Never), (3, 4, Has::Unreadable)],
            &[(2, 4, Has::Never), (3, 4, Has::Purged)],
            // The leader of term 3, to whom this replica may have acknowledged the entry, may still win it over.
            &[(2, 4, Has::Never), (3, 3, Has::Never)],
            // Who is no voter does not count.
            &[(2, 4, Has::Never), (8, 4, Has::Never)],
        ];
        for said in kept {
            for rounds in [0, LATE] {
                assert!(!matches!(decide(said, THREE, rounds), Verdict::Drop(_)), "{said:?}");
            }
        }
    }

    #[test]
    fn a_majority_of_each_configuration_is_needed() {
        let said = [(2, 4, Has::Never), (3, 4, Has::Never)];
        let joint: &[&[u64]] = &[&[1, 2, 3], &[1, 4, 5]];
        assert!(matches!(decide(&said, joint, LATE), Verdict::Wait(_)));
        let both = [said[0], said[1], (4, 4, Has::Never), (5, 4, Has::Never)];
        assert_eq!(decide(&both, joint, LATE), Verdict::Drop(LogIndex(7)));
        assert!(matches!(decide(&both, &[], LATE), Verdict::Wait(_)), "who votes is not known");
    }

    #[test]
    fn what_is_known_to_be_committed_is_never_dropped() {
        let said = heard(&[(2, 9, Has::Never), (3, 9, Has::Never)], 5);
        let verdict = verdict(&damaged(&[5, 7]), &members(THREE), &said, LATE);
        assert!(!matches!(verdict, Verdict::Drop(_)), "{verdict:?}");
    }

    #[test]
    fn what_is_purged_elsewhere_is_rebuilt_and_what_nobody_can_read_is_waited_for() {
        let purged = [(2, 4, Has::Purged), (3, 4, Has::Never)];
        assert!(matches!(decide(&purged, THREE, 1), Verdict::Wait(_)), "others may come");
        let Verdict::GiveUp(why) = decide(&purged, THREE, LATE) else { panic!("it is given up") };
        assert!(why.contains("replicas 2 have purged"), "{why}");
        let rotten = [(2, 4, Has::Unreadable), (3, 4, Has::Never)];
        let Verdict::Wait(why) = decide(&rotten, THREE, 100) else { panic!("it waits") };
        assert!(why.contains("2 cannot read them either") && why.contains("nothing is made up"), "{why}");
        let Verdict::Wait(why) = decide(&[(3, 4, Has::Never)], THREE, 100) else { panic!("it waits") };
        assert!(why.contains("2 do not answer") && !why.contains("made up"), "{why}");
    }
}
