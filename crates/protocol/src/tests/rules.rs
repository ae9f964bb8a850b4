//! Each rule of the fencing state, one by one, with the retries that it must bear.

use holdfast_types::{
    BlockIndex, BlockRange, ByteSize, Epoch, LogIndex, NodeName, OnQuorumLoss, ReadPolicy, Seq,
};

use super::{DUPLICATE, FRESH, attach, attached, forced, tag, volume, write};
use crate::command::{AttachMode, VolumeCommand};
use crate::volume::{Refusal, VolumeReply, VolumeState};

/// Applies at growing indexes.
pub(super) struct Log(pub(super) VolumeState, pub(super) u64);

impl Log {
    pub(super) fn new() -> Self {
        Self(volume(), 0)
    }
    pub(super) fn apply(&mut self, command: &VolumeCommand) -> VolumeReply {
        self.1 += 1;
        self.0.apply(LogIndex(self.1), command)
    }
    pub(super) fn refusal(&mut self, command: &VolumeCommand) -> Refusal {
        match self.apply(command) {
            VolumeReply::Refused(refusal) => refusal,
            other => panic!("{command:?} was answered {other:?}"),
        }
    }
}

pub(super) fn detach(epoch: u64, force: bool, confirmed: bool) -> VolumeCommand {
    VolumeCommand::Detach { epoch: Epoch(epoch), force, confirmed }
}

fn settled(epoch: u64) -> VolumeCommand {
    VolumeCommand::Settled { epoch: Epoch(epoch) }
}

#[test]
fn nothing_older_lands_after_a_newer_attach() {
    let mut log = Log::new();
    assert_eq!(log.apply(&attach(0, 1, 1)), attached(1, (1, 1), 1, 1));
    assert_eq!(log.apply(&write(tag(1, 1, 1, 1))), FRESH);
    assert_eq!(log.apply(&forced(attach(1, 2, 2))), attached(2, (2, 2), 3, 1));
    let old = Refusal::OldEpoch { current: Epoch(2) };
    assert_eq!(log.refusal(&write(tag(1, 1, 2, 2))), old, "INV-FENCE");
    assert_eq!(
        log.refusal(&write(tag(1, 1, 1, 1))),
        old,
        "INV-FENCE: not even a duplicate is answered as done"
    );
    assert_eq!(
        log.refusal(&write(tag(2, 1, 2, 2))),
        Refusal::NotHolder,
        "INV-FENCE: a guessed epoch helps nobody"
    );
    assert!(matches!(log.refusal(&write(tag(3, 2, 1, 1))), Refusal::EpochMismatch { .. }));
}

#[test]
fn nothing_lands_after_a_detach() {
    for confirmed in [true, false] {
        let mut log = Log::new();
        log.apply(&attach(0, 1, 1));
        assert_eq!(log.apply(&detach(1, true, confirmed)), FRESH);
        let refusal = log.refusal(&write(tag(1, 1, 1, 1)));
        assert!(matches!(refusal, Refusal::NotAttached | Refusal::OldEpoch { .. }), "INV-FENCE: {refusal:?}");
        assert!(!refusal.retryable());
    }
}

#[test]
fn an_attach_is_compare_and_set_and_bears_repetition() {
    let mut log = Log::new();
    assert_eq!(log.apply(&attach(0, 1, 1)), attached(1, (1, 1), 1, 1));
    log.apply(&write(tag(1, 1, 1, 1)));
    assert_eq!(log.apply(&attach(0, 1, 1)), attached(1, (1, 1), 1, 2), "the first answer was lost");
    let mismatch = Refusal::EpochMismatch { current: Epoch(1), holder: Some(NodeName::new("n1")) };
    assert_eq!(log.refusal(&attach(0, 1, 3)), mismatch);
    assert_eq!(log.refusal(&forced(attach(0, 2, 2))), mismatch, "force does not replace the comparison");
    assert_eq!(log.refusal(&attach(u64::MAX, 2, 2)), mismatch);
    assert_eq!(log.apply(&detach(1, false, true)), FRESH);
    let gone = Refusal::EpochMismatch { current: Epoch(1), holder: None };
    assert_eq!(log.refusal(&attach(0, 1, 1)), gone, "a late repetition does not bring an attachment back");
}

#[test]
fn another_node_needs_force_or_what_the_leader_knows() {
    let mut log = Log::new();
    log.apply(&attach(0, 1, 1));
    let held = Refusal::HeldBy { node: NodeName::new("n1"), epoch: Epoch(1) };
    assert_eq!(log.refusal(&attach(1, 2, 2)), held);
    assert_eq!(log.apply(&attach(1, 2, 2).admitted(true)), attached(2, (2, 2), 3, 1));
    assert!(log.0.unsettled().is_none());
    assert_eq!(log.apply(&attach(2, 3, 3).admitted(false)), attached(3, (3, 3), 4, 1));
    assert_eq!(log.0.unsettled().map(|u| (u.epoch, u.holders[0].epoch)), Some((Epoch(3), Epoch(2))));
}

#[test]
fn a_restarted_daemon_keeps_its_attachment_and_its_window() {
    let mut log = Log::new();
    log.apply(&attach(0, 1, 1));
    for seq in [1, 2, 4] {
        assert_eq!(log.apply(&write(tag(1, 1, seq, 1))), FRESH);
    }
    // Session 2 of node 1: no force, the attachment of session 1, and numbers that go on.
    assert_eq!(log.apply(&attach(1, 1, 2)), attached(2, (1, 1), 5, 5));
    assert_eq!(
        log.refusal(&write(tag(2, 2, 4, 3))),
        Refusal::Unsettled,
        "INV-SETTLE: session 1 has not confirmed"
    );
    assert_eq!(log.apply(&settled(2)), FRESH);
    assert_eq!(log.apply(&write(tag(2, 2, 4, 3))), DUPLICATE, "INV-ONCE: replayed by the keeper");
    assert_eq!(
        log.apply(&write(tag(2, 2, 3, 3))),
        FRESH,
        "INV-ONCE: sent before the restart, lost on the way"
    );
    assert_eq!(log.apply(&write(tag(2, 2, 5, 5))), FRESH);
    assert!(matches!(log.refusal(&write(tag(1, 1, 6, 5))), Refusal::OldEpoch { .. }));
    // Another node in between: the attachment is over, its numbers with it.
    assert_eq!(log.apply(&attach(2, 2, 3).admitted(true)), attached(3, (3, 3), 12, 1));
    assert_eq!(log.apply(&attach(3, 1, 4).admitted(true)), attached(4, (4, 4), 13, 1));
}

#[test]
fn an_attachment_id_never_comes_back() {
    let mut log = Log::new();
    log.apply(&attach(0, 1, 1));
    log.apply(&write(tag(1, 1, 1, 1)));
    log.apply(&detach(1, false, true));
    assert_eq!(
        log.apply(&attach(1, 1, 1)),
        attached(2, (1, 2), 4, 1),
        "INV-ONCE: the same proposal, another id"
    );
}

#[test]
fn an_unconfirmed_change_waits_until_it_has_settled() {
    let mut log = Log::new();
    log.apply(&attach(0, 1, 1));
    log.apply(&forced(attach(1, 2, 2)));
    assert_eq!(log.refusal(&write(tag(2, 2, 1, 1))), Refusal::Unsettled);
    assert!(Refusal::Unsettled.retryable());
    // A second change while the first is unsettled: the holder in between was never admitted, so the wait goes on.
    log.apply(&forced(attach(2, 3, 3)));
    let unsettled = log.0.unsettled().expect("unsettled").clone();
    assert_eq!((unsettled.epoch, unsettled.holders.len()), (Epoch(2), 1));
    assert!(matches!(log.refusal(&settled(1)), Refusal::OldEpoch { .. }));
    assert!(matches!(log.refusal(&settled(9)), Refusal::EpochMismatch { .. }));
    assert_eq!(log.apply(&settled(2)), FRESH);
    assert_eq!(log.apply(&settled(2)), DUPLICATE);
    assert_eq!(log.apply(&write(tag(3, 3, 1, 1))), FRESH);
}

#[test]
fn a_late_settled_does_not_clear_a_later_change() {
    let mut log = Log::new();
    log.apply(&attach(0, 1, 1));
    log.apply(&forced(attach(1, 2, 2)));
    assert_eq!(log.apply(&settled(2)), FRESH);
    log.apply(&write(tag(2, 2, 1, 1)));
    log.apply(&detach(2, true, false));
    assert!(
        matches!(log.refusal(&settled(2)), Refusal::OldEpoch { .. }),
        "INV-SETTLE: it speaks of session 1"
    );
    assert_eq!(log.apply(&attach(3, 3, 3)), attached(4, (3, 4), 7, 1));
    assert_eq!(
        log.refusal(&write(tag(4, 3, 1, 1))),
        Refusal::Unsettled,
        "INV-SETTLE: session 2 may be reading"
    );
    assert_eq!(log.apply(&settled(3)), FRESH);
    assert_eq!(log.apply(&write(tag(4, 3, 1, 1))), FRESH);
}

#[test]
fn a_detach_bears_repetition_and_no_more() {
    for (confirmed, epoch_after) in [(true, 1), (false, 2)] {
        let mut log = Log::new();
        assert_eq!(log.apply(&detach(0, false, false)), DUPLICATE, "nobody ever held it");
        log.apply(&attach(0, 1, 1));
        let held = Refusal::HeldBy { node: NodeName::new("n1"), epoch: Epoch(1) };
        assert_eq!(log.refusal(&detach(1, false, false)), held);
        assert_eq!(log.refusal(&detach(0, true, true)), Refusal::OldEpoch { current: Epoch(1) });
        assert!(matches!(log.refusal(&detach(2, true, true)), Refusal::EpochMismatch { .. }));
        assert_eq!(log.apply(&detach(1, true, confirmed)), FRESH);
        assert_eq!(log.0.epoch(), Epoch(epoch_after));
        assert_eq!(log.apply(&detach(1, true, confirmed)), DUPLICATE);
        assert_eq!(log.apply(&detach(epoch_after, true, true)), DUPLICATE);
        log.apply(&attach(epoch_after, 2, 2));
        assert!(
            matches!(log.refusal(&detach(1, true, true)), Refusal::OldEpoch { .. }),
            "it ends no newer attachment"
        );
        assert!(log.0.holder().is_some());
    }
}

#[test]
fn a_read_only_holder_writes_nothing() {
    let mut log = Log::new();
    let mut command = attach(0, 1, 1);
    if let VolumeCommand::Attach { mode, .. } = &mut command {
        *mode = AttachMode::ReadOnly;
    }
    log.apply(&command);
    assert_eq!(log.refusal(&write(tag(1, 1, 1, 1))), Refusal::ReadOnly);
}

#[test]
fn trims_and_zeroes_are_data_commands_like_writes() {
    let mut log = Log::new();
    log.apply(&attach(0, 1, 1));
    let range = BlockRange::new(BlockIndex(0), 16);
    assert_eq!(log.apply(&VolumeCommand::Trim { tag: tag(1, 1, 1, 1), range }), FRESH);
    assert_eq!(log.apply(&VolumeCommand::Zero { tag: tag(1, 1, 1, 1), range }), DUPLICATE);
    log.apply(&forced(attach(1, 2, 2)));
    for command in [
        VolumeCommand::Trim { tag: tag(1, 1, 2, 2), range },
        VolumeCommand::Zero { tag: tag(1, 1, 2, 2), range },
    ] {
        assert!(matches!(log.refusal(&command), Refusal::OldEpoch { .. }), "INV-FENCE");
    }
}

#[test]
fn ranges_end_with_the_volume_and_refusals_use_up_no_number() {
    let mut log = Log::new();
    log.apply(&attach(0, 1, 1));
    let beyond = |tag| VolumeCommand::Trim { tag, range: BlockRange::new(BlockIndex(16), 1) };
    assert_eq!(log.refusal(&beyond(tag(1, 1, 2, 2))), Refusal::OutOfRange { blocks: 16 });
    assert_eq!(
        log.refusal(&write(tag(1, 1, 1, 1))),
        Refusal::TooOld { oldest: Seq(2) },
        "INV-LATE: was given up"
    );
    let wraps = VolumeCommand::Trim { tag: tag(1, 1, 2, 2), range: BlockRange::new(BlockIndex(u64::MAX), 1) };
    assert_eq!(log.refusal(&wraps), Refusal::OutOfRange { blocks: 16 });
    assert_eq!(log.apply(&VolumeCommand::Resize { size: ByteSize(17 * 4096) }), FRESH);
    assert_eq!(log.apply(&VolumeCommand::Resize { size: ByteSize(17 * 4096) }), DUPLICATE);
    assert!(matches!(
        log.refusal(&VolumeCommand::Resize { size: ByteSize(4096) }),
        Refusal::CannotShrink { .. }
    ));
    assert_eq!(log.apply(&beyond(tag(1, 1, 2, 2))), FRESH);
}

#[test]
fn malformed_commands_are_refused_at_the_door_and_at_apply() {
    let one = BlockRange::new(BlockIndex(0), 1);
    let good = tag(1, 1, 1, 1);
    let mut bad = vec![
        VolumeCommand::Write { tag: good, range: one, checksums: vec![] },
        VolumeCommand::Write { tag: good, range: BlockRange::new(BlockIndex(0), 0), checksums: vec![] },
        VolumeCommand::Write {
            tag: good,
            range: BlockRange::new(BlockIndex(0), 257),
            checksums: vec![0; 257],
        },
        VolumeCommand::Trim { tag: good, range: BlockRange::new(BlockIndex(0), (1 << 18) + 1) },
        VolumeCommand::Resize { size: ByteSize(0) },
        VolumeCommand::Resize { size: ByteSize(4097) },
        VolumeCommand::Resize { size: ByteSize((16 << 40) + 4096) },
        attach(1, 1, 0),
        VolumeCommand::SetPolicy {
            on_quorum_loss: OnQuorumLoss::Error { after_seconds: 0 },
            read_policy: ReadPolicy::Leader,
        },
    ];
    bad.extend(
        [(0, 0), (1, 0), (1, 2), (u64::MAX, 1)]
            .map(|(seq, oldest)| VolumeCommand::Zero { tag: tag(1, 1, seq, oldest), range: one }),
    );
    let mut log = Log::new();
    log.apply(&attach(0, 1, 1));
    let before = log.0.clone();
    for command in bad {
        let payload =
            if let VolumeCommand::Write { range, .. } = &command { range.bytes() as usize } else { 0 };
        assert!(matches!(command.validate(payload), Err(Refusal::Malformed(_))), "{command:?}");
        assert!(matches!(log.refusal(&command), Refusal::Malformed(_)), "{command:?}");
    }
    assert_eq!(log.0, before);
    assert_eq!(write(good).validate(4096), Ok(()));
    assert!(write(good).validate(4095).is_err(), "the data beside has the length of the range");
    assert!(attach(0, 1, 1).validate(1).is_err(), "only a write has data beside");
}

#[test]
fn the_policy_is_part_of_the_state() {
    let mut log = Log::new();
    let on_quorum_loss = OnQuorumLoss::Error { after_seconds: 30 };
    let command = VolumeCommand::SetPolicy { on_quorum_loss, read_policy: ReadPolicy::Leader };
    assert_eq!((log.apply(&command), log.apply(&command)), (FRESH, DUPLICATE));
    assert_eq!((log.0.on_quorum_loss(), log.0.read_policy()), (on_quorum_loss, ReadPolicy::Leader));
}
