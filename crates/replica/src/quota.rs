//! A volume's snapshot quota (INV-QUOTA): its layers never hold more than its size and the quota.
//!
//! The bound is kept where a snapshot is made, not where a guest writes: a guest is never made to wait for snapshots that
//! somebody else takes. Once a snapshot is made, everything that the layers hold then may have to stay while the guest
//! writes its whole volume anew. So a snapshot is made only if all that they hold is within the quota.
//!
//! The leader looks at its own layers: those of the others hold the same, but for what they have not merged yet. What is
//! proposed in the same moment is not seen, at most as much as may be on its way into a journal.

use holdfast_protocol::command::VolumeCommand;
use holdfast_protocol::planted::is_planted;
use holdfast_protocol::refusal::Refusal;
use holdfast_protocol::volume::VolumeReply;
use holdfast_store::StoreError;
use holdfast_types::{ByteSize, CHUNK_BYTES, LogIndex, SnapshotId};

use crate::messages::DataReply;
use crate::volume::Volume;

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
        // Layers are counted in whole chunks: a quota as large as the volume is to be enough for one snapshot.
        let quota = quota.0.next_multiple_of(CHUNK_BYTES);
        match self.data().held().await? {
            Some(held) if held.most <= quota => Ok(None),
            Some(held) if held.home > quota && !held.is_falling => {
                Ok(Some(Refusal::SnapshotQuota { held: held.home, quota }))
            }
            // What came last, or was deleted last, is settled with the next checkpoint.
            _ => {
                self.machine().want_checkpoint();
                Ok(Some(Refusal::SnapshotsUnsettled))
            }
        }
    }
}
