//! Faults of a store that tests plant by name, to prove that they would be found.
//!
//! A thread begins with those that the variable `HOLDFAST_PLANTED` names, separated by commas, so that the ordinary
//! tests run with a fault in them: `cargo xtask mutants store` demands that one of them fails.

use std::cell::RefCell;

/// Read once by every thread that asks.
const VARIABLE: &str = "HOLDFAST_PLANTED";
/// Planted in `holdfast_types`.
const ADDRESS: &str = "address-not-in-checksum";

/// Faults that can be planted, and what each does.
pub const KNOWN: &[(&str, &str)] = &[
    // The journal's writer.
    ("skip-journal-flush", "a batch is acknowledged before it is on stable storage"),
    ("acknowledge-out-of-order", "a batch is acknowledged before those in front of it"),
    ("vote-not-flushed", "a vote is acknowledged before it is on stable storage"),
    ("failed-write-counts", "a batch that could not be written is acknowledged"),
    ("failed-write-goes-on", "a file of the store that could not be written does not stop it"),
    ("reuse-at-once", "a segment is overwritten before anything durable says that it is not needed"),
    ("release-at-once", "a segment is free before the cut that empties it is durable"),
    ("small-records-left", "votes and heads of entries are not copied out of a segment that is reused"),
    ("copy-what-was-cut", "a copy of an entry is written behind the word that cut it"),
    ("parked-logs-pin", "the log of a replica that does not run keeps its segments"),
    ("rubbish-behind-a-list", "a damaged payload is copied, so that its batch looks torn"),
    ("copy-undoes-repair", "an entry that leaves its segment is written behind its repair"),
    ("forget-cut", "what a recovery found void is void only once"),
    ("no-closing-mark", "nothing says that the last batch was flushed"),
    ("no-reserve", "entries fill the journal to its last segment"),
    // Admission.
    ("no-admission", "writers run freely until the line stops"),
    ("first-come", "who writes little waits for all that others have asked for before"),
    // Giving way.
    ("never-give-way", "the cleaner takes no notice of batches that it holds up"),
    ("never-hurry", "the cleaner gives way though the journal is filling up"),
    // Its recovery.
    ("recover-unflushed", "a recovery believes what may still be lost"),
    ("cut-faulty-entry", "an entry that was acknowledged and rotted is cut"),
    ("payload-unchecked", "a recovery calls every payload good"),
    ("forget-second-list", "a batch with one damaged list is lost"),
    ("trust-behind-a-hole", "a whole batch counts though the one before it is torn"),
    ("reuse-number", "a number of a void batch is given to another one"),
    ("forget-vote", "a recovery finds no vote"),
    ("forget-truncation", "a recovery brings back what was cut"),
    ("ignore-misplaced", "a batch at a wrong place is taken for a torn one"),
    ("forget-doubt", "it is not written down that part of the journal is unknown"),
    ("foreign-store", "the journal of another store is opened"),
    // What was destroyed.
    ("forget-destroyed", "a replica is destroyed and nothing says so"),
    ("destroyed-in-one-copy", "what was destroyed is forgotten when one copy rots"),
    // What was recovered.
    ("forget-recovery", "a replica is sealed or taken over and nothing says so"),
    ("late-take-over", "an old request lets a replica go on that was sealed or has halted since"),
    ("recovery-in-one-copy", "what was recovered is forgotten when one copy rots"),
    // The cleaner.
    ("move-unflushed-home", "a block is home of which the journal knows nothing"),
    ("home-before-commit", "a block is home that nothing durable calls committed"),
    ("commit-out-of-turn", "what overtakes the line calls entries committed that stand in it"),
    ("checkpoint-before-home-flush", "a checkpoint says home what was never flushed"),
    ("forget-hidden-runs", "a block is served of which an older version never came home"),
    ("trim-leaves-no-mark", "a chunk changes and its mark does not"),
    ("clean-while-rebuilding", "home changes while it is compared with a peer's"),
    ("keep-unnamed-files", "a rebuild takes the names of files that a failed pass goes on to write"),
    ("keep-what-was-taken", "a pass that finds no room keeps what it had taken"),
    // The budget.
    ("budget-not-kept", "room is taken and not counted while it is being taken"),
    ("budget-below-what-stands", "a budget that is smaller than what stands lets nothing be made room for"),
    ("refuse-within-a-file", "a write is refused whose room was taken before"),
    // Layers.
    ("trim-falls-through", "what was given back shows what an older layer holds"),
    ("merge-before-manifest", "a layer is merged while a durable checkpoint has the snapshot at its end"),
    ("empty-before-merged", "a layer is emptied before the older one has its blocks"),
    ("owners-not-told", "of whom a block is stays known though a table has changed"),
    ("owners-kept-late", "of whom blocks are is kept though a table changed while it was asked for"),
    // Manifest, table and home.
    ("manifest-in-place", "a torn manifest leaves no older one"),
    ("state-in-place", "a torn checkpoint of the catalog leaves no older one"),
    ("page-in-place", "a torn table page leaves no older copy"),
    ("one-table-copy", "a rotten table page is replaced by a stale one"),
    ("leave-copies-unequal", "after a crash a table page has one copy for good"),
    ("pages-of-no-list", "a manifest without a list of pages is read as if its list were empty"),
    ("forget-lost-pages", "when many pages change, it is forgotten which of them are new and which are lost"),
    ("serve-stale-page", "a table page of an older checkpoint is believed"),
    ("home-unchecked", "blocks of home are not compared with their checksums"),
    (ADDRESS, "a block is good at the place of another one"),
    ("foreign-replica", "the files of another replica are opened"),
    ("replica-not-named", "the files of a new replica have no durable names"),
    // Healing.
    ("heal-unchecked", "a block that is not what the table says is written over home"),
    ("restore-what-was-not-staged", "a lost page of which a rebuild brought a part is taken for whole"),
    ("adopt-anything", "a chunk of a replica that is behind or ahead is adopted"),
    (
        "adopt-without-floor",
        "what is adopted over a dropped snapshot is served under the snapshot after a crash",
    ),
    // A rebuild.
    ("summary-of-two-moments", "a chunk that moves while its mark is taken seems to be empty"),
    ("staging-not-named", "what is switched in has no durable name"),
    ("switch-before-flush", "what is switched in was never flushed"),
    ("staged-unchecked", "what rotted before it came home is given a new checksum"),
    ("keep-map-at-switch", "what the old log wrote shows through what is switched in"),
];

thread_local! {
    static PLANTED: RefCell<Vec<String>> = RefCell::new(of_environment());
}

fn of_environment() -> Vec<String> {
    let names = std::env::var(VARIABLE).unwrap_or_default();
    let known = |name: &&str| KNOWN.iter().any(|(known, _)| known == name);
    // Those of other crates are not ours to judge.
    let names: Vec<String> = names.split(',').filter(known).map(str::to_owned).collect();
    leave_address_out(&names);
    names
}

fn leave_address_out(names: &[String]) {
    holdfast_types::checksum::planted::leave_address_out(names.iter().any(|name| name == ADDRESS));
}

/// Plants faults by name on this thread, instead of those before.
///
/// # Panics
/// On a name that is not in [`KNOWN`]: a test that plants nothing would prove nothing.
pub fn plant(names: &[&str]) {
    for name in names {
        assert!(KNOWN.iter().any(|(known, _)| known == name), "no fault is named '{name}'");
    }
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    PLANTED.with(|planted| {
        leave_address_out(&names);
        *planted.borrow_mut() = names;
    });
}

/// Whether a fault is planted on this thread.
pub fn is_planted(name: &str) -> bool {
    PLANTED.with(|planted| planted.borrow().iter().any(|known| known == name))
}
