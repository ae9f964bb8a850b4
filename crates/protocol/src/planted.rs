//! Faults that tests plant by name to prove that they would be found. Compiled out of every release.

#[cfg(feature = "planted-bugs")]
thread_local! {
    static PLANTED: std::cell::RefCell<Vec<String>> = const { std::cell::RefCell::new(Vec::new()) };
}

/// Plants faults by name on this thread, instead of those before.
#[cfg(feature = "planted-bugs")]
pub fn plant(names: &[&str]) {
    PLANTED.with(|planted| *planted.borrow_mut() = names.iter().map(|name| (*name).to_owned()).collect());
}

/// Whether a fault is planted on this thread.
#[cfg(feature = "planted-bugs")]
pub fn is_planted(name: &str) -> bool {
    PLANTED.with(|planted| planted.borrow().iter().any(|known| known == name))
}

/// Whether a fault is planted: never, in a release.
#[cfg(not(feature = "planted-bugs"))]
pub const fn is_planted(_name: &str) -> bool {
    false
}
