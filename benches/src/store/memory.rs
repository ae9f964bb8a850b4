//! What a store needs of memory, by the resident size of a process of its own for each question.

use std::path::Path;
use std::rc::Rc;

use bytes::Bytes;
use clap::ValueEnum;
use holdfast_env::real::disk::IoEngine;
use serde::{Deserialize, Serialize};

use super::Plan;
use super::place::{Store, Volume, journal_of};
use super::text::Table;
use crate::Outcome;
use crate::child::{Worker, say};
use crate::load::Target;

const BLOCK: u64 = 4096;
const CHUNK: u64 = 64 * BLOCK;
const GIB: u64 = 1 << 30;
/// Idle replicas that are opened.
const IDLE: u64 = 200;
/// Volume of which a block in every chunk is written, and how many at once.
const SPARSE_BYTES: u64 = 4 * GIB;
const DEPTH: u64 = 32;
/// Blocks that are not home, each a run of its own; their payload is read from the journal, but for the newest.
const RUNS: u64 = 24_000;
const JOURNAL_MIB: u64 = 256;

/// What is measured.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Question {
    /// Makes replicas that do nothing.
    PrepareIdle,
    /// Replicas that do nothing.
    Idle,
    /// Makes tables with many pages.
    PreparePages,
    /// Pages of tables.
    Pages,
    /// Runs of the block map.
    Runs,
}

/// What was found.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Found {
    /// Resident bytes more than before.
    bytes: u64,
    /// Of so many things.
    count: u64,
}

fn resident() -> Outcome<u64> {
    let text = std::fs::read_to_string("/proc/self/status").map_err(|error| error.to_string())?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.map(|kib| kib * 1024).ok_or_else(|| "/proc/self/status is not understood".into())
}

async fn write_blocks(volume: &Rc<Volume>, offsets: impl Iterator<Item = u64>) -> Outcome<()> {
    let block = Bytes::from(vec![0x77; BLOCK as usize]);
    let mut offsets = offsets.peekable();
    while offsets.peek().is_some() {
        let some = offsets.by_ref().take(DEPTH as usize);
        futures_util::future::try_join_all(some.map(|offset| volume.write(offset, block.clone()))).await?;
    }
    Ok(())
}

async fn prepare_idle(place: &Path) -> Outcome<()> {
    let store = Store::format(place, &journal_of(64), IoEngine::Threads).await?;
    for number in 1..=IDLE + 1 {
        let volume = store.create(number, 64 * GIB).await?;
        write_blocks(&volume, std::iter::once(0)).await?;
        volume.settle().await?;
    }
    Ok(())
}

async fn idle(place: &Path) -> Outcome<Found> {
    let store = Store::open(place, IoEngine::Threads).await?;
    let mut open = vec![store.reopen(1, 64 * GIB).await?];
    let before = resident()?;
    for number in 2..=IDLE + 1 {
        open.push(store.reopen(number, 64 * GIB).await?);
    }
    Ok(Found { bytes: resident()?.saturating_sub(before), count: IDLE })
}

async fn prepare_pages(place: &Path) -> Outcome<()> {
    let store = Store::format(place, &journal_of(64), IoEngine::Threads).await?;
    let volume = store.create(1, SPARSE_BYTES).await?;
    volume.start_cleaner();
    write_blocks(&volume, (0..SPARSE_BYTES / CHUNK).map(|chunk| chunk * CHUNK)).await?;
    volume.settle().await?;
    volume.close().await
}

async fn pages(place: &Path) -> Outcome<Found> {
    let store = Store::open(place, IoEngine::Threads).await?;
    let volume = store.reopen(1, SPARSE_BYTES).await?;
    let before = resident()?;
    for chunk in 0..SPARSE_BYTES / CHUNK {
        volume.read(chunk * CHUNK, BLOCK).await?;
    }
    Ok(Found { bytes: resident()?.saturating_sub(before), count: SPARSE_BYTES })
}

async fn runs(place: &Path) -> Outcome<Found> {
    let store = Store::format(place, &journal_of(JOURNAL_MIB), IoEngine::Threads).await?;
    let volume = store.create(1, GIB).await?;
    // What is kept of payload in memory is full before it is measured.
    write_blocks(&volume, (0..RUNS / 2).map(|n| n * 2 * BLOCK)).await?;
    let before = resident()?;
    write_blocks(&volume, (RUNS / 2..RUNS).map(|n| n * 2 * BLOCK)).await?;
    Ok(Found { bytes: resident()?.saturating_sub(before), count: RUNS / 2 })
}

/// In a process of its own: measures, tells, and waits until the parent has heard it.
pub fn answer(question: Question, place: &Path) -> Outcome<()> {
    say(&Ok(true))?;
    let nothing = Found { bytes: 0, count: 0 };
    let found = holdfast_env::real::run(async {
        match question {
            Question::PrepareIdle => prepare_idle(place).await.map(|()| nothing),
            Question::Idle => idle(place).await,
            Question::PreparePages => prepare_pages(place).await.map(|()| nothing),
            Question::Pages => pages(place).await,
            Question::Runs => runs(place).await,
        }
    });
    say(&found)
}

/// Asks in a process of its own, also for what is only prepared: what another one has given back of its memory would be
/// used again without being counted.
fn ask(question: Question, place: &Path) -> Outcome<Found> {
    let name = question.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default();
    let directory = place.to_string_lossy().into_owned();
    let arguments = ["store-memory", "--question", name.as_str(), "--directory", directory.as_str()];
    Worker::start("what measures memory", &arguments)?.hear()
}

/// Measures; the table.
pub fn run(plan: &Plan, place: &Path) -> Outcome<Table> {
    let mut table = Table::new("Memory, by the resident size of a process", &["what", "bytes", "of"]);
    let of_idle = place.join("memory-idle");
    ask(Question::PrepareIdle, &of_idle)?;
    let idle = ask(Question::Idle, &of_idle)?;
    table.row(vec![
        "an idle replica that was opened".into(),
        format!("{:.0} KiB", idle.bytes as f64 / idle.count as f64 / 1024.0),
        format!("{} replicas; without Raft, tasks and network", idle.count),
    ]);
    if !plan.quick {
        let of_pages = place.join("memory-pages");
        ask(Question::PreparePages, &of_pages)?;
        let pages = ask(Question::Pages, &of_pages)?;
        let per_tib = pages.bytes as f64 * (1u64 << 40) as f64 / pages.count as f64;
        table.row(vec![
            "an allocated TiB, every page of its table in memory (extrapolated)".into(),
            format!("{:.0} MiB", per_tib / (1 << 20) as f64),
            format!("{} GiB; pages in memory are bounded to 16 MiB a replica", pages.count / GIB),
        ]);
    }
    let runs = ask(Question::Runs, &place.join("memory-runs"))?;
    table.row(vec![
        "a block of 4 KiB that is not home, beside its payload".into(),
        format!("{:.0} bytes", runs.bytes as f64 / runs.count as f64),
        format!("{} blocks, none beside another: the map's run, its checksum, the log's index", runs.count),
    ]);
    Ok(table)
}
