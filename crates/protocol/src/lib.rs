//! The rules that make split-brain impossible, as pure state machines: input in, effects out. No I/O, no clock, no
//! async, no threads; time is an argument.
//!
//! [`command`] is what a volume's log holds, [`volume`] what applying it does (fencing, exactly-once), [`lease`] the
//! arithmetic of leases, [`timers`] how long they are and how that changes, [`rest`] when a group stops them; [`fence`] what
//! voters sign of that; [`snapshots`] which snapshots there are and what restoring one asks for; [`catalog`] and [`placement`] say which volumes there are and where they stand. A reader who wants to know whether two writers are possible reads this crate and nothing
//! else. The invariants are listed in `docs/INVARIANTS.md`.

pub mod catalog;
pub mod command;
pub mod fence;
pub mod lease;
pub mod placement;
pub mod planted;
pub mod refusal;
pub mod rest;
pub mod snapshots;
pub mod timers;
pub mod volume;
mod window;

#[cfg(test)]
mod tests;
