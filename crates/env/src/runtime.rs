//! openraft's runtime over the installed driver: the same Raft code runs on real and on simulated time.

use std::convert::Infallible;
use std::fmt::{Debug, Display};
use std::future::Future;
use std::io;
use std::ops::{Add, AddAssign, Sub, SubAssign};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use openraft_rt::{AsyncRuntime, OptionalSend};
use openraft_rt_tokio::{TokioMpsc, TokioMutex, TokioOneshot};

use crate::driver::{self, Elapsed, JoinError, JoinHandle, Sleep};
use crate::watch::LocalWatch;

/// The runtime. Channels and the mutex are tokio's, which need no runtime of theirs.
#[derive(Debug)]
pub struct Runtime;

/// [`driver::Instant`] as openraft takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RaftInstant(driver::Instant);

/// Instants are counted from an origin far enough back that `now - timeout` never underflows.
const ORIGIN: Duration = Duration::from_secs(24 * 3600);

impl Add<Duration> for RaftInstant {
    type Output = Self;
    fn add(self, duration: Duration) -> Self {
        Self(self.0 + duration)
    }
}
impl AddAssign<Duration> for RaftInstant {
    fn add_assign(&mut self, duration: Duration) {
        self.0 = self.0 + duration;
    }
}
impl Sub<Duration> for RaftInstant {
    type Output = Self;
    fn sub(self, duration: Duration) -> Self {
        Self(self.0 - duration)
    }
}
impl SubAssign<Duration> for RaftInstant {
    fn sub_assign(&mut self, duration: Duration) {
        self.0 = self.0 - duration;
    }
}
impl Sub for RaftInstant {
    type Output = Duration;
    fn sub(self, earlier: Self) -> Duration {
        self.0.since(earlier.0)
    }
}
impl openraft_rt::Instant for RaftInstant {
    fn now() -> Self {
        Self(driver::Instant::now() + ORIGIN)
    }
}

/// A future with a deadline.
pub struct Timeout<F> {
    future: Pin<Box<F>>,
    deadline: Sleep,
}

impl<F: Future> Future for Timeout<F> {
    type Output = Result<F::Output, Elapsed>;
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if let Poll::Ready(output) = self.future.as_mut().poll(context) {
            return Poll::Ready(Ok(output));
        }
        Pin::new(&mut self.deadline).poll(context).map(|()| Err(Elapsed))
    }
}

/// Randomness from the driver.
#[derive(Debug)]
pub struct DriverRng;

impl rand::TryRng for DriverRng {
    type Error = Infallible;
    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        Ok(driver::random_u64() as u32)
    }
    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        Ok(driver::random_u64())
    }
    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Infallible> {
        for part in bytes.chunks_mut(8) {
            let random = driver::random_u64().to_le_bytes();
            part.copy_from_slice(&random[..part.len()]);
        }
        Ok(())
    }
}

impl AsyncRuntime for Runtime {
    type JoinError = JoinError;
    type JoinHandle<T: OptionalSend + 'static> = JoinHandle<T>;
    type Sleep = Sleep;
    type Instant = RaftInstant;
    type TimeoutError = Elapsed;
    type Timeout<R, T: Future<Output = R> + OptionalSend> = Timeout<T>;
    type ThreadLocalRng = DriverRng;
    type Mpsc = TokioMpsc;
    type Watch = LocalWatch;
    type Oneshot = TokioOneshot;
    type Mutex<T: OptionalSend + 'static> = TokioMutex<T>;

    fn spawn<T>(future: T) -> JoinHandle<T::Output>
    where
        T: Future + OptionalSend + 'static,
        T::Output: OptionalSend + 'static,
    {
        driver::spawn("openraft", future)
    }
    fn sleep(duration: Duration) -> Sleep {
        driver::sleep(duration)
    }
    fn sleep_until(deadline: RaftInstant) -> Sleep {
        driver::sleep_until(deadline.0 - ORIGIN)
    }
    fn timeout<R, F: Future<Output = R> + OptionalSend>(duration: Duration, future: F) -> Timeout<F> {
        Timeout { future: Box::pin(future), deadline: driver::sleep(duration) }
    }
    fn timeout_at<R, F: Future<Output = R> + OptionalSend>(deadline: RaftInstant, future: F) -> Timeout<F> {
        Timeout { future: Box::pin(future), deadline: Self::sleep_until(deadline) }
    }
    fn is_panic(_error: &JoinError) -> bool {
        // A task that ended without a result has panicked or was dropped with its shard; either is final.
        true
    }
    fn thread_rng() -> DriverRng {
        DriverRng
    }
    fn new(_threads: usize) -> Self {
        Self
    }
    fn block_on<F, T>(&mut self, future: F) -> T
    where
        F: Future<Output = T>,
    {
        crate::real::run(future)
    }
    #[allow(clippy::manual_async_fn, reason = "the trait asks for Send")]
    fn spawn_blocking<F, T>(work: F) -> impl Future<Output = Result<T, io::Error>> + Send
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        // Nothing on the data path blocks; openraft itself calls this nowhere with the storage that it is given.
        std::future::ready(Ok(work()))
    }
}

const _: fn() = || {
    fn displayed<T: Debug + Display>() {}
    displayed::<JoinError>();
};

#[cfg(test)]
mod tests {
    #[test]
    fn conforms_to_openraft() {
        openraft_rt::testing::Suite::<super::Runtime>::test_all();
    }
}
