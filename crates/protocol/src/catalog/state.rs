//! The catalog's state and what commands do to it.

use std::collections::BTreeMap;

use holdfast_types::{
    ClusterId, ErrorCode, NodeName, ReplicaId, SnapshotId, UserError, VolumeId, VolumeSpec, limits,
};
use serde::{Deserialize, Serialize};

use super::{
    CatalogCommand, CatalogResult, Incarnation, NodeRecord, Placed, ReplicaPhase, ReplicaRecord,
    SnapshotRecord, SourceOrder, VOLUMES_MAX, VolumePhase, VolumeRecord,
};

/// What a command answers.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "kebab-case")]
pub enum CatalogReply {
    /// Done, or there was nothing to do.
    Done,
    /// The volume as it is now.
    Volume {
        /// The record.
        record: Box<VolumeRecord>,
    },
    /// The snapshot as it is now.
    Snapshot {
        /// The record.
        record: Box<SnapshotRecord>,
    },
}

/// Everything that the catalog knows.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CatalogState {
    /// The cluster.
    pub cluster: ClusterId,
    /// Nodes by name.
    pub nodes: BTreeMap<NodeName, NodeRecord>,
    /// Volumes by id.
    pub volumes: BTreeMap<VolumeId, VolumeRecord>,
    /// Snapshots by id.
    #[serde(default)]
    pub snapshots: BTreeMap<SnapshotId, SnapshotRecord>,
    next_replica: u64,
}

pub(super) fn refused(code: ErrorCode, message: impl Into<String>) -> UserError {
    UserError::new(code, message)
}

/// Nothing is wrong; the world has moved on, and whoever decided decides anew.
fn outdated(record: &VolumeRecord) -> UserError {
    let name = &record.spec.name;
    refused(ErrorCode::Unavailable, format!("volume {name} has changed meanwhile")).hint("try again")
}

impl CatalogState {
    /// An empty catalog.
    pub fn new(cluster: ClusterId) -> Self {
        Self {
            cluster,
            nodes: BTreeMap::new(),
            volumes: BTreeMap::new(),
            snapshots: BTreeMap::new(),
            next_replica: 1,
        }
    }

    /// The volume of that name or id, unless it is being deleted.
    pub fn find(&self, name: &str) -> Option<&VolumeRecord> {
        let alive = |record: &&VolumeRecord| record.phase != VolumePhase::Deleting;
        let by_id = name.parse().ok().and_then(|id: VolumeId| self.volumes.get(&id));
        by_id.filter(alive).or_else(|| self.volumes.values().filter(alive).find(|v| v.spec.name == name))
    }

    /// As [`Self::find`], or an error for users.
    pub fn get(&self, name: &str) -> Result<&VolumeRecord, UserError> {
        self.find(name).ok_or_else(|| {
            refused(ErrorCode::NotFound, format!("there is no volume {name}"))
                .hint("`holdfast volume list` shows them all")
        })
    }

    /// Applies a command. Deterministic; a refused command changes nothing.
    pub fn apply(&mut self, command: &CatalogCommand) -> CatalogResult {
        match command {
            CatalogCommand::PutNode { cluster, node } => self.put_node(*cluster, node),
            CatalogCommand::SetCordon { node, cordoned } => {
                self.node(node)?.cordoned = *cordoned;
                Ok(CatalogReply::Done)
            }
            CatalogCommand::CreateVolume { id, group, spec, parameters, placed, source } => {
                if let Some(existing) = self.find(&spec.name) {
                    return same_or_taken(existing, spec, source.as_ref());
                }
                self.check_new(*id, spec, placed)?;
                let kept = source.as_ref().map(|order| self.check_source(order, spec)).transpose()?;
                if let Some(order) = source.as_ref().filter(|order| order.own) {
                    self.own_snapshot(*id, order, kept.as_ref().map_or(spec.size, |kept| kept.size))?;
                }
                let replicas = placed.iter().map(|at| self.new_replica(at, ReplicaPhase::Voter)).collect();
                let record = VolumeRecord {
                    id: *id,
                    group: *group,
                    spec: spec.clone(),
                    parameters: parameters.clone(),
                    first_size: spec.size,
                    source: kept,
                    phase: VolumePhase::Creating,
                    replicas,
                    incarnation: Incarnation::default(),
                    recovery: None,
                    quarantined: Vec::new(),
                    published: BTreeMap::new(),
                    revision: 1,
                };
                self.volumes.insert(*id, record.clone());
                Ok(CatalogReply::Volume { record: Box::new(record) })
            }
            CatalogCommand::DeleteVolume { id } => self.delete(*id),
            CatalogCommand::ForgetVolume { id, revision } => self.forget(*id, *revision),
            CatalogCommand::AddReplica { id, revision, placed } => {
                let known = self.volumes.get(id).map(|volume| volume.revision);
                if known == Some(*revision) {
                    let replica = self.new_replica(placed, ReplicaPhase::Joining);
                    return self.change(*id, Some(*revision), |volume| add(volume, replica));
                }
                self.change(*id, Some(*revision), |_| Ok(()))
            }
            CatalogCommand::ReplaceReplica { id, revision, old, placed } => {
                self.replace(*id, *revision, *old, placed)
            }
            CatalogCommand::CreateSnapshot { .. }
            | CatalogCommand::SnapshotReady { .. }
            | CatalogCommand::DeleteSnapshot { .. }
            | CatalogCommand::ForgetSnapshot { .. } => self.apply_to_snapshot(command),
            CatalogCommand::FillProgress { .. } | CatalogCommand::VolumeFilled { .. } => {
                self.apply_to_copy(command)
            }
            CatalogCommand::RecoverVolume { .. }
            | CatalogCommand::RecoverySealing { .. }
            | CatalogCommand::RecoveryAbandoned { .. }
            | CatalogCommand::VolumeRecovered { .. }
            | CatalogCommand::DropQuarantined { .. } => self.apply_to_recovery(command),
            other => self.apply_to_volume(other),
        }
    }

    fn apply_to_volume(&mut self, command: &CatalogCommand) -> CatalogResult {
        match command {
            CatalogCommand::VolumeReady { id, revision } => self.change(*id, Some(*revision), |volume| {
                if volume.phase == VolumePhase::Creating {
                    let copy = volume.source.is_some();
                    volume.phase = if copy { VolumePhase::Filling } else { VolumePhase::Ready };
                }
                Ok(())
            }),
            CatalogCommand::SetSize { id, size } => self.change(*id, None, |volume| {
                volume.spec.size = volume.spec.size.max(*size);
                Ok(())
            }),
            CatalogCommand::SetTimers { id, timers } => self.change(*id, None, |volume| {
                volume.spec.timers = *timers;
                Ok(())
            }),
            CatalogCommand::SetSnapshotQuota { id, quota } => self.change(*id, None, |volume| {
                volume.spec.snapshot_quota = *quota;
                Ok(())
            }),
            CatalogCommand::SetReplica { id, revision, replica, phase } => {
                self.change(*id, Some(*revision), |volume| {
                    find_replica(volume, *replica)?.phase = *phase;
                    Ok(())
                })
            }
            CatalogCommand::ReplicaMade { id, revision, replica } => {
                self.change(*id, Some(*revision), |volume| {
                    find_replica(volume, *replica)?.made = true;
                    Ok(())
                })
            }
            CatalogCommand::KeepReplica { id, revision, old, joining } => {
                self.change(*id, Some(*revision), |volume| keep(volume, *old, *joining))
            }
            CatalogCommand::DropReplica { id, revision, replica } => {
                self.change(*id, Some(*revision), |volume| {
                    let phase = find_replica(volume, *replica)?.phase;
                    if phase != ReplicaPhase::Leaving && volume.phase != VolumePhase::Deleting {
                        return Err(refused(ErrorCode::Refused, "only a replica that leaves is dropped"));
                    }
                    volume.replicas.retain(|other| other.id != *replica);
                    Ok(())
                })
            }
            CatalogCommand::Publish { id, node, read_only } => {
                self.node(node)?;
                self.change(*id, None, |volume| publish(volume, node, *read_only))
            }
            CatalogCommand::Unpublish { id, node } => self.change(*id, None, |volume| {
                match node {
                    Some(node) => drop(volume.published.remove(node)),
                    None => volume.published.clear(),
                }
                Ok(())
            }),
            _ => Err(refused(ErrorCode::Internal, "the command is not one of a volume")),
        }
    }

    fn node(&mut self, name: &NodeName) -> Result<&mut NodeRecord, UserError> {
        self.nodes.get_mut(name).ok_or_else(|| {
            refused(ErrorCode::NotFound, format!("there is no node {name}"))
                .hint("`holdfast node list` shows them all")
        })
    }

    fn check_new(&self, id: VolumeId, spec: &VolumeSpec, placed: &[Placed]) -> Result<(), UserError> {
        limits::check_name("volume", &spec.name)?;
        if self.volumes.contains_key(&id) {
            return Err(refused(ErrorCode::Internal, "the volume's id is taken"));
        }
        if self.volumes.len() >= VOLUMES_MAX {
            return Err(refused(ErrorCode::ResourceExhausted, "the cluster has as many volumes as it can"));
        }
        let mut stores: Vec<_> = placed.iter().map(|at| at.store).collect();
        stores.sort_unstable();
        stores.dedup();
        if placed.is_empty() || placed.len() > limits::VOTERS_MAX || stores.len() != placed.len() {
            return Err(refused(ErrorCode::Internal, "the placement has no, too many or equal stores"));
        }
        Ok(())
    }

    fn new_replica(&mut self, at: &Placed, phase: ReplicaPhase) -> ReplicaRecord {
        let id = ReplicaId(self.next_replica);
        self.next_replica += 1;
        let (store, location) = (at.store, at.location.clone());
        ReplicaRecord { id, store, location, phase, witness: at.witness, made: false }
    }

    fn replace(&mut self, id: VolumeId, revision: u64, old: ReplicaId, placed: &Placed) -> CatalogResult {
        if self.volumes.get(&id).map(|volume| volume.revision) != Some(revision) {
            return self.change(id, Some(revision), |_| Ok(()));
        }
        let replica = self.new_replica(placed, ReplicaPhase::Joining);
        self.change(id, Some(revision), |volume| {
            let leaving = find_replica(volume, old)?;
            if leaving.phase == ReplicaPhase::Leaving {
                return Err(refused(ErrorCode::Refused, format!("replica {old} is leaving already")));
            }
            leaving.phase = ReplicaPhase::Leaving;
            add(volume, replica)
        })
    }

    pub(super) fn change(
        &mut self,
        id: VolumeId,
        revision: Option<u64>,
        change: impl FnOnce(&mut VolumeRecord) -> Result<(), UserError>,
    ) -> CatalogResult {
        let Some(volume) = self.volumes.get_mut(&id) else {
            return Err(refused(ErrorCode::NotFound, format!("there is no volume {id}")));
        };
        if revision.is_some_and(|revision| revision != volume.revision) {
            return Err(outdated(volume));
        }
        let mut changed = volume.clone();
        change(&mut changed)?;
        if changed != *volume {
            changed.revision += 1;
            *volume = changed;
        }
        Ok(CatalogReply::Volume { record: Box::new(volume.clone()) })
    }

    fn delete(&mut self, id: VolumeId) -> CatalogResult {
        if !self.volumes.contains_key(&id) {
            return Ok(CatalogReply::Done);
        }
        let name =
            self.volumes.get(&id).map_or(String::new(), |volume| format!("volume {}", volume.spec.name));
        Self::check_not_copied(&name, self.copy_of_volume(id))?;
        self.check_without_snapshots(id)?;
        let deleted = self.change(id, None, |volume| {
            if volume.phase == VolumePhase::Recovering {
                // Its survivors are being changed.
                volume.check_ready()?;
            }
            if let Some(node) = volume.published.keys().next()
                && volume.phase != VolumePhase::Deleting
            {
                let message = format!("volume {} is in use by node {node}", volume.spec.name);
                return Err(refused(ErrorCode::Refused, message).hint("unpublish or detach it first"));
            }
            volume.phase = VolumePhase::Deleting;
            Ok(())
        })?;
        if let Some(copy) = self.volumes.get(&id).cloned() {
            self.drop_own_snapshot(&copy);
        }
        Ok(deleted)
    }

    fn forget(&mut self, id: VolumeId, revision: u64) -> CatalogResult {
        let Some(volume) = self.volumes.get(&id) else { return Ok(CatalogReply::Done) };
        if volume.revision != revision {
            return Err(outdated(volume));
        }
        let is_empty = volume.replicas.is_empty() && volume.quarantined.is_empty();
        if volume.phase != VolumePhase::Deleting || !is_empty {
            return Err(refused(ErrorCode::Refused, "only a deleted volume without replicas is forgotten"));
        }
        self.volumes.remove(&id);
        // What is left is to be deleted, and went with the volume.
        self.snapshots.retain(|_, snapshot| snapshot.volume != id);
        Ok(CatalogReply::Done)
    }
}

fn find_replica(volume: &mut VolumeRecord, id: ReplicaId) -> Result<&mut ReplicaRecord, UserError> {
    let name = volume.spec.name.clone();
    volume
        .replicas
        .iter_mut()
        .find(|replica| replica.id == id)
        .ok_or_else(|| refused(ErrorCode::NotFound, format!("volume {name} has no replica {id}")))
}

fn keep(volume: &mut VolumeRecord, old: ReplicaId, joining: ReplicaId) -> Result<(), UserError> {
    if find_replica(volume, old)?.phase != ReplicaPhase::Leaving
        || find_replica(volume, joining)?.phase != ReplicaPhase::Joining
    {
        return Err(refused(ErrorCode::Refused, "only one that leaves is kept, instead of one that joins"));
    }
    find_replica(volume, joining)?.phase = ReplicaPhase::Leaving;
    find_replica(volume, old)?.phase = ReplicaPhase::Voter;
    Ok(())
}

fn add(volume: &mut VolumeRecord, replica: ReplicaRecord) -> Result<(), UserError> {
    if !matches!(volume.phase, VolumePhase::Ready | VolumePhase::Filling) {
        return Err(refused(ErrorCode::Refused, "replicas are added to a volume that is ready"));
    }
    // Those that leave may stand on nodes that never come back.
    let staying = volume.replicas.iter().filter(|replica| replica.phase != ReplicaPhase::Leaving).count();
    if staying > limits::VOTERS_MAX || volume.replicas.len() >= limits::REPLICAS_MAX {
        return Err(refused(ErrorCode::Refused, "the volume has as many replicas as it can"));
    }
    volume.replicas.push(replica);
    Ok(())
}

fn publish(volume: &mut VolumeRecord, node: &NodeName, read_only: bool) -> Result<(), UserError> {
    if matches!(volume.phase, VolumePhase::Deleting | VolumePhase::Filling) {
        volume.check_ready()?;
    }
    match volume.published.get(node) {
        Some(mode) if *mode != read_only => {
            let message = format!("volume {} is published to {node} in another mode", volume.spec.name);
            return Err(refused(ErrorCode::AlreadyExists, message).hint("unpublish it there first"));
        }
        Some(_) => return Ok(()),
        None => {}
    }
    if let Some((other, _)) = volume.published.iter().find(|(_, other)| !read_only || !**other) {
        let message = format!("volume {} is published to node {other}", volume.spec.name);
        return Err(refused(ErrorCode::Refused, message).hint("unpublish it there first"));
    }
    volume.published.insert(node.clone(), read_only);
    Ok(())
}

fn same_or_taken(existing: &VolumeRecord, spec: &VolumeSpec, source: Option<&SourceOrder>) -> CatalogResult {
    // Where the pod happens to be is no property of the volume.
    let comparable = |spec: &VolumeSpec| VolumeSpec { preferred: Vec::new(), ..spec.clone() };
    let same_source = existing.began_with(source);
    if comparable(&existing.spec) == comparable(spec) && same_source {
        return Ok(CatalogReply::Volume { record: Box::new(existing.clone()) });
    }
    let what = if !same_source {
        "that began with other content".to_owned()
    } else if existing.spec.size == spec.size {
        "with other parameters".to_owned()
    } else {
        format!("with {} instead of {}", existing.spec.size, spec.size)
    };
    Err(refused(ErrorCode::AlreadyExists, format!("there is a volume {} {what}", spec.name))
        .hint("choose another name, or ask for exactly what is there"))
}
