//! Faults, drawn from the seed: each begins, lasts a while and is undone.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use holdfast_env::net::Lane;
use holdfast_types::ReplicaId;

use crate::executor::{MILLISECOND, SECOND};
use crate::guests::{Come, Guest, Guests};
use crate::hooks::CRASH_POINTS;
use crate::plan::{Fault, NODES};
use crate::random::{Purpose, Random};
use crate::world::World;

/// Makes faults until `stop`.
pub(crate) async fn plague(world: Rc<World>, guests: Rc<Guests>, stop: Rc<Cell<bool>>) {
    let random = Random::new(world.plan.seed, Purpose::Faults, 0);
    let mut plague = Plague { world: world.clone(), guests, random, stop: stop.clone() };
    if world.plan.faults.is_empty() {
        return;
    }
    // Storms and calms: without calms nothing that takes a while would ever be seen.
    let mut calm_at = world.executor.time() + plague.random.range(4, 15) * SECOND;
    while !stop.get() {
        let mut pause = 20 * MILLISECOND + plague.random.around(world.plan.fault_every);
        if world.executor.time() > calm_at {
            pause += plague.random.range(2, 6) * SECOND;
            calm_at = world.executor.time() + plague.random.range(4, 15) * SECOND;
        }
        world.sleep(pause).await;
        if stop.get() {
            return;
        }
        if world.executor.time() < world.calm_until.get() {
            continue;
        }
        let fault = plague.random.pick(&world.plan.faults);
        plague.begin(fault);
    }
}

struct Plague {
    world: Rc<World>,
    guests: Rc<Guests>,
    random: Random,
    stop: Rc<Cell<bool>>,
}

impl Plague {
    /// A node that matters: often the leader's, or that of the guest.
    fn victim(&mut self) -> u64 {
        let chosen = match self.random.below(10) {
            0..=3 => self.world.leader(),
            4..=5 => self.guests.holder().map(|guest| guest.node),
            _ => None,
        };
        chosen.unwrap_or_else(|| 1 + self.random.below(NODES))
    }

    fn replica(&mut self) -> u64 {
        let leader = if self.random.percent(50) { self.world.leader() } else { None };
        leader.unwrap_or_else(|| 1 + self.random.below(NODES))
    }

    fn lasts(&mut self) -> u64 {
        20 * MILLISECOND + self.random.below(self.world.plan.fault_max)
    }

    fn restart_after(&mut self) -> u64 {
        if self.random.percent(self.world.plan.quick_restarts) {
            self.random.range(1, 150) * MILLISECOND
        } else {
            self.lasts()
        }
    }

    fn later(&self, after: u64, then: impl FnOnce(&Rc<World>) + 'static) {
        let (world, stop) = (self.world.clone(), self.stop.clone());
        self.world.spawn(async move {
            world.sleep(after).await;
            // Once the faults have ended, everything was undone at once, and what is made then is not of here.
            if !stop.get() {
                then(&world);
            }
        });
    }

    fn begin(&mut self, fault: Fault) {
        let world = self.world.clone();
        world.faults.set(world.faults.get() + 1);
        match fault {
            Fault::PowerCut => {
                let (victim, mode) = (self.victim(), self.random.pick(&world.plan.cut_modes));
                let after = self.restart_after();
                world.cut_power(victim, mode);
                self.later(after, move |world| world.boot(victim));
            }
            Fault::Kill => {
                let (victim, after) = (self.victim(), self.restart_after());
                let before = self.guests.attached_on(victim);
                world.kill(victim);
                let before = before.filter(|_| self.random.percent(world.plan.resumes));
                let guests = self.guests.clone();
                if before.is_some() {
                    guests.expected_until.set(world.executor.time() + after + 2 * SECOND);
                }
                self.later(after, move |world| {
                    world.boot(victim);
                    if let Some(before) = before {
                        world.spawn(resume(world.clone(), guests, before));
                    }
                });
            }
            Fault::PowerCutAll => {
                let mode = self.random.pick(&world.plan.cut_modes);
                world.trace.mark("power cuts of all");
                for victim in 1..=NODES {
                    world.cut_power(victim, mode);
                    let after = self.restart_after();
                    self.later(after, move |world| world.boot(victim));
                }
            }
            Fault::CrashPoint => {
                let (victim, point) = (self.replica(), self.random.pick(&CRASH_POINTS));
                world.trace.add(victim, format_args!("armed: {point:?}"));
                world.hooks.arm(victim, point);
            }
            Fault::Partition | Fault::OneWay | Fault::CutPair => self.cut(fault),
            Fault::Break => {
                let (one, other) = (self.victim(), 1 + self.random.below(NODES));
                world.network.break_between(one, other);
            }
            Fault::Delay => {
                let usual = world.network.delays();
                let slow = crate::network::Delays { mean: self.random.range(2, 40) * MILLISECOND, ..usual };
                world.trace.add(0, format_args!("DELAY {} ms", slow.mean / MILLISECOND));
                world.network.set_delays(slow);
                let after = self.lasts();
                self.later(after, |world| world.network.set_delays(world.plan.delays));
            }
            Fault::SlowDisk => {
                let (victim, slowness) = (self.replica(), self.random.range(1, 60) * MILLISECOND);
                world.trace.add(victim, format_args!("SLOW DISK {} ms", slowness / MILLISECOND));
                world.node(victim).disk.slowness.set(slowness);
                let after = self.lasts();
                self.later(after, move |world| world.node(victim).disk.slowness.set(0));
            }
            Fault::StalledDisk => {
                let (victim, lasts) = (self.replica(), self.lasts());
                world.trace.add(victim, format_args!("STALLED DISK {} ms", lasts / MILLISECOND));
                world.node(victim).disk.stalled_until.set(world.executor.time() + lasts);
            }
            Fault::Pause => {
                let (victim, lasts) = (self.victim(), self.lasts());
                world.set_paused(victim, true);
                self.later(lasts, move |world| world.set_paused(victim, false));
            }
            Fault::Transfer => self.transfer(),
            Fault::Steal => self.steal(),
            Fault::Straggle => self.straggle(),
            Fault::BadMedium => self.spoil(),
            Fault::FailedWrite => self.fail_a_write(),
        }
    }

    fn cut(&mut self, fault: Fault) {
        let world = self.world.clone();
        let (victim, how, lasts) = (self.victim(), self.random.pick(&world.plan.cuts), self.lasts());
        let others = || (1..=NODES).filter(move |other| *other != victim);
        let ways: Vec<(u64, u64)> = match fault {
            Fault::Partition => others().flat_map(|other| [(victim, other), (other, victim)]).collect(),
            // It can send but not hear, or hear but not send.
            Fault::OneWay if self.random.percent(50) => others().map(|other| (other, victim)).collect(),
            Fault::OneWay => others().map(|other| (victim, other)).collect(),
            _ => {
                let other = 1 + (victim + self.random.below(NODES - 1)) % NODES;
                vec![(victim, other), (other, victim)]
            }
        };
        world.trace.mark("cuts");
        for (from, to) in &ways {
            world.network.cut(*from, *to, how);
        }
        self.later(lasts, move |world| ways.iter().for_each(|(from, to)| world.network.heal(*from, *to)));
    }

    /// The holder does not hear that it has lost the volume: it goes on writing and reading, and what it has sent may
    /// arrive much later.
    fn steal(&mut self) {
        let world = self.world.clone();
        let Some(holder) = self.guests.holder() else { return };
        let (victim, how, lasts) = (holder.node, self.random.pick(&world.plan.cuts), self.lasts());
        let others: Vec<u64> = (1..=NODES).filter(|other| *other != victim).collect();
        match self.random.below(4) {
            0 => {
                world.set_paused(victim, true);
                self.later(lasts, move |world| world.set_paused(victim, false));
            }
            kind => {
                let mut ways = Vec::new();
                if kind != 1 {
                    ways.extend(others.iter().map(|other| (*other, victim)));
                }
                if kind != 2 {
                    ways.extend(others.iter().map(|other| (victim, *other)));
                }
                ways.iter().for_each(|(from, to)| world.network.cut(*from, *to, how));
                let heal = move |world: &Rc<World>| ways.iter().for_each(|(a, b)| world.network.heal(*a, *b));
                self.later(lasts, heal);
            }
        }
        world.trace.mark("volumes taken from who does not hear of it");
        let (taker, guests) = (self.random.pick(&others), self.guests.clone());
        let (after, patience) = (self.random.below(300) * MILLISECOND, self.random.range(2, 20));
        self.later(after, move |_| drop(guests.start(taker, true, Duration::from_secs(patience))));
    }

    /// Something is wrong with one node's medium.
    fn spoil(&mut self) {
        let disk = &self.world.node(self.world.plan.bad_medium).disk;
        match self.random.below(3) {
            0 => disk.misdirect_next.set(true),
            1 => disk.fail_reads.set(disk.fail_reads.get() + self.random.range(1, 4)),
            _ => {
                let count = self.random.range(1, 5);
                for _ in 0..count {
                    if disk.rot(&mut self.random) {
                        self.world.trace.mark("bits that rotted");
                    }
                }
            }
        }
    }

    /// A store that cannot be written stops; whoever looks after the daemon starts it again.
    fn fail_a_write(&mut self) {
        let (world, victim) = (self.world.clone(), self.replica());
        let (after, cut) = (self.lasts().min(2 * SECOND), self.random.percent(40));
        let mode = self.random.pick(&world.plan.cut_modes);
        world.trace.add(victim, format_args!("the next write FAILS"));
        world.node(victim).disk.fail_next.set(true);
        self.later(after, move |world| {
            if !world.node(victim).disk.has_failed.get() {
                return;
            }
            if cut {
                world.cut_power(victim, mode)
            } else {
                world.kill(victim)
            }
            world.boot(victim);
        });
    }

    /// What the holder has sent to the leader is on its way while the leadership goes to another, and arrives when it
    /// has come back: long after it was sent again, and answered, elsewhere.
    fn straggle(&mut self) {
        let world = self.world.clone();
        let (Some(holder), Some(leader)) = (self.guests.holder(), world.leader()) else { return };
        if holder.node == leader {
            return;
        }
        let others: Vec<ReplicaId> =
            world.seats.voters().into_iter().filter(|(_, node)| *node != leader).map(|(id, _)| id).collect();
        let Some(volume) = world.node(leader).volume() else { return };
        let (own, to) = (volume.group().id().replica, self.random.pick(&others));
        let (goes, back, heals) = (
            self.random.below(200) * MILLISECOND,
            self.random.range(100, 2500) * MILLISECOND,
            self.random.range(10, 600) * MILLISECOND,
        );
        let way = (holder.node, leader);
        world.trace.mark("requests that straggle");
        world.network.hold(way, Lane::Bulk, true);
        let stop = self.stop.clone();
        world.clone().spawn(async move {
            world.sleep(goes).await;
            transfer_to(&world, to);
            world.sleep(back).await;
            if !stop.get() {
                transfer_to(&world, own);
            }
            world.sleep(heals).await;
            world.network.hold(way, Lane::Bulk, false);
        });
    }

    /// The leadership is given to another replica, as the product does when the attachment moves.
    fn transfer(&mut self) {
        let voters = self.world.seats.voters();
        let to = voters[self.random.below(voters.len() as u64) as usize].0;
        transfer_to(&self.world, to);
    }
}

/// Whoever leads is asked to give the leadership to `to`.
fn transfer_to(world: &Rc<World>, to: ReplicaId) {
    let Some(leader) = world.leader() else { return };
    let Some(volume) = world.node(leader).volume() else { return };
    let trace = world.trace.clone();
    trace.add(leader, format_args!("transfers to replica {to}"));
    drop(world.run_on(leader, async move {
        if volume.group().transfer_to(to).await.is_ok() {
            trace.mark("transfers of leadership");
        }
    }));
}

/// A daemon that has started again takes over what it held, with the requests that the kernel still waits for.
async fn resume(world: Rc<World>, guests: Rc<Guests>, before: Rc<Guest>) {
    let node = before.node;
    if world.wait_until(5 * SECOND, || world.node(node).daemon().is_some()).await {
        drop(guests.come(node, Come::Resume(before), Duration::from_secs(10)));
    }
}

/// Restarts what a crash point has stopped.
pub(crate) fn restart_after_crash_points(world: &Rc<World>) {
    let random = std::cell::RefCell::new(Random::new(world.plan.seed, Purpose::Faults, 1));
    let weak = Rc::downgrade(world);
    world.hooks.set_on_crash(Some(Rc::new(move |node| {
        let Some(world) = weak.upgrade() else { return };
        let mut random = random.borrow_mut();
        let mode = random.pick(&world.plan.cut_modes);
        let quick = random.percent(world.plan.quick_restarts);
        let after = if quick { random.range(1, 150) } else { random.range(150, 3000) } * MILLISECOND;
        world.cut_power(node, mode);
        let again = world.clone();
        world.spawn(async move {
            again.sleep(after).await;
            again.boot(node);
        });
    })));
}

/// Everything is undone: nodes run, links carry, disks are quick.
pub(crate) fn heal_all(world: &Rc<World>) {
    world.hooks.disarm_all();
    world.network.heal_all();
    world.network.set_delays(world.plan.delays);
    for node in world.nodes() {
        node.disk.heal();
        if node.disk.has_failed.get() {
            world.kill(node.number);
        }
        world.set_paused(node.number, false);
        world.boot(node.number);
    }
}

/// The one node outside the core that must make progress: its fault is for good.
pub(crate) fn lame_one(world: &Rc<World>, random: &mut Random) -> u64 {
    let leader = if random.percent(70) { world.leader() } else { None };
    let voters = world.seats.voters();
    // What rotted there may stand whole on the others only: no second failure.
    let bad = world.plan.faults.contains(&Fault::BadMedium).then_some(world.plan.bad_medium);
    let bad = bad.filter(|bad| voters.iter().any(|(_, node)| node == bad));
    let lame = bad.or(leader).unwrap_or_else(|| voters[random.below(voters.len() as u64) as usize].1);
    let others = (1..=NODES).filter(|other| *other != lame);
    let kind = random.below(6);
    world.trace.add(lame, format_args!("LAME for good: {kind}"));
    for other in others {
        if kind == 0 || kind == 1 {
            world.network.cut(other, lame, crate::network::Cut::Swallow);
        }
        if kind == 0 || kind == 2 {
            world.network.cut(lame, other, crate::network::Cut::Swallow);
        }
    }
    match kind {
        3 => world.kill(lame),
        4 => world.set_paused(lame, true),
        5 => world.node(lame).disk.stalled_until.set(world.executor.time() + 3600 * SECOND),
        _ => {}
    }
    lame
}
