//! One reader of the store's bytes under libFuzzer: the one that `HOLDFAST_FUZZ` names.
#![no_main]

use std::sync::OnceLock;

use holdfast_store::testing::fuzz::{TARGETS, Target};
use libfuzzer_sys::fuzz_target;

static CHOSEN: OnceLock<Target> = OnceLock::new();

fn chosen() -> Target {
    let known: Vec<&str> = TARGETS.iter().map(|(name, _)| *name).collect();
    let name = std::env::var("HOLDFAST_FUZZ").unwrap_or_default();
    match TARGETS.iter().find(|(target, _)| *target == name) {
        Some((_, target)) => *target,
        None => panic!("HOLDFAST_FUZZ must name one of {known:?}, not '{name}'"),
    }
}

fuzz_target!(|input: &[u8]| CHOSEN.get_or_init(chosen)(input));
