//! Keeps a long stall of the disk from wedging Raft for good.
//!
//! openraft waits for some storage calls in its core, and sends itself the news of their end through a bounded queue that
//! only the core empties. Its ticks go on meanwhile and fill that queue: after a stall long enough the core would wait for
//! room that nobody but itself can make. A core that waits can use no tick, so there are none.

use std::cell::Cell;
use std::rc::Rc;

use tokio::sync::Notify;

#[derive(Default)]
struct Shared {
    calls: Cell<u32>,
    closed: Cell<bool>,
    changed: Notify,
}

/// Ends the watch with the last handle of the log.
struct Owner(Rc<Shared>);

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.closed.set(true);
        self.0.changed.notify_waiters();
    }
}

/// Counts the storage calls that Raft's core waits for now. Cheap to clone; shared by all handles of a log.
#[derive(Clone)]
pub(crate) struct Stall(Rc<Owner>);

/// One call, from its begin to its end.
pub(crate) struct Waiting(Rc<Shared>);

impl Waiting {
    fn count(shared: &Shared, more: i32) {
        shared.calls.set(shared.calls.get().saturating_add_signed(more));
        shared.changed.notify_waiters();
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        Self::count(&self.0, -1);
    }
}

impl Stall {
    pub(crate) fn new() -> (Self, Stalled) {
        let shared = Rc::new(Shared::default());
        (Self(Rc::new(Owner(shared.clone()))), Stalled(shared))
    }

    /// Notes that the core waits until what is returned is dropped.
    pub(crate) fn waiting(&self) -> Waiting {
        Waiting::count(&self.0.0, 1);
        Waiting(self.0.0.clone())
    }
}

/// Sees whether the core waits. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Stalled(Rc<Shared>);

impl Stalled {
    /// Whether it waits now.
    pub(crate) fn waits(&self) -> bool {
        self.0.calls.get() > 0
    }

    /// Ends when the core waits, or does not; false when there is no log any more.
    pub(crate) async fn until(&self, waits: bool) -> bool {
        loop {
            let changed = self.0.changed.notified();
            if self.0.closed.get() || (self.0.calls.get() > 0) == waits {
                return !self.0.closed.get();
            }
            changed.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stall_lasts_until_its_last_call_ends() {
        holdfast_env::real::run(async {
            let (stall, stalled) = Stall::new();
            assert!(stalled.until(false).await);
            let (first, second) = (stall.waiting(), stall.waiting());
            assert!(stalled.until(true).await);
            drop(first);
            {
                let mut over = std::pin::pin!(stalled.until(false));
                assert!(futures_util::poll!(&mut over).is_pending());
                drop(second);
                assert!(over.await);
            }
            drop(stall);
            assert!(!stalled.until(true).await, "the log is gone, and so is who waits for it");
        });
    }
}
