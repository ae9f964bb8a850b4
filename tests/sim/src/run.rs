//! One simulation: set up, faults under load, progress while one node stays lame, everything healed, and the checks.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use holdfast_replica::messages::ReplicaReport;
use holdfast_types::{BlockIndex, BlockRange, LogIndex};

use crate::churn;
use crate::executor::{Executor, MILLISECOND, SECOND};
use crate::faults;
use crate::guests::{self, Guest, Guests};
use crate::plan::{NODES, Plan};
use crate::random::{Purpose, Random};
use crate::scenes;
use crate::trace::{self, Trace};
use crate::world::World;

/// No simulation takes longer, in virtual time.
const TIME_MAX: u64 = 500 * SECOND;
/// Every simulation takes as long, has so many operations and so many faults.
const TIME_MIN: u64 = 60 * SECOND;
const OPERATIONS_MIN: usize = 500;
const FAULTS_MIN: u64 = 3;
/// Faults go on for so much longer if there was too little of anything by then.
const CHAOS_MORE: u64 = 30 * SECOND;
/// Then guests have so long to do what is missing.
const CATCH_UP_WITHIN: u64 = 200 * SECOND;
/// How soon the volume is usable again while one node stays lame.
const PROGRESS_WITHIN: u64 = 30 * SECOND;
/// How soon the scrub has healed what is bad on a medium.
const HEALED_WITHIN: u64 = 120 * SECOND;
/// How soon all replicas are equal once everything is healed.
const CONVERGED_WITHIN: u64 = 60 * SECOND;
/// Requests that must be answered then.
const PROGRESS_REQUESTS: u64 = 20;

/// Every so many turns of the observer one of the nodes is looked into.
const LOOK_EVERY: u64 = 40;

/// What came of a simulation.
pub(crate) struct Report {
    pub(crate) seed: u64,
    pub(crate) violations: Vec<String>,
    pub(crate) marks: BTreeMap<&'static str, u64>,
    pub(crate) hash: u64,
    pub(crate) lines: u64,
    pub(crate) polls: u64,
    /// Virtual time, in nanoseconds.
    pub(crate) time: u64,
    pub(crate) operations: usize,
    pub(crate) unknown: usize,
}

/// Runs one seed; the text of the trace goes to `out` if there is one.
pub(crate) fn run(plan: Plan, out: Option<Box<dyn std::io::Write>>) -> Report {
    run_as(plan, out, direct)
}

/// Runs what `direction` does with a world, until it is done or a rule is broken.
pub(crate) fn run_as<D: Future<Output = ()> + 'static>(
    plan: Plan,
    out: Option<Box<dyn std::io::Write>>,
    direct: impl FnOnce(Rc<World>, Rc<Cell<bool>>) -> D,
) -> Report {
    let seed = plan.seed;
    let executor = Executor::new(seed, plan.fifo);
    let trace = Trace::new(executor.clone(), out);
    trace::listen(Some(trace.clone()));
    let before = holdfast_env::install(Some(executor.clone()));
    let world = World::new(plan, executor.clone(), trace.clone());
    holdfast_replica::observe::observe(Some(world.oracle.clone()));
    world.trace.add(0, format_args!("{:?}", world.plan));
    let done = Rc::new(Cell::new(false));
    let direction = direct(world.clone(), done.clone());
    world.spawn(direction);
    let stop = || done.get() || trace.has_violations();
    let watched = {
        let (executor, trace) = (executor.clone(), trace.clone());
        move || {
            for panic in executor.take_panics() {
                trace.violation(format_args!("a panic: {panic}"));
            }
        }
    };
    executor.run_until(TIME_MAX, || {
        watched();
        stop()
    });
    if !done.get() && !trace.has_violations() {
        trace.violation(format_args!("the simulation does not end"));
    }
    // A history is judged even when something else went wrong first: it may say more.
    if let Err(why) = world.history.check() {
        trace.violation(format_args!("{why}"));
    }
    let (operations, unknown) = world.history.counts();
    world.end();
    watched();
    holdfast_replica::observe::observe(None);
    holdfast_env::install(before);
    trace::listen(None);
    trace.flush();
    Report {
        seed,
        violations: trace.violations(),
        marks: trace.marks(),
        hash: trace.hash(),
        lines: trace.lines(),
        polls: executor.polls(),
        time: executor.time(),
        operations,
        unknown,
    }
}

async fn direct(world: Rc<World>, done: Rc<Cell<bool>>) {
    if !set_up(&world).await {
        return world.trace.violation(format_args!("the cluster does not come up without any fault"));
    }
    let guests = Guests::new(world.clone());
    world.spawn(observe(world.clone()));
    let stop = Rc::new(Cell::new(false));
    faults::restart_after_crash_points(&world);
    world.spawn(guests::orchestrate(guests.clone(), stop.clone()));
    world.sleep(300 * MILLISECOND).await;
    world.spawn(faults::plague(world.clone(), guests.clone(), stop.clone()));
    if world.plan.churn_every > 0 {
        world.spawn(churn::reconcile(world.clone()));
    }
    world.sleep(world.plan.chaos).await;
    let enough = || world.history.counts().0 >= OPERATIONS_MIN && world.faults.get() >= FAULTS_MIN;
    world.wait_until(CHAOS_MORE, enough).await;
    stop.set(true);
    world.seats.stopped.set(true);
    world.trace.add(0, format_args!("the faults end"));
    scenes::play(&world, &guests).await;
    let mut random = Random::new(world.plan.seed, Purpose::Faults, 2);
    if random.percent(60) && !progress_with_one_lame(&world, &guests, &mut random).await {
        return;
    }
    faults::heal_all(&world);
    let settled = || world.seats.are_settled();
    if !world.wait_until(CONVERGED_WITHIN, settled).await {
        return world.trace.violation(format_args!("a replica is not replaced: {:?}", reports(&world)));
    }
    if converge(&world, &guests).await {
        world.wait_until(TIME_MIN.saturating_sub(world.executor.time()), || false).await;
        did_enough(&world);
        done.set(true);
    }
}

/// A seed that does little shows little.
fn did_enough(world: &World) {
    let (operations, faults, time) = (world.history.counts().0, world.faults.get(), world.executor.time());
    if operations < OPERATIONS_MIN || faults < FAULTS_MIN || time < TIME_MIN {
        let seconds = time / SECOND;
        world.trace.violation(format_args!(
            "the seed does too little: {operations} operations and {faults} faults in {seconds} s"
        ));
    }
}

pub(crate) async fn set_up(world: &Rc<World>) -> bool {
    for node in world.nodes() {
        world.boot(node.number);
    }
    if !world.wait_until(10 * SECOND, || world.nodes().iter().all(|node| node.daemon().is_some())).await {
        return false;
    }
    let Some(volume) = world.node(1).volume() else { return false };
    let begun = world.run_on(1, async move { volume.group().bootstrap(&World::voters()).await });
    if !matches!(begun.await, Ok(Ok(()))) {
        return false;
    }
    world.wait_until(10 * SECOND, || world.leader().is_some()).await
}

/// Attaches by force somewhere and demands that requests are answered.
async fn demand_progress(
    world: &Rc<World>,
    guests: &Rc<Guests>,
    nodes: &[u64],
    random: &mut Random,
) -> Option<Rc<Guest>> {
    let until = world.executor.time() + PROGRESS_WITHIN;
    while world.executor.time() < until {
        let left = until - world.executor.time();
        let node = random.pick(nodes);
        if let Some(guest) = guests.start(node, true, Duration::from_nanos(left)) {
            let served = || guest.done() >= PROGRESS_REQUESTS || guest.has_ended();
            world.wait_until(left, served).await;
            if guest.done() >= PROGRESS_REQUESTS {
                return Some(guest);
            }
        }
        world.sleep(50 * MILLISECOND).await;
    }
    None
}

/// Uniform faults hide what only permanent ones show: one node stays as it is for good, and the others must go on.
async fn progress_with_one_lame(world: &Rc<World>, guests: &Rc<Guests>, random: &mut Random) -> bool {
    faults::heal_all(world);
    world.wait_until(CONVERGED_WITHIN, || world.seats.are_settled()).await;
    // Whoever was attaching must not come in between.
    world.wait_until(25 * SECOND, || guests.all().iter().all(|g| g.has_ended() || g.is_attached())).await;
    // A replica that still needs chunks while another is lost for good would be a second failure: its source may have
    // to hear of a commit before it serves any.
    world.wait_until(CONVERGED_WITHIN, || nobody_needs_chunks(world)).await;
    let lame = faults::lame_one(world, random);
    let nodes: Vec<u64> = world.nodes().iter().map(|n| n.number).filter(|n| *n != lame).collect();
    world.trace.mark("demands for progress with one node lame");
    if demand_progress(world, guests, &nodes, random).await.is_none() {
        let reports = reports(world);
        world.trace.violation(format_args!("no progress while n{lame} is lame: {reports:?}"));
        return false;
    }
    true
}

/// Whether every replica can be healed by log.
fn nobody_needs_chunks(world: &World) -> bool {
    let reports: Vec<ReplicaReport> =
        world.replicas().iter().filter_map(|node| Some(node.volume()?.group().report())).collect();
    let purged = reports.iter().map(|report| report.purged).max().unwrap_or_default();
    reports.len() == world.replicas().len() && reports.iter().all(|report| report.last_log >= purged)
}

pub(crate) fn reports(world: &World) -> Vec<(u64, Option<ReplicaReport>)> {
    let report = |node: &crate::world::Node| (node.number, node.volume().map(|v| v.group().report()));
    world.replicas().into_iter().map(report).collect()
}

/// Why the replicas are not one, if they are not.
fn unequal(world: &World) -> Option<String> {
    let mut last: Option<LogIndex> = None;
    for node in world.replicas() {
        let Some(volume) = node.volume() else { return Some(format!("n{} has no replica", node.number)) };
        let report = volume.group().report();
        if !report.fault.is_empty() {
            return Some(format!("n{}: {}", node.number, report.fault));
        }
        let same = last.is_none_or(|last| last == report.last_log);
        if report.applied < report.last_log
            || !same
            || !volume.group().position().has_reached(report.last_log)
        {
            return Some(format!("n{} is at {} of {}", node.number, report.applied, report.last_log));
        }
        last = Some(report.last_log);
    }
    None
}

/// Everything is healed: the volume is usable, nothing hangs, and all replicas are equal.
pub(crate) async fn converge(world: &Rc<World>, guests: &Rc<Guests>) -> bool {
    world.wait_until(25 * SECOND, || guests.all().iter().all(|g| g.has_ended() || g.is_attached())).await;
    let mut random = Random::new(world.plan.seed, Purpose::Faults, 3);
    let Some(guest) = demand_progress(world, guests, &[1, 2, 3, 4], &mut random).await else {
        let reports = reports(world);
        world.trace.violation(format_args!("no progress when healed: {reports:?}"));
        return false;
    };
    world
        .wait_until(CATCH_UP_WITHIN, || world.history.counts().0 >= OPERATIONS_MIN || guest.has_ended())
        .await;
    guests.set_stopped(true);
    if !world.wait_until(10 * SECOND, || !guests.all().iter().any(|guest| guest.waits())).await {
        let waiting = guests.all().into_iter().find(|guest| guest.waits());
        let who = waiting.map_or((0, false), |guest| (guest.number, guest.is_attached()));
        world.trace.violation(format_args!("requests hang, of guest {}, attached: {}", who.0, who.1));
        return false;
    }
    if !read_all(world, &guest).await {
        world.trace.violation(format_args!("the last guest cannot read everything"));
        return false;
    }
    if !world.wait_until(CONVERGED_WITHIN, || unequal(world).is_none()).await {
        let (why, reports) = (unequal(world).unwrap_or_default(), reports(world));
        world.trace.violation(format_args!("the replicas do not become one: {why}; {reports:?}"));
        return false;
    }
    compare_digests(world).await
}

/// The last guest reads every block that was ever written: what was acknowledged is there.
async fn read_all(world: &Rc<World>, guest: &Rc<Guest>) -> bool {
    let Some(session) = guest.session() else { return false };
    let (reader, node) = (world.clone(), guest.node);
    let all = world.run_on(guest.node, async move {
        let blocks = reader.history.blocks();
        let mut at = 0;
        while at < blocks.len() {
            let run = (1..64).take_while(|n| blocks.get(at + n) == Some(&(blocks[at] + *n as u64))).count();
            let range = BlockRange::new(BlockIndex(blocks[at]), 1 + run as u32);
            let id = reader.history.read(reader.at(), node, session.epoch(), range);
            let data = session.read(range).await.map_err(|error| error.to_string())?;
            reader.history.answered(reader.at(), id, &data)?;
            at += 1 + run;
        }
        Ok::<(), String>(())
    });
    let within = world.executor.sleep_for(60 * SECOND);
    match futures_util::future::select(Box::pin(all), Box::pin(within)).await {
        futures_util::future::Either::Left((Ok(Ok(())), _)) => true,
        futures_util::future::Either::Left((Ok(Err(why)), _)) => {
            world.trace.violation(format_args!("the last reads: {why}"));
            false
        }
        _ => false,
    }
}

/// The digest of every replica's content; what is bad on a medium is healed by the scrub before.
async fn compare_digests(world: &Rc<World>) -> bool {
    let until = world.executor.time() + HEALED_WITHIN;
    let digests = loop {
        let Some(digests) = digests(world).await else { return false };
        let bad = digests.iter().find(|(_, _, bad_blocks)| *bad_blocks > 0);
        let Some((number, _, bad)) = bad else { break digests };
        if world.executor.time() > until {
            world.trace.violation(format_args!("n{number} still has {bad} bad blocks"));
            return false;
        }
        world.trace.mark("bad blocks at the end that the scrub heals");
        world.sleep(5 * SECOND).await;
    };
    world.trace.add(0, format_args!("digests {digests:?}"));
    if digests.iter().any(|(_, digest, _)| *digest != digests[0].1) {
        let differences = differences(world).await;
        world.trace.violation(format_args!("the replicas are not equal: {digests:?}\n{differences}"));
        return false;
    }
    true
}

/// Of every voter: its node, its digest, and blocks that cannot be read.
async fn digests(world: &Rc<World>) -> Option<Vec<(u64, String, u64)>> {
    let mut digests = Vec::new();
    for (_, number) in world.seats.voters() {
        let volume = world.node(number).volume()?;
        let digest = world.run_on(number, async move { volume.data().digest().await });
        match digest.await {
            Ok(Ok(digest)) => digests.push((number, digest.to_string(), digest.bad_blocks)),
            other => {
                world.trace.violation(format_args!("n{number} has no digest: {other:?}"));
                return None;
            }
        }
    }
    Some(digests)
}

/// The first blocks in which replicas differ, with the stamp that each holds and who wrote it.
async fn differences(world: &Rc<World>) -> String {
    let mut out = Vec::new();
    for block in world.history.blocks() {
        let mut stamps = Vec::new();
        for (_, number) in world.seats.voters() {
            let Some(volume) = world.node(number).volume() else { continue };
            let range = BlockRange::new(BlockIndex(block), 1);
            let read = world.run_on(number, async move { volume.data().read(range).await });
            stamps.push(match read.await {
                Ok(Ok(data)) => crate::history::stamp_of(&data),
                _ => u64::MAX,
            });
        }
        if stamps.iter().any(|stamp| *stamp != stamps[0]) {
            let who: Vec<String> = stamps.iter().map(|stamp| world.history.who_wrote(*stamp)).collect();
            out.push(format!("  block {block}: {}", who.join(" | ")));
        }
    }
    let count = out.len();
    out.truncate(6);
    format!("  {count} blocks differ\n{}", out.join("\n"))
}

/// What an observer knows of a node.
#[derive(Default)]
struct Seen {
    term: u64,
    purged: LogIndex,
    checkpoint: LogIndex,
    healed: u64,
    rests: u64,
    wakes: u64,
}

/// Watches all replicas: two that have applied the same index must be in the same state, and no replica stops by itself.
/// Counts what is covered. (A term may have two leaders: a later one with a higher id outranks the first.)
pub(crate) async fn observe(world: Rc<World>) {
    let states: RefCell<BTreeMap<u64, (u64, String)>> = RefCell::default();
    let mut leaders: BTreeSet<(u64, u64)> = BTreeSet::new();
    let mut seen: BTreeMap<u64, Seen> = BTreeMap::new();
    let mut turn: u64 = 0;
    loop {
        world.sleep(20 * MILLISECOND).await;
        turn += 1;
        if turn.is_multiple_of(LOOK_EVERY) {
            world.node(1 + turn / LOOK_EVERY % NODES).look_due.set(true);
        }
        for node in world.nodes() {
            let Some(volume) = node.volume().filter(|_| !node.is_paused()) else { continue };
            if node.look_due.get() && world.look_at(node.number, turn) {
                node.look_due.set(false);
            }
            compare_states(&world, node.number, &volume, &mut states.borrow_mut());
            if let Some((term, _)) = volume.group().leading_since()
                && leaders.insert((term.0, node.number))
            {
                world.trace.mark("leaders");
            }
            note(
                &world,
                node.number,
                seen.entry(node.number).or_default(),
                &volume.group().report(),
                &volume,
            );
        }
    }
}

fn compare_states(
    world: &World,
    number: u64,
    volume: &holdfast_replica::Volume,
    states: &mut BTreeMap<u64, (u64, String)>,
) {
    let Some(applied) = volume.group().position().applied() else { return };
    let state = format!("{applied:?} {:?}", volume.state());
    let (other, known) = states.entry(applied.index.0).or_insert_with(|| (number, state.clone()));
    if *known != state {
        world.trace.violation(format_args!(
            "n{number} and n{other} have diverged at index {}: {state}, {known}",
            applied.index
        ));
    }
    while states.len() > 4096 {
        states.pop_first();
    }
}

fn note(
    world: &World,
    node: u64,
    seen: &mut Seen,
    report: &ReplicaReport,
    volume: &holdfast_replica::Volume,
) {
    let has_failed = world.node(node).disk.has_failed.get();
    if report.term.0 > seen.term {
        seen.term = report.term.0;
        world.trace.mark("new terms seen");
    }
    if report.purged > seen.purged {
        world.trace.mark("purges");
    }
    if report.checkpoint > seen.checkpoint {
        world.trace.mark("checkpoints");
    }
    (seen.purged, seen.checkpoint) = (report.purged, report.checkpoint);
    let healed = volume.healed_by_chunks();
    if healed > 0 && healed != seen.healed {
        world.trace.mark("rebuilds by chunks");
        world.node(node).look_due.set(true);
    }
    seen.healed = healed;
    note_rest(world, node, seen, volume);
    if !report.fault.is_empty() && !has_failed {
        world.trace.violation(format_args!("replica {} has stopped: {}", report.replica, report.fault));
    }
}

/// INV-REST: a volume that somebody holds does not rest, as far as its replica has applied.
fn note_rest(world: &World, node: u64, seen: &mut Seen, volume: &holdfast_replica::Volume) {
    let (group, usage) = (volume.group(), volume.group().usage());
    if group.is_resting() && volume.state().holder().is_some() {
        world.trace.violation(format_args!("n{node} rests while somebody holds the volume"));
    }
    if usage.rests > seen.rests {
        world.trace.mark(if group.is_leader() { "leaders that rest" } else { "followers that rest" });
    }
    if usage.wakes > seen.wakes {
        world.trace.mark("replicas that woke");
    }
    (seen.rests, seen.wakes) = (usage.rests, usage.wakes);
}
