//! Appends that are durable when they are answered, of several groups at once, beside raw durable overwrites.

use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use holdfast_store::journal::{GroupLog, StoreOptions};

use super::place::{Store, append, plain_entry};
use super::raw::{Access, Raw};
use super::text::{Table, median, micros, ratio};
use super::{Engine, Plan};
use crate::Outcome;
use crate::load::{Figures, Operation, Pattern, times};

const BLOCK: u64 = 4096;
/// Bytes of the raw file.
const RAW_BYTES: u64 = 256 << 20;
/// Appends after which a group purges its log, so that segments are reused as in life.
const PURGE_EVERY: u64 = 256;
const GROUPS: [usize; 3] = [1, 8, 64];

/// One round of one number of groups, on one engine.
struct Sample {
    raw: Figures,
    ours: Figures,
    flushes: f64,
    bytes: f64,
}

/// A store on an engine, and its groups.
struct Subject {
    engine: Engine,
    store: Store,
    logs: Vec<GroupLog>,
    /// By the number of groups.
    samples: [Vec<Sample>; GROUPS.len()],
}

impl Subject {
    async fn new(place: &Path, engine: Engine) -> Outcome<Self> {
        let path = place.join(format!("appends-{}", engine.name()));
        let store = Store::format(&path, &StoreOptions::default(), engine.into()).await?;
        let most = GROUPS.into_iter().max().unwrap_or(1);
        let mut logs = Vec::new();
        for number in 1..=most {
            logs.push(store.log(number as u64).await?);
        }
        Ok(Self { engine, store, logs, samples: Default::default() })
    }

    async fn sample(&mut self, n: usize, raw: Figures, milliseconds: u64) -> Outcome<()> {
        let before = self.store.journal.usage();
        let ours = ours(&self.logs[..GROUPS[n]], milliseconds).await?;
        let after = self.store.journal.usage();
        let per = |value: u64| value as f64 / ours.count as f64;
        let flushes = per(after.flushes - before.flushes);
        let bytes = per(after.bytes_written - before.bytes_written) / BLOCK as f64;
        self.samples[n].push(Sample { raw, ours, flushes, bytes });
        Ok(())
    }
}

async fn appender(log: GroupLog, payload: Bytes, until: Instant) -> Outcome<hdrhistogram::Histogram<u64>> {
    let mut times = times()?;
    let mut count = 0u64;
    while Instant::now() < until {
        let began = Instant::now();
        append(&log, plain_entry(&log, payload.clone())).await?;
        times.saturating_record(began.elapsed().as_nanos() as u64);
        count += 1;
        if let Some(last) = log.last().filter(|_| count.is_multiple_of(PURGE_EVERY)) {
            log.purge_soon(last).map_err(|error| error.to_string())?;
        }
    }
    // What it leaves would hold the segments while others write.
    if let Some(last) = log.last() {
        log.purge(last).await.map_err(|error| error.to_string())?;
    }
    Ok(times)
}

/// Each group has one append under way.
async fn ours(logs: &[GroupLog], milliseconds: u64) -> Outcome<Figures> {
    let payload = Bytes::from(vec![0xa5; BLOCK as usize]);
    let began = Instant::now();
    let until = began + Duration::from_millis(milliseconds);
    let tasks: Vec<_> = logs
        .iter()
        .map(|log| holdfast_env::spawn("appender", appender(log.clone(), payload.clone(), until)))
        .collect();
    let mut all = times()?;
    for task in tasks {
        all.add(task.await.map_err(|error| error.to_string())??).map_err(|error| error.to_string())?;
    }
    Ok(Figures::of(&all, began.elapsed().as_secs_f64()))
}

/// Measures; the table.
pub async fn run(plan: &Plan, place: &Path) -> Outcome<Table> {
    let raw = Raw::new(&place.join("raw-appends"), plan.bytes(RAW_BYTES))?;
    let mut subjects = vec![Subject::new(place, Engine::Threads).await?];
    let without = match Subject::new(place, Engine::Uring).await {
        Ok(subject) => {
            subjects.push(subject);
            None
        }
        Err(why) => Some(why),
    };
    let milliseconds = plan.milliseconds(1000);
    for round in 1..=plan.rounds {
        for (n, groups) in GROUPS.into_iter().enumerate() {
            let depth = groups as u64;
            let (operation, pattern) = (Operation::Write, Pattern::Random);
            let access = Access { operation, pattern, bytes: BLOCK, depth };
            let raw = raw.run(access, milliseconds, round * 7 + depth)?;
            for subject in &mut subjects {
                subject.sample(n, raw, milliseconds).await?;
            }
        }
    }
    let mut table = table(&subjects);
    if let Some(why) = without {
        table.note(format!("The other engine was not measured: {why}."));
    }
    Ok(table)
}

fn table(subjects: &[Subject]) -> Table {
    let mut table = Table::new(
        "Append and flush, 4 KiB, each group with one append under way; the floor: as many threads that overwrite 4 KiB \
         with O_DSYNC",
        &[
            "groups",
            "engine",
            "floor p50 / p99 / p99.9 µs",
            "floor per second",
            "ours p50 / p99 / p99.9 µs",
            "ours per second",
            "p50 beside the floor",
            "rate beside the floor",
            "flushes per append",
            "journal bytes per byte",
        ],
    );
    let each = (0..GROUPS.len()).flat_map(|n| subjects.iter().map(move |subject| (n, subject)));
    for (n, subject) in each {
        let samples = &subject.samples[n];
        let of = |value: &dyn Fn(&Sample) -> f64| median(samples.iter().map(value).collect());
        table.row(vec![
            GROUPS[n].to_string(),
            subject.engine.name().into(),
            micros(samples.iter().map(|sample| &sample.raw)),
            format!("{:.0}", of(&|sample| sample.raw.rate())),
            micros(samples.iter().map(|sample| &sample.ours)),
            format!("{:.0}", of(&|sample| sample.ours.rate())),
            ratio(of(&|sample| sample.ours.p50_us / sample.raw.p50_us)),
            ratio(of(&|sample| sample.ours.rate() / sample.raw.rate())),
            format!("{:.2}", of(&|sample| sample.flushes)),
            format!("{:.2}", of(&|sample| sample.bytes)),
        ]);
    }
    table
}
