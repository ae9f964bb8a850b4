//! A small file of a store that stands in two equal copies: either may rot. It is made when there is something to write, and
//! takes the room for both copies then, so that later changes need none.

use std::cell::RefCell;
use std::rc::Rc;

use holdfast_env::disk::{AlignedBuffer, Directory, Durability, File, OpenMode};
use holdfast_types::{ClusterId, DecodeError, StoreId};

use crate::StoreError;

/// What one copy says.
pub(crate) trait Copied: Sized + PartialEq {
    /// Reads a copy; damage is an error.
    fn decode(copy: &[u8]) -> Result<Self, DecodeError>;
    /// Grows with every change.
    fn generation(&self) -> u64;
    /// The store whose file it is.
    fn whose(&self) -> (ClusterId, StoreId);
}

/// What was found.
pub(crate) enum Found<T> {
    /// Nothing was ever written.
    Nothing,
    /// Neither copy can be read.
    Unreadable,
    /// The newest copy, and whether both are equal.
    Newest(T, bool),
}

/// The file.
pub(crate) struct TwinFile {
    directory: Rc<dyn Directory>,
    name: &'static str,
    /// Of one copy.
    copy_bytes: usize,
    file: RefCell<Option<Rc<dyn File>>>,
}

impl TwinFile {
    pub(crate) fn new(directory: Rc<dyn Directory>, name: &'static str, copy_bytes: usize) -> Self {
        Self { directory, name, copy_bytes, file: RefCell::default() }
    }

    fn wrap(&self, error: &std::io::Error) -> StoreError {
        StoreError::io(self.name, error)
    }

    fn flushing(&self, error: &std::io::Error) -> StoreError {
        StoreError::flush(self.name, error)
    }

    fn both_bytes(&self) -> u64 {
        2 * self.copy_bytes as u64
    }

    /// Reads the file. One of another store is refused.
    pub(crate) async fn load<T: Copied>(&self, whose: (ClusterId, StoreId)) -> Result<Found<T>, StoreError> {
        let names = self.directory.list(self.name).await.map_err(|error| self.wrap(&error))?;
        if !names.iter().any(|name| name == self.name) {
            return Ok(Found::Nothing);
        }
        let opened = self.directory.open(self.name, OpenMode::Existing).await;
        let file = opened.map_err(|error| self.wrap(&error))?;
        if file.size().await.map_err(|error| self.wrap(&error))?.length < self.both_bytes() {
            // Its making was interrupted: nothing was ever written to it.
            return Ok(Found::Nothing);
        }
        // A killed daemon may have left the newest generation in a cache.
        file.flush().await.map_err(|error| self.flushing(&error))?;
        let copies = self.copies::<T>(&file).await;
        if let Some(other) = copies.iter().flatten().find(|found| found.whose().1 != whose.1) {
            let name = |(cluster, store): (ClusterId, StoreId)| format!("store {store} of cluster {cluster}");
            return Err(StoreError::Identity { expected: name(whose), found: name(other.whose()) });
        }
        *self.file.borrow_mut() = Some(file);
        if copies.is_empty() {
            return Ok(Found::Unreadable);
        }
        let is_whole = copies.len() == 2 && copies[0] == copies[1];
        let newest = copies.into_iter().flatten().max_by_key(Copied::generation);
        Ok(newest.map_or(Found::Nothing, |newest| Found::Newest(newest, is_whole)))
    }

    /// The copies that can be read; none of those that were never written.
    async fn copies<T: Copied>(&self, file: &Rc<dyn File>) -> Vec<Option<T>> {
        let mut copies = Vec::new();
        for copy in 0..2 {
            let read = file.read_at(copy * self.copy_bytes as u64, self.copy_bytes).await;
            let problem = match read.map_err(|error| error.to_string()) {
                Ok(bytes) if bytes.as_slice().iter().all(|byte| *byte == 0) => {
                    copies.push(None);
                    continue;
                }
                Ok(bytes) => match T::decode(bytes.as_slice()) {
                    Ok(found) => {
                        copies.push(Some(found));
                        continue;
                    }
                    Err(error) => error.to_string(),
                },
                Err(error) => error,
            };
            tracing::error!(file = self.name, copy, why = problem, "a copy of a file of the store is lost");
        }
        copies
    }

    /// Writes so many of the copies, durably.
    pub(crate) async fn write(&self, bytes: &AlignedBuffer, copies: u64) -> Result<(), StoreError> {
        let file = self.made().await?;
        for copy in 0..copies {
            let bytes = AlignedBuffer::copy_of(bytes.as_slice());
            let written = file.write_at(copy * self.copy_bytes as u64, bytes, Durability::Durable).await;
            written.map_err(|error| self.wrap(&error))?;
        }
        Ok(())
    }

    async fn made(&self) -> Result<Rc<dyn File>, StoreError> {
        let opened = self.file.borrow().clone();
        if let Some(file) = opened {
            return Ok(file);
        }
        // A try before this one may have found no room for it.
        let there = match self.directory.open(self.name, OpenMode::Existing).await {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                self.directory.open(self.name, OpenMode::CreateNew).await
            }
            there => there,
        };
        let file = there.map_err(|error| self.wrap(&error))?;
        file.allocate(0, self.both_bytes()).await.map_err(|error| self.wrap(&error))?;
        file.set_length(self.both_bytes()).await.map_err(|error| self.wrap(&error))?;
        file.flush().await.map_err(|error| self.flushing(&error))?;
        self.directory.sync().await.map_err(|error| self.flushing(&error))?;
        *self.file.borrow_mut() = Some(file.clone());
        Ok(file)
    }
}
