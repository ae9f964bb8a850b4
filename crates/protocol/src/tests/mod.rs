//! Tests of the rules together: rule by rule, against a reference model, and with planted faults.

mod codec;
mod fence;
mod lease;
mod model;
mod reference;
mod rest;
mod rules;
mod snapshots;
mod timers;

use holdfast_types::{
    AttachmentId, BlockIndex, BlockRange, ByteSize, Epoch, LogIndex, NodeName, Seq, SessionId, SnapshotId,
    StoreId,
};

use crate::command::{AttachMode, Tag, VolumeCommand};
use crate::volume::{VolumeReply, VolumeState};

/// Blocks of the volumes under test.
const BLOCKS: u64 = 16;

fn volume() -> VolumeState {
    VolumeState::new(ByteSize(BLOCKS * 4096))
}

/// An Attach by node `n<node>` with a session; its attachment id is made of the session's.
fn attach(expected: u64, node: u8, session: u128) -> VolumeCommand {
    VolumeCommand::Attach {
        expected: Epoch(expected),
        node: NodeName::new(format!("n{node}")),
        store: StoreId(node.into()),
        session: SessionId(session),
        attachment: AttachmentId(session << 64 | 77),
        mode: AttachMode::Exclusive,
        force: false,
        confirmed: false,
    }
}

/// The same as an operator sends it with force.
fn forced(mut command: VolumeCommand) -> VolumeCommand {
    if let VolumeCommand::Attach { force, .. } = &mut command {
        *force = true;
    }
    command
}

fn tag(epoch: u64, session: u128, seq: u64, oldest: u64) -> Tag {
    Tag { epoch: Epoch(epoch), session: SessionId(session), seq: Seq(seq), oldest: Seq(oldest) }
}

fn write(tag: Tag) -> VolumeCommand {
    let range = BlockRange::new(BlockIndex(tag.seq.0 % BLOCKS), 1);
    VolumeCommand::Write { tag, range, checksums: vec![7] }
}

/// A creation of snapshot `s<id>`.
fn snapshot(id: u128) -> VolumeCommand {
    VolumeCommand::Snapshot { id: SnapshotId(id), name: format!("s{id}"), created_ms: 1_700_000_000_000 }
}

/// The answer to an Attach; `attachment` is the session and the epoch that began it.
fn attached(epoch: u64, attachment: (u128, u128), index: u64, next: u64) -> VolumeReply {
    VolumeReply::Attached {
        epoch: Epoch(epoch),
        attachment: AttachmentId(attachment.0 << 64 | attachment.1),
        index: LogIndex(index),
        next: Seq(next),
    }
}

const FRESH: VolumeReply = VolumeReply::Done { fresh: true };
const DUPLICATE: VolumeReply = VolumeReply::Done { fresh: false };
