//! When a volume is cleaned and its log purged: so that any volume can be overwritten for ever in bounded space.
//!
//! Cleaning moves applied blocks home and makes a checkpoint. Purging drops log entries that a checkpoint covers. A
//! follower that is away is healed by log for as long as the journal has room, and slows nobody when it has not.

use std::future::Future;
use std::rc::{Rc, Weak};
use std::time::Duration;

use holdfast_env::Instant;
use holdfast_store::StoreError;
use holdfast_store::journal::Journal;
use holdfast_types::{LogIndex, limits};

use crate::rebuild::PurgeHold;
use crate::volume::Volume;

/// Dirty payload at which a volume is cleaned without pressure, in bytes.
const CLEAN_AT_BYTES: u64 = 16 << 20;
// What is being cleaned is still in memory, and what comes meanwhile, too.
const _: () = assert!(CLEAN_AT_BYTES as usize * 2 <= limits::LOG_TAIL_BYTES_MAX);
/// A volume that has been quiet for this long is cleaned, so that restarts are short.
const IDLE: Duration = Duration::from_secs(5);
/// How long what is damaged is given to be healed from another replica before the cleaner gives up, and how often it
/// looks.
const HEAL_PATIENCE: Duration = Duration::from_secs(60);
const HEAL_PAUSE: Duration = Duration::from_millis(200);
/// Between tries while the medium is full.
const FULL_PAUSE: Duration = Duration::from_secs(1);
/// Between steps of a merge, at least.
const MERGE_PAUSE_MIN: Duration = Duration::from_millis(1);
/// Fraction of the journal in use above which logs are purged, in percent.
const PURGE_ABOVE_PERCENT: u32 = 50;
/// Above this fraction whatever was applied is moved home at once: the reserve is near (a quarter of a small journal),
/// and writers will wait for the room.
const URGENT_ABOVE_PERCENT: u32 = 60;
/// Above this fraction the log is not kept for a rebuild any more: retention slows nobody. A rebuild that falls out of
/// the log begins again, and sends only what differs by then.
const HOLD_BELOW_PERCENT: u32 = 60;

/// Cleans one volume until it is dropped or its store fails.
pub(crate) async fn run(volume: Weak<Volume>, journal: Journal, hold: Rc<PurgeHold>) {
    loop {
        let Some(this) = volume.upgrade().filter(|this| !this.is_stopped()) else { return };
        if journal.failed().is_some() {
            return;
        }
        let pressure_changed = journal.pressure_changed();
        let pressure = journal.pressure();
        let pressed = pressure.line_waits || pressure.used_percent >= PURGE_ABOVE_PERCENT;
        let dirty = this.data().dirty();
        let wanted = this.machine().take_checkpoint_wanted();
        let due = dirty.bytes >= CLEAN_AT_BYTES || ((pressed || wanted) && dirty.any);
        if due && !clean(&this, &journal).await {
            return;
        }
        if pressed && !purge(&this, &journal, &hold).await {
            return;
        }
        if dirty.merges {
            match merge(&this).await {
                Merged::More => continue,
                Merged::Nothing => {}
                Merged::Failed => return,
            }
        }
        let before = this.group().position().applied_index();
        let idle = wait(&this, &journal, pressure_changed).await;
        let quiet = idle && this.group().position().applied_index() == before;
        if quiet && this.data().dirty().any && !clean(&this, &journal).await {
            return;
        }
    }
}

/// Ends when there may be work: blocks were dirtied, the journal filled up, or it has been quiet for a while (then true).
async fn wait(volume: &Rc<Volume>, journal: &Journal, pressure_changed: impl Future<Output = ()>) -> bool {
    let dirtied = async {
        loop {
            volume.machine().dirtied.notified().await;
            let pressure = journal.pressure();
            let urgent = pressure.line_waits || pressure.used_percent >= URGENT_ABOVE_PERCENT;
            let wanted = volume.machine().is_checkpoint_wanted();
            if urgent || wanted || volume.data().dirty().bytes >= CLEAN_AT_BYTES || volume.is_stopped() {
                return;
            }
        }
    };
    futures_util::pin_mut!(dirtied, pressure_changed);
    let work = futures_util::future::select(dirtied, pressure_changed);
    // Quiet for a while is a reason to look, too.
    holdfast_env::timeout(IDLE, work).await.is_err()
}

/// One cleaning pass; false if it can never be done. A full medium is waited for: what is not home stays in the journal.
async fn clean(volume: &Rc<Volume>, journal: &Journal) -> bool {
    let group = volume.group().id().group;
    let began = Instant::now();
    loop {
        match volume.data().clean(volume.group().machine()).await {
            Ok(checkpoint) => {
                tracing::trace!(%group, index = %checkpoint.id.index, "cleaned");
                return true;
            }
            Err(error @ StoreError::Io { full: true, .. }) => {
                tracing::warn!(%group, %error, "the medium is full: blocks wait in the journal until there is room");
                holdfast_env::sleep(FULL_PAUSE).await;
                if volume.is_stopped() {
                    return false;
                }
            }
            // Damage is being healed, and a read may succeed the next time.
            Err(error @ (StoreError::Damaged { .. } | StoreError::Io { .. }))
                if journal.failed().is_none() && Instant::now() < began + HEAL_PATIENCE =>
            {
                tracing::debug!(%group, %error, "cleaning waits until it is healed");
                holdfast_env::sleep(HEAL_PAUSE).await;
                if volume.is_stopped() {
                    return false;
                }
            }
            Err(error) => {
                // Nothing of its log would ever be purged, and the other logs could not be either.
                if matches!(error, StoreError::Io { .. }) {
                    journal.stop(&error);
                }
                tracing::error!(%group, %error, "the cleaner has stopped: the replica must be replaced");
                volume.cleaner_failed(format!("its blocks cannot be brought home: {error}"));
                return false;
            }
        }
    }
}

enum Merged {
    /// There is more to do.
    More,
    /// Not now, at least.
    Nothing,
    /// The replica's blocks are not brought home any more.
    Failed,
}

/// One step of merging layers. It takes at most half of the time: others want the disk, too.
async fn merge(volume: &Rc<Volume>) -> Merged {
    let group = volume.group().id().group;
    let began = Instant::now();
    match volume.data().merge_step().await {
        Ok(true) => {
            holdfast_env::sleep(Instant::now().since(began).max(MERGE_PAUSE_MIN)).await;
            Merged::More
        }
        Ok(false) => Merged::Nothing,
        // What is there is complete as it is; cleaning comes first.
        Err(error @ StoreError::Io { full: true, .. }) => {
            tracing::warn!(%group, %error, "the medium is full: layers of dropped snapshots wait for room");
            Merged::Nothing
        }
        // What is there is complete without it, and the healer is at it.
        Err(error @ StoreError::Damaged { .. }) => {
            tracing::warn!(%group, %error, "layers of dropped snapshots wait until it is healed");
            Merged::Nothing
        }
        Err(error) => {
            tracing::error!(%group, %error, "layers are not merged any more: the replica must be replaced");
            volume.cleaner_failed(format!("a dropped snapshot's layer cannot be merged: {error}"));
            Merged::Failed
        }
    }
}

/// Purges the log to the checkpoint, or to what a rebuild from this replica still needs; false if the group stopped.
async fn purge(volume: &Rc<Volume>, journal: &Journal, hold: &PurgeHold) -> bool {
    let checkpoint = volume.data().checkpoint().id.index;
    let pressure = journal.pressure();
    let may_hold = !pressure.line_waits && pressure.used_percent < HOLD_BELOW_PERCENT;
    let held = hold.index().filter(|_| may_hold);
    let upto = held.map_or(checkpoint, |index| checkpoint.min(index));
    let purged = volume.log().purged().map_or(LogIndex::ZERO, |id| id.index);
    if upto <= purged {
        return true;
    }
    match volume.group().purge(upto).await {
        Ok(()) => true,
        Err(crate::group::GroupError::Stopped(why)) => {
            tracing::error!(group = %volume.group().id().group, %why, "the log is not purged any more");
            false
        }
        Err(error) => {
            tracing::warn!(group = %volume.group().id().group, %error, "the log was not purged this time");
            true
        }
    }
}
