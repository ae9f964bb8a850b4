//! A guest that writes a little all the time, and what it saw.
//!
//! A *stall* is the longest time between two acknowledged writes, whoever of its few writers they belong to: what an
//! application with several requests under way sees. The slowest single request is told beside it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use holdfast_frontend::nbd::NbdClient;

use crate::Outcome;

/// Writers, each with one request under way.
const WRITERS: u64 = 4;
/// Between an acknowledgement and the writer's next request.
const PAUSE: Duration = Duration::from_millis(8);
/// Blocks that a writer goes round in.
const BLOCKS_PER_WRITER: u64 = 256;
const BLOCK: u64 = 4096;
/// How long a request may take: beyond it the round has failed.
const HANGS: Duration = Duration::from_secs(60);

/// What happened since [`Guest::begin`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    /// Longest time between two acknowledgements.
    pub gap: Duration,
    /// The slowest request.
    pub slowest: Duration,
    /// Writes acknowledged.
    pub writes: u64,
}

#[derive(Default)]
struct State {
    stopped: bool,
    failed: Option<String>,
    last: Option<Instant>,
    seen: Seen,
}

type Shared = Arc<Mutex<State>>;

fn lock(shared: &Mutex<State>) -> MutexGuard<'_, State> {
    // A panic elsewhere leaves plain numbers behind.
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A running guest.
pub struct Guest {
    shared: Shared,
    thread: Option<JoinHandle<()>>,
}

impl Guest {
    /// Connects and begins to write.
    pub fn start(socket: &Path, export: &str) -> Outcome<Self> {
        let (shared, export, socket) = (Shared::default(), export.to_owned(), socket.to_owned());
        let of_thread = shared.clone();
        let thread = std::thread::Builder::new().name("guest".into());
        let thread = thread.spawn(move || {
            if let Err(why) = work(socket, &export, &of_thread) {
                lock(&of_thread).failed.get_or_insert(why);
            }
        });
        let thread = Some(thread.map_err(|error| format!("the guest's thread: {error}"))?);
        let guest = Self { shared, thread };
        guest.flows(Duration::from_millis(500))?;
        Ok(guest)
    }

    /// What is seen from now on counts.
    pub fn begin(&self) {
        lock(&self.shared).seen = Seen::default();
    }

    fn look(&self) -> Outcome<(Seen, Duration)> {
        let state = lock(&self.shared);
        if let Some(why) = &state.failed {
            return Err(format!("an error reached the guest: {why}"));
        }
        Ok((state.seen, state.last.map_or(Duration::MAX, |last| last.elapsed())))
    }

    /// Waits until writes have been acknowledged for `span` without a gap to speak of, and at least for that long.
    pub fn flows(&self, span: Duration) -> Outcome<()> {
        const SILENCE: Duration = Duration::from_millis(100);
        let (mut since, began) = (Instant::now(), Instant::now());
        while since.elapsed() < span {
            if self.look()?.1 > SILENCE {
                since = Instant::now();
            }
            if began.elapsed() > HANGS {
                return Err(format!("the guest's writes do not flow again in {HANGS:?}"));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// What was seen since it began to count, once writes flow again: at least `least`, and then for a second.
    pub fn seen(&self, least: Duration) -> Outcome<Seen> {
        std::thread::sleep(least);
        self.flows(Duration::from_secs(1))?;
        Ok(self.look()?.0)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        lock(&self.shared).stopped = true;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            eprintln!("the guest's thread has panicked");
        }
    }
}

fn work(socket: PathBuf, export: &str, shared: &Shared) -> Outcome<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| error.to_string())?;
    runtime.block_on(async {
        let client = NbdClient::connect(&socket, export).await;
        let client = client.map_err(|error| format!("{}: {error}", socket.display()))?;
        let writers = (0..WRITERS).map(|number| write(&client, number, shared));
        futures_util::future::join_all(writers).await.into_iter().collect()
    })
}

async fn write(client: &NbdClient, number: u64, shared: &Shared) -> Outcome<()> {
    let content = Bytes::from((0..BLOCK).map(|n| (n * 7 + number) as u8).collect::<Vec<u8>>());
    for turn in 0.. {
        if lock(shared).stopped {
            return Ok(());
        }
        let offset = (number * BLOCKS_PER_WRITER + turn % BLOCKS_PER_WRITER) * BLOCK;
        let began = Instant::now();
        let written = tokio::time::timeout(HANGS, client.write(offset, content.clone())).await;
        written
            .map_err(|_| format!("a write hangs for {HANGS:?}"))?
            .map_err(|error| format!("a write: {error}"))?;
        {
            let mut state = lock(shared);
            let now = Instant::now();
            let gap = state.last.map_or(Duration::ZERO, |last| now - last);
            state.last = Some(now);
            state.seen.gap = state.seen.gap.max(gap);
            state.seen.slowest = state.seen.slowest.max(now - began);
            state.seen.writes += 1;
        }
        tokio::time::sleep(PAUSE).await;
    }
    Ok(())
}
