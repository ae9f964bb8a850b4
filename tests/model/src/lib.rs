//! Models of the rules that safety rests on, checked exhaustively in a small scope. See `docs/model.md`.

pub mod cases;
pub mod check;
pub mod fence;
pub mod membership;
pub mod raft;
pub mod reach;
pub mod recovery;
pub mod silence;
#[cfg(test)]
mod tests;
pub mod witness;

use std::cell::Cell;

thread_local! {
    static PLANTED: Cell<Option<&'static str>> = const { Cell::new(None) };
}

/// Plants one fault of the product's rules, or none, on this thread: the checker's.
pub(crate) fn plant(fault: Option<&'static str>) {
    if PLANTED.replace(fault) != fault {
        holdfast_protocol::planted::plant(fault.as_slice());
    }
}
