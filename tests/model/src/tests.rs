//! Each model in its small size holds, and each way to break it is found.

use crate::cases::CASES;

fn case(name: &str) -> &'static crate::cases::Case {
    CASES.iter().find(|case| case.name == name).expect("there is a model of that name")
}

fn holds(name: &str) {
    for run in case(name).small {
        let outcome = run();
        assert!(outcome.holds(), "{name}: {outcome:#?}");
        assert!(outcome.states > 100, "{name}: {} states say nothing", outcome.states);
    }
}

fn every_variant_is_found(name: &str) {
    for variant in case(name).broken {
        let outcome = (variant.run)(variant.breaks);
        let found = outcome.violations.iter().any(|violation| violation.property.starts_with(variant.breaks));
        assert!(found, "{name} with {}: {outcome:#?}", variant.name);
    }
}

#[test]
fn the_model_of_attach_lease_and_fence_holds() {
    holds("fence");
}

#[test]
fn every_broken_variant_of_attach_lease_and_fence_is_found() {
    every_variant_is_found("fence");
}

#[test]
fn the_model_of_the_voters_lease_holds() {
    holds("silence");
}

#[test]
fn every_broken_variant_of_the_voters_lease_is_found() {
    every_variant_is_found("silence");
}

#[test]
fn the_model_of_membership_holds() {
    holds("membership");
}

#[test]
fn every_broken_variant_of_membership_is_found() {
    every_variant_is_found("membership");
}

#[test]
fn the_model_of_a_witness_holds() {
    holds("witness");
}

#[test]
fn every_broken_variant_of_a_witness_is_found() {
    every_variant_is_found("witness");
}

#[test]
fn the_model_of_forced_recovery_holds() {
    holds("recovery");
}

#[test]
fn every_broken_variant_of_forced_recovery_is_found() {
    every_variant_is_found("recovery");
}
