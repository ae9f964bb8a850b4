//! How long a store takes until it serves again, by the size of its journal.

use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::Plan;
use super::place::{Store, journal_of};
use super::raw::{Access, Raw};
use super::text::{Table, median};
use crate::Outcome;
use crate::load::{Operation, Pattern, Target};

const MIB: u64 = 1 << 20;
const VOLUMES: u64 = 100;
const VOLUME_BYTES: u64 = 64 * MIB;
/// How full the journal gets before it is opened again, in percent: what of it is left is for what makes room.
const FULL_PERCENT: u32 = 60;
/// Bytes of the writes that fill it, by turns.
const SIZES: [u64; 4] = [4096, 16 << 10, 64 << 10, 256 << 10];
/// Writes under way at once.
const DEPTH: usize = 16;

/// One opening.
struct Sample {
    journal: Duration,
    volumes: Duration,
}

/// Fills the journal with writes to all volumes, of which nothing is brought home. How many, and their bytes.
async fn fill(store: &Store, path: &Path) -> Outcome<(u64, u64)> {
    let mut volumes = Vec::new();
    for number in 1..=VOLUMES {
        volumes.push(store.create(number, VOLUME_BYTES).await?);
    }
    let contents: Vec<Bytes> = SIZES.iter().map(|bytes| vec![0x3c; *bytes as usize].into()).collect();
    let (mut writes, mut bytes) = (0u64, 0u64);
    while store.journal.pressure().used_percent < FULL_PERCENT {
        let mut batch = Vec::new();
        for _ in 0..DEPTH {
            let content = contents[writes as usize % contents.len()].clone();
            let volume: Rc<_> = volumes[(writes * 7 % VOLUMES) as usize].clone();
            let offset = writes * 37 % (VOLUME_BYTES / SIZES[3]) * SIZES[3];
            writes += 1;
            bytes += content.len() as u64;
            batch.push(async move { volume.write(offset, content).await });
        }
        futures_util::future::try_join_all(batch)
            .await
            .map_err(|why| format!("{}: {why}", path.display()))?;
    }
    Ok((writes, bytes))
}

async fn open(plan: &Plan, path: &Path) -> Outcome<Sample> {
    let began = Instant::now();
    let store = Store::open(path, plan.io_engine.into()).await?;
    let journal = began.elapsed();
    let mut volumes = Vec::new();
    for number in 1..=VOLUMES {
        volumes.push(store.reopen(number, VOLUME_BYTES).await?);
    }
    Ok(Sample { journal, volumes: began.elapsed() - journal })
}

/// Measures; the table.
pub async fn run(plan: &Plan, place: &Path) -> Outcome<Table> {
    let mut table = Table::new(
        "Recovery of a store with 100 volumes, its journal as full as it gets, nothing of it home; from the opening until \
         every volume has applied its log",
        &[
            "journal MiB",
            "writes in it",
            "their MiB",
            "seconds (goal ≤ 2 at 1024)",
            "of it the journal",
            "of it the volumes",
            "O_DIRECT read of as many bytes, s",
        ],
    );
    for mib in if plan.quick { vec![64] } else { vec![64, 256, 1024] } {
        let path = place.join(format!("recovery-{mib}"));
        let (writes, bytes) = {
            let store = Store::format(&path, &journal_of(mib), plan.io_engine.into()).await?;
            fill(&store, &path).await?
        };
        let raw = Raw::new(&place.join(format!("raw-recovery-{mib}")), mib * MIB)?;
        let (mut samples, mut floors) = (Vec::new(), Vec::new());
        for round in 0..plan.rounds.min(3) {
            let access =
                Access { operation: Operation::Read, pattern: Pattern::Sequential, bytes: MIB, depth: 4 };
            floors.push((mib as f64) / raw.run(access, plan.milliseconds(500), round + 1)?.rate());
            samples.push(open(plan, &path).await?);
        }
        let of = |value: &dyn Fn(&Sample) -> Duration| {
            median(samples.iter().map(|sample| value(sample).as_secs_f64()).collect())
        };
        table.row(vec![
            mib.to_string(),
            writes.to_string(),
            (bytes / MIB).to_string(),
            format!("{:.2}", of(&|sample| sample.journal + sample.volumes)),
            format!("{:.2}", of(&|sample| sample.journal)),
            format!("{:.2}", of(&|sample| sample.volumes)),
            format!("{:.2}", median(floors)),
        ]);
    }
    Ok(table)
}
