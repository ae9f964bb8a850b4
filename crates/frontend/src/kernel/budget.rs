//! How much of the kernel's requests is in memory at once, counted across threads.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// Requests of one device in flight.
pub(super) const REQUESTS_MAX: usize = 256;
/// Payload bytes of one device in flight, reads and writes.
pub(super) const BYTES_MAX: usize = 64 << 20;

#[derive(Default)]
struct State {
    requests: usize,
    bytes: usize,
    closed: bool,
}

/// Room for requests. The thread that takes them from the kernel waits here; what it has not taken waits in the
/// kernel.
#[derive(Default)]
pub(super) struct Budget {
    state: Mutex<State>,
    changed: Condvar,
}

/// Room that one request takes until it is dropped.
pub(super) struct Permit {
    budget: Arc<Budget>,
    bytes: usize,
}

impl Budget {
    /// Waits for room. `None` once the budget is closed.
    pub(super) fn take(self: &Arc<Self>, bytes: usize) -> Option<Permit> {
        // A request larger than everything passes alone.
        let bytes = bytes.min(BYTES_MAX);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while !state.closed && (state.requests >= REQUESTS_MAX || state.bytes + bytes > BYTES_MAX) {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.closed {
            return None;
        }
        state.requests += 1;
        state.bytes += bytes;
        Some(Permit { budget: self.clone(), bytes })
    }

    /// From now on nothing is let in, and nobody waits.
    pub(super) fn close(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).closed = true;
        self.changed.notify_all();
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut state = self.budget.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.requests -= 1;
        state.bytes -= self.bytes;
        drop(state);
        self.budget.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_let_in_beyond_the_bounds() {
        let budget = Arc::new(Budget::default());
        let half = budget.take(BYTES_MAX / 2).expect("there is room");
        let _other_half = budget.take(BYTES_MAX / 2).expect("there is room");
        let waiting = {
            let budget = budget.clone();
            std::thread::spawn(move || budget.take(1).is_some())
        };
        drop(half);
        assert!(waiting.join().expect("ends"), "room was made");

        let many: Vec<_> = (0..REQUESTS_MAX - 1).map_while(|_| budget.take(0)).collect();
        assert_eq!(many.len(), REQUESTS_MAX - 1);
        let waiting = {
            let budget = budget.clone();
            std::thread::spawn(move || budget.take(0).is_none())
        };
        budget.close();
        assert!(waiting.join().expect("ends"), "a closed budget lets nobody in and nobody wait");
    }
}
