//! The read floor and the numbers of requests in flight.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;

use holdfast_types::{LogIndex, Seq};

/// The index below which no read may be answered: the attach index, every acknowledged index, and the applied index
/// that came with every read. Never falls.
#[derive(Debug)]
pub(crate) struct Floor(Cell<LogIndex>);

impl Floor {
    pub(crate) fn new(index: LogIndex) -> Self {
        Self(Cell::new(index))
    }
    pub(crate) fn get(&self) -> LogIndex {
        self.0.get()
    }
    pub(crate) fn raise(&self, index: LogIndex) {
        self.0.set(self.0.get().max(index));
    }
}

/// Numbers of the requests that the session still waits for.
#[derive(Debug)]
pub(crate) struct InFlight {
    next: Cell<Seq>,
    waiting: RefCell<BTreeSet<Seq>>,
}

impl InFlight {
    pub(crate) fn new(first: Seq) -> Self {
        Self { next: Cell::new(first), waiting: RefCell::default() }
    }
    /// A new number, waited for until [`Self::done`].
    pub(crate) fn begin(&self) -> Seq {
        let seq = self.next.get();
        self.next.set(seq.next());
        self.waiting.borrow_mut().insert(seq);
        seq
    }
    /// The request is answered or given up.
    pub(crate) fn done(&self, seq: Seq) {
        self.waiting.borrow_mut().remove(&seq);
    }
    /// The lowest number still waited for; nothing below it may land any more (INV-LATE).
    pub(crate) fn oldest(&self) -> Seq {
        self.waiting.borrow().first().copied().unwrap_or(self.next.get())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn oldest_is_the_lowest_still_waited_for() {
        let flight = InFlight::new(Seq(1));
        let (a, b, c) = (flight.begin(), flight.begin(), flight.begin());
        assert_eq!(flight.oldest(), a);
        flight.done(b);
        assert_eq!(flight.oldest(), a);
        flight.done(a);
        assert_eq!(flight.oldest(), c);
        flight.done(c);
        assert_eq!(flight.oldest(), Seq(4));
    }
}
