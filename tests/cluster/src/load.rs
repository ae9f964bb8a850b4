//! Workers that write, trim, read and check over NBD, and reconnect when their connection ends.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use holdfast_frontend::nbd::NbdClient;
use tokio::sync::watch;

use crate::Outcome;
use crate::history::{BLOCK, History, contents};
use crate::random::Random;

/// Blocks of one worker.
const BLOCKS_PER_WORKER: u64 = 512;
/// Blocks of one request at most.
const RUN_MAX: u64 = 8;
/// One request in so many is a trim.
const TRIM_ONE_IN: u64 = 16;

/// What the workers did.
#[derive(Default)]
pub struct Figures {
    /// Writes acknowledged.
    pub writes: AtomicU64,
    /// Reads checked.
    pub reads: AtomicU64,
    /// Requests that failed, or whose connection ended.
    pub errors: AtomicU64,
    longest_us: AtomicU64,
    /// Since when time counts for the longest request.
    since: Mutex<Option<Instant>>,
}

impl Figures {
    fn took(&self, began: Instant) {
        let since = *self.since.lock().unwrap_or_else(PoisonError::into_inner);
        let counted = since.map_or(began, |since| since.max(began));
        self.longest_us.fetch_max(counted.elapsed().as_micros() as u64, Ordering::Relaxed);
    }
    /// The longest that a request took since the last call of this; what it took before does not count.
    pub fn take_longest(&self) -> Duration {
        *self.since.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        Duration::from_micros(self.longest_us.swap(0, Ordering::Relaxed))
    }
    /// Requests that succeeded.
    pub fn done(&self) -> u64 {
        self.writes.load(Ordering::Relaxed) + self.reads.load(Ordering::Relaxed)
    }
}

/// The running load.
pub struct Load {
    /// What every block may hold.
    pub history: Arc<History>,
    /// What was done.
    pub figures: Arc<Figures>,
    target: watch::Sender<PathBuf>,
    stop: Arc<AtomicBool>,
    wrong: Arc<Mutex<Option<String>>>,
    workers: Vec<tokio::task::JoinHandle<()>>,
}

struct Worker {
    export: String,
    first: u64,
    random: Random,
    stamp: u64,
    history: Arc<History>,
    figures: Arc<Figures>,
    target: watch::Receiver<PathBuf>,
    stop: Arc<AtomicBool>,
    wrong: Arc<Mutex<Option<String>>>,
}

impl Load {
    /// Starts `workers` on an export.
    pub fn start(export: &str, socket: PathBuf, workers: u64, seed: u64) -> Self {
        let (target, watched) = watch::channel(socket);
        let mut load = Self {
            history: Arc::default(),
            figures: Arc::default(),
            target,
            stop: Arc::default(),
            wrong: Arc::default(),
            workers: Vec::new(),
        };
        for number in 0..workers {
            let worker = Worker {
                export: export.to_owned(),
                first: number * BLOCKS_PER_WORKER,
                random: Random::new(seed.wrapping_add(number)),
                stamp: 0,
                history: load.history.clone(),
                figures: load.figures.clone(),
                target: watched.clone(),
                stop: load.stop.clone(),
                wrong: load.wrong.clone(),
            };
            load.workers.push(tokio::spawn(worker.run()));
        }
        load
    }

    /// The export is to be found there from now on.
    pub fn moved(&self, socket: PathBuf) {
        self.target.send_replace(socket);
    }

    /// What was found to be wrong, if anything was.
    pub fn check(&self) -> Outcome<()> {
        match &*self.wrong.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(why) => Err(why.clone()),
            None => Ok(()),
        }
    }

    /// Ends when so many more requests have succeeded.
    pub async fn progress(&self, requests: u64, deadline: Duration) -> Outcome<()> {
        let goal = self.figures.done() + requests;
        let until = Instant::now() + deadline;
        while self.figures.done() < goal {
            self.check()?;
            if Instant::now() > until {
                return Err(format!("no progress for {deadline:?}"));
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.check()
    }

    /// Stops the workers.
    pub async fn stop(self) -> Outcome<(Arc<History>, Arc<Figures>)> {
        self.stop.store(true, Ordering::Relaxed);
        for worker in self.workers {
            let ended = tokio::time::timeout(Duration::from_secs(60), worker).await;
            ended.map_err(|_| "a request hangs")?.map_err(|error| error.to_string())?;
        }
        let wrong = self.wrong.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match wrong {
            Some(why) => Err(why),
            None => Ok((self.history, self.figures)),
        }
    }
}

impl Worker {
    async fn run(mut self) {
        while !self.stop.load(Ordering::Relaxed) {
            let socket = self.target.borrow_and_update().clone();
            match NbdClient::connect(&socket, &self.export).await {
                Ok(client) => self.work(&client).await,
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    }

    /// Works until the connection ends.
    async fn work(&mut self, client: &NbdClient) {
        while !self.stop.load(Ordering::Relaxed) {
            let first = self.first + self.random.below(BLOCKS_PER_WORKER - RUN_MAX);
            let count = 1 + self.random.below(RUN_MAX);
            let began = Instant::now();
            let result = match self.random.below(3) {
                0 => self.read(client, first, count).await,
                _ => self.write(client, first, count).await,
            };
            match result {
                Ok(()) => self.figures.took(began),
                Err(_) => {
                    self.figures.errors.fetch_add(1, Ordering::Relaxed);
                    return;
                }
            }
        }
    }

    async fn read(&mut self, client: &NbdClient, first: u64, count: u64) -> std::io::Result<()> {
        let data = client.read(first * BLOCK as u64, (count as usize * BLOCK) as u32).await?;
        for (n, block) in data.chunks_exact(BLOCK).enumerate() {
            if let Err(why) = self.history.check(first + n as u64, block) {
                let mut wrong = self.wrong.lock().unwrap_or_else(PoisonError::into_inner);
                wrong.get_or_insert(why);
                self.stop.store(true, Ordering::Relaxed);
            }
        }
        self.figures.reads.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    async fn write(&mut self, client: &NbdClient, first: u64, count: u64) -> std::io::Result<()> {
        let trim = self.random.below(TRIM_ONE_IN) == 0;
        let stamps: Vec<u64> = (0..count)
            .map(|_| {
                self.stamp += 1;
                if trim { 0 } else { self.stamp }
            })
            .collect();
        let offset = first * BLOCK as u64;
        let result = if trim {
            client.trim(offset, (count as usize * BLOCK) as u32).await
        } else {
            client.write(offset, contents(first, &stamps)).await
        };
        for (n, stamp) in stamps.iter().enumerate() {
            match result {
                Ok(()) => self.history.acknowledged(first + n as u64, *stamp),
                Err(_) => self.history.unknown(first + n as u64, *stamp),
            }
        }
        if result.is_ok() {
            self.figures.writes.fetch_add(1, Ordering::Relaxed);
        }
        result
    }
}

/// Reads every block that was ever written and checks it.
pub async fn check_all(client: &NbdClient, history: &History) -> Outcome<u64> {
    let blocks = history.blocks();
    for block in &blocks {
        let data =
            client.read(block * BLOCK as u64, BLOCK as u32).await.map_err(|e| format!("a read: {e}"))?;
        history.check(*block, &data)?;
    }
    Ok(blocks.len() as u64)
}
