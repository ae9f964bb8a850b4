//! How a script is played, wherever that is.

use std::time::Duration;

use crate::step::{Condition, Deed, Script, Step};

/// A place where scripts are played.
#[allow(async_fn_in_trait, reason = "a script is played on one thread")]
pub trait Backend {
    /// Time since anything.
    fn now(&self) -> Duration;
    /// Ends after so long.
    async fn pause(&self, duration: Duration);
    /// Between two looks at a condition.
    fn look_every(&self) -> Duration;
    /// What a bound of a script is here: simulated time is exact, a machine may be busy.
    fn patience(&self, within: Duration) -> Duration;

    /// Carries out a deed.
    ///
    /// # Errors
    /// A sentence that says why it could not be done: the script has failed.
    async fn perform(&mut self, deed: &Deed) -> Result<(), String>;

    /// Looks whether something is so.
    ///
    /// # Errors
    /// What is so instead.
    async fn is_so(&mut self, condition: &Condition) -> Result<(), String>;

    /// What is wrong whatever the script says: a stale read, a replica that stopped.
    ///
    /// # Errors
    /// What.
    fn sound(&self) -> Result<(), String>;

    /// Everything is healed and checked: no request hangs, every block is as a disk may be, the replicas are equal.
    ///
    /// # Errors
    /// What is not.
    async fn finish(&mut self) -> Result<(), String>;
}

async fn await_it<B: Backend>(backend: &mut B, what: &Condition, within: Duration) -> Result<(), String> {
    let until = backend.now() + backend.patience(within);
    loop {
        backend.sound()?;
        match backend.is_so(what).await {
            Ok(()) => return Ok(()),
            Err(instead) if backend.now() > until => return Err(format!("instead: {instead}")),
            Err(_) => backend.pause(backend.look_every()).await,
        }
    }
}

async fn hold<B: Backend>(backend: &mut B, what: &Condition, lasts: Duration) -> Result<(), String> {
    let began = backend.now();
    loop {
        backend.sound()?;
        let held = backend.now() - began;
        backend.is_so(what).await.map_err(|instead| format!("after {held:?}: {instead}"))?;
        if held >= lasts {
            return Ok(());
        }
        backend.pause(backend.look_every().min(lasts - held)).await;
    }
}

/// Plays a script to its end.
///
/// # Errors
/// The step that failed, and why.
pub async fn play<B: Backend>(script: &Script, backend: &mut B) -> Result<(), String> {
    for (number, step) in script.steps.iter().enumerate() {
        let done = match step {
            Step::Do(deed) => backend.perform(deed).await,
            Step::Await { what, within } => await_it(backend, what, *within).await,
            Step::Hold { what, lasts } => hold(backend, what, *lasts).await,
            Step::Let(duration) => {
                backend.pause(*duration).await;
                Ok(())
            }
        };
        let place = || format!("step {} of {}, '{step}'", number + 1, script.name);
        done.and_then(|()| backend.sound()).map_err(|why| format!("{}: {why}", place()))?;
    }
    backend.finish().await.map_err(|why| format!("at the end of {}: {why}", script.name))
}
