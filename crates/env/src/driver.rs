//! Tasks, time and randomness of the current thread.

use std::cell::RefCell;
use std::future::Future;
use std::ops::{Add, Sub};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::LocalBoxFuture;
use tokio::sync::oneshot;

/// A point in monotonic time of this node, in nanoseconds since an arbitrary origin (CLOCK_BOOTTIME when real).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Hash)]
pub struct Instant(pub u64);

impl Instant {
    /// Now, on the installed driver's clock.
    pub fn now() -> Self {
        with(|driver| driver.now())
    }
    /// Time since `earlier`; zero if `earlier` is later.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Instant {
    type Output = Self;
    fn add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)))
    }
}
impl Sub<Duration> for Instant {
    type Output = Self;
    fn sub(self, duration: Duration) -> Self {
        Self(self.0.saturating_sub(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)))
    }
}
impl Sub for Instant {
    type Output = Duration;
    fn sub(self, earlier: Self) -> Duration {
        self.since(earlier)
    }
}

/// What a thread's environment provides.
pub trait Driver {
    /// The current time.
    fn now(&self) -> Instant;
    /// Runs `task` on this thread until it ends. `name` is for diagnosis.
    fn spawn(&self, name: &'static str, task: LocalBoxFuture<'static, ()>);
    /// Ends at or after `deadline`. Dropping the future cancels the timer.
    fn sleep_until(&self, deadline: Instant) -> LocalBoxFuture<'static, ()>;
    /// A random number: cryptographically strong when real, from the seed when simulated.
    fn random_u64(&self) -> u64;
}

thread_local! {
    static DRIVER: RefCell<Option<Rc<dyn Driver>>> = const { RefCell::new(None) };
}

/// Installs the driver of this thread and returns the one before it.
pub fn install(driver: Option<Rc<dyn Driver>>) -> Option<Rc<dyn Driver>> {
    DRIVER.with(|slot| slot.replace(driver))
}

fn with<T>(use_driver: impl FnOnce(&dyn Driver) -> T) -> T {
    let driver = DRIVER.with(|slot| slot.borrow().clone());
    let driver = driver.expect("an environment driver is installed on this thread before any task runs");
    use_driver(&*driver)
}

/// Random 64 bits from the installed driver.
pub fn random_u64() -> u64 {
    with(|driver| driver.random_u64())
}

/// Random 128 bits from the installed driver; never zero, which stands for "none".
pub fn random_u128() -> u128 {
    let value = (u128::from(random_u64()) << 64) | u128::from(random_u64());
    value.max(1)
}

/// The result of a spawned task. Dropping the handle lets the task run on.
pub struct JoinHandle<T>(oneshot::Receiver<T>);

/// The task ended without a result: it panicked, or its runtime stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the task ended without a result")]
pub struct JoinError;

impl<T> Future for JoinHandle<T> {
    type Output = Result<T, JoinError>;
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(context).map(|result| result.map_err(|_| JoinError))
    }
}

/// Runs `task` on this thread. `name` is for diagnosis.
pub fn spawn<T: 'static>(name: &'static str, task: impl Future<Output = T> + 'static) -> JoinHandle<T> {
    let (sender, receiver) = oneshot::channel();
    with(|driver| {
        driver.spawn(
            name,
            Box::pin(async move {
                // A dropped handle is no error: the task's effects are what matters then.
                let _ = sender.send(task.await);
            }),
        )
    });
    JoinHandle(receiver)
}

/// A wait for a point in time.
pub struct Sleep(SleepState);

enum SleepState {
    Yield { polled: bool },
    Timer(LocalBoxFuture<'static, ()>),
}

/// Sleeps shorter than this only yield: timers round up to a millisecond, which would stall openraft's 1 µs waits.
const YIELD_BELOW: Duration = Duration::from_micros(100);

impl Future for Sleep {
    type Output = ();
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        match &mut self.0 {
            SleepState::Yield { polled } => {
                if *polled {
                    return Poll::Ready(());
                }
                *polled = true;
                context.waker().wake_by_ref();
                Poll::Pending
            }
            SleepState::Timer(timer) => timer.as_mut().poll(context),
        }
    }
}

/// Waits for `duration`; below 100 µs only yields to other tasks.
pub fn sleep(duration: Duration) -> Sleep {
    if duration < YIELD_BELOW {
        return yield_now();
    }
    Sleep(SleepState::Timer(with(|driver| driver.sleep_until(driver.now() + duration))))
}

/// Waits until `deadline`.
pub fn sleep_until(deadline: Instant) -> Sleep {
    sleep(deadline.since(Instant::now()))
}

/// Lets other tasks of this thread run.
pub fn yield_now() -> Sleep {
    Sleep(SleepState::Yield { polled: false })
}

/// The deadline of a [`timeout`] has passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the deadline has passed")]
pub struct Elapsed;

/// Runs `future` for at most `duration`, then drops it.
pub async fn timeout<F: Future>(duration: Duration, future: F) -> Result<F::Output, Elapsed> {
    let mut future = std::pin::pin!(future);
    let mut deadline = sleep(duration);
    std::future::poll_fn(move |context| {
        if let Poll::Ready(output) = future.as_mut().poll(context) {
            return Poll::Ready(Ok(output));
        }
        Pin::new(&mut deadline).poll(context).map(|()| Err(Elapsed))
    })
    .await
}
