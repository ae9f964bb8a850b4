//! Guests: what uses the volume through sessions, and whoever decides on which node it is attached.
//!
//! A guest that loses its volume is not told to stop: it goes on reading from the replica beside it and writing, until
//! its session tells it that it has ended.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use holdfast_scenario::history::{OperationId, Stamp};
use holdfast_session::{AttachOptions, Closed, Session, SessionError};
use holdfast_types::{AttachmentId, BlockIndex, BlockRange, Epoch, SessionId};

use crate::executor::{MILLISECOND, SECOND};
use crate::keeper;
use crate::random::{Purpose, Random};
use crate::world::{Daemon, World};

/// A guest on a node, from the attempt to attach on.
pub(crate) struct Guest {
    pub(crate) number: u64,
    pub(crate) node: u64,
    session: RefCell<Option<Rc<Session>>>,
    /// Its session's id, once it is attached.
    id: Cell<Option<SessionId>>,
    attachment: Cell<Option<AttachmentId>>,
    epoch: Cell<Epoch>,
    ended: Cell<bool>,
    /// Requests that it waits for.
    waiting: Cell<u64>,
    /// The writes among them, with their first stamps.
    writing: RefCell<BTreeMap<OperationId, Stamp>>,
    done: Cell<u64>,
}

impl Guest {
    pub(crate) fn is_attached(&self) -> bool {
        !self.ended.get() && self.session.borrow().as_ref().is_some_and(|s| s.closed_now().is_none())
    }
    pub(crate) fn has_ended(&self) -> bool {
        self.ended.get()
    }
    /// Requests that were answered.
    pub(crate) fn done(&self) -> u64 {
        self.done.get()
    }
    /// Whether it waits for answers.
    pub(crate) fn waits(&self) -> bool {
        self.waiting.get() > 0
    }
    pub(crate) fn session(&self) -> Option<Rc<Session>> {
        self.session.borrow().clone()
    }
    fn holds_by(&self, session: &Session) {
        self.id.set(Some(session.id()));
        self.attachment.set(Some(session.attachment()));
        self.epoch.set(session.epoch());
    }
}

/// How a guest comes to its volume.
#[derive(Clone)]
pub(crate) enum Come {
    Attach {
        force: bool,
    },
    /// After a restart of the daemon: it takes over what this guest held, and goes on with its writes.
    Resume(Rc<Guest>),
}

/// Notes the end of a guest when its process ends, too.
struct EndGuard(Rc<World>, Rc<Guest>);

impl Drop for EndGuard {
    fn drop(&mut self) {
        let Self(world, guest) = self;
        guest.ended.set(true);
        let session = guest.session.borrow_mut().take();
        drop(session);
        world.trace.add(guest.node, format_args!("guest {} ends", guest.number));
    }
}

struct WaitGuard(Rc<Guest>);

impl Drop for WaitGuard {
    fn drop(&mut self) {
        self.0.waiting.set(self.0.waiting.get() - 1);
    }
}

/// Everybody who uses the volume.
pub(crate) struct Guests {
    world: Rc<World>,
    all: RefCell<Vec<Rc<Guest>>>,
    stop: Cell<bool>,
    /// A daemon is expected to take over what it held: nobody is asked to attach meanwhile.
    pub(crate) expected_until: Cell<u64>,
    /// Guests do nothing until then, so that the volume is quiet for a while.
    pub(crate) quiet_until: Cell<u64>,
}

impl Guests {
    pub(crate) fn new(world: Rc<World>) -> Rc<Self> {
        Rc::new(Self {
            world,
            all: RefCell::default(),
            stop: Cell::new(false),
            expected_until: Cell::new(0),
            quiet_until: Cell::new(0),
        })
    }

    /// No more requests.
    pub(crate) fn set_stopped(&self, stopped: bool) {
        self.stop.set(stopped);
    }
    pub(crate) fn all(&self) -> Vec<Rc<Guest>> {
        self.all.borrow().clone()
    }
    /// The newest guest that holds the volume, as far as it knows.
    pub(crate) fn holder(&self) -> Option<Rc<Guest>> {
        self.all.borrow().iter().rev().find(|guest| guest.is_attached()).cloned()
    }

    /// The guest that holds the volume on a node.
    pub(crate) fn attached_on(&self, node: u64) -> Option<Rc<Guest>> {
        self.all.borrow().iter().rev().find(|guest| guest.node == node && guest.is_attached()).cloned()
    }

    /// Starts a guest on a node that runs.
    pub(crate) fn start(self: &Rc<Self>, node: u64, force: bool, patience: Duration) -> Option<Rc<Guest>> {
        self.come(node, Come::Attach { force }, patience)
    }

    /// Starts a guest on a node that runs, however it comes.
    pub(crate) fn come(self: &Rc<Self>, node: u64, how: Come, patience: Duration) -> Option<Rc<Guest>> {
        let force = matches!(how, Come::Attach { force: true });
        let daemon = self.world.node(node).daemon()?;
        let guest = Rc::new(Guest {
            number: self.all.borrow().len() as u64 + 1,
            node,
            session: RefCell::default(),
            id: Cell::new(None),
            attachment: Cell::new(None),
            epoch: Cell::new(Epoch(0)),
            ended: Cell::new(false),
            waiting: Cell::new(0),
            writing: RefCell::default(),
            done: Cell::new(0),
        });
        self.all.borrow_mut().push(guest.clone());
        self.world.trace.add(node, format_args!("guest {} attaches, force={force}", guest.number));
        let (guests, started, world) = (self.clone(), guest.clone(), self.world.clone());
        let options = AttachOptions {
            node: world.node(node).name(),
            force,
            read_only: false,
            resume: matches!(how, Come::Resume(_)),
            only_at: None,
            patience,
        };
        // The answer is the guest's state.
        drop(self.world.run_on(node, async move {
            let _ends = EndGuard(world.clone(), started.clone());
            let attached = guests.attach(&started, &daemon, &options, &how).await;
            match attached {
                Ok(session) => guests.work(&started, session, &how).await,
                Err(error) => {
                    world.trace.add(node, format_args!("guest {} is refused: {error}", started.number));
                    world.trace.mark("attaches refused");
                    if let SessionError::Failed(why) = error {
                        world.trace.violation(format_args!("an attach failed: {why}"));
                    }
                }
            }
        }));
        Some(guest)
    }

    /// Attaches. What the daemon before had sent and nobody had answered is sent again, if the attachment is still its
    /// node's own; then another epoch is taken, whose numbers begin behind those.
    async fn attach(
        self: &Rc<Self>,
        guest: &Rc<Guest>,
        daemon: &Daemon,
        options: &AttachOptions,
        how: &Come,
    ) -> Result<Rc<Session>, SessionError> {
        let world = &self.world;
        let again = || {
            let (rpc, timers) = (daemon.rpc.clone(), &world.plan.timers);
            Session::attach(rpc, &daemon.sessions, world.target(), options, timers)
        };
        let session = again().await?;
        let Come::Resume(before) = how else { return Ok(session) };
        let waited = before.writing.borrow().clone();
        let is_its_own = before.attachment.get() == Some(session.attachment()) && !self.went_on(before);
        let Some(id) = before.id.get().filter(|_| is_its_own) else {
            return Ok(session);
        };
        let kept = world.keeper.operations(id, &waited);
        if kept.is_empty() {
            return Ok(session);
        }
        world.history.attached_again(world.at(), session.epoch(), &kept);
        world.oracle.session_began(world.executor.current(), &session);
        guest.holds_by(&session);
        guest.writing.borrow_mut().clone_from(&waited);
        let answered = |operation| {
            guest.writing.borrow_mut().remove(&operation);
            world.history.acknowledged(world.at(), operation);
        };
        let all = keeper::replay(world, &daemon.rpc, &session, id, &waited, answered).await;
        session.abort();
        if !all {
            return Err(SessionError::Closed(Closed::Detached));
        }
        guest.writing.borrow_mut().clear();
        again().await
    }

    /// Whether another guest of the node has taken the same attachment since, and given up what this one had sent.
    fn went_on(&self, before: &Guest) -> bool {
        self.all().iter().any(|guest| {
            guest.attachment.get() == before.attachment.get() && guest.epoch.get() > before.epoch.get()
        })
    }

    async fn work(self: &Rc<Self>, guest: &Rc<Guest>, session: Rc<Session>, how: &Come) {
        let (world, epoch) = (&self.world, session.epoch());
        world.history.attached(world.at(), epoch);
        world.oracle.session_began(world.executor.current(), &session);
        world.trace.add(guest.node, format_args!("guest {} is attached at epoch {epoch}", guest.number));
        world.trace.mark(match how {
            Come::Attach { force: true } => "attaches by force",
            Come::Attach { force: false } => "attaches without force",
            Come::Resume(_) => "attaches after a restart",
        });
        guest.holds_by(&session);
        *guest.session.borrow_mut() = Some(session.clone());
        for number in 0..world.plan.load.workers {
            let worker = Worker {
                guests: self.clone(),
                guest: guest.clone(),
                session: session.clone(),
                random: Random::new(world.plan.seed, Purpose::Workers, guest.number << 8 | number),
            };
            holdfast_env::spawn("guest", worker.run());
        }
        session.closed().await;
    }
}

struct Worker {
    guests: Rc<Guests>,
    guest: Rc<Guest>,
    session: Rc<Session>,
    random: Random,
}

impl Worker {
    async fn run(mut self) {
        let world = self.guests.world.clone();
        loop {
            let pause = self.random.around(world.plan.load.think);
            let quiet = self.guests.quiet_until.get().saturating_sub(world.executor.time());
            world.sleep(pause.max(quiet)).await;
            if self.session.closed_now().is_some() {
                return;
            }
            if self.guests.stop.get() {
                world.sleep(50 * MILLISECOND).await;
                continue;
            }
            self.guest.waiting.set(self.guest.waiting.get() + 1);
            let waits = WaitGuard(self.guest.clone());
            let result = self.request(&world).await;
            drop(waits);
            match result {
                Ok(()) => self.guest.done.set(self.guest.done.get() + 1),
                Err(SessionError::Closed(_)) => return,
                Err(error) => {
                    world.trace.violation(format_args!("n{}: a request failed: {error}", self.guest.node));
                    return;
                }
            }
        }
    }

    fn range(&mut self, world: &World) -> BlockRange {
        let load = &world.plan.load;
        let count = 1 + self.random.below(load.run_max.min(load.blocks));
        let first = self.random.below(load.blocks - count + 1);
        // Few blocks are spread over chunks, many are dense.
        let spread = if load.blocks <= 64 { 61 } else { 1 };
        let blocks = world.plan.volume_bytes / holdfast_types::BLOCK_BYTES as u64;
        BlockRange::new(BlockIndex((first * spread).min(blocks - count)), count as u32)
    }

    async fn request(&mut self, world: &World) -> Result<(), SessionError> {
        let (range, load) = (self.range(world), world.plan.load);
        let (node, epoch) = (self.guest.node, self.session.epoch());
        let dice = self.random.below(100);
        if dice < load.reads {
            let id = world.history.read(world.at(), node, epoch, range);
            let data = self.session.read(range).await?;
            // By its own clock, at the moment of the answer.
            if !self.session.serves_reads() {
                world.trace.violation(format_args!(
                    "INV-LEASE: n{node} epoch {epoch}: a read is answered, and the lease has ended"
                ));
            }
            if let Err(why) = world.history.answered(world.at(), id, &data) {
                world.trace.violation(format_args!("n{node} epoch {epoch}: {why}"));
            }
            world.trace.mark("reads");
            return Ok(());
        }
        let id = if dice < load.reads + load.clears {
            let id = world.history.clear(world.at(), node, epoch, range);
            if dice.is_multiple_of(2) {
                self.session.trim(range).await?;
            } else {
                self.session.zero(range).await?;
            }
            world.trace.mark("trims and zeroes");
            id
        } else {
            let (id, data) = world.history.write(world.at(), node, epoch, range);
            let stamp = world.history.stamp(id);
            self.guest.writing.borrow_mut().insert(id, stamp);
            self.session.write(range, data).await?;
            self.guest.writing.borrow_mut().remove(&id);
            world.keeper.forget(self.session.id(), stamp);
            world.trace.mark("writes");
            id
        };
        world.history.acknowledged(world.at(), id);
        Ok(())
    }
}

/// Whoever decides where the volume is attached: moves it now and then, by force or after a detach, and attaches it
/// again when nobody holds it.
pub(crate) async fn orchestrate(guests: Rc<Guests>, stop: Rc<Cell<bool>>) {
    let world = guests.world.clone();
    let mut random = Random::new(world.plan.seed, Purpose::Guests, 0);
    let mut pauses = Random::new(world.plan.seed, Purpose::Guests, u64::MAX);
    let mut breaks = world.plan.breaks;
    let mut next_move = world.executor.time() + random.around(world.plan.move_every);
    while !stop.get() {
        world.sleep(random.range(50, 150) * MILLISECOND).await;
        if stop.get() {
            return; // whoever comes now would take the volume from the last guest
        }
        let now = world.executor.time();
        if random.below(200) == 0 {
            guests.quiet_until.set(now + random.range(1, 7) * SECOND);
        }
        let attaching = guests.all().iter().any(|g| !g.has_ended() && g.session().is_none());
        let holder = guests.holder();
        let moves = now >= next_move;
        if now < guests.expected_until.get() || !moves && (attaching || holder.is_some()) {
            continue;
        }
        next_move = now + world.plan.move_every / 4 + random.around(world.plan.move_every);
        let up: Vec<u64> = world.nodes().iter().filter(|n| n.daemon().is_some()).map(|n| n.number).collect();
        if up.is_empty() {
            continue;
        }
        let node = random.pick(&up);
        let force = random.percent(world.plan.forced);
        if let Some(holder) = holder.filter(|_| !force && random.percent(70))
            && let Some(session) = holder.session()
        {
            world.trace.add(holder.node, format_args!("guest {} detaches", holder.number));
            world.trace.mark("detaches");
            drop(world.run_on(holder.node, async move {
                if let Err(error) = session.detach(Duration::from_secs(3)).await {
                    tracing::info!(%error, "the detach did not end well");
                }
            }));
            world.sleep(random.range(1, 200) * MILLISECOND).await;
            if breaks > 0 && pauses.percent(50) {
                breaks -= 1;
                world.trace.mark("breaks in which nobody is attached");
                // Faults strike a group that rests, if it has had the time to.
                world.calm_until.set(world.executor.time() + pauses.range(4_000, 10_000) * MILLISECOND);
                let long = pauses.range(6_000, 18_000) * MILLISECOND;
                world.wait_until(long, || stop.get()).await;
            }
            if stop.get() {
                return;
            }
        }
        // Whether it got it is seen from the guest.
        let patience = Duration::from_secs(random.range(2, 20));
        drop(guests.start(node, force, patience));
        if random.percent(world.plan.rivals) {
            let rival = random.pick(&up);
            drop(guests.start(rival, random.percent(world.plan.forced), patience));
        }
    }
}
