//! Has a node copy into a volume what it begins with, until it is there. The node works; the catalog's leader asks it
//! once in a while, notes how far it is, and has another one go on from there when it no longer answers.

use std::rc::Rc;
use std::time::Duration;

use holdfast_env::net::{Frame, Lane};
use holdfast_protocol::catalog::{
    CatalogCommand, SnapshotPhase, SnapshotRecord, VolumePhase, VolumeRecord, VolumeSource,
};
use holdfast_protocol::command::VolumeCommand;
use holdfast_types::{
    ByteSize, Epoch, ErrorCode, GroupId, NodeName, SnapshotId, StoreId, UserError, VolumeId,
};
use holdfast_wire::rpc::Service;
use serde::{Deserialize, Serialize};

use crate::member::{AnswerError, Member};
use crate::messages::{from_frame, to_frame};
use crate::reconciler::{Step, retry_later};
use crate::volumes;

/// Calls of the catalog's leader to nodes that fill volumes.
pub const FILL: Service = Service(9);
/// How long a node may take to tell how far it is.
const ASK_DEADLINE: Duration = Duration::from_secs(3);
/// How long a snapshot, or a change of the volume's size, may take before it is tried again.
const PREPARE_PATIENCE: Duration = Duration::from_secs(2);
/// Progress is noted in steps of this fraction: each costs an entry of the catalog's log.
const STEPS: u64 = 64;

/// What a node is to copy, and where to. Asking again tells how far it is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FillRequest {
    /// The volume that is filled.
    pub volume: VolumeId,
    /// Its name.
    pub name: String,
    /// Its group.
    pub group: GroupId,
    /// Stores of its replicas.
    pub stores: Vec<StoreId>,
    /// INV-FILL: the epoch of the volume before it was seen to be filling still; it is attached in no other.
    pub epoch: Epoch,
    /// Take it from a node that began and does not answer.
    pub force: bool,
    /// The group of the volume that is copied.
    pub from_group: GroupId,
    /// Stores of its replicas.
    pub from_stores: Vec<StoreId>,
    /// The snapshot that is copied.
    pub snapshot: SnapshotId,
    /// Bytes of the snapshot.
    pub size: ByteSize,
    /// Everything below is there already, in bytes.
    pub filled: ByteSize,
}

/// How far a node is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "kebab-case")]
pub enum FillAnswer {
    /// Everything below is there.
    Filling {
        /// In bytes.
        filled: ByteSize,
    },
    /// Everything is there, and the node has let go of the volume.
    Done,
    /// It does not go on.
    Failed {
        /// Why.
        error: UserError,
    },
}

/// A message as a frame.
pub fn encode(message: &impl Serialize) -> Result<Frame, UserError> {
    to_frame(message)
}

/// Reads what [`encode`] made.
pub fn decode<T: for<'de> Deserialize<'de>>(frame: Frame) -> Result<T, UserError> {
    from_frame(frame)
}

impl Member {
    /// Goes on with a volume that is being filled.
    pub(crate) async fn fill(self: &Rc<Self>, record: &VolumeRecord) -> Result<Step, AnswerError> {
        let missing = || retry_later(format!("what volume {} is filled from is not there", record.spec.name));
        let source = record.source.as_ref().ok_or_else(missing)?;
        let (from, snapshot) = self.machine.with_state(|state| {
            (state.volumes.get(&source.volume).cloned(), state.snapshots.get(&source.snapshot).cloned())
        });
        let (from, snapshot) = (from.ok_or_else(missing)?, snapshot.ok_or_else(missing)?);
        if snapshot.phase == SnapshotPhase::Creating {
            self.settle_snapshot(snapshot.id, PREPARE_PATIENCE).await?;
            return Ok(Step::Progress);
        }
        if snapshot.size > record.spec.size {
            return self.make_room(record, snapshot.size).await;
        }
        let answer = self.ask_to_fill(record, source, &from, &snapshot).await?;
        match answer {
            FillAnswer::Filling { filled } => {
                let noted = source.size == snapshot.size
                    && filled.0.saturating_sub(source.filled.0) < (snapshot.size.0 / STEPS).max(1);
                if !noted {
                    self.apply(&CatalogCommand::FillProgress { id: record.id, filled, size: snapshot.size })
                        .await?;
                }
                Ok(Step::Rest)
            }
            FillAnswer::Done => {
                self.apply(&CatalogCommand::VolumeFilled { id: record.id }).await?;
                Ok(Step::Progress)
            }
            FillAnswer::Failed { error } => Err(error.into()),
        }
    }

    /// The source has grown between the request and its snapshot.
    async fn make_room(&self, record: &VolumeRecord, size: ByteSize) -> Result<Step, AnswerError> {
        let grow = VolumeCommand::Resize { size };
        volumes::control(&self.rpc, record.group, &record.stores(), &grow, PREPARE_PATIENCE).await?;
        self.apply(&CatalogCommand::SetSize { id: record.id, size }).await?;
        Ok(Step::Progress)
    }

    /// Asks the node that holds the volume, else the one where its leader stands.
    async fn ask_to_fill(
        &self,
        record: &VolumeRecord,
        source: &VolumeSource,
        from: &VolumeRecord,
        snapshot: &SnapshotRecord,
    ) -> Result<FillAnswer, AnswerError> {
        let (leader, report) = self.leader(record).await?;
        // INV-FILL: first the epoch, then, with a quorum of the catalog, that it is being filled still. An attach in
        // that epoch comes before that of any guest.
        let state = self.read().await?;
        if state.volumes.get(&record.id).is_none_or(|now| now.phase != VolumePhase::Filling) {
            return Err(retry_later(format!("volume {} is not being filled any more", record.spec.name)));
        }
        let request = |force| FillRequest {
            volume: record.id,
            name: record.spec.name.clone(),
            group: record.group,
            stores: record.stores(),
            epoch: report.epoch,
            force,
            from_group: from.group,
            from_stores: from.stores(),
            snapshot: source.snapshot,
            size: snapshot.size,
            filled: source.filled,
        };
        let holder = state.nodes.get(&NodeName::new(&report.holder)).map(|node| node.store);
        // Copying is the work of a node, not of the store where the leader stands.
        let leader = state.home_of(leader);
        let first = self.ask_node_to_fill(holder.unwrap_or(leader), &request(false)).await;
        match (first, holder) {
            (Err(error), Some(holder)) if holder != leader => {
                tracing::warn!(volume = record.spec.name, node = report.holder, %error,
                    "another node goes on filling a volume");
                Ok(self.ask_node_to_fill(leader, &request(true)).await?)
            }
            (answer, _) => Ok(answer?),
        }
    }

    async fn ask_node_to_fill(&self, store: StoreId, request: &FillRequest) -> Result<FillAnswer, UserError> {
        let frame = encode(request)?;
        let answer = self.rpc.call(store, Lane::Control, FILL, frame, ASK_DEADLINE).await;
        let answer = answer.map_err(|error| {
            UserError::new(ErrorCode::Unavailable, format!("store {store} does not answer: {error}"))
        })?;
        decode(answer)
    }
}
