//! Volumes that begin with what another one held. Until everything is copied the volume is being filled: nobody
//! attaches it, and what it is filled from stays.
//!
//! INV-FILL: a volume's phase goes from filling to ready once and never back, and only when whoever filled it has
//! written everything and has let go of it. So whoever looks up the volume's epoch, then sees it being filled still,
//! and attaches it in that very epoch, knows that no guest has ever written to it.

use holdfast_types::{ByteSize, ErrorCode, LogIndex, SnapshotId, UserError, VolumeId, VolumeSpec};
use serde::{Deserialize, Serialize};

use super::snapshots::{SnapshotPhase, SnapshotRecord};
use super::state::refused;
use super::{CatalogCommand, CatalogReply, CatalogResult, CatalogState, VolumePhase, VolumeRecord};

/// What a new volume is to begin with.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SourceOrder {
    /// The volume that is copied.
    pub volume: VolumeId,
    /// The snapshot of it that is copied; with `own`, the id that one made for this gets if it is new.
    pub snapshot: SnapshotId,
    /// What the volume holds now is copied: a snapshot is made for it, and goes when the copy is there.
    pub own: bool,
    /// Wall time of who asks, in milliseconds since 1970.
    pub created_ms: u64,
}

/// What a volume began with, and how much of it is there.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VolumeSource {
    /// The volume that is copied.
    pub volume: VolumeId,
    /// The snapshot of it.
    pub snapshot: SnapshotId,
    /// The snapshot was made for this copy, and goes when that is there.
    pub own: bool,
    /// Bytes of the snapshot.
    pub size: ByteSize,
    /// Everything below is copied, durable on a majority; in bytes. Nothing is decided on it, so it counts as no
    /// revision.
    pub filled: ByteSize,
}

impl VolumeSource {
    /// How much is there, in whole percent; 100 only when everything is.
    pub fn percent(&self) -> u32 {
        match self.size.0 {
            0 => 0,
            size => (u128::from(self.filled.0.min(size)) * 100 / u128::from(size)) as u32,
        }
    }

    fn is_of(&self, order: &SourceOrder) -> bool {
        self.volume == order.volume && self.own == order.own && (self.own || self.snapshot == order.snapshot)
    }
}

impl VolumeRecord {
    /// Refuses what must wait until the volume is there, saying how far it is.
    pub fn check_ready(&self) -> Result<(), UserError> {
        let name = &self.spec.name;
        let (message, hint) = match (self.phase, &self.source) {
            (VolumePhase::Ready, _) => return Ok(()),
            (VolumePhase::Filling, Some(source)) => {
                let message = format!("volume {name} is being filled: {} %", source.percent());
                (message, format!("`holdfast volume show {name}` shows when it is ready"))
            }
            (VolumePhase::Deleting, _) => {
                return Err(refused(ErrorCode::NotFound, format!("volume {name} is being deleted")));
            }
            (VolumePhase::Recovering, _) => (
                format!("volume {name} is being recovered"),
                format!("`holdfast volume show {name}` shows when it goes on"),
            ),
            _ => (format!("volume {name} is not ready yet"), "wait a moment and ask again".to_owned()),
        };
        Err(refused(ErrorCode::Unavailable, message).hint(hint))
    }

    /// Whether it still needs what it is copied from.
    fn is_incomplete(&self) -> bool {
        matches!(self.phase, VolumePhase::Creating | VolumePhase::Filling)
    }

    /// Whether it began with what `order` says.
    pub(super) fn began_with(&self, order: Option<&SourceOrder>) -> bool {
        match (&self.source, order) {
            (None, None) => true,
            (Some(source), Some(order)) => source.is_of(order),
            _ => false,
        }
    }
}

impl CatalogState {
    /// What a new volume's record keeps of its source, if that can be copied into a volume of this size.
    pub(super) fn check_source(
        &self,
        order: &SourceOrder,
        spec: &VolumeSpec,
    ) -> Result<VolumeSource, UserError> {
        let volume = self.volumes.get(&order.volume).filter(|record| record.phase != VolumePhase::Deleting);
        let volume = volume.ok_or_else(|| {
            refused(ErrorCode::NotFound, format!("there is no volume {} to copy", order.volume))
                .hint("`holdfast volume list` shows them all")
        })?;
        let size = if order.own {
            volume.check_ready()?;
            volume.spec.size
        } else {
            let snapshot = self.snapshots.get(&order.snapshot);
            let snapshot = snapshot
                .filter(|record| record.volume == order.volume && record.phase != SnapshotPhase::Deleting);
            let snapshot = snapshot.ok_or_else(|| {
                refused(ErrorCode::NotFound, format!("there is no snapshot {} to copy", order.snapshot))
                    .hint("`holdfast snapshot list` shows them all")
            })?;
            if snapshot.copy.is_some() {
                let title = self.snapshot_title(snapshot);
                let message = format!("snapshot {title} belongs to a copy, and goes when that is whole");
                return Err(
                    refused(ErrorCode::Refused, message).hint("make a snapshot of your own, and copy that")
                );
            }
            if snapshot.phase != SnapshotPhase::Ready {
                let title = self.snapshot_title(snapshot);
                return Err(refused(ErrorCode::Unavailable, format!("snapshot {title} is not ready yet"))
                    .hint("ask again in a moment"));
            }
            snapshot.size
        };
        if spec.size < size {
            let message = format!("what is copied has {size}: a volume of {} has no room for it", spec.size);
            return Err(refused(ErrorCode::OutOfRange, message).hint("ask for that size or more"));
        }
        Ok(VolumeSource {
            volume: order.volume,
            snapshot: order.snapshot,
            own: order.own,
            size,
            filled: ByteSize(0),
        })
    }

    /// The record of the snapshot that a copy of a volume is made from.
    pub(super) fn own_snapshot(
        &mut self,
        copy: VolumeId,
        order: &SourceOrder,
        size: ByteSize,
    ) -> Result<(), UserError> {
        self.check_snapshot_room(order.volume)?;
        if self.snapshots.contains_key(&order.snapshot) {
            return Err(refused(ErrorCode::Internal, "the snapshot's id is taken"));
        }
        let record = SnapshotRecord {
            id: order.snapshot,
            volume: order.volume,
            name: format!("copy-{copy}"),
            key: String::new(),
            created_ms: order.created_ms,
            index: LogIndex::ZERO,
            size,
            phase: SnapshotPhase::Creating,
            copy: Some(copy),
        };
        self.snapshots.insert(record.id, record);
        Ok(())
    }

    /// A copy that still needs a snapshot.
    pub fn copy_of_snapshot(&self, snapshot: SnapshotId) -> Option<&VolumeRecord> {
        self.copies(move |record| record.source.as_ref().is_some_and(|source| source.snapshot == snapshot))
    }

    /// A copy that still needs a volume.
    pub(super) fn copy_of_volume(&self, volume: VolumeId) -> Option<&VolumeRecord> {
        self.copies(move |record| record.source.as_ref().is_some_and(|source| source.volume == volume))
    }

    fn copies(&self, wanted: impl Fn(&VolumeRecord) -> bool) -> Option<&VolumeRecord> {
        self.volumes.values().find(|record| record.is_incomplete() && wanted(record))
    }

    /// Refuses to take away what a volume is still being filled from.
    pub(super) fn check_not_copied(what: &str, copy: Option<&VolumeRecord>) -> Result<(), UserError> {
        let Some(copy) = copy else { return Ok(()) };
        let name = &copy.spec.name;
        let percent = copy.source.as_ref().map_or(0, VolumeSource::percent);
        let message = format!("volume {name} is being filled from {what}: {percent} %");
        Err(refused(ErrorCode::Refused, message)
            .hint(format!("wait until {name} is ready, or delete it: `holdfast volume show {name}`")))
    }

    pub(super) fn apply_to_copy(&mut self, command: &CatalogCommand) -> CatalogResult {
        let (CatalogCommand::FillProgress { id, .. } | CatalogCommand::VolumeFilled { id }) = command else {
            return Err(refused(ErrorCode::Internal, "the command is not one of a copy"));
        };
        let Some(volume) = self.volumes.get_mut(id) else {
            return Err(refused(ErrorCode::NotFound, format!("there is no volume {id}")));
        };
        let filling = volume.phase == VolumePhase::Filling;
        let Some(source) = volume.source.as_mut().filter(|_| filling) else {
            // A report that comes late. A volume that is ready stays so; one that is being deleted, too.
            return Ok(CatalogReply::Volume { record: Box::new(volume.clone()) });
        };
        match command {
            CatalogCommand::FillProgress { filled, size, .. } => {
                source.size = *size;
                source.filled = source.filled.max(*filled).min(*size);
            }
            _ => {
                source.filled = source.size;
                volume.phase = VolumePhase::Ready;
                volume.revision += 1;
            }
        }
        let record = volume.clone();
        if record.phase == VolumePhase::Ready {
            self.drop_own_snapshot(&record);
        }
        Ok(CatalogReply::Volume { record: Box::new(record) })
    }

    /// The copy is there, or not wanted any more: its own snapshot is of no use to anybody.
    pub(super) fn drop_own_snapshot(&mut self, copy: &VolumeRecord) {
        let own = copy.source.as_ref().filter(|source| source.own);
        let snapshot = own.and_then(|source| self.snapshots.get_mut(&source.snapshot));
        if let Some(snapshot) = snapshot.filter(|snapshot| snapshot.copy == Some(copy.id)) {
            snapshot.phase = SnapshotPhase::Deleting;
        }
    }
}
