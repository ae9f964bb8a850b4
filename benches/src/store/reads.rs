//! Reads: from the map, from home, cold and warm; and through many layers.

use std::path::Path;
use std::rc::Rc;
use std::time::Instant;

use bytes::Bytes;

use super::Plan;
use super::place::{Store, Volume, journal_of};
use super::raw::{Access, Raw};
use super::text::{Table, median, micros, ratio};
use crate::Outcome;
use crate::load::{self, Figures, Operation, Pattern, Places, Target, Work, times};

const BLOCK: u64 = 4096;
const CHUNK: u64 = 64 * BLOCK;
const MIB: u64 = 1 << 20;
/// Snapshots of the volumes that are compared.
const SNAPSHOTS: [u64; 4] = [0, 1, 10, 100];
/// Blocks that each layer writes in the part that all of them write to.
const WRITES_PER_LAYER: u64 = 64;
/// Reads of blocks that were never read since the store was opened.
const COLD_READS: u64 = 300;
/// Journal of the volume of which nothing is home, in MiB, and what is written to it.
const MAP_JOURNAL_MIB: u64 = 256;
const MAP_BYTES: u64 = 128 * MIB;
/// What of it stands in memory, at least; the rest is read from the journal.
const IN_MEMORY_BYTES: u64 = 24 * MIB;

/// Part of a volume by who wrote it last: a quarter each.
#[derive(Clone, Copy, PartialEq)]
enum Part {
    Oldest,
    All,
    Head,
    Nobody,
}

const PARTS: [(Part, &str); 4] = [
    (Part::Oldest, "data of the oldest layer"),
    (Part::All, "blocks that some layer wrote"),
    (Part::Head, "data of the newest layer"),
    (Part::Nobody, "absent blocks"),
];

/// A volume's parts, each a quarter of it.
struct Shown {
    volume: Rc<Volume>,
    from: u64,
    bytes: u64,
}

impl Target for Shown {
    async fn read(&self, offset: u64, bytes: u64) -> Outcome<()> {
        self.volume.read(self.from + offset, bytes).await
    }
    async fn write(&self, offset: u64, data: Bytes) -> Outcome<()> {
        self.volume.write(self.from + offset, data).await
    }
}

fn shown(volume: &Rc<Volume>, span: u64, part: Part) -> Rc<Shown> {
    let quarter = span / 4;
    let number = PARTS.iter().position(|(other, _)| *other == part).unwrap_or(0) as u64;
    Rc::new(Shown { volume: volume.clone(), from: number * quarter, bytes: quarter })
}

fn load(
    operation: Operation,
    pattern: Pattern,
    bytes: u64,
    depth: u64,
    ms: u64,
    span: u64,
    seed: u64,
) -> Work {
    Work { operation, pattern, bytes, depth, milliseconds: ms, span, seed }
}

async fn fill(target: &Rc<Shown>) -> Outcome<()> {
    let work = load(Operation::Write, Pattern::Sequential, MIB, 4, 0, target.bytes, 5);
    load::run(target, &work).await.map(drop)
}

/// A volume with so many snapshots. Each layer has written some blocks; the newest has written its part whole.
async fn make(store: &Store, number: u64, span: u64, snapshots: u64) -> Outcome<()> {
    let volume = store.create(number, span).await?;
    volume.start_cleaner();
    for part in [Part::Oldest, Part::All, Part::Head] {
        fill(&shown(&volume, span, part)).await?;
    }
    volume.settle().await?;
    for layer in 0..snapshots {
        volume.snapshot().await?;
        let all = shown(&volume, span, Part::All);
        let block = Bytes::from(vec![layer as u8; BLOCK as usize]);
        let mut places = Places::new(layer + 77);
        for _ in 0..WRITES_PER_LAYER {
            all.write(places.next() % (all.bytes / BLOCK) * BLOCK, block.clone()).await?;
        }
        if layer + 1 == snapshots {
            fill(&shown(&volume, span, Part::Head)).await?;
        }
        volume.settle().await?;
    }
    volume.close().await
}

/// The first read of chunks since the store was opened, in random order.
async fn first_reads(target: &Shown, seed: u64) -> Outcome<Figures> {
    let (mut times, mut places) = (times()?, Places::new(seed));
    let mut chunks: Vec<u64> = (0..target.bytes / CHUNK).collect();
    for n in (1..chunks.len()).rev() {
        chunks.swap(n, places.next() as usize % (n + 1));
    }
    let began = Instant::now();
    for chunk in chunks.into_iter().take(COLD_READS as usize) {
        let one = Instant::now();
        target.read(chunk * CHUNK + places.next() % 64 * BLOCK, BLOCK).await?;
        times.saturating_record(one.elapsed().as_nanos() as u64);
    }
    Ok(Figures::of(&times, began.elapsed().as_secs_f64()))
}

/// What one part of one volume has shown.
#[derive(Default)]
struct Samples {
    cold: Vec<Figures>,
    warm: Vec<Figures>,
}

struct Bench<'p> {
    plan: &'p Plan,
    raw: Raw,
    floor: Vec<Figures>,
    span: u64,
    seed: u64,
}

impl Bench<'_> {
    fn floor(&mut self) -> Outcome<()> {
        let access = Access { operation: Operation::Read, pattern: Pattern::Random, bytes: BLOCK, depth: 1 };
        self.floor.push(self.raw.run(access, self.plan.milliseconds(300), self.seed)?);
        Ok(())
    }

    async fn warm(&mut self, target: &Rc<Shown>) -> Outcome<Figures> {
        self.seed += 1;
        // Everything was looked up once.
        let touch = load(Operation::Read, Pattern::Sequential, 16 * BLOCK, 4, 0, target.bytes, 1);
        load::run(target, &touch).await?;
        let ms = self.plan.milliseconds(300);
        load::run(target, &load(Operation::Read, Pattern::Random, BLOCK, 1, ms, target.bytes, self.seed))
            .await
    }
}

/// Measures; the table of layers.
pub async fn layers(plan: &Plan, place: &Path) -> Outcome<Table> {
    let span = plan.bytes(512 * MIB);
    let raw = Raw::new(&place.join("raw-reads"), span)?;
    let mut bench = Bench { plan, raw, floor: Vec::new(), span, seed: 1 };
    let path = place.join("layers");
    {
        let store = Store::format(&path, &journal_of(plan.journal_mib), plan.io_engine.into()).await?;
        for (number, snapshots) in (1..).zip(SNAPSHOTS) {
            make(&store, number, span, snapshots).await?;
        }
    }
    let mut samples: Vec<Vec<Samples>> = Vec::new();
    samples.resize_with(SNAPSHOTS.len(), || PARTS.iter().map(|_| Samples::default()).collect());
    for round in 1..=plan.rounds {
        let store = Store::open(&path, plan.io_engine.into()).await?;
        let mut volumes = Vec::new();
        for number in 1..=SNAPSHOTS.len() as u64 {
            volumes.push(store.reopen(number, span).await?);
        }
        for (n, (part, _)) in PARTS.into_iter().enumerate() {
            bench.floor()?;
            for (volume, samples) in volumes.iter().zip(&mut samples) {
                samples[n].cold.push(first_reads(&shown(volume, span, part), round).await?);
            }
            for (volume, samples) in volumes.iter().zip(&mut samples) {
                samples[n].warm.push(bench.warm(&shown(volume, span, part)).await?);
            }
        }
    }
    Ok(layers_table(&bench, &samples))
}

fn layers_table(bench: &Bench<'_>, samples: &[Vec<Samples>]) -> Table {
    let title = format!(
        "Reads through layers: 4 KiB, QD1, random, of a volume of {} MiB, home; the floor: O_DIRECT reads of a file of that \
         size",
        bench.span / MIB
    );
    let mut table = Table::new(
        &title,
        &[
            "what",
            "snapshots",
            "warm p50 / p99 / p99.9 µs",
            "beside the floor",
            "beside none (goal ≤ 1.3)",
            "first read of a chunk, p50 / p99 / p99.9 µs",
            "beside none",
        ],
    );
    let floor = median(bench.floor.iter().map(|figures| figures.p50_us).collect());
    table.row(vec![
        "the floor".into(),
        String::new(),
        micros(bench.floor.iter()),
        String::new(),
        String::new(),
        String::new(),
        String::new(),
    ]);
    for (n, (part, name)) in PARTS.into_iter().enumerate() {
        for (snapshots, of) in SNAPSHOTS.into_iter().zip(samples) {
            let beside = |own: &[Figures], none: &[Figures]| {
                let each = own.iter().zip(none).map(|(own, none)| own.p50_us / none.p50_us);
                ratio(median(each.collect()))
            };
            let (own, none) = (&of[n], &samples[0][n]);
            let warm = median(own.warm.iter().map(|figures| figures.p50_us).collect());
            table.row(vec![
                name.into(),
                snapshots.to_string(),
                micros(own.warm.iter()),
                if part == Part::Nobody { "reads nothing".into() } else { ratio(warm / floor) },
                beside(&own.warm, &none.warm),
                micros(own.cold.iter()),
                beside(&own.cold, &none.cold),
            ]);
        }
    }
    table.note(
        "Warm: everything was read once since the store was opened. The first read of a chunk has no page of a table in \
         memory. Home is read with O_DIRECT, so no page cache is in it; what caches below the machine is not known."
            .into(),
    );
    table
}

/// Reads of what is not home yet.
pub async fn from_the_map(plan: &Plan, place: &Path) -> Outcome<Table> {
    let span = MAP_BYTES;
    let store =
        Store::format(&place.join("map"), &journal_of(MAP_JOURNAL_MIB), plan.io_engine.into()).await?;
    let volume = store.create(1, span).await?;
    // No cleaner: everything stays in the journal; the newest of it in memory, too.
    let whole = Rc::new(Shown { volume: volume.clone(), from: 0, bytes: span });
    load::run(&whole, &load(Operation::Write, Pattern::Sequential, 16 * BLOCK, 8, 0, span, 3)).await?;
    let raw = Raw::new(&place.join("raw-map"), span)?;
    let mut bench = Bench { plan, raw, floor: Vec::new(), span, seed: 9 };
    let newest = Shown { volume: volume.clone(), from: span - IN_MEMORY_BYTES, bytes: IN_MEMORY_BYTES };
    let older = Shown { volume, from: 0, bytes: span - 2 * IN_MEMORY_BYTES };
    let kinds = [("not home, in memory", Rc::new(newest)), ("not home, in the journal", Rc::new(older))];
    let mut samples = [Vec::new(), Vec::new()];
    for _ in 0..plan.rounds {
        bench.floor()?;
        for ((_, target), samples) in kinds.iter().zip(&mut samples) {
            samples.push(bench.warm(target).await?);
        }
    }
    let mut table = Table::new(
        "Reads from the block map: 4 KiB, QD1, random",
        &["what", "p50 / p99 / p99.9 µs", "beside the floor"],
    );
    let floor = median(bench.floor.iter().map(|figures| figures.p50_us).collect());
    for ((name, _), samples) in kinds.iter().zip(&samples) {
        let p50 = median(samples.iter().map(|figures| figures.p50_us).collect());
        table.row(vec![(*name).into(), micros(samples.iter()), ratio(p50 / floor)]);
    }
    Ok(table)
}
