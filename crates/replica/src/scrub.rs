//! The scrub: one task of a store reads everything that stands on it, again and again, and compares it with the other
//! replicas.
//!
//! It goes through the replicas one after the other and through the chunks of each in order, in every layer. Home and
//! table are read from the medium, and what is bad there is healed (`heal.rs`). Then each chunk is compared with the replica
//! next in line: what rotted shows by its checksum, what was never written shows by that (`compare.rs`). A ring
//! of such comparisons reaches every replica that is wrong, and each heals itself.
//!
//! It takes a bounded part of the disk: no more bytes in a second than it is told, and it rests after what it read for
//! a multiple of the time that this took, so that it is slow where the disk is busy. Where it stands is written down
//! now and then; if that is lost, it begins anew.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::{Rc, Weak};
use std::time::Duration;

use futures_util::FutureExt;
use holdfast_env::Instant;
use holdfast_env::disk::Directory;
use holdfast_store::StoreError;
use holdfast_store::scrub_file::{ScrubFile, ScrubPlace};
use holdfast_store::volume::{BlockSum, Finding, LayerMark, PAGE_CHUNKS};
use holdfast_types::{CHUNK_BYTES, ChunkIndex, GroupId, LogIndex, StoreId};
use tokio::sync::Notify;

use crate::compare::{self, Verdict};
use crate::heal::{self, CHUNKS_MAX};
use crate::host::Host;
use crate::volume::Volume;

/// It rests for so many times what reading took.
const REST: u32 = 4;
/// What it owes of rest is taken in pieces of this length.
const REST_MIN: Duration = Duration::from_millis(5);
/// How often it is written down where it stands.
const NOTE_EVERY: Duration = Duration::from_secs(30);
/// How long a replica that may not serve yet is waited for before it is left out of a pass.
const SERVE_PATIENCE: Duration = Duration::from_secs(5);
/// How often a chunk that is wrong is tried to be taken from another replica before its page is distrusted: a peer may
/// be away for a moment.
const TRIES: usize = 2;
/// What looking at a chunk's part of the table is counted as, in bytes.
const LINE_BYTES: u64 = 512;

/// How a store is scrubbed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScrubOptions {
    /// From the beginning of a pass to that of the next, counting only the time that the daemon runs.
    pub period: Duration,
    /// Bytes that are read in a second, at most.
    pub bytes_per_second: u64,
}

impl Default for ScrubOptions {
    /// A pass in a week.
    fn default() -> Self {
        Self { period: Duration::from_secs(7 * 24 * 3600), bytes_per_second: 32 << 20 }
    }
}

/// How far the scrub of one replica is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScrubProgress {
    /// Chunks that the pass under way has looked at; 0 while there is none.
    pub chunk: u64,
    /// Passes ended since the daemon started.
    pub passes: u64,
    /// When the last of them ended.
    pub ended: Option<Instant>,
    /// Chunks that differed from another replica's in the last pass, and nothing showed who was right, or they were
    /// written all the while.
    pub unsettled: u64,
}

/// What a store's scrub is told by others.
#[derive(Default)]
pub(crate) struct Scrub {
    asked: RefCell<BTreeSet<GroupId>>,
    wake: Notify,
    stopped: Cell<bool>,
}

impl Scrub {
    /// Lets a volume be scrubbed next.
    pub(crate) fn ask(&self, group: GroupId) {
        self.asked.borrow_mut().insert(group);
        self.wake.notify_one();
    }

    /// Ends it.
    pub(crate) fn stop(&self) {
        self.stopped.set(true);
        self.wake.notify_one();
    }

    /// Ends early when there is something new to do.
    async fn rest(&self, pause: Duration) {
        let (pause, woken) = (holdfast_env::sleep(pause), self.wake.notified());
        futures_util::pin_mut!(pause, woken);
        futures_util::future::select(pause, woken).map(drop).await;
    }
}

/// How a pass over a replica ended.
enum Ended {
    /// It was looked at, or cannot be now.
    Done,
    /// Something else comes first; it goes on at this chunk.
    PutOff(u64),
}

/// The task.
struct Task {
    scrub: Rc<Scrub>,
    options: ScrubOptions,
    file: ScrubFile,
    place: ScrubPlace,
    /// Time that the daemon ran since the pass began, up to `counted`.
    spent: Duration,
    counted: Instant,
    noted: Instant,
    /// Rest that is not taken yet.
    owed: Duration,
}

/// Scrubs a store until its host goes.
pub(crate) async fn run(
    host: Weak<Host>,
    scrub: Rc<Scrub>,
    directory: Rc<dyn Directory>,
    options: ScrubOptions,
) {
    let file = ScrubFile::open(directory).await;
    let place = file.read().await;
    let now = Instant::now();
    let spent = Duration::from_secs(place.seconds);
    let mut task =
        Task { scrub, options, file, place, spent, counted: now, noted: now, owed: Duration::ZERO };
    while !task.scrub.stopped.get() {
        let Some(host) = host.upgrade() else { return };
        task.step(host).await;
    }
    task.note().await;
}

impl Task {
    async fn step(&mut self, host: Rc<Host>) {
        let asked = self.scrub.asked.borrow_mut().pop_first();
        if let Some(group) = asked {
            if let Some(volume) = host.volume(group) {
                drop(host);
                self.replica(&volume, 0, false).await;
            }
            return;
        }
        if self.place.done {
            drop(host);
            self.count();
            if self.spent >= self.options.period {
                (self.place, self.spent) = (ScrubPlace::default(), Duration::ZERO);
            } else {
                self.scrub.rest((self.options.period - self.spent).min(NOTE_EVERY)).await;
            }
            return self.note_if_due().await;
        }
        let here = self.place.group;
        let volumes = host.volumes().into_iter().map(|(_, volume)| volume);
        let next =
            volumes.filter(|volume| volume.group().id().group >= here).min_by_key(|v| v.group().id().group);
        drop(host);
        let Some(volume) = next else {
            self.place.done = true;
            return self.note().await;
        };
        let group = volume.group().id().group;
        let from = if group == here { self.place.chunk } else { 0 };
        match self.replica(&volume, from, true).await {
            Ended::Done => (self.place.group, self.place.chunk) = (GroupId(group.0.saturating_add(1)), 0),
            Ended::PutOff(chunk) => (self.place.group, self.place.chunk) = (group, chunk),
        }
    }

    fn count(&mut self) {
        let now = Instant::now();
        self.spent += now.since(self.counted);
        self.counted = now;
    }

    async fn note_if_due(&mut self) {
        if Instant::now().since(self.noted) >= NOTE_EVERY {
            self.note().await;
        }
    }

    async fn note(&mut self) {
        self.count();
        self.place.seconds = self.spent.as_secs();
        self.noted = Instant::now();
        self.file.write(&self.place).await;
    }

    /// Looks at a replica's chunks from one on. A pass of the store's is put off when somebody asks for a volume.
    async fn replica(&mut self, volume: &Rc<Volume>, from: u64, may_wait: bool) -> Ended {
        let served = volume.group().position().reached(LogIndex::ZERO);
        if holdfast_env::timeout(SERVE_PATIENCE, served).await.is_err() {
            return Ended::Done;
        }
        let group = volume.group().id().group;
        let mut unsettled = 0;
        let mut at = from;
        loop {
            let chunks = volume.state().size().chunks();
            if at >= chunks {
                break;
            }
            if volume.is_stopped() {
                return Ended::Done;
            }
            if self.scrub.stopped.get() {
                return Ended::PutOff(at);
            }
            if may_wait && !self.scrub.asked.borrow().is_empty() {
                return Ended::PutOff(at);
            }
            let batch: Vec<ChunkIndex> = (at..chunks.min(at + CHUNKS_MAX as u64)).map(ChunkIndex).collect();
            match self.batch(volume, &batch).await {
                Ok(differing) => unsettled += differing,
                Err(error) => {
                    // Whoever works with the store finds the same, and stops it.
                    tracing::error!(%group, %error, "the scrub leaves a replica out");
                    return Ended::Done;
                }
            }
            at += batch.len() as u64;
            volume.scrubbed(|progress| progress.chunk = at);
            if may_wait {
                (self.place.group, self.place.chunk) = (group, at);
                self.note_if_due().await;
            }
        }
        volume.scrubbed(|progress| {
            let passes = progress.passes + 1;
            *progress = ScrubProgress { chunk: 0, passes, ended: Some(Instant::now()), unsettled };
        });
        Ended::Done
    }

    /// Reads some chunks and compares them; how many of them are left unsettled.
    async fn batch(&mut self, volume: &Volume, chunks: &[ChunkIndex]) -> Result<u64, StoreError> {
        for (n, chunk) in chunks.iter().enumerate() {
            let began = Instant::now();
            if n == 0 || chunk.0.is_multiple_of(PAGE_CHUNKS) {
                // Lost, it shows at each of its chunks.
                volume.data().verify_page(*chunk).await?;
            }
            let bytes = read(volume, *chunk).await?;
            let took = Instant::now().since(began);
            self.take_rest(bytes, took).await;
        }
        let Some(store) = next_in_line(volume) else { return Ok(0) };
        let mut unsettled = 0;
        for (layer, chunk) in compare::differing(volume, store, chunks).await? {
            if !settle(volume, layer, chunk).await? {
                unsettled += 1;
            }
        }
        Ok(unsettled)
    }

    async fn take_rest(&mut self, bytes: u64, took: Duration) {
        let by_rate = Duration::from_secs_f64(bytes as f64 / self.options.bytes_per_second.max(1) as f64);
        self.owed += (took * REST).max(by_rate);
        if self.owed >= REST_MIN {
            holdfast_env::sleep(std::mem::take(&mut self.owed)).await;
        }
    }
}

/// Reads a chunk from the medium, and heals what is bad of it; the bytes that were looked at.
async fn read(volume: &Volume, chunk: ChunkIndex) -> Result<u64, StoreError> {
    let data = volume.data();
    let (mut bytes, mut is_whole) = (0, true);
    for layer in data.layers() {
        is_whole &= data.verify_chunk(layer.id, chunk).await? == Finding::Whole;
        let now = heal::look(volume, layer, chunk).await?.and_then(|told| told.now);
        let is_empty = now.is_some_and(|now| now.sums.iter().all(|sum| !matches!(sum, BlockSum::Data(_))));
        bytes += if is_empty { LINE_BYTES } else { CHUNK_BYTES };
    }
    if !is_whole && !heal::heal(volume, chunk).await? {
        // The healer goes on trying.
        data.suspect_chunk(chunk);
    }
    Ok(bytes)
}

/// The replica that comes after this one, in a ring.
fn next_in_line(volume: &Volume) -> Option<StoreId> {
    let own = volume.group().id().replica;
    let mut others = volume.group().data_members();
    others.retain(|(id, _)| *id != own);
    others.sort();
    others.iter().find(|(id, _)| *id > own).or(others.first()).map(|(_, store)| *store)
}

/// Finds out who is right, and follows if it is another; false if that cannot be told. What is wrong here and cannot be
/// taken from another replica now is not served until it can, if the others hold the whole page without this replica.
async fn settle(volume: &Volume, layer: LayerMark, chunk: ChunkIndex) -> Result<bool, StoreError> {
    let group = volume.group().id().group;
    for _ in 0..TRIES {
        match compare::judge(volume, layer, chunk, false).await? {
            Verdict::Keep => return Ok(true),
            Verdict::Take(store) => {
                tracing::error!(%group, layer = layer.id.0.0, chunk = chunk.0, "a chunk is not what the other replicas agree on");
                if heal::adopt_from(volume, layer, chunk, store).await? {
                    return Ok(true);
                }
            }
            Verdict::Unsettled => {
                tracing::warn!(%group, layer = layer.id.0.0, chunk = chunk.0, "replicas differ in a chunk, or it is written all the while");
                return Ok(false);
            }
        }
    }
    // A page that too few others hold may be needed as it is: its other chunks heal them.
    if compare::others_hold_page(volume, layer, chunk).await && volume.data().distrust(layer, chunk).await? {
        return Ok(true);
    }
    tracing::error!(%group, layer = layer.id.0.0, chunk = chunk.0, "a chunk that is old cannot be taken from another replica yet");
    Ok(false)
}
