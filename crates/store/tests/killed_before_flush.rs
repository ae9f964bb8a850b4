//! A daemon that is killed between a durable write and its flush leaves in a cache what the next one reads. The next one
//! counts on what it reads, so it flushes it first: else a power cut after that takes back what others were told.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::rc::Rc;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::LocalBoxFuture;
use holdfast_env::disk::{AlignedBuffer, Directory, Durability, File, FileSize, OpenMode, Space};
use holdfast_env::real::disk::{OpenError, RealDirectory};
use holdfast_store::journal::{Journal, StoreOptions};
use holdfast_store::state_file::{StateFile, StateIdentity};
use holdfast_store::volume::{Checkpoint, CheckpointSource, ReplicaFileIdentity, VolumeData};
use holdfast_store::{EntryId, LogEntry, ReplicaIdentity, StoreIdentity};
use holdfast_types::{ClusterId, GroupId, LogIndex, NodeName, ReplicaId, StoreId, Term, VolumeId};

const WHO: ReplicaIdentity = ReplicaIdentity { group: GroupId(7), replica: ReplicaId(1) };

/// What outlives the process: which files have writes that were not flushed.
#[derive(Clone, Default)]
struct Cache {
    dirty: Rc<RefCell<BTreeSet<String>>>,
    /// From now on durable writes reach the cache, and the process ends before they are flushed.
    killed: Rc<Cell<bool>>,
}

struct Cached {
    inner: Rc<dyn Directory>,
    cache: Cache,
}

struct CachedFile {
    inner: Rc<dyn File>,
    name: String,
    cache: Cache,
}

impl Directory for Cached {
    fn open(&self, name: &str, mode: OpenMode) -> LocalBoxFuture<'static, io::Result<Rc<dyn File>>> {
        let (opening, name, cache) = (self.inner.open(name, mode), name.to_owned(), self.cache.clone());
        async move {
            let file: Rc<dyn File> = Rc::new(CachedFile { inner: opening.await?, name, cache });
            Ok(file)
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
        self.inner.remove(name)
    }
    fn rename(&self, from: &str, to: &str) -> LocalBoxFuture<'static, io::Result<()>> {
        self.inner.rename(from, to)
    }
    fn sync(&self) -> LocalBoxFuture<'static, io::Result<()>> {
        self.inner.sync()
    }
    fn space(&self) -> LocalBoxFuture<'static, io::Result<Space>> {
        self.inner.space()
    }
}

impl File for CachedFile {
    fn write_at(
        &self,
        offset: u64,
        buffer: AlignedBuffer,
        durability: Durability,
    ) -> LocalBoxFuture<'static, io::Result<AlignedBuffer>> {
        let write = self.inner.write_at(offset, buffer, durability);
        let (name, cache) = (self.name.clone(), self.cache.clone());
        async move {
            let written = write.await?;
            if durability == Durability::Durable && cache.killed.get() {
                cache.dirty.borrow_mut().insert(name);
                return std::future::pending().await;
            }
            Ok(written)
        }
        .boxed_local()
    }
    fn read_at(&self, offset: u64, length: usize) -> LocalBoxFuture<'static, io::Result<AlignedBuffer>> {
        self.inner.read_at(offset, length)
    }
    fn flush(&self) -> LocalBoxFuture<'static, io::Result<()>> {
        let (flush, name, cache) = (self.inner.flush(), self.name.clone(), self.cache.clone());
        async move {
            flush.await?;
            cache.dirty.borrow_mut().remove(&name);
            Ok(())
        }
        .boxed_local()
    }
    fn allocate(&self, offset: u64, length: u64) -> LocalBoxFuture<'static, io::Result<()>> {
        self.inner.allocate(offset, length)
    }
    fn punch(&self, offset: u64, length: u64) -> LocalBoxFuture<'static, io::Result<()>> {
        self.inner.punch(offset, length)
    }
    fn set_length(&self, length: u64) -> LocalBoxFuture<'static, io::Result<()>> {
        self.inner.set_length(length)
    }
    fn size(&self) -> LocalBoxFuture<'static, io::Result<FileSize>> {
        self.inner.size()
    }
}

async fn directory(path: &Path, cache: &Cache) -> Rc<dyn Directory> {
    // The tasks of the run before end one by one; the directory's lock goes with the last of them.
    loop {
        match RealDirectory::open(path) {
            Ok(inner) => return Rc::new(Cached { inner, cache: cache.clone() }),
            Err(OpenError::InUse(_)) => holdfast_env::yield_now().await,
            Err(error) => panic!("{error}"),
        }
    }
}

/// Until the kill has left something in the cache.
async fn killed(cache: &Cache) {
    let waiting = async {
        while cache.dirty.borrow().is_empty() {
            holdfast_env::yield_now().await;
        }
    };
    holdfast_env::timeout(std::time::Duration::from_secs(10), waiting).await.expect("something was written");
    cache.killed.set(false);
}

fn identity() -> StoreIdentity {
    StoreIdentity { cluster: ClusterId(1), node: NodeName::new("n"), store: StoreId(1) }
}

fn entry(index: u64) -> LogEntry {
    let id = EntryId { term: Term(1), leader: ReplicaId(1), index: LogIndex(index) };
    LogEntry { id, kind: 1, head: Bytes::from_static(b"head"), payload: Bytes::new() }
}

#[test]
fn a_recovered_entry_is_on_the_medium() {
    let (place, cache) = (tempfile::tempdir().expect("a place"), Cache::default());
    let options = StoreOptions { segment_bytes: 4 << 20, segments: 4 };
    holdfast_env::real::run(async {
        let directory = directory(place.path(), &cache).await;
        Journal::format(directory.clone(), &identity(), &options).await.expect("formats");
        let (journal, _) = Journal::open(directory, &identity(), &options).await.expect("opens");
        let log = journal.create_group(WHO).await.expect("creates");
        cache.killed.set(true);
        log.append(vec![entry(0)], Box::new(|_| panic!("it was not acknowledged")));
        killed(&cache).await;
    });
    holdfast_env::real::run(async {
        let directory = directory(place.path(), &cache).await;
        let (_, groups) = Journal::open(directory, &identity(), &options).await.expect("opens");
        assert_eq!(groups[0].log.last(), Some(entry(0).id), "what was written is found");
        assert_eq!(*cache.dirty.borrow(), BTreeSet::new(), "what is counted on may be lost in a power cut");
    });
}

fn checkpoint(index: u64) -> Checkpoint {
    Checkpoint { id: EntryId { index: LogIndex(index), ..EntryId::default() }, ..Checkpoint::default() }
}

struct At(u64);

impl CheckpointSource for At {
    fn capture(&self) -> Checkpoint {
        checkpoint(self.0)
    }
}

struct Nothing;

impl holdfast_store::volume::PayloadSource for Nothing {
    fn flushed(&self) -> LogIndex {
        LogIndex(u64::MAX)
    }
    fn read_payload(
        &self,
        _: LogIndex,
        _: u32,
        _: u32,
    ) -> LocalBoxFuture<'static, Result<Bytes, holdfast_store::StoreError>> {
        unreachable!("nothing was written")
    }
    fn keep_committed(&self, _: LogIndex) -> LocalBoxFuture<'static, Result<(), holdfast_store::StoreError>> {
        Box::pin(async { Ok(()) })
    }
}

#[test]
fn a_checkpoint_that_is_found_is_on_the_medium() {
    let (place, cache) = (tempfile::tempdir().expect("a place"), Cache::default());
    let who = ReplicaFileIdentity {
        cluster: ClusterId(1),
        store: StoreId(1),
        node: NodeName::new("n"),
        volume: VolumeId(1),
        id: WHO,
        incarnation: 1,
    };
    holdfast_env::real::run(async {
        let directory = directory(place.path(), &cache).await;
        let data =
            VolumeData::create(directory, who.clone(), Bytes::new(), checkpoint(0), Rc::new(Nothing)).await;
        let data = data.expect("creates");
        cache.killed.set(true);
        holdfast_env::spawn("clean", async move { data.clean(&At(5)).await });
        killed(&cache).await;
    });
    holdfast_env::real::run(async {
        let directory = directory(place.path(), &cache).await;
        let data = VolumeData::open(directory, &who, Rc::new(Nothing)).await.expect("opens");
        assert_eq!(data.checkpoint().id.index, LogIndex(5), "what was written is found");
        assert_eq!(
            *cache.dirty.borrow(),
            BTreeSet::new(),
            "the log is purged by what a power cut may take back"
        );
    });
}

#[test]
fn a_catalog_checkpoint_that_is_found_is_on_the_medium() {
    let (place, cache) = (tempfile::tempdir().expect("a place"), Cache::default());
    let who = StateIdentity { cluster: ClusterId(1), store: StoreId(1), id: WHO };
    holdfast_env::real::run(async {
        let directory = directory(place.path(), &cache).await;
        let file = StateFile::open(&directory, "state", who).await.expect("opens");
        cache.killed.set(true);
        holdfast_env::spawn("write", async move { file.write(checkpoint(5)).await });
        killed(&cache).await;
    });
    holdfast_env::real::run(async {
        let directory = directory(place.path(), &cache).await;
        let file = StateFile::open(&directory, "state", who).await.expect("opens");
        assert_eq!(file.newest(), Some(checkpoint(5)), "what was written is found");
        assert_eq!(
            *cache.dirty.borrow(),
            BTreeSet::new(),
            "the log is purged by what a power cut may take back"
        );
    });
}
