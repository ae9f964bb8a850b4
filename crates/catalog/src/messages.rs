//! Calls to the catalog, as JSON: few, small, and read by people.

use std::collections::BTreeMap;

use bytes::Bytes;
use holdfast_env::net::Frame;
use holdfast_protocol::catalog::{
    CatalogCommand, CatalogReply, CatalogState, SnapshotRecord, SourceOrder, VolumeRecord,
};
use holdfast_types::{ErrorCode, ReplicaId, SnapshotId, StoreId, UserError, VolumeId, VolumeSpec};
use serde::{Deserialize, Serialize};

/// What a member is asked.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "kebab-case")]
pub(crate) enum CatalogRequest {
    /// Everything, as of now.
    State,
    /// Apply a command.
    Apply {
        /// The command.
        command: CatalogCommand,
    },
    /// Place, create and make ready.
    Create {
        /// What is asked for.
        spec: Box<VolumeSpec>,
        /// Parameters as given.
        parameters: BTreeMap<String, String>,
        /// What it begins with.
        #[serde(default)]
        source: Option<SourceOrder>,
    },
    /// Work on a volume until there is nothing to do or something is in the way.
    Settle {
        /// The volume.
        id: VolumeId,
    },
    /// Make a snapshot and wait until it is ready.
    CreateSnapshot {
        /// The volume, by name or id.
        volume: String,
        /// The snapshot's name.
        name: String,
        /// A name that is unique in the cluster; empty for none.
        key: String,
        /// Wall time, in milliseconds since 1970.
        created_ms: u64,
    },
    /// Work on a snapshot until there is nothing to do or something is in the way.
    SettleSnapshot {
        /// The snapshot.
        id: SnapshotId,
    },
    /// Whether a member runs there, and which.
    Seat,
    /// Let a new member of this id run there, if none does. Its predecessor's log is lost or cannot be trusted.
    Sit {
        /// Never used before.
        replica: ReplicaId,
    },
    /// Decide where one more replica of a volume goes, and add it; optionally on a given node.
    Add {
        /// The volume.
        id: VolumeId,
        /// The node, empty for any.
        node: String,
        /// The replica that leaves once the new one votes.
        #[serde(default)]
        replacing: Option<ReplicaId>,
    },
}

/// What a member answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "kebab-case")]
pub(crate) enum CatalogAnswer {
    /// Another member leads, or nobody.
    Elsewhere {
        /// Where.
        leader: Option<StoreId>,
    },
    /// Everything.
    State {
        /// The state.
        state: Box<CatalogState>,
    },
    /// What a command answered.
    Reply {
        /// The answer.
        reply: CatalogReply,
    },
    /// The volume as it is now; none if it is gone.
    Volume {
        /// The record.
        record: Option<Box<VolumeRecord>>,
    },
    /// The snapshot as it is now; none if it is gone.
    Snapshot {
        /// The record.
        record: Option<Box<SnapshotRecord>>,
    },
    /// The seat's member, or why there is none.
    Seat {
        /// The member that runs there.
        replica: Option<ReplicaId>,
        /// Why none runs.
        why: String,
    },
    /// It cannot be done.
    Refused {
        /// Why.
        error: UserError,
    },
}

fn internal(error: impl std::fmt::Display) -> UserError {
    UserError::new(ErrorCode::Internal, format!("the catalog's message is not understood: {error}"))
}

/// A message as a frame: JSON in the body, which may be larger than a head.
pub(crate) fn to_frame(message: &impl Serialize) -> Result<Frame, UserError> {
    let json = serde_json::to_vec(message).map_err(internal)?;
    Ok(Frame { head: Bytes::new(), body: vec![Bytes::from(json)] })
}

/// Reads what [`to_frame`] made.
pub(crate) fn from_frame<T: for<'de> Deserialize<'de>>(frame: Frame) -> Result<T, UserError> {
    serde_json::from_slice(&frame.into_body()).map_err(internal)
}
