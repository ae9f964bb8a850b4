//! Snapshots in the catalog: what is intended, so that a creation or deletion that was interrupted is finished, and an
//! id or a name is found without asking every volume. What a snapshot holds is the volume's own business.
//!
//! A record is there before its snapshot is, and until its snapshot is gone. INV-SNAPSHOT here: one record per name
//! of a volume, and per key in the cluster.

use holdfast_types::{ByteSize, ErrorCode, LogIndex, SnapshotId, UserError, VolumeId, limits};
use serde::{Deserialize, Serialize};

use super::state::refused;
use super::{CatalogCommand, CatalogReply, CatalogResult, CatalogState, VolumePhase};

/// Names of snapshots that an error tells.
const NAMES_TOLD: usize = 5;

/// What is to happen with a snapshot.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SnapshotPhase {
    /// It is being made.
    Creating,
    /// It is there and never changes.
    Ready,
    /// It is being removed.
    Deleting,
}

/// A snapshot as the catalog wants it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SnapshotRecord {
    /// Its id, in the volume's log, too.
    pub id: SnapshotId,
    /// Its volume.
    pub volume: VolumeId,
    /// Its name, unique among the volume's snapshots.
    pub name: String,
    /// A name that is unique in the cluster, of whoever needs one (CSI); empty for none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub key: String,
    /// Wall time of who asked for it, in milliseconds since 1970; for people only.
    pub created_ms: u64,
    /// Where it stands in the volume's log, once it is ready.
    pub index: LogIndex,
    /// The volume's size at that moment, once it is ready; until then the one at the request.
    pub size: ByteSize,
    /// What is to happen with it.
    pub phase: SnapshotPhase,
    /// The volume that is copied from it, if it was made for that only: it goes when the copy is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy: Option<VolumeId>,
}

fn reply(record: &SnapshotRecord) -> CatalogResult {
    Ok(CatalogReply::Snapshot { record: Box::new(record.clone()) })
}

impl CatalogState {
    /// As users write it: `VOLUME@NAME`, where the volume may be an id, too.
    pub fn snapshot_title(&self, record: &SnapshotRecord) -> String {
        let volume = self.volumes.get(&record.volume).map(|volume| volume.spec.name.as_str());
        format!("{}@{}", volume.unwrap_or("?"), record.name)
    }

    /// The snapshot of that id, or `VOLUME@NAME`, unless it is being deleted.
    pub fn find_snapshot(&self, text: &str) -> Option<&SnapshotRecord> {
        let alive = |record: &&SnapshotRecord| record.phase != SnapshotPhase::Deleting;
        let Some((volume, name)) = text.split_once('@') else {
            return text.parse().ok().and_then(|id: SnapshotId| self.snapshots.get(&id)).filter(alive);
        };
        let volume = self.find(volume)?.id;
        self.snapshots.values().filter(alive).find(|record| record.volume == volume && record.name == name)
    }

    /// As [`Self::find_snapshot`], or an error for users.
    pub fn get_snapshot(&self, text: &str) -> Result<&SnapshotRecord, UserError> {
        self.find_snapshot(text).ok_or_else(|| {
            refused(ErrorCode::NotFound, format!("there is no snapshot {text}"))
                .hint("`holdfast snapshot list` shows them all; name one as VOLUME@SNAPSHOT")
        })
    }

    /// The snapshots of a volume, those that are being deleted included.
    pub fn snapshots_of(&self, volume: VolumeId) -> impl Iterator<Item = &SnapshotRecord> {
        self.snapshots.values().filter(move |record| record.volume == volume)
    }

    pub(super) fn apply_to_snapshot(&mut self, command: &CatalogCommand) -> CatalogResult {
        match command {
            CatalogCommand::CreateSnapshot { id, volume, name, key, created_ms } => {
                self.create_snapshot(*id, *volume, name, key, *created_ms)
            }
            CatalogCommand::SnapshotReady { id, index, size } => {
                let Some(record) = self.snapshots.get_mut(id) else {
                    return Err(refused(ErrorCode::NotFound, format!("there is no snapshot {id}")));
                };
                if record.phase == SnapshotPhase::Creating {
                    (record.phase, record.index, record.size) = (SnapshotPhase::Ready, *index, *size);
                }
                reply(record)
            }
            CatalogCommand::DeleteSnapshot { id } => {
                if let Some(record) = self.snapshots.get(id) {
                    let title = format!("snapshot {}", self.snapshot_title(record));
                    Self::check_not_copied(&title, self.copy_of_snapshot(*id))?;
                }
                let Some(record) = self.snapshots.get_mut(id) else { return Ok(CatalogReply::Done) };
                record.phase = SnapshotPhase::Deleting;
                reply(record)
            }
            CatalogCommand::ForgetSnapshot { id } => {
                let Some(record) = self.snapshots.get(id) else { return Ok(CatalogReply::Done) };
                if record.phase != SnapshotPhase::Deleting {
                    return Err(refused(ErrorCode::Refused, "only a deleted snapshot is forgotten"));
                }
                self.snapshots.remove(id);
                Ok(CatalogReply::Done)
            }
            _ => Err(refused(ErrorCode::Internal, "the command is not one of a snapshot")),
        }
    }

    fn create_snapshot(
        &mut self,
        id: SnapshotId,
        volume: VolumeId,
        name: &str,
        key: &str,
        created_ms: u64,
    ) -> CatalogResult {
        limits::check_name("snapshot", name)?;
        if key.len() > limits::NAME_LENGTH_MAX {
            return Err(refused(ErrorCode::InvalidArgument, "the snapshot's key is longer than 128 bytes"));
        }
        let source = self.volumes.get(&volume).filter(|volume| volume.phase == VolumePhase::Ready);
        let Some(source) = source else {
            return Err(refused(ErrorCode::NotFound, format!("there is no volume {volume} that is ready")));
        };
        let size = source.spec.size;
        let same = |record: &&SnapshotRecord| record.volume == volume && record.name == name;
        let keyed = |record: &&SnapshotRecord| !key.is_empty() && record.key == key;
        if let Some(existing) = self.snapshots.values().find(|record| keyed(record) || same(record)) {
            if existing.phase == SnapshotPhase::Deleting {
                let title = self.snapshot_title(existing);
                return Err(refused(ErrorCode::Unavailable, format!("snapshot {title} is being deleted"))
                    .hint("ask again in a moment, or choose another name"));
            }
            if same(&existing) && existing.key == key {
                return reply(existing);
            }
            let title = self.snapshot_title(existing);
            return Err(refused(ErrorCode::AlreadyExists, format!("the name is taken by snapshot {title}"))
                .hint("choose another name, or ask for exactly what is there"));
        }
        if self.snapshots.contains_key(&id) {
            return Err(refused(ErrorCode::Internal, "the snapshot's id is taken"));
        }
        self.check_snapshot_room(volume)?;
        let record = SnapshotRecord {
            id,
            volume,
            name: name.to_owned(),
            key: key.to_owned(),
            created_ms,
            index: LogIndex::ZERO,
            size,
            phase: SnapshotPhase::Creating,
            copy: None,
        };
        self.snapshots.insert(id, record.clone());
        reply(&record)
    }

    /// Refuses one snapshot more than a volume can have.
    pub(super) fn check_snapshot_room(&self, volume: VolumeId) -> Result<(), UserError> {
        let most = limits::SNAPSHOTS_PER_VOLUME_MAX;
        if self.snapshots_of(volume).count() < most {
            return Ok(());
        }
        let name = self.volumes.get(&volume).map(|volume| volume.spec.name.clone()).unwrap_or_default();
        let message = format!("volume {name} has {most} snapshots, as many as it can have");
        Err(refused(ErrorCode::ResourceExhausted, message)
            .hint(format!("delete some first: `holdfast snapshot list {name}` shows them")))
    }

    /// Refuses to delete a volume while there are snapshots of it that are meant to stay.
    pub(super) fn check_without_snapshots(&self, volume: VolumeId) -> Result<(), UserError> {
        let staying: Vec<&SnapshotRecord> =
            self.snapshots_of(volume).filter(|record| record.phase != SnapshotPhase::Deleting).collect();
        let Some(first) = staying.first() else { return Ok(()) };
        let names: Vec<&str> = staying.iter().take(NAMES_TOLD).map(|record| record.name.as_str()).collect();
        let more = staying.len().saturating_sub(NAMES_TOLD);
        let and_more = if more == 0 { String::new() } else { format!(" and {more} more") };
        let title = self.snapshot_title(first);
        let volume = title.split('@').next().unwrap_or_default();
        let message = format!("volume {volume} has snapshots: {}{and_more}", names.join(", "));
        Err(refused(ErrorCode::Refused, message)
            .hint(format!("delete them first: `holdfast snapshot delete {title} --yes`")))
    }
}
