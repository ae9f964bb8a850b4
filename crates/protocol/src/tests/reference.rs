//! What the fencing state must do, written a second time and naively: all tenures and all request numbers are kept
//! for ever, nothing is optimized. And the oracle: what must never happen, whatever was answered.

use std::collections::{BTreeMap, BTreeSet};

use holdfast_types::{AttachmentId, ByteSize, Epoch, LogIndex, NodeName, Seq, SessionId, SnapshotId, limits};

use crate::command::{AttachMode, VolumeCommand};
use crate::timers::Timers;
use crate::volume::{Refusal, VolumeReply};

/// One epoch of one holder.
struct Tenure {
    epoch: u64,
    node: NodeName,
    session: SessionId,
    attachment: AttachmentId,
    mode: AttachMode,
    index: LogIndex,
    /// A replica may have served it: at some index it was current and nobody before it was waited for.
    served: bool,
    /// It serves nothing any more: it has confirmed, or a full lease was waited for after its end.
    dead: bool,
}

#[derive(Default)]
struct Numbers {
    fresh: BTreeSet<u64>,
    oldest: u64,
}

impl Numbers {
    fn floor(&self) -> u64 {
        let mut floor = self.oldest.saturating_sub(1);
        while self.fresh.contains(&(floor + 1)) {
            floor += 1;
        }
        floor
    }
    fn next(&self) -> u64 {
        self.floor().max(self.fresh.last().copied().unwrap_or(0)) + 1
    }
}

/// What blocks hold: the index of their last write; those without are zeros.
pub(super) type Content = BTreeMap<u64, u64>;

/// A snapshot as a full copy.
struct Copy {
    id: SnapshotId,
    name: String,
    index: LogIndex,
    size: ByteSize,
    content: Content,
}

/// The reference.
pub(super) struct Reference {
    size: ByteSize,
    epoch: u64,
    tenures: Vec<Tenure>,
    /// Whether the last tenure is current.
    held: bool,
    last_detached: Option<u64>,
    unsettled: Option<u64>,
    numbers: BTreeMap<AttachmentId, Numbers>,
    content: Content,
    copies: Vec<Copy>,
    dropped: BTreeSet<SnapshotId>,
    /// Every snapshot that was ever made, and where.
    made: BTreeMap<SnapshotId, LogIndex>,
    restored: Option<(SnapshotId, Epoch)>,
    timers: Timers,
    /// The change of timers that began last and has not ended: where, and to what.
    changing: Option<(LogIndex, Timers)>,
}

impl Reference {
    pub(super) fn new(size: ByteSize) -> Self {
        Self {
            size,
            epoch: 0,
            tenures: Vec::new(),
            held: false,
            last_detached: None,
            unsettled: None,
            numbers: BTreeMap::new(),
            content: Content::new(),
            copies: Vec::new(),
            dropped: BTreeSet::new(),
            made: BTreeMap::new(),
            restored: None,
            timers: Timers::default(),
            changing: None,
        }
    }

    /// What the head holds, and each living snapshot.
    pub(super) fn contents(&self) -> (&Content, Vec<&Content>) {
        (&self.content, self.copies.iter().map(|copy| &copy.content).collect())
    }
    /// Whether the volume is held, or a former holder may still be served.
    pub(super) fn is_in_use(&self) -> bool {
        self.held || self.unsettled.is_some()
    }

    pub(super) fn epoch(&self) -> u64 {
        self.epoch
    }
    pub(super) fn unsettled(&self) -> Option<u64> {
        self.unsettled
    }
    /// How many tenures have ended. One who waits a full lease from now knows that these are dead afterwards.
    pub(super) fn ended(&self) -> usize {
        self.tenures.len() - usize::from(self.held)
    }

    fn holder(&self) -> Option<&Tenure> {
        self.tenures.last().filter(|_| self.held)
    }

    /// INV-FENCE, INV-ONCE, INV-LATE and INV-SETTLE, from the log alone: `reply` is what the state under test
    /// answered to `command`, before [`Self::apply`].
    pub(super) fn forbid(&self, command: &VolumeCommand, reply: &VolumeReply) -> Result<(), String> {
        self.forbid_snapshot(command, reply)?;
        let VolumeReply::Done { fresh } = reply else { return self.forbid_attach(command, reply) };
        let Some(tag) = command.tag() else { return Ok(()) };
        let holder = self.holder().ok_or("INV-FENCE: a write was done while nobody held the volume")?;
        if tag.epoch.0 != holder.epoch || tag.session != holder.session {
            return Err(format!("INV-FENCE: {tag:?} was done in epoch {}", holder.epoch));
        }
        if holder.mode == AttachMode::ReadOnly {
            return Err(format!("INV-FENCE: {tag:?} was done by a read-only holder"));
        }
        let others = &self.tenures[..self.tenures.len() - 1];
        if let Some(alive) = others.iter().find(|tenure| tenure.served && !tenure.dead) {
            return Err(format!(
                "INV-SETTLE: {tag:?} was done while epoch {} may still be served",
                alive.epoch
            ));
        }
        let numbers = &self.numbers[&holder.attachment];
        if tag.seq.0 < numbers.oldest {
            return Err(format!("INV-LATE: {tag:?} was done below {}", numbers.oldest));
        }
        if *fresh && numbers.fresh.contains(&tag.seq.0) {
            return Err(format!("INV-ONCE: {tag:?} was fresh twice"));
        }
        if !*fresh && !numbers.fresh.contains(&tag.seq.0) {
            return Err(format!("INV-ACK: {tag:?} was answered as done and never was"));
        }
        Ok(())
    }

    /// INV-SNAPSHOT and INV-RESTORE.
    fn forbid_snapshot(&self, command: &VolumeCommand, reply: &VolumeReply) -> Result<(), String> {
        match (command, reply) {
            (VolumeCommand::Snapshot { id, .. }, VolumeReply::Snapshotted { index, .. }) => {
                if let Some(first) = self.made.get(id).filter(|first| *first != index) {
                    return Err(format!("INV-SNAPSHOT: {id} was made at {first} and again at {index}"));
                }
                if self.dropped.contains(id) {
                    return Err(format!("INV-SNAPSHOT: {id} was dropped and came back"));
                }
            }
            (VolumeCommand::RestoreSnapshot { id, epoch }, VolumeReply::Done { fresh: true }) => {
                if self.is_in_use() {
                    return Err(format!("INV-RESTORE: {id} was restored under somebody who may be served"));
                }
                if epoch.0 != self.epoch {
                    return Err(format!("INV-RESTORE: {id} was restored late, from epoch {epoch}"));
                }
                if self.copies.last().is_none_or(|newest| newest.id != *id) {
                    return Err(format!("INV-RESTORE: {id} was restored and is not the newest"));
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn forbid_attach(&self, command: &VolumeCommand, reply: &VolumeReply) -> Result<(), String> {
        let VolumeReply::Attached { epoch, attachment, next, .. } = reply else { return Ok(()) };
        let VolumeCommand::Attach { expected, session, .. } = command else {
            return Err(format!("INV-FENCE: {command:?} took epoch {epoch}"));
        };
        if let Some(other) = self.tenures.iter().find(|t| t.epoch == epoch.0 && t.session != *session) {
            return Err(format!("INV-FENCE: epoch {epoch} was given to {} before", other.session));
        }
        if epoch.0 != expected.0 + 1 {
            return Err(format!("INV-FENCE: {epoch} was taken where {expected} was expected"));
        }
        let used = self
            .numbers
            .get(attachment)
            .is_some_and(|numbers| numbers.fresh.range(next.0..).next().is_some());
        if used {
            return Err(format!("INV-ONCE: numbers from {next} on were said to be unused"));
        }
        Ok(())
    }

    /// Applies `command`; `knows` is how many ended tenures its proposer waited for (for `Settled`).
    pub(super) fn apply(&mut self, index: LogIndex, command: &VolumeCommand, knows: usize) -> VolumeReply {
        let result = match command {
            VolumeCommand::Attach { .. } => self.attach(index, command),
            VolumeCommand::Detach { epoch, force, confirmed } => self.detach(epoch.0, *force, *confirmed),
            VolumeCommand::Settled { epoch } => self.settle(epoch.0, knows),
            VolumeCommand::Resize { size } if *size < self.size => {
                Err(Refusal::CannotShrink { blocks: self.size.blocks() })
            }
            VolumeCommand::Resize { size } => {
                let fresh = *size > self.size;
                self.size = *size;
                Ok(VolumeReply::Done { fresh })
            }
            VolumeCommand::Snapshot { id, name, .. } => self.snapshot(index, *id, name),
            VolumeCommand::DropSnapshot { id } => {
                self.dropped.insert(*id);
                let before = self.copies.len();
                self.copies.retain(|copy| copy.id != *id);
                Ok(VolumeReply::Done { fresh: self.copies.len() < before })
            }
            VolumeCommand::RestoreSnapshot { id, epoch } => self.restore(*id, *epoch),
            VolumeCommand::ChangeTimers { to } => match self.changing {
                Some((_, other)) if other != *to => Err(Refusal::TimersChanging),
                None if self.timers != *to => {
                    self.changing = Some((index, *to));
                    Ok(VolumeReply::Done { fresh: true })
                }
                _ => Ok(VolumeReply::Done { fresh: false }),
            },
            VolumeCommand::TimersSettled { since } => {
                let ended = self.changing.take_if(|(began, _)| began == since);
                self.timers = ended.map_or(self.timers, |(_, to)| to);
                Ok(VolumeReply::Done { fresh: ended.is_some() })
            }
            other => self.data(index, other),
        };
        if let (true, None, Some(tenure)) = (self.held, self.unsettled, self.tenures.last_mut()) {
            tenure.served = true;
        }
        result.unwrap_or_else(VolumeReply::Refused)
    }

    fn mismatch(&self) -> Refusal {
        Refusal::EpochMismatch { current: Epoch(self.epoch), holder: self.holder().map(|t| t.node.clone()) }
    }

    fn check_epoch(&self, epoch: u64) -> Result<(), Refusal> {
        match epoch.cmp(&self.epoch) {
            std::cmp::Ordering::Less => Err(Refusal::OldEpoch { current: Epoch(self.epoch) }),
            std::cmp::Ordering::Equal => Ok(()),
            std::cmp::Ordering::Greater => Err(self.mismatch()),
        }
    }

    fn snapshot(&mut self, index: LogIndex, id: SnapshotId, name: &str) -> Result<VolumeReply, Refusal> {
        if let Some(copy) = self.copies.iter().find(|copy| copy.id == id) {
            return Ok(VolumeReply::Snapshotted { index: copy.index, size: copy.size });
        }
        if self.dropped.contains(&id) {
            return Err(Refusal::SnapshotDropped);
        }
        if self.copies.iter().any(|copy| copy.name == name) {
            return Err(Refusal::SnapshotNameTaken);
        }
        self.made.insert(id, index);
        let (size, content) = (self.size, self.content.clone());
        self.copies.push(Copy { id, name: name.to_owned(), index, size, content });
        Ok(VolumeReply::Snapshotted { index, size })
    }

    fn restore(&mut self, id: SnapshotId, epoch: Epoch) -> Result<VolumeReply, Refusal> {
        self.check_epoch(epoch.0)?;
        if let Some(holder) = self.holder() {
            return Err(Refusal::Attached { node: holder.node.clone() });
        }
        if self.unsettled.is_some() {
            return Err(Refusal::Unsettled);
        }
        let at = self.copies.iter().position(|copy| copy.id == id).ok_or(Refusal::NoSuchSnapshot)?;
        let names: Vec<String> = self.copies[at + 1..].iter().rev().map(|copy| copy.name.clone()).collect();
        if !names.is_empty() {
            return Err(Refusal::NewerSnapshots { names, more: 0 });
        }
        let fresh = self.restored.replace((id, epoch)) != Some((id, epoch));
        self.content = self.copies[at].content.clone();
        Ok(VolumeReply::Done { fresh })
    }

    fn data(&mut self, index: LogIndex, command: &VolumeCommand) -> Result<VolumeReply, Refusal> {
        let (tag, range) = command.tag().zip(command.range()).expect("only data commands are left");
        self.check_epoch(tag.epoch.0)?;
        let holder = self.holder().ok_or(Refusal::NotAttached)?;
        if holder.session != tag.session {
            return Err(Refusal::NotHolder);
        }
        if holder.mode == AttachMode::ReadOnly {
            return Err(Refusal::ReadOnly);
        }
        if self.unsettled.is_some() {
            return Err(Refusal::Unsettled);
        }
        let attachment = holder.attachment;
        let blocks = self.size.blocks();
        let numbers = self.numbers.entry(attachment).or_default();
        numbers.oldest = numbers.oldest.max(tag.oldest.0);
        if range.end().0 > blocks {
            return Err(Refusal::OutOfRange { blocks });
        }
        if tag.seq.0 < numbers.oldest {
            return Err(Refusal::TooOld { oldest: Seq(numbers.oldest) });
        }
        if !numbers.fresh.contains(&tag.seq.0) && tag.seq.0 > numbers.floor() + limits::WINDOW_SEQS_MAX {
            return Err(Refusal::BeyondWindow);
        }
        let fresh = numbers.fresh.insert(tag.seq.0);
        if fresh {
            for block in range.blocks() {
                match command {
                    VolumeCommand::Write { .. } => self.content.insert(block.0, index.0),
                    _ => self.content.remove(&block.0),
                };
            }
        }
        Ok(VolumeReply::Done { fresh })
    }

    fn attach(&mut self, index: LogIndex, command: &VolumeCommand) -> Result<VolumeReply, Refusal> {
        let VolumeCommand::Attach { expected, node, session, attachment, mode, force, confirmed, .. } =
            command
        else {
            unreachable!("the caller has looked");
        };
        let repeated = self.holder().is_some_and(|t| t.session == *session && t.epoch == expected.0 + 1);
        if !repeated {
            if expected.0 != self.epoch {
                return Err(self.mismatch());
            }
            let own = self.holder().is_some_and(|t| t.node == *node);
            if let Some(holder) = self.holder().filter(|_| !own && !force && !confirmed) {
                return Err(Refusal::HeldBy { node: holder.node.clone(), epoch: Epoch(holder.epoch) });
            }
            let last = self.tenures.last().map(|t| t.attachment);
            let attachment = match last {
                Some(last) if own => last,
                _ => AttachmentId(attachment.0 / (1 << 64) * (1 << 64) + u128::from(self.epoch + 1)),
            };
            self.end(*confirmed);
            self.epoch += 1;
            self.last_detached = None;
            self.held = true;
            self.numbers.entry(attachment).or_default();
            let (node, session, mode, epoch) = (node.clone(), *session, *mode, self.epoch);
            self.tenures.push(Tenure {
                epoch,
                node,
                session,
                attachment,
                mode,
                index,
                served: false,
                dead: false,
            });
        }
        let holder = self.holder().expect("somebody attached just now");
        let next = Seq(self.numbers[&holder.attachment].next());
        let (epoch, attachment, index) = (Epoch(holder.epoch), holder.attachment, holder.index);
        Ok(VolumeReply::Attached { epoch, attachment, index, next })
    }

    fn end(&mut self, confirmed: bool) {
        let Some(tenure) = self.tenures.last_mut().filter(|_| self.held) else { return };
        tenure.dead |= confirmed;
        if !confirmed && self.unsettled.is_none() {
            self.unsettled = Some(self.epoch + 1);
        }
        self.held = false;
    }

    fn detach(&mut self, epoch: u64, force: bool, confirmed: bool) -> Result<VolumeReply, Refusal> {
        if !self.held && (epoch == self.epoch || self.last_detached == Some(epoch)) {
            return Ok(VolumeReply::Done { fresh: false });
        }
        self.check_epoch(epoch)?;
        if let Some(holder) = self.holder().filter(|_| !force && !confirmed) {
            return Err(Refusal::HeldBy { node: holder.node.clone(), epoch: Epoch(holder.epoch) });
        }
        self.end(confirmed);
        self.last_detached = Some(epoch);
        self.epoch += u64::from(!confirmed);
        Ok(VolumeReply::Done { fresh: true })
    }

    fn settle(&mut self, epoch: u64, knows: usize) -> Result<VolumeReply, Refusal> {
        if epoch > self.epoch {
            return Err(self.mismatch());
        }
        match self.unsettled {
            None => Ok(VolumeReply::Done { fresh: false }),
            Some(unsettled) if unsettled == epoch => {
                self.unsettled = None;
                self.tenures[..knows].iter_mut().for_each(|tenure| tenure.dead = true);
                Ok(VolumeReply::Done { fresh: true })
            }
            Some(_) => Err(Refusal::OldEpoch { current: Epoch(self.epoch) }),
        }
    }
}
