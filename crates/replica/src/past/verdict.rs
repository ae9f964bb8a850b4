//! What follows from what the others know of a replica's past. Pure.

use std::collections::BTreeSet;

use holdfast_store::past_file::Acknowledged;
use holdfast_types::{LogIndex, ReplicaId, Term};

/// What a replica has, durably.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Own {
    /// Whom it voted for last.
    pub(crate) vote: (Term, ReplicaId),
    /// The last entry of its log or checkpoint.
    pub(crate) last: LogIndex,
    /// It has just dropped entries that cannot have been committed (`repair/verdict.rs`).
    pub(crate) has_dropped: bool,
}

/// What a replica has forgotten, if it once was where `known` says. What a voter acknowledged it loses only by a cut,
/// for a leader of a later vote, and never what was committed.
pub(crate) fn forgotten(own: &Own, known: &Acknowledged) -> Option<String> {
    let then = (known.term, known.leader);
    if own.vote < then {
        return Some(format!(
            "it had voted for replica {} in term {} or later, and remembers a vote of term {}",
            then.1, then.0, own.vote.0
        ));
    }
    let kept = if own.vote == then && !own.has_dropped {
        known.matched.max(known.committed)
    } else {
        known.committed
    };
    (own.last < kept)
        .then(|| format!("it had acknowledged entries up to {kept}, and has none after {}", own.last))
}

/// Whether enough was asked. Everybody's answer is enough; after some patience, those of a majority of each
/// configuration, the replica included, or of a leader, which has a majority and heard of it what it acknowledged.
pub(crate) fn is_enough(
    own: ReplicaId,
    voters: &[BTreeSet<ReplicaId>],
    asked: &BTreeSet<ReplicaId>,
    answered: &BTreeSet<ReplicaId>,
    leader_answered: bool,
    was_patient: bool,
) -> bool {
    if asked.is_subset(answered) {
        return true;
    }
    let count = |config: &BTreeSet<ReplicaId>| {
        config.iter().filter(|id| **id == own || answered.contains(*id)).count() > config.len() / 2
    };
    was_patient && (leader_answered || (!voters.is_empty() && voters.iter().all(count)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own(term: u64, leader: u64, last: u64) -> Own {
        Own { vote: (Term(term), ReplicaId(leader)), last: LogIndex(last), has_dropped: false }
    }

    fn known(term: u64, leader: u64, matched: u64, committed: u64) -> Acknowledged {
        let (matched, committed) = (LogIndex(matched), LogIndex(committed));
        Acknowledged { term: Term(term), leader: ReplicaId(leader), matched, committed }
    }

    #[test]
    fn a_vote_that_goes_back_is_forgotten() {
        let said = known(5, 2, 0, 0);
        assert!(forgotten(&own(4, 3, 100), &said).is_some());
        assert!(
            forgotten(&own(5, 1, 100), &said).is_some(),
            "votes of one term are in order of their leaders"
        );
        assert_eq!(forgotten(&own(5, 2, 0), &said), None);
        assert_eq!(forgotten(&own(6, 1, 0), &said), None);
    }

    #[test]
    fn entries_that_go_back_are_forgotten_unless_a_later_leader_may_have_cut_them() {
        let said = known(5, 2, 100, 90);
        assert_eq!(forgotten(&own(5, 2, 100), &said), None);
        assert!(forgotten(&own(5, 2, 99), &said).is_some());
        assert_eq!(forgotten(&own(5, 3, 90), &said), None, "cut by the leader of a later vote");
        assert!(forgotten(&own(9, 1, 89), &said).is_some(), "what is committed is cut by nobody");
    }

    #[test]
    fn what_was_dropped_by_a_verdict_is_not_forgotten_but_what_is_committed_is() {
        let dropped = Own { has_dropped: true, ..own(5, 2, 95) };
        assert_eq!(forgotten(&dropped, &known(5, 2, 100, 90)), None);
        assert!(forgotten(&dropped, &known(5, 2, 100, 96)).is_some());
    }

    fn ids(ids: &[u64]) -> BTreeSet<ReplicaId> {
        ids.iter().map(|id| ReplicaId(*id)).collect()
    }

    fn enough(voters: &[&[u64]], answered: &[u64], leads: bool, was_patient: bool) -> bool {
        let voters: Vec<_> = voters.iter().map(|config| ids(config)).collect();
        let mut asked: BTreeSet<_> = voters.iter().flatten().copied().collect();
        asked.remove(&ReplicaId(1));
        is_enough(ReplicaId(1), &voters, &asked, &ids(answered), leads, was_patient)
    }

    #[test]
    fn everybody_is_asked_and_a_majority_is_enough_after_some_patience() {
        assert!(enough(&[&[1, 2, 3]], &[2, 3], false, false));
        assert!(!enough(&[&[1, 2, 3]], &[2], false, false));
        assert!(enough(&[&[1, 2, 3]], &[2], false, true));
        assert!(!enough(&[&[1, 2, 3]], &[], false, true));
        assert!(enough(&[&[1]], &[], false, false), "nobody is there to be asked");
        assert!(!enough(&[&[2, 3, 4]], &[2], false, true), "who does not vote does not count");
        assert!(!enough(&[&[1, 2, 3, 4, 5]], &[2], false, true));
        assert!(enough(&[&[1, 2, 3, 4, 5]], &[2], true, true), "a leader has a majority");
        assert!(!enough(&[&[1, 2, 3], &[3, 4, 5]], &[2, 3], false, true), "of each configuration");
    }
}
