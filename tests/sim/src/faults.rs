//! Faults, drawn from the seed: each begins, lasts a while and is undone.

use std::cell::Cell;
use std::rc::Rc;

use holdfast_types::ReplicaId;

use crate::executor::{MILLISECOND, SECOND};
use crate::guests::Guests;
use crate::hooks::CRASH_POINTS;
use crate::plan::{Fault, NODES, REPLICAS};
use crate::random::{Purpose, Random};
use crate::world::World;

/// Makes faults until `stop`.
pub(crate) async fn plague(world: Rc<World>, guests: Rc<Guests>, stop: Rc<Cell<bool>>) {
    let random = Random::new(world.plan.seed, Purpose::Faults, 0);
    let mut plague = Plague { world: world.clone(), guests, random, stop: stop.clone() };
    if world.plan.faults.is_empty() {
        return;
    }
    while !stop.get() {
        let pause = 20 * MILLISECOND + plague.random.around(world.plan.fault_every);
        world.sleep(pause).await;
        if stop.get() {
            return;
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
        leader.unwrap_or_else(|| 1 + self.random.below(REPLICAS))
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
        match fault {
            Fault::PowerCut => {
                let (victim, mode) = (self.victim(), self.random.pick(&world.plan.cut_modes));
                let after = self.restart_after();
                world.cut_power(victim, mode);
                self.later(after, move |world| world.boot(victim));
            }
            Fault::Kill => {
                let (victim, after) = (self.victim(), self.restart_after());
                world.kill(victim);
                self.later(after, move |world| world.boot(victim));
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

    /// The leadership is given to another replica, as the product does when the attachment moves.
    fn transfer(&mut self) {
        let Some(leader) = self.world.leader() else { return };
        let Some(volume) = self.world.node(leader).volume() else { return };
        let to = ReplicaId(1 + (leader + self.random.below(REPLICAS - 1)) % REPLICAS);
        let trace = self.world.trace.clone();
        trace.add(leader, format_args!("transfers to replica {to}"));
        drop(self.world.run_on(leader, async move {
            if volume.group().transfer_to(to).await.is_ok() {
                trace.mark("transfers of leadership");
            }
        }));
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
        node.disk.slowness.set(0);
        node.disk.stalled_until.set(0);
        world.set_paused(node.number, false);
        world.boot(node.number);
    }
}

/// The one node outside the core that must make progress: its fault is for good.
pub(crate) fn lame_one(world: &Rc<World>, random: &mut Random) -> u64 {
    let leader = if random.percent(70) { world.leader() } else { None };
    let lame = leader.unwrap_or_else(|| 1 + random.below(REPLICAS));
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
