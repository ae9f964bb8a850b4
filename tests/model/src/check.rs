//! Runs a model through the checker and tells what came out.

use std::fmt::{Debug, Display};
use std::hash::Hash;
use std::time::{Duration, Instant};

use stateright::{Checker, Expectation, HasDiscoveries, Model};

/// Steps that lead to a state in which a property does not hold, shortest first found.
#[derive(Debug)]
pub struct Counterexample {
    /// The property.
    pub property: &'static str,
    /// What happens, one line each.
    pub steps: Vec<String>,
}

/// What a run found.
#[derive(Debug)]
pub struct Outcome {
    /// Distinct states.
    pub states: usize,
    /// Steps of the longest path.
    pub depth: usize,
    /// How long it took.
    pub took: Duration,
    /// The properties that do not hold.
    pub violations: Vec<Counterexample>,
    /// What the model says should be possible, and never happened: it would prove nothing.
    pub never: Vec<&'static str>,
}

impl Outcome {
    /// Whether every property holds and everything that should happen does.
    pub fn holds(&self) -> bool {
        self.violations.is_empty() && self.never.is_empty()
    }
}

/// Checks a model: every state, or until a property fails whose name begins so. Breadth first, on one thread: what is
/// found is short, and the same in each run.
pub fn check<M>(model: M, until: Option<&str>) -> Outcome
where
    M: Model + Send + Sync + 'static,
    M::State: Clone + Debug + Hash + PartialEq + Send + Sync + 'static,
    M::Action: Clone + Debug + Display + PartialEq + Send + Sync + 'static,
{
    let began = Instant::now();
    let expected: Vec<(&'static str, Expectation)> =
        model.properties().iter().map(|property| (property.name, property.expectation.clone())).collect();
    let mut checker = model.checker();
    if let Some(until) = until {
        let names = expected.iter().map(|(name, _)| *name).filter(|name| name.starts_with(until));
        checker = checker.finish_when(HasDiscoveries::AllOf(names.take(1).collect()));
    }
    let checked = checker.spawn_bfs().join();
    let mut violations = Vec::new();
    let mut never = Vec::new();
    for (name, expectation) in expected {
        match checked.discovery(name) {
            Some(path) if expectation.discovery_is_failure() => {
                let steps = path.into_actions().iter().map(ToString::to_string).collect();
                violations.push(Counterexample { property: name, steps });
            }
            None if !expectation.discovery_is_failure() => never.push(name),
            _ => {}
        }
    }
    Outcome {
        states: checked.unique_state_count(),
        depth: checked.max_depth(),
        took: began.elapsed(),
        violations,
        never,
    }
}
