//! The scripts: a file per fault, named by the fault.

use crate::step::Script;

mod bad_clocks;
mod leader_in_the_minority;
mod membership_change;
mod one_way_partition;
mod partial_partition;
mod rebuild_interrupted;
mod removed_replica;
mod retry_storm;
mod zone_lost_and_back;

/// All of them.
pub fn all() -> Vec<Script> {
    let mut all = vec![
        leader_in_the_minority::script(),
        zone_lost_and_back::script(),
        removed_replica::script(),
        retry_storm::script(),
    ];
    all.extend(one_way_partition::scripts());
    all.extend(partial_partition::scripts());
    all.extend(bad_clocks::scripts());
    all.extend(membership_change::scripts());
    all.extend(rebuild_interrupted::scripts());
    all
}

/// The one of this name.
pub fn named(name: &str) -> Option<Script> {
    all().into_iter().find(|script| script.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_are_unique_and_every_script_has_a_row_and_a_check_of_its_own() {
        let all = all();
        let names: BTreeSet<&str> = all.iter().map(|script| script.name).collect();
        assert_eq!(names.len(), all.len());
        for script in all {
            assert!(!script.rows.is_empty(), "{} has no row", script.name);
            let checks = |step: &crate::Step| !matches!(step, crate::Step::Do(_) | crate::Step::Let(_));
            assert!(script.steps.iter().any(checks), "{} demands nothing", script.name);
        }
    }
}
