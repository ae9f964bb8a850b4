//! A volume's snapshot quota (INV-QUOTA): its layers never hold more than its size and the quota.
//!
//! The bound is kept where a snapshot is made, not where a guest writes: a guest is never made to wait for snapshots that
//! somebody else takes. Once a snapshot is made, everything that the layers hold then may have to stay while the guest
//! writes its whole volume anew. So a snapshot is made only if all that they hold is within the quota.
//!
//! The leader looks at its own layers: those of the others hold the same. What is proposed in the same moment is not seen,
//! at most as much as may be on its way into a journal.

use holdfast_protocol::command::VolumeCommand;
use holdfast_protocol::planted::is_planted;
use holdfast_protocol::refusal::Refusal;
use holdfast_protocol::volume::VolumeReply;
use holdfast_store::StoreError;
use holdfast_types::{ByteSize, LogIndex, SnapshotId};

use crate::messages::DataReply;
use crate::volume::Volume;

/// How often it is looked again when a pass of the cleaner came between.
const LOOKS_MAX: usize = 8;

impl Volume {
    /// The answer to a command that makes a snapshot which is refused for a quota.
    pub(crate) async fn refused_for_quota(
        &self,
        command: &VolumeCommand,
        quota: Option<ByteSize>,
        index: LogIndex,
    ) -> Option<DataReply> {
        let (VolumeCommand::Snapshot { id, .. }, Some(quota)) = (command, quota) else { return None };
        match self.beyond_quota(*id, quota).await {
            Ok(refusal) => refusal.map(|why| DataReply::Applied { index, reply: VolumeReply::Refused(why) }),
            Err(error) => Some(self.elsewhere(format!("what the volume holds is not known: {error}"))),
        }
    }

    /// Why a snapshot is not made now, if the volume has to stay within a quota. One that is there already is no matter: its
    /// creation is only repeated.
    async fn beyond_quota(&self, id: SnapshotId, quota: ByteSize) -> Result<Option<Refusal>, StoreError> {
        if self.living(id).is_some() || is_planted("snapshot-quota-ignored") {
            return Ok(None);
        }
        for _ in 0..LOOKS_MAX {
            let before = self.data().checkpoint().id;
            let held = self.data().held().await?;
            // What was brought home in between was seen neither here nor there.
            if self.data().checkpoint().id != before {
                continue;
            }
            return Ok(match held.bytes > quota.0 {
                true if held.is_falling => Some(Refusal::SnapshotsMerging),
                true => Some(Refusal::SnapshotQuota { held: held.bytes, quota: quota.0 }),
                false => None,
            });
        }
        Ok(Some(Refusal::SnapshotsMerging))
    }
}
