//! A seeded single-threaded executor with virtual time.
//!
//! Every task belongs to an owner: one boot of one simulated node, or the world (owner 0), which plays disks, network
//! and faults. Killing an owner drops its tasks in the order of their slots and mutes whatever their destructors
//! still try to start. A paused owner's tasks are not polled, while its timers, disk and network go on.
//!
//! Which ready task is polled next is drawn from the seed; each poll costs a little virtual time, so that tasks that
//! only yield cannot hold time still. Nothing here depends on addresses, on the real clock or on other threads.

use std::cell::{Cell, RefCell};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, VecDeque};
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use futures_util::future::LocalBoxFuture;
use holdfast_env::{Driver, Instant};

use crate::random::{Purpose, Random};

/// Nanoseconds.
pub(crate) const MICROSECOND: u64 = 1_000;
pub(crate) const MILLISECOND: u64 = 1_000_000;
pub(crate) const SECOND: u64 = 1_000_000_000;

/// Virtual time of one poll.
const POLL_COST: u64 = MICROSECOND;
/// A node's timers fire up to so much late, as a kernel's do.
const TIMER_SLACK: u64 = MILLISECOND;

/// Whose a task is: one boot of one node; 0 is the world.
pub(crate) type Owner = u32;
pub(crate) const WORLD: Owner = 0;

thread_local! {
    /// Where the last panic came from.
    static PANICKED_AT: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Panics end simulated daemons and are told of as violations: nothing else prints them.
pub(crate) fn remember_where_panics_are() {
    std::panic::set_hook(Box::new(|panic| {
        PANICKED_AT.set(panic.location().map(ToString::to_string).unwrap_or_default());
    }));
}

/// A node's clock against true time.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Clock {
    /// What it shows at time zero.
    pub(crate) offset: u64,
    /// How much faster than true time it runs, in millionths.
    pub(crate) drift_ppm: i64,
}

impl Clock {
    fn rate(self) -> u128 {
        (1_000_000 + self.drift_ppm) as u128
    }
    fn shows(self, at: u64) -> u64 {
        self.offset + (u128::from(at) * self.rate() / 1_000_000) as u64
    }
    /// The first true time at which it shows `local`.
    fn at(self, local: u64) -> u64 {
        let since = u128::from(local.saturating_sub(self.offset)) * 1_000_000;
        u64::try_from(since.div_ceil(self.rate())).unwrap_or(u64::MAX)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Key {
    slot: usize,
    generation: u64,
}

type Ready = Arc<Mutex<VecDeque<Key>>>;

struct TaskWaker {
    key: Key,
    queued: AtomicBool,
    ready: Ready,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }
    fn wake_by_ref(self: &Arc<Self>) {
        if !self.queued.swap(true, Ordering::Relaxed) {
            self.ready.lock().unwrap_or_else(PoisonError::into_inner).push_back(self.key);
        }
    }
}

struct Task {
    owner: Owner,
    /// Taken out while it is polled.
    future: Option<LocalBoxFuture<'static, ()>>,
    waker: Arc<TaskWaker>,
}

#[derive(Default)]
struct Slot {
    generation: u64,
    task: Option<Task>,
}

#[derive(Default)]
struct TimerState {
    waker: RefCell<Option<Waker>>,
    fired: Cell<bool>,
    cancelled: Cell<bool>,
}

struct Timer {
    at: u64,
    sequence: u64,
    state: Rc<TimerState>,
}

impl PartialEq for Timer {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.sequence) == (other.at, other.sequence)
    }
}
impl Eq for Timer {}
impl PartialOrd for Timer {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Timer {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.sequence).cmp(&(other.at, other.sequence))
    }
}

/// A wait for a point in true time.
struct TimerFuture(Rc<TimerState>);

impl Future for TimerFuture {
    type Output = ();
    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if self.0.fired.get() {
            return Poll::Ready(());
        }
        *self.0.waker.borrow_mut() = Some(context.waker().clone());
        Poll::Pending
    }
}

impl Drop for TimerFuture {
    fn drop(&mut self) {
        self.0.cancelled.set(true);
        drop(self.0.waker.borrow_mut().take());
    }
}

struct OwnerState {
    clock: Clock,
    random: Random,
    alive: bool,
    paused: bool,
    /// Ready tasks that wait for the end of the pause.
    held: Vec<Key>,
}

/// The executor. One per simulation; install it as the thread's driver.
pub(crate) struct Executor {
    seed: u64,
    fifo: bool,
    now: Cell<u64>,
    polls: Cell<u64>,
    sequence: Cell<u64>,
    current: Cell<Owner>,
    slots: RefCell<Vec<Slot>>,
    free: RefCell<Vec<usize>>,
    ready: Ready,
    timers: RefCell<BinaryHeap<Reverse<Timer>>>,
    owners: RefCell<BTreeMap<Owner, OwnerState>>,
    deferred: RefCell<VecDeque<Box<dyn FnOnce()>>>,
    panics: RefCell<Vec<String>>,
    schedule: RefCell<Random>,
    slack: RefCell<Random>,
}

impl Executor {
    /// `fifo`: ready tasks are polled in the order in which they became so, as a real runtime would.
    pub(crate) fn new(seed: u64, fifo: bool) -> Rc<Self> {
        let executor = Self {
            seed,
            fifo,
            now: Cell::new(0),
            polls: Cell::new(0),
            sequence: Cell::new(0),
            current: Cell::new(WORLD),
            slots: RefCell::default(),
            free: RefCell::default(),
            ready: Ready::default(),
            timers: RefCell::default(),
            owners: RefCell::default(),
            deferred: RefCell::default(),
            panics: RefCell::default(),
            schedule: RefCell::new(Random::new(seed, Purpose::Schedule, 0)),
            slack: RefCell::new(Random::new(seed, Purpose::Timers, 0)),
        };
        executor.add_owner(WORLD, Clock::default());
        Rc::new(executor)
    }

    /// True time, in nanoseconds since the start.
    pub(crate) fn time(&self) -> u64 {
        self.now.get()
    }
    /// Polls so far.
    pub(crate) fn polls(&self) -> u64 {
        self.polls.get()
    }
    /// Whose task is being polled.
    pub(crate) fn current(&self) -> Owner {
        self.current.get()
    }
    /// Panics of tasks, taken out.
    pub(crate) fn take_panics(&self) -> Vec<String> {
        self.panics.take()
    }

    pub(crate) fn add_owner(&self, owner: Owner, clock: Clock) {
        let random = Random::new(self.seed, Purpose::Product, owner.into());
        let state = OwnerState { clock, random, alive: true, paused: false, held: Vec::new() };
        self.owners.borrow_mut().insert(owner, state);
    }

    pub(crate) fn is_alive(&self, owner: Owner) -> bool {
        self.owners.borrow().get(&owner).is_some_and(|state| state.alive)
    }

    /// Runs `work` before anything else is polled.
    pub(crate) fn defer(&self, work: impl FnOnce() + 'static) {
        self.deferred.borrow_mut().push_back(Box::new(work));
    }

    /// Runs `work` as if it were part of the owner's process.
    pub(crate) fn within<T>(&self, owner: Owner, work: impl FnOnce() -> T) -> T {
        let before = self.current.replace(owner);
        let result = work();
        self.current.set(before);
        result
    }

    /// Starts a task of `owner`; dropped at once if the owner is dead.
    pub(crate) fn spawn_for(&self, owner: Owner, future: LocalBoxFuture<'static, ()>) {
        if !self.is_alive(owner) {
            return self.drop_quietly(owner, future);
        }
        let slot = self.free.borrow_mut().pop();
        let mut slots = self.slots.borrow_mut();
        let slot = slot.unwrap_or_else(|| {
            slots.push(Slot::default());
            slots.len() - 1
        });
        slots[slot].generation += 1;
        let key = Key { slot, generation: slots[slot].generation };
        let waker = Arc::new(TaskWaker { key, queued: AtomicBool::new(true), ready: self.ready.clone() });
        slots[slot].task = Some(Task { owner, future: Some(future), waker });
        self.ready.lock().unwrap_or_else(PoisonError::into_inner).push_back(key);
    }

    /// Ends at `at`, in true time, exactly.
    pub(crate) fn sleep_until_time(&self, at: u64) -> impl Future<Output = ()> + 'static {
        let state = Rc::new(TimerState::default());
        self.sequence.set(self.sequence.get() + 1);
        let timer = Timer { at, sequence: self.sequence.get(), state: state.clone() };
        self.timers.borrow_mut().push(Reverse(timer));
        TimerFuture(state)
    }

    /// Ends after `nanoseconds` of true time, exactly.
    pub(crate) fn sleep_for(&self, nanoseconds: u64) -> impl Future<Output = ()> + 'static {
        self.sleep_until_time(self.time().saturating_add(nanoseconds))
    }

    /// Stops polling an owner's tasks, or goes on with them.
    pub(crate) fn set_paused(&self, owner: Owner, paused: bool) {
        let mut owners = self.owners.borrow_mut();
        let Some(state) = owners.get_mut(&owner) else { return };
        state.paused = paused;
        if !paused {
            let held = std::mem::take(&mut state.held);
            self.ready.lock().unwrap_or_else(PoisonError::into_inner).extend(held);
        }
    }

    /// An owner's clock jumps ahead. Timers that run end when they would have: they count no sleep of the machine.
    pub(crate) fn jump_clock(&self, owner: Owner, ahead: u64) {
        if let Some(state) = self.owners.borrow_mut().get_mut(&owner).filter(|_| owner != WORLD) {
            state.clock.offset += ahead;
        }
    }

    /// Ends a process: its tasks are gone, and what their destructors start is dropped.
    pub(crate) fn kill(&self, owner: Owner) {
        if let Some(state) = self.owners.borrow_mut().get_mut(&owner) {
            state.alive = false;
            state.held.clear();
        }
        let count = self.slots.borrow().len();
        for slot in 0..count {
            let task = {
                let mut slots = self.slots.borrow_mut();
                if slots[slot].task.as_ref().is_none_or(|task| task.owner != owner) {
                    continue;
                }
                slots[slot].task.take()
            };
            self.free.borrow_mut().push(slot);
            // A task that is being polled just now is dropped when its poll ends.
            if let Some(future) = task.and_then(|task| task.future) {
                self.drop_quietly(owner, future);
            }
        }
    }

    fn drop_quietly(&self, owner: Owner, future: LocalBoxFuture<'static, ()>) {
        let dropped = self.within(owner, || catch_unwind(AssertUnwindSafe(move || drop(future))));
        if let Err(panic) = dropped {
            self.note_panic(owner, &*panic);
        }
    }

    fn note_panic(&self, owner: Owner, panic: &(dyn std::any::Any + Send)) {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        let text = text.unwrap_or_else(|| "a panic without a message".to_owned());
        let place = PANICKED_AT.take();
        self.panics.borrow_mut().push(format!("boot {owner}, {place}: {text}"));
    }

    /// Does the next thing, if there is one not later than `until`.
    fn step(&self, until: u64) -> bool {
        let deferred = self.deferred.borrow_mut().pop_front();
        if let Some(work) = deferred {
            self.within(WORLD, work);
            return true;
        }
        if self.fire_timers(self.now.get()) {
            return true;
        }
        if let Some(key) = self.pick() {
            self.poll(key);
            return true;
        }
        let Some(next) = self.next_timer().filter(|at| *at <= until) else { return false };
        self.now.set(next.max(self.now.get()));
        true
    }

    fn next_timer(&self) -> Option<u64> {
        let mut timers = self.timers.borrow_mut();
        while timers.peek().is_some_and(|timer| timer.0.state.cancelled.get()) {
            timers.pop();
        }
        timers.peek().map(|timer| timer.0.at)
    }

    fn fire_timers(&self, now: u64) -> bool {
        let mut any = false;
        while self.next_timer().is_some_and(|at| at <= now) {
            let Some(Reverse(timer)) = self.timers.borrow_mut().pop() else { break };
            timer.state.fired.set(true);
            let waker = timer.state.waker.borrow_mut().take();
            if let Some(waker) = waker {
                waker.wake();
            }
            any = true;
        }
        any
    }

    fn pick(&self) -> Option<Key> {
        let mut ready = self.ready.lock().unwrap_or_else(PoisonError::into_inner);
        if self.fifo || ready.len() < 2 {
            return ready.pop_front();
        }
        let at = self.schedule.borrow_mut().below(ready.len() as u64) as usize;
        ready.swap_remove_back(at)
    }

    fn poll(&self, key: Key) {
        let (owner, mut future, waker) = {
            let mut slots = self.slots.borrow_mut();
            let slot = &mut slots[key.slot];
            let current = slot.generation == key.generation;
            let Some(task) = slot.task.as_mut().filter(|_| current) else { return };
            let mut owners = self.owners.borrow_mut();
            if let Some(state) = owners.get_mut(&task.owner).filter(|state| state.paused) {
                state.held.push(key);
                return;
            }
            task.waker.queued.store(false, Ordering::Relaxed);
            let Some(future) = task.future.take() else { return };
            (task.owner, future, Waker::from(task.waker.clone()))
        };
        self.polls.set(self.polls.get() + 1);
        self.now.set(self.now.get() + POLL_COST);
        let polled = self.within(owner, || {
            catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(&mut Context::from_waker(&waker))))
        });
        let pending = matches!(polled, Ok(Poll::Pending));
        if let Err(panic) = polled {
            self.note_panic(owner, &*panic);
        }
        {
            let mut slots = self.slots.borrow_mut();
            let slot = &mut slots[key.slot];
            if slot.generation == key.generation
                && let Some(task) = slot.task.as_mut()
            {
                if pending {
                    task.future = Some(future);
                    return;
                }
                slot.task = None;
                self.free.borrow_mut().push(key.slot);
            }
        }
        self.drop_quietly(owner, future);
    }

    /// Runs until `until`, or until `stop` says so.
    pub(crate) fn run_until(&self, until: u64, mut stop: impl FnMut() -> bool) {
        while !stop() && self.time() <= until && self.step(until) {}
        if !stop() {
            self.now.set(self.now.get().max(until));
        }
    }

    /// Drops every task: the end of the simulation.
    pub(crate) fn end(&self) {
        let owners: Vec<Owner> = self.owners.borrow().keys().rev().copied().collect();
        for owner in owners {
            self.kill(owner);
        }
        self.timers.borrow_mut().clear();
        self.deferred.borrow_mut().clear();
    }
}

impl Driver for Executor {
    fn now(&self) -> Instant {
        let owners = self.owners.borrow();
        let clock = owners.get(&self.current()).map(|state| state.clock).unwrap_or_default();
        Instant(clock.shows(self.time()))
    }

    fn spawn(&self, _name: &'static str, task: LocalBoxFuture<'static, ()>) {
        self.spawn_for(self.current(), task);
    }

    fn sleep_until(&self, deadline: Instant) -> LocalBoxFuture<'static, ()> {
        let owner = self.current();
        let clock = self.owners.borrow().get(&owner).map(|state| state.clock).unwrap_or_default();
        let slack = if owner == WORLD { 0 } else { self.slack.borrow_mut().below(TIMER_SLACK) };
        Box::pin(self.sleep_until_time(clock.at(deadline.0).saturating_add(slack)))
    }

    fn random_u64(&self) -> u64 {
        let mut owners = self.owners.borrow_mut();
        let state = owners.get_mut(&self.current.get());
        state.expect("a task belongs to an owner that was added").random.next()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_turns_back_what_it_shows() {
        for drift_ppm in [-10_000, 0, 3, 10_000] {
            let clock = Clock { offset: 77, drift_ppm };
            for at in [0, 1, 999, 5 * SECOND + 3] {
                let shown = clock.shows(at);
                assert!(clock.at(shown) <= at && clock.shows(clock.at(shown)) >= shown);
            }
        }
    }

    #[test]
    fn a_killed_owner_is_muted_and_a_paused_one_goes_on_later() {
        let executor = Executor::new(1, false);
        let log: Rc<RefCell<Vec<Owner>>> = Rc::default();
        for owner in [1, 2] {
            executor.add_owner(owner, Clock::default());
            let (log, within) = (log.clone(), executor.clone());
            let ticks = async move {
                loop {
                    within.sleep_for(SECOND).await;
                    log.borrow_mut().push(owner);
                }
            };
            executor.spawn_for(owner, Box::pin(ticks));
        }
        executor.set_paused(2, true);
        executor.run_until(2 * SECOND + MILLISECOND, || false);
        assert_eq!(*log.borrow(), [1, 1]);
        executor.kill(1);
        executor.set_paused(2, false);
        // Its first second begins when it is polled for the first time, after the pause.
        executor.run_until(3 * SECOND + 2 * MILLISECOND, || false);
        assert_eq!(*log.borrow(), [1, 1, 2]);
        executor.spawn_for(1, Box::pin(async { unreachable!("a dead owner starts nothing") }));
        executor.run_until(4 * SECOND, || false);
        assert!(executor.take_panics().is_empty());
        executor.end();
    }
}
