//! When a volume is cleaned and its log purged: so that any volume can be overwritten for ever in bounded space.
//!
//! Cleaning moves applied blocks home and makes a checkpoint. Purging drops log entries that a checkpoint covers. A
//! follower that is away is healed by log for as long as the journal has room, and slows nobody when it has not.
//!
//! A full medium (INV-SPACE): the store's reserve is given up, and what waits in the journal comes home in its room,
//! and so does data that still comes from leaders elsewhere, but for the last part, which is for what makes room: trims,
//! drops of snapshots, merges. Then data stays in the journal.

use std::future::Future;
use std::rc::{Rc, Weak};
use std::time::Duration;

use holdfast_env::Instant;
use holdfast_protocol::planted::is_planted;
use holdfast_store::journal::{Journal, Pressure, levels};
use holdfast_store::volume::Dirty;
use holdfast_store::{Reserve, StoreError};
use holdfast_types::{LogIndex, limits};

use crate::space::FULL_PAUSE;
use crate::volume::Volume;

/// Dirty payload at which a volume is cleaned without pressure, in bytes.
const CLEAN_AT_BYTES: u64 = 16 << 20;
/// The same under pressure, while others need the log.
const HELD_CLEAN_AT_BYTES: u64 = 1 << 20;
// What is being cleaned is still in memory, and what comes meanwhile, too.
const _: () = assert!(CLEAN_AT_BYTES as usize * 2 <= limits::LOG_TAIL_BYTES_MAX);
/// A volume that has been quiet for this long is cleaned, so that restarts are short.
const IDLE: Duration = Duration::from_secs(5);
/// How long what is damaged is given to be healed from another replica before the cleaner gives up, and how often it
/// looks.
const HEAL_PATIENCE: Duration = Duration::from_secs(60);
const HEAL_PAUSE: Duration = Duration::from_millis(200);
/// Between steps of a merge, at least.
const MERGE_PAUSE_MIN: Duration = Duration::from_millis(1);
/// Cleans one volume until it is dropped or its store fails.
pub(crate) async fn run(volume: Weak<Volume>, journal: Journal) {
    loop {
        let Some(this) = volume.upgrade().filter(|this| !this.is_stopped()) else { return };
        if journal.failed().is_some() {
            return;
        }
        let cleaner = Cleaner { volume: &this, journal: &journal };
        let pressure_changed = journal.pressure_changed();
        let pressure = journal.pressure();
        let purge_above = if journal.is_full() { levels::PURGE_WHEN_FULL } else { levels::PURGE };
        let pressed = pressure.line_waits || pressure.line_percent >= purge_above;
        // What is home already makes room at once, whatever a pass takes.
        let purged = if pressed { purge(&this, &journal).await } else { Purged::All };
        if purged == Purged::Stopped {
            return;
        }
        let dirty = this.data().dirty();
        // While others need what is home already, more that is home makes no room now, but does soon.
        let pressed = pressed && (purged == Purged::All || dirty.bytes >= HELD_CLEAN_AT_BYTES);
        let wanted = this.machine().take_checkpoint_wanted();
        let due = cleaner.is_much(&dirty) || ((pressed || wanted || journal.is_full()) && dirty.any);
        let mut done = Done::Nothing;
        if due && cleaner.may_clean(&dirty).await {
            done = cleaner.clean().await;
        }
        if done == Done::Failed || (pressed && purge(&this, &journal).await == Purged::Stopped) {
            return;
        }
        if this.data().dirty().merges {
            done = done.and(cleaner.merge().await);
        }
        match done {
            Done::Failed => return,
            Done::Some => continue,
            Done::NoRoom => {
                cleaner.wait_for_room().await;
                continue;
            }
            Done::Nothing => {}
        }
        let before = this.group().position().applied_index();
        let idle = cleaner.wait(pressure_changed).await;
        let quiet = idle && this.group().position().applied_index() == before;
        let dirty = this.data().dirty();
        if quiet && dirty.any && cleaner.may_clean(&dirty).await && cleaner.clean().await == Done::Failed {
            return;
        }
    }
}

/// What came of a piece of work.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Done {
    /// All that there was to do, or nothing can be done now.
    Nothing,
    /// There is more to do.
    Some,
    /// The medium has no room for it.
    NoRoom,
    /// The replica's blocks are not brought home any more.
    Failed,
}

impl Done {
    /// What both together come to.
    fn and(self, other: Self) -> Self {
        let weight = |done| match done {
            Self::Nothing => 0,
            Self::NoRoom => 1,
            Self::Some => 2,
            Self::Failed => 3,
        };
        if weight(other) > weight(self) { other } else { self }
    }
}

#[derive(Clone, Copy)]
struct Cleaner<'c> {
    volume: &'c Rc<Volume>,
    journal: &'c Journal,
}

impl Cleaner<'_> {
    /// Whether so much is not home that it is brought there without pressure.
    fn is_much(&self, dirty: &Dirty) -> bool {
        dirty.bytes >= CLEAN_AT_BYTES.min(self.volume.log().clean_at_bytes())
    }

    /// Ends when there may be work: blocks were dirtied, the journal filled up, or it has been quiet for a while (then
    /// true).
    async fn wait(&self, pressure_changed: impl Future<Output = ()>) -> bool {
        let Self { volume, journal } = *self;
        let dirtied = async {
            loop {
                volume.machine().dirtied.notified().await;
                let pressure = journal.pressure();
                let urgent = pressure.line_waits || pressure.line_percent >= levels::URGENT;
                let wanted = volume.machine().is_checkpoint_wanted();
                let dirty = volume.data().dirty();
                // On a full medium whatever makes room is done at once.
                let makes_room = journal.is_full() && (dirty.cleared > 0 || dirty.layers);
                if urgent || wanted || makes_room || self.is_much(&dirty) || volume.is_stopped() {
                    return;
                }
            }
        };
        let filled_up = self.medium_changed();
        futures_util::pin_mut!(dirtied, pressure_changed, filled_up);
        let work = futures_util::future::select(dirtied, pressure_changed);
        let work = futures_util::future::select(work, filled_up);
        // Quiet for a while is a reason to look, too.
        holdfast_env::timeout(IDLE, work).await.is_err()
    }

    /// Ends when the medium has become full, or is so no more.
    async fn medium_changed(&self) {
        match self.journal.reserve() {
            Some(reserve) => reserve.changed().await,
            None => std::future::pending().await,
        }
    }

    /// Ends when there may be room, or something that makes some.
    async fn wait_for_room(&self) {
        let before = self.volume.data().dirty();
        let dirtied = async {
            loop {
                self.volume.machine().dirtied.notified().await;
                let dirty = self.volume.data().dirty();
                let makes_room = dirty.cleared > before.cleared || dirty.layers && !before.layers;
                if makes_room || self.volume.is_stopped() {
                    return;
                }
            }
        };
        let changed = self.medium_changed();
        futures_util::pin_mut!(changed, dirtied);
        // Others make room, too, and tell nobody.
        let _woken = holdfast_env::timeout(FULL_PAUSE, futures_util::future::select(changed, dirtied)).await;
    }

    /// Whether a pass may be made now. On a full medium the last of the room is not for data that came since.
    async fn may_clean(&self, dirty: &Dirty) -> bool {
        let Some(reserve) = self.full_reserve() else { return true };
        let first = self.volume.home_when_full.get() != reserve.times_full();
        first || dirty.cleared > 0 || dirty.layers || reserve.leaves_some().await
    }

    /// One cleaning pass. On a full medium what is not home may stay in the journal.
    async fn clean(&self) -> Done {
        let group = self.volume.group().id().group;
        let mut until = Instant::now() + HEAL_PATIENCE;
        loop {
            match self.pass().await {
                Ok(()) => return self.made_room().await,
                Err(error) if error.is_full() => match self.found_no_room(&error).await {
                    Done::Some => {}
                    other => return other,
                },
                // Damage is being healed, and a read may succeed the next time.
                Err(error @ (StoreError::Damaged { .. } | StoreError::Io { .. }))
                    if self.journal.failed().is_none()
                        && (Instant::now() < until || self.may_wait(&error)) =>
                {
                    if self.may_wait(&error) {
                        until = Instant::now() + HEAL_PATIENCE;
                    }
                    tracing::debug!(%group, %error, "cleaning waits until it is healed");
                    holdfast_env::sleep(HEAL_PAUSE).await;
                    if self.volume.is_stopped() {
                        return Done::Failed;
                    }
                }
                Err(error) => {
                    // Nothing of its log would ever be purged, and the other logs could not be either.
                    if matches!(error, StoreError::Io { .. }) {
                        self.journal.stop(&error);
                    }
                    return self.failed("its blocks cannot be brought home", &error);
                }
            }
        }
    }

    fn may_wait(&self, error: &StoreError) -> bool {
        may_wait(error, self.volume.data().awaits_pages(), self.journal.pressure())
    }

    async fn pass(&self) -> Result<(), StoreError> {
        let (data, machine) = (self.volume.data(), self.volume.group().machine());
        let checkpoint = match self.full_reserve() {
            None => data.clean(machine).await?,
            Some(reserve) => {
                let _using = reserve.in_use();
                let times = reserve.times_full();
                let checkpoint = data.clean_tight(machine).await?;
                self.volume.home_when_full.set(times);
                checkpoint
            }
        };
        tracing::trace!(group = %self.volume.group().id().group, index = %checkpoint.id.index, "cleaned");
        Ok(())
    }

    /// The reserve, if the medium is full.
    fn full_reserve(&self) -> Option<&Reserve> {
        self.journal.reserve().filter(|reserve| reserve.is_full())
    }

    /// Gives the reserve up, if it is whole: then it is tried again. Else room is waited for.
    async fn found_no_room(&self, error: &StoreError) -> Done {
        let group = self.volume.group().id().group;
        match self.journal.reserve().filter(|reserve| !reserve.is_full()) {
            Some(reserve) if !is_planted("hoard-the-reserve") => match reserve.give_up().await {
                Ok(()) => Done::Some,
                Err(error) => self.reserve_failed(&error),
            },
            _ => {
                tracing::warn!(%group, %error, "the medium is full: blocks wait in the journal until there is room");
                if self.volume.is_stopped() { Done::Failed } else { Done::NoRoom }
            }
        }
    }

    /// What was done may have made room: then the medium is full no more.
    async fn made_room(&self) -> Done {
        let Some(reserve) = self.full_reserve() else { return Done::Nothing };
        match reserve.refill().await {
            Ok(_) => Done::Nothing,
            Err(error) => self.reserve_failed(&error),
        }
    }

    fn reserve_failed(&self, error: &StoreError) -> Done {
        self.journal.stop(error);
        Done::Failed
    }

    fn failed(&self, what: &str, error: &StoreError) -> Done {
        let group = self.volume.group().id().group;
        tracing::error!(%group, %error, what, "the cleaner has stopped: the replica must be replaced");
        self.volume.cleaner_failed(format!("{what}: {error}"));
        Done::Failed
    }

    /// One step of merging layers. It takes at most half of the time: others want the disk, too.
    async fn merge(&self) -> Done {
        let began = Instant::now();
        let merged = match self.full_reserve() {
            None => self.volume.data().merge_step().await,
            Some(reserve) => {
                let _using = reserve.in_use();
                self.volume.data().merge_step_tight().await
            }
        };
        match merged {
            Ok(more) => {
                if self.made_room().await == Done::Failed {
                    return Done::Failed;
                }
                if !more {
                    return Done::Nothing;
                }
                holdfast_env::sleep(Instant::now().since(began).max(MERGE_PAUSE_MIN)).await;
                Done::Some
            }
            // What is there is complete as it is.
            Err(error) if error.is_full() => self.found_no_room(&error).await,
            // What is there is complete without it, and the healer is at it.
            Err(error @ StoreError::Damaged { .. }) => {
                let group = self.volume.group().id().group;
                tracing::warn!(%group, %error, "layers of dropped snapshots wait until it is healed");
                Done::Nothing
            }
            Err(error) => self.failed("a dropped snapshot's layer cannot be merged", &error),
        }
    }
}

/// Whether it harms nobody to wait for what is damaged for as long as it takes: it comes from another replica
/// (`heal.rs`), and the journal has room.
fn may_wait(error: &StoreError, awaits_pages: bool, pressure: Pressure) -> bool {
    let has_room = !pressure.line_waits && pressure.line_percent < levels::URGENT;
    matches!(error, StoreError::Damaged { .. }) && awaits_pages && has_room
}

/// What came of purging a log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Purged {
    /// Everything up to the checkpoint goes.
    All,
    /// Others need some of it, and it is kept for them for now.
    Held,
    /// The group has stopped.
    Stopped,
}

/// Purges the log to the checkpoint; while there is room, only as far as nobody needs it: neither a rebuild from this replica
/// nor a follower that lacks it.
async fn purge(volume: &Rc<Volume>, journal: &Journal) -> Purged {
    let checkpoint = volume.data().checkpoint().id.index;
    let purged = volume.log().purged().map_or(LogIndex::ZERO, |id| id.index);
    let pressure = journal.pressure();
    let may_hold_below = |percent: u32| !pressure.line_waits && pressure.line_percent < percent;
    // INV-SPACE: on a full medium the journal is rather for what makes room.
    let is_full = journal.is_full();
    let pull_below = if is_full { levels::FULL_TAKES_BELOW } else { levels::GIVE_UP };
    let pulled = volume.hold().index().filter(|_| may_hold_below(pull_below));
    let lacked = volume.group().lacked_after(purged);
    let lacked = lacked.filter(|_| may_hold_below(levels::FOLLOWER_GIVEN_UP) && !is_full);
    let held = [pulled, lacked].into_iter().flatten().min().filter(|index| *index < checkpoint);
    let upto = held.unwrap_or(checkpoint);
    let outcome = if held.is_some() { Purged::Held } else { Purged::All };
    let given_up = volume.group().given_up();
    let may_go =
        if held.is_some() { upto > purged && given_up.may_go_in_part() } else { !given_up.is_pending() };
    if upto <= purged || !may_go {
        return outcome;
    }
    match volume.group().purge(upto).await {
        Ok(()) => {
            if held.is_none() {
                given_up.give_up(upto, volume.group().timers().election_max);
            }
            outcome
        }
        Err(crate::group::GroupError::Stopped(why)) => {
            tracing::error!(group = %volume.group().id().group, %why, "the log is not purged any more");
            Purged::Stopped
        }
        Err(error) => {
            tracing::warn!(group = %volume.group().id().group, %error, "the log was not purged this time");
            outcome
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_others_hold_is_waited_for_and_only_while_there_is_room() {
        let damaged = StoreError::Damaged { what: "a page".into(), why: "it is old".into() };
        let pressure = |line_percent, line_waits| Pressure { used_percent: 0, line_percent, line_waits };
        assert!(may_wait(&damaged, true, pressure(10, false)));
        assert!(!may_wait(&damaged, false, pressure(10, false)));
        assert!(!may_wait(&damaged, true, pressure(levels::URGENT, false)));
        assert!(!may_wait(&damaged, true, pressure(10, true)));
        assert!(!may_wait(&StoreError::Failed("it stopped".into()), true, pressure(10, false)));
    }
}
