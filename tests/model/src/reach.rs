//! Whether from every state that can be reached some path leads to a goal: that nothing is stuck.

use std::collections::BTreeMap;
use std::fmt::{Debug, Display};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Instant;

use stateright::Model;

use crate::check::{Counterexample, Outcome};

/// How a state was reached first.
struct Reached<A> {
    from: usize,
    action: Option<A>,
    depth: usize,
}

fn fingerprint(state: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    state.hash(&mut hasher);
    hasher.finish()
}

/// Looks at every state, breadth first, and then back from those that are a goal. What reaches none is a counter-example.
pub fn everywhere<M>(model: &M, property: &'static str, goal: impl Fn(&M::State) -> bool) -> Outcome
where
    M: Model,
    M::State: Hash,
    M::Action: Clone + Debug + Display,
{
    let began = Instant::now();
    let (mut known, mut reached, mut before) = (BTreeMap::new(), Vec::new(), Vec::<Vec<u32>>::new());
    let (mut round, mut open) = (Vec::new(), Vec::new());
    for state in model.init_states() {
        known.insert(fingerprint(&state), reached.len());
        round.push((reached.len(), state));
        reached.push(Reached { from: 0, action: None, depth: 0 });
        before.push(Vec::new());
    }
    while !round.is_empty() {
        let mut next_round = Vec::new();
        for (at, state) in round {
            if goal(&state) {
                open.push(at);
            }
            let mut actions = Vec::new();
            model.actions(&state, &mut actions);
            for action in actions {
                let Some(next) = model.next_state(&state, action.clone()) else { continue };
                let depth = reached[at].depth + 1;
                let to = *known.entry(fingerprint(&next)).or_insert_with(|| {
                    reached.push(Reached { from: at, action: Some(action), depth });
                    before.push(Vec::new());
                    next_round.push((reached.len() - 1, next));
                    reached.len() - 1
                });
                before[to].push(at as u32);
            }
        }
        round = next_round;
    }
    let mut leads = vec![false; reached.len()];
    open.iter().for_each(|at| leads[*at] = true);
    while let Some(at) = open.pop() {
        for from in &before[at] {
            if !std::mem::replace(&mut leads[*from as usize], true) {
                open.push(*from as usize);
            }
        }
    }
    let stuck = leads.iter().position(|leads| !leads);
    Outcome {
        states: reached.len(),
        depth: reached.iter().map(|reached| reached.depth).max().unwrap_or_default(),
        took: began.elapsed(),
        violations: stuck
            .map(|at| Counterexample { property, steps: steps(&reached, at) })
            .into_iter()
            .collect(),
        never: Vec::new(),
    }
}

fn steps<A: Display>(reached: &[Reached<A>], mut at: usize) -> Vec<String> {
    let mut steps = Vec::new();
    while let Some(action) = &reached[at].action {
        steps.push(action.to_string());
        at = reached[at].from;
    }
    steps.reverse();
    steps
}
