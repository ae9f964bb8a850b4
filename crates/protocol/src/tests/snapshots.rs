//! INV-SNAPSHOT and INV-RESTORE rule by rule, and a store of layers as small as can be: what its chain of layers
//! shows must be what the reference's full copies hold.

use std::collections::BTreeMap;

use holdfast_types::{ByteSize, Epoch, LogIndex, NodeName, SnapshotId, limits};

use super::reference::{Content, Reference};
use super::rules::{Log, detach};
use super::{DUPLICATE, FRESH, attach, forced, snapshot, tag, volume, write};
use crate::command::VolumeCommand;
use crate::volume::{Layer, Refusal, VolumeReply, VolumeState};

/// What each layer holds by itself, from the oldest to the one that is written; `None` hides what is below.
pub(super) struct Layered(Vec<BTreeMap<u64, Option<u64>>>);

impl Default for Layered {
    fn default() -> Self {
        Self(vec![BTreeMap::new()])
    }
}

impl Layered {
    /// What a command does to the layers; `before` is the state that it was applied to.
    pub(super) fn effect(
        &mut self,
        index: LogIndex,
        command: &VolumeCommand,
        reply: &VolumeReply,
        before: &VolumeState,
    ) {
        let fresh = *reply == VolumeReply::Done { fresh: true }
            || matches!(reply, VolumeReply::Snapshotted { index: at, .. } if *at == index);
        if !fresh {
            return;
        }
        let place = |id: &SnapshotId| before.snapshots().iter().position(|snapshot| snapshot.id == *id);
        match command {
            VolumeCommand::Snapshot { .. } => self.0.push(BTreeMap::new()),
            VolumeCommand::DropSnapshot { id } => {
                let at = place(id).expect("only what is there is dropped freshly");
                let above = self.0.remove(at + 1);
                self.0[at].extend(above);
            }
            VolumeCommand::RestoreSnapshot { .. } => self.0.last_mut().expect("the top").clear(),
            _ => {
                let top = self.0.last_mut().expect("the top");
                for block in command.range().iter().flat_map(|range| range.blocks()) {
                    let data = matches!(command, VolumeCommand::Write { .. }).then_some(index.0);
                    top.insert(block.0, data);
                }
            }
        }
    }

    fn shown(&self, layers: usize) -> Content {
        let mut shown = BTreeMap::new();
        self.0[..layers].iter().for_each(|layer| shown.extend(layer));
        shown.into_iter().filter_map(|(block, data)| Some((block, data?))).collect()
    }

    /// The chain of the state is as long as ours and in order, and shows what the copies hold.
    pub(super) fn check(&self, state: &VolumeState, reference: &Reference) -> Result<(), String> {
        let layers = state.layers();
        let (head, copies) = reference.contents();
        if layers.len() != self.0.len() || copies.len() + 1 != self.0.len() {
            return Err(format!("INV-SNAPSHOT: layers {layers:?} for {} copies", copies.len()));
        }
        let ordered = |pair: &[Layer]| pair[0].frozen.is_some_and(|frozen| frozen <= pair[1].began);
        if !layers.windows(2).all(ordered) || layers.last().is_none_or(|top| top.frozen.is_some()) {
            return Err(format!("INV-SNAPSHOT: layers out of order: {layers:?}"));
        }
        for (at, copy) in copies.into_iter().chain([head]).enumerate() {
            if self.shown(at + 1) != *copy {
                return Err(format!("INV-SNAPSHOT: layer {at} shows {:?}, not {copy:?}", self.shown(at + 1)));
            }
        }
        Ok(())
    }
}

fn drop_of(id: u128) -> VolumeCommand {
    VolumeCommand::DropSnapshot { id: SnapshotId(id) }
}

fn restore(id: u128, epoch: u64) -> VolumeCommand {
    VolumeCommand::RestoreSnapshot { id: SnapshotId(id), epoch: Epoch(epoch) }
}

fn made(index: u64) -> VolumeReply {
    VolumeReply::Snapshotted { index: LogIndex(index), size: volume().size() }
}

#[test]
fn a_creation_bears_repetition_and_answers_equally() {
    let mut log = Log::new();
    log.apply(&attach(0, 1, 1));
    assert_eq!(log.apply(&snapshot(1)), made(2));
    log.apply(&write(tag(1, 1, 1, 1)));
    log.apply(&VolumeCommand::Resize { size: ByteSize(32 * 4096) });
    assert_eq!(log.apply(&snapshot(1)), made(2), "INV-SNAPSHOT: also after writes and growth");
    assert_eq!(log.0.snapshots().len(), 1);
    let other = VolumeCommand::Snapshot { id: SnapshotId(2), name: "s1".into(), created_ms: 0 };
    assert_eq!(log.refusal(&other), Refusal::SnapshotNameTaken);
    assert_eq!(log.apply(&drop_of(1)), FRESH);
    assert_eq!(log.apply(&drop_of(1)), DUPLICATE);
    assert_eq!(log.refusal(&snapshot(1)), Refusal::SnapshotDropped, "INV-SNAPSHOT: a late repetition");
    assert_eq!(
        log.apply(&other),
        VolumeReply::Snapshotted { index: LogIndex(10), size: ByteSize(32 * 4096) },
        "the name is free again"
    );
}

#[test]
fn a_drop_that_comes_before_the_creation_forbids_it() {
    let mut log = Log::new();
    assert_eq!(log.apply(&drop_of(1)), DUPLICATE);
    assert_eq!(log.refusal(&snapshot(1)), Refusal::SnapshotDropped);
    assert!(log.0.snapshots().is_empty());
}

#[test]
fn dropped_layers_become_one_with_the_next() {
    let mut log = Log::new();
    for id in 1..=3 {
        log.apply(&snapshot(id));
    }
    log.apply(&restore(3, 0));
    let layer = |began, frozen: Option<u64>| Layer { began: LogIndex(began), frozen: frozen.map(LogIndex) };
    assert_eq!(
        log.0.layers(),
        [layer(0, Some(1)), layer(1, Some(2)), layer(2, Some(3)), layer(4, None)],
        "the top begins with the restore"
    );
    log.apply(&drop_of(2));
    assert_eq!(log.0.layers(), [layer(0, Some(1)), layer(1, Some(3)), layer(4, None)]);
    log.apply(&drop_of(3));
    assert_eq!(log.0.layers(), [layer(0, Some(1)), layer(1, None)]);
    log.apply(&drop_of(1));
    assert_eq!(log.0.layers(), [layer(0, None)]);
}

#[test]
fn only_the_newest_snapshot_of_a_volume_that_nobody_may_use_is_restored() {
    let mut log = Log::new();
    log.apply(&attach(0, 1, 1));
    for id in 1..=11 {
        log.apply(&snapshot(id));
    }
    let holder = Refusal::Attached { node: NodeName::new("n1") };
    assert_eq!(log.refusal(&restore(11, 1)), holder, "INV-RESTORE");
    log.apply(&forced(attach(1, 2, 2)));
    log.apply(&detach(2, true, true));
    assert_eq!(log.refusal(&restore(11, 2)), Refusal::Unsettled, "INV-RESTORE: n1 may still be reading");
    log.apply(&VolumeCommand::Settled { epoch: Epoch(2) });
    let names = (4..=11).rev().map(|id| format!("s{id}")).collect();
    let newer = Refusal::NewerSnapshots { names, more: 1 };
    assert_eq!(log.refusal(&restore(2, 2)), newer);
    assert!(newer.to_string().ends_with("s4 and 1 more"), "{newer}");
    assert_eq!(log.refusal(&restore(12, 2)), Refusal::NoSuchSnapshot);
    assert_eq!(log.apply(&restore(11, 2)), FRESH);
    assert_eq!(log.apply(&restore(11, 2)), DUPLICATE);
}

#[test]
fn a_restore_that_arrives_late_throws_nothing_away() {
    let mut log = Log::new();
    log.apply(&snapshot(1));
    assert_eq!(log.apply(&restore(1, 0)), FRESH);
    log.apply(&attach(0, 1, 1));
    log.apply(&write(tag(1, 1, 1, 1)));
    log.apply(&detach(1, false, true));
    let before = log.0.clone();
    assert_eq!(log.refusal(&restore(1, 0)), Refusal::OldEpoch { current: Epoch(1) }, "INV-RESTORE");
    assert_eq!(log.0, before);
    assert_eq!(log.apply(&restore(1, 1)), FRESH, "who knows of the holder in between may");
}

#[test]
fn the_number_of_snapshots_and_the_size_of_the_state_are_bounded() {
    let mut log = Log::new();
    for id in 0..2000_u128 {
        log.apply(&drop_of(id + 1_000_000));
    }
    let name = |id: u128| format!("{id:0>128}");
    let long = |id| VolumeCommand::Snapshot { id: SnapshotId(id), name: name(id), created_ms: u64::MAX };
    for id in 1..=limits::SNAPSHOTS_PER_VOLUME_MAX as u128 {
        assert!(matches!(log.apply(&long(id)), VolumeReply::Snapshotted { .. }));
    }
    assert_eq!(log.refusal(&long(9999)), Refusal::SnapshotsFull);
    log.apply(&attach(0, 1, 1));
    for seq in 2..=limits::WINDOW_SEQS_MAX {
        log.apply(&write(tag(1, 1, seq, 1)));
    }
    log.apply(&forced(attach(1, 2, 2)));
    let bytes = log.0.encode();
    assert!(bytes.len() <= limits::VOLUME_STATE_BYTES_MAX, "{} bytes", bytes.len());
    assert_eq!(VolumeState::decode(&bytes), Ok(log.0.clone()));
    log.apply(&drop_of(1));
    assert!(matches!(log.apply(&long(9999)), VolumeReply::Snapshotted { .. }), "there is room again");
}

#[test]
fn malformed_snapshots_are_refused_at_the_door() {
    let named = |name: &str| VolumeCommand::Snapshot { id: SnapshotId(1), name: name.into(), created_ms: 0 };
    let nil = VolumeCommand::Snapshot { id: SnapshotId::NIL, name: "a".into(), created_ms: 0 };
    for command in [nil, drop_of(0), restore(0, 0), named(""), named("a@b"), named(&"a".repeat(129))] {
        assert!(matches!(command.validate(0), Err(Refusal::Malformed(_))), "{command:?}");
        assert!(matches!(Log::new().refusal(&command), Refusal::Malformed(_)), "{command:?}");
    }
    assert!(snapshot(1).validate(1).is_err(), "only a write has data beside");
}
