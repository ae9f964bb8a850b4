//! For tests: planted faults, and a directory in memory that can lose and tear what was not flushed.

use std::cell::RefCell;

thread_local! {
    static PLANTED: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// Plants faults by name on this thread, instead of those before.
pub fn plant(names: &[&str]) {
    PLANTED.with(|planted| *planted.borrow_mut() = names.iter().map(|name| (*name).to_owned()).collect());
}

/// Whether a fault is planted on this thread.
pub fn is_planted(name: &str) -> bool {
    PLANTED.with(|planted| planted.borrow().iter().any(|known| known == name))
}
