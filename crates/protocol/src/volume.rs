//! The fencing state of a volume: who may write, and which requests were applied. Replicated; deterministic.
//!
//! INV-FENCE: at apply, a data command is refused unless its epoch is the current one, somebody holds it, and the
//! sender is the holder. So once a newer Attach or a Detach is in the log before it, nothing older changes anything,
//! whatever clocks say.
//!
//! An epoch names one tenure: every Attach takes the next one, and so does a Detach that the holder did not confirm.
//! Therefore each unconfirmed change has an epoch of its own, and a `Settled` that arrives late, or twice, cannot
//! clear a later one (INV-SETTLE).

use bytes::Bytes;
use holdfast_types::{
    AttachmentId, BlockRange, ByteSize, DecodeError, Epoch, LogIndex, NodeName, OnQuorumLoss, ReadPolicy,
    Reader, Seq, SessionId, SnapshotId, StoreId, Writer, limits,
};

use crate::command::{
    AttachMode, LEVEL_FIRST, LEVEL_SNAPSHOTS, LEVEL_TIMERS, Tag, VolumeCommand, check_level, get_mode,
    get_policy, put_mode, put_policy,
};
use crate::planted::is_planted;
pub use crate::refusal::Refusal;
use crate::snapshots::Snapshots;
pub use crate::snapshots::{Layer, Snapshot};
use crate::timers::VolumeTimers;
use crate::window::{Admission, Window};

/// Former holders that one change leaves unsettled, at most: one, and two once migration has two live epochs.
const UNSETTLED_MAX: usize = 2;

/// Who holds a volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Holder {
    /// The node.
    pub node: NodeName,
    /// The shard where the session runs.
    pub store: StoreId,
    /// The session.
    pub session: SessionId,
    /// The attachment.
    pub attachment: AttachmentId,
    /// What it may do.
    pub mode: AttachMode,
    /// Its epoch.
    pub epoch: Epoch,
}

/// Former holders that have not confirmed their end.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Unsettled {
    /// The epoch that the unconfirmed change began; `Settled` names it.
    pub epoch: Epoch,
    /// The former holders. One who was replaced before its own epoch settled is not among them: no replica ever
    /// admitted a read or write of it.
    pub holders: Vec<Holder>,
}

/// What users may set on a volume in use.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VolumePolicy {
    /// What I/O does without a quorum.
    pub on_quorum_loss: OnQuorumLoss,
    /// Which replica serves reads.
    pub read_policy: ReadPolicy,
}

/// The answer to a command.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum VolumeReply {
    /// Done. Not `fresh`: it had been done before, and its effect must not be repeated.
    Done {
        /// Whether the effect is to be carried out.
        fresh: bool,
    },
    /// An epoch was taken.
    Attached {
        /// The epoch.
        epoch: Epoch,
        /// The attachment it belongs to: the former one of this node, or a new one. Its id is not the proposed one;
        /// see [`VolumeCommand::Attach`].
        attachment: AttachmentId,
        /// The log index of the Attach: no read below it.
        index: LogIndex,
        /// The first request number that this attachment has not used. An attachment outlives its daemon, so a
        /// session that remembers no numbers of the one before **must count from here**, not from 1: a number that
        /// was used answers as done, without effect (INV-ONCE). 1 in a new attachment.
        next: Seq,
    },
    /// The snapshot is there. Equal for every repetition: it was made just now if `index` is the command's own.
    Snapshotted {
        /// Where it stands.
        index: LogIndex,
        /// The volume's size at that moment.
        size: ByteSize,
    },
    /// Refused; nothing changed.
    Refused(Refusal),
}

impl VolumeReply {
    /// The reply as bytes.
    pub fn encode(&self) -> Bytes {
        let mut out = Writer::new();
        match self {
            Self::Done { fresh } => {
                out.u8(1);
                out.bool(*fresh);
            }
            Self::Attached { epoch, attachment, index, next } => {
                out.u8(2);
                epoch.encode(&mut out);
                attachment.encode(&mut out);
                index.encode(&mut out);
                next.encode(&mut out);
            }
            Self::Refused(refusal) => {
                out.u8(3);
                refusal.encode(&mut out);
            }
            Self::Snapshotted { index, size } => {
                out.u8(4);
                index.encode(&mut out);
                out.u64(size.0);
            }
        }
        out.finish()
    }

    /// Reads what [`Self::encode`] wrote.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut input = Reader::new(bytes);
        let reply = match input.u8()? {
            1 => Self::Done { fresh: input.bool()? },
            2 => Self::Attached {
                epoch: Epoch::decode(&mut input)?,
                attachment: AttachmentId::decode(&mut input)?,
                index: LogIndex::decode(&mut input)?,
                next: Seq::decode(&mut input)?,
            },
            3 => Self::Refused(Refusal::decode(&mut input)?),
            4 => Self::Snapshotted { index: LogIndex::decode(&mut input)?, size: ByteSize(input.u64()?) },
            other => return Err(DecodeError::Unknown { what: "volume reply", value: other.into() }),
        };
        input.end()?;
        Ok(reply)
    }
}

/// The fencing state.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VolumeState {
    size: ByteSize,
    epoch: Epoch,
    holder: Option<Holder>,
    attached_at: LogIndex,
    /// The epoch whose attachment the last Detach ended, until the next Attach: a repeated Detach is recognized by it.
    detached: Option<Epoch>,
    unsettled: Option<Unsettled>,
    /// The window of the attachment `window_of`, which is the holder's or, while nobody holds the volume, the last.
    window: Window,
    window_of: AttachmentId,
    policy: VolumePolicy,
    snapshots: Snapshots,
    timers: VolumeTimers,
}

impl VolumeState {
    /// A new volume: epoch 0, held by nobody.
    pub fn new(size: ByteSize) -> Self {
        Self {
            size,
            epoch: Epoch::ZERO,
            holder: None,
            attached_at: LogIndex::ZERO,
            detached: None,
            unsettled: None,
            window: Window::default(),
            window_of: AttachmentId::NIL,
            policy: VolumePolicy::default(),
            snapshots: Snapshots::default(),
            timers: VolumeTimers::default(),
        }
    }

    /// The size.
    pub fn size(&self) -> ByteSize {
        self.size
    }
    /// The epoch; only grows.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }
    /// Who holds the volume.
    pub fn holder(&self) -> Option<&Holder> {
        self.holder.as_ref()
    }
    /// Former holders that may still be alive. While there are any, no newer epoch reads or writes (INV-SETTLE).
    pub fn unsettled(&self) -> Option<&Unsettled> {
        self.unsettled.as_ref()
    }
    /// The log index of the last Attach.
    pub fn attached_at(&self) -> LogIndex {
        self.attached_at
    }
    /// What users may set.
    pub fn policy(&self) -> VolumePolicy {
        self.policy
    }
    /// What I/O does without a quorum.
    pub fn on_quorum_loss(&self) -> OnQuorumLoss {
        self.policy.on_quorum_loss
    }
    /// Which replica serves reads.
    pub fn read_policy(&self) -> ReadPolicy {
        self.policy.read_policy
    }
    /// The timers of its group.
    pub fn timers(&self) -> VolumeTimers {
        self.timers
    }
    /// The living snapshots in the order in which they were made.
    pub fn snapshots(&self) -> &[Snapshot] {
        self.snapshots.living()
    }
    /// A living snapshot.
    pub fn snapshot(&self, id: SnapshotId) -> Option<&Snapshot> {
        self.snapshots.find(id)
    }
    /// The chain of layers from the oldest to the one that is written: one per living snapshot, and the top.
    pub fn layers(&self) -> Vec<Layer> {
        self.snapshots.layers()
    }
    /// Whether an Attach with this session and expected epoch is the one that the holder holds by, sent again.
    pub fn is_repeated_attach(&self, session: SessionId, expected: Epoch) -> bool {
        let same =
            |holder: &Holder| holder.session == session && expected.0.checked_add(1) == Some(holder.epoch.0);
        self.holder.as_ref().is_some_and(same)
    }

    /// Applies the command at `index`. The caller carries out the effect on the blocks only on `Done { fresh: true }`,
    /// and on a `Snapshotted` with this very index.
    pub fn apply(&mut self, index: LogIndex, command: &VolumeCommand) -> VolumeReply {
        let before = self.epoch;
        let result = command.check().and_then(|()| match command {
            VolumeCommand::Write { tag, range, .. }
            | VolumeCommand::Trim { tag, range }
            | VolumeCommand::Zero { tag, range } => self.data(tag, *range),
            VolumeCommand::Attach { .. } => self.attach(index, command),
            VolumeCommand::Detach { epoch, force, confirmed } => self.detach(*epoch, *force, *confirmed),
            VolumeCommand::Settled { epoch } => self.settle(*epoch),
            VolumeCommand::Resize { size } => self.resize(*size),
            VolumeCommand::SetPolicy { on_quorum_loss, read_policy } => {
                let policy = VolumePolicy { on_quorum_loss: *on_quorum_loss, read_policy: *read_policy };
                Ok(VolumeReply::Done { fresh: std::mem::replace(&mut self.policy, policy) != policy })
            }
            VolumeCommand::Snapshot { id, name, created_ms } => {
                let made = self.snapshots.create(index, *id, name, self.size, *created_ms);
                made.map(|made| VolumeReply::Snapshotted { index: made.index, size: made.size })
            }
            VolumeCommand::DropSnapshot { id } => Ok(VolumeReply::Done { fresh: self.snapshots.remove(*id) }),
            VolumeCommand::RestoreSnapshot { id, epoch } => self.restore(index, *id, *epoch),
            VolumeCommand::ChangeTimers { to } => {
                self.timers.begin(index, *to).map(|fresh| VolumeReply::Done { fresh })
            }
            VolumeCommand::TimersSettled { since } => {
                Ok(VolumeReply::Done { fresh: self.timers.end(*since) })
            }
        });
        assert!(self.epoch >= before, "INV-FENCE: an epoch only grows");
        assert!(
            self.holder.as_ref().is_none_or(|h| h.epoch == self.epoch),
            "INV-FENCE: the holder's epoch is current"
        );
        result.unwrap_or_else(VolumeReply::Refused)
    }

    /// Refuses an epoch that is not the current one.
    fn check_epoch(&self, epoch: Epoch) -> Result<(), Refusal> {
        if epoch < self.epoch {
            return Err(Refusal::OldEpoch { current: self.epoch });
        }
        if epoch > self.epoch {
            return Err(self.mismatch());
        }
        Ok(())
    }

    /// The refusal that tells the epoch and the holder.
    pub fn mismatch(&self) -> Refusal {
        Refusal::EpochMismatch { current: self.epoch, holder: self.holder.as_ref().map(|h| h.node.clone()) }
    }

    /// INV-FENCE, INV-SETTLE, INV-LATE and INV-ONCE, in this order.
    fn data(&mut self, tag: &Tag, range: BlockRange) -> Result<VolumeReply, Refusal> {
        let unchecked = is_planted("skip-epoch-check");
        if !unchecked {
            self.check_epoch(tag.epoch)?;
        }
        let Some(holder) = &self.holder else {
            if is_planted("data-after-detach") && self.detached == Some(tag.epoch) {
                let admission = self.window.admit(tag.seq, tag.oldest)?;
                return Ok(VolumeReply::Done { fresh: admission == Admission::Fresh });
            }
            return Err(Refusal::NotAttached);
        };
        if holder.session != tag.session && !unchecked {
            return Err(Refusal::NotHolder);
        }
        if holder.mode == AttachMode::ReadOnly {
            return Err(Refusal::ReadOnly);
        }
        if self.unsettled.is_some() && !is_planted("unsettled-ignored") {
            return Err(Refusal::Unsettled);
        }
        // What the holder says it has given up holds whatever becomes of this command.
        self.window.raise(tag.oldest);
        let blocks = self.size.blocks();
        if range.end().0 > blocks {
            return Err(Refusal::OutOfRange { blocks });
        }
        let admission = self.window.admit(tag.seq, tag.oldest)?;
        Ok(VolumeReply::Done { fresh: admission == Admission::Fresh })
    }

    /// INV-FENCE: compare-and-set on the epoch.
    fn attach(&mut self, index: LogIndex, command: &VolumeCommand) -> Result<VolumeReply, Refusal> {
        let VolumeCommand::Attach { expected, node, store, session, attachment, mode, force, confirmed } =
            command
        else {
            return Err(Refusal::Malformed("not an attach".into()));
        };
        if self.is_repeated_attach(*session, *expected) {
            // Its first answer was lost.
            return Ok(self.attached());
        }
        if *expected != self.epoch && !is_planted("attach-without-compare") {
            return Err(self.mismatch());
        }
        let attachment = match &self.holder {
            // A daemon that has restarted takes its node's attachment again, with its window, and needs no force.
            Some(holder) if holder.node == *node => {
                if is_planted("window-forgotten") {
                    self.window = Window::default();
                }
                holder.attachment
            }
            Some(holder) if !force && !confirmed => {
                return Err(Refusal::HeldBy { node: holder.node.clone(), epoch: holder.epoch });
            }
            _ => {
                self.window = Window::default();
                unique_attachment(*attachment, self.epoch.next())
            }
        };
        self.window_of = attachment;
        self.end_tenure(*confirmed);
        self.epoch = self.epoch.next();
        self.detached = None;
        self.attached_at = index;
        let (node, store, session, mode, epoch) = (node.clone(), *store, *session, *mode, self.epoch);
        self.holder = Some(Holder { node, store, session, attachment, mode, epoch });
        Ok(self.attached())
    }

    fn attached(&self) -> VolumeReply {
        let (epoch, attachment, index) = (self.epoch, self.window_of, self.attached_at);
        VolumeReply::Attached { epoch, attachment, index, next: self.window.next() }
    }

    /// INV-SETTLE: the holder goes. Unless its end is confirmed, the next epoch waits for it. A holder who goes while
    /// an earlier change is unsettled was never admitted anywhere, so nobody waits for it, and the wait goes on.
    fn end_tenure(&mut self, confirmed: bool) {
        let Some(holder) = self.holder.take() else { return };
        if !confirmed && self.unsettled.is_none() {
            self.unsettled = Some(Unsettled { epoch: self.epoch.next(), holders: vec![holder] });
        }
    }

    fn detach(&mut self, epoch: Epoch, force: bool, confirmed: bool) -> Result<VolumeReply, Refusal> {
        if self.holder.is_none() && (epoch == self.epoch || self.detached == Some(epoch)) {
            return Ok(VolumeReply::Done { fresh: false });
        }
        self.check_epoch(epoch)?;
        if let Some(Holder { node, epoch, .. }) = self.holder.as_ref().filter(|_| !force && !confirmed) {
            return Err(Refusal::HeldBy { node: node.clone(), epoch: *epoch });
        }
        self.end_tenure(confirmed);
        if !confirmed {
            self.epoch = self.epoch.next();
        }
        self.detached = Some(epoch);
        Ok(VolumeReply::Done { fresh: true })
    }

    fn settle(&mut self, epoch: Epoch) -> Result<VolumeReply, Refusal> {
        if epoch > self.epoch {
            return Err(self.mismatch());
        }
        match &self.unsettled {
            None => Ok(VolumeReply::Done { fresh: false }),
            Some(unsettled) if unsettled.epoch == epoch => {
                self.unsettled = None;
                Ok(VolumeReply::Done { fresh: true })
            }
            // It speaks of holders before another change.
            Some(_) => Err(Refusal::OldEpoch { current: self.epoch }),
        }
    }

    fn resize(&mut self, size: ByteSize) -> Result<VolumeReply, Refusal> {
        if size < self.size {
            return Err(Refusal::CannotShrink { blocks: self.size.blocks() });
        }
        let fresh = size > self.size;
        self.size = size;
        Ok(VolumeReply::Done { fresh })
    }

    /// INV-RESTORE.
    fn restore(&mut self, index: LogIndex, id: SnapshotId, epoch: Epoch) -> Result<VolumeReply, Refusal> {
        if !is_planted("restore-without-compare") {
            self.check_epoch(epoch)?;
        }
        if let Some(holder) = self.holder.as_ref().filter(|_| !is_planted("restore-while-held")) {
            return Err(Refusal::Attached { node: holder.node.clone() });
        }
        if self.unsettled.is_some() {
            return Err(Refusal::Unsettled);
        }
        Ok(VolumeReply::Done { fresh: self.snapshots.restore(index, id, epoch)? })
    }

    /// The state as bytes; see docs/FORMAT.md. A volume that never had a snapshot, or has the default timers, needs no
    /// newer version to read it.
    pub fn encode(&self) -> Bytes {
        let mut out = Writer::new();
        let level = if !self.timers.is_default() {
            LEVEL_TIMERS
        } else if !self.snapshots.is_untouched() {
            LEVEL_SNAPSHOTS
        } else {
            LEVEL_FIRST
        };
        out.u16(level);
        out.u64(self.size.0);
        self.epoch.encode(&mut out);
        self.attached_at.encode(&mut out);
        out.bool(self.holder.is_some());
        if let Some(holder) = &self.holder {
            put_holder(&mut out, holder);
        }
        out.bool(self.unsettled.is_some());
        if let Some(unsettled) = &self.unsettled {
            unsettled.epoch.encode(&mut out);
            out.u32(unsettled.holders.len() as u32);
            unsettled.holders.iter().for_each(|holder| put_holder(&mut out, holder));
        }
        out.bool(self.detached.is_some());
        if let Some(epoch) = self.detached {
            epoch.encode(&mut out);
        }
        self.window.encode(&mut out);
        self.window_of.encode(&mut out);
        put_policy(&mut out, self.policy.on_quorum_loss, self.policy.read_policy);
        if level >= LEVEL_SNAPSHOTS {
            self.snapshots.encode(&mut out);
        }
        if level >= LEVEL_TIMERS {
            self.timers.encode(&mut out);
        }
        out.finish()
    }

    /// Reads what [`Self::encode`] wrote; refuses a state that no sequence of commands leads to.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(bytes);
        let input = &mut reader;
        let level = input.u16()?;
        check_level(level)?;
        let size = ByteSize(input.u64()?);
        let epoch = Epoch::decode(input)?;
        let attached_at = LogIndex::decode(input)?;
        let holder = if input.bool()? { Some(get_holder(input)?) } else { None };
        let unsettled = if input.bool()? {
            let epoch = Epoch::decode(input)?;
            let count = input.count("former holders", UNSETTLED_MAX)?;
            let holders = (0..count).map(|_| get_holder(input)).collect::<Result<_, _>>()?;
            Some(Unsettled { epoch, holders })
        } else {
            None
        };
        let detached = if input.bool()? { Some(Epoch::decode(input)?) } else { None };
        let window = Window::decode(input)?;
        let window_of = AttachmentId::decode(input)?;
        let (on_quorum_loss, read_policy) = get_policy(input)?;
        let policy = VolumePolicy { on_quorum_loss, read_policy };
        let snapshots =
            if level >= LEVEL_SNAPSHOTS { Snapshots::decode(input)? } else { Snapshots::default() };
        let timers =
            if level >= LEVEL_TIMERS { VolumeTimers::decode(input)? } else { VolumeTimers::default() };
        reader.end()?;
        let state = Self {
            size,
            epoch,
            holder,
            attached_at,
            detached,
            unsettled,
            window,
            window_of,
            policy,
            snapshots,
            timers,
        };
        state.check()?;
        Ok(state)
    }

    fn check(&self) -> Result<(), DecodeError> {
        let bad = |what, value| Err(DecodeError::Unknown { what, value });
        if self.size.0 > limits::VOLUME_BYTES_MAX {
            return bad("volume size", self.size.0);
        }
        if self.epoch.0 > u64::MAX / 2 {
            return bad("epoch", self.epoch.0);
        }
        if let Some(holder) = &self.holder
            && (holder.epoch != self.epoch || holder.attachment != self.window_of || self.detached.is_some())
        {
            return bad("holder's epoch", holder.epoch.0);
        }
        if let Some(unsettled) = &self.unsettled {
            let after = unsettled.holders.iter().all(|holder| holder.epoch < unsettled.epoch);
            if unsettled.holders.is_empty() || unsettled.epoch > self.epoch || !after {
                return bad("unsettled epoch", unsettled.epoch.0);
            }
        }
        match self.detached {
            Some(epoch) if epoch > self.epoch => bad("detached epoch", epoch.0),
            _ => Ok(()),
        }
    }
}

/// INV-ONCE: the id of an attachment that begins with `epoch`: the upper half as proposed, the lower half the epoch.
/// Epochs never repeat, so neither does an id, even if a session that never heard its answer proposes the same again
/// after others have held the volume. Otherwise an id could come back with an empty window, and a keeper that finds
/// «its» id unchanged would replay what was applied long ago.
fn unique_attachment(proposed: AttachmentId, epoch: Epoch) -> AttachmentId {
    AttachmentId(proposed.0 >> 64 << 64 | u128::from(epoch.0))
}

fn put_holder(out: &mut Writer, holder: &Holder) {
    holder.node.encode(out);
    holder.store.encode(out);
    holder.session.encode(out);
    holder.attachment.encode(out);
    put_mode(out, holder.mode);
    holder.epoch.encode(out);
}

fn get_holder(input: &mut Reader<'_>) -> Result<Holder, DecodeError> {
    Ok(Holder {
        node: NodeName::decode(input)?,
        store: StoreId::decode(input)?,
        session: SessionId::decode(input)?,
        attachment: AttachmentId::decode(input)?,
        mode: get_mode(input)?,
        epoch: Epoch::decode(input)?,
    })
}
