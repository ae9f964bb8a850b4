//! The simulated cluster: nodes that run the product's own store, replicas and sessions, over a simulated disk and
//! network, and what faults can do to them.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::rc::{Rc, Weak};
use std::time::Duration;

use bytes::Bytes;
use holdfast_env::Instant;
use holdfast_env::net::Network;
use holdfast_replica::scrub::ScrubOptions;
use holdfast_replica::{GroupEnvironment, Host, NewReplica, Volume};
use holdfast_session::{Sessions, VolumeTarget};
use holdfast_store::journal::{Journal, StoreOptions};
use holdfast_store::{ReplicaIdentity, StoreError, StoreIdentity};
use holdfast_types::{ByteSize, ClusterId, GroupId, NodeName, ReplicaId, StoreId, VolumeId};
use holdfast_wire::rpc::Rpc;
use tokio::sync::oneshot;

use crate::churn::Seats;
use crate::disk::{CutMode, Disk};
use crate::executor::{Clock, Executor, MICROSECOND, Owner, SECOND, WORLD};
use crate::history::History;
use crate::hooks::Hooks;
use crate::keeper::Keeper;
use crate::network::Switch;
use crate::oracle::Oracle;
use crate::plan::{NODES, Plan, REPLICAS};
use crate::random::{Purpose, Random};
use crate::trace::Trace;

pub(crate) const GROUP: GroupId = GroupId(77);
const CLUSTER: ClusterId = ClusterId(5);
pub(crate) const VOLUME: VolumeId = VolumeId(9);
const SEGMENT_BYTES: u64 = 4 << 20;
/// A small volume is looked through every few seconds.
const SCRUB: ScrubOptions = ScrubOptions { period: Duration::from_secs(20), bytes_per_second: 8 << 20 };

/// What runs on a node.
pub(crate) struct Daemon {
    /// Absent on the node without a store.
    pub(crate) host: Option<Rc<Host>>,
    pub(crate) sessions: Rc<Sessions>,
    pub(crate) rpc: Rpc,
}

/// A machine.
pub(crate) struct Node {
    pub(crate) number: u64,
    pub(crate) disk: Rc<Disk>,
    /// The running boot; `WORLD` while it is down.
    owner: Cell<Owner>,
    daemon: RefCell<Option<Rc<Daemon>>>,
    paused: Cell<bool>,
    drift_ppm: Cell<i64>,
    /// It is to be looked into as soon as it would serve readers.
    pub(crate) look_due: Cell<bool>,
    /// Bytes of the last rebuild by chunks in the lives of its daemon that have ended; 0 if there was none.
    healed_before: Cell<u64>,
}

impl Node {
    /// The running boot.
    pub(crate) fn owner(&self) -> Owner {
        self.owner.get()
    }
    pub(crate) fn is_up(&self) -> bool {
        self.owner.get() != WORLD
    }
    pub(crate) fn is_paused(&self) -> bool {
        self.paused.get()
    }
    /// How much faster its clock runs from its next boot on, in millionths.
    pub(crate) fn set_drift(&self, ppm: i64) {
        self.drift_ppm.set(ppm);
    }
    /// What runs on it, once it has started.
    pub(crate) fn daemon(&self) -> Option<Rc<Daemon>> {
        self.daemon.borrow().clone()
    }
    /// Its replica, if it runs.
    pub(crate) fn volume(&self) -> Option<Rc<Volume>> {
        self.daemon()?.host.as_ref()?.volume(GROUP)
    }
    /// Bytes that the last rebuild of its replica by chunks took, in whichever life of its daemon; 0 if there was none.
    pub(crate) fn healed_by_chunks(&self) -> u64 {
        match self.volume().map_or(0, |volume| volume.healed_by_chunks()) {
            0 => self.healed_before.get(),
            healed => healed,
        }
    }
    pub(crate) fn name(&self) -> NodeName {
        NodeName::new(format!("n{}", self.number))
    }
}

/// Everything of one simulation.
pub(crate) struct World {
    pub(crate) plan: Plan,
    pub(crate) executor: Rc<Executor>,
    pub(crate) trace: Rc<Trace>,
    pub(crate) hooks: Rc<Hooks>,
    pub(crate) network: Rc<Switch>,
    pub(crate) history: History,
    pub(crate) oracle: Rc<Oracle>,
    pub(crate) keeper: Rc<Keeper>,
    pub(crate) seats: Seats,
    /// Who leaves once who takes its place is a voter.
    pub(crate) leaves_next: Cell<Option<ReplicaId>>,
    /// Faults so far.
    pub(crate) faults: Cell<u64>,
    /// Until then no fault and no replacement begins.
    pub(crate) calm_until: Cell<u64>,
    nodes: Vec<Node>,
    boots: Cell<Owner>,
    clocks: RefCell<Random>,
}

/// Ends the simulation's hold on everything that refers to itself.
impl Drop for World {
    fn drop(&mut self) {
        self.hooks.set_on_crash(None);
    }
}

impl World {
    pub(crate) fn new(plan: Plan, executor: Rc<Executor>, trace: Rc<Trace>) -> Rc<Self> {
        let seed = plan.seed;
        let hooks = Hooks::new(executor.clone(), trace.clone());
        let oracle = Oracle::new(executor.clone(), trace.clone(), true);
        let keeper = Rc::new(Keeper::default());
        let network = Switch::new(
            executor.clone(),
            trace.clone(),
            hooks.clone(),
            keeper.clone(),
            Random::new(seed, Purpose::Network, 0),
            plan.delays,
        );
        let node = |number: u64| Node {
            number,
            disk: Disk::new(
                number,
                executor.clone(),
                trace.clone(),
                hooks.clone(),
                Random::new(seed, Purpose::Disk, number),
                plan.disk_mean,
            ),
            owner: Cell::new(WORLD),
            daemon: RefCell::default(),
            paused: Cell::new(false),
            drift_ppm: Cell::new(plan.drift_ppm[number as usize - 1]),
            healed_before: Cell::new(0),
            look_due: Cell::new(false),
        };
        let nodes = (1..=NODES).map(node).collect();
        Rc::new(Self {
            clocks: RefCell::new(Random::new(seed, Purpose::Clock, 0)),
            plan,
            executor,
            trace,
            hooks,
            network,
            history: History::default(),
            oracle,
            keeper,
            seats: Seats::default(),
            leaves_next: Cell::new(None),
            faults: Cell::new(0),
            calm_until: Cell::new(0),
            nodes,
            boots: Cell::new(0),
        })
    }

    /// Virtual microseconds since the start.
    pub(crate) fn at(&self) -> u64 {
        self.executor.time() / MICROSECOND
    }

    pub(crate) fn node(&self, number: u64) -> &Node {
        &self.nodes[number as usize - 1]
    }
    pub(crate) fn nodes(&self) -> &[Node] {
        &self.nodes
    }
    /// The nodes of the voters.
    pub(crate) fn replicas(&self) -> Vec<&Node> {
        self.seats.voters().into_iter().map(|(_, node)| self.node(node)).collect()
    }

    /// The node whose replica leads in the highest term, as far as it knows itself.
    pub(crate) fn leader(&self) -> Option<u64> {
        let leading = self.nodes.iter().filter_map(|node| {
            let (term, _) = node.volume()?.group().leading_since()?;
            Some((term, node.number))
        });
        leading.max().map(|(_, number)| number)
    }

    pub(crate) fn target(&self) -> VolumeTarget {
        VolumeTarget { group: GROUP, stores: self.seats.stores() }
    }

    /// Starts a task of the world.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.executor.spawn_for(WORLD, Box::pin(task));
    }

    /// Runs a task in a node's process; the answer never comes if the process ends first.
    pub(crate) fn run_on<T: 'static>(
        &self,
        number: u64,
        task: impl Future<Output = T> + 'static,
    ) -> oneshot::Receiver<T> {
        let (sender, receiver) = oneshot::channel();
        let owner = self.node(number).owner.get();
        let run = async move {
            // Nobody waits any more: the world has gone on.
            let _ = sender.send(task.await);
        };
        if owner != WORLD {
            self.executor.spawn_for(owner, Box::pin(run));
        }
        receiver
    }

    pub(crate) async fn sleep(&self, nanoseconds: u64) {
        self.executor.sleep_for(nanoseconds).await;
    }

    /// Looks until it is so, for at most `patience` nanoseconds.
    pub(crate) async fn wait_until(&self, patience: u64, mut is_so: impl FnMut() -> bool) -> bool {
        let until = self.executor.time() + patience;
        while !is_so() {
            if self.executor.time() >= until {
                return false;
            }
            self.sleep(10 * 1000 * MICROSECOND).await;
        }
        true
    }

    /// Starts a node's daemon, if it is down.
    pub(crate) fn boot(self: &Rc<Self>, number: u64) {
        let node = self.node(number);
        if node.is_up() {
            return;
        }
        let owner = self.boots.get() + 1;
        self.boots.set(owner);
        node.owner.set(owner);
        node.paused.set(false);
        // A machine's clock counts from anywhere; its rate is its own.
        let offset = self.clocks.borrow_mut().below(1000) * SECOND;
        self.executor.add_owner(owner, Clock { offset, drift_ppm: node.drift_ppm.get() });
        self.trace.name(owner, number);
        self.trace.add(number, format_args!("BOOT {owner}"));
        let network = self.network.attach(number, owner);
        node.disk.has_failed.set(false);
        let world = self.clone();
        self.executor.spawn_for(
            owner,
            Box::pin(async move {
                match world.start_daemon(number, network).await {
                    Ok(daemon) => {
                        world.trace.add(number, format_args!("started"));
                        let host = daemon.host.as_ref().map(Rc::downgrade);
                        *world.node(number).daemon.borrow_mut() = Some(Rc::new(daemon));
                        world.look_at_log(number);
                        world.node(number).look_due.set(!world.look_at(number, u64::from(owner)));
                        if let Some(host) = host {
                            world.watch_replica(number, host).await;
                        }
                    }
                    // It could not write: it is started again.
                    Err(_) if world.node(number).disk.has_failed.get() => {}
                    Err(error) => world.trace.violation(format_args!("n{number} does not start: {error}")),
                }
            }),
        );
    }

    /// A replica runs in the end, whatever happened to its disk: nobody is taken for one that was put back to an older
    /// state (INV-ROLLBACK).
    async fn watch_replica(&self, number: u64, host: Weak<Host>) {
        loop {
            let mine = |fault: &holdfast_replica::Faulty| self.seats.belongs(fault.id.replica);
            let Some(fault) = host.upgrade().map(|host| host.faulty().into_iter().find(mine)) else { return };
            match fault {
                None => return,
                // Its store has stopped: the daemon is started again.
                Some(_) if self.node(number).disk.has_failed.get() => return,
                Some(fault) if fault.repairing => holdfast_env::sleep(Duration::from_millis(50)).await,
                Some(fault) => {
                    return self
                        .trace
                        .violation(format_args!("n{number} has a replica that does not run: {}", fault.why));
                }
            }
        }
    }

    /// What a daemon does when it starts, in its order.
    async fn start_daemon(&self, number: u64, network: Rc<dyn Network>) -> Result<Daemon, StoreError> {
        let rpc = Rpc::new(network);
        let directory = self.node(number).disk.directory();
        let identity =
            StoreIdentity { cluster: CLUSTER, node: self.node(number).name(), store: StoreId(number.into()) };
        let options = StoreOptions { segment_bytes: SEGMENT_BYTES, segments: self.plan.segments };
        let fresh = match Journal::identity_of(&directory).await {
            Ok(_) => false,
            Err(StoreError::NotFormatted(_)) => true,
            Err(error) => return Err(error),
        };
        if fresh {
            Journal::format(directory.clone(), &identity, &options).await?;
        }
        let timers = self.plan.timers;
        let silence = if fresh { Duration::ZERO } else { timers.startup_silence() };
        self.network.owes_silence(number, (!fresh).then(|| Instant::now() + silence));
        let environment =
            GroupEnvironment { rpc: rpc.clone(), timers, silent_until: Instant::now() + silence };
        let host = Host::open(environment, directory, identity, &options).await?;
        host.load().await?;
        host.start_scrub(SCRUB);
        if fresh && number <= REPLICAS {
            let id = ReplicaIdentity { group: GROUP, replica: ReplicaId(number) };
            let size = ByteSize(self.plan.volume_bytes);
            let new = NewReplica { volume: VOLUME, id, size, spec_json: Bytes::new() };
            host.create(&new).await.map_err(|error| StoreError::Failed(error.to_string()))?;
        }
        let sessions = Sessions::serve(&rpc);
        Ok(Daemon { host: Some(host), sessions, rpc })
    }

    /// A replica of the volume that is to be made.
    pub(crate) fn new_replica(&self, number: u64) -> NewReplica {
        let id = ReplicaIdentity { group: GROUP, replica: ReplicaId(number) };
        NewReplica { volume: VOLUME, id, size: ByteSize(self.plan.volume_bytes), spec_json: Bytes::new() }
    }

    /// The voters of the volume.
    pub(crate) fn voters() -> BTreeMap<ReplicaId, StoreId> {
        (1..=REPLICAS).map(|n| (ReplicaId(n), StoreId(n.into()))).collect()
    }

    fn end_process(&self, number: u64, silent: bool) -> bool {
        let node = self.node(number);
        let owner = node.owner.replace(WORLD);
        if owner == WORLD {
            return false;
        }
        node.healed_before.set(node.healed_by_chunks());
        let daemon = node.daemon.borrow_mut().take();
        self.network.detach(number, silent);
        self.executor.kill(owner);
        self.executor.within(owner, || drop(daemon));
        true
    }

    /// Cuts a node's power: what its disk had not flushed is lost, kept or torn.
    pub(crate) fn cut_power(&self, number: u64, mode: CutMode) {
        self.trace.add(number, format_args!("POWER CUT {mode:?}"));
        if self.end_process(number, true) {
            self.node(number).disk.cut_power(mode);
            self.trace.mark("power cuts");
        }
    }

    /// SIGKILL of a node's daemon.
    pub(crate) fn kill(&self, number: u64) {
        self.trace.add(number, format_args!("KILL"));
        if self.end_process(number, false) {
            self.node(number).disk.end_process();
            self.trace.mark("kills");
        }
    }

    /// SIGSTOP of a node's daemon, or SIGCONT.
    pub(crate) fn set_paused(&self, number: u64, paused: bool) {
        let node = self.node(number);
        if !node.is_up() || node.paused.get() == paused {
            return;
        }
        self.trace.add(number, format_args!("{}", if paused { "PAUSE" } else { "RESUME" }));
        node.paused.set(paused);
        self.network.set_paused(number, paused);
        self.executor.set_paused(node.owner.get(), paused);
        if paused {
            self.trace.mark("pauses");
        }
    }

    /// A node's clock jumps ahead, as after the sleep of its machine.
    pub(crate) fn jump_clock(&self, number: u64, ahead: u64) {
        self.trace.add(number, format_args!("CLOCK JUMPS {} ms", ahead / 1_000_000));
        self.executor.jump_clock(self.node(number).owner.get(), ahead);
    }

    /// Drops everything that runs.
    pub(crate) fn end(&self) {
        for number in 1..=NODES {
            self.end_process(number, true);
        }
        self.hooks.set_on_crash(None);
        self.executor.end();
    }
}
