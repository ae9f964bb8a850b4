//! A load of so many requests at once for so long, and how long each took.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::Outcome;

/// Different contents of a request.
const CONTENTS: usize = 16;

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Operation {
    /// Reads.
    Read,
    /// Writes, durably.
    Write,
}

/// Where requests go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Pattern {
    /// Anywhere.
    Random,
    /// One after the other, from the beginning again at the end.
    Sequential,
}

/// A load.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Work {
    /// What.
    pub operation: Operation,
    /// Where.
    pub pattern: Pattern,
    /// Bytes of a request, whole blocks.
    pub bytes: u64,
    /// Requests at once.
    pub depth: u64,
    /// For how long, in milliseconds; 0 for one pass over the span.
    pub milliseconds: u64,
    /// Bytes from the device's beginning that are touched.
    pub span: u64,
    /// Of the random places.
    pub seed: u64,
}

/// What came of it.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Figures {
    /// Requests.
    pub count: u64,
    /// For how long.
    pub seconds: f64,
    /// Half took no longer, in microseconds.
    pub p50_us: f64,
    /// 99 of 100 took no longer.
    pub p99_us: f64,
    /// 999 of 1000 took no longer.
    pub p999_us: f64,
}

impl Figures {
    /// Of times in nanoseconds.
    pub fn of(times: &Histogram<u64>, seconds: f64) -> Self {
        let at = |quantile| times.value_at_quantile(quantile) as f64 / 1e3;
        Self { count: times.len(), seconds, p50_us: at(0.5), p99_us: at(0.99), p999_us: at(0.999) }
    }
    /// Requests per second.
    pub fn rate(&self) -> f64 {
        self.count as f64 / self.seconds
    }
}

/// Times between a nanosecond and a minute, to three digits.
pub fn times() -> Outcome<Histogram<u64>> {
    Histogram::new_with_bounds(1, 60_000_000_000, 3).map_err(|error| error.to_string())
}

/// A small generator; good enough for places.
pub struct Places(u64);

impl Places {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed | 1)
    }
    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

/// What is loaded.
pub trait Target {
    /// Reads `bytes` at `offset`.
    fn read(&self, offset: u64, bytes: u64) -> impl Future<Output = Outcome<()>>;
    /// Writes; durable when it returns.
    fn write(&self, offset: u64, data: Bytes) -> impl Future<Output = Outcome<()>>;
}

fn contents(work: &Work) -> Vec<Bytes> {
    let mut places = Places::new(work.seed ^ 0x5eed);
    let mut content = || (0..work.bytes / 8).flat_map(|_| places.next().to_le_bytes()).collect::<Vec<u8>>();
    (0..CONTENTS).map(|_| content().into()).collect()
}

struct Shared {
    work: Work,
    contents: Vec<Bytes>,
    places: RefCell<Places>,
    next: Cell<u64>,
    until: Instant,
    times: RefCell<Histogram<u64>>,
}

impl Shared {
    /// Where the next request goes; `None` at the end.
    fn take(&self) -> Option<(u64, u64)> {
        let slots = self.work.span / self.work.bytes;
        let number = self.next.get();
        let ended = match self.work.milliseconds {
            0 => number >= slots,
            _ => Instant::now() >= self.until,
        };
        if ended {
            return None;
        }
        self.next.set(number + 1);
        let slot = match self.work.pattern {
            Pattern::Random => self.places.borrow_mut().next() % slots,
            Pattern::Sequential => number % slots,
        };
        Some((number, slot * self.work.bytes))
    }
}

async fn worker<T: Target>(target: Rc<T>, shared: Rc<Shared>) -> Outcome<()> {
    while let Some((number, offset)) = shared.take() {
        let began = Instant::now();
        match shared.work.operation {
            Operation::Read => target.read(offset, shared.work.bytes).await?,
            Operation::Write => {
                target.write(offset, shared.contents[number as usize % CONTENTS].clone()).await?
            }
        }
        shared.times.borrow_mut().saturating_record(began.elapsed().as_nanos() as u64);
    }
    Ok(())
}

/// Runs a load.
pub async fn run<T: Target + 'static>(target: &Rc<T>, work: &Work) -> Outcome<Figures> {
    let began = Instant::now();
    let shared = Rc::new(Shared {
        work: work.clone(),
        contents: contents(work),
        places: RefCell::new(Places::new(work.seed)),
        next: Cell::new(0),
        until: began + Duration::from_millis(work.milliseconds),
        times: RefCell::new(times()?),
    });
    let workers: Vec<_> = (0..work.depth)
        .map(|_| holdfast_env::spawn("worker", worker(target.clone(), shared.clone())))
        .collect();
    for worker in workers {
        worker.await.map_err(|error| error.to_string())??;
    }
    let times = shared.times.borrow();
    Ok(Figures::of(&times, began.elapsed().as_secs_f64()))
}
