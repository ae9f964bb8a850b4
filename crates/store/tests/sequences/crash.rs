//! One sequence, stopped at every moment, and what is left of it.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::rc::Rc;

use futures_util::future::{Either, select};
use holdfast_store::testing::{Fault, Left, MemoryDisk, simulate};

use crate::model::Model;
use crate::ops::Op;
use crate::start::Start;
use crate::world::{IDLE, Observed, World};

/// Above so many operations that are not flushed, only one of them at a time is special.
const SUBSETS_MAX: usize = 4;
/// Of longer sequences than this a recovery is stopped at one moment, not at every one.
const EVERY_RECOVERY_UP_TO: usize = 1;

/// How much was tried.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tried {
    pub sequences: u64,
    pub moments: u64,
    /// Different contents of the medium.
    pub states: u64,
    pub recoveries: u64,
}

impl Tried {
    pub fn add(&mut self, other: Self) {
        self.sequences += other.sequences;
        self.moments += other.moments;
        self.states += other.states;
        self.recoveries += other.recoveries;
    }
}

impl fmt::Display for Tried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { sequences, moments, states, recoveries } = self;
        write!(
            f,
            "{sequences} sequences, {moments} moments, {states} states of the medium, {recoveries} recoveries"
        )
    }
}

/// A sequence that was played.
struct Played {
    disk: MemoryDisk,
    model: Rc<Model>,
    /// Operations of the disk when the last operation began, and at the end.
    from: u64,
    end: u64,
}

/// Plays a sequence until it has ended or the world stops.
fn play(start: &Start, sequence: &[Op], stop: Option<u64>) -> Result<Played, String> {
    let disk = MemoryDisk::from_image(&start.image, 3);
    let model = Rc::new(start.model());
    let from = Cell::new(0);
    if let Some(stop) = stop {
        disk.at(stop, Fault::Freeze);
    }
    let life = async {
        let world = World::recover(disk.directory(), &model).await?;
        for (n, op) in sequence.iter().enumerate() {
            if n + 1 == sequence.len() {
                from.set(disk.operations());
            }
            world.play(*op).await;
        }
        world.settle().await;
        holdfast_env::sleep(IDLE).await;
        world.check().await
    };
    let result = simulate(4, async {
        match select(Box::pin(life), Box::pin(disk.frozen())).await {
            Either::Left((result, _)) => result,
            Either::Right(_) => Ok(()),
        }
    });
    result.map_err(|why| format!("without a crash: {why}"))?;
    let end = disk.operations();
    Ok(Played { disk, model, from: from.get(), end })
}

/// Every way in which `count` operations that are not flushed may be left: of up to two all combinations; of up to four
/// every subset whole, and one torn while the others are all kept or all lost; of more, one at a time.
fn ways(count: usize) -> Vec<Vec<Left>> {
    let whole = [Left::Nothing, Left::Everything];
    let torn = [Left::Front, Left::Back, Left::Ends];
    let any = [whole.as_slice(), torn.as_slice()].concat();
    if count <= 2 {
        let combination = |n: usize| (0..count).map(|at| any[n / 5usize.pow(at as u32) % 5]).collect();
        return (0..5usize.pow(count as u32)).map(combination).collect();
    }
    let mut out: Vec<Vec<Left>> = any.iter().map(|left| vec![*left; count]).collect();
    if count <= SUBSETS_MAX {
        let subset = |bits: usize| (0..count).map(|n| whole[(bits >> n) & 1]).collect::<Vec<_>>();
        out.extend((1..(1 << count) - 1).map(subset));
    }
    for one in 0..count {
        for (others, left) in whole.iter().flat_map(|others| any.iter().map(move |left| (others, left))) {
            let mut way = vec![*others; count];
            way[one] = *left;
            out.push(way);
        }
    }
    out
}

/// Recovers, checks everything, and lets what recovery writes down reach the medium; `None` if the world stopped.
fn recover(disk: &MemoryDisk, model: &Rc<Model>) -> Result<Option<Observed>, String> {
    let life = async {
        let world = World::recover(disk.directory(), model).await?;
        world.check().await?;
        holdfast_env::sleep(IDLE).await;
        world.observe().await
    };
    simulate(5, async {
        match select(Box::pin(life), Box::pin(disk.frozen())).await {
            Either::Left((result, _)) => result.map(Some),
            Either::Right(_) => Ok(None),
        }
    })
}

/// The replica goes on after a recovery, and its next start finds that, too.
fn go_on(disk: &MemoryDisk, model: &Rc<Model>, ops: &[Op]) -> Result<(), String> {
    let later = simulate(6, async {
        let world = World::recover(disk.directory(), model).await?;
        holdfast_env::sleep(IDLE).await;
        world.rebase().await?;
        for op in ops {
            world.play(*op).await;
        }
        world.settle().await;
        world.check().await?;
        world.check_merged()?;
        Ok::<_, String>(world.model())
    })?;
    disk.power_cut_leaving(|_| Left::Nothing, false);
    recover(disk, &later).map(drop)
}

/// One state of the medium, of which a start must make the same every time.
fn check_state(disk: &MemoryDisk, model: &Rc<Model>, length: usize, then: &[Op]) -> Result<u64, String> {
    // What is in the cache only may be lost until a start has ended.
    let is_settled = disk.unflushed().is_empty();
    let mark = disk.fingerprint();
    let (before, begin) = (disk.copy(), disk.operations());
    let first = recover(disk, model)?;
    let end = disk.operations();
    let mut recoveries = 1;
    disk.power_cut_leaving(|_| Left::Nothing, false);
    let second = recover(disk, model).map_err(|why| format!("recovered again: {why}"))?;
    if first != second {
        return Err(format!("a recovery found {first:?}, the next one {second:?}"));
    }
    recoveries += 1;
    let all: Vec<u64> = (begin..end).collect();
    let one = [begin + u64::from(mark) % (end - begin)];
    let stops = if length <= EVERY_RECOVERY_UP_TO { &all[..] } else { &one[..] };
    for (stop, left) in stops.iter().flat_map(|stop| [(stop, Left::Nothing), (stop, Left::Everything)]) {
        let disk = before.copy();
        disk.at(*stop, Fault::Freeze);
        let wrap = |why| format!("its recovery was stopped at {stop}, {left:?}: {why}");
        recover(&disk, model).map_err(wrap)?;
        disk.power_cut_leaving(|_| left, false);
        let again = recover(&disk, model).map_err(wrap)?;
        if again != first && is_settled {
            return Err(wrap(format!("it finds {again:?}, not {first:?}")));
        }
        recoveries += 2;
    }
    if length <= EVERY_RECOVERY_UP_TO || mark.is_multiple_of(4) {
        go_on(disk, model, then).map_err(|why| format!("goes on: {why}"))?;
        recoveries += 2;
    }
    Ok(recoveries)
}

/// Every moment from the begin of the last operation on; those before are of shorter sequences.
pub fn every_crash(start: &Start, sequence: &[Op]) -> Result<Tried, String> {
    let whole = play(start, sequence, None)?;
    let mut tried = Tried { sequences: 1, ..Tried::default() };
    let mut seen = BTreeSet::new();
    for stop in (whole.from..whole.end).map(Some).chain([None]) {
        let stopped = play(start, sequence, stop)?;
        tried.moments += 1;
        let unflushed = stopped.disk.unflushed();
        let names: &[bool] = if stopped.disk.has_unsynced_names() { &[false, true] } else { &[false] };
        let ways = ways(unflushed.len());
        let cuts = ways.iter().flat_map(|way| names.iter().map(move |keep| Some((way, *keep))));
        // `None` is a kill: everything stays in the cache, and the next process reads it.
        for cut in cuts.chain([None]) {
            let disk = stopped.disk.copy();
            if let Some((way, keep_names)) = cut {
                let left: BTreeMap<u64, Left> = unflushed.iter().copied().zip(way.iter().copied()).collect();
                disk.power_cut_leaving(|operation| left[&operation], keep_names);
                if !seen.insert((disk.fingerprint(), stopped.model.acknowledged())) {
                    continue;
                }
            }
            tried.states += 1;
            let why = |why| format!("stopped at {stop:?}, left of {unflushed:?} is {cut:?}: {why}");
            tried.recoveries +=
                check_state(&disk, &stopped.model, sequence.len(), start.go_on).map_err(why)?;
        }
    }
    Ok(tried)
}
