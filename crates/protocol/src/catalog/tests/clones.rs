//! Copies of volumes and of snapshots: what they are made from stays until they are there, and until then nobody uses
//! them.

use holdfast_types::{LogIndex, SnapshotId};

use super::*;

const SIZE: ByteSize = ByteSize(1 << 30);

fn ready(state: &mut CatalogState, name: &str, id: u128) -> VolumeRecord {
    let record = volume(state.apply(&create(name, id)));
    made(state, &record)
}

/// The replicas are there.
fn made(state: &mut CatalogState, record: &VolumeRecord) -> VolumeRecord {
    volume(state.apply(&CatalogCommand::VolumeReady { id: record.id, revision: record.revision }))
}

fn snapshot(state: &mut CatalogState, of: &VolumeRecord, id: u128) -> SnapshotId {
    let (id, name) = (SnapshotId(id), format!("s{id}"));
    let take = CatalogCommand::CreateSnapshot { id, volume: of.id, name, key: String::new(), created_ms: 7 };
    state.apply(&take).expect("is taken");
    state
        .apply(&CatalogCommand::SnapshotReady { id, index: LogIndex(3), size: of.spec.size })
        .expect("is ready");
    id
}

fn copy(name: &str, id: u128, of: &VolumeRecord, snapshot: SnapshotId, own: bool) -> CatalogCommand {
    let mut command = create(name, id);
    if let CatalogCommand::CreateVolume { source, .. } = &mut command {
        *source = Some(SourceOrder { volume: of.id, snapshot, own, created_ms: 7 });
    }
    command
}

fn sized(mut command: CatalogCommand, bytes: u64) -> CatalogCommand {
    if let CatalogCommand::CreateVolume { spec, .. } = &mut command {
        spec.size = ByteSize(bytes);
    }
    command
}

fn code(reply: CatalogResult) -> ErrorCode {
    reply.expect_err("is refused").code
}

fn publish(id: VolumeId) -> CatalogCommand {
    CatalogCommand::Publish { id, node: NodeName::new("r0-z1-n0"), read_only: false }
}

#[test]
fn a_copy_is_used_only_when_everything_is_there_and_its_snapshot_stays_until_then() {
    let mut state = CatalogState::new(CLUSTER);
    let of = ready(&mut state, "a", 1);
    let s = snapshot(&mut state, &of, 50);
    let record = volume(state.apply(&copy("c", 2, &of, s, false)));
    let delete = CatalogCommand::DeleteSnapshot { id: s };
    assert_eq!(code(state.apply(&delete)), ErrorCode::Refused, "while its replicas are made");
    let record = made(&mut state, &record);
    assert_eq!(record.phase, VolumePhase::Filling, "INV-FILL");
    assert_eq!(record.check_ready().map_err(|error| error.code), Err(ErrorCode::Unavailable));
    let progress = CatalogCommand::FillProgress { id: record.id, filled: ByteSize(SIZE.0 / 2), size: SIZE };
    let half = volume(state.apply(&progress));
    assert_eq!(half.revision, record.revision, "nothing is decided on it");
    let why = half.check_ready().expect_err("is not ready");
    assert!(why.message.contains("is being filled: 50 %"), "{why}");
    let back = CatalogCommand::FillProgress { id: record.id, filled: ByteSize(7), size: SIZE };
    let source = volume(state.apply(&back)).source.expect("it is a copy");
    assert_eq!(source.filled, ByteSize(SIZE.0 / 2), "what is there stays there");
    let why = state.apply(&delete).expect_err("is refused");
    assert!(why.code == ErrorCode::Refused && why.message.contains("volume c is being filled"), "{why}");
    assert_eq!(code(state.apply(&CatalogCommand::DeleteVolume { id: of.id })), ErrorCode::Refused);
    assert_eq!(code(state.apply(&copy("d", 3, &half, SnapshotId(51), true))), ErrorCode::Unavailable);
    state.apply(&node(1, 1)).expect("a node");
    let node_name = state.nodes.keys().next().expect("it is there").clone();
    let publish = CatalogCommand::Publish { id: record.id, node: node_name, read_only: false };
    assert_eq!(code(state.apply(&publish)), ErrorCode::Unavailable);
    let filled = CatalogCommand::VolumeFilled { id: record.id };
    let done = volume(state.apply(&filled));
    assert_eq!(
        (done.phase, done.source.as_ref().map(VolumeSource::percent)),
        (VolumePhase::Ready, Some(100))
    );
    assert_eq!(volume(state.apply(&filled)), done);
    assert_eq!(volume(state.apply(&progress)), done, "a late report changes nothing");
    state.apply(&publish).expect("it is ready");
    state.apply(&delete).expect("nobody needs it any more");
}

#[test]
fn a_copy_of_a_volume_has_a_snapshot_of_its_own_that_goes_with_the_need_for_it() {
    for finished in [true, false] {
        let mut state = CatalogState::new(CLUSTER);
        let of = ready(&mut state, "a", 1);
        let own = SnapshotId(60);
        let record = volume(state.apply(&copy("c", 2, &of, own, true)));
        let again = volume(state.apply(&copy("c", 9, &of, SnapshotId(61), true)));
        assert_eq!(again, record, "a creation bears repetition, whatever id it draws");
        assert_eq!(state.snapshots.len(), 1);
        assert_eq!(state.snapshots[&own].copy, Some(record.id));
        // It goes with that copy, so nobody else may begin with it.
        assert_eq!(code(state.apply(&copy("d", 3, &of, own, false))), ErrorCode::Refused);
        let delete = CatalogCommand::DeleteVolume { id: of.id };
        let why = state.apply(&delete).expect_err("is refused");
        assert!(why.message.contains("volume c is being filled from volume a"), "{why}");
        let record = made(&mut state, &record);
        if finished {
            volume(state.apply(&CatalogCommand::VolumeFilled { id: record.id }));
        } else {
            volume(state.apply(&CatalogCommand::DeleteVolume { id: record.id }));
        }
        assert_eq!(state.snapshots[&own].phase, SnapshotPhase::Deleting);
        volume(state.apply(&delete));
    }
}

#[test]
fn what_cannot_be_copied_is_refused_and_leaves_nothing() {
    let mut state = CatalogState::new(CLUSTER);
    let (a, b) = (ready(&mut state, "a", 1), ready(&mut state, "b", 2));
    let (s, t) = (snapshot(&mut state, &a, 50), snapshot(&mut state, &b, 51));
    let ghost = VolumeRecord { id: VolumeId(999), ..a.clone() };
    let before = state.clone();
    for (what, command, wanted) in [
        ("no such volume", copy("c", 3, &ghost, SnapshotId(60), true), ErrorCode::NotFound),
        ("no such snapshot", copy("c", 3, &a, SnapshotId(60), false), ErrorCode::NotFound),
        ("another volume's snapshot", copy("c", 3, &a, t, false), ErrorCode::NotFound),
        ("too small for a snapshot", sized(copy("c", 3, &a, s, false), SIZE.0 - 4096), ErrorCode::OutOfRange),
        ("too small for a volume", sized(copy("c", 3, &a, s, true), SIZE.0 - 4096), ErrorCode::OutOfRange),
        ("the name of one without source", copy("b", 3, &a, s, false), ErrorCode::AlreadyExists),
    ] {
        assert_eq!(code(state.apply(&command)), wanted, "{what}");
        assert_eq!(state, before, "{what}");
    }
    let larger = sized(copy("c", 3, &a, s, false), 2 * SIZE.0);
    let record = volume(state.apply(&larger));
    assert_eq!(volume(state.apply(&larger)), record);
    let other = sized(copy("c", 4, &b, t, false), 2 * SIZE.0);
    assert_eq!(code(state.apply(&other)), ErrorCode::AlreadyExists, "the same name, another source");
    let plain = sized(create("c", 5), 2 * SIZE.0);
    assert_eq!(code(state.apply(&plain)), ErrorCode::AlreadyExists);
    assert_eq!(code(state.apply(&publish(VolumeId(999)))), ErrorCode::NotFound);
}
