//! A guest on real processes: workers that read, write and trim over NBD as long as the volume is to be had there, and
//! note everything in the same history as the simulation's guests.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use holdfast_frontend::nbd::NbdClient;
use holdfast_scenario::history::History;
use holdfast_types::{BLOCK_BYTES, BlockIndex, BlockRange, Epoch};

use crate::Outcome;
use crate::random::Random;

/// Blocks that a guest uses, from the volume's beginning.
const BLOCKS: u64 = 512;
/// Blocks of one request at most.
const RUN_MAX: u64 = 8;
/// Between requests of a worker: a machine that is shared is not to be filled.
const THINK: Duration = Duration::from_millis(5);
/// Between tries to connect.
const CONNECT_PAUSE: Duration = Duration::from_millis(20);

/// Everything that guests of one cluster share.
pub struct Record {
    /// What they saw.
    pub history: History,
    began: Instant,
    wrong: Mutex<Option<String>>,
}

impl Record {
    /// Of nothing yet.
    pub fn new() -> Arc<Self> {
        Arc::new(Self { history: History::default(), began: Instant::now(), wrong: Mutex::default() })
    }
    /// Time since it began.
    pub fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }
    /// Microseconds since it began.
    pub fn at(&self) -> u64 {
        u64::try_from(self.elapsed().as_micros()).unwrap_or(u64::MAX)
    }
    /// What a guest found to be wrong by itself.
    pub fn check(&self) -> Outcome<()> {
        match &*self.wrong.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(why) => Err(why.clone()),
            None => Ok(()),
        }
    }
    fn is_wrong(&self, why: String) {
        self.wrong.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
    }
}

/// Where a guest is, and how it stands.
pub struct Guest {
    /// The node's place among the letters.
    pub place: usize,
    /// Its NBD socket.
    pub socket: PathBuf,
    export: String,
    epoch: Epoch,
    record: Arc<Record>,
    answers: AtomicU64,
    waiting: AtomicU64,
    /// Workers whose last request or connection has failed.
    without: AtomicU64,
    workers: u64,
    stop: AtomicBool,
}

/// A running guest.
pub struct Running {
    /// How it stands.
    pub guest: Arc<Guest>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

/// Counts a request that waits, for as long as it does.
struct Waits<'g>(&'g AtomicU64);

impl<'g> Waits<'g> {
    fn new(waiting: &'g AtomicU64) -> Self {
        waiting.fetch_add(1, Ordering::Relaxed);
        Self(waiting)
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn bytes_of(range: BlockRange) -> (u64, u32) {
    (range.start.0 * BLOCK_BYTES as u64, range.count * BLOCK_BYTES as u32)
}

impl Guest {
    /// Starts `workers` at a node's socket, where the volume is attached in `epoch`.
    pub fn start(
        record: &Arc<Record>,
        (place, socket): (usize, PathBuf),
        export: &str,
        epoch: Epoch,
        (workers, seed): (u64, u64),
    ) -> Running {
        record.history.attached(record.at(), epoch);
        let guest = Arc::new(Self {
            place,
            socket,
            export: export.to_owned(),
            epoch,
            record: record.clone(),
            answers: AtomicU64::new(0),
            waiting: AtomicU64::new(0),
            without: AtomicU64::new(0),
            workers,
            stop: AtomicBool::new(false),
        });
        let worker = |number| {
            let random = Random::new(seed.wrapping_mul(64).wrapping_add(number));
            tokio::spawn(guest.clone().work(random))
        };
        let tasks = (0..workers).map(worker).collect();
        Running { guest, tasks }
    }

    /// Answers so far.
    pub fn answers(&self) -> u64 {
        self.answers.load(Ordering::Relaxed)
    }
    /// Whether a request waits.
    pub fn waits(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }
    /// Whether every worker has been told, by an error, that the volume is not to be had there.
    pub fn has_ended(&self) -> bool {
        self.without.load(Ordering::Relaxed) == self.workers
    }

    async fn work(self: Arc<Self>, mut random: Random) {
        let mut fails = false;
        while !self.stop.load(Ordering::Relaxed) {
            match NbdClient::connect(&self.socket, &self.export).await {
                Ok(client) => self.requests(&client, &mut random, &mut fails).await,
                Err(_) => self.failed(&mut fails),
            }
            tokio::time::sleep(CONNECT_PAUSE).await;
        }
    }

    /// One worker gets errors, until it is answered again.
    fn failed(&self, fails: &mut bool) {
        if !std::mem::replace(fails, true) {
            self.without.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Until a request fails.
    async fn requests(&self, client: &NbdClient, random: &mut Random, fails: &mut bool) {
        while !self.stop.load(Ordering::Relaxed) {
            let count = 1 + random.below(RUN_MAX);
            let range = BlockRange::new(BlockIndex(random.below(BLOCKS - count)), count as u32);
            let waits = Waits::new(&self.waiting);
            let result = match random.below(20) {
                0..=7 => self.read(client, range).await,
                8 => self.trim(client, range).await,
                _ => self.write(client, range).await,
            };
            drop(waits);
            if result.is_err() {
                return self.failed(fails);
            }
            if std::mem::take(fails) {
                self.without.fetch_sub(1, Ordering::Relaxed);
            }
            self.answers.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(THINK).await;
        }
    }

    fn node(&self) -> u64 {
        self.place as u64 + 1
    }

    async fn read(&self, client: &NbdClient, range: BlockRange) -> std::io::Result<()> {
        let record = &self.record;
        let id = record.history.read(record.at(), self.node(), self.epoch, range);
        let (offset, length) = bytes_of(range);
        let data: Bytes = client.read(offset, length).await?;
        if let Err(why) = record.history.answered(record.at(), id, &data) {
            record.is_wrong(why);
        }
        Ok(())
    }

    async fn trim(&self, client: &NbdClient, range: BlockRange) -> std::io::Result<()> {
        let record = &self.record;
        let id = record.history.clear(record.at(), self.node(), self.epoch, range);
        let (offset, length) = bytes_of(range);
        client.trim(offset, length).await?;
        record.history.acknowledged(record.at(), id);
        Ok(())
    }

    /// Writes a range.
    pub async fn write(&self, client: &NbdClient, range: BlockRange) -> std::io::Result<()> {
        let record = &self.record;
        let (id, data) = record.history.write(record.at(), self.node(), self.epoch, range);
        client.write(bytes_of(range).0, data).await?;
        record.history.acknowledged(record.at(), id);
        Ok(())
    }

    /// A connection of its own, beside those of the workers.
    pub async fn connect(&self) -> Outcome<NbdClient> {
        let client = NbdClient::connect(&self.socket, &self.export).await;
        client.map_err(|error| format!("the volume is not to be had: {error}"))
    }

    /// Reads every block that anybody has written.
    pub async fn read_all(&self) -> Outcome<u64> {
        let client = self.connect().await?;
        let blocks = self.record.history.blocks();
        for block in &blocks {
            let range = BlockRange::new(BlockIndex(*block), 1);
            self.read(&client, range).await.map_err(|error| format!("the last reads: {error}"))?;
        }
        Ok(blocks.len() as u64)
    }
}

impl Running {
    /// Stops it; an error if a request hangs.
    pub async fn stop(mut self) -> Outcome<()> {
        self.guest.stop.store(true, Ordering::Relaxed);
        for task in std::mem::take(&mut self.tasks) {
            let ended = tokio::time::timeout(Duration::from_secs(30), task).await;
            ended.map_err(|_| "a request hangs")?.map_err(|error| error.to_string())?;
        }
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.guest.stop.store(true, Ordering::Relaxed);
        self.tasks.iter().for_each(tokio::task::JoinHandle::abort);
    }
}
