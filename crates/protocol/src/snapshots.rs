//! The snapshots of a volume, as far as its replicated state knows them: which live, in which order, and where the
//! layers of its blocks begin and end. What is in the layers is the store's business.
//!
//! INV-SNAPSHOT: an id makes one snapshot, at one index, however often the creation is repeated, and one that was
//! dropped does not come back; names of living snapshots are unique; what a living snapshot is called and where it
//! stands never changes. (That a dropped one stays away holds against repetitions that come before
//! [`limits::SNAPSHOTS_DROPPED_MAX`] further drops.)
//!
//! INV-RESTORE: what was changed after a snapshot is thrown away only while nobody holds the volume and nobody who
//! held it may still be served, in the epoch that the command names, and only back to the newest snapshot. So a
//! restore that arrives late, after another holder has written, throws nothing away.

use std::collections::VecDeque;

use holdfast_types::{ByteSize, DecodeError, Epoch, LogIndex, Reader, SnapshotId, Writer, limits};

use crate::planted::is_planted;
use crate::refusal::{NEWER_NAMES_MAX, Refusal};

/// A living snapshot.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Snapshot {
    /// Its id.
    pub id: SnapshotId,
    /// Its name, unique among the volume's living snapshots.
    pub name: String,
    /// The log index of the command that made it: what was applied below is in it.
    pub index: LogIndex,
    /// The size of the volume at that moment.
    pub size: ByteSize,
    /// Wall time of who asked for it, in milliseconds since 1970; for people only.
    pub created_ms: u64,
    /// Where its layer begins: the index of the snapshot or restore before it.
    pub began: LogIndex,
}

/// A generation of a volume's blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Layer {
    /// It takes the changes after this index.
    pub began: LogIndex,
    /// The index of the snapshot that froze it; `None` for the one that is written.
    pub frozen: Option<LogIndex>,
}

/// The snapshots of one volume.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Snapshots {
    /// By index.
    living: Vec<Snapshot>,
    /// Where the layer that is written began.
    top_began: LogIndex,
    /// What was restored last, and in which epoch. Nobody writes in an epoch without having attached under the next,
    /// so a repetition in the same epoch finds nothing to throw away.
    restored: Option<(SnapshotId, Epoch)>,
    /// Ids that were dropped, or were to be dropped before they were made; the newest last.
    dropped: VecDeque<SnapshotId>,
}

impl Snapshots {
    pub(crate) fn living(&self) -> &[Snapshot] {
        &self.living
    }

    pub(crate) fn find(&self, id: SnapshotId) -> Option<&Snapshot> {
        self.living.iter().find(|snapshot| snapshot.id == id)
    }

    /// Whether there never were any.
    pub(crate) fn is_untouched(&self) -> bool {
        *self == Self::default()
    }

    /// The layers from the oldest to the one that is written.
    pub(crate) fn layers(&self) -> Vec<Layer> {
        let frozen = self.living.iter().map(|s| Layer { began: s.began, frozen: Some(s.index) });
        frozen.chain([Layer { began: self.top_began, frozen: None }]).collect()
    }

    /// INV-SNAPSHOT: makes a snapshot, or finds the one that the same command made before.
    pub(crate) fn create(
        &mut self,
        index: LogIndex,
        id: SnapshotId,
        name: &str,
        size: ByteSize,
        created_ms: u64,
    ) -> Result<&Snapshot, Refusal> {
        let again = is_planted("snapshot-made-twice");
        if let Some(at) = self.living.iter().position(|snapshot| snapshot.id == id)
            && !again
        {
            return Ok(&self.living[at]);
        }
        if self.dropped.contains(&id) {
            return Err(Refusal::SnapshotDropped);
        }
        if self.living.iter().any(|snapshot| snapshot.name == name) && !again {
            return Err(Refusal::SnapshotNameTaken);
        }
        if self.living.len() >= limits::SNAPSHOTS_PER_VOLUME_MAX {
            return Err(Refusal::SnapshotsFull);
        }
        let began = std::mem::replace(&mut self.top_began, index);
        let at = self.living.len();
        self.living.push(Snapshot { id, name: name.to_owned(), index, size, created_ms, began });
        assert!(
            self.living.windows(2).all(|pair| pair[0].index < pair[1].index),
            "INV-SNAPSHOT: snapshots stand in the order of the log"
        );
        Ok(&self.living[at])
    }

    /// Forgets a snapshot: its layer becomes one with the next. False if it is not there.
    pub(crate) fn remove(&mut self, id: SnapshotId) -> bool {
        if !self.dropped.contains(&id) {
            if self.dropped.len() >= limits::SNAPSHOTS_DROPPED_MAX {
                self.dropped.pop_front();
            }
            self.dropped.push_back(id);
        }
        let Some(at) = self.living.iter().position(|snapshot| snapshot.id == id) else { return false };
        let gone = self.living.remove(at);
        match self.living.get_mut(at) {
            Some(above) => above.began = gone.began,
            None => self.top_began = gone.began,
        }
        true
    }

    /// INV-RESTORE, the part that does not depend on who holds the volume: begins the layer that is written anew.
    /// False if the same command did that before.
    pub(crate) fn restore(&mut self, index: LogIndex, id: SnapshotId, epoch: Epoch) -> Result<bool, Refusal> {
        let at = self.living.iter().position(|snapshot| snapshot.id == id).ok_or(Refusal::NoSuchSnapshot)?;
        let newer = &self.living[at + 1..];
        if !newer.is_empty() {
            let names = newer.iter().rev().take(NEWER_NAMES_MAX).map(|s| s.name.clone()).collect();
            let more = newer.len().saturating_sub(NEWER_NAMES_MAX) as u32;
            return Err(Refusal::NewerSnapshots { names, more });
        }
        if self.restored == Some((id, epoch)) {
            return Ok(false);
        }
        self.restored = Some((id, epoch));
        self.top_began = index;
        Ok(true)
    }

    pub(crate) fn encode(&self, out: &mut Writer) {
        out.u32(self.living.len() as u32);
        for snapshot in &self.living {
            snapshot.id.encode(out);
            out.text(&snapshot.name);
            snapshot.index.encode(out);
            out.u64(snapshot.size.0);
            out.u64(snapshot.created_ms);
            snapshot.began.encode(out);
        }
        self.top_began.encode(out);
        out.bool(self.restored.is_some());
        if let Some((id, epoch)) = self.restored {
            id.encode(out);
            epoch.encode(out);
        }
        out.u32(self.dropped.len() as u32);
        self.dropped.iter().for_each(|id| id.encode(out));
    }

    pub(crate) fn decode(input: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let count = input.count("snapshots", limits::SNAPSHOTS_PER_VOLUME_MAX)?;
        let living = (0..count)
            .map(|_| {
                Ok(Snapshot {
                    id: SnapshotId::decode(input)?,
                    name: input.text(limits::NAME_LENGTH_MAX)?,
                    index: LogIndex::decode(input)?,
                    size: ByteSize(input.u64()?),
                    created_ms: input.u64()?,
                    began: LogIndex::decode(input)?,
                })
            })
            .collect::<Result<_, DecodeError>>()?;
        let top_began = LogIndex::decode(input)?;
        let restored =
            if input.bool()? { Some((SnapshotId::decode(input)?, Epoch::decode(input)?)) } else { None };
        let count = input.count("dropped snapshots", limits::SNAPSHOTS_DROPPED_MAX)?;
        let dropped = (0..count).map(|_| SnapshotId::decode(input)).collect::<Result<_, _>>()?;
        let snapshots = Self { living, top_began, restored, dropped };
        snapshots.check()?;
        Ok(snapshots)
    }

    /// Refuses what no sequence of commands leads to.
    fn check(&self) -> Result<(), DecodeError> {
        let mut before = LogIndex::ZERO;
        for snapshot in &self.living {
            let Snapshot { id, name, index, size, began, .. } = snapshot;
            let twins = self.living.iter().filter(|other| other.id == *id || other.name == *name).count();
            let sound = *began >= before && index > began && twins == 1 && *id != SnapshotId::NIL;
            if !sound || size.0 > limits::VOLUME_BYTES_MAX || self.dropped.contains(id) {
                return Err(DecodeError::Unknown { what: "snapshot at", value: index.0 });
            }
            before = *index;
        }
        if self.top_began < before {
            return Err(DecodeError::Unknown { what: "layer that began at", value: self.top_began.0 });
        }
        Ok(())
    }
}

const _: () = assert!(limits::SNAPSHOT_BYTES_MAX >= limits::NAME_LENGTH_MAX + 4 + 16 + 4 * 8);
