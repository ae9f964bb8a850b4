//! INV-CERT rule by rule: what a voter signs, and what a majority is.

use std::collections::{BTreeMap, BTreeSet};

use holdfast_types::{ClusterId, Epoch, GroupId, LogIndex, NodeName, RecoveryId, ReplicaId, VolumeId};
use proptest::prelude::*;

use super::rules::detach;
use super::{attach, forced, volume};
use crate::fence::{Applied, FenceStatement, NotSigned};
use crate::planted;
use crate::volume::VolumeState;

/// The statement of `the_signed_bytes_are_as_they_were`, byte for byte.
const GOLDEN: &str = "1c000000686f6c64666173742066656e63652063657274696669636174652031\
    01000000000000000000000000000000020000000000000000000000000000000300000000000000000000000000000001000000\
    0000000000000000000000000000000000000000020000006e31020000000000000001020000006e3202000000000000000100000002\
    0000000100000000000000020000006e310200000000000000020000006e32";

fn node(number: u8) -> NodeName {
    NodeName::new(format!("n{number}"))
}

fn ids(configurations: &[&[u64]]) -> Vec<BTreeSet<ReplicaId>> {
    configurations.iter().map(|ids| ids.iter().map(|id| ReplicaId(*id)).collect()).collect()
}

/// Of epoch 2, which `holder` took from `n1`, as of entry 2.
fn statement(holder: Option<u8>, configurations: &[&[u64]]) -> FenceStatement {
    let named = |ids: &&[u64]| ids.iter().map(|id| (ReplicaId(*id), node(*id as u8))).collect();
    FenceStatement {
        cluster: ClusterId(1),
        volume: VolumeId(2),
        group: GroupId(3),
        incarnation: 1,
        recovery: RecoveryId::NIL,
        fenced: node(1),
        epoch: Epoch(2),
        holder: holder.map(node),
        index: LogIndex(2),
        configurations: configurations.iter().map(named).collect(),
    }
}

/// `n1` attaches, then others by force, in order.
fn taken_by(nodes: &[u8]) -> VolumeState {
    let mut state = volume();
    let mut index = 1;
    state.apply(LogIndex(index), &attach(0, 1, 1));
    for (before, node) in (1..).zip(nodes) {
        index += 1;
        state.apply(LogIndex(index), &forced(attach(before, *node, (*node).into())));
    }
    assert_eq!(state.epoch(), Epoch(nodes.len() as u64 + 1));
    state
}

fn checked(statement: &FenceStatement, state: &VolumeState, index: u64) -> Result<(), NotSigned> {
    let (configurations, index) = (ids(&[&[1, 2, 3]]), LogIndex(index));
    statement.check(&Applied { replica: ReplicaId(2), state, index, configurations: &configurations })
}

#[test]
fn a_voter_signs_only_what_it_has_applied() {
    let told = statement(Some(2), &[&[1, 2, 3]]);
    assert_eq!(checked(&told, &taken_by(&[2]), 2), Ok(()));
    assert_eq!(checked(&told, &taken_by(&[2]), 1), Err(NotSigned::Behind(LogIndex(2))));
    // What it has not seen in force it does not sign, even if it is over by now: the next statement tells more.
    let next = Err(NotSigned::Differs { here: Epoch(3), holder: Some(node(3)) });
    assert_eq!(checked(&told, &taken_by(&[2, 3]), 3), next);
    assert_eq!(checked(&told, &taken_by(&[2, 1]), 3), Err(NotSigned::Held(node(1))));
    assert_eq!(checked(&told, &taken_by(&[]), 5), Err(NotSigned::Held(node(1))));
    let other = Err(NotSigned::Differs { here: Epoch(2), holder: Some(node(3)) });
    assert_eq!(checked(&told, &taken_by(&[3]), 2), other);
    assert!(matches!(checked(&told, &volume(), 2), Err(NotSigned::Differs { .. })));
}

#[test]
fn an_epoch_that_was_ended_is_held_by_nobody() {
    let mut state = taken_by(&[2]);
    state.apply(LogIndex(3), &detach(2, false, true));
    assert_eq!(state.holder(), None);
    let nobody = FenceStatement { index: LogIndex(3), ..statement(None, &[&[1, 2, 3]]) };
    assert_eq!(checked(&nobody, &state, 3), Ok(()));
    let held = checked(&statement(Some(2), &[&[1, 2, 3]]), &state, 3);
    assert_eq!(held, Err(NotSigned::Differs { here: Epoch(2), holder: None }));
    assert!(matches!(checked(&nobody, &taken_by(&[2]), 3), Err(NotSigned::Differs { .. })));
}

#[test]
fn only_voters_of_the_same_configurations_sign() {
    let state = taken_by(&[2]);
    let check = |statement: &FenceStatement, replica: u64, own: &[&[u64]]| {
        let configurations = ids(own);
        let replica = ReplicaId(replica);
        statement.check(&Applied {
            replica,
            state: &state,
            index: LogIndex(2),
            configurations: &configurations,
        })
    };
    let told = statement(Some(2), &[&[1, 2, 3]]);
    assert_eq!(check(&told, 4, &[&[1, 2, 3]]), Err(NotSigned::NoVote(ReplicaId(4))));
    assert_eq!(check(&told, 2, &[&[1, 2, 3], &[2, 3, 4]]), Err(NotSigned::OtherMembers));
    assert_eq!(check(&told, 2, &[&[1, 2, 4]]), Err(NotSigned::OtherMembers));
    let joint = statement(Some(2), &[&[1, 2, 3], &[2, 3, 4]]);
    assert_eq!(check(&joint, 4, &[&[1, 2, 3], &[2, 3, 4]]), Ok(()));
}

#[test]
fn a_majority_is_one_of_every_configuration() {
    let majority = |statement: &FenceStatement, signed: &[u64]| {
        statement.is_majority(&signed.iter().map(|id| ReplicaId(*id)).collect())
    };
    let three = statement(None, &[&[1, 2, 3]]);
    assert!(majority(&three, &[1, 3]) && majority(&three, &[1, 2, 3]));
    assert!(!majority(&three, &[1]) && !majority(&three, &[]) && !majority(&three, &[1, 8, 9]));
    let four = statement(None, &[&[1, 2, 3, 4]]);
    assert!(!majority(&four, &[1, 2]) && majority(&four, &[1, 2, 4]));
    let joint = statement(None, &[&[1, 2, 3], &[3, 4, 5]]);
    assert!(!majority(&joint, &[1, 2, 3]) && majority(&joint, &[1, 3, 4]));
    assert!(!majority(&FenceStatement { configurations: vec![], ..three.clone() }, &[1, 2, 3]));
    assert!(three.malformed().is_none());
    assert!(FenceStatement { configurations: vec![], ..three.clone() }.malformed().is_some());
    assert!(FenceStatement { configurations: vec![BTreeMap::new()], ..three.clone() }.malformed().is_some());
    assert!(FenceStatement { holder: Some(node(1)), ..three.clone() }.malformed().is_some());
    let one_node = BTreeMap::from([(ReplicaId(1), node(1)), (ReplicaId(2), node(1))]);
    assert!(FenceStatement { configurations: vec![one_node], ..three.clone() }.malformed().is_some());
    let large = (1..=6).map(|id| (ReplicaId(id), node(id as u8))).collect();
    assert!(FenceStatement { configurations: vec![large], ..three }.malformed().is_some());
}

/// The form of version 1, for ever: certificates outlive the program that made them.
#[test]
fn the_signed_bytes_are_as_they_were() {
    let text: String =
        statement(Some(2), &[&[1, 2]]).to_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(text, GOLDEN);
}

#[test]
fn what_is_planted_is_found() {
    planted::plant(&["sign-what-is-held"]);
    let held = FenceStatement { epoch: Epoch(1), index: LogIndex(1), ..statement(Some(1), &[&[1, 2, 3]]) };
    let signed = checked(&held, &taken_by(&[]), 1);
    planted::plant(&["minority-certifies"]);
    let few = statement(None, &[&[1, 2, 3]]).is_majority(&BTreeSet::from([ReplicaId(1)]));
    planted::plant(&[]);
    assert!(signed.is_ok() && few, "the tests above would have noticed");
}

proptest! {
    /// No two statements have the same bytes: whoever alters one has to sign it anew.
    #[test]
    fn every_field_is_signed(which in 0..9_usize, to in 5..100_u64) {
        let told = statement(Some(2), &[&[1, 2, 3]]);
        let mut altered = told.clone();
        match which {
            0 => altered.cluster = ClusterId(to.into()),
            1 => altered.volume = VolumeId(to.into()),
            2 => altered.group = GroupId(to.into()),
            3 => altered.incarnation = to,
            4 => altered.recovery = RecoveryId(to.into()),
            5 => altered.fenced = node(to as u8),
            6 => altered.epoch = Epoch(to),
            7 => altered.holder = None,
            _ => altered.index = LogIndex(to),
        }
        prop_assert_ne!(told.to_bytes(), altered.to_bytes());
        let other = statement(Some(2), &[&[1, 2, to]]);
        let joint = statement(Some(2), &[&[1, 2, 3], &[to]]);
        prop_assert_ne!(told.to_bytes(), other.to_bytes());
        prop_assert_ne!(told.to_bytes(), joint.to_bytes());
        prop_assert_ne!(other.to_bytes(), joint.to_bytes());
    }
}
