//! What a witness applies: a volume's fencing state, and nothing of its blocks.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::Rc;

use bytes::Bytes;
use futures_util::future::LocalBoxFuture;
use holdfast_protocol::command::VolumeCommand;
use holdfast_protocol::volume::VolumeState;
use holdfast_store::volume::Checkpoint;
use holdfast_store::witness_file::WitnessFile;
use holdfast_store::{EntryId, StoreError};
use holdfast_types::LogIndex;
use tokio::sync::{Mutex, Notify};

use crate::config::{AppData, AppReply};
use crate::machine::{ApplyError, CheckError, Staged, StateMachine};
use crate::volume::check_command;

pub(super) struct WitnessMachine {
    state: RefCell<VolumeState>,
    file: WitnessFile,
    writing: Mutex<()>,
    /// Payload bytes that were applied since somebody looked.
    applied: Cell<u64>,
    changed: Notify,
}

impl WitnessMachine {
    pub(super) fn new(state: VolumeState, file: WitnessFile) -> Rc<Self> {
        let (writing, applied, changed) = (Mutex::new(()), Cell::new(0), Notify::new());
        Rc::new(Self { state: RefCell::new(state), file, writing, applied, changed })
    }

    pub(super) fn state(&self) -> VolumeState {
        self.state.borrow().clone()
    }

    pub(super) fn file(&self) -> &WitnessFile {
        &self.file
    }

    pub(super) fn wake(&self) {
        self.changed.notify_waiters();
    }

    /// Ends when so much payload was applied since this was last called, or it is woken.
    pub(super) fn grown(&self, bytes: u64) -> impl Future<Output = ()> + '_ {
        self.applied.set(0);
        async move {
            loop {
                let changed = self.changed.notified();
                if self.applied.get() >= bytes {
                    return;
                }
                changed.await;
            }
        }
    }

    /// Makes `checkpoint` the one to start from, durably, unless there is a newer one.
    pub(super) async fn save(&self, checkpoint: Checkpoint, everywhere: LogIndex) -> Result<(), StoreError> {
        let _one_at_a_time = self.writing.lock().await;
        let newest = self.file.newest();
        if newest.checkpoint.id.index >= checkpoint.id.index {
            return Ok(());
        }
        self.file.write(checkpoint, everywhere.max(newest.everywhere)).await
    }
}

impl StateMachine for WitnessMachine {
    /// As a data replica does: what it acknowledges it can give to others.
    fn check(&self, data: &AppData) -> Result<(), CheckError> {
        check_command(data)
    }

    fn apply(&self, id: EntryId, data: &AppData) -> Result<AppReply, ApplyError> {
        let command = VolumeCommand::decode(&data.head)
            .map_err(|error| ApplyError { index: id.index, why: error.to_string() })?;
        self.applied.set(self.applied.get() + data.payload.len() as u64);
        Ok(AppReply::Volume(self.state.borrow_mut().apply(id.index, &command)))
    }

    fn encode_state(&self) -> Bytes {
        self.state.borrow().encode()
    }

    fn checkpoint(&self) -> Option<Checkpoint> {
        Some(self.file.newest().checkpoint)
    }

    fn install(
        &self,
        checkpoint: Checkpoint,
        _staged: Option<Rc<dyn Staged>>,
    ) -> LocalBoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move {
            let state = VolumeState::decode(&checkpoint.state).map_err(|error| {
                StoreError::Failed(format!("the leader's checkpoint is damaged: {error}"))
            })?;
            // Of the entries that it covers it knows nothing: somebody may lack them.
            self.save(checkpoint, LogIndex::ZERO).await?;
            *self.state.borrow_mut() = state;
            Ok(())
        })
    }

    fn after_apply(&self, _index: LogIndex) {
        self.changed.notify_waiters();
    }
}
