//! A driver of virtual time on one thread: what would sleep is woken at once, in the order of its deadlines.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use futures_util::future::LocalBoxFuture;
use holdfast_env::{Driver, Instant, install};

/// Numbers from a seed (splitmix64).
#[derive(Debug)]
pub struct Random(Cell<u64>);

impl Random {
    /// The numbers of a seed.
    pub fn new(seed: u64) -> Self {
        Self(Cell::new(seed))
    }
    /// The next one.
    pub fn next(&self) -> u64 {
        let state = self.0.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.0.set(state);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
    /// The next one, below `bound`.
    pub fn below(&self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }
    /// True once in `n` times.
    pub fn one_in(&self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// Rounds after which a run is taken for one that never ends.
const TURNS_MAX: u64 = 5_000_000;

struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

struct Task {
    future: LocalBoxFuture<'static, ()>,
    flag: Arc<Flag>,
}

struct Virtual {
    now: Cell<u64>,
    timers: Rc<RefCell<BTreeMap<(u64, u64), Waker>>>,
    timer_count: Cell<u64>,
    spawned: RefCell<Vec<Task>>,
    random: Random,
}

impl Driver for Virtual {
    fn now(&self) -> Instant {
        Instant(self.now.get())
    }
    fn spawn(&self, _name: &'static str, task: LocalBoxFuture<'static, ()>) {
        let flag = Arc::new(Flag(AtomicBool::new(true)));
        self.spawned.borrow_mut().push(Task { future: task, flag });
    }
    fn sleep_until(&self, deadline: Instant) -> LocalBoxFuture<'static, ()> {
        let id = self.timer_count.get();
        self.timer_count.set(id + 1);
        Box::pin(Timer { key: (deadline.0, id), timers: self.timers.clone(), registered: false })
    }
    fn random_u64(&self) -> u64 {
        self.random.next()
    }
}

struct Timer {
    key: (u64, u64),
    timers: Rc<RefCell<BTreeMap<(u64, u64), Waker>>>,
    registered: bool,
}

impl Future for Timer {
    type Output = ();
    fn poll(mut self: std::pin::Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let is_there = self.timers.borrow().contains_key(&self.key);
        if self.registered && !is_there {
            return Poll::Ready(());
        }
        self.registered = true;
        self.timers.borrow_mut().insert(self.key, context.waker().clone());
        Poll::Pending
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.timers.borrow_mut().remove(&self.key);
    }
}

/// Runs `future`, and everything that it spawns, on virtual time; then everything is dropped, as at a kill.
///
/// # Panics
/// If nothing can go on: the code under test hangs.
pub fn simulate<F: Future>(seed: u64, future: F) -> F::Output {
    let driver = Rc::new(Virtual {
        now: Cell::new(0),
        timers: Rc::default(),
        timer_count: Cell::new(0),
        spawned: RefCell::default(),
        random: Random::new(seed),
    });
    let before = install(Some(driver.clone()));
    let output = drive(&driver, future);
    let rest = driver.spawned.take();
    drop(rest);
    install(before);
    output
}

fn drive<F: Future>(driver: &Virtual, future: F) -> F::Output {
    let mut main = pin!(future);
    let main_flag = Arc::new(Flag(AtomicBool::new(true)));
    let mut tasks: Vec<Task> = Vec::new();
    for _ in 0..TURNS_MAX {
        let mut moved = false;
        if main_flag.0.swap(false, Ordering::Relaxed) {
            moved = true;
            let waker = Waker::from(main_flag.clone());
            if let Poll::Ready(output) = main.as_mut().poll(&mut Context::from_waker(&waker)) {
                return output;
            }
        }
        tasks.append(&mut driver.spawned.borrow_mut());
        tasks.retain_mut(|task| {
            if !task.flag.0.swap(false, Ordering::Relaxed) {
                return true;
            }
            moved = true;
            let waker = Waker::from(task.flag.clone());
            task.future.as_mut().poll(&mut Context::from_waker(&waker)).is_pending()
        });
        if moved || !driver.spawned.borrow().is_empty() {
            continue;
        }
        let next = driver.timers.borrow_mut().pop_first();
        let ((deadline, _), waker) = next.expect("something can go on: no task is ready and no timer runs");
        driver.now.set(driver.now.get().max(deadline));
        waker.wake();
    }
    panic!("something turns and turns: {TURNS_MAX} rounds are enough for everything");
}
