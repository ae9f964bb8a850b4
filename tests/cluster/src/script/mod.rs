//! Scripts of `holdfast_scenario`, played on real processes: the deeds are commands of the development cluster, the
//! guests speak NBD.

mod guest;
mod stage;

use holdfast_scenario::{Only, Script, play, scripts};

use crate::Outcome;
use crate::scenarios::Place;

/// Plays a script.
pub async fn run(place: &Place<'_>, script: &Script) -> Outcome<()> {
    if let Only::Simulated(why) = script.only {
        return Err(format!("{} is for the simulation only: {why}", script.name));
    }
    let mut stage = stage::Stage::set_up(place, script).await?;
    play(script, &mut stage).await?;
    stage.stop().await
}

/// Those that are played on real processes.
pub fn all() -> Vec<Script> {
    scripts::all().into_iter().filter(|script| !matches!(script.only, Only::Simulated(_))).collect()
}

/// Says what there is beside.
pub fn not_played() -> Vec<(&'static str, &'static str)> {
    let why = |script: Script| match script.only {
        Only::Simulated(why) => Some((script.name, why)),
        _ => None,
    };
    scripts::all().into_iter().filter_map(why).collect()
}
