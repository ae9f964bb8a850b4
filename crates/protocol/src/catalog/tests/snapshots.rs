//! Records of snapshots: creation bears repetition, names and keys are unique, nothing is forgotten too early.

use holdfast_types::{LogIndex, SnapshotId};

use super::*;

fn ready(state: &mut CatalogState, name: &str, id: u128) -> VolumeRecord {
    let record = volume(state.apply(&create(name, id)));
    volume(state.apply(&CatalogCommand::VolumeReady { id: record.id, revision: record.revision }))
}

fn take(id: u128, volume: &VolumeRecord, name: &str, key: &str) -> CatalogCommand {
    CatalogCommand::CreateSnapshot {
        id: SnapshotId(id),
        volume: volume.id,
        name: name.into(),
        key: key.into(),
        created_ms: 7,
    }
}

fn snapshot(reply: CatalogResult) -> SnapshotRecord {
    match reply {
        Ok(CatalogReply::Snapshot { record }) => *record,
        other => panic!("not a snapshot: {other:?}"),
    }
}

fn code(reply: CatalogResult) -> ErrorCode {
    reply.expect_err("is refused").code
}

#[test]
fn a_creation_bears_repetition_and_taken_names_are_refused() {
    let mut state = CatalogState::new(CLUSTER);
    let (a, b) = (ready(&mut state, "a", 1), ready(&mut state, "b", 2));
    let first = snapshot(state.apply(&take(1, &a, "s", "k")));
    assert_eq!(first.phase, SnapshotPhase::Creating);
    assert_eq!(snapshot(state.apply(&take(2, &a, "s", "k"))), first, "INV-SNAPSHOT: the same request");
    assert_eq!(code(state.apply(&take(3, &a, "s", ""))), ErrorCode::AlreadyExists, "another request's name");
    assert_eq!(
        code(state.apply(&take(3, &b, "s", "k"))),
        ErrorCode::AlreadyExists,
        "the key of another volume"
    );
    assert_eq!(
        code(state.apply(&take(3, &a, "t", "k"))),
        ErrorCode::AlreadyExists,
        "the key of another name"
    );
    let other = snapshot(state.apply(&take(4, &b, "s", "")));
    assert_eq!(state.snapshots.len(), 2, "names are unique per volume only");
    assert_eq!(state.find_snapshot("b@s"), Some(&other));
    assert_eq!(state.find_snapshot(&format!("{}@s", b.id)), Some(&other));
    assert_eq!(state.find_snapshot(&other.id.to_string()), Some(&other));
    assert_eq!(state.get_snapshot("b@t").map_err(|error| error.code), Err(ErrorCode::NotFound));
    let (index, size) = (LogIndex(9), ByteSize(4096));
    let done = CatalogCommand::SnapshotReady { id: first.id, index, size };
    let done = [snapshot(state.apply(&done)), snapshot(state.apply(&done))];
    assert!(
        done.iter()
            .all(|record| (record.phase, record.index, record.size) == (SnapshotPhase::Ready, index, size))
    );
    assert_eq!(snapshot(state.apply(&take(5, &a, "s", "k"))), done[0]);
}

#[test]
fn a_deletion_is_forgotten_only_when_it_is_done_and_bears_repetition() {
    let mut state = CatalogState::new(CLUSTER);
    let a = ready(&mut state, "a", 1);
    let id = snapshot(state.apply(&take(1, &a, "s", ""))).id;
    let (delete, forget) = (CatalogCommand::DeleteSnapshot { id }, CatalogCommand::ForgetSnapshot { id });
    assert_eq!(code(state.apply(&forget)), ErrorCode::Refused);
    assert_eq!(snapshot(state.apply(&delete)).phase, SnapshotPhase::Deleting);
    assert_eq!(state.find_snapshot("a@s"), None);
    let late = CatalogCommand::SnapshotReady { id, index: LogIndex(1), size: ByteSize(1) };
    assert_eq!(
        snapshot(state.apply(&late)).phase,
        SnapshotPhase::Deleting,
        "a late creation revives nothing"
    );
    assert_eq!(
        code(state.apply(&take(2, &a, "s", ""))),
        ErrorCode::Unavailable,
        "its volume still has the name"
    );
    for command in [&forget, &forget, &delete] {
        assert_eq!(state.apply(command), Ok(CatalogReply::Done));
    }
    snapshot(state.apply(&take(2, &a, "s", "")));
}

#[test]
fn a_volume_with_snapshots_is_not_deleted() {
    let mut state = CatalogState::new(CLUSTER);
    let a = ready(&mut state, "a", 1);
    assert_eq!(
        code(state.apply(&take(1, &volume(state.clone().apply(&create("z", 9))), "s", ""))),
        ErrorCode::NotFound
    );
    let ids: Vec<SnapshotId> =
        (1..=7).map(|id| snapshot(state.apply(&take(id, &a, &format!("s{id}"), ""))).id).collect();
    let error = state.apply(&CatalogCommand::DeleteVolume { id: a.id }).expect_err("is refused");
    assert_eq!(error.code, ErrorCode::Refused);
    assert!(error.message.contains("s1, s2, s3, s4, s5 and 2 more"), "{error}");
    assert!(error.hint.contains("a@s1"), "{}", error.hint);
    for id in ids {
        snapshot(state.apply(&CatalogCommand::DeleteSnapshot { id }));
    }
    let mut record = volume(state.apply(&CatalogCommand::DeleteVolume { id: a.id }));
    while let Some(replica) = record.replicas.first() {
        let (id, revision, replica) = (record.id, record.revision, replica.id);
        record = volume(state.apply(&CatalogCommand::DropReplica { id, revision, replica }));
    }
    let forget = CatalogCommand::ForgetVolume { id: record.id, revision: record.revision };
    assert_eq!(state.apply(&forget), Ok(CatalogReply::Done));
    assert!(state.snapshots.is_empty(), "what was being deleted went with the volume");
}

#[test]
fn a_volume_has_so_many_snapshots_and_no_more() {
    let mut state = CatalogState::new(CLUSTER);
    let a = ready(&mut state, "a", 1);
    for id in 1..=holdfast_types::limits::SNAPSHOTS_PER_VOLUME_MAX as u128 {
        snapshot(state.apply(&take(id, &a, &format!("s{id}"), "")));
    }
    assert_eq!(code(state.apply(&take(999, &a, "more", ""))), ErrorCode::ResourceExhausted);
    assert_eq!(code(state.apply(&take(999, &a, "s@1", ""))), ErrorCode::InvalidArgument);
}
