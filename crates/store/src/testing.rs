//! For tests: planted faults, and a directory in memory that can lose and tear what was not flushed.

use std::cell::RefCell;

/// Every fault that can be planted in a store.
pub const KNOWN: [&str; 4] =
    ["skip-journal-flush", "move-unflushed-home", "checkpoint-before-home-flush", "page-in-place"];

thread_local! {
    static PLANTED: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// Plants faults by name on this thread, instead of those before.
///
/// # Panics
/// On a name that is not in [`KNOWN`]: a test that plants nothing would prove nothing.
pub fn plant(names: &[&str]) {
    for name in names {
        assert!(KNOWN.contains(name), "no fault of a store is named '{name}'; known are {KNOWN:?}");
    }
    PLANTED.with(|planted| *planted.borrow_mut() = names.iter().map(|name| (*name).to_owned()).collect());
}

/// Whether a fault is planted on this thread.
pub fn is_planted(name: &str) -> bool {
    PLANTED.with(|planted| planted.borrow().iter().any(|known| known == name))
}
