//! Writes through journal and cleaner, for many times the journal's size, and what of them reaches the medium.

use std::path::Path;
use std::rc::Rc;

use super::Plan;
use super::place::{Store, Volume, journal_of};
use super::raw::{Access, Raw};
use super::text::{Table, median, micros, ratio};
use crate::Outcome;
use crate::load::{self, Figures, Operation, Pattern, Work};

const BLOCK: u64 = 4096;
const MIB: u64 = 1 << 20;
/// Payload of a run, in sizes of the journal.
const JOURNALS: u64 = 10;
/// Largest time that a floor takes beside a run.
const FLOOR_MS: u64 = 1500;

/// What is written.
struct Kind {
    name: &'static str,
    pattern: Pattern,
    bytes: u64,
    depth: u64,
}

const KINDS: [Kind; 4] = [
    Kind { name: "random 4 KiB, QD1 (for a while)", pattern: Pattern::Random, bytes: BLOCK, depth: 1 },
    Kind { name: "random 4 KiB, QD32", pattern: Pattern::Random, bytes: BLOCK, depth: 32 },
    Kind { name: "random 64 KiB, QD8", pattern: Pattern::Random, bytes: 16 * BLOCK, depth: 8 },
    Kind { name: "sequential 1 MiB, QD4", pattern: Pattern::Sequential, bytes: MIB, depth: 4 },
];

struct Sample {
    raw: Figures,
    ours: Figures,
    /// Bytes to journal, home, and tables and manifests, per byte of payload.
    parts: [f64; 3],
    /// As the kernel counts it for the process.
    all: f64,
}

/// Bytes that this process has sent to the medium.
pub fn process_bytes_written() -> Outcome<u64> {
    let text = std::fs::read_to_string("/proc/self/io").map_err(|error| format!("/proc/self/io: {error}"))?;
    let value = text.lines().find_map(|line| line.strip_prefix("write_bytes: "));
    value.and_then(|value| value.parse().ok()).ok_or_else(|| "/proc/self/io is not understood".into())
}

struct Bench<'p> {
    plan: &'p Plan,
    raw: Raw,
    volume: Rc<Volume>,
    span: u64,
    seed: u64,
}

impl Bench<'_> {
    fn work(&mut self, kind: &Kind) -> Work {
        self.seed += 1;
        Work {
            operation: Operation::Write,
            pattern: kind.pattern,
            bytes: kind.bytes,
            depth: kind.depth,
            // Without a time: as many bytes as the volume has.
            milliseconds: if kind.depth == 1 { self.plan.milliseconds(2000) } else { 0 },
            span: self.span,
            seed: self.seed * 7919,
        }
    }

    async fn sample(&mut self, kind: &Kind) -> Outcome<Sample> {
        let work = self.work(kind);
        let Kind { pattern, bytes, depth, .. } = *kind;
        let access = Access { operation: Operation::Write, pattern, bytes, depth };
        let raw = self.raw.run(access, self.plan.milliseconds(FLOOR_MS), self.seed)?;
        let (written, counted) = (self.volume.written(), process_bytes_written()?);
        let ours = load::run(&self.volume, &work).await?;
        self.volume.settle().await?;
        let payload = (ours.count * bytes) as f64;
        let (after, counted_after) = (self.volume.written(), process_bytes_written()?);
        let parts = [0, 1, 2].map(|n| (after[n] - written[n]) as f64 / payload);
        Ok(Sample { raw, ours, parts, all: (counted_after - counted) as f64 / payload })
    }
}

/// Measures; the table.
pub async fn run(plan: &Plan, place: &Path) -> Outcome<Table> {
    let span = JOURNALS * plan.journal_mib * MIB;
    let raw = Raw::new(&place.join("raw-writes"), span)?;
    let store =
        Store::format(&place.join("writes"), &journal_of(plan.journal_mib), plan.io_engine.into()).await?;
    let volume = store.create(1, span).await?;
    volume.start_cleaner();
    let mut bench = Bench { plan, raw, volume, span, seed: 1 };
    // Every block is written once, so that nothing below is a first write.
    let first = Kind { name: "first", pattern: Pattern::Sequential, bytes: MIB, depth: 4 };
    let fill = bench.work(&first);
    let filled = load::run(&bench.volume, &fill).await?;
    bench.volume.settle().await?;
    let mut samples: Vec<Vec<Sample>> = KINDS.iter().map(|_| Vec::new()).collect();
    for _ in 0..plan.rounds.min(3) {
        for (kind, samples) in KINDS.iter().zip(&mut samples) {
            samples.push(bench.sample(kind).await?);
        }
    }
    let flushes = store.journal.flush_latency();
    bench.volume.close().await?;
    let mut table = table(plan, &samples);
    table.note(format!(
        "First writes, sequential 1 MiB, QD4: {} µs (p50 / p99 / p99.9), {:.0} MB/s. Over all runs a batch of the \
         journal took {:.2} ms from its hand-over to the disk until it was durable, on average.",
        micros([filled].iter()),
        filled.rate() * MIB as f64 / 1e6,
        flushes.sum().as_secs_f64() * 1e3 / flushes.count().max(1) as f64,
    ));
    Ok(table)
}

fn table(plan: &Plan, samples: &[Vec<Sample>]) -> Table {
    let title = format!(
        "Writes through journal and cleaner: {JOURNALS} times the journal of {} MiB, until everything is home; the floor: \
         as many threads that overwrite as much with O_DSYNC",
        plan.journal_mib
    );
    let mut table = Table::new(
        &title,
        &[
            "work",
            "floor p50 / p99 / p99.9 µs",
            "floor MB/s",
            "ours p50 / p99 / p99.9 µs",
            "ours MB/s",
            "rate beside the floor",
            "bytes written per byte",
            "journal",
            "home",
            "table, manifest",
            "by the kernel's count",
        ],
    );
    for (kind, samples) in KINDS.iter().zip(samples) {
        let of = |value: &dyn Fn(&Sample) -> f64| median(samples.iter().map(value).collect());
        let megabytes = |figures: &Figures| figures.rate() * kind.bytes as f64 / 1e6;
        let part = |n: usize| format!("{:.3}", of(&|sample| sample.parts[n]));
        table.row(vec![
            kind.name.into(),
            micros(samples.iter().map(|sample| &sample.raw)),
            format!("{:.0}", of(&|sample| megabytes(&sample.raw))),
            micros(samples.iter().map(|sample| &sample.ours)),
            format!("{:.0}", of(&|sample| megabytes(&sample.ours))),
            ratio(of(&|sample| sample.ours.rate() / sample.raw.rate())),
            format!("{:.2}", of(&|sample| sample.parts.iter().sum())),
            part(0),
            part(1),
            part(2),
            format!("{:.2}", of(&|sample| sample.all)),
        ]);
    }
    table
}
