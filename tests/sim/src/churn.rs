//! Replicas are replaced: the steps of the catalog's reconciler (`catalog/src/reconciler.rs`), carried out by the shards
//! as it has them carried out, one at a time, each repeated until it is seen to be done. Leaders crash and links are cut
//! meanwhile, and who was removed may be away and come back with what it had.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use bytes::Bytes;
use holdfast_replica::administration::{ShardRequest, carry_out};
use holdfast_store::ReplicaIdentity;
use holdfast_types::{ByteSize, ReplicaId, StoreId};

use crate::executor::{MILLISECOND, SECOND};
use crate::plan::{NODES, REPLICAS};
use crate::random::{Purpose, Random};
use crate::world::{GROUP, VOLUME, World};

/// Entries that a learner may be behind when it becomes a voter, as the reconciler has it.
const CAUGHT_UP_WITHIN: u64 = 64;
/// How long one step may take before it is repeated.
const STEP_PATIENCE: u64 = 12 * SECOND;

/// What is to become of a replica.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Phase {
    Joining,
    Voter,
    Leaving,
}

/// Where replicas stand, as the catalog would know.
pub(crate) struct Seats {
    seats: RefCell<BTreeMap<ReplicaId, (u64, Phase)>>,
    /// The highest id ever given.
    last: Cell<u64>,
    /// No more replacements begin.
    pub(crate) stopped: Cell<bool>,
    /// Somebody looks after replacements though the plan has none.
    has_begun: Cell<bool>,
}

impl Default for Seats {
    fn default() -> Self {
        let first = (1..=REPLICAS).map(|n| (ReplicaId(n), (n, Phase::Voter)));
        Self {
            seats: RefCell::new(first.collect()),
            last: Cell::new(REPLICAS),
            stopped: Cell::new(false),
            has_begun: Cell::new(false),
        }
    }
}

impl Seats {
    /// The voters with their nodes.
    pub(crate) fn voters(&self) -> Vec<(ReplicaId, u64)> {
        let seats = self.seats.borrow();
        seats
            .iter()
            .filter(|(_, (_, phase))| *phase == Phase::Voter)
            .map(|(id, (node, _))| (*id, *node))
            .collect()
    }
    /// Whether this replica still belongs to the volume.
    pub(crate) fn belongs(&self, id: ReplicaId) -> bool {
        self.seats.borrow().get(&id).is_some_and(|(_, phase)| *phase != Phase::Leaving)
    }
    /// Whether nobody comes or goes.
    pub(crate) fn are_settled(&self) -> bool {
        self.seats.borrow().values().all(|(_, phase)| *phase == Phase::Voter)
    }
    /// Stores that may hold a replica.
    pub(crate) fn stores(&self) -> Vec<StoreId> {
        self.seats.borrow().values().map(|(node, _)| StoreId((*node).into())).collect()
    }
    /// These nodes hold the volume from now on, for scripts that have their own way of replacing.
    pub(crate) fn set_voters(&self, voters: &[(u64, ReplicaId)]) {
        let seats = voters.iter().map(|(node, id)| (*id, (*node, Phase::Voter)));
        *self.seats.borrow_mut() = seats.collect();
    }
    fn in_phase(&self, wanted: Phase) -> Option<(ReplicaId, u64)> {
        let seats = self.seats.borrow();
        seats.iter().find(|(_, (_, phase))| *phase == wanted).map(|(id, (node, _))| (*id, *node))
    }
    fn set(&self, id: ReplicaId, node: u64, phase: Phase) {
        self.seats.borrow_mut().insert(id, (node, phase));
    }
}

fn identity(replica: ReplicaId) -> ReplicaIdentity {
    ReplicaIdentity { group: GROUP, replica }
}

/// Replaces replicas for as long as the simulation runs, and begins no more once that is stopped.
pub(crate) async fn reconcile(world: Rc<World>) {
    let mut random = Random::new(world.plan.seed, Purpose::Faults, 4);
    let mut next = world.executor.time() + random.around(world.plan.churn_every);
    loop {
        world.sleep(random.range(50, 200) * MILLISECOND).await;
        let seats = &world.seats;
        if let Some((id, node)) = seats.in_phase(Phase::Joining) {
            join(&world, id, node).await;
        } else if let Some((id, node)) = seats.in_phase(Phase::Leaving) {
            // Who leaves may be left alone for a while.
            if leave(&world, id, node, seats.stopped.get() || random.percent(30)).await {
                world.trace.mark("replicas replaced");
                if random.percent(30) {
                    let late = make_late(world.clone(), id, node, random.range(1, 8000) * MILLISECOND);
                    world.spawn(late);
                }
            }
        } else if world.executor.time() >= next.max(world.calm_until.get()) && !seats.stopped.get() {
            next = world.executor.time() + random.around(world.plan.churn_every);
            if let Some(free) = free_node(&world) {
                let voters = world.seats.voters();
                begin(&world, voters[random.below(voters.len() as u64) as usize].0, free);
            }
        }
    }
}

/// A replica is replaced, whether or not others are during this simulation; the node of the new one.
pub(crate) fn replace(world: &Rc<World>, old: ReplicaId) -> Option<u64> {
    if world.plan.churn_every == 0 && !world.seats.has_begun.replace(true) {
        world.spawn(reconcile(world.clone()));
    }
    let free = free_node(world)?;
    begin(world, old, free);
    Some(free)
}

/// The node on which no voter stands.
fn free_node(world: &World) -> Option<u64> {
    let voters = world.seats.voters();
    (1..=NODES).find(|node| voters.iter().all(|(_, at)| at != node))
}

fn begin(world: &World, old: ReplicaId, free: u64) {
    world.seats.last.set(world.seats.last.get() + 1);
    let new = ReplicaId(world.seats.last.get());
    world.trace.add(free, format_args!("replica {new} is to take the place of {old}"));
    world.seats.set(new, free, Phase::Joining);
    world.leaves_next.set(Some(old));
}

/// A request that a node's shard carries out; whether it did.
async fn ask(world: &World, node: u64, request: ShardRequest) -> bool {
    let Some(host) = world.node(node).daemon().and_then(|daemon| daemon.host.clone()) else { return false };
    let done = world.run_on(node, async move { carry_out(&host, request).await });
    let within = world.executor.sleep_for(STEP_PATIENCE);
    match futures_util::future::select(done, Box::pin(within)).await {
        futures_util::future::Either::Left((Ok(Ok(_)), _)) => true,
        futures_util::future::Either::Left((Ok(Err(error)), _)) => {
            world.trace.add(node, format_args!("a step of a replacement is refused: {}", error.message));
            false
        }
        _ => false,
    }
}

fn creation(world: &World, id: ReplicaId) -> ShardRequest {
    let size = ByteSize(world.plan.volume_bytes);
    ShardRequest::Create { volume: VOLUME, id: identity(id), size, spec_json: Bytes::new(), witness: false }
}

/// INV-TERM: the request that once made a replica arrives again when the replica has been destroyed, whatever the node
/// has been through since.
async fn make_late(world: Rc<World>, id: ReplicaId, node: u64, after: u64) {
    world.sleep(after).await;
    let Some(host) = world.node(node).daemon().and_then(|daemon| daemon.host.clone()) else { return };
    let create = creation(&world, id);
    match world.run_on(node, async move { carry_out(&host, create).await }).await {
        Ok(Ok(_)) => {
            world.trace.violation(format_args!("n{node}: replica {id} was destroyed and is made again"));
        }
        Ok(Err(_)) => world.trace.mark("late creations refused"),
        // The daemon has ended.
        Err(_) => {}
    }
}

async fn join(world: &Rc<World>, id: ReplicaId, node: u64) {
    let runs = world.node(node).volume().is_some_and(|volume| volume.group().id() == identity(id));
    if !runs {
        world.network.owes_silence(node, None);
        if !ask(world, node, creation(world, id)).await {
            return;
        }
    }
    let Some(leader) = world.leader() else { return };
    let Some(report) = world.node(leader).volume().map(|volume| volume.group().report()) else { return };
    if !report.voters.contains(&id) || !report.settled_membership {
        if !report.voters.contains(&id) && !report.learners.contains(&id) {
            let store = StoreId(node.into());
            let add = ShardRequest::AddLearner { group: GROUP, replica: id, store, witness: false };
            ask(world, leader, add).await;
            return;
        }
        let matched = report.matched.iter().find(|(of, _)| *of == id).map_or(0, |(_, at)| at.0);
        if matched + CAUGHT_UP_WITHIN < report.last_log.0 || matched == 0 {
            return;
        }
        let mut voters: Vec<ReplicaId> = world.seats.voters().into_iter().map(|(voter, _)| voter).collect();
        voters.push(id);
        let expected = report.voters.clone();
        if !ask(world, leader, ShardRequest::ChangeVoters { group: GROUP, expected, voters }).await {
            return;
        }
    }
    world.trace.mark("learners that became voters");
    world.seats.set(id, node, Phase::Voter);
    if let Some(old) = world.leaves_next.take() {
        let at = world.seats.voters().into_iter().find(|(voter, _)| *voter == old);
        if let Some((_, at)) = at {
            world.seats.set(old, at, Phase::Leaving);
        }
    }
}

/// Whether it is gone for good.
async fn leave(world: &Rc<World>, id: ReplicaId, node: u64, now: bool) -> bool {
    let Some(leader) = world.leader() else { return false };
    let Some(report) = world.node(leader).volume().map(|volume| volume.group().report()) else {
        return false;
    };
    let is_member = report.voters.contains(&id) || report.learners.contains(&id);
    if is_member || !report.settled_membership {
        let voters = world.seats.voters().into_iter().map(|(voter, _)| voter).collect();
        let expected = report.voters.clone();
        if !ask(world, leader, ShardRequest::ChangeVoters { group: GROUP, expected, voters }).await {
            return false;
        }
    }
    if !now || !ask(world, node, ShardRequest::Destroy { id: identity(id), revision: 1 }).await {
        return false;
    }
    world.seats.seats.borrow_mut().remove(&id);
    true
}
