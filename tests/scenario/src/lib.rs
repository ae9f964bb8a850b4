//! A language for faults: what is done to a cluster and what must come of it, as data, so that the same script is
//! played in the deterministic simulation and on real processes.
//!
//! [`cluster`] begins a script, [`scripts::all`] has all of them, a small file per fault, named by the fault. A backend
//! ([`Backend`]) carries out deeds and answers conditions; [`play`] is the same for all of them. What a backend cannot
//! do is said by the script itself ([`Script::only`]) and shown in the listing: nothing is skipped in silence.
//!
//! Every script ends with the same checks as everything else: every block's history is one that a disk may have
//! ([`history`]), no request hangs, and the replicas are equal.

pub mod history;
pub mod scripts;

mod builder;
mod play;
mod step;

pub use builder::{Builder, cluster, milliseconds, seconds};
pub use play::{Backend, play};
pub use step::{Condition, Deed, NodeName, Nodes, Only, Script, Step};

/// Spreads a number's bits.
pub fn mix(value: u64) -> u64 {
    let z = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
