//! Scenes: coincidences that drawn faults hardly ever make, each made on purpose. When the storm of a seed is over and
//! everything is healed, three of them are played, with the seed's own load, delays and clocks. They come after the storm,
//! so that what a seed did before stays what it was.

mod logs;
mod rebuilds;
mod sessions;

use std::rc::Rc;
use std::time::Duration;

use holdfast_types::{BlockIndex, BlockRange, ReplicaId};

use crate::executor::SECOND;
use crate::faults;
use crate::guests::{Guest, Guests};
use crate::plan::NODES;
use crate::random::{Purpose, Random};
use crate::world::World;

/// How long a scene waits for what it needs: without it the scene is left out.
const STAGE_WITHIN: u64 = 10 * SECOND;
/// Scenes of a seed.
const SCENES: usize = 3;
/// Blocks that a scene writes at once.
const RUN: u64 = 64;
const RUNS_PER_MIB: u64 = 256 / RUN;

/// A coincidence.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Scene {
    /// Writes of the holder wait on their way while it detaches, and arrive when nobody holds the volume.
    AfterDetach,
    /// The answer to a renewal is late, the volume is taken meanwhile, and the holder hears nothing else.
    LateGrant,
    /// A leader that was cut off with entries of its own ends in the moment in which another one has cut them.
    CutLog,
    /// A replica is rebuilt, and its node loses its power when what it took is switched in.
    Switch,
    /// A follower's journal is slow, so that what it has applied runs ahead of what is durable there. Blocks are
    /// brought home, and its node loses its power.
    SlowJournal,
    /// A replica that is rebuilt waits for its source, which is replaced meanwhile: another one comes in its place.
    SourceGoes,
}

const ALL: [Scene; 6] = [
    Scene::AfterDetach,
    Scene::LateGrant,
    Scene::CutLog,
    Scene::Switch,
    Scene::SlowJournal,
    Scene::SourceGoes,
];

/// Plays scenes until one breaks a rule.
pub(crate) async fn play(world: &Rc<World>, guests: &Rc<Guests>) {
    let mut random = Random::new(world.plan.seed, Purpose::Scenes, 0);
    let mut left = ALL.to_vec();
    for _ in 0..SCENES.min(ALL.len()) {
        let scene = left.swap_remove(random.below(left.len() as u64) as usize);
        calm(world, guests).await;
        world.trace.add(0, format_args!("SCENE {scene:?}"));
        let random = Random::new(world.plan.seed, Purpose::Scenes, 1 + scene as u64);
        let stage = Stage { world: world.clone(), guests: guests.clone(), random };
        let played = match scene {
            Scene::AfterDetach => stage.after_detach().await,
            Scene::LateGrant => stage.late_grant().await,
            Scene::CutLog => stage.cut_log().await,
            Scene::Switch => stage.switch().await,
            Scene::SlowJournal => stage.slow_journal().await,
            Scene::SourceGoes => stage.source_goes().await,
        };
        world.trace.mark(match (scene, played) {
            (_, None) => "scenes that were left out",
            (Scene::AfterDetach, _) => "scenes: writes that arrive after a detach",
            (Scene::LateGrant, _) => "scenes: a lease that is granted late",
            (Scene::CutLog, _) => "scenes: a log that is cut just before its end",
            (Scene::Switch, _) => "scenes: a rebuild that loses its power at the switch",
            (Scene::SlowJournal, _) => "scenes: blocks come home over a slow journal",
            (Scene::SourceGoes, _) => "scenes: another replica comes in the place of a rebuild's source",
        });
    }
}

/// Everything is healed, and nobody comes or goes.
async fn calm(world: &Rc<World>, guests: &Rc<Guests>) {
    faults::heal_all(world);
    let quiet = || {
        let attaching = guests.all().iter().any(|guest| !guest.has_ended() && !guest.is_attached());
        let all_run = world.nodes().iter().all(|node| node.daemon().is_some());
        world.seats.are_settled() && !attaching && all_run && world.leader().is_some()
    };
    world.wait_until(25 * SECOND, quiet).await;
}

struct Stage {
    world: Rc<World>,
    guests: Rc<Guests>,
    random: Random,
}

impl Stage {
    async fn until(&self, is_so: impl FnMut() -> bool) -> Option<()> {
        self.world.wait_until(STAGE_WITHIN, is_so).await.then_some(())
    }

    /// A node other than these.
    fn other_than(&mut self, these: &[u64]) -> u64 {
        let others: Vec<u64> = (1..=NODES).filter(|node| !these.contains(node)).collect();
        self.random.pick(&others)
    }

    /// Somebody holds the volume on another node than the leader's, and is answered; with the leader's node.
    async fn holder_apart(&mut self) -> Option<(Rc<Guest>, u64)> {
        let world = self.world.clone();
        self.until(|| world.leader().is_some()).await?;
        let node = self.other_than(&[world.leader()?]);
        let guest = self.guests.start(node, true, Duration::from_nanos(STAGE_WITHIN))?;
        self.until(|| guest.done() >= 3 || guest.has_ended()).await?;
        let leader = world.leader().filter(|leader| *leader != node && guest.is_attached())?;
        Some((guest, leader))
    }

    /// A node ends, in one way or another.
    fn end(&mut self, node: u64) {
        if self.random.percent(40) {
            self.world.kill(node);
        } else {
            let mode = self.random.pick(&self.world.plan.cut_modes);
            self.world.cut_power(node, mode);
        }
    }

    /// What a node does, if it does it in time.
    async fn within<T: 'static>(&self, node: u64, work: impl Future<Output = T> + 'static) -> Option<T> {
        let (work, bound) = (self.world.run_on(node, work), self.world.executor.sleep_for(STAGE_WITHIN));
        match futures_util::future::select(work, Box::pin(bound)).await {
            futures_util::future::Either::Left((done, _)) => done.ok(),
            futures_util::future::Either::Right(_) => None,
        }
    }

    /// Writes the same MiB of blocks, from `first` on, again and again, so many MiB.
    async fn rewrite(&self, guest: &Rc<Guest>, first: u64, mib: u64) -> Option<()> {
        let (world, node, session) = (self.world.clone(), guest.node, guest.session()?);
        let written = async move {
            for run in 0..mib * RUNS_PER_MIB {
                let range = BlockRange::new(BlockIndex(first + run % RUNS_PER_MIB * RUN), RUN as u32);
                let (id, data) = world.history.write(world.at(), node, session.epoch(), range);
                session.write(range, data).await.ok()?;
                world.history.acknowledged(world.at(), id);
            }
            Some(())
        };
        self.within(node, written).await?
    }

    /// A node brings home what it can.
    async fn clean(&self, node: u64) {
        let Some(volume) = self.world.node(node).volume() else { return };
        // Its store may stop meanwhile.
        let _cleaned = self
            .within(node, async move { volume.data().clean(volume.group().machine()).await.map(drop) })
            .await;
    }

    /// The leader gives up all of its log that its blocks do not need.
    async fn purge(&self) -> Option<()> {
        let (world, leader) = (&self.world, self.world.leader()?);
        let volume = world.node(leader).volume()?;
        let purged = async move {
            let checkpoint = volume.data().clean(volume.group().machine()).await.ok()?;
            volume.group().purge(checkpoint.id.index).await.ok()
        };
        self.within(leader, purged).await?
    }

    /// The replica on a node.
    fn seat(&self, node: u64) -> Option<ReplicaId> {
        self.world.seats.voters().into_iter().find(|(_, at)| *at == node).map(|(id, _)| id)
    }
}
