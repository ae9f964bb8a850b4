//! The commands of a volume's log.
//!
//! Every encoding begins with the feature level that it needs: a replica that meets a higher one than its own stops,
//! and never skips. Block data of `Write` travels and is stored beside the encoded command.

use bytes::Bytes;
use holdfast_types::{
    AttachmentId, BLOCK_BYTES, BlockRange, ByteSize, DecodeError, Epoch, LogIndex, NodeName, OnQuorumLoss,
    ReadPolicy, Reader, Seq, SessionId, SnapshotId, StoreId, Writer, limits,
};

use crate::refusal::Refusal;
use crate::timers::Timers;
use crate::window::SEQ_MAX;

/// The newest feature level that this version knows.
pub const FEATURE_LEVEL: u16 = LEVEL_WITNESS;
/// The level of everything that is not newer.
pub(crate) const LEVEL_FIRST: u16 = 1;
/// The level of snapshots.
pub(crate) const LEVEL_SNAPSHOTS: u16 = 2;
/// The level of timers other than the defaults.
pub(crate) const LEVEL_TIMERS: u16 = 3;
/// The level of memberships that name witnesses.
pub const LEVEL_WITNESS: u16 = 4;

/// Who sends a data command, and which one it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tag {
    /// The epoch under which it is sent.
    pub epoch: Epoch,
    /// The session.
    pub session: SessionId,
    /// Its number within the attachment, from 1.
    pub seq: Seq,
    /// The lowest number that the session still waits for.
    pub oldest: Seq,
}

/// What an attachment may do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AttachMode {
    /// Read and write, alone.
    Exclusive,
    /// Read, alone.
    ReadOnly,
}

/// A command.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum VolumeCommand {
    /// Write blocks. Their data travels beside.
    Write {
        /// Sender and number.
        tag: Tag,
        /// Where.
        range: BlockRange,
        /// One `block_checksum` per block.
        checksums: Vec<u32>,
    },
    /// Give blocks back; they read as zeros.
    Trim {
        /// Sender and number.
        tag: Tag,
        /// Where.
        range: BlockRange,
    },
    /// Make blocks zero.
    Zero {
        /// Sender and number.
        tag: Tag,
        /// Where.
        range: BlockRange,
    },
    /// Take the next epoch: compare-and-set.
    Attach {
        /// The epoch that the sender believes current.
        expected: Epoch,
        /// The node that attaches.
        node: NodeName,
        /// The shard where the session runs, to reach it.
        store: StoreId,
        /// The session.
        session: SessionId,
        /// The id of the attachment if a new one begins; random. Only its upper half is used: the lower one becomes
        /// the epoch, which makes the id unique whatever is proposed. The answer tells it.
        attachment: AttachmentId,
        /// What it may do.
        mode: AttachMode,
        /// Take it from another node. Set by the leader, too, once the holder's lease has ended.
        force: bool,
        /// The holder before has confirmed its end, or there is none. Only the leader may say so.
        confirmed: bool,
    },
    /// End the attachment of an epoch.
    Detach {
        /// The epoch.
        epoch: Epoch,
        /// End it whether or not its holder has confirmed.
        force: bool,
        /// The holder has confirmed its end.
        confirmed: bool,
    },
    /// Every holder before this epoch has ended.
    Settled {
        /// The epoch that was unsettled.
        epoch: Epoch,
    },
    /// Grow the volume.
    Resize {
        /// The new size.
        size: ByteSize,
    },
    /// Change the policy.
    SetPolicy {
        /// What I/O does without a quorum.
        on_quorum_loss: OnQuorumLoss,
        /// Which replica serves reads.
        read_policy: ReadPolicy,
    },
    /// Freeze what the volume holds. Whether or not it is attached: everything applied before is in it.
    Snapshot {
        /// Drawn by who asks for it: a repetition names the same one.
        id: SnapshotId,
        /// Its name, unique among the volume's living snapshots.
        name: String,
        /// Wall time of who asks for it, in milliseconds since 1970. For people only; nothing depends on it.
        created_ms: u64,
    },
    /// Forget a snapshot; what only it holds is given back. Done already if there is none of that id.
    DropSnapshot {
        /// Which.
        id: SnapshotId,
    },
    /// Throw away what was changed after the newest snapshot. Only while nobody holds the volume.
    RestoreSnapshot {
        /// Which.
        id: SnapshotId,
        /// The epoch that the sender believes current: one that arrives late, after another has attached, must not
        /// throw away what that wrote.
        epoch: Epoch,
    },
    /// Begin to change the timers of the group.
    ChangeTimers {
        /// The timers that there will be.
        to: Timers,
    },
    /// End a change of timers. A leader proposes it only once it has waited (INV-TIMERS).
    TimersSettled {
        /// Where the change began: one that speaks of another change ends nothing.
        since: LogIndex,
    },
}

const WRITE: u8 = 1;
const TRIM: u8 = 2;
const ZERO: u8 = 3;
const ATTACH: u8 = 4;
const DETACH: u8 = 5;
const SETTLED: u8 = 6;
const RESIZE: u8 = 7;
const SET_POLICY: u8 = 8;
const SNAPSHOT: u8 = 9;
const DROP_SNAPSHOT: u8 = 10;
const RESTORE_SNAPSHOT: u8 = 11;
const CHANGE_TIMERS: u8 = 12;
const TIMERS_SETTLED: u8 = 13;

fn malformed(why: String) -> Result<(), Refusal> {
    Err(Refusal::Malformed(why))
}

fn check_range(range: BlockRange, max: u32) -> Result<(), Refusal> {
    if range.count == 0 || range.count > max {
        return malformed(format!("{} blocks, between 1 and {max} allowed", range.count));
    }
    Ok(())
}

impl Tag {
    fn check(&self) -> Result<(), Refusal> {
        if self.oldest == Seq::ZERO || self.oldest > self.seq || self.seq > SEQ_MAX {
            return malformed(format!("request number {} with oldest {}", self.seq, self.oldest));
        }
        Ok(())
    }
    fn encode(&self, out: &mut Writer) {
        self.epoch.encode(out);
        self.session.encode(out);
        self.seq.encode(out);
        self.oldest.encode(out);
    }
    fn decode(input: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            epoch: Epoch::decode(input)?,
            session: SessionId::decode(input)?,
            seq: Seq::decode(input)?,
            oldest: Seq::decode(input)?,
        })
    }
}

pub(crate) fn put_mode(out: &mut Writer, mode: AttachMode) {
    out.u8(match mode {
        AttachMode::Exclusive => 1,
        AttachMode::ReadOnly => 2,
    });
}

pub(crate) fn get_mode(input: &mut Reader<'_>) -> Result<AttachMode, DecodeError> {
    match input.u8()? {
        1 => Ok(AttachMode::Exclusive),
        2 => Ok(AttachMode::ReadOnly),
        other => Err(DecodeError::Unknown { what: "attach mode", value: other.into() }),
    }
}

pub(crate) fn put_policy(out: &mut Writer, on_quorum_loss: OnQuorumLoss, read_policy: ReadPolicy) {
    match on_quorum_loss {
        OnQuorumLoss::Suspend => out.u8(1),
        OnQuorumLoss::Error { after_seconds } => {
            out.u8(2);
            out.u32(after_seconds);
        }
    }
    out.u8(match read_policy {
        ReadPolicy::Nearest => 1,
        ReadPolicy::Leader => 2,
    });
}

pub(crate) fn get_policy(input: &mut Reader<'_>) -> Result<(OnQuorumLoss, ReadPolicy), DecodeError> {
    let on_quorum_loss = match input.u8()? {
        1 => OnQuorumLoss::Suspend,
        2 => OnQuorumLoss::Error { after_seconds: input.u32()? },
        other => return Err(DecodeError::Unknown { what: "policy without quorum", value: other.into() }),
    };
    let read_policy = match input.u8()? {
        1 => ReadPolicy::Nearest,
        2 => ReadPolicy::Leader,
        other => return Err(DecodeError::Unknown { what: "read policy", value: other.into() }),
    };
    Ok((on_quorum_loss, read_policy))
}

/// Refuses an encoding that this version must not read, by name.
pub fn check_level(level: u16) -> Result<(), DecodeError> {
    if level == 0 || level > FEATURE_LEVEL {
        return Err(DecodeError::Unknown { what: "feature level (upgrade this node)", value: level.into() });
    }
    Ok(())
}

impl VolumeCommand {
    /// The tag of a data command.
    pub fn tag(&self) -> Option<&Tag> {
        match self {
            Self::Write { tag, .. } | Self::Trim { tag, .. } | Self::Zero { tag, .. } => Some(tag),
            _ => None,
        }
    }

    /// The feature level that a replica needs to apply it.
    pub fn level(&self) -> u16 {
        match self {
            Self::Snapshot { .. } | Self::DropSnapshot { .. } | Self::RestoreSnapshot { .. } => {
                LEVEL_SNAPSHOTS
            }
            Self::ChangeTimers { .. } | Self::TimersSettled { .. } => LEVEL_TIMERS,
            _ => LEVEL_FIRST,
        }
    }

    /// Whether it makes, drops or restores a snapshot.
    pub fn is_of_snapshots(&self) -> bool {
        self.level() == LEVEL_SNAPSHOTS
    }

    /// The blocks that a data command touches.
    pub fn range(&self) -> Option<BlockRange> {
        match self {
            Self::Write { range, .. } | Self::Trim { range, .. } | Self::Zero { range, .. } => Some(*range),
            _ => None,
        }
    }

    /// An Attach as the leader proposes it once `lease::decide_attach` admitted it: `force`, because the courtesy
    /// towards the holder is done with, and what the leader knows of the holder's end instead of what the caller
    /// claimed. Other commands stay as they are.
    #[must_use]
    pub fn admitted(mut self, known: bool) -> Self {
        if let Self::Attach { force, confirmed, .. } = &mut self {
            *force = true;
            *confirmed = known;
        }
        self
    }

    /// Refuses what is wrong whatever the volume's state: counts, bounds, and the length of the data beside
    /// (`payload_bytes`).
    pub fn validate(&self, payload_bytes: usize) -> Result<(), Refusal> {
        let expected = match self {
            Self::Write { range, .. } => range.bytes(),
            _ => 0,
        };
        if payload_bytes as u64 != expected {
            return malformed(format!("{payload_bytes} bytes of data, {expected} expected"));
        }
        self.check()
    }

    /// [`Self::validate`] without the data beside. Applying repeats it: a state machine trusts no proposer.
    pub(crate) fn check(&self) -> Result<(), Refusal> {
        match self {
            Self::Write { tag, range, checksums } => {
                if checksums.len() != range.count as usize {
                    return malformed(format!("{} checksums for {} blocks", checksums.len(), range.count));
                }
                tag.check()?;
                check_range(*range, limits::REQUEST_BLOCKS_MAX)
            }
            Self::Trim { tag, range } | Self::Zero { tag, range } => {
                tag.check()?;
                check_range(*range, limits::TRIM_BLOCKS_MAX)
            }
            Self::Attach { node, session, attachment, .. } => {
                if *session == SessionId::NIL || *attachment == AttachmentId::NIL {
                    return malformed("an attach needs a session and an attachment id".into());
                }
                limits::check_name("node", node.as_str()).or_else(|error| malformed(error.to_string()))
            }
            Self::Resize { size } => {
                let whole = size.0.is_multiple_of(BLOCK_BYTES as u64) && size.0 > 0;
                if !whole || size.0 > limits::VOLUME_BYTES_MAX {
                    return malformed(format!("{} bytes is no size of a volume", size.0));
                }
                Ok(())
            }
            Self::SetPolicy { on_quorum_loss: OnQuorumLoss::Error { after_seconds: 0 }, .. } => {
                malformed("an error after 0 seconds: give at least 1".into())
            }
            Self::Snapshot { id: SnapshotId::NIL, .. }
            | Self::DropSnapshot { id: SnapshotId::NIL }
            | Self::RestoreSnapshot { id: SnapshotId::NIL, .. } => malformed("a snapshot needs an id".into()),
            Self::Snapshot { name, .. } => {
                limits::check_name("snapshot", name).or_else(|error| malformed(error.to_string()))
            }
            Self::DropSnapshot { .. } | Self::RestoreSnapshot { .. } => Ok(()),
            Self::ChangeTimers { to } => to.check(),
            Self::Detach { .. }
            | Self::Settled { .. }
            | Self::SetPolicy { .. }
            | Self::TimersSettled { .. } => Ok(()),
        }
    }

    /// The command as bytes; see docs/FORMAT.md.
    pub fn encode(&self) -> Bytes {
        let mut out = Writer::with_capacity(96);
        out.u16(self.level());
        match self {
            Self::Write { tag, range, checksums } => {
                out.u8(WRITE);
                tag.encode(&mut out);
                range.encode(&mut out);
                out.u32(checksums.len() as u32);
                checksums.iter().for_each(|sum| out.u32(*sum));
            }
            Self::Trim { tag, range } => {
                out.u8(TRIM);
                tag.encode(&mut out);
                range.encode(&mut out);
            }
            Self::Zero { tag, range } => {
                out.u8(ZERO);
                tag.encode(&mut out);
                range.encode(&mut out);
            }
            Self::Attach { expected, node, store, session, attachment, mode, force, confirmed } => {
                out.u8(ATTACH);
                expected.encode(&mut out);
                node.encode(&mut out);
                store.encode(&mut out);
                session.encode(&mut out);
                attachment.encode(&mut out);
                put_mode(&mut out, *mode);
                out.bool(*force);
                out.bool(*confirmed);
            }
            Self::Detach { epoch, force, confirmed } => {
                out.u8(DETACH);
                epoch.encode(&mut out);
                out.bool(*force);
                out.bool(*confirmed);
            }
            Self::Settled { epoch } => {
                out.u8(SETTLED);
                epoch.encode(&mut out);
            }
            Self::Resize { size } => {
                out.u8(RESIZE);
                out.u64(size.0);
            }
            Self::SetPolicy { on_quorum_loss, read_policy } => {
                out.u8(SET_POLICY);
                put_policy(&mut out, *on_quorum_loss, *read_policy);
            }
            Self::Snapshot { id, name, created_ms } => {
                out.u8(SNAPSHOT);
                id.encode(&mut out);
                out.text(name);
                out.u64(*created_ms);
            }
            Self::DropSnapshot { id } => {
                out.u8(DROP_SNAPSHOT);
                id.encode(&mut out);
            }
            Self::RestoreSnapshot { id, epoch } => {
                out.u8(RESTORE_SNAPSHOT);
                id.encode(&mut out);
                epoch.encode(&mut out);
            }
            Self::ChangeTimers { to } => {
                out.u8(CHANGE_TIMERS);
                to.encode(&mut out);
            }
            Self::TimersSettled { since } => {
                out.u8(TIMERS_SETTLED);
                since.encode(&mut out);
            }
        }
        out.finish()
    }

    /// Reads what [`Self::encode`] wrote. A command above this version's feature level is an error: the replica that
    /// meets it must be upgraded, and must not skip it.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(bytes);
        let input = &mut reader;
        let level = input.u16()?;
        check_level(level)?;
        let kind = input.u8()?;
        let command = match kind {
            WRITE => {
                let tag = Tag::decode(input)?;
                let range = BlockRange::decode(input)?;
                let count = input.count("checksums", limits::REQUEST_BLOCKS_MAX as usize)?;
                Self::Write {
                    tag,
                    range,
                    checksums: (0..count).map(|_| input.u32()).collect::<Result<_, _>>()?,
                }
            }
            TRIM => Self::Trim { tag: Tag::decode(input)?, range: BlockRange::decode(input)? },
            ZERO => Self::Zero { tag: Tag::decode(input)?, range: BlockRange::decode(input)? },
            ATTACH => Self::Attach {
                expected: Epoch::decode(input)?,
                node: NodeName::decode(input)?,
                store: StoreId::decode(input)?,
                session: SessionId::decode(input)?,
                attachment: AttachmentId::decode(input)?,
                mode: get_mode(input)?,
                force: input.bool()?,
                confirmed: input.bool()?,
            },
            DETACH => {
                Self::Detach { epoch: Epoch::decode(input)?, force: input.bool()?, confirmed: input.bool()? }
            }
            SETTLED => Self::Settled { epoch: Epoch::decode(input)? },
            RESIZE => Self::Resize { size: ByteSize(input.u64()?) },
            SET_POLICY => {
                let (on_quorum_loss, read_policy) = get_policy(input)?;
                Self::SetPolicy { on_quorum_loss, read_policy }
            }
            SNAPSHOT => Self::Snapshot {
                id: SnapshotId::decode(input)?,
                name: input.text(limits::NAME_LENGTH_MAX)?,
                created_ms: input.u64()?,
            },
            DROP_SNAPSHOT => Self::DropSnapshot { id: SnapshotId::decode(input)? },
            RESTORE_SNAPSHOT => {
                Self::RestoreSnapshot { id: SnapshotId::decode(input)?, epoch: Epoch::decode(input)? }
            }
            CHANGE_TIMERS => Self::ChangeTimers { to: Timers::decode(input)? },
            TIMERS_SETTLED => Self::TimersSettled { since: LogIndex::decode(input)? },
            other => return Err(DecodeError::Unknown { what: "volume command", value: other.into() }),
        };
        if level < command.level() {
            return Err(DecodeError::Unknown { what: "volume command at this level", value: kind.into() });
        }
        reader.end()?;
        Ok(command)
    }
}
