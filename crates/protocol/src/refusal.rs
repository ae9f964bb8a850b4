//! Why a command was refused. A refusal is an answer of the state machine, equal on every replica, or of the leader, which did
//! not even propose it.

use holdfast_types::{ByteSize, DecodeError, Epoch, NodeName, Reader, Seq, Writer, limits};

/// The reason.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The command's epoch is over.
    #[error("the epoch is over: the volume is at epoch {current}")]
    OldEpoch {
        /// The volume's epoch.
        current: Epoch,
    },
    /// Nobody holds the volume.
    #[error("nobody holds the volume: attach it first")]
    NotAttached,
    /// Another session holds the epoch.
    #[error("another session holds the volume's current epoch")]
    NotHolder,
    /// The holder attached to read only.
    #[error("the volume is attached read-only")]
    ReadOnly,
    /// The former holder's lease has not ended yet. Ask again.
    #[error("the former holder's lease has not ended yet: ask again")]
    Unsettled,
    /// The number is below what the session still waits for: it must not land any more.
    #[error("the request was given up: the session waits for nothing below {oldest}")]
    TooOld {
        /// The lowest number still waited for.
        oldest: Seq,
    },
    /// The number is too far ahead.
    #[error("the request's number is beyond the window of {} requests", limits::WINDOW_SEQS_MAX)]
    BeyondWindow,
    /// The range is beyond the volume.
    #[error("the range is beyond the volume's {blocks} blocks")]
    OutOfRange {
        /// Blocks of the volume.
        blocks: u64,
    },
    /// The command names an epoch that is not the volume's.
    #[error("the volume is at epoch {current}{}, not the expected one: ask again with it", held(.holder))]
    EpochMismatch {
        /// The volume's epoch.
        current: Epoch,
        /// The node that holds it.
        holder: Option<NodeName>,
    },
    /// Another node holds the volume and is alive.
    #[error("the volume is attached to node {node} at epoch {epoch}: detach it there first, or use --force")]
    HeldBy {
        /// The holder's node.
        node: NodeName,
        /// Its epoch.
        epoch: Epoch,
    },
    /// A volume cannot shrink.
    #[error("a volume cannot shrink: it has {blocks} blocks")]
    CannotShrink {
        /// Blocks of the volume.
        blocks: u64,
    },
    /// The command is wrong by itself.
    #[error("the command is malformed: {0}")]
    Malformed(String),
    /// Another snapshot of the volume has the name.
    #[error("the volume has a snapshot of that name: choose another name, or delete it first")]
    SnapshotNameTaken,
    /// No more snapshots.
    #[error(
        "the volume has {} snapshots, as many as it can have: delete some first",
        limits::SNAPSHOTS_PER_VOLUME_MAX
    )]
    SnapshotsFull,
    /// With one more snapshot the volume could grow beyond its size and its snapshot quota.
    #[error(
        "the volume holds {}, all of which a snapshot may have to keep, and its snapshot quota is {}",
        ByteSize(*.held), ByteSize(*.quota)
    )]
    SnapshotQuota {
        /// Bytes that the volume and its snapshots hold.
        held: u64,
        /// Bytes that snapshots may add to the volume's size.
        quota: u64,
    },
    /// As [`Self::SnapshotQuota`], but what was written or deleted last is still being settled. Ask again.
    #[error(
        "what was written or deleted last still counts for the volume's snapshot quota: ask again in a moment"
    )]
    SnapshotsUnsettled,
    /// There is no such snapshot.
    #[error("the volume has no such snapshot: `holdfast snapshot list` shows those it has")]
    NoSuchSnapshot,
    /// The snapshot was deleted, perhaps before it was made: a late repetition does not bring it back.
    #[error("the snapshot was deleted meanwhile: ask for a new one")]
    SnapshotDropped,
    /// Only the newest snapshot can be restored: what was snapshotted after it would hang in the air.
    #[error("there are newer snapshots, which must be deleted first: {}{}", .names.join(", "), and_more(*.more))]
    NewerSnapshots {
        /// Their names, newest first, [`NEWER_NAMES_MAX`] at most.
        names: Vec<String>,
        /// How many more there are.
        more: u32,
    },
    /// The volume's timers are being changed to others, or the change cannot end before a lease has. Ask again.
    #[error("the volume's timers are being changed: ask again when that has ended")]
    TimersChanging,
    /// Somebody holds the volume, and what is asked for needs that nobody does.
    #[error("the volume is attached to node {node}: detach it first")]
    Attached {
        /// The holder's node.
        node: NodeName,
    },
}

/// Names that [`Refusal::NewerSnapshots`] tells.
pub const NEWER_NAMES_MAX: usize = 8;

fn and_more(more: u32) -> String {
    if more == 0 { String::new() } else { format!(" and {more} more") }
}

fn held(holder: &Option<NodeName>) -> String {
    holder.as_ref().map(|node| format!(" and held by node {node}")).unwrap_or_default()
}

impl Refusal {
    /// Whether the very same command may succeed later. Everything else is final for this command.
    pub fn retryable(&self) -> bool {
        matches!(self, Self::Unsettled | Self::BeyondWindow | Self::TimersChanging | Self::SnapshotsUnsettled)
    }

    pub(crate) fn encode(&self, out: &mut Writer) {
        match self {
            Self::OldEpoch { current } => {
                out.u8(1);
                current.encode(out);
            }
            Self::NotAttached => out.u8(2),
            Self::NotHolder => out.u8(3),
            Self::ReadOnly => out.u8(4),
            Self::Unsettled => out.u8(5),
            Self::TooOld { oldest } => {
                out.u8(6);
                oldest.encode(out);
            }
            Self::BeyondWindow => out.u8(7),
            Self::OutOfRange { blocks } => {
                out.u8(8);
                out.u64(*blocks);
            }
            Self::EpochMismatch { current, holder } => {
                out.u8(9);
                current.encode(out);
                out.bool(holder.is_some());
                if let Some(node) = holder {
                    node.encode(out);
                }
            }
            Self::HeldBy { node, epoch } => {
                out.u8(10);
                node.encode(out);
                epoch.encode(out);
            }
            Self::CannotShrink { blocks } => {
                out.u8(11);
                out.u64(*blocks);
            }
            Self::Malformed(why) => {
                out.u8(12);
                let end =
                    (0..=why.len().min(limits::TEXT_LENGTH_MAX)).rev().find(|n| why.is_char_boundary(*n));
                out.text(&why[..end.unwrap_or(0)]);
            }
            Self::SnapshotNameTaken => out.u8(13),
            Self::SnapshotsFull => out.u8(14),
            Self::NoSuchSnapshot => out.u8(15),
            Self::SnapshotDropped => out.u8(16),
            Self::NewerSnapshots { names, more } => {
                out.u8(17);
                out.u32(names.len() as u32);
                names.iter().for_each(|name| out.text(name));
                out.u32(*more);
            }
            Self::Attached { node } => {
                out.u8(18);
                node.encode(out);
            }
            Self::TimersChanging => out.u8(19),
            Self::SnapshotQuota { held, quota } => {
                out.u8(20);
                out.u64(*held);
                out.u64(*quota);
            }
            Self::SnapshotsUnsettled => out.u8(21),
        }
    }

    pub(crate) fn decode(input: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(match input.u8()? {
            1 => Self::OldEpoch { current: Epoch::decode(input)? },
            2 => Self::NotAttached,
            3 => Self::NotHolder,
            4 => Self::ReadOnly,
            5 => Self::Unsettled,
            6 => Self::TooOld { oldest: Seq::decode(input)? },
            7 => Self::BeyondWindow,
            8 => Self::OutOfRange { blocks: input.u64()? },
            9 => Self::EpochMismatch {
                current: Epoch::decode(input)?,
                holder: if input.bool()? { Some(NodeName::decode(input)?) } else { None },
            },
            10 => Self::HeldBy { node: NodeName::decode(input)?, epoch: Epoch::decode(input)? },
            11 => Self::CannotShrink { blocks: input.u64()? },
            12 => Self::Malformed(input.text(limits::TEXT_LENGTH_MAX)?),
            13 => Self::SnapshotNameTaken,
            14 => Self::SnapshotsFull,
            15 => Self::NoSuchSnapshot,
            16 => Self::SnapshotDropped,
            17 => {
                let count = input.count("snapshot names", NEWER_NAMES_MAX)?;
                let names =
                    (0..count).map(|_| input.text(limits::NAME_LENGTH_MAX)).collect::<Result<_, _>>()?;
                Self::NewerSnapshots { names, more: input.u32()? }
            }
            18 => Self::Attached { node: NodeName::decode(input)? },
            19 => Self::TimersChanging,
            20 => Self::SnapshotQuota { held: input.u64()?, quota: input.u64()? },
            21 => Self::SnapshotsUnsettled,
            other => return Err(DecodeError::Unknown { what: "refusal", value: other.into() }),
        })
    }
}
