//! The reserve of a store: room that is kept back, so that a full medium can always be made less full.
//!
//! It is a file that is allocated and never written. When the medium has no room for what a pass of the cleaner needs,
//! the file is emptied: what stands in the journal comes home in the room that this makes, and trims, drops of
//! snapshots and their merges, and the checkpoints that they need, go on. Only when as much can be allocated again is
//! the medium called anything but full.
//!
//! INV-SPACE: data writes are admitted only while the reserve is whole, and it is as large as the journal. So what
//! waits in the journal when the medium turns out to be full has room.
//!
//! Nothing is believed of the file but what is allocated of it now: it needs no flush, and a crash at any moment leaves a
//! reserve that is whole or not.

use std::cell::Cell;
use std::future::Future;
use std::rc::{Rc, Weak};

use holdfast_env::Instant;
use holdfast_env::disk::{Directory, File, OpenMode};
use tokio::sync::Notify;

use crate::StoreError;

/// Its file.
pub(crate) const NAME: &str = "reserve";
/// The last part of its room is for what makes room only.
const LAST_PART: u64 = 4;

struct Inner {
    /// Weak: whoever still holds the journal does not hold the directory's lock.
    directory: Weak<dyn Directory>,
    file: Rc<dyn File>,
    bytes: u64,
    /// Since when it is not whole.
    full_since: Cell<Option<Instant>>,
    /// How often it was given up.
    given_up: Cell<u64>,
    /// Who needs the room that it leaves, now.
    users: Cell<u32>,
    changed: Notify,
    /// One change of the file at a time.
    alone: tokio::sync::Mutex<()>,
}

/// The reserve of one store. Cheap to clone.
#[derive(Clone)]
pub struct Reserve(Rc<Inner>);

/// The room of a reserve that was given up is needed; it is not taken back before this is dropped.
pub struct InUse(Rc<Inner>);

impl Drop for InUse {
    fn drop(&mut self) {
        self.0.users.set(self.0.users.get() - 1);
    }
}

fn wrap(error: &std::io::Error) -> StoreError {
    StoreError::io(NAME, error)
}

impl Reserve {
    /// Opens a store's reserve of so many bytes, or makes it. A medium that has no room for it is full from the start.
    pub async fn open(directory: Rc<dyn Directory>, bytes: u64) -> Result<Self, StoreError> {
        let found = directory.list(NAME).await.map_err(|error| wrap(&error))?.iter().any(|name| name == NAME);
        let mode = if found { OpenMode::Existing } else { OpenMode::CreateNew };
        let file = directory.open(NAME, mode).await.map_err(|error| wrap(&error))?;
        let reserve = Self(Rc::new(Inner {
            directory: Rc::downgrade(&directory),
            file,
            bytes,
            full_since: Cell::new(Some(Instant::now())),
            given_up: Cell::new(0),
            users: Cell::new(0),
            changed: Notify::new(),
            alone: tokio::sync::Mutex::new(()),
        }));
        if !reserve.refill().await? {
            tracing::warn!(bytes, "the medium has no room for the store's reserve: it is full");
            reserve.0.given_up.set(1);
        }
        Ok(reserve)
    }

    /// Whether the medium is full: no data is taken that needs room.
    pub fn is_full(&self) -> bool {
        self.0.full_since.get().is_some()
    }

    /// Since when it is full.
    pub fn full_since(&self) -> Option<Instant> {
        self.0.full_since.get()
    }

    /// How often the medium has been found full.
    pub fn times_full(&self) -> u64 {
        self.0.given_up.get()
    }

    /// Its size when it is whole.
    pub fn bytes(&self) -> u64 {
        self.0.bytes
    }

    /// Whether of its room, once it was given up, more is left than what is kept for what makes room.
    pub async fn leaves_some(&self) -> bool {
        let least = self.0.bytes / LAST_PART;
        // A medium that does not tell has none.
        self.available().await.is_ok_and(|available| available > least)
    }

    /// Ends when the medium has become full, or is so no more, since this call.
    pub fn changed(&self) -> impl Future<Output = ()> + '_ {
        self.0.changed.notified()
    }

    /// Keeps its room free for whoever asks, while it is given up.
    pub fn in_use(&self) -> InUse {
        self.0.users.set(self.0.users.get() + 1);
        InUse(self.0.clone())
    }

    /// The medium is full: gives the reserve's room to what makes room.
    pub async fn give_up(&self) -> Result<(), StoreError> {
        let _alone = self.0.alone.lock().await;
        if self.is_full() {
            return Ok(());
        }
        tracing::warn!(bytes = self.0.bytes, "the medium is full: writes wait for room");
        // First of all nothing more is admitted.
        self.0.full_since.set(Some(Instant::now()));
        self.0.given_up.set(self.0.given_up.get() + 1);
        self.0.changed.notify_waiters();
        self.empty().await
    }

    async fn empty(&self) -> Result<(), StoreError> {
        self.0.file.punch(0, self.0.bytes).await.map_err(|error| wrap(&error))
    }

    /// Takes the room again if it is there, and nobody uses it; whether the reserve is whole then.
    pub async fn refill(&self) -> Result<bool, StoreError> {
        let _alone = self.0.alone.lock().await;
        if !self.is_full() {
            return Ok(true);
        }
        if self.0.users.get() > 0 {
            return Ok(false);
        }
        let whole = match self.0.file.allocate(0, self.0.bytes).await.map_err(|error| wrap(&error)) {
            Ok(()) => self.0.users.get() == 0 && self.is_whole().await?,
            Err(error) if error.is_full() => false,
            Err(error) => return Err(error),
        };
        if !whole {
            // A part of it would only be in the way.
            self.empty().await?;
            return Ok(false);
        }
        if self.0.given_up.get() > 0 {
            tracing::info!(bytes = self.0.bytes, "the medium has room again: writes go on");
        }
        self.0.full_since.set(None);
        self.0.changed.notify_waiters();
        Ok(true)
    }

    /// Whether it stands on the medium. A file system that allocates nothing ahead must have as much free.
    async fn is_whole(&self) -> Result<bool, StoreError> {
        let size = self.0.file.size().await.map_err(|error| wrap(&error))?;
        if size.allocated >= self.0.bytes {
            return Ok(true);
        }
        Ok(self.available().await? >= self.0.bytes)
    }

    /// Bytes that are free on the medium; none once the store is closed.
    async fn available(&self) -> Result<u64, StoreError> {
        let Some(directory) = self.0.directory.upgrade() else { return Ok(0) };
        let space = directory.space().await.map_err(|error| wrap(&error))?;
        Ok(space.available)
    }
}
