//! The two sides of a change of holder, as guests see them: the old holder, who goes on reading and writing whatever
//! happens, and the new one, who checks that nothing of the old one lands any more. Every answer carries two moments of
//! one monotonic clock, so that «after» is well defined.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use holdfast_frontend::nbd::NbdClient;

use crate::Outcome;
use crate::history::{BLOCK, contents, stamp_of};

/// Both holders write it; the old one reads it all the time.
const SHARED: u64 = 0;
/// Only the old holder writes it.
const OLD_ONLY: u64 = 1;
/// Set in every stamp of the new holder.
const NEW: u64 = 1 << 40;
/// Connections of the old holder that only read.
const READERS: usize = 2;
/// How long the new holder may wait for a write and a read.
const STEP_DEADLINE: Duration = crate::kills::RECOVERY;
/// Between tries to connect.
const CONNECT_PAUSE: Duration = Duration::from_millis(10);

/// One answer to the old holder.
#[derive(Clone, Copy, Debug)]
struct Answer {
    began: Instant,
    ended: Instant,
    /// The stamp that was read or written; `None`: it failed.
    stamp: Option<u64>,
}

#[derive(Default)]
struct Answers(Mutex<Vec<Answer>>);

impl Answers {
    fn add(&self, answer: Answer) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(answer);
    }
    fn all(&self) -> Vec<Answer> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
    fn failed_after(&self, moment: Instant) -> Option<Instant> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().rev().find(|answer| answer.stamp.is_none() && answer.ended > moment).map(|a| a.ended)
    }
    fn succeeded(&self) -> usize {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.iter().filter(|answer| answer.stamp.is_some()).count()
    }
}

/// The guest of the old holder.
pub struct OldGuest {
    /// One list per connection that reads.
    reads: Vec<Arc<Answers>>,
    /// Writes of the shared block and of its own.
    shared_writes: Arc<Answers>,
    own_writes: Arc<Answers>,
    stop: Arc<AtomicBool>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

#[derive(Clone)]
struct Connection {
    socket: PathBuf,
    export: String,
    stop: Arc<AtomicBool>,
}

impl Connection {
    /// Repeats `work` on connections to the export until it is stopped; `work` ends when a request fails.
    async fn keep<F: Future<Output = ()>>(self, mut work: impl FnMut(NbdClient) -> F) {
        while !self.stop.load(Ordering::Relaxed) {
            match NbdClient::connect(&self.socket, &self.export).await {
                Ok(client) => work(client).await,
                Err(_) => tokio::time::sleep(CONNECT_PAUSE).await,
            }
        }
    }
}

async fn read_all(client: NbdClient, answers: Arc<Answers>, stop: Arc<AtomicBool>) {
    while !stop.load(Ordering::Relaxed) {
        let began = Instant::now();
        let data = client.read(SHARED * BLOCK as u64, BLOCK as u32).await;
        let failed = data.is_err();
        let stamp = data.ok().map(|data| stamp_of(SHARED, &data).unwrap_or(u64::MAX));
        answers.add(Answer { began, ended: Instant::now(), stamp });
        if failed {
            return tokio::time::sleep(CONNECT_PAUSE).await;
        }
    }
}

async fn write_all(
    client: NbdClient,
    block: u64,
    next: Arc<AtomicU64>,
    answers: Arc<Answers>,
    stop: Arc<AtomicBool>,
) {
    while !stop.load(Ordering::Relaxed) {
        let stamp = next.fetch_add(1, Ordering::Relaxed);
        let began = Instant::now();
        let written = client.write(block * BLOCK as u64, contents(block, &[stamp])).await;
        let stamp = written.is_ok().then_some(stamp);
        answers.add(Answer { began, ended: Instant::now(), stamp });
        if stamp.is_none() {
            return tokio::time::sleep(CONNECT_PAUSE).await;
        }
    }
}

impl OldGuest {
    /// Begins to read and write at a node's socket.
    pub fn start(socket: PathBuf, export: &str) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let connection = Connection { socket, export: export.to_owned(), stop: stop.clone() };
        let mut guest = Self {
            reads: Vec::new(),
            shared_writes: Arc::default(),
            own_writes: Arc::default(),
            stop: stop.clone(),
            tasks: Vec::new(),
        };
        for _ in 0..READERS {
            let answers = Arc::<Answers>::default();
            guest.reads.push(answers.clone());
            let stop = stop.clone();
            let work = move |client| read_all(client, answers.clone(), stop.clone());
            guest.tasks.push(tokio::spawn(connection.clone().keep(work)));
        }
        for (block, answers) in [(SHARED, guest.shared_writes.clone()), (OLD_ONLY, guest.own_writes.clone())]
        {
            let (stop, next) = (stop.clone(), Arc::new(AtomicU64::new(1)));
            let work = move |client| write_all(client, block, next.clone(), answers.clone(), stop.clone());
            guest.tasks.push(tokio::spawn(connection.clone().keep(work)));
        }
        guest
    }

    fn lists(&self) -> impl Iterator<Item = &Arc<Answers>> {
        self.reads.iter().chain([&self.shared_writes, &self.own_writes])
    }

    /// Ends when every connection has succeeded `requests` times more.
    pub async fn progress(&self, requests: usize, patience: Duration) -> Outcome<()> {
        let until = Instant::now() + patience;
        for list in self.lists() {
            let goal = list.succeeded() + requests;
            while list.succeeded() < goal {
                if Instant::now() > until {
                    return Err(format!("the guest makes no progress for {patience:?}"));
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        Ok(())
    }

    /// Ends when every connection has had an error after `moment`: the device fails and does not hang. How long that
    /// took.
    pub async fn failed(&self, moment: Instant, patience: Duration) -> Outcome<Duration> {
        let mut longest = Duration::ZERO;
        for list in self.lists() {
            let ended = loop {
                if let Some(ended) = list.failed_after(moment) {
                    break ended;
                }
                if moment.elapsed() > patience {
                    return Err(format!("the old device hangs: no error within {patience:?}"));
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            };
            longest = longest.max(ended.saturating_duration_since(moment));
        }
        Ok(longest)
    }

    /// Stops it and checks what it saw, given when the new attachment was there and when the new holder's first write
    /// was acknowledged. Returns how many reads and writes succeeded.
    pub async fn finish(mut self, new: &NewHolder, failed_by: Instant) -> Outcome<(usize, usize)> {
        self.stop.store(true, Ordering::Relaxed);
        for task in std::mem::take(&mut self.tasks) {
            let ended = tokio::time::timeout(Duration::from_secs(30), task).await;
            ended.map_err(|_| "a request of the old holder hangs")?.map_err(|error| error.to_string())?;
        }
        let reads: Vec<Answer> = self.reads.iter().flat_map(|list| list.all()).collect();
        let writes = [self.shared_writes.all(), self.own_writes.all()].concat();
        let first_write = new.first_write.ok_or("the new holder has not written")?;
        for read in reads.iter().filter(|read| read.stamp.is_some_and(|stamp| stamp < NEW)) {
            if read.began > first_write {
                let late = read.began - first_write;
                return Err(format!(
                    "a stale read of {:?}, {late:?} after the new holder's first write",
                    read.stamp
                ));
            }
        }
        for write in writes.iter().filter(|write| write.stamp.is_some()) {
            if write.began > new.attached {
                let late = write.began - new.attached;
                return Err(format!(
                    "an old write was acknowledged that began {late:?} after the new attach"
                ));
            }
        }
        let after = |answer: &&Answer| answer.stamp.is_some() && answer.began > failed_by;
        if let Some(answer) = reads.iter().chain(&writes).find(after) {
            return Err(format!("the old device came back to life: {answer:?}"));
        }
        let last = self.own_writes.all().iter().filter_map(|write| write.stamp).max().unwrap_or(0);
        if new.found < last {
            return Err(format!("write {last} was acknowledged, the new holder found {}", new.found));
        }
        Ok((reads.iter().filter(|read| read.stamp.is_some()).count(), writes.len()))
    }
}

impl Drop for OldGuest {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// The guest of the new holder.
pub struct NewHolder {
    client: NbdClient,
    /// When its attachment was there.
    attached: Instant,
    /// When its first write was acknowledged.
    first_write: Option<Instant>,
    /// What the old holder's own block held.
    found: u64,
    next: u64,
}

impl NewHolder {
    /// Connects, looks at what is there, and writes for the first time.
    pub async fn begin(socket: PathBuf, export: &str, attached: Instant) -> Outcome<Self> {
        let wrong = |error: std::io::Error| format!("the new holder: {error}");
        let client = NbdClient::connect(&socket, export).await.map_err(wrong)?;
        let data = client.read(OLD_ONLY * BLOCK as u64, BLOCK as u32).await.map_err(wrong)?;
        let found = stamp_of(OLD_ONLY, &data)?;
        let mut new = Self { client, attached, first_write: None, found, next: NEW };
        new.step().await?;
        Ok(new)
    }

    /// Writes, and checks that nobody else does; bounded.
    async fn step(&mut self) -> Outcome<()> {
        let step = tokio::time::timeout(STEP_DEADLINE, self.unbounded_step()).await;
        step.map_err(|_| format!("a request of the new holder hangs for {STEP_DEADLINE:?}"))?
    }

    async fn unbounded_step(&mut self) -> Outcome<()> {
        let wrong = |error: std::io::Error| format!("the new holder: {error}");
        self.next += 1;
        let written = self.client.write(SHARED * BLOCK as u64, contents(SHARED, &[self.next])).await;
        written.map_err(wrong)?;
        self.first_write.get_or_insert_with(Instant::now);
        let data = self.client.read(SHARED * BLOCK as u64, (2 * BLOCK) as u32).await.map_err(wrong)?;
        let (shared, old) = (stamp_of(SHARED, &data[..BLOCK])?, stamp_of(OLD_ONLY, &data[BLOCK..])?);
        if shared != self.next {
            return Err(format!("the new holder wrote {} and reads {shared}", self.next));
        }
        if old != self.found {
            return Err(format!("an old write landed after the new attach: {} became {old}", self.found));
        }
        Ok(())
    }

    /// Writes and checks for so long.
    pub async fn work(&mut self, duration: Duration) -> Outcome<u64> {
        let (until, before) = (Instant::now() + duration, self.next);
        while Instant::now() < until {
            self.step().await?;
        }
        Ok(self.next - before)
    }

    /// Writes and checks until `other` ends.
    pub async fn work_during<T>(&mut self, other: impl Future<Output = Outcome<T>>) -> Outcome<T> {
        tokio::pin!(other);
        loop {
            let step = self.step();
            tokio::pin!(step);
            tokio::select! {
                result = &mut other => {
                    // The request under way is not dropped half-way.
                    step.await?;
                    return result;
                }
                stepped = &mut step => stepped?,
            }
        }
    }
}
