//! The fencing state of a volume: who may write, and which requests were applied. Replicated; deterministic.
//!
//! INV-FENCE: at apply, a data command is refused unless its epoch is the current one, somebody holds it, and the
//! sender is the holder. So once a newer Attach or a Detach is in the log before it, nothing older changes anything,
//! whatever clocks say.

use bytes::Bytes;
use holdfast_types::{
    AttachmentId, BlockRange, ByteSize, DecodeError, Epoch, LogIndex, NodeName, OnQuorumLoss, ReadPolicy, Reader,
    SessionId, StoreId, Writer,
};

use crate::command::{AttachMode, FEATURE_LEVEL, Tag, VolumeCommand, get_mode, get_policy, put_mode, put_policy};
use crate::planted::is_planted;
pub use crate::refusal::Refusal;
use crate::window::{Admission, Window};

/// Former holders remembered until they have settled; more than this many unconfirmed changes in one lease are
/// refused until the older ones have settled.
const UNSETTLED_MAX: usize = 16;

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
    /// The epoch that waits for them.
    pub epoch: Epoch,
    /// The former holders.
    pub holders: Vec<Holder>,
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
        /// The attachment it belongs to.
        attachment: AttachmentId,
        /// The log index of the Attach: no read below it.
        index: LogIndex,
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
            Self::Attached { epoch, attachment, index } => {
                out.u8(2);
                epoch.encode(&mut out);
                attachment.encode(&mut out);
                index.encode(&mut out);
            }
            Self::Refused(refusal) => {
                out.u8(3);
                refusal.encode(&mut out);
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
            },
            3 => Self::Refused(Refusal::decode(&mut input)?),
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
    unsettled: Option<Unsettled>,
    /// The window of the attachment in `window_of`; kept while that attachment may come back under a new epoch.
    window: Window,
    window_of: AttachmentId,
    on_quorum_loss: OnQuorumLoss,
    read_policy: ReadPolicy,
}

impl VolumeState {
    /// A new volume: epoch 0, held by nobody.
    pub fn new(size: ByteSize) -> Self {
        Self {
            size,
            epoch: Epoch::ZERO,
            holder: None,
            attached_at: LogIndex::ZERO,
            unsettled: None,
            window: Window::default(),
            window_of: AttachmentId::NIL,
            on_quorum_loss: OnQuorumLoss::default(),
            read_policy: ReadPolicy::default(),
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
    /// Former holders that may still be alive. While there are any, no newer epoch reads or writes.
    pub fn unsettled(&self) -> Option<&Unsettled> {
        self.unsettled.as_ref()
    }
    /// The log index of the last Attach.
    pub fn attached_at(&self) -> LogIndex {
        self.attached_at
    }
    /// What I/O does without a quorum.
    pub fn on_quorum_loss(&self) -> OnQuorumLoss {
        self.on_quorum_loss
    }
    /// Which replica serves reads.
    pub fn read_policy(&self) -> ReadPolicy {
        self.read_policy
    }

    /// Applies the command at `index`.
    pub fn apply(&mut self, index: LogIndex, command: &VolumeCommand) -> VolumeReply {
        let before = self.epoch;
        let result = match command {
            VolumeCommand::Write { tag, range, .. }
            | VolumeCommand::Trim { tag, range }
            | VolumeCommand::Zero { tag, range } => self.data(tag, *range),
            VolumeCommand::Attach { .. } => self.attach(index, command),
            VolumeCommand::Detach { epoch, confirmed, .. } => self.detach(*epoch, *confirmed),
            VolumeCommand::Settled { epoch } => self.settle(*epoch),
            VolumeCommand::Resize { size } => self.resize(*size),
            VolumeCommand::SetPolicy { on_quorum_loss, read_policy } => {
                self.on_quorum_loss = *on_quorum_loss;
                self.read_policy = *read_policy;
                Ok(VolumeReply::Done { fresh: true })
            }
        };
        assert!(self.epoch >= before, "INV-FENCE: an epoch only grows");
        assert!(self.holder.as_ref().is_none_or(|h| h.epoch == self.epoch), "INV-FENCE: the holder's epoch is current");
        result.unwrap_or_else(VolumeReply::Refused)
    }

    /// INV-FENCE, INV-SETTLE, INV-ONCE and INV-LATE, in this order.
    fn data(&mut self, tag: &Tag, range: BlockRange) -> Result<VolumeReply, Refusal> {
        if tag.epoch != self.epoch && !is_planted("skip-epoch-check") {
            return Err(Refusal::OldEpoch { current: self.epoch });
        }
        let Some(holder) = &self.holder else { return Err(Refusal::NotAttached) };
        if holder.session != tag.session && !is_planted("skip-epoch-check") {
            return Err(Refusal::NotHolder);
        }
        if holder.mode == AttachMode::ReadOnly {
            return Err(Refusal::ReadOnly);
        }
        if self.unsettled.is_some() {
            return Err(Refusal::Unsettled);
        }
        let blocks = self.size.blocks();
        if range.end().0 > blocks {
            return Err(Refusal::OutOfRange { blocks });
        }
        match self.window.admit(tag.seq, tag.oldest)? {
            Admission::Fresh => Ok(VolumeReply::Done { fresh: true }),
            Admission::Duplicate => Ok(VolumeReply::Done { fresh: false }),
        }
    }

    fn attach(&mut self, index: LogIndex, command: &VolumeCommand) -> Result<VolumeReply, Refusal> {
        let VolumeCommand::Attach { expected, node, store, session, attachment, mode, force, confirmed } = command
        else {
            return Err(Refusal::Malformed("not an attach".into()));
        };
        if let Some(holder) = &self.holder {
            if holder.session == *session && self.epoch.0 == expected.0 + 1 {
                // The same Attach again: its first answer was lost.
                let (epoch, attachment) = (self.epoch, holder.attachment);
                return Ok(VolumeReply::Attached { epoch, attachment, index: self.attached_at });
            }
        }
        if *expected != self.epoch {
            return Err(Refusal::EpochMismatch { current: self.epoch });
        }
        // A daemon that has restarted takes its own attachment again, with its window, and needs no force: its
        // former session ended with the former process.
        let own = self.holder.as_ref().is_some_and(|h| h.node == *node && h.store == *store && h.mode == *mode && !force);
        if let Some(holder) = self.holder.clone() {
            if !own && !force && !confirmed {
                return Err(Refusal::HeldBy { node: holder.node, epoch: holder.epoch });
            }
            // A restarted daemon's earlier session may still be reading in a process that is being replaced: it
            // counts as unconfirmed unless the leader knows better.
            if !confirmed {
                self.leave_unsettled(holder)?;
            }
        }
        let attachment = match (&self.holder, own) {
            (Some(holder), true) => holder.attachment,
            _ => *attachment,
        };
        if self.window_of != attachment || !own {
            self.window = Window::default();
            self.window_of = attachment;
        }
        self.epoch = self.epoch.next();
        if let Some(unsettled) = &mut self.unsettled {
            unsettled.epoch = self.epoch;
        }
        self.attached_at = index;
        self.holder = Some(Holder {
            node: node.clone(),
            store: *store,
            session: *session,
            attachment,
            mode: *mode,
            epoch: self.epoch,
        });
        Ok(VolumeReply::Attached { epoch: self.epoch, attachment, index })
    }

    fn leave_unsettled(&mut self, holder: Holder) -> Result<(), Refusal> {
        let unsettled = self.unsettled.get_or_insert(Unsettled { epoch: self.epoch, holders: Vec::new() });
        if unsettled.holders.len() >= UNSETTLED_MAX {
            return Err(Refusal::Unsettled);
        }
        unsettled.holders.push(holder);
        Ok(())
    }

    fn detach(&mut self, epoch: Epoch, confirmed: bool) -> Result<VolumeReply, Refusal> {
        if epoch != self.epoch {
            return Err(Refusal::OldEpoch { current: self.epoch });
        }
        let Some(holder) = self.holder.take() else { return Ok(VolumeReply::Done { fresh: false }) };
        if !confirmed {
            if let Err(refusal) = self.leave_unsettled(holder.clone()) {
                self.holder = Some(holder);
                return Err(refusal);
            }
        }
        self.window = Window::default();
        self.window_of = AttachmentId::NIL;
        Ok(VolumeReply::Done { fresh: true })
    }

    fn settle(&mut self, epoch: Epoch) -> Result<VolumeReply, Refusal> {
        match &self.unsettled {
            None => Ok(VolumeReply::Done { fresh: false }),
            Some(unsettled) if unsettled.epoch == epoch => {
                self.unsettled = None;
                Ok(VolumeReply::Done { fresh: true })
            }
            // Somebody else's end is waited for by now.
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

    /// The state as bytes; see docs/FORMAT.md.
    pub fn encode(&self) -> Bytes {
        let mut out = Writer::new();
        out.u16(FEATURE_LEVEL);
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
        self.window.encode(&mut out);
        self.window_of.encode(&mut out);
        put_policy(&mut out, self.on_quorum_loss, self.read_policy);
        out.finish()
    }

    /// Reads what [`Self::encode`] wrote.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut reader = Reader::new(bytes);
        let input = &mut reader;
        let level = input.u16()?;
        if level > FEATURE_LEVEL {
            return Err(DecodeError::Unknown { what: "feature level (upgrade this node)", value: level.into() });
        }
        let size = ByteSize(input.u64()?);
        let epoch = Epoch::decode(input)?;
        let attached_at = LogIndex::decode(input)?;
        let holder = if input.bool()? { Some(get_holder(input)?) } else { None };
        let unsettled = if input.bool()? {
            let epoch = Epoch::decode(input)?;
            let count = input.count("holders", UNSETTLED_MAX)?;
            let holders = (0..count).map(|_| get_holder(input)).collect::<Result<_, _>>()?;
            Some(Unsettled { epoch, holders })
        } else {
            None
        };
        let window = Window::decode(input)?;
        let window_of = AttachmentId::decode(input)?;
        let (on_quorum_loss, read_policy) = get_policy(input)?;
        reader.end()?;
        Ok(Self { size, epoch, holder, attached_at, unsettled, window, window_of, on_quorum_loss, read_policy })
    }
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
