//! What one seed does: every dial is drawn from it, and most kinds of faults are switched off in most seeds, because
//! a little of everything hides what much of a few things shows.

use std::time::Duration;

use holdfast_replica::Timers;

use crate::disk::CutMode;
use crate::executor::{MICROSECOND, MILLISECOND, SECOND};
use crate::network::{Cut, Delays};
use crate::random::{Purpose, Random};

/// Nodes with a replica; one more has none.
pub(crate) const REPLICAS: u64 = 3;
pub(crate) const NODES: u64 = 4;

/// A kind of fault.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Fault {
    PowerCut,
    Kill,
    PowerCutAll,
    CrashPoint,
    Partition,
    OneWay,
    CutPair,
    Break,
    Delay,
    SlowDisk,
    StalledDisk,
    Pause,
    Transfer,
    /// The holder is cut off or stopped, and the volume is attached elsewhere by force.
    Steal,
    /// A request is held back while the leadership goes away and comes back.
    Straggle,
    /// Of one node alone, so that a majority of the copies of everything stays whole: its medium rots, its reads fail,
    /// its writes go astray.
    BadMedium,
    /// A write or flush of one node fails: its store stops, and its daemon is started again.
    FailedWrite,
}

pub(crate) const FAULTS: [Fault; 17] = [
    Fault::PowerCut,
    Fault::Kill,
    Fault::PowerCutAll,
    Fault::CrashPoint,
    Fault::Partition,
    Fault::OneWay,
    Fault::CutPair,
    Fault::Break,
    Fault::Delay,
    Fault::SlowDisk,
    Fault::StalledDisk,
    Fault::Pause,
    Fault::Transfer,
    Fault::Steal,
    Fault::Straggle,
    Fault::BadMedium,
    Fault::FailedWrite,
];

/// What guests do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    /// Requests of one guest at once.
    pub(crate) workers: u64,
    /// Mean pause between requests of a worker, in nanoseconds.
    pub(crate) think: u64,
    /// Blocks that are used, spread over the volume.
    pub(crate) blocks: u64,
    /// Largest request, in blocks.
    pub(crate) run_max: u64,
    /// Of a hundred requests: reads, trims and zeroes; the rest are writes.
    pub(crate) reads: u64,
    pub(crate) clears: u64,
}

/// The dials of one seed.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    /// Ready tasks are polled in order, or in an order drawn from the seed.
    pub(crate) fifo: bool,
    pub(crate) timers: Timers,
    pub(crate) segments: u32,
    pub(crate) volume_bytes: u64,
    pub(crate) load: Load,
    pub(crate) delays: Delays,
    pub(crate) disk_mean: u64,
    /// How much faster each node's clock runs, in millionths.
    pub(crate) drift_ppm: Vec<i64>,
    pub(crate) faults: Vec<Fault>,
    /// Mean time between faults, in nanoseconds.
    pub(crate) fault_every: u64,
    /// How long a fault lasts at most, in nanoseconds.
    pub(crate) fault_max: u64,
    /// Of a hundred restarts, those that follow within moments.
    pub(crate) quick_restarts: u64,
    pub(crate) cut_modes: Vec<CutMode>,
    pub(crate) cuts: Vec<Cut>,
    /// Mean time between changes of the attachment, in nanoseconds.
    pub(crate) move_every: u64,
    /// Of a hundred changes, those by force.
    pub(crate) forced: u64,
    /// Of a hundred changes, those that two nodes try at once.
    pub(crate) rivals: u64,
    /// Of a hundred killed daemons that held the volume, those that take it over when they start again.
    pub(crate) resumes: u64,
    /// Mean time between replacements of replicas, in nanoseconds; 0 is none.
    pub(crate) churn_every: u64,
    /// The node whose medium is bad, where one is.
    pub(crate) bad_medium: u64,
    /// How long faults go on, at least.
    pub(crate) chaos: u64,
    /// Detaches at most after which nobody attaches for so long that the volume's group rests.
    pub(crate) breaks: u64,
}

fn timers(random: &mut Random) -> Timers {
    let scale = random.pick(&[1, 1, 1, 2]);
    let usual = Timers::default();
    Timers {
        heartbeat: usual.heartbeat * scale,
        election_min: usual.election_min * scale,
        election_max: usual.election_max * scale,
        session_lease: Duration::from_millis(random.pick(&[600, 1000, 2000])).max(usual.election_max * scale),
    }
}

impl Plan {
    pub(crate) fn draw(seed: u64) -> Self {
        let mut random = Random::new(seed, Purpose::Plan, 0);
        // Heavy seeds fill the journal: purges, rebuilds by chunks. The others have many small requests.
        let heavy = random.percent(40);
        let load = Load {
            workers: random.range(1, 7),
            think: if heavy { random.range(15, 90) } else { random.range(5, 90) } * MILLISECOND,
            blocks: if heavy { random.range(512, 2048) } else { random.pick(&[4, 16, 64, 512]) },
            run_max: if heavy { random.range(32, 257) } else { random.range(1, 9) },
            reads: random.range(20, 60),
            clears: random.range(0, 15),
        };
        let delays = Delays {
            mean: random.pick(&[100 * MICROSECOND, 300 * MICROSECOND, MILLISECOND, 3 * MILLISECOND]),
            spike_one_in: random.pick(&[0, 0, 20, 100]),
            spike: random.range(5, 100) * MILLISECOND,
            per_byte: random.range(1, 10),
        };
        let drifts = random.percent(50);
        let drift_ppm =
            (0..NODES).map(|_| if drifts { random.below(20_001) as i64 - 10_000 } else { 0 }).collect();
        let mut faults: Vec<Fault> = FAULTS.into_iter().filter(|_| random.percent(40)).collect();
        if random.percent(50) {
            faults.push(Fault::PowerCut);
        }
        if random.percent(50) || faults.len() < 2 {
            faults.push(Fault::CrashPoint);
        }
        if faults.len() < 3 {
            faults.push(Fault::Partition);
        }
        Self {
            seed,
            fifo: random.percent(30),
            timers: timers(&mut random),
            segments: random.range(8, 13) as u32,
            volume_bytes: 16 << 20,
            load,
            delays,
            disk_mean: random.pick(&[50 * MICROSECOND, 200 * MICROSECOND, MILLISECOND, 4 * MILLISECOND]),
            drift_ppm,
            faults,
            fault_every: random.pick(&[150, 400, 1000, 2500]) * MILLISECOND,
            fault_max: random.pick(&[300, 1500, 4000, 8000]) * MILLISECOND,
            quick_restarts: random.pick(&[20, 60, 90]),
            cut_modes: vec![
                random.pick(&[CutMode::Discard, CutMode::Tear]),
                random.pick(&[CutMode::Discard, CutMode::Tear, CutMode::Keep]),
            ],
            cuts: random.pick(&[&[Cut::Swallow][..], &[Cut::Hold], &[Cut::Swallow, Cut::Hold]]).to_vec(),
            move_every: random.pick(&[400, 1500, 4000]) * MILLISECOND,
            forced: random.pick(&[30, 60, 90]),
            rivals: random.pick(&[10, 40, 80]),
            resumes: random.pick(&[0, 60, 95]),
            churn_every: random.pick(&[0, 0, 2, 6]) * SECOND,
            bad_medium: random.range(1, NODES + 1),
            chaos: random.range(48, 56) * SECOND,
            breaks: random.pick(&[0, 0, 1, 2]),
        }
    }
}
