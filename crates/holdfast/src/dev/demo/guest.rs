//! The guest: it overwrites and reads blocks as fast as it is let, remembers what was acknowledged, and notices every
//! answer that differs, every error, and how long there was no answer at all.
//!
//! An acknowledged write counts. One whose outcome is unknown, because the guest's node died under it, may have
//! happened once, until a read has shown whether it did.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use holdfast_frontend::nbd::NbdClient;
use holdfast_types::{BLOCK_BYTES, ErrorCode, UserError};
use tokio::task::JoinHandle;

use super::SCRATCH_AT;
use super::stage::PATIENCE;

/// Bytes that the guest overwrites again and again.
pub(super) const AREA_BYTES: u64 = 24 << 20;
const BLOCKS: usize = AREA_BYTES as usize / BLOCK_BYTES;
/// Requests in flight; each worker has blocks of its own, so nothing about a block is concurrent.
const WORKERS: usize = 8;
const BLOCKS_PER_WORKER: usize = BLOCKS / WORKERS;
/// Blocks of one request at most.
const RUN_MAX: u64 = 8;
/// One request in so many is a read.
const READ_ONE_IN: u64 = 5;
/// Between a worker's requests when the guest is calm.
const CALM: Duration = Duration::from_millis(20);
/// Between looks at the figures.
const LOOK: Duration = Duration::from_millis(2);

/// One step of SplitMix64.
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A block's content for a stamp; 0 is a block that was never written.
fn fill(block: usize, stamp: u64, into: &mut BytesMut) {
    if stamp == 0 {
        return into.resize(into.len() + BLOCK_BYTES, 0);
    }
    let seed = mix(block as u64) ^ mix(stamp);
    into.extend_from_slice(&stamp.to_le_bytes());
    for place in 1..BLOCK_BYTES as u64 / 8 {
        into.extend_from_slice(&mix(seed ^ place).to_le_bytes());
    }
}

#[derive(Clone, Default)]
struct Block {
    acknowledged: u64,
    /// Outcome unknown.
    perhaps: Vec<u64>,
    /// Written since the last [`Ledger::begin_away`].
    dirtied: bool,
}

/// What the guest has done so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Figures {
    /// Writes acknowledged.
    pub(super) writes: u64,
    /// Bytes of them.
    pub(super) written_bytes: u64,
    /// Reads whose content was right.
    pub(super) reads: u64,
    /// Requests that failed.
    pub(super) errors: u64,
    /// The longest time without any answer since [`Ledger::begin_gap`].
    pub(super) gap: Duration,
}

struct State {
    blocks: Vec<Block>,
    stamp: u64,
    figures: Figures,
    answered: Instant,
    /// The first answer that was wrong.
    wrong: Option<String>,
}

/// What every block may hold. It outlives guests.
pub(super) struct Ledger(Mutex<State>);

impl Ledger {
    pub(super) fn new() -> Arc<Self> {
        let figures = Figures { writes: 0, written_bytes: 0, reads: 0, errors: 0, gap: Duration::ZERO };
        Arc::new(Self(Mutex::new(State {
            blocks: vec![Block::default(); BLOCKS],
            stamp: 0,
            figures,
            answered: Instant::now(),
            wrong: None,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change is one step: a panic elsewhere leaves it whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was done so far.
    pub(super) fn figures(&self) -> Figures {
        self.lock().figures
    }

    /// Gaps are counted from now.
    pub(super) fn begin_gap(&self) {
        let mut state = self.lock();
        state.answered = Instant::now();
        state.figures.gap = Duration::ZERO;
    }

    /// Blocks written from now on count as dirtied; so do those whose last write has an unknown outcome.
    pub(super) fn begin_away(&self) {
        for block in &mut self.lock().blocks {
            block.dirtied = !block.perhaps.is_empty();
        }
    }

    /// Distinct bytes written since [`Self::begin_away`].
    pub(super) fn dirtied_bytes(&self) -> u64 {
        self.lock().blocks.iter().filter(|block| block.dirtied).count() as u64 * BLOCK_BYTES as u64
    }

    /// Stamps and content for a write.
    fn prepare(&self, first: usize, count: usize) -> (u64, Bytes) {
        let stamp = {
            let mut state = self.lock();
            state.stamp += 1;
            state.stamp
        };
        let mut data = BytesMut::with_capacity(count * BLOCK_BYTES);
        (first..first + count).for_each(|block| fill(block, stamp, &mut data));
        (stamp, data.freeze())
    }

    fn answered(state: &mut State) {
        let now = Instant::now();
        state.figures.gap = state.figures.gap.max(now - state.answered);
        state.answered = now;
    }

    fn wrote(&self, first: usize, count: usize, stamp: u64, acknowledged: bool) {
        let mut state = self.lock();
        for block in &mut state.blocks[first..first + count] {
            block.dirtied = true;
            if acknowledged {
                // Nothing older may ever be seen again.
                (block.acknowledged, block.perhaps) = (stamp, Vec::new());
            } else {
                block.perhaps.push(stamp);
            }
        }
        if acknowledged {
            state.figures.writes += 1;
            state.figures.written_bytes += (count * BLOCK_BYTES) as u64;
            Self::answered(&mut state);
        } else {
            state.figures.errors += 1;
        }
    }

    /// Whether blocks that were read hold what they may. What they show stays.
    fn read(&self, first: usize, data: &[u8]) -> Result<(), String> {
        let mut expected = BytesMut::with_capacity(BLOCK_BYTES);
        let mut state = self.lock();
        for (number, found) in data.chunks_exact(BLOCK_BYTES).enumerate() {
            let block = first + number;
            let stamp = u64::from_le_bytes(found[..8].try_into().map_err(|_| "a short block")?);
            expected.clear();
            fill(block, stamp, &mut expected);
            let known = &mut state.blocks[block];
            if expected != found {
                return Err(format!("block {block} holds what nobody wrote"));
            }
            if stamp != known.acknowledged && !known.perhaps.contains(&stamp) {
                let acknowledged = known.acknowledged;
                return Err(format!("block {block} holds write {stamp}; acknowledged was {acknowledged}"));
            }
            (known.acknowledged, known.perhaps) = (stamp, Vec::new());
        }
        Self::answered(&mut state);
        Ok(())
    }

    fn note_wrong(&self, why: String) {
        self.lock().wrong.get_or_insert(why);
    }

    /// Whether every answer so far was right.
    pub(super) fn right(&self) -> Result<String, String> {
        let state = self.lock();
        match &state.wrong {
            Some(why) => Err(why.clone()),
            None => Ok(format!("{} reads under way, every one of them", state.figures.reads)),
        }
    }

    /// Reads all of the guest's blocks.
    pub(super) async fn check_all(&self, client: &NbdClient) -> Result<String, String> {
        const AT_ONCE: usize = 256;
        self.right()?;
        for first in (0..BLOCKS).step_by(AT_ONCE) {
            let count = AT_ONCE.min(BLOCKS - first);
            let read = client.read(offset(first), (count * BLOCK_BYTES) as u32).await;
            let data = read.map_err(|error| format!("a read failed: {error}"))?;
            self.read(first, &data)?;
        }
        Ok(format!("{} writes, {BLOCKS} blocks", self.figures().writes))
    }
}

fn offset(block: usize) -> u64 {
    SCRATCH_AT + (block * BLOCK_BYTES) as u64
}

/// A guest at work.
pub(super) struct Guest {
    ledger: Arc<Ledger>,
    stop: Arc<AtomicBool>,
    calm: Arc<AtomicBool>,
    workers: Vec<JoinHandle<()>>,
}

impl Guest {
    /// Begins to write and read over a connection.
    pub(super) fn start(client: &Arc<NbdClient>, ledger: &Arc<Ledger>) -> Self {
        let (stop, calm): (Arc<AtomicBool>, Arc<AtomicBool>) = Default::default();
        let seed = mix(ledger.lock().stamp);
        let workers = (0..WORKERS).map(|number| {
            let worker = Worker {
                client: client.clone(),
                ledger: ledger.clone(),
                stop: stop.clone(),
                calm: calm.clone(),
                first: number * BLOCKS_PER_WORKER,
                random: mix(seed ^ number as u64),
            };
            tokio::spawn(worker.run())
        });
        Self { ledger: ledger.clone(), stop: stop.clone(), calm: calm.clone(), workers: workers.collect() }
    }

    /// It goes on at a quiet pace.
    pub(super) fn calm_down(&self) {
        self.calm.store(true, Ordering::Relaxed);
    }

    /// Ends when so many more requests have been answered.
    pub(super) async fn progress(&self, requests: u64) -> Result<(), UserError> {
        let done = |figures: Figures| figures.writes + figures.reads;
        let goal = done(self.ledger.figures()) + requests;
        let until = Instant::now() + PATIENCE;
        while done(self.ledger.figures()) < goal {
            if self.workers.iter().all(JoinHandle::is_finished) {
                let why = self.ledger.right().err().unwrap_or_else(|| "every request failed".into());
                return Err(UserError::new(ErrorCode::Internal, format!("the guest has given up: {why}")));
            }
            if Instant::now() > until {
                let message = format!("the guest's requests are not answered for {PATIENCE:?}");
                return Err(UserError::new(ErrorCode::TimedOut, message));
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    /// Ends when all of its requests have been answered or have failed.
    pub(super) async fn stop(self) -> Result<(), String> {
        self.stop.store(true, Ordering::Relaxed);
        let ended = async {
            for worker in self.workers {
                worker.await.map_err(|error| error.to_string())?;
            }
            Ok(())
        };
        tokio::time::timeout(PATIENCE, ended).await.unwrap_or_else(|_| Err("a request hangs".into()))
    }
}

struct Worker {
    client: Arc<NbdClient>,
    ledger: Arc<Ledger>,
    stop: Arc<AtomicBool>,
    calm: Arc<AtomicBool>,
    first: usize,
    random: u64,
}

impl Worker {
    fn below(&mut self, end: u64) -> u64 {
        self.random = mix(self.random);
        self.random % end
    }

    /// Works until it is stopped, a request fails, or an answer is wrong.
    async fn run(mut self) {
        while !self.stop.load(Ordering::Relaxed) {
            let count = 1 + self.below(RUN_MAX) as usize;
            let first = self.first + self.below((BLOCKS_PER_WORKER - count) as u64 + 1) as usize;
            let going = match self.below(READ_ONE_IN) {
                0 => self.read(first, count).await,
                _ => self.write(first, count).await,
            };
            if !going {
                return;
            }
            if self.calm.load(Ordering::Relaxed) {
                tokio::time::sleep(CALM).await;
            }
        }
    }

    async fn write(&self, first: usize, count: usize) -> bool {
        let (stamp, data) = self.ledger.prepare(first, count);
        let acknowledged = self.client.write(offset(first), data).await.is_ok();
        self.ledger.wrote(first, count, stamp, acknowledged);
        acknowledged
    }

    async fn read(&self, first: usize, count: usize) -> bool {
        let Ok(data) = self.client.read(offset(first), (count * BLOCK_BYTES) as u32).await else {
            self.ledger.lock().figures.errors += 1;
            return false;
        };
        match self.ledger.read(first, &data) {
            Ok(()) => {
                self.ledger.lock().figures.reads += 1;
                true
            }
            Err(why) => {
                self.ledger.note_wrong(why);
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(block: usize, stamp: u64) -> BytesMut {
        let mut data = BytesMut::new();
        fill(block, stamp, &mut data);
        data
    }

    #[test]
    fn lost_stale_late_and_foreign_blocks_are_noticed() {
        let ledger = Ledger::new();
        assert_eq!(ledger.read(7, &content(7, 0)), Ok(()), "nothing was written yet");
        ledger.wrote(7, 1, 1, true);
        ledger.wrote(7, 1, 2, true);
        assert!(ledger.read(7, &content(7, 1)).is_err(), "an acknowledged write was lost");
        assert!(ledger.read(7, &content(7, 0)).is_err(), "all of them were lost");
        assert!(ledger.read(7, &content(8, 2)).is_err(), "another block's content");
        ledger.wrote(7, 1, 3, false);
        assert_eq!(ledger.read(7, &content(7, 2)), Ok(()));
        assert!(ledger.read(7, &content(7, 3)).is_err(), "an abandoned write landed late");
    }

    #[test]
    fn distinct_bytes_are_counted_once_and_unknown_writes_with_them() {
        let ledger = Ledger::new();
        ledger.wrote(0, 8, 1, true);
        ledger.wrote(20, 1, 2, false);
        ledger.begin_away();
        assert_eq!(ledger.dirtied_bytes(), 4096);
        ledger.wrote(0, 2, 3, true);
        ledger.wrote(1, 2, 4, true);
        assert_eq!(ledger.dirtied_bytes(), 4 * 4096);
        assert_eq!(ledger.figures().written_bytes, 12 * 4096);
        assert_eq!((ledger.figures().writes, ledger.figures().errors), (3, 1));
    }
}
