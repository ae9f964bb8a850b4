//! The real environment: tokio's single-threaded runtime, the kernel's clock and randomness, and files.

pub mod breaking;
pub mod disk;
mod names;
pub mod powercut;
mod replace;
mod uring;

use std::cell::RefCell;
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::LocalBoxFuture;
use rand::TryRng;
use rustix::time::{ClockId, clock_gettime};

use crate::driver::{Driver, Instant, install};
pub use replace::{replace_file, sync_directory};

/// The driver of a real shard.
pub struct RealDriver {
    random: RefCell<rand::rngs::SysRng>,
}

impl RealDriver {
    /// A driver for the current thread's tokio `LocalSet`.
    pub fn new() -> Rc<Self> {
        Rc::new(Self { random: RefCell::new(rand::rngs::SysRng) })
    }
}

impl Driver for RealDriver {
    fn now(&self) -> Instant {
        // Counts on while the machine is suspended, so that a lease does not outlive a nap.
        let now = clock_gettime(ClockId::Boottime);
        Instant(now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64)
    }

    fn spawn(&self, _name: &'static str, task: LocalBoxFuture<'static, ()>) {
        tokio::task::spawn_local(task);
    }

    fn sleep_until(&self, deadline: Instant) -> LocalBoxFuture<'static, ()> {
        let duration = deadline.since(self.now());
        Box::pin(async move {
            if duration > Duration::ZERO {
                tokio::time::sleep(duration).await;
            }
        })
    }

    fn random_u64(&self) -> u64 {
        let random = self.random.borrow_mut().try_next_u64();
        random.expect("the kernel's randomness is available once the machine has booted")
    }
}

/// Runs a shard: `future`, and everything that it spawns, on this thread.
pub fn run<F: Future>(future: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("the kernel gives a thread its event queue");
    let tasks = tokio::task::LocalSet::new();
    let before = install(Some(RealDriver::new()));
    let output = tasks.block_on(&runtime, future);
    // Tasks are dropped while the driver is still there: their destructors may look at the clock.
    drop(tasks);
    install(before);
    output
}
