//! Makes and removes snapshots as the catalog wants it: the record first, then the command in the volume's log, then
//! the record again. Whoever is interrupted in between leaves a record that says what is to be done, and the
//! reconciler does it.

use std::rc::Rc;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use holdfast_protocol::catalog::{
    CatalogCommand, CatalogReply, CatalogState, SnapshotPhase, SnapshotRecord, VolumePhase, VolumeRecord,
};
use holdfast_protocol::command::VolumeCommand;
use holdfast_protocol::volume::VolumeReply;
use holdfast_types::{ErrorCode, SnapshotId, UserError};

use crate::member::{AnswerError, Member};
use crate::volumes;

/// How long a snapshot may take while somebody waits for it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
/// How long while nobody does, and how many at once.
const BACKGROUND_PATIENCE: Duration = Duration::from_secs(2);
const BACKGROUND_AT_ONCE: usize = 8;

impl Member {
    pub(crate) async fn create_snapshot(
        self: &Rc<Self>,
        volume: &str,
        name: String,
        key: String,
        created_ms: u64,
    ) -> Result<SnapshotRecord, AnswerError> {
        let state = self.read().await?;
        let volume = state.get(volume)?.id;
        self.check_room()?;
        let id = SnapshotId(holdfast_env::random_u128());
        let command = CatalogCommand::CreateSnapshot { id, volume, name, key, created_ms };
        let CatalogReply::Snapshot { record } = self.apply(&command).await? else {
            return Err(UserError::new(ErrorCode::Internal, "a creation answered without a snapshot").into());
        };
        self.settle_snapshot(record.id, PATIENCE).await?;
        match self.machine.with_state(|state| state.snapshots.get(&record.id).cloned()) {
            Some(record) if record.phase == SnapshotPhase::Ready => Ok(record),
            _ => Err(UserError::new(ErrorCode::NotFound, "the snapshot was deleted meanwhile").into()),
        }
    }

    /// Finishes what is half done.
    pub(crate) async fn settle_snapshots(self: &Rc<Self>, state: &CatalogState) {
        let half_done = state.snapshots.values().filter(|record| record.phase != SnapshotPhase::Ready);
        let work = |record: SnapshotRecord| async move {
            let settled = self.settle_snapshot(record.id, BACKGROUND_PATIENCE).await;
            if let Err(AnswerError::Refused(error)) = settled {
                tracing::info!(snapshot = record.name, %error, "the reconciler tries again later");
            }
        };
        stream::iter(half_done.cloned()).for_each_concurrent(BACKGROUND_AT_ONCE, work).await;
    }

    /// Works on one snapshot until it is ready or gone, or something is in the way.
    pub(crate) async fn settle_snapshot(
        self: &Rc<Self>,
        id: SnapshotId,
        patience: Duration,
    ) -> Result<(), AnswerError> {
        let lock = self.working_snapshots.borrow_mut().entry(id).or_default().clone();
        let result = {
            let _one_at_a_time = lock.lock().await;
            self.settle_locked(id, patience).await
        };
        // Two hold it: this one and the map. Whoever comes later makes a new one.
        if Rc::strong_count(&lock) == 2 {
            self.working_snapshots.borrow_mut().remove(&id);
        }
        result
    }

    async fn settle_locked(&self, id: SnapshotId, patience: Duration) -> Result<(), AnswerError> {
        let Some(record) = self.machine.with_state(|state| state.snapshots.get(&id).cloned()) else {
            return Ok(());
        };
        match record.phase {
            SnapshotPhase::Ready => Ok(()),
            SnapshotPhase::Creating => self.make_snapshot(&record, patience).await,
            SnapshotPhase::Deleting => self.drop_snapshot(&record, patience).await,
        }
    }

    fn volume_of(&self, record: &SnapshotRecord) -> Result<VolumeRecord, UserError> {
        let volume = self.machine.with_state(|state| state.volumes.get(&record.volume).cloned());
        volume.filter(|volume| volume.phase != VolumePhase::Deleting).ok_or_else(|| {
            UserError::new(ErrorCode::NotFound, format!("the volume of snapshot {} is gone", record.name))
        })
    }

    async fn made_in_log(
        &self,
        record: &SnapshotRecord,
        patience: Duration,
    ) -> Result<VolumeReply, UserError> {
        let SnapshotRecord { id, name, created_ms, .. } = record.clone();
        let command = VolumeCommand::Snapshot { id, name, created_ms };
        volumes::make_snapshot(&self.rpc, &self.volume_of(record)?, &command, patience).await
    }

    async fn dropped_in_log(
        &self,
        record: &SnapshotRecord,
        patience: Duration,
    ) -> Result<VolumeReply, UserError> {
        let (volume, command) = (self.volume_of(record)?, VolumeCommand::DropSnapshot { id: record.id });
        volumes::control(&self.rpc, volume.group, &volume.stores(), &command, patience).await
    }

    async fn make_snapshot(&self, record: &SnapshotRecord, patience: Duration) -> Result<(), AnswerError> {
        let id = record.id;
        match self.made_in_log(record, patience).await {
            Ok(VolumeReply::Snapshotted { index, size }) => {
                self.apply(&CatalogCommand::SnapshotReady { id, index, size }).await?;
                Ok(())
            }
            Ok(other) => {
                let message = format!("a snapshot was answered as another command: {other:?}");
                Err(UserError::new(ErrorCode::Internal, message).into())
            }
            // One that a copy waits for is called off with the copy only.
            Err(error)
                if record.copy.is_some()
                    || [ErrorCode::Unavailable, ErrorCode::TimedOut].contains(&error.code) =>
            {
                Err(error.into())
            }
            // Asking again does not help: what was intended is called off, and whatever there is of it goes.
            Err(error) => {
                self.apply(&CatalogCommand::DeleteSnapshot { id }).await?;
                self.drop_snapshot(record, patience).await?;
                Err(error.into())
            }
        }
    }

    async fn drop_snapshot(&self, record: &SnapshotRecord, patience: Duration) -> Result<(), AnswerError> {
        match self.dropped_in_log(record, patience).await {
            Ok(_) => {}
            // It went with its volume.
            Err(error) if error.code == ErrorCode::NotFound => {}
            Err(error) => return Err(error.into()),
        }
        self.apply(&CatalogCommand::ForgetSnapshot { id: record.id }).await?;
        Ok(())
    }
}
