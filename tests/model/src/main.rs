//! `cargo xtask model`: checks every model, and shows that each way to break it is found.

use std::process::ExitCode;

use clap::Parser;
use holdfast_model::cases::{CASES, Case};
use holdfast_model::check::Outcome;

/// Checks the models.
#[derive(Parser)]
struct Arguments {
    /// Larger sizes, too; takes minutes.
    #[arg(long)]
    deep: bool,
    /// Only this model; may be repeated.
    #[arg(long)]
    only: Vec<String>,
}

fn figures(outcome: &Outcome) -> String {
    format!("{:9} states, depth {:2}, {:6.1} s", outcome.states, outcome.depth, outcome.took.as_secs_f64())
}

fn check(case: &Case, deep: bool) -> bool {
    println!("== {}: {}", case.name, case.what);
    let mut passed = true;
    let larger = if deep { case.deep } else { &[] };
    for run in case.small.iter().chain(larger) {
        let outcome = run();
        let verdict = if outcome.holds() { "holds" } else { "FAILED" };
        println!("{verdict:32} {}", figures(&outcome));
        passed &= outcome.holds();
        for violation in &outcome.violations {
            println!("  {} does not hold:\n    {}", violation.property, violation.steps.join("\n    "));
        }
        for never in &outcome.never {
            println!("  never seen: {never}");
        }
    }
    for variant in case.broken {
        let outcome = (variant.run)(variant.breaks);
        let found =
            outcome.violations.iter().find(|violation| violation.property.starts_with(variant.breaks));
        println!("{:32} {}: {}", variant.name, figures(&outcome), variant.what);
        match found {
            Some(violation) => println!("  {}: {}", violation.property, violation.steps.join("; ")),
            None => println!("  NOT FOUND: {:?}", outcome.violations),
        }
        passed &= found.is_some();
    }
    passed
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let chosen =
        |case: &&Case| arguments.only.is_empty() || arguments.only.iter().any(|name| name == case.name);
    let chosen: Vec<&Case> = CASES.iter().filter(chosen).collect();
    if chosen.is_empty() {
        let known: Vec<&str> = CASES.iter().map(|case| case.name).collect();
        eprintln!("there is no such model; there are: {}", known.join(", "));
        return ExitCode::from(2);
    }
    let failed = chosen.iter().filter(|case| !check(case, arguments.deep)).count();
    println!("{} models passed, {failed} failed", chosen.len() - failed);
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
