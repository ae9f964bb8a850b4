//! How replicas leave a store, and who may come back: nobody who was destroyed (INV-TERM), and nobody is destroyed who
//! was taken back meanwhile (INV-MEMBER). The store notes both before anything happens
//! (`holdfast_store::destroyed_file`), for requests may arrive late and out of order.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use holdfast_env::disk::Directory;
use holdfast_protocol::planted::is_planted;
use holdfast_store::destroyed_file::{DestroyedFile, Remembered};
use holdfast_store::volume::VolumeData;
use holdfast_store::witness_file::WitnessFile;
use holdfast_store::{ReplicaIdentity, StoreError, StoreIdentity};
use holdfast_types::GroupId;
use tokio::sync::Mutex;

use crate::group::GroupError;
use crate::host::Host;

/// What a store knows of those that have left it.
pub(crate) struct Departures {
    destroyed: DestroyedFile,
    /// Of those who make and remove replicas of a group.
    turns: RefCell<BTreeMap<GroupId, Rc<Mutex<()>>>>,
}

impl Departures {
    pub(crate) async fn open(
        directory: Rc<dyn Directory>,
        identity: &StoreIdentity,
    ) -> Result<Self, StoreError> {
        let destroyed = DestroyedFile::open(directory, identity.cluster, identity.store).await?;
        Ok(Self { destroyed, turns: RefCell::default() })
    }
}

impl Departures {
    /// Whether a replica may be ended here, as was decided on this revision of its volume.
    pub(crate) fn may_end(&self, id: ReplicaIdentity, revision: u64) -> Result<(), Remembered> {
        self.destroyed.may_destroy(id, revision)
    }
}

impl From<Remembered> for GroupError {
    fn from(remembered: Remembered) -> Self {
        Self::Refused(remembered.to_string())
    }
}

impl Host {
    /// Who makes or removes a replica of a group has its turn; one at a time.
    pub(crate) fn turn(&self, group: GroupId) -> Rc<Mutex<()>> {
        let mut turns = self.departures.turns.borrow_mut();
        turns.retain(|_, turn| Rc::strong_count(turn) > 1);
        turns.entry(group).or_default().clone()
    }

    /// INV-TERM: refuses to make a replica that was destroyed here.
    pub fn may_make(&self, id: ReplicaIdentity) -> Result<(), GroupError> {
        self.recoveries.may_make(id)?;
        Ok(self.departures.destroyed.may_make(id)?)
    }

    /// Notes, durably, that a replica is destroyed: it is never made here again. Before anything of it is removed.
    pub async fn note_destroyed(&self, id: ReplicaIdentity) -> Result<(), StoreError> {
        self.with_the_reserve(|| self.departures.destroyed.note_destroyed(id)).await
    }

    /// INV-SPACE: what makes room, or must be known on a full medium too, needs a little of it.
    pub(crate) async fn with_the_reserve<T, W: Future<Output = Result<T, StoreError>>>(
        &self,
        work: impl Fn() -> W,
    ) -> Result<T, StoreError> {
        match (work().await, self.journal().reserve()) {
            (Err(error), Some(reserve)) if error.is_full() => {
                reserve.give_up().await?;
                let _using = reserve.in_use();
                work().await
            }
            (done, _) => done,
        }
    }

    /// Removes a replica and gives its space back, as was decided on this revision of its volume. Removing it again is
    /// fine. Refused if the replica was taken back on a later revision.
    pub async fn destroy(&self, id: ReplicaIdentity, revision: u64) -> Result<(), GroupError> {
        self.check_loaded()?;
        let turn = self.turn(id.group);
        let _one_at_a_time = turn.lock().await;
        if !is_planted("late-destroy-obeyed") {
            self.departures.destroyed.may_destroy(id, revision)?;
        }
        self.check_not_starting(id)?;
        // INV-RECOVER: what was decided of the group before does not end what goes on in its files.
        self.recoveries.may_destroy(id)?;
        let files = self.recoveries.files_of(id);
        self.note_destroyed(id).await?;
        if files != id {
            self.note_destroyed(files).await?;
        }
        // It may have begun to start meanwhile.
        self.check_not_starting(id)?;
        self.stop_one(id).await;
        VolumeData::destroy(self.directory().clone(), files).await?;
        if files != id {
            VolumeData::destroy(self.directory().clone(), id).await?;
        }
        WitnessFile::destroy(self.directory(), files).await?;
        self.pasts().forget(id);
        drop(self.claim(files));
        self.journal().drop_group(files).await?;
        // That a group was replaced is told for as long as there is room, whoever stands here.
        if files == id {
            self.recoveries.forget(files).await?;
        }
        Ok(())
    }

    /// Notes, durably, that a replica that stands here was taken back on this revision of its volume: nothing that was
    /// decided before ends it. False if it does not stand here any more: then it can only be replaced.
    pub async fn keep(&self, id: ReplicaIdentity, revision: u64) -> Result<bool, GroupError> {
        self.check_loaded()?;
        let turn = self.turn(id.group);
        let _one_at_a_time = turn.lock().await;
        // INV-RECOVER: a recovery that has sealed it is not called off any more, and nothing unseals it.
        if self.recoveries.is_over(id) && !is_planted("sealed-is-kept") {
            let why = format!("replica {} was sealed for a recovery: it cannot be taken back", id.replica);
            return Err(GroupError::Refused(why));
        }
        let runs = self.group(id.group).is_some_and(|group| group.id() == id);
        if !runs && !self.faulty().iter().any(|faulty| faulty.id == id) {
            return Ok(false);
        }
        self.departures.destroyed.note_kept(id, revision).await?;
        Ok(true)
    }
}
