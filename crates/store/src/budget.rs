//! The byte budget of a store: how much of its medium it may take.
//!
//! A directory that refuses what would go beyond the budget as a medium would that is full, so that a store does on its
//! budget all that it does on a full medium (`reserve.rs`), and nothing else: data waits, what makes room goes on, and what
//! waits goes on by itself. Journal and reserve count.
//!
//! INV-BUDGET: nothing takes room before it is counted against the budget, and what is counted is never less than what
//! stands. What is taken is counted too high first, by all that might be new of it; the truth comes from counting all
//! files anew, as `du` does, and only when a budget would be exceeded by what is known. So no file is asked in vain, and
//! room that was given back, or turned out to be taken already, is found when it is needed.
//!
//! What is refused: room that is taken ahead, and writes beyond the end of a file. A write within a file is never refused:
//! its room was taken before, and a refusal would come when nothing can be given back any more.
//!
//! A budget may be smaller than what stands already. Then the reserve does not fit into it, so the store is full; but what
//! stood when the store was opened, and the room of a reserve beside it, stay allowed, or trims could make no checkpoint
//! and no room. That allowance shrinks with what stands, down to the budget.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::{Rc, Weak};

use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use holdfast_env::disk::{AlignedBuffer, Directory, Durability, File, FileSize, OpenMode, Space};

use crate::journal::planted;
use crate::standing::Standing;
use crate::{StoreError, reserve};

/// Bytes that a budget must have beside journal and reserve.
const ROOM_LEAST: u64 = 16 << 20;
/// Counts that one request makes at most: others may take and give back meanwhile.
const COUNTS_MAX: usize = 2;

/// What a file is held to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Upto {
    /// The budget.
    Capacity,
    /// The budget, or what stood before and a reserve beside it.
    Allowance,
}

struct Inner {
    /// Weak: whoever still holds a file does not hold the directory's lock.
    directory: Weak<dyn Directory>,
    /// None: as much as the medium has.
    capacity: Option<u64>,
    /// Bytes of a whole reserve.
    reserve: u64,
    allowance: Cell<u64>,
    standing: RefCell<Option<Rc<Standing>>>,
    /// Taken, and ended before the count under way began.
    before: Cell<u64>,
    /// Taken and ended since.
    since: Cell<u64>,
    /// Being taken now.
    under_way: Cell<u64>,
    /// Written within files since the last count: it may have filled holes, which a rebuild leaves in its chunks.
    within: Cell<u64>,
    /// Times that something may have been given back, and how many of them the last count knows of.
    given_back: Cell<(u64, u64)>,
    /// Counts that have begun, and the number of the last one that ended well.
    counts: Cell<(u64, u64)>,
    counting: tokio::sync::Mutex<()>,
    /// Whether the last refusal was the budget's, not the medium's.
    has_refused: Cell<bool>,
}

/// Bytes that are written within files before what stands is counted again.
const COUNT_AFTER: u64 = 16 << 20;

/// The budget of one store. Cheap to clone.
#[derive(Clone)]
pub struct Budget(Rc<Inner>);

/// Room that is counted, and being taken.
struct Taking(Rc<Inner>, u64);

impl Drop for Taking {
    fn drop(&mut self) {
        self.0.under_way.set(self.0.under_way.get() - self.1);
        self.0.since.set(self.0.since.get().saturating_add(self.1));
    }
}

/// What is about to take room in a file.
#[derive(Clone, Copy)]
struct Range {
    offset: u64,
    length: u64,
    /// A write: what lies within the file was taken before.
    is_write: bool,
}

impl Range {
    fn end(&self) -> u64 {
        self.offset.saturating_add(self.length)
    }

    /// Bytes that a file may grow by for it, at most: those beyond its end, and as many within it as it has holes.
    fn growth(&self, size: FileSize) -> u64 {
        let beyond = self.end().saturating_sub(size.length.max(self.offset));
        if self.is_write {
            return if planted("refuse-within-a-file") { self.length } else { beyond };
        }
        let holes = size.length.saturating_sub(size.allocated);
        beyond.saturating_add(self.length.saturating_sub(beyond).min(holes))
    }
}

impl Budget {
    /// Whether a store with a journal of so many bytes can work on a budget.
    pub fn check(capacity: Option<u64>, journal: u64) -> Result<(), StoreError> {
        let least = journal.saturating_mul(2).saturating_add(ROOM_LEAST);
        match capacity.filter(|capacity| *capacity < least) {
            Some(asked) => Err(StoreError::Capacity { asked, least }),
            None => Ok(()),
        }
    }

    /// The budget of the store in a directory, whose journal and whole reserve take so many bytes each.
    pub async fn open(
        directory: &Rc<dyn Directory>,
        capacity: Option<u64>,
        journal: u64,
    ) -> Result<Self, StoreError> {
        Self::check(capacity, journal)?;
        let budget = Self(Rc::new(Inner {
            directory: Rc::downgrade(directory),
            capacity,
            reserve: journal,
            allowance: Cell::new(u64::MAX),
            standing: RefCell::default(),
            before: Cell::default(),
            since: Cell::default(),
            under_way: Cell::default(),
            within: Cell::default(),
            given_back: Cell::default(),
            counts: Cell::default(),
            counting: tokio::sync::Mutex::new(()),
            has_refused: Cell::new(false),
        }));
        if capacity.is_some() {
            budget.count().await.map_err(|error| StoreError::io("counting what stands", &error))?;
        }
        Ok(budget)
    }

    /// The directory as the budget lets it be used; as it is, if there is none.
    pub fn guard(&self, directory: Rc<dyn Directory>) -> Rc<dyn Directory> {
        match self.0.capacity {
            Some(_) => Rc::new(Budgeted { inner: directory, budget: self.clone() }),
            None => directory,
        }
    }

    /// How many bytes the store may take; none: as many as there are.
    pub fn capacity(&self) -> Option<u64> {
        self.0.capacity
    }

    /// Whether it was the budget that last refused room, and not the medium.
    pub fn has_refused(&self) -> bool {
        self.0.has_refused.get()
    }

    /// What stands, counted now.
    pub async fn count_now(&self) -> io::Result<Rc<Standing>> {
        self.count().await?;
        let standing = self.0.standing.borrow().clone();
        standing.ok_or_else(|| io::Error::other("nothing was counted"))
    }

    /// What is counted as taken: never less than what stands.
    fn taken(&self) -> u64 {
        let inner = &self.0;
        let standing = inner.standing.borrow().as_ref().map_or(0, |standing| standing.total());
        [inner.before.get(), inner.since.get(), inner.under_way.get()]
            .into_iter()
            .fold(standing, u64::saturating_add)
    }

    fn limit(&self, upto: Upto) -> u64 {
        let capacity = self.0.capacity.unwrap_or(u64::MAX);
        match upto {
            Upto::Capacity => capacity,
            Upto::Allowance if planted("budget-below-what-stands") => capacity,
            Upto::Allowance => self.0.allowance.get().max(capacity),
        }
    }

    /// Whether another count would tell more.
    fn is_stale(&self) -> bool {
        let (now, counted) = self.0.given_back.get();
        let within = self.0.within.get() >= COUNT_AFTER;
        now != counted || within || self.0.before.get() > 0 || self.0.since.get() > 0
    }

    fn gave_back(&self) {
        let (now, counted) = self.0.given_back.get();
        self.0.given_back.set((now + 1, counted));
    }

    /// Counts all files anew. Whoever comes while one is under way waits for the next, and shares it.
    async fn count(&self) -> io::Result<()> {
        let inner = &self.0;
        let wanted = inner.counts.get().0 + 1;
        let _alone = inner.counting.lock().await;
        let (begun, ended) = inner.counts.get();
        if ended >= wanted {
            return Ok(());
        }
        let closed = || io::Error::other("the store is closed");
        let directory = inner.directory.upgrade().ok_or_else(closed)?;
        inner.counts.set((begun + 1, ended));
        // What has ended by now is seen. What has not stays counted, though it may be seen.
        inner.before.set(inner.before.get().saturating_add(inner.since.take()));
        inner.within.set(0);
        let (given_back, _) = inner.given_back.get();
        let standing = Standing::of(directory.sizes("").await?);
        inner.before.set(0);
        inner.given_back.set((inner.given_back.get().0, given_back));
        inner.counts.set((inner.counts.get().0, begun + 1));
        let beside = standing.total().saturating_sub(standing.reserve());
        inner.allowance.set(inner.allowance.get().min(beside.saturating_add(inner.reserve)));
        inner.standing.replace(Some(Rc::new(standing)));
        Ok(())
    }

    fn try_take(&self, bytes: u64, upto: Upto) -> Option<Taking> {
        // What takes nothing may make room: only the reserve is not to stand where it has no place.
        let grows = bytes > 0 || matches!(upto, Upto::Capacity) || planted("refuse-within-a-file");
        if grows && self.taken().saturating_add(bytes) > self.limit(upto) {
            return None;
        }
        let bytes = if planted("budget-not-kept") { 0 } else { bytes };
        self.0.under_way.set(self.0.under_way.get().saturating_add(bytes));
        Some(Taking(self.0.clone(), bytes))
    }

    /// INV-BUDGET: counts what a file may grow by, before it does.
    async fn take(&self, file: &Rc<dyn File>, range: Range, upto: Upto) -> io::Result<Taking> {
        if let Some(taking) = self.try_take(range.length, upto) {
            return Ok(taking);
        }
        for counts in 0..=COUNTS_MAX {
            let grows = range.growth(file.size().await?);
            if let Some(taking) = self.try_take(grows, upto) {
                return Ok(taking);
            }
            if counts == COUNTS_MAX || !self.is_stale() {
                break;
            }
            if let Err(error) = self.count().await {
                // What is not known is not given away.
                tracing::warn!(%error, "what stands in the store cannot be counted: nothing more is taken");
                break;
            }
        }
        self.0.has_refused.set(true);
        let (limit, taken) = (self.limit(upto), self.taken());
        let why =
            format!("the store may take {limit} bytes, and {taken} are taken: make room, or give it more");
        Err(io::Error::new(io::ErrorKind::QuotaExceeded, why))
    }

    /// Notes what came of taking room.
    fn ended<T>(&self, outcome: io::Result<T>) -> io::Result<T> {
        if outcome.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::StorageFull) {
            self.0.has_refused.set(false);
        }
        outcome
    }

    /// What the budget leaves of the medium.
    async fn space_within(&self, medium: Space) -> Space {
        if self.is_stale()
            && let Err(error) = self.count().await
        {
            tracing::warn!(%error, "what stands in the store cannot be counted");
        }
        let left = self.limit(Upto::Allowance).saturating_sub(self.taken());
        let capacity = self.limit(Upto::Capacity);
        Space { total: medium.total.min(capacity), available: medium.available.min(left) }
    }

    /// Does what may give room back, and notes it when it is done.
    fn giving_back(
        &self,
        change: LocalBoxFuture<'static, io::Result<()>>,
    ) -> LocalBoxFuture<'static, io::Result<()>> {
        let budget = self.clone();
        change.inspect(move |_| budget.gave_back()).boxed_local()
    }
}

/// A store's directory within its budget.
struct Budgeted {
    inner: Rc<dyn Directory>,
    budget: Budget,
}

impl Directory for Budgeted {
    fn open(&self, name: &str, mode: OpenMode) -> LocalBoxFuture<'static, io::Result<Rc<dyn File>>> {
        let (opening, budget) = (self.inner.open(name, mode), self.budget.clone());
        let upto = if name == reserve::NAME { Upto::Capacity } else { Upto::Allowance };
        async move {
            let inner = opening.await?;
            let length = match mode {
                OpenMode::CreateNew => 0,
                OpenMode::Existing => inner.size().await?.length,
            };
            let file = Rc::new(BudgetedFile { inner, budget, upto, length: Rc::new(Cell::new(length)) });
            Ok(file as Rc<dyn File>)
        }
        .boxed_local()
    }
    fn list(&self, prefix: &str) -> LocalBoxFuture<'static, io::Result<Vec<String>>> {
        self.inner.list(prefix)
    }
    fn sizes(&self, prefix: &str) -> LocalBoxFuture<'static, io::Result<Vec<(String, FileSize)>>> {
        self.inner.sizes(prefix)
    }
    fn remove(&self, name: &str) -> LocalBoxFuture<'static, io::Result<()>> {
        self.budget.giving_back(self.inner.remove(name))
    }
    fn rename(&self, from: &str, to: &str) -> LocalBoxFuture<'static, io::Result<()>> {
        self.budget.giving_back(self.inner.rename(from, to))
    }
    fn sync(&self) -> LocalBoxFuture<'static, io::Result<()>> {
        self.inner.sync()
    }
    fn space(&self) -> LocalBoxFuture<'static, io::Result<Space>> {
        let (medium, budget) = (self.inner.space(), self.budget.clone());
        async move { Ok(budget.space_within(medium.await?).await) }.boxed_local()
    }
}

/// A file of a [`Budgeted`] directory.
struct BudgetedFile {
    inner: Rc<dyn File>,
    budget: Budget,
    upto: Upto,
    /// At least so long is it.
    length: Rc<Cell<u64>>,
}

impl File for BudgetedFile {
    fn write_at(
        &self,
        offset: u64,
        buffer: AlignedBuffer,
        durability: Durability,
    ) -> LocalBoxFuture<'static, io::Result<AlignedBuffer>> {
        let range = Range { offset, length: buffer.len() as u64, is_write: true };
        if range.end() <= self.length.get() && !planted("refuse-within-a-file") {
            self.budget.0.within.set(self.budget.0.within.get().saturating_add(range.length));
            return self.inner.write_at(offset, buffer, durability);
        }
        let (inner, budget, upto) = (self.inner.clone(), self.budget.clone(), self.upto);
        let known = self.length.clone();
        async move {
            let taking = budget.take(&inner, range, upto).await?;
            let written = budget.ended(inner.write_at(offset, buffer, durability).await)?;
            known.set(known.get().max(range.end()));
            drop(taking);
            Ok(written)
        }
        .boxed_local()
    }
    fn read_at(&self, offset: u64, length: usize) -> LocalBoxFuture<'static, io::Result<AlignedBuffer>> {
        self.inner.read_at(offset, length)
    }
    fn read_into(
        &self,
        offset: u64,
        buffer: AlignedBuffer,
    ) -> LocalBoxFuture<'static, io::Result<AlignedBuffer>> {
        self.inner.read_into(offset, buffer)
    }
    fn flush(&self) -> LocalBoxFuture<'static, io::Result<()>> {
        self.inner.flush()
    }
    fn allocate(&self, offset: u64, length: u64) -> LocalBoxFuture<'static, io::Result<()>> {
        let range = Range { offset, length, is_write: false };
        let (inner, budget, upto) = (self.inner.clone(), self.budget.clone(), self.upto);
        let known = self.length.clone();
        async move {
            let taking = budget.take(&inner, range, upto).await?;
            budget.ended(inner.allocate(offset, length).await)?;
            // A file system that takes nothing ahead leaves the file as long as it was.
            if range.end() > known.get() {
                known.set(known.get().max(inner.size().await?.length));
            }
            drop(taking);
            Ok(())
        }
        .boxed_local()
    }
    fn punch(&self, offset: u64, length: u64) -> LocalBoxFuture<'static, io::Result<()>> {
        self.budget.giving_back(self.inner.punch(offset, length))
    }
    fn set_length(&self, length: u64) -> LocalBoxFuture<'static, io::Result<()>> {
        let (known, setting) = (self.length.clone(), self.inner.set_length(length));
        let budget = self.budget.clone();
        async move {
            setting.await?;
            known.set(length);
            budget.gave_back();
            Ok(())
        }
        .boxed_local()
    }
    fn size(&self) -> LocalBoxFuture<'static, io::Result<FileSize>> {
        self.inner.size()
    }
}
