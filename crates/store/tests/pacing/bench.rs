//! A store on a device that takes time, with volumes whose commands are committed as soon as they are durable, their
//! cleaners, and guests.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use holdfast_env::Instant;
use holdfast_env::disk::Directory;
use holdfast_store::journal::{GroupLog, Journal, StoreOptions, levels};
use holdfast_store::testing::{Device, MemoryDisk, Random, Speed};
use holdfast_store::volume::{Checkpoint, CheckpointSource, ReplicaFileIdentity, VolumeData};
use holdfast_store::{EntryId, LogEntry, ReplicaIdentity, StoreIdentity};
use holdfast_types::{
    BLOCK_BYTES, BlockIndex, BlockRange, ByteSize, ClusterId, GroupId, LogIndex, NodeName, ReplicaId,
    StoreId, Term, VolumeId, block_checksum,
};
use tokio::sync::{Notify, oneshot};

pub const MIB: u64 = 1 << 20;

/// A disk that moves 100 MB a second.
pub const SPEED: Speed = Speed {
    each: Duration::from_micros(20),
    flush: Duration::from_micros(200),
    bytes_per_second: 100_000_000,
    flushed_per_second: 2_000_000_000,
};

fn identity() -> StoreIdentity {
    StoreIdentity { cluster: ClusterId(1), node: NodeName::new("n"), store: StoreId(2) }
}

fn entry_id(index: u64) -> EntryId {
    EntryId { term: Term(1), leader: ReplicaId(1), index: LogIndex(index) }
}

pub struct Store {
    pub device: Device,
    pub journal: Journal,
}

impl Store {
    pub async fn new(segments: u32) -> Self {
        let device = Device::new(MemoryDisk::new(1).directory(), SPEED);
        let directory: Rc<dyn Directory> = Rc::new(device.clone());
        let options = StoreOptions { segment_bytes: 2 << 20, segments };
        Journal::format(directory.clone(), &identity(), &options).await.expect("formats");
        let (journal, _) = Journal::open(directory, &identity(), &options).await.expect("opens");
        Self { device, journal }
    }

    /// Makes a volume; its cleaner runs.
    pub async fn volume(&self, number: u64) -> Rc<Volume> {
        let who = ReplicaIdentity { group: GroupId(u128::from(number)), replica: ReplicaId(1) };
        let log = self.journal.create_group(who).await.expect("creates");
        let StoreIdentity { cluster, node, store } = identity();
        let volume = VolumeId(u128::from(number));
        let identity = ReplicaFileIdentity { cluster, store, node, volume, id: who, incarnation: 1 };
        let (payloads, initial) = (Rc::new(log.clone()), Checkpoint::default());
        let made =
            VolumeData::create(Rc::new(self.device.clone()), identity, Bytes::new(), initial, payloads);
        let data = made.await.expect("creates");
        data.set_size(ByteSize(1 << 30));
        let volume = Rc::new(Volume {
            journal: self.journal.clone(),
            log,
            data,
            last: Cell::default(),
            changed: Notify::new(),
        });
        volume.append(0, Bytes::new()).await;
        holdfast_env::spawn("cleaner", clean(volume.clone()));
        volume
    }
}

pub struct Volume {
    journal: Journal,
    pub log: GroupLog,
    pub data: VolumeData,
    last: Cell<EntryId>,
    changed: Notify,
}

impl CheckpointSource for Volume {
    fn capture(&self) -> Checkpoint {
        Checkpoint { id: self.last.get(), ..Checkpoint::default() }
    }
}

impl Volume {
    /// Durable and applied when it returns.
    async fn append(self: &Rc<Self>, start: u64, payload: Bytes) {
        let next = self.log.last().map_or(0, |id| id.index.0 + 1);
        let range = BlockRange::new(BlockIndex(start), (payload.len() / BLOCK_BYTES) as u32);
        let each = range.blocks().zip(payload.chunks_exact(BLOCK_BYTES));
        let sums: Vec<u32> = each.map(|(block, data)| block_checksum(block, data)).collect();
        let entry = LogEntry { id: entry_id(next), kind: 1, head: Bytes::new(), payload };
        let (sender, receiver) = oneshot::channel();
        let this = self.clone();
        let done = move |result: Result<(), _>| {
            result.expect("is flushed");
            if range.count > 0 {
                this.data.apply_write(LogIndex(next), range, &sums);
            }
            this.last.set(entry_id(next));
            this.changed.notify_waiters();
            // A guest may have gone.
            let _ = sender.send(());
        };
        self.log.append(vec![entry], Box::new(done));
        receiver.await.expect("is answered");
    }

    pub async fn write(self: &Rc<Self>, start: u64, payload: Bytes) {
        let _admitted = self.log.admit(payload.len()).await;
        self.append(start, payload).await;
    }

    /// The same by somebody who gives up waiting and comes again.
    pub async fn write_impatiently(self: &Rc<Self>, start: u64, payload: Bytes, patience: Duration) {
        let _admitted = loop {
            let admitted = holdfast_env::timeout(patience, self.log.admit(payload.len())).await;
            if let Ok(admitted) = admitted {
                break admitted;
            }
        };
        self.append(start, payload).await;
    }
}

/// What a replica's cleaner does.
async fn clean(volume: Rc<Volume>) {
    loop {
        let (pressure_changed, changed) = (volume.journal.pressure_changed(), volume.changed.notified());
        let pressed = || volume.journal.pressure().line_percent >= levels::PURGE;
        let purge = async || {
            let checkpoint = volume.data.checkpoint().id;
            if volume.log.purged().is_none_or(|purged| purged.index < checkpoint.index) {
                volume.log.purge(checkpoint).await.expect("purges");
            }
        };
        if pressed() {
            purge().await;
        }
        let dirty = volume.data.dirty();
        let due = dirty.bytes >= volume.log.clean_at_bytes() || (pressed() && dirty.any);
        if due {
            volume.data.clean(&*volume).await.expect("cleans");
            if pressed() {
                purge().await;
            }
            continue;
        }
        futures_util::pin_mut!(pressure_changed, changed);
        futures_util::future::select(pressure_changed, changed).await;
    }
}

/// Who writes blocks at random places.
pub struct Guest {
    pub volume: Rc<Volume>,
    /// Requests at once, their bytes, and the pause after each.
    pub depth: u64,
    pub bytes: u64,
    pub pause: Duration,
}

/// How long each write took, and all of them.
#[derive(Debug)]
pub struct Took {
    pub times: Vec<Duration>,
    pub whole: Duration,
}

impl Took {
    pub fn longest(&self) -> Duration {
        self.times.iter().max().copied().unwrap_or_default()
    }
    /// So many of a hundred took no longer.
    pub fn within(&self, percent: usize) -> Duration {
        let mut sorted = self.times.clone();
        sorted.sort_unstable();
        sorted[(sorted.len() - 1) * percent / 100]
    }
    pub fn mean(&self) -> Duration {
        self.times.iter().sum::<Duration>() / (self.times.len() as u32).max(1)
    }
    /// Writes per second.
    pub fn rate(&self) -> f64 {
        self.times.len() as f64 / self.whole.as_secs_f64()
    }
}

impl Guest {
    /// Writes for so long.
    pub async fn run(self, time: Duration) -> Took {
        let (began, took) = (Instant::now(), Rc::new(RefCell::new(Vec::new())));
        let random = Rc::new(Random::new(7));
        let workers: Vec<_> = (0..self.depth)
            .map(|_| {
                let (volume, took, random) = (self.volume.clone(), took.clone(), random.clone());
                let (bytes, pause) = (self.bytes, self.pause);
                holdfast_env::spawn("guest", async move {
                    let blocks = bytes / BLOCK_BYTES as u64;
                    while Instant::now().since(began) < time {
                        let start = random.below(128 * MIB / bytes) * blocks;
                        let since = Instant::now();
                        volume.write(start, vec![1; bytes as usize].into()).await;
                        took.borrow_mut().push(Instant::now().since(since));
                        holdfast_env::sleep(pause).await;
                    }
                })
            })
            .collect();
        for worker in workers {
            worker.await.expect("ends");
        }
        Took { times: took.take(), whole: Instant::now().since(began) }
    }
}
