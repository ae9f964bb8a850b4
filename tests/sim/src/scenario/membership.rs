//! A small stand-in for the catalog's reconciler: it replaces a replica step by step, each step until it has happened,
//! whoever leads, as the product's does.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use holdfast_replica::messages::ReplicaReport;
use holdfast_store::ReplicaIdentity;
use holdfast_types::{ReplicaId, StoreId};

use crate::executor::{MILLISECOND, SECOND};
use crate::world::{GROUP, World};

/// Between two looks.
const LOOK: u64 = 100 * MILLISECOND;
/// A step that is not answered is tried again.
const STEP_WITHIN: u64 = 6 * SECOND;
/// How late it is told that a node is back whose replica was replaced: until then the old one does what it can.
const DELETED_AFTER: u64 = 12 * SECOND;

/// Who holds what.
pub(crate) struct Membership {
    world: Rc<World>,
    /// Which replica each node has.
    replicas: RefCell<Vec<(u64, ReplicaId)>>,
    next: Cell<u64>,
    /// Nodes whose replicas are to be deleted.
    leftovers: RefCell<Vec<(u64, ReplicaId)>>,
}

impl Membership {
    pub(crate) fn new(world: &Rc<World>) -> Rc<Self> {
        let replicas: Vec<(u64, ReplicaId)> = World::voters().into_keys().map(|id| (id.0, id)).collect();
        let next = Cell::new(replicas.len() as u64 + 1);
        let replicas = RefCell::new(replicas);
        Rc::new(Self { world: world.clone(), replicas, next, leftovers: RefCell::default() })
    }

    /// Begins to replace the replica of one node by a new one on another.
    pub(crate) fn replace(self: &Rc<Self>, from: u64, to: u64) -> Result<(), String> {
        let old = self.replicas.borrow().iter().find(|(node, _)| *node == from).map(|(_, id)| *id);
        let old = old.ok_or_else(|| format!("n{from} holds no replica"))?;
        let new = ReplicaId(self.next.replace(self.next.get() + 1));
        let this = self.clone();
        self.world.spawn(async move {
            while !this.step((from, old), (to, new)).await {
                this.world.sleep(LOOK).await;
            }
            let mut replicas = this.replicas.borrow_mut();
            replicas.retain(|(node, _)| *node != from);
            replicas.push((to, new));
            this.world.seats.set_voters(&replicas);
            this.leftovers.borrow_mut().push((from, old));
            this.world.spawn(this.clone().delete(from, old));
        });
        Ok(())
    }

    /// The leader's view, if somebody leads.
    fn leading(&self) -> Option<(u64, ReplicaReport)> {
        let reports = self.world.nodes().iter().filter_map(|node| {
            let report = node.volume()?.group().report();
            report.is_leader.then_some((node.number, report))
        });
        reports.max_by_key(|(_, report)| report.term)
    }

    /// Does what is next; true if nothing is left to do.
    async fn step(&self, (from, old): (u64, ReplicaId), (to, new): (u64, ReplicaId)) -> bool {
        let host = self.world.node(to).daemon().and_then(|daemon| daemon.host.clone());
        let Some(host) = host else { return false };
        if host.volume(GROUP).is_none() {
            let made = self.world.new_replica(new.0);
            self.world.network.owes_silence(to, None);
            self.bounded(self.world.run_on(to, async move { host.create(&made).await.is_ok() })).await;
            return false;
        }
        let Some((leader, report)) = self.leading() else { return false };
        let Some(volume) = self.world.node(leader).volume() else { return false };
        if report.voters.contains(&new) {
            return report.settled_membership && !report.voters.contains(&old);
        }
        if !report.learners.contains(&new) {
            let store = StoreId(to.into());
            let added = async move { volume.group().add_learner(new, store).await.is_ok() };
            self.bounded(self.world.run_on(leader, added)).await;
            return false;
        }
        let matched = report.matched.iter().find(|(id, _)| *id == new).map(|(_, index)| index.0);
        if matched.is_none_or(|matched| matched + 64 < report.committed.0) {
            return false;
        }
        let mut voters: Vec<ReplicaId> = report.voters.into_iter().filter(|id| *id != old).collect();
        voters.push(new);
        self.world.trace.add(leader, format_args!("changes the voters to {voters:?}, n{from} goes"));
        let changed = async move { volume.group().change_voters(&voters).await.is_ok() };
        self.bounded(self.world.run_on(leader, changed)).await;
        false
    }

    async fn bounded(&self, step: tokio::sync::oneshot::Receiver<bool>) {
        let bound = self.world.executor.sleep_for(STEP_WITHIN);
        // What came of it is seen from the reports.
        drop(futures_util::future::select(step, Box::pin(bound)).await);
    }

    /// Deletes a replica that was replaced, once its node has been there for a while.
    async fn delete(self: Rc<Self>, node: u64, id: ReplicaId) {
        loop {
            let up = || self.world.node(node).daemon().is_some();
            while !up() {
                self.world.sleep(LOOK).await;
            }
            self.world.sleep(DELETED_AFTER).await;
            let host = self.world.node(node).daemon().and_then(|daemon| daemon.host.clone());
            let Some(host) = host else { continue };
            let identity = ReplicaIdentity { group: GROUP, replica: id };
            let deleted = self.world.run_on(node, async move { host.destroy(identity, 1).await.is_ok() });
            let bound = self.world.executor.sleep_for(STEP_WITHIN);
            let deleted = futures_util::future::select(deleted, Box::pin(bound)).await;
            if matches!(deleted, futures_util::future::Either::Left((Ok(true), _))) {
                self.world.trace.add(node, format_args!("replica {id} is deleted"));
                return self.leftovers.borrow_mut().retain(|(_, left)| *left != id);
            }
        }
    }

    /// Whether a node holds no replica of the volume, and none is to be deleted there.
    pub(crate) fn is_gone(&self, node: u64) -> bool {
        let left = self.leftovers.borrow().iter().any(|(at, _)| *at == node);
        let holds = self.replicas.borrow().iter().any(|(at, _)| *at == node);
        !left && !holds && self.world.node(node).volume().is_none()
    }

    /// Whether exactly these nodes hold the volume, by the one configuration that the leader knows.
    pub(crate) fn are(&self, nodes: &[u64]) -> Result<(), String> {
        let (_, report) = self.leading().ok_or("nobody leads")?;
        let replicas = self.replicas.borrow();
        let mut wanted: Vec<ReplicaId> =
            replicas.iter().filter(|(node, _)| nodes.contains(node)).map(|(_, id)| *id).collect();
        let mut voters = report.voters.clone();
        wanted.sort_unstable();
        voters.sort_unstable();
        if report.settled_membership && wanted.len() == nodes.len() && voters == wanted {
            return Ok(());
        }
        Err(format!("the voters are {voters:?}, settled: {}; on {replicas:?}", report.settled_membership))
    }
}
