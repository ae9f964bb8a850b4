//! Scripts of `holdfast_scenario`, played in the simulation: the deeds are done to its world, the guests are its own.

mod membership;
mod stage;

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use holdfast_replica::Timers;
use holdfast_scenario::{Only, Script, play, scripts};

use crate::executor::{MICROSECOND, MILLISECOND};
use crate::plan::{Load, Plan};
use crate::run::{self, Report};
use crate::world::World;

/// The dials of a script: nothing happens but what it says, and its bounds are for ordinary timers on an ordinary
/// network. What stays of the seed is the order of everything.
fn plan(script: &Script, seed: u64) -> Plan {
    let drawn = Plan::draw(seed);
    let load = Load {
        workers: script.workers,
        think: 15 * MILLISECOND,
        blocks: 512,
        run_max: 8,
        reads: 40,
        clears: 5,
    };
    let mut delays = drawn.delays;
    (delays.mean, delays.spike_one_in, delays.per_byte) = (300 * MICROSECOND, 0, 1);
    Plan {
        timers: Timers::default(),
        load,
        delays,
        disk_mean: 200 * MICROSECOND,
        drift_ppm: drawn.drift_ppm.iter().map(|_| 0).collect(),
        faults: Vec::new(),
        chaos: 0,
        ..drawn
    }
}

/// Plays a script once.
pub(crate) fn run(script: Script, seed: u64, out: Option<Box<dyn std::io::Write>>) -> Report {
    let plan = plan(&script, seed);
    run::run_as(plan, out, move |world, done| direct(world, done, script))
}

async fn direct(world: Rc<World>, done: Rc<Cell<bool>>, script: Script) {
    let Some(mut stage) = stage::Stage::set_up(&world, &script).await else {
        return world.trace.violation(format_args!("the cluster does not come up without any fault"));
    };
    match play(&script, &mut stage).await {
        Ok(()) => done.set(true),
        Err(why) => world.trace.violation(format_args!("{why}")),
    }
}

/// Says what there is.
pub(crate) fn list() {
    for script in scripts::all() {
        let rows: Vec<String> = script.rows.iter().map(u32::to_string).collect();
        let note = match script.only {
            Only::Everywhere => String::new(),
            Only::Simulated(why) => format!(" [only simulated: {why}]"),
            Only::Real(why) => format!(" [NOT SIMULATED: {why}]"),
        };
        println!("{:28} row {:7} {}{note}", script.name, rows.join(", "), script.what);
    }
}

/// The scripts of these names, all that can be simulated if there are none.
///
/// # Errors
/// A name that there is not, or of a script that is not for the simulation.
pub(crate) fn chosen(names: &[String]) -> Result<Vec<Script>, String> {
    if names.is_empty() {
        let can = |script: &Script| !matches!(script.only, Only::Real(_));
        return Ok(scripts::all().into_iter().filter(can).collect());
    }
    let one = |name: &String| {
        let script = scripts::named(name).ok_or_else(|| {
            let known: Vec<&str> = scripts::all().iter().map(|script| script.name).collect();
            format!("there is no script '{name}'; there are: {}", known.join(", "))
        })?;
        match script.only {
            Only::Real(why) => Err(format!("'{name}' is for real processes only: {why}")),
            _ => Ok(script),
        }
    };
    names.iter().map(one).collect()
}

/// Nanoseconds.
fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
