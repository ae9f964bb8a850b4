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
        Ok(self.departures.destroyed.may_make(id)?)
    }

    /// Notes, durably, that a replica is destroyed: it is never made here again. Before anything of it is removed.
    pub async fn note_destroyed(&self, id: ReplicaIdentity) -> Result<(), StoreError> {
        let noting = || self.departures.destroyed.note_destroyed(id);
        match (noting().await, self.journal().reserve()) {
            // INV-SPACE: what makes room needs a little of it.
            (Err(error), Some(reserve)) if error.is_full() => {
                reserve.give_up().await?;
                let _using = reserve.in_use();
                noting().await
            }
            (noted, _) => noted,
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
        self.note_destroyed(id).await?;
        // It may have begun to start meanwhile.
        self.check_not_starting(id)?;
        self.stop_one(id).await;
        VolumeData::destroy(self.directory().clone(), id).await?;
        WitnessFile::destroy(self.directory(), id).await?;
        self.pasts().forget(id);
        drop(self.claim(id));
        self.journal().drop_group(id).await?;
        Ok(())
    }

    /// Notes, durably, that a replica that stands here was taken back on this revision of its volume: nothing that was
    /// decided before ends it. False if it does not stand here any more: then it can only be replaced.
    pub async fn keep(&self, id: ReplicaIdentity, revision: u64) -> Result<bool, GroupError> {
        self.check_loaded()?;
        let turn = self.turn(id.group);
        let _one_at_a_time = turn.lock().await;
        let runs = self.group(id.group).is_some_and(|group| group.id() == id);
        if !runs && !self.faulty().iter().any(|faulty| faulty.id == id) {
            return Ok(false);
        }
        self.departures.destroyed.note_kept(id, revision).await?;
        Ok(true)
    }
}
