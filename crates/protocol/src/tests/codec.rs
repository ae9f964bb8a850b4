//! Encodings come back, and hostile bytes do no harm.

use std::time::Duration;

use holdfast_types::{
    AttachmentId, BlockIndex, BlockRange, ByteSize, DecodeError, Epoch, LogIndex, NodeName, OnQuorumLoss,
    ReadPolicy, Seq, SessionId, SnapshotId, StoreId,
};
use proptest::prelude::*;

use super::{attach, snapshot, volume};
use crate::command::{
    AttachMode, FEATURE_LEVEL, LEVEL_FIRST, LEVEL_SNAPSHOTS, LEVEL_TIMERS, Tag, VolumeCommand,
};
use crate::lease::{HolderWatch, LeaseTerms, decide_attach};
use crate::timers::Timers;
use crate::volume::{Refusal, VolumeReply, VolumeState};

fn any_tag() -> impl Strategy<Value = Tag> {
    let parts = (any::<u64>(), any::<u128>(), any::<u64>(), any::<u64>());
    parts.prop_map(|(epoch, session, seq, oldest)| Tag {
        epoch: Epoch(epoch),
        session: SessionId(session),
        seq: Seq(seq),
        oldest: Seq(oldest),
    })
}

fn any_range() -> impl Strategy<Value = BlockRange> {
    (any::<u64>(), any::<u32>()).prop_map(|(start, count)| BlockRange::new(BlockIndex(start), count))
}

fn any_attach() -> impl Strategy<Value = VolumeCommand> {
    let ids = (any::<u64>(), "[a-z0-9._-]{0,128}", any::<u128>(), any::<u128>(), any::<u128>());
    (ids, any::<[bool; 3]>()).prop_map(|((expected, node, store, session, attachment), flags)| {
        VolumeCommand::Attach {
            expected: Epoch(expected),
            node: NodeName::new(node),
            store: StoreId(store),
            session: SessionId(session),
            attachment: AttachmentId(attachment),
            mode: if flags[0] { AttachMode::Exclusive } else { AttachMode::ReadOnly },
            force: flags[1],
            confirmed: flags[2],
        }
    })
}

fn any_command() -> impl Strategy<Value = VolumeCommand> {
    let checksums = prop::collection::vec(any::<u32>(), 0..=256);
    prop_oneof![
        (any_tag(), any_range(), checksums).prop_map(|(tag, range, checksums)| VolumeCommand::Write {
            tag,
            range,
            checksums
        }),
        (any_tag(), any_range()).prop_map(|(tag, range)| VolumeCommand::Trim { tag, range }),
        (any_tag(), any_range()).prop_map(|(tag, range)| VolumeCommand::Zero { tag, range }),
        any_attach(),
        (any::<u64>(), any::<bool>(), any::<bool>()).prop_map(|(epoch, force, confirmed)| {
            VolumeCommand::Detach { epoch: Epoch(epoch), force, confirmed }
        }),
        any::<u64>().prop_map(|epoch| VolumeCommand::Settled { epoch: Epoch(epoch) }),
        any::<u64>().prop_map(|size| VolumeCommand::Resize { size: ByteSize(size) }),
        (any::<Option<u32>>(), any::<bool>()).prop_map(|(after, leader)| VolumeCommand::SetPolicy {
            on_quorum_loss: after
                .map_or(OnQuorumLoss::Suspend, |after_seconds| OnQuorumLoss::Error { after_seconds }),
            read_policy: if leader { ReadPolicy::Leader } else { ReadPolicy::Nearest },
        }),
        ((0_u128..4), "[a-z0-9._-]{0,128}", any::<u64>()).prop_map(|(id, name, created_ms)| {
            VolumeCommand::Snapshot { id: SnapshotId(id), name, created_ms }
        }),
        (0_u128..4).prop_map(|id| VolumeCommand::DropSnapshot { id: SnapshotId(id) }),
        ((0_u128..4), 0_u64..3).prop_map(|(id, epoch)| VolumeCommand::RestoreSnapshot {
            id: SnapshotId(id),
            epoch: Epoch(epoch)
        }),
        any_timers().prop_map(|to| VolumeCommand::ChangeTimers { to }),
        any::<u64>().prop_map(|since| VolumeCommand::TimersSettled { since: LogIndex(since) }),
    ]
}

/// Good ones and bad ones, in whole milliseconds.
fn any_timers() -> impl Strategy<Value = Timers> {
    let of = |[heartbeat, election_min, election_max, lease]: [u32; 4]| Timers {
        heartbeat: Duration::from_millis(heartbeat.into()),
        election_min: Duration::from_millis(election_min.into()),
        election_max: Duration::from_millis(election_max.into()),
        session_lease: Duration::from_millis(lease.into()),
    };
    prop_oneof![
        any::<[u32; 4]>().prop_map(of),
        (10_u64..1000).prop_map(|ms| Timers::of_heartbeat(Duration::from_millis(ms))),
    ]
}

fn any_reply() -> impl Strategy<Value = VolumeReply> {
    let node = || "[a-z0-9]{1,16}".prop_map(NodeName::new);
    let refusal = prop_oneof![
        any::<u64>().prop_map(|current| Refusal::OldEpoch { current: Epoch(current) }),
        Just(Refusal::NotAttached),
        Just(Refusal::NotHolder),
        Just(Refusal::ReadOnly),
        Just(Refusal::Unsettled),
        any::<u64>().prop_map(|oldest| Refusal::TooOld { oldest: Seq(oldest) }),
        Just(Refusal::BeyondWindow),
        any::<u64>().prop_map(|blocks| Refusal::OutOfRange { blocks }),
        (any::<u64>(), prop::option::of(node()))
            .prop_map(|(current, holder)| Refusal::EpochMismatch { current: Epoch(current), holder }),
        (node(), any::<u64>()).prop_map(|(node, epoch)| Refusal::HeldBy { node, epoch: Epoch(epoch) }),
        any::<u64>().prop_map(|blocks| Refusal::CannotShrink { blocks }),
        ".{0,40}".prop_map(Refusal::Malformed),
        Just(Refusal::SnapshotNameTaken),
        Just(Refusal::SnapshotsFull),
        Just(Refusal::SnapshotsUnsettled),
        (any::<u64>(), any::<u64>()).prop_map(|(held, quota)| Refusal::SnapshotQuota { held, quota }),
        Just(Refusal::NoSuchSnapshot),
        Just(Refusal::SnapshotDropped),
        (prop::collection::vec("[a-z]{1,128}", 0..=8), any::<u32>())
            .prop_map(|(names, more)| Refusal::NewerSnapshots { names, more }),
        node().prop_map(|node| Refusal::Attached { node }),
        Just(Refusal::TimersChanging),
    ];
    prop_oneof![
        any::<bool>().prop_map(|fresh| VolumeReply::Done { fresh }),
        (any::<u64>(), any::<u128>(), any::<u64>(), any::<u64>()).prop_map(
            |(epoch, attachment, index, next)| {
                VolumeReply::Attached {
                    epoch: Epoch(epoch),
                    attachment: AttachmentId(attachment),
                    index: LogIndex(index),
                    next: Seq(next),
                }
            }
        ),
        (any::<u64>(), any::<u64>()).prop_map(|(index, size)| VolumeReply::Snapshotted {
            index: LogIndex(index),
            size: ByteSize(size)
        }),
        refusal.prop_map(VolumeReply::Refused),
    ]
}

proptest! {
    #[test]
    fn commands_come_back(command in any_command()) {
        prop_assert_eq!(VolumeCommand::decode(&command.encode()), Ok(command));
    }

    #[test]
    fn replies_come_back(reply in any_reply()) {
        prop_assert_eq!(VolumeReply::decode(&reply.encode()), Ok(reply));
    }

    #[test]
    fn random_bytes_are_an_error_or_harmless(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut levelled = FEATURE_LEVEL.to_le_bytes().to_vec();
        levelled.extend(&bytes);
        for input in [&bytes, &levelled] {
            let _reply = VolumeReply::decode(input);
            let state = VolumeState::decode(input);
            if let (Ok(mut state), Ok(command)) = (state, VolumeCommand::decode(input)) {
                state.apply(LogIndex(1), &command);
            }
        }
    }

    /// Every command that decodes can be applied and decided on, whatever numbers it carries.
    #[test]
    fn no_command_breaks_the_state(commands in prop::collection::vec(any_command(), 0..20)) {
        let terms = LeaseTerms { lease: Duration::from_secs(1), drift_permille: 10 };
        let mut watch = HolderWatch::new(terms);
        watch.began_leading(u64::MAX);
        let mut state = volume();
        state.apply(LogIndex(1), &attach(0, 1, 1));
        for (index, command) in (2..).zip(&commands) {
            decide_attach(&state, &mut watch, command, u64::MAX);
            state.apply(LogIndex(index), command);
        }
        prop_assert_eq!(VolumeState::decode(&state.encode()), Ok(state));
    }

    /// One flipped or missing byte of a state is an error or another valid state; never a panic, now or at apply.
    #[test]
    fn a_damaged_state_does_no_harm(
        commands in prop::collection::vec(any_command(), 0..4),
        at in any::<prop::sample::Index>(),
        flip in 1_u8..=255,
        cut in any::<bool>(),
        change in any::<bool>(),
    ) {
        let mut state = volume();
        state.apply(LogIndex(1), &attach(0, 1, 1));
        state.apply(LogIndex(2), &super::forced(attach(1, 2, 2)));
        for id in 1..4 {
            state.apply(LogIndex(2 + id as u64), &snapshot(id));
        }
        state.apply(LogIndex(6), &VolumeCommand::DropSnapshot { id: SnapshotId(2) });
        if change {
            let to = Timers::of_heartbeat(Duration::from_millis(20));
            state.apply(LogIndex(7), &VolumeCommand::ChangeTimers { to });
        }
        let mut bytes = state.encode().to_vec();
        let at = at.index(bytes.len());
        if cut {
            bytes.truncate(at);
            prop_assert!(VolumeState::decode(&bytes).is_err());
        } else {
            bytes[at] ^= flip;
            if let Ok(mut damaged) = VolumeState::decode(&bytes) {
                for (index, command) in (8..).zip(&commands) {
                    damaged.apply(LogIndex(index), command);
                }
            }
        }
    }
}

#[test]
fn a_newer_feature_level_is_refused_by_name() {
    let mut command = attach(0, 1, 1).encode().to_vec();
    let mut state = volume().encode().to_vec();
    for bytes in [&mut command, &mut state] {
        bytes[..2].copy_from_slice(&(FEATURE_LEVEL + 1).to_le_bytes());
    }
    let expected = DecodeError::Unknown {
        what: "feature level (upgrade this node)",
        value: u64::from(FEATURE_LEVEL) + 1,
    };
    assert_eq!(VolumeCommand::decode(&command), Err(expected.clone()));
    assert_eq!(VolumeState::decode(&state), Err(expected));
}

/// What an older version can read it does read: only what needs the newer level says so.
#[test]
fn every_encoding_carries_the_level_that_it_needs() {
    let level = |bytes: &[u8]| u16::from_le_bytes([bytes[0], bytes[1]]);
    assert_eq!(level(&attach(0, 1, 1).encode()), LEVEL_FIRST);
    assert_eq!(level(&snapshot(1).encode()), LEVEL_SNAPSHOTS);
    let mut state = volume();
    assert_eq!(level(&state.encode()), LEVEL_FIRST);
    state.apply(LogIndex(1), &snapshot(1));
    assert_eq!(level(&state.encode()), LEVEL_SNAPSHOTS);
    state.apply(LogIndex(2), &VolumeCommand::DropSnapshot { id: SnapshotId(1) });
    assert_eq!(level(&state.encode()), LEVEL_SNAPSHOTS, "that it was dropped is remembered");
    let to = Timers::of_heartbeat(Duration::from_millis(20));
    let change = VolumeCommand::ChangeTimers { to };
    assert_eq!(level(&change.encode()), LEVEL_TIMERS);
    let mut state = volume();
    state.apply(LogIndex(1), &change);
    assert_eq!(level(&state.encode()), LEVEL_TIMERS);
    state.apply(LogIndex(2), &VolumeCommand::TimersSettled { since: LogIndex(1) });
    assert_eq!(level(&state.encode()), LEVEL_TIMERS);
    state.apply(LogIndex(3), &VolumeCommand::ChangeTimers { to: Timers::default() });
    state.apply(LogIndex(4), &VolumeCommand::TimersSettled { since: LogIndex(3) });
    assert_eq!(level(&state.encode()), LEVEL_FIRST, "the defaults need no newer version");
    let mut lower = snapshot(1).encode().to_vec();
    lower[..2].copy_from_slice(&LEVEL_FIRST.to_le_bytes());
    assert!(VolumeCommand::decode(&lower).is_err(), "a snapshot at a level that has none");
}

#[test]
fn a_long_text_is_cut_at_a_character() {
    let reply = VolumeReply::Refused(Refusal::Malformed("é".repeat(5000)));
    let decoded = VolumeReply::decode(&reply.encode());
    assert_eq!(decoded, Ok(VolumeReply::Refused(Refusal::Malformed("é".repeat(2048)))));
}
