//! Forced recovery: who may ask for it, what it leaves behind, and two that meet.

use holdfast_types::{LogIndex, RecoveryId, ReplicaId, Term};

use super::*;
use crate::catalog::recovery::{Heard, may_recover, recover, revision_of_seals, source_of};
use crate::planted;

const ID: RecoveryId = RecoveryId(0x5);
const OTHER: RecoveryId = RecoveryId(0x6);
const GROUP: GroupId = GroupId(5000);

fn ready() -> (CatalogState, VolumeRecord) {
    let mut state = CatalogState::new(CLUSTER);
    let record = volume(state.apply(&create("a", 1)));
    let ready = CatalogCommand::VolumeReady { id: record.id, revision: record.revision };
    let record = volume(state.apply(&ready));
    (state, record)
}

fn ids(numbers: &[u64]) -> Vec<ReplicaId> {
    numbers.iter().map(|number| ReplicaId(*number)).collect()
}

/// What is heard when only these live.
fn heard(living: &[u64]) -> BTreeMap<ReplicaId, Heard> {
    let lives = |number: u64| Heard {
        lives: living.contains(&number),
        voters: ids(&[1, 2, 3]),
        settled: true,
        ..Heard::default()
    };
    (1..=3).map(|number| (ReplicaId(number), lives(number))).collect()
}

fn why(outcome: Result<(), UserError>) -> String {
    outcome.expect_err("is refused").message
}

#[test]
fn a_volume_is_recovered_only_where_nobody_else_can_go_on() {
    let (_, record) = ready();
    assert_eq!(may_recover(&record, &ids(&[1]), &heard(&[1])), Ok(()));
    assert!(why(may_recover(&record, &ids(&[1]), &heard(&[1, 3]))).contains("replica 3"));
    assert!(why(may_recover(&record, &ids(&[1]), &heard(&[]))).contains("survivor 1 does not answer"));
    assert!(why(may_recover(&record, &ids(&[1, 2]), &heard(&[1, 2]))).contains("majority"));
    // Whichever of them runs and knows the voters, also if the first that is named does not.
    for waiting in [1, 2] {
        let mut one_waits = heard(&[1, 2]);
        one_waits.insert(ReplicaId(waiting), Heard { lives: true, ..Heard::default() });
        assert!(why(may_recover(&record, &ids(&[1, 2]), &one_waits)).contains("majority"), "{waiting}");
    }
    assert!(why(may_recover(&record, &ids(&[9]), &heard(&[1]))).contains("no replica 9"));
    assert!(why(may_recover(&record, &[], &heard(&[1]))).contains("no survivor"));
    let mut led = heard(&[1, 2]);
    led.entry(ReplicaId(2)).or_default().leads = true;
    assert!(why(may_recover(&record, &ids(&[1]), &led)).contains("quorum"));
    let change = |number: u64, with: fn(&mut Heard)| {
        let mut changed = heard(&[1]);
        with(changed.entry(ReplicaId(number)).or_default());
        may_recover(&record, &ids(&[1]), &changed)
    };
    assert!(why(change(1, |heard| heard.hears_leader = true)).contains("hears a leader"));
    assert!(why(change(1, |heard| heard.unfit = "its log is damaged".into())).contains("its log is damaged"));
    assert!(why(change(1, |heard| heard.is_blank = true)).contains("never held anything"));
    // One that cannot run any more may hold something all the same.
    let unfit = change(2, |heard| (heard.lives, heard.unfit) = (true, "its vote is lost".into()));
    assert!(why(unfit).contains("replica 2"));
    // A replica that was to join and never did holds nothing.
    let mut blank = heard(&[1, 3]);
    blank.entry(ReplicaId(3)).or_default().is_blank = true;
    assert_eq!(may_recover(&record, &ids(&[1]), &blank), Ok(()));
    // While the voters change nobody can tell of a majority from here.
    let mut joint = heard(&[1, 2]);
    joint.values_mut().for_each(|heard| heard.settled = false);
    assert_eq!(may_recover(&record, &ids(&[1, 2]), &joint), Ok(()));
}

#[test]
fn a_recovery_while_somebody_answers_is_found() {
    let (_, record) = ready();
    planted::plant(&["recover-while-answered"]);
    let outcome = may_recover(&record, &ids(&[1]), &heard(&[1, 3]));
    planted::plant(&[]);
    assert_eq!(outcome, Ok(()), "the test above would fail");
}

/// Logs as elections compare them: the term of the last entry, then its index.
fn source(ends: &[(u64, u64, u64)]) -> Option<ReplicaId> {
    let ends: Vec<_> =
        ends.iter().map(|(id, term, index)| (ReplicaId(*id), Term(*term), LogIndex(*index))).collect();
    source_of(&ends)
}

#[test]
fn the_source_is_whom_a_majority_would_elect() {
    assert_eq!(source(&[]), None);
    assert_eq!(source(&[(1, 3, 90), (2, 3, 91)]), Some(ReplicaId(2)));
    assert_eq!(
        source(&[(1, 4, 50), (2, 3, 91)]),
        Some(ReplicaId(1)),
        "what is longer may be of a deposed leader"
    );
    assert_eq!(source(&[(2, 3, 91), (1, 3, 91)]), Some(ReplicaId(1)));
    planted::plant(&["recover-from-the-shorter"]);
    let found = source(&[(1, 3, 90), (2, 3, 91)]);
    planted::plant(&[]);
    assert_eq!(found, Some(ReplicaId(1)), "the planted fault would be found above");
}

#[test]
fn a_recovered_volume_is_another_group_of_one_and_keeps_what_is_left() {
    let (mut state, record) = ready();
    let begun = volume(state.apply(&recover(&record, (ID, GROUP), ids(&[1]))));
    assert_eq!((begun.phase, begun.group), (VolumePhase::Recovering, record.group));
    assert!(begun.check_ready().is_err());
    let (id, source) = (record.id, ReplicaId(1));
    let early = CatalogCommand::VolumeRecovered { id, revision: begun.revision, source };
    assert!(state.apply(&early).is_err(), "nobody was sealed yet");
    let sealing = volume(state.apply(&CatalogCommand::RecoverySealing { id, revision: begun.revision }));
    // A survivor that was told of being kept when none was sealed yet has noted the next revision.
    let seals = [false, true].map(|is_any_sealed| revision_of_seals(&sealing, is_any_sealed));
    assert!(seals[0] < sealing.revision + 1 && seals[1] > sealing.revision, "{seals:?}");
    let late = CatalogCommand::RecoveryAbandoned { id, revision: sealing.revision, kept: false };
    assert!(state.apply(&late).is_err(), "it is not called off any more");
    let mut other = state.clone();
    let kept = CatalogCommand::RecoveryAbandoned { id, revision: sealing.revision, kept: true };
    assert_eq!(
        volume(other.apply(&kept)).phase,
        VolumePhase::Ready,
        "unless nobody was sealed and nobody will be"
    );
    let foreign = CatalogCommand::VolumeRecovered { id, revision: sealing.revision, source: ReplicaId(2) };
    assert!(state.apply(&foreign).is_err(), "only a survivor goes on");
    let ended = CatalogCommand::VolumeRecovered { id, revision: sealing.revision, source };
    let now = volume(state.apply(&ended));
    assert_eq!((now.phase, now.group, now.recovery), (VolumePhase::Ready, GROUP, None));
    assert_eq!((now.incarnation.number, now.incarnation.recovery), (2, ID));
    assert_eq!(now.replicas.iter().map(|replica| replica.id).collect::<Vec<_>>(), ids(&[1]));
    let left: Vec<_> = now.quarantined.iter().map(|kept| (kept.group, kept.replica, kept.number)).collect();
    assert_eq!(left, [(record.group, ReplicaId(2), 2), (record.group, ReplicaId(3), 2)]);
    // What is left goes with the volume, and the volume is not forgotten before.
    let (group, replica) = (record.group, ReplicaId(2));
    let drop = |revision, replica| CatalogCommand::DropQuarantined { id, revision, group, replica };
    assert!(state.apply(&drop(now.revision, replica)).is_err(), "it is kept");
    let mut now = volume(state.apply(&CatalogCommand::DeleteVolume { id }));
    let gone = CatalogCommand::DropReplica { id, revision: now.revision, replica: ReplicaId(1) };
    now = volume(state.apply(&gone));
    for replica in [2, 3] {
        assert!(state.apply(&CatalogCommand::ForgetVolume { id, revision: now.revision }).is_err());
        now = volume(state.apply(&drop(now.revision, ReplicaId(replica))));
    }
    assert_eq!(
        state.apply(&CatalogCommand::ForgetVolume { id, revision: now.revision }),
        Ok(CatalogReply::Done)
    );
}

#[test]
fn of_two_recoveries_one_is_refused_with_both_ids_named() {
    let (mut state, record) = ready();
    let begun = volume(state.apply(&recover(&record, (ID, GROUP), ids(&[1, 2]))));
    // The same operator again, whatever the order, is the same recovery.
    let again = volume(state.apply(&recover(&record, (OTHER, GroupId(6000)), ids(&[2, 1]))));
    assert_eq!(again, begun);
    let refused = state.apply(&recover(&begun, (OTHER, GroupId(6000)), ids(&[3]))).expect_err("is refused");
    assert!(refused.message.contains(&ID.to_string()) && refused.message.contains(&OTHER.to_string()));
    // One that nobody was sealed for is called off, and then there may be another.
    let off = CatalogCommand::RecoveryAbandoned { id: record.id, revision: begun.revision, kept: false };
    let ready = volume(state.apply(&off));
    assert_eq!((ready.phase, ready.recovery.clone()), (VolumePhase::Ready, None));
    let next = volume(state.apply(&recover(&ready, (OTHER, GroupId(6000)), ids(&[3]))));
    assert_eq!(next.recovery.map(|recovery| recovery.id), Some(OTHER));
}
