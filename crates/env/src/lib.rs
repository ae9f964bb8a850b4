//! The injected environment: time, tasks, randomness, disk and network.
//!
//! Everything on the data path sees the outside only through this crate. Time, tasks and randomness come from the
//! [`Driver`] that is installed on the current thread ([`install`]); disks and networks are objects
//! ([`disk::Directory`], [`net::Network`]) handed to whoever needs them. The real driver ([`real`]) stands on a
//! single-threaded tokio runtime; the simulator (`tests/sim`) installs its own, so the same code runs on simulated
//! time, disk and network from one seed. Tokio's `sync` types need no runtime and are allowed (except `watch`, whose
//! choice of waiter is random); every other tokio type stays inside [`real`] and the layers above the data path.
//!
//! **Architecture invariant:** nothing here knows what is stored or sent.

pub mod disk;
mod driver;
pub mod net;
pub mod real;
pub mod runtime;
mod watch;

pub use driver::{
    Driver, Elapsed, Instant, JoinError, JoinHandle, Sleep, install, random_u64, random_u128, sleep,
    sleep_until, spawn, timeout, yield_now,
};
pub use runtime::Runtime;
