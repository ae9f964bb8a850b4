//! What a voter has applied of who may write: what it signs of a fence rests on it.

use std::collections::BTreeSet;
use std::time::Duration;

use holdfast_protocol::fence::Applied;
use holdfast_protocol::volume::VolumeState;
use holdfast_types::{GroupId, LogIndex, ReplicaId, VolumeId};

use crate::group::{Group, GroupError};
use crate::host::Host;

/// How long a leader may take to show that it leads, and to apply what is committed.
const PATIENCE: Duration = Duration::from_secs(2);

/// A voter's view of its volume.
pub struct VoterView {
    /// The volume.
    pub volume: VolumeId,
    /// The replica.
    pub replica: ReplicaId,
    /// What it has applied.
    pub state: VolumeState,
    /// As of this entry.
    pub index: LogIndex,
    /// The voters that decide, by its own log.
    pub configurations: Vec<BTreeSet<ReplicaId>>,
}

impl VoterView {
    /// As a statement is checked against it.
    pub fn applied(&self) -> Applied<'_> {
        Applied {
            replica: self.replica,
            state: &self.state,
            index: self.index,
            configurations: &self.configurations,
        }
    }
}

fn view(volume: VolumeId, group: &Group, state: VolumeState) -> VoterView {
    VoterView {
        volume,
        replica: group.id().replica,
        state,
        index: group.position().applied_index(),
        configurations: group.configurations(),
    }
}

impl Host {
    /// What the replica of a group has applied that runs here, data or witness, once it has applied so far; or what
    /// it has after two seconds. None if none runs here.
    pub async fn voter_view(&self, group: GroupId, index: LogIndex) -> Option<VoterView> {
        let running = self.group(group)?;
        // In time or not, what is there is looked at.
        let _reached = holdfast_env::timeout(PATIENCE, running.position().reached(index)).await;
        if let Some(witness) = self.witness(group) {
            return Some(view(witness.of(), witness.group(), witness.state()));
        }
        let running = self.volume(group)?;
        Some(view(self.standing_volume(running.group().id())?, running.group(), running.state()))
    }

    /// The same of a leader: of a moment in which it led, with everything that was committed before.
    pub async fn leader_view(&self, group: GroupId) -> Result<VoterView, GroupError> {
        let gone = || GroupError::Stopped("the replica does not run here".into());
        let leading = self.volume(group).ok_or_else(gone)?;
        let index = leading.group().confirm_leadership().await?;
        let view = self.voter_view(group, index).await.ok_or_else(gone)?;
        if view.index < index { Err(GroupError::TimedOut) } else { Ok(view) }
    }
}
